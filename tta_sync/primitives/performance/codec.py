"""How a result looks in a shared store: a header that says how long it is good for, and JSON.

No pickle: what comes back from a store was perhaps written by somebody else, and must not be able to run code, to fill
the memory, or to pass for the value of another key. Bytes that are not ours, cut short, altered or too large are
refused, and the caller computes anew.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from hashlib import blake2b
from math import isfinite
from typing import Any, NamedTuple

_MAGIC = b"TC1"
_HEADER = struct.Struct(">3sB8sddddH")  # magic, codec, id, created, fresh until, expires at, cost, number of versions
_SEAL = 16
OVERHEAD = 10_000  # bytes that a stored result may be larger than its value
_MAX_VERSIONS = 1000

_TAGGED = 1  # the JSON holds type tags
_COMPRESSED = 2
_ERROR = 4  # the JSON is an error's type and arguments
_DEGRADED = 8


class Undecodable(Exception):
    """The bytes cannot be taken for a result; ``reason`` is a word for the statistics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Envelope(NamedTuple):
    """A stored result, its seal checked and its value still closed. Moments are seconds since the epoch."""

    id: bytes
    created: float
    fresh_until: float
    expires_at: float
    cost: float
    versions: tuple[int, ...]
    codec: int
    payload: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.codec & _ERROR)

    @property
    def degraded(self) -> bool:
        return bool(self.codec & _DEGRADED)


class Codec:
    """Seal and open envelopes.

    Args:
        secret: where given, only what was sealed with the same secret is opened (keyed BLAKE2b).
        max_bytes: the most that a value may take, stored or decompressed.
        compress_above: bytes from which a payload is compressed; None for never.
    """

    def __init__(self, secret: bytes | None, max_bytes: int, compress_above: int | None) -> None:
        self._secret = b"" if secret is None else blake2b(secret, digest_size=32).digest()
        self.max_bytes = max_bytes
        self.compress_above = compress_above

    def seal(
        self,
        key: bytes,
        encoded: tuple[int, bytes],
        *,
        identity: bytes,
        created: float,
        fresh_until: float,
        expires_at: float,
        cost: float,
        versions: tuple[int, ...],
        degraded: bool = False,
    ) -> bytes | None:
        """Return the bytes to store under *key*; None if they would be more than allowed."""
        codec, payload = encoded
        if len(payload) > self.max_bytes:
            return None
        if degraded:
            codec |= _DEGRADED
        if self.compress_above is not None and len(payload) > self.compress_above:
            smaller = zlib.compress(payload, 1)
            if len(smaller) < len(payload):
                codec, payload = codec | _COMPRESSED, smaller
        header = _HEADER.pack(_MAGIC, codec, identity, created, fresh_until, expires_at, cost, len(versions))
        header += struct.pack(f">{len(versions)}Q", *versions)
        return b"".join((header, self._seal(key, header, payload), payload))

    def open(self, key: bytes, blob: bytes) -> Envelope:
        """Check what is stored under *key*.

        Raises:
            Undecodable: it is foreign, corrupt, or oversized.
        """
        if len(blob) > self.max_bytes + OVERHEAD:
            raise Undecodable("oversized")
        if blob[:3] != _MAGIC:
            raise Undecodable("foreign")
        if len(blob) < _HEADER.size:
            raise Undecodable("corrupt")
        _, codec, identity, created, fresh_until, expires_at, cost, count = _HEADER.unpack_from(blob)
        end = _HEADER.size + 8 * count
        if count > _MAX_VERSIONS or len(blob) < end + _SEAL:
            raise Undecodable("corrupt")
        payload = blob[end + _SEAL :]
        if self._seal(key, blob[:end], payload) != blob[end : end + _SEAL]:
            raise Undecodable("corrupt")
        if not isfinite(created + fresh_until + expires_at + cost):
            raise Undecodable("corrupt")
        versions = struct.unpack_from(f">{count}Q", blob, _HEADER.size)
        return Envelope(identity, created, fresh_until, expires_at, cost, versions, codec, payload)

    def value(self, envelope: Envelope) -> Any:
        """Return the value inside; for an error, its type's name and its arguments.

        Raises:
            Undecodable: it is no JSON of ours, or grows beyond what is allowed.
        """
        payload = envelope.payload
        if envelope.codec & _COMPRESSED:
            payload = self._decompress(payload)
        try:
            value = json.loads(payload, parse_constant=_no_constant)
            return _untag(value) if envelope.codec & _TAGGED else value
        except Exception:  # whatever JSON or a type says of a text that it did not write
            raise Undecodable("corrupt") from None

    def _decompress(self, payload: bytes) -> bytes:
        machine = zlib.decompressobj()
        try:
            plain = machine.decompress(payload, self.max_bytes + 1)
        except zlib.error:
            raise Undecodable("corrupt") from None
        if len(plain) > self.max_bytes:
            raise Undecodable("oversized")
        if not machine.eof or machine.unused_data:
            raise Undecodable("corrupt")
        return plain

    def _seal(self, key: bytes, header: bytes, payload: bytes) -> bytes:
        seal = blake2b(header, digest_size=_SEAL, key=self._secret)
        seal.update(b"%d:" % len(key))
        seal.update(key)
        seal.update(payload)
        return seal.digest()


