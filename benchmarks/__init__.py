"""Benchmarks beside the alternatives that a user has; nothing is timed inside tests."""
