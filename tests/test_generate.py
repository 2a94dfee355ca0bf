"""Text from prompts: what `generate` of the library and of the command line make of them."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny import FAMILIES

from probeprune import UsageError
from probeprune.cli import app, run
from probeprune.jobs.generate import Decoding, encode, generate
from probeprune.model.loading import LoadedModel


@pytest.fixture
def loaded(number_tokenizer) -> LoadedModel:
    """A tiny model whose tokens are the numbers of the tests' tokenizer."""
    model = FAMILIES["llama-gqa"]()
    model.resize_token_embeddings(1002)
    model.generation_config.eos_token_id = None
    return LoadedModel(
        "tiny", model, number_tokenizer, torch.float32, torch.device("cpu"), stored_dtype=torch.float32
    )


def call(*arguments: str) -> int:
    return run(lambda: app(["generate", *arguments]))


def test_prompts_become_one_left_padded_batch(loaded):
    inputs = encode(loaded, ["7 8 9", "5"])
    assert inputs["input_ids"].tolist() == [[1000, 7, 8, 9], [1001, 1001, 1000, 5]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_batch_gives_what_each_prompt_gives_alone(loaded):
    prompts = ["7 8 9 10 11", "5", "60 61"]
    together = generate(loaded, encode(loaded, prompts), max_new_tokens=5)
    alone = [generate(loaded, encode(loaded, [p]), max_new_tokens=5).texts[0] for p in prompts]
    assert together.texts == alone
    assert together.prompt_tokens == 8 + 3 and together.new_tokens == 15
    assert together.prefill > 0 and together.decode > 0 and together.decode_rate > 0


def test_a_text_ends_at_its_end_token_unless_told_to_go_on(loaded):
    inputs = encode(loaded, ["7 8 9"])
    free = generate(loaded, inputs, max_new_tokens=6).texts[0].split()
    loaded.model.generation_config.eos_token_id = int(free[2])
    where = free.index(free[2])
    ended = generate(loaded, inputs, max_new_tokens=6)
    assert ended.texts[0].split() == free[: where + 1] and ended.new_tokens == where + 1
    on = generate(loaded, inputs, max_new_tokens=6, ignore_end=True)
    assert on.new_tokens == 6 and free[2] not in on.texts[0].split()


def test_drawing_follows_the_seed_and_greedy_does_not(loaded):
    inputs = encode(loaded, ["7 8 9"])

    def text(**how) -> str:
        return generate(loaded, inputs, max_new_tokens=8, decoding=Decoding(**how)).texts[0]

    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)
    assert len({text(temperature=2.0, seed=s) for s in range(4)}) > 1
    assert text(seed=1) == text(seed=2)
    assert text(temperature=1.0, top_p=1e-6, seed=5) == text()


def test_pieces_of_a_text_are_shown_while_it_is_made(loaded):
    pieces: list[str] = []
    made = generate(loaded, encode(loaded, ["7 8 9"]), max_new_tokens=6, show=pieces.append)
    assert "".join(pieces).strip() == made.texts[0] and pieces[-1].endswith("\n")
    assert len([p for p in pieces if p.strip()]) > 1, "all at once"


def test_one_prompt_needs_neither_padding_nor_an_end(loaded):
    bare = dataclasses.replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
    bare.tokenizer.pad_token = bare.tokenizer.eos_token = None
    assert bare.tokenizer.pad_token_id is None and bare.tokenizer.eos_token_id is None
    made = generate(bare, encode(bare, ["7 8 9"]), max_new_tokens=4)
    assert made.texts == generate(loaded, encode(loaded, ["7 8 9"]), max_new_tokens=4).texts
    with pytest.raises(UsageError, match="no padding token"):
        encode(bare, ["7 8 9", "7"])


def test_what_cannot_be_generated_is_refused(loaded):
    with pytest.raises(UsageError, match="a prompt holds half a character"):
        encode(loaded, ["7", "a\ud83d"])
    with pytest.raises(UsageError, match="prompt is empty"):
        encode(loaded, ["7", " "])
    with pytest.raises(UsageError, match="no chat template"):
        encode(loaded, ["7"], chat=True)
    with pytest.raises(UsageError, match="more than the model's 128 positions"):
        generate(loaded, encode(loaded, ["7"]), max_new_tokens=127)
    for bad, says in (
        (
            {"temperature": -1.0},
            r"temperature must be a number in \[0, 1000\], not -1.0; 0 takes the most likely",
        ),
        (
            {"temperature": 1.0, "top_p": 0.0},
            r"top_p must be a number in \(0, 1\], not 0.0; 1 draws from all tokens",
        ),
        ({"top_p": 0.5}, "needs a temperature"),
    ):
        with pytest.raises(UsageError, match=says):
            Decoding(**bad)


def test_a_chat_template_is_the_tokenizers_own(loaded):
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}1 {{ m['content'] }} 2{% endfor %}{% if add_generation_prompt %} 3{% endif %}"
    )
    try:
        ids = encode(loaded, ["7 8"], chat=True)["input_ids"][0].tolist()
    finally:
        loaded.tokenizer.chat_template = None
    assert [i for i in ids if i != 1000] == [1, 7, 8, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to continue"),
        (["--prompt", "a", "--method", "prob"], "did you mean 'probe'"),
        (["--prompt", "a", "--method", "llm-pruner+lora"], "trains the model"),
        (["--prompt", "a", "--ratio", "1"], "--ratio must be a number in [0, 1), not 1.0"),
        (["--prompt", "a", "--method", "wanda-sp", "--refresh", "8"], "methods that probe"),
        (["--prompt", "a", "--refresh", "-8"], "number of tokens"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be a number in [0, 1000], not -1.0"),
        (["--prompt", "a", "--top-p", "0.5"], "needs a temperature"),
        (
            ["--prompt", "a", "--max-new-tokens", "0"],
            "--max-new-tokens must be a whole number of tokens from 1 to 16777216, not 0",
        ),
        (["--prompt", "a", "--method", "dense", "--compare"], "choose another than dense"),
        (["--file", "no/such.txt"], "no/such.txt cannot be read"),
        (["no/such/model", "--prompt", "a"], "no/such/model"),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.real
def test_streamed_text_is_that_of_json_and_speed_is_compared(smollm2, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The capital of France is", encoding="utf-8")
    small = ["--calibration-windows", "2", "--length", "64", "--dtype", "float32", "--max-new-tokens", "6"]
    assert call("--file", str(prompt), *small) == 0
    streamed = capsys.readouterr()
    assert "20.0% of the blocks left out" in streamed.err
    assert call("--prompt", "The capital of France is", *small, "--compare", "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["text"].strip() == streamed.out.strip()
    assert line["removed_share"] == pytest.approx(0.2, abs=1e-3)
    assert set(line["compared"]["tokens_per_second"]) == {"dense", "probe"}
