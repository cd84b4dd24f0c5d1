"""Hostile and broken servers: whoever talks to one ends with a clear error or a right image.

The clients are real processes on loopback; the servers are scripts in this process.
"""

import hashlib
import os
import socket
import threading
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import flooded, GARBAGE, noise, orderly, SPOOFED, wrapped
from pythons import BOTH, in_turn, NEWEST, OLDEST
from wire import ABSENT, ALIVE, BASE, BYE, HEADER, Round, SESSION, SUMS, packet

PAYLOAD = 100
ROUNDS = [helpers.random_bytes(300, seed=1), helpers.random_bytes(150, seed=2)]
SALT, REPAIR_SALT = 7, 9


class Script(wire.Server):
    """A server that follows a script, a function of it, and the client that talks to it."""

    def __init__(self, script, args=(), to_file=None, python=None, dialect=SESSION, change=None, **welcome):
        wire.Server.__init__(self, dialect, None if dialect is SESSION else wire.plain_crc, payload=PAYLOAD,
                             salt=SALT if dialect is SESSION else 0, repair_salt=REPAIR_SALT, **welcome)
        self.error = None
        self.client = helpers.start_client(["--wait", 0] + list(args) + (["-o", to_file] if to_file else []) +
                                           [LOOPBACK, LOOPBACK, self.port], python=python, change=change)
        self._thread = threading.Thread(target=self._run, args=(script,))
        self._thread.daemon = True
        self._thread.start()

    def _run(self, script):
        try:
            script(self.accept())
        except Exception as error:      # pylint: disable=broad-except
            self.error = error          # most scripts are cut short by their client

    def finish(self, timeout=20):
        """The client's exit code, stderr and output; the connection stays open until it has ended."""
        result = self.client.finish(timeout)
        self._thread.join(20)
        self.close()
        return result


def until_the_end(script):
    """A session as it should be, up to its last words."""
    script.greet()
    for data in ROUNDS:
        script.whole_round(data)


def good(script):
    """A session as it should be."""
    until_the_end(script)
    script.end()


def up_to(point):
    """A script that keeps to the protocol up to a point, one of POINTS."""
    def script(server):
        if point == "instead of the group info":
            return
        server.say(server.group_info())
        server.take_hello()
        if point == "instead of WELCOME":
            return
        server.say(server.welcome())
        if point == "instead of the first buffer info":
            return
        if point == "while the first buffer comes":
            return server.start_round(ROUNDS[0])
        if point == "instead of the packets asked for":
            server.send_round(ROUNDS[0], lost=(1,))
            return server.asked()
        if point == "while a repair comes":
            server.send_round(ROUNDS[0], lost=(1,))
            server.asked()
            return server.say(server.again(0, 1, 1))
        if point == "while two rounds are under way":
            first = server.start_round(ROUNDS[0])
            server.start_round(ROUNDS[1])
            server.multicast(first, lost=(1,))
            server.say(server.sent(first))
            return server.asked(first)
        if point == "instead of the sums asked for":
            server.start_round(ROUNDS[0])
            server.cast(*[packet(place, b"x" * PAYLOAD, SALT) for place in range(3)])
            server.say(server.sent())
            return server.expect(SUMS)
        for data in ROUNDS:
            server.whole_round(data)
    return script


POINTS = ("instead of the group info", "instead of WELCOME", "instead of the first buffer info", "while the first buffer comes",
          "instead of the packets asked for", "while a repair comes", "instead of the sums asked for", "while two rounds are under way", "instead of the last BYE")
#: Points from which on the image had begun to arrive: then a client that fails exits with 1, else with 3.
BEGUN = POINTS[3:]

