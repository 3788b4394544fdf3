"""Sequences: order, one context, names of failing steps, and how unbound caches find what they cache."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync import run_sync
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, step
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.primitives.core.sequential import SequentialPrimitive


def named(name: str) -> WorkflowPrimitive[Any, Any]:
    """A step that writes its own name round its input."""
    return step(lambda data: f"{name}({data})", name=name)


a, b, v, call, fmt = map(named, ("a", "b", "v", "call", "fmt"))


class Frame(WorkflowPrimitive[Any, Any]):
    """The smallest primitive that follows the protocol of unbound steps: writes its name before what is inside."""

    peeks = True

    def __init__(self, name: str, inner: Any = None) -> None:
        self.label = name
        self.inner = inner
        self.bound: Frame | None = None
        self.bound_to: tuple[Any, ...] = ()

    @property
    def unbound(self) -> bool:
        return self.inner is None

    def bind(self, inner: WorkflowPrimitive[Any, Any]) -> Frame:
        parts = tuple(inner.children()) or (inner,)
        if self.bound is None:
            self.bound, self.bound_to = Frame(self.label, inner), parts
        elif self.bound_to != parts:
            raise ConfigurationError("bound to other steps")
        return self.bound

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return f"{self.label}[{await self.inner.execute(data, context)}]"

    def peek(self, data: Any, context: WorkflowContext) -> Any:
        return f"peeked {self.label}"

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return () if self.inner is None else (self.inner,)

    def __repr__(self) -> str:
        return self.label


def M() -> Frame:
    return Frame("M")


def R() -> Frame:
    return Frame("R")


def run(workflow: Any, data: Any = "x") -> Any:
    return asyncio.run(workflow.execute(data, WorkflowContext()))


# ---- order and context ----------------------------------------------------------


def test_steps_run_in_order_with_the_result_of_the_one_before() -> None:
    """Each step gets what the one before it returned."""
    assert run(a >> b >> call) == "call(b(a(x)))"
    assert run(SequentialPrimitive([a, b, call])) == "call(b(a(x)))"


def test_steps_share_one_context() -> None:
    """What one step writes to the state, the next one reads."""

    def write(data: Any, context: WorkflowContext) -> Any:
        context.state["seen"] = data
        return data

    assert run(step(write) >> (lambda data, context: context.state["seen"])) == "x"


def test_nested_sequences_flatten() -> None:
    """A sequence in a sequence adds its steps, in both spellings."""
    assert (a >> (b >> call)).children() == (a, b, call)
    assert SequentialPrimitive([a >> b, call]).primitives == [a, b, call]


def test_subclass_of_sequential_stays_one_step() -> None:
    """A user's own kind of sequence keeps what it does."""

    class Own(SequentialPrimitive[Any, Any]):
        pass

    own = Own([a, b])
    assert (call >> own).children() == (call, own)
    assert type(own >> call) is SequentialPrimitive


def test_empty_sequence_is_refused() -> None:
    """No steps is a ValueError."""
    with pytest.raises(ValueError, match="at least one step"):
        SequentialPrimitive([])


def test_one_sequence_runs_in_many_tasks_and_threads_at_once() -> None:
    """A workflow holds no state of a call."""

    async def many() -> list[Any]:
        return await asyncio.gather(*(flow.execute(number) for number in range(50)))

    flow = step(lambda data: data + 1) >> step(lambda data: data * 2)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(many()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[(number + 1) * 2 for number in range(50)]] * 4


# ---- errors ----------------------------------------------------------


def failing(error: BaseException) -> WorkflowPrimitive[Any, Any]:
    def fail(data: Any) -> None:
        raise error

    return step(fail, name="fail")


