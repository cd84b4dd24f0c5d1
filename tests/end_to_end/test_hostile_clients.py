"""Clients with a place that do not keep to the protocol: they are dropped, and nobody else notices.

Real processes on loopback; what is hostile is in this process.
"""

import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import all_receive, IMAGE, MEMORY_KIB, NEVER, orderly, undisturbed
from wire import ALIVE, BYE, PACKETS, SESSION, SUMS


IMPATIENT = ["--stall-timeout", 3]


def until_refused(member, data):
    """Send on and on, until the server has closed the connection."""
    deadline = time.time() + 20
    try:
        while time.time() < deadline:
            member.say(data)
    except OSError:
        return
    raise AssertionError("the server takes it for 20 s")


def hostile_alive(member):
    member.announced()
    until_refused(member, ALIVE * 65536)


def hostile_ready(member):
    until_refused(member, SESSION.ready(member.announced()) * 1000)


def hostile_ready_too_often(member):
    member.say(SESSION.ready(member.take_round()))
    return member.reason()


def hostile_done_too_early(member):
    what = member.announced()
    member.say(SESSION.ready(what), SESSION.done(what))
    return member.reason()


def hostile_done_for_the_image_too_early(member):
    member.take_round()
    member.say(SESSION.done(wire.IMAGE))
    return member.reason()


def hostile_request_too_early(member):
    what = member.announced()
    member.say(SESSION.ready(what), SESSION.request(what, [0]))
    return member.reason()


def hostile_request_outside_the_round(member):
    """A bit in the last byte of the map, behind those of the round."""
    what = member.take_round()
    assert what.count % 8, "each bit of the map is one of the round"
    member.ask([what.count])
    return member.reason()


def hostile_request_for_nothing(member):
    member.take_round()
    member.ask([])
    return member.reason()


def hostile_request_for_a_round_not_in_flight(member):
    member.say(SESSION.request(member.take_round()._replace(number=4000000000), [0]))
    return member.reason()


def hostile_ready_for_a_round_not_in_flight(member):
    member.say(SESSION.ready(member.announced()._replace(number=9)))
    return member.reason()


def hostile_done_for_a_round_not_in_flight(member):
    member.say(SESSION.done(member.take_round()._replace(number=9)))
    return member.reason()


def hostile_request_again_and_again(member):
    """One more than twenty times for the same packet, which it got each time."""
    member.take_round()
    for _ in range(25):
        member.ask([0])
        if member.expect(PACKETS, BYE).kind == BYE:
            return None
        member.packets([0])
    raise AssertionError("it may ask for ever")


def hostile_sums_again_and_again(member):
    what = member.take_round()
    for _ in range(25):
        member.say(SESSION.ask_for_sums(what))
        if member.expect(SUMS, BYE).kind == BYE:
            return None
    raise AssertionError("it may ask for ever")


def hostile_sums_too_early(member):
    what = member.announced()
    member.say(SESSION.ready(what), SESSION.ask_for_sums(what))
    return member.reason()


def hostile_sums_of_a_round_not_in_flight(member):
    member.say(SESSION.ask_for_sums(member.take_round()._replace(number=9)))
    return member.reason()


def hostile_second_request(member):
    what = member.take_round()
    member.say(SESSION.request(what, range(what.count)) + SESSION.request(what, [0]))
    member.sock.settimeout(5)
    try:
        while member.sock.recv(65536):
            pass
    except OSError:
        pass


def hostile_hello(member):
    member.announced()
    member.say(wire.hello())
    return member.reason()


def hostile_unknown_signal(member):
    member.announced()
    member.say(b"\x47")
    return member.reason()


def hostile_bye_without_reason(member):
    member.announced()
    member.say(wire.bye(False))
    return member.reason()


def hostile_bye_that_is_nested(member):
    member.announced()
    member.say(wire.frame(BYE, "[" * 60000))
    return member.reason()


def hostile_bye_of_four_gib(member):
    member.announced()
    member.say(BYE + b"\xff\xff\xff\xff{")
    return member.reason()


def hostile_bye_for_a_terminal(member):
    member.announced()
    member.say(wire.bye(False, reason="\x1b[2J\x1b[31m\r\nkmcast server: 3 of 3 clients have the image\n" + "x" * 50000))


def hostile_half_close(member):
    member.announced()
    member.half_close()


def hostile_rst(member):
    member.announced()
    member.reset()


def hostile_request_and_rst(member):
    member.ask(range(member.take_round().count))
    member.reset()


