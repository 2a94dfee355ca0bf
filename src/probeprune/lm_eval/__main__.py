"""The command line of the LM evaluation harness, with `--model probeprune`."""

import sys

from lm_eval.__main__ import cli_evaluate

import probeprune.lm_eval
from probeprune.cli import run

__all__ = ["main", "probeprune"]


def main() -> None:
    """Run the harness' own command line; bad input of ours ends in one sentence and exit code 2."""
    sys.exit(run(cli_evaluate))


if __name__ == "__main__":
    main()
