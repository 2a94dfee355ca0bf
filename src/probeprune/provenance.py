"""What a result depends on besides its settings."""

import importlib.metadata


def versions(*more: str) -> dict[str, str]:
    """The versions of this package, torch and transformers, and of these packages."""
    return {p: importlib.metadata.version(p) for p in ("probeprune", "torch", "transformers", *more)}
