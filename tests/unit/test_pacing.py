"""RateControl finds what a link carries, in a simulated network; Pacer keeps bursts small. No clock is looked at."""

import math
import random

import pytest

import kmcast

PAYLOAD, SIZE = 1460, 1500      # bytes of a packet, and with its headers
FIRST, MOST = 64, 2870          # packets in the first round, and in any
FIGURES = kmcast.SessionDialect


class Link(object):
    """A link of `capacity` bit/s behind a drop-tail queue of `queue` bytes, with a medium that loses a share of packets.

    before: a share that is lost before the queue; rival: bit/s that others send on it, who do not yield.
    """

    def __init__(self, capacity=float("inf"), queue=128000, medium=0.0, seed=1, before=0.0):
        self.capacity, self.queue, self.medium, self.before, self.rival = capacity, queue, medium, before, 0.0
        self._random = random.Random(seed)

    def arrivals(self, departures):
        """When each packet arrives, seconds; None: it is lost. The queue is empty before each round."""
        waiting, before, result = 0.0, departures[0], []
        for departure in departures:
            waiting += (departure - before) * (self.rival - self.capacity) / 8 if self.capacity < 1e15 else 0.0
            waiting, before = min(max(0.0, waiting), self.queue), departure
            if waiting + SIZE > self.queue and self.capacity < 1e15 or self._random.random() < self.before:
                result.append(None)
                continue
            waiting += SIZE if self.capacity < 1e15 else 0
            lost = self._random.random() < self.medium          # behind the queue
            result.append(None if lost else departure + waiting * 8 / self.capacity)
        return result


class Network(object):
    """A server that sends rounds over links, one a client, and learns from what a ServerWindow makes of their answers."""

    def __init__(self, *links, **options):
        self.control = options.get("control") or kmcast.RateControl()
        self.links, self.limit, self.clock = links, FIRST, 100.0
        self.sender_limit = options.get("sender_limit", 9.9e9)
        self.most = options.get("most", MOST)
        self.window = kmcast.ServerWindow(kmcast.SessionDialect, 0)
        self.window.members = [kmcast.Member("192.0.2.%d" % number, 0.0) for number in range(len(links))]
        self.number = self.lost = self.sent = 0
        self.why = None

    def round(self):
        """Send one, as the server does; returns the rate at which it was sent, bit/s."""
        count = int(max(FIRST, min(self.limit, self.control.rate / 4 / 8 / SIZE, self.most)))
        self.limit = 2 * count
        speed = self.control.speed(self.clock, True)
        buffer = kmcast.Buffer(PAYLOAD, 0)
        buffer.start(0, count, count * PAYLOAD)
        done = kmcast.Round(self.number, buffer, 0)
        done.speed, done.multicast = speed, count
        rate, head_rate = [min(self.sender_limit, wanted) for wanted in (speed.rate, speed.head_rate)]
        head, departures = kmcast.Round.head_of(count)[1], []
        for place in range(count):
            behind = place < head and head_rate or rate
            departures.append(self.clock + (place * SIZE * 8 / behind))
        done.head = head_rate if speed.head_rate > speed.rate else None
        done.tail = rate
        self._ask(done, departures)
        self.clock = departures[-1] + 0.002
        self.number += 1
        return rate

    def _ask(self, done, departures):
        count, number = done.multicast, done.number
        self.window.begin(kmcast.Step("announce", done), self.clock)
        for member in self.window.members:
            self.window.heard(member, FIGURES.ready(number), self.clock)
        self.window.begin(kmcast.Step("sent", done), self.clock)
        awaited = self.window.awaited[-1]
        most_lost = 0
        for member, link in zip(self.window.members, self.links):
            head, tail = [kmcast.Train(*train(count)) for train in (kmcast.Round.head_of, kmcast.Round.tail_of)]
            heard, flags = 0, bytearray(count)
            for place, arrival in enumerate(link.arrivals(departures)):
                if arrival is not None:
                    heard += 1
                    flags[place] = 1
                    head.note(place, heard, arrival)
                    tail.note(place, heard, arrival)
            figures, gaps = (heard,) + head.figures() + tail.figures(), kmcast.gaps_of(flags)
            most_lost = max(most_lost, count - heard)
            self.window.heard(member, FIGURES.request(number, figures, gaps, 0, count) if gaps
                              else FIGURES.done(number, figures), self.clock)
        for member in self.window.members:      # and all is repaired
            member.rounds.clear()
            member.times_asked.clear()
        self.window.awaited = []
        self.lost, self.sent = self.lost + most_lost, self.sent + count
        self._learn(done, awaited.answers)

    def _learn(self, done, answers):
        """As Course does."""
        self.why = None
        if answers.worst:
            self.why = self.control.learn(done.speed, done.tail, answers.worst[0], done.multicast, self.clock,
                                          answers.lost / answers.hearing, answers.hearing)
        if done.head and answers.head:
            self.why = self.control.learn_head(done.head, answers.head[0], answers.head[1], self.clock) or self.why

    def run(self, rounds):
        """The rates of so many rounds."""
        return [self.round() for _ in range(rounds)]


