"""What is built or joined wrongly is refused where it is written, with the name of the mistake."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest

from tta_sync import run_sync
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives import (
    BulkheadPrimitive,
    ChaosPrimitive,
    CircuitBreakerConfig,
    CircuitBreakerPrimitive,
    CompensationPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    LambdaPrimitive,
    MapPrimitive,
    MockPrimitive,
    ParallelPrimitive,
    RateLimitPrimitive,
    RetryBudget,
    RetryPrimitive,
    RetryStrategy,
    RouterPrimitive,
    SagaPrimitive,
    SequentialPrimitive,
    SwitchPrimitive,
    TimeoutPrimitive,
    WorkflowContext,
    WorkflowPrimitive,
    caller_step,
    step,
    thread_step,
)

work = step(lambda data: data, name="work", idempotent=True)

NO_SECONDS: list[Any] = ["5", True, float("nan"), float("inf"), -1.0, 10**400, Decimal(5), [], object()]
NO_COUNT: list[Any] = ["5", True, 1.5, float("nan"), -1, None, [], object()]

# An option, how it is given, and what cannot stand there.
OPTIONS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "timeout_seconds": (lambda bad: TimeoutPrimitive(work, bad), [*NO_SECONDS, 0, None]),
    "max_concurrent": (lambda bad: BulkheadPrimitive(work, bad), [*NO_COUNT, 0]),
    "max_queue": (lambda bad: BulkheadPrimitive(work, 1, bad), NO_COUNT),
    "max_wait": (lambda bad: BulkheadPrimitive(work, 1, 1, bad), [*NO_SECONDS, 0]),
    "rate": (lambda bad: RateLimitPrimitive(work, bad), [*NO_SECONDS, 0, None]),
    "burst": (lambda bad: RateLimitPrimitive(work, 1, bad), [*NO_COUNT, 0, 10**400]),
    "delay": (lambda bad: HedgePrimitive(work, bad), NO_SECONDS),
    "max_hedges": (lambda bad: HedgePrimitive(work, 1.0, max_hedges=bad), [*NO_COUNT, 0]),
    "budget": (lambda bad: HedgePrimitive(work, 1.0, budget=bad), [10, "10", {}]),
    "compensation_timeout": (lambda bad: SagaPrimitive([(work, None)], compensation_timeout=bad), [*NO_SECONDS, 0]),
    "failure_ratio": (lambda bad: ChaosPrimitive(work, bad), [*NO_SECONDS, 1.1]),
    "latency": (lambda bad: ChaosPrimitive(work, 0, bad), [*NO_SECONDS, (2, 1), (1,), ("a", "b"), (0, 10**400)]),
    "error": (lambda bad: ChaosPrimitive(work, error=bad), ["boom", 5]),
    "max_retries": (lambda bad: RetryPrimitive(work, max_retries=bad), [bad for bad in NO_COUNT if bad is not None]),
    "strategy": (lambda bad: RetryPrimitive(work, bad), [3, "linear", {}, object()]),
    "back-off": (lambda bad: RetryPrimitive(work, backoff_strategy=bad), ["fibonacci", ""]),
    "wait": (lambda bad: RetryPrimitive(work, backoff_strategy=bad), [5, [1, 2]]),
    "retry_on": (lambda bad: RetryPrimitive(work, retry_on=bad), ["OSError", [OSError], OSError()]),
    "budget of a retry": (lambda bad: RetryPrimitive(work, budget=bad), [10, "10", {}]),
    "backoff_base": (lambda bad: RetryStrategy(backoff_base=bad), [*NO_SECONDS, 0, None]),
    "max_backoff": (lambda bad: RetryStrategy(max_backoff=bad), [*NO_SECONDS, None]),
    "max": (lambda bad: RetryBudget(bad), [*NO_SECONDS, 0, None]),
    "per_success": (lambda bad: RetryBudget(10, bad), [*NO_SECONDS, None]),
    "config": (lambda bad: CircuitBreakerPrimitive(work, bad), [5, {"failure_threshold": 3}, "fast"]),
    "failure_threshold": (lambda bad: CircuitBreakerPrimitive(work, failure_threshold=bad), [*NO_COUNT, 0]),
    "recovery_timeout": (lambda bad: CircuitBreakerConfig(recovery_timeout=bad), [*NO_SECONDS, 0]),
    "slow_ratio": (lambda bad: CircuitBreakerConfig(slow_ratio=bad), [*NO_SECONDS, 0, 1.5, None]),
    "window": (lambda bad: CircuitBreakerConfig(window=bad), [*NO_SECONDS, 0, "minute", 10**9]),
    "expected_exception": (lambda bad: CircuitBreakerConfig(expected_exception=bad), ["OSError", [OSError], (), None]),
    "fallback_on": (lambda bad: FallbackPrimitive(work, work, fallback_on=bad), ["OSError", [OSError], None, 5]),
    "fallbacks": (lambda bad: FallbackPrimitive(work, fallbacks=bad), [work, "work", 5]),
    "max_concurrency": (lambda bad: MapPrimitive(work, max_concurrency=bad), [*NO_COUNT, 0]),
    "max_concurrency of a parallel": (
        lambda bad: ParallelPrimitive([work], max_concurrency=bad),
        [*(bad for bad in NO_COUNT if bad is not None), 0],
    ),
    "on_error": (lambda bad: MapPrimitive(work, on_error=bad), ["skip", None, []]),
    "steps": (SequentialPrimitive, [work, "work", None, 5, []]),
    "branches": (ParallelPrimitive, [work, "work", None, 5, []]),
    "cases": (lambda bad: SwitchPrimitive(str, bad), [[work], work, None]),
    "routes": (lambda bad: RouterPrimitive(bad, str), [[work], work, None, {}]),
    "saga": (SagaPrimitive, [work, [work], [(work,)], [(work, work, work)], [], 5, "ab"]),
    "compensation": (CompensationPrimitive, [work, 5]),
    "step": (lambda bad: RetryPrimitive(bad), [None, "work", 5, object()]),
    "condition": (lambda bad: ConditionalPrimitive(bad, work), [None, True, "x"]),
    "function": (LambdaPrimitive, [None, "f", 5]),
    "side_effect and raise_error": (lambda bad: MockPrimitive(side_effect=bad, raise_error=OSError), [str]),
}


@pytest.mark.parametrize(("build", "values"), OPTIONS.values(), ids=OPTIONS)
def test_option_is_refused_when_it_is_built_with_what_cannot_work(build: Callable[[Any], Any], values: Any) -> None:
    """Whatever stands where a number, a step, a type or a list belongs: a ConfigurationError at construction."""
    for bad in values:
        with pytest.raises(ConfigurationError) as caught:
            build(bad)
        assert len(str(caught.value)) > 20, bad


def test_largest_numbers_are_taken_as_what_they_are() -> None:
    """What a float can hold is a number of seconds, and a call works with it."""
    most = 1.7e308
    breaker = CircuitBreakerPrimitive(
        BulkheadPrimitive(work, 10**400, 10**400, most), recovery_timeout=most, failure_threshold=10**400
    )
    slow = RetryPrimitive(breaker, RetryStrategy(10**400, most, most, jitter=True))
    assert run_sync(TimeoutPrimitive(RateLimitPrimitive(slow, most, 10**300), most), 1) == 1
    assert RetryStrategy(backoff_base=most, max_backoff=most, jitter=False).calculate_delay(10**6) == most


# ---- operators -----------------------------------------------------------------------------------------------------


async def fetch(data: Any) -> Any:
    return data


JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "a >> b": lambda a, b: a >> b,
    "b >> a": lambda a, b: b >> a,
    "a | b": lambda a, b: a | b,
    "b | a": lambda a, b: b | a,
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_call_of_a_coroutine_function_is_no_step_when_joined(join: Callable[[Any, Any], Any]) -> None:
    """``a >> fetch(1)`` names the slip, and leaves no complaint about a coroutine that nobody awaited."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=r"fetch\(\.\.\.\) was called .*: write fetch, without the call"):
            join(work, fetch(1))


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
@pytest.mark.parametrize("operand", [None, "text", 5, [work], {"a": work}])
def test_value_is_no_step_when_joined(join: Callable[[Any, Any], Any], operand: Any) -> None:
    """Python's own TypeError names both operands."""
    with pytest.raises(TypeError, match="unsupported operand"):
        join(work, operand)


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_class_is_no_step_when_joined(join: Callable[[Any, Any], Any]) -> None:
    """A primitive's class without its brackets."""
    with pytest.raises(ConfigurationError, match=r"MockPrimitive is a class: write MockPrimitive\(\.\.\.\)"):
        join(work, MockPrimitive)


