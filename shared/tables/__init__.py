"""Vocabulary tables in files: find, read and write."""

__all__: list[str] = []
