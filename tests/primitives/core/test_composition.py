"""A workflow seen from outside: its repr, its diagram, and warnings where parts defeat each other."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.primitives.core.base import (
    LambdaPrimitive,
    WorkflowPrimitive,
    as_primitive,
    caller_step,
    step,
    thread_step,
)
from tta_sync.primitives.core.composition import (
    CompositionWarning,
    check_composition,
    children_of,
    details_of,
    inside,
)
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive, SwitchPrimitive
from tta_sync.primitives.performance import CachePrimitive
from tta_sync.primitives.recovery import (
    CircuitBreakerPrimitive,
    FallbackPrimitive,
    RetryPrimitive,
    RetryStrategy,
    SagaPrimitive,
    TimeoutPrimitive,
)

a, b, c = (step(lambda data: data, name=name) for name in "abc")


class Wrapper(WorkflowPrimitive[Any, Any]):
    """Any composite of one step, as a recovery primitive is."""

    def __init__(self, inner: Any, objects_to: str = "") -> None:
        self.inner = as_primitive(inner)
        self.objects_to = objects_to
        check_composition(self)

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return await self.inner.execute(data, context)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.inner,)

    def details(self) -> str:
        return f"objects_to={self.objects_to!r}" if self.objects_to else ""

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        if repr(inner) == self.objects_to:
            return f"{self.objects_to} is inside, {'directly' if direct else 'somewhere'}"
        return None


class Unbound(Wrapper):
    """A cache without a step, as far as its neighbours can tell."""

    unbound = True

    def __init__(self) -> None:
        self.objects_to = ""

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return ()

    def bind(self, inner: Any) -> Any:
        return Wrapper(inner)


# ---- repr ---------------------------------------------------------------------------------------------------------


def test_repr_of_a_wrapper_shows_its_step_and_options() -> None:
    """Class, parts and the options worth reading."""
    assert repr(Wrapper(a)) == "Wrapper(a)"
    assert repr(Wrapper(a >> b, "c")) == "Wrapper(a >> b, objects_to='c')"
    assert repr((a >> Wrapper(b)) | c) == "(a >> Wrapper(b)) | c"
    assert repr(a >> MapPrimitive(b | c)) == "a >> Map(b | c, max_concurrency=10)"
    assert repr(ParallelPrimitive([a, b], max_concurrency=1, on_error="collect")) == (
        'Parallel(a | b, max_concurrency=1, on_error="collect")'
    )


def test_repr_of_a_function_step_leaves_out_where_it_was_defined() -> None:
    """``<locals>`` helps no reader."""

    def inner(data: Any) -> Any:
        return data

    assert repr(step(inner)) == "inner"


# ---- what primitives say of themselves ----------------------------------------------------------------------------


def test_users_own_attributes_do_no_harm_when_they_have_our_names() -> None:
    """A class may use ``children``, ``details`` or ``outline`` for its own purposes."""

    class Family(WorkflowPrimitive[Any, Any]):
        details = 4  # type: ignore[assignment]

        def __init__(self) -> None:
            self.children = ["Ada", "Grace"]  # type: ignore[assignment]
            self.strategy = "saga"

        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return data

    class House(Family):
        def children(self) -> int:  # type: ignore[override]
            return 3

        def details(self) -> list[str]:  # type: ignore[override]
            return ["big"]

        def outline(self) -> str:  # type: ignore[override]
            return "a garden"

    class Estate(Family):
        def children(self, depth: int) -> list[int]:  # type: ignore[override]
            return [depth]

        def details(self, x: float, y: float) -> str:  # type: ignore[override]
            return f"{x}, {y}"

        def outline(self, scale: float) -> str:  # type: ignore[override]
            return f"1:{scale}"

    class Register(Family):
        async def children(self) -> list[str]:  # type: ignore[override]
            return ["from the database"]

        def details(self) -> str:  # type: ignore[override]
            raise LookupError("not open yet")

    family = Family()
    assert asyncio.run(TimeoutPrimitive(RetryPrimitive(family), 30.0).execute("x")) == "x"
    house = House.__new__(House)
    for own in (family, house, Estate(), Register()):
        assert asyncio.run(TimeoutPrimitive(RetryPrimitive(own), 30.0).execute("x")) == "x"
        assert repr(own) == type(own).__name__
        assert children_of(own) == ()
        assert details_of(own) == ""
        assert type(own).__name__ in (own >> a).to_mermaid()
        assert "[" in (own >> a).to_mermaid()


@pytest.mark.parametrize("own", ["saga", "cache", "fallback", "timeout", "retry"])
def test_users_strategy_is_nobodys_business(own: str) -> None:
    """A class attribute ``strategy`` makes a step neither a saga, nor a cache that should not stand inside a retry."""

    class Strategic(WorkflowPrimitive[Any, Any]):
        strategy = own

        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return data

    flow = FallbackPrimitive(CachePrimitive(TimeoutPrimitive(RetryPrimitive(Strategic()), 30.0)), Strategic())
    assert asyncio.run(flow.execute("x")) == "x"
    assert 'fails"| n' in flow.to_mermaid()
    assert Strategic().to_mermaid().count("[") == 1


def test_retry_keeps_its_strategy_for_whoever_asks() -> None:
    """``retry.strategy`` is what it was given, as in TTA.dev."""
    strategy = RetryStrategy(max_retries=1)
    assert RetryPrimitive(a, strategy=strategy).strategy is strategy
    assert RetryPrimitive(a).strategy is None


def test_composite_is_drawn_as_a_frame_when_its_outline_is_its_own() -> None:
    """A user's composite may have an ``outline`` that means something else."""

    class Map(Wrapper):
        def outline(self, scale: float) -> str:  # type: ignore[override]
            return f"1:{scale}"

    assert 'subgraph g1["Map"]' in Map(a).to_mermaid()


