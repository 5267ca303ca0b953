"""Answers of a form that a JSON schema gives, by llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch

from klfast.core.errors import InvalidInputError, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

_FORM: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{0,40}"}  # some models would write nothing else
_KEPT = 64  # schemas
_LONGEST_TRY, _LONGEST_TOKEN = 5.0, 1.0  # seconds
# Small schemas can take hours and all memory, and a thread cannot be ended: so first in a process, on bytes for tokens.
_TRY = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
except (ImportError, ValueError):
    pass
from llguidance import LLMatcher, LLTokenizer
LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0).compute_bitmask()
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

    def try_a_token(self, vocabulary: int) -> None:
        """Go on to one that may come next.

        Raises:
            InvalidInputError: the schema is beyond llguidance's limits, or takes too long.
        """
        start = time.thread_time()
        self.take(int(self._allowed(vocabulary).argmax()))
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

    Attributes:
        thread: where to call ``json``, which may take seconds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self._given, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self.thread = ThreadPoolExecutor(1, "klfast-schemas")
        self._kept = lru_cache(_KEPT)(self._made)

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

    def json(self, schema: dict[str, Any]) -> Constraint:
        """Return a constraint to JSON that fits a schema.

        Raises:
            InvalidInputError: llguidance cannot follow the schema, or not in time; or see ``tokenizer``.
        """
        try:
            return self._kept(json.dumps(schema)).copy()
        except InvalidInputError:
            raise
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from None

    def _made(self, schema: str) -> Constraint:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, _FORM)
        try:
            path = json.dumps(sys.path)
            command = [sys.executable, "-I", "-c", _TRY, path]
            subprocess.run(command, input=grammar, text=True, capture_output=True, timeout=_LONGEST_TRY, check=True)
        except subprocess.TimeoutExpired:
            raise _refused(f"preparing it takes more than {_LONGEST_TRY:g} s") from None
        except subprocess.CalledProcessError:
            raise _refused("preparing it takes too much memory") from None
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        made = Constraint(matcher)
        made.copy().try_a_token(self._vocabulary)
        return made


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(f"the JSON schema cannot be followed: {shortened(' '.join(reason.split()))}")
