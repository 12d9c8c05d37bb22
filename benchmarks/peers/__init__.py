"""The forms that other libraries have of what is measured, by framework and by what they do."""

__all__: list[str] = []
