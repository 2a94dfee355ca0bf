"""What a plan says before any work is what then happens; memory is that of the code that runs."""

import copy
import json
from dataclasses import replace

import psutil
import pytest
import test_older_families
import tiny_families
import torch
from test_cli import call
from tiny import FAMILIES, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig

from probeprune import METHODS, compose, prune, save
from probeprune.calibration import footprints, gradient_footprints
from probeprune.calibration.collecting import collect
from probeprune.data.windows import Text
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import perplexity
from probeprune.jobs.forecast import Job, forecast
from probeprune.jobs.prune import Texts
from probeprune.methods import for_layout
from probeprune.model import decoding
from probeprune.model.blocks import find_blocks
from probeprune.model.described import empty_like
from probeprune.model.footprint import Batch, LiveBytes, Phase, Rehearsal, measuring, weights_of
from probeprune.model.layers import LayerRunner
from probeprune.model.offloading import is_offloaded
from probeprune.model.outline import Outline, open_outline
from probeprune.model.placing import place
from probeprune.progress import silent
from probeprune.strategies.compensation import Refit

CPU = torch.device("cpu")
TEXTS = Texts(Text("c4", 6, 24), Text("wikitext2", 4, 24), 0, 4)


def job(method, layout, ratio=0.3, **changes):
    method = compose(for_layout(method, layout), name="m", **changes)
    return Job(method, ratio, layout, TEXTS, torch.float32, CPU, torch.float32)


def outline(model, name="tiny"):
    stored = [(p.dtype, p.numel() * p.element_size()) for p in model.parameters()]
    return Outline(name, empty_like(model), stored, True)


