"""`--model probeprune` in the LM evaluation harness: the same numbers as our own adapter, masks and all."""

import copy
import json
import sys

import lm_eval
import pytest
import torch
from tiny import FAMILIES, token_ids

import probeprune.lm_eval
from probeprune import UsageError, attach, load_model, save
from probeprune.evaluation.harness import load_task
from probeprune.evaluation.task_data import TASKS
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.lm_eval.__main__ import main

WINDOWS = token_ids(4, 16, seed=9)


@pytest.fixture
def place(tmp_path, number_tokenizer, monkeypatch):
    """A dense model, one with a method attached, and a task of the harness with its data."""
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    tokenizer = copy.deepcopy(number_tokenizer)
    tokenizer.eos_token = "<s>"  # the harness stops at it
    save(model, tmp_path / "base", tokenizer=tokenizer)
    with attach(model, "probe", 0.3, calibration=WINDOWS) as handle:
        save(handle, tmp_path / "kept", tokenizer=tokenizer)
    rows = [{"q": " ".join(str(5 * i + j) for j in range(1 + i % 5)), "a": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
    (tmp_path / "tasks").mkdir()
    for name, kind in (("choices", "multiple_choice"), ("texts", "generate_until")):
        how = (
            "doc_to_choice: ['5', '60 7 8']\n"
            if name == "choices"
            else "generation_kwargs: {max_gen_toks: 5}\n"
        )
        metric = "acc" if name == "choices" else "exact_match"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\n{data}test_split: test\noutput_type: {kind}\ndoc_to_text: '{{{{q}}}}'\n{how}"
            f"doc_to_target: a\nmetric_list: [{{metric: {metric}}}]\n"
        )
    return tmp_path


def arguments(place, **more):
    model = {"pretrained": str(place / "base"), "dtype": "float32", **more}
    return ",".join(f"{k}={v}" for k, v in model.items())


@pytest.mark.parametrize("kept", [True, False])
def test_numbers_are_those_of_our_own_adapter(place, kept):
    """Two embedded tasks in one run: neither sees the other's history."""
    how = TaskSettings(limit=6, batch_size=4)
    loaded = load_model(str(place / "kept"))
    attachment = loaded.handle.kept
    if not kept:
        loaded.handle.detach()
    given = {"pretrained": str(place / "kept")} if kept else {}
    lm = probeprune.lm_eval.PrunedLM(
        **{"pretrained": str(place / "base"), "dtype": "float32", **given}, batch_size="4", device="cpu"
    )
    tasks = ["piqa", "arc_easy"]
    objects = [load_task(TASKS[t], limit=6) for t in tasks]
    manager = lm_eval.tasks.TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=objects, task_manager=manager, limit=6, bootstrap_iters=0)
    for task in tasks:
        if kept:
            from probeprune.runtime.attaching import attach_again

            loaded.handle.detach()
            with attach_again(loaded.model, attachment):
                own = evaluate_task(loaded.model, loaded.tokenizer, task, how)
        else:
            own = evaluate_task(loaded.model, loaded.tokenizer, task, how)
        samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        scored = [tuple(float(r[0]) for r in s["filtered_resps"]) for s in samples]
        assert scored == list(own.loglikelihoods)
        assert found["results"][task]["acc,none"] == own.acc


def run_command(monkeypatch, place, *more):
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", "--model", "probeprune", *more, "--include_path", str(place / "tasks")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_harness_command_line_scores_and_generates(place, monkeypatch, capsys):
    text = " ".join(str(t) for t in token_ids(1, 400, seed=3)[0].tolist())
    (place / "text.txt").write_text(text)
    calibrated = {"method": "probe", "ratio": 0.3, "calibration": str(place / "text.txt")}
    given = arguments(place, **calibrated, calibration_windows=4, length=16)
    sizes = ["--limit", "8", "--batch_size", "4", "--device", "cpu", "--output_path", "out.json"]
    sizes += ["--tasks", "choices,texts"]
    assert run_command(monkeypatch, place, "--model_args", given, *sizes, "--log_samples") == 0
    assert "|choices|" in capsys.readouterr().out
    (file,) = place.glob("out_*.json")
    results = json.loads(file.read_text())
    assert {"choices", "texts"} <= results["results"].keys()
    assert results["config"]["model_args"]["method"] == "probe"


def test_generated_texts_are_those_of_a_masked_left_padded_batch(place):
    lm = probeprune.lm_eval.PrunedLM(str(place / "kept"), batch_size=4)
    manager = lm_eval.tasks.TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["texts"], task_manager=manager, limit=4)
    samples = sorted(found["samples"]["texts"], key=lambda s: s["doc_id"])
    loaded = load_model(str(place / "kept"))
    loaded.tokenizer.padding_side = "left"
    order = sorted(samples, key=lambda s: (-len(s["doc"]["q"].split()), s["doc"]["q"]))
    ids = loaded.tokenizer([s["doc"]["q"] for s in order], return_tensors="pt", padding=True)
    made = loaded.model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    own = {s["doc_id"]: loaded.tokenizer.decode(row[-5:]) for s, row in zip(order, made, strict=True)}
    assert [s["filtered_resps"][0].split() for s in samples] == [own[s["doc_id"]].split() for s in samples]


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"method": "probe"}, "method and ratio go together"),
        ({"colour": "red"}, "unknown model argument 'colour'"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"pretrained": "KEPT", "method": "probe", "ratio": 0.3}, "keeps a method of its own"),
    ],
)
def test_bad_arguments_are_one_sentence(place, more, sentence):
    if more.get("pretrained") == "KEPT":
        more = {**more, "pretrained": str(place / "kept")}
    with pytest.raises(UsageError, match=sentence):
        probeprune.lm_eval.PrunedLM(**{"pretrained": str(place / "base"), "dtype": "float32", **more})


def test_an_error_on_the_command_line_is_one_sentence(place, monkeypatch, capsys):
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate",
        lambda: probeprune.lm_eval.PrunedLM(str(place / "base"), method="prob", ratio=0.3),
    )
    assert run_command(monkeypatch, place) == 2
    assert "unknown method 'prob'; did you mean 'probe'?" in capsys.readouterr().err


@pytest.mark.parametrize("method, warned", [("probe", True), ("flap", False)])
def test_padding_without_a_mask_is_said_once_under_a_dynamic_method(method, warned, recwarn):
    model = FAMILIES["llama-gqa"]()
    model.config.pad_token_id = 3
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 3, 3]])
    with attach(model, method, 0.3, calibration=WINDOWS):
        model(ids, attention_mask=(ids != 3).long())
        model(ids[:1])
        assert not [w for w in recwarn if "attention mask" in str(w.message)]
        model(ids)
        model(ids)
    assert len([w for w in recwarn if "give attention_mask" in str(w.message)]) == warned


def test_a_padding_token_that_ends_texts_counts_only_where_rows_differ(recwarn):
    model = FAMILIES["llama-gqa"]()
    model.config.pad_token_id = model.config.eos_token_id = 3
    with attach(model, "full-batch", 0.3):
        model(torch.tensor([[5, 6, 3], [7, 8, 3]]))
        assert not [w for w in recwarn if "attention mask" in str(w.message)]
        model(torch.tensor([[5, 6, 9], [7, 8, 3]]))
    assert [w for w in recwarn if "give attention_mask" in str(w.message)]
