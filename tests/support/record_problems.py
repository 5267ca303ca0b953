"""Where the source of a version of transformers differs from what the records of families rely on."""

import ast
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from transformers_source import Module, Source, inference_calls, name_of, parameters

from klfast.acceleration import forwards
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.models import calling
from klfast.models.families.base import Family, Mixer
from klfast.nn.mamba_step import Parts

# Arguments of the functions that choose among transformers' own implementations.
_CHOICES = {"use_mambapy", "use_associative_scan"}
# Transformers' names of arguments, and those that klfast's functions take from mamba_ssm and causal_conv1d.
_SAME = {("hidden_states", "x"), ("hidden_states", "u"), ("dt", "delta")}
# Model types that only later versions have, and classes: before, another family's stood in their places.
_SINCE = {"NemotronHRMSNormGated": (5, 20), "lfm3": (5, 23)}
# What forwards.one_token reads of a mixer, beside its parts.
_READ_IN_A_STEP = ("activation", "layer_idx", "in_proj", "out_proj")


def problems(record: Family, source: Source) -> list[str]:
    """Return a line for each fact of a family's record that is not, or no longer, true of a version's source."""
    files = source.of_model(record.model_type)
    version = tuple(map(int, source.version.split(".")[:2]))
    later = {name for name, since in _SINCE.items() if version < since}
    if files is None:
        found = [] if record.model_type in later else [f"there is no model type {record.model_type}"]
    else:
        found = list(_problems(record, later, *files))
    return [f"transformers {source.version}, {record.model_type}: {line}" for line in found]


def _problems(record: Family, later: set[str], config: Module, modeling: Module) -> Iterator[str]:
    named = {*record.mixers, *record.norms, *record.rows} - later
    yield from (f"there is no class {name}" for name in named if name not in modeling.classes)
    mixers, norms, rows = (
        {name: facts for name, facts in of_kind.items() if name in modeling.classes}
        for of_kind in (record.mixers, record.norms, record.rows)
    )
    for name, mixer in mixers.items():
        yield from _of_mixer(name, mixer, modeling)
    for name, norm in norms.items():
        yield from _missing_attributes(name, norm, modeling)
        forward = modeling.method(name, "forward")
        taken = [] if forward is None else parameters(forward)
        if not taken or taken[1:] not in ([], ["gate"]):
            yield f"{name}.forward takes ({', '.join(taken)}), klfast's (hidden_states, gate)"
    for name, uses in rows.items():
        yield from _missing_attributes(name, uses, modeling)
    path = record.blocks.path
    if path is not None and not any(path.split(".")[-1] in modeling.attributes(name) for name in modeling.classes):
        yield f"no class has blocks named {path}"
    if record.logits is not None:
        yield from _missing_attributes(config.class_with(f"model_type = {record.model_type!r}"), record.logits, config)
    yield from _of_causal_model(record, modeling)


def _of_mixer(name: str, mixer: Mixer, modeling: Module) -> Iterator[str]:
    forward = modeling.method(name, "forward")
    if forward is None:
        yield f"{name} has no forward"
        return
    calls = [call for call in inference_calls(forward) if name_of(call.func) in modeling.functions]
    called = {name_of(call.func) for call in calls}
    yield from (f"{name}.forward does not call {one}" for one in mixer.functions if one not in called)
    replaceable = {one for one in called if _has_kernels(modeling.functions[one])}
    yield from (f"{name}.forward calls {one}, too" for one in sorted(replaceable - {*mixer.functions}))
    for call in calls:
        if (one := name_of(call.func)) in mixer.functions:
            yield from _other_names(f"{name}.forward calls {one}", call, modeling.functions[one], one)

    first = ["hidden_states"]
    if mixer.parts is not None:
        made = modeling.attributes(name)
        yield from (f"{name} has no attribute {one}" for one in _READ_IN_A_STEP if one not in made)
        yield from _missing_attributes(name, mixer.parts, modeling)
        step = [*inspect.signature(forwards.one_token).parameters]
        if parameters(forward)[1:2] == ["cache_params"]:
            step[step.index("cache")] = "cache_params"
        first = step[2:5]
    if (taken := parameters(forward))[: len(first)] != first:
        yield f"{name}.forward takes ({', '.join(taken)}), klfast's ({', '.join(first)})"
    if mixer.left_weight is not None:
        if modeling.attributes(name).get(mixer.left_weight) != "Linear":
            yield f"{name} has no linear layer {mixer.left_weight}"
        if f"self.{mixer.left_weight}.weight @" not in ast.unparse(forward):
            yield f"{name}.forward does not multiply by self.{mixer.left_weight}.weight from the left"


def _has_kernels(function: ast.FunctionDef) -> bool:
    return any("use_kernel_func" in ast.unparse(decorator) for decorator in function.decorator_list)


def _other_names(what: str, call: ast.Call, theirs: ast.FunctionDef, function: str) -> Iterator[str]:
    """Compare the names that a call's arguments have in transformers' function and in klfast's."""
    ours = [
        one.name
        for one in inspect.signature(REPLACEMENTS[function].function).parameters.values()
        if one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    positional = parameters(theirs)[: len(call.args)]
    if any(a != b and (a, b) not in _SAME for a, b in itertools.zip_longest(positional, ours[: len(positional)])):
        yield f"{what} with ({', '.join(positional)}), klfast's takes ({', '.join(ours)})"
    for keyword in call.keywords:
        if keyword.arg is not None and keyword.arg not in {*ours, *_CHOICES}:
            yield f"{what} with {keyword.arg}=, which klfast does not know"


def _of_causal_model(record: Family, modeling: Module) -> Iterator[str]:
    name = next((name for name in modeling.classes if name.endswith("ForCausalLM")), None)
    forward = None if name is None else modeling.method(name, "forward")
    if name is None or forward is None:
        yield "there is no class for causal language models"
        return
    if not {*parameters(forward)} & {*calling.CACHE_NAMES}:
        yield f"{name}.forward takes no cache ({', '.join(calling.CACHE_NAMES)})"
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    widens = any(name_of(node.targets[0]) == "logits" and ".float()" in ast.unparse(node.value) for node in assigned)
    if widens != record.widens_logits:
        yield f"{name}.forward {'widens' if widens else 'does not widen'} its logits with .float()"
    prepare = modeling.method(name, "prepare_inputs_for_generation")
    drops = prepare is not None and "['attention_mask'] = None" in ast.unparse(prepare)
    if drops != record.masks_prompt_only:
        yield f"{name} {'drops' if drops else 'does not drop'} the mask after the prompt"


class _Value(int):
    """Stands for an attribute of a module: a number, or a part that has attributes, with nothing registered."""

    def __getattr__(self, name: str) -> "_Value":
        return _Value(not name.startswith("_"))

    def __getitem__(self, _: object) -> "_Value":
        return _Value(1)


def _missing_attributes(name: str, function: Callable[[Any], object], module: Module) -> Iterator[str]:
    """Call a record's function with the attributes that a class defines; compare the names in its result, too."""
    made = module.attributes(name)
    parts = {one: type(maker or "_Value", (_Value,), {})(1) for one, maker in made.items()}
    try:
        found = function(SimpleNamespace(_parameters=None, **parts))
    except AttributeError as error:
        yield f"{name} has no attribute {error.name}"
        return
    if isinstance(found, Parts):
        places = [part[1] for part in found if isinstance(part, tuple) and part]
        yield from (f"{name} has no parameter {one}" for one in places if made.get(one) != "Parameter")
    elif isinstance(found, dict):
        yield from (f"{name} has no linear layer {one}" for one in found if made.get(one) != "Linear")
