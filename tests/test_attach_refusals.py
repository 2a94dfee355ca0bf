"""Everything that attaching refuses, one case each, before anything is changed."""

import pytest
from tiny import FAMILIES, PROBING, logits, padded, snapshot, token_ids

from probeprune import Probe, UsageError, attach, compose

REFUSED = {
    "no calibration": (lambda m, c: attach(m, PROBING, 0.3), "needs calibration="),
    "another model's calibration": (
        lambda m, c: attach(FAMILIES["opt"](), "probe", 0.3, calibration=c),
        "another model",
    ),
    "a ratio of one": (lambda m, c: attach(m, "random", 1.0), r"ratio must be a number in \[0, 1\), not 1.0"),
    "an unknown method": (lambda m, c: attach(m, "prob", 0.3), "did you mean 'probe'"),
    "an importance that no probe gives": (
        lambda m, c: compose("probe", importance="flap"),
        "cannot be scored from a probe",
    ),
    "a probe of nothing": (lambda m, c: Probe(tokens=0), r"tokens must be a number in \(0, 1\], not 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_refused_with_a_reason(llama, case):
    model, calibration = llama
    call, reason = REFUSED[case]
    before = snapshot(model)
    with pytest.raises(UsageError, match=reason):
        call(model, calibration)
    before.assert_untouched()


def test_a_second_method_is_refused_and_detaching_twice_is_not(llama):
    model, calibration = llama
    with attach(model, "wanda-sp", 0.3, calibration=calibration) as handle:
        with pytest.raises(UsageError, match="already"):
            attach(model, "random", 0.3)
        handle.detach()
        handle.detach()


def test_a_model_in_training_mode_is_refused(llama):
    model, calibration = llama
    try:
        model.train()
        with pytest.raises(UsageError, match=r"model.eval\(\)"):
            attach(model, "random", 0.3)
        model.eval()
        with attach(model, PROBING, 0.3, calibration=calibration), pytest.raises(UsageError, match="eval"):
            model.train()
            logits(model, *padded("none"))
    finally:
        model.eval()


def test_probing_refuses_other_attention_before_anything_is_changed():
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="sdpa or eager"):
        attach(model, PROBING, 0.3, calibration=calibration)
    model.config._attn_implementation = "sdpa"
    attach(model, PROBING, 0.3, calibration=calibration).detach()
