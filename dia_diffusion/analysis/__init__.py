"""What the attention unit does: measurements of trained runs, one file an analysis, each with its figure."""
