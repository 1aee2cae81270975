"""The fronts of the server's tests."""

from tests.serve.conftest import front, sockets

__all__ = ["front", "sockets"]