def mean(values):
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------------------
# A network

@pytest.mark.parametrize("capacity", [20e6, 95e6, 100e6, 200e6, 940e6, 2.5e9])
@pytest.mark.parametrize("queue", [30000, 128000, 500000])
def test_the_capacity_of_the_slowest_link_is_found_and_kept(capacity, queue):
    rates = Network(Link(capacity, queue)).run(60)
    assert 0.85 * capacity < mean(rates[-20:]) < 1.1 * capacity
    assert max(rates[-20:]) < 1.15 * capacity


@pytest.mark.parametrize("capacity", [95e6, 300e6])
def test_it_is_found_though_the_link_loses_nothing(capacity):
    """What it holds comes out at its rate, be its queue as long as you like."""
    network = Network(Link(capacity, queue=10**9))
    rates = network.run(40)
    assert network.lost == 0
    assert 0.9 * capacity < rates[-1] <= capacity


@pytest.mark.parametrize("capacity", [100e6, 940e6])
def test_what_is_sent_in_vain_stays_little_once_the_rate_is_found(capacity):
    network = Network(Link(capacity))
    network.run(40)
    network.lost = network.sent = 0
    network.run(50)
    assert network.lost < 0.01 * network.sent


@pytest.mark.parametrize("capacity", [95e6, 200e6, 940e6])
def test_rounds_that_cost_packets_become_rare(capacity):
    """A repair pass in every round would cost more than the last percent of the rate brings."""
    network, lossy = Network(Link(capacity)), 0
    network.run(40)
    for _ in range(50):
        before = network.lost
        network.round()
        lossy += network.lost > before
    assert lossy <= 8


def test_without_a_bottleneck_the_sender_is_the_limit():
    network = Network(Link())
    assert network.run(20)[-1] == 9.9e9
    assert network.control.rate < 1e12, "it must be able to come down again"


@pytest.mark.parametrize("medium", [0.001, 0.01, 0.02, 0.05])
def test_the_mediums_own_loss_is_not_fought(medium):
    rates = Network(Link(medium=medium), sender_limit=2e9).run(60)
    assert mean(rates[-20:]) > 0.8 * 2e9


@pytest.mark.parametrize("clients", [4, 32])
def test_the_mediums_own_loss_at_many_clients_is_not_fought(clients):
    """The worst of many always has a little more."""
    links = [Link(medium=0.01, seed=seed) for seed in range(clients)]
    assert mean(Network(*links, sender_limit=2e9, most=1024).run(40)[-10:]) > 0.8 * 2e9


@pytest.mark.parametrize("capacity, medium", [
    (100e6, 0.01), (100e6, 0.02), (100e6, 0.05), (100e6, 0.1), (940e6, 0.01), (940e6, 0.02),
    (940e6, 0.05), (940e6, 0.1)])
