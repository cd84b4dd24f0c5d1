"""The client's parts by themselves: the rounds in flight, and the thread that verifies and writes."""

import hashlib

import pytest

import helpers
import kmcast

PAYLOAD, SALT, REPAIR_SALT, BASE = 100, 77, 78, 5
COUNT = 21                              # packets in a round of the tests
WIRE = kmcast.SessionDialect
NO_FIGURES = (0, 0, 0, 0)
LATER = 1.0                             # seconds, after which nobody waits for stragglers


class Image(object):
    """An image of rounds as the server has them; the last packet of the last one is short.

    digest      whether a digest covers each round
    """

    def __init__(self, rounds, base=BASE, digest=True):
        self.digest = digest
        self.data = helpers.random_bytes(rounds * COUNT * PAYLOAD - 70)
        self.buffers, self.digests = [], []
        size = COUNT * PAYLOAD
        for number in range(rounds):
            buffer = kmcast.Buffer(PAYLOAD, COUNT, SALT, () if digest else WIRE.checks)
            buffer.start(base + number * COUNT, 0, 0)
            part = self.data[number * size:(number + 1) * size]
            for start in range(0, len(part), PAYLOAD):
                buffer.add(part[start:start + PAYLOAD])
            self.buffers.append(buffer)
            self.digests.append(hashlib.sha256(self.data[:(number + 1) * size]).digest())

    def info(self, number):
        buffer = self.buffers[number]
        return WIRE.info(number, buffer.size, buffer.base, buffer.count, number * COUNT * PAYLOAD)

    def sent(self, number):
        return WIRE.sent(number, self.digests[number] if self.digest else b"")

    def sums(self, number):
        return WIRE.sums(number, self.buffers[number].sums())

    def packet(self, number, place):
        buffer = self.buffers[number]
        return bytearray(buffer.get(buffer.base + place).tobytes())

    def by_tcp(self, number, place):
        """A packet as it comes behind PACKETS."""
        return bytes(self.packet(number, place)[12 if self.digest else 0:])


IMAGE = Image(4)
PLAIN = Image(4, digest=False)


def batch(*packets):
    """Packets of one size as a DatagramReceiver gives them."""
    assert len(set(map(len, packets))) == 1
    return bytearray(b"").join(packets), 0, len(packets), len(packets[0]) - 12


def arrive(window, number, places, image=IMAGE, now=0.0):
    """Packets of a round arrive, one a message; returns whether any was of use."""
    return [window.take([batch(image.packet(number, place))], 1, now, now) for place in places]


@pytest.fixture
def window():
    return kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT), digest=True)


@pytest.fixture
def plain():
    """A window of a session without digests."""
    return kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT))


@pytest.fixture(params=[IMAGE, PLAIN], ids=["digest", "checksums"])
def either(request):
    """(a window, its image): with digests, and without."""
    return kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT), digest=request.param.digest), request.param


def begin(window, *numbers):
    """Announce rounds; returns what there is to do, without the first `begin`."""
    todo = [thing for number in numbers or (0,) for thing in window.heard(IMAGE.info(number), 1.0)]
    return [thing for thing in todo if thing != ("begin", None)]


def ask_for_sums(number):
    return ("send", WIRE.ask_for_sums(number))


def ready(*numbers):
    return [("send", WIRE.ready(number)) for number in numbers]


def request(number, *places, **options):
    figures = (options.get("heard", COUNT - len(places)),) + NO_FIGURES
    return ("send", WIRE.request(number, figures, sum(1 << place for place in places), 0, COUNT))


def done(number, heard=COUNT):
    return ("send", WIRE.done(number, (heard,) + NO_FIGURES))


def answered(window, number, lost=(), image=IMAGE):
    """A round is multicast, with some packets lost, and SENT is said; returns what there is to do then.

    All arrives at one time, so that there are no figures.
    """
    arrive(window, number, [place for place in range(COUNT) if place not in lost], image)
    assert window.heard(image.sent(number), 0.0) == []
    return window.tick(LATER)


def by_tcp(window, number, places, step=10**6, image=IMAGE):
    """PACKETS come, some bytes at a time; returns what there is to do then."""
    assert window.heard(WIRE.packets(number), 0.0) == [] and window.size_of(b"any") == 0
    data, todo = b"".join(image.by_tcp(number, place) for place in places), []
    while data:
        assert todo == []
        size = min(step, len(data), len(window.wants))
        window.wants[:size] = data[:size]
        data, todo = data[size:], window.filled(size)
    assert window.wants is None
    return todo


# ---------------------------------------------------------------------------------------------------------------------
# One round

def test_a_round_that_arrives_whole_is_handed_to_the_writer_at_once(window):
    assert window.heard(IMAGE.info(0), 1.0) == [("begin", None)] + ready(0)
    (verb, incoming), = answered(window, 0)
    assert (verb, incoming.number, incoming.size, incoming.digest) == ("write", 0, COUNT * PAYLOAD, IMAGE.digests[0])
    assert helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]
    assert window.by_multicast == COUNT


