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
    found = moves(Made(function), "w", {"w": (6, 8)}, 4)
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
    assert moves(Made(function), "w", {"w": (6, 8)}, 4) is None


class Joined(Made):
    """A conversion of two tensors."""

    def convert(self, parameter, tensors):
        return self._function(tensors["w"], tensors["v"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stacks_of_two_tensors_in_each_expert(count):
    shapes = {"w": (count, 2, 8), "v": (count, 3, 8)}
    found = moves(Joined(lambda w, v: torch.cat((v.flip(1), w), 1).roll(4, -1)), "w", shapes, 4)
    assert found.rows.view(count, 5).tolist() == [[5 * i + row for row in (4, 3, 2, 0, 1)] for i in range(count)]
    assert found.groups.tolist() == [1, 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda w, v: torch.cat((w.flip(0), v), 1),  # of another expert
        lambda w, v: torch.cat((w, v), 1)[:, :4],
        lambda w, v: torch.cat((torch.cat((w, v), 1)[:1], torch.cat((v, w), 1)[1:])),  # others otherwise
        lambda w, v: torch.cat((w, v.roll(4, -1)), 1),  # some columns only
    ],
)
def test_anything_else_is_no_move_of_stacks(function):
    assert moves(Joined(function), "w", {"w": (3, 2, 8), "v": (3, 3, 8)}, 4) is None


def test_a_matrix_that_is_held_transposed():
    found = moves(Made(lambda w: w.flip(0).T), "w", {"w": (6, 8)}, 4, transposed=True)
    assert found.rows.tolist() == [5, 4, 3, 2, 1, 0] and found.groups.tolist() == [0, 1]


def test_sources_of_different_shapes_are_no_move():
    assert moves(Joined(lambda w, v: torch.cat((w, v))), "w", {"w": (6, 8), "v": (6, 4)}, 4) is None


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
