"""Where results go: a place is tried before the work, held by one process, and in the end whole or empty.

What is not finished lies in a folder `.NAME.partial-RANDOM`, with a lock file beside it. The lock ends with
the process that holds it, however that dies, so the next write to the same place knows what to delete.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from probeprune.errors import UsageError

_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{16}", re.DOTALL)
_LOCK = ".lock"
_COMPLETE = b"complete\n"
"""The content of a partial folder's lock once only moving is left."""

_LAST = ("config.json", "adapter_config.json", "attached.json")
"""The files by which others know a model; they appear last."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


# -- before the work -------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Try to write into `folder`, or where it will be made, and leave nothing behind.

    Raises `UsageError` if that fails.
    """
    with _explained(folder):
        real = resolved(folder)
        if real.exists() and not real.is_dir():
            raise UsageError(f"{folder} is a file; choose another directory.")
        with _tidied(real), partial(real if real.is_dir() else real.parent, real.name):
            pass


def check_place(folder: Path) -> None:
    """As `check_writable`; also raises `UsageError` if another process holds the folder."""
    with _explained(folder), _tidied(resolved(folder)), claimed(folder):
        pass


def check_file(file: Path) -> None:
    """Raise `UsageError` unless `file` can be written, as a regular file or a new one."""
    with _explained(file):
        real = resolved(file)
        if real.exists() and not real.is_file():
            raise UsageError(f"{file} is no regular file; choose another one.")
        with _tidied(real), partial(real.parent, real.name) as folder:
            (folder / real.name).touch()


def check_free(folder: Path) -> None:
    """Raise `UsageError` unless `folder` does not exist or is an empty directory."""
    real = resolved(folder)
    with _explained(folder):
        if real.is_dir():
            clear(real)
        elif not real.exists():
            return
        if not real.is_dir() or any(name != f".{real.name}{_LOCK}" for name in os.listdir(real)):
            raise UsageError(f"{folder} exists and is not empty; choose another directory.")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a place for results while the context lasts, so that no other process writes to it.

    Tries to write first, and makes the folders above.

    Raises:
        UsageError: the place cannot be written, or another process (or thread) holds it.
    """
    with _explained(folder):
        real = resolved(folder)
        real.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, which need not exist yet; of a mount point, only the inside may be ours.
        beside = os.access(real.parent, os.W_OK) or not real.is_dir()
        file = (real.parent if beside else real) / f".{real.name}{_LOCK}"
        try:
            lock = _lock(file)
        except BlockingIOError:
            raise UsageError(
                f"{folder} is in use by {_holder(file)}; wait until it has ended, or choose another place."
            ) from None
    try:
        os.pwrite(lock, _who().encode("utf-8", "backslashreplace"), 0)
        check_writable(folder)
        yield
    finally:
        _release(lock, file)


def resolved(place: Path) -> Path:
    """The place that a path means: absolute, and behind symbolic links. Nothing need exist.

    Raises `UsageError` for a path that texts could not name.
    """
    try:
        str(place).encode("utf-8")
        real = Path(os.path.realpath(place))
    except ValueError as error:  # half a character, or a null byte
        raise UsageError(f"{str(place)!a} is no path that can be written: {error}.") from None
    with _explained(place):
        if real.is_symlink():
            raise OSError(errno.ELOOP, "a circle of links")
    return real


@contextmanager
def _tidied(place: Path) -> Iterator[None]:
    """Delete in the end the folders above `place` that were made meanwhile and are empty."""
    missing = [p for p in place.parents if not p.exists()]
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # never made, or in use by now
                parent.rmdir()


# -- while writing ---------------------------------------------------------------------------------


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Write to a temporary folder, whose content becomes `target` on success and is deleted on failure.

    A new `target` appears in one step. One that exists must be an empty directory and stays the same one (it
    may be a mount point, or somebody's current directory): its files are moved in, the config last; if a kill
    interrupts that, the next look at it completes it. Files get the mode that the umask allows.

    Raises:
        UsageError: `target` is not empty or cannot be written, or the disk is full.
    """
    check_free(target)
    real = resolved(target)
    there = real.is_dir()
    with full_disk(target), _partial(real if there else real.parent, real.name) as (folder, lock):
        yield folder
        _settle(folder)
        if there:
            os.pwrite(lock, _COMPLETE, 0)
            os.fsync(lock)
            _move_in(folder)
        else:
            os.replace(folder, real)
            sync(real.parent)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Write a file of the same name elsewhere, which replaces `file` on success and is deleted on failure.

    Makes the folders above it. A symbolic link stays one. Raises as `writing`.
    """
    real = resolved(file)
    with full_disk(file), partial(real.parent, real.name) as folder:
        yield folder / real.name
        _settle(folder)
        os.replace(folder / real.name, real)
        sync(real.parent)


@contextmanager
def partial(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for what is not finished, deleted at the end; `name` says what it is for.

    Makes the folders above it, and clears `parent`.
    """
    with _partial(parent, name) as (folder, _):
        yield folder


