"""The Python in README.md and docs runs, commands there parse, tables are complete, and links resolve."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from tiny import SHAPE, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import probeprune
from probeprune.cli import app
from probeprune.data import windows
from probeprune.methods import METHODS, SCHEDULES
from probeprune.model.loading import LoadedModel
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import COMPENSATIONS
from probeprune.strategies.importance import IMPORTANCES
from probeprune.surgery import cut

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def run_snippets(page: Path) -> dict[str, object]:
    """Run the Python snippets of a page one after the other, in one namespace; a failure names the line."""
    text = page.read_text(encoding="utf-8")
    snippets = list(FENCE.finditer(text))
    assert len(snippets) == text.count("```python") > 0
    namespace: dict[str, object] = {}
    for snippet in snippets:
        line = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * line + snippet[1], str(page), "exec"), namespace)
    return namespace


@pytest.fixture
def few_windows(monkeypatch):
    """Calibration on 4 windows of 32 tokens, whatever a snippet asks for."""
    draw = windows.calibration_windows
    monkeypatch.setattr(
        windows,
        "calibration_windows",
        lambda documents, tokenizer, *, count, length, seed: draw(
            documents, tokenizer, count=4, length=32, seed=seed
        ),
    )


@pytest.fixture
def small_model(monkeypatch):
    """Loaded models keep their first six layers and 512 channels of every MLP, to save time."""
    load = probeprune.load_model

    def load_part(name: str) -> LoadedModel:
        loaded = load(name, dtype="float32")
        loaded.model.model.layers = loaded.model.model.layers[:6]
        loaded.model.config.num_hidden_layers = 6
        mlps = [b.name for b in probeprune.find_blocks(loaded.model) if b.kind == "mlp"]
        cut(loaded.model, {name: torch.arange(512) for name in mlps})
        return loaded

    monkeypatch.setattr(probeprune, "load_model", load_part)


@pytest.mark.real
def test_the_readme_runs_on_the_real_model(small_model, few_windows, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    before = probeprune.load_model("smollm2-135m").model.state_dict()
    namespace = run_snippets(ROOT / "README.md")
    assert capsys.readouterr().out.count("The capital of France is") == 1
    after = namespace["loaded"].model.state_dict()
    assert all(after[name].equal(weight) for name, weight in before.items())


def tiny_model(name: str) -> LoadedModel:
    """A random model, narrow but with layers enough for three dense ones, and a tokenizer that knows one
    word."""
    assert name == "smollm2-135m"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 8})).eval()
    backend = Tokenizer(models.WordLevel({"<unk>": 3, "France": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    cpu, dtype = torch.device("cpu"), torch.float32
    return LoadedModel(name, model, tokenizer, dtype, cpu, dtype)


def test_the_python_guide_runs_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probeprune, "load_model", tiny_model)
    asked = []

    def draw(documents, tokenizer, *, count, length, seed):
        asked.append((count, length))
        return token_ids(min(count, 16), min(length, 24), seed=seed)

    monkeypatch.setattr(windows, "calibration_windows", draw)
    namespace = run_snippets(ROOT / "docs" / "python.md")
    published = METHODS["llm-pruner"].gradient_settings
    assert asked[0] == (128, 512) and (published.windows, published.length) in asked
    printed = capsys.readouterr().out
    assert "unknown method 'prob'; did you mean 'probe'?" in printed
    assert "not prepared for ratio 0.3 of 'best-static' (only for 0.4)" in printed
    dense = tiny_model("smollm2-135m").model.state_dict()
    assert all(namespace["model"].state_dict()[name].equal(weight) for name, weight in dense.items())
    pruned = sum(p.numel() for p in namespace["reopened"].parameters())
    assert pruned < sum(weight.numel() for weight in dense.values())


@pytest.mark.parametrize("name", ["start.md", "howto/extend.md", "howto/own-text.md"])
def test_the_snippets_of_a_page_run_on_a_tiny_model(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probeprune, "load_model", tiny_model)
    monkeypatch.setattr(
        windows,
        "calibration_windows",
        lambda documents, tokenizer, *, count, length, seed: token_ids(min(count, 16), 24, seed=seed),
    )
    monkeypatch.setattr(windows, "evaluation_windows", lambda *_text, **_how: token_ids(4, 24))
    for text in ("own.txt", "own-test.txt"):
        (tmp_path / text).write_text("France France Spain " * 300)
    methods = dict(METHODS)
    try:
        run_snippets(ROOT / "docs" / name)
    finally:
        METHODS.clear()
        METHODS.update(methods)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_pages_have_the_options_they_are_given(page):
    commands = typer.main.get_command(app).commands
    shown = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL):
        for line in block.splitlines() if language in ("", "bash") else []:
            found = re.search(r"(?:^|[ /])probeprune ([a-z]+) (.*)", line.split("  #")[0])
            if found is None or found[1] in ("import",):
                continue
            words = shlex.split(found[2], comments=True)
            if "..." not in words and "|" not in words:
                commands[found[1]].make_context(found[1], words)


@pytest.mark.parametrize("page", ["commands.md", "howto/own-text.md"])
def test_settings_in_pages_are_those_of_options(page, tmp_path):
    shown = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```toml\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "probeprune.toml").write_text(block)
        group = typer.main.get_command(app)
        group._words = []
        assert group.defaults(tmp_path / "probeprune.toml", "compare")["compare"]["methods"]


@pytest.mark.parametrize(
    "heading, table",
    [
        ("`importance`", IMPORTANCES),
        ("`allocation`", ALLOCATIONS),
        ("`compensation`", COMPENSATIONS),
        ("`when`", SCHEDULES),
    ],
)
def test_the_python_guide_lists_every_key_of_a_table(heading, table):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = text.split(f"### {heading}")[1].split("\n## ")[0].split("\n### ")[0]
    assert re.findall(r"^\| `([^`]+)`", section, re.MULTILINE) == list(table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            if target.suffix != ".md":
                continue
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def test_the_page_on_attached_models_names_tests_that_exist():
    page = (ROOT / "docs" / "attached.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "test_" in line]
    for row in rows:
        cells = row.split("|")[3].split(";")
        for cell in cells:
            file = re.search(r"\]\(\.\./(tests/\w+\.py)\)", cell)
            assert file, row
            text = (ROOT / file[1]).read_text(encoding="utf-8")
            names = re.findall(r"`(test_\w+)`", cell)
            assert names, row
            for name in names:
                assert f"def {name}(" in text, f"{file[1]} has no {name}"
    assert len(rows) > 20
