"""Several processes share work out and find what one finds; one of them writes; a death is one sentence."""

import json
import os
import subprocess
import sys
import threading
from itertools import chain

import forked
import pytest
import shared_work
import torch
from forked import in_two
from safetensors.torch import load_file
from tiny import opened, write_model_and_text

from probeprune import METHODS, processes
from probeprune.algebra.least_squares import Gram
from probeprune.algebra.moments import Moments, Tokens
from probeprune.calibration import collecting, unfinished
from probeprune.cli import app, run
from probeprune.cli.compare import _check_untrained
from probeprune.errors import UsageError
from probeprune.experiment.results import Results
from probeprune.processes import shares


def call(*parts):
    return run(lambda: app([*parts]))


# -- without processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(7, 2), (1, 2), (0, 3), (8, 3), (5, 5)])
def test_shares_are_everything_once_in_order(total, count, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "is_connected", lambda: True)
    found = []
    with shares.sharing():
        for rank in range(count):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            found.append(list(shares.own(total)))
    assert [*chain.from_iterable(found)] == list(range(total))
    assert [len(f) for f in found] == sorted((len(f) for f in found), reverse=True)
    assert len(found[0]) - len(found[-1]) <= 1


def test_without_sharing_everything_is_ones_own():
    assert not shares.active() and list(shares.own(3)) == [0, 1, 2] and shares.agreed(5) == 5
    with shares.sharing():
        assert not shares.active(), "one process shares nothing"


class Together:
    """Sums over threads, each of which holds a part."""

    def __init__(self, count):
        self.barrier, self.given, self.lock = threading.Barrier(count), [], threading.Lock()

    def add_up(self, *tensors):
        for tensor in tensors:
            with self.lock:
                self.given.append(tensor.clone())
            self.barrier.wait()
            total = sum(self.given)
            if self.barrier.wait() == 0:
                self.given = []
            self.barrier.wait()
            tensor.copy_(total)


def pooled(parts):
    together = Together(len(parts))
    threads = [threading.Thread(target=part.pool, args=(together.add_up,)) for part in parts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return parts


def test_moments_pooled_at_once_are_those_of_all_tokens():
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(12, 5, 4, generator=g) + 9, torch.randn(60, 3, generator=g) - 4
    whole, whole_gram = Moments(4, own=2), Gram(4, 3)
    whole.update(z, Tokens(12, 5))
    whole_gram.update(z.flatten(0, 1), t)
    parts, grams = [Moments(4, own=2) for _ in range(3)], [Gram(4, 3) for _ in range(3)]
    for i, rows in enumerate((slice(0, 9), slice(9, 12))):  # the third has nothing
        parts[i].update(z[rows], Tokens(len(z[rows]), 5))
        grams[i].update(z[rows].flatten(0, 1), t.view(12, 5, 3)[rows].flatten(0, 1))
    for part in pooled(parts):
        for name, value in whole.state().items():
            torch.testing.assert_close(part.state()[name], value)
    for gram in pooled(grams):
        for name in ("count", "z_mean", "t_mean", "zz", "tz", "tt"):
            torch.testing.assert_close(getattr(gram, name), getattr(whole_gram, name))
    assert pooled([Gram(4, 3), Gram(4, 3)])[0].count == 0


def test_what_takes_one_process_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.count() == 2 and processes.is_first()
    with (
        pytest.raises(UsageError, match="not connected yet; call"),
        shares.sharing(),
    ):
        pass
    assert call("table", "--out", str(tmp_path / "out")) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"flap\+lora train, which compare does in one process"):
        _check_untrained([METHODS["flap"], METHODS["flap+lora"]])
    monkeypatch.setenv("RANK", "1")
    assert call("prune", "--ratio", "much", "--method", "flap", "--out", str(tmp_path / "out")) == 2
    assert not capsys.readouterr().err, "the first process says what all were given"


# -- two processes -------------------------------------------------------------------------------


def test_two_processes_find_what_one_finds(tmp_path):
    for code, _, errors in in_two(shared_work.main, tmp_path):
        assert code == 0, errors[-3000:]
    one = shared_work.work(tmp_path / "cache")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == one.keys()
    for name, value in one.items():
        assert first[name].equal(second[name]), f"{name} differs between the processes"
        torch.testing.assert_close(first[name].to(value.dtype), value, rtol=2e-4, atol=2e-5, msg=name)
    assert len(list((tmp_path / "cache-0").iterdir())) == len(list((tmp_path / "cache").iterdir()))
    assert not [*(tmp_path / "cache-1").rglob("*.safetensors")], "the first process alone has a cache"


