"""Pruned or quantised: what is compared with what, from figures made up here."""

import pytest

from probeprune.cli import app, run
from probeprune.jobs.quantised import plot, rows, table


def line(ratio, type, size, perplexity, prompt, decode, flops=1.0):
    return {
        "file": f"{'best-static-' + format(ratio, 'g') if ratio else 'dense'}-{type}.gguf",
        "method": "best-static" if ratio else "dense",
        "ratio": ratio,
        "removed": ratio,
        "type": type,
        "bytes": size,
        "perplexity": perplexity,
        "prompt_seconds": prompt,
        "decode_seconds": decode,
        "prompt_tokens": 100,
        "decode_tokens": 10,
        "kept": [4, 8],
        "flops": flops,
    }


LINES = [
    line(0.0, "f16", 200, 20.0, [1.0, 1.2, 1.1], [2.0, 2.0, 2.0]),
    line(0.0, "q4_0", 80, 21.0, [0.9, 1.0, 1.1], [1.0, 1.0, 1.0]),
    line(0.2, "f16", 160, 30.0, [0.5, 0.4, 0.55], [1.6, 1.6, 1.6], 0.8),
    line(0.2, "q4_0", 64, 31.0, [0.45, 0.5, 0.5], [0.8, 0.8, 0.8], 0.8),
]


def test_speed_ups_are_over_the_dense_file_of_the_same_type_round_by_round():
    found = {row.line["file"]: row for row in rows(LINES)}
    half = found["best-static-0.2-f16.gguf"]
    assert half.prompt == pytest.approx((2.0, 2.0, 3.0))
    assert half.decode == pytest.approx((1.25, 1.25, 1.25))
    assert half.flops_limit == pytest.approx(1.25) and half.bytes_limit == pytest.approx(1.25)
    assert found["best-static-0.2-q4_0.gguf"].bytes_limit == pytest.approx(1.25)
    assert found["dense-f16.gguf"].prompt == (1.0, 1.0, 1.0)


def test_the_unbeaten_files_are_those_that_no_other_beats_in_quality_and_cost():
    best = {row.line["file"]: (row.best_by_bytes, row.best_by_time) for row in rows(LINES)}
    assert best == {
        "dense-f16.gguf": (True, True),
        "dense-q4_0.gguf": (True, True),
        "best-static-0.2-f16.gguf": (False, False),
        "best-static-0.2-q4_0.gguf": (True, True),
    }
    twins = [LINES[0], {**LINES[0], "file": "again.gguf"}]
    assert all(row.best_by_bytes for row in rows(twins))


def test_the_table_has_a_row_for_every_file_best_first(tmp_path):
    written = table(LINES).splitlines()
    assert [row.split("|")[1].strip() for row in written[2:]] == [
        "dense-f16",
        "dense-q4_0",
        "best-static-0.2-f16",
        "best-static-0.2-q4_0",
    ]
    assert len({row.count("|") for row in written}) == 1
    assert "2.00 (2.00 to 3.00)" in written[4] and "size and time" in written[5]
    assert [file.suffix for file in plot(LINES, tmp_path / "plot")] == [".png", ".svg"]
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--types", "q3_k"], "unknown GGUF type 'q3_k'"),
        (["--method", "probe"], "it prunes anew at every batch"),
        (["--method", "llm-pruner+lora"], "trains the model"),
        (["--ratios", "1.5"], "--ratios must be"),
        (["--llama-cpp", "/nowhere"], "there is no library of llama.cpp in /nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, said, tmp_path, capsys):
    assert run(lambda: app(["quantised", "--out", str(tmp_path / "out"), *arguments])) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
