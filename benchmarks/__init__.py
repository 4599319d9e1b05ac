"""What the library's fast paths gain over plain loops: ``python -m benchmarks``."""
