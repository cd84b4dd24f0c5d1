"""A client whose file takes rounds in any order, and that goes on where it, or another one before it, broke off."""

import glob
import os
import re
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import BOTH, in_turn
from wire import LACK

IMAGE = helpers.random_bytes(5950, seed=8)
ROUND = 1000
NAME, OTHER = "0123456789abcdef" * 2, "f" * 32
PARTS = [(start, min(start + ROUND, len(IMAGE))) for start in range(0, len(IMAGE), ROUND)]


class Talk(object):
    """A client with `-o`, and a server of ours that brings it IMAGE, or parts of it."""

    def __init__(self, folder, python):
        self.path, self.python = str(folder / "image"), python
        self.server = wire.Server(image=NAME, again=True, size=len(IMAGE))
        self.client = self.hello = None

    def start(self, *args):
        """Start a client, and greet it; returns what it says that it holds."""
        self.client = helpers.start_client(
            list(args) + ["-v", "-o", self.path, LOOPBACK, LOOPBACK, self.server.port], self.python)
        return self.accept()

    def accept(self, **welcome):
        """Greet a client that comes; returns what it says that it holds."""
        self.server.accept().greet(**welcome)
        return self.server.hello["have"]

    def bring(self, *numbers):
        """Bring it some of PARTS."""
        for number in numbers:
            self.server.bring(IMAGE, *PARTS[number])

    def differs(self, number, lacks):
        """Bring it one of PARTS, which does not fit what it holds; returns whether that was seen at once, and it `lacks` all."""
        what = self.server.announce_part(IMAGE, *PARTS[number])
        self.server.take_ready(what)
        self.server.multicast(what)
        self.server.say(self.server.sent(what))
        said = self.server.expect(wire.DONE, wire.SUMS)
        if said.kind == wire.SUMS:
            self.server.say(wire.SESSION.sums(what, wire.sums_of(self.server.payloads(what))))
            assert self.lacks() == lacks
            self.server.done(what)
        return said.kind == wire.SUMS

    def lacks(self):
        """Take a LACK."""
        return self.server.expect(LACK).fields["lacks"]

    def kill(self):
        """Kill the client without warning."""
        self.client.stop()
        self.server.sock.close()

    def kill_with(self, *numbers):
        """Have a client hold some of PARTS, and kill it."""
        self.start("--resume")
        self.bring(*numbers)
        self.wait_for(len(numbers))
        self.kill()

    def check(self):
        """Have it end well: it has the image, and nothing else is left."""
        self.server.has_all(IMAGE)
        self.server.done(wire.IMAGE)
        self.ended_well()

    def ended_well(self):
        code, stderr, _ = self.client.finish(20)
        assert code == 0, stderr
        with open(self.path, "rb") as file:
            assert file.read() == IMAGE
        assert self.left() == ["image"]

    def left(self):
        return sorted(os.listdir(os.path.dirname(self.path)))

    def part(self):
        """The path of the temporary file."""
        path, = glob.glob(os.path.dirname(self.path) + "/.image.*.part")
        return path

    def journal(self):
        """The path of the journal."""
        path, = glob.glob(os.path.dirname(self.path) + "/.image.*.journal")
        return path

    def wait_for(self, written):
        """Wait until its journal speaks of so many writes."""
        deadline = time.time() + 20
        while open(self.journal(), "rb").read().count(b"wrote") < written:
            assert time.time() < deadline
            time.sleep(0.01)


@pytest.fixture
def talk(tmp_path, python):
    made = Talk(tmp_path, python)
    yield made
    made.server.close()


# ---------------------------------------------------------------------------------------------------------------------
# Any order

@BOTH
def test_rounds_may_come_in_any_order(talk, python):
    assert talk.start() == []
    assert talk.server.hello["seek"] is True and talk.server.hello["image"] is None
    talk.bring(3, 4, 5, 0, 2, 1)
    talk.check()


@BOTH
def test_rounds_that_others_lack_are_left_out(talk, python):
    talk.start()
    talk.bring(0)
    talk.server.round = wire.Round(7, 0, 1234, 0, 0)        # as if 7 had been the last
    talk.bring(4, 5, 1, 2, 3)
    talk.check()


@BOTH
def test_a_round_may_bring_some_of_what_is_there(talk, python):
    talk.start()
    talk.bring(0, 3)
    talk.server.bring(IMAGE, 500, 1500)
    talk.server.bring(IMAGE, 1400, 3900)
    talk.server.bring(IMAGE, 2000, 3000)
    talk.bring(4, 5)
    talk.check()


