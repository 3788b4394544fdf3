"""A provider on loopback that answers well, slowly, with errors, with garbage, or not at all; over real HTTP."""

from __future__ import annotations

import time

import pytest

DEADLINE = 6.0


@pytest.fixture
def service(start_small, llm):
    """The service with the provider set, half a second for each attempt."""
    return start_small(
        TTA_LLM_BASE_URL=llm.base_url,
        TTA_LLM_API_KEY="key",
        TTA_LLM_MODEL="model-1",
        TTA_LLM_TIMEOUT="0.5",
        TTA_DEADLINE=f"{DEADLINE:g}",
    )


def test_provider_summarises_when_it_answers_well(service, llm, eventually):
    """Its summary is the answer's, asked with the key and the model; the same text is soon answered from the cache."""
    answer = service.post("/api/process", {"text": "A text for the provider."}).body
    assert (answer["summary"], answer["provider"]) == (llm.summary, "model-1")
    assert (answer["degraded"], answer["cached"]) == (False, False)
    asked = llm.requests[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["headers"]["Authorization"] == "Bearer key"
    assert asked["body"]["model"] == "model-1"
    again = eventually(
        lambda: a if (a := service.post("/api/process", {"text": "A text for the provider."}).body)["cached"] else None
    )
    assert (again["summary"], again["provider"], again["degraded"]) == (llm.summary, "model-1", False)
    assert again["id"] != answer["id"]
    assert llm.calls == 1


@pytest.mark.parametrize("mode", ["slow", "limited", "garbage", "gone"])
def test_local_summary_answers_in_time_when_the_provider_fails(start_small, service, llm, mode):
    """Whatever the provider does, the local summary answers within the deadline, says so, and is stored."""
    if mode == "gone":
        llm.stop()
    else:
        llm.mode = mode
        llm.retry_after = "120"
    for attempt in range(3):  # with more, the circuit opens: the promise is the same
        began = time.monotonic()
        answer = service.post("/api/process", {"text": f"Attempt {attempt} stands alone."}, **{"X-Request-ID": "r-1"})
        assert time.monotonic() - began < DEADLINE + 1
        assert answer.status == 200
        document = answer.body
        assert document["summary"] == f"Attempt {attempt} stands alone."
        assert (document["provider"], document["degraded"], document["cached"]) == ("local", True, False)
        assert (document["correlation_id"], answer.headers["X-Request-ID"]) == ("r-1", "r-1")
        assert service.get(f"/api/documents/{document['id']}").body == document