def discard(folder: Path) -> None:
    """Delete a folder; if a kill interrupts that, the next write to the same place goes on."""
    with partial(folder.parent, folder.name) as grave, suppress(FileNotFoundError):  # others are as fast
        os.replace(folder, grave)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder of unfinished work, which another process goes on with where this one dies.

    It need not exist. Deleted where the context ends without an exception; gives False, and leaves it,
    where another process holds it.
    """
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(_lock_of(folder))
        except BlockingIOError:
            lock = -1
    try:
        yield lock >= 0
        if lock >= 0 and folder.exists():
            discard(folder)
    finally:
        if lock >= 0:
            _release(lock, _lock_of(folder))


def clear(folder: Path) -> None:
    """Delete what processes that died left unfinished in `folder`, and move what they had completed.

    In a folder that everybody may write, such as that for temporary files, only what is the user's own.
    """
    for file in sorted(folder.glob(f".*{_LOCK}")):
        if not _PARTIAL.fullmatch(file.stem) or _of_others(folder, file):
            continue
        try:
            lock = _lock(file, new=False)
        except OSError:  # its owner lives, or it is somebody else's
            continue
        try:
            if os.pread(lock, len(_COMPLETE), 0) == _COMPLETE:
                _move_in(folder / file.stem)
            shutil.rmtree(folder / file.stem, ignore_errors=True)
        finally:
            _release(lock, file)


@contextmanager
def _partial(parent: Path, name: str) -> Iterator[tuple[Path, int]]:
    """As `partial`, with the descriptor of the lock."""
    folder, lock = take_folder(parent, name)
    try:
        yield folder, lock
    finally:
        drop_folder(folder, lock)


def take_folder(parent: Path, name: str) -> tuple[Path, int]:
    """As `partial`, for a folder that lives until `drop_folder` or the end of the process; with its lock."""
    with _explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        clear(parent)
        lock, folder = _new_folder(parent, name)
    return folder, lock


def drop_folder(folder: Path, lock: int) -> None:
    """Delete a folder that `take_folder` made, and let go of its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    _release(lock, _lock_of(folder))


def _of_others(folder: Path, file: Path) -> bool:
    """Whether a file is somebody else's, in a folder that everybody may write."""
    with suppress(FileNotFoundError):
        return bool(folder.stat().st_mode & stat.S_ISVTX) and file.lstat().st_uid != os.getuid()
    return True


def _new_folder(parent: Path, name: str) -> tuple[int, Path]:
    """A new partial folder and its lock, which is there before the folder is."""
    while True:
        # Not the whole name: it may have as many bytes as a name can.
        folder = parent / f".{name[:40]}.partial-{secrets.token_hex(8)}"
        try:
            lock = _lock(_lock_of(folder))
        except BlockingIOError:  # somebody clears the parent and took it for left over
            continue
        try:
            folder.mkdir()
        except BaseException:
            _release(lock, _lock_of(folder))
            raise
        return lock, folder


def _lock_of(folder: Path) -> Path:
    """The lock file of a partial folder."""
    return folder.with_name(f"{folder.name}{_LOCK}")


def _settle(folder: Path) -> None:
    """Give all files the mode that `folder` got from the umask, and wait until they are on disk.

    Libraries that write through temporary files of their own leave them to the user alone.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_in(folder: Path) -> None:
    """Move the content of a folder into the one it lies in."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda p: (p.name in _LAST, p.name)):
        os.replace(path, folder.parent / path.name)
    sync(folder.parent)


# -- locks -----------------------------------------------------------------------------------------


def _lock(file: Path, new: bool = True) -> int:
    """Open and lock a file; returns its descriptor. Raises `BlockingIOError` if somebody else holds it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if new else 0)
    while True:
        descriptor = os.open(file, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have deleted it between these two calls.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(lock: int, file: Path) -> None:
    """Delete a lock file that this process holds, then let go of it."""
    file.unlink(missing_ok=True)
    os.close(lock)


def _who() -> str:
    """This process, as `_holder` tells others."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    command = " ".join([name, *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()} ({command})"


def _holder(file: Path) -> str:
    """Who holds a lock file, in its own words."""
    try:
        words = file.read_bytes()[:300].decode("utf-8", "replace")
    except OSError:
        words = ""
    return "".join(c if c.isprintable() else "?" for c in words) or "another process"


# -- errors ----------------------------------------------------------------------------------------


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Raise what the file system refuses as `UsageError` about `place`."""
    try:
        yield
    except OSError as error:
        raise _refusal(place, error.errno or errno.EIO) from error


@contextmanager
def full_disk(place: Path) -> Iterator[None]:
    """Raise errors of a disk that is full or fails as `UsageError` about `place`; all others pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number(str(error))
        if number not in _FULL:
            raise
        raise _refusal(place, number) from error


def _refusal(place: Path, number: int) -> UsageError:
    number = errno.ENOTDIR if number == errno.EEXIST else number  # what stands in the way is a file
    advice = "free some space or choose" if number in (errno.ENOSPC, errno.EDQUOT) else "choose"
    return UsageError(f"{place} cannot be written: {os.strerror(number).lower()}; {advice} another place.")


def _number(message: str) -> int | None:
    """The error number in a message of safetensors, such as `... (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None
