"""How often an address has failed to say who it is. Pure: the moment is handed in.

What counts is a token that was presented but not accepted. A valid token is never refused here, whatever its address
has done: several clients may be one address (a NAT, a reverse proxy, a Unix socket), and a signature cannot be guessed.
The address is that of the connection; a header such as X-Forwarded-For is anybody's word, so it is not read.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from typing import Final

#: Seconds within which failures add up.
PERIOD: Final = 60.0

#: Addresses remembered, those that failed most recently: some 3 MB when each has ten failures. Who has more addresses
#: than this is not stopped by a count per address.
MAX_ADDRESSES: Final = 10_000


class Failures:
    """Failures by address.

    Args:
      limit: in PERIOD and per address; 0 counts nothing.
      addresses: that are remembered.
    """

    def __init__(self, limit: int, addresses: int = MAX_ADDRESSES) -> None:
        self._limit = limit
        self._addresses = addresses
        self._moments: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._moments)

    def wait(self, address: str, now: float) -> float:
        """Return seconds until a failure from this address is answered as one again; 0: it is now."""
        moments = self._moments.get(address)
        if moments is None or len(moments) < self._limit:
            return 0.0
        return max(0.0, moments[0] + PERIOD - now)

    def note(self, address: str, now: float) -> float:
        """A token from this address was not accepted; return `wait` as it was before.

        While an address has to wait, nothing is added: whoever goes on trying is not shut out for longer.
        """
        if not self._limit:
            return 0.0
        if wait := self.wait(address, now):
            self._moments.move_to_end(address)
            return wait
        moments = self._moments.setdefault(address, deque(maxlen=self._limit))
        self._moments.move_to_end(address)
        moments.append(now)
        while len(self._moments) > self._addresses:
            self._moments.popitem(last=False)
        return 0.0


def address_of(client: tuple[str, int] | None) -> str:
    """Return what a peer counts as: its IPv4 address, the /64 of its IPv6 one, "" for a Unix socket.

    A /64 is what one customer gets at least (RFC 6177), with 2**64 addresses to try from.
    """
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
