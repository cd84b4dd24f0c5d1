"""A bad network: datagrams are lost, damaged, doubled or late (helpers.Network), and every byte arrives all the same."""

import random
import threading

import pytest

import helpers
from helpers import LOOPBACK, payload_size
from hostile import wrapped
from pythons import BOTH, EVERY, NEWEST, OLDEST

PAYLOAD = payload_size(1500)

#: bit/s that helpers.Network passes on without losing more than it is told to
RATE = ["--rate", "30M"]

#: Of a client: what is late as helpers.Network has it on a busy machine is not lost.
PATIENT = "kmcast.ClientWindow.SETTLE = kmcast.ClientWindow.NOTHING_YET = 1.0"


def transfer(data, changes, server_args=(), client_args=(), server_python=None, client_pythons=(None,), of_client=None):
    """Send `data` to one client for each of `changes` (for Network.path()); check it; return the server and the clients."""
    port = helpers.free_port()
    server = helpers.start_server(["-v"] + list(server_args) + [LOOPBACK, len(changes), port], server_python, stdin=data)
    server.wait_stderr("waiting")
    network = helpers.Network(port)
    clients = [helpers.start_client(list(client_args) + [LOOPBACK, LOOPBACK, network.path(change)],
                                    client_pythons[number % len(client_pythons)], change=of_client)
               for number, change in enumerate(changes)]
    for client in clients:
        code, stderr, received = client.finish(60)
        assert code == 0, stderr + server.stderr
        equal = received == data
        assert equal, stderr
    code, stderr, _ = server.finish(20)
    assert code == 0, stderr
    return server, clients


@pytest.mark.parametrize("server_python, client_pythons", [
    (NEWEST, [OLDEST, NEWEST]), (OLDEST, [NEWEST, OLDEST])],
    ids=["server " + helpers.version_name(NEWEST), "server " + helpers.version_name(OLDEST)])
@pytest.mark.parametrize("percent", [1, 5, 30])
def test_independent_loss_is_repaired_by_multicast(percent, server_python, client_pythons):
    """In two TCP threads; the coded packets and their recipes are lost like all others."""
    packets, count = 1000, 6
    data = helpers.random_bytes(packets * PAYLOAD - 7, seed=percent)
    server, clients = transfer(data, [helpers.loss(percent, seed) for seed in range(count)],
                            RATE + ["--clients-per-thread", 4], (), server_python, client_pythons, PATIENT)
    summary = helpers.summary(server)
    lost = sum(sum(helpers.repaired(client)) for client in clients)
    assert lost > 0.8 * count * packets * percent / 100
    assert summary.coded > 0
    assert summary.coded + summary.by_tcp < lost, "coding saved nothing: %d packets lost, %r" % (lost, summary)
    assert len([client for client in clients if helpers.repaired(client)[0]]) > count // 2      # of few some come by TCP


def test_shared_loss_is_repaired_once_for_all():
    """Every client lacks the same packets: one coded packet a lost one."""
    packets = 1000
    data = helpers.random_bytes(packets * PAYLOAD)
    server, clients = transfer(data, [helpers.loss(5, seed=1) for _ in range(4)], RATE, of_client=PATIENT)
    summary = helpers.summary(server)
    losses = [sum(helpers.repaired(client)) for client in clients]
    shared = min(losses)
    others = sum(losses) - 4 * shared           # a busy loopback loses some of its own, now here, now there
    assert shared > 0.8 * packets * 5 / 100
    assert summary.coded + summary.by_tcp < 2 * shared + others, "by TCP alone: %r, here: %r" % (losses, summary)


@EVERY
def test_one_client_with_loss_is_repaired_by_tcp_or_multicast(python):
    data = helpers.random_bytes(200 * PAYLOAD + 1)
    transfer(data, [helpers.loss(20, seed=3), None], RATE + ["--buffer-packets", 50], (), python, [python])


