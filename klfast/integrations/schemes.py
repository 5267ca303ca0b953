"""The scheme of each layer in a model's quantization_config, matched as compressed-tensors does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from klfast.core.errors import InvalidInputError, KernelUnavailableError
from klfast.quant.spec import QuantSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme


class Schemes:
    """The config groups of a model, found by compressed-tensors' own matching of names and classes.

    Raises:
        KernelUnavailableError: the config asks for a quantized cache.
    """

    def __init__(self, config: QuantizationConfig) -> None:
        if config.kv_cache_scheme is not None:
            raise KernelUnavailableError("klfast does not quantize the cache.")
        self._ignored, self._format = config.ignore or (), config.format
        self._groups = {target: group for group in config.config_groups.values() for target in group.targets}

    @property
    def targets(self) -> list[str]:
        """The names and patterns of the layers in the groups."""
        return list(self._groups)

    def spec(self, name: str, module: nn.Module) -> QuantSpec | None:
        """Return the spec of a module's weight; None if it is not quantized.

        Raises:
            KernelUnavailableError: klfast has no kernels for it, as the message says in one sentence.
        """
        from compressed_tensors.utils.match import is_match, match_targets

        if is_match(name, module, self._ignored):
            return None
        targets = match_targets(name, module, self._groups)
        return _spec(self._groups[targets[0]], self._format) if targets else None


def _spec(scheme: QuantizationScheme, usual_format: str) -> QuantSpec:
    if (scheme.format or usual_format) != "pack-quantized":
        raise KernelUnavailableError(f"some layers are in the format {scheme.format or usual_format}.")
    if scheme.weights is None or scheme.input_activations is not None or scheme.output_activations is not None:
        raise KernelUnavailableError("klfast does not quantize activations in the way that this model asks for.")
    try:
        return QuantSpec.from_compressed_tensors(scheme.model_dump())
    except InvalidInputError as error:
        raise KernelUnavailableError(f"{error}.") from error
