"""Speculative decoding: several drafted tokens are checked in one run of the engine."""

from __future__ import annotations

import torch
from torch import nn

from klfast.core.arguments import integer
from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.engine.engine import Engine
from klfast.engine.program import MOST_SEQUENCES
from klfast.engine.state import Mark
from klfast.generation.drafts import Drafter, DraftModel, PromptLookup
from klfast.generation.engine import engine_of
from klfast.generation.transcript import Transcript
from klfast.models.vocabulary import vocabulary_size

_USUAL = 4  # tokens
_MOST = MOST_SEQUENCES - 1  # the engine's logits of each token are for so many and the one before them
_MOST_AGAIN = 4  # tokens that are fed again beside a draft; with more, a run without one lets the state catch up


def speculative_stepper(
    model: nn.Module,
    mask: torch.Tensor | None,
    draft_model: nn.Module | None,
    num_draft_tokens: object,
    transcript: Transcript,
) -> SpeculativeStepper:
    """Return what steps over a single text with drafts.

    Args:
        model: writes the text.
        mask: int64 [1, T], 0 where the prompt is padding; None if there is none.
        draft_model: a smaller model that drafts; None: prompt lookup.
        num_draft_tokens: most tokens of a draft, 1 to 15; None for 4.
        transcript: counts draft tokens.

    Raises:
        InvalidInputError: the number is out of range, the engine does not run a model, or their tokens differ.
    """
    most = integer("num_draft_tokens", _USUAL if num_draft_tokens is None else num_draft_tokens, 1)
    if most > _MOST:
        raise InvalidInputError(f"num_draft_tokens must be {_MOST} or less, got {most}")
    engine = _engine("the model", model)
    if draft_model is None:
        return SpeculativeStepper(engine, mask, PromptLookup(), most, transcript)
    own, other = vocabulary_size(model), vocabulary_size(draft_model)
    if own != other:
        raise InvalidInputError(f"draft_model must have the model's {own} tokens, got {other}; give one of its family")
    return SpeculativeStepper(engine, mask, DraftModel(_engine("draft_model", draft_model)), most, transcript)


def _engine(which: str, model: nn.Module) -> Engine:
    try:
        return engine_of(model)
    except CannotLowerError as error:
        raise InvalidInputError(
            f"speculative decoding needs klfast's native engine, which does not run {which}: {error}"
        ) from None


class SpeculativeStepper:
    """Feeds a text to an engine together with drafts of how it goes on.

    Every token is chosen by the model's own logits after the tokens before it, whatever was drafted: a draft only
    decides whether these logits are there already. So the text is the one without drafts, whether tokens are the
    likeliest or drawn; for drawn ones this is the rule of Leviathan et al. 2023 (arXiv:2211.17192, section 2.3) for
    a draft x that is certain: it is accepted with its probability p(x), and what takes its place is drawn from p
    without x.

    After a rejected draft the state goes back to before the run. What it loses is fed again in the next run.

    Args:
        engine: of the model.
        mask: int64 [1, T], 0 where the prompt is padding; None if there is none.
        draft: makes drafts.
        most: most tokens of a draft.
        transcript: counts draft tokens.
    """

    def __init__(
        self, engine: Engine, mask: torch.Tensor | None, draft: Drafter, most: int, transcript: Transcript
    ) -> None:
        self._engine, self._mask, self._state = engine, mask, engine.state()
        self._draft, self._most, self._transcript = draft, most, transcript
        self._length = most  # of the next draft
        self._text: list[int] = []
        self._mark: Mark | None = None  # before the latest run
        self._sure: list[int] = []  # tokens of the text that the latest run fed
        self._proposal: list[int] = []  # those that it fed after them
        self._right = 0  # tokens of the proposal that are the text's
        self._logits = torch.empty(0)  # after the last of the former, and after each of the latter

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [1, T] ids, first a prompt, then one by one; return the next token's logits, float32 [1, V]."""
        if not self._text:
            prompt = ids if self._mask is None else ids[self._mask != 0].unsqueeze(0)
            self._text = prompt[0].tolist()
            return self._engine(prompt, self._state)
        self._text.append(int(ids))
        if self._proposal[self._right : self._right + 1] == self._text[-1:]:
            self._right += 1
            self._transcript.accepted_tokens += 1
        else:
            self._run()
        return self._logits[self._right].unsqueeze(0)

    def _run(self) -> None:
        """Feed the text's newest token, and before it what the state has lost, and after it a draft."""
        if self._mark is not None and self._right < len(self._proposal):
            self._state.go_back(self._mark)
            self._sure += [*self._proposal[: self._right], self._text[-1]]
            self._length = self._right + 1  # one more than was right: bad drafts shall cost little
        else:
            self._sure = self._text[-1:]
            self._length = self._most if self._proposal else self._length
        room = min(self._length, MOST_SEQUENCES - len(self._sure))
        self._proposal = self._draft(self._text, room) if len(self._sure) <= _MOST_AGAIN else []
        self._transcript.draft_tokens += len(self._proposal)
        self._right = 0
        self._mark = self._state.mark() if self._proposal else None
        logits = self._engine.each(torch.tensor([self._sure + self._proposal]), self._state)[0]
        self._logits = logits[len(self._sure) - 1 :]
