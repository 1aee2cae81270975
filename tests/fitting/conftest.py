import pytest

from tests.fitting import tiny


@pytest.fixture(scope="session")
def fitted():
    """Two heads fitted without interruption."""
    return tiny.fit()
