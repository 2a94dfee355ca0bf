"""The methods, as data: one row each, composed of named strategies.

A new method is a row here or a `Method` of the caller's own; no class is needed.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from probeprune.calibration.gradients import Gradients
from probeprune.errors import UsageError, unknown
from probeprune.model.blocks import UnitKind
from probeprune.strategies.allocation import ALLOCATIONS, KINDS
from probeprune.strategies.compensation import Refit
from probeprune.strategies.importance import IMPORTANCES
from probeprune.strategies.probe import Probe

Compensation = Literal["none", "bias", "least-squares"]
"""What makes up for the lost units: nothing, FLAP's bias, or a refit of the consumers."""

Budget = Literal["parameters", "flops", "time"]
"""What a ratio is a share of."""


@dataclass(frozen=True)
class Method:
    """A pruning method: an order and a cut for every block, and when they are made.

    Raises `UsageError` for an unknown strategy or a combination that cannot work.
    """

    name: str
    importance: str = "ppsp"
    """A key of `IMPORTANCES`."""
    allocation: Literal["uniform", "even", "nominal", "nominal-kept", "global", "damage", "damage-even"] = (
        "uniform"
    )
    """`uniform`: the same share from every block, MLPs making up what whole heads cannot hit; `even`:
    likewise, one width for all layers; `nominal`: the research code's rounding of each block on its own;
    `nominal-kept`: LLM-Pruner's; `global`: FLAP's one threshold over all blocks; `damage`: the widths that
    cost least by the measured damage of every block, `damage-even` one width for all layers."""
    compensation: Compensation = "none"
    when: Literal["never", "once", "batch"] = "once"
    """`once` after calibration, or again at every `batch`: the units are chosen anew, or for importance `obs`
    the consumers of MLPs refitted anew."""
    probe: Probe | None = None
    """How a batch is probed; only and always with `when="batch"`."""
    gradients: Gradients | None = None
    """Whose gradients are taken; only and always for importances that need them."""
    refit: Refit | None = None
    """How consumers are refitted; only and always with `compensation="least-squares"`."""
    blocks: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """Which blocks are pruned."""
    skip_layers: int = 3
    """First layers that stay dense (Probe Pruning, section 5)."""
    round_to: int = 1
    """MLP widths are multiples of this (64 in the research code, for speed)."""
    budget: Budget = "parameters"
    """What of all blocks the ratio is a share of: parameters, FLOPs on a calibration window, or `time` of a
    forward pass, measured where it runs. Other than parameters under allocation by damage only."""
    units: UnitKind = "group"
    """What an attention unit is under grouped-query attention (measured in docs/choices.md)."""
    seed: int = 0
    """For importances that draw numbers."""
    training: Literal["none", "after", "during"] = "none"
    """Whether the model is trained: after pruning (recovery), or `during` (LoRAPrune's own schedule)."""
    source: str = ""
    """Where the method was published."""

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCES:
            raise UsageError(unknown("importance", self.importance, IMPORTANCES))
        if self.allocation not in ALLOCATIONS:
            raise UsageError(unknown("allocation", self.allocation, ALLOCATIONS))
        if self.compensation not in get_args(Compensation):
            raise UsageError(unknown("compensation", self.compensation, get_args(Compensation)))
        if (self.compensation == "least-squares") != (self.refit is not None):
            raise UsageError(
                "compensation 'least-squares' and a refit go together: give both, as in refit=Refit()."
            )
        if self.refit_orders:
            if self.refit is None:
                raise UsageError(
                    f"importance {self.importance!r} is an order for a refit: give refit=Refit()."
                )
            if self.allocation == "global":
                raise UsageError(f"importance {self.importance!r} has no scores to set a threshold on.")
        if self.budget not in get_args(Budget):
            raise UsageError(unknown("budget", self.budget, get_args(Budget)))
        if self.budget != "parameters" and not self.needs_damages:
            raise UsageError(f"a budget of {self.budget} needs allocation 'damage' or 'damage-even'.")
        if self.allocation == "damage-even" and self.skip_layers:
            raise UsageError("allocation 'damage-even' gives all layers one width; it needs skip_layers=0.")
        if self.refit is not None and (
            self.when == "never" or (self.when == "batch" and not self.refit_orders)
        ):
            raise UsageError(
                "a least-squares refit is for methods that prune once, or for importance 'obs', whose refit "
                "can follow the batch; use another compensation."
            )
        if self.when not in ("never", "once", "batch"):
            raise UsageError(unknown("moment of pruning", self.when, ("never", "once", "batch")))
        if self.skip_layers < 0 or self.round_to < 1:
            raise UsageError("skip_layers must be at least 0 and round_to at least 1.")
        if (self.when == "batch") != (self.probe is not None):
            raise UsageError("a method has a probe if and only if it prunes at every batch.")
        if self.when == "batch" and IMPORTANCES[self.importance].needs not in ("energy", "refit"):
            raise UsageError(
                f"importance {self.importance!r} cannot be scored from a probe; use ppsp, wanda-sp or obs."
            )
        if (
            self.refit_orders
            and self.probe is not None
            and (self.probe.fusion != "none" or self.probe.refresh)
        ):
            raise UsageError(
                f"importance {self.importance!r} scores no batch, so it has nothing to fuse or to refresh: "
                "give its probe fusion='none' and refresh=0."
            )
        if self.refit_orders and self.when == "batch" and "mlp" not in self.blocks:
            raise UsageError(
                f"importance {self.importance!r} follows the batch in MLPs alone: prune them too."
            )
        if (IMPORTANCES[self.importance].needs == "gradients") != (self.gradients is not None):
            raise UsageError("a method has gradients if and only if its importance needs them.")
        if not self.blocks or not set(self.blocks) <= set(KINDS):
            raise UsageError(f"blocks to prune must be some of {', '.join(KINDS)}.")
        if self.training not in ("none", "after", "during"):
            raise UsageError(unknown("moment of training", self.training, ("none", "after", "during")))
        if self.training != "none" and self.when == "batch":
            raise UsageError("a method that prunes at every batch leaves no pruned model to train.")
        if self.training == "during" and self.importance != "lora-guided":
            raise UsageError("pruning during training is guided by LoRA: it needs importance 'lora-guided'.")

    def record(self) -> dict[str, Any]:
        """All its parameters as JSON has them: what result lines and checkpoints keep."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    @property
    def refit_orders(self) -> bool:
        """Whether units are ordered by the refit, not by scores."""
        return IMPORTANCES[self.importance].needs == "refit"

    @property
    def needs_gradients(self) -> bool:
        """Whether it needs `Statistics.saliences`."""
        return self.when != "never" and self.training != "during" and self.gradients is not None

    @property
    def needs_moments(self) -> bool:
        """Whether it needs `Statistics.moments`."""
        if self.when == "never":
            return False
        history = self.probe is not None and self.probe.fusion != "none"
        needs = IMPORTANCES[self.importance].needs in ("energy", "variance")
        static = needs and (self.when == "once" or self.allocation == "global")
        return history or static or self.compensation == "bias"

    @property
    def needs_calibration(self) -> bool:
        """Whether `attach` and `prune` must be given calibration statistics."""
        return self.needs_moments or self.needs_gradients or self.needs_refit or self.needs_damages

    @property
    def needs_damages(self) -> bool:
        """Whether it needs `Statistics.damages`."""
        return self.allocation in ("damage", "damage-even")

    @property
    def needs_refit(self) -> bool:
        """Whether it needs `Statistics.consumers`."""
        return self.refit is not None and self.training != "during"


def with_lora(method: Method) -> Method:
    """That method and LoRA: recovery after the cut, or for LoRAPrune the cut while LoRA trains."""
    during = method.importance == "lora-guided"
    how = "pruned while LoRA trains" if during else "then LoRA re-training"
    return replace(
        method,
        name=f"{method.name}+lora",
        training="during" if during else "after",
        source=f"{method.source.removesuffix(', without training')}, {how}",
    )


_UNTRAINED: tuple[Method, ...] = (
    Method("dense", when="never", source="the unpruned model"),
    Method("wanda-sp", importance="wanda-sp", source="An et al., AAAI 2024 (FLAP), after Wanda"),
    Method("flap", "flap", "global", "bias", source="An et al., AAAI 2024"),
    Method("probe", when="batch", probe=Probe(), source="Probe Pruning, ICLR 2025"),
    Method(
        "full-batch",
        when="batch",
        probe=Probe(tokens=1.0, samples=1.0, fusion="none"),
        source="Probe Pruning, ICLR 2025: its upper bound, at more than dense cost",
    ),
    Method(
        "llm-pruner",
        importance="param_first",
        gradients=Gradients(windows=10, length=64),
        source="Ma et al., NeurIPS 2023, without training",
    ),
    Method(
        "loraprune",
        importance="lora-guided",
        gradients=Gradients(windows=10, length=512),
        source="Zhang et al., ACL 2024, without training",
    ),
    Method(
        "probe-reuse",
        when="batch",
        probe=Probe(reuse=1024),
        source="Probe Pruning, small batches sharing a choice (this project)",
    ),
    Method(
        "best-static",
        importance="obs",
        compensation="least-squares",
        refit=Refit(),
        source="this project: order by elimination, refit layer by layer",
    ),
    Method(
        "best-dynamic",
        importance="obs",
        compensation="least-squares",
        when="batch",
        probe=Probe(tokens=1 / 64, samples=1.0, min_size=128, pick="even", fusion="none"),
        refit=Refit(),
        source="this project: best-static, the refit of its MLPs following the batch",
    ),
    Method("ppsp", source="Probe Pruning's importance, ordered once"),
    Method("magnitude", importance="magnitude", source="control"),
    Method("random", importance="random", source="control"),
)

METHODS: dict[str, Method] = {
    m.name: m for m in (*_UNTRAINED, *(with_lora(m) for m in _UNTRAINED if m.when != "batch"))
}
"""By name; every method that prunes once, and dense as the control, also with LoRA."""


def refit_of(method: Method) -> Method:
    """A method whose refits serve `method` and all that differ from it in no more than when they prune: where
    the refit chooses the units, with what following the batch takes."""
    return replace(
        method,
        name="refit",
        source="",
        training="none",
        when="batch" if method.refit_orders else "once",
        probe=Probe(fusion="none") if method.refit_orders else None,
    )


def check_untrained(method: Method) -> None:
    """Raise `UsageError` for a method that trains: it cannot be had by cutting or attaching alone."""
    if method.training == "none":
        return
    instead = "loraprune" if method.training == "during" else "prune and then recover"
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
    """A method like `base` with some fields changed, named after both unless a name is given."""
    method = get_method(base)
    if "name" not in changes:
        parts = [f"{key}={value}" for key, value in changes.items()]
        changes["name"] = "+".join([method.name, *parts])
    return replace(method, **changes)  # type: ignore[arg-type]


def with_equal_widths(method: str | Method) -> Method:
    """That method with one width for all layers, so that a checkpoint needs no more than a plain config."""
    method = get_method(method)
    allocation = "damage-even" if method.needs_damages else "even"
    return compose(method, name=method.name, allocation=allocation, skip_layers=0)


def without_measured_widths(method: Method) -> Method:
    """That method with widths that follow from the ratio alone, for one whose widths follow from damages: to
    try a cut before they are measured."""
    if not method.needs_damages:
        return method
    allocation = "even" if method.allocation == "damage-even" else "uniform"
    return compose(method, name=method.name, allocation=allocation, budget="parameters")
