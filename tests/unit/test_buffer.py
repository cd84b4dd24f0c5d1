"""Buffer: what goes in comes out, however it comes, and what is wrong does not get in."""

import functools
import os
import random
import struct
import zlib

import pytest

import helpers
import kmcast
import wire

PAYLOAD = 40
SALT = 0xfffffff0

#: As Buffer takes them: each packet has a checksum, or a digest covers the round.
CRC, DIGEST = (zlib.crc32,), ()
both_modes = pytest.mark.parametrize("checks", [CRC, DIGEST], ids=["checksums", "digest"])


class Pipe(object):
    """A kmcast.Source that reads from a pipe, of which the test has the other end."""

    def __init__(self):
        reading, self.writing = os.pipe()
        self.source = kmcast.Source("/dev/fd/%d" % reading, digest=False)
        os.close(reading)

    def write(self, data):
        os.write(self.writing, data)

    def end(self):
        """No more data."""
        if self.writing is not None:
            os.close(self.writing)
            self.writing = None

    def close(self):
        self.end()
        self.source.close()


@pytest.fixture
def pipe():
    pipe = Pipe()
    yield pipe
    pipe.close()


def packets_of(buffer):
    """The packets of a server's buffer as they go on the wire, a list of bytes."""
    return [buffer.get(buffer.base + index).tobytes() for index in range(buffer.count)]


def packet(seq, payload, salt=SALT, check=None, checks=CRC):
    """A packet as kmcast-protocol(7) has it; checks: CRC or DIGEST."""
    if check is None:
        check = (lambda payload, number: zlib.crc32(payload, number % 2**32)) if checks else lambda _, number: number
    return struct.pack("<3I", seq % 2**32, check(payload, salt + seq) & 0xffffffff, len(payload)) + payload


def cut(data, size=PAYLOAD):
    """Data in pieces of `size` bytes."""
    return [data[start:start + size] for start in range(0, len(data), size)]


def round_of(data, base=0, capacity=None, any_size=False, checks=CRC, pieces=None):
    """(a client's buffer for a round of `data`, the packets of that round as bytes)."""
    pieces = cut(data) if pieces is None else pieces
    buffer = kmcast.Buffer(PAYLOAD, capacity or max(1, len(pieces)), SALT, checks)
    buffer.start(base, len(pieces), None if any_size else len(data))
    return buffer, [packet(base + index, piece, checks=checks) for index, piece in enumerate(pieces)]


def missing(buffer):
    """The places of what has not come, ascending."""
    return kmcast.places(buffer.missing())


def put(buffer, *packets):
    """Put packets that lie back to back."""
    assert len(set(map(len, packets))) == 1
    data = bytearray(b"garbage" + b"".join(packets) + b"garbage")
    buffer.put(data, 7, len(packets), len(packets[0]) - 12)


# ---------------------------------------------------------------------------------------------------------------------
# Filling

@pytest.mark.parametrize("size", [0, 1, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, 3 * PAYLOAD, 10 * PAYLOAD - 1, 127 * PAYLOAD,
                                  128 * PAYLOAD, 128 * PAYLOAD + 1, 300 * PAYLOAD + 7])
