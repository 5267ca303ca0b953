"""Objects whose tensors lie in arrays: what they share, they share afterwards, and nothing is copied."""

import numpy as np
import pytest
import torch
from tiny_models import tiny
from torch import nn

from klfast.models.block_chain import Chain
from klfast.sensitivity.shared_tensors import pack, unpack


def test_tensors_keep_identity_memory_and_kind():
    one = nn.Parameter(torch.arange(12, dtype=torch.bfloat16).view(3, 4), requires_grad=False)
    things = {
        "one": one,
        "again": one,
        "view": one.detach().T[1:],
        "plain": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
    }
    shared = pack(things)
    assert len(shared.storages) == 3 and len(shared.pickled) < 2000
    found = unpack(shared)
    assert found["one"] is found["again"] and type(found["one"]) is nn.Parameter and not found["one"].requires_grad
    assert type(found["view"]) is torch.Tensor and found["view"].stride() == things["view"].stride()
    assert found["view"].untyped_storage().data_ptr() == found["one"].untyped_storage().data_ptr()
    for name, tensor in things.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert one.data_ptr() == found["one"].data_ptr()  # the arrays are the tensors' own memory


@pytest.mark.parametrize("family", ["hymba", "zamba", "gpt2"])
def test_a_chain_computes_the_same_on_memory_that_nothing_may_write_to(family):
    chain, ids = Chain(tiny(family, True)), torch.arange(20).view(2, 10)
    shared = pack(chain)
    storages = [np.frombuffer(array.tobytes(), array.dtype) for array in shared.storages]  # read-only, as bytes are
    again = unpack(type(shared)(shared.pickled, storages))
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight
    hidden = [each.run((passage := each.enter(ids)).entry, passage) for each in (chain, again)]
    assert torch.equal(*hidden)
