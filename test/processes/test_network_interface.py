"""The address and interface on the way to another machine."""

from library.processes.network_interface import address_towards, interface_of, network_variables


def test_the_way_to_this_machine_is_the_loopback():
    assert address_towards("127.0.0.1", 8989) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert network_variables("127.0.0.1", 8989) == {"HCCL_IF_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def test_where_there_is_no_way_nothing_is_set():
    assert network_variables("no-such-host.invalid", 8989) == {}
    assert interface_of("192.0.2.1") is None
