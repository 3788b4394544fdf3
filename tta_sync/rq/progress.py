"""How far a job has come: the newest report, written to ``job.meta["progress"]`` about twice a second.

RQ keeps a job's meta as one serialized field, which user code writes whole with ``job.save_meta()``, from any process.
So a report is never written as part of a meta that was read a moment before:

* meta of JSON (all that :func:`tta_sync.rq.workflow_job` enqueues) is changed inside Redis by a script that replaces
  the one member and leaves every other byte as it is;
* meta of another serializer is replaced only if it is still what it was when the job's own meta was read.

The job object in the worker is told as well, so that a later ``save_meta()`` of its own does not turn progress back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Protocol

from redis import Redis
from rq.job import Job

PROGRESS = "progress"
"""The key in ``job.meta``: ``{"done", "total", "message", "at"}``; ``at`` is ISO 8601 with its zone."""

FIELD = "tta_sync_progress"
"""Of the job's hash, the same as JSON: only where meta is not JSON, for readers that unpickle nothing."""

INTERVAL = 0.5
"""Seconds between two writes of one job's progress."""

EVENTS = "tta_sync:job:events:{}"
_ATTEMPTS = 5

# Finds the member "progress" of the outermost object and replaces its value, or appends it. cjson is not used: what it
# decodes and encodes again is not the same (empty lists, large numbers).
_SPLICE = r"""
local function string_end(s, i)
  i = i + 1
  while true do
    i = string.find(s, '["\\]', i)
    if not i then return nil end
    if string.byte(s, i) == 34 then return i end
    i = i + 2
  end
end
local function value_end(s, i)
  local first = string.byte(s, i)
  if first == 34 then return string_end(s, i) end
  if first == 123 or first == 91 then
    local depth = 0
    while true do
      i = string.find(s, '["%[%]{}]', i)
      if not i then return nil end
      local c = string.byte(s, i)
      if c == 34 then
        i = string_end(s, i)
        if not i then return nil end
      elseif c == 123 or c == 91 then
        depth = depth + 1
      else
        depth = depth - 1
        if depth == 0 then return i end
      end
      i = i + 1
    end
  end
  local behind = string.find(s, '[,}%s]', i)
  return behind and behind - 1
end
local function splice(s, value)
  local member = '"progress": ' .. value
  local i = string.find(s, '%S')
  if not i then return '{' .. member .. '}' end
  if string.byte(s, i) ~= 123 then return nil end
  i = string.find(s, '%S', i + 1)
  if not i then return nil end
  if string.byte(s, i) == 125 then return '{' .. member .. '}' end
  while true do
    if not i or string.byte(s, i) ~= 34 then return nil end
    local key_end = string_end(s, i)
    local colon = key_end and string.find(s, '%S', key_end + 1)
    if not colon or string.byte(s, colon) ~= 58 then return nil end
    local from = string.find(s, '%S', colon + 1)
    local to = from and value_end(s, from)
    local behind = to and string.find(s, '%S', to + 1)
    if not behind then return nil end
    if string.sub(s, i + 1, key_end - 1) == 'progress' then
      return string.sub(s, 1, from - 1) .. value .. string.sub(s, to + 1)
    end
    if string.byte(s, behind) == 125 then
      return string.sub(s, 1, to) .. ', ' .. member .. string.sub(s, behind)
    end
    if string.byte(s, behind) ~= 44 then return nil end
    i = string.find(s, '%S', behind + 1)
  end
end
local outcome = {}
for n, key in ipairs(KEYS) do
  local value, channel = ARGV[2 * n - 1], ARGV[2 * n]
  outcome[n] = 0
  if redis.call('HEXISTS', key, 'status') == 1 then
    local spliced = splice(redis.call('HGET', key, 'meta') or '', value)
    if spliced then
      redis.call('HSET', key, 'meta', spliced)
      outcome[n] = 1
      redis.call('PUBLISH', channel, value)
    else
      outcome[n] = -1
    end
  end
end
return outcome
"""

_SWAP = """
local key, before, after, field, value, channel = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('HEXISTS', key, 'status') == 0 then return 0 end
if (redis.call('HGET', key, 'meta') or '') ~= before then return -1 end
redis.call('HSET', key, 'meta', after, field, value)
redis.call('PUBLISH', channel, value)
return 1
"""

WRITTEN, GONE, CHANGED = 1, 0, -1


class Commands(Protocol):
    """A Redis client, or a pipeline of one."""

    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Any: ...


def events_channel(job_id: str) -> str:
    """Name the channel on which each written report is published, as JSON."""
    return EVENTS.format(job_id)


