"""Another attempt: which errors, how many, how long between, and never past the moment of the cut."""

from __future__ import annotations

import asyncio
import datetime
import gc
import inspect
import itertools
import os
import random
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tenacity
import tenacity.asyncio.retry
from hypothesis import Phase, given, settings, strategies as st

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    RateLimitedError,
    StepTimeoutError,
)
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, step
from tta_sync.primitives.core.composition import CompositionWarning
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive, SwitchPrimitive
from tta_sync.primitives.recovery import (
    CircuitBreakerPrimitive,
    FallbackPrimitive,
    RetryBudget,
    RetryPrimitive,
    RetryStrategy,
    TimeoutPrimitive,
)
from tta_sync.primitives.recovery.retry import (
    ANY as ANY_ERROR,
    BACKOFFS,
    CAP,
    NEVER,
    NOT_SENT,
    fit,
    replayable,
    retry_after_of,
)
from tta_sync.testing import FakeClock


class Flaky(WorkflowPrimitive[Any, Any]):
    """Fails with each of *errors* in turn, then answers; notes the moment of each attempt."""

    def __init__(self, *errors: BaseException | Any, forever: bool = False, **attributes: Any) -> None:
        self.errors = itertools.cycle(errors) if forever else iter(errors)
        self.moments: list[float] = []
        self.name = "flaky"
        for name, value in attributes.items():
            setattr(self, name, value)

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        self.moments.append(context.clock.monotonic())
        outcome = next(self.errors, None)
        if isinstance(outcome, BaseException):
            raise outcome
        return data if outcome is None else outcome

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.moments)]


def failing(error: BaseException | None = None, **attributes: Any) -> Flaky:
    return Flaky(ConnectionError("gone") if error is None else error, forever=True, **attributes)


def run(primitive: WorkflowPrimitive[Any, Any], deadline: float | None = None, data: Any = "x") -> Any:
    clock = FakeClock()
    context = WorkflowContext(clock=clock)
    if deadline is not None:
        context.deadline = Deadline.after(deadline, clock)
    return asyncio.run(primitive.execute(data, context))


# ---- attempts ---------------------------------------------------------


def test_step_runs_until_it_succeeds_when_its_errors_pass() -> None:
    """Two failures and a success make three attempts, and the result."""
    flaky = Flaky(ConnectionError(), OSError())
    assert run(RetryPrimitive(flaky)) == "x"
    assert len(flaky.moments) == 3


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_attempts_are_one_more_than_retries(retries: int) -> None:
    """max_retries counts the attempts after the first."""
    flaky = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, max_retries=retries))
    assert len(flaky.moments) == retries + 1


def test_last_error_comes_out_as_itself_with_the_attempts_in_its_notes() -> None:
    """The very object of the last attempt is raised, and its notes tell of the earlier ones."""
    first, last = ConnectionError("first"), OSError("last")
    with pytest.raises(OSError, match="last") as caught:
        run(RetryPrimitive(Flaky(first, last), max_retries=1))
    assert caught.value is last
    (text,) = last.__notes__
    assert "2 attempts" in text
    assert "ConnectionError('first')" in text


def test_notes_stay_bounded_when_one_error_object_is_raised_for_ever() -> None:
    """A module-level constant raised in a thousand calls does not grow a thousand notes."""
    error = ConnectionError("constant")
    retry = RetryPrimitive(failing(error), max_retries=2)
    for _ in range(100):
        with pytest.raises(ConnectionError):
            run(retry)
    assert len(error.__notes__) <= 20


