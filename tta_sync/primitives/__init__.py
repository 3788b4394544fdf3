"""Every primitive under one roof; modules load at the first use of a name from them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.context import WorkflowContext as WorkflowContext
    from tta_sync.exceptions import CircuitBreakerError as CircuitBreakerError
    from tta_sync.exceptions import CircuitOpenError as CircuitOpenError
    from tta_sync.primitives.core import (
        MISS as MISS,
    )
    from tta_sync.primitives.core import (
        CompositionWarning as CompositionWarning,
    )
    from tta_sync.primitives.core import (
        ConditionalPrimitive as ConditionalPrimitive,
    )
    from tta_sync.primitives.core import (
        LambdaPrimitive as LambdaPrimitive,
    )
    from tta_sync.primitives.core import (
        MapPrimitive as MapPrimitive,
    )
    from tta_sync.primitives.core import (
        ParallelPrimitive as ParallelPrimitive,
    )
    from tta_sync.primitives.core import (
        RouterPrimitive as RouterPrimitive,
    )
    from tta_sync.primitives.core import (
        SequentialPrimitive as SequentialPrimitive,
    )
    from tta_sync.primitives.core import (
        SwitchPrimitive as SwitchPrimitive,
    )
    from tta_sync.primitives.core import (
        WorkflowPrimitive as WorkflowPrimitive,
    )
    from tta_sync.primitives.core import (
        caller_step as caller_step,
    )
    from tta_sync.primitives.core import (
        step as step,
    )
    from tta_sync.primitives.core import (
        thread_step as thread_step,
    )
    from tta_sync.primitives.observability import InstrumentedPrimitive as InstrumentedPrimitive
    from tta_sync.primitives.performance import (
        CacheBackend as CacheBackend,
    )
    from tta_sync.primitives.performance import (
        CachePrimitive as CachePrimitive,
    )
    from tta_sync.primitives.performance import (
        InMemoryBackend as InMemoryBackend,
    )
    from tta_sync.primitives.performance import (
        InMemoryStore as InMemoryStore,
    )
    from tta_sync.primitives.performance import (
        MemoryPrimitive as MemoryPrimitive,
    )
    from tta_sync.primitives.performance import (
        RedisBackend as RedisBackend,
    )
    from tta_sync.primitives.performance import (
        create_memory_key as create_memory_key,
    )
    from tta_sync.primitives.persistence import (
        AbstractRepository as AbstractRepository,
    )
    from tta_sync.primitives.persistence import (
        AbstractUnitOfWork as AbstractUnitOfWork,
    )
    from tta_sync.primitives.persistence import (
        FakeUnitOfWork as FakeUnitOfWork,
    )
    from tta_sync.primitives.recovery import (
        BulkheadPrimitive as BulkheadPrimitive,
    )
    from tta_sync.primitives.recovery import (
        ChaosPrimitive as ChaosPrimitive,
    )
    from tta_sync.primitives.recovery import (
        CircuitBreakerConfig as CircuitBreakerConfig,
    )
    from tta_sync.primitives.recovery import (
        CircuitBreakerPrimitive as CircuitBreakerPrimitive,
    )
    from tta_sync.primitives.recovery import (
        CircuitState as CircuitState,
    )
    from tta_sync.primitives.recovery import (
        CompensationPrimitive as CompensationPrimitive,
    )
    from tta_sync.primitives.recovery import (
        FallbackPrimitive as FallbackPrimitive,
    )
    from tta_sync.primitives.recovery import (
        HedgePrimitive as HedgePrimitive,
    )
    from tta_sync.primitives.recovery import (
        RateLimitPrimitive as RateLimitPrimitive,
    )
    from tta_sync.primitives.recovery import (
        RetryBudget as RetryBudget,
    )
    from tta_sync.primitives.recovery import (
        RetryPrimitive as RetryPrimitive,
    )
    from tta_sync.primitives.recovery import (
        RetryStrategy as RetryStrategy,
    )
    from tta_sync.primitives.recovery import (
        SagaPrimitive as SagaPrimitive,
    )
    from tta_sync.primitives.recovery import (
        TimeoutPrimitive as TimeoutPrimitive,
    )
    from tta_sync.primitives.streaming import StreamingPrimitive as StreamingPrimitive
    from tta_sync.primitives.testing import MockPrimitive as MockPrimitive
    from tta_sync.primitives.testing import WorkflowTestCase as WorkflowTestCase

_HOMES = {
    "tta_sync.context": ("WorkflowContext",),
    "tta_sync.exceptions": ("CircuitBreakerError", "CircuitOpenError"),
    "tta_sync.primitives.core": (
        "MISS",
        "CompositionWarning",
        "ConditionalPrimitive",
        "LambdaPrimitive",
        "MapPrimitive",
        "ParallelPrimitive",
        "RouterPrimitive",
        "SequentialPrimitive",
        "SwitchPrimitive",
        "WorkflowPrimitive",
        "caller_step",
        "step",
        "thread_step",
    ),
    "tta_sync.primitives.observability": ("InstrumentedPrimitive",),
    "tta_sync.primitives.performance": (
        "CacheBackend",
        "CachePrimitive",
        "InMemoryBackend",
        "InMemoryStore",
        "MemoryPrimitive",
        "RedisBackend",
        "create_memory_key",
    ),
    "tta_sync.primitives.persistence": ("AbstractRepository", "AbstractUnitOfWork", "FakeUnitOfWork"),
    "tta_sync.primitives.recovery": (
        "BulkheadPrimitive",
        "ChaosPrimitive",
        "CircuitBreakerConfig",
        "CircuitBreakerPrimitive",
        "CircuitState",
        "CompensationPrimitive",
        "FallbackPrimitive",
        "HedgePrimitive",
        "RateLimitPrimitive",
        "RetryBudget",
        "RetryPrimitive",
        "RetryStrategy",
        "SagaPrimitive",
        "TimeoutPrimitive",
    ),
    "tta_sync.primitives.streaming": ("StreamingPrimitive",),
    "tta_sync.primitives.testing": ("MockPrimitive", "WorkflowTestCase"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # one table, not two that drift apart


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
