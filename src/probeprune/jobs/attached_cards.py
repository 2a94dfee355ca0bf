"""The model card of a folder that keeps a model with a method attached."""

from collections.abc import Mapping
from typing import Any

from probeprune.foreign.literal import markdown, python_string
from probeprune.jobs.cards import front, is_hub_id, table
from probeprune.model.multimodal import multimodal_of

_WHEN = {
    "probe": "at every batch a small probe runs ahead and chooses heads and channels anew",
    "refit": "heads and channels are fixed, and the outputs of MLPs are refitted to every batch",
    "once": "heads and channels were chosen once",
    "never": "nothing is left out",
}
"""What a schedule does, by its kind."""


def attached_card(record: Mapping[str, Any], name: str) -> str:
    """The model card.

    Args:
        record: the content of attached.json.
        name: name or path under which the card's example opens the model.
    """
    method, base = record["method"], record["base_model"]
    title = f"{base or 'A language model'} under {method['name']} at {record['ratio']:.0%}"
    hub = {"base_model": base} if base and is_hub_id(base) else {}
    return "\n".join(
        [
            *front("transformers", hub, multimodal_of(record["config"].get("model_type")) is not None),
            f"# {markdown(title)}",
            "",
            *_what(record),
            "",
            *table(_rows(record)),
            "## What it cost",
            "",
            quality(record.get("evaluation")),
            "",
            "## Use",
            "",
            "Install [probeprune](https://pypi.org/project/probeprune/), then:",
            "",
            "```python",
            "import probeprune",
            "",
            f"loaded = probeprune.load_model({python_string(name)})",
            'inputs = loaded.tokenizer("The capital of France is", return_tensors="pt").to(loaded.device)',
            "loaded.model.generate(**inputs, max_new_tokens=32)  # pruned",
            "probeprune.detach(loaded.model)  # the dense model again",
            "```",
            "",
            f"On the command line: `probeprune generate {markdown(name)} --prompt ...` and `probeprune eval "
            f"{markdown(name)}`. Give a padded batch its attention mask.",
            "",
            "The licence is that of the dense model.",
            "",
        ]
    )


def _what(record: Mapping[str, Any]) -> list[str]:
    """What the folder holds and what it computes."""
    kind = record["method"]["when"]["kind"]
    does = _WHEN.get(kind, "heads and channels follow the batch")
    lines = [
        f"A model that is pruned while it runs: {does}. {record['removed_share']:.0%} of the parameters of "
        "its blocks are left out; its weights take as much memory as the dense model's.",
        "",
    ]
    if record["weights"] == "copy":
        return [
            *lines,
            "**The weights in this folder are those of the dense model, bit for bit.** Opened with "
            "transformers alone or served by another engine they compute the dense model, without pruning "
            "and without a warning. The method is in `attached.json` and `statistics.safetensors`, and runs "
            "where probeprune opens the folder.",
        ]
    return [
        *lines,
        "**There are no weights in this folder.** They are those of the base model, opened by its name and "
        "compared with the fingerprint that is kept here; the method is in `attached.json` and "
        "`statistics.safetensors`.",
    ]


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    method, text = record["method"], record["text"]
    rows = [
        ("method", f"{method['name']} ({method['source']})" if method.get("source") else method["name"]),
        (
            "importance, allocation, compensation",
            f"{method['importance']}, {method['allocation']}, {method['compensation']['kind']}",
        ),
        ("unit of attention", str(method["unit_kind"])),
        ("asked for", f"{record['ratio']:.1%} of the blocks' {method['budget']}"),
        ("left out", f"{record['removed_share']:.1%} of their parameters"),
        ("base model", str(record["base_model"] or "not known by name")),
        ("fingerprint of its weights", record["fingerprint"]),
        ("dtype of the statistics", record["dtype"]),
    ]
    if text:
        corpus = f"{record['corpus']}: " if isinstance(record.get("corpus"), str) else ""
        rows.append(("calibration", f"{corpus}{text['windows']} windows of {text['length']} tokens"))
    return [*rows, ("made with", ", ".join(f"{k} {v}" for k, v in record["versions"].items()))]


def quality(evaluation: Mapping[str, Any] | None) -> str:
    """A sentence on the perplexities that were measured, if any."""
    if evaluation is None:
        return "Quality was not measured."
    dense, pruned = evaluation["perplexity"]["dense"], evaluation["perplexity"]["pruned"]
    windows = f"{evaluation['windows']} windows of {evaluation['length']} tokens"
    return (
        f"Perplexity on {markdown(evaluation['corpus'])} (first {windows}): **{dense:.2f}** dense, "
        f"**{pruned:.2f}** pruned ({pruned / dense:.2f} times)."
    )
