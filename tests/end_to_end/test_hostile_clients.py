"""Clients with a place that do not keep to the protocol: they are dropped, and nobody else notices.

Real processes on loopback; what is hostile is in this process.
"""

import socket
import struct
import time

import pytest

import fuzz
import helpers
from fuzz import ALIVE, BYE, DONE, INFO, PACKETS, READY, REQUEST, SENT
from helpers import LOOPBACK
from hostile import (all_receive, DELAY, IMAGE, MEMORY_KIB, orderly, receive, receive_fields, receive_frame, reset,
                     undisturbed)


class Member(object):
    """A hostile client: a bare connection that has a place, and what it hears."""

    def __init__(self, port, host="hostile"):
        self.sock = socket.create_connection((LOOPBACK, port))
        self.sock.settimeout(20)
        receive(self.sock, 16)
        self.send(fuzz.hello(host))
        self.welcome = receive_frame(self.sock)[1]

    def send(self, data):
        self.sock.sendall(data)

    def info(self):
        """Wait for a buffer info; returns base and count."""
        self.signal(INFO)
        _, _, base, count = struct.unpack("<4I", receive(self.sock, 16))
        return base, count

    def signal(self, expected):
        """Wait for a signal; ALIVE is passed over."""
        kind = ALIVE
        while kind == ALIVE:
            kind = receive(self.sock, 1)
        assert kind == expected, kind

    def ready(self):
        """READY to a buffer info, and wait for SENT; returns base and count."""
        base, count = self.info()
        self.send(READY)
        self.signal(SENT)
        receive(self.sock, 32)
        return base, count

    def bye(self):
        """The reason of a BYE that must come now; packets that were on their way are passed over."""
        self.signal(BYE)
        fields = receive_fields(self.sock)
        assert fields["ok"] is False
        return fields["reason"]


def until_refused(member, data):
    """Send on and on, until the server has closed the connection."""
    deadline = time.time() + 20
    try:
        while time.time() < deadline:
            member.send(data)
    except OSError:
        return
    raise AssertionError("the server takes it for 20 s")


def hostile_alive(member):
    member.info()
    until_refused(member, ALIVE * 65536)


def hostile_ready(member):
    member.info()
    until_refused(member, READY * 1000)


def hostile_ready_too_often(member):
    member.ready()
    member.send(READY)
    return member.bye()


def hostile_done_too_early(member):
    member.info()
    member.send(READY + DONE)
    return member.bye()


def hostile_request_too_early(member):
    member.info()
    member.send(READY + fuzz.request([0]))
    return member.bye()


def hostile_request_outside_the_round(member):
    base, count = member.ready()
    member.send(fuzz.request([base + count]))
    return member.bye()


def hostile_request_before_the_round(member):
    base, _ = member.ready()
    member.send(fuzz.request([base - 1]))
    return member.bye()


def hostile_request_for_nothing(member):
    member.ready()
    member.send(fuzz.request([]))
    return member.bye()


def hostile_request_for_too_many(member):
    base, count = member.ready()
    member.send(fuzz.request([base] * (count + 1)))
    return member.bye()


def hostile_request_for_four_billion(member):
    member.ready()
    member.send(REQUEST + b"\xff\xff\xff\xff")
    return member.bye()


def hostile_second_request(member):
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)) + fuzz.request([base]))
    member.sock.settimeout(5)
    try:
        while member.sock.recv(65536):
            pass
    except OSError:
        pass


def hostile_hello(member):
    member.info()
    member.send(fuzz.hello())
    return member.bye()


def hostile_unknown_signal(member):
    member.info()
    member.send(b"\x47")
    return member.bye()


def hostile_bye_without_reason(member):
    member.info()
    member.send(fuzz.bye(False))
    return member.bye()


def hostile_bye_that_is_nested(member):
    member.info()
    member.send(fuzz.frame(BYE, "[" * 60000))
    return member.bye()


