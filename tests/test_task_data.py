"""Task items: the requests are those the harness makes of the official data, and every file is complete."""

import gzip
import hashlib

import lm_eval.tasks
import pytest

from probeprune.data.corpora import ASSETS
from probeprune.errors import UsageError
from probeprune.evaluation import harness, task_data
from probeprune.evaluation.task_data import TASKS, load_rows
from probeprune.foreign.reading import read_text

OFFICIAL = {
    "boolq": {
        "passage": "The axis in question lies\nelsewhere.",
        "question": "is it moving",
        "label": 1,
    },
    "piqa": {"goal": "How do I open a jar?", "sol1": "Turn the lid.", "sol2": "Turn the jar in.", "label": 0},
    "hellaswag": {
        "activity_label": "Canoeing",
        "ctx_a": "A man sits in a canoe. Two women watch.",
        "ctx_b": "the man",
        "endings": ["rows.", "sings.", "sleeps [step] well.", "waves  back."],
        "label": "2",
    },
    "winogrande": {
        "sentence": "Sarah was a better surgeon than Maria so _ always got the easier cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "arc_easy": {
        "id": "x",
        "question": "Which is a plant?",
        "choices": {"text": ["a dog", "a rock", "a fern"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    "arc_challenge": {
        "id": "y",
        "question": "Which is the largest?",
        "choices": {"text": ["1", "20", "3", "4", "5"], "label": ["A", "B", "C", "D", "E"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "id": "z",
        "question_stem": "Predators eat",
        "choices": {"text": ["lions", "humans", "bunnies", "grass"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    },
}
"""An item of each task as the hub serves it."""

OURS = {
    "boolq": '{"query": "Passage: The axis in\\nQuestion lies\\nelsewhere.\\nQuestion: is it moving?",'
    ' "choices": ["no", "yes"], "gold": 1}\n',
    "piqa": '{"query": "Question: How do I open a jar?\\n", "choices": ["Turn the lid.", "Turn the jar in."],'
    ' "gold": 0}\n',
    "hellaswag": "Canoeing: A man sits in a canoe. Two women watch. the man\n2\nrows.\nsings.\nsleeps well.\n"
    "waves back.\n",
    "winogrande": '{"context_options": ["Sarah was a better surgeon than Maria so Sarah", '
    '"Sarah was a better surgeon than Maria so Maria"], "continuation": "always got the easier cases.", '
    '"gold": 1}\n',
    "arc_easy": '{"id": "x", "question": {"stem": "Which is a plant?", "choices": [{"text": "a dog", '
    '"label": "1"}, {"text": "a rock", "label": "2"}, {"text": "a fern", "label": "3"}]}, '
    '"answerKey": "3"}\n',
    "arc_challenge": '{"id": "y", "question": {"stem": "Which is the largest?", "choices": [{"text": "1", '
    '"label": "A"}, {"text": "20", "label": "B"}, {"text": "3", "label": "C"}, {"text": "4", "label": "D"}, '
    '{"text": "5", "label": "E"}]}, "answerKey": "B"}\n',
    "openbookqa": '{"query": "Predators eat", "choices": ["lions", "humans", "bunnies", "grass"], '
    '"gold": 2}\n',
}
"""The same item in the layout of our files."""

HOW_TO = {
    "activity_label": "Youth",
    "ctx_a": "[header] How to rest [title] Sit down. [step] Find a chair.",
    "ctx_b": "",
    "endings": ["Then sit. [substeps] Rest.", "Run.", "Jump. [title] Fall.", "Sing."],
    "label": "0",
}
HOW_TO_OURS = "Youth: How to rest. Sit down. Find a chair.\n0\nThen sit. Rest.\nRun.\nJump.. Fall.\nSing.\n"


def built_in(name, rows):
    """The harness' task as it comes, but for where its items are."""
    folder = f"{lm_eval.tasks.__path__[0]}/{TASKS[name].folder}"
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    items = {"items": harness.datasets.Dataset.from_list(rows)}
    changes = {"custom_dataset": lambda **_: items, "training_split": None}
    splits = {"validation_split": "items", "test_split": None}
    group = {"group": "g", "task": [{"task": name, **changes, **splits}]}
    task = manager.load(group)["tasks"][name]
    task.build_all_requests()
    return task


def asked(task):
    return [(r.args, r.idx, harness.right_option(task, r.doc)) for r in task.instances]


@pytest.mark.parametrize("name", TASKS)
def test_requests_are_those_of_the_harness_on_official_items(name):
    rows = TASKS[name].convert(OURS[name])
    assert len(rows) == 1
    assert asked(built_in(name, rows)) == asked(built_in(name, [OFFICIAL[name]]))


def test_how_to_articles_have_no_begun_sentence():
    rows = TASKS["hellaswag"].convert(HOW_TO_OURS)
    assert asked(built_in("hellaswag", rows)) == asked(built_in("hellaswag", [HOW_TO]))


def test_a_marker_in_front_of_an_ending_is_the_one_thing_lost():
    # There the harness asks for an ending with two blanks in front; our copy does not know where that was.
    official = {**HOW_TO, "endings": ["[substeps] Then sit. Rest.", *HOW_TO["endings"][1:]]}
    (context, ending), *_ = asked(built_in("hellaswag", [official]))[0]
    assert ending == "  Then sit. Rest."
    assert asked(built_in("hellaswag", TASKS["hellaswag"].convert(HOW_TO_OURS)))[0][0] == (
        context,
        ending[1:],
    )


def test_requests_spelled_out():
    # The test above compares two conversions; this one says what a model is asked.
    def first(name):
        return [r.args for r in harness.questions(harness.load_task(TASKS[name], limit=1))[0]]

    assert first("winogrande") == [
        (f"Sarah was a much better surgeon than Maria so {who}", " always got the easier cases.")
        for who in ("Sarah", "Maria")
    ]
    context = "Roof shingle removal: A man is sitting on a roof. He"
    assert first("hellaswag")[3] == (context, " starts pulling up roofing on a roof.")
    assert first("boolq")[1][0].endswith(
        "than producing gasoline.\nQuestion: does ethanol take more energy make that produces?\nAnswer:"
    )
    assert [r[1] for r in first("boolq")] == [" no", " yes"]
    assert (
        first("piqa")[0][0] == "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    )


@pytest.mark.parametrize("name", TASKS)
def test_files_are_complete_and_the_ones_the_readme_names(name):
    task = TASKS[name]
    rows = load_rows(task)
    assert len(rows) == task.items
    text = read_text(ASSETS / task.file)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert f"{digest}  {task.file.rsplit('.', 1)[0]}" in (ASSETS / "README.md").read_text()


def test_begun_sentences_of_all_video_captions_are_found():
    # A wrong cut would begin in the middle of a sentence, or leave a capital inside what is begun.
    begun = [r["ctx_b"] for r in load_rows(TASKS["hellaswag"]) if r["ctx_b"]]
    assert len(begun) == 3243
    assert all(part == part.lower() for part in begun)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "piqa.jsonl.gz' cannot be read"),
        (b"not packed", "piqa.jsonl.gz' cannot be read"),
        (gzip.compress(b"no json\n", mtime=0), "piqa.jsonl.gz' does not hold the items of piqa"),
        (
            gzip.compress(b'{"query": "Question: a\\n"}\n', mtime=0),
            "piqa.jsonl.gz' does not hold the items of piqa",
        ),
        (gzip.compress(OURS["piqa"].encode(), mtime=0), "holds 1 items of piqa, not 1838"),
    ],
    # Packed bytes name the second they were made in; workers must give a test one name.
    ids=["missing", "not packed", "no JSON", "no items", "too few"],
)
def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(task_data, "ASSETS", tmp_path)
    if content is not None:
        (tmp_path / "piqa.jsonl.gz").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_rows(TASKS["piqa"])


def test_metrics_are_those_of_published_tables():
    accuracy = {name for name, task in TASKS.items() if task.metric == "acc"}
    assert accuracy == {"boolq", "winogrande"}
    assert all(task.metric == "acc_norm" for name, task in TASKS.items() if name not in accuracy)
