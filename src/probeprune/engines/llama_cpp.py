"""Run a GGUF file in llama.cpp itself, through Node and the npm package node-llama-cpp.

The package brings llama.cpp built for Linux, macOS and Windows:

    npm install --ignore-scripts node-llama-cpp@3.21.1

and `PROBEPRUNE_NODE_MODULES` says where that was, unless the caller does. Files are taken as they are.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probeprune.errors import UsageError

VARIABLE = "PROBEPRUNE_NODE_MODULES"
"""The environment variable with the folder `node_modules` in which node-llama-cpp is installed."""

_SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
_INSTALL = "npm install --ignore-scripts node-llama-cpp@3.21.1"


@dataclass(frozen=True)
class Scores:
    """What a model says of a sequence of token ids."""

    next: torch.Tensor
    """Log-probability of each id but the first, after those in front of it, float32 (ids - 1)."""
    all: torch.Tensor | None = None
    """Log-probabilities after each id, float32 (ids, vocabulary), where they were asked for; of probabilities
    that are 0 in float32, minus infinity."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on the CPU.

    Every call starts a process of its own and opens the file, which it maps into memory.
    """

    node_modules: Path
    threads: int = 1
    exact: bool = False
    """Keep keys and values in float32, as other engines do; the engine's own way is float16."""
    context: int = 512
    """The most tokens of a sequence."""

    def tokens(self, file: Path, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts; special tokens in them are recognised, and none are added."""
        (found,) = self._run(file, [{"kind": "tokens", "texts": list(texts)}])
        return [list(map(int, ids)) for ids in found]

    def scores(self, file: Path, ids: Sequence[Sequence[int]], whole: bool = False) -> list[Scores]:
        """What the file says of sequences of token ids; `whole` adds the whole vocabulary."""
        tasks = [{"kind": "scores", "ids": list(map(int, i)), "all": whole} for i in ids]
        return [_scores(answer, len(i)) for answer, i in zip(self._run(file, tasks), ids, strict=True)]

    def greedy(self, file: Path, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, of `count` tokens or up to the end of the text."""
        (found,) = self._run(file, [{"kind": "greedy", "ids": list(map(int, ids)), "count": count}])
        return list(map(int, found))

    def perplexity(self, file: Path, windows: Sequence[Sequence[int]]) -> float:
        """Perplexity over windows of token ids, every id but the first of each counted."""
        logs = torch.cat([scores.next for scores in self.scores(file, windows)])
        return float(torch.exp(-logs.double().mean()))

    def speed(
        self, file: Path, prompt: Sequence[int], count: int, repeats: int = 1
    ) -> list[tuple[float, float]]:
        """Seconds for the prompt but its last token, and for `count` tokens after it, of each repeat."""
        task = {"kind": "speed", "prompt": list(map(int, prompt)), "count": count, "repeats": repeats}
        (found,) = self._run(file, [task])
        return [(float(run["prompt_seconds"]), float(run["decode_seconds"])) for run in found]

    def _run(self, file: Path, tasks: list[dict[str, Any]]) -> list[Any]:
        """The answers to the tasks. Raises `UsageError` with the engine's own words where it fails."""
        request = {
            "model": str(Path(file).resolve()),
            "threads": self.threads,
            "context": self.context,
            "exact": self.exact,
            "tasks": tasks,
        }
        done = subprocess.run(
            ["node", str(_SCRIPT), str(self.node_modules)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = next(
                (line for line in said if "error" in line.lower()), said[-1] if said else "no reason"
            )
            raise UsageError(f"llama.cpp could not run {file}: {reason[:300].rstrip('.')}.")
        answers: list[Any] = json.loads(done.stdout)
        return answers


def find_llama_cpp(node_modules: str | Path | None = None, **settings: Any) -> LlamaCpp:
    """llama.cpp in that folder `node_modules`, or in the one that `PROBEPRUNE_NODE_MODULES` names.

    Raises `UsageError` where there is none, or no Node to run it.
    """
    if shutil.which("node") is None:
        raise UsageError("llama.cpp is run by Node, and there is no 'node' here; install Node 20 or newer.")
    given = node_modules or os.environ.get(VARIABLE)
    if not given:
        raise UsageError(
            f"llama.cpp was not found; run `{_INSTALL}` in a folder and set {VARIABLE} to its node_modules."
        )
    folder = Path(given).expanduser()
    if not (folder / "node-llama-cpp" / "package.json").is_file():
        raise UsageError(f"there is no node-llama-cpp in {folder}; run `{_INSTALL}` in the folder above it.")
    return LlamaCpp(folder.resolve(), **settings)


def _scores(answer: dict[str, Any], length: int) -> Scores:
    whole = None
    if "all" in answer:
        values = np.frombuffer(base64.b64decode(answer["all"]), dtype=np.float32)
        whole = torch.from_numpy(values.copy()).view(length, -1)
    return Scores(torch.tensor(answer["next"], dtype=torch.float32), whole)
