"""One input for one reader: damage a valid file, read it, and judge what comes of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from mutating import mutated
from readers import READERS

from klfast import KlfastError

SECONDS = 20.0  # of CPU, the most that an input may take
_MORE_BYTES = 4 << 30  # of address space, the most that reading may add
_LONGEST = 1000  # characters of an error


class Fuzzed:
    """A reader with its valid files.

    Args:
        name: in READERS.
        folder: an empty one, for its files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.reader = name, READERS[name]
        self.valid, self.folder = folder / "valid", folder / "read"
        self.valid.mkdir()
        self.reader.write(self.valid)
        paths = [path for pattern in self.reader.damaged for path in self.valid.glob(pattern) if path.is_file()]
        self.paths = sorted(path.relative_to(self.valid) for path in paths)
        self.contents = {path: (self.valid / path).read_bytes() for path in self.paths}

    def case(self, number: int) -> tuple[Path, bytes]:
        """Return which file case ``number`` damages, and its content then."""
        chance = random.Random(f"{self.name} {number}")
        path = chance.choice(self.paths)
        return path, mutated(self.contents[path], chance)

    def fault(self, path: Path, content: bytes) -> str | None:
        """Read the files with one of them replaced; return what is wrong with the outcome, None if nothing is."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.valid, self.folder)
        name = path.name if self.reader.damaged != ("*",) else f"damaged-{path.name}"
        (self.folder / path).with_name(name).write_bytes(content)
        try:
            with _bounded(), warnings.catch_warnings(), open(os.devnull, "w") as quiet:
                warnings.simplefilter("ignore")
                with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                    self.reader.read(self.folder)
        except KlfastError as error:
            text = str(error)
            if not text or not text.isprintable() or len(text) > _LONGEST:
                return f"not a line of at most {_LONGEST} characters: {text[:300]!r}"
        except _TooSlowError:
            return f"more than {SECONDS:.0f} s of CPU"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in last if "klfast" in frame.filename and "/tests/" not in frame.filename] or last
            return f"{type(error).__name__}: {error!s:.300} ({own[-1].filename}:{own[-1].lineno})"
        return None


class _TooSlowError(BaseException):
    """An input takes too long."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limit time and memory."""

    def stop(*_: object) -> None:
        raise _TooSlowError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MORE_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
