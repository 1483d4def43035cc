"""Quantization by the activations of a text, and what quantization does to a model's predictions."""
