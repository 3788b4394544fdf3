"""Leave a dependency alone that keeps failing."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict, cast

from tta_sync import events
from tta_sync.context import WorkflowContext, cancel_reason, time_limit
from tta_sync.exceptions import (
    CircuitBreakerError as CircuitBreakerError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    StepTimeoutError,
    came_before_call,
)
from tta_sync.primitives.core.base import MISS, In, Out, StepLike, WorkflowPrimitive, as_primitive
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import ErrorTypes, is_count, is_number
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.naming import call_name, shared_name
from tta_sync.primitives.recovery.retry import LONGEST_WAIT, REJECTIONS, retry_after_of

if TYPE_CHECKING:
    from typing import Unpack


class CircuitState(StrEnum):
    """Where a circuit stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


_limit_around = time_limit.get  # here once for all: a method of an imported name is looked up anew for each call

COUNT, SECONDS = 100, 60.0
"""What the windows "count" and "time" stand for."""

MAX_WINDOW = 1_000_000
"""Calls that a window may look back on: each costs eight bytes."""

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class _NotGiven(int):
    """A number that stands where nobody has given one; it goes with a config that is varied by ``replace``."""


MINIMUM_CALLS = _NotGiven(10)


@dataclass(frozen=True, slots=True)
class CircuitBreakerConfig:
    """When a circuit opens, for how long, and when it closes again. Durations are seconds.

    Args:
        failure_threshold: failures in a row that open it; not used with *window*.
        recovery_timeout: how long it stays open; not used with *window*.
        success_threshold: probes in a row that must succeed in half-open before it closes.
        expected_exception: what counts as a failure; other errors count as neither failure nor success.
        window: judge the ratio of failures instead: over the last so many calls (an int, or "count" for 100), or the
            last so many seconds (a float, or "time" for 60.0).
        failure_ratio: share of failed calls in the window that opens it.
        slow_call_seconds: a call that took longer was slow; None: none is.
        slow_ratio: share of slow calls in the window that opens it.
        minimum_calls: on fewer calls in the window it never opens; 10, or as many as a smaller window holds.
        break_duration: how long it stays open the first time; doubled each time that a probe fails.
        max_break_duration: and never longer than this, except where the server's Retry-After says so.
        half_open_permits: how many probes may run at the same time.
        probe_seconds: after so long another call may take a probe's permit; None: *recovery_timeout*, or
            *max_break_duration* with a window.

    Raises:
        ConfigurationError: a number makes no sense, or a window of calls never holds as many as *minimum_calls*.
    """

    failure_threshold: int = 5
    recovery_timeout: float = 60.0
    success_threshold: int = 2
    expected_exception: ErrorTypes = Exception
    window: int | float | str | None = None
    failure_ratio: float = 0.5
    slow_call_seconds: float | None = None
    slow_ratio: float = 0.5
    minimum_calls: int = MINIMUM_CALLS
    break_duration: float = 5.0
    max_break_duration: float = 60.0
    half_open_permits: int = 1
    probe_seconds: float | None = None

    def __post_init__(self) -> None:
        for option in ("failure_threshold", "success_threshold", "minimum_calls", "half_open_permits"):
            count = getattr(self, option)
            if not is_count(count, 1):
                raise ConfigurationError(f"{option} is a number of calls, 1 or more, not {count!r}")
        for option in (
            "recovery_timeout",
            "break_duration",
            "max_break_duration",
            "slow_call_seconds",
            "probe_seconds",
        ):
            seconds = getattr(self, option)
            if seconds is not None and not _is_positive(seconds):
                raise ConfigurationError(f"{option} is a positive number of seconds, not {seconds!r}")
        for option in ("failure_ratio", "slow_ratio"):
            ratio = getattr(self, option)
            if not _is_positive(ratio) or ratio > 1:
                raise ConfigurationError(f"{option} is a share above 0 and up to 1, not {ratio!r}")
        if self.break_duration > self.max_break_duration:
            raise ConfigurationError("break_duration is longer than max_break_duration")
        window = self.window
        if not (window is None or window in ("count", "time") or _is_positive(window)) or (
            isinstance(window, int) and window > MAX_WINDOW
        ):
            raise ConfigurationError(
                f"window is a number of calls (100; at most {MAX_WINDOW:,}), of seconds (30.0), 'count' or 'time', "
                f"not {window!r}"
            )
        self._check_minimum(COUNT if window == "count" else window if isinstance(window, int) else None)
        kinds = self.expected_exception if isinstance(self.expected_exception, tuple) else (self.expected_exception,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise ConfigurationError(f"expected_exception takes exception types, not {self.expected_exception!r}")

    def _check_minimum(self, size: int | None) -> None:
        """See to it that a window of *size* calls, None for one of seconds, can open the circuit."""
        if isinstance(self.minimum_calls, _NotGiven):
            fitting = MINIMUM_CALLS if size is None else _NotGiven(min(MINIMUM_CALLS, size))
            object.__setattr__(self, "minimum_calls", fitting)
        elif size is not None and self.minimum_calls > size:
            raise ConfigurationError(
                f"a window of {size} calls never holds minimum_calls={self.minimum_calls}, so the circuit would never "
                f"open: write minimum_calls={size} or less, leave it out, or take a larger window"
            )


def _is_positive(number: object) -> bool:
    return is_number(number) and number > 0


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, CircuitBreakerConfig):
        raise ConfigurationError(
            f"config is a CircuitBreakerConfig, not {config!r}: "
            "write CircuitBreakerConfig(failure_threshold=3), or failure_threshold=3 as a keyword of its own"
        )


