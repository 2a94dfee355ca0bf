"""Text corpora by name: those that ship with the package, local files and data sets on the hub.

Knows nothing of tokens, models or methods.
"""

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from probeprune.errors import UsageError, first_line, unknown
from probeprune.foreign.extras import extra
from probeprune.foreign.quiet import quiet_libraries
from probeprune.foreign.reading import open_regular, parse_json, read_text

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"

ROW_SEPARATOR = "\n\n"
"""Text between the rows of a data set that are joined, by the convention behind published perplexities."""

HUB_ROWS = 20_000
"""Default limit on the rows read from a hub data set: all of C4 has 365 million."""


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A corpus that ships with the package; assets/README.md gives its origin.

    Attributes:
        files: file names in the assets folder, in reading order.
        description: one line for readers.
        licence: licence of the text, not of this package.
        rows_per_line: True if each line is a row of the data set and the rows must be joined.
        documents: first and last (exclusive) document of the files that belong to it; None for no end.
    """

    files: tuple[str, ...]
    description: str
    licence: str
    rows_per_line: bool = False
    documents: tuple[int, int | None] = (0, None)


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the hub with a short name.

    Attributes:
        path, subset, split, column, revision: its place on the hub, as in `datasets.load_dataset`.
        description: one line for readers.
        rows: number of rows to read, from the beginning.
        joined: text between rows that are joined to one document; None makes each row a document.
    """

    path: str
    subset: str | None
    split: str
    description: str
    column: str = "text"
    revision: str | None = None
    rows: int = HUB_ROWS
    joined: str | None = None


EMBEDDED_CORPORA = {
    "c4": EmbeddedCorpus(
        files=("c4_en_train_1000.jsonl.gz", "c4_en_train_2000.jsonl.gz"),
        description="2600 documents of C4 (en, train); the usual calibration text",
        licence="ODC-BY, Common Crawl terms of use",
        documents=(0, 2600),
    ),
    "c4-held-out": EmbeddedCorpus(
        files=("c4_en_train_1000.jsonl.gz", "c4_en_train_2000.jsonl.gz"),
        description="400 more documents of C4, in none of the calibration or training text; for perplexity",
        licence="ODC-BY, Common Crawl terms of use",
        documents=(2600, None),
    ),
    "wikitext2": EmbeddedCorpus(
        files=("wikitext2_raw_test.txt.gz",),
        description="WikiText-2 raw, test split, as one text; the usual perplexity text",
        licence="CC BY-SA 3.0 / GFDL",
    ),
    "wikitext2-valid": EmbeddedCorpus(
        files=("wikitext2_raw_valid.txt.gz",),
        description="WikiText-2 raw, validation split, as one text; in-domain calibration for wikitext2",
        licence="CC BY-SA 3.0 / GFDL",
        rows_per_line=True,
    ),
}

HUB_CORPORA = {
    "c4-hub": HubCorpus("allenai/c4", "en", "train", "C4 train, 20000 documents: published calibration"),
    "c4-valid": HubCorpus(
        "allenai/c4", "en", "validation", "C4 validation, the first 1100 documents (SparseGPT's)", rows=1100
    ),
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "test",
        "Penn Treebank, test split, sentences joined with a space",
        column="sentence",
        # The data set itself is a script, which is no longer supported; this is the hub's own conversion.
        revision="refs/convert/parquet",
        joined=" ",
    ),
}

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES


def load_corpus(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    column: str = "text",
    hub_rows: int = HUB_ROWS,
) -> list[str]:
    """Read the documents of a corpus, in their own order.

    Args:
        name: an embedded corpus (a key of `EMBEDDED_CORPORA`), a short name of one on the hub (a key of
            `HUB_CORPORA`), a local file (`.txt`: one document; `.jsonl`, `.parquet`: one document per row;
            `.txt` and `.jsonl` may end in `.gz`), or a hub data set as `owner/name`.
        subset: configuration of a hub data set, such as `en` of `allenai/c4`.
        split: split of a hub data set; None for `train`.
        column: field of a row that holds the text (`.jsonl`, `.parquet`, hub).
        hub_rows: the most rows to stream from a hub data set; a warning is logged if there are more.

    Returns:
        One string per document. Blank documents are kept, because they belong to the text, but at least one
        is not blank.

    Raises:
        UsageError: an unknown name, a missing file or column, nothing but white space, an unreachable hub.
    """
    check_corpus(name)
    if name in EMBEDDED_CORPORA or name in HUB_CORPORA or _is_file_name(name):
        if subset is not None or split is not None:
            raise UsageError(f"corpus '{name}' is a fixed text without subset or split; leave them out.")
        if name in HUB_CORPORA:
            documents = _read_hub_corpus(HUB_CORPORA[name])
        else:
            documents = _read_embedded(name) if name in EMBEDDED_CORPORA else _read_file(Path(name), column)
    elif os.path.exists(name):
        raise UsageError(
            f"corpus '{name}' is a folder or a device; give a file ({', '.join(FILE_SUFFIXES)})."
        )
    else:
        documents = _stream_hub(name, subset, split or "train", column, hub_rows)
    if not any(document.strip() for document in documents):
        raise UsageError(f"corpus '{name}' holds no text; give another one.")
    return documents


