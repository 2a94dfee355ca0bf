"""The older decoder families: weights stored the other way round, fused maps, one key-value head, ALiBi.

Every family runs through all that a cut promises; `test_all_methods.py` and the tests beside it do so for all
methods on the other families.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from all_methods import ALL, check_cut, check_passes
from tiny import close, kept, lively, logits, masked, padded, snapshot, token_ids
from transformers import PreTrainedModel

from probeprune import attach, compose, find_blocks, prune, save, with_equal_widths
from probeprune.errors import UsageError
from probeprune.model.cost import blocks_flops, counting_flops
from probeprune.model.described import export
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.passes import find_decoder
from probeprune.prepare import prepare

GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 5, "n_positions": 128, "vocab_size": 128, "n_inner": 100}
GPTJ = {**GPT2, "rotary_dim": 4}
FALCON = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "ffn_hidden_size": 100,
    "vocab_size": 128,
    "bias": False,
}
XGLM = {"d_model": 48, "attention_heads": 6, "num_layers": 5, "ffn_dim": 100, "vocab_size": 128}
NEO = {"hidden_size": 48, "num_heads": 6, "num_layers": 5, "max_position_embeddings": 128, "vocab_size": 128}
NEO_TYPES = [[["global", "local"], 2], [["local"], 1]]
BIOGPT = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "intermediate_size": 100,
    "vocab_size": 128,
}


def _of(name: str, config: str = "", **fields: Any) -> Callable[[], PreTrainedModel]:
    model = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return lively(lambda: model(getattr(transformers, f"{config or name}Config")(**fields)))


FAMILIES = {
    "gpt2": _of("GPT2", **GPT2),
    "gpt-bigcode": _of("GPTBigCode", **GPT2),
    "gpt-bigcode-multi-head": _of("GPTBigCode", **GPT2, multi_query=False),
    "gpt-neo": _of("GPTNeo", **NEO, attention_types=NEO_TYPES, window_size=8),
    "gptj": _of("GPTJ", **GPTJ),
    "codegen": _of("CodeGen", **{**GPTJ, "n_head": 8, "n_embd": 64}),
    "bloom": _of("Bloom", hidden_size=48, n_head=6, n_layer=5, vocab_size=128),
    "falcon": _of("Falcon", **FALCON),
    "falcon-grouped": _of("Falcon", **FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-sequential": _of("Falcon", **{**FALCON, "bias": True}, multi_query=False, parallel_attn=False),
    "falcon-alibi": _of("Falcon", **FALCON, alibi=True, multi_query=False),
    "mpt": _of("Mpt", d_model=48, n_heads=6, n_layers=5, max_seq_len=128, vocab_size=128),
    "xglm": _of("XGLM", **XGLM, max_position_embeddings=128),
    "biogpt": _of("BioGpt", **BIOGPT, max_position_embeddings=128),
}
HEADS_STAY = ("codegen", "bloom", "falcon-alibi", "mpt")
EACH = pytest.mark.parametrize("family", FAMILIES)
WINDOWS = token_ids(8, 16, seed=9)


@pytest.fixture(autouse=True)
def quiet():
    """Transformers warns of the special tokens that these vocabularies lack."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


@EACH
@pytest.mark.parametrize("method", ["ppsp", "probe"])
def test_attached_is_masked_and_detached_is_untouched(family, method):
    model = FAMILIES[family]()
    before = snapshot(model)
    ids, mask = padded("left")
    dense = logits(model, ids, mask)
    with attach(model, method, 0.0, calibration=WINDOWS):
        close(logits(model, ids, mask), dense)
    with attach(model, method, 0.3, calibration=WINDOWS) as handle:
        got, choice = logits(model, ids, mask), kept(handle)
        assert {b.kind for b, _ in choice} == ({"mlp"} if family in HEADS_STAY else {"attention", "mlp"})
        for kind in {b.kind for b, _ in choice}:
            assert any(len(units) < b.units for b, units in choice if b.kind == kind)
    before.assert_untouched()
    with masked(choice):
        want = logits(model, ids, mask)
    assert (want - dense).abs().max() > 0.01
    close(got, want)


@pytest.mark.parametrize(
    "family, method",
    [*((f, "wanda-sp") for f in FAMILIES), *((f, "best-static") for f in ("gpt2", "falcon", "bloom"))],
)
def test_cut_saved_opened_and_generating(family, method, tmp_path):
    loaded = check_cut(FAMILIES[family], compose(method, skip_layers=1), WINDOWS, tmp_path)
    ids, mask = padded("left")
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": 127}
    settings |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    cached, plain = (loaded.generate(ids, use_cache=use, **settings) for use in (True, False))
    for got, want in zip(cached.logits, plain.logits, strict=True):
        close(got, want)


