"""The chain by itself: who takes the packets from whom, what a follower is still to get, and what an upstream brings."""

import random

import pytest

import helpers
import kmcast

WIRE = kmcast.SessionDialect
PAYLOAD, COUNT = 100, 21


class Hosts(object):
    """Members of a chain, which answer as clients do; `upstream` has what each was told last."""

    def __init__(self, count, willing=True):
        self.now = 100.0
        self.members = [kmcast.Member("10.0.0.%d" % number, self.now) for number in range(1, count + 1)]
        for member in self.members:
            member.willing = willing
        self.chain = kmcast.Chain(WIRE)
        self.upstream, self.token, self.begin, self.mine = {}, {}, {}, {}
        self.deaf_port = set()          # members that nobody can connect to
        self.mute = set()               # members that do not answer

    def __getitem__(self, number):
        return self.members[number - 1]

    def build(self):
        self.chain.build(self.members, self.now)
        return self.settle()

    def settle(self, number=7):
        """Tell all what is new, and have them answer, until there is nothing new; returns what follows what."""
        for _ in range(100):
            messages = self.chain.changes(number)
            if not messages:
                break
            for member, data in messages.items():
                self._tell(member, data)
        else:
            assert False, "it never comes to rest"
        return self.links()

    def _tell(self, member, data):
        while data:
            size = WIRE.server_message_size(data[:5], 32)
            message, data = data[:size], data[size:]
            fields = kmcast.unpack_frame(message[5:])
            if message[:1] == kmcast.FOLLOWER:
                self.token[member] = kmcast.token_of(fields, optional=True)
                if self.token[member] and member not in self.mute:
                    self.chain.heard(member, dict(token=self.token[member], port=9, connected=False), self.now)
                continue
            first, place, token = kmcast.place_of_upstream(fields)
            self.begin[member], self.upstream[member], self.mine[member] = first, None, token
            if place:
                self.upstream[member] = [other for other in self.members if other.address == place[0]][0]
                if self.upstream[member] in self.deaf_port:
                    self.lose(member, connected=False)

    def lose(self, follower, connected=True):
        """A client says that its upstream is gone."""
        self.upstream[follower] = None
        self.chain.heard(follower, dict(token=self.mine[follower], lost="gone", connected=connected), self.now)

    def leave(self, member):
        self.members.remove(member)
        self.chain.leave(member, self.now)

    def learn(self, hears=(), some=()):
        """All answer for a round, which these heard, and `some` with losses."""
        for member in self.members:
            heard = member in hears
            member.heard_rounds = member.heard_rounds + 1 if heard else 0
            member.deaf_rounds = 0 if heard or member in some else member.deaf_rounds + 1
        self.chain.learn(self.members, self.now)

    def links(self):
        """[(number of the upstream, of the follower)] as the clients were told."""
        numbers = dict((member, int(member.address.split(".")[3])) for member in self.members)
        return sorted((numbers[upstream], numbers[follower]) for follower, upstream in self.upstream.items()
                      if upstream in numbers and follower in numbers)


# ---------------------------------------------------------------------------------------------------------------------
# How it is built

def test_neighbours_by_address_follow_each_other():
    hosts = Hosts(12)
    random.Random(1).shuffle(hosts.members)
    assert hosts.build() == [(number, number + 1) for number in range(1, 12)]


def test_it_is_of_those_who_lack_what_is_brought():
    hosts = Hosts(5)
    assert hosts.build() == [(1, 2), (2, 3), (3, 4), (4, 5)]
    hosts.chain.among({hosts[1], hosts[3], hosts[5]}, hosts.now)
    assert hosts.settle(number=9) == [(1, 3), (3, 5)]
    assert hosts.begin[hosts[3]] == 9, "from the first round on that is for them alone"
    hosts.chain.among({hosts[2]}, hosts.now)
    assert hosts.settle() == []
    hosts.chain.among(set(hosts.members), hosts.now)
    assert hosts.settle() == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_as_long_as_the_same_lack_it_nothing_is_told():
    hosts = Hosts(3)
    hosts.build()
    hosts.chain.among(set(hosts.members), hosts.now)
    hosts.chain.among(set(hosts.members), hosts.now)
    assert hosts.chain.changes(9) == {}


