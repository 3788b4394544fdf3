"""A worker that runs many async jobs at once, in one process, on RQ's own data model.

``rq worker -w tta_sync.rq.AsyncWorker --path . high default low``

Two threads share the work. The loop's thread runs the jobs (:mod:`tta_sync.rq.delivery`). The main thread keeps the
books: it claims jobs, writes how they ended, renews its lease, recovers what dead workers have left, and hears signals.
A job belongs to the main thread until it is launched, to the loop's until it has ended, and then to the main thread
again. Redis is spoken to by the main thread only, but for the doormen, which wait for jobs to come.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from _queue import SimpleQueue
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import redis.exceptions
from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.retry import Retry as RedisRetry
from rq import Queue, SimpleWorker, worker_registration
from rq.command import parse_payload
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.utils import now
from rq.worker import DequeueStrategy, WorkerStatus

from tta_sync.exceptions import ConfigurationError
from tta_sync.facade import default_facade
from tta_sync.rq.claims import MISSING, WORKERS, Claimed, Claims, lease_key
from tta_sync.rq.control import JobCancelledError, applies, cancel_key
from tta_sync.rq.delivery import DRAINED, ENDED, LOST, STOPPED, Delivery, Runner, WorkerStoppedError, imported
from tta_sync.rq.endings import Endings
from tta_sync.rq.job import WorkflowJob, context_of, is_json
from tta_sync.rq.progress import flush
from tta_sync.rq.recovery import Recovery, running_key_of

logger = logging.getLogger("rq.worker")

_DOORMEN = 8  # queues that are waited at; more are looked at four times a second
_JOB_HEARTBEAT = 30.0  # seconds
_CANCEL_POLL = 0.25  # seconds
_LINGER = 0.002  # seconds; a moment's patience makes larger batches
_SOCKET_TIMEOUT = 5.0  # seconds
_EXIT_STALLED = 70  # os.EX_SOFTWARE
_RETRY_AFTER = 1.0  # seconds between two tries to reach Redis, at most
_REMEMBERED = 3.0  # seconds for which an end is remembered that a Redis that crashes may forget
_REMEMBERED_AT_MOST = 4000
_LOOK = 1.0  # seconds between two looks at the loop

__all__ = ["AsyncWorker", "PickleRefusedError", "Settings", "WorkerStoppedError"]


class Settings:
    """What AsyncWorker reads from the environment, ``TTA_WORKER_*``.

    Raises:
        ConfigurationError: a value is none; it names the variable.
    """

    def __init__(self, environ: Any = os.environ) -> None:
        def number(name: str, default: float, low: float, high: float, kind: type = float) -> Any:
            text = environ.get(name, "")
            try:
                value = kind(text) if text.strip() else default
            except ValueError:
                value = None
            if value is None or not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                raise ConfigurationError(f"{name} is {what} from {low:g} to {high:g}, not {text!r}")
            return value

        self.concurrency: int = number("TTA_WORKER_CONCURRENCY", 100, 1, 10_000, int)
        self.recovery: float = number("TTA_WORKER_RECOVERY_SECONDS", 30.0, 1, 3600)
        self.drain: float = number("TTA_WORKER_DRAIN_SECONDS", 10.0, 0, 3600)
        self.session_threads: int = number("TTA_WORKER_SESSION_THREADS", 16, 1, 1000, int)
        self.sync_threads: int = number("TTA_WORKER_SYNC_THREADS", 16, 1, 1000, int)
        self.stall_limit: float = number("TTA_WORKER_STALL_LIMIT", 60.0, 1, 86_400)
        allow = environ.get("TTA_WORKER_ALLOW_PICKLE", "").strip().lower()
        if allow not in ("", "0", "1", "true", "false"):
            raise ConfigurationError(f"TTA_WORKER_ALLOW_PICKLE is 1 or 0, not {allow!r}")
        self.allow_pickle = allow in ("1", "true")
        self.queue_limits = _limits(environ.get("TTA_WORKER_QUEUE_LIMITS", ""))


def _limits(text: str) -> dict[str, int]:
    """Read ``low=5,mail=20``."""
    limits = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, limit = part.rpartition("=")
        if not name or not limit.strip().isdecimal() or int(limit) < 1:
            raise ConfigurationError(f"TTA_WORKER_QUEUE_LIMITS is queue=number, with commas between, not {text!r}")
        limits[name.strip()] = int(limit)
    return limits


class PickleRefusedError(Exception):
    """A job's payload is a pickle: to load it is to run whatever its sender wants.

    Enqueue it with ``serializer=JSONSerializer``, or trust all who can write to Redis and set
    ``TTA_WORKER_ALLOW_PICKLE=1``.
    """


class _Doorman(threading.Thread):
    """Waits until a job is in a queue, without taking it: to move the first one to where it is changes nothing.

    So it is the same for RQ's own workers on that queue, and no job can be lost on the way.
    """

    def __init__(self, connection: Redis, queue: Queue, ring: Callable[[], None]) -> None:
        super().__init__(name=f"tta_sync-doorman-{queue.name}", daemon=True)
        self._connection = connection
        self._key = queue.key
        self._ring = ring
        self._armed = threading.Event()
        self._over = threading.Event()
        self.start()

    def arm(self) -> None:
        """Wait from now on; ring once when there is a job."""
        self._armed.set()

    def end(self) -> None:
        self._over.set()
        self._armed.set()

    def run(self) -> None:
        while not self._over.is_set():
            self._armed.wait()
            if self._over.is_set():
                return
            try:
                if self._connection.blmove(self._key, self._key, 1, "LEFT", "LEFT") is None:
                    continue
            except redis.exceptions.RedisError:
                time.sleep(0.2)  # the main thread sees it too, and says so
            self._armed.clear()
            self._ring()


class _Messenger:
    """Sends webhooks, one after the other, in a thread that begins with the first."""

    def __init__(self) -> None:
        self._sendings: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, job: Job, status: str, exc_string: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="tta_sync-webhooks", daemon=True)
            self._thread.start()
        self._sendings.put(lambda: job.send_webhooks(status, exc_string=exc_string))

    def _serve(self) -> None:
        while (send := self._sendings.get()) is not None:
            try:
                send()
            except Exception:
                logger.exception("a webhook could not be sent")

    def end(self, seconds: float) -> bool:
        """Send what is left, for so long at most; say whether all was sent."""
        if self._thread is None:
            return True
        self._sendings.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


class AsyncWorker(SimpleWorker):
    """Run up to ``TTA_WORKER_CONCURRENCY`` jobs at once.

    - Async jobs run on the process's managed loop; plain functions in ``TTA_WORKER_SYNC_THREADS`` threads; caller steps
      and units of work in ``TTA_WORKER_SESSION_THREADS`` threads, one pinned to each job that needs one.
    - A job is claimed in one step with its entry in the started registry: no moment at which it could be lost.
    - What a worker that died had in flight is taken up by any other AsyncWorker within about twice
      ``TTA_WORKER_RECOVERY_SECONDS``: begun again where the job is ``idempotent`` (three times at most) or has a Retry
      left, else failed.
    - SIGTERM: nothing further is claimed; what runs has ``TTA_WORKER_DRAIN_SECONDS``; async jobs that are left are
      cancelled and put back in front of their queues. A second SIGTERM ends the patience.
    - A loop that something blocks for ``TTA_WORKER_STALL_LIMIT`` seconds ends the process, as if it had been killed.

    Options are those of RQ's worker. Payloads are JSON, whatever ``--serializer`` says; a pickle fails the job unless
    ``TTA_WORKER_ALLOW_PICKLE=1``.

    Raises:
        ConfigurationError: a setting is none.
    """

    job_class = WorkflowJob

    # Asked for while RQ's own __init__ runs.
    _in_doubt = True  # whether Redis has been away since its id was seen
    _redis_id: str | None = None
    _main_thread = 0, 0  # process and thread

    def __init__(self, queues: Any, *args: Any, **options: Any) -> None:
        self.settings = Settings()
        if options.get("prepare_for_work", True):
            options["serializer"] = JSONSerializer
            if options.get("job_class") in (None, Job, "rq.job.Job"):
                options["job_class"] = WorkflowJob
        super().__init__(queues, *args, **options)
        # Queues that were given ready-made have a client of their own, which may wait for ever.
        self.queues = [self._queue(queue.name, queue._default_timeout) for queue in self.queues]
        self._ordered_queues = self.queues[:]
        self._in_flight: dict[str, Delivery] = {}  # by execution id; the main thread only
        self._ended: deque[Delivery] = deque()  # from the loop's thread to the main one
        self._unwritten: list[Delivery] = []  # the main thread only
        self._bell = threading.Lock()
        self._bell.acquire()
        self._number = 0
        self._cold = False
        self._life = uuid.uuid4().hex  # in the lease: which worker of this name it is
        self._stop_now: deque[str] = deque()  # job ids, from RQ's command thread
        self._loop_error: BaseException | None = None
        self._ticks = 0  # how often the loop was asked whether it turns
        self._ticked = 0  # and how often it has said so
        self._stalled = 0.0  # seconds without an answer
        self._looked = 0.0
        self._exhausted = False
        self._exit_status = 0
        self._messenger = _Messenger()
        self._recent: deque[tuple[float, Delivery]] = deque()  # written a moment ago
        self._claim_after = 0.0

    # ---- how it is made

    def _set_connection(self, connection: Redis) -> Redis:
        """Make a client of our own: RQ would have a lost network go unnoticed for seven minutes."""
        pool = connection.connection_pool
        self._given_connection = connection  # kept: a Sentinel's pool is referred to weakly by its connections
        settings = {
            **pool.connection_kwargs,
            "socket_keepalive": True,
            "redis_connect_func": self._greet,
            "socket_timeout": _SOCKET_TIMEOUT,
            "socket_connect_timeout": _SOCKET_TIMEOUT,
            # What may be said twice is said again by us; what may not is not said twice.
            "retry": RedisRetry(NoBackoff(), 0),
        }
        return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **settings))

    def _greet(self, connection: Any) -> None:
        """Begin a new connection; on the main thread only if it leads to the Redis that we knew.

        Between two commands Redis may be killed and be there again, and no command fails for it.
        """
        connection.on_connect()
        if self._in_doubt or not self._redis_id or (os.getpid(), threading.get_ident()) != self._main_thread:
            return
        connection.send_command("INFO", "server")
        if self._redis_id.encode() not in connection.read_response():
            self._in_doubt = True
            raise redis.exceptions.ConnectionError("it is another one, or was restarted")

    def _queue(self, name: str, timeout: int | None = None) -> Queue:
        return self.queue_class(
            name,
            connection=self.connection,
            job_class=self.job_class,
            serializer=self.serializer,
            default_timeout=timeout,
            death_penalty_class=self.death_penalty_class,
        )

    # ---- signals and commands

    def request_stop(self, signum: Any, frame: FrameType | None) -> None:
        """Stop; the second time, at once. A second signal within a second is the first one's echo, as RQ has it."""
        if self._shutdown_requested_date is None:
            self._shutdown_requested_date = now()
            self._stop_requested = True
        elif (now() - self._shutdown_requested_date).total_seconds() >= 1:
            self._cold = True
        self._ring()

    def handle_payload(self, message: Any) -> None:
        """Obey RQ's commands. RQ's command thread."""
        try:
            payload = parse_payload(message)
            command = payload.get("command")
        except (ValueError, AttributeError, KeyError):
            self.log.warning("Worker %s: a command that is none was ignored", self.name)
            return
        if command == "stop-job" and isinstance(payload.get("job_id"), str):
            self._stop_now.append(payload["job_id"])
            self._ring()
        elif command == "shutdown":
            self.log.info("Worker %s: shutdown command", self.name)
            os.kill(os.getpid(), signal.SIGINT)
        else:
            self.log.info("Worker %s: command %s ignored", self.name, command)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """Listen again. RQ's own ends the thread for good when Redis is slow rather than gone."""
        if not isinstance(exc, redis.exceptions.RedisError):
            raise exc
        self.log.error("Worker %s: commands are not heard (%s); trying again in 2 s", self.name, exc)
        time.sleep(2.0)

    def _ring(self) -> None:
        """Wake the main thread. Any thread, and signal handlers."""
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it has been rung already

    # ---- the main thread's life

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Work until told to stop: RQ's own options. Returns whether any job was begun.

        Raises:
            SystemExit: the loop was blocked or lost, or too many threads had to be given up.
        """
        if dequeue_strategy not in tuple(DequeueStrategy):
            raise ValueError(
                f"Dequeue strategy {dequeue_strategy} is not allowed. Use `default`, `random` or `round_robin`."
            )
        self._dequeue_strategy = dequeue_strategy
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if handlers:
            self._install_signal_handlers()  # first: once registered, it may be told to stop
        self.bootstrap(logging_level, date_format, log_format)
        try:
            if with_scheduler:  # it forks: before there are other threads
                self._start_scheduler(burst, logging_level, date_format, log_format)
            return self._work(burst, max_jobs, max_idle_time)
        finally:
            self.teardown()
            for number, handler in handlers.items():
                # Told to stop, the process is about to end, and must not be cut short by an echo of that.
                signal.signal(number, handler if self._shutdown_requested_date is None else signal.SIG_IGN)

    def register_birth(self) -> None:
        """Register; the name of an AsyncWorker that died is free when its lease has run out, not minutes later."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.hexists(WORKERS, self.name)
            pipe.exists(lease_key(self.name))
            known, lives = pipe.execute()
        if known and not lives:
            self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def subscribe(self) -> None:
        """Hear commands from before the worker is listed. RQ's own misses those sent to one that has just shown up."""
        if self.pubsub_thread is None:
            super().subscribe()  # type: ignore[no-untyped-call]

    def _install_signal_handlers(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request_stop)

    def bootstrap(self, *args: Any, **options: Any) -> None:
        self.subscribe()
        try:
            super().bootstrap(*args, **options)
        except BaseException:
            self.unsubscribe()
            raise
        self.set_state(WorkerStatus.IDLE)

    def _work(self, burst: bool, max_jobs: int | None, max_idle_time: int | None) -> bool:
        settings = self.settings
        self._claims = Claims(self.connection, self.name, self.key, self._life, settings.queue_limits)
        self._endings = Endings(self)
        self._recovery = Recovery(
            self.connection,
            self.name,
            self.redis_worker_namespace_prefix,
            self._life,
            settings.recovery,
            self._queue,
            self._call_back_abandoned,
            allow_pickle=settings.allow_pickle,
        )
        self._runner = Runner(
            self._report,
            sync_threads=settings.sync_threads,
            session_threads=settings.session_threads,
            grace=1.0,
            exception_handlers=self._exc_handlers,
        )
        threading.Thread(target=self._serve_jobs, name="tta_sync-jobs", daemon=True).start()
        if not self._runner.ready.wait(30) or self._loop_error is not None:
            raise SystemExit(f"Worker {self.name}: the loop did not start: {self._loop_error}")
        self._doormen = [_Doorman(self.connection, queue, self._ring) for queue in self.queues[:_DOORMEN]]
        self._main_thread = os.getpid(), threading.get_ident()
        self._due = dict.fromkeys(("beat", "recover", "jobs", "cancel", "maintain"), 0.0)
        self._alive_before = False
        try:
            self._keep_books(burst, max_jobs, max_idle_time)
            self._drain()
        finally:
            for doorman in self._doormen:
                doorman.end()
            try:
                self._runner.post(self._runner.close)
            except RuntimeError:
                pass  # the loop is gone
        if self._exit_status:
            raise SystemExit(self._exit_status)
        return self._number > 0

    def _serve_jobs(self) -> None:
        """Lend the loop a thread that waits for the runner, which so lives as long as a call does."""
        try:
            default_facade().call_sync(self._runner.serve)
        except BaseException as error:
            self._loop_error = error
            self._runner.ready.set()
            self._ring()

    def _keep_books(self, burst: bool, max_jobs: int | None, max_idle_time: int | None) -> None:
        """Claim and write until there is a reason to stop."""
        trouble = 0.0
        idle_since = time.monotonic()
        while not self._stop_requested:
            try:
                self._look_after_loop()
                if self._in_doubt:
                    self._meet_redis()
                self._write()
                self._do_what_is_due()
                room = self.settings.concurrency - len(self._in_flight)
                if max_jobs is not None:
                    room = min(room, max_jobs - self._number)
                suspended = held_back = False
                claimed = 0
                if (room > 0 or self._claims.unanswered) and time.monotonic() >= self._claim_after:
                    claimed, suspended, held_back = self._claim(room)
                trouble = 0.0
            except redis.exceptions.RedisError as error:  # a full or read-only one's refusal too
                self._in_doubt = True
                trouble = min(_RETRY_AFTER, self.settings.recovery / 3, max(0.25, trouble * 2))
                self.log.error("Worker %s: Redis: %s; trying again in %.2g s", self.name, error, trouble)
                self._wait_out(trouble)
                continue
            if self._in_flight or claimed or time.monotonic() < self._claim_after:
                idle_since = time.monotonic()
            elif self._is_over(burst, max_jobs, max_idle_time, idle_since, suspended):
                return
            self._rest(room > claimed, suspended or (room > claimed and held_back), max_idle_time)

    def _wait_out(self, seconds: float) -> None:
        """Wait, whatever ends meanwhile; but not when told to stop."""
        end = time.monotonic() + seconds
        while not self._stop_requested and (remaining := end - time.monotonic()) > 0:
            self._bell.acquire(True, remaining)

    def _is_over(
        self, burst: bool, max_jobs: int | None, max_idle_time: int | None, idle_since: float, suspended: bool
    ) -> bool:
        if burst:
            self.log.info("Worker %s: %s", self.name, "suspended, quitting" if suspended else "done, quitting")
        elif max_jobs is not None and self._number >= max_jobs:
            self.log.info("Worker %s: finished executing %d jobs, quitting", self.name, self._number)
        elif max_idle_time is not None and time.monotonic() - idle_since >= max_idle_time:
            self.log.info("Worker %s: idle for %d seconds, quitting", self.name, max_idle_time)
        else:
            return False
        return True

    def _rest(self, room: bool, look_again: bool, max_idle_time: int | None) -> None:
        """Wait until something has ended, a job may be had, or something is due."""
        if self._ended:
            time.sleep(_LINGER)
            return
        wait = min(_LOOK, min(self._due.values()) - time.monotonic())
        if self._claims.unanswered or self._unwritten or self._claim_after > time.monotonic():
            wait = min(wait, 0.05)
        elif room and look_again:
            wait = min(wait, 0.1)  # what keeps jobs in their queues rings no bell
        elif room:
            for doorman in self._doormen:
                doorman.arm()
            if len(self.queues) > _DOORMEN:
                wait = min(wait, 0.25)
        if max_idle_time is not None:
            wait = min(wait, 0.5)
        if wait > 0 and self._bell.acquire(True, wait) and self._in_flight:
            time.sleep(_LINGER)

    def _do_what_is_due(self) -> None:
        moment = time.monotonic()
        due = self._due
        if moment >= due["beat"]:
            self._beat()
            due["beat"] = moment + self.settings.recovery / 3
        if moment >= due["recover"]:
            self._recovery.run()  # before RQ's own cleaning, which knows nothing of jobs that may be begun again
            due["recover"] = moment + self.settings.recovery / 3
        if moment >= due["jobs"]:
            self._beat_for_jobs()
            due["jobs"] = moment + _JOB_HEARTBEAT
        if self._in_flight and (moment >= due["cancel"] or self._stop_now):
            self._hear_cancels()
        if moment >= due["cancel"]:
            due["cancel"] = moment + _CANCEL_POLL
        if moment >= due["maintain"]:
            self._maintain()
            due["maintain"] = moment + 1.0

    def _maintain(self) -> None:
        if not self.should_run_maintenance_tasks:
            return
        try:
            self.run_maintenance_tasks()  # type: ignore[no-untyped-call]
        except redis.exceptions.RedisError:
            raise
        except Exception:  # of a callback of somebody else's job, say: no reason to leave our own
            self.log.exception("Worker %s: RQ's maintenance failed", self.name)
            self.last_cleaned_at = now()  # type: ignore[assignment]  # RQ says that it is None

    # ---- claiming

    def _claim(self, room: int) -> tuple[int, bool, bool]:
        in_turn = self._dequeue_strategy != DequeueStrategy.DEFAULT
        answer = self._claims.claim(self._ordered_queues, room, in_turn=in_turn)
        if answer.refused:
            self._due["beat"] = 0.0
            return 0, False, False
        if answer.suspended:
            if self.get_state() != WorkerStatus.SUSPENDED:
                self.log.info("Worker %s: suspended, run `rq resume` to resume", self.name)
                self.set_state(WorkerStatus.SUSPENDED)
            return 0, True, False
        if answer.jobs:
            self._state = WorkerStatus.BUSY  # the claim has written it
            self.reorder_queues(reference_queue=answer.jobs[-1].queue)
        elif self.get_state() != (state := WorkerStatus.BUSY if self._in_flight else WorkerStatus.IDLE):
            with self.connection.pipeline(transaction=False) as pipe:
                self.set_state(state, pipeline=pipe)
                if state == WorkerStatus.IDLE:
                    self.set_current_job_id(None, pipeline=pipe)
                pipe.execute()
        deliveries = [self._prepare(claimed) for claimed in answer.jobs]
        for delivery in deliveries:
            self._in_flight[delivery.execution.id] = delivery
        if deliveries:
            self._runner.post(self._runner.launch, deliveries)
        return len(deliveries), False, answer.held_back

    def _prepare(self, claimed: Claimed) -> Delivery:
        """Make what the loop needs; whatever is wrong with the job is the job's error, not the worker's."""
        self._number += 1
        execution = Execution(claimed.execution_id, claimed.job_id, self.connection, self.name)
        job = self.job_class(claimed.job_id, connection=self.connection, serializer=JSONSerializer)
        error: Exception | None = None
        try:
            job.restore(claimed.fields)
        except Exception as raised:
            error = raised
            job.data = claimed.fields.get(b"data", b"")
        job.origin = job.origin or claimed.queue.name
        job.worker_name = self.name
        job._status = JobStatus.STARTED
        job.started_at = job.last_heartbeat = execution.created_at
        delivery = Delivery(job, execution, claimed.queue, self._number)
        pickled = error is None and not is_json(job.data)
        if pickled:
            if self.settings.allow_pickle:
                job.serializer = DefaultSerializer
                job.restore(claimed.fields)
                job.worker_name, job._status, job.started_at = self.name, JobStatus.STARTED, execution.created_at
            else:
                error = PickleRefusedError("the payload is a pickle; this worker takes JSON only")
        if error is not None:
            job.meta, job.retries_left = {}, None  # another attempt would end the same
            job._success_callback_name = job._failure_callback_name = job._stopped_callback_name = None
            delivery.counts = None, job.repeats_left, job.number_of_retries
            delivery.error = error
            return delivery
        try:
            if not pickled:
                job.args, job.kwargs  # noqa: B018  # decoded here, where an error is the job's own
                delivery.fn = imported(job)
                delivery.definition = getattr(delivery.fn, "_tta_job", None)
            delivery.context = context_of(job)
            delivery.running_key = running_key_of(job)
        except Exception as raised:
            delivery.error = raised
        if self.log_job_description:
            self.log.info("Worker %s: %s: %s (%s)", self.name, claimed.queue.name, job.description, job.id)
        return delivery

    # ---- writing

    def _report(self, delivery: Delivery) -> None:
        """Hand over what has ended. The loop's thread."""
        self._ended.append(delivery)
        self._ring()

    def _write(self) -> None:
        while self._ended:
            self._unwritten.append(self._ended.popleft())
        if not self._unwritten:
            return
        try:
            self._endings.write(self._unwritten, self._written)
        finally:
            self._unwritten = [one for one in self._unwritten if one.execution.id in self._in_flight]

    def _meet_redis(self) -> None:
        """Find out whether this is the Redis that we knew; if not, tell it what it may have forgotten.

        With AOF it forgets up to two seconds when it is killed, and so does a replica that takes over.
        """
        try:
            redis_id = str(self.connection.info("server").get("run_id", ""))
        except redis.exceptions.ResponseError:
            redis_id = ""  # some who offer Redis do not allow that: it is told each time
        knew, self._redis_id = self._redis_id, redis_id
        if knew is not None and (knew != redis_id or not redis_id):
            # Before anybody claims, all workers take back what is theirs.
            self._claim_after = time.monotonic() + _RETRY_AFTER + 0.25 if redis_id else 0.0
            self._remind_redis()
        self._in_doubt = False

    def _remind_redis(self) -> None:
        held = [one for one in self._in_flight.values() if one.why != LOST]
        written = [one for _, one in self._recent if one.execution.id not in self._in_flight]
        both = held + written
        for begin in range(0, len(both), 1000):
            part = both[begin : begin + 1000]
            answers = self._claims.reassert(
                [(one.job.id, one.execution.id, one.queue.name, one.running_key, one.enqueued_at) for one in part]
            )
            for delivery, answer in zip(part, answers, strict=True):
                if answer != MISSING and delivery.execution.id not in self._in_flight:
                    self.log.warning("Worker %s: Redis has forgotten the end of job %s", self.name, delivery.job.id)
                    delivery.job.webhooks = []  # they have been told
                    self._in_flight[delivery.execution.id] = delivery
                    self._unwritten.append(delivery)

    def _written(self, delivery: Delivery) -> None:
        moment = time.monotonic()
        if delivery.why != LOST:
            self._recent.append((moment, delivery))
        while self._recent and (len(self._recent) > _REMEMBERED_AT_MOST or moment - self._recent[0][0] > _REMEMBERED):
            self._recent.popleft()
        self._in_flight.pop(delivery.execution.id, None)
        self._log_end(delivery)
        if delivery.job.webhooks and delivery.webhook is not None:
            self._messenger.send(delivery.job, *delivery.webhook)

    def _log_end(self, delivery: Delivery) -> None:
        job = delivery.job
        if delivery.error is None:
            self.log.info("Worker %s: %s: Job OK (%s), %.3f s", self.name, job.origin, job.id, delivery.seconds())
        elif delivery.why == DRAINED:
            self.log.warning("Worker %s: job %s did not end in time and is back in its queue", self.name, job.id)
        elif delivery.why != LOST:
            self.log.error(
                "Worker %s: job %s: exception raised while executing (%s)\n%s",
                self.name,
                job.id,
                job.description,
                delivery.exc_string,
                extra={"queue": job.origin, "job_id": job.id},
            )
        if delivery.gave_up:
            self.log.warning("Worker %s: job %s runs on although it was cancelled", self.name, job.id)

    def _call_back_abandoned(self, job: Job, error: BaseException) -> None:
        self._runner.post(self._runner.tell_of_death, job, error)

    # ---- signs of life

    def _beat(self) -> None:
        if not self._alive_before:
            self._recovery.run_for_namesake()
        began = time.monotonic()
        with self.connection.pipeline(transaction=False) as pipe:
            self._recovery.renew(self.queue_names(), pipe)
            self.heartbeat(pipeline=pipe)
            lease, *_, created, _ = pipe.execute()
        if created == 1:  # the worker's own key had run out, or was buried
            with self.connection.pipeline(transaction=True) as pipe:
                pipe.hset(self.key, mapping={**self.serialize(), "state": self.get_state()})
                worker_registration.register(self, pipe)
                pipe.execute()
        if not self._recovery.was_alive(lease):  # we may have been taken for dead, and our jobs from us
            self._beat_for_jobs()
            if self._alive_before:  # so may others, with Redis or the network gone: they are to have the time to say no
                self._due["recover"] = time.monotonic() + self.settings.recovery
        self._alive_before = True
        # Behind what was said of jobs that are not ours any more.
        self._runner.post(self._runner.renew, began + self.settings.recovery)

    def _beat_for_jobs(self) -> None:
        """Say that the jobs live, and find out whether they were taken from us."""
        deliveries = [delivery for delivery in self._in_flight.values() if delivery.why != LOST]
        for begin in range(0, len(deliveries), 1000):
            part = deliveries[begin : begin + 1000]
            alive = self._claims.hold([(one.job.id, one.execution.id, one.queue.name, one.running_key) for one in part])
            for delivery, lives in zip(part, alive, strict=True):
                if not lives and not delivery.unanswered:
                    self._cancel(delivery, LOST)

    def _look_after_loop(self) -> None:
        """Leave the process when the loop does not turn: another worker takes its jobs up."""
        moment = time.monotonic()
        if moment - self._looked < _LOOK and self._loop_error is None:
            return
        # Of the time since the last look no more than a little counts: this thread may have been kept from looking, and
        # the process may have been stopped as a whole.
        passed = min(moment - self._looked, 2 * _LOOK)
        self._looked = moment
        self._stalled = 0.0 if self._ticked == self._ticks else self._stalled + passed
        if self._loop_error is None and self._stalled < self.settings.stall_limit:
            if self._ticked == self._ticks:
                self._ticks += 1
                try:
                    self._runner.post(self._tick)
                except RuntimeError as error:
                    self._loop_error = error
            if self._exhausted and not self._exit_status:
                self.log.critical("Worker %s: too many jobs that were given up still run: stopping", self.name)
                self._exit_status = 1
                self._stop_requested = True
            return
        why = (
            f"the loop is lost ({self._loop_error})"
            if self._loop_error
            else f"the loop was blocked for {self._stalled:.0f} s"
        )
        self.log.critical("Worker %s: %s; leaving %d jobs to other workers", self.name, why, len(self._in_flight))
        try:
            self._recovery.abandon()
            self.register_death()  # type: ignore[no-untyped-call]
        except redis.exceptions.RedisError:
            pass  # the lease runs out by itself
        process: Any = None if self.scheduler is None else self.scheduler._process
        if process is not None:
            process.terminate()
        logging.shutdown()
        os._exit(_EXIT_STALLED)

    def _tick(self) -> None:
        """Say that the loop turns. The loop's thread."""
        self._ticked += 1
        self._exhausted = self._runner.exhausted or len(self._runner.orphans) >= self.settings.concurrency

    # ---- ending jobs early

    def _cancel(self, delivery: Delivery, why: str, by: BaseException | None = None) -> None:
        self._runner.post(self._runner.cancel, delivery, why, by)

    def _hear_cancels(self) -> None:
        deliveries = [one for one in self._in_flight.values() if one.why is None and not one.asked]
        if not deliveries:
            self._stop_now.clear()
            return
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.mget([cancel_key(delivery.job.id) for delivery in deliveries])
            flush([delivery.progress for delivery in deliveries if delivery.progress is not None], pipe)
            wanted = pipe.execute()[0]
        stop_now = {self._stop_now.popleft() for _ in range(len(self._stop_now))}
        for delivery, value in zip(deliveries, wanted, strict=True):
            if applies(value, delivery.job) or delivery.job.id in stop_now:
                self.log.info("Worker %s: job %s is cancelled by request", self.name, delivery.job.id)
                delivery.asked = True
                self._cancel(delivery, STOPPED, JobCancelledError(delivery.job.id))

    def _drain(self) -> None:
        """Let what runs end, cancel what does not, and write it all down."""
        in_flight = self._in_flight
        if in_flight:
            self.log.info("Worker %s: stopping; %d jobs are in flight", self.name, len(in_flight))
        end = time.monotonic() + self.settings.drain
        self._write_until(lambda: (not in_flight and not self._claims.unanswered) or self._cold, end)
        if in_flight:
            for delivery in list(in_flight.values()):
                self._runner.post(self._runner.drain, delivery, self.settings.drain)
            # All at once, so that they are put back in their order.
            end = time.monotonic() + self._runner.grace + 1.0
            while len(self._ended) + len(self._unwritten) < len(in_flight) and self._loop_error is None:
                if not self._bell.acquire(True, max(0.0, min(0.2, end - time.monotonic()))) and time.monotonic() >= end:
                    break
        self._write_until(lambda: not in_flight and not self._claims.unanswered, time.monotonic() + 2.0)
        if not self._messenger.end(max(1.0, end - time.monotonic())):
            self.log.error("Worker %s: not all webhooks were sent", self.name)
        if in_flight or self._unwritten or self._claims.unanswered:
            self.log.error("Worker %s: the ends of %d jobs could not be written", self.name, len(in_flight))
            self._try(self._recovery.abandon)
        else:
            self._try(self._recovery.deregister)

    def _put_back_unheard(self) -> None:
        """Put back what a claim brought of which nothing was heard before the worker was told to stop."""
        answer = self._claims.claim([], 0, in_turn=False)
        if answer.refused:
            self._beat()
        for claimed in answer.jobs:
            delivery = self._prepare(claimed)
            delivery.why, delivery.phase = DRAINED, ENDED
            delivery.error = WorkerStoppedError("the worker was stopped before it began")
            self._in_flight[delivery.execution.id] = delivery
            self._unwritten.append(delivery)

    def _write_until(self, done: Callable[[], bool], end: float) -> None:
        while True:
            try:
                self._look_after_loop()
                if self._in_doubt:
                    self._meet_redis()
                if self._claims.unanswered:
                    self._put_back_unheard()
                self._write()
                moment = time.monotonic()
                if moment >= self._due["beat"]:
                    self._beat()
                    self._due["beat"] = moment + self.settings.recovery / 3
                if moment >= self._due["jobs"]:
                    self._beat_for_jobs()
                    self._due["jobs"] = moment + _JOB_HEARTBEAT
                if self._in_flight and moment >= self._due["cancel"]:
                    self._hear_cancels()
                    self._due["cancel"] = moment + _CANCEL_POLL
            except redis.exceptions.RedisError as error:
                self._in_doubt = True
                self.log.error("Worker %s: Redis: %s", self.name, error)
                time.sleep(0.1)
            remaining = end - time.monotonic()
            if done() or remaining <= 0 or self._loop_error is not None:
                return
            self._bell.acquire(True, min(remaining, 0.2))

    def _try(self, fn: Callable[[], object]) -> None:
        try:
            fn()
        except redis.exceptions.RedisError as error:
            self.log.error("Worker %s: Redis: %s", self.name, error)

    def stop_scheduler(self) -> None:
        """End RQ's scheduler, which is deaf until it has handlers of its own."""
        process: Any = self.scheduler and self.scheduler._process
        while process and process.pid and process.is_alive():
            process.terminate()
            process.join(1)

    def unsubscribe(self) -> None:
        """End the thread that hears commands. RQ's own way may leave it there for a minute."""
        thread: Any = self.pubsub_thread
        if thread is not None:
            thread.stop()  # first: the end of the subscription wakes it once only
        super().unsubscribe()  # type: ignore[no-untyped-call]
        self.pubsub_thread = None

    def teardown(self) -> None:
        """Say goodbye; a Redis that is down is no reason to hang."""
        self._try(super().teardown)
        self.connection.connection_pool.disconnect(inuse_connections=False)  # it is our own
