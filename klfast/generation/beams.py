"""Beam search: several texts of a prompt go on side by side, and the most likely as a whole win.

The rules, and with them the results, are those of transformers' ``generate(num_beams=...)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from klfast.core.arguments import integer, number
from klfast.core.errors import InvalidInputError
from klfast.generation.prompt_rows import PromptRows
from klfast.generation.sampling import NAN_LOGITS
from klfast.generation.settings import Settings
from klfast.generation.stepper import Steps
from klfast.generation.stopping import Stopping
from klfast.generation.transcript import Transcript


@dataclass(frozen=True)
class Beams:
    """Options of beam search.

    Attributes:
        count: texts of a prompt that go on side by side, and most finished ones that are kept.
        length_penalty: a finished text's score is its log probability, divided by the number of its new tokens to this
            power: above 0, longer texts win.
        early_stopping: when the search for a prompt ends once ``count`` texts are finished: True: at once; False: when
            the most likely running text, at its present length, scores no higher than they do; "never": when it could
            at no length.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    @classmethod
    def checked(cls, model: nn.Module, count: object, length_penalty: object, early_stopping: object) -> Beams | None:
        """Return the options, completed by the model's generation_config; None for a single beam.

        Raises:
            InvalidInputError: an option is out of range.
        """
        if (beams := integer("num_beams", count, 1)) == 1:
            return None
        config = getattr(model, "generation_config", None)
        penalty = getattr(config, "length_penalty", None) if length_penalty is None else length_penalty
        early = getattr(config, "early_stopping", None) if early_stopping is None else early_stopping
        if early is not None and early is not True and early is not False and early != "never":
            raise InvalidInputError(f'early_stopping must be True, False or "never", got {early!r}')
        return cls(
            beams,
            1.0
            if penalty is None
            else number("length_penalty", penalty, lambda p: -10 <= p <= 10, "between -10 and 10"),
            "never" if early == "never" else bool(early),
        )


class _Finished:
    """The best finished texts of a prompt.

    Args:
        beams: options of the search.
        most: most new tokens of a text.

    Attributes:
        texts: scores and new tokens, best first.
        is_settled: whether the search takes no more.
    """

    def __init__(self, beams: Beams, most: int) -> None:
        self._beams, self._most = beams, most
        self.texts: list[tuple[float, list[int]]] = []
        self.is_settled = False

    def add(self, totals: torch.Tensor, ends: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep the best of the texts that end.

        Args:
            totals: log probabilities, float32 [K].
            ends: which texts end, bool [K].
            tokens: the new ones of each, int64 [K, N].
        """
        if self.is_settled:
            return
        for total, own in zip(totals[ends].tolist(), tokens[ends].tolist(), strict=True):
            self.texts.append((self._score(total, len(own)), own))
        self.texts = sorted(self.texts, key=lambda text: -text[0])[: self._beams.count]

    def settle(self, running: float, length: int) -> None:
        """Decide whether to go on, by the log probability of the most likely running text and its new tokens."""
        beams = self._beams
        if len(self.texts) == beams.count:
            hopes_for_length = beams.early_stopping == "never" and beams.length_penalty > 0
            best = self._score(running, self._most if hopes_for_length else length)
            self.is_settled = self.is_settled or beams.early_stopping is True or best <= self.texts[-1][0]

    def _score(self, total: float, length: int) -> float:
        return total / length**self._beams.length_penalty


def search(
    step: Steps,
    rows: PromptRows,
    settings: Settings,
    beams: Beams,
    stopping: Stopping,
    transcript: Transcript,
    returned: int,
) -> torch.Tensor:
    """Return the new tokens of each prompt's best texts, best first, int64 [prompts * returned, N].

    Args:
        step: feeds a batch of ``beams.count`` rows for each prompt.
        rows: the batch.
        settings: without sampling.
        beams: options of the search.
        stopping: says which texts are finished before they have all tokens.
        transcript: notes the times and lengths.
        returned: texts of each prompt, at most ``beams.count``.

    Raises:
        InvalidInputError: a NaN logit, or a model whose rows cannot change places.
    """
    ids, text, count, most = rows.ids, rows.text(), beams.count, settings.max_new_tokens
    batch, width = ids.shape
    finished = [_Finished(beams, most) for _ in range(batch // count)]
    if not most:
        return ids.new_empty(len(finished) * returned, 0)
    firsts = torch.arange(0, batch, count, device=ids.device).unsqueeze(1)  # each prompt's first row
    totals = torch.full((len(finished), count), -torch.inf, device=ids.device)
    totals[:, 0] = 0  # at first a prompt's rows are all the same
    fed = ids
    for length in range(1, most + 1):
        logs = step(fed).log_softmax(-1)
        if logs.isnan().any():
            raise InvalidInputError(NAN_LOGITS)
        values, parents, tokens = _best(totals, settings.penalties(logs, text.tokens, width), len(settings.ends))
        seen = torch.cat([text.tokens[(firsts + parents).flatten()], tokens.view(-1, 1)], 1)
        ends = stopping.completes(tokens.flatten(), seen).view(tokens.shape) | (length == most)
        totals, running = values.masked_fill(ends, -torch.inf).topk(count)
        lines = seen[:, width:].view(*tokens.shape, length)
        for own, best, value, is_end, line in zip(finished, totals[:, 0].tolist(), values, ends, lines, strict=True):
            own.add(value[:count], is_end[:count], line[:count])  # those behind may go on where these end
            own.settle(best, length)
        transcript.count(len(finished) * returned)
        if length == most or all(own.is_settled for own in finished):
            break
        places = torch.tensor([_in_place(own) for own in parents.gather(1, running).tolist()], device=ids.device)
        running, totals = running.gather(1, places), totals.gather(1, places)
        sources = (firsts + parents.gather(1, running)).flatten().tolist()
        if sources != list(range(batch)):
            step.reorder(sources)
            text.reorder(sources)
        chosen = tokens.gather(1, running).flatten()
        text.append(chosen)
        fed = chosen.unsqueeze(1)
    best = [tokens for own in finished for _, tokens in own.texts[:returned]]
    transcript.end([len(tokens) for tokens in best])
    texts = [torch.tensor(tokens, device=ids.device) for tokens in best]
    filler = 0 if settings.pad is None else settings.pad  # without one all have the same length
    return pad_sequence(texts, batch_first=True, padding_value=filler)


def _best(totals: torch.Tensor, logs: torch.Tensor, ends: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the K most likely continuations, best first: log probabilities, beams and tokens, [prompts, K] each.

    K is such that enough of them go on, whatever end tokens they have.

    Args:
        totals: log probabilities of the running texts, float32 [prompts, beams].
        logs: those of their next tokens, float32 [prompts * beams, V].
        ends: number of end tokens.
    """
    sums = (totals.unsqueeze(-1) + logs.view(*totals.shape, -1)).flatten(1)
    values, index = sums.topk(min(totals.shape[1] * max(2, ends + 1), sums.shape[1]))
    return values, index // logs.shape[1], index % logs.shape[1]


def _in_place(parents: list[int]) -> list[int]:
    """Return an order of texts in which one of each parent's takes its place, so that few states are copied."""
    places: list[int | None] = [None] * len(parents)
    others = []
    for text, parent in enumerate(parents):
        if places[parent] is None:
            places[parent] = text
        else:
            others.append(text)
    return [others.pop() if text is None else text for text in places]
