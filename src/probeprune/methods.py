"""The methods, as data: one row each, composed of named strategies.

To add a method, add a row here, or make a `Method` of your own; no class is needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from probeprune import records
from probeprune.errors import BadValue, UsageError, unknown
from probeprune.files import check_file_name
from probeprune.model.blocks import UnitKind
from probeprune.model.described import Layout
from probeprune.model.experts import EXPERT_UNITS, ExpertUnit
from probeprune.ranges import check_fields
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import COMPENSATIONS, Compensation, Refit
from probeprune.strategies.criteria import CRITERIA, Gradients
from probeprune.strategies.expert_importance import EXPERT_IMPORTANCES, scores_channels
from probeprune.strategies.gates import Gates
from probeprune.strategies.importance import IMPORTANCES
from probeprune.strategies.probe import Pays, Probe
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.refit_every_batch import RefitEveryBatch
from probeprune.strategies.schedule import Distilled, DuringTraining, EveryBatch, Never, Once, When
from probeprune.strategies.widths import KINDS

Budget = Literal["parameters", "flops", "time"]
"""What a ratio is a share of."""

SCHEDULES: dict[str, When] = {
    w.kind: w for w in (Never(), Once(), Distilled(), DuringTraining(), ProbeEveryBatch(), RefitEveryBatch())
}
"""When a method prunes, by name, with default settings."""

TABLES: Mapping[type, Mapping[str, Any]] = {When: SCHEDULES, Compensation: COMPENSATIONS}
"""The tables that fields of a method take their records from, by the declared type of the field."""


@dataclass(frozen=True)
class Method:
    """A pruning method: an order and a cut for every block, and when they are made.

    Raises `UsageError` for an unknown strategy or a combination that cannot work.
    """

    name: str
    """Names files too, such as those of trained models: no slashes, no dot in front."""
    importance: str = "ppsp"
    """A key of `IMPORTANCES`."""
    allocation: str = "uniform"
    """A key of `ALLOCATIONS`."""
    compensation: Compensation = COMPENSATIONS["none"]
    """How the loss of units is made up for."""
    when: When = SCHEDULES["once"]
    """When units are cut, and whether the model is trained."""
    gradients: Gradients | None = None
    """Settings of the gradients for an importance that reads them; None for its published ones."""
    gates: Gates | None = None
    """Settings of the training for importance `gates`; None for the default ones."""
    blocks: tuple[Literal["attention", "mlp", "experts"], ...] = ("attention", "mlp", "experts")
    """Which blocks are pruned; `experts` are those of a mixture of experts, without its shared ones."""
    experts: ExpertUnit = "channel"
    """The unit of experts: a `channel` of each, by this method's importance, or a whole `expert`."""
    expert_importance: str = "reap"
    """A key of `EXPERT_IMPORTANCES`, for whole experts."""
    skip_layers: int = 3
    """First layers that stay dense (Probe Pruning, section 5)."""
    round_to: int = 1
    """Widths of MLPs and experts are multiples of this (64 in the research code, for speed)."""
    budget: Budget = "parameters"
    """The quantity, summed over all blocks, that the ratio is a share of: parameters, FLOPs on a calibration
    window, or the `time` of a forward pass, measured on the machine that calibrates. Only allocations by
    damage take a budget other than parameters."""
    unit_kind: UnitKind = "group"
    """The attention unit under grouped-query attention (compared in docs/choices.md)."""
    seed: int = 0
    """Seed for importances that draw random numbers."""
    source: str = ""
    """Where the method was published."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_file_name("name", self.name)
        for what, name, table in (
            ("importance", self.importance, IMPORTANCES),
            ("allocation", self.allocation, ALLOCATIONS),
            ("budget", self.budget, get_args(Budget)),
            ("unit_kind", self.unit_kind, get_args(UnitKind)),
            ("experts", self.experts, EXPERT_UNITS),
            ("expert_importance", self.expert_importance, EXPERT_IMPORTANCES),
        ):
            if name not in table:
                raise BadValue(what, unknown(what.replace("_", " "), name, table))
        if not isinstance(self.compensation, Compensation):
            raise UsageError(f"a compensation is a record such as Refit(), not {self.compensation!r}.")
        if not isinstance(self.when, When):
            raise UsageError(f"a schedule is a record such as Once(), not {self.when!r}.")
        for broken, sentence in _RULES:
            if broken(self):
                raise UsageError(sentence.format(self))

    @property
    def refit(self) -> Refit | None:
        """Settings of the refit; None for a method without one."""
        return self.compensation if isinstance(self.compensation, Refit) else None

    @property
    def ordered_by_refit(self) -> bool:
        """Whether units are ordered by the refit, not by scores."""
        return IMPORTANCES[self.importance].ordered_by_refit

    @property
    def gradient_settings(self) -> Gradients:
        """Settings of the gradients that its importance, or the start of its gates, reads. Raises `KeyError`
        where it reads none."""
        return self.gradients or CRITERIA[str(IMPORTANCES[self.start.importance].criterion)].gradients

    @property
    def gate_settings(self) -> Gates | None:
        """Settings of the gates that its importance trains; None where it trains none."""
        return (self.gates or Gates()) if IMPORTANCES[self.importance].learned else None

    @property
    def start(self) -> "Method":
        """The method whose scores its gates start from; itself where it trains none."""
        if self.gate_settings is None:
            return self
        start = self.gate_settings.start
        return replace(self, importance=start, gates=None, compensation=COMPENSATIONS["none"], when=Once())

    @property
    def experts_stay(self) -> str | None:
        """Why experts stay whole, to follow "because"; None where they lose units."""
        return next((why.format(self) for stay, why in _EXPERTS_STAY if stay(self)), None)

    def record(self) -> dict[str, Any]:
        """All settings as JSON values, as written to result lines and checkpoints."""
        record: dict[str, Any] = records.to_json(self)
        return record


_EXPERTS_STAY: tuple[tuple[Callable[[Method], bool], str], ...] = (
    (lambda m: m.when.every_batch, "no batch chooses units of experts"),
    (lambda m: isinstance(m.when, DuringTraining), "pruning during training leaves experts alone"),
    (
        lambda m: m.refit is not None and m.experts == "expert",
        "a refit makes up for channels of experts, not for whole ones (experts='channel')",
    ),
    (
        lambda m: IMPORTANCES[m.importance].learned,
        "gates are trained for heads and channels of MLPs (importance {0.importance})",
    ),
    (
        lambda m: bool(ALLOCATIONS[m.allocation].needs),
        "the damage of cutting experts is not measured (allocation {0.allocation})",
    ),
    (
        lambda m: m.experts == "channel" and not scores_channels(m.importance),
        "importance {0.importance} is not defined for their channels, only for whole experts "
        "(experts='expert')",
    ),
)
"""When experts stay whole though a method prunes them: a test for it, and why, formatted with the method."""

_RULES: tuple[tuple[Callable[[Method], bool], str], ...] = (
    (
        lambda m: m.ordered_by_refit and m.refit is None,
        "importance {0.importance!r} is an order for a refit: give compensation=Refit().",
    ),
    (
        lambda m: m.ordered_by_refit and ALLOCATIONS[m.allocation].needs_scores,
        "importance {0.importance!r} has no scores for allocation {0.allocation!r} to compare.",
    ),
    (
        lambda m: m.budget != "parameters" and not ALLOCATIONS[m.allocation].needs,
        "a budget of {0.budget} needs allocation 'damage' or 'damage-even'.",
    ),
    (
        lambda m: m.allocation == "damage-even" and m.skip_layers > 0,
        "allocation 'damage-even' gives all layers one width; it needs skip_layers=0.",
    ),
    (
        lambda m: not m.blocks or not set(m.blocks) <= set(KINDS),
        f"blocks to prune must be some of {', '.join(KINDS)}.",
    ),
    (
        lambda m: m.gates is not None and not IMPORTANCES[m.importance].learned,
        "importance {0.importance!r} trains no gates; leave gates out.",
    ),
    (
        lambda m: m.gradients is not None and IMPORTANCES[m.start.importance].criterion is None,
        "importance {0.start.importance!r} takes no gradients; leave gradients out.",
    ),
    (
        lambda m: m.when.chooses and not IMPORTANCES[m.importance].from_batch,
        "importance {0.importance!r} cannot be scored from a probe; use ppsp or wanda-sp.",
    ),
    (
        lambda m: m.when.chooses and m.refit is not None,
        "a refit is made for fixed units, and a probe chooses others at every batch: use "
        "when=RefitEveryBatch(), or another compensation.",
    ),
    (
        lambda m: isinstance(m.when, RefitEveryBatch) and (m.refit is None or "mlp" not in m.blocks),
        "a refit at every batch is for MLPs and starts from a refit to calibration text: prune MLPs, and "
        "give compensation=Refit().",
    ),
    (
        lambda m: isinstance(m.when, DuringTraining) and m.importance != "lora-guided",
        "pruning during training is guided by LoRA: it needs importance 'lora-guided'.",
    ),
    (
        lambda m: not m.when.prunes and m.refit is not None,
        "the dense model loses no units: leave the refit out.",
    ),
)
"""Combinations that the types allow but that cannot work: a test for a method, and the error message, which
is formatted with the method."""


def with_lora(method: Method) -> Method:
    """The same method with LoRA: recovery after the cut, or for LoRAPrune the cut while LoRA trains."""
    during = method.importance == "lora-guided"
    when: When = DuringTraining() if during else replace(method.when, recovery=True)  # type: ignore[call-arg]
    how = "pruned while LoRA trains" if during else "then LoRA re-training"
    return replace(
        method,
        name=f"{method.name}+lora",
        when=when,
        source=f"{method.source.removesuffix(', without training')}, {how}",
    )


def with_distillation(method: Method) -> Method:
    """The same method, which prunes once, then trained towards the dense model's predictions."""
    source = f"{method.source.removesuffix(', without training')}, then distillation (LoRA)"
    return replace(method, name=f"{method.name}+distill", when=Distilled(), source=source)


