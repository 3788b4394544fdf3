"""MockPrimitive and WorkflowTestCase."""

from __future__ import annotations

import asyncio
import unittest
from typing import Any
from unittest.mock import DEFAULT

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import step
from tta_sync.primitives.testing import MockPrimitive, WorkflowTestCase


def run(workflow: Any, data: Any = "x", context: WorkflowContext | None = None) -> Any:
    return asyncio.run(workflow.execute(data, context or WorkflowContext()))


async def doubled(data: Any, context: WorkflowContext) -> Any:
    return data * 2


# ---- what it answers ----------------------------------------------------------------------------------------------


def test_mock_returns_its_value() -> None:
    """Without anything else, every call returns return_value."""
    assert run(MockPrimitive()) is None
    assert run(MockPrimitive("m", return_value=4)) == 4
    assert repr(MockPrimitive("m")) == "m"


@pytest.mark.parametrize(
    "side_effect",
    [
        lambda data: data * 2,
        lambda data, context: data * 2,
        lambda context, data: data * 2,
        doubled,
        lambda data: doubled(data, WorkflowContext()),
    ],
)
def test_mock_computes_by_its_side_effect(side_effect: Any) -> None:
    """A function, plain or async, with or without the context, gives the result."""
    assert run(MockPrimitive(return_value="unused", side_effect=side_effect)) == "xx"


def test_mock_answers_from_an_iterable_one_by_one() -> None:
    """Each call takes the next result, or raises the next exception; one call too many says so."""
    error = ValueError("second")
    mock = MockPrimitive("m", side_effect=[1, error, KeyError])
    assert run(mock) == 1
    with pytest.raises(ValueError, match="second") as caught:
        run(mock)
    assert caught.value is error
    with pytest.raises(KeyError):
        run(mock)
    with pytest.raises(AssertionError, match="m was called 4 times; its side_effect has fewer answers"):
        run(mock)


@pytest.mark.parametrize("error", [ValueError("mine"), ValueError])
@pytest.mark.parametrize("argument", ["raise_error", "side_effect"])
def test_mock_raises_what_it_is_told(argument: str, error: Any) -> None:
    """An exception, or its class, is raised at every call; the call is still recorded."""
    mock = MockPrimitive(**{argument: error})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mine|"):
            run(mock)
    mock.assert_call_count(2)


def test_mock_is_refused_with_two_behaviours() -> None:
    """side_effect and raise_error together have no meaning."""
    with pytest.raises(ConfigurationError, match="not both"):
        MockPrimitive(side_effect=doubled, raise_error=ValueError())


@pytest.mark.parametrize("before", [None, doubled, [1], ValueError])
def test_side_effect_may_be_set_anew_at_any_time(before: Any) -> None:
    """A list, a function, an exception or nothing takes the place of what was there, as on unittest's mocks."""
    mock = MockPrimitive(return_value="value", side_effect=before)
    mock.side_effect = [7, DEFAULT, KeyError, 8]
    assert (run(mock), run(mock)) == (7, "value")
    with pytest.raises(KeyError):
        run(mock)
    assert next(mock.side_effect) == 8  # it stands at the next answer
    mock.side_effect = doubled
    assert run(mock) == "xx"
    mock.side_effect = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        run(mock)
    mock.side_effect = lambda data: DEFAULT
    assert run(mock) == "value"
    mock.side_effect = None
    assert run(mock) == "value"


def test_side_effect_that_is_none_is_refused_with_the_remedy() -> None:
    """A plain value belongs into return_value; and one beside raise_error would never be asked."""
    with pytest.raises(ConfigurationError, match="write return_value=5"):
        MockPrimitive(side_effect=5)  # type: ignore[arg-type]
    mock = MockPrimitive(raise_error=KeyError)
    with pytest.raises(ConfigurationError, match="set raise_error to None first"):
        mock.side_effect = [1]
    mock.raise_error = None
    mock.side_effect = [1]
    assert run(mock) == 1


# ---- what it remembers --------------------------------------------------------------------------------------------


