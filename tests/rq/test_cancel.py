"""Cancelling: waiting jobs in RQ's own way, running coroutines within a second, and never the wrong run of a job."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue, Retry, Worker
from rq.exceptions import NoSuchJobError
from rq.job import Dependency, Job, JobStatus
from rq.registry import CanceledJobRegistry, DeferredJobRegistry, FailedJobRegistry, ScheduledJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import utcformat
from rq.webhook import Webhook
from rq.worker.base import BaseWorker

from tests.rq import long_jobs as jobs
from tests.rq.conftest import WORKERS
from tests.seams.rq_jobs import evil_payload
from tta_sync.exceptions import JobCancelledError
from tta_sync.facade import call_sync
from tta_sync.rq import WorkflowJob, control
from tta_sync.rq.control import KEEP, Cancel, applies, cancel_key, end_as_stopped, request_cancel, watched_key
from tta_sync.rq.job import running
from tta_sync.rq.watch import watched_job

Eventually = Callable[..., Any]
StartWorker = Callable[..., Path]


def status(client: Redis, job_id: str) -> str:
    return (client.hget(f"rq:job:{job_id}", "status") or b"none").decode()


def stored(client: Redis, job_id: str) -> WorkflowJob:
    return WorkflowJob.fetch(job_id, connection=client)


def error_of(client: Redis, job_id: str) -> str:
    result = stored(client, job_id).latest_result()
    assert result is not None
    return result.exc_string or ""


def failed(client: Redis) -> list[str]:
    return FailedJobRegistry("default", connection=client).get_job_ids()


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WORKERS)
def test_coroutine_is_stopped_when_it_is_asked_for_on_every_worker(
    client: Redis, start_worker: StartWorker, eventually: Eventually, kind: str
) -> None:
    """Its `finally` runs while the job is started; it ends as stopped, unretried, and the next job runs."""
    jobs.hangs.enqueue("one", job_id="one")
    after = jobs.quick.enqueue("next")
    start_worker(kind)
    eventually(lambda: client.get("one:began"), within=60)
    assert request_cancel("one", client) is Cancel.REQUESTED
    eventually(lambda: status(client, "one") == "stopped")
    assert client.get("one:cleaned") == b"started"
    assert client.get("one:began") == b"1"
    assert "JobCancelledError: job one was cancelled by request" in error_of(client, "one")
    assert failed(client) == ["one"]
    assert not client.exists(cancel_key("one"))
    eventually(lambda: status(client, after.id) == "finished")
    assert stored(client, "one").retries_left == 3


def test_pickled_coroutine_is_stopped_when_it_is_asked_for(
    client: Redis, start_worker: StartWorker, eventually: Eventually
) -> None:
    """`queue.enqueue(async_fn)` on a worker with our job class is as any other."""
    Queue("default", connection=client).enqueue(jobs.hang, "one", job_id="one")
    start_worker("fork")
    eventually(lambda: client.get("one:began"), within=60)
    assert request_cancel("one", client) is Cancel.REQUESTED
    eventually(lambda: status(client, "one") == "stopped")
    assert client.get("one:cleaned") == b"started"
    assert "cancelled by request" in error_of(client, "one")


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (jobs.swallows, "JobCancelledError"),
        (jobs.fails_at_its_end, "OSError: clean-up failed"),
        (jobs.deaf, "JobCancelledError"),
    ],
)
def test_job_is_stopped_whatever_it_makes_of_its_cancellation(
    client: Redis, work_here: Callable[..., None], eventually: Eventually, job: Any, said: str
) -> None:
    """A result that was made of it, an error in the clean-up, a deaf ear: the job is stopped, and says why."""
    job.enqueue("one", job_id="one")

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        request_cancel("one", client)

    work_here(cancel)
    assert status(client, "one") == "stopped"
    assert said in error_of(client, "one")
    assert error_of(client, "one").splitlines()[-1].endswith("JobCancelledError: job one was cancelled by request")
    assert not client.exists(cancel_key("one"))


def test_plain_function_is_stopped_where_it_waits_for_a_workflow(
    client: Redis, work_here: Callable[..., None], eventually: Eventually
) -> None:
    """Legacy code that runs a workflow: each of them is cancelled, and it cannot make a success of that."""
    Queue("default", connection=client).enqueue(jobs.legacy, "one", job_id="one")

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        request_cancel("one", client)

    work_here(cancel)
    assert status(client, "one") == "stopped"
    assert client.get("one:began") == b"3"
    assert client.get("one:cleaned") == b"started"


@pytest.mark.parametrize("kind", ["fork", "spawn"])
@pytest.mark.parametrize("ours", [True, False])
def test_plain_code_is_killed_with_its_process_where_the_worker_forks(
    client: Redis, start_worker: StartWorker, eventually: Eventually, kind: str, ours: bool
) -> None:
    """What cannot be interrupted is stopped by RQ's own command, in a job function and in RQ's own job."""
    if ours:
        jobs.plain.enqueue("one", job_id="one")
    else:
        queue = Queue("default", connection=client, serializer=JSONSerializer)
        queue.enqueue(jobs.sleeper, "one", job_id="one")
    start_worker(kind, *(() if ours else ("--job-class", "rq.job.Job", "--serializer", "json")))
    eventually(lambda: client.get("one:began"), within=60)
    assert request_cancel("one", client) is Cancel.REQUESTED
    eventually(lambda: status(client, "one") == "stopped")
    assert "stopped by user" in error_of(client, "one")


def test_plain_code_goes_on_and_the_log_says_so_where_nothing_can_stop_it(
    client: Redis, work_here: Callable[..., None], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """RQ's SimpleWorker has no process to kill: the result stands, and nobody was told a lie."""
    queue = Queue("default", connection=client)
    queue.enqueue(jobs.sleeper, "one", 1.5, job_id="one")

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        assert request_cancel("one", client) is Cancel.REQUESTED

    work_here(cancel)
    assert status(client, "one") == "finished"
    assert "job one was to be cancelled, but runs plain code" in caplog.text
    assert not client.exists(cancel_key("one"))