def test_done_is_said_only_after_the_writer_has_verified_the_round(window):
    begin(window)
    (verb, incoming), = answered(window, 0)
    assert verb == "write" and window.tick(100.0) == [] and window.owing == "writing"
    assert window.verified(incoming) == [done(0)]
    assert window.owing is None and window.unwritten == 1
    assert window.written() == [] and window.unwritten == 0


def test_without_digests_it_is_done_when_nothing_is_missing(plain):
    begin(plain)
    arrive(plain, 0, range(COUNT), PLAIN)
    assert plain.heard(WIRE.sent(0, b""), 0.0) == []
    first, (verb, incoming) = plain.tick(0.0)
    assert (first, verb, incoming.number) == (done(0), "write", 0)


def test_without_digests_a_packet_with_a_wrong_checksum_does_not_get_in(plain):
    begin(plain)
    damaged = PLAIN.packet(0, 3)
    damaged[50] ^= 1
    assert not plain.take([batch(damaged)], 1, 0.0, 0.0)
    assert plain.rounds[0].buffer.damaged == 1


def test_a_packet_of_the_other_kind_does_not_get_in(window, plain):
    """With a checksum where a digest covers the round, and the other way round."""
    for each, other in ((window, PLAIN), (plain, IMAGE)):
        begin(each)
        assert arrive(each, 0, [3], other) == [False]
        assert each.rounds[0].buffer.damaged == 1


def test_stragglers_are_waited_for_a_moment_and_then_asked_for(window):
    begin(window)
    arrive(window, 0, [place for place in range(COUNT - 2) if place != 3])
    window.heard(IMAGE.sent(0), 3.0)
    assert window.tick(3.0) == [] and 3.0 < window.deadline < 3.1
    arrive(window, 0, [COUNT - 2])
    assert window.tick(3.0 + window.SETTLE / 2) == []
    assert window.tick(window.deadline) == [request(0, 3, COUNT - 1)]
    assert window.deadline is None and window.owing is None


def test_nobody_is_waited_for_who_cannot_come(window):
    """The first and the last packet are there: what is missing in between was lost."""
    begin(window)
    arrive(window, 0, [place for place in range(COUNT) if place != 3])
    window.heard(IMAGE.sent(0), 3.0)
    assert window.tick(3.0) == [request(0, 3)]


def test_nor_where_packets_of_a_later_round_have_come(window):
    begin(window, 0, 1)
    arrive(window, 0, range(5))
    window.heard(IMAGE.sent(0), 3.0)
    assert window.tick(3.0) == []
    arrive(window, 1, [0])
    assert window.tick(3.0) == [request(0, *range(5, COUNT))]


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("digest", [True, False])
def test_packets_by_tcp_fill_what_is_missing_however_they_arrive(step, digest):
    image = Image(1, digest=digest)     # with a short packet at the end
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT), digest=digest)
    window.heard(image.info(0), 0.0)
    lost = [0, 1, 2, 7, COUNT - 1]
    arrive(window, 0, [place for place in range(COUNT) if place not in lost], image)
    window.heard(image.sent(0), 0.0)
    assert window.tick(LATER) == [request(0, *lost)]
    todo = by_tcp(window, 0, lost, step, image)
    assert todo[:-1] == ([] if digest else [done(0, heard=COUNT - 5)])
    verb, incoming = todo[-1]
    assert verb == "write" and helpers.data_of(incoming.buffer) == image.data
    assert window.by_tcp == 5


def test_what_keeps_the_server_waiting_is_known(window):
    begin(window)
    assert window.owing is None
    answered(window, 0, lost=[4])
    assert window.owing is None, "that is the server's turn"
    window.heard(WIRE.packets(0), 0.0)
    assert window.owing == "receiving"


@pytest.mark.parametrize("wrong", [1, 5])
def test_other_packets_than_those_asked_for_are_an_error(plain, wrong):
    begin(plain)
    answered(plain, 0, [0], PLAIN)
    with pytest.raises(kmcast.ProtocolError):
        by_tcp(plain, 0, [wrong], image=PLAIN)


@pytest.mark.parametrize("place", [4, 8, 12, 50, 111], ids=["checksum", "size", "first byte", "a byte", "last byte"])
def test_a_damaged_packet_by_tcp_is_an_error_where_nothing_else_tells(plain, place):
    begin(plain)
    answered(plain, 0, [0], PLAIN)
    plain.heard(WIRE.packets(0), 0.0)
    wrong = bytearray(PLAIN.by_tcp(0, 0))
    wrong[place] ^= 1
    with pytest.raises(kmcast.ProtocolError):
        while wrong:
            size = len(plain.wants)
            plain.wants[:] = wrong[:size]
            wrong = wrong[size:]
            plain.filled(size)


