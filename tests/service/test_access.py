"""Who may call: this machine, by a name that is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask.testing import FlaskClient

MakeClient = Callable[..., FlaskClient]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", ""])
def test_loopback_is_let_in(make_client: MakeClient, address: str) -> None:
    """Every loopback address, and a unix socket, may call."""
    assert make_client().get("/livez", environ_base={"REMOTE_ADDR": address}).status_code == 200


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "192.168.1.5", "203.0.113.9", "::ffff:10.0.0.1", "fe80::1", "nonsense"]
)
@pytest.mark.parametrize("path", ["/livez", "/api/documents", "/nothing"])
def test_another_machine_is_refused_whatever_it_asks_for(make_client: MakeClient, address: str, path: str) -> None:
    """Any other address gets a 403 problem, forwarding headers or not."""
    headers = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    response = make_client().get(path, environ_base={"REMOTE_ADDR": address}, headers=headers)
    assert response.status_code == 403
    assert response.content_type == "application/problem+json"


def test_another_machine_stores_nothing(make_client: MakeClient) -> None:
    """A refused request has no effect."""
    client = make_client()
    refused = client.post("/api/process", json={"text": "a"}, environ_base={"REMOTE_ADDR": "10.0.0.1"})
    assert refused.status_code == 403
    assert client.get("/api/documents").json["items"] == []


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost"])
def test_host_of_this_machine_is_let_in(make_client: MakeClient, host: str) -> None:
    """Names and addresses of this machine may stand in the Host header."""
    assert make_client().get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_host_of_another_is_refused(make_client: MakeClient, host: str) -> None:
    """A web page's own name, pointed at 127.0.0.1, does not reach the service through the browser."""
    assert make_client().get("/livez", headers={"Host": host}).status_code == 403


def test_host_that_was_set_is_let_in(make_client: MakeClient) -> None:
    """The name in TTA_HOST is one of ours."""
    client = make_client(TTA_HOST="service.internal")
    assert client.get("/livez", headers={"Host": "service.internal:8000"}).status_code == 200
