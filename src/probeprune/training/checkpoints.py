"""Checkpoints of a run in progress: which is whole, and what its training had left to do.

The transformers Trainer writes and reads them. It takes what it finds (a missing optimizer is a new one), so
all files are looked at before. Pickles are opened with `weights_only`, by the Trainer too.
"""

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from probeprune.errors import Notice

STATE = "trainer_state.json"
"""The file that the Trainer writes last into a checkpoint."""

_PARTS = {
    "weights": ("*.safetensors", "pytorch_model_fsdp*"),
    "optimizer": ("optimizer*",),
    "schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
}
"""What a checkpoint consists of, and the names that its files may have, also under FSDP."""


def last_checkpoint(work: Path, keep_best: bool = False) -> Path | None:
    """The newest checkpoint that training can go on from; None if there is none.

    A kill may leave one incomplete, which is passed over. One that was complete and is damaged now is named
    in a `Notice`.

    Args:
        work: the directory of the run.
        keep_best: the run also needs the weights of its best step so far.
    """
    passed_over = []
    for folder in sorted(work.glob("checkpoint-*"), key=step_of, reverse=True):
        state = read_state(folder)
        if state is None:
            continue
        problem = _problem(folder)
        if problem is None and keep_best and state.best_global_step:
            best = folder.with_name(f"checkpoint-{state.best_global_step}")
            problem = _problem(best) and f"its best step, {best.name}, is not whole"
        if problem is None:
            break
        passed_over.append(f"{folder.name} in {work} is damaged ({problem})")
    else:
        folder = None
    if passed_over:
        where = "the beginning" if folder is None else folder.name
        warnings.warn(Notice(f"{'; '.join(passed_over)}: training goes on from {where}."), stacklevel=2)
    return folder


def read_state(checkpoint: Path) -> TrainerState | None:
    """The Trainer's state in a checkpoint; None if it is missing, or cut short by a kill."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        return state if int(state.global_step) == step_of(checkpoint) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def has_ended(state: TrainerState) -> bool:
    """Whether no step was left to do: all are done, or the run was stopped early."""
    control = state.stateful_callbacks.get("TrainerControl", {})
    return bool(state.global_step >= state.max_steps or control.get("args", {}).get("should_training_stop"))


def step_of(checkpoint: Path) -> int:
    """The step behind which a checkpoint was made; -1 for another folder."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is."""
    for part, patterns in _PARTS.items():
        files = [file for pattern in patterns for file in checkpoint.glob(pattern)]
        if not files:
            return f"it has no {part}"
        for file in files:
            try:
                _open(file)
            except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError):
                return f"{file.name} cannot be read"
    return None


def _open(file: Path) -> None:
    """Open a file as far as is needed to see that it is whole. Raises what its library raises."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    elif file.is_file():  # under FSDP some are folders
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
