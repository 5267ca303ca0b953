"""Choice of the implementation of an op: definitions, kernels by device, pins, and checks of every call."""
