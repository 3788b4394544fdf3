"""Rate limits for views: GCRA in Redis where the application has one, in this process's memory where it has none."""

from __future__ import annotations

import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

from flask import after_this_request, current_app, request
from werkzeug.wrappers import Response

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import (
    ConfigurationError,
    LoopUnavailableError,
    RateLimitedError,
    SaturatedError,
    WorkflowError,
)
from tta_sync.facade import call_sync
from tta_sync.flask.problems import Problem
from tta_sync.flask.requests import RequestInfo
from tta_sync.flask.storage import of_application, redis_url, supplier
from tta_sync.primitives.performance.in_redis import seam
from tta_sync.primitives.performance.keys import prefix as bounded
from tta_sync.primitives.performance.stores import Guard
from tta_sync.primitives.recovery.rate_limit import MAX_KEYS, Verdict, decide, expected_workers, verdict

Fail = Literal["local", "open", "closed"]
_MAX_INTEGER = 999_999_999_999_999  # of RFC 9651


class LocalLimits(Guard):
    """The limits of this process; beyond 100,000 keys the longest unused is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: OrderedDict[tuple[str, str], float] = OrderedDict()  # guarded by lock; longest unused first

    def judge(self, limiter: str, key: str, interval: float, burst: int, now: float) -> Verdict:
        """Take a token, or take none and say when there will be one."""
        name = limiter, bounded(key)
        with self.lock:
            arrival = self._arrivals.pop(name, -math.inf)
            wait, after = decide(arrival, now, interval, (burst - 1) * interval)
            kept = self._arrivals[name] = arrival if wait else after
            while len(self._arrivals) > MAX_KEYS:
                self._arrivals.popitem(last=False)
        return verdict(wait, kept - now, interval, burst)


class RateLimit:
    """One limit of one view."""

    def __init__(
        self, rate: float, burst: int, key: Any, name: str | None, fail: Fail, workers: int | None, storage: Any
    ) -> None:
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < math.inf:
            raise ConfigurationError(f"rate is a positive number of requests per second, not {rate!r}")
        for option, count in (("burst", burst), ("workers", 1 if workers is None else workers)):
            if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MAX_INTEGER:
                raise ConfigurationError(f"{option} is a whole number, 1 or more, not {count!r}")
        if fail not in ("local", "open", "closed"):
            raise ConfigurationError(f'fail is "local", "open" or "closed", not {fail!r}')
        self._rate, self._burst, self._fail, self._storage, self._name = float(rate), burst, fail, storage, name
        self._key: Callable[[], str] = (lambda: "") if key is None else supplier("key", key)
        self._workers = workers or expected_workers()
        self._number = 1

    def wrap(self, view: Callable[..., Any], answer: Callable[[Exception], Any]) -> Callable[..., Any]:
        """Return *view* behind this limit; *answer* makes a response of a refusal."""
        self._number += getattr(view, "tta_limits", 0)

        if inspect.iscoroutinefunction(view):

            @functools.wraps(view)
            async def run(*args: Any, **url: Any) -> Any:
                try:
                    await self._check_on_loop()
                except Exception as error:
                    return answer(error)
                return await view(*args, **url)
        else:

            @functools.wraps(view)
            def run(*args: Any, **url: Any) -> Any:
                try:
                    self._check()
                except Exception as error:
                    return answer(error)
                return view(*args, **url)

        run.tta_limits = self._number  # type: ignore[attr-defined]  # survives other decorators' functools.wraps
        return run

    # ---- asking

    def _check(self) -> None:
        """Take a token for the current request.

        Raises:
            RateLimitedError: there is none.
            Problem: 503, the store is down and the limit fails closed.
        """
        name, key, store, context = self._question()
        if store is None:
            self._tell(name, self._locally(name, key, context, 1), context)
            return
        try:
            told = call_sync(store.judge, f"flask:{name}", key, self._rate, self._burst, context)
        except (LoopUnavailableError, SaturatedError):
            told = self._without(name, key, context)
        except WorkflowError:  # the request's deadline: a TimeoutError, but not the store's
            raise
        except OSError:
            told = self._without(name, key, context)
        self._tell(name, told, context)

    async def _check_on_loop(self) -> None:
        """Do what :meth:`_check` does, on the loop."""
        name, key, store, context = self._question()
        if store is None:
            self._tell(name, self._locally(name, key, context, 1), context)
            return
        try:
            told = await store.judge(f"flask:{name}", key, self._rate, self._burst, context)
        except OSError:
            told = self._without(name, key, context)
        self._tell(name, told, context)

    def _question(self) -> tuple[str, str, Any, WorkflowContext]:
        storage = of_application()
        source = redis_url() if self._storage is None else self._storage
        store = None if source is None else storage.get(seam().RedisRateStore, source)
        name = self._name or f"{current_app.name}.{request.endpoint}"
        if self._name is None and self._number > 1:
            name += f"-{self._number}"
        return name, self._key(), store, RequestInfo.current().context

    def _locally(self, name: str, key: str, context: WorkflowContext, workers: int) -> Verdict:
        limits: LocalLimits = of_application().get(LocalLimits)
        return limits.judge(name, key, workers / self._rate, self._burst, context.clock.monotonic())

    def _without(self, name: str, key: str, context: WorkflowContext) -> Verdict | None:
        """Decide while the store is down."""
        if self._fail == "local":
            return self._locally(name, key, context, self._workers)
        if self._fail == "open":
            return None
        raise Problem(503, "redis_unavailable", headers={"Retry-After": "1"})

    # ---- telling

    def _tell(self, name: str, told: Verdict | None, context: WorkflowContext) -> None:
        """Put the verdict into the response's headers, whoever makes the response.

        Raises:
            RateLimitedError: the verdict is no.
        """
        if told is None:
            return
        now = context.clock.time()
        after_this_request(functools.partial(self._add_headers, name, told, now))
        if told.wait:
            if events.bus.emit is not None:
                events.bus.emit(
                    events.CallRejected(
                        step=name, correlation_id=context.correlation_id, by="rate limit", retry_after=told.wait
                    )
                )
            raise RateLimitedError(name, told.wait)

    def _add_headers(self, name: str, told: Verdict, now: float, response: Response) -> Response:
        # Clients need not know how the application is called inside.
        label = _structured(name if self._name else name.removeprefix(f"{current_app.name}."))
        headers, reset = response.headers, _whole(told.reset)
        for field, item in (
            ("RateLimit-Policy", f"{label};q={self._burst};w={_whole(self._burst / self._rate)}"),
            ("RateLimit", f"{label};r={told.remaining};t={reset}"),
        ):
            others = headers.get(field)
            headers[field] = item if others is None else f"{others}, {item}"
        known = headers.get("X-RateLimit-Remaining", type=int)
        if known is None or told.remaining < known:  # of several limits the one that will be reached first
            for style, moment in (("RateLimit", reset), ("X-RateLimit", math.ceil(now) + reset)):
                headers[f"{style}-Limit"] = str(self._burst)
                headers[f"{style}-Remaining"] = str(told.remaining)
                headers[f"{style}-Reset"] = str(moment)
        return response


def _whole(seconds: float) -> int:
    """Return *seconds* as headers have them: whole, and never 0, which would be an invitation to a busy loop."""
    return max(1, math.ceil(min(seconds, _MAX_INTEGER)))


def _structured(text: str) -> str:
    """Return *text* as a string of RFC 9651, which has printable ASCII only."""
    plain = "".join(character if " " <= character <= "~" else "_" for character in text[:200])
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