def check_corpus(name: str) -> None:
    """Raise `UsageError` for a name that cannot be a corpus, as far as that is known without reading it."""
    known = (*EMBEDDED_CORPORA, *HUB_CORPORA)
    if name in known:
        return
    if _is_file_name(name):
        if not os.path.exists(name):
            raise UsageError(f"there is no corpus file '{name}'; check the path.")
    elif "/" not in name:
        others = f"a file ({', '.join(FILE_SUFFIXES)}), a hub data set (owner/name)"
        raise UsageError(unknown("corpus", name, known, others))


def _is_file_name(name: str) -> bool:
    return name.endswith(FILE_SUFFIXES) or os.path.isfile(name)


def _read_embedded(name: str) -> list[str]:
    corpus = EMBEDDED_CORPORA[name]
    documents = [text for file in corpus.files for text in _read_file(ASSETS / file, column="text")]
    documents = documents[slice(*corpus.documents)]
    if corpus.rows_per_line:
        # As the hub serves WikiText: a row keeps its line end, and a blank row is the empty string.
        (text,) = documents
        rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
        documents = [ROW_SEPARATOR.join(rows)]
    return documents


def _read_file(path: Path, column: str) -> list[str]:
    """One document of a `.txt` file, or one per row of a `.jsonl` or `.parquet` file."""
    if not os.path.exists(path):
        raise UsageError(f"there is no corpus file '{path}'; check the path.")
    if path.name.endswith(TEXT_SUFFIXES):
        return [read_text(path)]
    if path.name.endswith(JSON_SUFFIXES):
        return _read_json_lines(path, column)
    if path.name.endswith(PARQUET_SUFFIXES):
        return _read_parquet(path, column)
    raise UsageError(
        f"corpus file '{path}' is of no known kind; its name must end in {', '.join(FILE_SUFFIXES)}."
    )


def _read_json_lines(path: Path, column: str) -> list[str]:
    documents = []
    # str.splitlines would also break at characters that are allowed inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UsageError(f"line {number} of '{path}' is not JSON: {first_line(error)}.") from error
        documents.append(_text_of(row, column, where=f"line {number} of '{path}'"))
    return documents


def _read_parquet(path: Path, column: str) -> list[str]:
    with extra("hub"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        with open_regular(path) as file:
            columns = pq.read_schema(file).names
            file.seek(0)
            if column in columns:
                rows = pq.read_table(file, columns=[column]).to_pylist()
            else:
                rows = [dict.fromkeys(columns)]  # _text_of then names the missing column
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"corpus file '{path}' cannot be read as Parquet: {first_line(error)}.") from error
    return [_text_of(row, column, where=f"row {number} of '{path}'") for number, row in enumerate(rows)]


def _read_hub_corpus(corpus: HubCorpus) -> list[str]:
    rows = _stream_hub(
        corpus.path, corpus.subset, corpus.split, corpus.column, corpus.rows, corpus.revision, warn=False
    )
    return rows if corpus.joined is None else [corpus.joined.join(rows)]


def _stream_hub(
    name: str,
    subset: str | None,
    split: str,
    column: str,
    limit: int,
    revision: str | None = None,
    *,
    warn: bool = True,
) -> list[str]:
    """Read the first `limit` rows of a hub data set without downloading the rest."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"there is no corpus file '{name}', and it is no name of a hub data set (owner/name); check it."
        ) from error
    with extra("hub"):
        import datasets  # takes a second, which embedded and local corpora need not pay
    try:
        with quiet_libraries():
            rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
            head = list(itertools.islice(rows, limit + 1))
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"data set '{name}' (subset {subset}, split {split}) could not be read from the hub "
            f"({first_line(error)}); check name and network, or use a file or an embedded corpus "
            f"({', '.join(EMBEDDED_CORPORA)})."
        ) from error
    if warn and len(head) > limit:
        logger.warning(
            "only the first %d rows of '%s' were read; raise the limit if you need more.", limit, name
        )
    return [_text_of(row, column, where=f"data set '{name}'") for row in head[:limit]]


def _text_of(row: object, column: str, *, where: str) -> str:
    """The text of one row. Raises `UsageError` for a missing column and names those that exist."""
    if not isinstance(row, dict):
        raise UsageError(f"{where} is no object with a '{column}' field; give one JSON object per line.")
    if column not in row:
        columns = ", ".join(map(str, row))
        raise UsageError(f"there is no column '{column}' in {where}; it has: {columns}.")
    text = row[column]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UsageError(f"column '{column}' in {where} holds {kind}, not text; choose another column.")
    check_whole(text, where)
    return text


def check_whole(text: str, where: str) -> None:
    """Raise `UsageError` for text with half a character, such as half an emoji: no tokenizer takes it.

    Args:
        text: any text.
        where: names the text in the message.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UsageError(
            f"{where} holds half a character ({half}, at character {error.start}); correct the text."
        ) from None
