"""A step that answers as told and remembers how it was called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import WorkflowPrimitive, calling_form

SideEffect = Callable[..., Any] | Iterable[Any] | BaseException | type[BaseException] | None


class MockPrimitive(WorkflowPrimitive[Any, Any]):
    """Stand in for a step: return, raise or compute what the test says, and keep every call.

    Args:
        name: what reprs and messages call it.
        return_value: what a call returns.
        side_effect: ``side_effect(data, context)`` or ``side_effect(data)``, plain or async, whose result is
            returned; or an exception to raise; or an iterable, of which each call returns, or raises, the next. As an
            attribute it can be set anew at any time; None ends it. ``unittest.mock.DEFAULT`` as a result stands for
            *return_value*.
        raise_error: an exception, or its class, that every call raises.

    ``call_count``, ``calls`` (a list of ``(data, context)``), ``last_input`` and ``last_context`` tell of the calls.

    Raises:
        ConfigurationError: both *raise_error* and *side_effect* are given; or *side_effect* is none of these.

    Source: TTA.dev's MockPrimitive; ``side_effect`` as unittest.mock has it.
    """

    def __init__(
        self,
        name: str = "mock",
        return_value: Any = None,
        side_effect: SideEffect = None,
        raise_error: BaseException | type[BaseException] | None = None,
    ) -> None:
        self.name = name
        self.return_value = return_value
        self.raise_error = raise_error
        self.side_effect = side_effect
        self.calls: list[tuple[Any, WorkflowContext]] = []

    @property
    def side_effect(self) -> Any:
        """What a call does; of an iterable, the iterator that stands at the next answer."""
        return self._side_effect

    @side_effect.setter
    def side_effect(self, effect: SideEffect) -> None:
        if effect is not None and self.raise_error is not None:
            raise ConfigurationError(
                "a mock has either a side_effect or a raise_error, not both: set raise_error to None first"
            )
        if effect is not None and not callable(effect) and not isinstance(effect, BaseException):
            try:
                effect = iter(effect)
            except TypeError:
                raise ConfigurationError(
                    f"side_effect is a function, an exception or an iterable of answers, not {effect!r}: "
                    f"for one answer to every call write return_value={effect!r}"
                ) from None
        self._side_effect: SideEffect = effect

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        self.calls.append((data, context))
        if self.raise_error is not None:
            raise self.raise_error
        effect = self.side_effect
        if effect is None:
            return self.return_value
        if _is_error(effect):
            raise effect
        if callable(effect):
            function, takes_context = calling_form(effect)
            answer = function(data, context) if takes_context else function(data)
            if inspect.isawaitable(answer):
                answer = await answer
        else:
            answer = next(effect, _NOTHING)
            if answer is _NOTHING:
                raise AssertionError(
                    f"{self.name} was called {self.call_count} times; its side_effect has fewer answers"
                )
            if _is_error(answer):
                raise answer
        return self.return_value if _is_default(answer) else answer

    @property
    def call_count(self) -> int:
        return len(self.calls)

    @property
    def last_input(self) -> Any:
        return self.calls[-1][0] if self.calls else None

    @property
    def last_context(self) -> WorkflowContext | None:
        return self.calls[-1][1] if self.calls else None

    def assert_called(self) -> None:
        assert self.calls, f"{self.name} was never called"

    def assert_not_called(self) -> None:
        self.assert_call_count(0)

    def assert_called_once(self) -> None:
        self.assert_call_count(1)

    def assert_call_count(self, n: int) -> None:
        assert self.call_count == n, f"{self.name} was called {self.call_count} times, not {n}"

    def assert_called_with(self, data: Any, context: WorkflowContext | None = None) -> None:
        """Assert that the last call had this data, and this very context where one is given."""
        self.assert_called()
        assert self.last_input == data, f"{self.name} was last called with {self.last_input!r}, not {data!r}"
        assert context is None or self.last_context is context, (
            f"{self.name} was last called with {self.last_context!r}, not {context!r}"
        )

    def assert_called_once_with(self, data: Any, context: WorkflowContext | None = None) -> None:
        """Assert that there was one call, with this data, and this very context where one is given."""
        self.assert_called_once()
        self.assert_called_with(data, context)

    def reset(self) -> None:
        """Forget all calls; an iterable side_effect goes on where it was."""
        self.calls.clear()


_NOTHING = object()


def _is_default(answer: object) -> bool:
    mock = sys.modules.get("unittest.mock")  # whoever answers with its DEFAULT has imported it
    return mock is not None and answer is mock.DEFAULT


def _is_error(answer: object) -> TypeGuard[BaseException | type[BaseException]]:
    return isinstance(answer, BaseException) or (isinstance(answer, type) and issubclass(answer, BaseException))


def __getattr__(name: str) -> Any:
    # The test case needs unittest, which no application imports.
    if name == "WorkflowTestCase":
        from tta_sync.primitives.testing.case import WorkflowTestCase

        return WorkflowTestCase
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