def test_the_capacity_is_found_in_spite_of_the_mediums_loss(capacity, medium):
    rates = Network(Link(capacity, medium=medium)).run(80)
    assert 0.8 * capacity < mean(rates[-20:]) < 1.2 * capacity


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
def test_so_it_is_if_the_loss_is_before_the_slowest_link(share):
    rates = Network(Link(940e6, before=share)).run(80)
    assert 0.8 * 940e6 < mean(rates[-20:]) < 1.2 * 940e6


@pytest.mark.parametrize("before, after", [(940e6, 100e6), (100e6, 50e6), (100e6, 940e6), (200e6, 400e6)])
def test_a_capacity_that_changes_is_found_again(before, after):
    link = Link(before)
    network = Network(link)
    network.run(40)
    link.capacity = after
    rates = network.run(150)
    assert 0.8 * after < mean(rates[-20:]) < 1.15 * after


def test_one_slow_client_of_many_sets_the_rate():
    links = [Link(10e9, seed=seed) for seed in range(7)] + [Link(100e6)]
    rates = Network(*links).run(50)
    assert 0.85 * 100e6 < mean(rates[-20:]) < 1.1 * 100e6


class Liar(Link):
    """What it says that it hears always takes twice as long as it was sent, and nothing is ever lost."""

    def arrivals(self, departures):
        return [departures[0] + 2 * (departure - departures[0]) for departure in departures]


def test_a_client_that_lies_about_its_times_is_not_believed_for_ever():
    network = Network(Link(100e6), Liar())
    slowest = min(network.run(300))
    assert slowest < 0.5 * 100e6, "else this tests nothing"
    assert mean(network.run(100)[-20:]) > 0.85 * 100e6


def test_a_rival_gets_a_share_and_when_it_has_gone_its_share_is_taken_back():
    link = Link(100e6)
    network = Network(link)
    network.run(40)
    link.rival = 50e6
    rates = network.run(200)
    assert 0.3 * 100e6 < mean(rates[-50:]) < 0.75 * 100e6
    link.rival = 0.0
    rates = network.run(200)
    assert mean(rates[-20:]) > 0.85 * 100e6


def crowd(control, clients, share, line, rounds, count=2048):
    """Rounds to many clients of which each loses a share, over a line that carries so much; returns the rates."""
    generator, now, rates = random.Random(clients), 100.0, []
    members = [kmcast.Member("192.0.2.1", 0.0) for _ in range(clients)]
    for _ in range(rounds):
        speed, answers = control.speed(now, False), kmcast.Answers()
        rate = min(speed.rate, 9.9e9)
        arrives = min(1.0, line / rate)
        for member in members:
            halves = [int(round(generator.gauss(count / 2 * share, math.sqrt(count / 2 * share * (1 - share)))))
                      for _ in range(2)]
            lost = max(0, sum(halves)) / float(count)
            kmcast.RateControl.remember(member, lost, speed)
            ratio = min(1 - max(0, halves[1]) / (count / 2.0), arrives) / (1 - member.medium)
            answers.heard(kmcast.Reception(ratio, 0.0, lost, member))
        now += count * SIZE * 8 / rate
        control.learn(speed, rate, answers.worst[0], count, now, answers.lost / answers.hearing, answers.hearing)
        rates.append(rate)
    return rates


@pytest.mark.parametrize("line", [100e6, 940e6])
def test_1000_clients_with_1_percent_loss_each_do_not_make_the_rate_collapse(line):
    rates = crowd(kmcast.RateControl(), 1000, 0.01, line, 60)
    assert mean(rates[-20:]) > 0.8 * line


def test_nor_where_the_sender_is_the_slowest():
    rates = crowd(kmcast.RateControl(), 1000, 0.01, 1e12, 40)
    assert mean(rates[-10:]) > 0.5 * 9.9e9


# ---------------------------------------------------------------------------------------------------------------------
# What a round tells

MEMBER = kmcast.Member("192.0.2.7", 0.0)


def reception(ratio, lost=0.0, error=0.0, member=MEMBER):
    return kmcast.Reception(ratio, error, lost, member)


