"""Where bytes will go, and how fast that is. Pure Python: planning needs neither torch nor weights."""
