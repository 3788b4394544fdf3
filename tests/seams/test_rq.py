"""Jobs on RQ: what may be enqueued, what travels, how real stock workers run it, and what a timeout leaves behind."""

from __future__ import annotations

import base64
import inspect
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
import rq.job
import rq.results
import rq.timeouts
from flask import Flask
from marshmallow import ValidationError
from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from tests.seams import rq_jobs as jobs
from tta_sync.context import Deadline, WorkflowContext, current_context, running_context
from tta_sync.exceptions import ConfigurationError
from tta_sync.facade import default_facade
from tta_sync.rq import WorkflowJob, workflow_job
from tta_sync.rq.job import context_of

CHECKOUT = Path(__file__).parents[2]
RQ = Path(sys.executable).with_name("rq")


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The test's Redis, to which job functions enqueue because REDIS_URL says so."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


Work = Callable[..., str]


@pytest.fixture
def work(client: Redis, redis_url: str, tmp_path: Path) -> Work:
    """Run `rq worker --burst` with the given options until the queue is empty; returns what it logged."""

    def run(*options: str) -> str:
        command = [str(RQ), "worker", "--burst", "--url", redis_url, "--path", str(CHECKOUT), *options, "default"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "error::ResourceWarning", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


OURS = ("--job-class", "tta_sync.rq.WorkflowJob")
SIMPLE = ("--worker-class", "rq.SimpleWorker")


def ended(job: Job) -> WorkflowJob:
    """The job as it is stored now."""
    return WorkflowJob.fetch(job.id, connection=job.connection)


def value(job: Job) -> Any:
    job = ended(job)
    result = job.latest_result()
    assert job.get_status() == JobStatus.FINISHED, result and result.exc_string
    return job.return_value()


def failure(job: Job) -> str:
    job = ended(job)
    assert job.get_status() == JobStatus.FAILED
    result = job.latest_result()
    assert result is not None
    assert result.exc_string is not None
    return result.exc_string


# ---- enqueueing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "enqueue", [jobs.measure.enqueue, jobs.measure.delay, lambda d: jobs.measure.enqueue_many([d])]
)
@pytest.mark.parametrize("data", [None, {}, {"text": ""}, {"text": 1}, {"text": "a", "more": 1}, []])
def test_bad_data_is_refused_before_anything_is_queued(client: Redis, enqueue: Any, data: Any) -> None:
    """marshmallow's ValidationError, and Redis has never heard of it."""
    with pytest.raises(ValidationError):
        enqueue(data)
    assert client.keys() == []


def test_data_that_json_cannot_carry_is_refused_with_what_to_do(client: Redis) -> None:
    """Not RQ's later failure in the worker, but an error where it can be mended."""
    with pytest.raises(TypeError, match="plain types"):
        jobs.with_data_only.enqueue({1, 2})
    with pytest.raises(TypeError, match="plain types"):
        jobs.with_data_only.enqueue_many([1, object()])
    assert client.keys() == []


def test_job_is_stored_as_json_under_the_functions_name(client: Redis) -> None:
    """Nothing of the job is pickled, and what RQ's tools show is the function's dotted name."""
    job = jobs.measure.enqueue({"text": "abc"}, job_id="my-id")
    raw = client.hgetall("rq:job:my-id")
    assert json.loads(zlib.decompress(raw[b"data"])) == ["tests.seams.rq_jobs.measure", None, [{"text": "abc"}], {}]
    assert set(json.loads(raw[b"meta"])["tta_sync"]) == {"context"}
    assert job.timeout == 60
    assert client.lrange("rq:queue:default", 0, -1) == [b"my-id"]


def test_settings_of_the_function_and_of_the_call_reach_rq(client: Redis) -> None:
    """TTLs, retries and the rest are RQ's own; a call may override them."""
    job = jobs.with_settings.enqueue({}, at_front=True, description="mine", meta={"owner": "ada"}, ttl=5)
    assert (job.result_ttl, job.failure_ttl, job.ttl, job.description) == (77, 88, 5, "mine")
    assert job.meta["owner"] == "ada"
    assert job.meta["tta_sync"]["idempotent"] is True
    assert jobs.third_time.enqueue("k").retries_left == 2
    assert jobs.third_time.enqueue("k", retry=Retry(max=5)).retries_left == 5


