"""Tasks: the harness' own results on our items, a mask on every pass, two protocols kept apart."""

import copy
import logging
import math

import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tiny import FAMILIES, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probeprune import UsageError, attach, compose
from probeprune.evaluation import harness, published
from probeprune.evaluation.likelihood import Request, make_batches, score
from probeprune.evaluation.task_data import TASKS, load_rows
from probeprune.evaluation.tasks import TaskSettings, evaluate_task
from probeprune.progress import silent
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

MOVING = compose("probe", when=ProbeEveryBatch(decay=0.1))
"""Its history is mostly the last batch, so that it decides."""

MAX_LENGTH = 300
"""Enough for every option of the tests, not for BoolQ's passages."""


@pytest.fixture(scope="module")
def tokenizer():
    """Pieces of words, as many as the tiny models know; no token of its own to pad with."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=126, special_tokens=["<unk>", "<eos>"])
    backend.train_from_iterator((row["question_stem"] for row in load_rows(TASKS["openbookqa"])), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def llama():
    model = FAMILIES["llama-gqa"]()
    model.config.max_position_embeddings = MAX_LENGTH  # rotary positions have no end of their own
    return model


@pytest.fixture(scope="module")
def calibration(llama):
    return token_ids(6, 16, seed=9)


def evaluate(model, tokenizer, task, progress=silent, **settings):
    return evaluate_task(model, tokenizer, task, TaskSettings(**settings), progress=progress)


def assert_close(ours, theirs):
    """Log-likelihoods of the same options of the same items."""
    assert [len(o) for o in ours] == [len(t) for t in theirs]
    flat = [x for options in ours for x in options]
    assert flat == pytest.approx([x for options in theirs for x in options], rel=1e-5)


def test_the_first_items_are_taken(llama, tokenizer):
    four, two = (evaluate(llama, tokenizer, "piqa", limit=n, order="given") for n in (4, 2))
    assert (four.items, two.items) == (4, 2)
    assert_close(two.loglikelihoods, four.loglikelihoods[:2])


# -- results ---------------------------------------------------------------------------------------


def peer(model, tokenizer, name, limit, **options):
    """Samples and figures of the harness with its own model class."""
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), **options)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[harness.load_task(TASKS[name], limit=limit)],
        limit=limit,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    return samples, results["results"][name]


def assert_equals_peer(result, samples, figures):
    assert len(samples) == result.items
    assert_close(result.loglikelihoods, [[float(r[0]) for r in s["filtered_resps"]] for s in samples])
    assert result.correct == tuple(s["acc"] == 1 for s in samples)
    assert (result.acc, result.acc_error) == pytest.approx((figures["acc,none"], figures["acc_stderr,none"]))
    if "acc_norm,none" in figures:
        assert result.correct_norm == tuple(s["acc_norm"] == 1 for s in samples)
        assert (result.acc_norm, result.acc_norm_error) == pytest.approx(
            (figures["acc_norm,none"], figures["acc_norm_stderr,none"])
        )
    else:
        assert result.correct_norm is result.acc_norm is result.acc_norm_error is None


@pytest.mark.parametrize("name", TASKS)
def test_results_are_the_harness_own(llama, tokenizer, name):
    # BoolQ's passages are longer than this model: they lose their front as there.
    result = evaluate(llama, tokenizer, name, limit=12)
    assert_equals_peer(result, *peer(llama, tokenizer, name, 12, batch_size=4))
    assert (result.truncated > 0) == (name == "boolq")


@pytest.mark.parametrize("family", ["gemma2", "opt", "opt-post-norm", "gpt-neox"])
def test_results_are_the_harness_own_in_other_families(tokenizer, family):
    model = FAMILIES[family]()
    result = evaluate(model, tokenizer, "openbookqa", limit=6)
    assert_equals_peer(result, *peer(model, tokenizer, "openbookqa", 6, batch_size=1))


@pytest.mark.parametrize("method", ["dense", "wanda-sp"])
def test_results_do_not_depend_on_batches(llama, calibration, tokenizer, method):
    with attach(llama, method, 0.3, calibration=calibration):
        results = [
            evaluate(llama, tokenizer, "openbookqa", limit=10, batch_size=size, order=order)
            for size in (1, 4, 16)
            for order in ("length", "given")
        ]
    first = results[0]
    assert first.padding == 0 and max(r.padding for r in results) > 0.1
    for result in results[1:]:
        assert result.acc == first.acc and result.acc_norm == first.acc_norm
        assert_close(result.loglikelihoods, first.loglikelihoods)


def test_the_live_model_is_one_for_the_harness_itself(llama, tokenizer):
    result = evaluate(llama, tokenizer, "openbookqa", limit=6)
    results = lm_eval.simple_evaluate(
        model=harness.LiveModel(llama, tokenizer),
        tasks=[harness.load_task(TASKS["openbookqa"], limit=6)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    samples = sorted(results["samples"]["openbookqa"], key=lambda s: s["doc_id"])
    assert_equals_peer(result, samples, results["results"]["openbookqa"])


def test_counts(llama, tokenizer):
    seen = []
    result = evaluate(llama, tokenizer, "arc_easy", limit=5, batch_size=8, progress=lambda *p: seen.append(p))
    options = sum(map(len, result.loglikelihoods))
    assert seen == [("scoring", n, options) for n in [*range(8, options, 8), options]]
    assert result.batches == len(seen)
    lm = harness.LiveModel(llama, tokenizer)
    task = harness.load_task(TASKS["arc_easy"], limit=5)
    lengths = [min(len(tokenizer("".join(r.args))["input_ids"]) - 1, MAX_LENGTH) for r in task.instances]
    assert result.tokens == sum(lengths)
    lengths.sort(reverse=True)
    run = sum(len(lengths[i : i + 8]) * lengths[i] for i in range(0, options, 8))
    assert result.padding == pytest.approx(1 - sum(lengths) / run)
    assert lm.tokenizer.pad_token is not None and tokenizer.pad_token is None


def test_the_harness_keeps_silent_and_leaves_things_as_they_were(llama, tokenizer, capfd):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    evaluate(llama, tokenizer, "hellaswag", limit=2)
    assert capfd.readouterr() == ("", "")
    assert logger.level == level
    assert all(p.equal(before[n]) for n, p in llama.named_parameters())


# -- padding ---------------------------------------------------------------------------------------


def unequal_requests():
    """Token 0, which fills up batches, is a token like any other in some of them."""
    ids = token_ids(4, 30).tolist()
    return [
        Request(ids[0][:20], ids[0][20:]),
        Request([0, *ids[1][:6]], [7, 0]),
        Request(ids[2][:3], [0]),
        Request(ids[3][:14], ids[3][14:19]),
    ]


def slow_likelihoods(model, requests, front, back):
    """From the model's whole logits in float64, with extra padding on both sides."""
    longest = max(len(r.context) + len(r.continuation) for r in requests) - 1
    ids = torch.full((len(requests), front + longest + back), 5)
    mask = torch.zeros_like(ids)
    for row, r in enumerate(requests):
        tokens = torch.tensor([*r.context, *r.continuation][:-1])
        ids[row, front : front + len(tokens)] = tokens
        mask[row, front : front + len(tokens)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits.double().log_softmax(-1)
    return [
        sum(
            float(logits[row, front + len(r.context) - 1 + i, token])
            for i, token in enumerate(r.continuation)
        )
        for row, r in enumerate(requests)
    ]


@pytest.mark.parametrize(
    ("method", "padding"),
    # A probe takes a share of the batch's positions, padding included: its size must not change.
    [(MOVING, (0, 0)), *((m, p) for m in ("dense", "full-batch") for p in [(0, 0), (0, 25), (9, 4)])],
)
def test_padding_never_enters(llama, calibration, method, padding):
    requests = unequal_requests()
    kept, results = [], []
    for run in (
        lambda: score(llama, requests, [[0, 1, 2, 3]], max_length=MAX_LENGTH).loglikelihoods,
        lambda: slow_likelihoods(llama, requests, *padding),
    ):
        with attach(llama, method, 0.3, calibration=calibration) as handle:
            first = run()
            kept.append(handle.kept_units())
            second = score(llama, requests, [[2, 3, 1, 0]], max_length=MAX_LENGTH)  # by history moved so far
            results.append([first, second.loglikelihoods])
    assert kept[0] == kept[1]
    assert_close(*results)


def test_without_a_mask_padding_would_enter(llama, calibration, tokenizer):
    # The trap: the harness' own model class runs the same batches unmasked.
    task = harness.load_task(TASKS["openbookqa"], limit=6)
    kept = []
    for build in (
        lambda: harness.LiveModel(llama, tokenizer, batch_size=24),
        lambda: HFLM(pretrained=llama, tokenizer=copy.deepcopy(tokenizer), batch_size=24, logits_cache=False),
    ):
        with attach(llama, "full-batch", 0.3, calibration=calibration) as handle:
            build().loglikelihood(task.instances, disable_tqdm=True)
            kept.append(handle.kept_units())
    assert kept[0] != kept[1]


def test_a_likelihood_against_a_slow_version(llama):
    requests = unequal_requests()
    scores = score(llama, requests, make_batches(requests, 3, "length"), max_length=MAX_LENGTH)
    assert scores.loglikelihoods == pytest.approx(slow_likelihoods(llama, requests, 0, 0), rel=1e-6)
    assert scores.greedy == (False,) * 4
    with torch.no_grad():
        best = int(llama(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert score(llama, [Request([5, 6, 7], [best])], [[0]], max_length=MAX_LENGTH).greedy == (True,)


def test_dynamic_results_depend_on_batches_and_history(llama, calibration, tokenizer):
    # By design; whoever compares must say what the batches were.
    def run(**options):
        return evaluate(llama, tokenizer, "openbookqa", limit=8, **options).loglikelihoods

    with attach(llama, MOVING, 0.3, calibration=calibration):
        first, second = run(), run()
    with attach(llama, MOVING, 0.3, calibration=calibration):
        assert run() == first
    with attach(llama, MOVING, 0.3, calibration=calibration):
        assert run(batch_size=4) != first
    assert second != first


# -- the published protocol ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_challenge"])
def test_published_protocol_against_a_slow_version(llama, tokenizer, name):
    result = evaluate(llama, tokenizer, name, limit=9, protocol="published")
    rows = load_rows(TASKS[name])[:9]
    for row, likelihoods, hit, hit_norm in zip(
        rows, result.loglikelihoods, result.correct, result.correct_norm, strict=True
    ):
        if name == "piqa":
            pairs, right = [(row["goal"], row["sol1"]), (row["goal"], row["sol2"])], row["label"]
        elif name == "winogrande":
            after = row["sentence"].removeprefix("_")
            pairs, right = [(row["option1"], after), (row["option2"], after)], int(row["answer"]) - 1
        else:
            prompt = f"Question: {row['question']}\nAnswer:"
            pairs = [(prompt, text) for text in row["choices"]["text"]]
            right = row["choices"]["label"].index(row["answerKey"])
        tokens = [tuple(tokenizer(text)["input_ids"] for text in pair) for pair in pairs]
        requests = [Request(c, o) for c, o in tokens]
        requests = [
            Request([*r.context][-(MAX_LENGTH + 1 - len(r.continuation)) :], r.continuation) for r in requests
        ]
        want = [slow_likelihoods(llama, [r], 0, 0)[0] for r in requests]
        assert likelihoods == pytest.approx(want, rel=1e-5)
        assert hit == (max(range(len(want)), key=want.__getitem__) == right)
        each = [w / len(r.continuation) for w, r in zip(want, requests, strict=True)]
        assert hit_norm == (max(range(len(each)), key=each.__getitem__) == right)
    assert (result.batch_size, result.order, result.metric) == (20, "given", "acc_norm")
    assert result.acc_norm == sum(result.correct_norm) / 9


def test_published_batches_hold_whole_questions():
    options = [4, 4, 3, 5, 4, 4, 2, 25, 4]
    batches = published.question_batches(options)
    assert [len(b) for b in batches] == [20, 6, 25, 4]
    assert [i for b in batches for i in b] == list(range(sum(options)))


def test_protocols_are_told_apart(llama, tokenizer):
    ours, theirs = (
        evaluate(llama, tokenizer, "winogrande", limit=4, protocol=p) for p in ("harness", "published")
    )
    assert (ours.protocol, ours.metric, ours.acc_norm) == ("harness", "acc", None)
    assert (theirs.protocol, theirs.metric) == ("published", "acc_norm")
    assert (ours.value, ours.error) == (ours.acc, ours.acc_error)
    assert (theirs.value, theirs.error) == (theirs.acc_norm, theirs.acc_norm_error)


def test_the_value_of_a_task_is_the_metric_of_published_tables(llama, tokenizer):
    metrics = ["acc", "acc_norm", "acc_norm", "acc", "acc_norm", "acc_norm", "acc_norm"]
    for name, metric in zip(TASKS, metrics, strict=True):
        result = evaluate(llama, tokenizer, name, limit=5)
        assert result.value == getattr(result, metric)
        assert result.error == pytest.approx(math.sqrt(result.value * (1 - result.value) / 4))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("hellaswog", {}, "did you mean 'hellaswag'"),
        ("piqa", {"limit": 0}, "limit must be a whole number of items from 1 to"),
        (
            "piqa",
            {"batch_size": 0},
            "batch_size must be a whole number of sequences from 1 to 1000000, not 0",
        ),
        (
            "piqa",
            {"batch_size": 0, "protocol": "published"},
            "batch_size must be a whole number of sequences from 1 to 1000000, not 0",
        ),
        ("piqa", {"order": "random"}, "unknown order 'random'"),
        ("piqa", {"protocol": "mine"}, "unknown protocol 'mine'"),
        ("piqa", {"protocol": "published", "order": "length"}, "keeps the given order"),
        ("piqa", {"source": "disk"}, "unknown source"),
        ("piqa", {"source": "hub"}, "piqa could not be read from the hub"),
    ],
)
def test_bad_settings_are_refused(llama, tokenizer, task, options, message):
    with pytest.raises(UsageError, match=message) as refused:
        evaluate(llama, tokenizer, task, **{"limit": 2, **options})
    assert str(refused.value).count("\n") == 0


def test_a_model_in_training_mode_is_refused(tokenizer):
    model = FAMILIES["llama-gqa"]().train()
    with pytest.raises(UsageError, match=r"eval mode; call model.eval\(\) first"):
        evaluate(model, tokenizer, "piqa", limit=1)
    assert model.training


def test_an_option_longer_than_the_model_is_refused(llama):
    with pytest.raises(UsageError, match="an option has 129 tokens"):
        score(llama, [Request([1], [2] * 129)], [[0]], max_length=128)


def test_a_broken_model_is_an_error_not_a_number(tokenizer):
    model = FAMILIES["llama-gqa"]()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        evaluate(model, tokenizer, "openbookqa", limit=1)


# -- the real model --------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(("name", "limit"), [("winogrande", 12), ("arc_easy", 10)])
def test_real_results_are_the_harness_own(smollm2, name, limit):
    result = evaluate(smollm2.model, smollm2.tokenizer, name, limit=limit)
    samples, figures = peer(smollm2.model, smollm2.tokenizer, name, limit, batch_size=8)
    assert_equals_peer(result, samples, figures)
    assert 0.4 < result.acc <= 1
