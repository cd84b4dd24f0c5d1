#!/usr/bin/env python3
"""Fuzz kmcast: plays damaged sessions to its real server and its real client, and random bytes to its parsers.

    python3 tests/fuzz.py --endpoint client --rounds 100000 --seed 1
    python3 tests/fuzz.py --endpoint server --rounds 100000 --seed 1 --python ~/.pyenv/versions/2.7.18/bin/python
    python3 tests/fuzz.py --endpoint server --seed 1 --only 4711        # one case again; 4680-4719: those, in one session

A session is built message by message by wire.py, with no code of kmcast. Most cases then change it on the way:
bits flipped, messages cut, left out, sent twice, swapped, replaced, made up; lengths, counts and seqs at the ends of their
ranges; JSON with keys missing, of another type, absurdly large or deep; EOF, RST or silence at any point; bytes in odd
pieces; and datagrams lost, repeated, reordered, damaged, foreign. Each case follows from the seed and its number alone,
as far as timing lets it.

What is played to are real processes with real sockets on loopback: one process, which has imported kmcast, forks for each
transfer a child that calls kmcast.main(), so a case costs milliseconds.
    client   one transfer a case. It must end in time with exit code 0 and exactly the image, or 1 or 3, one line that says
             why, no file under the final name, and nothing in its output that is not the image's beginning
    server   one connection a case; PEERS of them beside one or two real clients in each transfer. The real clients must get
             the image, undamaged peers must be served, and the server must end in time with the right exit code, no thread
             or descriptor left and a bounded log
    relay    one transfer a case to a client in a chain. What its upstream sends is damaged, and so is who comes to its relay port;
             the server is honest. It must get the image, serve the follower that was named, and leave
    parsers  the functions that read a peer's bytes, called directly, against models where there are some
In all cases: no traceback, no "internal error", and memory within a bound.

Shortened in the processes under test, for speed: see PATCHES, CLIENT_STALL and SERVER_STALL. The end of a server's --start-wait
is when the driver says so.

A finding says how to play it again. Exit code: 0 nothing was found, 1 something was, 2 wrong usage.
The driver runs on Python 3.6 and later; what runs under --python, which is part of this file, on 2.7 as well.
"""

from __future__ import print_function

import argparse
import binascii
import collections
import hashlib
import json
import os
import random
import re
import resource
import select
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
import zlib

import wire
from wire import (AGAIN, ALIVE, BASE, BYE, DONE, HELLO, INFO, LOOPBACK, MASK, PACKETS, READY, REQUEST, Round, SENT, SESSION, SUMS,
                  U32, WELCOME, packet)

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)

#: What is changed in the processes under test: seconds that are only waited for, else a case would take that long.
PATCHES = {
    "TICK": 0.02,               # 0.5: the grain of all clocks
    "GREETING_TIME": 1.5,       # 5: for a HELLO, or an answer to it
    "FAREWELL_TIME": 0.2,       # 2: for a BYE to get through
    "ALIVE_EVERY": 0.3,         # 5: so that there is ALIVE in the sessions
}
CLIENT_STALL = 0.4              # --stall-timeout of clients that are played to, seconds
SERVER_STALL = 2.0              # --stall-timeout of servers that are played to: real clients must never be that slow
CASE_LIMIT = 15.0               # seconds after which a process is taken to hang; the machine may be busy
PEERS = 40                      # cases in one transfer of a server
MOST_KIB = 200 << 10            # of resident memory, in a process under test
JUMBO_KIB = 65536 * 8972 >> 10  # what the largest round of the base protocol takes, which a server may announce for fun


def random_bytes(generator, size):
    """Random bytes, on both Pythons."""
    return binascii.unhexlify(("%0*x" % (2 * size, generator.getrandbits(8 * size))).encode("ascii")) if size else b""


# ---------------------------------------------------------------------------------------------------------------------
# Changes

BOUNDARIES = (0, 1, 2, 3, 0x7f, 0x80, 0xff, 0xffff, 65536, 65537, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff)
WEIRD = (None, True, False, -1, 0, 1, 3, 1.5, 1e300, float("nan"), float("inf"), 1 << 31, 1 << 32, (1 << 32) - 1, 1 << 64,
         10 ** 400, "", "x", "x" * 5000, u"\x1b[31mred\x1b[0m\r\n\0", u"\ud83d\ude00", "sha256", "sha512", [], {}, [[]],
         {"a": {"b": []}}, 16, 20, 8960, 8961, 8964, 65536)
SILENCE, EOF, RESET = "silence", "EOF", "reset"


class Ended(Exception):
    """A connection is at its end, for a reason that is the argument."""


def change_bytes(generator, data):
    """`data` damaged in one way."""
    data = bytearray(data)
    if not data:
        return bytes(data)
    way, place = generator.randrange(8), generator.randrange(len(data))
    if way == 0:
        data[place] ^= 1 << generator.randrange(8)
    elif way == 1:
        for _ in range(generator.randrange(2, 9)):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif way == 2:
        data[place] = generator.choice((0, 1, 0x7f, 0x80, 0xff, generator.randrange(256)))
    elif way == 3:
        del data[place:]
    elif way == 4:
        del data[place:place + generator.randrange(1, 9)]
    elif way == 5:
        data[place:place] = random_bytes(generator, generator.choice((1, 2, 4, 16, 300)))
    elif way == 6:
        start = generator.randrange(len(data))
        data[place:place] = data[start:start + generator.randrange(1, 40)]
    else:
        # The integers stand behind a signal, or at a multiple of 4 in a group info, a buffer info or a packet.
        starts = list(range(generator.randrange(2), len(data) - 3, 4))
        if starts:
            start = generator.choice(starts[:6])
            number = U32.unpack(bytes(data[start:start + 4]))[0]
            number = generator.choice(BOUNDARIES + (number + 1, number - 1, number * 2, 65536 - number)) & MASK
            data[start:start + 4] = U32.pack(number)
    return bytes(data)


def change_frame(generator, data):
    """A frame with other JSON in it, and mostly the right length."""
    way = generator.randrange(10)
    try:
        fields = json.loads(data[5:].decode("utf-8"))
    except ValueError:
        return change_bytes(generator, data)
    text = None
    if way == 0:
        text = generator.choice(("", "{", "[]", "null", "0", '"x"', "{}", "[" * 60000, '{"a":' * 9000, "NaN", "9" * 65000,
                                 '{"version": ' + "9" * 4000 + "}", u"{\u00e9}", '{"version": "1", "version": 2}', " " * 65536))
    elif way == 1:
        text = json.dumps(fields)
        return data[:1] + U32.pack(generator.choice(BOUNDARIES + (len(text) + 1, len(text) - 1))) + text.encode("ascii")
    elif way == 2:
        return data[:5] + change_bytes(generator, data[5:])[:len(data) - 5].ljust(len(data) - 5, b"\xff")
    elif way <= 4:
        fields.pop(generator.choice(sorted(fields)))
    elif way == 5:
        fields["more"] = generator.choice(WEIRD)            # harmless: a later version may do that
    else:
        fields[generator.choice(sorted(fields))] = generator.choice(WEIRD)
    return wire.frame(data[:1], json.dumps(fields) if text is None else text)


class Line(wire.End):
    """One end of a TCP connection that says what a session says, changed as its case wants it.

    style   "clean": nothing is changed. "pieces": bytes in odd pieces, with pauses. "datagrams": only those are changed.
            "wild": all is
    others  messages to say instead, or besides
    """

    TIMEOUT = CASE_LIMIT

    def __init__(self, sock, generator, style, others, **options):
        wire.End.__init__(self, sock, **options)
        self.generator, self.style, self.others = generator, style, others
        self.changed = False            # whether the peer got anything but a right session
        self.held = b""                 # a message that is sent after the next one
        self._count = 0
        self._target = generator.choice((0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15)) if style == "wild" else None
        self._likely = generator.choice((0.0, 0.05, 0.3))

    def read(self, size):
        """Exactly `size` bytes. Raises Ended."""
        if self.changed:
            self.sock.settimeout(0.03)  # now the peer may just wait for what it does not get
        try:
            return wire.End.read(self, size)
        except socket.timeout:
            raise Ended("nothing comes")
        except OSError as error:
            raise Ended(str(error))
        except wire.Unexpected:
            raise Ended("closed by the peer")

    def say(self, *messages):
        """Send each message, or what becomes of it. Raises Ended."""
        for data in messages:
            index, self._count = self._count, self._count + 1
            held, self.held = self.held, b""
            if self.style == "wild" and (index == self._target or (index > self._target
                                                                   and self.generator.random() < self._likely)):
                data = self._change(data)
            self._write(data + held)

    def expect(self, *kinds):
        """A message of one of these kinds. Raises Ended, or Unexpected."""
        message = wire.End.expect(self, BYE, *kinds)
        if message.kind == BYE and BYE not in kinds:
            raise Ended("BYE: %s" % message.fields.get("reason"))
        return message

    def _change(self, data):
        generator, self.changed = self.generator, True
        way = generator.randrange(16)
        if way <= 3:
            return change_bytes(generator, data)
        if way <= 6:
            return (change_frame if data[:1] in (HELLO, WELCOME, BYE) and len(data) > 5 else change_bytes)(generator, data)
        if way == 7:
            return b""
        if way == 8:
            return data + data
        if way == 9:
            self.held = data
            return b""
        other = generator.choice(self.others)
        if way == 10:
            return other
        if way == 11:
            return generator.choice((data + other, other + data))
        if way == 12:
            return generator.choice((ALIVE * generator.choice((1, 3, 50, 3000)) + data,
                                     data + random_bytes(generator, generator.choice((1, 5, 100, 3000))),
                                     data * generator.choice((3, 100))))
        if generator.randrange(2):
            self._write(data[:generator.randrange(len(data) + 1)])
        end = generator.choice((EOF, EOF, RESET, RESET, SILENCE) if generator.randrange(3) == 0 else (EOF, RESET))
        if end == RESET:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == EOF and generator.randrange(2):
            try:
                self.sock.shutdown(socket.SHUT_WR)      # half-closed: it may still talk to us
            except OSError:
                raise Ended("closed by the peer")
            self._drain(0.03)
        elif end == SILENCE:
            self._drain(2 * SERVER_STALL)
        raise Ended("on purpose")

    def _drain(self, seconds):
        """Read whatever comes, for so long at the most."""
        self.sock.settimeout(seconds)
        deadline = time.time() + seconds
        try:
            while time.time() < deadline and self.sock.recv(65536):
                pass
        except OSError:
            pass

    def _write(self, data):
        try:
            if self.style == "pieces" or (self.style == "wild" and self.generator.randrange(8) == 0):
                while data and len(data) < 5000:
                    size = self.generator.choice((1, 1, 2, 3, 5, 16, 100, 1000))
                    self.sock.sendall(data[:size])
                    data = data[size:]
                    if self.generator.randrange(6) == 0:
                        time.sleep(0.001)
            self.sock.sendall(data)
        except OSError as error:
            raise Ended(str(error))


