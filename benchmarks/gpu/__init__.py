"""One script for the first GPU that comes: `python -m benchmarks.gpu` (see __main__.py)."""
