"""Clients who dawdle, lie or flood: each gets an answer or a closed connection, and the others get theirs."""

import json
import re
import socket
import threading
import time

import httpx2
import psutil
import pytest
from pydantic import ValidationError
from running_server import NAME, Running

from klfast.serving.requests import ChatRequest, CompletionRequest

PATIENCE = 0.3
LONG = 10**5  # tokens, which nobody waits for
ASK = json.dumps({"model": NAME, "prompt": "The sea", "max_tokens": 2, "temperature": 0}).encode()
LENGTH = len(ASK)


@pytest.fixture(scope="module")
def server():
    running = Running(context=2 * LONG, patience=PATIENCE)
    yield running
    assert httpx2.post(f"{running.url}/completions", json=json.loads(ASK)).status_code == 200
    end = time.monotonic() + 60  # nothing is left of them
    while running.server.server_state.connections or running.server.server_state.tasks:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "klfast_running_answers 0.0" in running.service.metrics.text().decode()
    running.stop()


@pytest.fixture
def connect(server):
    """Return what opens connections."""
    made = []

    def start(*sent):
        made.append(socket.create_connection(server.address, timeout=10))
        for part in sent:
            made[-1].sendall(part)
        return made[-1]

    yield start
    for one in made:
        one.close()


def head(length=LENGTH, *more, path="/v1/completions"):
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answers(connection):
    """Return the statuses and the last message of all that comes until the connection is closed."""
    found = b""
    try:
        while part := connection.recv(2**16):
            found += part
    except ConnectionResetError:
        pass
    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", found)]
    message = json.loads(found.rsplit(b"\r\n\r\n", 1)[1])["error"]["message"] if b'"error"' in found else ""
    return statuses, message


def drip(connection, content):
    """Send a byte at a time until nobody takes any more."""
    try:
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        pass


LATE = ([408], "the request did not arrive within 0.3 seconds")


@pytest.mark.parametrize(
    "begun", [b"", b"POST /v1/comp", head()[:-2], head(), head() + ASK[:9]], ids=lambda begun: str(len(begun))
)
def test_half_a_request(connect, begun):
    assert answers(connect(begun)) == LATE


@pytest.mark.parametrize(("at_once", "slow"), [(b"", head()), (head(), ASK)], ids=["head", "body"])
def test_a_byte_at_a_time(connect, at_once, slow):
    connection = connect(at_once)
    thread = threading.Thread(target=drip, args=(connection, slow * 9))
    thread.start()
    assert answers(connection) == LATE
    thread.join()


def test_a_body_that_goes_on_after_its_answer(connect):
    connection = connect(head(path="/v1/nothing"))
    thread = threading.Thread(target=drip, args=(connection, ASK))
    thread.start()
    assert answers(connection) == ([404], "Not Found")
    thread.join()


def test_half_of_a_second_request(connect):
    assert answers(connect(head() + ASK + head() + ASK[:9])) == ([200, 408], LATE[1])


def ended(server, how=".*"):
    """Return how many answers have ended: in some way, such as "cancelled", or at all."""
    counts = re.findall(rf'klfast_answers_total\{{end="{how}"\}} (.*)', server.service.metrics.text().decode())
    return sum(map(float, counts))


def test_a_stream_that_nobody_reads(server, connect):
    body = json.dumps({"model": NAME, "prompt": "The sea", "max_tokens": LONG, "n": 8, "stream": True, "logprobs": 20})
    server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    before, unwanted, connection = ended(server), ended(server, "cancelled"), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.address)
    connection.sendall(head(len(body)) + body.encode())
    end = time.monotonic() + 60
    while ended(server) < before + 8:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ended(server, "cancelled") > unwanted  # some may have met the end of their text
    connection.close()


