"""Prompts kept on disk: pages of the KV cache, in files named by what they were computed from."""
