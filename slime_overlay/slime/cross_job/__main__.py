"""`python -m slime.cross_job`: the command line, see ops/."""

import sys


def main() -> None:
    """Run it; what it needs besides the package is named where it is missing."""
    try:
        from .ops.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs typer and rich: pip install typer rich ({error})")
    run()


if __name__ == "__main__":
    main()
