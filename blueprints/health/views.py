"""``/livez`` for who restarts the process, ``/readyz`` for who sends it requests, ``/health`` for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Blueprint

from blueprints.health.checks import Check, ask_all


def create_blueprint(checks: Sequence[Check]) -> Blueprint:
    """Make the health routes over *checks*."""
    bp = Blueprint("health", __name__)

    @bp.get("/livez")
    def livez() -> dict[str, Any]:
        return {"status": "alive"}

    @bp.get("/readyz")
    def readyz() -> tuple[dict[str, Any], int]:
        answers = ask_all(checks)
        ready = all(answer == "ok" for answer in answers.values())
        return {"status": "ready" if ready else "not ready", "checks": answers}, 200 if ready else 503

    @bp.get("/health")
    def health() -> tuple[dict[str, Any], int]:
        failures = [f"{name}: {answer}" for name, answer in ask_all(checks).items() if answer != "ok"]
        if failures:
            return {"status": "unhealthy", "error": "; ".join(failures)}, 503
        return {"status": "healthy"}, 200

    return bp
