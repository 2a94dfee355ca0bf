"""The fingerprint of a model's files covers everything that its logits come from, and nothing else."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from probeprune import save
from probeprune.model import fingerprint
from probeprune.model.fingerprint import source_fingerprint


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Every file has several chunks, hashed by several threads."""
    monkeypatch.setattr(fingerprint, "_CHUNK", 5000)
    monkeypatch.setattr(fingerprint, "_BLOCK", 700)


@pytest.fixture
def folder(tmp_path, number_tokenizer):
    save(FAMILIES["llama-gqa"](), tmp_path / "model", tokenizer=number_tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.999])
def test_every_byte_counts(name, at, folder):
    before = source_fingerprint(str(folder))
    content = bytearray((folder / name).read_bytes())
    content[int(at * len(content))] ^= 1
    (folder / name).write_bytes(content)
    assert source_fingerprint(str(folder)) != before


def test_the_config_counts(folder):
    before, file = source_fingerprint(str(folder)), folder / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert source_fingerprint(str(folder)) != before


def test_training_on_changes_it(folder):
    """The very last tensor of a file changes, its size and header do not."""
    before, file = source_fingerprint(str(folder)), folder / "model.safetensors"
    size, tensors = file.stat().st_size, load_file(file)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size and source_fingerprint(str(folder)) != before


def test_a_copy_has_the_same_one_and_what_changes_no_logit_is_left_out(folder):
    copy = shutil.copytree(folder, folder.parent / "copy")
    (copy / "README.md").write_text("read me")
    (copy / "training.json").write_text("{}")
    (copy / "generation_config.json").unlink()
    (copy / "optimizer.pt").write_bytes(b"state")
    assert source_fingerprint(str(copy)) == source_fingerprint(str(folder))


def test_a_gguf_file_counts_whole(tmp_path):
    file, found = tmp_path / "model.gguf", set()
    for last in (b"a", b"b"):
        file.write_bytes(bytes(20_000) + last)
        found.add(source_fingerprint(str(file)))
    assert len(found) == 2


def test_files_are_read_once_while_they_stay_the_same(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED", 0)
    first = source_fingerprint(str(folder))
    monkeypatch.setattr(fingerprint, "_chunk_hash", None)
    assert source_fingerprint(str(folder)) == first


def test_a_hub_model_has_its_commit_and_the_embedded_one_nothing(monkeypatch):
    monkeypatch.setattr("probeprune.model.hub.snapshot_download", lambda *_, **__: "/cache/snapshots/0a1b")
    assert source_fingerprint("owner/name") == "0a1b"
    assert source_fingerprint("smollm2-135m") == ""
