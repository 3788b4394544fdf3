"""Every error that tta_sync raises of its own accord.

TTASyncError
 ├ ConfigurationError (ValueError)         built wrong; raised at construction, says what to write instead
 ├ LoopUnavailableError (RuntimeError)     shut down, or dead
 │  └ WouldDeadlockError                   called from the loop thread / inside a running loop: await it there
 ├ NoCallerError (RuntimeError)            a caller step with nobody waiting in run_sync
 ├ SaturatedError (RuntimeError)           max_in_flight reached                       .retry_after
 ├ JobCancelledError                       somebody asked for the job's end            .job_id
 └ WorkflowError
    ├ StepTimeoutError (TimeoutError)      one step's own limit                        .step .timeout
    ├ DeadlineExceededError (TimeoutError) the whole call's                            .deadline
    ├ CircuitOpenError                     .circuit .retry_after .failure_count .last_error
    ├ BulkheadFullError, RateLimitedError                                              .retry_after
    ├ NoRouteError (ValueError)                                                        .key .routes
    ├ IdempotencyConflictError             another call with the key is at it          .key .retry_after
    ├ IdempotencyMismatchError (ValueError) the key was used for something else        .key
    └ SagaError (ExceptionGroup)           the step's error and the failed compensations

Errors of the user's own code pass through as themselves. Every class pickles, with its notes: RQ carries errors between
processes. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = [
    "BulkheadFullError",
    "CircuitBreakerError",
    "CircuitOpenError",
    "ConfigurationError",
    "DeadlineExceededError",
    "IdempotencyConflictError",
    "IdempotencyMismatchError",
    "JobCancelledError",
    "LoopUnavailableError",
    "NoCallerError",
    "NoRouteError",
    "RateLimitedError",
    "SagaError",
    "SaturatedError",
    "StepTimeoutError",
    "TTASyncError",
    "WorkflowError",
    "WouldDeadlockError",
]


class TTASyncError(Exception):
    """The root of the tree: whatever tta_sync itself refuses or gives up on."""


class ConfigurationError(TTASyncError, ValueError):
    """Something was built wrong; the message says what to write instead."""


class LoopUnavailableError(TTASyncError, RuntimeError):
    """The managed loop cannot take this call here or now."""


class WouldDeadlockError(LoopUnavailableError):
    """The call would wait for its own thread: a mistake in the program, and no sign that anything is down."""


class NoCallerError(TTASyncError, RuntimeError):
    """A step wants the caller's thread, and nobody waits there."""


class SaturatedError(TTASyncError, RuntimeError):
    """The facade already has as many calls in flight as it may have."""

    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(limit, retry_after)
        self.limit = limit
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.limit} calls are in flight, which is the limit; try again in {self.retry_after:g} s"


