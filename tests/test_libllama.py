"""Which library of llama.cpp is taken, and which is refused: no engine is needed for that."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from probeprune.engines import libllama, llama_cpp
from probeprune.engines.libllama import CONTEXT_DEFAULTS, MODEL_DEFAULTS
from probeprune.errors import UsageError


def library(version="0.4.0", model=MODEL_DEFAULTS, context=CONTEXT_DEFAULTS, batch=(), without=()):
    """A library made of Python functions, as it would answer to `check`."""

    def get_one(token, count):
        return libllama.Batch(count, token._obj and libllama.ctypes.addressof(token._obj), *batch)

    functions = {name: lambda *arguments: None for name in libllama._FUNCTIONS}
    functions |= {
        "llama_version": version.encode,
        "llama_model_default_params": lambda: libllama.ModelParams(**model),
        "llama_context_default_params": lambda: libllama.ContextParams(**context),
        "llama_batch_get_one": get_one,
    }

    def typed(function):
        return lambda *arguments: function(*arguments)  # a function of its own, which takes attributes

    return SimpleNamespace(**{n: typed(f) for n, f in functions.items() if n not in without})


@pytest.mark.parametrize("version", ["0.4.0", "0.4.0-dev"])
def test_the_release_is_taken(version):
    libllama.check(library(version), Path("libllama.so"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "0.4.1"}, "is version 0.4.1"),
        ({"without": ("llama_version",)}, "is of another release"),
        ({"without": ("llama_get_memory",)}, "is of another release"),
        ({"model": {**MODEL_DEFAULTS, "main_gpu": 1}}, "other parameters"),
        ({"context": {**CONTEXT_DEFAULTS, "type_k": 0}}, "other parameters"),
        ({"context": {**CONTEXT_DEFAULTS, "cb_eval": 8}}, "other parameters"),
        ({"batch": (8,)}, "other parameters"),
    ],
)
def test_a_library_of_another_layout_is_refused(changes, said):
    with pytest.raises(libllama.OtherLibrary, match=said) as refused:
        libllama.check(library(**changes), Path("libllama.so"))
    assert str(refused.value).endswith("; llama.cpp 0.4.0 is needed.")


def test_what_is_no_library_is_refused_before_any_work(tmp_path):
    (tmp_path / "libllama.so").write_text("not a library")
    with pytest.raises(UsageError, match=r"libllama.so cannot be loaded .*llama.cpp 0.4.0 is needed"):
        llama_cpp.find_llama_cpp(tmp_path)


def test_without_the_engine(monkeypatch, tmp_path):
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    command = r"npm install --ignore-scripts @node-llama-cpp/linux-x64@3.21.1"
    with pytest.raises(UsageError, match=rf"{command}.* PROBEPRUNE_LLAMA_CPP"):
        llama_cpp.find_llama_cpp()
    with pytest.raises(UsageError, match=rf"there is no library of llama.cpp in .*{command}"):
        llama_cpp.find_llama_cpp(tmp_path / "missing")
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(UsageError, match=r"build llama.cpp 0.4.0 .* PROBEPRUNE_LLAMA_CPP"):
        llama_cpp.find_llama_cpp(tmp_path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["libllama-common.so", "libllama.v0.4.0.so"], "libllama.v0.4.0.so"),
        (["libllama.so", "libllama.so.0.4.0"], "libllama.so"),
        (["libllama.so.0.4.0"], "libllama.so.0.4.0"),
        (["libllama.0.4.0.dylib"], "libllama.0.4.0.dylib"),
        (["llama-common.dll", "llama.dll"], "llama.dll"),
        (["libllama-common.so", "libllama.so.txt", "llama-addon.node"], None),
    ],
)
def test_the_names_that_a_library_has(files, found, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    file = libllama.library_file(tmp_path, "llama")
    assert (file and file.name) == found


def test_the_child_starts_without_torch_and_transformers(tmp_path):
    request = {"library": str(tmp_path / "libllama.so"), "tasks": []}
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", str(llama_cpp._SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == libllama.REFUSED
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if "|" in line}
    assert "numpy" in imported and "libllama" in imported
    assert not imported & {"torch", "transformers", "probeprune"}