def test_error_names_the_step_when_one_fails() -> None:
    """The error comes through as itself, with a note that says where."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        run(a >> failing(error) >> b)
    assert caught.value is error
    assert error.__notes__ == ["in step 2 of 3: fail"]


def test_error_does_not_grow_when_the_same_object_is_raised_again() -> None:
    """A thousand raises of one error leave one note."""
    error = ValueError("mine")
    flow = a >> failing(error)
    for _ in range(1000):
        with pytest.raises(ValueError, match="mine"):
            run_without_loop(flow)
    assert error.__notes__ == ["in step 2 of 2: fail"]


def run_without_loop(workflow: Any) -> Any:
    coroutine = workflow.execute("x", WorkflowContext())
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


def test_cancellation_gets_no_note() -> None:
    """A cancelled call is nobody's error."""
    error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        run(a >> failing(error))
    assert not hasattr(error, "__notes__")


def test_failed_call_leaves_nothing_behind_when_its_error_is_dropped() -> None:
    """No reference cycle keeps the call's data alive: it goes without the garbage collector."""

    class Data:
        pass

    def fail(data: Any) -> None:
        raise ValueError("mine")

    flow = step(lambda data: data) >> fail

    def attempt() -> weakref.ref[Data]:
        data = Data()
        try:
            coroutine = flow.execute(data, WorkflowContext())
            coroutine.send(None)
        except ValueError:
            pass
        return weakref.ref(data)

    gc.collect()
    gc.disable()
    try:
        assert attempt()() is None
    finally:
        gc.enable()


# ---- unbound steps ----------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "result"),
    [
        (lambda: M() >> a >> b, "M[b(a(x))]"),
        (lambda: M() >> call >> R(), "M[R[call(x)]]"),
        (lambda: M() >> R() >> call, "M[R[call(x)]]"),
        (lambda: call >> M() >> R(), "M[R[call(x)]]"),
        (lambda: v >> M(), "M[v(x)]"),
        (lambda: a >> b >> M(), "M[b(a(x))]"),
        (lambda: v >> (M() >> call), "M[call(v(x))]"),
        (lambda: v >> (M() >> call) >> fmt, "fmt(M[call(v(x))])"),
        (lambda: v >> (call >> M()) >> fmt, "fmt(M[call(v(x))])"),
        (lambda: (M() >> a) >> (R() >> b), "M[R[b(a(x))]]"),
        (lambda: SequentialPrimitive([M(), a, b]), "M[b(a(x))]"),
        (lambda: SequentialPrimitive([M() >> a, b]), "b(M[a(x)])"),
        (lambda: (M() >> a) | (R() >> b), ["M[a(x)]", "R[b(x)]"]),
    ],
)
def test_unbound_steps_wrap_the_rest_of_their_chain(build: Callable[[], Any], result: Any) -> None:
    """At the head: what follows; at the tail: what comes before; left is outer; brackets seal the right operand."""
    assert run(build()) == result


@pytest.mark.parametrize(
    "build",
    [
        lambda: v >> M() >> call,
        lambda: (call >> M()) >> fmt,
        lambda: SequentialPrimitive([v, M(), call]),
        lambda: M() >> a >> R() >> b,
    ],
)
def test_unbound_step_is_refused_when_it_has_steps_on_both_sides(build: Callable[[], Any]) -> None:
    """It could cache either side: the error comes at that ``>>`` and names both ways to say it."""
    with pytest.raises(ConfigurationError, match=r"write \w+ >> \(\w >> \w+\) .*, or Frame\(primitive=\w+\) >> \w+"):
        build()


def test_unbound_step_is_refused_when_there_is_nothing_to_wrap() -> None:
    """Alone it may still grow; run alone, or sealed, it is an error that says what is missing."""
    pair = M() >> R()
    with pytest.raises(ConfigurationError, match="nothing to cache"):
        run(pair)
    with pytest.raises(ConfigurationError, match="nothing to cache"):
        v >> pair
    assert run(pair >> call) == "M[R[call(x)]]"


def test_binding_is_fixed_at_the_first_execution() -> None:
    """A chain may grow until it runs; then its unbound step belongs to it."""
    memory = M()
    short = memory >> a
    long = short >> b
    assert run(long) == run(long) == "M[b(a(x))]"
    assert long.children() == (memory.bound,)
    with pytest.raises(ConfigurationError, match="bound to other steps"):
        run(short)


