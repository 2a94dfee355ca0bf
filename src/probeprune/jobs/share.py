"""Put a folder with a model on the Hugging Face hub, in one commit, with the metadata that the hub reads.

The folder itself is not changed. What the hub refuses, or a network that is not there, ends in one sentence.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from probeprune.errors import UsageError, first_line, quoted
from probeprune.foreign.literal import markdown, python_string
from probeprune.foreign.quiet import quiet_libraries
from probeprune.jobs.cards import is_hub_id, pipeline_tag
from probeprune.model.folder import CONFIG, read_object
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.model.making_records import ATTACHED, PRUNING, TRAINING
from probeprune.model.multimodal import multimodal_of

EMBEDDED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of the embedded model."""

_CARD = "README.md"
_ADAPTER = "adapter_config.json"
_TAGS = ("pruned", "structured-pruning", "probeprune")
_DATA_SETS = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "c4-held-out": "allenai/c4"}
"""The hub's names of embedded texts."""


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    results: str | Path | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder that `save`, `prune` or a training run wrote to the hub; returns the address.

    Example:
        >>> probeprune.push("probe-40", "me/smollm2-probe-40", private=True)

    Args:
        folder: a checkpoint, a folder that keeps a method attached, or an adapter.
        repo: `owner/name`, made where it is not there yet.
        private: whether a new repository is private.
        results: a file that `probeprune eval --json` wrote, for the card's evaluation results; None for what
            was measured when the folder was made.
        token: to write with; None for the one that `hf auth login` or HF_TOKEN left.

    Raises `UsageError` for a folder without a model, a name that none can be, no token, a repository of
    somebody else's, a public one where a private one was asked for, a hub that cannot be reached.
    """
    path = Path(folder)
    _check_folder(path)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{quoted(repo)} is no name of a repository ({first_line(error)}).") from None
    if "/" not in repo:
        raise UsageError(f"{quoted(repo)} names no owner; write owner/name.")
    figures = _figures(path, None if results is None else Path(results))
    if token is None and get_token() is None:
        raise UsageError("there is no token of the hub to write with; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, _explained(repo), quiet_libraries(bars=True):
        staged = Path(name)
        (staged / _CARD).write_text(hub_card(path, repo, figures), encoding="utf-8")
        for file in sorted(path.rglob("*")):
            target = staged / file.relative_to(path)
            if file.is_file() and target.name != _CARD and not target.name.startswith("."):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UsageError(f"{repo} is there already and is public; make it private on the hub first.")
        api.upload_folder(folder_path=staged, repo_id=repo, commit_message="Upload with probeprune")
    return f"{api.endpoint}/{repo}"


def hub_card(folder: Path, repo: str, figures: Sequence[EvalResult]) -> str:
    """The card of a folder, with the metadata that the hub reads: base model, tags, evaluation results.

    Args:
        folder: the text of its own card stays, but for its name, which becomes the repository's.
        repo: the repository.
        figures: evaluation results.
    """
    file = folder / _CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# {markdown(repo)}\n"
    own = folder.resolve().name
    text = text.replace(python_string(own), python_string(repo))
    for command in ("generate", "eval"):
        text = text.replace(
            f"`probeprune {command} {markdown(own)}", f"`probeprune {command} {markdown(repo)}"
        )
    card = ModelCard(text)
    data: Any = card.data
    base = _base_model(folder)
    if base is not None:
        data.base_model = base
    data.library_name = data.library_name or "transformers"
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    images = multimodal_of(config.get("model_type")) is not None
    data.pipeline_tag = data.pipeline_tag or pipeline_tag(images)
    data.tags = list(dict.fromkeys([*(data.tags or ()), *_TAGS]))
    if figures:
        data.model_name, data.eval_results = repo.rpartition("/")[2], list(figures)
    return str(card)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give one that `save` or `prune` wrote.")
    if not any((folder / name).is_file() for name in (CONFIG, ATTACHED, _ADAPTER)):
        raise UsageError(f"{folder} holds no model; give a folder that `save` or `prune` wrote.")
    if (folder / ATTACHED).is_file():
        record = read_object(folder / ATTACHED)
        base = record.get("base_model")
        if record.get("weights") == "reference" and base != EMBEDDED_MODEL and not is_hub_id(str(base)):
            raise UsageError(
                f"{folder} refers to the weights of {quoted(base)}, which others do not have; save it with a "
                "copy of the weights, or with a base model of the hub."
            )


def _record(folder: Path) -> Mapping[str, Any]:
    """What the folder says of how it was made; empty where it says nothing."""
    names = (ATTACHED, PRUNING, TRAINING)
    return next((read_object(folder / n) for n in names if (folder / n).is_file()), {})


def _base_model(folder: Path) -> str | None:
    """The hub's name of the model that a folder was made from, where there is one; through the pruned
    checkpoint that it was trained from."""
    record = _record(folder)
    for base in (record.get("base_model"), (record.get("pruning") or {}).get("base_model")):
        if base == EMBEDDED_MODEL:
            return EMBEDDED_ON_THE_HUB
        if isinstance(base, str) and is_hub_id(base):
            return base
    return None


def _figures(folder: Path, results: Path | None) -> list[EvalResult]:
    """Evaluation results for the card."""
    if results is not None:
        try:
            record = json.loads(results.read_text(encoding="utf-8"))
            return [_figure(f["of"], f["metric"], f["value"]) for f in record["results"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{results} is no file of `probeprune eval --json` ({type(error).__name__}: "
                f"{first_line(error)}); give such a file."
            ) from None
    evaluation = _record(folder).get("evaluation")
    if not isinstance(evaluation, dict):
        return []
    found = evaluation.get("perplexity", {})
    value = found.get("pruned", found.get("after"))
    return [] if value is None else [_figure(str(evaluation["corpus"]), "perplexity", value)]


def _figure(of: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=_DATA_SETS.get(of, of),
        dataset_name=of,
        metric_type=metric.replace(",", "").replace(" ", "_"),
        metric_name=metric,
        metric_value=float(value),
    )


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raise what the hub's client raises as one sentence."""
    try:
        yield
    except UsageError:
        raise
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401:
            what = f"the hub does not know the token for {repo}; run `hf auth login` again"
        elif code == 403:
            what = f"this token may not write to {repo}; give a repository of your own, or a token that may"
        else:
            what = f"the hub refused {repo} ({code}: {first_line(error)})"
        raise UsageError(f"{what}.") from error
    except (OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"the hub could not be reached for {repo} ({first_line(error)}); try again."
        ) from error
    except Exception as error:
        # The client lets errors of its HTTP library through, and which library that is changes with releases.
        if not any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            raise
        raise UsageError(
            f"the hub could not be reached for {repo} ({first_line(error)}); try again."
        ) from error
