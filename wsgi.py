"""The WSGI application: ``gunicorn wsgi:app``."""

from __future__ import annotations

import sys

from blueprints.app import create_app
from blueprints.documents.local import load_language_model
from blueprints.settings import SettingsError

_APP_LOAD_ERROR = 4  # gunicorn's own status for it: its master then gives up, instead of trying for ever

try:
    app = create_app()
    load_language_model()  # here, so that no request's deadline has to pay for it
except SettingsError as error:
    sys.stderr.write(f"tta_sync: {error}\n")
    sys.exit(_APP_LOAD_ERROR)
