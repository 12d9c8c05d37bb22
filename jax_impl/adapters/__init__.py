"""Replacements for other libraries' embedding layers; each imports its library."""

__all__: list[str] = []
