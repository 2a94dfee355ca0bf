"""Presets: a whole table described by one YAML file.

Those of the package lie in `preset_files`; a file of your own looks like them (`probeprune table --show`).
Reading a preset runs nothing; every mistake is reported with its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from probeprune.data.windows import CALIBRATION, Text
from probeprune.errors import UsageError, unknown
from probeprune.evaluation.task_data import TASKS
from probeprune.experiment.cells import (
    Cell,
    CostMeasure,
    Measure,
    Setting,
    Subject,
    TaskMeasure,
    TextMeasure,
    TrainingBudget,
    grid,
    subject,
    trains,
)
from probeprune.experiment.yaml_records import Entry, field_names, open_yaml, read, read_fields, read_record
from probeprune.methods import TABLES, Method, get_method
from probeprune.model.fingerprint import source_fingerprint
from probeprune.strategies.importance import IMPORTANCES

FOLDER = Path(__file__).parent / "preset_files"
PUBLISHED = FOLDER / "published.yaml"


@dataclass(frozen=True)
class MeasureGroup:
    """Measures that are taken with the same seeds (None: all seeds of the preset)."""

    measures: tuple[Measure, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Preset:
    """A table: every model by every method, ratio and seed, on every measure."""

    description: str
    models: tuple[str, ...]
    methods: tuple[Method, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    calibration: Text
    groups: tuple[MeasureGroup, ...]
    budget: TrainingBudget | None = None
    training_seeds: tuple[int, ...] | None = None
    """Seeds that methods are trained with; None for all."""

    def cells(self, dtype: str, device: str) -> list[Cell]:
        """All cells, sorted by seed: the first seed alone already gives a whole table.

        Subjects with training come last within their seed, because training replaces the open dense model.
        """
        cells: list[Cell] = []
        for model in self.models:
            weights = source_fingerprint(model)
            setting = Setting(model, dtype, device, self.calibration, self.budget, weights)
            for seed in self.seeds:
                for method in sorted(self.methods, key=trains):
                    for ratio in self.ratios:
                        pruned = subject(setting, method, ratio, seed)
                        cells += grid([pruned], self._measures(pruned, seed))
        return list(dict.fromkeys(cells))

    def _measures(self, subject: Subject, seed: int) -> list[Measure]:
        """The measures to take on the subject with that seed."""
        training = trains(subject.method)
        if training and not _includes(self.training_seeds, seed):
            return []
        # A subject that no seed changes (the dense model) is measured once, in every group.
        groups = [g for g in self.groups if _includes(g.seeds, seed) or not subject.seed_matters]
        measures = [m for g in groups for m in g.measures]
        # A trained model costs as much as the same cut without training, which is measured.
        return [m for m in measures if not (training and isinstance(m, CostMeasure))]


def _includes(seeds: Sequence[int] | None, seed: int) -> bool:
    return seeds is None or seed in seeds


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.stem for f in FOLDER.glob("*.yaml") if f != PUBLISHED)


def published() -> dict[tuple[str, str, float], dict[str, float]]:
    """Published figures by (model, method, ratio): `perplexity`, and `accuracy` in percent."""
    by_row: dict[tuple[str, str, float], dict[str, float]] = {}
    for model, rows in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        for method, ratio, perplexity, accuracy in rows:
            figures = {"perplexity": perplexity, "accuracy": accuracy}
            by_row[model, method, float(ratio)] = {k: v for k, v in figures.items() if v is not None}
    return by_row


def preset_file(name: str) -> Path:
    """Path of a preset, given by name or as a YAML file. Raises `UsageError` where there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"there is no preset file '{name}'.")
        return path
    if name not in preset_names():
        known = unknown("preset", name, preset_names()).rstrip(".")
        raise UsageError(f"{known}, or the path of a .yaml file.")
    return FOLDER / f"{name}.yaml"


