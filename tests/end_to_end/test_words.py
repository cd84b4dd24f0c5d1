"""What server and clients say: the words that tell a user what happened, whose fault it was, and what to do."""

import os
import re
import signal

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import IMAGE
from pythons import BOTH, in_turn, NEWEST
from wire import BYE, PACKETS

#: A rate at which the image of 3 MB takes six seconds, unless somebody ends it.
SLOW = ["--rate", "4M"]


@pytest.fixture
def port():
    return helpers.free_port()


def line_with(text, stderr):
    """The one line that contains it."""
    lines = [line for line in stderr.splitlines() if text in line]
    assert len(lines) == 1, stderr
    return lines[0]


def under_way(port, python=None, clients=2, server_args=()):
    """A server that has begun to send to so many clients: (server, clients)."""
    server = helpers.start_server(SLOW + list(server_args) + [LOOPBACK, clients, port], python=python, stdin=IMAGE)
    started = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for _ in range(clients)]
    server.wait_stderr("%d of %d" % (clients, clients))
    return server, started


# ---------------------------------------------------------------------------------------------------------------------
# At the start

@BOTH
def test_the_first_line_tells_where_it_multicasts_from_and_to(port, python):
    """A wrong interface is the most frequent mistake, and from 127.0.0.1 it may be meant or not."""
    server = helpers.start_server([LOOPBACK, 2, port], python=python)
    server.wait_stderr("waiting for")
    server.wait_stderr("only this host")
    server.signal(signal.SIGTERM)
    first, second = server.finish(10)[1].splitlines()[:2]
    assert first == ("kmcast server: multicasting from lo (127.0.0.1) to %s port %d, waiting for 2 clients"
                     % (helpers.GROUP, port))
    assert "warning" in second and "only this host" in second


def test_a_server_that_does_not_multicast_does_not_say_so(port):
    server = helpers.start_server(["--unicast", LOOPBACK, 1, port], stdin=IMAGE)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port])
    of_client, of_server = client.finish(20)[1], server.finish(20)[1]
    assert of_server.startswith(
        "kmcast server: sending by TCP port %d, without multicast, waiting for 1 client\n" % port), of_server
    assert "connected to %s, which does not multicast" % LOOPBACK in of_client
    assert "warning" not in of_server + of_client


@pytest.fixture
def wired():
    """A prefix that runs a command on a host of its own, which beside lo has wired0 with the address 10.9.8.7."""
    prefix = ["unshare", "--net", "sh", "-c", "ip link add wired0 type veth && ip addr add 10.9.8.7/24 dev wired0 && "
              'ip link set lo up && ip link set wired0 up && exec "$@"', "sh"]
    code, reason, _ = helpers.start(prefix + ["true"]).finish(20)
    if code:
        pytest.skip("no other host can be made here: " + reason.strip())
    return prefix


@in_turn("local_ip", ["10.9.8.7", "wired0"])
def test_who_multicasts_from_an_interface_that_others_hear_is_not_warned(local_ip, wired, python):
    server = helpers.start_kmcast(["server", local_ip, 1], python, prefix=wired, stdin=IMAGE)
    server.wait_stderr("waiting for 1 client")
    server.signal(signal.SIGTERM)
    stderr = server.finish(10)[1]
    assert stderr.startswith("kmcast server: multicasting from wired0 (10.9.8.7) to " + helpers.GROUP), stderr
    assert "warning" not in stderr, stderr


@pytest.mark.parametrize("local_ip, numbers", [
    (LOOPBACK, [18383, 3]), (LOOPBACK, [10001, 20000]), (LOOPBACK, [1024, 1023]), (LOOPBACK, [10001]),
    ("auto", [18383, 3])])
def test_clients_and_port_that_look_swapped_are_asked_about(local_ip, numbers):
    code, stderr, _ = helpers.start_kmcast(["server", local_ip] + numbers).finish(10)
    assert code == 2 and "swapped" in stderr and len(stderr.splitlines()) == 1, stderr


def test_many_clients_on_a_port_as_it_should_be_are_not_asked_about(port):
    server = helpers.start_server([LOOPBACK, 1024, port], stdin=IMAGE)
    server.wait_stderr("port %d, waiting for 1024 clients" % port)


