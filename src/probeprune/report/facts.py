"""The setup of a run, its models, texts, tasks and machine, as headings and short phrases."""

from collections.abc import Iterable, Mapping, Sequence

from probeprune.report.grouping import of_metric, unique
from probeprune.result_lines import Line

_TEXT = ("{task}", "{windows} windows", "{length} tokens each", "batches of {batch_size}")
_COST = ("prefill of {batch_size} x {length}", "{new_tokens} tokens decoded", "{rounds} interleaved rounds")
_TRAINING = ("{steps} steps of {batch_size} x {length} tokens of {corpus}", "learning rate {learning_rate}")
_MACHINE = ("{dtype}", "{device}", "{threads} threads")


def facts(results: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """Headings and the phrases under each; headings without phrases are left out."""
    texts, tasks, costs = (of_metric(results, m) for m in ("perplexity", "accuracy", "cost"))
    protocols = [
        (
            f"Tasks, {protocol} protocol",
            _distinct(
                f"{line['task']}: {_phrase(line, ('{items} items', '{main}'))}"
                for line in tasks
                if line["protocol"] == protocol
            ),
        )
        for protocol in unique(line["protocol"] for line in tasks)
    ]
    trainings = [training for line in results if (training := line.get("training"))]
    versions = (line.get("versions", {}) for line in results)
    sections = [
        ("Model", _distinct(line.get("model") for line in results)),
        ("Text", _distinct(_phrase(line, _TEXT) for line in texts)),
        *protocols,
        ("Cost", _distinct(_phrase(line, _COST) for line in costs)),
        ("Training", _distinct(_phrase(training, _TRAINING) for training in trainings)),
        ("Seeds", [", ".join(_distinct(sorted(line["seed"] for line in results if "seed" in line)))]),
        ("Machine", _distinct(_phrase(line, _MACHINE) for line in results)),
        ("Versions", _distinct(", ".join(f"{k} {v}" for k, v in own.items()) for own in versions)),
    ]
    return [(heading, phrases) for heading, phrases in sections if any(phrases)]


def _distinct(values: Iterable[object]) -> list[str]:
    return [str(value) for value in unique(values) if value not in (None, "")]


def _phrase(record: Mapping[str, object], parts: Sequence[str]) -> str:
    """The parts whose values the record has, separated by commas."""
    values = {key: value for key, value in record.items() if value is not None}
    filled = []
    for part in parts:
        try:
            filled.append(part.format_map(values))
        except KeyError:
            continue  # the record lacks an optional value
    return ", ".join(filled)