NOT_HTTP = {
    "two lengths": head(LENGTH, "Content-Length: 5"),
    "two lengths in one": head(f"{len(ASK)}, 5"),
    "a negative length": head(-1),
    "a hexadecimal length": head("0x10"),
    "a length with a sign": head("+5"),
    "a length of 5000 digits": head("9" * 5000),
    "two encodings": head(LENGTH, "Transfer-Encoding: gzip, chunked"),
    "an unknown encoding": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "a space before the colon": head(LENGTH, "Transfer-Encoding : chunked"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a bare carriage return": head(LENGTH, "X: a\rContent-Length: 0"),
    "a zero byte": head(LENGTH, "X: a\0b"),
    "a line end in the path": b"GET /health\r\nX: y HTTP/1.1\r\nHost: x\r\n\r\n",
    "a head without end": b"GET /health HTTP/1.1\r\nX: " + b"a" * 2**17,
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_what_is_not_http(connect, sent):
    assert answers(connect(sent + ASK)) == ([400], "Invalid HTTP request received.")


CHUNKED = f"{len(ASK):x}\r\n".encode() + ASK + b"\r\n0\r\n\r\n"


def test_a_length_beside_chunks(connect):
    """One server in a row would read the one, the next the other, and take the rest for a request."""
    found = answers(connect(head(len(CHUNKED), "Transfer-Encoding: chunked") + CHUNKED + head() + ASK))
    assert found == ([400], "a request has a Content-Length or a Transfer-Encoding, not both")


@pytest.mark.parametrize("more", ["X: a\r\n Content-Length: 5", "X: a\r\n\tTransfer-Encoding: chunked"])
def test_a_folded_header_is_one_header(connect, more):
    assert answers(connect(head(LENGTH, more, "Connection: close") + ASK))[0] == [200]


@pytest.mark.parametrize("name", ["../../etc/passwd", "%2e%2e%2fetc%2fpasswd", "tiny%00", "%ff", "tiny/", "a" * 60000])
def test_names_of_models_are_no_paths(connect, name):
    found = answers(connect(f"GET /v1/models/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()))
    assert found[0] == [404] and found[1].startswith("no model ") and "\n" not in found[1]


SIZE = 2**20 - 200  # bytes of a body
BODIES = {
    "lists in lists": "[" * SIZE,
    "objects in objects": '{"a":' * (SIZE // 5),
    "a number of a million digits": "9" * SIZE,
    "a token beyond 64 bits": f"[{10**30}]",
    "empty lists": f"[{'[],' * (SIZE // 3)}[]]",
    "objects": f"[{'{},' * (SIZE // 3)}1]",
    "words among numbers": f"""[1{',"a"' * (SIZE // 4)}]""",
    "booleans": f"[{'true,' * (SIZE // 5)}1]",
    "a hundred thousand keys": '"a",' + ",".join(f'"{i}":1' for i in range(SIZE // 11)),
}


@pytest.mark.parametrize("prompt", BODIES.values(), ids=BODIES.keys())
def test_bodies_that_are_much_to_check(server, prompt):
    body = f'{{"model":"tiny","prompt":{prompt}}}'
    found = httpx2.post(f"{server.url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400 and len(found.text) < 1000


def test_one_error_is_enough():
    """All errors of a body of 1 MiB took seconds, in which nobody had an answer."""
    many = range(9)
    for asked, body in (
        (CompletionRequest, {"model": "", "prompt": [1] + ["a"] * 9}),
        (CompletionRequest, {"model": "", "prompt": [[] for _ in many]}),
        (CompletionRequest, {"model": "", "prompt": "", "stop": [1 for _ in many]}),
        (CompletionRequest, {"model": "", "prompt": "", **{str(i): 1 for i in many}}),
        (ChatRequest, {"model": "", "messages": [{} for _ in many]}),
        (ChatRequest, {"model": "", "messages": [{"role": "user", "content": [{} for _ in many]}]}),
        (ChatRequest, {"model": "", "messages": [{"role": "user", "content": "", **{str(i): 1 for i in many}}]}),
    ):
        with pytest.raises(ValidationError) as caught:
            asked.model_validate(body)
        assert caught.value.error_count() <= 4  # one of each form that a value may have


def test_too_many_connections(serve):
    server = serve(most_connections=3)
    held = [socket.create_connection(server.address) for _ in range(3)]
    deadline = time.monotonic() + 60
    while len(server.server.server_state.connections) < 3:
        assert time.monotonic() < deadline
    with socket.create_connection(server.address) as one_more:
        assert answers(one_more) == ([503], "too many connections; try again later")
    held.pop().close()
    while len(server.server.server_state.connections) > 2:
        assert time.monotonic() < deadline
    assert httpx2.get(f"{server.root}/health").status_code == 200
    for one in held:
        one.close()


@pytest.mark.slow
def test_a_thousand_connections_and_hundreds_of_megabytes(serve):
    """The memory of the process hardly grows, and one client among them has its answers."""
    server, process = serve(context=100), psutil.Process()
    ask = dict(url=f"{server.url}/completions", json=json.loads(ASK), timeout=60)
    chunk, limit, begin = b"a" * 2**20, 64 * 2**20, []

    def send_much(connection):
        connection.sendall(head(100 * 2**20))
        for _ in range(100):
            connection.sendall(chunk)
        begin.append(connection.recv(12))

    assert httpx2.post(**ask).status_code == 200
    before = process.memory_info().rss
    idle = [socket.create_connection(server.address) for _ in range(1000)]
    for one in idle[:900]:
        one.sendall(head()[:40])
    senders = [threading.Thread(target=send_much, args=(one,)) for one in idle[990:]]
    for one in senders:
        one.start()
    for _ in range(20):
        assert httpx2.post(**ask).status_code == 200
        assert process.memory_info().rss - before < limit
    for one in senders:
        one.join()
    assert begin == [b"HTTP/1.1 413"] * 10
    for one in idle:
        one.close()