@pytest.mark.parametrize("chunk", [7, PAYLOAD, PAYLOAD + 1, 5 * PAYLOAD - 1, 10**6])
@both_modes
def test_fill_makes_full_packets_of_whatever_it_reads(pipe, size, chunk, checks):
    data = helpers.random_bytes(size, seed=size)
    buffer = kmcast.Buffer(PAYLOAD, 1000, SALT, checks)
    buffer.start(5, 0, 0)
    for piece in cut(data, chunk):
        pipe.write(piece)
        buffer.fill(pipe.source)
        assert not buffer.full
    pipe.end()
    while not buffer.full:
        buffer.fill(pipe.source)
    assert buffer.ended
    assert packets_of(buffer) == [packet(5 + index, piece, checks=checks) for index, piece in enumerate(cut(data))]
    assert (buffer.count, buffer.size) == (-(-size // PAYLOAD), size)
    assert helpers.data_of(buffer) == data


@pytest.mark.parametrize("capacity", [1, 2, 10, 127, 128, 129, 200])
def test_fill_stops_at_the_capacity_and_the_next_buffer_goes_on(pipe, capacity):
    data = helpers.random_bytes(500 * PAYLOAD + 3)
    pipe.write(data)
    pipe.end()
    first, seen, base = kmcast.Buffer(PAYLOAD, capacity, SALT), [], 0
    while True:
        first.start(base, 0, 0)
        while not first.full:
            first.fill(pipe.source)
        assert first.count <= capacity
        if not first.count:
            break
        seen += packets_of(first)
        base += first.count
    assert seen == [packet(index, piece) for index, piece in enumerate(cut(data))]


def test_fill_stops_at_a_limit_below_the_capacity(pipe):
    pipe.write(b"x" * (20 * PAYLOAD))
    buffer = kmcast.Buffer(PAYLOAD, 100, SALT)
    buffer.start(0, 0, 0)
    buffer.limit = 7
    while not buffer.full:
        buffer.fill(pipe.source)
    assert buffer.count == 7 and not buffer.ended


def test_a_round_that_takes_many_reads_is_hashed_once_and_as_a_whole():
    """By whom it was read from; nothing of it moves afterwards."""
    data, hashed = helpers.random_bytes(3 * kmcast.Buffer.READ + 77), []

    class Endless(object):
        """A source that gives what is asked for, as far as it goes."""
        place = 0

        def read_into(self, view):
            got = min(len(view), len(data) - self.place)
            view[:got] = data[self.place:self.place + got]
            self.place += got
            return got

        def hash(self, view):
            hashed.append(view)
    buffer, source = kmcast.Buffer(1460, 5000, SALT, DIGEST), Endless()
    buffer.start(0, 0, 0)
    while not buffer.full:
        assert hashed == []
        buffer.fill(source)
    assert [view.tobytes() == data for view in hashed] == [True]
    assert helpers.data_of(buffer) == data and buffer.view(0, buffer.count).tobytes() == data


@both_modes
def test_seqs_wrap_while_filling(pipe, checks):
    data, base = helpers.random_bytes(200 * PAYLOAD), 2**32 - 60
    pipe.write(data)
    pipe.end()
    buffer = kmcast.Buffer(PAYLOAD, 200, SALT, checks)
    buffer.start(base, 0, 0)
    while not buffer.full:
        buffer.fill(pipe.source)
    assert packets_of(buffer) == [packet((base + index) % 2**32, piece, checks=checks) for index, piece in enumerate(cut(data))]


@both_modes
def test_get_and_packets_agree(checks):
    """Adjacent packets are one slice, but none goes on behind a short packet."""
    buffer = kmcast.Buffer(PAYLOAD, 10, SALT, checks)
    buffer.start(2**32 - 2, 0, 0)
    pieces = [b"a" * PAYLOAD, b"b" * 3, b"c" * PAYLOAD, b"d" * PAYLOAD, b"e"]
    for piece in pieces:
        buffer.add(piece)
    packets = [packet(2**32 - 2 + index, piece, checks=checks) for index, piece in enumerate(pieces)]
    assert packets_of(buffer) == [buffer.packet(index) for index in range(5)] == packets
    assert [buffer.view(index, index + 1).tobytes() for index in range(5)] == pieces
    for first in range(5):
        for last in range(first + 1, 6):
            slices = [view.tobytes() for view in buffer.packets(first, last)]
            assert b"".join(slices) == b"".join(packets[first:last])
            assert len(slices) == 1 + len([index for index in (1,) if first <= index < last - 1])


@both_modes
def test_the_sums_of_a_round_are_the_crc_32_of_each_payload(checks):
    """Whatever its salt; and of the round that it is, not of the one before."""
    buffer = kmcast.Buffer(PAYLOAD, 10, SALT, checks)
    for size in (10 * PAYLOAD, 3 * PAYLOAD + 1):
        buffer.start(7, 0, 0)
        pieces = cut(helpers.random_bytes(size, seed=size))
        for piece in pieces:
            buffer.add(piece)
        assert buffer.sums() == wire.sums_of(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Putting

ORDERS = {
    "in order": lambda packets: packets,
    "reversed": lambda packets: packets[::-1],
    "shuffled": lambda packets: random.Random(1).sample(packets, len(packets)),
    "doubled": lambda packets: [each for each in packets for _ in (0, 1)],
    "twice": lambda packets: packets + packets,
    "rotated": lambda packets: packets[40:] + packets[:40],
}


@pytest.mark.parametrize("batch", [1, 2, 5, 44, 128])
@pytest.mark.parametrize("base", [0, 1000, 2**32 - 50, 2**32 - 1])
@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("rest", [0, 13])
@both_modes
def test_packets_may_come_in_any_order(order, base, batch, rest, checks):
    data = helpers.random_bytes(100 * PAYLOAD + rest, seed=batch)
    buffer, packets = round_of(data, base, checks=checks)
    full, short = packets[:100], packets[100:]
    full = ORDERS[order](full)
    for start in range(0, len(full), batch):
        assert not buffer.complete or order in ("doubled", "twice")
        put(buffer, *full[start:start + batch])
    for each in short:
        assert missing(buffer) == [100]
        put(buffer, each)
        put(buffer, each)
    assert buffer.complete and missing(buffer) == []
    assert buffer.received == len(packets) and buffer.damaged == 0
    assert helpers.data_of(buffer) == data


def test_missing_is_what_has_not_come():
    buffer, packets = round_of(helpers.random_bytes(50 * PAYLOAD), 7)
    assert missing(buffer) == list(range(50))
    for index in (3, 4, 49):
        put(buffer, packets[index])
    assert missing(buffer) == [index for index in range(50) if index not in (3, 4, 49)]
    assert [buffer.has(index) for index in (2, 3, 49)] == [False, True, True]
    assert buffer.received == 3


@both_modes
def test_behind_a_packet_that_is_there_already_others_may_be_new(checks):
    """Though those that would stand behind it are there as well."""
    data = helpers.random_bytes(30 * PAYLOAD)
    buffer, packets = round_of(data, checks=checks)
    put(buffer, *packets[:10])
    put(buffer, packets[2], packets[20], packets[3], packets[21])
    assert missing(buffer) == [place for place in range(10, 30) if place not in (20, 21)]
    assert buffer.damaged == 0


@both_modes
def test_a_batch_with_gaps_and_packets_that_are_there_already(checks):
    data = helpers.random_bytes(30 * PAYLOAD)
    buffer, packets = round_of(data, 2**32 - 5, checks=checks)
    put(buffer, *packets[4:8])
    put(buffer, *(packets[2:6] + packets[7:10]))
    put(buffer, *(packets[:15] + packets[20:]))
    assert missing(buffer) == [15, 16, 17, 18, 19]
    put(buffer, *packets)
    assert buffer.complete and helpers.data_of(buffer) == data and buffer.received == 30


#: Each with a function like packet(), and the payload of packet 103.
WRONG = {
    "outside, before": lambda packet, piece: packet(99, piece),
    "outside, behind": lambda packet, piece: packet(110, piece),
    "outside, far": lambda packet, piece: packet(100 + 2**31, piece),
    "a wrong checksum": lambda packet, piece: packet(103, piece)[:4] + b"\x12\x34\x56\x78" + packet(103, piece)[8:],
    "another salt": lambda packet, piece: packet(103, piece, salt=SALT + 1),
    "a damaged payload": lambda packet, piece: packet(103, piece)[:-1] + b"\xff",
    "a seq that was changed": lambda packet, piece: struct.pack("<I", 104) + packet(103, piece)[4:],
    "a data_size that is too small": lambda packet, piece: packet(103, piece)[:8] + struct.pack("<I", PAYLOAD - 1) + packet(103, piece)[12:],
    "a data_size that is too large": lambda packet, piece: packet(103, piece)[:8] + struct.pack("<I", 2**32 - 1) + packet(103, piece)[12:],
    "too short for its place": lambda packet, piece: packet(103, piece[:-1]),
    "too long": lambda packet, piece: packet(103, piece + b"x"),
    "no payload": lambda packet, piece: packet(103, b""),
    "too long for the last": lambda packet, piece: packet(109, piece),
    "too short for the last": lambda packet, piece: packet(109, piece[:12]),
}


@pytest.mark.parametrize("name, checks", [(name, checks) for name in sorted(WRONG) for checks in (CRC, DIGEST)
                                          if checks or name != "a damaged payload"])
@pytest.mark.parametrize("among_good_ones", [False, True])
def test_what_is_wrong_does_not_get_in(name, checks, among_good_ones):
    """Where a digest covers the round it tells what only a look at the payload gives away; see below."""
    data = helpers.random_bytes(9 * PAYLOAD + 13, seed=2)
    buffer, packets = round_of(data, 100, checks=checks)
    wrong = WRONG[name](functools.partial(packet, checks=checks), data[3 * PAYLOAD:4 * PAYLOAD])
    if among_good_ones and len(wrong) == len(packets[0]):
        put(buffer, packets[1], wrong, packets[2])
        assert missing(buffer) == [0, 3, 4, 5, 6, 7, 8, 9]
    else:
        put(buffer, wrong)
        assert missing(buffer) == list(range(10))
    for each in packets:
        put(buffer, each)
    assert helpers.data_of(buffer) == data


@pytest.mark.parametrize("wrong", ["a wrong checksum", "another salt", "too short for its place"])
@both_modes
def test_what_is_wrong_and_belongs_here_is_counted_as_damaged(checks, wrong):
    data = helpers.random_bytes(9 * PAYLOAD + 13, seed=2)
    buffer, packets = round_of(data, 100, checks=checks)
    put(buffer, WRONG[wrong](functools.partial(packet, checks=checks), data[3 * PAYLOAD:4 * PAYLOAD]))
    put(buffer, packet(110, b"x" * PAYLOAD, checks=checks))         # that belongs elsewhere
    put(buffer, *packets[:9])
    put(buffer, packet(103, b"x" * PAYLOAD, checks=CRC))            # and that is there already
    assert buffer.damaged == 1


@both_modes
def test_a_packet_that_came_is_not_overwritten_by_a_bad_one(checks):
    data = helpers.random_bytes(3 * PAYLOAD)
    buffer, packets = round_of(data, checks=checks)
    put(buffer, *packets)
    put(buffer, packet(1, b"y" * PAYLOAD, checks=checks))   # good, but late and different
    put(buffer, packets[1][:-1] + b"\xff")
    assert helpers.data_of(buffer) == data


@both_modes
def test_a_buffer_serves_one_round_after_another(checks):
    buffer = kmcast.Buffer(PAYLOAD, 20, SALT, checks)
    base = 2**32 - 30
    for size in (20 * PAYLOAD, 3 * PAYLOAD + 1, 1, 20 * PAYLOAD, 7 * PAYLOAD):
        data = helpers.random_bytes(size, seed=size)
        pieces = cut(data)
        buffer.start(base, len(pieces), size)
        late = packet(base - 1, b"z" * PAYLOAD, checks=checks)
        for index, piece in reversed(list(enumerate(pieces))):
            put(buffer, late)
            put(buffer, packet(base + index, piece, checks=checks))
        assert buffer.complete and helpers.data_of(buffer) == data
        base = (base + len(pieces)) % 2**32


# ---------------------------------------------------------------------------------------------------------------------
# Where a digest covers the round

def covered():
    """(a client's buffer of a round that a digest covers, the packets of that round, its bytes)."""
    data = helpers.random_bytes(9 * PAYLOAD + 13, seed=5)
    buffer, packets = round_of(data, 2**32 - 5, capacity=12, checks=DIGEST)
    return buffer, packets, data


@pytest.mark.parametrize("damaged", [[], [0], [9], [3, 4, 9], list(range(10))], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_damaged_packets_are_taken_and_differ_from_the_servers_sums(damaged, batch):
    buffer, packets, data = covered()
    sums = wire.sums_of(cut(data))
    sent = [one[:-1] + bytes(bytearray([bytearray(one)[-1] ^ 1])) if place in damaged else one
            for place, one in enumerate(packets)]
    for start in range(0, 9, batch):
        put(buffer, *sent[start:min(9, start + batch)])
    put(buffer, sent[9])
    assert buffer.complete and buffer.damaged == 0
    assert wire.places(buffer.differing(sums)) == damaged
    buffer.forget(wire.bits(damaged))
    assert missing(buffer) == damaged
    for place in damaged:
        put(buffer, packets[place])
    assert buffer.complete and helpers.data_of(buffer) == data and not buffer.differing(sums)


def test_a_damaged_payload_is_all_that_gets_in():
    data = helpers.random_bytes(9 * PAYLOAD + 13, seed=2)
    buffer, packets = round_of(data, 100, checks=DIGEST)
    put(buffer, packets[3][:-1] + b"\xff")
    for each in packets:
        put(buffer, each)
    assert buffer.complete and wire.places(buffer.differing(wire.sums_of(cut(data)))) == [3]


def in_place(buffer, headers, first, packets, size=None):
    """Write packets where the kernel would put them if they were those from index `first` on; whether they are."""
    for index, one in enumerate(packets, first):
        headers[12 * index:12 * index + 12] = one[:12]
        buffer.payloads[PAYLOAD * index:PAYLOAD * index + len(one) - 12] = one[12:]
    return buffer.in_place(headers, first, len(packets), sum(map(len, packets)) if size is None else size)


@pytest.mark.parametrize("first, last", [(0, 1), (0, 10), (3, 7), (8, 10), (9, 10)])
def test_packets_that_the_kernel_put_in_place_have_only_to_be_counted(first, last):
    buffer, packets, data = covered()
    assert buffer.lacks(first, last)
    assert in_place(buffer, bytearray(len(buffer.headers)), first, packets[first:last])
    assert buffer.received == 0
    buffer.arrived(first, last)
    assert missing(buffer) == [place for place in range(10) if not first <= place < last]
    assert buffer.received == last - first and not buffer.lacks(last - 1, last) and not buffer.lacks(0, 100)
    assert buffer.view(first, last).tobytes() == data[first * PAYLOAD:last * PAYLOAD]
    buffer.arrived(first, last)
    assert buffer.received == last - first


NOT_IN_PLACE = {
    "one was lost": lambda packets: (packets[3:5] + packets[6:8], None),
    "one is doubled": lambda packets: (packets[3:5] + packets[4:6], None),
    "others": lambda packets: (packets[4:7], None),
    "one before": lambda packets: (packets[2:5], None),
    "beyond the round": lambda packets: (packets[3:10] + [packet(2**32 + 5, b"x" * PAYLOAD, checks=DIGEST)], None),
    "a foreign one": lambda packets: (packets[3:5] + [b"x" * len(packets[5])], None),
    "another salt": lambda packets: ([packet(2**32 - 2, b"x" * PAYLOAD, SALT + 1, checks=DIGEST)], None),
    "a checksum": lambda packets: ([packet(2**32 - 2, b"x" * PAYLOAD, checks=CRC)], None),
    "the last one is cut": lambda packets: (packets[3:6], 3 * len(packets[3]) - 1),
    "more than they should be": lambda packets: (packets[3:6], 3 * len(packets[3]) + 1),
    "the short one is too long": lambda packets: (packets[3:9] + [packet(2**32 + 4, b"x" * PAYLOAD, checks=DIGEST)], None),
    "nothing": lambda packets: ([], None),
}


@pytest.mark.parametrize("name", sorted(NOT_IN_PLACE))
def test_what_is_not_as_expected_is_not_in_its_place(name):
    buffer, packets, _ = covered()
    wrong, size = NOT_IN_PLACE[name](packets)
    assert not in_place(buffer, bytearray(len(buffer.headers)), 3, wrong, size)
    assert in_place(buffer, bytearray(len(buffer.headers)), 3, packets[3:6])


# ---------------------------------------------------------------------------------------------------------------------
# The base protocol

def test_in_the_base_protocol_any_packet_may_be_short():
    generator = random.Random(4)
    pieces = [helpers.random_bytes(generator.choice([1, 5, PAYLOAD - 1, PAYLOAD, PAYLOAD]), seed=index) for index in range(150)]
    buffer, packets = round_of(b"".join(pieces), 2**32 - 70, any_size=True, pieces=pieces)
    for each in packets[::-1]:
        put(buffer, each)
        put(buffer, each)
    assert buffer.complete and helpers.data_of(buffer) == b"".join(pieces)


@pytest.mark.parametrize("right", [kmcast.plain_crc, kmcast.c_sum], ids=["crc", "sum"])
def test_the_first_good_packet_decides_which_checksum_is_used(right):
    other = {kmcast.plain_crc: kmcast.c_sum, kmcast.c_sum: kmcast.plain_crc}[right]
    pieces = cut(helpers.random_bytes(9 * PAYLOAD + 3))
    checks = [kmcast.plain_crc, kmcast.c_sum]
    buffer = kmcast.Buffer(PAYLOAD, 10, 0, checks)
    buffer.start(0, 10, None)
    put(buffer, packet(0, pieces[0], check=lambda *_: 12345))           # decides nothing
    assert missing(buffer) == list(range(10))
    put(buffer, packet(9, pieces[9], check=right))
    assert missing(buffer) == list(range(9))
    assert checks == [right], "what was found out holds for the other buffers, too"
    put(buffer, packet(1, pieces[1], check=other))
    assert missing(buffer) == list(range(9))
    put(buffer, *[packet(index, pieces[index], check=right) for index in range(9)])
    assert helpers.data_of(buffer) == b"".join(pieces)


def test_a_compat_servers_packets_have_the_sum():
    buffer = kmcast.Buffer(PAYLOAD, 3, 0, (kmcast.c_sum,))
    buffer.start(0, 0, 0)
    pieces = cut(helpers.random_bytes(2 * PAYLOAD + 3))
    for piece in pieces:
        buffer.add(piece)
    assert packets_of(buffer) == [packet(index, piece, check=kmcast.c_sum) for index, piece in enumerate(pieces)]
