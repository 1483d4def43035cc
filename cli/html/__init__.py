"""The self-contained pages: a run's report, an evaluation, a simulated run."""
