"""Folders for temporary files that a kill does not leave behind for good.

Knows nothing of what lies in them.
"""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

from probeprune.places import drop_folder, take_folder


class Scratch:
    """A folder for temporary files, deleted with this object or with its process.

    That of a process that was killed is deleted by the next one.

    Attributes:
        path: the folder, which the user alone may read.
    """

    def __init__(self, name: str) -> None:
        """Make a folder whose name begins with a dot and `name` where `TMPDIR` says.

        Raises `UsageError` if that is not possible.
        """
        self.path, lock = take_folder(Path(tempfile.gettempdir()), name)
        self.path.chmod(0o700)
        self._end = weakref.finalize(self, _drop, self.path, lock, os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scratch":
        """The same: a copy of a model reads its layers where the model does."""
        return self


def _drop(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a process that was forked is not the one that the folder belongs to
        drop_folder(path, lock)
