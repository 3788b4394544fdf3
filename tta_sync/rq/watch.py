"""The watch over jobs that run one at a time, on RQ's stock workers: it hears of cancellations and writes progress.

One thread per process, which sleeps while jobs come and go quickly: a job that has run for less than LOOK_AFTER costs
nothing but an entry in a dict. The thread ends when no job has run for a while, and the next one starts another. What
it may wait for is Redis, on connections of its own with short timeouts; so neither the job nor the loop ever waits.

Who owns what: ``_running`` is changed by the threads of the jobs, ``_free`` by whoever becomes, or stops being, the
watch; the operations used on both are atomic. A job's ``struck`` is set on the loop thread, before its coroutine is
cancelled, and read by the job's thread after the coroutine has ended.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import os
import threading
import time
from contextvars import ContextVar
from typing import Any

from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq.command import send_command
from rq.connections import get_connection_kwargs
from rq.job import Job

from tta_sync.context import WorkflowContext
from tta_sync.primitives.core.base import CallerPrimitive, WorkflowPrimitive
from tta_sync.rq.control import applies, cancel_key, watched_key
from tta_sync.rq.progress import Progress
from tta_sync.runtime import generation, native
from tta_sync.runtime.call import Call
from tta_sync.runtime.loop import living_loops

logger = logging.getLogger("tta_sync")

LOOK_AFTER = 0.25
"""Seconds after which a running job is looked after, and between two looks."""

IDLE = 5.0
"""Seconds without a job after which the watch ends."""

PATIENCE = 1.0
"""Seconds that the watch, and a job's last write, wait for Redis."""

WATCHED = 3000  # milliseconds that the watch's own key lives

watched_job: ContextVar[WatchedJob | None] = ContextVar("tta_sync_watched_job", default=None)
"""The job that runs here; always reset when it ends."""


class WatchedJob:
    """A job in the hands of a stock worker, with what the watch knows of its run."""

    def __init__(self, job: Job, context: WorkflowContext, progress: Progress) -> None:
        self.job = job
        self.context = context
        self.progress = progress
        self.began = time.monotonic()
        self.asked = False  # somebody wants it to end; the watch's
        self.struck = False  # a call of it has been cancelled
        self.ended = False
        self.looked_after = False
        self.stop_sent = 0.0
        self.said: set[str] = set()  # each once

    def calls(self) -> list[Call]:
        """Return the calls in flight that the job's own thread waits for."""
        return [call for managed in living_loops() for call in list(managed.calls) if self._is_ours(call)]

    def _is_ours(self, call: Call) -> bool:
        context: contextvars.Context | None = call.context
        return context is not None and context.get(watched_job) is self

    @property
    def plain(self) -> bool:
        """Whether it runs nothing but synchronous code just now, and will go on so."""
        func = self.job.func
        workflow = func if isinstance(func, WorkflowPrimitive) else getattr(func, "workflow", None)
        if workflow is not None:
            return type(workflow) is CallerPrimitive
        return not inspect.iscoroutinefunction(func) and not self.calls()

    def strike(self) -> None:
        """Cancel what the job's coroutines do now. Where that is nothing, there may be something at the next look."""
        for call in self.calls():
            call.loop.post(self._strike, call)

    def _strike(self, call: Call) -> None:  # loop thread
        if not (call.done or call.why is not None or self.ended):
            self.struck = True
            call.expire_now()


