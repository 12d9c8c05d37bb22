"""The layer in the place of other libraries' own; each module imports its library."""

__all__: list[str] = []
