#!/usr/bin/env python3
"""Transfers in which much goes wrong at once, chosen at random, and what must hold at the end of each all the same.

    python3 tests/chaos.py --runs 1000 --jobs 4             # seeds 0 to 999
    python3 tests/chaos.py --seed 17 --runs 1 -v            # one again, with its plan and all that was said
    KMCAST_PYTHONS=/usr/bin/python2.7:/usr/bin/python3 python3 tests/chaos.py       # with these interpreters, mixed

A run is a server and some clients, real processes over loopback. Its seed alone decides its Plan: the image and where
it comes from, the options, where the clients' output goes, and the faults: signals, kills, stops, pulled cables, losses
of datagrams, full disks, commands that fail, consumers that stop, strangers, clients that come too late, go too early,
or are too many. Timing is the machine's, so a seed does not always find again what it found once.

What is checked is what the manual promises whatever happens; see Judge. A finding shows its seed, the plan, what was
violated, what was done when, and the stderr of all processes. Exit code: 0 nothing was found, 1 something was, 2 wrong
usage.

It runs as an ordinary user. Root has small disks that fill up (in a mount namespace of the run); others have a limit of
file size.
"""

import argparse
import collections
import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import helpers
import wire
from helpers import LOOPBACK

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36        # prctl(2)
CLONE_NEWNS = 0x20000                                   # unshare(2)
DISK = 16384                # bytes, the least size of a small disk; its filesystem counts in pages

STALL = {False: 30, True: 15}                           # seconds, without --stall-timeout; True: with --compat
WAIT = 5                    # seconds, --wait of every client
QUIET = 2                   # seconds in which nothing happens, until a server that has not started is given up
SLACK = 60                  # seconds that a run may take beyond all that it has to wait for
MOMENT = 2                  # seconds for the command of a process that has ended to end as well
TURN, LONG_TURN = 0.003, 0.2        # seconds between looks, and between those that cost more

#: What the processes say, by which we know how far they are (server and clients are given -v).
CONNECTED, BEGUN, SERVED = "connected to", "sending from the interface", "has everything"
#: What a signal may leave that comes while a socket or a file is being opened: the process ends, and closes it.
OPENED = re.compile(r"Exception ignored in: <(socket|_io).*\n(Traceback.*\n(  .*\n)*)?ResourceWarning: unclosed .*\n")
#: What no process may ever say; helpers.start_kmcast() has the newest Python treat warnings as errors.
NEVER = ("Traceback", "internal error", "Exception ignored", "ResourceWarning", "Fatal Python error")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HARMLESS = (signal.SIGUSR1, signal.SIGUSR2)


# ---------------------------------------------------------------------------------------------------------------------
# The plan

class Moment(collections.namedtuple("Moment", "mark delay")):
    """When something happens: `delay` seconds after `mark`.

    The marks: "zero"; "started" or "connected" and the name of a process; "begun": the transfer; "served": a client has
    everything, or has ended.
    """

    def __str__(self):
        return "%.3f s after %s" % (self.delay, self.mark)


class Fault(collections.namedtuple("Fault", "moment who what parameter")):
    """Something that happens: at a Moment, to whom (the name of a process, or "stranger"), what, and its parameter.

    "signals"   [(seconds after the one before, signal), ...]
    "unplug"    seconds, or None: for good
    a stranger's are the keys of SAYINGS, with (seconds until it goes, "FIN" or "RST")
    """

    @property
    def signals(self):
        return [number for _, number in self.parameter] if self.what == "signals" else []


class ClientPlan(object):
    """What a client is to do.

    moment  when it starts
    output  one of OUTPUTS; amount: seconds or bytes, as it says there
    old     whether there is a file of the name of its -o
    stall   --stall-timeout; datagrams: --datagrams
    loss    percent of the datagrams to it
    cable   whether its cable will be pulled
    """

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __str__(self):
        return ", ".join("%s %s" % (name, value) for name, value in sorted(self.__dict__.items())
                         if value and name not in ("name", "moment"))


#: Where the output of a client goes: how likely, and whether it can take the image whole.
OUTPUTS = {
    "-o FILE": (30, True),
    "stdout, read at once": (16, True),
    "stdout, read slowly": (8, True),               # in `amount` seconds in all
    "stdout, read in part": (6, False),             # `amount` bytes, and no more until all others have ended
    "stdout, closed in the middle": (6, False),     # after `amount` bytes
    "--pipe": (12, True),
    "--pipe, slow to end": (5, True),               # by `amount` seconds
    "--pipe, fails at once": (3, False),
    "--pipe, fails in the middle": (3, False),      # after `amount` bytes
    "--pipe, fails at the end": (3, False),
    "-o /dev/full": (3, False),
    "stdout to /dev/full": (3, False),
    "-o FILE on a small disk": (8, False),          # of `amount` bytes, or so much more as a disk has at the least
}

#: Where the image comes from: how likely, and whether it comes whole.
SOURCES = {
    "stdin, a pipe": (25, True),
    "stdin, a file": (8, True),
    "-i FILE": (20, True),
    "--pipe": (14, True),
    "stdin, a pipe that pauses": (10, True),        # for `amount` seconds
    "--pipe that pauses": (6, True),
    "--pipe that pauses for long": (4, True),
    "--pipe that fails": (13, False),               # after `amount` bytes
}

#: What a stranger says, who then hears nothing.
SAYINGS = {
    "nothing": b"",
    "garbage": helpers.random_bytes(300),
    "half a HELLO": wire.hello()[:20],
    "HELLO": wire.hello(),
}


