"""Hostile and broken peers: nobody else notices them, and whoever talks to one ends with a clear error or a right image.

Real processes on loopback. What is hostile is in this process: bare sockets that say what PROTOCOL.md forbids, built with
the functions of tests/fuzz.py, which know the wire without any code of kmcast.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time

import pytest

import fuzz
import helpers
from fuzz import AGAIN, ALIVE, BYE, DONE, HELLO, INFO, PACKETS, READY, REQUEST, SENT, WELCOME, packet
from helpers import LOOPBACK, ROOT

OLDEST, NEWEST = helpers.oldest(), helpers.newest()
BOTH = pytest.mark.parametrize("python", sorted({OLDEST, NEWEST}), ids=helpers.version_name)

#: Of resident memory that strangers can make a server take: 256 of them with up to 64 KiB of a frame each, and as much again
#: for the pieces that those come in.
MEMORY_KIB = 32 << 10
#: Seconds that strangers may cost a transfer. Here they share two cores with everything else, so the bound is generous.
DELAY = 5.0
#: Lines that strangers can fill a log with in such a transfer: 10 in 10 seconds, and a few for what went before.
LINES = 30


def wrapped(code, args, python=None, **options):
    """Start kmcast with `args` after Python statements that change the module `kmcast`."""
    code = "import sys; sys.path.insert(0, %r); import kmcast\n%s\nsys.exit(kmcast.main())" % (ROOT, code)
    return helpers.start([python or sys.executable, "-c", code] + list(args), **options)


def limited(descriptors):
    """A prefix that limits the file descriptors of a process."""
    return ["sh", "-c", 'ulimit -n %d; exec "$@"' % descriptors, "sh"]


def orderly(stderr):
    """Fail if a log shows anything but what a user can understand, or anything that a terminal could misunderstand."""
    assert "Traceback" not in stderr and "internal error" not in stderr, stderr
    assert all(" " <= character <= "~" or character == "\n" for character in stderr), repr(stderr)
    assert all(len(line) < 600 for line in stderr.splitlines()), stderr


def reset(sock):
    """Close a connection with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive(sock, size):
    """Exactly `size` bytes."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the connection ended after %r" % data
        data += piece
    return data


def receive_frame(sock):
    """The signal of a frame, and its dict."""
    kind = receive(sock, 1)
    return kind, json.loads(receive(sock, fuzz.U32.unpack(receive(sock, 4))[0]).decode())


# ---------------------------------------------------------------------------------------------------------------------
# Strangers, who have no place

GARBAGE = random.Random(1).getrandbits(8 * 3000).to_bytes(3000, "big")
SAYINGS = {
    "random bytes": GARBAGE,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: server\r\nUser-Agent: curl/8.0\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + GARBAGE[:500],
    "an SSH greeting": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a frame of 4 GiB": HELLO + struct.pack("<I", 0xffffffff) + b"{" * 60000,
    "a frame just too long": HELLO + struct.pack("<I", 65537) + b" " * 65537,
    "a frame without its end": HELLO + struct.pack("<I", 65536) + b" " * 65535,
    "a frame that is not UTF-8": fuzz.frame(HELLO, "{}")[:5] + b"\xff\xfe",
    "a frame that is no JSON": fuzz.frame(HELLO, "{version"),
    "a frame that is a list": fuzz.frame(HELLO, "[1]"),
    "JSON nested deeply": fuzz.frame(HELLO, "[" * 65536),
    "objects nested deeply": fuzz.frame(HELLO, '{"a":' * 10000),
    "a number of 65,000 digits": fuzz.frame(HELLO, '{"version":"1","host":%s}' % ("9" * 65000)),
    "a HELLO without a host": fuzz.frame(HELLO, {"version": "1"}),
    "a HELLO of wrong types": fuzz.frame(HELLO, {"version": 1, "host": ["x"]}),
    "READY first": READY,
    "a REQUEST first": fuzz.request([0]),
    "a REQUEST of 65,536 packets": REQUEST + struct.pack("<I", 65536) + b"\0" * 200000,
    "DONE first": DONE,
    "BYE first": fuzz.bye(False, reason="no"),
    "64 KiB of ALIVE": ALIVE * 65536,
    "nothing at all": b"",
}


class Strangers(object):
    """Connects to `port` again and again and does something, with at most `most` connections at a time, until stop()."""

    def __init__(self, port, act, most=100, pause=0.0, threads=1):
        self.port, self.act, self.most, self.pause = port, act, most, pause
        self.count = 0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def _run(self):
        open_ones = []
        while not self._stopped.is_set():
            sock = socket.socket()
            sock.settimeout(1)
            open_ones.append(sock)
            try:
                sock.connect((LOOPBACK, self.port))
                self.count += 1
                self.act(sock)
            except OSError:
                pass
            if len(open_ones) >= self.most:
                open_ones.pop(0).close()
            self._stopped.wait(self.pause)
        for sock in open_ones:
            sock.close()

    def stop(self):
        """End it."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(10)


