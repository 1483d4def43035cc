"""Rounding by a text, and what rounding costs."""
