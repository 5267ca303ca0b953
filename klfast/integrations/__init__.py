"""klfast where transformers looks for it: a quantizer for packed weights, kernels for ``use_kernels=True``."""
