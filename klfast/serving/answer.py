"""``Answer``: what the server writes after one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from klfast.core.errors import InvalidInputError, one_line
from klfast.generation.sampling import Chooser
from klfast.generation.scores import TokenScores, token_scores
from klfast.generation.settings import Settings
from klfast.generation.text_stream import TextStream
from klfast.generation.token_buffer import TokenBuffer
from klfast.serving.constraint import Constraint
from klfast.serving.stop_text import StopText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: what is settled by it, which may be empty.
        scores: if they were asked for; None for end tokens.
        offset: characters of the answer in front of the token's, with scores.
        finish: why the answer ends with it; "error" if it cannot go on.
        error: what went wrong.
    """

    text: str = ""
    scores: TokenScores | None = None
    offset: int = 0
    finish: Literal["stop", "length", "error"] | None = None
    error: str = ""


class Answer:
    """The text after one prompt, written token by token.

    Args:
        prompt: token ids, at least one.
        settings: those of ``klfast.generation.settings``; their stop strings are left out of the text.
        tokenizer: the model's.
        seed: of its own source of random numbers; None for any.
        top_logprobs: the number of most likely tokens to report with each; None for no scores at all.
        shared: tokens at the beginning of the prompt that other prompts are likely to share.
        spelled: names of special tokens that are part of the text.
        constraint: its own; None if it may say anything.
        deliver: called with each piece, in the scheduler's thread; the last one has a ``finish``.

    Attributes:
        asked: when it was asked for, in seconds of ``time.monotonic``.
        cached_tokens: tokens of the prompt that the prefix cache had.
        made: its tokens so far, the one that ends it included.
        client, request: the client who asks for it, and the number of the request, which the scheduler gives.
        is_cancelled: set from any thread when nobody waits for it any more.
        is_done: whether its last piece has been delivered.
        has_failed: whether that one was an error, in place of a token.
    """

    def __init__(
        self,
        prompt: list[int],
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int | None = None,
        top_logprobs: int | None = None,
        shared: int = 0,
        spelled: Collection[str] = (),
        constraint: Constraint | None = None,
        deliver: Callable[[Piece], object],
    ) -> None:
        self.prompt, self.shared, self.asked = prompt, shared, time.monotonic()
        self.cached_tokens = self.made = self.request = 0
        self.client = ""
        self.is_cancelled = self.is_done = self.has_failed = False
        self._settings, self._top, self._spelled, self._deliver = settings, top_logprobs, spelled, deliver
        self._constraint = constraint
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        self._choose = Chooser(settings.sampling, settings.penalties, len(prompt), generator)
        self._tokens = TokenBuffer(torch.tensor([prompt]))
        self._text, self._stops = TextStream(tokenizer, prompt), StopText(settings.strings)

    @property
    def tokens(self) -> list[int]:
        """The prompt and what follows it."""
        found: list[int] = self._tokens.tokens[0].tolist()
        return found

    @property
    def last_token(self) -> int:
        """The newest token."""
        return int(self._tokens.tokens[0, -1])

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from float32 logits [1, V], and deliver what it adds."""
        try:
            chosen, is_complete = self._next(logits)
        except InvalidInputError as error:  # the model's numbers, or a schema beyond limits
            self.fail(str(error))
            return
        self._tokens.append(chosen)
        self.made += 1
        token = int(chosen)
        ends = token in self._settings.ends
        scores = None if self._top is None or ends else token_scores(logits[0], token, self._top)
        offset = 0 if scores is None else self._text.written
        text = "" if ends else self._written(token)
        is_last = ends or is_complete or self.made == self._settings.max_new_tokens
        if is_last and not self._stops.found:
            text += self._stops.push(self._text.end())
            text += self._stops.end()
        stopped = ends or is_complete or self._stops.found
        self._give(Piece(text, scores, offset, "stop" if stopped else "length" if is_last else None))

    def _next(self, logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Return the next token, int64 [1], and whether a constraint allows no more after it."""
        if self._constraint is None:
            return self._choose(logits, self._tokens.tokens), False
        chosen = self._choose(self._constraint.limit(logits), self._tokens.tokens)
        self._constraint.take(int(chosen))
        return chosen, self._constraint.is_complete

    def _written(self, token: int) -> str:
        """Return the text that a token settles; most special ones have none, but stop strings may spell them."""
        special = self._text.special(token) if self._settings.strings or self._spelled else ""
        if not special:
            return self._stops.push(self._text.push(token))
        text = self._stops.push(self._text.end())
        return text if self._stops.found else text + self._stops.push(special, shown=special in self._spelled)

    def fail(self, error: str | BaseException) -> None:
        """End with an error."""
        self.has_failed = True
        self._give(Piece(finish="error", error=error if isinstance(error, str) else one_line(error)))

    def _give(self, piece: Piece) -> None:
        self.is_done = piece.finish is not None
        self._deliver(piece)
