"""Peers that say what PROTOCOL.md does not allow, or nothing at all: they are told and dropped, nobody else notices.

The peers are those of wire.py: a client against a real server, a server against a real client.
"""

import hashlib
import signal
import time
import zlib

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import BOTH, EVERY, in_turn, NEWEST, OLDEST
from wire import ABSENT, ALIVE, BYE, DONE, HELLO, INFO, PACKETS, READY, REQUEST, Round, SENT, SESSION, STATE, U32, WELCOME, payload_size

PAYLOAD = payload_size()


def why_dropped(client):
    """The reason that a server gives, behind what was on its way to the client."""
    return client.reason(passing=(INFO, SENT))


def take_a_round(clients):
    """All of them are served together: READY by all, then SENT to all."""
    for client in clients:
        client.ready()
    for client in clients:
        client.sent()
        client.close()


def start_server(options, port, **others):
    """Start a server and wait until it listens."""
    server = helpers.start_server(options + [port], **others)
    server.wait_stderr("waiting")
    return server


# ---------------------------------------------------------------------------------------------------------------------
# What a server says

@BOTH
@pytest.mark.parametrize("digest", ["sha256", None])
def test_a_session_to_the_letter(python, digest):
    """One client that does no more than PROTOCOL.md says, by TCP alone: every byte of the server's is looked at."""
    data, port = helpers.random_bytes(3 * PAYLOAD - 100), helpers.free_port()
    start_server(["--unicast", "--buffer-packets", 2, "--name", "image"] + ([] if digest else ["--no-digest"]) + [LOOPBACK, 1],
                 port, stdin=data, python=python)
    client = wire.Client(port)
    assert client.group_info == wire.group_info(helpers.GROUP, port)
    welcome = client.greet().welcome
    assert (welcome["payload"], welcome["name"], welcome["size"], welcome["digest"]) == (PAYLOAD, "image", None, digest)
    for number, (base, size) in enumerate(((0, 2 * PAYLOAD), (2, PAYLOAD - 100))):
        count, start = -(-size // PAYLOAD), base * PAYLOAD
        assert client.ready() == (number, size, base, count, start)
        assert client.sent() == (hashlib.sha256(data[:start + size]).digest() if digest else b"")
        client.say(SESSION.ask_for_sums(client.round))
        assert client.expect(wire.SUMS).sums == wire.sums_of(wire.cut(data[start:start + size], PAYLOAD))
        client.ask(range(count))
        client.expect(PACKETS)
        for place in range(count):
            payload = data[(base + place) * PAYLOAD:][:min(PAYLOAD, size - place * PAYLOAD)]
            assert client.packet(len(payload) if digest else None) == (payload if digest else (
                base + place, zlib.crc32(payload, (welcome["salt"] + base + place) % 2**32), payload))
        client.done()
    bye = client.end()
    assert (bye["ok"], bye["bytes"], bye["sha256"]) == (True, len(data), helpers.sha256(data) if digest else None)
    client.ended()
    client.close()


def test_salts_are_of_the_session():
    """So that no packet of one session passes for one of another."""
    salts = []
    for _ in range(2):
        port = helpers.free_port()
        server = start_server([LOOPBACK, 1], port)
        client = wire.Client(port).greet()
        salts += [client.welcome["salt"], client.welcome["repair_salt"]]
        client.close()
        server.stop()
    assert len(set(salts)) == 4


def test_hellos_that_arrive_together_are_spread_over_the_threads():
    port = helpers.free_port()
    server = start_server(["--clients-per-thread", 1, LOOPBACK, 3], port, stdin=b"data")
    clients = [wire.Client(port) for _ in range(3)]
    server.signal(signal.SIGSTOP)
    for client in clients:
        client.hello()
    time.sleep(0.05)
    server.signal(signal.SIGCONT)
    for client in clients:
        client.take_welcome()
    take_a_round(clients)


def test_connections_that_wait_while_a_thread_fills_up_go_to_the_next():
    """Some of them in the middle of their HELLO."""
    port = helpers.free_port()
    start_server(["--clients-per-thread", 1, LOOPBACK, 3], port, stdin=b"data")
    clients = [wire.Client(port) for _ in range(3)]
    for client in clients:
        client.say(wire.hello()[:7])
    time.sleep(0.1)
    for client in clients:
        client.say(wire.hello()[7:])
        client.take_welcome()
    take_a_round(clients)


def test_silence_is_closed_and_a_waiting_client_is_kept_alive():
    """A connection that says no HELLO is never counted; a client that only the producer keeps waiting hears ALIVE."""
    servers = []
    for python in (OLDEST, NEWEST):         # at once: it takes 5 s
        port = helpers.free_port()
        server = start_server([LOOPBACK, 1], port, stdin=helpers.PIPE, python=python)
        silent, client, trickling = wire.Client(port), wire.Client(port).greet(), wire.Client(port)
        trickling.say(wire.hello()[:-1])
        servers.append((server, silent, client, trickling))
    for server, silent, client, trickling in servers:
        assert client.expect(ALIVE)
        for other in (silent, trickling):
            assert other.reason()
            other.close()
        server.popen.stdin.write(b"data")
        server.popen.stdin.close()
        assert client.ready()[1:4] == (4, 0, 1)
        client.close()
        assert server.finish(10)[0] == 1 and helpers.summary(server).clients == 1


# ---------------------------------------------------------------------------------------------------------------------
# What a server does not put up with

FIRST = Round(0, 10 * PAYLOAD, 0, 10, 0)        # what the server announces below
LATER = FIRST._replace(number=3)                # and what it does not
IN_GREETING = [
    b"\xff", b"GET / HTTP/1.0\r\n\r\n", SESSION.ready(FIRST), SESSION.done(FIRST), SESSION.request(FIRST, [0]),
    wire.bye(False, reason="x"), HELLO + U32.pack(65537), HELLO + U32.pack(2**32 - 1), wire.frame(HELLO, "not JSON"),
    wire.frame(HELLO, b"\xff\xfe"), wire.frame(HELLO, "[]"), wire.frame(HELLO, "1"), wire.frame(HELLO, {}),
    wire.hello(host=ABSENT), wire.hello(version=1), wire.hello(host=None), wire.hello(window=ABSENT), wire.hello(window=0),
    wire.hello(window="4"), wire.hello(stall=-1), wire.hello(stall="30"), wire.frame(HELLO, "[" * 60000), wire.frame(HELLO, ""),
]
BEFORE_READY = [b"\xff", SESSION.done(FIRST), SESSION.request(FIRST, [0]), SESSION.ready(LATER), SESSION.done(wire.IMAGE), wire.hello(), wire.bye(False, reason=7),
                wire.frame(BYE, "x"), WELCOME]
WHILE_SENDING = [2 * SESSION.ready(FIRST), SESSION.ready(FIRST) + b"\x08", SESSION.ready(FIRST) + b"\x40"]
AFTER_SENT = [
    b"\xff", SESSION.ready(FIRST), SESSION.request(FIRST, []), SESSION.request(FIRST, [10]), SESSION.request(FIRST, range(16)),
    SESSION.request(LATER, [0]), SESSION.done(LATER), SESSION.done(wire.IMAGE), REQUEST + U32.pack(2**32 - 1),
    2 * SESSION.request(FIRST, [0]),
]


@BOTH
def test_a_greeting_that_is_none_is_refused_and_not_counted(python):
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    for greeting in IN_GREETING:
        client = wire.Client(port)
        client.say(greeting)
        assert "protocol error" in why_dropped(client), greeting
        client.close()
    code, stderr, received = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python).finish(20)
    assert (code, received) == (0, b"data"), stderr
    code, stderr, _ = server.finish(20)
    assert code == 0 and helpers.summary(server).served == 1 and "Traceback" not in stderr, stderr


