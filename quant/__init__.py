"""Weights: what they are on disk, and how to multiply by them. Knows nothing of tiers or devices' budgets."""
