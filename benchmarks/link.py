"""A replica behind a link that can be cut: a network namespace with a veth pair, and a relay to the server inside it.

The server listens on loopback only, and a namespace has a loopback of its own. So the relay that the client speaks to
runs inside, and reaches another one outside through a socket file, which is no part of any network.
"""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from typing import Any, Self

from benchmarks.relay import Relay


def may_make_namespaces() -> bool:
    """Whether this process may make a network namespace with iproute2."""
    name = f"tickserve-try-{secrets.token_hex(3)}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
        if made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Link:
    """`address` is the server at `target`, reached over a veth pair; `down` cuts it, `up` mends it."""

    def __init__(self, target: str) -> None:
        tag = secrets.token_hex(3)
        self._namespace, self._near, self._far = f"tickserve-{tag}", f"tsn{tag}", f"tsf{tag}"
        self._net = f"10.213.{int(tag[:2], 16)}"
        self._target = target
        self._folder = tempfile.TemporaryDirectory(prefix="tickserve-link-")

    def __enter__(self) -> Self:
        _ip("netns", "add", self._namespace)
        try:
            self._wire()
            path = f"unix:{self._folder.name}/server"
            self._outside = Relay(self._target, listen=path)
            inside = ("ip", "netns", "exec", self._namespace)
            self._relay = Relay(path, listen=f"{self._net}.2:0", command=inside)
        except BaseException:
            self._remove()
            raise
        self.address = self._relay.address
        return self

    def __exit__(self, *_: Any) -> None:
        self._relay.close()
        self._outside.close()
        self._remove()

    def down(self) -> None:
        """Cut it: nothing arrives and nobody is told."""
        _ip("-n", self._namespace, "link", "set", self._far, "down")

    def up(self) -> None:
        """Mend it."""
        _ip("-n", self._namespace, "link", "set", self._far, "up")

    def _wire(self) -> None:
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._namespace)
        _ip("addr", "add", f"{self._net}.1/24", "dev", self._near)
        _ip("link", "set", self._near, "up")
        _ip("-n", self._namespace, "addr", "add", f"{self._net}.2/24", "dev", self._far)
        _ip("-n", self._namespace, "link", "set", self._far, "up")
        _ip("-n", self._namespace, "link", "set", "lo", "up")

    def _remove(self) -> None:
        subprocess.run(["ip", "link", "del", self._near], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True, check=False)
        self._folder.cleanup()