@EACH
def test_generation_while_attached_continues_its_cache(family):
    model = FAMILIES[family]()
    ids = token_ids(2, 10)
    with attach(model, "wanda-sp", 0.3, calibration=WINDOWS) as handle:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=127, pad_token_id=0)
        choice = kept(handle)
    with masked(choice):
        again = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=127, pad_token_id=0)
    assert out.equal(again)


@EACH
def test_flops_counted_are_those_of_the_formula(family):
    model, ids = FAMILIES[family](), token_ids(3, 24)

    def counted() -> int:
        with counting_flops() as count, torch.no_grad():
            find_decoder(model)(input_ids=ids, use_cache=False)
        return count.flops

    blocks = find_blocks(model)
    rest = counted() - blocks_flops(blocks, [b.units for b in blocks], 3, 24)
    with attach(model, compose("random", skip_layers=0), 0.4) as handle:
        assert counted() - rest == blocks_flops(handle.blocks, handle.widths, 3, 24)
    # Each parameter of the layers is in one block, but for the norms' and those of heads that stay.
    layers = [p for n, p in model.named_parameters() if ".0." in n and p.ndim > 1]
    assert sum(p.numel() for p in layers) >= sum(b.parameters for b in blocks if b.layer == 0) - 1000


@EACH
def test_layers_run_one_at_a_time_give_what_the_model_does(family):
    """Also where a layer adds to the output of its MLP in place."""
    model = FAMILIES[family]()
    runner = LayerRunner(model, [WINDOWS])
    blocks = find_blocks(model)
    hidden = runner.hidden[0]
    with torch.no_grad():
        for layer in range(len(runner)):
            here = [b for b in blocks if b.layer == layer]
            with capture(here) as captured:
                hidden = runner.run(layer, 0, hidden)
            for block in here:
                seen = captured[block.kind]
                close(seen.output, block.consumer(seen.z).view_as(seen.output))
        close(runner.finish(0, hidden), find_decoder(model)(WINDOWS)[0])


@pytest.mark.parametrize("family", HEADS_STAY)
def test_where_heads_stay_the_reason_is_read(family):
    model = FAMILIES[family]()
    method = compose("random", blocks=("attention",), skip_layers=0)
    for work in (attach, prune):
        with pytest.raises(UsageError, match=r"to stay: .*(ALiBi|four).*; prune its MLPs \(blocks mlp\)\."):
            work(model, method, 0.1)


@EACH
def test_plain_configs_hold_mlps_where_they_have_a_field_for_them(family, tmp_path):
    model = FAMILIES[family]()
    prune(model, compose(with_equal_widths("random"), blocks=("mlp",)), 0.2)
    if family in ("bloom", "mpt"):
        with pytest.raises(UsageError, match=r"no field for the width of its MLPs.*use layout per-layer"):
            export(model, "uniform")
        return
    save(model, tmp_path / "out", layout="uniform")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(FAMILIES[family]())
    close(logits(loaded.eval(), *padded("left")), logits(model, *padded("left")))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in HEADS_STAY])
def test_no_plain_config_holds_fewer_heads(family):
    model = FAMILIES[family]()
    prune(model, with_equal_widths("random"), 0.4)
    with pytest.raises(UsageError, match=r"no plain config describes.*layout per-layer.*\(blocks mlp\)"):
        export(model, "uniform")


@pytest.mark.parametrize("units", ["group", "balanced", "query"])
def test_with_a_single_key_value_head_units_are_query_heads(units):
    for model in (FAMILIES["gpt-bigcode"](), FAMILIES["falcon"]()):
        block = find_blocks(model, units)[0]
        assert (block.units, block.unit_width, block.kv_heads, len(block.members)) == (6, 8, 1, 2)
        rows, columns = block.members
        assert (rows.start, rows.axis, columns.axis) == (0, 0, 1)
    if units != "group":
        with pytest.raises(UsageError, match="use unit_kind='group'"):
            find_blocks(FAMILIES["falcon-grouped"](), units)


# -- weights stored the other way round ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_all_methods_on_transposed_weights(name):
    model = FAMILIES["gpt2"]()
    check_passes(model, ALL[name], prepare(model, ALL[name], 0.3, WINDOWS))