class Progress:
    """What one job has reported; ``report`` is for any thread, writing for one that may wait for Redis.

    Args:
        job_id: whose progress it is.
        connection: for :meth:`write`, unless that is given another.
        job: the job as its own code sees it (``get_current_job()``), whose meta is kept up to date.

    Whoever runs the job writes: alone with :meth:`write`, or many at once with :func:`flush`.
    """

    def __init__(self, job_id: str, connection: Redis, job: Job | None = None) -> None:
        self.job_id = job_id
        self.connection = connection
        self.job = job
        self._newest: tuple[float, float | None, str | None, float] | None = None  # replaced, never changed
        self._written: tuple[Any, ...] | None = None  # the writer's
        self._written_at = -INTERVAL  # the writer's, on time.monotonic()
        self._writing = threading.Lock()

    def report(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Note how far the job has come, in place of what was noted before. Never blocks."""
        self._newest = (done, total, message, time.time())

    @property
    def reported(self) -> bool:
        """Whether there was a report at all."""
        return self._newest is not None

    def due(self, now: float) -> bool:
        """Say whether there is something to write, and the last write was long enough ago (``time.monotonic()``)."""
        return self._newest is not self._written and now - self._written_at >= INTERVAL

    def latest(self) -> dict[str, Any] | None:
        """Return the newest report as it is stored, None where there is none."""
        newest = self._newest
        return None if newest is None else _stored(newest)

    def write(self, connection: Redis | None = None) -> bool:
        """Write the newest report now; say whether the job is still there to take it.

        Two writes never overtake each other.

        Raises:
            redis.exceptions.RedisError: Redis did not take it.
        """
        with self._writing:
            client = self.connection if connection is None else connection
            newest = self._newest
            if newest is None:
                return True
            self._written_at = time.monotonic()
            value = _stored(newest)
            outcome = self._splice(client, value) if self._is_json() else self._swap(client, value)
            self._written = newest
            return outcome != GONE

    def _splice(self, client: Redis, value: dict[str, Any]) -> int:
        self._tell_job(value)
        outcome: Any = client.eval(_SPLICE, 1, Job.key_for(self.job_id), _dump(value), events_channel(self.job_id))
        return int(outcome[0])

    def _swap(self, client: Redis, value: dict[str, Any]) -> int:
        job = self.job
        assert job is not None
        key = Job.key_for(self.job_id)
        for _ in range(_ATTEMPTS):
            before = client.hget(key, "meta") or b""
            # Read after that: what the job's own code saves meanwhile is in it, or makes the swap fail.
            self._tell_job(value)
            after = job.serializer.dumps(job.meta)
            channel = events_channel(self.job_id)
            outcome: Any = client.eval(_SWAP, 1, key, before, after, FIELD, _dump(value), channel)
            if outcome != CHANGED:
                return int(outcome)
        return CHANGED  # somebody saves without end; the next write tries again

    def _is_json(self) -> bool:
        return self.job is None or bytes(self.job.serializer.dumps({})) == b"{}"

    def _tell_job(self, value: dict[str, Any]) -> None:
        if self.job is not None:
            self.job.meta[PROGRESS] = value

    def take(self, now: float, *, final: bool) -> list[str] | None:
        """Return key, value and channel for one write by :func:`flush`, None where nothing is due."""
        newest = self._newest
        if newest is None or not (final or self.due(now)):
            return None
        if not self._is_json():
            self.write()
            return None
        self._written, self._written_at = newest, now
        value = _stored(newest)
        self._tell_job(value)
        return [Job.key_for(self.job_id), _dump(value), events_channel(self.job_id)]


def flush(progresses: Iterable[Progress], pipeline: Commands, *, final: bool = False) -> int:
    """Append one command to *pipeline* that writes what is due of many jobs' progress; return of how many.

    For a worker that runs many jobs at once, from the thread that keeps its books. *final*: of jobs that have ended,
    all that was ever reported is due; in the pipeline before what ends them. Jobs whose meta is not JSON are written at
    once, each on its own connection.

    A pipeline that fails loses these reports; each next one is written as usual.
    """
    now = time.monotonic()
    keys: list[str] = []
    arguments: list[str] = []
    for progress in progresses:
        taken = progress.take(now, final=final)
        if taken is not None:
            keys.append(taken[0])
            arguments.extend(taken[1:])
    if keys:
        pipeline.eval(_SPLICE, len(keys), *keys, *arguments)
    return len(keys)


def _stored(newest: tuple[float, float | None, str | None, float]) -> dict[str, Any]:
    done, total, message, at = newest
    return {"done": done, "total": total, "message": message, "at": datetime.fromtimestamp(at, UTC).isoformat()}


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value)
