"""Rounds in flight: several of them are under way at once, between a real server and a client of ours, and the other way round.

The client of ours says and hears no more than a test tells it to, so that what the server does without it is seen.
"""

import hashlib
import select

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import BOTH, in_turn
from wire import ALIVE, BASE, BYE, DONE, INFO, PACKETS, REQUEST, SENT, SESSION, STATE, payload_size

PAYLOAD = payload_size()
#: Rounds of ten packets.
SMALL = ["--buffer-packets", 10]
ROUND = 10 * PAYLOAD
#: Seconds in which what must not come would come.
A_WHILE = 0.3


def silent(end):
    """Whether nothing but signs of life comes for a while."""
    while select.select([end.sock], [], [], A_WHILE)[0]:
        if end.hear().kind not in (ALIVE, STATE):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# A server

def take_rounds(client, count):
    """READY to whatever is announced, until so many rounds were SENT: (those that were announced, messages of SENT)."""
    announced, sent = [], []
    while len(announced) < count or len(sent) < count:
        message = client.expect(INFO, SENT)
        if message.kind == SENT:
            sent.append(message)
        else:
            announced.append(message.round)
            client.say(SESSION.ready(message.round))
    return announced, sent


class Watched(object):
    """A real server with an image of some rounds, a client of ours, and what it multicasts."""

    def __init__(self, rounds, args=(), python=None, window=4, clients=1):
        self.port = helpers.free_port()
        self.data = helpers.random_bytes(rounds * ROUND - 100, seed=rounds)
        self.group = helpers.group_socket(helpers.GROUP, self.port)
        self.server = helpers.start_server(SMALL + list(args) + [LOOPBACK, clients, self.port], python, stdin=self.data)
        self.client = wire.Client(self.port).greet(window=window)

    def seqs(self):
        """The seqs of the datagrams that have come, repairs left out."""
        seqs = [wire.U32.unpack(datagram[:4])[0] for datagram in helpers.datagrams_in(self.group)]
        return [seq for seq in seqs if not seq & wire.REPAIR_BIT]

    def close(self):
        self.client.close()
        self.group.close()


@pytest.fixture
def watch():
    made = []

    def make(*args, **options):
        made.append(Watched(*args, **options))
        return made[-1]
    yield make
    for watched in made:
        watched.close()


@BOTH
def test_rounds_are_multicast_while_those_before_are_unanswered(python, watch):
    """Up to as many as a client can hold; the next one is announced when the first is done."""
    watched = watch(6, python=python)
    client = watched.client
    rounds, sent = take_rounds(client, 4)
    assert [what.number for what in rounds] == [0, 1, 2, 3] and [what.place for what in rounds] == [0, ROUND, 2 * ROUND, 3 * ROUND]
    assert [message.round for message in sent] == rounds
    assert [message.digest for message in sent] == [
        hashlib.sha256(watched.data[:number * ROUND]).digest() for number in range(1, 5)]
    assert watched.seqs() == list(range(40))
    assert silent(client), "nobody has answered"
    client.say(SESSION.done(rounds[0]))
    assert client.announced().number == 4
    client.say(SESSION.ready(client.round))
    assert client.expect(SENT).round.number == 4
    client.say(*[SESSION.done(what) for what in rounds[1:] + [client.round]])
    client.say(SESSION.done(client.take_round()))
    assert client.end()["ok"] is True
    assert watched.server.finish(10)[0] == 0


@BOTH
def test_a_client_that_holds_one_round_makes_one_follow_the_other(python, watch):
    """For everybody: the next is announced when all are through with the one before."""
    watched = watch(3, python=python, window=1, clients=2)
    real = helpers.start_client([LOOPBACK, LOOPBACK, watched.port], python)
    for number in range(3):
        assert watched.client.take_round().number == number
        assert silent(watched.client)
        watched.client.done()
    assert watched.client.end()["ok"] is True
    code, stderr, received = real.finish(10)
    same = received == watched.data
    assert code == 0 and same, stderr
    assert watched.server.finish(10)[0] == 0


