#!/usr/bin/env python3
"""Whole transfers in one process, over a simulated network and clock: thousands of them a minute, each from a seed.

    python3 tests/simulate.py --seeds 20000 --jobs 2        # seeds 0 to 19999
    python3 tests/simulate.py --seed 17                     # one again, with every message
    python3 tests/simulate.py --kmcast /tmp/broken.py       # another kmcast.py

A seed decides a Plan (image, options, network, what goes wrong) and every delay and loss. What decides in kmcast.py is the
real thing: Course, Roster, ServerWindow, ClientWindow, Buffer, RateControl, Connection and both dialects. What carries out is
here and much smaller: TcpThread, Server and Host are TcpServer, Multicaster and Client without sockets, threads and time.
The network is unfair but within what the manual promises to survive: TCP cut anywhere, multicast lost, late, twice, damaged.

What must hold: see Run.verdict() and Run.watch(). A finding is printed with its seed. Exit code: 0 nothing was found, 1
something was, 2 wrong usage.
"""

import argparse
import collections
import concurrent.futures
import errno
import hashlib
import heapq
import importlib.util
import os
import random
import struct
import sys
import time
import traceback
import weakref

KMCAST = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kmcast.py")

LIMIT = 3000.0              # simulated seconds after which somebody waits for ever
KEEPALIVE = 17.0            # seconds after which a kernel gives up a host that is gone: Connection.begin()
FOREIGN = b"\x2a\0\0\0" + bytes(60)     # a datagram of somebody else

kmcast = None               # the module that is tested
now = 0.0                   # simulated seconds


class Finding(Exception):
    """Something that must not happen."""


class Crash(Exception):
    """The server's process ends without a word."""


def load(path=KMCAST):
    """Load kmcast.py as a module of our own, whose clock is the simulated one."""
    global kmcast
    spec = importlib.util.spec_from_file_location("kmcast_simulated", path)
    kmcast = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kmcast
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(kmcast)
    sys.dont_write_bytecode = writes
    kmcast.monotonic = lambda: now

    class Counted(kmcast.Buffer):
        """A Buffer; `live` has those that are in memory."""
        live = weakref.WeakSet()

        def __init__(self, *args, **options):
            kmcast.Buffer.__init__(self, *args, **options)
            self.live.add(self)
    Counted.__mro__[1].__name__ = "Buffer"
    base = kmcast.Buffer
    Counted.__init__ = lambda self, *args, **options: (base.__init__(self, *args, **options), self.live.add(self))[0]
    kmcast.Buffer = Counted


# ---------------------------------------------------------------------------------------------------------------------
# The plan

