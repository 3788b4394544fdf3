"""The WSGI application: ``gunicorn wsgi:app``."""

from __future__ import annotations

import sys

from blueprints.app import create_app
from blueprints.settings import SettingsError

_APP_LOAD_ERROR = 4  # gunicorn's own status for it: its master then gives up, instead of trying for ever

try:
    app = create_app()
except SettingsError as error:
    sys.stderr.write(f"tta_sync: {error}\n")
    sys.exit(_APP_LOAD_ERROR)
