"""Run cells on a Ray cluster: each worker measures one subject at a time, and the driver writes the results.

The rows are those of a local run. A worker that dies is restarted and measures its subject again; any other
failure becomes a row with the reason.
"""

import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from probeprune.errors import Notice, UsageError, first_line
from probeprune.experiment.ahead import work_of
from probeprune.experiment.cells import Cell
from probeprune.experiment.measuring import failure
from probeprune.experiment.results import Results
from probeprune.experiment.run import Done, measure_cells, missing
from probeprune.experiment.workbench import Workbench
from probeprune.progress import Progress, silent
from probeprune.ranges import check_fields
from probeprune.result_lines import Line

RETRIES = 3
"""How often a subject is measured again after its worker died."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers run.

    Attributes:
        address: of an existing cluster (`auto` finds one); None starts one on this machine.
        workers: number of processes that measure at the same time; fewer where the cluster has no room.
        gpus: GPUs that Ray keeps free for each of them, also a part of one; None for one where models run on
            CUDA. A model is spread over the GPUs of its process.
        memory: bytes of memory that Ray keeps free for each of them, and that a model on the CPU may take
            with what is done on it; None for no matter how many.
    """

    address: str | None = None
    workers: int = 2
    gpus: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise UsageError(
                f"gpus (--cell-gpus) must be a part of one GPU or a whole number of them, not {self.gpus:g}."
            )

    def resources(self, device: str) -> dict[str, float]:
        """What each process asks Ray for, by Ray's own names; `device` is where models run.

        Raises `UsageError` for no GPU where they run on CUDA.
        """
        on_cuda = device.startswith("cuda")
        if on_cuda and self.gpus == 0:
            raise UsageError(
                "models run on CUDA, and no worker is to have a GPU; give --cell-gpus above 0, or choose "
                "--device cpu."
            )
        gpus = float(on_cuda) if self.gpus is None else self.gpus
        return {"CPU": 1.0, "GPU": gpus, "memory": float(self.memory or 0)}

    def opening(self, device: str) -> dict[str, Any]:
        """How each process opens models, as options of a `Workbench`; `device` is where they run."""
        if device.startswith("cuda"):
            return {"device_map": "auto"} if self.gpus is not None and self.gpus > 1 else {}
        return {"memory": self.memory}


class Worker:
    """A process of the cluster; keeps its model open from one subject to the next."""

    def __init__(self, folder: str, threads: int, options: Mapping[str, Any]) -> None:
        """Takes the folder and the further options of a `Workbench`, and a number of threads or 0."""
        if threads:
            torch.set_num_threads(threads)
        self.bench = Workbench(Path(folder), silent, **options)

    def pid(self) -> int:
        """Process id."""
        return os.getpid()

    def measure(self, cells: list[Cell]) -> list[Line]:
        """Measure the cells of one subject; returns their rows."""
        self.bench.work = work_of(cells)
        return [row for _, row in measure_cells(self.bench, cells, keep_going=True)]


