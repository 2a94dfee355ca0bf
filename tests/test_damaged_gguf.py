"""GGUF files that are damaged or something else: one sentence, and nothing is left in the cache."""

import zipfile

import gguf
import numpy as np
import pytest

from probeprune import load_model
from probeprune.errors import UsageError
from probeprune.model.machine import cache_dir

SHAPES = {
    "attn_q": (16, 16),
    "attn_k": (16, 16),
    "attn_v": (16, 16),
    "attn_output": (16, 16),
    "ffn_gate": (32, 16),
    "ffn_up": (32, 16),
    "ffn_down": (16, 32),
    "attn_norm": (16,),
    "ffn_norm": (16,),
}


def write(file, layers=1, without=(), wrong_shape=(), merges="a b"):
    """A tiny LLaMA as llama.cpp writes it."""
    tokens = 20
    writer, random = gguf.GGUFWriter(file, "llama"), np.random.default_rng(0)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(97, 96 + tokens)), "ab"])
    writer.add_token_merges([merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (tokens, 16), "output": (tokens, 16), "output_norm": (16,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in SHAPES.items()}).items():
        if name not in without:
            values = random.standard_normal(shape[::-1] if name in wrong_shape else shape)
            writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def refused(file, *named):
    """One sentence that names the file, and a cache without a trace of it."""
    with pytest.raises(UsageError) as error:
        load_model(str(file), dtype="float32")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in ("could not be converted", file.name, *named))
    assert list((cache_dir() / "models").iterdir()) == []


def test_a_whole_file_opens(file):
    model = load_model(str(file), dtype="float32").model
    assert model.config.num_hidden_layers == 1 and model.lm_head.weight.shape == (20, 16)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.05, 0.3, 0.9, 0.999])
def test_cut(share, file):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file)


def test_other_files_of_that_name(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("GGUF", "nothing of the kind")
    refused(file, "does not begin as")
    file.write_bytes(b"GGUF" + bytes(range(256)) * 20)
    refused(file)


@pytest.mark.parametrize("name", ["blk.0.ffn_down", "token_embd", "output_norm"])
def test_a_tensor_is_missing(name, file):
    write(file, without=(name,))
    refused(file, "has no tensor")


@pytest.mark.parametrize("name", ["blk.0.ffn_down", "token_embd"])
def test_a_tensor_of_another_shape(name, file):
    write(file, wrong_shape=(name,))
    refused(file)


def test_a_tokenizer_that_merges_tokens_it_does_not_have(file):
    write(file, merges="a c")
    refused(file)


@pytest.mark.parametrize("layers", [0, 2, 10**9])
def test_another_number_of_layers(layers, file):
    write(file, layers=layers)
    refused(file)