SOME = Round.of(ROUNDS[0], PAYLOAD)
MESSAGES = {
    "random bytes": bytes(bytearray([0x6b])) + GARBAGE,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "HELLO": wire.hello(),
    "WELCOME": wire.welcome(payload=PAYLOAD, salt=SALT, repair_salt=REPAIR_SALT),
    "buffer info": SESSION.info(SOME),
    "SENT": SESSION.sent(SOME, hashlib.sha256(b"another image").digest()),
    "SENT for a round not in flight": SESSION.sent(SOME._replace(number=7), hashlib.sha256(ROUNDS[0]).digest()),
    "packets": SESSION.packets(SOME, [b"x" * PAYLOAD]),
    "packets of a round not in flight": SESSION.packets(SOME._replace(number=7), [b"x" * PAYLOAD]),
    "SUMS": SESSION.sums(SOME, wire.sums_of(wire.cut(ROUNDS[0], PAYLOAD))),
    "SUMS of nothing": SESSION.sums(SOME, []),
    "SUMS of another count": SESSION.sums(SOME, [1, 2]),
    "SUMS of 4 GiB": wire.SUMS + b"\xff\xff\xff\xff",
    "SUMS of a round not in flight": SESSION.sums(SOME._replace(number=7), [1, 2, 3]),
    "AGAIN": SESSION.again(SOME, 0, 1, 1),
    "AGAIN for a round not in flight": SESSION.again(SOME._replace(number=7), 0, 1, 1),
    "DONE": SESSION.done(SOME),
    "unknown signal": b"\x03",
    "signal with all bits": b"\xff" * 100,
    "BYE that is fine": wire.bye(True, bytes=0, sha256=hashlib.sha256(b"").hexdigest()),
    "BYE with a reason": wire.bye(False, reason="go away\x1b[31m\r\n"),
    "BYE without a reason": wire.bye(False),
    "BYE with a long reason": wire.bye(False, reason="x" * 60000),
    "BYE that is no JSON": wire.frame(BYE, "{"),
    "BYE that is a list": wire.frame(BYE, "[]"),
    "BYE nested deeply": wire.frame(BYE, "[" * 65536),
    "BYE of 4 GiB": BYE + b"\xff\xff\xff\xff{}",
    "BYE that says ok in words": wire.bye("true", reason=None),
}
#: What is right at that point.
ALLOWED = {
    "instead of WELCOME": ("WELCOME",),
    "instead of the first buffer info": ("buffer info", "BYE that is fine"),
    "instead of the packets asked for": ("AGAIN",),
    "instead of the sums asked for": ("SUMS",),
    "while two rounds are under way": ("AGAIN",),
}


def judge(code, stderr, folder=None, begun=True, says=""):
    """Fail unless a client has failed as it should."""
    assert code == (1 if begun else 3), stderr
    orderly(stderr)
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and says in errors[0], stderr
    assert folder is None or os.listdir(str(folder)) == []


def test_a_good_server_is_a_good_one_here_too(tmp_path):
    """Else all of the following would mean nothing."""
    code, stderr, _ = Script(good, to_file=tmp_path / "image").finish()
    assert code == 0, stderr
    assert (tmp_path / "image").read_bytes() == b"".join(ROUNDS)


@pytest.mark.parametrize("point", POINTS)
def test_a_wrong_message(tmp_path, point):
    """Of every kind, at every point of the protocol."""
    started = []
    for number, what in enumerate(sorted(MESSAGES)):
        if what in ALLOWED.get(point, ()):
            continue

        def script(server, data=MESSAGES[what]):
            up_to(point)(server)
            server.say(data)
        folder = tmp_path / str(number)
        folder.mkdir()
        # Some of them are the beginning of what is right: then the rest never comes.
        started.append((what, folder, Script(script, ["--stall-timeout", 2], to_file=folder / "image",
                                             python=OLDEST if number % 2 else NEWEST)))
        if len(started) % 9 == 0:
            for _, _, server in started[-9:]:
                server.client.wait(20)
    for what, folder, server in started:
        code, stderr, _ = server.finish()
        assert not isinstance(server.error, AssertionError), "%s: %r\n%s" % (what, server.error, stderr)
        judge(code, stderr, folder, point in BEGUN)
        if what == "BYE with a reason" and point != POINTS[0]:
            assert "the server says: go away?[31m??" in stderr


