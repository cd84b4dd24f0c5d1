"""Datagrams on loopback: every way to send and every way to receive, the same bytes."""

import ctypes
import errno
import random
import select
import socket
import struct
import time
import zlib

import pytest

import helpers
import kmcast

GROUP = "239.255.83.90"
PAYLOAD = 1460
WAYS = ["gso", "mmsg", "plain"]

#: As kmcast.Buffer takes them: each packet has a checksum, or a digest covers the round.
CRC, DIGEST = (zlib.crc32,), ()
both_modes = pytest.mark.parametrize("checks", [CRC, DIGEST], ids=["checksums", "digest"])


def gso_missing():
    """Why there is no way "gso" here, or None."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.setsockopt(17, 103, 1400)
        probe.setsockopt(17, 104, 1)
    except (OSError, socket.error):
        return "this kernel has no UDP_SEGMENT or no UDP_GRO"
    finally:
        probe.close()


class Ends(object):
    """A sender and a receiver on a group and port of their own, and a foreign socket that sends there, too.

    in_place    packets that came straight to their place
    """

    def __init__(self, send="plain", receive="plain", payload=PAYLOAD, picky=False):
        """picky: whether the receiver takes only what the sender sends."""
        if "gso" in (send, receive) and gso_missing():
            pytest.skip(gso_missing())
        self.port = helpers.free_port()
        self.sender = kmcast.DatagramSender("127.0.0.1", GROUP, self.port, 1, send)
        source = self.sender.sock.getsockname() if picky else None
        self.receiver = kmcast.DatagramReceiver("127.0.0.1", GROUP, self.port, payload, receive, source)
        self.foreign = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.foreign.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        self.in_place, self._next = 0, 0

    def close(self):
        for end in (self.receiver, self.sender, self.foreign):
            end.close()

    def send_all(self, buffer, into=None, place=0, last=None):
        """Send a buffer, all or from `place` up to `last`; meanwhile take what arrives into the buffer `into`."""
        deadline, last = time.time() + 20, last or buffer.count
        while place < last:
            done = self.sender.send(buffer, place, last)
            assert place <= done <= last and time.time() < deadline
            if done == place and into is None:
                select.select([], [self.sender], [], 0.1)
            place = done
            if into is not None:
                self.take(into, 0)

    def take(self, buffer, timeout=0.2):
        """Take what arrives until nothing does for `timeout` seconds, or the buffer is complete."""
        while not buffer.complete and select.select([self.receiver], [], [], timeout)[0]:
            for data, offset, count, payload in self.receiver.receive(self._aim(buffer)) or ():
                if data is buffer:
                    buffer.arrived(offset, offset + count)
                    self.in_place += count
                    self._next = offset + count
                    continue
                self._next = buffer.index(kmcast.U32.unpack_from(data, offset)[0]) + count
                buffer.put(data, offset, count, payload)

    def _aim(self, buffer):
        """Where packets go on, as a client tells its receiver."""
        place = self._next if self._next < buffer.count else 0
        return None if buffer.checks or not buffer.lacks(place, place + kmcast.MOST_SEGMENTS) else (buffer, place)

    def send_foreign(self, *datagrams):
        for datagram in datagrams:
            self.foreign.sendto(datagram, (GROUP, self.port))


@pytest.fixture
def ends():
    made = []

    def make(*args, **options):
        made.append(Ends(*args, **options))
        return made[-1]
    yield make
    for each in made:
        each.close()


def filled(data, payload=PAYLOAD, base=0, checks=CRC):
    """(a server's buffer with this data, an empty client's buffer for it)."""
    pieces = [data[start:start + payload] for start in range(0, len(data), payload)]
    buffer = kmcast.Buffer(payload, len(pieces), 7, checks)
    buffer.start(base, 0, 0)
    for piece in pieces:
        buffer.add(piece)
    empty = kmcast.Buffer(payload, len(pieces), 7, checks)
    empty.start(base, len(pieces), len(data))
    return buffer, empty


def packet(seq, payload, checks=CRC):
    checksum = zlib.crc32(payload, 7 + seq) if checks else 7 + seq
    return struct.pack("<3I", seq, checksum & 0xffffffff, len(payload)) + payload


@pytest.mark.parametrize("send", WAYS)
@pytest.mark.parametrize("receive", WAYS)
@pytest.mark.parametrize("packets, rest, payload", [
    (1, 0, 1460), (0, 5, 1460), (1, 1, 1460), (44, 0, 1460), (45, 1459, 1460), (700, 3, 1460), (300, 100, 216), (40, 17, 8960)])
@both_modes
def test_every_way_gives_the_same_bytes(ends, send, receive, packets, rest, payload, checks):
    data = helpers.random_bytes(packets * payload + rest, seed=packets)
    source, target = filled(data, payload, 2**32 - 20, checks)
    both = ends(send, receive, payload)
    both.send_all(source, into=target)
    both.take(target)
    assert not target.missing() and target.damaged == 0
    assert helpers.data_of(target) == data
    assert both.sender.way == send and both.receiver.way == receive and both.sender.trouble is None
    assert both.receiver.receive() is None


def foreign(count, size):
    """So many datagrams of so many bytes, which the kernel joins."""
    return lambda both: (both.foreign.setsockopt(17, 103, size if count > 1 else 0), both.send_foreign(b"x" * (count * size)))


#: What is sent: stretches of 400 packets, and other datagrams.
SENT = {
    "all": [(0, 400)],
    "some are lost": [(0, 50), (60, 100), (101, 330), (331, 332), (333, 335), (390, 400)],
    "some are doubled": [(0, 100), (50, 150), (0, 200), (199, 400)],
    "backwards": [(300, 400), (200, 300), (100, 200), (0, 100)],
    "gaps are filled": [(100, 150), (0, 50), (160, 220), (50, 100), (250, 400)],
    "foreign ones of the same size": [
        (0, 50), foreign(40, 12 + PAYLOAD), (50, 100), (200, 250), foreign(40, 12 + PAYLOAD), (100, 150)],
    "shorter ones": [(0, 50), foreign(40, 1000), (50, 100), (200, 250), foreign(3, 13), foreign(40, 12), (100, 150),
                     foreign(40, 1471), (150, 380)],
    "longer ones": [(0, 50), foreign(40, 1473), (50, 100), (200, 250), foreign(1, 60000), foreign(20, 3000), (100, 150),
                    foreign(7, 9000), (340, 400)],
    "ones that are longer than the rest of the round": [
        (0, 390), foreign(40, 1473), foreign(1, 65507), (380, 395), foreign(6, 9000), (395, 400)],
    "empty ones": [(0, 50), foreign(1, 0), (50, 100), foreign(1, 0), (100, 400)],
}


@pytest.mark.parametrize("rest", [0, 5])
@pytest.mark.parametrize("name", sorted(SENT))
def test_packets_come_straight_to_their_place_whatever_comes_with_them(ends, rest, name):
    """Where a digest covers the round and the kernel joins them; nothing of what is there already is written over."""
    data = helpers.random_bytes(400 * PAYLOAD - rest)
    source, target = filled(data, base=2**32 - 20, checks=DIGEST)
    both, sent = ends("gso", "gso"), set()
    for each in SENT[name]:
        if callable(each):
            each(both)
        else:
            both.send_all(source, target, *each)
            sent.update(range(*each))
        both.take(target, 0)
    assert kmcast.places(target.missing()) == [place for place in range(400) if place not in sent]
    assert target.received == len(sent)
    for place in sent:
        assert target.view(place, place + 1) == source.view(place, place + 1)
    both.send_all(source, target)
    both.take(target)
    assert helpers.data_of(target) == data
    assert both.in_place > 50, "or nothing was tested"


@pytest.mark.parametrize("send", WAYS)
@both_modes
def test_short_packets_anywhere_are_sent_as_they_are(ends, send, checks):
    generator = random.Random(2)
    pieces = [helpers.random_bytes(generator.choice([1, 12, 700, PAYLOAD - 1, PAYLOAD, PAYLOAD, PAYLOAD]), seed=index)
              for index in range(200)]
    source = kmcast.Buffer(PAYLOAD, 200, 7, checks)
    source.start(0, 0, 0)
    for piece in pieces:
        source.add(piece)
    both = ends(send, "plain")
    with_plain_socket = helpers.group_socket(GROUP, both.port)
    both.send_all(source)
    time.sleep(0.05)
    datagrams = helpers.datagrams_in(with_plain_socket)
    with_plain_socket.close()
    assert datagrams == [packet(index, piece, checks) for index, piece in enumerate(pieces)]


@pytest.mark.parametrize("receive", WAYS)
def test_mixed_sizes_are_received_as_they_came(ends, receive):
    generator = random.Random(3)
    pieces = [helpers.random_bytes(generator.choice([1, 12, 700, PAYLOAD - 1, PAYLOAD, PAYLOAD]), seed=index)
              for index in range(150)]
    both = ends("plain", receive)
    target = kmcast.Buffer(PAYLOAD, 150, 7)
    target.start(0, 150, None)
    both.send_foreign(*[packet(index, piece) for index, piece in enumerate(pieces)])
    both.take(target)
    assert helpers.data_of(target) == b"".join(pieces)


@pytest.mark.parametrize("receive", WAYS)
@both_modes
def test_foreign_datagrams_do_no_harm(ends, receive, checks):
    """Empty, tiny, oversized and huge ones between good ones."""
    data = helpers.random_bytes(100 * PAYLOAD + 50)
    source, target = filled(data, checks=checks)
    both = ends("plain", receive)
    strange = [b"", b"x", b"y" * 11, b"z" * 12, b"a" * 13, b"b" * (12 + PAYLOAD + 1), b"c" * 3000, b"d" * 60000,
               b"e" * 65507, b"f" * (12 + PAYLOAD)]
    for index in range(source.count):
        both.send_foreign(strange[index % len(strange)])
        assert both.sender.send(source, index, index + 1) == index + 1
        if index % 10 == 9:
            both.take(target, 0)
    both.take(target)
    assert not target.missing()
    assert helpers.data_of(target) == data


@pytest.mark.parametrize("segment", [1, 12, 13, 100, 1000, 1471, 1473, 3000, 9000])
@both_modes
def test_what_the_kernel_joined_of_foreign_datagrams_does_no_harm(ends, segment, checks):
    """Another program with UDP_SEGMENT on the same group: joined datagrams of a size that is not ours."""
    both = ends("plain", "gso")
    data = helpers.random_bytes(20 * PAYLOAD)
    source, target = filled(data, checks=checks)
    both.foreign.setsockopt(17, 103, segment)
    size = segment * max(1, min(64, 60000 // segment)) - segment // 2
    for index in range(source.count):
        both.send_foreign(b"x" * size)
        both.sender.send(source, index, index + 1)
        both.take(target, 0)
    both.take(target)
    assert not target.missing()
    assert helpers.data_of(target) == data


@pytest.mark.parametrize("payload", [500, 1000, 1456])
def test_joined_datagrams_that_are_smaller_than_a_slot_are_taken_apart(ends, payload):
    """A base-protocol server with a smaller MTU; and every one of them is a packet."""
    both = ends("gso", "gso")
    pieces = [helpers.random_bytes(payload, seed=index) for index in range(100)]
    source = kmcast.Buffer(payload, 100, 7)
    source.start(0, 0, 0)
    for piece in pieces:
        source.add(piece)
    target = kmcast.Buffer(PAYLOAD, 100, 7)
    target.start(0, 100, None)
    both.send_all(source, into=target)
    both.take(target)
    assert not target.missing()
    assert helpers.data_of(target) == b"".join(pieces)


@pytest.mark.parametrize("receive", WAYS)
def test_only_what_comes_from_the_source_is_taken(ends, receive):
    """Not what looks the same and comes from another port of that host."""
    both = ends("plain", receive, picky=True)
    source, target = filled(helpers.random_bytes(3 * PAYLOAD))
    both.send_foreign(*[packet(place, b"f" * PAYLOAD) for place in range(3)])
    assert both.receiver.receive() is None
    both.send_all(source, into=target)
    both.take(target)
    assert target.complete and helpers.data_of(target) == helpers.data_of(source)


@pytest.mark.parametrize("receive", WAYS)
def test_when_packets_arrived_is_known(ends, receive):
    """Of the first and the last message of a call, and how many packets the first one brought."""
    both = ends("plain", receive)
    source, _ = filled(helpers.random_bytes(5 * PAYLOAD))
    both.sender.send(source, 0, 1)
    time.sleep(0.05)
    for place in range(1, 5):
        both.sender.send(source, place, place + 1)
    batches = both.receiver.receive()
    assert sum(count for _, _, count, _ in batches) == 5
    assert both.receiver.in_first == 1
    if receive != "plain":              # there it is the clock at the call
        assert both.receiver.last - both.receiver.first >= 0.05
    assert both.receiver.last >= both.receiver.first


def test_other_groups_do_not_get_in(ends):
    """Though they use the same port on the same host."""
    both = ends()
    both.foreign.sendto(packet(0, b"x" * PAYLOAD), ("239.255.83.91", both.port))
    other = helpers.group_socket("239.255.83.91", both.port)       # so that the host has joined that group as well
    both.foreign.sendto(packet(0, b"x" * PAYLOAD), ("239.255.83.91", both.port))
    assert select.select([other], [], [], 5)[0]
    other.close()
    assert both.receiver.receive() is None


def test_a_full_socket_is_waited_for_and_nothing_is_lost(ends):
    """send() says how far it came; it never skips."""
    data = helpers.random_bytes(4000 * PAYLOAD)
    source, target = filled(data)
    for way in WAYS:
        if way == "gso" and gso_missing():
            continue
        both = ends(way, "mmsg")
        target.start(0, 4000, len(data))
        both.send_all(source, into=target)
        both.take(target)
        if both.receiver.overflows() == 0:
            assert not target.missing()
        assert both.sender.trouble is None


class Refusing(object):
    """A real socket, of which some calls fail as they would on another kernel or device."""

    def __init__(self, sock, error, calls):
        self._sock, self._error, self._calls = sock, error, calls

    def __getattr__(self, name):
        if name in self._calls:
            def fail(*args):
                if name != "setsockopt" or (args[:2] == (17, 103) and args[2]):
                    raise socket.error(self._error, "refused")
                return getattr(self._sock, name)(*args)
            return fail
        return getattr(self._sock, name)


class RefusingLibrary(object):
    """The C library, of which some calls fail in the same way."""

    def __init__(self, library, error, calls):
        self._library, self._error, self._calls = library, error, calls

    def __getattr__(self, name):
        def fail(*_args):
            ctypes.set_errno(self._error)
            return -1
        return fail if name in self._calls else getattr(self._library, name)


@pytest.fixture
def refuse(monkeypatch):
    """Let calls of a sender fail with an errno: those of its socket, sendmsg and sendmmsg."""
    def refuse(sender, number, *calls):
        sender.sock = Refusing(sender.sock, number, calls)
        monkeypatch.setattr(kmcast, "LIBC", RefusingLibrary(kmcast.LIBC, number, calls))
    return refuse


CALLS = {"gso": "sendmsg", "mmsg": "sendmmsg", "plain": "send"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.ENOPROTOOPT, errno.EOPNOTSUPP],
                         ids=lambda number: errno.errorcode[number])
def test_a_kernel_that_refuses_to_segment_gets_single_datagrams_for_good(ends, refuse, number):
    data = helpers.random_bytes(100 * PAYLOAD)
    source, target = filled(data)
    both = ends("auto", "plain")
    refuse(both.sender, number, "setsockopt" if number == errno.ENOPROTOOPT else "sendmsg")
    assert both.sender.way == "gso"
    assert both.sender.send(source, 0, 100) == 0        # nothing was sent
    assert both.sender.way == "mmsg"
    both.send_all(source, into=target)
    both.take(target)
    assert helpers.data_of(target) == data and both.sender.way == "mmsg"


def test_a_library_without_sendmmsg_sends_them_one_by_one(ends, monkeypatch):
    source, target = filled(helpers.random_bytes(100 * PAYLOAD))
    both = ends("auto", "plain")
    both.sender.way = "mmsg"
    monkeypatch.setattr(kmcast, "LIBC", object())
    assert both.sender.send(source, 0, 100) == 0 and both.sender.way == "plain"
    monkeypatch.undo()
    both.send_all(source, into=target)
    both.take(target)
    assert target.complete and both.sender.way == "plain"


@pytest.mark.parametrize("way", WAYS)
def test_a_packet_that_the_kernel_refuses_is_lost_as_others_are(ends, refuse, way):
    """A firewall (EPERM), a network that is down: it is said, and it does not stop the transfer."""
    source, _ = filled(helpers.random_bytes(10 * PAYLOAD))
    both = ends(way, "plain")
    refuse(both.sender, errno.EPERM, CALLS[way])
    place = 0
    for _ in range(10):
        place = both.sender.send(source, place, 10)
    assert place == 10 and both.sender.trouble and both.sender.way == way


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.EINTR], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("way", WAYS)
def test_a_passing_error_sends_nothing_and_changes_nothing(ends, refuse, way, number):
    source, _ = filled(helpers.random_bytes(10 * PAYLOAD))
    both = ends(way)
    refuse(both.sender, number, CALLS[way])
    assert both.sender.send(source, 3, 10) == 3
    assert both.sender.way == way and both.sender.trouble is None


def test_datagrams_larger_than_a_call_can_carry_are_split(ends):
    """44 at MTU 1500, 7 at 9000."""
    both = ends("plain")
    for way, expected in (("gso", [44, 7, 64]), ("mmsg", [64, 64, 64]), ("plain", [1, 1, 1])):
        both.sender.way = way
        assert [both.sender.most(slot) for slot in (1472, 8972, 228)] == expected


def test_the_mtu_of_the_egress_is_known(ends):
    with open("/sys/class/net/lo/mtu") as mtu:
        assert ends().sender.mtu == min(65535, int(mtu.read()))


def test_an_address_that_is_not_ours_is_an_error():
    with pytest.raises(kmcast.OS_ERRORS):
        kmcast.DatagramSender("203.0.113.7", GROUP, 20000, 1)
    with pytest.raises(kmcast.OS_ERRORS):
        kmcast.DatagramReceiver("203.0.113.7", GROUP, 20000, PAYLOAD)


def test_what_found_no_room_in_the_socket_is_counted(ends):
    both = ends()
    assert both.receiver.overflows() == 0
    both.receiver.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(200):
        both.send_foreign(b"x" * 1472)
    assert both.receiver.overflows() > 100
