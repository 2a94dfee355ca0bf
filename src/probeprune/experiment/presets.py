"""Presets: a whole table described by one YAML file.

Those of the package lie in `preset_files`; a file of your own looks like them (`probeprune table --show`).
Reading a preset runs nothing; every mistake is reported with its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from probeprune.data.corpora import check_corpus
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
from probeprune.experiment.yaml_records import Entry, field_names, open_yaml, read, read_record
from probeprune.methods import TABLES, Method, get_method
from probeprune.model.fingerprint import source_fingerprint
from probeprune.ranges import check, plain
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
    """A table: every model by every method, ratio and seed, on every measure.

    Raises `UsageError` for a ratio or a seed out of range.
    """

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
    places: tuple[str, ...] = ()
    """Where each method stands, such as `line 4 of own.yaml`; empty where that is not known."""

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            check(ratio=ratio)
        for seed in self.seeds:
            check(seed=seed)

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
        if trains(subject.method) and not _includes(self.training_seeds, seed):
            return []
        # A subject that no seed changes (the dense model) is measured once, in every group.
        groups = [g for g in self.groups if _includes(g.seeds, seed) or not subject.seed_matters]
        return [m for g in groups for m in g.measures]


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
    listed = entries["methods"].items()
    methods = tuple(map(_method, listed))
    entries["methods"].different([m.name for m in methods])
    seeds = _seeds(entries.get("seeds")) or (0,)
    budget, training_seeds = _budget(entries["training"], seeds) if "training" in entries else (None, None)
    trained = [m.name for m in methods if trains(m)]
    if trained and budget is None:
        entries["methods"].fail(f"{', '.join(trained)} train: add 'training' with steps and batch_size")
    return Preset(
        description=read(entries["description"], str) if "description" in entries else "",
        models=_models(entries["models"]),
        methods=methods,
        ratios=_ratios(entries["ratios"]),
        seeds=seeds,
        calibration=_calibration(entries["calibration"]) if "calibration" in entries else CALIBRATION,
        groups=_groups(root, entries, seeds),
        budget=budget,
        training_seeds=training_seeds,
        places=tuple(e.place for e in listed),
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
        return _named(entry)
    entries = entry.mapping({"base", *field_names(Method)})
    if "base" not in entries:
        entry.fail("a method of your own needs 'base', the method it starts from")
    if "name" not in entries:
        entry.fail("a method of your own needs a 'name'")
    base = _named(entries.pop("base"))
    gradients = entries.pop("gradients", None)
    method = read_record(entry, entries, Method, TABLES, base)
    if gradients is None:
        return method
    if IMPORTANCES[method.start.importance].criterion is not None:
        method = replace(method, gradients=method.gradient_settings)
    return read_record(entry, {"gradients": gradients}, Method, TABLES, method)


def _named(entry: Entry) -> Method:
    name = read(entry, str)
    return entry.checked(lambda: get_method(name))


def _models(entry: Entry) -> tuple[str, ...]:
    models: tuple[str, ...] = read(entry, tuple[str, ...])
    for item, model in zip(entry.items(), models, strict=True):
        if not model.strip():
            item.fail("a model needs a name")
    entry.different(models)
    return models


def _number(entry: Entry, name: str, kind: type) -> Any:
    """A number in the range of that name."""
    value = read(entry, kind)
    return entry.checked(lambda: plain(name, value))


def _ratios(entry: Entry) -> tuple[float, ...]:
    ratios = []
    for item in entry.items():
        ratios.append(_number(item, "ratio", float))
        if not ratios[-1]:
            item.fail("ratio 0 prunes nothing; use the method dense")
    entry.different(ratios)
    return tuple(ratios)


def _seeds(entry: Entry | None, known: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """The seeds in a file; None where it names none. Fails for one that is none of the `known`, if given."""
    if entry is None:
        return None
    seeds = []
    for item in entry.items():
        seeds.append(_number(item, "seed", int))
        if known is not None and seeds[-1] not in known:
            item.fail(f"{seeds[-1]} is none of the preset's seeds, {', '.join(map(str, known))}")
    entry.different(seeds)
    return tuple(seeds)


def _calibration(entry: Entry) -> Text:
    text: Text = read(entry, Text, base=CALIBRATION)
    entries = entry.mapping(field_names(Text))
    _check_corpus(entries)
    for corpus in entries["beside"].items() if "beside" in entries else ():
        _check_corpus({"corpus": corpus})
    if "windows" in entries:
        entries["windows"].checked(lambda: check(windows=text.windows))
    return text


def _check_corpus(entries: Mapping[str, Entry]) -> None:
    """Fail at the corpus, where one is named, that there cannot be."""
    if "corpus" in entries:
        corpus = read(entries["corpus"], str)
        entries["corpus"].checked(lambda: check_corpus(corpus))


def _budget(entry: Entry, known: Sequence[int]) -> tuple[TrainingBudget, tuple[int, ...] | None]:
    """The training budget, and the seeds, some of the `known`, that methods are trained with."""
    entries = entry.mapping({*field_names(TrainingBudget), "seeds"})
    seeds = _seeds(entries.pop("seeds", None), known)
    _check_corpus(entries)
    return read_record(entry, entries, TrainingBudget), seeds


def _groups(root: Entry, entries: Mapping[str, Entry], known: Sequence[int]) -> tuple[MeasureGroup, ...]:
    """The groups of measures: each text, the tasks, the cost; `known` are the preset's seeds."""
    groups: list[MeasureGroup] = []
    if "texts" in entries:
        groups += [_group(e, TextMeasure, known) for e in entries["texts"].items()]
    if "tasks" in entries:
        groups.append(_task_group(entries["tasks"], known))
    if "cost" in entries:
        groups.append(_group(entries["cost"], CostMeasure, known))
    if not groups:
        root.fail("nothing is measured: give texts, tasks or cost")
    return tuple(groups)


def _group(entry: Entry, kind: Any, known: Sequence[int]) -> MeasureGroup:
    entries = entry.mapping({*field_names(kind), "seeds"})
    seeds = _seeds(entries.pop("seeds", None), known)
    _check_corpus(entries)
    return MeasureGroup((read_record(entry, entries, kind),), seeds)


def _task_group(entry: Entry, known: Sequence[int]) -> MeasureGroup:
    """Several tasks, listed as `names`, with the same settings."""
    entries = entry.mapping({"names", "seeds", *field_names(TaskMeasure)} - {"task"})
    if "names" not in entries:
        entry.fail("'tasks' needs 'names', the tasks to run")
    tasks = [_task(e) for e in entries["names"].items()]
    entries.pop("names").different(tasks)
    seeds = _seeds(entries.pop("seeds", None), known)
    first = read_record(entry, entries, TaskMeasure, base=TaskMeasure(tasks[0]))
    return MeasureGroup(tuple(replace(first, task=task) for task in tasks), seeds)


def _task(entry: Entry) -> str:
    task: str = read(entry, str)
    if task not in TASKS:
        entry.fail(unknown("task", task, TASKS))
    return task