@pytest.mark.parametrize("end", ["EOF", "RST", "half a message"])
def test_the_connection_ends(tmp_path, end):
    """At every point of the protocol."""
    started = []
    for number, point in enumerate(POINTS):
        def script(server, point=point):
            up_to(point)(server)
            if end == "half a message":
                server.say(server.group_info()[:10] if point == POINTS[0] else
                           (server.last_bye(bytes=450, sha256="0" * 64) if "BYE" in point else
                            server.sent() if "comes" in point or "under way" in point else
                            SESSION.packets(SOME, [b"\0" * 50]) if "packets" in point else
                            SESSION.info(SOME) if "info" in point else server.welcome())[:12])
            if end == "RST":
                server.reset()
            else:
                server.sock.close()
        folder = tmp_path / str(number)
        folder.mkdir()
        started.append((point, folder, Script(script, to_file=folder / "image", python=OLDEST if number % 2 else NEWEST)))
    for point, folder, server in started:
        code, stderr, _ = server.finish()
        assert not isinstance(server.error, AssertionError), "%s: %r\n%s" % (point, server.error, stderr)
        judge(code, stderr, folder, point in BEGUN)


@BOTH
def test_a_server_that_goes_away_before_it_is_told_the_end(tmp_path, python):
    """The image is complete and verified, so nothing that a server does can make it a failure."""
    def script(server):
        until_the_end(server)
        server.last_words()
        server.say(after)
        server.sock.close()
    for after in (b"", wire.bye(False, reason="stopped by SIGTERM"), GARBAGE):
        server = Script(script, to_file=tmp_path / "image", python=python)
        code, stderr, _ = server.finish()
        assert code == 0, "%r %s" % (server.error, stderr)
        assert (tmp_path / "image").read_bytes() == b"".join(ROUNDS)
        orderly(stderr)
        (tmp_path / "image").unlink()


def test_silence(tmp_path):
    """At every point of the protocol: --stall-timeout ends it."""
    started = []
    for number, point in enumerate(POINTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        started.append((point, folder, Script(up_to(point), ["--stall-timeout", 2], to_file=folder / "image")))
    for point, folder, server in started:
        code, stderr, _ = server.finish()
        assert server.error is None, point
        judge(code, stderr, folder, point in BEGUN, "silent for 2 s")


GROUP_INFOS = {
    "another family": lambda info: b"\x0a\0" + info[2:],
    "big-endian family": lambda info: b"\0\x02" + info[2:],
    "port 0": lambda info: info[:2] + b"\0\0" + info[4:],
    "no multicast address": lambda info: info[:4] + socket.inet_aton("192.0.2.1") + info[8:],
    "address 0.0.0.0": lambda info: info[:4] + socket.inet_aton("0.0.0.0") + info[8:],
    "broadcast": lambda info: info[:4] + socket.inet_aton("255.255.255.255") + info[8:],
    "class E": lambda info: info[:4] + socket.inet_aton("240.0.0.1") + info[8:],
    "another version": lambda info: info[:14] + bytes(bytearray([wire.VERSION + 1, 0])),
    "version 0": lambda info: info[:14] + b"\0\0",
}


@pytest.mark.parametrize("what", sorted(GROUP_INFOS))
def test_a_group_info_that_is_none(tmp_path, what):
    def script(server):
        server.say(GROUP_INFOS[what](server.group_info()))
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, False, "protocol error")


WELCOMES = [(key, value) for key, values in (
    ("version", (None, 1, [], ABSENT)),
    ("salt", (None, "7", -1, 1.5, True, 1 << 32, 10 ** 400, [], ABSENT)),
    ("repair_salt", (None, "9", -1, 9.0, 1 << 32, ABSENT)),
    ("payload", (None, "100", 0, 12, -100, 99, 100.0, True, 8964, 1 << 31, 1 << 64, 10 ** 400, 10 ** 4000, ABSENT)),
    ("name", (7, [], {"a": 1}, ABSENT)),
    ("size", ("450", -1, 4.5, True, ABSENT)),
    ("digest", ("md5", "", 256, True, "\x1b[31msha", ABSENT)),
    ("source", (None, "127.0.0.1", [], ["127.0.0.1"], ["127.0.0.1", 0], ["127.0.0.1", 65536], ["127.0.0.1", "9"], [9, 9],
                ["127.0.0.1", 9, 9], ["no.address.invalid", 9], ABSENT))) for value in values]