def test_error_whose_repr_is_broken_is_retried_like_any_other() -> None:
    """A `__repr__` that raises hides neither the error nor the retry."""

    class Odd(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("broken")

    async def main() -> list[str]:
        # Caught in here: asyncio.run itself stumbles over such an error.
        with pytest.raises(Odd) as caught:
            await RetryPrimitive(Flaky(Odd(), Odd()), max_retries=1, backoff_strategy="constant").execute(1)
        return caught.value.__notes__

    assert "1: Odd" in asyncio.run(main())[0]


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3"])
def test_retries_that_are_no_number_are_refused_at_construction(bad: Any) -> None:
    """max_retries is a whole number from 0."""
    with pytest.raises(ConfigurationError, match="max_retries"):
        RetryPrimitive(failing(), max_retries=bad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": 3}, "max_retries=3"),
        ({"strategy": RetryStrategy(), "max_retries": 2}, "not both"),
        ({"backoff_strategy": "fibonacci"}, "exponential, full_jitter, linear, constant"),
        ({"stop": 3}, "stop is a tenacity object"),
        ({"retry_on": ValueError()}, "retry_on takes an exception type"),
        ({"give_up_on": ("x",)}, "give_up_on takes an exception type"),
        ({"not_sent": int}, "not_sent takes an exception type"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction, with what to write instead."""
    with pytest.raises(ConfigurationError, match=said):
        RetryPrimitive(failing(), **options)


# ---- which errors -----------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [TypeError, NameError, UnboundLocalError, AttributeError, NotImplementedError, AssertionError, ImportError],
)
def test_mistakes_in_the_program_are_not_retried_by_default(mistake: type[Exception]) -> None:
    """A second attempt does not mend them."""
    flaky = failing(mistake("bug"))
    with pytest.raises(mistake):
        run(RetryPrimitive(flaky))
    assert len(flaky.moments) == 1


def test_group_is_retried_by_default_unless_there_is_a_mistake_in_it() -> None:
    """What a TaskGroup in a step raises is judged by what it holds."""
    for errors, attempts in (([OSError(), ValueError()], 4), ([OSError(), ExceptionGroup("in", [TypeError()])], 1)):
        flaky = failing(ExceptionGroup("of a task group", errors))
        with pytest.raises(ExceptionGroup):
            run(RetryPrimitive(flaky))
        assert len(flaky.moments) == attempts


@pytest.mark.parametrize("passing", [ConnectionError, TimeoutError, OSError, ValueError, RuntimeError, KeyError])
def test_other_errors_are_retried_by_default(passing: type[Exception]) -> None:
    """Whatever may pass gets its attempts."""
    flaky = failing(passing("maybe"))
    with pytest.raises(passing):
        run(RetryPrimitive(flaky, max_retries=2))
    assert len(flaky.moments) == 3


def test_retry_on_replaces_the_default_judgement() -> None:
    """Only the listed types are retried, a TypeError among them if it is listed."""
    listed, unlisted = failing(TypeError()), failing(OSError())
    for flaky in (listed, unlisted):
        with pytest.raises((TypeError, OSError)):
            run(RetryPrimitive(flaky, max_retries=2, retry_on=TypeError))
    assert (len(listed.moments), len(unlisted.moments)) == (3, 1)


def test_give_up_on_overrides_retry_on() -> None:
    """A subclass can be taken out of what is retried."""
    flaky = failing(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        run(RetryPrimitive(flaky, retry_on=OSError, give_up_on=(ConnectionResetError,)))
    assert len(flaky.moments) == 1


@pytest.mark.parametrize("interrupt", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_never_reach_a_predicate(interrupt: type[BaseException]) -> None:
    """Cancellation and the interpreter's exits are not errors: nobody is asked about them."""
    asked: list[Any] = []

    def ask(state: Any) -> bool:
        asked.append(state)
        return True

    async def main() -> None:
        # Without a task of its own, as an interrupt inside a task would end the loop as well.
        coroutine = RetryPrimitive(failing(interrupt()), retry=ask).execute(1, WorkflowContext())
        with pytest.raises(interrupt):
            coroutine.send(None)

    asyncio.run(main())
    assert asked == []


def test_result_is_refused_by_a_predicate_until_it_is_good() -> None:
    """retry_on_result makes an unwanted result count as a failure; an async predicate is awaited."""

    async def unwanted(result: Any) -> bool:
        return result in ("pending", "queued")

    assert run(RetryPrimitive(Flaky("pending", "queued", "done"), retry_on_result=unwanted)) == "done"


def test_retry_error_comes_out_when_the_last_result_is_refused() -> None:
    """There is no error to pass on: tenacity's RetryError holds the result."""
    with pytest.raises(tenacity.RetryError) as caught:
        run(RetryPrimitive(Flaky("a", "b", "c"), max_retries=1, retry_on_result=lambda result: True))
    assert caught.value.last_attempt.result() == "b"
    assert "2 attempts" in caught.value.__notes__[0]


# ---- waits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "waits"),
    [("linear", [0.1, 0.2, 0.3, 0.4]), ("constant", [0.1, 0.1, 0.1, 0.1])],
)
def test_waits_follow_the_strategy_when_it_has_no_jitter(strategy: str, waits: list[float]) -> None:
    """Linear adds 0.1 s each time, constant stays at 0.1 s."""
    flaky = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, max_retries=4, backoff_strategy=strategy))
    assert flaky.waits == pytest.approx(waits)


def test_waits_are_exact_with_a_strategy_without_jitter() -> None:
    """jitter=False gives min(backoff_base**n, max_backoff), counted from 0."""
    flaky = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, RetryStrategy(max_retries=4, backoff_base=3.0, max_backoff=10.0, jitter=False)))
    assert flaky.waits == [1.0, 3.0, 9.0, 10.0]


def test_overflow_ends_at_the_cap_when_there_are_very_many_attempts() -> None:
    """Attempt 100,000 waits as long as the cap, not for ever."""
    chance = random.Random(1)
    assert RetryStrategy(jitter=False).calculate_delay(100_000) == 60.0
    assert BACKOFFS["exponential"](100_000, chance) <= CAP
    assert BACKOFFS["linear"](10**9, chance) == CAP


@pytest.mark.parametrize("options", [{"backoff_base": 0}, {"max_backoff": -1}, {"max_retries": -1}])
def test_strategy_with_impossible_numbers_is_refused(options: dict[str, Any]) -> None:
    """A RetryStrategy is checked when it is made."""
    with pytest.raises(ConfigurationError):
        RetryStrategy(**options)


class Response:
    def __init__(self, headers: Any) -> None:
        self.headers = headers


class HttpError(Exception):
    def __init__(self, headers: Any) -> None:
        super().__init__("503")
        self.response = Response(headers)


class Asking(Exception):
    def __init__(self, retry_after: Any) -> None:
        super().__init__("later")
        self.retry_after = retry_after


class Raising(Exception):
    @property
    def retry_after(self) -> float:
        raise RuntimeError("not set")


