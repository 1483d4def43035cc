"""What several commands do alike: plan a run, open a model, choose bits, read texts, end with a report."""
