"""What the attention unit does: measurements of trained runs, one file per analysis, each with its figure."""
