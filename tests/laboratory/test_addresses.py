"""LOCAL_IP and the interfaces of a host: what `auto` is, what a user is told who has to choose, and their MTU."""

import pytest

import helpers
from deployment import IMAGE
from pythons import BOTH


def two_interfaces(host):
    """Give a host a second interface, whose network is that of many examples, and its first one a second address."""
    for command in ("link add examples0 type veth peer name nowhere0", "link set nowhere0 up", "link set examples0 up",
                    "addr add 192.0.2.2/24 dev examples0", "addr add 10.84.0.1/24 dev eth0", "route flush default"):
        host.run(["ip"] + command.split())


def fails(host, python, *args):
    code, stderr, _ = helpers.start(host.command([python, helpers.KMCAST] + [str(arg) for arg in args])).finish(20)
    assert stderr.count("\n") == 1, stderr
    return code, stderr


@BOTH
def test_auto_without_a_default_route_lists_the_addresses(laboratory, python):
    host = laboratory(clients=1).server
    two_interfaces(host)
    for address in ("auto", "10.83.0.77"):
        code, stderr = fails(host, python, "server", address, 1)
        assert code == 2, stderr
        for one in ("lo (127.0.0.1)", "eth0 (10.83.0.1)", "eth0 (10.84.0.1)", "examples0 (192.0.2.2)"):
            assert one in stderr, stderr


@BOTH
def test_auto_of_a_client_that_cannot_reach_its_server_lists_the_addresses(laboratory, python):
    host = laboratory(clients=1).clients[0]
    two_interfaces(host)
    code, stderr = fails(host, python, "client", "--wait", 0, "auto", "10.99.0.1")
    assert code == 3 and "Network is unreachable" in stderr and "eth0 (10.83.0.2)" in stderr, stderr


@BOTH
@pytest.mark.parametrize("interface", ["eth0", "examples0"])
def test_auto_is_the_interface_of_the_default_route(laboratory, deploy, python, interface):
    """The one with the lowest metric, whatever else is there; multicast over another one does not arrive."""
    lab = laboratory(clients=2)
    two_interfaces(lab.server)
    other = {"eth0": "examples0", "examples0": "eth0"}[interface]
    lab.server.run(["ip", "route", "add", "default", "dev", other, "metric", "20"])
    lab.server.run(["ip", "route", "add", "default", "dev", interface, "metric", "10"])
    run = deploy(lab, IMAGE, clients=0, places=2, server={"start": lambda args, python, **options: helpers.start_server(
        ["auto" if arg == lab.server.address else arg for arg in args], python, **options)}, server_python=python)
    for host in lab.clients:
        run.add_client(host, python=python)
    run.finish()
    run.check_complete()
    missing = ["multicast does not reach this host" in client.stderr for client in run.clients]
    assert missing == [interface == "examples0"] * 2, str(run)


@BOTH
def test_packets_fit_the_mtu_of_the_interface(laboratory, deploy, python):
    """Without --mtu; those who do not ask for jumbo frames do not get them."""
    for mtu, used in ((1400, 1400), (4000, 1500)):
        lab = laboratory(clients=2, mtu=mtu)
        run = deploy(lab, IMAGE[:1000000], server_python=python)
        run.finish()
        run.check_complete()
        assert helpers.summary(run.server, used).packets == -(-1000000 // helpers.payload_size(used)), str(run)