@BOTH
def test_members_that_break_the_protocol_are_told_and_dropped(python):
    """All of them at once, in three threads, and a real client among them that notices nothing."""
    data, port = helpers.random_bytes(25 * PAYLOAD), helpers.free_port()
    faults = [("before", fault) for fault in BEFORE_READY] + [("while", fault) for fault in WHILE_SENDING] \
        + [("after", fault) for fault in AFTER_SENT]
    server = start_server(["-v", "--buffer-packets", 10, "--clients-per-thread", 8, LOOPBACK, len(faults) + 1], port,
                          stdin=data, python=python)
    clients = [wire.Client(port).greet() for _ in faults]
    real = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    for client, (when, fault) in zip(clients, faults):
        assert client.announced() == FIRST
        if when == "after":
            client.say(SESSION.ready(client.round))
        else:
            client.say(fault)
            assert "protocol error" in why_dropped(client), (when, fault)
    for client, (when, fault) in zip(clients, faults):
        if when == "after":
            client.sent()
    for client, (when, fault) in zip(clients, faults):
        if when == "after":
            client.say(fault)
            assert "protocol error" in why_dropped(client), (when, fault)
    code, stderr, received = real.finish(20)
    assert code == 0 and received == data, stderr
    code, stderr, _ = server.finish(20)
    assert code == 3 and helpers.summary(server).served == 1 and "Traceback" not in stderr, stderr


