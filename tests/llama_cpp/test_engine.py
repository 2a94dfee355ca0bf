"""Files that llama.cpp opens, and in which it computes what we compute."""

import copy
import json
import math
from pathlib import Path

import made
import numpy as np
import pytest
import tiny
import torch
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from probeprune import compose, export_gguf, load_model, prune, save
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import evaluation_windows
from probeprune.engines.gguf_plan import plan
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.gguf_keys import Reader
from probeprune.model.gguf_tensors import written

TEXTS = (
    "Hello w\u00f6rld, na\u00efve caf\u00e9 \u2014 \u6771\u4eac \U0001f680\U0001f469\u200d\U0001f4bb",
    "def f(x):\n    return x**2  # comment\n\t\tif a != b: pass\r\n",
    "<|im_start|>user\nHi 12345 3.14<|im_end|>\n<|endoftext|>",
    "  leading   spaces\n\n\n and 1000000 numbers, I'll don't WE'VE",
)
TEXT = "".join(TEXTS[:2])
LOGS = {"silu": 1e-4, "gelu": 0.02}
"""How far a log-probability of at least -12 may be off: the engine reads GELU from a table of float16."""


def log_probabilities(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def differences(engine, file, model, ids) -> tuple[float, float]:
    """The largest difference of a probability, and of a log-probability of at least -12."""
    (scores,) = engine.scores(file, [ids], whole=True)
    want = log_probabilities(model, ids)
    logs = (scores.all - want)[want > -12].abs().max()
    return float((scores.all.exp() - want.exp()).abs().max()), float(logs)


def architecture_of(file) -> str:
    return Reader(file).fields["general.architecture"].contents()


@pytest.mark.parametrize("name", list(made.MADE))
def test_the_engine_computes_what_we_compute_and_so_does_the_file_opened_again(
    name, llama_cpp, words, tmp_path, monkeypatch, record_property
):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    architecture, build = made.MADE[name]
    model, file = build(), tmp_path / "model.gguf"
    assert export_gguf(model, file, tokenizer=words, type="f32") == file
    assert architecture_of(file) == architecture
    ids = words(TEXT).input_ids
    probability, log = differences(llama_cpp, file, model, ids)
    record_property("probability", probability)
    record_property("log", log)
    exact = not architecture.startswith(("gemma", "gptneox"))
    assert log < LOGS["silu" if exact else "gelu"]
    again = load_model(str(file), dtype="float32", device="cpu")
    assert again.tokenizer(TEXT).input_ids == ids
    # A file does not say which GELU it is.
    near = 0.01 if getattr(model.config, "hidden_act", "") == "gelu_new" else 1e-5
    assert (log_probabilities(again.model, ids) - log_probabilities(model, ids)).abs().max() < near
    second = tmp_path / "second.gguf"
    export_gguf(again.model, second, tokenizer=again.tokenizer, type="f32")
    same_files(file, second, exact)


def same_files(first, second, exact: bool) -> None:
    """The same keys and tensors; only biases of zeros may be new."""
    a, b = Reader(first), Reader(second)
    if architecture_of(first) == architecture_of(second):
        ours, theirs = ({k: v.contents() for k, v in reader.fields.items()} for reader in (a, b))
        for key in ("general.name", "general.size_label", "GGUF.tensor_count"):
            assert ours.pop(key) and theirs.pop(key)
        assert ours == theirs
    tensors = {tensor.name: tensor.data for tensor in b.tensors}
    for tensor in a.tensors:  # norms of Gemma are stored as 1 + w
        got = tensors.pop(tensor.name)
        same = np.array_equal(got, tensor.data) if exact else np.allclose(got, tensor.data, atol=1e-6)
        assert same, tensor.name
    assert all(name.endswith(".bias") and not data.any() for name, data in tensors.items())


def test_texts_longer_than_the_short_context_of_phi3(llama_cpp, words, tmp_path):
    model = made.DENSE["phi3-long"]()
    export_gguf(model, tmp_path / "model.gguf", tokenizer=words, type="f32")
    engine = made.with_context(llama_cpp, 1024)
    ids = tiny.token_ids(1, 300)[0].tolist()
    assert differences(engine, tmp_path / "model.gguf", model, ids)[1] < 1e-4


@pytest.fixture(scope="module")
def pruned(smollm2):
    """SmolLM2-135M with odd widths, uneven heads and biases."""
    model = load_model("smollm2-135m", dtype="float32", device="cpu").model
    method = compose("flap", name="flap", round_to=1, skip_layers=1)
    prune(model, method, 0.2, calibration=smollm2.tokenizer(TEXT * 8, return_tensors="pt").input_ids)
    return model


@pytest.fixture(scope="module")
def narrowed(smollm2):
    """SmolLM2-135M with narrower MLPs, whose rows every type can hold."""
    model = load_model("smollm2-135m", dtype="float32", device="cpu").model
    method = compose("wanda-sp", name="wanda-sp", blocks=("mlp",), round_to=32)
    windows = evaluation_windows(load_corpus("wikitext2"), smollm2.tokenizer, length=256, limit=2)
    prune(model, method, 0.1, calibration=windows)
    return model


@pytest.mark.real
class TestSmolLM2:
    """The real model, dense and pruned."""

    @pytest.fixture(scope="class")
    def file(self, pruned, smollm2, tmp_path_factory):
        file = tmp_path_factory.mktemp("gguf") / "pruned.gguf"
        export_gguf(pruned, file, tokenizer=smollm2.tokenizer, type="f32")
        return file

    def test_tokens(self, file, llama_cpp, smollm2):
        ours = [smollm2.tokenizer(text).input_ids for text in TEXTS]
        assert llama_cpp.tokens(file, TEXTS) == ours

    def test_probabilities_differ_no_more_than_those_of_the_dense_file(
        self, file, pruned, llama_cpp, smollm2, tmp_path, record_property
    ):
        export_gguf(smollm2.model, tmp_path / "dense.gguf", tokenizer=smollm2.tokenizer, type="f32")
        ids = smollm2.tokenizer(TEXT).input_ids
        dense = differences(llama_cpp, tmp_path / "dense.gguf", smollm2.model, ids)
        ours = differences(llama_cpp, file, pruned, ids)
        record_property("dense", dense)
        record_property("pruned", ours)
        assert architecture_of(file) == "deci" and architecture_of(tmp_path / "dense.gguf") == "llama"
        assert dense[0] < 1e-3 and ours[0] < 1e-3
        assert dense[1] < 2e-3 and ours[1] < 2e-3

    def test_greedy_text(self, file, pruned, llama_cpp, smollm2):
        ids = smollm2.tokenizer("The capital of France is").input_ids
        with torch.no_grad():
            made = pruned.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
        assert llama_cpp.greedy(file, ids, 32) == made[0, len(ids) :].tolist()

    @pytest.mark.parametrize("type", ["bf16", "q5_0", "q4_1"])
    def test_other_types_open(self, type, narrowed, llama_cpp, smollm2, tmp_path):
        """They are stored by the same code as those below, whose numbers are compared."""
        file = tmp_path / "model.gguf"
        export_gguf(narrowed, file, tokenizer=smollm2.tokenizer, type=type)
        ids = smollm2.tokenizer("The capital of France is").input_ids
        assert len(llama_cpp.greedy(file, ids, 4)) == 4

    @pytest.mark.parametrize("type", ["f16", "q8_0", "q5_1", "q4_0"])
    def test_types(self, type, narrowed, llama_cpp, smollm2, tmp_path, record_property):
        """Perplexity within 2 % of the same numbers, dequantised, in torch.

        The engine rounds activations too, so single probabilities differ: 510 tokens average that out.
        """
        model = copy.deepcopy(narrowed)
        file = tmp_path / "model.gguf"
        export_gguf(model, file, tokenizer=smollm2.tokenizer, type=type)
        windows = evaluation_windows(load_corpus("wikitext2"), smollm2.tokenizer, length=256, limit=2)
        theirs = llama_cpp.perplexity(file, windows.tolist())
        state = {tensor.name: tensor for tensor in Reader(file).tensors}
        for entry in plan(model, type).entries:
            if entry.kind == "weight":  # rows in the file's order: compare in that order, keep ours
                put_back(model, entry, state[entry.name])
        ours = perplexity(model, windows).value
        record_property("perplexity", (theirs, ours))
        assert theirs == pytest.approx(ours, rel=0.02)

    def test_what_came_with_the_model_is_kept_through_pruning_and_saving(self, pruned, smollm2, tmp_path):
        save(pruned, tmp_path / "checkpoint", tokenizer=smollm2.tokenizer)
        export_gguf(tmp_path / "checkpoint", tmp_path / "again.gguf", type="bf16")
        source = Reader(made.embedded()).fields
        fields = Reader(tmp_path / "again.gguf").fields
        kept = [k for k in source if k.startswith("tokenizer.") or k == "general.license"]
        assert len(kept) > 10
        for key in kept:
            assert fields[key].contents() == source[key].contents(), key
            assert fields[key].types == source[key].types, key


def put_back(model, entry, stored) -> None:
    """Give a model the numbers that a file holds of it at one place."""
    from probeprune.model.gguf_tensors import restored

    shape = [int(size) for size in reversed(stored.shape)]
    numbers = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type))).view(shape)
    assert written(entry.place, model, entry.kind, entry.heads).shape == numbers.shape
    (path,) = entry.place.part.modules
    with torch.no_grad():
        model.get_submodule(path).weight.copy_(restored(numbers, entry.place.part.order, entry.heads))


def test_a_tokenizer_as_sentencepiece_makes_it(llama_cpp, tmp_path):
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(Path(made.__file__).read_text(encoding="utf-8").split("\n"), trainer)
    state = json.loads(backend.to_str())  # the trainer makes bytes special; a published file does not
    state["added_tokens"] = state["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    model = tiny.lively(made.llama(vocab_size=710))()  # more embeddings than tokens
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, type="f32")
    texts = ["from probeprune import compose, prune", "na\u00efve \u6771\u4eac\n\ttabs  and   spaces", "a"]
    ours = [tokenizer(text).input_ids for text in texts]
    assert llama_cpp.tokens(tmp_path / "model.gguf", texts) == ours
    assert not math.isnan(llama_cpp.perplexity(tmp_path / "model.gguf", ours[:2]))
