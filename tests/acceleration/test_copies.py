"""Copies and pickles of accelerated models."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerated_models import logits, mixers
from tiny_models import MIXERS, STATE_SPACE, assert_no_further, batch, in_float64, tiny

import klfast
from klfast.acceleration.patch import is_accelerated


def _by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": _by_torch, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", [*MIXERS, "hymba"])
def test_a_copy_is_accelerated_and_can_be_undone(family, copied):
    model = tiny(family)
    ids = batch()
    plain = logits(model, ids)
    truth = plain.double() if family == "hymba" else logits(in_float64(model), ids)  # Hymba calls klfast's ops itself
    fast = [name for name, module in klfast.accelerate(model).named_modules() if is_accelerated(module)]
    other = copied(model)
    assert [name for name, module in other.named_modules() if is_accelerated(module)] == fast
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # the copy has its own weights
    assert_no_further(logits(other, ids), plain, truth)
    assert klfast.unaccelerate(other) is other
    assert not any("forward" in vars(module) for module in other.modules())
    assert torch.equal(logits(other, ids), plain)
    assert [name for name, module in klfast.accelerate(other).named_modules() if is_accelerated(module)] == fast
    assert any(is_accelerated(module) for module in model.modules()), "the original stays as it is"


@pytest.mark.parametrize("family", STATE_SPACE)
def test_a_copy_of_a_plain_model_stays_plain(family):
    assert not any("forward" in vars(module) for module in pickle.loads(pickle.dumps(tiny(family))).modules())


def test_a_forward_that_was_pickled_as_a_method_is_accelerated_again():
    """Pickles of klfast 0.1 contain such forwards."""
    model = tiny("mamba")
    for module in model.modules():
        if not isinstance(module, torch.nn.ModuleList):
            module.forward = module.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error", klfast.SlowPathWarning)
        klfast.accelerate(model)
    assert all(is_accelerated(mixer) for mixer in mixers(model))


def _in_another_process(model, ids, results):
    results.put((sum(map(is_accelerated, model.modules())), logits(model, ids).tolist()))


@pytest.mark.slow
def test_a_spawned_process_gets_an_accelerated_model():
    model = klfast.accelerate(tiny("mamba2"))
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(model, batch(), results))
    process.start()
    count, found = results.get()
    process.join(60)
    assert count == sum(map(is_accelerated, model.modules()))
    torch.testing.assert_close(torch.tensor(found), logits(model, batch()), rtol=2e-5, atol=2e-5)
