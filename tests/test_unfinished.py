"""Work that is stopped goes on at its layer, and ends in the same bits."""

import os
import shutil
import time
from itertools import groupby

import pytest
import torch
from test_offloaded import on_disk, small
from tiny import FAMILIES, token_ids

from probeprune import prune, save
from probeprune.calibration import stored, unfinished
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.gradients import saliences
from probeprune.errors import Notice, UsageError
from probeprune.model.hidden_states import HiddenStates, Room
from probeprune.model.layers import LayerRunner
from probeprune.model.offloading import set_scratch
from probeprune.model.scratch import Scratch
from probeprune.preparation import Preparation

WINDOWS = token_ids(10, 64, seed=3)
METHODS = ["flap", "llm-pruner", "best-static"]


ROOM = {"disk": 2**30, "some": 100_000, "files": 0}


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """Write behind every layer; the folder of temporary files."""
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "COST", 0.0)
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def opened(where, folder):
    """The model in memory, or with its layers on disk and some or all hidden states in files."""
    model = FAMILIES["llama-gqa"]()
    if where == "memory":
        return model
    model = on_disk(model, folder)
    set_scratch(model, Scratch("probeprune-layers"), Room(ROOM[where]))
    return model


class Watch:
    """The passes of a model through its layers, and whether they had gradients; one can be stopped."""

    def __init__(self, model, stop=None):
        self.passes = []
        for number, layer in enumerate(model.model.layers):

            def hook(module, args, number=number):
                self.passes.append((number, torch.is_grad_enabled()))
                if len(self.passes) == stop:
                    raise KeyboardInterrupt

            layer.register_forward_pre_hook(hook)


def work(model, method, cache=None):
    """Everything that a method computes before the cut, as tensors and values."""
    found = Preparation(model, WINDOWS, batch_size=4, cache=cache).statistics(small(method), 0.3)
    return [stored.CODECS[part].pack(getattr(found, part)) for part in stored.CODECS]


def assert_same(found, wanted):
    for (tensors, values), (others, same) in zip(found, wanted, strict=True):
        assert tensors.keys() == others.keys() and values == same
        assert all(t.dtype == others[n].dtype and t.equal(others[n]) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("method", "where"),
    [*((m, "memory") for m in METHODS), *((m, "some") for m in METHODS), ("flap", "files")],
)
def test_work_that_was_stopped_goes_on_at_its_layer(method, where, tmp_path):
    model = opened(where, tmp_path / "model")
    watched = Watch(model)
    whole, passes = work(model, method, tmp_path / "whole"), watched.passes
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names and all(n.endswith(".safetensors") and n[0] != "." for n in names)
    del model, watched
    layers = [len(list(run)) for _, run in groupby(passes)]
    for stop in range(len(passes) // 3, len(passes), len(passes) // 3):
        cache = tmp_path / f"cache-{stop}"
        model = opened(where, tmp_path / "model")
        Watch(model, stop)
        with pytest.raises(KeyboardInterrupt):
            work(model, method, cache)
        del model
        model = opened(where, tmp_path / "model")
        watched = Watch(model)
        found = work(model, method, cache)
        first = next(sum(layers[:i]) for i in range(len(layers)) if sum(layers[: i + 1]) >= stop)
        assert watched.passes == passes[first:], "layers that were done are not run through again"
        assert_same(found, whole)
        assert sorted(p.name for p in cache.iterdir()) == names
    del model, watched


def test_progress_begins_where_work_goes_on(tmp_path):
    model = FAMILIES["llama-gqa"]()
    Watch(model, 8)  # the second of three batches in the third layer
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    model, told = FAMILIES["llama-gqa"](), []
    calibrate(model, WINDOWS, batch_size=4, cache=tmp_path, progress=lambda *what: told.append(what))
    assert told[0] == ("calibration", 20, 50)


def stopped(cache, at=14):
    """Unfinished moments of four layers."""
    model = FAMILIES["llama-gqa"]()
    Watch(model, at)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=4, cache=cache)
    (folder,) = cache.glob(".*.unfinished")
    return folder


