"""The chain: clients take the image from one another where multicast does not reach them; over loopback.

Also a real client between neighbours of ours, which say and take no more than a test tells them to.
"""

import errno
import select
import signal
import socket
import threading
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK, payload_size
from pythons import BOTH
from test_failures import Consumer, wait_until
from wire import ALIVE, RELAY, STATE

PAYLOAD = payload_size()
MB = 1000000
A_WHILE = 0.3
TOKEN = b"0123456789abcdef"
ANOTHER = b"fedcba9876543210"


def images(ended, data):
    """How many images of this size went by multicast, by TCP from the server, and from client to client."""
    carried = ended.server.report()["carried"]
    return [carried[how] / float(len(data)) for how in ("multicast", "tcp", "chain")]


# ---------------------------------------------------------------------------------------------------------------------
# From the start

@BOTH
def test_the_server_sends_the_image_once_and_the_clients_pass_it_on(python):
    data = helpers.random_bytes(10 * MB)
    ended = helpers.transfer(data, 4, ["--unicast"], server_python=python, client_python=python)
    ended.check(data)
    multicast, tcp, chain = images(ended, data)
    assert multicast == 0 and tcp < 1.5 and chain > 2.5


def test_interpreters_can_be_mixed_and_digests_left_out():
    data = helpers.random_bytes(5 * MB + 7)
    ended = helpers.transfer(data, 4, ["--chain", "always", "--no-digest"],
                             client_python=[helpers.oldest(), helpers.newest()])
    ended.check(data)
    multicast, tcp, chain = images(ended, data)
    assert multicast == 0 and tcp < 2 and chain > 2


def test_without_a_chain_the_server_sends_to_each():
    data = helpers.random_bytes(2 * MB)
    ended = helpers.transfer(data, 3, ["--unicast", "--chain", "never"])
    ended.check(data)
    multicast, tcp, chain = images(ended, data)
    assert (multicast, chain) == (0, 0) and tcp == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("size", [1, PAYLOAD, 10 * PAYLOAD + 1])
def test_an_image_of_a_few_packets_takes_it_as_well(size):
    data = helpers.random_bytes(size)
    helpers.transfer(data, 3, ["--unicast"]).check(data)


def test_rounds_of_one_packet():
    data = helpers.random_bytes(60 * PAYLOAD - 1)
    helpers.transfer(data, 3, ["--unicast", "--buffer-packets", 1]).check(data)


def test_a_slow_consumer_is_waited_for_wherever_it_stands():
    data = helpers.random_bytes(3 * MB)
    port = helpers.free_port()
    server = helpers.start_server(["--unicast", "--buffer-packets", 200, LOOPBACK, 3, port], stdin=data)
    clients = []
    for pause in (0, 0.02, 0):
        parts = []

        def take(chunk, pause=pause, parts=parts):
            time.sleep(pause)
            parts.append(chunk)
        clients.append((helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=take), parts))
    for client, parts in clients:
        assert client.finish(60)[0] == 0 and b"".join(parts) == data
    assert server.finish(20)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# By itself

def deaf_to(hears):
    """What becomes of a datagram on the way to a client."""
    return lambda datagram: [datagram] if hears else []


#: Through a Network more than this would get lost in it, on a busy machine.
RATE = ["--rate", "50M"]


def transfer_with_paths(data, hears, *args):
    """A transfer to clients of which each hears multicast or not; returns (server, clients), which run."""
    port = helpers.free_port()
    server = helpers.start_server(list(args) + [LOOPBACK, len(hears), port], stdin=data)
    network = helpers.Network(port)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, network.path(deaf_to(heard))]) for heard in hears]
    return server, clients


def finish(server, clients, data):
    for client in clients:
        code, stderr, received = client.finish(60)
        same = received == data
        assert code == 0 and same, stderr
    code, stderr, _ = server.finish(20)
    assert code == 0, stderr
    return stderr


