#!/usr/bin/env python3
"""Whole transfers in one process, over a simulated operating system, network and clock; each follows from a seed.

    python3 tests/simulate.py --seeds 20000 --jobs 2        # seeds 0 to 19999
    python3 tests/simulate.py --seed 17                     # one again, with every message
    python3 tests/simulate.py --kmcast /tmp/broken.py       # another kmcast.py

All of kmcast.py that decides or drives is the real thing, unmodified: run_job() with the server's Multicaster and its chain
of TcpServer threads, and for each host a Client with its Writer. What they stand on is made here. A seed decides a Plan
(image, options, network, what goes wrong), every delay and every loss, and which thread runs when: a finding is replayed by
its seed.

How it works, from the bottom up:

- Each simulated thread is a Fibre in a real thread of its own, but there is one baton, and only who has it runs. It is passed
  on where a thread would wait: in poll(), select(), sleep(), join(), a recv() that blocks. Who waits takes the next events
  from the World's heap, and time is the time of these events; it passes nowhere else.
- kmcast.py is loaded with an __import__ of its own, so what it imports as `socket`, `select`, `threading`, `time`, `os`,
  `fcntl` and `resource` are the fakes of load(), from its first line on. Below them are Files with events(), as poll(2) sees
  them: Socket over two Streams (TCP), Pair (a socket pair), Receiver and Sender (UDP over Air), Source. A Process owns
  descriptors and fibres; when it ends, or is killed, its kernel closes the ones and the others are torn down.
- At the edges DatagramSender, DatagramReceiver, Source and Sink are replaced; so is what asks for this machine's interfaces.
  Nothing here knows of the insides of windows, courses and drivers. What is used of them: the options of the command line,
  run_job(), roster.here, .everyone and .refused with each member's address and outcome, Buffer.packet(), .base and .slot, and
  where its headers and payloads lie and in_place() for a kernel that puts packets there,
  the queues of a Connection, the Hasher, what is set for a seed (the window of the SessionDialect, Course.FIRST_SEQ,
  AT_A_TIME), for babble the number of rounds announced, and for the trace the events and how a message begins.

The network is unfair, but within what the manual promises to survive: TCP cut anywhere, slow and stopping; multicast lost,
late, twice, damaged; hosts that die, hang, stop, stand still for a while. What must hold: see Run.watch() and Run.verdict().

A finding is printed with its seed. Exit code: 0 nothing was found, 1 something was, 2 wrong usage.
"""

import argparse
import builtins
import collections
import concurrent.futures
import ctypes
import errno
import fcntl
import hashlib
import heapq
import importlib.util
import itertools
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
import traceback
import types
import weakref
from select import POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT, POLLPRI

KMCAST = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kmcast.py")

SERVER, PORT, GROUP = "10.0.0.1", 4711, "239.1.2.3"

START = 5000.0              # what the simulated monotonic clock says at the beginning
LIMIT = 3000.0              # simulated seconds after which somebody waits for ever
PATIENCE = 20.0             # seconds, after which the operator stops a server that has not begun
GONE = 10.0                 # seconds in which a server notices what its kernel has told it
AFTERLIFE = 150.0           # seconds that a client may take to end after its server has
KEEPALIVE = 17.0            # seconds after which a kernel gives up a host that is gone: Connection.begin()
RETRANSMISSIONS = 924.0     # the same where data is under way, by default: tcp(7), tcp_retries2
SEGMENT = 1460              # bytes that TCP sends at once
SLICE = 200                 # system calls in a row after which a thread that does not wait is interrupted for a moment
MOMENT = 0.0001             # seconds: so much time passes then, as system calls take some
SPIN = 1000                 # slices in a row after which it is taken to spin
REAL_LIMIT = 20.0           # seconds of processor time for a seed
HANGS = 600.0               # real seconds for a seed: somebody waits for what is none of the simulation's
LOOK = 2.0                  # real seconds between looks at the two
BUFFERS = 3                 # Buffers that an end may have, and two more for each round under way: it, and a pass for it

# What a CRC-32 does not see, wherever it is added (XOR): its own polynomial, as zlib orders the bits.
UNSEEN = bytes.fromhex("410671db01")
FOREIGN = b"\x2a\0\0\0" + bytes(4) + struct.pack("<I", 52) + bytes(52)     # a datagram of somebody else

kmcast = None               # the module that is tested
parser = None               # its command line; to build it takes longer than many a transfer
judge = None                # whom it sets aside
world = None                # the World of the run that is on


class Finding(Exception):
    """Something that must not happen."""


class Torn(BaseException):
    """Ends a simulated thread where it stands: its process was killed, or the run is over.

    A BaseException, so that nothing that kmcast.py handles holds it up.
    """


# ---------------------------------------------------------------------------------------------------------------------
# The plan

# What may go wrong with a server, and with a client, besides that it stands still for a while. Some are events at a time,
# the others wait where the image comes from or goes to.
SERVER_FAULTS = ["crash", "power", "hang", "stop", "freeze", "source", "threads"]
FAULTS = ["fin", "reset", "power", "hang", "stop", "babble", "full", "stuck", "room", "forged", "threads"]
NO_EVENTS = ["full", "stuck", "room", "forged", "threads", "source"]


