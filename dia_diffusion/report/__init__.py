"""One self-contained HTML page about a run or a study: curves, samples, results, recipe, environment."""
