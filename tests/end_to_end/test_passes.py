"""Hosts come when they come: who is late, who is back, and who lacks something after all, at a real server.

A client of ours says and hears no more than a test tells it to; where it is to hold the others up, it does not answer.
"""

import hashlib
import os
import signal
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import BOTH, in_turn
from wire import INFO, SENT, STATE, payload_size

PAYLOAD = payload_size()
PARTS = 6
ROUND = 10 * PAYLOAD
SIZE = PARTS * ROUND - 100


class Here(object):
    """A server with an image of PARTS parts, and clients of ours, each of which holds one round at a time.

    args: options of the server; places: CLIENTS.
    """

    def __init__(self, tmp_path, python, args=(), places=2, file=True, data=None):
        self.data = helpers.random_bytes(SIZE, seed=14) if data is None else data
        self.path = str(tmp_path / "image")
        self.port = helpers.free_port()
        with open(self.path, "wb") as image:
            image.write(self.data)
        # With --unicast all comes by TCP: what is asked for is what is brought.
        args = ["--buffer-packets", 10, "--unicast", "--chain", "never"] + list(args)
        self.server = helpers.start_server(args + (["-i", self.path] if file else []) + [LOOPBACK, places, self.port],
                                           python, stdin=b"" if file else self.data)
        self.clients = []

    def come(self, **hello):
        """A client comes, and is welcome."""
        self.clients.append(wire.Client(self.port))
        return self.clients[-1].greet(**dict({"seek": True}, **hello))

    def refused(self, **hello):
        """Why a client is not welcome."""
        self.clients.append(wire.Client(self.port))
        return self.clients[-1].hello(**hello).reason()

    def take(self, client, count=1):
        """Have a client take rounds; returns which parts of the image they are."""
        return [self.part(self.bring(client)) for _ in range(count)]

    def bring(self, client):
        """Have a client take a round, all of which it lost, and check it; returns the Round."""
        what, digest = client.ready(), client.sent()
        places = list(range(what.count))
        client.ask(places)
        client.expect(wire.PACKETS)
        content = b"".join(client.packets(places))
        end = what.place + what.size
        assert content == self.data[what.place:end] and digest == hashlib.sha256(self.data[:end]).digest()
        client.done()
        return what

    def take_together(self, part, *clients):
        """Have clients take the same round, a part of the image."""
        for client in clients:
            assert self.part(client.ready()) == part
        for client in clients:
            client.sent()
            client.done()

    @staticmethod
    def part(what):
        return what.place // ROUND

    def end(self, client):
        """Have a client hear that it has everything, and go."""
        fields = client.end()
        assert fields["ok"] and fields["bytes"] == len(self.data), fields
        assert fields["sha256"] == hashlib.sha256(self.data).hexdigest()
        client.ended()

    def close(self):
        for client in self.clients:
            client.close()


@pytest.fixture
def here(tmp_path, python):
    made = []

    def make(*args, **options):
        made.append(Here(tmp_path, python, *args, **options))
        return made[-1]
    yield make
    for each in made:
        each.close()


def begun(here, *args, **options):
    """A server whose first of two clients has taken two parts: (Here, client)."""
    made = here(["--start-wait", "0.1"] + list(options.pop("more", [])), *args, **options)
    first = made.come()
    assert made.take(first, 2) == [0, 1]
    return made, first


@in_turn("a_thread", [1, 64])
def test_who_comes_late_takes_part_from_the_next_round_and_gets_the_beginning_afterwards(here, python, a_thread):
    made, first = begun(here, more=["--clients-per-thread", a_thread])
    late = made.come(host="late")
    made.server.wait_stderr("late (127.0.0.1) is here, late, and lacks")
    assert made.take(first) == [2]
    for part in (3, 4, 5):
        made.take_together(part, first, late)
    made.end(first)
    assert made.take(late, 3) == [0, 1, 2], "and nobody waits for it"
    made.end(late)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_a_pipe_that_comes_late_gets_all_of_it_in_the_next_pass(here, python):
    made, first = begun(here)
    pipe = made.come(host="pipe", seek=False)
    assert made.take(first, 4) == [2, 3, 4, 5]
    made.end(first)
    assert made.take(pipe, 6) == [0, 1, 2, 3, 4, 5]
    made.end(pipe)
    code, stderr, _ = made.server.finish(10)
    assert code == 0 and "pass 2" in stderr, stderr


