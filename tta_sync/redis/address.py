"""How a Redis server is reached: what of a client or a URL counts, and the first words on a connection."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance.in_redis import resolve
from tta_sync.primitives.performance.wire import Dial, Endpoint, Oversized, RedisDown, Refused, Wire

try:
    import redis
    import redis.asyncio
    import redis.exceptions
except ImportError:
    raise ConfigurationError("this needs the redis library: pip install 'tta-sync[redis]'") from None

# One per address and credentials, for as long as somebody uses it: caches of one server share its connections.
_endpoints: weakref.WeakValueDictionary[Hashable, Endpoint] = weakref.WeakValueDictionary()


def endpoint(source: Any) -> Endpoint:
    """Return the server that *source*, a URL or a client of redis-py, means; connections to it are made on the loop.

    Of a client only address, database and credentials are taken: its own connections, time-outs and retries are not.

    Raises:
        ConfigurationError: *source* is neither.
    """
    if isinstance(source, str):
        try:
            source = redis.ConnectionPool.from_url(source)
        except ValueError as error:
            raise ConfigurationError(f"this is no Redis URL: {error}") from None
    pool = getattr(source, "connection_pool", source)
    kind = getattr(pool, "connection_class", None)
    if kind is None or kind.__module__.partition(".")[0] != "redis":
        raise ConfigurationError(
            f"{type(source).__name__} is no client of one Redis server: "
            "give redis.Redis(...), redis.asyncio.Redis(...), RedisBackend(url), or what has async get, set and delete"
        )
    options = {name: value for name, value in pool.connection_kwargs.items() if name in _ADDRESS and value}
    secure = kind.__name__.startswith("SSL")
    if secure:
        options |= _tls_options(pool.connection_kwargs)
    known = (kind.__name__, *sorted((name, _hashable(value)) for name, value in options.items()))
    found = _endpoints.get(known)
    if found is None:
        dial = _dialler(options, secure)
        place = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        found = _endpoints.setdefault(known, Endpoint(dial, f"Redis at {place}"))
    return found


def address(source: Any, prefix: str | None = None) -> tuple[Endpoint, str]:
    """Return the server that *source* means, and what keys in it begin with: *prefix*, or what *source* says of it.

    Raises:
        ConfigurationError: *source* is no URL, client or ``RedisBackend``.
    """
    place, own = resolve(source)
    return place, own if prefix is None else prefix


_ADDRESS = frozenset({"host", "port", "path", "db", "username", "password", "credential_provider", "client_name"})


def _tls_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return what says how to trust the server.

    Raises:
        ConfigurationError: the client demands a check that is not made here.
    """
    from redis.asyncio.connection import SSLConnection

    known = inspect.signature(SSLConnection.__init__).parameters
    options = {name: value for name, value in given.items() if name[:4] == "ssl_" and value is not None}
    for name in [name for name in options if name not in known]:
        if options.pop(name):
            raise ConfigurationError(f"{name} is not supported here: leave it out, or terminate TLS elsewhere")
    return options


def _hashable(value: Any) -> Hashable:
    return value if isinstance(value, (str, int, float, bool, bytes, type(None))) else id(value)


def _dialler(options: dict[str, Any], secure: bool) -> Dial:
    """Return a function that connects, authenticates and selects the database."""
    tls: list[Any] = []

    async def dial(make: Callable[[], Wire]) -> Wire:
        loop = asyncio.get_running_loop()
        host = options.get("host") or "localhost"
        if options.get("path"):
            _, wire = await loop.create_unix_connection(make, options["path"])
        elif secure:
            if not tls:
                from redis.asyncio.connection import SSLConnection

                trust = {name: value for name, value in options.items() if name[:4] == "ssl_"}
                tls.append(SSLConnection(**trust).ssl_context.get())
            _, wire = await loop.create_connection(
                make, host, int(options.get("port") or 6379), ssl=tls[0], server_hostname=host
            )
        else:
            _, wire = await loop.create_connection(make, host, int(options.get("port") or 6379))
        try:
            await _greet(wire, options)
        except BaseException:
            wire.close()
            raise
        return wire

    return dial


def unreachable(place: Endpoint, error: RedisDown | Refused | Oversized, what: str = "did not answer") -> Exception:
    """Make the error that says that *place* could not be asked, and why; without credentials."""
    return RedisUnreachableError(f"{place.name} {what}: {error}")


async def _greet(wire: Wire, options: dict[str, Any]) -> None:
    provider = options.get("credential_provider")
    credentials: tuple[Any, ...] = ()
    if provider is not None:
        credentials = tuple(await provider.get_credentials_async())
    elif options.get("password") is not None:
        name = options.get("username")
        credentials = (options["password"],) if name is None else (name, options["password"])
    questions: list[tuple[Any, ...]] = []
    if credentials:
        questions.append(("AUTH", *credentials))
    if options.get("client_name"):
        questions.append(("CLIENT", "SETNAME", options["client_name"]))
    if options.get("db"):
        questions.append(("SELECT", options["db"]))
    # All at once: one round trip. Each is waited for, so that no refusal goes unheard.
    answers = await asyncio.gather(*map(wire.ask, questions), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


class RedisUnreachableError(redis.exceptions.ConnectionError, ConnectionError):
    """Redis could not be asked, or told, what must not be skipped; redis-py's ConnectionError and Python's."""
