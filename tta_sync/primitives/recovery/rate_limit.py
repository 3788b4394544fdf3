"""No more calls than a dependency allows."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Literal, NamedTuple, Protocol, cast

from tta_sync import events
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, RateLimitedError, not_called
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive, step_name, takes_context
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import is_async, is_count, is_number
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.line import Line, Place, lead
from tta_sync.primitives.recovery.naming import call_name, shared_name

MAX_KEYS = 100_000
_PLAIN_KEYS = frozenset({str, int, tuple, bytes, type(None)})
"""What keys mostly are: no need to ask whether they are to be awaited."""
SLACK = 1e-9
"""Seconds by which a call may come too early: whoever waits exactly as long as he was told must not be refused because
of the last bit of a float."""


def decide(arrival: float, now: float, interval: float, tolerance: float) -> tuple[float, float]:
    """Decide on a call at *now* by GCRA: return (seconds to wait, the *arrival* to keep if the call is made now).

    *arrival* is the theoretical arrival time of the next call, *interval* the seconds between two calls at the steady
    rate, *tolerance* ``(burst - 1) * interval``. In any t seconds at most ``burst + t / interval`` calls go through.
    """
    due = arrival if arrival > now else now
    wait = due - now - tolerance
    return (wait if wait > SLACK else 0.0), due + interval


class Verdict(NamedTuple):
    """What a limit says of one call, and what it tells the caller about the next ones."""

    wait: float
    """Seconds until the call may be made; 0.0: it was let through."""
    remaining: int
    """Calls that may follow at once."""
    reset: float
    """Seconds until there is one more than *remaining*; *wait* for a call that was refused."""


def verdict(wait: float, ahead: float, interval: float, burst: int) -> Verdict:
    """Say what a decision means to the caller; *ahead* is how far after now the arrival lies that is kept."""
    if wait:
        return Verdict(wait, 0, wait)
    remaining = max(0, math.floor(burst - ahead / interval + 1e-6))  # the last bits of a float take no call away
    return Verdict(0.0, remaining, max(0.0, ahead - (burst - remaining - 1) * interval))


class Limit:
    """The state of one limit, guarded by the primitive's lock."""

    __slots__ = ("arrival", "line")

    def __init__(self) -> None:
        self.arrival = -math.inf
        self.line: Line = deque()  # "wait" mode; only the first place in it watches the clock


class RateStore(Protocol):
    """A rate limit that processes share: GCRA on the store's own clock."""

    async def take(self, limiter: str, key: str, rate: float, burst: int, context: WorkflowContext) -> float:
        """Take a token and return 0.0, or take none and return the seconds until there will be one.

        Raises:
            ConnectionError, TimeoutError: the store cannot be asked; the primitive falls back as configured.
        """