# ---- values ---------------------------------------------------------------------------------------------------------


def encode(value: Any) -> tuple[int, bytes] | None:
    """Return the codec and the JSON of *value*; None if JSON cannot give it back as it was."""
    try:
        if _is_json(value, 0):
            return 0, _dump(value)
        return _TAGGED, _dump(_tag(value, 0))
    except (_Uncarried, RecursionError):
        return None


def parse(text: str) -> Any:
    """Return the value that *text* is the JSON of, tagged or plain, as :func:`encode` writes it.

    Raises:
        ValueError: it is none.
    """
    try:
        return _untag(json.loads(text, parse_constant=_no_constant))
    except Exception as error:  # whatever JSON or a type says of a text that it did not write
        raise ValueError(f"this is no value: {error}") from None


def encode_error(error: BaseException) -> tuple[int, bytes] | None:
    """Return the codec and the JSON of *error*'s type and arguments; None if JSON cannot carry the arguments."""
    kind = type(error)
    encoded = encode([f"{kind.__module__}.{kind.__qualname__}", list(error.args)])
    return None if encoded is None else (encoded[0] | _ERROR, encoded[1])


def _dump(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
        return json.dumps(value, separators=(",", ":"), check_circular=False).encode()


class _Uncarried(Exception):
    """JSON cannot carry this."""


_MAX_DEPTH = 100


def _is_json(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is float:
        return isfinite(value)
    if depth >= _MAX_DEPTH:
        raise _Uncarried
    if kind is list:
        return all(_is_json(item, depth + 1) for item in value)
    return kind is dict and all(
        type(key) is str and not key.startswith("$") and _is_json(item, depth + 1) for key, item in value.items()
    )


def _tag(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if depth >= _MAX_DEPTH:
        raise _Uncarried
    depth += 1
    if kind is list:
        return [_tag(item, depth) for item in value]
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _tag(item, depth) for key, item in value.items()}
        return {"$dict": [[_tag(key, depth), _tag(item, depth)] for key, item in value.items()]}
    if kind is tuple:
        return {"$tuple": [_tag(item, depth) for item in value]}
    if kind is float:
        return value if isfinite(value) else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": value.hex()}
    written = _writers().get(kind)
    if written is None:
        raise _Uncarried
    return {f"${kind.__name__}": written(value)}


def _untag(value: Any) -> Any:
    if type(value) is list:
        return [_untag(item) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        (name, inner), *_ = value.items()
        if name.startswith("$"):
            if name == "$dict":
                return {_untag(key): _untag(item) for key, item in inner}
            if name == "$tuple":
                return tuple(_untag(item) for item in inner)
            return _readers()[name](inner)
    return {key: _untag(item) for key, item in value.items()}


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _float(text: Any) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(text)
    return float(text)


class _Tables:
    """Writers by type and readers by tag; filled at first need, as their modules cost something to import."""

    writers: dict[type, Callable[[Any], Any]] | None = None
    readers: dict[str, Callable[[Any], Any]] | None = None

    def fill(self) -> None:
        import datetime
        import decimal
        import uuid
        import zoneinfo

        def zone(value: Any) -> str | None:
            kind = type(value.tzinfo)
            if value.tzinfo is None or kind is datetime.timezone:
                return None
            if kind is zoneinfo.ZoneInfo and value.tzinfo.key:
                return str(value.tzinfo.key)
            raise _Uncarried

        def moment(value: Any) -> list[Any]:
            return [value.isoformat(), value.fold, zone(value)]

        def read_moment(kind: Any) -> Callable[[Any], Any]:
            def read(parts: Any) -> Any:
                text, fold, zone = parts
                value = kind.fromisoformat(text).replace(fold=fold)
                return value if zone is None else value.replace(tzinfo=zoneinfo.ZoneInfo(zone))

            return read

        self.readers = {
            "$float": _float,
            "$bytes": bytes.fromhex,
            "$datetime": read_moment(datetime.datetime),
            "$time": read_moment(datetime.time),
            "$date": datetime.date.fromisoformat,
            "$timedelta": lambda parts: datetime.timedelta(*parts),
            "$Decimal": decimal.Decimal,
            "$UUID": uuid.UUID,
        }
        self.writers = {
            datetime.datetime: moment,
            datetime.time: moment,
            datetime.date: datetime.date.isoformat,
            datetime.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
            decimal.Decimal: str,
            uuid.UUID: str,
        }


_tables = _Tables()


def _writers() -> dict[type, Callable[[Any], Any]]:
    if _tables.writers is None:
        _tables.fill()
    assert _tables.writers is not None
    return _tables.writers


def _readers() -> dict[str, Callable[[Any], Any]]:
    if _tables.readers is None:
        _tables.fill()
    assert _tables.readers is not None
    return _tables.readers
