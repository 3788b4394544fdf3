"""Conditional, Switch and Router: one step of several."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError, NoRouteError
from tta_sync.primitives.core.base import step
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive, SwitchPrimitive
from tta_sync.testing import FakeClock

one, two = step(lambda data: f"one {data}", name="one"), step(lambda data: f"two {data}", name="two")


async def says_no(data: Any, context: WorkflowContext) -> bool:
    return False


class AsyncNo:
    async def __call__(self, data: Any) -> bool:
        return False


def run(workflow: Any, data: Any = "x", context: WorkflowContext | None = None) -> Any:
    return asyncio.run(workflow.execute(data, context or WorkflowContext()))


# ---- Conditional ----------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "result"),
    [
        (lambda data, context: True, "one x"),
        (lambda data, context: context.state.get("no"), "two x"),
        (lambda data: data == "x", "one x"),
        (lambda data: [], "two x"),
        (says_no, "two x"),
        (lambda data, context: says_no(data, context), "two x"),
        (AsyncNo(), "two x"),
        (step(says_no), "two x"),
    ],
)
def test_condition_decides_when_it_is_plain_or_async(condition: Any, result: str) -> None:
    """An async condition is awaited, not taken for true; data and context reach it."""
    assert run(ConditionalPrimitive(condition, one, two)) == result


def test_input_passes_through_when_there_is_no_else() -> None:
    """Without an else the data comes out as it went in."""
    data = object()
    assert run(ConditionalPrimitive(says_no, one), data) is data


def test_conditional_takes_functions_and_keywords_of_the_contract() -> None:
    """The parts may be plain functions, and have the names of the contract."""
    flow = ConditionalPrimitive(
        condition=lambda data: data > 0, then_primitive=lambda data: "up", else_primitive=lambda data: "down"
    )
    assert run(flow, 1) == "up"
    assert run(flow, -1) == "down"
    assert repr(flow) == "Conditional(if <lambda>: <lambda>, else <lambda>)"


def test_error_of_the_condition_comes_through() -> None:
    """A condition that fails fails the step."""
    with pytest.raises(ZeroDivisionError):
        run(ConditionalPrimitive(lambda data: 1 / 0, one))


# ---- Switch ----------------------------------------------------------


async def choose(data: Any, context: WorkflowContext) -> Any:
    return data


@pytest.mark.parametrize("selector", [lambda data, context: data, lambda data: data, choose])
def test_selector_names_the_case(selector: Any) -> None:
    """The case with the selector's key runs; keys may be anything hashable."""
    flow = SwitchPrimitive(selector, {"x": one, 2: two})
    assert run(flow, "x") == "one x"
    assert run(flow, 2) == "two 2"


def test_switch_without_a_match_takes_the_default_or_passes_through() -> None:
    """A default step catches the rest; without one the input comes out."""
    assert run(SwitchPrimitive(choose, {"a": one}, default=two)) == "two x"
    assert run(SwitchPrimitive(choose, {"a": one})) == "x"
    assert run(SwitchPrimitive(selector=choose, cases={})) == "x"
    assert repr(SwitchPrimitive(choose, {"a": one}, default=two)) == "Switch(choose, {'a': one}, else two)"


# ---- Router ----------------------------------------------------------


@pytest.mark.parametrize("router_fn", [lambda data, context: data, lambda data: data, choose])
def test_router_takes_the_route_and_writes_it_down(router_fn: Any) -> None:
    """Each decision stands in the routing history with its time."""
    context = WorkflowContext(clock=FakeClock(epoch=1000.0))
    flow = RouterPrimitive({"x": one, "y": two}, router_fn, default="y")
    assert run(flow, "x", context) == "one x"
    assert run(flow, "z", context) == "two z"
    assert context.state["routing_history"] == [
        {"route": "x", "used_default": False, "timestamp": 1000.0},
        {"route": "y", "used_default": True, "timestamp": 1000.0},
    ]


def test_router_without_a_route_names_those_there_are() -> None:
    """No route and no default is a NoRouteError, which is a ValueError, and nothing is written down."""
    context = WorkflowContext()
    with pytest.raises(NoRouteError, match="no route for 'z'; the routes are 'x', 'y'") as caught:
        run(RouterPrimitive(routes={"x": one, "y": two}, router_fn=choose), "z", context)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.key, caught.value.routes) == ("z", ["x", "y"])
    assert "routing_history" not in context.state


def test_router_is_refused_when_its_routes_cannot_work() -> None:
    """No routes, or a default that is none of them, is an error at construction."""
    with pytest.raises(ConfigurationError, match="at least one route"):
        RouterPrimitive({}, choose)
    with pytest.raises(ConfigurationError, match="default='z' is no route; it is a key of routes: 'x'"):
        RouterPrimitive({"x": one}, choose, default="z")
    with pytest.raises(ConfigurationError, match="cannot be a step"):
        RouterPrimitive({"x": 4}, choose)  # type: ignore[dict-item]


def test_repr_shows_the_routes() -> None:
    """Keys, steps and default are readable."""
    assert repr(RouterPrimitive({"x": one}, choose)) == "Router(choose, {'x': one})"
    assert repr(RouterPrimitive({"x": one}, choose, default="x")) == "Router(choose, {'x': one}, default='x')"


def test_answer_that_can_be_no_key_is_refused() -> None:
    """A list, say: the error names the function that returned it."""

    def choose(data: Any) -> list[str]:
        return ["x"]

    for flow in SwitchPrimitive(choose, {"x": str}), RouterPrimitive({"x": str}, choose, default="x"):
        with pytest.raises(TypeError, match="choose returned a list, which cannot be a key"):
            run(flow, 1)
