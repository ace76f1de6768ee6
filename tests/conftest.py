"""Fixtures that several files of tests use."""

from hub_server import hub

__all__ = ["hub"]
