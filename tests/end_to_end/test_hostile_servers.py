"""Hostile and broken servers: whoever talks to one ends with a clear error or a right image.

The clients are real processes on loopback; the servers are scripts in this process.
"""

import hashlib
import os
import random
import socket
import struct
import threading
import time

import pytest

import fuzz
import helpers
from fuzz import ALIVE, BYE, DONE, HELLO, INFO, PACKETS, READY, REQUEST, SENT, STATE, WELCOME, packet
from helpers import LOOPBACK
from hostile import flooded, GARBAGE, noise, orderly, receive, receive_fields, receive_frame, reset, wrapped
from pythons import BOTH, NEWEST, OLDEST

PAYLOAD = 100
ROUNDS = [helpers.random_bytes(300, seed=1), helpers.random_bytes(150, seed=2)]
SALT, REPAIR_SALT = 7, 9


class Script(object):
    """A server that follows a script, and the client that talks to it.

    The script is a function of a Script; what it does not do with the methods below it does with `.sock`.
    """

    def __init__(self, script, args=(), to_file=None, python=None, compat=False):
        self.port = helpers.free_port()
        self.group = "239.255.92.%d" % random.randrange(1, 255)
        self.base = 0
        self.session = not compat
        self.hash = hashlib.sha256()
        self.error = None
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((LOOPBACK, self.port))
        self._listener.listen(20)
        self._listener.settimeout(20)
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
        self._udp.connect((self.group, self.port))
        self.client = helpers.start_client(["--wait", 0] + list(args) + (["-o", to_file] if to_file else []) +
                                           [LOOPBACK, LOOPBACK, self.port], python=python)
        self._thread = threading.Thread(target=self._run, args=(script,))
        self._thread.daemon = True
        self._thread.start()

    def _run(self, script):
        try:
            self.sock, _ = self._listener.accept()
            self.sock.settimeout(20)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            script(self)
        except Exception as error:      # pylint: disable=broad-except
            self.error = error          # most scripts are cut short by their client

    def finish(self, timeout=20):
        """The client's exit code, stderr and output; the connection stays open until it has ended."""
        result = self.client.finish(timeout)
        self._thread.join(20)
        for sock in (self._listener, self._udp, self.sock):
            sock.close()
        return result

    # What a script does

    def send(self, data):
        self.sock.sendall(data)

    def cast(self, *datagrams):
        """Multicast."""
        for data in datagrams:
            self._udp.send(data)
        time.sleep(0.02)                # so that they arrive before what goes by TCP

    def group_info(self, data=None):
        self.send(data or fuzz.group_info(self.group, self.port, self.session))

    def hello(self):
        assert receive_frame(self.sock)[0] == HELLO

    def greet(self, **fields):
        self.group_info()
        if self.session:
            self.hello()
            self.send(fuzz.frame(WELCOME, dict(fuzz.welcome_fields(PAYLOAD, SALT, REPAIR_SALT), **fields)))

    def info(self, data, count=None, size=None, base=None):
        """Announce a round with `data` in it."""
        self.data = data
        self.count = -(-len(data) // PAYLOAD)
        self.hash.update(data)
        self.send((INFO if self.session else b"") + fuzz.buffer_info(
            self.base if base is None else base, self.count if count is None else count, len(data) if size is None else size))

    def expect(self, signal):
        """Read a signal; a client may say that it is alive, or what it is doing, before it."""
        said = ALIVE
        while said in (ALIVE, STATE):
            said = receive(self.sock, 1)
            if said == STATE:
                receive_fields(self.sock)
        assert said == signal

    def packets(self):
        """The packets of the round."""
        return [packet(self.base + i, self.data[i * PAYLOAD:(i + 1) * PAYLOAD], SALT) for i in range(self.count)]

    def digest(self):
        return self.hash.digest()

    def asked(self):
        """Read a REQUEST; returns the seqs."""
        self.expect(REQUEST)
        count = fuzz.U32.unpack(receive(self.sock, 4))[0]
        return list(struct.unpack("<%dI" % count, receive(self.sock, 4 * count)))

    def start_round(self, data):
        """Up to READY."""
        self.info(data)
        self.expect(READY)

    def send_round(self, data, lost=()):
        """Up to SENT."""
        self.start_round(data)
        self.cast(*[one for i, one in enumerate(self.packets()) if i not in lost])
        self.send(SENT + self.digest())

    def done(self):
        self.expect(DONE)
        self.base = (self.base + self.count) & fuzz.MASK

    def round(self, data):
        self.send_round(data)
        self.done()

    def last(self):
        """Up to READY of the last round."""
        self.info(b"")
        self.expect(READY)

    def last_words(self, **fields):
        """The last SENT and BYE."""
        self.send(SENT + self.digest() + fuzz.bye(True, **dict(
            {"bytes": len(b"".join(ROUNDS)), "sha256": self.hash.hexdigest()}, **fields)))

    def end(self, **fields):
        """The end of a good session."""
        self.last_words(**fields)
        self.expect(DONE)


def until_the_end(script):
    """A session as it should be, up to its last words."""
    script.greet()
    for data in ROUNDS:
        script.round(data)
    script.last()


def good(script):
    """A session as it should be."""
    until_the_end(script)
    script.end()


def up_to(point):
    """A script that keeps to the protocol up to a point, one of POINTS."""
    def script(server):
        if point == "instead of the group info":
            return
        server.group_info()
        server.hello()
        if point == "instead of WELCOME":
            return
        server.send(fuzz.welcome(payload=PAYLOAD, salt=SALT, repair_salt=REPAIR_SALT))
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
            return server.send(fuzz.again(0, 1, 1))
        for data in ROUNDS:
            server.round(data)
        if point == "instead of the last buffer info":
            return
        server.last()
        if point == "instead of the last SENT":
            return
        server.send(SENT + server.digest())
    return script


POINTS = ("instead of the group info", "instead of WELCOME", "instead of the first buffer info", "while the first buffer comes",
          "instead of the packets asked for", "while a repair comes", "instead of the last buffer info",
          "instead of the last SENT", "instead of the last BYE")
#: Points from which on the image had begun to arrive: then a client that fails exits with 1, else with 3.
BEGUN = POINTS[3:]

DIGEST = hashlib.sha256(b"another image").digest()
MESSAGES = {
    "random bytes": bytes(bytearray([0x6b])) + GARBAGE,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "HELLO": fuzz.hello(),
    "WELCOME": fuzz.welcome(payload=PAYLOAD, salt=SALT, repair_salt=REPAIR_SALT),
    "buffer info": INFO + fuzz.buffer_info(0, 3, 300),
    "SENT": SENT + DIGEST,
    "packets": PACKETS + packet(0, b"x" * PAYLOAD, SALT),
    "AGAIN": fuzz.again(0, 1, 1),
    "DONE": DONE,
    "unknown signal": b"\x03",
    "signal with all bits": b"\xff" * 100,
    "BYE that is fine": fuzz.bye(True, bytes=0, sha256=hashlib.sha256(b"").hexdigest()),
    "BYE with a reason": fuzz.bye(False, reason="go away\x1b[31m\r\n"),
    "BYE without a reason": fuzz.bye(False),
    "BYE with a long reason": fuzz.bye(False, reason="x" * 60000),
    "BYE that is no JSON": fuzz.frame(BYE, "{"),
    "BYE that is a list": fuzz.frame(BYE, "[]"),
    "BYE nested deeply": fuzz.frame(BYE, "[" * 65536),
    "BYE of 4 GiB": BYE + b"\xff\xff\xff\xff{}",
    "BYE that says ok in words": fuzz.bye("true", reason=None),
}
#: What is right at that point.
ALLOWED = {
    "instead of WELCOME": ("WELCOME",),
    "instead of the first buffer info": ("buffer info",),
    "instead of the packets asked for": ("AGAIN",),
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
            server.send(data)
        folder = tmp_path / str(number)
        folder.mkdir()
        # Some of them are the beginning of what is right: then the rest never comes.
        started.append((what, folder, Script(script, ["--stall-timeout", 1], to_file=folder / "image",
                                             python=OLDEST if number % 2 else NEWEST)))
        if len(started) % 5 == 0:
            for _, _, server in started[-5:]:
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
                server.send(fuzz.group_info(server.group, server.port)[:10] if point == POINTS[0] else
                            (fuzz.bye(True, bytes=450, sha256="0" * 64) if "BYE" in point else
                             SENT + server.digest() if "SENT" in point or "comes" in point else
                             PACKETS + b"\0" * 50 if "packets" in point else
                             INFO + b"\0" * 16 if "info" in point else fuzz.welcome())[:12])
            if end == "RST":
                reset(server.sock)
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
        server.send(after)
        server.sock.close()
    for after in (b"", fuzz.frame(BYE, {"ok": False, "reason": "stopped by SIGTERM"}), GARBAGE):
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
        started.append((point, folder, Script(up_to(point), ["--stall-timeout", 1], to_file=folder / "image")))
    for point, folder, server in started:
        code, stderr, _ = server.finish()
        assert server.error is None, point
        judge(code, stderr, folder, point in BEGUN, "silent for 1 s")


GROUP_INFOS = {
    "another family": lambda info: b"\x0a\0" + info[2:],
    "big-endian family": lambda info: b"\0\x02" + info[2:],
    "port 0": lambda info: info[:2] + b"\0\0" + info[4:],
    "no multicast address": lambda info: info[:4] + socket.inet_aton("192.0.2.1") + info[8:],
    "address 0.0.0.0": lambda info: info[:4] + socket.inet_aton("0.0.0.0") + info[8:],
    "broadcast": lambda info: info[:4] + socket.inet_aton("255.255.255.255") + info[8:],
    "class E": lambda info: info[:4] + socket.inet_aton("240.0.0.1") + info[8:],
    "another version": lambda info: info[:14] + b"\x02\0",
    "version 0": lambda info: info[:14] + b"\0\0",
}


@pytest.mark.parametrize("what", sorted(GROUP_INFOS))
def test_a_group_info_that_is_none(tmp_path, what):
    def script(server):
        server.group_info(GROUP_INFOS[what](fuzz.group_info(server.group, server.port)))
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, False, "protocol error")


WELCOMES = [(key, value) for key, values in (
    ("version", (None, 1, [], "absent")),
    ("salt", (None, "7", -1, 1.5, True, 1 << 32, 10 ** 400, [], "absent")),
    ("repair_salt", (None, "9", -1, 9.0, 1 << 32, "absent")),
    ("payload", (None, "100", 0, 12, -100, 99, 100.0, True, 8964, 1 << 31, 1 << 64, 10 ** 400, 10 ** 4000, "absent")),
    ("name", (7, [], {"a": 1}, "absent")),
    ("size", ("450", -1, 4.5, True, "absent")),
    ("digest", ("md5", "", 256, True, "\x1b[31msha", "absent"))) for value in values]


def test_a_welcome_with_a_wrong_value(tmp_path):
    started = []
    for number, (key, value) in enumerate(WELCOMES):
        def script(server, key=key, value=value):
            server.group_info()
            server.hello()
            fields = fuzz.welcome_fields(PAYLOAD, SALT, REPAIR_SALT)
            fields[key] = value
            if value == "absent":
                del fields[key]
            server.send(fuzz.frame(WELCOME, fields))
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


@BOTH
@pytest.mark.parametrize("fields", [{"more": [{}]}, {"size": 10 ** 15}, {"size": 1}, {"name": "../../etc/\x1b[31m" + "x" * 9999},
                                    {"unicast": "perhaps"}], ids=str)
def test_a_welcome_with_something_odd_that_does_no_harm(fields, python):
    def script(server):
        server.greet(**fields)
        for data in ROUNDS:
            server.round(data)
        server.last()
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
}


