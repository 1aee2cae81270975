import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake():
    """The module ``fake.py`` beside this file, which subprocesses run, too."""
    spec = importlib.util.spec_from_file_location("fake", Path(__file__).with_name("fake.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def front(fake):
    """A service that is ready, before a fake engine."""
    made = fake.Front()
    yield made
    made.engine.stop()


@pytest.fixture
def sockets(front):
    """The same behind sockets: its HTTP and gRPC ports."""
    with front.sockets() as ports:
        yield ports
