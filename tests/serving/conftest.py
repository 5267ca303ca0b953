"""A running server, and schedulers without one."""

import pytest
import served
from running_server import Running

from klfast.generation.engine import lower
from klfast.serving.metrics import Metrics
from klfast.serving.prefix_cache import PrefixCache
from klfast.serving.scheduler import Scheduler


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


@pytest.fixture
def start(one_thread):
    """Return what makes schedulers; they are closed in the end."""
    made = []

    def scheduler(model=None, engine=None, cache_bytes=10**8, rows=64, **options):
        engine = engine or lower(model or served.model(), rows)
        found = Scheduler(engine, PrefixCache(cache_bytes), Metrics(), **options)
        made.append(found)
        return found

    yield scheduler
    for one in made:
        one.close(finish=False)
        assert not one.is_alive
