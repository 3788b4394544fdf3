"""What a cache knows a call by.

Two forms of the same data. The *canonical* form is text that every process writes alike, whatever the order of a dict
or the hash seed; its BLAKE2b digest names the entry. The *exact* form is whatever ``marshal`` writes in a fraction of a
microsecond; it only finds the canonical one again, so two exact forms of equal data meet in one entry.

Both tell 1 from 1.0 from True, and a list from a tuple.
"""

from __future__ import annotations

import marshal
from hashlib import blake2b
from json.encoder import encode_basestring_ascii as _quote
from math import isfinite
from typing import Any

from tta_sync.exceptions import ConfigurationError

SCHEMA = 1  # part of every key: entries of another layout are simply not found
_MAX_DEPTH = 100
LONG_FORM = 512  # bytes of an exact form from which its digest stands for it

_CONTAINERS = frozenset({tuple, list, dict, set, frozenset})
SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})


class CacheKeyError(ConfigurationError, TypeError):
    """No cache key can be made of an argument; the message names it and says what to give instead."""


def exact_form(data: Any, tenant: str | None = None) -> bytes | None:
    """Return bytes that equal data of plain builtin types shares, or None where only the canonical form will do.

    Never equal for unequal data, except that any buffer (bytearray, memoryview ...) looks like bytes: see
    :func:`holds_bytes`.
    """
    try:
        form = marshal.dumps(data, 2)  # later versions write references, which depend on who else holds an object
        if tenant is not None:
            form += marshal.dumps(tenant, 2)  # no marshalled object is the beginning of another
    except ValueError:
        return None
    return form if len(form) < LONG_FORM else blake2b(form, digest_size=16).digest()


def holds_bytes(data: Any) -> bool:
    """Say whether plain *data* holds bytes, for which an exact form alone proves nothing."""
    kind = type(data)
    if kind is bytes:
        return True
    if kind is dict:
        return any(holds_bytes(key) or holds_bytes(value) for key, value in data.items())
    return kind in _CONTAINERS and any(map(holds_bytes, data))


def is_plain(value: Any, depth: int = 0) -> bool:
    """Say whether *value* is built of exact builtin types only, so that ``marshal`` gives it back as it was."""
    kind = type(value)
    if kind in SCALARS:
        return True
    if depth > _MAX_DEPTH or kind not in _CONTAINERS:
        return False
    depth += 1
    if kind is dict:
        return all(is_plain(key, depth) and is_plain(item, depth) for key, item in value.items())
    return all(is_plain(item, depth) for item in value)


def canonical(data: Any, argument: str = "data") -> str:
    """Write *data* as canonical JSON: sorted, type-tagged, the same in every process.

    Raises:
        ConfigurationError: (also a TypeError) it holds something of which no key can be made; *argument* is named.
    """
    parts: list[str] = []
    _write(data, argument, parts.append, 0)
    return "".join(parts)


def digest(data: Any, argument: str = "data") -> bytes:
    """Return the 128-bit BLAKE2b digest of the canonical form."""
    return blake2b(canonical(data, argument).encode(), digest_size=16).digest()


def prefix(*parts: str | None) -> str:
    """Return *parts* as one readable text in which none of them can pass for another; None is a part, too."""
    return "".join(
        "_:" if part is None else f"{part if isinstance(part, Written) else _component(str(part))}:" for part in parts
    )


class Written(str):
    """A part as :func:`prefix` has written it, read in a store: it is not written once more."""

    __slots__ = ()


def _component(text: str) -> str:
    if text == "_":
        return "%5F"
    if len(text) > 200:
        return f"{_component(text[:100])}~{blake2b(text.encode(errors='surrogatepass'), digest_size=16).hexdigest()}"
    if text.isascii() and text.replace("_", "").replace(".", "").replace("-", "").isalnum():
        return text
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_.-()>" else f"%{ord(c):02X};" for c in text) or "%"


