"""Settings around a call and input that is nearly right: works where the meaning is plain, else one
sentence."""

import types
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from all_methods import ALL, RATIO, prepared
from ambient import default_dtype, deterministic
from tiny import FAMILIES, close, cuts, token_ids
from torch import nn
from torch.nn.functional import linear, silu
from torch.nn.utils import parametrizations

from probeprune import UsageError, attach, prepare, prune
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.damage import damages
from probeprune.calibration.gradients import saliences
from probeprune.calibration.refit import RefitRequest, refit
from probeprune.calibration.sensitivity import sensitivities
from probeprune.evaluation.perplexity import perplexity
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import position_limit, token_windows

IDS = token_ids(8, 16)
BATCH = token_ids(4, 24, seed=2)


def llama():
    return FAMILIES["llama-gqa"]()


# -- settings around a call ------------------------------------------------------------------------


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
    "one thread": one_thread,
}


ONE_OF_EACH_KIND = (
    *("magnitude", "wanda-sp", "flap", "llm-pruner", "best-static", "least damage"),
    *("probe", "full-batch", "best-dynamic"),
)
"""What differs in the statistics it reads, in its compensation or in its schedule."""
FAR_REACHING = ("bfloat16 by default", "inference mode")
PAIRS = [(n, s) for s in SETTINGS for n in ALL if s in FAR_REACHING or n in ONE_OF_EACH_KIND]
"""(method, setting): every method under the two that reach all its own tensors, and one of each kind of
method under the others."""


@cache
def prepared_under(setting):
    """What the methods under one setting need, prepared under it; the model is the one of `prepared`."""
    model, calibration = prepared("llama-gqa")
    if setting == "meta by default":
        return calibration
    with SETTINGS[setting]():
        return prepare(model, [ALL[n] for n, s in PAIRS if s == setting], RATIO, IDS)


@pytest.mark.parametrize("name, setting", PAIRS)
def test_the_settings_around_a_call_change_nothing(name, setting):
    model, calibration = prepared("llama-gqa")
    with torch.no_grad(), attach(model, ALL[name], RATIO, calibration=calibration) as handle:
        expected, units = model(BATCH).logits, handle.kept_units()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    # The model's own forward makes tensors too: it runs under the plain settings, all else under these.
    fresh = prepared_under(setting)
    with SETTINGS[setting]():
        handle = attach(model, ALL[name], RATIO, calibration=calibration)
        with torch.no_grad():
            got, chosen = model(BATCH).logits, handle.kept_units()
        handle.detach()
    assert chosen == units and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    for n, p in model.named_parameters():
        assert p.equal(dense[n])
    with torch.no_grad(), attach(model, ALL[name], RATIO, calibration=fresh):
        assert model(BATCH).logits.isfinite().all()


@pytest.fixture(scope="module")
def prepared_twice():
    """A model, and all methods prepared on it: plainly, and inside an autocast region."""
    model, methods = llama(), list(ALL.values())
    plain = prepare(model, methods, RATIO, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model, plain, prepare(model, methods, RATIO, IDS)


@pytest.mark.parametrize("name", ALL)
def test_autocast_rounds_nothing_that_is_prepared_or_attached(name, prepared_twice):
    model, plain, inside = prepared_twice
    with torch.no_grad(), attach(model, ALL[name], RATIO, calibration=plain) as handle:
        expected, units = model(BATCH).logits, handle.kept_units()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        handle = attach(model, ALL[name], RATIO, calibration=inside)
    with torch.no_grad(), handle:
        assert model(BATCH).logits.equal(expected) and handle.kept_units() == units


@pytest.mark.parametrize("name", ["flap", "llm-pruner", "best-static"])
def test_autocast_rounds_nothing_that_is_cut(name):
    found = []
    for enabled in (False, True):
        model = llama()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            prune(model, ALL[name], RATIO, calibration=IDS)
        found.append(dict(model.named_parameters()))
    assert all(found[1][n].equal(p) for n, p in found[0].items())


@pytest.mark.parametrize("name", [n for n, m in ALL.items() if n != "query heads"])
def test_float64_models_run_in_float64(name):
    model = llama().double()
    calibration = prepare(model, ALL[name], RATIO, IDS)
    with torch.no_grad(), attach(model, ALL[name], RATIO, calibration=calibration):
        out = model(BATCH).logits
    assert out.dtype == torch.float64 and out.isfinite().all()


# -- odd weights -----------------------------------------------------------------------------------


def pruned_by_torch(model):
    torch_prune.l1_unstructured(model.model.layers[4].mlp.down_proj, "weight", 0.5)


def normed(model):
    parametrizations.weight_norm(model.model.layers[4].mlp.down_proj)


class _Quantised(torch.Tensor):
    """Looks like a float tensor, as torchao's quantised weights do."""


def quantised(model):
    linear = model.model.layers[4].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(_Quantised))


@pytest.mark.parametrize(
    "change, named",
    [
        (pruned_by_torch, r"computed at every pass.*torch\.nn\.utils\.prune\.remove"),
        (normed, r"Parametrized.*not a plain"),
        (quantised, r"weight of _Quantised.*quantised"),
    ],
)
@pytest.mark.parametrize("call", ["attach", "prune", "prepare"])
def test_weights_that_cannot_be_permuted_are_one_sentence(change, named, call):
    model = llama()
    change(model)
    with pytest.raises(UsageError, match=rf"layers\.4\.mlp\.down_proj.*{named}|{named}"):
        {
            "attach": lambda: attach(model, "magnitude", 0.3),
            "prune": lambda: prune(model, "magnitude", 0.3),
            "prepare": lambda: prepare(model, "wanda-sp", 0.3, IDS),
        }[call]()


