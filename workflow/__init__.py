"""Running the notebooks: which ones are out of date, in which order, where, and what came of it."""
