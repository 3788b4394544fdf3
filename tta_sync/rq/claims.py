"""What AsyncWorker does to Redis that must happen at once or not at all, and what tells a dead worker from a slow one.

Keys of our own, beside RQ's:

``tta_sync:workers``            hash: the name of each AsyncWorker, and its queues
``tta_sync:worker:<name>``      its lease: which life of that name it is; gone when not renewed for the recovery time
``tta_sync:claimed:<name>``     its latest claim, in case the answer was lost on the way
``tta_sync:running:<key>``      sorted set: the executions that share a concurrency limit

A network that was cut delivers late what was said before the cut. So a claim without a lease is refused, and so is one
that is older than the latest: nobody would hear the answer.
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


def claimed_key(worker: str) -> str:
    return f"tta_sync:claimed:{worker}"


def running_key(key: str) -> str:
    return f"tta_sync:running:{key}"


# Pop, execution and started registry in one step: RQ's own worker has lost the job if it dies between the first and the
# last. The writes are those of rq.executions.Execution.create, Job.prepare_for_execution and Job.perform.
#
# A script that fails half-way keeps what it has done. So nothing is popped before all that may fail has been read (with
# pcall), and before one write that a full or read-only Redis refuses.
_CLAIM = """
local memo, suspended, worker_key, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local life, number, again, wanted, now, iso, worker, ttl, look_ahead, turn, ids =
  ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7], tonumber(ARGV[8]),
  tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11]
local queues = #KEYS - 4
local out = {}

