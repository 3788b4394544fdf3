"""The provider: what it says is used; whatever it does wrong, the local summary answers, in time and truthfully."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient

from blueprints.documents import workflow
from tests.service.llm_server import SUMMARY, LLMServer
from tta_sync import call_sync
from tta_sync.facade import default_facade

MakeClient = Callable[..., FlaskClient]

TEXT = "The bridge carries async work. Callers stay synchronous."
MODEL = "test-model"
# For a provider that hangs: as a whole it then has 3 s, an attempt 0.5 s; three attempts and their back-off fit.
QUICK = {"TTA_DEADLINE": 6, "TTA_LLM_TIMEOUT": 0.5}


@pytest.fixture
def client(llm: LLMServer, make_client: MakeClient) -> FlaskClient:
    """A service whose provider is the loopback one."""
    return make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_API_KEY="the-key", TTA_LLM_MODEL=MODEL)


def process(client: FlaskClient, text: str = TEXT, **more: Any) -> dict[str, Any]:
    response = client.post("/api/process", json={"text": text, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json
    assert client.get(f"/api/documents/{answer['id']}").json == answer
    return answer


def assert_provider(answer: dict[str, Any], cached: bool = False) -> None:
    assert answer["summary"] == SUMMARY
    assert (answer["provider"], answer["degraded"], answer["cached"]) == (MODEL, False, cached)


def assert_local(answer: dict[str, Any], degraded: bool = True) -> None:
    assert answer["summary"] == TEXT
    assert (answer["provider"], answer["degraded"], answer["cached"]) == ("local", degraded, False)


# ---- a provider that works


def test_summary_is_the_providers_when_it_answers(client: FlaskClient, llm: LLMServer) -> None:
    """A good answer is the summary; the request is a chat completion with our model, our key, the text as data."""
    assert_provider(process(client))
    (request,) = llm.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer the-key"
    assert request["body"]["model"] == MODEL
    system, user = request["body"]["messages"]
    assert (system["role"], user) == ("system", {"role": "user", "content": TEXT})
    assert TEXT not in system["content"]


def test_summary_comes_from_the_cache_when_the_same_text_was_summarised(client: FlaskClient, llm: LLMServer) -> None:
    """The second time nobody is asked, the document is another one, and it says cached."""
    first, second = process(client), process(client)
    assert_provider(first)
    assert_provider(second, cached=True)
    assert first["id"] != second["id"]
    assert llm.calls == 1
    assert_provider(process(client, TEXT + " Another."))
    assert llm.calls == 2


def test_summary_is_asked_for_once_when_many_want_it_at_once(
    llm: LLMServer, make_client: MakeClient, eventually: Any
) -> None:
    """Requests that share one call all have the provider's answer, and none of them says cached."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.script = ["held"]
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(process, client.application.test_client()) for _ in range(8)]
        assert llm.arrived.acquire(timeout=20)
        # One that comes later would find the cache. All have been begun, and some turns of the loop bring them to it.
        eventually(lambda: [call.state for call in default_facade().in_flight()] == ["running"] * 8)
        for _ in range(100):
            call_sync(asyncio.sleep, 0)
        llm.release.set()
        for answer in answers:
            assert_provider(answer.result(timeout=20))
    assert llm.calls == 1
    assert_provider(process(client), cached=True)


def test_connection_is_kept_when_several_requests_are_made(client: FlaskClient, llm: LLMServer) -> None:
    """Calls share one pooled connection, whichever thread they come from."""
    with ThreadPoolExecutor(1) as threads:
        for n in range(4):
            assert_provider(threads.submit(process, client, f"{TEXT} {n}").result(timeout=20))
    assert_provider(process(client, f"{TEXT} again"))
    assert len({request["port"] for request in llm.requests}) == 1


def test_no_key_is_sent_when_none_is_set(llm: LLMServer, make_client: MakeClient) -> None:
    """Without TTA_LLM_API_KEY there is no Authorization header; a base URL may end with a slash."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url + "/", TTA_LLM_MODEL=MODEL)
    assert_provider(process(client))
    assert "Authorization" not in llm.requests[0]["headers"]
    assert llm.requests[0]["path"] == "/v1/chat/completions"


def test_shells_proxy_is_not_used_when_the_provider_is_asked(
    llm: LLMServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """A proxy variable of the shell sends no document elsewhere."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert_provider(process(make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)))


# ---- no summary asked for, no provider set


def test_provider_is_not_asked_when_no_summary_is_wanted(client: FlaskClient, llm: LLMServer) -> None:
    """Without a summary there is no provider, and nothing is degraded or cached."""
    answer = process(client, tasks=["language", "keywords"])
    assert (answer["summary"], answer["provider"], answer["degraded"], answer["cached"]) == (None, None, False, False)
    assert answer["language"] == "en"
    assert answer["keywords"]
    assert llm.calls == 0


def test_local_summary_is_not_degraded_when_no_provider_is_set(make_client: MakeClient) -> None:
    """Without TTA_LLM_BASE_URL the local summary is what was promised, and is never cached."""
    client = make_client()
    assert_local(process(client), degraded=False)
    assert_local(process(client), degraded=False)


