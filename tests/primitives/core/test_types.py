"""Types survive composition, as two type checkers see it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = Path(__file__).parents[2] / "typing" / "composition.py"
ROOT = SNIPPET.parents[2]


def expectations() -> dict[int, str]:
    """What the snippet's comments say of each line: a type, or ``error``."""
    lines = SNIPPET.read_text().splitlines()
    return {
        number: line.rpartition("  # ")[2].partition(":")[0] if "# error" in line else line.rpartition("  # ")[2]
        for number, line in enumerate(lines, 1)
        if number > 1 and "  # " in line
    }


def plain(revealed: str) -> str:
    """A revealed type without module names and quotation marks."""
    return re.sub(r"[\w.]+\.(\w+)", r"\1", revealed).strip('"')


def with_mypy(cache: Path) -> dict[int, str]:
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={cache}", "--no-error-summary", str(SNIPPET)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False).stdout
    seen: dict[int, str] = {}
    for line in output.splitlines():
        match = re.match(r".*typing/composition\.py:(\d+): (note|error): (.*)", line)
        if match is None:
            assert "error" not in line or "tests/typing" not in line, line
            continue
        number, kind, text = int(match[1]), match[2], match[3]
        if text.startswith("Revealed type is "):
            seen[number] = plain(text.removeprefix("Revealed type is "))
        elif kind == "error":
            seen[number] = "error"
    return seen


def with_basedpyright(cache: Path) -> dict[int, str]:
    checker = Path(sys.executable).parent / "basedpyright"
    command = [str(checker), "--outputjson", "--pythonpath", sys.executable, str(SNIPPET)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False).stdout
    seen: dict[int, str] = {}
    for found in json.loads(output)["generalDiagnostics"]:
        if Path(found["file"]) != SNIPPET:
            continue
        number = found["range"]["start"]["line"] + 1
        if found["severity"] == "error":
            seen[number] = "error"
        elif found["severity"] == "information":
            seen[number] = plain(found["message"].rpartition(' is "')[2])
    return seen


@pytest.mark.parametrize("checker", [with_mypy, with_basedpyright])
def test_types_survive_composition(checker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Every operator and constructor keeps its steps' types, and two steps that do not fit are an error."""
    expected = expectations()
    assert len(expected) > 20
    assert checker(tmp_path) == expected
