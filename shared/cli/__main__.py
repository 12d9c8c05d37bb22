"""``python -m shared.cli`` is ``pve``."""

from shared.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
