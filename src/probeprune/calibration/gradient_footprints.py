"""How much memory each part of calibration that takes gradients needs, by rehearsing it without numbers.

As `footprints`, for saliences, sensitivities and gates. Knows nothing of methods.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from probeprune.calibration.gates import add_gradients, gated
from probeprune.model.blocks import Block, Member, find_layers
from probeprune.model.decoding import HEAD_TOKENS, next_token_logits
from probeprune.model.experts import ExpertMap, Stack
from probeprune.model.footprint import Batch, Phase, Rehearsal, states_of
from probeprune.model.forwards import temporary_hooks
from probeprune.strategies.criteria import CRITERIA, Gradients, Settled
from probeprune.strategies.gates import Gates


def saliences(
    rehearsal: Rehearsal, wide: Rehearsal, criterion: str, gradients: Gradients, experts: bool = False
) -> list[Phase]:
    """The parts of the work that takes gradients (`gradients.saliences`).

    `wide` is the model in float32, in which each layer is differentiated. With `experts`, those of experts
    are taken too.
    """
    rule = CRITERIA[criterion]
    held: dict[str, list[torch.Tensor]] = {}
    members: list[Member | ExpertMap] = []
    weights: list[tuple[Any, list[Member | ExpertMap]]] = []
    for member in (m for b in wide.here for m in b.members):
        members.append(member)
        weights.append((member.linear.weight, [member]))
    for stack in wide.stacks_here if experts else []:
        members += stack.maps
        for key in (stack.record.producer, "down_proj"):
            weights.append((stack.module._parameters[key], [m for m in stack.maps if m.key == key]))

    def take(member: Member | ExpertMap, gradient: torch.Tensor) -> None:
        torch.isfinite(gradient).all()
        observed = rule.observe(member.oriented(gradient).float(), member)
        if member.name in held:
            for mean, value in zip(held[member.name], observed, strict=True):
                mean.add_(value, alpha=0.5)
        else:
            held[member.name] = [value / 2 for value in observed]

    def taker(owners: Sequence[Member | ExpertMap]) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            gradient, p.grad = p.grad, None
            assert gradient is not None
            for owner, part in zip(owners, gradient if gradient.ndim > 2 else [gradient], strict=True):
                take(owner, part)

        return hook

    batch = Batch(1, gradients.length)
    with wide.running() as live:
        runner = wide.runner(batch)
        for weight, _ in weights:
            weight.requires_grad_(True)
        hooks = [weight.register_post_accumulate_grad_hook(taker(owners)) for weight, owners in weights]
        for _ in range(2):
            hidden = runner.hidden[0].detach().requires_grad_(True)
            with torch.enable_grad():
                out = runner.run(wide.layer, 0, hidden)
                out.backward(torch.empty_like(out))
        for hook in hooks:
            hook.remove()
        for weight, _ in weights:
            weight.requires_grad_(False)
        for m in members:
            rule.salience(Settled(held.pop(m.name), m, m.weight.float(), gradients, 0))
    work = live.peak
    if rehearsal.dtype.itemsize < 4:  # a float32 copy beside the layer
        work += 4 * sum(p.numel() for p in find_layers(rehearsal.model)[rehearsal.layer].parameters())
    return _backward("gradients", rehearsal, gradients.windows, gradients.length, work, _text_loss)


def _text_loss(logits: torch.Tensor) -> torch.Tensor:
    """What saliences are gradients of."""
    targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


def _drawn_loss(logits: torch.Tensor) -> torch.Tensor:
    """What sensitivities are gradients of: the loss of labels that are drawn."""
    uniform = torch.rand(logits.shape, dtype=torch.float32, device="cpu").clamp_(1e-20).to(logits.device)
    labels = (logits.detach() - (-uniform.log()).log()).argmax(-1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def sensitivities(rehearsal: Rehearsal, windows: int, length: int) -> tuple[list[Phase], int]:
    """The parts of the work that measures sensitivities, and the bytes of these, which stay."""
    here: list[Block | Stack] = [*rehearsal.here, *rehearsal.stacks_here]
    seen: dict[str, torch.Tensor] = {}
    totals: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = output

        return hook

    with rehearsal.running() as live:
        runner = rehearsal.runner(Batch(1, length))
        hidden = runner.hidden[0].detach().requires_grad_(True)
        modules = ((b.name, b.module if isinstance(b, Stack) else b.consumer) for b in here)
        hooks = (module.register_forward_hook(keep(name)) for name, module in modules)
        with temporary_hooks(hooks), torch.enable_grad():
            out = runner.run(rehearsal.layer, 0, hidden)
            out.backward(torch.empty_like(out))
        for name in list(seen):
            gradient = seen.pop(name).grad
            assert gradient is not None
            g = gradient.flatten(0, -2).float()
            torch.isfinite(g).all()
            totals[name] = torch.empty_like(g.T @ g)
            totals[name] = totals[name] + g.T @ g / len(g)
        own = sum(t.numel() * t.element_size() for t in totals.values())
    kept = sum(4 * b.hidden_size**2 for b in rehearsal.parts)
    phases = _backward("sensitivities", rehearsal, windows, length, live.peak + kept - own, _drawn_loss)
    return phases, kept


def _backward(
    name: str,
    rehearsal: Rehearsal,
    windows: int,
    length: int,
    layer: int,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> list[Phase]:
    """The parts of `backward_by_layer`, given the bytes that its work in one layer takes."""
    with rehearsal.running() as live:
        runner = rehearsal.runner(Batch(1, length))
        hidden = runner.hidden[0].detach().requires_grad_(True)
        with torch.enable_grad():
            states = runner.finish(0, hidden)
            top = states.detach().requires_grad_(True)
            for first in range(0, min(length, 2 * HEAD_TOKENS), HEAD_TOKENS):
                few = top[0, first : first + HEAD_TOKENS]
                loss(next_token_logits(rehearsal.model, few)).backward()
            states.backward(top.grad)
    one = states_of(rehearsal.model, rehearsal.dtype, windows, length)
    layers = 1 + max(b.layer for b in rehearsal.blocks)
    return [
        Phase(f"{name}: logits", live.peak + one, one * (layers + 1), sets=2, layers=0),
        Phase(name, layer + one, one * (layers + 1), sets=2),
    ]


def gates(rehearsal: Rehearsal, how: Gates) -> Phase:
    """The part of the work that trains gates (`gates.learn_gates`): the activations of a step in all layers,
    and beside them what the passes through one layer, or the output head, take for themselves."""
    batch = Batch(how.batch_size, how.length)
    with rehearsal.running() as live:
        runner = rehearsal.runner(batch)
        gate = torch.ones((), dtype=torch.float32, device=rehearsal.device, requires_grad=True)
        scales = {b.name: gate.expand(b.units) for b in rehearsal.here}
        before = live.now
        with torch.enable_grad(), gated(rehearsal.here, scales):
            out = runner.run(rehearsal.layer, 0, runner.hidden[0])
        saved = live.now - before
        out.backward(torch.empty_like(out))
    one = live.peak
    with rehearsal.running() as live:
        runner = rehearsal.runner(batch)
        top = runner.finish(0, runner.hidden[0]).flatten(0, 1).detach().requires_grad_(True)
        add_gradients(rehearsal.model, top, top.detach().clone(), batch.tokens)
    layers = len(find_layers(rehearsal.model))
    return Phase("gates", saved * layers + max(one - saved, live.peak), layers=layers, whole=True)