@BOTH
def test_a_server_stopped_before_any_client_speaks_of_no_data(port, python):
    server = helpers.start_server([LOOPBACK, 1, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    server.signal(signal.SIGINT)
    code, stderr, _ = server.finish(10)
    assert code == 1 and "stopped by SIGINT" in stderr, stderr
    assert "data:" not in stderr and "round" not in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# Who does not get the image, and why

@in_turn("one_died", [False, True], ids=["all are there", "one has died"])
def test_a_late_host_hears_that_the_transfer_has_begun(port, one_died, python):
    """Not that all places are taken, as if there would be one if another had not come."""
    server, clients = under_way(port, python)
    if one_died:
        clients[0].signal(signal.SIGKILL)
        server.wait_stderr("it went away")
    late = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = late.finish(20)
    assert code == 3 and "has begun" in stderr and "taken" not in stderr, stderr
    refused = line_with("refused", server.stderr)
    assert "has begun" in refused and "taken" not in refused


@in_turn("name", ["SIGINT", "SIGTERM"])
def test_a_server_that_is_stopped_says_so_of_itself(port, name, python):
    """Not "… does not have the image: stopped by SIGINT", as if the client was."""
    server, clients = under_way(port, python)
    server.signal(getattr(signal, name))
    code, stderr, _ = server.finish(20)
    assert code == 1, stderr
    lines = re.findall("does not have the image: (.*)", stderr)
    assert lines == 2 * ["the server was stopped by " + name], stderr
    for client in clients:
        assert client.finish(10)[0] in (1, 3)   # 3: it was not told of the first round yet


@BOTH
def test_a_server_that_is_stopped_before_the_start_says_so_of_itself_to_those_that_are_here(port, python):
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=IMAGE)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    server.wait_stderr("1 of 2")
    server.signal(signal.SIGINT)
    code, stderr, _ = server.finish(20)
    assert code == 1, stderr
    assert line_with("does not have the image", stderr).endswith(": the server was stopped by SIGINT")
    assert client.finish(10)[0] == 3


def test_a_client_that_stalled_is_said_in_words_to_have_failed_to_do_something(port):
    """And not in those of the protocol, which a user does not know."""
    server, clients = under_way(port, server_args=["--stall-timeout", 1])
    os.kill(clients[0].pid, signal.SIGSTOP)
    server.wait_stderr("stalled")
    said = line_with("stalled", server.stderr).partition("stalled")[2]
    assert not re.search("READY|DONE|REQUEST|SENT", said), said
    assert re.search("for 1 s no [a-z]+ .*[a-z]+", said), said


@BOTH
def test_whatever_it_was_that_a_client_failed_to_do_is_said_in_other_words(port, python):
    """To be ready for a round, to say what it received of it, to say that it has everything."""
    server = helpers.start_server(["--stall-timeout", 1, LOOPBACK, 3, port], python=python, stdin=b"data")
    not_ready, no_answer, no_end = [wire.Client(port).greet() for _ in range(3)]
    not_ready.announced()
    for client in (no_answer, no_end):
        client.ready()
    reasons = [not_ready.reason()]
    for client in (no_answer, no_end):
        client.sent()
    no_end.ask([0])
    reasons.append(no_answer.reason())
    no_end.expect(PACKETS)
    no_end.packets([0])
    no_end.done()
    assert no_end.expect(BYE).fields["ok"] is True
    reasons.append(no_end.reason())
    for client in (not_ready, no_answer, no_end):
        client.close()
    stderr = server.finish(20)[1]
    assert len(set(reasons)) == 3, reasons
    for reason in reasons:
        assert "stalled" in reason and not re.search("[A-Z]{3}|nothing came", reason), reason
        assert reason in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# One and many

def test_one_client_and_one_packet_are_no_plural(port):
    server = helpers.start_server([LOOPBACK, 1, port], NEWEST, stdin=b"x")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], NEWEST)
    of_client, of_server = client.finish(20)[1], server.finish(20)[1]
    assert "waiting for 1 client\n" in of_server
    assert "data: 1 packet in 1 round, 1 byte in " in of_server
    assert "repair: 0 packets by multicast, 0 packets by TCP" in of_server
    assert "1 of 1 client has the image" in of_server
    assert "client: 1 byte in " in of_client and "repaired 0 packets by multicast" in of_client


def test_what_nobody_has_answered_for_is_not_said_to_be_brought(port):
    server = helpers.start_server([LOOPBACK, 1, port], NEWEST, stdin=IMAGE)
    client = wire.Client(port).greet()
    client.announced()
    client.close()
    assert " 0 bytes in " in line_with("data: ", server.finish(20)[1])


def test_two_clients_and_one_repaired_packet(port):
    """The first packet is lost on the way to one of the two."""
    lost = []

    def lose_one(datagram):
        lost.append(datagram)
        return [] if len(lost) == 1 else [datagram]

    server = helpers.start_server([LOOPBACK, 2, port], stdin=IMAGE[:50000])
    path = helpers.Network(port).path(lose_one)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, to]) for to in (port, path)]
    for client in clients:
        assert client.finish(20)[0] == 0, client.stderr
    stderr = server.finish(20)[1]
    assert "waiting for 2 clients" in stderr
    assert "repair: 0 packets by multicast, 1 packet by TCP" in stderr
    assert "2 of 2 clients have the image" in stderr


def test_one_round_is_no_plural(port):
    """All that there was before the only client went away: the producer has not made the second one yet."""
    server = helpers.start_server([LOOPBACK, 1, port], stdin=helpers.PIPE)
    server.popen.stdin.write(IMAGE[:100 * helpers.payload_size()])     # the first round has 64 packets
    client = helpers.start_client([LOOPBACK, LOOPBACK, port])
    server.wait_stderr("is here")
    client.signal(signal.SIGTERM)
    stderr = server.finish(20)[1]
    assert " in 1 round, " in stderr, stderr
