"""A session: a loaded model that generates, and what it reports."""
