"""Addresses of links: `tcp://host:port`, `tcp://[::1]:port`, `vsock://cid:port`. Text only; `channel` connects."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from transport.errors import AddressError

MAX_TEXT = 300  # characters; a host name has at most 253

_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,9})\Z")
# RFC 1123: labels of letters, digits and inner hyphens. ASCII, because what one resolver folds another does not.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")
_SHAPE = re.compile(
    r"(?P<scheme>tcp|vsock)://(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]|(?P<host>[A-Za-z0-9._-]+))"
    r":(?P<port>[0-9]+)\Z"
)


@dataclass(frozen=True)
class Address:
    """Where one end of a link listens.

    Port 0 lets the system choose one.
    """

    scheme: str  # "tcp" or "vsock"
    host: str  # a name, an IPv4 or IPv6 address; for vsock the context id (32 bits) in decimal
    port: int  # 16 bits for tcp, 32 bits for vsock

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes no blanks, no defaults, no leading zeros. Raises AddressError if it is no address."""
        shape = _SHAPE.match(text) if len(text) <= MAX_TEXT else None
        if shape is None:
            raise AddressError(f"address {text[:80]!r}: wanted tcp://host:port, tcp://[ipv6]:port or vsock://cid:port")
        scheme, six, host = shape["scheme"], shape["v6"], shape["host"]
        if scheme == "vsock":
            if six is not None:
                raise AddressError(f"address {text!r}: wanted a context id, as in vsock://16:5000")
            cid = _number(text, "context id", host, 2**32 - 1)
            return cls(scheme, str(cid), _number(text, "port", shape["port"], 2**32 - 1))
        return cls(scheme, _host(text, host, six), _number(text, "port", shape["port"], 65535))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def _number(text: str, what: str, digits: str, largest: int) -> int:
    if not _DECIMAL.match(digits) or int(digits) > largest:
        raise AddressError(f"address {text!r}: wanted a {what} of 0..{largest} in plain decimal")
    return int(digits)


def _host(text: str, host: str | None, six: str | None) -> str:
    """A host in its canonical spelling."""
    if six is not None and "%" in six:
        raise AddressError(
            f"address {text!r}: a scope id ({six[six.index('%') :]}) is one machine's: use another address"
        )
    try:
        if host is None:
            return str(ipaddress.IPv6Address(six))
        if host.rpartition(".")[2].isdecimal():  # meant as IPv4; a resolver might accept 127.1 or 010.0.0.1
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise AddressError(f"address {text!r}: {six or host} is not an IP address") from None
    if not _HOST.match(host):
        reason = ""
        if host.endswith("."):
            reason = ": leave out the dot at its end"
        elif "_" in host:
            reason = ", which has no underscore: use its IP address, or give it another name"
        raise AddressError(f"address {text!r}: {host} is not a host name{reason}")
    return host
