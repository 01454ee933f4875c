"""Fixtures that several rooms share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    """The folder of golden vectors and real samples beside the checkout; tests that want it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder with golden vectors and samples beside the checkout")
    return SHARED
