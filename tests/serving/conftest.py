"""A running server."""

import pytest
from running_server import Running


@pytest.fixture(scope="module")
def server():
    running = Running(context=300)
    yield running
    running.stop()


@pytest.fixture
def client(server):
    with server.client() as found:
        yield found


@pytest.fixture
def serve():
    """Return what starts servers with other options; they are stopped in the end."""
    made = []

    def start(**options):
        made.append(Running(**options))
        return made[-1]

    yield start
    for one in made:
        one.stop()