class Plan:
    """What a seed decides before anything happens. Times are simulated seconds from the beginning."""

    def __init__(self, seed):
        r = random.Random(seed)
        self.compat = r.random() < 0.15
        self.payload = r.choice([16, 32, 64, 100, 200])
        self.capacity = r.choice([5, 17, 64, 70, 100, 130])
        whole = min(64, self.capacity) + r.randrange(4) * self.capacity         # ends with a round
        packets = r.choice([0, 1, 2, r.randrange(60), r.randrange(64, 300), r.randrange(600), whole])
        packets = min(packets, 30 * self.capacity)
        size = max(0, packets * self.payload - r.choice([0, 0, 1, self.payload // 2]))
        self.image = r.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[1:]
        self.again = not self.compat and r.random() < 0.5        # the image can be read again
        self.linger = r.choice([0, 0, 0.5, 5]) if self.again else 0
        self.more = self.again and r.random() < 0.2
        self.size_known = r.random() < 0.5
        self.allow_empty = r.random() < 0.5
        self.per_thread = r.choice([1, 2, 3, 64])
        self.digest = r.random() < 0.9
        self.has_digest = self.digest and not self.compat
        self.server_stall = r.choice([3 if self.compat else 8, 15, 30]) if r.random() < 0.9 else 0
        self.client_stall = 0 if self.compat else r.choice([8, 15, 30, 0])
        self.rate = r.choice(["auto", "auto", "auto", "1M", "50M", "max"])
        self.min_rate = "1M" if not self.compat and r.random() < (0.2 if self.again else 0.05) else None
        self.chain = r.choice(["auto"] * 8 + ["always", "never"]) if not self.compat else "auto"
        self.unicast = r.random() < 0.15 or self.chain == "always"
        self.first_seq = r.choice([0, 0, r.getrandbits(32), 2**32 - r.randrange(1, 200)])
        self.window = r.choice([1, 2, 3, 4, 4, 4, 4, 8])         # rounds under way at once, in a session
        self.at_a_time = r.choice([2, 20, 200])                  # packets to be worked at for a repair in a go
        self.pauses = r.choice([0, 0, 0, 0.05, 0.3])             # how often the producer pauses
        self.pause = r.choice([0.01, 0.1, 2, 20])
        self.shared = r.choice([0, 0, 0.01, 0.1])                # loss that all clients share
        self.line = r.choice([1e6, 1e8, 1e9])                    # bytes/s of the server's interface
        self.refused = (10 ** r.uniform(-2, 0), r.uniform(0, 2)) if r.random() < 0.04 else None     # from, for how long
        self.server_start = r.choice([0, 0, r.uniform(0, 1)])
        self.server_fault = r.choice(SERVER_FAULTS) if r.random() < 0.08 else None
        if self.server_fault == "hang" and not self.client_stall:
            self.server_fault = "crash"                          # without a timeout all would wait, as they should
        self.fault_at = 10 ** r.uniform(-2.5, 1)
        if self.again and r.random() < 0.1:
            self.server_fault = r.choice(["crash", "power"])
        self.restart = self.again and self.server_fault in ("crash", "power") and 10 ** r.uniform(-1, 0.7)
        count = r.choice([1, 1, 2, 2, 3, 3, 4, 5, 8])
        self.clients = [ClientPlan(r, self, number) for number in range(1, count + 1)]
        if r.random() < 0.15:                                    # no multicast at all, for a while or for ever
            deaf = r.choice([(0, 1e9), (r.uniform(0, 0.2), r.uniform(0.2, 4))])
            for client in self.clients:
                client.deaf = deaf
        if r.random() < 0.05 and not self.compat:                # the same host again
            twin = ClientPlan(r, self, 1)
            twin.start = self.clients[0].start + r.uniform(0, 0.3)
            self.clients.append(twin)
        self.strangers = [r.uniform(0, 2) for _ in range(r.choice([0] * 15 + [1, 3]))] if not self.compat else []
        self.relay_strangers = [(r.uniform(0, 3), r.choice(self.clients)) for _ in range(r.choice([0] * 10 + [1, 12]))]
        self.places = count
        self.start_wait = None
        if r.random() < (0.7 if self.again else 0.2) or any(client.fatal for client in self.clients):
            self.start_wait = r.uniform(0.05, 1.5)               # else it would wait for who is gone, as it should
        if r.random() < 0.03:
            self.places = max(1, self.places - 1)                # one client too many
        self.whims = r.choice([0, 0, 0, 0.2, 0.5]) if self.again else 0         # how often somebody is set aside who need not be
        if self.whims:
            self.min_rate = "1M"

    def arguments(self):
        """The server's command line."""
        texts = ["server", SERVER, str(self.places), str(PORT), "--group", GROUP, "--rate", self.rate,
                 "--stall-timeout", str(self.server_stall), "--buffer-packets", str(self.capacity),
                 "--clients-per-thread", str(self.per_thread)]
        texts += ["--compat"] if self.compat else [] if self.digest else ["--no-digest"]
        texts += ["--min-rate", self.min_rate] if self.min_rate else []
        texts += ["--linger", str(self.linger)] if self.linger else []
        texts += ["--more"] * self.more
        texts += ["--start-wait", "%.3f" % self.start_wait] if self.start_wait else []
        texts += ["--chain", self.chain] if self.chain != "auto" else ["--unicast"] * self.unicast
        return texts + ["--allow-empty"] * self.allow_empty


class ClientPlan:
    """A client, its link, and what goes wrong with it; `fatal` is what may end it, None if it must get the image."""

    def __init__(self, r, plan, number):
        self.host, self.address = "node%d" % number, "10.0.1.%d" % number
        self.compat, self.has_digest, self.babble = plan.compat, plan.has_digest, plan.server_fault == "babble"
        self.allow_empty, self.stall = plan.allow_empty, plan.client_stall
        self.window = plan.window if r.random() < 0.8 else r.choice([1, 2, 3, 8])       # rounds that it can hold
        self.start = r.choice([0, r.uniform(0, 0.2), r.uniform(0, 1)])
        if plan.again and r.random() < 0.4:
            self.start = 10 ** r.uniform(-1, 1)                  # perhaps late
        self.seeks = r.random() < 0.6                            # its output takes rounds in any order
        # When its connection breaks, and whether the server sees it at once.
        self.breaks = [(self.start + 10 ** r.uniform(-1.5, 1), r.random() < 0.6) for _ in range(
            r.choice([1, 1, 2, 5]) if plan.again and r.random() < 0.3 else 0)]
        self.delay = 10 ** r.uniform(-4, -1.3)                   # seconds, one way
        self.rate = 10 ** r.uniform(4.5, 8)                      # bytes/s of TCP
        self.room = r.choice([300, 2000, 16384, 65536])          # bytes under way by TCP
        if r.random() < (0.3 if plan.compat else 0.04):
            self.rate, self.room = 1500, 65536                   # its kernel has more than it sends within a stall timeout
        self.cut = r.choice([0, 0.2, 0.8])                       # how often TCP comes in pieces
        good = r.random() < 0.35
        self.loss = 0 if good else r.choice([0, 0.001, 0.02, 0.1, 0.3, 0.6, 1])
        self.burst = 0 if good else r.choice([0, 0, 0.01, 0.05])
        self.jitter = r.choice([0, 0, 0.001, 0.004, 0.02])
        self.late = r.choice([0, 0, 0.01])                       # share that comes very late
        self.twice = r.choice([0, 0, 0.02, 0.3])
        self.damage = r.choice([0, 0, 0, 0.02])
        self.queue = r.choice([None, None, (10 ** r.uniform(5, 7.5), r.choice([2000, 20000]))])     # bytes/s, bytes
        self.socket_buffer = r.choice([20, 1000, 10000])         # datagrams
        self.deaf = r.choice([None] * 6 + [(0, 1e9), (r.uniform(0, 0.2), r.uniform(0.2, 4))])
        self.firewall = r.choice([None] * 12 + ["drops", "refuses"])                # who would connect to it
        self.write_rate = 10 ** r.uniform(4, 8) if not plan.compat else 1e8
        self.chunk = 0 if plan.compat else r.choice([0, 0, 0, 0.01, 0.5, 1.5])      # seconds that a write takes at least
        self.commit = r.choice([0, 0, 0.1, 12]) if not plan.compat else r.choice([0, 0, 0.1])
        self.fault, self.at, self.fatal = None, 10 ** r.uniform(-3, 1), None
        what = r.random()
        if what < 0.07:
            self.fault = "freeze"
        elif what < 0.28:
            self.fault = self.fatal = r.choice(FAULTS)
            if self.fault in ("hang", "babble") and not plan.server_stall or self.fault == "stuck" and not self.stall:
                self.fault = self.fatal = "reset"                # without a timeout all would wait, as they should
            if self.fault == "forged" and not plan.has_digest:
                self.fault = self.fatal = "fin"
        stalls = [stall for stall in (plan.server_stall, plan.client_stall, 8) if stall]
        self.freeze = min(10 ** r.uniform(-3, 0.4), 0.3 * min(stalls))              # seconds
        self.full_at = r.randrange(len(plan.image) + 1)
        if plan.again and not self.fault and r.random() < 0.3:
            self.fault = self.fatal = r.choice(["fin", "reset", "power"])
        self.resume = self.seeks and not plan.compat and r.random() < 0.6
        # Once it has ended, whatever of, it is started again; a host that lost power has lost some of what was written last.
        self.restart = self.resume and r.random() < 0.8 and 10 ** r.uniform(-1, 0.7)
        self.harm = self.resume and r.random() < 0.3

    def hears_all(self, plan):
        """Whether all that is multicast comes to it, in order, and before SENT by TCP does, or soon after.

        In order: who has the first and the last packet of a round asks at once for what is between them.
        """
        return not (self.loss or self.burst or self.late or self.damage or self.queue or self.deaf or self.fault
                    or self.jitter or self.socket_buffer < 10000
                    or plan.shared or plan.refused or plan.unicast or plan.server_fault or plan.rate == "max")

    def arguments(self):
        """The client's command line."""
        texts = ["client", "auto", SERVER, str(PORT), "-o", "/image", "--wait", "10", "--stall-timeout", str(self.stall)]
        return texts + ["--allow-empty"] * self.allow_empty + ["--resume"] * self.resume


# ---------------------------------------------------------------------------------------------------------------------
# The world: a clock, events, and threads of which one runs at a time

ALWAYS = POLLERR | POLLHUP | POLLNVAL          # poll(2) tells these unasked


class File:
    """What a descriptor stands for; events() is what poll(2) would say of it."""

    fd = -1

    def __init__(self):
        self.waiters = {}                       # Fibre -> events that it waits for

    def events(self):
        """What there is to be told."""
        return 0

    def fileno(self):
        """Its descriptor; -1 once it is closed."""
        return self.fd

    def changed(self):
        """Something happened: whoever waits for that gets a turn."""
        if self.waiters:
            events = self.events()
            for fibre, mask in list(self.waiters.items()):
                if events & (mask | ALWAYS):
                    world.wake(fibre)

    def shut(self):
        """The kernel closes it."""

    def vanish(self):
        """Its host loses power."""

    def close(self):
        """close(2); may be done twice."""
        if self.fd >= 0:
            world.call()
            del world.process.files[self.fd]
            self.fd = -1
            self.shut()


class Closed(File):
    """Stands for a descriptor that is none."""

    def events(self):
        return POLLNVAL


CLOSED = Closed()


class Until(File):
    """Is readable when a condition holds."""

    def __init__(self, holds):
        File.__init__(self)
        self.holds = holds

    def events(self):
        return POLLIN if self.holds() else 0


class Fibre(File):
    """A simulated thread in a real one; as a File, it is readable when it has ended."""

    def __init__(self, process, name, call):
        File.__init__(self)
        self.process, self.name, self.call = process, name, call
        self.baton = threading.Lock()           # is free for a moment only, when it is this one's turn
        self.baton.acquire()
        self.turn = 0                           # counts how often it waited
        self.woken = self.over = False
        self.calls = self.slices = 0            # system calls since it last waited, and slices
        self.thread = None
        if call:
            self.thread = threading.Thread(target=self._live, daemon=True)
            self.thread.start()

    def __str__(self):
        names = (self.process and self.process.name, self.name != "main" and self.name)
        return " ".join(name for name in names if name)

    def events(self):
        return POLLIN if self.over else 0

    def _live(self):
        self.baton.acquire()
        try:
            if not (world.over or self.process.dead):
                self.call()
        except Torn:
            pass
        except BaseException:                   # pylint: disable=broad-except
            world.found("%s ends with %s" % (self, traceback.format_exc().strip()))
        self.over, self.call = True, None
        self.changed()
        world.pass_on()


class World:
    """The clock, what is to happen, and the baton."""

    def __init__(self, seed, trace):
        self.now = 0.0
        self.random = random.Random("world %d" % seed)
        self.trace = trace
        self.finding = None                     # in words; the run is over then
        self.over = False
        self.watch = lambda: None               # called now and then
        self.listeners, self.groups = {}, {}    # by address and port
        self.damage_goes_round = False          # from client to client, in a chain
        self.powerless = set()                  # addresses of hosts without power
        self.firewalls = {}                     # address -> what becomes of who connects to it
        self.disks = {}                         # address -> Disk
        self.journals, self._folder = [], None  # that were opened, and where they are
        self.turns = 0
        self.began = time.process_time(), time.monotonic()      # on the real clocks
        self.happening = False                  # what is done now is done by nobody
        self._heap, self._number = [], 0
        self._fibres = []
        self.harness = self.current = Fibre(None, "harness", None)
        self.ends = Until(lambda: False)        # what the harness waits for, where processes end

    process = property(lambda self: self.current.process)

    def folder(self):
        """Where real files may be made."""
        self._folder = self._folder or tempfile.mkdtemp()
        return self._folder

    def clear(self):
        """Leave no real file behind."""
        for journal in self.journals:
            journal.close()
        if self._folder:
            shutil.rmtree(self._folder)

    # ---- what happens

    def at(self, delay, call, *args):
        """Have something happen so many seconds from now."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay, self._number, None, call, args))

    def _resume(self, fibre, when):
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, fibre, fibre.turn, None))

    def wake(self, fibre, delay=None):
        """Give a fibre its turn, soon."""
        if not fibre.woken:
            fibre.woken = True
            self._resume(fibre, self.now + (self.random.random() * 0.0002 if delay is None else delay))

    def _next(self):
        """Let things happen until it is somebody's turn; returns whose."""
        heap = self._heap
        try:
            while self.finding is None:
                if not heap:
                    raise Finding("somebody waits, and nothing more will happen")
                when, _, fibre, what, args = heapq.heappop(heap)
                if fibre:
                    if fibre.turn != what or fibre.over:
                        continue                # it has had that turn
                    process = fibre.process
                    if process and process.frozen_until > when and not process.dead:
                        if process.frozen_until < LIMIT:
                            self._resume(fibre, process.frozen_until)
                        continue
                if when > LIMIT:
                    raise Finding("somebody waits for ever")
                self.now = when
                self.turns += 1
                if not self.turns % 32:
                    self.watch()
                if fibre:
                    return fibre
                self.happening = True
                what(*args)
                self.happening = False
        except Finding as error:
            self.found(str(error))
        except Exception:                       # pylint: disable=broad-except
            self.found(traceback.format_exc().strip())
        return self.harness

    def found(self, text):
        """Something that must not happen has; the first is the one that counts."""
        self.finding = self.finding or text

    # ---- the baton

    def pass_on(self):
        """The running fibre has ended: let somebody else run."""
        self.current = self.harness if self.over else self._next()
        self.current.baton.release()

    def _switch(self):
        me, other = self.current, self._next()
        if other is not me:
            self.current = other
            other.baton.release()
            me.baton.acquire()
        self.check()

    def wait(self, watched, seconds=None):
        """Have the running fibre wait, at most so long, until one of [(File, events)] has such an event.

        Returns for each of them which of its events are there; none are when the time is over.
        """
        until = None if seconds is None else self.now + seconds
        while True:
            there = [file.events() & (mask | ALWAYS) for file, mask in watched]
            if any(there) or until is not None and self.now >= until:
                return there
            fibre = self.current
            fibre.turn += 1
            fibre.woken = False
            fibre.calls = fibre.slices = 0
            for file, mask in watched:
                file.waiters[fibre] = mask
            if until is not None:
                self._resume(fibre, until)
            try:
                self._switch()
            finally:
                for file, _ in watched:
                    file.waiters.pop(fibre, None)

    def sleep(self, seconds):
        """Have the running fibre do nothing for so long."""
        self.call()
        self.wait([], seconds)

    def check(self):
        """Where a thread may be torn down, or hear a signal; and the harness, of a finding."""
        process = self.current.process
        if not process:
            if self.finding:
                raise Finding(self.finding)
            return
        if self.finding or self.over or process.dead:
            raise Torn()
        if process.signal and self.current is process.main and not process.signals.verdict:
            name, process.signal = process.signal, None
            process.uninterruptible.interrupt(name)

    def call(self):
        """The running fibre makes a system call. Nothing is called as often, so check() is only where it may matter."""
        fibre = self.current
        process = fibre.process
        if self.over or self.finding or not process or process.dead or process.signal:
            self.check()
        fibre.calls += 1
        if fibre.calls == SLICE and process:
            slices = fibre.slices + 1
            if slices > SPIN:
                self.found("%s spins:\n%s" % (fibre, "".join(traceback.format_stack(limit=8))))
                raise Torn()
            self.wait([], MOMENT)
            fibre.slices = slices

    # ---- threads

    def spawn(self, process, name, call):
        """Start a thread of a process."""
        fibre = Fibre(process, name, call)
        self._fibres.append(fibre)
        process.fibres.append(fibre)
        self.wake(fibre)
        return fibre

    def tear(self, fibre):
        """End a thread at its next turn, which is now."""
        if not fibre.over and fibre is not self.current:
            self._resume(fibre, self.now)

    def tear_down(self):
        """End all threads; for the harness."""
        self.over = True
        for fibre in self._fibres:
            if not fibre.over:
                self.current = fibre
                fibre.baton.release()
                self.harness.baton.acquire()
        for fibre in self._fibres:
            fibre.thread.join()

    def overdue(self, *_args):
        """A signal handler, in the main thread: does it take for ever, without a system call or with too many?

        By the processor time, as others may keep this process waiting, or stop it for a while.
        """
        spent, passed = time.process_time() - self.began[0], time.monotonic() - self.began[1]
        if spent < REAL_LIMIT and passed < HANGS:
            return
        self.found("it takes more than %g s of processor time, or %g real ones" % (REAL_LIMIT, HANGS))
        if self.current.thread:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.current.thread.ident), ctypes.py_object(Torn))
        else:
            raise Finding(self.finding)

    def say(self, text, *args):
        """A line of the trace, by whoever runs."""
        if self.trace:
            print("%11.6f %-24s %s" % (self.now, "" if self.happening else self.current, text % args if args else text))


class Signals:
    """A StopInOrder."""

    def __init__(self):
        self.state = None
        self.verdict = False                    # it stands: signals are ignored

    def over(self):
        """The verdict stands."""
        self.verdict = True


class Process:
    """A kmcast on its host: descriptors and threads, and what came of it."""

    def __init__(self, name, host, address, plan, arguments):
        self.name, self.host, self.address, self.plan = name, host, address, plan
        self.arguments = arguments
        self.files = {}                         # descriptor -> File
        self.fibres, self.main = [], None
        self.most_threads = 1000
        self.uninterruptible = kmcast.Uninterruptible()
        self.signals, self.signal = Signals(), None
        self.frozen_until = 0.0
        self.begun = self.dead = False          # it has ended, or was killed
        self.off = False                        # its host has no power
        self.fault = None                       # what happened to it, if that may end it
        self.job = self.code = None
        self.reason = None                      # why it failed, in words
        self.far = None                         # the other end of its last connection
        self.ended_at = None
        self.output, self.opened, self.committed = bytearray(), False, False
        self.wrote = False
        self.looks = 0                          # at how it stands
        self.in_output = False                  # its writer is in a system call, or in one that never ends

    def __str__(self):
        return self.name

    @property
    def may_find_damage(self):
        """Whether something that a client receives may be other than what a server has sent, or has read."""
        return self.plan.damage or self.plan.fault == "forged" or self.plan.babble or world.damage_goes_round

    hung = property(lambda self: self.frozen_until > LIMIT)
    ended = property(lambda self: self.dead or self.hung)

    def start(self):
        """Run it."""
        if not self.dead:
            self.main = world.spawn(self, "main", self._run)

    def _run(self):
        """What it does."""
        self.begun = True
        options = parser.parse_args(self.arguments)
        try:
            self.code = kmcast.run_job(options, self.signals)
        finally:
            if not world.over and not world.finding and not self.dead:
                left = [fibre for fibre in self.fibres if not fibre.over and fibre is not self.main]
                if left and not self.in_output:
                    world.found("%s ends, and leaves a thread: %s" % (self, left[0].name))
        self.kill("exits with %s" % self.code)

    def install(self, file):
        """Give a File the lowest descriptor that is free."""
        fd = 3
        while fd in self.files:
            fd += 1
        self.files[fd] = file
        file.fd = fd
        return file

    def connections(self):
        """Its TCP connections."""
        return [file for file in self.files.values() if isinstance(file, Socket) and file.output]

    def babble(self):
        """Say something that nobody asked for."""
        for sock in self.connections():
            sock.babble()

    def kill(self, why, silently=False):
        """End it; its kernel closes what it had open, unless there is no kernel any more (silently)."""
        if self.dead:
            return
        world.say("%s %s", self, why)
        self.dead, self.off, self.ended_at = True, silently, world.now
        for file in list(self.files.values()):
            file.fd = -1
            if silently:
                file.vanish()
            else:
                file.shut()
        self.files.clear()
        for fibre in self.fibres:
            world.tear(fibre)
        world.ends.changed()

    def freeze(self, seconds):
        """Stop it, as by SIGSTOP, for so long."""
        self.frozen_until = self.ended_at = world.now + seconds
        if self.hung:
            self.ended_at = world.now
        world.ends.changed()

    def interrupt(self, name):
        """Send it a signal, which ends it unless it looks after signals already."""
        if not self.begun:
            return self.kill("is killed")
        self.signal = name
        world.wake(self.main, 0)


class Stranger(Process):
    """Somebody who connects and says nothing, or nothing that makes sense."""

    where, says = (SERVER, PORT), b""

    def _run(self):
        sock = Socket()
        sock.connect_ex(self.where)
        if self.says:
            world.wait([(sock, select.POLLOUT)], 5)
            if sock.connected:
                sock.send(self.says)
        world.sleep(100)
        self.kill("has seen enough")


# ---------------------------------------------------------------------------------------------------------------------
# The operating system, as far as kmcast.py asks for it

def monotonic():
    """time.monotonic()."""
    if world is None:
        return START
    world.call()
    return START + world.now


def file_of(descriptor, files):
    """The File of a descriptor, or of what has one."""
    fd = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return files.get(fd, CLOSED)


class Poll:
    """select.poll()."""

    def __init__(self):
        self._masks = {}

    def register(self, what, mask=POLLIN | POLLPRI | POLLOUT):
        """Watch a descriptor, or what has one."""
        fd = what if isinstance(what, int) else what.fileno()
        if fd < 0:
            raise ValueError("file descriptor cannot be a negative integer (%d)" % fd)
        self._masks[fd] = mask

    def modify(self, what, mask):
        """Watch it for something else."""
        fd = what if isinstance(what, int) else what.fileno()
        if fd not in self._masks:
            raise FileNotFoundError(errno.ENOENT, "not registered")
        self._masks[fd] = mask

    def unregister(self, what):
        """Do not watch it."""
        del self._masks[what if isinstance(what, int) else what.fileno()]

    def poll(self, milliseconds=None):
        """Wait; returns [(descriptor, events)]."""
        world.call()
        files = world.process.files
        fds = list(self._masks)
        there = world.wait([(files.get(fd, CLOSED), mask) for fd, mask in self._masks.items()],
                           None if milliseconds is None or milliseconds < 0 else milliseconds / 1000)
        return [(fd, events) for fd, events in zip(fds, there) if events]


def select_(reads, writes, _exceptions, seconds=None):
    """select.select()."""
    world.call()
    files = world.process.files
    reads, writes = ([(what, file_of(what, files)) for what in side] for side in (reads, writes))
    for _, file in reads + writes:
        if file is CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    there = world.wait([(file, POLLIN) for _, file in reads] + [(file, POLLOUT) for _, file in writes], seconds)
    return ([what for (what, _), events in zip(reads, there) if events & (POLLIN | POLLHUP | POLLERR)],
            [what for (what, _), events in zip(writes, there[len(reads):]) if events & (POLLOUT | POLLERR)], [])


class Thread:
    """threading.Thread."""

    def __init__(self, group=None, target=None, name=None, args=(), kwargs=None, daemon=None):
        self.name, self.daemon, self.ident = name or "thread", daemon, None
        self._work = target, args, kwargs or {}
        self._fibre = None

    def start(self):
        """Begin to run()."""
        world.call()
        process = world.process
        if len(process.fibres) >= process.most_threads:
            process.fault = "threads"
            raise RuntimeError("can't start new thread")
        self._fibre = world.spawn(process, self.name, self.run)
        self.ident = id(self._fibre)

    def run(self):
        """What it does."""
        target, args, kwargs = self._work
        if target:
            target(*args, **kwargs)

    def is_alive(self):
        """Whether it runs."""
        world.call()
        return self._fibre is not None and not self._fibre.over

    def join(self, timeout=None):
        """Wait for its end."""
        world.call()
        world.wait([(self._fibre, POLLIN)], timeout)


class Lock(File):
    """threading.Lock."""

    def __init__(self):
        File.__init__(self)
        self.held = False

    def events(self):
        return 0 if self.held else POLLIN

    def acquire(self, blocking=True, timeout=-1):
        """Wait for it, and have it."""
        world.call()
        if blocking:
            world.wait([(self, POLLIN)], None if timeout < 0 else timeout)
        got, self.held = not self.held, True
        return got

    def release(self):
        """Let another have it."""
        self.held = False
        self.changed()

    def __enter__(self):
        while not self.acquire():
            pass

    def __exit__(self, *_exception):
        self.release()


class Pair(File):
    """An end of a socketpair()."""

    ROOM = 30                               # bytes; a real one has ten times as much

    def __init__(self):
        File.__init__(self)
        self.other = None
        self._unread = bytearray()

    def events(self):
        other = self.other
        if other.fd < 0:
            return POLLIN | POLLHUP | POLLOUT
        return (POLLOUT if len(other._unread) < self.ROOM else 0) | (POLLIN if self._unread else 0)

    def recv(self, most):
        """Wait for bytes; b'' when the other end is closed."""
        world.call()
        if self.fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        world.wait([(self, POLLIN)])
        data = bytes(self._unread[:most])
        del self._unread[:most]
        self.other.changed()
        return data

    def send(self, data, flags=0):
        """Send a byte."""
        world.call()
        if self.fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.other.fd < 0:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if not self.events() & POLLOUT and flags & socket.MSG_DONTWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        world.wait([(self, POLLOUT)])
        self.other._unread += data
        self.other.changed()
        return len(data)

    def shut(self):
        self.other.changed()

    vanish = shut


def socketpair():
    """socket.socketpair()."""
    world.call()
    ends = [world.process.install(Pair()) for _ in (0, 1)]
    ends[0].other, ends[1].other = ends[1], ends[0]
    return tuple(ends)


def ioctl(fd, request, argument):
    """fcntl.ioctl(): how much of what was sent the other end's kernel does not have yet."""
    world.call()
    file = world.process.files.get(fd)
    if request != termios.TIOCOUTQ or not isinstance(file, Socket):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return struct.pack("@i", file.output.accepted - file.output.arrived)


class Reader:
    """Reads the events: of a server and all clients, for the trace, and for what must not happen."""

    @staticmethod
    def happened(what, facts):
        """An event."""
        if what == "bug":
            world.found("%s: an internal error: %s" % (world.current, facts["trace"]))
        if world.trace and what in kmcast.WORDS:
            world.say("%s", kmcast.WORDS[what][1] % kmcast.in_words(what, facts))
        if what == "failed":
            world.process.reason = facts["reason"]
        if what == "damaged" and not world.process.may_find_damage:
            world.found("%s finds damage where there was none: %s" % (world.process, facts))

    @staticmethod
    def look(now):
        """Time passes: how does it stand?"""
        process = world.process
        process.looks += 1
        if process.job and not process.looks % 16:
            process.job.status(now)
            process.job.hosts()


class EachItsWindow(type):
    """Of the SessionDialect: each process has a window of its own."""

    window = property(lambda cls: world.process.plan.window)


class Uninterruptible:
    """kmcast's own, one for each process."""

    def __enter__(self):
        world.process.uninterruptible.__enter__()

    def __exit__(self, *exception):
        world.process.uninterruptible.__exit__(*exception)


def fake(module, **others):
    """A module with some other things in it."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(vars(module))
    copy.__dict__.update(others)
    return copy


def load(path=KMCAST):
    """Load kmcast.py as a module of our own, in the simulated world from its first line on."""
    global kmcast, parser, judge
    fakes = {
        "time": fake(time, monotonic=monotonic, time=monotonic, sleep=lambda seconds: world.sleep(seconds)),
        "select": fake(select, poll=Poll, select=select_),
        "socket": fake(socket, socket=Socket, socketpair=socketpair, gethostname=lambda: world.process.host),
        "threading": fake(threading, Thread=Thread, Lock=Lock),
        "os": fake(os, nice=lambda number: number, isatty=lambda fd: False,
                   urandom=lambda size: world.random.getrandbits(8 * size).to_bytes(size, "big")),
        "fcntl": fake(fcntl, ioctl=ioctl),
        "resource": fake(resource, getrlimit=lambda what: (1024, 4096), setrlimit=lambda what, limits: None),
    }

    def import_(name, *args):
        return fakes.get(name) or builtins.__import__(name, *args)

    spec = importlib.util.spec_from_file_location("kmcast_simulated", path)
    kmcast = importlib.util.module_from_spec(spec)
    vars(kmcast)["__builtins__"] = dict(vars(builtins), __import__=import_)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(kmcast)
    sys.dont_write_bytecode = writes
    kmcast.DatagramSender, kmcast.DatagramReceiver = Sender, Receiver
    kmcast.Source, kmcast.Sink = Source, Sink
    kmcast.uninterruptible = Uninterruptible()
    judge = kmcast.Course._judge
    kmcast.SessionDialect = EachItsWindow("SessionDialect", (kmcast.SessionDialect,), {})
    kmcast.interfaces = lambda: [("eth0", world.process.address)]
    kmcast.local_address = lambda text: world.process.address
    kmcast.read_by_user = lambda options, job: None
    kmcast.tell.readers[:] = [Reader]
    for name in ("server", "client"):
        kmcast.COMMANDS[name] = noting_the_job(kmcast.COMMANDS[name])
    for class_ in (kmcast.Buffer, kmcast.Connection):
        counted(class_)
    parser = kmcast.command_line()


def noting_the_job(command):
    """A command of kmcast.py whose job its process keeps."""
    def begin(options, signals):
        world.process.job = command(options, signals)
        return world.process.job
    return begin


def counted(class_):
    """Have a class know those of its objects that are in memory: `live`."""
    begin, class_.live = class_.__init__, weakref.WeakSet()

    def init(self, *args, **options):
        begin(self, *args, **options)
        self.made_by = world.process
        self.live.add(self)
    class_.__init__ = init


# ---------------------------------------------------------------------------------------------------------------------
# TCP

class Stream:
    """One direction of a TCP connection: ordered, reliable, cut anywhere, with a rate, a delay and a window."""

    def __init__(self, plan, source, sink):
        self.plan, self.source, self.sink = plan, source, sink      # the sockets at its ends
        self.unread = bytearray()
        self.under_way = 0                      # bytes sent and not read
        self.accepted = self.arrived = 0        # bytes
        self.ended = self.broken = False        # as its sink sees it
        self.finished = False                   # as its source does
        self.blocked = False
        self._next = 0.0

    def send(self, data):
        """Take what there is room for; returns how much."""
        room = self.plan.room - self.under_way
        if room <= 0:
            self.blocked = True
            raise BlockingIOError(errno.EAGAIN, "full")
        data = bytes(data[:room])
        self.accepted += len(data)
        self.under_way += len(data)
        r, start = world.random, 0
        while start < len(data):
            size = min(SEGMENT, len(data) - start)
            if size > 1 and r.random() < self.plan.cut:
                size = r.randint(1, size - 1) if r.random() < 0.8 else 1
            self._later(size, self._arrive, data[start:start + size])
            start += size
        return len(data)

    def _later(self, size, call, *args):
        """In order, after what was sent before."""
        self._next = max(self._next, world.now + self.plan.delay * world.random.uniform(1, 1.2)) + size / self.plan.rate
        world.at(self._next - world.now, call, *args)

    def _arrive(self, data):
        if self.broken or self.sink.process.off:
            return
        self.arrived += len(data)
        if self.sink.closed:                    # nobody reads it any more: a reset comes back
            self.sink.output.reset()
            return
        self.unread += data
        self.sink.changed()

    def finish(self):
        """No more will be sent."""
        if not self.finished:
            self.finished = True
            self._later(0, self._end, "ended")

    def reset(self):
        """No more will be sent or taken."""
        self.finished = True
        self._later(0, self._end, "broken")

    def _end(self, how):
        if not self.sink.process.off:
            setattr(self, how, True)
            self.sink.told_at = self.sink.told_at or world.now
            self.sink.changed()

    def receive(self, most):
        """Take what has arrived."""
        if not self.unread:
            if self.broken:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            if self.ended:
                return b""
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        if world.random.random() < self.plan.cut:
            most = world.random.randint(1, most)
        data = bytes(self.unread[:most])
        del self.unread[:most]
        self.under_way -= len(data)
        if self.blocked:
            self.blocked = False
            world.at(self.plan.delay, self.source.changed)
        return data


class Socket(File):
    """socket.socket() of TCP; it does not block."""

    BACKLOG = 128

    def __init__(self, family=socket.AF_INET, kind=socket.SOCK_STREAM, _protocol=0):
        if (family, kind) != (socket.AF_INET, socket.SOCK_STREAM):
            raise NotImplementedError("a socket of another kind than TCP")
        world.call()
        File.__init__(self)
        self._begin(world.process)
        self.process.install(self)

    def _begin(self, process):
        self.process = process
        self.output = self.input = None         # Streams
        self.queue = None                       # of a listener: who wants to be accepted
        self.error = 0
        self.connected = self.closed = False
        self.local, self.remote = ("0.0.0.0", 0), None
        self.options = {}
        self.told_at = None                     # when its kernel learnt that the other end is gone
        self._continues = False                 # what is sent next may go on with a message

    def events(self):
        if self.queue is not None:
            return POLLIN if self.queue else 0
        if self.error:
            return POLLIN | POLLOUT | POLLERR | POLLHUP
        if not self.connected:
            return 0 if self.remote else POLLOUT | POLLHUP
        there, here = self.output, self.input
        events = POLLIN if here.unread or here.ended or here.broken else 0
        if here.broken:
            return events | POLLOUT | POLLERR | POLLHUP
        if here.ended and there.finished:
            events |= POLLHUP
        return events | (POLLOUT if there.under_way < there.plan.room else 0)

    def _call(self):
        world.call()
        if self.fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    # ---- set-up

    def setblocking(self, flag):
        """It never blocks, whatever."""
        self._call()

    def setsockopt(self, _level, option, value):
        """Note an option."""
        self._call()
        self.options[option] = value

    def getsockopt(self, _level, option):
        """SO_ERROR, or what was set."""
        self._call()
        if option == socket.SO_ERROR:
            error, self.error = self.error, 0
            return error
        return self.options.get(option, 0)

    def getsockname(self):
        """Its address."""
        self._call()
        return self.local

    def getpeername(self):
        """The other end's."""
        self._call()
        if not self.connected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self.remote

    def bind(self, address):
        """Choose a port."""
        self._call()
        port = address[1] or world.random.randrange(20000, 60000)
        if (self.process.address, port) in world.listeners:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self.local = self.process.address, port

    def listen(self, _backlog):
        """Let others connect."""
        self._call()
        self.queue = []
        world.listeners[self.local] = self

    def accept(self):
        """The next that has connected, and its address."""
        self._call()
        if not self.queue:
            raise BlockingIOError(errno.EAGAIN, "nobody there")
        sock = self.process.install(self.queue.pop(0))
        return sock, sock.remote

    # ---- connecting

    def connect_ex(self, address):
        """Begin to connect."""
        self._call()
        self.remote, self.local = address, (self.process.address, world.random.randrange(20000, 60000))
        world.at(self.process.plan.delay, self._knock)
        return errno.EINPROGRESS

    def _knock(self):
        """Its SYN comes to the other host."""
        listener, delay = world.listeners.get(self.remote), self.process.plan.delay
        firewall = world.firewalls.get(self.remote[0])
        if firewall == "drops":
            return
        if firewall:
            listener = None
        if listener is None or len(listener.queue) >= self.BACKLOG:
            if self.remote[0] not in world.powerless and listener is None:
                world.at(delay, self._answered, errno.ECONNREFUSED)
            return
        far = Socket.__new__(Socket)
        File.__init__(far)
        far._begin(listener.process)
        far.connected, far.local, far.remote = True, self.remote, self.local
        far.output = self.input = Stream(self.process.plan, far, self)
        self.output = far.input = Stream(self.process.plan, self, far)
        if self.remote[0] == SERVER:
            self.process.far = far
        if self.closed:
            self.output.reset()
        listener.queue.append(far)
        listener.changed()
        world.at(delay, self._answered, 0)

    def _answered(self, error):
        self.error, self.connected = error, not error
        self.changed()

    # ---- data

    def send(self, data, flags=0):
        """Send what there is room for."""
        self._call()
        if not self.connected or self.input.broken or self.output.finished:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        size = self.output.send(data)
        if world.trace:
            what = "... %d bytes" % len(data) if self._continues else described(
                data, self.process.plan.compat, self.process.name == "server",
                self.process.name == "server" or self.remote[0] == SERVER)
            world.say("-> %-10s %s%s", self.output.sink.process, what, "" if size == len(data) else ", of these %d" % size)
            self._continues = bool(flags & socket.MSG_MORE) or size < len(data)
        return size

    def recv(self, most):
        """Take what has arrived."""
        self._call()
        return self.input.receive(most)

    def recv_into(self, view):
        """The same into a buffer."""
        self._call()
        data = self.input.receive(len(view))
        view[:len(data)] = data
        return len(data)

    def shutdown(self, _how):
        """Send no more."""
        self._call()
        if not self.connected or self.input.broken:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self.output.finish()

    def babble(self):
        """Say something that nobody asked for."""
        r = world.random
        window = self.process.job and self.process.job.window
        number = r.choice([0, 1, 2**32 - 1] + [max(0, window.announced - r.randrange(4))] * 3 if window else [0])
        number = struct.pack("<I", number)
        some = r.choice([b"\x04", b"\x01", b"\x02" + struct.pack("<2I", 1, r.getrandbits(32)), b"\x10\2\0\0\0{}",
                         b"\x01" + number, b"\x04" + number + bytes(16), b"\x02" + number + bytes(r.randrange(16, 40)),
                         b"\x80\2\0\0\0{}", r.getrandbits(80).to_bytes(10, "big")])
        if not self.output.finished and self.output.under_way < self.output.plan.room:
            self.output.send(some)

    # ---- the end

    def shut(self):
        """As the kernel does it: who leaves something unread sends a reset."""
        self.closed = True
        if self.queue is not None:
            world.listeners.pop(self.local, None)
            for sock in self.queue:
                sock.closed = True
                sock.output.reset()
        elif self.output and not self.input.broken:
            (self.output.reset if self.input.unread else self.output.finish)()

    def vanish(self):
        """Its host has no power any more: the other end's kernel finds out by itself."""
        self.closed = True
        world.powerless.add(self.process.address)
        if self.queue is not None:
            world.listeners.pop(self.local, None)
            for sock in self.queue:
                sock.vanish()
        elif self.output:
            self.output.sink.doubt(world.now)

    def doubt(self, since):
        """The kernel has heard nothing of the other host since then: tcp(7)."""
        if self.closed:
            return
        limit = self.options.get(kmcast.TCP_USER_TIMEOUT, 0) / 1000
        if self.output.accepted > self.output.arrived:
            limit = limit or RETRANSMISSIONS
        else:
            limit = limit or KEEPALIVE
        if world.now - since < limit:
            world.at(1, self.doubt, since)
        else:
            self.input._end("broken")


def described(message, compat, by_server, with_server):
    """A message, or what may be a part of one, for the trace."""
    kind = bytes(message[:1])
    if not with_server:
        if len(message) != kmcast.PIECE.size:
            return "%d bytes of the chain" % len(message)
        return "PIECE of round %d, from packet %d on, %d bytes" % kmcast.PIECE.unpack(bytes(message))
    if by_server and len(message) == kmcast.GROUP_INFO.size and kind == b"\2":
        return "group info"
    if by_server:
        names = {kmcast.BUFFER_INFO: "INFO", kmcast.PACKETS: "PACKETS", kmcast.SENT: "SENT", kmcast.AGAIN: "AGAIN",
                 kmcast.SUMS: "SUMS"}
    else:
        names = {kmcast.READY: "READY", kmcast.REQUEST: "REQUEST", kmcast.DONE: "DONE", kmcast.SUMS: "SUMS"}
    if kind in names:
        at = 5 if by_server and kind == kmcast.SUMS else 1
        number = " %d" % struct.unpack_from("<I", message, at) if not compat and len(message) >= at + 4 else ""
        return "%s%s (%d bytes)" % (names[kind], number, len(message))
    for name in ("ALIVE", "HELLO", "WELCOME", "STATE", "BYE", "UPSTREAM", "FOLLOWER", "RELAY"):
        if kind == getattr(kmcast, name) and not compat:
            shown = name in ("BYE", "UPSTREAM", "FOLLOWER", "RELAY")
            return "%s (%d bytes)%s" % (name, len(message), " " + bytes(message[5:]).decode("ascii", "replace") if shown else "")
    return "%d bytes" % len(message)


# ---------------------------------------------------------------------------------------------------------------------
# UDP

class Air:
    """Multicast to one host: what is lost on the way, what comes late, twice, damaged."""

    def __init__(self, plan, receiver):
        self.plan, self.receiver = plan, receiver
        self.bad = False                        # in a burst of losses
        self.busy_until = 0.0                   # of the bottleneck

    def send(self, datagrams, departure):
        """Bring datagrams, which leave so many seconds from now."""
        plan, r = self.plan, world.random
        if plan.deaf and plan.deaf[0] <= world.now < plan.deaf[1]:
            return
        delay, together = departure + plan.delay, []
        for data in datagrams:
            if plan.burst and r.random() < (0.2 if self.bad else plan.burst):
                self.bad = not self.bad
            if self.bad or (plan.loss and r.random() < plan.loss):
                continue
            if plan.queue:
                speed, room = plan.queue
                if (self.busy_until - world.now) * speed > room:
                    continue
                self.busy_until = max(self.busy_until, world.now) + len(data) / speed
            if plan.damage and r.random() < plan.damage:
                data = self._damaged(data)
            elif plan.fault == "forged" and r.random() < 0.05:
                data = self._forged(data)
            if plan.twice and r.random() < plan.twice:
                world.at(delay + r.random() * plan.jitter, self.receiver.come, [data])
            if plan.late and r.random() < plan.late:
                world.at(delay + r.choice([0.01, 0.1, 1]), self.receiver.come, [data])
            elif plan.jitter:
                world.at(delay + r.random() * plan.jitter, self.receiver.come, [data])
            else:
                together.append(data)
        if together:
            world.at(delay + max(0, self.busy_until - world.now), self.receiver.come, together)

    def _damaged(self, data):
        """In a way that the receiver can tell, now or by a digest: the base protocol has but a sum, and of the payload alone."""
        r, header = world.random, kmcast.PACKET.size
        what, compat = r.random(), self.plan.compat
        if what < 0.3:
            return data[:r.randrange(len(data))]
        if what < 0.4:
            return data + b"\0" * 4
        if what < 0.5 and not compat:
            return FOREIGN
        if what < 0.7 and not compat:           # of another session: right but for its salt
            seq, _, size = kmcast.PACKET.unpack_from(data)
            other, number = bytes(byte ^ 0x55 for byte in data[header:]), 12345 + seq & 0xffffffff
            checksum = number if self.plan.has_digest else kmcast.zlib.crc32(other, number)
            return kmcast.PACKET.pack(seq, checksum, size) + other
        place = r.randrange(4 if compat else 0, len(data))
        return data[:place] + bytes([data[place] ^ 1 << r.randrange(8)]) + data[place + 1:]


    @staticmethod
    def _forged(data):
        """In a way that its checksum does not tell."""
        place = world.random.randint(kmcast.PACKET.size, max(kmcast.PACKET.size, len(data) - len(UNSEEN)))
        end = place + len(UNSEEN)
        return data[:place] + bytes(a ^ b for a, b in zip(data[place:end], UNSEEN)) + data[end:]


class Receiver(File):
    """A kmcast.DatagramReceiver."""

    def __init__(self, _local_ip, group, port, _payload, _way="auto", source=None):
        world.call()
        File.__init__(self)
        self.source = source                    # from whom datagrams are taken; None: from anybody
        self.first = self.last = 0.0            # when the first and the last message of a call came
        self.in_first = 0                       # datagrams in the first
        self.process = world.process
        self.plan = self.process.plan
        self.process.install(self)
        self.way, self.socket_buffer = "simulated", self.plan.socket_buffer * 1500
        self.air = Air(self.plan, self)
        self._waiting, self._dropped = [], 0    # (datagram, when it came)
        self._group = world.groups.setdefault((group, port), [])
        self._group.append(self)

    def events(self):
        return POLLIN if self._waiting else 0

    def come(self, datagrams):
        """Datagrams come out of the air."""
        if self.fd >= 0:
            room = self.plan.socket_buffer - len(self._waiting)
            self._waiting += [(data, world.now) for data in datagrams[:room]]
            self._dropped += max(0, len(datagrams) - room)
            self.changed()

    def receive(self, aim=None):
        """What has arrived, some of it joined, as the kernel does it; None if nothing has.

        aim: as of the real one. The first message then goes straight to where it should, if it was joined.
        """
        world.call()
        if not self._waiting:
            return None
        batches, r, header = [], world.random, kmcast.PACKET.size
        some, self._waiting = self._waiting[:200], self._waiting[200:]
        self.first, self.in_first, i = some[0][1], 0, 0
        while i < len(some):
            size, start = len(some[i][0]), i
            i += 1
            while i < len(some) and len(some[i][0]) == size and i - start < 40 and r.random() < 0.9:
                i += 1
            self.last = some[start][1]
            self.in_first = self.in_first or i
            if not start and i > 1 and aim and r.random() < 0.7:
                self._waiting = some[i:] + self._waiting
                return self._receive_in_place([data for data, _ in some[:i]], *aim)
            if size > header:
                batches.append((bytearray(b"".join(data for data, _ in some[start:i])), 0, i - start, size - header))
        return batches

    @staticmethod
    def _receive_in_place(datagrams, buffer, first):
        """Datagrams of one size, one of which the kernel scatters over header and payload of packets, as recvmsg(2) does."""
        header, size = kmcast.PACKET.size, len(datagrams[0])
        headers, data, at = bytearray(len(buffer.headers)), b"".join(datagrams), 0
        for index in range(first, min(buffer.capacity, first + kmcast.MOST_SEGMENTS)):
            for where, width in ((headers, header), (buffer.payloads, buffer.payload)):
                piece = data[at:at + width]
                where[index * width:index * width + len(piece)] = piece
                at += len(piece)
        if size in (buffer.slot, len(data)) and buffer.in_place(headers, first, len(datagrams), len(data)):
            return [(buffer, first, len(datagrams), buffer.payload)]
        return [(bytearray(data), 0, len(datagrams), size - header)] if size > header else []

    def overflows(self):
        """Datagrams for which there was no room."""
        return self._dropped

    def shut(self):
        self._group.remove(self)

    vanish = shut


class Sender(File):
    """A kmcast.DatagramSender: an interface of some speed, with a queue."""

    QUEUE = 0.002                           # seconds

    def __init__(self, _local_ip, group, port, *_args, **_options):
        world.call()
        File.__init__(self)
        self.plan = world.process.plan
        self.mtu = self.plan.payload + kmcast.PACKET.size + kmcast.UDP_OVERHEAD
        self.way, self.trouble = "simulated", None
        self.sock = self
        self._name = world.process.address, world.random.randrange(20000, 60000)
        self._group = group, port
        self._busy_until = 0.0
        world.process.install(self)

    def events(self):
        return POLLOUT if self._busy_until - world.now < self.QUEUE else 0

    def getsockname(self):
        """Where the datagrams come from."""
        return self._name

    def most(self, _slot):
        """How many packets a call takes."""
        return 64

    def send(self, buffer, first, last):
        """Send packets of a Buffer from index first up to last; returns the index after the last one sent."""
        world.call()
        if not self.events():
            return first
        queued = max(0, self._busy_until - world.now)
        room = int((self.QUEUE - queued) * self.plan.line / buffer.slot)
        last = min(last, first + max(1, min(self.most(buffer.slot), room)))
        if self.plan.refused and 0 <= world.now - self.plan.refused[0] < self.plan.refused[1]:
            self.trouble = os.strerror(errno.EPERM)
            return last
        datagrams = [buffer.packet(index) for index in range(first, last)]
        world.say("=> %d packets from %d on, seq 0x%x", last - first, first, buffer.base + first)
        if self.plan.shared:
            datagrams = [data for data in datagrams if world.random.random() >= self.plan.shared]
        for receiver in world.groups.get(self._group, ()):
            if receiver.source in (None, self._name):
                receiver.air.send(datagrams, queued)
        self._busy_until = world.now + queued + sum(map(len, datagrams)) / self.plan.line
        if not self.events():
            world.at(self._busy_until - world.now - self.QUEUE + 1e-6, self.changed)
        return last


# ---------------------------------------------------------------------------------------------------------------------
# The ends of the image

class Source(File):
    """A kmcast.Source: what makes the image, with pauses; it is hashed by the real Hasher, if there is one."""

    name, path, drained = "image", None, False

    def __init__(self, _path=None, _command=None, digest=True, _spool=None):
        File.__init__(self)
        self.plan = world.process.plan
        self.again = self.plan.again
        self.size = len(self.plan.image) if self.plan.size_known else None
        self.bytes = self._at = self._hashed = 0
        self._digest, self._hasher = digest, None
        self._again = 0.0                       # when there is more
        world.process.install(self)

    def events(self):
        return POLLIN if world.now >= self._again else 0

    def image(self):
        """What names it."""
        return hashlib.sha256(self.plan.image).hexdigest()[:32]

    def start(self):
        """All is well here."""
        if self._digest:
            self._hasher = kmcast.Hasher()
            kmcast.start_thread(self._hasher)

    def seek(self, place):
        """Read on from there."""
        if place != self._at and not self.again or place > self.bytes:
            raise Finding("the server goes to byte %d of an image of which it has read %d" % (place, self.bytes))
        self._at = place

    def read_into(self, view):
        """Some bytes of the image; None while it pauses."""
        world.call()
        plan, r = self.plan, world.random
        if world.now < self._again:
            return None
        if r.random() < plan.pauses:
            pause = r.random() * plan.pause
            self._again = world.now + pause
            world.at(pause, self.changed)
            return None
        if plan.server_fault == "source" and world.now > plan.fault_at:
            world.process.fault = "source"
            raise kmcast.Failure("cannot read the image: %s" % os.strerror(errno.EIO))
        stop = self.bytes if self._at < self.bytes else len(plan.image)
        data = plan.image[self._at:min(stop, self._at + r.randint(1, len(view)))] if len(view) else b""
        view[:len(data)] = data
        self._at += len(data)
        self.bytes = max(self.bytes, self._at)
        return len(data)

    def hash(self, view):
        """Bytes of the image are there; those that are for the first time are hashed."""
        if self._hasher and self._hashed < self._at:
            self._hashed = self._at
            self._hasher.give(view)

    def look(self):
        """There is no command to look at."""

    def digest(self, parts=None):
        """SHA-256 of so many parts that were hashed, or of all."""
        return self._hasher.digest(parts) if self._hasher else b""

    def end(self):
        """Nobody reads on."""

    def close(self):
        """Stop reading."""
        File.close(self)
        if self._hasher:
            self._hasher.close()


class Disk:
    """What a host keeps of an image when its kmcast has ended: a part, and the journal, which is a real file."""

    def __init__(self):
        self.part, self.path, self.owner = bytearray(), os.path.join(world.folder(), "%d.journal" % id(self)), None

    def take(self, process):
        """A run with --resume begins; returns (part, Journal)."""
        self.owner = process
        if os.path.exists(self.path):
            journal = kmcast.Journal(self.path)
            journal.held.remove(len(self.part), 1 << 63)
            if journal.image and len(journal.held):
                return self.part, journal
            journal.close()
            os.unlink(self.path)
        self.part = bytearray()
        return self.part, kmcast.Journal(self.path, new=True)

    def harm(self, r):
        """The host went down: some of what was written last is not there, or somebody has changed it."""
        for _ in range(r.choice([0, 1, 3]) if self.part else 0):
            start = r.randrange(len(self.part))
            stop = min(len(self.part), start + r.randrange(1, 500))
            self.part[start:stop] = bytes(stop - start)
        if r.random() < 0.3:
            del self.part[r.randrange(len(self.part) + 1):]
        if os.path.exists(self.path) and r.random() < 0.5:
            os.truncate(self.path, r.randrange(os.path.getsize(self.path) + 1))


class Sink:
    """A kmcast.Sink: a disk of some speed, which may be full, or never end to write; or what takes it in order only."""

    journal = None

    def __init__(self, _path, _command, resume):
        self.process = world.process
        self.plan = self.process.plan
        self.seeks = self.plan.seeks
        self.resume = resume
        self.written = 0
        self._fate = None                       # as of the real one

    def open(self):
        """It can be written to."""
        disk = world.disks.setdefault(self.process.address, Disk())
        if self.resume and (disk.owner is None or disk.owner.dead):
            self.process.output, self.journal = disk.take(self.process)
            world.journals.append(self.journal)
        return self

    def expect(self, _size):
        """Whether there is room for so much."""
        if self.plan.fault == "room":
            self.process.fault = "room"
            raise kmcast.Failure("no room for the image", kmcast.NOT_STARTED)

    def start(self):
        """The first data is coming."""
        world.call()
        self.process.opened = True

    def write(self, data, place):
        """Write all of a memoryview, in parts that take time; it must stay as it is meanwhile."""
        process, plan = self.process, self.plan
        if not self.seeks and place != len(process.output):
            raise Finding("%s writes byte %d behind byte %d" % (process, place, len(process.output)))
        process.wrote = True
        while len(data):
            if plan.fault == "stuck" and world.now > plan.at:
                process.fault = "stuck"
                self._busy(None)
            part = world.random.randint(1 + len(data) // 3, len(data)) if plan.chunk else len(data)
            if plan.fault == "full" and self.written + part > plan.full_at:
                process.fault = "full"
                raise kmcast.Failure("cannot write the image: %s" % os.strerror(errno.ENOSPC))
            self._busy(plan.chunk + part / plan.write_rate)
            process.output.extend(bytes(max(0, place - len(process.output))))
            process.output[place:place + part] = data[:part]
            self.written += part
            place, data = place + part, data[part:]

    def read_into(self, view, place):
        """Read back some of what was written."""
        world.call()
        data = self.process.output[place:place + world.random.randint(1, len(view))]
        view[:len(data)] = data
        return len(data)

    def start_over(self):
        """Nothing that was written counts."""
        del self.process.output[:]

    def _busy(self, seconds):
        self.process.in_output = True
        world.call()
        world.wait([], seconds)
        self.process.in_output = False

    def look(self):
        """There is no command to look at."""

    def abandon(self):
        """Whether the image can still be given up; then it will not be committed."""
        self._fate = self._fate or "discard"
        return self._fate == "discard"

    def commit(self, size):
        """Make it so."""
        del self.process.output[size:]
        self._busy(self.plan.commit)
        self._fate = self._fate or "commit"
        if self._fate != "commit":
            raise kmcast.Failure("stopped")
        self.process.committed = True
        self.process.output = bytes(self.process.output)
        if self.journal:
            os.unlink(self.journal.path)

    def end(self):
        """Unless it was committed, it will not be."""
        self.abandon()

    def close(self):
        """The same, and nothing is held open any more."""
        self.abandon()
        if self.journal:
            self.journal.close()


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what must hold

def judge_at_will(share):
    """A Course._judge that sets somebody aside in such a share of the rounds."""
    def judge_somebody(course, goodput, _seconds, _now):
        those = sorted((member for member in course._cohort if course._others(member) and not member.sentence), key=str)
        if those and course.roster.again and world.random.random() < share:
            course._set_aside(world.random.choice(those), goodput)
    return judge_somebody


class Run:
    """One transfer."""

    def __init__(self, seed, trace=False):
        global world
        self.plan = plan = Plan(seed)
        world = World(seed, trace)
        world.watch = self.watch
        kmcast.Buffer.live.clear()
        kmcast.Connection.live.clear()
        kmcast.Course.FIRST_SEQ = plan.first_seq
        kmcast.AT_A_TIME = plan.at_a_time
        kmcast.Course._judge = judge_at_will(plan.whims) if plan.whims else judge
        self.window = 1 if plan.compat else max([plan.window] + [client.window for client in plan.clients])
        self.server = Process("server", "server", SERVER, plan, plan.arguments())
        self.clients = [Process("client-%d" % number, client.host, client.address, client, client.arguments())
                        for number, client in enumerate(plan.clients, 1)]
        world.firewalls.update((client.address, client.firewall) for client in plan.clients if client.firewall)
        world.damage_goes_round = not plan.compat and any(
            client.damage or client.fault in ("forged", "babble") or client.babble for client in plan.clients)
        self.circle_since = None                # when clients were first seen to take from each other in a circle
        self.hosts = {}                         # address -> its processes
        for client in self.clients:
            self.hosts.setdefault(client.address, []).append(client)
        self.round = plan.capacity * (plan.payload + 12)            # bytes

    def run(self):
        """Raises Finding."""
        plan = self.plan
        world.at(plan.server_start, self.server.start)
        world.at(PATIENCE, self._operator)
        if plan.server_fault == "threads":
            self.server.most_threads = 2 + plan.digest
        elif plan.server_fault and plan.server_fault not in NO_EVENTS:
            world.at(plan.fault_at, self._fault, self.server, plan.server_fault, 0.3)
        if plan.restart:
            world.at(plan.fault_at + plan.restart, self._restart)
        for number, start in enumerate(plan.strangers):
            world.at(start, Stranger("stranger", "stranger", "10.0.2.%d" % number, plan.clients[0], []).start)
        for number, (start, client) in enumerate(plan.relay_strangers):
            stranger = Stranger("stranger", "stranger", "10.0.3.%d" % number, plan.clients[0], [])
            stranger.where, stranger.says = (client.address, PORT), bytes(world.random.choice([0, 5, 20, 300]))
            world.at(start, stranger.start)
        for client in self.clients:
            for when, seen in client.plan.breaks:
                world.at(when, self._break, client, seen)
            world.at(client.plan.start, client.start)
            if client.plan.restart:
                world.at(client.plan.start + client.plan.restart, self._look_for_the_ended, client, 2)
            if client.plan.fault == "threads":
                client.most_threads = 1
            elif client.plan.fault and client.plan.fault not in NO_EVENTS:
                world.at(client.plan.start + client.plan.at, self._fault, client, client.plan.fault, client.plan.freeze)
        try:
            world.ends.holds = lambda: self.server.ended and all(client.ended for client in self.clients)
            world.wait([(world.ends, POLLIN)])
            self.watch()
        finally:
            world.tear_down()
            world.clear()
        self.verdict()

    def _look_for_the_ended(self, client, left):
        """A client with --resume is started again when it has ended without the image."""
        if client.ended and not client.hung and not client.committed and not self.server.ended and left:
            disk = world.disks.get(client.address)
            if client.plan.harm and disk and disk.owner is client:
                disk.harm(world.random)
            world.powerless.discard(client.address)
            again = Process(client.name + "+", client.host, client.address, client.plan, client.arguments)
            self.clients.append(again)
            self.hosts[client.address].append(again)
            again.start()
            client, left = again, left - 1
        if left and not world.over:
            world.at(client.plan.restart, self._look_for_the_ended, client, left)

    def _operator(self):
        """Whoever started the server sees that nobody comes."""
        if not self.server.ended and not (self.server.job and self.server.job.roster.begun):
            self.server.fault = "stop"
            self.server.interrupt("SIGTERM")

    def _restart(self):
        """Another server is started on the same file; if the first one is gone."""
        if self.server.dead and self.server.code is None and not all(client.ended for client in self.clients):
            self.server = Process("server-2", "server", SERVER, self.plan, self.plan.arguments())
            self.server.start()
            world.at(PATIENCE, self._operator)

    @staticmethod
    def _break(client, seen):
        """Its connection to the server breaks, of which the server's kernel may learn only by and by."""
        for sock in client.connections() if not client.dead else ():
            if sock.remote[0] == SERVER:
                world.say("BREAK: %s", client)
                sock.input._end("broken")
                if seen:
                    sock.output.reset()
                else:
                    sock.output.sink.doubt(world.now)

    @staticmethod
    def _fault(process, fault, seconds):
        """Something goes wrong with a process."""
        if process.dead:
            return
        world.say("FAULT: %s %s", process, fault)
        if fault == "freeze":
            return process.freeze(seconds)
        process.fault = fault
        if fault == "hang":
            process.freeze(1e9)
        elif fault == "stop":
            process.interrupt("SIGTERM")
        elif fault == "babble":
            for i in range(5):
                world.at(i * world.random.random(), process.babble)
        else:
            if fault == "reset":
                for sock in process.connections():
                    sock.output.reset()
            process.kill("is killed", silently=fault == "power")

    # ---- what must hold at any time; looked at now and then

    def watch(self):
        """Raises Finding."""
        server = self.server
        for connection in list(kmcast.Connection.live):
            most = (1 + self.window) * self.round + 4096
            if connection.outgoing.size > most or connection.incoming.size > most + 65536:
                raise Finding("memory: %d bytes are queued for %s, and %d are not understood" % (
                    connection.outgoing.size, connection.address, connection.incoming.size))
        buffers = collections.Counter(buffer.made_by for buffer in list(kmcast.Buffer.live))
        for process, count in buffers.items():
            if count > BUFFERS + 2 * (1 if self.plan.compat else process.plan.window):
                raise Finding("memory: %d buffers of %s" % (count, process))
        self._look_for_circles()
        if server.ended:
            for client in self.clients:
                patience = AFTERLIFE if client.plan.stall else AFTERLIFE + RETRANSMISSIONS
                if not client.ended and world.now > max(server.ended_at, client.plan.start) + patience:
                    raise Finding("%s waits for a server that is gone" % client)
        elif server.job and world.now > server.frozen_until + GONE:
            for member in server.job.roster.here:
                processes = self.hosts[member.address]
                if len(processes) == 1 and processes[0].ended and processes[0].far.told_at and not processes[0].plan.breaks:
                    if world.now > processes[0].far.told_at + GONE:
                        raise Finding("the server still counts on %s, which is gone" % processes[0])

    def _look_for_circles(self):
        """Who follows whom may be out of date for a moment, but not for longer."""
        upstreams = {}
        for client in self.clients:
            relay = client.job and client.job.relay
            alone = len(self.hosts[client.address]) == 1
            if relay and alone and not client.ended and relay.upstream_place:
                upstreams[client.address] = relay.upstream_place[0]
        for address in upstreams:
            seen, at = set(), address
            while at in upstreams and at not in seen:
                seen.add(at)
                at = upstreams[at]
            if at in seen:
                self.circle_since = self.circle_since or world.now
                frozen = max(process.frozen_until for process in self.clients + [self.server])
                if world.now > max(self.circle_since, frozen) + 5:
                    raise Finding("clients follow each other in a circle: %s" % upstreams)
                return
        self.circle_since = None

    # ---- and at the end

    def verdict(self):
        """Raises Finding."""
        server = self.server
        roster = server.job.roster if server.job else None
        members = {}                            # address -> Member
        for member in roster.everyone if roster else ():
            # Of a host with several outputs each takes part; so does who has lost what tells its output from others.
            if member.address in members and len(self.hosts[member.address]) == 1:
                raise Finding("%s takes part twice" % member)
            if member.address not in members or member.outcome == "complete":
                members[member.address] = member
        said = dict((address, member.outcome) for address, member in members.items())
        refused = [address for (_, address), _ in roster.refused] if roster else []
        for client in self.clients:
            self._judge_client(client, client.address in said or bool(self.plan.restart))
            told = "the server says" in (client.reason or "")
            disturbed = client.plan.fault or client.plan.breaks or server.fault or len(self.hosts[client.address]) > 1
            if client.address in refused and client.code == kmcast.NOT_STARTED and not told and not disturbed:
                raise Finding("%s was refused, and knows only: %s" % (client, client.reason))
        for address, processes in self.hosts.items():
            if address in said:
                self._judge_host(processes, said[address])
        if server.code is not None and not server.fault:
            served = [member.outcome for member in roster.everyone].count("complete")
            refused = roster.refused or [client for client in self.clients if said.get(client.address) != "complete"
                                         and (client.reason or "").startswith("the server says: refused: " + kmcast.LATE)]
            whole = served >= self.plan.places and served == len(roster.everyone) and not refused
            code = kmcast.OK if whole else kmcast.PARTLY if served else kmcast.FAILED
            if server.code != code:
                raise Finding("the server exits with %d instead of %d" % (server.code, code))
            if not server.job.failure and None in said.values():
                raise Finding("a client has no outcome: %s" % said)

    def _judge_client(self, client, takes_part):
        plan, code = self.plan, client.code
        if client.committed and bytes(client.output) != plan.image:
            raise Finding("%s has a wrong image, and takes it for right" % client)
        if code == kmcast.OK and not client.committed:
            raise Finding("%s says that it has the image, and has not" % client)
        if client.committed and code not in (kmcast.OK, None):
            raise Finding("%s has the image, and says: %s" % (client, client.reason))
        if code == kmcast.NOT_STARTED and (client.opened or client.wrote):
            raise Finding("%s says that nothing was written, and something was" % client)
        if self.plan.has_digest and not plan.image.startswith(client.output) and not client.plan.seeks:
            raise Finding("%s writes what was not verified" % client)
        if code == kmcast.USAGE:
            raise Finding("%s: wrong usage: %s" % (client, client.reason))
        if not takes_part and code not in (kmcast.NOT_STARTED, None):
            raise Finding("%s does not take part, and exits with %s: %s" % (client, code, client.reason))

    def _judge_host(self, processes, said):
        plan, server = self.plan, self.server
        good = [client for client in processes if client.committed]
        reasons = "; ".join("%s: %s" % (client, client.reason) for client in processes)
        liar = any(client.fault == "babble" for client in processes)
        if said == "complete" and not good and not liar:
            raise Finding("the server says that it has the image, and it has not: %s" % reasons)
        innocent = not any(client.plan.fatal or client.plan.breaks for client in processes) and not server.fault
        if plan.min_rate and said and said.startswith("alone it kept"):
            innocent = False
        if not plan.image and not plan.allow_empty:
            innocent = False
        if innocent and not good:
            raise Finding("did nothing wrong, and has not got the image: %s; the server says: %s"
                          % (reasons, said or server.reason))
        if innocent and said != "complete":
            raise Finding("%s has the image, and the server says: %s" % (good[0], said or server.reason))
        if innocent and len(processes) == 1 and processes[0].plan.hears_all(plan):
            # Greetings, a round's messages, a sign of life a second, and some repairs for the worst of orders.
            rounds = 8 + len(plan.image) // (plan.payload * plan.capacity)
            most = 2000 + 200 * rounds + 100 * world.now + len(plan.image) // 10
            if processes[0].far.output.accepted > most:
                raise Finding("%s loses nothing, and %d bytes come by TCP, of an image of %d" % (
                    processes[0], processes[0].far.output.accepted, len(plan.image)))


def one(seed, trace=False):
    """Run a seed; returns None, or what was found."""
    global world
    try:
        signal.signal(signal.SIGALRM, lambda *args: world and world.overdue())
        signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
        Run(seed, trace).run()
    except Finding as error:
        return "seed %d: %s" % (seed, error)
    except Exception:                           # whatever it is, it is one
        return "seed %d: %s" % (seed, traceback.format_exc().strip())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        world = None
    return None


def many(seeds, path=KMCAST, until_found=False):
    """Run seeds, or only up to the first finding; returns what was found."""
    if kmcast is None or kmcast.__file__ != path:
        load(path)
    return list(itertools.islice(filter(None, map(one, seeds)), 1 if until_found else None))


def settle(number):
    """A process that runs seeds stays on one processor: passing the baton there costs a fourth."""
    threading.stack_size(256 << 10)
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        with number.get_lock():
            os.sched_setaffinity(0, {cpus[number.value % len(cpus)]})
            number.value += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, help="replay this one, with every message")
    parser.add_argument("--until-found", action="store_true", help="stop at the first finding")
    parser.add_argument("--kmcast", type=os.path.abspath, default=KMCAST, help="the kmcast.py to test")
    options = parser.parse_args()
    number = multiprocessing.Value("i", os.getpid())            # so that two of these begin with different processors
    if options.seed is not None:
        settle(number)
        load(options.kmcast)
        found = one(options.seed, trace=True)
        print(found or "nothing was found")
        return 1 if found else 0
    began, size, findings = time.time(), 20, 0
    last = options.first + options.seeds
    parts = [range(start, min(start + size, last)) for start in range(options.first, last, size)]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, initializer=settle, initargs=(number,)) as pool:
        for found in pool.map(many, parts, itertools.repeat(options.kmcast), itertools.repeat(options.until_found)):
            findings += len(found)
            for text in found:
                print(text, flush=True)
            if found and options.until_found:
                for process in list(pool._processes.values()):
                    process.terminate()
                break
    print("%d seeds from %d on, %d findings, %.0f s" % (options.seeds, options.first, findings, time.time() - began))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
