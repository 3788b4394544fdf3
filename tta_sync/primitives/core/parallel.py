"""Several steps at once, on the same input."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, Literal, overload

from tta_sync.context import WorkflowContext
from tta_sync.events import bus
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import (
    In,
    Next,
    Out,
    StepLike,
    WorkflowPrimitive,
    as_primitive,
    several,
    shown,
    told,
)
from tta_sync.primitives.core.branches import run_all, run_windowed
from tta_sync.primitives.core.composition import children_of, inside, warn_user
from tta_sync.primitives.core.naming import call_name
from tta_sync.primitives.core.options import is_count

if TYPE_CHECKING:
    import functools

    from tta_sync.primitives.core.base import Foreign, _ContextFunction, _Function
    from tta_sync.primitives.core.diagram import Outline


OnError = Literal["raise", "collect"]


def check_on_error(on_error: str) -> bool:
    """Return True for "collect", False for "raise"."""
    if on_error not in ("raise", "collect"):
        raise ConfigurationError(f'on_error is "raise" or "collect", not {on_error!r}')
    return on_error == "collect"


def check_concurrency(max_concurrency: int | None) -> None:
    if max_concurrency is not None and not is_count(max_concurrency, 1):
        raise ConfigurationError(f"max_concurrency must be a whole number, at least 1, not {max_concurrency!r}")


class ParallelPrimitive(WorkflowPrimitive[In, list[Out]]):
    """Run steps concurrently on the same input; return their results as a list, in the order of the steps.

    Each branch works on a child context: what it writes to ``state`` stays its own. The first failure cancels the other
    branches, waits until they have ended, and comes out as itself; what else failed stands in its notes. With
    ``on_error="collect"`` nothing is cancelled, and an error stands in the list in the place of its result.

    Args:
        primitives: the branches.
        max_concurrency: how many branches run at a time; None for all.
        on_error: "raise" or "collect".

    Raises:
        ConfigurationError: there are no branches, or an option makes no sense.

    Caller steps share one thread, so they run one after another; a parallel of nothing else is a CompositionWarning.
    Source: TTA.dev's ParallelPrimitive; cancelling and awaiting siblings is structured concurrency (trio, TaskGroup).
    """

    tells_itself = True

    def __init__(
        self,
        primitives: Sequence[StepLike[Any, Any]],
        *,
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.branches: tuple[WorkflowPrimitive[Any, Any], ...] = tuple(map(as_primitive, several(primitives)))
        if not self.branches:
            raise ConfigurationError("a parallel needs at least one branch")
        self._collect = check_on_error(on_error)
        check_concurrency(max_concurrency)
        self.on_error = on_error
        self.max_concurrency = max_concurrency
        self._starts = tuple((call_name(branch), branch._run) for branch in self.branches)
        # Who asks for one at a time knows: the same input for each, and their results in a list.
        if len(self.branches) > 1 and max_concurrency != 1 and all(map(_only_caller, self.branches)):
            warn_user(
                f"every branch of {self!r} is a caller step: they share the caller's one thread and run one after "
                "another; chain them with >>, or make those that need no session a thread_step"
            )

    @classmethod
    def join(cls, left: Any, right: Any) -> ParallelPrimitive[Any, Any]:
        """Build ``left | right``; a parallel without options of its own takes the other's branches in."""
        return cls([*_open_branches(left), *_open_branches(right)])

    if TYPE_CHECKING:
        # A parallel grows: `a | b | c` has three results, not a list in a list.

        @overload  # type: ignore[override]
        def __or__(self, other: ParallelPrimitive[In, Next]) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(self, other: WorkflowPrimitive[In, Next]) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(
            self, other: Callable[[In, WorkflowContext], Awaitable[Next]]
        ) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(self, other: Callable[[In], Awaitable[Next]]) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(self, other: Callable[[In, WorkflowContext], Next]) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(self, other: Callable[[In], Next]) -> ParallelPrimitive[In, Out | Next]: ...
        @overload
        def __or__(self, other: Foreign) -> ParallelPrimitive[In, Any]: ...
        def __or__(self, other: Any) -> Any: ...

        @overload  # type: ignore[override]
        def __ror__(self, other: _ContextFunction[In, Awaitable[Next]]) -> ParallelPrimitive[In, Next | Out]: ...
        @overload
        def __ror__(self, other: _Function[In, Awaitable[Next]]) -> ParallelPrimitive[In, Next | Out]: ...
        @overload
        def __ror__(self, other: _ContextFunction[In, Next]) -> ParallelPrimitive[In, Next | Out]: ...
        @overload
        def __ror__(self, other: _Function[In, Next]) -> ParallelPrimitive[In, Next | Out]: ...
        @overload
        def __ror__(self, other: functools.partial[Any]) -> ParallelPrimitive[In, Any]: ...
        @overload
        def __ror__(self, other: Foreign) -> ParallelPrimitive[In, Any]: ...
        def __ror__(self, other: Any) -> Any: ...

    @property
    def primitives(self) -> list[WorkflowPrimitive[Any, Any]]:
        """The branches, under TTA.dev's name."""
        return list(self.branches)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return self.branches

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        return Outline("fork", f"parallel: {details}" if (details := self.details()) else "parallel")

    async def _run(self, data: In, context: WorkflowContext) -> list[Out]:
        starts = self._starts
        if bus.emit is not None:
            starts = tuple((name, told(branch)) for (name, _), branch in zip(starts, self.branches, strict=True))
        calls = [(name, run, data, context.create_child_context()) for name, run in starts]
        if self.max_concurrency is None:
            return await run_all(calls, self._label, self._collect)
        return await run_windowed(iter(calls), len(calls), self.max_concurrency, self._label, self._collect)

    def _label(self, index: int) -> str:
        return f"branch {index + 1} of {len(self.branches)}: {shown(self.branches[index])}"

    def details(self) -> str:
        limit = "" if self.max_concurrency is None else f"max_concurrency={self.max_concurrency}"
        collect = 'on_error="collect"' if self._collect else ""
        return ", ".join(filter(None, (limit, collect)))

    @property
    def _operator(self) -> str:  # type: ignore[override]
        return "" if self.details() or len(self.branches) == 1 else "|"

    @recursive_repr()
    def __repr__(self) -> str:
        parts = " | ".join(f"({branch!r})" if branch._operator else repr(branch) for branch in self.branches)
        details = self.details()
        return parts if self._operator else f"Parallel({parts}{details and ', ' + details})"


def _open_branches(side: Any) -> tuple[Any, ...]:
    if type(side) is ParallelPrimitive and side.max_concurrency is None and not side._collect:
        return side.branches
    return (side,)


def _only_caller(branch: WorkflowPrimitive[Any, Any]) -> bool:
    leaves = [part for part in (branch, *(part for part, _ in inside(branch))) if not children_of(part)]
    return bool(leaves) and all(type(part).runs_on == "caller" for part in leaves)
