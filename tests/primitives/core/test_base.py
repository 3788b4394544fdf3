"""The contract of a primitive: spellings of a call, kinds of functions, subclasses, foreign objects."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import pickle
import threading
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import tenacity

from tta_sync.context import WorkflowContext, current_context, current_pool, running_context
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.primitives.core.base import (
    MISS,
    CallerPrimitive,
    ForeignPrimitive,
    LambdaPrimitive,
    ThreadPrimitive,
    WorkflowPrimitive,
    as_primitive,
    caller_step,
    note,
    step,
    step_name,
    takes_context,
    thread_step,
)
from tta_sync.primitives.core.sequential import SequentialPrimitive
from tta_sync.primitives.performance import CachePrimitive
from tta_sync.primitives.recovery import FallbackPrimitive, RetryPrimitive, SagaPrimitive


class Echo(WorkflowPrimitive[Any, Any]):
    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return data, context


class ContextFirst(WorkflowPrimitive[Any, Any]):
    async def execute(self, context: WorkflowContext, data: Any) -> Any:
        return data, context


class ShortContextFirst(WorkflowPrimitive[Any, Any]):
    async def execute(self, ctx, data):  # type: ignore[no-untyped-def,override]
        return data, ctx


async def coroutine_function(data: int, context: WorkflowContext) -> int:
    return data + 1


class AsyncCall:
    async def __call__(self, data: int) -> int:
        return data + 1


class Plus:
    def add(self, data: int) -> int:
        return data + 1


# ---- the spellings of a call ----------------------------------------------------------


@pytest.mark.parametrize("kind", [Echo, ContextFirst, ShortContextFirst])
@pytest.mark.parametrize(
    "call",
    [
        lambda p, c: p.execute("x", c),
        lambda p, c: p.execute(c, "x"),
        lambda p, c: p.execute("x", context=c),
        lambda p, c: p.execute(data="x", context=c),
        lambda p, c: p.execute(input_data="x", context=c),
        lambda p, c: p.execute(context=c, input_data="x"),
        lambda p, c: p.execute(c, data="x"),
        lambda p, c: p.execute(c, input_data="x"),
    ],
)
def test_execute_takes_every_spelling_when_a_subclass_writes_either_order(kind: Any, call: Any) -> None:
    """Both orders and all keywords reach every primitive as what they are."""
    context = WorkflowContext()
    assert asyncio.run(call(kind(), context)) == ("x", context)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, c: p.execute("x", c, data="y"),
        lambda p, c: p.execute("x", input_data="y"),
        lambda p, c: p.execute(data="x", input_data="y", context=c),
        lambda p, c: p.execute("x", c, context=c),
        lambda p, c: p.execute(c, context=c, data="x"),
    ],
)
def test_execute_refuses_an_argument_that_is_given_twice(call: Any) -> None:
    """Neither of the two is dropped in silence."""
    with pytest.raises(TypeError, match=r"execute\(\) got its (data|context) twice"):
        call(Echo(), WorkflowContext())


def test_execute_makes_a_context_when_none_is_given() -> None:
    """Without a context a call gets a fresh one."""
    data, context = asyncio.run(Echo().execute("x"))
    assert data == "x"
    assert isinstance(context, WorkflowContext)


def test_execute_takes_the_running_context_when_none_is_given() -> None:
    """Inside a workflow, a call without a context continues it."""
    context = WorkflowContext()

    async def run() -> Any:
        running_context.set(context)
        assert current_context() is context
        return await Echo().execute("x")

    assert asyncio.run(run())[1] is context


def test_execute_keeps_the_order_when_the_data_is_a_context_too() -> None:
    """A context as data is data where another context stands second."""
    data, context = WorkflowContext(), WorkflowContext()
    assert asyncio.run(Echo().execute(data, context)) == (data, context)


def test_execute_takes_the_context_alone() -> None:
    """``execute(context)`` is a call without data."""
    context = WorkflowContext()
    assert asyncio.run(Echo().execute(context)) == (None, context)


def test_execute_refuses_unknown_keywords() -> None:
    """A misspelt keyword is a TypeError that names the right ones."""
    with pytest.raises(TypeError, match=r"takes data \(or input_data\) and context, not dta"):
        Echo().execute(dta="x")  # type: ignore[call-arg]


def test_execute_refuses_a_context_that_is_none() -> None:
    """A dict in the place of the context is a TypeError that says what belongs there."""
    with pytest.raises(TypeError, match="WorkflowContext, not dict"):
        Echo().execute("x", {"a": 1})  # type: ignore[arg-type]


def test_execute_takes_a_foreign_context() -> None:
    """A context class of the library that the seeds describe is handed on as it is."""

    class Theirs:
        state: dict[str, Any] = {}

    theirs = Theirs()
    assert asyncio.run(Echo().execute("x", theirs)) == ("x", theirs)  # type: ignore[arg-type]


def test_execute_counts_as_a_coroutine_function() -> None:
    """Code that asks whether ``execute`` is async gets yes."""
    assert asyncio.iscoroutinefunction(Echo.execute) or inspect.iscoroutinefunction(Echo.execute)
    assert asyncio.iscoroutinefunction(LambdaPrimitive.execute) or inspect.iscoroutinefunction(LambdaPrimitive.execute)


# ---- subclasses ----------------------------------------------------------


def test_subclass_works_without_calling_the_parents_init() -> None:
    """``super().__init__()`` is not needed, alone and in a chain."""

    class Own(WorkflowPrimitive[Any, Any]):
        def __init__(self, bonus: int) -> None:
            self.bonus = bonus

        async def execute(self, data: int, context: WorkflowContext) -> int:
            return data + self.bonus

    assert asyncio.run((Own(1) >> Own(2)).execute(0)) == 3
    assert repr(Own(1)).endswith("Own")


def test_subclass_without_execute_fails_when_called() -> None:
    """A class without ``execute`` can be made; the call says what is missing."""

    class Nothing(WorkflowPrimitive[Any, Any]):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing has no execute\(data, context\)"):
        asyncio.run(Nothing().execute(1))


def test_subclass_of_a_built_in_primitive_wraps_it_by_super() -> None:
    """An override of ``execute`` is what composites call, and ``super().execute`` is the original."""

    class Logged(SequentialPrimitive[Any, Any]):
        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return f"<{await super().execute(data, context)}>"

    inner = Logged([step(lambda data: data + "a")])
    assert asyncio.run(inner.execute("x")) == "<xa>"
    assert asyncio.run((step(str) >> inner >> step(str)).execute("x")) == "<xa>"


class Descriptors:
    class Dispatching(WorkflowPrimitive[Any, Any]):
        @functools.singledispatchmethod
        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return "any"

        @execute.register
        async def _(self, data: int, context: WorkflowContext) -> Any:
            return "int"

    class OfTheClass(WorkflowPrimitive[Any, Any]):
        @classmethod
        async def execute(cls, data: Any, context: WorkflowContext) -> Any:  # type: ignore[override]
            return cls.__name__

    class Static(WorkflowPrimitive[Any, Any]):
        @staticmethod
        async def execute(data: Any, context: WorkflowContext) -> Any:  # type: ignore[override]
            return f"static {data}"

    class Partial(WorkflowPrimitive[Any, Any]):
        async def add(self, text: str, data: Any, context: WorkflowContext) -> Any:
            return f"{text} {data}"

        execute = functools.partialmethod(add, "partial")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Descriptors.Dispatching, "int"),
        (Descriptors.OfTheClass, "OfTheClass"),
        (Descriptors.Static, "static 3"),
        (Descriptors.Partial, "partial 3"),
    ],
)
def test_execute_may_be_any_kind_of_method(kind: Any, answer: str) -> None:
    assert asyncio.run(kind().execute(3)) == answer
    assert asyncio.run((step(int) >> kind()).execute("3")) == answer


def test_step_is_called_as_its_wrapper_is_written() -> None:
    """A decorator that gives the function something of its own changes how it is called; one that passes on: no."""

    def injecting(function: Any) -> Any:
        @functools.wraps(function)
        def inner(data: Any) -> Any:
            return function("database", data)

        return inner

    def passing_on(function: Any) -> Any:
        @functools.wraps(function)
        def inner(*args: Any, **keywords: Any) -> Any:
            return function(*args, **keywords)

        return inner

    assert asyncio.run(step(injecting(lambda database, data: (database, data))).execute(1)) == ("database", 1)
    assert asyncio.run(step(passing_on(lambda data: data)).execute(1)) == 1
    context = WorkflowContext()
    assert asyncio.run(step(passing_on(lambda data, context: context)).execute(1, context)) is context


def test_subclass_of_a_subclass_that_takes_the_context_first_calls_super() -> None:
    """A chain of overrides may mix the orders."""

    class Child(ContextFirst):
        async def execute(self, data: Any, context: WorkflowContext) -> Any:  # type: ignore[override]
            return await super().execute(context, data)

    context = WorkflowContext()
    assert asyncio.run(Child().execute("x", context)) == ("x", context)


def test_subclass_is_refused_when_it_takes_the_name_of_our_hook() -> None:
    """A user's own ``_run`` would silently replace the step: the class statement says so."""
    with pytest.raises(ConfigurationError, match="give a method of your own another name"):

        class Own(Echo):
            async def _run(self, item: Any) -> Any:  # type: ignore[override]
                return item


