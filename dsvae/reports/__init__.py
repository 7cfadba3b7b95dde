"""What people look at: the log of a run, tables, the model card, report.html, the
comparison of runs."""
