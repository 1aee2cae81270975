"""Compiler options of one program; they belong to a whole program, not to one of its operations."""

Options = tuple[tuple[str, str], ...]
"""Names and values."""
