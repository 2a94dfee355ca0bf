"""The comparison of pruned and quantised files, on a tiny model in the engine itself."""

from dataclasses import replace

import made
import pytest

from probeprune import compose, load_model, prune, save
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.jobs.quantised import Grid, Timing, make_files, measure_files, rows
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import blocks_flops


def test_files_are_made_once_and_measured_as_the_engine_runs_them(llama_cpp, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    save(made.llama()().eval(), tmp_path / "model", tokenizer=words)
    corpus = tmp_path / "text.txt"
    corpus.write_text("The river rises in the hills and flows south to the sea. " * 40)
    loaded = load_model(str(tmp_path / "model"), dtype="float32")
    text, timing = Text(str(corpus), 2, 64), Timing(prompt=32, decode=8, rounds=2)
    grid = Grid(compose("magnitude"), [0.3], ["f32", "f16"], text)
    out = tmp_path / "out"
    out.mkdir()
    lines = make_files(loaded, grid, out)
    names = ["dense-f32.gguf", "dense-f16.gguf", "magnitude-0.3-f32.gguf", "magnitude-0.3-f16.gguf"]
    assert [line["file"] for line in lines] == names
    assert lines[2]["removed"] == pytest.approx(0.3, abs=0.02)
    assert lines[0]["bytes"] > lines[1]["bytes"] and lines[0]["bytes"] > lines[2]["bytes"]
    # Started again, it makes what is missing alone.
    (out / names[3]).unlink()
    before = {file: (out / file).stat().st_mtime_ns for file in names[:3]}
    assert make_files(loaded, grid, out) == lines
    assert before == {file: (out / file).stat().st_mtime_ns for file in names[:3]}
    measured = measure_files(lines, out, llama_cpp, loaded, text, timing)
    longer = measure_files(lines, out, llama_cpp, loaded, text, replace(timing, prompt=200, rounds=1))
    # FLOPs are those of the prompt that was timed.
    blocks = find_blocks(loaded.model)
    for found, tokens in ((measured, 31), (longer, 199)):
        flops = [blocks_flops(blocks, line["kept"], 1, tokens) for line in found]
        assert [line["prompt_tokens"] for line in found] == [tokens] * 4
        assert [line["flops"] for line in found] == [one / flops[0] for one in flops]
    assert measured[0]["kept"] == [block.units for block in blocks]
    assert measured[2]["flops"] != longer[2]["flops"]
    windows = evaluation_windows(load_corpus(str(corpus)), loaded.tokenizer, length=64, limit=2)
    dense = perplexity(loaded.model, windows).value
    prune(loaded.model, compose("magnitude"), 0.3)
    pruned = perplexity(loaded.model, windows).value
    assert [line["perplexity"] for line in measured] == pytest.approx(
        [dense, dense, pruned, pruned], rel=0.01
    )
    assert measured[0]["perplexity"] == pytest.approx(dense, rel=1e-3)
    assert all(len(line["prompt_seconds"]) == len(line["decode_seconds"]) == 2 for line in measured)
    assert all(row.flops_limit > 1.2 and row.bytes_limit >= 1 for row in rows(measured)[2:])
