"""Peers that say what PROTOCOL.md does not allow, or nothing at all: they are told and dropped, nobody else notices.

The peers are raw sockets in the test: `RawClient` against a real server, `RawServer` against a real client.
"""

import hashlib
import json
import re
import signal
import socket
import struct
import time
import zlib

import pytest

import helpers
from helpers import LOOPBACK, payload_size
from pythons import BOTH, EVERY, NEWEST, OLDEST

PAYLOAD = payload_size(1500)


def frame(signal_byte, fields):
    """A signal and a frame."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode("utf-8")
    return bytes([signal_byte]) + struct.pack("<I", len(text)) + text


HELLO = frame(0x10, {"version": "1.0.0", "host": "raw"})
READY, DONE = b"\x01", b"\x04"


class Raw(object):
    """A TCP connection that is read by the byte."""

    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(20)

    def read(self, size):
        """Exactly `size` bytes."""
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, "the connection was closed after %r" % data
            data += piece
        return data

    def fields(self):
        """The dict in a frame whose signal has been read."""
        size, = struct.unpack("<I", self.read(4))
        return json.loads(self.read(size).decode("utf-8"))

    def signal(self):
        """The next signal that is not ALIVE, of which there may be two or three (one each 5 s)."""
        for _ in range(4):
            kind = ord(self.read(1))
            if kind:
                return kind
        raise AssertionError("nothing but ALIVE")

    def reason(self):
        """The reason of the BYE that must come now (behind what was on its way), and then the end."""
        kind = self.signal()
        while kind in (0x01, 0x08):
            self.read({0x01: 16, 0x08: 32}[kind])
            kind = self.signal()
        assert kind == 0x80, "signal 0x%02x instead of BYE" % kind
        fields = self.fields()
        assert fields["ok"] is False
        assert self.sock.recv(1) == b""
        return fields["reason"]

    def close(self):
        self.sock.close()


class RawClient(Raw):
    """A client; it has connected and read the group info."""

    def __init__(self, port):
        Raw.__init__(self, socket.create_connection((LOOPBACK, port)))
        self.group_info = self.read(16)

    def hello(self):
        """Say HELLO and take WELCOME."""
        self.sock.sendall(HELLO)
        return self.take_welcome()

    def take_welcome(self):
        """Take WELCOME; `welcome` is what it says."""
        assert self.signal() == 0x20
        self.welcome = self.fields()
        return self

    def ready(self):
        """Take a buffer info and say READY; return (id, size, base, count)."""
        assert self.signal() == 0x01
        info = struct.unpack("<4I", self.read(16))
        self.sock.sendall(READY)
        return info

    def sent(self):
        """Take SERVER_SENT; return the digest."""
        assert self.signal() == 0x08
        return self.read(32)


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
def test_a_session_to_the_letter(python):
    """One client that does no more than PROTOCOL.md says, by TCP alone: every byte of the server's is looked at."""
    data, port = helpers.random_bytes(3 * PAYLOAD - 100), helpers.free_port()
    start_server(["--unicast", "--buffer-packets", 2, "--name", "image", LOOPBACK, 1], port, stdin=data, python=python)
    client = RawClient(port)
    assert client.group_info == struct.pack("<H", 2) + struct.pack(">H", port) + socket.inet_aton(helpers.GROUP) + b"KMCAST\1\0"
    welcome = client.hello().welcome
    assert (welcome["payload"], welcome["name"], welcome["size"], welcome["digest"]) == (PAYLOAD, "image", None, "sha256")
    for number, (base, size) in enumerate(((0, 2 * PAYLOAD), (2, PAYLOAD - 100))):
        count = -(-size // PAYLOAD)
        info = client.ready()
        assert info[1:] == (size, base, count) and info[0] in (number, number + 1)
        start = base * PAYLOAD
        assert client.sent() == hashlib.sha256(data[:start + size]).digest()
        seqs = list(range(base, base + count))[::-1]
        client.sock.sendall(struct.pack("<BI%dI" % count, 2, count, *seqs))
        assert client.signal() == 0x02
        for seq in seqs:
            payload = data[seq * PAYLOAD:][:min(PAYLOAD, start + size - seq * PAYLOAD)]
            checksum = zlib.crc32(payload, (welcome["salt"] + seq) % 2**32)
            assert client.read(12) == struct.pack("<3I", seq, checksum, len(payload))
            assert client.read(len(payload)) == payload
        client.sock.sendall(DONE)
    assert client.ready()[1:] == (0, 3, 0)
    assert client.sent() == hashlib.sha256(data).digest()
    assert client.signal() == 0x80
    bye = client.fields()
    assert (bye["ok"], bye["bytes"], bye["sha256"]) == (True, len(data), helpers.sha256(data))
    client.sock.sendall(DONE)
    assert client.sock.recv(1) == b""
    client.close()


def test_salts_are_of_the_session():
    """So that no packet of one session passes for one of another."""
    salts = []
    for _ in range(2):
        port = helpers.free_port()
        server = start_server([LOOPBACK, 1], port)
        client = RawClient(port).hello()
        salts += [client.welcome["salt"], client.welcome["repair_salt"]]
        client.close()
        server.stop()
    assert len(set(salts)) == 4


def test_hellos_that_arrive_together_are_spread_over_the_threads():
    port = helpers.free_port()
    server = start_server(["--clients-per-thread", 1, LOOPBACK, 3], port, stdin=b"data")
    clients = [RawClient(port) for _ in range(3)]
    server.signal(signal.SIGSTOP)
    for client in clients:
        client.sock.sendall(HELLO)
    time.sleep(0.05)
    server.signal(signal.SIGCONT)
    for client in clients:
        client.take_welcome()
    take_a_round(clients)


def test_connections_that_wait_while_a_thread_fills_up_go_to_the_next():
    """Some of them in the middle of their HELLO."""
    port = helpers.free_port()
    start_server(["--clients-per-thread", 1, LOOPBACK, 3], port, stdin=b"data")
    clients = [RawClient(port) for _ in range(3)]
    for client in clients:
        client.sock.sendall(HELLO[:7])
    time.sleep(0.1)
    for client in clients:
        client.sock.sendall(HELLO[7:])
        client.take_welcome()
    take_a_round(clients)


def test_silence_is_closed_and_a_waiting_client_is_kept_alive():
    """A connection that says no HELLO is never counted; a client that only the producer keeps waiting hears ALIVE."""
    servers = []
    for python in (OLDEST, NEWEST):         # at once: it takes 5 s
        port = helpers.free_port()
        server = start_server([LOOPBACK, 1], port, stdin=helpers.PIPE, python=python)
        silent, client, trickling = RawClient(port), RawClient(port).hello(), RawClient(port)
        trickling.sock.sendall(HELLO[:-1])
        servers.append((server, silent, client, trickling))
    for server, silent, client, trickling in servers:
        assert client.read(1) == b"\0"
        for other in (silent, trickling):
            rest = other.sock.recv(1000)    # perhaps a BYE, and then the end
            assert rest[:1] in (b"", b"\x80")
            other.close()
        server.popen.stdin.write(b"data")
        server.popen.stdin.close()
        assert client.ready()[1:] == (4, 0, 1)
        client.close()
        assert helpers.summary(server.finish(10)[1]).clients == 1


# ---------------------------------------------------------------------------------------------------------------------
# What a server does not put up with

def request(*seqs):
    """A CLIENT_REQ."""
    return struct.pack("<BI%dI" % len(seqs), 2, len(seqs), *seqs)


NOTHING = b""
IN_GREETING = [
    b"\xff", b"GET / HTTP/1.0\r\n\r\n", READY, DONE, request(0), frame(0x80, {"ok": False, "reason": "x"}),
    b"\x10" + struct.pack("<I", 65537), b"\x10\xff\xff\xff\xff", frame(0x10, b"not JSON"), frame(0x10, b"\xff\xfe"),
    frame(0x10, b"[]"), frame(0x10, b"1"), frame(0x10, {}), frame(0x10, {"version": "1"}),
    frame(0x10, {"version": 1, "host": "x"}), frame(0x10, {"version": "1", "host": None}), frame(0x10, b"[" * 60000),
    frame(0x10, b""),
]
BEFORE_READY = [b"\xff", DONE, request(0), HELLO, frame(0x80, {"ok": False, "reason": 7}), frame(0x80, b"x"), b"\x20"]
WHILE_SENDING = [READY + READY, READY + b"\x08", READY + b"\x40"]
AFTER_SENT = [
    b"\xff", READY, b"\x02" + struct.pack("<I", 0), request(*range(11)), b"\x02\xff\xff\xff\xff", request(10), request(2**32 - 1),
    request(0) + request(1),
]


@BOTH
def test_a_greeting_that_is_none_is_refused_and_not_counted(python):
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    for greeting in IN_GREETING:
        client = RawClient(port)
        client.sock.sendall(greeting)
        assert "protocol error" in client.reason(), greeting
        client.close()
    code, stderr, received = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python).finish(20)
    assert (code, received) == (0, b"data"), stderr
    code, stderr, _ = server.finish(20)
    assert code == 0 and helpers.summary(stderr).served == 1 and "Traceback" not in stderr, stderr