def test_where_a_digest_tells_it_is_found_by_that(window):
    begin(window)
    answered(window, 0, lost=[0])
    window.heard(WIRE.packets(0), 0.0)
    window.wants[:] = b"x" * PAYLOAD
    (verb, incoming), = window.filled(PAYLOAD)
    assert verb == "write"
    assert window.damaged(incoming) == [ask_for_sums(0)]
    assert window.heard(IMAGE.sums(0), 0.0) == [request(0, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Rounds in flight

def test_a_second_round_is_ready_and_received_while_the_first_is_unanswered(window):
    assert begin(window, 0) == ready(0)
    arrive(window, 0, range(5, COUNT))
    assert begin(window, 1) == ready(1)
    assert all(arrive(window, 1, range(COUNT)))
    window.heard(IMAGE.sent(0), 0.0)
    window.heard(IMAGE.sent(1), 0.0)
    assert window.tick(LATER) == [request(0, *range(5))], "the second one waits for its turn to be written"
    todo = by_tcp(window, 0, range(5))
    assert [(verb, incoming.number) for verb, incoming in todo] == [("write", 0), ("write", 1)]
    assert [window.verified(incoming) for _, incoming in todo] == [[done(0, heard=COUNT - 5)], [done(1)]]


def test_packets_go_to_the_round_that_they_are_of(window):
    """One batch may have the end of one round and the beginning of the next, and what is of none."""
    begin(window, 0, 1)
    mixed = [IMAGE.packet(number, place) for number, place in ((0, 19), (0, 20), (1, 0), (1, 1), (3, 0), (0, 2))]
    assert window.take([batch(*mixed)], 1, 0.0, 0.0)
    assert [kmcast.places(incoming.buffer.missing()) for incoming in window.rounds] == [
        [place for place in range(COUNT) if place not in (2, 19, 20)], list(range(2, COUNT))]
    assert arrive(window, 1, [1, 0]) == [False, False], "what is there already is of no use"
    assert arrive(window, 2, [0]) == [False]


def test_packets_of_a_round_that_was_answered_for_are_of_no_use(window):
    begin(window, 0, 1)
    answered(window, 0, lost=[3])
    assert arrive(window, 0, [3]) == [False]
    assert arrive(window, 1, [3]) == [True]


def test_rounds_may_be_repaired_in_any_order_but_are_written_in_theirs(window):
    begin(window, 0, 1, 2)
    assert [answered(window, number, lost=[number + 1]) for number in range(3)] == [
        [request(number, number + 1)] for number in range(3)]
    assert by_tcp(window, 2, [3]) == [] and by_tcp(window, 1, [2]) == []
    assert [incoming.number for _, incoming in by_tcp(window, 0, [1])] == [0, 1, 2]


def test_no_more_rounds_are_ready_than_there_are_buffers(window):
    window.room = 2
    assert begin(window, 0, 1, 2) == ready(0, 1)
    (_, first), = answered(window, 0)
    assert window.owing == "writing"
    assert window.verified(first) == [done(0)], "but its buffer is still being written"
    assert window.written() == ready(2)


def test_a_round_that_is_announced_early_is_ready_once_its_turn_has_come(window):
    window.room = 1
    assert begin(window, 0, 1, 2) == ready(0)
    for number in range(3):
        (_, incoming), = answered(window, number)
        assert window.verified(incoming) == [done(number)]
        assert window.written() == (ready(number + 1) if number < 2 else [])


def test_more_rounds_than_twice_the_window_are_an_error(window):
    image = Image(2 * WIRE.window + 1)
    for number in range(2 * WIRE.window):
        window.heard(image.info(number), 0.0)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(image.info(2 * WIRE.window), 0.0)


def test_seqs_wrap_between_rounds(window):
    image = Image(2, base=2**31 - COUNT)
    image.buffers[1].start(0, 0, 0)
    for start in range(COUNT * PAYLOAD, len(image.data), PAYLOAD):
        image.buffers[1].add(image.data[start:start + PAYLOAD])
    window.heard(image.info(0), 0.0)
    assert window.heard(image.info(1), 0.0) == ready(1)
    arrive(window, 0, range(COUNT), image)
    arrive(window, 1, range(COUNT), image)
    assert [incoming.buffer.missing() for incoming in window.rounds] == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Packets that come straight to their place

def straight(window, number, first, last, now=0.0):
    """Packets of a round come straight to their place, as one message; returns whether they were of use."""
    buffer = [incoming for incoming in window.rounds if incoming.number == number][0].buffer
    for place in range(first, last):
        payload = IMAGE.packet(number, place)[12:]
        buffer.payloads[place * PAYLOAD:place * PAYLOAD + len(payload)] = payload
    return window.take([(buffer, first, last - first, PAYLOAD)], last - first, now, now)


def aim(window):
    """(number of the round, place) where packets are expected; None if they are expected nowhere."""
    if window.aim is None:
        return None
    buffer, place = window.aim
    return [incoming.number for incoming in window.rounds if incoming.target is buffer][0], place


def test_packets_that_came_straight_to_their_place_are_taken(window):
    begin(window, 0)
    assert straight(window, 0, 0, 8) and not straight(window, 0, 0, 8)
    assert straight(window, 0, 5, COUNT)
    window.heard(IMAGE.sent(0), 0.0)
    (verb, incoming), = window.tick(0.0)
    assert verb == "write" and helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]
    assert window.by_multicast == COUNT


def test_packets_are_expected_behind_those_that_came_last(window):
    assert aim(window) is None
    begin(window, 0, 1)
    assert aim(window) == (0, 0)
    arrive(window, 0, range(5))
    assert aim(window) == (0, 5)
    straight(window, 0, 5, 9)
    assert aim(window) == (0, 9)
    arrive(window, 1, [3])
    assert aim(window) == (1, 4), "the rest of the round before was lost"
    arrive(window, 0, [COUNT - 1])
    assert aim(window) is None, "the next one has begun already"


def test_behind_a_round_the_next_is_expected(window):
    begin(window, 0, 1)
    straight(window, 0, 0, COUNT)
    assert aim(window) == (1, 0)
    straight(window, 1, 0, COUNT)
    assert aim(window) is None
    begin(window, 2)
    assert aim(window) == (2, 0)


@pytest.mark.parametrize("there", [6, 13, COUNT - 1])
def test_nothing_is_expected_where_something_is_that_could_be_written_over(window, there):
    begin(window)
    arrive(window, 0, [there, 2])
    assert aim(window) is None
    assert arrive(window, 0, [there - 1, 4, there]) == [True, True, False]


def test_no_packet_is_expected_of_a_round_that_was_answered_for(window):
    begin(window, 0)
    arrive(window, 0, range(5))
    window.heard(IMAGE.sent(0), 0.0)
    assert aim(window) == (0, 5), "stragglers may come"
    window.tick(LATER)
    assert aim(window) is None
    by_tcp(window, 0, range(5, COUNT))
    assert aim(window) is None


def test_repair_datagrams_are_expected_in_their_pass(window):
    begin(window, 0)
    answered(window, 0, lost=[3, 8])
    again, datagrams = repair(0, [[3, 5], [8, 2]])
    window.heard(again, 0.0)
    coded, place = window.aim
    assert place == 0 and coded is not window.rounds[0].buffer
    for index, datagram in enumerate(datagrams):
        coded.payloads[index * PAYLOAD:(index + 1) * PAYLOAD] = datagram[12:]
    assert window.take([(coded, 0, 3, PAYLOAD)], 3, 0.0, 0.0)
    window.heard(IMAGE.sent(0), 0.0)
    (verb, incoming), = window.tick(0.0)
    assert verb == "write" and helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]


