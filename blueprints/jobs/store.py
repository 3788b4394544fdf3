"""Jobs as Redis holds them, read in one step. Nothing is unpickled: what is not JSON is left out."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from redis import Redis
from rq.job import Job, JobStatus
from rq.results import Result
from rq.utils import str_to_date

from tta_sync.rq.control import cancel_key
from tta_sync.rq.progress import FIELD, PROGRESS

TERMINAL = frozenset(
    status.value for status in (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)
)
"""The statuses after which nothing more happens, unless somebody enqueues the job again."""

MAX_RESULT = 64 * 1024
"""Bytes of JSON up to which a result is shown."""

MAX_ERROR = 300
"""Characters of an error that are shown."""

_MAX_META = 2**20
_MAX_EXC = 2**20  # compressed
_MAX_TEXT = 16 * 2**20
_TAIL = 64 * 1024  # characters at the end of a traceback in which its last line is looked for
_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")  # RQ's own rule, and an end

_LOOK = """
local fields = redis.call(
  'HMGET', KEYS[1], 'status', 'origin', 'enqueued_at', 'started_at', 'ended_at', 'meta', ARGV[1])
if not fields[1] then return nil end
if fields[6] and #fields[6] > tonumber(ARGV[2]) then fields[6] = '' end
for i = 1, 7 do fields[i] = fields[i] or '' end
local wanted = redis.call('GET', KEYS[3])
fields[8] = (wanted and (wanted == '1' or wanted == fields[3])) and '1' or ''
for i = 9, 11 do fields[i] = '' end
local latest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if latest then
  local entry = latest[2]
  for i = 1, #entry, 2 do
    if entry[i] == 'type' then fields[9] = entry[i + 1] end
    if entry[i] == 'return_value' and #entry[i + 1] <= tonumber(ARGV[3]) then fields[10] = entry[i + 1] end
    if entry[i] == 'exc_string' and #entry[i + 1] <= tonumber(ARGV[4]) then fields[11] = entry[i + 1] end
  end
end
return fields
"""


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job stands."""

    id: str
    status: str
    queue: str
    progress: dict[str, Any] | None
    enqueued_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    cancel_requested: bool
    result: Any
    error: str | None

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


def is_job_id(text: str) -> bool:
    """Say whether *text* can be a job's id; nothing else is worth asking Redis for."""
    return _ID.fullmatch(text) is not None


def read_job(client: Redis, job_id: str) -> JobState | None:
    """Return how a job stands, None where there is none.

    Raises:
        redis.exceptions.RedisError: Redis does not answer.
    """
    keys = Job.key_for(job_id), Result.get_key(job_id), cancel_key(job_id)
    most = MAX_RESULT * 4 // 3 + 4  # as base64
    found: Any = client.eval(_LOOK, 3, *keys, FIELD, _MAX_META, most, _MAX_EXC)
    if found is None:
        return None
    status, origin, enqueued, started, ended, meta, field, wanted, kind, value, error = found
    status = status.decode()
    finished = status == JobStatus.FINISHED and kind == b"1"
    return JobState(
        id=job_id,
        status=status,
        queue=origin.decode(errors="replace"),
        progress=_progress(meta, field),
        enqueued_at=_moment(enqueued),
        started_at=_moment(started),
        ended_at=_moment(ended) if status in TERMINAL else None,
        cancel_requested=bool(wanted) and status == JobStatus.STARTED,
        result=_result(value) if finished and value else None,
        error=_error(error) if error and status in (JobStatus.FAILED, JobStatus.STOPPED) else None,
    )


def _moment(raw: bytes) -> datetime | None:
    try:
        return str_to_date(raw) if raw else None
    except ValueError:
        return None


def _json(raw: bytes) -> Any:
    """Return what *raw* means as JSON, None where it is none that a browser reads."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        return json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _progress(meta: bytes, field: bytes) -> dict[str, Any] | None:
    held = _json(meta) if meta else None
    progress = held.get(PROGRESS) if isinstance(held, dict) else None
    if progress is None and field:
        progress = _json(field)
    if not isinstance(progress, dict):
        return None
    shown: dict[str, Any] = {}
    for name in ("done", "total"):
        number = progress.get(name)
        usable = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 2**63
        shown[name] = number if usable else None
    for name in ("message", "at"):
        text = progress.get(name)
        shown[name] = text[:500] if isinstance(text, str) else None
    return shown


def _result(raw: bytes) -> Any:
    try:
        return _json(base64.b64decode(raw, validate=True))
    except (binascii.Error, ValueError):
        return None


# ---- errors ----------------------------------------------------------------------------------------------------------

_SECRETS = (
    (re.compile(r"(\w://)[^\s/@]+@"), r"\1***@"),
    (
        re.compile(
            r"(?i)\b([\w-]*(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|credential|authorization)[\w-]*)"
            r"([\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|(?:(?:bearer|basic)\s+)?[^\s,;&)\]}]+)"
        ),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"\b(?:sk|pk|ghp|gho|xox[abp])[-_][\w-]{8,}"), "***"),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w.-]+"), "***"),
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def _error(raw: bytes) -> str | None:
    try:
        compressed = base64.b64decode(raw, validate=True)
    except (binascii.Error, ValueError):
        return None
    text = _tail_of(compressed)
    return None if text is None else describe(text)


def _tail_of(compressed: bytes) -> str | None:
    """Decompress, and keep the end of it; None where it is no such thing, or too much of it."""
    engine, tail, total = zlib.decompressobj(), b"", 0
    try:
        piece = engine.decompress(compressed, _TAIL)
        while piece:
            total += len(piece)
            if total > _MAX_TEXT:
                return None
            tail = (tail + piece)[-_TAIL:]
            piece = engine.decompress(engine.unconsumed_tail, _TAIL)
    except zlib.error:
        return None
    return tail.decode(errors="replace")


def describe(text: str) -> str | None:
    """Return the line of a traceback that names the error: no frames, no notes, nothing that looks like a secret."""
    lines = text.splitlines()
    begins = [
        number
        for number, line in enumerate(lines)
        if line in ("Traceback (most recent call last):", "  + Exception Group Traceback (most recent call last):")
    ]
    if begins:
        # What follows is frames, all of them indented, and then the error; after it notes may follow.
        group = lines[begins[-1]].startswith("  +")
        rest = (line.removeprefix("  | ") if group else line for line in lines[begins[-1] + 1 :])
        line = next((line for line in rest if line.strip() and not line.startswith(" ")), "")
    else:
        line = next((line for line in reversed(lines) if line.strip()), "")
    line = line.strip()
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return _UNPRINTABLE.sub("\ufffd", line)[:MAX_ERROR] or None
