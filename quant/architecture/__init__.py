"""Models of any family that transformers knows, read off transformers itself."""
