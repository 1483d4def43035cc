"""Tokens from the model: sequences in turns, what chooses the next token, and the streams that give it out."""
