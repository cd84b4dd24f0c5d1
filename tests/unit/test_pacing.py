"""RateControl finds what a link carries, in a simulated network; Pacer keeps bursts small. No clock is looked at."""

import random
import time

import pytest

import kmcast

SIZE = 1500                     # bytes of a packet
FIRST, MOST = 64, 8192          # packets in the first round, and in any


class Link(object):
    """A link of `capacity` bit/s behind a drop-tail queue of `queue` bytes, with a medium that loses a share of packets."""

    def __init__(self, capacity=float("inf"), queue=128000, medium=0.0, seed=1):
        self.capacity, self.queue, self.medium = capacity, queue, medium
        self._random = random.Random(seed)

    def lost(self, count, rate):
        """The places lost of a round sent at `rate`; the queue is empty before each round."""
        waiting, lost = 0.0, []
        drained = SIZE * self.capacity / rate           # bytes that leave while one packet comes
        for place in range(count):
            waiting = max(0.0, waiting - drained)
            if waiting + SIZE > self.queue:
                lost.append(place)
            else:
                waiting += SIZE
                if self._random.random() < self.medium:
                    lost.append(place)
        return lost


def run(control, links, rounds, sender_limit=10e9, most=MOST):
    """Send rounds over links, one a client; returns the rates at which they were sent.

    As the server does: rounds double up to `most`, and last at most a second; the verdict is by the worst client.
    """
    rates, limit = [], FIRST
    for _ in range(rounds):
        count = int(max(FIRST, min(limit, control.rate / 8 / SIZE, most)))
        limit = min(2 * count, most)
        rate = min(control.rate, sender_limit)
        worst = max((link.lost(count, rate) for link in links), key=len)
        control.round_over(count, worst, rate, count * SIZE * 8 / rate)
        rates.append(rate)
    return rates


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("capacity", [20e6, 95e6, 100e6, 200e6, 940e6, 2.5e9])
@pytest.mark.parametrize("queue", [30000, 128000, 500000])
@pytest.mark.parametrize("most", [5745, MOST])
def test_the_capacity_of_the_slowest_link_is_found_and_kept(capacity, queue, most):
    rates = run(kmcast.RateControl(), [Link(capacity, queue)], 60, most=most)
    assert 0.85 * capacity < mean(rates[-20:]) < 1.1 * capacity
    # What a queue holds of a round hides that much; the rate may swing, not soar.
    assert max(rates[-20:]) < 1.5 * capacity


def losses(control, link, rounds):
    """How many packets are lost in each of so many full rounds, once the rate is found."""
    run(control, [link], 40)
    for _ in range(rounds):
        lost = link.lost(MOST, control.rate)
        control.round_over(MOST, lost, control.rate, MOST * SIZE * 8 / control.rate)
        yield len(lost)


@pytest.mark.parametrize("capacity", [100e6, 940e6])
def test_what_is_sent_in_vain_stays_little_once_the_rate_is_found(capacity):
    assert sum(losses(kmcast.RateControl(), Link(capacity), 20)) < 0.05 * 20 * MOST


@pytest.mark.parametrize("capacity", [95e6, 200e6, 940e6])
def test_steps_that_cost_packets_become_rare(capacity):
    """A repair pass in every round would cost more than the last percent of the rate brings."""
    assert sum(lost > 0 for lost in losses(kmcast.RateControl(), Link(capacity), 50)) <= 8


def test_without_a_bottleneck_the_sender_is_the_limit():
    control = kmcast.RateControl()
    rates = run(control, [Link()], 20)
    assert rates[-1] == 10e9
    assert control.rate < 1e12, "it must be able to come down again"


def test_a_rate_that_was_never_reached_proves_nothing():
    """The producer or our own CPU was slower: no loss then does not mean that the network carries more."""
    control = kmcast.RateControl()
    for _ in range(50):
        control.round_over(MOST, [], 50e6, MOST * SIZE * 8 / 50e6)
    assert control.rate <= 4 * kmcast.RateControl.START


@pytest.mark.parametrize("medium", [0.001, 0.01, 0.02, 0.05])
def test_the_mediums_own_loss_is_not_fought(medium):
    rates = run(kmcast.RateControl(), [Link(medium=medium)], 60, sender_limit=2e9)
    assert mean(rates[-20:]) > 0.8 * 2e9


