"""What announcing and finding share: opening zeroconf, this machine's addresses, names from outside."""

from __future__ import annotations

import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil

from alight.errors import BadInput, MissingExtra, NetworkError

if TYPE_CHECKING:
    from zeroconf import Zeroconf

SERVICE = "_alight._tcp.local."
MAX_ADDRESSES = 8

# Bridges to containers and virtual machines: no other device reaches us by their addresses, and a device
# that has the same bridge would reach itself.
_INSIDE = (
    "docker",
    "br-",
    "veth",
    "virbr",
    "cni",
    "flannel",
    "cali",
    "podman",
    "lxc",
    "lxd",
    "vmnet",
    "vbox",
)


def library() -> Any:
    """The zeroconf module, which only the `serve` extra brings."""
    try:
        import zeroconf
    except ImportError as error:
        raise MissingExtra("finding devices on the network", "serve") from error
    return zeroconf


def open_zeroconf(*, loopback: bool = False, unicast: bool = False) -> Zeroconf:
    """Zeroconf on the loopback interface, or on all of them, by IPv4 and where it is there IPv6.

    Raises:
        MissingExtra: the `serve` extra is not installed. NetworkError: multicast does not work here.
    """
    zc = library()
    interfaces = ["127.0.0.1"] if loopback else zc.InterfaceChoice.All
    versions = [zc.IPVersion.V4Only] if loopback else [zc.IPVersion.All, zc.IPVersion.V4Only]
    problem: Exception | None = None
    # Zeroconf would attach itself to an event loop that runs in this thread (a notebook has one), and our
    # waiting would block it. In a thread without one it makes its own.
    with ThreadPoolExecutor(1) as elsewhere:
        for version in versions:
            try:
                return elsewhere.submit(_open, interfaces, unicast, version).result()
            except (OSError, RuntimeError) as error:
                problem = error
    raise NetworkError(
        f"multicast DNS does not work on this machine: {problem}",
        hint="Connect to servers by address instead: http://HOST:PORT.",
    ) from problem


def _open(interfaces: Any, unicast: bool, version: Any) -> Zeroconf:
    opened: Zeroconf = library().Zeroconf(interfaces, unicast=unicast, ip_version=version)
    return opened


def addresses_of(host: str) -> list[str]:
    """The addresses by which others reach a server that listens on `host`.

    Raises:
        BadInput: `host` is no address. NetworkError: the machine has none.
    """
    if host == "localhost":
        return ["127.0.0.1"]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return [str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])]
        except OSError as error:
            raise BadInput(f"{host!r} is not an address of this machine: {error}") from error
    if not address.is_unspecified:
        return [host]
    families = {socket.AF_INET} if address.version == 4 else {socket.AF_INET, socket.AF_INET6}
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        a.address
        for name, entries in psutil.net_if_addrs().items()
        if name in up and not name.startswith(_INSIDE)
        for a in entries
        # A link-local IPv6 address ("fe80::1%eth0") means nothing without the listener's own interface name.
        if a.family in families and "%" not in a.address and not is_loopback(a.address)
    ]
    if not found:
        hint = "Connect it to a network, or serve on 127.0.0.1."
        raise NetworkError("this machine has no network address", hint=hint)
    return sorted(found, key=lambda a: ":" in a)[:MAX_ADDRESSES]


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine can reach."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def instance(full: str) -> str:
    """The part of a service name that people see: "kitchen-pi._alight._tcp.local." is "kitchen-pi"."""
    return printable(full.removesuffix(SERVICE).removesuffix("."))


def printable(text: str) -> str:
    """Without control characters, which could move the cursor or change colours in a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
