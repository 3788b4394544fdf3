"""Which process this is: a number that grows with every fork.

A loop thread does not survive a fork, but all that Python knows of it does: the child still sees the loop "running",
its locks held, its descriptors shared with the parent. So whatever belongs to one process is kept together with the
generation in which it was made, and nothing else decides whether it may be used.
"""

from __future__ import annotations

import os
from collections.abc import Callable

_disown: list[Callable[[], object]] = []


class _Generation:
    """``number`` is read on every call: an attribute of a module-level object is the cheapest thing to read."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


current = _Generation()


def _after_fork_in_child() -> None:
    # uvloop runs fork hooks in the child of every subprocess it starts: keep this tiny and idempotent.
    current.number += 1
    for forget in _disown:
        forget()


def on_fork(forget: Callable[[], object]) -> None:
    """Call *forget* in every forked child, before any other Python code of it."""
    _disown.append(forget)


os.register_at_fork(after_in_child=_after_fork_in_child)
