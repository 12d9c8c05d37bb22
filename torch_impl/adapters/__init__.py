"""The layer in the terms of other libraries; each module imports its library when it is used."""

__all__: list[str] = []
