"""Coded repair: combinations that repair everybody at once, and the ways in which a pass can go wrong."""

import math
import random
import struct
import zlib

import pytest

import helpers
import kmcast
import wire

PAYLOAD = 1460
SALT, REPAIR_SALT = 0x12345678, 0x9abcdef0

#: As kmcast.Buffer takes them: each packet has a checksum, or a digest covers the round.
CRC, DIGEST = (zlib.crc32,), ()
both_modes = pytest.mark.parametrize("checks", [CRC, DIGEST], ids=["checksums", "digest"])


def bits_of(places):
    """Places as bits."""
    return sum(1 << place for place in set(places))


def missing(buffer):
    """The places of what has not come to a client."""
    return kmcast.places(buffer.missing())


def combine(requests, *most):
    """The groups for what each client lacks, lists of places, once all is worked out."""
    groups = None
    for groups in kmcast.combine([bits_of(request) for request in requests], *most):
        pass
    return groups


def losses(clients, packets, share, seed=1):
    """What each of `clients` lost of `packets`, independently: a list of lists of places."""
    generator, places = random.Random(seed), []
    for _ in range(clients):
        places.append([])
        place = -1
        while place < packets:
            place += 1 + int(math.log(1 - generator.random()) / math.log(1 - share))        # so many others come through
            places[-1].append(place)
        places[-1].pop()
    return places


def check_groups(requests, groups):
    """Fail unless groups are what a repair pass needs."""
    members = [index for group in groups for index in group]
    assert sorted(members) == sorted(set(index for request in requests for index in request)), "not all, or more, or twice"
    for request in requests:
        wanted = set(request)
        for group in groups:
            assert len(wanted.intersection(group)) <= 1, "a client lacks two of one group"


# ---------------------------------------------------------------------------------------------------------------------
# combine

@pytest.mark.parametrize("clients, packets, share", [
    (1, 100, 0.1), (2, 100, 0.5), (3, 1000, 0.3), (64, 8192, 0.001), (64, 2000, 0.05), (70, 1000, 0.01), (200, 500, 0.02)])
def test_groups_cover_what_is_wanted_and_no_client_lacks_two_of_one(clients, packets, share):
    requests = losses(clients, packets, share)
    check_groups(requests, combine(requests))


def test_nothing_wanted_makes_no_group():
    assert combine([]) == []
    assert combine([[], []]) == []


def test_a_client_alone_gets_a_group_for_each_of_its_packets():
    assert sorted(combine([[3, 1, 2]])) == [[1], [2], [3]]


def test_what_all_lost_is_one_packet_a_group():
    groups = combine([[5, 9, 7]] * 10)
    assert sorted(groups) == [[5], [7], [9]]


def test_disjoint_losses_go_into_one_group():
    groups = combine([[client] for client in range(100)])
    assert [sorted(group) for group in groups] == [list(range(100))]


def test_groups_do_not_outgrow_a_recipe():
    requests = [[client] for client in range(1500)]
    groups = combine(requests)
    check_groups(requests, groups)
    assert max(map(len, groups)) <= 600 and len(groups) == 3
    groups = combine(requests, 100)
    check_groups(requests, groups)
    assert max(map(len, groups)) <= 100 and len(groups) == 15


def test_groups_grow_while_they_are_worked_out_so_that_others_get_their_turn():
    requests = losses(100, 2000, 0.05)
    before, times = [], 0
    for groups in kmcast.combine([bits_of(request) for request in requests]):
        assert len(groups) >= len(before)
        for old, new in zip(before, groups):
            assert new[:len(old)] == old
        before, times = [list(group) for group in groups], times + 1
    check_groups(requests, before)
    assert times > 2 * len(set(index for request in requests for index in request)) // 1000


def test_what_most_lack_comes_first():
    groups = combine([[3], [3, 7], [3, 9], [9, 1]])
    assert groups[0][0] == 3 and groups[1][0] == 9


