"""What a job looks like on the way out."""

from __future__ import annotations

from marshmallow import Schema, fields


class ProgressSchema(Schema):
    """How far a job says it has come."""

    done = fields.Float(allow_none=True)
    total = fields.Float(allow_none=True)
    message = fields.String(allow_none=True)
    at = fields.String(allow_none=True)


class JobSchema(Schema):
    """How a job stands. Times are ISO 8601 with their zone; ``status`` is RQ's."""

    id = fields.String()
    status = fields.String()
    queue = fields.String()
    progress = fields.Nested(ProgressSchema, allow_none=True)
    enqueued_at = fields.AwareDateTime(allow_none=True)
    started_at = fields.AwareDateTime(allow_none=True)
    ended_at = fields.AwareDateTime(allow_none=True)
    cancel_requested = fields.Boolean()
    result = fields.Raw(allow_none=True)
    error = fields.String(allow_none=True)


class CancelSchema(Schema):
    """What came of the request to cancel a job."""

    id = fields.String()
    cancel = fields.String()