def test_where_checksums_have_to_be_checked_nothing_comes_straight_to_its_place(plain):
    begin(plain)
    arrive(plain, 0, range(3), PLAIN)
    assert plain.aim is None


# ---------------------------------------------------------------------------------------------------------------------
# Digests

def damage(window, number, place):
    """A packet whose checksum does not fit, which only the digest tells."""
    damaged = IMAGE.packet(number, place)
    damaged[50] ^= 1
    assert window.take([batch(damaged)], 1, 0.0, 0.0)


class Told(object):
    """A reader of events that keeps them."""

    def __init__(self):
        self.events = []

    def happened(self, what, facts):
        self.events.append((what, facts))


@pytest.fixture
def told(monkeypatch):
    reader = Told()
    monkeypatch.setattr(kmcast.tell, "readers", [reader])
    return reader.events


def test_a_round_whose_digest_differs_asks_for_its_damaged_packets_only(window, told):
    begin(window)
    damage(window, 0, 9)
    (_, incoming), = answered(window, 0)
    assert window.damaged(incoming) == [ask_for_sums(0)]
    assert not window.writing and window.owing is None, "that is the server's turn"
    assert window.tick(100.0) == [] and told == []
    assert window.heard(IMAGE.sums(0), 0.0) == [request(0, 9, heard=COUNT)]
    assert told == [("damaged", {"round": 0, "count": 1})]
    assert not window.writing and incoming.buffer.damaged == 1
    assert by_tcp(window, 0, [9]) == [("write", incoming)]
    assert window.writing and helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]
    assert window.verified(incoming) == [done(0)]
    assert window.unwritten == 1


def test_a_round_that_is_damaged_once_more_asks_once_more(window):
    begin(window)
    damage(window, 0, 9)
    (_, incoming), = answered(window, 0)
    for _ in range(3):
        assert window.damaged(incoming) == [ask_for_sums(0)]
        assert window.heard(IMAGE.sums(0), 0.0) == [request(0, 9, heard=COUNT)]
        window.heard(WIRE.packets(0), 0.0)
        window.wants[:] = b"x" * PAYLOAD
        assert window.filled(PAYLOAD) == [("write", incoming)]
    assert incoming.buffer.damaged == 3
    window.damaged(incoming)
    window.heard(IMAGE.sums(0), 0.0)
    by_tcp(window, 0, [9])
    assert helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]


def test_what_differs_from_its_digest_and_not_from_the_sums_is_asked_for_no_more(window, told):
    """Nobody could send it better; what there was before may be wrong, or the transfer has failed."""
    begin(window)
    (_, incoming), = answered(window, 0)
    window.damaged(incoming)
    assert window.heard(IMAGE.sums(0), 0.0) == [("differs", incoming)] and told == []
    assert window.verified(incoming)[0][0] == "send", "if the writer finds it right after all"


@pytest.mark.parametrize("count", [1, COUNT - 1, COUNT + 1])
def test_sums_of_another_number_of_packets_are_an_error(window, count):
    begin(window)
    damage(window, 0, 9)
    (_, incoming), = answered(window, 0)
    window.damaged(incoming)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(WIRE.sums(0, list(range(count))), 0.0)