def test_where_nobody_hears_anything_a_chain_is_made():
    data = helpers.random_bytes(10 * MB)
    server, clients = transfer_with_paths(data, [False] * 3, "-v")
    stderr = finish(server, clients, data)
    carried = server.report()["carried"]
    assert carried["chain"] > len(data) and carried["tcp"] < 2 * len(data)
    assert "the chain is now" in stderr and "no client receives multicast" in stderr


def test_multicast_that_nobody_hears_at_first_is_used_once_it_is_heard():
    data = helpers.random_bytes(12 * MB)
    port = helpers.free_port()
    server = helpers.start_server(["-v"] + RATE + [LOOPBACK, 3, port], stdin=data)
    network = helpers.Network(port)
    clients = []
    for _ in range(3):
        lost = iter(range(64))

        def late(datagram, lost=lost):
            return [] if next(lost, None) is not None else [datagram]
        clients.append(helpers.start_client([LOOPBACK, LOOPBACK, network.path(late)]))
    stderr = finish(server, clients, data)
    carried = server.report()["carried"]
    assert "the chain is now" in stderr
    assert carried["multicast"] > 3 * MB, "more than what is sent to see whether anybody hears it"


def test_one_that_hears_is_the_head_for_those_that_do_not():
    data = helpers.random_bytes(10 * MB)
    server, clients = transfer_with_paths(data, [True, False, False], *RATE)
    finish(server, clients, data)
    carried = server.report()["carried"]
    assert carried["chain"] > len(data) and carried["multicast"] > len(data) / 2
    rows = [client.report()["carried"] for client in clients]
    assert rows[0]["chain"] == 0 and min(row["chain"] for row in rows[1:]) > len(data) / 2


def test_where_all_hear_there_is_none():
    data = helpers.random_bytes(5 * MB)
    ended = helpers.transfer(data, 3)
    ended.check(data)
    assert images(ended, data)[2] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Clients that end in mid-transfer

class Chained(object):
    """A chain of clients, all of which have some of the image; the rest of it comes with go_on()."""

    def __init__(self, count, *args):
        self.data, self._rest = helpers.random_bytes(4 * MB), threading.Event()
        port = helpers.free_port()
        self.server = helpers.start_server(["--unicast", "-v", "--buffer-packets", 200] + list(args) + [LOOPBACK, count, port],
                                           stdin=self._produce())
        self.consumers = [Consumer() for _ in range(count)]
        self.clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=consumer) for consumer in self.consumers]
        self.server.wait_stderr("the chain is now")
        wait_until(lambda: all(consumer.data for consumer in self.consumers), "all have some")

    def _produce(self):
        yield self.data[:2 * MB]
        self._rest.wait(60)
        yield self.data[2 * MB:]

    def go_on(self):
        """Have the rest come."""
        self._rest.set()

    def finish(self, without=None):
        """All but one client, a number, end well, and with the image; returns the server's exit code and stderr."""
        for number, client in enumerate(self.clients):
            if number != without:
                code, stderr, _ = client.finish(60)
                same = self.consumers[number].data == self.data
                assert code == 0 and same, stderr
        return self.server.finish(20)[:2]


@pytest.mark.parametrize("victim", range(4))
def test_who_is_killed_is_not_missed_by_the_others(victim):
    chain = Chained(4)
    chain.clients[victim].stop()
    chain.go_on()
    code, stderr = chain.finish(without=victim)
    assert code == 3 and "3 of 4 clients have the image" in stderr


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_who_is_stopped_is_dropped_after_the_stall_timeout(victim):
    chain = Chained(4, "--stall-timeout", 3)
    chain.clients[victim].signal(signal.SIGSTOP)
    chain.go_on()
    code, stderr = chain.finish(without=victim)
    assert code == 3 and "stalled" in stderr


