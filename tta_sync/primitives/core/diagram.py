"""A workflow as a mermaid flowchart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tta_sync.primitives.core.base import display_name
from tta_sync.primitives.core.composition import answer_of, children_of, details_of

if TYPE_CHECKING:
    from tta_sync.primitives.core.base import WorkflowPrimitive

    Primitive = WorkflowPrimitive[Any, Any]


class Outline(NamedTuple):
    """How a composite is drawn: what ``outline()`` returns.

    shape: "chain" (one after the other), "fork" (all at once), "choice" (one of them), "fallback" (the next where one
        fails), "saga" (a chain whose steps may have another that undoes them), or "wrap" (a frame around them).
    title: the text of the frame, the fork or the question.
    labels: the text on the way to each child; in a saga "undo" for those that undo the one before them.
    otherwise: in a choice, the text on the way past all children; None where there is no such way.
    """

    shape: str
    title: str = ""
    labels: Sequence[str] = ()
    otherwise: str | None = None


_Ends = list[tuple[str, str]]
"""Nodes at which a part begins or ends, each with the text of the edge that will join it to its neighbour."""


def mermaid(workflow: Primitive) -> str:
    """Draw *workflow* as the text of a mermaid flowchart, from left to right."""
    drawing = _Drawing()
    drawing.finish(drawing.draw(workflow, ())[1])
    return "\n".join(["flowchart LR", *drawing.lines]) + "\n"


class _Drawing:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0
        self._depth = 1

    def draw(self, primitive: Primitive, above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        """Draw one part; return where it begins and where it ends."""
        if id(primitive) in above:  # a workflow that contains itself ends here
            node = self._node('["', f"{display_name(primitive)}, again", '"]')
            return [(node, "")], [(node, "")]
        parts = children_of(primitive)
        if not parts:
            return self._leaf(primitive)
        above = (*above, id(primitive))
        outline = _outline_of(primitive)
        if outline.shape == "chain":
            return self._chain(primitive, parts, above)
        if outline.shape == "fork":
            return self._fork(outline, parts, above)
        if outline.shape == "choice":
            return self._choice(outline, parts, above)
        if outline.shape == "fallback":
            return self._frame(outline.title, lambda: self._fallback(parts, above))
        if outline.shape == "saga":
            return self._frame(outline.title, lambda: self._saga(outline, parts, above))
        return self._frame(outline.title, lambda: self._row(parts, above))

    def finish(self, ends: _Ends) -> None:
        """Lead the ways past the last steps somewhere: an edge needs two ends."""
        if any(label for _, label in ends):
            self._join(ends, [(self._node('(("', " ", '"))'), "")])

    def _leaf(self, primitive: Primitive) -> tuple[_Ends, _Ends]:
        where = type(primitive).runs_on
        place = {"caller": " (on the caller's thread)", "pool": " (on a pool thread)"}.get(where, "")
        node = self._node('["', repr(primitive) + place, '"]')
        return [(node, "")], [(node, "")]

    def _chain(self, chain: Primitive, parts: Sequence[Primitive], above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        from tta_sync.primitives.core.sequential import split

        head, middle, tail = split(tuple(parts))
        caches = [*head, *tail]
        if not caches or not middle:
            return self._row(parts, above, joined=True)

        def wrapped(index: int) -> tuple[_Ends, _Ends]:
            if index == len(caches):
                return self._row(middle, above, joined=True)
            return self._frame(repr(caches[index]), lambda: wrapped(index + 1))

        return wrapped(0)

    def _row(self, parts: Sequence[Primitive], above: tuple[int, ...], *, joined: bool = False) -> tuple[_Ends, _Ends]:
        drawn = [self.draw(part, above) for part in parts]
        for (_, ends), (begins, _) in itertools.pairwise(drawn):
            self._join(ends, begins, "-->" if joined else "-.-")
        return drawn[0][0], drawn[-1][1]

    def _fork(self, outline: Outline, parts: Sequence[Primitive], above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        fork = self._node('{{"', outline.title, '"}}')
        drawn = [self.draw(part, above) for part in parts]
        join = self._node('(("', " ", '"))')
        for begins, ends in drawn:
            self._join([(fork, "")], begins)
            self._join(ends, [(join, "")])
        return [(fork, "")], [(join, "")]

    def _choice(self, outline: Outline, parts: Sequence[Primitive], above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        question = self._node('{"', outline.title, '"}')
        exits: _Ends = []
        for part, label in zip(parts, outline.labels, strict=True):
            begins, ends = self.draw(part, above)
            self._join([(question, label)], begins)
            exits += ends
        if outline.otherwise is not None:
            exits.append((question, outline.otherwise))
        return [(question, "")], exits

    def _fallback(self, parts: Sequence[Primitive], above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        drawn = [self.draw(part, above) for part in parts]
        for (_, ends), (begins, _) in itertools.pairwise(drawn):
            self._join([(node, "fails") for node, _ in ends], begins, "-.->")
        return drawn[0][0], [end for _, ends in drawn for end in ends]

    def _saga(self, outline: Outline, parts: Sequence[Primitive], above: tuple[int, ...]) -> tuple[_Ends, _Ends]:
        begins: _Ends = []
        ends: _Ends = []
        for part, label in zip(parts, outline.labels, strict=True):
            part_begins, part_ends = self.draw(part, above)
            if label == "undo":
                self._join([(end, label) for end, _ in ends], part_begins, "-.->")
                continue
            self._join(ends, part_begins)
            begins, ends = begins or part_begins, part_ends
        return begins, ends

    def _frame(self, title: str, inside: Any) -> tuple[_Ends, _Ends]:
        self._count += 1
        self._write(f'subgraph g{self._count}["{_text(title)}"]')
        self._depth += 1
        ends: tuple[_Ends, _Ends] = inside()
        self._depth -= 1
        self._write("end")
        return ends

    def _node(self, opening: str, text: str, closing: str) -> str:
        self._count += 1
        name = f"n{self._count}"
        self._write(f"{name}{opening}{_text(text)}{closing}")
        return name

    def _join(self, ends: _Ends, begins: _Ends, arrow: str = "-->") -> None:
        for end, label in ends:
            for begin, _ in begins:
                text = f'|"{_text(label)}"|' if label else ""
                self._write(f"{end} {arrow}{text} {begin}")

    def _write(self, line: str) -> None:
        self.lines.append("    " * self._depth + line)


def _outline_of(primitive: Primitive) -> Outline:
    outline = answer_of(primitive, "outline")
    if isinstance(outline, Outline):
        return outline
    name = type(primitive).__name__.removesuffix("Primitive")
    title = f"{name}: {details}" if (details := details_of(primitive)) else name
    return Outline("fallback" if type(primitive)._tta_kind == "fallback" else "wrap", title)


def _text(text: str) -> str:
    """Escape what mermaid would read as its own, and keep a node's text to one readable line."""
    text = " ".join(text.split()) or " "
    text = text if len(text) <= 80 else text[:79] + "…"
    for character, code in (
        ("#", "#35;"),
        ("&", "#amp;"),
        ('"', "#quot;"),
        ("<", "#lt;"),
        (">", "#gt;"),
        ("`", "#96;"),
    ):
        text = text.replace(character, code)
    return text