def test_multicast_does_not_touch_a_round_whose_digest_differs(window):
    """Datagrams of it may still come; the writer, or TCP, has it."""
    begin(window)
    damage(window, 0, 9)
    (_, incoming), = answered(window, 0)
    window.damaged(incoming)
    assert arrive(window, 0, [9]) == [False]
    window.heard(IMAGE.sums(0), 0.0)
    assert arrive(window, 0, [9]) == [False]
    assert by_tcp(window, 0, [9]) == [("write", incoming)]


def test_a_later_round_waits_while_a_damaged_one_is_asked_for(window):
    begin(window, 0, 1)
    damage(window, 0, 9)
    (_, first), = answered(window, 0)
    (_, second), = answered(window, 1)
    assert window.damaged(first) == [ask_for_sums(0)]
    assert window.heard(IMAGE.sums(0), 0.0) == [request(0, 9, heard=COUNT)]
    assert by_tcp(window, 0, [9]) == [("write", first)], "the second one has been given already"
    assert window.verified(first) + window.verified(second) == [done(0), done(1)]


def test_a_damaged_round_takes_one_buffer(window):
    window.room = 2
    assert begin(window, 0) == ready(0)
    damage(window, 0, 9)
    (_, first), = answered(window, 0)
    window.damaged(first)
    assert begin(window, 1, 2) == ready(1)
    window.heard(IMAGE.sums(0), 0.0)
    assert window.tick(100.0) == []


# ---------------------------------------------------------------------------------------------------------------------
# Coded repair

def repair(number, groups, first=70, image=IMAGE):
    """(AGAIN, the datagrams) of a pass."""
    coded, recipe_count = list(kmcast.encode_repair(image.buffers[number], groups, first, REPAIR_SALT))[-1]
    return (WIRE.again(number, first, recipe_count, len(groups)),
            [bytearray(coded.get(2**31 + first + place).tobytes()) for place in range(coded.count)])


def test_what_is_asked_for_may_come_again_by_multicast(either):
    window, image = either
    begin(window)
    answered(window, 0, [3, 8], image)
    again, datagrams = repair(0, [[3, 5], [8, 2]], image=image)
    assert window.heard(again, 0.0) == []
    for datagram in datagrams:
        assert window.take([batch(datagram)], 1, 0.0, 0.0)
    window.heard(image.sent(0), 0.0)
    verb, incoming = window.tick(0.0)[-1]
    assert verb == "write" and helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]
    assert window.coded == 2 and window.by_multicast == COUNT - 2


def test_what_a_pass_does_not_give_is_asked_for_again(either):
    window, image = either
    begin(window)
    answered(window, 0, [3, 8], image)
    again, datagrams = repair(0, [[3, 5], [8, 2]], image=image)
    window.heard(again, 0.0)
    for datagram in datagrams[:2]:
        window.take([batch(datagram)], 1, 0.0, 0.0)
    window.heard(image.sent(0), 0.0)
    assert window.tick(LATER) == [request(0, 8, heard=COUNT - 2)]


def test_repair_datagrams_may_overtake_again(window):
    begin(window, 0, 1)
    answered(window, 0, lost=[3, 8])
    again, datagrams = repair(0, [[3, 5], [8, 2]])
    for datagram in datagrams:
        assert not window.take([batch(datagram)], 1, 0.0, 0.0)
    window.heard(again, 0.0)
    window.heard(IMAGE.sent(0), 0.0)
    (verb, incoming), = window.tick(0.0)
    assert (verb, incoming.number) == ("write", 0) and window.coded == 2


def test_a_pass_goes_on_while_the_next_round_comes(window):
    begin(window, 0, 1)
    answered(window, 0, lost=[3])
    again, datagrams = repair(0, [[3]])
    window.heard(again, 0.0)
    for datagram in datagrams:
        arrive(window, 1, range(5))
        window.take([batch(datagram)], 1, 0.0, 0.0)
    arrive(window, 1, range(5, COUNT))
    window.heard(IMAGE.sent(0), 0.0)
    window.heard(IMAGE.sent(1), 0.0)
    assert [(verb, incoming.number) for verb, incoming in window.tick(0.0)] == [("write", 0), ("write", 1)]


