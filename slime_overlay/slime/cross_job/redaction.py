"""Passwords and keys in URIs and texts are not shown."""

import re
from urllib.parse import unquote

_SECRET = re.compile(
    r"([?&](?:(?:sas_)?sig|[^=&]*(?:password|secret|token|_key(?=[_=]))[^=&]*)=)(.*?)(?=&\w+=|$)",
    re.IGNORECASE | re.DOTALL,
)
"""Parameters of a URI that nobody else is to read: a Redis' password, an object store's keys."""


def without_password(uri: str) -> str:
    """The URI as it may be shown, also one that cannot be read: of what stands between // and the last @ only a user's
    name is left, and of secret parameters nothing."""
    shown, at = "", 0
    for begin, end in _secret_spans(uri):
        if begin > at or not at:
            shown += uri[at:begin] + "***"
        at = max(at, end)
    return shown + uri[at:]


def without_secrets(text: str, uri: str) -> str:
    """What a library says of a store with this URI, without the secrets of it."""
    found = [uri[begin:end] for begin, end in _secret_spans(uri)]
    text = text.replace(uri, without_password(uri))
    for secret in sorted({*found, *map(unquote, found)} - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secret_spans(uri: str) -> list[tuple[int, int]]:
    """Where in a URI secrets stand, in order; they may overlap."""
    spans = [match.span(2) for match in _SECRET.finditer(uri)]
    begin, end = uri.find("://") + 3, uri.rfind("@")
    in_path = uri[begin : begin + 1] == "/" and uri.startswith(("file:", "unix:"))
    if 3 <= begin <= end and not in_path:
        colon = uri.find(":", begin, end)
        is_user = 0 <= colon < end - 1  # before an empty password it may be one itself
        spans.append((colon + 1 if is_user else begin, end))
    return sorted(spans)
