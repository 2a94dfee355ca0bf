"""Strategies: the parts that a method is composed of, each a table of small records.

How units are scored (`importance`, from gradients by `criteria`, or learned as `gates`), how many units each
block keeps (`allocation`), how the loss is made up for (`compensation`), how a batch is probed (`probe`), and
when all this happens (`schedule`, `probe_every_batch`, `refit_every_batch`). Each record names the parts of
`Statistics` that it needs; `prepare` collects them.
"""

from typing import Literal

Part = Literal["moments", "routed", "saliences", "damages", "gates", "consumers"]
"""A part of `Statistics` that a strategy may need."""
