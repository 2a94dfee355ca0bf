"""The seven commonsense tasks of the published tables and their items.

Items come from files that ship with the package. They are converted to the columns of the data set that the
LM evaluation harness reads for the task, so that the harness' own prompts and metrics apply. Knows nothing of
the harness itself, of models or of scoring.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from probeprune.data.corpora import ASSETS
from probeprune.errors import UsageError, unknown
from probeprune.foreign.reading import read_text

Row = dict[str, Any]
"""One item of a task, by column of the harness' data set."""

Metric = Literal["acc", "acc_norm"]


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    Attributes:
        name: the harness' name of the task.
        title: its name in published tables.
        items: number of items in the complete split.
        metric: the harness' metric used in published tables: accuracy normalised by the length of the options
            (`acc_norm`) wherever options differ in length, as in Probe Pruning (ICLR 2025). LLM-Pruner's
            tables use plain accuracy for PIQA and ARC-e.
        folder: path of the task in the harness' `tasks` folder.
        file: file name in the assets folder; assets/README.md gives its origin and licence.
        convert: turns the file's text into items.
    """

    name: str
    title: str
    items: int
    metric: Metric
    folder: str
    file: str
    convert: Callable[[str], list[Row]]


def get_task(name: str) -> Task:
    """The task called `name`. Raises `UsageError` for an unknown name."""
    if name not in TASKS:
        raise UsageError(unknown("task", name, TASKS))
    return TASKS[name]


def load_rows(task: Task) -> list[Row]:
    """All items of a task, in the order of the official split.

    Raises `UsageError` for a file that is missing, damaged or incomplete.
    """
    path = ASSETS / task.file
    text = read_text(path)
    try:
        rows = task.convert(text)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"file '{path}' does not hold the items of {task.name} ({error!r}); install it again."
        ) from error
    if len(rows) != task.items:
        raise UsageError(
            f"file '{path}' holds {len(rows)} items of {task.name}, not {task.items}; install it again."
        )
    return rows


def _json_lines(text: str) -> list[Row]:
    # str.splitlines would also break at characters that are allowed inside a JSON string.
    return [json.loads(line) for line in text.split("\n") if line]


def _boolq(text: str) -> list[Row]:
    """The file has passage and question in one string; the last `Question:` begins the question."""
    rows = []
    for item in _json_lines(text):
        passage, question = item["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
        # In 22 passages the file has "\nQuestion" in place of " question".
        passage = passage.replace("\nQuestion", " question")
        rows.append({"passage": passage, "question": question.removesuffix("?"), "label": item["gold"]})
    return rows


def _piqa(text: str) -> list[Row]:
    rows = []
    for item in _json_lines(text):
        goal = item["query"].removeprefix("Question: ").removesuffix("\n")
        first, second = item["choices"]
        rows.append({"goal": goal, "sol1": first, "sol2": second, "label": item["gold"]})
    return rows


def _hellaswag(text: str) -> list[Row]:
    """An item has six lines: label and context, the index of the right ending, four endings.

    The harness capitalises the last part of the context, which the endings complete. In a video caption this
    part follows the last full sentence; a how-to article ends with a full stop and has no such part.
    """
    lines = text.removesuffix("\n").split("\n")
    rows = []
    for start in range(0, len(lines), 6):
        first, gold, *endings = lines[start : start + 6]
        label, context = first.split(": ", 1)
        begun = ""
        if not context.endswith("."):
            cut = 1 + max(context.rfind(mark) for mark in (". ", "! ", "? "))
            context, begun = context[:cut], context[cut:].removeprefix(" ")
        rows.append(
            {
                "activity_label": label,
                "ctx_a": context,
                "ctx_b": begun,
                "endings": endings,
                "label": str(int(gold)),
            }
        )
    return rows


def _winogrande(text: str) -> list[Row]:
    """The file has the blank filled in: each option is the sentence up to and including the filled blank.

    Items therefore begin with the blank. The harness reads only the text up to the option and the text after
    the blank, which are the same.
    """
    rows = []
    for item in _json_lines(text):
        first, second = item["context_options"]
        rows.append(
            {
                "sentence": "_ " + item["continuation"],
                "option1": first,
                "option2": second,
                "answer": str(item["gold"] + 1),
            }
        )
    return rows


def _arc(text: str) -> list[Row]:
    rows = []
    for item in _json_lines(text):
        choices = item["question"]["choices"]
        rows.append(
            {
                "id": item["id"],
                "question": item["question"]["stem"],
                "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")},
                "answerKey": item["answerKey"],
            }
        )
    return rows


def _openbookqa(text: str) -> list[Row]:
    rows = []
    for item in _json_lines(text):
        labels = ["A", "B", "C", "D"]
        rows.append(
            {
                "question_stem": item["query"],
                "choices": {"text": item["choices"], "label": labels},
                "answerKey": labels[item["gold"]],
            }
        )
    return rows


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("boolq", "BoolQ", 3270, "acc", "super_glue/boolq", "boolq.jsonl.gz", _boolq),
        Task("piqa", "PIQA", 1838, "acc_norm", "piqa", "piqa.jsonl.gz", _piqa),
        Task(
            "hellaswag", "HellaSwag", 10042, "acc_norm", "hellaswag", "hellaswag_val_full.txt.bz2", _hellaswag
        ),
        Task("winogrande", "WinoGrande", 1267, "acc", "winogrande", "winogrande.jsonl.gz", _winogrande),
        Task("arc_easy", "ARC-e", 2376, "acc_norm", "arc", "arc_easy_test.jsonl.gz", _arc),
        Task("arc_challenge", "ARC-c", 1172, "acc_norm", "arc", "arc_challenge_test.jsonl.gz", _arc),
        Task("openbookqa", "OBQA", 500, "acc_norm", "openbookqa", "openbook_qa.jsonl.gz", _openbookqa),
    )
}
