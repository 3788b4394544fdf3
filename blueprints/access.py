"""Who may call: the one place for it.

Until there are API keys, the service answers its own machine only. The addresses checked are the connection's own;
no forwarding header is believed.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from flask import Flask, request

from blueprints.settings import Settings
from tta_sync.flask import Problem


def guard(app: Flask, settings: Settings) -> None:
    """Let requests of this machine through, and answer all others with 403, whatever they ask for."""
    names = {"localhost", settings.host.lower()}

    @app.before_request
    def check_access() -> None:
        if not _is_loopback(request.remote_addr):
            raise Problem(403, "forbidden", "This service answers its own machine only.")
        # A web page can point a name of its own at 127.0.0.1 and let the browser ask us; the Host header shows it.
        if not _is_ours(request.host, names):
            raise Problem(403, "forbidden", "The Host header names another machine.")


def _is_loopback(address: str | None) -> bool:
    if not address:
        return True  # a unix socket, whose file's permissions have already decided
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback


def _is_ours(host: str, names: set[str]) -> bool:
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    name = name.lower()
    if name in names or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
