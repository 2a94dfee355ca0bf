"""Which experts to leave out: the error of single layers, on experts that are random and that are not.

    python benchmarks/expert_order.py

Experts that are not random are made of MLPs of SmolLM2-135M-Instruct as in `expert_quality.py`, in six of
its 30 layers; the random ones have the same shape and inputs. A quarter of the experts of a layer leaves by
each score, which is taken on one half of the tokens of C4. Printed is the squared error of what a layer's
experts add, relative to that, on the other half: with the router's own weights, and with the best scale of
each that is left, fitted to the first half. Last comes the same share of channels of every expert.
"""

import copy
import warnings

import torch
from expert_quality import EXPERTS, shape, split
from torch import nn
from transformers import Qwen2MoeForCausalLM

from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.calibration.leaving import route
from probeprune.calibration.routed import observed
from probeprune.calibration.statistics import Statistics
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import WindowSource
from probeprune.methods import compose
from probeprune.model.experts import Stack, find_stacks
from probeprune.model.loading import EMBEDDED_MODEL, load_model
from probeprune.model.stack_cut import StackCut
from probeprune.plan import expert_scores
from probeprune.strategies.allocation import choose_units

WINDOWS, LENGTH = 8, 256
LAYERS = (3, 8, 13, 18, 23, 28)
GONE = EXPERTS // 4
SCORES = ("refit", "reap", "total", "frequency", "magnitude", "random")
CHANNELS = ("wanda-sp", "flap", "ppsp", "random")


@torch.no_grad()
def contributions(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    """What each expert adds for each token (tokens, d, experts)."""
    _, index, weights = route(stack, x)
    made = torch.zeros(*x.shape, stack.experts)
    for e in range(stack.experts):
        token, place = (index == e).nonzero(as_tuple=True)
        out = stack.output(e, stack.coupled(e, x[token]))
        made[token, :, e] = out * weights[token, place, None]
    return made


def error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Squared error over the square of what is wanted."""
    return float((wanted - got).square().sum() / wanted.square().sum())


def errors(model: nn.Module, number: int, text: torch.Tensor, other: torch.Tensor) -> dict[str, list[float]]:
    """By score, the errors of one layer as the router has it and rescaled."""
    found: dict[str, list[float]] = {}
    for unit, scores in (("expert", SCORES), ("channel", CHANNELS)):
        stack = find_stacks(model, unit)[number]
        moments = RoutedMoments(stack.experts, stack.width, exchange=unit == "expert")
        with torch.no_grad(), observed(stack, moments):
            stack.entry(text[None])
        moments.see(WINDOWS // 2, len(text))
        wanted = [contributions(stack, x).sum(2) for x in (text, other)]
        for score in scores:
            by = {"expert_importance": score} if unit == "expert" else {"importance": score}
            method = compose("wanda-sp", name=score, experts=unit, **by)
            values = expert_scores(method, stack, Statistics(routed={stack.name: moments}))
            assert values is not None
            keep = stack.units - (GONE if unit == "expert" else stack.width // 4)
            cut = StackCut(stack)
            cut.keep(choose_units(values, keep, stack))
            left = find_stacks(model, unit)[number]
            here, there = (contributions(left, x) for x in (text, other))
            flat = here.flatten(0, 1).double()
            moment = flat.T @ flat + 1e-6 * flat.square().sum(0).mean() * torch.eye(flat.shape[1]).double()
            scales = torch.linalg.solve(moment, flat.T @ wanted[0].flatten().double()).float()
            found[f"{unit}, {score}"] = [
                error(wanted[1], there.sum(2)),
                error(wanted[1], there @ scales),
            ]
            cut.restore()
    return found


@torch.no_grad()
def inputs_of(dense: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of the MLPs of some layers (tokens, d)."""
    inputs: list[torch.Tensor] = []
    hooks = [
        dense.model.layers[i].mlp.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, 1))
        )
        for i in LAYERS
    ]
    dense.model.layers = dense.model.layers[: max(LAYERS) + 1]
    dense.model(windows)
    for hook in hooks:
        hook.remove()
    return inputs


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    loaded = load_model(EMBEDDED_MODEL, dtype="float32")
    dense = loaded.model
    windows = WindowSource(load_corpus("c4"), loaded.tokenizer, WINDOWS, LENGTH, 0).draw()
    inputs = inputs_of(dense, windows)
    config = shape(dense)
    config.num_hidden_layers, config.vocab_size = len(LAYERS), 8
    config.layer_types = config.layer_types[: len(LAYERS)]
    made = Qwen2MoeForCausalLM._from_config(config, dtype=torch.float32).eval()
    drawn = copy.deepcopy(made)
    generator = torch.Generator().manual_seed(0)
    table: dict[str, list[list[float]]] = {}
    for n, (layer, x) in enumerate(zip(LAYERS, inputs, strict=True)):
        text, other = x.chunk(2)
        split(dense.model.layers[layer].mlp, made.model.layers[n].mlp, text)
        for p in drawn.model.layers[n].mlp.experts.parameters():
            p.data.normal_(std=0.05, generator=generator)
        drawn.model.layers[n].mlp.gate.weight.data.copy_(made.model.layers[n].mlp.gate.weight)
        for model in (drawn, made):
            for name, found in errors(model, n, text, other).items():
                table.setdefault(name, []).append(found)
        print(f"layer {layer}", {k: [f"{e:.3f}" for e in v[-1]] for k, v in table.items()}, flush=True)
    print("| a quarter leaves | random experts | rescaled | split MLPs | rescaled |")
    print("| :-- | ---: | ---: | ---: | ---: |")
    for name, rows in table.items():
        cells = [torch.tensor(rows[i::2]).mean(0).tolist() for i in range(2)]
        print(f"| {name} | {' | '.join(f'{e:.3f}' for pair in cells for e in pair)} |")


if __name__ == "__main__":
    main()