def test_operand_of_another_library_may_join_in_its_own_way() -> None:
    """Where we cannot take an operand, its own class is asked, as Python does."""

    class Theirs:
        def __rrshift__(self, other: Any) -> str:
            return "theirs"

        def __ror__(self, other: Any) -> str:
            return "theirs, too"

    assert work >> Theirs() == "theirs"
    assert work | Theirs() == "theirs, too"


@pytest.mark.parametrize("decorate", [step, caller_step, thread_step, step(name="named")])
def test_method_is_no_step_when_decorated_in_the_class_body(decorate: Any) -> None:
    """It would be called with the data for its object: the error names the two ways to write it."""

    class Service:
        def fetch(self, data: Any) -> Any:
            return data

    with pytest.raises(ConfigurationError, match=r"step\(the_object\.fetch\), or subclass WorkflowPrimitive"):
        decorate(Service.fetch)
    assert run_sync(step(Service().fetch), 1) == 1


def test_repr_that_is_broken_hides_no_error() -> None:
    """Notes name steps and errors; where that fails, the error itself still comes out."""

    class Odd(WorkflowPrimitive[Any, Any]):
        async def execute(self, data: Any, context: Any) -> Any:
            raise Broken

        def __repr__(self) -> str:
            raise RuntimeError("broken")

    class Broken(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("broken, too")

    async def main() -> None:  # caught in here: asyncio.run itself stumbles over such an error
        odd = Odd()
        for flow in (
            odd >> work,
            odd | odd,
            MapPrimitive(odd),
            FallbackPrimitive(odd, odd),
            SagaPrimitive([(odd, None)]),
            HedgePrimitive(odd, 0.0, idempotent=True),
            RetryPrimitive(odd, max_retries=1, backoff_strategy="constant"),
        ):
            with pytest.raises(Broken):
                await flow.execute([1])

    asyncio.run(main())


# ---- classes -------------------------------------------------------------------------------------------------------


def test_class_is_refused_when_its_execute_could_not_be_called() -> None:
    """The class statement says how to write it."""
    with pytest.raises(ConfigurationError, match=r"OneArgument\.execute\(self, data\) cannot be called with data and"):

        class OneArgument(WorkflowPrimitive[Any, Any]):
            async def execute(self, data: Any) -> Any:
                return data

    with pytest.raises(ConfigurationError, match=r"Yields\.execute yields: subclass StreamingPrimitive"):

        class Yields(WorkflowPrimitive[Any, Any]):
            async def execute(self, data: Any, context: Any) -> Any:
                yield data


def test_plain_execute_is_refused_when_it_returns_no_awaitable() -> None:
    """One that returns an awaitable is as good as an async one; another's result tells how to write it."""

    class Plain(WorkflowPrimitive[Any, Any]):
        def execute(self, data: Any, context: Any) -> Any:
            return fetch(data) if data else data

    assert run_sync(Plain() >> work, 1) == 1
    assert run_sync(TimeoutPrimitive(Plain(), 30.0), 1) == 1
    with pytest.raises(TypeError, match=r"Plain\.execute returned int, not an awaitable: make it `async def`"):
        run_sync(Plain() >> work, 0)


@pytest.mark.parametrize("options", [{}, {"slots": True}, {"slots": True, "frozen": True}])
def test_class_may_be_a_dataclass(options: dict[str, bool]) -> None:
    """Also one with slots, whose class is made a second time, and in either order of the arguments."""

    @dataclass(**options)
    class Fetch(WorkflowPrimitive[Any, Any]):
        url: str

        async def execute(self, context: WorkflowContext, data: Any) -> Any:
            return f"{self.url}/{data}"

    flow = RetryPrimitive(Fetch("api")) >> work
    assert run_sync(flow, 1) == asyncio.run(flow.execute(1)) == asyncio.run(Fetch("api").execute(1)) == "api/1"
    assert repr(Fetch("api")).endswith("Fetch(url='api')")


def test_unittest_mocks_are_the_functions_that_they_stand_for() -> None:
    """A mock answers to any name: it is taken for an object with ``execute`` only where somebody has set that up."""

    class Foreign:
        async def execute(self, data: Any, context: Any) -> Any:
            return data

    for mock in Mock(return_value=4), MagicMock(return_value=4), AsyncMock(return_value=4):
        assert run_sync(work >> mock, 1) == 4
        assert run_sync(RetryPrimitive(mock), 1) == 4
        mock.assert_called()
    flaky = AsyncMock(side_effect=[OSError("first"), 4])
    assert run_sync(RetryPrimitive(flaky, backoff_strategy="constant"), 1) == 4
    specified = AsyncMock(spec=Foreign)
    specified.execute.return_value = 5
    assert run_sync(work >> specified, 1) == 5
    given = Mock()
    given.execute = AsyncMock(return_value=6)
    assert run_sync(work >> given, 1) == 6