def test_a_welcome_with_a_wrong_value(tmp_path):
    started = []
    for number, (key, value) in enumerate(WELCOMES):
        def script(server, key=key, value=value):
            server.greet(**{key: value})
        folder = tmp_path / str(number)
        folder.mkdir()
        started.append((key, value, folder, Script(script, to_file=folder / "image", python=OLDEST if number % 2 else NEWEST)))
        if number % 5 == 4:
            for _, _, _, server in started[-5:]:
                server.client.wait(20)
    for key, value, folder, server in started:
        code, stderr, _ = server.finish()
        assert code == 3, "%s %s\n%s" % (key, str(value)[:50], stderr[:1000])
        judge(code, stderr, folder, False, "protocol error")


@in_turn("fields", [{"more": [{}]}, {"size": 10 ** 15}, {"size": 1}, {"name": "../../etc/\x1b[31m" + "x" * 9999},
                    {"unicast": "perhaps"}], ids=str)
def test_a_welcome_with_something_odd_that_does_no_harm(fields, python):
    def script(server):
        server.greet(**fields)
        for data in ROUNDS:
            server.whole_round(data)
        server.end()
    code, stderr, received = Script(script, ["-v"], python=python).finish()
    orderly(stderr)
    assert code == 0 and received == b"".join(ROUNDS), stderr


INFOS = {
    "more packets than a round may have": {"count": 65537, "size": 65537 * PAYLOAD},
    "four billion packets": {"count": 0xffffffff, "size": 0xffffffff},
    "a size of 0": {"size": 0},
    "a size too small": {"size": 200},
    "a size too large": {"size": 301},
    "a size of 4 GiB": {"size": 0xffffffff},
    "a round that begins elsewhere": {"base": 4},
    "a round that begins again": {"base": 0},
    "a count that is a size": {"count": 300, "size": 3},
    "no packets": {"count": 0, "size": 0},
    "the number of the round before": {"number": 0},
    "a number that is long gone": {"number": 2**32 - 5},
    "a place that is no place": {"place": 2**64 - 1},
    "a place that no file reaches": {"place": 2**63 - 100},
}
#: What is one all the same to who takes the image in order.
OUT_OF_ORDER = {"the place of the round before": {"place": 0}, "a place behind a gap": {"place": 400}}


@pytest.mark.parametrize("what", sorted(INFOS))
def test_a_buffer_info_that_cannot_be(tmp_path, what):
    def script(server):
        server.greet()
        server.whole_round(ROUNDS[0])
        server.announce(ROUNDS[0], **INFOS[what])
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="protocol error")


@pytest.mark.parametrize("what", sorted(OUT_OF_ORDER))
def test_a_buffer_info_that_cannot_be_for_a_stream(what):
    def script(server):
        server.greet()
        server.whole_round(ROUNDS[0])
        server.announce(ROUNDS[0], **OUT_OF_ORDER[what])
    code, stderr, received = Script(script).finish()
    orderly(stderr)
    assert code == 1 and received == ROUNDS[0] and "protocol error" in stderr, stderr


def test_rounds_that_are_announced_without_end(tmp_path):
    """Far more than the window has room for, and none of them is sent."""
    def script(server):
        server.greet()
        for _ in range(100):
            server.announce(ROUNDS[0])
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="more rounds under way than agreed")


def test_a_round_that_goes_beyond_the_last_seq(tmp_path):
    """The seqs behind it are those of repair passes."""
    def script(server):
        server.greet()
        server.announce(ROUNDS[0], base=wire.SEQS - 2)
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="protocol error")


@BOTH
def test_sent_with_a_wrong_digest(tmp_path, python):
    """Nothing of that round reaches the output, only the rounds before."""
    def script(server):
        server.greet()
        server.whole_round(ROUNDS[0])
        server.hash.update(b"x")
        server.send_round(ROUNDS[1])
        server.suspected()
    server = Script(script, python=python)
    code, stderr, received = server.finish()
    judge(code, stderr, says="digest")
    assert received == ROUNDS[0]
    code, stderr, _ = Script(script, to_file=tmp_path / "image", python=python).finish()
    judge(code, stderr, tmp_path, says="digest")