class Options(TypedDict, total=False):
    """The fields of :class:`CircuitBreakerConfig` as keywords."""

    failure_threshold: int
    recovery_timeout: float
    success_threshold: int
    expected_exception: ErrorTypes
    window: int | float | str | None
    failure_ratio: float
    slow_call_seconds: float | None
    slow_ratio: float
    minimum_calls: int
    break_duration: float
    max_break_duration: float
    half_open_permits: int
    probe_seconds: float | None


class CircuitHints(Protocol):
    """What other processes know of the same circuit; their word can open a closed circuit, never close an open one."""

    def open_until(self, circuit: str) -> float | None:
        """Return the wall-clock moment until which another process keeps *circuit* open. Must not block."""

    def opened(self, circuit: str, until: float) -> None:
        """Tell the others that *circuit* is open here until the wall-clock moment *until*. Must not block."""


# ---- decisions ------------------------------------------------------------------------------------------------------


class CountWindow:
    """Counts over the last *size* calls: ``calls``, and how many of them were ``failures`` and ``slow``."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._marks: deque[int] = deque(maxlen=size)  # 1 for failed, 2 for slow, 3 for both
        self.calls = self.failures = self.slow = 0

    def add(self, failed: bool, slow: bool, now: float) -> None:
        """Count a call, and forget the one that it pushes out."""
        marks = self._marks
        if self.calls == self._size:
            old = marks[0]
            if old:
                self.failures -= old & 1
                self.slow -= old >> 1
        else:
            self.calls += 1
        if failed or slow:
            marks.append(failed + 2 * slow)
            self.failures += failed
            self.slow += slow
        else:
            marks.append(0)

    def add_good(self, now: float) -> bool:
        """Count a call that was neither failed nor slow; return :attr:`settled`."""
        self.add(False, False, now)
        return self.settled

    @property
    def settled(self) -> bool:
        """Whether the window is full of good calls, so that one more of them changes nothing."""
        return self.calls == self._size and not self.failures and not self.slow

    def clear(self) -> None:
        """Forget all calls."""
        self._marks.clear()
        self.calls = self.failures = self.slow = 0


BUCKETS = 10


class TimeWindow:
    """Counts over the last *seconds*, in ten buckets: a call is forgotten at an age between 9/10 and the whole of it.

    ``calls``, ``failures`` and ``slow`` are right as of the last :meth:`add`.
    """

    failures: int
    slow: int
    settled: ClassVar[bool] = False  # each call counts, as those before it will be forgotten

    def __init__(self, seconds: float) -> None:
        self._width = seconds / BUCKETS
        self._newest = 0  # number of the newest bucket since the clock's zero
        self._turns_at = -math.inf
        self.clear()

    @property
    def calls(self) -> int:
        return self._earlier + self._bucket[0]

    def add(self, failed: bool, slow: bool, now: float) -> None:
        """Count a call, and forget what has grown too old."""
        if now >= self._turns_at:
            self._turn(now)
        bucket = self._bucket
        bucket[0] += 1
        if failed or slow:
            bucket[1] += failed
            bucket[2] += slow
            self.failures += failed
            self.slow += slow

    def add_good(self, now: float) -> bool:
        """Count a call that was neither failed nor slow; return :attr:`settled`."""
        if now >= self._turns_at:
            self._turn(now)
        self._bucket[0] += 1
        return False

    def _turn(self, now: float) -> None:
        number = int(now // self._width)
        for passed in range(max(self._newest + 1, number - BUCKETS + 1), number + 1):
            self._buckets[passed % BUCKETS] = [0, 0, 0]
        self._newest = max(self._newest, number)
        self._bucket = self._buckets[self._newest % BUCKETS]
        self._turns_at = (self._newest + 1) * self._width
        calls, self.failures, self.slow = map(sum, zip(*self._buckets, strict=True))
        self._earlier = calls - self._bucket[0]

    def clear(self) -> None:
        """Forget all calls."""
        self._buckets = [[0, 0, 0] for _ in range(BUCKETS)]  # calls, failures, slow
        self._bucket = self._buckets[self._newest % BUCKETS]  # the newest
        self._earlier = 0  # calls in the other buckets
        self.failures = self.slow = 0


def window_of(config: CircuitBreakerConfig) -> CountWindow | TimeWindow | None:
    """Make the window that *config* asks for."""
    window = config.window
    if window is None:
        return None
    if window == "count":
        return CountWindow(COUNT)
    if window == "time":
        return TimeWindow(SECONDS)
    return CountWindow(window) if isinstance(window, int) else TimeWindow(float(window))


def trips(config: CircuitBreakerConfig, calls: int, failures: int, slow: int) -> bool:
    """Decide whether a window with these counts opens the circuit."""
    if calls < config.minimum_calls:
        return False
    return failures >= config.failure_ratio * calls or slow >= config.slow_ratio * calls > 0


def break_for(config: CircuitBreakerConfig, opened_before: int, asked: float, chance: random.Random) -> float:
    """Decide for how long a circuit stays open that has opened *opened_before* times since it was last closed.

    With a window: doubled each time, up to a quarter longer at random so that the processes do not probe in step, and
    within [break_duration, max_break_duration]; or what the server *asked* for. Otherwise recovery_timeout.
    """
    if config.window is None:
        return config.recovery_timeout
    if asked > 0:
        return min(asked, LONGEST_WAIT)
    longest = max(config.break_duration, config.max_break_duration / 1.25)
    seconds = min(longest, config.break_duration * 2.0 ** min(opened_before, 1000))
    return min(config.max_break_duration, seconds * chance.uniform(1.0, 1.25))


_chance = random.Random()  # noqa: S311  # spreads load, guards nothing


_TIME_UP = (DeadlineExceededError, StepTimeoutError, asyncio.CancelledError)


def _was_before_call(error: BaseException) -> bool:
    """Say whether the time was up before the step was called: whoever raises such an error marks it ``before_call``."""
    if not isinstance(error, _TIME_UP):
        return False
    if came_before_call(error):
        return True
    cause = error.__cause__  # a wait that a limit around it has cut
    return isinstance(cause, asyncio.CancelledError) and came_before_call(cause)


def _shared(hints: Any) -> CircuitHints:
    """Return *hints*, or those in the Redis that it means.

    Raises:
        ConfigurationError: it is neither.
    """
    if callable(getattr(hints, "open_until", None)):
        return cast(CircuitHints, hints)
    from tta_sync.primitives.performance.in_redis import seam

    return cast(CircuitHints, seam().RedisCircuitHints(hints))


class CircuitBreakerPrimitive(WorkflowPrimitive[In, Out]):
    """Stop calling a step that keeps failing, and let a probe through later.

    Opens after *failure_threshold* failures in a row, stays open for *recovery_timeout* seconds, then lets one call at
    a time through (half-open), and closes when *success_threshold* of these have succeeded; a failed one opens it
    again. With ``window=`` it opens on the share of failed or slow calls instead, for a break that doubles from 5 to
    60 s.

    A failure is an error that matches *expected_exception*, and a call cut by a timeout or deadline around it. A
    cancellation by anybody else counts as nothing, and so does a rejection by a breaker, bulkhead or rate limit inside,
    or a deadline that passed before the step was called.
    Results of calls that began before the circuit last changed its state are discarded. One breaker may be shared by
    threads and loops; build one per dependency and keep it.

    Args:
        primitive: the step.
        config: a :class:`CircuitBreakerConfig`; its fields may be given as keywords as well.
        name: the circuit's name in errors and events; the step's by default.
        hints: through what processes tell each other of open circuits: a ``redis.Redis`` or ``redis.asyncio.Redis``
            client, a URL, a ``RedisBackend``, or a :class:`CircuitHints`. A circuit is known by its *name*.
        chance: the source of the jitter.

    Raises:
        CircuitOpenError: the circuit is open; ``retry_after`` is in seconds.
        ConfigurationError: an option makes no sense.

    Source: Nygard, *Release It!*; consecutive mode as TTA.dev's, window mode after Polly and resilience4j.
    """

    name: str
    peeks = True
    peek_raises = True

    def __init__(
        self,
        primitive: StepLike[In, Out],
        config: CircuitBreakerConfig | None = None,
        *,
        name: str | None = None,
        hints: Any = None,
        chance: random.Random | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        _check_config(config)
        try:
            self.config = replace(config or CircuitBreakerConfig(), **options)
        except TypeError as error:
            raise ConfigurationError(
                str(error).replace("CircuitBreakerConfig.__init__()", "a circuit breaker")
            ) from None
        self.name = name or call_name(self.primitive)
        self._hints: CircuitHints | None = None if hints is None else _shared(hints)
        self._shared_name = "" if hints is None else name or shared_name(self.primitive, "circuit breaker")
        self._chance = chance or _chance
        self._window = window_of(self.config)
        times_calls = self.config.slow_call_seconds is not None
        self._asks_first = hints is not None or times_calls
        self._window_of_good = None if times_calls else self._window
        self._window_tells_time = isinstance(self._window, TimeWindow)
        self._inner = self.primitive._run
        self._lock = threading.Lock()
        # All below is guarded by _lock; the fast path reads _generation, _state and _quiet without it.
        self._state = CLOSED
        self._generation = 0  # grows with each change of state
        self._quiet = self._window is None  # whether one more success in the closed state would change nothing
        self._failures = 0
        self._successes = 0
        self._opened = 0  # times since it was last closed
        self._open_until = 0.0  # on the call's clock; inf while forced open
        self._leases: dict[object, float] = {}  # half-open permits, with the moment at which each may be taken over
        self._last_error: BaseException | None = None
        renew_after_fork(self)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        config = self.config
        if config.window is None:
            return f"failure_threshold={config.failure_threshold}, recovery_timeout={config.recovery_timeout:g}"
        return f"window={config.window!r}, failure_ratio={config.failure_ratio:g}"

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        if direct and type(inner)._tta_kind == "fallback" and getattr(inner, "answers_all", True):
            return (
                f"the circuit breaker around {inner!r} never opens: the fallback answers first, and no failure is "
                "counted; put the breaker inside, FallbackPrimitive(CircuitBreakerPrimitive(primary), fallback)"
            )
        return None

    @property
    def state(self) -> CircuitState:
        """Where the circuit stands; an open one becomes half-open with the first call after its time."""
        return self._state

    @property
    def failure_count(self) -> int:
        """Failures in a row; with a window those in the window, and those that opened the circuit while it is open."""
        return self._failures

    @property
    def success_count(self) -> int:
        """Probes that have succeeded since the circuit became half-open."""
        return self._successes

    def reset(self) -> None:
        """Close the circuit and forget what was counted."""
        with self._lock:
            was = self._state
            self._close()
        self._tell_closed(was, None)

    def force_close(self) -> None:
        """Close the circuit now; it may open again. The same as :meth:`reset`."""
        self.reset()

    def force_open(self) -> None:
        """Open the circuit and keep it open until :meth:`force_close` or :meth:`reset`."""
        with self._lock:
            self._open(math.inf)
        self._tell_opened(self.config.recovery_timeout, None, None)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._leases.clear()

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        generation = self._generation  # before the state: what changes in between makes the result late, not wrong
        lease = None
        began = 0.0
        if self._state is not CLOSED or self._asks_first:
            began = context.clock.monotonic()
            generation, lease = self._admit(began, context)
        # What begins when its time is up already, as a clean-up does, is not cut by that.
        late = (_limit_around() is not None or context.deadline is not None) and cancel_reason(context) is not None
        inner = self._inner  # a local: called on self, it would first be looked for in the class
        try:
            result = await inner(data, context)
        except BaseException as error:
            cut = (
                isinstance(error, asyncio.CancelledError)
                and not late
                and not _was_before_call(error)
                and cancel_reason(context) is not None
            )
            self._ended(error, cut, generation, lease, began, context)
            raise
        # A step that swallowed its cancellation at a limit and returned something later on has failed all the same.
        cut = (
            (_limit_around() is not None or context.deadline is not None)
            and not late
            and cancel_reason(context) is not None
        )
        if cut or lease is not None:
            self._ended(None, cut, generation, lease, began, context)
        elif not self._quiet:
            self._succeeded(generation, began, context)
        return result

    # ---- before a call

    def _admit(self, now: float, context: WorkflowContext) -> tuple[int, object | None]:
        """Return the generation that the call belongs to, and its lease if it is a probe.

        Raises:
            CircuitOpenError: it is not let through.
        """
        hint = None
        half_opened = False
        if self._hints is not None:
            hint = self._hints.open_until(self._shared_name)
        with self._lock:
            if hint is not None and self._state is CLOSED:
                left = hint - context.clock.time()
                if left > 0:
                    self._open(now + min(left, LONGEST_WAIT))
            refusal = self._refusal(now)
            lease = None
            if refusal is None and self._state is not CLOSED:
                if self._state is OPEN:
                    self._state = HALF_OPEN
                    self._generation += 1
                    self._successes = 0
                    self._leases.clear()
                    half_opened = True
                for old, until in list(self._leases.items()):
                    if until <= now:
                        del self._leases[old]
                lease = object()
                self._leases[lease] = now + self._probe_seconds
            generation = self._generation
        if refusal is not None:
            raise self._rejected(refusal, context)
        if half_opened and events.bus.emit is not None:
            events.bus.emit(events.BreakerHalfOpened(step=self.name, correlation_id=context.correlation_id))
        return generation, lease

    @property
    def _probe_seconds(self) -> float:
        config = self.config
        if config.probe_seconds is not None:
            return config.probe_seconds
        return config.recovery_timeout if config.window is None else config.max_break_duration

    def _refusal(self, now: float) -> CircuitOpenError | None:
        """Make the error for a call that is not let through at *now*; None for one that is. Changes nothing."""
        if self._state is CLOSED:
            return None
        if self._state is OPEN:
            left = self._open_until - now
            if left <= 0:
                return None
            retry_after = self.config.recovery_timeout if left == math.inf else left
        else:
            held = [until for until in self._leases.values() if until > now]
            if len(held) < self.config.half_open_permits:
                return None
            retry_after = min(1.0, min(held) - now)  # the probe will have answered long before its lease ends
        return CircuitOpenError(self.name, retry_after, self._failures, self._last_error)

    def peek(self, data: In, context: WorkflowContext) -> Any:
        if self._state is CLOSED:
            return MISS
        with self._lock:
            refusal = self._refusal(context.clock.monotonic())
        if refusal is None:
            return MISS
        raise self._rejected(refusal, context)

    def _rejected(self, refusal: CircuitOpenError, context: WorkflowContext) -> CircuitOpenError:
        if events.bus.emit is not None:
            events.bus.emit(
                events.CallRejected(
                    step=self.name,
                    correlation_id=context.correlation_id,
                    by="circuit breaker",
                    retry_after=refusal.retry_after,
                )
            )
        return refusal

    # ---- after a call

    def _succeeded(self, generation: int, began: float, context: WorkflowContext) -> None:
        """Count a good call of the closed state."""
        window = self._window_of_good
        if window is not None:
            now = context.clock.monotonic() if self._window_tells_time else 0.0
            with self._lock:
                if generation != self._generation:
                    return
                if not window.failures and not window.slow:
                    self._quiet = window.add_good(now)
                    return
        self._ended(None, False, generation, None, began, context)

    def _ended(
        self,
        error: BaseException | None,
        cut: bool,
        generation: int,
        lease: object | None,
        began: float,
        context: WorkflowContext,
    ) -> None:
        """Count how a call ended, unless it is too late to matter; *cut*: by a timeout or deadline around it."""
        failed = slow = cut
        neutral = False
        if error is not None and not failed:
            failed = (
                isinstance(error, self.config.expected_exception)
                and isinstance(error, Exception)
                and not isinstance(error, REJECTIONS)
                and not _was_before_call(error)
            )
            neutral = not failed
        limit = self.config.slow_call_seconds
        now = context.clock.monotonic() if limit is not None or self._window_tells_time else 0.0
        if limit is not None and not neutral and now - began > limit:
            slow = True
        # Asked before the lock is taken: the answer comes from a stranger's object.
        asked = 0.0
        if error is not None and failed and self._window is not None:
            asked = retry_after_of(error, context.clock.time)
        opened_for = 0.0
        closed = False
        with self._lock:
            if generation != self._generation:
                return
            if self._state is CLOSED:
                if not neutral:
                    opened_for = self._count(error, failed, slow, now, asked, context)
            elif self._leases.pop(lease, None) is not None:
                if failed:
                    self._failures += 1
                    opened_for = self._open_after(error, asked, context)
                elif not neutral:
                    self._successes += 1
                    if self._successes >= self.config.success_threshold:
                        self._close()
                        closed = True
        if opened_for:
            self._tell_opened(opened_for, error, context)
        elif closed:
            self._tell_closed(HALF_OPEN, context)

    def _count(
        self,
        error: BaseException | None,
        failed: bool,
        slow: bool,
        now: float,
        asked: float,
        context: WorkflowContext,
    ) -> float:
        """Count a call of the closed state; return the seconds for which the circuit has opened, 0.0 if it has not."""
        window = self._window
        if window is None:
            self._failures = self._failures + 1 if failed else 0
            self._quiet = not failed
            opens = self._failures >= self.config.failure_threshold
        else:
            window.add(failed, slow, now)
            self._failures = window.failures
            self._quiet = window.settled and self.config.slow_call_seconds is None
            opens = (window.failures > 0 or window.slow > 0) and trips(
                self.config, window.calls, window.failures, window.slow
            )
        return self._open_after(error, asked, context) if opens else 0.0

    def _open_after(self, error: BaseException | None, asked: float, context: WorkflowContext) -> float:
        seconds = break_for(self.config, self._opened, asked, self._chance)
        if error is not None:
            self._last_error = error
        self._open(context.clock.monotonic() + seconds)
        return seconds

    def _open(self, until: float) -> None:
        self._state = OPEN
        self._generation += 1
        self._opened += 1
        self._open_until = until
        self._leases.clear()

    def _close(self) -> None:
        self._state = CLOSED
        self._generation += 1
        self._failures = self._successes = self._opened = 0
        self._leases.clear()
        self._last_error = None
        self._quiet = self._window is None
        if self._window is not None:
            self._window.clear()

    # ---- telling

    def _tell_opened(self, seconds: float, error: BaseException | None, context: WorkflowContext | None) -> None:
        if self._hints is not None and context is not None:
            self._hints.opened(self._shared_name, context.clock.time() + seconds)
        if events.bus.emit is not None:
            events.bus.emit(
                events.BreakerOpened(
                    step=self.name,
                    correlation_id=None if context is None else context.correlation_id,
                    failures=self._failures,
                    retry_after=seconds,
                    error=error,
                )
            )

    def _tell_closed(self, was: CircuitState, context: WorkflowContext | None) -> None:
        if was is not CLOSED and events.bus.emit is not None:
            events.bus.emit(
                events.BreakerClosed(step=self.name, correlation_id=None if context is None else context.correlation_id)
            )