def test_subclass_loses_peek_when_it_overrides_execute() -> None:
    """What the parent would answer without the loop is not what the override does."""

    class Peeker(Echo):
        peeks = True

    class Override(Peeker):
        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return "mine"

    class OwnPeek(Peeker):
        def peek(self, data: Any) -> str:  # type: ignore[override]
            return "the user's own method"

    class Unchanged(Peeker):
        pass

    assert Peeker.peeks
    assert not Override.peeks
    assert not OwnPeek.peeks
    assert Unchanged.peeks
    assert Peeker().peek(1, WorkflowContext()) is MISS


def test_subclass_may_bind_execute_to_a_mock() -> None:
    """An ``execute`` without a readable signature is called with data and context."""

    class Mocked(WorkflowPrimitive[Any, Any]):
        execute = AsyncMock(return_value="mocked")  # type: ignore[assignment]

    assert asyncio.run(Mocked().execute("x", WorkflowContext())) == "mocked"


def test_subclass_may_bind_execute_to_what_has_no_signature() -> None:
    """A class body is never refused because Python cannot read a signature."""

    class Compiled(WorkflowPrimitive[Any, Any]):
        execute = max  # type: ignore[assignment]

    with pytest.raises(TypeError):
        asyncio.run(Compiled().execute("x", WorkflowContext()))