def test_who_left_unnoticed_is_forgotten():
    hosts = Hosts(4)
    hosts.build()
    gone = hosts.members.pop(1)
    hosts.chain.keep(hosts.members, hosts.now)
    assert hosts.settle() == [(1, 3), (3, 4)]
    assert gone not in hosts.chain._inside          # pylint: disable=protected-access


def test_who_hears_multicast_is_the_head_only_of_those_who_lack_the_same():
    hosts = Hosts(4)
    for _ in range(2):
        hosts.learn(hears=[hosts[1], hosts[2]])
    head, = set(upstream for upstream, follower in hosts.settle() if follower == 3)
    lacking = set(hosts.members) - {hosts[head]}
    hosts.chain.among(lacking, hosts.now)
    hosts.chain.learn(lacking, hosts.now)
    other, = set([1, 2]) - set([head])
    assert hosts.settle() == [(other, 3), (3, 4)]
    hosts.chain.among({hosts[3], hosts[4]}, hosts.now)
    hosts.chain.learn([hosts[3], hosts[4]], hosts.now)
    assert hosts.settle() == [(3, 4)]


def test_a_follower_is_told_of_its_upstream_once_that_listens():
    hosts = Hosts(2)
    hosts.chain.build(hosts.members, hosts.now)
    (member, message), = hosts.chain.changes(0).items()
    assert member is hosts[1] and message[:1] == kmcast.FOLLOWER
    assert hosts.chain.changes(0) == {} and not hosts[1].relays
    token = kmcast.token_of(kmcast.unpack_frame(message[5:]))
    hosts.chain.heard(hosts[1], dict(token=token, port=4711), hosts.now)
    (member, message), = hosts.chain.changes(3).items()
    assert member is hosts[2] and message == WIRE.upstream(3, "10.0.0.1", 4711, token)
    assert hosts[1].relays, "what it asks for is sent at once from now on"


def test_all_wait_for_a_chain_that_is_being_built_but_not_for_long():
    hosts = Hosts(3)
    hosts.mute.add(hosts[2])
    hosts.build()
    assert hosts.chain.settling(hosts.now) and hosts.chain.settling(hosts.now + 0.9)
    assert not hosts.chain.settling(hosts.now + 1.1)
    hosts = Hosts(3)
    hosts.build()
    assert not hosts.chain.settling(hosts.now)


def test_a_single_client_needs_none():
    hosts = Hosts(1)
    assert hosts.build() == [] and not hosts.chain.settling(hosts.now)


def test_after_the_first_round_that_nobody_heard_there_is_one():
    hosts = Hosts(4)
    hosts.learn()
    assert hosts.settle() == [(1, 2), (2, 3), (3, 4)]


def test_where_somebody_heard_something_it_takes_two_rounds():
    hosts = Hosts(4)
    hosts.learn(some=[hosts[3]])
    assert hosts.settle() == []
    hosts.learn()
    assert hosts.settle() == [(1, 2), (2, 4)], "without the one that heard some of the first"


def test_where_only_the_first_round_was_lost_to_all_there_is_none_two_rounds_later():
    hosts = Hosts(4)
    hosts.learn()
    assert hosts.settle() == [(1, 2), (2, 3), (3, 4)]
    hosts.learn(hosts.members)
    hosts.learn(hosts.members)
    assert hosts.settle() == [] and not hosts.chain.links


def test_a_client_that_hears_is_the_head_for_the_deaf_ones_behind_it():
    hosts = Hosts(6)
    hears = [hosts[1], hosts[3], hosts[6]]
    hosts.learn(hears)
    hosts.learn(hears)
    assert hosts.settle() == [(1, 2), (2, 4), (4, 5)], "the nearest before the first deaf one"
    assert not hosts.chain.settling(hosts.now), "those who hear are not held up"


