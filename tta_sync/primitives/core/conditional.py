"""One step or another, by a condition."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

from tta_sync.context import WorkflowContext
from tta_sync.events import bus
from tta_sync.exceptions import was_called
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive, display_name, told
from tta_sync.primitives.core.routing import SwitchPrimitive as SwitchPrimitive  # where TTA.dev has it

if TYPE_CHECKING:
    from tta_sync.primitives.core.diagram import Outline


class ConditionalPrimitive(WorkflowPrimitive[In, Out]):
    """Run *then_primitive* where the condition holds, else *else_primitive*; without one, the input passes through.

    Args:
        condition: ``condition(data, context)`` or ``condition(data)``, plain or async; judged by its truth.
        then_primitive: the step for true.
        else_primitive: the step for false; None passes the input through.

    Raises:
        ConfigurationError: a part is no step.

    Source: TTA.dev's ConditionalPrimitive, with async conditions awaited.
    """

    tells_itself = True
    _tta_kind = "choice"

    def __init__(
        self,
        condition: Callable[..., Any],
        then_primitive: StepLike[In, Out],
        else_primitive: StepLike[In, Out] | None = None,
    ) -> None:
        self.condition = condition
        self._decide = as_primitive(condition)._run
        self.then_primitive: WorkflowPrimitive[In, Out] = as_primitive(then_primitive)
        self.else_primitive: WorkflowPrimitive[In, Out] | None = (
            None if else_primitive is None else as_primitive(else_primitive)
        )

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.then_primitive,) if self.else_primitive is None else (self.then_primitive, self.else_primitive)

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        return Outline(
            "choice",
            f"{display_name(self.condition)}?",
            ("yes",) if self.else_primitive is None else ("yes", "no"),
            "no" if self.else_primitive is None else None,
        )

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        chosen = self.then_primitive if await self._decide(data, context) else self.else_primitive
        if chosen is not None:
            try:
                result: Out = await (chosen._run if bus.emit is None else told(chosen))(data, context)
            except BaseException as error:
                was_called(error)  # the condition was, by then
                raise
            return result
        unchanged: Any = data
        answer: Out = unchanged
        return answer

    @recursive_repr()
    def __repr__(self) -> str:
        other = "" if self.else_primitive is None else f", else {self.else_primitive!r}"
        return f"Conditional(if {display_name(self.condition)}: {self.then_primitive!r}{other})"
