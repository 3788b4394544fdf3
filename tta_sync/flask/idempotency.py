"""Views that act once per Idempotency-Key: the first response is kept and replayed to whoever repeats the request."""

from __future__ import annotations

import asyncio
import base64
import functools
import inspect
import itertools
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from flask import current_app, request, session
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.exceptions import (
    ConfigurationError,
    IdempotencyConflictError,
    IdempotencyMismatchError,
    SaturatedError,
    TTASyncError,
    WorkflowError,
)
from tta_sync.facade import call_sync
from tta_sync.flask.body import read_body
from tta_sync.flask.problems import Problem
from tta_sync.flask.requests import RequestInfo
from tta_sync.flask.storage import of_application, redis_url, remote_address, supplier
from tta_sync.primitives.performance.in_redis import from_sync, seam
from tta_sync.primitives.performance.stores import Guard

Fail = Literal["closed", "open"]

_log = logging.getLogger("tta_sync.flask")

REPLAYED = "Idempotent-Replayed"
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]{1,255}")  # visible ASCII but for what a list or a string could be made of
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"')  # a string of RFC 9651
# Others say something about this moment or this connection, or are secrets that nobody should find in Redis.
_NOT_KEPT = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "content-length", "date", "server", "x-request-id"),
        *("set-cookie", "idempotent-replayed"),
    }
)
_TRY_AGAIN = frozenset({401, 403, 408, 409, 423, 425, 429})  # nothing was done yet, and may be at the next attempt
_MAX_HEADERS = 16_384  # bytes of one kept response
_MAX_RECORDS, _MAX_MEMORY = 10_000, 64 * 2**20  # of what this process keeps where there is no Redis
_LONGEST_WAIT = 30.0
_RESERVE = 0.5  # seconds of a request's deadline in which it can still be told that it waited in vain
_FINISH_WITHIN = 5.0  # seconds for keeping a response, whatever is left of the request's deadline
_PATIENCE = (0.01, 0.25)  # seconds between looks at another request's work: first, and at most


def parse_key(text: str) -> str | None:
    """Return the key that an Idempotency-Key header holds, quoted (as the draft has it) or bare; None if malformed."""
    text = text.strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        return re.sub(r"\\(.)", r"\1", quoted[1])
    return text if _BARE.fullmatch(text) else None


def client() -> tuple[str | None, ...]:
    """Return who sends the request: tenant, credentials and session; the address where there is none of these.

    Of a session the user counts, as Flask-Login and most others write it, and else the cookie as it is.
    """
    cookie = request.cookies.get(current_app.config["SESSION_COOKIE_NAME"])
    if cookie is not None:
        user = session.get("_user_id", session.get("user_id"))
        cookie = cookie if user is None else f"user {user}"
    found = (
        RequestInfo.current().context.tenant,
        request.headers.get("Authorization"),
        request.headers.get("X-Api-Key"),
        cookie,
    )
    return found if any(part is not None for part in found) else ("address", remote_address())


# ---- without Redis ---------------------------------------------------------------------------------------------------


class Record:
    """What is known of one key; guarded by the lock of the store."""

    __slots__ = ("done", "expires_at", "mark", "result", "size")

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.done = threading.Event()  # its result is there, or it was abandoned
        self.result: Any = None
        self.size = 0
        self.expires_at = float("inf")


class LocalClaim(NamedTuple):
    """The right to do the work of one key in this process."""

    store: LocalKeys
    name: str
    record: Record


class Kept(NamedTuple):
    """The result of an earlier request; None where it was not kept."""

    result: Any


