"""A slow and lossy wire between a machine and its bridge, for a kernel without netem: frames are carried by a program.

    python wire.py MACHINE_SIDE BRIDGE_SIDE DELAY_MS LOSS_PERCENT

What comes from the machine is held up, and lost at random, as by `tc qdisc add dev eth0 root netem` there; what goes
to it passes. Large frames that the kernel has not cut up yet, and checksums that it has not written yet, are carried
as they are (PACKET_VNET_HDR).
"""

import collections
import contextlib
import random
import select
import socket
import sys
import time

_ALL, _SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING = 3, 263, 15, 23
_LARGEST = 1 << 17


def side(name: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    found.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    found.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
    found.bind((name, _ALL))
    found.setblocking(False)
    return found


def carry(machine: socket.socket, bridge: socket.socket, delay_s: float, loss: float) -> None:
    held: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        wait_s = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select([machine, bridge], [], [], wait_s)
        for source in ready:
            for frame in received(source):
                if source is bridge:
                    sent(machine, frame)
                elif random.random() >= loss:
                    held.append((time.monotonic() + delay_s, frame))
        while held and held[0][0] <= time.monotonic():
            sent(bridge, held.popleft()[1])


def received(source: socket.socket, most: int = 64) -> list[bytes]:
    frames: list[bytes] = []
    try:
        while len(frames) < most:
            frames.append(source.recv(_LARGEST))
    except BlockingIOError:
        pass
    return frames


def sent(to: socket.socket, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # a full queue loses it, as a wire may
        to.send(frame)


if __name__ == "__main__":
    carry(side(sys.argv[1]), side(sys.argv[2]), float(sys.argv[3]) / 1000, float(sys.argv[4]) / 100)
