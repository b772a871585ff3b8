"""Who a request is counted to: the key that it carries, or the address that it comes from where no keys are set.

Everything that is shared out fairly (turns, places in a queue, memory for bodies, connections) is shared out between
clients in this sense. All who use one key are one client: give each its own in the setting ``client_keys``. An IPv6
client is its /64 network, since whoever has one address there has all of them.
"""

from contextvars import ContextVar
from ipaddress import IPv6Address

from starlette.types import Scope

CLIENT: ContextVar[str] = ContextVar("client", default="")
"""The client of the request that is being answered; never a key."""

CLIENT_KEY = "shared.client"  # key of the ASGI scope


def client_of(scope: Scope) -> str:
    """Whom the request is counted to."""
    if (name := scope.get(CLIENT_KEY)) is not None:
        return f"key {name}"
    peer = scope.get("client")
    return f"address {network(peer[0])}" if peer else "address unknown"


def network(address: str) -> str:
    """An IPv4 address as it is, an IPv6 address as the first half of it."""
    if ":" not in address:
        return address
    six = IPv6Address(address.partition("%")[0])
    return str(six.ipv4_mapped or IPv6Address(int(six) >> 64 << 64))
