"""The circuit breaker under TTA.dev's module name."""

from tta_sync.primitives.recovery.circuit_breaker import (
    CircuitBreakerConfig as CircuitBreakerConfig,
)
from tta_sync.primitives.recovery.circuit_breaker import (
    CircuitBreakerError as CircuitBreakerError,
)
from tta_sync.primitives.recovery.circuit_breaker import (
    CircuitBreakerPrimitive as CircuitBreakerPrimitive,
)
from tta_sync.primitives.recovery.circuit_breaker import (
    CircuitState as CircuitState,
)