def test_the_head_is_the_first_that_hears_where_none_is_before_the_deaf_ones():
    hosts = Hosts(4)
    hears = [hosts[3], hosts[4]]
    hosts.learn(hears)
    hosts.learn(hears)
    assert hosts.settle() == [(1, 2), (3, 1)]


def test_where_nobody_hears_nearly_all_one_that_hears_some_is_the_head():
    hosts = Hosts(4)
    for _ in range(2):
        hosts.learn(some=[hosts[3], hosts[4]])
    assert hosts.settle() == [(1, 2), (3, 1)]


def test_one_that_hears_nearly_all_is_rather_the_head_than_one_that_hears_some():
    hosts = Hosts(4)
    for _ in range(2):
        hosts.learn([hosts[4]], some=[hosts[3]])
    assert hosts.settle() == [(1, 2), (4, 1)]


def test_a_head_that_loses_some_stays_the_head():
    hosts = Hosts(3)
    for _ in range(2):
        hosts.learn([hosts[1], hosts[2]])
    assert hosts.settle() == [(2, 3)]
    hosts[2].heard_rounds = hosts[2].deaf_rounds = 0
    hosts.chain.learn(hosts.members, hosts.now)
    assert hosts.settle() == [(2, 3)]


def test_a_head_that_hears_no_more_is_one_of_the_deaf():
    hosts = Hosts(3)
    for _ in range(2):
        hosts.learn([hosts[2]])
    assert hosts.settle() == [(1, 3), (2, 1)]
    for _ in range(2):
        hosts.learn()
    assert hosts.settle() == [(1, 2), (2, 3)]


def test_who_hears_all_again_leaves_and_when_all_do_there_is_none():
    hosts = Hosts(4)
    for _ in range(2):
        hosts.learn()
    hosts.settle()
    hosts.learn([hosts[2]])
    hosts.learn([hosts[2]])
    assert hosts.settle() == [(1, 3), (2, 1), (3, 4)], "and is the head now"
    hosts.learn(hosts.members)
    hosts.learn(hosts.members)
    assert hosts.settle() == [] and not any(hosts.token.values()) and not hosts.chain.links


# ---------------------------------------------------------------------------------------------------------------------
# How it heals

def test_the_follower_of_one_that_left_has_its_predecessor():
    hosts = Hosts(5)
    hosts.build()
    hosts.leave(hosts[3])
    assert hosts.settle(number=9) == [(1, 2), (2, 4), (4, 5)]
    assert hosts.begin[hosts.members[2]] == 9, "from the rounds to come on"


def test_without_the_head_the_next_one_is_served_by_the_server():
    hosts = Hosts(3)
    hosts.build()
    hosts.leave(hosts[1])
    assert hosts.settle() == [(2, 3)] and hosts.upstream[hosts.members[0]] is None


def test_an_upstream_that_was_lost_goes_to_the_end():
    hosts = Hosts(5)
    hosts.build()
    hosts.lose(hosts[4])
    assert hosts.settle() == [(1, 2), (2, 4), (4, 5), (5, 3)]


def test_an_upstream_that_has_everything_and_went_is_not_blamed(told):
    hosts = Hosts(4)
    hosts.build()
    hosts[2].outcome = "complete"
    hosts.lose(hosts[3])
    assert hosts.settle() == [(1, 2), (3, 4)] and "chain_broken" not in [what for what, _ in told]
    hosts.leave(hosts[2])
    assert hosts.settle() == [(1, 3), (3, 4)]


def test_who_nobody_can_connect_to_is_the_tail_and_serves_nobody(told):
    hosts = Hosts(6)
    hosts.deaf_port.add(hosts[3])
    assert hosts.build() == [(1, 2), (2, 4), (4, 5), (5, 6), (6, 3)]
    (what, facts), = [event for event in told if event[0] == "relay_unreachable"]
    assert facts["upstream"] is hosts[3] and facts["follower"] is hosts[4] and facts["port"] == 9


def test_where_nobody_can_be_connected_to_all_are_served_by_the_server():
    hosts = Hosts(8)
    hosts.deaf_port.update(hosts.members)
    assert hosts.build() == []
    assert set(hosts.upstream.values()) == set([None])


