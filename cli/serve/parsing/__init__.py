"""The text of an answer taken apart as it comes: what is said, what is thought, which tools are called."""
