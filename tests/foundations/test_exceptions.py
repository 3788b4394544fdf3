"""The error tree: families, data, text, and the way through pickle."""

from __future__ import annotations

import copy
import pickle

import pytest

from tta_sync import exceptions
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitBreakerError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    IdempotencyConflictError,
    IdempotencyMismatchError,
    JobCancelledError,
    LoopUnavailableError,
    NoCallerError,
    NoRouteError,
    RateLimitedError,
    SagaError,
    SaturatedError,
    StepTimeoutError,
    TTASyncError,
    WorkflowError,
    WouldDeadlockError,
    copy_error,
)

# One of each: the error, its other family, its text, and the data that it carries.
ERRORS: list[tuple[TTASyncError, type[BaseException], str, dict[str, object]]] = [
    (ConfigurationError("write it so"), ValueError, "write it so", {}),
    (LoopUnavailableError("shut down"), RuntimeError, "shut down", {}),
    (WouldDeadlockError("await it"), LoopUnavailableError, "await it", {}),
    (NoCallerError("nobody waits"), RuntimeError, "nobody waits", {}),
    (
        SaturatedError(10, 0.5),
        RuntimeError,
        "10 calls are in flight, which is the limit; try again in 0.5 s",
        {"limit": 10, "retry_after": 0.5},
    ),
    (JobCancelledError("id-1"), TTASyncError, "job id-1 was cancelled by request", {"job_id": "id-1"}),
    (
        StepTimeoutError("fetch", 2.0, "a thread runs on"),
        TimeoutError,
        "fetch took longer than its 2 s; a thread runs on",
        {"step": "fetch", "timeout": 2.0, "detail": "a thread runs on", "errno": None},
    ),
    (
        DeadlineExceededError(5.0),
        TimeoutError,
        "the call's deadline of 5 s has passed",
        {"deadline": 5.0, "errno": None},
    ),
    (DeadlineExceededError(), TimeoutError, "the call's deadline has passed", {"deadline": None}),
    (
        CircuitOpenError("llm", 12.345, 5, ValueError("last")),
        WorkflowError,
        "circuit llm is open after 5 failures; next try in 12.3 s",
        {"circuit": "llm", "retry_after": 12.345, "failure_count": 5},
    ),
    (
        BulkheadFullError("llm", 0.5),
        WorkflowError,
        "bulkhead llm is full; try again in 0.5 s",
        {"bulkhead": "llm", "retry_after": 0.5},
    ),
    (
        RateLimitedError("llm", 0.5),
        WorkflowError,
        "rate limit llm is spent; next call in 0.5 s",
        {"limiter": "llm", "retry_after": 0.5},
    ),
    (
        NoRouteError("z", ["x", "y"]),
        ValueError,
        "no route for 'z'; the routes are 'x', 'y'",
        {"key": "z", "routes": ["x", "y"]},
    ),
    (
        IdempotencyConflictError("k", 0.5),
        WorkflowError,
        "a call with the idempotency key 'k' is in progress; try again in 0.5 s",
        {"key": "k", "retry_after": 0.5},
    ),
    (
        IdempotencyMismatchError("k"),
        ValueError,
        "the idempotency key 'k' was used for something else: use a new one",
        {"key": "k"},
    ),
    (
        SagaError("order failed", [ValueError("step"), KeyError("undo")]),
        ExceptionGroup,
        "order failed (2 sub-exceptions)",
        {},
    ),
]


@pytest.mark.parametrize(("error", "family", "text", "data"), ERRORS, ids=lambda value: type(value).__name__)
def test_error_carries_its_data_through_pickle(
    error: TTASyncError, family: type[BaseException], text: str, data: dict[str, object]
) -> None:
    """Type, text, data and notes are the same in the process that reads it, and in a copy."""
    error = copy.copy(error)
    error.add_note("in step 1 of 2: fetch")
    for same in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(same) is type(error)
        assert isinstance(same, TTASyncError)
        assert isinstance(same, family)
        assert str(same) == text
        assert same.__notes__ == ["in step 1 of 2: fetch"]
        assert {name: getattr(same, name) for name in data} == data
    if isinstance(error, CircuitOpenError):
        assert str(pickle.loads(pickle.dumps(error)).last_error) == "last"


