"""For fault tests: stop at a known point. While the file that an environment variable names holds a number, whoever
comes by with that number waits, and FILE.held tells that somebody does."""

import os
from pathlib import Path


def held(variable: str, number: int) -> bool:
    """Whether to wait here (again); ask until it says no."""
    file = Path(os.environ.get(variable, "/nonexistent"))
    try:
        waiting = int(file.read_text()) == number
    except FileNotFoundError:
        return False
    if waiting:
        Path(f"{file}.held").touch()
    return waiting
