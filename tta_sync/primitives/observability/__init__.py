"""Steps that tell when they begin and end."""

from tta_sync.primitives.observability.instrumented import InstrumentedPrimitive as InstrumentedPrimitive

__all__ = ["InstrumentedPrimitive"]
