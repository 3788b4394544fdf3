"""What a batch looks like on the way in and on the way out."""

from __future__ import annotations

from marshmallow import Schema, fields, validate

from blueprints.documents.schemas import ProcessRequestSchema

MAX_DOCUMENTS = 1_000


def batch_request_schema(max_text: int) -> Schema:
    """Make the schema of 1 to MAX_DOCUMENTS documents, of which one bad one refuses all."""
    documents = fields.List(
        fields.Nested(ProcessRequestSchema(max_text=max_text)),
        required=True,
        validate=validate.Length(1, MAX_DOCUMENTS),
    )
    return Schema.from_dict({"documents": documents}, name="BatchRequestSchema")()


class ResultSchema(Schema):
    """How one document of a batch ended."""

    index = fields.Integer()
    document_id = fields.String(allow_none=True)
    error = fields.String(allow_none=True)


class BatchSchema(Schema):
    """How a batch stands; ``results`` holds the documents that have ended, in input order."""

    id = fields.String()
    status = fields.String()
    total = fields.Integer()
    done = fields.Integer()
    failed = fields.Integer()
    results = fields.List(fields.Nested(ResultSchema))
