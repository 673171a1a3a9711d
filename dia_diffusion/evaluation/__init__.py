"""Images -> features -> statistics -> a distance -> a record of it with its whole protocol -> curves."""
