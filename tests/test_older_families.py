"""The older decoder families: weights stored the other way round, fused maps, one key-value head, ALiBi.

Every family runs through all that a cut promises; `test_all_methods.py` and the tests beside it do so for all
methods on the other families.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from all_methods import ALL, check_cut, check_passes
from refitting import WINDOWS as TEXT
from refitting import some
from safetensors.torch import load_file, save_file
from test_offloaded import on_disk
from test_refit import slow
from tiny import close, cuts, kept, lively, logits, masked, opened, padded, snapshot, token_ids
from transformers import PreTrainedModel

from probeprune import (
    Refit,
    attach,
    compose,
    find_blocks,
    load_model,
    prepare,
    prune,
    save,
    with_equal_widths,
)
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.errors import UsageError
from probeprune.model.cost import blocks_flops, counting_flops
from probeprune.model.described import export
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.passes import find_decoder, token_windows
from probeprune.prepare import Prepared

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
pytestmark = pytest.mark.filterwarnings("ignore:no head of this model can go")


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
    ratio = 0.5 if family == "falcon-grouped" else 0.4  # one of two groups
    with attach(model, compose(method, skip_layers=0), ratio, calibration=WINDOWS) as handle:
        got, choice = logits(model, ids, mask), kept(handle)
        lost = {b.kind for b, units in choice if len(units) < b.units}
        assert lost == ({"mlp"} if family in HEADS_STAY else {"attention", "mlp"})
        assert handle.removed_share == pytest.approx(ratio, abs=0.02)
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
    ids, given = token_ids(2, 10), {"do_sample": False, "eos_token_id": 127, "pad_token_id": 0}
    given["use_cache"] = True  # not the default of MPT
    with attach(model, compose("probe", skip_layers=0), 0.3, calibration=WINDOWS) as handle:
        tokens = model.generate(ids, max_new_tokens=4, **given)
        choice = kept(handle)
    with masked(choice):
        assert tokens.equal(model.generate(ids, max_new_tokens=4, **given))


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
    # Each weight of the layers is in one block, of heads that stay too; blocks have biases beside them.
    weights = sum(p.numel() for n, p in model.named_parameters() if ".0." in n and p.ndim > 1)
    assert 0 <= sum(b.parameters for b in blocks if b.layer == 0) - weights < 1000


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
        with pytest.raises(UsageError, match=r"because it has .*(ALiBi|four parts).*; prune MLPs alone\."):
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


@pytest.mark.parametrize("family", ["gpt2", "gpt-bigcode", "gpt-neo", "falcon-grouped", "xglm"])
def test_no_plain_config_holds_fewer_heads(family):
    model = FAMILIES[family]()
    prune(model, with_equal_widths("random"), 0.5)
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


def test_the_causal_masks_of_older_checkpoints_are_no_weights(tmp_path, number_tokenizer):
    """As on the hub: masks beside the weights, and names without their first part."""
    for family, path in (("gpt2", "attn"), ("gpt-neo", "attn.attention"), ("gptj", "attn")):
        model, folder = FAMILIES[family](), tmp_path / family
        save(model, folder, tokenizer=number_tokenizer)
        stored = load_file(folder / "model.safetensors")
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        stored[f"h.0.{path}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        stored[f"h.0.{path}.masked_bias"] = torch.tensor(-1e9)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        found = load_model(str(folder), dtype="float32").model.state_dict()
        assert all(found[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_windows_longer_than_alibi_reaches_are_refused():
    with pytest.raises(UsageError, match="longer than the model's 128 positions"):
        token_windows(FAMILIES["mpt"](), token_ids(2, 129))


# -- weights stored the other way round ---------------------------------------------------------------------


@cache
def gpt2() -> tuple[PreTrainedModel, Prepared]:
    """A model, and the calibration of all methods."""
    model = FAMILIES["gpt2"]()
    return model, prepare(model, [*ALL.values()], 0.3, WINDOWS)


@pytest.mark.parametrize("name", ALL)
def test_all_methods_on_transposed_weights(name):
    model, calibration = gpt2()
    check_passes(model, ALL[name], calibration)


def test_whatever_is_read_of_transposed_weights_is_read_of_plain_ones():
    """Of the same model made of `nn.Linear`: all statistics, gradients and refits, and so the same units."""
    model, calibration = gpt2()
    plain = FAMILIES["gpt2"]()
    for block in find_blocks(plain):
        for linear in {m.name: m.linear for m in block.members}.values():
            weight = linear.weight.detach().T.contiguous()
            vars(linear).update(in_features=linear.nx, out_features=linear.nf)
            linear.__class__ = torch.nn.Linear
            linear.weight = torch.nn.Parameter(weight)
    ids, mask = padded("left")
    close(logits(plain, ids, mask), logits(model, ids, mask))
    for name in ("magnitude", "flap", "best-static", "best-dynamic", "llm-pruner", "loraprune"):
        found = []
        for of, given in ((model, calibration), (plain, WINDOWS)):
            with attach(of, ALL[name], 0.3, calibration=given) as handle:
                found.append((logits(of, ids, mask), handle.kept_units()))
        (one, units), (other, same) = found
        assert units == same, name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_refit_is_what_whole_models_give_in_float64(family):
    model, other, how = FAMILIES[family](), FAMILIES[family](), Refit(damping=(1e-2,))
    for m in (model, other):
        m.config.use_parallel_residual = family == "gptj"  # for the slow one
    names = some(model)
    got = refit(model, RefitRequest(cuts(names)), TEXT, how, batch_size=5)
    want = slow(model, other, names, TEXT, how)
    assert got.keys() == want.keys()
    for name, consumer in got.items():
        torch.testing.assert_close(consumer.weight.double(), want[name][0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["flap", "best-static"])
def test_a_layer_at_a_time_from_disk(method, tmp_path):
    model = FAMILIES["gpt2"]()
    other = on_disk(model, tmp_path / "dense")
    for m, folder in ((model, "here"), (other, "there")):
        prune(m, method, 0.3, calibration=WINDOWS)
        save(m, tmp_path / folder)
    here, there = opened(tmp_path / "here"), opened(tmp_path / "there")
    for (name, p), (same, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert name == same and p.equal(q)
