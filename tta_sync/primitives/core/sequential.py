"""One step after another, and how a cache without a step finds its place among them.

An *unbound* primitive wraps no step yet: ``CachePrimitive(ttl=60)``. It says so by ``unbound = True``, and gives the
bound one that it stands for by ``bind(inner)``. In a chain, those at the head wrap all that follows, those at the tail
all that comes before; the left one is the outer one::

    memory >> fetch >> parse >> redis  # memory around redis around (fetch >> parse)

So a chain under construction must stay open at both ends: ``a >> b`` grows *a*, while *b*, where it holds unbound
primitives, is sealed and stays one step. What a chain binds is settled at its first execution.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, Protocol

from tta_sync.context import WorkflowContext
from tta_sync.events import bus
from tta_sync.exceptions import ConfigurationError, was_called
from tta_sync.primitives.core.base import (
    MISS,
    In,
    Out,
    StepLike,
    WorkflowPrimitive,
    as_primitive,
    note,
    peek_value,
    several,
    shown,
    told,
)
from tta_sync.primitives.core.composition import inside, is_unbound, warn_user

if TYPE_CHECKING:
    from tta_sync.primitives.core.diagram import Outline


Step = WorkflowPrimitive[Any, Any]
Run = Callable[[Any, WorkflowContext], Coroutine[Any, Any, Any]]


class Unbound(Protocol):
    """What a primitive offers that binds to its neighbours in a chain."""

    unbound: bool

    def bind(self, inner: Step) -> Step:
        """Return a primitive of the same options around *inner*; the same steps get the same one again.

        Raises:
            ConfigurationError: it has already been bound to other steps.
        """


def split(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], tuple[Step, ...], tuple[Step, ...]]:
    """Return the unbound steps at the head, what they wrap, and the unbound steps at the tail.

    Raises:
        ConfigurationError: an unbound step stands in the middle, where it could wrap either side.
    """
    head = 0
    while head < len(steps) and is_unbound(steps[head]):
        head += 1
    tail = len(steps)
    while tail > head and is_unbound(steps[tail - 1]):
        tail -= 1
    for position in range(head, tail):
        if is_unbound(steps[position]):
            cache, before, after = steps[position], steps[position - 1], steps[position + 1]
            raise ConfigurationError(
                f"{cache!r} has steps on both sides: write {before!r} >> ({cache!r} >> {after!r}) for what follows, "
                f"or {type(cache).__name__}(primitive={before!r}) >> {after!r} for what comes before"
            )
    return steps[:head], steps[head:tail], steps[tail:]


class SequentialPrimitive(WorkflowPrimitive[In, Out]):
    """Run steps in order, each with the result of the one before it; all share one context.

    Nested sequences flatten. An error passes through as itself, with a note that names the step. Unbound caches at
    either end wrap the rest (see the module's docstring).

    Raises:
        ConfigurationError: there are no steps; an unbound cache has steps on both sides, or nothing to cache; or, at
            the first execution, a cache has already been bound to other steps.

    Source: TTA.dev's SequentialPrimitive; the binding of caches is ours.
    """

    peeks = True
    tells_itself = True

    def __init__(self, primitives: Sequence[StepLike[Any, Any]]) -> None:
        # What the list nests, it means to nest: only `>>` lets a chain with caches grow.
        self._set(tuple(part for given in several(primitives) for part in _parts(given, sealed=True)))
        _warn_of(self.steps, ())

    def _set(self, steps: tuple[Step, ...]) -> None:
        if not steps:
            raise ConfigurationError("a sequence needs at least one step")
        self.steps = steps
        self._runs: tuple[Run, ...] | None = None
        self._bound: Step | None = None
        self._named = steps  # whom to name where one of _runs fails
        if any(map(is_unbound, steps)):
            split(steps)
        else:
            self._runs = tuple(step._run for step in steps)

    @classmethod
    def join(cls, left: Any, right: Any) -> SequentialPrimitive[Any, Any]:
        """Build ``left >> right``."""
        chain: SequentialPrimitive[Any, Any] = SequentialPrimitive.__new__(SequentialPrimitive)
        begun = _parts(left, sealed=False)
        chain._set(begun + _parts(right, sealed=True))
        _warn_of(chain.steps, begun)
        return chain

    @property
    def primitives(self) -> list[Step]:
        """The steps, under TTA.dev's name."""
        return list(self.steps)

    def children(self) -> tuple[Step, ...]:
        return self.steps if self._bound is None else (self._bound,)

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        return Outline("chain")

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        runs = self._runs or self._bind()
        if bus.emit is not None:
            runs = tuple(map(told, self.steps if self._bound is None else (self._bound,)))
        position = 0
        try:
            for run in runs:
                data = await run(data, context)
                position += 1
        except BaseException as error:
            if position:
                was_called(error)
            if self._named and isinstance(error, Exception):
                note(error, f"in step {position + 1} of {len(self._named)}: {shown(self._named[position])}")
            raise
        return data

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        """Answer where the whole sequence is one step that can, such as a cache of all the rest."""
        only = self._bound if self._bound is not None else self.steps[0] if len(self.steps) == 1 else None
        return MISS if only is None else peek_value(only, data, context)

    def _bind(self) -> tuple[Run, ...]:
        # Threads that come here at once all get the same from bind(): no lock.
        middle = split(self.steps)[1]
        self._named = middle if len(middle) == 1 else ()  # a sequence of its own names its steps
        self._bound = _bind(self.steps)
        self._runs = (self._bound._run,)
        return self._runs

    @property
    def _operator(self) -> str:  # type: ignore[override]
        return ">>" if len(self.steps) > 1 else self.steps[0]._operator

    @recursive_repr()
    def __repr__(self) -> str:
        if len(self.steps) == 1:
            return repr(self.steps[0])
        return " >> ".join(f"({step!r})" if step._operator else repr(step) for step in self.steps)


def _warn_of(steps: tuple[Step, ...], begun: tuple[Step, ...]) -> None:
    """Warn of what the unbound steps object to in what they wrap, unless they did so when the chain was *begun*.

    Whether the chain will grow cannot be known here, nor waited for: the line that builds it is to be named.
    """
    told = _objections(begun)
    for objection in _objections(steps):
        if objection not in told:
            told.append(objection)
            warn_user(objection)


def _objections(steps: tuple[Step, ...]) -> list[str]:
    if not any(map(is_unbound, steps)):
        return []
    head, middle, tail = split(steps)
    if not middle:
        return []
    inner = middle[0] if len(middle) == 1 else SequentialPrimitive(middle)
    parts = [(inner, True), *inside(inner)]
    found = [cache.conflict(part, direct) for cache in head + tail for part, direct in parts]
    return [objection for objection in found if objection]


def _bind(steps: tuple[Step, ...]) -> Step:
    """Wrap what stands in the middle of *steps* into the unbound ones around it, the left one outermost."""
    head, middle, tail = split(steps)
    caches = head + tail
    if not middle:
        raise ConfigurationError(f"{caches[0]!r} has nothing to cache: write {caches[0]!r} >> step")
    bound = middle[0] if len(middle) == 1 else SequentialPrimitive(middle)
    for cache in reversed(caches):
        bound = cache.bind(bound)  # type: ignore[attr-defined]  # is_unbound has asked for it
    return bound


def _parts(given: Any, *, sealed: bool) -> tuple[Step, ...]:
    """Return what *given* adds to a chain: its steps, or itself as one step where it must keep its extent."""
    step = as_primitive(given)
    if type(step) is not SequentialPrimitive:
        return (step,)
    if sealed and any(map(is_unbound, step.steps)):
        if not split(step.steps)[1]:
            raise ConfigurationError(f"({step!r}) has nothing to cache: write {step!r} >> step inside the brackets")
        return (step,)
    return step.steps
