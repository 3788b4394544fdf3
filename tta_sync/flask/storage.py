"""What the requests of an application share: its Redis, where it has one, and the memory of this process."""

from __future__ import annotations

import inspect
import os
import uuid
from collections.abc import Callable
from typing import Any, cast

from flask import current_app, request

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.recovery.rate_limit import spelled


class Storage:
    """The stores of one application, each made at its first use."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``make(*arguments)``, the same object for all who ask for it."""
        known = (make, *arguments)
        found = self._made.get(known)
        if found is None:
            found = self._made.setdefault(known, make(*arguments))  # atomic: of two threads one wins
        return found


def of_application() -> Storage:
    """Return the current application's.

    Raises:
        ConfigurationError: it has no TTASync.
    """
    state = current_app.extensions.get("tta_sync")
    if state is None:
        raise ConfigurationError(
            "this application does not know TTASync: call tta.init_app(app), or build TTASync(blueprint)"
        )
    return cast(Storage, state.storage)


def redis_url() -> str | None:
    """Return where the application, or else the environment, says that Redis is; None where neither does.

    An empty setting means: none, whatever the others say.
    """
    for source in (current_app.config, os.environ):
        for name in ("TTA_REDIS_URL", "REDIS_URL"):
            url = source.get(name)
            if url is not None:
                return str(url) or None
    return None


def remote_address() -> str:
    """Return the client's address; of IPv6 the /64 network, which is the least that one subscriber has.

    Behind a proxy this is the proxy, for every client: let ``werkzeug.middleware.proxy_fix.ProxyFix`` say whom to
    believe.
    """
    given = request.remote_addr or ""
    if ":" not in given:
        return given
    import ipaddress

    try:
        address = ipaddress.IPv6Address(given.partition("%")[0])
    except ValueError:
        return given
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def supplier(name: str, function: Any) -> Callable[[], str]:
    """Return *function* as one of no arguments whose values are spelled the same in every process.

    Raises:
        ConfigurationError: it is no plain function.
    """
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"{name} is a plain function, of nothing or of the request, not {function!r:.100}: "
            f'write {name}=lambda: request.headers.get("X-Api-Key")'
        )
    asks = _takes_an_argument(function)

    def supply() -> str:
        value = function(request) if asks else function()
        return spelled(str(value) if isinstance(value, uuid.UUID) else value)

    return supply


def _takes_an_argument(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
