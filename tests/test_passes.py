"""The forms that a pass of an attached model may take: masks, embeddings, short prompts, grad modes."""

import pytest
import torch
from tiny import DYNAMIC, FAMILIES, PROBING, SIDES, Given, close, kept, logits, masked, padded, token_ids

from probeprune import attach, compose
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.statistics import Statistics
from probeprune.model.blocks import find_blocks
from probeprune.model.passes import find_decoder


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("method", DYNAMIC)
def test_prompts_shorter_than_any_probe(calibrated, method, length):
    model, calibration = calibrated
    ids = token_ids(1, length)
    with attach(model, method, 0.3, calibration=calibration) as handle:
        got, choice = logits(model, ids, torch.ones_like(ids)), kept(handle)
    with masked(choice):
        close(got, logits(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize("units", ["balanced", "query"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("side", SIDES)
def test_dynamic_query_heads_in_every_grouped_family(family, units, side):
    # Here attention goes through our own registered function, under the probe too.
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    inputs = padded(side)
    attributes = [dict(b.entry.__dict__) for b in find_blocks(model)]
    dense = logits(model, *inputs)
    with attach(model, compose(PROBING, unit_kind=units), 0.3, calibration=calibration) as handle:
        logits(model, *padded("none"))
        got, choice = logits(model, *inputs), kept(handle)
    assert any(len(k) < b.units for b, k in choice if b.kind == "attention")
    with masked(choice):
        close(got, logits(model, *inputs))
    assert logits(model, *inputs).equal(dense)
    for block, old in zip(find_blocks(model), attributes, strict=True):
        assert block.entry.config is old["config"]
        assert block.entry.__dict__.keys() == old.keys()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt"])
def test_masks_of_other_forms_tell_the_same_padding(family):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    full = torch.ones(24, 24, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    forms = {"bool": mask.bool(), "float": mask.float()}
    if family != "gemma2":  # a ready-made mask would do away with its sliding window
        forms |= {"four dimensions": full, "additive": additive}
    results = {}
    for name, form in {"integers": mask, **forms}.items():
        with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
            out = model(ids, attention_mask=form, position_ids=positions).logits[mask.bool()]
            results[name] = (out, handle.kept_units())
    want, units = results.pop("integers")
    for name, (got, chosen) in results.items():
        assert chosen == units, name
        close(got, want)


def test_a_mask_of_ones_is_no_mask(llama):
    model, calibration = llama
    ids = token_ids()
    results = []
    for kwargs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with attach(model, PROBING, 0.3, calibration=calibration), torch.no_grad():
            results.append(model(ids, **kwargs).logits)
    assert results[0].equal(results[1])


def test_embeddings_in_place_of_ids_and_the_decoder_alone(calibrated):
    model, calibration = calibrated
    ids, mask = padded("left")
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        want, units = logits(model, ids, mask), handle.kept_units()
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        got = model(inputs_embeds=embedded, attention_mask=mask).logits[mask.bool()]
        assert handle.kept_units() == units
        close(got, want)
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        find_decoder(model)(ids, mask)  # by position
        assert handle.kept_units() == units


@pytest.mark.parametrize("method", ["flap", *DYNAMIC])
def test_inference_mode_gives_the_same_as_no_grad(calibrated, method):
    model, calibration = calibrated
    inputs = padded("left")
    before = {n: p.clone() for n, p in model.named_parameters()}
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with attach(model, method, 0.3, calibration=calibration):
            for _ in range(2):
                with mode():
                    out = model(*inputs).logits[inputs[1].bool()]
            results.append(out.clone())
    assert results[0].equal(results[1])
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", ["wanda-sp", "flap", PROBING])
def test_attached_in_inference_mode_and_detached_outside(method):
    # Detaching must not fail: the weights would stay permuted for good.
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.inference_mode():
        handle = attach(model, method, 0.3, calibration=calibration)
        model(*padded("left"))
    with torch.no_grad():
        model(*padded("right"))
    handle.detach()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_batches_in_and_out_of_inference_mode_mix(modes):
    # Without calibration the first cut is made by the first batch, in whatever mode that runs.
    model = FAMILIES["llama-gqa"]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with attach(model, "full-batch", 0.3):
        for seed, mode in enumerate((*modes, *modes)):
            with mode():
                assert model(token_ids(2, 12, seed=seed)).logits.isfinite().all()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_a_model_without_memory_can_be_attached():
    # Costs of models too large for this machine are counted on the meta device.
    moments = calibrate(FAMILIES["llama-gqa"](), token_ids(6, 16, seed=9))
    with torch.device("meta"):
        model = FAMILIES["llama-gqa"]()
    calibration = Given(model, Statistics(moments))
    shapes: dict[str, tuple[int, ...]] = {}
    with attach(model, PROBING, 0.3, calibration=calibration) as handle, torch.no_grad():
        for b in handle.blocks:
            b.consumer.register_forward_pre_hook(lambda _, a, n=b.name: shapes.update({n: a[0].shape}))
        out = model(torch.ones(2, 9, dtype=torch.long, device="meta")).logits
        assert out.shape == (2, 9, 128) and out.is_meta
        widths = [k * b.unit_width for b, k in zip(handle.blocks, handle.widths, strict=True)]
        assert [shapes[b.name][-1] for b in handle.blocks] == widths
        assert handle.removed_share == pytest.approx(0.3, abs=0.005)
    assert model.model.layers[4].mlp.down_proj.weight.shape == (48, 100)
