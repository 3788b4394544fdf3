"""The moments at which a TimeoutPrimitive cuts, as the steps inside see them: ``tta_sync.context.time_limit``.

A limit holds for what runs inside its step's coroutine, and is sure to be cut with it. A task that the step has started
borrows it: it enforces the limit itself, for as long as the step lasts.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from tta_sync.context import Deadline, TimeLimit, current_caller, limit_in_force, time_limit

# A method of an imported name is looked up anew for each call; of these, once for all.
limit_around = time_limit.get
set_time_limit = time_limit.set
_waiting_caller = current_caller.get

current_task = asyncio.current_task if sys.version_info >= (3, 12) else None
"""Asked where a task may begin inside another one, eagerly; not in 3.11, which has none such, and is slow to say."""


class OwnLimit(TimeLimit):
    """A TimeLimit that is made for each call, and so without a dictionary."""

    __slots__ = ("outer", "over", "step", "struck", "task")

    task: asyncio.Task[Any] | None  # the one that is cut; None before Python 3.12, whose tasks may begin inside another


def new_limit(at: float, outer: float | None) -> OwnLimit:
    """Make the limit of the running task's step, inside the limit *outer*."""
    limit = OwnLimit(at)
    limit.outer = outer
    limit.over = limit.struck = False
    limit.task = None if current_task is None else current_task()
    return limit


def set_limit(at: float, outer: float | None) -> OwnLimit:
    """Make a limit, and let the step that begins now see it."""
    limit = new_limit(at, outer)
    set_time_limit(limit)
    return limit


class _Elsewhere:
    cr_running = False


class BorrowedLimit(TimeLimit):
    """A limit around the step that started this task, as it holds inside the task: as long as that step lasts.

    It is enforced here, as who has set it cuts another task, and relied on by nobody. ``outer`` comes into its place;
    ``later`` is what the step then has: the moment that is its own, and the deadline if it is to blame for that.
    """

    __slots__ = ("later", "lender", "outer")

    step = _Elsewhere
    later: tuple[float, Deadline | None]
    lender: float

    @property
    def over(self) -> bool:  # type: ignore[override]
        return getattr(self.lender, "over", False)


def borrow(outer: float, own: OwnLimit, later: tuple[float, Deadline | None]) -> BorrowedLimit:
    """Set *outer* for a step that it does not cut, as it runs in another task; and those around it, if before *own*."""
    lenders = [outer]
    while (lender := limit_in_force(getattr(lenders[-1], "outer", None))) is not None and lender <= later[0]:
        lenders.append(lender)
    limit: Any = own
    for lender in reversed(lenders):
        behind, limit = limit, BorrowedLimit(lender)
        limit.lender, limit.outer, limit.later = lender, behind, later
    set_time_limit(limit)
    borrowed: BorrowedLimit = limit
    return borrowed


def caller_cuts_at(moment: float) -> bool:
    """Say whether a caller waits who cuts, at *moment*, the very task that asks."""
    caller = _waiting_caller()
    if caller is None or caller.deadline != moment:
        return False
    task: Any = caller.task
    return task is not None and task.get_coro().cr_running and (current_task is None or task is current_task())
