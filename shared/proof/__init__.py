"""The proof: a case, what each backend records for it, and the comparison of two records."""

__all__: list[str] = []
