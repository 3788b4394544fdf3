"""What AsyncWorker does to Redis that must happen at once or not at all, and what tells a dead worker from a slow one.

Keys of our own, beside RQ's:

``tta_sync:workers``            hash: the name of each AsyncWorker, and its queues
``tta_sync:worker:<name>``      its lease: gone when it has not been renewed for the recovery time
``tta_sync:claimed:<name>``     its latest claim, in case the answer was lost on the way
``tta_sync:running:<key>``      sorted set: the executions that share a concurrency limit
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis
from rq.queue import Queue
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, utcformat

WORKERS = "tta_sync:workers"
DELIVERIES = "tta_deliveries"  # of a job's hash: how often it was begun and its worker died
CONCURRENCY = "concurrency"  # of our part of job.meta: [key, limit]

ABANDONED_AFTER = 6 * 3600
"""Seconds after which RQ's own rules apply to a job whose worker has died, should no AsyncWorker ever look after it."""

LOOK_AHEAD = 1000
"""Jobs looked at in one claim to find some whose concurrency limit is not reached."""


def lease_key(worker: str) -> str:
    return f"tta_sync:worker:{worker}"


def running_key(key: str) -> str:
    return f"tta_sync:running:{key}"


# Pop, execution and started registry in one step: RQ's own worker has lost the job if it dies between the first and the
# last. The writes are those of rq.executions.Execution.create, Job.prepare_for_execution and Job.perform.
_CLAIM = """
local memo, suspended, worker_key = KEYS[1], KEYS[2], KEYS[3]
local token, wanted, now, iso, worker, ttl, look_ahead, turn =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]),
  tonumber(ARGV[8])
local queues = #KEYS - 3
local out = {}

local known = redis.call('GET', memo)
if known then
  known = cjson.decode(known)
  if known[1] == token then
    for i = 2, #known, 3 do
      out[#out + 1] = known[i]; out[#out + 1] = known[i + 1]; out[#out + 1] = known[i + 2]
      out[#out + 1] = redis.call('HGETALL', 'rq:job:' .. known[i])
    end
    return {'again', out}
  end
end
if redis.call('EXISTS', suspended) == 1 then return {'suspended', out} end

local taken, held_back = {token}, false
local function room(name, limit)
  return limit == 0 or redis.call('ZCOUNT', 'rq:wip:' .. name, now, '+inf') < limit
end
local function shared_limit(id)
  local meta = redis.call('HGET', 'rq:job:' .. id, 'meta')
  if meta and string.find(meta, '"concurrency"', 1, true) then
    local ok, decoded = pcall(cjson.decode, meta)
    local ours = ok and type(decoded) == 'table' and decoded['tta_sync']
    local pair = type(ours) == 'table' and ours['concurrency']
    if type(pair) == 'table' then return 'tta_sync:running:' .. tostring(pair[1]), tonumber(pair[2]) end
  end
end

-- Take one from a queue; false when it has none to give.
local function take(index, queue_key, skipped)
  local name, limit = string.sub(queue_key, 10), tonumber(ARGV[8 + index])
  while true do
    if not room(name, limit) then held_back = true; return false end
    local id = redis.call('LPOP', queue_key)
    if not id then return false end
    local job_key = 'rq:job:' .. id
    local running, at_most = shared_limit(id)
    if running and redis.call('ZCOUNT', running, now, '+inf') >= at_most then
      skipped[#skipped + 1] = id
      held_back = true
      if #skipped >= look_ahead then return false end
    else
      local fields = redis.call('HGETALL', job_key)
      if #fields > 0 then
        local execution = ARGV[8 + queues + (#taken - 1) / 3 + 1]
        local execution_key, executions = 'rq:execution:' .. id .. ':' .. execution, 'rq:executions:' .. id
        redis.call('HSET', execution_key, 'id', execution, 'created_at', ARGV[3], 'last_heartbeat', ARGV[3],
          'worker_name', worker)
        redis.call('EXPIRE', execution_key, ttl)
        redis.call('ZADD', executions, now + ttl + 60, execution)
        redis.call('EXPIRE', executions, ttl + 60)
        redis.call('ZADD', 'rq:wip:' .. name, now + ttl, id .. ':' .. execution)
        redis.call('HSET', job_key, 'status', 'started', 'worker_name', worker, 'started_at', iso,
          'last_heartbeat', iso)
        redis.call('PERSIST', job_key)
        if running then
          redis.call('ZADD', running, now + ttl, id .. ':' .. execution)
          redis.call('EXPIRE', running, ttl + 60)
        end
        out[#out + 1] = id; out[#out + 1] = execution; out[#out + 1] = index; out[#out + 1] = fields
        taken[#taken + 1] = id; taken[#taken + 1] = execution; taken[#taken + 1] = index
        return true
      end
    end
  end
end

local skipped, empty, left = {}, {}, queues
for index = 1, queues do skipped[index] = {} end
while left > 0 and wanted > 0 do
  for index = 1, queues do
    local quota = turn == 0 and wanted or 1
    while not empty[index] and quota > 0 and wanted > 0 do
      if take(index, KEYS[3 + index], skipped[index]) then
        wanted, quota = wanted - 1, quota - 1
      else
        empty[index] = true; left = left - 1
      end
    end
  end
end
for index = 1, queues do
  for i = #skipped[index], 1, -1 do redis.call('LPUSH', KEYS[3 + index], skipped[index][i]) end
end
if #out > 0 then
  redis.call('SET', memo, cjson.encode(taken), 'EX', 3600)
  redis.call('HSET', worker_key, 'state', 'busy', 'current_job', out[1], 'current_job_working_time', 0)
end
return {held_back and 'held back' or 'ok', out}
"""


