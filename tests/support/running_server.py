"""A running server, and the name of its model."""

import threading
import time

import openai
import served

from klfast.serving.api import make_app
from klfast.serving.connection import MOST_CONNECTIONS, PATIENCE, http_server
from klfast.serving.service import Service

NAME = "tiny"


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, patience=PATIENCE, most_connections=MOST_CONNECTIONS, of_app=None, **options):
        self.service = Service(served.model(), served.words(), NAME, **options)
        app = make_app(self.service, **of_app or {})
        self.server = http_server(app, patience=patience, most_connections=most_connections)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.address = self.server.servers[0].sockets[0].getsockname()
        self.root = f"http://127.0.0.1:{self.address[1]}"
        self.url = f"{self.root}/v1"

    def client(self, key="none"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def stop(self):
        self.server.should_exit = True
        self._thread.join()
