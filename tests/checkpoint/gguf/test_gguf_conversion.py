"""Where transformers' conversion takes rows and groups of columns from."""

import gguf_files
import pytest
import torch

from klfast.checkpoint.gguf.conversion import conversion, moves
from klfast.checkpoint.gguf.file import GgufFile


class Made:
    """A conversion of one 6 x 8 matrix."""

    def __init__(self, function, sources=("w",)):
        self.sources, self._function = {"w": list(sources)}, function

    def convert(self, parameter, tensors):
        return self._function(tensors["w"])


@pytest.mark.parametrize(
    ("function", "rows", "groups"),
    [
        (lambda w: w, [0, 1, 2, 3, 4, 5], [0, 1]),
        (lambda w: w.flip(0), [5, 4, 3, 2, 1, 0], [0, 1]),
        (lambda w: w.roll(4, 1), [0, 1, 2, 3, 4, 5], [1, 0]),
        (lambda w: w[[2, 0, 1, 5, 4, 3]].roll(4, 1), [2, 0, 1, 5, 4, 3], [1, 0]),
    ],
)
def test_moves(function, rows, groups):
    found = moves(Made(function), "w", "w", (6, 8), 4)
    assert found.rows.tolist() == rows and found.groups.tolist() == groups


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w - 1,
        lambda w: -w,
        lambda w: w.float().log(),
        lambda w: w.T,
        lambda w: w.T.reshape(6, 8),
        lambda w: w.roll(2, 1),  # through groups
        lambda w: w.flip(1),
        lambda w: w[[0, 0, 1, 2, 3, 4]],
        lambda w: w[:, :4].repeat(1, 2),
        lambda w: w[:5],
        lambda w: torch.cat((w[:3], w[3:].roll(4, 1))),  # some rows only
        lambda w: torch.cat((w[:, :4], w[:, 4:].flip(0)), 1),  # some columns only
    ],
)
def test_anything_else_is_no_move(function):
    assert moves(Made(function), "w", "w", (6, 8), 4) is None


def test_a_matrix_made_of_two_is_no_move():
    assert moves(Made(lambda w: w, ["w", "v"]), "w", "w", (6, 8), 4) is None


@pytest.mark.parametrize("family", gguf_files.CONFIGS)
def test_every_tensor_has_its_parameter(tmp_path, family):
    model = gguf_files.tiny(family)
    file = GgufFile(gguf_files.write(tmp_path / "m.gguf", family, model))
    made = conversion(file, model)
    names = {name: [gguf_files.stored_name(family, name)] for name in model.state_dict()}
    experts = {
        name: [one.replace("gate_up", each) for one in stored for each in ("gate", "up")]
        for name, stored in names.items()
        if "gate_up" in name
    }
    assert made.sources == names | experts
    for name, tensor in model.state_dict().items():
        found = made.convert(name, {one: file.values(one) for one in made.sources[name]})
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-6)
