"""Write a model that is pruned while it runs: calibrate, attach, measure before and after, save."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from probeprune import processes
from probeprune.data.windows import BATCH_SIZE, Text, WindowSource
from probeprune.errors import UsageError
from probeprune.jobs.attached import save_attached
from probeprune.jobs.measure import Measure
from probeprune.jobs.prune import Texts, calibration_source
from probeprune.methods import Method, check_untrained
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import check_space
from probeprune.model.cost import PeakMemory
from probeprune.model.loading import LoadedModel
from probeprune.model.machine import cache_dir
from probeprune.places import check_free, claimed
from probeprune.prepare import prepare
from probeprune.processes import shares
from probeprune.progress import Progress, silent
from probeprune.runtime.attached_folder import Weights
from probeprune.runtime.attaching import attach
from probeprune.runtime.attachment import Attachment
from probeprune.runtime.handle import Handle


def keep_to(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    folder: Path,
    texts: Texts,
    *,
    weights: Weights = "copy",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attach a method to a loaded model and save both (`probeprune.save`).

    Returns what was done and measured, as in attached.json.

    With several processes, call this in each: they share the work out, and the first one writes.

    Args:
        loaded: the model; dense again at the end.
        method, ratio: as in `attach`.
        folder: a folder that does not exist or is empty.
        texts: what to calibrate on and to measure on.
        weights: as in `probeprune.save`; a reference names the model as it was opened.
        progress: called with (name of the work, parts done, parts in total).

    Raises:
        UsageError: any request that `attach` or `save` refuses, a place that cannot be written or a folder
            that another process writes; nothing has been written then.
        FloatingPointError: NaN statistics, gradients or losses.
    """
    processes.join(loaded.device.type)
    with shares.sharing(), ExitStack() as held:
        with shares.alike():
            if processes.is_first():
                held.enter_context(claimed(folder))
                check_free(folder)
            check_untrained(method)
            find_blocks(loaded.model, method.unit_kind)
            if weights == "copy":
                size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
                check_space(folder, size)
            measure = Measure(loaded, texts.evaluation, progress, texts.batch_size)
            source = calibration_source(loaded, method, texts.calibration, texts.seed)
        measure("dense", loaded.model)
        started = time.monotonic()
        with PeakMemory(loaded.device) as memory:
            handle = _attached(loaded, method, ratio, source, texts.batch_size, progress)
        with handle:
            if handle.removed_share <= 0:
                raise UsageError(f"ratio {ratio:g} is too small to leave out a single unit; raise it.")
            seconds = time.monotonic() - started
            measure("pruned", loaded.model)
            more = {
                "corpus": None if source is None else texts.calibration.name,
                "seed": texts.seed,
                "evaluation": measure.record(),
                "seconds": round(seconds, 1),
                "peak_memory": memory.bytes,
                "device": str(loaded.device),
            }
            with shares.alike():
                if processes.is_first():
                    save_attached(
                        handle,
                        folder,
                        tokenizer=loaded.tokenizer,
                        more=more,
                        weights=weights,
                        base_model=_name(loaded.name),
                    )
            return {
                **more,
                "base_model": loaded.name,
                "method": method.record(),
                "ratio": ratio,
                "removed_share": handle.removed_share,
                "weights": weights,
            }


def attachment(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    text: Text,
    seed: int,
    *,
    progress: Progress = silent,
) -> tuple[Attachment, float]:
    """What attaching a method to a model takes, calibrated once, from the cache where possible; and the share
    of the blocks' parameters that is left out then.

    Args:
        loaded: the model, with nothing attached.
        method, ratio: as in `attach`.
        text, seed: what to calibrate on, and the seed that draws its windows.
        progress: called with (name of the work, parts done, parts in total).

    Raises as `prepare` and `attach` do.
    """
    source = calibration_source(loaded, method, text, seed)
    with _attached(loaded, method, ratio, source, BATCH_SIZE, progress) as handle:
        assert handle.kept is not None
        return handle.kept, handle.removed_share


def _attached(
    loaded: LoadedModel,
    method: Method,
    ratio: float,
    source: WindowSource | None,
    batch_size: int,
    progress: Progress,
) -> Handle:
    """The method attached, calibrated from the cache where possible; without a source it needs nothing."""
    prepared = None
    if source is not None:
        cache = cache_dir() / "statistics"
        prepared = prepare(
            loaded.model, method, ratio, source, batch_size=batch_size, cache=cache, progress=progress
        )
    return attach(loaded.model, method, ratio, calibration=prepared)


def _name(name: str) -> str:
    """The name of a model, from anywhere on this machine."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