REPAIRS = {
    "not asked for": lambda right, server: server.packets()[0],
    "of no round": lambda right, server: packet(77, b"x" * PAYLOAD, SALT),
    "with a wrong seq": lambda right, server: b"\x02" + right[1:],
    "with a wrong checksum": lambda right, server: right[:4] + b"\0\0\0\0" + right[8:],
    "with a wrong size": lambda right, server: right[:8] + b"\x63\0\0\0" + right[12:],
    "with a size of 4 GiB": lambda right, server: right[:8] + b"\xff\xff\xff\xff" + right[12:],
    "damaged": lambda right, server: right[:-1] + bytes(bytearray([right[-1] ^ 1])),
    "of another session": lambda right, server: packet(1, right[12:], SALT + 1),
    "of nothing": lambda right, server: b"\0" * len(right),
}


@pytest.mark.parametrize("what", sorted(REPAIRS))
def test_a_packet_by_tcp_that_is(tmp_path, what):
    """Where no digest covers the round, and each has a header."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        assert server.asked() == [1]
        server.say(SESSION.packets(server.round, [REPAIRS[what](server.packets()[1], server)]))
    code, stderr, _ = Script(script, to_file=tmp_path / "image", digest=None).finish()
    judge(code, stderr, tmp_path, says="protocol error")


def test_a_packet_by_tcp_that_is_wrong_and_has_no_header():
    """The digest tells; it is asked for again, as long as the server has patience."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        for wrong in (b"x", b"y", b"z"):
            assert server.asked() == [1]
            server.say(SESSION.packets(server.round, [wrong * PAYLOAD]))
            server.suspected()
        assert server.asked() == [1]
        server.give([1])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    server = Script(script)
    code, stderr, received = server.finish()
    assert code == 0 and received == b"".join(ROUNDS), "%s\n%r" % (stderr, server.error)


def test_sums_that_lie():
    """All is asked for, and all is the same as before; so it is asked for once more, and nothing is written."""
    def script(server):
        server.greet()
        server.start_round(ROUNDS[0])
        server.cast(*[packet(place, b"x" * PAYLOAD, SALT) for place in range(3)])
        server.say(server.sent())
        for _ in range(5):
            server.expect(SUMS)
            server.say(SESSION.sums(server.round, [1, 2, 3]))
            assert server.asked() == [0, 1, 2]
            server.say(SESSION.packets(server.round, [b"x" * PAYLOAD] * 3))
        server.say(wire.bye(False, reason="enough"))
    server = Script(script)
    code, stderr, received = server.finish()
    judge(code, stderr, says="enough")
    assert received == b"" and server.error is None


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 0xffffffff, 1), (0, 1, 0xffffffff), (0, 65536, 1), (0, 0x80000000, 0x80000000),
                                     (5, 0xffffffff, 0xffffffff), (2**31, 1, 1), (2**31 - 1, 1, 1)], ids=str)
def test_again_with_absurd_numbers(tmp_path, numbers):
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        server.asked()
        server.say(server.again(*numbers))
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="repair pass")


def recipe_of(*groups, **options):
    return wire.recipe(options.get("first", 1), groups, PAYLOAD)


RECIPES = {
    # No full packets:
    "nothing": b"\0",
    "three bytes": b"\1\0\0",
    "what is right, but is not padded": b"\1\0\0\0\2\0\0\0\1\0",
    "what is right and a byte too short": recipe_of([0, 1])[:-1],
    "what is right and a byte too long": recipe_of([0, 1]) + b"\0",
    # Full ones:
    "a number and no more": b"\1\0\0\0".ljust(PAYLOAD, b"\0"),
    "a count without members": b"\1\0\0\0".ljust(PAYLOAD, b"\xff"),
    "fewer members than said": recipe_of([0] * 46, [1]),
    "no members": recipe_of([]),
    "many combinations of nothing": recipe_of(*[[]] * 40),
    "members outside the round": recipe_of([3, 65535]),
    "the same member twice": recipe_of([1, 1]),
    "the same member three times": recipe_of([1, 1, 1]),
    "only what is not lost": recipe_of([0, 2]),
    "itself": recipe_of([1], first=0),
    "a combination that is not in the pass": recipe_of([1], first=7),
    "a number that wraps": recipe_of([0], [1], first=0xffffffff),
    "random bytes": GARBAGE[:PAYLOAD],
    "zeros": b"\0" * PAYLOAD,
}


