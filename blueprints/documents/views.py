"""``POST /api/process`` and the documents that came of it."""

from __future__ import annotations

import re
from typing import Any

from flask import Blueprint, Response

from blueprints.db import Database
from blueprints.documents.schemas import (
    DocumentSchema,
    PageRequestSchema,
    PageSchema,
    ProcessRequestSchema,
    StreamRequestSchema,
)
from blueprints.documents.store import BadCursorError, Pages, Results, read_document, save_document
from blueprints.documents.stream import DocumentStream, respond
from blueprints.documents.workflow import build_branches, complete_flow
from blueprints.settings import Settings
from tta_sync import iterate_sync, run_sync
from tta_sync.flask import Problem, TTASync

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_id(text: str) -> bool:
    """Say whether *text* can be an id of ours; nothing else is worth asking the database for."""
    return _ID.fullmatch(text) is not None


def create_blueprint(tta: TTASync, settings: Settings, database: Database) -> Blueprint:
    """Make the document routes."""
    bp = Blueprint("documents", __name__, url_prefix="/api")
    pages = Pages(settings.load_secret())
    branches = build_branches(settings)
    document_stream = DocumentStream(branches)
    stream_request = StreamRequestSchema(max_text=settings.max_text)
    document_schema, page_request, page_schema = DocumentSchema(), PageRequestSchema(unknown="exclude"), PageSchema()

    @bp.post("/process")
    @tta.workflow(
        complete_flow(settings, branches),
        load=ProcessRequestSchema(max_text=settings.max_text),
        dump=document_schema,
        unit_of_work=database.units,
    )
    def process(document: dict[str, Any]) -> dict[str, Any]:
        return document

    @bp.post("/process/stream")
    def process_stream() -> Response:
        def save(results: Results) -> dict[str, Any]:
            # Once the provider is done: no transaction is held while a client reads.
            saved: dict[str, Any] = document_schema.dump(database.units.run(run_sync, save_document, results))
            return saved

        return respond(iterate_sync(document_stream, tta.load(stream_request)), save)

    @bp.get("/documents/<document_id>")
    def show(document_id: str) -> Any:
        with database.reads as unit:
            document = read_document(unit.session, document_id) if is_id(document_id) else None
            if document is None:
                raise Problem(404, "no_such_document", "There is no document with this id.")
            return document_schema.dump(document)

    @bp.get("/documents")
    def index() -> Any:
        asked = tta.load(page_request, source="query")
        try:
            with database.reads as unit:
                return page_schema.dump(pages.read(unit.session, asked["limit"], asked["cursor"]))
        except BadCursorError:
            raise Problem(400, "bad_cursor", "This cursor is not one of ours: leave it out to begin anew.") from None

    return bp
