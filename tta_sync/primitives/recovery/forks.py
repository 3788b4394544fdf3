"""What a fork does to shared state: locks of other threads stay held, their permits are never given back."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Shared(Protocol):
    """State that several threads share."""

    def after_fork(self) -> None:
        """In the child: take a fresh lock, and forget what calls of the parent's threads hold."""


_shared: weakref.WeakSet[Shared] = weakref.WeakSet()  # added to under the GIL; read by the child's only thread


def renew_after_fork(state: Shared) -> None:
    """Have ``state.after_fork()`` called in every child process, for as long as *state* lives."""
    _shared.add(state)


def _in_child() -> None:
    for state in list(_shared):
        state.after_fork()


os.register_at_fork(after_in_child=_in_child)