class Watch:
    """One process's watch."""

    def __init__(self) -> None:
        self._running: dict[WatchedJob, None] = {}
        self._free = [True]
        self._clients: dict[Any, Redis] = {}  # by pool; the watch's, and of jobs that end
        self._lock = threading.Lock()  # guards _clients

    def begin(self, watched: WatchedJob) -> None:
        """Look after *watched* until :meth:`end`."""
        self._running[watched] = None
        if self._free:
            # Through a bare thread: Thread.start() waits on a Condition, which an alarm of RQ's would break.
            native.start_new_thread(self._start, ())

    def end(self, watched: WatchedJob) -> None:
        """Let go of *watched*, and write the last of its progress. On the job's thread."""
        self._running.pop(watched, None)
        watched.ended = True
        if not (watched.progress.reported or watched.looked_after):
            return
        job_id = watched.job.id
        try:
            client = self.client_for(watched.job.connection)
            watched.progress.write(client)
            if watched.looked_after:
                client.delete(watched_key(job_id), *([cancel_key(job_id)] if watched.asked else []))
        except RedisError as error:
            # RQ is about to write the job's end, and will say so if Redis is really gone.
            logger.warning("job %s: its last progress was not written (%s)", job_id, type(error).__name__)

    def client_for(self, connection: Redis) -> Redis:
        """Return a client of the same server with little patience."""
        pool = connection.connection_pool
        with self._lock:
            client = self._clients.get(pool)
            if client is None:
                if len(self._clients) >= 8:
                    self._close()
                client = self._clients[pool] = _impatient(connection)
        return client

    def _close(self) -> None:
        for pool, client in list(self._clients.items()):
            if client.connection_pool is not pool:
                client.connection_pool.disconnect(inuse_connections=False)
        self._clients.clear()

    def _start(self) -> None:
        try:
            self._free.pop()  # atomic
        except IndexError:
            return  # another is the watch
        threading.Thread(target=self._look_round, name="tta_sync-jobs", daemon=True).start()

    def _look_round(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(LOOK_AFTER)
            now = time.monotonic()
            running = list(self._running)
            for one in running:
                if now - one.began >= LOOK_AFTER:
                    self._look_after(one, now)
            if running:
                last = now
            elif now - last > IDLE:
                with self._lock:
                    self._close()
                self._free.append(True)
                if not self._running:
                    return
                try:  # a job came just now, and may have seen no need for a watch
                    self._free.pop()
                except IndexError:
                    return

    def _look_after(self, watched: WatchedJob, now: float) -> None:
        try:
            client = self.client_for(watched.job.connection)
            if not watched.asked:
                watched.looked_after = True
                with client.pipeline(transaction=False) as pipe:
                    pipe.get(cancel_key(watched.job.id))
                    pipe.set(watched_key(watched.job.id), 1, px=WATCHED)
                    wanted, _ = pipe.execute()
                watched.asked = applies(wanted, watched.job)
            if watched.asked:
                self._cancel(watched, client, now)
            if watched.progress.due(now) and not watched.ended:
                watched.progress.write(client)
        except RedisError as error:
            if "down" not in watched.said:  # it is tried again at every look
                watched.said.add("down")
                logger.warning(
                    "job %s: Redis does not say whether it is to be cancelled, nor takes its progress (%s)",
                    watched.job.id,
                    type(error).__name__,
                )
        except Exception:
            logger.exception("job %s could not be looked after", watched.job.id)

    def _cancel(self, watched: WatchedJob, client: Redis, now: float) -> None:
        job = watched.job
        if not watched.plain:
            watched.strike()
            return
        if now - watched.stop_sent < 1.0:
            return
        watched.stop_sent = now
        pid = client.hget(f"rq:worker:{job.worker_name}", "pid")
        if pid is not None and int(pid) != os.getpid():
            # A process of its own: RQ's worker kills it and calls the job stopped.
            client.delete(cancel_key(job.id))
            send_command(client, job.worker_name or "", "stop-job", job_id=job.id)
        elif "plain" not in watched.said:
            watched.said.add("plain")
            logger.warning("job %s was to be cancelled, but runs plain code, which goes on to its end", job.id)


def _impatient(connection: Redis) -> Redis:
    pool = connection.connection_pool
    if type(pool) not in (ConnectionPool, BlockingConnectionPool):
        return connection  # Sentinel's, say, which knows more than an address
    options = {
        **get_connection_kwargs(connection),
        "socket_timeout": PATIENCE,
        "socket_connect_timeout": PATIENCE,
        "retry": Retry(NoBackoff(), 0),
    }
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))


class _Process:
    """What this process has; a forked child begins anew, without closing what its parent uses."""

    def __init__(self) -> None:
        self.watch = Watch()

    def forget(self) -> None:
        self.watch = Watch()


process = _Process()
generation.on_fork(process.forget)
