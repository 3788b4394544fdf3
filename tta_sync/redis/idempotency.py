"""Doing a thing once, however often it is asked for."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, NamedTuple, TypeVar

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.exceptions import ConfigurationError, IdempotencyConflictError, IdempotencyMismatchError
from tta_sync.primitives.performance import codec, keys
from tta_sync.primitives.performance.in_redis import LOCK_LIFE, Script, from_sync
from tta_sync.primitives.performance.wire import Link, Oversized, RedisDown, Refused
from tta_sync.redis.address import address, unreachable

T = TypeVar("T")

_LIMIT = 1.0  # seconds for an answer: unlike a cache, this may not be passed by
_LIMIT_DOWN = 0.05  # and where the server is known to be down: it may be back, but nobody should queue up for it
_PATIENCE = (0.01, 0.25)  # seconds between looks at another call's work: first, and at most
_MAX_BYTES = 1 << 20  # of one result

_BEGIN = Script("""
-- KEYS: the record; ARGV: token, fingerprint, ms that a claim lives without being renewed
local known = redis.call('HMGET', KEYS[1], 'fingerprint', 'result')
if known[1] and known[1] ~= ARGV[2] then return {'other'} end
if known[2] then return {'done', known[2]} end
if known[1] then return {'busy'} end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[2], 'token', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {'begun'}
""")
_FINISH = Script("""
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'token')
redis.call('HSET', KEYS[1], 'result', ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
""")
_RENEW = "if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end"
_ABANDON = "if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Outcome(NamedTuple):
    """A result, and whether it is that of an earlier call."""

    result: Any
    replayed: bool


class Claim:
    """The right to do the work of one key, kept alive until it is finished or abandoned."""

    def __init__(self, store: IdempotencyStore, name: bytes, token: bytes, link: Link) -> None:
        self._store, self._name, self._token, self._link = store, name, token, link
        self._timer: asyncio.TimerHandle | None = None
        _arm(weakref.ref(self))

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def finish(self, result: Any) -> None:
        """Keep *result* for whoever asks again.

        Raises:
            ConfigurationError: JSON cannot carry it, or it is larger than *max_bytes*; the key is free again.
            ConnectionError: Redis could not be told; the key is free again once the claim has expired.
        """
        self._stop()
        try:
            blob = self._store._seal(self._name, result)
        except ConfigurationError:
            await self.abandon()
            raise
        await self._store._ask(_FINISH, self._name, self._token, blob, int(self._store.ttl * 1000))

    async def abandon(self) -> None:
        """Let the next call with the key do the work."""
        self.give_up()

    def give_up(self) -> None:
        """Do what :meth:`abandon` does, on the claim's own loop, without waiting."""
        self._stop()
        self._link.post("EVAL", _ABANDON, 1, self._name, self._token)


def _arm(reference: weakref.ref[Claim]) -> None:
    # Weak: a claim whose owner was lost, to an interrupt say, must not be renewed for ever.
    claim = reference()
    if claim is not None:
        claim._timer = claim._link.loop.call_later(LOCK_LIFE / 3, _renew, reference)


def _renew(reference: weakref.ref[Claim]) -> None:
    claim = reference()
    if claim is not None:
        claim._link.post("EVAL", _RENEW, 1, claim._name, claim._token, int(LOCK_LIFE * 1000))
        _arm(reference)


class IdempotencyStore:
    """Remember what was done under which key, so that a repeated request is answered and not done again.

    The first call with a key does the work; later ones get its result. A call that fails frees its key. A call whose
    process dies frees it within 5 seconds.

    Args:
        source: a URL, a ``redis.Redis`` or ``redis.asyncio.Redis`` client, of which address and credentials count, or
            a ``RedisBackend``.
        ttl: seconds for which a result is remembered; a day by default.
        prefix: what every key begins with; the back end's, or ``tta:``.
        max_wait: seconds for which ``wait=True`` waits for another call.
        max_bytes: the most that one result may take as JSON.

    Source: the Idempotency-Key header, draft-ietf-httpapi-idempotency-key-header.
    """

    def __init__(
        self,
        source: Any,
        ttl: float = 86_400.0,
        *,
        prefix: str | None = None,
        max_wait: float = 30.0,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        if not isinstance(ttl, (int, float)) or isinstance(ttl, bool) or not 0.001 <= ttl < 1e9:
            raise ConfigurationError(f"ttl={ttl!r} is how long a result is remembered: give a number of seconds")
        self.ttl = float(ttl)
        self.max_wait = max_wait
        self._endpoint, prefix = address(source, prefix)
        self._head = f"{prefix}{keys.SCHEMA}:#:idempotency:"
        self._codec = codec.Codec(None, max_bytes, 1024)
        bounds = self._endpoint.bounds
        bounds.max_bytes = max(bounds.max_bytes, 2 * max_bytes)
        self._chance = Random()  # noqa: S311  # spreads load, keeps no secret

    async def begin(
        self, key: str, fingerprint: Any = None, *, wait: bool = False, max_wait: float | None = None
    ) -> Claim | Outcome:
        """Return the earlier result for *key*, or the right to do the work.

        Args:
            key: what the client calls the request.
            fingerprint: what the request asks for; the same key with another one is an error.
            wait: wait for another call that does the work at this moment, instead of refusing.
            max_wait: seconds for that, in place of the store's.

        Raises:
            IdempotencyConflictError: another call does the work at this moment.
            IdempotencyMismatchError: the key was used for something else.
            ConfigurationError: the fingerprint holds something of which no key can be made.
            ConnectionError: Redis did not answer, so nobody knows whether the work was done.
        """
        name = f"{self._head}{keys.prefix(key)}".encode()
        mark = keys.digest(fingerprint, "fingerprint")
        token = os.urandom(12).hex().encode()
        link = self._endpoint.link
        give_up = link.loop.time() + (self.max_wait if max_wait is None else max_wait)
        pause, longest = _PATIENCE
        while True:
            try:
                answer, *rest = await self._ask(_BEGIN, name, token, mark, int(LOCK_LIFE * 1000))
            except asyncio.CancelledError:
                link.post("EVAL", _ABANDON, 1, name, token)  # the claim may have been granted all the same
                raise
            if answer == b"begun":
                return Claim(self, name, token, link)
            if answer == b"other":
                raise IdempotencyMismatchError(key)
            if answer == b"done":
                return Outcome(self._open(name, rest[0]), True)
            if not wait or link.loop.time() >= give_up:
                raise IdempotencyConflictError(key)
            await asyncio.sleep(pause * (0.5 + self._chance.random()))
            pause = min(pause * 1.5, longest)

    async def arun(
        self, key: str, work: Callable[[], Awaitable[Any]], fingerprint: Any = None, *, wait: bool = False
    ) -> Outcome:
        """Await *work()* once per *key*; return its result, or the earlier one. Raises what :meth:`begin` raises."""
        claim = await self.begin(key, fingerprint, wait=wait)
        if isinstance(claim, Outcome):
            return claim
        try:
            result = await work()
        except BaseException:
            await claim.abandon()
            raise
        await claim.finish(result)
        return Outcome(result, False)

    def run(self, key: str, work: Callable[[], Any], fingerprint: Any = None, *, wait: bool = False) -> Outcome:
        """Do what :meth:`arun` does, from synchronous code: *work* runs on this thread.

        Raises:
            WouldDeadlockError: called on a loop; what :meth:`begin` raises.
        """
        remedy = "await store.arun(...)"
        claim = from_sync(lambda: self.begin(key, fingerprint, wait=wait), "run()", remedy)
        if isinstance(claim, Outcome):
            return claim
        try:
            result = work()
        except BaseException:
            from_sync(claim.abandon, "run()", remedy)
            raise
        from_sync(lambda: claim.finish(result), "run()", remedy)
        return Outcome(result, False)

    async def _ask(self, script: Script, name: bytes, *arguments: bytes | int) -> Any:
        link = self._endpoint.link
        limit = _LIMIT_DOWN if link.down else _LIMIT
        try:
            return await script.run(link, (name,), *arguments, limit=limit, force=True)
        except (RedisDown, Refused, Oversized) as error:
            raise unreachable(self._endpoint, error) from None

    def _seal(self, name: bytes, result: Any) -> bytes:
        encoded = codec.encode(result)
        if encoded is None:
            raise ConfigurationError(f"JSON cannot carry this {type(result).__qualname__}: return plain values")
        now = SYSTEM_CLOCK.time()
        blob = self._codec.seal(
            name,
            encoded,
            identity=b"",
            created=now,
            fresh_until=now + self.ttl,
            expires_at=now + self.ttl,
            cost=0.0,
            versions=(),
        )
        if blob is None:
            most = self._codec.max_bytes
            raise ConfigurationError(f"a result of {len(encoded[1])} bytes is too large: {most} is the most")
        return blob

    def _open(self, name: bytes, blob: bytes) -> Any:
        try:
            return self._codec.value(self._codec.open(name, blob))
        except codec.Undecodable as error:
            # Doing the work again could do it twice: that is for people to decide.
            raise unreachable(
                self._endpoint, Refused(f"holds a result that is {error.reason}"), "cannot be used"
            ) from None