@pytest.fixture(scope="module")
def files(tmp_path_factory, number_tokenizer):
    """A tiny model and a text, with a cache of their own."""
    folder = tmp_path_factory.mktemp("processes")
    write_model_and_text(folder, number_tokenizer)
    return folder


def arguments(files, command, out, *more):
    text = files / "text.jsonl"
    sizes = ["--length", 16, "--calibration-windows", 9, "--windows", 5, "--batch-size", 2]
    texts = ["--calibration", text, "--corpus", text]
    return [str(a) for a in (command, files / "model", "--out", out, *sizes, *texts, *more)]


def test_torchrun_prunes_as_one_process_and_writes_once(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache of one"))
    more = ["--method", "best-static", "--ratio", 0.3, "--layout", "per-layer", "--skip-layers", 1, "--json"]
    more += ["--round-to", 4]
    more += ["--dtype", "float32"]  # bfloat16, the faster one on some machines, rounds too much
    assert call(*arguments(files, "prune", tmp_path / "one", *more)) == 0
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launched, "-m", "probeprune", *arguments(files, "prune", tmp_path / "two", *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PROBEPRUNE_CACHE": str(tmp_path / "cache of two")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record, alone = json.loads(done.stdout), json.loads((tmp_path / "one/pruning.json").read_text())
    assert record["kept"] == alone["kept"]
    assert record["evaluation"]["perplexity"] == pytest.approx(alone["evaluation"]["perplexity"], rel=1e-4)
    one, two = opened(tmp_path / "one").state_dict(), opened(tmp_path / "two").state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    for what in ("", "cache of "):
        assert written(tmp_path / f"{what}two") == written(tmp_path / f"{what}one")


def written(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def test_two_processes_compare_as_one(files, tmp_path):
    more = ["--methods", "dense,wanda-sp,probe", "--ratios", 0.4, "--skip-layers", 1, "--dtype", "float32"]
    more += ["--speed-rounds", 0]
    assert call(*arguments(files, "compare", tmp_path / "one", *more)) == 0
    both = in_two(forked.command, *arguments(files, "compare", tmp_path / "two", *more))
    for code, _, errors in both:
        assert code == 0, errors[-3000:]
    assert both[0][1] and not both[1][1] and not both[1][2], "the second process prints nothing"
    one, two = (Results.open(tmp_path / name).rows for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 3
    for key, row in one.items():
        assert two[key]["losses"] == pytest.approx(row["losses"], rel=1e-4), row["name"]
        assert two[key]["agreement"] == (row["agreement"] and pytest.approx(row["agreement"], rel=1e-3))
    assert (tmp_path / "two/results.jsonl").read_bytes().count(b"\n") == 3
    assert written(tmp_path / "one") == written(tmp_path / "two")


def watched(dies: bool, *words: str) -> None:
    """A command whose second process dies at the third layer, or one that must not run what is finished."""
    collect = collecting.collect

    def watching(runner, layer, *rest):
        if dies and layer == 2 and processes.rank() == 1:
            os._exit(9)
        assert dies or layer >= 2, "a finished layer is not run again"
        return collect(runner, layer, *rest)

    collecting.collect = watching
    unfinished.EVERY = unfinished.COST = 0.0
    forked.command(*words)


def test_a_process_that_dies_ends_the_others_with_a_sentence(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    command = arguments(
        files, "prune", tmp_path / "out", "--method", "wanda-sp", "--ratio", 0.3, "--round-to", 4
    )
    (code, _, errors), (died, *_) = in_two(watched, True, *command)
    assert died == 9 and code == 2
    (sentence,) = (line for line in errors.splitlines() if line.strip())
    assert sentence.startswith("probeprune: the 2 processes have lost each other, one may have ended (")
    assert "onnection" in sentence and not (tmp_path / "out").exists()
    kept = (tmp_path / "cache/statistics").rglob("index.json")
    assert [json.loads(index.read_text())["done"] for index in kept] == [2, 2], "by each process"
    for code, _, errors in in_two(watched, False, *command):
        assert code == 0, errors[-3000:]
    assert not [*(tmp_path / "cache/statistics").rglob("index.json")]
