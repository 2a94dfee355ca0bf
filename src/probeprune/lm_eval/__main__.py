"""The command line of the LM evaluation harness, with `--model probeprune`."""

import sys

import probeprune.lm_eval  # registers the type
from probeprune.cli import run
from probeprune.foreign.extras import extra

__all__ = ["main", "probeprune"]


def main() -> None:
    """Run the harness' own command line; bad input of ours ends in one sentence and exit code 2."""
    sys.exit(run(_evaluate))


def _evaluate() -> None:
    with extra("eval"):
        from lm_eval.__main__ import cli_evaluate
    cli_evaluate()


if __name__ == "__main__":
    main()