def say(data):
    """An act: send bytes, as many as are taken without waiting, and keep the connection."""
    def act(sock):
        sock.setblocking(False)
        sock.send(data)
    return act


def half_close(sock):
    """An act."""
    sock.shutdown(socket.SHUT_WR)


def dribble(sock):
    """An act: a HELLO of one byte a second, for whose end nobody waits. The connection stays."""
    def run():
        try:
            for byte in bytearray(fuzz.hello()):
                sock.send(bytes([byte]))
                time.sleep(1)
        except OSError:
            pass
    thread = threading.Thread(target=run)
    thread.daemon = True
    thread.start()


IMAGE = helpers.random_bytes(3000000, seed=9)
CLIENTS = 3


def deploy(strangers=None, python=None, server_args=(), meanwhile=None):
    """A transfer of IMAGE to CLIENTS clients, all of which must get it. Returns seconds, the server's log and peak in KiB.

    strangers  function of the port that starts some: half a second before the first client does
    meanwhile  function of the port, called when all clients have their places
    """
    port = helpers.free_port()
    server = helpers.start_server(["--rate", "40M"] + list(server_args) + [LOOPBACK, CLIENTS, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    started = strangers(port) if strangers else None
    try:
        time.sleep(0.5 if strangers else 0)
        began = time.time()
        clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for _ in range(CLIENTS)]
        if meanwhile:
            for client in clients:
                client.wait_stderr("connected to")
            meanwhile(port)
        for client in clients:
            code, stderr, received = client.finish(60)
            assert code == 0, stderr + server.stderr
            same = received == IMAGE
            assert same
        code, stderr, _ = server.finish(30)
        seconds = time.time() - began
    finally:
        if started:
            started.stop()
    assert code == 0, stderr
    assert "%d of %d clients have the image" % (CLIENTS, CLIENTS) in stderr
    orderly(stderr)
    return seconds, stderr, server.peak_kib


@pytest.fixture(scope="module")
def undisturbed():
    """Seconds, log and peak of a transfer without strangers, by interpreter."""
    known = {}

    def get(python=None):
        if python not in known:
            known[python] = deploy(python=python)
        return known[python]
    yield get
    helpers.stop_all()


def harmless(undisturbed, strangers, python=None, **options):
    """Fail unless strangers cost a transfer neither time nor memory nor an unreadable log. Returns the log."""
    seconds, log, peak = undisturbed(python)
    hostile_seconds, hostile_log, hostile_peak = deploy(strangers, python, **options)
    assert hostile_seconds < seconds + DELAY, "%.1f s instead of %.1f\n%s" % (hostile_seconds, seconds, hostile_log)
    assert hostile_peak < peak + MEMORY_KIB, "%d KiB instead of %d" % (hostile_peak, peak)
    assert hostile_log.count("\n") < log.count("\n") + LINES, hostile_log
    return hostile_log


class Both(object):
    """Several Strangers."""

    def __init__(self, strangers):
        self._strangers = strangers

    def stop(self):
        """End them."""
        for strangers in self._strangers:
            strangers.stop()


@pytest.mark.parametrize("start", ["a frame", "a ", "64", "an ", "random", "J", "[A-Z]", "nothing", "objects"])
def test_strangers_that_talk_nonsense(undisturbed, start):
    what = [data for name, data in SAYINGS.items() if re.match(start, name)]
    assert what
    harmless(undisturbed, lambda port: Both([Strangers(port, say(data), pause=0.01 * len(what)) for data in what]))


@BOTH
def test_strangers_that_talk_all_kinds_of_nonsense(undisturbed, python):
    acts = [say(data) for data in SAYINGS.values()] + [half_close, reset, dribble]
    generator = random.Random(5)
    harmless(undisturbed, lambda port: Strangers(port, lambda sock: generator.choice(acts)(sock), pause=0.002), python)


@pytest.mark.parametrize("act", [half_close, reset, dribble], ids=lambda act: act.__name__)
def test_strangers_that_go_half_way(undisturbed, act):
    harmless(undisturbed, lambda port: Strangers(port, act, pause=0.01))


@BOTH
@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.0\r\n\r\n", ALIVE * 65536], ids=["silent", "HTTP", "ALIVE"])
def test_two_thousand_connections_at_once_from_before_the_clients_come(undisturbed, python, data):
    """Clients have to get in between: no stranger may push one out for good."""
    def flood(port):
        held = []
        for _ in range(2000):
            sock = socket.socket()
            sock.setblocking(False)
            held.append(sock)
            sock.connect_ex((LOOPBACK, port))
        strangers = Strangers(port, say(data) if data else lambda sock: None, most=1000, threads=2)
        strangers.held = held
        return strangers
    harmless(undisturbed, flood, python)


def test_two_thousand_connections_at_once_in_mid_transfer(undisturbed):
    started = []
    try:
        harmless(undisturbed, None, meanwhile=lambda port: started.append(
            Strangers(port, lambda sock: None, most=2000, threads=2)))
    finally:
        for strangers in started:
            strangers.stop()


def test_clients_too_many_and_their_names(undisturbed):
    """A name is a stranger's text: no control character of it gets into a terminal, and it is cut."""
    log = harmless(undisturbed, None, meanwhile=lambda port: [
        Strangers(port, say(fuzz.hello(host))).stop() for host in (
            "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\nkmcast server: 3 of 3 clients\n", u"h\u00f6st\u202eexe.\ud800", "n" * 60000, "")])
    assert "all %d places are taken" % CLIENTS in log
    assert "\nkmcast server: 3 of 3 clients\n" not in log


def test_who_greets_and_leaves_again_and_again_does_not_fill_the_log():
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], stdin=b"image")
    server.wait_stderr("waiting for")
    for _ in range(400):
        with socket.create_connection((LOOPBACK, port)) as sock:
            receive(sock, 16)
            sock.sendall(fuzz.hello())
            receive_frame(sock)
    time.sleep(0.2)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    for client in clients:
        code, stderr, received = client.finish(30)
        assert code == 0 and received == b"image", stderr
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    orderly(stderr)
    assert stderr.count("\n") < 300, stderr


