"""Every promise to visitors and owners of the proxy, every fault and every abuse has a test that names it.

The numbers are those of the team's list of promises (P), faults (F) and abuses (B); a test says in the first
line of its docstring, before any other word, which of them it shows.
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = (
    *(f"P{number}" for number in (*range(1, 28), *range(39, 45))),
    *(f"F{number}" for number in (*range(1, 16), 18, *range(21, 27), 28)),
    *(f"B{number}" for number in (*range(1, 13), *range(14, 25), 28, 29, 30, 32)),
    # Documents and the knowledge base.
    *("P34", "P35", "P36", "P37", "P38", "F16", "F17", "F20", "B13", "B25"),
)


def named() -> dict[str, list[str]]:
    """The tests that name each row."""
    found: dict[str, list[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                first = re.match(r"(?:[PFBV]\d+(?:, )?)+", ast.get_docstring(node) or "")
                for row in re.findall(r"[PFBV]\d+", first[0] if first else ""):
                    found.setdefault(row, []).append(f"{path.name}::{node.name}")
    return found


FOUND = named()


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test(row: str) -> None:
    assert FOUND.get(row)


@pytest.mark.parametrize("row", ["P43", "F28"])
def test_each_engine_that_machines_share_has_its_own(row: str) -> None:
    files = {name.partition("::")[0] for name in FOUND[row]}
    assert {"test_fleet.py", "test_postgres.py", "test_kb_far.py", "test_several_machines.py"} <= files
