"""Weights that somebody else quantized, read as the floating-point matrices that they stand for."""
