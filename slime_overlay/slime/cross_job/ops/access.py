"""Who may see the live view, and who may steer from it: the tokens, and whether a request comes from the view's own
page.

The view has tokens of its own: one to look, one to steer. Ray's token, which may submit code, is asked of nobody. On
loopback no token is asked for, unless Ray's cluster asks for one: then there may be strangers on the machine.
Elsewhere one is always asked for. Requests that a stranger's page makes a browser send are refused: by their Host (DNS
rebinding), and by their Origin (cross-site requests).
"""

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import BadInput, Refused

VIEW_TOKEN, CONTROL_TOKEN = "SLIME_CROSS_JOB_VIEW_TOKEN", "SLIME_CROSS_JOB_CONTROL_TOKEN"
"""Environment variables."""
VIEW, CONTROL = "view", "control"
"""What somebody may do; CONTROL includes VIEW."""

_SHORTEST = 16


def given_token(variable: str, file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """A token from the environment variable or the file, whichever is there; None: neither is.

    Raises:
        BadInput: both are, the file cannot be read, or a token is too short or has spaces. The token is not shown.
    """
    found, where = environment.get(variable), variable
    if file is not None:
        if found is not None:
            raise BadInput(f"{variable} is set, and {file} is given: use one of them")
        try:
            found, where = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeError) as error:
            raise BadInput(f"the token's file {file} cannot be read: {type(error).__name__}") from None
    if found is None:
        return None
    token = found.strip()
    if len(token) < _SHORTEST or not token.isascii() or len(token.split()) != 1:
        raise BadInput(
            f"the token of {where} must be one word of {_SHORTEST} characters and more: openssl rand -hex 24 makes one"
        )
    return token


def ray_asks(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> bool:
    """Whether Ray's cluster asks for a token, as Ray decides it: RAY_AUTH_MODE=token, or RAY_AUTH_MODE is not set and
    there is a token (RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode or environment.get("RAY_AUTH_TOKEN", "").strip():
        return mode in ("", "token")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token").expanduser()
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def needs_token(host: str) -> bool:
    """Whether a view that listens at `host` must ask for one. Raises BadInput: it is no address of a machine."""
    return ray_asks() or not is_loopback(host)


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
    """Knows the tokens. Browsers get a cookie that is derived from one and good for this server only: cookies know no
    ports, hence the token itself would go to every server of the machine that one visits.

    Args:
        view: who has it may look (None: everybody).
        control: who has it may steer (None: everybody who may look).
    """

    def __init__(self, view: str | None, control: str | None, port: int):
        self._tokens = {level: token for level, token in ((CONTROL, control), (VIEW, view)) if token is not None}
        key = os.urandom(32)
        self._passes = {
            level: hmac.new(key, f"{level} {token}".encode(), hashlib.sha256).hexdigest()
            for level, token in self._tokens.items()
        }
        self.cookie = f"slime_cross_job_{port}"

    def cookie_value(self, level: str) -> str:
        return self._passes.get(level) or self._passes.get(VIEW, "")

    def level_of(self, token: str) -> str:
        """What the token's owner may do, empty: nothing; takes as long whatever it is."""
        return self._level(token, self._tokens)

    def admits(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> str:
        """What somebody may do who sends these: has a token, or a cookie of ours. Empty: nothing."""
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        by_token = self._level(token.strip() if scheme.lower() == "bearer" else "", self._tokens)
        by_cookie = self._level(cookies.get(self.cookie, ""), self._passes)
        return CONTROL if CONTROL in (by_token, by_cookie) else by_token or by_cookie

    def _level(self, given: str, known: Mapping[str, str]) -> str:
        same = [
            level
            for level, one in known.items()
            if hmac.compare_digest(given.encode("utf-8", "replace"), one.encode())
        ]
        best = same[0] if same else "" if VIEW in self._tokens else VIEW
        return CONTROL if best and CONTROL not in self._tokens else best
