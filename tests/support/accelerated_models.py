"""What tests ask of models with mixers, accelerated or not."""

import torch

from klfast.models.families import mixer_of


def mixers(model):
    return [module for module in model.modules() if mixer_of(type(module)) is not None]


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits
