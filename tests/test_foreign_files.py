"""Files of others: byte-order marks, devices, pipes, sizes, deep JSON; long texts in little memory."""

import bz2
import gzip
import json
import os
import random
import tracemalloc

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probeprune.data import windows
from probeprune.data.corpora import ASSETS, load_corpus
from probeprune.data.windows import tokenize
from probeprune.errors import UsageError
from probeprune.foreign import reading
from probeprune.foreign.reading import open_regular, read_lines, read_text

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", BOM + b"a b"),
        ("a.txt.gz", gzip.compress(BOM + b"a b", mtime=0)),
        ("a.jsonl", BOM + b'{"text": "a b"}\n'),
        ("a.jsonl.gz", gzip.compress(BOM + b'{"text": "a b"}\n', mtime=0)),
    ],
)
def test_a_byte_order_mark_is_no_text(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert load_corpus(str(tmp_path / name)) == ["a b"]


@pytest.fixture
def pipe(tmp_path):
    """A pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


def test_only_regular_files_are_read(pipe, tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("/dev/zero")
    for path in (pipe, link, tmp_path):
        for read in (
            read_text,
            lambda p: read_lines(p, lambda row: None),
            lambda p: open_regular(p).__enter__(),
        ):
            with pytest.raises(UsageError, match="no regular file"):
                read(path)
    for path in (pipe, link):
        with pytest.raises(UsageError, match="no regular file"):
            load_corpus(str(path))
    for name in (str(tmp_path), "../..", "/dev/zero", "/"):
        with pytest.raises(UsageError, match="is a folder or a device; give a file"):
            load_corpus(name)


@pytest.mark.parametrize(
    "name", ["a/b/c", "no/such/file", "a\x00/b", "a\ud83d/b", "x" * 5000 + "/y", "~/a b"]
)
def test_what_cannot_be_a_data_set_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UsageError, match="no name of a hub data set"):
        load_corpus(name)


def test_paths_that_cannot_be_are_one_sentence(tmp_path):
    for name in ("a\x00b", "a\ud83db", "x" * 5000):
        with pytest.raises(UsageError, match="cannot be read"):
            read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.gz", gzip.compress), ("a.bz2", bz2.compress)]
)
def test_the_limit_holds_for_what_is_unpacked(name, pack, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(b"a" * 100_000))
    assert read_text(path, limit=100_000) == "a" * 100_000
    with pytest.raises(UsageError, match="more than"):
        read_text(path, limit=99_999)


def test_lines_that_are_too_long_are_named_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    long = json.dumps("x" * 500)
    path.write_text(f"1\n{long}\n2\n\n{'[' * 100_000}\n{'1' * 5000}\n3\n{long}")
    rows, errors, complete = read_lines(path, lambda row: None, limit=200_000)
    assert [n for n, _ in rows] == [1, 2, 3, 7, 8] and [n for n, _ in errors] == [5, 6]
    assert [str(e) for _, e in errors] == [
        "it is nested too deeply",
        "it holds a number of thousands of digits",
    ]
    assert complete == path.stat().st_size - len(long)
    rows, errors, complete = read_lines(path, lambda row: None, limit=64)
    assert [row for _, row in rows] == [1, 2, 3] and [n for n, _ in errors] == [2, 5, 6, 8]
    assert complete == path.stat().st_size - len(long)


def test_a_long_line_takes_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"' + b"x" * 30_000_000 + b'"\n1\n')
    tracemalloc.start()
    rows, errors, _ = read_lines(path, lambda row: None, limit=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [(2, 1)] and len(errors) == 1 and peak < 2e6
    monkeypatch.setattr(reading, "FILE_LIMIT", 10)
    with pytest.raises(UsageError, match="MiB"), open_regular(path, reading.FILE_LIMIT):
        pass


# -- long texts ------------------------------------------------------------------------------------


def fast(model, trainer, normalizer, pre_tokenizer, texts) -> PreTrainedTokenizerFast:
    """A tokenizer trained on these texts."""
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def prose() -> str:
    """A quarter of a million characters."""
    return read_text(ASSETS / "wikitext2_raw_valid.txt.gz")[:250_000]


TOKENIZERS = {
    "byte-level BPE": lambda texts: fast(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        texts,
    ),
    "BPE over the whole text, as LLaMA 2": lambda texts: fast(
        models.BPE(unk_token="?", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], show_progress=False, max_token_length=12),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        [text[:2000] for text in texts],
    ),
    "unigram": lambda texts: fast(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=400, unk_token="?", special_tokens=["?"], show_progress=False
        ),
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        texts,
    ),
    "words": lambda texts: fast(
        models.WordLevel(unk_token="?"),
        trainers.WordLevelTrainer(vocab_size=500, special_tokens=["?"], show_progress=False),
        None,
        pre_tokenizers.Whitespace(),
        texts,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chunks_have_the_tokens_of_the_whole_text(kind, prose, monkeypatch):
    tokenizer = TOKENIZERS[kind]([prose[:20_000]])
    draw = random.Random(0)
    odd = "".join(draw.choice("aé日\U0001f600\u0301 \n\t.=@12") * draw.randint(1, 9) for _ in range(8000))
    texts = [
        prose[:60_000],
        odd,
        "a" * 30_000,
        " " * 30_000,
        "\n".join(prose[:40_000].split()),
        "日本語" * 9000,
    ]
    calls: list[int] = []
    located = windows._located
    monkeypatch.setattr(windows, "_located", lambda *a: calls.append(1) or located(*a))
    monkeypatch.setattr(windows, "CHUNK", 6_000)
    monkeypatch.setattr(windows, "OVERLAP", 1_000)
    for text in texts:
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenize(text, tokenizer) == whole
    assert len(calls) > 20, "in one piece"


def test_half_a_character_is_refused_before_the_tokenizer_sees_it(number_tokenizer):
    with pytest.raises(UsageError, match="the text holds half a character"):
        tokenize("1 \ud83d", number_tokenizer)
