"""Every family is what its record says: blocks, cuts, probes, generation, FLOPs and checkpoints.

`test_all_methods.py` runs all methods on some families; here two methods run on each of the others.
"""

import json
from pathlib import Path

import pytest
import test_older_families
import tiny
import tiny_experts
import tiny_families
import torch
from test_cost import LENGTH, decoder_flops, outside_blocks
from tiny import PROBING, close, kept, logits, masked, opened, padded, snapshot, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from probeprune import UsageError, attach, compose, find_blocks, prune, save, with_equal_widths
from probeprune.cli import app, run
from probeprune.cli.lists import COLUMNS, cells
from probeprune.errors import Notice
from probeprune.model.blocks import Block
from probeprune.model.cost import blocks_flops
from probeprune.model.decoding import next_token_logits
from probeprune.model.families import FAMILIES, find_family
from probeprune.model.modeling_pruned import has_own_layers
from probeprune.model.multimodal import MULTIMODAL, text_config
from probeprune.model.partition import Partition
from probeprune.model.passes import find_decoder
from probeprune.model.pruned_configs import empty_model
from probeprune.model.support import all_support
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.probe import probe_flops
from probeprune.surgery import cut

RATIO = 0.5
"""So much that one of two groups of heads goes."""
WINDOWS = token_ids(6, 16, seed=9)
IDS, MASK = padded("left")
TOLD = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 3, "min_new_tokens": 3}
PROBE = compose(PROBING, name="probe", skip_layers=0)
BALANCED = compose("magnitude", name="balanced", skip_layers=0, unit_kind="balanced", allocation="even")
DENSE_FIRST = compose("magnitude", name="per layer", skip_layers=1)
pytestmark = pytest.mark.filterwarnings("ignore:no head of this model can go")


@pytest.fixture(scope="module", params=tiny_families.ROWS)
def row(request):
    """The name of a row, its model, and that model's logits on a padded batch."""
    model = tiny_families.build(request.param)()
    return request.param, model, logits(model, IDS, MASK)


def seen(model) -> torch.Tensor:
    """A model's logits on the padded batch."""
    return logits(model, IDS, MASK)


def free(blocks: list[Block]) -> list[Block]:
    """Those that can lose units."""
    return [b for b in blocks if b.whole is None]


def noting(read: dict[str, torch.Tensor], name: str):
    """A hook that notes what a module is given."""

    def hook(module, args, kwargs):
        read[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    return hook


def test_every_family_has_a_tiny_model():
    built = (*tiny.FAMILIES.values(), *test_older_families.FAMILIES.values())
    types = {build().config.model_type for build in built}
    types |= {name.split()[0] for name in (*tiny_families.ROWS, *tiny_families.HYBRIDS)}
    types |= {name.split()[0] for name in tiny_experts.CONFIGS}
    assert types == {t for f in FAMILIES for t in f.model_types}


def test_logits_by_parts_are_the_models_own(row):
    _, model, _ = row
    with torch.no_grad():
        hidden = find_decoder(model)(input_ids=IDS, use_cache=False)[0]
        close(next_token_logits(model, hidden), model(IDS).logits)


def test_blocks_are_the_layers_and_norms_are_in_front_of_them(row):
    _, model, _ = row
    blocks = find_blocks(model)
    layers = model.config.num_hidden_layers
    assert [(b.layer, b.kind) for b in blocks] == [
        (i, k) for i in range(layers) for k in ("attention", "mlp")
    ]
    weights = sum(
        p.numel()
        for path, module in model.named_modules()
        if ".layers." in path and isinstance(module, torch.nn.Linear)
        for p in module.parameters()
    )
    assert sum(b.parameters for b in blocks) == weights
    ran: list[str] = []
    for block in blocks:
        read: dict[str, torch.Tensor] = {}
        layer = model.get_submodule(block.name.rpartition(".")[0])
        hooks = [
            layer.register_forward_pre_hook(noting(read, "layer"), with_kwargs=True),
            block.entry.register_forward_pre_hook(noting(read, "entry"), with_kwargs=True),
            block.consumer.register_forward_hook(lambda *_, name=block.name: ran.append(name)),
        ]
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(noting(read, "residual"), with_kwargs=True))
            hooks.append(block.norm.register_forward_hook(lambda _, a, out, r=read: r.update(normed=out)))
        logits(model, IDS, MASK)
        for hook in hooks:
            hook.remove()
        if block.norm is None:
            normed = read["entry"]
            if block.kind == "attention":
                assert normed.equal(read["layer"])
        else:
            normed = read["normed"]
            if block.kind == "attention" or block.norm is blocks[2 * block.layer].norm:
                assert read["residual"].equal(read["layer"])
            else:
                assert not read["residual"].equal(read["layer"])
        assert read["entry"].equal(normed)
    assert ran == [b.name for b in blocks]