def test_who_can_reach_nobody_leaves_the_chain_and_the_others_stay():
    hosts = Hosts(6)
    hosts.build()
    for _ in range(2):
        hosts.lose(hosts[4], connected=False)
        hosts.settle()
    links = hosts.links()
    assert 4 not in [number for link in links for number in link]
    assert len(links) == 4, "one chain of the others"


def test_an_upstream_that_does_not_say_that_it_listens_is_lost():
    hosts = Hosts(4)
    hosts.mute.add(hosts[2])
    assert hosts.build() == [(1, 2), (3, 4)]
    hosts.now += 3
    hosts.chain.look(hosts.now)
    assert hosts.settle() == [(1, 3), (3, 4), (4, 2)]


def test_who_is_not_willing_takes_no_part():
    hosts = Hosts(4)
    hosts[2].willing = False
    assert hosts.build() == [(1, 3), (3, 4)] and hosts[2] not in hosts.upstream


def test_who_cannot_listen_serves_nobody():
    hosts = Hosts(3)
    hosts.mute.add(hosts[1])
    hosts.build()
    hosts.chain.heard(hosts[1], dict(token=hosts.token[hosts[1]], port=None, reason="no"), hosts.now)
    assert hosts.settle() == [(2, 3), (3, 1)]


def test_words_about_links_that_are_none_any_more_change_nothing():
    hosts = Hosts(3)
    hosts.build()
    old = hosts.chain.links[hosts[3]].token
    hosts.leave(hosts[2])
    before = hosts.settle()
    hosts.chain.heard(hosts[2], dict(token=old, lost="gone", connected=True), hosts.now)
    assert hosts.settle() == before == [(1, 3)]


def test_who_holds_up_those_behind_it_three_times_goes_to_the_end():
    hosts = Hosts(5)
    hosts.build()
    for number in range(3):
        for member in hosts.members:
            late = int(member.address.split(".")[3]) >= 3
            member.done_at[number] = hosts.now + number + (1.5 if late else 0.0)
        hosts.chain.through(1.0, number, hosts.now)
    assert hosts.settle() == [(1, 2), (2, 4), (4, 5), (5, 3)]


def test_who_alone_holds_all_up_gets_another_upstream_once():
    hosts = Hosts(4)
    hosts.build()
    assert hosts.chain.relieve(hosts[4], hosts.now)
    assert hosts.settle() == [(1, 2), (2, 4), (4, 3)]
    assert not hosts.chain.relieve(hosts[4], hosts.now), "then it is its own doing"
    assert not hosts.chain.relieve(hosts[1], hosts.now), "which has its packets from the server"


def test_nobody_is_blamed_for_what_comes_late_to_himself():
    hosts = Hosts(3)
    hosts.build()
    for number in range(10):
        for member in hosts.members:
            member.done_at[number] = hosts.now + number + 0.01 * int(member.address.split(".")[3])
        hosts.chain.through(0.01, number, hosts.now)
    assert hosts.settle() == [(1, 2), (2, 3)]


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_there_is_never_a_loop_and_nobody_serves_two(seed):
    r = random.Random(seed)
    hosts = Hosts(r.choice([2, 3, 5, 9]))
    hosts.deaf_port.update(member for member in hosts.members if r.random() < 0.2)
    hosts.mute.update(member for member in hosts.members if r.random() < 0.1)
    for member in hosts.members:
        member.willing = r.random() < 0.9
    if r.random() < 0.5:
        hosts.build()
    for number in range(30):
        what, member = r.random(), r.choice(hosts.members)
        hosts.now += r.choice([0, 0.1, 3])
        if what < 0.4:
            hosts.learn([member for member in hosts.members if r.random() < 0.5])
        elif what < 0.6 and hosts.upstream.get(member):
            hosts.lose(member, r.random() < 0.5)
        elif what < 0.65 and len(hosts.members) > 1:
            hosts.leave(member)
        hosts.chain.look(hosts.now)
        hosts.chain.through(0.1, number, hosts.now)
        links = hosts.settle(number)
        upstreams = dict((follower, upstream) for upstream, follower in links)
        assert len(set(upstreams.values())) == len(upstreams), "each serves one"
        for follower in upstreams:
            seen, at = set(), follower
            while at in upstreams:
                assert at not in seen, "a loop: %s" % links
                seen.add(at)
                at = upstreams[at]
        said = dict((hosts.chain.links[follower].upstream, follower) for follower in hosts.chain.links)
        assert len(said) == len(hosts.chain.links)


