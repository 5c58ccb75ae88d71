"""Ports of this machine that nobody else is given before the server they are meant for listens."""

from __future__ import annotations

import socket


def hold_port() -> socket.socket:
    """A socket whose port (`port_of`) is held until it is closed; servers may listen on it meanwhile.

    A port that is merely found free can be found by another test, or be given to an outgoing connection,
    before rank 0 listens there. Linux lets a second socket bind a port where both say that they reuse
    addresses and none listens yet, as servers do; probes and the kernel's own choice do not say so.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after bind: it shall not share one itself
    return held


def port_of(held: socket.socket) -> int:
    _, port = held.getsockname()
    return int(port)
