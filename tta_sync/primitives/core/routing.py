"""One of several steps, by a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

from tta_sync.context import WorkflowContext
from tta_sync.events import bus
from tta_sync.exceptions import ConfigurationError, NoRouteError, was_called
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive, display_name, told

if TYPE_CHECKING:
    from tta_sync.primitives.core.diagram import Outline


def _check_mapping(option: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{option} is a mapping from keys to steps, not {given!r}: write {{key: step}}")


def _no_key(function: object, answer: Any) -> TypeError:
    kind = type(answer).__qualname__
    return TypeError(f"{display_name(function)} returned a {kind}, which cannot be a key: return a string, say")


class SwitchPrimitive(WorkflowPrimitive[In, Out]):
    """Run the case that the selector names; without a match, the default; without that, pass the input through.

    Args:
        selector: ``selector(data, context)`` or ``selector(data)``, plain or async; returns a key of *cases*.
        cases: a step for each key.
        default: the step for every other key; None passes the input through.

    Raises:
        ConfigurationError: a part is no step.

    Source: TTA.dev's SwitchPrimitive.
    """

    tells_itself = True
    _tta_kind = "choice"

    def __init__(
        self,
        selector: Callable[..., Any],
        cases: Mapping[Any, StepLike[In, Out]],
        default: StepLike[In, Out] | None = None,
    ) -> None:
        _check_mapping("cases", cases)
        self.selector = selector
        self._select = as_primitive(selector)._run
        self.cases: dict[Any, WorkflowPrimitive[In, Out]] = {key: as_primitive(case) for key, case in cases.items()}
        self.default: WorkflowPrimitive[In, Out] | None = None if default is None else as_primitive(default)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        cases = tuple(self.cases.values())
        return cases if self.default is None else (*cases, self.default)

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        labels = [str(key) for key in self.cases]
        return Outline(
            "choice",
            f"{display_name(self.selector)}?",
            labels if self.default is None else [*labels, "else"],
            "else" if self.default is None else None,
        )

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        key = await self._select(data, context)
        try:
            case = self.cases.get(key, self.default)
        except TypeError:
            raise _no_key(self.selector, key) from None
        if case is not None:
            try:
                result: Out = await (case._run if bus.emit is None else told(case))(data, context)
            except BaseException as error:
                was_called(error)  # the selector was, by then
                raise
            return result
        unchanged: Any = data
        answer: Out = unchanged
        return answer

    @recursive_repr()
    def __repr__(self) -> str:
        cases = ", ".join(f"{key!r}: {case!r}" for key, case in self.cases.items())
        other = "" if self.default is None else f", else {self.default!r}"
        return f"Switch({display_name(self.selector)}, {{{cases}}}{other})"


class RouterPrimitive(WorkflowPrimitive[In, Out]):
    """Run the route that the router function names, and write down which one it was.

    Each decision is appended to ``context.state["routing_history"]`` as ``{"route", "used_default", "timestamp"}``, the
    timestamp in seconds since the epoch.

    Args:
        routes: a step for each key.
        router_fn: ``router_fn(data, context)`` or ``router_fn(data)``, plain or async; returns a key of *routes*.
        default: the key to take where *routes* does not have the one returned.

    Raises:
        NoRouteError: no route has the key, and there is no default; a ValueError that names the routes.
        ConfigurationError: there are no routes, or *default* is none of them.

    Source: TTA.dev's RouterPrimitive.
    """

    tells_itself = True
    _tta_kind = "choice"

    def __init__(
        self, routes: Mapping[Any, StepLike[In, Out]], router_fn: Callable[..., Any], default: Any = None
    ) -> None:
        _check_mapping("routes", routes)
        if not routes:
            raise ConfigurationError("a router needs at least one route")
        if default is not None and default not in routes:
            raise ConfigurationError(
                f"default={default!r} is no route; it is a key of routes: {', '.join(map(repr, routes))}"
            )
        self.routes: dict[Any, WorkflowPrimitive[In, Out]] = {key: as_primitive(route) for key, route in routes.items()}
        self.router_fn = router_fn
        self.default = default
        self._choose = as_primitive(router_fn)._run

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return tuple(self.routes.values())

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        labels = [f"{key}, or else" if key == self.default else str(key) for key in self.routes]
        return Outline("choice", f"{display_name(self.router_fn)}?", labels)

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        key = await self._choose(data, context)
        try:
            used_default = key not in self.routes
        except TypeError:
            raise _no_key(self.router_fn, key) from None
        if used_default:
            if self.default is None:
                raise NoRouteError(key, [str(route) for route in self.routes])
            key = self.default
        history = context.state.setdefault("routing_history", [])
        history.append({"route": key, "used_default": used_default, "timestamp": context.clock.time()})
        chosen = self.routes[key]
        try:
            result: Out = await (chosen._run if bus.emit is None else told(chosen))(data, context)
        except BaseException as error:
            was_called(error)  # the router function was, by then
            raise
        return result

    def details(self) -> str:
        return "" if self.default is None else f"default={self.default!r}"

    @recursive_repr()
    def __repr__(self) -> str:
        routes = ", ".join(f"{key!r}: {route!r}" for key, route in self.routes.items())
        details = self.details()
        return f"Router({display_name(self.router_fn)}, {{{routes}}}{details and ', ' + details})"
