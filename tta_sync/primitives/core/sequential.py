"""One step after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, as_primitive, note


class SequentialPrimitive(WorkflowPrimitive[In, Out]):
    """Run steps in order, each with the result of the one before it; all share one context.

    Nested sequences flatten. An error passes through as itself, with a note that names the step.

    Raises:
        ConfigurationError: there are no steps.
    """

    def __init__(self, primitives: Sequence[Any]) -> None:
        steps: list[WorkflowPrimitive[Any, Any]] = []
        for primitive in map(as_primitive, primitives):
            if type(primitive) is SequentialPrimitive:
                steps.extend(primitive.steps)
            else:
                steps.append(primitive)
        if not steps:
            raise ConfigurationError("a sequence needs at least one step")
        self.steps: tuple[WorkflowPrimitive[Any, Any], ...] = tuple(steps)
        self._runs = tuple(step._run for step in steps)

    @classmethod
    def join(cls, left: Any, right: Any) -> SequentialPrimitive[Any, Any]:
        """Build ``left >> right``."""
        return cls((left, right))

    @property
    def primitives(self) -> list[WorkflowPrimitive[Any, Any]]:
        """The steps, under TTA.dev's name."""
        return list(self.steps)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return self.steps

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        position = 0
        try:
            for run in self._runs:
                data = await run(data, context)
                position += 1
        except Exception as error:
            note(error, f"in step {position + 1} of {len(self.steps)}: {self.steps[position]!r}")
            raise
        return data

    def __repr__(self) -> str:
        return " >> ".join(f"({s!r})" if " | " in repr(s) else repr(s) for s in self.steps)
