"""What a document looks like on the way in and on the way out."""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates

from tta_sync.marshmallow import SafeString

TASKS = ("summary", "keywords", "language")


class Tasks(fields.Field[list[str]]):
    """Which of TASKS to do: a list, in any order; its errors are one flat list of messages."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **options: Any) -> list[str]:
        if not isinstance(value, list):
            raise ValidationError("Not a list of tasks.")
        if not value:
            raise ValidationError("Name one task or more, or leave it out.")
        if any(not isinstance(task, str) or task not in TASKS for task in value):
            raise ValidationError(f"Unknown task: the tasks are {', '.join(TASKS)}.")
        return [task for task in TASKS if task in value]


class ProcessRequestSchema(Schema):
    """One text to process.

    Args:
        max_text: the most characters that a text may have.
    """

    text = SafeString(required=True)
    tasks = Tasks(load_default=lambda: list(TASKS))

    def __init__(self, *, max_text: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_text = max_text

    @validates("text")
    def _check_text(self, value: str, data_key: str) -> None:
        if len(value) > self._max_text:
            raise ValidationError(f"Longer than {self._max_text} characters.")
        if not value or value.isspace():
            raise ValidationError("Holds nothing but white space.")


class StreamRequestSchema(ProcessRequestSchema):
    """One text to process, whose summary is to be streamed."""

    @validates("tasks")
    def _check_tasks(self, value: list[str], data_key: str) -> None:
        if "summary" not in value:
            raise ValidationError("A stream is the summary's: ask for it, or use /api/process.")


class DocumentSchema(Schema):
    """A processed document, as every route gives it."""

    id = fields.String()
    summary = fields.String(allow_none=True)
    keywords = fields.List(fields.String())
    language = fields.String(allow_none=True)
    word_count = fields.Integer()
    provider = fields.String(allow_none=True)
    degraded = fields.Boolean()
    cached = fields.Boolean()
    correlation_id = fields.String()
    created_at = fields.AwareDateTime(format="iso")


class PlainInteger(fields.Integer):
    """An integer written in plain digits: int() would take "1_0", "+5" and other alphabets' digits as well."""

    def _validated(self, value: Any) -> Any:
        if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class PageRequestSchema(Schema):
    """Which page of a listing."""

    limit = PlainInteger(load_default=20, validate=validate.Range(1, 100))
    cursor = fields.String(load_default=None)


class PageSchema(Schema):
    """A page of documents, newest first, and where the next one begins."""

    items = fields.List(fields.Nested(DocumentSchema))
    next_cursor = fields.String(allow_none=True)