def test_a_round_is_not_multicast_before_all_have_room_for_it(watch):
    watched = watch(6)
    client = watched.client
    rounds = [client.announced() for _ in range(4)]
    client.say(SESSION.ready(rounds[0]), SESSION.ready(rounds[1]), SESSION.ready(rounds[3]))
    assert [client.expect(SENT).round.number for _ in range(2)] == [0, 1]
    assert silent(client) and watched.seqs() == list(range(20)), "there is no room for the third yet"
    client.say(SESSION.ready(rounds[2]))
    assert [client.expect(SENT).round.number for _ in range(2)] == [2, 3]


def test_each_round_is_repaired_for_itself(watch):
    """What is asked for of one is answered while another is still to be answered for."""
    watched = watch(6, ["--unicast"])
    client = watched.client
    rounds, _ = take_rounds(client, 4)
    for what, places in ((rounds[1], [3, 9]), (rounds[0], range(10)), (rounds[3], [0])):
        client.say(SESSION.request(what, places))
        assert client.expect(PACKETS).round == what
        start = what.place // PAYLOAD
        assert client.packets(places, what) == [wire.cut(watched.data, PAYLOAD)[start + place] for place in places]
        client.say(SESSION.done(what))
    client.say(SESSION.done(rounds[2]))
    assert client.announced().number == 4


def test_what_comes_for_a_round_that_is_through_ends_that_client_only(watch):
    """Its number is known, but nothing is owed for it any more."""
    watched = watch(6, clients=2)
    real = helpers.start_client([LOOPBACK, LOOPBACK, watched.port])
    client = watched.client
    what = client.ready()
    assert client.expect(SENT).round == what
    client.say(2 * SESSION.done(what))
    assert "out of turn" in client.reason(passing=(INFO, SENT))
    code, stderr, received = real.finish(10)
    same = received == watched.data
    assert code == 0 and same, stderr
    assert watched.server.finish(10)[0] == 3


@in_turn("at_last", [False, True], ids=["for ever", "for long"])
def test_a_client_that_leaves_one_round_open_does_not_disturb_the_others(at_last, python, watch):
    """However many later ones it is through with meanwhile."""
    watched = watch(40, ["--stall-timeout", 2], python=python, clients=2)
    real = helpers.start_client([LOOPBACK, LOOPBACK, watched.port], python)
    client, through = watched.client, 0
    message = client.expect(INFO)
    first = message.round
    while message.kind != BYE:
        if message.kind == INFO:
            client.say(SESSION.ready(message.round))
        elif message.round != first:            # SENT
            client.say(SESSION.done(message.round))
            through += 1
        if at_last and through == 20:
            client.say(SESSION.done(first))
            through += 1
        message = client.expect(INFO, SENT, BYE)
    if at_last:
        assert message.fields["ok"] is True, message
        client.say(SESSION.done(wire.IMAGE))
    else:
        assert through > 8 and "stalled" in message.fields["reason"]
    code, stderr, received = real.finish(20)
    same = received == watched.data
    assert code == 0 and same, stderr + watched.server.stderr
    code, stderr, _ = watched.server.finish(10)
    assert (code, helpers.summary(watched.server).served) == ((0, 2) if at_last else (3, 1)), stderr


def test_the_base_protocol_has_one_round_under_way():
    """Nothing of the next one comes, by TCP or by multicast, while one of its clients owes an answer."""
    port, data = helpers.free_port(), helpers.random_bytes(2 * ROUND)
    with helpers.group_socket(helpers.GROUP, port) as group:
        server = helpers.start_server(["--compat"] + SMALL + [LOOPBACK, 2, port], stdin=data)
        quick, slow = clients = [wire.Client(port, dialect=BASE) for _ in range(2)]
        for base in (0, 10, 20):
            for client in clients:
                assert client.announced()[2] == base
            assert helpers.datagrams_in(group) == [], "nobody is ready"
            quick.say(BASE.ready(quick.round))
            assert silent(quick) and helpers.datagrams_in(group) == [], "one is not ready"
            slow.say(BASE.ready(slow.round))
            for client in clients:
                client.sent()
            assert len(helpers.datagrams_in(group)) == quick.round.count
            quick.done()
            if quick.round.count:               # else that was the end for this one
                assert select.select([quick.sock], [], [], A_WHILE)[0] == [], "one has not answered"
            slow.done()
        for client in clients:
            client.ended()
            client.close()
        assert server.finish(10)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# A client

DATA = [helpers.random_bytes(size, seed=size) for size in (1000, 500, 700, 300, 450)]
IMAGE = b"".join(DATA)