class UrlError(Exception):
    def __init__(self, headers: Any) -> None:
        super().__init__("429")
        self.headers = headers


class BothError(HttpError):
    """Has the headers of a response, and some of its own."""

    def __init__(self, responses: Any, own: Any) -> None:
        super().__init__(responses)
        self.headers = own


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Asking(2), 2.0),
        (Asking(2.5), 2.5),
        (Asking("3"), 3.0),
        (Asking(b"3"), 3.0),
        (Asking(datetime.timedelta(seconds=4)), 4.0),
        (Asking("Tue, 14 Nov 2023 22:13:25 GMT"), 5.0),
        (Asking("Tue, 14 Nov 2023 22:13:15 GMT"), 0.0),
        (Asking("Tue, 14 Nov 2023 22:13:25 -0000"), 5.0),
        (Asking(datetime.datetime(2023, 11, 14, 22, 13, 25, tzinfo=datetime.UTC)), 5.0),
        (Asking(datetime.datetime(2023, 11, 14, 22, 13, 25)), 5.0),
        (Asking(datetime.time(22, 13)), 0.0),
        (Asking(-1), 0.0),
        (Asking(float("nan")), 0.0),
        (Asking(float("inf")), 0.0),
        (Asking("soon"), 0.0),
        (Asking(True), 0.0),
        (Asking([]), 0.0),
        (HttpError({"Retry-After": "6"}), 6.0),
        (HttpError({"retry-after": "Tue, 14 Nov 2023 22:13:27 GMT"}), 7.0),
        (HttpError({}), 0.0),
        (HttpError(None), 0.0),
        (UrlError({"Retry-After": "8"}), 8.0),
        (BothError({}, {"Retry-After": "8"}), 8.0),
        (BothError(None, {"Retry-After": "8"}), 8.0),
        (BothError({"Retry-After": "soon"}, {"Retry-After": "8"}), 8.0),
        (BothError({"Retry-After": "6"}, {"Retry-After": "8"}), 6.0),
        (UrlError("no mapping"), 0.0),
        (Raising(), 0.0),
        (ValueError(), 0.0),
    ],
)
def test_retry_after_is_read_from_error_and_response(error: Exception, seconds: float) -> None:
    """Seconds or an HTTP date, on the error or in its response's headers; anything else asks for nothing."""
    assert retry_after_of(error, lambda: NOW) == pytest.approx(seconds)


def test_retry_after_is_read_from_a_real_httpx_response() -> None:
    """httpx's own error carries its response."""
    import httpx

    response = httpx.Response(503, headers={"Retry-After": "9"}, request=httpx.Request("GET", "http://x"))
    with pytest.raises(httpx.HTTPStatusError) as caught:
        response.raise_for_status()
    assert retry_after_of(caught.value, lambda: NOW) == 9.0


def test_wait_is_at_least_what_the_server_asks() -> None:
    """Retry-After is a floor under the back-off, also above its cap."""
    flaky = Flaky(Asking(7.0), HttpError({"Retry-After": "9"}))
    run(RetryPrimitive(flaky))
    assert flaky.waits == [7.0, 9.0]


FITS = [
    # back-off, asked, end, rejected -> wait, or None
    (1.0, 0.0, None, False, 1.0),
    (1.0, 3.0, None, False, 3.0),
    (1.0, 7.0, None, False, 7.0),
    (1.0, 7.0, None, True, None),
    (1.0, 5.0, None, True, 5.0),
    (1.0, 4000.0, None, False, None),
    (1.0, 7.0, 108.0, True, 7.0),
    (1.0, 7.0, 107.0, True, None),
    (1.0, 0.0, 101.0, False, None),
    (1.0, 0.0, 101.1, False, 1.0),
    (1.0, 0.0, 99.0, False, None),
]


@pytest.mark.parametrize(("delay", "asked", "end", "rejected", "wait"), FITS)
def test_wait_is_chosen_by_what_fits(
    delay: float, asked: float, end: float | None, rejected: bool, wait: float | None
) -> None:
    """At moment 100, with a cap of 5 s: the larger of the two, if an attempt still fits behind it."""
    verdict = fit(delay, asked, 100.0, end, 5.0, rejected)
    assert (None if verdict.reason else verdict.delay) == wait


def test_last_error_is_raised_at_once_when_the_wait_does_not_fit_the_deadline() -> None:
    """Nobody waits for what can no longer be answered."""
    flaky = failing(Asking(30.0))
    clock = FakeClock()
    context = WorkflowContext(clock=clock, deadline=Deadline.after(10.0, clock))
    with pytest.raises(Asking) as caught:
        asyncio.run(RetryPrimitive(flaky).execute(1, context))
    assert clock.monotonic() == 0.0
    assert "do not fit" in caught.value.__notes__[0]


def test_last_error_is_raised_at_once_when_the_wait_does_not_fit_a_timeout_around() -> None:
    """A timeout narrows what the steps inside see, so its StepTimeoutError never hides the real error."""
    clock = FakeClock()
    flaky = failing(Asking(2.0))
    with pytest.raises(Asking):
        asyncio.run(TimeoutPrimitive(RetryPrimitive(flaky), 1.0).execute(1, WorkflowContext(clock=clock)))
    assert clock.monotonic() == 0.0