def test_who_says_nothing_is_closed_within_the_time_for_a_greeting():
    port = helpers.free_port()
    helpers.start_server([LOOPBACK, 2, port], stdin=b"image").wait_stderr("waiting for")
    began = time.time()
    with socket.create_connection((LOOPBACK, port)) as silent, socket.create_connection((LOOPBACK, port)) as slow:
        dribble(slow)
        for sock in (silent, slow):
            sock.settimeout(10)
            receive(sock, 16)
            kind, fields = receive_frame(sock)
            assert kind == BYE and fields["ok"] is False and "HELLO" in fields["reason"]
            assert sock.recv(1) == b""
    assert 4.5 < time.time() - began < 9


@BOTH
def test_connections_that_are_reset_at_once_do_not_end_a_compat_server(python):
    """They are accepted when they are dead already."""
    port = helpers.free_port()
    server = helpers.start_server(["--compat", LOOPBACK, 2, port], python=python, stdin=IMAGE[:100000])
    server.wait_stderr("waiting for")
    for _ in range(20):
        server.signal(19)               # SIGSTOP, so that they are reset before it accepts them
        for _ in range(3):
            reset(socket.create_connection((LOOPBACK, port)))
        server.signal(18)               # SIGCONT
        time.sleep(0.01)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for _ in range(2)]
    for client in clients:
        code, stderr, received = client.finish(30)
        assert code == 0 and received == IMAGE[:100000], stderr + server.stderr
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    orderly(stderr)