def change_datagrams(generator, datagrams, seqs_are_checked=True):
    """What a bad network makes of datagrams: the right ones may be missing, all others must do no harm."""
    share = generator.choice((0.02, 0.2, 0.9))
    result = []
    for data in datagrams:
        if generator.random() > share:
            result.append(data)
            continue
        way = generator.randrange(9)
        if way == 1:
            result += [data] * generator.randrange(2, 5)
        elif way == 2:
            # In the base protocol nothing checks the seq.
            bit = generator.randrange(0 if seqs_are_checked else 32, 8 * len(data))
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            result.append(bytes(damaged))
        elif way == 3:
            result.append(data[:generator.randrange(len(data))])
        elif way == 4:
            result.append(data + random_bytes(generator, generator.choice((1, 4, 200, 9000))))
        elif way == 5:
            result.append(random_bytes(generator, generator.choice((0, 1, 11, 12, 13, 100, 2000))))
        elif way == 6:
            result.append(data[:4] + random_bytes(generator, 4) + data[8:])
        elif way == 7 and seqs_are_checked:                 # another session's
            result += [packet(U32.unpack(data[:4])[0], data[12:], generator.getrandbits(32)), data]
    if generator.randrange(2):
        generator.shuffle(result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The session of a server, for the client endpoint

class ServerCase(object):
    """A server's side of one transfer, and what its client may make of it."""

    def __init__(self, seed, number, group, port):
        generator = self.generator = random.Random("client %d %d" % (seed, number))
        self.number = number
        self.group, self.port = group, port
        self.style = generator.choices(("clean", "pieces", "datagrams", "wild"), (3, 7, 15, 75))[0]
        self.session = generator.random() < 0.8
        self.digest = generator.random() < 0.85
        self.dialect = SESSION if self.session else BASE
        self.check = SESSION.check(self.digest) if self.session else generator.choice((wire.plain_crc, wire.c_sum))
        self.salt = generator.choice((0, 1, MASK, generator.getrandbits(32))) if self.session else 0
        self.repair_salt = generator.getrandbits(32)
        self.payload = generator.choice((16, 20, 100, 400, 1460)) if self.session else 1460
        self.coding = self.session and generator.random() < 0.5
        self.loses = generator.choice((0.0, 0.3, 0.3, 1.0))
        self.to_file = generator.random() < 0.3
        self.rounds = []
        rounds = generator.choice((0, 1, 1, 2, 3, 4, 6))
        for index in range(rounds):
            count = generator.choice((1, 1, 2, 3, 8, 12))
            sizes = [self.payload] * count
            if not self.session:
                sizes = [generator.choice((self.payload, generator.randrange(1, self.payload))) for _ in sizes]
            elif index == rounds - 1:
                sizes[-1] = generator.choice((self.payload, 1, generator.randrange(1, self.payload + 1)))
            self.rounds.append([random_bytes(generator, size) for size in sizes])
        self.image = b"".join(b"".join(payloads) for payloads in self.rounds)
        # In a session no round goes beyond the last seq; the next one begins with 0 again.
        fits = [wire.SEQS - sum(map(len, self.rounds[:index])) for index in range(1, rounds + 1)]
        self.base = generator.choice((0, 0, 1, generator.randrange(2 ** 31 - 100)) + tuple(fits)) if self.session else \
            generator.choice((0, 0, 1, 2 ** 32 - 3, generator.getrandbits(32)))
        self.repair_number = generator.choice((0, wire.REPAIR_BIT - 1000, generator.randrange(wire.REPAIR_BIT - 1000)))
        self.window = generator.choice((1, 2, 4, 4)) if self.session else 1
        self.ended = None

    def must_arrive(self):
        """Whether nothing happens here that a client may fail for."""
        return self.style != "wild"

    def play(self, sock, cast, forge, source):
        """Play it.

        cast, forge     functions of a list of datagrams, which multicast it: from where WELCOME says, and from elsewhere
        source          (address, port) that cast() multicasts from
        """
        self.cast, self.forge, self.source = cast, forge, list(source)
        try:
            self._play(Line(sock, self.generator, self.style, self._others(), dialect=self.dialect))
        except Ended as end:
            self.ended = str(end)
        except (wire.Unexpected, ValueError, KeyError) as error:
            # An answer that is none: only a client that was told nonsense may be that confused.
            self.ended = "cannot understand the client: %r" % error
        sock.close()

    def _cast(self, datagrams):
        if self.session and self.generator.randrange(4) == 0:       # a stranger who knows everything but the server's address
            self.forge([packet(U32.unpack(data[:4])[0], b"f" * (len(data) - 12), self.salt, self.check) for data in datagrams])
        if self.style in ("datagrams", "wild"):
            datagrams = change_datagrams(self.generator, datagrams, self.session)
        self.cast(datagrams)

    def _others(self):
        """What may be said instead of something right, or besides."""
        of, some = self.dialect, Round(self.generator.randrange(len(self.rounds) + 1), self.payload, self.base, 1, 0)
        # That the image has 0 bytes is believed to a server without digests, if it says so before any round.
        end = wire.bye(True, bytes=0 if self.digest else 1, sha256=None)
        return [ALIVE, of.ready(some), of.request(some, [0]), of.done(some), of.sent(some, hashlib.sha256().digest()),
                wire.hello(), wire.bye(False, reason="for fun"), end, of.packets(some),
                SESSION.sums(some, [0]), SESSION.sums(some, []), SESSION.ask_for_sums(some),
                SESSION.again(some, 0, 1, 1), SESSION.again(some, MASK, MASK, MASK), SESSION.again(some, 3, 0, 65536),
                of.info(some), of.info(some._replace(count=16384, size=16384 * self.payload)),
                of.info(some._replace(count=0, size=0)), of.info(some._replace(place=2 ** 64 - 1)),
                wire.state(waiting="for fun"), b"GET / HTTP/1.1\r\n\r\n", wire.welcome(),
                packet(self.base, b"x" * 16, self.salt, self.check)]

    def _play(self, line):
        line.say(wire.group_info(self.group, self.port, self.dialect.padding))
        if self.session:
            line.expect(HELLO)
            line.say(wire.welcome(payload=self.payload, salt=self.salt, repair_salt=self.repair_salt, window=self.window,
                                  source=self.source, digest="sha256" if self.digest else None))
        coming, underway = self._flights(), []
        while coming or underway:
            if self.session and self.generator.randrange(8) == 0:
                line.say(self.generator.choice((ALIVE, wire.state(waiting=None))))
            doable = []
            if coming and len(underway) < self.window:
                doable.append(self._announce)
            unsent = [flight for flight in underway if flight.how in (Flight.ANNOUNCED, Flight.READY)]
            if unsent and unsent[0].how == Flight.READY:
                doable.append(self._send)
            if [flight for flight in underway if flight.how == Flight.ASKED]:
                doable.append(self._repair)
            # A client may keep back what it has to say of later rounds, but not of the oldest.
            owed = underway and underway[0].how in (Flight.ANNOUNCED, Flight.SENT)
            if doable and not (owed and self.generator.randrange(3) == 0):
                self.generator.choice(doable)(line, coming, underway)
            else:
                self._hear(line, underway)
        if self.session:
            digest = hashlib.sha256(self.image).hexdigest() if self.digest else None
            line.say(wire.bye(True, bytes=len(self.image), sha256=digest))
            line.expect(DONE)

    def _flights(self):
        """All rounds: a list of Flights."""
        digest, base, place, flights = hashlib.sha256(), self.base, 0, []
        for number, payloads in enumerate(self.rounds + ([] if self.session else [[]])):
            data = b"".join(payloads)
            digest.update(data)
            what = Round(number, len(data), base, len(payloads), place)
            packets = [packet((base + i) % self.dialect.seqs, payload, self.salt, self.check)
                       for i, payload in enumerate(payloads)]
            flights.append(Flight(what, payloads, packets, self.dialect.sent(what, digest.digest() if self.digest else b"")))
            base, place = (base + len(payloads)) % self.dialect.seqs, place + len(data)
        return flights

    def _announce(self, line, coming, underway):
        flight = coming.pop(0)
        underway.append(flight)
        line.note(flight.what)
        line.say(self.dialect.info(flight.what))

    def _send(self, line, _coming, underway):
        flight = [flight for flight in underway if flight.how == Flight.READY][0]
        self._cast([data for data in flight.packets if self.generator.random() >= self.loses])
        line.say(flight.sent)
        flight.how = Flight.SENT

    def _hear(self, line, underway):
        message = line.expect(READY, REQUEST, DONE, SUMS)
        flight = [flight for flight in underway if flight.what == message.round][:1]
        before = {READY: Flight.ANNOUNCED, REQUEST: Flight.SENT, DONE: Flight.SENT, SUMS: Flight.SENT}[message.kind]
        if not flight or flight[0].how != before:
            raise ValueError("%r out of turn" % message)
        if message.kind == SUMS:        # it still owes its answer
            return line.say(SESSION.sums(message.round, wire.sums_of(flight[0].payloads)))
        flight[0].how = {READY: Flight.READY, REQUEST: Flight.ASKED, DONE: None}[message.kind]
        if message.kind == REQUEST:
            flight[0].places = message.places
            if max(message.places) >= len(flight[0].packets):
                raise ValueError("a request outside the round")
        elif message.kind == DONE:
            underway.remove(flight[0])

    def _repair(self, line, _coming, underway):
        flight = self.generator.choice([flight for flight in underway if flight.how == Flight.ASKED])
        what, packets, places = flight.what, flight.packets, flight.places
        by_tcp = flight.payloads if self.session and self.digest else packets
        flight.how = Flight.SENT
        if not (self.coding and self.generator.randrange(2)):
            if self.generator.randrange(2):
                line.say(self.dialect.packets(what, [by_tcp[place] for place in places]))
            else:                       # so that single packets are changed
                line.say(self.dialect.packets(what))
                line.say(*[by_tcp[place] for place in places])
            return
        groups, number = [[place] for place in places], self.repair_number
        for place in range(len(packets)):               # what the client has, to be XORed with what it lacks
            if place not in places and self.generator.randrange(2):
                self.generator.choice(groups).append(place)
        most = (self.payload - 4) // 2 - 1              # so that a recipe fits
        recipes, coded = wire.repair_pass(flight.payloads, [group[:most] for group in groups], number, self.payload)
        # A recipe that is wrong, but whose checksum is right, is a lie that only the digest can find out.
        if self.style == "wild" and self.digest and self.generator.randrange(3) == 0:
            line.changed = True
            place = self.generator.randrange(len(recipes))
            recipes[place] = change_bytes(self.generator, recipes[place])[:self.payload] or b"x"
        self.repair_number = number + len(recipes) + len(coded)
        if self.repair_number > wire.REPAIR_BIT - 100:  # a pass does not go beyond the last number
            self.repair_number = 0
        datagrams = [wire.repair(number + i, payload, self.repair_salt, self.check)
                     for i, payload in enumerate(recipes + coded) if self.generator.random() >= self.loses / 3]
        overtakes = self.generator.randrange(2)         # multicast and TCP go different ways
        if overtakes:
            self._cast(datagrams)
        line.say(SESSION.again(what, number, len(recipes), len(coded)))
        if not overtakes:
            self._cast(datagrams)
        line.say(flight.sent)


class Flight(object):
    """A round of a ServerCase between its buffer info and DONE: `how` it stands, and in ASKED the `places` asked for."""

    ANNOUNCED, READY, SENT, ASKED = "announced", "ready", "sent", "asked"

    def __init__(self, what, payloads, packets, sent):
        self.what, self.payloads, self.packets, self.sent = what, payloads, packets, sent
        self.how, self.places = self.ANNOUNCED, None


# ---------------------------------------------------------------------------------------------------------------------
# The session of a client, for the server endpoint

class PeerCase(object):
    """A client's side of a transfer, from a client that cannot be trusted."""

    def __init__(self, seed, number, window):
        generator = self.generator = random.Random("server %d %d" % (seed, number))
        self.number, self.window = number, window
        self.style = generator.choices(("clean", "pieces", "wild"), (4, 6, 90))[0]
        self.loses = generator.choice((0.0, 0.0, 0.2, 0.5, 1.0))
        self.greeted = threading.Event()        # it has a place, or will never have one
        self.served = False
        self.wrong = None                       # what the server did wrong, as far as it can be told
        self.bare = False                       # packets come by TCP without headers
        self.ended = None

    def play(self, port, compat, image):
        """Play it against a server on `port`."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.dialect, self.image = BASE if compat else SESSION, image
        try:
            sock.settimeout(CASE_LIMIT)
            sock.connect((LOOPBACK, port))
            self._play(Line(sock, self.generator, self.style, self._others(), dialect=self.dialect, hears_a_server=True))
        except Ended as end:
            self.ended = str(end)
        except (wire.Unexpected, OSError, ValueError, KeyError) as error:
            self.ended = "%r" % error
        finally:
            self.greeted.set()
            sock.close()

    def _others(self):
        """What may be said instead of something right, or besides."""
        of, some = self.dialect, Round(self.generator.randrange(3), 8 * 216, 0, 8, 0)
        return [ALIVE, of.ready(some), of.done(some), of.ready(some._replace(number=MASK)), of.done(wire.IMAGE),
                of.ask_for_sums(some), of.sums(some, [1, 2, 3])] + [
            of.request(some, places) for places in ([0], [7], range(8), range(9), [])] + [
                of.request(some._replace(number=99), [0]), REQUEST + U32.pack(MASK), wire.hello(), HELLO + U32.pack(MASK),
                wire.bye(False, reason=u"\x1b[31mfor fun\r\n"), wire.bye(True), wire.state(busy="writing", overflows=3),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]

    def _play(self, line):
        session = self.dialect.session
        if line.read(16)[8:] != self.dialect.padding:
            self.wrong = "its group info"
        self.salt, self.payload = 0, 0
        if session:
            line.say(wire.hello(host="fuzz", window=self.window))
            fields = line.expect(WELCOME).fields
            self.salt, self.payload = fields["salt"], fields["payload"]
            line.digest_size = 32 if fields["digest"] else 0
            self.bare = bool(fields["digest"])
        self.greeted.set()
        missing = {}                    # number of a round that is under way -> places; None: it was not SENT yet
        summed = set()                  # numbers of rounds whose sums were asked for
        kinds = (INFO, BYE) if session else (INFO,)
        while True:
            message = line.expect(*kinds)
            what = None if message.kind == BYE else message.round
            if message.kind == BYE:
                if message.fields["ok"]:
                    self._last_word(line)
                raise Ended("BYE: %s" % message.fields.get("reason"))
            if message.kind == INFO:
                missing[what.number] = None
                line.say(self.dialect.ready(what))
            elif what.number not in missing:
                raise ValueError("%r out of turn" % message)
            elif message.kind == AGAIN:
                missing[what.number] = [i for i in missing[what.number] if self.generator.randrange(2)]
            else:
                if message.kind == PACKETS:
                    self._take(line, what, missing[what.number])
                    missing[what.number] = []
                elif missing[what.number] is None:
                    missing[what.number] = [i for i in range(what.count) if self.generator.random() < self.loses]
                if message.kind == SUMS:
                    self._look_at_sums(line, message)
                    missing[what.number] = [i for i in range(what.count) if self.generator.randrange(8) == 0]
                elif session and not missing[what.number] and what.number not in summed and self.generator.randrange(5) == 0:
                    summed.add(what.number)
                    line.say(SESSION.ask_for_sums(what))
                    continue
                if missing[what.number]:
                    line.say(self.dialect.request(what, missing[what.number], *self._figures(line)))
                elif session or what.count:
                    del missing[what.number]
                    line.say(self.dialect.done(what, *self._figures(line)))
                else:
                    self._last_word(line)
            # In the base protocol only one thing can come, and that must be known to understand it.
            kinds = (INFO, SENT, PACKETS, SUMS, AGAIN, BYE) if session else (INFO,) if not missing else (
                PACKETS if missing[what.number] else SENT,)

    def _figures(self, line):
        """What it says of how it heard a round, if that can be said."""
        generator = self.generator
        if not self.dialect.session:
            return ()
        if line.style != "wild" or generator.randrange(2):
            return ()
        line.changed = True
        return ([generator.choice(BOUNDARIES + (generator.getrandbits(10), generator.getrandbits(20))) for _ in range(5)],)

    def _last_word(self, line):
        line.say(self.dialect.done(wire.IMAGE))
        self.served = not line.changed
        raise Ended("served")

    def _look_at_sums(self, line, message):
        start = message.round.place
        right = wire.sums_of(wire.cut(self.image[start:start + message.round.size], self.payload))
        if not line.changed and message.sums != right:
            self.wrong = "its sums"

    def _take(self, line, what, places):
        """Read packets that were asked for, and look at them."""
        for i in places:
            start = what.place + i * self.payload if self.payload else None
            if self.bare:
                data = line.packet(min(self.payload, what.size - i * self.payload))
                if not line.changed and data != self.image[start:start + self.payload]:
                    self.wrong = "a packet"
                continue
            seq, checksum, data = line.packet()
            if not line.changed and (seq != (what.base + i) % self.dialect.seqs
                                     or checksum != self.dialect.check(False)(data, self.salt + seq)
                                     or (self.payload and data != self.image[start:start + self.payload])):
                self.wrong = "a packet"


# ---------------------------------------------------------------------------------------------------------------------
# Processes under test

class Nursery(object):
    """A process that has imported kmcast and forks a child for each transfer."""

    def __init__(self, python):
        self._process = subprocess.Popen([python, os.path.abspath(__file__), "--nursery"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, preexec_fn=os.setsid)
        self._lock = threading.Lock()
        self._jobs = {}
        self._count = 0
        self._reader = threading.Thread(target=self._read)
        self._reader.daemon = True
        self._reader.start()

    def start(self, args, out, err):
        """Have kmcast.main(args) run with stdout and stderr to those files. Returns a Job."""
        for path in (out, err, err + ".go"):
            try:
                os.unlink(path)         # what another process has said is not this one's
            except OSError:
                pass
        with self._lock:
            self._count += 1
            job = self._jobs[self._count] = Job(err)
            line = json.dumps({"job": self._count, "args": [str(arg) for arg in args], "out": out, "err": err})
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
        return job

    def _read(self):
        for line in iter(self._process.stdout.readline, b""):
            report = json.loads(line.decode("ascii"))
            self._jobs[report["job"]].report(report)
            if "code" in report:
                del self._jobs[report["job"]]

    def close(self):
        """End it, and all that it has started."""
        self._process.stdin.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:
            pass
        self._process.wait()


class Job(object):
    """A process under test.

    After its end: `.code`, `.peak` (KiB), `.seconds`, `.threads` and `.descriptors` that were left.
    """

    def __init__(self, err):
        self.err = err
        self.pid = None
        self.started, self.ended = threading.Event(), threading.Event()

    def report(self, report):
        """Take what the nursery says."""
        self.__dict__.update(report)
        (self.ended if "code" in report else self.started).set()

    def stderr(self):
        """What it has said until now."""
        try:
            with open(self.err, "rb") as said:
                return said.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def kill(self):
        """End it with the traceback of each thread (Python 3) in its stderr."""
        self.started.wait(CASE_LIMIT)
        for number in (signal.SIGABRT, signal.SIGKILL):
            try:
                os.kill(self.pid, number)
            except OSError:
                pass
            if self.ended.wait(2):
                return


def nursery():
    """The process of a Nursery; runs on Python 2.7 and 3."""
    sys.path.insert(0, ROOT)
    import kmcast
    for name in PATCHES:
        if not hasattr(kmcast, name):
            raise SystemExit("kmcast.%s is gone; see PATCHES" % name)
        setattr(kmcast, name, PATCHES[name])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reports = os.fdopen(os.dup(1), "wb", 0)
    running = {}                        # a pipe that its end closes -> (job, pid, when it began)
    while True:
        for readable in select.select([0] + list(running), [], [])[0]:
            if readable:
                job, pid, began = running.pop(readable)
                left = os.read(readable, 100)
                os.close(readable)
                _, status, usage = os.wait4(pid, 0)
                threads, descriptors = [int(number) for number in left.split()] or (0, 0) if left else (0, 0)
                report = {"job": job, "peak": usage.ru_maxrss, "seconds": time.time() - began, "threads": threads,
                          "descriptors": descriptors,
                          "code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)}
            else:
                line = b""
                while not line.endswith(b"\n"):
                    byte = os.read(0, 1)
                    if not byte:
                        return
                    line += byte
                task = json.loads(line.decode("ascii"))
                ours, its = os.pipe()
                pid = os.fork()
                if not pid:
                    for fd in list(running) + [ours]:
                        os.close(fd)
                    bring_up(kmcast, task, its)
                os.close(its)
                running[ours] = task["job"], pid, time.time()
                report = {"job": task["job"], "pid": pid}
            reports.write(json.dumps(report).encode("ascii") + b"\n")


def bring_up(kmcast, task, pipe):
    """Be the process under test; does not return."""
    code = 99
    try:
        for fd, path in ((0, os.devnull), (1, task["out"]), (2, task["err"])):
            opened = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, fd)
            os.close(opened)
        try:
            import faulthandler
            faulthandler.enable()
        except ImportError:             # Python 2
            pass
        # --start-wait is over when the driver says so: it knows when all have greeted.
        begin = kmcast.Roster.begin
        kmcast.Roster.begin = lambda self, now: begin(self, now * 1000 if os.path.exists(task["err"] + ".go") else 0)
        before = len(os.listdir("/proc/self/fd"))
        try:
            code = kmcast.main(task["args"])
        except SystemExit as end:
            code = end.code
        left = (threading.active_count() - 1, len(os.listdir("/proc/self/fd")) - before)
        os.write(pipe, ("%d %d" % left).encode("ascii"))
    except BaseException:               # pylint: disable=broad-except
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Playing, and judging what comes of it

class Findings(object):
    """Counts cases and says what was found."""

    def __init__(self, endpoint, seed, python):
        self.endpoint, self.seed, self.python = endpoint, seed, python
        self.cases = self.found = 0
        self.codes, self.reasons = collections.Counter(), collections.Counter()
        self.peak = 0
        self.slowest = 0.0
        self.began = time.time()
        self._lock = threading.Lock()
        self._said = self.began

    def done(self, job, cases=1):
        """Count cases."""
        with self._lock:
            self.cases += cases
            self.codes[job.code] += 1
            for line in job.stderr().splitlines():
                if "error: " in line:
                    self.reasons[re.sub(r"[0-9]+|0x[0-9a-f]+", "#", line.split("error: ", 1)[1])[:70]] += 1
            self.peak = max(self.peak, job.peak)
            self.slowest = max(self.slowest, job.seconds)
            if time.time() - self._said > 60:
                self._said = time.time()
                print("... %d cases, %.0f a second, %d findings" % (
                    self.cases, self.cases / (time.time() - self.began), self.found), flush=True)

    def add(self, only, what, details=""):
        """Say what was found in case `only` (a number, or text A-B)."""
        with self._lock:
            self.found += 1
            print("FINDING in case %s: %s\n  again: python3 tests/fuzz.py --endpoint %s --seed %d --python %s --only %s\n%s" % (
                only, what, self.endpoint, self.seed, self.python, only,
                "\n".join("    | " + line for line in details[-30000:].splitlines())), flush=True)

    def summary(self):
        """Say how it went; returns an exit code."""
        seconds = time.time() - self.began
        print("%s: %d cases in %.0f s, %.0f a second, seed %d, %s: %d findings" % (
            self.endpoint, self.cases, seconds, self.cases / max(0.001, seconds), self.seed, self.python, self.found))
        if self.codes:
            print("  exit codes %s; peak memory %d KiB; longest process %.1f s" % (
                dict(self.codes), self.peak, self.slowest))
            for reason, count in self.reasons.most_common(60):
                print("  %6d  %s" % (count, reason))
        return 1 if self.found else 0


def judge_process(job, name, most_kib=MOST_KIB):
    """What is wrong with a process that has ended, whatever was played to it: a list of texts."""
    said = job.stderr()
    wrong = []
    if job.code not in (0, 1, 3):
        wrong.append("%s ended with %d" % (name, job.code))
    if "Traceback" in said or "internal error" in said:
        wrong.append("%s failed in itself" % name)
    if not re.match(r"[ -~\n]*\Z", said):
        wrong.append("%s let control characters into its log" % name)
    if max([len(line) for line in said.splitlines()] or [0]) > 600:
        wrong.append("%s said a line of %d characters" % (name, max(len(line) for line in said.splitlines())))
    if job.peak > most_kib:
        wrong.append("%s took %d KiB" % (name, job.peak))
    if job.seconds > CASE_LIMIT:
        wrong.append("%s took %.1f s" % (name, job.seconds))
    return wrong


def fuzz_client(findings, nursery_, numbers, seed, worker, folder):
    """Play the cases that the iterator `numbers` gives, one after the other."""
    group = "239.255.90.%d" % (1 + worker)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(5)
    listener.settimeout(CASE_LIMIT)
    port = listener.getsockname()[1]
    udp, stranger = wire.group_sender(group, port), wire.group_sender(group, port)

    def cast_from(sock):
        def cast(datagrams):
            for data in datagrams:
                try:
                    sock.send(data)
                except OSError:
                    pass
        return cast
    out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
    target = os.path.join(folder, "target")
    os.mkdir(target)
    for number in numbers:
        case = ServerCase(seed, number, group, port)
        image = os.path.join(target, "image")
        args = ["client", "--allow-empty", "--wait", 0, "--stall-timeout", CASE_LIMIT if case.must_arrive() else CLIENT_STALL]
        job = nursery_.start(args + (["-o", image] if case.to_file else []) + [LOOPBACK, LOOPBACK, port], out, err)
        case.play(listener.accept()[0], cast_from(udp), cast_from(stranger), udp.getsockname())
        wrong = []
        if not job.ended.wait(CASE_LIMIT):
            wrong = ["the client hangs"]
            job.kill()
        wrong += judge_process(job, "the client", MOST_KIB if case.session else MOST_KIB + JUMBO_KIB)
        said = job.stderr()
        written = b""
        if job.code == 0 or not case.to_file:
            try:
                with open(image if case.to_file else out, "rb") as output:
                    written = output.read()
            except OSError:
                wrong.append("exit code 0, and no file")
        if job.code == 0 and written != case.image:
            # In the base protocol nothing but a round of no packets marks the end, so a server that says it early is believed.
            boundaries = [b"".join(b"".join(payloads) for payloads in case.rounds[:i]) for i in range(len(case.rounds) + 1)]
            if case.session or case.must_arrive() or written not in boundaries:
                wrong.append("exit code 0, and %d bytes that are not the image of %d" % (len(written), len(case.image)))
        if job.code != 0:
            if case.must_arrive():
                wrong.append("the client fails without a reason")
            if case.session and case.digest and not case.image.startswith(written):
                wrong.append("unverified bytes were written")
            errors = [line for line in said.splitlines() if "error: " in line]
            if len(errors) != 1:
                wrong.append("%d error lines" % len(errors))
        for name in os.listdir(target):
            path = os.path.join(target, name)
            with open(path, "rb") as left:
                # After a session's BYE the image is complete and verified, even if the server is gone when the client says so.
                if job.code != 0 and (name != "image" or left.read() != case.image):
                    wrong.append("it left %s" % name)
            os.unlink(path)
        findings.done(job)
        if wrong:
            findings.add(number, "; ".join(wrong), "style %s, session %s, digest %s, script's end: %s\n%s" % (
                case.style, case.session, case.digest, case.ended, said))
    for sock in (listener, udp, stranger):
        sock.close()


def fuzz_server(findings, nursery_, sessions, seed, worker, folder):
    """Play the transfers that the iterator `sessions` gives: lists of numbers of cases."""
    group = "239.255.91.%d" % (1 + worker)
    probe = socket.socket()
    probe.bind((LOOPBACK, 0))           # stays bound: nobody else gets it
    port = probe.getsockname()[1]
    probe.close()
    port = 20000 + (port + os.getpid()) % 12000
    for numbers in sessions:
        generator = random.Random("transfer %d %d" % (seed, numbers[0] // PEERS))
        compat = generator.random() < 0.2
        window = generator.choice((1, 2, 4, 9))             # the smallest of all is everybody's
        cases = [PeerCase(seed, number, window) for number in numbers]
        image = random_bytes(generator, generator.choice((0, 1, 216 * 8, 216 * 20, 216 * 33 + 100)))
        clients = generator.choice((1, 1, 2))
        path = os.path.join(folder, "image")
        with open(path, "wb") as file:
            file.write(image)
        args = ["server", "--allow-empty", "-i", path, "--mtu", 256, "--buffer-packets", generator.choice((1, 8, 8, 8, 64)), "--group", group,
                "--stall-timeout", SERVER_STALL, "--start-wait", 60, "--rate", generator.choice(("max", "auto", "100M")),
                "--clients-per-thread", generator.choice((1, 5, 64))]
        args += ["--compat"] if compat else []
        args += ["--no-digest"] if generator.randrange(8) == 0 else []
        args += ["--unicast"] if generator.randrange(8) == 0 else []
        while True:
            port = 20000 + (port + 1) % 12000
            server = nursery_.start(args + [LOOPBACK, len(cases) + clients, port],
                                    os.path.join(folder, "s.out"), os.path.join(folder, "s.err"))
            while "waiting for" not in server.stderr() and not server.ended.wait(0.002):
                pass
            if "cannot listen" not in server.stderr():
                break
        real = [nursery_.start(["client", "--allow-empty", LOOPBACK, LOOPBACK, port],
                               os.path.join(folder, "c%d.out" % i), os.path.join(folder, "c%d.err" % i)) for i in range(clients)]
        for job in real:
            deadline = time.time() + CASE_LIMIT
            while "connected to" not in job.stderr() and not job.ended.is_set() and time.time() < deadline:
                time.sleep(0.002)
        threads = [threading.Thread(target=case.play, args=(port, compat, image)) for case in cases]
        for thread in threads:
            thread.start()
        deadline = time.time() + 1
        for case in cases:
            case.greeted.wait(max(0, deadline - time.time()))
        open(server.err + ".go", "w").close()
        wrong = []
        for name, job in [("the server", server)] + [("a real client", job) for job in real]:
            if not job.ended.wait(2 * CASE_LIMIT):
                wrong.append("%s hangs" % name)
                job.kill()
            wrong += judge_process(job, name)
        for thread in threads:
            thread.join()
        said = server.stderr()
        for i, job in enumerate(real):
            with open(os.path.join(folder, "c%d.out" % i), "rb") as output:
                if job.code != 0:
                    wrong.append("a real client failed")
                elif output.read() != image:
                    wrong.append("a real client got other bytes")
        served = re.search(r"(\d+) of (\d+) clients have the image", said)
        good = clients + len([case for case in cases if case.served])
        if not served or int(served.group(1)) < good:
            wrong.append("the server served less than %d" % good)
        elif server.code != (0 if served.group(1) == served.group(2) else 3):
            wrong.append("the server's exit code is %d" % server.code)
        if server.threads or server.descriptors:
            wrong.append("%d threads and %d descriptors were left" % (server.threads, server.descriptors))
        if said.count("\n") > 45 + 3 * (len(cases) + clients):        # the table at the end has 20 rows
            wrong.append("a log of %d lines" % said.count("\n"))
        findings.done(server, len(cases))
        only = "%d-%d" % (numbers[0], numbers[-1]) if len(numbers) > 1 else numbers[0]
        if wrong:
            findings.add(only, "; ".join(wrong), "compat %s, %s\n%s\n%s" % (
                compat, args, said, "\n".join(job.stderr() for job in real)))
        for case in cases:
            if case.style != "wild" and not case.served and not wrong:
                findings.add(case.number, "an undamaged peer was not served: %s" % case.ended, said)
            if case.wrong:
                findings.add(case.number, "the server got %s wrong" % case.wrong, said)


class ChainCase(object):
    """A client between neighbours of ours, and a server that gives it all that they do not bring."""

    PAYLOAD = 64

    def __init__(self, seed, number):
        self.generator = generator = random.Random("relay %d %d" % (seed, number))
        self.digest = generator.choice(("sha256", "sha256", None))
        self.parts = [random_bytes(generator, self.PAYLOAD * generator.choice((1, 2, 7, 700)) - generator.randrange(self.PAYLOAD))
                      for _ in range(generator.randrange(1, 5))]
        self.honest = generator.randrange(4) == 0           # the upstream
        self.token, self.upstream_token = random_bytes(generator, 16), random_bytes(generator, 16)
        self.wrong = []

    image = property(lambda self: b"".join(self.parts))

    def play(self, server):
        """Be the server of a client that has connected, and have neighbours beside it."""
        server.greet(payload=self.PAYLOAD, digest=self.digest)
        server.fields_of_welcome.update(payload=self.PAYLOAD, digest=self.digest)
        server.payload, server.check = self.PAYLOAD, wire.SESSION.check(self.digest)
        server.say(wire.follower(self.token))
        comers = self._come(server.expect(wire.RELAY).fields["port"])
        listener = socket.socket()
        listener.bind((LOOPBACK, 0))
        listener.listen(5)
        listener.settimeout(CASE_LIMIT)
        server.say(wire.upstream(0, listener.getsockname()[1], self.upstream_token))
        upstream = listener.accept()[0]
        listener.close()
        rounds = server.start_rounds(self.parts)
        neighbours = [threading.Thread(target=self._lead_it, args=(upstream,)),
                      threading.Thread(target=self._take, args=(comers[-1],))]
        for thread in neighbours:
            thread.start()
        server.say(*[server.sent(what) for what in rounds])
        left = set(what.number for what in rounds)
        while left:
            message = server.hear()
            if message.kind == REQUEST:
                server.give(message.places, message.round)
            elif message.kind == SUMS:
                server.say(server.dialect.sums(message.round, wire.sums_of(server.payloads(message.round))))
            elif message.kind == DONE:
                left.discard(message.round.number)
        server.last_words()
        while server.hear().kind != DONE:
            pass
        for thread in neighbours:
            thread.join()
        for sock in comers + [upstream]:
            sock.close()

    def _lead_it(self, sock):
        """Be its upstream."""
        generator, stream = random.Random(self.generator.random()), []
        for number, part in enumerate(self.parts):
            step = self.PAYLOAD * generator.choice((1, 3, 100, 1000))
            starts = list(range(0, len(part), step))
            if generator.randrange(2):
                generator.shuffle(starts)
            stream += [wire.piece(number, start // self.PAYLOAD, part[start:start + step], self.digest) for start in starts]
            stream += [wire.STILL_HERE] * generator.randrange(2) + [wire.piece(number, 0, b"")]
        data = b"".join(stream)
        for _ in range(0 if self.honest else generator.randrange(1, 4)):
            data = change_bytes(generator, data)
        try:
            sock.settimeout(CASE_LIMIT)
            for size in iter(lambda: generator.choice((1, 5, 100, 4000, 300000)), 0):
                if not data:
                    break
                sock.sendall(data[:size])
                data = data[size:]
            if not self.honest:         # else it waits for what does not come
                wire.reset(sock) if generator.randrange(2) else sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass                        # it does not want to hear that

    def _come(self, port):
        """Be who comes to its relay port: strangers, and at last the follower; returns the connections."""
        generator, comers = self.generator, []
        for _ in range(generator.choice((0, 1, 5, 20))):
            words = b"x" + self.token[1:] + U32.pack(generator.choice((0, 1, 5, MASK)))
            comers.append(generator.choice((b"", words[:19], random_bytes(generator, 300), words, change_bytes(generator, words))))
        comers = [words for words in comers if not words.startswith(self.token)] + [self.token + U32.pack(0)]
        return [self._connect(port, words) for words in comers]

    @staticmethod
    def _connect(port, words):
        sock = socket.create_connection((LOOPBACK, port), CASE_LIMIT)
        try:
            sock.sendall(words)
        except OSError:
            pass                        # it was a stranger too many
        return sock

    def _take(self, sock):
        """Be the follower: take pieces up to the last mark. Of an honest upstream they are rounds, as far as it came in time."""
        end, found, marks = wire.End(sock), {}, set()
        try:
            while len(marks) < len(self.parts):
                head = end.read(12)
                number, first, size = struct.unpack("<3I", head)
                if size:
                    data = found[number, first] = end.read(size)
                    if not self.digest and end.read(4) != U32.pack(zlib.crc32(head + data) & MASK):
                        self.wrong.append("a piece with a wrong checksum")
                elif number != MASK:
                    marks.add(number)
        except (OSError, wire.Unexpected) as error:
            self.wrong.append("the follower: %r" % (error,))
        for number in marks if self.honest or not self.digest else ():
            whole = b"".join(found[key] for key in sorted(found) if key[0] == number)
            if whole not in (b"", self.parts[number]):
                self.wrong.append("the follower got other bytes")


def fuzz_relay(findings, nursery_, numbers, seed, worker, folder):
    """Play the cases that the iterator `numbers` gives, one after the other."""
    server = wire.Server(window=4, unicast=True)
    out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
    for number in numbers:
        case, wrong = ChainCase(seed, number), []
        job = nursery_.start(["client", "--wait", 0, LOOPBACK, LOOPBACK, server.port], out, err)
        try:
            case.play(server.accept())
        except (OSError, wire.Unexpected) as error:
            wrong.append("the server heard %r" % (error,))
        server.sock.close()
        if not job.ended.wait(CASE_LIMIT):
            wrong.append("the client hangs")
            job.kill()
        wrong += judge_process(job, "the client") + case.wrong
        with open(out, "rb") as output:
            if job.code != 0 or output.read() != case.image:
                wrong.append("exit code %d, or other bytes" % job.code)
        if job.threads or job.descriptors > 0:
            wrong.append("%d threads and %d descriptors were left" % (job.threads, job.descriptors))
        findings.done(job)
        if wrong:
            findings.add(number, "; ".join(wrong), "digest %s, honest %s\n%s" % (case.digest, case.honest, job.stderr()))
    server.close()


# ---------------------------------------------------------------------------------------------------------------------
# Parsers

class FakeSocket(object):
    """What a Peer reads from."""

    def __init__(self, pieces):
        self.pieces = pieces

    def recv(self, size):
        piece = self.pieces.pop(0) if self.pieces else b""
        if len(piece) > size:
            self.pieces.insert(0, piece[size:])
        return piece[:size]

    def recv_into(self, view):
        piece = self.recv(len(view))
        view[:len(piece)] = piece
        return len(piece)

    @staticmethod
    def send(data, _flags=0):
        return len(data)

    @staticmethod
    def fileno():
        return 0

    def close(self):
        self.pieces = []


def pieces_of(generator, data):
    """`data` cut at random."""
    pieces = []
    while data:
        size = generator.choice((1, 1, 2, 5, 30, 1000, 100000))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def parse_frames(kmcast, generator):
    """unpack_frame, field, unpack_group_info."""
    fields = generator.choice((wire.welcome_fields(), wire.hello_fields(), {"ok": True, "bytes": 5, "sha256": None}))
    data = change_frame(generator, wire.frame(WELCOME, fields))
    if generator.randrange(3) == 0:
        data = change_bytes(generator, data)
    try:
        got = kmcast.unpack_frame(data[5:])
        for key in sorted(fields):
            for kinds in (kmcast.NUMBER, kmcast.TEXT):
                try:
                    value = kmcast.field(got, key, kinds, generator.randrange(2))
                except kmcast.ProtocolError:
                    continue
                assert value is None or isinstance(value, kinds)
                if value is not None and kinds is kmcast.TEXT:
                    assert len(value) <= 200 and re.match("[ -~]*$", value), repr(value)
    except kmcast.ProtocolError as error:
        assert re.match("[ -~]{,300}$", str(error)), str(error)
    data = wire.group_info("239.1.2.3", 18383)
    data = change_bytes(generator, data)[:16].ljust(16, b"\0")
    try:
        group, port, version = kmcast.unpack_group_info(data)
        assert 224 <= int(group.split(".")[0]) <= 239 and 0 < port < 65536
        assert version is None or 0 <= version < 256
    except kmcast.ProtocolError:
        pass


def parse_messages(kmcast, generator):
    """Connection.messages: the same, however the bytes are cut."""
    dialect, ours = generator.choice(((kmcast.SessionDialect, SESSION), (kmcast.BaseDialect, BASE)))
    counts = dict((number, generator.choice((1, 8, 100, 65536))) for number in range(3))

    def count_of(number):
        if number is not None and number not in counts:
            raise kmcast.ProtocolError("no such round")
        return counts[number or 0]

    def one():
        number = generator.randrange(3) if ours.session else 0
        some = Round(number, counts[number], 0, counts[number], 0)
        messages = [ours.ready(some), ours.done(some), ours.request(some, range(generator.choice((1, 8))))]
        return generator.choice(messages + ([ALIVE, ours.ask_for_sums(some), wire.hello(), wire.bye(False, reason="x"), wire.state()] if ours.session
                                            else []))
    messages = [one() for _ in range(generator.randrange(1, 12))]
    data = b"".join(messages)
    if generator.randrange(3):
        for _ in range(generator.randrange(1, 4)):
            data = change_bytes(generator, data)

    def received(pieces):
        peer = kmcast.Connection(FakeSocket(pieces), "test")
        got = []
        try:
            while True:
                for message in peer.messages(lambda head: dialect.client_message_size(head, count_of)):
                    got.append(bytes(message))
                    if message[:1] == REQUEST:
                        try:
                            count = count_of(dialect.number_of(message))
                            assert 0 < dialect.asked(message, 0, count)[0] < 1 << count
                            assert len(dialect.figures_of(message) or range(5)) == 5
                        except kmcast.ProtocolError:
                            pass
        except kmcast.Gone:
            return got, "gone"
        except kmcast.ProtocolError as error:
            return got, str(error)
    whole, end = received([data] if data else [])
    cut, cut_end = received(pieces_of(generator, data))
    assert end == cut_end, (end, cut_end)
    # What came in one piece with what is wrong may be lost with it.
    assert cut[:len(whole)] == whole and data.startswith(b"".join(cut)), (whole, cut)
    assert end != "gone" or whole == cut


def parse_bits(kmcast, generator):
    """What is missing, from the wire and back."""
    count = generator.choice((1, 7, 8, 9, 100, 1000) * 3 + (65536,))
    most = generator.choice((1, min(count, 50)))
    places = sorted(set(generator.randrange(count) for _ in range(most)))
    if generator.randrange(4) == 0:
        places = list(range(generator.randrange(count), count))
    what, gaps = Round(3, count, 5, count, 0), wire.bits(places)
    said = SESSION.request(what, places, wire.NO_FIGURES)
    assert kmcast.SessionDialect.request(3, wire.NO_FIGURES, gaps, 5, count) == said
    assert kmcast.SessionDialect.asked(said, 5, count) == (gaps, None)
    assert kmcast.places(gaps) == places and kmcast.how_many(gaps) == len(places)
    assert [place for start, stop in kmcast.runs(gaps) for place in range(start, stop)] == places
    flags = bytearray(b"\1" * count)
    for place in places:
        flags[place] = 0
    assert kmcast.gaps_of(flags) == gaps
    # Whatever else comes is bits of the round, or an error.
    bitmap = change_bytes(generator, said[25:])[:len(said) - 25].ljust(len(said) - 25, b"\xff")
    try:
        assert 0 < kmcast.from_bitmap(bitmap, count) < 1 << count
    except kmcast.ProtocolError:
        pass


def scatter(kmcast, buffer, first, datagrams, size):
    """Give a Buffer datagrams as a kernel would that expects those from index `first` on, and has joined them."""
    headers, data, at = bytearray(len(buffer.headers)), b"".join(datagrams), 0
    for index in range(first, min(buffer.capacity, first + kmcast.MOST_SEGMENTS)):
        for where, width in ((headers, 12), (buffer.payloads, buffer.payload)):
            piece = data[at:at + width]
            where[index * width:index * width + len(piece)] = piece
            at += len(piece)
    if 12 + size in (buffer.slot, len(data)) and buffer.in_place(headers, first, len(datagrams), len(data)):
        buffer.arrived(first, first + len(datagrams))
    else:
        buffer.put(bytearray(data), 0, len(datagrams), size)


def parse_packets(kmcast, generator):
    """Buffer.put, and packets that come straight to their place, against a model: with checksums, and where a digest is
    for finding out."""
    payload = generator.choice((16, 20, 64))
    count = generator.choice((1, 2, 7, 40, 150))
    any_size = generator.randrange(4) == 0
    checking = any_size or generator.randrange(2) == 0
    base = generator.choice((0, 5, 2 ** 32 - 1, 2 ** 32 - 4, generator.getrandbits(32)))
    salt = generator.choice((0, MASK, generator.getrandbits(32)))
    sizes = [payload] * count
    if any_size:
        sizes = [generator.choice((payload, generator.randrange(1, payload))) for _ in sizes]
    elif generator.randrange(2):
        sizes[-1] = generator.randrange(1, payload + 1)
    payloads = [random_bytes(generator, size) for size in sizes]
    check = SESSION.check(not checking)
    buffer = kmcast.Buffer(payload, count + generator.randrange(3), salt, (zlib.crc32,) if checking else ())
    if generator.randrange(2):          # it was in use before
        buffer.start(base - 3, count, count * payload)
        buffer.put(bytearray(packet((base - 3) & MASK, b"o" * payload, salt, check)), 0, 1, payload)
    buffer.start(base, count, None if any_size else sum(sizes))
    have, wrong = set(), set()          # places; wrong are those that have come damaged, and were taken
    for _ in range(generator.randrange(1, 30)):
        first = generator.randrange(count)
        places = list(range(first, min(count, first + generator.choice((1, 2, 5, 50, 128)))))
        if generator.randrange(4) == 0:
            generator.shuffle(places)
        data, size, taken = [], len(payloads[places[0]]), []        # taken: (place, is right) as they come
        for place in places[:kmcast.Batch.MOST // 2]:
            if len(payloads[place]) != size:
                break
            one = packet((base + place) & MASK, payloads[place], salt, check)
            way = generator.randrange(20)
            if way == 0:
                one = packet((base + place + generator.choice((count, -1, 70000, 2 ** 31))) & MASK, payloads[place], salt, check)
                if (U32.unpack(one[:4])[0] - base) & MASK < count:
                    break
            elif way == 1:              # in the payload only a checksum or a digest tells, in the header anybody does
                damaged, at = bytearray(one), generator.randrange(4, len(one))
                damaged[at] ^= 1 << generator.randrange(8)
                one = bytes(damaged)
                if at >= 12:
                    taken.append((place, False))
            elif way == 2:
                data.append(one)
                taken += [(place, True)] * 2
            else:
                taken.append((place, True))
            data.append(one)
        nothing_there = not have.intersection(range(first, first + kmcast.MOST_SEGMENTS))
        for place, right in taken:
            if place not in have and (right or not checking):
                have.add(place)
                if not right:
                    wrong.add(place)
        if data and not checking and nothing_there and generator.randrange(2):
            scatter(kmcast, buffer, first, data, size)
        elif data:
            offset = generator.randrange(5)
            buffer.put(bytearray(b"x" * offset + b"".join(data) + b"y"), offset, len(data), size)
        buffer.put(bytearray(random_bytes(generator, 100)), 0, 1, generator.randrange(0, 88))
        assert buffer.missing() == wire.bits(range(count)) & ~wire.bits(have), "missing"
        assert buffer.complete == (len(have) == count) and buffer.received == len(have), "count"

    def bring(places):
        for place in places:
            if not buffer.has(place):
                buffer.put(bytearray(packet((base + place) & MASK, payloads[place], salt, check)), 0, 1, len(payloads[place]))
    bring(range(count))
    if not checking:
        assert buffer.differing(wire.sums_of(payloads)) == wire.bits(wrong), "damaged"
        buffer.forget(wire.bits(wrong))
        assert buffer.missing() == wire.bits(wrong)
        bring(wrong)
    assert buffer.complete and b"".join(piece.tobytes() for piece in buffer.flush()) == b"".join(payloads), "flush"


def parse_repairs(kmcast, generator):
    """combine, encode_repair, read_recipe, solve: what should be recovered is, and garbage is harmless."""
    payload = generator.choice((16, 20, 64, 1460))
    count = generator.choice((1, 3, 40, 200))
    base, number = generator.choice((0, 2 ** 31 - 250)), generator.choice((0, 2 ** 31 - 3000, 77))
    salt, repair_salt = generator.getrandbits(32), generator.getrandbits(32)
    payloads = [random_bytes(generator, payload) for _ in range(count)]
    payloads[-1] = payloads[-1][:generator.randrange(1, payload + 1)]
    digest = generator.randrange(2)
    check, checks = SESSION.check(digest), () if digest else (zlib.crc32,)
    data = bytearray(b"".join(packet(base + i, one, salt, check).ljust(12 + payload, b"\0") for i, one in enumerate(payloads)))
    full = kmcast.Buffer(payload, count, salt, checks)
    full.start(base, 0, 0)
    for one in payloads:
        full.add(one)
    requests = [sorted(generator.sample(range(count), generator.randrange(1, max(2, min(count, 20)))))
                for _ in range(generator.randrange(1, 6))]
    groups = list(kmcast.combine([wire.bits(places) for places in requests], kmcast.most_members(payload)))[-1]
    assert sorted(i for group in groups for i in group) == sorted(set(i for places in requests for i in places))
    coded, recipe_count = list(kmcast.encode_repair(full, groups, number, repair_salt))[-1]
    recipes, combinations = wire.repair_pass(payloads, groups, number, payload)
    sent = [coded.get(wire.REPAIR_BIT + number + i).tobytes() for i in range(coded.count)]
    assert recipe_count == len(recipes) and sent == [
        wire.repair(number + i, one, repair_salt, check) for i, one in enumerate(recipes + combinations)], "the wire"
    honest = generator.randrange(2)
    lost = set(i for i in range(len(sent)) if generator.randrange(4) == 0) if generator.randrange(2) else set()
    for lacks in requests:
        assert max([len([i for i in group if i in lacks]) for group in groups]) <= 1
        buffer = kmcast.Buffer(payload, count, salt, checks)
        buffer.start(base, count, len(b"".join(payloads)))
        for place in range(count):
            if place not in lacks:
                size = len(payloads[place])
                buffer.put(data, place * (12 + payload), 1, size)
        arrived = kmcast.Buffer(payload, coded.count, repair_salt - wire.REPAIR_BIT, checks)
        arrived.start(wire.REPAIR_BIT + number, coded.count, coded.count * payload)
        for i, one in enumerate(sent):
            if i in lost:
                continue
            text = one[12:]
            if not honest and i < recipe_count:
                text = change_bytes(generator, text)[:payload] or b"\0"
                text = text.ljust(payload, b"\0") if generator.randrange(4) else text
            one = wire.repair(number + i, text, repair_salt, check)
            arrived.put(bytearray(one), 0, 1, len(text))
        kmcast.solve(buffer, arrived, generator.choice((recipe_count, coded.count)) if not honest else recipe_count)
        assert buffer.missing() & ~wire.bits(lacks) == 0
        if honest:
            for place in range(count):
                if buffer.has(place):
                    assert buffer.payload_of(place)[:len(payloads[place])] == payloads[place], "solved wrong"
            if not lost:
                assert buffer.complete, "not solved"


def parse_chain(kmcast, generator):
    """What an upstream sends, and what comes to a relay port."""
    payload, digest = generator.choice((16, 20, 64)), generator.randrange(2)
    parts = [random_bytes(generator, payload * generator.choice((1, 2, 7, 40))) for _ in range(3)]
    parts[-1] = parts[-1][:-generator.randrange(payload)] or b"x"
    window = kmcast.ClientWindow(kmcast.SessionDialect, payload, (1, 2), bool(digest))
    said, at, base = [], 0, 0
    for number, part in enumerate(parts):
        count = -(-len(part) // payload)
        window.heard(kmcast.SessionDialect.info(number, len(part), base, count, at), 0)
        at, base = at + len(part), base + count
    relay = kmcast.Relay(window, LOOPBACK, 1, said.append, lambda todo: None)
    stream = []
    for number, part in enumerate(parts):
        step = payload * generator.choice((1, 3, 100))
        starts = list(range(0, len(part), step))
        if generator.randrange(2):
            generator.shuffle(starts)
        stream += [wire.piece(number, start // payload, part[start:start + step], digest) for start in starts]
        stream += [wire.STILL_HERE] * generator.randrange(2) + [wire.piece(number, 0, b"")]
    data, changed = b"".join(stream), generator.randrange(3)
    for _ in range(changed):
        data = change_bytes(generator, data)
    relay._upstream = kmcast.Connection(FakeSocket(pieces_of(generator, data)), "test")
    relay._upstream_token, relay._connected = b"t" * 16, True
    window.follow(0)
    buffers = [incoming.buffer for incoming in window.rounds]
    while relay._upstream:
        relay._hear_upstream(relay._upstream.heard)
    assert len(said) == 1 and window.upstream_from is None, "its end is said once"
    for buffer, part in zip(buffers, parts):
        assert buffer.received <= buffer.count and len(buffer.payloads) == buffer.capacity * payload
        if not changed:
            assert buffer.complete and b"".join(piece.tobytes() for piece in buffer.flush()) == part
        elif not digest:
            for place in range(buffer.count):
                assert not buffer.has(place) or buffer.view(place, place + 1).tobytes() == part[
                    place * payload:(place + 1) * payload], "what its checksum does not vouch for"
    # A relay port: only the token will do.
    token = random_bytes(generator, 16)
    words = token + U32.pack(generator.choice((0, 1, 5, MASK)))
    wrong = generator.randrange(2)
    if wrong:
        words = change_bytes(generator, words)
    candidate = kmcast.Connection(FakeSocket(pieces_of(generator, words)), "test")
    relay._token = token
    relay._candidates.append(candidate)
    while candidate in relay._candidates:
        relay._greet(candidate)
    assert bool(relay._follower) == words.startswith(token) and len(words) >= 20 or not relay._follower
    if relay._follower:
        relay._forward(0)
        relay._hear_follower()


PARSERS = (parse_frames, parse_messages, parse_bits, parse_packets, parse_repairs, parse_chain)


def fuzz_parsers(rounds, seed, only):
    """Run under --python; returns an exit code."""
    sys.path.insert(0, ROOT)
    import kmcast
    found, began = 0, time.time()
    numbers = range(only, only + 1) if only is not None else range(rounds)
    for number in numbers:
        generator = random.Random("parsers %d %d" % (seed, number))
        try:
            PARSERS[number % len(PARSERS)](kmcast, generator)
        except Exception:               # pylint: disable=broad-except
            found += 1
            print("FINDING in case %d (%s)\n  again: python3 tests/fuzz.py --endpoint parsers --seed %d --python %s --only %d\n%s"
                  % (number, PARSERS[number % len(PARSERS)].__name__, seed, sys.executable, number, traceback.format_exc()))
    seconds = time.time() - began
    print("parsers: %d cases in %.0f s, %.0f a second, seed %d, %s: %d findings" % (
        len(numbers), seconds, len(numbers) / max(0.001, seconds), seed, sys.executable, found))
    return 1 if found else 0


# ---------------------------------------------------------------------------------------------------------------------
# Command line

class Numbers(object):
    """An iterator for several threads."""

    def __init__(self, values):
        self._values, self._lock = iter(values), threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self._lock:
            return next(self._values)


def fuzz(endpoint, rounds, seed, python, only=None, jobs=4):
    """Fuzz the server, the client or its relay port. only: a pair of the first and the last case, or None. Returns an exit code."""
    findings = Findings(endpoint, seed, python)
    first, last = only or (0, rounds - 1)
    if endpoint == "server":
        work = Numbers([list(range(start, min(start + PEERS, last + 1))) for start in range(first, last + 1, PEERS)])
    else:
        work = Numbers(range(first, last + 1))
    folder = tempfile.mkdtemp(prefix="kmcast-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    nursery_ = Nursery(python)
    broken = []

    def run(worker):
        own = os.path.join(folder, str(worker))
        os.mkdir(own)
        try:
            {"server": fuzz_server, "client": fuzz_client, "relay": fuzz_relay}[endpoint](findings, nursery_, work, seed, worker, own)
        except Exception:               # pylint: disable=broad-except
            broken.append(traceback.format_exc())
    try:
        threads = [threading.Thread(target=run, args=(worker,)) for worker in range(1 if only else jobs)]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        nursery_.close()
        shutil.rmtree(folder, ignore_errors=True)
    for text in broken:
        findings.found += 1
        print("the fuzzer itself failed:\n" + text)
    return findings.summary()


def main():
    """The program; returns its exit code."""
    if sys.argv[1:2] == ["--nursery"]:
        return nursery()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", choices=("server", "client", "relay", "parsers"), default="client")
    parser.add_argument("--rounds", type=int, default=1000, help="how many cases (1000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of what is played to")
    parser.add_argument("--only", help="play only this case, or those from A to B as A-B")
    parser.add_argument("--jobs", type=int, default=4, help="how many transfers at once (4)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = None
    if options.only:
        only = [int(number) for number in options.only.split("-")]
        only = only[0], only[-1]
    if options.endpoint != "parsers":
        return fuzz(options.endpoint, options.rounds, options.seed, options.python, only, options.jobs)
    if options.here:
        return fuzz_parsers(options.rounds, options.seed, only and only[0])
    return subprocess.call([options.python, os.path.abspath(__file__), "--here"] + sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
