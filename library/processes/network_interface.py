"""Which of this machine's addresses and interfaces leads to another machine."""

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface


def address_towards(host: str, port: int) -> str | None:
    """This machine's address on the route to a host; None without a route. Nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def network_variables(host: str, port: int) -> dict[str, str]:
    """Environment variables that make gloo and HCCL use the interface that leads to the main machine.

    Without them they use the address to which this machine's name resolves, which other machines often cannot reach.
    """
    address = address_towards(host, port)
    if address is None:
        return {}
    interface = interface_of(address)
    return {"HCCL_IF_IP": address, **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
