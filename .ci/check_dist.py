"""Check that the wheel contains only klfast, complete and under 30 MB, and that the sdist can rebuild it."""

import sys
import tarfile
import zipfile
from pathlib import Path

MAX_WHEEL_BYTES = 30_000_000
IN_WHEEL = (
    "klfast/_C.cpython-",
    "klfast/kernels/__init__.py",
    "klfast/kernels/dequant_matmul.py",
    "klfast/bench/conftest.py",
    "klfast/assets/report/style.css",
    "klfast/assets/text/evaluation.txt",
    *(f"klfast/assets/models/{name}/model.safetensors" for name in ("hymba", "mamba", "mamba2")),
)
IN_SDIST = (
    "csrc/python/module.cpp",
    "csrc/core/tiers.def",
    "csrc/core/tiers.h",
    "kernels/triton/__init__.py",
    "klfast/__init__.py",
    "tests/conftest.py",
    "Makefile",
    "constraints.txt",
    "LICENSE",
)


def main(folder: Path) -> None:
    """Raise AssertionError unless the wheel and the sdist in a folder are as they should be."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = {name.split("/")[0] for name in names} - {"klfast"}
    assert all(top.endswith(".dist-info") for top in foreign), f"the wheel holds more than klfast: {sorted(foreign)}"
    missing = [prefix for prefix in IN_WHEEL if not any(name.startswith(prefix) for name in names)]
    assert not missing, f"missing from the wheel: {missing}"
    assert wheel.stat().st_size < MAX_WHEEL_BYTES, f"the wheel has {wheel.stat().st_size:,} bytes"
    with tarfile.open(sdist) as archive:
        packed = {one.name.split("/", 1)[-1] for one in archive if one.isfile()}
    missing = [name for name in IN_SDIST if name not in packed]
    assert not missing, f"missing from the sdist: {missing}"
    missing = sorted(name for name in packed if name.startswith("klfast/") and name not in names)
    assert not missing, f"in klfast/, but missing from the wheel (pyproject.toml lists packages and data): {missing}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