def with_pays(method: str | Method, pays: Pays) -> Method:
    """The same dynamic method, probing all batches (`always`) or those for which it pays (`auto`).

    Raises `UsageError` for a method that probes no batch, and for another word.
    """
    method = get_method(method)
    when = method.when
    if not isinstance(when, EveryBatch):
        raise UsageError(f"method {method.name!r} probes no batch; choose one that prunes at every batch.")
    changed: Any = replace(when, probe=replace(when.probe, pays=pays))
    return replace(method, when=changed)


def without_training(method: Method) -> Method:
    """The same method without recovery after the cut."""
    trained = method.when == Once(recovery=True) or isinstance(method.when, Distilled)
    return replace(method, when=Once()) if trained else method


_UNTRAINED: tuple[Method, ...] = (
    Method("dense", when=Never(), source="the unpruned model"),
    Method("wanda-sp", importance="wanda-sp", source="An et al., AAAI 2024 (FLAP), after Wanda"),
    Method("flap", "flap", "global", COMPENSATIONS["bias"], source="An et al., AAAI 2024"),
    Method("probe", when=ProbeEveryBatch(), source="Probe Pruning, ICLR 2025"),
    Method(
        "full-batch",
        when=ProbeEveryBatch(Probe(tokens=1.0, samples=1.0), fusion="none"),
        source="Probe Pruning, ICLR 2025: its upper bound, at more than dense cost",
    ),
    Method("llm-pruner", importance="param_first", source="Ma et al., NeurIPS 2023, without training"),
    Method("loraprune", importance="lora-guided", source="Zhang et al., ACL 2024, without training"),
    Method(
        "probe-reuse",
        when=ProbeEveryBatch(Probe(reuse=1024)),
        source="Probe Pruning, small batches sharing a choice (this project)",
    ),
    Method(
        "best-static",
        importance="obs",
        compensation=Refit(),
        source="this project: order by elimination, refit layer by layer",
    ),
    Method(
        "best-dynamic",
        importance="obs",
        compensation=Refit(),
        when=RefitEveryBatch(),
        source="this project: best-static, the refit of its MLPs following the batch",
    ),
    Method(
        "gates",
        "gates",
        "global",
        compensation=Refit(),
        source="this project: scales of units trained by KL, then a refit",
    ),
    Method("ppsp", source="Probe Pruning's importance, ordered once"),
    Method("magnitude", importance="magnitude", source="control"),
    Method("random", importance="random", source="control"),
)

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *_UNTRAINED,
        *(with_lora(m) for m in _UNTRAINED if not m.when.every_batch),
        *(with_distillation(m) for m in _UNTRAINED if isinstance(m.when, Once)),
    )
}
"""Methods by name. Every method that prunes once also has a row with LoRA on text, and one with LoRA towards
the dense model's predictions; dense has the first, as the control."""


