"""The circuit breaker under TTA.dev's module name."""

from tta_sync.primitives.recovery.circuit_breaker import (
    CircuitBreakerConfig as CircuitBreakerConfig,
    CircuitBreakerError as CircuitBreakerError,
    CircuitBreakerPrimitive as CircuitBreakerPrimitive,
    CircuitState as CircuitState,
)
