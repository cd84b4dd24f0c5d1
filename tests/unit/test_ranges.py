"""Held: ranges of an image as somebody holds them."""

import random

import pytest

import kmcast
from kmcast import Held


def as_set(held):
    return set(place for start, stop in held for place in range(start, stop))


def test_what_was_added_is_there_and_what_was_removed_is_not():
    held = Held([(10, 20), (30, 40)])
    assert list(held) == [(10, 20), (30, 40)] and held.size == 20 and len(held) == 2
    held.add(20, 30)
    assert list(held) == [(10, 40)]
    held.remove(15, 16)
    assert list(held) == [(10, 15), (16, 40)]
    held.remove(0, 100)
    assert list(held) == [] and not len(held) and held.size == 0


def test_the_prefix_is_what_is_there_from_the_start_on():
    assert Held().prefix == 0
    assert Held([(1, 5)]).prefix == 0
    assert Held([(5, 9), (0, 5), (10, 11)]).prefix == 9


def test_any_changes_give_what_a_set_of_bytes_would_have():
    rng = random.Random(5)
    for _ in range(300):
        held, model = Held(), set()
        for _ in range(12):
            start = rng.randrange(30)
            stop = start + rng.randrange(12)
            if rng.random() < .6:
                held.add(start, stop)
                model |= set(range(start, stop))
            else:
                held.remove(start, stop)
                model -= set(range(start, stop))
            asked = set(range(start, stop))
            assert as_set(held) == model and held.size == len(model)
            low = rng.randrange(30)
            asked = set(range(low, low + rng.randrange(10)))
            first, last = low, low + len(asked)
            assert held.covers(first, last) == (asked <= model)
            assert held.touches(first, last) == bool(asked & model)
            assert as_set(held.missing(first, last)) == asked - model
            assert held == Held(held) and Held.from_list(held.to_list()) == held
            assert all(one[1] < other[0] for one, other in zip(list(held), list(held)[1:]))


def test_of_too_many_ranges_the_largest_go_on_the_wire():
    held = Held([(10 * i, 10 * i + 1 + i % 3) for i in range(2000)])
    listed = held.to_list()
    assert len(listed) == Held.MOST and listed == sorted(listed)
    assert all(stop - start > 1 for start, stop in listed)
    assert all(held.covers(start, stop) for start, stop in listed)


@pytest.mark.parametrize("value", [
    None, {}, "0-1", [1, 2], [[1]], [[1, 2, 3]], [["0", "1"]], [[0, 1.5]], [[True, 2]], [[-1, 2]], [[2, 2]], [[3, 2]],
    [[0, 5], [4, 9]], [[5, 9], [0, 4]], [[0, 1 << 63]], [[2 * i, 2 * i + 1] for i in range(1001)]])
def test_ranges_that_are_none_are_a_protocol_error(value):
    with pytest.raises(kmcast.ProtocolError):
        Held.from_list(value)


def test_ranges_of_the_wire_are_read():
    assert list(Held.from_list([])) == []
    assert list(Held.from_list([[0, 5], [5, 9], [10, 12]])) == [(0, 9), (10, 12)]