@pytest.mark.parametrize("clients, share, expected", [
    (8, 0.01, 0.0122), (64, 0.001, 0.0020), (64, 0.01, 0.0123), (256, 0.01, 0.0140), (1000, 0.001, 0.0026)])
def test_repair_costs_about_what_the_worst_client_lost(clients, share, expected):
    """The bounds leave room for another seed, not for another order of magnitude."""
    packets = 8192
    requests = losses(clients, packets, share)
    groups = combine(requests)
    worst = max(map(len, requests))
    assert worst <= len(groups) <= 1.25 * worst + 3
    assert len(groups) < 1.3 * expected * packets


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

def read_all(payloads):
    """{repair number: members} of recipe payloads."""
    return dict((number, list(members)) for payload in payloads for number, members in kmcast.read_recipe(payload))


@pytest.mark.parametrize("number", [0, 1000, 2**31 - 100])
def test_recipes_tell_each_combination_by_its_number(number):
    generator = random.Random(3)
    groups = [generator.sample(range(65536), generator.choice([1, 2, 30, 300, 600])) for _ in range(60)]
    payloads = kmcast.recipes(groups, number, PAYLOAD)
    assert len(payloads) > 3 and max(map(len, payloads)) <= PAYLOAD
    first = number + len(payloads)
    assert read_all(payloads) == dict((first + place, members) for place, members in enumerate(groups))


def test_a_recipe_is_as_the_protocol_has_it():
    payload, = kmcast.recipes([[3], [65535, 0]], 41, PAYLOAD)
    assert payload == struct.pack("<I", 42) + struct.pack("<HH", 1, 3) + struct.pack("<HHH", 2, 65535, 0)


def test_each_recipe_can_be_read_without_the_others():
    groups = [[index, index + 1000] for index in range(500)]
    payloads = kmcast.recipes(groups, 10, 200)
    for lost in range(len(payloads)):
        rest = read_all(payloads[:lost] + payloads[lost + 1:])
        gone = read_all([payloads[lost]])
        assert gone and not set(rest).intersection(gone) and len(rest) + len(gone) == 500


@pytest.mark.parametrize("payload", [200, 232, 536, 1460, 8960])
def test_the_largest_combination_fits_into_a_recipe(payload):
    members = list(range(kmcast.most_members(payload)))
    assert 2 <= len(members) <= 600
    payloads = kmcast.recipes([members, members], 0, payload)
    assert max(map(len, payloads)) <= payload
    assert sorted(map(len, read_all(payloads).values())) == [len(members)] * 2


def test_a_truncated_recipe_gives_what_is_whole_in_it():
    payload, = kmcast.recipes([[1, 2], [3], [4, 5, 6]], 0, PAYLOAD)
    for size in range(len(payload) + 1):
        whole = [list(members) for _, members in kmcast.read_recipe(payload[:size])]
        assert whole == [[1, 2], [3], [4, 5, 6]][:sum(size >= end for end in (10, 14, 22))]


@pytest.mark.parametrize("rest", [b"", b"\0", b"\0\0", b"\0" * 9, b"\0\0\1\0\7\0"], ids=repr)
def test_a_count_of_0_ends_a_recipe(rest):
    payload, = kmcast.recipes([[1, 2], [0, 0]], 0, PAYLOAD)
    assert read_all([payload + rest]) == {1: [1, 2], 2: [0, 0]}


# ---------------------------------------------------------------------------------------------------------------------
# A pass from one end to the other

