"""Model cards in Markdown: what was done to a model, on which data, and at what cost.

Names come from configs and records of others: `literal.markdown` and `literal.python_string` write all of
them, and a YAML library writes the metadata.
"""

import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from probeprune.foreign.literal import markdown, python_string
from probeprune.model.described import Layout
from probeprune.surgery import Pruning

_BUDGETS = {"parameters": "parameters", "flops": "FLOPs", "time": "time, measured where they were pruned"}
_PARTS = {
    "moments": "statistics",
    "routed": "statistics of experts",
    "saliences": "gradients",
    "gates": "training of gates",
    "damages": "damages",
    "consumers": "refit",
}
"""Parts of `Statistics` in the words of a reader."""


def pruning_card(
    done: Pruning, record: dict[str, Any], name: str, opens: str = "AutoModelForCausalLM"
) -> str:
    """The model card of a pruned model.

    Args:
        done: the result of `prune`.
        record: the content of pruning.json.
        name: name or path under which the card's example opens the model.
        opens: the class of transformers that opens it.
    """
    base = record["base_model"]
    return "\n".join(
        [
            *front("transformers", {"base_model": base} if is_hub_id(base) else {}, _reads_images(opens)),
            f"# {markdown(base)}, pruned by {done.removed_share:.0%}",
            "",
            f"Structured pruning: {_units(done)} are removed, so the model is smaller and faster in any "
            "engine.",
            "",
            *table(_pruning_rows(done, record)),
            "## What it cost",
            "",
            _pruning_quality(record["evaluation"]),
            "",
            "## Use",
            "",
            *_use(record["layout"], name, opens),
            "",
            "`pruning.json` lists the units of the dense model that are kept. The licence is that of the "
            "dense model.",
            "",
        ]
    )


def _use(layout: Layout, name: str, opens: str) -> list[str]:
    """How a checkpoint of a layout is opened."""
    if layout == "nemotron-nas":
        return [
            "All layers have the same heads, and each MLP has a width of its own. vLLM serves the model with "
            "its own code; `configuration_nemotron_nas.py` next to the weights tells it the widths:",
            "",
            "```",
            f"vllm serve {shlex.quote(name)} --trust-remote-code",
            "```",
            "",
            "In Python, `probeprune.load_model` opens it, and runs no code of the checkpoint.",
        ]
    opening = "All layers have the same width, so this is a plain model and needs nothing but transformers."
    remote = ""
    if layout == "per-layer":
        opening = (
            "Layers differ in width. Allow transformers to run the small `modeling_pruned.py` next to the "
            "weights, as below; `probeprune.load_model` opens the model without running any code of it."
        )
        remote = ", trust_remote_code=True"
    return [
        opening,
        "",
        "```python",
        f"from transformers import {opens}, AutoTokenizer",
        "",
        f"model = {opens}.from_pretrained({python_string(name)}{remote})",
        f"tokenizer = AutoTokenizer.from_pretrained({python_string(name)}{remote})",
        "```",
    ]


def _pruning_rows(done: Pruning, record: dict[str, Any]) -> list[tuple[str, str]]:
    method = done.method
    before, after = done.parameters
    strategies = f"{method.importance}, {method.allocation}, {method.compensation.kind}"
    rows = [
        ("method", f"{method.name} ({method.source})" if method.source else method.name),
        ("importance, allocation, compensation", strategies),
        ("asked for", f"{done.ratio:.1%} of the blocks' {_BUDGETS[method.budget]}"),
        ("removed", f"{done.removed_share:.1%} of their parameters"),
        ("parameters, with embeddings", f"{before / 1e6:.1f} M before, {after / 1e6:.1f} M after"),
        ("kept", _kept_line(done)),
        ("seed", str(record["seed"])),
    ]
    if record["calibration"] is not None:
        parts = [
            f"{_PARTS[name]} on {part['windows']} windows of {part['length']} tokens"
            for name, part in record["calibration"].items()
            if name != "corpus"
        ]
        rows.append(("calibration", f"{record['calibration']['corpus']}: {'; '.join(parts)}"))
    if done.steps > 1:
        rows.append(("steps", str(done.steps)))
    return [
        *rows,
        ("time and memory of pruning", _time_and_memory(record)),
        ("dtype and device while pruning", f"{record['dtype']}, {record['device']}"),
        ("made with", _versions(record)),
    ]


