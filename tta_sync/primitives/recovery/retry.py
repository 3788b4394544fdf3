"""Another attempt after a failure that may pass."""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tta_sync import events
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    LoopUnavailableError,
    NoCallerError,
    NoRouteError,
    RateLimitedError,
    SagaError,
    was_called,
)
from tta_sync.primitives.core.base import (
    MISS,
    In,
    Out,
    StepLike,
    WorkflowPrimitive,
    as_primitive,
    note,
    peek_value,
    shown,
    step_name,
)
from tta_sync.primitives.core.composition import check_composition, children_of
from tta_sync.primitives.core.options import ErrorTypes, error_types, is_count, is_number
from tta_sync.primitives.core.sequential import SequentialPrimitive
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.naming import call_name

if TYPE_CHECKING:
    from tenacity import RetryCallState

BASE = 0.1
CAP = 5.0
LONGEST_WAIT = 3600.0
"""Seconds: no server makes a call without a deadline wait longer than this."""

REJECTIONS = (CircuitOpenError, BulkheadFullError, RateLimitedError)
"""The call was turned away before it was made."""

GIVE_UP = (
    TypeError,
    NameError,
    AttributeError,
    AssertionError,
    ImportError,
    SyntaxError,
    NotImplementedError,
    ConfigurationError,
    DeadlineExceededError,
    LoopUnavailableError,
    NoCallerError,
    NoRouteError,
    SagaError,
)
"""Mistakes in the program, which no second attempt mends; a call whose time is up; a saga that could not be undone."""


# ---- how long to wait: functions of the attempt's number, counted from 0 --------------------------------------------


def exponential(n: int, chance: random.Random, base: float = BASE, cap: float = CAP) -> float:
    """Full jitter: anything between 0 and min(cap, base * 2**n). Source: AWS, *Exponential Backoff and Jitter*."""
    return chance.uniform(0.0, min(cap, base * 2.0 ** min(n, 1000)))


def linear(n: int, chance: random.Random, base: float = BASE, cap: float = CAP) -> float:
    """Add *base* each time, up to *cap*; no jitter."""
    return min(cap, base * (n + 1))


def constant(n: int, chance: random.Random, base: float = BASE, cap: float = CAP) -> float:
    """Wait the same each time; no jitter."""
    return base


BACKOFFS: dict[str, Callable[[int, random.Random], float]] = {
    "exponential": exponential,
    "full_jitter": exponential,
    "linear": linear,
    "constant": constant,
}


@dataclass(frozen=True, slots=True)
class RetryStrategy:
    """How often and how slowly to try again, in TTA.dev's terms.

    The wait before retry n, counted from 0, is between 0 and ``min(backoff_base ** n, max_backoff)`` seconds; without
    *jitter* it is exactly that.
    """

    max_retries: int = 3
    backoff_base: float = 2.0
    max_backoff: float = 60.0
    jitter: bool = True

    def __post_init__(self) -> None:
        check_max_retries(self.max_retries)
        sound = is_number(self.backoff_base) and is_number(self.max_backoff)
        if not sound or self.backoff_base <= 0 or self.max_backoff < 0:
            raise ConfigurationError(f"backoff_base must be a number > 0 and max_backoff one >= 0, in seconds: {self}")

    def calculate_delay(self, attempt: int, chance: random.Random | None = None) -> float:
        """Return the seconds to wait before retry *attempt*, counted from 0."""
        try:
            longest = min(float(self.backoff_base**attempt), self.max_backoff)
        except OverflowError:
            longest = self.max_backoff
        return (chance or _chance).uniform(0.0, longest) if self.jitter else longest


_chance = random.Random()  # noqa: S311  # spreads load, guards nothing


def check_max_retries(max_retries: int) -> None:
    """Refuse what is no number of retries."""
    if not is_count(max_retries, 0):
        raise ConfigurationError(
            f"max_retries is a number of attempts after the first, 0 or more, not {max_retries!r}; "
            "for no limit but the deadline give stop=tenacity.stop_never"
        )