class Session(object):
    """A round at a server and at its clients, and the repair passes for it."""

    def __init__(self, packets, short=0, base=0, payload=PAYLOAD, number=0, checks=CRC):
        self.data = helpers.random_bytes(packets * payload - short, seed=packets)
        self.number, self.checks = number, checks
        self.server = kmcast.Buffer(payload, packets, SALT, checks)
        self.server.start(base, 0, 0)
        for start in range(0, len(self.data), payload):
            self.server.add(self.data[start:start + payload])

    def client(self, lost):
        """The buffer of a client that lost those places."""
        buffer = kmcast.Buffer(self.server.payload, self.server.count, SALT, self.checks)
        buffer.start(self.server.base, self.server.count, self.server.size)
        lost = set(lost)
        for place in range(self.server.count):
            if place not in lost:
                feed(buffer, self.server.get(self.server.base + place).tobytes())
        assert missing(buffer) == sorted(lost)
        return buffer

    def encode(self, groups):
        """(datagrams of a pass, how many are recipes, first repair number)."""
        number = self.number
        for coded, recipe_count in kmcast.encode_repair(self.server, groups, number, REPAIR_SALT):
            assert coded.count <= recipe_count + len(groups)
        assert coded.count == recipe_count + len(groups)
        self.number = number + coded.count
        return ([coded.get(2**31 + number + place).tobytes() for place in range(coded.count)], recipe_count, number)

    def receive(self, client, encoded, lose=(), others=()):
        """What a client makes of a pass; `others` are datagrams that do not belong to it."""
        datagrams, recipe_count, number = encoded
        coded = kmcast.Buffer(client.payload, len(datagrams), REPAIR_SALT - 2**31, self.checks)
        coded.start(2**31 + number, len(datagrams), len(datagrams) * client.payload)
        for datagram in others:
            feed(coded, datagram)
        for place, datagram in enumerate(datagrams):
            if place not in lose:
                feed(coded, datagram)
        return kmcast.solve(client, coded, recipe_count)

    def complete(self, *clients):
        """Fail unless all of them have all the data."""
        for client in clients:
            assert client.complete
            equal = helpers.data_of(client) == self.data
            assert equal


def feed(buffer, datagram):
    buffer.put(bytearray(datagram), 0, 1, len(datagram) - 12)


def checksum(payload, number, checks):
    """The checksum of a repair datagram."""
    return (zlib.crc32(payload, REPAIR_SALT + number & 0xffffffff) if checks else REPAIR_SALT + number) & 0xffffffff


@both_modes
def test_coded_datagrams_are_as_the_protocol_has_them(checks):
    """Full packets, all of them."""
    session = Session(5, short=1000, number=70, checks=checks)
    (recipe, coded), recipe_count, number = session.encode([[1, 4]])
    assert (recipe_count, number) == (1, 70)
    text = struct.pack("<IHHH", 71, 2, 1, 4).ljust(PAYLOAD, b"\0")
    assert recipe == struct.pack("<3I", 2**31 + 70, checksum(text, 70, checks), PAYLOAD) + text
    short = session.data[4 * PAYLOAD:]
    xor = bytes(bytearray(a ^ b for a, b in zip(bytearray(session.data[PAYLOAD:2 * PAYLOAD]),
                                                bytearray(short + b"\0" * (PAYLOAD - len(short))))))
    assert coded == struct.pack("<3I", 2**31 + 71, checksum(xor, 71, checks), PAYLOAD) + xor


@pytest.mark.parametrize("groups", [[[0]], [[3, 1], [2]], [[place, place + 150] for place in range(150)]])
@both_modes
def test_a_pass_is_as_the_protocol_has_it(groups, checks):
    """With as many recipes as it takes."""
    session = Session(300, short=50, payload=200, number=7, checks=checks)
    datagrams, recipe_count, number = session.encode(groups)
    recipes, combinations = wire.repair_pass(wire.cut(session.data, 200), groups, number, 200)
    assert recipe_count == len(recipes)
    assert datagrams == [wire.repair(number + place, payload, REPAIR_SALT, wire.SESSION.check(not checks))
                         for place, payload in enumerate(recipes + combinations)]


def test_each_client_recovers_its_own_from_one_combination():
    session = Session(10)
    clients = [session.client([place]) for place in range(10)]
    encoded = session.encode(combine([missing(client) for client in clients]))
    assert len(encoded[0]) == 2
    assert [session.receive(client, encoded) for client in clients] == [1] * 10
    session.complete(*clients)


