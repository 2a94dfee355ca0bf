"""Where results go: tried before the work, held by one process, whole or empty after a kill at any point."""

import errno
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from probeprune import places
from probeprune.errors import UsageError
from probeprune.files import load_tensors, save_tensors, stored_json, write_json
from probeprune.places import check_file, check_free, check_place, claimed, clear, discard, replacing, writing


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def fill(folder: Path) -> None:
    """What stands for a checkpoint."""
    (folder / "config.json").write_text("{}")
    (folder / "adapter").mkdir()
    (folder / "adapter/weights").write_bytes(b"1234")


WHOLE = {"config.json", "adapter", "adapter/weights"}


def killed(work, at=None) -> None:
    """Run `work` in a process of its own that dies in it: at the first call of `os`'s function `at`."""
    pid = os.fork()
    if pid == 0:
        try:
            if at is not None:
                setattr(os, at, lambda *_, **__: os._exit(9))
            work()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


# -- places that can be written, and those that cannot ---------------------------------------------


def new(folder):
    return folder / "deep/er/out"


def empty(folder):
    (folder / "out").mkdir(mode=0o750)
    return folder / "out"


def linked(folder):
    empty(folder)
    (folder / "link").symlink_to("out")
    return folder / "link"


def linked_to_nothing(folder):
    (folder / "link").symlink_to("out")
    return folder / "link"


def current(folder):
    os.chdir(empty(folder))
    return Path(".")


