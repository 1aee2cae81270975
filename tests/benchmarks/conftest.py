"""A service with room for all requests of a test, in front of the fake engine, and its sockets."""

import dataclasses

import pytest

from tests.serve import fake


@pytest.fixture
def front():
    """A service that is ready."""
    made = fake.Front(limits=dataclasses.replace(fake.LIMITS, capacity=1000))
    yield made
    made.engine.stop()


@pytest.fixture
def sockets(front):
    """Its HTTP and gRPC ports."""
    with front.sockets() as ports:
        yield ports
