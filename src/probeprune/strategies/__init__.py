"""Strategies: the choices that a method is composed of, each a table of small records.

How units are scored (`importance`, from gradients by `criteria`), how many of them go (`allocation`), how the
loss is made up for (`compensation`), how a batch is probed (`probe`), and when all this happens (`schedule`,
`probe_every_batch`, `refit_every_batch`). A record says what it needs; `prepare` reads that.
"""

from typing import Literal

Part = Literal["moments", "saliences", "damages", "consumers"]
"""A part of `Statistics` that a strategy may need."""
