"""klfast's kernels in transformers' models with recurrent layers.

``accelerate`` gives each mixer, norm and linear layer of one model its own forward (forwards.py): classes and other
models in the process stay as they are.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterable

from torch import nn

from klfast.acceleration import forwards
from klfast.core.errors import InvalidInputError, KernelUnavailableError
from klfast.dispatch import pins, registry
from klfast.models.families import family_of, mixer_of, norm_of
from klfast.models.recurrent import recurrent_classes
from klfast.nn import direct_call
from klfast.nn.untouched import has_its_own_forward

_lock = threading.Lock()


def accelerate(model: nn.Module, ssm: str = "klfast") -> nn.Module:
    """Make a transformers state-space model or hybrid run klfast's kernels; return the same model.

    This covers the layers of the families in ``klfast.models.families``, in any model: Mamba, Mamba-2, FalconMamba,
    Granite-4.0-H, Falcon-H1, Bamba, Nemotron-H, Jamba, Zamba, Zamba2, Qwen3.5, Qwen3-Next, OLMo hybrid,
    Kimi-Linear, LFM2 and LFM3.

    Only this model changes, in place, including caches and generation; ``unaccelerate`` undoes it. Copies and pickles
    of the model are accelerated, too. A model without recurrent layers (a Llama) has nothing to accelerate and is
    returned unchanged, as is one already accelerated; one with other recurrent layers (a RWKV, an xLSTM) is also left
    unchanged, with a ``SlowPathWarning``. The same warning names modules whose forward another library has replaced
    (accelerate's hooks, for example): these keep it, so call ``klfast.accelerate`` before that library does its work.

    The tensors' device selects the kernels at each call: the CPU's, or on CUDA and XPU those in Triton, where the
    linear layers stay torch's. On devices without kernels, and where gradients are needed, the model's own code runs,
    with a ``SlowPathWarning``: run inference under ``torch.inference_mode()`` or ``torch.no_grad()``. On the CPU, with
    16-bit weights, the output head of an accelerated model returns float32 logits if the model would cast them anyway.

    Args:
        model: a transformers model.
        ssm: source of the convolution and scans: "klfast"; or "mamba_ssm", for a model on a CUDA device, to leave these
            to the mixers' own forward, which calls the CUDA packages mamba_ssm, causal_conv1d and fla, as the model
            needs them. The last call decides.

    Raises:
        InvalidInputError: ``model`` is not an nn.Module, ``ssm`` is unknown, or "mamba_ssm" for a model elsewhere.
        KernelUnavailableError: the model is on the CPU and the extension klfast._C was not built, a package that
            ``ssm`` requires cannot be imported, or the mixers of the installed transformers do not call every function
            that klfast replaces. The model is left as it was.
    """
    if ssm not in ("klfast", "mamba_ssm"):
        raise InvalidInputError(f'accelerate: ssm must be "klfast" or "mamba_ssm", got {ssm!r}')
    with _lock:
        replacements, left = _replacements(model), []
        if ssm == "mamba_ssm":
            left = [module for module, forward in replacements.items() if forward is forwards.mixer_forward]
            _require_packages(model, left)
        if (
            replacements
            and not registry.has_kernel("selective_scan", "CPU")
            and any(p.device.type == "cpu" for p in model.parameters())
        ):
            raise KernelUnavailableError(
                f"accelerate: {pins.why_not('scalar')} Install klfast with a C++ compiler present"
            )
        wanted = {module: forward for module, forward in replacements.items() if module not in left}
        for mixer in {type(module) for module, forward in wanted.items() if forward is forwards.mixer_forward}:
            forwards.require_functions(mixer)
        _warn_about_slow_parts(model, wanted)
        for module in left:
            _restore(module)
        for module, forward in wanted.items():
            if not _is_foreign(module):
                module.forward = forwards.Bound(forward, module)
    return model


def accelerate_or_warn(model: nn.Module) -> nn.Module:
    """Call ``accelerate``; if that is impossible, warn with a ``SlowPathWarning`` and leave the model as it is."""
    try:
        return accelerate(model)
    except KernelUnavailableError as error:
        pins.slow_path("accelerate", type(model).__name__, str(error))
        return model


def unaccelerate(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``; a model that was not accelerated is returned unchanged.

    If another library has since wrapped klfast's forwards in its own (accelerate's hooks, for example), a warning names
    the modules, which keep both.

    Raises:
        InvalidInputError: ``model`` is not an nn.Module.
    """
    _require_module(model)
    with _lock:
        for module in model.modules():
            _restore(module)
        if wrapped := [name for name, module in model.named_modules() if _wraps_klfasts(vars(module).get("forward"))]:
            warnings.warn(
                f"unaccelerate: another library's forward calls klfast's in {_listed(wrapped)}; remove it first "
                "(accelerate: remove_hook_from_submodules), then call klfast.unaccelerate again",
                UserWarning,
                stacklevel=2,
            )
    return model


def _restore(module: nn.Module) -> None:
    if forwards.is_own(vars(module).get("forward")):
        del module.forward
        direct_call.forget(module)


def _require_packages(model: nn.Module, mixers: list[nn.Module]) -> None:
    if elsewhere := {p.device.type for p in model.parameters()} - {"cuda"}:
        raise InvalidInputError(
            f'accelerate: ssm="mamba_ssm" needs a model on a CUDA device, this one is on '
            f'{", ".join(sorted(elsewhere))}; move it with model.to("cuda") first, or leave ssm out'
        )
    for package in sorted({name for mixer in mixers for name in forwards.cuda_packages(type(mixer))}):
        try:
            importlib.import_module(package)
        except Exception as error:  # a binary built for another torch may raise anything
            reason = " ".join(str(error).split())
            raise KernelUnavailableError(
                f'accelerate: ssm="mamba_ssm" needs the package {package}, which cannot be imported ({reason}); '
                "install it for this PyTorch and CUDA, or leave ssm out"
            ) from error


def is_accelerated(module: nn.Module) -> bool:
    """Return True if this mixer, norm or linear layer runs klfast's functions."""
    forward = vars(module).get("forward")
    return forwards.is_own(forward) or _wraps_klfasts(forward)


def _wraps_klfasts(forward: object) -> bool:
    """Return True for another library's forward around klfast's, if functools.wraps has marked it."""
    while (forward := getattr(forward, "__wrapped__", None)) is not None:
        if forwards.is_own(forward):
            return True
    return False


def _is_foreign(module: nn.Module) -> bool:
    """Return True if the module's forward is neither its class's nor klfast's."""
    forward = vars(module).get("forward")
    own_class = getattr(forward, "__func__", None) is type(module).forward  # bound to the module, as by unpickling
    return forward is not None and not own_class and not forwards.is_own(forward)


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"accelerate takes a transformers model, got {type(model).__name__}")


