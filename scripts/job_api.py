"""Ray's job API, at exactly the address that is given.

Ray's clients prefer RAY_API_SERVER_ADDRESS and RAY_ADDRESS to their argument: in a shell that names another cluster,
they would submit there. And they go through the proxy that the environment names, also to this machine.
"""

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobSubmissionClient

_FIRST = "RAY_API_SERVER_ADDRESS"  # what Ray's clients look at before all else


def job_client(address: str, **how: Any) -> JobSubmissionClient:
    """Ray's client for the job API at `address` (http://HOST:PORT); `how`: its further arguments. Raises what Ray's
    does: ConnectionError where nobody answers."""
    avoid_proxy(address)
    with exactly(address):
        return JobSubmissionClient(address, **how)


def probe_http(address: str, timeout_s: float) -> None:
    """Raise OSError where nobody answers at `address` (http://HOST:PORT/PATH) within `timeout_s` seconds: Ray's client
    would wait without end."""
    avoid_proxy(address)
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(address, timeout=timeout_s):
        pass


def avoid_proxy(address: str) -> None:
    """Let this process go to the job API at `address` itself, where that is on this machine or in a private network:
    a proxy would not find it. Adds the host to `no_proxy`."""
    host = urlsplit(address).hostname
    if host is None or not proxy_of(address) or not _is_near(host):
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{given},{host}" if given else host


def proxy_of(address: str) -> str:
    """The proxy through which this process goes to `address`, without its password; empty: none."""
    parts = urlsplit(address)
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all") or ""
    if not proxy or parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return ""
    return f"{urlsplit(proxy).scheme}://{proxy.rpartition('@')[2].rpartition('://')[2]}" if "@" in proxy else proxy


def _is_near(host: str) -> bool:
    """Whether this name or address is of this machine, or of a private network."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    addresses = [ipaddress.ip_address(str(one).partition("%")[0]) for one in found]
    return any(one.is_loopback or one.is_private or one.is_link_local for one in addresses)


@contextlib.contextmanager
def exactly(address: str) -> Iterator[None]:
    """In this block, Ray's clients and its state API go to the job API at `address`. Changes this process's
    environment for as long, hence is for one thread."""
    before = os.environ.get(_FIRST)
    os.environ[_FIRST] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FIRST]
        else:
            os.environ[_FIRST] = before
