"""The client's parts by themselves: what it does in a round, and the thread that verifies and writes."""

import hashlib

import pytest

import helpers
import kmcast

PAYLOAD, SALT = 100, 77
DATA = helpers.random_bytes(20 * PAYLOAD + 30)
DIGEST = hashlib.sha256(DATA).digest()


def server_buffer(data=DATA, base=5):
    """A round as the server has it."""
    buffer = kmcast.Buffer(PAYLOAD, 100, SALT)
    buffer.start(base, 0, 0)
    for start in range(0, len(data), PAYLOAD):
        buffer.add(data[start:start + PAYLOAD])
    return buffer


def put(window, buffer, places):
    """The packets at these places arrive by multicast."""
    for place in places:
        data = buffer.get(buffer.base + place).tobytes()
        window.listening.put(bytearray(data), 0, 1, len(data) - kmcast.PACKET.size)
    window.listened(2.0)


@pytest.fixture
def window():
    return kmcast.ClientWindow(kmcast.SessionDialect, PAYLOAD, (SALT, 0), digest=True)


ROUND = server_buffer()
INFO = kmcast.BUFFER_INFO + ROUND.info(0)


def begin(window):
    assert window.heard(INFO, 1.0) == [("begin", None), ("send", kmcast.READY)]
    return window


def test_a_round_that_arrives_whole_is_done_and_handed_over_with_the_next_ready(window):
    put(begin(window), ROUND, range(ROUND.count))
    assert window.heard(kmcast.SENT + DIGEST, 3.0) == []
    assert window.tick(3.0) == [("send", kmcast.DONE)]
    following = server_buffer(base=5 + ROUND.count)
    (_, ready), (verb, (buffer, size, digest)) = window.heard(kmcast.BUFFER_INFO + following.info(1), 3.001)
    assert (ready, verb, size, digest) == (kmcast.READY, "write", len(DATA), DIGEST)
    assert bytes(buffer.flush().tobytes()) == DATA


def test_where_the_server_takes_its_time_it_is_handed_over_all_the_same(window):
    put(begin(window), ROUND, range(ROUND.count))
    window.heard(kmcast.SENT + DIGEST, 3.0)
    window.tick(3.0)
    assert window.tick(3.001) == []
    assert [verb for verb, _ in window.tick(window.deadline)] == ["write"]


def test_stragglers_are_waited_for_a_moment_and_then_asked_for(window):
    put(begin(window), ROUND, [place for place in range(ROUND.count - 2) if place != 3])
    window.heard(kmcast.SENT + DIGEST, 3.0)
    assert window.tick(3.0) == []
    put(window, ROUND, [ROUND.count - 2])
    assert window.tick(2.0 + window.SETTLE / 2) == []
    (verb, request), = window.tick(3.0 + 2 * window.SETTLE)
    assert (verb, request[:1]) == ("send", kmcast.REQUEST)
    assert request[1:] == b"".join(kmcast.U32.pack(number) for number in (2, 5 + 3, 5 + ROUND.count - 1))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_packets_by_tcp_fill_what_is_missing_however_they_arrive(window, step):
    lost = [0, 1, 2, 7, ROUND.count - 1]
    put(begin(window), ROUND, [place for place in range(ROUND.count) if place not in lost])
    window.heard(kmcast.SENT + DIGEST, 3.0)
    window.tick(4.0)
    assert window.heard(kmcast.PACKETS, 4.0) == [] and window.size_of(b"any") == 0
    wire, todo = b"".join(ROUND.get(5 + place).tobytes() for place in lost), []
    while wire:
        size = min(step, len(wire), len(window.wants))
        window.wants[:size] = wire[:size]
        wire, todo = wire[size:], window.filled(size, 5.0)
    assert todo == [("send", kmcast.DONE)] and window.wants is None
    assert window.by_tcp == 5


def test_other_packets_than_those_asked_for_are_an_error(window):
    put(begin(window), ROUND, range(1, ROUND.count))
    window.heard(kmcast.SENT + DIGEST, 3.0)
    window.tick(4.0)
    window.heard(kmcast.PACKETS, 4.0)
    wrong = ROUND.get(5 + 1).tobytes()
    window.wants[:] = wrong
    with pytest.raises(kmcast.ProtocolError):
        window.filled(len(wrong), 5.0)


def test_no_more_rounds_are_taken_than_can_be_written(window):
    base, ready = 5, []
    for number in range(window.AT_WORK + 1):
        buffer = server_buffer(base=base)
        ready.append(("send", kmcast.READY) in window.heard(kmcast.BUFFER_INFO + buffer.info(number), 1.0))
        if ready[-1]:
            put(window, buffer, range(buffer.count))
            window.heard(kmcast.SENT + DIGEST, 1.0)
            window.tick(1.0)
        base += buffer.count
    assert ready == [True] * window.AT_WORK + [False] and window.owing
    assert ("send", kmcast.READY) in window.written() and not window.owing


def test_the_image_ends_with_a_round_of_nothing_and_a_word(window):
    assert window.heard(kmcast.BUFFER_INFO + server_buffer(b"").info(0), 1.0) == [("send", kmcast.READY)]
    window.heard(kmcast.SENT + DIGEST, 1.0)
    assert window.heard(kmcast.pack_frame(kmcast.BYE, {"ok": True, "bytes": 0}), 1.0) == [("end", {"ok": True, "bytes": 0})]
    assert window.state == window.OVER


@pytest.mark.parametrize("message", [
    kmcast.SENT + DIGEST, kmcast.PACKETS, kmcast.AGAIN + bytes(bytearray(12)), kmcast.WELCOME + kmcast.U32.pack(0),
    kmcast.pack_frame(kmcast.BYE, {"ok": True}), kmcast.BUFFER_INFO + kmcast.ROUND.pack(0, 2000, 0, 10),
    kmcast.BUFFER_INFO + kmcast.ROUND.pack(0, 100, 0, 70000)], ids=lambda message: repr(message[:1]))
def test_what_is_out_of_turn_or_impossible_is_an_error(window, message):
    with pytest.raises(kmcast.ProtocolError):
        window.heard(message, 1.0)


def test_a_farewell_gives_its_reason(window):
    with pytest.raises(kmcast.Refused) as error:
        window.heard(kmcast.pack_frame(kmcast.BYE, {"ok": False, "reason": "no client is left\x1b"}), 1.0)
    assert error.value.reason == "the server says: no client is left?"


def test_without_a_session_there_are_no_signs_of_life_and_no_signal_before_a_round():
    window = kmcast.ClientWindow(kmcast.BaseDialect, PAYLOAD, checks=[kmcast.plain_crc, kmcast.c_sum])
    assert window.size_of(b"") == 16
    assert ("send", kmcast.READY) in window.heard(kmcast.ROUND.pack(7, 150, 3, 2), 1.0)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(kmcast.ALIVE, 1.0)


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