if redis.call('GET', lease) ~= life then return {'no lease', out} end
local known = redis.call('GET', memo)
if known then
  known = cjson.decode(known)
  if known[1] == life and known[2] > number then return {'stale', out} end
  if known[1] == life and known[2] == number then
    for i = 3, #known, 3 do
      local id, execution = known[i], known[i + 1]
      local fields = redis.pcall('HGETALL', 'rq:job:' .. id)
      if redis.call('EXISTS', 'rq:execution:' .. id .. ':' .. execution) == 1 and #fields > 0 then
        out[#out + 1] = id; out[#out + 1] = execution; out[#out + 1] = known[i + 2]; out[#out + 1] = fields
      end
    end
    return {'again', out}
  end
end
if redis.call('EXISTS', suspended) == 1 then return {'suspended', out} end

local taken, held_back, began = {life, number}, false, false
local function room(name, limit)
  if limit == 0 then return true end
  local running = redis.pcall('ZCOUNT', 'rq:wip:' .. name, now, '+inf')
  return type(running) == 'number' and running < limit
end
local function shared_limit(id)
  local meta = redis.pcall('HGET', 'rq:job:' .. id, 'meta')
  if type(meta) == 'string' and string.find(meta, '"concurrency"', 1, true) then
    local ok, decoded = pcall(cjson.decode, meta)
    local ours = ok and type(decoded) == 'table' and decoded['tta_sync']
    local pair = type(ours) == 'table' and ours['concurrency']
    if type(pair) == 'table' and type(pair[1]) == 'string' and type(pair[2]) == 'number' then
      return 'tta_sync:running:' .. pair[1], pair[2]
    end
  end
end
local function full(running, at_most)
  local count = redis.pcall('ZCOUNT', running, now, '+inf')
  return type(count) ~= 'number' or count >= at_most
end

-- Take one from a queue; false when it has none to give.
local function take(index, queue_key, skipped)
  local name, limit = string.sub(queue_key, 10), tonumber(ARGV[11 + index])
  while true do
    if not room(name, limit) then held_back = true; return false end
    local id = redis.pcall('LINDEX', queue_key, 0)
    if type(id) ~= 'string' then return false end
    if not began then
      redis.call('SET', memo, cjson.encode(taken), 'EX', 3600)
      began = true
    end
    local running, at_most = shared_limit(id)
    if running and full(running, at_most) then
      redis.call('LPOP', queue_key)
      skipped[#skipped + 1] = id
      held_back = true
      if #skipped >= look_ahead then return false end
    else
      local job_key = 'rq:job:' .. id
      -- RQ itself cannot make, nor read, a job of another name.
      local fields = string.find(id, '^[%w_-]+$') and redis.pcall('HGETALL', job_key) or {}
      redis.call('LPOP', queue_key)
      if #fields > 0 then
        local execution = ids .. string.format('%08x', (#taken - 2) / 3)
        local execution_key, executions = 'rq:execution:' .. id .. ':' .. execution, 'rq:executions:' .. id
        redis.call('HSET', execution_key, 'id', execution, 'created_at', ARGV[5], 'last_heartbeat', ARGV[5],
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
      if take(index, KEYS[4 + index], skipped[index]) then
        wanted, quota = wanted - 1, quota - 1
      else
        empty[index] = true; left = left - 1
      end
    end
  end
end
for index = 1, queues do
  for i = #skipped[index], 1, -1 do redis.call('LPUSH', KEYS[4 + index], skipped[index][i]) end
end
if #out > 0 or again then redis.call('SET', memo, cjson.encode(taken), 'EX', 3600) end
if #out > 0 then
  redis.call('HSET', worker_key, 'state', 'busy', 'current_job', out[1], 'current_job_working_time', 0)
end
return {held_back and 'held back' or 'ok', out}
"""

# What rq.executions.Execution.heartbeat and Job.heartbeat write, but not to what is gone: that would make a ghost.
_HOLD = """
local alive = {}
local now, iso, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
for i = 4, #ARGV, 4 do
  local id, execution, queue, running = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local both = id .. ':' .. execution
  local execution_key, job_key, executions = 'rq:execution:' .. both, 'rq:job:' .. id, 'rq:executions:' .. id
  if redis.call('EXISTS', execution_key) == 1 then
    alive[#alive + 1] = 1
    redis.call('HSET', execution_key, 'last_heartbeat', now)
    redis.call('EXPIRE', execution_key, ttl)
    redis.call('ZADD', 'rq:wip:' .. queue, 'XX', now + ttl, both)
    redis.call('ZADD', executions, now + ttl + 60, execution)
    redis.call('EXPIRE', executions, ttl + 60)
    if running ~= '' then
      redis.call('ZADD', running, 'XX', now + ttl, both)
      redis.call('EXPIRE', running, ttl + 60)
    end
    if redis.call('EXISTS', job_key) == 1 then redis.call('HSET', job_key, 'last_heartbeat', iso) end
  else
    alive[#alive + 1] = 0
  end
end
return alive
"""


# Redis was restarted, and has forgotten its last second (AOF) or what its replica had not heard: what is queued again
# though it was claimed, and was not enqueued anew, is taken back.
_REASSERT = """
local answers = {}
local now, iso, ttl, worker = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
for i = 5, #ARGV, 5 do
  local id, execution, queue, running, enqueued_at = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local both = id .. ':' .. execution
  local execution_key, job_key, executions = 'rq:execution:' .. both, 'rq:job:' .. id, 'rq:executions:' .. id
  local answer = redis.call('EXISTS', execution_key)
  if answer == 0 then
    local known = redis.call('HMGET', job_key, 'status', 'enqueued_at')
    if known[1] == 'queued' and known[2] == enqueued_at and redis.call('LREM', 'rq:queue:' .. queue, 1, id) == 1 then
      answer = 2
      redis.call('HSET', execution_key, 'id', execution, 'created_at', now, 'last_heartbeat', now,
        'worker_name', worker)
      redis.call('EXPIRE', execution_key, ttl)
      redis.call('ZADD', executions, now + ttl + 60, execution)
      redis.call('EXPIRE', executions, ttl + 60)
      redis.call('ZADD', 'rq:wip:' .. queue, now + ttl, both)
      redis.call('HSET', job_key, 'status', 'started', 'worker_name', worker, 'started_at', iso, 'last_heartbeat', iso)
      redis.call('PERSIST', job_key)
      if running ~= '' then
        redis.call('ZADD', running, now + ttl, both)
        redis.call('EXPIRE', running, ttl + 60)
      end
    end
  end
  answers[#answers + 1] = answer
end
return answers
"""

MISSING, THERE, TAKEN_BACK = range(3)


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
    refused: bool = False
    """The worker's lease has run out: it must say that it lives, and claim again."""


class Claims:
    """Claims jobs for one worker, and holds them. One thread only.

    A claim whose answer was lost is repeated with the number that it had: it brings the same jobs, not others, but for
    those that were taken from this worker meanwhile.

    Args:
        life: what the worker's lease says; no two workers have the same, whatever their name.
    """

    def __init__(self, connection: Redis, worker: str, worker_key: str, life: str, limits: dict[str, int]) -> None:
        self._worker = worker
        self._worker_key = worker_key
        self._life = life
        self._limits = limits
        self._claim = connection.register_script(_CLAIM)
        self._hold = connection.register_script(_HOLD)
        self._reassert = connection.register_script(_REASSERT)
        self._number = 0
        self._asked: tuple[list[Queue], int] = [], 0
        self.unanswered = False
        """Whether a claim is on its way of which nothing was heard."""

    def claim(self, queues: Sequence[Queue], wanted: int, *, in_turn: bool) -> Answer:
        """Take *wanted* jobs at most, from the first queue first, or one from each in turn.

        Raises:
            redis.exceptions.RedisError: to be called again.
        """
        again, self.unanswered = self.unanswered, True
        if not again:
            self._number += 1
            self._asked = list(queues), wanted
        queues, wanted = self._asked
        moment = now()
        status, found = self._claim(
            keys=[
                claimed_key(self._worker),
                WORKERS_SUSPENDED,
                self._worker_key,
                lease_key(self._worker),
                *(queue.key for queue in queues),
            ],
            args=[
                self._life,
                self._number,
                int(again),
                wanted,
                moment.timestamp(),
                utcformat(moment),
                self._worker,
                ABANDONED_AFTER,
                LOOK_AHEAD,
                int(in_turn),
                uuid.uuid4().hex[:24],
                *(self._limits.get(queue.name, 0) for queue in queues),
            ],
        )
        if status == b"no lease":
            return Answer([], refused=True)  # an earlier try may have been accepted: it stays unanswered
        self.unanswered = False
        jobs = [
            Claimed(_text(found[i]), _text(found[i + 1]), queues[int(found[i + 2]) - 1], _fields(found[i + 3]))
            for i in range(0, len(found), 4)
        ]
        return Answer(jobs, status == b"suspended", status == b"held back")

    def hold(self, held: Sequence[tuple[str, str, str, str | None]]) -> list[bool]:
        """Say that these live: job id, execution id, queue, key of a shared limit. Return which are still ours.

        Raises:
            redis.exceptions.RedisError: to be called again.
        """
        moment = now()
        flat = [part or "" for entry in held for part in entry]
        alive: Any = self._hold(args=[moment.timestamp(), utcformat(moment), ABANDONED_AFTER, *flat])
        return [bool(one) for one in alive]

    def reassert(self, held: Sequence[tuple[str, str, str, str | None, str]]) -> list[int]:
        """Take back what a Redis that was restarted has queued again; what else there is stays as it is.

        Job id, execution id, queue, key of a shared limit, and when it was enqueued. Return of each whether it is
        MISSING, THERE or TAKEN_BACK.

        Raises:
            redis.exceptions.RedisError: to be called again.
        """
        moment = now()
        flat = [part or "" for entry in held for part in entry]
        answers: Any = self._reassert(
            args=[moment.timestamp(), utcformat(moment), ABANDONED_AFTER, self._worker, *flat]
        )
        return [int(one) for one in answers]


def _text(value: bytes) -> str:
    return value.decode()


def _fields(flat: Any) -> dict[bytes, bytes]:
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def queues_of(registered: bytes | str) -> list[str]:
    """Read a worker's queues from its entry in WORKERS; none from one that is not ours."""
    try:
        names = json.loads(registered)
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