def test_weights_made_in_inference_mode_are_one_sentence():
    with torch.inference_mode():
        model = llama()
    with pytest.raises(UsageError, match=r"torch\.inference_mode.*load the model outside"):
        attach(model, "magnitude", 0.3)


@pytest.mark.parametrize("name", ["magnitude", "probe", "balanced heads", "best-dynamic"])
def test_a_mask_of_its_own_for_every_head_is_one_sentence(name):
    model, calibration = prepared("llama-gqa")
    every = torch.ones(4, 6, 24, 24).tril().bool()
    with torch.no_grad(), attach(model, ALL[name], RATIO, calibration=calibration):
        expected = model(BATCH, attention_mask=every[:, :1]).logits
        with pytest.raises(UsageError, match="mask differs for 6 heads"):
            model(BATCH, attention_mask=every)
        close(model(BATCH, attention_mask=every[:, :1]).logits, expected)


# -- blocks whose weights are used without a call ---------------------------------------------------


def fuse_mlp(model, layer=4):
    """A kernel that takes the weights, not the modules; the same function."""

    def fused(self, x):
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    mlp = model.model.layers[layer].mlp
    mlp.forward = types.MethodType(fused, mlp)


def metrics(model):
    return {b.name: torch.eye(48) for b in find_blocks(model)}


CALIBRATIONS = {
    "moments": lambda m: calibrate(m, IDS),
    "sensitivities": lambda m: sensitivities(m, IDS),
    "damages": lambda m: damages(m, IDS, metrics(m)),
    "refit": lambda m: refit(m, RefitRequest(_halves(m)), IDS),
    "wanda-sp": lambda m: prepare(m, "wanda-sp", 0.3, IDS),
    "best-static": lambda m: prune(m, "best-static", 0.3, calibration=IDS),
}


def _halves(model):
    return cuts({b.name: torch.arange(b.units // 2) for b in find_blocks(model) if b.kind == "mlp"})


@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_calibration_that_saw_nothing_of_a_block_names_it(kind, layer):
    model = llama()
    fuse_mlp(model, layer)
    with torch.no_grad():
        close(model(BATCH).logits, llama()(BATCH).logits)
    with pytest.raises(UsageError, match=rf"layers\.{layer}\.mlp does not call.*down_proj"):
        CALIBRATIONS[kind](model)


def test_gradients_that_were_there_stay():
    model = llama()
    model(BATCH, labels=BATCH).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    saliences(model, IDS, "vectorize")
    for n, p in model.named_parameters():
        assert p.grad.equal(before[n])


# -- windows ---------------------------------------------------------------------------------------

READERS = {
    "prepare": lambda m, windows: prepare(m, "wanda-sp", 0.3, windows),
    "attach": lambda m, windows: attach(m, "wanda-sp", 0.3, calibration=windows).detach(),
    "prune": lambda m, windows: prune(m, "flap", 0.3, calibration=windows),
    "perplexity": lambda m, windows: perplexity(m, windows),
    "gradients": lambda m, windows: saliences(m, windows, "vectorize"),
    "refit": lambda m, windows: prepare(m, "best-static", 0.3, windows),
}
GOOD = {
    "int32": IDS.int(),
    "int16": IDS.short(),
    "a list": IDS.tolist(),
    "an array": IDS.numpy(),
    "not contiguous": IDS.T.contiguous().T,
}
BAD = {
    "none": (IDS[:0], "at least one"),
    "empty": (IDS[:, :0], "at least one"),
    "three axes": (IDS[None], "shape"),
    "floats": (IDS.float(), "integer token ids"),
    "a mask": (IDS > 3, "integer token ids"),
    "text": ("some text", "token ids"),
    "ragged": ([[3, 4], [5]], "token ids"),
    "too large": (IDS + 100, r"token id \d+ is not in the model's vocabulary of 128"),
    "negative": (IDS - 100, r"token id -\d+ is not in the model's vocabulary of 128"),
    "too long": (token_ids(2, 129), "129 tokens are longer than the model's 128 positions"),
}


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("reader", READERS)
def test_windows_of_any_integer_form_are_read_alike(reader, form):
    model = llama()
    READERS[reader](model, GOOD[form])
    assert token_windows(model, GOOD[form]).equal(IDS)


@pytest.mark.parametrize("form", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_windows_that_are_no_token_ids_are_one_sentence(reader, form):
    windows, named = BAD[form]
    with pytest.raises(UsageError, match=named) as error:
        READERS[reader](llama(), windows)
    assert "\n" not in str(error.value)


def test_one_window_may_be_flat():
    assert token_windows(llama(), IDS[0]).equal(IDS[:1])


@pytest.mark.parametrize(
    "rope, limit",
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 512),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 256),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            },
            512,
        ),
    ],
)
def test_scaled_positions_reach_as_far_as_their_factor(rope, limit):
    model = llama()
    model.config.rope_parameters = rope
    assert position_limit(model.config) == limit
    model = type(model)(model.config).eval()
    assert perplexity(model, token_ids(1, limit)).value > 0
    with pytest.raises(UsageError, match=f"longer than the model's {limit} positions"):
        perplexity(model, token_ids(1, limit + 1))
    with torch.no_grad(), attach(model, "full-batch", 0.3):
        assert model(token_ids(1, limit)).logits.isfinite().all()


def test_learned_positions_end_where_they_end():
    model = FAMILIES["opt"]()
    assert position_limit(model.config) == 128
    with pytest.raises(UsageError, match="128 positions"):
        perplexity(model, token_ids(1, 129))