class LocalKeys(Guard):
    """The keys of this process: at most 10,000 results and 64 MiB, the oldest go first."""

    def __init__(self) -> None:
        super().__init__()
        self._records: OrderedDict[str, Record] = OrderedDict()  # guarded by lock; the oldest first
        self._bytes = 0

    def begin(self, name: str, mark: str, now: float) -> LocalClaim | Kept | Record:
        """Return the right to do the work, or the earlier result, or the record of whoever is at it.

        Raises:
            IdempotencyMismatchError: the key was used for something else.
        """
        with self.lock:
            self._forget(lambda record: record.expires_at <= now, 2)
            record = self._records.get(name)
            if record is None or record.expires_at <= now:
                if record is not None:
                    self._drop(name)
                record = self._records[name] = Record(mark)
                return LocalClaim(self, name, record)
            if record.mark != mark:
                raise IdempotencyMismatchError(name)
            return Kept(record.result) if record.done.is_set() else record

    def finish(self, claim: LocalClaim, result: Any, size: int, expires_at: float) -> None:
        """Keep *result* for whoever asks again."""
        record = claim.record
        with self.lock:
            record.result, record.size, record.expires_at = result, size, expires_at
            self._bytes += size
            record.done.set()
            while len(self._records) > _MAX_RECORDS or self._bytes > _MAX_MEMORY:
                if not self._forget(lambda old: old is not record, len(self._records)):
                    break

    def abandon(self, claim: LocalClaim) -> None:
        """Let the next request with the key do the work."""
        with self.lock:
            self._drop(claim.name)
            claim.record.done.set()

    def _forget(self, wanted: Callable[[Record], bool], looks: int) -> bool:
        """Drop the oldest finished record that is *wanted*, among the first *looks*."""
        for name, record in itertools.islice(self._records.items(), looks):
            if record.done.is_set() and wanted(record):
                self._drop(name)
                return True
        return False

    def _drop(self, name: str) -> None:
        self._bytes -= self._records.pop(name).size


# ---- the view --------------------------------------------------------------------------------------------------------


class _Question(NamedTuple):
    """A request that has a key."""

    key: str  # the client's
    name: str  # the key as one client's for one view
    mark: str  # what the request asks for
    patience: float  # seconds for which it may wait