def test_a_server_does_not_spin_while_it_says_good_bye():
    """The one that it talks to holds its end open."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], stdin=b"image")
    server.wait_stderr("waiting for")
    with socket.create_connection((LOOPBACK, port)) as peer:
        receive(peer, 16)
        peer.sendall(fuzz.hello())
        receive_frame(peer)
        server.signal(15)
        spent = 0.0
        while server.poll() is None:
            with open("/proc/%d/stat" % server.pid) as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                spent = (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
            time.sleep(0.02)
        assert receive_frame(peer) == (BYE, {"ok": False, "reason": "stopped by SIGTERM"})
    assert spent < 1.0, "%.1f s of CPU" % spent
    assert server.finish(1)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Clients with a place, which do not keep to the protocol

class Member(object):
    """A hostile client: a bare connection that has a place, and what it hears."""

    def __init__(self, port, host="hostile"):
        self.sock = socket.create_connection((LOOPBACK, port))
        self.sock.settimeout(20)
        receive(self.sock, 16)
        self.send(fuzz.hello(host))
        self.welcome = receive_frame(self.sock)[1]

    def send(self, data):
        self.sock.sendall(data)

    def info(self):
        """Wait for a buffer info; returns base and count."""
        self.signal(INFO)
        _, _, base, count = struct.unpack("<4I", receive(self.sock, 16))
        return base, count

    def signal(self, expected):
        """Wait for a signal; ALIVE is passed over."""
        kind = ALIVE
        while kind == ALIVE:
            kind = receive(self.sock, 1)
        assert kind == expected, kind

    def ready(self):
        """READY to a buffer info, and wait for SENT; returns base and count."""
        base, count = self.info()
        self.send(READY)
        self.signal(SENT)
        receive(self.sock, 32)
        return base, count

    def bye(self):
        """The reason of a BYE that must come now; packets that were on their way are passed over."""
        self.signal(BYE)
        fields = json.loads(receive(self.sock, fuzz.U32.unpack(receive(self.sock, 4))[0]).decode())
        assert fields["ok"] is False
        return fields["reason"]


def until_refused(member, data):
    """Send on and on, until the server has closed the connection."""
    deadline = time.time() + 20
    try:
        while time.time() < deadline:
            member.send(data)
    except OSError:
        return
    raise AssertionError("the server takes it for 20 s")


def hostile_alive(member):
    member.info()
    until_refused(member, ALIVE * 65536)


def hostile_ready(member):
    member.info()
    until_refused(member, READY * 1000)


def hostile_ready_too_often(member):
    member.ready()
    member.send(READY)
    return member.bye()


def hostile_done_too_early(member):
    member.info()
    member.send(READY + DONE)
    return member.bye()


def hostile_request_too_early(member):
    member.info()
    member.send(READY + fuzz.request([0]))
    return member.bye()


def hostile_request_outside_the_round(member):
    base, count = member.ready()
    member.send(fuzz.request([base + count]))
    return member.bye()


def hostile_request_before_the_round(member):
    base, _ = member.ready()
    member.send(fuzz.request([base - 1]))
    return member.bye()


def hostile_request_for_nothing(member):
    member.ready()
    member.send(fuzz.request([]))
    return member.bye()


def hostile_request_for_too_many(member):
    base, count = member.ready()
    member.send(fuzz.request([base] * (count + 1)))
    return member.bye()


def hostile_request_for_four_billion(member):
    member.ready()
    member.send(REQUEST + b"\xff\xff\xff\xff")
    return member.bye()


def hostile_second_request(member):
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)) + fuzz.request([base]))
    member.sock.settimeout(5)
    try:
        while member.sock.recv(65536):
            pass
    except OSError:
        pass


def hostile_hello(member):
    member.info()
    member.send(fuzz.hello())
    return member.bye()


def hostile_unknown_signal(member):
    member.info()
    member.send(b"\x47")
    return member.bye()


def hostile_bye_without_reason(member):
    member.info()
    member.send(fuzz.bye(False))
    return member.bye()


def hostile_bye_that_is_nested(member):
    member.info()
    member.send(fuzz.frame(BYE, "[" * 60000))
    return member.bye()


def hostile_bye_for_a_terminal(member):
    member.info()
    member.send(fuzz.bye(False, reason="\x1b[2J\x1b[31m\r\nkmcast server: 3 of 3 clients have the image\n" + "x" * 50000))


def hostile_half_close(member):
    member.info()
    member.sock.shutdown(socket.SHUT_WR)


def hostile_rst(member):
    member.info()
    reset(member.sock)


def hostile_request_and_rst(member):
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)))
    reset(member.sock)


def hostile_reader(member):
    """Asks for all and never reads; ended by the stall timeout."""
    base, count = member.ready()
    member.send(fuzz.request(range(base, base + count)))


HOSTILE = {
    hostile_alive: "far too many signs of life", hostile_ready: "out of turn", hostile_ready_too_often: "out of turn",
    hostile_done_too_early: "out of turn", hostile_request_too_early: "out of turn",
    hostile_request_outside_the_round: "outside the round", hostile_request_before_the_round: "outside the round",
    hostile_request_for_nothing: "a request for 0 packets", hostile_request_for_too_many: "a request for",
    hostile_request_for_four_billion: "a request for 4294967295 packets", hostile_second_request: "out of turn",
    hostile_hello: "out of turn", hostile_unknown_signal: "unknown signal", hostile_bye_without_reason: "protocol error",
    hostile_bye_that_is_nested: "not JSON", hostile_bye_for_a_terminal: "it says: ?[2J?[31m??kmcast server",
    hostile_half_close: "went away", hostile_rst: "went away", hostile_request_and_rst: "went away", hostile_reader: "stalled",
}


@pytest.mark.parametrize("hostile", sorted(HOSTILE, key=lambda hostile: hostile.__name__), ids=lambda hostile: hostile.__name__)
def test_a_client_that_breaks_the_protocol_is_dropped_and_nobody_else_notices(undisturbed, hostile):
    port = helpers.free_port()
    data = IMAGE[:1000000]
    server = helpers.start_server(["--rate", "40M", "--stall-timeout", 3, LOOPBACK, 3, port], stdin=data)
    server.wait_stderr("waiting for")
    began = time.time()
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    member = Member(port)
    told = hostile(member)
    for client in clients:
        code, stderr, received = client.finish(60)
        assert code == 0, stderr + server.stderr
        same = received == data
        assert same
    code, stderr, _ = server.finish(30)
    seconds, _, peak = undisturbed()
    assert time.time() - began < seconds + DELAY, stderr
    assert server.peak_kib < peak + MEMORY_KIB
    assert code == 3, stderr
    orderly(stderr)
    assert "2 of 3 clients have the image" in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("kmcast server: warning: hostile (127.0.0.1): ")]
    assert len(lines) == 1 and HOSTILE[hostile] in lines[0], stderr
    assert told is None or told in lines[0]
    member.sock.close()


def test_requests_for_a_packet_over_and_over_are_answered_as_asked():
    """Odd, but allowed: exactly req_count packets, in the order asked."""
    port = helpers.free_port()
    data = IMAGE[:100000]
    server = helpers.start_server([LOOPBACK, 1, port], stdin=data)
    server.wait_stderr("waiting for")
    member = Member(port)
    base, count = member.ready()
    places = [count - 1] * (count // 2) + [0] * (count - count // 2)
    member.send(fuzz.request([base + place for place in places]))
    member.signal(PACKETS)
    payload = member.welcome["payload"]
    for place in places:
        seq, _, size = fuzz.HEADER.unpack(receive(member.sock, 12))
        assert seq == base + place
        assert receive(member.sock, size) == data[place * payload:place * payload + size]
    reset(member.sock)
    assert server.finish(10)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Hostile servers

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

    def expect(self, data):
        assert receive(self.sock, len(data)) == data

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

    def end(self, **fields):
        """The end of a good session."""
        self.send(SENT + self.digest() + fuzz.bye(True, **dict(
            {"bytes": len(b"".join(ROUNDS)), "sha256": self.hash.hexdigest()}, **fields)))
        self.expect(DONE)


def good(script):
    """A session as it should be."""
    script.greet()
    for data in ROUNDS:
        script.round(data)
    script.last()
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


@pytest.mark.parametrize("what", sorted(BASE_ENDS))
def test_a_base_server_that_repairs_with(tmp_path, what):
    def script(server):
        server.greet()
        server.send(fuzz.buffer_info(0, 2, 200))
        server.expect(READY)
        server.cast(packet(0, ROUNDS[0][:100], 0, fuzz.plain_crc))
        server.send(SENT)
        assert server.asked() == [1]
        server.send(BASE_ENDS[what])
    code, stderr, _ = Script(script, to_file=tmp_path / "image", compat=True).finish()
    judge(code, stderr, tmp_path)


@pytest.mark.parametrize("data", [b"\x09", fuzz.bye(True), ALIVE * 10, SENT + SENT + b"\xff" * 16], ids=repr)
def test_a_base_server_that_says(tmp_path, data):
    """Signals of a session are none of the base protocol."""
    def script(server):
        server.greet()
        server.send(fuzz.buffer_info(0, 1, 100))
        server.expect(READY)
        server.cast(packet(0, ROUNDS[0][:100], 0, fuzz.plain_crc))
        server.send(data)
    code, stderr, _ = Script(script, to_file=tmp_path / "image", compat=True).finish()
    judge(code, stderr, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Floods of datagrams

def noise(generator, port):
    return fuzz.random_bytes(generator, generator.choice((0, 1, 11, 12, 13, 100, 1472, 1473, 9000)))


def wrong_checksums(generator, port):
    return fuzz.HEADER.pack(generator.randrange(3000), generator.getrandbits(32), 1460) + b"x" * 1460


def another_session(generator, port):
    return packet(generator.randrange(3000), b"y" * 1460, 12345)


def wrong_sizes(generator, port):
    return fuzz.HEADER.pack(generator.randrange(3000), 0, generator.choice((0, 1459, 0xffffffff))) + b"x" * 1460


@contextlib.contextmanager
def flooded(port, make, group=helpers.GROUP, pause=0.0):
    """A process that multicasts what `make`, a function of this file, makes: up to about 100 Mbit/s, or one each `pause`."""
    code = ("import sys, time, random, socket; sys.path[:0] = %r\nimport test_hostile\n"
            "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "sock.setsockopt(0, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))\n"
            "generator = random.Random(1)\n"
            "made = [test_hostile.%s(generator, %d) for _ in range(1000)]\n"
            "while True:\n"
            "    for data in made:\n"
            "        try: sock.sendto(data, (%r, %d))\n"
            "        except OSError: pass\n"
            "        time.sleep(%r)\n") % ([os.path.dirname(__file__), helpers.ROOT + "/tests"], make.__name__, port, group, port,
                                           pause or 0.00005)
    flood = helpers.start([sys.executable, "-c", code])
    time.sleep(0.5)
    assert flood.poll() is None, flood.stderr
    try:
        yield
    finally:
        flood.stop()


@pytest.mark.parametrize("make", [noise, wrong_checksums, another_session, wrong_sizes], ids=lambda make: make.__name__)
def test_a_flood_of_datagrams_on_the_group(undisturbed, make):
    seconds = undisturbed()[0]
    port = helpers.free_port()
    with flooded(port, make):
        began = time.time()
        server = helpers.start_server(["--rate", "40M", LOOPBACK, 2, port], stdin=IMAGE)
        clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for python in (OLDEST, NEWEST)]
        for client in clients:
            code, stderr, received = client.finish(90)
            assert code == 0, stderr + server.stderr
            same = received == IMAGE
            assert same
        code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    assert time.time() - began < seconds + 2 * DELAY, stderr
    orderly(stderr)


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


# ---------------------------------------------------------------------------------------------------------------------
# File descriptors

@BOTH
@pytest.mark.parametrize("args", [["100"], ["--clients-per-thread", "1", "40"]], ids=" ".join)
def test_fewer_descriptors_than_clients_are_an_error_at_the_start(python, args):
    args, clients = args[:-1], args[-1]
    server = helpers.start_server(args + [LOOPBACK, clients, helpers.free_port()], python=python, stdin=b"image",
                                  prefix=limited(80))
    code, stderr, _ = server.finish(10)
    assert code == 2, stderr
    orderly(stderr)
    assert stderr.count("\n") == 1 and "%s clients need" % clients in stderr and "ulimit -n" in stderr, stderr


@BOTH
def test_as_many_descriptors_as_are_said_to_be_needed_are_enough(python):
    """Also while strangers take all they can get."""
    args, port = ["--clients-per-thread", 1, LOOPBACK, 12], helpers.free_port()
    stderr = helpers.start_server(args + [port], python=python, stdin=b"image", prefix=limited(30)).finish(10)[1]
    needed = int(stderr.split("need ")[1].split()[0])
    server = helpers.start_server(args + [port], python=python, stdin=IMAGE[:200000], prefix=limited(needed))
    server.wait_stderr("waiting for")
    strangers = Strangers(port, lambda sock: None, most=300, pause=0.002)
    try:
        time.sleep(1)
        clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(12)]
        for client in clients:
            code, stderr, received = client.finish(60)
            assert code == 0 and received == IMAGE[:200000], stderr + server.stderr
        code, stderr, _ = server.finish(20)
    finally:
        strangers.stop()
    assert code == 0, stderr
    orderly(stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Our own threads

RAISES = """
def broken(*args):
    if %s:
        raise ValueError('injected')
    return original(*args)
