"""Programs of csrc/ without csrc/python/, built as setup.py builds the extension."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# In setup.py's own folder, by default, so that only outdated objects are compiled.
_BUILD = """
import json, runpy, setuptools, sys
from pathlib import Path
program, patterns, tiers, openmp, folder = json.loads(sys.argv[1])
given = {}
setuptools.setup = given.update
names = runpy.run_path("setup.py")
[extension] = given["ext_modules"]
extension.sources = [source for source in extension.sources if Path(source).parts[1] != "python"]
extension.sources += sorted(str(path) for pattern in patterns for path in Path().glob(pattern))

class Build(names["BuildPerTier"]):
    def built_tiers(self):
        return [tier for tier in super().built_tiers() if tiers is None or tier in tiers]

    def build_extensions(self):
        self.objects = self.build_objects(extension)
        self.compiler.link_executable(
            self.objects, program, output_dir=self.build_temp, target_lang="c++",
            extra_postargs=[*(["-fopenmp"] if openmp else []), *names["extra_flags"]()],
        )

command = Build(setuptools.Distribution({"name": program, "ext_modules": [extension]}))
command.build_temp = folder
command.ensure_finalized()
command.run()
print(json.dumps({"program": str(Path(command.build_temp, program).absolute()), "objects": command.objects}))
"""


def build(
    program: str,
    *patterns: str,
    flags: str = "",
    environment: Mapping[str, str] | None = None,
    tiers: Collection[str] | None = None,
    openmp: bool = True,
    folder: str | None = None,
) -> dict[str, Any]:
    """Build a program, and return the paths of "program" and "objects", the latter from the repository's root.

    Args:
        program: its name.
        patterns: of its other sources, from the repository's root.
        flags: more of them for compiler and linker.
        environment: more variables for setup.py.
        tiers: which to build; all that can be by default.
        openmp: link the compiler's OpenMP library.
        folder: for the objects; setup.py's own by default.
    """
    (ROOT / "build").mkdir(exist_ok=True)
    arguments = json.dumps([program, patterns, None if tiers is None else list(tiers), openmp, folder])
    with (ROOT / "build" / f"{program}.lock").open("w") as lock:  # only one test process builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, arguments],
            cwd=ROOT,
            env={**os.environ, **({"KLFAST_CXXFLAGS": flags} if flags else {}), **(environment or {})},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return built
