"""How many lines a model family takes: its record, and its rows among the tiny models of the tests.

    python benchmarks/family_lines.py nanochat afmoe gemma4_text

Counted in the source as it is, for each `model_type` given. Printed is the table in docs/models.md.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "src/probeprune/model").glob("*families.py"))
TESTS = [ROOT / "tests" / name for name in ("tiny_families.py", "tiny_experts.py")]


def lines(node: ast.expr) -> int:
    """Number of lines that an expression takes."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def record_lines(model_type: str) -> int:
    """Lines of the `Family` that names this `model_type`."""
    calls = (n for path in RECORDS for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    families = (c for c in calls if getattr(c.func, "id", "") == "Family")
    return sum(lines(c) for c in families if model_type in ast.literal_eval(c.args[1]))


def row_lines(model_type: str) -> int:
    """Lines of all rows of this `model_type` in the tests' tables."""
    tables = (n for path in TESTS for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Dict))
    rows = ((k, v) for table in tables for k, v in zip(table.keys, table.values, strict=True))
    named = ((getattr(k, "value", None), v) for k, v in rows)
    return sum(lines(v) for name, v in named if isinstance(name, str) and name.split()[:1] == [model_type])


def main(model_types: list[str]) -> None:
    """Print a table."""
    print("| model_type | record | rows of tests |\n| :-- | ---: | ---: |")
    for model_type in model_types:
        print(f"| {model_type} | {record_lines(model_type)} | {row_lines(model_type)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
