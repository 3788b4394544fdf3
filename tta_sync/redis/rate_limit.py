"""A rate limit that processes share."""

from __future__ import annotations

from typing import Any

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.primitives.performance.in_redis import Script
from tta_sync.primitives.performance.keys import SCHEMA, prefix as key_of
from tta_sync.primitives.performance.wire import Oversized, RedisDown, Refused
from tta_sync.primitives.recovery.rate_limit import Verdict, verdict
from tta_sync.redis.address import address, unreachable

# The same steps as tta_sync.primitives.recovery.rate_limit.decide, in microseconds: a double has room for those since
# 1970, with a quarter of one to spare, but not for a fraction of a second that is any finer.
_TAKE = Script("""
-- KEYS: the limit; ARGV: microseconds between two calls, microseconds of tolerance, the time ("" for the server's)
local now = tonumber(ARGV[3])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
local arrival = tonumber(redis.call('GET', KEYS[1]) or now)
local due = math.max(arrival, now)
local wait = due - now - tonumber(ARGV[2])
if wait > 1 then return {string.format('%.3f', wait), string.format('%.3f', due - now)} end
local after = due + tonumber(ARGV[1])
redis.call('SET', KEYS[1], string.format('%.3f', after), 'PX', math.ceil((after - now) / 1000) + 1000)
return {'0', string.format('%.3f', after - now)}
""")


class RedisRateStore:
    """Let the processes that use one Redis share their rate limits: ``RateLimitPrimitive(..., store=...)``.

    GCRA on the server's clock, so that the clocks of the machines do not matter; one round trip. A call on a clock of
    its own, as in tests, is judged by that clock.

    Args:
        source: a URL, a ``redis.Redis`` or ``redis.asyncio.Redis`` client, of which address and credentials count, or
            a ``RedisBackend``.
        prefix: what every key begins with; the back end's, or ``tta:``.

    Source: GCRA, ITU-T I.371.
    """

    def __init__(self, source: Any, prefix: str | None = None) -> None:
        self._endpoint, self._prefix = address(source, prefix)

    async def take(self, limiter: str, key: str, rate: float, burst: int, context: WorkflowContext) -> float:
        """Take a token and return 0.0, or take none and return the seconds until there will be one.

        Raises:
            ConnectionError: Redis did not answer in a tenth of a second, or a tenth of what the call has left.
        """
        return (await self.judge(limiter, key, rate, burst, context)).wait

    async def judge(self, limiter: str, key: str, rate: float, burst: int, context: WorkflowContext) -> Verdict:
        """Do what :meth:`take` does, and say how many calls may follow.

        Raises:
            ConnectionError: as :meth:`take`.
        """
        clock = context.clock
        interval = 1e6 / rate
        now = "" if clock is SYSTEM_CLOCK else repr(clock.time() * 1e6)
        name = f"{self._prefix}{SCHEMA}:#:limit:{key_of(limiter, key)}"
        cut = cut_off(context)
        limit = None if cut is None else max(0.1 * (cut - clock.monotonic()), 0.001)
        try:
            wait, ahead = await _TAKE.run(
                self._endpoint.link, (name,), repr(interval), repr((burst - 1) * interval), now, limit=limit
            )
        except (RedisDown, Refused, Oversized) as error:
            raise unreachable(self._endpoint, error) from None
        return verdict(float(wait) / 1e6, float(ahead) / 1e6, interval / 1e6, burst)
