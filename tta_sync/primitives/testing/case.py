"""A test case for workflows: a fresh context per test, and nothing left running after it."""

from __future__ import annotations

import asyncio
import unittest

from tta_sync.context import WorkflowContext


class WorkflowTestCase(unittest.IsolatedAsyncioTestCase):
    """Test workflows with ``async def test_...`` methods; ``self.context`` is new for each.

    A test that leaves a task running fails: the task is named, cancelled and awaited.
    """

    context: WorkflowContext

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.context = WorkflowContext(workflow_id=self.id())
        self._tasks_before = asyncio.all_tasks()
        self.addAsyncCleanup(self._check_leaks)

    async def _check_leaks(self) -> None:
        """Runs after tearDown and after every clean-up that the test registered."""
        left = [task for task in asyncio.all_tasks() - self._tasks_before if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)
            names = ", ".join(sorted(task.get_name() for task in left))
            raise AssertionError(f"the test left tasks running: {names}; await or cancel them")
