"""Models on disk: loading by name, quantizing by a plan, saving and loading quantized ones."""
