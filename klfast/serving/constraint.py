"""Answers of a form that a JSON schema gives, by llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

from functools import cached_property
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
        """Return logits [1, V] with minus infinity for tokens that may not come next."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        allowed = torch.from_numpy(numpy.unpackbits(bits, count=logits.shape[1], bitorder="little")).bool()
        return torch.where(allowed, logits, -torch.inf)

    def take(self, token: int) -> None:
        """Go on to the next token.

        Raises:
            InvalidInputError: the schema grew beyond llguidance's limits.
        """
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())


class Constraints:
    """Makes constraints for texts of one tokenizer.

    Args:
        tokenizer: the model's.
        vocabulary: the model's number of logits.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self._given, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)

    def json(self, schema: dict[str, Any]) -> Constraint:
        """Return a constraint to JSON that fits a schema.

        Raises:
            InvalidInputError: llguidance cannot follow the schema, knows no such tokenizer, or is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise InvalidInputError(
                "following a JSON schema needs the package llguidance: pip install 'klfast[serve]'"
            ) from None
        try:
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema, _FORM))
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Constraint(matcher)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(cast("TokenizersBackend", self._given), self._vocabulary, self._ends or None)


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(f"the JSON schema cannot be followed: {shortened(' '.join(reason.split()))}")
