"""Reach: whether a server is there, asked before a library that would take minutes to find that it is not."""

import socket
import urllib.request
from urllib.parse import urlsplit

_CONNECT = 5.0
"""Seconds that a server may take to answer the telephone."""


def look_for(uri: str) -> None:
    """See that somebody listens, where a server is meant, before a library does, which is patient.

    Raises:
        OSError: nobody does.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxies = urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), _CONNECT).close()
    except OSError as error:
        error.add_note(f"no server answers at {uri}")
        raise
