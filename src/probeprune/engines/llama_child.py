"""Opens a GGUF file with llama.cpp's own library and answers one request.

    python llama_child.py < request.json > answers.npz

The request: {library, model, threads, context, exact, tasks}. Each task has a `kind`, one of the functions in
`KINDS`, and that function's arguments; of no tasks, only the library is looked at. The answers are arrays by
"INDEX OF THE TASK.NAME".

A script, which the package starts and never imports: llama.cpp may end the process at a file that it cannot
bear. It imports `libllama.py` from its own folder and not through the package, since that would import torch,
which takes longer than the work of most requests.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from libllama import REFUSED, OtherLibrary, open_library, thread_pool

_ROWS = 512  # positions whose logits are held at once; also the most that the engine computes at once
_F32, _NEVER = 0, 0  # ggml_type, llama_flash_attn_type


class EngineError(Exception):
    """The engine refused what it was given."""


class Run:
    """A file opened, and one sequence of tokens in it."""

    def __init__(self, library: Any, request: dict[str, Any]) -> None:
        self.library = library
        self.seconds = 0.0
        """What the engine has computed for."""
        params = library.llama_model_default_params()
        self._no_devices = ctypes.c_void_p(None)  # an empty list: the CPU alone, also where there is a GPU
        params.devices = ctypes.addressof(self._no_devices)
        self._model = library.llama_model_load_from_file(os.fsencode(request["model"]), params)
        if not self._model:
            raise EngineError("the file could not be opened")
        self.vocab = library.llama_model_get_vocab(self._model)
        self.size = library.llama_vocab_n_tokens(self.vocab)
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = request["context"]
        settings.n_ubatch = _ROWS
        settings.n_threads = settings.n_threads_batch = request["threads"]
        if request["exact"]:  # else float16, and flash attention where the engine finds it of use
            settings.type_k = settings.type_v = _F32
            settings.flash_attn_type = _NEVER
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise EngineError("there is no room to run the file")
        pool = thread_pool(library, request["threads"])
        if pool:
            library.llama_attach_threadpool(self._context, pool, pool)

    def clear(self) -> None:
        """Begin a sequence anew."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._context), True)

    def feed(self, ids: Any, every: bool = False) -> np.ndarray:
        """Go on with token ids.

        Returns:
            Logits, float32 (ids or 1, vocabulary), after every id or the last; valid until the next call.
        """
        tokens, wanted = np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.int8)
        batch = self.library.llama_batch_get_one(tokens.ctypes.data, len(tokens))
        if every:
            batch.logits = wanted.ctypes.data
        start = time.perf_counter()
        code = self.library.llama_decode(self._context, batch)
        self.library.llama_synchronize(self._context)
        self.seconds += time.perf_counter() - start
        if code:
            raise EngineError(f"llama_decode answered {code}")
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(self.library.llama_get_logits(self._context), (rows, self.size))


def tokens(run: Run, texts: list[str]) -> dict[str, np.ndarray]:
    """The ids of each text, by its index; special tokens in it are recognised, and none are added."""
    found = {}
    for index, text in enumerate(texts):
        data = text.encode()
        ids = np.empty(len(data) + 8, dtype=np.int32)  # a token has a byte or more; some add a space in front
        count = run.library.llama_tokenize(run.vocab, data, len(data), ids.ctypes.data, len(ids), False, True)
        if count < 0:
            raise EngineError(f"a text of {len(data)} bytes has {-count} tokens")
        found[str(index)] = ids[:count]
    return found


def scores(run: Run, ids: list[int], whole: bool) -> dict[str, np.ndarray]:
    """`next`: the log-probability of each id but the first, float32; `all`: those of the whole vocabulary.

    The softmax is taken in float64.
    """
    run.clear()
    given = ids if whole else ids[:-1]
    following = np.empty(max(len(ids) - 1, 0), dtype=np.float32)
    rows = np.empty((len(given) if whole else 0, run.size), dtype=np.float32)
    for start in range(0, len(given), _ROWS):
        for position, logits in enumerate(run.feed(given[start : start + _ROWS], every=True), start):
            logs = logits.astype(np.float64)
            logs -= logs.max()
            logs -= np.log(np.exp(logs).sum())
            if position + 1 < len(ids):
                following[position] = logs[ids[position + 1]]
            if whole:
                rows[position] = logs
    return {"next": following, **({"all": rows} if whole else {})}


def greedy(run: Run, ids: list[int], count: int) -> dict[str, np.ndarray]:
    """`ids`: the likeliest continuation, of `count` tokens or up to one that ends the text."""
    run.clear()
    made: list[int] = []
    while len(made) < count and not (made and run.library.llama_vocab_is_eog(run.vocab, made[-1])):
        made.append(int(run.feed(made[-1:] or ids)[0].argmax()))
    return {"ids": np.array(made, dtype=np.int64)}


def speed(run: Run, prompt: list[int], count: int, repeats: int) -> dict[str, np.ndarray]:
    """`seconds`, float64 (repeats, 2): of the prompt but its last token, and of `count` tokens after it.

    They are the engine's own: choosing a token is not in them. One turn more goes before, and is not kept, so
    that no page of the file is read for the first time while the clock runs; it decodes one token.
    """
    found = []
    for turn in range(repeats + 1):
        run.clear()
        run.seconds = 0.0
        if prompt[:-1]:
            run.feed(prompt[:-1])
        middle, last = run.seconds, prompt[-1]
        for _ in range(count if turn else 1):
            last = int(run.feed([last])[0].argmax())
        found.append((middle, run.seconds - middle))
    return {"seconds": np.array(found[1:], dtype=np.float64).reshape(repeats, 2)}


KINDS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "tokens": tokens,
    "scores": scores,
    "greedy": greedy,
    "speed": speed,
}


def main() -> None:
    """Answer the request on standard input."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the answers
    request = json.load(sys.stdin)
    try:
        library = open_library(Path(request["library"]))
    except OtherLibrary as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    arrays: dict[str, Any] = {}
    if request["tasks"]:
        try:
            run = Run(library, request)
            for index, task in enumerate(request["tasks"]):
                made = KINDS[task.pop("kind")](run, **task)
                arrays |= {f"{index}.{name}": array for name, array in made.items()}
        except EngineError as error:
            sys.exit(str(error))
    np.savez(answers, **arrays)
    answers.close()
    os._exit(0)  # the library may still log while it is unloaded, when there is no Python left to log to


if __name__ == "__main__":
    main()
