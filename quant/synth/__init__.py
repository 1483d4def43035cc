"""Checkpoints of random weights in any shape, in the output format."""