def hostile_bye_of_four_gib(member):
    member.info()
    member.send(BYE + b"\xff\xff\xff\xff{")
    return member.bye()


def hostile_bye_for_a_terminal(member):
    member.info()
    member.send(fuzz.bye(False, reason="\x1b[2J\x1b[31m\r\nkmcast server: 3 of 3 clients have the image\n" + "x" * 50000))


def hostile_half_close(member):
    member.info()
    member.sock.shutdown(socket.SHUT_WR)


def hostile_rst(member):
    member.info()
    reset(member.sock)


def hostile_request_and_rst(member):
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)))
    reset(member.sock)


def hostile_reader(member):
    """Asks for all and never reads; ended by the stall timeout."""
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)))


HOSTILE = {
    hostile_alive: "far too many signs of life", hostile_ready: "out of turn", hostile_ready_too_often: "out of turn",
    hostile_done_too_early: "out of turn", hostile_request_too_early: "out of turn",
    hostile_request_outside_the_round: "outside the round", hostile_request_before_the_round: "outside the round",
    hostile_request_for_nothing: "a request for 0 packets", hostile_request_for_too_many: "a request for",
    hostile_request_for_four_billion: "a request for 4294967295 packets", hostile_second_request: "out of turn",
    hostile_hello: "out of turn", hostile_unknown_signal: "unknown signal", hostile_bye_without_reason: "protocol error",
    hostile_bye_that_is_nested: "not JSON", hostile_bye_of_four_gib: "a frame of 4294967295 bytes",
    hostile_bye_for_a_terminal: "it says: ?[2J?[31m??kmcast server",
    hostile_half_close: "went away", hostile_rst: "went away", hostile_request_and_rst: "went away", hostile_reader: "stalled",
}


@pytest.mark.parametrize("hostile", sorted(HOSTILE, key=lambda hostile: hostile.__name__), ids=lambda hostile: hostile.__name__)
def test_a_client_that_breaks_the_protocol_is_dropped_and_nobody_else_notices(hostile):
    port = helpers.free_port()
    data = IMAGE[:1000000]
    server = helpers.start_server(["--rate", "40M", "--stall-timeout", 3, LOOPBACK, 3, port], stdin=data)
    server.wait_stderr("waiting for")
    began = time.time()
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    member = Member(port)
    told = hostile(member)
    if told:
        member.sock.close()             # as who has heard a BYE does; the others stay as they are
    all_receive(data, clients, server)
    code, stderr, _ = server.finish(30)
    seconds, _, peak = undisturbed()
    assert time.time() - began < seconds + 3 + DELAY, stderr       # 3: the stall timeout
    assert server.peak_kib < peak + MEMORY_KIB
    assert code == 3, stderr
    orderly(stderr)
    assert "2 of 3 clients have the image" in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("kmcast server: warning: hostile (127.0.0.1): ")]
    assert len(lines) == 1 and HOSTILE[hostile] in lines[0], stderr
    assert told is None or told in lines[0]
    member.sock.close()


def test_requests_for_a_packet_over_and_over_are_answered_as_asked():
    """Odd, but allowed: exactly req_count packets, in the order asked."""
    port = helpers.free_port()
    data = IMAGE[:100000]
    server = helpers.start_server([LOOPBACK, 1, port], stdin=data)
    server.wait_stderr("waiting for")
    member = Member(port)
    base, count = member.ready()
    places = [count - 1] * (count // 2) + [0] * (count - count // 2)
    member.send(fuzz.request([base + place for place in places]))
    member.signal(PACKETS)
    payload = member.welcome["payload"]
    for place in places:
        seq, _, size = fuzz.HEADER.unpack(receive(member.sock, 12))
        assert seq == base + place
        assert receive(member.sock, size) == data[place * payload:place * payload + size]
    reset(member.sock)
    assert server.finish(10)[0] == 1