@pytest.mark.parametrize("place", [new, empty, linked, linked_to_nothing, current])
def test_what_means_a_free_directory_is_one(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = place(tmp_path)
    before = out.stat().st_ino if out.is_dir() else None
    check_place(out)
    check_free(out)
    assert names(tmp_path) <= {"out", "link"}, "trying leaves nothing behind"
    with claimed(out):
        with writing(out) as folder:
            fill(folder)
        assert names(out) == WHOLE
    assert names(out) == WHOLE
    assert before in (None, out.stat().st_ino), "somebody may be in it"
    assert not [n for n in names(tmp_path) if "partial" in n or "lock" in n]
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_free(out)


def test_a_mount_point_is_written_inside(tmp_path, monkeypatch):
    mount = empty(tmp_path)
    whole = os.replace

    def refused(source, target):
        if Path(target) == mount:
            raise OSError(errno.EBUSY, "Device or resource busy")
        whole(source, target)

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # what is above is not ours
    with claimed(mount):
        check_free(mount)
        assert names(tmp_path) == {"out", "out/.out.lock"}
        with writing(mount) as folder:
            fill(folder)
    assert names(mount) == WHOLE


def below_a_file(folder):
    (folder / "file").touch()
    return folder / "file/out"


def a_file(folder):
    (folder / "file").touch()
    return folder / "file"


def a_loop(folder):
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (below_a_file, "cannot be written: not a directory; choose another place"),
        (a_file, "is a file; choose another directory"),
        (a_loop, "cannot be written: too many levels of symbolic links"),
        (lambda f: f / ("x" * 256), "cannot be written: file name too long"),
        (lambda f: f / "x" / ("y/" * 3000), "cannot be written: file name too long"),
        (lambda f: f / "half\ud83d", r"half\\ud83d' is no path that can be written"),
        (lambda f: f / "raw\udcff", r"raw\\udcff' is no path that can be written"),
        (lambda f: f / "nu\0l", "is no path that can be written"),
        (lambda f: Path("/proc/out"), "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(place, says, tmp_path):
    out = place(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UsageError, match=says) as refused:
        check_place(out)
    sentence = str(refused.value)
    sentence.encode("utf-8")
    assert sentence.endswith(".") and "\n" not in sentence
    assert names(tmp_path) == before
    with pytest.raises(UsageError), writing(out):
        raise AssertionError("the work began")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: full (os error 28)")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(error, tmp_path):
    for context in (writing, replacing):
        with (
            pytest.raises(UsageError, match="no space left on device; free some space"),
            context(tmp_path / "o"),
        ):
            raise error
        assert names(tmp_path) == set()


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out") as folder:
        (folder / "missing").read_text()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("context", [writing, replacing, claimed])
@pytest.mark.parametrize("place", [new, empty])
def test_an_interrupt_leaves_nothing(context, place, tmp_path):
    out = place(tmp_path) if context is not replacing else tmp_path / "file"
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt), context(out):
        raise KeyboardInterrupt
    assert names(tmp_path) - before <= {"deep", "deep/er"}


def test_files_are_checked_alike(tmp_path):
    check_file(tmp_path / "new/page.html")
    assert names(tmp_path) == set()
    (tmp_path / "page").touch()
    (tmp_path / "link").symlink_to("page")
    check_file(tmp_path / "link")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and stored_json(tmp_path / "page") == [1]
    for bad in ("/dev/null", tmp_path, tmp_path / "page/below", tmp_path / "p\udcff"):
        with pytest.raises(UsageError, match=r"no regular file|written"):
            check_file(Path(bad))


# -- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_have_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with writing(tmp_path / "out") as folder:
            fill(folder)
            save_tensors(folder / "model.safetensors", {"a": torch.zeros(2)}, {})
            (folder / "config.json").chmod(0o600)
        save_tensors(tmp_path / "statistics.safetensors", {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads would see it"))
    with writing(tmp_path / "out") as folder:
        fill(folder)
    write_json(tmp_path / "file.json", {})


# -- kills -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["replace", "fsync", None])
@pytest.mark.parametrize("place", [new, empty])
def test_what_a_kill_leaves_is_deleted_by_the_next_write(place, at, tmp_path):
    out = place(tmp_path)

    def write(dies=False):
        with writing(out) as folder:
            fill(folder)
            if dies:
                os._exit(9)

    killed(lambda: write(dies=at is None), at)
    killed(lambda: write(dies=at is None), at)
    assert any(".partial-" in n for n in names(tmp_path))
    check_free_or_whole(out)
    if not (out / "config.json").exists():
        write()
    assert names(out) == WHOLE and not [n for n in names(tmp_path) if ".partial-" in n]


def check_free_or_whole(out: Path) -> None:
    """A kill leaves all of a result or none of it, as `check_free` finds it."""
    try:
        check_free(out)
    except UsageError:
        assert names(out) == WHOLE
    else:
        assert not out.exists() or not any(p for p in out.iterdir())


def test_a_kill_between_two_moves_is_completed(tmp_path):
    out, moves = empty(tmp_path), []

    def write():
        replace = os.replace

        def dies_at_the_second(*args):
            moves.append(args)
            if len(moves) == 2:
                os._exit(9)
            replace(*args)

        os.replace = dies_at_the_second
        with writing(out) as folder:
            fill(folder)

    killed(write)
    assert not (out / "config.json").exists() and (out / "adapter").exists(), "the config is last"
    with pytest.raises(UsageError, match="not empty"):
        check_free(out)
    assert names(out) == WHOLE


def test_what_the_living_write_stays(tmp_path):
    with places.partial(tmp_path, "one") as one:
        (one / "file").touch()
        clear(tmp_path)
        write_json(tmp_path / "other.json", {})
        assert (one / "file").exists()
    assert names(tmp_path) == {"other.json"}


def test_what_others_named_like_ours_stays(tmp_path):
    for name in (".x.lock", ".x.partial-1.lock", "x.partial-0123456789abcdef.lock"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    clear(tmp_path)
    assert names(tmp_path) == before


def test_a_folder_discarded_half_is_discarded_whole(tmp_path):
    (tmp_path / "work").mkdir()
    fill(tmp_path / "work")

    def discard_and_die():
        places.shutil.rmtree = lambda *_, **__: os._exit(9)
        discard(tmp_path / "work")

    killed(discard_and_die)
    assert not (tmp_path / "work").exists() and names(tmp_path)
    clear(tmp_path)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("write", [write_json, lambda file, value: save_tensors(file, {"a": value}, {})])
def test_a_file_killed_while_written_is_the_one_before(write, tmp_path):
    file, first, second = tmp_path / "file", torch.zeros(2), torch.ones(2)
    if write is write_json:
        first, second = [1], [2]
    write(file, first)
    content = file.read_bytes()
    killed(lambda: write(file, second), "replace")
    assert file.read_bytes() == content and len(names(tmp_path)) > 1
    write(file, second)
    assert file.read_bytes() != content and names(tmp_path) == {"file"}
    assert write is write_json or load_tensors(file) is not None


# -- one process at a time -------------------------------------------------------------------------


def test_the_second_process_is_told_who_holds_the_place(tmp_path):
    out = tmp_path / "out"
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with claimed(out):
                os.write(tell, b"in")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 2) == b"in"
        with pytest.raises(UsageError, match=rf"in use by process {pid} on .* \(.+\)") as refused:
            check_place(out)
        assert "\n" not in str(refused.value)
        with pytest.raises(UsageError, match="in use by"), claimed(tmp_path / "x/../out"):
            raise AssertionError("two at once")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with claimed(out):  # the lock died with its owner
        pass
    assert names(tmp_path) == set()


def test_of_many_threads_one_at_a_time(tmp_path):
    inside, most, refused, done = [], [0], [0], [0]

    def go():
        for _ in range(20):
            try:
                with claimed(tmp_path / "out"):
                    inside.append(1)
                    most[0] = max(most[0], len(inside))
                    time.sleep(0.0005)
                    inside.pop()
                    done[0] += 1
            except UsageError:
                refused[0] += 1

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and refused[0] and done[0] and names(tmp_path) == set()


def test_many_writers_of_one_file_leave_one_whole(tmp_path):
    values = [list(range(n, n + 2000)) for n in range(4)]
    threads = [
        threading.Thread(target=lambda v=v: [write_json(tmp_path / "f", v) for _ in range(5)]) for v in values
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored_json(tmp_path / "f") in values and names(tmp_path) == {"f"}