def test_model_may_be_called_local_when_a_provider_is_set(llm: LLMServer, make_client: MakeClient) -> None:
    """Whether the summary is degraded does not hang on the model's name."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL="local")
    answer = process(client)
    assert (answer["summary"], answer["provider"], answer["degraded"]) == (SUMMARY, "local", False)
    assert process(client)["cached"]
    llm.mode = "garbage"
    assert process(client, TEXT + " More.")["degraded"]


# ---- a provider that fails


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        ("unavailable", 3),
        ("closed", 3),
        ("truncated", 3),
        ("refused", 1),
        ("redirect", 1),
        ("garbage", 1),
        ("empty", 1),
        ("wrong", 1),
        ("list", 1),
        ("number", 1),
        ("deep", 1),
        ("nul", 1),
        ("surrogate", 1),
        ("long", 1),
        ("huge", 1),
        ("gzip", 1),
    ],
)
def test_local_summary_answers_in_time_when_the_provider_fails(
    client: FlaskClient, llm: LLMServer, mode: str, calls: int
) -> None:
    """Whatever it does, the local summary is stored within the deadline; only what may pass is tried again."""
    llm.mode = mode
    began = time.monotonic()
    assert_local(process(client))
    assert time.monotonic() - began < 15
    assert llm.calls == calls


@pytest.mark.parametrize("mode", ["slow", "drip"])
def test_local_summary_answers_in_time_when_the_provider_hangs(
    llm: LLMServer, make_client: MakeClient, mode: str
) -> None:
    """A provider that says nothing, or a byte now and then, is cut at each attempt's limit, and three times at most."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL, **QUICK)
    llm.mode = mode
    began = time.monotonic()
    assert_local(process(client))
    assert 1.5 <= time.monotonic() - began < QUICK["TTA_DEADLINE"]
    assert llm.calls == 3


def test_local_summary_answers_in_time_when_nobody_listens(
    make_client: MakeClient, free_port: Callable[[], int]
) -> None:
    """A provider that is not there is found out at once."""
    client = make_client(TTA_LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    assert_local(process(client))


def test_local_summary_answers_in_time_when_one_attempt_could_take_it_all(
    llm: LLMServer, make_client: MakeClient
) -> None:
    """An attempt's limit beyond the provider's whole share is cut to it."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_DEADLINE=3.5, TTA_LLM_TIMEOUT=60)
    llm.mode = "slow"
    began = time.monotonic()
    assert_local(process(client))
    assert time.monotonic() - began < 3.5


def test_provider_is_asked_again_when_the_failure_may_pass(client: FlaskClient, llm: LLMServer) -> None:
    """One bad answer costs a retry, not the summary."""
    llm.script = ["unavailable", "closed"]
    assert_provider(process(client))
    assert llm.calls == 3


def test_retry_waits_as_long_as_the_provider_asks_when_that_fits(llm: LLMServer, make_client: MakeClient) -> None:
    """Retry-After is a floor for the wait."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.script, llm.retry_after = ["limited"], "1"
    began = time.monotonic()
    assert_provider(process(client))
    assert time.monotonic() - began >= 1
    assert llm.calls == 2


def test_retry_does_not_wait_when_the_wait_would_not_fit(llm: LLMServer, make_client: MakeClient) -> None:
    """A Retry-After beyond the provider's share is not waited for: the local summary answers at once."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.mode, llm.retry_after = "limited", "3600"
    began = time.monotonic()
    assert_local(process(client))
    assert time.monotonic() - began < 5
    assert llm.calls == 1


def test_local_summary_is_not_cached_when_the_provider_failed(client: FlaskClient, llm: LLMServer) -> None:
    """The next request asks the provider again."""
    llm.script = ["garbage"]
    assert_local(process(client))
    assert_provider(process(client))


def test_circuit_opens_when_the_provider_keeps_failing_and_closes_when_it_is_back(
    llm: LLMServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    """An open circuit asks nobody and answers locally; after the break one request finds out that all is well."""
    monkeypatch.setattr(workflow, "FAILURE_THRESHOLD", 4)
    monkeypatch.setattr(workflow, "RECOVERY_TIMEOUT", 2.5)
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.mode = "garbage"
    for n in range(4):
        assert_local({**process(client, f"{TEXT} {n}"), "summary": TEXT})
    assert llm.calls == 4
    llm.mode = "good"
    assert_local(process(client))
    assert llm.calls == 4
    eventually(lambda: not process(client)["degraded"], within=30, what="the provider's return")
    assert_provider(process(client, f"{TEXT} more"))
    assert llm.calls == 6


def test_circuit_stays_closed_when_our_own_request_is_refused(
    llm: LLMServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key says nothing about the provider's health: once it is right, the next request is answered."""
    monkeypatch.setattr(workflow, "FAILURE_THRESHOLD", 2)
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.mode = "refused"
    for n in range(4):
        assert process(client, f"{TEXT} {n}")["degraded"]
    llm.mode = "good"
    assert_provider(process(client))


def test_key_is_nowhere_in_the_logs_when_the_provider_fails(
    client: FlaskClient, llm: LLMServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No log line at any level, nor any error, holds the key."""
    caplog.set_level(logging.DEBUG)
    for mode in ("refused", "unavailable", "closed", "garbage"):
        llm.mode = mode
        process(client, f"{TEXT} {mode}")
    assert "the-key" not in caplog.text
    assert not [record for record in caplog.records if "the-key" in repr(record.__dict__)]
