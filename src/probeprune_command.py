"""Entry point of the command line, where Ctrl-C ends in a sentence already while the package is imported.

That takes seconds. This file lies beside the package, because importing any part of the package runs its
`__init__`, which imports most of it.
"""

import sys
from importlib.metadata import version


def main() -> None:
    """Import and run the command line; `probeprune --version` imports nothing."""
    if sys.argv[1:] == ["--version"]:
        print(f"probeprune {version('probeprune')}")
        return
    try:
        from probeprune.cli import main as run
    except KeyboardInterrupt:
        print("probeprune: interrupted before anything was done.", file=sys.stderr)
        sys.exit(130)
    run()
