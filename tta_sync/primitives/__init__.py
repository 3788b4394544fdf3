"""Every primitive under one roof; modules load at the first use of a name from them."""
# one import per module, not per name

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.context import WorkflowContext as WorkflowContext
    from tta_sync.exceptions import CircuitBreakerError as CircuitBreakerError, CircuitOpenError as CircuitOpenError
    from tta_sync.primitives.core import (
        MISS as MISS,
        CompositionWarning as CompositionWarning,
        ConditionalPrimitive as ConditionalPrimitive,
        LambdaPrimitive as LambdaPrimitive,
        MapPrimitive as MapPrimitive,
        ParallelPrimitive as ParallelPrimitive,
        RouterPrimitive as RouterPrimitive,
        SequentialPrimitive as SequentialPrimitive,
        SwitchPrimitive as SwitchPrimitive,
        WorkflowPrimitive as WorkflowPrimitive,
        caller_step as caller_step,
        step as step,
        thread_step as thread_step,
    )
    from tta_sync.primitives.observability import InstrumentedPrimitive as InstrumentedPrimitive
    from tta_sync.primitives.performance import (
        CacheBackend as CacheBackend,
        CachePrimitive as CachePrimitive,
        InMemoryBackend as InMemoryBackend,
        InMemoryStore as InMemoryStore,
        MemoryPrimitive as MemoryPrimitive,
        RedisBackend as RedisBackend,
        create_memory_key as create_memory_key,
    )
    from tta_sync.primitives.persistence import (
        AbstractRepository as AbstractRepository,
        AbstractUnitOfWork as AbstractUnitOfWork,
        FakeUnitOfWork as FakeUnitOfWork,
    )
    from tta_sync.primitives.recovery import (
        BulkheadPrimitive as BulkheadPrimitive,
        ChaosPrimitive as ChaosPrimitive,
        CircuitBreakerConfig as CircuitBreakerConfig,
        CircuitBreakerPrimitive as CircuitBreakerPrimitive,
        CircuitState as CircuitState,
        CompensationPrimitive as CompensationPrimitive,
        FallbackPrimitive as FallbackPrimitive,
        HedgePrimitive as HedgePrimitive,
        RateLimitPrimitive as RateLimitPrimitive,
        RetryBudget as RetryBudget,
        RetryPrimitive as RetryPrimitive,
        RetryStrategy as RetryStrategy,
        SagaPrimitive as SagaPrimitive,
        TimeoutPrimitive as TimeoutPrimitive,
    )
    from tta_sync.primitives.streaming import StreamingPrimitive as StreamingPrimitive
    from tta_sync.primitives.testing import MockPrimitive as MockPrimitive, WorkflowTestCase as WorkflowTestCase

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
