"""Fixtures that several files of tests use, and one thread a process: the tests run beside one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hub_server import hub  # noqa: E402

__all__ = ["hub"]