class RateLimitPrimitive(WorkflowPrimitive[In, Out]):
    """Call a step at most *rate* times per second, after a burst of *burst*.

    Safe from many threads and loops: one primitive is one limit. The order of waiting calls is that of their coming.

    Args:
        primitive: the step.
        rate: calls per second; may be less than 1.
        burst: how many calls may come at once after a pause.
        key: a plain function of ``(data, context)`` or ``(data)``: a limit for each value it returns; None: one for
            all.
        mode: "reject" raises when the limit is reached; "wait" waits for the call's turn, if that comes before the
            call's deadline and the timeouts around it.
        store: what the processes that share the limit have in common: a ``redis.Redis`` or ``redis.asyncio.Redis``
            client, a URL, a ``RedisBackend``, or a :class:`RateStore`. The limit is then known by its *name*.
        fail: what holds while the store is down: "local", the limit of this process at *rate* / *workers*; "open",
            none; "closed": every call is rejected.
        workers: how many processes share the store; None: what WEB_CONCURRENCY says, else 1.

    Raises:
        RateLimitedError: the limit is reached, or the wait would be too long; ``retry_after`` is in seconds.
        DeadlineExceededError: the call's deadline passed while it waited.
        ConfigurationError: an option makes no sense, *key* returned something to await.

    Source: GCRA, ITU-T I.371; the choice of ``fail`` after Stripe's limiter.
    """

    name: str

    def __init__(
        self,
        primitive: StepLike[In, Out],
        rate: float,
        burst: int = 1,
        key: Callable[..., Hashable] | None = None,
        mode: Literal["reject", "wait"] = "reject",
        *,
        store: Any = None,
        fail: Literal["local", "open", "closed"] = "local",
        workers: int | None = None,
        name: str | None = None,
    ) -> None:
        if not (is_number(rate) and rate > 0):
            raise ConfigurationError(f"rate is a positive number of calls per second, not {rate!r}")
        for option, count in (("burst", burst), ("workers", 1 if workers is None else workers)):
            if not is_count(count, 1) or not is_number(count):
                raise ConfigurationError(f"{option} is a whole number, 1 or more, not {count!r}")
        if mode not in ("reject", "wait"):
            raise ConfigurationError(f'mode is "reject" or "wait", not {mode!r}')
        if fail not in ("local", "open", "closed"):
            raise ConfigurationError(f'fail is "local", "open" or "closed", not {fail!r}')
        if key is not None and not callable(key):
            raise ConfigurationError(f"key is a function of (data, context), not {key!r}: write key=lambda data: ...")
        if key is not None and is_async(key):
            raise ConfigurationError(
                f"key={step_name(key)} is async, and each of its coroutines would be a key of its own: make it a plain "
                "function, and find out what it needs in a step before"
            )
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.rate = float(rate)
        self.burst = burst
        self.mode = mode
        self.name = name or call_name(self.primitive)
        self._key = key
        self._key_takes_context = key is not None and takes_context(key)
        self._waits = mode == "wait"
        self._store: RateStore | None = None if store is None else _shared(store)
        self._shared_name = "" if store is None else name or shared_name(self.primitive, "rate limit")
        self._fail = fail
        # Alone, this process may use the whole rate; where it stands in for the store, its share.
        self._interval = (1 if store is None else workers or expected_workers()) / self.rate
        self._tolerance = (burst - 1) * self._interval
        self._inner = self.primitive._run
        self._lock = threading.Lock()
        # Without a key, in "reject" mode: who has popped the only entry, the arrival, owns it. Cheaper than a lock.
        self._baton = [-math.inf]
        self._limit = Limit()  # what there is without a key otherwise
        self._limits: OrderedDict[Hashable, Limit] = OrderedDict()  # guarded by _lock; longest unused first
        self._plain = key is None and store is None and not self._waits
        renew_after_fork(self)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        return f"rate={self.rate:g}, burst={self.burst}" + (', mode="wait"' if self._waits else "")

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        if not self._baton:
            self._baton.append(-math.inf)
        for limit in (self._limit, *self._limits.values()):
            limit.line.clear()

    def _run(self, data: In, context: WorkflowContext) -> Coroutine[Any, Any, Out]:
        # Not `async def`, which would cost a second frame: the step's own coroutine is what the caller awaits.
        if not self._plain:
            return self._limited(data, context)
        now = context.clock.monotonic()
        baton = self._baton
        try:
            arrival = baton.pop()
        except IndexError:
            arrival = self._wait_for_baton(now)
        if arrival < now:  # decide(), spelled out: this is what each call pays
            arrival = now
        early = arrival - now - self._tolerance
        if early <= SLACK:
            baton.append(arrival + self._interval)
            inner = self._inner  # a local: called on self, it would first be looked for in the class
            return inner(data, context)
        baton.append(arrival)
        return self._refuse(early, context)

    def _wait_for_baton(self, now: float) -> float:
        """Take the baton from the thread that has it, which needs it for a microsecond."""
        give_up = time.monotonic() + 1.0
        while time.monotonic() < give_up:
            time.sleep(0)  # lets the other thread run
            try:
                return self._baton.pop()
            except IndexError:
                pass
        return now  # a signal has struck between its taking and giving back, and it is lost: begin anew

    async def _refuse(self, wait: float, context: WorkflowContext) -> Out:
        raise self._refusal(wait, context)

    async def _limited(self, data: In, context: WorkflowContext) -> Out:
        key = self._key_of(data, context)
        try:
            if self._store is None:
                await self._take(key, context)
            else:
                await self._ask(self._store, key, context)
        except asyncio.CancelledError as cancelled:
            cancelled.before_call = True  # type: ignore[attr-defined]  # a breaker around asks: nothing has failed
            raise
        return await self._inner(data, context)

    def _key_of(self, data: In, context: WorkflowContext) -> Hashable:
        key = self._key
        if key is None:
            return None
        answer: Any = key(data, context) if self._key_takes_context else key(data)
        if type(answer) not in _PLAIN_KEYS and inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()  # else Python complains that nobody awaited it
            raise ConfigurationError(
                f"the key of the rate limit {self.name} is a {type(answer).__qualname__}, new for each call, so that "
                "nothing would be limited: key= takes a plain function that returns the key itself"
            )
        return cast(Hashable, answer)

    # ---- this process alone

    async def _take(self, key: Hashable, context: WorkflowContext) -> None:
        """Take a token of the limit of *key*, at once or in turn.

        Raises:
            RateLimitedError: there is none, and no turn in time.
        """
        clock = context.clock
        end = cut_off(context) if self._waits else -math.inf
        place = None
        with self._lock:
            now = clock.monotonic()
            limit = self._limit_of(key, now)
            line = limit.line
            lead(line)
            wait, arrival = decide(limit.arrival, now, self._interval, self._tolerance)
            if not wait and not line:
                limit.arrival = arrival
                return
            wait += len(line) * self._interval  # those before it come first
            if end is None or now + wait < end:
                place = Place()
                place.called = not line
                line.append(place)
        if place is None:
            raise self._refusal(wait, context)
        try:
            while True:
                with self._lock:
                    if place.passed_over:
                        place.line_up_again(line)
                        lead(line)
                    now = clock.monotonic()
                    wait, arrival = decide(limit.arrival, now, self._interval, self._tolerance)
                    in_time = end is None or now + wait < end
                    if place.called and not wait and in_time:
                        limit.arrival = arrival
                        return
                if not in_time:  # those before it were late, or the loop was
                    if context.deadline is not None and context.deadline.at <= now:
                        raise not_called(DeadlineExceededError(context.deadline.seconds))
                    raise self._refusal(wait, context)
                if place.called:
                    await clock.sleep(wait)
                else:
                    await place.wait(clock, end)
                end = cut_off(context)  # later, once a step which has started this task has ended
        finally:
            with self._lock:
                if place in line:
                    line.remove(place)
                lead(line)

    def _limit_of(self, key: Hashable, now: float) -> Limit:
        """Return the state for *key*. The lock is held."""
        if self._key is None:
            return self._limit
        limits = self._limits
        limit = limits.get(key)
        if limit is not None:
            limits.move_to_end(key)
            return limit
        for oldest in list(itertools.islice(limits, 2)):
            # One whose burst is whole again is as good as a new one: two out for one in keeps the number down.
            state = limits[oldest]
            if not state.line and (state.arrival <= now or len(limits) >= MAX_KEYS):
                del limits[oldest]
        limit = limits[key] = Limit()
        return limit

    # ---- shared with other processes

    async def _ask(self, store: RateStore, key: Hashable, context: WorkflowContext) -> None:
        """Take a token from the shared limit.

        Raises:
            RateLimitedError: there is none, and none in time.
        """
        clock = context.clock
        end = cut_off(context) if self._waits else -math.inf
        name = "" if self._key is None else spelled(key)
        while True:
            try:
                wait = await store.take(self._shared_name, name, self.rate, self.burst, context)
            except OSError:  # builtin ConnectionError and TimeoutError
                if self._fail == "open":
                    return
                if self._fail == "closed":
                    raise self._refusal(1.0 / self.rate, context) from None
                await self._take(key, context)
                return
            if wait <= 0.0:
                return
            if end is not None and clock.monotonic() + wait >= end:
                raise self._refusal(wait, context)
            await clock.sleep(wait)

    def _refusal(self, wait: float, context: WorkflowContext) -> RateLimitedError:
        if events.bus.emit is not None:
            events.bus.emit(
                events.CallRejected(
                    step=self.name, correlation_id=context.correlation_id, by="rate limit", retry_after=wait
                )
            )
        return RateLimitedError(self.name, wait)


def expected_workers() -> int:
    """Return how many processes serve beside this one, itself included, as far as gunicorn's own variable says."""
    said = os.environ.get("WEB_CONCURRENCY", "")
    return max(1, int(said)) if said.isascii() and said.isdigit() and len(said) < 6 else 1


def _shared(store: Any) -> RateStore:
    """Return *store*, or the one in the Redis that it means.

    Raises:
        ConfigurationError: it is neither.
    """
    if callable(getattr(store, "take", None)):
        return cast(RateStore, store)
    from tta_sync.primitives.performance.in_redis import seam

    return cast(RateStore, seam().RedisRateStore(store))


def spelled(key: Hashable) -> str:
    """Spell *key* the same in every process.

    Raises:
        TypeError: that cannot be done for its type.
    """
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if part is not None and not isinstance(part, (str, int, float, bytes)):
            raise TypeError(
                f"a rate limit shared by processes needs a key of str, int, float or bytes, or a tuple of these, "
                f"not {type(part).__qualname__}: return its id, say"
            )
    return repr(key)
