"""A model by its numbers: families, shapes, roles, recipes and where to find it. No weights."""
