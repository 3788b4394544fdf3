"""marshmallow at the edges: schemas as steps, and text that every store can hold.

``load_step(Schema)`` and ``dump_step(Schema)`` are for data that comes from inside a workflow, a provider's answer say.
What comes from outside is loaded before a workflow exists: ``tta_sync.flask`` and ``tta_sync.rq`` do it with ``load=``.
"""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, ValidationError, fields

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import WorkflowPrimitive

__all__ = ["DumpPrimitive", "LoadPrimitive", "SafeString", "ValidationError", "dump_step", "load_step"]


def _instance(schema: Schema | type[Schema], many: bool | None) -> Schema:
    """Return *schema* as an instance, made once: building a schema costs a hundred times what using it does."""
    if isinstance(schema, type) and issubclass(schema, Schema):
        return schema(many=bool(many))
    if isinstance(schema, Schema):
        return schema
    raise ConfigurationError(f"a step over data needs a marshmallow Schema, class or instance, not {schema!r}")


class _SchemaPrimitive(WorkflowPrimitive[Any, Any]):
    def __init__(self, schema: Schema | type[Schema], *, many: bool | None = None, name: str | None = None) -> None:
        self.schema = _instance(schema, many)
        self.many = many  # None: as the schema says
        self.name = name or f"{self._verb}({type(self.schema).__name__})"

    _verb = "schema"


class LoadPrimitive(_SchemaPrimitive):
    """Validate and deserialize the data with a schema; its result is what the next step gets.

    Raises:
        marshmallow.ValidationError: the data does not fit; it passes through as itself, and leaves Flask as a 422.
    """

    _verb = "load_step"

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        return self.schema.load(data, many=self.many)


class DumpPrimitive(_SchemaPrimitive):
    """Serialize the data with a schema: only the schema's fields come out, as plain types."""

    _verb = "dump_step"

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        return self.schema.dump(data, many=self.many)


def load_step(schema: Schema | type[Schema], *, many: bool | None = None, name: str | None = None) -> LoadPrimitive:
    """Make a step of ``schema.load``.

    Raises:
        ConfigurationError: *schema* is no marshmallow Schema.
    """
    return LoadPrimitive(schema, many=many, name=name)


def dump_step(schema: Schema | type[Schema], *, many: bool | None = None, name: str | None = None) -> DumpPrimitive:
    """Make a step of ``schema.dump``.

    Raises:
        ConfigurationError: *schema* is no marshmallow Schema.
    """
    return DumpPrimitive(schema, many=many, name=name)


class SafeString(fields.String):
    """A string that PostgreSQL, UTF-8 and other people's parsers can hold: no NUL, no lone surrogate.

    Both are legal in JSON (``"\\\\u0000"``, ``"\\\\ud800"``) and fail only later: PostgreSQL refuses NUL in text, and a
    lone surrogate has no UTF-8 form.
    """

    default_error_messages: Any = {  # noqa: RUF012  # marshmallow's own way
        "nul": "Contains a NUL character.",
        "surrogate": "Contains a lone surrogate, which is not a character.",
    }

    def _deserialize(self, value: Any, attr: str | None, data: Any, **options: Any) -> str:
        text: str = super()._deserialize(value, attr, data, **options)
        if "\x00" in text:
            raise self.make_error("nul")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.make_error("surrogate") from error
        return text