def test_many_are_enqueued_in_one_round_trip_each_with_its_id(client: Redis) -> None:
    """enqueue_many is one transaction however many items; ids and order are kept."""
    jobs.with_data_only.enqueue(0)  # RQ asks once for the server's version
    before = client.info("commandstats")["cmdstat_exec"]["calls"]
    made = jobs.with_data_only.enqueue_many(range(50), job_ids=[f"id-{i}" for i in range(50)])
    assert client.info("commandstats")["cmdstat_exec"]["calls"] == before + 1
    assert [job.id for job in made] == [f"id-{i}" for i in range(50)]
    assert [job.args for job in made[:2]] == [(0,), (1,)]
    assert client.llen("rq:queue:default") == 51
    assert len({json.dumps(job.meta["tta_sync"]["context"]["correlation_id"]) for job in made}) == 1


def test_none_is_enqueued_when_one_of_many_is_bad(client: Redis) -> None:
    """One bad item refuses all, and its index is in the messages."""
    with pytest.raises(ValidationError) as caught:
        jobs.measure.enqueue_many([{"text": "a"}, {"text": ""}, {"text": "b"}, {}])
    assert set(caught.value.normalized_messages()) == {1, 3}
    assert client.keys() == []
    assert jobs.measure.enqueue_many([]) == []
    with pytest.raises(ValueError, match="2 items and 1 job ids"):
        jobs.measure.enqueue_many([{"text": "a"}, {"text": "b"}], job_ids=["x"])


def test_unique_job_is_refused_when_it_is_there_already(client: Redis) -> None:
    """unique=True: the same id, or the same data where no id is given, cannot be enqueued twice."""
    jobs.only_once.enqueue({"a": 1, "b": 2})
    with pytest.raises(DuplicateJobError):
        jobs.only_once.enqueue({"b": 2, "a": 1})
    jobs.only_once.enqueue({"a": 2})
    jobs.only_once.enqueue({"a": 2}, job_id="other")
    with pytest.raises(DuplicateJobError):
        jobs.only_once.enqueue({"a": 3}, job_id="other")
    with pytest.raises(ConfigurationError, match="one by one"):
        jobs.only_once.enqueue_many([1])
    assert client.llen("rq:queue:default") == 3


# ---- which Redis -----------------------------------------------------------------------------------------------------