class Taught(object):
    """A RateControl that is told what rounds came to, one each 100 ms."""

    def __init__(self, line=None):
        self.control, self.now = kmcast.RateControl(), 100.0
        if line:
            self.line(line)

    def line(self, line):
        for _ in range(2):
            self.round(ratio=min(1.0, line / self.control.rate))
        assert self.control.line == pytest.approx(line)
        self.control.learn_head(1.1 * line, line, 0.0, self.now)        # so it is sure
        assert self.control.rate == pytest.approx(0.995 * line)

    def round(self, ratio=1.0, lost=0.0, error=0.0, achieved=None, seconds=0.1, count=2000, **mean):
        self.now += seconds
        speed = self.control.speed(self.now, False)
        heard = reception(ratio, lost, error, kmcast.Member("192.0.2.7", 0.0))
        return self.control.learn(speed, achieved or speed.rate, heard, count, self.now, **mean)


def test_a_line_slower_than_the_sending_rate_is_found_from_two_trains_without_losses():
    taught = Taught()
    assert "arrives at 1 Gbit/s" in taught.round(ratio=0.1)
    assert taught.control.line is None and 1e9 < taught.control.rate < 1.2e9, "to be sure"
    taught.round(ratio=1e9 / taught.control.rate)
    assert taught.control.line == pytest.approx(1e9) and 0.9e9 < taught.control.rate < 1e9


def test_two_trains_that_do_not_agree_find_no_line():
    taught = Taught()
    taught.round(ratio=0.1)
    taught.round(ratio=0.5)
    assert taught.control.line is None


def test_a_train_at_a_rate_that_was_not_kept_tells_nothing():
    """The producer or our own CPU was slower, and it came as slowly as it was sent."""
    taught = Taught()
    for _ in range(50):
        taught.round(ratio=0.9, achieved=50e6)
    assert taught.control.rate == kmcast.RateControl.START and taught.control.line is None


def test_what_a_clock_may_be_wrong_by_tells_nothing():
    taught = Taught()
    for _ in range(10):
        before = taught.control.rate
        taught.round(ratio=0.9, error=0.2)
        assert taught.control.rate >= before and taught.control.line is None


def test_while_nothing_is_known_a_round_that_keeps_up_is_followed_by_a_faster_one():
    taught = Taught()
    taught.round(ratio=0.01)
    before = taught.control.rate
    assert taught.round() == "it keeps up"
    assert taught.control.rate > before


def test_a_held_up_client_does_not_make_the_rate_collapse():
    """One round that comes late tells nothing, and two take half of the rate at the most; then it comes back."""
    taught = Taught(940e6)
    taught.round()
    before = taught.control.rate
    assert taught.round(ratio=0.01) is None and taught.control.rate == before
    assert taught.round() is None and taught.control.rate == before
    taught.round(ratio=0.01)
    taught.round(ratio=0.01)
    assert taught.control.rate >= 0.5 * before
    for _ in range(50):
        taught.round(ratio=min(1.0, 940e6 / taught.control.rate))
    assert 0.9 * 940e6 < taught.control.rate < 1.05 * 940e6


def test_one_round_with_losses_does_not_give_up_a_line_that_is_known():
    taught = Taught(940e6)
    taught.round()
    before = taught.control.rate
    assert taught.round(ratio=0.2, lost=0.8) is None
    assert taught.control.rate == before and taught.control.line


def test_losses_that_stay_at_any_rate_are_the_mediums():
    taught, member = Taught(), kmcast.Member("192.0.2.7", 0.0)
    trials = 0
    for number in range(20):
        speed = taught.control.speed(taught.now, False)
        kmcast.RateControl.remember(member, 0.1, speed)
        trials += speed.trial is not None
        taught.now += 0.1
        taught.control.learn(speed, min(2e9, speed.rate), reception(0.9 / (1 - member.medium), 0.1, 0.0, member), 2000, taught.now,
                             mean=0.1)
    assert trials and member.medium == pytest.approx(0.1) and taught.control.rate >= 2e9


def test_losses_at_a_rate_that_the_line_carries_are_a_rivals_who_gets_his_share():
    taught = Taught(100e6)
    assert taught.round(lost=0.05) is None and taught.round(lost=0.05) is None, "it may be chance"
    assert "to a rival" in taught.round(lost=0.05)
    assert taught.control.rate == pytest.approx(50e6)
    for _ in range(20):
        taught.round(lost=0.05)
    assert taught.control.rate == pytest.approx(50e6), "but not all"