@in_turn("what", sorted(RECIPES))
def test_a_recipe_that_says(what, python):
    """It helps nobody, so the client asks again; and what it then gets by TCP makes the image right."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        assert server.asked() == [1]
        server.say(server.again(0, 1, 1))
        coded = wire.combination([ROUNDS[0][:100], ROUNDS[0][100:200]], PAYLOAD)
        server.cast(server.repair(0, RECIPES[what]), server.repair(1, coded))
        server.say(server.sent())
        assert server.asked() == [1]
        server.give([1])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    server = Script(script, python=python)
    code, stderr, received = server.finish()
    assert code == 0 and received == b"".join(ROUNDS), "%s\n%r" % (stderr, server.error)


def test_a_recipe_that_lies():
    """The XOR of other packets than it says: what is solved for is wrong. The digest tells, and it is asked for again."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        server.asked()
        server.say(server.again(0, 1, 1))
        server.cast(server.repair(0, recipe_of([0, 1])), server.repair(1, b"x" * PAYLOAD))
        server.say(server.sent())
        server.suspected()
        assert server.asked() == [1]
        server.give([1])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    server = Script(script)
    code, stderr, received = server.finish()
    assert code == 0 and received == b"".join(ROUNDS), "%s\n%r" % (stderr, server.error)


def test_again_and_again():
    """A server that always promises and never sends: as long as it lives and talks, it is asked again."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        for number in range(300):
            assert server.asked() == [1]
            server.say(server.again(number, 1, 1), server.sent())
        server.asked()
        server.give([1])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    code, stderr, received = Script(script).finish(40)
    assert code == 0 and received == b"".join(ROUNDS), stderr


@in_turn("fields", [
    {"sha256": "0" * 64}, {"sha256": None}, {"sha256": 5}, {"sha256": ""}, {"bytes": 449}, {"bytes": 0}, {"bytes": "450"},
    {"bytes": None}, {"bytes": 450.0}, {"bytes": -450}, {"bytes": 10 ** 400}, {"bytes": 10 ** 4000}, {"ok": "yes", "reason": "x"},
    {"ok": None, "reason": "x"}, {"ok": False, "reason": "no"}], ids=lambda fields: str(fields)[:30])
def test_the_last_bye_with(tmp_path, fields, python):
    def script(server):
        server.greet()
        for data in ROUNDS:
            server.whole_round(data)
        server.end(**fields)
    code, stderr, _ = Script(script, to_file=tmp_path / "image", python=python).finish()
    judge(code, stderr, tmp_path)


def test_a_server_that_trickles():
    """Byte by byte, with some seconds between the first ones: longer than the stall timeout in all, and not a stall."""
    def script(server):
        sock = server.sock

        class Trickle(object):
            def __getattr__(self, name):
                return getattr(sock, name)

            def sendall(self, data):
                for i in range(len(data)):
                    sock.sendall(data[i:i + 1])
                    time.sleep(0.003)
        for byte in bytearray(server.group_info()[:4]):
            sock.sendall(bytes([byte]))
            time.sleep(1)
        sock.sendall(server.group_info()[4:])
        server.take_hello()
        server.sock = Trickle()
        server.say(server.welcome())
        server.send_round(ROUNDS[0], lost=(0, 2))
        server.asked()
        server.give([0, 2])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    code, stderr, received = Script(script, ["--stall-timeout", 3]).finish(60)
    assert code == 0 and received == b"".join(ROUNDS), stderr


def test_alive_everywhere_does_no_harm():
    def script(server):
        say = server.say
        server.say(server.group_info())
        server.take_hello()
        server.say = lambda *messages: say(*[ALIVE * 1000 + message for message in messages])
        server.say(server.welcome())
        server.send_round(ROUNDS[0], lost=(0,))
        server.asked()
        server.give([0])
        server.done()
        server.whole_round(ROUNDS[1])
        server.end()
    code, stderr, received = Script(script).finish()
    assert code == 0 and received == b"".join(ROUNDS), stderr


@pytest.mark.parametrize("number", [1, 3])
def test_a_server_that_dies_behind_sent_while_packets_are_missing(number):
    """The end of the round may still be on its way, but the server is not: no client may wait for it."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(2,) if number == 1 else (0, 1, 2))
        server.sock.close()
    code, stderr, _ = Script(script, ["--stall-timeout", 0]).finish()
    judge(code, stderr)


