"""Failures on purpose, for tests of what is built to withstand them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import is_number
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.naming import call_name


class ChaosError(ConnectionError):
    """A failure that :class:`ChaosPrimitive` made up."""


class ChaosPrimitive(WorkflowPrimitive[In, Out]):
    """Make a step slower and less reliable than it is.

    With the same *seed* the same calls fail, in the order in which they begin; their waits are on the context's clock.

    Args:
        primitive: the step.
        failure_ratio: share of the calls that fail, from 0 to 1.
        latency: seconds to wait before each call; a pair: anything between the two.
        error: what a failing call raises: an exception, an exception type, or a function that makes one.
        after: fail after the step has run, its effect done and its answer lost, instead of before.
        seed: makes the sequence of failures and waits repeatable; None: another one each time.

    Raises:
        ChaosError: a made-up failure, a ConnectionError; or what *error* says.
        ConfigurationError: an option makes no sense.

    Source: Netflix's Chaos Monkey; options as Polly's chaos strategies.
    """

    def __init__(
        self,
        primitive: StepLike[In, Out],
        failure_ratio: float = 0.0,
        latency: float | tuple[float, float] = 0.0,
        seed: int | str | bytes | None = None,
        *,
        error: BaseException | Callable[[], BaseException] | None = None,
        after: bool = False,
        name: str | None = None,
    ) -> None:
        if not is_number(failure_ratio) or not 0 <= failure_ratio <= 1:
            raise ConfigurationError(f"failure_ratio is a share from 0 to 1, not {failure_ratio!r}")
        waits = latency if isinstance(latency, tuple) else (latency, latency)
        if len(waits) != 2 or not all(map(is_number, waits)) or not 0 <= waits[0] <= waits[1]:
            raise ConfigurationError(f"latency is a number of seconds, or a pair (least, most), not {latency!r}")
        if error is not None and not isinstance(error, BaseException) and not callable(error):
            raise ConfigurationError(f"error is an exception, its type, or a function that makes one, not {error!r}")
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.failure_ratio = failure_ratio
        self.latency = latency
        if name is not None:
            self.name = name
        self._waits = waits
        self._error = error
        self._after = after
        self._chance = random.Random(seed)  # noqa: S311  # repeatable on purpose; guarded by _lock
        self._lock = threading.Lock()
        self._inner = self.primitive._run
        renew_after_fork(self)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        return f"failure_ratio={self.failure_ratio:g}" + (f", latency={self.latency!r}" if self._waits[1] else "")

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        with self._lock:
            fails = self._chance.random() < self.failure_ratio
            wait = self._chance.uniform(*self._waits)
        if wait:
            await context.clock.sleep(wait)
        if fails and not self._after:
            raise self._failure()
        result = await self._inner(data, context)
        if fails:
            raise self._failure()
        return result

    def _failure(self) -> BaseException:
        error = self._error
        if error is None:
            return ChaosError(f"made up by ChaosPrimitive instead of calling {call_name(self.primitive)}")
        return error if isinstance(error, BaseException) else error()
