"""The stall timeouts of both sides: each heeds its own, and each is heard from in time for the other's, however short.

The short ones are tried on the server, on the clients and on both, in three transfers side by side.
"""

import contextlib
import socket
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import IMAGE
from pythons import BOTH, NEWEST, OLDEST
from wire import ALIVE, STATE

#: Seconds of a pause, longer than all the short timeouts, and shorter than an ALIVE every 5 s takes.
PAUSE = 4

#: (--stall-timeout, interpreter of the servers, of the clients)
SHORT = pytest.mark.parametrize("limit, of_server, of_client", [(2, OLDEST, NEWEST), (2, NEWEST, OLDEST)],
                                ids=["server " + helpers.version_name(python) for python in (OLDEST, NEWEST)])


@BOTH
def test_a_client_whose_output_is_stuck_ends_by_its_own_clock(python):
    """The server's may be switched off. The rounds are small: the client has more than one when its output is stuck."""
    port = helpers.free_port()
    server = helpers.start_server(["--stall-timeout", 0, "--buffer-packets", 64, LOOPBACK, 1, port], python=python,
                                  stdin=IMAGE)
    client = helpers.start_client(["--stall-timeout", 2, LOOPBACK, LOOPBACK, port], python=python, stdout=helpers.PIPE)
    assert client.wait(20) == 1, client.stderr
    assert "output" in client.stderr.splitlines()[-1], client.stderr
    assert server.finish(10)[0] == 1


class Session(object):
    """A server and its clients, of which those on `sides` ("server", "client") have the stall timeout `limit`."""

    def __init__(self, sides, limit, of_server, of_client, data, stdin=None, places=1):
        self._data, self._python = data, of_client
        self._port = helpers.free_port()
        self._limit_of = dict((side, ["--stall-timeout", limit] if side in sides else [])
                              for side in ("server", "client"))
        self._clients = []
        self.server = helpers.start_server(self._limit_of["server"] + [LOOPBACK, places, self._port], python=of_server,
                                           stdin=stdin or data)

    def add_client(self, pace=0):
        """Start one whose output is read with so many seconds between the reads."""
        received = []

        def consume(chunk):
            received.append(chunk)
            time.sleep(pace)

        client = helpers.start_client(self._limit_of["client"] + [LOOPBACK, LOOPBACK, self._port], python=self._python,
                                      stdout=consume)
        self._clients.append((client, received))

    def check_complete(self):
        """Fail unless all end well."""
        for client, received in self._clients:
            code, stderr, _ = client.finish(60)
            equal = b"".join(received) == self._data
            assert code == 0 and equal, stderr + self.server.stderr
        code, stderr, _ = self.server.finish(10)
        assert code == 0, stderr


def on_each_side(*args, **options):
    """A Session for each side that can have a short timeout, and one for both. `stdin`: a function that returns one."""
    stdin = options.pop("stdin", lambda: None)
    return [Session(sides, *args, stdin=stdin(), **options)
            for sides in (("server",), ("client",), ("server", "client"))]


@SHORT
def test_a_producer_that_pauses_for_longer_than_the_stall_timeout_costs_nobody(limit, of_server, of_client):
    def produce():
        yield IMAGE[:1000000]
        time.sleep(PAUSE)
        yield IMAGE[1000000:]

    sessions = on_each_side(limit, of_server, of_client, IMAGE, stdin=produce)
    for session in sessions:
        session.add_client()
    for session in sessions:
        session.check_complete()


@SHORT
def test_a_wait_for_the_others_that_is_longer_than_the_stall_timeout_costs_nobody(limit, of_server, of_client):
    sessions = on_each_side(limit, of_server, of_client, IMAGE, places=2)
    for session in sessions:
        session.add_client()
        session.server.wait_stderr("1 of 2")
    time.sleep(PAUSE)
    for session in sessions:
        session.add_client()
    for session in sessions:
        session.check_complete()


@SHORT
def test_a_consumer_that_takes_longer_than_the_stall_timeout_but_moves_costs_nobody(limit, of_server, of_client):
    """Neither its client nor one that waits for it. 64 KiB each third of the timeout; a round has up to 374 KB."""
    sessions = on_each_side(limit, of_server, of_client, IMAGE[:700000], places=2)
    for session in sessions:
        session.add_client(pace=limit / 3)
        session.add_client()
    for session in sessions:
        session.check_complete()


# ---------------------------------------------------------------------------------------------------------------------
# What they tell each other

TOLD = pytest.mark.parametrize("args, stall", [([], 30), (["--stall-timeout", 7], 7), (["--stall-timeout", 0], 0)],
                               ids=["by default", "7 s", "never"])


@TOLD
@BOTH
def test_a_server_tells_its_stall_timeout(args, stall, python):
    port = helpers.free_port()
    helpers.start_server(args + [LOOPBACK, 1, port], python=python, stdin=IMAGE)
    with contextlib.closing(wire.Client(port).greet()) as client:
        assert client.welcome["stall"] == stall


@TOLD
@BOTH
def test_a_client_tells_its_stall_timeout(args, stall, python):
    with contextlib.closing(wire.Server()) as server:
        helpers.start_client(args + [LOOPBACK, LOOPBACK, server.port], python=python)
        assert server.accept().greet().hello["stall"] == stall


@BOTH
def test_a_client_that_waits_for_the_start_hears_from_the_server_three_times_within_its_stall_timeout(python):
    """So that one sign of life may be late, or two."""
    port = helpers.free_port()
    helpers.start_server([LOOPBACK, 3, port], python=python, stdin=IMAGE)
    patient, client = wire.Client(port, "patient").greet(stall=30), wire.Client(port, "impatient").greet(stall=1)
    for _ in range(15):
        assert client.expect(ALIVE, STATE)
    client.close()
    # Meanwhile the other one, who hears it every 5 s, has heard as good as nothing.
    patient.sock.settimeout(0.5)
    heard = 0
    with contextlib.suppress(socket.timeout):
        while heard < 15 and patient.expect(ALIVE, STATE):
            heard += 1
    patient.close()
    assert heard < 8
