"""The pages: index and one page per notebook, from what a run wrote."""