@pytest.mark.parametrize("base", [0, 2**31 - 20])
@pytest.mark.parametrize("number", [0, 1, 2**31 - 7])
@both_modes
def test_seqs_and_repair_numbers_reach_their_last(base, number, checks):
    session = Session(20, short=7, base=base, number=number, checks=checks)
    lost = [[0, 5, 19], [1, 5, 6], [19, 18, 17], []]
    clients = [session.client(places) for places in lost]
    encoded = session.encode(combine(lost))
    assert [session.receive(client, encoded) for client in clients] == [3, 3, 3, 0]
    session.complete(*clients)


def test_a_combination_of_one():
    session = Session(3)
    client = session.client([1])
    assert session.receive(client, session.encode([[1]])) == 1
    session.complete(client)


@pytest.mark.parametrize("short", [1, 1000, PAYLOAD - 1])
@both_modes
def test_the_short_last_packet_as_a_member(short, checks):
    """At a client that lost it, at one that has it and lost another, and alone."""
    session = Session(6, short=short, checks=checks)
    first, second = session.client([5]), session.client([2])
    encoded = session.encode([[2, 5]])
    assert [session.receive(client, encoded) for client in (first, second)] == [1, 1]
    session.complete(first, second)
    third = session.client([5])
    assert session.receive(third, session.encode([[5]])) == 1
    session.complete(third)


def test_a_lost_combination_leaves_its_packet_missing():
    session = Session(10)
    client = session.client([1, 2, 3])
    encoded = session.encode([[1, 7], [2, 8], [3, 9]])
    assert session.receive(client, encoded, lose=[2]) == 2          # 0 is the recipe
    assert missing(client) == [2]
    assert session.receive(client, session.encode([[2]])) == 1
    session.complete(client)


def test_a_lost_recipe_leaves_all_of_it_missing():
    session = Session(400, payload=200)
    lost = list(range(0, 400, 3))
    client = session.client(lost)
    encoded = session.encode(combine([lost]))
    recipe_count = encoded[1]
    assert recipe_count > 2
    recovered = session.receive(client, encoded, lose=[1])
    assert 0 < recovered < len(lost) and len(missing(client)) == len(lost) - recovered
    assert session.receive(client, session.encode(combine([missing(client)]))) == len(lost) - recovered
    session.complete(client)


def test_all_recipes_lost_recover_nothing_and_break_nothing():
    session = Session(10)
    client = session.client([1])
    assert session.receive(client, session.encode([[1, 2]]), lose=[0]) == 0
    assert missing(client) == [1]


def test_a_client_that_lacks_two_of_a_group_recovers_neither():
    session = Session(10)
    client = session.client([1, 2])
    assert session.receive(client, session.encode([[1, 2, 3]])) == 0
    assert missing(client) == [1, 2]


def test_a_packet_that_was_recovered_helps_in_the_same_pass():
    """Which is allowed to be made use of, and must at any rate do no harm."""
    session = Session(10)
    client = session.client([1, 2])
    recovered = session.receive(client, session.encode([[1], [1, 2]]))
    assert recovered == 2 - len(missing(client)) and 1 not in missing(client)
    session.receive(client, session.encode([[2]]))
    session.complete(client)


@both_modes
def test_late_datagrams_of_an_earlier_pass_and_of_the_round_do_not_pass_for_others(checks):
    session = Session(30, number=3, checks=checks)      # numbers and seqs overlap
    client = session.client([4, 5, 6, 7])
    early = session.encode([[4, 20], [5, 21]])
    late = session.encode([[6, 22], [7, 23]])
    round_datagrams = [session.server.get(place).tobytes() for place in range(30)]
    assert session.receive(client, late, others=early[0] + round_datagrams) == 2
    assert missing(client) == [4, 5]
    for datagram in early[0] + late[0]:     # and the other way: they are no packets of the round
        feed(client, datagram)
    assert missing(client) == [4, 5]
    session.receive(client, session.encode([[4], [5]]), others=late[0])
    session.complete(client)


