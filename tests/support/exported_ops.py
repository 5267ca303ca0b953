"""A pytest plugin that puts the functions of an exported repository, at REPOSITORY, in the place of klfast.ops' own."""

import os
from pathlib import Path

import klfast.ops
from kernels import get_local_kernel

repository = get_local_kernel(Path(os.environ["REPOSITORY"]))
for _name in repository.__all__:
    if _name != "layers":
        setattr(klfast.ops, _name, getattr(repository, _name))
