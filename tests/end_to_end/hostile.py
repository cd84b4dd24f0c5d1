"""What the tests of hostile and broken peers share: strangers, floods, and how a transfer goes that they disturb."""

import contextlib
import os
import random
import sys
import time

import helpers
from helpers import LOOPBACK
from wire import HEADER, packet

#: Of resident memory that strangers can make a server take: 256 of them with up to 64 KiB of a frame each, and as much again
#: for the pieces that those come in.
MEMORY_KIB = 32 << 10
#: Of a server for strangers: nothing that it could wait for ever runs out of time. If it, or a client, waits for one of them,
#: the transfer never ends.
ENDLESS = dict(change="kmcast.GREETING_TIME = 3600.0")
NEVER = ["--stall-timeout", 0]
#: Of a client: its kernel lets the datagrams of others in, as if they came with the server's address.
SPOOFED = """join = kmcast.DatagramReceiver._join
kmcast.DatagramReceiver._join = lambda self, ip, group, port, source: join(self, ip, group, port, None)
"""


def wrapped(code, args, python=None, **options):
    """Start kmcast with `args` after Python statements that change the module `kmcast`."""
    return helpers.start_kmcast(args, python, change=code, **options)


def orderly(stderr):
    """Fail if a log shows anything but what a user can understand, or anything that a terminal could misunderstand."""
    assert "Traceback" not in stderr and "internal error" not in stderr, stderr
    assert all(" " <= character <= "~" or character == "\n" for character in stderr), repr(stderr)
    assert all(len(line) < 600 for line in stderr.splitlines()), stderr


def all_receive(data, clients, server, timeout=60):
    """Fail unless each client ends in so many seconds with exit code 0 and exactly `data`."""
    for client in clients:
        code, stderr, received = client.finish(timeout)
        same = received == data         # a name of its own: pytest would print both
        assert code == 0 and same, stderr + server.stderr


GARBAGE = random.Random(1).getrandbits(8 * 3000).to_bytes(3000, "big")
IMAGE = helpers.random_bytes(3000000, seed=9)
CLIENTS = 3


def deploy(strangers=None, python=None, server_args=(), meanwhile=None, refused=False):
    """A transfer of IMAGE to CLIENTS clients, all of which must get it. Returns the server's log and its peak in KiB.

    Nobody waits for strangers: they go on until the server has ended, and it has all the time of the world for them.

    strangers  function of the port that starts some: half a second before the first client does
    meanwhile  function of the port, called when all clients have their places
    refused    whether others wanted a place, too, which the server's exit code then tells
    """
    port = helpers.free_port()
    server = helpers.start_server(NEVER + ["--rate", "40M"] + list(server_args) + [LOOPBACK, CLIENTS, port], python=python,
                                  stdin=IMAGE, **ENDLESS)
    server.wait_stderr("waiting for")
    started = strangers(port) if strangers else None
    try:
        time.sleep(0.5 if strangers else 0)
        clients = [helpers.start_client(NEVER + [LOOPBACK, LOOPBACK, port], python=python) for _ in range(CLIENTS)]
        if meanwhile:
            for client in clients:
                client.wait_stderr("connected to")
            meanwhile(port)
        all_receive(IMAGE, clients, server)
        code, stderr, _ = server.finish(30)
    finally:
        if started:
            started.stop()
    assert code == (3 if refused else 0), stderr
    assert "%d of %d clients have the image" % (CLIENTS, CLIENTS) in stderr
    orderly(stderr)
    return stderr, server.peak_kib


_undisturbed = {}


def undisturbed(python=None):
    """Log and peak of deploy() without strangers."""
    if python not in _undisturbed:
        _undisturbed[python] = deploy(python=python)
    return _undisturbed[python]


def noise(generator, port):
    size = generator.choice((1, 11, 12, 13, 100, 1472, 1473, 9000, 0))
    return generator.getrandbits(8 * size).to_bytes(size, "big") if size else b""


def wrong_checksums(generator, port):
    return HEADER.pack(generator.randrange(3000), generator.getrandbits(32), 1460) + b"x" * 1460


def another_session(generator, port):
    return packet(generator.randrange(3000), b"y" * 1460, 12345)


def wrong_sizes(generator, port):
    return HEADER.pack(generator.randrange(3000), 0, generator.choice((0, 1459, 0xffffffff))) + b"x" * 1460


@contextlib.contextmanager
def flooded(port, make, group=helpers.GROUP):
    """A process that multicasts what `make`, a function of this file, makes: up to a thousand datagrams in a second."""
    code = ("import sys, time, random, socket; sys.path[:0] = %r\nimport hostile\n"
            "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "sock.setsockopt(0, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))\n"
            "generator = random.Random(1)\n"
            "made = [hostile.%s(generator, %d) for _ in range(1000)]\n"
            "sys.stderr.write('ready\\n')\n"
            "while True:\n"
            "    for data in made:\n"
            "        try: sock.sendto(data, (%r, %d))\n"
            "        except OSError: pass\n"
            "        time.sleep(0.001)\n") % ([os.path.dirname(__file__), helpers.ROOT + "/tests"], make.__name__, port, group, port)
    flood = helpers.start([sys.executable, "-c", code])
    flood.wait_stderr("ready")
    try:
        yield
        assert flood.poll() is None, flood.stderr
    finally:
        flood.stop()