@BOTH
def test_members_that_break_the_protocol_are_told_and_dropped(python):
    """All of them at once, in three threads, and a real client among them that notices nothing."""
    data, port = helpers.random_bytes(25 * PAYLOAD), helpers.free_port()
    faults = [("before", fault) for fault in BEFORE_READY] + [("while", fault) for fault in WHILE_SENDING] \
        + [("after", fault) for fault in AFTER_SENT]
    server = start_server(["-v", "--buffer-packets", 10, "--clients-per-thread", 8, LOOPBACK, len(faults) + 1], port,
                          stdin=data, python=python)
    clients = [RawClient(port).hello() for _ in faults]
    real = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    for client, (when, fault) in zip(clients, faults):
        assert client.signal() == 0x01
        client.read(16)
        if when == "after":
            client.sock.sendall(READY)
        else:
            client.sock.sendall(fault)
            assert "protocol error" in client.reason(), (when, fault)
    for client, (when, fault) in zip(clients, faults):
        if when == "after":
            client.sent()
    for client, (when, fault) in zip(clients, faults):
        if when == "after":
            client.sock.sendall(fault)
            assert "protocol error" in client.reason(), (when, fault)
    code, stderr, received = real.finish(20)
    assert code == 0 and received == data, stderr
    code, stderr, _ = server.finish(20)
    assert code == 3 and helpers.summary(stderr).served == 1 and "Traceback" not in stderr, stderr


