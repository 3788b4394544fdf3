"""How results look in a shared store: nothing is believed that was not stored so, and nothing changes on the way."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import pickle
import struct
import uuid
import zlib
import zoneinfo
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tta_sync.primitives.performance import codec
from tta_sync.primitives.performance.codec import Codec, Undecodable

CODEC = Codec(None, 100_000, 1024)
KEY = b"tta:1:_:n:1:k"

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "$", "$tuple", "$x"]), inner, max_size=3)
        | st.dictionaries(st.integers(0, 3) | st.booleans() | st.none() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def seal(value: Any, by: Codec = CODEC, key: bytes = KEY, **fields: Any) -> bytes:
    encoded = codec.encode(value)
    assert encoded is not None
    return seal_raw(encoded, by, key, **fields)


def seal_raw(encoded: tuple[int, bytes], by: Codec = CODEC, key: bytes = KEY, **fields: Any) -> bytes:
    given = {"created": 1.0, "fresh_until": 2.0, "expires_at": 3.0, "cost": 0.5, "versions": (7, 2**63)} | fields
    blob = by.seal(key, encoded, identity=b"12345678", **given)
    assert blob is not None
    return blob


def opened(blob: bytes, by: Codec = CODEC, key: bytes = KEY) -> Any:
    return by.value(by.open(key, blob))


def refused(blob: bytes, by: Codec = CODEC, key: bytes = KEY) -> str:
    with pytest.raises(Undecodable) as caught:
        opened(blob, by, key)
    return caught.value.reason


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(ours, theirs) and same(v, w) for (ours, v), (theirs, w) in zip(one.items(), other.items(), strict=True)
        )
    return bool(repr(one) == repr(other) and one == other)


@given(VALUES)
def test_value_comes_back_as_it_was_when_it_is_stored(value: Any) -> None:
    """Types, order and nesting survive, through compression as well."""
    assert same(opened(seal(value)), value)
    small = Codec(b"secret", 100_000, 1)
    assert same(opened(seal(value, small), small), value)


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        "\ud800",
        datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
        datetime.time(1, 2, tzinfo=datetime.UTC),
        decimal.Decimal("NaN"),
        {(1, "a"): {None: b"\x00"}},
        {"$tuple": [1]},
        {"$": 1, "a": 2},
    ],
)
def test_value_comes_back_as_it_was_when_it_is_unusual(value: Any) -> None:
    """Infinity, half surrogate pairs, time zones, folds and keys that look like tags survive."""
    back = opened(seal(value))
    assert repr(back) == repr(value)
    assert type(back) is type(value)


def test_not_a_number_comes_back_when_it_is_stored() -> None:
    """NaN is a float like any other, also inside."""
    (value,) = opened(seal([math.nan]))
    assert math.isnan(value)


class Local(datetime.tzinfo):
    """A time zone that nobody else knows."""

    def utcoffset(self, when: Any) -> datetime.timedelta:
        return datetime.timedelta(0)


class Text(str):
    """A string with a meaning of its own."""


def bottomless() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        [lambda: None],
        {"a": Text("x")},
        Text("x"),
        OrderedDict(a=1),
        bytearray(b"x"),
        1j,
        datetime.datetime(2026, 1, 1, tzinfo=Local()),
        {object(): 1},
        bottomless(),
        {"$": bottomless()},
    ],
)
def test_value_is_not_carried_when_json_could_not_give_it_back(value: Any) -> None:
    """What would come back as something else is not stored."""
    assert codec.encode(value) is None


@given(st.integers(0, 300), st.integers(1, 255))
def test_altered_bytes_are_refused_wherever_the_change_is(position: int, change: int) -> None:
    """Not one byte can be changed unnoticed."""
    blob = bytearray(seal({"a": list(range(60))}, Codec(None, 100_000, None)))
    blob[position % len(blob)] ^= change
    assert refused(bytes(blob)) in ("corrupt", "foreign")


@given(st.integers(0, 300))
def test_cut_bytes_are_refused_wherever_the_end_is(length: int) -> None:
    """A truncated result is a miss, as is one with more behind it."""
    blob = seal({"a": list(range(100))}, Codec(None, 100_000, None))
    assert len(blob) > 300
    assert refused(blob[:length]) in ("corrupt", "foreign")
    assert refused(blob + b"x") == "corrupt"


def test_bytes_of_another_key_are_refused_when_somebody_copied_them() -> None:
    """A result counts under its own key only."""
    assert refused(seal(1), key=b"tta:1:_:n:1:other") == "corrupt"


@pytest.mark.parametrize("foreign", [b"", b"x", b"null", pickle.dumps({"a": 1}), b"TC0" + b"x" * 200, b"\x80\x04."])
def test_foreign_bytes_are_refused_when_they_are_in_our_place(foreign: bytes) -> None:
    """Pickles, JSON of others and noise are foreign, and never executed."""
    assert refused(foreign) == "foreign"


def test_pickle_is_not_run_when_it_is_sealed_like_a_result() -> None:
    """Even whoever can make a valid seal can make us read nothing but JSON."""
    for program in (b"cos\nsystem\n(S'false'\ntR.", pickle.dumps([1, 2])):
        for mark in (0, 1, 4):
            assert refused(seal_raw((mark, program))) == "corrupt"


def test_seal_of_another_secret_is_refused_when_a_secret_is_set() -> None:
    """With a secret, only those who know it can store what we believe."""
    mine, other = Codec(b"mine", 1000, None), Codec(b"other", 1000, None)
    assert opened(seal(1, mine), mine) == 1
    assert refused(seal(1, other), mine) == "corrupt"
    assert refused(seal(1), mine) == "corrupt"
    assert refused(seal(1, mine), CODEC) == "corrupt"


def test_decompression_bomb_is_refused_when_it_is_sealed_like_a_result() -> None:
    """A small payload that unpacks to more than is allowed is never unpacked whole."""
    bomb = zlib.compress(b"0" * 50_000_000, 9)
    assert len(bomb) < 100_000
    assert refused(seal_raw((2, bomb), Codec(None, 100_000, None))) == "oversized"


@pytest.mark.parametrize("payload", [b"not zlib", zlib.compress(b"1")[:-1], zlib.compress(b"1") + b"x"])
def test_broken_compression_is_refused_when_it_is_sealed_like_a_result(payload: bytes) -> None:
    """Only one whole compressed stream is a payload."""
    assert refused(seal_raw((2, payload))) == "corrupt"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"NaN",
        b"\xff",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"$tuple":1}',
        b'{"$nonsense":1}',
        b'{"$bytes":"zz"}',
        b'{"$float":"0x1"}',
        b'{"$float":[]}',
        b'{"$datetime":["2026-01-01T00:00:00",0,"../../etc/passwd"]}',
        b'{"$datetime":["2026-01-01T00:00:00",5,null]}',
        b'{"$datetime":1}',
        b'{"$timedelta":[1e308,0,0]}',
        b'{"$timedelta":[99999999999,0,0]}',
        b'{"$Decimal":"x"}',
        b'{"$Decimal":{}}',
        b'{"$UUID":"x"}',
        b'{"$UUID":1}',
        b'{"$dict":[[[],1]]}',
        b'{"$dict":[1]}',
        b'{"$date":1}',
    ],
)
def test_hostile_json_is_refused_when_it_is_sealed_like_a_result(payload: bytes) -> None:
    """Nothing that a payload says can raise anything but a miss."""
    assert refused(seal_raw((1, payload))) == "corrupt"


@pytest.mark.parametrize("moment", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["created", "fresh_until", "expires_at", "cost"])
def test_impossible_moments_are_refused_when_they_are_sealed_like_a_result(field: str, moment: float) -> None:
    """A result that never expires, or expires at no time, is not believed."""
    assert refused(seal(1, **{field: moment})) == "corrupt"


def test_too_many_versions_are_refused_when_the_header_claims_them() -> None:
    """A header cannot make us read beyond the bytes."""
    blob = bytearray(seal(1))
    struct.pack_into(">H", blob, 3 + 1 + 8 + 32, 65_535)
    assert refused(bytes(blob)) == "corrupt"
    assert refused(bytes(blob) + bytes(8 * 65_535)) in ("corrupt", "oversized")


def test_large_values_are_neither_stored_nor_read_when_a_bound_is_set() -> None:
    """Beyond max_bytes nothing goes in or out."""
    small = Codec(None, 100, None)
    encoded = codec.encode("x" * 200)
    assert encoded is not None
    fields: dict[str, Any] = {"created": 1.0, "fresh_until": 2.0, "expires_at": 3.0, "cost": 0.0, "versions": ()}
    assert small.seal(KEY, encoded, identity=b"", **fields) is None
    assert refused(b"TC1" + bytes(20_000), small) == "oversized"


def test_large_payload_is_compressed_when_that_makes_it_smaller() -> None:
    """Compression begins above its threshold, and only where it helps."""
    assert len(seal("x" * 5000)) < 200
    assert len(seal("x" * 5000, Codec(None, 100_000, None))) > 5000
    noise = "".join(map(chr, range(33, 126))) * 2
    assert opened(seal(noise)) == noise
    uncompressed = seal(noise, Codec(None, 100_000, 50_000))
    assert json.dumps(noise, ensure_ascii=False).encode() in uncompressed


def test_header_is_read_back_when_a_result_is_opened() -> None:
    """Moments, cost, versions and marks are what they were."""
    blob = CODEC.seal(
        KEY,
        (0, b"1"),
        identity=b"12345678",
        created=1.5,
        fresh_until=2.5,
        expires_at=3.5,
        cost=0.25,
        versions=(1, 2**64 - 1),
        degraded=True,
    )
    assert blob is not None
    envelope = CODEC.open(KEY, blob)
    assert envelope[:6] == (b"12345678", 1.5, 2.5, 3.5, 0.25, (1, 2**64 - 1))
    assert envelope.degraded
    assert not envelope.is_error


def test_error_is_written_as_its_name_and_arguments_when_json_carries_them() -> None:
    """A remembered error is data, not an object; with arguments that JSON cannot carry it is not stored."""
    encoded = codec.encode_error(KeyError("a", 1))
    assert encoded is not None
    envelope = CODEC.open(KEY, seal_raw(encoded))
    assert envelope.is_error
    assert CODEC.value(envelope) == ["builtins.KeyError", ["a", 1]]
    assert codec.encode_error(KeyError(object())) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_when_they_are_not_ours(blob: bytes) -> None:
    """Noise never raises anything but Undecodable."""
    assert refused(blob) in ("corrupt", "foreign", "oversized")
    assert refused(b"TC1" + blob) in ("corrupt", "foreign", "oversized")


def test_uuid_and_decimal_keep_their_types_when_stored() -> None:
    """Types that legacy applications return all day survive."""
    value = {"id": uuid.UUID(int=5), "price": decimal.Decimal("1.10"), "on": datetime.date(2026, 1, 1)}
    assert opened(seal(value)) == value
