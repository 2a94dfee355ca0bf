"""Text corpora and the token windows cut from them.

It turns a corpus name into texts, texts into windows of token ids, and sequences of unequal length into a
padded batch. It knows nothing of models, methods or metrics, and never touches a global random state.
"""

import bz2
import difflib
import gzip
import itertools
import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

from probeprune.errors import UsageError, first_line
from probeprune.quiet import quiet_libraries

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"

ROW_SEPARATOR = "\n\n"
"""What rows of a data set are joined with to one text: the convention behind published perplexities."""

HUB_ROWS = 20_000
"""How many rows of a hub data set are read unless told otherwise: C4 in full has 365 million."""


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A corpus that ships with the package; assets/README.md has its origin.

    Attributes:
        files: names in the assets folder, read in this order.
        description: one line for people.
        licence: of the text, not of this package.
        rows_per_line: True where every line is a row of the data set and the rows are still to be joined.
        documents: which of the files' documents belong to it: from, to; None for the last ones.
    """

    files: tuple[str, ...]
    description: str
    licence: str
    rows_per_line: bool = False
    documents: tuple[int, int | None] = (0, None)


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the hub that people call by a short name.

    Attributes:
        path, subset, split, column, revision: where it is, as in `datasets.load_dataset`.
        rows: how many rows are read, from the front.
        joined: what the rows are joined with to one text; None leaves them documents of their own.
        description: one line for people.
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
        # The data set itself is a script, which nothing runs any more; this is the hub's own conversion.
        revision="refs/convert/parquet",
        joined=" ",
    ),
}

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES


# ----------------------------------------------------------------------------------------------------------
# Corpora


def load_corpus(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    column: str = "text",
    hub_rows: int = HUB_ROWS,
) -> list[str]:
    """The documents of a corpus, in the corpus' own order.

    Args:
        name: an embedded corpus (a key of `EMBEDDED_CORPORA`), one on the hub by a short name (a key of
            `HUB_CORPORA`), a local file (`.txt`: one document; `.jsonl`, `.parquet`: one document a row;
            `.txt` and `.jsonl` also with `.gz`), or a hub data set as `owner/name`.
        subset: configuration of a hub data set, such as `en` of `allenai/c4`.
        split: split of a hub data set; `train` when not given.
        column: which field of a row holds the text (`.jsonl`, `.parquet`, hub).
        hub_rows: how many rows of a hub data set are streamed at most; a warning says when there were more.

    Returns:
        One string a document, never empty as a whole (single blank rows are kept: they belong to the text).

    Raises:
        UsageError: unknown name, missing file, missing column, nothing but white space, unreachable hub.
    """
    if name in EMBEDDED_CORPORA or name in HUB_CORPORA or _is_file_name(name):
        if subset is not None or split is not None:
            raise UsageError(f"Corpus '{name}' is a fixed text and has no subset or split: leave them out.")
        if name in HUB_CORPORA:
            documents = _read_hub_corpus(HUB_CORPORA[name])
        else:
            documents = _read_embedded(name) if name in EMBEDDED_CORPORA else _read_file(Path(name), column)
    elif "/" in name:
        documents = _stream_hub(name, subset, split or "train", column, hub_rows)
    else:
        known = [*EMBEDDED_CORPORA, *HUB_CORPORA]
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(
            f"Unknown corpus '{name}': give one of {', '.join(known)}, a file"
            f" ({', '.join(FILE_SUFFIXES)}) or a hub data set as owner/name.{hint}"
        )
    if not any(document.strip() for document in documents):
        raise UsageError(f"Corpus '{name}' holds no text.")
    return documents


def _is_file_name(name: str) -> bool:
    return name.endswith(FILE_SUFFIXES) or Path(name).is_file()


def _read_embedded(name: str) -> list[str]:
    corpus = EMBEDDED_CORPORA[name]
    documents = [text for file in corpus.files for text in _read_file(ASSETS / file, column="text")]
    documents = documents[slice(*corpus.documents)]
    if corpus.rows_per_line:
        # As the hub serves WikiText: a row keeps its line end, a blank row is the empty string.
        (text,) = documents
        rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
        documents = [ROW_SEPARATOR.join(rows)]
    return documents


def _read_file(path: Path, column: str) -> list[str]:
    """One text of a `.txt` file, or one text a row of a `.jsonl` or `.parquet` file."""
    if not path.is_file():
        raise UsageError(f"There is no corpus file '{path}'.")
    if path.name.endswith(TEXT_SUFFIXES):
        return [read_text(path)]
    if path.name.endswith(JSON_SUFFIXES):
        return _read_json_lines(path, column)
    if path.name.endswith(PARQUET_SUFFIXES):
        return _read_parquet(path, column)
    raise UsageError(f"Corpus file '{path}' is of no known kind: it must end in {', '.join(FILE_SUFFIXES)}.")


def read_text(path: Path) -> str:
    """The content of a text file, `.gz` and `.bz2` unpacked, as it is: line ends are tokens too.

    Raises `UsageError` for a file that is missing, damaged or not UTF-8.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".bz2":
            content = bz2.decompress(content)
        return content.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"File '{path}' cannot be read as UTF-8 text: {error}.") from error


def _read_json_lines(path: Path, column: str) -> list[str]:
    documents = []
    # Not str.splitlines: that also breaks at characters which may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"Line {number} of '{path}' is not JSON: {error}.") from error
        documents.append(_text_of(row, column, where=f"line {number} of '{path}'"))
    return documents


def _read_parquet(path: Path, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
        if column in columns:
            rows = pq.read_table(path, columns=[column]).to_pylist()
        else:
            rows = [dict.fromkeys(columns)]  # _text_of says what is missing
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"Corpus file '{path}' cannot be read as Parquet: {error}.") from error
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
    """The first `limit` rows of a hub data set, without downloading the rest."""
    import datasets  # a second's import that embedded and local corpora need not pay

    try:
        with quiet_libraries():
            rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
            head = list(itertools.islice(rows, limit + 1))
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"Data set '{name}' (subset {subset}, split {split}) could not be read from the hub:"
            f" {first_line(error)}; check name and network, or use an embedded corpus"
            f" ({', '.join(EMBEDDED_CORPORA)}) or a file."
        ) from error
    if warn and len(head) > limit:
        logger.warning(
            "Only the first %d rows of '%s' were read; ask for more where you need them.", limit, name
        )
    return [_text_of(row, column, where=f"data set '{name}'") for row in head[:limit]]


def _text_of(row: object, column: str, *, where: str) -> str:
    """The text in one row, or a UsageError that names the columns there are."""
    if not isinstance(row, dict):
        raise UsageError(f"Expected an object with a '{column}' field in {where}.")
    if column not in row:
        raise UsageError(f"There is no column '{column}' in {where}; it has: {', '.join(map(str, row))}.")
    text = row[column]
    if not isinstance(text, str):
        raise UsageError(f"Column '{column}' in {where} holds {type(text).__name__}, not text.")
    return text


# ----------------------------------------------------------------------------------------------------------
# Windows
