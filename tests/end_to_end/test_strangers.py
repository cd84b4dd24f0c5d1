"""Strangers, who have no place in a transfer: whatever they do, nobody else notices.

Real processes on loopback; the strangers are in this process.
"""

import random
import re
import socket
import threading
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import (all_receive, another_session, deploy, flooded, GARBAGE, IMAGE, MEMORY_KIB, NEVER, noise, orderly,
                     SPOOFED, undisturbed, wrong_checksums, wrong_sizes)
from pythons import BOTH, in_turn, NEWEST, OLDEST
from wire import ALIVE, HELLO, REQUEST, SESSION, U32, reset

#: Lines that strangers can fill a log with in such a transfer: 10 in 10 seconds, and a few for what went before.
LINES = 30


def limited(descriptors):
    """A prefix that limits the file descriptors of a process."""
    return ["sh", "-c", 'ulimit -n %d; exec "$@"' % descriptors, "sh"]


# ---------------------------------------------------------------------------------------------------------------------
# Strangers, who have no place

SOME = wire.Round(0, 1, 0, 1, 0)
SAYINGS = {
    "random bytes": GARBAGE,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: server\r\nUser-Agent: curl/8.0\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + GARBAGE[:500],
    "an SSH greeting": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a frame of 4 GiB": HELLO + U32.pack(0xffffffff) + b"{" * 60000,
    "a frame just too long": HELLO + U32.pack(65537) + b" " * 65537,
    "a frame without its end": HELLO + U32.pack(65536) + b" " * 65535,
    "a frame that is not UTF-8": wire.frame(HELLO, "{}")[:5] + b"\xff\xfe",
    "a frame that is no JSON": wire.frame(HELLO, "{version"),
    "a frame that is a list": wire.frame(HELLO, "[1]"),
    "JSON nested deeply": wire.frame(HELLO, "[" * 65536),
    "objects nested deeply": wire.frame(HELLO, '{"a":' * 10000),
    "a number of 65,000 digits": wire.frame(HELLO, '{"version":"1","host":%s}' % ("9" * 65000)),
    "a HELLO without a host": wire.frame(HELLO, {"version": "1"}),
    "a HELLO of wrong types": wire.frame(HELLO, {"version": 1, "host": ["x"]}),
    "READY first": SESSION.ready(SOME),
    "a REQUEST first": SESSION.request(SOME, [0]),
    "a REQUEST of 65,536 packets": REQUEST + U32.pack(65536) + b"\0" * 200000,
    "DONE first": SESSION.done(SOME),
    "BYE first": wire.bye(False, reason="no"),
    "64 KiB of ALIVE": ALIVE * 65536,
    "nothing at all": b"",
}


class Strangers(object):
    """Connects to `port` again and again and does something, with at most `most` connections at a time, until stop()."""

    def __init__(self, port, act, most=100, pause=0.001, threads=1):
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
            for byte in bytearray(wire.hello()):
                sock.send(bytes([byte]))
                time.sleep(1)
        except OSError:
            pass
    thread = threading.Thread(target=run)
    thread.daemon = True
    thread.start()


class Several(object):
    """Several Strangers."""

    def __init__(self, strangers):
        self._strangers = strangers

    def stop(self):
        """End them."""
        for strangers in self._strangers:
            strangers.stop()


def harmless(strangers, python=None, **options):
    """Fail unless a transfer waits for no stranger, and has as little memory and as short a log as without. Returns the log."""
    log, peak = undisturbed(python)
    hostile_log, hostile_peak = deploy(strangers, python, **options)
    assert hostile_peak < peak + MEMORY_KIB, "%d KiB instead of %d" % (hostile_peak, peak)
    assert hostile_log.count("\n") < log.count("\n") + LINES, hostile_log
    return hostile_log


@pytest.mark.parametrize("what", [re.compile("a frame"), re.compile("JSON|objects|a number|a HELLO"),
                                  re.compile("(?!a frame|JSON|objects|a number|a HELLO)")], ids=["frames", "HELLO", "others"])
def test_strangers_that_talk_nonsense(what):
    sayings = [data for name, data in SAYINGS.items() if what.match(name)]
    assert len(sayings) > 4
    harmless(lambda port: Several([Strangers(port, say(data), pause=0.01 * len(sayings)) for data in sayings]))


@BOTH
def test_strangers_that_talk_all_kinds_of_nonsense(python):
    acts = [say(data) for data in SAYINGS.values()] + [half_close, reset, dribble]
    generator = random.Random(5)
    harmless(lambda port: Strangers(port, lambda sock: generator.choice(acts)(sock), pause=0.002), python)


@pytest.mark.parametrize("act", [half_close, reset, dribble], ids=lambda act: act.__name__)
def test_strangers_that_go_half_way(act):
    harmless(lambda port: Strangers(port, act, pause=0.01))


@in_turn("data", [b"", b"GET / HTTP/1.0\r\n\r\n", ALIVE * 65536], ids=["silent", "HTTP", "ALIVE"])
def test_two_thousand_connections_at_once_from_before_the_clients_come(python, data):
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
    harmless(flood, python)


def test_two_thousand_connections_at_once_in_mid_transfer():
    started = []
    try:
        harmless(None, meanwhile=lambda port: started.append(
            Strangers(port, lambda sock: None, most=2000, threads=2)))
    finally:
        for strangers in started:
            strangers.stop()


def test_clients_too_many_and_their_names():
    """A name is a stranger's text: no control character of it gets into a terminal, and it is cut."""
    log = harmless(None, refused=True, meanwhile=lambda port: [
        Strangers(port, say(wire.hello(host=host))).stop() for host in (
            "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\nkmcast server: 3 of 3 clients\n", u"h\u00f6st\u202eexe.\ud800", "n" * 60000, "")])
    assert "was refused: the transfer has begun" in log
    assert "\nkmcast server: 3 of 3 clients\n" not in log


def test_who_greets_and_leaves_again_and_again_does_not_fill_the_log():
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], stdin=b"image")
    server.wait_stderr("waiting for")
    for _ in range(400):
        wire.Client(port).greet().close()
    time.sleep(0.2)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    all_receive(b"image", clients, server, 30)
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    orderly(stderr)
    assert stderr.count("\n") < 300, stderr