class Served(object):
    """A real client and the server of ours that it talks to; greeted."""

    def __init__(self, python=None, **welcome):
        self.server = wire.Server(**dict({"window": 4}, **welcome))
        self.client = helpers.start_client(["--wait", 0, LOOPBACK, LOOPBACK, self.server.port], python)
        self.server.accept().greet()

    def check(self):
        """Fail unless it ends well, with the image."""
        self.server.end()
        code, stderr, received = self.client.finish(20)
        same = received == IMAGE[:self.server.size]
        assert code == 0 and same, stderr
        return stderr


@pytest.fixture
def serve():
    made = []

    def make(*args, **options):
        made.append(Served(*args, **options))
        return made[-1].server, made[-1]
    yield make
    for served in made:
        served.server.close()


def damaged(datagram, at=-1):
    """A datagram of which one bit has flipped."""
    datagram = bytearray(datagram)
    datagram[at] ^= 4
    return bytes(datagram)


@BOTH
def test_a_client_has_several_rounds_under_way(python, serve):
    """Each of them at another step: one is repaired, one is being received, and there is room for more."""
    server, served = serve(python)
    first, second, third = server.start_rounds(DATA[:3])
    server.multicast(first, lost=[2, 5])
    server.say(server.sent(first))
    assert server.asked(first) == [2, 5]
    server.multicast(second)
    server.say(server.sent(second))
    server.multicast(third, lost=[0])
    server.give([2, 5], first)
    server.done(first)
    server.done(second)
    server.say(server.sent(third))
    assert server.asked(third) == [0]
    server.give([0], third)
    server.done(third)
    served.check()


def test_rounds_are_done_in_their_order(serve):
    """The second is complete, but is verified only behind the first."""
    server, served = serve()
    first, second = server.start_rounds(DATA[:2])
    server.multicast(first, lost=[0])
    server.multicast(second)
    server.say(server.sent(first), server.sent(second))
    assert server.asked(first) == [0]
    assert silent(server)
    server.give([0], first)
    server.done(first)
    server.done(second)
    served.check()


def test_a_client_has_room_for_as_many_rounds_as_it_says(serve):
    server, served = serve()
    window = server.hello["window"]
    assert window > 1
    rounds = server.start_rounds(DATA[:window])
    for what in rounds:
        server.multicast(what)
        server.say(server.sent(what))
    for what in rounds:
        server.done(what)
    served.check()


def test_datagrams_of_a_round_may_come_late_or_with_those_of_another(serve):
    """Interleaved, behind SENT, and once more when the round is done."""
    server, served = serve()
    first, second = server.start_rounds(DATA[:2])
    both = server.packets(first) + server.packets(second)
    server.cast(*both[::2])
    server.cast(*both[1::4])
    server.cast(*both[3::4])
    server.say(server.sent(first), server.sent(second))
    repair_until_done(server, first, second)
    third = server.start_round(DATA[2])
    server.cast(*both)
    server.multicast(third)
    server.cast(*both)
    server.say(server.sent(third))
    repair_until_done(server, third)
    served.check()


def repair_until_done(server, *rounds):
    """Give what is asked for of these rounds, until all of them are DONE."""
    done = []
    while len(done) < len(rounds):
        message = server.expect(REQUEST, DONE)
        if message.kind == REQUEST:
            server.give(message.places, message.round)
        else:
            done.append(message.round)
    assert tuple(done) == rounds


DAMAGED = {
    "a packet": ([3], -1), "the first": ([0], -1), "the last, which is short": ([9], -1),
    "some": ([0, 4, 5, 9], -1), "all": (list(range(10)), 20),
    "the seq": ([3], 0), "what stands for the checksum": ([3], 4), "the size": ([3], 8)}


@in_turn("what", sorted(DAMAGED))
def test_damaged_packets_cost_a_repair_and_not_the_client(what, python, serve):
    """The digest tells that something is wrong, the server's sums what it is; and just that is asked for.

    A header that is damaged is none of this round.
    """
    server, served = serve(python)
    first = server.start_round(DATA[0][:-50])
    second = server.start_round(DATA[1])
    places, at = DAMAGED[what]
    server.cast(*[damaged(datagram, at) if place in places else datagram
                  for place, datagram in enumerate(server.packets(first))])
    server.say(server.sent(first))
    if not what.startswith("the s") and not what.startswith("what"):
        server.suspected(first)
    assert server.asked(first) == places
    server.multicast(second)
    server.say(server.sent(second))
    server.give(places, first)
    repair_until_done(server, first, second)
    server.end()
    code, stderr, received = served.client.finish(20)
    assert code == 0 and received == DATA[0][:-50] + DATA[1], stderr


