"""What can be turned on: web pages of other origins, and a line for each request."""

import re
import time

import httpx2
import pytest
from running_server import NAME

ORIGIN, KEY = "https://example.org", {"Authorization": "Bearer right"}
BODY = dict(model=NAME, prompt="The sea", max_tokens=4, temperature=0)


def preflight(server, origin, headers="authorization,content-type,x-stainless-os"):
    """Ask what a browser asks before a page's script may send a request."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return httpx2.options(f"{server.url}/completions", headers={"Origin": origin, **asked})


@pytest.mark.parametrize(("origins", "allowed"), [([ORIGIN, "http://localhost:3000"], ORIGIN), (["*"], "*")])
def test_pages_of_other_origins(serve, origins, allowed):
    server = serve(of_app={"key": "right", "origins": origins})
    found = preflight(server, ORIGIN)
    assert found.status_code == 200 and found.headers["Access-Control-Allow-Origin"] == allowed
    assert "POST" in found.headers["Access-Control-Allow-Methods"]
    assert "x-stainless-os" in found.headers["Access-Control-Allow-Headers"]
    for headers, status in ((KEY, 200), ({}, 401)):  # scripts may read errors, too
        found = httpx2.post(f"{server.url}/completions", json=BODY, headers={"Origin": ORIGIN, **headers})
        assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (status, allowed)
        assert "Access-Control-Allow-Credentials" not in found.headers


def test_pages_of_origins_that_are_not_let_in(serve, server):
    one = serve(of_app={"origins": [ORIGIN]})
    assert preflight(one, "https://example.com").status_code == 400
    for each, origin in ((one, "https://example.com"), (server, ORIGIN)):  # the latter has no origins at all
        found = httpx2.post(f"{each.url}/completions", json=BODY, headers={"Origin": origin})
        assert found.status_code == 200 and "Access-Control-Allow-Origin" not in found.headers
    assert preflight(server, ORIGIN).status_code == 405


def test_a_fault_in_the_server_is_a_reply_that_pages_may_read_and_metrics_count(serve, monkeypatch, capfd):
    server = serve(of_app={"origins": [ORIGIN]})
    monkeypatch.setattr(server.service, "start", lambda *_, **__: 1 // 0)
    found = httpx2.post(f"{server.url}/completions", json=BODY, headers={"Origin": ORIGIN})
    assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (500, ORIGIN)
    error = dict(message="internal error: ZeroDivisionError", type="server_error", param=None, code=None)
    assert found.json() == {"error": error}
    counted = 'klfast_replies_total{path="/v1/completions",status="500"} 1.0'
    assert counted in httpx2.get(f"{server.root}/metrics").text
    assert "ZeroDivisionError" in capfd.readouterr().err
    monkeypatch.undo()
    assert httpx2.post(f"{server.url}/completions", json=BODY).status_code == 200


def test_a_line_for_each_request(serve, capfd):
    server = serve(of_app={"key": "right", "logs_requests": True, "most_bytes": 1000})
    tokens = httpx2.post(f"{server.url}/completions", json=BODY, headers=KEY).json()["usage"]
    events = httpx2.post(f"{server.url}/completions", json=BODY | {"stream": True}, headers=KEY).text
    assert events.endswith("[DONE]\n\n")
    httpx2.get(f"{server.root}/health?secret=word")
    httpx2.get(f"{server.root}/\N{BELL}%0a%1b", headers=KEY)
    httpx2.post(f"{server.url}/completions", json=BODY)
    httpx2.post(f"{server.url}/completions", json=BODY | {"n": 99}, headers=KEY)
    httpx2.post(f"{server.url}/completions", content=b"x" * 2000, headers=KEY)
    said, end = "", time.monotonic() + 20
    while said.count("\n") < 7 and time.monotonic() < end:
        said += capfd.readouterr().err
    used = f" {tokens['prompt_tokens']} prompt tokens, {tokens['completion_tokens']} new,"
    ends = [
        f"POST /v1/completions 200{used}",
        f"POST /v1/completions 200{used}",
        "GET /health 200",
        "GET /\N{BELL}   404",
        "POST /v1/completions 401",
        "POST /v1/completions 400",
        "POST /v1/completions 413",
    ]
    for line, end in zip(said.splitlines(), ends, strict=True):
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d 127\.0\.0\.1 {end} \d+\.\d{{3}} s", line), line


def test_no_lines_unless_asked_for(server, capfd):
    httpx2.get(f"{server.root}/health")
    assert capfd.readouterr().err == ""


def test_an_answer_that_nobody_waits_for_has_its_line(serve, capfd):
    server = serve(context=10**5, of_app={"logs_requests": True})
    body = BODY | {"max_tokens": 9 * 10**4, "stream": True}
    with httpx2.stream("POST", f"{server.url}/completions", json=body) as stream:
        next(stream.iter_lines())
    said, end = "", time.monotonic() + 20
    while not said and time.monotonic() < end:
        said += capfd.readouterr().err
    assert re.search(r" 200 \d+ prompt tokens, \d{1,4} new, ", said)