@BOTH
def test_a_done_is_not_believed_before_it_is_owed(python):
    """A client that says DONE for the image before it was asked is not counted as served."""
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    client = RawClient(port).hello()
    client.sock.sendall(READY + DONE + READY + DONE)
    client.reason()
    client.close()
    assert server.finish(10)[0] == 1


@BOTH
def test_what_a_client_says_cannot_change_the_terminal(python):
    port = helpers.free_port()
    server = start_server([LOOPBACK, 1], port, stdin=b"data", python=python)
    client = RawClient(port)
    client.sock.sendall(frame(0x10, {"version": "1", "host": u"\x1b[31mred\n\u00e4"}))
    assert client.signal() == 0x20
    client.fields()
    client.sock.sendall(frame(0x80, {"ok": False, "reason": u"\x1b[2J\n\u20ac" + "x" * 10000}))
    code, stderr, _ = server.finish(10)
    assert code == 1
    assert "\x1b" not in stderr and all(line.startswith("kmcast server: ") for line in stderr.splitlines())
    assert max(map(len, stderr.splitlines())) < 500
    client.close()


# ---------------------------------------------------------------------------------------------------------------------
# What a client does not put up with

WELCOME = {"version": "1.0.0", "salt": 1, "repair_salt": 2, "payload": PAYLOAD, "name": None, "size": None, "digest": None}


