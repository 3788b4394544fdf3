"""Primitives for what goes wrong; modules load at the first use of a name from them, and tenacity not even then."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.exceptions import (
        BulkheadFullError as BulkheadFullError,
        CircuitOpenError as CircuitOpenError,
        RateLimitedError as RateLimitedError,
        SagaError as SagaError,
        StepTimeoutError as StepTimeoutError,
    )
    from tta_sync.primitives.recovery.bulkhead import BulkheadPrimitive as BulkheadPrimitive
    from tta_sync.primitives.recovery.chaos import ChaosError as ChaosError, ChaosPrimitive as ChaosPrimitive
    from tta_sync.primitives.recovery.circuit_breaker import (
        CircuitBreakerConfig as CircuitBreakerConfig,
        CircuitBreakerError as CircuitBreakerError,
        CircuitBreakerPrimitive as CircuitBreakerPrimitive,
        CircuitHints as CircuitHints,
        CircuitState as CircuitState,
    )
    from tta_sync.primitives.recovery.compensation import (
        CompensationPrimitive as CompensationPrimitive,
        SagaPrimitive as SagaPrimitive,
    )
    from tta_sync.primitives.recovery.fallback import FallbackPrimitive as FallbackPrimitive
    from tta_sync.primitives.recovery.hedge import HedgePrimitive as HedgePrimitive
    from tta_sync.primitives.recovery.rate_limit import (
        RateLimitPrimitive as RateLimitPrimitive,
        RateStore as RateStore,
    )
    from tta_sync.primitives.recovery.retry import (
        RetryBudget as RetryBudget,
        RetryPrimitive as RetryPrimitive,
        RetryStrategy as RetryStrategy,
    )
    from tta_sync.primitives.recovery.timeout import (
        TimeoutError as TimeoutError,  # noqa: A004
        TimeoutPrimitive as TimeoutPrimitive,
    )

_HOMES = {
    "tta_sync.exceptions": (
        "BulkheadFullError",
        "CircuitBreakerError",
        "CircuitOpenError",
        "RateLimitedError",
        "SagaError",
        "StepTimeoutError",
    ),
    "tta_sync.primitives.recovery.bulkhead": ("BulkheadPrimitive",),
    "tta_sync.primitives.recovery.chaos": ("ChaosError", "ChaosPrimitive"),
    "tta_sync.primitives.recovery.circuit_breaker": (
        "CircuitBreakerConfig",
        "CircuitBreakerPrimitive",
        "CircuitHints",
        "CircuitState",
    ),
    "tta_sync.primitives.recovery.compensation": ("CompensationPrimitive", "SagaPrimitive"),
    "tta_sync.primitives.recovery.fallback": ("FallbackPrimitive",),
    "tta_sync.primitives.recovery.hedge": ("HedgePrimitive",),
    "tta_sync.primitives.recovery.rate_limit": ("RateLimitPrimitive", "RateStore"),
    "tta_sync.primitives.recovery.retry": ("RetryBudget", "RetryPrimitive", "RetryStrategy"),
    "tta_sync.primitives.recovery.timeout": ("TimeoutError", "TimeoutPrimitive"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

# One table, not two that drift apart; but a star import must not take the builtin TimeoutError's place.
__all__ = sorted(_HOME.keys() - {"TimeoutError"})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