@BOTH
def test_multicast_that_reaches_nobody(python):
    data = helpers.random_bytes(300 * PAYLOAD + 5)
    server, clients = transfer(data, [lambda datagram: []] * 2, (), (), python, [python])
    summary = helpers.summary(server)
    assert summary.coded == 0
    assert summary.by_tcp + server.report()["carried"]["chain"] // PAYLOAD == 602, "each has it once"
    for client in clients:
        assert "multicast does not reach this host" in client.stderr and "firewall" in client.stderr
        assert "IGMP snooping" in client.stderr and "LOCAL_IP" in client.stderr


def test_multicast_that_does_not_arrive_is_said_long_before_the_end():
    port, said = helpers.free_port(), threading.Event()

    def produce():
        while not said.wait(0.1):               # a round each time
            yield helpers.random_bytes(10 * PAYLOAD)
    server = helpers.start_server(["--buffer-packets", 10, LOOPBACK, 1, port], stdin=produce())
    server.wait_stderr("waiting")
    path = helpers.Network(port).path(lambda datagram: [])
    client = wrapped("kmcast.Client.QUIET = 0.2", ["client", LOOPBACK, LOOPBACK, path])
    client.wait_stderr("multicast does not reach this host, everything comes by TCP", 15)
    said.set()
    assert client.finish(20)[0] == 0
    assert server.finish(10)[0] == 0
    assert client.stderr.count("does not reach") == 1


def test_multicast_that_is_slow_but_arrives_gets_no_warning():
    """The first packets take longer to come than a client waits for a sign that any will."""
    port = helpers.free_port()
    server = helpers.start_server(["--rate", "500k", LOOPBACK, 1, port], stdin=helpers.random_bytes(30 * PAYLOAD))
    client = wrapped("kmcast.Client.QUIET = 0.2", ["client", LOOPBACK, LOOPBACK, port])
    code, stderr, _ = client.finish(20)
    assert code == 0 and helpers.repaired(client) == (0, 0) and "warning" not in stderr, stderr
    assert server.finish(10)[0] == 0


def test_multicast_that_reaches_all_but_one():
    data = helpers.random_bytes(800 * PAYLOAD + 5)
    server, clients = transfer(data, [lambda datagram: [], helpers.loss(2, 1), helpers.loss(2, 2), None], RATE)
    assert ["multicast does not reach this host" in client.stderr for client in clients] == [True, False, False, False]
    assert helpers.summary(server).by_tcp + server.report()["carried"]["chain"] // PAYLOAD >= 801


class Disturbance(object):
    """Loses some datagrams, doubles some, damages some, and keeps some back for the next ones.

    base: leave the seq alone, which no checksum of the base protocol covers
    """

    def __init__(self, seed, base):
        self._random = random.Random(seed)
        self._first = 4 if base else 0
        self._late = []

    def __call__(self, datagram):
        chance = self._random.random()
        if chance < 0.03:
            return []
        if chance < 0.06:
            return [datagram, datagram]
        if chance < 0.12:
            damaged = bytearray(datagram)
            end = 12 if chance < 0.09 else len(datagram)
            damaged[self._random.randrange(self._first, end)] ^= 1 << self._random.randrange(8)
            return [bytes(damaged)] + ([datagram] if chance < 0.07 else [])
        if chance < 0.14:
            return [datagram[:self._random.randrange(len(datagram))], datagram + b"x"]
        if chance < 0.30:
            self._late.append(datagram)
            return []
        if chance < 0.4 and self._late:
            late, self._late = self._late, []
            self._random.shuffle(late)
            return [datagram] + late
        return [datagram]


@pytest.mark.parametrize("base, way, python", sorted(
    {("", way, python) for way in ("gso", "mmsg", "plain") for python in (OLDEST, NEWEST)}
    | {("--compat", "gso", NEWEST), ("--compat", "mmsg", OLDEST), ("--compat", "plain", NEWEST)}),
    ids=lambda value: helpers.version_name(value) if "/" in value else value or "session")
def test_datagrams_lost_doubled_damaged_and_late(base, way, python):
    """Late ones come in later rounds, and in repair passes that they do not belong to."""
    data = helpers.random_bytes(600 * PAYLOAD + 99)
    # The last rounds are small, so that what was kept back comes in another round.
    transfer(data, [Disturbance(seed, base) for seed in range(4)], RATE + ["--buffer-packets", 100] + base.split(), ["--datagrams", way],
             python, [python])