def group_info(port, group=helpers.GROUP, family=2, padding=b"KMCAST\1\0"):
    """A group info."""
    return struct.pack("<H", family) + struct.pack(">H", port) + socket.inet_aton(group) + padding


def buffer_info(size, base, count, number=0):
    """A buffer info of a session."""
    return b"\x01" + struct.pack("<4I", number, size, base, count)


def welcome(**changes):
    """A WELCOME with changes; a value of Ellipsis removes a key."""
    return frame(0x20, {key: value for key, value in dict(WELCOME, **changes).items() if value is not ...})


DATA = b"x" * 100
PACKET = struct.pack("<3I", 0, zlib.crc32(DATA, 1), 100) + DATA
TO_REQUEST = welcome() + buffer_info(100, 0, 1) + b"\x08"


class RawServer(object):
    """Listens; serves one real client with bytes that are fixed beforehand."""

    def __init__(self):
        self.listener = socket.socket()
        self.listener.bind((LOOPBACK, 0))
        self.listener.listen(8)
        self.port = self.listener.getsockname()[1]

    def serve(self, data, info=None, **options):
        """Send `data` behind the group info to a new client; return its exit code, stderr, and the connection."""
        client = helpers.start_client(["--wait", 0, LOOPBACK, LOOPBACK, self.port], **options)
        self.listener.settimeout(20)
        connection = Raw(self.listener.accept()[0])
        connection.sock.sendall((info or group_info(self.port)) + data)
        code, stderr, received = client.finish(20)
        assert "Traceback" not in stderr, stderr
        assert stderr.count("error: ") == 1 or code == 0, stderr
        said = b""
        try:
            for piece in iter(lambda: connection.sock.recv(65536), b""):
                said += piece
        except ConnectionResetError:
            pass                # it did not read all that we sent
        connection.close()
        return code, stderr, received, said


@pytest.fixture
def raw_server():
    server = RawServer()
    yield server
    server.listener.close()


@EVERY
def test_a_session_from_a_server_to_the_letter(raw_server, python):
    """The client takes what PROTOCOL.md describes, with keys that a later version may add, and ALIVEs anywhere."""
    alive = b"\0"
    stream = (alive + welcome(later=1) + alive + buffer_info(100, 0, 1) + alive + b"\x08" + alive + b"\x02" + PACKET + alive * 2
              + buffer_info(0, 1, 0) + alive + b"\x08" + alive
              + frame(0x80, {"ok": True, "bytes": 100, "sha256": None, "later": []}))
    code, stderr, received, said = raw_server.serve(stream, python=python)
    assert (code, received) == (0, DATA), stderr
    assert said.startswith(b"\x10")
    hello_size, = struct.unpack("<I", said[1:5])
    assert json.loads(said[5:5 + hello_size].decode("utf-8")).keys() >= {"version", "host"}
    answers = re.sub(b"\x13.{4}{[^}]*}", b"", said[5 + hello_size:], flags=re.DOTALL)      # how it stands, in a frame
    assert answers.replace(alive, b"") == (READY + request(0) + DONE + READY + DONE).replace(alive, b"")


@BOTH
@pytest.mark.parametrize("info", [
    dict(group="10.0.0.1"), dict(family=10), dict(padding=b"KMCAST\2\0"), dict(padding=b"KMCAST\0\0")])
def test_a_group_info_that_is_none(raw_server, python, info):
    code, _, received, _ = raw_server.serve(b"", group_info(raw_server.port, **info), python=python)
    assert (code, received) == (3, b"")