# ---- conflicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: Wrapper(a, "a"), "directly"),
        (lambda: Wrapper(Wrapper(a), "a"), "directly"),
        (lambda: Wrapper(Wrapper(a >> b), "a"), "somewhere"),
        (lambda: Wrapper(b | Wrapper(a), "a"), "somewhere"),
        (lambda: Wrapper(Unbound() >> a, "a"), "directly"),
        (lambda: Wrapper(Unbound() >> a, "Unbound"), "directly"),
        (lambda: Wrapper(a >> b >> Unbound(), "Unbound"), "directly"),
        (lambda: Wrapper(a >> b >> Unbound(), "a"), "somewhere"),
        (lambda: Wrapper(ConditionalPrimitive(bool, b, a), "a"), "somewhere"),
    ],
)
def test_conflict_warns_at_the_users_line_when_composed(build: Any, where: str) -> None:
    """Each part inside is looked at, at any depth, once; the warning points at the line that built it."""
    with pytest.warns(CompositionWarning, match=f"is inside, {where}") as caught:
        build()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_no_warning_where_nothing_conflicts() -> None:
    """The parts that do not conflict are not mentioned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Wrapper(a >> b | c, "d")


def test_shared_parts_are_looked_at_once() -> None:
    """A part that stands in many places costs one look, so that no workflow is slow to build."""
    flow: Any = a
    for _ in range(40):
        flow = ParallelPrimitive([flow, flow])
    assert len(list(inside(flow))) == 40


# ---- diagrams -----------------------------------------------------------------------------------------------------


def test_diagram_of_a_chain() -> None:
    """One node per step, in order, saying on which thread it runs."""
    flow = a >> caller_step(lambda data: data, name="save") >> thread_step(lambda data: data, name="zip")
    assert flow.to_mermaid() == (
        "flowchart LR\n"
        '    n1["a"]\n'
        '    n2["save (on the caller\'s thread)"]\n'
        '    n3["zip (on a pool thread)"]\n'
        "    n1 --> n2\n"
        "    n2 --> n3\n"
    )


def test_diagram_of_a_single_step() -> None:
    """A step alone is a node."""
    assert a.to_mermaid() == 'flowchart LR\n    n1["a"]\n'


def test_diagram_of_a_parallel_forks_and_joins() -> None:
    """Every branch begins at the fork and ends at the join."""
    assert (a >> (b | c)).to_mermaid() == (
        "flowchart LR\n"
        '    n1["a"]\n'
        '    n2{{"parallel"}}\n'
        '    n3["b"]\n'
        '    n4["c"]\n'
        '    n5((" "))\n'
        "    n2 --> n3\n"
        "    n3 --> n5\n"
        "    n2 --> n4\n"
        "    n4 --> n5\n"
        "    n1 --> n2\n"
    )
    assert '{{"parallel: max_concurrency=2"}}' in ParallelPrimitive([a, b], max_concurrency=2).to_mermaid()


def test_diagram_of_a_condition_shows_the_way_past_it() -> None:
    """Yes and no are labelled; without an else, no leads on."""
    assert (ConditionalPrimitive(bool, a) >> b).to_mermaid() == (
        "flowchart LR\n"
        '    n1{"bool?"}\n'
        '    n2["a"]\n'
        '    n1 -->|"yes"| n2\n'
        '    n3["b"]\n'
        "    n2 --> n3\n"
        '    n1 -->|"no"| n3\n'
    )
    assert '-->|"no"| n3' in ConditionalPrimitive(bool, a, b).to_mermaid()


def test_diagram_keeps_the_way_past_a_condition_at_the_end() -> None:
    """Where nothing follows, all ways meet in an end of their own; without such a way there is none."""
    assert (b >> ConditionalPrimitive(bool, a)).to_mermaid() == (
        "flowchart LR\n"
        '    n1["b"]\n'
        '    n2{"bool?"}\n'
        '    n3["a"]\n'
        '    n2 -->|"yes"| n3\n'
        "    n1 --> n2\n"
        '    n4((" "))\n'
        "    n3 --> n4\n"
        '    n2 -->|"no"| n4\n'
    )
    assert '|"else"| n4' in Wrapper(SwitchPrimitive(str, {"x": a})).to_mermaid()
    assert "((" not in ConditionalPrimitive(bool, a, b).to_mermaid()


def test_diagram_of_routes_shows_their_keys() -> None:
    """Cases and routes are labelled edges, and the default is marked."""
    switch = SwitchPrimitive(str, {"x": a, 2: b}).to_mermaid()
    assert '|"x"|' in switch
    assert '|"2"|' in switch
    assert '|"else"|' in (SwitchPrimitive(str, {"x": a}) >> b).to_mermaid()
    assert '|"else"| n3' in SwitchPrimitive(str, {"x": a}, default=b).to_mermaid()
    router = RouterPrimitive({"x": a, "y": b}, str, default="y").to_mermaid()
    assert '|"x"|' in router
    assert '|"y, or else"|' in router


def test_diagram_of_wrappers_draws_frames() -> None:
    """A wrapper, or an unbound cache at either end, frames what it wraps."""
    expected = 'flowchart LR\n    subgraph g1["{}"]\n        n2["a"]\n        n3["b"]\n        n2 --> n3\n    end\n'
    assert Wrapper(a >> b, "c").to_mermaid() == expected.format("Wrapper: objects_to='c'")
    assert (Unbound() >> a >> b).to_mermaid() == expected.format("Unbound")
    assert (a >> b >> Unbound()).to_mermaid() == expected.format("Unbound")
    assert (Unbound() >> Unbound()).to_mermaid().count("subgraph") == 0


def test_diagram_of_a_fallback_shows_what_takes_over() -> None:
    """The next one is reached where one fails; any of them may be the end."""

    class Fallback(Wrapper):
        _tta_kind = "fallback"

        def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
            return (a, b)

    drawn = (Fallback(a) >> c).to_mermaid()
    assert '-.->|"fails"|' in drawn
    assert "    n2 --> n4\n    n3 --> n4\n" in drawn


def test_diagram_of_a_composite_of_several_parts_joins_them_loosely() -> None:
    """A composite that says nothing more of itself is a frame with its parts in order."""

    class Group(Wrapper):
        def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
            return (a, b)

    assert "n2 -.- n3" in Group(a).to_mermaid()


def test_diagram_of_a_saga_shows_what_undoes_what() -> None:
    """The forward steps are a chain; each compensation hangs below its own."""
    undo = step(lambda data: data, name="undo a")
    assert SagaPrimitive([(a, undo), (b, None), (c, a)]).to_mermaid() == (
        "flowchart LR\n"
        '    subgraph g1["Saga"]\n'
        '        n2["a"]\n'
        '        n3["undo a"]\n'
        '        n2 -.->|"undo"| n3\n'
        '        n4["b"]\n'
        "        n2 --> n4\n"
        '        n5["c"]\n'
        "        n4 --> n5\n"
        '        n6["a"]\n'
        '        n5 -.->|"undo"| n6\n'
        "    end\n"
    )


def test_answer_of_ours_that_fails_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a user's own method of that name may be anything; a fault of tta_sync's own comes out."""
    broken = RetryPrimitive(a)
    del broken.primitive
    with pytest.raises(AttributeError, match="primitive"):
        children_of(broken)


