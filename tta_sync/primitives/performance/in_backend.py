"""The layer of a cache that lives in a store of the user's own: whatever has async get, set and delete."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance.flights import Flight
from tta_sync.primitives.performance.shared import Bypass, Lease, SharedLayer
from tta_sync.primitives.performance.stores import CacheBackend

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive

T = TypeVar("T")

_LIMIT = 1.0  # seconds for one question to a store of which we know nothing
_EPOCH_LIFE = 1.0  # seconds after which other processes have seen that the cache was cleared
_LONG = 365 * 86_400.0  # seconds; longer than any result lives that an old epoch named


class BackendLayer(SharedLayer):
    """Answer from a :class:`CacheBackend`, or compute once for all who ask at the same time in this process.

    A store without locks and counters has no single-flight across processes, and no tags.
    """

    label = "backend"

    def __init__(
        self, cache: CachePrimitive[Any, Any], backend: CacheBackend, claim: Callable[[dict[Any, Any]], str]
    ) -> None:
        if cache.has_tags:
            raise ConfigurationError(
                f"tags need memory or Redis: a {type(backend).__name__} has no counters; leave tags= out"
            )
        super().__init__(cache, "tta:", claim(_claims_of(backend)))
        self._backend = backend
        self._epoch_key = f"{self._control}epoch"
        self._epoch, self._epoch_read = "", float("-inf")

    async def _name(self, key: bytes) -> str:
        """Return the name under which *key* is stored now: one step of the epoch changes all of them."""
        now = asyncio.get_running_loop().time()
        if not 0 <= now - self._epoch_read < _EPOCH_LIFE:
            epoch = await self._backend.get(self._epoch_key)
            self._epoch, self._epoch_read = epoch.decode() if isinstance(epoch, bytes) else "", now
        return key.decode() + self._epoch

    async def _ask(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_LIMIT):
                return await answer
        except Exception as error:  # of a store of which we know nothing
            raise Bypass("down", type(error).__qualname__) from error

    async def _read(
        self, key: bytes, tags: frozenset[str], context: WorkflowContext
    ) -> tuple[bytes | None, list[bytes | None]]:
        async def read() -> Any:
            return await self._backend.get(await self._name(key))

        blob = await self._ask(read())
        return (blob if blob is None or isinstance(blob, bytes) else b""), []

    async def _attempt(
        self, key: bytes, tags: frozenset[str], seen: bytes, context: WorkflowContext
    ) -> Lease | tuple[bytes, list[bytes | None]] | None:
        return Lease()

    async def _put(
        self, lease: Lease, key: bytes, tags: frozenset[str], blob: bytes, keep: float, flight: Flight
    ) -> bool:
        async def put() -> bool:
            name = await self._name(key)
            await self._backend.set(name, blob, keep)
            if flight.revoked:  # while we wrote
                await self._backend.delete(name)
                return False
            return True

        return await self._ask(put())

    # ---- forgetting --------------------------------------------------------------------------------------------------

    async def forget_key(self, key: bytes) -> None:
        self._revoke(key)

        async def forget() -> None:
            await self._backend.delete(await self._name(key))

        await self._told(forget())

    async def forget_tags(self, tags: frozenset[str]) -> None:
        """Do nothing: without tags of its own, this layer holds nothing that carries one."""

    async def forget_all(self) -> None:
        self._revoke_all()
        epoch = os.urandom(8).hex()
        await self._told(self._backend.set(self._epoch_key, epoch.encode(), _LONG))
        self._epoch = epoch

    async def _told(self, tell: Awaitable[None]) -> None:
        try:
            await self._ask(tell)
        except Bypass as bypass:
            raise ConnectionError(
                f"{type(self._backend).__name__} could not be told of an invalidation: {bypass.detail}"
            ) from bypass.__cause__


def _claims_of(backend: Any) -> dict[Any, Any]:
    """Return who has which namespace in *backend*; kept on the object itself, where it lets us."""
    try:
        claims: dict[Any, Any] = vars(backend).setdefault("_tta_sync_claims", {})
    except TypeError:  # it has slots
        return {}
    return claims
