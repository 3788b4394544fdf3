"""A pytest plugin for other projects' own tests: tta_sync.async_to_sync in the place of asgiref's.

Only where the environment says so, so that the same command runs them as stock.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import _pytest.monkeypatch
import asgiref.sync
import flask
import pytest

from tta_sync.facade import SyncFacade
from tta_sync.runtime import asgiref_bridge

REPORT = os.environ.get("REPLACED_REPORT")  # where to say what has run on the managed loop; unset: as stock
FACADE = SyncFacade(**json.loads(os.environ.get("REPLACED_OPTIONS", "{}")))

# Flask 3.1.3's conftest uses the name that pytest had for it before 9.
_pytest.monkeypatch.notset = _pytest.monkeypatch.NOTSET


class AsyncToSync(asgiref_bridge.AsyncToSync):
    def __init__(self, awaitable, force_new_loop=False):
        super().__init__(awaitable, force_new_loop, facade=FACADE)


if REPORT:
    asgiref.sync.AsyncToSync = AsyncToSync
    asgiref.sync.async_to_sync = FACADE.async_to_sync
    flask.Flask.async_to_sync = lambda app, function: FACADE.async_to_sync(function)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if REPORT:
        Path(REPORT).write_text(json.dumps({"calls": FACADE.stats().calls}))
