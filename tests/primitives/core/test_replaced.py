"""Whose ``execute`` runs: a mixin's, a patch's, a decorator's; and by which name events speak of it."""

from __future__ import annotations

import os.path
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest

from tta_sync import run_sync, step
from tta_sync.context import WorkflowContext
from tta_sync.primitives import MapPrimitive, RetryPrimitive, TimeoutPrimitive, WorkflowPrimitive
from tta_sync.primitives.core.base import as_primitive, takes_context
from tta_sync.primitives.performance.cache import CachePrimitive

RUNS = [
    pytest.param(lambda primitive: run_sync(primitive, 1), id="run_sync"),
    pytest.param(lambda primitive: run_sync(step(lambda data: data) >> primitive, 1), id="sequence"),
    pytest.param(lambda primitive: run_sync(primitive | primitive, 1)[0], id="parallel"),
    pytest.param(lambda primitive: run_sync(RetryPrimitive(primitive), 1), id="retry"),
    pytest.param(lambda primitive: run_sync(TimeoutPrimitive(primitive, 5.0), 1), id="timeout"),
    pytest.param(lambda primitive: primitive.run_sync(1), id="method"),
]


class Doubles(WorkflowPrimitive[int, Any]):
    async def execute(self, data: int, context: WorkflowContext) -> Any:
        return data * 2


class Mixin:
    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return "mixin", data


class Notes:
    """A mixin that goes on to whatever comes after it."""

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return "noted", await super().execute(data, context)  # type: ignore[misc]


class OfMixin(Mixin, WorkflowPrimitive[Any, Any]):
    pass


class OfMixinBelow(OfMixin):
    pass


class NotesFirst(Notes, Doubles):
    pass


class ContextFirstMixin:
    async def execute(self, context: WorkflowContext, data: Any) -> Any:
        return type(context).__name__, data


class OfContextFirstMixin(ContextFirstMixin, WorkflowPrimitive[Any, Any]):
    pass


class PrimitiveFirst(Doubles, Mixin):
    pass


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (OfMixin, ("mixin", 1)),
        (OfMixinBelow, ("mixin", 1)),
        (NotesFirst, ("noted", 2)),
        (OfContextFirstMixin, ("WorkflowContext", 1)),
        (PrimitiveFirst, 2),
    ],
)
def test_execute_of_a_mixin_runs_when_it_comes_first(run, kind, answer):
    """Python's method resolution decides, wherever the primitive stands."""
    assert run(kind()) == answer


def test_answer_of_the_parent_is_not_peeked_when_a_mixin_comes_before_it():
    """What the parent would answer from its memory is not what the mixin's execute does."""

    class Loud(Notes, CachePrimitive[Any, Any]):
        pass

    loud = Loud(step(lambda data: data), ttl=60)
    assert [run_sync(loud, 1) for _ in range(2)] == [("noted", 1)] * 2


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("whole", [False, True], ids=["the object's", "the class's"])
def test_patched_execute_runs_when_a_test_has_put_it_there(run, whole):
    """``patch.object(step, "execute", ...)`` holds for what is composed or run meanwhile, and no longer."""
    primitive = Doubles()
    with patch.object(Doubles if whole else primitive, "execute", AsyncMock(return_value="patched")):
        assert run(primitive) == "patched"
    assert run(primitive) == 2


def test_execute_runs_when_the_constructor_or_a_decorator_has_set_it():
    """An ``execute`` that is set in ``__init__``, or put in place by a class decorator, is the step's own."""

    class Sets(WorkflowPrimitive[Any, Any]):
        def __init__(self) -> None:
            self.execute = self.answer  # type: ignore[method-assign]

        async def answer(self, data: Any, context: WorkflowContext) -> Any:
            return "set", data

    def loud(kind: Any) -> Any:
        real = kind.execute

        async def execute(self: Any, data: Any, context: WorkflowContext) -> Any:
            return "loud", await real(self, data, context)

        kind.execute = execute
        return kind

    @loud
    class Decorated(Doubles):
        pass

    assert run_sync(Sets(), 1) == run_sync(as_primitive(Sets()) >> (lambda data: data), 1) == ("set", 1)
    assert run_sync(Decorated(), 1) == run_sync(RetryPrimitive(Decorated()), 1) == ("loud", 2)


def test_step_events_speak_of_the_call_when_it_is_wrapped(workflow_events):
    """``validate >> Retry(fetch)`` tells of validate and of fetch, in a sequence, a parallel and a map."""

    @step(name="fetch")
    def fetch(data: Any) -> Any:
        return data

    validate = step(lambda data: data, name="validate")
    run_sync(validate >> RetryPrimitive(fetch) >> MapPrimitive(RetryPrimitive(fetch)), [1])
    run_sync(validate | RetryPrimitive(fetch), 1)
    names = {event.step for event in workflow_events}
    assert {"validate", "fetch"} <= names
    assert not any("Retry" in name for name in names), names


@pytest.mark.parametrize("function", [os.path.join, lambda data, *rest: (data, rest)])
def test_function_gets_the_data_alone_when_only_that_is_asked_for(function):
    """``f(data, *rest)`` is called with the data: a context among *rest* would be a surprise."""
    assert not takes_context(function)
    assert takes_context(lambda *arguments: arguments)