@BOTH
def test_a_done_is_not_believed_before_it_is_owed(python):
    """A client that says DONE for the image before it was asked is not counted as served."""
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    client = wire.Client(port).greet()
    some = Round(0, 4, 0, 1, 0)
    client.say(SESSION.ready(some) + SESSION.done(some) + SESSION.done(wire.IMAGE))
    why_dropped(client)
    client.close()
    assert server.finish(10)[0] == 1


@BOTH
def test_what_a_client_says_cannot_change_the_terminal(python):
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    client = wire.Client(port, u"\x1b[31mred\n\u00e4").greet()
    client.say(wire.bye(False, reason=u"\x1b[2J\n\u20ac" + "x" * 10000))
    code, stderr, _ = server.finish(10)
    assert code == 1
    assert "\x1b" not in stderr and all(line.startswith("kmcast server: ") for line in stderr.splitlines())
    assert max(map(len, stderr.splitlines())) < 500
    client.close()


# ---------------------------------------------------------------------------------------------------------------------
# What a client does not put up with

DATA = b"x" * 100
ONE, TWO = Round(0, 100, 0, 1, 0), Round(1, 100, 1, 1, 100)     # the round of an image of 100 bytes, and what comes after it
PACKET = wire.packet(0, DATA, salt=1, check=wire.salted)


def welcome(**changes):
    """A WELCOME with changes."""
    return wire.welcome(**dict({"salt": 1, "repair_salt": 2, "payload": PAYLOAD, "digest": None}, **changes))


def last_bye(**changes):
    """The last BYE of a server, with changes."""
    return wire.frame(BYE, wire.changed({"ok": True, "bytes": 100, "sha256": None}, changes))


#: Scripts for RawServer: bytes to say, and in tuples a signal to wait for.
TO_REQUEST = [welcome() + SESSION.info(ONE) + SESSION.sent(ONE), (REQUEST,)]
TO_DONE = TO_REQUEST + [SESSION.packets(ONE, [PACKET]), (DONE,)]