def passes_of(cache, **settings):
    model = FAMILIES["llama-gqa"]()
    watched = Watch(model)
    calibrate(model, WINDOWS, **{"batch_size": 4, "cache": cache, **settings})
    return len(watched.passes)


def test_only_what_changed_is_written_and_old_files_go(tmp_path):
    folder = stopped(tmp_path)
    names = sorted(p.name.rpartition("-")[0] for p in folder.iterdir())
    assert names == ["", "hidden-0", "hidden-1", "hidden-2", *(f"results-{i}" for i in (1, 2, 3, 4))]


@pytest.mark.parametrize("which", ["index.json", "hidden-1", "results-2"])
@pytest.mark.parametrize("how", [os.remove, lambda f: os.truncate(f, f.stat().st_size // 2)])
def test_damaged_files_are_said_and_the_work_begins_anew(which, how, tmp_path):
    folder = stopped(tmp_path)
    how(next(folder.glob(f"{which}*")))
    if which == "index.json":  # written last: without it, nothing was
        assert passes_of(tmp_path) == 15
    else:
        with pytest.warns(Notice, match=r"in .* is damaged: this one begins anew"):
            assert passes_of(tmp_path) == 15
    assert not list(tmp_path.glob(".*"))


def test_other_batches_begin_anew(tmp_path):
    stopped(tmp_path)
    assert passes_of(tmp_path, batch_size=5) == 10
    assert not list(tmp_path.glob(".*"))


def test_what_is_cheap_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 30.0)
    model = FAMILIES["llama-gqa"]()
    Watch(model, 14)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_waits_until_the_work_outweighs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "COST", 20.0)
    monkeypatch.setattr(unfinished, "_SPEED", 1.0)  # a byte a second
    model = FAMILIES["llama-gqa"]()
    Watch(model, 14)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=4, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_share_unfinished_work(tmp_path):
    folder = stopped(tmp_path)
    with pytest.raises(KeyboardInterrupt), unfinished.held(folder) as mine:
        assert mine
        assert passes_of(tmp_path) == 15, "somebody else is at it"
        assert folder.exists()
        raise KeyboardInterrupt
    (result,) = tmp_path.glob("*.safetensors")
    result.unlink()
    assert passes_of(tmp_path) == 3


def test_work_that_nobody_goes_on_with_is_deleted_after_a_week(tmp_path):
    folder = stopped(tmp_path)
    other = folder.with_name(".0123.unfinished")
    shutil.copytree(folder, other)
    other.with_name(".4567.unfinished.lock").touch()
    passes_of(tmp_path)
    assert other.exists()
    long_ago = time.time() - 8 * 86400
    os.utime(other, (long_ago, long_ago))
    passes_of(tmp_path, own_positions=4)
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_left_behind_the_result_is_deleted(tmp_path):
    folder = stopped(tmp_path)
    shutil.copytree(folder, tmp_path / "kept")
    passes_of(tmp_path)
    (tmp_path / "kept").rename(folder)
    assert passes_of(tmp_path) == 0
    assert not list(tmp_path.glob(".*"))


def test_an_error_that_would_come_again_leaves_nothing(tmp_path):
    model = FAMILIES["llama-gqa"]()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        saliences(model, WINDOWS, cache=tmp_path)
    assert not list(tmp_path.iterdir())


# -- shards and disks ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
def test_a_shard_that_goes_in_the_middle_is_one_sentence_and_the_rest_stays(how, tmp_path):
    model = FAMILIES["llama-gqa"]()
    whole = calibrate(on_disk(model, tmp_path / "model"), WINDOWS, batch_size=4)
    shards = tmp_path / "model"
    other = on_disk(model, shards)
    file, aside, cache = shards / "model.safetensors", tmp_path / "aside", tmp_path / "cache"
    shutil.copyfile(file, aside)

    def break_it(what, done, total):
        if done == 24:  # inside the third layer
            if how == "gone":
                file.unlink()
            elif how == "cut":
                os.truncate(file, 1000)
            else:
                FAMILIES["opt"]().save_pretrained(shards)

    with pytest.raises(UsageError, match=r"of layer 3 cannot be read from .*model\.safetensors.* back"):
        calibrate(other, WINDOWS, batch_size=4, cache=cache, progress=break_it)
    shutil.copyfile(aside, file)
    watched = Watch(other)
    found = calibrate(other, WINDOWS, batch_size=4, cache=cache)
    assert watched.passes == [(layer, False) for layer in (3, 4) for _ in range(3)]
    for name, moments in whole.items():
        assert all(t.equal(found[name].state()[k]) for k, t in moments.state().items())


def test_a_cut_layer_that_goes_before_it_is_saved_is_one_sentence(temporary, tmp_path):
    model = opened("disk", tmp_path / "model")
    prune(model, "magnitude", 0.3)
    for file in temporary.rglob("model.layers.4-*.safetensors"):
        file.unlink()
    with pytest.raises(UsageError, match=r"of layer 4 cannot be read from .*model\.layers\.4"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def full(monkeypatch, free):
    """Every disk has so many bytes left."""
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def test_a_disk_too_small_for_hidden_states_is_refused_before_the_first_layer(tmp_path, monkeypatch):
    states = len(WINDOWS) * 64 * 48 * 4
    for method, sets in (("flap", 1), ("llm-pruner", 6), ("best-static", 2)):
        model = opened("files", tmp_path / method)
        watched = Watch(model)
        monkeypatch.setattr("shutil.disk_usage", shutil.disk_usage)
        with monkeypatch.context() as patch:
            full(patch, states * sets // 2)
            with pytest.raises(UsageError, match=r"hidden states of .* take .* GiB of disk"):
                work(model, method)
        assert not watched.passes


def test_a_disk_too_small_to_go_on_later_is_said(tmp_path, monkeypatch):
    model = FAMILIES["llama-gqa"]()
    Watch(model, 8)
    full(monkeypatch, 1000)
    with pytest.warns(Notice, match="stopped, it begins anew"), pytest.raises(KeyboardInterrupt):
        calibrate(model, WINDOWS, batch_size=4, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_disk_too_small_for_the_cut_layers_is_refused_before_the_work(tmp_path, monkeypatch):
    model = opened("disk", tmp_path / "model")
    watched = Watch(model)
    before = {n: p for n, p in model.named_parameters()}
    full(monkeypatch, 1000)
    with pytest.raises(UsageError, match=r"layers that are cut take .* GiB, and the disk of .* TMPDIR"):
        prune(model, "wanda-sp", 0.3, calibration=WINDOWS)
    assert not watched.passes, "widths that follow from the ratio alone are known at once"
    with pytest.raises(UsageError, match="layers that are cut take"):
        prune(model, "flap", 0.3, calibration=WINDOWS)
    assert all(p is before[n] for n, p in model.named_parameters())


def test_a_copy_shares_files_and_changes_nothing_of_the_other(tmp_path):
    kept = HiddenStates(Room(0), 2, tmp_path, "a")
    kept[0], kept[1] = torch.ones(3), torch.zeros(3)
    copied = HiddenStates(Room(0), 2, tmp_path, "b")
    copied.take(kept)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    copied[0] = torch.full((3,), 2.0)
    assert kept[0].equal(torch.ones(3)) and copied[0].equal(torch.full((3,), 2.0))
    del kept
    assert copied[1].equal(torch.zeros(3)) and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_file_of_hidden_states_that_goes_is_one_sentence(temporary, tmp_path):
    model = opened("files", tmp_path / "model")
    runner = LayerRunner(model, [WINDOWS])
    (file,) = temporary.rglob("states-*.safetensors")
    file.unlink()
    with pytest.raises(UsageError, match="holds hidden states of the work under way, cannot be read"):
        runner.hidden[0]
