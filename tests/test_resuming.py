"""A training run that is killed, or whose checkpoints are damaged, ends as the unbroken one does."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import pytest
from short_training import HELD_OUT, SHORT, TEXT, KillAt, Killed
from tiny import FAMILIES

from probeprune import find_blocks
from probeprune.errors import Notice, UsageError
from probeprune.training.checkpoints import last_checkpoint
from probeprune.training.loraprune import LoraPrune
from probeprune.training.recovery import merged, recover

KINDS = {
    "lora": SHORT,
    "full": replace(SHORT, lora=None),
    "loraprune": replace(SHORT, keep_best=False),
    "patience": replace(SHORT, patience=2, evaluate_every=1, learning_rate=0.3, steps=8),
}


def go(work, kind="lora", *callbacks):
    """A run, or the rest of it; what it gives that no clock decides."""
    model = FAMILIES["llama-gqa"]()
    pruner = LoraPrune(find_blocks(model), [b.units // 2 for b in find_blocks(model)], every=2)
    own = [pruner] if kind == "loraprune" else []
    trained = recover(model, TEXT, HELD_OUT, KINDS[kind], work, callbacks=[*own, *callbacks])
    figures = (trained.steps, trained.best_step, trained.epochs, trained.held_out, trained.history)
    state = (
        {n: s.tolist() for n, s in pruner.scores.items()},
        {n: m.tolist() for n, m in pruner.masked.items()},
    )
    return figures, {k: v.clone() for k, v in merged(trained.model).state_dict().items()}, state


def assert_same(one, two):
    assert one[0] == two[0] and one[2] == two[2]
    assert all(value.equal(two[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_behind_its_last_checkpoint_does_no_step_more(kind, tmp_path):
    whole = go(tmp_path / "w", kind)
    for _ in range(2):  # every restart added a step
        assert_same(go(tmp_path / "w", kind), whole)
    assert kind != "patience" or whole[0][0] < KINDS[kind].steps


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def nonsense(file):
    file.write_text('{"x": 1}')


DAMAGES = {
    f"{name} {how.__name__}": (name, how)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")
    for how in (os.remove, cut, nonsense)
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole") / "w")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A work directory with two checkpoints, of steps 2 and 4."""
    work = tmp_path_factory.mktemp("broken") / "w"
    with pytest.raises(Killed):
        go(work, "lora", KillAt(5))
    assert {f.name for f in work.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return work


@pytest.fixture
def work(broken, tmp_path):
    shutil.copytree(broken, tmp_path / "w")
    return tmp_path / "w"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, work):
    name, how = DAMAGES[damage]
    how(work / "checkpoint-4" / name)
    with pytest.warns(Notice, match=r"checkpoint-4 in .* is damaged .*goes on from checkpoint-2\."):
        assert last_checkpoint(work).name == "checkpoint-2"
    how(work / "checkpoint-2" / name)
    with pytest.warns(Notice, match=r"goes on from the beginning\."):
        assert last_checkpoint(work) is None


def test_a_state_cut_by_a_kill_is_passed_over_without_a_word(work):
    cut(work / "checkpoint-4/trainer_state.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_checkpoint(work).name == "checkpoint-2"
        (work / "checkpoint-2/trainer_state.json").write_text('{"x": 1}')
        assert last_checkpoint(work) is None


def test_the_best_weights_are_needed_too(work):
    state = work / "checkpoint-4/trainer_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "best_global_step": 2}))
    os.remove(work / "checkpoint-2/adapter_model.safetensors")
    assert last_checkpoint(work).name == "checkpoint-4"
    with pytest.warns(Notice, match=r"its best step, checkpoint-2, is not whole"):
        assert last_checkpoint(work, keep_best=True) is None


def test_a_run_with_a_damaged_checkpoint_ends_as_the_unbroken_one(whole, work):
    cut(work / "checkpoint-4/optimizer.pt")
    with pytest.warns(Notice, match="goes on from checkpoint-2"):
        assert_same(go(work), whole)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"training": 3}', "null"])
def test_a_damaged_record_of_the_run_is_one_sentence(content, work):
    (work / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json cannot be read; delete .* to start over"):
        go(work)


def test_what_a_kill_inside_a_write_leaves_blocks_nothing(whole, tmp_path):
    work = tmp_path / "w"
    work.mkdir()
    name = ".run.json.partial-0123456789abcdef"
    (work / name).mkdir()
    (work / name / "run.json").write_text('{"tra')
    (work / f"{name}.lock").touch()
    assert_same(go(work), whole)
    assert not list(work.glob(".*"))


def test_a_loss_that_was_written_half_is_measured_again(whole, work):
    (work / "before.json").write_text("5.7e")
    assert_same(go(work), whole)
