"""Spreading cells over a Ray cluster: each worker measures one subject at a time, the driver alone writes.

The lines are those of a local run. A worker that dies is started again and its subject measured anew; what
else fails becomes a line that says why.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from probeprune.errors import UsageError, first_line
from probeprune.experiment.cells import Cell
from probeprune.experiment.measuring import failure
from probeprune.experiment.results import Results
from probeprune.experiment.run import Done, measured, unmeasured
from probeprune.experiment.workbench import Workbench
from probeprune.progress import Progress, silent
from probeprune.result_lines import Line

RETRIES = 3
"""How often a subject is begun anew when its worker dies."""


class Worker:
    """One process of the cluster; keeps its model open from one subject to the next."""

    def __init__(self, folder: str, threads: int, trust_remote_code: bool) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.bench = Workbench(Path(folder), silent, trust_remote_code)

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def measure(self, cells: list[Cell]) -> list[Line]:
        """The lines of the cells of one subject."""
        return [row for _, row in measured(self.bench, cells, keep_going=True)]


def run_on_ray(
    folder: Path,
    results: Results,
    cells: Sequence[Cell],
    *,
    address: str | None = None,
    workers: int = 2,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    done: Done = lambda cell, row: None,
    started: Callable[[list[int]], Any] | None = None,
) -> list[Line]:
    """As `run` with `keep_going`, on a Ray cluster; returns the rows of all cells, in their order.

    Args:
        folder: where workers keep trained models; shared between machines, or each has its own.
        address: of an existing cluster (`auto` finds one); None starts one on this machine.
        workers: processes that measure at the same time.
        started: called with the workers' process ids, for those who watch them.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached or is lost; lines stay.
    """
    ray = _ray()
    groups = (unmeasured(own, results, done) for _, own in groupby(cells, key=lambda c: c.subject))
    todo = [left for left in groups if left]
    if todo:
        # On this machine workers share its cores; on a cluster each node has its own.
        gpus = 1 if todo[0][0].subject.device.startswith("cuda") else 0
        threads = 0 if address or gpus else max((os.cpu_count() or 1) // workers, 1)
        with _connected(ray, address, workers):
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES)(Worker)
            count = min(workers, len(todo))
            crew = [remote.remote(str(folder.absolute()), threads, trust_remote_code) for _ in range(count)]
            if started is not None:
                started(ray.get([w.pid.remote() for w in crew]))
            _spread(ray, crew, results, todo, progress, done)
    return [results.rows[c.key] for c in cells]


@contextmanager
def _connected(ray: Any, address: str | None, workers: int) -> Iterator[None]:
    """A cluster while inside, or the sentence that says why there is none (any more)."""
    try:
        _check_answers(address)
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address or 'this machine'} ({first_line(error)}); start one with "
            "`ray start --head`, or leave --address out for a local one."
        ) from error
    try:
        yield
    except ray.exceptions.RaySystemError as error:
        raise UsageError(
            f"the Ray cluster is gone ({first_line(error)}); what was measured is saved, the same command "
            "goes on."
        ) from error
    finally:
        ray.shutdown()


def _spread(
    ray: Any, idle: list[Any], results: Results, todo: list[list[Cell]], progress: Progress, done: Done
) -> None:
    """Give every worker one subject after the other."""
    total, finished = len(todo), 0
    progress("subjects", finished, total)
    running: dict[Any, tuple[Any, list[Cell]]] = {}
    while todo or running:
        while todo and idle:
            worker, group = idle.pop(), todo.pop(0)
            running[worker.measure.remote(group)] = worker, group
        (ready,), _ = ray.wait(list(running), num_returns=1)
        worker, group = running.pop(ready)
        try:
            rows = ray.get(ready)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            rows = [failure(c, RuntimeError(f"its worker failed ({first_line(error)})")) for c in group]
        for cell, row in zip(group, rows, strict=True):
            results.add(row)
            done(cell, row)
        idle.append(worker)
        finished += 1
        progress("subjects", finished, total)


def _check_answers(address: str | None) -> None:
    """Ray itself asks a silent address again and again, for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed; run `pip install 'probeprune[ray]'`.") from error
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    return ray
