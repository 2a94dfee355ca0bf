"""Presets: a whole table as one YAML file of data, read with the line of everything that is wrong in it.

The package's own lie in `probeprune/presets`; a user's grid is a file like them. Nothing here runs anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from probeprune.calibration.gradients import Gradients
from probeprune.data.windows import Text
from probeprune.errors import UsageError, unknown
from probeprune.evaluation.task_data import TASKS
from probeprune.experiment.cells import (
    Cell,
    CostMeasure,
    Measure,
    Subject,
    TaskMeasure,
    TextMeasure,
    TrainingBudget,
    grid,
    scaled_budget,
    subject,
)
from probeprune.methods import Method, get_method
from probeprune.model.loading import source_fingerprint
from probeprune.strategies.probe import Probe

FOLDER = Path(__file__).parent / "preset_files"
PUBLISHED = FOLDER / "published.yaml"


@dataclass(frozen=True)
class Part:
    """Some measures, and with which seeds they are taken (None: all of the preset's)."""

    measures: tuple[Measure, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Preset:
    """A table: every model by every method at every ratio with every seed, on every measure."""

    description: str
    models: tuple[str, ...]
    methods: tuple[Method, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    calibration: Text
    parts: tuple[Part, ...]
    budget: TrainingBudget | None = None
    training_seeds: tuple[int, ...] | None = None
    """Seeds with which methods are trained (None: all)."""

    def cells(self, dtype: str, device: str) -> list[Cell]:
        """All of it, seed after seed: what is done early is a whole table already.

        Subjects with training come last of their seed, since training takes the place of the dense model.
        """
        cells: list[Cell] = []
        for model in self.models:
            weights = source_fingerprint(model)
            for seed in self.seeds:
                for method in sorted(self.methods, key=lambda m: m.training != "none"):
                    for ratio in self.ratios:
                        own = subject(
                            model,
                            method,
                            ratio,
                            seed=seed,
                            calibration=self.calibration,
                            budget=self.budget,
                            dtype=dtype,
                            device=device,
                            weights=weights,
                        )
                        cells += grid([own], self._measures(own, seed))
        return list(dict.fromkeys(cells))

    def _measures(self, own: Subject, seed: int) -> list[Measure]:
        trains = own.method.training != "none"
        if trains and not _among(seed, self.training_seeds):
            return []
        # What has no seed (the dense model) belongs to whichever seeds a part names.
        found = [m for p in self.parts if _among(seed, p.seeds) or not own.seed_matters for m in p.measures]
        # A trained model costs what its widths cost: measured on the same cut without training.
        return [m for m in found if not (trains and isinstance(m, CostMeasure))]


def _among(seed: int, seeds: Sequence[int] | None) -> bool:
    return seeds is None or seed in seeds


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(f.stem for f in FOLDER.glob("*.yaml") if f != PUBLISHED)


def published() -> dict[tuple[str, str, float], dict[str, float]]:
    """Published figures by (model, method, ratio): `perplexity`, and `accuracy` in percent."""
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for model, rows in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        for method, ratio, perplexity, accuracy in rows:
            figures = {"perplexity": perplexity, "accuracy": accuracy}
            found[model, method, float(ratio)] = {k: v for k, v in figures.items() if v is not None}
    return found


def preset_file(name: str) -> Path:
    """Where a preset is. Raises `UsageError` for an unknown name or a missing file."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"there is no preset file '{name}'.")
        return path
    if name not in preset_names():
        raise UsageError(f"{unknown('preset', name, preset_names()).rstrip('.')}, or a .yaml file of yours.")
    return FOLDER / f"{name}.yaml"


def load_preset(name: str) -> Preset:
    """A preset by its name, or from a YAML file.

    Raises `UsageError` for an unknown name, and for anything wrong in the file, with its line.
    """
    path = preset_file(name)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of " if mark else ""
        raise UsageError(f"{where}{path} is not YAML: {getattr(error, 'problem', error)}.") from error
    reader = _Reader(path)
    if root is None:
        raise UsageError(f"{path} is empty; `probeprune table --preset laptop` shows what a preset does.")
    return reader.preset(root)


class _Reader:
    """Reads one preset file; every error names its line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def preset(self, root: yaml.Node) -> Preset:
        parts = self.mapping(root, _KEYS)
        for key in ("models", "methods", "ratios"):
            if key not in parts:
                self.fail(root, f"there is no '{key}'")
        read: dict[str, Any] = {
            "description": self.value(parts["description"], str) if "description" in parts else "",
            "models": tuple(self.values(parts["models"], str)),
            "methods": tuple(self.method(n) for n in self.items(parts["methods"])),
            "ratios": tuple(self.ratio(n) for n in self.items(parts["ratios"])),
            "seeds": tuple(self.values(parts["seeds"], int)) if "seeds" in parts else (0,),
            "calibration": self.text(parts["calibration"]) if "calibration" in parts else Text("c4", 128),
        }
        measured = [
            p for key in ("texts", "tasks", "cost") if key in parts for p in self.part(key, parts[key])
        ]
        if not measured:
            self.fail(root, "nothing is measured: give texts, tasks or cost")
        budget, training_seeds = self.budget(parts["training"]) if "training" in parts else (None, None)
        trains = [m.name for m in read["methods"] if m.training != "none"]
        if trains and budget is None:
            self.fail(
                parts["methods"], f"{', '.join(trains)} train: add 'training' with steps and batch_size"
            )
        return Preset(**read, parts=tuple(measured), budget=budget, training_seeds=training_seeds)

    # -- parts ---------------------------------------------------------------------------------

    def method(self, node: yaml.Node) -> Method:
        if isinstance(node, yaml.ScalarNode):
            return self.checked(node, lambda: get_method(node.value))
        known = {f.name for f in fields(Method)} | {"base"}
        parts = self.mapping(node, known)
        if "base" not in parts:
            self.fail(node, "a method of your own needs 'base', the method it starts from")
        base = self.checked(parts["base"], lambda: get_method(self.value(parts["base"], str)))
        changes: dict[str, Any] = {}
        for key, part in parts.items():
            if key in ("probe", "gradients"):
                kind: Any = Probe if key == "probe" else Gradients
                inner = self.mapping(part, {f.name for f in fields(kind)})
                values = {k: self.value(v) for k, v in inner.items()}
                own = getattr(base, key)
                changes[key] = self.built(part, own or kind(), values)
            elif key != "base":
                value = self.value(part)
                changes[key] = tuple(value) if isinstance(value, list) else value
        if "name" not in changes:
            self.fail(node, "a method of your own needs a 'name'")
        return self.built(node, base, changes)

    def ratio(self, node: yaml.Node) -> float:
        ratio = self.value(node, float)
        if not 0 < ratio < 1:
            self.fail(node, f"ratio {ratio:g} is outside (0, 1)")
        return ratio

    def text(self, node: yaml.Node) -> Text:
        values = self.record(node, Text)
        return self.checked(node, lambda: Text(**{"corpus": "c4", "windows": 128, **values}))

    def budget(self, node: yaml.Node) -> tuple[TrainingBudget, tuple[int, ...] | None]:
        parts = self.mapping(
            node, {"steps", "batch_size", "length", "learning_rate", "corpus", "packing", "seeds"}
        )
        seeds = tuple(self.values(parts.pop("seeds"), int)) if "seeds" in parts else None
        values = {k: self.value(v) for k, v in parts.items()}
        defaults = {"steps": 600, "batch_size": 64, "length": 256, "learning_rate": 1e-4}
        return self.checked(node, lambda: scaled_budget(**{**defaults, **values})), seeds

    def part(self, key: str, node: yaml.Node) -> list[Part]:
        if key == "texts":
            return [self.measured(n, TextMeasure) for n in self.items(node)]
        if key == "cost":
            return [self.measured(node, CostMeasure)]
        parts = self.mapping(node, {"names", "seeds", *(f.name for f in fields(TaskMeasure))} - {"task"})
        names = self.items(parts.pop("names")) if "names" in parts else []
        if not names:
            self.fail(node, "'tasks' needs 'names', the tasks to run")
        for n in names:
            if self.value(n, str) not in TASKS:
                self.fail(n, unknown("task", self.value(n, str), TASKS).rstrip("."))
        seeds = tuple(self.values(parts.pop("seeds"), int)) if "seeds" in parts else None
        values = {k: self.value(v) for k, v in parts.items()}
        base = self.checked(node, lambda: TaskMeasure(task="", **values))
        return [Part(tuple(replace(base, task=n.value) for n in names), seeds)]

    def measured(self, node: yaml.Node, kind: Any) -> Part:
        parts = self.mapping(node, {f.name for f in fields(kind)} | {"seeds"})
        seeds = tuple(self.values(parts.pop("seeds"), int)) if "seeds" in parts else None
        values = {k: self.value(v) for k, v in parts.items()}
        return Part((self.checked(node, lambda: kind(**values)),), seeds)

    # -- nodes ---------------------------------------------------------------------------------

    def mapping(self, node: yaml.Node, known: Any) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, "expected 'key: value' pairs")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.value not in known:
                self.fail(key, unknown("key", key.value, known).rstrip("."))
            if key.value in found:
                self.fail(key, f"key '{key.value}' comes twice")
            found[key.value] = value
        return found

    def record(self, node: yaml.Node, kind: Any) -> dict[str, Any]:
        return {k: self.value(v) for k, v in self.mapping(node, {f.name for f in fields(kind)}).items()}

    def items(self, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, "expected a list with at least one entry")
        return list(node.value)

    def values(self, node: yaml.Node, kind: type) -> list[Any]:
        return [self.value(n, kind) for n in self.items(node)]

    def value(self, node: yaml.Node, kind: type | None = None) -> Any:
        loader = yaml.SafeLoader("")
        try:
            value = loader.construct_object(node, deep=True)
        finally:
            loader.dispose()
        if kind is float and isinstance(value, int):
            value = float(value)
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.fail(node, f"expected {_WORDS[kind]}, not {value!r}")
        return value

    def built(self, node: yaml.Node, base: Any, changes: dict[str, Any]) -> Any:
        return self.checked(node, lambda: replace(base, **changes))

    def checked(self, node: yaml.Node, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UsageError as error:
            self.fail(node, str(error).rstrip("."))
        except (TypeError, ValueError) as error:
            self.fail(node, f"a value is of the wrong kind ({error})")

    def fail(self, node: yaml.Node, what: str) -> NoReturn:
        raise UsageError(f"line {node.start_mark.line + 1} of {self.path}: {what}.")


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
_WORDS = {str: "text", int: "a whole number", float: "a number"}
