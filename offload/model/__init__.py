"""transformers' model with our modules in it."""