def test_packets_that_were_recovered_are_suspects_where_the_digest_differs(window):
    """They may be made from a damaged one."""
    begin(window)
    damage(window, 0, 5)
    answered(window, 0, lost=[3])
    again, datagrams = repair(0, [[3, 5]])
    window.heard(again, 0.0)
    for datagram in datagrams:
        window.take([batch(datagram)], 1, 0.0, 0.0)
    window.heard(IMAGE.sent(0), 0.0)
    (verb, incoming), = window.tick(0.0)
    assert verb == "write" and window.damaged(incoming) == [ask_for_sums(0)]
    assert window.heard(IMAGE.sums(0), 0.0) == [request(0, 3, 5, heard=COUNT - 1)]
    by_tcp(window, 0, [3, 5])
    assert helpers.data_of(incoming.buffer) == IMAGE.data[:COUNT * PAYLOAD]


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 1, 65536), (2**31 - 1, 1, 1), (2**32 - 1, 1, 1)], ids=repr)
def test_a_repair_pass_that_cannot_be_is_an_error(window, numbers):
    begin(window)
    answered(window, 0, lost=[3])
    with pytest.raises(kmcast.ProtocolError):
        window.heard(WIRE.again(0, *numbers), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The end, and what is out of turn

def test_the_image_ends_with_a_word(window):
    begin(window)
    (_, incoming), = answered(window, 0)
    window.verified(incoming)
    fields = {"ok": True, "bytes": 7, "sha256": "x"}
    assert window.heard(WIRE.bye(**fields), 1.0) == [("end", fields)]
    assert window.over and window.size_of(b"any") == 0


def test_an_empty_image_has_no_rounds_at_all(window):
    assert window.heard(WIRE.bye(ok=True, bytes=0), 1.0) == [("end", {"ok": True, "bytes": 0})]
    assert window.over and window.begun


def test_the_end_is_not_heard_while_a_round_is_under_way(window):
    begin(window)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(WIRE.bye(ok=True), 1.0)


@pytest.mark.parametrize("message", [
    IMAGE.sent(0), WIRE.packets(0), WIRE.again(0, 0, 1, 1), IMAGE.sums(0), kmcast.WELCOME + kmcast.U32.pack(0), b"\x04", b"\x77",
    WIRE.info(0, 10 * PAYLOAD + 1, 0, 10, 0), WIRE.info(0, 9 * PAYLOAD, 0, 10, 0), WIRE.info(0, 0, 0, 0, 0),
    WIRE.info(0, 65537 * PAYLOAD, 0, 65537, 0), WIRE.info(2**31, PAYLOAD, 0, 1, 0), WIRE.info(0, PAYLOAD, 0, 1, 1),
    WIRE.info(0, 2 * PAYLOAD, 2**31 - 1, 2, 0), WIRE.info(0, PAYLOAD, 2**31, 1, 0)], ids=repr)
def test_what_is_out_of_turn_or_impossible_is_an_error(window, message):
    with pytest.raises(kmcast.ProtocolError):
        window.heard(message, 1.0)


@pytest.mark.parametrize("message", [
    IMAGE.info(0), IMAGE.info(2), WIRE.info(1, COUNT * PAYLOAD, BASE + COUNT + 1, COUNT, COUNT * PAYLOAD),
    WIRE.info(1, COUNT * PAYLOAD, BASE + COUNT, COUNT, COUNT * PAYLOAD + 1), IMAGE.sent(1), WIRE.packets(0),
    WIRE.again(0, 0, 1, 1), IMAGE.sums(0)], ids=repr)
def test_so_it_is_in_a_round(window, message):
    begin(window)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(message, 1.0)


@pytest.mark.parametrize("message", [
    IMAGE.sent(0), WIRE.packets(0), WIRE.again(0, 0, 1, 1), IMAGE.sums(1), WIRE.sums(7, [1] * COUNT)], ids=repr)
def test_so_it_is_where_the_digest_differs(window, message):
    begin(window)
    (_, incoming), = answered(window, 0)
    window.damaged(incoming)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(message, 1.0)


def test_sums_that_nobody_asked_for_are_an_error(window):
    begin(window)
    answered(window, 0)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(IMAGE.sums(0), 1.0)


def test_a_farewell_gives_its_reason(window):
    with pytest.raises(kmcast.Refused) as error:
        window.heard(WIRE.bye(ok=False, reason="no client is left\x1b"), 1.0)
    assert error.value.reason == "the server says: no client is left?"
    assert not window.begun


def test_a_farewell_because_of_an_empty_image_is_a_transfer_that_failed(window):
    with pytest.raises(kmcast.Refused):
        window.heard(WIRE.bye(ok=False, reason="nothing", empty=True), 1.0)
    assert window.begun


def test_signs_of_life_and_words_may_come_at_any_time(window):
    assert window.heard(kmcast.ALIVE, 1.0) == []
    begin(window)
    assert window.heard(kmcast.ALIVE, 1.0) == []
    assert window.heard(WIRE.state(waiting="node3"), 1.0) == [("state", {"waiting": "node3"})]


# ---------------------------------------------------------------------------------------------------------------------
# The base protocol

def test_without_a_session_there_are_no_signs_of_life_and_no_signal_before_a_round():
    window = kmcast.ClientWindow(kmcast.BaseDialect, PAYLOAD, checks=[kmcast.plain_crc, kmcast.c_sum])
    assert window.size_of(b"") == 16
    assert ("send", kmcast.READY) in window.heard(kmcast.ROUND.pack(7, 150, 3, 2), 1.0)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(kmcast.ALIVE, 1.0)


def test_a_round_of_the_base_protocol_from_its_beginning_to_the_end():
    window = kmcast.ClientWindow(kmcast.BaseDialect, PAYLOAD, checks=[kmcast.plain_crc, kmcast.c_sum])
    data = helpers.random_bytes(250)
    server = kmcast.Buffer(PAYLOAD, 3, 0, (kmcast.c_sum,))
    server.start(7, 0, 0)
    for start in range(0, 250, PAYLOAD):
        server.add(data[start:start + PAYLOAD])
    packets = [bytearray(server.get(7 + place).tobytes()) for place in range(3)]
    window.heard(kmcast.BaseDialect.info(0, 250, 7, 3, None), 0.0)
    assert window.size_of(b"") == 1
    window.take([batch(packets[1])], 1, 0.0, 0.0)
    assert window.heard(kmcast.SENT, 0.0) == []
    assert window.tick(LATER) == [("send", b"\x02" + b"".join(map(kmcast.U32.pack, (2, 7, 9))))]
    todo = []
    for piece in (packets[0][:12], packets[0][12:], packets[2][:12], packets[2][12:]):
        assert todo == [] and len(window.wants) == len(piece)
        window.wants[:] = piece
        todo = window.filled(len(piece))
    first, (verb, incoming) = todo
    assert (first, verb) == (("send", kmcast.DONE), "write")
    assert helpers.data_of(incoming.buffer) == data
    assert window.written() == [] and window.size_of(b"") == 16
    assert window.heard(kmcast.BaseDialect.info(1, 0, 10, 0, None), 0.0) == [("send", kmcast.READY)]
    assert window.heard(kmcast.SENT, 0.0) == [("end", None)] and window.over


# ---------------------------------------------------------------------------------------------------------------------
# Train

def test_a_train_tells_how_fast_what_follows_its_first_message_came():
    train = kmcast.Train(100, 200)
    assert train.figures() == (0, 0)
    for place, heard, seconds in ((50, 40, 1.0), (100, 80, 2.0), (150, 120, 2.25), (199, 160, 2.5), (200, 161, 9.0)):
        train.note(place, heard, seconds)
    assert train.figures() == (80, 500000)


@pytest.mark.parametrize("notes", [
    [(100, 80, 2.0)], [(100, 80, 2.0), (150, 120, 2.0)], [(100, 80, 2.0), (150, 120, 1.5)], [(100, 80, 2.0), (150, 80, 2.5)],
    [(100, 80, 2.0), (150, 120, 1002.0)]], ids=["one message", "at once", "a clock that was set", "nothing new", "too long"])
def test_a_train_that_does_not_tell_has_no_figures(notes):
    train = kmcast.Train(100, 200)
    for note in notes:
        train.note(*note)
    assert train.figures() == (0, 0)


@pytest.mark.parametrize("way", ["taken apart", "straight to their place"])
def test_a_client_tells_its_figures_of_the_head_and_the_second_half(window, way):
    begin(window)
    for place in range(COUNT):
        if way == "taken apart":
            arrive(window, 0, [place], now=1.0 + place / 1000.0)
        else:
            straight(window, 0, place, place + 1, now=1.0 + place / 1000.0)
    window.heard(IMAGE.sent(0), 0.0)
    (_, incoming), = window.tick(0.0)
    (_, message), = window.verified(incoming)
    head, tail = kmcast.Round.head_of(COUNT), kmcast.Round.tail_of(COUNT)
    figures = WIRE.figures_of(message)
    assert figures[0] == COUNT and figures[1::2] == (head[1] - head[0] - 1, tail[1] - tail[0] - 1)
    assert figures[2] == pytest.approx(1000 * figures[1], abs=2) and figures[4] == pytest.approx(1000 * figures[3], abs=2)


# ---------------------------------------------------------------------------------------------------------------------
# Writer

class Kept(object):
    """A Sink that keeps what it gets."""

    seeks, journal = False, None

    def __init__(self):
        self.data, self.committed = b"", None

    def write(self, data, _place):
        self.data += data.tobytes()

    def commit(self, size):
        self.committed = size


class Given(object):
    """A round as the writer gets it."""

    def __init__(self, data, size=None, hashed=None):
        self.place = 0 if hashed is None else len(hashed) - len(data)
        self.buffer = kmcast.Buffer(100, -(-len(data) // 100))
        self.buffer.start(0, 0, 0)
        for start in range(0, len(data), 100):
            self.buffer.add(data[start:start + 100])
        self.size = len(data) if size is None else size
        self.digest = hashlib.sha256(data if hashed is None else hashed).digest()


def results(writer, count):
    """What the writer says, so many times; it may say more."""
    while len(writer.results) < count:
        writer.link.wait_child()
    return [what for what, _ in writer.results]


@pytest.fixture
def writer():
    copy = kmcast.Copy(Kept())
    copy.begin(None, True)
    thread = kmcast.Writer(copy)
    thread.start()
    yield thread
    thread.close()
    assert not thread.is_alive()


def test_rounds_are_verified_and_written_in_order_and_then_made_final(writer):
    first, second = b"a" * 250, b"b" * 1000
    writer.give(Given(first))
    writer.give(Given(second, hashed=first + second))
    writer.commit()
    assert results(writer, 4) == ["verified", "written"] * 2
    writer.join(5)
    assert writer.copy.sink.data == first + second and writer.copy.sink.committed == 1250 and writer.failure is None
    assert writer.copy.verified == 1250 and writer.copy.hash.digest() == hashlib.sha256(first + second).digest()


def test_a_round_is_verified_before_anybody_gets_a_byte_of_it(writer):
    before = []
    writer.copy.sink.write = lambda data, place: before.append(list(writer.results))
    round_ = Given(b"a" * 250)
    writer.give(round_)
    results(writer, 2)
    assert before[0] == [("verified", round_)]


def test_a_round_of_another_size_than_the_server_says_is_not_written(writer):
    writer.give(Given(b"a" * 250, 249, b"a" * 250))
    with pytest.raises(kmcast.LinkClosed):
        writer.link.wait_child()
    assert writer.copy.sink.data == b"" and not writer.copy.sink.committed
    assert "a round of 250 bytes instead of 249" in writer.failure.reason


def test_a_damaged_round_is_waited_for_and_those_behind_it_too(writer):
    first, second = b"a" * 250, b"b" * 1000
    damaged, good = Given(b"a" * 110 + b"c" + b"a" * 139, hashed=first), Given(first)
    writer.give(damaged)
    writer.give(Given(second, hashed=first + second))
    writer.commit()
    assert results(writer, 1) == ["damaged"]
    assert writer.is_alive() and writer.copy.sink.data == b""
    damaged.buffer = good.buffer
    writer.give(damaged)
    assert results(writer, 5) == ["damaged"] + ["verified", "written"] * 2
    writer.join(5)
    assert writer.copy.sink.data == first + second and writer.copy.sink.committed


def test_a_writer_that_fails_says_why_and_ends(writer):
    def full(data, place):
        raise kmcast.Failure("No space left")
    writer.copy.sink.write = full
    writer.give(Given(b"a" * 250))
    with pytest.raises(kmcast.LinkClosed):
        while True:
            writer.link.wait_child()
    assert writer.failure.reason == "No space left" and not writer.copy.sink.committed


# ---------------------------------------------------------------------------------------------------------------------
# Rounds in any order, and a connection that comes after another

def test_an_output_that_seeks_takes_rounds_wherever_they_are_and_whatever_is_left_out():
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=None)
    for number, base, place in ((5, 900, 7 * PAYLOAD), (6, 910, 0), (9, 5000, 99 * PAYLOAD)):
        todo = window.heard(WIRE.info(number, 10 * PAYLOAD, base, 10, place), 0.0)
        assert ("send", WIRE.ready(number)) in todo
    assert [incoming.place for incoming in window.rounds] == [7 * PAYLOAD, 0, 99 * PAYLOAD]


@pytest.mark.parametrize("message", [
    WIRE.info(5, PAYLOAD, 910, 1, 0), WIRE.info(4, PAYLOAD, 910, 1, 0), WIRE.info(6, PAYLOAD, 911, 1, 0),
    WIRE.info(7, PAYLOAD, 900, 1, 0), WIRE.info(6, PAYLOAD, 910, 1, 2**63 - 1)], ids=repr)
def test_numbers_and_seqs_only_go_on(message):
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=None)
    window.heard(WIRE.info(5, 10 * PAYLOAD, 900, 10, 0), 0.0)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(message, 0.0)


def test_numbers_go_on_from_the_last_one_to_0():
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=None)
    numbers = [2**31 - 2, 2**32 - 3, 2**32 - 1, 0, 3]
    for base, number in enumerate(numbers):
        window.heard(WIRE.info(number, PAYLOAD, base, 1, 0), 0.0)
    assert [incoming.number for incoming in window.rounds] == numbers


