"""Notice at once that the Ray cluster is gone: its control service (GCS) ended, and does not come back.

Ray itself gives up after RAY_gcs_rpc_server_reconnect_timeout_s (60 s), or as soon as the raylet ends, which
`ray start --block` ends within a second; then it ends the process, exit code 1, without a word that names the job.
A connection to the GCS's port that nobody uses tells it in the moment in which the process is gone. One that is only
silent keeps its connections. A GCS with fault tolerance (Redis) is given nearly as long as Ray gives it, and so is one
whose port does not refuse: then the network may be at fault.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from ..errors import ClusterUnreachable
from ..types import split_address
from . import shutdown

logger = logging.getLogger(__name__)

_TRIES_S = 0.3  # between two attempts to connect anew
_CONNECT_S = 3.0
_BEFORE_RAY_S = 5.0  # that we give up before Ray does
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # for a host that vanishes


class ClusterWatch:
    """A thread that watches the GCS of a cluster until `ended`.

    Args:
        address: HOST:PORT of the GCS.
        survives: whether it comes back with all that it knew; None: nobody knows.
        lost: called with the error, once, when it is gone for good; says whether this process still needs it. Then it
            ends with the error's exit code, if its end is ours to decide (shutdown.want): what it waits for does not
            come, and Ray would end it a little later.
    """

    def __init__(
        self,
        address: str,
        survives: bool | None,
        ended: threading.Event,
        lost: Callable[[ClusterUnreachable], bool],
    ):
        self._where, self._address = split_address(address), address
        self._ended, self._lost = ended, lost
        ray_gives_s = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s") or 60)  # noqa: SIM112  Ray's name
        self._silence_s = max(0.0, ray_gives_s - _BEFORE_RAY_S)  # no answer is no proof that it ended
        self._patience_s = 0.0 if survives is False else self._silence_s

    def start(self) -> None:
        threading.Thread(target=self.run, name="cross-job-cluster", daemon=True).start()

    def run(self) -> None:
        """Return when `ended`, or when the GCS is gone."""
        while not self._ended.is_set():
            self._until_it_hangs_up()
            gone = self._until_it_is_back()
            if gone is None:
                self._ended.wait(_TRIES_S)
                continue
            gone_s, why = gone
            after = f" after {gone_s:.1f} s" if gone_s >= _TRIES_S else ""
            error = ClusterUnreachable(
                f"the control service (GCS) of the Ray cluster at {self._address} ended and is not back{after} "
                f"({why}): the cluster is lost, and with it all that is not in a durable store. Start the cluster, "
                "then both jobs again"
            )
            if self._lost(error):
                logger.critical("%s", error)
                if shutdown.wanted():
                    sys.stdout.flush()
                    sys.stderr.write(f"ClusterUnreachable: {error}\n")
                    sys.stderr.flush()
                    os._exit(error.exit_code)
            return

    def _until_it_hangs_up(self) -> None:
        """Wait at a connection until it ends, where one can be made."""
        try:
            with socket.create_connection(self._where, _CONNECT_S) as connection:
                connection.settimeout(1.0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE.items():
                    if hasattr(socket, name):
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
                while not self._ended.is_set():
                    try:
                        if not connection.recv(4096):
                            return
                    except TimeoutError:
                        continue
        except OSError:
            return

    def _until_it_is_back(self) -> tuple[float, OSError] | None:
        """For how long it was gone, and how its port answers, where that is too long; None: it is back, or nobody asks
        any more. A port that refuses has no process; whatever else goes wrong may pass (a network that drops packets,
        this process without a free file descriptor)."""
        began = time.monotonic()
        while not self._ended.is_set():
            try:
                socket.create_connection(self._where, _CONNECT_S).close()
            except OSError as error:
                patience_s = self._patience_s if isinstance(error, ConnectionRefusedError) else self._silence_s
                if time.monotonic() - began >= patience_s:
                    return time.monotonic() - began, error
                self._ended.wait(_TRIES_S)
            else:
                return None
        return None
