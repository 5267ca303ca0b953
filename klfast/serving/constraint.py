"""Answers of a form that a JSON schema gives, by llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch

from klfast.core.errors import InvalidInputError, one_line, shortened
from klfast.serving.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

_FORM: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{0,40}"}  # some models would write nothing else
_KEPT, _WAITING = 64, 16  # schemas
_TRIED_TOKENS = 16
_LONGEST_TRY, _LONGEST_TOKEN = 5.0, 1.0  # seconds
# Small schemas can take hours and all memory, and a thread cannot be ended: so first in a process, on bytes for tokens.
_TRY = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
except (ImportError, ValueError):
    pass
from llguidance import LLMatcher, LLTokenizer
LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0).compute_bitmask()
"""


class Constraint:
    """Follows one answer, and says which tokens may come next.

    Args:
        matcher: llguidance's, before the first token.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Constraint:
        """Return one for another answer."""
        return Constraint(self._matcher.deep_copy())

    def limit(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [1, V] with minus infinity for tokens that may not come next; what is not finite is a NaN."""
        return torch.where(torch.from_numpy(self._allowed(logits.shape[1])), logits, logits - torch.inf)

    def take(self, token: int) -> None:
        """Go on to the next token.

        Raises:
            InvalidInputError: the schema grew beyond llguidance's limits.
        """
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())

    def try_tokens(self, vocabulary: int) -> None:
        """Go on to tokens that must come next, or else may.

        Raises:
            InvalidInputError: the schema is beyond llguidance's limits, or takes too long.
        """
        for _ in range(_TRIED_TOKENS):
            if self.is_complete:
                break
            start = time.thread_time()
            for token in self._matcher.compute_ff_tokens() or [int(self._allowed(vocabulary).argmax())]:
                self.take(token)
            self._allowed(vocabulary)
            if self._matcher.is_error():
                raise _refused(self._matcher.get_error())
            if time.thread_time() - start > _LONGEST_TOKEN:
                raise _refused(f"it takes more than {_LONGEST_TOKEN:g} s a token")

    def _allowed(self, vocabulary: int) -> numpy.ndarray[Any, numpy.dtype[numpy.bool_]]:
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        return numpy.unpackbits(bits, count=vocabulary, bitorder="little").astype(bool)


class Constraints:
    """Makes constraints for texts of one tokenizer.

    Args:
        tokenizer: the model's.
        vocabulary: the model's number of logits.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self._given, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._thread, self._waiting = ThreadPoolExecutor(1, "klfast-schemas"), 0
        self._kept: OrderedDict[str, Constraint | InvalidInputError] = OrderedDict()

    def close(self) -> None:
        """Prepare no more schemas."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance has it, read once.

        Raises:
            InvalidInputError: llguidance is not installed, or knows no tokenizer of this kind.
        """
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise InvalidInputError(
                "following a JSON schema needs the package llguidance: pip install 'klfast[serve]'"
            ) from None
        try:
            return from_tokenizer(cast("TokenizersBackend", self._given), self._vocabulary, self._ends or None)
        except ValueError as error:
            raise _refused(str(error)) from None

    async def json(self, schema: dict[str, Any]) -> Constraint:
        """Return a constraint to JSON that fits a schema.

        Raises:
            InvalidInputError: llguidance cannot follow the schema, or not in time; or see ``tokenizer``.
            QueueFullError: too many schemas wait.
        """
        try:
            text = json.dumps(schema)
        except RecursionError:
            raise _refused("it is nested too deeply") from None
        if text not in self._kept:
            if self._waiting == _WAITING:
                raise QueueFullError(f"{_WAITING} JSON schemas are being prepared; try again later")
            self._waiting += 1
            try:
                made = await asyncio.get_running_loop().run_in_executor(self._thread, self._made, text)
            finally:
                self._waiting -= 1
            self._kept[text] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        found = self._kept[text]
        self._kept.move_to_end(text)
        if isinstance(found, InvalidInputError):
            raise InvalidInputError(str(found))
        return found.copy()

    def _made(self, schema: str) -> Constraint | InvalidInputError:
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, _FORM)
            _try(grammar)
            matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
            if matcher.is_error():
                return _refused(matcher.get_error())
            made = Constraint(matcher)
            made.copy().try_tokens(self._vocabulary)
        except InvalidInputError as error:
            return error
        except (ValueError, RecursionError) as error:
            return _refused(str(error))
        return made


def _try(grammar: str) -> None:
    """Prepare a grammar in a process that can be ended.

    Raises:
        InvalidInputError: that takes too long or too much memory, or there is no such process.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise _refused("klfast needs Python's own program to try it")
    command = [sys.executable, "-I", "-c", _TRY, json.dumps([str(path) for path in sys.path])]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=_LONGEST_TRY)
    except subprocess.TimeoutExpired:
        raise _refused(f"preparing it takes more than {_LONGEST_TRY:g} s") from None
    except OSError as error:
        raise _refused(f"no process to try it: {one_line(error)}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise _refused(f"preparing it failed: {said[-1]}")


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(f"the JSON schema cannot be followed: {shortened(' '.join(reason.split()))}")
