"""Where experts' bytes lie and how they move: files, reads, slots, copies. Decides nothing."""