class RawServer(wire.Server):
    """Serves one real client after the other with bytes that are fixed beforehand."""

    def serve(self, script, info=None, **options):
        """Follow a script with a new client, behind the group info; return its exit code, stderr, output, and what it said:
        a list of Messages without those that are just signs of life."""
        client = helpers.start_client(["--wait", 0, LOOPBACK, LOOPBACK, self.port], **options)
        self.accept()
        for what in (ONE, TWO):
            self.note(what)
        self.said = []
        try:
            self.say(info or self.group_info())
            for item in script:
                if isinstance(item, tuple):
                    self._listen_for(*item)
                else:
                    self.say(item)
        except (wire.Unexpected, OSError):
            pass                # it has ended before
        code, stderr, received = client.finish(20)
        assert "Traceback" not in stderr, stderr
        assert stderr.count("error: ") == 1 or code == 0, stderr
        try:
            self._listen_for(None)
        except (wire.Unexpected, OSError):
            pass                # its end; with RST if it did not read all that we sent
        self.sock.close()
        return code, stderr, received, self.said

    def _listen_for(self, kind):
        """Hear messages up to one of that kind."""
        while not self.said or self.said[-1].kind != kind:
            message = self.hear()
            if message.kind not in (ALIVE, STATE):
                self.said.append(message)


@pytest.fixture
def raw_server():
    server = RawServer()
    yield server
    server.close()


@EVERY
def test_a_session_with_digests_from_a_server_to_the_letter(raw_server, python):
    """The client takes payloads without headers, asks for the sums when the first ones are not what they should be."""
    digest, sha256 = hashlib.sha256(DATA).digest(), hashlib.sha256(DATA).hexdigest()
    code, stderr, received, said = raw_server.serve([
        welcome(digest="sha256") + SESSION.info(ONE) + SESSION.sent(ONE, digest), (REQUEST,),
        SESSION.packets(ONE, [b"y" * 100]) + ALIVE, (wire.SUMS,),
        ALIVE + SESSION.sums(ONE, wire.sums_of([DATA])) + ALIVE, (REQUEST,),
        SESSION.packets(ONE, [DATA]), (DONE,), last_bye(sha256=sha256)], python=python)
    assert (code, received) == (0, DATA), stderr
    assert [message.kind for message in said] == [HELLO, READY, REQUEST, wire.SUMS, REQUEST, DONE, DONE]
    assert [message.round for message in said[1:]] == [ONE] * 5 + [wire.IMAGE] and said[4].places == [0]


@EVERY
def test_a_session_from_a_server_to_the_letter(raw_server, python):
    """The client takes what PROTOCOL.md describes, with keys that a later version may add, and ALIVEs anywhere."""
    code, stderr, received, said = raw_server.serve([
        ALIVE + welcome(later=1) + ALIVE + SESSION.info(ONE) + ALIVE + SESSION.sent(ONE) + ALIVE, (REQUEST,),
        ALIVE + SESSION.packets(ONE, [PACKET]) + ALIVE * 2, (DONE,),
        wire.state(waiting=None, later={}) + ALIVE + last_bye(later=[])], python=python)
    assert (code, received) == (0, DATA), stderr
    assert [message.kind for message in said] == [HELLO, READY, REQUEST, DONE, DONE]
    assert said[0].fields.keys() >= wire.hello_fields().keys() and said[0].fields["window"] >= 1
    assert [message.round for message in said[1:]] == [ONE, ONE, ONE, wire.IMAGE] and said[2].places == [0]


@in_turn("info", [
    dict(group="10.0.0.1"), dict(family=10)] + [
        dict(padding=wire.MAGIC + bytes([version, 0])) for version in (0, wire.VERSION + 1)])
def test_a_group_info_that_is_none(raw_server, python, info):
    code, _, received, _ = raw_server.serve([], raw_server.group_info(**info), python=python)
    assert (code, received) == (3, b"")


