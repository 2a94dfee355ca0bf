"""What cutting a quarter of routed experts costs, on a mixture of experts made of a trained model's MLPs.

    python benchmarks/expert_quality.py [--windows 16] [--only NAME,...]

No small trained mixture of experts is embedded. In its place every MLP of SmolLM2-135M-Instruct is split: the
third of its channels with the largest `sqrt(E z^2) norm2(W_j)` is the shared expert, the others are dealt out
to 16 experts by what they react to (balanced k-means on their energies over tokens), and a token gets the 8
experts whose output a linear router, fitted by ridge regression, expects to be largest. Nothing is trained.
Printed is, for each method that takes a quarter of the routed experts' channels, or of the experts: perplexity
and nats of KL divergence per token from the uncut model, on windows that nothing was fitted to.
"""

import argparse
import copy
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import WindowSource, evaluation_windows
from probeprune.methods import Method, compose
from probeprune.model.experts import find_parts
from probeprune.model.loading import EMBEDDED_MODEL, load_model
from probeprune.surgery import prune

EXPERTS, PER_TOKEN = 16, 8
SHARED = 512
"""Channels of the shared expert; the others are dealt out evenly."""
CUT = 0.25
SHARPNESS = 0.25
"""Standard deviation of the router's logits: small, so that the experts of a token weigh about the same."""
FITTED_ON = 2048
"""Tokens of C4 that channels are dealt out and routers fitted on."""


def methods() -> dict[str, Method]:
    """The methods compared, by name: each takes units of routed experts alone."""
    channel = {"skip_layers": 0, "blocks": ("experts",)}
    made = {f"channel, {n}": compose(n, name=n, **channel) for n in ("wanda-sp", "best-static")}
    for name in ("reap", "refit", "total", "frequency", "random"):
        whole = compose("wanda-sp", name=name, experts="expert", **channel)
        made[f"expert, {name}"] = compose(whole, name=name, expert_importance=name)
    made |= {f"channel, {n}": compose(n, name=n, **channel) for n in ("flap", "random")}
    made["channel, wanda-sp refitted"] = compose(made["channel, wanda-sp"], compensation="least-squares")
    return made


def shape(dense: nn.Module) -> Qwen2MoeConfig:
    """The config of the mixture of experts."""
    old = dense.config
    return Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=old.tie_word_embeddings,
        moe_intermediate_size=(old.intermediate_size - SHARED) // EXPERTS,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        norm_topk_prob=True,
        use_sliding_window=False,
    )


def dealt(energies: torch.Tensor) -> torch.Tensor:
    """Channels dealt out to experts, (experts, channels each): balanced k-means on energies (tokens, n)."""
    features = energies / energies.norm(dim=0).clamp_min(1e-20)
    size = features.shape[1] // EXPERTS
    generator = torch.Generator().manual_seed(0)
    centres = features[:, torch.randperm(features.shape[1], generator=generator)[:EXPERTS]]
    groups: list[list[int]] = []
    for _ in range(10):
        likeness = centres.T @ features  # (experts, channels)
        groups = [[] for _ in range(EXPERTS)]
        left = set(range(features.shape[1]))
        for flat in likeness.flatten().argsort(descending=True).tolist():
            expert, channel = divmod(flat, features.shape[1])
            if channel in left and len(groups[expert]) < size:
                groups[expert].append(channel)
                left.discard(channel)
        centres = torch.stack([features[:, own].mean(1) for own in groups], 1)
    return torch.tensor([sorted(own) for own in groups])


