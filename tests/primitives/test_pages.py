"""The pages about the primitives say what the code says: every option, and its default."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tta_sync import primitives
from tta_sync.events import records
from tta_sync.primitives.persistence import FakeUnitOfWork
from tta_sync.primitives.recovery import CircuitBreakerConfig

PAGES = sorted((Path(__file__).parents[2] / "docs" / "primitives").glob("*.md"))

ROW = re.compile(r"^\| (?P<names>`[^|]*`) \| (?P<default>[^|]+) \|", re.MULTILINE)


def documented(page: Path) -> dict[str, str]:
    """The options of a page's tables, each with what stands in the column of defaults."""
    section = re.search(r"^## Options\n(.*?)^## ", page.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    found: dict[str, str] = {}
    for row in ROW.finditer(section[1]):
        names = re.findall(r"`(\w+)`", row["names"])
        defaults = re.split(r",(?! \d{3}\b)\s+(?=[\d`])", row["default"].strip())
        for position, name in enumerate(names):
            assert name not in found, name
            found[name] = defaults[position] if len(defaults) == len(names) else row["default"].strip()
    return found


def described(page: Path) -> dict[str, Any]:
    """The arguments of what the page is about, each with its default."""
    name = re.match(r"# .*?(\w+)$", page.read_text().partition("\n")[0])
    assert name is not None
    kind: Any = FakeUnitOfWork if name[1] == "FakeUnitOfWork" else getattr(primitives, name[1])
    parameters = dict(inspect.signature(kind).parameters)
    if parameters.pop("options", None) is not None:  # the breaker takes its config's fields as well
        parameters |= inspect.signature(CircuitBreakerConfig).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def literal(told: str) -> Any:
    """The value with which a cell of the column begins; ``...`` where it begins with words."""
    quoted = re.match(r"`([^`]+)`", told)
    number = re.match(r"\d+(?: \d{3})*(?:\.\d+)?(?: MiB)?", told)
    if quoted is not None:
        try:
            return ast.literal_eval(quoted[1])
        except (ValueError, SyntaxError):
            return getattr(__import__("builtins"), quoted[1], ...)
    if number is None:
        return ...
    value = ast.literal_eval(number[0].removesuffix(" MiB").replace(" ", ""))
    return value * 2**20 if number[0].endswith("MiB") else value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_of_a_page_are_those_of_the_code(page: Path) -> None:
    """Neither is there an option that the page keeps silent about, nor one that exists on the page only."""
    assert set(documented(page)) == set(described(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_defaults_of_a_page_are_those_of_the_code(page: Path) -> None:
    """A dash for what must be given; a value that equals the code's; for None, what it stands for."""
    code = described(page)
    for name, told in documented(page).items():
        if code[name] is inspect.Parameter.empty or name == "timeout_seconds":  # where None is refused
            assert told == "–", name
        else:
            assert told != "–", name
            if code[name] is not None:
                assert literal(told) == code[name], name


def section(page: Path, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)^## ", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_events_of_a_page_are_those_of_the_code(page: Path) -> None:
    """Each record that a page names is there, with the fields that the page gives it."""
    for name, told in re.findall(r"`([A-Z]\w+)\(([^)]*)\)", section(page, "Events")):
        fields = {field.name for field in dataclasses.fields(getattr(records, name))}
        assert {part.partition("=")[0].strip() for part in told.split(",")} <= fields, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_usage_of_a_page_is_shown_from_both_sides(page: Path) -> None:
    """From synchronous code, and from asynchronous code."""
    usage = section(page, "Usage")
    assert "From synchronous code" in usage
    assert "From asynchronous code" in usage