@pytest.mark.parametrize("members", [[], [10], [65535], [1, 65535], [1, 1], [0, 1, 1]])
@both_modes
def test_a_recipe_that_makes_no_sense_breaks_nothing(members, checks):
    """The checksum lets through only what the server sent, but a client must not trust it with its memory."""
    session = Session(10, checks=checks)
    client = session.client([1])
    text = wire.recipe(1, [members], PAYLOAD)
    datagrams = [wire.repair(number, payload, REPAIR_SALT, wire.SESSION.check(not checks))
                 for number, payload in enumerate((text, b"x" * PAYLOAD))]
    assert session.receive(client, (datagrams, 1, 0)) == 0
    assert missing(client) == [1]


@both_modes
def test_a_recipe_that_names_other_numbers_breaks_nothing(checks):
    """Its own, another recipe's, and some outside the pass."""
    session = Session(10, checks=checks)
    for number in (0, 2, 2**31, 2**32 - 1, 1000):
        client = session.client([1])
        recipe = wire.repair(0, wire.recipe(number, [[1]], PAYLOAD), REPAIR_SALT, wire.SESSION.check(not checks))
        coded = session.encode([[2]])[0][1]
        assert session.receive(client, ([recipe, coded], 1, 0)) == 0
        assert missing(client) == [1]


@both_modes
def test_a_repair_datagram_that_is_no_full_packet_is_not_taken(checks):
    session = Session(10, checks=checks)
    for size in (10, PAYLOAD - 1):
        client = session.client([1])
        recipe = wire.repair(0, wire.recipe(1, [[1]], PAYLOAD)[:size], REPAIR_SALT, wire.SESSION.check(not checks))
        coded = wire.repair(1, session.data[PAYLOAD:2 * PAYLOAD], REPAIR_SALT, wire.SESSION.check(not checks))
        assert session.receive(client, ([recipe, coded], 1, 0)) == 0
        assert missing(client) == [1]
        whole = wire.repair(0, wire.recipe(1, [[1]], PAYLOAD), REPAIR_SALT, wire.SESSION.check(not checks))
        assert session.receive(client, ([whole, coded], 1, 0)) == 1
        session.complete(client)


def test_what_was_solved_with_a_damaged_packet_is_damaged_too():
    """Where a digest covers the round nobody has looked at payloads yet. Then both are asked for again."""
    session = Session(10, checks=DIGEST)
    client = kmcast.Buffer(PAYLOAD, 10, SALT, DIGEST)
    client.start(0, 10, len(session.data))
    for place in range(10):
        if place != 1:
            datagram = bytearray(session.server.get(place).tobytes())
            if place == 2:
                datagram[700] ^= 1
            feed(client, datagram)
    assert session.receive(client, session.encode([[1, 2]])) == 1 and client.complete
    damaged = client.differing(session.server.sums())
    assert wire.places(damaged) == [1, 2]
    client.forget(damaged)
    for place in (1, 2):
        feed(client, session.server.get(place).tobytes())
    session.complete(client)


@pytest.mark.parametrize("clients, packets, share, repair_share, payload", [
    (64, 1500, 0.01, 0.01, 200), (70, 600, 0.05, 0.3, 536), (3, 300, 0.4, 0.4, 1460), (9, 200, 0.1, 0.0, 8960)])
@both_modes
def test_passes_with_loss_bring_everything_to_everyone_in_the_end(clients, packets, share, repair_share, payload, checks):
    generator = random.Random(clients)
    session = Session(packets, payload // 3, 2**31 - packets, payload, 2**31 - 10**6, checks)
    lost = losses(clients, packets, share, seed=clients)
    buffers = [session.client(places) for places in lost]
    passes = 0
    while not all(buffer.complete for buffer in buffers):
        passes += 1
        assert passes < 30
        wanted = [missing(buffer) for buffer in buffers]
        encoded = session.encode(combine(wanted, kmcast.most_members(payload)))
        for buffer in buffers:
            before = len(missing(buffer))
            lose = [place for place in range(len(encoded[0])) if generator.random() < repair_share]
            recovered = session.receive(buffer, encoded, lose)
            assert recovered == before - len(missing(buffer))
            if not lose:
                assert buffer.complete
    session.complete(*buffers)
