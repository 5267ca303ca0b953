"""A builder's methods, one an instruction, by what they compute."""