def _check_strategy(strategy: Any) -> None:
    if strategy is not None and not isinstance(strategy, RetryStrategy):
        instead = "max_retries" if isinstance(strategy, int) else "backoff_strategy"
        raise ConfigurationError(
            f"the second argument, strategy, is a RetryStrategy, not {strategy!r}: write {instead}={strategy!r}"
        )


def check_budget(budget: Any) -> None:
    """Refuse what is no budget."""
    if budget is not None and not isinstance(budget, RetryBudget):
        raise ConfigurationError(f"budget is a RetryBudget, not {budget!r}: write budget=RetryBudget(max=10)")


def retry_after_of(error: BaseException, wall_clock: Callable[[], float]) -> float:
    """Return the seconds for which *error* asks not to be called again; 0.0 where it does not say.

    Read from ``error.retry_after`` (seconds, or what a Retry-After header may hold), else from the header itself, in
    ``error.response.headers`` as httpx and requests leave it there, else in ``error.headers`` as urllib and aiohttp do.
    """
    try:
        asked = getattr(error, "retry_after", None)
        if asked is not None:
            return _seconds(asked, wall_clock)
        for source in (getattr(error, "response", None), error):
            headers = getattr(source, "headers", None)
            if headers is not None:
                seconds = _seconds(headers.get("Retry-After") or headers.get("retry-after"), wall_clock)
                if seconds:
                    return seconds
        return 0.0
    except Exception:
        return 0.0  # a property of a stranger's error that raises is no answer, and must not hide the error


def _seconds(asked: Any, wall_clock: Callable[[], float]) -> float:
    if isinstance(asked, (bytes, bytearray)):
        asked = asked.decode("latin-1")
    seconds = math.nan
    if isinstance(asked, str):
        try:
            seconds = float(asked)
        except ValueError:
            from email.utils import parsedate_to_datetime

            try:
                seconds = _until(parsedate_to_datetime(asked), wall_clock)
            except (ValueError, TypeError, OverflowError):
                pass  # neither a number nor a date: it asks for nothing
    elif hasattr(asked, "utcoffset"):
        seconds = _until(asked, wall_clock)  # a datetime, as werkzeug's errors have it
    elif hasattr(asked, "total_seconds"):
        seconds = asked.total_seconds()
    elif isinstance(asked, (int, float)) and not isinstance(asked, bool):
        seconds = float(asked)
    return seconds if 0.0 < seconds < math.inf else 0.0


def _until(moment: Any, wall_clock: Callable[[], float]) -> float:
    """Return the seconds until a datetime; one without a zone is meant as GMT, as HTTP's dates are."""
    if moment.tzinfo is None:
        from datetime import UTC

        moment = moment.replace(tzinfo=UTC)
    return float(moment.timestamp()) - wall_clock()


# ---- whether to wait at all -----------------------------------------------------------------------------------------


