"""What no graph of a GPU's work can repeat."""

import pytest
import torch

import klfast
from klfast import ops
from klfast.core.device_graphs import NoHostReads, recorder_of
from klfast.core.errors import CannotLowerError

NUMBERS = torch.arange(6.0).view(2, 3)
INDEX = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0, 0].item(),
        lambda x: bool(x.sum() > 3),
        lambda x: range(int(x.max())),
        lambda x: x.nonzero(),
        lambda x: x[x > 2],
        lambda x: x.clone().index_put_((x > 2,), torch.zeros(())),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 2),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
        lambda x: x.to("meta", torch.float16),
        lambda x: torch.empty(2, 3, device="meta").copy_(x),
        lambda x: ops.grouped_dequant_matmul(x, klfast.quantize(torch.randn(4, 3), "int8"), INDEX[:2, None], 2),
    ],
    ids=["item", "bool", "int", "nonzero", "mask", "put", "equal", "select", "unique", "to", "as", "copy", "experts"],
)
def test_numbers_that_the_host_reads(read, inference):
    with (
        torch.inference_mode(inference),
        NoHostReads(),
        pytest.raises(CannotLowerError, match=r"^the host reads what [ak]"),
    ):
        read(NUMBERS)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x[INDEX],
        lambda x: x[:, 1:] + x.shape[0],
        lambda x: x.clone().index_put_((INDEX,), torch.zeros(3)),
        lambda x: x.to("cpu", torch.float64).float() + torch.empty_like(x).copy_(x.half()),
        lambda x: x.clone().index_copy_(1, INDEX[:1], torch.zeros(2, 1)),
        lambda x: torch.where(x > 2, x, 0),
        lambda x: torch.nn.functional.linear(x, x).argmax(),
    ],
    ids=["index", "slice", "put", "dtype", "copy", "where", "linear"],
)
def test_what_stays_on_the_device(compute, inference):
    with torch.inference_mode(inference), NoHostReads():
        found = compute(NUMBERS)
    assert torch.equal(found, compute(NUMBERS))


def test_the_cpu_has_no_graphs():
    assert recorder_of(torch.device("cpu")) is None