def _write(value: Any, path: str, put: Any, depth: int) -> None:
    kind = type(value)
    if kind is str:
        put(_quote(value))
    elif kind is bool:
        put("true" if value else "false")
    elif kind is int:
        put(repr(value) if -(2**63) <= value < 2**63 else f'{{"$int":"{value:x}"}}')
    elif value is None:
        put("null")
    elif kind is float:
        if not isfinite(value):
            raise CacheKeyError(f"{path} is {value!r}, which equals nothing or no number: no cache key can hold it")
        put(repr(value))
    elif depth > _MAX_DEPTH:
        raise CacheKeyError(f"{path} is nested more than {_MAX_DEPTH} deep: give cache_key_fn=")
    elif kind is dict:
        _write_dict(value, path, put, depth + 1)
    elif kind is list:
        put("[")
        _write_items(value, path, put, depth + 1)
        put("]")
    elif kind is tuple:
        put('{"$tuple":[')
        _write_items(value, path, put, depth + 1)
        put("]}")
    else:
        _write_tagged(kind, value, path, put, depth + 1)


def _write_items(items: Any, path: str, put: Any, depth: int) -> None:
    comma = ""
    for index, item in enumerate(items):
        put(comma)
        _write(item, f"{path}[{index}]", put, depth)
        comma = ","


def _write_dict(value: dict[Any, Any], path: str, put: Any, depth: int) -> None:
    if all(type(key) is str for key in value) and not any(key.startswith("$") for key in value):
        opening = "{"
        for key in sorted(value):
            put(f"{opening}{_quote(key)}:")
            _write(value[key], f"{path}[{key!r}]", put, depth)
            opening = ","
        put("{}" if opening == "{" else "}")
        return
    pairs = []
    for key, item in value.items():
        written: list[str] = ["["]
        _write(key, f"the key {key!r:.80} of {path}", written.append, depth)
        written.append(",")
        _write(item, f"{path}[{key!r:.80}]", written.append, depth)
        pairs.append("".join(written))
    put('{"$dict":[' + "],".join(sorted(pairs)) + "]]}")


def _write_tagged(kind: type, value: Any, path: str, put: Any, depth: int) -> None:
    tag = _TAGS.get(kind)
    if tag is not None:
        put(f'{{"${kind.__name__}":')
        _write(tag(value, path), path, put, depth)
        put("}")
    elif kind is set or kind is frozenset:
        written = sorted(canonical(item, f"an item of {path}") for item in value)
        put(f'{{"${kind.__name__}":[{",".join(written)}]}}')
    else:
        fields = _fields(kind, value)
        if fields is None:
            raise CacheKeyError(
                f"{path} is a {kind.__module__}.{kind.__qualname__}: no cache key can be made of it; "
                "give cache_key_fn=, or pass plain values"
            )
        put(f'{{"$object":[{_quote(f"{kind.__module__}.{kind.__qualname__}")},')
        _write(fields, path, put, depth)
        put("]}")


def _fields(kind: type, value: Any) -> Any:
    """Return what makes up a value of a user's own type, where that is known without calling user code."""
    dataclass_fields = getattr(kind, "__dataclass_fields__", None)
    if dataclass_fields is not None:
        return {name: getattr(value, name) for name in dataclass_fields if hasattr(value, name)}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return list(value)
    import enum

    return value.name if isinstance(value, enum.Enum) else None


def _decimal(value: Any, path: str) -> Any:
    if not value.is_finite():
        raise CacheKeyError(f"{path} is {value!r}, which equals nothing or no number: no cache key can hold it")
    return str(value)


def _moment(value: Any, path: str) -> Any:
    return [value.isoformat(), value.fold, None if value.tzinfo is None else value.tzname()]


class _Tags(dict[type, Any]):
    """Writers by exact type; those of modules that cost something to import are filled in at first need."""

    filled = False

    def get(self, kind: type, default: Any = None) -> Any:
        if not self.filled:
            self._fill()
        return super().get(kind, default)

    def _fill(self) -> None:
        import datetime
        import decimal
        import fractions
        import pathlib
        import uuid

        def text(value: Any, path: str) -> str:
            return str(value)

        self.update(
            {
                bytes: lambda value, path: value.hex(),
                bytearray: lambda value, path: value.hex(),
                complex: lambda value, path: [value.real, value.imag],
                decimal.Decimal: _decimal,
                fractions.Fraction: text,
                uuid.UUID: text,
                datetime.datetime: _moment,
                datetime.time: _moment,
                datetime.date: lambda value, path: value.isoformat(),
                datetime.timedelta: lambda value, path: [value.days, value.seconds, value.microseconds],
                pathlib.PurePosixPath: text,
                pathlib.PosixPath: text,
                pathlib.PureWindowsPath: text,
                pathlib.WindowsPath: text,
            }
        )
        self.filled = True


_TAGS = _Tags()