class RetryBudget:
    """Stop retrying a dependency that fails for everybody; share one between its Retries and Hedges.

    Starts full with *max* tokens. A failure takes one, a success gives back *per_success*; at or below half of *max*
    there are no retries and no hedges. Safe from many threads.

    Source: gRPC's retry throttling (proposal A6).
    """

    def __init__(self, max: float = 10.0, per_success: float = 0.1) -> None:  # noqa: A002  # gRPC's word is max_tokens
        if not (is_number(max) and max > 0 and is_number(per_success) and per_success >= 0):
            raise ConfigurationError(f"a budget needs max > 0 and per_success >= 0: {max=}, {per_success=}")
        self.max = float(max)
        self.per_success = float(per_success)
        self._tokens = self.max  # guarded by _lock
        self._lock = threading.Lock()
        renew_after_fork(self)

    @property
    def tokens(self) -> float:
        """What is left."""
        return self._tokens

    def succeeded(self) -> None:
        """Give back for a success."""
        if self._tokens < self.max:
            with self._lock:
                self._tokens = min(self.max, self._tokens + self.per_success)

    def failed(self) -> bool:
        """Take a token for a failure, and say whether another attempt is allowed."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self.max / 2

    def spend(self) -> bool:
        """Take a token for an attempt beside one that has not failed, if that is allowed; say whether it was."""
        with self._lock:
            allowed = self._tokens > self.max / 2
            if allowed:
                self._tokens -= 1.0
            return allowed

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RetryBudget({self._tokens:g} of {self.max:g} tokens left)"


ANY = "any error"
NOT_SENT = "errors that prove the call was not made"
NEVER = "no error"


def replayable(step: WorkflowPrimitive[Any, Any], above: frozenset[int] = frozenset()) -> str:
    """Say after which errors *step* may run a second time, judged by what is declared idempotent inside it.

    In a sequence only the last step may be one that must not run twice: an error of it still tells whether it ran. With
    one earlier, in a branch, or for other items of a Map, an error of another step tells nothing about it. Of the steps
    that one is chosen from, the others did not run.
    """
    if step.idempotent is not None:
        return ANY if step.idempotent else NOT_SENT
    if id(step) in above:  # a workflow that contains itself: judged by the rest of it
        return ANY
    above |= {id(step)}
    verdicts = [replayable(part, above) for part in children_of(step)]
    if all(verdict is ANY for verdict in verdicts):
        return ANY
    kind = type(step)._tta_kind
    if len(verdicts) == 1:
        return NEVER if kind == "map" else verdicts[0]
    if kind == "choice":
        return NEVER if NEVER in verdicts else NOT_SENT
    if isinstance(step, SequentialPrimitive) and all(verdict is ANY for verdict in verdicts[:-1]):
        return verdicts[-1]
    if kind == "fallback" and all(verdict is ANY for verdict in verdicts[1:]):
        return verdicts[0]  # what comes out is the primary's error
    return NEVER


class Verdict(NamedTuple):
    """What to do after a failure: wait ``delay`` seconds and try again, or raise because of ``reason``.

    ``code`` is the reason as one of a few fixed words, which metrics count by.
    """

    delay: float
    reason: str = ""
    code: str = ""


def _no_more(code: str, reason: str) -> Verdict:
    return Verdict(0.0, reason, code)


def fit(delay: float, asked: float, now: float, end: float | None, cap: float, rejected: bool) -> Verdict:
    """Decide whether a wait fits: *delay* is the back-off, *asked* the server's floor, *end* the moment of the cut."""
    wait = max(delay, asked)
    if end is None:
        if rejected and asked > cap:
            return _no_more("no_time", f"{asked:.3g} s to wait is more than the longest back-off, {cap:g} s")
        if asked > LONGEST_WAIT:
            return _no_more("no_time", f"{asked:.3g} s to wait is too long")
    elif now + wait >= end:
        return _no_more("no_time", f"{wait:.3g} s to wait do not fit the {max(0.0, end - now):.3g} s that remain")
    return Verdict(wait)


