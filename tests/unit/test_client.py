"""The client's parts by themselves: its connection, and the thread that verifies and writes."""

import hashlib
import socket
import threading

import pytest

import kmcast


@pytest.fixture
def ends():
    """A Connection and the server's socket."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    connection = kmcast.Connection(0.3)
    connection.connect(*listener.getsockname(), seconds=5)
    theirs, _ = listener.accept()
    listener.close()
    connection.session = True
    yield connection, theirs
    connection.sock.close()
    theirs.close()


def test_exactly_what_is_asked_for_is_read_however_it_arrives(ends):
    connection, server = ends
    late = threading.Timer(0.1, server.sendall, [b"second"])
    server.sendall(b"first ")
    late.start()
    assert connection.read(12) == b"first second"


def test_signs_of_life_are_passed_over(ends):
    connection, server = ends
    server.sendall(3 * kmcast.ALIVE + kmcast.SENT)
    assert connection.signal(kmcast.SENT) == kmcast.SENT


def test_a_signal_that_is_not_expected_is_an_error(ends):
    connection, server = ends
    server.sendall(kmcast.WELCOME)
    with pytest.raises(kmcast.ProtocolError):
        connection.signal(kmcast.SENT)


def test_without_a_session_there_are_no_signs_of_life(ends):
    connection, server = ends
    connection.session = False
    server.sendall(kmcast.ALIVE + kmcast.SENT)
    with pytest.raises(kmcast.ProtocolError):
        connection.signal(kmcast.SENT)


def test_a_farewell_gives_its_reason(ends):
    connection, server = ends
    server.sendall(kmcast.pack_frame(kmcast.BYE, {"ok": False, "reason": "no client is left\x1b"}))
    with pytest.raises(kmcast.Refused) as error:
        connection.signal(kmcast.SENT)
    assert error.value.reason == "the server says: no client is left?"


def test_a_server_that_is_silent_or_gone_is_lost(ends):
    connection, server = ends
    for _ in ("silent", "gone"):
        with pytest.raises(kmcast.Lost):
            connection.read(1)
        server.close()


def test_a_frame_that_is_too_long_is_not_read(ends):
    connection, server = ends
    server.sendall(kmcast.U32.pack(kmcast.MAX_FRAME + 1))
    with pytest.raises(kmcast.ProtocolError):
        connection.frame()


# ---------------------------------------------------------------------------------------------------------------------
# Writer

class Kept(object):
    """A Sink that keeps what it gets."""

    def __init__(self):
        self.data, self.committed = b"", False

    def write(self, data):
        self.data += data.tobytes()

    def commit(self):
        self.committed = True


def round_of(data):
    """A complete Buffer with these bytes."""
    buffer = kmcast.Buffer(100, -(-len(data) // 100))
    buffer.start(0, 0, 0)
    for start in range(0, len(data), 100):
        buffer.add(data[start:start + 100])
    return buffer


@pytest.fixture
def writer():
    thread = kmcast.Writer(Kept(), digest=True)
    thread.start()
    yield thread
    thread.link.close()
    thread.join(5)
    assert not thread.is_alive()


def test_rounds_are_written_in_order_and_then_made_final(writer):
    digest = hashlib.sha256()
    for data in (b"a" * 250, b"b" * 1000):
        digest.update(data)
        writer.give(round_of(data), len(data), digest.digest())
    writer.commit()
    for _ in range(2):
        writer.link.wait_child()
    writer.join(5)
    assert writer.sink.data == b"a" * 250 + b"b" * 1000 and writer.sink.committed
    assert writer.bytes == 1250


@pytest.mark.parametrize("size, hashed, reason", [
    (250, b"a" * 249, "nothing of this round was written"), (249, b"a" * 250, "a round of 250 bytes instead of 249")],
    ids=["another digest", "another size"])
def test_a_round_that_is_not_what_the_server_says_is_not_written(writer, size, hashed, reason):
    writer.give(round_of(b"a" * 250), size, hashlib.sha256(hashed).digest())
    with pytest.raises(kmcast.LinkClosed):
        writer.link.wait_child()
    assert writer.sink.data == b"" and not writer.sink.committed
    assert reason in writer.failure.reason
