"""What a call is known by: equal for equal data in every process, different for all else."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import subprocess
import sys
import uuid
import zoneinfo
from collections import namedtuple
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance import keys

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(0, 3) | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Equal with equal types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            any(same(key, theirs) and same(value, other[theirs]) for theirs in other) for key, value in one.items()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@given(PLAIN, PLAIN)
def test_canonical_forms_are_equal_exactly_when_the_data_are(one: Any, other: Any) -> None:
    """Two inputs share a key if and only if they are equal, types included."""
    assert (keys.canonical(one) == keys.canonical(other)) == same(one, other)


@given(PLAIN, PLAIN)
def test_exact_forms_prove_equality_when_they_are_equal(one: Any, other: Any) -> None:
    """The cheap form never joins what the canonical one tells apart."""
    form = keys.exact_form(one)
    assert form is not None
    if form == keys.exact_form(other):
        assert keys.canonical(one) == keys.canonical(other)


@given(st.dictionaries(st.text(max_size=3), st.integers(), min_size=2, max_size=5))
def test_order_of_a_dict_does_not_matter_when_a_key_is_made(data: dict[str, int]) -> None:
    """Reordered dicts are equal data."""
    turned = dict(reversed(data.items()))
    assert keys.digest(turned) == keys.digest(data)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0, False),
        ("1", 1),
        (b"1", "1"),
        ([1], (1,)),
        ({1}, frozenset({1})),
        (None, "null"),
        ({"$tuple": [1]}, (1,)),
        ({"$bytes": "31"}, b"1"),
        ({1: "a"}, {"1": "a"}),
        ({}, []),
        (0.0, -0.0),
        (2**70, str(2**70)),
        ("é", "e\u0301"),
        (b"a", bytearray(b"a")),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
        (datetime.date(2026, 1, 1), "2026-01-01"),
        (datetime.datetime(2026, 1, 1), datetime.date(2026, 1, 1)),
        (datetime.datetime(2026, 10, 25, 2, 30), datetime.datetime(2026, 10, 25, 2, 30, fold=1)),
        (
            datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
            datetime.datetime(2026, 7, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        ),
        (1j, [0.0, 1.0]),
    ],
)
def test_keys_differ_when_only_the_types_do(one: Any, other: Any) -> None:
    """Values that Python or JSON would mix up have keys of their own."""
    assert keys.digest(one) != keys.digest(other)


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Query:
    text: str
    limit: int = 5


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Level.LOW,
        Query("a"),
        Point(1, 2),
        uuid.UUID(int=7),
        datetime.time(1, 2),
        datetime.timedelta(days=-1, microseconds=3),
        decimal.Decimal("1.50"),
        {"nested": [{Colour.RED: {frozenset({1, 2})}}]} and [Colour.RED, {1, 2}],
    ],
)
def test_key_is_made_when_data_hold_common_types(value: Any) -> None:
    """Enums, dataclasses, named tuples, dates, decimals and UUIDs are keys, unlike anything plain."""
    assert keys.digest(value) == keys.digest(value)
    assert keys.canonical(value).startswith(("{", "["))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "data is a builtins.object"),
        ({"user": [1, object()]}, r"data\['user'\]\[1\] is a builtins.object"),
        ({object(): 1}, "the key <object"),
        (float("nan"), "data is nan"),
        ([float("inf")], r"data\[0\] is inf"),
        (decimal.Decimal("NaN"), "data is Decimal"),
        (lambda: None, "data is a builtins.function"),
        ({"a": {1, object}}, r"an item of data\['a'\]"),
    ],
)
def test_argument_is_named_when_no_key_can_be_made(value: Any, place: str) -> None:
    """What has no exact text is refused by its place in the data, never keyed by its repr."""
    with pytest.raises(ConfigurationError, match=place):
        keys.digest(value)
    with pytest.raises(TypeError, match=place):
        keys.digest(value)


def test_bottomless_data_are_refused_when_a_key_is_made() -> None:
    """Data that contain themselves are an error, not an endless loop."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigurationError, match="nested more than 100 deep"):
        keys.digest(loop)
    assert keys.exact_form(loop) is None


def test_digests_are_equal_when_another_process_makes_them() -> None:
    """The hash seed of a process leaves no trace in a key, also not in that of a set."""
    program = (
        "from tta_sync.primitives.performance import keys;"
        "print(keys.digest({'b': {'x', 'y', 'z'}, 'a': [1, 2.5, None, b'x', 'ü']}).hex())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {keys.digest({"a": [1, 2.5, None, b"x", "ü"], "b": {"z", "y", "x"}}).hex() + "\n"}


@given(st.none() | st.text(max_size=6), st.text(max_size=6), st.none() | st.text(max_size=6), st.text(max_size=6))
def test_prefixes_are_equal_only_when_all_parts_are(
    tenant: str | None, name: str, other_tenant: str | None, other_name: str
) -> None:
    """No tenant or namespace, however it is called, can reach into the keys of another."""
    equal = (tenant, name) == (other_tenant, other_name)
    assert (keys.prefix(tenant, name) == keys.prefix(other_tenant, other_name)) == equal


def test_prefix_stays_short_and_distinct_when_a_name_is_long() -> None:
    """A very long name does not make very long keys, and two that begin alike stay apart."""
    one, other = keys.prefix("a" * 5000), keys.prefix("a" * 5001)
    assert one != other
    assert len(one) < 300


@given(st.text(max_size=4), st.none() | st.text(max_size=4), st.text(max_size=4), st.none() | st.text(max_size=4))
def test_tenants_never_share_an_exact_form_when_they_differ(
    data: str, tenant: str | None, other_data: str, other_tenant: str | None
) -> None:
    """The tenant is part of the exact form, unambiguously."""
    equal = (data, tenant) == (other_data, other_tenant)
    assert (keys.exact_form(data, tenant) == keys.exact_form(other_data, other_tenant)) == equal


def test_exact_form_is_short_when_the_data_are_long() -> None:
    """A form that is kept in memory never holds more than half a kilobyte of data."""
    form = keys.exact_form("x" * 100_000)
    assert form is not None
    assert len(form) == 16


def test_plain_is_told_from_lookalikes_when_asked() -> None:
    """Only exact builtin types are plain: what marshal would turn into something else is not."""
    assert keys.is_plain({"a": [1, (2.0, {3}), b"x", None, frozenset({True})]})
    for value in (bytearray(b"x"), [memoryview(b"x")], {"a": Level.LOW}, {Colour.RED: 1}, Point(1, 2), object()):
        assert not keys.is_plain(value)
    assert keys.holds_bytes([{"a": (1, {b"x"})}])
    assert keys.holds_bytes({b"x": 1})
    assert not keys.holds_bytes([{"a": ("x", {1})}])


def test_tenant_called_like_no_tenant_is_another_one() -> None:
    """None, "_", "%5F" and "" are four tenants; a number is the text of it."""
    assert len({keys.prefix(tenant) for tenant in (None, "_", "%5F", "", "%")}) == 5
    assert keys.prefix(7) == keys.prefix("7")  # type: ignore[arg-type]  # that is the point
    assert keys.exact_form(1, Level.LOW) is None  # type: ignore[arg-type]  # not to be marshalled
