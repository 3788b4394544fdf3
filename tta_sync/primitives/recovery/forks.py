"""What a fork does to shared state: locks of other threads stay held, their permits are never given back."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Shared(Protocol):
    """State that several threads share."""

    def after_fork(self) -> None:
        """In the child: take a fresh lock, and forget what calls of the parent's threads hold."""


# By identity: a subclass may compare its objects as it likes. Added to under the GIL; read by the child's only thread.
_shared: weakref.WeakValueDictionary[int, Shared] = weakref.WeakValueDictionary()


def renew_after_fork(state: Shared) -> None:
    """Have ``state.after_fork()`` called in every child process, for as long as *state* lives."""
    _shared[id(state)] = state


def _in_child() -> None:
    for state in list(_shared.values()):
        state.after_fork()


os.register_at_fork(after_in_child=_in_child)