def test_who_stops_for_a_moment_goes_on():
    chain = Chained(4)
    chain.clients[1].signal(signal.SIGSTOP)
    chain.go_on()
    time.sleep(3)
    chain.clients[1].signal(signal.SIGCONT)
    assert chain.finish()[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# A client between neighbours of ours

PARTS = [helpers.random_bytes(size, seed=size) for size in (1000, 500, 700, 300, 450)]


class Neighbour(object):
    """A real client, and the server of ours that it talks to; greeted."""

    def __init__(self, python=None, **welcome):
        self.server = wire.Server(**dict({"window": 4, "unicast": True}, **welcome))
        self.client = helpers.start_client(["--wait", 0, LOOPBACK, LOOPBACK, self.server.port], python)
        self.server.accept().greet()
        self.digest = self.server.fields_of_welcome["digest"] is not None
        self.listener = socket.socket()
        self.listener.bind((LOOPBACK, 0))
        self.listener.listen(5)
        self.listener.settimeout(20)

    def says(self):
        """The next RELAY: its fields."""
        return self.server.expect(RELAY).fields

    def name_follower(self, token=TOKEN):
        """Tell it whom to serve; returns the port where."""
        self.server.say(wire.follower(token))
        said = self.says()
        assert said["token"] == wire.binascii.hexlify(token).decode("ascii") and said["port"]
        return said["port"]

    def follow(self, number=0, token=TOKEN):
        """Become its upstream; returns the connection."""
        self.server.say(wire.upstream(number, self.listener.getsockname()[1], token))
        sock, _ = self.listener.accept()
        sock.settimeout(20)
        assert read(sock, 20) == token + wire.U32.pack(number)
        return sock

    def be_followed(self, token=TOKEN, room=None):
        """Become the follower that it is told to serve; returns the connection.

        room: bytes of its receive buffer, where it is to be a small one
        """
        follower = socket.socket()
        if room:
            follower.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        follower.settimeout(20)
        follower.connect((LOOPBACK, self.name_follower(token)))
        follower.sendall(token + wire.U32.pack(0))
        return follower

    def check(self):
        self.server.end()
        code, stderr, received = self.client.finish(20)
        same = received == b"".join(PARTS)[:self.server.size]
        assert code == 0 and same, stderr
        return stderr

    def close(self):
        self.listener.close()
        self.server.close()


@pytest.fixture
def chain():
    made = []

    def make(*args, **options):
        made.append(Neighbour(*args, **options))
        return made[-1]
    yield make
    for one in made:
        one.close()


def read(sock, size):
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, "it ended after %r" % data
        data += more
    return data


def connect(port, words=b""):
    sock = socket.create_connection((LOOPBACK, port), 20)
    sock.settimeout(20)
    sock.sendall(words)
    return sock


def pieces(sock, until=1, digest=True):
    """What an upstream sends up to so many marks: ({(round, first packet): bytes}, rounds that have a mark)."""
    found, marks = {}, []
    while len(marks) < until:
        number, first, size = wire.struct.unpack("<3I", read(sock, 12))
        if size:
            found[number, first] = read(sock, size)
            if not digest:
                head = wire.struct.pack("<3I", number, first, size)
                assert read(sock, 4) == wire.U32.pack(wire.zlib.crc32(head + found[number, first]) & wire.MASK)
        elif number != wire.MASK:
            marks.append(number)
    return found, marks


def whole(found, number):
    """The bytes of a round, of all pieces."""
    return b"".join(data for (other, _), data in sorted(found.items()) if other == number)


def check_round(sock):
    """Fail unless a follower gets the first part, and that only."""
    found, _ = pieces(sock)
    same = whole(found, 0) == PARTS[0]
    assert same


def closed(sock):
    """Whether the other end closes it, and says nothing."""
    try:
        return sock.recv(1) == b""
    except socket.error as error:
        return error.errno == errno.ECONNRESET


@BOTH
@pytest.mark.parametrize("digest", ["sha256", None])
def test_what_comes_from_the_upstream_goes_to_the_follower(python, digest, chain):
    one = chain(python, digest=digest)
    follower, upstream = one.be_followed(), one.follow()
    rounds = one.server.start_rounds(PARTS[:3])
    for what, part in zip(rounds, PARTS):
        one.server.say(one.server.sent(what))
        upstream.sendall(wire.piece(what.number, 2, part[200:], one.digest))
        upstream.sendall(wire.piece(what.number, 0, part[:200], one.digest) + wire.piece(what.number, 0, b""))
        one.server.done(what)
    found, marks = pieces(follower, 3, one.digest)
    assert marks == [0, 1, 2]
    for what, part in zip(rounds, PARTS):
        same = whole(found, what.number) == part
        assert same
    one.check()
    assert one.client.report()["carried"]["chain"] == sum(what.count for what in rounds) * 100


def test_a_piece_goes_on_before_the_round_is_there(chain):
    one = chain()
    follower, upstream = one.be_followed(), one.follow()
    what = one.server.start_round(PARTS[0])
    upstream.sendall(wire.piece(0, 0, PARTS[0][:300]))
    same = read(follower, 12 + 300) == wire.piece(0, 0, PARTS[0][:300])
    assert same
    one.server.say(one.server.sent())
    upstream.sendall(wire.piece(0, 3, PARTS[0][300:]) + wire.piece(0, 0, b""))
    one.server.done(what)
    one.check()


def test_what_multicast_brings_goes_to_the_follower_too(chain):
    one = chain()
    follower = one.be_followed()
    what = one.server.send_round(PARTS[0], lost=[3])
    assert one.server.asked(what) == [3]
    one.server.give([3])
    one.server.done(what)
    check_round(follower)
    one.check()


def test_what_the_chain_did_not_bring_is_asked_for(chain):
    one = chain()
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    one.server.say(one.server.sent())
    upstream.sendall(wire.piece(0, 0, PARTS[0][:700]))
    assert select.select([one.server.sock], [], [], A_WHILE)[0] == [], "more may come"
    upstream.sendall(wire.piece(0, 0, b""))
    assert one.server.asked(what) == [7, 8, 9]
    one.server.give([7, 8, 9])
    one.server.done(what)
    one.check()


@pytest.mark.parametrize("end", ["closed", "reset", "silent", "nonsense", "outside", "too long"])
def test_an_upstream_that_fails_is_told_of_and_done_without(end, chain):
    one = chain()
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    one.server.say(one.server.sent())
    upstream.sendall(wire.piece(0, 0, PARTS[0][:200]) + wire.piece(0, 2, PARTS[0][200:400])[:50])
    if end == "closed":
        upstream.close()
    elif end == "reset":
        wire.reset(upstream)
    elif end != "silent":
        upstream.sendall(PARTS[0][238:400] + {
            "nonsense": b"\xff" * 11 + b"\0", "outside": wire.piece(0, 9, PARTS[0][:200]),
            "too long": wire.struct.pack("<3I", 0, 0, 262145)}[end])
    said = one.says()
    assert said["lost"] and said["connected"] is True
    asked = one.server.asked(what)
    assert asked[-6:] == [4, 5, 6, 7, 8, 9] and asked[0] >= 2
    one.server.give(asked)
    one.server.done(what)
    one.check()


def test_an_upstream_is_alive_as_long_as_it_says_so(chain):
    one = chain()
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    one.server.say(one.server.sent())
    for _ in range(6):
        time.sleep(0.5)
        upstream.sendall(wire.STILL_HERE)
    upstream.sendall(wire.piece(0, 0, PARTS[0]))
    one.server.done(what)
    one.check()


def test_a_follower_hears_that_its_upstream_is_here_whether_that_has_anything_or_not(chain):
    one = chain()
    follower = one.be_followed()
    assert read(follower, 36) == 3 * wire.STILL_HERE
    one.server.whole_round(PARTS[0])
    one.check()


def test_an_upstream_that_cannot_be_reached_is_told_of(chain):
    one = chain()
    one.server.say(wire.upstream(0, helpers.free_port(), TOKEN))
    said = one.says()
    assert "refused" in said["lost"] and said["connected"] is False
    one.server.whole_round(PARTS[0])
    one.check()


def test_a_new_upstream_takes_the_place_of_the_one_before(chain):
    one = chain()
    before = one.follow()
    after = one.follow(1, ANOTHER)
    assert closed(before)
    first, second = one.server.start_rounds(PARTS[:2])
    one.server.say(one.server.sent(first), one.server.sent(second))
    asked = one.server.asked(first)
    assert asked == list(range(10)), "for a round before its first there is none"
    one.server.give(asked, first)
    one.server.done(first)
    after.sendall(wire.piece(1, 0, PARTS[1]))
    one.server.done(second)
    one.server.say(wire.upstream(2))
    assert closed(after)
    one.check()


def test_damage_on_the_way_is_found_by_the_digest_and_asked_for(chain):
    one = chain()
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    wrong = bytearray(PARTS[0])
    wrong[555] ^= 1
    one.server.say(one.server.sent())
    upstream.sendall(wire.piece(0, 0, bytes(wrong)))
    one.server.suspected(what)
    assert one.server.asked(what) == [5]
    one.server.give([5])
    one.server.done(what)
    one.check()


def test_what_no_checksum_tells_of_an_upstream_is_asked_for_as_a_whole(chain):
    """It was deceived itself; whoever believed it is not to fail for that."""
    one = chain()
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    wrong = bytearray(PARTS[0])
    for place, change in enumerate(bytearray(b"\x41\x06\x71\xdb\x01")):        # as its CRC-32 does not see
        wrong[550 + place] ^= change
    assert wire.zlib.crc32(bytes(wrong[500:600])) == wire.zlib.crc32(PARTS[0][500:600])
    one.server.say(one.server.sent())
    upstream.sendall(wire.piece(0, 0, bytes(wrong)))
    one.server.suspected(what)
    assert one.server.asked(what) == list(range(10))
    one.server.give(range(10))
    one.server.done(what)
    one.check()


def test_damage_is_found_by_the_checksum_where_there_is_no_digest(chain):
    one = chain(digest=None)
    upstream = one.follow()
    what = one.server.start_round(PARTS[0])
    one.server.say(one.server.sent())
    good, wrong = wire.piece(0, 0, PARTS[0][:500], False), bytearray(wire.piece(0, 5, PARTS[0][500:], False))
    wrong[50] ^= 1
    upstream.sendall(good + bytes(wrong))
    assert "checksum" in one.says()["lost"]
    asked = one.server.asked(what)
    assert asked == [5, 6, 7, 8, 9]
    one.server.give(asked)
    one.server.done(what)
    one.check()


# ---- the relay port

def test_strangers_are_disconnected_and_the_follower_is_served(chain):
    one = chain()
    port = one.name_follower()
    strangers = [connect(port, words) for words in (b"GET / HTTP/1.0\r\n\r\n", ANOTHER + wire.U32.pack(0), b"")]
    follower = connect(port, TOKEN + wire.U32.pack(0))
    assert all(map(closed, strangers))
    twice = connect(port, TOKEN + wire.U32.pack(0))
    assert closed(twice), "it serves one"
    what = one.server.send_round(PARTS[0])
    one.server.done(what)
    check_round(follower)
    stderr = one.check()
    assert "not the one that the server named" in stderr


def test_a_hundred_strangers_take_nobodys_place(chain):
    one = chain()
    port = one.name_follower()
    strangers = [connect(port) for _ in range(100)]
    follower = connect(port, TOKEN + wire.U32.pack(0))
    what = one.server.send_round(PARTS[0])
    one.server.done(what)
    check_round(follower)
    lines = one.check().splitlines()
    assert 0 < len([line for line in lines if LOOPBACK + ": " in line]) < 50
    for stranger in strangers:
        stranger.close()


def test_the_port_is_open_only_while_there_is_a_follower(chain):
    one = chain()
    follower = one.be_followed()
    port = follower.getpeername()[1]
    one.server.say(wire.follower(None))
    assert read_to_end(follower)
    with pytest.raises(socket.error):
        connect(port)
    one.server.whole_round(PARTS[0])
    one.check()


def read_to_end(sock):
    data = b"some"
    while data:
        try:
            data = sock.recv(1000)
        except socket.error as error:
            return error.errno == errno.ECONNRESET
    return True


def test_another_follower_takes_the_place_of_the_one_before(chain):
    one = chain()
    before = one.be_followed()
    after = one.be_followed(ANOTHER)
    assert read_to_end(before)
    what = one.server.send_round(PARTS[0])
    one.server.done(what)
    check_round(after)
    one.check()


def test_a_round_that_is_gone_has_its_mark_at_once(chain):
    one = chain()
    one.server.whole_round(PARTS[0])
    time.sleep(A_WHILE)
    assert pieces(one.be_followed()) == ({}, [0])
    one.check()


def test_a_follower_that_takes_nothing_holds_its_upstream_up_and_nobody_else(chain):
    """Its buffers are kept, so it is not ready for more, but shows life; until the server names another follower."""
    data = helpers.random_bytes(16 * MB)
    one = chain(payload=PAYLOAD, stall=3)
    server, follower = one.server, one.be_followed(room=4096)
    parts = [data[start:start + 2 * MB] for start in range(0, len(data), 2 * MB)]
    waiting, given = [], 0
    for part in parts:
        what = server.announce(part)
        deadline = time.time() + 4
        while time.time() < deadline:
            if select.select([server.sock], [], [], 0.1)[0]:
                message = server.hear()
                if message.kind == wire.READY and message.round == what:
                    break
                assert message.kind in (ALIVE, STATE), message
        else:
            waiting.append(what)
            break
        server.say(server.sent(what))
        asked = server.asked(what)
        server.give(asked, what)
        server.done(what)
        given += 1
    assert waiting and given >= 4, "as many as it has buffers"
    server.say(wire.follower(None))
    server.take_ready(waiting[0])
    server.say(server.sent(waiting[0]))
    server.give(server.asked(waiting[0]), waiting[0])
    server.done(waiting[0])
    server.end()
    code, stderr, received = one.client.finish(20)
    same = received == data[:server.size]
    assert code == 0 and same, stderr
    follower.close()


def test_it_does_not_leave_before_its_follower_has_everything(chain):
    data = helpers.random_bytes(6 * MB)
    one = chain(payload=PAYLOAD)
    server, follower = one.server, one.be_followed(room=4096)
    parts = [data[:3 * MB], data[3 * MB:]]
    for part in parts:
        what = server.start_round(part)
        server.say(server.sent(what))
        server.give(server.asked(what), what)
        server.done(what)
    server.end()
    server.sock.close()
    assert one.client.wait(A_WHILE) is None
    found, marks = pieces(follower, 2)
    same = whole(found, 0) + whole(found, 1) == data
    assert same and marks == [0, 1]
    assert one.client.finish(20)[0] == 0


def test_nor_does_it_stay_for_one_that_takes_nothing(chain):
    data = helpers.random_bytes(6 * MB)
    one = chain(payload=PAYLOAD)
    server, follower = one.server, one.be_followed(room=4096)
    what = server.start_round(data)
    server.say(server.sent(what))
    server.give(server.asked(what), what)
    server.done(what)
    server.end()
    assert one.client.finish(20)[0] == 0
    follower.close()


# ---- the server

@pytest.mark.parametrize("words", [
    wire.frame(RELAY, {}), wire.frame(RELAY, {"token": "short", "port": 1}), wire.relay(TOKEN, port=70000),
    wire.relay(TOKEN, port=True), wire.relay(TOKEN, lost=5)])
def test_a_server_takes_no_nonsense_about_neighbours(words):
    port = helpers.free_port()
    server = helpers.start_server(["--unicast", LOOPBACK, 1, port], stdin=b"x" * 1000)
    client = wire.Client(port).greet()
    client.say(words)
    assert "protocol error" in client.reason(passing=[wire.INFO])
    client.close()
    assert server.finish(20)[0] == 1


def test_words_about_a_link_that_there_is_not_are_ignored():
    port = helpers.free_port()
    server = helpers.start_server(["--unicast", LOOPBACK, 1, port], stdin=b"x" * 1000)
    client = wire.Client(port).greet()
    client.say(wire.relay(TOKEN, lost="gone"), wire.relay(TOKEN, port=5))
    client.take_round()
    client.ask([0])
    client.expect(wire.PACKETS)
    client.read(1000)
    client.done()
    client.end()
    assert server.finish(20)[0] == 0
