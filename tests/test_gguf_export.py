"""GGUF files without an engine: what is refused, and that nothing is left of what did not end."""

import signal
import sys
import time
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
import torch
from forked import Forked
from test_cli import call
from transformers import Qwen2Config, Qwen2ForCausalLM

from probeprune import compose, export_gguf, prune, save
from probeprune.engines import gguf_tokenizer, gguf_write
from probeprune.engines.gguf_plan import plan
from probeprune.errors import Notice, UsageError
from probeprune.model import gguf_rope
from probeprune.model.gguf_keys import Reader
from probeprune.model.gguf_tensors import Heads, arranged, restored

WIDE = {
    **{k: v for k, v in tiny.SHAPE.items() if k != "intermediate_size"},
    **{"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2},
}
"""Rows of a multiple of 32, but for the MLP's."""


@pytest.fixture
def tokens(monkeypatch):
    """Keys of a tokenizer, whatever the tokenizer: these tests are about the rest."""
    monkeypatch.setattr(gguf_write, "tokenizer_keys", lambda tokenizer, vocabulary: {})


def refused(model, type, *words):
    with pytest.raises(UsageError) as error:
        plan(model, type)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert all(word in str(error.value) for word in words), str(error.value)


def per_layer(name):
    model = tiny.FAMILIES[name]()
    method = compose("flap", name="flap", round_to=1, skip_layers=1)
    prune(model, method, 0.3, calibration=tiny.token_ids())
    return model


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", ("'gemma2', all its layers have the same widths", "layout uniform")),
        ("phi3", ("layout uniform", "MLPs alone")),
        ("gpt-neox", ("layout uniform", "MLPs alone")),
        ("qwen3", ("'openelm', its output matrix is tied", "layout uniform")),
    ],
)
def test_widths_that_no_architecture_holds(name, words):
    refused(per_layer(name), "f16", *words)


def test_families_and_settings_that_no_architecture_holds():
    refused(tiny.FAMILIES["opt"](), "f16", "no architecture for OPT")
    model = tiny.FAMILIES["llama"]()
    model.config.hidden_act = "relu"
    refused(model, "f16", "activation function is silu, not relu")
    model = tiny.FAMILIES["llama"]()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused(model, "f16", "no RoPE scaling of type dynamic")
    refused(tiny.FAMILIES["gemma2"](), "f16", "divides attention by the root of 8, not of 256")
    refused(tiny.FAMILIES["llama"](), "q9_9", "unknown GGUF type", "q8_0")


def test_rows_that_blocks_do_not_divide():
    model = Qwen2ForCausalLM(Qwen2Config(**WIDE, intermediate_size=100))
    refused(model, "q4_0", "blk.0.ffn_down.weight have 100", "--round-to 32", "f16 or bf16")
    assert plan(model, "bf16").architecture.name == "qwen2"


def test_a_window_the_engine_does_not_have_shortens_the_context(tokens, tmp_path):
    with pytest.warns(Notice, match="at most 8 tokens"):
        export_gguf(tiny.FAMILIES["mistral"](), tmp_path / "a.gguf", tokenizer=object())
    fields = Reader(tmp_path / "a.gguf").fields
    assert fields["llama.context_length"].contents() == 8


def test_numbers_beyond_half_precision(tokens, tmp_path):
    model = tiny.FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = 1e6
    (tmp_path / "a.gguf").write_bytes(b"before")
    with pytest.raises(UsageError, match=r"blk\.2\.ffn_up\.weight holds numbers beyond 65504"):
        export_gguf(model, tmp_path / "a.gguf", tokenizer=object(), type="f16")
    assert (tmp_path / "a.gguf").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
    export_gguf(model, tmp_path / "a.gguf", tokenizer=object(), type="bf16")


