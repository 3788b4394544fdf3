"""What the tests of the seams share."""

from __future__ import annotations

import pytest


@pytest.fixture
def url(patient_redis_url: str) -> str:
    """The session's Redis, with which these tests have patience: few of them are about time."""
    return patient_redis_url