def test_a_base_server_whose_packets_do_not_make_up_the_size_that_it_announced(tmp_path):
    """In the base protocol any packet may be short, and only the size tells that one is not the right one."""
    def script(server):
        server.greet()
        server.announce(ROUNDS[0][:150], size=200)
        server.take_ready()
        server.cast(*server.packets())
        server.say(server.sent())
        server.done()
        server.last_words()
    code, stderr, _ = Script(script, to_file=tmp_path / "image", dialect=BASE).finish()
    judge(code, stderr, tmp_path)


BASE_ENDS = {
    "a packet of 0 bytes": HEADER.pack(1, 0, 0),
    "a packet of 4 GiB": HEADER.pack(1, 0, 0xffffffff),
    "a packet of 1464 bytes": packet(1, b"x" * 1464, 0, wire.plain_crc),
    "another packet": packet(0, ROUNDS[0][:100], 0, wire.plain_crc),
    "a damaged packet": packet(1, b"x" * 100, 1, wire.salted),
}


def base_round(server):
    """A round of the base protocol of which the second packet is lost, up to READY."""
    server.greet()
    server.start_round(ROUNDS[0][:200])
    server.cast(server.packets()[0])


@pytest.mark.parametrize("what", sorted(BASE_ENDS))
def test_a_base_server_that_repairs_with(tmp_path, what):
    def script(server):
        base_round(server)
        server.say(server.sent())
        assert server.asked() == [1]
        server.say(BASE_ENDS[what])
    code, stderr, _ = Script(script, to_file=tmp_path / "image", dialect=BASE).finish()
    judge(code, stderr, tmp_path)


@pytest.mark.parametrize("data", [b"\x09", wire.bye(True), ALIVE * 10, 2 * BASE.sent(SOME) + b"\xff" * 16], ids=repr)
def test_a_base_server_that_says(tmp_path, data):
    """Signals of a session are none of the base protocol."""
    def script(server):
        base_round(server)
        server.say(data)
    code, stderr, _ = Script(script, to_file=tmp_path / "image", dialect=BASE).finish()
    judge(code, stderr, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Floods of datagrams


@pytest.mark.parametrize("lost", [(0,), (2,)], ids=["the first lost", "the last lost"])
def test_a_flood_does_not_keep_a_client_from_asking_for_what_it_lost(lost):
    """Stragglers are waited for by the clock, not until it is silent: which for so long it never is, in such a flood."""
    def script(server):
        server.greet()
        for _ in range(2):
            server.send_round(ROUNDS[0], lost=lost)
            assert server.asked() == list(lost)
            server.give(lost)
            server.done()
        server.end()
    started = Script(lambda server: _flood_then(server, script), ["--stall-timeout", 0],
                     change=SPOOFED + "kmcast.ClientWindow.SETTLE = kmcast.ClientWindow.NOTHING_YET = 1.0")
    code, stderr, received = started.finish(60)
    assert code == 0 and received == 2 * ROUNDS[0], "%s\n%r" % (stderr, started.error)


def _flood_then(server, script):
    """Run a script while its group is flooded."""
    with flooded(server.port, noise, server.group):
        script(server)


def test_a_flood_does_not_hide_a_silent_server():
    """Not even from a client with a small socket buffer, as an ordinary user's."""
    def script(server):
        with flooded(server.port, noise, server.group):
            server.greet()
            server.start_round(ROUNDS[0])
            server.client.wait(15)
    started = Script(script, ["--stall-timeout", 3], change=SPOOFED)
    code, stderr, _ = started.finish(30)
    judge(code, stderr, says="silent for 3 s")


def test_a_flood_does_not_hide_a_silent_server_from_a_small_socket_buffer():
    server = wire.Server()
    client = wrapped(SPOOFED + "kmcast.SOCKET_BUFFER = 100000", ["client", "--stall-timeout", 3, LOOPBACK, LOOPBACK, server.port])
    server.accept()
    with flooded(server.port, noise, server.group):
        server.greet()
        server.announce(ROUNDS[0])
        code, stderr, _ = client.finish(20)
    server.close()
    judge(code, stderr, says="silent for 3 s")