@pytest.mark.parametrize(
    "rejection",
    [CircuitOpenError("c", 3.0), BulkheadFullError("b", 3.0), RateLimitedError("r", 3.0)],
    ids=lambda error: type(error).__name__,
)
def test_rejection_is_waited_for_when_it_fits(rejection: Exception) -> None:
    """A rejection says itself when to come back; up to the cap of 5 s that is waited for."""
    flaky = Flaky(rejection)
    assert run(RetryPrimitive(flaky)) == "x"
    assert flaky.waits[0] >= 3.0


def test_rejection_is_raised_at_once_when_it_asks_for_more_than_the_cap_and_there_is_no_deadline() -> None:
    """An open circuit of 60 s is not waited out by a request."""
    flaky = failing(CircuitOpenError("c", 60.0))
    with pytest.raises(CircuitOpenError):
        run(RetryPrimitive(flaky))
    assert len(flaky.moments) == 1


def test_open_circuit_is_not_retried_with_back_off() -> None:
    """A retry around an open breaker gives up at its first CircuitOpenError."""
    inner = failing()
    breaker = CircuitBreakerPrimitive(inner, failure_threshold=2)
    with pytest.raises(CircuitOpenError):
        run(RetryPrimitive(breaker, max_retries=10))
    assert len(inner.moments) == 2


def test_deadline_error_is_never_retried() -> None:
    """A call whose time is up has no time for another attempt."""
    flaky = failing(DeadlineExceededError(1.0))
    with pytest.raises(DeadlineExceededError):
        run(RetryPrimitive(flaky))
    assert len(flaky.moments) == 1


def test_attempt_timeout_is_retried() -> None:
    """The limit of one attempt is an error of that attempt."""
    attempts: list[float] = []

    async def slow_then_fast(data: Any, context: WorkflowContext) -> str:
        attempts.append(context.clock.monotonic())
        if len(attempts) < 3:
            await context.clock.sleep(60)
        return "done"

    assert run(RetryPrimitive(TimeoutPrimitive(slow_then_fast, 1.0), backoff_strategy="constant")) == "done"
    assert attempts == pytest.approx([0.0, 1.1, 2.2])


# ---- properties, and twins that must not have them --------------------


Backoff = Callable[[int, random.Random], float]


def check_waits(retry_class: type[RetryPrimitive[Any, Any]], phases: Any = tuple(Phase)) -> None:
    """Every wait lies within [0, cap] and ends before the cut; nothing is waited for after the last attempt."""

    @settings(max_examples=150, deadline=None, database=None, phases=phases, report_multiple_bugs=False)
    @given(
        options=st.one_of(
            st.builds(lambda name: {"backoff_strategy": name}, st.sampled_from(sorted(BACKOFFS))),
            st.builds(
                lambda base, cap, jitter: {"strategy": RetryStrategy(6, base, cap, jitter)},
                st.floats(0.1, 5.0),
                st.floats(0.0, 8.0),
                st.booleans(),
            ),
        ),
        asked=st.sampled_from([None, 0.3, 20.0]),
        deadline=st.one_of(st.none(), st.floats(0.01, 10.0)),
        timeout=st.one_of(st.none(), st.floats(0.01, 10.0)),
        seed=st.integers(0, 1000),
    )
    def holds(options: dict[str, Any], asked: float | None, deadline: Any, timeout: Any, seed: int) -> None:
        clock = FakeClock()
        context = WorkflowContext(clock=clock)
        end = min((limit for limit in (deadline, timeout) if limit is not None), default=float("inf"))
        if deadline is not None:
            context.deadline = Deadline.after(deadline, clock)
        flaky = failing(ConnectionError() if asked is None else Asking(asked))
        if "strategy" not in options:
            options = {**options, "max_retries": 6}
        retry: WorkflowPrimitive[Any, Any] = retry_class(flaky, chance=random.Random(seed), **options)
        cap = options["strategy"].max_backoff if "strategy" in options else CAP
        if timeout is not None:
            retry = TimeoutPrimitive(retry, timeout)
        with pytest.raises((ConnectionError, Asking)):
            asyncio.run(retry.execute(1, context))
        floor = asked or 0.0
        assert all(floor - 1e-9 <= wait <= max(cap, floor) + 1e-9 for wait in flaky.waits)
        assert clock.monotonic() == flaky.moments[-1], "it waited after the last attempt"
        assert clock.monotonic() < end, "it waited past the cut"
        assert len(flaky.moments) <= 7

    holds()


def test_waits_stay_within_cap_and_cut_whatever_the_options() -> None:
    """Delays lie within [0, cap] and never reach past the deadline or a timeout around."""
    check_waits(RetryPrimitive)