def load_preset(name: str) -> Preset:
    """Read a preset, given by name or as a YAML file.

    Raises `UsageError` for an unknown name, and for any mistake in the file, with its line.
    """
    path = preset_file(name)
    root = open_yaml(path)
    if root is None:
        raise UsageError(f"{path} is empty; `probeprune table --preset laptop --show` prints an example.")
    entries = root.mapping(_KEYS)
    for key in ("models", "methods", "ratios"):
        if key not in entries:
            root.fail(f"there is no '{key}'")
    methods = tuple(_method(e) for e in entries["methods"].items())
    budget, training_seeds = _budget(entries["training"]) if "training" in entries else (None, None)
    trained = [m.name for m in methods if trains(m)]
    if trained and budget is None:
        entries["methods"].fail(f"{', '.join(trained)} train: add 'training' with steps and batch_size")
    return Preset(
        description=read(entries["description"], str) if "description" in entries else "",
        models=read(entries["models"], tuple[str, ...]),
        methods=methods,
        ratios=tuple(_ratio(e) for e in entries["ratios"].items()),
        seeds=_seeds(entries.get("seeds")) or (0,),
        calibration=(
            read(entries["calibration"], Text, base=CALIBRATION) if "calibration" in entries else CALIBRATION
        ),
        groups=_groups(root, entries),
        budget=budget,
        training_seeds=training_seeds,
    )


_KEYS = (
    "description",
    "models",
    "methods",
    "ratios",
    "seeds",
    "calibration",
    "training",
    "texts",
    "tasks",
    "cost",
)


def _method(entry: Entry) -> Method:
    """A method by name, or `{base: ..., name: ..., ...}`: one that differs from its base in some fields.

    `gradients` changes the settings that the importance was published with.
    """
    if isinstance(entry.node, yaml.ScalarNode):
        return entry.checked(lambda: get_method(read(entry, str)))
    entries = entry.mapping({"base", *field_names(Method)})
    if "base" not in entries:
        entry.fail("a method of your own needs 'base', the method it starts from")
    if "name" not in entries:
        entry.fail("a method of your own needs a 'name'")
    named = entries.pop("base")
    base = named.checked(lambda: get_method(read(named, str)))
    gradients = entries.pop("gradients", None)
    method = read_record(entry, entries, Method, TABLES, base)
    if gradients is None:
        return method
    if IMPORTANCES[method.importance].criterion is not None:
        method = replace(method, gradients=method.gradient_settings)
    return read_record(entry, {"gradients": gradients}, Method, TABLES, method)


def _ratio(entry: Entry) -> float:
    ratio: float = read(entry, float)
    if not 0 < ratio < 1:
        entry.fail(f"ratio {ratio:g} is outside (0, 1)")
    return ratio


def _seeds(entry: Entry | None) -> tuple[int, ...] | None:
    """The seeds in a file; None where it names none."""
    seeds: tuple[int, ...] | None = None if entry is None else read(entry, tuple[int, ...])
    return seeds


def _budget(entry: Entry) -> tuple[TrainingBudget, tuple[int, ...] | None]:
    """The training budget, and the seeds that methods are trained with."""
    entries = entry.mapping({*field_names(TrainingBudget), "seeds"})
    seeds = _seeds(entries.pop("seeds", None))
    return read_record(entry, entries, TrainingBudget), seeds


def _groups(root: Entry, entries: Mapping[str, Entry]) -> tuple[MeasureGroup, ...]:
    """The groups of measures: each text, the tasks, the cost."""
    groups: list[MeasureGroup] = []
    if "texts" in entries:
        groups += [_group(e, TextMeasure) for e in entries["texts"].items()]
    if "tasks" in entries:
        groups.append(_task_group(entries["tasks"]))
    if "cost" in entries:
        groups.append(_group(entries["cost"], CostMeasure))
    if not groups:
        root.fail("nothing is measured: give texts, tasks or cost")
    return tuple(groups)


def _group(entry: Entry, kind: Any) -> MeasureGroup:
    entries = entry.mapping({*field_names(kind), "seeds"})
    seeds = _seeds(entries.pop("seeds", None))
    return MeasureGroup((read_record(entry, entries, kind),), seeds)


def _task_group(entry: Entry) -> MeasureGroup:
    """Several tasks, listed as `names`, with the same settings."""
    entries = entry.mapping({"names", "seeds", *field_names(TaskMeasure)} - {"task"})
    if "names" not in entries:
        entry.fail("'tasks' needs 'names', the tasks to run")
    tasks = [_task(e) for e in entries.pop("names").items()]
    seeds = _seeds(entries.pop("seeds", None))
    settings = read_fields(entries, TaskMeasure)
    return MeasureGroup(tuple(TaskMeasure(task, **settings) for task in tasks), seeds)


def _task(entry: Entry) -> str:
    task: str = read(entry, str)
    if task not in TASKS:
        entry.fail(unknown("task", task, TASKS))
    return task
