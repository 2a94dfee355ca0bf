"""What `test_processes.py` has two processes do together, and one alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_experts
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from tiny import FAMILIES, token_ids

from probeprune import METHODS, Refit, attach, compose, find_blocks, processes, prune
from probeprune.calibration.collecting import calibrate
from probeprune.calibration.damage import damages
from probeprune.calibration.gates import Budget, learn_gates
from probeprune.calibration.gradients import saliences
from probeprune.calibration.sensitivity import sensitivities
from probeprune.errors import UsageError
from probeprune.evaluation.likelihood import Request, make_batches, score
from probeprune.evaluation.perplexity import perplexity
from probeprune.preparation import Preparation
from probeprune.processes import shares
from probeprune.strategies.gates import Gates

WINDOWS = token_ids(7, 16, seed=4)
REFIT = Refit(damping=(1e-2, 1.0), sensitivity=2)
REQUESTS = [Request(row[:n].tolist(), row[n : n + 2].tolist()) for n, row in enumerate(WINDOWS, 3)]

Found = dict[str, torch.Tensor]


def work(cache: Path | None = None) -> Found:
    """Everything that is shared out, as tensors by name."""
    found: Found = {}

    def keep(what: str, tensors: dict[str, Any]) -> None:
        found.update({f"{what}/{n}": torch.as_tensor(t).clone() for n, t in tensors.items()})

    model = FAMILIES["llama-gqa"]()
    for count in (7, 1):  # with one window, the second process has none
        few = WINDOWS[:count]
        for name, moments in calibrate(model, few, batch_size=2, own_positions=3).items():
            keep(f"moments of {count}/{name}", moments.state())
        keep(f"saliences of {count}", saliences(model, few, "param_mix"))
        fisher = sensitivities(model, few, seed=3)
        keep(f"sensitivities of {count}", fisher)
        keep(f"damages of {count}", damages(model, few, fisher, batch_size=2))
        start = {b.name: torch.arange(b.units, dtype=torch.float32) for b in find_blocks(model)}
        budget = Budget(find_blocks(model), 0.3 * sum(b.parameters for b in find_blocks(model)))
        keep(f"gates of {count}", learn_gates(model, few, [budget], start, Gates(3, min(count, 3), 16)))
        result = perplexity(model, few, batch_size=2)
        keep(f"perplexity of {count}", {"value": result.value, "losses": result.losses})
    scores = score(model, REQUESTS, make_batches(REQUESTS, 2, "length"), max_length=16)
    keep("scores", {"of options": scores.loglikelihoods, "tokens": scores.tokens, "padding": scores.padding})
    with attach(model, compose(METHODS["probe"], skip_layers=1), 0.4, calibration=WINDOWS):
        keep("probe", {"losses": perplexity(model, WINDOWS, batch_size=2).losses})
    away = FAMILIES["llama-gqa"]()
    cpu_offload(away, torch.device("cpu"))
    for count in (7, 1):
        keep(f"offloaded, {count}", {"losses": perplexity(away, WINDOWS[:count], batch_size=2).losses})
    done = prune(away, compose(METHODS["wanda-sp"], skip_layers=1), 0.4, calibration=WINDOWS, batch_size=2)
    keep("offloaded", {k.name: k.units for k in done.kept})
    for name in ("best-static", "flap"):
        method = compose(METHODS[name], skip_layers=1)
        if method.refit is not None:
            method = compose(method, compensation=REFIT)
        for again in range(2 if cache else 1):  # once more, from the cache
            pruned = FAMILIES["llama-gqa"]()
            done = prune(pruned, method, 0.4, calibration=WINDOWS, batch_size=2, cache=cache)
            keep(f"{name}/kept{again}", {k.name: k.units for k in done.kept})
            keep(f"{name}/weights{again}", pruned.state_dict())
    sparse = tiny_experts.build("mixtral")()  # its experts see a few tokens each, some in one process alone
    method = compose("best-static", skip_layers=0, blocks=("experts",), compensation=REFIT)
    done = prune(sparse, method, 0.3, calibration=WINDOWS % 60, batch_size=2, cache=cache)
    keep("experts/kept", {k.name: k.by_expert for k in done.kept if k.by_expert})
    keep("experts/weights", sparse.state_dict())
    return found


def failing() -> None:
    """A layer that fails in the second process alone fails in both, and they go on together."""
    model = FAMILIES["llama-gqa"]()
    if not processes.is_first():
        with torch.no_grad():
            find_blocks(model)[3].consumer.weight[0, 0] = torch.nan
    for call in (lambda: perplexity(model, WINDOWS), lambda: saliences(model, WINDOWS)):
        check_fails(call, FloatingPointError, "NaN or infinite")

    def broken() -> None:
        with shares.alike():
            if not processes.is_first():
                raise KeyError("lost")

    if processes.is_first():
        check_fails(broken, UsageError, "process 1 of 2 failed: KeyError")
    else:
        check_fails(broken, KeyError, "lost")
    assert shares.agreed(processes.rank()) == 0


def check_fails(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    """Raise `AssertionError` unless the call raises such an error, which all processes raise."""
    try:
        call()
    except kind as error:
        assert text in str(error) and processes.is_told(error), repr(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


def main(folder: Path) -> None:
    """Do the work in this process of two; its results go into a file of `folder`."""
    processes.join("cpu")
    cache = folder / f"cache-{processes.rank()}"
    with shares.sharing():
        Preparation(FAMILIES["llama-gqa"](), WINDOWS, cache=cache)
        save_file(work(cache), folder / f"{processes.rank()}.safetensors")
        failing()
