"""Tables in files: find one, read some of its rows, write one."""

__all__: list[str] = []
