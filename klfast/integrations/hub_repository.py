"""klfast's Triton kernels of state-space and delta-rule layers as a repository of the package kernels.

The repository needs torch and triton, but not klfast: kernels on the hub may import nothing else. It holds klfast's own
modules, those that the ops' functions and the layers import, with relative imports; nothing is written twice. Since
``dispatch.registry`` registers ops under the name of the package that it lies in, several copies and klfast go side by
side. A Python-only kernel is a folder for each backend, ``build/torch-<backend>``, with its files' hashes in
metadata.json (kernels at 8ac69fc5, docs/source/kernel-requirements.md; kernels 0.17.2, resolver.py and importer.py).
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from klfast import __version__
from klfast.core.errors import InvalidInputError
from klfast.core.io import folder_atomic
from klfast.ops import ssm

NAME = "klfast-ssm"
BACKENDS = ("cuda", "xpu")
VERSION = int(__version__.partition(".")[0])  # of the functions; the hub's convention calls 0 unfinished

_ROOTS = ("klfast.ops.ssm", "klfast.backends.triton.ssm", "klfast.integrations.hub_layers")
_IMPORT = re.compile(r"^( *from )klfast((?:\.\w+)*)(?= import )", re.MULTILINE)

_INIT = f'''"""State-space and delta-rule functions in Triton, of klfast {__version__}, for tensors on CUDA and XPU.

The functions have the signatures of the packages mamba_ssm, causal_conv1d and fla, ``layers`` those of transformers.
Tensors elsewhere go through plain PyTorch, with a warning; under TRITON_INTERPRET=1 through Triton's interpreter.
"""

import triton  # noqa: F401 (so that its absence shows here, not at the first call)

from . import layers
from .backends.triton import ssm as _kernels
from .dispatch import registry as _registry
from .kernels.launch import INTERPRETED as _INTERPRETED
from .ops.ssm import (
    {{functions}},
)

for _device in ("CUDA", "XPU", *(("CPU",) if _INTERPRETED else ())):
    for _op in _registry.op_names():
        _registry.register_kernel(_op, _device, getattr(_kernels, _op))

__all__ = [
    {{names}},
    "layers",
]
'''
_LAYERS = '''"""The functions as layers, which kernels' kernelize puts in the place of transformers' own."""

from .integrations.hub_layers import KERNELS, layer

globals().update({name: layer(name) for name in KERNELS})
'''
_CARD = f"""---
library_name: kernels
license: apache-2.0
---

State-space and delta-rule functions in Triton, for CUDA and XPU, of klfast {__version__}: causal convolution, the
scans of Mamba and Mamba-2, the gated delta rule and Kimi Delta Attention, and their decoding steps. No gradients.

```python
from kernels import get_kernel

ssm = get_kernel("OWNER/{NAME}", version={VERSION}, trust_remote_code=True)
y = ssm.causal_conv1d_fn(x, weight, bias, activation="silu")
```

Functions: {{functions}}.

Layers, with the parameters of transformers' functions: {{layers}}.
"""


def write(folder: str | os.PathLike[str]) -> None:
    """Write the repository to a new folder, whole or not at all.

    Raises:
        InvalidInputError: the folder exists.
        OSError: its parent is missing, or not writable.
    """
    from klfast.integrations.hub_layers import KERNELS

    folder = Path(folder)
    if folder.exists():
        raise InvalidInputError(f"export-kernels: {folder} exists; name another folder or remove it")
    functions = sorted(ssm.__all__)
    files = _sources()
    files["__init__.py"] = _INIT.format(
        functions=",\n    ".join(functions), names=",\n    ".join(f'"{name}"' for name in functions)
    )
    files["layers.py"] = _LAYERS
    files["LICENSE"] = _licence()
    with folder_atomic(folder) as new:
        for backend in BACKENDS:
            variant = new / "build" / f"torch-{backend}"
            for name, text in {**files, "metadata.json": _metadata(files, backend)}.items():
                (variant / name).parent.mkdir(parents=True, exist_ok=True)
                (variant / name).write_bytes(text.encode())
        card = _CARD.format(functions=", ".join(functions), layers=", ".join(sorted(KERNELS)))
        (new / "build" / "CARD.md").write_text(card, encoding="utf-8")


def _sources() -> dict[str, str]:
    """Return ``_ROOTS`` and what they import of klfast, with relative imports, by path in the package."""
    found: dict[str, str] = {}
    waiting = [*_ROOTS]
    while waiting:
        module = waiting.pop()
        file = _file(module)
        assert file is not None  # _imported yields no others
        path = Path(*module.split(".")[1:])
        path = path / "__init__.py" if file.name == "__init__.py" else path.with_suffix(".py")
        if path.as_posix() not in found:
            text = file.read_text(encoding="utf-8")
            found[path.as_posix()] = _relative(text, "." * len(path.parts))
            waiting.extend(_imported(text))
    # The other packages' own code only gathers names and kernels of all of klfast.
    packages = {(parent / "__init__.py").as_posix() for path in found for parent in Path(path).parents}
    return dict.fromkeys(packages, "") | found


def _imported(text: str) -> Iterator[str]:
    """Yield the modules of klfast, the package itself and the extension apart, that a module imports, at any depth."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "klfast":
            for inner in (f"{node.module}.{alias.name}" for alias in node.names):
                if _file(inner):
                    yield inner
                elif node.module != "klfast":
                    yield node.module


def _file(module: str) -> Path | None:
    """Return where a Python module lies; None for a name that is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # what it is part of is a module, not a package
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _relative(text: str, top: str) -> str:
    return _IMPORT.sub(lambda found: f"{found[1]}{top}{found[2][1:]}", text)


def _metadata(files: dict[str, str], backend: str) -> str:
    """Return metadata.json of a variant; its id, the name of the loaded module, differs where any file does."""
    hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(files.items())}
    encoded = {name: base64.b64encode(each).decode() for name, each in hashes.items()}
    whole = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    made = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole[:7]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": encoded},
    }
    return json.dumps(made, indent=2) + "\n"


def _licence() -> str:
    """Return the licence that klfast is installed with."""
    [file] = [file for file in metadata.files("klfast") or [] if file.name == "LICENSE"]
    return file.read_text(encoding="utf-8")
