"""What clients speak: each a thin way to the one request, and back."""
