"""Run a GGUF file in llama.cpp itself, by the library that an npm package brings.

The package is node-llama-cpp's of one platform; npm fetches it, and nothing of it but the library is used:

    npm install --ignore-scripts @node-llama-cpp/linux-x64@3.21.1

`PROBEPRUNE_LLAMA_CPP` says where that was, unless the caller does. Another build of the same release serves
too. Files are taken as they are.
"""

import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probeprune.engines.libllama import REFUSED, VERSION, library_file
from probeprune.errors import UsageError

VARIABLE = "PROBEPRUNE_LLAMA_CPP"
"""The environment variable with the folder that holds llama.cpp's library, or a `node_modules`."""

_SCRIPT = Path(__file__).with_name("llama_child.py")
_BUILDS = {  # by sys.platform and platform.machine(): those that need no accelerator
    ("linux", "x86_64"): "linux-x64",
    ("linux", "aarch64"): "linux-arm64",
    ("darwin", "x86_64"): "mac-x64",
    ("darwin", "arm64"): "mac-arm64-metal",
    ("win32", "AMD64"): "win-x64",
    ("win32", "ARM64"): "win-arm64",
}


@dataclass(frozen=True)
class Scores:
    """What a model says of a sequence of token ids."""

    next: torch.Tensor
    """Log-probability of each id but the first, after those in front of it, float32 (ids - 1)."""
    all: torch.Tensor | None = None
    """Log-probabilities after each id, float32 (ids, vocabulary), where they were asked for."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on the CPU.

    Every call starts a process of its own and opens the file, which it maps into memory. A call raises
    `UsageError`, with the engine's own words, where the engine cannot run the file.
    """

    library: Path
    """Its shared library, with those that it needs beside it."""
    threads: int = 1
    exact: bool = False
    """Keep keys and values in float32 and leave out flash attention, as other engines do; llama.cpp's default
    is float16, and flash attention where it finds that of use."""
    context: int = 512
    """The most tokens of a sequence."""

    def tokens(self, file: Path, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts; special tokens in them are recognised, and none are added."""
        (found,) = self._run(file, [{"kind": "tokens", "texts": list(texts)}])
        return [found[str(index)].tolist() for index in range(len(texts))]

    def scores(self, file: Path, ids: Sequence[Sequence[int]], whole: bool = False) -> list[Scores]:
        """What the file says of sequences of token ids; `whole` adds the whole vocabulary."""
        self._check_length(max(map(len, ids), default=0))
        tasks = [{"kind": "scores", "ids": list(map(int, i)), "whole": whole} for i in ids]
        return [
            Scores(torch.from_numpy(a["next"]), torch.from_numpy(a["all"]) if whole else None)
            for a in self._run(file, tasks)
        ]

    def greedy(self, file: Path, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, of `count` tokens or up to and with one that ends the text."""
        self._check_length(len(ids) + count)
        (found,) = self._run(file, [{"kind": "greedy", "ids": list(map(int, ids)), "count": count}])
        made: list[int] = found["ids"].tolist()
        return made

    def perplexity(self, file: Path, windows: Sequence[Sequence[int]]) -> float:
        """Perplexity over windows of token ids, every id but the first of each counted."""
        logs = torch.cat([scores.next for scores in self.scores(file, windows)])
        return float(torch.exp(-logs.double().mean()))

    def speed(
        self, file: Path, prompt: Sequence[int], count: int, repeats: int = 1
    ) -> list[tuple[float, float]]:
        """Seconds for the prompt but its last token, and for `count` tokens after it, of each repeat.

        The engine's alone: opening the file and choosing tokens are not in them. As llama-bench does, it runs
        the prompt and one token before the first repeat, so that no repeat waits for pages of the file.
        """
        self._check_length(len(prompt) + count)
        task = {"kind": "speed", "prompt": list(map(int, prompt)), "count": count, "repeats": repeats}
        (found,) = self._run(file, [task])
        return [(float(prompt), float(decode)) for prompt, decode in found["seconds"]]

    def check(self) -> None:
        """Raise `UsageError` where the library cannot be loaded or is of another release."""
        self._answers(None, [])

    def _check_length(self, tokens: int) -> None:
        if tokens > self.context:
            raise UsageError(f"{tokens} tokens are more than the context of {self.context}; give it more.")

    def _run(self, file: Path, tasks: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The answers to the tasks, arrays by name."""
        answers: list[dict[str, np.ndarray]] = [{} for _ in tasks]
        for key, array in self._answers(file, tasks).items():
            index, name = key.split(".")
            answers[int(index)][name] = array
        return answers

    def _answers(self, file: Path | None, tasks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        request = {
            "library": str(self.library),
            "model": file and str(Path(file).resolve()),
            "threads": self.threads,
            "context": self.context,
            "exact": self.exact,
            "tasks": tasks,
        }
        done = subprocess.run(
            [sys.executable, str(_SCRIPT)],
            input=json.dumps(request).encode(),
            capture_output=True,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else it calls a debugger before it aborts
        )
        if done.returncode == 0:
            with np.load(io.BytesIO(done.stdout), allow_pickle=False) as arrays:
                return dict(arrays)
        said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        if done.returncode == REFUSED:
            raise UsageError(said[-1])
        if not said:
            said = [f"its process ended with code {done.returncode}"]
        # The engine names the cause first and then what failed by it; a traceback has it at the end.
        reason = said[-1] if said[0].startswith("Traceback") else said[0]
        raise UsageError(f"llama.cpp could not run {file or self.library}: {reason[:300].rstrip('.')}.")


def find_llama_cpp(folder: str | Path | None = None, **settings: Any) -> LlamaCpp:
    """llama.cpp in that folder, or in the one that `PROBEPRUNE_LLAMA_CPP` names.

    Args:
        folder: what holds the library itself, or a `node_modules` with the package of this platform.
        settings: fields of `LlamaCpp`.

    Raises:
        UsageError: there is none, or it is of another release.
    """
    given = folder or os.environ.get(VARIABLE)
    if not given:
        raise UsageError(f"llama.cpp was not found; {_how_to_get_it()}.")
    there = Path(given).expanduser().resolve()
    build = _build()
    places = [there, *([there / "@node-llama-cpp" / build / "bins" / build] if build else [])]
    library = next((file for place in places if (file := library_file(place, "llama"))), None)
    if library is None:
        raise UsageError(f"there is no library of llama.cpp in {given}; {_how_to_get_it()}.")
    engine = LlamaCpp(library, **settings)
    engine.check()
    return engine


def _build() -> str | None:
    return _BUILDS.get((sys.platform, platform.machine()))


def _how_to_get_it() -> str:
    build = _build()
    if build is None:
        return f"build llama.cpp {VERSION} with shared libraries and set {VARIABLE} to their folder"
    command = f"npm install --ignore-scripts @node-llama-cpp/{build}@3.21.1"
    return f"run `{command}` in a folder and set {VARIABLE} to its node_modules"
