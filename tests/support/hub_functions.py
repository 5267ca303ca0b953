"""The functions of transformers' modeling files that the package kernels exchanges."""

import ast
from pathlib import Path

import transformers
from transformers_source import Module, Source

_MARKER = "use_kernel_func_from_hub_with_fallback("


def hub_functions():
    """Return {hub name: the arguments of the function} for each model, by the name of its folder."""
    found = {}
    for path, text in Source.of(Path(transformers.__file__).parents[1]).texts.items():
        for function in Module(text).functions.values() if _MARKER in text else ():
            for decorator in function.decorator_list:
                if ast.unparse(decorator).startswith(_MARKER):
                    name = ast.literal_eval(decorator.args[0])
                    found.setdefault(path.split("/")[2], {})[name] = function.args
    return found