def test_what_a_rival_left_is_taken_back_step_by_step_as_heads_of_rounds_find_it_free():
    taught = Taught(100e6)
    for _ in range(3):
        taught.round(lost=0.05)
    before = taught.control.rate
    taught.now += 5
    taught.control.learn_head(60e6, 50e6, 0.0, taught.now)
    assert taught.control.rate == before, "he is still there"
    for departed in 60e6, 70e6, 80e6, 90e6:
        taught.control.learn_head(departed, departed, 0.0, taught.now)
        assert taught.control.rate == departed
    taught.control.learn_head(100e6, 100e6, 0.0, taught.now)
    assert taught.control.rate == pytest.approx(99.5e6)


def test_what_nobody_takes_of_a_line_was_never_there():
    taught = Taught(100e6)
    for _ in range(3):
        taught.control.learn_head(110e6, 80e6, 0.0, taught.now)
    assert taught.control.rate == pytest.approx(50e6)
    for departed in 60e6, 70e6, 80e6:
        taught.control.learn_head(departed, departed, 0.0, taught.now)
    for _ in range(3):
        taught.control.learn_head(90e6, 80e6, 0.0, taught.now)
    assert taught.control.line == pytest.approx(80e6) and taught.control.rate == pytest.approx(79.6e6)


def test_losses_with_a_while_between_them_are_no_rival():
    taught = Taught(100e6)
    for _ in range(3):
        taught.round(lost=0.01)
        for _ in range(100):
            taught.round()
        assert taught.control.rate == pytest.approx(99.5e6)


def test_a_few_packets_are_nobodys_loss():
    taught = Taught(100e6)
    before = taught.control.rate
    for _ in range(50):
        taught.round(lost=0.001)
    assert taught.control.rate == pytest.approx(before)


def test_the_head_of_a_round_looks_for_more_now_and_then_once_the_line_is_known():
    taught = Taught()
    assert taught.control.speed(taught.now, True).head_rate == taught.control.rate
    taught = Taught(100e6)
    looks = 0
    for _ in range(100):
        taught.now += 0.1
        speed = taught.control.speed(taught.now, True)
        assert speed.rate == taught.control.rate and (speed.head_rate > speed.rate) != speed.calm
        looks += speed.head_rate > speed.rate
    assert looks == 3
    assert taught.control.speed(taught.now + 100.0, False).calm, "not with a round that is too short for it"


def test_three_heads_in_a_row_that_come_faster_tell_that_there_is_more():
    control = Taught(100e6).control
    before = control.rate
    assert control.learn_head(109e6, 108e6, 0.0, 101.0) is None and control.learn_head(109e6, 108e6, 0.0, 101.0) is None
    assert control.learn_head(109e6, 100e6, 0.0, 101.0) is None, "which begins anew"
    assert control.learn_head(109e6, 108e6, 0.0, 101.0) is None and control.learn_head(109e6, 108e6, 0.0, 101.0) is None
    assert control.rate == before
    assert control.learn_head(109e6, 108e6, 0.0, 101.0) == "there is more"
    assert control.rate > before and control.line is None


def test_a_head_that_comes_at_the_lines_rate_tells_it_more_precisely():
    control = Taught(100e6).control
    assert control.learn_head(109e6, 98e6, 0.0, 101.0) is None
    assert control.line == pytest.approx(99e6)
    assert control.learn_head(109e6, 98e6, 0.1, 101.0) is None and control.line == pytest.approx(99e6), "a clock that may be wrong"


def test_heads_that_arrive_slower_than_the_line_lets_them_tell_of_a_rival_who_takes_what_is_left():
    control, line = Taught(100e6).control, 100e6
    for number in range(12):
        sent, others = control.rate + 0.1 * line, max(0.2 * line, line - control.rate)
        control.learn_head(sent, line * sent / (sent + others), 0.0, 101.0 + number)
        assert 0.5 * line <= control.rate and control.line == line
    assert control.rate == 0.5 * line