def test_who_says_nothing_is_closed_within_the_time_for_a_greeting():
    """Also who says a little all the time: at a byte a second a HELLO takes more than a minute. A second is no crime."""
    port = helpers.free_port()
    helpers.start_server([LOOPBACK, 2, port], stdin=b"image").wait_stderr("waiting for")
    silent, slow, late = wire.Client(port), wire.Client(port), wire.Client(port)
    dribble(slow.sock)
    time.sleep(1)
    late.greet()
    for client in (silent, slow):
        assert client.reason() == "no HELLO within 5 s"
        client.close()
    late.close()


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
    all_receive(IMAGE[:100000], clients, server, 30)
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    orderly(stderr)


#: Says at the end of a server how often it looked what there is to do.
COUNTING = """import atexit, sys
looks, ready = [], kmcast.ready
kmcast.ready = lambda *args: looks.append(1) or ready(*args)
atexit.register(lambda: sys.stderr.write("looked %d times\\n" % len(looks)))"""


def test_a_server_does_not_spin_while_it_says_good_bye():
    """The one that it talks to holds its end open."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], stdin=b"image", change=COUNTING)
    server.wait_stderr("waiting for")
    peer = wire.Client(port).greet()
    server.signal(15)
    code, stderr, _ = server.finish()
    assert code == 1 and peer.reason() == "stopped by SIGTERM"
    peer.close()
    assert int(re.search("looked ([0-9]+) times", stderr).group(1)) < 200, stderr


@pytest.mark.parametrize("make", [noise, wrong_checksums, another_session, wrong_sizes], ids=lambda make: make.__name__)
def test_a_flood_of_datagrams_on_the_group(make):
    """It goes on until the image is through; nothing waits for its end, nor takes the host for deaf."""
    port = helpers.free_port()
    with flooded(port, make):
        server = helpers.start_server(NEVER + ["--rate", "40M", LOOPBACK, 2, port], stdin=IMAGE)
        clients = [helpers.start_client(NEVER + [LOOPBACK, LOOPBACK, port], python=python, change=SPOOFED)
                   for python in (OLDEST, NEWEST)]
        all_receive(IMAGE, clients, server, 90)
        code, stderr, _ = server.finish()
    assert code == 0, stderr
    assert all(client.report()["carried"]["multicast"] for client in clients)
    orderly(stderr)


# ---------------------------------------------------------------------------------------------------------------------
# File descriptors


@in_turn("args", [["100"], ["--clients-per-thread", "1", "40"]], ids=" ".join)
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
        all_receive(IMAGE[:200000], clients, server)
        code, stderr, _ = server.finish(20)
    finally:
        strangers.stop()
    assert code == 0, stderr
    orderly(stderr)
