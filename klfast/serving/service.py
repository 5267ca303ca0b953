"""``Service``: a model with its tokenizer and scheduler, and the way from a request to answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.generation.chat import chat_text, system_part
from klfast.generation.engine import engine_of
from klfast.generation.settings import settle
from klfast.generation.spelling import Spelling
from klfast.generation.stopping import ends_of
from klfast.models.calling import check_ids
from klfast.models.families import text_config
from klfast.models.vocabulary import vocabulary_size
from klfast.serving.answer import Answer
from klfast.serving.constraint import Constraint, Constraints
from klfast.serving.mailbox import Mailbox
from klfast.serving.metrics import Metrics
from klfast.serving.prefix_cache import PrefixCache
from klfast.serving.requests import Asked
from klfast.serving.scheduler import Scheduler
from klfast.serving.tool_calls import MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Service:
    """Answers requests with one model.

    Args:
        model: a causal language model that the engine runs.
        tokenizer: the model's.
        name: what clients call the model.
        context: most tokens of a prompt and its answer; the model's own limit counts if it is less.
        waiting: most answers in the queue.
        cache_bytes: memory of the prefix cache.

    Attributes:
        name: as given.
        metrics: of the server.
        scheduler: writes the answers.
        spelling: of the tokenizer's tokens.

    Raises:
        InvalidInputError: the engine does not run the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        context: int = 8192,
        waiting: int = 256,
        cache_bytes: int = 2**30,
    ) -> None:
        try:
            engine = engine_of(model)
        except CannotLowerError as error:
            raise InvalidInputError(f"klfast serves models that its native engine runs, but {error}") from None
        self.name, self.metrics = name, Metrics()
        self._model, self._tokenizer = model, tokenizer
        self.spelling = Spelling(tokenizer)
        self._encoder, self._encoding = copy.deepcopy(tokenizer), asyncio.Lock()
        self._ends, self._vocabulary = ends_of(model, tokenizer), vocabulary_size(model)
        self._constraints = Constraints(self._encoder, self._vocabulary, self._ends)
        self._context = min(context, getattr(text_config(model), "max_position_embeddings", None) or context)
        self.scheduler = Scheduler(engine, PrefixCache(cache_bytes), self.metrics, waiting=waiting)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer puts around it if ``special``."""
        async with self._encoding:  # a tokenizer must not be used by two threads, and long texts would block the loop
            found = await asyncio.to_thread(self._encoder, text, add_special_tokens=special)
        return list(found["input_ids"])

    async def encode_chat(
        self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[list[int], int]:
        """Return the tokens of a chat up to the answer, and how many of them are those of its system messages.

        Args:
            messages: the chat so far.
            options: for the template.
            tools: that the model may call.

        Raises:
            InvalidInputError: there is no template, or it refuses the messages, an option or the tools.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidInputError(f"{self.name} has no chat template; use /v1/completions")
        async with self._encoding:
            text = await asyncio.to_thread(chat_text, self._encoder, messages, self.name, options, tools)
        prompt = await self.encode(text, special=False)  # a template writes its special tokens itself
        system = await self.encode(system_part(text, messages), special=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, system, strict=False))
        return prompt, len(list(alike))  # a token may reach beyond the end

    def tool_marks(self, tools: Sequence[dict[str, Any]]) -> list[str]:
        """Return those of MARKS that the chat template for some tools, or else the tokenizer, knows; none for no tools.

        Raises:
            InvalidInputError: there is none.
        """
        if not tools:
            return []
        template, added = str(self._tokenizer.get_chat_template(tools=list(tools))), self._tokenizer.get_added_vocab()
        marks = [mark for mark in MARKS if mark in template] or [mark for mark in MARKS if mark in added]
        if not marks:
            raise InvalidInputError(f"klfast does not know how {self.name} calls tools; leave them out")
        return marks

    async def constraint(self, schema: dict[str, Any] | None) -> Constraint | None:
        """Return what holds answers to a JSON schema; None for None.

        Raises:
            InvalidInputError, QueueFullError: see ``Constraints``.
        """
        if schema is None:
            return None
        async with self._encoding:
            await asyncio.to_thread(lambda: self._constraints.tokenizer)  # seconds, but once
        return await self._constraints.json(schema)

    def close(self) -> None:
        """Take no more requests, and finish those that were accepted."""
        self._constraints.close()
        self.scheduler.close()

    def _ends_for(self, asked: Asked) -> list[int]:
        """Return the tokens that end the answers to a request."""
        more = asked.stop_token_ids or []
        if more and max(more) >= self._vocabulary:
            raise InvalidInputError(f"stop_token_ids must lie in 0..{self._vocabulary - 1}, got {max(more)}")
        return [*([] if asked.ignore_eos else self._ends), *more]

    def start(
        self,
        asked: Asked,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int | None,
        default: int | None,
        top_logprobs: int | None,
        client: str,
        shared: int = 0,
        spelled: Collection[str] = (),
        constraint: Constraint | None = None,
        mailbox: Mailbox,
    ) -> list[Answer]:
        """Queue ``asked.n`` answers to each prompt, which deliver to the mailbox's slots in this order.

        Args:
            asked: the request.
            prompts: token ids.
            max_tokens: of each answer; None for ``default``, or what the context leaves if that is less.
            default: None for all that the context leaves.
            top_logprobs, shared, spelled: see ``Answer``.
            client: who asks.
            constraint: before the first token of each answer.
            mailbox: where pieces go.

        Raises:
            InvalidInputError: a prompt is empty, too long or not of the model's tokens.
            QueueFullError: too many answers are waiting.
        """
        answers: list[Answer] = []
        ends = self._ends_for(asked)
        for prompt in prompts:
            if not prompt:
                raise InvalidInputError("the prompt has no tokens; give some text")
            room = self._context - len(prompt)
            if room < (max_tokens or 1):
                raise InvalidInputError(
                    f"the prompt's {len(prompt)} tokens and {max_tokens or 1} for the answer exceed the context of "
                    f"{self._context} tokens"
                )
            check_ids(torch.tensor([prompt]), self._vocabulary, 1)
            is_greedy = asked.temperature == 0
            settings = settle(
                self._model,
                len(prompt),
                max_new_tokens=max_tokens or min(default or room, room),
                do_sample=True if asked.temperature is None else None,
                temperature=asked.temperature,
                top_k=None if is_greedy else asked.most_likely,
                top_p=None if is_greedy else asked.top_p,
                min_p=None if is_greedy else asked.min_p,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                eos_token_id=ends,
                stop_strings=asked.stops or None,
                pad_token_id=None,
            )
            for _ in range(asked.n or 1):
                index = len(answers)
                answers.append(
                    Answer(
                        prompt,
                        settings,
                        self._tokenizer,
                        seed=None if asked.seed is None else asked.seed + index,
                        top_logprobs=top_logprobs,
                        shared=shared,
                        spelled=spelled,
                        constraint=constraint and constraint.copy(),
                        deliver=mailbox.slot(index),
                    )
                )
        self.scheduler.submit(answers, client)
        return answers
