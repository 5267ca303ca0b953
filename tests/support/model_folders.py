"""Changes to a model's folder, and the check that it is refused."""

import json

import pytest
from safetensors.torch import load_file, save_file

from klfast.checkpoint.by_name import load_model
from klfast.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def refused(folder, match, load=load_model, **options):
    """Fail unless a folder is refused, in one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def shard(folder, parts=2):
    """Split the weights into several files with an index; return {tensor: file}."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name, place in weight_map.items() if place == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map