@pytest.mark.parametrize(
    ("method", "family", "layout", "changes"),
    [
        ("wanda-sp", "llama-gqa", "uniform", {}),
        ("wanda-sp", "llama-gqa", "per-layer", {"skip_layers": 2}),
        ("wanda-sp", "qwen3", "uniform", {"unit_kind": "balanced", "round_to": 8}),
        ("magnitude", "gemma3", "per-layer", {}),
        ("random", "phi3-gqa", "uniform", {"blocks": ("mlp",)}),
        ("wanda-sp", "youtu", "uniform", {}),
        ("ppsp", "opt", "per-layer", {}),
        ("random", "llama", "nemotron-nas", {}),
    ],
)
def test_figures_are_those_of_the_model_that_is_saved(method, family, layout, changes, tmp_path):
    model = FAMILIES[family]()
    asked = job(method, layout, **changes)
    found = forecast(outline(model), asked)
    assert found.refused is None and found.exact
    for figures, m in ((found.before, model), (found.after, None)):
        if m is None:
            prune(model, asked.method, asked.ratio, calibration=token_ids(6, 24))
            m = save(model, tmp_path / "pruned", layout=layout)
            files = sum(f.stat().st_size for f in (tmp_path / "pruned").glob("*.safetensors"))
            assert figures.disk_bytes == pytest.approx(files, rel=0.1)
        assert figures.parameters == sum(p.numel() for p in m.parameters())
        cache = m(token_ids(2, 5), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert figures.kv_bytes_per_token * 2 * 5 == held
        measured = perplexity(m, token_ids(4, 24), batch_size=4).flops_per_token
        assert figures.flops_per_token == int(measured)
    assert found.after.parameters < found.before.parameters


EVERY = {
    **FAMILIES,
    **test_older_families.FAMILIES,
    **{row: tiny_families.build(row) for row in tiny_families.ROWS},
}


def test_one_threshold_over_scores_is_planned_as_an_equal_cut():
    model = FAMILIES["llama-gqa"]()
    found = forecast(outline(model), job("flap", "per-layer", skip_layers=1))
    assert found.refused is None and not found.exact
    blocks = sum(b.parameters for b in find_blocks(model))
    assert (found.before.parameters - found.after.parameters) / blocks == pytest.approx(0.3, abs=0.02)
    never = forecast(outline(model), job("flap", "per-layer", ratio=0.99, skip_layers=0))
    assert "while every block keeps a unit" in never.refused


@pytest.mark.parametrize("family", EVERY)
def test_a_rehearsal_counts_what_the_layer_holds(family):
    model = EVERY[family]()
    rehearsal = Rehearsal(model, torch.float32, CPU)
    assert not any(type(p) is not nn.Parameter for p in model.parameters())
    ids = token_ids(4, 24)
    own = [*model.parameters(), *model.buffers()]
    with LiveBytes(own) as live, torch.no_grad():
        runner = LayerRunner(model, [ids.clone()])
        runner.hidden[0] = runner.run(rehearsal.layer, 0, runner.hidden[0])
    assert rehearsal.layer_pass(Batch(4, 24)) == pytest.approx(live.peak, rel=0.02)
    here = [b for b in find_blocks(model) if b.layer == rehearsal.layer]
    with LiveBytes(own) as live, torch.no_grad():
        collect(LayerRunner(model, [ids.clone()]), rehearsal.layer, here, 0, silent)
    assert footprints.moments(rehearsal, Batch(4, 24), 4, 0).work == pytest.approx(live.peak, rel=0.05)


def test_live_bytes_are_those_that_somebody_holds():
    a = torch.zeros(1000)
    with LiveBytes([a]) as live:
        b = a + 1
        c = (b * 2).view(10, 100)[:5]
        del b
        d = a * 3
    assert live.peak == 8000 and live.now == 8000
    del c, d
    assert live.now == 0


def test_every_part_of_calibration_has_a_figure():
    rehearsal = Rehearsal(FAMILIES["llama-gqa"](), torch.float32, CPU)
    widths = [max(1, b.units // 2) for b in rehearsal.blocks]
    batch = Batch(4, 24)
    gradients = METHODS["llm-pruner"].gradient_settings
    found, made = footprints.consumers(rehearsal, batch, 8, Refit(), widths, True)
    more, kept = gradient_footprints.sensitivities(rehearsal, 4, 24)
    found += [*more, *gradient_footprints.saliences(rehearsal, rehearsal, "param_mix", gradients)]
    found.append(footprints.damages(rehearsal, batch, 8, 0.1))
    narrow = Rehearsal(FAMILIES["llama-gqa"](), torch.bfloat16, CPU)
    (wide,), (whole,) = (
        [p for p in gradient_footprints.saliences(of, rehearsal, "param_mix", gradients) if p.layers]
        for of in (narrow, rehearsal)
    )
    layer = sum(4 * p.numel() for p in narrow.model.get_submodule("model.layers.0").parameters())
    own, others = (p.work - p.states // 6 for p in (wide, whole))  # without one set of hidden states
    assert own - others == layer, "its float32 copy"
    assert all(p.work > 0 for p in found) and made > 0 and kept == 2 * 5 * 4 * 48 * 48
    refit = next(p for p in found if p.name == "refit")
    mlp = 100
    assert refit.work > 4 * (2 * mlp**2 + 3 * 48 * mlp), "what choosing units says that it takes"
    assert next(p for p in found if p.name == "gradients").work > 2 * 4 * mlp * 48 * 3


def test_logits_of_a_long_window_are_in_memory_a_part_at_a_time(monkeypatch):
    model = FAMILIES["gemma2"]()
    hidden, ids = torch.randn(3, 24, 48), token_ids(3, 24)
    whole = decoding.next_token_losses(model, hidden, ids)
    monkeypatch.setattr(decoding, "HEAD_TOKENS", 7)
    assert torch.allclose(decoding.next_token_losses(model, hidden, ids), whole, rtol=1e-5)
    wide = LlamaConfig(
        vocab_size=256_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32768,
    )
    monkeypatch.setattr(decoding, "HEAD_TOKENS", 2048)
    with torch.device("meta"):
        large = LlamaForCausalLM(wide)
    logits = measuring(Rehearsal(large, torch.float32, CPU), Batch(1, 32768), 1)[1]
    assert logits.work < 2.1 * 4 * 256_000 * 2048


def test_a_limit_holds_the_work_and_a_refusal_names_the_least():
    shape = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=64,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).eval()
    weights = weights_of(model, torch.float32)
    phases = [Phase("logits", 300 << 20, 100 << 20, sets=2)]

    def placed(memory):
        return place("m", model, torch.float32, CPU, memory, lambda *_: phases)

    used = psutil.Process().memory_info().rss
    assert placed(used + weights.all + (600 << 20)) is None
    with pytest.raises(UsageError, match="most of the rest for logits") as refused:
        placed(used + weights.rest + weights.largest + (100 << 20))
    least = float(str(refused.value).split(" GiB even")[0].rpartition(" ")[2])
    with pytest.warns(match="the layers stay on disk"):
        where = placed(int((least + 0.1) * 2**30))
    assert where is not None and 0 < where.room.memory < (0.12 * 2**30)
    assert where.places["model.layers.5"] == "disk"


@pytest.fixture
def config_only(tmp_path):
    folder = tmp_path / "config-only"
    config = FAMILIES["llama-gqa"]().config
    config.save_pretrained(folder)
    return folder


def plan(capsys, *arguments):
    code = call("plan", *map(str, arguments), "--dtype", "float32", "--json")
    return code, *capsys.readouterr()


def test_a_config_alone_will_do(config_only, capsys):
    code, out, _ = plan(
        capsys, config_only, "--method", "wanda-sp", "--ratio", 0.3, "--round-to", 4, "--length", 24
    )
    found = json.loads(out)
    assert code == 0 and found["refused"] is None
    assert found["after"]["parameters"] < found["before"]["parameters"]
    assert found["in_memory"]["bytes"] > found["base_bytes"]
    assert [f.name for f in config_only.iterdir()] == ["config.json"]


def test_the_tables_are_printed(config_only, capsys):
    options = ("--method", "best-static", "--ratio", "0.3", "--round-to", "4", "--length", "24")
    assert call("plan", str(config_only), *options, "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    assert "KV cache a token" in shown and "a layer at a time, least --memory" in shown


def test_a_method_that_needs_all_layers_at_once_says_so(config_only, capsys):
    options = ("--method", "gates", "--ratio", "0.3", "--round-to", "4", "--dtype", "float32")
    assert call("plan", str(config_only), *options, "--length", "256") == 0
    assert "needs all layers in memory at once" in capsys.readouterr().out
    assert call("plan", str(config_only), *options, "--length", "24") == 2
    assert "gates are trained on windows of 256 tokens" in "".join(capsys.readouterr())


REFUSED = {
    "a method that trains": ("--method", "llm-pruner+lora", "--ratio", "0.3"),
    "an unknown method": ("--method", "wandasp", "--ratio", "0.3"),
    "nothing left": ("--method", "wanda-sp", "--ratio", "0.99"),
    "too little": ("--method", "wanda-sp", "--ratio", "0.0001"),
    "the layout": ("--method", "wanda-sp", "--ratio", "0.3", "--allocation", "global"),
    "a kind": ("--method", "wanda-sp", "--ratio", "0.3", "--units", "query"),
    "memory": ("--method", "wanda-sp", "--ratio", "0.3", "--memory", "1MB"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_in_the_words_of_prune(why, tmp_path, capsys, number_tokenizer):
    save(FAMILIES["llama-gqa"](), tmp_path / "model", tokenizer=number_tokenizer)
    arguments = (str(tmp_path / "model"), *REFUSED[why], "--round-to", "4", "--dtype", "float32")
    said = []
    for command, more in (("plan", ()), ("prune", ("--out", str(tmp_path / "out")))):
        assert call(command, *arguments, *more) == 2
        said.append(" ".join(capsys.readouterr().err.split()))
    if why == "memory":  # how much is in use differs
        said = [text.partition(" takes ")[0] for text in said]
    assert said[0] == said[1] and "probeprune:" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_dynamic_method_has_no_smaller_model_to_plan(config_only, capsys):
    code, _, err = plan(capsys, config_only, "--method", "probe", "--ratio", 0.3)
    assert code == 2 and "no smaller model to plan" in " ".join(err.split())


def test_an_unknown_family_and_names_that_are_no_model(tmp_path, capsys):
    MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path / "mamba")
    (tmp_path / "note.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    for name, why in (
        (tmp_path / "mamba", "model type 'mamba'"),
        (tmp_path / "note.txt", "no .gguf"),
        (tmp_path / "empty", "there is no config.json"),
        ("smollm2-135n", "did you mean"),
        ("nobody/nothing", "no hub model of that name"),
        (tmp_path / "missing.gguf", "there is no GGUF file"),
    ):
        code, _, err = plan(capsys, name, "--method", "wanda-sp", "--ratio", 0.3)
        assert code == 2 and why in " ".join(err.split()), err


@pytest.mark.real
def test_the_embedded_model_is_planned_from_the_head_of_its_file(smollm2):
    found = open_outline("smollm2-135m")
    assert sum(p.numel() for p in found.model.parameters()) == 134_515_008
    assert not is_offloaded(found.model) and next(found.model.parameters()).is_meta
    asked = replace(job("wanda-sp", "uniform", 0.4, round_to=64), texts=TEXTS)
    cut = copy.deepcopy(smollm2.model)
    prune(cut, compose(asked.method, importance="random"), 0.4)
    assert forecast(found, asked).after.parameters == cut.num_parameters()
