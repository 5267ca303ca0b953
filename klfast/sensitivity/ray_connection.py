"""The connection to a Ray cluster, and whether it still holds."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from klfast.core.errors import ClusterError, InvalidInputError

_GONE_SECONDS = 15.0  # out of reach, until the cluster counts as gone; after 60 Ray itself ends the process
_CONNECT_SECONDS = 2.0


@contextmanager
def connected() -> Iterator[None]:
    """Connect to a Ray cluster unless this process is: to that at RAY_ADDRESS, or else to one that starts here.

    Raises:
        InvalidInputError: the package ray is not installed, or RAY_ADDRESS is that of a Ray Client.
        ClusterError: there is no cluster at RAY_ADDRESS, or it has other versions of Ray or Python.
    """
    try:
        import ray
    except ImportError:
        raise InvalidInputError(
            "engine=\"ray\" needs the package ray, which is not installed: pip install 'klfast[ray]'"
        ) from None
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"  # not Ray's guess, which may be a cluster that is gone
    _require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here reports to nobody
    try:
        ray.init(address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"there is no Ray cluster to connect to: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ClusterError if nothing listens at HOST:PORT, to which Ray would try to connect for minutes."""
    if "://" in address:
        raise InvalidInputError(f"a sweep runs on a node of the Ray cluster, not behind {address}; start it there")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            _reach(host, int(port))
        except OSError as error:
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS, {address} ({error})") from error


def _reach(host: str, port: int) -> None:
    socket.create_connection((host.strip("[]"), port), _CONNECT_SECONDS).close()


class Watch:
    """Looks whether the cluster is there. Ray's own calls would wait for it, and then end the process."""

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self._servers = (host, int(port)), (own["NodeManagerAddress"], own["NodeManagerPort"])
        self._seen = time.monotonic()

    def look(self) -> None:
        """Raise ClusterError if its head, or this node, has been out of reach for long."""
        try:
            for server in self._servers:
                _reach(*server)
        except OSError as error:
            if time.monotonic() - self._seen > _GONE_SECONDS:
                raise ClusterError(f"the Ray cluster is gone ({error}); run the sweep again to go on") from error
        else:
            self._seen = time.monotonic()