"""
BROKEN = {
    "on a HELLO": ("True", "TcpServer.HANDLERS[kmcast.HELLO]"),
    "on READY": ("True", "TcpServer.HANDLERS[kmcast.READY]"),
    "on a REQUEST": ("True", "TcpServer.HANDLERS[kmcast.REQUEST]"),
    "on DONE": ("True", "TcpServer.HANDLERS[kmcast.DONE]"),
    "in a step": ("True", "TcpServer._do_sent"),
    "in the middle of the chain": ("args[0]._before == 1", "TcpServer._do_sent"),
    "at the end of the chain": ("args[0]._before == 2", "TcpServer._do_sent"),
    "in the last step": ("True", "TcpServer._do_finish"),
    "at the clocks": ("args[0].step and args[0].step.kind == 'sent'", "TcpServer._look_at_clocks"),
    "in the multicaster": ("args[0].rounds > 2", "Multicaster._multicast"),
}


@BOTH
@pytest.mark.parametrize("a_thread", [1, 64])
@pytest.mark.parametrize("where", sorted(BROKEN))
def test_a_thread_of_the_server_that_dies_ends_the_session_in_order(tmp_path, where, a_thread, python):
    if "chain" in where and a_thread != 1:
        pytest.skip("there is no chain")
    condition, target = BROKEN[where]
    port = helpers.free_port()
    code = "original = kmcast.%s\n%skmcast.%s = broken" % (target, RAISES % condition, target)
    server = wrapped(code, ["server", "--rate", "50M", "--buffer-packets", 100, "--clients-per-thread", a_thread,
                            LOOPBACK, 3, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    through = network.path(helpers.loss(10))
    clients = [helpers.start_client(["--wait", 2, "-o", tmp_path / str(number), LOOPBACK, LOOPBACK, through],
                                    python=python) for number in range(3)]
    code, stderr, _ = server.finish(20)
    assert code == 1, stderr
    assert "internal error" in stderr and "injected" in stderr and "Traceback" not in stderr, stderr
    assert "0 of 3 clients have the image" in stderr
    for client in clients:
        code, client_stderr, _ = client.finish(20)
        assert code in (1, 3), client_stderr
        assert "Traceback" not in client_stderr
        if where != "on a HELLO":
            assert "the server" in client_stderr.splitlines()[-1], client_stderr
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_writer_of_a_client_that_dies_ends_it_in_order(tmp_path, python):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    broken = wrapped("original = kmcast.Writer._write\n%skmcast.Writer._write = broken" % (RAISES % "args[0].bytes > 100000"),
                     ["client", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = broken.finish(20)
    assert code == 1 and "injected" in stderr and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    code, stderr, received = client.finish(20)
    same = received == IMAGE
    assert code == 0 and same, stderr
    code, stderr, _ = server.finish(10)
    assert code == 3 and "it says: internal error" in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# More than 2^32 packets

NEAR_THE_WRAP = """
kmcast.Multicaster.FIRST_SEQ = (2 ** 32 - %d) %% 2 ** 32
original = kmcast.Multicaster.__init__
def start(self, *args):
    original(self, *args)
    self.repair_number = (2 ** 32 - %d) %% 2 ** 32