def test_calls_of_others_go_on_when_a_job_is_cancelled(
    client: Redis, work_here: Callable[..., None], eventually: Eventually
) -> None:
    """What other threads of the process wait for is not the job's."""
    jobs.hangs.enqueue("one", job_id="one")

    async def wait() -> str:
        while status(client, "one") != "stopped":
            await asyncio.sleep(0.01)
        return "went on"

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        request_cancel("one", client)
        assert call_sync(wait, timeout=20) == "went on"

    work_here(cancel)


def test_request_is_heard_again_when_redis_was_away(
    client: Redis, work_here: Callable[..., None], eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that fails is said once, and the next ones are made."""
    jobs.hangs.enqueue("one", job_id="one")

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        client.execute_command("CLIENT", "PAUSE", 1800, "ALL")
        request_cancel("one", client)

    work_here(cancel)
    assert status(client, "one") == "stopped"
    assert caplog.text.count("Redis does not say whether it is to be cancelled") == 1


# ---- a request and the run that it is for ----------------------------------------------------------------------------


def test_request_is_for_the_run_that_was_seen(client: Redis) -> None:
    """The key carries the enqueuing; another one's is not stopped by it. Without a moment it is for whichever runs."""
    job = jobs.hangs.enqueue("one", job_id="one")
    assert job.enqueued_at is not None
    assert applies(utcformat(job.enqueued_at).encode(), job)
    assert applies(b"1", job)
    assert not applies(None, job)
    assert not applies(b"2020-01-01T00:00:00.000000Z", job)
    job.enqueued_at = None
    assert not applies(b"2020-01-01T00:00:00.000000Z", job)


def test_request_nobody_answered_does_not_stop_a_retry(
    client: Redis, work_here: Callable[..., None], eventually: Eventually
) -> None:
    """A key that was left behind by an earlier attempt, or by another job of the same id, is nobody's business."""
    job = jobs.quick.enqueue(1, job_id="one")
    client.hset(job.key, "status", "started")
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert 0 < client.ttl(cancel_key("one")) <= KEEP
    client.delete("rq:queue:default")
    job.delete()
    Queue("default", connection=client).enqueue(jobs.sleeper, "one", 1.0, job_id="one")
    work_here()
    assert status(client, "one") == "finished"


def test_result_stands_when_it_came_before_the_request(client: Redis, work_here: Callable[..., None]) -> None:
    """Who asks too late is told so, and nothing is left behind."""
    jobs.quick.enqueue(1, job_id="one")
    work_here()
    assert request_cancel("one", client) is Cancel.ENDED
    assert stored(client, "one").return_value() == 1
    assert not client.exists(cancel_key("one"))


@pytest.mark.parametrize("end", ["finished", "failed", "stopped", "canceled"])
def test_request_is_taken_back_when_the_job_ended_between_two_looks(client: Redis, end: str) -> None:
    """The job ends after it was seen running and before the request is left."""
    job = jobs.quick.enqueue(1, job_id="one")
    client.hset(job.key, "status", "started")
    meddled = Meddling(client, lambda: client.hset(job.key, "status", end))
    assert request_cancel("one", meddled) is Cancel.ENDED
    assert not client.exists(cancel_key("one"))


def test_request_is_taken_back_when_the_job_is_gone_between_two_looks(client: Redis) -> None:
    """Deleted meanwhile: there is no such job any more."""
    job = jobs.quick.enqueue(1, job_id="one")
    client.hset(job.key, "status", "started")
    with pytest.raises(NoSuchJobError):
        request_cancel("one", Meddling(client, lambda: client.delete(job.key)))
    assert not client.exists(cancel_key("one"))


def test_retry_is_cancelled_when_it_was_enqueued_between_two_looks(client: Redis) -> None:
    """Seen running, then failed and back in the queue: that one is cancelled."""
    job = jobs.quick.enqueue(1, job_id="one")
    client.lrem("rq:queue:default", 1, "one")
    client.hset(job.key, "status", "started")

    def again() -> None:
        Queue("default", connection=client, serializer=JSONSerializer)._enqueue_job(job)

    assert request_cancel("one", Meddling(client, again)) is Cancel.CANCELLED
    assert client.llen("rq:queue:default") == 0


class Meddling:
    """A client; just before its first transaction something happens."""

    def __init__(self, client: Redis, happens: Callable[[], object]) -> None:
        self._client = client
        self._happens: Callable[[], object] | None = happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def pipeline(self, transaction: bool = True) -> Any:
        if transaction and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        return self._client.pipeline(transaction=transaction)


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_queued_job_is_cancelled_as_rq_does_it(client: Redis, work_here: Callable[..., None]) -> None:
    """It is taken out of its queue into RQ's registry; no worker runs it; a second request finds that it has ended."""
    jobs.hangs.enqueue("one", job_id="one")
    jobs.quick.enqueue(2, job_id="two")
    assert request_cancel("one", client) is Cancel.CANCELLED
    assert status(client, "one") == "canceled"
    assert CanceledJobRegistry("default", connection=client).get_job_ids() == ["one"]
    assert client.lrange("rq:queue:default", 0, -1) == [b"two"]
    assert request_cancel("one", client) is Cancel.ENDED
    work_here()
    assert client.get("one:began") is None
    assert status(client, "two") == "finished"


def test_scheduled_and_deferred_jobs_are_cancelled_as_rq_does_it(client: Redis) -> None:
    """Each leaves its registry for that of the cancelled; what depends on a cancelled job stays deferred."""
    queue = Queue("default", connection=client, serializer=JSONSerializer)
    first = queue.enqueue(jobs.bare, 1, job_id="first")
    queue.enqueue(jobs.bare, 2, job_id="second", depends_on=first)
    queue.enqueue(jobs.bare, 3, job_id="third", depends_on="second")
    queue.enqueue_at(datetime.now(UTC) + timedelta(hours=1), jobs.bare, 4, job_id="later")
    assert request_cancel("later", client) is Cancel.CANCELLED
    assert request_cancel("second", client) is Cancel.CANCELLED
    assert sorted(CanceledJobRegistry("default", connection=client).get_job_ids()) == ["later", "second"]
    assert ScheduledJobRegistry("default", connection=client).get_job_ids() == []
    assert DeferredJobRegistry("default", connection=client).get_job_ids() == ["third"]
    assert status(client, "third") == "deferred"


def test_job_is_asked_to_stop_when_a_worker_has_just_taken_it(
    client: Redis, start_worker: StartWorker, eventually: Eventually
) -> None:
    """Between the list and its beginning a job is queued and in no queue: the worker that has it will hear of it."""
    job = jobs.hangs.enqueue("one", job_id="one")
    client.lrem("rq:queue:default", 1, "one")
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert status(client, "one") == "queued"
    client.lpush("rq:queue:default", "one")
    start_worker("simple")
    eventually(lambda: status(client, "one") == "stopped", within=60)
    assert job.retries_left == 3


def test_unknown_job_is_told_apart(client: Redis) -> None:
    """RQ's own error, and no key for a job that is none."""
    with pytest.raises(NoSuchJobError):
        request_cancel("nobody", client)
    assert client.keys() == []


def test_nothing_stored_is_unpickled_when_a_job_is_cancelled(client: Redis, tmp_path: Path) -> None:
    """Whoever writes to Redis does not run code where jobs are cancelled."""
    target = tmp_path / "unpickled"
    job = Queue("default", connection=client).enqueue(jobs.bare, job_id="evil")
    client.hset(job.key, mapping={"meta": evil_payload(str(target)), "result": evil_payload(str(target))})
    assert request_cancel("evil", client) is Cancel.CANCELLED
    assert not target.exists()


def test_lost_race_between_two_requests_is_an_end(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two who cancel a deferred job at once the second finds it ended."""
    queue = Queue("default", connection=client, serializer=JSONSerializer)
    queue.enqueue(jobs.bare, 1, job_id="first")
    queue.enqueue(jobs.bare, 2, job_id="second", depends_on="first")
    cancel = Job.cancel

    def slower(self: Job) -> None:
        cancel(Job.fetch(self.id, connection=client, serializer=JSONSerializer))
        cancel(self)

    monkeypatch.setattr(Job, "cancel", slower)
    assert request_cancel("second", client) is Cancel.ENDED


# ---- jobs that run without us ----------------------------------------------------------------------------------------


@pytest.fixture
def heard(client: Redis) -> Any:
    """What was sent to the worker called w."""
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("rq:pubsub:w")
        pubsub.get_message(timeout=5)
        yield lambda: pubsub.get_message(timeout=0.2)


def unwatched(client: Redis, seconds: float) -> Job:
    job = Queue("default", connection=client, serializer=JSONSerializer).enqueue(jobs.bare, job_id="one")
    began = utcformat(datetime.now(UTC) - timedelta(seconds=seconds))
    client.hset(job.key, mapping={"status": "started", "worker_name": "w", "started_at": began})
    return job


def test_rqs_own_command_is_sent_when_nobody_else_can_stop_the_job(client: Redis, heard: Any) -> None:
    """A plain function in RQ's own job class, on a worker that does not know us."""
    unwatched(client, 60)
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert b'"stop-job"' in heard()["data"]


@pytest.mark.parametrize("watched", [True, False])
def test_rqs_own_command_is_not_sent_when_the_job_is_looked_after(client: Redis, heard: Any, watched: bool) -> None:
    """The watch of a stock worker, or an AsyncWorker, cancels its coroutine instead of killing a process."""
    unwatched(client, 60)
    if watched:
        client.set(watched_key("one"), 1)
    else:
        client.hset("tta_sync:workers", "w", "default")
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert heard() is None


def test_rqs_own_command_waits_until_a_young_job_could_be_looked_after(client: Redis, heard: Any) -> None:
    """A job that has just begun is given the time in which a watch would have begun as well."""
    unwatched(client, 0)
    began = time.monotonic()
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert time.monotonic() - began > 1.0
    assert b'"stop-job"' in heard()["data"]


@pytest.mark.parametrize("happens", ["ends", "is gone"])
def test_rqs_own_command_is_not_sent_when_the_job_ends_meanwhile(client: Redis, heard: Any, happens: str) -> None:
    """While a young job is waited for it may end, or be gone."""
    job = unwatched(client, 0)
    mends = threading.Timer(
        0.3, lambda: client.delete(job.key) if happens == "is gone" else client.hset(job.key, "status", "finished")
    )
    mends.start()
    assert request_cancel("one", client) is Cancel.REQUESTED
    mends.join()
    assert heard() is None


def test_rqs_own_command_is_not_sent_when_the_job_has_no_worker_yet(client: Redis, heard: Any) -> None:
    """Started, but by whom is not written yet: there is nobody to send it to."""
    job = unwatched(client, 60)
    client.hset(job.key, "started_at", "")
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert heard() is None


def test_job_that_ends_while_rqs_own_command_is_sent_is_no_error(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ finds that it does not run any more."""
    unwatched(client, 60)

    def ended(*_: Any, **__: Any) -> None:
        raise NoSuchJobError

    monkeypatch.setattr(control, "send_stop_job_command", ended)
    assert request_cancel("one", client) is Cancel.REQUESTED


def test_latest_request_stands_when_a_job_is_enqueued_again_and_again(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No endless race with a job that is enqueued at every look."""
    job = jobs.quick.enqueue(1, job_id="one")
    client.hset(job.key, "status", "started")
    looks: list[object] = []
    monkeypatch.setattr(control, "_ask_to_end", looks.append)
    assert request_cancel("one", client) is Cancel.REQUESTED
    assert 1 < len(looks) < 20


# ---- ended as stopped ------------------------------------------------------------------------------------------------


def on_stopped(job: Job, connection: Redis) -> None:
    connection.incr("stopped-callback")


def on_failure(job: Job, connection: Redis, *error: object) -> None:
    connection.incr("failure-callback")


def test_callback_for_stopped_jobs_runs_in_place_of_the_one_for_failures(
    client: Redis, work_here: Callable[..., None], eventually: Eventually
) -> None:
    """As with RQ's own stop command; dependents that allow failures stay where they are."""
    jobs.hangs.enqueue("one", job_id="one", on_stopped=Callback(on_stopped), on_failure=Callback(on_failure))
    jobs.quick.enqueue(2, job_id="two", depends_on=Dependency(jobs=["one"], allow_failure=True))

    def cancel() -> None:
        eventually(lambda: client.get("one:began"))
        request_cancel("one", client)

    work_here(cancel)
    assert client.get("stopped-callback") == b"1"
    assert client.get("failure-callback") is None
    assert status(client, "two") == "deferred"


def test_job_object_says_stopped_in_place_of_failed_only(client: Redis) -> None:
    """Other statuses are themselves."""
    hook = Webhook("http://127.0.0.1:1/hook", JobStatus.FAILED)
    job = jobs.quick.enqueue(1, retry=Retry(max=2), webhooks=[hook])
    end_as_stopped(job)
    assert not job.should_retry
    assert not job.webhooks
    job.set_status(JobStatus.QUEUED)
    assert status(client, job.id) == "queued"
    job.set_status(JobStatus.FAILED)
    assert status(client, job.id) == "stopped"
    job.save()
    assert stored(client, job.id).retries_left == 2
    assert len(stored(client, job.id).webhooks) == 1


def test_private_api_of_rq_is_what_end_as_stopped_relies_on() -> None:
    """A new RQ that ends a failed job by other means fails here and not in production."""
    handler = inspect.getsource(BaseWorker.handle_job_failure)
    assert "job.should_retry" in handler
    assert "job.set_status(JobStatus.FAILED" in handler
    assert "job.send_webhooks(JobStatus.FAILED" in handler
    performs = inspect.getsource(BaseWorker.perform_job)
    assert "job.execute_failure_callback(self.death_penalty_class, *exc_info)" in performs
    assert "job.execute_stopped_callback(self.death_penalty_class)" in inspect.getsource(Worker.monitor_work_horse)
    saved = inspect.getsource(Job.to_dict)
    assert "if self.retries_left is not None:" in saved
    assert "if self.webhooks:" in saved


def test_interrupts_come_out_as_themselves_when_a_job_was_being_cancelled(client: Redis) -> None:
    """SystemExit of a cold shutdown is never taken for the end of a cancelled job."""
    job = jobs.quick.enqueue(1)

    def run(struck: bool, error: BaseException | None = None) -> None:
        with running(job):
            watched = watched_job.get()
            assert watched is not None
            watched.struck = struck
            if error is not None:
                raise error

    with pytest.raises(SystemExit):
        run(True, SystemExit())
    with pytest.raises(ValueError, match="its own"):
        run(False, ValueError("its own"))
    with pytest.raises(JobCancelledError):
        run(True)