def run_on_ray(
    folder: Path,
    results: Results,
    cells: Sequence[Cell],
    *,
    cluster: Cluster = Cluster(),
    trust_remote_code: bool = False,
    progress: Progress = silent,
    done: Done = lambda cell, row: None,
    started: Callable[[list[int]], Any] | None = None,
) -> list[Line]:
    """`run_cells` with `keep_going` on a Ray cluster; returns the rows of all cells, in their order.

    Args:
        folder: where workers keep trained models; shared by all machines, or one on each.
        results: stores the rows; written by this process alone.
        cells: what to measure; neighbours with the same subject go to the same worker.
        cluster: where the workers run.
        trust_remote_code: let models run code of their own when they are opened.
        progress: called with (label, subjects done, subjects in all).
        done: called with every cell and its row.
        started: called with the workers' process ids once they run.

    Raises:
        UsageError: Ray is not installed, the cluster cannot be reached or is lost, or none of its nodes has
            what a process asks for. Rows measured before stay.
    """
    ray = _ray()
    groups = (missing(group, results, done) for _, group in groupby(cells, key=lambda c: c.subject))
    todo = [group for group in groups if group]
    if todo:
        # Workers on this machine share its cores; on a cluster their threads are left as they are.
        device = todo[0][0].subject.device
        asked = cluster.resources(device)
        local = not cluster.address and not device.startswith("cuda")
        threads = max((os.cpu_count() or 1) // cluster.workers, 1) if local else 0
        with _connected(ray, cluster):
            nodes = [n.get("Resources", {}) for n in ray.nodes() if n.get("Alive")]
            wanted = min(cluster.workers, len(todo))
            count = min(wanted, _room(nodes, asked, wanted))
            options = {"num_cpus": 1, "num_gpus": asked["GPU"], "memory": asked["memory"] or None}
            remote = ray.remote(**options, max_restarts=-1, max_task_retries=RETRIES)(Worker)
            opening = {"trust_remote_code": trust_remote_code, **cluster.opening(device)}
            crew = [remote.remote(str(folder.absolute()), threads, opening) for _ in range(count)]
            if started is not None:
                started(ray.get([w.pid.remote() for w in crew]))
            _spread(ray, crew, results, todo, progress, done)
    return [results.rows[c.key] for c in cells]


def _room(nodes: Sequence[Mapping[str, float]], asked: Mapping[str, float], wanted: int) -> int:
    """How many processes fit onto the nodes of a cluster at the same time; says so where they are fewer than
    `wanted`.

    Raises `UsageError` where no node has what one process asks for: Ray itself would wait for ever.
    """
    needs = {name: amount for name, amount in asked.items() if amount}
    # Ray counts in ten-thousandths: 1 / 0.1 is 10 there, and 9.99 here.
    room = sum(min(int(n.get(name, 0) / amount + 1e-4) for name, amount in needs.items()) for n in nodes)
    if not room:
        there = "; ".join(sorted({_amounts(node, needs) for node in nodes})) or "none is alive"
        raise UsageError(
            f"no node of the Ray cluster has {_amounts(needs, needs)} for a worker (there is: {there}); ask "
            "for less with --cell-gpus or --cell-memory, or add a node that has it."
        )
    if room < wanted:
        warnings.warn(f"the Ray cluster has room for {room} of {wanted} workers", Notice, stacklevel=3)
    return room


def _amounts(node: Mapping[str, float], names: Iterable[str]) -> str:
    """Amounts of resources in words, such as `1 CPU, 0.5 GPU, 2.00 GiB of memory`."""
    amounts = {name: node.get(name, 0) for name in names}
    return ", ".join(
        f"{amount / 2**30:.2f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    )


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Connect to the cluster, or start one, for the duration of the context.

    Raises `UsageError` where the cluster does not answer, or is lost meanwhile.
    """
    address = cluster.address
    try:
        _check_answers(address)
        ray.init(
            address=address,
            num_cpus=None if address else cluster.workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address or 'this machine'} ({first_line(error)}); start one with "
            "`ray start --head`, or give no address to start one on this machine."
        ) from error
    try:
        yield
    except ray.exceptions.RaySystemError as error:
        raise UsageError(
            f"the Ray cluster is gone ({first_line(error)}); results so far are saved, run the same command "
            "again to go on."
        ) from error
    finally:
        ray.shutdown()


def _spread(
    ray: Any, idle: list[Any], results: Results, todo: list[list[Cell]], progress: Progress, done: Done
) -> None:
    """Hand out the groups of cells, one at a time to each idle worker, and store the rows."""
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
    """Raise `OSError` where nothing listens; Ray itself would try a silent address for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()


def _ray() -> Any:
    """The module `ray`, an optional dependency. Raises `UsageError` where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed; run `pip install 'probeprune[ray]'`.") from error
    return ray
