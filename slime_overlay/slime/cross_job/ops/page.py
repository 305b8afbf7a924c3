"""The page of the live view and of the report: one HTML text with style and script inside, which asks nobody else.

- Self-contained: it works offline; its Content-Security-Policy names its own style and script by their hashes, lets
  the live page talk to its own server and the report to nobody, and forbids turning any text into markup.
- Whatever data holds (script tags, lone surrogates, not-a-number, integers beyond JavaScript's) becomes JSON that
  every browser reads, and that cannot end the element in which it lies.

The page's script draws the same state in both cases: live it fetches that from /api, in a report it lies in the page.
"""

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("text.js", "state.js", "charts.js", "cards.js", "lane.js", "rollout.js", "report.js", "page.js")
"""They make one script, in this order."""

_EXACT = 2**53  # greatest integer up to which JavaScript counts
_MOST_DEPTH = 20
_SLOT = re.compile(r"<!--(POLICY|STYLE|DATA|SCRIPT)-->")


@dataclass(frozen=True)
class Page:
    """A page, and the policy that its server is to send along."""

    html: str
    policy: str


@functools.cache
def live_page() -> Page:
    """The page that fetches what it shows from its own server."""
    style, script = _style(), _script()
    policy = _policy(style, script, "'self'")
    return Page(_filled(policy, style, script, ""), f"{policy}; frame-ancestors 'none'")


def report_page(data: Mapping[str, Any]) -> str:
    """The page with its data inside: {"look": what Viewer.look said, "figures": report.report_data of it, ...}."""
    style, script = _style(), _script()
    block = f'<script type="application/json" id="data">{embedded(data)}</script>'
    return _filled(_policy(style, script, "'none'"), style, script, block)


def embedded(value: Any) -> str:
    """JSON that can stand inside an HTML element: without <, > and &, and with ASCII characters only."""
    return to_json(value).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def to_json(value: Any) -> str:
    """JSON, in ASCII, that every reader takes; see `plain`."""
    return json.dumps(plain(value), separators=(",", ":"), allow_nan=False)


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON and JavaScript can hold of a value: what they cannot is told in words ("NaN", "9007199254740993")."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if -_EXACT <= value <= _EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth >= _MOST_DEPTH:
        return f"{type(value).__name__}, too deep to be shown"
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return plain(value.tolist(), depth + 1)
    return str(value)


def _filled(policy: str, style: str, script: str, data: str) -> str:
    texts = {
        "POLICY": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "STYLE": f"<style>{style}</style>",
        "DATA": data,
        "SCRIPT": f"<script>{script}</script>",
    }
    return _SLOT.sub(lambda slot: texts[slot[1]], _read("page.html"))


def _policy(style: str, script: str, connect: str) -> str:
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digest(script)}",
            f"style-src {_digest(style)}",
            f"connect-src {connect}",
            "img-src data:",  # the empty icon, or browsers ask for one
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _style() -> str:
    return _read("page.css")


@functools.cache
def _script() -> str:
    return '(() => {\n"use strict";\n' + "\n".join(map(_read, SCRIPTS)) + "\n})();"


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
