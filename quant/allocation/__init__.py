"""How many bits each part of a model is worth."""
