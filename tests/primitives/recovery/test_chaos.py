"""Faults on purpose: as many as asked for, the same ones again with the same seed."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.recovery import ChaosPrimitive, FallbackPrimitive, RetryPrimitive
from tta_sync.primitives.recovery.chaos import ChaosError
from tta_sync.testing import FakeClock


async def answer(data: Any) -> Any:
    return data


def outcomes(chaos: ChaosPrimitive[Any, Any], times: int = 200, clock: FakeClock | None = None) -> list[bool]:
    async def main() -> list[bool]:
        context = WorkflowContext(clock=clock or FakeClock())
        results = []
        for _ in range(times):
            try:
                await chaos.execute("x", context)
                results.append(True)
            except ChaosError:
                results.append(False)
        return results

    return asyncio.run(main())


def test_nothing_happens_by_default() -> None:
    """Without options the step is as it is."""
    assert all(outcomes(ChaosPrimitive(answer)))


def test_share_of_failures_is_as_asked_for() -> None:
    """None, about a third, all."""
    assert 0.2 < outcomes(ChaosPrimitive(answer, 0.33, seed=1), 1000).count(False) / 1000 < 0.45
    assert not any(outcomes(ChaosPrimitive(answer, 1.0)))


def test_same_seed_fails_the_same_calls() -> None:
    """A test that failed can be run again."""
    first = outcomes(ChaosPrimitive(answer, failure_ratio=0.5, seed=7))
    assert first == outcomes(ChaosPrimitive(answer, failure_ratio=0.5, seed=7))
    assert first != outcomes(ChaosPrimitive(answer, failure_ratio=0.5, seed=8))


def test_latency_is_waited_on_the_contexts_clock() -> None:
    """Exactly, or anything in a range."""
    clock = FakeClock()
    outcomes(ChaosPrimitive(answer, latency=1.5), 10, clock)
    assert clock.monotonic() == 15.0
    ranged = FakeClock()
    outcomes(ChaosPrimitive(answer, latency=(1.0, 2.0), seed=1), 100, ranged)
    assert 110 < ranged.monotonic() < 190


def test_failure_after_the_step_loses_its_answer_but_not_its_effect() -> None:
    """The fault that idempotency is for."""
    done: list[Any] = []
    with pytest.raises(ChaosError):
        asyncio.run(ChaosPrimitive(done.append, 1.0, after=True).execute("x"))
    assert done == ["x"]
    with pytest.raises(ChaosError, match="instead of calling"):
        asyncio.run(ChaosPrimitive(done.append, 1.0).execute("x"))
    assert done == ["x"]


@pytest.mark.parametrize("error", [ValueError("mine"), lambda: ValueError("mine"), ValueError], ids=repr)
def test_error_is_the_one_that_was_asked_for(error: Any) -> None:
    """An object, a type, or a function that makes one."""
    with pytest.raises(ValueError):  # noqa: PT011  # of a type it has no text
        asyncio.run(ChaosPrimitive(answer, 1.0, error=error).execute("x"))


def test_made_up_failure_is_a_connection_error_that_recovery_handles() -> None:
    """Retry and fallback take it for the real thing."""
    shaky = ChaosPrimitive(answer, failure_ratio=0.5, seed=3)

    async def main() -> list[Any]:
        context = WorkflowContext(clock=FakeClock())
        workflow = FallbackPrimitive(RetryPrimitive(shaky, max_retries=2), lambda data: "backup")
        return [await workflow.execute("x", context) for _ in range(50)]

    assert set(asyncio.run(main())) == {"x", "backup"}
    assert issubclass(ChaosError, ConnectionError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"failure_ratio": 1.5}, "failure_ratio"),
        ({"failure_ratio": True}, "failure_ratio"),
        ({"latency": -1}, "latency"),
        ({"latency": (2.0, 1.0)}, "latency"),
        ({"latency": (1.0, 2.0, 3.0)}, "latency"),
        ({"latency": "1"}, "latency"),
        ({"error": "boom"}, "error is an exception"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        ChaosPrimitive(answer, **options)


def test_forked_child_has_a_free_lock() -> None:
    """A lock held at the moment of the fork holds up nobody in the child."""
    chaos = ChaosPrimitive(answer)
    chaos._lock.acquire()
    child = os.fork()
    if not child:
        try:
            chaos.execute("x", WorkflowContext()).send(None)
        except StopIteration:
            os._exit(0)
        finally:
            os._exit(1)
    chaos._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_repr_shows_what_it_does() -> None:
    """A workflow can be read."""
    assert repr(ChaosPrimitive(answer, 0.25)) == "Chaos(answer, failure_ratio=0.25)"
    assert repr(ChaosPrimitive(answer, latency=(1, 2), name="c")) == "Chaos(answer, failure_ratio=0, latency=(1, 2))"
