"""Make metrics and log lines of what primitives and the runtime tell.

Primitives emit records only where a hook listens; :func:`initialize_observability` installs the hooks that turn them
into Prometheus metrics and structured log lines. Hooks of your own: ``tta_sync.events.bus.subscribe``.
"""

from tta_sync.observability.initialize import (
    Observability as Observability,
    initialize_observability as initialize_observability,
)

__all__ = ["Observability", "initialize_observability"]