@BOTH
def test_something_else_that_listens_there(raw_server, python):
    code, _, received, _ = raw_server.serve(b"", b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", python=python)
    assert (code, received) == (3, b"")


def test_greetings_that_a_client_does_not_take(raw_server):
    for number, greeting in enumerate([
            b"\xff", b"\x01", frame(0x20, b"{"), frame(0x20, b"[]"), b"\x20\xff\xff\xff\xff",
            welcome(version=...), welcome(salt=...), welcome(salt=-1), welcome(salt=2**32), welcome(salt="1"), welcome(salt=True),
            welcome(salt=1.5), welcome(repair_salt=None), welcome(payload=0), welcome(payload=1461), welcome(payload=2**31),
            welcome(payload=...), welcome(name=...), welcome(name=1), welcome(size=...), welcome(size="1"), welcome(digest=...),
            welcome(digest="md5"), welcome(digest=7), frame(0x80, {"ok": False, "reason": "go away"}), frame(0x80, {"ok": True})]):
        code, stderr, received, _ = raw_server.serve(greeting, python=(OLDEST, NEWEST)[number % 2])
        assert (code, received) == (3, b""), (greeting, stderr)


@BOTH
def test_rounds_that_a_client_does_not_take(raw_server, python):
    for number, stream in enumerate([
            welcome() + b"\x08",
            welcome() + b"\x04",
            welcome() + frame(0x80, {"ok": True, "bytes": 0, "sha256": None}),
            welcome() + buffer_info(100, 0, 65537),
            welcome() + buffer_info(0, 0, 1),
            welcome() + buffer_info(PAYLOAD + 1, 0, 1),
            welcome() + buffer_info(PAYLOAD, 0, 2),
            welcome() + buffer_info(2**32 - 1, 0, 2**32 - 1),
            welcome() + buffer_info(100, 0, 1) + b"\x02",
            welcome() + buffer_info(100, 0, 1) + b"\x01",
            TO_REQUEST + b"\x02" + PACKET[:-1] + b"y",
            TO_REQUEST + b"\x02" + b"\1" + PACKET[1:],
            TO_REQUEST + b"\x08",
            TO_REQUEST + b"\x40" + struct.pack("<3I", 0, 0, 0),
            TO_REQUEST + b"\x40" + struct.pack("<3I", 0, 65536, 65536),
            TO_REQUEST + b"\x40" + struct.pack("<3I", 0, 2**32 - 1, 1),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(100, 2, 1),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(0, 2, 0),
            TO_REQUEST + b"\x02" + PACKET + frame(0x80, {"ok": True, "bytes": 100, "sha256": None}),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(0, 1, 0) + b"\x08" + frame(0x80, {"ok": True, "bytes": 99, "sha256": None}),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(0, 1, 0) + b"\x08" + frame(0x80, {"ok": True}),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(0, 1, 0) + b"\x08" + frame(0x80, {"bytes": 100, "sha256": None}),
            TO_REQUEST + b"\x02" + PACKET + buffer_info(0, 1, 0) + b"\x08" + frame(0x80, {"ok": 1, "bytes": 100, "sha256": None}),
    ]):
        code, stderr, received, said = raw_server.serve(stream, python=python)
        assert code in (1, 3) and received in (b"", DATA), (number, stderr)
        assert code == 1 or received == b"", "exit code 3 says that nothing was written, in case %d" % number
        assert b"\x80" in said, "no BYE in case %d" % number


def test_what_a_server_says_cannot_change_the_terminal(raw_server):
    code, stderr, _, _ = raw_server.serve(frame(0x80, {"ok": False, "reason": u"\x1b[2J\n\u20ac"}))
    assert code == 3
    assert "\x1b" not in stderr and all(line.startswith("kmcast client: ") for line in stderr.splitlines())
