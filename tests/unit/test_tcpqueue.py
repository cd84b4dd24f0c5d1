"""TcpQueue: pieces stay in order, whatever is put where, and its sizes never lie."""

import random

import pytest

import kmcast


@pytest.fixture
def queue():
    return kmcast.TcpQueue()


def sizes(queue):
    return queue.count, queue.size


def test_a_new_queue_is_empty(queue):
    assert sizes(queue) == (0, 0)
    assert queue.get_head() is None
    assert queue.flat_peek() == b"" and queue.flat() == b""


def test_pieces_come_out_as_they_went_in(queue):
    for piece in (b"one", b"two", b"three"):
        queue.put_tail(piece)
    assert sizes(queue) == (3, 11)
    assert [queue.get_head(), queue.get_head(), queue.get_head(), queue.get_head()] == [b"one", b"two", b"three", None]
    assert sizes(queue) == (0, 0)


def test_what_could_not_be_sent_goes_back_to_the_head(queue):
    queue.put_tail(b"abc")
    queue.put_tail(b"def")
    head = queue.get_head()
    queue.put_head(head[2:])
    assert sizes(queue) == (2, 4)
    assert queue.get_head() == b"c"
    assert queue.get_head() == b"def"


def test_flat_takes_everything_and_flat_peek_leaves_it(queue):
    queue.put_tail(b"abc")
    queue.put_tail(memoryview(bytearray(b"def")))
    queue.put_head(bytearray(b"-"))
    assert queue.flat_peek() == b"-abcdef"
    assert sizes(queue) == (3, 7)
    flat = queue.flat()
    assert flat == b"-abcdef" and isinstance(flat, bytes)
    assert sizes(queue) == (0, 0) and queue.get_head() is None


def test_a_single_piece_is_flat_too(queue):
    for piece in (b"abc", memoryview(b"abc"), bytearray(b"abc")):
        queue.put_tail(piece)
        assert isinstance(queue.flat_peek(), bytes)
        assert queue.flat() == b"abc"


def test_nothing_is_no_piece(queue):
    """Else a sender would take an empty send for a closed connection."""
    queue.put_tail(b"")
    queue.put_head(memoryview(b""))
    assert sizes(queue) == (0, 0)
    assert queue.get_head() is None


def test_clear_forgets_everything(queue):
    queue.put_tail(b"abc")
    queue.clear()
    assert sizes(queue) == (0, 0) and queue.flat() == b"" and queue.get_head() is None
    queue.put_tail(b"d")
    assert sizes(queue) == (1, 1)


def test_any_order_of_operations_agrees_with_a_list(queue):
    generator, expected = random.Random(1), []
    for number in range(3000):
        operation = generator.choice(["tail", "tail", "head", "get", "peek"] + ["flat", "clear"] * (number % 50 == 0))
        piece = b"x%d" % number if str is not bytes else "x%d" % number
        if operation == "tail":
            queue.put_tail(piece)
            expected.append(piece)
        elif operation == "head":
            queue.put_head(piece)
            expected.insert(0, piece)
        elif operation == "get":
            assert queue.get_head() == (expected.pop(0) if expected else None)
        elif operation == "peek":
            assert queue.flat_peek() == b"".join(expected)
        elif operation == "flat":
            assert queue.flat() == b"".join(expected)
            expected = []
        else:
            queue.clear()
            expected = []
        assert sizes(queue) == (len(expected), sum(map(len, expected)))
