"""The contract, row by row: every primitive in both spellings, called in every spelling."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tta_sync import run_sync
from tta_sync.context import WorkflowContext
from tta_sync.primitives import (
    BulkheadPrimitive,
    CachePrimitive,
    ChaosPrimitive,
    CircuitBreakerConfig,
    CircuitBreakerPrimitive,
    CompensationPrimitive,
    CompositionWarning,
    ConditionalPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    InstrumentedPrimitive,
    LambdaPrimitive,
    MapPrimitive,
    MockPrimitive,
    ParallelPrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    RetryStrategy,
    RouterPrimitive,
    SagaPrimitive,
    SequentialPrimitive,
    StreamingPrimitive,
    SwitchPrimitive,
    TimeoutPrimitive,
    WorkflowPrimitive,
    step,
)


async def work(data: Any, context: WorkflowContext) -> Any:
    assert isinstance(context, WorkflowContext)
    return ["done", data]


safe = step(work, idempotent=True)


class Own(WorkflowPrimitive[Any, Any]):
    """A user's subclass that takes the context first and calls no ``super().__init__``."""

    def __init__(self) -> None:
        pass

    async def execute(self, context: WorkflowContext, data: Any) -> Any:
        return await work(data, context)


class Foreign:
    """An object of another library."""

    async def execute(self, data: Any, context: Any) -> Any:
        return await work(data, context)


class Stream(StreamingPrimitive[Any, Any]):
    async def stream(self, data: Any, context: WorkflowContext) -> AsyncIterator[Any]:
        yield "done"
        yield data


class Instrumented(InstrumentedPrimitive[Any, Any]):
    async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
        return await work(data, context)


def key_of(data: Any, context: WorkflowContext) -> str:
    return str(data)


DONE: Any = ["done", "x"]

# Each row of the contract's table: how it is built, in the seeds' spelling and in TTA.dev's, and what a call gives.
ROWS: dict[str, tuple[Callable[[], Any], Any]] = {
    "subclass": (Own, DONE),
    "LambdaPrimitive(func)": (lambda: LambdaPrimitive(work), DONE),
    "a >> b": (lambda: step(str) >> work, DONE),
    "SequentialPrimitive": (lambda: SequentialPrimitive(primitives=[work]), DONE),
    "a | b": (lambda: safe | work, [DONE, DONE]),
    "ParallelPrimitive": (lambda: ParallelPrimitive([work], max_concurrency=1), [DONE]),
    "MapPrimitive": (lambda: step(list) >> MapPrimitive(work, max_concurrency=2, on_error="raise"), [DONE]),
    "ConditionalPrimitive": (lambda: ConditionalPrimitive(lambda data, context: True, work), DONE),
    "ConditionalPrimitive, named": (
        lambda: ConditionalPrimitive(condition=bool, then_primitive=str, else_primitive=work) >> work,
        DONE,
    ),
    "SwitchPrimitive": (lambda: SwitchPrimitive(selector=str, cases={"x": work}, default=None), DONE),
    "RouterPrimitive": (lambda: RouterPrimitive(routes={"x": work}, router_fn=str, default="x"), DONE),
    "RetryPrimitive, seeds": (
        lambda: RetryPrimitive(primitive=work, max_retries=3, backoff_strategy="exponential"),
        DONE,
    ),
    "RetryPrimitive": (
        lambda: RetryPrimitive(
            work, strategy=RetryStrategy(max_retries=3, backoff_base=2.0, max_backoff=60.0, jitter=True)
        ),
        DONE,
    ),
    "TimeoutPrimitive, seeds": (lambda: TimeoutPrimitive(primitive=work, timeout_seconds=30.0), DONE),
    "TimeoutPrimitive": (lambda: TimeoutPrimitive(work, 30, fallback=None, track_timeouts=True), DONE),
    "FallbackPrimitive, seeds": (lambda: FallbackPrimitive(primary=work, fallbacks=[str, str]), DONE),
    "FallbackPrimitive": (lambda: FallbackPrimitive(work, str), DONE),
    "CircuitBreakerPrimitive": (
        lambda: CircuitBreakerPrimitive(
            work,
            config=CircuitBreakerConfig(
                failure_threshold=5, recovery_timeout=60.0, success_threshold=2, expected_exception=Exception
            ),
        ),
        DONE,
    ),
    "SagaPrimitive": (lambda: SagaPrimitive([(work, str)]), DONE),
    "CompensationPrimitive": (lambda: CompensationPrimitive(work, str), DONE),
    "CachePrimitive in a chain": (lambda: CachePrimitive(ttl=3600) >> safe, DONE),
    "CachePrimitive, seeds": (lambda: CachePrimitive(primitive=work, ttl=3600), DONE),
    "CachePrimitive": (lambda: CachePrimitive(work, key_of, ttl_seconds=3600.0, backend=None), DONE),
    "BulkheadPrimitive": (lambda: BulkheadPrimitive(work, 3, max_queue=0, max_wait=None), DONE),
    "RateLimitPrimitive": (lambda: RateLimitPrimitive(work, rate=1000, burst=1000, key=None, mode="reject"), DONE),
    "HedgePrimitive": (lambda: HedgePrimitive(safe, delay=30.0), DONE),
    "ChaosPrimitive": (lambda: ChaosPrimitive(work, failure_ratio=0.0, latency=0.0, seed=1), DONE),
    "StreamingPrimitive": (lambda: Stream(name="stream"), DONE),
    "MockPrimitive": (lambda: MockPrimitive(name="mock", return_value=DONE, side_effect=None, raise_error=None), DONE),
    "InstrumentedPrimitive": (lambda: Instrumented(name="instrumented"), DONE),
    "foreign object": (lambda: step(str) >> Foreign(), DONE),
}

