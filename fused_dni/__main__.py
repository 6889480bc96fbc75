"""``python -m fused_dni``: the command line."""

from fused_dni.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
