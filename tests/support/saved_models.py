"""Tiny quantized models, saved folders and their manifest."""

import json

import pytest
import torch
from tiny_models import tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.core import errors
from klfast.models.head import head_name
from klfast.models.matrices import matrices

SPECS = (
    QuantSpec(4, 32),
    QuantSpec(6, 32, symmetric=False),
    QuantSpec(8, -1),
    QuantSpec(6, -1),
    QuantSpec(4, 16, symmetric=False),
    QuantSpec(8, 32, symmetric=False),
)


def quantized(family, tied=False, dtype=torch.float32, specs=SPECS, activation="exact", head=True, experts=True):
    """Return a tiny model with every layer except one quantized, the specs in turn; accelerated, as loaded ones are."""
    model = tiny(family, tied, dtype)
    names = [name for name in list(matrices(model))[1:] if head or name != head_name(model)]
    names = [name for name in names if experts or not matrices(model)[name].is_stack]
    plan = {
        name: klfast.quant.spec.storable_spec(specs[i % len(specs)], matrices(model)[name].shape[1])
        for i, name in enumerate(names)
    }
    return klfast.accelerate(klfast.quantize_model(model, Plan(plan, "uniform"), activation=activation))


def sign(folder):
    """Make the manifest agree with the files again, as somebody who alters them on purpose would."""
    from klfast.checkpoint.manifest import write_manifest

    manifest = json.loads((folder / "klfast.json").read_text())
    write_manifest(folder, **{k: v for k, v in manifest.items() if k not in ("format_version", "files")})


def refused(folder, match, **options):
    """Fail unless load_quantized refuses a folder, in one line."""
    with pytest.raises(errors.CheckpointError, match=match) as caught:
        klfast.load_quantized(folder, **options)
    assert "\n" not in str(caught.value)