@pytest.mark.parametrize("what", sorted(INFOS))
def test_a_buffer_info_that_cannot_be(tmp_path, what):
    def script(server):
        server.greet()
        server.round(ROUNDS[0])
        server.info(ROUNDS[0], **INFOS[what])
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="protocol error")


@BOTH
def test_sent_with_a_wrong_digest(tmp_path, python):
    """Nothing of that round reaches the output, only the rounds before."""
    def script(server):
        server.greet()
        server.round(ROUNDS[0])
        server.hash.update(b"x")
        server.round(ROUNDS[1])
        server.info(b"")
        server.expect(READY)
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
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        assert server.asked() == [1]
        server.send(PACKETS + REPAIRS[what](server.packets()[1], server))
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="protocol error")


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 0xffffffff, 1), (0, 1, 0xffffffff), (0, 65536, 1), (0, 0x80000000, 0x80000000),
                                     (5, 0xffffffff, 0xffffffff)], ids=str)
def test_again_with_absurd_numbers(tmp_path, numbers):
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        server.asked()
        server.send(fuzz.again(*numbers))
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="repair pass")


def recipe_of(*groups, **options):
    return fuzz.recipe(options.get("first", 1), groups)


RECIPES = {
    "nothing": b"\0",
    "three bytes": b"\1\0\0",
    "a number and no more": b"\1\0\0\0",
    "half a count": b"\1\0\0\0\1",
    "a count without members": b"\1\0\0\0\xff\xff",
    "fewer members than said": b"\1\0\0\0\3\0\1\0\2\0",
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


@BOTH
@pytest.mark.parametrize("what", sorted(RECIPES))
def test_a_recipe_that_says(what, python):
    """It helps nobody, so the client asks again; and what it then gets by TCP makes the image right."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        assert server.asked() == [1]
        server.send(fuzz.again(0, 1, 1))
        coded = bytes(bytearray(a ^ b for a, b in zip(ROUNDS[0][:100], ROUNDS[0][100:200])))
        server.cast(packet(0, RECIPES[what], REPAIR_SALT), packet(1, coded, REPAIR_SALT))
        server.send(SENT + server.digest())
        assert server.asked() == [1]
        server.send(PACKETS + server.packets()[1])
        server.done()
        server.round(ROUNDS[1])
        server.last()
        server.end()
    server = Script(script, python=python)
    code, stderr, received = server.finish()
    assert code == 0 and received == b"".join(ROUNDS), "%s\n%r" % (stderr, server.error)


def test_a_recipe_that_lies(tmp_path):
    """The XOR of other packets than it says: what is solved for is wrong, and the digest tells."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        server.asked()
        server.send(fuzz.again(0, 1, 1))
        server.cast(packet(0, recipe_of([0, 1]), REPAIR_SALT), packet(1, b"x" * PAYLOAD, REPAIR_SALT))
        server.send(SENT + server.digest())
        server.done()
        server.last()
    code, stderr, _ = Script(script, to_file=tmp_path / "image").finish()
    judge(code, stderr, tmp_path, says="digest")


def test_again_and_again():
    """A server that always promises and never sends: as long as it lives and talks, it is asked again."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(1,))
        for number in range(300):
            assert server.asked() == [1]
            server.send(fuzz.again(number, 1, 1) + SENT + server.digest())
        server.asked()
        server.send(PACKETS + server.packets()[1])
        server.done()
        server.round(ROUNDS[1])
        server.last()
        server.end()
    code, stderr, received = Script(script).finish(40)
    assert code == 0 and received == b"".join(ROUNDS), stderr


@BOTH
@pytest.mark.parametrize("fields", [
    {"sha256": "0" * 64}, {"sha256": None}, {"sha256": 5}, {"sha256": ""}, {"bytes": 449}, {"bytes": 0}, {"bytes": "450"},
    {"bytes": None}, {"bytes": 450.0}, {"bytes": -450}, {"bytes": 10 ** 400}, {"bytes": 10 ** 4000}, {"ok": "yes", "reason": "x"},
    {"ok": None, "reason": "x"}, {"ok": False, "reason": "no"}], ids=lambda fields: str(fields)[:30])
def test_the_last_bye_with(tmp_path, fields, python):
    def script(server):
        server.greet()
        for data in ROUNDS:
            server.round(data)
        server.last()
        right = {"ok": True, "bytes": 450, "sha256": server.hash.hexdigest()}
        server.send(SENT + server.digest() + fuzz.frame(BYE, dict(right, **fields)))
        server.expect(DONE)
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
        for byte in bytearray(fuzz.group_info(server.group, server.port)[:4]):
            sock.sendall(bytes([byte]))
            time.sleep(1)
        sock.sendall(fuzz.group_info(server.group, server.port)[4:])
        server.hello()
        server.sock = Trickle()
        server.send(fuzz.welcome(payload=PAYLOAD, salt=SALT, repair_salt=REPAIR_SALT))
        server.send_round(ROUNDS[0], lost=(0, 2))
        server.asked()
        server.send(PACKETS + server.packets()[0] + server.packets()[2])
        server.done()
        server.round(ROUNDS[1])
        server.last()
        server.end()
    code, stderr, received = Script(script, ["--stall-timeout", 3]).finish(60)
    assert code == 0 and received == b"".join(ROUNDS), stderr


def test_alive_everywhere_does_no_harm():
    def script(server):
        send = server.send
        server.group_info()
        server.hello()
        server.send = lambda data: send(ALIVE * 1000 + data)
        server.send(fuzz.welcome(payload=PAYLOAD, salt=SALT, repair_salt=REPAIR_SALT))
        server.send_round(ROUNDS[0], lost=(0,))
        server.asked()
        server.send(PACKETS + server.packets()[0])
        server.done()
        server.round(ROUNDS[1])
        server.last()
        server.end()
    code, stderr, received = Script(script).finish()
    assert code == 0 and received == b"".join(ROUNDS), stderr


@pytest.mark.parametrize("number", [1, 3])
def test_a_server_that_dies_behind_sent_while_packets_are_missing(number):
    """The end of the round may still be on its way, but the server is not: no client may wait for ever, or busily."""
    def script(server):
        server.greet()
        server.send_round(ROUNDS[0], lost=(2,) if number == 1 else (0, 1, 2))
        server.sock.close()
    server = Script(script)
    began = time.time()
    code, stderr, _ = server.finish()
    judge(code, stderr)
    assert time.time() - began < 5


def test_a_base_server_whose_packets_do_not_make_up_the_size_that_it_announced(tmp_path):
    """In the base protocol any packet may be short, and only the size tells that one is not the right one."""
    def script(server):
        server.greet()
        server.send(fuzz.buffer_info(0, 2, 200))
        server.expect(READY)
        server.cast(packet(0, ROUNDS[0][:100], 0, fuzz.plain_crc), packet(1, ROUNDS[0][100:150], 0, fuzz.plain_crc))
        server.send(SENT)
        server.expect(DONE)
        server.send(fuzz.buffer_info(2, 0, 0))
        server.expect(READY)
        server.send(SENT)
    code, stderr, _ = Script(script, to_file=tmp_path / "image", compat=True).finish()
    judge(code, stderr, tmp_path)


BASE_ENDS = {
    "a packet of 0 bytes": fuzz.HEADER.pack(1, 0, 0),
    "a packet of 4 GiB": fuzz.HEADER.pack(1, 0, 0xffffffff),
    "a packet of 1464 bytes": packet(1, b"x" * 1464, 0, fuzz.plain_crc),
    "another packet": packet(0, ROUNDS[0][:100], 0, fuzz.plain_crc),
    "a damaged packet": packet(1, b"x" * 100, 1, fuzz.salted),
}


def base_round(server):
    """A round of the base protocol of which the second packet is lost, up to READY."""
    server.greet()
    server.send(fuzz.buffer_info(0, 2, 200))
    server.expect(READY)
    server.cast(packet(0, ROUNDS[0][:100], 0, fuzz.plain_crc))


@pytest.mark.parametrize("what", sorted(BASE_ENDS))
def test_a_base_server_that_repairs_with(tmp_path, what):
    def script(server):
        base_round(server)
        server.send(SENT)
        assert server.asked() == [1]
        server.send(BASE_ENDS[what])
    code, stderr, _ = Script(script, to_file=tmp_path / "image", compat=True).finish()
    judge(code, stderr, tmp_path)


@pytest.mark.parametrize("data", [b"\x09", fuzz.bye(True), ALIVE * 10, SENT + SENT + b"\xff" * 16], ids=repr)
def test_a_base_server_that_says(tmp_path, data):
    """Signals of a session are none of the base protocol."""
    def script(server):
        base_round(server)
        server.send(data)
    code, stderr, _ = Script(script, to_file=tmp_path / "image", compat=True).finish()
    judge(code, stderr, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Floods of datagrams


@pytest.mark.parametrize("lost", [(0,), (2,)], ids=["the first lost", "the last lost"])
def test_a_flood_does_not_keep_a_client_from_asking_for_what_it_lost(lost):
    """Stragglers are waited for by the clock, not until it is silent."""
    waits = []

    def script(server):
        server.greet()
        for _ in range(5):
            server.send_round(ROUNDS[0], lost=lost)
            began = time.time()
            assert server.asked() == [server.base + lost[0]]
            waits.append(time.time() - began)
            server.send(PACKETS + server.packets()[lost[0]])
            server.done()
        server.last()
        server.end(bytes=5 * len(ROUNDS[0]))
    started = Script(lambda server: _flood_then(server, script))
    code, stderr, received = started.finish(60)
    assert code == 0 and received == 5 * ROUNDS[0], "%s\n%r" % (stderr, started.error)
    assert sum(waits) < 1.5, waits      # 0.03 s where nothing else runs; without the clock 5 s and more


def _flood_then(server, script):
    """Run a script while its group is flooded."""
    with flooded(server.port, noise, server.group):
        script(server)


def test_a_flood_does_not_hide_a_silent_server():
    """Not even from a client with a small socket buffer, as an ordinary user's."""
    def script(server):
        with flooded(server.port, noise, server.group, 0.001):
            server.greet()
            server.start_round(ROUNDS[0])
            server.client.wait(15)
    started = Script(script, ["--stall-timeout", 1])
    code, stderr, _ = started.finish(30)
    judge(code, stderr, says="silent for 1 s")


def test_a_flood_does_not_hide_a_silent_server_from_a_small_socket_buffer():
    port = helpers.free_port()
    listener = socket.socket()
    listener.bind((LOOPBACK, port))
    listener.listen(1)
    listener.settimeout(20)
    client = wrapped("kmcast.SOCKET_BUFFER = 100000", ["client", "--stall-timeout", 1, LOOPBACK, LOOPBACK, port])
    sock, _ = listener.accept()
    with flooded(port, noise, helpers.GROUP, 0.001):
        sock.sendall(fuzz.group_info(helpers.GROUP, port))
        receive_frame(sock)
        sock.sendall(fuzz.welcome(payload=PAYLOAD) + INFO + fuzz.buffer_info(0, 3, 300))
        code, stderr, _ = client.finish(20)
    judge(code, stderr, says="silent for 1 s")