class JitterAboveCap(RetryPrimitive[Any, Any]):
    """As TTA.dev does it: jitter on top of the capped delay."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        inner = self._backoff
        self._backoff = lambda n, chance: inner(n, chance) * (0.5 + chance.random())


class BlindToTheCut(RetryPrimitive[Any, Any]):
    """As most do it: sleep, whatever the deadline says."""

    async def _judge(self, error: Any, refused: Any, attempt: int, state: Any, context: WorkflowContext) -> Any:
        blind = WorkflowContext(clock=context.clock)
        return await super()._judge(error, refused, attempt, state, blind)


@pytest.mark.parametrize("twin", [JitterAboveCap, BlindToTheCut])
def test_wrong_twins_fail_the_property(twin: type[RetryPrimitive[Any, Any]]) -> None:
    """The property above can tell a right retry from a wrong one."""
    with pytest.raises((AssertionError, StepTimeoutError, DeadlineExceededError)):
        check_waits(twin, phases=[Phase.generate])


# ---- tenacity ---------------------------------------------------------


def test_tenacity_stop_replaces_max_retries() -> None:
    """stop_after_attempt counts attempts, the first one too; max_retries is then of no matter."""
    flaky = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, max_retries=50, stop=tenacity.stop_after_attempt(2)))
    assert len(flaky.moments) == 2


def test_tenacity_stop_after_delay_reads_the_calls_own_clock() -> None:
    """It stops at the first failure that is later than its limit."""
    flaky = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, stop=tenacity.stop_after_delay(2.5), wait=tenacity.wait_fixed(1)))
    assert flaky.moments == [0.0, 1.0, 2.0, 3.0]


def test_tenacity_stop_before_delay_counts_the_wait_that_would_follow() -> None:
    """It stops before a wait that would end past its limit, Retry-After included."""
    flaky, asking = failing(), failing(Asking(4.0))
    for primitive in (flaky, asking):
        with pytest.raises((ConnectionError, Asking)):
            run(RetryPrimitive(primitive, stop=tenacity.stop_before_delay(2.5), wait=tenacity.wait_fixed(1)))
    assert flaky.moments == [0.0, 1.0, 2.0]
    assert asking.moments == [0.0]


def test_tenacity_wait_replaces_the_back_off() -> None:
    """A wait object is asked for each wait, and sees the attempt's number and error."""
    seen: list[tuple[int, Any]] = []

    def wait(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        seen.append((state.attempt_number, state.outcome.exception()))
        return float(state.attempt_number)

    error = ConnectionError()
    flaky = failing(error)
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(flaky, wait=wait, max_retries=2))
    assert flaky.waits == [1.0, 2.0]
    assert seen == [(1, error), (2, error)]
    chained = failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(chained, backoff_strategy=tenacity.wait_chain(tenacity.wait_fixed(3), tenacity.wait_none())))
    assert chained.waits == [3.0, 0.0, 0.0]


def test_tenacity_state_holds_what_its_objects_read() -> None:
    """Idle time, attempt number, start and outcome are those of this call."""
    states: list[tuple[int, float, float | None]] = []

    def stop(state: tenacity.RetryCallState) -> bool:
        states.append((state.attempt_number, state.idle_for, state.seconds_since_start))
        assert state.args[0] == "x"
        assert state.upcoming_sleep == 2.0
        assert state.get_fn_name()
        return state.attempt_number == 3

    with pytest.raises(ConnectionError):
        run(RetryPrimitive(failing(), stop=stop, wait=tenacity.wait_fixed(2)))
    assert states == [(1, 0.0, 0.0), (2, 2.0, 2.0), (3, 4.0, 4.0)]


@pytest.mark.parametrize(
    "retry",
    [
        tenacity.retry_if_result(lambda result: result == "pending"),
        tenacity.retry_if_not_result(lambda result: result == "done"),
        tenacity.retry_if_result(lambda result: result == "pending") | tenacity.retry_if_exception_type(OSError),
        tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda result: result == "pending"),
        lambda state: not state.outcome.failed and state.outcome.result() == "pending",
    ],
)
def test_tenacity_retry_judges_results(retry: Any) -> None:
    """retry_if_result and its kin, alone and combined, are asked about results."""
    assert run(RetryPrimitive(Flaky("pending", "pending", "done"), retry=retry)) == "done"


def test_tenacity_async_predicates_are_awaited() -> None:
    """The predicates of tenacity.asyncio and plain coroutine functions may await."""

    async def pending(result: Any) -> bool:
        await asyncio.sleep(0)
        return bool(result == "pending")

    async def passing(error: BaseException) -> bool:
        await asyncio.sleep(0)
        return isinstance(error, OSError)

    on_loop = tenacity.asyncio.retry
    both = on_loop.retry_any(on_loop.retry_if_result(pending), on_loop.retry_if_exception(passing))
    assert run(RetryPrimitive(Flaky("pending", OSError(), "done"), retry=both)) == "done"
    with pytest.raises(ValueError, match="no"):
        run(RetryPrimitive(failing(ValueError("no")), retry=both))

    async def plain(state: tenacity.RetryCallState) -> bool:
        return state.outcome is not None and state.outcome.failed

    assert run(RetryPrimitive(Flaky(TypeError(), "done"), retry=plain)) == "done"


def test_tenacity_retry_replaces_the_default_judgement() -> None:
    """retry_if_exception_type decides, a TypeError included; what it does not want comes out."""
    assert run(RetryPrimitive(Flaky(TypeError()), retry=tenacity.retry_if_exception_type(TypeError))) == "x"
    flaky = failing(PermissionError())
    with pytest.raises(PermissionError):
        run(RetryPrimitive(flaky, retry=tenacity.retry_if_exception_type(TypeError)))
    assert len(flaky.moments) == 1


