"""The contract of every primitive, and how plain functions become one.

Two methods, one per audience: ``execute(data, context)`` is what users call and override; ``_run(data, context)`` is
what composites call. ``execute`` sorts out the spellings of its arguments once, at the entry; ``_run`` never looks.
Defining either in a subclass gives the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar, overload

from tta_sync.context import WorkflowContext, current_caller, current_context, current_pool, ports
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.primitives.core.composition import children_of, details_of

if TYPE_CHECKING:
    from tta_sync.primitives.core.parallel import ParallelPrimitive
    from tta_sync.primitives.core.sequential import SequentialPrimitive

In = TypeVar("In")
Out = TypeVar("Out")
Next = TypeVar("Next")
F = TypeVar("F", bound=Callable[..., Any])


class _Miss:
    """The type of MISS, so that it prints as what it is."""

    def __repr__(self) -> str:
        return "MISS"

    def __reduce__(self) -> str:
        return "MISS"  # pickles as a reference to the one object


MISS: Final[Any] = _Miss()
"""What ``peek`` returns when it cannot answer without the loop."""

_CONTEXT_FIRST = frozenset({"context", "ctx"})

Run = Callable[[Any, Any, WorkflowContext], Coroutine[Any, Any, Any]]


def sort_arguments(data: Any, context: Any, keywords: dict[str, Any] | None = None) -> tuple[Any, WorkflowContext]:
    """Bring every order and keyword spelling of ``execute`` to (data, context); make a context where there is none."""
    if keywords:
        if "input_data" in keywords:
            data = keywords.pop("input_data")
        if keywords:
            raise TypeError(f"execute() takes data (or input_data) and context, not {', '.join(sorted(keywords))}")
    if isinstance(data, WorkflowContext) and not isinstance(context, WorkflowContext):
        data, context = context, data
    if context is None:
        current = current_context()
        context = WorkflowContext() if current is None else current
    return data, context


def _entry(run: Run) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make the public ``execute`` over one class's *run*, so that ``super().execute()`` reaches the parent's own."""

    def execute(
        self: Any, data: Any = None, context: WorkflowContext | None = None, **keywords: Any
    ) -> Coroutine[Any, Any, Any]:
        if keywords or not isinstance(context, WorkflowContext) or isinstance(data, WorkflowContext):
            data, context = sort_arguments(data, context, keywords)
        return run(self, data, context)

    # Not `async def`, which would cost a second frame per call; it answers as one where somebody asks.
    if hasattr(inspect, "markcoroutinefunction"):  # 3.12
        inspect.markcoroutinefunction(execute)
    return execute


def _context_first(function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters)
    return len(parameters) > 1 and parameters[1] in _CONTEXT_FIRST