def test_connection_is_the_one_given_then_flasks_then_the_environments(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """connection=, else app.config["TTA_REDIS_URL"], else REDIS_URL, else an error that names all three."""
    base = redis_url.rsplit("/", 1)[0]

    def queued(database: int) -> int:
        with Redis.from_url(f"{base}/{database}") as client:
            return int(client.llen("rq:queue:default"))

    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        jobs.with_data_only.enqueue(1)
    monkeypatch.setenv("REDIS_URL", f"{base}/1")
    jobs.with_data_only.enqueue(1)
    assert queued(1) == 1
    application = Flask(__name__)
    with application.app_context():
        jobs.with_data_only.enqueue(1)
        assert queued(1) == 2
        application.config["TTA_REDIS_URL"] = f"{base}/2"
        jobs.with_data_only.delay(1)
        assert queued(2) == 1
        with Redis.from_url(f"{base}/3") as given:
            jobs.with_data_only.enqueue(1, connection=given)
            jobs.with_data_only.enqueue_many([1, 2], connection=given)
        assert queued(3) == 3


def test_queue_may_be_an_object(client: Redis) -> None:
    """A Queue brings its own connection."""
    queue = Queue("other", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)
    made = workflow_job(queue)(jobs.length_of)
    globals()["made_here"] = made
    try:
        job = made.enqueue({"text": "a"})
        assert job.func_name == f"{__name__}.made_here"
        assert client.llen("rq:queue:other") == 1
        made.enqueue({"text": "a"}, connection=client)
        assert client.llen("rq:queue:other") == 2
    finally:
        del globals()["made_here"]


def test_refusal_is_quick_when_redis_is_down(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who enqueues inside a request hears at once that Redis is down."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    with pytest.raises(redis.exceptions.ConnectionError):
        jobs.with_data_only.enqueue(1)
    assert time.monotonic() - began < 5


# ---- building --------------------------------------------------------------------------------------------------------


def test_job_function_keeps_its_face_and_what_it_runs() -> None:
    """It is a function with the decorated one's name and docstring; .workflow is what it runs."""
    assert inspect.isfunction(jobs.measure)
    assert jobs.measure.__name__ == "measure"
    assert jobs.measure.__doc__ == "Measure a text."
    assert jobs.measure_flow.workflow is jobs.length_of


@pytest.mark.parametrize("timeout", [0, -2, 1.5, "soon", True, "0"])
def test_timeout_is_refused_when_rqs_alarm_cannot_keep_it(timeout: Any) -> None:
    """RQ's alarm knows whole seconds from 1; 0 would switch it off."""
    with pytest.raises(ConfigurationError, match="timeout"):
        workflow_job("default", timeout=timeout)


@pytest.mark.parametrize(("timeout", "seconds"), [(5, 5), ("1m", 60), (-1, -1), (None, 180)])
def test_timeout_is_what_rq_understands(client: Redis, timeout: Any, seconds: int) -> None:
    """Whole seconds, RQ's own "1m", -1 for none, or the queue's default."""
    made = workflow_job("default", timeout=timeout)(jobs.length_of)
    globals()["made_here"] = made
    try:
        assert made.enqueue({"text": ""}).timeout == seconds
    finally:
        del globals()["made_here"]


def test_function_that_no_worker_could_import_is_refused_when_it_is_enqueued(client: Redis) -> None:
    """A nested function, or one of the script itself, is told what to become."""

    @workflow_job("default")
    async def nested(data: Any) -> Any: ...

    with pytest.raises(ConfigurationError, match="top-level"):
        nested.enqueue(1)
    nested.__module__ = "__main__"
    with pytest.raises(ConfigurationError, match="top-level"):
        nested.enqueue(1)
    assert client.keys() == []


def test_things_that_are_no_work_are_refused() -> None:
    """A job function needs a function or a workflow."""
    with pytest.raises(ConfigurationError):
        workflow_job("default")(42)


# ---- running here ----------------------------------------------------------------------------------------------------


def test_run_does_the_job_here_with_its_schemas() -> None:
    """.run is for tests: the schemas, the workflow, what RQ would have stored; no Redis."""
    assert jobs.measure.run({"text": "abc"}) == {"length": 3}
    assert jobs.measure({"text": "abc"}) == {"length": 3}
    with pytest.raises(ValidationError):
        jobs.measure.run({})
    described = jobs.its_context.run(None, WorkflowContext(correlation_id="mine", tenant="t"))
    assert (described["correlation_id"], described["tenant"]) == ("mine", "t")


def test_run_happens_in_the_unit_of_work() -> None:
    """unit_of_work= wraps each run, before the result is dumped."""
    happened: list[str] = []

    class Units:
        def run(self, fn: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
            happened.append("begin")
            try:
                return fn(*args, **keywords)
            finally:
                happened.append("end")

    made = workflow_job("default", dump=jobs.Length, unit_of_work=Units())(jobs.length_of)
    assert made.run({"text": "abc"}) == {"length": 3}
    assert happened == ["begin", "end"]


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_identity_of_the_current_request_travels_but_not_its_deadline(client: Redis) -> None:
    """Id, trace, tenant and baggage of who enqueues go along; that they wait only so long is not the job's concern."""
    context = WorkflowContext(
        correlation_id="req-1",
        tenant="acme",
        trace_id="a" * 32,
        span_id="b" * 16,
        baggage={"k": "v"},
        state={"not": object()},
        deadline=Deadline.after(5),
    )
    token = running_context.set(context)
    try:
        job = jobs.its_context.enqueue(None)
    finally:
        running_context.reset(token)
    carried = context_of(job)
    assert (carried.correlation_id, carried.tenant, carried.trace_id) == ("req-1", "acme", "a" * 32)
    assert carried.baggage == {"k": "v"}
    assert carried.state == {}
    assert carried.deadline is not None
    assert 25 < carried.deadline.remaining() <= 30


def test_given_context_travels_whole(client: Redis) -> None:
    """A context given on purpose keeps its deadline and state."""
    context = WorkflowContext(correlation_id="c", state={"k": [1]}, deadline=Deadline.after(5))
    job = jobs.its_context.enqueue(None, context=context)
    carried = context_of(job)
    assert carried.correlation_id == "c"
    assert carried.state == {"k": [1]}
    assert carried.deadline is not None
    assert 0 < carried.deadline.remaining() <= 5
    assert context.deadline is not None


def test_state_that_json_cannot_carry_is_refused_with_what_to_do(client: Redis) -> None:
    """A context given on purpose must be able to travel; nothing is queued if it is not."""
    with pytest.raises(TypeError, match="state"):
        jobs.its_context.enqueue(None, context=WorkflowContext(state={"k": object()}))
    assert client.keys() == []


def test_workflow_sees_the_state_that_travelled(client: Redis) -> None:
    """What was in the given context is there in the job, the same for each attempt of its unit of work."""
    queue = Queue("default", connection=client, is_async=False, job_class=WorkflowJob, serializer=JSONSerializer)
    made = workflow_job(queue)(jobs.its_state.workflow)
    globals()["made_here"] = made
    try:
        assert value(made.enqueue(None, context=WorkflowContext(state={"k": 1}))) == {"k": 1}
    finally:
        del globals()["made_here"]

    meta = {"tta_sync": {"context": {"state": {"k": 2}}}}
    assert value(queue.enqueue("tests.seams.rq_jobs.state_of", None, meta=meta)) == {"k": 2}

    class Twice:
        def run(self, fn: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
            fn(*args, **keywords)["k"] = "left behind"
            return fn(*args, **keywords)

    made = workflow_job("default", unit_of_work=Twice())(jobs.its_state.workflow)
    assert made.run(None, WorkflowContext(state={"k": 1})) == {"k": 1}


def test_job_inside_a_job_has_its_own_context(client: Redis) -> None:
    """Run inline, as tests do: the inner job's context is its own, and the outer's is back afterwards."""
    queue = Queue("default", connection=client, is_async=False, job_class=WorkflowJob, serializer=JSONSerializer)
    meta = {"tta_sync": {"context": {"correlation_id": "outer"}}}
    assert value(queue.enqueue("tests.seams.rq_jobs.enqueues_another", None, meta=meta)) == ["inner", "outer"]


def test_worker_does_not_log_what_the_job_was_given(client: Redis, work: Work) -> None:
    """RQ logs a job's description, which by default shows the arguments; ours is the function's name."""
    job = jobs.measure.enqueue({"text": "confidential"})
    jobs.measure.enqueue_many([{"text": "confidential"}])
    log = work(*OURS)
    assert "confidential" not in log
    assert "tests.seams.rq_jobs.measure" in log
    assert value(job) == {"length": 12}


@pytest.mark.parametrize("deadline", [lambda: 7, lambda: Deadline.after(7)])
def test_deadline_of_the_job_can_be_given(client: Redis, deadline: Any) -> None:
    """deadline= counts the time in the queue too; the job's own timeout still holds."""
    (job,) = jobs.its_context.enqueue_many([None], deadline=deadline())
    carried = context_of(job)
    assert carried.deadline is not None
    assert 0 < carried.deadline.remaining() <= 7
    job = jobs.its_context.enqueue(None, deadline=500)
    carried = context_of(job)
    assert carried.deadline is not None
    assert carried.deadline.remaining() <= 30


def test_context_is_read_when_a_newer_release_wrote_more(client: Redis) -> None:
    """During a deployment old workers meet new jobs; a job without our mark has a fresh context."""
    job = jobs.its_context.enqueue(None)
    job.meta["tta_sync"]["context"]["from_the_future"] = 1
    assert context_of(job).correlation_id == job.meta["tta_sync"]["context"]["correlation_id"]
    job.meta = {}
    assert context_of(job).correlation_id


# ---- real workers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [(), SIMPLE])
@pytest.mark.parametrize("serializer", [(), ("--serializer", "rq.serializers.JSONSerializer")])
def test_jobs_run_on_stock_workers_with_our_job_class(
    client: Redis, work: Work, worker: tuple[str, ...], serializer: tuple[str, ...]
) -> None:
    """Forking or not, and whatever the worker's --serializer: JSON is read as JSON, results are JSON."""
    a = jobs.measure.enqueue({"text": "abc"})
    b = jobs.measure_flow.enqueue({"text": "abcd"})
    c = jobs.places.enqueue({"x": 1})
    d = jobs.with_data_only.enqueue([1, {"a": None}])
    e = jobs.sync_job.enqueue(1, context=WorkflowContext(correlation_id="c"))
    f = jobs.its_context.enqueue(None, context=WorkflowContext(correlation_id="r", tenant="t"))
    work(*OURS, *worker, *serializer)
    assert value(a) == {"length": 3}
    assert value(b) == {"length": 4}
    assert value(c) == {"x": 1, "job": c.id, "main": "MainThread", "loop": value(c)["loop"]}
    assert value(c)["loop"] != "MainThread"
    assert value(d) == [1, {"a": None}]
    assert value(e) == {"thread": "MainThread", "id": "c"}
    described = value(f)
    assert (described["correlation_id"], described["tenant"]) == ("r", "t")
    assert 0 < described["remaining"] <= 30


@pytest.mark.parametrize(
    "command",
    [
        ("worker", "--worker-class", "rq.worker.SpawnWorker", "--serializer", "json", "--burst"),
        ("worker-pool", "--num-workers", "2", "--burst"),
    ],
)
def test_jobs_run_on_rqs_other_workers(client: Redis, redis_url: str, tmp_path: Path, command: tuple[str, ...]) -> None:
    """SpawnWorker (which forgets the job class, so that its serializer must be JSON) and WorkerPool do as well."""
    a = jobs.measure.enqueue({"text": "abc"})
    b = jobs.too_long.enqueue("slow", job_id="slow")
    subprocess.run(
        [str(RQ), *command, "--url", redis_url, "--path", str(CHECKOUT), *OURS, "default"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        timeout=90,
    )
    assert value(a) == {"length": 3}
    assert "JobTimeoutException" in failure(b)
    assert client.get("slow:cleaned") == b"started"


def test_pickled_async_functions_run_on_stock_workers_with_our_job_class(client: Redis, work: Work) -> None:
    """`queue.enqueue(async_fn, data)` as RQ's users write it, with the default serializer."""
    queue = Queue("default", connection=client)
    a = queue.enqueue(jobs.shout, "abc", mark="?")
    b = queue.enqueue(jobs.around, "abc")
    c = queue.enqueue(jobs.plain, "ab")
    d = queue.enqueue("tests.seams.rq_jobs.length_of", {"text": "abc"})
    e = queue.enqueue(jobs.context_now, job_timeout=40)
    f = queue.enqueue(jobs.unserialisable)
    work(*OURS)
    assert value(a) == "ABC?"
    assert value(b) == "ABC!"
    assert value(c) == "abab"
    assert value(d) == {"length": 3}
    assert 0 < value(e)["remaining"] <= 40
    assert value(f) == {1, 2, 3}


def test_job_functions_run_with_rqs_own_job_class_too(client: Redis, work: Work) -> None:
    """Without our job class a JSON worker is all that a job function needs, context and deadline included."""
    a = jobs.measure.enqueue({"text": "abc"})
    b = jobs.its_context.enqueue(None, context=WorkflowContext(correlation_id="r"))
    work("--serializer", "rq.serializers.JSONSerializer")
    assert value(a) == {"length": 3}
    assert value(b)["correlation_id"] == "r"
    assert 0 < value(b)["remaining"] <= 30


def test_data_is_validated_again_in_the_worker(client: Redis, work: Work) -> None:
    """Whoever writes to Redis past us does not get past the schema."""
    queue = Queue("default", connection=client, serializer=JSONSerializer)
    job = queue.enqueue("tests.seams.rq_jobs.measure", {"text": "", "more": 1})
    work(*OURS)
    assert "ValidationError" in failure(job)


def test_stored_results_hold_only_the_dump_schemas_fields(client: Redis, work: Work) -> None:
    """What the schema does not name never reaches Redis."""
    job = jobs.measure.enqueue({"text": "abc"})
    work(*OURS)
    assert value(job) == {"length": 3}
    ((_, stored),) = client.xrange(f"rq:results:{job.id}")
    assert json.loads(base64.b64decode(stored[b"return_value"])) == {"length": 3}


def test_result_that_cannot_be_stored_fails_the_job_instead_of_being_lost(client: Redis, work: Work) -> None:
    """RQ calls such a job finished and stores "Unserializable return value"; ours fails and says what to do."""
    a = jobs.returns_a_set.enqueue()
    b = Queue("default", connection=client, serializer=JSONSerializer).enqueue(jobs.unserialisable)
    work(*OURS)
    assert "dump= schema" in failure(a)
    assert "dump= schema" in failure(b)
    c = jobs.returns_a_set.enqueue()
    work("--serializer", "rq.serializers.JSONSerializer")
    assert "dump= schema" in failure(c)


def test_error_of_the_job_is_stored_with_its_own_traceback(client: Redis, work: Work) -> None:
    """The user's line and the error's type are in what RQ shows."""
    job = Queue("default", connection=client).enqueue(jobs.fail)
    work(*OURS)
    text = failure(job)
    assert "rq_jobs.py" in text
    assert "StepTimeoutError: fetch took longer than its 1.5 s" in text


def test_retries_are_rqs_own(client: Redis, work: Work) -> None:
    """retry=2 runs a failing job three times; a job may also return RQ's Retry."""
    a = jobs.third_time.enqueue("attempts")
    b = Queue("default", connection=client, serializer=JSONSerializer).enqueue(jobs.ask_for_retry)
    c = jobs.asks_again.enqueue()
    work(*OURS)
    assert value(a) == 3
    assert ended(b).number_of_retries == 1
    assert ended(c).number_of_retries == 1
    assert isinstance(jobs.asks_again.run(), Retry)


def test_pickle_is_not_read_by_a_json_worker(client: Redis, work: Work, tmp_path: Path) -> None:
    """With --serializer json a pickled payload fails without being unpickled, and the next job runs."""
    target = tmp_path / "unpickled"
    evil = Job.create("tests.seams.rq_jobs.plain", connection=client, id="evil", origin="default")
    evil.data = jobs.evil_payload(str(target))
    Queue("default", connection=client).enqueue_job(evil)
    after = jobs.measure.enqueue({"text": "a"})
    work(*OURS, "--serializer", "rq.serializers.JSONSerializer")
    assert not target.exists()
    assert ended(evil).get_status() == JobStatus.FAILED
    assert value(after) == {"length": 1}


# ---- one loop, nothing leaked ----------------------------------------------------------------------------------------


def test_one_loop_serves_all_jobs_and_nothing_leaks_when_the_worker_does_not_fork(client: Redis, work: Work) -> None:
    """Hundreds of async jobs run on one loop thread, with as many descriptors at the end as after the first."""
    queue = Queue("default", connection=client)
    made = queue.enqueue_many([Queue.prepare_data(jobs.look, result_ttl=-1) for _ in range(300)])
    work(*OURS, *SIMPLE)
    seen = [value(job) for job in made]
    assert len({s["thread"] for s in seen}) == 1
    assert len({s["pid"] for s in seen}) == 1
    assert max(s["descriptors"] for s in seen[1:]) <= seen[1]["descriptors"]


def test_loop_of_the_worker_does_not_hang_its_forked_children(client: Redis, redis_url: str) -> None:
    """A worker whose own process has used the loop already forks children that make their own."""
    made = jobs.measure.enqueue({"text": "abc"})
    script = f"""
import logging, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from redis import Redis
from rq import Worker
from tests.seams import rq_jobs
from tta_sync.rq import WorkflowJob
assert rq_jobs.measure.run({{"text": "a"}}) == {{"length": 1}}
Worker(["default"], connection=Redis.from_url({redis_url!r}), job_class=WorkflowJob).work(burst=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)
    assert value(made) == {"length": 3}


# ---- timeouts and interrupts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [(), SIMPLE])
@pytest.mark.parametrize("pickled", [False, True])
def test_timeout_cancels_the_coroutine_whose_clean_up_runs_while_the_job_is_started(
    client: Redis, work: Work, worker: tuple[str, ...], pickled: bool
) -> None:
    """RQ's alarm ends the wait: `finally` has run when RQ's own JobTimeoutException comes out and the job fails."""
    if pickled:
        job = Queue("default", connection=client).enqueue(jobs.hang, "slow", job_id="slow", job_timeout=1)
    else:
        job = jobs.too_long.enqueue("slow", job_id="slow")
    after = jobs.measure.enqueue({"text": "a"})
    work(*OURS, *worker)
    assert client.get("slow:began") == b"1"
    assert client.get("slow:cleaned") == b"started"
    assert "rq.timeouts.JobTimeoutException" in failure(job)
    assert value(after) == {"length": 1}


def test_timeout_ends_the_job_when_the_coroutine_is_deaf(client: Redis, work: Work) -> None:
    """A coroutine that swallows cancellation cannot hold the worker; it is left behind and the next job runs."""
    job = Queue("default", connection=client).enqueue(jobs.hang_deaf, "deaf", job_timeout=1)
    after = jobs.measure.enqueue({"text": "a"})
    began = time.monotonic()
    work(*OURS, *SIMPLE)
    assert time.monotonic() - began < 25
    assert "JobTimeoutException" in failure(job)
    assert int(client.get("deaf:cancelled") or 0) >= 1
    assert value(after) == {"length": 1}


def test_timeout_is_no_steps_error_when_it_lands_inside_a_caller_step(client: Redis, work: Work) -> None:
    """RQ's timeout is an Exception; a step that catches everything must not catch it."""
    job = jobs.busy_caller.enqueue("busy")
    work(*OURS, *SIMPLE)
    assert "JobTimeoutException" in failure(job)
    assert client.get("busy:caught") is None


# ---- in this process -------------------------------------------------------------------------------------------------


def test_context_of_the_job_is_current_while_it_runs_and_gone_afterwards(client: Redis) -> None:
    """current_context() is the job's in sync code too; nothing of it stays on the worker's thread."""
    queue = Queue("default", connection=client, is_async=False, job_class=WorkflowJob)
    jobs.seen.clear()
    job = queue.enqueue("tests.seams.rq_jobs.sync_context")
    assert job.is_finished
    assert jobs.seen[0] is not None
    assert current_context() is None
    assert default_facade().in_flight() == []


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (jobs.shout, ("abc",), "ABC!"),
        (jobs.around, ("abc",), "ABC!"),
        (jobs.plain, ("ab",), "abab"),
        (jobs.measure, ({"text": "abc"},), {"length": 3}),
        ("tests.seams.rq_jobs.length_of", ({"text": "abc"},), {"length": 3}),
    ],
)
@pytest.mark.parametrize("serializer", [None, JSONSerializer])
def test_any_kind_of_function_runs_when_rq_runs_the_job_in_process(
    client: Redis, function: Any, arguments: Any, expected: Any, serializer: Any
) -> None:
    """`Queue(is_async=False)`, as RQ's users test with, runs async functions and workflows as a worker would."""
    queue = Queue("default", connection=client, is_async=False, job_class=WorkflowJob, serializer=serializer)
    job = queue.enqueue(function, *arguments)
    assert value(job) == expected
    assert current_context() is None


@pytest.mark.parametrize("wrong", [jobs.unserialisable, jobs.returns_a_set])
def test_result_is_checked_when_rq_runs_the_job_in_process(client: Redis, wrong: Any) -> None:
    """What JSON cannot carry fails there too."""
    queue = Queue("default", connection=client, is_async=False, job_class=WorkflowJob, serializer=JSONSerializer)
    job = queue.enqueue(wrong, None)
    assert "dump= schema" in failure(job)


def test_job_without_a_function_fails_as_rqs_own_does(client: Redis) -> None:
    """A payload without a name is a ValueError, as in RQ."""
    job = WorkflowJob.create(jobs.plain, connection=client)
    job._func_name = None
    with pytest.raises(ValueError, match="no function"):
        job.perform()


# ---- RQ's private API ------------------------------------------------------------------------------------------------


def test_private_api_of_rq_is_what_we_rely_on() -> None:
    """A new RQ that changes what we override, or what we read, fails here and not in production."""
    assert list(inspect.signature(Job._execute).parameters) == ["self"]
    assert "self._execute()" in inspect.getsource(Job.perform)
    assert "_job_stack.push(self)" in inspect.getsource(Job.perform)
    assert list(inspect.signature(Job.restore).parameters) == ["self", "raw_data"]
    for user in (Job.refresh, Job.fetch_many):
        assert ".restore(" in inspect.getsource(user)
    restored = inspect.getsource(Job.restore)
    assert "decode_redis_hash(raw_data)" in restored
    assert "obj['data']" in restored
    assert "self.serializer.loads" in restored
    assert "Result.create(" in inspect.getsource(Job._handle_success)
    assert "serializer=job.serializer" in inspect.getsource(rq.results.Result.create)
    assert issubclass(rq.timeouts.BaseTimeoutException, Exception)
    assert issubclass(rq.timeouts.JobTimeoutException, rq.timeouts.BaseTimeoutException)
    for name in ("timeout", "retry", "result_ttl", "failure_ttl", "ttl", "meta", "job_id", "unique"):
        assert name in inspect.signature(Queue.enqueue_call).parameters
        if name != "unique":
            assert name in inspect.signature(Queue.prepare_data).parameters
    assert JSONSerializer.dumps(["f", None, [], {}])[:1] == b"["
