"""Model cards (Markdown): what was done to a model, with which data, and what it cost."""

from pathlib import Path
from typing import Any, Literal

from probeprune.surgery import Pruning

_BUDGETS = {"parameters": "parameters", "flops": "FLOPs", "time": "time, measured where they were pruned"}


def pruning_card(done: Pruning, record: dict[str, Any], name: str) -> str:
    """The model card (Markdown): what was done, with which data, and what it cost."""
    before, after = done.parameters
    method = done.method
    rows = [
        ("method", f"{method.name} ({method.source})" if method.source else method.name),
        (
            "importance, allocation, compensation",
            f"{method.importance}, {method.allocation}, {method.compensation}",
        ),
        ("asked for", f"{done.ratio:.1%} of the attention and MLP blocks' {_BUDGETS[method.budget]}"),
        ("removed", f"{done.removed_share:.1%} of their parameters"),
        ("parameters, embeddings included", f"{before / 1e6:.1f} M before, {after / 1e6:.1f} M after"),
        ("kept", _kept_line(done)),
        ("seed", str(record["seed"])),
    ]
    if record["calibration"] is not None:
        used = [
            f"{what} on {part['windows']} windows of {part['length']} tokens"
            for what, part in record["calibration"].items()
            if what != "corpus"
        ]
        rows.append(("calibration", f"{record['calibration']['corpus']}: {'; '.join(used)}"))
    if done.steps > 1:
        rows.append(("steps", str(done.steps)))
    rows.append(
        (
            "time and memory of pruning",
            f"{record['seconds']:.0f} s, {record['peak_memory'] / 2**30:.2f} GiB at most",
        )
    )
    rows.append(("dtype and device while pruning", f"{record['dtype']}, {record['device']}"))
    rows.append(("made with", _versions(record)))
    if record["layout"] == "uniform":
        opening = "All layers have one width, so this is a plain model: nothing but transformers is needed."
        remote = ""
    else:
        opening = (
            "Layers have widths of their own. With `import probeprune` it opens as any model; without, the "
            "small `modeling_pruned.py` beside the weights is run when you allow it:"
        )
        remote = ", trust_remote_code=True"
    base = [f"base_model: {record['base_model']}"] if _is_hub_id(record["base_model"]) else []
    parts = [
        *_front("transformers", *base),
        f"# {record['base_model']}, pruned by {done.removed_share:.0%}",
        "",
        "Structured pruning: whole attention heads and MLP channels are gone, so the model is smaller and "
        "faster in any engine.",
        "",
        *_table(rows),
        "## What it cost",
        "",
    ]
    if record["evaluation"] is None:
        parts.append("Quality was not measured.")
    else:
        text, found = record["evaluation"], record["evaluation"]["perplexity"]
        parts += [
            f"{_measured_on(text)}: **{found['dense']:.2f}** dense, **{found['pruned']:.2f}** pruned "
            f"({found['pruned'] / found['dense']:.2f} times). It was not trained after pruning.",
        ]
    parts += [
        "",
        "## Use",
        "",
        opening,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})',
        "```",
        "",
        "Which heads and channels of the dense model are left is listed in `pruning.json`. The licence is "
        "that of the dense model.",
        "",
    ]
    return "\n".join(parts)


def training_card(record: dict[str, Any], name: str, kind: Literal["adapter", "checkpoint"]) -> str:
    """The model card (Markdown) of a trained model: what was done, with which text, and what it gave."""
    t = record["training"]
    lora = t["lora"]
    rows = [
        ("base model", record["base_model"]),
        ("trained", "all weights" if lora is None else f"LoRA, rank {lora['rank']}, alpha {lora['alpha']}"),
        ("text", f"{record['corpus']}, {'packed' if record['packing'] else 'cut'} to {t['length']} tokens"),
        ("steps", f"{record['steps']} of {t['batch_size']} sequences; weights of step {record['best_step']}"),
        ("tokens seen", f"{record['tokens']:,}"),
        ("learning rate, seed", f"{t['learning_rate']:g}, {t['seed']}"),
        ("held-out loss", "{:.3f} before, {:.3f} after".format(*record["held_out_loss"])),
        ("time and memory", f"{record['seconds']:.0f} s, {record['peak_memory'] / 2**30:.2f} GiB at most"),
        ("processes, dtype, device", f"{record['processes']}, {record['dtype']}, {record['device']}"),
        ("made with", _versions(record)),
    ]
    title = f"{record['base_model']}, trained after pruning"
    if "removed_share" in record:
        title = f"{record['base_model']}, pruned by {record['removed_share']:.0%} while training"
        rows.insert(1, ("pruned", f"{record['removed_share']:.1%} of the blocks, by {record['method']}"))
    if record.get("pruning"):
        before = record["pruning"]
        what = f"{before['removed_share']:.1%} of the blocks, by {before['method']['name']}"
        rows.insert(1, ("pruned before", what))
    quality = "Perplexity was not measured."
    if record["evaluation"] is not None:
        text, found = record["evaluation"], record["evaluation"]["perplexity"]
        quality = f"{_measured_on(text)}: {found['before']:.2f} before, **{found['after']:.2f}** after."
    if kind == "adapter":
        base = f'AutoModelForCausalLM.from_pretrained("{record["base_model"]}")'
        use = f'PeftModel.from_pretrained({base}, "{name}")'
    else:
        use = f'AutoModelForCausalLM.from_pretrained("{name}")'
    return "\n".join(
        [
            *_front("peft" if kind == "adapter" else "transformers"),
            f"# {title}",
            "",
            *_table(rows),
            quality,
            "",
            "```python",
            f"model = {use}",
            "```",
            "",
            "If the base model's layers have widths of their own, `import probeprune` first (or pass "
            "`trust_remote_code=True`). The course of the losses is in `training.json` and `tensorboard/`.",
            "",
        ]
    )


def _front(library: str, *more: str) -> list[str]:
    """The metadata that the hub reads."""
    return [
        "---",
        *more,
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [pruned, structured-pruning, probeprune]",
        "---",
        "",
    ]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| what | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows), ""]


def _measured_on(text: dict[str, Any]) -> str:
    return f"Perplexity on {text['corpus']} (first {text['windows']} windows of {text['length']} tokens)"


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in record["versions"].items())


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).expanduser().exists()


def _kept_line(done: Pruning) -> str:
    """The range of widths over the layers: `2-3 of 3 attention units, 1100-1536 of 1536 channels`."""
    parts = []
    for kind, noun in (("attention", "attention units"), ("mlp", "MLP channels")):
        own = [k for k in done.kept if k.kind == kind]
        low, high = min(len(k.units) for k in own), max(len(k.units) for k in own)
        parts.append(f"{low if low == high else f'{low}-{high}'} of {max(k.of for k in own)} {noun}")
    return f"{', '.join(parts)} a layer"
