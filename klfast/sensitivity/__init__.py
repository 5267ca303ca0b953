"""How much each linear layer's quantization changes the model's next-token distribution."""
