"""What tests of primitives share: loops that run ready callbacks in a random, repeatable order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest


class ShuffledLoop(asyncio.SelectorEventLoop):
    """Runs what is ready in an order drawn from a seed: any order is one that a correct program must stand."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        super().__init__()

    def _run_once(self) -> None:
        ready = list(self._ready)
        self._random.shuffle(ready)
        self._ready.clear()
        self._ready.extend(ready)
        super()._run_once()


@pytest.fixture
def run_shuffled() -> Callable[[Coroutine[Any, Any, Any], int], Any]:
    """``run_shuffled(coroutine, seed)``: ``asyncio.run`` on a loop that shuffles its ready queue."""

    def run(coroutine: Coroutine[Any, Any, Any], seed: int) -> Any:
        with asyncio.Runner(loop_factory=lambda: ShuffledLoop(seed)) as runner:
            return runner.run(coroutine)

    return run
