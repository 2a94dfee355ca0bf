"""Fixtures shared by all tests. The hub is switched off: whatever needs it must fail at once, and say so."""

import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: they read it once

import pytest
from tiny import FAMILIES, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from probeprune.model.loading import LoadedModel, load_model
from probeprune.preparation import Preparation
from probeprune.runtime import attaching
from probeprune.strategies.account import Costs

ALWAYS = Costs((1,), (1.0,), (0.0,), (1,), (0.0,))
"""Costs under which every probe pays."""


@pytest.fixture(scope="session", autouse=True)
def probing_pays():
    """Methods with `pays="auto"` probe every batch where a test gives no costs: no clock decides a result."""
    measured = attaching.costs_for

    def given(model, kept, blocks):
        costs = measured(model, replace(kept, costs=kept.costs or ALWAYS), blocks) if auto(kept) else None
        return measured(model, kept, blocks) if costs is None else costs

    def auto(kept):
        return kept.method.when.every_batch and kept.method.when.probe.pays == "auto"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attaching, "costs_for", given)
        yield


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The embedded model in float32, from the user's cache; a test that changes it must put it back."""
    return load_model("smollm2-135m", dtype="float32")


@pytest.fixture(scope="session")
def number_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = the number written: "7 8 9" is [7, 8, 9]. So a window says where in the text it was cut.

    It starts a text with token 1000 when asked for special tokens, and calls more than 16 tokens too long.
    """
    vocabulary = {str(number): number for number in range(1000)} | {"<s>": 1000, "<pad>": 1001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1000)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", model_max_length=16
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def calibrated(request):
    """A model and its preparation, from windows shorter than the sequences it will see."""
    model = FAMILIES[request.param]()
    return model, Preparation(model, token_ids(6, 16, seed=9), batch_size=4)


@pytest.fixture(scope="module")
def llama():
    """The same for one family, with grouped-query attention."""
    model = FAMILIES["llama-gqa"]()
    return model, Preparation(model, token_ids(6, 16, seed=9), batch_size=4)