@BOTH
def test_who_waits_for_the_next_pass_is_told_so(here, python):
    made, first = begun(here)
    pipe = made.come(host="pipe", seek=False)
    while "starts_in" not in pipe.expect(STATE).fields:
        pass
    made.take(first)                    # a pass that goes on tells when it will be through
    while True:
        fields = pipe.expect(STATE).fields
        if fields.get("starts_in") is not None:
            break
    assert fields["pass"] == 1 and fields["starts_in"] >= 0


@BOTH
def test_who_is_back_is_brought_only_what_it_lacks(here, python):
    made, first = begun(here)
    again = made.come(image=first.welcome["image"], have=[[0, 2 * ROUND], [3 * ROUND, 4 * ROUND + 5]])
    assert made.take(first, 2) == [2, 3]
    made.take_together(4, first, again)
    made.take_together(5, first, again)
    made.end(first)
    assert made.take(again) == [2]
    made.end(again)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_what_is_held_of_another_image_counts_for_nothing(here, python):
    made = here(places=1)
    client = made.come(image="0123456789abcdef" * 2, have=[[0, SIZE]])
    assert made.take(client, PARTS) == list(range(PARTS))
    made.end(client)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_who_holds_everything_is_told_so_at_once(here, python):
    made, first = begun(here)
    back = made.come(image=first.welcome["image"], have=[[0, SIZE]])
    made.take(first, 4)
    made.end(first)
    made.end(back)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_the_same_output_takes_its_own_place_at_once(here, python):
    """Its connection may be one that nobody has at its other end any more."""
    made = here(places=1)
    who = "0123456789abcdef" * 2
    first = made.come(who=who)
    made.take(first, 2)
    again = made.come(who=who, image=first.welcome["image"], have=[[0, 2 * ROUND]])
    assert sorted(made.take(again, 4)) == [2, 3, 4, 5]
    made.end(again)
    code, stderr, _ = made.server.finish(10)
    assert code == 0 and "1 of 1 client has the image" in stderr, stderr


@BOTH
def test_what_a_client_lacks_after_all_is_brought_again(here, python):
    made = here(places=1)
    client = made.come()
    made.take(client, 3)
    client.say(wire.lack([ROUND, ROUND + 1]))
    assert made.take(client, 4) == [3, 4, 5, 1]
    made.end(client)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_a_client_can_lack_something_though_it_was_told_that_all_was_well(here, python):
    """The two words cross on their way."""
    made = here(places=1)
    client = made.come()
    made.take(client, PARTS)
    assert client.expect(wire.BYE).fields["ok"]
    client.say(wire.lack([0, 1], [5 * ROUND, SIZE]))
    assert made.take(client, 2) == [0, 5]
    made.end(client)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_who_lacks_again_and_again_is_dropped(here, python):
    made = here(places=1)
    client = made.come()
    with pytest.raises(wire.Unexpected):
        for _ in range(10):
            made.take(client, PARTS)
            client.expect(wire.BYE)
            client.say(wire.lack([0, SIZE]))
    assert made.server.finish(10)[0] == 1


@BOTH
def test_who_has_stalled_may_come_back_and_gets_what_it_lacks(here, python):
    made = here(["--stall-timeout", 2])
    first, second = made.come(), made.come()
    made.take_together(0, first, second)
    assert made.part(first.ready()) == made.part(second.ready()) == 1
    first.sent()
    first.done()
    bye = second.expect(wire.BYE, SENT)
    while bye.kind == SENT:
        bye = second.expect(wire.BYE)
    assert "stalled" in bye.fields["reason"] and bye.fields["again"] is True
    assert made.part(first.announced()) == 2
    back = made.come(image=first.welcome["image"], have=[[0, ROUND]])
    first.say(wire.SESSION.ready(first.round))
    first.sent()
    first.done()
    for part in (3, 4, 5):
        made.take_together(part, first, back)
    made.end(first)
    assert made.take(back, 2) == [1, 2]
    made.end(back)
    code, stderr, _ = made.server.finish(10)
    assert code == 3 and "stalled" in stderr, "on loopback nobody is the same host\n" + stderr


# ---------------------------------------------------------------------------------------------------------------------
# Who may come

@BOTH
def test_more_than_there_are_places_for_are_refused(here, python):
    made, first = begun(here, places=1)
    assert "all places are taken" in made.refused()
    made.take(first, 4)
    made.end(first)
    assert made.server.finish(10)[0] == 3


