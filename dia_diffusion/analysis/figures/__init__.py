"""The analyses' figures, drawn from the records alone; a file for each kind."""