class JobCancelledError(TTASyncError):
    """A running job was cancelled because somebody asked for it; it ends as RQ's ``stopped`` and is not retried."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} was cancelled by request"


class WorkflowError(TTASyncError):
    """A primitive gave up on a step."""


class _TimeoutBase(WorkflowError, TimeoutError):
    """A TimeoutError is an OSError, which takes two arguments for errno and text: keep ours out of its reach."""

    before_call: bool = False
    """True: the time was up before the step was called, so the error tells nothing about the step."""

    _arguments: tuple[Any, ...]

    def __init__(self, message: str, *arguments: Any) -> None:
        super().__init__(message)
        self._arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return type(self), self._arguments, self.__dict__


class StepTimeoutError(_TimeoutBase):
    """A step ran longer than the limit that was set for it.

    ``step`` names it, ``timeout`` is the limit in seconds, ``detail`` says what else a reader must know (a thread that
    could not be interrupted, say).
    """

    def __init__(self, step: str, timeout: float, detail: str = "") -> None:
        super().__init__(f"{step} took longer than its {timeout:g} s{detail and '; ' + detail}", step, timeout, detail)
        self.step = step
        self.timeout = timeout
        self.detail = detail


class DeadlineExceededError(_TimeoutBase):
    """The deadline of the whole call has passed; ``deadline`` is the seconds it was set to, where that is known."""

    def __init__(self, deadline: float | None = None) -> None:
        of = "" if deadline is None else f" of {deadline:g} s"
        super().__init__(f"the call's deadline{of} has passed", deadline)
        self.deadline = deadline


_Late = TypeVar("_Late", bound=_TimeoutBase)


def not_called(error: _Late) -> _Late:
    """Mark *error* as raised before the step was called, and return it."""
    error.before_call = True
    return error


def came_before_call(error: BaseException) -> bool:
    """Say whether *error* is marked as raised before the step was called."""
    # Not by getattr: a stranger's error may have an opinion on any name, and raise it.
    return bool(object.__getattribute__(error, "__dict__").get("before_call"))


def was_called(error: BaseException) -> None:
    """Take back that *error* came before the call: not for what surrounds the step, which had called others by then."""
    if came_before_call(error):
        error.before_call = False  # type: ignore[attr-defined]


class CircuitOpenError(WorkflowError):
    """The circuit is open: the step was not called."""

    def __init__(
        self,
        circuit: str,
        retry_after: float = 0.0,
        failure_count: int = 0,
        last_error: BaseException | None = None,
    ) -> None:
        super().__init__(circuit, retry_after, failure_count, last_error)
        self.circuit = circuit
        self.retry_after = retry_after
        self.failure_count = failure_count
        self.last_error = last_error

    def __str__(self) -> str:
        failures = f"after {self.failure_count} failures"
        return f"circuit {self.circuit} is open {failures}; next try in {self.retry_after:.3g} s"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # The last error is any object of the user's: where it cannot cross to another process, its text does.
        state = {name: value for name, value in self.__dict__.items() if name != "last_error"}
        arguments = self.circuit, self.retry_after, self.failure_count, _portable(self.last_error)
        return type(self), arguments, state

    def __copy__(self) -> CircuitOpenError:  # within the process the last error goes as itself
        twin: CircuitOpenError = _twin(self, self.circuit, self.retry_after, self.failure_count, self.last_error)
        return twin


CircuitBreakerError = CircuitOpenError  # TTA.dev's name


def _portable(error: BaseException | None) -> BaseException | None:
    """Return *error* if it pickles, else one that tells what it was."""
    if error is None or _pickles(error):
        return error
    told = WorkflowError(f"{type(error).__qualname__}: {str(error)[:500]}")
    for note in getattr(error, "__notes__", ()):
        told.add_note(str(note))
    return told


def _twin(error: TTASyncError, *arguments: Any) -> Any:
    twin = type(error)(*arguments)
    twin.__dict__.update(error.__dict__)
    return twin


def _pickles(thing: object) -> bool:
    """Say whether *thing* comes through pickle."""
    import pickle

    try:
        pickle.loads(pickle.dumps(thing))  # noqa: S301  # our own bytes
    except Exception:
        return False
    return True


class BulkheadFullError(WorkflowError):
    """The bulkhead has no place for another call, nor in its queue."""

    def __init__(self, bulkhead: str, retry_after: float = 0.0) -> None:
        super().__init__(bulkhead, retry_after)
        self.bulkhead = bulkhead
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"bulkhead {self.bulkhead} is full; try again in {self.retry_after:.3g} s"


class RateLimitedError(WorkflowError):
    """The rate limit has no token left for this call."""

    def __init__(self, limiter: str, retry_after: float = 0.0) -> None:
        super().__init__(limiter, retry_after)
        self.limiter = limiter
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"rate limit {self.limiter} is spent; next call in {self.retry_after:.3g} s"


class NoRouteError(WorkflowError, ValueError):
    """The router's key matches no route and there is no default."""

    def __init__(self, key: object, routes: Sequence[str]) -> None:
        super().__init__(key, routes)
        self.key = key
        self.routes = routes

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # The key is any object of the user's: where it cannot cross to another process, its text does.
        key = self.key if _pickles(self.key) else repr(self.key)[:500]
        state = {name: value for name, value in self.__dict__.items() if name != "key"}
        return type(self), (key, self.routes), state

    def __copy__(self) -> NoRouteError:
        twin: NoRouteError = _twin(self, self.key, self.routes)
        return twin

    def __str__(self) -> str:
        return f"no route for {self.key!r}; the routes are {', '.join(map(repr, self.routes))}"


class IdempotencyConflictError(WorkflowError):
    """Another call with the same idempotency key is being worked on at this moment."""

    def __init__(self, key: str, retry_after: float = 1.0) -> None:
        super().__init__(key, retry_after)
        self.key = key
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"a call with the idempotency key {self.key!r} is in progress; try again in {self.retry_after:g} s"


class IdempotencyMismatchError(WorkflowError, ValueError):
    """The idempotency key was used before, for something else."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the idempotency key {self.key!r} was used for something else: use a new one"


class SagaError(WorkflowError, ExceptionGroup[Exception]):
    """A saga failed, and so did some of its compensations: the step's error first, then theirs."""

    def derive(self, excs: Sequence[Exception]) -> SagaError:  # type: ignore[override]  # same group, other members
        return SagaError(self.message, excs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # The members are the user's: one that cannot cross to another process goes as its text.
        return type(self), (self.message, [_portable(error) for error in self.exceptions]), self.__dict__

    def __copy__(self) -> SagaError:
        twin: SagaError = _twin(self, self.message, self.exceptions)
        return twin


def copy_error(error: BaseException) -> BaseException:
    """Return *error* for one more raiser: equal in type, arguments, attributes, notes, cause and traceback so far.

    For failures that several waiters share: each raises its own, so that no traceback mixes two threads. An error that
    cannot be copied is returned itself.
    """
    from copy import copy

    try:
        twin = copy(error)
    except Exception:  # whatever its __reduce__ or __init__ raises, it means: not to be copied
        return error
    if type(twin) is not type(error):
        return error
    try:
        notes = getattr(error, "__notes__", None)
        if notes is not None:
            twin.__notes__ = list(notes)
        twin.__cause__ = error.__cause__
        twin.__context__ = error.__context__
        twin.__suppress_context__ = error.__suppress_context__
    except Exception:  # its own __setattr__ refuses
        return error
    return twin.with_traceback(error.__traceback__)