# ---- functions ----------------------------------------------------------


class Dispatched:
    @functools.singledispatchmethod
    def method(self, data: Any) -> Any:
        raise AssertionError

    @method.register
    def _(self, data: int) -> int:
        return data + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda data: data + 1,
        lambda data, context: data + context.state["one"],
        lambda context, data: data + context.state["one"],
        lambda data, context=None: data + context.state["one"],
        lambda ctx, data=None: data + ctx.state["one"],
        functools.cache(lambda data, context: data + context.state["one"]),
        Dispatched().method,
        lambda data, by=1: data + by,
        lambda *arguments: arguments[0] + arguments[1].state["one"],
        lambda data: coroutine_function(data, WorkflowContext()),
        coroutine_function,
        AsyncCall(),
        functools.partial(coroutine_function, context=WorkflowContext()),
        Plus().add,
        (1).__add__,
    ],
)
def test_step_takes_every_kind_of_function(function: Any) -> None:
    """Plain, async, callable objects, lambdas around coroutines, with or without the context, in either order."""
    assert asyncio.run(step(function).execute(1, WorkflowContext(state={"one": 1}))) == 2


def test_step_takes_a_class_as_a_converter() -> None:
    """``int`` and the like convert; they are called with the data alone."""

    class Pair:
        def __init__(self, left: str, right: str = "default") -> None:
            self.both = left, right

    assert asyncio.run((step(str) >> int).execute(" 4 ")) == 4
    assert asyncio.run((step(str) >> Pair).execute("a")).both == ("a", "default")


