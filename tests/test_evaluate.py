"""`probeprune eval`: figures are those of the library's own functions, and differences are paired."""

import json
import math
import re
import statistics

import pytest
import torch
from tiny import FAMILIES, token_ids

from probeprune import UsageError, attach, load_model, save
from probeprune.cli import app, run
from probeprune.data.windows import Text
from probeprune.evaluation.agreement import agreement
from probeprune.evaluation.greedy import greedy_agreement, greedy_texts
from probeprune.evaluation.harness import LiveModel
from probeprune.evaluation.named_tasks import evaluate_named
from probeprune.evaluation.perplexity import perplexity
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.jobs.evaluate import Wanted, evaluate
from probeprune.model import placing

WINDOWS = token_ids(8, 16, seed=9)


@pytest.fixture
def place(tmp_path, number_tokenizer, monkeypatch):
    """A folder with a dense model, one with a method attached, and a text."""
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    save(model, tmp_path / "base", tokenizer=number_tokenizer)
    with attach(model, "probe", 0.3, calibration=WINDOWS) as handle:
        save(handle, tmp_path / "kept", tokenizer=number_tokenizer)
    ids = token_ids(1, 16 * 12, seed=3)
    (tmp_path / "text.txt").write_text(" ".join(map(str, ids[0].tolist())))
    monkeypatch.chdir(tmp_path)
    return ids.view(12, 16)


def call(*arguments: str) -> int:
    sizes = "--texts", "text.txt", "--length", "16", "--windows", "6", "--batch-size", "4"
    greedy = "--prompts", "3", "--prompt-length", "8", "--new-tokens", "10"
    return run(lambda: app(["eval", *sizes, *greedy, *arguments]))


def test_a_kept_method_beside_its_base_in_one_table_and_one_file(place, capsys, tmp_path):
    assert call("kept", "--base", "base", "--json", "out.json", "--dtype", "float32") == 0
    table = capsys.readouterr().out
    assert "paired difference" in table and "top-1 agreement" in table and "exact match" in table
    record = json.loads((tmp_path / "out.json").read_text())
    figures = {f["metric"]: f for f in record["results"]}
    loaded, base = (load_model(folder, dtype="float32") for folder in ("kept", "base"))
    kept, windows = loaded.handle.kept, place[:6]
    own = perplexity(loaded.model, windows, batch_size=4)
    loaded.handle.detach()
    other = perplexity(base.model, windows, batch_size=4)
    shown = figures["perplexity"]
    assert (shown["value"], shown["base"]) == (own.value, other.value)
    apart = [a - b for a, b in zip(own.losses, other.losses, strict=True)]
    assert shown["change"] == pytest.approx(own.value / other.value)
    assert shown["change_error"] == pytest.approx(shown["change"] * statistics.stdev(apart) / math.sqrt(6))
    with attach(loaded.model, "probe", 0.3, calibration=WINDOWS):
        agreed = agreement(loaded.model, base.model, windows, batch_size=4)
    assert figures["top-1 agreement"]["value"] == agreed.top1
    told_apart = figures["KL divergence"]["value"]  # the 32 likeliest tokens; all others are one
    assert 0.5 * agreed.divergence < told_apart < agreed.divergence
    prompts = place.reshape(-1, 8)[:3]
    with attach(loaded.model, "probe", 0.3, calibration=WINDOWS):
        text = greedy_texts(loaded.model, prompts, new_tokens=10, batch_size=4)
    found = greedy_agreement(text, greedy_texts(base.model, prompts, new_tokens=10, batch_size=4))
    assert figures["greedy text, same before the first difference"]["value"] == found.same
    assert figures["greedy text, exact match"]["value"] == found.exact
    assert record["method"]["name"] == "probe" and record["removed_share"] > 0.2 and kept.ratio == 0.3


def test_a_model_beside_itself_agrees_in_everything(place, capsys):
    assert call("base", "--base", "base", "--json", "-", "--dtype", "float32") == 0
    figures = {f["metric"]: f for f in json.loads(capsys.readouterr().out)["results"]}
    assert figures["perplexity"]["change"] == 1 and figures["perplexity"]["change_error"] == 0
    assert figures["top-1 agreement"]["value"] == figures["greedy text, exact match"]["value"] == 1
    assert figures["KL divergence"]["value"] == pytest.approx(0, abs=1e-6)