class Idempotency:
    """What one view does about Idempotency-Key."""

    def __init__(
        self,
        ttl: float,
        wait: bool,
        required: bool,
        caller: Any,
        name: str | None,
        fail: Fail,
        max_bytes: int,
        storage: Any,
    ) -> None:
        if not isinstance(ttl, (int, float)) or isinstance(ttl, bool) or not 0.001 <= ttl < 1e9:
            raise ConfigurationError(f"ttl={ttl!r} is how long a response is kept: give a number of seconds")
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ConfigurationError(f"max_bytes is a whole number, 1 or more, not {max_bytes!r}")
        if fail not in ("closed", "open"):
            raise ConfigurationError(f'fail is "closed" or "open", not {fail!r}')
        self._ttl, self._wait, self._required, self._name = float(ttl), bool(wait), bool(required), name
        self._fail, self._max_bytes, self._storage = fail, max_bytes, storage
        self._caller = supplier("caller", client if caller is None else caller)

    def wrap(self, view: Callable[..., Any], answer: Callable[[Exception], Any]) -> Callable[..., Any]:
        """Return *view* made idempotent; *answer* makes a response of a refusal."""
        if inspect.iscoroutinefunction(view):

            @functools.wraps(view)
            async def run(*args: Any, **url: Any) -> Any:
                try:
                    claim = await self._begin_on_loop()
                    if isinstance(claim, Response):
                        return claim
                except Exception as error:
                    return answer(error)
                if claim is None:
                    return await view(*args, **url)
                try:
                    response = _response(await view(*args, **url))
                    kept = self._kept(response)
                except BaseException:
                    self._abandon_on_loop(claim)
                    raise
                if _to_be_kept(response):
                    await self._finish_on_loop(claim, kept)
                else:
                    self._abandon_on_loop(claim)
                return response
        else:

            @functools.wraps(view)
            def run(*args: Any, **url: Any) -> Any:
                try:
                    claim = self._begin()
                    if isinstance(claim, Response):
                        return claim
                except Exception as error:
                    return answer(error)
                if claim is None:
                    return view(*args, **url)
                try:
                    response = _response(view(*args, **url))
                    kept = self._kept(response)
                except BaseException:
                    self._abandon(claim)
                    raise
                if _to_be_kept(response):
                    self._finish(claim, kept)
                else:
                    self._abandon(claim)
                return response

        return run

    # ---- before the view

    def _begin(self) -> Any:
        """Return a claim, or the earlier response, or None where the view is to run without more ado.

        Raises:
            Problem: 400, the key is missing or malformed.
            IdempotencyConflictError, IdempotencyMismatchError: another request has the key.
            ConnectionError: Redis did not answer, and the view fails closed.
        """
        question = self._question()
        if question is None:
            return None
        store = self._store()
        try:
            if store is None:
                return self._begin_locally(question)
            return self._found(
                call_sync(store.begin, question.name, question.mark, wait=self._wait, max_wait=question.patience)
            )
        except (WorkflowError, OSError) as error:
            self._refuse(question, error)
            return None

    async def _begin_on_loop(self) -> Any:
        """Do what :meth:`_begin` does, on the loop."""
        question = self._question()
        if question is None:
            return None
        store = self._store()
        try:
            if store is not None:
                return self._found(
                    await store.begin(question.name, question.mark, wait=self._wait, max_wait=question.patience)
                )
            give_up, pause = SYSTEM_CLOCK.monotonic() + question.patience, _PATIENCE[0]
            while True:
                found = _keys().begin(question.name, question.mark, SYSTEM_CLOCK.monotonic())
                if not isinstance(found, Record):
                    return self._found(found)
                if not self._wait or SYSTEM_CLOCK.monotonic() >= give_up:
                    raise IdempotencyConflictError(question.key)
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _PATIENCE[1])
        except (WorkflowError, OSError) as error:
            self._refuse(question, error)
            return None

    def _begin_locally(self, question: _Question) -> Any:
        give_up = SYSTEM_CLOCK.monotonic() + question.patience
        while True:
            now = SYSTEM_CLOCK.monotonic()
            found = _keys().begin(question.name, question.mark, now)
            if not isinstance(found, Record):
                return self._found(found)
            if not self._wait or now >= give_up:
                raise IdempotencyConflictError(question.key)
            found.done.wait(give_up - now)

    def _question(self) -> _Question | None:
        given = request.headers.get("Idempotency-Key")
        if given is None:
            if self._required:
                raise Problem(
                    400, "idempotency_key_missing", "Send an Idempotency-Key: a string that no other request has."
                )
            return None
        key = parse_key(given)
        if key is None:
            raise Problem(
                400, "idempotency_key_malformed", "The Idempotency-Key is one string of 1 to 255 printable characters."
            )
        mark = blake2b(f"{request.method} {request.full_path}\n".encode(errors="replace"), digest_size=16)
        mark.update(read_body(current_app.config["TTA_MAX_BODY"]))
        scope = self._name or f"{current_app.name}.{request.endpoint}"
        name = blake2b(repr((scope, self._caller(), key)).encode(), digest_size=16).hexdigest()
        deadline = RequestInfo.current().deadline
        patience = _LONGEST_WAIT if deadline is None else min(_LONGEST_WAIT, deadline.remaining() - _RESERVE)
        return _Question(key, f"flask:{scope}:{name}", mark.hexdigest(), max(0.0, patience))

    def _store(self) -> Any:
        source = redis_url() if self._storage is None else self._storage
        return None if source is None else of_application().get(self._make_store, source)

    def _make_store(self, source: Any) -> Any:
        # What JSON makes of a body is at most six times as long: one escape for each of its bytes.
        return seam().IdempotencyStore(source, self._ttl, max_bytes=6 * (self._max_bytes + _MAX_HEADERS) + 1000)

    def _found(self, found: Any) -> Any:
        """Return a claim as it is, and of an earlier result the response that it makes."""
        if not hasattr(found, "result"):
            return found
        if found.result is None:
            raise Problem(
                409,
                "idempotency_not_kept",
                "The request was carried out, but its response was not kept: it was too large, or a stream.",
            )
        status, headers, kind, text = found.result
        body = text.encode() if kind == "text" else base64.b64decode(text)
        response = current_app.response_class(body, status=status)
        response.headers.clear()
        response.headers.extend([(name, value) for name, value in headers])
        response.headers[REPLAYED] = "true"
        return response

    def _refuse(self, question: _Question, error: Exception) -> None:
        """Raise what the client should see, to whom the key is its own; return where the view may run all the same.

        Raises:
            WorkflowError, OSError: *error*, or the like of it.
        """
        if isinstance(error, (IdempotencyConflictError, IdempotencyMismatchError)):
            raise type(error)(question.key) from None
        if isinstance(error, WorkflowError) or self._fail == "closed":
            raise error
        _log.warning("%s runs without its idempotency key: %s", request.endpoint, error)

    # ---- after the view

    def _kept(self, response: Response) -> list[Any] | None:
        """Return what is kept of *response*; None if it is too large, or not there yet."""
        if response.is_streamed or response.direct_passthrough:
            return None
        headers = [[name, value] for name, value in response.headers if name.lower() not in _NOT_KEPT]
        body = response.get_data()
        if len(body) > self._max_bytes or sum(len(name) + len(value) for name, value in headers) > _MAX_HEADERS:
            return None
        try:
            return [response.status, headers, "text", body.decode()]
        except UnicodeDecodeError:
            return [response.status, headers, "base64", base64.b64encode(body).decode()]

    def _finish(self, claim: Any, kept: list[Any] | None) -> None:
        """Keep a response; it is the client's, whatever happens to the store meanwhile."""
        if isinstance(claim, LocalClaim):
            self._finish_locally(claim, kept)
            return
        give_up = time.monotonic() + _FINISH_WITHIN
        try:
            while True:
                try:
                    # Not call_sync: the work was done, also where the request's deadline has passed since.
                    from_sync(lambda: claim.finish(kept), "an idempotent view", _REMEDY, timeout=_FINISH_WITHIN)
                    return
                except SaturatedError:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(_PATIENCE[0])
        except (TTASyncError, OSError) as error:
            _tell(error)

    async def _finish_on_loop(self, claim: Any, kept: list[Any] | None) -> None:
        if isinstance(claim, LocalClaim):
            self._finish_locally(claim, kept)
            return
        # Shielded: a request that is cut off now has done its work all the same.
        finishing = asyncio.ensure_future(claim.finish(kept))
        try:
            await asyncio.shield(finishing)
        except (TTASyncError, OSError) as error:
            _tell(error)
        except asyncio.CancelledError:
            finishing.add_done_callback(_tell_of)
            raise

    def _finish_locally(self, claim: LocalClaim, kept: list[Any] | None) -> None:
        size = 500 if kept is None else 500 + len(kept[3]) + sum(len(name) + len(value) for name, value in kept[1])
        claim.store.finish(claim, kept, size, SYSTEM_CLOCK.monotonic() + self._ttl)

    def _abandon(self, claim: Any) -> None:
        if isinstance(claim, LocalClaim):
            claim.store.abandon(claim)
            return
        try:
            from_sync(claim.abandon, "an idempotent view", _REMEDY, timeout=1.0)
        except (TTASyncError, OSError):
            pass  # it runs out by itself

    def _abandon_on_loop(self, claim: Any) -> None:
        if isinstance(claim, LocalClaim):
            claim.store.abandon(claim)
        else:
            claim.give_up()


_REMEDY = "async def in front of the view"


def _response(answer: Any) -> Response:
    """Return what Flask would make of a view's *answer*; a problem, which is an error, with its body at hand."""
    return current_app.make_response(answer.get_response() if isinstance(answer, HTTPException) else answer)


def _to_be_kept(response: Response) -> bool:
    return response.status_code < 500 and response.status_code not in _TRY_AGAIN


def _tell(error: BaseException) -> None:
    """Leave a trace of a response that could not be kept: the next request with its key will do the work again."""
    _log.warning(
        "the response of %s was not kept for its idempotency key, correlation id %s: %s",
        request.endpoint,
        RequestInfo.current().id,
        error,
    )


def _tell_of(finishing: asyncio.Future[None]) -> None:
    error = None if finishing.cancelled() else finishing.exception()
    if error is not None:
        _log.warning("a response was not kept for its idempotency key: %s", error)


def _keys() -> LocalKeys:
    return of_application().get(_local_keys)  # type: ignore[no-any-return]  # that is what it makes


def _local_keys() -> LocalKeys:
    if not (current_app.testing or current_app.debug):
        _log.warning("idempotency keys are kept in this process only: several need TTA_REDIS_URL")
    return LocalKeys()