def test_who_takes_it_in_order_begins_where_it_was():
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=25)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(WIRE.info(5, PAYLOAD, 0, 1, 26), 0.0)
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=25)
    window.heard(WIRE.info(5, 10 * PAYLOAD, 0, 10, 20), 0.0)
    window.heard(WIRE.info(6, PAYLOAD, 10, 1, 20 + 10 * PAYLOAD), 0.0)
    assert len(window.rounds) == 2


def test_after_the_last_word_more_may_be_lacking_all_the_same():
    window = kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True, place=None)
    window.heard(WIRE.bye(ok=True), 0.0)
    assert window.over and window.size_of(WIRE.bye(ok=True)) == 0
    window.go_on()
    assert not window.over and window.size_of(WIRE.bye(ok=True)) > 0


def test_a_window_that_comes_after_another_counts_on():
    first, second = [kmcast.ClientWindow(WIRE, PAYLOAD, (0, 0), True) for _ in range(2)]
    first.by_multicast, first.by_chain, first.by_tcp, first.coded = 1, 2, 3, 4
    second.take_over(first)
    assert (second.by_multicast, second.by_chain, second.by_tcp, second.coded) == (1, 2, 3, 4)


def test_a_writer_that_is_paused_finishes_what_it_can_and_forgets_what_waits(writer):
    first, second = b"a" * 250, b"b" * 1000
    writer.give(Given(first))
    writer.give(Given(second[:-1] + b"x", hashed=first + second))
    writer.give(Given(b"c" * 10, hashed=first + second + b"c" * 10))
    writer.pause()
    while not writer.through:
        writer.link.wait_child()
    assert writer.copy.verified == 250 and writer.copy.sink.data == first
    writer.go_on()
    writer.give(Given(second, hashed=first + second))
    writer.end(1250, hashlib.sha256(first + second).digest())
    while not writer.through:
        writer.link.wait_child()
    assert writer.copy.verified == 1250 and writer.failure is None
