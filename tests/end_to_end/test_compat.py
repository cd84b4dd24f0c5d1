"""The base protocol, with a peer written from its description alone: base_peer.py, which is stricter than any real one."""

import contextlib
import socket
import time

import pytest

import helpers
import kmcast
from helpers import LOOPBACK, payload_size
from hostile import wrapped
from pythons import ALL, BOTH, in_turn, NEWEST, OLDEST

PAYLOAD = payload_size(1500)


def serve_base_clients(data, clients=2, server_args=(), client_args=(), python=None):
    """One `kmcast server --compat` and base_peer's clients; returns the server's summary."""
    port = helpers.free_port()
    server = helpers.start_server(["--compat", "--buffer-packets", 10] + list(server_args) + [LOOPBACK, clients, port],
                                  python=python, stdin=data)
    peers = [helpers.start_base_client(list(client_args) + ["--seed", seed, LOOPBACK, LOOPBACK, port])
             for seed in range(clients)]
    for peer in peers:
        code, stderr, received = peer.finish(60)
        assert code == 0, stderr + server.stderr
        assert received == data
    code, stderr, _ = server.finish(20)
    assert code == 0, stderr
    summary = helpers.summary(server)
    assert summary.served == clients
    return summary


def take_from_base_server(data, clients=2, server_args=(), client_args=(), pythons=(None,)):
    """One server of base_peer.py and kmcast's clients; returns these."""
    port = helpers.free_port()
    server = helpers.start_base_server(list(server_args) + [LOOPBACK, clients, port], stdin=data)
    started = [helpers.start_client(list(client_args) + [LOOPBACK, LOOPBACK, port], python=pythons[number % len(pythons)])
               for number in range(clients)]
    for client in started:
        code, stderr, received = client.finish(60)
        assert code == 0, stderr + server.stderr
        assert received == data
    code, stderr, _ = server.finish(20)
    assert code == 0, stderr
    return started


# ---------------------------------------------------------------------------------------------------------------------
# kmcast as the server

@pytest.mark.parametrize("size", [1, 3, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, 10 * PAYLOAD, 10 * PAYLOAD + 1, 300001])
def test_base_clients_of_a_compat_server(size):
    serve_base_clients(helpers.random_bytes(size, seed=size))


@pytest.mark.parametrize("drop, python", [(20, python) for python in ALL]
                         + [(100, python) for python in sorted({OLDEST, NEWEST})])
def test_base_clients_that_lose_datagrams(python, drop):
    summary = serve_base_clients(helpers.random_bytes(40 * PAYLOAD + 5, seed=drop), 2, ["--clients-per-thread", 1],
                                 ["--drop", drop], python)
    if drop == 100:
        assert (summary.coded, summary.by_tcp) == (0, 82)


def test_base_clients_with_buffers_of_full_size():
    data = helpers.random_bytes(5000000)
    serve_base_clients(data, 2, ["--buffer-packets", 65536], ["--drop", 1])


@in_turn("way", ["gso", "mmsg", "plain"])
def test_base_clients_whatever_the_way_to_send(python, way):
    serve_base_clients(helpers.random_bytes(200001), 1, ["--datagrams", way], python=python)


@pytest.mark.parametrize("mtu", [576, 9000])
def test_base_clients_at_another_mtu(mtu):
    serve_base_clients(helpers.random_bytes(100003), 2, ["--mtu", mtu], ["--mtu", mtu, "--drop", 10])


@pytest.mark.parametrize("size", [3, 100003, 5 * 8960])
def test_clients_at_the_largest_mtu(size):
    """Only the size of a round tells them."""
    data = helpers.random_bytes(size)
    result = helpers.transfer(data, 2, ["--compat", "--mtu", 9000, "--buffer-packets", 10], client_python=[OLDEST, NEWEST])
    result.check(data)
    for client in result.clients:
        assert helpers.repaired(client) == (0, 0)


def test_base_clients_by_unicast():
    serve_base_clients(helpers.random_bytes(50000), 2, ["--unicast"])


@BOTH
def test_base_clients_that_connect_at_once_are_spread_over_the_threads(python):
    serve_base_clients(helpers.random_bytes(50000), 7, ["--clients-per-thread", 2], python=python)


def test_a_base_client_that_goes_away_does_not_stall_the_others():
    data, port = helpers.random_bytes(50 * PAYLOAD), helpers.free_port()
    server = helpers.start_server(["--compat", "--buffer-packets", 10, LOOPBACK, 2, port], stdin=helpers.PIPE)
    server.popen.stdin.write(data[:20 * PAYLOAD])
    received = []
    victim = helpers.start_base_client([LOOPBACK, LOOPBACK, port], stdout=lambda chunk: received.append(chunk))
    other = helpers.start_base_client([LOOPBACK, LOOPBACK, port])
    deadline = time.time() + 20
    while not received and time.time() < deadline:
        time.sleep(0.01)
    victim.stop()
    server.popen.stdin.write(data[20 * PAYLOAD:])
    server.popen.stdin.close()
    code, stderr, arrived = other.finish(20)
    assert code == 0 and arrived == data, stderr
    code, stderr, _ = server.finish(20)
    assert code == 3 and helpers.summary(server).served == 1, stderr