@BOTH
def test_with_more_there_is_always_a_place(here, python):
    made, first = begun(here, places=1, more=["--more"])
    late = made.come()
    made.take(first)                    # the one that was announced before
    for client in (first, late):
        client.close()
    assert made.server.finish(10)[0] == 1


@BOTH
def test_who_is_late_for_a_pipe_hears_what_would_help(here, python):
    made, first = begun(here, file=False)
    assert "--spool" in made.refused()
    made.take(first, 4)
    made.end(first)
    assert made.server.finish(10)[0] == 3


@BOTH
def test_a_pipe_that_is_kept_in_a_spool_can_be_read_again(here, python, tmp_path):
    spool = tmp_path / "spool"
    made, first = begun(here, file=False, more=["--spool", str(spool)])
    late = made.come(seek=False)
    made.take(first, 4)
    made.end(first)
    assert made.take(late, PARTS) == list(range(PARTS))
    made.end(late)
    assert made.server.finish(10)[0] == 0
    same = spool.read_bytes() == made.data
    assert same, "the spool has the image"


@BOTH
def test_a_spool_that_takes_no_more_ends_the_transfer(here, python):
    made = here(["--spool", "/dev/full"], places=1, file=False)
    code, stderr, _ = made.server.finish(10)
    assert code == 1 and "cannot write to the spool" in stderr, stderr


@BOTH
def test_a_file_that_was_changed_is_not_read_again(here, python):
    made, first = begun(here)
    late = made.come()
    with open(made.path, "r+b") as image:
        image.write(b"other bytes")
    assert made.take(first) == [2]
    for part in (3, 4):
        made.take_together(part, first, late)
    for client in (first, late):
        assert "was changed" in client.reason(passing=(INFO, SENT))
    code, stderr, _ = made.server.finish(10)
    assert code != 0 and "was changed" in stderr, stderr


@BOTH
def test_it_lingers_for_who_comes_when_all_have_the_image(here, python):
    made = here(["--linger", 60, "--start-wait", "0.1"], places=2)
    first = made.come()
    made.take(first, PARTS)
    made.end(first)
    late = made.come(seek=False)
    assert made.take(late, PARTS) == list(range(PARTS))
    made.end(late)
    assert made.server.finish(10)[0] == 0, "all places are served, so nobody is waited for"


@BOTH
def test_it_does_not_linger_for_ever(here, python):
    made = here(["--linger", 1, "--start-wait", "0.1"], places=2)
    first = made.come()
    made.take(first, PARTS)
    made.end(first)
    assert made.server.finish(20)[0] == 3


# ---------------------------------------------------------------------------------------------------------------------
# For ever

def forever(here, *args, **options):
    return here(["--forever", "--start-wait", "0.1"] + list(args), **options)


def whole(made, client):
    """Have a client take all of the image, and go."""
    parts = made.take(client, PARTS)
    assert sorted(parts) == list(range(PARTS))
    made.end(client)


@BOTH
def test_for_ever_whoever_comes_is_served_until_it_is_told_to_end(here, python):
    made = forever(here, places=1)
    for _ in range(3):
        whole(made, made.come())
    made.server.signal(signal.SIGTERM)
    code, stderr, _ = made.server.finish(10)
    assert code == 0 and "3 clients have the image" in stderr, stderr


@BOTH
def test_a_server_that_is_to_end_serves_those_who_are_here_and_nobody_else(here, python):
    made = forever(here, places=3)
    client = made.come()
    made.take(client)
    made.server.signal(signal.SIGTERM)
    made.server.wait_stderr("ending when those 1 who are here are served")
    assert "about to end" in made.refused()
    assert made.take(client, PARTS - 1) == list(range(1, PARTS))
    made.end(client)
    assert made.server.finish(10)[0] == 3, "somebody was refused"


@BOTH
def test_a_second_signal_ends_it_at_once(here, python):
    made = forever(here, places=3)
    client = made.come()
    made.take(client)
    made.server.signal(signal.SIGTERM)
    time.sleep(1.1)
    made.server.signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in client.reason(passing=(INFO, SENT))
    assert made.server.finish(10)[0] == 1