def test_mock_remembers_its_calls() -> None:
    """Number, data and context of the calls, until reset."""
    mock, context = MockPrimitive("m"), WorkflowContext()
    assert (mock.call_count, mock.calls, mock.last_input, mock.last_context) == (0, [], None, None)
    run(step(str) >> mock, 1, context)
    run(mock, "second", context)
    assert mock.call_count == 2
    assert mock.calls == [("1", context), ("second", context)]
    assert mock.last_input == "second"
    assert mock.last_context is context
    mock.reset()
    assert mock.call_count == 0
    mock.assert_not_called()


def test_assertions_pass_when_they_hold() -> None:
    """Each assertion is silent about the truth."""
    mock, context = MockPrimitive("m"), WorkflowContext()
    mock.assert_not_called()
    run(mock, {"a": 1}, context)
    mock.assert_called()
    mock.assert_called_once()
    mock.assert_called_with({"a": 1})
    mock.assert_called_with({"a": 1}, context)
    mock.assert_called_once_with({"a": 1}, context)
    mock.assert_call_count(1)


@pytest.mark.parametrize(
    ("calls", "check", "message"),
    [
        (0, lambda m: m.assert_called(), "m was never called"),
        (0, lambda m: m.assert_called_once(), "called 0 times, not 1"),
        (0, lambda m: m.assert_called_with("x"), "never called"),
        (2, lambda m: m.assert_called_once(), "called 2 times, not 1"),
        (2, lambda m: m.assert_called_once_with("x"), "called 2 times, not 1"),
        (1, lambda m: m.assert_not_called(), "called 1 times, not 0"),
        (1, lambda m: m.assert_call_count(3), "called 1 times, not 3"),
        (1, lambda m: m.assert_called_with("y"), "last called with 'x', not 'y'"),
        (1, lambda m: m.assert_called_with("x", WorkflowContext()), "last called with WorkflowContext"),
    ],
)
def test_assertions_fail_with_what_was_and_what_should_be(calls: int, check: Any, message: str) -> None:
    """A failed assertion tells both."""
    mock = MockPrimitive("m")
    for _ in range(calls):
        run(mock)
    with pytest.raises(AssertionError, match=message):
        check(mock)


# ---- the test case ------------------------------------------------------------------------------------------------


def outcome(case: type[WorkflowTestCase]) -> unittest.TestResult:
    return unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())


def test_case_gives_each_test_a_context_of_its_own() -> None:
    """``self.context`` is fresh, and named after the test."""
    contexts: list[WorkflowContext] = []

    class Case(WorkflowTestCase):
        async def test_one(self) -> None:
            contexts.append(self.context)
            assert await MockPrimitive(return_value=1).execute("x", self.context) == 1

        async def test_two(self) -> None:
            contexts.append(self.context)

    assert outcome(Case).wasSuccessful()
    assert contexts[0] is not contexts[1]
    assert (contexts[0].workflow_id or "").endswith("test_one")


def test_case_fails_when_a_task_is_left_running() -> None:
    """The task is named, and ended, so that it troubles no other test."""
    ended: list[bool] = []

    class Case(WorkflowTestCase):
        async def test_leak(self) -> None:
            async def forever() -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.append(True)

            self.task = asyncio.create_task(forever(), name="the leak")
            await asyncio.sleep(0)

    result = outcome(Case)
    assert ended == [True]
    assert len(result.failures) == 1
    assert "the test left tasks running: the leak; await or cancel them" in result.failures[0][1]


def test_case_lets_the_tests_own_clean_ups_end_its_tasks() -> None:
    """A task that a clean-up cancels is no leak."""

    class Case(WorkflowTestCase):
        async def test_tidy(self) -> None:
            task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
            self.addCleanup(task.cancel)

    assert outcome(Case).wasSuccessful()


def test_names_load_from_where_the_seeds_import_them() -> None:
    """The package and its ``mocks`` module have both, and nothing that is not there."""
    from tta_sync.primitives import testing
    from tta_sync.primitives.testing import mocks

    assert mocks.MockPrimitive is testing.MockPrimitive
    assert mocks.WorkflowTestCase is testing.WorkflowTestCase is WorkflowTestCase
    for module in (mocks, testing):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            module.Nothing
