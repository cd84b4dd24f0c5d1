"""Who takes part: clients that come and go before the start, crowds at the door, and those that are refused."""

import os
import re
import socket
import time

import helpers
import wire
from helpers import LOOPBACK
from hostile import MEMORY_KIB
from pythons import BOTH, in_turn
from test_failures import Started, wait_until


class Peer(wire.Client):
    """A client made by hand, which says HELLO when it is told to."""

    def come(self, server):
        """Say HELLO, be welcome, and wait until the server says that we are here; returns the Peer."""
        here = len(numbers(server))
        self.greet()
        wait_until(lambda: len(numbers(server)) > here, "the server has said so")
        return self

    def go(self, server):
        """Be gone, and wait until the server has noticed."""
        gone = server.stderr.count("went away")
        self.close()
        wait_until(lambda: server.stderr.count("went away") > gone, "the server has noticed")


def numbers(server):
    """What a server's lines of who is here say: the N of "N of M", one after the other."""
    return [int(number) for number in re.findall(r"is here, (\d+) of", server.stderr)]


# ---------------------------------------------------------------------------------------------------------------------
# Before the start

@BOTH
def test_those_who_are_gone_do_not_count_for_the_start(python):
    """Nor do they when another thread has looked after them."""
    data, port = b"data", helpers.free_port()
    server = helpers.start_server(
        ["--clients-per-thread", 1, "--min-clients", 2, "--start-wait", 3, LOOPBACK, 3, port], python, stdin=data)
    began = time.time()
    victim = Peer(port).come(server)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("connected to")
    victim.go(server)
    time.sleep(max(0, began + 4 - time.time()))
    assert "starting" not in server.stderr and server.poll() is None, server.stderr
    late = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    assert [process.finish(10)[::2] for process in (client, late)] == [(0, data)] * 2, server.stderr
    assert server.finish(10)[0] == 3
    assert numbers(server) == [1, 2, 2]
    assert "starting with 2 of 3" in server.stderr and "2 of 3 clients have the image" in server.stderr


@BOTH
def test_nobody_is_no_start(python):
    """All who have come are gone again when the time is up."""
    port = helpers.free_port()
    server = helpers.start_server(
        ["--clients-per-thread", 1, "--start-wait", 2.5, LOOPBACK, 3, port], python, stdin=b"data")
    began = time.time()
    first, second = Peer(port).come(server), Peer(port).come(server)
    first.go(server)
    third = Peer(port).come(server)
    second.go(server)
    third.go(server)
    time.sleep(max(0, began + 3.5 - time.time()))
    assert "starting" not in server.stderr and server.poll() is None, server.stderr
    assert helpers.start_client([LOOPBACK, LOOPBACK, port], python).finish(10)[::2] == (0, b"data")
    assert server.finish(10)[0] == 3
    assert numbers(server) == [1, 2, 2, 1], server.stderr
    assert "starting with 1 of 3" in server.stderr and "1 of 3 clients have the image" in server.stderr


@in_turn("a_thread, most", [(1, 3), (2, 2)])
def test_clients_that_come_and_go_before_the_start_cost_no_thread(python, a_thread, most):
    """Three places need so many threads at the most, whoever has been here."""
    port, seen = helpers.free_port(), []
    server = helpers.start_server(["--clients-per-thread", a_thread, LOOPBACK, 3, port], python, stdin=b"data")
    server.wait_stderr("waiting for")

    def threads():
        return len(os.listdir("/proc/%d/task" % server.pid))
    others = threads() - 1                  # than those that serve clients, of which there is one now
    resident = Peer(port).come(server)
    for _ in range(12):
        guest = Peer(port).come(server)
        seen.append(threads())
        guest.go(server)
    resident.go(server)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python) for _ in range(3)]
    assert [client.finish(10)[::2] for client in clients] == [(0, b"data")] * 3, server.stderr
    assert server.finish(10)[0] == 0
    assert max(seen) - others <= most, seen
    assert numbers(server) == [1] + 12 * [2] + [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Crowds

@BOTH
def test_a_room_full_of_hosts_that_were_switched_on_together_gets_in(python):
    """All of them connect before the first one says HELLO."""
    port, places = helpers.free_port(), 400
    server = helpers.start_server([LOOPBACK, places, port], python, stdin=b"data")
    peers = [Peer(port, "host-%d" % number, "127.1.%d.%d" % divmod(number, 200)) for number in range(places)]
    for peer in peers:
        peer.hello()
    for peer in peers:
        peer.take_welcome()
    assert server.poll() is None
    server.stop()


@BOTH
def test_who_connects_a_thousand_times_pushes_out_nobody_but_himself(python):
    """And takes no more memory than he may."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 20, port], python, stdin=b"data")
    server.wait_stderr("waiting for")
    server.poll()
    before = server.peak_kib
    waiting = [Peer(port, "host-%d" % number, "127.0.1.%d" % number) for number in range(1, 11)]
    flood = []
    for _ in range(1000):
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind(("127.9.9.9", 0))
        sock.connect_ex((LOOPBACK, port))
        flood.append(sock)
    last = Peer(port, "last", "127.0.2.1")     # which is heard when all of those have been
    for peer in waiting + [last]:
        peer.greet()
    helpers.start_client([LOOPBACK, LOOPBACK, port], python).wait_stderr("connected to")
    assert server.poll() is None
    assert server.peak_kib < before + MEMORY_KIB, "%d KiB instead of %d" % (server.peak_kib, before)
    server.stop()
    for sock in flood:
        sock.close()


# ---------------------------------------------------------------------------------------------------------------------
# Who is refused

@in_turn("a_thread", [1, 64])
def test_who_was_refused_is_named_at_the_end_and_in_the_exit_code(python, a_thread):
    """That host has no image, though nobody had counted it."""
    session = Started(2, ["--clients-per-thread", a_thread], python=python)
    assert "refused" in Peer(session.port, "node7", "127.0.0.7").hello().reason()
    session.write_rest()
    assert [client.finish(10)[0] for client in session.clients] == [0, 0]
    code, stderr, _ = session.server.finish(10)
    assert code == 3 and helpers.summary(session.server).served == 2, stderr
    named = [line for line in stderr.splitlines() if "node7 (127.0.0.7)" in line and "error" in line]
    assert len(named) == 1 and "refused" in named[0], stderr


@BOTH
def test_who_comes_after_the_start_hears_that_it_has_begun(python, tmp_path):
    """Not that all places are taken, which is not so: one has died."""
    session = Started(2, python=python)
    session.clients[1].stop()
    session.server.wait_stderr("went away")
    late = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, session.port], python)
    code, stderr, _ = late.finish(10)
    assert code == 3 and "has begun" in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    session.write_rest()
    assert session.clients[0].finish(10)[0] == 0
    assert session.server.finish(10)[0] == 3
