"""Corpora and windows: the numbers others will compare with depend on exactly these texts and cuts."""

import gzip
import hashlib
import json
import logging
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from probeprune.data.corpora import ASSETS, EMBEDDED_CORPORA, load_corpus
from probeprune.data.windows import (
    Text,
    batches,
    calibration_windows,
    evaluation_windows,
    pad_batch,
    tokenize,
)
from probeprune.errors import UsageError
from probeprune.evaluation.task_data import TASKS


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


# ------------------------------------------------------------------------------------------------ corpora


def parquet(text: bytes) -> bytes:
    """A Parquet file whose one text has these bytes, whatever they are."""
    array = pa.array([text]).cast(pa.binary()).view(pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": array}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("file", "sha256"),
    [
        ("c4_en_train_1000.jsonl.gz", "f5000a1baab220ff9bc69d3076b2dcc01c57b71510ba9f905b77ee15b1b7208c"),
        ("c4_en_train_2000.jsonl.gz", "8bd0ecec31ebe3bd999135ff0846037f8b4a7ac54d787de1cc1b9acebd5e0ada"),
        ("wikitext2_raw_test.txt.gz", "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"),
        ("wikitext2_raw_valid.txt.gz", "fbf387067edf87fc0f11e8cc1708be8ff6c944f6eeb98c1e34140c8a95629a00"),
    ],
)
def test_assets_are_the_texts_their_readme_names(file, sha256):
    content = gzip.decompress((ASSETS / file).read_bytes())
    assert hashlib.sha256(content).hexdigest() == sha256
    assert sha256 in (ASSETS / "README.md").read_text()


def test_every_asset_belongs_to_a_corpus_or_a_task():
    named = {file for corpus in EMBEDDED_CORPORA.values() for file in corpus.files}
    named |= {task.file for task in TASKS.values()}
    assert named == {path.name for path in ASSETS.iterdir()} - {"README.md"}


def test_c4_is_both_files_the_smaller_first():
    documents = load_corpus("c4")
    assert len(documents) == 2600
    assert documents[0].startswith("Posted on April 12, 2018 by admin")
    assert documents[1000].startswith("Beginners BBQ Class Taking Place in Missoula!")
    held_out = load_corpus("c4-held-out")
    assert len(held_out) == 400 and len(set(documents + held_out)) == 3000


def test_both_wikitext_splits_follow_the_published_join():
    """Rows keep their line end and blank rows are empty, so a title is followed by five line ends."""
    (test,) = load_corpus("wikitext2")
    (valid,) = load_corpus("wikitext2-valid")
    assert test.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English")
    assert valid.startswith("\n\n = Homarus gammarus = \n\n\n\n\n Homarus gammarus , known as")
    for text, rows in ((test, 4358), (valid, 3760)):
        written = sum(1 for line in text.split("\n") if line.strip())
        assert text.count("\n") == 2 * (rows - 1) + written


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes("één\r\n\ntwo\n".encode())
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_corpus(str(plain)) == load_corpus(str(packed)) == ["één\r\n\ntwo\n"]


def test_json_lines_are_one_document_a_row(tmp_path):
    # A line separator inside a JSON string does not end the row.
    rows = [{"body": "first\u2028still first"}, {"body": ""}, {"body": "last"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(content, encoding="utf-8")
    packed.write_bytes(gzip.compress(content.encode()))
    expected = ["first\u2028still first", "", "last"]
    assert load_corpus(str(plain), column="body") == load_corpus(str(packed), column="body") == expected


def test_parquet_is_one_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert load_corpus(str(path)) == ["one", "two"]


def test_unknown_corpus_names_what_there_is_and_the_nearest():
    with pytest.raises(
        UsageError, match=r"'wikitxt2'; did you mean 'wikitext2'\? Known: c4, .*wikitext2, wikitext2-valid"
    ):
        load_corpus("wikitxt2")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt.gz", b"not packed", "cannot be read"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "no column 'text' in line 2 of .*; it has: body"),
        ("a.jsonl", b'{"text": 3}', "holds int, not text"),
        ("a.jsonl", b'{"text"', "line 1 of .* is not JSON"),
        ("a.jsonl", b'["text"]', "line 1 of .* is no object"),
        ("a.parquet", b"PAR?", "cannot be read as Parquet"),
        ("a.csv", b"text", "no known kind"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "a\\ud83d"}',
            r"line 2 of .* half a character \('.ud83d', at char",
        ),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 of .* is not JSON: it is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "line 1 of .* thousands of digits"),
        ("a.jsonl", b'{"text": "\xff"}', "UTF-8"),
        ("a.parquet", parquet(b"a\xff"), "cannot be read as Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus(str(path))


def test_parquet_without_the_column_names_the_others(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one"], "id": [1]}), path)
    with pytest.raises(UsageError, match=r"no column 'text' in row 0 of .*; it has: body, id"):
        load_corpus(str(path))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="no corpus file"):
        load_corpus(str(tmp_path / "nowhere.jsonl"))


def test_subset_is_refused_where_it_would_be_ignored():
    with pytest.raises(UsageError, match="without subset or split"):
        load_corpus("wikitext2", split="train")


def test_unreachable_hub_is_a_usage_error():
    with pytest.raises(UsageError, match=r"'allenai/c4' .* could not be read from the hub"):
        load_corpus("allenai/c4", subset="en")


class TestHub:
    """The hub itself is out of reach of the tests: what it would stream is put in its place."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []

        def load_dataset(name, subset, *, split, revision, streaming):
            calls.append((name, subset, split, streaming))
            column = "sentence" if revision else "text"
            return ({column: f"document {number}"} for number in range(5))

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls

    def test_streams_the_named_split(self, asked):
        assert load_corpus("owner/name", subset="en", split="test") == [f"document {n}" for n in range(5)]
        assert asked == [("owner/name", "en", "test", True)]

    def test_train_is_the_default_split(self, asked):
        load_corpus("owner/name")
        assert asked == [("owner/name", None, "train", True)]

    def test_short_names_say_where_a_corpus_is(self, asked):
        assert load_corpus("c4-valid") == [f"document {n}" for n in range(5)]
        assert load_corpus("ptb") == [" ".join(f"document {n}" for n in range(5))]
        assert asked == [
            ("allenai/c4", "en", "validation", True),
            ("ptb-text-only/ptb_text_only", "penn_treebank", "test", True),
        ]
        with pytest.raises(UsageError, match="fixed text"):
            load_corpus("ptb", split="train")

    @pytest.mark.parametrize(("limit", "warns"), [(3, True), (5, False)])
    def test_says_when_there_was_more(self, asked, caplog, limit, warns):
        assert len(load_corpus("owner/name", hub_rows=limit)) == limit
        assert ("first 3 rows" in caplog.text) == warns

    def test_missing_column(self, asked):
        with pytest.raises(UsageError, match="no column 'body' in data set 'owner/name'; it has: text"):
            load_corpus("owner/name", column="body")


# ------------------------------------------------------------------------------------- calibration windows


def test_crops_are_consecutive_and_inside_one_document(number_tokenizer):
    documents = [numbers(0, 30), numbers(100, 130), numbers(200, 230)]
    windows = calibration_windows(documents, number_tokenizer, count=12, length=8, seed=0)
    assert windows.shape == (12, 8) and windows.dtype == torch.long
    assert (windows.diff(dim=1) == 1).all()  # a crop that crossed documents would jump
    assert len({tuple(window) for window in windows.tolist()}) > 3  # fresh offsets in later rounds


def test_every_long_enough_document_comes_once_a_round(number_tokenizer):
    documents = [numbers(100 * index, 100 * index + 20) for index in range(5)] + [numbers(900, 905)]
    windows = calibration_windows(documents, number_tokenizer, count=10, length=8, seed=3)
    origin = (windows[:, 0] // 100).tolist()
    assert sorted(origin[:5]) == sorted(origin[5:]) == [0, 1, 2, 3, 4]


def test_a_document_needs_one_token_more_than_the_window(number_tokenizer):
    exactly, longer = numbers(0, 8), numbers(100, 109)
    windows = calibration_windows([exactly, longer], number_tokenizer, count=4, length=8, seed=0)
    assert windows[:, 0].tolist() == [100] * 4


def test_one_long_text_gives_random_offsets(number_tokenizer):
    windows = calibration_windows([numbers(0, 900)], number_tokenizer, count=20, length=8, seed=0)
    assert len(set(windows[:, 0].tolist())) > 15


def test_seed_decides_and_global_state_is_left_alone(number_tokenizer):
    documents = [numbers(0, 300), numbers(300, 600), numbers(600, 900)]

    def draw(seed):
        return calibration_windows(documents, number_tokenizer, count=6, length=8, seed=seed)

    python_state, torch_state = random.getstate(), torch.get_rng_state()
    first = draw(seed=5)
    assert random.getstate() == python_state and torch.equal(torch.get_rng_state(), torch_state)
    random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(first, draw(seed=5))
    assert not torch.equal(first, draw(seed=6))


def test_too_short_documents_say_how_long_the_longest_is(number_tokenizer):
    with pytest.raises(UsageError, match="longest has 12; ask for windows of at most 11"):
        calibration_windows([numbers(0, 12), "1 2"], number_tokenizer, count=1, length=12, seed=0)


@pytest.mark.parametrize("arguments", [{"count": 0, "length": 8}, {"count": 1, "length": 0}])
def test_counts_must_be_positive(number_tokenizer, arguments):
    with pytest.raises(
        UsageError, match=r"must be a whole number of (windows|tokens) from [12] to \d+, not 0"
    ):
        calibration_windows([numbers(0, 30)], number_tokenizer, seed=0, **arguments)


def test_tokenizing_adds_no_special_tokens(number_tokenizer):
    assert number_tokenizer("5 6")["input_ids"] == [1000, 5, 6]  # what the tokenizer does when left alone
    assert tokenize("5 6", number_tokenizer) == [5, 6]


def test_tokenizing_a_long_text_does_not_warn(number_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog hears it
    number_tokenizer.deprecation_warnings.clear()  # a tokenizer warns once in its life
    assert tokenize(numbers(0, 100), number_tokenizer) == list(range(100))
    assert caplog.text == ""
    number_tokenizer(numbers(0, 100))
    assert "longer than the specified maximum" in caplog.text


# -------------------------------------------------------------------------------------- evaluation windows


def test_in_order_covers_the_text_and_says_what_is_left_out(number_tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="probeprune.data")
    windows = evaluation_windows([numbers(0, 20), numbers(20, 27)], number_tokenizer, length=8)
    assert windows.flatten().tolist() == list(range(24))
    assert "3 tokens of the text left out" in caplog.text


def test_limit_takes_the_first_windows(number_tokenizer):
    windows = evaluation_windows([numbers(0, 100)], number_tokenizer, length=8, limit=2)
    assert windows.flatten().tolist() == list(range(16))


def test_published_sampling_is_seeded_overlapping_windows(number_tokenizer):
    def draw(seed):
        return evaluation_windows(
            [numbers(0, 100)], number_tokenizer, length=8, sampling="published", seed=seed
        )

    windows = draw(0)
    assert windows.shape == (12, 8)
    assert (windows.diff(dim=1) == 1).all()
    assert any(start % 8 for start in windows[:, 0].tolist())
    assert torch.equal(windows, draw(0)) and not torch.equal(windows, draw(1))


@pytest.mark.parametrize("sampling", ["in-order", "published"])
def test_text_of_exactly_one_window(number_tokenizer, sampling):
    windows = evaluation_windows([numbers(0, 8)], number_tokenizer, length=8, sampling=sampling)
    assert windows.tolist() == [list(range(8))]


def test_text_shorter_than_a_window(number_tokenizer):
    with pytest.raises(UsageError, match="has 7 tokens, fewer than one window of 8"):
        evaluation_windows([numbers(0, 7)], number_tokenizer, length=8)


def test_unknown_sampling(number_tokenizer):
    with pytest.raises(UsageError, match="unknown sampling 'random'"):
        evaluation_windows([numbers(0, 9)], number_tokenizer, length=8, sampling="random")


@pytest.mark.real
def test_wikitext2_has_the_known_number_of_tokens(smollm2):
    """304986 SmolLM2 tokens: 595 windows of 512 and 346 tokens over. Another count is another benchmark."""
    documents = load_corpus("wikitext2")
    assert len(tokenize(documents[0], smollm2.tokenizer)) == 304986
    for sampling in ("in-order", "published"):
        windows = evaluation_windows(documents, smollm2.tokenizer, length=512, sampling=sampling)
        assert windows.shape == (595, 512)


@pytest.mark.real
def test_c4_windows_of_the_real_tokenizer_come_from_the_documents(smollm2):
    documents = load_corpus("c4")[:300]
    windows = calibration_windows(documents, smollm2.tokenizer, count=4, length=256, seed=0)
    for window in windows:
        text = smollm2.tokenizer.decode(window[1:-1])  # the ends may cut a character in two
        assert any(text in document for document in documents)


# ------------------------------------------------------------------------------------------------- batches


def test_batches_keep_the_short_last_one():
    windows = torch.arange(14).view(7, 2)
    parts = batches(windows, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), windows)


def test_batch_size_must_be_positive():
    with pytest.raises(
        UsageError, match="batch_size must be a whole number of sequences from 1 to 1000000, not "
    ):
        batches(torch.zeros(2, 2), 0)


def test_padding_on_either_side():
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_id=0, side="left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_id=0, side="right")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_mask_counts_a_real_token_that_equals_the_padding():
    _, mask = pad_batch([[0, 5], [6]], pad_id=0)
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_sequences_of_equal_length_need_no_padding():
    ids, mask = pad_batch([[5, 6], [7, 8]], pad_id=None)
    assert ids.tolist() == [[5, 6], [7, 8]] and mask.tolist() == [[1, 1], [1, 1]]
    assert pad_batch([[5]], pad_id=None)[0].tolist() == [[5]]


@pytest.mark.parametrize(
    ("sequences", "pad_id", "side", "message"),
    [
        ([[1], [1, 2]], None, "left", "no padding token"),
        ([], 0, "left", "at least one sequence"),
        ([[1], []], 0, "left", "at least one token"),
        ([[1]], 0, "middle", "unknown padding side"),
    ],
)
def test_bad_padding(sequences, pad_id, side, message):
    with pytest.raises(UsageError, match=message):
        pad_batch(sequences, pad_id, side)


def test_corpora_take_turns(number_tokenizer, tmp_path):
    low, high = tmp_path / "low.txt", tmp_path / "high.txt"
    low.write_text(numbers(0, 400))
    high.write_text(numbers(500, 900))
    alone = Text(str(low), 6, 8).source(number_tokenizer, seed=3).draw()
    mixed = Text(str(low), 9, 8, (str(low), str(high))).source(number_tokenizer, seed=3)
    assert mixed.draw()[torch.arange(9) % 3 < 2].equal(alone), "two of three, and none of them twice"
    only_high = Text(str(high), 3, 8).source(number_tokenizer, seed=3).draw()
    assert mixed.draw()[2::3].equal(only_high)
    assert mixed.draw(5).equal(mixed.draw()[:5])
    assert Text(str(low), 9, 8, (str(high),)).name == f"{low}, {high}"


def test_a_text_of_one_corpus_is_recorded_as_before():
    assert Text("c4", 9).record() == {"corpus": "c4", "windows": 9, "length": 512}
    assert Text("c4", 9, 8, ("own.txt",)).record()["beside"] == ["own.txt"]
