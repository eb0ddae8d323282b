"""Joins a Ray cluster at an address that a person gave: within a moment, or with a reason for the failure."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import ray

from verl_autoexport.errors import AutoExportError

_ANSWER_S = 3.0
"""The limit from a connection to the server's first bytes."""
_JOIN_S = 45.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
_SETTINGS = 4  # type of the first frame of every HTTP/2 server, and so of every gRPC server


def connect(address: str, give_up: Callable[[str], None]) -> None:
    """Joins the cluster at `address`; AutoExportError if none answers.

    Ray itself would try for a minute or more, in calls that nothing can interrupt: after `_JOIN_S` seconds
    `give_up` gets the reason and has to end the process.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    refused = f"--ray-address {address}: no Ray cluster answers there"
    late = threading.Timer(_JOIN_S, give_up, [f"{refused} within {_JOIN_S:g} s; is it another version of Ray?"])
    late.daemon = True
    late.start()
    try:
        _probe(address)
        ray.init(address=address, log_to_driver=False)
    except Exception as e:  # ray.init raises ConnectionError, ValueError, RuntimeError, RayError, plain Exception …
        raise AutoExportError(f"{refused}: {' '.join(str(e).split()) or type(e).__name__:.500}") from e
    finally:
        late.cancel()


def _probe(address: str) -> None:
    """Raises OSError unless a server at `address` speaks gRPC; Ray itself judges an address without a port."""
    scheme, _, place = address.rpartition("://")
    url = urlsplit(f"//{place}")
    if scheme not in ("", "ray") or url.port is None:
        return
    with socket.create_connection((url.hostname, url.port), timeout=_ANSWER_S) as server:
        server.sendall(_PREFACE)
        head = b""
        while len(head) < 9 and (more := server.recv(9 - len(head))):
            head += more
    if len(head) < 9 or head[3] != _SETTINGS:
        raise ConnectionError("something else listens at this port")