@dataclass(slots=True)
class Claimed:
    """One job that is ours from now on, as Redis has it."""

    job_id: str
    execution_id: str
    queue: Queue
    fields: dict[bytes, bytes]


@dataclass(slots=True)
class Answer:
    """What a claim brought."""

    jobs: list[Claimed]
    suspended: bool = False
    held_back: bool = False
    """A concurrency limit kept jobs in their queues."""


class Claims:
    """Claims jobs for one worker. One thread only.

    A claim whose answer was lost is repeated with the token that it had: it brings the same jobs, not others.
    """

    def __init__(self, connection: Redis, worker: str, worker_key: str, limits: dict[str, int]) -> None:
        self._worker = worker
        self._worker_key = worker_key
        self._limits = limits
        self._script = connection.register_script(_CLAIM)
        self._token: str | None = None  # of a claim of which nothing was heard, with what it asked for
        self._asked: tuple[list[Queue], int] = [], 0

    @property
    def unanswered(self) -> bool:
        """Whether a claim is on its way of which nothing was heard."""
        return self._token is not None

    def claim(self, queues: Sequence[Queue], wanted: int, *, in_turn: bool) -> Answer:
        """Take *wanted* jobs at most, from the first queue first, or one from each in turn.

        Raises:
            redis.exceptions.RedisError: to be called again.
        """
        if self._token is None:
            self._token = uuid.uuid4().hex
            self._asked = list(queues), wanted
        queues, wanted = self._asked
        moment = now()
        status, found = self._script(
            keys=[f"tta_sync:claimed:{self._worker}", WORKERS_SUSPENDED, self._worker_key, *(q.key for q in queues)],
            args=[
                self._token,
                wanted,
                moment.timestamp(),
                utcformat(moment),
                self._worker,
                ABANDONED_AFTER,
                LOOK_AHEAD,
                int(in_turn),
                *(self._limits.get(queue.name, 0) for queue in queues),
                *(uuid.uuid4().hex for _ in range(wanted)),
            ],
        )
        self._token = None
        jobs = [
            Claimed(_text(found[i]), _text(found[i + 1]), queues[int(found[i + 2]) - 1], _fields(found[i + 3]))
            for i in range(0, len(found), 4)
        ]
        return Answer(jobs, status == b"suspended", status == b"held back")


def _text(value: bytes) -> str:
    return value.decode()


def _fields(flat: Any) -> dict[bytes, bytes]:
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def queues_of(registered: bytes) -> list[str]:
    """Read a worker's queues from its entry in WORKERS; none from one that is not ours."""
    try:
        names = json.loads(registered)
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
