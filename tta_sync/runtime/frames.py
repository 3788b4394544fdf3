"""What frames and tracebacks tell: where user code stands, and which frames belong to this raise."""

from __future__ import annotations

import asyncio
import contextvars
import dis
import gc
import sys
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType, TracebackType
from typing import Any

from tta_sync.runtime import generation, native

_RAISE_OPCODE = dis.opmap["RAISE_VARARGS"]


def forget_earlier_raises(error: BaseException, boundaries: frozenset[CodeType], detours: frozenset[CodeType]) -> None:
    """Cut from *error*'s traceback the frames of earlier deliveries of the same object.

    Python appends to the traceback of an exception object at each raise, so an object that is raised again and again (a
    module-level constant, say) grows without end. *boundaries* are the functions that deliver to a caller: one of
    them in the chain means an earlier delivery, unless a function of *detours* (those that run user code on another
    thread) came before it, which makes it part of this one.
    """
    depth = 0
    cut: TracebackType | None = None  # the first raise point behind the last detour, or of all
    entry = error.__traceback__
    while entry is not None:
        code = entry.tb_frame.f_code
        if code in detours:
            depth += 1
            cut = None
        elif code in boundaries:
            if depth == 0 or cut is not None:
                break
            depth -= 1
        elif cut is None and _at_raise(entry) and entry.tb_next is not None:
            cut = entry if not _comes_again(entry) else None
        entry = entry.tb_next
    if entry is not None and cut is not None:
        cut.tb_next = None


def _comes_again(raised: TracebackType) -> bool:
    """Say whether the raise at *raised* only passed on what the same code had caught: its frame comes up again."""
    entry = raised.tb_next
    while entry is not None:
        if entry.tb_frame is raised.tb_frame:
            return True
        entry = entry.tb_next
    return False


def _at_raise(entry: TracebackType) -> bool:
    return entry.tb_frame.f_code.co_code[entry.tb_lasti] == _RAISE_OPCODE


@lru_cache(maxsize=1)
def _foreign_paths() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return where the standard library and this package live, and where other packages do."""
    paths = sysconfig.get_paths()
    own = __file__.rpartition("runtime")[0]
    return (own, "<frozen"), (paths["purelib"], paths["platlib"])


def prepare() -> None:
    """Have sysconfig import what it needs. Not on a caller's thread, where a signal may strike in an import."""
    _is_user_file(__file__)


@lru_cache(maxsize=1024)
def _is_user_file(filename: str) -> bool:
    own, packages = _foreign_paths()
    if filename.startswith(own + packages):
        return False
    # site-packages lies below the standard library's directory, so it has been asked first.
    return not filename.startswith((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")))


OUTER_EDGE: set[CodeType] = set()
"""Functions that run the loop on a caller's own stack: what lies outside them is the caller, not what the loop runs."""


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame, from *frame* outwards, that is the user's own code; failing that, the innermost that
    is neither this package's nor Python's own."""
    second_best: FrameType | None = None
    while frame is not None and frame.f_code not in OUTER_EDGE:
        filename = frame.f_code.co_filename
        if _is_user_file(filename):
            return frame
        if second_best is None and filename.startswith(_foreign_paths()[1]):
            second_best = frame
        frame = frame.f_back
    return second_best


def innermost_user_frame(coroutine: Any) -> FrameType | None:
    """Return the innermost user frame of a suspended coroutine or async generator, following what it awaits."""
    best: FrameType | None = None
    while coroutine is not None:
        kind = next((kind for kind in _SUSPENDED if hasattr(coroutine, kind[0])), None)
        if kind is None:
            break
        frame = getattr(coroutine, kind[0])
        if frame is not None and _is_user_file(frame.f_code.co_filename):
            best = frame
        coroutine = getattr(coroutine, kind[1])
    return best


_SUSPENDED = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))
"""Where coroutines, generators and async generators show their frame, and what they wait for."""


def context_of(task: asyncio.Task[Any]) -> contextvars.Context | None:
    """Return the context in which *task* runs."""
    if hasattr(task, "get_context"):  # 3.12
        context: contextvars.Context = task.get_context()
        return context
    # On 3.11 the task shows it to the garbage collector only.
    return next((held for held in gc.get_referents(task) if type(held) is contextvars.Context), None)


def place(frame: FrameType | None) -> str:
    """Return ``file:line in function`` of a frame, for people."""
    if frame is None:
        return "an unknown place"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


class _Looking:
    """Who looks at the threads' frames, one at a time."""

    def __init__(self) -> None:
        self.lock = native.reentrant_lock()
        self.collector_paused = False


_looking = _Looking()


def running_frame(
    ident: int, choose: Callable[[FrameType | None], FrameType | None] = lambda frame: frame
) -> FrameType | None:
    """Return the frame that thread *ident* executes now, or the one that *choose* finds from there outwards."""
    # CPython 3.11 allocates in there with its list of threads locked. Were that to start a collection, and this to free
    # a thread-local, which wants the same lock, the whole process would stand still for good (gh-106883).
    # And it makes a frame's object when somebody asks for it, as f_back does. Were that to start a collection, and a
    # finalizer to let the other thread run on meanwhile, the object would show memory that is no frame any more.
    with _looking.lock:
        enabled = gc.isenabled()
        try:
            _looking.collector_paused = enabled
            gc.disable()
            return choose(sys._current_frames().get(ident))
        finally:
            if enabled:
                gc.enable()
            _looking.collector_paused = False


def _look_anew_in_child() -> None:
    if _looking.collector_paused:  # forked while another thread looked
        gc.enable()
    _looking.__init__()  # type: ignore[misc]


generation.on_fork(_look_anew_in_child)
