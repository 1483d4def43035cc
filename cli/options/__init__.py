"""Options that several commands share, written once."""