def test_sealed_chain_is_shared_where_it_is_used_twice() -> None:
    """One chain in two workflows is one bound step."""
    cached = M() >> call
    assert run(v >> cached) == "M[call(v(x))]"
    assert run(cached) == "M[call(x)]"


def test_threads_that_run_a_chain_first_at_once_share_one_binding() -> None:
    """Whoever comes first binds; all use the same."""
    memory = M()
    flow = memory >> a >> b
    barrier = threading.Barrier(8)
    results: list[Any] = []

    def work() -> None:
        barrier.wait()
        results.append(run(flow))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["M[b(a(x))]"] * 8
    assert flow.children() == (memory.bound,)


def test_error_inside_a_bound_chain_names_its_step_once() -> None:
    """With one step the chain names it; with more, the sequence inside does."""
    one, two = ValueError("one"), ValueError("two")
    for flow, error, notes in (
        (M() >> failing(one), one, ["in step 1 of 1: fail"]),
        (M() >> a >> failing(two), two, ["in step 2 of 2: fail"]),
    ):
        with pytest.raises(ValueError, match=str(error)):
            run(flow)
        assert error.__notes__ == notes


# ---- peek ----------------------------------------------------------


def test_peek_passes_through_a_sequence_of_one() -> None:
    """One step that can answer without the loop answers for its sequence."""
    context = WorkflowContext()
    assert SequentialPrimitive([Frame("M", a)]).peek("x", context) == "peeked M"
    assert SequentialPrimitive([a]).peek("x", context) is MISS


def test_peek_passes_through_a_chain_that_a_cache_heads() -> None:
    """Once bound, the cache of all the rest answers; before that, and for longer chains, nobody does."""
    context = WorkflowContext()
    flow = M() >> a >> b
    assert flow.peek("x", context) is MISS
    run(flow)
    assert flow.peek("x", context) == "peeked M"
    assert (v >> (M() >> a)).peek("x", context) is MISS
    assert SequentialPrimitive.peeks


def test_peek_never_raises_through_a_sequence() -> None:
    """A refusal is the step's to make, on the loop, where it gets its note."""

    class Refusing(Frame):
        def peek(self, data: Any, context: WorkflowContext) -> Any:
            raise KeyError("refused")

        peeks = True

    asked: list[Any] = []

    class Declared(Refusing):
        peek_raises = True

        def peek(self, data: Any, context: WorkflowContext) -> Any:
            asked.append(data)

        peeks = True

    for kind in Refusing, Declared:
        assert SequentialPrimitive([kind("M", a)]).peek("x", WorkflowContext()) is MISS
    assert asked == []


def test_peek_is_not_asked_of_a_class_that_does_not_declare_it() -> None:
    """A user's own method of that name is never called."""

    class Own(WorkflowPrimitive[Any, Any]):
        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return data

        def peek(self) -> None:  # type: ignore[override]
            raise AssertionError("asked")

    assert SequentialPrimitive([Own()]).peek("x", WorkflowContext()) is MISS


# ---- repr ----------------------------------------------------------


def test_repr_reads_as_it_was_written() -> None:
    """Operators and brackets come back."""
    assert repr(a >> b) == "a >> b"
    assert repr(v >> (M() >> call) >> fmt) == "v >> (M >> call) >> fmt"
    assert repr(a >> (b | call)) == "a >> (b | call)"
    assert repr((a >> b) | call) == "(a >> b) | call"
    assert repr(SequentialPrimitive([a])) == "a"
    assert repr(ParallelPrimitive([a])) == "Parallel(a)"


def test_error_before_a_later_step_does_not_say_that_nothing_was_called():
    """``before_call`` of the second step's error is about that step: a breaker around both must count it."""

    class Late(Exception):
        before_call = False

    def late(data):
        error = Late()
        error.before_call = True
        raise error

    with pytest.raises(Late) as first:
        run_sync(step(late) >> step(lambda data: data), 1)
    assert first.value.before_call
    with pytest.raises(Late) as second:
        run_sync(step(lambda data: data) >> step(late), 1)
    assert not second.value.before_call
