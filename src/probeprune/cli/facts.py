"""What the commands must know of a method beyond its name: asked here and nowhere else in this folder."""

import dataclasses

from probeprune.errors import UsageError
from probeprune.methods import Method, compose
from probeprune.strategies.compensation import Refit


def is_dense(method: Method) -> bool:
    """Whether the method prunes nothing."""
    return method.when == "never"


def moment(method: Method) -> str:
    """When the method prunes: never, once, or at every batch."""
    return "every batch" if method.when == "batch" else method.when


def takes_gradients(method: Method) -> bool:
    """Whether the method must be calibrated with gradients."""
    return method.needs_gradients


def with_compensation(method: Method, compensation: str) -> Method:
    """The method with another compensation; least squares keeps the method's own refit where it has one."""
    refit = (method.refit or Refit()) if compensation == "least-squares" else None
    return compose(method, name=method.name, compensation=compensation, refit=refit)


def with_refresh(method: Method, tokens: int) -> Method:
    """A probing method that chooses MLP channels again after every `tokens` new tokens; 0 changes nothing.

    Raises `UsageError` for a method without a probe.
    """
    if not tokens:
        return method
    if method.probe is None:
        raise UsageError(f"--refresh is for methods that probe; {method.name!r} chooses its units once.")
    return compose(method, name=method.name, probe=dataclasses.replace(method.probe, refresh=tokens))
