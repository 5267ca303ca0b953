"""``Transcript``: what ``generate`` notes beside the tokens."""

from __future__ import annotations

from time import perf_counter

import torch

from klfast.core.arguments import integer
from klfast.generation.scores import TokenScores, token_scores


class Transcript:
    """Times, log probabilities and accepted drafts of a call of ``generate``, noted token by token.

    A transcript that is given to several calls adds them up. After an interrupt it has what there was.

    Args:
        logprobs: the number of most likely tokens to note beside each token; None notes no log probabilities.

    Attributes:
        scores: for each row of the results, the ``TokenScores`` of its new tokens: natural logarithms of probabilities
            by the model's logits in full precision, before penalties, temperature and limits. Empty without
            ``logprobs``.
        lengths: for each row of the results, the number of its new tokens, without the padding behind them.
        prompt_tokens: number of tokens in the prompts.
        prompt_seconds: from the start until the first tokens were there.
        new_tokens: number of new tokens in all rows, without padding.
        decode_seconds: from the first tokens to the last.
        draft_tokens: number of tokens that speculative decoding proposed.
        accepted_tokens: those of them that the model then chose.

    Raises:
        InvalidInputError: ``logprobs`` is not an integer of 0 or more.
    """

    def __init__(self, logprobs: int | None = None) -> None:
        self._top = None if logprobs is None else integer("logprobs", logprobs, 0)
        self.scores: list[list[TokenScores]] = []
        self.lengths: list[int] = []
        self.prompt_tokens = self.new_tokens = self.draft_tokens = self.accepted_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self._later_tokens = 0  # those after the first of their rows
        self._rows: list[list[TokenScores]] = []  # the last entries of scores, of this call's rows
        self._first_row = 0  # of this call's in lengths
        self._since, self._is_reading = 0.0, True

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Speed of reading prompts; None before the first token."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of writing, from the first tokens on, of all rows together; None before the second tokens."""
        return self._later_tokens / self.decode_seconds if self._later_tokens else None

    @property
    def acceptance(self) -> float | None:
        """The share of draft tokens that were accepted; None without any."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def has_scores(self) -> bool:
        """Whether log probabilities are noted."""
        return self._top is not None

    def begin(self, prompt_tokens: int, rows: int) -> None:
        """Start the clock for a call whose result has so many rows."""
        self.prompt_tokens += prompt_tokens
        self._rows = [[] for _ in range(rows)] if self.has_scores else []
        self.scores += self._rows
        self._first_row = len(self.lengths)
        self.lengths += [0] * rows
        self._since, self._is_reading = perf_counter(), True

    def count(self, tokens: int) -> None:
        """Note the time, and the number of tokens that a step has added."""
        begun, self._since = self._since, perf_counter()
        self.new_tokens += tokens
        if self._is_reading:
            self.prompt_seconds += self._since - begun
            self._is_reading = False
        else:
            self.decode_seconds += self._since - begun
            self._later_tokens += tokens

    def end(self, lengths: list[int]) -> None:
        """Note the new tokens of the call's rows, where they are not known before."""
        self.lengths[self._first_row :] = lengths

    def add(self, token: torch.Tensor, logits: torch.Tensor, running: torch.Tensor) -> None:
        """Note a step's tokens, int64 [B], by float32 logits [B, V], of the rows that were ``running``, bool [B]."""
        rows = running.nonzero().flatten().tolist()
        self.count(len(rows))
        for row in rows:
            self.lengths[self._first_row + row] += 1
        if self._top is not None:
            for row in rows:
                self._rows[row].append(token_scores(logits[row], int(token[row]), self._top))
