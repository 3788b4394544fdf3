"""The documents' own snippets run: only the package's name is replaced, and names that they leave open get a body."""

from __future__ import annotations

import asyncio
import functools
import importlib
import re
import subprocess
import sys
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import redis.asyncio

from tta_sync import step
from tta_sync.context import WorkflowContext
from tta_sync.primitives import MockPrimitive, WorkflowPrimitive

DOCUMENT = Path(__file__).with_name("seeds.md")


def snippet(title: str) -> str:
    """The code under a heading, with the rule of migration applied, and nothing else changed."""
    found = re.search(rf"^## {re.escape(title)}\n\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, title
    code = found[1].replace("tta_dev_primitives", "tta_sync.primitives")
    return code.replace("from observability_integration", "from tta_sync.observability")


def run_snippet(title: str, **names: Any) -> dict[str, Any]:
    """Execute a snippet where *names* are what it leaves open; return all its names."""
    namespace = {"__name__": f"snippet_{re.sub(r'[^a-z]+', '_', title.lower())}", **names}
    exec(compile(snippet(title), f"{DOCUMENT.name}: {title}", "exec"), namespace)
    return namespace


# The bodies: plain functions wherever the other operand is a primitive, as the documents write them.


async def validate_input(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "valid": True}


def format_response(data: Any) -> dict[str, Any]:
    return {"answer": data}


@step
async def step1(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "steps": [1]}


async def step2(data: dict[str, Any], context: WorkflowContext) -> dict[str, Any]:
    return {**data, "steps": [*data["steps"], 2], "correlation_id": context.correlation_id}


def step3(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "steps": [*data["steps"], 3]}


workflow = step1 >> step2 >> step3

expensive_calls: list[Any] = []


async def expensive_operation(data: Any) -> str:
    expensive_calls.append(data)
    return f"computed {data}"


async def expensive_llm_call(data: Any) -> str:
    expensive_calls.append(data)
    return f"said {data}"


@pytest.fixture
def redis_by_default(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> redis.Redis:
    """``Redis()`` without arguments, as the snippets write it, reaches the test's server."""
    port = urllib.parse.urlsplit(redis_url).port
    for kind in redis.Redis, redis.asyncio.Redis:
        monkeypatch.setattr(kind, "__init__", functools.partialmethod(kind.__init__, port=port))
    expensive_calls.clear()
    return redis.Redis()


# ---- the snippets -------------------------------------------------------------------------------------------------


def test_good_implementation_runs_as_written() -> None:
    """Context first at the call, Retry and Timeout by keyword, plain functions in the chain."""
    enrich_data = MockPrimitive("enrich", side_effect=[OSError("first"), {"rich": True}])
    saved: list[Any] = []

    async def save_to_db(data: Any, context: WorkflowContext) -> Any:
        saved.append(data)
        return data

    names = run_snippet(
        "Good: Primitive-Based Implementation",
        validate_input=validate_input,
        enrich_data=enrich_data,
        save_to_db=save_to_db,
    )
    assert asyncio.run(names["process_data"]({"id": 1}, WorkflowContext())) == {"rich": True}
    assert saved == [{"rich": True}]
    assert enrich_data.calls[0][0] == {"id": 1, "valid": True}
    assert enrich_data.call_count == 2


def test_first_workflow_runs_as_written() -> None:
    """A cache at the head of the chain answers the second request; the context takes the request's id."""
    llm = MockPrimitive("llm", side_effect=[ConnectionError("first"), "hello"])
    names = run_snippet("2. Build Your First Workflow", your_llm_primitive=llm, format_response=format_response)
    request = {"request_id": "r1", "prompt": "hi"}
    assert asyncio.run(names["handle_request"](request)) == {"answer": "hello"}
    assert asyncio.run(names["handle_request"](request)) == {"answer": "hello"}
    assert llm.call_count == 2
    assert llm.last_context is not None
    assert llm.last_context.correlation_id == "r1"


def test_fastapi_endpoint_runs_as_written() -> None:
    """A workflow awaited in a FastAPI view."""
    names = run_snippet("FastAPI Integration", step1=step1, step2=step2, step3=step3)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=names["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/api/process", json={"id": "x1"})

    response = asyncio.run(post())
    assert response.json() == {"id": "x1", "steps": [1, 2, 3], "correlation_id": "x1"}


def test_flask_view_runs_as_written() -> None:
    """A workflow run by asyncio.run in a Flask view: primitives need no managed loop."""
    names = run_snippet("Flask Integration", workflow=workflow, WorkflowContext=WorkflowContext)
    response = names["app"].test_client().post("/api/process", json={"id": 1})
    assert response.status_code == 200
    assert response.json["steps"] == [1, 2, 3]


def test_celery_task_runs_as_written() -> None:
    """A workflow in a Celery task that is a coroutine function."""
    names = run_snippet(
        "Celery Integration",
        data_pipeline=step(lambda data: {**data, "rows": 3}),
        ml_model=lambda data: {**data, "score": 0.5},
        store_results=lambda data, context: {**data, "stored_by": context.correlation_id},
        WorkflowContext=WorkflowContext,
    )
    result = asyncio.run(names["process_batch"]("b7"))
    assert result == {"batch_id": "b7", "rows": 3, "score": 0.5, "stored_by": "b7"}


def test_rq_job_runs_as_written(
    redis_by_default: redis.Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The async job that the snippet enqueues runs on a stock worker with our job class, on the managed loop."""
    # A job must be importable by its worker: the snippet's first part is a module, below the names it leaves open.
    (tmp_path / "names.py").write_text(
        "from tta_sync.primitives import WorkflowContext, step\n"
        "workflow = step(lambda data: {**data, 'done': True})\n"
        "job_data = {'document': 4}\n"
    )
    job = snippet("Redis Queue Integration").partition("# Enqueue jobs")[0]
    (tmp_path / "rq_snippet.py").write_text("from names import *\n" + job)
    monkeypatch.syspath_prepend(tmp_path)
    module = vars(importlib.import_module("rq_snippet"))
    try:
        exec(snippet("Redis Queue Integration").partition("# Enqueue jobs")[2], module)
        worker = [str(Path(sys.executable).parent / "rq"), "worker", "--burst", "--url", redis_url]
        done = subprocess.run(
            [*worker, "--path", str(tmp_path), "--job-class", "tta_sync.rq.WorkflowJob", "default"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        module["job"].refresh()
        assert module["job"].get_status() == "finished"
        assert module["job"].return_value() == {"document": 4, "done": True}
    finally:
        for name in "rq_snippet", "names":
            sys.modules.pop(name, None)


def test_sqlalchemy_workflow_runs_as_written() -> None:
    """Steps made per call, around a session that the workflow gets as an argument."""
    log: list[str] = []

    def query_database(session: Any) -> WorkflowPrimitive[Any, Any]:
        return step(lambda data: log.append(f"query {session}") or {**data, "row": 1})

    def update_database(session: Any) -> Any:
        return lambda data: log.append(f"update {session}") or data

    names = run_snippet(
        "With SQLAlchemy",
        validate_data=validate_input,
        query_database=query_database,
        transform_results=lambda data: {**data, "transformed": True},
        update_database=update_database,
        WorkflowContext=WorkflowContext,
    )
    result = asyncio.run(names["db_workflow"]("the session", {"id": 1}))
    assert result == {"id": 1, "valid": True, "row": 1, "transformed": True}
    assert log == ["query the session", "update the session"]


def test_redis_cache_runs_as_written(redis_by_default: redis.Redis) -> None:
    """``storage=Redis()`` of redis.asyncio: the second call, on another loop, is answered by Redis."""
    cached = run_snippet("With Redis", expensive_operation=expensive_operation)["cached_workflow"]
    assert asyncio.run(cached.execute({"id": 1}, WorkflowContext())) == "computed {'id': 1}"
    assert asyncio.run(cached.execute({"id": 1}, WorkflowContext())) == "computed {'id': 1}"
    assert cached.run_sync({"id": 1}) == "computed {'id': 1}"
    assert expensive_calls == [{"id": 1}]
    assert redis_by_default.keys("tta:*")


def test_error_handling_runs_as_written() -> None:
    """Retry by position, then a fallback chain of which the second stands in."""
    primary_service = MockPrimitive("service", side_effect=[TimeoutError("slow"), "served"])
    names = run_snippet(
        "Error Handling",
        validate_input=validate_input,
        primary_service=primary_service,
        primary_processor=MockPrimitive("primary", raise_error=ConnectionError("down")),
        backup_processor=MockPrimitive("backup", raise_error=ConnectionError("down too")),
        cached_response=lambda data: f"cached {data}",
    )
    context = WorkflowContext()
    assert asyncio.run(names["production_workflow"].execute({"id": 1}, context)) == "cached served"
    assert primary_service.call_count == 2
    assert context.degraded


def test_observability_runs_as_written(caplog: pytest.LogCaptureFixture) -> None:
    """The one call serves metrics on 9464; where another process has the port, it is a warning."""
    from tta_sync.observability import initialize_observability

    run_snippet("Monitoring & Observability")
    made = initialize_observability(service_name="my-backend-api", enable_prometheus=True)
    try:
        asyncio.run((step(str, name="measured") >> step(str)).execute(1, WorkflowContext()))
        assert made.server is not None
        if made.server.port is None:
            assert len(caplog.records) == 1
        else:
            text = urllib.request.urlopen("http://localhost:9464/metrics", timeout=10).read().decode()
            assert 'tta_step_duration_seconds_count{outcome="ok",step="measured"} 1.0' in text
    finally:
        made.shutdown()


def test_rate_limiting_runs_as_written() -> None:
    """A plain function before a Timeout, and one after it."""
    names = run_snippet(
        "Rate Limiting",
        check_rate_limit=lambda data: {**data, "allowed": True},
        external_api_call=validate_input,
        process_response=lambda data: sorted(data),
    )
    assert asyncio.run(names["rate_limited_api"].execute({"id": 1})) == ["allowed", "id", "valid"]


def test_environment_configuration_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings reach a primitive of the user's own, which takes no part in our constructors."""

    class OpenAIPrimitive(WorkflowPrimitive[str, str]):
        def __init__(self, api_key: str) -> None:
            self.api_key = api_key

        async def execute(self, data: str, context: WorkflowContext) -> str:
            return f"{data} with a key of {len(self.api_key)}"

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the snippet's class-based Config, of pydantic 1
        names = run_snippet("Environment Configuration", OpenAIPrimitive=OpenAIPrimitive)
    assert asyncio.run((names["llm"] >> str.upper).execute("hi")) == "HI WITH A KEY OF 7"
    assert names["settings"].max_retries == 3


@pytest.mark.parametrize(
    ("error", "answer"),
    [(None, {"status": "healthy"}), (ValueError("broken"), [{"status": "unhealthy", "error": "broken"}, 500])],
)
def test_health_check_runs_as_written(error: Exception | None, answer: Any) -> None:
    """A workflow tried in a health check; its error comes out as itself."""
    from fastapi import FastAPI

    app = FastAPI()
    health_workflow = step(dict) >> MockPrimitive("health", raise_error=error)
    run_snippet("Health Checks", app=app, WorkflowContext=WorkflowContext, health_workflow=health_workflow)

    async def get() -> Any:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get("/health")).json()

    assert asyncio.run(get()) == answer


def test_caching_strategy_runs_as_written(redis_by_default: redis.Redis) -> None:
    """Memory over Redis over the call, in the order in which the chain is written."""
    flow = run_snippet("Caching Strategy", expensive_llm_call=expensive_llm_call, redis=redis.asyncio.Redis())[
        "workflow"
    ]
    assert asyncio.run(flow.execute("hi", WorkflowContext())) == "said hi"
    assert redis_by_default.keys("tta:*")
    redis_by_default.flushall()
    assert asyncio.run(flow.execute("hi", WorkflowContext())) == "said hi"
    assert expensive_calls == ["hi"]


def test_caching_strategy_runs_when_there_is_no_redis() -> None:
    """With nothing listening, the call is made and the memory layer still works."""
    expensive_calls.clear()
    gone = redis.asyncio.Redis(port=1)

    async def other_llm_call(data: str) -> str:
        return await expensive_llm_call(data)

    other_llm_call.__qualname__ = "other_llm_call"
    flow = run_snippet("Caching Strategy", expensive_llm_call=other_llm_call, redis=gone)["workflow"]
    assert [asyncio.run(flow.execute("hi", WorkflowContext())) for _ in range(2)] == ["said hi"] * 2
    assert expensive_calls == ["hi"]


def test_connection_pooling_runs_as_written() -> None:
    """A primitive of the user's own, without ``super().__init__()``, around a shared client."""
    names = run_snippet("Connection Pooling", httpx=httpx, WorkflowPrimitive=WorkflowPrimitive)
    api_call = names["APICallPrimitive"]()
    assert api_call.client is names["http_client"]
    with pytest.raises(NotImplementedError, match=r"APICallPrimitive has no execute\(data, context\)"):
        asyncio.run((step(str) >> api_call).execute(1))
    asyncio.run(names["http_client"].aclose())


def test_input_validation_runs_as_written() -> None:
    """Validated input goes into the workflow; bad input never reaches it."""
    code = snippet("Input Validation")
    mock = MockPrimitive("workflow", side_effect=lambda data: data["text"])

    def run(request_data: dict[str, Any]) -> Any:
        # The snippet awaits at its top level, as a notebook does.
        body = "async def main():\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "    return result\n"
        namespace: dict[str, Any] = {"request_data": request_data, "workflow": mock, "context": WorkflowContext()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the snippet's validator and .dict(), of pydantic 1
            exec(body, namespace)
            return asyncio.run(namespace["main"]())

    assert run({"text": "hi", "max_length": 10}) == "hi"
    with pytest.raises(ValueError, match="max_length too large"):
        run({"text": "hi", "max_length": 99_999})
    mock.assert_called_once()


def test_every_snippet_of_the_document_is_run() -> None:
    """No heading of the collection is without a test in this file."""
    titles = re.findall(r"^## (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    tests = Path(__file__).read_text()
    assert [title for title in titles if f'"{title}"' not in tests] == []
