"""Steps that yield."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tta_sync import iterate_sync
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.primitives.streaming import StreamingPrimitive


class Words(StreamingPrimitive[str, str]):
    async def stream(self, data: str, context: WorkflowContext) -> AsyncIterator[str]:
        for word in data.split():
            context.state["last"] = word
            yield word


class ContextFirst(StreamingPrimitive[str, str]):
    def __init__(self) -> None:
        pass

    async def stream(self, context: WorkflowContext, data: str) -> AsyncIterator[str]:  # type: ignore[override]
        assert isinstance(context, WorkflowContext)
        for word in data.split():
            yield word


@pytest.mark.parametrize("kind", [Words, ContextFirst])
def test_execute_collects_the_items(kind: type[StreamingPrimitive[str, str]]) -> None:
    """In a workflow the step's result is the list of its items, whichever order ``stream`` takes its arguments in."""
    flow: WorkflowPrimitive[Any, Any] = kind() >> len
    assert asyncio.run(kind().execute("a b c", WorkflowContext())) == ["a", "b", "c"]
    assert asyncio.run(flow.execute("a b c", WorkflowContext())) == 3


@pytest.mark.parametrize("kind", [Words, ContextFirst])
def test_stream_is_open_to_async_for(kind: type[StreamingPrimitive[str, str]]) -> None:
    """On the loop the items come one by one, in either order of the arguments."""

    async def main() -> list[str]:
        context = WorkflowContext()
        return [word async for word in kind().stream("a b", context)]

    assert asyncio.run(main()) == ["a", "b"]


def test_subclass_of_a_streaming_step_inherits_its_stream() -> None:
    """What a subclass does not write again stays as it was."""

    class Named(ContextFirst):
        name = "named"

    assert asyncio.run(Named().execute("a b", WorkflowContext())) == ["a", "b"]


@pytest.mark.parametrize("kind", [Words, ContextFirst])
@pytest.mark.parametrize(
    "call",
    [
        lambda step, context: step.stream("a b", context),
        lambda step, context: step.stream(context, "a b"),
        lambda step, context: step.stream("a b"),
        lambda step, context: step.stream(data="a b", context=context),
        lambda step, context: step.stream(context, input_data="a b"),
        lambda step, context: step.stream("a b", context=context),
    ],
)
def test_stream_takes_every_spelling_of_a_call(call: Any, kind: type[StreamingPrimitive[str, str]]) -> None:
    """Whichever order the class writes, callers may write either, and leave out the context."""

    async def main() -> list[str]:
        return [word async for word in call(kind(), WorkflowContext())]

    assert asyncio.run(main()) == ["a", "b"]


def test_stream_keeps_arguments_of_its_own() -> None:
    """What it takes beside data and context reaches it as it is given, and so does a name of its own for them."""

    class Chunks(StreamingPrimitive[str, str]):
        async def stream(self, text: str, context: WorkflowContext, size: int = 1) -> AsyncIterator[str]:  # type: ignore[override]
            for start in range(0, len(text), size):
                yield text[start : start + size]

    async def main(*given: Any, **named: Any) -> list[str]:
        return [chunk async for chunk in Chunks().stream(*given, **named)]

    context = WorkflowContext()
    assert asyncio.run(main("abcd", context, 2)) == ["ab", "cd"]
    assert asyncio.run(main("abcd", context, size=3)) == ["abc", "d"]
    assert asyncio.run(main(text="ab", context=context)) == ["a", "b"]
    assert asyncio.run(main(context, "ab")) == ["a", "b"]


def test_stream_of_a_class_that_is_made_twice_is_adapted_once() -> None:
    """``dataclass(slots=True)`` makes the class again from its parts."""

    @dataclasses.dataclass(slots=True)
    class Twice(StreamingPrimitive[str, str]):
        times: int = 2

        async def stream(self, context: WorkflowContext, data: str) -> AsyncIterator[str]:  # type: ignore[override]
            for _ in range(self.times):
                yield data

    assert Twice.stream.__wrapped__.__code__.co_name == "stream"  # type: ignore[attr-defined]
    assert not hasattr(Twice.stream.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]
    assert asyncio.run(Twice().execute("a", WorkflowContext())) == ["a", "a"]


@pytest.mark.parametrize("kind", [Words, ContextFirst])
def test_iterate_sync_hands_out_the_items(kind: type[StreamingPrimitive[str, str]]) -> None:
    """Plain code iterates over a streaming step."""
    assert list(iterate_sync(kind(), "a b c")) == ["a", "b", "c"]


def test_error_in_the_stream_comes_through() -> None:
    """What the generator raises, the step raises."""

    class Broken(StreamingPrimitive[Any, Any]):
        async def stream(self, data: Any, context: WorkflowContext) -> AsyncIterator[Any]:
            yield 1
            raise KeyError("mine")

    with pytest.raises(KeyError):
        asyncio.run(Broken().execute(1, WorkflowContext()))


def test_stream_is_closed_when_the_call_is_cancelled() -> None:
    """The generator's clean-up has run when the cancellation is out."""
    ended: list[bool] = []

    class Endless(StreamingPrimitive[Any, Any]):
        async def stream(self, data: Any, context: WorkflowContext) -> AsyncIterator[Any]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                ended.append(True)

    async def main() -> None:
        task = asyncio.create_task(Endless().execute(1, WorkflowContext()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    asyncio.run(main())


def test_stream_that_returns_is_refused_when_the_class_is_made() -> None:
    """A coroutine function is no stream."""
    with pytest.raises(ConfigurationError, match=r"Wrong\.stream returns instead of yielding"):

        class Wrong(StreamingPrimitive[Any, Any]):
            async def stream(self, data: Any, context: WorkflowContext) -> list[Any]:  # type: ignore[override]
                return [data]


def test_plain_generator_is_refused_when_the_class_is_made() -> None:
    """It would hold the loop, and only the first call would tell."""
    with pytest.raises(ConfigurationError, match=r"Wrong\.stream is a plain generator.* `async def stream"):

        class Wrong(StreamingPrimitive[Any, Any]):
            def stream(self, data: Any, context: WorkflowContext) -> Any:
                yield data


def test_stream_may_hand_on_another_stream() -> None:
    """A plain method that returns an async iterator is a stream."""

    class Handing(StreamingPrimitive[str, str]):
        def stream(self, data: str, context: WorkflowContext) -> AsyncIterator[str]:
            return Words().stream(data, context)

    assert asyncio.run(Handing().execute("a b", WorkflowContext())) == ["a", "b"]


def test_class_without_stream_fails_when_called() -> None:
    """The call says what is missing."""
    with pytest.raises(NotImplementedError, match=r"no stream\(data, context\)"):
        asyncio.run(StreamingPrimitive("s").execute(1, WorkflowContext()))


def test_name_is_what_people_read() -> None:
    """The given name, else the class's."""
    assert repr(Words("words")) == "words"
    assert repr(Words()) == repr(ContextFirst()).replace("ContextFirst", "Words") == "Words"
