"""A checkpoint on disk: reading one, and laying out, naming and writing a quantized one."""
