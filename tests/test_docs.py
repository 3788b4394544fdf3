"""Every python block of the documents runs: a page's blocks in order, in one namespace."""

from __future__ import annotations

import asyncio
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A block that cannot run says why, in a comment right above it, which readers of the page do not see.
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)

SECTIONS = ["about", "options", "errors", "usage", "events", "diagram", "patterns", "anti-patterns"]
"""What each page about a primitive has, in this order: the first words of its headings."""


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def module() -> Iterator[dict[str, Any]]:
    """The namespace of a module of its own: what a page defines can be pickled and found by name."""
    made = types.ModuleType("a_page_of_the_documents")
    sys.modules[made.__name__] = made
    yield vars(made)
    del sys.modules[made.__name__]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_runs_as_it_is_written(page: Path, module: dict[str, Any]) -> None:
    """What a reader copies works; line numbers of a failure are the page's."""
    for block in blocks(page):
        if block.reason is None:
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
            exec(code, module)
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "primitives").glob("*.md")), ids=name_of)
def test_page_of_a_primitive_has_every_section_in_order(page: Path) -> None:
    """A reader finds the same thing in the same place on each page."""
    headings = re.findall(r"^## ([\w-]+)", page.read_text(), re.MULTILINE)
    assert [heading.lower() for heading in headings] == SECTIONS
    assert "```mermaid" in page.read_text()
    assert re.match(r"# \w+", page.read_text())


def test_few_blocks_are_not_run() -> None:
    """A block that is not run is the exception."""
    every = [block for page in PAGES for block in blocks(page)]
    assert sum(block.reason is not None for block in every) <= len(every) // 20


def test_every_python_fence_is_found() -> None:
    """No block escapes because of how its fence is written."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)\s*(?:python|py|pycon)\b", page.read_text(), re.MULTILINE)
        assert len(fences) == len(blocks(page)), page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that are there."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
