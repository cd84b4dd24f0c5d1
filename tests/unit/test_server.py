"""The server's parts by themselves: what a peer says is taken apart, how much is logged, what is repaired how."""

import collections
import json
import logging
import socket

import pytest

import kmcast


@pytest.fixture
def connection():
    """A Peer of which nothing is expected, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield kmcast.Peer(ours, "192.0.2.7"), theirs
    ours.close()
    theirs.close()


def frame(kind, fields):
    text = json.dumps(fields).encode("ascii")
    return kind + kmcast.U32.pack(len(text)) + text


HELLO = frame(kmcast.HELLO, {"version": "1.0.0", "host": "node7"})
REQUEST = kmcast.REQUEST + kmcast.U32.pack(2) + kmcast.U32.pack(5) + kmcast.U32.pack(9)
MESSAGES = [kmcast.READY, REQUEST, kmcast.ALIVE, HELLO, kmcast.DONE]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_messages_are_told_apart_however_they_arrive(connection, size):
    peer, other = connection
    said, received = b"".join(MESSAGES), []
    for start in range(0, len(said), size):
        other.sendall(said[start:start + size])
        received += list(peer.receive(10))
    assert received == MESSAGES


def test_a_request_for_more_than_the_round_is_refused_before_it_is_read(connection):
    peer, other = connection
    other.sendall(kmcast.REQUEST + kmcast.U32.pack(11))
    with pytest.raises(kmcast.ProtocolError):
        list(peer.receive(10))


def test_who_owes_a_greeting_may_say_nothing_else(connection):
    peer, other = connection
    peer.owe(kmcast.GREETING)
    other.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(kmcast.ProtocolError):
        list(peer.receive(10))


def test_a_connection_that_ends_is_noticed(connection):
    peer, other = connection
    assert list(peer.receive(10)) == []
    other.close()
    with pytest.raises(kmcast.Gone):
        list(peer.receive(10))


def test_what_a_socket_does_not_take_stays_queued_in_order(connection):
    peer, other = connection
    pieces = [bytes(bytearray([number])) * 100000 for number in range(20)]
    for piece in pieces:
        peer.outgoing.put_tail(piece)
    received = b""
    while len(received) < 2000000:
        peer.flush()
        received += other.recv(50000)
    assert received == b"".join(pieces) and not peer.outgoing.count


def test_a_log_that_is_flooded_says_how_much_it_hid():
    few = kmcast.AtMost(3)
    records = [logging.LogRecord("x", logging.INFO, "", 0, "line %d" % number, (), None) for number in range(10)]
    assert [few.filter(record) for record in records] == [True] * 3 + [False] * 7
    few._since -= few.PERIOD
    record = logging.LogRecord("x", logging.INFO, "", 0, "another", (), None)
    assert few.filter(record) and record.getMessage() == "(7 more like these) another"


# ---------------------------------------------------------------------------------------------------------------------
# What is repaired by multicast

def plan(answers, count=1000, compat=False, multicasting=True):
    """Multicaster._plan() for clients that asked for these places of a round."""
    buffer = kmcast.Buffer(1460, count)
    buffer.start(0, count, count * 1460)
    multicaster = kmcast.Multicaster.__new__(kmcast.Multicaster)       # without sockets
    multicaster.session = collections.namedtuple("Session", "compat")(compat)
    multicaster.multicasting = multicasting
    return multicaster._plan(buffer, answers)


def test_different_losses_of_many_are_repaired_together():
    answers = dict((client, list(range(client, 1000, 50))) for client in range(10))
    groups, peers = plan(answers)
    assert len(groups) == 20 and sorted(peers) == list(range(10))
    for group in groups:
        assert len(group) == 10


@pytest.mark.parametrize("answers", [
    {}, {"a": [1, 2, 3]}, {"a": list(range(200))}, {"a": [1], "b": [2]}],
    ids=["nothing", "little", "one client", "one packet each"])
def test_few_packets_or_one_client_are_repaired_by_tcp(answers):
    assert plan(answers) == ([], ())


def test_who_lost_most_of_a_round_gets_it_by_tcp():
    answers = {"deaf": list(range(1000)), "a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}
    _, peers = plan(answers)
    assert sorted(peers) == ["a", "b"]


@pytest.mark.parametrize("options", [{"compat": True}, {"multicasting": False}])
def test_without_a_session_or_multicast_all_is_repaired_by_tcp(options):
    assert plan({"a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}, **options) == ([], ())
