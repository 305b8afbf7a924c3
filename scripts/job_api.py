"""Ray's job API, at exactly the address that is given.

Ray's clients prefer RAY_API_SERVER_ADDRESS and RAY_ADDRESS to their argument: in a shell that names another cluster,
they would submit there.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ray.job_submission import JobSubmissionClient

_FIRST = "RAY_API_SERVER_ADDRESS"  # what Ray's clients look at before all else


def job_client(address: str, **how: Any) -> JobSubmissionClient:
    """Ray's client for the job API at `address` (http://HOST:PORT); `how`: its further arguments. Raises what Ray's
    does: ConnectionError where nobody answers."""
    with exactly(address):
        return JobSubmissionClient(address, **how)


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
