"""Where a checkpoint grows until it is whole: staging, journal, files being written, and what is copied along."""
