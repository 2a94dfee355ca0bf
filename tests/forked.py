"""Processes forked from one that has imported the package and done nothing else.

They are real ones, with signals, exit codes, output and an environment of their own, without the seconds that
the imports take. What is about starting itself is for `subprocess`: torchrun, `python -m probeprune`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["peft", "probeprune.cli", "probeprune.training.trainer", "transformers.models.llama.modeling_llama"]
)


def command(*words: str) -> None:
    """The command line, with which the process ends."""
    from probeprune_command import main

    sys.argv = ["probeprune", *words]
    main()


class Forked:
    """A process that calls a function of a module; `more` goes into its environment."""

    def __init__(self, function: Callable[..., None], *arguments: object, **more: str) -> None:
        self._said = tempfile.TemporaryDirectory()
        self._files = [Path(self._said.name) / name for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        given = (function, arguments, {**os.environ, **more}, Path.cwd(), self._files)
        self._process = _FORKS.Process(target=_begin, args=given, daemon=True)
        self._process.start()

    @property
    def output(self) -> str:
        """What it has written to standard output by now."""
        return self._files[0].read_text()

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def until(self, ready: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something is so; it must be before the process ends."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self._process.is_alive() and time.monotonic() < deadline, self._files[1].read_text()
            time.sleep(0.005)

    def ended(self, seconds: float = 400) -> tuple[int, str, str]:
        """Its exit code (minus the signal that killed it), output and errors; it ends here at the latest."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        assert self._process.exitcode is not None
        output, errors = (file.read_text() for file in self._files)
        self._said.cleanup()
        return self._process.exitcode, output, errors


def in_two(function: Callable[..., None], *arguments: object) -> list[tuple[int, str, str]]:
    """How two processes end that are connected as a launcher connects them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(port)
    both = [Forked(function, *arguments, **common, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    return [process.ended() for process in both]


def _begin(
    function: Callable[..., None],
    arguments: tuple,
    environment: dict[str, str],
    folder: Path,
    files: list[Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    function(*arguments)
