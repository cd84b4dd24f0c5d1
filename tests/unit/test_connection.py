"""One end of a TCP connection: what arrives is taken apart, what cannot be sent waits."""

import json
import socket

import pytest

import kmcast


@pytest.fixture
def connection():
    """A Connection, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield kmcast.Connection(ours, "192.0.2.7"), theirs
    ours.close()
    theirs.close()


def frame(kind, fields):
    text = json.dumps(fields).encode("ascii")
    return kind + kmcast.U32.pack(len(text)) + text


HELLO = frame(kmcast.HELLO, {"version": "1.0.0", "host": "node7"})
WIRE = kmcast.SessionDialect
REQUEST = WIRE.request(3, (0, 0, 0, 0, 0), 1 << 5 | 1 << 9, 0, 10)
READY, DONE = WIRE.ready(3), WIRE.done(3, (9, 1, 2, 3, 4))
MESSAGES = [READY, REQUEST, kmcast.ALIVE, HELLO, DONE]


def ten(number):
    """What a ServerWindow says of a round."""
    if number != 3:
        raise kmcast.ProtocolError("no such round")
    return 10


def size_of(head):
    return kmcast.SessionDialect.client_message_size(head, ten)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_messages_are_told_apart_however_they_arrive(connection, size):
    peer, other = connection
    said, received = b"".join(MESSAGES), []
    for start in range(0, len(said), size):
        other.sendall(said[start:start + size])
        received += list(peer.messages(size_of))
    assert received == MESSAGES


def test_what_follows_the_first_message_stays_for_whoever_comes_next(connection):
    peer, other = connection
    other.sendall(b"".join(MESSAGES))
    assert [peer.first(size_of) for _ in MESSAGES] == MESSAGES
    assert peer.first(size_of) is None


def test_bytes_that_are_no_message_are_read_to_their_place(connection):
    peer, other = connection
    other.sendall(DONE + b"0123456789")
    raw = []
    assert list(peer.messages(lambda head: 0 if raw else raw.append(1) or len(DONE))) == [DONE]
    data = bytearray(12)
    assert peer.read_into(memoryview(data)[:4]) == 4 and peer.read_into(memoryview(data)[4:]) == 6
    assert peer.read_into(memoryview(data)) == 0
    other.sendall(b"ab")
    assert peer.read_into(memoryview(data)[10:]) == 2 and bytes(data) == b"0123456789ab"


def test_a_request_for_a_round_that_there_is_not_is_refused_before_it_is_read(connection):
    peer, other = connection
    other.sendall(kmcast.REQUEST + kmcast.U32.pack(4))
    with pytest.raises(kmcast.ProtocolError):
        list(peer.messages(size_of))


def test_a_connection_that_ends_is_noticed(connection):
    peer, other = connection
    assert list(peer.messages(size_of)) == []
    other.close()
    with pytest.raises(kmcast.Gone):
        list(peer.messages(size_of))


def test_what_was_said_before_the_end_is_heard_even_if_it_had_to_wait(connection):
    peer, other = connection
    other.sendall(READY + DONE)
    other.close()
    waits = []
    assert list(peer.messages(lambda head: 0 if waits else waits.append(1) or len(READY))) == [READY]
    assert list(peer.messages(lambda head: 0)) == []
    assert list(peer.messages(size_of)) == [DONE]
    with pytest.raises(kmcast.Gone):
        list(peer.messages(size_of))


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


def test_life_is_shown_when_the_other_has_heard_nothing_for_a_while(connection):
    peer, other = connection
    other.setblocking(False)
    peer.show_life(kmcast.ALIVE)
    with pytest.raises(socket.error):
        other.recv(1)
    peer.alive_every = 0.0
    peer.show_life(kmcast.ALIVE)
    assert other.recv(10) == kmcast.ALIVE


def test_a_last_word_gets_through_before_the_end(connection):
    peer, other = connection
    peer.leave(b"word")
    assert other.recv(10) == b"word" and other.recv(10) == b""
