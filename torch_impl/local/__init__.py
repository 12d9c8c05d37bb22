"""What makes one rank's lookup and its gradient fast on a CPU, and what adds a row's gradients up anywhere."""

__all__: list[str] = []
