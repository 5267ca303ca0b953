"""The class that transformers' from_pretrained uses for weights in the formats of compressed-tensors.

transformers imports it together with its own quantizers, so klfast's kernels are imported only when a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from klfast.core.errors import KernelUnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedQuantizer(CompressedTensorsHfQuantizer):
    """transformers' quantizer, except that packed integer weights become QuantLinear layers and QuantExperts.

    from_pretrained builds the model on the meta device, has ``_process_model_before_weight_loading`` exchange layers,
    asks ``update_weight_conversions`` how files differ from the model, reads the files' tensors into the places of
    their names, and calls ``_process_model_after_weight_loading`` (transformers 5.17 to 5.24, modeling_utils.py).
    """

    _runs_packed = False
    _shared: Mapping[str, str] = {}
    _rescales = False  # whether the configuration has Mamba's initialisers divide out_proj

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self._is_packed():
            from klfast.checkpoint import packed_folder
            from klfast.dispatch import pins
            from klfast.integrations import packed_experts, packed_layers

            config = self.compressor.quantization_config
            files = [os.path.abspath(file) for file in checkpoint_files or ()]
            try:
                self._shared = packed_layers.put_in(model, config, files, device_map)
                self._runs_packed = True
                if getattr(model.config, "rescale_prenorm_residual", False):  # 5.24 divides what was read, too
                    self._rescales, model.config.rescale_prenorm_residual = True, False
                return
            except KernelUnavailableError as error:
                if packed_folder.is_required():
                    raise
                packed_experts.require_readable(files, config)
                kind, how = type(model).__name__, "transformers' quantizer, with dense weights"
                pins.slow_path("from_pretrained", kind, str(error), how)
        own: Any = super()  # untyped in transformers
        own._process_model_before_weight_loading(
            model, device_map=device_map, checkpoint_files=checkpoint_files, **kwargs
        )

    def _is_packed(self) -> bool:
        """Return True if weights are in the format ``pack-quantized``, and the caller does not ask for dense ones."""
        if self.quantization_config.dequantize or not self.quantization_config.is_quantization_compressed:
            return False
        config = self.compressor.quantization_config
        return "pack-quantized" in {group.format or config.format for group in config.config_groups.values()}

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Return the conversions of packed experts besides the model's own; ``args`` are the model, or (5.17) none."""
        if not self._runs_packed:
            own: Any = super()  # untyped in transformers
            theirs: list[Any] = own.update_weight_conversions(weight_conversions, *args)
            return theirs
        from klfast.integrations import packed_experts

        return packed_experts.with_packed_stacks(weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not self._runs_packed:
            return super()._process_model_after_weight_loading(model, **kwargs)
        from klfast.integrations import packed_layers

        packed_layers.finish(model, self._shared)
        if self._rescales:
            model.config.rescale_prenorm_residual = True
        return model