def recursive(kind: str) -> WorkflowPrimitive[Any, Any]:
    """A workflow that is its own part: what walks down a tree is one."""
    own: Any
    if kind == "wrapper":
        own = Wrapper(a)
        own.inner = own
    elif kind == "condition":
        own = ConditionalPrimitive(bool, a, b)
        own.else_primitive = own
    elif kind == "chain":
        own = ConditionalPrimitive(bool, a, b)
        own.else_primitive = MapPrimitive(own) >> c
    elif kind == "switch":
        own = SwitchPrimitive(str, {"a": a})
        own.cases["b"] = own
    elif kind == "router":
        own = RouterPrimitive({"a": a}, str)
        own.routes["b"] = own
    elif kind == "saga":
        own = SagaPrimitive(a, b)
        own.steps = ((own, b),)
    elif kind == "parallel":
        own = a | b
        own.branches = (a, own)
    elif kind == "map":
        own = MapPrimitive(a)
        own.step = own
    else:
        own = a >> b
        own.steps = (a, own)
    return own


KINDS = ["wrapper", "condition", "chain", "switch", "router", "saga", "sequence", "parallel", "map"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_primitives_stand_around_a_workflow_that_contains_itself(kind: str) -> None:
    """Names, and what may be repeated, are looked for in its parts, each once."""
    own = recursive(kind)
    assert repr(CircuitBreakerPrimitive(RetryPrimitive(own)))
    assert ParallelPrimitive([own, own]).branches == (own, own)


@pytest.mark.parametrize("kind", KINDS)
def test_repr_and_diagram_end_when_a_workflow_contains_itself(kind: str) -> None:
    """It is shown once, and where it comes again it is only named."""
    own = recursive(kind)
    assert repr(own).count("...") == 1
    assert own.to_mermaid().count(f"{type(own).__name__}, again") == 1
    assert TimeoutPrimitive(own, 1.0).to_mermaid().count("again") == 1


def test_diagram_escapes_what_mermaid_would_read() -> None:
    """Quotes, angle brackets, ampersands and hashes in names stay text, and long names are cut."""
    odd: LambdaPrimitive[Any, Any] = step(lambda data: data, name='say "hi" <b> & &lt; #1 `x`\nnow')
    assert '["say #quot;hi#quot; #lt;b#gt; #amp; #amp;lt; #35;1 #96;x#96; now"]' in odd.to_mermaid()
    assert "…" in step(lambda data: data, name="x" * 200).to_mermaid()
