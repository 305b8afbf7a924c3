"""Who may see the live view: the token, and whether a request comes from the view's own page. Pure functions.

On loopback no token is asked for, unless Ray's own cluster asks for one; then it is the same one. Elsewhere a token is
always asked for. Requests that a stranger's page makes a browser send are refused: by their Host (DNS rebinding), and
by their Origin (cross-site requests).
"""

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import BadInput, Refused


def ray_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """The token of Ray's cluster, where Ray asks for one: RAY_AUTH_TOKEN, or what is in the file
    RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    As Ray has it: RAY_AUTH_MODE=token asks for one, and so does a token that is there while RAY_AUTH_MODE is not set.

    Raises:
        BadInput: RAY_AUTH_MODE=token, and there is none.
    """
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token"):
        return None
    found = environment.get("RAY_AUTH_TOKEN", "").strip()
    if not found:
        path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
        try:
            found = path.expanduser().read_text(encoding="utf-8").strip()
        except OSError:
            found = ""
    if not found and mode == "token":
        raise BadInput(
            "RAY_AUTH_MODE=token, but there is no token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write it to "
            "~/.ray/auth_token (`ray get-auth-token`)"
        )
    return found or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Raises BadInput: it is no address of a machine."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except (OSError, UnicodeError) as error:
        raise BadInput(f"host {host!r} is no address to listen at ({error}): 127.0.0.1 is this machine") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def host_is_ours(header: str, ours: Iterable[str]) -> bool:
    """Whether a Host header names this server: by an IP address, as localhost, or by one of `ours`. (A name that a
    stranger made point here is none of them.) The port may be another one: of an ssh tunnel."""
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
    if name == "localhost" or name.endswith(".localhost") or name in {n.lower() for n in ours}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_origin(headers: Mapping[str, str]) -> None:
    """Raise Refused for a request that another site's page makes a browser send."""
    origin, host = headers.get("Origin"), headers.get("Host", "")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise Refused(f"a page of {origin[:200]!r} may not ask here: open this view itself")
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise Refused("another site's page may not ask here: open this view itself")


class Door:
    """Knows the token. Browsers get a cookie that is derived from it and good for this server only: cookies know no
    ports, hence the token itself would go to every server of the machine that one visits."""

    def __init__(self, token: str | None, port: int):
        self._token = token
        self._pass = hmac.new(os.urandom(32), (token or "").encode(), hashlib.sha256).hexdigest()
        self.cookie = f"slime_cross_job_{port}"

    @property
    def cookie_value(self) -> str:
        return self._pass

    def knows(self, token: str) -> bool:
        """Whether this is the token; takes as long whatever it is."""
        return self._token is None or hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def admits(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> bool:
        """Whether who sends these has the token, or a cookie of ours."""
        if self._token is None:
            return True
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(token.strip()):
            return True
        return hmac.compare_digest(cookies.get(self.cookie, "").encode("utf-8", "replace"), self._pass.encode())
