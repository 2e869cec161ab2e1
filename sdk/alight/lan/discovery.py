"""Find alight servers on the local network, and be found: multicast DNS, service type `_alight._tcp`.

What other devices announce is untrusted: names and TXT records are bounded, and characters that could
steer a terminal are replaced.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from alight.errors import BadInput, DeviceNotFound, NetworkError, nearest
from alight.lan.identity import device_id
from alight.lan.mdns import (
    MAX_ADDRESSES,
    SERVICE,
    addresses_of,
    instance,
    is_loopback,
    library,
    open_zeroconf,
    printable,
)

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType

    from zeroconf import ServiceInfo, Zeroconf

log = logging.getLogger(__name__)

_LABEL_BYTES = 63  # of one name in DNS
_MAX_PEERS = 256
_MAX_PROPERTIES = 32
_CONNECT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Peer:
    """An alight server on this network, as it announces itself."""

    name: str
    url: str
    host: str  # an address
    port: int
    version: str = ""
    properties: Mapping[str, str] = field(default_factory=dict, hash=False)


# -- being found -----------------------------------------------------------------------------------


class Advertisement:
    """A server's announcement, until `close()`. `name` may have got a number: "kitchen-pi (2)"."""

    def __init__(self, zeroconf: Zeroconf, info: ServiceInfo) -> None:
        self._zeroconf = zeroconf
        self.name = instance(info.name)

    def close(self) -> None:
        """Say goodbye, so that others forget this server at once. Safe to call twice."""
        self._zeroconf.close()

    def __enter__(self) -> Advertisement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def advertise(
    name: str, port: int, *, host: str, models_digest: str = "", properties: Mapping[str, str] | None = None
) -> Advertisement:
    """Announce a server. Takes about two seconds: the network is asked first whether the name is free.

    Args:
        name: what people call it; a number is appended if the network has that name already.
        host: the address that the server listens on. A loopback address is announced on this machine
            only, "0.0.0.0" with all its IPv4 addresses, "::" with its IPv6 ones too.
        models_digest: changes when the server's list of models does.
        properties: more to tell; each `key=value` in at most 255 bytes.

    Raises:
        MissingExtra: the `serve` extra is not installed. NetworkError: multicast does not work here.
        BadInput: a name or property that cannot be announced.
    """
    zc = library()
    name = printable(name).strip().replace(".", "-")  # a dot separates the parts of a DNS name
    if not name:
        raise BadInput("the device name is empty", hint="Give it a name, such as kitchen-pi.")
    told = {"id": device_id(), "version": _version(), "models": models_digest, **(properties or {})}
    for key, value in told.items():
        if len(f"{key}={value}".encode()) > 255:
            raise BadInput(f"the property {key!r} is too long to announce", hint="255 bytes are the limit.")

    addresses = addresses_of(host)
    # The port is in it because two servers here may listen on different addresses.
    server = f"alight-{device_id()}-{port}.local."
    taken = {n.casefold() for n in _names_in_use()}
    opened = open_zeroconf(loopback=is_loopback(host))
    try:
        for number in range(1, 100):
            wanted = _numbered(name, number)
            if wanted.casefold() in taken:
                continue
            info = zc.ServiceInfo(
                SERVICE,
                f"{wanted}.{SERVICE}",
                port=port,
                parsed_addresses=addresses,
                properties=told,
                server=server,
            )
            try:
                opened.register_service(info)
            except zc.NonUniqueNameException:
                continue
            log.debug("announced %r on port %d at %s", wanted, port, ", ".join(addresses))
            return Advertisement(opened, info)
        raise BadInput(f"99 devices here are called {name!r}", hint="Choose another name.")
    except (zc.Error, OSError) as error:
        opened.close()
        raise NetworkError(f"cannot announce {name!r} on the network: {error!r}") from error
    except BaseException:
        opened.close()
        raise


def _names_in_use() -> set[str]:
    """The names that servers here answer to, asked directly.

    Zeroconf's own check asks for answers to the multicast port. Several programs of one machine share
    that port, and an answer reaches only one of them. So we also ask from a port of our own.
    """
    with _Browser(unicast=True) as browser:
        time.sleep(0.4)
        return {instance(name) for name in browser.seen}


def _numbered(name: str, number: int) -> str:
    suffix = f" ({number})" if number > 1 else ""
    room = _LABEL_BYTES - len(suffix)
    return name.encode()[:room].decode(errors="ignore").rstrip() + suffix


# -- finding ---------------------------------------------------------------------------------------


def browse(timeout: float = 2.0) -> list[Peer]:
    """The alight servers on this network and machine, nearest first. Takes `timeout` seconds.

    Raises:
        MissingExtra: the `serve` extra is not installed. NetworkError: multicast does not work here.
    """
    with _Browser() as browser:
        time.sleep(timeout)
        return browser.peers()