def test_tenacity_try_again_is_an_explicit_retry() -> None:
    """A step that raises TryAgain is run again whatever the predicates say."""
    never = tenacity.retry_never
    assert run(RetryPrimitive(Flaky(tenacity.TryAgain()), retry=never)) == "x"
    with pytest.raises(tenacity.TryAgain):
        run(RetryPrimitive(failing(tenacity.TryAgain()), max_retries=1, retry=never))


BLIND_TO_RESULTS = [
    tenacity.retry_never,
    tenacity.retry_if_exception_type(OSError),
    tenacity.retry_if_not_exception_type(OSError),
    tenacity.retry_if_exception(lambda error: True),
    tenacity.retry_if_exception_message(match="x"),
    tenacity.retry_if_exception_cause_type(OSError),
    tenacity.retry_any(tenacity.retry_never, tenacity.retry_if_exception_type(OSError)),
    tenacity.retry_all(tenacity.retry_if_exception_type(OSError), tenacity.retry_if_exception_cause_type(OSError)),
]


@pytest.mark.parametrize("retry", BLIND_TO_RESULTS, ids=lambda retry: type(retry).__name__)
def test_tenacity_objects_are_not_asked_after_a_success(retry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither stop nor wait nor a retry object that judges errors only costs the success path anything."""

    def forbidden(*args: Any) -> Any:
        raise AssertionError("asked after a success")

    monkeypatch.setattr(tenacity, "RetryCallState", forbidden)
    assert run(RetryPrimitive(Flaky(), retry=retry, stop=forbidden, wait=forbidden)) == "x"


def test_retry_unless_type_is_asked_about_results_as_tenacity_does() -> None:
    """retry_unless_exception_type retries every success: its own semantics are kept."""
    unless = tenacity.retry_unless_exception_type(ValueError)
    flaky = Flaky("again", ValueError("enough"))
    with pytest.raises(ValueError, match="enough"):
        run(RetryPrimitive(flaky, retry=unless, stop=tenacity.stop_never))
    assert len(flaky.moments) == 2


def test_one_retry_serves_fifty_tasks_at_once_with_tenacity_objects(
    run_shuffled: Callable[..., Any],
) -> None:
    """A shared AsyncRetrying returned None to 49 of 50 tasks; here each gets its own result."""
    attempts: dict[int, int] = {}

    async def flaky(data: int, context: WorkflowContext) -> int:
        attempts[data] = attempts.get(data, 0) + 1
        await context.clock.sleep(0.01)
        if attempts[data] < 3:
            raise ConnectionError
        return data

    retry: RetryPrimitive[int, int] = RetryPrimitive(
        flaky, stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random(0, 1)
    )

    async def main() -> list[int]:
        context = WorkflowContext(clock=FakeClock())
        return await asyncio.gather(*(retry.execute(n, context) for n in range(50)))

    for seed in range(3):
        attempts.clear()
        assert run_shuffled(main(), seed) == list(range(50))


def test_tenacity_is_neither_imported_nor_used_without_its_objects() -> None:
    """Importing the primitives, building a retry and retrying leave tenacity unloaded."""
    program = """
import asyncio, sys
from tta_sync.primitives.recovery import RetryPrimitive, RetryStrategy, TimeoutPrimitive
calls = []
async def flaky(data):
    calls.append(data)
    if len(calls) < 3:
        raise ConnectionError
    return data
assert asyncio.run(RetryPrimitive(flaky, backoff_strategy="constant").execute(1)) == 1
assert len(calls) == 3
print([name for name in ("tenacity", "httpx", "email.utils") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- idempotency ------------------------------------------------------


async def _answer(data: Any, context: WorkflowContext) -> Any:
    return data


ONCE = step(_answer, idempotent=False)
FREE = step(_answer)
TWICE = step(_answer, idempotent=True)

REPLAYABLE = [
    (FREE, ANY_ERROR),
    (TWICE, ANY_ERROR),
    (ONCE, NOT_SENT),
    (TimeoutPrimitive(ONCE, 1), NOT_SENT),
    (FREE >> TWICE >> ONCE, NOT_SENT),
    (ONCE >> FREE, NEVER),
    (ONCE | FREE, NEVER),
    (FallbackPrimitive(FREE, ONCE), NEVER),
    (FallbackPrimitive(ONCE, FREE), NOT_SENT),
    (FREE >> TimeoutPrimitive(FREE >> ONCE, 1), NOT_SENT),
    (MapPrimitive(FREE), ANY_ERROR),
    (MapPrimitive(ONCE), NEVER),
    (ConditionalPrimitive(bool, FREE, TWICE), ANY_ERROR),
    (ConditionalPrimitive(bool, ONCE), NOT_SENT),
    (ConditionalPrimitive(bool, ONCE, FREE), NOT_SENT),
    (SwitchPrimitive(str, {"a": FREE, "b": FREE >> ONCE}), NOT_SENT),
    (SwitchPrimitive(str, {"a": FREE}, ONCE >> FREE), NEVER),
    (RouterPrimitive({"a": ONCE, "b": FREE}, str), NOT_SENT),
]


@pytest.mark.parametrize(("workflow", "verdict"), REPLAYABLE, ids=lambda value: str(value))
def test_workflow_may_run_again_as_far_as_its_steps_allow(workflow: Any, verdict: str) -> None:
    """A step that must not run twice may stand last in what is retried; elsewhere no error proves it did not run."""
    assert replayable(workflow) is verdict


def test_declaration_on_a_workflow_overrides_its_steps() -> None:
    """Whoever declares a composite idempotent takes the word for its parts."""
    workflow = ONCE >> FREE
    workflow.idempotent = True
    assert replayable(workflow) is ANY_ERROR


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ConnectionRefusedError(), 3),
        (CircuitOpenError("c"), 3),
        (BulkheadFullError("b"), 3),
        (RateLimitedError("r"), 3),
        (BlockingIOError(), 3),  # in not_sent
        (ConnectionResetError(), 1),
        (TimeoutError(), 1),
    ],
)
def test_step_that_is_not_idempotent_is_retried_only_where_it_was_not_reached(error: Exception, attempts: int) -> None:
    """A reset connection may have had its effect; a refused one has not."""
    flaky = failing(error, idempotent=False)
    with pytest.raises(type(error)):
        run(RetryPrimitive(flaky, max_retries=2, not_sent=BlockingIOError))
    assert len(flaky.moments) == attempts


