"""Any task of the LM evaluation harness by its name, with its own data: a figure and its items.

The seven tasks whose items ship with the package are in `tasks.py`. Knows nothing of pruning.
"""

import contextlib
import io
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import lm_eval
import lm_eval.tasks

from probeprune.errors import UsageError, first_line
from probeprune.evaluation.harness import LiveModel, quiet
from probeprune.evaluation.perplexity import mean_error

_MAIN = ("acc_norm", "acc", "exact_match", "f1")
"""The metric that stands for a task with several, the first of these that it has."""


@dataclass(frozen=True)
class NamedResult:
    """The result of one task.

    Attributes:
        task, metric: the harness' names; the metric with its filter where that is not `none`.
        value: the harness' figure.
        error: its standard error, over items where they are known; NaN where nobody knows it.
        items: the metric of each item, in the order of their ids; empty where it is no mean over items.
    """

    task: str
    metric: str
    value: float
    error: float
    items: tuple[float, ...]


@cache
def _manager() -> lm_eval.tasks.TaskManager:
    """All of the harness' tasks by name; to read them takes ten seconds."""
    with quiet():
        return lm_eval.tasks.TaskManager()


def check_task_names(names: list[str]) -> None:
    """Raise `UsageError` for a name that the harness does not know."""
    if not names:
        return
    known = _manager().all_tasks
    for name in names:
        if name not in known:
            raise UsageError(
                f"the LM evaluation harness has no task {name!r}; `lm_eval ls tasks` lists all, and "
                "`probeprune eval --help` those whose items ship with the package."
            )


def evaluate_named(lm: LiveModel, name: str, *, limit: int | None = None) -> list[NamedResult]:
    """Score a task, or all tasks of a group, as the harness does.

    Args:
        lm: the model.
        name: a task or group of the harness.
        limit: number of items of each task; None for all.

    Raises `UsageError` for data that cannot be had.
    """
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=[name],
                task_manager=_manager(),
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
            )
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the harness could not run task {name} ({first_line(error)}); check the network, or choose a "
            "task whose items ship with the package."
        ) from error
    assert found is not None
    return [_result(task, found["results"][task], found["samples"][task]) for task in found["samples"]]


def _result(task: str, figures: dict[str, Any], samples: list[dict[str, Any]]) -> NamedResult:
    keys = [k for k, v in figures.items() if "," in k and "_stderr," not in k and isinstance(v, int | float)]
    assert keys, f"{task} has no figures"
    key = next((k for m in _MAIN for k in keys if k.startswith(f"{m},")), keys[0])
    metric, _, filtered = key.partition(",")
    rows = sorted((s for s in samples if s.get("filter", "none") == filtered), key=lambda s: s["doc_id"])
    items = [s.get(metric) for s in rows]
    values = tuple(float(v) for v in items if isinstance(v, int | float))
    value = float(figures[key])
    mean = len(values) == len(items) > 0 and math.isclose(sum(values) / len(values), value, abs_tol=1e-9)
    error = figures.get(f"{metric}_stderr,{filtered}")
    return NamedResult(
        task=task,
        metric=metric if filtered == "none" else f"{metric} ({filtered})",
        value=value,
        error=mean_error(values) if mean else float(error) if isinstance(error, int | float) else math.nan,
        items=values if mean else (),
    )
