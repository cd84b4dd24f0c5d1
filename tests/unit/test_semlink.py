"""SemLink: the chained and zipped sync of the spec, between real threads."""

import select
import threading
import time

import pytest

import kmcast


class Chain(object):
    """Threads that are linked as the server's: each spawns the next one. `log` is what they did, in order."""

    def __init__(self, *bodies):
        """bodies: functions of (link, log, child's start function), from the root parent down."""
        self.log = []
        self._bodies = bodies
        self._threads = []
        self._start(0, kmcast.SemLink())
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "a thread hangs; until then: %s" % self.log

    def _start(self, number, link):
        thread = threading.Thread(target=self._run, args=(number, link))
        thread.daemon = True
        self._threads.append(thread)
        thread.start()

    def _run(self, number, link):
        if number + 1 < len(self._bodies):
            self._start(number + 1, link.spawn())
        try:
            self._bodies[number](link, self.log.append)
        except kmcast.LinkClosed:
            self.log.append("%d: closed" % number)
        finally:
            link.close()


def test_children_wait_for_the_parents_init():
    """The first drawing: `aaa()` of each TCP server happens after the UDP server's init."""
    def root(link, log):
        time.sleep(0.05)
        log("init")
        link.release_child()
        link.wait_child()

    def server(link, log):
        link.wait_parent()
        link.release_child()
        log("aaa")
        link.wait_child()
        link.release_parent()
    assert Chain(root, server, server, server).log == ["init", "aaa", "aaa", "aaa"]


def test_the_parent_waits_until_all_children_are_ready():
    """The second drawing: send() happens after every ready(), however slow."""
    def root(link, log):
        link.wait_child()
        log("send")

    def server(delay):
        def body(link, log):
            time.sleep(delay)
            log("ready")
            link.wait_child()
            link.release_parent()
        return body
    for delays in ((0, 0.05, 0), (0.05, 0, 0), (0, 0, 0.05)):
        assert Chain(root, *map(server, delays)).log == ["ready"] * 3 + ["send"]


def test_the_api_as_the_spec_uses_it():
    """The third drawing: down to the grandchild and up again, round after round, with no-ops at both ends."""
    rounds = 200

    def root(link, log):
        for number in range(rounds):
            link.wait_parent()
            log("down 1")
            link.release_child()
            link.wait_child()
            log("up 1")
            link.release_parent()

    def server(name):
        def body(link, log):
            for _ in range(rounds):
                link.wait_parent()
                log("down " + name)
                link.release_child()
                link.wait_child()
                log("up " + name)
                link.release_parent()
        return body
    assert Chain(root, server("2"), server("3")).log == ["down 1", "down 2", "down 3", "up 3", "up 2", "up 1"] * rounds


def test_all_four_calls_do_nothing_where_there_is_no_neighbour():
    link = kmcast.SemLink()
    assert link.parent_fd is None and link.child_fd is None
    link.wait_parent()
    link.wait_child()
    link.release_parent()
    link.release_child()
    link.close_child()
    link.close()
    link.close()


def test_a_release_before_the_wait_is_not_lost_and_they_add_up():
    parent = kmcast.SemLink()
    child = parent.spawn()
    for _ in range(3):
        parent.release_child()
        child.release_parent()
    for _ in range(3):
        child.wait_parent()
        parent.wait_child()
    assert not select.select([child.parent_fd, parent.child_fd], [], [], 0)[0]
    parent.close()
    child.close()


def test_links_can_be_polled():
    parent = kmcast.SemLink()
    child = parent.spawn()
    poller = select.poll()
    poller.register(child.parent_fd, select.POLLIN)
    poller.register(parent.child_fd, select.POLLIN)
    assert poller.poll(0) == []
    parent.release_child()
    assert [fd for fd, _ in poller.poll(1000)] == [child.parent_fd]
    child.wait_parent()
    assert poller.poll(0) == []
    child.release_parent()
    assert [fd for fd, _ in poller.poll(1000)] == [parent.child_fd]
    parent.wait_child()
    assert poller.poll(0) == []
    parent.close()
    child.close()


@pytest.mark.parametrize("ends", ["parent", "child"])
def test_a_neighbour_that_ends_is_seen_in_poll_and_in_the_next_wait(ends):
    parent = kmcast.SemLink()
    child = parent.spawn()
    link, other = (parent, child) if ends == "child" else (child, parent)
    fd, wait, release = (link.child_fd, link.wait_child, link.release_child) if ends == "child" else (
        link.parent_fd, link.wait_parent, link.release_parent)
    other.close()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert [ready for ready, _ in poller.poll(1000)] == [fd]
    release()                           # does no harm
    with pytest.raises(kmcast.LinkClosed):
        wait()
    link.close()


def test_what_was_released_before_the_end_is_still_received():
    parent = kmcast.SemLink()
    child = parent.spawn()
    child.release_parent()
    child.close()
    parent.wait_child()
    with pytest.raises(kmcast.LinkClosed):
        parent.wait_child()


def test_the_end_of_a_thread_in_the_middle_reaches_both_neighbours():
    """Nobody hangs: a blocked parent and a blocked child wake up, and so do theirs."""
    def root(link, log):
        link.wait_child()

    def server(link, log):
        link.wait_parent()

    def dying(link, log):
        time.sleep(0.05)
    assert sorted(Chain(root, dying, server).log) == ["0: closed", "2: closed"]


def test_without_its_child_a_parent_goes_on():
    parent = kmcast.SemLink()
    child = parent.spawn()
    child.close()
    parent.close_child()
    assert parent.child_fd is None
    parent.release_child()
    parent.wait_child()
