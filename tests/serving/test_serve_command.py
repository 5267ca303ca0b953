"""klfast serve: the command, asked by curl, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx2
import pytest
import served
from command_line import fails, klf
from tiny_models import tiny

from klfast.cli import serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save(tmp_path_factory.mktemp("models") / "tiny-hybrid")


@pytest.fixture
def command(folder):
    """Return what starts the command, once it listens; killed in the end."""
    started = []

    def start(*arguments):
        words = [sys.executable, "-m", "klfast", "serve", str(folder), "--port", "0", "--threads", "1", "--json"]
        environment = {**os.environ, "KLFAST_API_KEY": "secret"}
        process = subprocess.Popen([*words, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        said = "".join(iter(process.stdout.readline, "}\n")) + "}"
        return process, json.loads(said)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def curl(url, *arguments, key="secret"):
    """Return the body and the status that curl gets."""
    words = [
        "curl",
        "--silent",
        "--no-buffer",
        "--write-out",
        "\n%{http_code}",
        "--header",
        f"Authorization: Bearer {key}",
    ]
    done = subprocess.run([*words, *arguments, url], capture_output=True, text=True, timeout=60, check=True)
    body, status = done.stdout.rsplit("\n", 1)
    return body, int(status)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_before_the_server_runs(monkeypatch, number):
    server = SimpleNamespace(should_exit=False, run=lambda sockets: os.kill(os.getpid(), number))
    monkeypatch.setattr("klfast.serving.api.make_app", lambda *_, **__: None)
    monkeypatch.setattr("klfast.serving.connection.http_server", lambda *_, **__: server)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serve._run(SimpleNamespace(name="mine"), listener, as_json=True)
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert server.should_exit


@pytest.mark.slow
def test_serves_until_it_is_stopped(command):
    process, said = command("--name", "mine")
    url, ask = said["url"], ["--json", json.dumps(dict(model="mine", prompt="The sea", temperature=0, max_tokens=9))]
    assert said["model"] == "mine" and url.startswith("http://127.0.0.1:")
    body, status = curl(f"{url}/completions", *ask)
    prompt = served.ids("The sea")
    text = served.text_after(prompt, served.alone(prompt, 9))
    assert status == 200 and json.loads(body)["choices"][0]["text"] == text
    assert curl(f"{url}/completions", *ask, key="other")[1] == 401
    assert curl(f"{url}/completions", "--json", "{")[1] == 400
    assert curl(url.removesuffix("v1") + "health", key="")[1] == 200

    # What runs is finished after the signal, and nothing new is taken.
    more = dict(model="mine", prompt="A boat", temperature=0, max_tokens=1500, stream=True)
    headers = {"Authorization": "Bearer secret"}
    with httpx2.stream("POST", f"{url}/completions", json=more, headers=headers, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        events = [next(lines)]
        process.send_signal(signal.SIGTERM)
        events += lines
    assert events.pop() == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    prompt = served.ids("A boat")
    made = served.alone(prompt, 1500)
    assert "".join(choice["text"] for choice in choices) == served.text_after(
        prompt, [token for token in made if token != served.words().eos_token_id]
    )
    assert process.wait(20) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)],
    ids=lambda number: number.name,
)
def test_a_second_signal_ends_at_once(command, first, second):
    process, said = command()
    url, seen = said["url"], threading.Event()
    assert said["model"] == "tiny-hybrid"

    def read():
        body = dict(model="tiny-hybrid", prompt="A boat", max_tokens=8000, stream=True)
        headers = {"Authorization": "Bearer secret"}
        with httpx2.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as stream:
            try:
                for _ in stream.iter_lines():
                    seen.set()
            except httpx2.RemoteProtocolError:
                pass

    reader = threading.Thread(target=read)
    reader.start()
    assert seen.wait(60)
    process.send_signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(second)
    process.wait(20)
    reader.join()


def test_options_reach_the_application(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(serve, "_run", lambda *_, **options: seen.update(options))
    klf("serve", folder, "--port", 0, "--cors", "https://example.org:8080", "--cors", "*", "--log-requests")
    assert seen["origins"] == ["https://example.org:8080", "*"] and seen["logs_requests"]
    klf("serve", folder, "--port", 0, "--api-key", "secret", "--request-bytes", "1kB")
    assert seen == {"key": "secret", "most_bytes": 1000, "origins": (), "logs_requests": False}


def test_what_cannot_be_served(folder, tmp_path):
    tiny("phi", vocabulary=len(served.words())).save_pretrained(tmp_path / "phi")
    served.words().save_pretrained(tmp_path / "phi")
    assert "klfast serves models that its native engine runs, but the engine does not know models of type phi" in fails(
        "serve", tmp_path / "phi", "--port", "0"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in fails("serve", folder, "--port", port)
    assert "cannot listen on no.such.host.invalid" in fails("serve", folder, "--host", "no.such.host.invalid")
    assert "printable ASCII" in fails("serve", folder, "--api-key", "", code=2)
    assert "is not a size" in fails("serve", folder, "--prefix-cache", "much", code=2)
    for origin in ("https://example.org/", "example.org", "HTTPS://example.org", "://", ""):
        said = fails("serve", folder, "--cors", "http://localhost:3000", "--cors", origin, code=2)
        assert "--cors takes an origin such as https://example.org:8080" in said


def test_says_which_package_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "klfast serve needs the package uvicorn: pip install 'klfast[serve]'" in fails("serve", folder)