@BOTH
def test_something_else_that_listens_there(raw_server, python):
    code, _, received, _ = raw_server.serve([], b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", python=python)
    assert (code, received) == (3, b"")


def test_greetings_that_a_client_does_not_take(raw_server):
    for number, greeting in enumerate([
            b"\xff", b"\x01", wire.frame(WELCOME, "{"), wire.frame(WELCOME, "[]"), WELCOME + U32.pack(2**32 - 1),
            welcome(version=ABSENT), welcome(salt=ABSENT), welcome(salt=-1), welcome(salt=2**32), welcome(salt="1"), welcome(salt=True),
            welcome(salt=1.5), welcome(repair_salt=None), welcome(payload=0), welcome(payload=1461), welcome(payload=2**31),
            welcome(payload=ABSENT), welcome(name=ABSENT), welcome(name=1), welcome(size=ABSENT), welcome(size="1"), welcome(digest=ABSENT),
            welcome(digest="md5"), welcome(digest=7), wire.bye(False, reason="go away"), wire.bye(True)]):
        code, stderr, received, _ = raw_server.serve([greeting], python=(OLDEST, NEWEST)[number % 2])
        assert (code, received) == (3, b""), (greeting, stderr)


@BOTH
def test_rounds_that_a_client_does_not_take(raw_server, python):
    for number, script in enumerate([
            [welcome() + SESSION.sent(ONE)],
            [welcome() + SESSION.done(ONE)],
            [welcome() + last_bye(bytes=1)],
            [welcome() + SESSION.info(ONE._replace(count=65537))],
            [welcome() + SESSION.info(ONE._replace(size=0))],
            [welcome() + SESSION.info(ONE._replace(size=PAYLOAD + 1))],
            [welcome() + SESSION.info(ONE._replace(size=PAYLOAD, count=2))],
            [welcome() + SESSION.info(ONE._replace(size=2**32 - 1, count=2**32 - 1))],
            [welcome() + SESSION.info(ONE) + SESSION.packets(ONE)],
            [welcome() + 2 * SESSION.info(ONE)],
            TO_REQUEST + [SESSION.packets(ONE, [PACKET[:-1] + b"y"])],
            TO_REQUEST + [SESSION.packets(ONE, [b"\1" + PACKET[1:]])],
            TO_REQUEST + [SESSION.packets(ONE, [wire.packet(0, DATA, salt=1)])],
            TO_REQUEST + [SESSION.sums(ONE, wire.sums_of([DATA]))],
            [welcome() + SESSION.sums(ONE, wire.sums_of([DATA]))],
            [welcome() + SESSION.info(ONE) + SESSION.sums(ONE, [])],
            TO_REQUEST + [SESSION.sent(ONE)],
            TO_REQUEST + [SESSION.again(ONE, 0, 0, 0)],
            TO_REQUEST + [SESSION.again(ONE, 0, 65536, 65536)],
            TO_REQUEST + [SESSION.again(ONE, 0, 2**32 - 1, 1)],
            TO_REQUEST + [SESSION.packets(TWO, [PACKET])],
            TO_REQUEST + [SESSION.again(TWO, 0, 1, 1)],
            TO_REQUEST + [last_bye()],
            TO_DONE + [SESSION.info(TWO._replace(base=2))],
            TO_DONE + [SESSION.info(TWO._replace(number=0))],
            TO_DONE + [SESSION.info(TWO._replace(place=101))],
            TO_DONE + [SESSION.info(TWO._replace(count=0, size=0))],
            TO_DONE + [SESSION.info(TWO) + SESSION.sent(ONE)],
            TO_DONE + [SESSION.sent(ONE)],
            TO_DONE + [SESSION.info(TWO) + last_bye()],
            TO_DONE + [last_bye(bytes=99)],
            TO_DONE + [last_bye(bytes=ABSENT, sha256=ABSENT)],
            TO_DONE + [last_bye(ok=ABSENT)],
            TO_DONE + [last_bye(ok=1)],
    ]):
        code, stderr, received, said = raw_server.serve(script, python=python)
        assert code in (1, 3) and received in (b"", DATA), (number, stderr)
        assert code == 1 or received == b"", "exit code 3 says that nothing was written, in case %d" % number
        assert said[-1].kind == BYE, "no BYE in case %d" % number


def test_what_a_server_says_cannot_change_the_terminal(raw_server):
    code, stderr, _, _ = raw_server.serve([wire.bye(False, reason=u"\x1b[2J\n\u20ac")])
    assert code == 3
    assert "\x1b" not in stderr and all(line.startswith("kmcast client: ") for line in stderr.splitlines())
