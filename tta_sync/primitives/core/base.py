"""The contract of every primitive, and how plain functions become one.

Two methods, one per audience: ``execute(data, context)`` is what users call and override; ``_run(data, context)`` is
what composites call. ``execute`` sorts out the spellings of its arguments once, at the entry; ``_run`` never looks.
Defining either in a subclass gives the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar, overload

from tta_sync import events
from tta_sync.context import WorkflowContext, current_caller, current_context, current_pool, ports
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.primitives.core.composition import children_of, details_of
from tta_sync.primitives.core.naming import call_name, step_name as step_name
from tta_sync.primitives.core.threads import Errand

if TYPE_CHECKING:
    from tta_sync.primitives.core.diagram import Outline
    from tta_sync.primitives.core.parallel import ParallelPrimitive
    from tta_sync.primitives.core.sequential import SequentialPrimitive

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    # Where a plain function gives no types, a step takes and returns Any.
    In = TypeVarWithDefault("In", default=Any, contravariant=True)
    Out = TypeVarWithDefault("Out", default=Any, covariant=True)
else:
    In = TypeVar("In")
    Out = TypeVar("Out")
Next = TypeVar("Next")
First = TypeVar("First")


if TYPE_CHECKING:
    _Given = TypeVar("_Given", contravariant=True)
    _Made = TypeVar("_Made", covariant=True)

    class Foreign(Protocol):
        """An object of another library that runs as a step."""

        def __sizeof__(self) -> int: ...  # see WorkflowPrimitive

        def execute(self, data: Any, context: Any, /) -> Awaitable[Any]: ...

    class _Function(Protocol[_Given, _Made]):
        """A function, and no other callable: a step made by ``@step`` has no ``__name__`` for a type checker."""

        @property
        def __name__(self) -> str: ...
        def __call__(self, data: _Given, /) -> _Made: ...

    class _AnyFunction(Protocol):
        @property
        def __name__(self) -> str: ...
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    class _AnyObject(Protocol):
        def __sizeof__(self) -> int: ...  # see WorkflowPrimitive
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    class _ContextFunction(Protocol[_Given, _Made]):
        @property
        def __name__(self) -> str: ...
        def __call__(self, data: _Given, context: WorkflowContext, /) -> _Made: ...


class _Miss:
    """The type of MISS, so that it prints as what it is."""

    def __repr__(self) -> str:
        return "MISS"

    def __reduce__(self) -> str:
        return "MISS"  # pickles as a reference to the one object


MISS: Final[Any] = _Miss()
"""What ``peek`` returns when it cannot answer without the loop."""

_CONTEXT_NAMES = frozenset({"context", "ctx"})

Run = Callable[[Any, Any, WorkflowContext], Coroutine[Any, Any, Any]]


def sort_arguments(data: Any, context: Any, keywords: dict[str, Any] | None = None) -> tuple[Any, WorkflowContext]:
    """Bring every order and keyword spelling of ``execute`` to (data, context); make a context where there is none."""
    if keywords:
        data, context = with_keywords(data, context, keywords)
    if isinstance(data, WorkflowContext) and not isinstance(context, WorkflowContext):
        data, context = context, data
    if context is None:
        current = current_context()
        context = WorkflowContext() if current is None else current
    elif not hasattr(context, "state"):  # a context of TTA.dev's own would do
        raise TypeError(f"the context is a WorkflowContext, not {type(context).__name__}: execute(data, context)")
    return data, context


def with_keywords(data: Any, context: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
    """Return data and context of a call that spells some of them as *keywords*.

    Raises:
        TypeError: a keyword is unknown, or says again what was said already.
    """
    unknown = keywords.keys() - {"data", "input_data", "context"}
    if unknown:
        raise TypeError(f"execute() takes data (or input_data) and context, not {', '.join(sorted(unknown))}")
    if "data" in keywords or "input_data" in keywords:
        if isinstance(data, WorkflowContext) and context is None:
            data, context = None, data  # execute(context, data=...)
        if data is not None or len(keywords) - ("context" in keywords) > 1:
            raise TypeError("execute() got its data twice: data and input_data are two names for one argument")
        data = keywords["data"] if "data" in keywords else keywords["input_data"]
    if "context" in keywords:
        if context is not None:
            raise TypeError("execute() got its context twice")
        context = keywords["context"]
    return data, context


def _entry(run: Run) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make the public ``execute`` over one class's *run*, so that ``super().execute()`` reaches the parent's own."""

    def execute(
        self: Any, data: Any = None, context: WorkflowContext | None = None, /, **keywords: Any
    ) -> Coroutine[Any, Any, Any]:
        # The usual case by identity, which is cheaper than isinstance; a subclass of the context goes the long way.
        if keywords or type(context) is not WorkflowContext:
            data, context = sort_arguments(data, context, keywords)
        return run(self, data, context)

    # Not `async def`, which would cost a second frame per call; it answers as one where somebody asks.
    if sys.version_info >= (3, 12):  # pragma: no cover
        inspect.markcoroutinefunction(execute)
    else:
        execute._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # what 3.11 has for it
    execute._runs = run  # type: ignore[attr-defined]  # see is_replaced()
    return execute


