"""What was run, on what text and machine, as headings and short sentences."""

from collections.abc import Iterable, Sequence
from typing import Any

from probeprune.report.grouping import metric, protocol
from probeprune.report.reading import Row

_TEXT = ("{task}", "{windows} windows", "{length} tokens each", "batches of {batch_size}")
_COST = ("prefill of {batch_size} x {length}", "{new_tokens} tokens decoded", "{rounds} interleaved rounds")
_TRAINING = ("{steps} steps of {batch_size} x {length} tokens of {corpus}", "learning rate {learning_rate}")
_MACHINE = ("{dtype}", "{device}", "{threads} threads")


def facts(results: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Headings and what there is to say under each; what no line says is left out."""
    texts, tasks, costs = ([r for r in results if metric(r) == m] for m in ("perplexity", "accuracy", "cost"))
    found = [
        ("Model", _different(r.get("model") for r in results)),
        ("Text", _different(_sentence(r, _TEXT) for r in texts)),
        *(
            (
                f"Tasks, {name} protocol",
                _different(
                    f"{r['task']}: {_sentence(r, ('{items} items', '{main}'))}"
                    for r in tasks
                    if protocol(r) == name
                ),
            )
            for name in dict.fromkeys(map(protocol, tasks))
        ),
        ("Cost", _different(_sentence(r, _COST) for r in costs)),
        ("Training", _different(_sentence(r["training"], _TRAINING) for r in results if r.get("training"))),
        ("Seeds", [", ".join(_different(sorted(r["seed"] for r in results if "seed" in r)))]),
        ("Machine", _different(_sentence(r, _MACHINE) for r in results)),
        (
            "Versions",
            _different(", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()) for r in results),
        ),
    ]
    return [(head, said) for head, said in found if any(said)]


def _different(said: Iterable[Any]) -> list[str]:
    return [str(s) for s in dict.fromkeys(said) if s not in (None, "")]


def _sentence(row: Row, parts: Sequence[str]) -> str:
    """Those parts whose figures the line has."""
    known = {k: v for k, v in row.items() if v is not None}
    said = []
    for part in parts:
        try:
            said.append(part.format_map(known))
        except KeyError:
            continue  # an optional part of a line
    return ", ".join(said)