class RetryPrimitive(WorkflowPrimitive[In, Out]):
    """Run a step again when it fails with an error that may pass.

    At most ``max_retries + 1`` attempts; then the last error comes out as itself, the attempts in its notes. Between
    them a back-off with full jitter (0.1 s doubled each time, at most 5 s), never less than the server's Retry-After,
    and never one that does not fit into the call's deadline or a timeout around it: the last error is raised at once
    instead. Cancellation is never retried. Mistakes in the program (TypeError, NameError, AttributeError ...) are not,
    unless ``retry_on`` or ``retry`` says so. A step declared ``idempotent=False`` is run again only after an error that
    proves it was not reached.

    Args:
        primitive: the step.
        strategy: a :class:`RetryStrategy`: attempts and waits in TTA.dev's terms.
        max_retries: attempts after the first; 3.
        backoff_strategy: "exponential" (the default, with full jitter), "full_jitter" (the same), "linear" (0.1 s more
            each time), "constant" (0.1 s), or a tenacity wait object.
        stop, wait, retry: tenacity's objects, or functions of a ``RetryCallState``; *stop* replaces max_retries, *wait*
            the back-off, *retry* the judgement of errors and results. They are asked after a failure; *retry* after a
            success as well if it judges results.
        retry_on: only these errors are retried.
        give_up_on: these are not.
        retry_on_result: a function of the result; true means that it counts as a failure.
        not_sent: errors that prove a step which is not idempotent was not reached, besides the rejections by a breaker,
            bulkhead or rate limit, and ConnectionRefusedError.
        budget: a :class:`RetryBudget`, shared among those who call the same dependency.
        chance: the source of the jitter.

    Raises:
        tenacity.RetryError: the last attempt's result was still refused.
        ConfigurationError: an option makes no sense.

    Source: tenacity, whose objects it takes; defaults after AWS's *Exponential Backoff and Jitter*.
    """

    peeks = True

    def __init__(
        self,
        primitive: StepLike[In, Out],
        strategy: RetryStrategy | None = None,
        *,
        max_retries: int | None = None,
        backoff_strategy: Any = None,
        stop: Callable[[RetryCallState], Any] | None = None,
        wait: Callable[[RetryCallState], Any] | None = None,
        retry: Callable[[RetryCallState], Any] | None = None,
        retry_on: ErrorTypes | None = None,
        give_up_on: ErrorTypes = (),
        retry_on_result: Callable[[Any], Any] | None = None,
        not_sent: ErrorTypes = (),
        budget: RetryBudget | None = None,
        name: str | None = None,
        chance: random.Random | None = None,
    ) -> None:
        _check_strategy(strategy)
        if strategy is not None and (max_retries is not None or backoff_strategy is not None):
            raise ConfigurationError("give a RetryStrategy, or max_retries and backoff_strategy, not both")
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.strategy = strategy
        if name is not None:
            self.name = name
        self.max_retries = 3 if max_retries is None else max_retries
        self.cap = CAP
        self._chance = chance or _chance
        self._backoff: Callable[[int, random.Random], float]
        if strategy is not None:
            self.max_retries, self.cap, self._backoff = (
                strategy.max_retries,
                strategy.max_backoff,
                strategy.calculate_delay,
            )
        elif backoff_strategy is None or isinstance(backoff_strategy, str):
            try:
                self._backoff = BACKOFFS["exponential" if backoff_strategy is None else backoff_strategy]
            except KeyError:
                raise ConfigurationError(
                    f"no back-off is called {backoff_strategy!r}: choose one of {', '.join(BACKOFFS)}, "
                    "or give a tenacity wait object"
                ) from None
        else:
            self._backoff = exponential
            wait = wait or backoff_strategy
        check_max_retries(self.max_retries)
        for option, value in (("stop", stop), ("wait", wait), ("retry", retry), ("retry_on_result", retry_on_result)):
            if value is not None and not callable(value):
                raise ConfigurationError(f"{option} is a tenacity object or a function, not {value!r}")
        check_budget(budget)
        self._stop, self._wait, self._retry = stop, wait, retry
        self._on_result = retry_on_result
        self._retry_on = error_types("retry_on", retry_on) if retry_on is not None else None
        self._give_up_on = error_types("give_up_on", give_up_on)
        self._not_sent = (*REJECTIONS, ConnectionRefusedError, *error_types("not_sent", not_sent))
        self._replayable = replayable(self.primitive)
        self._budget = budget
        self._judges_results = retry_on_result is not None or (retry is not None and _asks_results(retry))
        # What the plain success path need not look at: a start time, results, a budget.
        self._plain = all(option is None for option in (stop, wait, retry, retry_on_result, budget))
        self._inner = self.primitive._run
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        return f"max_retries={self.max_retries}" if self._stop is None else f"stop={step_name(self._stop)}"

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        kind = type(inner)._tta_kind
        if direct and kind == "fallback" and getattr(inner, "answers_all", True):
            return (
                f"the retry around {inner!r} never sees the primary's errors, as the fallback answers first: "
                "put the retry inside, FallbackPrimitive(RetryPrimitive(primary), fallback)"
            )
        if direct and kind == "cache":
            return (
                f"the cache inside a retry, {inner!r}, is looked up again on each attempt: "
                "put the cache outside, CachePrimitive(RetryPrimitive(step))"
            )
        return None

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        if not self._plain:
            return await self._attempts(data, context, context.clock.monotonic(), None)
        inner = self._inner  # a local: called on self, it would first be looked for in the class
        try:
            return await inner(data, context)
        except Exception as error:
            first = error
        try:
            return await self._attempts(data, context, 0.0, first)
        finally:
            del first  # its frames lead back to this one

    async def _attempts(self, data: In, context: WorkflowContext, start: float, error: Exception | None) -> Out:
        """Make the attempts that are left: all, or those after the first one's *error*."""
        clock = context.clock
        history: list[str] = []
        state: RetryCallState | None = None
        attempt = 1
        try:
            while True:
                result: Any = None
                if error is None:
                    try:
                        result = await self._inner(data, context)
                    except Exception as failure:
                        error = failure
                    except BaseException as cut:
                        if attempt > 1:
                            was_called(cut)
                        raise
                    if error is not None and attempt > 1:
                        was_called(error)
                refused = False
                if error is None:
                    if not self._judges_results:
                        if self._budget is not None:
                            self._budget.succeeded()
                        return result  # type: ignore[no-any-return]
                    if self._retry is not None:
                        state = self._observe(state, data, context, start, None, result)
                    refused = await self._refuses(result, state)
                    if not refused:
                        if self._budget is not None:
                            self._budget.succeeded()
                        return result  # type: ignore[no-any-return]
                    error = _refusal(result, attempt)
                elif self._stop is not None or self._wait is not None or self._retry is not None:
                    state = self._observe(state, data, context, start, error, None)

                try:
                    verdict = await self._judge(error, refused, attempt, state, context)
                except Exception as broken:  # a predicate, stop or wait of the user's: its error comes out
                    if broken is not error and broken.__context__ is None:
                        with contextlib.suppress(Exception):  # it may refuse to be changed
                            broken.__context__ = error  # and the one that it was asked about is told with it
                    raise
                if verdict.reason:
                    self._give_up(error, attempt, history, verdict, context)
                    raise error
                if events.bus.emit is not None:
                    events.bus.emit(
                        events.RetryScheduled(
                            step=call_name(self.primitive),
                            correlation_id=context.correlation_id,
                            attempt=attempt,
                            delay=verdict.delay,
                            error=error,
                        )
                    )
                history.append(f"{attempt}: {shown(error)}")
                error = None
                if state is not None:
                    state.idle_for += verdict.delay
                    state.prepare_for_next_attempt()
                await clock.sleep(verdict.delay)
                attempt += 1
        finally:
            error = state = None  # their frames lead back to this one

    async def _judge(
        self, error: Exception, refused: bool, attempt: int, state: RetryCallState | None, context: WorkflowContext
    ) -> Verdict:
        """Decide what follows on a failure."""
        code = "fatal"
        reason = "" if refused or _asks_to_try_again(error) else await self._fatal(error, state)
        if not reason and self._replayable is not ANY:
            proven = self._replayable is NOT_SENT and not refused and isinstance(error, self._not_sent)
            if not proven:
                code = "not_idempotent"
                which = "the step" if self.primitive.idempotent is False else "a step in it"
                reason = f"{which} is declared idempotent=False and may have had its effect"
        allowed = self._budget is None or self._budget.failed()
        if reason:
            return _no_more(code, reason)
        if self._stop is None and attempt > self.max_retries:
            return _no_more("no_attempts", "no attempts are left")

        if self._wait is None:
            delay = self._backoff(attempt - 1, self._chance)
        else:
            delay = max(0.0, float(await _value_of(self._wait(state))))  # type: ignore[arg-type]  # there is one
        asked = 0.0 if refused else retry_after_of(error, context.clock.time)
        if state is not None:
            state.upcoming_sleep = max(delay, asked)
        if self._stop is not None and await _value_of(self._stop(state)):  # type: ignore[arg-type]
            return _no_more("stop", f"{step_name(self._stop)} says stop")
        if not allowed:
            return _no_more("budget", "the retry budget is spent")
        return fit(delay, asked, context.clock.monotonic(), cut_off(context), self.cap, isinstance(error, REJECTIONS))

    async def _fatal(self, error: Exception, state: RetryCallState | None) -> str:
        """Say why *error* is no reason to try again; "" where it is one."""
        kind = type(error).__name__
        if self._give_up_on and isinstance(error, self._give_up_on):
            return f"{kind} is in give_up_on"
        if self._retry_on is not None and not isinstance(error, self._retry_on):
            return f"{kind} is not in retry_on"
        if self._retry is not None:
            return "" if await _value_of(self._retry(state)) else f"{step_name(self._retry)} does not ask for it"  # type: ignore[arg-type]
        if self._retry_on is None and _is_fatal(error):
            return f"{kind} is not mended by another attempt"
        return ""

    async def _refuses(self, result: Any, state: RetryCallState | None) -> bool:
        if self._on_result is not None and await _value_of(self._on_result(result)):
            return True
        return state is not None and self._retry is not None and bool(await _value_of(self._retry(state)))

    def _observe(
        self,
        state: RetryCallState | None,
        data: Any,
        context: WorkflowContext,
        start: float,
        error: Exception | None,
        result: Any,
    ) -> RetryCallState:
        """Keep the record of this call that tenacity's objects read, on the call's own clock."""
        if state is None:
            from tenacity import AsyncRetrying, RetryCallState

            state = RetryCallState(AsyncRetrying(), self._inner, (data, context), {})
            state.start_time = start
        if error is not None:
            state.set_exception((type(error), error, error.__traceback__))
        else:
            state.set_result(result)
        state.outcome_timestamp = context.clock.monotonic()
        return state

    def _give_up(
        self, error: Exception, attempts: int, history: list[str], verdict: Verdict, context: WorkflowContext
    ) -> None:
        reason = verdict.reason
        if history:
            earlier = "; ".join(history[-5:])
            note(error, f"gave up after {attempts} attempts: {reason}; earlier attempts: {earlier}")
        else:
            note(error, f"gave up after 1 attempt: {reason}")
        if events.bus.emit is not None:
            events.bus.emit(
                events.RetryExhausted(
                    step=call_name(self.primitive),
                    correlation_id=context.correlation_id,
                    attempts=attempts,
                    error=error,
                    reason=reason,
                    code=verdict.code,
                )
            )

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        # What the step would raise is no answer, as there are more attempts to make.
        return MISS if self._judges_results else peek_value(self.primitive, data, context)


