"""Mutated inputs for every command: what comes of each is an answer, or one error line and exit 1 or 2.

``python -m tests.fuzz --seconds 600 --seed 7`` looks for others; ``corpus`` holds those that were once found.
"""
