"""Work shared out over the processes of a run: each takes some windows or batches, and sums are added up.

Only inside `sharing`; anywhere else, and with one process, nothing here does anything. Every process makes
the same calls in the same order. Knows nothing of models or text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import distributed

from probeprune import processes
from probeprune.errors import UsageError, first_line

_KINDS: dict[str, type[Exception]] = {e.__name__: e for e in (UsageError, FloatingPointError)}
"""Errors whose text is for the user."""

_T = TypeVar("_T")
_active = False


@contextmanager
def sharing() -> Iterator[None]:
    """Share work out over the processes while the context lasts; all must make the same calls inside.

    Calibration, gradients, refits, perplexity and task scores take part, and give every process the same
    result, that of one process to rounding. The first process reads and writes caches. `processes.join` comes
    first. With one process this changes nothing.

    Raises `UsageError` where the processes are not connected.

    Example:
        >>> processes.join()
        >>> loaded = probeprune.load_model(name)
        >>> with sharing():
        ...     probeprune.prune(loaded.model, "flap", ratio=0.2, calibration=windows)
        >>> if processes.is_first():
        ...     probeprune.save(loaded.model, "out", tokenizer=loaded.tokenizer)
    """
    global _active
    if processes.count() > 1 and not processes.is_connected():
        raise UsageError(
            "the processes are not connected yet; call probeprune.processes.join() before a model is loaded."
        )
    before, _active = _active, processes.count() > 1
    try:
        yield
    finally:
        _active = before


def active() -> bool:
    """Whether work is shared out now."""
    return _active


def leads() -> bool:
    """Whether this process reads and writes caches: the first does, and each where nothing is shared."""
    return not _active or processes.is_first()


# -- shares ----------------------------------------------------------------------------------------


def own(total: int) -> range:
    """The indices, of `total` things in a row, that are this process's; all of them where nothing is shared.

    The first processes have one more where the things do not divide, and the last none where there are fewer
    things than processes.
    """
    if not _active:
        return range(total)
    each, more = divmod(total, processes.count())
    rank = processes.rank()
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def own_rows(windows: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that are this process's, as a view."""
    rows = own(len(windows))
    return windows[rows.start : rows.stop]


def dealt(things: Sequence[_T]) -> list[_T]:
    """This process's of things in a row that take less and less work, dealt like cards."""
    return [*things[processes.rank() :: processes.count()]] if _active else [*things]


# -- sums ------------------------------------------------------------------------------------------


def add_up(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place and in its dtype.

    Raises `UsageError` where another process has ended.
    """
    if not _active:
        return
    with processes.exchanging():
        for tensor in tensors:
            wire = _on_wire(tensor)
            distributed.all_reduce(wire)
            if wire is not tensor:
                tensor.copy_(wire)


class _Sums(Protocol):
    def pool(self, add_up: Callable[..., None]) -> None: ...


def pool(sums: Iterable[_Sums]) -> None:
    """Merge moments with those that the other processes hold of other text, in place."""
    if _active:
        for one in sums:
            one.pool(add_up)


# -- values ----------------------------------------------------------------------------------------


def agreed(value: _T) -> _T:
    """The first process's value, in all processes."""
    return processes.agreed(value) if _active else value


def agreed_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first process's tensors, by name, in all processes; what the others give does not matter."""
    if not _active:
        return dict(tensors)
    facts = processes.agreed({n: (t.shape, t.dtype, t.device.type) for n, t in tensors.items()})
    same: dict[str, torch.Tensor] = {}
    for name, (shape, dtype, device) in facts.items():
        same[name] = tensors[name] if processes.is_first() else torch.empty(shape, dtype=dtype, device=device)
        # As bytes: not every backend sends every dtype.
        wire = _on_wire(same[name].contiguous().flatten().view(torch.uint8))
        with processes.exchanging():
            distributed.broadcast(wire, 0)
        if not processes.is_first():
            same[name] = wire.view(dtype).view(shape).to(device)
    return same


def gathered(values: list[Any]) -> list[Any]:
    """The lists of all processes, joined in their order."""
    if not _active:
        return values
    lists: list[Any] = [None] * processes.count()
    with processes.exchanging():
        distributed.all_gather_object(lists, values)
    return [value for each in lists for value in each]


# -- errors ----------------------------------------------------------------------------------------


@contextmanager
def alike() -> Iterator[None]:
    """Around work that each process does for itself: where it fails in one, it fails in all.

    Without that, the others would wait for sums that never come. An error whose text is for the user is
    raised in all processes; any other is raised where it happened, and named in the others. No exchange
    belongs inside, other than that of `alike` itself.
    """
    if not _active:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if processes.is_told(error):
            raise
        failed = error
    flag = torch.tensor([float(failed is not None)], dtype=torch.float32, device="cpu")
    try:
        add_up(flag)
    except UsageError:
        if failed is None:
            raise
        raise failed from failed.__cause__
    if flag:
        raise _common(failed)


def _common(failed: Exception | None) -> Exception:
    """The error that this process raises where some have failed, with that of its own, if any."""
    words = None
    if failed is not None:
        kind = next((name for name, k in _KINDS.items() if isinstance(failed, k)), type(failed).__name__)
        words = kind, str(failed), first_line(failed)
    for rank, told in enumerate(gathered([words])):
        if told is None:
            continue
        kind, text, line = told
        if failed is None:
            failed = (
                _KINDS[kind](text)
                if kind in _KINDS
                else UsageError(f"process {rank} of {processes.count()} failed: {kind}: {line}.")
            )
        break
    assert failed is not None
    processes.mark_told(failed)
    return failed


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the processes can exchange it: NCCL knows GPUs alone."""
    if distributed.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.cuda()
    return tensor
