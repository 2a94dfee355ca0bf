"""What the commands must know of a method beyond its name: asked here and nowhere else in this folder."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from probeprune.cli.values import one_of
from probeprune.errors import UsageError
from probeprune.methods import Method, compose, with_pays
from probeprune.plan import needs
from probeprune.result_lines import Line
from probeprune.strategies.allocation import missed_ratio
from probeprune.strategies.compensation import Refit
from probeprune.strategies.probe import Pays
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.schedule import EveryBatch, Never


def is_dense(method: Method) -> bool:
    """Whether the method prunes nothing."""
    return isinstance(method.when, Never)


def moment(method: Method) -> str:
    """When the method prunes: never, once, during training, or at every batch."""
    return "every batch" if method.when.every_batch else method.when.kind


def takes_gradients(method: Method) -> bool:
    """Whether the method must be calibrated with gradients."""
    return not needs(method).isdisjoint({"saliences", "gates"})


def missed(name: str, method: Mapping[str, Any], ratio: float, removed: float) -> str | None:
    """A sentence about a method that removed much more or less than was asked for; None where it did not.

    Args:
        name: how to call the method and the ratio.
        method: its record; a budget other than parameters is met in another quantity, and is not compared.
        ratio, removed: shares of the parameters of all blocks, asked for and removed.
    """
    sentence = missed_ratio(ratio, removed) if method.get("budget", "parameters") == "parameters" else None
    return sentence and f"{name}: {sentence}"


def missed_in(rows: Iterable[Line]) -> list[str]:
    """Such sentences about the methods and ratios in result rows, each once."""
    said = dict.fromkeys(
        missed(f"{row['name']} {row['ratio']:.0%}", row["method"], row["ratio"], row["removed_share"])
        for row in rows
        if row["kind"] == "result" and "removed_share" in row
    )
    return [sentence for sentence in said if sentence]


def with_compensation(method: Method, compensation: str) -> Method:
    """The method with another compensation; least squares keeps the method's own refit where it has one."""
    if compensation == Refit.kind and method.refit is not None:
        return method
    return compose(method, name=method.name, compensation=compensation)


def with_refresh(method: Method, tokens: int) -> Method:
    """A probing method that chooses MLP channels again after every `tokens` new tokens; 0 changes nothing.

    Raises `UsageError` for a method that does not choose units by a probe.
    """
    if not tokens:
        return method
    if not isinstance(method.when, ProbeEveryBatch):
        raise UsageError(f"--refresh is for methods that probe; {method.name!r} chooses its units once.")
    return compose(method, name=method.name, when=replace(method.when, refresh=tokens))


def with_rule(method: Method, pays: str | None, *, alone: bool = False) -> Method:
    """A dynamic method that probes all batches (`always`) or those for which it pays (`auto`); None leaves it
    as it is, and so do methods that probe nothing.

    Its name says so where that is not the method's own rule. Raises `UsageError` for another word, and with
    `alone` for a method that probes nothing.
    """
    if pays is None:
        return method
    one_of("rule for --pays", pays, get_args(Pays))
    if not isinstance(method.when, EveryBatch):
        if alone:
            raise UsageError(f"--pays is for methods that probe batches; {method.name!r} probes none.")
        return method
    if method.when.probe.pays == pays:
        return method
    return compose(with_pays(method, cast(Pays, pays)), name=f"{method.name}+pays={pays}")


def refuse_beside_kept(model: str, options: Mapping[str, object]) -> None:
    """Raise `UsageError` for options (by name, None where not given) that would change the method that is
    kept with a model."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"'{model}' keeps a method of its own; leave out {' and '.join(given)}, or give the dense model."
        )