@BOTH
def test_one_that_nobody_has_come_to_ends_at_once(here, python):
    made = here(["--forever"], places=3)
    made.server.wait_stderr("waiting for")
    made.server.signal(signal.SIGTERM)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_a_signal_starts_it_with_those_who_are_here(here, python):
    made = here(["--forever"], places=3)
    made.server.wait_stderr("waiting for")
    made.server.signal(signal.SIGUSR1)
    client = made.come()
    made.server.wait_stderr("is here")
    made.server.signal(signal.SIGUSR1)
    whole(made, client)
    whole(made, made.come())
    made.server.signal(signal.SIGTERM)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_a_file_that_was_replaced_is_a_new_image_for_those_who_come_from_then_on(here, python, tmp_path):
    made = forever(here, places=3)
    old, first = made.data, made.come()
    made.take(first, 2)
    new = helpers.random_bytes(SIZE, seed=15)
    (tmp_path / "new").write_bytes(new)
    os.rename(str(tmp_path / "new"), made.path)
    later = [wire.Client(made.port).hello(host="late", seek=seek) for seek in (True, False)]
    made.clients += later
    assert made.take(first, PARTS - 2) == list(range(2, PARTS)), "what was begun goes on"
    made.end(first)
    made.data = new
    for client in later:
        client.take_welcome()
        assert client.welcome["image"] != first.welcome["image"]
    for part in range(PARTS):
        made.take_together(part, *later)
    for client in later:
        made.end(client)
    made.server.signal(signal.SIGTERM)
    code, stderr, _ = made.server.finish(10)
    assert code == 0 and "another image" in stderr and old != new, stderr


@BOTH
def test_who_waits_for_a_new_image_may_go(here, python, tmp_path):
    made = forever(here, places=3)
    first = made.come()
    made.take(first, 2)
    (tmp_path / "new").write_bytes(made.data)
    os.rename(str(tmp_path / "new"), made.path)
    for _ in range(3):
        wire.Client(made.port).hello().close()
    made.take(first, PARTS - 2)
    made.end(first)
    whole(made, made.come())
    made.server.signal(signal.SIGTERM)
    assert made.server.finish(10)[0] == 0


@BOTH
def test_an_image_that_was_replaced_while_nobody_was_here_is_the_new_one(here, python, tmp_path):
    made = forever(here, places=3)
    whole(made, made.come())
    made.data = helpers.random_bytes(SIZE, seed=16)
    (tmp_path / "new").write_bytes(made.data)
    os.rename(str(tmp_path / "new"), made.path)
    whole(made, made.come())
    made.server.signal(signal.SIGTERM)
    assert made.server.finish(10)[0] == 0


def used(pid):
    """Descriptors, threads, and memory in MiB of a process."""
    with open("/proc/%d/statm" % pid) as sizes:
        resident = int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/%d/fd" % pid)), len(os.listdir("/proc/%d/task" % pid)), resident >> 20


@BOTH
def test_fifty_passes_use_no_more_than_three(here, python, tmp_path):
    made = forever(here, places=1)
    for number in range(50):
        if number % 10 == 5:            # and images
            made.data = helpers.random_bytes(SIZE, seed=number)
            (tmp_path / "new").write_bytes(made.data)
            os.rename(str(tmp_path / "new"), made.path)
        client = made.come(seek=number % 3 > 0)
        whole(made, client)
        client.close()
        if number == 6:
            time.sleep(0.5)             # until it is at rest
            early = used(made.server.pid)
    time.sleep(0.5)
    late = used(made.server.pid)
    assert late[:2] == early[:2] and late[2] <= early[2] + 1, (early, late)
    made.server.signal(signal.SIGTERM)
    assert made.server.finish(10)[0] == 0


@pytest.mark.parametrize("args, reason", [
    (["--forever"], "read again"), (["--forever", "--pipe", "echo"], "read again"),
    (["--compat", "--more"], "--compat"), (["--compat", "--linger", "3"], "--compat")], ids=" ".join)
def test_what_cannot_be_is_wrong_usage(args, reason):
    server = helpers.start_kmcast(["server"] + args + [LOOPBACK, 1, helpers.free_port()], stdin=helpers.random_bytes(10))
    code, stderr, _ = server.finish(10)
    assert code == 2 and reason in stderr, stderr


def test_a_spool_is_for_what_comes_by_a_pipe(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"data")
    server = helpers.start_kmcast(["server", "-i", str(image), "--spool", str(tmp_path / "spool"), LOOPBACK, 1,
                                   helpers.free_port()])
    code, stderr, _ = server.finish(10)
    assert code == 2 and "--spool" in stderr, stderr
    assert not (tmp_path / "spool").exists()
