"""Names of Unix sockets."""

import contextlib
import os
import uuid

import pytest


@pytest.fixture
def name():
    """Of a Unix socket, whose file is gone afterwards."""
    found = f"bridge_{uuid.uuid4().hex}"
    yield found
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"/tmp/ipi_{found}")