@BOTH
def test_the_file_gets_its_name_when_all_of_it_is_verified(talk, python):
    talk.start()
    talk.bring(1, 2, 3, 4, 5)
    assert "image" not in talk.left()
    talk.bring(0)
    assert "image" not in talk.left()
    talk.check()


@BOTH
def test_what_is_damaged_on_the_disk_is_found_when_the_gap_closes_and_fetched_again(talk, python):
    talk.start("--resume")
    talk.bring(1, 2, 4)
    talk.wait_for(3)
    damage(talk.part(), 2500)
    talk.bring(0)
    assert talk.lacks() == [[2000, 3000]]
    talk.bring(5, 2, 3)
    talk.check()


@BOTH
def test_that_is_told_in_the_place_of_the_last_word_too(talk, python):
    talk.start("--resume")
    talk.bring(1, 2, 3, 4, 5)
    talk.wait_for(5)
    damage(talk.part(), 5500)
    talk.bring(0)
    talk.server.has_all(IMAGE)
    assert talk.lacks() == [[5000, 5950]]
    talk.bring(5)
    talk.check()


def damage(path, place):
    """Change a byte of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(b"x" if old != b"x" else b"y")


# ---------------------------------------------------------------------------------------------------------------------
# A new process

@BOTH
def test_a_killed_client_is_gone_on_with(talk, python):
    talk.start("--resume")
    talk.bring(0, 1, 3)
    talk.wait_for(3)
    who = talk.server.hello["who"]
    talk.kill()
    assert talk.start("--resume") == [[0, 2000], [3000, 4000]]
    assert talk.server.hello["image"] == NAME and talk.server.hello["who"] == who
    talk.bring(2, 4, 5)
    talk.check()
    assert talk.client.report()["resumed"] == 3000


@BOTH
def test_so_is_one_that_failed(talk, python):
    talk.start("--resume")
    talk.bring(0, 1)
    talk.wait_for(2)
    talk.server.say(wire.bye(False, reason="the power goes"))
    assert talk.client.finish(20)[0] == 1
    assert len(talk.left()) == 2
    assert talk.start("--resume") == [[0, 2000]]
    talk.bring(2, 3, 4, 5)
    talk.check()


@BOTH
def test_without_the_option_nothing_is_left(talk, python):
    talk.start()
    talk.bring(0, 1)
    talk.server.say(wire.bye(False, reason="the power goes"))
    assert talk.client.finish(20)[0] == 1 and talk.left() == []


@BOTH
def test_without_the_option_what_an_earlier_run_left_is_removed(talk, python):
    talk.kill_with(0, 1)
    assert talk.start() == [] and talk.server.hello["image"] is None
    assert len(talk.left()) == 1
    talk.bring(0, 1, 2, 3, 4, 5)
    talk.check()


@BOTH
def test_a_client_that_had_written_all_only_verifies_it(talk, python):
    talk.kill_with(0, 1, 2, 3, 4, 5)
    assert talk.start("--resume") == [[0, 5950]]
    talk.check()


@BOTH
def test_who_is_killed_again_and_again_holds_ever_more(talk, python):
    for number in range(6):
        assert talk.start("--resume") == ([[0, PARTS[number][0]]] if number else [])
        talk.bring(number)
        talk.wait_for(number + 1)
        talk.kill()
    assert talk.start("--resume") == [[0, 5950]]
    talk.check()


@BOTH
def test_a_byte_that_was_changed_meanwhile_costs_one_round(talk, python):
    talk.kill_with(0, 1, 2, 3, 4)
    damage(talk.part(), 2500)
    assert talk.start("--resume") == [[0, 5000]]
    assert talk.lacks() == [[2000, 3000]]
    talk.bring(2, 5)
    talk.check()


@BOTH
def test_of_a_part_that_is_too_short_only_what_is_there_counts(talk, python):
    talk.kill_with(0, 1, 2, 3, 4)
    with open(talk.part(), "r+b") as file:
        file.truncate(2500)
    assert talk.start("--resume") == [[0, 2500]]
    talk.bring(2, 3, 4, 5)
    talk.check()


@in_turn("keeps", [1, 2, 3])
def test_behind_a_damaged_line_the_journal_counts_for_nothing(talk, python, keeps):
    talk.kill_with(0, 1, 2, 3)
    with open(talk.journal(), "rb") as file:
        lines = file.read().splitlines(True)
    lines[keeps] = lines[keeps].replace(b"0", b"1", 1)
    with open(talk.journal(), "wb") as file:
        file.write(b"".join(lines))
    held = [[0, 1000 * (keeps - 1)]] if keeps > 1 else []
    assert talk.start("--resume") == held
    talk.bring(*range(keeps - 1, 6))
    talk.check()


@BOTH
def test_a_journal_that_was_cut_off_can_be_gone_on_with_again(talk, python):
    talk.kill_with(0, 1, 2)
    with open(talk.journal(), "r+b") as file:
        file.truncate(os.path.getsize(talk.journal()) - 7)
    assert talk.start("--resume") == [[0, 2000]]
    talk.bring(2, 3)
    talk.wait_for(4)
    talk.kill()
    assert talk.start("--resume") == [[0, 4000]]
    talk.bring(4, 5)
    talk.check()


@in_turn("what", ["part", "journal"])
def test_one_without_the_other_counts_for_nothing(talk, python, what):
    talk.kill_with(0, 1, 2)
    os.unlink(getattr(talk, what)())
    assert talk.start("--resume") == []
    talk.bring(0, 1, 2, 3, 4, 5)
    talk.check()


@BOTH
def test_of_another_image_nothing_counts(talk, python):
    talk.kill_with(0, 1, 4)
    talk.server.fields_of_welcome["image"] = OTHER
    assert talk.start("--resume") == [[0, 2000], [4000, 5000]]
    assert talk.server.hello["image"] == NAME
    talk.bring(5, 0, 1, 2, 3, 4)
    talk.check()


@BOTH
def test_an_image_that_was_changed_under_its_name_is_taken_once_more(talk, python):
    """Its digests do not go on from those of the journal."""
    before = helpers.random_bytes(len(IMAGE), seed=9)
    talk.start("--resume")
    for part in PARTS[:3]:
        talk.server.bring(before, *part)
    talk.wait_for(3)
    talk.kill()
    assert talk.start("--resume") == [[0, 3000]]
    if not talk.differs(3, lacks=[[0, 3000]]):          # it was written before its turn
        assert talk.lacks() == [[3000, 4000]]
        assert talk.differs(3, lacks=[[0, 3000]])
    talk.bring(4, 5, 0, 1, 2)
    talk.check()


@BOTH
def test_if_the_whole_is_another_one_it_is_taken_once_more_and_only_once(talk, python):
    before = helpers.random_bytes(len(IMAGE), seed=9)
    talk.start("--resume")
    for part in PARTS:
        talk.server.bring(before, *part)
    talk.wait_for(6)
    talk.kill()
    assert talk.start("--resume") == [[0, 5950]]
    talk.server.has_all(IMAGE)
    if talk.lacks() == [[5000, 5950]]:          # else all of it had been read back by then
        talk.differs(5, lacks=[[0, 5000]])
        talk.bring(0, 1, 2, 3, 4)
    else:
        talk.bring(0, 1, 2, 3, 4, 5)
    talk.server.has_all(before)
    assert re.search("is not what|differs", talk.server.reason())
    assert talk.client.finish(20)[0] == 1 and talk.left() == []


@BOTH
def test_two_at_once_do_not_go_on_with_the_same(talk, python):
    talk.start("--resume")
    talk.bring(0, 1)
    first, sock = talk.client, talk.server.sock
    assert talk.start("--resume") == []
    first.stop()
    sock.close()
    talk.bring(0, 1, 2, 3, 4, 5)
    talk.server.has_all(IMAGE)
    talk.server.done(wire.IMAGE)
    assert talk.client.finish(20)[0] == 0


@in_turn("what", ["link", "directory"])
def test_what_somebody_else_has_laid_there_is_not_touched(talk, python, what, tmp_path):
    talk.kill_with(0, 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"precious")
    os.unlink(talk.journal())
    path = talk.part().replace(".part", ".journal")
    if what == "link":
        os.link(str(secret), path)
    else:
        os.mkdir(path)
    assert talk.start("--resume") == []
    assert secret.read_bytes() == b"precious"
    talk.server.say(wire.bye(False, reason="that is all"))
    assert talk.client.finish(20)[0] == 3


@in_turn("args", [["--resume"], ["--resume", "--pipe", "cat"], ["--resume", "-o", "/dev/null"]])
def test_only_a_file_can_be_gone_on_with(args, python):
    client = helpers.start_client(args + [LOOPBACK, LOOPBACK, helpers.free_port()], python)
    code, stderr, _ = client.finish(20)
    assert code == 2 and "--resume" in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# The same process

@BOTH
def test_a_connection_that_breaks_is_made_again_and_gone_on_with(talk, python):
    talk.start()
    talk.bring(0, 1, 4)
    who = talk.server.hello["who"]
    talk.server.sock.close()
    assert talk.accept() == [[0, 2000], [4000, 5000]]
    assert talk.server.hello["image"] == NAME and talk.server.hello["who"] == who
    talk.bring(2, 3, 5)
    talk.check()


@BOTH
def test_who_was_dropped_and_may_come_again_does(talk, python):
    talk.start()
    talk.bring(0, 1)
    talk.server.say(wire.bye(False, reason="stalled", again=True))
    assert talk.accept() == [[0, 2000]]
    talk.bring(2, 3, 4, 5)
    talk.check()


@BOTH
def test_a_round_that_was_under_way_is_lost_with_the_connection(talk, python):
    talk.start()
    talk.bring(0)
    talk.server.announce_part(IMAGE, *PARTS[1])
    talk.server.take_ready()
    damaged = talk.server.packets()
    damaged[3] = damaged[3][:-1] + b"x"
    talk.server.cast(*damaged)
    talk.server.say(talk.server.sent())
    talk.server.expect(wire.SUMS)
    talk.server.sock.close()
    assert talk.accept() == [[0, 1000]]
    talk.bring(1, 2, 3, 4, 5)
    talk.check()


@BOTH
def test_another_image_is_begun_from_its_start(talk, python):
    talk.start()
    talk.server.bring(b"z" * 9000, 0, 3000)
    talk.server.sock.close()
    assert talk.accept(image=OTHER) == [[0, 3000]]
    talk.bring(0, 1, 2, 3, 4, 5)
    talk.check()


@BOTH
def test_a_verdict_is_final(talk, python):
    talk.start()
    talk.bring(0, 1)
    talk.server.say(wire.bye(False, reason="it was not to be"))
    code, stderr, _ = talk.client.finish(20)
    assert code == 1 and "it was not to be" in stderr and talk.left() == []


@BOTH
def test_where_the_server_cannot_go_back_a_broken_connection_is_the_end(talk, python):
    talk.server.fields_of_welcome["again"] = False
    talk.start()
    talk.bring(0, 1)
    talk.server.sock.close()
    code, stderr, _ = talk.client.finish(20)
    assert code == 1 and "lost the server" in stderr and talk.left() == []


@BOTH
def test_a_server_that_does_not_come_back_is_given_up(talk, python):
    talk.start("--wait", 1)
    talk.bring(0, 1)
    talk.server.listener.close()
    talk.server.sock.close()
    code, stderr, _ = talk.client.finish(20)
    assert code == 1 and "lost the server" in stderr and talk.left() == []


@BOTH
def test_a_server_that_breaks_off_again_and_again_is_given_up(talk, python):
    talk.start("--wait", 1)
    talk.bring(0)
    talk.server.sock.close()
    while talk.client.poll() is None:
        talk.server.listener.settimeout(1)
        try:
            talk.accept()
            talk.server.sock.close()
        except (wire.socket.error, wire.Unexpected):
            pass
    code, stderr, _ = talk.client.finish(20)
    assert code == 1 and "lost the server" in stderr


@BOTH
def test_a_stream_goes_on_from_the_byte_where_it_was(python):
    server = wire.Server(image=NAME, again=True)
    client = helpers.start_client([LOOPBACK, LOOPBACK, server.port], python)
    server.accept().greet()
    assert server.hello["seek"] is False and server.hello["have"] == []
    server.bring(IMAGE, 0, 1000)
    server.bring(IMAGE, 1000, 2000)
    server.sock.close()
    server.accept().greet()
    assert server.hello["have"] == [[0, 2000]] and server.hello["image"] == NAME
    for part in PARTS[2:]:
        server.bring(IMAGE, *part)
    server.has_all(IMAGE)
    server.done(wire.IMAGE)
    code, stderr, data = client.finish(20)
    assert code == 0 and data == IMAGE, stderr
    server.close()


@BOTH
def test_a_stream_of_which_some_is_out_takes_no_other_image(python):
    server = wire.Server(image=NAME, again=True)
    client = helpers.start_client([LOOPBACK, LOOPBACK, server.port], python)
    server.accept().greet()
    server.bring(IMAGE, 0, 1000)
    server.sock.close()
    server.accept().greet(image=OTHER)
    assert "another image" in server.reason()
    code, stderr, data = client.finish(20)
    assert code == 1 and data == IMAGE[:1000], stderr
    server.close()


@BOTH
def test_a_stream_takes_no_round_but_the_next(python):
    server = wire.Server(image=NAME, again=True)
    client = helpers.start_client([LOOPBACK, LOOPBACK, server.port], python)
    server.accept().greet()
    server.announce_part(IMAGE, 1000, 2000)
    assert "out of turn" in server.reason()
    assert client.finish(20)[0] == 3
    server.close()