# ---------------------------------------------------------------------------------------------------------------------
# What a follower is to get, and what an upstream brings

@pytest.fixture
def told():
    """What is told meanwhile."""
    events = []

    class Reader(object):
        """Keeps the events."""

        @staticmethod
        def happened(what, facts):
            events.append((what, facts))

        @staticmethod
        def look(_now):
            pass
    kmcast.tell.readers.append(Reader)
    yield events
    kmcast.tell.readers.remove(Reader)


def a_round(number=0, packets=()):
    """An Incoming with a buffer that has some packets."""
    data = helpers.random_bytes(COUNT * PAYLOAD - 30, seed=number)
    incoming = kmcast.Incoming(number, len(data), number * COUNT, COUNT, number * COUNT * PAYLOAD)
    incoming.buffer = kmcast.Buffer(PAYLOAD, COUNT)
    incoming.buffer.start(number * COUNT, COUNT, len(data))
    incoming.data = data
    bring(incoming, *packets)
    return incoming


def bring(incoming, *packets):
    for place in packets:
        area = incoming.buffer.view(place, place + 1)
        area[:] = incoming.data[place * PAYLOAD:(place + 1) * PAYLOAD]
        incoming.buffer.arrived(place, place + 1)


def drain(forwarding):
    """All that can be sent now: (number, first, last)."""
    found = []
    while True:
        following = forwarding.next()
        if following is None:
            return found
        incoming, first, last = following
        found.append((incoming if first is None else incoming.number, first, last))


def test_pieces_go_on_as_packets_come_and_the_mark_when_all_have():
    forwarding, incoming = kmcast.Forwarding(0, 5 * PAYLOAD), a_round(0, range(3, 10))
    forwarding.add(incoming)
    assert drain(forwarding) == [(0, 3, 8), (0, 8, 10)]
    assert drain(forwarding) == [] and forwarding.holds(incoming)
    bring(incoming, 0, 1, 20)
    assert drain(forwarding) == [(0, 0, 2), (0, 20, 21)]
    bring(incoming, 2, *range(10, 20))
    assert drain(forwarding) == [(0, 2, 3), (0, 10, 15), (0, 15, 20), (0, None, None)]
    assert not forwarding.holds(incoming) and forwarding.empty


def test_what_is_sent_is_what_came():
    incoming = a_round(0, range(COUNT))
    assert bytes(incoming.buffer.view(0, COUNT).tobytes()) == incoming.data
    assert bytes(incoming.buffer.view(19, COUNT).tobytes()) == incoming.data[19 * PAYLOAD:]
    assert b"".join(chunk.tobytes() for chunk in incoming.buffer.flush()) == incoming.data


def test_rounds_before_the_first_wanted_are_not_sent():
    forwarding = kmcast.Forwarding(1, 1 << 20)
    for number in range(3):
        forwarding.add(a_round(number, range(COUNT)))
    assert drain(forwarding) == [(1, 0, COUNT), (1, None, None), (2, 0, COUNT), (2, None, None)]


def test_rounds_that_are_gone_have_their_mark_at_once():
    forwarding = kmcast.Forwarding(1, 1 << 20)
    forwarding.skip(3)
    assert drain(forwarding) == [(1, None, None), (2, None, None)]
    forwarding = kmcast.Forwarding(5, 1 << 20)
    forwarding.skip(3)
    assert drain(forwarding) == []


def test_a_later_round_goes_on_while_an_earlier_one_is_waited_for():
    forwarding = kmcast.Forwarding(0, 1 << 20)
    first, second = a_round(0, [0]), a_round(1, [4, 5])
    forwarding.add(first)
    forwarding.add(second)
    assert drain(forwarding) == [(0, 0, 1), (1, 4, 6)]


