"""A tiny hybrid model and its tokenizer for the server, and what they write alone."""

import copy
from functools import cache

import torch
from tiny_models import tiny
from tokenizer_kinds import tokenizer

import klfast
from klfast.generation.text_stream import TextStream

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no such message') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}{{ mood }}"
)


@cache
def model():
    """Return a tiny Granite-4.0-H, which never ends a text by itself."""
    found = tiny("granite_hybrid", vocabulary=len(words()))
    found.config.max_position_embeddings = 10**6
    with torch.no_grad():
        found.lm_head.weight[words().eos_token_id] = 0
    return found


@cache
def words():
    """Return a byte-level tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer("byte-level BPE"))
    found.chat_template = TEMPLATE
    return found


def save(folder):
    """Save both, for the command; return the folder."""
    model().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def ids(text):
    """Return a text's tokens."""
    return words()(text)["input_ids"]


def alone(prompt, new, by=None, **options):
    """Return the tokens that klfast.generate, with ``by`` or the model, adds to token ids."""
    options = {"eos_token_id": words().eos_token_id, **options}
    made = klfast.generate(by or model(), torch.tensor([prompt]), new, **options)
    return made[0, len(prompt) :].tolist()


def text_after(prompt, made):
    """Return the text of tokens after a prompt's."""
    stream = TextStream(words(), prompt)
    return "".join(map(stream.push, made)) + stream.end()
