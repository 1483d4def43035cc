"""A source checkpoint made into a quantized one: bounded memory, resumable, atomic."""
