# ruff: noqa: F821  # reveal_type is the checkers' own
"""Checked, never run: each reveal_type stands above the type that it must reveal."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from sqlalchemy.orm import Session, scoped_session

from tta_sync import WorkflowContext, caller_step, run_sync, step, thread_step
from tta_sync.primitives import (
    BulkheadPrimitive,
    CachePrimitive,
    ChaosPrimitive,
    CircuitBreakerPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    InstrumentedPrimitive,
    MapPrimitive,
    ParallelPrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    RouterPrimitive,
    SequentialPrimitive,
    StreamingPrimitive,
    SwitchPrimitive,
    TimeoutPrimitive,
    WorkflowPrimitive,
)
from tta_sync.sqlalchemy import session_step


@step
async def parse(data: str, context: WorkflowContext) -> int:
    return int(data)


@step
async def half(data: int) -> float:
    return data / 2


@step
def show(data: float) -> str:
    return str(data)


async def double(data: int) -> int:
    return data * 2


def words(data: str, context: WorkflowContext) -> list[str]:
    return data.split()


class Renamed:
    """Of another library, with other names for its parameters."""

    async def execute(self, input_data: int, ctx: Any) -> str:
        return str(input_data)


@step
def flag(data: str) -> bool:
    return bool(data)


@session_step
def save(session: Session, data: int, context: WorkflowContext) -> bytes:
    return bytes(data)


@session_step(name="find", idempotent=True)
def find(session: scoped_session[Session], data: bytes) -> list[str]:
    return []


class Upper(WorkflowPrimitive[str, str]):
    async def execute(self, data: str, context: WorkflowContext) -> str:
        return data.upper()


class Zero(WorkflowPrimitive[str, int]):
    async def execute(self, data: str, context: WorkflowContext) -> int:
        return 0


class Words(StreamingPrimitive[str, str]):
    async def stream(self, data: str, context: WorkflowContext) -> AsyncIterator[str]:
        yield data


class Measured(InstrumentedPrimitive[int, str]):
    async def _execute_impl(self, data: int, context: WorkflowContext) -> str:
        return str(data)


@step
async def pages(data: str) -> AsyncIterator[int]:
    return numbers()


async def numbers() -> AsyncIterator[int]:
    yield 1


class Foreign:
    async def execute(self, data: Any, context: Any) -> Any:
        return data


async def check(context: WorkflowContext) -> None:
    reveal_type(parse)  # LambdaPrimitive[str, int]
    reveal_type(half)  # LambdaPrimitive[int, float]
    reveal_type(show)  # LambdaPrimitive[float, str]
    reveal_type(parse >> half)  # SequentialPrimitive[str, float]
    reveal_type(Upper() >> parse >> half >> show)  # SequentialPrimitive[str, str]
    reveal_type(parse >> double)  # SequentialPrimitive[str, int]
    reveal_type(Upper() >> words)  # SequentialPrimitive[str, list[str]]
    reveal_type(words >> step(len))  # SequentialPrimitive[str, int]
    reveal_type(parse >> Foreign())  # SequentialPrimitive[str, Any]
    reveal_type(parse | Upper())  # ParallelPrimitive[str, int | str]
    reveal_type(half | double)  # ParallelPrimitive[int, float | int]
    reveal_type(parse | Upper() | words)  # ParallelPrimitive[str, int | str | list[str]]
    reveal_type(await (parse >> half).execute("4", context))  # float
    reveal_type(await (parse | Upper()).execute("4", context))  # list[int | str]
    reveal_type((parse >> half).run_sync("4"))  # float
    reveal_type(double >> half)  # SequentialPrimitive[int, float]
    reveal_type(words | Upper())  # ParallelPrimitive[str, list[str] | str]
    reveal_type(flag | (parse | Upper()))  # ParallelPrimitive[str, bool | int | str]
    reveal_type((parse | words) | (flag | Upper()))  # ParallelPrimitive[str, int | list[str] | bool | str]
    reveal_type(words | (parse | flag))  # ParallelPrimitive[str, list[str] | int | bool]
    reveal_type(run_sync(parse, "4"))  # int
    reveal_type(run_sync(parse >> half, "4", context, timeout=1.0))  # float
    reveal_type(run_sync(Renamed(), 4))  # Any
    reveal_type(RetryPrimitive(Renamed()) >> half)  # SequentialPrimitive[Any, float]
    reveal_type(Foreign() >> Upper())  # SequentialPrimitive[Any, str]
    reveal_type(partial(double) >> half)  # SequentialPrimitive[Any, float]
    reveal_type(SequentialPrimitive([parse, half]))  # SequentialPrimitive[Any, Any]
    reveal_type(MapPrimitive(half))  # MapPrimitive[int, float]
    reveal_type(MapPrimitive(double))  # MapPrimitive[Any, Any]
    reveal_type(ParallelPrimitive([parse, Upper()]))  # ParallelPrimitive[Any, Any]
    reveal_type(ConditionalPrimitive(bool, parse))  # ConditionalPrimitive[str, int]
    reveal_type(SwitchPrimitive(str, {"a": parse}))  # SwitchPrimitive[str, int]
    reveal_type(RouterPrimitive({"a": parse}, str) >> half)  # SequentialPrimitive[str, float]
    reveal_type(step(name="named")(double))  # LambdaPrimitive[int, int]
    reveal_type(caller_step(len) >> half)  # SequentialPrimitive[Sized, float]
    reveal_type(thread_step(idempotent=False)(words))  # ThreadPrimitive[str, list[str]]
    reveal_type(flag >> half)  # SequentialPrimitive[str, float]
    reveal_type(RetryPrimitive(parse, max_retries=1))  # RetryPrimitive[str, int]
    reveal_type(TimeoutPrimitive(RetryPrimitive(parse), 1.0) >> half)  # SequentialPrimitive[str, float]
    reveal_type(FallbackPrimitive(parse, Zero()))  # FallbackPrimitive[str, int]
    reveal_type(CircuitBreakerPrimitive(parse))  # CircuitBreakerPrimitive[str, int]
    reveal_type(BulkheadPrimitive(parse, 3))  # BulkheadPrimitive[str, int]
    reveal_type(RateLimitPrimitive(parse, rate=3))  # RateLimitPrimitive[str, int]
    reveal_type(HedgePrimitive(parse, delay=1.0))  # HedgePrimitive[str, int]
    reveal_type(ChaosPrimitive(parse))  # ChaosPrimitive[str, int]
    reveal_type(CachePrimitive(parse, ttl=60))  # CachePrimitive[str, int]
    reveal_type(CachePrimitive(ttl=60) >> parse)  # SequentialPrimitive[Any, int]
    reveal_type(RetryPrimitive(double))  # RetryPrimitive[Any, Any]
    reveal_type(Words() >> MapPrimitive(parse))  # SequentialPrimitive[str, list[int]]
    reveal_type(pages >> MapPrimitive(half))  # SequentialPrimitive[str, list[float]]
    reveal_type(parse >> Measured())  # SequentialPrimitive[str, str]
    reveal_type(await Words().execute("a b", context))  # list[str]
    reveal_type(TimeoutPrimitive(parse, 1.0, fallback=Zero()))  # TimeoutPrimitive[str, int]
    Words() >> half  # error
    reveal_type(save)  # SessionPrimitive[int, bytes]
    reveal_type(find)  # SessionPrimitive[bytes, list[str]]
    reveal_type(parse >> save >> find)  # SequentialPrimitive[str, list[str]]
    reveal_type(double >> save)  # SequentialPrimitive[int, bytes]
    reveal_type(RetryPrimitive(save))  # RetryPrimitive[int, bytes]
    reveal_type(save.run_sync(1))  # bytes
    Upper() >> save  # error
    save >> half  # error
    parse >> MapPrimitive(half)  # error
    parse >> parse  # error
    half >> Upper()  # error
    Upper() >> half  # error
    double >> Upper()  # error
    Upper() >> double  # error
    show | parse  # error
    show | words  # error