class WorkflowPrimitive(Generic[In, Out]):
    """One step of a workflow: takes data and a context, returns a result, composes with ``>>`` and ``|``.

    Subclass it with ``async def execute(self, data, context)``. Subclasses need not call ``super().__init__()``, may
    take the context first (``execute(self, context, data)``), and may be built at import time: they need no loop.

    Class attributes for subclasses:
        idempotent: False keeps Retry and Hedge from running the step a second time after it may have had an effect.
        peeks: True where the class defines ``peek`` in the sense of :meth:`peek`; without it, a method of that name is
            the subclass's own business.

    Source: TTA.dev's WorkflowPrimitive; ``peek`` and the synchronous entry are ours.
    """

    idempotent: bool | None = None
    peeks: ClassVar[bool] = False
    name: str | None = None
    runs_on: ClassVar[str] = "loop"  # or "caller", or "pool"
    strategy: ClassVar[str] = ""  # "retry", "timeout", "cache" ...: what conflict() looks at, without an import

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = cls.__dict__
        if "peek" in own and "peeks" not in own:
            cls.peeks = False
        if "_run" in own:
            if "execute" not in own:
                cls.execute = _entry(own["_run"])  # type: ignore[method-assign]  # same call, looser spelling
        elif "execute" in own:
            written = own["execute"]
            run: Run = written
            if _context_first(written):

                def run(self: Any, data: Any, context: WorkflowContext) -> Coroutine[Any, Any, Any]:
                    coroutine: Coroutine[Any, Any, Any] = written(self, context, data)
                    return coroutine

            cls._run = run  # type: ignore[method-assign]
            cls.execute = functools.wraps(written)(_entry(run))  # type: ignore[method-assign]

    if TYPE_CHECKING:

        async def execute(self, data: In, context: WorkflowContext, /) -> Out:
            """Run the step: ``await step.execute(data, context)``."""
            ...

        async def _run(self, data: In, context: WorkflowContext, /) -> Out: ...
    else:

        async def _run(self, data, context):
            raise NotImplementedError(f"{type(self).__name__} has no execute(data, context): define it as `async def`")

        execute = _entry(_run)

    def run_sync(self, data: Any = None, context: Any = None, *, timeout: float | None = None) -> Out:
        """Run the workflow on the managed loop and wait for its result: :func:`tta_sync.run_sync` as a method."""
        result: Out = ports.sync_entry(self, data, context, timeout)
        return result

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        """Answer without the loop, raise without the loop, or return MISS and leave no trace.

        Called on the caller's thread, before a hop, on classes that declare ``peeks = True`` only.
        """
        return MISS

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        """Return the steps that this one is directly made of."""
        return ()

    def details(self) -> str:
        """Return the options worth reading in a repr or a diagram, as ``name=value, ...``."""
        return ""

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        """Say why it makes no sense to have *inner* inside this step, with the remedy; None where it does.

        *direct* is True where only wrappers of one step stand between, no sequence and no parallel.
        """
        return None

    @overload
    def __rshift__(self, other: WorkflowPrimitive[Out, Next]) -> SequentialPrimitive[In, Next]: ...
    @overload
    def __rshift__(self, other: Callable[..., Any]) -> SequentialPrimitive[In, Any]: ...
    def __rshift__(self, other: Any) -> Any:
        from tta_sync.primitives.core.sequential import SequentialPrimitive

        return SequentialPrimitive.join(self, other) if is_step(other) else NotImplemented

    def __rrshift__(self, other: Callable[..., Any]) -> SequentialPrimitive[Any, Out]:
        from tta_sync.primitives.core.sequential import SequentialPrimitive

        return SequentialPrimitive.join(other, self) if is_step(other) else NotImplemented

    def __or__(self, other: Any) -> ParallelPrimitive[In, Any]:
        from tta_sync.primitives.core.parallel import ParallelPrimitive

        return ParallelPrimitive.join(self, other) if is_step(other) else NotImplemented

    def __ror__(self, other: Callable[..., Any]) -> ParallelPrimitive[Any, Any]:
        from tta_sync.primitives.core.parallel import ParallelPrimitive

        return ParallelPrimitive.join(other, self) if is_step(other) else NotImplemented

    def __repr__(self) -> str:
        parts = ", ".join(filter(None, (*map(repr, children_of(self)), details_of(self))))
        if not parts:
            return step_name(self)
        return f"{type(self).__name__.removesuffix('Primitive')}({parts})"


def is_step(candidate: object) -> bool:
    """Say whether *candidate* can stand in a workflow."""
    return isinstance(candidate, WorkflowPrimitive) or hasattr(candidate, "execute") or callable(candidate)


def as_primitive(candidate: Any) -> WorkflowPrimitive[Any, Any]:
    """Return *candidate* as a primitive: itself, a wrapped foreign ``execute``, or a function.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(candidate, WorkflowPrimitive):
        return candidate
    if isinstance(candidate, type):
        raise ConfigurationError(f"{candidate.__name__} is a class: write {candidate.__name__}(...)")
    if callable(getattr(candidate, "execute", None)):
        return ForeignPrimitive(candidate)
    if callable(candidate):
        return LambdaPrimitive(candidate)
    raise ConfigurationError(
        f"{candidate!r} cannot be a step: "
        "give a primitive, an object with `async execute(data, context)`, or a function"
    )


def step_name(candidate: object) -> str:
    """Return the name by which people know a step: its own, its function's, or its class's."""
    name = getattr(candidate, "name", None) or getattr(candidate, "__qualname__", None)
    return name if isinstance(name, str) else type(candidate).__qualname__


class ForeignPrimitive(WorkflowPrimitive[Any, Any]):
    """An object of another library with ``async execute(data, context)``, taken as it is."""

    def __init__(self, foreign: Any) -> None:
        self.foreign = foreign
        self.name = step_name(foreign)

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        return await self.foreign.execute(data, context)


def takes_context(function: Callable[..., Any]) -> bool:
    """Say whether *function* wants ``(data, context)`` rather than ``(data)``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    # A second parameter with a default is the context only if it is called so: int(x, base=10) is not.
    return len(required) >= 2 or (len(positional) >= 2 and positional[1].name in _CONTEXT_FIRST)