@BOTH
def test_what_is_damaged_again_is_asked_for_again(python, serve):
    """By multicast, and then by TCP."""
    server, served = serve(python)
    first = server.start_round(DATA[0])
    server.cast(*[damaged(datagram) if place in (3, 4) else datagram for place, datagram in enumerate(server.packets())])
    server.say(server.sent())
    server.suspected()
    assert server.asked() == [3, 4]
    payloads = server.payloads()
    server.say(SESSION.packets(first, [payloads[3], damaged(payloads[4])]))
    server.suspected()
    assert server.asked() == [4]
    server.give([4])
    server.done()
    served.check()


@BOTH
def test_a_round_that_differs_from_its_digest_and_not_from_the_sums_ends_the_transfer(python, serve):
    server, served = serve(python)
    server.start_round(DATA[0])
    server.hash.update(b"x")
    server.multicast()
    server.say(SESSION.sent(server.round, server.hash.digest()))
    server.suspected()
    assert "digest" in server.reason()
    code, stderr, received = served.client.finish(20)
    assert code == 1 and received == b"" and "the digest differs" in stderr, stderr


@pytest.mark.parametrize("sums", [lambda right: right[:-1], lambda right: right + [0]], ids=["too few", "too many"])
def test_sums_of_another_count_than_the_rounds_are_a_protocol_error(sums, serve):
    server, served = serve()
    server.start_round(DATA[0])
    server.cast(*[damaged(datagram) for datagram in server.packets()])
    server.say(server.sent())
    server.expect(wire.SUMS)
    server.say(SESSION.sums(server.round, sums(wire.sums_of(server.payloads()))))
    assert "protocol error" in server.reason()
    assert served.client.finish(20)[0] == 1


@BOTH
def test_a_server_tells_the_sums_of_a_round_to_who_asks_for_them(python, watch):
    """Of the round that is named, as often as that goes; it still waits for the answer."""
    watched = watch(2, ["--unicast"], python)
    client, pieces = watched.client, wire.cut(watched.data, PAYLOAD)
    rounds, _ = take_rounds(client, 2)
    for what in (rounds[1], rounds[0], rounds[1]):
        client.say(SESSION.ask_for_sums(what))
        message = client.expect(wire.SUMS)
        first = what.place // PAYLOAD
        assert (message.round, message.sums) == (what, wire.sums_of(pieces[first:first + what.count]))
    for what in rounds:
        client.say(SESSION.done(what))
    client.end()


def test_what_was_damaged_is_repaired_by_multicast_too(serve):
    """By a combination with packets that are right; the sums tell which are."""
    server, served = serve()
    server.start_round(DATA[0])
    datagrams = server.packets()
    server.cast(*[damaged(datagram) if place == 3 else datagram for place, datagram in enumerate(datagrams)])
    server.say(server.sent())
    server.suspected()
    assert server.asked() == [3]
    payloads = wire.cut(DATA[0], server.payload)
    recipes, coded = wire.repair_pass(payloads, [[1, 3, 8]], 70, server.payload)
    server.say(server.again(70, len(recipes), len(coded)))
    server.cast(*[server.repair(70 + number, payload) for number, payload in enumerate(recipes + coded)])
    server.say(server.sent())
    server.done()
    served.check()


def test_a_repair_from_a_damaged_packet_is_asked_for_again(serve):
    """It was lost, and was solved for with one that was damaged, which nobody knew."""
    server, served = serve()
    server.start_round(DATA[0])
    datagrams = server.packets()
    server.cast(*[damaged(datagram) if place == 3 else datagram for place, datagram in enumerate(datagrams) if place != 1])
    server.say(server.sent())
    assert server.asked() == [1]
    payloads = wire.cut(DATA[0], server.payload)
    recipes, coded = wire.repair_pass(payloads, [[1, 3]], 0, server.payload)
    server.say(server.again(0, len(recipes), len(coded)))
    server.cast(*[server.repair(number, payload) for number, payload in enumerate(recipes + coded)])
    server.say(server.sent())
    server.suspected()
    assert server.asked() == [1, 3]
    server.give([1, 3])
    server.done()
    served.check()


