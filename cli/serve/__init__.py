"""The server: one model behind the dialects that clients speak, and a page to watch it."""