def pick(generator, weights):
    """One of the keys of a dict, by weight (a number, or a tuple that begins with it)."""
    shares = [value[0] if isinstance(value, tuple) else value for value in weights.values()]
    return generator.choices(list(weights), shares)[0]


class Plan(object):
    """All that is decided about a run, by its seed alone."""

    def __init__(self, seed):
        self.seed = seed
        self._dice = dice = random.Random(seed)
        most = pick(dice, {0: 8, 3000: 18, 100000: 32, 1000000: 28, 4000000: 14})
        self.size = dice.randint(1, most) if most else 0
        self.allow_empty = dice.random() < (0.6 if not self.size else 0.05)
        self.source = pick(dice, SOURCES)
        self.half = dice.randint(0, self.size)      # where a source pauses that does
        self.amount = {"stdin, a pipe that pauses": round(dice.uniform(0.1, 1.5), 2),
                       "--pipe that pauses": round(dice.uniform(0.1, 1.5), 2),
                       "--pipe that pauses for long": round(dice.uniform(MOMENT, 2 * MOMENT), 2),
                       "--pipe that fails": dice.choice((0, dice.randint(0, self.size), self.size))}.get(self.source, 0)
        self.seconds = dice.uniform(0.2, 2)         # that the image takes at least, as far as --rate decides
        self.places = pick(dice, {1: 20, 2: 25, 3: 25, 4: 15, 5: 15})
        self.server_delay = round(dice.uniform(0.1, 0.6), 2) if dice.random() < 0.2 else 0
        self.server_python = dice.choice(("oldest", "newest"))
        self.compat = dice.random() < 0.12
        self.start_wait = round(dice.uniform(0.5, 2.5), 1) if dice.random() < 0.25 else None
        self.min_clients = dice.randint(1, self.places) if self.start_wait else None
        self.stall = dice.choice((1, 2, 3)) if dice.random() < 0.5 else None        # the server's --stall-timeout
        self.options = self._server_options()
        self.clients = [self._client("client %d" % number) for number in range(1, self.places + 1)]
        self.faults = []
        for _ in range(pick(dice, {0: 10, 1: 30, 2: 30, 3: 18, 4: 12})):
            pick(dice, {self._signal: 34, self._kill: 14, self._stop: 14, self._unplug: 10, self._stranger: 12,
                        self._passer: 8, self._extra: 5, self._late: 5})()
        self._shorten_stalls()
        del self._dice

    def _server_options(self):
        dice, options = self._dice, []
        self.per_thread = dice.randint(1, 3) if dice.random() < 0.5 else None
        kind = pick(dice, {"fixed": 76, "auto": 14, "max": 10})
        options += ["--rate", "%dk" % max(1, self.size * 8 / self.seconds / 1000) if kind == "fixed" else kind]
        if dice.random() < 0.4:                     # not so few that the rounds alone would take long
            options += ["--buffer-packets", max(dice.randint(1, 64), self.size // 1460 // 100)]
        for option, likely in (("--unicast", 0.1), ("--no-digest", 0.12)):
            if dice.random() < likely:
                options += [option]
        if dice.random() < 0.2:
            options += ["--datagrams", dice.choice(("plain", "mmsg", "gso"))]
        return options

    def _client(self, name, moment=None):
        dice = self._dice
        output = pick(dice, OUTPUTS)
        amount = 0
        if output in ("stdout, read slowly", "--pipe, slow to end"):
            amount = round(dice.uniform(0.3, 2 * MOMENT), 2)
        elif "part" in output or "middle" in output or "small" in output:
            amount = dice.randint(0, self.size)
        return ClientPlan(
            name=name, output=output, amount=amount, cable=False,
            moment=moment or Moment("zero", round(dice.uniform(0, 0.8), 2)),
            python=dice.choice(("oldest", "newest")), old=dice.random() < 0.3,
            stall=dice.choice((1, 2, 3)) if dice.random() < 0.3 else None,
            datagrams=dice.choice(("plain", "mmsg", "gso")) if dice.random() < 0.2 else None,
            loss=round(dice.choice((0.1, 1, 5, 30)) * dice.uniform(0.5, 1), 2) if dice.random() < 0.2 else 0)

    # --- faults

    def _whom(self):
        return "server" if self._dice.random() < 0.3 else self._dice.choice(self.clients).name

    def _moment(self, who):
        """Some time in the life of a process: while it starts, is there, works, or ends."""
        dice = self._dice
        mark = pick(dice, {"started": 20, "connected": 10, "begun": 40, "served": 30})
        if mark in ("started", "connected"):
            whose = dice.choice(self.clients).name if who in ("server", "stranger") and mark == "connected" else who
            return Moment("%s %s" % (mark, "server" if whose == "stranger" else whose), round(dice.uniform(0, 0.7), 3))
        if mark == "begun":
            return Moment(mark, round(dice.uniform(0, 1.3 * self.seconds), 3))
        return Moment(mark, round(dice.choice((0, 0.05, 0.5)) * dice.random(), 3))

    def _add(self, what, parameter=None, who=None, moment=None):
        who = who or self._whom()
        self.faults.append(Fault(moment or self._moment(who), who, what, parameter))

    def _signal(self):
        """One signal, or two; the second soon enough to mean the same, or late enough to mean "at once"."""
        dice = self._dice
        if dice.random() < 0.25:
            self._add("signals", [(0, dice.choice(HARMLESS)) for _ in range(dice.randint(1, 2))])
            return
        signals = [(0, dice.choice(STOPPING))]
        if dice.random() < 0.4:
            gap = dice.uniform(1.1, 1.6) if dice.random() < 0.25 else dice.choice((0, 0.02, 0.3)) * dice.random()
            signals.append((round(gap, 3), dice.choice(STOPPING)))
        self._add("signals", signals)

    def _kill(self):
        self._add("signals", [(0, signal.SIGKILL)])

    def _stop(self):
        dice = self._dice
        signals = [(0, signal.SIGSTOP)]
        if dice.random() < 0.6:
            signals.append((round(dice.uniform(0.05, 4), 2), signal.SIGCONT))
        self._add("signals", signals)

    def _unplug(self):
        dice = self._dice
        client = dice.choice(self.clients)
        client.cable = True
        self._add("unplug", round(dice.uniform(0.1, 4), 2) if dice.random() < 0.5 else None, client.name)

    def _stranger(self):
        dice = self._dice
        for _ in range(dice.choice((1, 1, 2, 5))):
            self._add(dice.choice(sorted(SAYINGS)),
                      (round(dice.uniform(0, 3), 2), dice.choice(("FIN", "RST"))), "stranger")

    def _passer(self):
        """A client that comes before the start, and goes."""
        client = self._client("passer %d" % len(self.clients))
        self.clients.append(client)
        number = self._dice.choice(STOPPING + (signal.SIGKILL,))
        self._add("signals", [(0, number)], client.name,
                  Moment("connected " + client.name, round(self._dice.choice((0, 0.3)) * self._dice.random(), 3)))

    def _extra(self):
        self.clients.append(self._client("extra %d" % len(self.clients), self._moment("stranger")))

    def _late(self):
        client = self._dice.choice(self.clients)
        if self.start_wait and client.moment.mark == "zero":
            client.moment = Moment("begun", round(self._dice.uniform(0, self.seconds), 2))

    def _shorten_stalls(self):
        """Give all a short --stall-timeout where one of them will wait in vain."""
        if any(fault.what == "unplug" or signal.SIGSTOP in fault.signals for fault in self.faults) \
                or any(client.output == "stdout, read in part" for client in self.clients):
            self.stall = self.stall or self._dice.choice((1, 2, 3))
            for client in self.clients:
                client.stall = client.stall or self._dice.choice((1, 2, 3))

    # --- what follows from it

    @property
    def arguments(self):
        """The server's, but for the source."""
        options = self.options + ["--compat"] * self.compat + ["--allow-empty"] * self.allow_empty
        for option, value in (("--clients-per-thread", self.per_thread), ("--start-wait", self.start_wait),
                              ("--min-clients", self.min_clients), ("--stall-timeout", self.stall)):
            options += [option, value] if value is not None else []
        return options + [LOOPBACK, self.places]

    @property
    def longest(self):
        """Seconds after which whoever still runs hangs."""
        waits = [SLACK, self.seconds, WAIT, 2 * MOMENT, 10 * QUIET, self.start_wait or 0]
        waits += [self.stall or STALL[self.compat]]
        waits += [max(client.stall or STALL[self.compat] for client in self.clients)]
        waits += [client.amount for client in self.clients if "slow" in client.output]
        waits += [fault.parameter or 0 for fault in self.faults if fault.what == "unplug"]
        waits += [gap for fault in self.faults if fault.what == "signals" for gap, _ in fault.parameter]
        return sum(waits)

    @property
    def guests(self):
        """How many may want a place."""
        hellos = [fault for fault in self.faults if fault.who == "stranger" and (self.compat or fault.what == "HELLO")]
        return len(self.clients) + len(hellos)

    @property
    def whole(self):
        """Whether the image can be had."""
        return SOURCES[self.source][1] and (self.size > 0 or self.allow_empty)

    def __str__(self):
        lines = ["%d bytes from %s (%s)" % (self.size, self.source, self.amount),
                 "server: %.3f s after zero: %s, %s" % (self.server_delay, self.server_python,
                                                        " ".join(map(str, self.arguments)))]
        lines += ["%s: %s: %s" % (client.name, client.moment, client) for client in self.clients]
        lines += ["%s: %s: %s %s" % (fault.who, fault.moment, fault.what, fault.parameter) for fault in self.faults]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# A run

OLD = b"what was there before\n"


class Reader(threading.Thread):
    """Reads the standard output of a client: as its plan says, or at once; `data` is all that came.

    When `go_on` is set, it reads the rest at once.
    """

    def __init__(self, client, size):
        super().__init__(daemon=True)
        self.data = bytearray()
        self._pause = client.amount / max(1, size) if client.output == "stdout, read slowly" else 0     # seconds a byte
        self._closes = client.output == "stdout, closed in the middle"
        self._most = client.amount if self._closes or client.output == "stdout, read in part" else None
        self.go_on = threading.Event()
        self._end, end = os.pipe()
        self.stdout = os.fdopen(end, "wb")      # for the client, then to be closed
        self.start()

    def run(self):
        while True:
            if self._most is not None and len(self.data) >= self._most:
                if self._closes:
                    break
                self.go_on.wait()
                self._most = None
            chunk = os.read(self._end, 4096 if self._most is None else min(4096, self._most - len(self.data)))
            if not chunk:
                break
            self.data += chunk
            if self._pause:
                self.go_on.wait(self._pause * len(chunk))
        os.close(self._end)


class Held(object):
    """A socket from which nothing comes while the cable is pulled."""

    def __init__(self, sock, plugged):
        self._sock, self._plugged = sock, plugged

    def _call(self, function, *arguments):
        try:
            return function(*arguments)
        finally:
            self._plugged.wait()

    def accept(self):
        return self._call(self._sock.accept)

    def recv(self, size):
        return self._call(self._sock.recv, size)

    def shutdown(self, how):
        self._sock.shutdown(how)


class Cable(helpers.Network):
    """A client's own way to the server, at `port`, which loses datagrams and can be unplugged: then nothing passes."""

    def __init__(self, server_port, number, lose):
        """number: of the client; each has another."""
        self.plugged = threading.Event()
        self.plugged.set()
        super().__init__(server_port)
        # A Network numbers the groups of its own paths only, and no two clients' may be the same.
        self._paths += [("", lambda datagram: [])] * number
        self.port = self.path(lambda datagram: lose(datagram) if self.plugged.is_set() else [])

    def _accept(self, listener, group, change):
        super()._accept(Held(listener, self.plugged), group, change)

    def _pump(self, source, target, change):
        super()._pump(Held(source, self.plugged), target, change)

    def close(self):
        super().close()
        self.plugged.set()


class Actor(object):
    """The server or a client of a run: its process, and what was done to it.

    threads   the most that it was seen to have
    hits      the signals that it was sent while it ran: (seconds on the monotonic clock, number)
    cut       whether its cable was ever pulled
    frozen    stopped, and perhaps for good
    excluded  it was frozen, or hung, until the end of the run, and then killed
    """

    def __init__(self, name, plan=None):
        self.name, self.plan = name, plan
        self.process = self.reader = self.cable = None
        self.threads = 0
        self.hits = []
        self.cut = self.frozen = self.excluded = False
        self.ended = None

    @property
    def runs(self):
        return self.process is not None and self.process.popen.poll() is None

    @property
    def code(self):
        """The exit code; None if it never started, still runs, or was killed for the end of the run."""
        return None if self.process is None or self.excluded else self.process.popen.returncode

    @property
    def stderr(self):
        """What it has said until now. Not read through `.process`: that would move the offset at which it writes."""
        if not self.process:
            return ""
        fd = self.process._stderr.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")

    @property
    def touched(self):
        """Whether anything was done to it that may change how it ends."""
        return self.cut or self.excluded or any(number not in HARMLESS for _, number in self.hits)

    @property
    def killed(self):
        return self.excluded or any(number == signal.SIGKILL for _, number in self.hits)

    @property
    def output(self):
        """The name of the file that it is to make, in its folder; None if it makes none."""
        if self.plan.output == "-o FILE on a small disk":
            return "disk/out"
        return "out" if self.plan.output == "-o FILE" or self.plan.output.startswith("--pipe") else None

    @property
    def old(self):
        """Whether there was a file of that name."""
        return self.plan.old and self.plan.output.startswith("-o FILE")


class Run(object):
    """A run of a Plan."""

    def __init__(self, plan, folder, port):
        self.plan, self.folder, self.port = plan, folder, port
        self.image = helpers.random_bytes(plan.size, plan.seed)
        self.server = Actor("server")
        self.clients = [Actor(client.name, client) for client in plan.clients]
        self.actors = [self.server] + self.clients
        self.diary = []                         # lines of what was done when
        self.findings = []
        self._orphans = set()                   # process ids of those that others have left behind too long ago
        self._waiting = []                      # (Moment, function, its arguments)
        self._marks = {}                        # the mark of a Moment -> when that was
        self._said = 0                          # bytes of stderr, of all
        self._looked = 0                        # when we last did what costs more
        self._active = time.monotonic()         # when something last happened

    def play(self):
        """All of it, until every process has ended."""
        with open(self.path("image"), "wb") as file:
            file.write(self.image)
        os.mkdir(self.path("temporary"))
        self._marks["zero"] = time.monotonic()
        self._at(Moment("zero", self.plan.server_delay), self._start_server)
        for client in self.clients:
            self._at(client.plan.moment, self._start_client, client)
        for fault in self.plan.faults:
            self._at(fault.moment, self._strike, fault)
        deadline = time.monotonic() + self.plan.longest
        while self._goes_on():
            self._do_what_is_due()
            self._look()
            self._release_readers()
            self._operate()
            if time.monotonic() > deadline:
                self._end_those_that_hang()
                break
            time.sleep(TURN)
        for actor in self.actors:
            if actor.runs:                      # and frozen
                actor.excluded = True
                actor.process.stop()
        self._look()
        while self._look_for_orphans():
            time.sleep(TURN)
        for client in self.clients:
            if client.reader:
                client.reader.go_on.set()
                client.reader.join(MOMENT)
                if client.reader.is_alive():
                    self.findings.append("%s: somebody still holds its standard output open" % client.name)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def note(self, text):
        self._active = time.monotonic()
        self.diary.append("%7.3f %s" % (self._active - self._marks["zero"], text))

    # --- what happens when

    def _at(self, moment, function, *arguments):
        self._waiting.append((moment, function, arguments))

    def _do_what_is_due(self):
        now = time.monotonic()
        for entry in self._waiting[:]:
            moment, function, arguments = entry
            if moment.mark in self._marks and now >= self._marks[moment.mark] + moment.delay:
                self._waiting.remove(entry)
                function(*arguments)

    def _later(self, seconds, function, *arguments):
        self._at(Moment("zero", time.monotonic() - self._marks["zero"] + seconds), function, *arguments)

    def _mark(self, mark):
        if mark not in self._marks:
            self.note("-- " + mark)
            self._marks[mark] = self._active

    def _look(self):
        """See how far they are."""
        said = sum(os.fstat(actor.process._stderr.fileno()).st_size for actor in self.actors if actor.process)
        if said != self._said:
            self._said, self._active = said, time.monotonic()
            for client in self.clients:
                if CONNECTED in client.stderr:
                    self._mark("connected " + client.name)
            if BEGUN in self.server.stderr:
                self._mark("begun")
            if SERVED in self.server.stderr:
                self._mark("served")
        for actor in self.actors:
            if actor.process and not actor.ended and not actor.runs:
                self.note("%s ended with %d" % (actor.name, actor.process.popen.returncode))
                actor.ended = self._active
                if actor is not self.server and "begun" in self._marks:
                    self._mark("served")
        if time.monotonic() - self._looked > LONG_TURN:
            self._looked = time.monotonic()
            self._look_for_orphans()
            for actor in self.actors:
                if actor.runs:
                    actor.threads = max(actor.threads, len(os.listdir("/proc/%d/task" % actor.process.pid)))

    def _pending(self):
        """Whether something is still to come that a process may wait for."""
        return any(moment.mark in self._marks for moment, _, _ in self._waiting)

    def _goes_on(self):
        starts = any(moment.mark in self._marks and function in (self._start_server, self._start_client)
                     for moment, function, _ in self._waiting)
        return starts or any(actor.runs and not (actor.frozen and not self._thaws(actor)) for actor in self.actors)

    def _thaws(self, actor):
        return any(function == self._signal and arguments == (actor, signal.SIGCONT)
                   for _, function, arguments in self._waiting)

    def _release_readers(self):
        """A client may wait for its consumer for ever, even when all others have ended: so let those read on then."""
        reading = [client for client in self.clients if client.plan.output == "stdout, read in part"]
        others = [actor for actor in self.actors if actor not in reading and actor.runs and not actor.frozen]
        if not others and not self._pending():
            for client in reading:
                if client.reader and not client.reader.go_on.is_set():
                    self.note("what %s writes is read again" % client.name)
                    client.reader.go_on.set()

    def _operate(self):
        """End a server that waits for clients which will not come: for ever, as it should."""
        quiet = time.monotonic() - max(self._active, self._marks.get("started server", 0) + (self.plan.start_wait or 0))
        if "begun" in self._marks or quiet < QUIET or self._pending() or not self.server.runs or self.server.frozen:
            return
        here = [client for client in self.clients if client.runs and CONNECTED in client.stderr and not client.cut]
        if len(here) >= (self.plan.min_clients or self.plan.places):
            if quiet < 10 * QUIET:
                return
            self.findings.append("the server has not started, though these are there: %s" % ", ".join(
                client.name for client in here))
        self.note("the operator gives up")
        self._signal(self.server, signal.SIGTERM)

    def _end_those_that_hang(self):
        for actor in self.actors:
            if actor.runs and not (actor.frozen and not self._thaws(actor)):
                self.findings.append("%s still ran after %d s" % (actor.name, self.plan.longest))
                actor.excluded = True
                actor.process.signal(signal.SIGCONT)
                actor.process.signal(signal.SIGABRT)        # PYTHONFAULTHANDLER is set: prints where each thread is
                actor.process.wait(2)
                actor.process.stop()

    # --- starts

    def _start(self, actor, python, args, **options):
        # What it starts inherits its name, and where to leave temporary files.
        env = {"KMCAST_CHAOS": actor.name, "TMPDIR": self.path("temporary")}
        python = getattr(helpers, python)()
        # A start of its own: a child of the nursery has other processes in its group.
        actor.process = helpers.start_kmcast(args, python, program=helpers.compiled(python), env=env, **options)
        self._mark("started " + actor.name)

    def _start_server(self):
        plan, stdin, source = self.plan, None, []
        if plan.source == "stdin, a pipe":
            stdin = self.image
        elif plan.source == "stdin, a pipe that pauses":
            stdin = self._pausing()
        elif plan.source == "stdin, a file":
            stdin = open(self.path("image"), "rb")
        elif plan.source == "-i FILE":
            source = ["-i", "image"]
        else:
            pauses = "head -c %d image; sleep %s; tail -c +%d image" % (plan.half, plan.amount, plan.half + 1)
            fails = "head -c %s image; exit 3" % plan.amount
            source = ["--pipe", {"--pipe": "cat image", "--pipe that fails": fails}.get(plan.source, pauses)]
        args = ["server", "-v"] + source + plan.arguments + [self.port]
        self._start(self.server, plan.server_python, args, stdin=stdin, cwd=self.folder)
        if hasattr(stdin, "fileno"):
            stdin.close()

    def _pausing(self):
        yield self.image[:self.plan.half]
        time.sleep(self.plan.amount)
        yield self.image[self.plan.half:]

    def _start_client(self, client):
        plan, port, prefix = client.plan, self.port, []
        number = self.clients.index(client)
        folder = self.path(client.name)
        os.mkdir(folder)
        if plan.loss or plan.cable:
            client.cable = Cable(port, number, helpers.loss(plan.loss, self.plan.seed * 100 + number))
            port = client.cable.port
        if plan.output == "-o FILE on a small disk":
            prefix = self._small_disk(os.path.join(folder, "disk"), plan.amount)
        if client.old:
            with open(os.path.join(folder, client.output), "wb") as file:
                file.write(OLD)
        args = ["client", "-v", "--wait", WAIT]
        args += ["--stall-timeout", plan.stall] if plan.stall else []
        args += ["--datagrams", plan.datagrams] if plan.datagrams else []
        args += ["--allow-empty"] * (self.plan.compat and self.plan.allow_empty)    # else the server has the say
        if plan.output.startswith("--pipe"):
            args += ["--pipe", "touch began; " + {
                "--pipe": "cat > out",
                "--pipe, slow to end": "cat > out; sleep %s" % plan.amount,
                "--pipe, fails at once": "exit 3",
                "--pipe, fails in the middle": "head -c %d > out; exit 3" % plan.amount,
                "--pipe, fails at the end": "cat > out; exit 3"}[plan.output]]
        elif plan.output.startswith("-o"):
            args += ["-o", client.output or "/dev/full"]
        if plan.output == "stdout to /dev/full":
            stdout = open("/dev/full", "wb")
        else:
            client.reader = Reader(plan, self.plan.size)
            stdout = client.reader.stdout
        self._start(client, plan.python, args + [LOOPBACK, LOOPBACK, port], prefix=prefix, stdout=stdout, cwd=folder)
        stdout.close()

    @staticmethod
    def _small_disk(folder, size):
        """Make a folder in which files find room for about `size` bytes; returns what to start the process with."""
        os.mkdir(folder)
        room = size + DISK
        if may_mount() and subprocess.call(["mount", "-t", "tmpfs", "-o", "size=%d" % room, "none", folder]) == 0:
            return []
        return ["sh", "-c", 'ulimit -f %d; exec "$@"' % (room // 512), "sh"]

    # --- faults

    def _strike(self, fault):
        if fault.who == "stranger":
            self._visit(fault)
            return
        actor = [actor for actor in self.actors if actor.name == fault.who][0]
        if fault.what == "signals":
            after = 0
            for gap, number in fault.parameter:
                after += gap
                if after:
                    self._later(after, self._signal, actor, number)
                else:
                    self._signal(actor, number)
        elif actor.cable:
            self.note("the cable of %s is pulled" % actor.name)
            actor.cut = True
            actor.cable.plugged.clear()
            if fault.parameter:
                self._later(fault.parameter, self._plug, actor)

    def _plug(self, actor):
        self.note("the cable of %s is put back" % actor.name)
        actor.cable.plugged.set()

    def _signal(self, actor, number):
        if number in HARMLESS and actor.runs and not actor.stderr:
            # Python may not be up yet, and nobody could keep the signal from ending it.
            if not actor.frozen:
                self._later(TURN, self._signal, actor, number)
        elif actor.runs:
            self.note("%s gets %s" % (actor.name, signal.Signals(number).name))
            actor.hits.append((time.monotonic(), number))
            if number in (signal.SIGSTOP, signal.SIGCONT):
                actor.frozen = number == signal.SIGSTOP
            actor.process.signal(number)

    def _visit(self, fault):
        seconds, end = fault.parameter
        try:
            sock = socket.create_connection((LOOPBACK, self.port), timeout=1)
            sock.sendall(SAYINGS[fault.what])
        except OSError:
            return                              # there is no server
        self.note("a stranger says %s" % fault.what)
        if end == "RST":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._later(seconds, sock.close)

    # --- what is left

    def _look_for_orphans(self):
        """Look for processes that ours have left behind; returns whether there are some that may end soon."""
        soon = False
        for pid, name, command in children(besides=[actor.process.pid for actor in self.actors if actor.process]):
            actor = [actor for actor in self.actors if actor.name == name]
            if not actor or pid in self._orphans:
                continue
            # Who is killed ends nothing; its command notices by itself.
            patience = MOMENT + (5 * MOMENT if actor[0].killed else 0)
            if actor[0].ended and time.monotonic() > actor[0].ended + patience:
                self._orphans.add(pid)
                self.findings.append("%s left a process behind: %s" % (name, command))
            soon = soon or pid not in self._orphans
        return soon

    def __str__(self):
        parts = ["plan:\n%s" % self.plan, "what happened:\n%s" % "\n".join(self.diary)]
        parts += ["%s: %s\nexit code %s, stderr:\n%s" % (actor.name, " ".join(actor.process.argv), actor.code,
                                                         actor.stderr)
                  for actor in self.actors if actor.process]
        return "\n".join(parts)


def children(besides):
    """Yield (process id, KMCAST_CHAOS of its environment, command) of each child of this process but `besides`.

    Whose parent has ended is our child, see lonely().
    """
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open("/proc/%d/stat" % pid) as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            if parent != os.getpid() or pid in besides or os.waitpid(pid, os.WNOHANG)[0]:
                continue
            with open("/proc/%d/environ" % pid) as environ, open("/proc/%d/cmdline" % pid) as command:
                name = re.search("KMCAST_CHAOS=([^\0]*)", environ.read())
                yield pid, name and name.group(1), command.read().replace("\0", " ")
        except (OSError, ValueError):
            pass                                # it has ended


_may_mount = []


def may_mount():
    """Whether this process may mount, in a namespace of its own so that nothing is left when it ends."""
    if not _may_mount:
        _may_mount.append(os.geteuid() == 0 and LIBC.unshare(CLONE_NEWNS) == 0
                          and subprocess.call(["mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL) == 0)
    return _may_mount[0]


# ---------------------------------------------------------------------------------------------------------------------
# What must hold

class Judge(object):
    """What must hold at the end of a run, whatever happened; `findings` says what does not.

    All of it is promised by the manual, or by common sense.
    """

    def __init__(self, run):
        self.run, self.plan, self.server = run, run.plan, run.server
        self.clients = [client for client in run.clients if client.process]
        self.findings = run.findings
        match = re.search(r"(\d+) of (\d+) clients? ha(ve|s) the image", self.server.stderr)
        self.served = int(match.group(1)) if match else None
        for actor in [self.server] + self.clients:
            if actor.process and not actor.excluded and not self.unborn(actor):
                self.exit_code(actor)
                self.obedience(actor)
                self.words(actor)
            self.threads(actor)
        for client in self.clients:
            self.folder(client)
            if not client.excluded:
                self.image(client)
                self.untouched(client)
        self.top_folder()
        self.verdict()

    def find(self, text, *values):
        self.findings.append(text % values)

    # --- of each process

    @staticmethod
    def unborn(actor):
        """Whether a SIGINT came before kmcast could look after it: then Python says what it likes."""
        with open(helpers.KMCAST) as source:
            first = [number for number, line in enumerate(source, 1) if line.startswith("import ")][0]
        if signal.SIGINT not in dict(actor.hits).values() or re.search(r"kmcast \w+: ", actor.stderr):
            return False
        return all(int(line) < first for line in re.findall(r'kmcast\.py", line (\d+)', actor.stderr))

    def words(self, actor):
        said = OPENED.sub("", actor.stderr) if actor.touched else actor.stderr
        for word in NEVER:
            if word in said:
                self.find('%s says "%s"', actor.name, word)
        if actor.code in (1, 3) and not re.search(r"kmcast \w+: error: ", actor.stderr):
            self.find("%s has exited %d and does not say why", actor.name, actor.code)

    def threads(self, actor):
        """A client has two, a server three, or more where its places take more."""
        most = 3 if actor.name.startswith("server") else 2
        if actor is self.server and self.plan.per_thread:
            most = 2 + -(-self.plan.places // self.plan.per_thread)
        if actor.threads > most:
            self.find("%s had %d threads", actor.name, actor.threads)

    def exit_code(self, actor):
        """It is one of the table; a signal ends only who has said nothing yet, or had a second to end in order."""
        code = actor.code
        if code in (0, 1, 3) or [number for _, number in actor.hits if number == signal.SIGKILL == -code]:
            return
        stops = [when for when, number in actor.hits if number in STOPPING]
        last = [when for when, number in actor.hits if number == -code]
        if code >= 0 or -code not in STOPPING or not last:
            self.find("%s ended with %d", actor.name, code)
        elif actor.stderr.strip() and last[-1] - stops[0] < 0.9:
            self.find("%s was ended by signal %d rather than in order", actor.name, -code)

    def obedience(self, actor):
        """Who is told to stop does, soon; with exit code 0 only who was through before."""
        stops = [when for when, number in actor.hits if number in STOPPING]
        if stops and not [number for _, number in actor.hits if number == signal.SIGSTOP]:
            seconds = actor.ended - stops[0]
            if seconds > (MOMENT if actor.code == 0 and actor is not self.server else 5 * MOMENT):
                self.find("%s went on for %.1f s after a signal, and ended with %d", actor.name, seconds, actor.code)

    # --- of each client

    def received(self, client):
        """What came out of a client, and whether that is all that it wrote; (None, ...): nothing."""
        if client.output:
            return self.content(client), True
        if client.reader:
            return bytes(client.reader.data), client.plan.output != "stdout, closed in the middle"
        return None, False

    def content(self, client):
        """What the file has that it is to make; None if there is none."""
        try:
            with open(self.run.path(client.name, client.output), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def image(self, client):
        """With exit code 0 it has exactly the server's bytes; else FILE is what it was; with 3 nothing was written."""
        data, all_of_it = self.received(client)
        if client.code == 0:
            if not self.plan.whole:
                self.find("%s has exited 0, but there is no image", client.name)
            elif client.plan.output.startswith("--pipe, fails"):
                self.find("%s has exited 0, but its command failed", client.name)
            elif "/dev/full" in client.plan.output:
                if self.run.image:
                    self.find("%s has exited 0, but could not write", client.name)
            elif data != self.run.image and (all_of_it or not self.run.image.startswith(data)):
                self.find("%s has exited 0 with %s bytes of %d, or others", client.name,
                          None if data is None else len(data), self.plan.size)
        elif client.plan.output.startswith("-o FILE"):
            # Who is killed at its end may have made it.
            if data != (OLD if client.old else None) and not (client.killed and data == self.run.image):
                self.find("%s has exited %d, and yet there is a new file", client.name, client.code)
        elif data and client.plan.output.startswith("stdout") and not self.run.image.startswith(data):
            self.find("%s has exited %d and has written what is not the image's beginning", client.name, client.code)
        if client.reader and client.reader.data and not client.plan.output.startswith("stdout"):
            self.find("%s has written to its standard output", client.name)
        if client.code == 3 and (client.output and data is not None and not client.old or not client.output and data
                                 or os.path.exists(self.run.path(client.name, "began"))):
            self.find("%s says that it never started, but it has", client.name)

    def folder(self, client):
        """Nothing else is left."""
        names = {"out", "began"} if client.plan.output.startswith("--pipe") else {client.output, "disk"}
        for folder, _, files in os.walk(self.run.path(client.name)):
            for name in files:
                name = os.path.relpath(os.path.join(folder, name), self.run.path(client.name))
                part = re.match(r"(disk/)?\.out\.[^/]*\.part$", name)
                if name not in names and not (part and client.killed):
                    self.find("%s has left %s", client.name, name)

    def untouched(self, client):
        """Who is well, and whose server is, gets the image, whatever becomes of the others."""
        plan, server = self.plan, self.server
        if not plan.whole or server.touched or client.touched or client.code == 0 or client.plan.moment.mark != "zero" \
                or not OUTPUTS[client.plan.output][1]:
            return
        # In the base protocol nobody can say that he is alive, so who waits for others may be given up.
        if plan.compat and (plan.stall or client.plan.stall):
            return
        if client.code != 3 or not (plan.guests > plan.places or plan.start_wait):
            self.find("%s has exited %d, though neither it nor its server was disturbed", client.name, client.code)

    # --- of the whole

    def top_folder(self):
        names = {"image", "temporary"} | {client.name for client in self.clients}
        left = sorted(set(os.listdir(self.run.folder)) - names) + os.listdir(self.run.path("temporary"))
        if left:
            self.find("there is more in the run's folder: %s", ", ".join(left))

    def verdict(self):
        """The server says of itself and of its clients what these say."""
        server, code = self.server, self.server.code
        good = [client for client in self.clients if client.code == 0]
        if code == 0:
            done = [client for client in self.clients if client.code == 0 or client.touched]
            if len(done) < self.plan.places or self.served != self.plan.places:
                self.find("the server has exited 0, but %d clients of %d", len(good), self.plan.places)
            # All are of one host, so to a server those that come for others were never refused.
            if len(re.findall(" is here, ", server.stderr)) == self.plan.places \
                    and any("refused: " in client.stderr for client in self.clients):
                self.find("the server has exited 0, but a client was refused")
            if not re.search(r"data: .* %d bytes? in" % self.plan.size, server.stderr):
                self.find("the server has exited 0 with another number of bytes")
            if not self.plan.whole:
                self.find("the server has exited 0, but there is no image")
        if self.served is None:
            if code is not None and code >= 0 and "begun" in self.run._marks:
                self.find("the server has no summary")
            return
        refused = "was refused: " in server.stderr
        expected = 1 if self.served == 0 else 0 if self.served == self.plan.places and not refused else 3
        if code is not None and code >= 0 and code != expected:
            self.find("the server says that %d of %d have the image, and exits %d", self.served, self.plan.places, code)
        # A client that has everything does not need its server any more. Nor does the server count one whose consumer
        # stops, or that is busy with the end in the base protocol, where it cannot say so.
        stops = [client for client in good if client.plan.output == "stdout, read in part"
                 or self.plan.compat and self.plan.stall and "slow" in client.plan.output]
        excused = [client for client in good if server.touched or client.touched or client in stops]
        if len(good) > self.served + len(excused):
            self.find("the server says that %d have the image, but %d clients exited 0", self.served, len(good))
        # And one that has said that it has everything may be killed after that.
        late = [client for client in self.clients if client.code != 0 and client.touched]
        if self.served > len(good) + len(late):
            self.find("the server says that %d have the image, but just %d clients exited 0", self.served, len(good))
        if not server.touched and self.plan.whole and self.served:
            lines = len(re.findall("does not have the image", server.stderr))
            match = re.search(r"(\d+) clients? never came", server.stderr)
            # More than there are places for, where one that failed has left its own to one that came late.
            if self.served + lines + (int(match.group(1)) if match else 0) < self.plan.places and code != 2:
                self.find("the server does not account for each of its %d clients", self.plan.places)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def lonely():
    """Make this process, just forked, end with its parent, and the parent of what its children leave behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))


def run_one(seed, port, verbose):
    """In a process of its own: a run, and what there is to say of it on stdout. Returns whether all was well."""
    plan = Plan(seed)
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="kmcast-chaos-", dir=base)
    try:
        run = Run(plan, folder, port)
        run.play()
        findings = Judge(run).findings
        print("%s: %s" % (run.server.code, " ".join(str(client.code) for client in run.clients if client.process)))
        for text in findings:
            print("FINDING in seed %d: %s" % (seed, text))
        if findings:
            print("again: python3 tests/chaos.py --seed %d --runs 1 -v" % seed)
        if findings or verbose:
            print(run)
        return not findings
    finally:
        helpers.stop_all()
        subprocess.call("umount '%s'/*/disk" % folder, shell=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


def fork(seed, verbose):
    """Start a run in a process of its own; returns its id, and the file with what it says."""
    if len(helpers._ports_given) > 5000:        # the first of them are free again by now
        helpers._ports_given.clear()
    output, port = tempfile.TemporaryFile("w+"), helpers.free_port()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid, output
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        lonely()
        code = 0 if run_one(seed, port, verbose) else 1
    except BaseException:               # pylint: disable=broad-except
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)                  # what our parent would do at its exit is not for us to do


def main():
    """The program; returns its exit code."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        # Under nohup(1): what is ignored stays so in what we start, what has a handler does not.
        signal.signal(signal.SIGHUP, lambda *_: None)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (0)")
    parser.add_argument("--jobs", type=int, default=4, help="how many at once (4)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show plan and stderr of every run")
    options = parser.parse_args()
    for python in (helpers.oldest(), helpers.newest()):
        helpers.compiled(python)
    began, running, bad, ends = time.monotonic(), {}, [], collections.Counter()
    seeds = iter(range(options.seed, options.seed + options.runs))
    while True:
        for seed in seeds if len(running) < options.jobs else ():
            pid, output = fork(seed, options.verbose)
            running[pid] = seed, output
            if len(running) == options.jobs:
                break
        if not running:
            break
        pid, status = os.wait()
        seed, output = running.pop(pid)
        output.seek(0)
        first, rest = output.readline(), output.read()
        output.close()
        if status or options.verbose:
            print("---- seed %d\n%s%s" % (seed, first, rest), flush=True)
        if status:
            bad.append(seed)
        else:
            server, clients = first.split(":")
            ends.update(["server " + server] + ["client " + code for code in clients.split()])
    print("%d runs in %.0f s, seeds from %d on" % (options.runs, time.monotonic() - began, options.seed))
    print("exit codes: %s" % ", ".join("%s: %d" % end for end in sorted(ends.items())))
    print("findings in %d runs%s" % (len(bad), ": seeds " + " ".join(map(str, sorted(bad))) if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
