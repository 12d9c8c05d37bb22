"""Proof of equality: cases, records of backends, and their comparison."""

__all__: list[str] = []