def test_numbers_wrap():
    forwarding = kmcast.Forwarding(kmcast.MASK, 1 << 20)
    forwarding.add(a_round(0, range(COUNT)))
    assert drain(forwarding) == [(0, 0, COUNT), (0, None, None)]


class Listener(object):
    """A ClientWindow with some rounds announced, and what it wants done."""

    def __init__(self, rounds=2, digest=True):
        self.window = kmcast.ClientWindow(WIRE, PAYLOAD, (7, 8), digest)
        self.data = [helpers.random_bytes(COUNT * PAYLOAD, seed=number) for number in range(rounds)]
        for number in range(rounds):
            self.window.heard(WIRE.info(number, COUNT * PAYLOAD, number * COUNT, COUNT, number * COUNT * PAYLOAD), 1.0)

    def sent(self, number=0, now=1.0):
        self.window.heard(WIRE.sent(number, b"d" * 32), now)
        return self.tick(now + 1)

    def tick(self, now):
        return [argument[:1] if verb == "send" else verb for verb, argument in self.window.tick(now)]

    def piece(self, first, last, number=0):
        size = (last - first) * PAYLOAD
        incoming, area, end = self.window.area_for(number, first, size)
        if incoming is None:
            return False
        assert end == last
        area[:] = self.data[number][first * PAYLOAD:last * PAYLOAD]
        self.window.arrived(incoming, first, last)
        return True


def test_the_answer_waits_for_what_the_upstream_may_bring():
    listener = Listener()
    listener.window.follow(0)
    assert listener.sent() == [] and listener.window.deadline is None and listener.window.owing == "following"
    assert listener.piece(0, 20)
    assert listener.tick(100.0) == []
    assert listener.piece(20, 21)
    assert listener.tick(101.0) == ["write"] and listener.window.by_chain == COUNT


def test_after_the_mark_it_asks_for_what_is_missing():
    listener = Listener()
    listener.window.follow(0)
    listener.piece(0, 20)
    listener.sent()
    listener.window.no_more(0, 5.0)
    assert listener.tick(5.0) == [kmcast.REQUEST]


def test_without_an_upstream_any_more_it_asks_at_once():
    listener = Listener()
    listener.window.follow(0)
    listener.sent()
    listener.window.follow(None)
    assert listener.tick(5.0) == [kmcast.REQUEST]


def test_rounds_before_the_upstreams_first_are_asked_for():
    listener = Listener()
    listener.window.follow(1)
    assert listener.sent(0) == [kmcast.REQUEST] and listener.sent(1) == []


def test_what_the_chain_brought_was_not_heard():
    listener = Listener()
    listener.window.follow(0)
    listener.piece(0, COUNT)
    listener.window.heard(WIRE.sent(0, b"d" * 32), 1.0)
    (_, incoming), = listener.window.tick(1.0)
    (_, message), = listener.window.verified(incoming)
    assert WIRE.figures_of(message)[0] == 0 and listener.window.by_multicast == 0


def test_what_was_forged_was_not_heard():
    """Right headers, wrong data: only the digest tells."""
    listener = Listener()
    count = COUNT - 1
    fakes = b"".join(kmcast.PACKET.pack(seq, 7 + seq, PAYLOAD) + b"x" * PAYLOAD for seq in range(count))
    listener.window.take([(bytearray(fakes), 0, count, PAYLOAD)], count, 1.0, 1.0)
    listener.piece(count, COUNT)
    listener.window.heard(WIRE.sent(0, b"d" * 32), 1.0)
    (_, incoming), = listener.window.tick(1.0)
    assert incoming.heard == listener.window.by_multicast == count
    listener.window.damaged(incoming)
    right = [kmcast.zlib.crc32(listener.data[0][start:start + PAYLOAD]) & kmcast.MASK
             for start in range(0, COUNT * PAYLOAD, PAYLOAD)]
    (_, message), = listener.window.heard(WIRE.sums(0, right), 1.0)
    assert message[:1] == kmcast.REQUEST and WIRE.figures_of(message)[0] == listener.window.by_multicast == 0