def find(name: str, timeout: float = 2.0) -> Peer:
    """The server of that name (in any case of letters), as soon as it is seen.

    Raises:
        DeviceNotFound: it was not seen in `timeout` seconds; names those that were.
        MissingExtra, NetworkError: as for `browse`.
    """
    wanted = name.casefold()

    def found(peers: list[Peer]) -> Peer | None:
        return next((p for p in peers if p.name.casefold() == wanted), None)

    with _Browser() as browser:
        if peer := browser.wait_for(found, timeout):
            return peer
        others = [p.name for p in browser.peers()]
    raise DeviceNotFound(f"no device named {name!r} on this network", hint=_others(name, others))


def _others(name: str, others: Sequence[str]) -> str:
    if not others:
        return (
            "None was found. Is `alight serve --host 0.0.0.0` running there, "
            "and does the network let multicast through?"
        )
    near = nearest(name, others)
    start = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{start}Found: {', '.join(sorted(others))}."


class _Browser:
    """Listens for servers, looks each up and measures how near it is, on zeroconf's own event loop."""

    def __init__(self, *, unicast: bool = False) -> None:
        zc = library()
        self.seen: set[str] = set()  # full names
        self._found: dict[str, tuple[float, Peer]] = {}  # full name -> seconds to connect, peer
        self._lookups: dict[str, Future[None]] = {}
        self._changed = threading.Condition()
        self._measure = not unicast
        self._zeroconf = open_zeroconf(unicast=unicast)
        self._browser = zc.ServiceBrowser(self._zeroconf, SERVICE, handlers=[self._heard])

    def __enter__(self) -> _Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lookup in self._lookups.values():
            lookup.cancel()
        self._zeroconf.close()

    def peers(self) -> list[Peer]:
        """The servers found so far, nearest first."""
        with self._changed:
            return [peer for _, peer in sorted(self._found.values(), key=lambda x: (x[0], x[1].name))]

    def wait_for(self, choose: Callable[[list[Peer]], Peer | None], timeout: float) -> Peer | None:
        """The first peer that `choose` picks from those found."""
        with self._changed:
            return self._changed.wait_for(lambda: choose(self.peers()), timeout)

    def _heard(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        # The parameters' names are fixed by zeroconf, which also calls this in a thread of its own.
        if state_change.name == "Removed":
            with self._changed:
                self.seen.discard(name)
                self._found.pop(name, None)
        elif len(self.seen) < _MAX_PEERS or name in self.seen:
            self.seen.add(name)
            running = name in self._lookups and not self._lookups[name].done()
            if self._measure and zeroconf.loop and not running:
                self._lookups[name] = asyncio.run_coroutine_threadsafe(self._look_up(name), zeroconf.loop)

    async def _look_up(self, name: str) -> None:
        zc = library()
        try:
            info = zc.ServiceInfo(SERVICE, name)
            if not await info.async_request(self._zeroconf, 3000):
                return
        except zc.Error as error:
            log.debug("%r announces itself wrongly: %r", name, error)
            return
        if (peer := await _nearest_address(info)) is None:
            return
        with self._changed:
            if name in self.seen:  # it may have said goodbye meanwhile
                self._found[name] = peer
                self._changed.notify_all()


async def _nearest_address(info: ServiceInfo) -> tuple[float, Peer] | None:
    """The peer at the address that answers first, with the seconds that took (infinite: none answers)."""
    addresses = [a for a in info.parsed_scoped_addresses() if "%" not in a][:MAX_ADDRESSES]
    name = instance(info.name)
    if not addresses or not info.port or not name:
        return None
    seconds = await asyncio.gather(*(_seconds_to(a, info.port) for a in addresses))
    best = min(seconds)
    host = addresses[seconds.index(best)]
    told = _properties(info.properties)
    url = f"http://[{host}]:{info.port}" if ":" in host else f"http://{host}:{info.port}"
    return best, Peer(name, url, host, info.port, told.get("version", ""), told)


async def _seconds_to(host: str, port: int) -> float:
    start = time.monotonic()
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_SECONDS)
    except (OSError, TimeoutError):
        return math.inf
    writer.close()
    return time.monotonic() - start


def _properties(raw: Mapping[bytes, bytes | None]) -> dict[str, str]:
    """A TXT record from outside, bounded and made printable."""
    pairs = list(raw.items())[:_MAX_PROPERTIES]
    return {
        printable(k.decode(errors="replace")): printable((v or b"").decode(errors="replace"))
        for k, v in pairs
        if k
    }


def _version() -> str:
    try:
        return metadata.version("alight")
    except metadata.PackageNotFoundError:  # run from a source tree
        return ""