def test_refused_result_of_a_step_that_is_not_idempotent_is_not_retried() -> None:
    """A result proves that the step ran."""
    flaky = Flaky("a", "b", idempotent=False)
    with pytest.raises(tenacity.RetryError):
        run(RetryPrimitive(flaky, retry_on_result=lambda result: True))
    assert len(flaky.moments) == 1


# ---- budget -----------------------------------------------------------


def test_budget_stops_retries_at_half_of_its_tokens() -> None:
    """Ten tokens: the fifth failure leaves half, and there is no retry at half."""
    flaky = failing()
    budget = RetryBudget(max=10, per_success=0.1)
    with pytest.raises(ConnectionError) as caught:
        run(RetryPrimitive(flaky, max_retries=50, budget=budget))
    assert len(flaky.moments) == 5
    assert budget.tokens == 5.0
    assert "budget" in caught.value.__notes__[0]


def test_budget_is_shared_among_retries_and_refilled_by_successes() -> None:
    """One dependency's failures count for all its callers; ten successes give back one token."""
    budget = RetryBudget(max=4, per_success=0.5)
    first, second = failing(), failing()
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(first, max_retries=1, budget=budget))
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(second, budget=budget))
    assert (len(first.moments), len(second.moments)) == (2, 1)
    assert budget.tokens == 1.0
    for _ in range(5):
        run(RetryPrimitive(Flaky(), budget=budget))
    assert budget.tokens == 3.5
    assert (
        run(RetryPrimitive(Flaky("refused", "good"), budget=budget, retry_on_result=lambda r: r == "refused")) == "good"
    )
    assert budget.tokens == 3.0
    for _ in range(10):
        budget.succeeded()
    assert budget.tokens == 4.0
    assert "4 of 4" in repr(budget)


def test_budget_keeps_its_count_when_many_threads_use_it() -> None:
    """No token is lost between threads."""
    budget = RetryBudget(max=100_000, per_success=1.0)

    def spend() -> None:
        for _ in range(2000):
            budget.failed()

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.tokens == 100_000 - 16_000


@pytest.mark.parametrize("options", [{"max": 0}, {"max": float("inf")}, {"per_success": -1}])
def test_budget_with_impossible_numbers_is_refused(options: dict[str, float]) -> None:
    """A budget is checked when it is made."""
    with pytest.raises(ConfigurationError):
        RetryBudget(**options)


# ---- events, peek, composition, memory --------------------------------


def test_events_tell_of_each_retry_and_of_the_end(workflow_events: list[events.Event]) -> None:
    """RetryScheduled before each wait, RetryExhausted with the reason at the end."""
    error = ConnectionError("x")
    with pytest.raises(ConnectionError):
        run(RetryPrimitive(failing(error), max_retries=1, backoff_strategy="constant"))
    scheduled, exhausted = workflow_events
    assert scheduled == events.RetryScheduled(
        step="flaky", correlation_id=scheduled.correlation_id, attempt=1, delay=0.1, error=error
    )
    assert exhausted == events.RetryExhausted(
        step="flaky",
        correlation_id=scheduled.correlation_id,
        attempts=2,
        error=error,
        reason="no attempts are left",
        code="no_attempts",
    )


@pytest.mark.parametrize(
    ("code", "error", "options"),
    [
        ("no_attempts", ConnectionError(), {"max_retries": 1}),
        ("no_time", RateLimitedError("limiter", 70.0), {}),
        ("no_time", RateLimitedError("limiter", 7.25), {"deadline": 3.0}),
        ("no_time", Asking(4000.0), {}),
        ("fatal", TypeError(), {}),
        ("fatal", OSError(), {"give_up_on": OSError}),
        ("fatal", OSError(), {"retry_on": KeyError}),
        ("fatal", OSError(), {"retry": tenacity.retry_never}),
        ("not_idempotent", OSError(), {"idempotent": False}),
        ("budget", OSError(), {"budget": 1}),
        ("stop", OSError(), {"stop": tenacity.stop_after_attempt(1)}),
    ],
)
def test_end_is_told_by_a_fixed_code_beside_the_text(
    code: str, error: Exception, options: dict[str, Any], workflow_events: list[events.Event]
) -> None:
    """The text has numbers and names in it; the code is one of six words."""
    options = dict(options)
    attributes = {key: options.pop(key) for key in ("idempotent",) if key in options}
    deadline = options.pop("deadline", None)
    if "budget" in options:
        options["budget"] = RetryBudget(max=options["budget"])
    with pytest.raises(type(error)):
        run(RetryPrimitive(failing(error, **attributes), **options), deadline)
    last = workflow_events[-1]
    assert isinstance(last, events.RetryExhausted)
    assert last.code == code