def _pruning_quality(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "Quality was not measured."
    dense, pruned = evaluation["perplexity"]["dense"], evaluation["perplexity"]["pruned"]
    return (
        f"{_measured_on(evaluation)}: **{dense:.2f}** dense, **{pruned:.2f}** pruned "
        f"({pruned / dense:.2f} times). The model was not trained after pruning."
    )


def training_card(
    record: dict[str, Any],
    name: str,
    kind: Literal["adapter", "checkpoint"],
    opens: str = "AutoModelForCausalLM",
) -> str:
    """The model card of a trained model.

    Args:
        record: the content of training.json.
        name: name or path under which the card's example opens the result.
        kind: whether the result is a LoRA adapter or a whole model.
        opens: the class of transformers that opens the model.
    """
    quality = "Perplexity was not measured."
    if record["evaluation"] is not None:
        figures = record["evaluation"]["perplexity"]
        change = f"{figures['before']:.2f} before, **{figures['after']:.2f}** after"
        quality = f"{_measured_on(record['evaluation'])}: {change}."
        if agreements := record["evaluation"].get("agreement"):
            before, after = (agreements[name] for name in ("before", "after"))
            quality += (
                f" Of the likeliest next tokens, {before['top1']:.1%} are those of the teacher before and "
                f"**{after['top1']:.1%}** after; KL divergence from it, {before['divergence']:.3f} and "
                f"**{after['divergence']:.3f}** nats a token."
            )
    title = f"{record['base_model']}, trained after pruning"
    if "removed_share" in record:
        title = f"{record['base_model']}, pruned by {record['removed_share']:.0%} while training"
    if kind == "adapter":
        base = f"{opens}.from_pretrained({python_string(record['base_model'])})"
        use = f"PeftModel.from_pretrained({base}, {python_string(name)})"
    else:
        use = f"{opens}.from_pretrained({python_string(name)})"
    return "\n".join(
        [
            *front("peft" if kind == "adapter" else "transformers", {}, _reads_images(opens)),
            f"# {markdown(title)}",
            "",
            *table(_training_rows(record)),
            quality,
            "",
            "```python",
            f"model = {use}",
            "```",
            "",
            "If the layers of the base model differ in width, pass `trust_remote_code=True`, or open it with "
            "`probeprune.load_model`. `training.json` and `tensorboard/` have the losses of all steps.",
            "",
        ]
    )


def _training_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    t = record["training"]
    pruning = []
    if record.get("pruning"):
        earlier = record["pruning"]
        share = f"{earlier['removed_share']:.1%} of the blocks, by {earlier['method']['name']}"
        pruning.append(("pruned before", share))
    if "removed_share" in record:
        pruning.append(("pruned", f"{record['removed_share']:.1%} of the blocks, by {record['method']}"))
    return [
        ("base model", record["base_model"]),
        *pruning,
        ("trained", _trained(t)),
        ("loss", _loss(record)),
        ("text", f"{record['corpus']}, {'packed' if record['packing'] else 'cut'} to {t['length']} tokens"),
        ("steps", f"{record['steps']} of {t['batch_size']} sequences; weights of step {record['best_step']}"),
        ("tokens seen", f"{record['tokens']:,}"),
        ("learning rate, seed", f"{t['learning_rate']:g}, {t['seed']}"),
        ("held-out loss", "{:.3f} before, {:.3f} after".format(*record["held_out_loss"])),
        ("time and memory", _time_and_memory(record)),
        ("processes, dtype, device", f"{record['processes']}, {record['dtype']}, {record['device']}"),
        ("made with", _versions(record)),
    ]


def _trained(training: dict[str, Any]) -> str:
    lora = training["lora"]
    if lora is not None:
        return f"LoRA, rank {lora['rank']}, alpha {lora['alpha']}"
    return "all weights" if training["weights"] == "all" else "the output maps of all blocks"


def _loss(record: dict[str, Any]) -> str:
    settings = record["training"]["distillation"]
    if settings is None:
        return "cross-entropy of the text"
    kept = "all tokens" if settings["top_k"] is None else f"the {settings['top_k']} likeliest tokens"
    return (
        f"{settings['direction']} KL divergence to {record['teacher']}, {kept}, temperature "
        f"{settings['temperature']:g}"
    )


def _reads_images(opens: str) -> bool:
    """Whether a class of transformers opens models that read images."""
    return opens == "AutoModelForImageTextToText"


def pipeline_tag(images: bool) -> str:
    """The hub's name of what a model does; `images` for one that reads images beside text."""
    return "image-text-to-text" if images else "text-generation"


def front(library: str, more: dict[str, str], images: bool) -> list[str]:
    """The metadata block that the hub reads; `images` as in `pipeline_tag`."""
    metadata = {
        **more,
        "library_name": library,
        "pipeline_tag": pipeline_tag(images),
        "tags": ["pruned", "structured-pruning", "probeprune"],
    }
    written = yaml.safe_dump(metadata, sort_keys=False, default_flow_style=None)
    return ["---", written.rstrip("\n"), "---", ""]


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Rows of a name and a value as a Markdown table."""
    return ["| what | |", "| --- | --- |", *(f"| {what} | {markdown(value)} |" for what, value in rows), ""]


def _measured_on(text: dict[str, Any]) -> str:
    windows = f"{text['windows']} windows of {text['length']} tokens"
    return f"Perplexity on {markdown(text['corpus'])} (first {windows})"


def _time_and_memory(record: dict[str, Any]) -> str:
    return f"{record['seconds']:.0f} s, {record['peak_memory'] / 2**30:.2f} GiB at most"


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in record["versions"].items())


def is_hub_id(name: str) -> bool:
    """Whether it names a model on the hub, and nothing else can be meant."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _units(done: Pruning) -> str:
    """What a method may remove: `whole attention heads and MLP channels`, and units of experts."""
    units = "whole attention heads and MLP channels"
    if not any(k.kind == "experts" and len(k.units) < k.of for k in done.kept):
        return units
    return units.replace(" and", ",") + (
        " and experts" if done.method.experts == "expert" else " and channels of experts"
    )


def _kept_line(done: Pruning) -> str:
    """The range of widths over all layers: `2-3 of 3 attention units, 1100-1536 of 1536 MLP channels`."""
    parts = []
    experts = "experts" if done.method.experts == "expert" else "channels of each expert"
    nouns = (("attention", "attention units"), ("mlp", "MLP channels"), ("experts", experts))
    for kind, noun in nouns:
        blocks = [k for k in done.kept if k.kind == kind]
        if not blocks:
            continue
        low, high = min(len(k.units) for k in blocks), max(len(k.units) for k in blocks)
        parts.append(f"{low if low == high else f'{low}-{high}'} of {max(k.of for k in blocks)} {noun}")
    return f"{', '.join(parts)} per layer"
