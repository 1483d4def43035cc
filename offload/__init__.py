"""Where experts live and how they reach compute."""
