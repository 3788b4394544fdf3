"""What comes in: strict JSON, bounded, with text that can be stored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NoReturn, Protocol

from flask import Request, current_app, request
from werkzeug.exceptions import RequestEntityTooLarge

from tta_sync.flask.problems import MAX_FIELDS, Problem, flatten_errors, printable


class Schema(Protocol):
    """What is asked of a schema: marshmallow's, or anything with the same two methods."""

    def load(self, data: Any) -> Any: ...

    def dump(self, obj: Any) -> Any: ...


_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object names a member twice")
    return members


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def parse_json(body: bytes, max_depth: int = 100) -> Any:
    """Parse *body* as RFC 8259 has it, UTF-8 and nothing else.

    NaN and Infinity, numbers too large to hold, an object that names a member twice (parsers read it differently, and
    attackers know it) and nesting deeper than *max_depth* are refused.

    Raises:
        Problem: 400 ``malformed_json``.
    """
    try:
        data = _decoder.decode(body.decode("utf-8-sig"))
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _malformed("it is empty" if not body.strip() else f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # ours, or an int of more digits than Python reads
        raise _malformed(printable(error)) from None
    if body.count(b"[") + body.count(b"{") > max_depth and _deeper(data, max_depth):
        raise _malformed("it is nested too deeply")
    return data


def _malformed(why: str) -> Problem:
    return Problem(400, "malformed_json", f"The body is not JSON that can be read: {why}.")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _deeper(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [child for value in level for child in _children(value) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def unsafe_strings(data: Any) -> dict[str, list[str]]:
    """Return field errors for every string in *data*, keys too, that has a NUL or a lone surrogate."""
    errors: dict[str, list[str]] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    while waiting and len(errors) < MAX_FIELDS:
        path, value = waiting.pop()
        if isinstance(value, str):
            _check(value, path, errors)
        elif isinstance(value, list):
            waiting.extend(((*path, i), child) for i, child in enumerate(value) if isinstance(child, (str, list, dict)))
        elif isinstance(value, dict):
            for key, child in value.items():
                _check(key, (*path, key), errors)
                waiting.append(((*path, key), child))
    return errors


def _check(text: str, path: tuple[Any, ...], errors: dict[str, list[str]]) -> None:
    if "\x00" in text:
        why = "Contains a NUL character."
    else:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            why = "Contains a lone surrogate, which is not a character."
        else:
            return
    fold: Any = [why]
    for part in reversed(path or ("_schema",)):
        fold = {part: fold}
    for field, messages in flatten_errors(fold).items():
        errors.setdefault(field, []).extend(messages)


def load(schema: Schema, source: Literal["json", "query"]) -> Any:
    """Load the current request with *schema*.

    Raises:
        Problem: 400 not JSON, 413 too long, 415 not declared as JSON, 422 a NUL or a lone surrogate somewhere in it.
        marshmallow.ValidationError: it does not fit.
    """
    if source == "query":
        data: Any = _query(schema)
        suspicious = True
    else:
        config = current_app.config
        body = _body(config["TTA_MAX_BODY"])
        data = parse_json(body, config["TTA_MAX_DEPTH"])
        suspicious = _SUSPICIOUS.search(body) is not None
    if suspicious:
        errors = unsafe_strings(data)
        if errors:
            raise Problem(422, "validation_error", "Some fields are not valid.", errors=errors)
    return schema.load(data)


def _body(most: int) -> bytes:
    asked: Request = request._get_current_object()  # type: ignore[attr-defined]  # each use of the proxy costs 1 µs
    environ = asked.environ
    if (
        environ.get("CONTENT_TYPE") != "application/json"
        and asked.mimetype != "application/json"
        and not asked.mimetype.endswith("+json")
    ):
        raise Problem(415, "unsupported_media_type", "Send the body as application/json.")
    if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise Problem(415, "unsupported_media_type", "Send the body without a Content-Encoding.")
    return read_body(most)


def read_body(most: int) -> bytes:
    """Return the current request's body, which the view can still read; at most *most* bytes, or what Flask is told.

    Raises:
        RequestEntityTooLarge: it is longer.
    """
    asked: Request = request._get_current_object()  # type: ignore[attr-defined]  # each use of the proxy costs 1 µs
    limit = asked.max_content_length
    if limit is None:
        limit = asked.max_content_length = most
    body = asked.get_data(cache=True)
    # Werkzeug stops reading a chunked body at the limit, without a word: is there more?
    if len(body) >= limit and asked.content_length is None and asked.environ["wsgi.input"].read(1):
        raise RequestEntityTooLarge
    return body


def _query(schema: Schema) -> dict[str, Any]:
    """Return the query string as data: a list where the schema's field is one, else the single value."""
    from marshmallow.fields import List

    lists = {field.data_key or name for name, field in getattr(schema, "fields", {}).items() if isinstance(field, List)}
    data: dict[str, Any] = {}
    for name, values in request.args.lists():
        if name in lists:
            data[name] = values
        elif len(values) == 1:
            data[name] = values[0]
        else:
            raise Problem(
                422, "validation_error", "Some fields are not valid.", errors={name: ["Given more than once."]}
            )
    return data
