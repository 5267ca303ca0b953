"""Compare the records of families with the source of other versions of transformers, which are not installed for it."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from record_problems import problems
from transformers_source import Source

from klfast.models.families import FAMILIES

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--ignore-requires-python")


def download(requirement: str) -> Source:
    with TemporaryDirectory() as folder:
        subprocess.run([*PIP, "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement], check=True)
        return Source.of(next(Path(folder).iterdir()))


def main(versions: list[str]) -> int:
    """Print what differs from the records in each version, the newest if none is given; return 1 if anything does."""
    failed = 0
    for requirement in [f"transformers=={version}" for version in versions] or ["transformers"]:
        source = download(requirement)
        lines = [line for record in FAMILIES if not record.own_code for line in problems(record, source)]
        print("\n".join(lines) or f"transformers {source.version} is as the records say")
        failed |= bool(lines)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