def test_a_round_that_is_complete_takes_no_piece_any_more():
    listener = Listener()
    assert listener.piece(0, COUNT)
    assert not listener.piece(0, 5), "it is being verified: no byte of it may change"
    assert listener.window.by_chain == COUNT


@pytest.mark.parametrize("number, first, size", [
    (0, COUNT, PAYLOAD), (0, 0, (COUNT + 1) * PAYLOAD), (0, 3, PAYLOAD - 1), (0, COUNT - 1, PAYLOAD - 1)])
def test_a_piece_that_fits_no_round_is_an_error(number, first, size):
    with pytest.raises(kmcast.ProtocolError):
        Listener().window.area_for(number, first, size)


@pytest.mark.parametrize("number", [2, 7, 2**31 + 5, 2**32 - 1])
def test_a_piece_of_a_round_in_which_we_have_no_part_is_passed_over(number):
    """The upstream may lack what we do not."""
    assert Listener().window.area_for(number, 0, PAYLOAD) == (None, None, None)


def test_a_buffer_is_kept_until_the_follower_has_the_round():
    listener = Listener(rounds=5)
    window = listener.window
    assert [incoming.how for incoming in window.rounds].count(kmcast.Incoming.WAITS) == 1, "there are four buffers"
    forwarding = kmcast.Forwarding(0, 1 << 20)
    window.serve(forwarding)
    listener.piece(0, COUNT)
    window.heard(WIRE.sent(0, b"d" * 32), 1.0)
    (_, incoming), = window.tick(1.0)
    window.verified(incoming)
    assert window.written() == [] and window.owing == "relaying"
    assert drain(forwarding) == [(0, 0, COUNT), (0, None, None)]
    assert window.relayed() == [("send", WIRE.ready(4))]


def test_without_a_follower_its_buffers_are_free_again():
    listener = Listener(rounds=5)
    window = listener.window
    window.serve(kmcast.Forwarding(0, 1 << 20))
    listener.piece(0, COUNT)
    window.heard(WIRE.sent(0, b"d" * 32), 1.0)
    (_, incoming), = window.tick(1.0)
    window.verified(incoming)
    assert window.written() == []
    assert window.serve(None) == [("send", WIRE.ready(4))]


# ---------------------------------------------------------------------------------------------------------------------
# A rehearsal

def rehearse(hosts):
    """Have each tried as the upstream of another; returns which could be connected to, by number (None: not tried)."""
    hosts.chain.build(hosts.members, hosts.now, wait=False)
    for after in (hosts.chain.turn, hosts.chain.dissolve):
        for follower, upstream in hosts.settle() and list(hosts.upstream.items()):
            if upstream:
                hosts.chain.heard(follower, dict(token=hosts.mine[follower], connected=True), hosts.now)
        assert hosts.chain.tried(hosts.now)
        after(hosts.now)
    assert hosts.settle() == []
    return [member.reached for member in sorted(hosts.members, key=hosts.chain._place)]


def test_in_a_rehearsal_each_is_tried():
    assert rehearse(Hosts(6)) == [True] * 6


@pytest.mark.parametrize("closed", range(1, 6))
def test_in_a_rehearsal_who_cannot_be_connected_to_is_found(closed):
    hosts = Hosts(5)
    hosts.deaf_port.add(hosts[closed])
    assert rehearse(hosts) == [number != closed for number in range(1, 6)]


def test_in_a_rehearsal_of_two_both_are_tried():
    hosts = Hosts(2)
    hosts.deaf_port.add(hosts[1])
    assert rehearse(hosts) == [False, True]


def test_nobody_can_try_a_single_one():
    assert rehearse(Hosts(1)) == [None]


def test_who_does_not_say_that_he_is_connected_is_waited_for_a_while():
    hosts = Hosts(3)
    hosts.chain.build(hosts.members, hosts.now, wait=False)
    hosts.settle()
    assert not hosts.chain.tried(hosts.now)
    assert hosts.chain.tried(hosts.now + 2 * hosts.chain.TRIAL)
    assert [member.reached for member in hosts.members] == [None] * 3
