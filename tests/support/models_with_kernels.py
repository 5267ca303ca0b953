"""Tiny models that ask transformers for kernels, and what they compute."""

import torch
from tiny_models import batch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM


class Calls(TorchDispatchMode):
    """The names of a namespace's ops that were called."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace, self.names = namespace, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == self.namespace:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def outputs(model, namespace="klfast"):
    """Return logits, generated tokens and the names of the ops that made them, klfast's by default."""
    with torch.inference_mode(), Calls(namespace) as calls:
        logits, tokens = model(batch()).logits, model.generate(batch(2, 5), max_new_tokens=5, do_sample=False)
    return logits, tokens, calls.names


def saved(family, folder):
    """Save a family's tiny model and return its folder."""
    tiny(family, tied=None).save_pretrained(folder)
    return folder


def load(folder, **options):
    """Load a model by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)
