"""Progress: timed lines without a terminal, a bar with an estimate on one."""

import io
import sys
import time

import pytest
from sweep_models import make, tokens

import klfast
from klfast.core import progress

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def after(self, seconds):
        self.now += seconds


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize("how", [None, True])
def test_occasional_lines(monkeypatch, capsys, how):
    clock = Clock(monkeypatch)
    with progress.reporter(how, "sweep", 200) as advance:
        for _ in range(9):
            clock.after(1)
            advance(1, "block 0")
        assert lines(capsys) == []
        clock.after(1)
        advance(1, "block 0")
        assert lines(capsys) == ["sweep: 10/200, 10 s so far, about 3 min left (block 0)"]  # 190 s
        for _ in range(29):
            clock.after(1)
            advance(1, "block 1")
        assert lines(capsys) == []
        clock.after(1)
        advance(1, "")
        assert lines(capsys) == ["sweep: 40/200, 40 s so far, about 3 min left"]  # 160 s
        clock.after(3600)
        advance(160, "head")
    assert lines(capsys) == ["sweep: 200/200, 61 min"]


def test_estimate_goes_by_work_not_by_steps(monkeypatch, capsys):
    """A step that is half done counts; the work of an earlier run does not."""
    clock = Clock(monkeypatch)
    with progress.reporter(None, "sweep", 10, 4) as advance:
        advance(0, "", 0.5)
        clock.after(20)
        advance(0, "block 3", 0.6)
        assert lines(capsys) == ["sweep: 4/10, 20 s so far, about 80 s left (block 3)"]
        clock.after(60)
        advance(1, "block 3", 0.9)
        assert lines(capsys) == ["sweep: 5/10, 80 s so far, about 20 s left (block 3)"]


@pytest.mark.parametrize(("how", "expected"), [(None, []), (False, []), (True, ["sweep: 1/1, 0 s"])])
def test_short_work_is_silent_unless_asked(capsys, how, expected):
    with progress.reporter(how, "sweep", 1) as advance:
        advance(1, "x")
    assert lines(capsys) == expected


def test_callback_hears_only_of_steps():
    heard = []
    with progress.reporter(lambda *args: heard.append(args), "sweep", 3, 1) as advance:
        advance(0, "", 0.1)
        advance(1, "a", 0.5)
        advance(0, "b", 0.6)
        advance(1, "b")
    assert heard == [(2, 3, "a"), (3, 3, "b")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("how", [None, True])
def test_bar_shows_the_estimate(monkeypatch, how):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.reporter(how, "sweep", 100) as advance:
        time.sleep(0.2)
        advance(10, "block 0", 0.01)
        time.sleep(0.3)
    shown = terminal.getvalue()
    assert "10/100" in shown and "block 0, about" in shown and "left" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (720, "12 min"),
        (5900, "98 min"),
        (6000, "1 h 40 min"),
        (36000, "10 h 0 min"),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_sweep_reports_its_work_in_order():
    """Shares grow from 0 to 1, also within the steps."""
    from klfast.sensitivity import run

    shares, whole = [], progress.reporter

    def listening(*args):
        from contextlib import contextmanager

        @contextmanager
        def made():
            with whole(*args) as advance:
                yield lambda steps, what, share=None: (shares.append(share), advance(steps, what, share))

        return made()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "reporter", listening)
        klfast.sweep(make("hymba", tied=True), tokens(3), max_batch_tokens=4 * 2 * 17, progress=False)
    assert shares[0] == 0 and shares[-1] == pytest.approx(1) and shares == sorted(shares) and len(set(shares)) > 40