@pytest.mark.parametrize("function", [lambda: 1, lambda a, b, c: 1, lambda a, *, needed: 1])
def test_step_refuses_a_function_that_it_could_not_call(function: Any) -> None:
    """What can be called with neither (data) nor (data, context) is refused when the step is made."""
    with pytest.raises(ConfigurationError, match=r"write it as f\(data\) or f\(data, context\)"):
        step(function)


def test_step_keeps_the_functions_face() -> None:
    """The decorated name still documents itself and still can be called."""

    @step
    def double(data: int) -> int:
        """Twice as much."""
        return data * 2

    assert double(4) == 8
    assert double.__doc__ == "Twice as much."
    assert double.__wrapped__(4) == 8  # type: ignore[attr-defined]
    assert step_name(double).endswith("double")
    assert repr(double) == "double"


def test_step_takes_a_name_and_whether_it_is_idempotent() -> None:
    """The decorator's options stand on the step."""

    @step(name="pay", idempotent=False)
    def take_money(data: int) -> int:
        return data

    assert (repr(take_money), take_money.name, take_money.idempotent) == ("pay", "pay", False)


def test_step_refuses_what_is_no_function() -> None:
    """A value is no step, and the message says what would be."""
    with pytest.raises(ConfigurationError, match="a step needs a function"):
        step(4)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="cannot be a step"):
        as_primitive(4)
    with pytest.raises(ConfigurationError, match=r"Echo is a class: write Echo\(\.\.\.\)"):
        as_primitive(Echo)


def test_step_name_of_a_partial_is_that_of_its_function() -> None:
    """A partial has no name of its own, its function has."""
    assert step_name(functools.partial(functools.partial(coroutine_function))) == "coroutine_function"
    assert step_name(AsyncCall()) == "AsyncCall"
    assert takes_context(coroutine_function)
    assert not takes_context(str)


def test_user_error_comes_through_when_a_function_raises() -> None:
    """The very object that the function raised comes out."""
    error = KeyError("mine")

    def fail(data: Any) -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        asyncio.run(step(fail).execute(1))
    assert caught.value is error


# ---- steps on other threads ----------------------------------------------------------


def test_caller_step_needs_a_caller() -> None:
    """With nobody waiting, the error says how to call the workflow."""
    with pytest.raises(NoCallerError, match="call the workflow through run_sync"):
        asyncio.run(caller_step(str).execute(1))


def test_caller_step_runs_where_the_caller_port_says(caller_here: None) -> None:
    """The port gets the function, its data and the context."""

    @caller_step
    def where(data: str, context: WorkflowContext) -> tuple[str, int]:
        return data + context.state["more"], threading.get_ident()

    answer = asyncio.run(where.execute("a", WorkflowContext(state={"more": "b"})))
    assert answer == ("ab", threading.get_ident())


def test_thread_step_runs_on_another_thread_with_the_callers_variables() -> None:
    """Context variables come along; the loop's thread stays free."""
    context = WorkflowContext()

    @thread_step
    def where(data: str) -> tuple[int, Any]:
        return threading.get_ident(), current_context()

    async def run() -> Any:
        running_context.set(context)
        return await where.execute("a", context)

    ident, seen = asyncio.run(run())
    assert ident != threading.get_ident()
    assert seen is context


def test_thread_step_runs_in_the_pool_that_the_port_names() -> None:
    """Under the facade, the loop's own sized pool does the work."""

    class Pool:
        async def run(self, fn: Any, *arguments: Any) -> Any:
            return "pool", fn(*arguments)

    async def run() -> Any:
        current_pool.set(Pool())
        return await thread_step(str).execute(1, WorkflowContext())

    assert asyncio.run(run()) == ("pool", "1")


