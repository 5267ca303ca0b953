"""One job with one fault, and the same job again: what each leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import JOBS, make_inputs

# "moment": SIGKILL at any time; "ctrl-c": SIGINT at any time; "tmpfs": a disk of few bytes, which root alone can make;
# the others: faults.c.
KINDS = ("moment", "kill", "ctrl-c", "interrupt", "full", "error", "vanish", "clock", "tmpfs")
_SIGNALS = {"moment": signal.SIGKILL, "ctrl-c": signal.SIGINT}
_SECONDS = 120.0  # the most that a job may take
_CHANGING = ("sha256", "seconds", "token_forwards", "tokens_per_second")  # entries that no two runs have alike
_ROOMY = "64m"


class Crashes:
    """Makes faults happen in a folder.

    Args:
        folder: an empty one.
        names: those of the jobs.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._inputs, self._disk, self._log = folder / "inputs", folder / "disk", folder / "log"
        self._names, self._undisturbed = names, functools.cache(self._run_undisturbed)
        self._inputs.mkdir()
        make_inputs(self._inputs)

    def case(self, kind: str, number: int) -> tuple[str, list[str]]:
        """Let fault ``number`` happen; return what it was, and what is wrong with what came of it."""
        chance = random.Random(f"{kind} {number}")
        name = chance.choice(self._names)
        whole, calls, seconds, size = self._undisturbed(name)
        old = chance.random() < 0.5
        place = chance.random()
        self._prepare(f"{int(size * place) + 4096}" if kind == "tmpfs" else None)
        try:
            before = self._make_old(name) if old else None
            at = 1 + int(place * calls)
            armed = None if kind in (*_SIGNALS, "tmpfs") else (at, kind)
            code, _ = self._run(name, armed, (place * seconds, _SIGNALS[kind]) if kind in _SIGNALS else None)
            what = f"{name}{' over an old one' if old else ''}, {place:.0%}" + (f", call {at}" if armed else "")
            return f"{what}: {code}", [*self._judge(name, kind, code, before, whole), *self._again(name, kind, whole)]
        finally:
            if kind == "tmpfs":
                subprocess.run(["umount", str(self._disk)], check=True)

    def _run_undisturbed(self, name: str) -> tuple[Any, int, float, int]:
        """Return what a job makes without a fault, its calls, its seconds, and the bytes of what it makes."""
        self._prepare()
        said = io.StringIO()  # once here, so that processes forked from this one find all imported and cached
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            JOBS[name].run(self._inputs, self._path(name))
        start = time.monotonic()
        code, calls = self._run(name)
        if left := self._left(name):
            raise RuntimeError(f"{name} leaves {left} without a fault")
        if code:
            raise RuntimeError(f"{name} fails without a fault: {self._log.read_text()}")
        return self._content(name), calls, time.monotonic() - start, _size(self._disk)

    def _prepare(self, size: str | None = None) -> None:
        shutil.rmtree(self._disk, ignore_errors=True)
        self._disk.mkdir()
        if size is not None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self._disk)], check=True)
        (self._disk / "out").mkdir()
        (self._disk / "tmp").mkdir()

    def _path(self, name: str) -> Path:
        return self._disk / "out" / JOBS[name].out

    def _make_old(self, name: str) -> Any:
        path = self._path(name)
        if path.suffix:
            path.write_text("old")
        else:
            path.mkdir()
            mark = "openvino_model.xml" if name == "openvino" else "klfast.json"
            (path / mark).write_text("old")
        return self._content(name)

    def _content(self, name: str) -> Any:
        """Return what is at the output's path in a form that compares; None if nothing is."""
        path = self._path(name)
        if path.is_dir():
            return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}
        if not path.exists():
            return None
        data = path.read_bytes()
        return _without_changing(json.loads(data)) if path.suffix == ".json" and data != b"old" else data

    def _left(self, name: str) -> list[str]:
        """Return the names of all that is there beside the output."""
        found = [*(self._disk / "out").iterdir(), *(self._disk / "tmp").iterdir()]
        return sorted(one.name for one in found if one.name != JOBS[name].out)

    def _judge(self, name: str, kind: str, code: int, before: Any, whole: Any) -> list[str]:
        """Look at what a job with a fault left, and said."""
        wrong, said = [], self._log.read_text()
        if (gone := Path(f"{self._disk}.gone")).exists():
            if any(one.is_file() for one in self._disk.rglob("*")):  # libraries make folders again, which stay empty
                wrong.append("it wrote to where the folder had been")
            shutil.rmtree(self._disk, ignore_errors=True)
            gone.rename(self._disk)
        content = self._content(name)
        if content != whole and (content != before or code == 0):
            wrong.append("the output is neither the old nor the new one")
        killed = kind in ("moment", "kill")
        if code not in (0, -signal.SIGKILL if killed else 130 if kind in ("interrupt", "ctrl-c") else 1):
            wrong.append(f"it ended with {code}: {said[-2000:]}")
        if code == 1 and sum(line.startswith("klfast: ") and "warning" not in line for line in said.splitlines()) != 1:
            wrong.append(f"it did not say in one line why: {said[-2000:]}")
        if "Traceback" in said and "Exception ignored in" not in said:  # Python drops what interrupts a finalizer
            wrong.append(f"it ended with a traceback: {said[-2000:]}")
        left = [one for one in self._left(name) if not one.endswith((".partial", ".step")) and ".partial." not in one]
        if left and kind in ("interrupt", "ctrl-c", "full", "clock", "tmpfs"):
            wrong.append(f"it left {left}")
        return wrong

    def _again(self, name: str, kind: str, whole: Any) -> list[str]:
        """Do the job once more, and look at what it leaves."""
        if kind == "tmpfs":
            subprocess.run(["mount", "-o", f"remount,size={_ROOMY}", str(self._disk)], check=True)
        code, _ = self._run(name)
        wrong = [f"the next run ended with {code}: {self._log.read_text()[-2000:]}"] if code else []
        if self._content(name) != whole:
            wrong.append("the next run's output differs")
        if left := self._left(name):
            wrong.append(f"the next run left {left}")
        return wrong

    def _run(
        self, name: str, armed: tuple[int, str] | None = None, signalled: tuple[float, int] | None = None
    ) -> tuple[int, int]:
        """Run a job in its own process; return its exit code (minus a signal), and the calls that faults.c counted.

        Args:
            name: of the job.
            armed: number of the call that gets a fault, and its kind.
            signalled: seconds after which it gets a signal, and which.
        """
        said, saying = os.pipe()
        child = os.fork()
        if child == 0:
            _work(lambda: JOBS[name].run(self._inputs, self._path(name)), self._disk, self._log, saying, armed)
        os.close(saying)
        if signalled is not None:
            time.sleep(signalled[0])
            os.kill(child, signalled[1])
        end = time.monotonic() + _SECONDS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGABRT)
            time.sleep(0.005)
        with open(said, "rb") as pipe:
            calls = int(pipe.read() or 0)
        return os.waitstatus_to_exitcode(ended[1]), calls


def _work(job: Callable[[], None], disk: Path, log: Path, saying: int, armed: tuple[int, str] | None) -> None:
    """Do a job in a forked process, and end the process."""
    code: object = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        tempfile.tempdir = str(disk / "tmp")
        faults = ctypes.CDLL(None)
        number, kind = armed or (0, "")
        faults.faults_arm(os.fsencode(disk), ctypes.c_long(number), kind.encode())
        try:
            job()
            code = 0
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        faults.faults_calls.restype = ctypes.c_long
        os.write(saying, str(faults.faults_calls()).encode())
    except BaseException:  # noqa: BLE001 (none may reach the fork's caller)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))  # type: ignore[call-overload]


def _without_changing(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without_changing(value) for name, value in data.items() if name not in _CHANGING}
    return [_without_changing(value) for value in data] if isinstance(data, list) else data


def _size(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*"))