def test_without_a_digest_each_packet_is_checked_as_it_comes(serve):
    server, served = serve(digest=None)
    server.start_round(DATA[0])
    server.cast(*[damaged(datagram) if place == 3 else datagram for place, datagram in enumerate(server.packets())])
    server.say(server.sent())
    assert server.asked() == [3]
    server.give([3])
    server.done()
    served.check()


def test_repair_datagrams_may_overtake_their_announcement(serve):
    """Multicast and TCP go different ways."""
    server, served = serve()
    server.send_round(DATA[0], lost=[1, 3])
    assert server.asked() == [1, 3]
    payloads = wire.cut(DATA[0], server.payload)
    recipes, coded = wire.repair_pass(payloads, [[1], [3]], 0, server.payload)
    server.cast(*[server.repair(number, payload) for number, payload in enumerate(recipes + coded)])
    server.say(server.again(0, len(recipes), len(coded)), server.sent())
    server.done()
    served.check()


@in_turn("digest", ["sha256", None])
def test_datagrams_are_taken_from_the_source_only(digest, python, serve):
    """Who knows the salts can forge them with right checksums, and then no digest could tell which are wrong."""
    server, served = serve(python, digest=digest)
    stranger = wire.group_sender(server.group, server.port)
    server.start_round(DATA[0])
    for place, payload in enumerate(wire.cut(DATA[0], server.payload)):
        stranger.send(wire.packet(place, b"f" * len(payload), server.salt, server.check))
    server.multicast(lost=[4])
    for datagram in server.packets():
        stranger.send(datagram)         # not even if it is right
    server.say(server.sent())
    assert server.asked() == [4]
    stranger.close()
    server.give([4])
    server.done()
    served.check()


def test_what_a_client_says_of_its_reception_is_what_it_heard(serve):
    """The packets of the head and of the second half of a round, behind the first message of each, and the time that took."""
    server, served = serve()
    data = helpers.random_bytes(160 * server.payload)
    server.start_round(data)
    for datagram in server.packets():
        server.udp.send(datagram)
        select.select([], [], [], 0.0005)       # one by one, and not joined by the kernel
    server.say(server.sent())
    figures = server.done().figures
    assert figures[0] == 160 and 0 < figures[1] < 40 and 0 < figures[3] < 80
    assert figures[2] > 0 and figures[4] > 0
    server.end()
    code, stderr, received = served.client.finish(20)
    assert code == 0 and received == data, stderr


def test_a_client_that_hears_nothing_says_so(serve):
    server, served = serve()
    server.start_round(DATA[0])
    server.say(server.sent())
    message = server.expect(REQUEST)
    assert message.places == list(range(10)) and message.figures == wire.NO_FIGURES
    server.give(message.places)
    server.done()
    served.check()


# ---------------------------------------------------------------------------------------------------------------------
# Another version

@in_turn("version", [1, wire.VERSION + 1])
def test_a_server_of_another_version_gets_one_clear_line(version, python, tmp_path):
    server = wire.Server()
    client = helpers.start_client(["--wait", 0, "-o", tmp_path / "image", LOOPBACK, LOOPBACK, server.port], python)
    server.accept()
    server.say(server.group_info(padding=wire.MAGIC + bytes(bytearray([version, 0]))))
    code, stderr, _ = client.finish(10)
    server.close()
    assert code == 3 and list(tmp_path.iterdir()) == []
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and "version %d" % version in errors[0] and "version %d" % wire.VERSION in errors[0], stderr


@BOTH
def test_a_client_of_version_1_gets_one_clear_line(python):
    """It sees the version in the group info; one that does not look says HELLO without a window, and is told."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data")
    old = wire.Client(port)
    old.say(wire.frame(wire.HELLO, {"version": "1.0.0", "host": "old"}))
    assert "window" in old.reason()
    old.close()
    assert helpers.start_client([LOOPBACK, LOOPBACK, port], python).finish(10)[::2] == (0, b"data")
    code, stderr, _ = server.finish(10)
    assert code == 0 and len([line for line in stderr.splitlines() if "window" in line]) == 1, stderr
