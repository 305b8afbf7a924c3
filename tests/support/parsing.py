"""Python's source as a tree, in a process whose other threads may parse, too."""

import ast
import functools


@functools.cache
def parsed(source: str) -> ast.Module:
    """`ast.parse`, of each source once. CPython 3.11 counts the depth of a tree for all threads together and takes
    another thread that parses for an error: then once more."""
    try:
        return ast.parse(source)
    except SystemError:
        return ast.parse(source)