def test_a_base_client_that_hangs_is_given_up_before_the_others_give_up():
    """They wait 20 s for each other, as the C implementation does."""
    assert kmcast.BASE_STALL < 20 < kmcast.STALL
    port = helpers.free_port()
    server = wrapped("kmcast.BaseDialect.server_stall = 1", ["server", "--compat", LOOPBACK, 2, port], stdin=b"data")
    server.wait_stderr("waiting")
    with contextlib.closing(socket.create_connection((LOOPBACK, port))):
        assert helpers.start_base_client([LOOPBACK, LOOPBACK, port]).finish(15)[::2] == (0, b"data")
        code, stderr, _ = server.finish(10)
    assert code == 3 and "stalled: for 1 s no word" in stderr, stderr


def test_a_kmcast_client_of_a_compat_server_takes_it_for_what_it_is():
    data = helpers.random_bytes(30 * PAYLOAD + 1)
    result = helpers.transfer(data, 3, ["--compat", "--buffer-packets", 10], client_python=[OLDEST, NEWEST])
    result.check(data)


# ---------------------------------------------------------------------------------------------------------------------
# kmcast as the client

@pytest.mark.parametrize("size, checksum", [
    (1, "sum"), (1, "crc"), (PAYLOAD - 1, "sum"), (PAYLOAD + 1, "crc"), (10 * PAYLOAD, "sum"),
    (10 * PAYLOAD + 1, "crc"), (300001, "sum"), (300001, "crc")])
def test_clients_of_a_base_server(size, checksum):
    take_from_base_server(helpers.random_bytes(size, seed=size), 2, ["--buffer-packets", 10, "--checksum", checksum])


@pytest.mark.parametrize("checksum", ["sum", "crc"])
def test_every_interpreter_as_client_of_a_base_server_with_short_packets_and_loss(checksum):
    take_from_base_server(helpers.random_bytes(100000), len(ALL),
                          ["--buffer-packets", 20, "--short", "--drop", 10, "--checksum", checksum, "--first-buffer-id", 1],
                          pythons=ALL)


@in_turn("way", ["gso", "mmsg", "plain"])
def test_every_way_to_receive_from_a_base_server(python, way):
    take_from_base_server(helpers.random_bytes(300000), 1, ["--short"], ["--datagrams", way], [python])


@pytest.mark.parametrize("checksum", ["sum", "crc"])
def test_a_base_server_whose_multicast_does_not_arrive(checksum):
    """Then the first packet that decides between the checksums is a repair."""
    clients = take_from_base_server(helpers.random_bytes(30 * PAYLOAD + 7), 2,
                                    ["--drop", 100, "--buffer-packets", 10, "--checksum", checksum])
    for client in clients:
        assert helpers.repaired(client) == (0, 31)


def test_a_base_server_with_buffers_of_full_size():
    data = helpers.random_bytes(6000000)
    take_from_base_server(data, 2, ["--drop", 1], pythons=[OLDEST, NEWEST])


def test_a_base_server_that_is_silent_is_not_given_up():
    """It has no way to say that it only waits: for its clients, or for its producer."""
    port, impatient = helpers.free_port(), "kmcast.STALL = kmcast.BASE_STALL = 0.5"

    def produce():
        yield b"first"
        time.sleep(1.5)
        yield b"second"
    server = helpers.start_base_server([LOOPBACK, 2, port], stdin=produce())
    first = wrapped(impatient, ["client", LOOPBACK, LOOPBACK, port])
    first.wait_stderr("connected")
    time.sleep(1.5)
    second = wrapped(impatient, ["client", LOOPBACK, LOOPBACK, port])
    for process in (first, second):
        assert process.finish(20)[::2] == (0, b"firstsecond"), process.stderr
    assert server.finish(10)[0] == 0


@BOTH
def test_a_base_server_that_dies_leaves_no_file(python, tmp_path):
    port = helpers.free_port()
    server = helpers.start_base_server([LOOPBACK, 1, port, "--buffer-packets", 10], stdin=helpers.PIPE)
    server.popen.stdin.write(helpers.random_bytes(20 * PAYLOAD))
    client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    deadline = time.time() + 20
    while not [path for path in tmp_path.iterdir() if path.stat().st_size] and time.time() < deadline:
        time.sleep(0.01)
    server.stop()
    code, stderr, _ = client.finish(20)
    assert code == 1 and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []
