"""Some samples of a batch as JSON-able values, cut to what people look at. Pure functions over a batch.

What a model generated may be anything: bytes that are no UTF-8, ten million characters, terminal escapes, script tags.
Here it becomes plain text of a bounded length; whoever shows it escapes it for the place where it is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 20_000  # of a text
MOST_NUMBERS = 256  # of a list
_MOST_DEPTH = 8
_MOST_KEYS = 100


def preview(
    parts: Sequence[Any],
    first: int = 0,
    count: int = 3,
    numbers: int = MOST_NUMBERS,
    characters: int = MOST_CHARACTERS,
) -> dict[str, Any]:
    """Samples `first` to `first + count` of a payload, counted over its parts in their order.

    Args:
        numbers, characters: longest list, and text; of longer ones a last element tells how much was left out.

    Returns {"num_samples", "columns": {name: kind}, "samples": [{"index", "part", column: value, ...}]}; of a payload
    that is no batch {"value": ...}.
    """
    if not all(isinstance(part, Mapping) and hasattr(part, "num_samples") for part in parts):
        return {"value": [shown(part, numbers, characters) for part in parts]}
    samples: list[dict[str, Any]] = []
    at = 0
    for number, part in enumerate(parts):
        for row in range(max(0, first - at), min(part.num_samples, first + count - at)):
            values = {name: shown(column[row], numbers, characters) for name, column in part.items()}
            samples.append({"index": at + row, "part": number, "values": values})
        at += part.num_samples
    columns = {name: column.kind for name, column in parts[0].items()} if parts else {}
    return {"num_samples": at, "columns": columns, "samples": samples}


def shown(value: Any, numbers: int = MOST_NUMBERS, characters: int = MOST_CHARACTERS, depth: int = 0) -> Any:
    """A value as JSON can hold it, cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        head = bytes(value[: characters + 4])
        return _text(head.decode("utf-8", "backslashreplace"), characters, len(value) - len(head))
    if isinstance(value, str):
        return _text(value, characters)
    if depth >= _MOST_DEPTH:
        return f"{type(value).__name__}, too deep to be shown"
    if isinstance(value, Mapping):
        items = [*value.items()][:_MOST_KEYS]
        found = {_text(str(k), 200): shown(v, numbers, characters, depth + 1) for k, v in items}
        return {**found, **({"…": f"{len(value) - len(items)} more"} if len(value) > len(items) else {})}
    if hasattr(value, "tolist"):  # arrays, tensors; cut before they are turned into Python numbers
        shape = getattr(value, "shape", ())
        if len(shape) != 1:
            return (
                shown(value.tolist(), numbers, characters, depth + 1)
                if not shape
                else _listed(
                    [value[i] for i in range(min(len(value), numbers))], len(value), numbers, characters, depth
                )
            )
        return _listed(value[:numbers].tolist(), len(value), numbers, characters, depth)
    if isinstance(value, (list, tuple)):
        return _listed(value[:numbers], len(value), numbers, characters, depth)
    return _text(str(value), 1000)


def _listed(head: Sequence[Any], length: int, numbers: int, characters: int, depth: int) -> list[Any]:
    found = [shown(item, numbers, characters, depth + 1) for item in head]
    return [*found, f"… {length - len(found):,} more"] if length > len(found) else found


def _text(text: str, most: int, beyond: int = 0) -> str:
    """Without lone surrogates, which no encoding takes."""
    left_out = len(text) - most + beyond
    head = text[:most].encode("utf-8", "backslashreplace").decode()
    return f"{head}… {left_out:,} more characters" if left_out > 0 else head