class LambdaPrimitive(WorkflowPrimitive[In, Out]):
    """A function as a step, run on the loop: ``func(data, context)`` or ``func(data)``, plain or async.

    A plain function must not block: it holds the loop. What blocks is for :func:`thread_step` or :func:`caller_step`.
    What the function returns is awaited if it is awaitable, so a lambda around a coroutine works.
    """

    def __init__(
        self,
        func: Callable[..., Awaitable[Out] | Out],
        *,
        name: str | None = None,
        idempotent: bool | None = None,
    ) -> None:
        if not callable(func):
            raise ConfigurationError(f"a step needs a function, not {func!r}")
        self.func = func
        self.name = name or step_name(func)
        self.idempotent = idempotent
        self._takes_context = takes_context(func)
        # `@step` keeps the function's face: its docstring, module, and signature for whoever inspects it.
        functools.update_wrapper(self, func, updated=())

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        result: Any = self.func(data, context) if self._takes_context else self.func(data)
        if inspect.isawaitable(result):
            result = await result
        answer: Out = result
        return answer

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call the function itself, as if it were not decorated."""
        return self.func(*args, **keywords)


class CallerPrimitive(LambdaPrimitive[In, Out]):
    """A plain function as a step, run on the thread that waits in ``run_sync``, with its sessions and thread-locals."""

    runs_on = "caller"

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        caller = current_caller.get()
        if caller is None:
            raise NoCallerError(
                f"{self.name} is a caller step, and nobody waits in run_sync: "
                "call the workflow through run_sync, or make it a step or thread_step"
            )
        result: Out = await caller.run(self._call, data, context)
        return result

    def _call(self, data: In, context: WorkflowContext) -> Any:
        result = self.func(data, context) if self._takes_context else self.func(data)
        if inspect.iscoroutine(result):
            result.close()
            raise ConfigurationError(f"{self.name} is async: a {self._kind} takes a plain function; use @step")
        return result

    _kind = "caller_step"


class ThreadPrimitive(CallerPrimitive[In, Out]):
    """A plain function as a step, run on a thread of the loop's pool: for work that blocks and needs no caller."""

    runs_on = "pool"
    _kind = "thread_step"

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        pool = current_pool.get()
        if pool is not None:
            result: Out = await pool.run(self._call, data, context)
            return result
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(None, run, self._call, data, context)


def _decorator(kind: type[LambdaPrimitive[Any, Any]], may_be_async: bool) -> Callable[..., Any]:
    def decorate(
        func: Callable[..., Any] | None = None, *, name: str | None = None, idempotent: bool | None = None
    ) -> Any:
        if func is None:
            return lambda func: decorate(func, name=name, idempotent=idempotent)
        if not may_be_async and inspect.iscoroutinefunction(func):
            raise ConfigurationError(f"{step_name(func)} is async and belongs on the loop: use @step")
        return kind(func, name=name, idempotent=idempotent)

    return decorate


if TYPE_CHECKING:

    @overload
    def step(func: Callable[[In, WorkflowContext], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(func: Callable[[In], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(func: Callable[..., Any], /) -> LambdaPrimitive[Any, Any]: ...
    @overload
    def step(
        *, name: str | None = None, idempotent: bool | None = None
    ) -> Callable[[Callable[..., Any]], LambdaPrimitive[Any, Any]]: ...
    def step(func: Any = None, **options: Any) -> Any:
        """Make a function, plain or async, a step that runs on the loop."""

    @overload
    def caller_step(func: Callable[[In, WorkflowContext], Out], /) -> CallerPrimitive[In, Out]: ...
    @overload
    def caller_step(func: Callable[[In], Out], /) -> CallerPrimitive[In, Out]: ...
    @overload
    def caller_step(
        *, name: str | None = None, idempotent: bool | None = None
    ) -> Callable[[Callable[..., Any]], CallerPrimitive[Any, Any]]: ...
    def caller_step(func: Any = None, **options: Any) -> Any:
        """Make a plain function a step that runs on the thread that waits in ``run_sync``."""

    @overload
    def thread_step(func: Callable[[In, WorkflowContext], Out], /) -> ThreadPrimitive[In, Out]: ...
    @overload
    def thread_step(func: Callable[[In], Out], /) -> ThreadPrimitive[In, Out]: ...
    @overload
    def thread_step(
        *, name: str | None = None, idempotent: bool | None = None
    ) -> Callable[[Callable[..., Any]], ThreadPrimitive[Any, Any]]: ...
    def thread_step(func: Any = None, **options: Any) -> Any:
        """Make a plain function a step that runs on a thread of the loop's pool."""
else:
    step = _decorator(LambdaPrimitive, may_be_async=True)
    caller_step = _decorator(CallerPrimitive, may_be_async=False)
    thread_step = _decorator(ThreadPrimitive, may_be_async=False)


def note(error: BaseException, text: str) -> None:
    """Add *text* to the error's notes, once: an error object that is raised again and again must not grow."""
    notes = getattr(error, "__notes__", None)
    if notes is None or (text not in notes and len(notes) < 20):
        error.add_note(text)
