"""Fuzzing of every parser that sees bytes from outside: `python tests/fuzz/run.py`."""