async def _value_of(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def _refusal(result: Any, attempt: int) -> Exception:
    """Make the error for a result that was refused: tenacity's own, which keeps the result."""
    from tenacity import Future, RetryError

    outcome = Future(attempt)
    outcome.set_result(result)
    return RetryError(outcome)


def _is_fatal(error: BaseException) -> bool:
    """Say whether another attempt would end the same; an ExceptionGroup's would, if one of its errors is such."""
    return isinstance(error, GIVE_UP) or (
        isinstance(error, BaseExceptionGroup) and any(map(_is_fatal, error.exceptions))
    )


def _asks_to_try_again(error: Exception) -> bool:
    tenacity = sys.modules.get("tenacity")  # whoever raised its TryAgain has imported it
    return tenacity is not None and isinstance(error, tenacity.TryAgain)


def _asks_results(retry: Any) -> bool:
    """Say whether a tenacity retry object judges results, and so must be asked after a success."""
    tenacity = sys.modules.get("tenacity")
    if tenacity is None:
        return True
    import tenacity.asyncio.retry as on_loop

    if type(retry) in (tenacity.retry_any, on_loop.retry_any):
        return any(map(_asks_results, retry.retries))
    if type(retry) in (tenacity.retry_all, on_loop.retry_all):
        return all(map(_asks_results, retry.retries))
    return retry is not tenacity.retry_never and type(retry) not in (
        tenacity.retry_if_exception,
        tenacity.retry_if_exception_type,
        tenacity.retry_if_not_exception_type,
        tenacity.retry_if_exception_message,
        tenacity.retry_if_exception_cause_type,
        on_loop.retry_if_exception,
    )