@torch.no_grad()
def split(mlp: nn.Module, target: nn.Module, x: torch.Tensor) -> float:
    """Fill a sparse layer from an MLP and its inputs (tokens, d); gives its share of error."""
    gate, up, down = (getattr(mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
    z = nn.functional.silu(x @ gate.T) * (x @ up.T)
    order = (z.square().mean(0).sqrt() * down.norm(dim=0)).argsort(descending=True)
    shared, others = order[:SHARED].sort().values, order[SHARED:].sort().values
    own = target.shared_expert
    own.gate_proj.weight.copy_(gate[shared])
    own.up_proj.weight.copy_(up[shared])
    own.down_proj.weight.copy_(2 * down[:, shared])
    target.shared_expert_gate.weight.zero_()  # sigmoid(0) is a half
    groups = others[dealt(z[:, others].square())]
    sizes = []
    for e, channels in enumerate(groups):
        target.experts.gate_up_proj[e] = torch.cat([gate[channels], up[channels]])
        target.experts.down_proj[e] = PER_TOKEN * down[:, channels]
        sizes.append((z[:, channels] @ down[:, channels].T).norm(dim=1).clamp_min(1e-20).log())
    wanted = torch.stack(sizes, 1)
    wanted = SHARPNESS * (wanted - wanted.mean(0)) / wanted.std() + SHARPNESS * wanted.mean(0) / wanted.std()
    wanted = wanted - wanted.mean(1, keepdim=True)
    moment = x.T @ x + 1e-2 * x.square().sum(0).mean() * torch.eye(x.shape[1])
    target.gate.weight.copy_(torch.linalg.solve(moment, x.T @ wanted).T)
    y = z @ down.T
    return float((target(x[None])[0] - y).square().sum() / y.square().sum())


@torch.no_grad()
def upcycled(dense: nn.Module, windows: torch.Tensor) -> tuple[nn.Module, list[float]]:
    """The mixture of experts, and the share of error of each layer's output."""
    made = Qwen2MoeForCausalLM._from_config(shape(dense), dtype=torch.float32).eval()
    made.load_state_dict(dense.state_dict(), strict=False)
    inputs: list[torch.Tensor] = []
    errors = []
    for name, p in made.named_parameters():
        if name.endswith("proj.bias"):
            p.zero_()
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for layer in dense.model.layers
    ]
    dense(windows)
    for hook in hooks:
        hook.remove()
    for old, new, x in zip(dense.model.layers, made.model.layers, inputs, strict=True):
        errors.append(split(old.mlp, new.mlp, x[::2]))
    return made, errors


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Of each next token: (windows, length, vocabulary)."""
    return torch.cat([model(few).logits.log_softmax(-1) for few in windows.split(4)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of C4")
    parser.add_argument("--evaluated", type=int, default=16, help="windows of each text to measure")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--only", default="", help="methods, separated by commas; all without it")
    parser.add_argument("--cache", default="", help="folder for what methods share; none is kept without it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    loaded = load_model(EMBEDDED_MODEL, dtype="float32")
    dense = loaded.model
    texts = {
        corpus: evaluation_windows(
            load_corpus(corpus), loaded.tokenizer, length=options.length, limit=options.evaluated
        )
        for corpus in ("c4-held-out", "wikitext2")
    }
    source = WindowSource(load_corpus("c4"), loaded.tokenizer, options.windows, options.length, 0)
    started = time.monotonic()
    count = FITTED_ON // options.length
    fitted_on = WindowSource(source.documents, loaded.tokenizer, count, options.length, 1).draw()
    model, errors = upcycled(dense, fitted_on)
    seconds = time.monotonic() - started
    print(f"made in {seconds:.0f} s; error of a layer's output {sum(errors) / len(errors):.3f}", flush=True)

    whole = [log_probabilities(model, windows) for windows in texts.values()]

    def measured(one: nn.Module) -> str:
        cells = []
        for windows, before in zip(texts.values(), whole, strict=True):
            now = log_probabilities(one, windows)
            loss = -now[:, :-1].gather(2, windows[:, 1:, None]).mean()
            apart = (before.exp() * (before - now)).sum(-1).mean()
            cells += [f"{float(loss.exp()):.2f}", f"{float(apart):.4f}"]
        return " | ".join(cells)

    print("| model | C4 held out | KL | WikiText-2 | KL |\n| :-- | ---: | ---: | ---: | ---: |")
    print(f"| SmolLM2-135M-Instruct | {measured(dense)} |", flush=True)
    print(f"| split into experts | {measured(model)} |", flush=True)
    parts = find_parts(model)
    ratio = CUT * sum(p.parameters for p in parts if p.kind == "experts") / sum(p.parameters for p in parts)
    for name, method in methods().items():
        if options.only and not any(word in name for word in options.only.split(",")):
            continue
        smaller = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as own:  # what methods share is collected once
            cache = Path(options.cache or own)
            started = time.monotonic()
            prune(smaller, method, ratio, calibration=source, batch_size=4, cache=cache)
        seconds = time.monotonic() - started
        print(f"| {name} | {measured(smaller)} | <!-- {seconds:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