def check_masked(model, before, batch, text):
    """What was attached left no trace, and gave what the dense model gives with the same units masked: the
    logits of a batch, and text behind its prompts with a cache. Each comes with the units that it kept."""
    (got, choice), (cached, prompted) = batch, text
    before.assert_untouched()
    with masked(choice):
        close(got, logits(model, IDS, MASK))
    with masked(prompted):
        assert cached.equal(model.generate(IDS, attention_mask=MASK, use_cache=False, **TOLD))


def test_a_probed_batch_is_the_dense_model_masked_and_detaching_restores_all_bits(row):
    _, model, dense = row
    before = snapshot(model)
    with attach(model, PROBE, RATIO, calibration=WINDOWS) as handle:
        got, choice = logits(model, IDS, MASK), kept(handle)
        assert all(len(units) < b.units for b, units in choice if b.whole is None)
        assert handle.removed_share == pytest.approx(RATIO, abs=0.02)
        cached = model.generate(IDS, attention_mask=MASK, **TOLD)
        prompted = kept(handle)
    check_masked(model, before, (got, choice), (cached, prompted))
    assert (got - dense).abs().max() > 0.01 * dense.abs().max(), "nothing was pruned"
    assert logits(model, IDS, MASK).equal(dense)


def test_all_units_in_any_order_are_the_dense_block_and_restoring_puts_them_back(row):
    _, model, dense = row
    before = snapshot(model)
    partitions = [Partition(b) for b in free(find_blocks(model))]
    for partition in partitions:
        units = partition.block.units
        partition.keep(torch.arange(units)[1::2])
        partition.keep(torch.arange(units)[:1])
        partition.keep(torch.arange(units))
    close(logits(model, IDS, MASK), dense)
    for partition in partitions:
        partition.keep(torch.arange(partition.block.units).flip(0)[: max(partition.block.units // 3, 1)])
        partition.widen()
    close(logits(model, IDS, MASK), dense)
    for partition in partitions:
        partition.restore()
    before.assert_untouched()


def test_query_heads_go_alone_where_groups_have_several(row):
    _, model, _ = row
    with attach(model, balanced(model), 0.4) as handle:
        got, choice = logits(model, IDS, MASK), kept(handle)
    with masked(choice):
        close(got, logits(model, IDS, MASK))
    heads = [(b, len(units)) for b, units in choice if b.kind == "attention"]
    assert all((keep < b.units) == (b.whole is None) for b, keep in heads)
    assert all(b.unit_kind == "balanced" for b, _ in heads if b.group_size > 1)


def balanced(model):
    """`BALANCED`, and the same share of each layer where two sizes of heads have no one width."""
    if not has_own_layers(type(text_config(model.config))):
        return BALANCED
    return compose(BALANCED, name="balanced, each", allocation="uniform")


def check_flops(model, rest: int, ratio: float = RATIO) -> None:
    """FLOPs counted in a pruned pass are those of the formulas; `rest` are those outside the blocks."""
    with attach(model, PROBE, ratio, calibration=WINDOWS) as handle:
        counted = decoder_flops(model, 3)
        own = blocks_flops(handle.blocks, handle.widths, 3, LENGTH)
        probe = probe_flops(handle.blocks, handle.widths, handle.method.when.probe, 3, LENGTH)
    assert counted - rest == own + probe


def check_checkpoint(model, build, run, method, ratio, folder, layout, auto=AutoModelForCausalLM):
    """A cut model is the dense one masked, and so is its checkpoint.

    Args:
        model: the dense model.
        build: makes it again, to be cut.
        run: gives a model's logits.
        method, ratio: of the cut.
        folder, layout: of the checkpoint.
        auto: the class that opens it.

    Returns the cut model, and the one that was opened.
    """
    smaller = build()
    pruning = prune(smaller, method, ratio)
    got = run(smaller)
    blocks = {b.name: b for b in find_blocks(model)}
    with masked([(blocks[k.name], k.units) for k in pruning.kept]):
        close(got, run(model))
    save(smaller, folder, layout=layout)
    if layout == "uniform":
        loaded = auto.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(loaded) is type(model)
        assert not (folder / "modeling_pruned.py").exists()
    else:
        loaded = opened(folder, auto, dtype=torch.float32)
    assert run(loaded).equal(got)
    assert [b.units for b in find_blocks(loaded)] == [len(k.units) for k in pruning.kept]
    return smaller, loaded


def even(both: bool):
    """One width for all layers, of attention and MLPs or of MLPs alone."""
    return compose(with_equal_widths("magnitude"), blocks=("attention", "mlp") if both else ("mlp",))


def test_flops_counted_are_those_of_the_formulas(row):
    _, model, _ = row
    rest = outside_blocks(model, 3)
    blocks = find_blocks(model)
    rotary = 2 * blocks[0].head_dim * LENGTH * 2 * len(set(getattr(model.config, "layer_types", None) or "1"))
    assert 0 <= rest <= 3 * rotary
    check_flops(model, rest)


def test_a_cut_model_and_its_checkpoints_are_the_dense_one_masked(row, tmp_path):
    name, model, _ = row
    both = find_family(model).attention.plain_heads and name != "phi norms"
    cuts = ((even(both), RATIO if both else 0.25, "uniform"), (DENSE_FIRST, 0.35, None))
    for method, ratio, layout in cuts:
        folder = tmp_path / method.name.replace(" ", "-")
        build = tiny_families.build(name)
        _, loaded = check_checkpoint(model, build, seen, method, ratio, folder, layout)
    tokens = [loaded.generate(IDS, attention_mask=MASK, use_cache=c, **TOLD) for c in (True, False)]
    assert tokens[0].equal(tokens[1])


def test_a_plain_config_holds_fewer_heads_where_the_record_says_so(row):
    name, model, _ = row
    record, config = find_family(model).attention, model.config
    changes = {"num_attention_heads": 5, "head_dim": 8}
    if getattr(config, "num_key_value_heads", None) is not None:
        changes["num_key_value_heads"] = 5
    try:
        smaller = empty_model(type(model), tiny_families.config_of(name, **changes), model)
        attention = next(b for b in find_blocks(model) if b.kind == "attention")
        o = smaller.get_submodule(attention.name).get_submodule(record.output)
        holds = o.in_features == 40 and name != "phi norms" and not has_own_layers(type(config))
    except Exception:  # configs and models may raise anything
        holds = False
    assert holds == (record.plain_heads and name != "phi norms")


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_scaled_rope_of_layers_with_other_heads_is_that_of_the_dense_model(kind, tmp_path):
    """It reads the number of heads, which differs; transformers refuses to say it for all layers."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 16
    model = tiny.lively(lambda: LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, rope_parameters=rope)))()
    prune(model, DENSE_FIRST, RATIO)
    assert model.config.is_heterogeneous and "num_attention_heads" in model.config.per_layer_attributes
    save(model, tmp_path / "out")
    loaded = opened(tmp_path / "out", dtype=torch.float32)
    long = token_ids(1, 160)  # longer than the model's positions: dynamic RoPE is computed anew
    assert logits(loaded, long, torch.ones_like(long)).equal(logits(model, long, torch.ones_like(long)))


def test_heads_that_cannot_go_say_why(row):
    _, model, _ = row
    blocks = find_blocks(model)
    whole = [b for b in blocks if b.whole is not None]
    heads = compose("magnitude", skip_layers=0, blocks=("attention",))
    if not whole:
        with attach(model, heads, 0.1):
            pass
        return
    assert {b.kind for b in whole} == {"attention"}
    with pytest.raises(UsageError, match=f"no head .* can go, because it {whole[0].whole}; prune MLPs alone"):
        attach(model, heads, 0.1)
    with pytest.raises(UsageError, match="prune MLPs alone"):
        cut(model, {whole[0].name: torch.arange(1)})
    with pytest.warns(Notice, match="MLPs lose all that the ratio asks for"), attach(model, BALANCED, 0.1):
        pass


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_leaves_heads_that_cannot_go(allocation):
    model = tiny_families.build("olmo2")()
    for budget in ("parameters", "flops", "time") if ALLOCATIONS[allocation].needs else ("parameters",):
        method = compose("ppsp", skip_layers=0, allocation=allocation, budget=budget)
        with attach(model, method, 0.3, calibration=WINDOWS) as handle:
            lost = {b.kind for b, keep in zip(handle.blocks, handle.widths, strict=True) if keep < b.units}
            if budget == "parameters":
                assert handle.removed_share == pytest.approx(0.3, abs=0.02)
        assert lost == {"mlp"}


def test_the_command_lists_what_the_records_say(capsys):
    assert run(lambda: app(["models", "--json"])) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["family"], tuple(r["model_types"])) for r in rows] == [
        (f.name, f.model_types) for f in (*FAMILIES, *MULTIMODAL)
    ]
    inside = [list(m.text_types) for m in MULTIMODAL]
    assert [r["text_types"] for r in rows] == [*([] for _ in FAMILIES), *inside]
    by_type = {t: r for r in rows for t in r["model_types"]}
    assert by_type["olmo2"]["heads"] == [] and "over all heads" in by_type["olmo2"]["why"]
    assert by_type["olmo2"]["dynamic"] == by_type["olmo2"]["uniform"] == ["mlp"]
    assert by_type["opt"]["heads"] == ["group"] and by_type["opt"]["uniform"] == ["mlp"]
    assert by_type["llama"]["gguf"] == ["llama", "deci"] and by_type["llama"]["nemotron_nas"]
    assert by_type["cohere"]["heads_stay_if"] == "use_qk_norm"
    assert by_type["bloom"]["uniform"] == [] and by_type["falcon"]["heads"] == ["group", "query"]
    assert run(lambda: app(["models"])) == 0
    assert "because a model normalises" in " ".join(capsys.readouterr().out.split())


def test_the_page_lists_every_family():
    root = Path(__file__).parent.parent
    rows = all_support()
    page = (root / "docs" / "models.md").read_text(encoding="utf-8")
    own = page.partition("\n## ")[0] + page.partition("\n## Multimodal models")[2]
    table = [line for line in own.splitlines() if line.startswith("| ") and "---" not in line]
    wanted = [
        f"| {' | '.join(row)} |"
        for part in (False, True)
        for row in (COLUMNS, *(cells(row) for row in rows if bool(row.text_types) == part))
    ]
    assert table == wanted, "\n".join(wanted)
    prose = " ".join(page.split())
    assert all(f"a model {row.why}." in prose for row in rows if row.why is not None)
