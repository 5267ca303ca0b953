"""Models from and to disk: loading by name, quantizing as a plan says, saving and loading quantized ones."""