kmcast.Multicaster.__init__ = start
"""


@BOTH
@pytest.mark.parametrize("loss", [0, 5, 100])
@pytest.mark.parametrize("before", [0, 1, 100, 2000])
def test_more_packets_than_a_seq_can_number(before, loss, python):
    """Near the wrap of seq, and of the repair number."""
    data, port = IMAGE[:2500001], helpers.free_port()
    server = wrapped(NEAR_THE_WRAP % (before, before % 97), ["server", "-v", "--rate", "200M", LOOPBACK, 3, port],
                     python=python, stdin=data)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, network.path(helpers.loss(loss, seed=number))], python=python)
               for number in range(3)]
    for client in clients:
        code, stderr, received = client.finish(60)
        same = received == data
        assert code == 0 and same, stderr + server.stderr
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    if loss == 5:
        assert "repair: 0 packets by multicast" not in stderr


def test_more_packets_than_a_seq_can_number_for_clients_of_the_base_protocol():
    data, port = IMAGE[:500001], helpers.free_port()
    server = wrapped(NEAR_THE_WRAP % (100, 1), ["server", "--compat", LOOPBACK, 2, port], stdin=data)
    server.wait_stderr("waiting for")
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    for client in clients:
        code, stderr, received = client.finish(60)
        same = received == data
        assert code == 0 and same, stderr
    assert server.finish(10)[0] == 0
