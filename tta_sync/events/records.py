"""The records themselves. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The root of all records. ``step`` names what it is about, ``correlation_id`` the call, where there is one."""

    step: str
    correlation_id: str | None = None


# ---- runtime -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStalled(Event):
    """Code in a coroutine has been blocking the loop for ``seconds``; ``where`` is the user's ``file:line``."""

    where: str
    seconds: float
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOrphaned(Event):
    """A call was left running because it did not end within the grace after its cancellation."""

    reason: str
    age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRestarted(Event):
    """The loop thread died with ``waiting`` calls in flight, all of which were told, and was replaced."""

    waiting: int
    error: BaseException | None = None


# ---- primitives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted(Event):
    """An instrumented step began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded(Event):
    """An instrumented step ended after ``seconds``, with ``error`` where it failed."""

    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(Event):
    """Attempt number ``attempt`` (from 1) failed with ``error``; the next begins in ``delay`` seconds."""

    attempt: int
    delay: float
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryExhausted(Event):
    """The last of ``attempts`` attempts failed with ``error``, which is raised; ``reason`` says why no more follow.

    ``code`` says it in one of a few fixed words, to count by: "no_attempts" (all are made), "no_time" (the wait does
    not fit), "fatal" (an error that no attempt mends, or that is not to be retried), "not_idempotent" (the step may
    have had its effect), "budget" (the retry budget is spent), "stop" (the ``stop`` of the Retry says so).
    """

    attempts: int
    error: BaseException
    reason: str
    code: str = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimedOut(Event):
    """A step was cancelled at its ``timeout``; ``detached`` when it swallowed the cancellation and runs on."""

    timeout: float
    detached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed(Event):
    """``failed`` raised ``error``, and ``used`` answers instead."""

    failed: str
    used: str
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerOpened(Event):
    """A circuit opened for ``retry_after`` seconds after ``failures`` failures."""

    failures: int
    retry_after: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerHalfOpened(Event):
    """A circuit lets a probe through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerClosed(Event):
    """A circuit closed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRejected(Event):
    """A breaker, bulkhead or rate limit turned a call away; ``by`` says which kind."""

    by: str
    retry_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeStarted(Event):
    """A second attempt was started because the first had not answered after ``delay`` seconds."""

    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationFailed(Event):
    """A saga's compensation raised ``error``."""

    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class MapProgressed(Event):
    """``done`` of ``total`` items of a map have ended, ``failed`` of them with an error."""

    done: int
    total: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHit(Event):
    """A value came from the cache; ``layer`` is "memory" or the store's name, ``stale`` when past its soft expiry."""

    layer: str = "memory"
    stale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMiss(Event):
    """Nothing usable was stored; ``reason`` is "absent", "expired", "corrupt" ..."""

    layer: str = "memory"
    reason: str = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStored(Event):
    """A fresh value was stored for ``ttl`` seconds."""

    ttl: float
    layer: str = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBypassed(Event):
    """The cache could not be used, and the step was called without it."""

    reason: str
    layer: str = "memory"


# ---- SQL -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionHeld(Event):
    """A transaction was kept open across an await for ``seconds``."""

    seconds: float
