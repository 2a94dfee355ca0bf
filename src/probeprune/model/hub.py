"""Bring a model of the Hugging Face hub into its cache, so that it opens like any other folder.

Only files that will be opened are downloaded, never pickles.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from transformers.safetensors_conversion import get_conversion_pr_reference

from probeprune.errors import UsageError
from probeprune.model.folder import CONFIG, WEIGHTS, weight_names
from probeprune.model.making_records import refuse_attached

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configs and tokenizers; weights are downloaded once it is known which."""

_FAILURES = (OSError, ValueError, KeyError, IndexError, RuntimeError)
"""What the hub's client raises for models, networks and answers that are not there."""


def snapshot(name: str, *, code: bool, attached: bool = False) -> Path:
    """The folder in the hub's cache with the model's newest files; offline, with those that are there.

    Args:
        name: `owner/name` on the hub.
        code: whether to download Python files too.
        attached: whether the dense weights of a model with a method attached are asked for.

    Raises:
        UsageError: no such model, none that can be reached and none in the cache, or weights that are no
            plain safetensors files.
    """
    small = [*_SMALL, "*.py"] if code else list(_SMALL)
    try:
        folder = Path(snapshot_download(name, allow_patterns=small))
        if not attached:
            refuse_attached(folder)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{name} has no {CONFIG} on the hub")
        wanted = weight_names(folder) or [WEIGHTS]
        missing = [file for file in wanted if not (folder / file).is_file()]
        if missing:
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=missing))
    except UsageError:
        raise
    except _FAILURES as error:
        raise _unknown(name) from error
    return folder if weight_names(folder) else _converted_by_the_hub(name, folder, small)


def described(name: str, *, code: bool) -> Path:
    """The folder in the hub's cache with a model's configs, and without weights unless they are there.

    Raises `UsageError` as `snapshot` does, but for weights.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL, "*.py"] if code else list(_SMALL)))
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{name} has no {CONFIG} on the hub")
    except _FAILURES as error:
        raise _unknown(name) from error
    return folder


def with_files(name: str, folder: Path, files: Sequence[str]) -> Path:
    """The folder of a model in the hub's cache, with further files of the same commit.

    Raises `UsageError` where they cannot be reached.
    """
    try:
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=list(files)))
    except _FAILURES as error:
        raise _unknown(name) from error


def _unknown(name: str) -> UsageError:
    return UsageError(
        f"unknown model '{name}'; it is no local directory or .gguf file, and no hub model of that name "
        "could be reached: check name, network and access, or use the embedded 'smollm2-135m', which "
        "needs no hub."
    )


def commit(name: str) -> str:
    """The commit of a hub model that opens now; empty if it cannot be reached and is not in the cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG])).name
    except _FAILURES:
        return ""  # whoever opens it is told


def _converted_by_the_hub(name: str, folder: Path, small: Sequence[str]) -> Path:
    """The hub's own safetensors copy of a model that has only pickles, as transformers finds it.

    The folder without weights where there is no such copy; whoever opens it refuses it.
    """
    try:
        revision = get_conversion_pr_reference(HfApi(), name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*small, "model*.safetensors"]))
    except _FAILURES:
        return folder
