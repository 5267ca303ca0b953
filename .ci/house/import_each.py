"""Import every module of klfast first, each in a fork of its own, with stand-ins for every package but the standard library's.

    python3 -I -S import_each.py ROOT [--extension]

Shows imports that fail by their order (circles); nothing is computed. With --extension klfast._C is a stand-in too, else it is missing.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

root = Path(sys.argv[1]).resolve()
with_extension = "--extension" in sys.argv


class Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__") and name not in ("__version__", "__get__", "__matmul__", "__array__", "__set__"):
            raise AttributeError(name)
        made = Meta(name, (Stub,), {})
        type.__setattr__(cls, name, made)
        return made

    def __call__(cls, /, *args, **named):
        if len(args) == 1 and not named and isinstance(args[0], types.FunctionType):
            return args[0]
        return Meta(cls.__name__ + "_", (Stub,), {})

    def __iter__(cls):
        return iter(())

    def __len__(cls):
        return 1

    def __bool__(cls):
        return True

    def __contains__(cls, item):
        return False

    def __getitem__(cls, key):
        return Stub

    def __index__(cls):
        return 1

    def __float__(cls):
        return 1.0

    def __enter__(cls):
        return cls

    def __exit__(cls, *_):
        return None


def _same(cls, *_):
    return cls


for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "lshift", "matmul", "floordiv", "mod", "and", "invert"):
    setattr(Meta, f"__{name}__", _same)
for name in ("lt", "le", "gt", "ge"):
    setattr(Meta, f"__{name}__", lambda *_: False)


class Stub(metaclass=Meta):
    def __init_subclass__(cls, **_):
        pass


class Module(types.ModuleType):
    __path__ = []
    __version__ = "5.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Meta(name, (Stub,), {})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    own: set = set()
    """klfast.bench and klfast.kernels from their folders; whatever is not of the standard library as a stand-in."""

    def find_spec(self, name, path=None, target=None):
        for package, folder in (("klfast.bench", "bench"), ("klfast.kernels", "kernels/triton")):
            if name == package:
                place = root / folder
                return importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
        if name == "klfast._C":
            return importlib.machinery.ModuleSpec(name, self) if with_extension else None
        top = name.split(".")[0]
        if top in ("klfast", "bench") or top in Finder.own or top in sys.stdlib_module_names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


import importlib.util

sys.meta_path.insert(0, Finder())
sys.path[:] = [str(root), *(p for p in sys.path if "site-packages" not in p)]

names = []
for folder, package in (("klfast", "klfast"), ("bench", "klfast.bench"), ("kernels/triton", "klfast.kernels")):
    for path in sorted((root / folder).rglob("*.py")):
        parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not name.endswith(("__main__", "highs")):
            names.append(name)
failed = []
if "--tests" in sys.argv:
    tests = sorted((root / "tests").rglob("*.py"))
    support = [str(root / "tests"), *(str(root / p) for p in ("tests/support", "tests/ops") if (root / p).is_dir())]
    names = [path.relative_to(root).as_posix() for path in tests if path.name != "__init__.py" and "xpu" not in path.parent.name]
    sys.modules.update({n: Module(n) for n in ("pytest", "hypothesis", "hypothesis.strategies")})
    own = {path.stem for path in tests} | {"xpu", "training_scan", "train_bundled"}
    Finder.own = own
for name in names:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        message = ""
        try:
            if name.endswith(".py"):
                sys.path[1:1] = [str((root / name).parent), *support]
                importlib.import_module(Path(name).stem)
            else:
                importlib.import_module(name)
        except BaseException as error:
            import traceback

            where = [f"{os.path.relpath(f.filename, root)}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if str(root) in f.filename]
            message = f"{type(error).__name__}: {error} [{' > '.join(where[-6:])}]"
        os.write(write, message[:2000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    if message:
        failed.append((name, message))
print(f"{len(names)} modules, {len(failed)} fail when imported first")
for name, message in failed:
    print(f"  {name}: {message}")
