"""Mutated files at every door that promises to be safe: `python -m tests.fuzz_files`."""
