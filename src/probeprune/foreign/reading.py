"""Files of others, read within limits: regular files alone, no more bytes and no deeper JSON than is said.

A name may lead to a device that never ends, to a pipe that nobody writes to, or to a file larger than memory.
"""

import bz2
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from probeprune.errors import UsageError, first_line

LINE_LIMIT = 2**24
"""Most bytes of a JSON line: 16 MiB."""
FILE_LIMIT = 2**31
"""Most bytes of a file of JSON lines, and of a text, packed and unpacked: 2 GiB."""

_PACKED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
}


@contextmanager
def open_regular(path: Path, limit: int = FILE_LIMIT) -> Iterator[IO[bytes]]:
    """Open a file to read bytes.

    Raises:
        UsageError: a file that is missing, cannot be read, is not regular, or has more than `limit` bytes.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null byte, or half a character
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UsageError(f"file '{path}' cannot be read: {reason}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"'{path}' is no regular file; give the path of a file.")
        if status.st_size > limit:
            raise UsageError(
                f"file '{path}' has {status.st_size / 2**20:,.0f} MiB, more than the limit of "
                f"{limit / 2**20:,.0f} MiB; give a smaller one."
            )
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int = FILE_LIMIT) -> str:
    """Read a text file, unpacking `.gz` and `.bz2`. Line ends stay as they are: they are tokens too.

    A byte-order mark at the beginning is left out.

    Raises:
        UsageError: as `open_regular`; a file that is damaged, no UTF-8, or longer than `limit` when unpacked.
    """
    with open_regular(path, limit) as file:
        try:
            content: bytes = _PACKED.get(path.suffix, lambda f: f)(file).read(limit + 1)
            if len(content) > limit:
                raise UsageError(
                    f"file '{path}' has more than {limit / 2**20:,.0f} MiB when unpacked; give a smaller one."
                )
            return content.decode("utf-8-sig")
        except UsageError:
            raise
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UsageError(f"file '{path}' cannot be read as UTF-8 text: {first_line(error)}.") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises `ValueError` for text that is no JSON, nested too deeply, or with integers of thousands of digits.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("it holds a number of thousands of digits") from None


def read_lines(
    path: Path, check: Callable[[Any], None], limit: int = LINE_LIMIT
) -> tuple[list[tuple[int, Any]], list[tuple[int, ValueError]], int]:
    """Read JSON lines: the usable lines and the errors of the others, each with its line number from 1.

    Blank lines are skipped.

    Args:
        path: the file.
        check: raises `ValueError` for JSON that is no result line.
        limit: most bytes of a line; longer ones are among the errors.

    Returns:
        Lines, errors, and the number of bytes up to the last line end.

    Raises:
        UsageError: as `open_regular`.
    """
    rows, errors, complete, number = [], [], 0, 0
    with open_regular(path) as file:
        while line := file.readline(limit + 1):
            number += 1
            rest = line
            while len(rest) > limit and not rest.endswith(b"\n"):
                rest = file.readline(limit + 1)
            complete = file.tell() if rest.endswith(b"\n") else complete
            if not line.strip():
                continue
            try:
                if len(line) > limit:
                    raise ValueError(f"it has more than {limit / 2**20:,.0f} MiB")
                row = parse_json(line)
                check(row)
            except (json.JSONDecodeError, UnicodeDecodeError):
                errors.append((number, ValueError("not JSON")))
            except ValueError as error:
                errors.append((number, error))
            else:
                rows.append((number, row))
    return rows, errors, complete