def context_first(method: Callable[..., Any]) -> bool:
    """Say whether a method's signature is ``(self, context, data)``."""
    try:
        parameters = list(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # compiled, or no function at all: a mock, say
        return False
    return len(parameters) > 2 and parameters[1] in _CONTEXT_NAMES


def _run_of(name: str, written: Any) -> Run:
    """Make the ``_run(self, data, context)`` of a class *name* out of the ``execute`` that its author has written.

    Raises:
        ConfigurationError: it could not be called, or yields instead of returning.
    """
    if inspect.isasyncgenfunction(written):
        raise ConfigurationError(
            f"{name}.execute yields: subclass StreamingPrimitive, and call it `stream`; or return a list"
        )
    if isinstance(written, types.FunctionType):
        signature = inspect.signature(written)
        try:
            signature.bind(None, None, None)
        except TypeError:
            raise ConfigurationError(
                f"{name}.execute({', '.join(signature.parameters)}) cannot be called with data and context: "
                "write `async def execute(self, data, context)`"
            ) from None
    if not isinstance(written, types.FunctionType) and hasattr(type(written), "__get__"):

        def run(self: Any, data: Any, context: WorkflowContext) -> Any:  # a classmethod, a singledispatchmethod ...
            return written.__get__(self, type(self))(data, context)

    elif context_first(written):

        def run(self: Any, data: Any, context: WorkflowContext) -> Any:
            return written(self, context, data)
    else:
        run = written
    if inspect.iscoroutinefunction(written) or not isinstance(written, types.FunctionType):
        return run

    async def awaiting(self: Any, data: Any, context: WorkflowContext) -> Any:
        answer = run(self, data, context)
        if not inspect.isawaitable(answer):
            raise TypeError(
                f"{name}.execute returned {type(answer).__name__}, not an awaitable: make it `async def`, or make a "
                "step of a plain function with @step"
            )
        return await answer

    return awaiting


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
    peek_raises: bool = False  # True where peek may raise in the step's stead: only a timeout may pass that on
    name: str | None = None
    tells_itself: ClassVar[bool] = False  # True: composites around it emit no StepStarted and StepEnded for it
    runs_on: ClassVar[str] = "loop"  # or "caller", or "pool"
    _operator: str = ""  # with which the repr joins several parts, so that brackets go round it
    # "cache", "choice", "fallback", "map", "saga", "timeout": for who asks without importing the class.
    _tta_kind: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = cls.__dict__
        written = own.get("execute")
        if written is None and "_run" not in own:
            giver = next(kind for kind in cls.__mro__ if "execute" in kind.__dict__)
            if not issubclass(giver, WorkflowPrimitive):  # a mixin that comes before any primitive
                written = giver.__dict__["execute"]
        if "peeks" not in own and ("peek" in own or written is not None or "_run" in own):
            cls.peeks = False  # what the parent's peek would answer is not what this class's execute does
        if "_run" in own and getattr(own.get("execute"), "_runs", None) is own["_run"]:
            pass  # the class is made again from its own parts, as dataclass(slots=True) does: all is in place
        elif "_run" in own:
            if cls.__module__.partition(".")[0] != "tta_sync":
                raise ConfigurationError(
                    f"{cls.__name__}._run: WorkflowPrimitive keeps this name for itself; "
                    "define `async def execute(self, data, context)`, and give a method of your own another name"
                )
            cls.execute = _entry(own["_run"])  # type: ignore[method-assign]  # same call, looser spelling
        elif written is not None:
            run = _run_of(cls.__name__, written)
            cls._run = run  # type: ignore[method-assign]
            entry = _entry(run)
            execute: Any = functools.wraps(written)(entry)
            execute._runs = run  # again: a mixin's may have brought its own
            cls.execute = execute  # type: ignore[method-assign]

    if TYPE_CHECKING:

        async def execute(self, data: In, context: WorkflowContext, /) -> Out:
            """Run the step: ``await step.execute(data, context)``."""
            ...

        async def _run(self, data: In, context: WorkflowContext, /) -> Out: ...
    else:

        async def _run(self, data, context):
            raise NotImplementedError(f"{type(self).__name__} has no execute(data, context): define it as `async def`")

        execute = _entry(_run)

    def run_sync(
        self, data: Any = None, context: Any = None, *, timeout: float | None = None, input_data: Any = None
    ) -> Out:
        """Run the workflow on the managed loop and wait for its result: :func:`tta_sync.run_sync` as a method."""
        if not hasattr(ports, "sync_entry"):
            importlib.import_module("tta_sync.facade")  # fills the port; by name, since it is a layer above
        if input_data is not None:
            data, context = with_keywords(data, context, {"input_data": input_data})
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

    def to_mermaid(self) -> str:
        """Draw the workflow: return the text of a mermaid flowchart."""
        from tta_sync.primitives.core.diagram import mermaid

        return mermaid(self)

    def outline(self) -> Outline | None:
        """Say how :meth:`to_mermaid` draws this step; None: as a frame around its children."""
        return None

    def details(self) -> str:
        """Return the options worth reading in a repr or a diagram, as ``name=value, ...``."""
        return ""

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        """Say why it makes no sense to have *inner* inside this step, with the remedy; None where it does.

        *direct* is True where only wrappers of one step stand between, no sequence and no parallel.
        """
        return None

    if TYPE_CHECKING:
        # A function's own types carry over; those of a foreign object with `execute` are taken on trust. That no
        # step of ours passes for a foreign one, so that two which do not fit are an error at the operator, takes an
        # attribute on which they differ: every other object has a __sizeof__.
        __sizeof__: None  # type: ignore[assignment]

        @overload
        def __rshift__(self, other: WorkflowPrimitive[Out, Next]) -> SequentialPrimitive[In, Next]: ...
        @overload
        def __rshift__(
            self, other: Callable[[Out, WorkflowContext], Awaitable[Next]]
        ) -> SequentialPrimitive[In, Next]: ...
        @overload
        def __rshift__(self, other: Callable[[Out], Awaitable[Next]]) -> SequentialPrimitive[In, Next]: ...
        @overload
        def __rshift__(self, other: Callable[[Out, WorkflowContext], Next]) -> SequentialPrimitive[In, Next]: ...
        @overload
        def __rshift__(self, other: Callable[[Out], Next]) -> SequentialPrimitive[In, Next]: ...
        @overload
        def __rshift__(self, other: Foreign) -> SequentialPrimitive[In, Any]: ...
        def __rshift__(self, other: Any) -> Any: ...

        @overload
        def __rrshift__(self, other: _ContextFunction[First, Awaitable[In]]) -> SequentialPrimitive[First, Out]: ...
        @overload
        def __rrshift__(self, other: _Function[First, Awaitable[In]]) -> SequentialPrimitive[First, Out]: ...
        @overload
        def __rrshift__(self, other: _ContextFunction[First, In]) -> SequentialPrimitive[First, Out]: ...
        @overload
        def __rrshift__(self, other: _Function[First, In]) -> SequentialPrimitive[First, Out]: ...
        @overload
        def __rrshift__(self, other: functools.partial[Any]) -> SequentialPrimitive[Any, Out]: ...
        @overload
        def __rrshift__(self, other: Foreign) -> SequentialPrimitive[Any, Out]: ...
        def __rrshift__(self, other: Any) -> Any: ...

        @overload
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

        @overload
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
    else:

        def __rshift__(self, other):
            from tta_sync.primitives.core.sequential import SequentialPrimitive

            return SequentialPrimitive.join(self, other) if _joins(other) else NotImplemented

        def __rrshift__(self, other):
            from tta_sync.primitives.core.sequential import SequentialPrimitive

            return SequentialPrimitive.join(other, self) if _joins(other) else NotImplemented

        def __or__(self, other):
            from tta_sync.primitives.core.parallel import ParallelPrimitive

            return ParallelPrimitive.join(self, other) if _joins(other) else NotImplemented

        def __ror__(self, other):
            from tta_sync.primitives.core.parallel import ParallelPrimitive

            return ParallelPrimitive.join(other, self) if _joins(other) else NotImplemented

    @recursive_repr()
    def __repr__(self) -> str:
        parts = ", ".join(filter(None, (*map(repr, children_of(self)), details_of(self))))
        if not parts:
            return display_name(self)
        return f"{type(self).__name__.removesuffix('Primitive')}({parts})"


if TYPE_CHECKING:
    StepLike = WorkflowPrimitive[In, Out] | _AnyFunction | _AnyObject | Foreign
    """What can stand in a workflow."""
else:
    StepLike = object  # for annotations only: a Protocol costs a third of a millisecond at import


def is_step(candidate: object) -> bool:
    """Say whether *candidate* can stand in a workflow."""
    return isinstance(candidate, WorkflowPrimitive) or callable(candidate) or hasattr(candidate, "execute")


def _joins(operand: object) -> bool:
    """Say whether *operand* of an operator is a step; False leaves it to the operand's own class, and then to Python.

    Raises:
        TypeError: it is a mistake for which there is a better word than Python's.
    """
    if is_step(operand):
        return True
    if inspect.iscoroutine(operand):
        name = operand.__qualname__
        operand.close()  # else Python complains that nobody awaited it
        raise TypeError(f"{name}(...) was called where a workflow is composed: write {name}, without the call")
    return False


def several(candidates: Any) -> Iterable[Any]:
    """Return what a list of steps was given as, if it can be one.

    Raises:
        ConfigurationError: it is one step, or nothing of which there can be several.
    """
    if isinstance(candidates, Iterable) and not isinstance(candidates, (str, bytes)):
        return candidates
    raise ConfigurationError(f"{candidates!r} is no list of steps: write [step, ...], also for a single one")


def as_primitive(candidate: Any) -> WorkflowPrimitive[Any, Any]:
    """Return *candidate* as a primitive: itself, a wrapped foreign ``execute``, or a function.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(candidate, WorkflowPrimitive):
        return ForeignPrimitive(candidate) if is_replaced(candidate) else candidate
    if isinstance(candidate, type) and hasattr(candidate, "execute"):
        raise ConfigurationError(f"{candidate.__name__} is a class: write {candidate.__name__}(...)")
    if not _is_mocked_function(candidate) and callable(getattr(candidate, "execute", None)):
        return ForeignPrimitive(candidate)
    if callable(candidate):
        return LambdaPrimitive(candidate)
    raise ConfigurationError(
        f"{candidate!r} cannot be a step: "
        "give a primitive, an object with `async execute(data, context)`, or a function"
    )


def is_replaced(step: WorkflowPrimitive[Any, Any]) -> bool:
    """Say whether somebody has put another ``execute`` in the place of the step's own: a test's patch, a decorator.

    Asked where a step is composed or run, not at every call inside a workflow that is composed already.
    """
    kind = type(step)
    return "execute" in step.__dict__ or getattr(kind.execute, "_runs", None) is not kind._run


def _is_mocked_function(candidate: object) -> bool:
    """Say whether *candidate* is a mock of unittest's on which nobody has set up an ``execute``.

    It would answer to that name as to any other, and give another mock for a result.
    """
    if not callable(candidate) or all(kind.__module__ != "unittest.mock" for kind in type(candidate).__mro__):
        return False
    parts = vars(candidate)
    return "execute" not in parts.get("_mock_children", ()) and "execute" not in (parts.get("_mock_methods") or ())


def shown(thing: object) -> str:
    """Return the repr of *thing*, bounded; one that is broken must not hide the error that it is needed for."""
    try:
        return repr(thing)[:200]
    except Exception:
        return type(thing).__name__


def display_name(candidate: object) -> str:
    """Return :func:`step_name` without the function in which the step was defined, for reprs and diagrams."""
    return step_name(candidate).rpartition("<locals>.")[2]


def peek_value(step: WorkflowPrimitive[Any, Any], data: Any, context: WorkflowContext) -> Any:
    """Return what *step* can answer without the loop; MISS where it cannot, or would raise."""
    if not step.peeks or step.peek_raises:
        return MISS
    try:
        return step.peek(data, context)
    except Exception:
        return MISS


class ForeignPrimitive(WorkflowPrimitive[Any, Any]):
    """An object of another library with ``async execute(data, context)``, taken as it is."""

    def __init__(self, foreign: Any) -> None:
        self.foreign = foreign
        self.name = step_name(foreign)

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        answer = self.foreign.execute(data, context)
        if not inspect.isawaitable(answer):
            raise TypeError(
                f"{self.name}.execute returned {type(answer).__name__}, not an awaitable: make it `async def`, "
                "or, if it blocks, wrap it with thread_step"
            )
        return await answer


def calling_form(function: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """Return *function*, and whether it is called as ``f(data, context)`` rather than ``f(data)``.

    One that is written ``f(context, data)`` comes back turned round.

    Raises:
        ConfigurationError: it can be called in none of these ways.
    """
    try:
        signature = _signature(function)
    except (TypeError, ValueError):  # some builtins have no signature
        return function, False
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 1 and positional[0].name == "self" and isinstance(function, types.FunctionType):
        raise ConfigurationError(
            f"{step_name(function)}{signature} is a method without its object, which would be called with the data in "
            f"its place: make a step of the bound method, step(the_object.{function.__name__}), or subclass "
            "WorkflowPrimitive"
        )
    # A second parameter with a default is the context only if it is called so: round(x, ndigits=None) is not.
    two = not isinstance(function, type) and (
        sum(p.default is p.empty for p in positional) == 2
        or (len(positional) >= 2 and not _CONTEXT_NAMES.isdisjoint(p.name for p in positional[:2]))
        or (not positional and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()))
    )
    try:
        signature.bind(*((None, None) if two else (None,)))
    except TypeError:
        raise ConfigurationError(
            f"{step_name(function)}{signature} cannot be a step: write it as f(data) or f(data, context)"
        ) from None
    if two and positional and positional[0].name in _CONTEXT_NAMES:
        return (lambda data, context: function(context, data)), True
    return function, two


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return how *function* is called; of a wrapper that passes on what it gets, what it wraps decides.

    Raises:
        TypeError, ValueError: it does not say.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
        if all(p.kind is not p.VAR_POSITIONAL for p in signature.parameters.values()):
            return signature
    except ValueError:  # functools.cache's have none of their own
        pass
    signature = inspect.signature(function)
    if isinstance(function, types.FunctionType) and function.__code__ is _SINGLE_DISPATCH:
        # Bound already, though what it wraps shows the object it is bound to.
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


class _Dispatching:
    @functools.singledispatchmethod
    def method(self, data: Any) -> None: ...


_SINGLE_DISPATCH = getattr(_Dispatching().method, "__code__", None)
"""The code that all bound singledispatchmethods share; None where they are no functions (from Python 3.14 on)."""


def takes_context(function: Callable[..., Any]) -> bool:
    """Say whether *function* wants two arguments, data and context, rather than one."""
    return calling_form(function)[1]


_NEVER_AWAITABLE = frozenset({bool, bytes, dict, float, int, list, set, str, tuple, type(None)})
"""What functions mostly return: no need to ask, which costs a third of a microsecond."""


def _is_coroutine_function(function: Any) -> bool:
    """Say whether *function* is written ``async def``, so that what it returns can only be a coroutine."""
    function = getattr(function, "__func__", function)
    return isinstance(function, types.FunctionType) and bool(function.__code__.co_flags & inspect.CO_COROUTINE)


def _without_context(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Any, WorkflowContext], Coroutine[Any, Any, Any]]:
    def run(data: Any, context: WorkflowContext) -> Coroutine[Any, Any, Any]:
        return function(data)

    run.makes_coroutines = True  # type: ignore[attr-defined]  # TimeoutPrimitive asks: it drives nothing else
    return run


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
        self._function, self._takes_context = calling_form(func)
        if type(self) is LambdaPrimitive and _is_coroutine_function(self._function):
            # Composites call it directly, which saves a frame per call.
            direct: Any = self._function if self._takes_context else _without_context(self._function)
            self._run = direct  # type: ignore[method-assign]
        # `@step` keeps the function's face: its docstring, module, and signature for whoever inspects it.
        functools.update_wrapper(self, func, updated=())

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        result: Any = self._function(data, context) if self._takes_context else self._function(data)
        if type(result) not in _NEVER_AWAITABLE and inspect.isawaitable(result):
            result = await result
        answer: Out = result
        return answer

    if TYPE_CHECKING:
        # With the input's type: else a checker would take any step for a function that fits anywhere.
        def __call__(self, data: In, /, *args: Any, **keywords: Any) -> Any:
            """Call the function itself, as if it were not decorated."""
    else:

        def __call__(self, *args, **keywords):
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
        result = self._function(data, context) if self._takes_context else self._function(data)
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
        # The queue has been told of a cancellation by the time that it arrives here: what has not begun never will.
        errand = Errand(step_name(self), self._call_in_thread, getattr(self.func, "__code__", None))
        pool = current_pool.get()
        try:
            if pool is not None:
                result: Out = await pool.run(errand, data, context)
                return result
            run = contextvars.copy_context().run
            return await asyncio.get_running_loop().run_in_executor(None, run, errand, data, context)
        except asyncio.CancelledError:
            errand.abandon()
            raise

    def _call_in_thread(self, data: In, context: WorkflowContext) -> Any:
        try:
            return self._call(data, context)
        except StopIteration as error:  # a future refuses it, and whoever waits would wait for ever
            raise RuntimeError("a thread step raised StopIteration") from error


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

    class _StepDecorator(Protocol):
        @overload
        def __call__(self, func: Callable[[In, WorkflowContext], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[In], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[In, WorkflowContext], Out], /) -> LambdaPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[In], Out], /) -> LambdaPrimitive[In, Out]: ...

    class _CallerStepDecorator(Protocol):
        @overload
        def __call__(self, func: Callable[[In, WorkflowContext], Out], /) -> CallerPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[In], Out], /) -> CallerPrimitive[In, Out]: ...

    class _ThreadStepDecorator(Protocol):
        @overload
        def __call__(self, func: Callable[[In, WorkflowContext], Out], /) -> ThreadPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[In], Out], /) -> ThreadPrimitive[In, Out]: ...

    @overload
    def step(func: Callable[[In, WorkflowContext], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(func: Callable[[In], Awaitable[Out]], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(func: Callable[[In, WorkflowContext], Out], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(func: Callable[[In], Out], /) -> LambdaPrimitive[In, Out]: ...
    @overload
    def step(*, name: str | None = None, idempotent: bool | None = None) -> _StepDecorator: ...
    def step(func: Any = None, **options: Any) -> Any:
        """Make a function, plain or async, a step that runs on the loop."""

    @overload
    def caller_step(func: Callable[[In, WorkflowContext], Out], /) -> CallerPrimitive[In, Out]: ...
    @overload
    def caller_step(func: Callable[[In], Out], /) -> CallerPrimitive[In, Out]: ...
    @overload
    def caller_step(*, name: str | None = None, idempotent: bool | None = None) -> _CallerStepDecorator: ...
    def caller_step(func: Any = None, **options: Any) -> Any:
        """Make a plain function a step that runs on the thread that waits in ``run_sync``."""

    @overload
    def thread_step(func: Callable[[In, WorkflowContext], Out], /) -> ThreadPrimitive[In, Out]: ...
    @overload
    def thread_step(func: Callable[[In], Out], /) -> ThreadPrimitive[In, Out]: ...
    @overload
    def thread_step(*, name: str | None = None, idempotent: bool | None = None) -> _ThreadStepDecorator: ...
    def thread_step(func: Any = None, **options: Any) -> Any:
        """Make a plain function a step that runs on a thread of the loop's pool."""
else:
    step = _decorator(LambdaPrimitive, may_be_async=True)
    caller_step = _decorator(CallerPrimitive, may_be_async=False)
    thread_step = _decorator(ThreadPrimitive, may_be_async=False)


def told(step: WorkflowPrimitive[Any, Any]) -> Callable[[Any, WorkflowContext], Coroutine[Any, Any, Any]]:
    """Return what runs *step*, with an event at its start and its end. Composites ask for it where a hook listens."""
    return step._run if type(step).tells_itself else functools.partial(_tell, step)


async def _tell(step: WorkflowPrimitive[Any, Any], data: Any, context: WorkflowContext) -> Any:
    name, clock = call_name(step), context.clock
    emit = events.bus.emit
    if emit is not None:
        emit(events.StepStarted(step=name, correlation_id=context.correlation_id))
    began = clock.monotonic()
    failed: BaseException | None = None
    try:
        return await step._run(data, context)
    except BaseException as error:
        failed = error
        raise
    finally:
        emit = events.bus.emit
        if emit is not None:
            seconds = clock.monotonic() - began
            emit(events.StepEnded(step=name, correlation_id=context.correlation_id, seconds=seconds, error=failed))
        failed = None  # else the error's frames would lead back to it


def note(error: BaseException, text: str) -> None:
    """Add *text* to the error's notes, once: an error object that is raised again and again must not grow.

    One that takes no notes, as a frozen dataclass, comes through without.
    """
    text = text if len(text) <= 300 else text[:299] + "…"
    with contextlib.suppress(Exception):  # whatever the user's own __setattr__ raises
        notes = getattr(error, "__notes__", None)
        if notes is None or (text not in notes and len(notes) < 20):
            error.add_note(text)