def test_places_that_cannot_be_written(tokens, tmp_path, monkeypatch):
    model = tiny.FAMILIES["llama"]()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no regular file"):
        export_gguf(model, tmp_path / "folder", tokenizer=object())
    with pytest.raises(UsageError, match=r"needs the model's tokenizer"):
        export_gguf(model, tmp_path / "a.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"free some space"):
        export_gguf(model, tmp_path / "a.gguf", tokenizer=object())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_disk_that_fills_up(tokens, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot be written: file too large"):
            export_gguf(tiny.FAMILIES["llama"](), tmp_path / "a.gguf", tokenizer=object(), type="f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def slow_export(file):
    """Write a file, and wait behind the third tensor."""

    def progress(what, done, total):
        print("writing")
        time.sleep(5 if done == 3 else 0)

    gguf_write.tokenizer_keys = lambda tokenizer, vocabulary: {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    gguf_write.export_gguf(tiny.FAMILIES["llama"](), file, tokenizer=0, progress=progress)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted(how, tmp_path):
    """No file appears; what a kill leaves is deleted by the next export to the same place."""
    file = tmp_path / "a.gguf"
    process = Forked(slow_export, file)
    process.until(lambda: process.output.count("writing") == 4)
    process.send(how)
    assert process.ended()[0] == (1 if how == signal.SIGTERM else -how)
    assert not file.exists()
    gguf_write.check_file(file)
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_llama_cpp_does_not_know(number_tokenizer, smollm2):
    with pytest.raises(UsageError, match=r"does not know this kind of tokenizer \(WordLevel\)"):
        gguf_tokenizer.tokenizer_keys(number_tokenizer, 2000)
    with pytest.raises(UsageError, match="no name for the way"):
        gguf_tokenizer._split_name(number_tokenizer)
    with pytest.raises(UsageError, match=r"49152 tokens and the model 128 embeddings"):
        gguf_tokenizer.tokenizer_keys(smollm2.tokenizer, 128)
    filled = gguf_tokenizer.tokenizer_keys(smollm2.tokenizer, 49160)
    assert filled["tokenizer.ggml.tokens"].value[-1] == "[PAD49159]"


@pytest.mark.parametrize("order", ["plain", "query pairs", "key pairs", "by head"])
def test_orders_of_rows_are_undone(order):
    heads = Heads(6, 6 if order == "by head" else 2, 8)
    rows = {"query pairs": 48, "key pairs": 16, "by head": 144}.get(order, 20)
    for shape in ((rows,), (rows, 5)):
        weight = torch.randn(shape)
        assert restored(arranged(weight, order, heads), order, heads).equal(weight)


def test_rope_parameters_are_undone():
    for parameters in (
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
        },
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **gguf_rope._LLAMA3},
    ):
        keys = gguf_rope.keys(parameters, 8192)
        assert gguf_rope.parameters(keys, gguf_rope.tensors(parameters, 64), 64, 64) == parameters
    with pytest.raises(ValueError, match="not those of LLaMA 3"):
        gguf_rope.parameters(keys, {"rope_freqs": torch.tensor([1.0, 7.0])}, 4, 4)


@pytest.mark.real
def test_the_command(smollm2, tmp_path, capsys):
    save(per_layer("llama-gqa"), tmp_path / "model")
    assert call("export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "a.gguf")) == 2
    assert "unknown format" in capsys.readouterr().err
    folder = ("prune", "--ratio", "0.2", "--method", "random", "--out", str(tmp_path / "b"))
    assert call(*folder, "--type", "f16") == 2
    assert "--type is for GGUF files" in capsys.readouterr().err
    file = str(tmp_path / "pruned.gguf")
    pruning = ("prune", "--method", "random", "--ratio", "0.2", "--windows", "0", "--out", file)
    assert call(*pruning, "--type", "q4_0", "--round-to", "16") == 2
    assert "--round-to 32" in capsys.readouterr().err
    assert call(*pruning, "--type", "q8_0", "--layout", "per-layer", "--round-to", "32") == 0
    reader = Reader(file)
    assert reader.fields["general.architecture"].contents() in ("deci", "llama")
    assert reader.tensors[0].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_stored_numbers(tokens, tmp_path):
    """Matrices in the type, vectors in float32, the output matrix of a low type in q8_0."""
    model = Qwen2ForCausalLM(Qwen2Config(**WIDE, intermediate_size=96))
    export_gguf(model, tmp_path / "a.gguf", tokenizer=object(), type="q4_0")
    types = {t.name: t.tensor_type.name for t in Reader(tmp_path / "a.gguf").tensors}
    assert types["output.weight"] == "Q8_0" and types["token_embd.weight"] == "Q4_0"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"
    assert np.sum([t == "F32" for t in types.values()]) == 5 * 5 + 1