def test_models_on_disk_have_the_same_figures(place, capsys, monkeypatch):
    """Less memory than a model takes: layers come from disk, under a method too."""
    monkeypatch.setattr(placing, "in_use", lambda device: (0, 1 << 40))
    monkeypatch.setattr(placing, "retained", lambda device: 0)
    monkeypatch.setattr(placing, "gib", lambda size: f"{size} bytes")
    text = "--calibration", "text.txt", "--calibration-windows", "4", "--dtype", "float32"
    command = "base", "--base", "base", "--method", "probe", "--ratio", "0.3", "--json", "-", *text
    assert call(*command) == 0
    there = json.loads(capsys.readouterr().out)["results"]
    assert call(*command, "--memory", "1KiB") == 2
    least = re.search(r"takes (\d+) bytes even a layer at a time", capsys.readouterr().err)
    assert least is not None
    memory = "--memory", f"{-(-int(least[1]) // 1024)}KiB"
    assert call(*command, *memory) == 2
    assert "where a method writes no text" in capsys.readouterr().err
    assert call(*command, *memory, "--prompts", "0") == 0
    shown = capsys.readouterr()
    assert "the layers stay on disk" in " ".join(shown.err.split())
    here = json.loads(shown.out)["results"]
    for one, two in zip([f for f in there if "greedy" not in f["metric"]], here, strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-5)


def test_a_method_by_name_is_the_same_as_one_kept(place, capsys):
    calibration = "--calibration", "text.txt", "--calibration-windows", "4", "--dtype", "float32"
    assert call("base", "--method", "wanda-sp", "--ratio", "0.3", "--json", "-", *calibration) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"]["name"] == "wanda-sp" and record["ratio"] == 0.3 and record["base"] is None
    assert [f["metric"] for f in record["results"]] == ["perplexity"]


def test_greedy_texts_are_compared_up_to_their_first_difference():
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    texts = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 4], [0, 6, 7, 8], [9, 9, 9, 0]])
    found = greedy_agreement(texts, reference)
    assert found.shares == (1, 0.5, 0, 0.75) and found.same == 0.5625 and found.exact == 0.25
    assert found.exact_error == pytest.approx(0.25)


def test_tasks_are_paired_item_by_item(smollm2_tasks):
    loaded, base = smollm2_tasks
    wanted = Wanted(tasks=("piqa",), limit=6, batch_size=4)
    (figure,) = evaluate(loaded, wanted, base=base)
    own, other = (
        evaluate_task(m.model, m.tokenizer, "piqa", TaskSettings(limit=6, batch_size=4))
        for m in (loaded, base)
    )
    assert (figure.value, figure.error) == (own.value, own.error) and figure.base == other.value
    apart = [float(a) - float(b) for a, b in zip(own.correct_norm, other.correct_norm, strict=True)]
    assert figure.change_error == pytest.approx(statistics.stdev(apart) / math.sqrt(6))


def test_a_task_by_name_is_scored_as_the_harness_scores_it(smollm2_tasks, tmp_path):
    loaded, _ = smollm2_tasks
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{i} {i + 1}", "a": i % 2}) + "\n" for i in range(8))
    )
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
    (tmp_path / "numbers.yaml").write_text(
        f"task: numbers\n{data}test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: ['5', '60 7']\ndoc_to_target: a\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    lm = LiveModel(loaded.model, loaded.tokenizer, batch_size=4)
    (found,) = evaluate_named(lm, str(tmp_path / "numbers.yaml"), limit=6)
    assert found.task == "numbers" and found.metric == "acc_norm" and len(found.items) == 6
    assert found.value == pytest.approx(statistics.fmean(found.items))
    assert found.error == pytest.approx(statistics.stdev(found.items) / math.sqrt(6))


@pytest.fixture
def smollm2_tasks(number_tokenizer):
    """Two tiny models with a tokenizer that knows numbers alone: every text is a row of unknowns."""
    from probeprune.model.loading import LoadedModel

    made = []
    for family in ("llama-gqa", "qwen2"):
        model = FAMILIES[family]()
        model.resize_token_embeddings(1002)
        device, dtype = torch.device("cpu"), torch.float32
        made.append(LoadedModel(family, model, number_tokenizer, dtype, device, stored_dtype=dtype))
    return made


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("base", "--method", "probe"), "--method and --ratio go together"),
        (("kept", "--method", "probe", "--ratio", "0.3"), "keeps a method of its own"),
        (("base", "--tasks", "piqa,divination"), "has no task 'divination'"),
        (("base", "--base", "nothing/here"), "unknown model 'nothing/here'"),
        (("base", "--base", "kept"), "keeps a model with method 'probe' attached"),
        (("base", "--method", "wanda-sp+lora", "--ratio", "0.3"), "trains the model"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, arguments, sentence):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("probeprune: ") == 1


def test_models_of_two_vocabularies_and_nothing_to_measure_are_refused(smollm2_tasks):
    loaded, base = smollm2_tasks
    base.model.resize_token_embeddings(1000)
    with pytest.raises(UsageError, match="the base model's vocabulary has 1000 tokens"):
        evaluate(loaded, Wanted(texts=(Text("wikitext2", 2, 16),)), base=base)
    with pytest.raises(UsageError, match="nothing to measure"):
        Wanted()
