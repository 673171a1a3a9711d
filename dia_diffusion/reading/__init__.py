"""Files that anybody may have written: read with bounds and checks, and nothing in them is run."""
