"""Tests as claims, in the same folders as what they test."""
