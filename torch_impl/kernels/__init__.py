"""Implementations of the layer's operators, one file per kind of device."""

__all__: list[str] = []