def test_every_error_is_in_the_table() -> None:
    """The table above has one of each, and the module exports them all."""
    errors = {name for name, value in vars(exceptions).items() if isinstance(value, type) and not name.startswith("_")}
    assert set(exceptions.__all__) == errors - {"Any", "Callable", "Sequence", "TypeVar"}
    abstract = {"TTASyncError", "WorkflowError", "CircuitBreakerError"}
    assert {type(error).__name__ for error, *_ in ERRORS} == set(exceptions.__all__) - abstract
    assert CircuitBreakerError is CircuitOpenError


def test_defaults_of_the_circuit_error() -> None:
    """Only the circuit's name is needed."""
    error = CircuitOpenError("llm")
    assert (error.retry_after, error.failure_count, error.last_error) == (0.0, 0, None)


def test_saga_error_splits_into_its_own_kind() -> None:
    """What is left of a group after ``except*`` took its share is a SagaError still."""
    taken, left = SagaError("order failed", [ValueError("step"), KeyError("undo")]).split(KeyError)
    assert isinstance(taken, SagaError)
    assert isinstance(left, SagaError)
    assert [str(error) for error in left.exceptions] == ["step"]


def test_error_pickles_whatever_of_the_users_it_holds() -> None:
    """What cannot cross to another process goes as its text; what can, as itself. Notes come along."""

    class Local(Exception):  # defined in a function: no other process can find it
        pass

    lost = Local("undo")
    lost.add_note("in the compensation of step 1 of 2: book")
    group = SagaError("order failed", [ValueError("step"), lost])
    group.add_note("mine")
    there = pickle.loads(pickle.dumps(group))
    step_error, undo_error = there.exceptions
    assert isinstance(there, SagaError)
    assert there.__notes__ == ["mine"]
    assert isinstance(step_error, ValueError)
    assert isinstance(undo_error, WorkflowError)
    assert str(undo_error).endswith("Local: undo")
    assert undo_error.__notes__ == lost.__notes__

    key = Local
    route = pickle.loads(pickle.dumps(NoRouteError(key, ["x"])))
    assert isinstance(route, NoRouteError)
    assert str(route).startswith("no route for ")
    assert "Local" in route.key


def test_copy_within_the_process_keeps_what_cannot_be_pickled() -> None:
    """A copy is for another raiser here: members, key and last error are the objects themselves."""

    class Local(Exception):
        pass

    lost = Local("undo")
    circuit, route = CircuitOpenError("llm", 1.0, 5, lost), NoRouteError(Local, ["x"])
    saga = SagaError("order failed", [lost])
    saga.add_note("mine")
    for make in copy.copy, copy_error:
        same: BaseException = make(saga)
        assert isinstance(same, SagaError)
        assert (same.exceptions, same.message, same.__notes__) == ((lost,), "order failed", ["mine"])
        same = make(circuit)
        assert isinstance(same, CircuitOpenError)
        assert (same.last_error, str(same)) == (lost, str(circuit))
        same = make(route)
        assert isinstance(same, NoRouteError)
        assert (same.key, same.routes) == (Local, ["x"])


# ---- a copy for one more raiser -----------------------------------------------------------------------------------


def test_copy_of_an_error_is_equal_and_its_own() -> None:
    """Type, arguments, attributes, notes, causes and traceback are there; what one raiser adds, the other has not."""
    try:
        try:
            raise KeyError("before")
        except KeyError as before:
            raise StepTimeoutError("fetch", 2.0) from before
    except StepTimeoutError as caught:
        error = caught
    error.add_note("mine")
    twin = copy_error(error)
    assert isinstance(twin, StepTimeoutError)
    assert twin is not error
    assert (str(twin), twin.step, twin.__notes__) == (str(error), "fetch", ["mine"])
    assert twin.__cause__ is error.__cause__
    assert twin.__context__ is error.__context__
    assert twin.__suppress_context__
    assert twin.__traceback__ is error.__traceback__
    twin.add_note("another")
    assert error.__notes__ == ["mine"]
    assert not hasattr(copy_error(ValueError("plain")), "__notes__")


def test_error_that_cannot_be_copied_is_returned_itself() -> None:
    """Whether copying raises or gives something else, the caller gets the error that happened."""

    class Stubborn(Exception):
        def __reduce__(self) -> str:
            raise TypeError("not me")

    class Shifty(Exception):
        def __reduce__(self) -> tuple[type, tuple[str]]:
            return ValueError, ("someone else",)

    for error in Stubborn("a"), Shifty("b"):
        assert copy_error(error) is error