class Plan:
    """What a seed decides before anything happens."""

    def __init__(self, seed):
        r = random.Random(seed)
        self.compat = r.random() < 0.15
        self.payload = r.choice([16, 32, 64, 100, 200])
        self.capacity = r.choice([5, 17, 64, 70, 100, 130])
        packets = r.choice([0, 1, 2, r.randrange(60), r.randrange(64, 300), r.randrange(600)])
        size = max(0, packets * self.payload - r.choice([0, 0, 1, self.payload // 2]))
        self.image = r.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[1:]
        self.allow_empty = r.random() < 0.5
        self.per_thread = r.choice([1, 2, 3, 64])
        self.digest = not self.compat and r.random() < 0.9
        self.server_stall = r.choice([8.0, 15.0, 30.0]) if r.random() < 0.9 else 0
        self.client_stall = 0 if self.compat else r.choice([8.0, 15.0, 30.0, 0])
        self.rate = r.choice(["auto", "auto", "auto", 1e6, 50e6, float("inf")])
        self.min_rate = 1e6 if not self.compat and r.random() < 0.05 else 0
        self.unicast = r.random() < 0.07
        self.first_seq = r.choice([0, 0, r.getrandbits(32), 2**32 - r.randrange(1, 200)])
        self.pauses = r.choice([0, 0, 0, 0.05, 0.3])             # how often the producer pauses
        self.pause = r.choice([0.01, 0.1, 2, 20])
        self.shared = r.choice([0, 0, 0.01, 0.1])                # loss that all clients share
        self.server_fault = r.choice(["crash", "source", "stop"]) if r.random() < 0.05 else None
        self.fault_at = 10 ** r.uniform(-2.5, 1)
        count = r.choice([1, 1, 2, 2, 3, 3, 4, 5, 8])
        self.clients = [ClientPlan(r, self) for _ in range(count)]
        if r.random() < 0.05:                                    # the same host again
            twin = ClientPlan(r, self)
            twin.host, twin.start = self.clients[0].host, self.clients[0].start + r.uniform(0, 0.3)
            self.clients[0].fatal = self.clients[0].fatal or "has a twin"
            self.clients.append(twin)
        self.places = len(set(client.host for client in self.clients))
        self.start_by, self.enough = None, 1
        if r.random() < 0.2 or any(client.fatal for client in self.clients):
            self.start_by = r.uniform(0.05, 1.5)
            self.enough = 1
        if r.random() < 0.03:
            self.places = max(1, self.places - 1)                # one too many


class ClientPlan:
    """A client, its link, and what goes wrong with it; `fatal` is what may end it, None if it must get the image."""

    def __init__(self, r, plan):
        self.host = "node%d" % r.getrandbits(40)
        self.start = r.choice([0, r.uniform(0, 0.2), r.uniform(0, 1)])
        self.delay = 10 ** r.uniform(-4, -1.3)
        self.rate = 10 ** r.uniform(4.5, 8)                      # bytes/s of TCP
        self.room = r.choice([300, 2000, 16384, 65536])          # bytes under way by TCP
        self.cut = r.choice([0, 0.2, 0.8])
        good = r.random() < 0.35
        self.loss = 0 if good else r.choice([0, 0.001, 0.02, 0.1, 0.3, 0.6, 1])
        self.burst = 0 if good else r.choice([0, 0, 0.01, 0.05])
        self.jitter = r.choice([0, 0, 0.001, 0.004, 0.02])
        self.late = r.choice([0, 0, 0.01])                       # share that comes very late
        self.twice = r.choice([0, 0, 0.02, 0.3])
        self.damage = r.choice([0, 0, 0, 0.02])
        self.queue = r.choice([None, None, (10 ** r.uniform(5, 7.5), r.choice([2000, 20000]))])     # bytes/s, bytes
        self.socket_buffer = r.choice([20, 1000, 1000])          # datagrams
        self.deaf = r.choice([None] * 6 + [(0, 1e9), (r.uniform(0, 0.2), r.uniform(0.2, 4))])
        self.nap = r.choice([0, 0.0005, 0.002])
        self.write_rate = 10 ** r.uniform(4, 8) if not plan.compat else 1e8
        self.chunk = 0 if plan.compat else r.choice([0, 0, 0, 0.01, 0.5, 1.5])      # seconds that a part of a round takes at least
        self.commit = r.choice([0, 0, 0.1, 12])
        self.fault, self.at, self.fatal = None, 10 ** r.uniform(-3, 1), None
        what = r.random()
        if what < 0.07:
            self.fault, self.at = "freeze", self.at
        elif what < 0.28:
            self.fault = self.fatal = r.choice(["fin", "reset", "power", "hang", "full", "stuck", "bye"])
            if self.fault in ("hang", "stuck") and not plan.server_stall:
                self.fault = self.fatal = "reset"                # without a timeout all would wait, as they should
            if self.fault == "stuck" and not plan.client_stall and plan.compat:
                self.fault = self.fatal = "full"
        self.freeze = 10 ** r.uniform(-3, 0.4)
        self.full_at = r.randrange(len(plan.image) + 1)
        if plan.compat:
            self.commit = min(self.commit, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The network

class World:
    """The clock and what is to happen."""

    def __init__(self, seed, trace):
        global now
        now = 0.0
        self.random = random.Random("world %d" % seed)
        self.trace = trace
        self.watch = lambda: None
        self._heap, self._number = [], 0

    def at(self, delay, call, *args):
        self._number += 1
        heapq.heappush(self._heap, (now + delay, self._number, call, args))

    def run(self, done=lambda: False, until=None):
        """Let things happen until done(), or until a time."""
        global now
        while not done():
            if not self._heap:
                raise Finding("somebody waits, and nothing more will happen")
            if until is not None and self._heap[0][0] > until:
                now = max(now, until)
                return
            now, _, call, args = heapq.heappop(self._heap)
            if now > LIMIT:
                raise Finding("somebody waits for ever")
            call(*args)
            self.watch()

    def say(self, who, text, *args):
        if self.trace:
            print("%11.6f %-16s %s" % (now, who, text % args if args else text))


class Stream:
    """One direction of a TCP connection: ordered, reliable, cut anywhere, with a rate, a delay and a window."""

    def __init__(self, world, plan):
        self.world, self.plan = world, plan
        self.unread = bytearray()
        self.under_way = 0                      # bytes sent and not read
        self.accepted = self.arrived = 0        # bytes
        self.ended = self.broken = self.dead = self.closed = False
        self.blocked = False
        self._next = 0.0
        self.source = self.sink = None          # the sockets at its ends

    def send(self, data):
        room = self.plan.room - self.under_way
        if room <= 0:
            self.blocked = True
            raise BlockingIOError(errno.EAGAIN, "full")
        data = bytes(data[:room])
        self.accepted += len(data)
        self.under_way += len(data)
        r, rest = self.world.random, data
        while rest:
            size = len(rest)
            if size > 1 and r.random() < self.plan.cut:
                size = r.randint(1, size - 1) if r.random() < 0.8 else 1
            self._later(size, self._arrive, rest[:size])
            rest = rest[size:]
        return len(data)

    def _later(self, size, call, *args):
        """In order, after what was sent before."""
        r = self.world.random
        self._next = max(self._next, now + self.plan.delay * r.uniform(1, 1.2)) + size / self.plan.rate
        self.world.at(self._next - now, call, *args)

    def _arrive(self, data):
        if self.dead or self.broken:
            return
        self.arrived += len(data)
        if self.closed:                         # nobody reads it any more: a reset comes back
            self.sink.output.reset()
            return
        self.unread += data
        self.sink.wake()

    def finish(self):
        self._later(0, self._end, "ended")

    def reset(self):
        self._later(0, self._end, "broken")

    def _end(self, how):
        if not self.dead and not self.closed:
            setattr(self, how, True)
            self.sink.wake()

    def receive(self, most):
        r = self.world.random
        if not self.unread:
            if self.broken:
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            if self.ended:
                return b""
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        if r.random() < self.plan.cut:
            most = r.randint(1, most)
        data = bytes(self.unread[:most])
        del self.unread[:most]
        self.under_way -= len(data)
        if self.blocked:
            self.blocked = False
            self.world.at(self.plan.delay, self.source.wake)
        return data

    @property
    def readable(self):
        return bool(self.unread or self.ended or self.broken)


class Socket:
    """An end of a connection, as Connection wants it."""

    def __init__(self, output, input_, wake):
        self.output, self.input, self.wake = output, input_, wake
        output.source, input_.sink = self, self

    def send(self, data, _flags=0):
        if self.input.broken:
            raise BrokenPipeError(errno.EPIPE, "broken")
        return self.output.send(data)

    def recv(self, most):
        return self.input.receive(most)

    def recv_into(self, view):
        data = self.input.receive(len(view))
        view[:len(data)] = data
        return len(data)

    def shutdown(self, _how):
        self.output.finish()

    def close(self):
        """As the kernel does it: who leaves something unread sends a reset."""
        if not self.input.closed:
            self.input.closed = True
            (self.output.reset if self.input.unread else self.output.finish)()

    def fileno(self):
        return -1


def acknowledged(connection):
    """Connection.look_at_kernel() without a kernel."""
    arrived = connection.sock.output.arrived
    if arrived > connection._acknowledged:
        connection._acknowledged = arrived
        connection.moved = now


class Air:
    """Multicast to one host: what is lost on the way, what comes late, twice, damaged."""

    def __init__(self, world, plan, host):
        self.world, self.plan, self.host = world, plan, host
        self.bad = False                        # in a burst of losses
        self.busy_until = 0.0                   # of the bottleneck

    def send(self, datagrams):
        plan, r = self.plan, self.world.random
        if plan.deaf and plan.deaf[0] <= now < plan.deaf[1]:
            return
        together = []
        for data in datagrams:
            if plan.burst and r.random() < (0.2 if self.bad else plan.burst):
                self.bad = not self.bad
            if self.bad or (plan.loss and r.random() < plan.loss):
                continue
            if plan.queue:
                speed, room = plan.queue
                if (self.busy_until - now) * speed > room:
                    continue
                self.busy_until = max(self.busy_until, now) + len(data) / speed
            if plan.damage and r.random() < plan.damage:
                data = self._damaged(data)
            if plan.twice and r.random() < plan.twice:
                self._one(data)
            if plan.late and r.random() < plan.late:
                self.world.at(r.choice([0.01, 0.1, 1]), self.host.datagrams_come, [data])
            elif plan.jitter:
                self._one(data)
            else:
                together.append(data)
        if together:
            self.world.at(plan.delay + max(0, self.busy_until - now), self.host.datagrams_come, together)

    def _one(self, data):
        self.world.at(self.plan.delay + self.world.random.random() * self.plan.jitter, self.host.datagrams_come, [data])

    def _damaged(self, data):
        r = self.world.random
        what = r.random()
        if what < 0.3:
            return data[:r.randrange(len(data))]
        if what < 0.4:
            return data + b"\0" * 4
        if what < 0.5:
            return FOREIGN[:8] + struct.pack("<I", 52) + FOREIGN[12:]
        if what < 0.7 and not kmcast_compat(self.host):         # of another session: right but for its salt
            seq, _, size = kmcast.PACKET.unpack_from(data)
            other = bytes(byte ^ 0x55 for byte in data[12:])
            return kmcast.PACKET.pack(seq, kmcast.zlib.crc32(other, 12345 + seq & 0xffffffff), size) + other
        place = r.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << r.randrange(8)]) + data[place + 1:]


def kmcast_compat(host):
    return host.run.plan.compat


# ---------------------------------------------------------------------------------------------------------------------
# The server

class Peer:
    """Made in load order: see peer()."""


def peer(sock, host):
    """A kmcast.Peer over a simulated socket."""
    made = kmcast.Peer(sock, "192.0.2.%d" % (hash(host.plan.host) % 200 if False else host.number))
    made.look_at_kernel = lambda: acknowledged(made)
    made.origin = host
    host.member = made.member
    return made


class TcpThread:
    """A kmcast.TcpServer: its turn comes when something arrived, when a neighbour released it, or with the clock."""

    def __init__(self, server, parent, number):
        self.server, self.parent, self.number = server, parent, number
        self.world, self.session, self.roster = server.world, server, server.roster
        self.window = kmcast.ServerWindow(server.dialect, server.plan.server_stall)
        self.peers, self.pending, self.leaving = {}, [], []
        self.passed_on, self.answers = collections.deque(), {}
        self.child, self.child_open = None, False
        self.released = self.child_released = True
        self.over = False
        self.name = "tcp-server-%d" % number
        self._woken = False
        self._ticking()

    @property
    def step(self):
        return self.window.step

    def _ticking(self):
        if not self.server.closed and not (self.over and not self.leaving):
            self.wake()
            self.world.at(0.5, self._ticking)

    def wake(self):
        if not self._woken:
            self._woken = True
            self.world.at(self.world.random.random() * 0.0003, self._turn)

    def _turn(self):
        self._woken = False
        if self.server.closed:
            return
        everybody = list(self.peers.values()) + self.pending + self.leaving
        self.world.random.shuffle(everybody)
        for connection in everybody:
            if connection.open and connection.sock.input.readable:
                self._safely(connection, self._hear, connection)
            if connection.open and connection.outgoing.count and connection in self._ours():
                self._send(connection)
        self._look_at_clocks()
        self._advance()
        if any(connection.open and connection.sock.input.readable for connection in self._ours()):
            self.wake()

    def _ours(self):
        return list(self.peers.values()) + self.pending + self.leaving

    def _advance(self):
        if self.step is None or self.over:
            return
        accepting = self.step.kind == "accept"
        if not self.released:
            if accepting and not self.roster.begin(now):
                return
            if not self.child_released or self.window.awaited():
                return
            self.answers = self.window.requests()
            if self.child and self.child_open:
                self.answers.update(self.child.answers)
            self.released = True
            self._release(self.parent.child_released_us)
        if not accepting and not self.peers and not self.child_open:
            self._end()

    def _release(self, call):
        self.world.at(self.world.random.random() * 0.0002, call)

    def _end(self):
        self.over = True
        self.world.at(0.0003, self.parent.child_ended)

    def _look_at_clocks(self):
        for connection in self.pending[:]:
            if now - connection.since > kmcast.GREETING_TIME:
                self._drop(connection, "no HELLO")
        for member, connection in list(self.peers.items()):
            if member.owes or connection.outgoing.count:
                connection.look_at_kernel()
                reason = self.window.stalled(member, connection.moved, now)
                if reason:
                    self._drop(connection, reason)
            elif self.server.dialect.talks:
                self._safely(connection, connection.show_life, kmcast.ALIVE)
        for connection in self.leaving[:]:
            if now > connection.leaving:
                self._close(connection)

    # ---- the links

    def released_by_parent(self):
        if self.over or self.server.closed:
            return
        while self.number > 1 and self.parent.passed_on:
            self._take(self.parent.passed_on.popleft())
        step = self.parent.step
        if step is None or step is self.step or self.number > 1 and step.kind == "accept":
            self._carry_out_sentences()
            self._release_child()
        elif step.kind == "abort":
            self.window.step = step
            self._release_child()
            self._dismiss_all(step.message)
            self._end()
        elif step.kind == "accept":
            self.window.step = step
            self.released = False
        else:
            self.released = False
            self._carry_out_sentences()
            todo = self.window.begin(step, now)
            self.child_released = not self.child_open
            self._release_child()
            self._carry_out(todo)
        self.wake()

    def _release_child(self):
        if self.child_open:
            self._release(self.child.released_by_parent)

    def child_released_us(self):
        self.child_released = True
        self.wake()

    def child_ended(self):
        self.child_open, self.child_released = False, True
        self.wake()

    def _carry_out_sentences(self):
        for member, connection in list(self.peers.items()):
            if member.sentence:
                self._drop(connection, member.sentence)

    def _carry_out(self, todo):
        for verb, member, argument in todo:
            if member not in self.peers:
                continue                # it went away while we sent it something just before
            connection = self.peers[member]
            if verb == "send":
                self._send(connection, argument)
            elif verb == "packets":
                self._send(connection, self.server.dialect.packets, *[
                    data for start, stop in kmcast.runs(argument)
                    for data in self.step.buffer.packets(argument[start], argument[stop - 1] + 1)])
            else:
                self._close(connection)

    # ---- connections

    def connected(self, connection):
        self.pending.append(connection)
        self._send(connection, kmcast.pack_group_info("239.1.2.3", 4711, self.server.dialect.padding))
        if not self.server.dialect.greets and connection.open:
            self._welcome(connection)

    def _welcome(self, connection):
        member = connection.member
        twin = None if self.roster.begun else self.roster.twin(member)
        if twin:
            twin.sentence = "replaced by a later client of the same host"
            self.roster.leave(twin)
            self._carry_out_sentences()
            self._release_child()
        if self.roster.begun:
            if self.server.dialect.greets:
                self.roster.refuse(member, kmcast.LATE)
            self._drop(connection, "refused: " + kmcast.LATE)
            return
        if self.server.dialect.greets:
            self._send(connection, self.server.welcome)
            if connection.leaving or not connection.open:
                return
        self.pending.remove(connection)
        self.roster.admit(member)
        self._take(connection)
        self._advance()

    def _take(self, connection):
        if len(self.peers) < self.server.plan.per_thread:
            self.peers[connection.member] = connection
            self.window.members.append(connection.member)
            connection.sock.wake = self.wake
            self._send(connection)
            self.wake()
            return
        connection.sock.wake = lambda: None
        self.passed_on.append(connection)
        if not self.child:
            self.child, self.child_open = TcpThread(self.server, self, self.number + 1), True
            self.server.threads.append(self.child)
        self._release_child()

    def _safely(self, connection, call, *args):
        try:
            call(*args)
        except kmcast.Gone as error:
            self._drop(connection, "it went away: %s" % error, told=False)
        except kmcast.Refused as error:
            self._drop(connection, error.reason, told=False)
        except kmcast.ProtocolError as error:
            self._drop(connection, "protocol error: %s" % error)

    def _hear(self, connection):
        if connection.leaving:
            connection.receive()
            return
        if connection.member not in self.peers:
            hello = connection.first(self._hello_size)
            if hello:
                fields = kmcast.unpack_frame(hello[5:])
                connection.member.host = fields["host"]
                connection.alive_every = kmcast.alive_every(kmcast.stall_of(fields))
                self._welcome(connection)
            return
        for message in connection.messages(self.window.size_of):
            self.world.say(self.name, "hears %s from %s", described(message), connection.origin)
            self._carry_out(self.window.heard(connection.member, message, now))
            if connection.leaving or not connection.open:
                return

    @staticmethod
    def _hello_size(head):
        if head[:1] != kmcast.HELLO:
            raise kmcast.ProtocolError("it says something else than HELLO")
        return kmcast.frame_size(head)

    def _send(self, connection, *pieces):
        if self.world.trace and pieces:
            self.world.say(self.name, "sends %s to %s", described(b"".join(bytes(piece) for piece in pieces[:1])),
                           connection.origin)
        self._safely(connection, connection.send, *pieces)
        if connection.open:
            connection.hang_up()

    def _drop(self, connection, reason, told=True):
        member = connection.member
        self.world.say(self.name, "drops %s: %s", connection.origin, reason)
        if self._forget(member):
            if not self.over:
                member.outcome, member.ended = reason, now
        elif connection in self.pending:
            self.pending.remove(connection)
        if connection.outgoing.count and not self.over:
            told = False
        if told and not connection.leaving and self.server.dialect.talks:
            self.leaving.append(connection)
            try:
                connection.leave(self.server.dialect.bye(ok=False, reason=reason))
                self._send(connection)
            except kmcast.Gone:
                self._close(connection)
        else:
            self._close(connection)

    def _forget(self, member):
        self.roster.leave(member)
        if member not in self.peers:
            return False
        del self.peers[member]
        self.window.members.remove(member)
        return True

    def _close(self, connection):
        self._forget(connection.member)
        for connections in (self.pending, self.leaving):
            if connection in connections:
                connections.remove(connection)
        if connection.open:
            connection.close()

    def _dismiss_all(self, reason):
        self.over = True
        self.roster.end()
        while not self.child and self.passed_on:
            self.pending.append(self.passed_on.popleft())
        for connection in list(self.peers.values()) + self.pending:
            self._drop(connection, reason)
        self.wake()


class Source:
    """What makes the image, with pauses."""

    def __init__(self, run):
        self.plan, self.random = run.plan, run.world.random
        self.place, self.again = 0, 0.0
        self.hash = hashlib.sha256()
        self._staging = bytearray()

    def staging(self, size):
        if len(self._staging) != size:
            self._staging = bytearray(size)
        return memoryview(self._staging)

    def read_into(self, view):
        plan, r = self.plan, self.random
        if now < self.again:
            return None
        if r.random() < plan.pauses:
            self.again = now + r.random() * plan.pause
            return None
        if plan.server_fault == "source" and now > plan.fault_at:
            raise kmcast.Failure("cannot read the image")
        data = plan.image[self.place:self.place + r.randint(1, len(view))]
        view[:len(data)] = data
        self.place += len(data)
        self.hash.update(data)
        return len(data)


class Server:
    """A kmcast.Multicaster: the hands of the Course, which run the world while they wait."""

    def __init__(self, run):
        self.run, self.plan, self.world = run, run.plan, run.world
        plan = self.plan
        self.dialect = kmcast.BaseDialect if plan.compat else kmcast.SessionDialect
        self.salt, self.repair_salt = (0, 0) if plan.compat else (run.world.random.getrandbits(32),
                                                                  run.world.random.getrandbits(32))
        self.welcome = kmcast.pack_frame(kmcast.WELCOME, {
            "salt": self.salt, "repair_salt": self.repair_salt, "payload": plan.payload, "stall": plan.server_stall,
            "digest": "sha256" if plan.digest else None})
        self.roster = kmcast.Roster(plan.places, plan.enough, plan.start_by)
        self.step, self.threads = None, []
        self.closed = self.ended = False        # the process; TCP server 1
        self.released = False
        self.threads.append(TcpThread(self, self, 1))
        self.source = Source(run)
        self.buffers = [kmcast.Buffer(plan.payload, plan.capacity, self.salt, self.dialect.checks) for _ in (0, 1)]
        self.upcoming = None
        course = type("Course", (kmcast.Course,), {"FIRST_SEQ": plan.first_seq})
        self.course = course(self, self.roster, self.dialect, plan.payload, plan.capacity, plan.rate, plan.min_rate,
                             plan.unicast, self.repair_salt)
        self.failure = None

    def serve(self):
        """Serve the image, to the end of all."""
        try:
            self.course.begin()
            self.do(kmcast.Step("accept"))
            while self.course.round(self._last_word, self.plan.allow_empty):
                pass
        except kmcast.LinkClosed:
            self.failure = "no client is left"
        except kmcast.Failure as error:
            self.failure = error.reason
        self.roster.end()
        self.world.say("server", "is through: %s", self.failure)
        if self.failure:
            self.step = kmcast.Step("abort", message=self.failure)
        self.threads[0].released_by_parent()
        end = now + 4
        self.world.run(lambda: all(thread.over and not thread.leaving for thread in self.threads) or now > end)
        self.close()

    def close(self):
        """The process is gone; the kernel closes what it had."""
        self.closed = True
        for thread in self.threads:
            for connection in list(thread.peers.values()) + thread.pending + thread.leaving + list(thread.passed_on):
                if connection.open:
                    connection.close()

    def _last_word(self, digest):
        return self.dialect.bye(ok=True, bytes=self.source.place, sha256=digest.hex() if self.plan.digest else None)

    # ---- the links

    def child_released_us(self):
        self.released = True

    def child_ended(self):
        self.ended = True

    def _check(self):
        if self.ended:
            raise kmcast.LinkClosed()
        if self.plan.server_fault == "crash" and now > self.plan.fault_at:
            raise Crash()
        if self.plan.server_fault == "stop" and now > self.plan.fault_at:
            raise kmcast.Failure("stopped by SIGTERM")
        if not self.roster.begun and (now > 60 or all(host.ended for host in self.run.hosts)):
            raise kmcast.Failure("the operator gave up")

    def _wait(self, until=None, done=lambda: False):
        """Fill the next buffer until a time, or until done()."""
        while not done():
            self._check()
            if self.upcoming and not self.upcoming.full:
                while not self.upcoming.full and now >= self.source.again:
                    self.upcoming.fill(self.source)
                if done():
                    return
            if until is not None and now >= until:
                return
            look = now + 0.5
            if self.upcoming and not self.upcoming.full:
                look = max(now, self.source.again)
            if until is not None:
                look = min(look, until)
            self.world.run(lambda: done() or self.ended, look)

    # ---- the hands of the course

    def now(self):
        return now

    def do(self, step):
        self.world.say("server", "step %s", step.kind)
        self.step, self.released = step, False
        self.world.at(0.0001, self.threads[0].released_by_parent)
        self._wait(done=lambda: self.released)
        return self.threads[0].answers

    def fill(self, base, limit):
        self.buffers.reverse()
        self.upcoming = self.buffers[0]
        self.upcoming.start(base, 0, 0)
        self.upcoming.limit = limit

    def take(self):
        upcoming = self.upcoming
        self._wait(done=lambda: upcoming.full)
        self.upcoming = None
        return upcoming, self.source.hash.digest() if self.plan.digest else b""

    def multicast(self, buffer, count):
        started, r = now, self.world.random
        size = buffer.slot + kmcast.UDP_OVERHEAD
        rate = min(self.course.rate, 1e9)
        place = 0
        while place < count:
            burst = min(count - place, max(1, min(64, int(rate * 0.0005 / 8 / size))))
            packets = [bytes(buffer.packets(i, i + 1)[0]) for i in range(place, place + burst)]
            place += burst
            if self.plan.shared:
                packets = [data for data in packets if r.random() >= self.plan.shared]
            for host in self.run.hosts:
                if host.joined:
                    host.air.send(packets)
            self._wait(now + burst * size * 8 / rate)
        seconds = max(1e-6, now - started)
        self.world.say("server", "multicast %d packets", count)
        if count:
            self._wait(now + min(48 * 1024 * 8 / rate, 0.01))
        return seconds

    def trouble(self):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The clients

class Writer:
    """A kmcast.Writer: writes what it is given in parts, which take time, and says when a round is written."""

    def __init__(self, host):
        self.host, self.world, self.plan = host, host.world, host.plan
        self.jobs = collections.deque()
        self.output = bytearray()
        self.hash = hashlib.sha256()
        self.through = 0                        # rounds of which the host was not told yet
        self.failure = None
        self.alive = True
        self._busy = False

    def give(self, buffer, size, digest):
        self.jobs.append((buffer, size, digest))
        if not self._busy:
            self._busy = True
            self.world.at(0.0001, self._begin)

    def _begin(self):
        buffer, size, digest = self.jobs[0]
        data = buffer.flush()
        self.hash.update(data)
        if len(data) != size:
            return self._fail("a round of %d bytes instead of %d" % (len(data), size))
        if self.host.run.plan.digest and self.hash.digest() != digest:
            return self._fail("the digest differs")
        self._write(data)

    def _write(self, data):
        host, plan = self.host, self.plan
        if host.gone or plan.fault == "stuck" and now > plan.at:
            return
        part = self.world.random.randint(1, len(data)) if len(data) and plan.chunk else len(data)
        if plan.fault == "full" and len(self.output) + part > plan.full_at:
            self._fail("no space left")
            return
        self.output += data[:part]
        rest = data[part:] if len(data) > part else None
        self.world.at(plan.chunk + part / plan.write_rate, self._go_on, rest)

    def _go_on(self, rest):
        if rest is not None:
            return self._write(rest)
        self.jobs.popleft()
        self.through += 1
        self._busy = False
        if self.jobs:
            self._busy = True
            self._begin()
        self.host.wake()

    def _fail(self, reason):
        self.failure = reason
        self.host.wake()

    def commit(self):
        self.world.at(self.plan.commit, self._committed)

    def _committed(self):
        self.alive = False
        self.host.wake()


class Host:
    """A kmcast.Client on its host."""

    def __init__(self, run, plan, number):
        self.run, self.plan, self.world, self.number = run, plan, run.world, number
        self.name = "client-%d" % number
        self.member = None                      # at the server
        self.server = self.window = self.writer = None
        self.air = Air(self.world, plan, self)
        self.datagrams = collections.deque()
        self.joined = self.gone = self.ended = False
        self.reason = None                      # why it failed
        self.good = False                       # the image is committed
        self.dialect = None
        self.fields = None
        self.frozen_until = 0.0
        self._phase = self._greet
        self._woken, self._alarm = False, None
        self._spins = 0                         # turns in a row after which it did not want to wait
        self._owing_since = self._next_state = None
        self._last_look = 0.0
        self._output = (0, 0.0)
        self._finishing = None
        self.world.at(plan.start, self._connect)
        if plan.fault:
            self.world.at(plan.start + plan.at, self._fault)

    def __str__(self):
        return self.name

    # ---- what goes wrong

    def _fault(self):
        fault = self.plan.fault
        if self.ended or fault in ("full", "stuck"):
            return
        self.world.say(self, "FAULT %s", fault)
        if fault == "freeze":
            stalls = [stall for stall in (self.run.plan.server_stall, self.run.plan.client_stall) if stall] + [8]
            self.frozen_until = now + min(self.plan.freeze, 0.3 * min(stalls))
            self.world.at(self.frozen_until - now, self.wake)
            return
        if fault == "hang":
            self.gone = self.ended = True       # it is there, says nothing and reads nothing
            self.joined = False
            self.reason = fault
            return
        if fault == "bye" and self.server:
            return self._fail(kmcast.Failure("stopped by SIGTERM"))
        self._die(fault)
        if not self.server:
            return
        sock = self.server.sock
        if fault == "power":
            sock.input.dead = sock.output.dead = True
            far = sock.input.source
            self.world.at(KEEPALIVE, self._kernel_gives_up, far)
        elif fault == "reset":
            sock.input.closed = True
            sock.output.reset()
        else:
            sock.close()

    def _die(self, reason):
        self.gone = self.ended = True
        self.joined = False
        self.reason = reason

    @staticmethod
    def _kernel_gives_up(sock):
        sock.input.broken = True
        sock.wake()

    # ---- the whole

    def _connect(self):
        if self.ended:
            return
        server = self.run.server
        if server.closed:
            return self._die("no server")
        there, back = Stream(self.world, self.plan), Stream(self.world, self.plan)
        self.server = kmcast.Connection(Socket(there, back, self.wake), "192.0.2.250")
        far = Socket(back, there, server.threads[0].wake)
        connection = peer(far, self)
        self.world.at(self.plan.delay, self._accepted, connection)

    def _accepted(self, connection):
        if self.run.server.closed or self.run.server.threads[0].over:
            connection.close()
        else:
            self.run.server.threads[0].connected(connection)

    def wake(self):
        if not self._woken and not self.gone:
            self._woken = True
            self.world.at(self.world.random.random() * 0.0002 + self.plan.nap, self._turn)

    def _turn(self):
        self._woken = False
        if self.ended or now < self.frozen_until or not self.server:
            return
        try:
            wait = self._phase()
        except kmcast.ProtocolError as error:
            return self._fail(kmcast.Failure("protocol error of the server: %s" % error))
        except kmcast.Failure as error:
            return self._fail(error)
        if not self.ended and (self._alarm is None or now + wait < self._alarm or self._alarm <= now):
            self._alarm = now + wait
            self.world.at(wait, self._turn_of_alarm, self._alarm)

    def _turn_of_alarm(self, alarm):
        if self._alarm == alarm:
            self._alarm = None
            if not self._woken:
                self._turn()

    def _fail(self, error):
        self.world.say(self, "fails: %s", error.reason)
        self._die(error.reason)
        if self.dialect and self.dialect.talks and not isinstance(error, (kmcast.Lost, kmcast.Refused)):
            try:
                self.server.leave(self.dialect.bye(ok=False, reason=error.reason))
            except kmcast.Gone:
                pass
        self.server.close()

    def _lost(self, error):
        return kmcast.Lost("lost the server: %s" % error)

    def _stall(self):
        stall = self.run.plan.client_stall
        return stall if self.window else min(stall or 5.0, 5.0)

    def _check_stall(self):
        if self._stall() and now - self.server.heard > self._stall():
            raise kmcast.Lost("the server has been silent for %g s" % self._stall())

    # ---- the greetings

    def _greet(self):
        self._check_stall()
        try:
            while not self.window:
                if not self.dialect:
                    message = self.server.first(lambda head: kmcast.GROUP_INFO.size)
                    if message is None:
                        return 0.5
                    version = kmcast.unpack_group_info(message)[2]
                    if version is None:
                        self.dialect = kmcast.BaseDialect
                        self.window = kmcast.ClientWindow(self.dialect, self.run.plan.payload,
                                                          checks=[kmcast.plain_crc, kmcast.c_sum])
                        break
                    self.dialect = kmcast.SessionDialect
                    self.server.send(kmcast.pack_frame(kmcast.HELLO, {
                        "version": "1", "host": self.plan.host, "stall": self.run.plan.client_stall}))
                message = self.server.first(lambda head: self.dialect.server_message_size(head, 0))
                if message is None:
                    return 0.5
                if message[:1] == kmcast.BYE:
                    raise kmcast.Refused("the server says: %s" % kmcast.unpack_frame(message[5:])["reason"])
                if message[:1] == kmcast.WELCOME:
                    fields = kmcast.unpack_frame(message[5:])
                    self.server.alive_every = kmcast.alive_every(kmcast.stall_of(fields))
                    self.window = kmcast.ClientWindow(self.dialect, fields["payload"],
                                                      (fields["salt"], fields["repair_salt"]),
                                                      fields["digest"] is not None)
        except kmcast.Gone as error:
            raise self._lost(error)
        self.world.say(self, "is welcome")
        self.writer = Writer(self)
        self.joined = True
        self._output = (0, now)
        self._phase = self._transfer
        self._hear()
        return 0

    # ---- the rounds

    def datagrams_come(self, datagrams):
        if not self.joined:
            return
        for data in datagrams:
            if len(self.datagrams) < self.plan.socket_buffer:
                self.datagrams.append(data)
        self.wake()

    def _transfer(self):
        window = self.window
        self._listen()
        todo = window.tick(now)
        if todo:
            self._carry_out(todo)
            self._hear()
        self._look_at_clocks()
        if self.writer.failure:
            raise kmcast.Failure(self.writer.failure)
        while self.writer.through:
            self.writer.through -= 1
            self.server.heard = now
            self._carry_out(window.written())
        self._hear()
        if self.server.outgoing.count:
            self._flush()
        if window.state == window.OVER:
            self._phase, self._finishing = self._finish, now
            return 0
        wait = min(0.5, self.server.alive_every / 2)
        if window.deadline is not None:
            wait = max(0, min(wait, window.deadline - now))
        self._spins = self._spins + 1 if not wait else 0
        if self._spins > 200:           # a turn in which time does not pass is for what came just now
            raise Finding("%s does not wait, but spins, in state %d" % (self, window.state))
        return wait

    def _listen(self):
        buffer, header = self.window.listening, kmcast.PACKET.size
        waiting, r = self.datagrams, self.world.random
        while waiting:
            data, count = waiting.popleft(), 1
            size = len(data)
            if size <= header:
                continue
            while waiting and len(waiting[0]) == size and count < 40 and r.random() < 0.9:
                data += waiting.popleft()       # as the kernel joins them
                count += 1
            if buffer:
                buffer.put(bytearray(data), 0, count, size - header)
        if buffer and self.window.listened(now):
            self.server.heard = now

    def _hear(self):
        window, server = self.window, self.server
        try:
            more = True
            while more:
                if window.wants is not None:
                    more = server.read_into(window.wants)
                    self._carry_out(window.filled(more, now))
                else:
                    for message in server.messages(window.size_of):
                        self.world.say(self, "hears %s", described(message))
                        self._carry_out(window.heard(message, now))
                    more = window.wants is not None
        except kmcast.Gone as error:
            raise self._lost(error)
        if server.sock.input.unread and window.state != window.STRAGGLERS and window.state != window.OVER:
            self.wake()

    def _flush(self):
        try:
            self.server.flush()
        except kmcast.Gone as error:
            try:
                self._hear()
            except (kmcast.Lost, kmcast.ProtocolError):
                pass
            raise self._lost(error)

    def _carry_out(self, todo):
        for verb, argument in todo:
            if verb == "send":
                self.world.say(self, "sends %s", described(argument))
                self.server.outgoing.put_tail(argument)
                self._flush()
            elif verb == "write":
                self.writer.give(*argument)
            elif verb == "end":
                self.fields = argument

    def _look_at_clocks(self):
        window, written = self.window, len(self.writer.output)
        moved = written != self._output[0]
        if moved or not window.unwritten:
            self._output = written, now
        if not window.owing:
            self._check_stall()
            self._owing_since = self._next_state = None
            return
        if self._owing_since is None:
            self._owing_since, self._next_state = now, now + 1.0
        if window.state == window.BYTES:
            self._check_stall()
            moved = self.server.heard > self._last_look
        elif self.run.plan.client_stall and now - self._output[1] > self.run.plan.client_stall:
            raise kmcast.Failure("the output has taken nothing")
        self._last_look = now
        if moved:
            self._show_life()
        if now > self._next_state and self.dialect.talks:
            self._next_state = now + 5.0
            self.server.outgoing.put_tail(self.dialect.state(busy="writing", written=written))
            self._flush()

    def _show_life(self):
        if self.dialect.talks:
            try:
                self.server.show_life(kmcast.ALIVE)
            except kmcast.Gone:
                pass

    # ---- the end

    def _finish(self):
        window, writer, stall = self.window, self.writer, self.run.plan.client_stall
        if writer.failure:
            raise kmcast.Failure(writer.failure)
        while writer.through:
            writer.through -= 1
            window.written()
        if window.unwritten:
            if len(writer.output) != self._output[0]:
                self._output = len(writer.output), now
                self._show_life()
            elif stall and now - max(self._finishing, self._output[1]) > stall:
                raise kmcast.Failure("the output has taken nothing")
            return min(0.5, self.server.alive_every / 2)
        if self.fields is not None:
            if self.fields["bytes"] != len(writer.output):
                raise kmcast.Failure("the image has %d bytes, not %d" % (len(writer.output), self.fields["bytes"]))
            if window.digest and self.fields["sha256"] != writer.hash.hexdigest():
                raise kmcast.Failure("the digest of the image differs")
        elif not writer.output and not self.run.plan.allow_empty:
            raise kmcast.Failure("the image is empty")
        writer.commit()
        self._phase = self._await_end
        return 0.1

    def _await_end(self):
        if self.writer.alive:
            self._show_life()
            return min(0.5, self.server.alive_every / 2)
        self.good = True
        self._phase = self._say_done
        self.world.say(self, "has the image")
        try:
            self.server.send(kmcast.DONE)
        except kmcast.Gone:
            return self._leave()
        return self._say_done()

    def _say_done(self):
        try:
            self.server.flush()
            self._check_stall()
        except (kmcast.Gone, kmcast.Lost):
            return self._leave()
        return 0.5 if self.server.outgoing.count else self._leave()

    def _leave(self):
        self.gone = self.ended = True
        self.joined = False
        self.server.close()
        return 0


def described(message):
    """A message for the trace."""
    for name in ("ALIVE", "READY", "REQUEST", "DONE", "SENT", "HELLO", "WELCOME", "AGAIN", "BYE", "STATE"):
        if message[:1] == getattr(kmcast, name):
            return {"READY": "READY/INFO", "REQUEST": "REQUEST/PACKETS"}.get(name, name) + " (%d bytes)" % len(message)
    return "%d bytes" % len(message)


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what must hold

class Run:
    """One transfer."""

    def __init__(self, seed, trace=False):
        self.seed, self.plan, self.world = seed, Plan(seed), World(seed, trace)
        kmcast.Buffer.live.clear()
        self.hosts = []
        self.server = Server(self)
        numbers = {}
        for plan in self.plan.clients:          # an address is a host's
            self.hosts.append(Host(self, plan, numbers.setdefault(plan.host, len(numbers) + 1)))
        self.most = 2 * self.plan.capacity * (self.plan.payload + kmcast.PACKET.size)       # bytes of two rounds
        self._watched = 0
        self.world.watch = self.watch

    def run(self):
        """Raises Finding, and whatever kmcast raises that it should not."""
        crashed = False
        try:
            self.server.serve()
        except Crash:
            crashed = True
            self.world.say("server", "CRASH")
            self.server.close()
        self.world.run(lambda: all(host.ended for host in self.hosts))
        self.verdict(crashed)

    def watch(self):
        """What must hold at any time; looked at now and then."""
        self._watched += 1
        if self._watched % 16:
            return
        server = self.server
        if not server.closed:
            served = set()
            for thread in server.threads:
                if set(thread.window.members) != set(thread.peers):
                    raise Finding("%s: its window has other members than it has connections" % thread.name)
                served |= set(thread.peers)
                for connection in thread.peers.values():
                    if connection.outgoing.size > self.most + 4096 or connection.incoming.size > self.most + 4096 + 65536:
                        raise Finding("memory: %d bytes are queued for %s" % (connection.outgoing.size, connection.origin))
            if server.roster.begun and not set(server.roster.here) <= served | set(
                    connection.member for thread in server.threads for connection in thread.passed_on):
                raise Finding("the roster has a client that no thread serves")
        for host in self.hosts:
            if host.ended or not host.window:
                continue
            if host.window.unwritten > kmcast.ClientWindow.AT_WORK:
                raise Finding("%s has %d rounds unwritten" % (host, host.window.unwritten))
            if host.server.incoming.size > self.most + 4096 or host.server.outgoing.size > self.most + 4096:
                raise Finding("memory: %d bytes are queued at %s" % (host.server.incoming.size, host))
        most = 4 + 5 * len(self.hosts)
        if len(kmcast.Buffer.live) > most:
            raise Finding("memory: %d buffers" % len(kmcast.Buffer.live))

    def verdict(self, crashed):
        """What must hold at the end."""
        plan, server = self.plan, self.server
        empty = not plan.image and not plan.allow_empty
        server_fault = plan.server_fault if crashed or server.failure in ("cannot read the image", "stopped by SIGTERM") else None
        for member in server.roster.everyone:
            if member.outcome is None and not server.failure and not crashed:
                raise Finding("%s has no outcome" % member)
        for host in self.hosts:
            member, said = host.member, host.member and host.member.outcome
            if host.good and bytes(host.writer.output) != plan.image:
                raise Finding("%s has a wrong image, and says that it is right" % host)
            if said == "complete" and not host.good:
                raise Finding("the server says that %s has the image, and it has not: %s" % (host, host.reason))
            refused = host.reason and kmcast.LATE in host.reason
            taking_part = member in server.roster.everyone
            if refused and taking_part:
                raise Finding("%s was refused, and takes part" % host)
            if plan.compat and not taking_part:
                continue                        # nobody can tell it why
            if host.plan.fatal or server_fault or empty or crashed or not taking_part:
                continue
            if plan.min_rate and member.sentence:
                continue
            if host.good and said != "complete":
                raise Finding("%s has the image, and the server says: %s" % (host, said or server.failure))
            if not host.good:
                raise Finding("%s did nothing wrong, and has not got the image: %s; the server says: %s"
                              % (host, host.reason, said or server.failure))


def one(seed, trace=False):
    """Run a seed; returns None, or what was found."""
    try:
        Run(seed, trace).run()
    except Finding as error:
        return "seed %d: %s" % (seed, error)
    except Exception:                           # whatever it is, it is one
        return "seed %d: %s" % (seed, traceback.format_exc().strip())
    return None


def many(seeds, path=KMCAST):
    """Run seeds; returns what was found."""
    if kmcast is None or kmcast.__file__ != path:
        load(path)
    return [found for found in map(one, seeds) if found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, help="replay this one, with every message")
    parser.add_argument("--until-found", action="store_true", help="stop at the first finding")
    parser.add_argument("--kmcast", default=KMCAST, help="the kmcast.py to test")
    options = parser.parse_args()
    if options.seed is not None:
        load(options.kmcast)
        found = one(options.seed, trace=True)
        print(found or "nothing was found")
        return 1 if found else 0
    began, size, findings = time.time(), 50, 0
    last = options.first + options.seeds
    parts = [range(start, min(start + size, last)) for start in range(options.first, last, size)]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(many, parts, [options.kmcast] * len(parts)):
            findings += len(found)
            for text in found:
                print(text, flush=True)
            if found and options.until_found:
                pool.shutdown(wait=True, cancel_futures=True)
                break
    print("%d seeds from %d on, %d findings, %.0f s" % (options.seeds, options.first, findings, time.time() - began))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