@pytest.mark.parametrize("clients", [4, 32])
def test_the_mediums_own_loss_at_many_clients_is_not_fought(clients):
    """The worst of many always has a little more."""
    links = [Link(medium=0.01, seed=seed) for seed in range(clients)]
    assert mean(run(kmcast.RateControl(), links, 40, sender_limit=2e9, most=2048)[-10:]) > 0.8 * 2e9


@pytest.mark.parametrize("medium", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("capacity", [100e6, 940e6])
def test_the_capacity_is_found_in_spite_of_the_mediums_loss(capacity, medium):
    rates = run(kmcast.RateControl(), [Link(capacity, medium=medium)], 80)
    assert 0.8 * capacity < mean(rates[-20:]) < 1.2 * capacity


@pytest.mark.parametrize("before, after", [(940e6, 100e6), (100e6, 50e6), (100e6, 940e6), (200e6, 400e6)])
def test_a_capacity_that_changes_is_found_again(before, after):
    control, link = kmcast.RateControl(), Link(before)
    run(control, [link], 40)
    link.capacity = after
    rates = run(control, [link], 100)
    assert 0.8 * after < mean(rates[-20:]) < 1.15 * after


def test_one_slow_client_of_many_sets_the_rate():
    links = [Link(10e9, seed=seed) for seed in range(7)] + [Link(100e6)]
    rates = run(kmcast.RateControl(), links, 50)
    assert 0.85 * 100e6 < mean(rates[-20:]) < 1.1 * 100e6


def test_the_rate_never_becomes_nothing():
    """Even when all is lost, for whatever reason, for a long time."""
    control = kmcast.RateControl()
    for _ in range(100):
        control.round_over(1000, list(range(1000)), control.rate, 1)
        assert control.rate >= kmcast.RateControl.LOWEST
    rates = run(control, [Link(100e6)], 200)
    assert mean(rates[-20:]) > 0.8 * 100e6, "nor stays there"


def test_why_the_rate_changed_is_said():
    control = kmcast.RateControl()
    before = control.rate
    assert control.round_over(MOST, [], before, 0.5)
    assert control.rate > before
    before = control.rate
    why = control.round_over(MOST, list(range(1000, 1000 + MOST // 2)), before, 0.5)
    assert "50" in why and "%" in why
    assert control.rate < before


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
        assert packets == 64 or (packets + 1) * size * 8 / rate > 0.0005


def test_without_a_rate_a_burst_is_one_call():
    assert kmcast.Pacer().burst(1500) == 64


@pytest.mark.parametrize("rate", [1e6, 100e6])
def test_bytes_and_pauses_make_the_rate(rate, monkeypatch):
    """What sent() returns moves on by what was sent, so that n bursts take n times as long as one."""
    monkeypatch.setattr(kmcast, "monotonic", lambda: 0.0)        # a busy machine makes pauses of its own
    pacer = kmcast.Pacer()
    pacer.rate = rate
    pacer.start()
    first = pacer.sent(1500)
    assert first - kmcast.monotonic() <= 1500 * 8 / rate
    for number in range(1, 50):
        assert pacer.sent(1500) == pytest.approx(first + number * 1500 * 8 / rate, abs=1e-6)


def test_time_that_has_passed_is_made_good_only_a_little():
    """Else a sender that was held up would send a burst that no switch holds."""
    pacer = kmcast.Pacer()
    pacer.rate = 100e6
    pacer.start()
    time.sleep(0.1)
    now = kmcast.monotonic()
    assert pacer.sent(1500) > now - 0.01


def test_without_a_limit_there_is_no_pause():
    pacer = kmcast.Pacer()
    pacer.start()
    assert pacer.sent(10**9) <= kmcast.monotonic()


@pytest.mark.parametrize("rate, text", [(1e9, "1 Gbit/s"), (95.5e6, "95.5 Mbit/s"), (1500, "1.5 kbit/s"), (7, "7 bit/s"),
                                        (float("inf"), "no limit")])
def test_rates_in_words(rate, text):
    assert kmcast.bits(rate) == text