def _replacements(model: nn.Module) -> dict[nn.Module, forwards.Forward]:
    """Return the modules to change, each with its new forward; none if there is no mixer among them."""
    _require_module(model)
    family = family_of(model)
    get_head: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    found: dict[nn.Module, forwards.Forward] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            is_wide = module is head and family.widens_logits
            found[module] = forwards.head_forward if is_wide else forwards.linear_forward
        if mixer_of(type(module)) is not None:
            found[module] = forwards.mixer_forward
        elif norm_of(type(module)) is not None:
            found[module] = forwards.norm_forward
    has_mixer = forwards.mixer_forward in found.values()
    return found if has_mixer or family.own_code else {}


def _warn_about_slow_parts(model: nn.Module, wanted: dict[nn.Module, forwards.Forward]) -> None:
    kind = type(model).__name__
    if unknown := sorted(
        c.__name__ for c in recurrent_classes(model) if mixer_of(c) is None and not c.__module__.startswith("klfast.")
    ):
        pins.slow_path("accelerate", kind, f"klfast does not support the recurrent layers {', '.join(unknown)}.", _OWN)
    foreign = [
        name
        for name, module in model.named_modules()
        if module in wanted and _is_foreign(module) and not is_accelerated(module)
    ]
    if foreign:
        pins.slow_path(
            "accelerate",
            kind,
            f"another library has replaced the forward of {_listed(foreign)} in this {kind}; call klfast.accelerate "
            "before it does, or undo that first.",
            _OWN,
        )
    classes = {type(module) for module, forward in wanted.items() if forward is not forwards.mixer_forward}
    if patched := sorted(c.__name__ for c in classes if not has_its_own_forward(c)):
        pins.slow_path(
            "accelerate", kind, f"another library has replaced the forward of the classes {', '.join(patched)}.", _OWN
        )


_OWN = "the model's own forward"


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