def hostile_reader(member):
    """Asks for all and never reads; ended by the stall timeout, alone among these."""
    member.ask(range(member.take_round().count))


HOSTILE = {
    hostile_alive: "far too many signs of life", hostile_ready: "out of turn", hostile_ready_too_often: "out of turn",
    hostile_done_too_early: "out of turn", hostile_done_for_the_image_too_early: "out of turn",
    hostile_request_too_early: "out of turn", hostile_request_outside_the_round: "outside the round",
    hostile_request_for_nothing: "outside the round, or for none", hostile_request_for_a_round_not_in_flight: "not under way",
    hostile_ready_for_a_round_not_in_flight: "out of turn", hostile_done_for_a_round_not_in_flight: "out of turn",
    hostile_sums_too_early: "out of turn", hostile_sums_of_a_round_not_in_flight: "out of turn",
    hostile_sums_again_and_again: "again and again",
    hostile_request_again_and_again: "again and again", hostile_second_request: "out of turn",
    hostile_hello: "out of turn", hostile_unknown_signal: "unknown signal", hostile_bye_without_reason: "protocol error",
    hostile_bye_that_is_nested: "not JSON", hostile_bye_of_four_gib: "a frame of 4294967295 bytes",
    hostile_bye_for_a_terminal: "it says: ?[2J?[31m??kmcast server",
    hostile_half_close: "went away", hostile_rst: "went away", hostile_request_and_rst: "went away", hostile_reader: "stalled",
}


@pytest.mark.parametrize("hostile", sorted(HOSTILE, key=lambda hostile: hostile.__name__), ids=lambda hostile: hostile.__name__)
def test_a_client_that_breaks_the_protocol_is_dropped_and_nobody_else_notices(hostile):
    """At once: there is no timeout that could do it."""
    port = helpers.free_port()
    data = IMAGE[:1000000]
    server = helpers.start_server(["--rate", "40M", "--buffer-packets", 50] + (IMPATIENT if hostile is hostile_reader else NEVER)
                                  + [LOOPBACK, 3, port], stdin=data)
    server.wait_stderr("waiting for")
    clients = [helpers.start_client(NEVER + [LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    member = wire.Client(port, "hostile").greet(window=4)
    told = hostile(member)
    if told:
        member.close()                  # as who has heard a BYE does; the others stay as they are
    all_receive(data, clients, server)
    code, stderr, _ = server.finish(30)
    assert server.peak_kib < undisturbed()[1] + MEMORY_KIB
    assert code == 3, stderr
    orderly(stderr)
    assert "2 of 3 clients have the image" in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("kmcast server: warning: hostile (127.0.0.1): ")]
    assert len(lines) == 1 and HOSTILE[hostile] in lines[0], stderr
    assert told is None or told in lines[0]
    member.close()


@pytest.mark.parametrize("args", [[], ["--no-digest"]], ids=["digests", "checksums"])
def test_packets_come_as_they_were_asked_for(args):
    """All of them, ascending, and no other; again, if they are asked for again."""
    port = helpers.free_port()
    data = IMAGE[:100000]
    server = helpers.start_server(args + ["--unicast", LOOPBACK, 1, port], stdin=data)
    server.wait_stderr("waiting for")
    member = wire.Client(port).greet()
    what, payload = member.take_round(), member.welcome["payload"]
    for places in (range(0, what.count, 3), [what.count - 1], range(what.count)):
        member.ask(places)
        assert member.expect(PACKETS).round == what
        assert member.packets(places) == [data[place * payload:(place + 1) * payload] for place in places]
    member.reset()
    assert server.finish(10)[0] == 1


def test_who_is_dropped_while_packets_are_on_their_way_to_it_gets_these_and_is_told_why():
    port = helpers.free_port()
    data = helpers.random_bytes(14000000, seed=10)
    server = helpers.start_server(["--unicast", "--buffer-packets", 40000, LOOPBACK, 1, port], stdin=data,
                                  change="kmcast.FAREWELL_TIME = 60.0")
    server.wait_stderr("waiting for")
    member = wire.Client(port).greet()
    what = member.take_round()
    member.ask(range(what.count))
    member.expect(PACKETS)
    member.say(b"\x47")
    server.wait_stderr("unknown signal")
    same = b"".join(member.packets(range(what.count))) == data[:what.size]
    assert same and what.size > 10000000, "more than the kernel keeps"
    assert "unknown signal" in member.reason()
    member.close()
    assert server.finish(10)[0] == 1