def check_untrained(method: Method) -> None:
    """Raise `UsageError` for a method that includes training, which cutting or attaching alone would omit."""
    if not method.when.trains:
        return
    instead = "loraprune" if isinstance(method.when, DuringTraining) else "prune and then recover"
    raise UsageError(
        f"method {method.name!r} trains the model; run it with `probeprune compare` or `table`, or {instead}."
    )


def get_method(method: str | Method) -> Method:
    """The method of that name, or the one given. Raises `UsageError` for an unknown name."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UsageError(unknown("method", method, METHODS))
    return METHODS[method]


def compose(base: str | Method, **changes: object) -> Method:
    """A method like `base` with some fields changed, named after both unless a name is given.

    A compensation or a schedule may be given by its name: `compose("wanda-sp", compensation="bias")`. Raises
    `UsageError` for unknown names and combinations that cannot work.
    """
    method = get_method(base)
    if "name" not in changes:
        parts = [f"{key}={records.label(value)}" for key, value in changes.items()]
        changes["name"] = "+".join([method.name, *parts])
    for key, what, table in (
        ("compensation", "compensation", COMPENSATIONS),
        ("when", "schedule", SCHEDULES),
    ):
        value = changes.get(key)
        if isinstance(value, str):
            if value not in table:
                raise UsageError(unknown(what, value, table))
            changes[key] = table[value]
    return replace(method, **changes)  # type: ignore[arg-type]


def with_equal_widths(method: str | Method) -> Method:
    """The same method with one width for all layers, so that a plain config can describe the checkpoint."""
    method = get_method(method)
    allocation = ALLOCATIONS[method.allocation].equal_widths
    return compose(method, name=method.name, allocation=allocation, skip_layers=0)


def with_equal_heads(method: str | Method) -> Method:
    """The same method with the same heads in all layers and a width for each MLP, as layout `nemotron-nas`
    needs."""
    method = get_method(method)
    allocation = ALLOCATIONS[method.allocation].equal_heads
    return compose(method, name=method.name, allocation=allocation, skip_layers=0)


def for_layout(method: str | Method, layout: Layout) -> Method:
    """The same method with widths that a layout of checkpoints can hold."""
    if layout == "uniform":
        return with_equal_widths(method)
    return with_equal_heads(method) if layout == "nemotron-nas" else get_method(method)


def without_measured_widths(method: Method) -> Method:
    """The same method with an allocation that needs no measurement, so that a cut can be tried out first."""
    allocation = ALLOCATIONS[method.allocation].unmeasured
    if allocation is None:
        return method
    return compose(method, name=method.name, allocation=allocation, budget="parameters")
