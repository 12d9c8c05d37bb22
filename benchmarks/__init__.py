"""Side-by-side measurements of the layers, their peers and the physical floor: ``python -m benchmarks``."""

__all__: list[str] = []