@pytest.mark.parametrize(("decorator", "kind"), [(caller_step, CallerPrimitive), (thread_step, ThreadPrimitive)])
def test_sync_step_refuses_async_functions(decorator: Any, kind: type, caller_here: None) -> None:
    """An async function belongs on the loop: refused when decorated, and when a lambda hid it."""
    with pytest.raises(ConfigurationError, match="use @step"):
        decorator(coroutine_function)
    hidden = decorator(lambda data: coroutine_function(data, WorkflowContext()))
    assert isinstance(hidden, kind)
    with pytest.raises(ConfigurationError, match="takes a plain function; use @step"):
        asyncio.run(hidden.execute(1))


# ---- foreign objects ----------------------------------------------------------


def test_foreign_object_gets_data_first_in_any_chain() -> None:
    """An object of another library always gets (data, context), from both sides of an operator."""

    class Theirs:
        name = "theirs"

        async def execute(self, data: Any, context: Any) -> Any:
            assert isinstance(context, WorkflowContext)
            return data + "!"

    assert asyncio.run((step(str) >> Theirs()).execute("a")) == "a!"
    assert asyncio.run((Theirs() >> step(str)).execute("a")) == "a!"
    assert asyncio.run((Theirs() | step(str)).execute("a")) == ["a!", "a"]
    assert repr(as_primitive(Theirs())) == "theirs"


def test_foreign_object_is_refused_when_it_does_not_await() -> None:
    """A sync ``execute`` gets an error that names the remedies."""

    class Sync:
        def execute(self, data: Any, context: Any) -> int:
            return 4

    with pytest.raises(TypeError, match=r"execute returned int.*thread_step"):
        asyncio.run(ForeignPrimitive(Sync()).execute(1))


def test_run_sync_goes_through_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method hands workflow, data, context and timeout to whoever filled the port."""
    from tta_sync.primitives.core import base

    entry = Mock(return_value="answer")
    monkeypatch.setattr(base.ports, "sync_entry", entry, raising=False)
    echo, context = Echo(), WorkflowContext()
    assert echo.run_sync("x", context, timeout=2.0) == "answer"
    entry.assert_called_once_with(echo, "x", context, 2.0)


def test_run_sync_finds_the_facade_when_only_primitives_were_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty port is filled at the first call."""
    from tta_sync.primitives.core import base

    filled = Mock(return_value="answer")
    monkeypatch.setattr(base, "ports", type("Ports", (), {})())
    monkeypatch.setattr(base.importlib, "import_module", lambda name: setattr(base.ports, "sync_entry", filled))
    assert Echo().run_sync("x") == "answer"


# ---- small things ----------------------------------------------------------


def test_miss_is_one_object_everywhere() -> None:
    """MISS prints as its name and stays itself through pickle."""
    assert repr(MISS) == "MISS"
    assert pickle.loads(pickle.dumps(MISS)) is MISS


def test_note_is_added_once_and_bounded() -> None:
    """An error that is raised again and again does not grow."""
    error = ValueError("x")
    for _ in range(3):
        note(error, "in step 1")
    assert error.__notes__ == ["in step 1"]
    for number in range(100):
        note(error, f"note {number} " + "x" * 1000)
    assert len(error.__notes__) == 20
    assert max(map(len, error.__notes__)) <= 300


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def refuse(state: Any) -> bool:
    raise Frozen(503)


@pytest.mark.parametrize(
    "around",
    [
        lambda failing: step(str) >> failing,
        lambda failing: failing | step(str),
        lambda failing: RetryPrimitive(failing, wait=tenacity.wait_none()),
        lambda failing: RetryPrimitive(failing, retry=refuse),
        lambda failing: FallbackPrimitive(failing, failing),
        lambda failing: SagaPrimitive([(failing, None)]),
        lambda failing: CachePrimitive(failing),
    ],
)
def test_error_comes_through_as_itself_when_it_cannot_be_changed(around: Any) -> None:
    """A frozen dataclass takes no notes, no context and no cause: nobody may fail over that."""

    async def fail(data: Any) -> None:
        await asyncio.sleep(0)
        raise Frozen(503)

    flow = around(step(fail))

    async def main() -> list[Any]:
        return await asyncio.gather(*(flow.execute(1, WorkflowContext()) for _ in range(2)), return_exceptions=True)

    assert asyncio.run(main()) == [Frozen(503)] * 2
