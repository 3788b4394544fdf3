"""wsgi.py: what gunicorn imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_wsgi_has_the_application_ready_when_it_is_imported(tmp_path: Path) -> None:
    """`wsgi:app` is the service, with what its first request needs loaded and no thread begun."""
    program = (
        "import threading, wsgi; from blueprints.documents import local; "
        "print(wsgi.app.name, local._model._identifier is not None, threading.active_count())"
    )
    done = run(program, TTA_DATA_DIR=str(tmp_path))
    assert done.stdout.split() == ["tta_sync_service", "True", "1"], done.stderr


def test_wsgi_says_one_line_and_stops_gunicorn_when_a_setting_is_bad(tmp_path: Path) -> None:
    """A bad setting is one line, and the status at which gunicorn's master does not try again."""
    done = run("import wsgi", TTA_DATA_DIR=str(tmp_path), TTA_LLM_TIMEOUT="soon")
    assert done.returncode == 4
    assert done.stderr.startswith("tta_sync: TTA_LLM_TIMEOUT")
    assert done.stderr.count("\n") == 1