class Known(WorkflowPrimitive[Any, Any]):
    """Answers without the loop, or raises, or does not know."""

    peeks = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return "executed"

    def peek(self, data: Any, context: WorkflowContext) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_peek_passes_a_value_on_but_never_an_error() -> None:
    """What is known without the loop needs no retry; what would be raised still has its attempts."""
    context = WorkflowContext()
    assert RetryPrimitive(Known("cached")).peek(1, context) == "cached"
    assert RetryPrimitive(Known(MISS)).peek(1, context) is MISS
    assert RetryPrimitive(Known(OSError())).peek(1, context) is MISS
    assert RetryPrimitive(FREE).peek(1, context) is MISS
    assert RetryPrimitive(Known("cached"), retry_on_result=lambda result: True).peek(1, context) is MISS


def test_peek_does_not_ask_what_can_only_raise(workflow_events: list[events.Event]) -> None:
    """An open breaker inside a retry is asked once, on the loop: its rejection is counted once."""
    breaker = CircuitBreakerPrimitive(FREE)
    breaker.force_open()
    workflow_events.clear()
    assert RetryPrimitive(TimeoutPrimitive(breaker, 1.0)).peek(1, WorkflowContext()) is MISS
    assert workflow_events == []


def test_warning_when_a_retry_stands_around_a_fallback() -> None:
    """The fallback answers, so the retry never gets to see an error."""
    with pytest.warns(CompositionWarning, match="put the retry inside"):
        RetryPrimitive(FallbackPrimitive(FREE, FREE))


def test_warning_when_a_cache_stands_inside_a_retry() -> None:
    """The cache belongs outside."""
    from tta_sync.primitives.performance import CachePrimitive

    with pytest.warns(CompositionWarning, match="put the cache outside"):
        RetryPrimitive(CachePrimitive(FREE, ttl=1, namespace="n"))


def test_no_warning_when_the_fallback_is_one_step_of_several() -> None:
    """Around a sequence the retry has other errors to work on."""
    RetryPrimitive(FREE >> FallbackPrimitive(FREE, FREE))


def test_repr_shows_step_and_attempts() -> None:
    """A workflow can be read."""
    assert repr(RetryPrimitive(FREE, max_retries=2)) == "Retry(_answer, max_retries=2)"
    assert "stop_after_attempt" in repr(RetryPrimitive(FREE, stop=tenacity.stop_after_attempt(2)))


@pytest.mark.parametrize("options", [{}, {"budget": RetryBudget()}, {"stop": tenacity.stop_after_attempt(2)}])
def test_error_leaves_no_reference_cycle(options: dict[str, Any]) -> None:
    """Once the caller lets go of the error it is gone, without the garbage collector."""

    class Mark(Exception):
        pass

    async def fail(data: Any) -> None:
        raise Mark

    async def main() -> weakref.ref[Mark]:
        try:
            await RetryPrimitive(fail, backoff_strategy="constant", **options).execute(1)
        except Mark as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_traceback_stays_short_when_the_last_attempt_fails() -> None:
    """The step's own frames, the retry's, and the caller's: no more for three attempts than for two."""

    async def fail(data: Any) -> None:
        raise PermissionError

    async def main(retries: int) -> int:
        with pytest.raises(PermissionError) as caught:
            await RetryPrimitive(fail, max_retries=retries, backoff_strategy="constant").execute(1)
        return len(inspect.getinnerframes(caught.tb))

    assert asyncio.run(main(1)) == asyncio.run(main(2)) <= 6


def test_budget_lock_is_free_in_a_forked_child() -> None:
    """A child forked while another thread holds the budget's lock can still use it."""
    budget = RetryBudget()
    budget._lock.acquire()
    child = os.fork()
    if not child:
        budget.failed()
        os._exit(0)
    budget._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_error_of_a_predicate_tells_of_the_error_it_was_asked_about() -> None:
    """What a user's own predicate, stop or wait raises comes out, and the step's error is its context."""

    def broken(state: Any) -> bool:
        raise LookupError("the predicate's own")

    for options in ({"retry": broken}, {"stop": broken}, {"wait": broken}):
        with pytest.raises(LookupError, match="the predicate's own") as caught:
            asyncio.run(RetryPrimitive(Flaky(OSError("the step's")), **options).execute(1))
        assert str(caught.value.__context__) == "the step's"


def test_no_warning_when_the_fallback_answers_for_some_errors_only() -> None:
    """What ``fallback_on`` does not match passes through the fallback, and the retry has its work."""
    partly = FallbackPrimitive(failing(), failing(), fallback_on=(ValueError, KeyError))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RetryPrimitive(partly)
    with pytest.warns(CompositionWarning, match="put the retry inside"):
        RetryPrimitive(FallbackPrimitive(failing(), failing(), fallback_on=(ValueError, Exception)))