CALLS: dict[str, Callable[[Any, WorkflowContext], Any]] = {
    "execute(data, context)": lambda p, c: asyncio.run(p.execute("x", c)),
    "execute(context, data)": lambda p, c: asyncio.run(p.execute(c, "x")),
    "execute(data=, context=)": lambda p, c: asyncio.run(p.execute(data="x", context=c)),
    "execute(input_data=, context=)": lambda p, c: asyncio.run(p.execute(input_data="x", context=c)),
    "execute(data)": lambda p, c: asyncio.run(p.execute("x")),
    "run_sync(workflow, data, context)": lambda p, c: run_sync(p, "x", c),
    "run_sync(workflow, context, data)": lambda p, c: run_sync(p, c, "x"),
    "run_sync(workflow, input_data=, context=)": lambda p, c: run_sync(p, input_data="x", context=c),
    "run_sync(workflow, context, input_data=)": lambda p, c: run_sync(p, c, input_data="x"),
    "run_sync(workflow, data)": lambda p, c: run_sync(p, "x", timeout=30.0),
    "workflow.run_sync(data, context)": lambda p, c: p.run_sync("x", c, timeout=30.0),
    "workflow.run_sync(context, data)": lambda p, c: p.run_sync(c, "x"),
    "workflow.run_sync(input_data=)": lambda p, c: p.run_sync(input_data="x"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("build", "result"), ROWS.values(), ids=ROWS)
def test_primitive_gives_its_result_however_it_is_built_and_called(
    build: Callable[[], Any], result: Any, call: Callable[[Any, WorkflowContext], Any]
) -> None:
    """Every row of the contract, in each spelling of a call, from plain code and from a coroutine."""
    assert call(build(), WorkflowContext()) == result


@pytest.mark.parametrize(("build", "result"), ROWS.values(), ids=ROWS)
def test_primitive_is_shared_by_threads_loops_and_forks(build: Callable[[], Any], result: Any) -> None:
    """One workflow, built without a loop, answers in many threads, on their own loops and on the managed one."""
    flow = build()
    answers: list[Any] = []

    def work_here() -> None:
        for _ in range(3):
            answers.append(run_sync(flow, "x"))
            answers.append(asyncio.run(flow.execute("x", WorkflowContext())))

    threads = [threading.Thread(target=work_here) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [result] * 24


def test_primitives_go_on_working_in_a_forked_child() -> None:
    """What was built and used before the fork is used again after it, in both processes."""
    flows = {name: (build(), result) for name, (build, result) in ROWS.items()}
    for flow, result in flows.values():
        assert run_sync(flow, "x") == result
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        wrong = "fork"
        try:
            wrong = ", ".join(name for name, (flow, result) in flows.items() if run_sync(flow, "x") != result)
        except BaseException as error:
            wrong = repr(error)
        finally:
            os.write(write, pickle.dumps(wrong))
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pickle.loads(pipe.read()) == ""
    os.waitpid(child, 0)
    for flow, result in flows.values():
        assert run_sync(flow, "x") == result


@pytest.mark.parametrize(("build", "result"), ROWS.values(), ids=ROWS)
def test_primitive_composes_with_all_others(build: Callable[[], Any], result: Any) -> None:
    """As the left and the right operand of both operators, and as a step of every other composite."""
    flow = build()
    grows = flow.children() if type(flow) is ParallelPrimitive and flow.max_concurrency is None else ()
    assert run_sync(build() >> (lambda data: data), "x") == result
    assert run_sync(step(str) >> build(), "x") == result
    assert run_sync(build() | str, "x") == ([*result, "x"] if grows else [result, "x"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompositionWarning)  # a Retry around a Cache or a Fallback works, too
        assert run_sync(TimeoutPrimitive(RetryPrimitive(build(), max_retries=1), 30.0), "x") == result


def test_error_with_an_opinion_on_every_name_comes_through() -> None:
    """Its ``__getattr__`` raises something else than AttributeError, as one that looks into a dict does."""

    class ApiError(Exception):
        def __getattr__(self, name: str) -> Any:
            return self.args[0][name]

    error = ApiError({"code": 7})
    undone: list[Any] = []

    @step
    def fail(data: Any) -> None:
        raise error

    for workflow in (
        step(str) >> fail,
        RetryPrimitive(fail, max_retries=1, backoff_strategy="constant"),
        SagaPrimitive([(str, undone.append), (fail, undone.append)]),
        FallbackPrimitive(fail, fail),
        fail | fail,
        CircuitBreakerPrimitive(TimeoutPrimitive(fail, 5.0)),
    ):
        with pytest.raises(ApiError) as caught:
            run_sync(workflow, 1)
        assert caught.value is error
    assert undone == ["1", 1]


@dataclass
class Unhashable(WorkflowPrimitive[Any, Any]):
    """A step that compares by its fields, as dataclasses do."""

    answer: Any

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return self.answer


class Likeminded(CircuitBreakerPrimitive[Any, Any]):
    """A stateful primitive that is equal to others, and so has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Likeminded)


UNHASHABLE: dict[str, Callable[[Any], Any]] = {
    "Timeout around a chain": lambda a: TimeoutPrimitive(a >> a, 5),
    "Timeout around a Retry": lambda a: TimeoutPrimitive(RetryPrimitive(a), 5),
    "Saga": lambda a: SagaPrimitive([(a >> a, a)]),
    "Parallel of chains": lambda a: ((a >> a) | (a >> a)) >> (lambda data: data[1]),
    "Breaker": lambda a: Likeminded(Likeminded(a)),
}


@pytest.mark.parametrize("build", UNHASHABLE.values(), ids=UNHASHABLE)
def test_steps_need_no_hash(build: Callable[[Any], Any]) -> None:
    """A dataclass as a step composes like any other."""
    assert run_sync(build(Unhashable("answer")), "x") == "answer"


@pytest.mark.parametrize("build", [build for build, _ in ROWS.values()], ids=ROWS)
def test_primitive_shows_itself(build: Callable[[], Any]) -> None:
    """Every workflow has a readable repr and a diagram."""
    flow = build()
    assert "object at 0x" not in repr(flow)
    assert "<locals>" not in repr(flow)
    assert flow.to_mermaid().startswith("flowchart LR\n")
    assert "object at 0x" not in flow.to_mermaid()