def test_the_rate_never_becomes_nothing():
    """Even when all is lost, for whatever reason, for a long time."""
    taught = Taught()
    for _ in range(100):
        taught.round(ratio=0.0, lost=1.0)
        assert taught.control.rate >= 0.99 * kmcast.RateControl.LOWEST
    network = Network(Link(100e6), control=taught.control)
    network.clock = taught.now
    assert mean(network.run(200)[-20:]) > 0.8 * 100e6, "nor stays there"


def test_why_the_rate_changed_is_said():
    taught = Taught()
    before = taught.control.rate
    assert taught.round(ratio=0.5, lost=0.5) is None, "it may be by our bursts"
    why = taught.round(ratio=0.5, lost=0.5)
    assert "50" in why and "%" in why
    assert taught.control.rate < before


# ---------------------------------------------------------------------------------------------------------------------
# Pacer

@pytest.mark.parametrize("rate", [1e6, 10e6, 100e6, 940e6, 10e9, 100e9])
def test_bursts_are_half_a_millisecond_and_at_most_one_call(rate):
    pacer = kmcast.Pacer()
    pacer.rate = rate
    for size in (256, 1500, 9000):
        packets = pacer.burst(size)
        assert 1 <= packets <= 64
        assert packets == 1 or packets * size * 8 / rate <= 0.0005 * 1.001
        assert packets == 64 or (packets + 1) * size > min(0.0005 * rate / 8, pacer.most)


def test_without_a_rate_a_burst_is_one_call():
    assert kmcast.Pacer().burst(1500) == 64


@pytest.mark.parametrize("rate", [1e6, 100e6])
def test_bytes_and_pauses_make_the_rate(rate, monkeypatch):
    """What sent() returns moves on by what was sent, so that n bursts take n times as long as one."""
    monkeypatch.setattr(kmcast, "monotonic", lambda: 0.0)        # a busy machine makes pauses of its own
    pacer = kmcast.Pacer()
    pacer.rate = rate
    first = pacer.sent(1500)
    assert first - kmcast.monotonic() <= 1500 * 8 / rate
    for number in range(1, 50):
        assert pacer.sent(1500) == pytest.approx(first + number * 1500 * 8 / rate, abs=1e-6)


class Clock(object):
    """A clock that is set."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(kmcast, "monotonic", lambda: self.now)


@pytest.mark.parametrize("rate", [1e6, 100e6, 940e6, 10e9])
def test_time_that_has_passed_is_made_good_only_a_little(rate, monkeypatch):
    """Else a sender that was held up would send a burst that no switch holds."""
    clock, pacer = Clock(monkeypatch), kmcast.Pacer()
    pacer.rate = rate
    pacer.sent(1500)
    clock.now += 10.0
    late = clock.now - (pacer.sent(1500) - 1500 * 8 / rate)
    assert 0 < late <= 0.0081 and late * rate / 8 <= 1.01 * (96 << 10)


def test_room_is_left_for_others_on_the_line_but_not_for_long(monkeypatch):
    clock, pacer = Clock(monkeypatch), kmcast.Pacer()
    pacer.rate = 100e6
    pacer.leave_room(125000)
    assert pacer.sent(1500) == pytest.approx(clock.now + 0.01 + 1500 * 8 / 100e6)
    for _ in range(100):
        pacer.leave_room(10**7)
    assert pacer.sent(1500) <= clock.now + 0.11


def test_without_a_limit_there_is_no_pause(monkeypatch):
    clock, pacer = Clock(monkeypatch), kmcast.Pacer()
    pacer.leave_room(10**9)
    assert pacer.sent(10**9) <= clock.now


@pytest.mark.parametrize("rate, text", [(1e9, "1 Gbit/s"), (95.5e6, "95.5 Mbit/s"), (1500, "1.5 kbit/s"), (7, "7 bit/s"),
                                        (float("inf"), "no limit")])
def test_rates_in_words(rate, text):
    assert kmcast.bits(rate) == text
