#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""kmcast: send one image to many hosts at once, reliably.

    kmcast.py server [options] LOCAL_IP CLIENTS [PORT]      < image
    kmcast.py client [options] LOCAL_IP SERVER_IP [PORT]    > image
    kmcast.py check [options] LOCAL_IP CLIENTS [PORT]
    kmcast.py key                                           > key

The server multicasts the image once, in rounds of one buffer each; every
client says over TCP what it missed and gets just that again.  Standard
library only; Python 2.7.5 and 3.6 or later run this same file.

Map of this file, in the order in which a byte walks it; each section uses
only those above it:

    Python 2 and 3      all that differs between them
    Outcomes and times  how things end, exit codes, timeouts; and what happens is told
    Wire                structs, signals, frames; two dialects: session and base protocol
    Key                 who holds it proves it, and vouches for what it says
    Ranges              which bytes of an image are held, or lacking; the journal of a part of one
    Queues and links    TcpQueue; SemLink, the zipper between neighbouring threads
    Rounds              one round of packets: fill, put, get, missing, flush
    Coded repair        which lost packets to XOR, and how to solve for them
    Datagrams           multicast sockets; many packets a system call
    Pacing              how fast, and how that is found out
    Ends                where the image comes from, where it goes
    This host           interfaces, addresses, limits, signals
    Connection          one end of a TCP connection, for server and client alike
    Window              the round in flight, as the server and as the client see it
    Chain               where multicast does not reach: who takes the packets from whom, and how
    Roster and policy   who takes part, who keeps the others waiting; what to do next
    Report              what the user sees: the log, the progress, the table, the report
    TCP servers         the spec's chain of threads, one poll() each
    Multicaster         the spec's UDP server: the image into the air
    Fallback            the rest of the image by HTTP
    Client              receives one image
    Report page         an HTML page from reports
    Command line        arguments, demo, exit codes

The protocol in a page (a session; the base protocol lacks the greetings):

    server                                    client
      | <------------------------ connects ----- |
      | -- group info -------------------------> |  joins the group
      | <-------------------------- HELLO ------ |
      | -- WELCOME ----------------------------> |
      |                                          |     for each round:
      | -- BUFFER INFO ------------------------> |
      | <-------------------------- READY ------ |  there is room for it
      | == the packets, by UDP multicast ======> |
      | -- SERVER_SENT, digest so far ---------> |
      | <-------- CLIENT_REQ, what it lost ----- |     if it lost any:
      | -- the packets, or AGAIN and coded ----> |       TCP, or multicast
      | <-------------------------- DONE ------- |  verified, to the output
      |                                          |     and at the end:
      | -- BYE, size and digest of it all -----> |
      | <-------------------------- DONE ------- |  the image is in place

A round is brought to those who lack it, and nobody else hears of it.  The first time through
the image these are all who are here; when somebody lacks some of it at its end, as he came
late or was away, there is another pass, through what is lacking.

Up to four rounds are under way at once: while one is multicast, the answers for the
one before come in and it is repaired, and the next is filled and announced.  The base
protocol, which has no greetings, is the window of one round, whose end is a round of
0 packets.

On the server the Multicaster is the parent of TCP server 1, which is the
parent of TCP server 2, and so on, each with up to 64 clients (a large session has
one for all).  The parent
publishes a step and releases its child; the child does the step for its own
clients while its own child does the same, and releases its parent when all
of them are through.  So orders run down the chain and answers run up.
"""
from __future__ import division, print_function

try:
    import _signal as early             # built in: here in no time
except ImportError:
    import signal as early              # so it is with Python 2
if __name__ == '__main__':
    # Until main() looks after signals a Ctrl-C just ends us, without a traceback,
    # and a question how far we are goes unheard.
    if early.getsignal(early.SIGINT) is early.default_int_handler:
        early.signal(early.SIGINT, early.SIG_DFL)
    early.signal(early.SIGUSR1, early.SIG_IGN)
    early.signal(early.SIGUSR2, early.SIG_IGN)

import argparse
import array
import binascii
import bisect
import collections
import contextlib
import ctypes
import difflib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import hmac
import io
import json
import math
import operator
import os
import re
import resource
import select
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
import weakref
import zlib

__version__ = '1.0.0'

# ---------------------------------------------------------------------------
# Python 2 and 3
# ---------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
if sys.version_info[0] == 2:
    from pipes import quote

    def to_int(data):
        """Bytes to the integer that they are, big-endian."""
        return int(binascii.hexlify(data), 16)

    def to_bytes(number, size):
        """The `size` bytes of an integer, big-endian."""
        return binascii.unhexlify('%0*x' % (2 * size, number))

    def part(data, start, size):
        """Bytes of a bytearray, not copied, for zlib.crc32."""
        return buffer(data, start, size)            # noqa: F821

    array_bytes = array.array.tostring

    def monotonic():
        """Seconds on a clock that nobody sets (clock_gettime(2))."""
        timespec = (ctypes.c_long * 2)()
        LIBC.clock_gettime(1, timespec)             # CLOCK_MONOTONIC
        return timespec[0] + timespec[1] * 1e-9
else:
    from shlex import quote
    from time import monotonic
    array_bytes = array.array.tobytes

    def part(data, start, size):
        """Bytes of a bytearray, not copied, for zlib.crc32."""
        return memoryview(data)[start:start + size]

    def to_int(data):
        """Bytes to the integer that they are, big-endian."""
        return int.from_bytes(data, 'big')

    def to_bytes(number, size):
        """The `size` bytes of an integer, big-endian."""
        return number.to_bytes(size, 'big')

try:
    same = hmac.compare_digest
except AttributeError:                  # before 2.7.7
    def same(one, other):
        """Whether two byte strings are equal; how long it takes does not tell how far."""
        differing = len(one) ^ len(other)
        for ours, theirs in zip(bytearray(one), bytearray(other)):
            differing |= ours ^ theirs
        return not differing

# Before 3.3 each module had an exception of its own; before 3.5 a signal
# could end any system call with EINTR.
OS_ERRORS = (OSError, IOError, socket.error, select.error)
TRY_AGAIN = frozenset((errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR))


def errno_of(error):
    """The errno of one of OS_ERRORS, whatever its class."""
    return error.args[0] if error.args else None


def explain(error):
    """One of OS_ERRORS in words, without Python's `[Errno …]`."""
    return getattr(error, 'strerror', None) or str(error)


def uninterrupted(call, *args):
    """`call(*args)`, again when a signal interrupted it (PEP 475)."""
    while True:
        try:
            return call(*args)
        except OS_ERRORS as error:
            if errno_of(error) != errno.EINTR:
                raise


def ready(poller, seconds):
    """The descriptors that are ready within so many seconds: poll(2).

    None of them when a signal came: who waits for long looks again anyway, and would else wait
    for ever where signals come often.
    """
    try:
        return poller.poll(max(0, 1000 * seconds))
    except OS_ERRORS as error:
        if errno_of(error) != errno.EINTR:
            raise
        return []


# The packets of a batch are allocated and freed together, thousands of times
# a second; by default glibc gives that memory back to the kernel each time
# and faults it in again, which triples the cost of a packet (mallopt(3)).
if hasattr(LIBC, 'mallopt'):
    LIBC.mallopt(-1, 16 << 20)                      # M_TRIM_THRESHOLD

# ---------------------------------------------------------------------------
# Outcomes and times
# ---------------------------------------------------------------------------


class Failure(Exception):
    """The end of a transfer, with a reason for the user.

    reason: one line; code: the exit code it stands for.
    """

    def __init__(self, reason, code=1):
        Exception.__init__(self, reason)
        self.reason = reason
        self.code = code


class Final(Failure):
    """One that no other way to the image would mend: of the output, or of what the user wants."""


class Refused(Failure):
    """The peer said BYE; its reason is ours.

    again: whether it does not mind if we come back.
    """

    def __init__(self, reason, again=False):
        Failure.__init__(self, reason)
        self.again = again


class Lost(Failure):
    """The connection ended without a word."""


class ProtocolError(Exception):
    """A peer said something that PROTOCOL.md does not allow."""


class Interrupted(BaseException):
    """A signal asked the program to stop; its text says which.

    No Exception: what handles those for their own sake, as logging does, would swallow it.
    """


class Uninterruptible(object):
    """A moment at whose end a signal that came meanwhile is heard, as Interrupted.

    For what must be begun and noted, or neither: a process, a socket.
    """

    def __init__(self):
        self._depth, self._waiting = 0, None

    def __enter__(self):
        self._depth += 1

    def __exit__(self, *_exception):
        self._depth -= 1
        if not self._depth and self._waiting:
            name, self._waiting = self._waiting, None
            raise Interrupted(name)

    def interrupt(self, name):
        """A signal of this name has come: raise Interrupted, now or as soon as may be."""
        if not self._depth:
            raise Interrupted(name)
        self._waiting = name


uninterruptible = Uninterruptible()


class LinkClosed(Exception):
    """The thread at the other end of a SemLink has ended."""


EMPTY = 'the image is empty; if that is meant, give --allow-empty'


def internal_error(error):
    """What we say of an exception that nobody expected; its traceback is for -v."""
    tell('bug', trace=traceback.format_exc().strip())
    return 'internal error: %s: %s' % (type(error).__name__, error)


def start_thread(thread):
    """Start a threading.Thread.  Raises Failure where this host has none to give."""
    try:
        thread.start()
    except (RuntimeError, threading.ThreadError):   # the latter: Python 2
        raise Failure('this host gives us no thread more; see "ulimit -u", or the limit of its '
                      'container')


# Exit codes; the table is in the man page.
OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3
NOT_STARTED = PARTLY                    # the client's meaning of 3


UNLIMITED = float('inf')

ALIVE_EVERY = 5.0                       # seconds, or three times in the other's stall timeout
STALL = 30.0                            # seconds: the default of --stall-timeout
# The same for a server of the base protocol: the C clients wait 20 s for each other.
BASE_STALL = 15.0
GREETING_TIME = 5.0                     # seconds for a client to say HELLO
FAREWELL_TIME = 2.0                     # seconds for a BYE to get through
TICK = 0.5                              # seconds between looks at the clocks


def alive_every(stall_timeout):
    """How often to be heard from, seconds, by a peer that waits for so many (0: for ever)."""
    return max(0.1, min(ALIVE_EVERY, stall_timeout / 3)) if stall_timeout else ALIVE_EVERY


class Events(object):
    """What happens, told to all who read it: the log, the progress line, the table, the report.

    Every section tells; only section Report has words for it.  A reader has
    happened(what, facts), and look(now), which is called often while time passes.
    """

    def __init__(self):
        self.readers = []

    def __call__(self, what, **facts):
        """Something happened: its name, and what there is to know of it."""
        for reader in self.readers:
            reader.happened(what, facts)

    def look(self, now):
        """Time passes; now: seconds on the monotonic clock."""
        for reader in self.readers:
            reader.look(now)


tell = Events()


def counted(number, noun):
    """`1 packet`, `2 packets`."""
    return '%d %s' % (number, noun if number == 1 else noun + 's')


def bits(rate):
    """A rate in bit/s in words."""
    if rate == UNLIMITED:
        return 'no limit'
    for unit, scale in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if rate >= scale:
            return '%.4g %sbit/s' % (rate / scale, unit)
    return '%.0f bit/s' % rate


# ---------------------------------------------------------------------------
# Wire
# ---------------------------------------------------------------------------

MASK = 0xffffffff
MAGIC = b'KMCAST'
SESSION_VERSION = 2

# Signals: the first byte of a message on TCP.
ALIVE = b'\x00'
BUFFER_INFO = READY = b'\x01'
PACKETS = REQUEST = b'\x02'
DONE = b'\x04'
SENT = b'\x08'
HELLO = b'\x10'
UPSTREAM = b'\x11'
PROOF = b'\x12'
FOLLOWER = b'\x14'
RELAY = b'\x15'
WELCOME = b'\x20'
AGAIN = b'\x40'
BYE = b'\x80'
STATE = b'\x13'
SUMS = b'\x16'
LACK = b'\x17'
U32 = struct.Struct('<I')
PORT = struct.Struct('>H')
GROUP_INFO = struct.Struct('<H2s4s8s')              # a sockaddr_in of x86 Linux
ROUND = struct.Struct('<4I')                        # the spec's buffer_ctl
PLACE = struct.Struct('<Q')                         # of a round in the image, bytes
PACKET = struct.Struct('<3I')                       # the spec's packet_ctl
REPAIR = struct.Struct('<3I')                       # what follows AGAIN and the round's number
FIGURES_OF_ROUND = struct.Struct('<5I')             # what follows DONE or REQUEST and its number
PIECE = struct.Struct('<3I')                        # between clients: round, first packet, bytes
UDP_OVERHEAD = 28                       # IP and UDP headers, bytes
MAX_PACKETS = 65536                     # in a round
REPAIR_BIT = 1 << 31                    # of a seq in a session: a repair datagram
END = MASK                              # the number in a session's last DONE
MAX_FRAME = 65536                       # bytes
DIGEST_SIZE = 32                        # SHA-256, bytes
TOKEN_SIZE = 16                         # what a follower says first to its upstream, and a nonce, bytes
LARGEST_PIECE = 256 << 10               # bytes
STILL_HERE = PIECE.pack(MASK, 0, 0)     # an upstream that has nothing to send

# What a client tells of itself in STATE, besides what it is `busy` with: numbers, and texts.
FIGURES = ('by_multicast', 'by_chain', 'written', 'overflows', 'socket_buffer', 'room', 'write_speed', 'round_trip',
           'packet')
FACTS = ('unwritable', 'python', 'kernel', 'datagrams')


def payload_for(mtu):
    """The payload of a full packet, in bytes, at an MTU in bytes."""
    return (mtu - UDP_OVERHEAD - PACKET.size) // 4 * 4


def packet_of(payload):
    """The bytes of an IP packet with so many of payload."""
    return UDP_OVERHEAD + PACKET.size + payload


def pack_group_info(group, port, padding=b''):
    """The server's first message: 16 bytes, a struct sockaddr_in and what is in its padding."""
    return GROUP_INFO.pack(socket.AF_INET, PORT.pack(port),
                           socket.inet_aton(group), padding)


def unpack_group_info(data):
    """(group address, port, session version or None) of a group info."""
    family, port, group, padding = GROUP_INFO.unpack(data)
    group, port = socket.inet_ntoa(group), PORT.unpack(port)[0]
    if family != socket.AF_INET or not is_multicast(group) or not port:
        raise ProtocolError('that is no kmcast server')
    if padding[:6] == MAGIC:
        return group, port, struct.unpack('B', padding[6:7])[0]
    return group, port, None


def is_multicast(address):
    """Whether a dotted IPv4 address is in 224.0.0.0/4 (RFC 5771)."""
    return 224 <= int(address.split('.')[0]) <= 239


def pack_frame(kind, fields):
    """A signal and a JSON object."""
    text = json.dumps(fields, sort_keys=True).encode('ascii')
    return kind + U32.pack(len(text)) + text


def unpack_frame(text):
    """The dict in a frame; raises ProtocolError."""
    try:
        # A number of more digits than that is out of all ranges anyway.
        fields = json.loads(text.decode('utf-8'), parse_int=lambda digits: int(digits[:25]))
    except (ValueError, RuntimeError):      # RuntimeError: nested too deep
        raise ProtocolError('a frame that is not JSON')
    if not isinstance(fields, dict):
        raise ProtocolError('a frame that is not a JSON object')
    return fields


NUMBER = (int, type(1 << 40))           # int, and Python 2's long
TEXT = (str, type(u''))


def field(fields, key, kinds, optional=False):
    """`fields[key]`, checked; raises ProtocolError.

    kinds: NUMBER (of 64 bits, not negative) or TEXT; optional: null is allowed, too.
    """
    value = fields.get(key)
    if value is None and optional and key in fields:
        return None
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or (kinds is NUMBER and not 0 <= value < 1 << 64):
        raise ProtocolError('a frame without a proper "%s"' % key)
    return printable(value) if kinds is TEXT else value


def refusal(fields):
    """What a server's BYE that is not ok makes of the client: Refused.  Raises ProtocolError."""
    return Refused('the server says: %s' % field(fields, 'reason', TEXT), fields.get('again') is True)


def stall_of(fields):
    """The stall timeout in seconds that a HELLO or WELCOME tells; 0: none.  Raises ProtocolError."""
    value = fields.get('stall', 0)
    if not isinstance(value, NUMBER + (float,)) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ProtocolError('a frame without a proper "stall"')
    return value


def digits_of(fields, key, size, optional=False):
    """The hexadecimal digits of so many bytes that a frame has for a key; None for null.  Raises ProtocolError."""
    text = field(fields, key, TEXT, optional)
    if text is not None and not re.match(r'[0-9a-f]{%d}\Z' % (2 * size), text):
        raise ProtocolError('a frame without a proper "%s"' % key)
    return text


def name_of(fields, key, optional=False):
    """The 32 digits that name an image or an output; None for null.  Raises ProtocolError."""
    return digits_of(fields, key, TOKEN_SIZE, optional)


def token_of(fields, key='token', optional=False):
    """A token of the chain, a nonce: bytes; None for null.  Raises ProtocolError."""
    text = digits_of(fields, key, TOKEN_SIZE, optional)
    return text and binascii.unhexlify(text.encode('ascii'))


def digest_of(fields, key):
    """A SHA-256, or what is as long: bytes.  Raises ProtocolError."""
    return binascii.unhexlify(digits_of(fields, key, DIGEST_SIZE).encode('ascii'))


def random_name():
    """32 hexadecimal digits that nobody else has."""
    return hexadecimal(os.urandom(TOKEN_SIZE))


def place_of_upstream(fields):
    """(first round, (address, port), token) of UPSTREAM, the latter None for nobody.  Raises ProtocolError."""
    number, address = field(fields, 'round', NUMBER), field(fields, 'address', TEXT, optional=True)
    if number > MASK:
        raise ProtocolError('a frame without a proper "round"')
    if address is None:
        return number, None, None
    port = field(fields, 'port', NUMBER)
    if not is_address(address) or not 0 < port < 65536:
        raise ProtocolError('a frame without a proper "address"')
    return number, (address, port), token_of(fields)


def is_address(text):
    """Whether a text is a dotted IPv4 address."""
    try:
        socket.inet_pton(socket.AF_INET, text)
    except OS_ERRORS + (ValueError, TypeError):
        return False
    return True


def printable(text, limit=200):
    """A peer's text as it may appear on a terminal: plain ASCII."""
    return str(re.sub(u'[^ -~]', u'?', text[:limit]))


def plain_crc(payload, _number):
    """The checksum of a base-protocol server that uses CRC-32."""
    return zlib.crc32(payload)


def c_sum(payload, _number):
    """The checksum of the C implementation: the sum of little-endian words."""
    words = bytes(payload) + b'\0' * (-len(payload) % 4)
    return sum(struct.unpack('<%dI' % (len(words) // 4), words)) & MASK


# ---- what is missing of a round: one int, whose bit i stands for packet i

def to_bitmap(gaps, count):
    """Bits as they go on the wire: packet i in bit i mod 8 of byte i div 8."""
    return to_bytes(gaps, (count + 7) // 8)[::-1]


def from_bitmap(data, count):
    """The bits of at most `count` packets.  Raises ProtocolError where there are more, or none."""
    gaps = to_int(data[::-1])
    if not gaps or gaps >> count:
        raise ProtocolError('a request for packets outside the round, or for none')
    return gaps


def gaps_of(flags):
    """The bits of those packets whose byte in `flags` (a bytearray) is 0."""
    return int(bytes(flags.translate(GAP_DIGITS)[::-1]) or b'0', 2)


GAP_DIGITS = b'1' + b'0' * 255


def how_many(gaps):
    """How many bits are set."""
    return bin(gaps).count('1')


if hasattr(int, 'bit_count'):           # 3.10 and later
    how_many = int.bit_count            # noqa: F811


def runs(gaps):
    """Where set bits stand next to each other: (start, stop) of each run, ascending."""
    digits = bin(gaps)[:1:-1] + '0'
    found, start = [], digits.find('1')
    while start >= 0:
        stop = digits.find('0', start)
        found.append((start, stop))
        start = digits.find('1', stop)
    return found


def places(gaps):
    """The places of the bits that are set, ascending."""
    digits, found = bin(gaps)[:1:-1], []
    place = digits.find('1')
    while place >= 0:
        found.append(place)
        place = digits.find('1', place + 1)
    return found


class SessionDialect(object):
    """What two kmcast ends speak: with greetings, digests, signs of life and reasons.

    Every message about a round has its number, so several can be under way.
    """

    padding = MAGIC + struct.pack('BB', SESSION_VERSION, 0)     # of the group info
    greets = True                       # a client says HELLO, and counts only then
    talks = True                        # both may say ALIVE, BYE and STATE at any time
    codes = True                        # repairs by XOR of several packets are understood
    sizes = True                        # all packets but the image's last are full ones
    ends = False                        # the image's end is a round of 0 packets
    window = 4                          # rounds under way at once
    seqs = REPAIR_BIT - 1               # data packets count modulo this and one
    checks = (zlib.crc32,)              # of a packet, as Buffer takes them, where no digest covers a round
    server_stall = client_stall = STALL     # seconds

    @staticmethod
    def salts():
        """Two random numbers: for packets, and for those of repair passes."""
        return struct.unpack('<II', os.urandom(8))

    # ---- what a server says

    @staticmethod
    def info(number, size, base, count, place):
        """A round is announced: its number, bytes, first seq, packets, and its place in the image."""
        return BUFFER_INFO + ROUND.pack(number & MASK, size, base, count) + PLACE.pack(place)

    @staticmethod
    def sent(number, digest):
        """A round, or a repair pass for it, was multicast."""
        return SENT + U32.pack(number & MASK) + digest

    @staticmethod
    def packets(number):
        """What comes before packets on TCP."""
        return PACKETS + U32.pack(number & MASK)

    @staticmethod
    def sums(number, sums):
        """The CRC-32 of each packet of the round, for a client whose digest differs."""
        return SUMS + struct.pack('<%dI' % (2 + len(sums)), len(sums), number & MASK, *sums)

    @staticmethod
    def again(number, first, recipe_count, combinations):
        """What was asked for is coming by multicast."""
        return AGAIN + U32.pack(number & MASK) + REPAIR.pack(first, recipe_count, combinations)

    @staticmethod
    def bye(**fields):
        """The last message of a connection."""
        return pack_frame(BYE, fields)

    @staticmethod
    def state(**fields):
        """How it stands at this end, for the user at the other: a sign of life with words."""
        return pack_frame(STATE, fields)

    @staticmethod
    def follower(token):
        """Serve whoever says this token; None: nobody."""
        return pack_frame(FOLLOWER, {'token': token and hexadecimal(token)})

    @staticmethod
    def upstream(number, address=None, port=None, token=None):
        """From that round on take the packets from there; address None: from nobody."""
        fields = {'round': number & MASK, 'address': address}
        if address:
            fields.update(port=port, token=hexadecimal(token))
        return pack_frame(UPSTREAM, fields)

    @staticmethod
    def server_message_size(head, digest_size, _between_rounds=False):
        """The size in bytes of a server's message that begins with `head`, once the session
        is agreed.  Returns None where more is needed to tell; raises ProtocolError.

        digest_size: of what SENT says of the image, bytes."""
        kind = head[:1]
        if kind == ALIVE:
            return 1
        if kind in (BYE, WELCOME, STATE, UPSTREAM, FOLLOWER):
            return frame_size(head)
        if kind == SUMS:
            if len(head) < 5:
                return None
            count, = U32.unpack(head[1:5])
            if not 0 < count <= MAX_PACKETS:
                raise ProtocolError('sums of %s' % counted(count, 'packet'))
            return 9 + 4 * count
        sizes = {BUFFER_INFO: ROUND.size + PLACE.size, SENT: U32.size + digest_size,
                 AGAIN: U32.size + REPAIR.size, PACKETS: U32.size, PROOF: DIGEST_SIZE}
        if kind not in sizes:
            raise ProtocolError('an unknown signal, 0x%02x' % ord(kind))
        return 1 + sizes[kind]

    @staticmethod
    def read_info(message):
        """(number, size, base, count, place) of a buffer info."""
        return ROUND.unpack(message[1:1 + ROUND.size]) + PLACE.unpack(message[1 + ROUND.size:])

    # ---- what a client says

    @staticmethod
    def ready(number):
        """There is room for the round."""
        return READY + U32.pack(number)

    @staticmethod
    def done(number, figures):
        """The round is complete, verified, and handed to the output."""
        return DONE + U32.pack(number) + FIGURES_OF_ROUND.pack(*figures)

    @staticmethod
    def request(number, figures, gaps, _base, count):
        """These packets of the round are missing."""
        return (REQUEST + U32.pack(number) + FIGURES_OF_ROUND.pack(*figures)
                + to_bitmap(gaps, count))

    @staticmethod
    def relay(token, **fields):
        """How a client stands with a neighbour: the `port` where it listens, or why the other is `lost`."""
        return pack_frame(RELAY, dict(fields, token=hexadecimal(token)))

    @staticmethod
    def lack(ranges):
        """These are not here after all, [[start, stop], ...], though DONE or HELLO said so."""
        return pack_frame(LACK, {'lacks': ranges})

    @staticmethod
    def ask_for_sums(number):
        """The round's digest differs: which packets are damaged?"""
        return SUMS + U32.pack(number)

    @staticmethod
    def client_message_size(head, count_of):
        """The size in bytes of a client's message that begins with `head`.

        count_of(number): packets of the round, raises ProtocolError if it is not
        under way.  Returns None where more of the message is needed to tell;
        raises ProtocolError.
        """
        kind = head[:1]
        if kind == ALIVE:
            return 1
        if kind in (READY, SUMS):
            return 1 + U32.size
        if kind == PROOF:
            return 1 + DIGEST_SIZE
        if kind in (HELLO, BYE, STATE, RELAY, LACK):
            return frame_size(head)
        if kind not in (DONE, REQUEST):
            raise ProtocolError('an unknown signal, 0x%02x' % ord(kind))
        size = 1 + U32.size + FIGURES_OF_ROUND.size
        if kind == DONE:
            return size
        if len(head) < 5:
            return None
        return size + (count_of(U32.unpack(head[1:5])[0]) + 7) // 8

    @staticmethod
    def number_of(message):
        """The number of the round that a client's message is about."""
        return U32.unpack(message[1:5])[0]

    @staticmethod
    def figures_of(message):
        """What a client's DONE or REQUEST tells of its reception: FIGURES_OF_ROUND."""
        return FIGURES_OF_ROUND.unpack(message[5:5 + FIGURES_OF_ROUND.size])

    @staticmethod
    def asked(message, _base, count):
        """What a REQUEST asks for, as bits, and in which order (None: ascending).  Raises ProtocolError."""
        return from_bitmap(message[5 + FIGURES_OF_ROUND.size:], count), None


class BaseDialect(SessionDialect):
    """What the C implementation speaks: `spec/`.  Nobody can say there that he is alive, or why he ends.

    No message has a round's number, as only one is under way.
    """

    padding = b''
    greets = talks = codes = sizes = False
    ends = True
    window = 1
    seqs = MASK
    checks = (c_sum,)
    server_stall, client_stall = BASE_STALL, 0

    @staticmethod
    def salts():
        """None: a packet's checksum is of its payload alone."""
        return 0, 0

    @staticmethod
    def info(number, size, base, count, _place):
        """Without a signal before it."""
        return ROUND.pack(number & MASK, size, base, count)

    @staticmethod
    def sent(_number, _digest):
        """There is no digest."""
        return SENT

    @staticmethod
    def packets(_number):
        """Nothing comes before packets."""
        return b''

    @staticmethod
    def bye(**_fields):
        """There is no such message."""
        return b''

    state = bye

    @staticmethod
    def server_message_size(_head, _digest_size, between_rounds=False):
        """Between rounds comes a buffer info, in them a signal."""
        return ROUND.size if between_rounds else 1

    @staticmethod
    def read_info(message):
        """It has no place."""
        return ROUND.unpack(message) + (None,)

    @staticmethod
    def ready(_number):
        """A signal."""
        return READY

    @staticmethod
    def done(_number, _figures):
        """A signal."""
        return DONE

    @staticmethod
    def request(_number, _figures, gaps, base, count):
        """The seqs of what is missing."""
        seqs = [(base + place) & MASK for place in places(gaps)]
        return REQUEST + struct.pack('<%dI' % (1 + len(seqs)), len(seqs), *seqs)

    @staticmethod
    def client_message_size(head, count_of):
        """A request has a count; nothing else has a size of its own."""
        if head[:1] not in (READY, DONE, REQUEST):
            raise ProtocolError('an unknown signal, 0x%02x' % ord(head[:1]))
        if head[:1] != REQUEST:
            return 1
        if len(head) < 5:
            return None
        count = U32.unpack(head[1:5])[0]
        if not 0 < count <= count_of(None):
            raise ProtocolError('a request for %s' % counted(count, 'packet'))
        return 5 + 4 * count

    @staticmethod
    def number_of(_message):
        """None: of the one that is under way."""

    figures_of = number_of

    @staticmethod
    def asked(message, base, count):
        """As of the seqs that a REQUEST has."""
        order = [(seq - base) & MASK for seq in struct.unpack('<%dI' % (len(message) // 4 - 1), message[5:])]
        if max(order) >= count:
            raise ProtocolError('a request for a packet outside the round')
        flags = bytearray(b'\1' * count)
        for place in order:
            flags[place] = 0
        return gaps_of(flags), order


def hexadecimal(data):
    """Bytes as hexadecimal digits."""
    return binascii.hexlify(data).decode('ascii')


def frame_size(head):
    """The size in bytes of a signal and its frame; None if too little is there to tell."""
    if len(head) < 5:
        return None
    length = U32.unpack(head[1:5])[0]
    if length > MAX_FRAME:
        raise ProtocolError('a frame of %d bytes' % length)
    return 5 + length


# ---------------------------------------------------------------------------
# Key
# ---------------------------------------------------------------------------

KEYS_DIFFER = 'the keys of server and client differ'
NOT_VOUCHED = 'somebody on the way changes what the server says'


class Key(object):
    """A secret that the ends of a transfer share, by which they know each other."""

    LEAST, MOST = 16, 65536             # bytes

    def __init__(self, secret):
        self._secret = secret

    def proof(self, label, *words):
        """HMAC-SHA256 (RFC 2104) over a label and some words, 32 bytes.

        Each has its length before it, so that no others make the same bytes.
        """
        said = b''.join(U32.pack(len(word)) + word for word in (label,) + words)
        return hmac.new(self._secret, said, hashlib.sha256).digest()


class Greeting(object):
    """What two ends said as they met, which has random numbers of both: who proves something, proves it over that.

    A proof for one purpose is none for another, as their labels differ.
    """

    SERVER, CLIENT, DONE = b'kmcast 2 server', b'kmcast 2 client', b'kmcast 2 done'

    def __init__(self, key, group_info, hello, welcome):
        """key: a Key; the others: the messages as they were sent, bytes."""
        self._key, self._said = key, (group_info, hello, welcome)

    def prove(self, label):
        """The message that proves that we hold the key."""
        return PROOF + self._key.proof(label, *self._said)

    def proven(self, label, message):
        """Whether the other end's message does."""
        return same(message, self.prove(label))


class Vouchers(object):
    """What a server says of the image, which is the same for all its clients, is vouched for with these.

    The seed is random, and another one for each image that is sent.
    """

    SIZE = 32                           # bytes
    ROUND = struct.Struct('<IQI')       # number, place, bytes

    def __init__(self, key, seed):
        self._key = Key(key.proof(b'kmcast 2 image', seed))

    def of_round(self, number, place, size, digest):
        """For a round, and the digest of the image through it."""
        return self._key.proof(b'kmcast 2 round', self.ROUND.pack(number & MASK, place, size) + digest)

    def of_end(self, size, digest):
        """For the bytes and the digest of the whole image."""
        return self._key.proof(b'kmcast 2 end', PLACE.pack(size) + digest)


def read_key(name):
    """The Key that a file holds; name: its path, `-` for standard input, or fd:N for a descriptor.  Raises Failure."""
    match = re.match('fd:([0-9]{1,9})$', name)
    fd = 0 if name == '-' else int(match.group(1)) if match else None
    called = 'the key in %s' % printable(name)
    secret, ours = b'', fd is None
    try:
        if ours:
            fd = uninterrupted(os.open, name, os.O_RDONLY | os.O_NOCTTY)
        try:
            if os.isatty(fd):
                raise Failure('%s, which is a terminal, would be seen by others' % called, USAGE)
            mode = os.fstat(fd).st_mode
            if ours and mode & 0o077:
                raise Failure('%s can be read by others: the mode is %03o; make it 600 (chmod)'
                              % (called, mode & 0o777), USAGE)
            while len(secret) <= Key.MOST:
                data = uninterrupted(os.read, fd, Key.MOST + 1)
                if not data:
                    break
                secret += data
        finally:
            if ours or fd > 2:          # a command that we start shall not have it
                os.close(fd)
    except OS_ERRORS as error:
        raise Failure('cannot read %s: %s' % (called, explain(error)), USAGE)
    if not Key.LEAST <= len(secret) <= Key.MOST:
        raise Failure('%s has %s; it takes %d to %d (kmcast key > FILE makes one)' % (
            called, counted(len(secret), 'byte') if len(secret) <= Key.MOST else 'more', Key.LEAST, Key.MOST), USAGE)
    return Key(secret)


# ---------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------

class Held(object):
    """Which bytes of an image somebody holds, or lacks: ranges, each from its first byte up to, but not with, `stop`.

    Neighbours are joined, so equal sets have equal ranges.
    """

    MOST = 1000                         # ranges that go on the wire

    def __init__(self, ranges=()):
        """ranges: (start, stop) of each, in any order."""
        self._bounds = []               # start, stop, start, stop, ...: ascending, all different
        for start, stop in ranges:
            self.add(start, stop)

    @classmethod
    def from_list(cls, value):
        """As a frame has them: [[start, stop], ...], ascending, disjoint, and MOST at the most.  Raises ProtocolError."""
        bounds = []
        if isinstance(value, list) and len(value) <= cls.MOST:
            bounds = [bound for pair in value if isinstance(pair, list) and len(pair) == 2 for bound in pair]
        good = isinstance(value, list) and len(bounds) == 2 * len(value) and all(
            isinstance(bound, NUMBER) and not isinstance(bound, bool) and 0 <= bound < 1 << 63 for bound in bounds)
        if not good or any(bounds[i] >= bounds[i + 1] if not i % 2 else bounds[i] > bounds[i + 1]
                           for i in range(len(bounds) - 1)):
            raise ProtocolError('a frame without proper ranges')
        return cls(zip(bounds[::2], bounds[1::2]))

    def to_list(self, most=MOST):
        """As a frame has them: of more than so many the largest."""
        ranges = sorted(self, key=lambda pair: pair[0] - pair[1])[:most]
        return [list(pair) for pair in sorted(ranges)]

    def __iter__(self):
        """(start, stop) of each range, ascending."""
        return iter(list(zip(self._bounds[::2], self._bounds[1::2])))

    def __len__(self):
        return len(self._bounds) // 2

    def __eq__(self, other):
        return isinstance(other, Held) and list(self) == list(other)

    def __ne__(self, other):
        return not self == other

    __hash__ = None                     # it changes

    def __repr__(self):
        return 'Held(%r)' % (list(self),)

    def add(self, start, stop):
        """These bytes, too."""
        self._change(start, stop, 0)

    def remove(self, start, stop):
        """These bytes no more."""
        self._change(start, stop, 1)

    def _change(self, start, stop, inside):
        """inside: whether a bound at an even (0) or an odd (1) place is where the rest would be cut."""
        if start >= stop:
            return
        first, last = bisect.bisect_left(self._bounds, start), bisect.bisect_right(self._bounds, stop)
        self._bounds[first:last] = [start] * (first % 2 == inside) + [stop] * (last % 2 == inside)

    def covers(self, start, stop):
        """Whether all of these bytes are there."""
        place = bisect.bisect_right(self._bounds, start)
        return start >= stop or place % 2 == 1 and self._bounds[place] >= stop

    def gap(self, start):
        """The first byte from `start` on that is not there."""
        place = bisect.bisect_right(self._bounds, start)
        return self._bounds[place] if place % 2 else start

    def touches(self, start, stop):
        """Whether any of these bytes is there."""
        first, last = bisect.bisect_right(self._bounds, start), bisect.bisect_left(self._bounds, stop)
        return start < stop and (first < last or first % 2 == 1)

    def missing(self, start, stop):
        """What of these bytes is not there, as Held."""
        missing = Held([(start, stop)])
        for pair in self:
            missing.remove(*pair)
        return missing

    @property
    def prefix(self):
        """Bytes from the start of the image on, up to the first that is not there."""
        return self._bounds[1] if self._bounds[:1] == [0] else 0

    @property
    def size(self):
        """Bytes in all."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])


class Journal(object):
    """What a run tells the next one of a file that holds part of an image: a file beside it.

    Each line has a CRC-32, and from the first on that is wrong all counts for nothing: it was
    being written when the host went down.  The first line names the image, each other one says what was
    written, with SHA-256 of the image through it, or what of that is in doubt.  A line is added once what it
    says is true, so when this program dies it claims nothing that is not there.  When the host does,
    it may; so nothing of it is believed that has not been hashed again.

    image, who  names, of the image and of the output; None where the journal says nothing
    held        the bytes that were written
    digests     of the image through some of them: through which byte -> SHA-256
    """

    def __init__(self, path, new=False):
        """path: of the file; new: it must not be there yet.  Raises OS_ERRORS."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
                           | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
        self.image = self.who = None
        self.held, self.digests = Held(), {}
        good = 0
        if not new and not is_ours(self._fd):
            self.close()
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with io.open(self._fd, 'rb', closefd=False) as lines:
            for line in lines:
                try:
                    self._take(line)
                except ProtocolError:
                    break
                good += len(line)
        os.lseek(self._fd, good, os.SEEK_SET)
        os.ftruncate(self._fd, good)

    def _take(self, line):
        """A line of it.  Raises ProtocolError."""
        if line[-1:] != b'\n' or line[:9] != b'%08x ' % (zlib.crc32(line[9:]) & MASK):
            raise ProtocolError('a line of a journal that is damaged')
        fields = unpack_frame(line[9:])
        if self.image is None:
            self.image, self.who = name_of(fields, 'image'), name_of(fields, 'who')
            return
        for start, stop in Held.from_list(fields.get('doubted', [])):
            self.held.remove(start, stop)
        for start, stop in Held.from_list(fields.get('wrote', [])):
            self.held.add(start, stop)
            if fields.get('sha256') is not None:
                self.digests[stop] = digest_of(fields, 'sha256')

    def _add(self, **fields):
        """A line more; one that the disk does not take costs a later run what it would have told."""
        text = json.dumps(fields, sort_keys=True).encode('ascii') + b'\n'
        line = b'%08x %s' % (zlib.crc32(text) & MASK, text)
        try:
            if self._fd is not None and os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OS_ERRORS as error:
            tell('unjournaled', path=printable(self.path), reason=explain(error))
            self.close()

    def begin(self, image, who):
        """Forget all: from now on it is about that image."""
        self.held = Held()
        if self._fd is not None:
            os.lseek(self._fd, 0, os.SEEK_SET)
            os.ftruncate(self._fd, 0)
        self._add(image=image, who=who)

    def wrote(self, start, stop, digest):
        """These bytes were written; digest: SHA-256 of the image through them, b'' if nobody says."""
        self.held.add(start, stop)
        self._add(wrote=[[start, stop]], sha256=hexadecimal(digest) if digest else None)

    def doubted(self, start, stop):
        """These are not what was written."""
        self.held.remove(start, stop)
        self._add(doubted=[[start, stop]])

    def close(self):
        """Add no more; may be done twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_ours(fd):
    """Whether an open file is a regular one that nobody else has a name for, or the right to change."""
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()


# ---------------------------------------------------------------------------
# Queues and links
# ---------------------------------------------------------------------------

MSG_DONTWAIT = 0x40                     # Linux's number; socket.MSG_DONTWAIT


class TcpQueue(object):
    """Pieces of data in order: the spec's tcpq and its seven operations.

    A server has two for each client: one waits to be sent, one to be
    understood.  `size` is in bytes (tcpq_queue_dsize), `count` in pieces.
    """

    def __init__(self):
        """tcpq_queue_init."""
        self._pieces = collections.deque()
        self.size = 0

    @property
    def count(self):
        """How many pieces are queued."""
        return len(self._pieces)

    def clear(self):
        """Forget everything: tcpq_queue_free."""
        self._pieces.clear()
        self.size = 0

    def put_tail(self, data):
        """Queue bytes (or a memoryview) behind the others: tcpq_queue_tail."""
        if len(data):
            self._pieces.append(data)
            self.size += len(data)

    def put_head(self, data):
        """Put back what could not be used yet: tcpq_queue_head."""
        if len(data):
            self._pieces.appendleft(data)
            self.size += len(data)

    def get_head(self):
        """Take the first piece; None if there is none: tcpq_dequeue_head."""
        if not self._pieces:
            return None
        data = self._pieces.popleft()
        self.size -= len(data)
        return data

    def flat(self):
        """Take everything as one piece of bytes: tcpq_dqueue_flat."""
        data = self.flat_peek()
        self.clear()
        return data

    def flat_peek(self):
        """Everything as one piece of bytes, left in: tcpq_queue_flat_peek."""
        if len(self._pieces) == 1 and isinstance(self._pieces[0], bytes):
            return self._pieces[0]
        data = bytearray()
        for piece in self._pieces:
            data += piece
        return bytes(data)


class SemLink(object):
    """The pairs of semaphores between a thread, its parent and its child.

    The spec's struct semlink.  A pair of semaphores is a socket pair: V sends
    a byte, P receives one.  So a link can be polled together with sockets
    (`parent_fd`, `child_fd`; None where there is no such neighbour), and a
    thread that ends closes its ends, which its neighbours see.  All four
    calls do nothing where there is no such neighbour.
    """

    def __init__(self, parent=None):
        """parent: this thread's end of the pair that its parent made."""
        self._parent = parent
        self._child = None

    def spawn(self):
        """Make the pair of semaphores for a child; returns the child's link."""
        self._child, end = socket.socketpair()
        return SemLink(end)

    parent_fd = property(lambda self: self._parent and self._parent.fileno())
    child_fd = property(lambda self: self._child and self._child.fileno())

    def wait_parent(self):
        """P: sl_wait_parent.  Raises LinkClosed."""
        self._wait(self._parent)

    def release_parent(self):
        """V: sl_release_parent."""
        self._release(self._parent)

    def wait_child(self):
        """P: sl_wait_child.  Raises LinkClosed."""
        self._wait(self._child)

    def release_child(self):
        """V: sl_release_child."""
        self._release(self._child)

    def close_child(self):
        """Go on without a child."""
        if self._child:
            self._child.close()
            self._child = None

    def close(self):
        """Tell both neighbours that this thread is at its end."""
        self.close_child()
        if self._parent:
            self._parent.close()
            self._parent = None

    @staticmethod
    def _wait(end):
        if end:
            try:
                gone = not uninterrupted(end.recv, 1)
            except OS_ERRORS:
                gone = True
            if gone:
                raise LinkClosed()

    @staticmethod
    def _release(end):
        if end:
            try:
                uninterrupted(end.send, b'V', MSG_DONTWAIT)
            except OS_ERRORS:
                pass                    # it ended: the next wait will say so; or has enough of them to look at


# ---------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------

def consecutive(first, count):
    """`count` numbers from `first` on, modulo 2^32."""
    first &= MASK
    if first + count <= MASK:
        return range(first, first + count)
    return [(first + i) & MASK for i in range(count)]


def stretches(numbers):
    """Where consecutive numbers stand in a sequence: (start, stop) of each stretch."""
    start = 0
    for i in range(1, len(numbers)):
        if numbers[i] != numbers[i - 1] + 1:
            yield start, i
            start = i
    if len(numbers):
        yield start, len(numbers)


def pack_headers(base, sums, size, count):
    """The headers of `count` packets with consecutive seqs from `base` on, and payloads of one size, as bytes."""
    words = array.array('I', [size]) * (3 * count)
    words[0::3] = array.array('I', consecutive(base, count))
    words[1::3] = array.array('I', sums)
    if sys.byteorder == 'big':
        words.byteswap()
    return array_bytes(words)


class Batch(object):
    """Structs for many adjacent packets of one size at once, by their number.

    One call takes 44 packets apart into 44 x (header, payload), or puts them
    together; that is what makes the per-packet loops short.
    """

    # Packets in one call.  Of 1460 bytes, so many are less than what malloc
    # takes from the kernel, and gives back, each time (M_MMAP_THRESHOLD).
    MOST = 88
    _known = {}

    def __init__(self, payload):
        """payload: bytes in each packet."""
        self._formats = {'packets': '%ds%ds' % (PACKET.size, payload),
                         'headers': '%ds%dx' % (PACKET.size, payload),
                         'payloads': '%dx%ds' % (PACKET.size, payload),
                         'fields': '3I%dx' % payload,
                         'bare': '%ds' % payload}
        self._structs = {}

    @classmethod
    def of(cls, payload):
        """The Batch for a payload in bytes, made once."""
        if payload not in cls._known:
            cls._known[payload] = cls(payload)
        return cls._known[payload]

    def __call__(self, kind, count):
        """A Struct of `count` adjacent packets: their `packets` (header and payload of each), `headers`,
        `payloads`, or the `fields` of their headers (seq, crc, size); or of `bare` payloads, back to back."""
        if (kind, count) not in self._structs:
            self._structs[kind, count] = struct.Struct('<' + self._formats[kind] * count)
        return self._structs[kind, count]


class Buffer(object):
    """One round of packets: their payloads back to back, and their headers.

    The spec's buffer_ctl, its packets and their operations.  A server fills
    it from the image and sends of it; a client puts what it receives
    and flushes it when nothing is missing.  A repair pass is one as well.

    base        seq of the first packet (packet_id_base)
    count       packets in the round (pkt_count)
    size        bytes of payload in the round (buffer_size)
    headers     of the packets, a bytearray; at a client what they must be, as far as that is known
    payloads    a bytearray; that of packet i begins at i times a full one's size
    short       index -> bytes, of the packets with less than a full payload
    received    packets of this round that have arrived
    damaged     datagrams with a wrong size or checksum, over all rounds
    """

    def __init__(self, payload, capacity, salt=0, checks=(zlib.crc32,)):
        """buffer_init.

        payload: bytes in a full packet; capacity: packets at the most.
        salt, checks: a packet's checksum is check(payload, salt + seq).  Two
        checks are candidates, and the first good packet decides between them
        (pass the same list to all buffers of a transfer).  Without one a digest covers
        the round: what stands in a checksum's place then is salt + seq.
        """
        self.payload = payload
        self.capacity = capacity
        self.slot = PACKET.size + payload
        self.salt = salt
        self.checks = checks
        self.damaged = 0
        self.headers = bytearray(capacity * PACKET.size)
        self.payloads = bytearray(capacity * payload)
        self._view = memoryview(self.payloads)
        self.start(0, 0, 0)

    # ---- what a round is

    def start(self, base, count, size):
        """Begin a round; on a server with count 0, for `fill` to add to.

        size: bytes in all, from which the last packet's follows; None where
        any packet may be short (the base protocol).
        """
        self.base = base & MASK
        self.count = count
        self.size = size
        self.ended = False
        self.limit = self.capacity
        self._read = 0                  # bytes of the image, as far as they are read
        self._slots = None              # see packets()
        self._sums = None               # see sums()
        self.short = {}
        self._any_size = size is None
        if size is not None and size != count * self.payload:
            self.short[count - 1] = size - (count - 1) * self.payload
        self._have = bytearray(count)
        self._missing = count
        self.received = 0
        if not self.checks:
            self._head(0, count)

    def index(self, seq):
        """The place of a seq in the round, from 0; it may lie outside."""
        return (seq - self.base) & MASK

    def packet_size(self, index):
        """The payload in bytes of a packet of this round."""
        return self.short.get(index, self.payload)

    def view(self, first, last):
        """The payloads from index first up to last, a memoryview; only the last may be short."""
        return self._view[first * self.payload:(last - 1) * self.payload + self.packet_size(last - 1)]

    def _check(self, index):
        """The checksum that a packet should have."""
        start = index * self.payload
        return self.checks[0](part(self.payloads, start, self.packet_size(index)),
                              self.salt + self.base + index) & MASK

    def _head(self, first, last):
        """Write the headers from index first up to last."""
        sums = [self._check(index) for index in range(first, last)] if self.checks else consecutive(
            self.salt + self.base + first, last - first)
        self.headers[first * PACKET.size:last * PACKET.size] = pack_headers(
            self.base + first, sums, self.payload, last - first)
        for index in self.short:
            if first <= index < last:
                U32.pack_into(self.headers, index * PACKET.size + 8, self.short[index])

    def _headers(self, first, count):
        return Batch.of(PACKET.size)('bare', count).unpack_from(self.headers, first * PACKET.size)

    # ---- the server's side

    READ = 512 << 10                    # bytes to read at once

    def fill(self, source):
        """Read once from the image and make packets of it: buffer_fill.

        source.read_into(memoryview) -> bytes read, 0 at the image's end, None if there is
        nothing yet; source.hash(memoryview): they are all there.  Only the last packet of the
        image is short.  Sets `ended` at the image's end.
        """
        room = min(self._read + self.READ, self.limit * self.payload)
        got = source.read_into(self._view[self._read:room])
        if got is None:
            return
        self._read += got
        first, self.ended = self.count, not got
        self.count = self._read // self.payload
        if self.ended and self._read % self.payload:
            self.short[self.count] = self._read % self.payload
            self.count += 1
        self._head(first, self.count)
        self.size = self._read if self.ended else self.count * self.payload
        if self.full:
            source.hash(self._view[:self.size])

    full = property(lambda self: self.ended or self.count >= self.limit)

    def add(self, data):
        """Add one packet with a payload of up to a full one's size."""
        index, start = self.count, self.count * self.payload
        self._view[start:start + len(data)] = data
        if len(data) != self.payload:
            self.short[index] = len(data)
        self.count += 1
        self.size += len(data)
        self._head(index, self.count)

    def get(self, seq):
        """A packet as it goes on the wire, a memoryview: packet_get."""
        return self.packets(self.index(seq), self.index(seq) + 1)[0]

    def packet(self, index):
        """A packet as it goes on the wire, bytes."""
        return (bytes(self.headers[index * PACKET.size:(index + 1) * PACKET.size])
                + self.view(index, index + 1).tobytes())

    def packets(self, first, last):
        """The packets from index first up to last, header and payload of each, as few adjacent slices.

        Returns memoryviews; only the last packet of each may be short.
        """
        if self._slots is None:         # all of them, once for all who ask
            slots = bytearray(self.count * self.slot)
            for start in range(0, self.count, Batch.MOST):
                count = min(Batch.MOST, self.count - start)
                fields = [None] * (2 * count)
                fields[0::2] = self._headers(start, count)
                fields[1::2] = Batch.of(self.payload)('bare', count).unpack_from(
                    self.payloads, start * self.payload)
                Batch.of(self.payload)('packets', count).pack_into(slots, start * self.slot, *fields)
            self._slots = memoryview(slots)
        slices = []
        ends = sorted(i + 1 for i in self.short if first <= i < last - 1)
        for end in ends + [last]:
            stop = end * self.slot - self.payload + self.packet_size(end - 1)
            slices.append(self._slots[first * self.slot:stop])
            first = end
        return slices

    def sums(self):
        """CRC-32 of each payload: for a client whose round differs from its digest."""
        if self._sums is None:
            self._sums = [zlib.crc32(part(self.payloads, i * self.payload, self.packet_size(i))) & MASK
                          for i in range(self.count)]
        return self._sums

    # ---- the client's side

    def put(self, data, offset, count, payload):
        """Take received packets that lie back to back: packet_put.

        data, offset: where they are; count: how many; payload: bytes of each
        behind its header.  Those outside the round, duplicates, and those whose size or
        checksum is wrong are ignored.
        """
        first = self.index(U32.unpack_from(data, offset)[0])
        last = first + count
        there = self._have.count(b'\1', first, last) if last <= self.count else None
        if there == 0 and 0 < payload <= self.payload and self._right(data, offset, first, count, payload):
            pieces = Batch.of(payload)('payloads', count).unpack_from(data, offset)
            if payload == self.payload:
                start = first * payload
                self._view[start:start + count * payload] = b''.join(pieces)
            else:
                for index, piece in enumerate(pieces, first):
                    start = index * self.payload
                    self._view[start:start + payload] = piece
                    self.short[index] = payload
            self.arrived(first, last)
        elif count > 1:                 # some of them are there, are not as they should be, or not in order
            half = count // 2
            self.put(data, offset, half, payload)
            self.put(data, offset + half * (PACKET.size + payload), count - half, payload)
        elif first < self.count and not there:
            self.damaged += 1

    def _right(self, data, offset, first, count, payload):
        """Whether received packets are those from index first on, with sizes and checksums as they should be."""
        if not self._any_size and not self.packet_size(first) == payload == self.packet_size(first + count - 1):
            return False
        if not self.checks:             # then the headers are known
            return Batch.of(payload)('headers', count).unpack_from(data, offset) == self._headers(first, count)
        fields = Batch.of(payload)('fields', count).unpack_from(data, offset)
        if fields[2::3].count(payload) < count or fields[0::3] != tuple(consecutive(fields[0], count)):
            return False
        pieces = Batch.of(payload)('payloads', count).unpack_from(data, offset)
        number = self.salt + self.base + first
        for check in self.checks:
            if fields[1::3] == tuple([check(piece, i) & MASK for i, piece in enumerate(pieces, number)]):
                if len(self.checks) > 1:
                    self.checks[:] = [check]
                return True
        return False

    def arrived(self, first, last):
        """The payloads from index first up to last are in their place."""
        fresh = last - first - self._have.count(b'\1', first, last)
        self._have[first:last] = b'\1' * (last - first)
        self._missing -= fresh
        self.received += fresh

    def in_place(self, headers, first, count, size):
        """Whether packets that came straight to their place, `size` bytes of them, are those from index first on.

        headers: the received ones, of a whole round.
        """
        last = first + count
        part_of_round = slice(first * PACKET.size, last * PACKET.size)
        return (0 < count <= self.count - first and size == count * PACKET.size + len(self.view(first, last))
                and headers[part_of_round] == self.headers[part_of_round])

    complete = property(lambda self: not self._missing)

    def has(self, index):
        """Whether a packet has arrived, by its place in the round."""
        return bool(self._have[index])

    def lacks(self, first, last):
        """Whether none of the packets from index first up to last has arrived."""
        return self._have.find(b'\1', first, last) < 0

    def missing(self):
        """What has not arrived, as bits."""
        return gaps_of(self._have) if self._missing else 0

    def here(self, first, last):
        """(start, stop) of the first packets in a row, from index first up to last, that have arrived; None if none."""
        start = self._have.find(b'\1', first, last)
        if start < 0:
            return None
        stop = self._have.find(b'\0', start, last)
        return start, last if stop < 0 else stop

    def differing(self, sums):
        """Which packets have another CRC-32 than that in `sums`, as bits."""
        return gaps_of(bytearray([ours == theirs for ours, theirs in zip(self.sums(), sums)]))

    def forget(self, gaps):
        """Some packets have not arrived after all."""
        for place in places(gaps):
            self._have[place] = 0
        self._missing += how_many(gaps)
        self._sums = None

    def payload_of(self, index):
        """The payload of a packet by its place, padded with zeros to a full one."""
        start = index * self.payload
        return self._view[start:start + self.packet_size(index)].tobytes().ljust(self.payload, b'\0')

    def restore(self, index, padded):
        """Put a packet's payload that was solved for (see Coded repair)."""
        start, size = index * self.payload, self.packet_size(index)
        self._view[start:start + size] = padded[:size]
        self.arrived(index, index + 1)

    def flush(self):
        """The round's bytes in pieces, for the output: buffer_flush.

        They are memoryviews of the buffer itself.
        """
        first = 0
        for last in sorted(index + 1 for index in self.short if index < self.count - 1) + [self.count]:
            if last > first:
                yield self.view(first, last)
            first = last


# ---------------------------------------------------------------------------
# Coded repair
# ---------------------------------------------------------------------------

# One multicast XOR of several packets repairs a different loss at each client
# (Nguyen et al., "Wireless Broadcast Using Network Coding", 2009), as long as
# no client lacks more than one of them.

MOST_MEMBERS = 600                      # a recipe must fit in a datagram
AT_A_TIME = 200                         # packets, between two moments for others


def combine(requests, most=MOST_MEMBERS):
    """Group lost packets so that no client lacks two of one group.

    requests: what each client asked for, as bits.  Greedy, one group after the other,
    the most wanted packets first: each packet that is taken leaves those that none
    of its clients lacks.  So the time is linear in what was lost.

    Yields lists of places as far as they are found, now and then, so that others get
    their turn; the last ones are complete.
    """
    groups, work, everything = [], 0, 0
    for gaps in requests:
        everything |= gaps
    lacking = [[] for _ in range(everything.bit_length())]      # by place: what those who lack it do not lack
    for gaps in requests:
        others, lost = everything ^ gaps, places(gaps)
        for place in lost:
            lacking[place].append(others)
        work += len(lost)
        if work > 10 * AT_A_TIME:
            work = 0
            yield groups
    classes = collections.defaultdict(lambda: bytearray(len(lacking)))
    for place, clients in enumerate(lacking):       # by how popular they are
        classes[len(clients)][place] = 1
    popular = [gaps_of(classes[size].translate(SWAPPED)) for size in sorted(classes, reverse=True) if size]
    left = everything                               # in no group yet
    while left:
        members, free = [], left
        for like in popular:
            fitting = free & like
            while fitting and len(members) < most:
                place = fitting.bit_length() - 1
                members.append(place)
                left ^= 1 << place
                free = functools.reduce(operator.and_, lacking[place], free)
                fitting = free & like
                work += 1
            if not free:
                break
        groups.append(members)
        if work > AT_A_TIME:
            work = 0
            yield groups
    yield groups


SWAPPED = b'\1' + b'\0' * 255           # of flags: 0 and what is not


def recipes(groups, number, room):
    """The recipe payloads for groups; each fits in `room` bytes.

    number: the repair number of the first recipe.  As the combinations are
    numbered behind the recipes, it takes their count to write them.
    """
    parts, used = [[]], 4
    for members in groups:
        size = 2 + 2 * len(members)
        if used + size > room:
            parts.append([])
            used = 4
        parts[-1].append(members)
        used += size
    payloads, number = [], number + len(parts)
    for part in parts:
        payload = U32.pack(number)
        for members in part:
            payload += struct.pack('<%dH' % (1 + len(members)), len(members), *members)
        payloads.append(payload)
        number += len(part)
    return payloads


def most_members(payload):
    """How many members a combination may have at a payload of so many bytes."""
    return min(MOST_MEMBERS, (payload - 6) // 2)


def encode_repair(buffer, groups, number, salt):
    """The datagrams of a repair pass, as a Buffer, and how many are recipes.

    Yields them as far as they are made, as combine() does.
    """
    first = recipes(groups, number, buffer.payload)
    coded = Buffer(buffer.payload, len(first) + len(groups), salt - REPAIR_BIT, buffer.checks)
    coded.start(REPAIR_BIT + number, 0, 0)
    for payload in first:
        coded.add(payload.ljust(buffer.payload, b'\0'))
    work = 0
    for members in groups:
        total = 0
        for index in members:
            total ^= to_int(buffer.payload_of(index))
        coded.add(to_bytes(total, buffer.payload))
        work += len(members)
        if work > AT_A_TIME:
            work = 0
            yield coded, len(first)
    yield coded, len(first)


def read_recipe(payload):
    """(repair number, members) of each combination in a recipe."""
    if len(payload) < U32.size:
        return
    number, offset = U32.unpack_from(payload)[0], U32.size
    while offset + 2 <= len(payload):
        count = struct.unpack_from('<H', payload, offset)[0]
        if not count or offset + 2 + 2 * count > len(payload):
            return                      # the rest is padding
        yield number, struct.unpack_from('<%dH' % count, payload, offset + 2)
        number += 1
        offset += 2 + 2 * count


def solve(buffer, coded, recipe_count):
    """Recover lost packets of a buffer from what arrived of a repair pass.

    coded: the pass as a Buffer.  Returns the number of packets recovered.
    """
    recovered = 0
    for place in range(min(recipe_count, coded.count)):
        if not coded.has(place):
            continue
        for number, members in read_recipe(coded.payload_of(place)):
            at = coded.index(REPAIR_BIT + number)
            if at >= coded.count or not coded.has(at) or at < recipe_count:
                continue
            if [i for i in members if i >= buffer.count]:
                continue
            lost = [i for i in members if not buffer.has(i)]
            if len(lost) != 1:
                continue
            total = to_int(coded.payload_of(at))
            for index in members:
                if index != lost[0]:
                    total ^= to_int(buffer.payload_of(index))
            buffer.restore(lost[0], to_bytes(total, buffer.payload))
            recovered += 1
    return recovered


# ---------------------------------------------------------------------------
# Datagrams
# ---------------------------------------------------------------------------

# What decides the speed is how many packets a system call carries.  Three
# ways, the best that works is found by trying:
#   gso     the kernel cuts one large send into datagrams (UDP_SEGMENT, Linux
#           4.18) and joins arriving ones again (UDP_GRO, Linux 5.0); udp(7)
#   mmsg    sendmmsg(2) and recvmmsg(2) through ctypes, Linux 3.0
#   plain   one datagram a call

WAYS = ('gso', 'mmsg', 'plain')

# Linux's numbers, of which older Python versions lack the names.
SO_RCVBUFFORCE = 33
IP_MTU = 14
IP_MULTICAST_ALL = 49
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
SO_TIMESTAMPNS = 35
MOST_SEGMENTS = 64                      # UDP_MAX_SEGMENTS of the first kernels
LARGEST_SEND = 65507                    # bytes of UDP payload in an IP packet
SOCKET_BUFFER = 16 << 20                # what a receiver asks for, bytes
AMPLE = 4 << 20                         # bytes with which it can look away for a moment

# These mean that a way of sending does not work here, not that a packet
# could not be sent (udp(7); EIO: no checksum offload on this device).
NO_SUCH_WAY = frozenset((errno.EIO, errno.EINVAL, errno.EMSGSIZE,
                         errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOPROTOOPT))
QUEUE_FULL = frozenset((errno.ENOBUFS, errno.ENOMEM))

# struct iovec; struct msghdr: name, its length, iovec, how many, control, its length, flags
# (0P: aligned as a pointer is); and struct mmsghdr, which adds the bytes received.
IOVEC = struct.Struct('@PL')
MSGHDR = struct.Struct('@PIPLPLi0P')
MMSGHDR = 'PIPLPLi0PI0P'
CMSG = struct.Struct('@Lii')            # struct cmsghdr: its length, level, type; cmsg(3)
CMSG_INT = struct.Struct('@i')
LONG = struct.calcsize('@L')            # bytes to which it is aligned
TIMESPEC = struct.Struct('@ll')
CONTROL_SIZE = 64                       # bytes, room for a time and an int


def address_of(data):
    """Where a bytearray lies in memory; it must not change its size."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))


def message_call(name, fd, address, *more):
    """sendmsg(2) and its kin with what lies at an address, without waiting.  Raises OSError."""
    function = getattr(LIBC, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, 'no %s' % name)
    result = function(fd, ctypes.c_void_p(address), *more)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def describe(count, *regions):
    """A struct iovec for each part of some regions of memory, taken in turn: part 0 of each, part 1 of each, ...

    count: parts of each; regions: (address, bytes of a part, parts), those of fewer parts come again and again.
    """
    step = 2 * len(regions)
    words = array.array('L', [0]) * (count * step)
    for i, (address, size, parts) in enumerate(regions):
        addresses = array.array('L', range(address, address + parts * size, size))
        words[2 * i::step] = (addresses * -(-count // max(1, parts)))[:count]
        words[2 * i + 1::step] = array.array('L', [size]) * count
    return words


class MessageVector(object):
    """Many struct mmsghdr at once, for sendmmsg(2) and recvmmsg(2)."""

    WORDS = 8                           # in one; those that are shorter have padding, or there are 32 bits in all

    def __init__(self, iovecs, each, controls=None):
        """iovecs: of describe(), `each` for a message; controls: where there is room for control
        data, of describe(), for as many messages.  What is described must stay where it is."""
        self._iovecs, count = iovecs, len(iovecs) // 2 // each
        start, size = iovecs.buffer_info()[0], each * IOVEC.size
        words = array.array('L', [0]) * (self.WORDS * count)
        words[2::self.WORDS] = array.array('L', range(start, start + count * size, size))
        words[3::self.WORDS] = array.array('L', [each]) * count
        if controls:
            words[4::self.WORDS], words[5::self.WORDS] = controls[0::2], controls[1::2]
        self._size = self.WORDS * words.itemsize
        self._all = {}
        self._template = bytearray(array_bytes(words))
        self._headers = bytearray(self._template)
        self._address = address_of(self._headers)

    def send(self, fd, first, count):
        """sendmmsg(2) of `count` from message `first` on: how many were sent; raises OSError."""
        return message_call('sendmmsg', fd, self._address + first * self._size, count, MSG_DONTWAIT)

    def receive(self, fd, first, count):
        """recvmmsg(2) of up to `count` from message `first` on, without waiting: (sizes, control sizes) in bytes."""
        start = first * self._size
        used = slice(start, start + count * self._size)
        self._headers[used] = self._template[used]
        got = message_call('recvmmsg', fd, self._address + start, count, MSG_DONTWAIT, None)
        if got not in self._all:
            self._all[got] = struct.Struct('@' + MMSGHDR * got)
        fields = self._all[got].unpack_from(self._headers, start)
        return fields[7::8], fields[5::8]


class PacketVector(object):
    """Where the headers and payloads of a Buffer's packets lie, so that the kernel moves them itself.

    headers     where they are, a bytearray: those of the Buffer, or another one for what is to be received
    """

    def __init__(self, buffer, headers, spill=None, controls=None):
        """buffer: a Buffer; headers: a bytearray of its capacity of them; spill, controls: regions as describe() takes
        them, to receive what is longer than a packet, and control data."""
        self.headers, self._payloads, self._payload = headers, buffer.payloads, buffer.payload
        self._count, self._spill, self._controls = buffer.capacity, spill, controls
        self._places = ((address_of(headers), PACKET.size, self._count),
                        (address_of(buffer.payloads), buffer.payload, self._count))
        self._iovecs = describe(self._count, *self._places)
        if spill:
            self._iovecs.extend(spill[:2])
        self._messages = None           # a MessageVector, once it is needed
        self._header = bytearray(MSGHDR.size)
        self._address = address_of(self._header)

    def _describe(self, first, iovecs, control=0, size=0):
        MSGHDR.pack_into(self._header, 0, 0, 0, self._iovecs.buffer_info()[0] + 2 * first * IOVEC.size,
                         iovecs, control, size, 0)

    def send_joined(self, fd, first, last):
        """sendmsg(2) of the packets from index first up to last, as one.  Raises OSError."""
        self._describe(first, 2 * (last - first))
        message_call('sendmsg', fd, self._address, MSG_DONTWAIT)

    def send_many(self, fd, first, last):
        """sendmmsg(2) of the packets from index first up to last: how many were sent.  Raises OSError."""
        if self._messages is None:
            self._messages = MessageVector(self._iovecs, 2)
        return self._messages.send(fd, first, last - first)

    def receive_joined(self, fd, first):
        """recvmsg(2) of joined packets to their places from index first on; ((size,), (control size,)) in bytes.

        The control data is in place 0.  Raises OSError.
        """
        room = min(MOST_SEGMENTS, self._count - first)
        self._describe(first, 2 * room + (room < MOST_SEGMENTS), *self._controls[:2])
        size = message_call('recvmsg', fd, self._address, MSG_DONTWAIT)
        return (size,), (MSGHDR.unpack(self._header)[5],)

    def receive_many(self, fd, first, count):
        """recvmmsg(2) of up to so many packets to their places from index first on; (sizes, control sizes) in bytes.

        Spill and control data are in the places of these indices, modulo how many there are.  Raises OSError.
        """
        if self._messages is None:
            self._messages = MessageVector(describe(self._count, *(self._places + (self._spill,))), 3,
                                           describe(self._count, self._controls))
        return self._messages.receive(fd, first, count)

    def gather(self, first, size):
        """The first `size` bytes of what was received from index first on, as a bytearray; or less, if the rest was spilt."""
        data = bytearray()
        for i in range(first, min(self._count, first - (-size // (PACKET.size + self._payload)))):
            data += self.headers[i * PACKET.size:(i + 1) * PACKET.size]
            data += self._payloads[i * self._payload:(i + 1) * self._payload]
        return data[:size]


def multicast_route(local_ip):
    """A UDP socket that multicasts through the interface of local_ip.  Raises OS_ERRORS."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(local_ip))
    except OS_ERRORS:
        sock.close()
        raise
    return sock


class DatagramSender(object):
    """Multicasts the packets of a Buffer."""

    # A larger one would let the kernel's queue drop at the egress without a
    # word; with this one the socket is full first, and we wait.
    SEND_BUFFER = 256 << 10

    def __init__(self, local_ip, group, port, ttl, way='auto'):
        """local_ip: address of the egress interface; way: one of WAYS.

        Raises OS_ERRORS where there is no such interface.
        """
        self.sock = multicast_route(local_ip)
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SEND_BUFFER)
        self.sock.connect((group, port))
        self.sock.setblocking(False)
        self.mtu = self.sock.getsockopt(socket.IPPROTO_IP, IP_MTU)
        self.way = WAYS[0] if way == 'auto' else way
        self.strict = way != 'auto'
        self.trouble = None             # the last error that lost packets
        self._slot = None               # what the kernel is set up for
        self._vectors = weakref.WeakKeyDictionary()     # Buffer -> PacketVector

    def fileno(self):
        """For select(): writable when there is room for more."""
        return self.sock.fileno()

    def most(self, slot):
        """How many packets of `slot` bytes one call can carry."""
        if self.way == 'gso':
            return min(MOST_SEGMENTS, LARGEST_SEND // slot)
        return MOST_SEGMENTS if self.way == 'mmsg' else 1

    def send(self, buffer, first, last):
        """Send packets of a Buffer from index first up to last, at most one
        call's worth.  Returns the index after the last one sent, which is
        `first` when the socket is full.  Packets that the kernel refuses
        count as sent: they are lost, as others are, and `trouble` says why.
        """
        last = min(last, first + self.most(buffer.slot))
        way = self.way
        if buffer.short:                # such a one goes alone
            way = 'plain' if first in buffer.short else way
            last = min([last] + [index for index in buffer.short if index > first])
        try:
            return getattr(self, '_send_' + way)(buffer, first, last)
        except OS_ERRORS as error:
            number = errno_of(error)
            if number in TRY_AGAIN:
                return first
            if number in QUEUE_FULL:
                time.sleep(0.001)       # writable, yet full: no use in select
                return first
            if number in NO_SUCH_WAY and self.way != WAYS[-1]:
                self._fall_back(error)
                return first
            self.trouble = explain(error)
            return last

    def _fall_back(self, error):
        if self.way == 'gso' and self._slot:
            self.sock.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
        self._slot = None
        worse = WAYS[WAYS.index(self.way) + 1]
        tell('wrong_way' if self.strict else 'way_of_sending', old=self.way, reason=explain(error),
             new=worse)
        self.way = worse

    def _send_gso(self, buffer, first, last):
        if buffer.slot != self._slot:
            self.sock.setsockopt(SOL_UDP, UDP_SEGMENT, buffer.slot)
            self._slot = buffer.slot
        self._vector_of(buffer).send_joined(self.sock.fileno(), first, last)
        return last

    def _send_mmsg(self, buffer, first, last):
        return first + self._vector_of(buffer).send_many(self.sock.fileno(), first, last)

    def _send_plain(self, buffer, first, _last):
        self.sock.send(buffer.packet(first))
        return first + 1

    def _vector_of(self, buffer):
        if buffer not in self._vectors:
            self._vectors[buffer] = PacketVector(buffer, buffer.headers)
        return self._vectors[buffer]

    def close(self):
        """Close the socket."""
        self.sock.close()


class DatagramReceiver(object):
    """Receives a group's datagrams, many a call.

    Each message of a call has a slot of one packet's size, and the slots are
    adjacent, so full packets that arrive one by one lie back to back, as those
    do that the kernel joined.  What is longer than its slot goes on in a spill
    area.  While the kernel joins datagrams it puts them straight to where they are expected.
    """

    MESSAGES = 64                       # in a call
    SPILL = 65536                       # bytes

    def __init__(self, local_ip, group, port, payload, way='auto', source=None):
        """local_ip: address of the ingress interface; payload: bytes in a
        full packet; way: one of WAYS; source: (address, port) whose datagrams are
        taken (None: anybody's).  Raises OS_ERRORS.

        After each call of receive():
        first, last     when its first and its last message arrived, seconds on any clock
        in_first        packets in its first message
        """
        self.first = self.last = 0.0
        self.in_first = 0
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._join(local_ip, group, port, source)
        except OS_ERRORS:
            self.sock.close()
            raise
        self.way = WAYS[0] if way == 'auto' else way
        if self.way == 'gso':
            try:
                self.sock.setsockopt(SOL_UDP, UDP_GRO, 1)
            except OS_ERRORS:
                self.way = 'mmsg'
        self.slot = PACKET.size + payload
        self._slots = bytearray(self.MESSAGES * self.slot + 1)
        self._spill = bytearray(self.MESSAGES * self.SPILL)
        self._control = bytearray(self.MESSAGES * CONTROL_SIZE)
        self._places = (address_of(self._spill), self.SPILL, self.MESSAGES), (
            address_of(self._control), CONTROL_SIZE, self.MESSAGES)
        self._aside = MessageVector(
            describe(self.MESSAGES, (address_of(self._slots), self.slot, self.MESSAGES), self._places[0]), 2,
            describe(self.MESSAGES, self._places[1]))
        self._joins = False             # whether the last call got joined datagrams
        self._vectors = weakref.WeakKeyDictionary()     # Buffer -> PacketVector

    def _join(self, local_ip, group, port, source):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:                            # root may have more than net.core.rmem_max
            self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER)
        except OS_ERRORS:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        self.socket_buffer = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        try:                            # only the groups that this socket joins
            self.sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
        except OS_ERRORS:
            pass
        self._stamped = CMSG.size + TIMESPEC.size       # bytes of control that are a time
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OS_ERRORS:
            self._stamped = 0
        self.sock.bind((group, port))
        if source:                      # the kernel drops what comes from others: udp(7)
            self.sock.connect(source)
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                             socket.inet_aton(group) + socket.inet_aton(local_ip))
        self.sock.setblocking(False)

    def fileno(self):
        """For poll(): readable when there are datagrams."""
        return self.sock.fileno()

    def receive(self, aim=None):
        """What has arrived, without waiting, as a list of batches.

        aim: (Buffer, index) from where on packets are expected that have not arrived; None: no idea.

        A batch is what Buffer.put takes: (data, offset, count, payload), valid
        until the next call; or, where packets came straight to their place and are as they should be,
        (Buffer, index of the first, count, payload).  None when nothing has arrived.
        """
        try:
            if self.way == 'plain':
                sizes, controls = self._receive_one_by_one(), ()
            elif aim:
                return self._receive_in_place(*aim)
            else:
                sizes, controls = self._aside.receive(self.fileno(), 0, self.MESSAGES)
        except OS_ERRORS as error:
            if errno_of(error) in NO_SUCH_WAY and self.way != 'plain':
                tell('way_of_receiving', old=self.way, reason=explain(error), new='plain')
                if self.way == 'gso':
                    self.sock.setsockopt(SOL_UDP, UDP_GRO, 0)
                self.way, self._joins = 'plain', False
                return []
            return None                 # nothing there, or a passing error
        if not sizes:
            return None
        slot = self.slot
        self._note(0, controls)
        if sizes.count(slot) == len(sizes) and not self._joins:
            return [(self._slots, 0, len(sizes), slot - PACKET.size)]
        batches = []
        for i, size in enumerate(sizes):
            data = self._slots[i * slot:(i + 1) * slot][:size]
            batches += self._taken_apart(i, data, size, controls and controls[i], not i)
        return batches

    def _receive_in_place(self, buffer, first):
        """As receive() has it; the packets are probably those of a Buffer from index first on."""
        if buffer not in self._vectors:
            self._vectors[buffer] = PacketVector(buffer, bytearray(len(buffer.headers)), *self._places)
        vector, slot, place = self._vectors[buffer], self.slot, 0
        if self._joins:
            sizes, controls = vector.receive_joined(self.fileno(), first)
        else:
            place = first % self.MESSAGES
            sizes, controls = vector.receive_many(self.fileno(), first, min(self.MESSAGES, buffer.count - first))
        joined = self._joins
        self._note(place, controls)
        count, size = len(sizes), sum(sizes)
        if joined:
            segment = self._segment(0, size, controls[0])
            self.in_first = count = -(-size // max(1, segment))
            whole = segment in (slot, size)
        else:
            whole = sizes[:-1].count(slot) == count - 1
        if whole and buffer.in_place(vector.headers, first, count, size):
            return [(buffer, first, count, buffer.payload)]
        if joined:
            return self._taken_apart(0, vector.gather(first, size), size, controls[0], True)
        if sizes.count(slot) == count:
            return [(vector.gather(first, size), 0, count, buffer.payload)]
        batches = []
        for i, size in enumerate(sizes):
            data = vector.gather(first + i, min(size, slot))
            batches += self._taken_apart((first + i) % self.MESSAGES, data, size, controls[i], not i)
        return batches

    def _taken_apart(self, place, data, size, control, first):
        """The batches of a message that may be many datagrams.

        place: of its control data and of its spill; data: a bytearray of what was not spilt; size: bytes in
        all; control: size of the control data; first: whether it is the first message of a call.
        """
        segment, batches, offset = self._segment(place, size, control), [], 0
        if first:
            self.in_first = -(-size // max(1, segment))
        data += self._spill[place * self.SPILL:place * self.SPILL + size - len(data)]
        while size > PACKET.size and segment > PACKET.size:
            count = min(max(1, size // segment), Batch.MOST)
            segment = min(segment, size)            # the last may be shorter
            batches.append((data, offset, count, segment - PACKET.size))
            offset += count * segment
            size -= count * segment
        return batches

    def _segment(self, place, size, control):
        """The size of each datagram, but perhaps the last, in a message of `size` bytes whose control data is there."""
        joined = control and control > self._stamped
        return self._control_of(place, SOL_UDP, UDP_GRO, CMSG_INT)[0] if joined else size

    def _note(self, place, controls):
        """Note when the first and the last message arrived: by the kernel, else now; socket(7).

        place: of the first one's control data; controls: sizes of all.
        """
        self.in_first = 1
        self._joins = max(controls or (0,)) > self._stamped
        if controls and self._stamped and controls[0] and controls[-1]:
            self.first = self.last = self._time_of(place)
            if len(controls) > 1:
                self.last = self._time_of((place + len(controls) - 1) % self.MESSAGES)
        else:
            self.first = self.last = monotonic()

    def _time_of(self, place):
        seconds, nanoseconds = self._control_of(place, socket.SOL_SOCKET, SO_TIMESTAMPNS, TIMESPEC)
        return seconds + nanoseconds * 1e-9

    def _control_of(self, place, level, kind, data):
        """The control data of a level and kind in one of the places; zeros if there is none."""
        at = place * CONTROL_SIZE
        for _ in range(2):              # a time and a size at the most
            length, its_level, its_kind = CMSG.unpack_from(self._control, at)
            if (its_level, its_kind) == (level, kind):
                return data.unpack_from(self._control, at + CMSG.size)
            at += -(-length // LONG) * LONG
            if not length or at + CMSG.size > (place + 1) * CONTROL_SIZE:
                break
        return data.unpack(b'\0' * data.size)

    def _receive_one_by_one(self):
        sizes, slots = [], memoryview(self._slots)
        try:
            while len(sizes) < self.MESSAGES:
                start = len(sizes) * self.slot
                sizes.append(self.sock.recv_into(slots[start:start + self.slot + 1]))
        except OS_ERRORS:
            pass
        return sizes

    def overflows(self):
        """Datagrams that this host's own socket buffer had no room for.

        The last column of /proc/net/udp; None where it cannot be told.
        """
        inode = str(os.fstat(self.fileno()).st_ino)
        try:
            with open('/proc/net/udp') as table:
                for line in table:
                    columns = line.split()
                    if columns[9] == inode:
                        return int(columns[-1])
        except (OSError, IOError, IndexError, ValueError):
            pass
        return None

    def close(self):
        """Leave the group and close the socket."""
        self.sock.close()


# ---------------------------------------------------------------------------
# Pacing
# ---------------------------------------------------------------------------

class Pacer(object):
    """Spreads packets over time: says how many to send now, and when next.

    A burst is what the rate makes in half a millisecond, and at most one call
    (64 KB): a cheap switch that joins a fast port to a slow one has to hold
    about one burst, and the smallest have 100 KB or so for all their ports.
    """

    BURST = 0.0005                      # seconds
    LARGE, SMALL = 96 << 10, 24 << 10   # bytes that come at once, or are made good after a delay: a queue has to hold them
    MOST_CATCH_UP = 0.008               # seconds: and no more than so long
    MOST_DEBT = 0.1                     # seconds of the line that others can have at once

    def __init__(self):
        self.rate = UNLIMITED           # bit/s of IP packets
        self.most = self.LARGE          # bytes at once
        self._next = 0.0

    def burst(self, packet_size):
        """How many packets of so many bytes to send in one go."""
        if self.rate == UNLIMITED:
            return MOST_SEGMENTS
        return int(max(1, min(MOST_SEGMENTS, min(self.rate * self.BURST / 8, self.most) / packet_size)))

    def sent(self, size):
        """Count `size` bytes just sent; returns when to send again, seconds
        on the monotonic clock."""
        late = min(self.MOST_CATCH_UP, self.most * 8 / self.rate)
        self._next = max(self._next, monotonic() - late) + size * 8 / self.rate
        return self._next

    def leave_room(self, size):
        """Others send `size` bytes on the same line; returns when to send again, as sent() does."""
        now = monotonic()
        self._next = min(max(self._next, now) + size * 8 / self.rate, now + self.MOST_DEBT)
        return self._next


# How a client heard a round: its arrival rate as a share of the departure's, at most about 1, with what
# its medium loses allowed for; how far that may be wrong; the share of the packets that it lost.
Reception = collections.namedtuple('Reception', 'ratio error lost member')

# How to send a round: at which rate, and its head, bit/s; whether the line is known to carry that, so that what is lost
# is not our doing; the share lost that made us slow down to it, where it is the first such; bytes at once.
Speed = collections.namedtuple('Speed', 'rate head_rate calm trial burst')
Speed.__new__.__defaults__ = (Pacer.LARGE,)


class RateControl(object):
    """Finds the fastest rate that the slowest link carries: `--rate auto`.

    A train of packets that is sent faster than a link on its way lets it through comes out
    at that link's rate (the dispersion of a packet train), whether or not any are lost.  So two
    rounds that were sent too fast tell the line's rate, and from then on we stay just below it.
    Where a client's clock cannot tell, what it lost does.

    Now and then the head of a round is sent faster.  If it arrives so, there is more; if it arrives slower
    than the line lets it, somebody else has the rest.  He gets his share, as who makes us lose packets at a
    rate that the line carries; then we take back what nobody wants.

    A queue may be too small for our bursts: so smaller ones are tried before a loss is believed.  Losses that do
    not fall with the rate are the medium's own: a client's `medium` remembers them, and only what is lost beyond
    counts.  Who tells no times is judged by losses alone.
    """

    START = 10e9                        # bit/s; the first round is short
    LOWEST = 1e6                        # bit/s
    BELOW = 0.995                       # of the line's rate
    SLOWER = 0.02                       # share by which arrival must lag behind departure to tell
    JITTER = 0.001                      # seconds by which a clock may be wrong in a train
    AGREE = 0.05                        # share by which two estimates of a line may differ
    DOUBT = 0.5                         # share by which one may be wrong and still counts
    OVER = 1.1                          # times the rate, to know it better, or to look for more
    LEAP = 0.25                         # how much faster at once, once there was an estimate
    MORE = 1.04                         # times the line's rate, which a head must find
    HEADS = 3                           # times in a row
    LOOK_EVERY = 4.0                    # seconds between two such heads
    LOOK_SOON = 1.0                     # seconds until the first
    STEADY = 0.8                        # of the rate: we kept it, so that the arrival can tell
    FASTER = 1.5                        # times what we ever sent at: no rate above matters
    NOISE = 0.001                       # share of loss that is nobody's
    SAME = 0.75                         # times as much is lost at a lower rate: so it is lost at any
    SHARE = 0.5                         # of the line, which is ours whatever a rival takes
    SIGNS = 3                           # of a rival, one after the other,
    SOON = 5.0                          # in so many seconds
    PATIENCE = 1.2                      # seconds that he has to take what we leave: TCP may have to find out first
    MOST_MEDIUM = 0.3                   # share of loss up to which a client counts
    LONGEST_QUEUE = 3.0                 # seconds that packets can wait without that any is lost

    def __init__(self):
        self.rate = self.START
        self.line = None                # bit/s, the slowest link's rate once it is known
        self.burst = Pacer.LARGE        # bytes at once
        self._error = 0.0               # share by which it may be less
        self._estimate = None           # bit/s, the last of what it may be
        self._step = 1.0                # how much faster next, as a share, while it is sought
        self._fastest = self.LOWEST     # bit/s at which a round was ever sent
        self._trial = None              # the share lost that made us slow down, until it is seen to help
        self._by_bursts = None          # the share lost that made us try smaller bursts, until it is seen whether they help
        self._burst_tried = UNLIMITED   # bytes at once when they were last tried
        self._usual = 0.0               # the share that was known then to be lost at any rate
        self._lagged = False            # the last round did, with losses or without
        self._common = 0.0              # share of packets that all clients lose at any rate, on average
        self._signs = 0                 # of a rival, one after the other
        self._sign_at = -UNLIMITED      # when the last was seen, seconds
        self._gave_way = None           # bit/s that arrived when we gave way
        self._found = 0                 # heads in a row that found more
        self._next_look = 0.0

    def speed(self, now, looks):
        """The Speed of the next round; looks: whether its head is long enough to look for more."""
        if self.line is None:
            return Speed(self.rate, self.rate, False, None, self.burst)
        if self._trial or not looks or now < self._next_look:
            return Speed(self.rate, self.rate, not self._error and self.rate <= self.line, self._trial,
                         self.burst)
        self._next_look = now + (self.LOOK_EVERY if self.rate >= self.BELOW * self.line else 0.0)
        return Speed(self.rate, self.rate + (self.OVER - 1) * self.line, False, None, self.burst)

    @classmethod
    def remember(cls, member, lost, speed):
        """Whether a member's medium loses so much, as far as a round that was sent at a Speed can tell."""
        if speed.trial:
            member.medium = min(lost, cls.MOST_MEDIUM)
        elif speed.calm or lost < member.medium:
            member.medium += 0.25 * (min(lost, cls.MOST_MEDIUM) - member.medium)

    def learn(self, speed, achieved, worst, count, now, mean=0.0, clients=1):
        """Learn from a round.

        speed: at which it was to be sent; achieved: bit/s at which its second half was; worst: the
        Reception with the least ratio; count: packets in the round; now: seconds; mean: the share that
        a client lost on average, of so many.  Returns why the rate changed, or None.
        """
        if achieved < speed.rate:       # else it went at once, and nobody knows
            self._fastest = max(self._fastest, achieved)
        if speed.trial or speed.calm:
            self._common += (1.0 if speed.trial else 0.25) * (min(mean, self.MOST_MEDIUM) - self._common)
        lossy = self._unusual(worst.lost, max(worst.member.medium, self._common), count, clients)
        if self._try_small_bursts(speed, worst.lost, lossy):
            return None
        steady = achieved >= self.STEADY * speed.rate
        lags = 1 - worst.ratio > self.SLOWER + worst.error and (steady or lossy)
        if speed.trial and self._trial:
            self._trial = None
            if worst.lost - self._usual > self.SAME * speed.trial:
                return self._blame(worst, achieved)
        lagged, self._lagged = self._lagged, lags
        # Who could not keep the rate lost packets in bursts, whatever the line carries on average.
        sent = achieved if steady else min(speed.rate, UNLIMITED if self._estimate else self.FASTER * self._fastest)
        arrived = max(self.LOWEST, sent * worst.ratio)
        if self.line is None:
            return self._slow_down(arrived, worst, lossy, now) if lags else self._speed_up(speed, achieved, steady)
        if self._outdated(speed):
            return None
        most = self._at_most(arrived, worst.error)
        if self._error and (lags or lossy) and most > (1 - self._error - self.SLOWER) * self.line:
            self.line = min(self.line, most)
            self._error = self._error / 2 if self._error > self.SLOWER else 0.0
            self.rate = min(self.rate, self.BELOW * self.line)
            return 'it carries %s, %.1f %% lost' % (bits(self.line), 100 * worst.lost)
        if lags and lagged and self._gave_way:
            return self._slow_down(arrived, worst, lossy, now)
        if lags and lagged or lossy and not lags:
            return self._give_way(most, now, '%.1f %% lost' % (100 * worst.lost))
        return None

    def learn_head(self, departed, arrived, error, now):
        """Learn from a head that was sent faster, at which rate, bit/s, and arrived so at the slowest client.

        error: share by which that may be wrong; now: seconds.  Returns why the rate changed, or None.
        """
        if self.line is None:
            return None
        self._found = self._found + 1 if arrived > self.MORE * self.line else 0
        if self._found:
            self._next_look = 0.0
            if self._found < self.HEADS:
                return None
            self._found, self.line, self._gave_way, self._step = 0, None, None, self.OVER - 1
            self.rate *= self.OVER
            return 'there is more'
        if error > self.AGREE:
            return None
        if abs(arrived - self.line) < (self.AGREE + self._error) * self.line and arrived < (1 - self.SLOWER) * departed:
            self.line += (1.0 if self._error else 0.5) * (arrived - self.line)      # so it is told more precisely
            self._error, self._gave_way = 0.0, None
            self.rate = min(departed, self.BELOW * self.line)
        elif arrived < (1 - self.SLOWER - error) * min(departed, self.line):
            return self._give_way(arrived, now, 'more arrives at %s' % bits(arrived))
        elif self.rate < self.BELOW * self.line:
            self.rate = min(departed, self.BELOW * self.line)
            return 'nobody takes it'
        return None

    def _outdated(self, speed):
        """Whether a round was sent faster than we send now: it was under way when we learned of others."""
        return speed.rate > self.rate * 1.0001

    @staticmethod
    def _at_most(arrived, error):
        """At which rate a train may really have arrived, if that is wrong by such a share."""
        return arrived / (1 - min(error, 0.5))

    def _unusual(self, lost, medium, count, clients):
        """Whether such a share lost is more than the medium's own, noise, and the chance of the worst of many."""
        usual = (medium + self.NOISE) * count
        sigmas = 3 + math.sqrt(2 * math.log(clients))
        return lost * count > usual + sigmas * math.sqrt(usual) + sigmas / 3

    def _speed_up(self, speed, achieved, steady):
        """We are not at the line's rate yet."""
        faster = achieved * (1 + self._step)
        if faster <= self.rate or not steady or speed.rate < self.BELOW * self.rate or self._outdated(speed):
            return None                 # we are the slowest, or it was sent before we learned more
        self.rate = faster
        self._step = min(1.0 if self._estimate is None else self.LEAP, 2 * self._step)
        return 'it keeps up'

    def _slow_down(self, arrived, worst, lossy, now):
        """The line is slower than we sent.  It is known when two rounds agree."""
        if arrived >= self.rate:
            return None                 # of a round that was under way when we learned it
        before, self._estimate = self._estimate, arrived
        self._step = self.OVER - 1
        error = worst.error if worst.error > self.SLOWER else 0.0
        if before and error < self.DOUBT and abs(before - arrived) < self.AGREE * arrived:
            self._error = self.AGREE + error        # if it is less than we think, losses will tell
            self.line = self._at_most(max(before, arrived), error)
            self.rate = self.BELOW * (max(before, arrived) if lossy else self.line)
            self._next_look, self._gave_way = now + self.LOOK_SOON, None
        else:                           # somebody may have been held up: the better of two is believed
            self.rate = min(self.rate, self.OVER * self._at_most(max(arrived, before or 0.0), error))
            self.line = None
        if lossy:
            self._usual = worst.member.medium
            self._trial = worst.lost - self._usual
        return 'it arrives at %s, %.1f %% lost' % (bits(arrived), 100 * worst.lost)

    def _blame(self, worst, achieved):
        """As much is lost at a lower rate: what was thought to be the line's rate is not."""
        self.line = self._estimate = None
        self._step = 1.0
        self.rate = max(self.rate, 2 * achieved)
        return 'a loss of %.1f %% at any rate' % (100 * worst.lost)

    def _try_small_bursts(self, speed, lost, lossy):
        """Whether to see first, with the next round, whether smaller bursts help; and whether they did."""
        if speed.burst != self.burst:
            return True                 # of a round that was under way then
        if self._by_bursts is not None:
            if lost > self._by_bursts / 2:
                self.burst = Pacer.LARGE
            self._by_bursts = None
        elif lossy and self.burst == Pacer.LARGE and Pacer.SMALL < speed.rate * Pacer.BURST / 8 < self._burst_tried / 2:
            self._burst_tried, self._by_bursts, self.burst = speed.rate * Pacer.BURST / 8, lost, Pacer.SMALL
            return True
        return False

    def _give_way(self, arrived, now, why):
        """There is a sign of somebody else at a rate that the line should carry, or of a line that is slower.

        It is somebody else if he takes what we leave.
        """
        self._signs = self._signs + 1 if now - self._sign_at < self.SOON else 1
        self._sign_at, self._next_look = now, 0.0
        if self._signs < self.SIGNS:
            return None
        self._signs, before, self._gave_way = 0, self._gave_way, arrived
        if before and self.rate > self.SHARE * self.line and abs(before - arrived) < self.AGREE * arrived:
            self.line, self._gave_way, self._error = min(self.line, arrived), None, self.AGREE     # nobody took it
            self.rate = self.BELOW * self.line
            return why + ' again, and nobody takes it'
        self.rate, self._next_look = min(self.rate, self.SHARE * self.line), now + self.PATIENCE
        return why + ' all the time, to a rival'


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------

def content_of(path):
    """What the user calls a file, `-` for standard input, and its bytes.  Raises Failure."""
    called = 'standard input' if path == '-' else printable(path)
    try:
        with io.open(0 if path == '-' else path, 'rb', closefd=path != '-') as file:
            return called, file.read()
    except OS_ERRORS as error:
        raise Failure('cannot read %s: %s' % (called, explain(error)), USAGE)


class Command(object):
    """A shell command at one end of the image, in a process group of its own."""

    PATIENCE = 5.0                      # seconds, until it says what it waits for
    TURN = 0.01                         # seconds between looks whether it has ended
    LAST_MOMENT = 1.0                   # seconds from SIGTERM to SIGKILL

    # What stops a process group that wants the terminal and may not have it, or that a user stops
    # there: tty(4).  Each gets it, and goes on.
    OF_TERMINAL = frozenset((signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP))

    running = set()                     # all commands that have not ended

    def __init__(self, text, **pipes):
        """text: for the shell; pipes: as subprocess.Popen takes them.  Raises OS_ERRORS."""
        self.text = text
        self.code = None                # its exit code, or -N for signal N; None while it runs
        self._lock = threading.Lock()   # the writer waits for it, and the main thread looks at it
        self._stopped = None            # the signal that has stopped it
        self._terminal = None           # a descriptor, once it has the terminal
        self._through = None            # when it began to be all that is waited for
        self._process = subprocess.Popen(text, shell=True, preexec_fn=self._set_up, **pipes)
        self.pipe = self._process.stdin or self._process.stdout
        self.running.add(self)

    @staticmethod
    def _set_up():
        os.setpgid(0, 0)                # so that all of a pipeline can be ended
        for number in (signal.SIGPIPE, signal.SIGTTOU):
            signal.signal(number, signal.SIG_DFL)
        for fd in os.listdir('/proc/self/fd'):      # what Python 2 would let it inherit
            if int(fd) > 2:
                try:
                    fcntl.fcntl(int(fd), fcntl.F_SETFD, fcntl.FD_CLOEXEC)
                except OS_ERRORS:
                    pass                # the one of listdir()

    def look(self):
        """Whether it has ended; a look that does not wait.  Raises Failure if nobody can tell how."""
        with self._lock:
            if self._stopped:
                self._go_on()
            while self.code is None:
                try:
                    pid, status = uninterrupted(os.waitpid, self._process.pid,
                                                os.WNOHANG | os.WUNTRACED)
                except OS_ERRORS as error:
                    raise Final('how the command ended cannot be known (%s): %s'
                                % (explain(error), printable(self.text)))
                if not pid:
                    return False
                if os.WIFSTOPPED(status):
                    self._stopped = os.WSTOPSIG(status)
                    self._go_on()
                    if self._stopped:
                        tell('command_stopped', signal=self._stopped, command=printable(self.text))
                else:
                    self._ended(-os.WTERMSIG(status) if os.WIFSIGNALED(status)
                                else os.WEXITSTATUS(status))
        return True

    def _ended(self, code):
        self.code = self._process.returncode = code
        self.running.discard(self)
        if self._terminal is not None:
            try:
                os.tcsetpgrp(self._terminal, os.getpgrp())
            except OS_ERRORS:
                pass                    # it went away
            os.close(self._terminal)
            self._terminal = None

    def _go_on(self):
        """If it was stopped for the terminal, and that is ours to give: give it."""
        if self._stopped not in self.OF_TERMINAL:
            return
        try:
            if self._terminal is None:
                terminal = os.open('/dev/tty', os.O_RDWR | os.O_NOCTTY)
                if os.tcgetpgrp(terminal) != os.getpgrp():
                    os.close(terminal)
                    return
                self._terminal = terminal
            os.tcsetpgrp(self._terminal, self._process.pid)
            os.killpg(self._process.pid, signal.SIGCONT)
            self._stopped = None
        except OS_ERRORS:
            pass                        # there is no terminal

    def succeeded(self):
        """Whether it has ended, without waiting.  Raises Failure unless it exited with 0."""
        if not self.look():
            self._through = self._through or monotonic()
            if monotonic() - self._through > self.PATIENCE:
                self._through = UNLIMITED           # said once
                tell('command_awaited', command=printable(self.text))
            return False
        if self.code:
            raise Final('the command %s: %s' % (
                'was ended by signal %d' % -self.code if self.code < 0
                else 'failed with exit code %d' % self.code, printable(self.text)))
        return True

    def finish(self, seconds=UNLIMITED):
        """Wait for its end, at most so long.  Raises Failure unless it exits with 0."""
        deadline = monotonic() + seconds
        while not self.succeeded() and monotonic() < deadline:
            time.sleep(self.TURN)

    def end(self):
        """Ask it to end, if it still runs."""
        if self.code is None:
            self._kill(signal.SIGTERM)
            self._kill(signal.SIGCONT)

    def kill(self):
        """End it at once."""
        self._kill(signal.SIGKILL)

    def close(self):
        """See to its end."""
        self.end()
        try:
            deadline = monotonic() + self.LAST_MOMENT
            while not self.look() and monotonic() < deadline:
                time.sleep(self.TURN)
            if self.code is None:
                self.kill()
                self._ended(-signal.SIGKILL)
        except Failure:
            self._ended(-signal.SIGTERM)
        try:
            self.pipe.close()
        except OS_ERRORS:
            pass                        # of what it did not read

    def _kill(self, number):
        try:
            os.killpg(self._process.pid, number)
        except OS_ERRORS:
            pass


class Hasher(threading.Thread):
    """Hashes an image, part by part, while others do something else: hashing releases the interpreter's lock."""

    def __init__(self):
        threading.Thread.__init__(self, name='hasher')
        self.daemon = True
        self._hash = hashlib.sha256()
        self._digests = bytearray(self._hash.digest())          # through each part, back to back
        self._parts = collections.deque()
        self._given = 0
        self.link = SemLink()
        self._own_link = self.link.spawn()

    def give(self, view):
        """Hash this next; `view` must not change until its digest is known."""
        self._parts.append(view)
        self._given += 1
        self.link.release_child()

    def digest(self, parts=None):
        """The digest through so many parts, of all if None; waits until they are hashed."""
        start = DIGEST_SIZE * (self._given if parts is None else parts)
        while len(self._digests) <= start:
            self.link.wait_child()
        return bytes(self._digests[start:start + DIGEST_SIZE])

    def close(self):
        """Let it end."""
        self.link.close()
        if self.ident:
            self.join()
        else:
            self._own_link.close()

    def run(self):
        """The thread."""
        try:
            while True:
                self._own_link.wait_parent()
                self._hash.update(self._parts.popleft())
                self._digests += self._hash.digest()
                self._own_link.release_parent()
        except LinkClosed:
            pass
        finally:
            self._own_link.close()


class Source(object):
    """Where the server's image comes from: standard input, a file, a command.

    name, size (bytes) are None where they are not known.
    bytes       of the image, as far as it was read
    again       whether what was read can be read again: of a file, and of what is kept in a spool
    """

    def __init__(self, path=None, command=None, digest=True, spool=None):
        """path: of a file; command: for the shell, which start() starts; spool: path of the file
        where to keep what a pipe or a command gives.  Raises Failure."""
        self.path = path
        self._text = command
        self._command = None
        self._file = self._spool = None
        self.name = path and os.path.basename(path)
        self.size = None
        self.bytes = 0
        self.drained = False            # nothing more to read, but the command still runs
        self._digest, self._hasher = digest, None
        self._hashed = 0                # bytes
        self._at = self._start = 0      # where it reads, in the image; where that begins in the file
        self._mark = None               # a file's size and time of change
        self._ended = False             # it was read to its end
        if command is None:
            self._open(path)
        if spool is not None:
            if self.size:
                self._file.close()
                raise Failure('--spool is for an image that comes by a pipe; a file can be read again', USAGE)
            try:
                self._spool = io.open(spool, 'w+b', buffering=0)
            except OS_ERRORS as error:
                raise Failure('cannot write %s: %s' % (printable(spool), explain(error)), USAGE)

    def _open(self, path):
        called = 'standard input' if path is None else printable(path)
        try:
            # Not blocking: a FIFO that nobody writes to yet is waited for like any other producer.
            fd = 0 if path is None else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                if path is not None:
                    os.close(fd)
                raise IOError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._file = io.open(fd, 'rb', buffering=0, closefd=path is not None)
        except OS_ERRORS as error:
            raise Failure('cannot read %s: %s' % (called, explain(error)), USAGE)
        if os.isatty(fd):
            self._file.close()
            raise Failure('%s is a terminal; give the image as "< FILE", through a pipe, with '
                          '-i FILE or with --pipe COMMAND' % called, USAGE)
        if stat.S_ISREG(status.st_mode):
            self._start = os.lseek(fd, 0, os.SEEK_CUR)
            self.size = max(0, status.st_size - self._start)
            self._mark = status.st_size, status.st_mtime

    again = property(lambda self: bool(self._spool or self.size))       # the files of /proc have 0 bytes, and are none

    @property
    def _reads(self):
        return self._spool if self._spool and (self._ended or self._at < self.bytes) else self._file

    def image(self):
        """32 hex digits that name the image: a file's are the same as long as nobody changes it."""
        seed = os.urandom(16)
        if self.size is not None:
            status = os.fstat(self.fileno())
            seed = repr((status.st_dev, status.st_ino, status.st_size, status.st_mtime)).encode('ascii')
        return hashlib.sha256(seed).hexdigest()[:32]

    def replaced(self):
        """Whether there is another file under its name now."""
        try:
            now, ours = os.stat(self.path), os.fstat(self.fileno())
        except OS_ERRORS:
            return False                # not yet
        return (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino)

    def start(self):
        """All is well here: start the command, if there is one.  Raises Failure."""
        if self._digest:
            with uninterruptible:
                self._hasher = Hasher()
                start_thread(self._hasher)
        if self._text is not None:
            try:
                with uninterruptible:
                    self._command = Command(self._text, stdout=subprocess.PIPE)
            except OS_ERRORS as error:
                raise Failure('cannot start the command: %s' % explain(error))
            self._file = io.open(self._command.pipe.fileno(), 'rb', buffering=0, closefd=False)
        if stat.S_ISFIFO(os.fstat(self.fileno()).st_mode):
            try:                        # F_SETPIPE_SZ: fewer, larger reads
                fcntl.fcntl(self.fileno(), 1031, 1 << 20)
            except OS_ERRORS:
                pass

    def fileno(self):
        """For select(): readable when read_into() will not wait."""
        return self._reads.fileno()

    def hash(self, view):
        """Hash the bytes that were read last, which stay where they are until their digest is known; each only once."""
        if self._hasher and self._hashed < self._at:
            self._hashed = self._at
            self._hasher.give(view)

    def seek(self, place):
        """Read on from a place in the image that is not beyond what was read.  Raises Failure."""
        if place == self._at:
            return
        self._at = place
        try:
            if self._spool:
                self._spool.seek(place)
                return
            status = os.fstat(self._file.fileno())
            if (status.st_size, status.st_mtime) != self._mark:
                raise Failure('the image was changed since the transfer began')
            os.lseek(self._file.fileno(), self._start + place, os.SEEK_SET)
        except OS_ERRORS as error:
            raise Failure('cannot read the image again: %s' % explain(error))

    def read_into(self, view):
        """Read once; returns bytes read, 0 at the image's end, None if there is nothing yet.

        Raises Failure, also at the end when the command failed, or when a
        file has another size than it had at the beginning.
        """
        before = self.bytes - self._at  # bytes that were read before
        if self._ended and not before:
            return 0
        try:
            got = uninterrupted(self._reads.readinto, view[:before] if before else view)
        except OS_ERRORS as error:
            raise Failure('cannot read the image: %s' % explain(error))
        if got is None:                 # whoever gave us the pipe wants it not to block
            return None
        if before:
            if not got:
                raise Failure('the image was changed since the transfer began')
            self._at += got
            return got
        if not got:
            self.drained = bool(self._command) and not self._command.succeeded()
            if self.drained:
                return None
            if self.size and self.bytes != self.size:       # the files of /proc say 0
                raise Failure('the image had %d bytes, and now has %d: is it still being '
                              'written?' % (self.size, self.bytes))
            self._ended = True
        if self._spool:
            self._keep(view[:got])
        self.bytes += got
        self._at += got
        return got

    def _keep(self, view):
        """Write to the spool what was read."""
        try:
            self._spool.seek(self.bytes)
            while view:
                view = view[uninterrupted(self._spool.write, view):]
        except OS_ERRORS as error:
            raise Failure('cannot write to the spool: %s' % explain(error))

    def look(self):
        """A look at the command while nothing else is to do.  Raises Failure."""
        if self._command:
            self._command.look()

    def digest(self, parts=None):
        """SHA-256 of what was given to hash(), of so many parts or all; b'' without digests."""
        return self._hasher.digest(parts) if self._hasher else b''

    def end(self):
        """Ask the command to end: nobody reads on."""
        if self._command:
            self._command.end()

    def close(self):
        """Stop reading."""
        if self._command:
            self._command.close()
        for file in (self._file, self._spool):
            if file:
                file.close()
        if self._hasher:
            self._hasher.close()


class Drill(Source):
    """The image of a rehearsal: as many bytes as are asked for, until `over()`."""

    def __init__(self):
        Source.__init__(self, '/dev/zero')
        self.name, self.over = 'a rehearsal', lambda: False

    def read_into(self, view):
        """Read once, as a Source does."""
        return 0 if self.over() else Source.read_into(self, view)


def is_mount_point(path):
    """Whether a file system, or a single file, is mounted there: proc(5), mountinfo."""
    wanted = os.fsencode(path) if hasattr(os, 'fsencode') else path
    try:
        with io.open('/proc/self/mountinfo', 'rb') as table:
            mounted = [line.split(b' ')[4] for line in table]
    except OS_ERRORS + (IndexError,):
        return False
    return wanted in [re.sub(br'\\([0-7]{3})', lambda found: struct.pack('B', int(found.group(1), 8)), name)
                      for name in mounted]


def beside(folder, prefix, ending):
    """The paths of the files in a folder that runs have made beside their targets."""
    try:
        names = os.listdir(folder)
    except OS_ERRORS:
        return []
    return [os.path.join(folder, name) for name in names
            if re.match(re.escape(prefix) + r'[0-9a-f]{12}\.%s$' % ending, name)]


def journal_of(path):
    """The path of the journal of a temporary file."""
    return path[:-len('part')] + 'journal'


def dead_parts(folder, prefix):
    """The temporary files of runs that are dead, as (path, descriptor that has their lock, to be closed)."""
    for path in beside(folder, prefix, 'part'):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OS_ERRORS:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OS_ERRORS:               # somebody writes it
            os.close(fd)
            continue
        yield path, fd


def remove_dead(folder, prefix):
    """Remove what runs that are dead have left."""
    for path, fd in dead_parts(folder, prefix):
        if remove(path):
            tell('removed', path=printable(path))
        os.close(fd)
    for path in beside(folder, prefix, 'journal'):
        if not os.path.lexists(path[:-len('journal')] + 'part'):
            remove(path)


def remove(path):
    """Remove a file, if it is there and ours to remove; returns whether it was."""
    try:
        os.unlink(path)
    except OS_ERRORS:
        return False
    return True


def bring_to_disk(fd):
    """fsync(2), where there is such a thing.  Raises OS_ERRORS."""
    try:
        os.fsync(fd)
    except OS_ERRORS as error:
        if errno_of(error) not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise                       # these: a device that has none


def new_part(folder, prefix):
    """The path of a part of an image that there is not yet."""
    return os.path.join(folder, prefix + '%012x.part' % to_int(os.urandom(6)))


TRIAL = 64 << 20                        # bytes that are written to see how fast that goes, at the most,
TRIAL_TIME = 0.5                        # and seconds after which no more are


def try_writing(folder, prefix, room):
    """Write a new file, bring it to the disk, and have nothing of it left: bytes a second.  Raises OS_ERRORS.

    room: bytes that there are, of which others may need some; None: nobody knows.
    """
    most = TRIAL if room is None else min(TRIAL, max(4096, room // 2))
    block = memoryview(os.urandom(1 << 20))         # which nothing on the way can compress
    path = new_part(folder, prefix)
    with uninterruptible:               # its name is gone at once, and it ends with its descriptor
        file = io.open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb', buffering=0)
        remove(path)
    with file:
        size, began = 0, monotonic()
        while size < most and monotonic() - began < TRIAL_TIME:
            goal = min(most, max(len(block), 2 * size))
            while size < goal:
                size += uninterrupted(os.write, file.fileno(), block[:goal - size])
            bring_to_disk(file.fileno())
        return int(size / max(1e-6, monotonic() - began))


# What makes a file system keep room for a file, fallocate(2); not posix_fallocate(3), which writes zeros where it cannot.
fallocate = getattr(LIBC, 'fallocate64', None) or getattr(LIBC, 'fallocate', None)
if fallocate:
    fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong
KEEP_SIZE = 1                           # FALLOC_FL_KEEP_SIZE: the file's size tells how far it was written
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class Sink(object):
    """Where the client's image goes: standard output, a file, a command.

    A file is written under a temporary name beside its target and takes its
    place at commit(); what is not a regular file is written in place.  Who has
    the temporary file open holds its lock, flock(2), so that of a dead run can
    be told from that of a living one.

    seeks       whether it takes the image in any order, and gives it back: a file, a disk
    journal     the Journal of the temporary file, where one is kept
    """

    LAST_WORDS = 1.0                    # seconds for a command that reads no more to end

    def __init__(self, path=None, command=None, resume=False):
        """path: of the target; command: for the shell; resume: go on where a run broke off, and
        leave what there is for the next one."""
        self._path, self._text, self._resume = path, command, resume
        self._target = self._temporary = self._command = self._fifo = None
        self._fd = self._reader = None
        self._place = 0                 # where in the file the next byte goes
        self.seeks, self.journal = False, None
        self._fate = {}                 # 'is': 'commit' or 'discard', whichever came first
        self.written = 0                # bytes
        self._chunk = 1 << 20           # bytes in a write

    is_file = property(lambda self: self._target is not None)

    def open(self):
        """Find out whether it can be written to; returns the Sink.  Raises Failure."""
        path = self._path
        try:
            if self._text is not None:
                return self
            if path is None:
                if os.isatty(1):
                    raise Final('standard output is a terminal; give "> FILE", a pipe, '
                                '-o FILE or --pipe COMMAND', USAGE)
                self._fd = 1
                os.fstat(1)
            elif os.path.exists(path) and not os.path.isfile(path):
                kind = os.stat(path).st_mode
                if stat.S_ISFIFO(kind):
                    self._fifo = path
                    self._open_fifo()
                else:
                    self.seeks = stat.S_ISBLK(kind)
                    flags = os.O_EXCL | os.O_RDWR if self.seeks else os.O_WRONLY    # not a disk that is mounted
                    self._fd = os.open(path, os.O_NOCTTY | flags)
                    if os.isatty(self._fd):
                        raise OSError(errno.EINVAL, 'it is a terminal')
            else:
                self._target = os.path.realpath(path)
                folder, name = os.path.split(self._target)
                if not os.path.basename(path):
                    raise OSError(errno.EISDIR, 'that is no name of a file')
                if folder == '/dev':    # a mistyped disk, and memory for what is meant for it
                    raise OSError(errno.ENOENT, 'no such device')
                if is_mount_point(self._target):
                    raise OSError(errno.EBUSY, 'it is a mount point, and so cannot be replaced; '
                                  'use "> FILE", or another FILE')
                self._open_temporary(folder, self._prefix(name))
                self.seeks = True
            if self._resume and not self._target:
                raise OSError(errno.EINVAL, '--resume is for a file, which can have a journal beside it')
        except OS_ERRORS as error:
            reason = explain(error)
            if errno_of(error) == errno.EBUSY and not self._target:
                reason += ' (it may be mounted)'
            raise Final('cannot write %s: %s' % (
                'standard output' if path is None else printable(path), reason), USAGE)
        return self

    def _open_temporary(self, folder, prefix):
        """Open a new file, or the one to go on with, and remove all others that dead runs have left."""
        ours = self._resume and self._take_up(folder, prefix)
        remove_dead(folder, prefix)
        while not ours:
            # Its name is kept before there is such a file: a signal may come at any moment.
            self._temporary = new_part(folder, prefix)
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.fstat(self._fd).st_nlink > 0
            except OS_ERRORS as error:  # another run just removes it; or there are no locks here
                ours = errno_of(error) not in TRY_AGAIN
            if not ours:
                os.close(self._fd)
        if self._resume and not self.journal:
            self.journal = Journal(journal_of(self._temporary), new=True)

    def _take_up(self, folder, prefix):
        """Open what a run that is dead has left, of several the one that holds most; returns whether there is any."""
        for path, fd in dead_parts(folder, prefix):
            try:
                journal = Journal(journal_of(path))
            except OS_ERRORS:
                os.close(fd)
                continue
            journal.held.remove(os.fstat(fd).st_size, 1 << 63)      # a part may be shorter than its journal says
            most = self.journal.held.size if self.journal else 0
            if not journal.image or journal.held.size <= most or not is_ours(fd):
                journal.close()
                os.close(fd)
                continue
            if self.journal:
                self.journal.close()
                os.close(self._fd)
            self._temporary, self._fd, self.journal = path, fd, journal
        return self.journal is not None

    def _open_fifo(self):
        """Open it if somebody reads from it; returns whether it is open."""
        try:
            self._fd = os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OS_ERRORS as error:
            if errno_of(error) != errno.ENXIO:      # fifo(7): nobody does
                raise
        return self._fd is not None

    def room(self):
        """How many bytes an image can have; None if that cannot be told.  Raises OS_ERRORS."""
        room = None
        if self._target:
            space = os.fstatvfs(self._fd)
            if space.f_blocks:          # else one without a limit, such as ramfs, says 0 of all
                room = (space.f_bavail if os.geteuid() else space.f_bfree) * space.f_frsize
                room += os.fstat(self._fd).st_blocks * 512          # what it has from an earlier run: stat(2)
        elif self._path is not None and self._fd is not None:
            if stat.S_ISBLK(os.fstat(self._fd).st_mode):
                room = os.lseek(self._fd, 0, os.SEEK_END)
                self._place = None      # so the next write goes to its own
        return room

    def trial(self, room):
        """How fast a file is written beside the target, bytes a second; room: as room() has it.  Raises OS_ERRORS."""
        folder, name = os.path.split(self._target)
        return try_writing(folder, self._prefix(name), room)

    @staticmethod
    def _prefix(name):
        """With what the names of all begin that is written in the place of a file."""
        return '.%s.' % name[:60]

    def expect(self, size):
        """The image will have so many bytes: find out whether there is room.  Raises Failure."""
        room = self.room()
        if room is not None and size > room:
            raise Final('no room for the image at %s: it has %d bytes, and there is room for %d'
                        % (printable(self._path), size, room), NOT_STARTED)
        if self._target and fallocate:
            # A signal that comes too early ends it with EINTR; where it is not known, room is what is there when
            # it is needed.
            while size and fallocate(self._fd, KEEP_SIZE, 0, min(size, (1 << 63) - 1)):
                if ctypes.get_errno() in NO_ROOM:
                    raise Final('no room for the image at %s: it has %d bytes: %s' % (
                        printable(self._path), size, os.strerror(ctypes.get_errno())), NOT_STARTED)
                if ctypes.get_errno() != errno.EINTR:
                    break

    def start_over(self):
        """Nothing that was written counts.  Raises Failure."""
        if self._target:
            try:
                os.ftruncate(self._fd, 0)
            except OS_ERRORS as error:
                raise Final('cannot write the image: %s' % explain(error))

    def start(self):
        """The first data is coming: start the command.  Raises Failure."""
        try:
            if self._text is not None:
                with uninterruptible:
                    self._command = Command(self._text, stdin=subprocess.PIPE)
                self._fd = self._command.pipe.fileno()
            if self._fifo or stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                self._chunk = 1 << 16   # so that a slow consumer is seen to move
        except OS_ERRORS as error:
            raise Final('cannot start the command: %s' % explain(error))

    def write(self, data, place):
        """Write all of a memoryview, at a place in the image; that is the next one, unless it `seeks`.  Raises Failure."""
        try:
            while self._fd is None and not self._open_fifo():
                self._wait_a_moment()
            self._go_to(place)
            while len(data):
                try:
                    count = uninterrupted(os.write, self._fd, data[:self._chunk])
                except OS_ERRORS as error:
                    if errno_of(error) not in TRY_AGAIN:
                        raise
                    self._wait_a_moment()           # a pipe that we were given so
                    continue
                self.written += count
                self._place += count
                data = data[count:]
        except OS_ERRORS as error:
            if errno_of(error) == errno.EPIPE and self._command:
                self._command.finish(self.LAST_WORDS)
                raise Final('the command read no more: %s' % printable(self._text))
            if errno_of(error) == errno.EPIPE:
                raise Final('what reads the image has ended')
            raise Final('cannot write the image: %s' % explain(error))

    def _go_to(self, place):
        if place != self._place and self.seeks:
            os.lseek(self._fd, place, os.SEEK_SET)
        self._place = place

    def read_into(self, view, place):
        """Read back what was written at a place; returns bytes, 0 where nothing was.  Raises Failure."""
        try:
            self._reader = self._reader or io.open(self._fd, 'rb', buffering=0, closefd=False)
            self._go_to(place)
            got = uninterrupted(self._reader.readinto, view)
        except OS_ERRORS as error:
            raise Final('cannot read back the image: %s' % explain(error))
        self._place += got
        return got

    def _wait_a_moment(self):
        """Wait until the output takes more, or for a while."""
        if self._fate.get('is') == 'discard':
            raise Final('stopped')
        if self._fd is None:
            time.sleep(0.05)
        else:
            poller = select.poll()
            poller.register(self._fd, select.POLLOUT)
            ready(poller, TICK)

    def look(self):
        """A look at the command while nothing else is to do.  Raises Failure."""
        if self._command:
            self._command.look()

    def abandon(self):
        """Whether the image can still be given up; then it will not be committed."""
        return self._fate.setdefault('is', 'discard') == 'discard'

    def _decide(self):
        """The point of no return.  Raises Failure if it was abandoned before."""
        if self._fate.setdefault('is', 'commit') != 'commit':
            raise Final('stopped')

    def commit(self, size):
        """The image is complete and verified, and has so many bytes: make it so.  Raises Failure."""
        try:
            if self._command:
                self._command.pipe.close()
                self._command.finish()
                self._decide()
                return
            while self._fd is None and not self._open_fifo():
                self._wait_a_moment()
            if self._target:
                os.ftruncate(self._fd, size)            # one in which another image began may be longer
            if self._fd != 1 and not stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                bring_to_disk(self._fd)
            if self._target:
                os.fchmod(self._fd, self._mode())
            self._decide()
            if self._target:
                os.rename(self._temporary, self._target)
                if self.journal:
                    remove(self.journal.path)
                self._temporary = None
            os.close(self._fd)          # not before: it has the lock
        except OS_ERRORS as error:
            if not self._target or self._temporary:
                raise Final('cannot finish the image: %s' % explain(error))
            tell('unfinished', step='closing it', reason=explain(error))
        if self._target:
            self._sync_folder()

    def _sync_folder(self):
        """Bring the new name to the disk.  It is too late to fail: the file is there."""
        try:
            folder = os.open(os.path.dirname(self._target), os.O_RDONLY)
            try:
                bring_to_disk(folder)
            finally:
                os.close(folder)
        except OS_ERRORS as error:
            tell('unfinished', step='synchronising its folder', reason=explain(error))

    def _mode(self):
        """The permissions of the file that is replaced, or of a new one."""
        try:
            return stat.S_IMODE(os.stat(self._target).st_mode)
        except OS_ERRORS:
            mask = os.umask(0)
            os.umask(mask)
            return 0o666 & ~mask

    def end(self):
        """Unless it was committed, ask the command to end."""
        if self.abandon() and self._command:
            self._command.end()

    def close(self):
        """Unless it was committed, leave nothing behind but what the next run can go on with."""
        self.end()
        if self._command:
            self._command.close()
        if self.journal:
            self.journal.close()
        if self._temporary and not (self.journal and len(self.journal.held)):
            remove(self._temporary)
            if self.journal:
                remove(self.journal.path)
        self._temporary = None


class NoSink(Sink):
    """Where the image of a rehearsal goes: nowhere."""

    def start(self):
        """There is no command to start."""

    def write(self, data, place):
        """Count it."""
        self.written += len(data)

    def commit(self, size):
        """There is nothing to be made final, but it is too late to stop."""
        self._decide()


class Copy(object):
    """An image as it comes together in a Sink, and how much of it is verified.

    A round that begins where all before it is verified is hashed before a byte of it is written.  One
    that comes before its turn can only be written; when the gap before it has closed it is hashed as
    the disk has it, and compared where the server, or the journal of an earlier run, told the digest.

    image, who  names, of the image (None: it has none) and of the output
    held        which bytes are there
    bytes       how many that are
    digest      whether rounds have one
    verified    so many from the start on are what the server sent; without digests: are there
    hash        of those
    doubted     what was held, and then was not what the server sent
    resumed     bytes of an earlier run
    checked     bytes that were hashed as the disk has them, in `check_seconds`
    """

    CHUNK = 1 << 20                     # bytes to read back at once
    TAIL = 1 << 16                      # bytes by which to know an image again

    DIFFERS = 'the digest differs: what was received is not the image; nothing of this round was written'

    def __init__(self, sink, hashes=False):
        """sink: a Sink that is open; hashes: whether the digest of all is wanted also where rounds have none."""
        self.sink, self._journal, self._hashes = sink, sink.journal, hashes
        self.image, self.who = None, random_name()
        self.held, self._digests = Held(), {}       # of the image through what is not verified yet
        if self._journal and self._journal.image:
            self.image, self.who = self._journal.image, self._journal.who
            self.held, self._digests = Held(self._journal.held), dict(self._journal.digests)
        self.resumed = self.bytes = self.held.size
        self.digest = None              # not known yet
        self.verified, self.hash, self.doubted = 0, None, Held()
        self.checked, self.check_seconds = 0, 0.0
        self._told = set()              # those of _digests that this session's server told
        self._trusted = 0               # bytes that agreed with what it told
        self._ahead = None              # (hash, bytes) of what is read back, where that is beyond `verified`
        self._trial = None              # the hash through a round that is right
        self._again = False             # all was doubted once
        self._area = None
        self._tail = b''                # what a stream took last
        self._met = {}                  # as _digests, of those that the server told and that fit

    def begin(self, image, digest):
        """A session has begun: it brings the image of that name, with digests or without.

        Returns what counts no more of what was held, though it is of that image: (start, stop) of each.
        Raises Failure where that cannot be taken back.
        """
        same = image is not None and image == self.image
        self._told, self._trusted = set(), 0
        if same and digest and self.digest is None:             # of an earlier run, all to be hashed
            self.digest, self.hash = digest, hashlib.sha256()
        if same and digest == self.digest:
            return []
        if self.bytes and not self.sink.seeks:
            raise Final('the server has another image now')
        lost = list(self.held) if same else []
        self.image, self.digest = image, digest
        self._start_over()
        if self.bytes:
            self.sink.start_over()
        self.bytes = self.resumed = 0
        return lost

    def _start_over(self):
        self.held, self._digests, self._ahead = Held(), {}, None
        self.verified, self.hash = 0, hashlib.sha256() if self.digest or self._hashes else None
        if self._journal:
            self._journal.begin(self.image, self.who)

    # ---- a round

    def verify(self, incoming, pieces):
        """Whether a round, which is there as memoryviews, is what its digest says, as far as that can be told by now."""
        self._trial = None
        if self.digest and incoming.place <= self.verified < incoming.place + incoming.size:
            self._trial = self.hash.copy()
            for piece in self._fresh(incoming, pieces):
                self._trial.update(piece)
            return self._trial.digest() == incoming.digest
        return True

    def _fresh(self, incoming, pieces):
        """What of a round is not verified.  One that begins before that is of a session, so it is in one piece."""
        known = self.verified - incoming.place
        return [pieces[0][known:]] + pieces[1:] if known > 0 else pieces

    def write(self, incoming, pieces):
        """Write a round, of which verify() had nothing to say against.  Raises Failure."""
        start, stop = max(incoming.place, self.verified), incoming.place + incoming.size
        if start >= stop:
            return
        if self._trial or self._ahead and self._ahead[1] > start:
            self._ahead = None
        place = start
        for piece in self._fresh(incoming, pieces):
            self.sink.write(piece, place)
            place += len(piece)
        if not self.sink.seeks:
            self._tail = self._fresh(incoming, pieces)[-1][-self.TAIL:].tobytes()
        self.held.add(start, stop)
        self.bytes = self.held.size
        if self._trial:
            self.hash, self._trial = self._trial, None
            self._reached(stop)
            self._trusted = stop
        elif self.digest:
            self._digests[stop] = incoming.digest
            self._told.add(stop)
        else:
            for piece in self._fresh(incoming, pieces) if self.hash else ():        # they come in their order
                self.hash.update(piece)
            self.verified = self.held.prefix
        if self._journal:
            self._journal.wrote(start, stop, incoming.digest)

    def _reached(self, stop):
        """All through that byte is verified."""
        self.verified = stop
        for known in [known for known in self._digests if known <= stop]:
            del self._digests[known]
            self._told.discard(known)

    # ---- what the disk has

    @property
    def unchecked(self):
        """Through which byte there is something to be read back and compared; None: there is nothing."""
        stop = min(self._digests) if self._digests else None
        return stop if stop is not None and self.held.covers(self.verified, stop) else None

    def check(self):
        """Read some of it back; returns what is in doubt now: (start, stop) of each.  Raises Failure."""
        stop = self.unchecked
        so_far, place = self._ahead or (self.hash.copy(), self.verified)
        got = self._read_back(so_far, place, stop)
        self._ahead = so_far, place + got
        if got and place + got < stop:
            return []
        self._ahead = None
        told = stop in self._told
        if place + got == stop and so_far.digest() == self._digests[stop]:
            self.hash = so_far
            self._reached(stop)
            if told:
                self._trusted = stop
            return []
        del self._digests[stop]
        return [self._doubt(self.verified, stop)]

    def _read_back(self, so_far, place, stop):
        """Hash some of the bytes from place to stop; returns how many, 0 where there are no more.  Raises Failure."""
        since = monotonic()
        self._area = self._area or bytearray(self.CHUNK)
        view = memoryview(self._area)[:stop - place]
        got = self.sink.read_into(view, place)
        so_far.update(view[:got])
        self.checked += got
        self.check_seconds += monotonic() - since
        return got

    def _doubt(self, start, stop):
        if self.doubted.touches(start, stop):
            raise self._verdict('what is read back of the image is not what was written: bytes %d to %d' % (start, stop))
        self.drop(start, stop)
        return start, stop

    def doubt_all(self):
        """What this session's server tells does not fit what is verified; returns what is in doubt now: all.

        Raises Failure where it was this server that told so, or it happens again.
        """
        if self._trusted >= self.verified or self._again or not self.sink.seeks:
            raise self._verdict(self.DIFFERS)
        self._again = True
        lost = list(self.held)
        for pair in lost:
            self.doubted.add(*pair)
        self._start_over()
        self.bytes = 0
        return lost

    def end(self, size, digest):
        """The server says what the whole image is; returns what is in doubt now.  Raises Failure."""
        if self.verified < size:
            if self.digest:
                self._digests[size] = digest
                self._told.add(size)
            return []
        if self.verified > size:
            raise Failure('the image has %d bytes, not %d' % (self.verified, size))
        if self.digest and self.hash.digest() != digest:
            if self._trusted >= self.verified:
                raise self._verdict('the digest of the image differs')
            return self.doubt_all()
        return []

    # ---- without a server

    def go_alone(self):
        """No session tells of the image any more: what it told stands, and what only an earlier run wrote counts no more."""
        if self.digest is None:
            self.digest, self.hash = True, hashlib.sha256()
        if self.resumed:
            self.held.remove(max([self.verified] + list(self._digests)), 1 << 63)
            self.bytes = self.held.size
            self.resumed = min(self.resumed, self.bytes)
        self._ahead = self._trial = None
        if self.verified and self.hash:
            self._met[self.verified] = self.hash.digest()

    def last_bytes(self):
        """Some of those before the first that is not there."""
        if not self.sink.seeks:
            return self._tail
        size = min(self.TAIL, self.held.prefix)
        area = bytearray(size)
        got = self.sink.read_into(memoryview(area), self.held.prefix - size) if size else 0
        return bytes(area) if got == size else b''

    def fill(self, data, place):
        """Write bytes that come by another way.  Raises Failure."""
        self.sink.write(memoryview(data), place)
        stop = place + len(data)
        self.held.add(place, stop)
        self.bytes = self.held.size
        if self._journal and self.image:
            self._journal.wrote(place, stop, b'')
        if not self.hash:
            self.verified = self.held.prefix
        elif place == self.verified and not (self._digests and self.sink.seeks):
            # What a stream took cannot be read back.
            for known in sorted(known for known in self._digests if known <= stop):
                self.hash.update(data[self.verified - place:known - place])
                if self.hash.digest() != self._digests[known]:
                    raise self._verdict(self.DIFFERS)
                self._reached(known)
            self.hash.update(data[self.verified - place:])
            self.verified = stop

    def fill_anew(self):
        """Another way brings all of it; what the server told of its digests is to be met all the same.  Raises Failure."""
        told = dict(self._digests)
        told.update(self._met)
        self._start_over()
        self._digests, self.bytes, self.resumed = told, 0, 0
        self.sink.start_over()

    def meet(self, size=None):
        """Read back and hash what is there through each digest that the server told, and at last through `size`.

        Returns (start, stop) of what is there and does not fit; None if all does.  Raises Failure.
        """
        if not self.sink.seeks:
            return None                 # fill() has seen to it
        for stop in sorted(self._digests) + [size] * (size is not None and self.hash is not None):
            if stop > self.verified and not self.held.covers(self.verified, stop):
                break
            so_far, place = self.hash.copy(), self.verified
            while place < stop:
                got = self._read_back(so_far, place, stop)
                if not got:
                    return self.verified, stop
                place += got
            if stop in self._digests and so_far.digest() != self._digests[stop]:
                return self.verified, stop
            if stop in self._digests:
                self._met[stop] = self._digests[stop]
            self.hash = so_far
            self._reached(stop)
        return None

    def drop(self, start, stop):
        """These bytes are not what they should be."""
        self.doubted.add(start, stop)
        self.held.remove(start, stop)
        self.bytes = self.held.size
        if self._journal and self.image:
            self._journal.doubted(start, stop)

    @property
    def told(self):
        """Through which byte digests are known that the server told, or an earlier one."""
        return max([self.verified] + list(self._digests)) if self.digest else 0

    def _verdict(self, reason):
        """A Failure after which a later run had better not go on with what is here."""
        if self._journal:
            self._journal.begin(self.image, self.who)
        return Failure(reason)


class Writer(threading.Thread):
    """Verifies complete rounds and writes them, while the next are received; hashes what it wrote before its turn.

    The main thread is its parent: a release means "look at what I gave you", the other
    way "look at `results`".  When it fails it ends, which its parent sees.
    """

    # What there is to say: (one of these, what about).  Of a round; `damaged`: its digest differs, and it waits to
    # be given again.
    VERIFIED, DAMAGED, WRITTEN = 'verified', 'damaged', 'written'
    DOUBTED = 'doubted'                 # (start, stop) of each: not there after all
    THROUGH = 'through'                 # with what else it had to do

    def __init__(self, copy, paused=False):
        """copy: a Copy; paused: as after pause()."""
        threading.Thread.__init__(self, name='writer')
        self.daemon = True
        self.copy = copy
        self.failure = None
        self.results = collections.deque()
        self.checking = False           # there is something to be read back
        self._given = self._done = 0    # jobs, counted by the parent and by us
        self._jobs = collections.deque()            # (method, arguments)
        self._again = None              # the round without which it does not go on
        self._paused, self._over = paused, False
        self.link = SemLink()
        self._own_link = self.link.spawn()

    def give(self, incoming):
        """Hand over a complete round: what comes next in the image, or what was damaged.

        It has a `buffer`, a `size` in bytes, and the image's `digest` through it.
        """
        self._give((self._write, incoming), incoming is self._again)

    def doubt(self, incoming):
        """A damaged round is as the server has it: so it is what was before that is not.  Then it is its turn."""
        self._give((self._doubt, incoming), True)

    def end(self, size, digest):
        """After all rounds: the bytes and the digest of the image."""
        self._give((self._end, size, digest))

    def carry_out(self, work):
        """Call that, after all; what it raises is our failure."""
        self._give((work,))

    def pause(self):
        """Finish the rounds that can be, forget the others, and do nothing until go_on()."""
        self._give((self._pause,))

    def go_on(self):
        """Rounds come again."""
        self._paused = False
        self.link.release_child()

    def commit(self):
        """After all: make the image final, and end."""
        self._give((self._commit,))

    def _give(self, job, first=False):
        self._given += 1
        (self._jobs.appendleft if first else self._jobs.append)(job)
        self.link.release_child()

    @property
    def through(self):
        """Whether it has done all that it was given; there may be something to be checked."""
        return self._given == self._done

    def close(self):
        """Let it end, whatever it does."""
        self.link.close()
        if self.ident:
            self.join(1.0)              # more, only if nobody takes what it writes
        else:
            self._own_link.close()

    def run(self):
        """The thread."""
        try:
            os.nice(10)                 # what is not received in time is lost
            while not self._over:
                self._check()
                self._own_link.wait_parent()
                while self._jobs:
                    job = self._jobs[0]
                    if self._again not in (None, job[-1]) and (self._pause,) not in self._jobs:
                        break
                    self._jobs.popleft()
                    if self._again in (None, job[-1]) or job == (self._pause,):
                        self._again = None
                        job[0](*job[1:])
                    self.checking = self.copy.unchecked is not None
                    self._done += 1
                    if job[0] not in (self._write, self._commit):
                        self._say(self.THROUGH)
        except LinkClosed:
            pass
        except Failure as error:
            self.failure = error
        except Exception as error:      # pylint: disable=broad-except
            self.failure = Final(internal_error(error))
        finally:
            self._own_link.close()

    def _say(self, what, about=None):
        self.results.append((what, about))
        self._own_link.release_parent()

    def _check(self):
        """While there is nothing else to do: check what was written before its turn."""
        if self._over or self._paused or self.copy.unchecked is None:
            return
        poller = select.poll()
        poller.register(self._own_link.parent_fd, select.POLLIN)
        while self.copy.unchecked is not None and not ready(poller, 0):
            self._tell_doubts(self.copy.check())
        self.checking = self.copy.unchecked is not None
        self._say(self.THROUGH)

    def _tell_doubts(self, ranges):
        if ranges:
            self._say(self.DOUBTED, ranges)

    def _doubt(self, incoming):
        self._tell_doubts(self.copy.doubt_all())
        self._write(incoming)

    def _end(self, size, digest):
        self._tell_doubts(self.copy.end(size, digest))

    def _pause(self):
        self._paused = True

    def _commit(self):
        self.copy.sink.commit(self.copy.verified)
        self._over = True

    def _write(self, incoming):
        pieces = list(incoming.buffer.flush())
        if sum(map(len, pieces)) != incoming.size:  # without digests, all that tells
            raise Failure('a round of %d bytes instead of %d' % (sum(map(len, pieces)), incoming.size))
        if not self.copy.verify(incoming, pieces):
            self._again = incoming
            return self._say(self.DAMAGED, incoming)
        if self.copy.digest:            # else all there was to find out is known
            self._say(self.VERIFIED, incoming)
        self.copy.write(incoming, pieces)
        return self._say(self.WRITTEN, incoming)


# ---------------------------------------------------------------------------
# This host
# ---------------------------------------------------------------------------

SIOCGIFCONF = 0x8912                    # netdevice(7)
IFREQ = struct.Struct('@16s4x4s%dx' % (2 * struct.calcsize('P')))     # its name and address


def interfaces():
    """(name, address) of this host's interfaces, for each IPv4 address one."""
    answer = bytearray(1000 * IFREQ.size)
    question = struct.pack('@iP', len(answer), address_of(answer))
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        end = struct.unpack_from('@i', fcntl.ioctl(probe.fileno(), SIOCGIFCONF, question))[0]
    except OS_ERRORS:
        return []
    finally:
        probe.close()
    entries = [IFREQ.unpack_from(answer, at) for at in range(0, end, IFREQ.size)]
    return [(printable(name.split(b'\0')[0].decode('ascii', 'replace')), socket.inet_ntoa(address))
            for name, address in entries]


def versions():
    """Python's version, and the kernel's, as texts."""
    return {'python': '%d.%d.%d' % sys.version_info[:3], 'kernel': os.uname()[2]}


def described(known):
    """What interfaces() returned, for a user who has to choose one."""
    return ', '.join('%s (%s)' % entry for entry in known) or 'none with an IPv4 address'


def default_interface():
    """The name of the default route's interface; None without one (route(8))."""
    try:
        with open('/proc/net/route') as table:
            routes = [line.split() for line in table]
    except OS_ERRORS:
        return None
    # Columns: Iface Destination Gateway Flags RefCnt Use Metric Mask ...; flag 1: up.
    found = [(int(route[6]), route[0]) for route in routes[1:]
             if route[1] == route[7] == '00000000' and int(route[3], 16) & 1]
    return min(found)[1] if found else None


def local_address(text):
    """The address that a LOCAL_IP means.  Raises Failure.

    text: an IPv4 address of this host, an interface's name, or `auto`, which
    here is the address of the default route.
    """
    known = interfaces()
    wanted = default_interface() if text == 'auto' else text
    for name, address in known:
        if name == wanted:
            return address
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        socket.inet_pton(socket.AF_INET, text)
        probe.bind((text, 0))
        probe.connect((text, 9))                # fails with a broadcast address
        if not is_multicast(text) and text != '0.0.0.0':
            return text
    except OS_ERRORS + (UnicodeError,):
        pass
    finally:
        probe.close()
    problem = ('there is no default route, so "auto" cannot decide' if text == 'auto'
               else '%s is no address or interface of this host' % printable(text))
    raise Failure('%s; LOCAL_IP can be: %s' % (problem, described(known)), USAGE)


def open_standard_files():
    """Let no socket become one of 0, 1, 2, where one of them is closed."""
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OS_ERRORS:               # the wrong way round, so that its use fails
            os.open(os.devnull, mode)


MANY = 200                              # clients that make a large session
MOST_CLIENTS = 10000                    # of one server
# Between threads the interpreter's lock changes hands at each system call, which costs more than the call; so a
# large session has one for all.
CLIENTS_PER_THREAD = 64
MOST_PENDING = 256                      # connections of one address that are no clients (yet)


def allow_descriptors(options):
    """Make sure of enough file descriptors; sets `options.strangers`, how many connections of others
    there may be, and `options.most`, how many clients at once.  Raises Failure."""
    # Each client, both ends of each thread's link, a few strangers, our own.
    needed = options.clients + 2 * (1 + options.clients // options.clients_per_thread) + 48
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = MOST_CLIENTS - options.clients if options.more or options.forever else 0
    limit = min(1 << 20 if hard == resource.RLIM_INFINITY else hard, needed + MOST_PENDING + more)
    if limit < needed:
        raise Failure('%d clients need %d file descriptors, and the limit is %d; raise it '
                      'with "ulimit -n"' % (options.clients, needed, hard), USAGE)
    if soft != resource.RLIM_INFINITY and soft < limit:     # commands inherit it, so never lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    options.strangers = 16 + min(limit - needed, MOST_PENDING)
    options.most = options.clients + max(0, limit - needed - MOST_PENDING)


def end_with(parent):
    """In a process just forked: let it end when its parent does, however (prctl(2))."""
    LIBC.prctl(1, signal.SIGTERM)       # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(FAILED)


class StopInOrder(object):
    """A handler of the signals that stop a program: in order on the first, at
    once on one that comes a second later.

    In between, another means the same: timeout(1) sends two at once, and a
    terminal that is closed as well.  A signal that our parent had us ignore
    stays ignored, for nohup(1).  SIGUSR1 asks how it stands, SIGUSR2 for each host, too.
    Who serves for ever hears of the first SIGTERM by `wind_up`, and of SIGUSR1 by `hurry`.
    """

    SIGNALS = {signal.SIGINT: 'SIGINT', signal.SIGTERM: 'SIGTERM', signal.SIGHUP: 'SIGHUP'}

    def __init__(self):
        self.state = None               # a function: whether of all hosts -> lines on how it stands
        self.wind_up = self.hurry = None            # functions
        self._first = self._wound_up = None         # when the first came
        # An ignored SIGCHLD survives exec, and takes the exit codes of commands away: wait(2).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)   # we take the terminal back from commands
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._say_state)

    def __call__(self, number, _frame):
        if number == signal.SIGTERM and self.wind_up:
            if self._wound_up is None:
                self._wound_up = monotonic()
                self.wind_up()
            if monotonic() - self._wound_up <= 1:
                return None
        if self._first is None:
            self._first = monotonic()
            return uninterruptible.interrupt(self.SIGNALS[number])
        if monotonic() - self._first > 1:
            for command in list(Command.running):
                command.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say_state(self, number, _frame):
        for line in self.state(number == signal.SIGUSR2) if self.state else ():
            tell('state', text=line)
        if self.hurry and number == signal.SIGUSR1:
            self.hurry()

    def over(self):
        """The verdict stands: no signal changes the exit code any more.

        Not even at the interpreter's end, which sets handlers, but not SIG_IGN, to the default.
        """
        for number in tuple(self.SIGNALS) + (signal.SIGUSR1, signal.SIGUSR2):
            # First so that Python does not notice: one that comes in between it would complain of.
            LIBC.signal(number, ctypes.c_void_p(1))         # SIG_IGN
            signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------
# Connection
# ---------------------------------------------------------------------------

TCP_USER_TIMEOUT = 18                   # Linux's number, of which older Python versions lack the name
MSG_MORE = 0x8000
# Where struct tcp_info has round trips, in microseconds: the least (since Linux 4.6), and the usual one.
TCP_INFO_TIMES = (148, 68)


class Gone(Exception):
    """The peer's connection has ended."""


class Connection(object):
    """One end of a TCP connection, for server and client alike; it never waits.

    Messages are queued and sent as the kernel takes them, and taken apart as they
    arrive.  All times are seconds on the monotonic clock:

    heard   when the other end last said something
    told    when it was last sent something
    moved   when our words last got anywhere: into the socket, or to the other end's kernel
    """

    def __init__(self, sock, address):
        """sock: connected, or about to be; address: of the other end, for the user."""
        self.sock, self.address = sock, address
        self.incoming, self.outgoing = TcpQueue(), TcpQueue()
        self.alive_every = ALIVE_EVERY  # seconds; how often the other wants to hear from us
        self.leaving = None             # when to close at the latest, once BYE was said
        self.heard = self.told = self.moved = self.since = monotonic()
        self._need = 1                  # bytes before it is worth to parse again
        self._sent = self._acknowledged = 0         # bytes

    def begin(self, stall_timeout):
        """It is connected.  The kernel gives up a dead peer soon after we would: tcp(7).

        stall_timeout: seconds; with 0, never, it does so only if there is nothing
        to send, after 17 s.
        """
        self.sock.setblocking(False)
        for level, option, value in (
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
                (socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(1000 * (stall_timeout and stall_timeout + 2))),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)):
            self.sock.setsockopt(level, option, value)

    def fileno(self):
        """For poll()."""
        return self.sock.fileno()

    open = property(lambda self: self.sock is not None)

    def reached(self):
        """What has become of connect_ex(): an errno; 0: it is connected; EINPROGRESS: that is not known yet."""
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if not number and self.sock.getsockname() == self.sock.getpeername():
                # Nobody listens there, but the kernel chose the same port for our
                # end, and has connected us to ourselves.
                return errno.ECONNREFUSED
        except OS_ERRORS:
            return number or errno.EINPROGRESS
        return number

    # ---- out

    def send(self, *pieces):
        """Queue pieces of data, and send what can be sent without waiting.  Raises Gone."""
        if len(pieces) == 1 and pieces[0] and not self.outgoing.size:       # as nearly always
            self._put(pieces[0])
            return
        for data in pieces:
            self.outgoing.put_tail(data)
        self.flush()

    def flush(self):
        """Send what can be sent without waiting.  Raises Gone."""
        more = self.outgoing.size
        while more:
            data = self.outgoing.get_head()
            more = self.outgoing.size
            if not self._put(data, MSG_MORE if more else 0):
                return

    def _put(self, data, flags=0):
        """Send a piece, or queue what is not taken before all others; returns whether all was.  Raises Gone."""
        try:
            count = self.sock.send(data, flags)
        except OS_ERRORS as error:
            self.outgoing.put_head(data)
            if errno_of(error) in TRY_AGAIN or errno_of(error) in QUEUE_FULL:
                return False
            raise Gone(explain(error))
        self._sent += count
        self.moved = self.told = monotonic()
        if count < len(data):
            self.outgoing.put_head(memoryview(data)[count:])
            return False
        return True

    def look_at_kernel(self):
        """Take what the other end's kernel has acknowledged for a move: tcp(7), SIOCOUTQ."""
        try:
            left = fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, b'\0\0\0\0')
        except OS_ERRORS:
            return
        acknowledged = self._sent - struct.unpack('@i', left)[0]
        if acknowledged > self._acknowledged:
            self._acknowledged = acknowledged
            self.moved = monotonic()

    def round_trip(self):
        """Microseconds to the other end's kernel and back; None if ours does not tell: tcp(7), TCP_INFO."""
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OS_ERRORS:
            return None
        times = [struct.unpack_from('@I', info, at)[0] for at in TCP_INFO_TIMES if len(info) >= at + 4]
        return ([time for time in times if 0 < time < MASK] or [None])[0]

    def show_life(self, message):
        """Say `message` if the other end has heard nothing for as long as it likes.  Raises Gone.

        That the kernels take it is no move: that of a peer that hangs does so, too.
        """
        if not self.outgoing.size and monotonic() - self.told >= self.alive_every:
            moved, sent = self.moved, self._sent
            self.send(message)
            self.moved, self._sent = moved, sent

    # ---- in

    def receive(self, most=8192):
        """Queue what has arrived; returns whether anything has.  Raises Gone."""
        data = self._receive(most)
        self.incoming.put_tail(data)
        return bool(data)

    def _receive(self, most):
        """What has arrived, b'' if nothing has.  Raises Gone."""
        try:
            data = self.sock.recv(most)
        except OS_ERRORS as error:
            if errno_of(error) in TRY_AGAIN:
                return b''
            raise Gone(explain(error))
        if not data:
            raise Gone('the connection was closed')
        self.heard = monotonic()
        return data

    def messages(self, size_of):
        """Receive once, and take apart what is complete; yields bytes.

        size_of(the first bytes) -> bytes of the whole message, None if it takes
        more to tell, 0 if what follows is for read_into().  Raises Gone, and what
        size_of raises.
        """
        gone = paused = None
        data = b''
        try:
            data = self._receive(8192)
        except Gone as error:           # but what it said before it went is to be heard
            gone = error
        if self.incoming.size:
            self.incoming.put_tail(data)
            data = self.incoming.flat() if gone or self.incoming.size >= self._need else b''
        if data:
            start, end, self._need = 0, len(data), 1
            try:
                while start < end:
                    size = size_of(data[start:start + 5])
                    paused = size == 0
                    if not size or start + size > end:
                        self._need = 5 if size is None else size or 1
                        break
                    start += size
                    gone = None
                    yield data[start - size:start]
            finally:                    # be it that nobody wants more
                if start < end:
                    self.incoming.put_head(data[start:])
        try:
            if gone and not paused:
                raise gone
        finally:
            gone = None                 # else it and this frame keep each other, and the rounds of a connection that is over

    def first(self, size_of):
        """The first message that is complete, as messages() has it; None if there is none yet."""
        messages = self.messages(size_of)
        try:
            return next(messages, None)
        finally:
            messages.close()

    def read_into(self, view):
        """Fill a memoryview with what has arrived; returns bytes, 0 if nothing has.  Raises Gone."""
        if self.incoming.count:
            data = self.incoming.get_head()
            size = min(len(data), len(view))
            view[:size] = data[:size]
            self.incoming.put_head(data[size:])
            return size
        try:
            size = self.sock.recv_into(view)
        except OS_ERRORS as error:
            if errno_of(error) in TRY_AGAIN:
                return 0
            raise Gone(explain(error))
        if not size:
            raise Gone('the connection was closed')
        self.heard = monotonic()
        return size

    # ---- the end

    def leave(self, message):
        """Say a last message, and hear no more; close() when `leaving` is over, or it has hung up.

        Raises Gone.
        """
        self.leaving = monotonic() + FAREWELL_TIME
        self.send(message)
        self.hang_up()

    def hang_up(self):
        """If the last message is out: send no more."""
        if self.leaving and not self.outgoing.size:
            self.give_up()

    def give_up(self):
        """Send no more, not even what is queued; the other end sees it."""
        self.outgoing.clear()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OS_ERRORS:
            pass                        # it has gone

    def close(self):
        """Close it; may be done twice."""
        if self.sock:
            self.outgoing.clear()
            self.sock.close()
            self.sock = None


# ---------------------------------------------------------------------------
# Window
# ---------------------------------------------------------------------------

# The rounds in flight, without sockets, threads or clocks: messages and times in, what to
# do out.  The base protocol is the window of one round: its lockstep.

# What a client can owe its server for a round, in words for the log; or else how it stands.
READINESS, ANSWER = 'word that it is ready for the next round', 'word of what it received'
COMPLETION = 'word that it has everything'
LISTENS, ASKED = 'listens', 'asked for packets'
DEBTS = (READINESS, ANSWER, COMPLETION)


class Round(object):
    """A round as the server's threads know it.

    number, place   which it is, and where in the image it begins, bytes
    part            which one of those in which the image was read
    audience        the members that it is for, a set; None: all
    digest          of the image through it
    multicast       packets of it that were multicast, from the first on
    head, tail      bit/s at which the packets of these trains were sent; None: not known
    heard           member -> packets of these that it heard
    """

    def __init__(self, number, buffer, place, part=0, audience=None):
        self.number, self.buffer, self.place = number, buffer, place
        self.part, self.audience = part, audience
        self.digest = b''
        self.multicast = 0
        self.speed = None               # Speed at which it was to be sent
        self.head = self.tail = None
        self.heard = {}

    @staticmethod
    def head_of(count):
        """(first, last) packet of the head's train: most of the first quarter.

        Not from the first on: shapers and switches let a burst through at any speed.
        """
        return count // 16, count // 4

    @staticmethod
    def tail_of(count):
        """(first, last) packet of the second half."""
        return count // 2, count


class Step(object):
    """What a parent wants its TCP servers to do; read-only once published.

    kind: accept (the clients; only TCP server 1), announce (the `round`, to its audience), sent (the
    round, or a repair pass for it), repair (by multicast for the members in `coded`, AGAIN
    being `message`; by TCP for all others that asked), chain (`messages`: member -> what to
    tell it), sentences (there are some on clients), finish (the members in `audience`, None: all, get
    no more rounds: when each has those under way, `message` is its last BYE), abort (`message` is the reason).
    """

    # pylint: disable=redefined-builtin
    def __init__(self, kind, round=None, coded=(), message=b'', messages=(), audience=None):
        self.kind, self.round, self.coded, self.message = kind, round, coded, message
        self.messages, self.audience = messages, audience


# Packets of a round: as bits, how many, and their places in the order in which they are wanted (None: ascending).
Request = collections.namedtuple('Request', 'gaps count order')
Request.__new__.__defaults__ = (None,)


class Answers(object):
    """What came in for a step, from the clients of a thread and of those below it.

    requests    member -> Request
    hearing     how many heard any multicast, `deaf` those who heard none
    lost        the sum of the shares that those who heard any lost
    worst       the two Receptions with the least ratio, the least first
    by_tcp      packets that were asked for and sent at once
    head        bit/s at which the head arrived at the slowest, and by which share that may be wrong
    late        (when, member, what it was busy with) of the last two that paid, the last first
    """

    def __init__(self):
        self.requests, self.hearing, self.deaf, self.lost = {}, 0, [], 0.0
        self.worst, self.head, self.late = [], None, []
        self.by_tcp = 0

    def paid(self, member, now, busy=None):
        """A member owes nothing more for this step; busy: what it said that it did meanwhile."""
        self.late = [(now, member, busy)] + self.late[:1]

    def heard(self, reception):
        """A member has heard some of the round."""
        self.hearing += 1
        self.lost += reception.lost
        if len(self.worst) < 2 or reception.ratio < self.worst[1].ratio:
            self.worst = sorted(self.worst + [reception], key=lambda other: other.ratio)[:2]

    def heard_head(self, arrived, error):
        """A member has heard the head so fast, bit/s, or by such a share faster or slower."""
        self.head = min(self.head or (UNLIMITED, 0.0), (arrived, error))

    def add(self, other):
        """Those of another thread, too."""
        self.requests.update(other.requests)
        self.hearing += other.hearing
        self.by_tcp += other.by_tcp
        self.lost += other.lost
        self.deaf += other.deaf
        self.worst = sorted(self.worst + other.worst, key=lambda one: one.ratio)[:2]
        self.late = sorted(self.late + other.late, key=lambda one: -one[0])[:2]
        if other.head is not None:
            self.heard_head(*other.head)


class Awaited(object):
    """A step that a thread's clients are at: who still owes something for it, and what came in."""

    def __init__(self, step, owing=()):
        self.step, self.owing, self.answers = step, set(owing), Answers()


class Member(object):
    """A client as the server's window and its roster know it.  Times are seconds."""

    MOST_SIGNS = 20                     # of life at once, and four times as many as we ask for
    MOST_REQUESTS = 20                  # for the same round
    FEW = 0.1                           # share of packets that who hears multicast may lose
    MOST_RELAY_WORDS = 1000             # about its neighbours in the chain

    def __init__(self, address, now):
        self.address, self.host = address, None
        self.greeting = None            # with a key: what was said as it came,
        self.proven = False             # and whether it has proven that it has the image
        self.since = now                # when it came
        self.placed = False             # a thread has it, and it is not on its way to one
        self.window = 1                 # rounds that it can hold
        self.seek = False               # it takes rounds in any order
        self.have = ()                  # what it held of the image when it came, as ranges
        self.who = None                 # what tells its output from others, over connections
        self.late = None                # seconds after the start at which it came,
        self.back = False               # or whether it was here before
        self.lacks = None               # bytes of the image that it lacked when it left
        self.lacked = 0                 # bytes that it had, and lacked after all
        self.aside = False              # it gets what it lacks when nobody else lacks anything
        self.waits = False              # for the next pass
        self.last = None                # the Awaited of its last BYE, once it gets no more rounds
        self.willing = False            # to take part in a chain
        self.relays = False             # another client waits for what it asks for
        self.heard_rounds = self.deaf_rounds = 0    # in a row, of which it heard nearly all, or nothing
        self.relay_words = 0
        self.reached = None             # whether a follower could connect to it, once one has tried
        self.done_at = {}               # number -> when it was through with the round
        self.rounds = {}                # number -> (how it stands, the Awaited it owes something)
        self.asked = {}                 # number -> Request
        self.times_asked = {}           # number -> how often
        self.noted = set()              # rounds for which it is known how they were heard
        self.moved = now                # when it last paid, or showed life
        self.signs = 0                  # of life
        self.lost = 0                   # packets it asked for, all in all
        self.by_tcp = 0                 # packets of these that went by TCP
        self.medium = 0.0               # share of packets that it loses at any rate
        self.queued = 0.0               # seconds of packets that are in some queue, if it tells the truth
        self.doubted = False            # no queue is that long
        self.ignored = False            # it loses too much to decide on the rate
        self.busy = None                # what it says that it is doing
        self.figures = {}               # what else it says of itself
        self.waited = {}                # seconds that all waited for it alone, by cause
        self.deaf_since = None          # when it last heard multicast, while it does not
        self.deaf_told = False
        self.listed = None              # its name on the list of hosts
        self.outcome = None             # 'complete', or why not
        self.tally = {}                 # of a rehearsal: stage -> (packets that were multicast, that it heard)
        self.wrong = None               # and what is not well with it: a key of ADVICE
        self.ended = None               # when
        self.sentence = None            # why its thread is to drop it at its next look

    def __str__(self):
        return '%s (%s)' % (self.host, self.address) if self.host else self.address

    identity = property(lambda self: (self.host, self.address))
    names = property(lambda self: (self.identity, self.who) if self.who else (self.identity,))
    loopback = property(lambda self: self.address.startswith('127.'))

    def returns(self, before):
        """It is the one that was here before, as another Member, and has left."""
        self.back, self.late, self.aside = True, before.late, before.aside
        self.lost += before.lost
        self.by_tcp += before.by_tcp
        self.lacked += before.lacked
        for cause, seconds in before.waited.items():
            self.waited[cause] = self.waited.get(cause, 0) + seconds

    @property
    def oldest(self):
        """The number of the oldest round that it is not through with; None without one."""
        numbers = list(self.rounds)     # in one go: another thread may ask
        return min(numbers) if numbers else None

    @property
    def owes(self):
        """What it owes for its oldest round; None while that waits for us.

        What it owes for later ones may have to wait for that.
        """
        state = self.rounds.get(self.oldest)
        return state[0] if state and state[0] in DEBTS else None

    def stands(self, number, how, awaited, now):
        """From now on it stands so with a round; how: None: it is through with it."""
        if how is None:
            self.rounds.pop(number, None)
            self.times_asked.pop(number, None)
            self.noted.discard(number)
        else:
            self.rounds[number] = how, awaited
        if not self.rounds or number <= min(self.rounds):       # it is, or was, the oldest
            self.moved = now


class ServerWindow(object):
    """What the clients of one TCP server owe, and what to do when they pay.

    What to do is a list of (verb, member, argument): `send` bytes, send the `packets`
    of a (Round, Request), or the member is `served`.
    """

    def __init__(self, dialect, stall_timeout, vouchers=None):
        """stall_timeout: seconds for a member to move while it owes something; 0: for ever;
        vouchers: Vouchers, where there is a key."""
        self.dialect, self.stall_timeout, self.vouchers = dialect, stall_timeout, vouchers
        self.members = []
        self.awaited = []               # what is not complete, in the order of the steps
        self._rounds = {}               # number -> Round

    # ---- what the parent wants

    def begin(self, step, now):
        """The parent wants a step; returns what to do."""
        awaited = Awaited(step)
        self.awaited.append(awaited)
        return getattr(self, '_begin_' + step.kind)(step, awaited, now)

    def _begin_announce(self, step, awaited, now):
        number, buffer = step.round.number, step.round.buffer
        self._rounds[number] = step.round
        if len(self._rounds) > 2 * self.dialect.window:
            wanted = set(number for member in self.members for number in member.rounds)
            for old in [old for old in self._rounds if old < number and old not in wanted]:
                del self._rounds[old]
        info = self.dialect.info(number, buffer.size, buffer.base, buffer.count, step.round.place)
        audience = self._audience(step.round.audience)
        for member in audience:
            self._owe(member, number, READINESS, awaited, now)
        return [('send', member, info) for member in audience]

    def _begin_sent(self, step, awaited, now):
        number = step.round.number
        message = self.dialect.sent(number, self._vouched(step.round))
        listeners = self._those(number, LISTENS)
        for member in listeners:
            self._owe(member, number, ANSWER, awaited, now)
        return [('send', member, message) for member in listeners]

    def _vouched(self, done):
        """What SENT says of the image through a round."""
        return done.digest if not self.vouchers else done.digest + self.vouchers.of_round(
            done.number, done.place, done.buffer.size, done.digest)

    def _begin_repair(self, step, awaited, now):
        number, todo = step.round.number, []
        for member in self._those(number, ASKED):
            request = member.asked.pop(number)
            if member in step.coded:
                member.stands(number, LISTENS, None, now)
                todo.append(('send', member, step.message))
            else:
                self._owe(member, number, ANSWER, awaited, now)
                member.by_tcp += request.count
                todo.append(('packets', member, (step.round, request)))
        return todo

    def _begin_chain(self, step, _awaited, _now):
        return [('send', member, step.messages[member]) for member in self.members if member in step.messages]

    @staticmethod
    def _begin_sentences(_step, _awaited, _now):
        return []                       # they are carried out already

    def _begin_finish(self, step, awaited, now):
        audience = self._audience(step.audience)
        awaited.owing.update(audience)
        for member in audience:
            member.last = awaited
        if not self.dialect.ends:
            return [thing for member in audience for thing in self._see_off(member, now)]
        for member in audience:
            self._owe(member, step.round.number, COMPLETION, awaited, now)
        return [('send', member, self.dialect.sent(step.round.number, b'')) for member in audience]

    def _audience(self, members):
        """Those of ours that are among these members; None: all."""
        return self.members if members is None else [member for member in self.members if member in members]

    def _those(self, number, how):
        return [member for member in self.members if member.rounds.get(number, (None,))[0] == how]

    @staticmethod
    def _owe(member, number, what, awaited, now):
        awaited.owing.add(member)
        member.stands(number, what, awaited, now)

    def _see_off(self, member, now):
        """If a member gets no more rounds, and has all: say the last word."""
        if not member.last or member.rounds or self.dialect.ends:
            return []
        self._owe(member, END, COMPLETION, member.last, now)
        return [('send', member, member.last.step.message)]

    def complete(self):
        """The steps that are complete here, each once: Awaited."""
        complete = [awaited for awaited in self.awaited if not awaited.owing]
        if complete:
            self.awaited = [awaited for awaited in self.awaited if awaited.owing]
        return complete

    def debtors(self):
        """The members for whom the oldest step waits."""
        awaited = self.awaited          # in one go: another thread may ask, and complete() replaces it
        owing = awaited[0].owing if awaited else ()
        return [member for member in self.members if member in owing]

    def leave(self, member):
        """A member is none any more."""
        self.members.remove(member)
        for awaited in self.awaited:
            awaited.owing.discard(member)
            awaited.answers.requests.pop(member, None)

    def stalled(self, member, moved, now):
        """Why to drop a member; None if it should stay.

        moved: when its connection last got anything through.
        """
        limit = self.stall_timeout
        if limit and now - max(moved, member.moved) > limit:
            return 'stalled: for %g s no %s' % (
                limit, member.owes or 'sign that it takes what is sent to it')
        return None

    # ---- what the clients say

    def size_of(self, head):
        """As Connection.messages wants it."""
        return self.dialect.client_message_size(head, self._count_of)

    def _count_of(self, number):
        """Packets of a round, for a request; None: of the last one announced."""
        if number is None and self._rounds:
            number = max(self._rounds)
        if number not in self._rounds:
            raise ProtocolError('a request for a round that is not under way')
        return self._rounds[number].buffer.count

    def heard(self, member, message, now):
        """A message of a member; returns what to do.  Raises ProtocolError, Refused."""
        kind = message[:1]
        if kind not in self.PAYS:
            return self._said(member, kind, message, now)
        number = self.dialect.number_of(message)
        if number is None:
            number = member.oldest
        how, awaited = member.rounds.get(number, (None, None))
        if how not in self.PAYS[kind]:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        if kind == SUMS:                # it still owes its answer
            return [('send', member, self._sums(member, number))]
        awaited.owing.discard(member)
        awaited.answers.paid(member, now, member.busy)
        member.busy = None
        return self.HANDLERS[kind](self, member, number, message, awaited, now)

    def _said(self, member, kind, message, now):
        """A message that is about no round; returns what to do.  Raises ProtocolError, Refused."""
        if kind == BYE:
            raise Refused('it says: %s' % field(unpack_frame(message[5:]), 'reason', TEXT))
        if kind == PROOF and member.greeting:
            if not member.greeting.proven(Greeting.DONE, message):
                raise ProtocolError('a wrong proof')
            member.proven = True
            return []
        if kind == RELAY:
            return [('relay', member, self._neighbour(member, unpack_frame(message[5:])))]
        if kind == LACK:
            return [('lacks', member, self._lack(member, unpack_frame(message[5:]), now))]
        if kind not in (ALIVE, STATE):
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        member.signs += 1
        most = 4 * (now - member.since) / alive_every(self.stall_timeout)
        if member.signs > member.MOST_SIGNS + most:
            raise ProtocolError('far too many signs of life')
        if kind == ALIVE:
            member.moved = now
        else:                           # words alone move nothing
            self._state(member, unpack_frame(message[5:]))
        return []

    @staticmethod
    def _state(member, fields):
        """What a client says of itself: what it is doing, and figures for the report."""
        member.busy = field(fields, 'busy', TEXT, optional=True)
        member.figures = dict((key, field(fields, key, kinds)) for keys, kinds in ((FIGURES, NUMBER), (FACTS, TEXT))
                              for key in keys if key in fields)

    @staticmethod
    def _neighbour(member, fields):
        """What a client says of its upstream or follower, checked."""
        member.relay_words += 1
        if member.relay_words > member.MOST_RELAY_WORDS:
            raise ProtocolError('far too many words about its neighbours')
        said = {'token': token_of(fields)}
        for key, kinds in (('port', NUMBER), ('lost', TEXT), ('reason', TEXT)):
            if key in fields:
                said[key] = field(fields, key, kinds, optional=True)
        if not 0 < (said.get('port') or 1) < 65536:
            raise ProtocolError('a frame without a proper "port"')
        said['connected'] = fields.get('connected') is True
        return said

    @staticmethod
    def _lack(member, fields, now):
        """What a member had, and lacks after all: then it is not at its end."""
        if member.last:
            member.last.owing.discard(member)
            member.last = None
        member.stands(END, None, None, now)
        return Held.from_list(fields.get('lacks'))

    def _ready(self, member, number, _message, _awaited, now):
        member.stands(number, LISTENS, None, now)
        return []

    def _request(self, member, number, message, awaited, now):
        buffer = self._rounds[number].buffer
        gaps, order = self.dialect.asked(message, buffer.base, buffer.count)
        self._reception(member, number, message, awaited, gaps, now)
        self._count_request(member, number)
        request = Request(gaps, len(order) if order else how_many(gaps), order)
        member.lost += request.count
        if member.relays:               # others wait for what it asked for, so it does not wait for their answers
            member.by_tcp += request.count
            awaited.answers.by_tcp += request.count
            self._owe(member, number, ANSWER, awaited, now)
            return [('packets', member, (self._rounds[number], request))]
        member.asked[number] = request
        member.stands(number, ASKED, None, now)
        awaited.answers.requests[member] = request
        return []

    def _sums(self, member, number):
        self._count_request(member, number)
        return self.dialect.sums(number, self._rounds[number].buffer.sums())

    @staticmethod
    def _count_request(member, number):
        member.times_asked[number] = member.times_asked.get(number, 0) + 1
        if member.times_asked[number] > member.MOST_REQUESTS:
            raise ProtocolError('it asks for the same round again and again')

    def _done(self, member, number, message, awaited, now):
        if member.rounds[number][0] == COMPLETION:
            if member.greeting and not member.proven:
                raise ProtocolError('the last DONE without a proof')
            member.outcome, member.ended = 'complete', now
            member.stands(number, None, None, now)
            return [('served', member, None)]
        self._reception(member, number, message, awaited, 0, now)
        member.done_at[number] = now
        if len(member.done_at) > 16:
            del member.done_at[min(member.done_at)]
        member.stands(number, None, None, now)
        return self._see_off(member, now)

    HANDLERS = {READY: _ready, REQUEST: _request, DONE: _done}
    PAYS = {READY: (READINESS,), REQUEST: (ANSWER,), DONE: (ANSWER, COMPLETION), SUMS: (ANSWER,)}

    # ---- how the clients hear

    def _reception(self, member, number, message, awaited, gaps, now):
        """Note how a member heard a round, from its first answer."""
        done = self._rounds[number]
        if not done.multicast or number in member.noted:
            return
        member.noted.add(number)
        lost = how_many(gaps & ((1 << done.multicast) - 1)) if gaps else 0
        figures = self.dialect.figures_of(message) or (done.multicast - lost, 0, 0, 0, 0)
        lost = max(0, done.multicast - figures[0])
        done.heard[member] = done.multicast - lost
        member.deaf_rounds = member.deaf_rounds + 1 if lost == done.multicast else 0
        member.heard_rounds = member.heard_rounds + 1 if lost <= member.FEW * done.multicast else 0
        if lost == done.multicast:
            awaited.answers.deaf.append(member)
            member.deaf_since = member.deaf_since or now
            return
        if member.deaf_since is not None:
            self._hears(member, now)
        RateControl.remember(member, lost / done.multicast, done.speed)
        if member.ignored:
            awaited.answers.hearing += 1
            return
        if done.tail is None:
            awaited.answers.heard(Reception(1.0, 0.0, lost / done.multicast, member))
            return
        through = 1.0
        if gaps:
            first, last = done.tail_of(done.buffer.count)
            through = 1 - how_many(gaps >> first) / (last - first) or 1 - lost / done.multicast
        bits_a_packet = 8 * (done.buffer.slot + UDP_OVERHEAD)
        train = figures[3:] if figures[3] else figures[1:3]
        arrived, error = self.arrival(train, bits_a_packet)
        if arrived is not None:
            member.queued = 0.0 if lost else max(
                0.0, member.queued + train[0] * bits_a_packet * (1 / arrived - 1 / done.tail))
            member.doubted = member.doubted or member.queued > RateControl.LONGEST_QUEUE
        ratio = through if arrived is None else min(through, arrived / done.tail)
        if arrived is None or member.doubted or 1 - ratio < error:      # the clock does not tell, but losses do
            ratio, error = through, 0.0
        ratio /= 1 - member.medium
        awaited.answers.heard(Reception(ratio, error, lost / done.multicast, member))
        arrived, error = self.arrival(figures[1:3], bits_a_packet)
        if done.head and arrived is not None and not member.doubted:
            awaited.answers.heard_head(arrived / (1 - member.medium), error)

    @staticmethod
    def arrival(figures, bits_a_packet):
        """(bit/s, how far, as a share, it may be wrong) at which a train arrived; None if that is not known.

        figures: (packets after the first message, microseconds from that to the last).
        """
        heard, microseconds = figures
        if not heard or not microseconds:
            return None, 0.0
        seconds = microseconds * 1e-6
        return heard * bits_a_packet / seconds, RateControl.JITTER / seconds

    @staticmethod
    def _hears(member, now):
        if member.deaf_told:
            tell('member_hears', member=member, seconds=now - member.deaf_since)
        member.deaf_since, member.deaf_told = None, False


class Train(object):
    """When packets of a stretch of a round arrived: how fast the slowest link lets them out."""

    def __init__(self, first, last):
        """first, last: places of the packets."""
        self.first, self.last = first, last
        self._begin = self._end = None  # (packets heard by then, seconds)

    def note(self, place, heard, seconds):
        """A message with the packet at `place` arrived at a time, and `heard` packets with it."""
        if self.first <= place < self.last:
            self._begin = self._begin or (heard, seconds)
            self._end = heard, seconds

    def figures(self):
        """(packets after the first message, microseconds from that to the last); 0, 0 if it cannot be told."""
        if not self._begin:
            return 0, 0
        heard, seconds = self._end[0] - self._begin[0], self._end[1] - self._begin[1]
        return (heard, int(1e6 * seconds)) if heard > 0 and 0 < seconds < 1000 else (0, 0)


class Incoming(object):
    """A round at a client.

    how     WAITS for room, LISTENS to multicast, waits for STRAGGLERS after SENT, has ASKED for
            packets, reads their BYTES, is COMPLETE and handed to the writer once those before it are,
            or SUSPECT as its digest differs
    """

    WAITS, LISTENS, STRAGGLERS, ASKED, BYTES, COMPLETE, SUSPECT = range(7)

    def __init__(self, number, size, base, count, place):
        self.number, self.size, self.base, self.count, self.place = number, size, base, count, place
        self.how = self.WAITS
        self.buffer = None
        self.digest = b''
        self.repair = None              # (coded Buffer, how many are recipes) while one is under way
        self.gaps = 0                   # asked for, as bits
        self.deadline = None            # for stragglers, seconds
        self.given = False              # to the writer
        self.heard = 0                  # packets by multicast
        self.chained = False            # some of it came from an upstream
        self.carried = True             # the upstream, if there is one, may bring more of it
        self.suspected = self.whole = False         # its digest differed; all of it was asked for then
        self.head, self.tail = Train(*Round.head_of(count)), Train(*Round.tail_of(count))

    def note(self, place, heard, seconds):
        """As Train has it, for both trains."""
        self.head.note(place, heard, seconds)
        self.tail.note(place, heard, seconds)

    @property
    def target(self):
        """The Buffer that multicast is for; None if it is for none."""
        if self.how not in (self.LISTENS, self.STRAGGLERS):
            return None
        return self.repair[0] if self.repair else self.buffer


class ClientWindow(object):
    """The rounds in flight as a client sees them.

    What to do is a list of (verb, argument): `send` bytes, give a round (Incoming) to the
    writer (`write`), tell that of one that `differs` though every packet is as the server has it,
    `begin` to write, keep the server's words on its `state`, or `end`, with the fields of the last BYE.
    """

    SETTLE = 0.005                      # seconds for stragglers after SENT,
    NOTHING_YET = 0.05                  # or where nothing has come, though multicast was heard before
    BASE_ROOM = 2                       # buffers, where one round is under way
    EARLY = 64                          # batches that may come before their announcement
    AHEAD = 1 << 31                     # rounds: numbers wrap
    FORGED = 4                          # rounds in a row with forged packets, until it listens no more

    def __init__(self, dialect, payload, salts=(0, 0), digest=False, checks=None, place=0, vouchers=None):
        """payload: bytes in a full packet; salts: for packets, and for repairs;
        digest: whether rounds come with one; checks: as Buffer takes them; place: in the image,
        where the first round begins; None: rounds may come in any order; vouchers: Vouchers, where there is a key."""
        self.dialect, self.payload, self.digest = dialect, payload, digest
        self.vouchers = vouchers
        self.distrusts = False          # what comes by multicast, so no more of it is to be taken
        self._forged = 0                # rounds in a row with forged packets
        self._salt, self._repair_salt = salts
        self._checks = checks or list(dialect.checks)
        self.room = max(self.BASE_ROOM, dialect.window)     # buffers at the most
        self.wants = None               # a memoryview to be filled from TCP
        self.begun = False              # a round was announced
        self.over = False
        self.announced = 0              # one more than the last round's number
        self.by_multicast = self.by_chain = self.by_tcp = self.coded = 0        # packets
        self.largest = 0                # bytes in the largest repair datagram that was for nothing
        self.upstream_from = None       # the first round that an upstream brings, while there is one
        self.forwarding = None          # what a follower is to get, while there is one
        self._kept = []                 # rounds that are written, and that the follower does not have
        self.rounds = collections.deque()           # those that are not DONE, the oldest first
        self._base, self._place = None, place       # of the next round
        self._last = None               # the round of 0 packets that ends the image
        self._reading = None            # the round whose packets come by TCP
        self._left = collections.deque()            # their places: (start, stop) of each run
        self._staging = bytearray(PACKET.size + payload_for(9000))
        self._filled = 0                # bytes of what is wanted
        self._aim = None                # (Incoming, place) where multicast goes on
        self._free = []                 # buffers
        self._lent = collections.deque()            # rounds that the writer has
        self._hears = True              # some of the last round that was answered for
        # Batches of a repair pass that is not announced yet, or not for us.
        self._early = collections.deque(maxlen=self.EARLY)

    @property
    def owing(self):
        """What the server waits for, if that takes its time here: `writing` or `receiving`; None: nothing."""
        hows = set(incoming.how for incoming in self.rounds)
        if Incoming.BYTES in hows:
            return 'receiving'
        if [1 for incoming in self.rounds if incoming.how == Incoming.STRAGGLERS and self._awaits_upstream(incoming)]:
            return 'following'
        if self._kept and not self.writing and Incoming.WAITS in hows:
            return 'relaying'
        return 'writing' if Incoming.WAITS in hows or Incoming.COMPLETE in hows else None

    @property
    def unwritten(self):
        """Rounds that the writer has."""
        return len(self._lent)

    @property
    def writing(self):
        """Whether the writer has something to do, and is not waiting for what came damaged."""
        return bool(self._lent) and self._lent[0].given

    @property
    def deadline(self):
        """When to call tick(), seconds; None: no need to."""
        deadlines = [incoming.deadline for incoming in self.rounds
                     if incoming.deadline is not None and not self._awaits_upstream(incoming)]
        return min(deadlines) if deadlines else None

    def size_of(self, head):
        """As Connection.messages wants it: 0 while what follows is no message."""
        if self.wants is not None or self.over:
            return 0
        digest_size = (DIGEST_SIZE if self.digest else 0) + (Vouchers.SIZE if self.vouchers else 0)
        return self.dialect.server_message_size(head, digest_size, not self.rounds and not self._last)

    # ---- what the server says

    def heard(self, message, now):
        """A message of the server; returns what to do.  Raises ProtocolError, Refused."""
        kind = message[:1]
        if not self.dialect.talks and not self.rounds and not self._last:
            return self._on_info(*self.dialect.read_info(message))
        if self.dialect.talks:
            if kind == ALIVE:
                return []
            if kind == STATE:
                return [('state', unpack_frame(message[5:]))]
            if kind == UPSTREAM:
                return [('upstream', place_of_upstream(unpack_frame(message[5:])))]
            if kind == FOLLOWER:
                return [('follower', token_of(unpack_frame(message[5:]), optional=True))]
            if kind == BYE:
                return self._on_bye(unpack_frame(message[5:]))
            if kind == BUFFER_INFO:
                return self._on_info(*self.dialect.read_info(message))
        if kind == SENT and self._last:
            self.over = True
            return [('end', None)]
        if kind not in self.HANDLERS:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        how, handler, codes = self.HANDLERS[kind]
        number = self.dialect.number_of(message if kind != SUMS else message[4:])     # behind their count
        for incoming in self.rounds:
            if number in (None, incoming.number):
                if incoming.how == how and (self.dialect.codes or not codes):
                    return handler(self, incoming, message[5:], now)
                break
        raise ProtocolError('signal 0x%02x out of turn' % ord(kind))

    def _on_bye(self, fields):
        if fields.get('ok') is not True:
            self.begun = self.begun or fields.get('empty') is True
            raise refusal(fields)
        if self.rounds:
            raise ProtocolError('the end before the end')
        self.over = self.begun = True
        return [('end', fields)]

    def _on_info(self, number, size, base, count, place):
        # Rounds that others lack are left out.
        skipped = (number - self.announced) & MASK if self.dialect.sizes else 0
        packets = (base - (base if self._base is None else self._base)) & self.dialect.seqs
        if packets and not skipped or packets > self.dialect.seqs // 2:
            raise ProtocolError('a round that begins at %d, not %d' % (base, self._base))
        in_turn = place is None or place + size < 1 << 63 and (
            self._place is None or place <= self._place < place + size)
        if skipped >= self.AHEAD or not in_turn:
            raise ProtocolError('round %d, at byte %d, out of turn' % (number, place))
        self._base = (base + count) & self.dialect.seqs
        place = self._place if place is None else place
        self._place = None if self._place is None else place + size
        first, self.begun = not self.begun, True
        incoming = Incoming(number, size, base, count, place)
        if not count and self.dialect.ends:
            self._last = incoming
            return [('send', self.dialect.ready(number))]
        payload = self._payload_of(incoming)
        least = (count - 1) * payload + 1 if self.dialect.sizes else count
        if not 0 < count <= MAX_PACKETS or not least <= size <= count * payload:
            raise ProtocolError('a buffer of %d packets and %d bytes' % (count, size))
        if base + count - 1 > self.dialect.seqs and self.dialect.sizes:
            raise ProtocolError('a round of repair packets')
        if len(self.rounds) >= 2 * self.dialect.window:
            raise ProtocolError('more rounds under way than agreed')
        self.announced = number + 1 if self.dialect.sizes else self.announced + 1
        self.rounds.append(incoming)
        return ([('begin', None)] if first else []) + self._make_room()

    def _payload_of(self, incoming):
        """Bytes in a full packet; nothing else tells of jumbo frames in the base protocol."""
        jumbo = not self.dialect.sizes and incoming.size > incoming.count * self.payload
        return payload_for(9000) if jumbo else self.payload

    def _make_room(self):
        """Be ready for those rounds for which there is a buffer now."""
        todo = []
        used = len(self._lent) + len(self._kept) + len([1 for incoming in self.rounds
                                      if incoming.buffer and incoming not in self._lent])
        for incoming in self.rounds:
            if incoming.how != Incoming.WAITS:
                continue
            if used >= self.room:
                break
            used += 1
            payload, buffer = self._payload_of(incoming), None
            if self._free:
                buffer = self._free.pop()
            if buffer is None or buffer.capacity < incoming.count or buffer.payload != payload:
                buffer = Buffer(payload, incoming.count, self._salt, () if self.digest else self._checks)
            buffer.start(incoming.base, incoming.count, incoming.size if self.dialect.sizes else None)
            incoming.buffer, incoming.how = buffer, Incoming.LISTENS
            if self.forwarding:
                self.forwarding.add(incoming)
            todo.append(('send', self.dialect.ready(incoming.number)))
        return todo

    def _on_sent(self, incoming, digest, now):
        incoming.digest, voucher = digest[:DIGEST_SIZE], digest[DIGEST_SIZE:]
        if self.vouchers and not same(voucher, self.vouchers.of_round(
                incoming.number, incoming.place, incoming.size, incoming.digest)):
            raise Failure('round %d is not vouched for: %s' % (incoming.number, NOT_VOUCHED))
        patience = self.SETTLE if self._heard_of(incoming) else self.NOTHING_YET
        incoming.how, incoming.deadline = Incoming.STRAGGLERS, now + patience
        return []

    def _on_again(self, incoming, rest, _now):
        number, recipe_count, combinations = REPAIR.unpack(rest)
        count = recipe_count + combinations
        if not 0 < count <= MAX_PACKETS or number + count > REPAIR_BIT:
            raise ProtocolError('a repair pass of %d packets' % count)
        coded = Buffer(self.payload, count, self._repair_salt - REPAIR_BIT, () if self.digest else self._checks)
        coded.start(REPAIR_BIT + number, count, count * self.payload)
        for data, size, payload in self._early:     # multicast may overtake TCP
            coded.put(data, 0, size, payload)
        self._early.clear()
        incoming.repair, incoming.how = (coded, recipe_count), Incoming.LISTENS
        return []

    def _on_packets(self, incoming, _rest, _now):
        self._expect_packets(incoming)
        return []

    def _on_sums(self, incoming, rest, _now):
        sums = struct.unpack('<%dI' % (len(rest) // 4), rest)[1:]
        if len(sums) != incoming.count:
            raise ProtocolError('%s of a round of %d' % (counted(len(sums), 'sum'), incoming.count))
        gaps = incoming.buffer.differing(sums)
        # Whom another client believed we need not believe; and a checksum keeps no forger away.
        if not gaps and (incoming.chained or self.vouchers) and not incoming.whole:
            gaps, incoming.whole = (1 << incoming.count) - 1, True
        if not gaps:
            incoming.how, incoming.given = Incoming.COMPLETE, True
            return [('differs', incoming)]
        tell('damaged', round=incoming.number, count=how_many(gaps))
        if how_many(gaps) >= incoming.heard:        # it was all forged, so nothing of the server's was heard
            self.by_multicast -= incoming.heard
            incoming.heard, self._hears = 0, False
        incoming.buffer.forget(gaps)
        incoming.buffer.damaged += how_many(gaps)
        return self._ask(incoming)

    # Signal -> how the round must stand, what to do, and whether only a session has it.
    HANDLERS = {SENT: (Incoming.LISTENS, _on_sent, False), AGAIN: (Incoming.ASKED, _on_again, True),
                PACKETS: (Incoming.ASKED, _on_packets, True), SUMS: (Incoming.SUSPECT, _on_sums, True)}

    # ---- time, and datagrams

    @property
    def aim(self):
        """(Buffer, index) where multicast will go on, if nothing has arrived from there on; None if that cannot be told."""
        incoming, place = self._aim or (None, 0)
        if not incoming or not incoming.target or place >= incoming.target.count:
            later = [each for each in self.rounds if each.target and not each.target.received]
            if not later:
                return None
            incoming, place = later[0], 0
        target = incoming.target
        if target.checks or self._awaits_upstream(incoming):        # which may be about to write there, too
            return None
        return (target, place) if target.lacks(place, place + MOST_SEGMENTS) else None

    def take(self, batches, in_first, first, last):
        """Datagrams have arrived; returns whether any was of use.

        batches: as DatagramReceiver returns them; in_first: packets in their first
        message; first, last: when the first and the last message came, seconds.
        """
        useful = False
        listening = [(incoming, incoming.target) for incoming in self.rounds]
        listening = [each for each in listening if each[1]]
        for number, (data, offset, count, payload) in enumerate(batches):
            there = isinstance(data, Buffer)        # and `offset` is the place
            seq = data.base + offset if there else U32.unpack_from(data, offset)[0]
            for incoming, target in listening:
                place = target.index(seq)
                if place >= target.count:
                    continue
                before = target.received
                if there:
                    target.arrived(place, place + count)
                else:
                    target.put(data, offset, count, payload)
                useful = useful or target.received > before
                if target is incoming.buffer:
                    incoming.heard += target.received - before
                    if not number:
                        incoming.note(place, before + in_first, first)
                    if number == len(batches) - 1:
                        incoming.note(place + count - 1, target.received, last)
                self._aim = incoming, place + count
                if place + count > target.count:    # some are of the next round
                    useful = self._put_rest(listening, data, offset, count, payload, target.count - place) or useful
                break
            else:
                if seq & REPAIR_BIT:
                    self.largest = max(self.largest, U32.unpack_from(data, offset + 8)[0])
                    self._early.append((bytearray(data[offset:offset + count * (PACKET.size + payload)]),
                                        count, payload))
                elif count > 1:         # some may be of a round all the same
                    useful = self._put_rest(listening, data, offset, count, payload, 0) or useful
        return useful

    @staticmethod
    def _put_rest(listening, data, offset, count, payload, taken):
        """Put the packets behind the first `taken` ones where they belong; returns whether any was of use."""
        useful, offset = False, offset + taken * (PACKET.size + payload)
        for incoming, target in listening:
            before = target.received
            target.put(data, offset, count - taken, payload)
            useful = useful or target.received > before
            if target is incoming.buffer:
                incoming.heard += target.received - before
        return useful

    def listened(self, now):
        """Datagrams were of use: more of them may be on their way."""
        for incoming in self.rounds:
            if incoming.how == Incoming.STRAGGLERS:
                incoming.deadline = now + self.SETTLE

    def _may_come(self, incoming):
        """Whether stragglers may be on their way: the end of what was sent is
        missing, though we hear multicast, and nothing later has come."""
        target = incoming.target
        return ((self._heard_of(incoming) or self._hears) and not target.complete
                and not (target.has(0) and target.has(target.count - 1))
                and not any(later.number > incoming.number and later.target and later.target.received
                            for later in self.rounds))

    @staticmethod
    def _heard_of(incoming):
        """Packets by multicast for a round, or for the repair pass that is under way for it."""
        return incoming.repair[0].received if incoming.repair else incoming.heard

    def tick(self, now):
        """Time passes; returns what to do."""
        todo = []
        for incoming in list(self.rounds):
            if incoming.how == Incoming.STRAGGLERS and not self._awaits_upstream(incoming) and (
                    now >= incoming.deadline or not self._may_come(incoming)):
                todo += self._answer(incoming)
        return todo

    def _answer(self, incoming):
        """Say what is missing of a round, or that nothing is."""
        buffer, incoming.deadline = incoming.buffer, None
        if incoming.repair:
            self.coded += solve(buffer, *incoming.repair)
            incoming.repair = None
        else:
            self.by_multicast += incoming.heard
            self._hears = bool(incoming.heard)
        incoming.carried = False
        return self._complete(incoming) if buffer.complete else self._ask(incoming)

    def _ask(self, incoming):
        """Ask for what is missing."""
        incoming.gaps, incoming.how = incoming.buffer.missing(), Incoming.ASKED
        if not self.dialect.talks:
            self._expect_packets(incoming)
        return [('send', self.dialect.request(incoming.number, self._figures(incoming), incoming.gaps,
                                              incoming.base, incoming.count))]

    @staticmethod
    def _figures(incoming):
        return (incoming.heard,) + incoming.head.figures() + incoming.tail.figures()

    def _complete(self, incoming):
        """Nothing is missing: give the writer what is its turn."""
        incoming.how, todo = Incoming.COMPLETE, []
        for each in list(self.rounds):
            if each.how != Incoming.COMPLETE:
                break
            if not each.given:
                each.given = True
                if each not in self._lent:
                    self._lent.append(each)
                if not self.digest:     # nothing more to find out
                    todo += self.verified(each)
                todo.append(('write', each))
        return todo

    # ---- packets by TCP

    def _expect_packets(self, incoming):
        incoming.how, self._reading = Incoming.BYTES, incoming
        self._left.extend(runs(incoming.gaps))
        self.by_tcp += how_many(incoming.gaps)
        self._want_more()

    def _want_more(self):
        """Set `wants` to the next bytes: where a digest covers them straight to their place, else a header."""
        self._filled = 0
        self.wants = (self._reading.buffer.view(*self._left[0]) if self.digest
                      else memoryview(self._staging)[:PACKET.size])

    def filled(self, size):
        """So many bytes were put into `wants`; returns what to do.  Raises ProtocolError."""
        self._filled += size
        self.wants = self.wants[size:]
        incoming = self._reading
        buffer, (start, stop) = incoming.buffer, self._left[0]
        if len(self.wants):
            if self.digest:             # a follower need not wait for the others
                buffer.arrived(start, start + self._filled // buffer.payload)
            return []
        self._left.popleft()
        if self.digest:
            buffer.arrived(start, stop)
        else:
            if start + 1 < stop or self._filled == PACKET.size:
                self._left.appendleft((start + (self._filled > PACKET.size), stop))
            payload = PACKET.unpack_from(self._staging)[2]
            if not 0 < payload <= buffer.payload:
                raise ProtocolError('a packet of %d bytes' % payload)
            if self._filled == PACKET.size:
                self.wants = memoryview(self._staging)[PACKET.size:PACKET.size + payload]
                return []
            buffer.put(self._staging, 0, 1, payload)
        if self._left:
            self._want_more()
            return []
        self.wants = self._reading = None
        if not buffer.complete:
            raise ProtocolError('packets that were not asked for, or damaged')
        return self._complete(incoming)

    # ---- the writer

    def verified(self, incoming):
        """The writer found a round right; returns what to do."""
        self.rounds.remove(incoming)
        if incoming.heard and self.vouchers:
            self._forged = self._forged + 1 if incoming.suspected else 0
            if self._forged == self.FORGED and not self.distrusts:
                self.distrusts, self._hears = True, False
                tell('forged', rounds=self.FORGED)
        return [('send', self.dialect.done(incoming.number, self._figures(incoming)))]

    def damaged(self, incoming):
        """The writer found that a round's digest differs; returns what to do."""
        incoming.given, incoming.how, incoming.suspected = False, Incoming.SUSPECT, True
        return [('send', self.dialect.ask_for_sums(incoming.number))]

    def go_on(self):
        """The last BYE counts for nothing: more is lacking."""
        self.over = False

    def take_over(self, other):
        """It comes after another window, of an earlier connection: count on."""
        self.by_multicast, self.by_chain, self.by_tcp, self.coded = (
            other.by_multicast, other.by_chain, other.by_tcp, other.coded)
        self.distrusts = other.distrusts

    def written(self):
        """The writer is through with a round; returns what to do."""
        incoming = self._lent.popleft()
        if self.forwarding and self.forwarding.holds(incoming):
            self._kept.append(incoming)
            return []
        self._free.append(incoming.buffer)
        return self._make_room()

    # ---- the chain: what another client brings, and what one takes from here

    def _awaits_upstream(self, incoming):
        """Whether a round's answer waits for what the upstream may still bring."""
        return (incoming.carried and self.upstream_from is not None
                and (incoming.number - self.upstream_from) & MASK < self.AHEAD and not incoming.buffer.complete)

    def area_for(self, number, first, size):
        """Where to put a piece that an upstream sends: (round, memoryview, index after its last packet).

        (None, None, None): the round is not waited for.  Raises ProtocolError.
        """
        for incoming in self.rounds:
            if incoming.number == number:
                break
        else:
            return None, None, None     # it is through with it, or never had a part in it
        last = first + -(-size // self.payload)
        if last > incoming.count or size != (last - first) * self.payload and (
                last != incoming.count or size != incoming.size - first * self.payload):
            raise ProtocolError('a piece outside its round')
        if not self.takes(incoming):
            return None, None, None
        return incoming, incoming.buffer.view(first, last), last

    @staticmethod
    def takes(incoming):
        """Whether what an upstream brings of a round may still be put to its place."""
        return incoming.how in (Incoming.LISTENS, Incoming.STRAGGLERS) and not incoming.buffer.complete

    def arrived(self, incoming, first, last):
        """An upstream has brought these packets of a round, to their place."""
        before = incoming.buffer.received
        incoming.buffer.arrived(first, last)
        incoming.chained = True
        self.by_chain += incoming.buffer.received - before

    def no_more(self, number, now):
        """The upstream brings no more of a round."""
        for incoming in self.rounds:
            if incoming.number == number:
                incoming.carried, incoming.deadline = False, now if incoming.deadline is not None else None

    def follow(self, number):
        """From a round on there is an upstream; None: there is none any more."""
        self.upstream_from = number

    def serve(self, forwarding):
        """There is a follower, or (None) none any more; returns what to do."""
        self.forwarding = forwarding
        if forwarding:
            rounds = self._kept + list(self._lent) + [each for each in self.rounds if each not in self._lent]
            rounds.sort(key=lambda each: (each.number - self.announced) & MASK)
            for incoming in rounds:
                if incoming.buffer:
                    forwarding.add(incoming)
            oldest = rounds[0].number if rounds else self.announced & MASK
            forwarding.skip(oldest)
        return self.relayed()

    def relayed(self):
        """The follower may have got a round; returns what to do."""
        for incoming in self._kept[:]:
            if not self.forwarding or not self.forwarding.holds(incoming):
                self._kept.remove(incoming)
                self._free.append(incoming.buffer)
        return self._make_room()


# ---------------------------------------------------------------------------
# Chain
# ---------------------------------------------------------------------------

# Where multicast does not reach, each client takes the packets from another one, its
# upstream, and only the first of them from the server.  The chain is a carrier, as multicast
# is: what it does not bring is asked for as ever.

class Link(object):
    """A client takes its packets from another one.

    up      whether the follower was told so: the upstream listens
    held    whether the follower said that it is connected, as it does in a rehearsal
    """

    def __init__(self, upstream, follower, now):
        self.upstream, self.follower, self.since = upstream, follower, now
        self.token = os.urandom(TOKEN_SIZE)
        self.port = None                # where the upstream listens
        self.up = self.held = False


class Chain(object):
    """Who takes the packets from whom: no socket, no thread and no clock.

    It is told who hears multicast and who does not, what clients say of their neighbours, who left,
    and when time passes; changes() is what to tell whom.  Links only go from earlier to later in `order`, and each
    client has one upstream and one follower at the most, so there is never a loop.
    """

    DEAF = BACK = 2                     # rounds in a row, of which a client hears nothing, or nearly all;
    DEAF_AT_FIRST = 1                   # of which nobody does, where nobody ever did
    ANSWER = 2.0                        # seconds for an upstream to listen
    SETTLE = 1.0                        # seconds that all wait for a chain that is being built
    JIFFY = 1.0                         # seconds that nobody is blamed for
    PATIENCE = 5.0                      # seconds between two that are
    SLOW = 3                            # rounds in a row in which a client holds its followers up
    TRIAL = 6.0                         # seconds for a follower to connect, in a rehearsal

    def __init__(self, dialect):
        self.dialect = dialect
        self.order = []                 # members that are in it
        self.links = {}                 # follower -> Link
        self._inside = set()            # members that it is for,
        self._audience = None           # of whom these take part in the rounds to come; None: all
        self._head = None               # a member that hears multicast, and passes it on
        self._last = []                 # members that go behind all others, in their order
        self._lost = {}                 # upstream -> the followers that could not reach it, or lost it
        self._slow = {}                 # member -> rounds in a row
        self._relieved = set()          # followers that had another upstream as theirs may be slow
        self._next_blame = 0.0          # when one may be put to the end for that
        self._served = {}               # upstream -> the token that it was told last
        self._news = []                 # (member, message without the round's number, or a function of it)
        self._settled_by = None         # when not to wait any longer for it to be built
        self.mute = True                # nobody ever heard anything

    def __str__(self):
        return ' - '.join(str(member) for member in self.order)

    # ---- what happens

    def build(self, members, now, wait=True):
        """It is for all of them; wait: all others until it is built."""
        self._inside.update(member for member in members if member.willing)
        self._wire(now, wait)

    def learn(self, here, now):
        """A round was answered for: who hears, who does not; here: all members."""
        before, head = set(self._inside), self._head
        self.mute = self.mute and all(member.deaf_rounds for member in here)
        enough = self.DEAF_AT_FIRST if self.mute else self.DEAF
        for member in here:
            if member.deaf_rounds >= enough and member.willing:
                self._inside.add(member)
            elif member.heard_rounds >= self.BACK:
                self._inside.discard(member)
        hearing = [member for member in here if not member.deaf_rounds and member not in self._inside
                   and member.willing and len(self._lost.get(member, ())) < 2]
        hearing = [member for member in hearing if member.heard_rounds] or hearing
        if not self._inside or self._head and (self._head.deaf_rounds or self._head not in here):
            self._head = None           # some losses are no reason
        if self._inside and hearing and not self._head:
            hearing.sort(key=self._place)
            first = min(map(self._place, self._inside))
            self._head = ([member for member in hearing if self._place(member) < first] or hearing[:1])[-1]
        if self._inside != before or self._head is not head:
            self._wire(now, wait=not self._head)

    def among(self, audience, now):
        """The rounds to come are for these members, a set; None: all."""
        if audience is not self._audience:
            self._audience, before = audience, self._audience
            if self._inside and audience != before:
                self._wire(now)

    def keep(self, here, now):
        """Only these are members still: who left when no more rounds were to come was not told of."""
        for member in (self._inside | set(self._lost) | set(self._slow) | set(self._served)).difference(here):
            self.leave(member, now)

    def leave(self, member, now):
        """A member is none any more."""
        for members in (self._lost, self._slow, self._served):
            members.pop(member, None)
        for members in (self._inside, self._relieved):
            members.discard(member)
        for followers in self._lost.values():
            followers.discard(member)
        if member in self._last:
            self._last.remove(member)
        if member is self._head:
            self._head = None
        if member in self.order:
            self._wire(now)

    def heard(self, member, said, now, mending=True):
        """What a member says of a neighbour: the fields of RELAY; mending: whether there are rounds to come."""
        for link in self.links.values():
            if link.token == said['token']:
                break
        else:
            return                      # of a link that is none any more
        if member is link.upstream and not link.up:
            if said.get('port'):
                link.up, link.upstream.relays, link.port = True, True, said['port']
                self._say(link.follower, lambda number: self.dialect.upstream(
                    number, member.address, link.port, link.token))
            else:
                self._lost.setdefault(member, set()).add(None)      # it can serve nobody else either
                self._fails(link, 'it cannot listen: %s' % said.get('reason'), now, False, mending)
        elif member is link.follower and said.get('lost') and link.upstream.outcome != 'complete':
            self._fails(link, said['lost'], now, said['connected'], mending)
        elif member is link.follower and said.get('connected'):
            link.held = link.upstream.reached = True

    def through(self, seconds, number, now):
        """All are through with a round, which took so long since the one before."""
        times = dict((member, member.done_at.pop(number, None)) for member in self.order)
        followed = dict((link.upstream, follower) for follower, link in self.links.items() if link.up)
        late = []
        for member, link in self.links.items():
            after = followed.get(member)
            if not link.up or after is None or None in (times[member], times[link.upstream], times[after]):
                self._slow.pop(member, None)
                continue
            lag, follows = times[member] - times[link.upstream], times[after] - times[member]
            if lag > max(self.JIFFY, seconds) and follows < lag / 4:
                self._slow[member] = self._slow.get(member, 0) + 1
                if self._slow[member] >= self.SLOW:
                    late.append(member)
            else:
                self._slow.pop(member, None)
        for member in late[:1] if now >= self._next_blame else ():
            self._next_blame = now + self.PATIENCE
            self._slow.clear()
            tell('chain_slow', member=member)
            self._to_the_end(member)
            self._wire(now)

    def relieve(self, follower, now):
        """A client alone holds all up, which may be its upstream's doing: give it another one.

        Returns whether there was one to be replaced; once for each client.
        """
        link = self.links.get(follower)
        if not link or follower in self._relieved:
            return False
        self._relieved.add(follower)
        tell('chain_slow', member=link.upstream)
        self._to_the_end(link.upstream)
        self._wire(now)
        return True

    def look(self, now):
        """Time passes."""
        for link in list(self.links.values()):
            if not link.up and now - link.since > self.ANSWER and link.follower in self.links:
                self._fails(link, 'no word from it', now)

    def settling(self, now):
        """Whether to wait for it, as it is just being built."""
        if self._settled_by and (now > self._settled_by or all(link.up for link in self.links.values())):
            self._settled_by = None
        return self._settled_by is not None

    def changes(self, number):
        """What to tell whom: member -> bytes; number: the first round that it can be for."""
        messages = {}
        for member, message in self._news:
            messages[member] = messages.get(member, b'') + message(number)
        self._news = []
        return messages

    # ---- a rehearsal

    def tried(self, now):
        """Whether each follower has connected to its upstream, or had the time to."""
        return all(link.held or now - link.since > self.TRIAL for link in self.links.values())

    def turn(self, now):
        """The first goes to the end, so that the last one has a follower, too."""
        if self.order:
            self._to_the_end(self.order[0])
            self._wire(now)

    def dissolve(self, now):
        """It is for nobody any more."""
        self._inside.clear()
        self._wire(now)

    # ---- how it is made

    @staticmethod
    def _place(member):
        return socket.inet_aton(member.address), member.since

    def _to_the_end(self, member):
        if member in self._last:
            self._last.remove(member)
        self._last.append(member)

    def _fails(self, link, reason, now, connected=False, mending=True):
        """A link does not hold: the upstream goes to the end."""
        upstream, follower = link.upstream, link.follower
        self._lost.setdefault(upstream, set()).add(follower)
        tell('chain_broken', upstream=upstream, follower=follower, reason=reason)
        if link.port and not connected:
            upstream.reached = upstream.reached or False
        if link.port and not connected and len(self._lost[upstream]) == 1:
            tell('relay_unreachable', upstream=upstream, follower=follower, reason=reason, port=link.port)
        if not mending:
            return
        self._to_the_end(upstream)
        if len([1 for followers in self._lost.values() if follower in followers]) > 1:
            self._inside.discard(follower)              # it is more likely its own doing
        self._wire(now)

    def _may_serve(self, upstream, follower):
        lost = self._lost.get(upstream, ())
        return len(lost) < 2 and follower not in lost and None not in lost

    def _wire(self, now, wait=False):
        """Have the links that the order wants."""
        inside = self._inside if self._audience is None else self._inside & self._audience
        last = [member for member in self._last if member in inside]
        head = [self._head] if self._head and inside and self._head in (self._audience or (self._head,)) else []
        order = head + sorted(inside.difference(last), key=self._place) + last
        wanted, before = {}, None       # follower -> upstream
        for member in order:
            if before and self._may_serve(before, member):
                wanted[member] = before
                before = member
            elif not before or len(self._lost.get(member, ())) < 2:
                before = member         # the server's packets go on from here
        for follower, link in list(self.links.items()):
            if wanted.get(follower) is not link.upstream:
                del self.links[follower]
                link.upstream.relays = False
                self._say(follower, lambda number: self.dialect.upstream(number))
        fresh = [follower for follower in order if follower in wanted and follower not in self.links]
        for follower in fresh:
            self.links[follower] = Link(wanted[follower], follower, now)
        serving = dict((link.upstream, link.token) for link in self.links.values())
        for member in set(self._served) - set(serving):
            del self._served[member]
            self._say(member, lambda number: self.dialect.follower(None))
        for member in order:
            if member in serving and self._served.get(member) != serving[member]:
                self._served[member] = serving[member]
                self._say(member, lambda number, token=serving[member]: self.dialect.follower(token))
        if wait and fresh:
            self._settled_by = now + self.SETTLE
        before, self.order = self.order, order
        if self.links and (order != before or fresh):
            tell('chain', chain=self)

    def _say(self, member, message):
        self._news.append((member, message))


class Forwarding(object):
    """What a follower is still to get of the rounds, in pieces, as the packets come."""

    def __init__(self, first, most):
        """first: the first round that it wants; most: bytes in a piece."""
        self.first, self._most = first, most
        self._rounds = collections.deque()          # [Incoming, [(start, stop) of packets that it does not have]]
        self._gone = collections.deque()            # numbers of rounds that nobody has here any more

    empty = property(lambda self: not self._rounds and not self._gone)

    def add(self, incoming):
        """There is a buffer for a round."""
        if (incoming.number - self.first) & MASK < ClientWindow.AHEAD:
            self._rounds.append([incoming, [(0, incoming.count)]])

    def skip(self, number):
        """Rounds before that one are gone."""
        gone = (number - self.first) & MASK
        if gone < ClientWindow.AHEAD:
            self._gone.extend((self.first + i) & MASK for i in range(min(gone, 2 * SessionDialect.window)))

    def holds(self, incoming):
        """Whether a round is still needed."""
        return any(entry[0] is incoming for entry in self._rounds)

    def next(self):
        """What to send next: (round, first packet, index after the last), (number of a round of which no more comes,
        None, None), or None."""
        if self._gone:
            return self._gone.popleft(), None, None
        for entry in self._rounds:
            incoming, left = entry
            buffer = incoming.buffer
            for i, (start, stop) in enumerate(left):
                found = buffer.here(start, stop)
                if found:
                    first, last = found[0], min(found[1], found[0] + max(1, self._most // buffer.payload))
                    left[i:i + 1] = [part for part in ((start, first), (last, stop)) if part[0] < part[1]]
                    return incoming, first, last
            if not left:
                self._rounds.remove(entry)
                return incoming.number, None, None
        return None


class Piece(object):
    """A piece that is coming from an upstream.

    incoming    its round; None: nobody waits for it any more
    first, last places of its packets; `done`: of those that have arrived
    left        a memoryview, to be filled
    """

    def __init__(self, incoming, first, last, area):
        self.incoming, self.first, self.last = incoming, first, last
        self.left, self.size, self.got = area, len(area), 0
        self.done = first


class Relay(object):
    """A client's neighbours in the chain: its upstream, which it takes packets from, and its follower.

    It never waits: turn() does what can be done.
    """

    SILENCE = 2.0                       # seconds without a byte, after which an upstream is lost
    STILL = 0.5                         # seconds after which a follower hears that we are here
    GREETING = 2.0                      # seconds for a follower to say its token
    MOST = 8                            # connections that have not
    AT_ONCE = 1 << 20                   # bytes from an upstream in a turn
    SMALL = 32 << 10                    # what is left of a piece and fewer bytes is read with what follows it
    LONGEST_END = 30.0                  # seconds that a follower can keep us at the end

    def __init__(self, window, address, port, say, carry_out):
        """window: a ClientWindow; address: of this host; port: where to listen, if it is free;
        say(bytes): to the server; carry_out(todo): what the window wants."""
        self.window, self._say, self._carry_out = window, say, carry_out
        self._address, self._port = address, port
        self._watched = {}              # descriptor -> events
        self._pollers = []
        # the follower
        self._token = None              # who says it is served
        self._named_at = None           # when that was
        self._listener = None
        self._candidates = []           # Connections
        self._follower = None           # Connection
        # the upstream
        self._upstream = None           # Connection
        self.upstream_place = None      # its (address, port)
        self._upstream_token = None
        self._connected = False         # to the upstream
        self._words = b''               # of a header or a sum that is coming
        self._head = b''                # of the piece that is coming
        self._piece = None              # that is
        self._staging = bytearray(2 * self.SMALL)
        self._scratch = None
        self.trickles = False           # the upstream sends less than we can take
        self.rehearsal = False          # it brings nothing, but the server wants to know whether it could

    @property
    def active(self):
        """Whether it has anything to do."""
        return bool(self._watched)

    streams = property(lambda self: [end.fileno() for end in (self._upstream, self._follower) if end])
    following = property(lambda self: self._connected and not self.rehearsal)

    # ---- descriptors

    def descriptors(self):
        """(descriptor, events) of all, for poll()."""
        return list(self._watched.items())

    def poll_with(self, *pollers):
        """From now on all is registered there."""
        self._pollers = pollers
        for fd, events in self._watched.items():
            for poller in pollers:
                poller.register(fd, events)

    def _watch(self, connection, events):
        fd = connection.fileno()
        if self._watched.get(fd) != events:
            for poller in self._pollers:
                (poller.modify if fd in self._watched else poller.register)(fd, events)
            self._watched[fd] = events

    def _close(self, connection):
        if self._watched.pop(connection.fileno(), None):
            for poller in self._pollers:
                poller.unregister(connection.fileno())
        connection.close()

    def close(self):
        """Leave nothing behind."""
        self._drop_upstream()
        self._end_service()

    # ---- what the server wants

    def serve(self, token):
        """Serve whoever says this token; None: nobody.  Raises Failure, as all that follows."""
        self._drop_follower()
        for candidate in self._candidates[:]:
            self._dismiss(candidate)
        if token is None:
            return self._end_service()
        self._token, self._named_at = token, monotonic()
        try:
            self._listen()
        except OS_ERRORS as error:
            self._end_service()
            return self._say(SessionDialect.relay(token, port=None, reason=explain(error)))
        return self._say(SessionDialect.relay(token, port=self._listener.getsockname()[1]))

    def _listen(self):
        for port in (self._port, 0) if not self._listener else ():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((self._address, port))
                sock.listen(self.MOST)
            except OS_ERRORS:
                sock.close()
                if not port:
                    raise
                continue
            sock.setblocking(False)
            self._listener = sock
            self._watch(sock, select.POLLIN)
            break

    def _end_service(self):
        self._token = None
        self._drop_follower()
        for candidate in self._candidates[:]:
            self._dismiss(candidate)
        if self._listener:
            self._close(self._listener)
            self._listener = None

    def follow(self, number, place, token):
        """Take the rounds from that number on from (address, port); None: from nobody."""
        self._drop_upstream()
        if place is None:
            return
        self.upstream_place = place
        self._upstream_token, self._connected = token, False
        try:
            self._upstream = Connection(socket.socket(socket.AF_INET, socket.SOCK_STREAM), place[0])
            self._upstream.sock.setblocking(False)
            self._upstream.outgoing.put_tail(token + U32.pack(number))
            code = self._upstream.sock.connect_ex(place)
            if code not in (0, errno.EINPROGRESS):
                raise socket.error(code, os.strerror(code))
        except OS_ERRORS as error:
            return self._lose_upstream(explain(error))
        self.window.follow(number)
        self._watch(self._upstream, select.POLLOUT)

    # ---- a turn

    def turn(self, fds, now):
        """Do what can be done; fds: descriptors that are ready; now: seconds."""
        if self._listener and self._listener.fileno() in fds:
            self._accept(now)
        for candidate in self._candidates[:]:
            if candidate.fileno() in fds:
                self._greet(candidate)
            elif now - candidate.since > self.GREETING:
                self._dismiss(candidate, 'it says nothing')
        if self._follower and self._follower.fileno() in fds:
            self._hear_follower()
        upstream = self._upstream
        if upstream and (upstream.fileno() in fds or now - upstream.heard > self.SILENCE):
            self._hear_upstream(now)
        if self._follower:
            self._forward(now)

    # ---- the follower

    def _accept(self, now):
        try:
            sock, address = self._listener.accept()
        except OS_ERRORS:
            return
        candidate = Connection(sock, address[0])
        candidate.begin(STALL)
        candidate.since = now
        self._candidates.append(candidate)
        self._watch(candidate, select.POLLIN)
        if len(self._candidates) > self.MOST:
            self._dismiss(self._candidates[0], 'too many connections that say nothing')

    def _dismiss(self, candidate, reason=None):
        self._candidates.remove(candidate)
        self._close(candidate)
        if reason:
            tell('relay_stranger', address=candidate.address, reason=reason)

    def _greet(self, candidate):
        size = TOKEN_SIZE + U32.size
        try:
            candidate.receive(size - candidate.incoming.size)
        except Gone:
            return self._dismiss(candidate, 'it went away')
        if candidate.incoming.size < size:
            return None
        words = candidate.incoming.flat()
        if not same(words[:TOKEN_SIZE], self._token) or self._follower:
            return self._dismiss(candidate, 'it is not the one that the server named')
        self._candidates.remove(candidate)
        self._follower = candidate
        most = LARGEST_PIECE if self.window.digest else LARGEST_PIECE // 4
        return self._carry_out(self.window.serve(Forwarding(U32.unpack(words[TOKEN_SIZE:])[0], most)))

    def _hear_follower(self):
        try:
            if self._watched.get(self._follower.fileno(), 0) & select.POLLOUT:
                self._follower.flush()
            if self._follower.receive():
                raise Gone('it says what is not asked for')
        except Gone:
            self._drop_follower()

    def _drop_follower(self):
        if self._follower:
            self._close(self._follower)
            self._follower = None
            self._carry_out(self.window.serve(None))

    def _forward(self, now):
        """Send what has come, as far as the follower takes it."""
        follower, forwarding = self._follower, self.window.forwarding
        through = False
        try:
            while not follower.outgoing.count:
                following = forwarding.next()
                if following is None:
                    break
                incoming, first, last = following
                if first is None:
                    follower.send(PIECE.pack(incoming, 0, 0))
                    through = True
                    continue
                data = incoming.buffer.view(first, last)
                head = PIECE.pack(incoming.number, first, len(data))
                if self.window.digest:
                    follower.send(head, data)
                else:
                    payloads = part(incoming.buffer.payloads, first * incoming.buffer.payload, len(data))
                    follower.send(head, data, U32.pack(zlib.crc32(payloads, zlib.crc32(head)) & MASK))
            if not follower.outgoing.count and now - follower.told > self.STILL:
                follower.send(STILL_HERE)
        except Gone:
            return self._drop_follower()
        self._watch(follower, select.POLLIN | (select.POLLOUT if follower.outgoing.count else 0))
        if through:
            self._carry_out(self.window.relayed())
        return None

    def owes(self, now, since):
        """At the end, which came `since`: whether a follower is still to get something, and takes it."""
        if not self._follower or self.window.forwarding.empty and not self._follower.outgoing.count:
            return False
        self._follower.look_at_kernel()
        return now - max(since, self._follower.moved) < self.SILENCE and now - since < self.LONGEST_END

    # ---- the upstream

    def _drop_upstream(self):
        if self._upstream:
            self._close(self._upstream)
        self._upstream = self.upstream_place = self._piece = None
        self._connected = self.trickles = False
        self._words = b''
        self.window.follow(None)

    def _lose_upstream(self, reason):
        connected = self._connected
        self._drop_upstream()
        self._say(SessionDialect.relay(self._upstream_token, lost=reason, connected=connected))

    def _hear_upstream(self, now):
        try:
            if not self._connected:
                self._connect(now)
            if self._connected:
                got, more = 0, True
                while more and got < self.AT_ONCE:
                    size, more = self._read(now)
                    got += size
                self.trickles = bool(got) and not more
        except Gone as error:
            return self._lose_upstream(str(error))
        except ProtocolError as error:
            return self._lose_upstream('protocol error: %s' % error)
        if now - self._upstream.heard > self.SILENCE:
            self._lose_upstream('silent for %g s' % self.SILENCE if self._connected else 'no connection within %g s'
                                % self.SILENCE)
        return None

    def _connect(self, now):
        """See whether the connection is there.  Raises Gone."""
        upstream = self._upstream
        number = upstream.reached()
        if number == errno.EINPROGRESS:
            return
        if number:
            raise Gone(os.strerror(number))
        self._connected, upstream.heard = True, now
        upstream.begin(STALL)
        upstream.flush()
        self._watch(upstream, select.POLLIN)
        if self.rehearsal:
            self._say(SessionDialect.relay(self._upstream_token, connected=True))

    def _read(self, now):
        """Take some of what has come; returns (bytes, whether there may be more).  Raises Gone, ProtocolError.

        What is large goes straight to its place; small things go through a copy, many at once.
        """
        direct = self._piece and len(self._piece.left) > self.SMALL
        area = self._area() if direct else memoryview(self._staging)
        size = self._upstream.read_into(area)
        if direct:
            self._advance(size)
        else:
            self._take(area[:size], now)
        return size, size == len(area)

    def _take(self, data, now):
        """Bytes of the upstream: headers, pieces, and sums of them.  Raises ProtocolError."""
        while data:
            if self._piece and self._piece.left:
                size = min(len(data), len(self._piece.left))
                self._area()[:size] = data[:size]
                self._advance(size)
            else:
                need = U32.size if self._piece else PIECE.size
                size = min(len(data), need - len(self._words))
                self._words += data[:size].tobytes()
                if len(self._words) == need:
                    words, self._words = self._words, b''
                    if self._piece:
                        self._check_piece(words)
                    else:
                        self._begin_piece(words, now)
            data = data[size:]

    def _area(self):
        """Where the piece goes on."""
        piece = self._piece
        if piece.incoming and self.window.digest and not self.window.takes(piece.incoming):
            # It was complete meanwhile, and is being verified: no byte of it may change any more.
            piece.incoming, piece.left = None, self._scratch_of(len(piece.left))
        return piece.left

    def _advance(self, size):
        """So many bytes of the piece are in their place."""
        piece = self._piece
        piece.left = piece.left[size:]
        if not self.window.digest:
            return
        piece.got += size
        if size and piece.incoming:
            done = piece.last if not piece.left else piece.first + piece.got // self.window.payload
            if done > piece.done:
                self.window.arrived(piece.incoming, piece.done, done)
                piece.done = done
        if not piece.left:
            self._piece = None

    def _begin_piece(self, head, now):
        number, first, size = PIECE.unpack(head)
        if not size:
            if number != MASK:
                self.window.no_more(number, now)
            return
        if size > LARGEST_PIECE:
            raise ProtocolError('a piece of %d bytes' % size)
        incoming, area, last = self.window.area_for(number, first, size)
        if incoming is None or not self.window.digest:
            area = self._scratch_of(size)
        self._head, self._piece = head, Piece(incoming, first, last, area)

    def _scratch_of(self, size):
        if self._scratch is None:
            self._scratch = bytearray(LARGEST_PIECE)
        return memoryview(self._scratch)[:size]

    def _check_piece(self, checksum):
        """Without digests a piece has a checksum.  Raises ProtocolError."""
        piece, self._piece = self._piece, None
        right = zlib.crc32(part(self._scratch, 0, piece.size), zlib.crc32(self._head)) & MASK
        if right != U32.unpack(checksum)[0]:
            raise ProtocolError('a piece with a wrong checksum')
        if piece.incoming and self.window.takes(piece.incoming):
            piece.incoming.buffer.view(piece.first, piece.last)[:] = memoryview(self._scratch)[:piece.size]
            self.window.arrived(piece.incoming, piece.first, piece.last)


# ---------------------------------------------------------------------------
# Roster and policy
# ---------------------------------------------------------------------------

LATE = 'the transfer has begun'         # why a client is refused,
NO_PLACE = LATE + ', and all places are taken (--more on the server has more)'
NO_WAY_BACK = LATE + ', and the image comes by a pipe (--spool FILE on the server keeps it for who comes late)'
CLOSING = LATE + ', and the server is about to end'
UNINVITED = 'it is not on the list of hosts'


class HostList(object):
    """The hosts that are to come, as their operator calls them: by name, short or full, or by address."""

    def __init__(self, text, called='the list of hosts'):
        """text: one a line, what follows a `#` does not count; called: for the user.  Raises Failure."""
        self.names, self.twice = [], []
        self._index = {}                # a name or address; (short name, whether it is that of a long one) -> names
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split('#')[0].split()
            name = words[0].rstrip('.') if words else None
            if words and (len(words) > 1 or not re.match(r'[\w.-]+$', name) or
                          re.match(r'[0-9.]+$', name) and not is_address(name)):
                raise Failure('%s, line %d: %s is neither a host name nor an IPv4 address' % (
                    called, number, printable(line.strip())), USAGE)
            if name and (name.lower() in self._index or self.find(name, None)):
                self.twice.append(name)
            elif name:
                self.names.append(name)
                for key in self._keys(name):
                    self._index.setdefault(key, []).append(name)
        if not self.names:
            raise Failure('%s names no host' % called, USAGE)

    @staticmethod
    def _keys(name):
        short, dot, _ = name.lower().partition('.')
        return [name] if is_address(name) else [name.lower(), (short, bool(dot))]

    def find(self, host, address):
        """The names that a host may have on the list, the likeliest first."""
        names = []
        if host:
            short, dot, _ = host.lower().partition('.')
            # One that is short stands for any that is long, and two long ones must be the same.
            names += self._index.get(host.lower(), []) or self._index.get((short, not dot), [])
        return names + self._index.get(address, [])

    def merge(self, name, address):
        """A name and an address on the list are of one host."""
        self.names = [other for other in self.names if other != address]
        self._index[address] = [name]
        tell('listed_twice', names='%s and %s' % (name, address))


class Roster(object):
    """Who takes part: who is here before the start, who was here at it or came later, who was refused.

    All threads look at it.  Each change is one operation on a list or a dict, and a client
    leaves it only through the thread that has it; so it needs no lock.
    """

    MOST_REFUSED = 1000                 # hosts that are remembered,
    MOST_GONE = 1000                    # and clients that have left

    def __init__(self, places, enough=1, start_by=None, more=False, forever=False, most=None, hosts=None):
        """places: clients that can take part; enough: how many must be here at
        `start_by`, seconds on the monotonic clock (None: wait for all); more: who comes
        when the transfer has begun needs no place; forever: nor is anybody missed who does not;
        most: how many can be here at once then; hosts: a HostList of those that are to come."""
        self._places, self.enough, self.start_by = places, enough, start_by
        self.hosts, self._came, self._has = hosts, set(), set()     # names of a list: who took part, who has the image
        self.more, self.forever, self.most = more or forever, forever, most or places
        self.begun = False
        self.began = None               # when, seconds
        self.again = False              # who comes late can get what was sent before
        self.closing = self.closed = False          # nobody is to come any more; and nobody is here
        self.hurry = False              # begin with those who are here
        self.renewing = False           # who comes now waits for another image
        self.waiting = None             # for whom else than a client all wait, in words
        self.passing = (1, None)        # which pass it is, and seconds that it may still take
        self.sentences = 0              # passed on clients so far
        self.away = set()               # members that were set aside, and have not come back yet
        self.served = 0                 # clients that have everything
        self.everyone = []              # who took part, whatever became of them; of very many the last
        self.forgotten = 0              # how many more there were
        self.news = collections.deque()             # (what, member, more of it): `here`, `left`, what it `lacks`,
                                                    # what it says of a neighbour (`relay`)
        self._here = []
        self._identities = {}           # (host, address), and `who` -> the last of those who are here
        self._refused = {}              # (host, address) -> why

    @property
    def here(self):
        """The clients that are here now."""
        return list(self._here)

    @property
    def missing(self):
        """Who has not come so far: the names of a list, else None for each place."""
        if self.begun and self.forever:
            return []
        if not self.hosts:
            came = len(self.everyone) + self.forgotten if self.begun else len(self._here)
            return [None] * max(0, self._places - came)
        came = self._came if self.begun else set(member.listed for member in self.here)
        return [name for name in self.hosts.names if name not in came]

    @property
    def places(self):
        """How many clients take part if all come."""
        if not self.hosts:
            return self._places
        others = [member for member in self.here if not member.listed] if not self.begun else []
        return len(self.hosts.names) + len(others)

    @property
    def all_served(self):
        """Whether all who are to have the image do."""
        if self.forever:
            return True
        return self._has.issuperset(self.hosts.names) if self.hosts else self.served >= self._places

    @property
    def refused(self):
        """(host, address) and why, of those that were refused and have nothing from another client."""
        served = set(member.identity for member in self.everyone
                     if member.outcome == 'complete' and not member.loopback)
        return sorted(item for item in self._refused.items() if item[0] not in served)

    def is_here(self, member):
        """Whether a client is."""
        return member in self._here

    def condemn(self, member, why, away=False):
        """Its thread, whichever that is, is to drop a client at its next look; away: and it is to come back."""
        if away:
            self.away.add(member)
        member.sentence = why
        self.sentences += 1

    def refuse(self, member, why):
        """Remember who was refused."""
        if len(self._refused) < self.MOST_REFUSED:
            self._refused[member.identity] = why

    def why_not(self, twin=None, member=None):
        """Why somebody who comes now, in the place of a twin perhaps, cannot take part; None if he can.

        member: who that is, where there is a list of hosts; then it has its name on it.
        """
        names = self.hosts.find(member.host, member.address) if self.hosts else []
        if self.hosts and not names and not self.more:
            return UNINVITED
        awaited = self.awaits(member)
        if self.closed or self.closing and not awaited:
            return CLOSING if self.again else LATE
        if self.begun and not self.again:
            return NO_WAY_BACK
        if self.hosts:
            return self._name(member, names, twin)
        here = len(self._here) - bool(twin) + len(self.away) - awaited
        full = here >= self.most if self.more else here + self.served >= self.places
        return NO_PLACE if self.begun and full else None

    def _name(self, member, names, twin):
        """Give a member one of its names on the list; returns why it cannot have any, None if it can."""
        taken = dict((other.listed, other) for other in self.here
                     if other is not twin and other.identity != member.identity)
        free = [name for name in names if name not in taken]
        member.listed = free[0] if free else None
        if free and is_address(free[-1]) and free[0] != free[-1]:
            self.hosts.merge(free[0], free[-1])
        if names and not free and not self.more:
            return 'another client came as %s: %s' % (names[0], taken[names[0]])
        return NO_PLACE if self.begun and len(self._here) - bool(twin) >= self.most else None

    def twin(self, member):
        """The client that is here for the same output, or from the same host; None without one.

        Not from the same host by the loopback interface: there several clients are for trying it out.
        """
        twin = self._identities.get(member.who)
        if not twin and member.host is not None and not member.loopback:
            twin = self._identities.get(member.identity)
        return twin if twin in self._here else None

    def admit(self, member, now=0.0, twin=None):
        """A client has a place, that of its twin if it has one; returns how many are here now."""
        if twin:
            self.condemn(twin, 'replaced by a later client of the same host')
        if self.begun:
            member.late = now - (now if self.began is None else self.began)
            self._take_back(member)
            self._forget()
            self.everyone.append(member)
            self._came.add(member.listed)
        self._here.append(member)       # before the twin leaves, lest nobody be here meanwhile
        for name in member.names:
            self._identities[name] = member
        if twin:
            self.leave(twin)
        return len(self._here)

    def awaits(self, member):
        """Whether a member was set aside when it was here before."""
        return any(self._same(member, other) for other in list(self.away))

    @staticmethod
    def _same(member, other):
        """Whether a member is another one that was here before."""
        return bool(member and (member.who and other.who == member.who or
                                other.identity == member.identity and not member.loopback))

    def _take_back(self, member):
        """Who is back is one with what it was before."""
        for other in self.everyone:
            if self._same(member, other) and other.outcome != 'complete' and (other.ended or other.sentence):
                member.returns(other)
                self.away.discard(other)
                self.everyone.remove(other)
                return

    def _forget(self):
        """Of very many who have left, forget the first."""
        gone = [member for member in self.everyone if member.ended] if len(self.everyone) > self.MOST_GONE else []
        for member in gone[:len(self.everyone) - self.MOST_GONE]:
            self.everyone.remove(member)
            self.forgotten += 1

    def turn_away(self, member):
        """A client that was just admitted has no place after all."""
        self.leave(member)
        if member in self.everyone:
            self.everyone.remove(member)

    def leave(self, member):
        """A client is not here any more; returns whether it was."""
        try:
            self._here.remove(member)
        except ValueError:
            return False
        if member.outcome == 'complete':
            self.served += 1
            self._has.add(member.listed)
            self.away.discard(member)
        for name in member.names:
            if self._identities.get(name) is member:
                del self._identities[name]
        return True

    def begin(self, now):
        """Start if it is time to, with those who are here; returns whether it has begun."""
        here = len(self._here)
        late = self.start_by is not None and now > self.start_by and here >= self.enough
        if not self.begun and (late or here and not self.missing or here and (self.hurry or self.renewing)):
            self.began = now
            self._count()
        return self.begun

    def close(self):
        """If nobody is here, nobody can come any more; returns whether that is so."""
        self.closed = True              # first: who is admitted meanwhile sees it, or is seen
        if self._here:
            self.closed = False
        return self.closed

    def end(self):
        """Nobody can come any more, be it that it has not begun."""
        self.closing = True
        if not self.begun:
            self._count()

    def _count(self):
        """Who is here now is who it is about."""
        self.everyone = self.here
        self._came = set(member.listed for member in self.everyone)
        self.begun = True               # last: other threads look at it


class Cohort(object):
    """Clients that hold the same of the image: one, or all that were here at the start.

    held        ranges that they hold, or that are under way to them
    members     a set that is never changed, but replaced
    seek        whether they take rounds in any order, or only the next one
    aside       whether they are brought nothing until nobody else lacks anything
    waits       whether they wait for that, or for the next pass
    """

    def __init__(self, held, seek, aside):
        self.held, self.seek, self.aside, self.waits = held, seek, aside, False
        self.members = frozenset()

    def wants(self, place):
        """The first byte from a place in the image on that they can take; UNLIMITED if they can take none."""
        if self.seek:
            return self.held.gap(place)
        return self.held.prefix if place <= self.held.prefix else UNLIMITED


class Underway(object):
    """A round between its announcement and the last client's DONE, as the Course knows it."""

    def __init__(self, round, image_pass):      # pylint: disable=redefined-builtin
        self.round, self.image_pass = round, image_pass
        self.ready = False              # all who listen are
        self.sent = False               # by multicast
        self.steps = 1                  # that are not complete
        self.heard = False              # all have answered once
        self.tells = True               # of the lines of those who are brought to now
        self.requests = {}              # member -> Request, of what it still asks for
        self.passes = 0                 # of coded repair


class Sending(object):
    """What to multicast next: packets of a `buffer` up to index `last`, at a Speed.

    underway    the round that it is, or is a repair for
    """

    def __init__(self, underway, buffer, last, speed=None):
        self.underway, self.buffer, self.last, self.speed = underway, buffer, last, speed


class Course(object):
    """The way of an image through its rounds: what the server does next, and why.

    It has no socket, no thread and no clock.  It is told what happens (filled, complete, sent),
    asked what to multicast (next), and its `hands` do what it decides:

        now()                       seconds on the monotonic clock
        fill(base, limit, place)    begin to fill a buffer from a place in the image, then call filled()
        digest(part) -> bytes       of the image through that part
        do(Step)                    have the TCP servers do it; complete() is called when they have
        release(Buffer)             it is not needed any more
        leave_room(bytes)           so much goes by TCP on the same line
        trouble() -> text or None   why packets could not be sent since the last call

    It goes through the image in passes: each part of it is brought, as a round, to those who lack it,
    its audience.  The first pass cuts the image into its parts.  When somebody lacks some at its
    end there is another pass, through these parts only, and so on.
    """

    FIRST_ROUND = 64                    # packets: the first are likeliest to be lost
    LONGEST_ROUND = 0.25                # seconds
    UNTOLD = 64                         # packets to have under way before any answer, while the rate is sought
    PASSES = 3                          # of coded repair in a round
    WORTH_CODING = 16                   # packets by TCP are no trouble
    SILENT = 2                          # rounds of which nobody hears anything, until we only probe:
    PROBE = 16                          # with so many packets
    PATIENCE = 1.0                      # seconds without multicast, until it is said
    ENDURANCE = 0.5                     # seconds below --min-rate, until who alone is the reason is set aside,
    LAST_ENDURANCE = 10.0               # or dropped, where what it lacks is gone then
    RETURN = STALL                      # seconds for who was set aside to come back, when nobody else is here
    ENOUGH_LACKED = 2                   # times the image, that who holds it may lack after all,
    MOST_LACKS = 1000                   # and so many times in each of these
    SETTLED = 3                         # rounds without a slower rate, until it is worth a line
    WELL_BELOW = 0.8                    # of a rate: more than what a rate wavers by
    SILENCE = 2.0                       # seconds in which a client at work says what it does
    HOLDUP = 2.0                        # seconds, of which who takes more than half is named
    HOLDUP_WORDS = 10.0                 # seconds between two such lines
    LOOK_EVERY = 0.1                    # seconds
    FIRST_SEQ = 0

    def __init__(self, hands, roster, dialect, payload, capacity, rate='auto', min_rate=0,
                 unicast=False, repair_salt=0, farewell=None, allow_empty=False, chain=None, linger=0, size=None):
        """payload: bytes in a packet; capacity: packets in a round; rate: bit/s
        or `auto`; min_rate: bit/s; unicast: do not multicast; farewell(): the last BYE;
        chain: a Chain, where there may be one; linger: seconds to wait for others when all who are here
        have everything, UNLIMITED: be there how many may; size: bytes of the image, if that is known."""
        self.hands, self.roster, self.dialect = hands, roster, dialect
        self.payload, self.capacity = payload, capacity
        self.control = RateControl() if rate == 'auto' else None
        self._rate = rate
        self.min_rate = min_rate
        self.unicast, self.chain = unicast, chain
        self.window = dialect.window    # rounds under way at the most
        self.multicasting = not unicast
        self.linger = linger
        self.over = False               # nobody is left to serve, or waited for
        self.deserted = True            # the last who left lacked something
        self.size = size
        self.image_pass = 1             # through the image, from 1,
        self.pass_size = size           # bytes in it, if that is known,
        self.delivered = 0              # and of these in rounds that are through
        self.cuts = []                  # where each part of the image ends that was read, bytes
        self.limit = self.FIRST_ROUND   # packets in the next buffer
        self.rounds = 0
        self.repair_number = 0
        self.data = self.sent_packets = self.coded = self.by_tcp = 0        # packets
        self.lost = 0                   # packets, of each round's worst client
        self._base = self.FIRST_SEQ
        self._cohorts = []              # of those who lack something
        self._cohort = {}               # member -> its Cohort
        self._finished = set()          # members that get no more rounds
        self._part = 0                  # of the image, that was filled last
        self._place = 0                 # in the image, from where on to look for what is lacking
        self.pass_began = self._alone_since = None             # seconds
        self._repair_salt = repair_salt
        self._farewell, self._allow_empty = farewell, allow_empty
        self._underway = collections.deque()
        self._full = None               # a buffer that waits for room in the window
        self._started = self._filling = self._ended = False
        self._passes = collections.deque()          # Sendings of coded repair
        self._work = collections.deque()            # what takes long, as generators
        self._answered = 0              # packets of rounds that all have answered for
        self._last_heard = None         # when a client last got any multicast
        self._silent = 0                # rounds in a row of which nobody heard anything
        self._warned = False            # that none gets any
        self._settling = False          # the chain did, at the last look
        self._next_look = 0.0
        self._brake = None              # the client that alone keeps the rate down
        self._brake_rate = float('inf')  # bit/s; the rate when that was seen
        self._settled = 0               # rounds at a known line since the rate last fell
        self._held_by = None            # (client, since when) below --min-rate
        self._line_of = None            # the same, of who alone has a line that is slower
        self._slowest = UNLIMITED       # bit/s, of who was set aside,
        self._slow_pass = None          # and the pass in which they take part, while it is yet to begin
        self._idle_since = None         # when there was nothing to multicast, while there is not
        self._through_at = None         # when the last round was through
        self._sending = None            # what is being multicast
        self._alone = {}                # client -> seconds waited for it alone since then
        self._lately = {}               # the same of the last rounds
        self._lately_since = None
        self._next_holdup = 0.0         # when one may be named again

    rate = property(lambda self: self.control.rate if self.control else self._rate)
    idle = property(lambda self: not self._underway)
    brought = property(lambda self: self.delivered if self.image_pass == 1 else self._end)     # bytes of the image
    chained = property(lambda self: bool(self.chain and self.chain.links))

    # ---- what happens

    def begin(self):
        """Clients are yet to come: begin to fill the first buffer."""
        self._base &= self.dialect.seqs
        self._fill()

    def start(self):
        """All clients are here: announce what there is."""
        self._started, now = True, self.hands.now()
        self._through_at = self.pass_began = now
        self._join([member for member in self.roster.everyone if self.roster.is_here(member)], now)

    def filled(self, buffer):
        """The buffer is full, or the image has ended with it."""
        self._filling, self._full = False, buffer
        if self._part == len(self.cuts):
            self._ended = buffer.ended
            if buffer.count:
                self.cuts.append(self._place + buffer.size)
        if self._started:
            self._announce()

    def complete(self, step, answers):
        """The TCP servers have done a step, and this came in.  Raises Failure."""
        self._note_waits(step, answers)
        self.by_tcp += answers.by_tcp
        if step.kind == 'finish':
            return
        for underway in self._underway:
            if underway.round is step.round:
                break
        else:
            return
        underway.steps -= 1
        if step.kind == 'announce':
            underway.ready = True
            if not step.round.buffer.count:
                self._check_empty()
                self._finish(frozenset(self._cohort), step.round)
            return
        if step.kind == 'sent' and not underway.heard:
            underway.heard = True
            self._answered += step.round.multicast
            self._learn(step.round, answers, underway.tells)
        underway.requests.update(answers.requests)
        if not underway.steps:
            self._go_on(underway)

    def sent(self, sending):
        """What next() returned was multicast."""
        underway, self._sending = sending.underway, None
        if sending.buffer is underway.round.buffer:             # else the step was counted with its pass
            underway.steps += 1
            underway.sent, underway.round.multicast = True, sending.last
            underway.round.digest = self.hands.digest(underway.round.part)
            self.sent_packets += sending.last
        self.hands.do(Step('sent', underway.round))
        self._announce()

    def next(self):
        """The Sending that is due; None if there is none."""
        sending = self._sending = self._next_sending()
        now = self.hands.now()
        if sending:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        return sending

    def _next_sending(self):
        if self._passes:
            sending = self._passes.popleft()
            sending.speed = self._even()
            return sending
        unanswered = 0
        for underway in self._underway:
            if underway.sent:
                unanswered += 0 if underway.heard else underway.round.multicast
                continue
            buffer = underway.round.buffer
            if not underway.ready or not buffer.count:
                return None
            if underway.image_pass == self._slow_pass:
                if underway is not self._underway[0]:
                    return None         # those before are for others
                self._slow_pass = None
                self._seek_rate(self._slowest)
            if self.chain and self.chain.settling(self.hands.now()):
                return None
            count = 0 if self.unicast else buffer.count if self.multicasting else min(buffer.count, self.PROBE)
            if (self.control and self.control.line is None and unanswered
                    and unanswered + count > self.UNTOLD + 2 * self._answered):
                return None
            underway.round.speed = self._speed(underway.round, count)
            return Sending(underway, buffer, count, underway.round.speed)
        return None

    def _speed(self, _round, count):
        """The Speed at which to send so many packets of a round."""
        if not self.control:
            return self._even()
        return self.control.speed(self.hands.now(), Round.head_of(count)[1] and self.multicasting)

    def _even(self):
        """The Speed of what tells nothing."""
        return Speed(self.rate, self.rate, False, None, self.control.burst if self.control else Pacer.LARGE)

    # ---- the chain

    @property
    def _chains(self):
        """Whether there are rounds to come that a chain may be for."""
        return self.chain and (self._cohorts or not all(underway.sent for underway in self._underway))

    def look(self, now):
        """Time passes; returns whether there may be something to multicast that was not before, or it is over."""
        if now < self._next_look:
            return False
        self._next_look = now + self.LOOK_EVERY
        self._look_at_line(now)
        self._look_for_the_end(now)
        self.roster.passing = self.image_pass, self._left(now)
        if not self._chains or not self._started:
            return self.over
        self.chain.look(now)
        self._publish_chain()
        settling = self.chain.settling(now)
        settled, self._settling = self._settling and not settling, settling
        return settled or self.over

    def _publish_chain(self, number=None):
        """Tell the clients what is new: it is for this round, or for the first of which they were not told that it was sent."""
        if not self.chain:
            return
        if number is None:
            numbers = [underway.round.number for underway in self._underway if not underway.sent]
            number = min(numbers) if numbers else self.rounds
        messages = self.chain.changes(number)
        if messages:
            self.hands.do(Step('chain', messages=messages))

    # ---- who lacks what

    def hear(self):
        """Take the news of the roster: who has come or left, what clients lack, and what they say of their neighbours."""
        now = self.hands.now()
        while self.roster.news:
            what, member, more = self.roster.news.popleft()
            getattr(self, '_hear_' + what)(member, more, now)
        self._publish_chain()

    def _hear_here(self, member, _more, now):
        if self._started and member not in self._cohort and member not in self._finished:
            self._join([member], now)

    def _hear_left(self, member, _more, now):
        if self._chains:
            self.chain.leave(member, now)
        if member not in self._cohort and member not in self._finished:
            return
        self.deserted = member.outcome != 'complete'
        member.lacks = self.lacking(member) if self.deserted else 0
        self._finished.discard(member)
        self._part_from(member)
        if member is self._brake:
            self._seek_rate(max(self.rate, self.min_rate))
        if member.window < self.dialect.window:
            self.window = min([self.dialect.window] + [other.window for other in self._cohort])
        self._look_for_the_end(now)
        if self._started:
            self._announce()

    def _hear_relay(self, member, said, now):
        if self.chain:
            self.chain.heard(member, said, now, self._chains)

    def _hear_lacks(self, member, lacks, now):
        cohort = self._cohort.get(member)
        if self._started and not cohort and member not in self._finished:
            return                      # it has left
        held = Held(cohort.held if cohort else [(0, self._end)] if self._started else member.have)
        for start, stop in lacks:
            held.remove(start, stop)
        if not self._started:
            member.have = held
            return
        self._finished.discard(member)
        self._part_from(member)
        member.lacked += max(lacks.size, self._end // self.MOST_LACKS)
        if not self.roster.again:
            self._condemn(member, 'it lacks what it had, and that cannot be read again')
        elif member.lacked > self.ENOUGH_LACKED * max(self._end, self.size or 0):
            self._condemn(member, 'it lacks what it had, again and again')
        tell('lacks', member=member, size=lacks.size)
        self._add([member], held if member.seek else Held([(0, held.prefix)]), member.seek, member.aside)
        self._announce()

    def lacking(self, member):
        """Bytes of the image that a member lacks; None if its size is not known."""
        cohort, size = self._cohort.get(member), self._end if self._ended else self.size
        if size is None:
            return None
        waits = sum(underway.round.buffer.size for underway in self._underway if underway.round.number in member.rounds)
        return max(0, size - cohort.held.size if cohort else 0) + waits

    def _join(self, members, now):
        """They take part from the next round on."""
        alike = {}
        for member in members:
            alike.setdefault((tuple(member.have), member.seek, member.aside), []).append(member)
        for (ranges, seek, aside), those in alike.items():
            held = Held(ranges)
            self._add(those, held if seek else Held([(0, held.prefix)]), seek, aside)
        for member in members:
            if member.back:
                tell('member_back', member=member, lacks=self.lacking(member))
            elif member.late is not None:
                tell('member_late', member=member, lacks=self.lacking(member))
        self.window = min([self.window] + [member.window for member in members])
        self._alone_since = None
        if self.chain and self.unicast:
            self.chain.build(members, now, wait=not self.rounds)
            self._publish_chain()
        self._announce()

    def _add(self, members, held, seek, aside):
        """They are some of the Cohort that holds just that."""
        for cohort in self._cohorts:
            if cohort.seek == seek and cohort.aside == aside and cohort.held == held:
                break
        else:
            cohort = Cohort(held, seek, aside)
            self._cohorts.append(cohort)
        cohort.members = cohort.members.union(members)
        cohort.waits = aside or cohort.wants(self._place) == UNLIMITED
        for member in members:
            self._cohort[member], member.waits = cohort, cohort.waits

    def _part_from(self, member):
        """A member is in no Cohort any more."""
        cohort = self._cohort.pop(member, None)
        if cohort:
            cohort.members = cohort.members.difference((member,))
            if not cohort.members:
                self._cohorts.remove(cohort)

    @property
    def _end(self):
        """Bytes of the image that were read."""
        return self.cuts[-1] if self.cuts else 0

    def _wanted(self, place):
        """The first byte from a place on that somebody lacks who is not aside; UNLIMITED if nobody lacks any."""
        return min([cohort.wants(place) for cohort in self._cohorts if not cohort.aside] or [UNLIMITED])

    def _next_part(self):
        """Which part to bring next, in ascending order, or in another pass; None if nobody lacks any.

        In the first pass each, as those behind have to be read to be cut.
        """
        if self._started and not self._cohorts:
            return None
        part = bisect.bisect_right(self.cuts, self._wanted(self._place))
        if part == len(self.cuts) and self._ended and self._cohorts:
            self._begin_pass()
            part = bisect.bisect_right(self.cuts, self._wanted(0))
        return part if part < len(self.cuts) or not self._ended else None

    def _begin_pass(self):
        """Go through the image again; those who are aside take part when nobody else lacks anything."""
        if all(cohort.aside for cohort in self._cohorts):
            for cohort in self._cohorts:
                cohort.aside = False
                for member in cohort.members:
                    member.aside = False
            self._slow_pass = self.image_pass + 1
        lacking = Held()
        for cohort in self._cohorts:
            for start, stop in () if cohort.aside else cohort.held.missing(0, self._end):
                lacking.add(start, stop)
        self.image_pass += 1
        self._place, self.delivered, self.pass_size = 0, 0, lacking.size
        self.pass_began = self.hands.now()
        if self.chain:
            self.chain.keep(self.roster.here, self.pass_began)
        tell('pass', number=self.image_pass, size=lacking.size,
             members=[member for cohort in self._cohorts if not cohort.aside for member in cohort.members])

    def _left(self, now):
        """Seconds that the pass may still take; None if that cannot be told."""
        if not self.pass_size or not self.delivered:
            return None
        return (self.pass_size - self.delivered) * (now - self.pass_began) / self.delivered

    def _see_off(self):
        """Who lacks nothing hears the last word when it has what is under way."""
        if not self._ended or self.dialect.ends:
            return
        self._check_empty()
        for cohort in self._cohorts[:]:
            if cohort.held.covers(0, self._end):
                self._finish(cohort.members, None)

    def _finish(self, members, last):
        """They get no more rounds."""
        for member in members:
            del self._cohort[member]
        self._cohorts = [cohort for cohort in self._cohorts if not cohort.members <= members]
        self._finished.update(members)
        self._say_farewell(members, last)

    def _say_farewell(self, members, last):
        self.hands.do(Step('finish', last, message=self._farewell(), audience=members))

    def _look_for_the_end(self, now):
        """Whether nobody is left to serve, and nobody is waited for."""
        roster = self.roster
        if self._cohort or self._finished or self.over:
            return
        if self._alone_since is None:
            self._alone_since = now
            if roster.away:
                tell('waiting_for', members=list(roster.away))
        if roster.away and now - self._alone_since < self.RETURN:
            return
        roster.away.clear()             # they are not waited for any more
        waited = self._started and (now - self._alone_since >= self.linger
                                    or roster.all_served and not roster.more)
        if waited or roster.closing or roster.renewing:
            self.over = roster.close()

    # ---- rounds

    def _fill(self):
        if self._filling or self._full:
            return
        part = self._next_part()
        if part is None:
            return
        self._part, self._filling = part, True
        self._place = self.cuts[part - 1] if part else 0
        if part < len(self.cuts):
            count = -(-(self.cuts[part] - self._place) // self.payload)
            if count > self.dialect.seqs + 1 - self._base:
                self._base = 0          # as if there had been another round before
                self.rounds += 1
        else:
            count = self._grow()
        self.hands.fill(self._base, count, self._place)

    def _grow(self):
        """How many packets the next part has, which nobody has read yet."""
        room = self.dialect.seqs + 1 - self._base
        unwanted = int(min(self._wanted(self._place) - self._place, self.capacity * self.payload)) // self.payload
        if self._cohorts and unwanted > self.limit:     # it is read, but not sent: what is sent first is to be short
            return min(unwanted, room)
        by_chain = self.chain and not self.multicasting         # which has no rate to be found out
        least = self.capacity // 4 if by_chain else self.FIRST_ROUND
        count = min(max(self.limit, least), self.capacity, room)
        longest = (self.capacity if by_chain else
                   self.rate * self.LONGEST_ROUND / 8 / (self.payload + PACKET.size))
        self.limit = int(max(self.FIRST_ROUND, min(2 * count, longest, self.capacity)))
        return count

    def _announce(self):
        """Announce the buffer that is full, if the window has room for it."""
        if self._full and len(self._underway) < self.window and not self.over and not self._has_time():
            buffer, self._full = self._full, None
            self._begin_round(buffer)
        if not self._full:
            self._see_off()
        self._fill()

    def _has_time(self):
        """Whether a round may wait until another one is sent, so that MANY clients are told of both in one piece."""
        unsent = [underway for underway in self._underway if not underway.sent]
        return len(unsent) > 1 and unsent[0].ready and len(unsent[0].round.audience) >= MANY

    def _begin_round(self, buffer):
        """Announce it to those who lack it."""
        start, self._place = self._place, self._place + buffer.size
        audience = self._audience(start, self._place)
        if not audience and buffer.count or not buffer.count and not self.dialect.ends:
            self.delivered += buffer.size
            if buffer.count:
                self.hands.digest(self._part)       # until then it must stay as it is
            self.hands.release(buffer)
            return
        underway = Underway(Round(self.rounds, buffer, start, self._part, audience), self.image_pass)
        self._underway.append(underway)
        self.rounds += 1
        self.data += buffer.count
        self._base = (self._base + buffer.count) & self.dialect.seqs
        if self._ended and buffer.count and self.dialect.ends:
            self._full = self._end_of(buffer)
        self.hands.do(Step('announce', underway.round))
        if self.chain:
            self.chain.among(audience, self.hands.now())
            self._publish_chain(underway.round.number)

    def _audience(self, start, stop):
        """Those who lack some of a part of the image; from now on it is under way to them."""
        if start == stop:               # the end, for all
            return frozenset(self._cohort)
        cohorts = [cohort for cohort in self._cohorts if not cohort.aside and cohort.wants(start) < stop]
        for cohort in cohorts:
            cohort.held.add(start, stop)
            if cohort.waits:
                cohort.waits = False
                for member in cohort.members:
                    member.waits = False
        if len(cohorts) == 1:
            return cohorts[0].members
        return frozenset().union(*[cohort.members for cohort in cohorts])

    def _end_of(self, buffer):
        """The round of 0 packets that ends the image in the base protocol."""
        end = Buffer(buffer.payload, 0)
        end.start(self._base, 0, 0)
        return end

    def _check_empty(self):
        if not self.cuts and not self._allow_empty:
            raise Failure(EMPTY)

    def _go_on(self, underway):
        """All have answered: repair what is missing, or be through with the round."""
        requests, underway.requests = underway.requests, {}
        if requests:
            here = set(self.roster.here)
            requests = dict(item for item in requests.items() if item[0] in here)
        if not requests:
            return self._through(underway)
        self._work.append(self._repair(underway, requests))
        self.work()

    busy = property(lambda self: bool(self._work))

    def work(self):
        """Go on with what takes long, for some milliseconds."""
        if self._work and next(self._work[0], self) is self:
            self._work.popleft()

    def _repair(self, underway, requests):
        """Bring to members what they asked for; yields while that is still to be worked out."""
        buffer, number = underway.round.buffer, underway.round.number
        groups, coded_for, message = [], (), b''
        if underway.passes < self.PASSES:
            for groups, coded_for in self.plan(buffer, requests):
                yield
        by_tcp = [request.count for member, request in requests.items() if member not in coded_for]
        self.by_tcp += sum(by_tcp)
        partly = [count for count in by_tcp if count < buffer.count]
        if partly and self.multicasting:
            self.hands.leave_room(max(partly) * buffer.slot)
        if groups:
            first = self.repair_number
            if first + len(groups) + MAX_PACKETS > REPAIR_BIT:
                first = 0
            for coded, recipe_count in encode_repair(buffer, groups, first, self._repair_salt):
                yield
            message = self.dialect.again(number, first, recipe_count, len(groups))
            self.repair_number = first + coded.count
            self.coded += coded.count
            underway.passes += 1
            underway.steps += 1         # until what the pass brought is answered for
            self._passes.append(Sending(underway, coded, coded.count))
        underway.steps += 1
        self.hands.do(Step('repair', underway.round, coded=coded_for, message=message))

    def _through(self, underway):
        """All who are here have the round."""
        self._underway.remove(underway)
        self.hands.release(underway.round.buffer)
        if underway.image_pass == self.image_pass:
            self.delivered += underway.round.buffer.size
        now = self.hands.now()
        self._look_for_holdup(now)
        if self._chains:
            self.chain.through(now - self._through_at, underway.round.number, now)
            self._publish_chain()
        if self.min_rate:
            seconds = max(1e-6, now - self._through_at)
            self._judge(underway.round.buffer.size * 8 / seconds, seconds, now)
        self._alone, self._through_at = {}, now
        self._announce()

    def _note_waits(self, step, answers):
        """Note who alone was waited for while there was nothing to multicast."""
        if len(answers.late) < 2 or self._idle_since is None:
            return
        (paid, last, busy), (before, _, _) = answers.late
        seconds = paid - max(before, self._idle_since)
        if seconds > 0:
            # Who is held up by its output says so after a second.
            cause = ('network' if last in answers.requests or busy in ('following', 'relaying') else
                     'silence' if seconds > self.SILENCE and not busy and self.dialect.talks else 'output')
            self._alone[last] = self._alone.get(last, 0) + seconds
            last.waited[cause] = last.waited.get(cause, 0) + seconds
            self._idle_since = paid

    # ---- what the answers tell

    def _learn(self, done, answers, tells=True):
        """Set the rate, if the round tells of it, and whether to multicast at all, from how it was heard."""
        count = done.multicast
        trouble = self.hands.trouble()
        if trouble:
            tell('multicast_refused', reason=trouble)
        if not count:
            return
        now, silent = self.hands.now(), len(answers.deaf)
        if self._chains:
            self.chain.learn([member for member in self.roster.here if member in done.audience], now)
            self._publish_chain()
        self._look_for_the_deaf(answers, now)
        if answers.hearing:
            self.lost += int(round(max(reception.lost for reception in answers.worst) * count)
                             ) if answers.worst else 0
            self._last_heard = now
        elif self._last_heard is None:
            self._last_heard = now
        self._silent = self._silent + 1 if silent and not answers.hearing else 0
        if self._silent:
            by_chain = self.chained and self.chain.mute
            self.multicasting = self.multicasting and self._silent < self.SILENT and not by_chain
            if now - self._last_heard > self.PATIENCE:
                self.warn_of_silence()
        elif not self.multicasting:
            self.multicasting = True
            if self._warned:
                self._warned = False
                tell('multicast_back')
        elif self.control and answers.worst and done.tail and tells:
            self._set_rate(done, answers, now)

    def _set_rate(self, done, answers, now):
        before, worst, achieved = self.control.rate, answers.worst[0], done.tail
        why = self.control.learn(done.speed, achieved, worst, done.multicast, now,
                                 answers.lost / answers.hearing, answers.hearing)
        if done.head and answers.head:
            why = self.control.learn_head(done.head, answers.head[0], answers.head[1], now) or why
        if worst.lost > RateControl.MOST_MEDIUM and not self.control.line:
            self.limit = min(self.limit, max(self.FIRST_ROUND, done.multicast))     # a longer one would tell no more
        self._settled += self.control.line is not None
        if self.control.rate < before:
            self._look_for_brake(answers.worst)
        if self._brake and self._settled == self.SETTLED and self.control.line:
            tell('brake', member=self._brake, rate=self.control.rate)
        slow = self._brake if self.control.line and self.control.line < self.min_rate else None
        if not slow or not self._line_of or self._line_of[0] is not slow:
            self._line_of = slow and (slow, now)
        if worst.lost > RateControl.MOST_MEDIUM and done.speed.trial:
            worst.member.ignored = True
            tell('hopeless', member=worst.member, share=worst.lost, payload=self.payload)
        if why:
            tell('rate', round=done.number, achieved=achieved, rate=self.control.rate, why=why)

    def warn_of_silence(self):
        """Say that no client hears multicast, once."""
        if not self._warned:
            self._warned = True
            tell('multicast_silent', payload=self.payload, carrier='chain' if self.chained else 'tcp')

    def _look_for_the_deaf(self, answers, now):
        """Name the clients that hear no multicast while others do."""
        for member in answers.deaf if answers.hearing else ():
            since = member.deaf_since   # None: it has heard some of another round meanwhile
            if since is not None and now - since > self.PATIENCE and not member.deaf_told:
                member.deaf_told = True
                carrier = 'upstream' if self.chained and member in self.chain.links else 'tcp'
                tell('member_deaf', member=member, seconds=now - since, payload=self.payload, carrier=carrier)

    # ---- the slowest

    def _look_for_brake(self, worst):
        """Whether the rate went down for one client alone."""
        brake = None
        if len(worst) > 1 and 1 - worst[1].ratio < (1 - worst[0].ratio) / 4:
            brake = worst[0].member
        shared = len(worst) > 1 and 1 - worst[1].ratio > (1 - worst[0].ratio) / 2
        # Another one that was slow once, at the rate that the first one takes, is no brake.
        other = brake and brake is not self._brake and self.control.rate < self.WELL_BELOW * self._brake_rate
        if shared or other:
            self._brake, self._settled = brake, 0
            self._brake_rate = self.control.rate if brake else float('inf')

    def _look_for_holdup(self, now):
        """Name who took more than half of the time of the last rounds."""
        if self._lately_since is None:
            self._lately_since = now
        for member, seconds in self._alone.items():
            self._lately[member] = self._lately.get(member, 0) + seconds
        total = now - self._lately_since
        if total < self.HOLDUP:
            return
        for member, seconds in self._lately.items():
            if seconds > total / 2 and now >= self._next_holdup:
                self._next_holdup = now + self.HOLDUP_WORDS
                cause = max(member.waited, key=member.waited.get)
                tell('holdup', member=member, share=seconds / total, cause=cause)
        self._lately, self._lately_since = {}, now

    def _judge(self, goodput, seconds, now):
        """Set the client aside that alone has held the others below --min-rate."""
        culprit = self._brake
        for member in self._alone:
            if self._alone[member] > seconds / 2:
                culprit = member
        endurance = self.ENDURANCE if self.roster.again else self.LAST_ENDURANCE
        if goodput >= self.min_rate:
            self._held_by = None
        elif not self._others(culprit):
            pass                        # it was nobody alone, this time
        elif not self._held_by or self._held_by[0] is not culprit:
            self._held_by = culprit, now - seconds
        elif now - self._held_by[1] >= endurance:
            self._held_by = None
            if self.rate < self.min_rate:
                self._brake, self._brake_rate = culprit, self.rate
            if self._chains and self.chain.relieve(culprit, now):
                self._publish_chain()   # it gets its packets from another one now
            elif self.roster.again:
                self._set_aside(culprit, goodput)
            else:
                self._condemn(culprit, 'alone it kept the transfer below %s, now at %s'
                              % (bits(self.min_rate), bits(goodput)))

    def _look_at_line(self, now):
        """Set the client aside whose line alone is known to be slower than --min-rate, be it in a long round."""
        member, since = self._line_of or (None, now)
        if member and now - since >= self.ENDURANCE and self.roster.again and self._others(member):
            self._line_of = None
            self._set_aside(member, self.control.line)

    def _others(self, culprit):
        """Whether a member keeps others waiting: it is brought to, and so is somebody else."""
        cohort = self._cohort.get(culprit)
        served = [other for other in self._cohorts if not other.aside]
        return bool(cohort) and any(len(other.members) > (other is cohort) for other in served)

    def _set_aside(self, member, goodput):
        """Nobody waits for it any more: it comes again, and goes on when nobody else lacks anything."""
        member.aside = True
        self._slowest = min(self._slowest, goodput)
        tell('aside', member=member, least=self.min_rate, rate=goodput)
        self._condemn(member, 'alone it kept the transfer below %s, at %s, so it gets the rest after the others'
                      % (bits(self.min_rate), bits(goodput)), away=True)

    def _condemn(self, member, why, away=False):
        """Have its thread drop a member, at once."""
        self.roster.condemn(member, why, away)
        self.hands.do(Step('sentences'))

    def _seek_rate(self, begin):
        """Others are to be brought to, so what their lines carry is to be found out; begin: bit/s at which to begin.

        That holds at once, also for the rest of what is being multicast; rounds of before tell nothing of it.
        """
        self._brake, self._brake_rate, self._line_of = None, float('inf'), None
        if not self.control:
            return
        self.control = RateControl()
        self.control.rate = min(max(begin, RateControl.LOWEST), RateControl.START)
        self._answered, self.limit = 0, self.FIRST_ROUND
        for underway in self._underway:
            underway.tells = underway.round.speed is None
        if self._sending:
            self._sending.speed = self._even()
            if not self._sending.underway.sent:
                self._sending.underway.round.speed = self._sending.speed

    # ---- repair

    def plan(self, buffer, requests):
        """What to repair by multicast, if that is cheaper than TCP.

        requests: member -> Request.  Yields groups of places, and the members that they are for, as combine() does.
        """
        asked = dict((member, request.gaps) for member, request in requests.items()
                     if request.count <= buffer.count // 2)
        by_tcp = sum(requests[member].count for member in asked)
        if not self.dialect.codes or not self.multicasting or by_tcp <= self.WORTH_CODING:
            return
        for groups in combine(list(asked.values()), most_members(buffer.payload)):
            yield groups, asked
        size = 2 * len(groups) + 2 * sum(len(members) for members in groups)
        by_multicast = len(groups) + 1 + size // buffer.payload
        if by_multicast >= by_tcp and len(asked) > 1:
            yield [], ()


# A stretch of a rehearsal: its name in the report, the rate in bit/s, and for how long, seconds.
Stage = collections.namedtuple('Stage', 'name rate seconds')


class Rehearsal(Course):
    """The Course of an image that nobody writes: how is multicast heard, at which rates, and for how long?

    It goes from one stage to the next as long as somebody hears most of it.  The last one is slow,
    and lasts until the end: it shows whether multicast is cut off after a while.

    Before each round of the first stage come datagrams of other sizes, as if for repair: which of them pass?

    Meanwhile there is a chain of which everybody is the upstream of somebody for once, from a round on that never comes.
    """

    STAGES = (Stage('10M', 10e6, 2.0), Stage('100M', 100e6, 2.0), Stage('1G', 1e9, 0.5),
              Stage('max', UNLIMITED, 0.25), Stage('hold', 1e6, UNLIMITED))
    SENSE = 0.5                         # share that somebody must hear for a faster stage to make sense
    WELL = 0.9                          # share that all must hear of the first stage
    STOPPED = 2                         # rounds in a row of which who heard some before hears nothing
    NEVER = 1 << 30                     # rounds from now on
    SIZES = (576, 1280, 1400, 1500, 4000, 9000)           # bytes, which of them pass

    def __init__(self, seconds, mtu, *arguments):
        """seconds: from the first round to the end; mtu: of the interface, bytes; arguments: as a Course takes them."""
        Course.__init__(self, *arguments)
        self._samples = [self._sample(size) for size in self.SIZES if size <= mtu]
        self._probed, self._due = None, []          # the round that they come before; and those that are still to come
        self._seconds = seconds
        self._began = None              # when the first round was sent, as all were ready for it, seconds
        self._stage = 0
        self._stages = {}               # part of the image -> its Stage
        self._stage_began = None        # seconds
        self.control, self._rate = None, self.STAGES[0].rate
        self._relays = Chain(self.dialect)
        self._trials = collections.deque([self._build, self._relays.turn, self._relays.dissolve])

    def enough(self):
        """Whether the image is to end."""
        return self._began is not None and self.hands.now() - self._began >= self._seconds

    def sent(self, sending):
        """What next() returned was multicast."""
        if self._began is None:
            self._began = self.hands.now()
        if sending.buffer is sending.underway.round.buffer:
            Course.sent(self, sending)

    # ---- packets of other sizes

    def _sample(self, size):
        """A Buffer with one repair datagram, which makes a packet of so many bytes."""
        sample = Buffer(payload_for(size), 1, self._repair_salt - REPAIR_BIT)
        sample.start(REPAIR_BIT, 0, 0)
        sample.add(b'\0' * sample.payload)
        return sample

    def _next_sending(self):
        sending = Course._next_sending(self)
        if not sending or self._stages[sending.underway.round.part] is not self.STAGES[0]:
            return sending
        if self._probed is not sending.underway:
            self._probed, self._due = sending.underway, self._samples[:]
        return Sending(sending.underway, self._due.pop(), 1, sending.speed) if self._due else sending

    # ---- the chain

    def look(self, now):
        """As a Course does."""
        due, news = now >= self._next_look, Course.look(self, now)
        if due and self._began is not None and not self.enough():
            self._relays.look(now)
            if self._trials and self._relays.tried(now):
                self._trials.popleft()(now)
            self._publish_chain()
        return news

    def _build(self, now):
        self._relays.build(self.roster.here, now, wait=False)

    def _publish_chain(self, _number=None):
        messages = self._relays.changes((self.rounds + self.NEVER) & MASK)
        if messages:
            self.hands.do(Step('chain', messages=messages))

    # At the end all leave, and who has left can be connected to no more: that tells nothing.

    def _hear_left(self, member, more, now):
        if not self.enough():
            self._relays.leave(member, now)
        Course._hear_left(self, member, more, now)

    def _hear_relay(self, member, said, now):
        if not self.enough():
            self._relays.heard(member, said, now)

    # ---- the stages

    def _grow(self):
        now = self.hands.now()
        if self._began is not None:
            self._stage_began = self._stage_began or now
            if now - self._stage_began >= self.STAGES[self._stage].seconds:
                self._stage = self._stage + 1 if self._makes_sense() else len(self.STAGES) - 1
                self._stage_began, self.limit = now, self.FIRST_ROUND
                self._rate = self.STAGES[self._stage].rate
        self._stages[self._part] = self.STAGES[self._stage]
        return Course._grow(self)

    def _makes_sense(self):
        name = self.STAGES[self._stage].name
        shares = [self.share(member, name) for member in self.roster.here]
        return self.multicasting and max([share for share in shares if share is not None] or [1]) >= self.SENSE

    def _speed(self, wanted, _count):
        rate = self._stages[wanted.part].rate
        return Speed(rate, rate, False, None)

    def plan(self, buffer, requests):
        """All repair is by TCP, lest it be multicast at the rate of another stage."""
        return iter(())

    def _learn(self, done, answers, tells=True):
        Course._learn(self, done, answers, tells)
        name = self._stages[done.part].name
        for member, heard in done.heard.items():
            before = member.tally.get(name, (0, 0))
            member.tally[name] = before[0] + done.multicast, before[1] + heard

    @staticmethod
    def share(member, name):
        """Which share of a stage's packets a member heard; None: there were none."""
        sent, heard = member.tally.get(name, (0, 0))
        return heard / sent if sent else None

    def _wrong(self, member):
        """What is not well with a member: a key of ADVICE; None: nothing."""
        if not any(heard for _, heard in member.tally.values()):
            return 'deaf'
        if member.deaf_rounds >= self.STOPPED:
            return 'stopped'
        least = [self.share(member, name) for name in (self.STAGES[0].name, self.STAGES[-1].name)]
        return 'lossy' if min(share for share in least + [1] if share is not None) < self.WELL else None

    def _say_farewell(self, members, last):
        those = {}
        for member in members:
            member.wrong = self._wrong(member)
            those.setdefault(member.wrong, set()).add(member)
        for wrong, alike in those.items():
            message = self._farewell(wrong=wrong)
            self.hands.do(Step('finish', last, message=message, audience=frozenset(alike)))


# ---------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------

DEBUG, INFO, WARNING, ERROR, ASKED = 'debug', 'info', 'warning', 'error', 'asked for'
LEVELS = (DEBUG, INFO, WARNING, ERROR, ASKED)
DIGEST = 'digest'                       # no level: a line for sha256sum -c

# What happens, in words: level, and a template or a function of the facts; None: nothing to say.
WORDS = {
    'bug': (DEBUG, '%(trace)s'),
    'failed': (ERROR, '%(reason)s'),
    'state': (ASKED, '%(text)s'),
    # both ends
    'way_of_sending': (DEBUG, 'sending by %(old)s does not work here (%(reason)s), so by %(new)s'),
    'way_of_receiving': (DEBUG, 'receiving by %(old)s does not work here (%(reason)s), so by %(new)s'),
    'wrong_way': (WARNING, 'sending by %(old)s does not work here (%(reason)s), so by %(new)s'),
    'command_stopped': (WARNING, 'the command is stopped, by signal %(signal)d: %(command)s'),
    'command_awaited': (INFO, 'all the data is through; waiting for the command to end: %(command)s'),
    'removed': (DEBUG, 'removed %(path)s, which a run that was killed had left'),
    'unfinished': (WARNING, 'the image is in place, but %(step)s failed: %(reason)s'),
    # the server
    'server_started': (INFO, 'multicasting from %(interface)s to %(group)s port %(port)d, waiting for '
                       '%(places)s'),
    'unicast_started': (INFO, 'sending by TCP port %(port)d, without multicast, waiting for %(places)s'),
    'only_here': (WARNING, 'only this host hears what is multicast from %(address)s'),
    'transfer_started': (DEBUG, 'sending from the interface with MTU %(mtu)d, %(payload)d bytes a packet, '
                         'by %(way)s'),
    'renewed': (INFO, 'there is another image now: %(name)s, %(size)s'),
    'wind_up': (INFO, 'ending when %(here)s served'),
    'started_without': (INFO, 'starting with %(here)d of %(places)s'),
    'listed_twice': (WARNING, '%(names)s: twice on the list of hosts'),
    'stranger': (INFO, '%(member)s: %(reason)s'),
    'refused': (INFO, '%(member)s: refused, %(reason)s'),
    'unwanted': (INFO, '%(address)s: closed at once, %(reason)s'),
    'member_here': (INFO, '%(member)s is here, %(here)d of %(places)d'),
    'member_late': (INFO, '%(member)s is here, late, and lacks %(lacks)s'),
    'member_back': (INFO, '%(member)s is back, and lacks %(lacks)s'),
    'lacks': (WARNING, '%(member)s does not hold %(size)s that it held, and gets it again'),
    'pass': (INFO, 'pass %(number)d brings %(size)s to %(names)s'),
    'aside': (WARNING, '%(member)s alone kept the transfer below %(least)s, at %(rate)s, so it gets the rest after the '
              'others'),
    'member_left': (WARNING, '%(member)s: %(reason)s'),
    'member_lost': (WARNING, '%(member)s: %(reason)s'),
    'member_served': (INFO, '%(member)s has everything'),
    'member_deaf': (WARNING, '%(member)s hears no multicast for %(seconds).0f s, it gets everything %(carrier)s; '
                    '%(causes)s'),
    'member_hears': (WARNING, '%(member)s hears multicast again, after %(seconds).0f s'),
    'waiting_for': (INFO, 'waiting for %(names)s'),
    'producer_silent': (INFO, 'waiting for what makes the image, which was silent for %(seconds).0f s'),
    'multicast_refused': (WARNING, 'multicast failed at this host: %(reason)s'),
    'multicast_silent': (WARNING, 'no client receives multicast, all is sent %(carrier)s; %(causes)s'),
    'multicast_back': (WARNING, 'multicast gets through now'),
    'chain': (DEBUG, 'the chain is now: %(chain)s'),
    'chain_broken': (DEBUG, '%(follower)s gets nothing from %(upstream)s: %(reason)s'),
    'chain_slow': (INFO, '%(member)s holds up who gets the image from it, so it goes to the end of the chain'),
    'relay_unreachable': (WARNING, '%(follower)s cannot connect to %(upstream)s: %(reason)s; open TCP port %(port)d '
                          'there'),
    'brake': (INFO, '%(member)s alone takes no more than %(rate)s'),
    'holdup': (INFO, '%(member)s holds the others up, %(share)d %% of the time: %(cause)s'),
    'hopeless': (WARNING, '%(member)s loses %(share)d %% at any rate, so the rate is set without it; '
                 '%(causes)s'),
    'rate': (DEBUG, 'round %(round)d: sent at %(achieved)s, rate now %(rate)s (%(why)s)'),
    # the client
    'damaged': (DEBUG, 'round %(round)d: %(count)d packets came damaged, and are asked for again'),
    'connecting': (DEBUG, 'connecting to %(address)s port %(port)d'),
    'no_server_yet': (INFO, 'looking for a server at %(address)s port %(port)d for %(seconds).0f s: '
                      '%(reason)s'),
    'connected': (INFO, 'connected to %(address)s, multicast of group %(group)s to %(local_ip)s'),
    'unicast_connected': (INFO, 'connected to %(address)s, which does not multicast'),
    'receiving': (DEBUG, 'receiving by %(way)s, socket buffer of %(socket_buffer)d bytes; image '
                  '%(name)s, %(size)s bytes'),
    'broken': (WARNING, '%(reason)s; trying for %(seconds).0f s to get on with it'),
    'back': (INFO, 'the server is there again; going on with the %(count)d bytes that are here'),
    'resumed': (INFO, 'going on with %(count)d bytes that an earlier run has left'),
    'doubted': (WARNING, '%(count)d bytes that were here are not as the server has them, and are asked for again'),
    'unjournaled': (WARNING, 'what is written from now on is lost for a later run; cannot write %(path)s: %(reason)s'),
    'unreported': (WARNING, 'cannot write the report %(path)s: %(reason)s'),
    'rehearsal': (INFO, 'this is a rehearsal: no image is written, and no command is started'),
    'tried': (INFO, 'a trial file took %(speed)s/s where the image would be; it is gone again'),
    'untried': (INFO, 'the output is no file, so it was not tried how fast that is written'),
    'hint': (WARNING, '%(text)s'),
    'deaf': (WARNING, 'multicast does not reach this host, everything comes %(carrier)s; %(causes)s'),
    'hears': (WARNING, 'multicast reaches this host again'),
    'forged': (WARNING, 'packets that came by multicast were damaged or forged in %(rounds)d rounds one after the '
               'other, so all that is to come comes by TCP'),
    'relay_stranger': (INFO, '%(address)s: %(reason)s'),
    'falling_back': (WARNING, '%(reason)s; going on by HTTP, with %(url)s'),
    'fallback_waits': (WARNING, 'fallback: %(reason)s; trying again in %(seconds).1f s'),
    'fallback_found': (INFO, 'fallback: %(size)d bytes there, %(count)d of them here'),
    'fallback_anew': (WARNING, 'fallback: %(reason)s; starting over'),
    'server_not_told': (WARNING, 'the image is complete, but the server could not be told: %(reason)s'),
}


def causes(payload):
    """Why multicast of packets with so many bytes of payload may not arrive, in words."""
    jumbo = ', jumbo frames that something on the way does not take (--mtu)'
    return ('usual causes: a switch with IGMP snooping but no querier, a firewall on '
            'the host, the wrong LOCAL_IP' + (jumbo if payload > payload_for(1500) else ''))


# What a rehearsal found wrong with a client, and what to do about it.
ADVICE = {
    'deaf': 'no multicast reaches it: let UDP to the group pass its firewall, see whether its LOCAL_IP is right, and whether '
            'a switch on the way has IGMP snooping but no querier (then give it one, or turn snooping off)',
    'narrow': 'packets of %(size)d bytes do not reach it by multicast, though those of %(packet)d do: see what on the way takes '
              'no larger ones (a tunnel, jumbo frames), or give the server --mtu %(packet)d',
    'stopped': 'multicast reached it, and then no more: a switch on the way has IGMP snooping but no querier; give it one '
               '(on a router, or the switch itself), or turn snooping off',
    'lossy': 'it loses more than a tenth even at low rates: look at its cable and port (errors, half duplex), at Wi-Fi on '
             'the way, and at limits for multicast in the switch (storm control)',
    'unwritable': 'the image cannot be written where its -o points: %(unwritable)s; make room there, or give another FILE',
    'unreachable': 'another client cannot connect to it, so it could not pass the image on where multicast does not reach: let '
                   'TCP to the port of the session pass its firewall',
    'buffer': 'its receive buffer is small, so it may lose what comes fast: run the client as root, or raise net.core.rmem_max '
              '(sysctl)'}
HINTS = ('unreachable', 'buffer')       # what is no reason for a rehearsal to fail


def findings(wrong, facts, payload):
    """What a rehearsal found wrong with a client: [(key, in words)], the worst first.

    wrong: with how it hears multicast; None: nothing; facts: what it told of itself; payload: bytes of a packet's.
    """
    facts = dict(facts, size=packet_of(payload))
    narrow = wrong == 'deaf' and facts.get('packet', facts['size']) < facts['size']
    found = ['narrow' if narrow else wrong] if wrong else []
    if facts.get('unwritable'):
        found.append('unwritable')
    if facts.get('reached') is False:
        found.append('unreachable')
    if facts.get('socket_buffer', AMPLE) < AMPLE:
        found.append('buffer')
    return [(key, ADVICE[key] % facts if key in ADVICE else key) for key in found]


def findings_of(server, member):
    """The findings on a member; none where nothing is rehearsed."""
    if not server.options.rehearsal:
        return []
    return findings(member.wrong, dict(member.figures, reached=member.reached), server.session.payload)


def faults(found):
    """Those findings for which a rehearsal fails."""
    return [finding for finding in found if finding[0] not in HINTS]


# Why somebody keeps the others waiting, and what a client says that it does, in words.
CAUSES = {'output': 'its disk or command', 'network': 'its network', 'silence': 'nothing was heard of it',
          'writing': 'its disk or command', 'receiving': 'its network',
          'verifying': 'reading back what it wrote', 'following': 'the client before it', 'relaying': 'the client behind it'}


# What brings the image where multicast does not, in words.
CARRIERS = {'tcp': 'by TCP', 'chain': 'in a chain from client to client', 'upstream': 'from another client'}


def listed(names, most=8):
    """`a, b and 3 more`."""
    return ', '.join(names[:most]) + (' and %d more' % (len(names) - most) if len(names) > most else '')


def in_words(what, facts):
    """The facts as the template of WORDS wants them."""
    words = dict(facts)
    if 'payload' in words:
        words['causes'] = causes(words['payload'])
    for key in ('rate', 'achieved', 'least'):
        if key in words:
            words[key] = bits(words[key])
    if 'carrier' in words:
        words['carrier'] = CARRIERS[words['carrier']]
    if what == 'wind_up':
        words['here'] = 'those %d who are here are' % words['here'] if words['here'] else 'all are'
    if what in ('pass', 'lacks', 'renewed'):
        words['size'] = amount(words['size'])
    if 'lacks' in words:
        words['lacks'] = 'some' if words['lacks'] is None else amount(words['lacks'])
    if 'share' in words:
        words['share'] = 100 * words['share']
    if 'cause' in words:
        words['cause'] = CAUSES.get(words['cause'], words['cause'])
    if 'members' in words:
        words['names'] = listed([str(member) for member in words['members']])
    if what in ('server_started', 'unicast_started', 'started_without'):
        words['places'] = counted(words['places'], 'client')
    return words


class AtMost(object):
    """Lets few enough lines of a kind into the log; the next one says how many it hid."""

    PERIOD = 10.0                       # seconds

    def __init__(self, most):
        """most: lines in a period."""
        self._most = most
        self._since, self._shown, self._hidden = 0.0, 0, 0

    def __call__(self, line, now):
        """The line as it is to be shown; None if it is one too many."""
        if now - self._since > self.PERIOD:
            self._since, self._shown = now, 0
        self._shown += 1
        if self._shown > self._most:
            self._hidden += 1
            return None
        hidden, self._hidden = self._hidden, 0
        return '(%d more like these) %s' % (hidden, line) if hidden else line


def plain(text):
    """A text as bytes for a terminal or a log: ASCII, whatever is in it."""
    return text.encode('ascii', 'backslashreplace') if isinstance(text, type(u'')) else text


class Screen(object):
    """Standard error: lines, and under them, on a terminal, one that is redrawn.

    Nothing is ever held up by it: a terminal that was stopped, or a pipe that nobody reads,
    costs lines and not the transfer; the next line that gets through says how many.
    """

    PATIENCE = 1.0                      # seconds for a line, as long as the last one got through

    def __init__(self):
        self.terminal = os.isatty(2) and os.environ.get('TERM', 'dumb') != 'dumb'
        self._missed = 0
        self._drawn = ''                # the line that is redrawn

    def width(self):
        """Columns of the terminal: tty_ioctl(4)."""
        try:
            columns = struct.unpack('4H', fcntl.ioctl(2, termios.TIOCGWINSZ, b'\0' * 8))[1]
        except OS_ERRORS:
            columns = 0
        return columns or 80

    def line(self, text):
        """Write a line."""
        if self._missed:
            text += ' (%s could not be written)' % counted(self._missed, 'line')
        if self._write(self._erased() + text + '\n' + self._drawn):
            self._missed = 0
        else:
            self._missed += 1

    def draw(self, text):
        """Have this as the line at the bottom; '' for none."""
        if self.terminal and text != self._drawn and self._write(self._erased() + text, 0):
            self._drawn = text

    def _erased(self):
        return '\r\033[K' if self._drawn else ''

    def _write(self, text, patience=None):
        try:
            poller = select.poll()
            poller.register(2, select.POLLOUT)
            patience = self.PATIENCE if patience is None and not self._missed else 0
            # A pipe that has room at all has room for a page (pipe(7)), so this does not wait.
            if not ready(poller, patience):
                return False
            os.write(2, plain(text)[:4096])
        except OS_ERRORS:
            pass                        # it may be closed
        return True


class LogFile(object):
    """--log FILE: lines are added to it."""

    def __init__(self, path):
        """Raises Failure."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o666)
        except OS_ERRORS as error:
            raise Failure('cannot write the log %s: %s' % (printable(path), explain(error)), USAGE)

    def line(self, text):
        """Add a line; a full disk is no reason to end a transfer."""
        try:
            os.write(self._fd, plain(text) + b'\n')
        except OS_ERRORS:
            pass


class Log(object):
    """A reader of the events that has a line for what it knows words for."""

    # What may come in floods: who connects but is no client, who comes and goes before the start.
    FLOODS = {'stranger': 'strangers', 'refused': 'strangers', 'relay_stranger': 'strangers',
              'unwanted': 'unwanted', 'member_here': 'arrivals', 'member_left': 'arrivals'}
    MOST = {'unwanted': 1, 'strangers': 10, 'arrivals': 200}    # lines of them all in a period

    def __init__(self, command, level, write, clock=''):
        """command: whose lines; level: the least of LEVELS; write(text): where a line
        goes; clock: the time that each begins with, as strftime(3) takes it."""
        self._prefix = 'kmcast %s: ' % command
        self.level, self._write, self._clock = level, write, clock
        self._limits = dict((kind, AtMost(most)) for kind, most in self.MOST.items())

    def happened(self, what, facts):
        """An event."""
        if what not in WORDS:
            return
        level, template = WORDS[what]
        if LEVELS.index(level) < LEVELS.index(self.level):
            return
        line = template % in_words(what, facts)
        if what in self.FLOODS:
            line = self._limits[self.FLOODS[what]](line, monotonic())
        if line:
            self.say(level, line)

    def say(self, level, line):
        """Write a line at a level."""
        label = level + ': ' if level in (WARNING, ERROR) else ''
        self._write(time.strftime(self._clock) + self._prefix + label + line)

    def look(self, now):
        """Time passes."""


def state_lines(job, now, all_hosts):
    """How it stands, for who asks by SIGUSR1 (a line) or SIGUSR2 (and one for each host)."""
    status = job.status(now)
    if status is None:
        return ['nothing has begun']
    text = '%s of the image' % counted(status.bytes, 'byte') if status.begun else 'not begun'
    if status.size and status.begun:
        text += ', which has %d' % status.size
    if status.places is not None:
        text += ', %s of %s here' % (status.here, counted(status.places, 'client'))
    if status.image_pass > 1:
        text = 'pass %d, %s' % (status.image_pass, text)
    lines = [text + (', waiting for ' + status.waits if status.waits else '')]
    if all_hosts:
        lines += job.hosts()
    return lines


# ---- what there is to know of a transfer at a moment, from its counters

class Status(object):
    """How a transfer stands, at either end.

    begun       whether rounds are under way
    image_pass  through the image, from 1
    bytes, size of the pass, as far as it got and in all (None: not known)
    before      bytes of these that were there at the start
    here, places    clients
    waits       who or what it waits for, in words; at the server's start, until when
    seconds     since the first round, of the pass
    lost, repaired  shares of the packets
    carrier     what brings the packets
    """

    image_pass, before = 1, 0

    def __init__(self, **parts):
        self.__dict__.update(parts)


def member_in_words(member):
    """What a member is doing, as far as the server can tell."""
    if member.outcome:
        return 'has everything' if member.outcome == 'complete' else member.outcome
    owes = member.owes
    if not owes:
        return 'waits for the next pass' if member.waits else 'waits for the others'
    if member.busy:
        return CAUSES.get(member.busy, member.busy)
    return 'no ' + owes


def server_status(server, now):
    """The Status of a Multicaster."""
    roster, course = server.roster, server.course
    here, waits = roster.here, ''
    if not roster.begun:
        missing = roster.missing
        waits = counted(len(missing), 'more client')
        if roster.hosts and missing:
            waits += ' (%s)' % listed(missing)
        if roster.start_by is not None:
            left = max(0, roster.start_by - now)
            waits += ', at most for %s' % duration(left) if left else ', at least %d of them' % (
                roster.enough - len(here)) if roster.enough > len(here) else ''
    elif not here:
        waits = 'somebody to come'
    elif roster.waiting:
        waits = 'what makes the image'
    else:
        late = server.debtors()
        waits = ', '.join('%s (%s)' % (member, member_in_words(member))
                          for member in late[:3]) + (' and %d more' % (len(late) - 3)
                                                     if len(late) > 3 else '')
    sent = max(1, course.data)
    return Status(
        seconds=now - (course.pass_began or now),
        begun=roster.begun, bytes=course.delivered, size=course.pass_size, image_pass=course.image_pass,
        here=len(here), places=max(len(here), roster.places), waits=waits, lost=course.lost / sent,
        repaired=(course.coded + course.by_tcp) / sent, rate=course.rate,
        carrier=' and '.join(['multicast'] * course.multicasting + ['chain'] * course.chained) or 'TCP')


def client_status(client, now):
    """The Status of a Client."""
    if client.fallback:
        return Status(
            seconds=now - (client.started or now), begun=client.started is not None, bytes=client.copy.bytes,
            before=client.copy.resumed, size=client.fallback.size, waits='the HTTP server', here=None, places=None,
            lost=0, repaired=0, carrier='HTTP')
    window, says = client.window, client.says
    here, places = says.get('here'), says.get('places')
    waits = ''
    if not client.receiver:
        waits = 'a server at %s port %d (%s)' % (
            client.options.server_ip, client.options.port, client.reason or 'no answer yet')
        return Status(begun=False, image_pass=1, seconds=0, bytes=client.copy.bytes if client.copy else 0, size=None,
                      here=None, places=None, waits=waits,
                      lost=0, repaired=0, carrier='')
    if 'starts_in' in says:
        waits = 'the next pass' + (', in about %s' % duration(says['starts_in']) if says['starts_in'] else '')
    elif not window.begun:
        waits = 'the start'
    elif window.over and client.writer.checking:
        waits = CAUSES['verifying']
    elif window.owing == 'writing':
        waits = 'the output'
    elif says.get('waiting'):
        waits = says['waiting']
    else:
        waits = 'the server, or its other clients'
    packets = max(1, window.by_multicast + window.by_chain + window.by_tcp + window.coded)
    return Status(
        seconds=now - (client.started or now), image_pass=says.get('pass') or 1,
        begun=window.begun, bytes=client.copy.bytes, before=client.copy.resumed,
        size=client.image.get('size'), waits=waits,
        here=None if window.begun else here, places=None if window.begun else places,
        lost=(window.by_tcp + window.coded) / packets, repaired=(window.by_tcp + window.coded) / packets,
        carrier='chain' if client.relay.following else 'TCP' if client.deaf or client.unicast else 'multicast')


def amount(size):
    """Bytes in words: `2.1 GB`."""
    for unit, scale in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if size >= scale:
            return '%.3g %s' % (size / scale, unit)
    return '%d B' % size


def duration(seconds):
    """Seconds as `1:05` or `2:01:05`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return '%d:%02d:%02d' % (hours, minutes, seconds) if hours else '%d:%02d' % (minutes, seconds)


class Progress(object):
    """A reader that shows how far it is: on a terminal one line that is redrawn, else a line now and then."""

    REDRAW = 0.25                       # seconds
    LINES = 10.0                        # seconds, where it is no terminal
    STUCK = 2.0                         # seconds without progress, until it says what it waits for
    RECENT = 3.0                        # seconds over which the rate of now is measured

    def __init__(self, command, job, screen):
        self._command, self._job, self._screen = command, job, screen
        self._every = self.REDRAW if screen.terminal else self.LINES
        self._next = 0.0
        self._first = None              # when it first looked
        self._samples = collections.deque()         # (now, bytes)
        self._over = False

    def happened(self, what, facts):
        """An event; the last one takes the line away."""
        if what == 'ended':
            self._over = True
            self._screen.draw('')

    def look(self, now):
        """Time passes."""
        if now < self._next or self._over:
            return
        status = self._job.status(now)
        if status is None:
            return
        self._next = now + self._every
        if self._first is None:
            self._first = now
        if self._samples and self._samples[-1][1] > status.bytes:       # another pass
            self._samples.clear()
        if not self._samples or self._samples[-1][1] != status.bytes:
            self._samples.append((now, status.bytes))
        while len(self._samples) > 2 and now - self._samples[0][0] > self.RECENT:
            self._samples.popleft()
        if self._screen.terminal:
            self._screen.draw(self.text(status, now, self._screen.width() - 1))
        elif now - self._first >= self.LINES / 2:
            self._screen.line('%s kmcast %s: %s' % (time.strftime('%H:%M:%S'), self._command,
                                                    self.text(status, now, 1000)))

    def text(self, status, now, width):
        """The line, in at most so many columns: the most telling parts first."""
        if not status.begun:
            parts = ['%d of %s here' % (status.here, counted(status.places, 'client'))
                     ] if isinstance(status.here, int) and isinstance(status.places, int) else []
            return self._fit(['waiting for ' + status.waits] + parts, width)
        first, last = self._samples[0], self._samples[-1]
        stuck = now - last[0] > self.STUCK
        average = 8 * (status.bytes - status.before) / max(1e-3, status.seconds)
        recent = 8 * (last[1] - first[1]) / max(1e-6, now - first[0])
        parts = [amount(status.bytes)]
        if status.size:
            parts = ['%d %%' % (100 * status.bytes / status.size)]
        if status.image_pass > 1:
            parts[0] = 'pass %d, %s' % (status.image_pass, parts[0])
        if stuck and status.waits:
            parts.append('waiting for ' + status.waits)
        else:
            parts.append(bits(recent))
        if status.size and average:
            parts.append('%s left' % duration((status.size - status.bytes) * 8 / average))
        if isinstance(status.here, int) and isinstance(status.places, int):
            parts.append('%d of %s' % (status.here, counted(status.places, 'client')))
        if status.size:
            parts.append('%s of %s' % (amount(status.bytes), amount(status.size)))
        parts += ['on average ' + bits(average), 'by ' + status.carrier,
                  'lost %.2g %%' % (100 * status.lost), 'repair %.2g %%' % (100 * status.repaired)]
        return self._fit(parts, width)

    @staticmethod
    def _fit(parts, width):
        """As many of the parts as fit."""
        text = parts[0][:width]
        for part in parts[1:]:
            if len(text) + 2 + len(part) <= width or part.startswith('waiting for'):
                text = (text + ', ' + part)[:width]
        return text


# ---- the end

def server_rows(server):
    """What became of each host, worst first: dicts with the keys of the report."""
    rows = []
    for member in server.roster.everyone:
        found = findings_of(server, member)
        wrong = faults(found)
        complete = member.outcome == 'complete' and not wrong
        reason = None if complete else '; '.join(words for _, words in wrong) or member.outcome or whose(server.failure) or 'unknown'
        rows.append({
            'host': member.host, 'address': member.address,
            'result': 'complete' if complete else 'failed', 'reason': reason,
            'exit_code': 0 if complete else None, 'lost': member.lost,
            'repaired': {'multicast': max(0, member.lost - member.by_tcp), 'tcp': member.by_tcp},
            'by_chain': member.figures.get('by_chain', 0),
            'waited_for': dict((cause, round(seconds, 3)) for cause, seconds in member.waited.items()),
            'overflows': member.figures.get('overflows'),
            'late': member.late and round(member.late, 3), 'lacks': 0 if complete else lacks_of(server, member),
            'seconds': member.ended and server.started and round(
                max(0, member.ended - server.started - (member.late or 0)), 3)})
        if server.options.rehearsal:
            rows[-1].update((key, member.figures.get(key)) for key in (
                'packet', 'room', 'write_speed', 'unwritable', 'socket_buffer', 'python', 'kernel', 'datagrams'))
            rows[-1].update(round_trip=member.figures.get('round_trip') and member.figures['round_trip'] / 1e6)
            rows[-1].update(wrong=wrong[0][0] if wrong else None, findings=[key for key, _ in found], reached=member.reached)
            rows[-1].update(heard=dict(
                (stage.name, round(server.course.share(member, stage.name), 4))
                for stage in server.course.STAGES if stage.name in member.tally) if server.course else {})
    missing = server.roster.missing
    for (host, address), why in server.roster.refused:
        rows.append({'host': host, 'address': address, 'result': 'refused', 'reason': why,
                     'exit_code': NOT_STARTED})
        if server.roster.hosts:         # it did come
            names = server.roster.hosts.find(host, address)
            missing = [name for name in missing if name not in names]
    for name in missing:
        by_address = name and is_address(name)
        rows.append({'host': None if by_address else name, 'address': name if by_address else None,
                     'result': 'missing', 'reason': 'it never came', 'exit_code': None})
    worst = ['failed', 'missing', 'refused', 'complete']
    rows.sort(key=lambda row: (worst.index(row['result']), -sum(row.get('waited_for', {}).values()),
                               -row.get('lost', 0)))
    for row in rows:
        for key in ('lost', 'seconds', 'overflows', 'late', 'lacks'):
            row.setdefault(key, None)
        row.setdefault('repaired', {'multicast': 0, 'tcp': 0})
        row.setdefault('by_chain', 0)
        row.setdefault('waited_for', {})
    return rows


def lacks_of(server, member):
    """Bytes of the image that a member lacks, or lacked when it left; None if nobody knows."""
    return server.course.lacking(member) if member.lacks is None and server.course else member.lacks


def whose(failure):
    """A server's failure as the reason that its clients have nothing."""
    stopped = failure and failure.startswith('stopped')
    return 'the server was ' + failure if stopped else failure


def named(row):
    """A host of the report for the user."""
    return '%s (%s)' % (row['host'], row['address']) if row['host'] else row['address']


def host_table(rows, most):
    """Lines of a table of hosts, `most` at the most."""
    head = ('host', 'address', 'result', 'lost', 'coded', 'TCP', 'chain', 'held up', 'seconds')
    passes = any(row['late'] is not None or row['lacks'] for row in rows)      # else nobody came late, or lacks any
    lines = [head + ('late', 'lacks')[:2 * passes]]
    for row in rows[:most]:
        waited = sorted(row['waited_for'].items(), key=lambda item: -item[1])
        held = '%.1f s, %s' % waited[0][::-1] if waited and waited[0][1] >= 0.1 else '-'
        lines.append((row['host'] or '?', row['address'] or '?', row['result'],
                      '-' if row['lost'] is None else str(row['lost']), str(row['repaired']['multicast']),
                      str(row['repaired']['tcp']), str(row['by_chain']), held,
                      '-' if not row['seconds'] else '%.1f' % row['seconds'])
                     + ('-' if row['late'] is None else '%.1f' % row['late'],
                        amount(row['lacks']) if row['lacks'] else '-')[:2 * passes])
    return in_columns(lines, len(rows) - most)


def in_columns(lines, more):
    """Lists of texts as lines of a table; more: how many are not among them."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        yield '  '.join(part.ljust(width) for part, width in zip(line, widths)).rstrip()
    if more > 0:
        yield 'and %d more (-v shows all)' % more


def hears(row):
    """Whether multicast works for a host of a rehearsal."""
    return row['result'] == 'complete' or row.get('wrong') == 'unwritable'


def check_table(rows, most):
    """Lines of a table of the hosts of a rehearsal, `most` at the most: which share of each stage they heard."""
    stages = [stage.name for stage in Rehearsal.STAGES]
    lines = [['host', 'address', 'multicast'] + stages]
    for row in rows[:most]:
        heard = row.get('heard', {})
        lines.append([row['host'] or '?', row['address'] or '?', 'works' if hears(row) else row.get('wrong') or row['result']]
                     + ['%.4g %%' % (100 * heard[name]) if name in heard else '-' for name in stages])
    return in_columns(lines, len(rows) - most)


# What there is to know of a host before a transfer: the head of its column, its key, what it can be, and it in words.
FITTINGS = (('TCP', 'round_trip', NUMBER + (float,), lambda seconds: '%.3g ms' % (1e3 * seconds)),
            ('packet', 'packet', NUMBER, str), ('chain', 'reached', bool, ('no', 'works').__getitem__),
            ('room', 'room', NUMBER, amount), ('written', 'write_speed', NUMBER, lambda speed: amount(speed) + '/s'),
            ('buffer', 'socket_buffer', NUMBER, amount), ('datagrams', 'datagrams', TEXT, None),
            ('Python', 'python', TEXT, None), ('kernel', 'kernel', TEXT, None))


def fittings_of(row):
    """What is known of a host, by FITTINGS: (head, in words)."""
    for head, key, kinds, words in FITTINGS:
        value = row.get(key)
        good = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
        yield head, (words(value) if words else value) if good else '-'


def fittings_table(rows, most):
    """Lines of a table of the hosts of a rehearsal, `most` at the most: what else there is to know of each."""
    rows = [row for row in rows if row.get('python')]
    lines = [['host'] + [fitting[0] for fitting in FITTINGS]]
    for row in rows[:most]:
        lines.append([row['host']] + [words for _, words in fittings_of(row)])
    return in_columns(lines, len(rows) - most) if rows else ()


def never_came(server, rows):
    """A line on those who did not; none if all came, or it does not matter."""
    absent, hosts = [row['host'] or row['address'] for row in rows if row['result'] == 'missing'], server.roster.hosts
    if absent and (hosts or not server.failure):
        yield '%s never came%s' % (counted(len(absent), 'client'), ': ' + listed(absent, 200) if hosts else '')


def check_summary(server, rows, most):
    """(level, line) of how a rehearsal went."""
    for row in rows:
        if row['result'] in ('failed', 'refused'):
            yield ERROR, '%s: %s%s' % (named(row), 'refused, ' if row['result'] == 'refused' else '', row['reason'])
    if server.failure:
        yield ERROR, server.failure
    for line in list(check_table(rows, most)) + list(fittings_table(rows, most)):
        yield INFO, line
    for hint in HINTS:
        those = [row['host'] for row in rows if hint in row.get('findings', ())]
        if those:
            yield WARNING, '%s: %s' % (listed(those), ADVICE[hint])
    for line in never_came(server, rows):
        yield ERROR, line
    yield INFO, 'multicast works for %d of %s' % (
        len([row for row in rows if hears(row)]), counted(server.roster.places, 'client'))


def server_summary(server, rows, most):
    """(level, line) of how a server's transfer went."""
    roster, course = server.roster, server.course
    for row in rows:
        if row['result'] == 'failed':
            yield ERROR, '%s does not have the image: %s' % (named(row), row['reason'])
        elif row['result'] == 'refused':
            yield ERROR, '%s was refused: %s' % (named(row), row['reason'])
    if server.failure:
        yield ERROR, server.failure
    for row in rows:
        if row['overflows']:
            yield INFO, ('%s lost %s in its own socket buffer, not in the network; there, a larger '
                         'net.core.rmem_max helps (sysctl), or root' % (
                             named(row), counted(row['overflows'], 'datagram')))
    if course.rounds or course.over:
        seconds = server.ended - (server.started or server.ended)
        yield INFO, 'data: %s in %s, %s in %.1f s, %s' % (
            counted(course.data, 'packet'), counted(course.rounds, 'round'),
            counted(course.brought, 'byte'), seconds, bits(course.brought * 8 / max(1e-6, seconds)))
        by_chain = sum(row['by_chain'] for row in rows)
        yield INFO, 'repair: %s by multicast, %s by TCP%s' % (
            counted(course.coded, 'packet'), counted(course.by_tcp, 'packet'),
            '; %s from client to client' % counted(by_chain, 'packet') if by_chain else '')
        if len(rows) > 1:
            for line in host_table(rows, most):
                yield INFO, line
    for line in never_came(server, rows):
        yield ERROR, line
    served = len([row for row in rows if row['result'] == 'complete'])
    count = roster.served if roster.more else roster.places
    yield INFO, '%s%s %s the image' % ('' if roster.more else '%d of ' % served, counted(count, 'client'),
                                       'has' if count == 1 else 'have')
    if served and not roster.forever and server.source.digest():
        yield DIGEST, digest_line(hexadecimal(server.source.digest()),
                                  server.source.size is not None and server.options.input)


def client_summary(client):
    """(level, line) of how a client's transfer went well."""
    if client.rehearsal:
        yield INFO, 'the rehearsal went well: multicast works here'
        return
    window, copy, seconds = client.window, client.copy, client.ended - client.started
    size = copy.bytes
    if copy.resumed:
        yield INFO, '%s had been left by an earlier run' % counted(copy.resumed, 'byte')
    if copy.checked:
        yield INFO, '%s read back and verified in %.1f s' % (counted(copy.checked, 'byte'), copy.check_seconds)
    if client.fallback:
        yield INFO, '%s in %.1f s; %s' % (counted(size, 'byte'), seconds, fallback_in_words(client))
        if copy.hash:
            yield DIGEST, digest_line(copy.hash.hexdigest(), client.sink.is_file and client.options.output)
        return
    if size and not window.by_multicast and not client.unicast and not client.deaf:
        carrier = CARRIERS['upstream' if window.by_chain else 'tcp']
        yield WARNING, 'multicast does not reach this host, everything came %s; %s' % (carrier, causes(window.payload))
    if client.overflows:
        yield INFO, ('%s found no room in this host\'s socket buffer of %d bytes; a larger '
                     'net.core.rmem_max helps (sysctl), or root' % (
                         counted(client.overflows, 'datagram'), client.receiver.socket_buffer))
    by_chain = ', %s from another client' % counted(window.by_chain, 'packet') if window.by_chain else ''
    yield INFO, '%s in %.1f s, %s; repaired %s by multicast, %d by TCP%s%s' % (
        counted(size, 'byte'), seconds, bits(max(0, size - copy.resumed) * 8 / max(1e-6, seconds)),
        counted(window.coded, 'packet'), window.by_tcp, by_chain,
        '' if window.digest else '; without a digest')
    if copy.hash:
        yield DIGEST, digest_line(copy.hash.hexdigest(), client.sink.is_file and client.options.output)


def digest_line(digest, path):
    """What sha256sum -c reads; without a path that it can read, or under a name that it would quote: `-`."""
    return '%s  %s' % (digest, path if path and re.match(r'[!-\[\]-~][ -\[\]-~]*$', path) else '-')


def fallback_in_words(client):
    """What came by HTTP, and what of the image is known to be right."""
    fallback = client.fallback
    if client.options.expect_sha256:
        return '%s by HTTP, and all verified by --expect-sha256' % counted(fallback.brought, 'byte')
    told = min(fallback.told, fallback.size)
    by = '%s by HTTP' % counted(fallback.brought, 'byte')
    length = 'the length is what the server told' if fallback.size_told is not None else 'the length is what HTTP told'
    rest = '; nothing but HTTP tells whether %s right' % (
        'the other %s are' % counted(fallback.size - told, 'byte') if told else 'it is') if told < fallback.size else ''
    verified = '' if not told else ', all verified by the server\'s SHA-256' if told == fallback.size else (
        ', the first %s verified by the server\'s SHA-256' % counted(told, 'byte'))
    return '%s%s; %s%s' % (by, verified, length, rest)


class Summary(object):
    """A reader that says at the end how it went, through a Log."""

    ROWS = 20                           # of the table, unless all are wanted

    def __init__(self, log, all_rows=False, bare=None):
        """bare(level, line): writes the digest's line as it is; None: it goes through the log."""
        self._log, self._most, self._bare = log, 1 << 30 if all_rows else self.ROWS, bare

    def happened(self, what, facts):
        """An event."""
        lines = ()
        if what == 'server_ended':
            summary = check_summary if facts['server'].options.rehearsal else server_summary
            lines = summary(facts['server'], server_rows(facts['server']), self._most)
        elif what == 'client_ended' and facts['code'] == OK:
            lines = client_summary(facts['client'])
        for level, line in lines:
            write = self._log.say
            if level == DIGEST:
                level, write = INFO, self._bare or write
            if LEVELS.index(level) >= LEVELS.index(self._log.level):
                write(level, line)

    def look(self, now):
        """Time passes."""


SESSIONS = 'server', 'client', 'check'  # the commands that take part in one, and so have reports


class JsonReport(object):
    """A reader that writes --report FILE at the end, however it comes."""

    MOST_STEPS = 1000

    def __init__(self, path, command, words, job):
        """words: of the command line."""
        self._path, self._command, self._job = path, command, job
        self._words = words and [printable(word, 4096) for word in words]
        self._steps, self._every, self._next = [], 1.0, 0.0

    def happened(self, what, facts):
        """An event."""
        if what == 'ended':
            self._write(facts['code'], facts['reason'] or getattr(self._job, 'failure', None))

    def look(self, now):
        """Time passes: keep the course of the transfer, in at most so many steps."""
        if now < self._next:
            return
        self._next = now + self._every
        status = self._job.status(now)
        if status is None or not status.begun:
            return
        before = self._steps[-1] if self._steps else {'seconds': 0, 'bytes': 0, 'pass': 1}
        seconds = round(now - (self._job.started or now), 3)
        moved = status.bytes - (before['bytes'] if before['pass'] == status.image_pass else 0)
        self._steps.append({
            'seconds': seconds, 'bytes': status.bytes, 'pass': status.image_pass,
            'rate': round(8 * moved / max(1e-3, seconds - before['seconds'])),
            'loss': round(status.lost, 6), 'waited_for': None if moved else status.waits or None})
        if len(self._steps) > self.MOST_STEPS:
            del self._steps[::2]
            self._every *= 2

    def _write(self, code, reason):
        job = self._job
        result = {'kmcast': __version__, 'command': self._command, 'arguments': self._words,
                  'ended': time.strftime('%Y-%m-%d %H:%M:%S'), 'exit_code': code, 'reason': reason,
                  'result': {OK: 'complete', PARTLY: 'partly'}.get(code, 'failed')}
        started, ended = getattr(job, 'started', None), getattr(job, 'ended', None) or monotonic()
        seconds = round(ended - started, 3) if started else 0
        result.update(job.report() if job else {'bytes': 0, 'sha256': None, 'carried': None})
        result.update(seconds=seconds, steps=self._steps,
                      goodput=round(8 * result['bytes'] / seconds) if seconds else 0)
        if self._command == 'client' and code == NOT_STARTED:
            result['result'] = 'refused' if job and job.refused else 'not started'
        text = json.dumps(result, sort_keys=True, indent=1).encode('ascii') + b'\n'
        try:
            if os.path.exists(self._path) and not os.path.isfile(self._path):       # a device, a pipe: it stays what it is
                with io.open(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), 'wb') as file:
                    file.write(text)
                return
            path = os.path.realpath(self._path)
            folder, name = os.path.split(path)
            temporary = os.path.join(folder, '.%s.%d.tmp' % (name[:100], os.getpid()))
            with io.open(temporary, 'wb') as file:
                file.write(text)
            os.rename(temporary, path)
        except OS_ERRORS as error:
            tell('unreported', path=printable(self._path), reason=explain(error))


def server_report(server):
    """The keys of a server's report."""
    course = server.course
    payload, rows = course.payload if course else 0, server_rows(server)
    return {
        'bytes': course.brought if course else 0,
        'sha256': hexadecimal(server.source.digest()) or None,
        'carried': {'multicast': course.sent_packets * payload, 'coded': course.coded * payload,
                    'tcp': course.by_tcp * payload,
                    'chain': sum(row['by_chain'] for row in rows) * payload} if course else None,
        'hosts': rows}


def client_report(client):
    """The keys of a client's report."""
    window, copy = client.window, client.copy
    payload = window.payload if window else 0
    digest = copy.hash.hexdigest() if copy and copy.hash else None
    return {
        'rehearsal': client.rehearsal,
        'bytes': copy.bytes if copy else 0, 'sha256': digest, 'resumed': copy.resumed if copy else 0,
        'verified': {'bytes': copy.checked, 'seconds': round(copy.check_seconds, 3)} if copy else None,
        'server': {'address': client.options.server_ip, 'port': client.options.port},
        'carried': {'multicast': window.by_multicast * payload, 'coded': window.coded * payload,
                    'tcp': window.by_tcp * payload, 'chain': window.by_chain * payload} if window else None,
        'fallback': client.fallback and client.fallback.report(),
        'lost': window.by_tcp + window.coded if window else None,
        'overflows': client.overflows}


# ---------------------------------------------------------------------------
# TCP servers
# ---------------------------------------------------------------------------

# Why a connection is closed before anything is said on it.
FORBIDDEN, ATTEMPTS = '--allow does not have it', 'too many attempts with a wrong key'


class Session(object):
    """What is agreed for a transfer; nobody changes it once clients come."""

    def __init__(self, options, payload, name, size, image, source, again=False, outdated=None):
        """payload: bytes in a full packet; name, size: of the image; image: what tells
        it from others; source: (address, port) that the multicast comes from; again: whether the
        image can be read again; outdated(): whether there is another one for those who come now."""
        self.dialect = BaseDialect if options.compat else SessionDialect
        self.group, self.port = options.group, options.port
        self.per_thread = options.clients_per_thread
        self.stall_timeout = options.stall_timeout
        if self.stall_timeout is None:
            self.stall_timeout = self.dialect.server_stall
        self.strangers = options.strangers
        self.unicast = options.unicast or options.chain == 'always'
        self.payload = payload
        self.salt, self.repair_salt = self.dialect.salts()
        self.digest = self.dialect.talks and not options.no_digest
        self.image, self.outdated = image, outdated
        self.group_info = pack_group_info(self.group, self.port, self.dialect.padding)
        self.allowed = options.allow
        self.key, self.vouchers = options.key, None
        self._fields = {
            'version': __version__, 'salt': self.salt,
            'repair_salt': self.repair_salt, 'payload': payload,
            'name': name and printable(name), 'size': size,
            'digest': 'sha256' if self.digest else None,
            'stall': self.stall_timeout, 'window': self.dialect.window, 'image': image,
            'again': again, 'source': source, 'unicast': self.unicast}
        if options.rehearsal:
            self._fields['rehearsal'] = True
        if self.key:
            seed = os.urandom(TOKEN_SIZE)
            self.vouchers = Vouchers(self.key, seed)
            self._fields['seed'] = hexadecimal(seed)
        self.welcome = pack_frame(WELCOME, self._fields)

    def greeting(self, hello):
        """With a key: (WELCOME for who said this HELLO, the Greeting that has both)."""
        welcome = pack_frame(WELCOME, dict(self._fields, nonce=hexadecimal(os.urandom(TOKEN_SIZE))))
        return welcome, Greeting(self.key, self.group_info, hello, welcome)

    def allows(self, address):
        """Whether --allow has an address."""
        number = to_int(socket.inet_aton(address))
        return self.allowed is None or any(number & mask == network for network, mask in self.allowed)


class Attempts(object):
    """Who has failed to prove the key lately: an address has so many attempts in a period."""

    MOST, PERIOD = 5, 1.0               # seconds
    MEMORY = 1000                       # attempts

    def __init__(self):
        self._failed = collections.deque(maxlen=self.MEMORY)    # (when, address)

    def failed(self, address, now):
        """An attempt from there has failed."""
        self._failed.append((now, address))

    def exhausted(self, address, now):
        """Whether there may be no more of them now."""
        while self._failed and now - self._failed[0][0] > self.PERIOD:
            self._failed.popleft()
        return sum(other == address for _, other in self._failed) >= self.MOST


class Peer(Connection):
    """A connection to this server: a client, or who may become one."""

    def __init__(self, sock, address):
        Connection.__init__(self, sock, address)
        self.member = Member(address, self.since)
        self.unproven = False           # it was sent a proof, and still owes its own
        # (Round, Request) whose packets wait until those before are out: short messages overtake them.
        self.asked = collections.deque()
        self.waiting = dict(waiting=None)           # what it was told that it waits for
        self.hello = None               # of who waits for another image

    def __str__(self):
        return str(self.member)


class TcpServer(threading.Thread):
    """Looks after up to so many clients; its child looks after the next ones.

    The spec's TCP server: one poll() over its clients and its links.  Of its
    states, INIT and ACCEPT are as there; PREP, SYNC and SEND are those of a round, and several
    rounds can be at different ones: see ServerWindow.

    TCP server 1 has the listener and hears the greetings of all; a client that
    it has no room for it passes on to its child, which does the same.  So a
    release means "look": at what was `passed_on`, at the clients' sentences, at the steps
    in our `inbox`; or, from the child, at its `results`.
    """

    PATIENCE = 5.0                      # seconds, until it says whom it waits for
    AT_ONCE = 64                        # connections to accept in a turn
    NEWS = 1.0                          # seconds between two words to a client that waits

    def __init__(self, session, roster, parent, link, listener=None, number=1, held=()):
        """parent: the thread above, whose `failure` is ours, too; link: ours; listener: a
        socket that listens, for the first; number: in the chain, from 1; held: connections
        that another first one had, of those who are no clients yet."""
        threading.Thread.__init__(self, name='tcp-server-%d' % number)
        self.daemon = True
        self.session, self.roster = session, roster
        self.parent, self.link = parent, link
        self.listener = listener
        self.number = number
        self.child = None
        self.window = ServerWindow(session.dialect, session.stall_timeout, session.vouchers)
        self._attempts = Attempts()
        self.held = list(held)          # connections that are there at the beginning, or left at the end
        self.inbox = collections.deque()        # Steps from the parent
        self.results = collections.deque()      # (Step, Answers) of what is complete here and below
        self.passed_on = collections.deque()    # clients for the child
        self.failure = None             # why this thread ended, if not in order
        self._peers = {}                # member -> its connection
        self._pending = []              # connections that are still to say HELLO
        self._leaving = []              # those that were told BYE
        self._accepting = None          # the accept step, until it is complete
        self._sentences = 0             # that were looked at
        self._here, self._below = {}, {}        # Step -> Answers: complete here only, or below only
        self._left_below = set()        # Steps that the child was left, too: it may be younger than others
        self._over = False
        self._news = False              # there is some for the parent
        self._tick = TICK
        self._next_look = 0.0
        self._late = None               # the step whose completion is waited for,
        self._next_words = 0.0          # and when to say for whom
        self._poller = select.poll()
        self._handlers = {}
        self._writing = set()           # descriptors that are polled for room, too

    # ---- the loop

    def run(self):
        """The thread.  Whatever happens, the neighbours see it end."""
        try:
            self._watch(self.link.parent_fd, self._on_parent)
            while not self._over:
                self._poll(self._tick)
                if self.passed_on:
                    self.link.release_child()
                self._look_at_clocks()
                self._advance()
                if self._news:          # after what is complete: that of who has just left, too
                    self._news = False
                    self.link.release_parent()
        except Failure as error:
            self.failure = error.reason
        except Exception as error:      # pylint: disable=broad-except
            self.failure = internal_error(error)
        try:
            if self.failure:
                self._dismiss_all(self.failure)
        finally:
            for fd in (self.link.parent_fd, self.link.child_fd):
                self._unwatch(fd)
            if self.listener:
                self._unwatch(self.listener.fileno())
            self.link.close()
            if self.roster.renewing and not self.failure:
                self.held, self._pending = self._pending, []
            self._farewell()

    def _watch(self, fd, handler, *args):
        self._handlers[fd] = (handler, args)
        self._poller.register(fd, select.POLLIN)
        self._writing.discard(fd)

    def _unwatch(self, fd):
        if self._handlers.pop(fd, None):
            self._poller.unregister(fd)
            self._writing.discard(fd)

    def _poll(self, timeout):
        for fd, event in ready(self._poller, timeout):
            if fd in self._handlers:    # not closed by a handler just before
                handler, args = self._handlers[fd]
                handler(event, *args)

    def _advance(self):
        """Tell the parent of what is complete here and below."""
        if self._over:
            return
        if self._accepting:
            if not self.roster.begin(monotonic()):
                return
            self.results.append((self._accepting, Answers()))
            self._accepting, self._news = None, True
        alone = self.link.child_fd is None
        for awaited in self.window.complete():
            self._here[awaited.step] = awaited.answers
        through = [step for step in self._here
                   if alone or step in self._below or step not in self._left_below]
        for step in through:
            answers = self._here.pop(step)
            self._left_below.discard(step)
            if step in self._below:
                answers.add(self._below.pop(step))
            self.results.append((step, answers))
        self._news = self._news or bool(through)

    def _look_at_clocks(self):
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._tick
        self._look_for_the_late(now)
        roster = self.roster
        waiting = dict(waiting=roster.waiting) if roster.begun else dict(
            here=len(roster.here), places=roster.places)
        image_pass, left = roster.passing
        if image_pass > 1:
            waiting['pass'] = image_pass
        waiting_for_pass = dict(waiting, starts_in=left and round(left), **{'pass': image_pass})
        for peer in self._pending[:]:
            if peer.hello:
                self._safely(peer, peer.show_life, ALIVE)
            elif now - peer.since > GREETING_TIME:
                self._drop(peer, 'no %s within %d s' % ('proof of the key' if peer.unproven else 'HELLO', GREETING_TIME))
        for member, peer in list(self._peers.items()):
            if peer.outgoing.size or member.owes:
                peer.look_at_kernel()
                reason = self.window.stalled(member, peer.moved, now)
                if reason:
                    self._drop(peer, reason, again=roster.again)
                    continue
            self._safely(peer, self._show_life, peer, waiting_for_pass if member.waits else waiting, now)
        for peer in self._leaving[:]:
            if now > peer.leaving:
                self._close(peer)

    def _look_for_the_late(self, now):
        """Say for whom the oldest step waits, if it waits for long."""
        oldest = self.window.awaited[0] if self.window.awaited else None
        if oldest is not self._late:
            self._late, self._next_words = oldest, now + self.PATIENCE
        elif oldest and now > self._next_words:
            self._next_words = now + 2 * self.PATIENCE
            tell('waiting_for', members=self.window.debtors())

    def _show_life(self, peer, waiting, now):
        """Tell a client that waits for whom or what, if that is news, else that we are alive."""
        if not self.session.dialect.talks:
            return
        if waiting != peer.waiting and now - peer.told > self.NEWS and not peer.member.owes:
            peer.waiting = waiting
            peer.send(self.session.dialect.state(**waiting))
        else:
            peer.show_life(ALIVE)

    # ---- the links

    def _on_parent(self, _event):
        try:
            self.link.wait_parent()
        except LinkClosed:
            self._unwatch(self.link.parent_fd)
            self.failure = getattr(self.parent, 'failure', None)
            if self.failure or not self.roster.closed:
                self._dismiss_all(self.failure or 'the server has stopped')
            self._over = True           # who is not through with the greetings may find another server
            return
        self._take_those_passed_on()
        self._carry_out_sentences()
        todo = []
        while self.inbox and not self._over:
            step = self.inbox.popleft()
            self._take_those_passed_on()            # they came before the step
            todo += self._begin(step)
        self._carry_out(todo)
        self.link.release_child()       # there are steps, or a sentence on a client below

    def _take_those_passed_on(self):
        while self.number > 1 and self.parent.passed_on:
            self._take(self.parent.passed_on.popleft())

    def _begin(self, step):
        """Begin a step here, and leave it to the child; returns what to do."""
        if step.kind == 'accept':
            self._accepting = step
            self._watch(self.listener.fileno(), self._on_connection)
            held, self.held = self.held, []
            for peer in held:
                self._pending.append(peer)
                self._watch(peer.fileno(), self._on_peer, peer)
                if peer.hello:
                    self._safely(peer, self._on_hello, peer, peer.hello)
            return []
        if self.link.child_fd is not None:
            self.child.inbox.append(step)
            self._left_below.add(step)
        if step.kind == 'abort':
            self._dismiss_all(step.message)
            return []
        return self.window.begin(step, monotonic())

    def _carry_out_sentences(self):
        if self._sentences == self.roster.sentences:
            return
        self._sentences = self.roster.sentences
        for member, peer in list(self._peers.items()):
            if member.sentence:
                self._drop(peer, member.sentence, again=member in self.roster.away)

    def _carry_out(self, todo):
        """Do what the window wants; what a client is told of several rounds goes in one piece."""
        together = {}
        for verb, member, argument in todo:
            peer = self._peers.get(member)
            if peer is None:            # it has gone just now
                continue
            if verb == 'send':
                together[peer] = together[peer] + argument if peer in together else argument
                continue
            if peer in together:
                self._send(peer, together.pop(peer))
            if verb == 'packets':
                peer.asked.append(argument)
                self._send(peer)
            elif verb in ('relay', 'lacks'):
                self._bring(verb, member, argument)
            else:
                tell('member_served', member=member)
                self._close(peer)
        for peer in together:
            self._send(peer, together[peer])

    def _packets(self, wanted, request):
        """What to say for a Request for packets of a Round."""
        parts = runs(request.gaps) if request.order is None else [
            (request.order[start], request.order[stop - 1] + 1)
            for start, stop in stretches(request.order)]
        buffer = wanted.buffer
        return [self.session.dialect.packets(wanted.number)] + (
            [buffer.view(start, stop) for start, stop in parts] if self.session.digest else
            [data for start, stop in parts for data in buffer.packets(start, stop)])

    def _bring(self, what, member, more=None):
        """There is something for the roster's reader."""
        self.roster.news.append((what, member, more))
        self._news = True

    def _on_child(self, _event):
        try:
            self.link.wait_child()
        except LinkClosed:
            self._unwatch(self.link.child_fd)
            self.link.close_child()
            if self.child.failure:
                self.failure = self.child.failure
                self._over = True
        while self.child.results:
            step, answers = self.child.results.popleft()
            self._below[step] = answers
        self._news = self._news or bool(self.roster.news)

    # ---- connections

    def _on_connection(self, _event):
        for _ in range(self.AT_ONCE):   # then hear what they say
            try:
                sock, address = self.listener.accept()
            except OS_ERRORS:
                return
            unwanted = (FORBIDDEN if not self.session.allows(address[0]) else
                        ATTEMPTS if self._attempts.exhausted(address[0], monotonic()) else None)
            if unwanted:
                tell('unwanted', address=address[0], reason=unwanted)
                sock.close()
                continue
            self._make_room(address[0])
            peer = Peer(sock, address[0])
            peer.begin(self.session.stall_timeout)
            self._pending.append(peer)
            self._watch(peer.fileno(), self._on_peer, peer)
            self._send(peer, self.session.group_info)
            if not self.session.dialect.greets and peer.open:
                self._welcome(peer)

    def _make_room(self, address):
        """Bound the connections that are no clients: those of an address, and of all.

        A burst from many addresses is a room full of hosts that were switched on together;
        one from a single address is not.  Who is pushed out hears nothing, and so tries again.
        """
        waiting = self._leaving + self._pending
        if len(waiting) < min(MOST_PENDING, self.session.strangers):
            return
        of = collections.Counter(peer.address for peer in waiting)
        free = self.roster.places - len(self.roster.here)
        if of[address] >= MOST_PENDING:
            busiest = address
        elif len(waiting) >= self.session.strangers + max(0, free):
            busiest = of.most_common(1)[0][0]
        else:
            return
        victim = [peer for peer in waiting if peer.address == busiest][0]
        if victim in self._leaving:
            self._close(victim)
        else:
            self._drop(victim, 'too many connections that say nothing', told=False)

    def _welcome(self, peer):
        """Give a place to whoever may become a client, or say why not.  Raises Failure."""
        member = peer.member
        twin = self.roster.twin(member)
        why = self.roster.why_not(twin, member)
        if self.session.dialect.greets and not why and not self.session.key:
            self._send(peer, self.session.welcome)
            if peer.leaving or not peer.open:
                return
        if not why:
            here = self.roster.admit(member, monotonic(), twin)
            if self.roster.closed:
                self.roster.turn_away(member)
                why = CLOSING
        if why:
            if self.session.dialect.greets:         # else it may be anybody
                self.roster.refuse(member, why)
            return self._refuse(peer, why)
        self._pending.remove(peer)
        if not self.roster.begun:       # else there is more to say of it
            tell('member_here', member=member, here=here, places=self.roster.places)
        if twin:                        # its thread may be another one
            self._carry_out_sentences()
            self.link.release_child()
        self._take(peer)
        self._bring('here', member)
        self._advance()

    def _refuse(self, peer, reason):
        """Tell a connection why it is none of a client, and the user."""
        tell('refused', member=peer.member, reason=reason)
        self._drop(peer, 'refused: ' + reason)

    def _take(self, peer):
        """Serve a client, or have the child do so.  Raises Failure."""
        if len(self._peers) < self.session.per_thread:
            self._tick = min(self._tick, peer.alive_every / 2)
            self._peers[peer.member] = peer
            peer.member.placed = True
            self.window.members.append(peer.member)
            self._watch(peer.fileno(), self._on_peer, peer)
            self._send(peer)
            if peer.member.sentence:    # passed on its way here
                self._drop(peer, peer.member.sentence, again=peer.member in self.roster.away)
            return
        self._unwatch(peer.fileno())
        self.passed_on.append(peer)     # the child hears of it when we have looked at the others
        if not self.child:
            child = TcpServer(self.session, self.roster, self, self.link.spawn(),
                              number=self.number + 1)
            try:
                start_thread(child)
            except Failure:
                child.link.close()
                raise
            self.child = child
            self._watch(self.link.child_fd, self._on_child)

    def _on_peer(self, event, peer):
        fd = peer.fileno()
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._safely(peer, self._hear, peer)
        if event & select.POLLOUT and self._handlers.get(fd, (None, ()))[1] == (peer,):     # it is still ours
            self._send(peer)

    def _safely(self, peer, call, *args):
        """`call(*args)`; what goes wrong ends this peer, and nobody else notices."""
        try:
            call(*args)
        except Gone as error:
            self._gone(peer, error, call == self._hear)
        except Refused as error:
            self._drop(peer, error.reason, told=False)
        except ProtocolError as error:
            self._drop(peer, 'protocol error: %s' % error)

    def _gone(self, peer, error, reading):
        """It has ended; where we did not read, reading will tell, after what it said before it went."""
        if peer.member in self._peers and not reading:
            peer.asked.clear()
            peer.give_up()
        else:
            self._drop(peer, 'it went away: %s' % error, told=False)

    def _hear(self, peer):
        if peer.leaving:                # until it hangs up
            peer.receive()
            peer.incoming.clear()
            return
        if peer.member not in self._peers:
            said = peer.first(self._proof_size if peer.unproven else self._hello_size)
            if said:                    # what follows is for whoever takes it
                (self._on_proof if peer.unproven else self._on_hello)(peer, said)
            return
        for message in peer.messages(self.window.size_of):
            todo = self.window.heard(peer.member, message, peer.heard)
            if todo:
                self._carry_out(todo)
                if peer.leaving or not peer.open:
                    return

    LONGEST_HELLO = 8 << 10             # bytes, of who has yet to prove the key

    def _hello_size(self, head):
        if head[:1] != HELLO:
            raise ProtocolError('it says something else than HELLO')
        size = frame_size(head)
        if self.session.key and (size or 0) > self.LONGEST_HELLO:
            raise ProtocolError('a HELLO of %d bytes' % size)
        return size

    @staticmethod
    def _proof_size(head):
        return 1 + DIGEST_SIZE if head[:1] == PROOF else 1      # what else it may be does not matter

    def _on_hello(self, peer, message):
        fields = unpack_frame(message[5:])
        field(fields, 'version', TEXT)
        peer.member.host = field(fields, 'host', TEXT)
        peer.member.window = min(field(fields, 'window', NUMBER), self.session.dialect.window)
        if not peer.member.window:
            raise ProtocolError('a window of no rounds')
        peer.member.willing = fields.get('relay') is True
        peer.member.seek = fields.get('seek') is True
        peer.member.who = name_of(fields, 'who', optional=True) if 'who' in fields else None
        held = Held.from_list(fields.get('have', []))
        if fields.get('image') == self.session.image:
            peer.member.have = held
        peer.hello = None
        if self.session.outdated and self.session.outdated() and not self.roster.awaits(peer.member):
            self.roster.renewing, peer.hello = True, message
            return
        peer.alive_every = alive_every(stall_of(fields))
        if not self.session.key and 'nonce' not in fields:
            self._welcome(peer)
        elif not self.session.key:
            self._refuse(peer, 'this server has no key, and the client has one')
        elif 'nonce' not in fields:
            self._refuse(peer, 'this server takes only clients that have its key (--key)')
        else:
            token_of(fields, 'nonce')
            welcome, peer.member.greeting = self.session.greeting(message)
            peer.unproven = True
            self._send(peer, welcome + peer.member.greeting.prove(Greeting.SERVER))

    def _on_proof(self, peer, message):
        """The answer of who was sent a proof: its own, else it has another key."""
        if self._attempts.exhausted(peer.address, monotonic()):
            self._refuse(peer, ATTEMPTS)
        elif not peer.member.greeting.proven(Greeting.CLIENT, message):
            self._refuse(peer, KEYS_DIFFER)
        else:
            peer.unproven = False
            self._welcome(peer)

    def _send(self, peer, *pieces):
        """Send what can be sent, and poll for what cannot."""
        try:
            peer.send(*pieces)
            while peer.asked and not peer.outgoing.size:
                peer.send(*self._packets(*peer.asked.popleft()))
        except Gone as error:
            self._gone(peer, error, reading=False)
        if not peer.open:
            return
        peer.hang_up()
        waits = bool(peer.outgoing.size)
        if not waits and not self._writing:
            return
        fd = peer.fileno()
        if fd in self._handlers and waits != (fd in self._writing):
            self._poller.modify(fd, select.POLLIN | (select.POLLOUT if waits else 0))
            (self._writing.add if waits else self._writing.discard)(fd)

    # ---- farewells

    def _drop(self, peer, reason, told=True, again=False):
        """End with one client; the others do not notice.

        told: whether it can be told why; again: whether it may come again.
        """
        member = peer.member
        if self._forget(member):
            if not self._over:          # else the reason is everybody's, and said at the end
                member.outcome, member.ended = reason, monotonic()
                if member not in self.roster.away:          # of which that was told
                    tell('member_lost' if self.roster.begun else 'member_left', member=member, reason=reason)
        elif peer in self._pending:
            self._pending.remove(peer)
            if peer.unproven:
                self._attempts.failed(peer.address, monotonic())
            if not reason.startswith('refused'):
                tell('stranger', member=member, reason=reason)
        peer.asked.clear()
        if peer.outgoing.count and not self._over:      # packets of a buffer that will be used again
            peer.outgoing.put_tail(peer.outgoing.flat())
        if told and not peer.leaving and self.session.dialect.talks:
            self._leaving.append(peer)
            try:
                peer.leave(self.session.dialect.bye(ok=False, reason=reason, empty=reason == EMPTY,
                                                     again=again))
                self._send(peer)
            except Gone:
                self._close(peer)
        else:
            self._close(peer)

    def _forget(self, member):
        """A member is none any more; returns whether it was one."""
        self.roster.leave(member)
        if member not in self._peers:
            return False
        del self._peers[member]
        self.window.leave(member)
        self._bring('left', member)
        return True

    def _close(self, peer):
        self._forget(peer.member)
        for peers in (self._pending, self._leaving):
            if peer in peers:
                peers.remove(peer)
        if peer.open:
            self._unwatch(peer.fileno())
            peer.close()

    def _dismiss_all(self, reason):
        self._over = True
        self.roster.end()
        while self.child is None and self.passed_on:
            peer = self.passed_on.popleft()
            self._pending.append(peer)
            self._watch(peer.fileno(), self._on_peer, peer)
        for peer in list(self._peers.values()) + self._pending:
            self._drop(peer, reason)

    def _farewell(self):
        """Give the last messages a moment to get through, then close."""
        deadline = monotonic() + FAREWELL_TIME
        while self._leaving and monotonic() < deadline:
            try:
                self._poll(0.1)
            except Exception as error:  # pylint: disable=broad-except
                internal_error(error)
                break
        for peer in self._leaving + self._pending + list(self._peers.values()):
            self._close(peer)


# ---------------------------------------------------------------------------
# Multicaster
# ---------------------------------------------------------------------------

class Multicaster(object):
    """Reads the image and multicasts it; the parent of all TCP servers.

    The spec's UDP server: the hands of a Course.  It runs in the main thread and
    selects on the image, its socket and its child.  Whenever it would just wait,
    it fills the next buffer.
    """

    ROUND = 4 << 20                     # bytes in a round at the most,
    LARGE_ROUND = 8 << 20               # or where MANY clients each cost time in a round,
    LONE_ROUND = 8 << 20                # or where only one is under way
    STUCK = 5.0                         # seconds without room to send a packet
    SILENT = 10.0                       # seconds of a producer, until it is said

    def __init__(self, options, source, signals):
        """options: of the command line; source: a Source; signals: a StopInOrder."""
        self.options, self.source, self.signals = options, source, signals
        self.sender = self.listener = self.session = self.tcp = self.course = None
        start_by = None if options.start_wait is None else monotonic() + options.start_wait
        self.roster = Roster(options.clients, options.min_clients, start_by, options.more, options.forever,
                             options.most, options.listed)
        self.link = SemLink()
        self.pacer = Pacer()
        self.failure = None
        self.started = None             # when the first round began
        self.ended = None               # when the last one did
        self._capacity, self._buffers = 0, []       # packets in a round at the most; Buffers that are not in use
        self._upcoming = None           # the buffer that is being filled
        self._accepting = None          # the accept step, until it is complete
        self._fed = 0.0                 # when the producer last gave anything, while it is waited for
        self._trouble = None            # the last that was told
        self._news = False              # there are steps that the TCP servers do not know of

    def _open(self):
        """Check that all that it takes can be had here.  Raises Failure."""
        options = self.options
        try:
            self.sender = DatagramSender(options.local_ip, options.group, options.port,
                                         options.ttl, options.datagrams)
        except OS_ERRORS as error:
            raise Failure('cannot multicast to %s from %s: %s' % (
                options.group, options.local_ip, explain(error)), USAGE)
        self.listener = self._listen(options.port)
        self._prepare()

    def _prepare(self, held=()):
        """Make all that serves the image of the source; held: connections of clients that have waited for it."""
        options, source = self.options, self.source
        payload = payload_for(self._mtu(options.mtu))
        self.session = Session(options, payload, options.name or source.name, source.size or options.size, source.image(),
                               self.sender.sock.getsockname(), source.again,
                               source.replaced if options.forever and source.path is not None else None)
        self.tcp = TcpServer(self.session, self.roster, self, self.link.spawn(), self.listener, held=held)
        dialect = self.session.dialect
        self.roster.again = dialect.greets and source.again
        size = (self.LARGE_ROUND if options.clients >= MANY
                else self.LONE_ROUND if dialect.window == 1 else self.ROUND)
        capacity = options.buffer_packets or size // payload
        checks = () if self.session.digest else dialect.checks
        self._capacity, self._buffers = capacity, [
            Buffer(payload, 0, self.session.salt, checks) for _ in range(dialect.window + 1)]
        course = functools.partial(Rehearsal, options.rehearsal, self.sender.mtu) if options.rehearsal else Course
        self.course = course(self, self.roster, dialect, payload, capacity, options.rate,
                             options.min_rate, self.session.unicast, self.session.repair_salt,
                             self._last_word, options.allow_empty,
                             Chain(dialect) if dialect.talks and options.chain != 'never' else None,
                             UNLIMITED if options.forever else options.linger, source.size or options.size)
        if options.rehearsal:
            source.over = self.course.enough

    def _mtu(self, wanted):
        egress = self.sender.mtu
        if wanted is None:
            return min(1500, egress)
        if wanted > egress:
            raise Failure('--mtu %d is larger than that of the interface, %d'
                          % (wanted, egress), USAGE)
        return wanted

    @staticmethod
    def _listen(port):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(('', port))
            listener.listen(1024)
        except OS_ERRORS as error:
            listener.close()
            raise Failure('cannot listen on TCP port %d: %s; give another PORT to '
                          'server and clients' % (port, explain(error)), USAGE)
        listener.setblocking(False)
        return listener

    # ---- the whole

    def run(self):
        """Serve the image; returns an exit code.  Raises Failure if it cannot begin."""
        with uninterruptible:
            self._open()
        if self.options.forever:
            self.signals.wind_up, self.signals.hurry = self._wind_up, self._hurry
        try:
            self.failure = self._serve()
            self.signals.over()         # from here on the verdict stands
        except Interrupted as error:
            self.failure = 'stopped by %s' % error
        self.ended = monotonic()
        self.source.end()
        self.roster.end()
        if self.failure:
            self.do(Step('abort', message=self.failure))
            self._tell_child()
        self.link.close()
        for thread in self._threads():
            thread.join(2 * FAREWELL_TIME)
        return self._verdict()

    def _serve(self):
        """Serve the image; returns None, or why not."""
        try:
            unicast = self.session.unicast
            tell('unicast_started' if unicast else 'server_started', interface=self.options.interface,
                 address=self.options.local_ip, group=self.session.group, port=self.session.port, places=self.roster.places)
            if self.roster.hosts and self.roster.hosts.twice:
                tell('listed_twice', names=listed(self.roster.hosts.twice))
            if self.options.local_ip.startswith('127.') and not unicast:
                tell('only_here', address=self.options.local_ip)
            self._serve_image()
            while self.roster.renewing and not self.roster.closing:
                self._renew()
                self._serve_image()
            if self.course.deserted and not self.roster.served and not self.roster.forever:
                return self.tcp.failure or 'no client is left'
        except LinkClosed:
            return self.tcp.failure or 'the threads for TCP have ended'
        except Failure as error:
            return error.reason
        except Exception as error:      # pylint: disable=broad-except
            return internal_error(error)
        return None

    def _serve_image(self):
        """Serve one image until nobody is left who came for it.  Raises LinkClosed, Failure."""
        with uninterruptible:
            start_thread(self.tcp)
        self.source.start()
        self.course.begin()
        self._accepting = Step('accept')
        self.do(self._accepting)
        while self._accepting and not self.course.over:
            self._wait()
        if not self.started and not self.course.over:
            self.started = monotonic()
            if len(self.roster.everyone) < self.roster.places:
                tell('started_without', here=len(self.roster.everyone), places=self.roster.places)
            tell('transfer_started', mtu=self.sender.mtu, payload=self.session.payload,
                 way=self.sender.way)
        if not self.course.over:
            self.course.start()
        while not self.course.over:
            sending = self.course.next()
            if sending:
                self._multicast(sending)
                self._wait(monotonic())
            else:
                self._wait()

    def _renew(self):
        """Another image is there for those who came last.  Raises Failure."""
        self.link.close()
        for thread in self._threads():
            thread.join(2 * FAREWELL_TIME)
        self.source.close()
        options, held = self.options, self.tcp.held
        with uninterruptible:
            self.source = Source(options.input, None, not options.no_digest)
            self.link, self._upcoming, self._accepting = SemLink(), None, None
            self.roster.renewing = self.roster.closed = False
            self._prepare(held)
        tell('renewed', name=self.source.name, size=self.source.size)

    def _wind_up(self):
        """Serve those who are here, and nobody else."""
        self.roster.hurry = self.roster.closing = True
        tell('wind_up', here=len(self.roster.here))

    def _hurry(self):
        """Begin with those who are here."""
        self.roster.hurry = bool(self.roster.here)

    def _last_word(self, **more):
        """The BYE that ends a good session; more: what else it has."""
        size, digest, vouchers = self.source.bytes, self.source.digest(), self.session.vouchers
        proof = {'proof': hexadecimal(vouchers.of_end(size, digest))} if vouchers else {}
        return self.session.dialect.bye(
            ok=True, bytes=size, sha256=hexadecimal(digest) if self.session.digest else None, **dict(proof, **more))

    def _threads(self):
        thread = self.tcp if self.tcp.ident else None
        while thread:
            yield thread
            thread = thread.child

    def _verdict(self):
        """Say how it went; returns the exit code."""
        roster, course = self.roster, self.course
        wrong = [member for member in roster.everyone if faults(findings_of(self, member))]
        failed = wrong + [member for member in roster.everyone if member.outcome != 'complete']
        served = roster.served - len(wrong)
        complete = roster.all_served and not failed and all(why == UNINVITED for _, why in roster.refused)
        if complete:
            self.failure = None         # it came too late to matter
        if course.data and not course.multicasting and not course.unicast:
            course.warn_of_silence()
        code = OK if complete else PARTLY if served > 0 else FAILED
        tell('server_ended', server=self, code=code, served=roster.served)
        return code

    def close(self):
        """Leave nothing behind; can be called at any time."""
        self.source.end()
        self.link.close()
        if self.tcp and not self.tcp.ident:
            self.tcp.link.close()
        for end in [self.listener, self.sender, self.source] + (self.tcp.held if self.tcp else []):
            if end:
                end.close()

    # ---- the hands of the course

    now = staticmethod(monotonic)

    def do(self, step):
        """Have the TCP servers do a step."""
        self.tcp.inbox.append(step)
        self._news = True

    def _tell_child(self):
        """Have the TCP servers look at all the steps that came together."""
        if self._news:
            self._news = False
            self.link.release_child()

    def fill(self, base, limit, place):
        """Begin to fill a buffer that is not in use, from a place in the image on."""
        self.source.seek(place)
        buffer = self._buffers.pop()
        if limit > buffer.capacity:     # the first rounds are short, and so are many images
            room = limit if 4 * limit < self._capacity else self._capacity
            buffer = Buffer(buffer.payload, room, buffer.salt, buffer.checks)
        buffer.start(base, 0, 0)
        buffer.limit = limit
        self._upcoming, self._fed = buffer, None

    def digest(self, part):
        """The image's digest through a part; b'' without digests."""
        return self.source.digest(part + 1)

    def release(self, buffer):
        """It is not in use any more."""
        if buffer.capacity:
            self._buffers.append(buffer)

    def leave_room(self, size):
        """So many bytes go by TCP: let them have the line."""
        self.pacer.leave_room(size)

    def _multicast(self, sending):
        """Multicast what the course wants, and tell it when that is done."""
        buffer, last, size = sending.buffer, sending.last, sending.buffer.slot + UDP_OVERHEAD
        marks, place, stuck = [], 0, None       # marks: (packets, when they were sent)
        head = Round.head_of(last)[1]
        while place < last:
            self.pacer.most = sending.speed.burst
            self.pacer.rate = sending.speed.head_rate if place < head else sending.speed.rate
            marks.append((place, monotonic()))
            done = self.sender.send(buffer, place,
                                    min(last, place + self.pacer.burst(size)))
            if done == place:
                marks.pop()             # they leave later
                stuck = stuck or monotonic() + (self.STUCK if self.course.multicasting else 0)
                if monotonic() > stuck:
                    self.sender.trouble = 'the kernel takes no packets'
                    break
                self._wait(until=stuck + TICK, sender=True)
                continue
            stuck = None
            until = self.pacer.sent((done - place) * size)
            if place < head <= done and sending.speed.head_rate > sending.speed.rate:
                # What was sent too early is somebody else's part of the line now.
                self.pacer.rate = sending.speed.rate
                until = self.pacer.leave_room(head * size * (1 - sending.speed.rate / sending.speed.head_rate))
            place = done
            if until > monotonic():
                self._wait(until)
        done = sending.underway.round
        if buffer is done.buffer and last:
            looking = sending.speed.head_rate > sending.speed.rate
            done.head = self._departure(marks, Round.head_of(last), size) if looking else None
            done.tail = self._departure(marks, Round.tail_of(last), size) or min(1e12, sending.speed.rate)
        self.course.sent(sending)

    @staticmethod
    def _departure(marks, train, size):
        """bit/s at which the packets of a train were sent; None if they went at once."""
        within = [mark for mark in marks if train[0] <= mark[0] < train[1]]
        if len(within) < 2 or within[-1][1] <= within[0][1]:
            return None
        return (within[-1][0] - within[0][0]) * size * 8 / (within[-1][1] - within[0][1])

    def trouble(self):
        """Why packets could not be sent lately, if that is news."""
        trouble, self.sender.trouble = self.sender.trouble, None
        news = trouble if trouble != self._trouble else None
        self._trouble = trouble or self._trouble
        return news

    def _look(self):
        """Take what the TCP servers have done."""
        while self.tcp.results:
            step, answers = self.tcp.results.popleft()
            if step is self._accepting:
                self._accepting = None
            else:
                self.course.complete(step, answers)
        self.course.hear()

    def _wait(self, until=None, sender=False):
        """Fill the next buffer until a time (seconds on the monotonic clock), until there is
        room in the socket, or, without either, until there may be something to multicast.

        Raises LinkClosed at once when the TCP servers have ended.
        """
        looked = False
        while True:
            self._tell_child()
            now = monotonic()
            tell.look(now)
            if self.course.look(now) and until is None:
                return
            timeout = TICK              # lest a signal that another thread took goes unheard
            if until is not None:
                timeout = max(0, until - now)
                if looked and not timeout:
                    return
            looked = True
            busy = self.course.busy
            if busy:
                timeout = 0
            reads = [self.link.child_fd]
            filling = bool(self._upcoming)
            if filling and self.source.drained:     # its command is to end; nothing tells but a look
                timeout = min(timeout, Command.TURN)
            elif filling:
                reads.append(self.source)
            try:
                readable, writable, _ = select.select(reads, [self.sender] if sender else [], [], timeout)
            except OS_ERRORS as error:
                if errno_of(error) != errno.EINTR:
                    raise
                continue
            if self.link.child_fd in readable:
                try:
                    self.link.wait_child()
                except LinkClosed:
                    self._look()
                    raise
                self._look()
            if writable:
                return
            if filling and (self.source in readable or self.source.drained):
                self._fill(now)
            elif not readable:
                self.source.look()
                if filling and until is None and self.course.idle and not self._accepting:
                    self._look_at_producer(now)
            if busy:
                self.course.work()
            if until is None and (readable or busy):
                self._tell_child()
                return

    def _fill(self, now):
        """Read on in the image."""
        buffer = self._upcoming
        buffer.fill(self.source)
        self._fed, self.roster.waiting = now, None
        if buffer.full:
            self._upcoming = None
            self.course.filled(buffer)

    def _look_at_producer(self, now):
        """Say, here and at the clients, that only what makes the image is waited for."""
        self._fed = self._fed or now
        if now - self._fed > self.SILENT and not self.roster.waiting:
            self.roster.waiting = 'what makes the image'
            tell('producer_silent', seconds=now - self._fed)

    # ---- what the readers of the events want to know

    def status(self, now):
        """A Status of the transfer; None before there can be one."""
        return server_status(self, now) if self.course else None

    def hosts(self):
        """A line on each client."""
        lines = []
        for member in self.roster.here:
            lacks = lacks_of(self, member)
            lines.append('%s: %s, lost %s%s' % (member, member_in_words(member), counted(member.lost, 'packet'),
                                                ', lacks ' + amount(lacks) if lacks else ''))
        return lines + ['%s: it has not come' % name for name in self.roster.missing if name]

    def debtors(self):
        """The clients for whom the oldest steps of the threads wait."""
        return [member for thread in self._threads() for member in thread.window.debtors()]

    def report(self):
        """The keys of --report that are a server's."""
        return server_report(self)


# ---------------------------------------------------------------------------
# Fallback
# ---------------------------------------------------------------------------

class Place(object):
    """What a URL says: where to connect, securely or not, and what to ask for."""

    FORM = re.compile(r'(https?)://(\[[0-9a-fA-F:.]+\]|[^/:@?#\[\]\s]+)(?::([0-9]{1,5}))?((?:[/?][!-"$-~]*)?)(?:#.*)?$', re.IGNORECASE)

    def __init__(self, url):
        """Raises Failure, for wrong usage."""
        match = self.FORM.match(url)
        if not match:
            raise Failure('%s is not a URL such as https://host/image' % printable(url), USAGE)
        scheme, self.host, port, path = match.groups()
        self.secure = scheme.lower() == 'https'
        self.host = self.host.strip('[]')
        self.port = int(port) if port else 443 if self.secure else 80
        self.path = path if path.startswith('/') else '/' + path
        shown = '[%s]' % self.host if ':' in self.host else self.host
        self.authority = shown + (':%s' % port if port else '')
        self.url = '%s://%s%s' % (scheme.lower(), self.authority, self.path)

    def target(self, location):
        """The Place that a redirect from here leads to.  Raises Failure."""
        try:
            from urllib.parse import urljoin        # only here: it takes a while
        except ImportError:             # Python 2
            from urlparse import urljoin
        try:
            place = Place(urljoin(self.url, location))
        except (Failure, ValueError):
            place = None
        if not place or self.secure and not place.secure:
            raise Failure('%s redirects to %s, which is %s' % (
                printable(self.url), printable(location), 'not secure' if place else 'no URL of http or https'))
        return place


def names_host(certificate, host):
    """Whether a certificate, as SSLSocket.getpeercert() gives it, is one of that host: RFC 6125."""
    names = certificate.get('subjectAltName', ())
    if is_address(host) or ':' in host:
        return ('IP Address', host) in [tuple(pair) for pair in names]
    alternatives = [value for kind, value in names if kind == 'DNS'] or [
        value for part in certificate.get('subject', ()) for kind, value in part if kind == 'commonName' and not names]
    host = host.lower().rstrip('.')
    return any(name.lower() == host or name.startswith('*.') and '.' in name[2:]
               and host.partition('.')[2] == name[2:].lower() for name in alternatives)


def chance():
    """A random number from 0 to 1."""
    return to_int(os.urandom(4)) / (1 << 32)


class Unanswered(Exception):
    """A request did not bring all that was asked for: it is worth another try.

    seconds: for how long the server does not want to hear from us.
    """

    def __init__(self, reason, seconds=0):
        Exception.__init__(self, reason)
        self.seconds = seconds


class Fallback(object):
    """The way on by HTTP when a transfer fails: brings what is missing of an image into a Copy.

    What it brings is hashed, and where the server told digests they must be met, so only what lies
    behind the last of these is as HTTP has it.  Where the image went on from, the bytes before must be the same
    there; all requests must be answered from one version of it, and its length is to be what the server told.
    open() and fetch() are for the writer's thread, hang_up() for it or after its end.

    size        of the image, bytes; None: not known yet
    size_told   the same as the server told it
    told        through so many bytes there are digests of the server
    brought     bytes that came by HTTP
    writing_since   when it began to write some bytes, seconds; None: it does not
    """

    SPREAD = 3.0                        # seconds at the most before the first request: others may fall back at once
    LONGEST = 30.0                      # seconds at the most between two tries
    REDIRECTS = 10
    STARTS = 5                          # times that it starts over, at the most
    CHUNK = 256 << 10                   # bytes to read at once
    # Where Python does not know where this host has its certificates: before 2.7.9.
    BUNDLES = '/etc/pki/tls/certs/ca-bundle.crt', '/etc/ssl/certs/ca-certificates.crt', '/etc/ssl/ca-bundle.pem'

    def __init__(self, reason, url, cafile, copy, size, stall_timeout, patience):      # pylint: disable=too-many-arguments
        """reason: why it is needed; url, cafile: of the command line; copy: Copy, to which nobody else writes; size: as the server told it, or None; stall_timeout: seconds,
        0 for ever; patience: seconds to try without getting a byte more."""
        self.reason, self.place, self._cafile, self._copy = reason, Place(url), cafile, copy
        self.size_told, self._stall, self._patience = size, stall_timeout, patience
        self.size = None
        self.told = self.brought = 0
        self.writing_since = None
        self._version = None            # what tells this version of the image from others
        self._connection = self._response = self._fd = None
        self._next = None               # which byte of the image comes next from it; None: none does
        self._over = threading.Event()
        self._since = None              # when the first try failed since something came
        self._tries = 0
        self._anew = False              # it starts over
        self._endless = False           # the answer does not say how long it is
        self._starts = 0

    def report(self):
        """For --report."""
        return {'reason': self.reason, 'url': self.place.url, 'bytes': self.brought, 'size': self.size,
                'verified': min(self.told, self.size or 0), 'size_told': self.size_told is not None}

    def open(self):
        """Wait for a while, and reach the image; nothing is written.  Raises Failure."""
        copy = self._copy
        copy.go_alone()
        self._drop(copy.meet())
        self.told = copy.told
        self._over.wait(self.SPREAD * chance())
        while True:
            try:
                self._ask(copy.held.prefix, None, copy.last_bytes())
                break
            except Unanswered as error:
                self._wait(error)
        self._anew = False
        tell('fallback_found', size=self.size, count=copy.bytes)

    def fetch(self):
        """Bring all that is missing, and verify what can be.  Raises Failure."""
        copy = self._copy
        while True:
            for start, stop in copy.held.missing(0, self.size):
                self._bring(start, stop)
                break                   # what is missing may be another by now
            else:
                self.hang_up()
                if not self._drop(copy.meet(self.size)):
                    break
        if copy.verified != self.size:
            raise Failure('the image has %d bytes, not %d' % (copy.verified, self.size))

    def close(self):
        """Come to an end soon."""
        self._over.set()
        fd = self._fd
        if fd is not None:              # not by the socket, which would forget that there is TLS
            LIBC.shutdown(fd, socket.SHUT_RDWR)

    def hang_up(self):
        """No more of this answer."""
        ends, self._connection, self._response = (self._response, self._connection), None, None
        self._fd = self._next = None
        for end in ends:
            if end:
                end.close()

    def _drop(self, pair):
        """Bytes that do not fit what the server told are to come again; returns whether there are any.  Raises Failure."""
        if pair is None:
            return False
        if self._copy.doubted.touches(*pair) or not self._copy.sink.seeks:
            raise self._another('its bytes %d to %d do not fit the server\'s SHA-256' % pair)
        tell('doubted', count=pair[1] - pair[0])
        self._copy.drop(*pair)
        return True

    def _bring(self, start, stop):
        """Bring these bytes, however often it breaks.  Raises Failure."""
        while start < stop:
            try:
                if self._next != start:
                    self._ask(start, stop)
                data = self._read(min(self.CHUNK, stop - start))
            except Unanswered as error:
                self._wait(error)
                if self._anew:          # so all is to come
                    self._anew = False
                    return
                continue
            self.writing_since = monotonic()
            self._copy.fill(data, start)
            self.writing_since = None
            start += len(data)
            self.brought += len(data)
            self._since, self._tries = None, 0
        if self._endless and stop == self.size and self._next == stop:
            try:
                self._read(1)
            except Unanswered:
                return
            raise self._another('of more than %d bytes' % self.size)

    def _wait(self, error):
        """Before the next try.  Raises Failure when there was nothing for too long."""
        self.hang_up()
        now = monotonic()
        self._since = self._since or now
        left = self._since + self._patience - now
        if left <= 0 and self._tries or self._over.is_set():
            raise Failure('%s: %s' % (printable(self.place.url), error))
        self._tries += 1
        seconds = min(self.LONGEST, 2.0 ** self._tries / 4) * (0.5 + chance() / 2)
        seconds = min(left, error.seconds + seconds)            # once more when the time is over
        if not self._anew:              # else that was told
            tell('fallback_waits', reason=str(error), seconds=seconds)
        self._over.wait(seconds)

    # ---- HTTP

    def _ask(self, start, stop, known=b''):
        """Ask for the image from `start` on, behind bytes that are `known`.  Raises Failure, Unanswered."""
        self.hang_up()
        first = start - len(known)
        headers = {}
        if first:
            headers['Range'] = 'bytes=%d-%s' % (first, '' if stop is None else stop - 1)
            if self._version and self._version[0]:
                headers['If-Range'] = self._version[0]
        place = self.place
        for _ in range(self.REDIRECTS):
            response = self._request(place, headers)
            if response.status not in (301, 302, 303, 307, 308):
                break
            location = response.getheader('Location')
            self.hang_up()
            if not location:
                raise Failure('%s redirects to nowhere' % printable(place.url))
            place = place.target(location)
        else:
            raise Failure('%s redirects too often' % printable(self.place.url))
        self._take_answer(response, first)
        while known and self._next is not None:
            data = self._read(len(known))
            different, known = data != known[:len(data)], known[len(data):]
            if different:
                raise self._another('its bytes %d to %d differ from what is here' % (first, start))

    def _take_answer(self, response, first):
        """The image, or part of it, is coming, or not.  Raises Failure, Unanswered."""
        url, status = printable(self.place.url), response.status
        if status in (408, 429) or status >= 500:
            seconds = response.getheader('Retry-After') or ''
            raise Unanswered('HTTP status %d' % status, float(seconds) if re.match('[0-9]+$', seconds) else 0)
        found = re.match(r'bytes (?:(\d+)-\d+|\*)/(\d+|\*)$', (response.getheader('Content-Range') or '').strip())
        size = found.group(2) if found else None
        if status == 200:
            size = response.getheader('Content-Length')
        elif status not in (206, 416) or not found or status == 206 and found.group(1) != str(first):
            raise Failure('%s: HTTP status %d %s' % (url, status, printable(response.reason)))
        if (response.getheader('Content-Encoding') or 'identity') != 'identity':
            raise Failure('%s: it comes in an encoding, which was not asked for' % url)
        size = int(size) if size and size.isdigit() else self.size_told
        if size is None:
            raise Failure('%s: it does not say how long the image is' % url)
        tag, date = response.getheader('ETag'), response.getheader('Last-Modified')
        strong = tag if tag and not tag.startswith('W/') else None
        version = strong or date, tag, date, size
        if self._version and status != 416 and self._version != version or self.size not in (None, size):
            self._start_over('the image at %s was replaced' % url, version)
        self._check_size(size)
        self.size, self._version = size, version if status != 416 else self._version
        if status == 416:
            if first != size:
                raise Failure('%s: HTTP status 416, with %d of %d bytes here' % (url, first, size))
            return                      # there is none behind it
        if status == 200 and first:
            self._start_over('%s gives no part of the image, only all of it' % url, version)
        self._next = first
        self._endless = status == 200 and response.getheader('Content-Length') is None

    def _check_size(self, size, anew=False):
        """Raises Failure unless the image can have that size; anew: whatever else than the server's is here."""
        most = max([self.told] + [stop for _, stop in self._copy.held if not anew])
        if self.size_told not in (None, size) or most > size:
            raise self._another('of %d bytes, not %s%d' % (
                size, '' if self.size_told is not None else 'at least ', most if self.size_told is None else self.size_told))

    def _another(self, how):
        """A Failure: what is here and what is there are not the same image."""
        return Failure('%s has another image: %s%s' % (
            printable(self.place.url), how,
            ' (some of it was left by an earlier run, which does not count without --resume)' if self._copy.resumed else ''))

    def _start_over(self, reason, version):
        """All is to come anew, of that version.  Raises Failure where that cannot be, else Unanswered."""
        if not self._copy.sink.seeks and self._copy.bytes:
            raise Failure(reason + ', and some of the image is written')
        self._starts += 1
        if self._starts > self.STARTS:
            raise Failure('%s, for the %dth time' % (reason, self._starts))
        self._check_size(version[-1], anew=True)
        tell('fallback_anew', reason=reason)
        self._copy.fill_anew()
        self.size, self._version, self._anew, self.brought = version[-1], version, True, 0
        raise Unanswered(reason)

    def _read(self, size):
        """Bytes that come next, at most so many.  Raises Unanswered."""
        try:
            data = self._response.read(size)
        except self._broken() as error:
            raise Unanswered(self._in_words(error))
        if not data:
            raise Unanswered('the connection ended early')
        self._next += len(data)
        return data

    def _request(self, place, headers):
        """The answer to a request, without its body.  Raises Failure, Unanswered."""
        library = self._library()
        timeout = self._stall or None
        try:
            self._connection = connection = library.HTTPConnection(place.host, place.port, timeout=timeout)
            connection.sock = socket.create_connection((place.host, place.port), timeout)
            self._fd = connection.sock.fileno()
            if place.secure:
                try:
                    connection.sock = self._secure(connection.sock, place.host)
                except ValueError as error:         # until Python 3.6: the certificate is another's
                    raise Failure('%s: %s' % (printable(place.url), error))
            if self._over.is_set():
                raise Unanswered('stopped')
            connection.putrequest('GET', place.path, skip_host=True, skip_accept_encoding=True)
            for name, value in [('Host', place.authority), ('User-Agent', 'kmcast/' + __version__),
                                ('Accept-Encoding', 'identity'), ('Connection', 'close')] + sorted(headers.items()):
                connection.putheader(name, value)
            connection.endheaders()
            self._response = connection.getresponse()
            return self._response
        except self._broken() as error:
            if 'CERTIFICATE' in str(error).upper():
                raise Failure('%s: %s' % (printable(place.url), self._in_words(error)))
            raise Unanswered(self._in_words(error))

    def _secure(self, sock, host):
        """TLS with that host, which proves who it is.  Raises OS_ERRORS, Failure."""
        import ssl                      # only here: it takes a while, and not every Python has it
        if hasattr(ssl, 'create_default_context'):
            try:
                context = ssl.create_default_context(cafile=self._cafile)
            except OS_ERRORS as error:
                raise Failure('cannot read %s: %s' % (self._cafile, explain(error)))
            if sys.version_info[0] > 2:
                return context.wrap_socket(sock, server_hostname=host)
            context.check_hostname = False          # it knows of no addresses; we look below
            secure = context.wrap_socket(sock, server_hostname=host)
        else:
            secure = self._secure_by_old_means(sock)
        if not names_host(secure.getpeercert(), host):
            raise Failure('the certificate is not one of %s' % printable(host))
        return secure

    def _secure_by_old_means(self, sock):
        """The same where Python is older than 2.7.9.  Raises OS_ERRORS, Failure."""
        import ssl
        cafile = self._cafile or ([name for name in self.BUNDLES if os.path.exists(name)] + [None])[0]
        if not cafile:
            raise Failure('this host has no certificates to know others by; give --cafile FILE')
        # pylint: disable=no-member
        return ssl.wrap_socket(sock, cert_reqs=ssl.CERT_REQUIRED, ca_certs=cafile, ssl_version=ssl.PROTOCOL_SSLv23)

    @staticmethod
    def _library():
        """What speaks HTTP; only here: it takes a while."""
        try:
            import http.client as library
        except ImportError:             # Python 2
            import httplib as library
        return library

    def _broken(self):
        """What is raised when a connection breaks."""
        return OS_ERRORS + (self._library().HTTPException,)

    def _in_words(self, error):
        if isinstance(error, socket.timeout):
            return 'nothing came for %g s' % self._stall
        return printable(explain(error) if isinstance(error, OS_ERRORS) else '%s %s' % (type(error).__name__, error))


# ---------------------------------------------------------------------------
# Client
# ---------------------------------------------------------------------------

class Client(object):
    """Receives one image: the hands of a ClientWindow."""

    NAP = 0.001                         # seconds, to let datagrams gather
    LONG_NAP = 0.008                    # the same for what comes by TCP, which nobody loses
    QUIET = 2.0                         # seconds without multicast until we warn
    RETRY = 0.03                        # seconds until we try to reach the server again
    ATTEMPT = 2.0                       # seconds that we try at the least, whatever --wait
    STATE_EVERY = 1.0                   # seconds between two words on what we do
    AT_ONCE = 512 << 10                 # bytes from the server in a turn
    LEAST_ROOM = 1 << 20                # bytes that any image has, for a rehearsal
    KEYED_RANGES = 150                  # that we hold, in a HELLO which is to be short

    def __init__(self, options, signals):
        """options: of the command line; signals: a StopInOrder."""
        self.options, self.signals = options, signals
        self.sink = Sink(options.output, options.pipe, options.resume)
        self.copy = None                # Copy, once the sink is open
        self.server = None              # Connection
        self.dialect = None             # until the server's is known
        self.receiver = None            # DatagramReceiver
        self.window = None              # ClientWindow
        self.relay = None               # Relay
        self.writer = None
        self.fallback = None            # Fallback, once it is gone on by HTTP
        self.image = {}                 # of WELCOME: name, size
        self.failure = None
        self.started = None             # when the first round was announced
        self.ended = None
        self.reason = None              # why the server could not be reached so far
        self.overflows = None           # datagrams lost in this host
        self.unicast = False            # no multicast is to be expected: the server said so, or it is forged
        self.deaf = False               # all comes by TCP, and the user was told
        self.refused = False            # the server said BYE
        self.rehearsal = False          # nothing is written: the server said so,
        self.tried = {}                 # and so it was tried what could be, by the names of FIGURES and FACTS
        self.wrong = None               # with how multicast is heard then: a key of ADVICE
        self.says = {}                  # what the server said of its state
        self.greeting = self.vouchers = None        # with a key
        self._again = False             # the server can bring what was missed, if the connection breaks
        self._give_up_at = None         # when to try no more to come back, seconds
        self._back_at = self._had = 0   # when we last came back, and the bytes that we had
        self._group = self._source = None           # (address, port) of the multicast, and of its sender
        self._stall_timeout = 0
        self._flowing = False           # data has come, so the sink has been started
        self._trickles = False          # what comes by TCP is less than is worth a turn
        self._fields = None             # of the server's last BYE
        self._carried = (0, 0)          # packets by multicast and by TCP, at the last look
        self._heard_at = None           # when the first of these last grew
        self._output = (0, 0)           # bytes written, and when that last changed
        self._owing_since = self._next_state = None
        self._shown = 0                 # bytes written when the server last heard from us

    # ---- the whole

    def run(self):
        """Receive the image; returns an exit code.  Raises Failure."""
        try:
            try:
                self._until_signalled(self._receive)
            except Failure as error:
                if not self.options.fallback or self.rehearsal or isinstance(error, Final):
                    raise
                self._until_signalled(functools.partial(self._fall_back, error))
        except Failure as error:
            self.ended = monotonic()
            self.sink.end()
            self._say_bye(error)
            if not (self._flowing or self.window and self.window.begun) and error.code == FAILED:
                error.code = NOT_STARTED
            self.failure, self.refused = error.reason, isinstance(error, Refused)
            tell('client_ended', client=self, code=error.code)
            raise
        self.signals.over()
        self.ended = monotonic()
        if not self.fallback:
            self._say_done()
            self._see_follower_off()
        found = findings(self.wrong, self.figures(), self.window.payload) if self.rehearsal else []
        wrong = faults(found)
        code = FAILED if wrong else OK
        tell('client_ended', client=self, code=code)
        for _, words in found[len(wrong):]:
            tell('hint', text=words)
        if wrong:
            self.failure = 'the rehearsal failed: ' + '; '.join(words for _, words in wrong)
            tell('failed', reason=self.failure)
        return code

    def _until_signalled(self, work):
        """Do that, after which the image is in place.  Raises Failure."""
        try:
            work()
            self.signals.over()         # from here on the verdict stands
        except ProtocolError as error:
            raise Failure('protocol error of the server: %s' % error)
        except LinkClosed:
            raise self.writer.failure or Failure('the writer ended')
        except Interrupted as error:
            if self.sink.abandon():
                raise Final('stopped by %s' % error)
            self._await_end()           # too late to stop: the image is taking its place

    def _receive(self):
        self.copy = Copy(self.sink.open(), self.options.expect_sha256 is not None)
        self._connect()
        while True:
            try:
                self._transfer()
                if self._complete():
                    break
            except (Lost, Refused) as error:
                self._come_again(error)
        self._finish()

    def _fall_back(self, error):
        """Complete the image by HTTP, as the transfer ended with that error.  Raises Failure, LinkClosed."""
        options, self.failure = self.options, error.reason
        tell('falling_back', url=options.fallback, reason=error.reason)
        if self.server:
            self._say_bye(error)
        self._disconnect()
        stall = self._stall_timeout = STALL if options.stall_timeout is None else options.stall_timeout
        if self.writer and self.writer.is_alive():
            self._pause()
        else:                           # it found the transfer wrong
            if self.writer:
                self.writer.close()
            with uninterruptible:
                self.writer = Writer(self.copy, paused=True)
                start_thread(self.writer)
        self.fallback = Fallback(error.reason, options.fallback, options.cafile, self.copy, self.image.get('size'), stall, options.wait)
        try:
            self._have_done(self.fallback.open)
            if not self.fallback.size and not options.allow_empty:
                raise Failure(EMPTY)
            self._check_size(self.fallback.size)
            self.sink.expect(self.fallback.size)
            self._start()
            self.started = self.started or monotonic()
            self._have_done(self.fallback.fetch)
        except LinkClosed:
            failure = self.writer.failure or Failure('the writer ended')
            if isinstance(failure, Final):
                raise failure
            raise Failure('%s; and the fallback failed: %s' % (error.reason, failure.reason),
                          FAILED if self._flowing else error.code)
        self._check_whole()
        self.failure = None
        self.writer.commit()
        self._await_end()

    def _have_done(self, work):
        """Have the writer do that, and see that its output moves.  Raises Failure, LinkClosed."""
        self.writer.carry_out(work)
        self._await_writer(lambda: self.fallback.writing_since or monotonic())

    def _await_writer(self, since):
        """Wait until it is through, and see that its output moves; since(): since when it should, seconds.  Raises as above."""
        while not self.writer.through:
            if self._poll([(self.writer.link.child_fd, select.POLLIN)], TICK):
                self.writer.link.wait_child()
            self._look_at_output(since())

    def close(self):
        """Leave nothing behind; can be called at any time."""
        if self.fallback:
            self.fallback.close()
        if self.writer and self.sink.journal:       # which it may be about to add to
            self.writer.close()
        self.sink.close()
        if self.writer:
            self.writer.close()
        if self.fallback:
            self.fallback.hang_up()
        self._disconnect()

    def _disconnect(self):
        if self.relay:
            self.relay.close()
        if self.server:
            self.server.close()
        if self.receiver:
            self.receiver.close()
            self.receiver = None

    def _say_bye(self, failure):
        """Tell the server why; if it does not listen, it learns it from the connection's end."""
        if (self.fallback or not self.dialect or not self.dialect.talks or not self.server.open
                or isinstance(failure, (Lost, Refused))):
            return
        try:
            self.server.leave(self.dialect.bye(ok=False, reason=failure.reason))
            while self.server.outgoing.count and monotonic() < self.server.leaving:
                self._poll([(self.server, select.POLLOUT)], 0.1)
                self.server.flush()
                self.server.hang_up()
        except Gone:
            pass

    def _say_done(self):
        """The image is ours: say so, if the server is still there."""
        try:
            if self.dialect.talks:
                self.server.outgoing.put_tail(self.dialect.state(busy=None, **self.figures()))
            if self.greeting:
                self.server.outgoing.put_tail(self.greeting.prove(Greeting.DONE))
            self.server.send(self.dialect.done(END, (0,) * 5))
            while self.server.outgoing.count:
                self._check_stall()
                self._poll([(self.server, select.POLLOUT)], TICK)
                self.server.flush()
        except (Gone, Lost) as error:
            tell('server_not_told', reason=getattr(error, 'reason', str(error)))

    @staticmethod
    def _poll(wanted, seconds):
        """poll(2): the file descriptors of (object or descriptor, events) that are ready."""
        poller = select.poll()
        for what, events in wanted:
            poller.register(what, events)
        return [fd for fd, _ in ready(poller, seconds)]

    # ---- the greetings

    def _connect(self, broken=None):
        """Reach the server and agree on a session; broken: how the connection before this one ended.  Raises Failure."""
        options = self.options
        deadline = self._give_up_at or monotonic() + options.wait
        tell('connecting', address=options.server_ip, port=options.port)
        said = None
        while True:
            attempt = min(GREETING_TIME, max(self.ATTEMPT, round(deadline - monotonic(), 1)))
            self._stall_timeout = min(attempt, options.stall_timeout or attempt)
            with uninterruptible:
                self.server = Connection(socket.socket(socket.AF_INET, socket.SOCK_STREAM),
                                         options.server_ip)
            self.dialect = None
            try:
                self._reach(attempt)
                self._greet()
                break
            except OS_ERRORS as error:
                self.reason = explain(error)
                if errno_of(error) == errno.ENETUNREACH:
                    self.reason += '; this host has %s' % described(interfaces())
            except Lost as error:
                self.reason = error.reason
            self.server.close()
            if monotonic() > deadline:
                raise broken or Failure('no kmcast server at %s port %d: %s' % (
                    options.server_ip, options.port, self.reason), NOT_STARTED)
            if self.reason != said:
                said = self.reason
                tell('no_server_yet', address=options.server_ip, port=options.port, reason=said,
                     seconds=max(0, deadline - monotonic()))
            tell.look(monotonic())
            time.sleep(self.RETRY)
        self._stall_timeout = options.stall_timeout
        if options.stall_timeout is None:
            # A server of the base protocol has no way to say that it is alive.
            self._stall_timeout = self.dialect.client_stall
        self.server.begin(self._stall_timeout)
        self.relay = Relay(self.window, self.server.sock.getsockname()[0], options.port, self._say, self._carry_out)
        self.relay.rehearsal = self.rehearsal
        self._join()
        if self.writer:
            self.writer.go_on()
            return
        with uninterruptible:
            self.writer = Writer(self.copy)
            start_thread(self.writer)

    def _come_again(self, error):
        """The connection broke, of which `error` tells: connect again, and go on.  Raises Failure, LinkClosed."""
        if not self._again or isinstance(error, Refused) and not error.again:
            raise error
        now, wait = monotonic(), self.options.wait
        if self._give_up_at is None or self.copy.bytes > self._had or now - self._back_at > wait:
            self._give_up_at = now + wait
        if now > self._give_up_at:      # it came back all the time, for nothing
            raise error
        tell('broken', reason=error.reason, seconds=self._give_up_at - now)
        self._disconnect()
        self.says, self._fields = {}, None
        self._pause()
        time.sleep(self.RETRY)
        self._connect(error)
        self._back_at, self._had = monotonic(), self.copy.bytes
        tell('back', count=self.copy.bytes)

    def _pause(self):
        """Let the writer finish what it has, and stop.  Raises Failure, LinkClosed."""
        now = monotonic()
        self.writer.pause()
        self._await_writer(lambda: now)
        self.writer.results.clear()     # of the rounds of the old connection

    def _reach(self, seconds):
        """Connect, in at most so many seconds.  Raises OS_ERRORS."""
        deadline, sock = monotonic() + seconds, self.server.sock
        sock.setblocking(False)
        number = sock.connect_ex((self.options.server_ip, self.options.port))
        while number in (errno.EINPROGRESS, errno.EALREADY) and monotonic() < deadline:
            tell.look(monotonic())
            if self._poll([(sock, select.POLLOUT)], min(TICK, deadline - monotonic())):
                number = self.server.reached()
        if number in (errno.EINPROGRESS, errno.EALREADY):
            number = errno.ETIMEDOUT
        number = number or self.server.reached()
        if number:
            raise socket.error(number, os.strerror(number))
        self.server.heard = monotonic()

    def _next_message(self, size_of):
        """The next message of the greetings.  Raises Lost, ProtocolError."""
        while True:
            self._check_stall()
            tell.look(monotonic())
            try:
                message = self.server.first(size_of)
            except Gone as error:
                raise Lost('lost the server: %s' % error)
            if message is not None:
                return message
            self._poll([(self.server, select.POLLIN)], TICK)

    def _greet(self):
        """Agree with the server.  Raises Lost, ProtocolError, Failure."""
        group_info = self._next_message(lambda head: GROUP_INFO.size)
        group, port, version = unpack_group_info(group_info)
        self._group, key = (group, port), self.options.key
        if version is None:
            if key:
                raise Failure('that server speaks the base protocol, which has no keys', NOT_STARTED)
            self.dialect = BaseDialect
            self._check_image(True)
            self._begin(None, payload_for(1500), checks=[plain_crc, c_sum])
            return
        if version != SESSION_VERSION:
            raise ProtocolError('it speaks version %d, and this kmcast version %d; run the same file '
                                'on all hosts' % (version, SESSION_VERSION))
        stall = self.options.stall_timeout
        hello = {'version': __version__, 'host': printable(socket.gethostname()),
                 'window': SessionDialect.window, 'relay': True, 'stall': STALL if stall is None else stall,
                 'seek': self.copy.sink.seeks, 'image': self.copy.image, 'who': self.copy.who,
                 'have': self.copy.held.to_list(self.KEYED_RANGES if key else Held.MOST)}
        if key:
            hello['nonce'] = hexadecimal(os.urandom(TOKEN_SIZE))
        hello = pack_frame(HELLO, hello)
        self._say_in_greeting(hello)
        self.dialect = SessionDialect
        welcome = self._hear_in_greeting(WELCOME)
        fields = unpack_frame(welcome[5:])
        if key:
            self._prove(key, (group_info, hello, welcome), fields)
        self._on_welcome(fields)

    def _say_in_greeting(self, message):
        try:
            self.server.send(message)
        except Gone as error:
            raise Lost('lost the server: %s' % error)

    def _hear_in_greeting(self, wanted):
        """The server's next message, which is of a kind that is wanted.  Raises Lost, ProtocolError, Refused."""
        kind = ALIVE
        while kind == ALIVE:
            message = self._next_message(lambda head: self.dialect.server_message_size(head, 0))
            kind = message[:1]
        if kind == BYE:
            raise refusal(unpack_frame(message[5:]))
        if kind != wanted:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        return message

    def _prove(self, key, said, fields):
        """Have the server prove that it holds the key, before anything that it says counts, and prove it, too."""
        if 'nonce' not in fields:
            raise Failure('that server has no key, and this client has one', NOT_STARTED)
        self.greeting = Greeting(key, *said)
        if not self.greeting.proven(Greeting.SERVER, self._hear_in_greeting(PROOF)):
            raise Failure(KEYS_DIFFER, NOT_STARTED)
        token_of(fields, 'nonce')
        self.vouchers = Vouchers(key, token_of(fields, 'seed'))
        if field(fields, 'digest', TEXT, optional=True) is None:
            raise ProtocolError('a key without digests')
        self._say_in_greeting(self.greeting.prove(Greeting.CLIENT))

    def _on_welcome(self, fields):
        field(fields, 'version', TEXT)
        salts = field(fields, 'salt', NUMBER), field(fields, 'repair_salt', NUMBER)
        payload = field(fields, 'payload', NUMBER)
        self.image = dict(name=field(fields, 'name', TEXT, optional=True),
                          size=field(fields, 'size', NUMBER, optional=True))
        digest = field(fields, 'digest', TEXT, optional=True)
        if not 16 <= payload <= payload_for(9000) or payload % 4:
            raise ProtocolError('a payload of %d bytes' % payload)
        if digest not in (None, 'sha256'):
            raise ProtocolError('an unknown digest, %s' % digest)
        if max(salts) > MASK:
            raise ProtocolError('a salt that is no 32-bit number')
        source = fields.get('source')
        if not (isinstance(source, list) and len(source) == 2 and isinstance(source[0], TEXT)
                and re.match(r'[0-9.]{7,15}$', source[0])
                and isinstance(source[1], NUMBER) and 0 < source[1] < 65536):
            raise ProtocolError('a frame without a proper "source"')
        self._source = str(source[0]), source[1]
        self._rehearse(fields.get('rehearsal') is True)
        self.unicast = fields.get('unicast') is True
        self._again = fields.get('again') is True
        self.server.alive_every = alive_every(stall_of(fields))
        self._check_image(digest is not None)
        self._say_lack(self._begin(name_of(fields, 'image'), payload, salts, digest is not None))
        if self.image['size'] is not None:
            self.sink.expect(self.image['size'])

    def _rehearse(self, rehearsal):
        """If this is a rehearsal, put what would be written nowhere, and take away what was made for it.  Raises Failure."""
        if self.window and rehearsal != self.rehearsal:
            raise Failure('the server has %s now' % ('a rehearsal, and no image,' if rehearsal else 'an image, and no rehearsal,'))
        if rehearsal and not self.rehearsal:
            self.rehearsal, options = True, self.options
            tell('rehearsal')
            self._try_output()
            options.expect_name = options.expect_size = options.expect_sha256 = None
            self.sink.close()
            self.sink = NoSink()
            self.copy = Copy(self.sink)

    def _try_output(self):
        """Find out whether there is room for the image, and how fast a file is written where it would be."""
        tried, room = self.tried, self.sink.room()
        if room is not None:
            tried['room'] = room
        if room is not None and room < (self.options.expect_size or self.LEAST_ROOM):
            tried['unwritable'] = 'there is room for %s only' % counted(room, 'byte')
        elif not self.sink.is_file:
            tell('untried')
        else:
            try:
                tried['write_speed'] = self.sink.trial(room)
                tell('tried', speed=amount(tried['write_speed']))
            except OS_ERRORS as error:
                tried['unwritable'] = explain(error)

    def _check_image(self, telling):
        """Before anything is written: is it the image that is expected?  Raises Failure.

        telling: whether the session can tell at its end, as it has digests, or its rounds come in order.
        """
        name, size, wanted = self.image.get('name'), self.image.get('size'), self.options.expect_name
        if wanted is not None and not fnmatch.fnmatchcase(name or '', wanted):
            raise Final('the image is %s, and not %s (--expect-name)' % (name or 'without a name', printable(wanted)))
        if size is not None:
            self._check_size(size)
        if self.options.expect_sha256 and not telling:
            raise Final('without digests (--no-digest of the server) nobody can tell whether --expect-sha256 is right')

    def _check_size(self, size):
        if self.options.expect_size not in (None, size):
            raise Final('the image has %s, and not %d (--expect-size)' % (
                counted(size, 'byte'), self.options.expect_size))

    def _begin(self, image, payload, salts=(0, 0), digest=False, checks=None):      # pylint: disable=too-many-arguments
        """A session begins; returns what we said that we hold, and do not: (start, stop) of each.  Raises Failure.

        image: its name, None in the base protocol; else as ClientWindow has it.
        """
        lost = self.copy.begin(image, digest)
        place = None if self.sink.seeks and image else self.copy.verified
        window = ClientWindow(self.dialect, payload, salts, digest, checks, place, self.vouchers)
        if self.window:
            window.take_over(self.window)
        elif self.copy.resumed:
            tell('resumed', count=self.copy.resumed)
        self.window = window
        return lost

    def _join(self):
        """Join the group.  Raises Failure."""
        group, port = self._group
        local_ip = self.options.local_ip or self.server.sock.getsockname()[0]
        try:
            with uninterruptible:
                self.receiver = DatagramReceiver(local_ip, group, port, self.window.payload,
                                                 self.options.datagrams, self._source)
        except OS_ERRORS as error:
            raise Failure('cannot join %s on %s: %s' % (group, local_ip, explain(error)))
        tell('unicast_connected' if self.unicast else 'connected', address=self.options.server_ip, group=group, local_ip=local_ip)
        tell('receiving', way=self.receiver.way, socket_buffer=self.receiver.socket_buffer,
             name=self.image.get('name') or 'without a name', size=self.image.get('size') or 'unknown')

    # ---- the rounds

    def _transfer(self):
        """Receive until the server's last word.  Raises Failure, ProtocolError, LinkClosed."""
        window, link = self.window, self.writer.link.child_fd
        tcp, udp = self.server.fileno(), self.receiver.fileno()
        ample = self.receiver.socket_buffer >= AMPLE
        control = select.poll()
        for fd in (tcp, link):
            control.register(fd, select.POLLIN)
        everything = select.poll()
        for fd in (tcp, link, udp):
            everything.register(fd, select.POLLIN)
        self._output = self._put, monotonic()
        self._heard_at = self.started and monotonic()
        relay, fds = self.relay, []
        relay.poll_with(control, everything)
        self._hear()                    # what came with the greetings
        while not window.over:
            if window.distrusts and udp is not None:
                everything.unregister(udp)
                udp = None
                self._listen_no_more()
            # Datagrams are taken before a round is answered for.
            if udp is not None and (udp in fds or window.deadline is not None):
                self._listen()
            now = monotonic()
            if relay.active:
                relay.turn(fds, now)
            self._carry_out(window.tick(now))
            self._look_at_clocks(now)
            wait = min(TICK, self.server.alive_every / 2, relay.STILL / 2 if relay.active else TICK)
            if window.deadline is not None:
                wait = max(0, min(wait, window.deadline - now))
            fds = [fd for fd, _ in ready(everything, wait)]
            if fds == [udp] and ample and window.deadline is None:
                # Let some more gather, unless somebody else has something to say.
                fds += [fd for fd, _ in ready(control, self.NAP)]
            elif fds and (relay.trickles or self._trickles) and set(fds) <= set(
                    relay.streams + [tcp] if self._trickles else relay.streams):
                time.sleep(self.LONG_NAP)
            if link in fds:
                self._look_at_writer()
            if tcp in fds:
                self._hear()
            if self.server.outgoing.count:
                self._flush()
        self.started = self.started or monotonic()  # an empty image has no rounds

    def _look_at_writer(self):
        """The writer may have something to say.  Raises LinkClosed."""
        try:
            self.writer.link.wait_child()
        finally:
            self._hear_writer()

    def _hear_writer(self):
        """Hear what has become of what the writer has."""
        window, writer = self.window, self.writer
        while writer.results:
            what, about = writer.results.popleft()
            if what == writer.WRITTEN:
                self._carry_out(window.written())
            elif what == writer.VERIFIED:
                self._carry_out(window.verified(about))
            elif what == writer.DAMAGED:
                self._carry_out(window.damaged(about))
            elif what == writer.DOUBTED:
                tell('doubted', count=sum(stop - start for start, stop in about))
                self._say_lack(about)

    def _say_lack(self, ranges):
        """Tell the server of what is not here after all."""
        for first in range(0, len(ranges), Held.MOST):
            self.server.outgoing.put_tail(self.dialect.lack([list(pair) for pair in ranges[first:first + Held.MOST]]))
        if ranges:
            self._flush()

    def _listen(self):
        """Take the datagrams that have arrived."""
        receiver, window, useful = self.receiver, self.window, False
        for _ in range(64):             # a flood must not keep us from TCP
            batches = receiver.receive(window.aim)
            if batches is None:
                break
            useful = window.take(batches, receiver.in_first, receiver.first, receiver.last) or useful
        if useful:
            self.server.heard = monotonic()
            window.listened(self.server.heard)

    def _listen_no_more(self):
        """Leave the group, which forgers have made useless."""
        self.overflows, self.unicast = self.receiver.overflows(), True
        self.receiver.close()

    def _hear(self):
        """Take what has arrived by TCP."""
        window, server = self.window, self.server
        try:
            more, got = True, 0
            while more and (got < self.AT_ONCE or server.incoming.count):       # a follower waits for some of it
                if window.wants is not None:
                    room = len(window.wants)
                    size = server.read_into(window.wants)
                    got, more = got + size, size == room
                    self._carry_out(window.filled(size))
                    self._trickles = not more and window.wants is not None
                else:
                    for message in server.messages(window.size_of):
                        self._carry_out(window.heard(message, monotonic()))
                    more = window.wants is not None
        except Gone as error:
            raise Lost('lost the server: %s' % error)

    def _flush(self):
        try:
            self.server.flush()
        except Gone as error:
            try:
                self._hear()            # it may have said why before it hung up
            except (Lost, ProtocolError):
                pass
            raise Lost('lost the server: %s' % error)

    def _carry_out(self, todo):
        """Do what the window wants.  Raises Failure."""
        for verb, argument in todo:
            if verb == 'send':
                self.server.outgoing.put_tail(argument)
                self._flush()
            elif verb == 'write':
                self.writer.give(argument)
            elif verb == 'differs':
                self.writer.doubt(argument)
            elif verb == 'begin':
                self._start()
            elif verb == 'upstream':
                self.relay.follow(*argument)
            elif verb == 'follower':
                self.relay.serve(argument)
            elif verb == 'state':
                self.says = dict((key, field(argument, key, NUMBER)) for key in ('here', 'places', 'pass')
                                 if key in argument)
                self.says['waiting'] = field(dict({'waiting': None}, **argument), 'waiting', TEXT, True)
                if 'starts_in' in argument:         # a client that waits for the next pass
                    seconds = argument['starts_in']
                    good = isinstance(seconds, NUMBER + (float,)) and 0 <= seconds < 1 << 32
                    self.says['starts_in'] = seconds if good else None
            else:
                self._fields = argument

    def _say(self, message):
        """Tell the server of a neighbour, unless all has come."""
        if self.window.over:
            return
        told = self.server.told         # this is no sign of life
        self.server.outgoing.put_tail(message)
        self._flush()
        self.server.told = told

    def _look_at_clocks(self, now):
        """Say that we are alive, and give up who is not.  Raises Failure."""
        window = self.window
        if window.begun and not self.started:
            self.started = self._heard_at = now
        tell.look(now)
        self.sink.look()
        if self._put != self._output[0] or not window.writing:
            self._output = self._put, now
        owing = window.owing
        if self.dialect.talks or owing != 'writing':        # a server of the base protocol may be silent then
            self._check_stall()
        self._look_for_silence(now)
        if not owing:
            self._owing_since = self._next_state = None
            return
        if self._owing_since is None:
            self._owing_since, self._next_state = now, now + self.STATE_EVERY
        if owing == 'receiving':
            moved = self.server.heard > self.server.told
        elif owing in ('following', 'relaying'):        # that is for the server to judge
            moved = True
        else:
            moved = self._put != self._shown
            if self._stall_timeout and now - self._output[1] > self._stall_timeout:
                raise Final('the output has taken nothing for %g s' % self._stall_timeout)
        if moved:
            self._show_life()
        if now > self._next_state:
            self._next_state = now + 5 * self.STATE_EVERY
            self._say_state(owing)

    def _show_life(self):
        """Tell the server that something moved here since it last heard from us."""
        told = self.server.told
        if self.dialect.talks:
            try:
                self.server.show_life(ALIVE)
            except Gone:
                pass                    # reading will tell why
        if self.server.told != told:
            self._shown = self._put

    @property
    def _put(self):
        """Bytes that the output has taken, or given back."""
        return self.sink.written + self.copy.checked

    def _say_state(self, busy):
        """Tell the server what we do while it waits for us, and figures for its report."""
        if self.dialect.talks and not self.server.outgoing.count:   # else the last words are still on their way
            self.server.outgoing.put_tail(self.dialect.state(busy=busy, **self.figures()))
            self._flush()

    def figures(self):
        """What is worth to be told of this end, by the names of FIGURES."""
        figures = {'by_multicast': self.window.by_multicast, 'by_chain': self.window.by_chain,
                   'written': self.sink.written}
        if self.overflows is not None:
            figures['overflows'] = self.overflows
        if self.rehearsal:
            figures.update(self.tried, socket_buffer=self.receiver.socket_buffer, datagrams=self.receiver.way, **versions())
            round_trip = self.server.round_trip()
            figures.update({'round_trip': round_trip} if round_trip else {})
            passed = max(self.window.largest, self.window.payload if self.window.by_multicast else 0)
            figures.update({'packet': packet_of(passed)} if passed else {})
        return figures

    def _check_stall(self):
        """Raises Lost when the server has been silent for too long."""
        if self._stall_timeout and monotonic() - self.server.heard > self._stall_timeout:
            raise Lost('the server has been silent for %g s' % self._stall_timeout)

    def _look_for_silence(self, now):
        """Say when packets come by TCP only, and when multicast arrives again."""
        heard, repaired = self.window.by_multicast, self.window.by_tcp
        if self.unicast or (heard, repaired) == self._carried:
            return
        if heard != self._carried[0]:
            if self.deaf:
                tell('hears')
            self.deaf, self._heard_at = False, now
        elif not self.deaf and now - self._heard_at > self.QUIET:
            self.deaf = True
            tell('deaf', payload=self.window.payload, carrier='upstream' if self.relay.following else 'tcp')
        self._carried = heard, repaired

    # ---- the end

    def _complete(self):
        """Whether the server's last word has come, and all is here and verified.  Raises Failure, LinkClosed."""
        window, writer, copy, since = self.window, self.writer, self.copy, monotonic()
        if not window.over:
            return False
        self.relay.follow(0, None, None)
        while window.unwritten:
            self._wait_for_writer(since)
        if self._fields is None:
            if not copy.bytes and not self.options.allow_empty:
                raise Failure(EMPTY)
            return True
        size = field(self._fields, 'bytes', NUMBER)
        self.wrong = field(self._fields, 'wrong', TEXT, optional=True) if self.rehearsal else None
        digest = window.digest and digest_of(self._fields, 'sha256')
        if self.vouchers and not same(digest_of(self._fields, 'proof'), self.vouchers.of_end(size, digest)):
            raise Failure('the end is not vouched for: ' + NOT_VOUCHED)
        writer.end(size, digest)
        since, state_at = monotonic(), monotonic() + self.STATE_EVERY
        while not writer.through or writer.checking:
            self._wait_for_writer(since)
            if monotonic() > state_at:
                state_at = monotonic() + 5 * self.STATE_EVERY
                self._say_state('verifying')
        self._hear_writer()
        if copy.verified == size:
            return True
        if copy.bytes >= size or any(not copy.doubted.covers(*pair) for pair in copy.held.missing(0, size)):
            raise Failure('the image has %d bytes, not %d' % (copy.bytes, size))
        window.go_on()                  # what was in doubt is still to come
        return False

    def _finish(self):
        """All is here and verified: make it final.  Raises Failure."""
        self._check_whole()
        self._start()
        if not self.window.distrusts:
            self.overflows = self.receiver.overflows()
        self.writer.commit()
        self._await_end()

    def _check_whole(self):
        """All is here: is it what is expected?  Raises Failure."""
        self._check_size(self.copy.bytes)
        digest = self.copy.hash and self.copy.hash.hexdigest()
        if self.options.expect_sha256 not in (None, digest):
            raise Final('the image has the SHA-256 %s, and not %s (--expect-sha256)' % (digest, self.options.expect_sha256))

    def _start(self):
        """The first data has come, or will never."""
        if not self._flowing:
            self._flowing = True
            self.sink.start()

    def _wait_for_writer(self, since):
        """Wait until the writer has something to say, or for a while; it began to be waited for at `since`.

        Raises Failure where its output takes nothing, LinkClosed.
        """
        if self.writer.link.child_fd in self._serve_while([(self.writer.link.child_fd, select.POLLIN)]):
            self._look_at_writer()
        self._look_at_output(since)
        if self._put != self._shown:
            self._show_life()

    def _look_at_output(self, since):
        """Raises Failure when the output, which is waited for since then, has taken nothing for too long."""
        tell.look(monotonic())
        self.sink.look()
        if self._put != self._output[0]:
            self._output = self._put, monotonic()
        if self._stall_timeout and monotonic() - max(since, self._output[1]) > self._stall_timeout:
            raise Final('the output has taken nothing for %g s' % self._stall_timeout)

    def _await_end(self):
        """Wait until the image is final, however long it takes.  Raises Failure."""
        while self.writer.is_alive():
            tell.look(monotonic())
            self.sink.look()
            if self.fallback:
                self.writer.join(TICK)
                continue
            self._show_life()
            ended = self.writer.link.child_fd
            if not self.relay.active:
                self.writer.join(min(TICK, self.server.alive_every / 2))
            elif ended in self._serve_while([(ended, select.POLLIN)]):
                try:
                    self.writer.link.wait_child()
                except LinkClosed:      # in a moment it has
                    self.writer.join(TICK)
        if self.writer.failure:
            raise self.writer.failure

    def _serve_while(self, wanted):
        """Wait for what is wanted, and serve the follower meanwhile; returns descriptors that are ready."""
        active = self.relay.active
        seconds = min(TICK, self.server.alive_every / 2, self.relay.STILL / 2 if active else TICK)
        fds = self._poll(wanted + self.relay.descriptors(), seconds)
        if active:
            self.relay.turn(fds, monotonic())
        return fds

    def _see_follower_off(self):
        """The follower may still take from here what it lacks: wait for that, while it does."""
        since = monotonic()
        while self.relay.owes(monotonic(), since):
            self._serve_while([])

    # ---- what the readers of the events want to know

    def status(self, now):
        """A Status of the transfer."""
        return client_status(self, now)

    @staticmethod
    def hosts():
        """It knows of no other."""
        return []

    def report(self):
        """The keys of --report that are a client's."""
        return client_report(self)


# ---------------------------------------------------------------------------
# Report page
# ---------------------------------------------------------------------------

# One HTML page from reports.  Its charts are SVG, it has no script and takes nothing from anywhere.

PAGE = u"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
%(title)s
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --wash: #f3f5f7;
        --good: #1a7f37; --bad: #b42318; --blue: #0072b2; --sky: #56b4e9; --green: #009e73; --orange: #d55e00;
        --yellow: #e69f00; --pink: #cc79a7; --wait: #e69f0055; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e9ec; --soft: #9aa4ae; --line: #373e47; --wash: #1d2126; --good: #4ac26b;
          --bad: #ff8578; --blue: #4ba3d9; --sky: #b9dff5; --wait: #e69f0066; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #fff; --good: #1a7f37;
          --bad: #b42318; --blue: #0072b2; --sky: #56b4e9; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  tr, figure, li { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
       overflow-wrap: anywhere; }
main { max-width: 72em; margin: auto; padding: 1em; }
h1 { font-size: 1.5em; margin: .3em 0; } h2 { font-size: 1.2em; margin: 2em 0 .3em; border-top: 1px solid var(--line);
     padding-top: 1em; } h3 { font-size: 1em; margin: 1.4em 0 .3em; }
.good { color: var(--good); } .bad { color: var(--bad); } .good, .bad { font-weight: 600; }
.soft, th, .axis { color: var(--soft); font-size: .87em; font-weight: normal; }
a { color: var(--blue); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2em 1em; margin: .6em 0; }
dt { color: var(--soft); } dd { margin: 0; }
code { font: .93em ui-monospace, monospace; }
figure { margin: .5em 0; } svg { display: block; width: 100%%; }
.chart { display: grid; grid-template-columns: 5.5em minmax(0, 1fr); padding-right: 2em; }
.chart svg { height: 12em; background: var(--wash); }
.axis { position: relative; } .axis span { position: absolute; white-space: nowrap; }
.y span { right: .6em; transform: translateY(-50%%); } .x { grid-column: 2; height: 1.6em; }
.x span { transform: translateX(-50%%); }
.bar { height: .7em; background: var(--wash); }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .35em; background: var(--of); }
.keys span { margin-right: 1.2em; }
table { border-collapse: collapse; width: 100%%; } th { text-align: left; }
th, td { padding: .3em .8em .3em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:empty::before { content: "\\2013"; color: var(--soft); }
.wide { min-width: 10em; } .lead { min-width: 13em; } .lead:first-child { min-width: 17em; }
@media (max-width: 66em) {
  thead { display: none; } table, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1fr 1fr; padding: .6em 0; border-bottom: 1px solid var(--line); }
  td { border: 0; padding: .1em .5em .1em 0; min-width: 0; } td:empty { display: none; }
  td.wide, td.lead, td.lead:first-child { grid-column: 1 / -1; min-width: 0; } .number { text-align: left; white-space: normal; }
  td[title]::before { content: attr(title) ": "; color: var(--soft); font-size: .87em; } }
</style>
</head>
<body>
%(body)s
</body>
</html>
"""

COLORS = {'multicast': 'blue', 'coded': 'sky', 'chain': 'green', 'tcp': 'orange',
          'network': 'blue', 'output': 'yellow', 'silence': 'pink'}
PARTS = {'multicast': 'multicast', 'coded': 'repair by multicast', 'chain': 'from client to client', 'tcp': 'TCP'}


class Markup(type(u'')):
    """A text that is HTML already."""


def markup(value):
    """Anything as HTML; what comes from a report is a text, and stays one."""
    if isinstance(value, Markup):
        return value
    text = re.sub(u'[^\t\n -~\u00a0-\ud7ff\ue000-\ufffd]|[\u200b-\u200f\u2028-\u202e\u2060-\u206f]',
                  u'\ufffd', u'%s' % (value,))
    for character, entity in ((u'&', u'&amp;'), (u'<', u'&lt;'), (u'>', u'&gt;'), (u'"', u'&quot;'), (u"'", u'&#39;')):
        text = text.replace(character, entity)
    return Markup(text)


def element(name, *children, **attributes):
    """An element of HTML or SVG; class_ is class, stroke_width is stroke-width."""
    written = u''.join(u' %s="%s"' % (key.rstrip('_').replace('_', '-'), markup(value))
                       for key, value in sorted(attributes.items()) if value is not None)
    return Markup(u'<%s%s>%s</%s>' % (name, written, html_of(children), name))


def html_of(children):
    """What stands one behind the other."""
    return Markup(u''.join(markup(child) for child in children))


def as_number(value):
    """A number of a report; 0 for what is none."""
    good = isinstance(value, NUMBER + (float,)) and not isinstance(value, bool) and abs(value) < 1e18
    return value if good else 0


def objects_of(value):
    """The objects of a list in a report."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def parts_of(value):
    """[(name, number)] of an object in a report, the greatest first, without those that are 0."""
    parts = [(name, as_number(part)) for name, part in value.items()] if isinstance(value, dict) else []
    return sorted([part for part in parts if part[1] > 0], key=lambda part: (-part[1], part[0]))


def drawn_bar(parts, whole):
    """A bar of (name, number), of which `whole` is all of its width."""
    left, drawn = 0.0, []
    for name, size in parts:
        width = 100.0 * size / whole
        drawn.append(element('rect', x='%.2f' % left, y=0, width='%.2f' % width, height=1,
                             style='fill: var(--%s)' % COLORS.get(name, 'soft')))
        left += width
    return element('svg', *drawn, class_='bar', viewBox='0 0 100 1', preserveAspectRatio='none', aria_hidden='true')


def legend(parts, words):
    """The legend of a bar: a name and words for each part."""
    return element('div', *[element('span', '%s %s' % (name, words(size)), class_='key',
                                    style='--of: var(--%s)' % COLORS.get(key, 'soft')) for key, name, size in parts],
                   class_='keys soft')


def steps_of(report):
    """[(from, to, bit/s, who was waited for or None)] of a report's course, times in seconds."""
    result, before, done = [], 0.0, 0
    for step in objects_of(report.get('steps')):
        now, size = as_number(step.get('seconds')), as_number(step.get('bytes'))
        if now > before:
            who = step.get('waited_for')
            result.append((before, now, max(0, 8 * (size - done) / (now - before)), who if isinstance(who, TEXT) else None))
            before, done = now, size
    return result


def fewer(steps, most):
    """The same course in at most so many steps."""
    size = -(-len(steps) // most) or 1
    for first in range(0, len(steps), size):
        some = steps[first:first + size]
        begin, end = some[0][0], some[-1][1]
        yield begin, end, sum((step[1] - step[0]) * step[2] for step in some) / (end - begin)


def axis_ticks(most, factors):
    """Round numbers up to `most` for an axis, some four."""
    scale = 10 ** math.floor(math.log10(most)) if factors is None else 1
    for factor in factors or (0.2, 0.5, 1, 2, 5):
        if most / (factor * scale) <= 5:
            break
    return [place * factor * scale for place in range(int(most / (factor * scale)) + 1)]


SPANS = (0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 604800)


def goodput_chart(report, most):
    """The goodput of a report over time, with who was waited for; '' without any.  most: steps."""
    steps = steps_of(report)
    if not steps:
        return ''
    end, peak = steps[-1][1], max(1000.0, max(step[2] for step in steps) * 1.05)
    drawn, waits, totals = [], [], {}

    def across(seconds):
        return '%.1f' % (1000 * seconds / end)

    def down(rate):
        return '%.1f' % (200 - 200 * rate / peak)
    for begin, until, _, who in steps:
        if who and waits and waits[-1][2] == who and waits[-1][1] == begin:
            waits[-1][1] = until
        elif who:
            waits.append([begin, until, who])
        if who:
            totals[who] = totals.get(who, 0) + until - begin
    for begin, until, who in sorted(waits, key=lambda wait: wait[0] - wait[1])[:most]:
        drawn.append(element('rect', element('title', 'waiting for %s, %.1f s' % (who, until - begin)), x=across(begin), y=0,
                             width=across(until - begin), height=200, style='fill: var(--wait)'))
    for rate in axis_ticks(peak, None)[1:]:
        drawn.append(element('path', d='M0 %s H1000' % down(rate), stroke='var(--line)', vector_effect='non-scaling-stroke'))
    line = u''.join(u'M%s %sH%s' % (across(begin), down(rate), across(until)) if not place else
                    u'V%sH%s' % (down(rate), across(until))
                    for place, (begin, until, rate) in enumerate(fewer(steps, most)))
    drawn.append(element('path', d=line + 'V200H0Z', fill='var(--blue)', fill_opacity='.15'))
    drawn.append(element('path', d=line, fill='none', stroke='var(--blue)', stroke_width=2, vector_effect='non-scaling-stroke'))
    across_labels = [element('span', duration(second) if second >= 1 or not second else '%.1f s' % second,
                             style='left: %.2f%%' % (100 * second / end)) for second in axis_ticks(end, SPANS)]
    down_labels = [element('span', bits(rate), style='top: %.2f%%' % (100 - 100 * rate / peak))
                   for rate in axis_ticks(peak, None)[1:]]
    shown = element('figure', element(
        'div', element('div', *down_labels, class_='axis y'),
        element('svg', *drawn, viewBox='0 0 1000 200', preserveAspectRatio='none', role='img',
                aria_label='goodput over time'),
        element('div', *across_labels, class_='axis x'), class_='chart'))
    listed_waits = [element('li', '%s: %.1f s' % (who, seconds))
                    for who, seconds in sorted(totals.items(), key=lambda item: -item[1])[:20]]
    return html_of([element('h3', 'Goodput over time'), shown] + (
        [element('p', 'Nothing came while it waited (marked) for', class_='key soft', style='--of: var(--wait)'),
         element('ul', *listed_waits)] if listed_waits else []))


WORST = ('failed', 'missing', 'refused', 'partly', 'not started', 'complete')


def verdict_of(row):
    """A result and its exit code."""
    result, code = row.get('result'), row.get('exit_code')
    return element('span', '%s%s' % (result, '' if code is None else ', exit code %s' % code),
                   class_='good' if result == 'complete' else 'bad')


def html_table(heads, rows):
    """A table; heads: (title, class); on a narrow page a cell says its title, unless it is of the class `lead`."""
    body = [element('tr', *[element('td', cell, class_=kind, title=None if kind == 'lead' else title)
                            for (title, kind), cell in zip(heads, row)]) for row in rows]
    return element('table', element('thead', element('tr', *[element('th', title, class_=kind) for title, kind in heads])),
                   element('tbody', *body))


def host_and_result(row):
    """The first two cells of a host."""
    return (html_of([element('strong', row.get('host') or '?'), element('div', row.get('address') or '', class_='soft')]),
            html_of([verdict_of(row)] + ([element('div', row.get('reason'), class_='soft')] if row.get('reason') else [])))


def served_hosts(rows):
    """The table of a server's hosts."""
    cells, waits = [], [parts_of(row.get('waited_for')) for row in rows]
    most = max([1e-9] + [sum(part[1] for part in parts) for parts in waits])
    for row, parts in zip(rows, waits):
        repaired = dict(parts_of(row.get('repaired')))
        held = [drawn_bar(parts, most), legend([(key, CAUSES.get(key, key), size) for key, size in parts],
                                       lambda size: '%.1f s' % size)] if parts and parts[0][1] >= 0.05 else []
        cells.append(host_and_result(row) + (
            '%.1f' % as_number(row.get('seconds')) if row.get('seconds') else '', row.get('lost') or '',
            repaired.get('multicast') or '', repaired.get('tcp') or '', row.get('by_chain') or '', html_of(held)))
    return html_of([html_table(
        [('host', 'lead'), ('result', 'lead')] + [(title, 'number') for title in (
            'seconds', 'lost', 'multicast', 'TCP', 'chain')] + [('all waited for it', 'wide')], cells),
        element('p', 'Packets: lost of the multicast; repaired by multicast and by TCP; from another client (chain).',
                class_='soft')])


def rehearsed_hosts(rows):
    """The table of a rehearsal's hosts."""
    stages, cells = [stage.name for stage in Rehearsal.STAGES], []
    for row in rows:
        heard = row.get('heard') if isinstance(row.get('heard'), dict) else {}
        row = dict((key, as_number(value) if isinstance(value, NUMBER + (float,)) and not isinstance(value, bool) else value)
                   for key, value in row.items())
        known = ', '.join('%s %s' % fitting for fitting in fittings_of(row) if fitting[1] != '-')
        cells.append(host_and_result(row) + tuple(
            '%.4g %%' % (100 * as_number(heard[stage])) if stage in heard else '' for stage in stages) + (known,))
    return html_of([html_table(
        [('host', 'lead'), ('result', 'lead')] + [(title, 'number') for title in stages] + [('what else is known', 'wide')], cells),
        element('p', 'Shares of the multicast that it heard, at rates in bit/s, as fast as the server can, and then slowly until '
                'the end.', class_='soft')])


def hosts_of(report):
    """The table of the hosts of a server or a rehearsal, worst first."""
    rows = objects_of(report.get('hosts'))
    rows.sort(key=lambda row: (
        WORST.index(row.get('result')) if row.get('result') in WORST else 0,
        -sum(part[1] for part in parts_of(row.get('waited_for'))), -as_number(row.get('lost'))))
    counts = collections.Counter('%s' % row.get('result') for row in rows)
    said = ', '.join('%d %s' % (counts[result], result) for result in WORST if counts[result])
    table = rehearsed_hosts if report['command'] == 'check' else served_hosts
    return html_of([element('h3', 'Hosts: %s' % said), table(rows)]) if rows else ''


def section_of(path, place, report, most):
    """What the page has of one report."""
    facts = [('report', path)]
    words = report.get('arguments')
    if isinstance(words, list):
        facts.append(('command', element('code', 'kmcast ' + ' '.join(quote('%s' % (word,)) for word in words))))
    if report.get('reason'):
        facts.append(('why', element('strong', report['reason'])))
    server = report.get('server')
    if isinstance(server, dict):
        facts.append(('server', '%s port %s' % (server.get('address'), server.get('port'))))
    size, seconds = as_number(report.get('bytes')), as_number(report.get('seconds'))
    fallback = report.get('fallback')
    if isinstance(fallback, dict):
        facts.append(('by HTTP', '%s from %s; %s verified by the server\'s SHA-256; why: %s' % (
            amount(as_number(fallback.get('bytes'))), fallback.get('url'), amount(as_number(fallback.get('verified'))),
            fallback.get('reason'))))
    rehearsed = report['command'] == 'check' or report.get('rehearsal') is True
    facts += [] if rehearsed else [('image', '%s (%s)' % (counted(size, 'byte'), amount(size)))]
    facts += [('time', '%.1f s%s' % (seconds, ', until %s' % report['ended'] if report.get('ended') else ''))]
    facts += [] if rehearsed else [('goodput', bits(as_number(report.get('goodput'))))]
    for key in ('lost', 'overflows'):
        if as_number(report.get(key)):
            facts.append((key, counted(report[key], 'packet' if key == 'lost' else 'datagram')))
    if report.get('sha256') and not rehearsed:
        facts.append(('SHA-256', element('code', report['sha256'])))
    carried = parts_of(report.get('carried'))
    if carried:
        facts.append(('carried', html_of([drawn_bar(carried, sum(part[1] for part in carried)), legend(
            [(key, PARTS.get(key, key), size) for key, size in carried], amount)])))
    called = {'server': 'Server', 'check': 'Rehearsal'}.get(report['command'], 'Client of a rehearsal' if rehearsed else 'Client')
    return element('section', element('h2', called + ': ', verdict_of(report), id='r%d' % place),
                   element('dl', *[html_of([element('dt', name), element('dd', value)]) for name, value in facts]),
                   goodput_chart(report, most), hosts_of(report))


def report_page(reports):
    """The page, from (path, report): what --report has written."""
    servers = [report for _, report in reports if report['command'] == 'server'] or [
        report for _, report in reports if report['command'] == 'check']
    rows = [row for report in servers for row in objects_of(report.get('hosts')) if row.get('reason') != UNINVITED]
    complete = len([row for row in rows if row.get('result') == 'complete'])
    good = 'passed the rehearsal' if rows and servers[0]['command'] == 'check' else (
        'has the image' if len(rows) == 1 else 'have the image')
    title = '%d of %s %s' % (complete, counted(len(rows), 'host'), good) if rows else (
        'kmcast: %s' % ', '.join(sorted(set('%s' % report.get('result') for _, report in reports))))
    reports = sorted(reports, key=lambda item: (item[1]['command'] == 'client', WORST.index(item[1].get('result'))
                                                if item[1].get('result') in WORST else 0))
    body = [element('h1', title)]
    if len(reports) > 1:
        body.append(html_table((('report', 'lead'), ('result', 'lead'), ('goodput', 'number')), [
            (html_of([element('a', path, href='#r%d' % place), element('div', report['command'], class_='soft')]),
             html_of([verdict_of(report), element('div', report.get('reason') or '', class_='soft')]),
             bits(as_number(report.get('goodput')))) for place, (path, report) in enumerate(reports)]))
    most = max(50, min(400, 20000 // len(reports)))
    body += [section_of(path, place, report, most) for place, (path, report) in enumerate(reports)]
    body.append(element('p', 'kmcast %s' % __version__, class_='soft'))
    return PAGE % {'title': element('title', title), 'body': element('main', *body)}


def read_report(path):
    """What --report has written there.  Raises Failure."""
    called, text = content_of(path)
    try:
        report = json.loads(text.decode('utf-8'))
    except (ValueError, RuntimeError):  # the latter: too deep
        report = None
    if not isinstance(report, dict) or report.get('command') not in SESSIONS:
        raise Failure('%s is no report that kmcast has written' % called, USAGE)
    return report


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

GROUP, DEFAULT_PORT = '239.255.83.83', 18383        # the group: RFC 2365


def whole_number(least, most):
    """An argument type: a whole number from least to most."""
    def convert(text):
        if not re.match('[0-9]+$', text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                '%s is not a whole number from %d to %d' % (printable(text), least, most))
        return int(text)
    return convert


def seconds_type(text):
    """An argument type: seconds, 0 or more."""
    if not re.match(r'[0-9]+(\.[0-9]+)?$', text):
        raise argparse.ArgumentTypeError('%s is not a number of seconds' % printable(text))
    return float(text)


def rate_type(text):
    """An argument type: bit/s as in 940M, `max`, or `auto`."""
    if text in ('auto', 'max'):
        return text if text == 'auto' else UNLIMITED
    match = re.match(r'([0-9]+(?:\.[0-9]+)?)([kMG]?)$', text)
    rate = float(match.group(1)) * {'': 1, 'k': 1e3, 'M': 1e6, 'G': 1e9}[match.group(2)] \
        if match else 0
    if rate < 1000:
        raise argparse.ArgumentTypeError(
            '%s is not a rate such as 940M (bit/s, at least 1k), auto or max' % printable(text))
    return rate


def least_rate_type(text):
    """An argument type: bit/s as in 940M."""
    rate = rate_type(text)
    if rate in ('auto', UNLIMITED):
        raise argparse.ArgumentTypeError('%s is not a rate such as 940M (bit/s)' % text)
    return rate


def minutes_type(text):
    """An argument type: minutes, more than 0; in seconds."""
    if not re.match(r'[0-9]+(\.[0-9]+)?$', text) or not float(text):
        raise argparse.ArgumentTypeError('%s is not a number of minutes' % printable(text))
    return 60 * float(text)


def sha256_type(text):
    """An argument type: 64 hexadecimal digits."""
    if not re.match(r'[0-9a-fA-F]{64}\Z', text):
        raise argparse.ArgumentTypeError('%s is no SHA-256, 64 hexadecimal digits' % printable(text))
    return text.lower()


def file_type(text):
    """An argument type: a path; None for `-`, which is standard input or output."""
    return None if text == '-' else text


def networks_type(text):
    """An argument type: addresses and networks, as (network, mask) of integers."""
    networks = []
    for entry in text.split(','):
        address, size = entry.split('/', 1) if '/' in entry else (entry, '32')
        if not is_address(address) or not re.match('[0-9]{1,2}$', size) or int(size) > 32:
            raise argparse.ArgumentTypeError('%s is not an address or a network such as 10.0.0.0/24' % printable(entry))
        number, mask = to_int(socket.inet_aton(address)), MASK & MASK << 32 - int(size)
        if number & ~mask:
            raise argparse.ArgumentTypeError('%s is not a network; its first address is %s' % (
                entry, socket.inet_ntoa(to_bytes(number & mask, 4))))
        networks.append((number & mask, mask))
    return networks


def group_type(text):
    """An argument type: a multicast group."""
    if is_address(text) and is_multicast(text):
        return text
    raise argparse.ArgumentTypeError(
        '%s is not a multicast group (224.0.0.0 to 239.255.255.255)' % printable(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is a page, and whose errors are one line that says what to do.

    commands    name -> Parser of each command; all of them share it
    rows        (group, action) of what its help shows
    options     option -> action
    """

    GROUPS = ('', 'what', 'where', 'when', 'speed', 'safety', 'output')

    def __init__(self, example='', form='', commands=None, **settings):
        """example: what its help starts with; form: of its command line."""
        argparse.ArgumentParser.__init__(self, add_help=False, **settings)
        self.example, self.form = example, form
        self.commands = {} if commands is None else commands
        self.rows, self.options = [], {}
        self.origin = ''                # where the words come from that are parsed, for errors

    def add(self, group, *names, **settings):
        """add_argument(), in a group of the help."""
        action = self.add_argument(*names, **settings)
        self.rows.append((group, action))
        self.options.update((name, action) for name in action.option_strings)

    def format_help(self):
        """The page: an example, the form of the command line, and a line for each argument and option."""
        rows = sorted(self.rows, key=lambda row: self.GROUPS.index(row[0]))
        lines = [(group, ', '.join(action.option_strings) + (
            ' ' * bool(action.option_strings) + (action.metavar or action.dest.upper()) if action.nargs != 0 else ''),
            action.help) for group, action in rows]
        width = max(len(line[1]) for line in lines)
        text = 'Example:  %s\nUsage:    %s\n\n' % (self.example, self.form)
        before = ''
        for group, called, explained in lines:
            text += '%-8s%-*s  %s\n' % (group if group != before else '', width, called, explained)
            before = group
        return text + self.epilog if self.epilog else text

    def error(self, message):
        """Exit with the line and the code for wrong usage."""
        self.exit(USAGE, '%s: error: %s%s (see %s --help)\n' % (self.prog, self.origin, message, self.prog))

    def parse_known_args(self, args=None, namespace=None):
        """As argparse has it, but first see to what it has no good words for."""
        self._look(sys.argv[1:] if args is None else args)
        return argparse.ArgumentParser.parse_known_args(self, args, namespace)

    def has(self, name):
        """Whether an option is its own, perhaps shortened or with a value behind it."""
        if name.startswith('--'):
            return any(option.startswith(name.split('=')[0]) for option in self.options)
        return name[:2] in self.options

    def _look(self, words):
        """Exit with an error if there is an option, or a command, that is none."""
        for word in words:
            name = word.split('=')[0]
            if word == '--':
                return
            if len(word) < 2 or word[0] != '-' or ' ' in name or word[1] in '.0123456789':
                if self.commands.get(None) is not self:
                    continue
                if word not in self.commands:
                    self.error('there is no command %s%s' % (
                        printable(word), self._meant(word, [command for command in self.commands if command])))
                return
            if not self.has(word):
                self.error(self._stranger(name))

    def _stranger(self, name):
        """What is wrong with an option that it has not."""
        others = [parser for parser in self.commands.values() if parser is not self]
        of = sorted(parser.prog.split()[-1] for parser in others if name in parser.options)
        if of:
            own = self.commands.get(None) is not self
            return '%s is an option of %s, %s' % (name, ' and '.join(', '.join(of).rsplit(', ', 1)), 'not of ' + self.prog.split()[-1]
                                                  if own else 'and stands behind that word')
        known = set(option for parser in self.commands.values() for option in parser.options)
        return 'there is no option %s%s' % (printable(name), self._meant(name, known))

    def _meant(self, word, names):
        """The name that is nearest to a word, as a question; '' if none is near."""
        near = difflib.get_close_matches(word, sorted(names), 1)
        of = [parser.prog.split()[-1] for parser in self.commands.values() if near and near[0] in parser.options]
        mine = not of or self.prog.split()[-1] in of
        return '; did you mean %s%s?' % (near[0], '' if mine else ', of ' + of[0]) if near else ''


class PrintVersion(argparse.Action):
    """--version, on standard output also with Python 2."""

    def __call__(self, parser, *_others):
        print('kmcast ' + __version__)
        parser.exit()


def command_line():
    """The parser of the command line."""
    all_parsers = {}
    parser = Parser(
        prog='kmcast', commands=all_parsers,
        example='kmcast server -i image.tgz auto 40               # on the server, for 40 hosts\n'
        '          kmcast client -o image.tgz auto 10.0.0.1         # on each of them; 10.0.0.1 is the server',
        form='kmcast COMMAND [options] ARGUMENTS               # kmcast COMMAND --help says more')
    all_parsers[None] = parser
    choices = parser.add_subparsers(dest='command', metavar='COMMAND')

    def command(name, help, example, form):     # pylint: disable=redefined-builtin
        made = all_parsers[name] = choices.add_parser(
            name, commands=all_parsers, example=example, form=form,
            epilog='\nOptions can stand in the variable KMCAST_OPTIONS, too. man kmcast says more.\n'
            if name in SESSIONS else None)
        parser.rows.append(('', argparse.Namespace(option_strings=(), metavar=name, nargs=None, help=help)))
        return made

    def add_common(made):
        made.add('output', '-v', '--verbose', action='store_true', help='say more')
        made.add('output', '-q', '--quiet', action='store_true', help='say only what went wrong')
        made.add('output', '-h', '--help', action='help', help='show this and exit')

    def add_of_all(made):
        made.add('when', '--stall-timeout', type=seconds_type, metavar='SECONDS',
                 help='give up a peer that has got nothing done for so long; 0: never (30)')
        made.add('speed', '--datagrams', choices=('auto',) + WAYS, default='auto', metavar='WAY',
                 help='many packets at once: auto, gso, mmsg or plain (auto)')
        made.add('safety', '--key', metavar='FILE',
                 help='who has it takes part; -: stdin (what KMCAST_KEY_FILE names)')
        made.add('output', '--report', metavar='FILE', help='write how it went there, as JSON')
        made.add('output', '--log', metavar='FILE', help='add what -v says there, with date and time')
        add_common(made)
    port = {'nargs': '?', 'type': whole_number(1, 65535), 'metavar': 'PORT',
            'help': 'TCP port of the server, and its UDP port (%d)' % DEFAULT_PORT}

    def add_of_senders(made):
        made.add('', 'local_ip', metavar='LOCAL_IP', help='the interface to multicast from: its address or name, or auto')
        made.add('', 'clients', metavar='CLIENTS', nargs='?', type=whole_number(1, 100000),
                 help='how many hosts to wait for')
        made.add('', 'port', **port)
        made.add('where', '--hosts', metavar='FILE',
                 help='in the place of CLIENTS: names or addresses, one a line; -: stdin')
        made.add('where', '--more', action='store_true', help='also take hosts beyond CLIENTS, or the list')
        made.add('where', '--group', type=group_type, default=GROUP, help='multicast group (%s)' % GROUP)
        made.add('where', '--ttl', type=whole_number(0, 255), default=8, help='routers that multicast may pass (8)')
        made.add('when', '--start-wait', type=seconds_type, metavar='SECONDS',
                 help='start after so long, even if not all came')
        made.add('when', '--min-clients', type=whole_number(1, 100000), default=1, metavar='M',
                 help='how many must be there for --start-wait to start (1)')
        made.add('speed', '--mtu', type=whole_number(256, 9000), metavar='BYTES',
                 help='largest IP packet (1500, or the interface\'s if that is less)')
        made.add('safety', '--allow', type=networks_type, metavar='NETWORKS',
                 help='take connections from these only, such as 10.0.0.0/24,10.0.1.7')

    server = command('server', 'send an image',
                     'kmcast server -i image.tgz auto 40', 'kmcast server [options] LOCAL_IP CLIENTS [PORT]')
    add_of_senders(server)
    server.set_defaults(rehearsal=None)
    server.add('what', '-i', '--input', type=file_type, metavar='FILE',
               help='the image; -: standard input (-)')
    server.add('what', '--pipe', metavar='COMMAND', help='the image is what COMMAND writes; it must exit with 0')
    server.add('what', '--size', type=whole_number(0, 1 << 63), metavar='BYTES',
               help='of an image that comes by a pipe: for progress and room')
    server.add('what', '--name', help='what to call the image (the name of FILE)')
    server.add('what', '--spool', type=file_type, metavar='FILE',
               help='keep what comes by a pipe there, for who comes late')
    server.add('where', '--unicast', action='store_true',
               help='no multicast: the hosts pass the image on, one to the next')
    server.add('where', '--chain', choices=('auto', 'always', 'never'), default='auto', metavar='WHEN',
               help='auto: where multicast does not reach; always; never (auto)')
    server.add('when', '--linger', type=seconds_type, default=0, metavar='SECONDS',
               help='wait so long for others when all who are here have it (0)')
    server.add('when', '--forever', action='store_true', help='serve whoever comes, until SIGTERM; SIGUSR1 starts')
    server.add('safety', '--allow-empty', action='store_true', help='an image of 0 bytes is no error')
    add_of_all(server)
    server.add('speed', '--rate', type=rate_type, default='auto',
               help='bit/s as in 940M; auto: as the slowest link; max (auto)')
    server.add('speed', '--min-rate', type=least_rate_type, default=0, metavar='RATE',
               help='a host that alone keeps all slower gets the rest after the others')
    server.add('speed', '--buffer-packets', type=whole_number(1, MAX_PACKETS), metavar='N',
               help='packets in a round at the most (as many as make 4 MB)')
    server.add('speed', '--clients-per-thread', type=whole_number(1, 1000), metavar='N',
               help='that one TCP thread serves (64, or all where they are 200 or more)')
    server.add('safety', '--no-digest', action='store_true', help='do without SHA-256')
    server.add('safety', '--compat', action='store_true',
               help='serve clients of the base protocol (the C implementation)')

    client = command('client', 'receive an image',
                     'kmcast client -o image.tgz auto 10.0.0.1', 'kmcast client [options] LOCAL_IP SERVER_IP [PORT]')
    client.add('', 'local_ip', metavar='LOCAL_IP', help='the interface to receive on: its address or name, or auto')
    client.add('', 'server_ip', metavar='SERVER_IP', help='the server\'s address')
    client.add('', 'port', **port)
    client.add('what', '--expect-name', metavar='GLOB', help='refuse an image of another name')
    client.add('what', '--expect-size', type=whole_number(0, 1 << 63), metavar='BYTES',
               help='refuse an image of another size, or fail at its end')
    client.add('what', '--expect-sha256', type=sha256_type, metavar='HEX',
               help='fail at the end of an image that has another SHA-256')
    client.add('where', '-o', '--output', type=file_type, metavar='FILE',
               help='it appears when complete and verified; -: standard output (-)')
    client.add('where', '--pipe', metavar='COMMAND', help='write to its standard input; it must exit with 0')
    client.add('when', '--wait', type=seconds_type, default=60.0, metavar='SECONDS',
               help='how long to try to reach the server, also when it is lost (60)')
    client.add('when', '--fallback', metavar='URL', help='if the transfer fails, complete it by HTTP from there')
    client.add('safety', '--cafile', metavar='FILE', help='whom to trust for an https URL (those of this host)')
    client.add('safety', '--resume', action='store_true', help='with -o: go on where an earlier run broke off')
    client.add('safety', '--allow-empty', action='store_true', help='an image of 0 bytes is no error')
    add_of_all(client)

    check = command('check', 'a rehearsal: does multicast reach the clients?',
                    'kmcast check auto 40', 'kmcast check [options] LOCAL_IP CLIENTS [PORT]')
    add_of_senders(check)
    check.add('when', '--minutes', type=minutes_type, default='0.5', metavar='M',
              help='for how long multicast must get through (0.5)')
    add_of_all(check)

    demo = command('demo', 'a server and some clients on this host, to see it work',
                   'kmcast demo', 'kmcast demo [options] [FILE]')
    demo.add('', 'file', nargs='?', metavar='FILE', help='what to send (64 MiB of random data)')
    demo.add('what', '--clients', type=whole_number(1, 100), default=3, metavar='N', help='how many clients (3)')
    add_common(demo)

    page = command('report', 'a page to look at, from what --report has written',
                   'kmcast report report.json > page.html', 'kmcast report FILE...')
    page.add('', 'files', nargs='+', metavar='FILE', help='what --report has written; -: standard input')
    page.add('output', '-h', '--help', action='help', help='show this and exit')
    page.set_defaults(verbose=False, quiet=False)

    key = command('key', 'a new key for --key', 'kmcast key > kmcast.key', 'kmcast key')
    key.add('output', '-h', '--help', action='help', help='show this and exit')
    key.set_defaults(verbose=False, quiet=False)

    completion = command('completion', 'what makes bash complete all this with the Tab key',
                         'kmcast completion bash > /etc/bash_completion.d/kmcast', 'kmcast completion bash')
    completion.add('', 'shell', choices=('bash',), metavar='bash', help='the shell that it is for')
    completion.add('output', '-h', '--help', action='help', help='show this and exit')
    completion.set_defaults(verbose=False, quiet=False)

    parser.add('output', '--version', action=PrintVersion, nargs=0, help='say the version')
    parser.add('output', '-h', '--help', action='help', help='show this and exit')
    return parser


RIVALS = (('input', 'pipe'), ('output', 'pipe'), ('hosts', 'clients'), ('unicast', 'chain'), ('verbose', 'quiet'))


def from_environment(parser, given):
    """The options of KMCAST_OPTIONS for a command, as words.

    parser: the command's; given: what its command line says, which wins.  Those of the
    other commands are left out, so that all can be told the same.
    """
    parser.origin = 'KMCAST_OPTIONS: '
    try:
        words = shlex.split(os.environ.get('KMCAST_OPTIONS', ''))
    except ValueError as error:
        parser.error(str(error).lower())
    groups, result = [], []
    for word in words:                  # an option and its value
        if word.startswith('-') and word != '-':
            groups.append([word])
        elif groups and len(groups[-1]) == 1 and '=' not in groups[-1][0]:
            groups[-1].append(word)
        else:
            parser.error('%s is no option' % printable(word))
    said = set(name for name, value in vars(given).items() if value != parser.get_default(name))
    for group in groups:
        name = group[0].split('=')[0]
        action = parser.options.get(name)
        if not action and any(name in parser.commands[other].options for other in SESSIONS):
            continue
        if action and action.nargs == 0 and len(group) > 1:
            parser.error('%s is no option' % printable(group[1]))
        rivals = [names for names in RIVALS if action and action.dest in names]
        if not any(name in said for names in rivals for name in names if name != action.dest):
            result += group
    return result


def read_hosts(options):
    """The HostList of --hosts; None without.  Raises Failure."""
    if options.hosts is None:
        return None
    if options.hosts == '-' and not options.input and options.pipe is None:
        raise Failure('standard input is the image, so it cannot be the list of hosts; give -i FILE or --pipe', USAGE)
    called, text = content_of(options.hosts)
    hosts = HostList(str(text.decode('ascii', 'replace').replace(u'\ufffd', u'?')), called)
    if options.compat and not all(is_address(name) for name in hosts.names):
        raise Failure('in the base protocol a client does not tell its name: %s must have addresses' % called, USAGE)
    return hosts


def server_command(options, signals):
    """`kmcast server`: what will do it.  Raises Failure."""
    if options.input and options.pipe is not None:
        raise Failure('give one of --input and --pipe', USAGE)
    options.listed = read_hosts(options)
    if options.listed:
        options.clients = len(options.listed.names)
    port_like = options.clients >= 1024 and options.port < 1024
    if options.clients > MOST_CLIENTS or port_like:
        raise Failure('%d clients and PORT %d: are they swapped? It is server LOCAL_IP CLIENTS [PORT], with at most %d CLIENTS'
                      % (options.clients, options.port, MOST_CLIENTS), USAGE)
    if options.min_clients > options.clients:
        raise Failure('--min-clients %d is more than CLIENTS, %d'
                      % (options.min_clients, options.clients), USAGE)
    if options.key and (options.compat or options.no_digest):
        raise Failure('%s has nothing that a key could prove; give no --key, and set no KMCAST_KEY_FILE'
                      % ('--compat' if options.compat else '--no-digest'), USAGE)
    if options.min_clients > 1 and options.start_wait is None:
        raise Failure('--min-clients needs --start-wait SECONDS', USAGE)
    if options.clients_per_thread is None:
        options.clients_per_thread = CLIENTS_PER_THREAD if options.clients < MANY else options.clients
    if options.compat and (options.more or options.linger or options.forever or options.spool):
        raise Failure('nobody can come late with --compat: it takes no --more, --linger, --forever or --spool', USAGE)
    allow_descriptors(options)
    options.local_ip = local_address(options.local_ip)
    names = [entry for entry in interfaces() if entry[1] == options.local_ip]
    options.interface = '%s (%s)' % names[0] if names else options.local_ip
    source = Drill() if options.rehearsal else Source(
        options.input, options.pipe, not (options.no_digest or options.compat), options.spool)
    if options.forever and not source.again:
        source.close()
        raise Failure('--forever needs an image that can be read again: -i FILE, or --spool FILE', USAGE)
    return Multicaster(options, source, signals)


def check_command(options, signals):
    """`kmcast check`: a server that has nothing to send.  Raises Failure."""
    ours = dict(vars(options), rehearsal=options.minutes)
    vars(options).update(vars(command_line().parse_args(
        ['server', '--chain', 'never', '-i', '/dev/zero', options.local_ip])))
    vars(options).update(ours)
    return server_command(options, signals)


def client_command(options, signals):
    """`kmcast client`: what will do it.  Raises Failure."""
    if options.output and options.pipe is not None:
        raise Failure('give one of --output and --pipe', USAGE)
    if options.resume and not options.output:
        raise Failure('--resume needs --output FILE', USAGE)
    if re.match(r'[0-9.]*$', options.server_ip) and not is_address(options.server_ip):
        raise Failure('"%s" is not an IPv4 address' % options.server_ip, USAGE)
    if options.cafile and not options.fallback:
        raise Failure('--cafile needs --fallback URL', USAGE)
    if options.fallback is not None:
        secure = Place(options.fallback).secure
        if options.key and not secure and not options.expect_sha256:
            raise Failure('with a key, --fallback needs an https URL, or --expect-sha256: nobody vouches for what comes '
                          'by http', USAGE)
        if options.cafile and not os.access(options.cafile, os.R_OK):
            raise Failure('cannot read %s' % printable(options.cafile), USAGE)
    # `auto` is the address of the connection to the server, once there is one.
    options.local_ip = None if options.local_ip == 'auto' else local_address(options.local_ip)
    return Client(options, signals)


def key_of(options):
    """The Key that the command line or the environment names; None without one.  Raises Failure."""
    name, only_file = options.key, 'KMCAST_KEY_FILE'
    if name is None and only_file in os.environ:
        name = os.environ[only_file]
        if not name:
            raise Failure('%s is empty: unset it, or let it name a file' % only_file, USAGE)
        name = os.path.join('.', name)  # a path, whatever it looks like
    elif (name and re.match('-$|fd:0+$', name) and options.command == 'server'
          and not options.input and options.pipe is None):
        raise Failure('standard input is the image; give the key as a FILE or fd:N', USAGE)
    return name and read_key(name)


BASH = """\
# bash completion for kmcast, made by "kmcast completion bash"
_kmcast() {
    local i word command='' place=0 valued=' %(valued)s ' files=' %(files)s '
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=''
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == -?* ]]; then
            [[ $valued == *" $command$word "* ]] && ((i++))
        elif [[ -z $command ]]; then
            command=$word
        else
            ((place++))
        fi
    done
    COMPREPLY=()
    if [[ $files == *" $command$before "* ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$current"))
        return
    fi
    case $command$before in
%(values)s
        *)  if [[ $valued == *" $command$before "* ]]; then
                return
            elif [[ $current == -* || -z $command ]]; then
                case $command in
%(options)s
                esac
            elif [[ $place == 0 && " %(sessions)s " == *" $command "* ]]; then
                words="auto $(ls /sys/class/net)"
            elif [[ %(of_files)s ]]; then
                compopt -o filenames 2>/dev/null
                COMPREPLY=($(compgen -f -- "$current"))
                return
            fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -F _kmcast kmcast kmcast.py kmcast.pyz
"""


def completion_command(_options, _signals):
    """`kmcast completion`: a script for bash(1), "Programmable Completion", made from the parser."""
    parser = command_line()
    valued, files, values, options, of_files = [], [], [], [], []
    for command, made in sorted(parser.commands.items(), key=lambda item: item[0] or ''):
        command = command or ''
        names = sorted(made.options) + ([other for other in parser.commands if other] if not command else [])
        options.append("                    '%s') words='%s' ;;" % (command, ' '.join(sorted(names))))
        for _, action in made.rows:
            calls = [command + name for name in action.option_strings if action.nargs != 0]
            valued += calls
            if action.metavar == 'FILE':
                files += calls
                of_files += [] if calls else ['$command == ' + command]
            elif getattr(action, 'choices', None) and command:
                values.append("        %s) words='%s' ;;" % (
                    '|'.join(calls or [command + command]), ' '.join(action.choices)))
    return Printer(BASH % {'valued': ' '.join(valued), 'files': ' '.join(files), 'values': '\n'.join(values),
                           'options': '\n'.join(options), 'of_files': ' || '.join(of_files), 'sessions': ' '.join(SESSIONS)})


class Printer(object):
    """What a command does that just writes a text on standard output."""

    def __init__(self, text, called='standard output'):
        """called: the text or where it goes, for the user."""
        self.text, self.called = text, called

    def run(self):
        """Write it; returns an exit code.  Raises Failure."""
        try:
            with io.open(1, 'wb', closefd=False) as output:
                output.write(self.text.encode('ascii', 'xmlcharrefreplace'))
        except OS_ERRORS as error:
            raise Failure('cannot write %s: %s' % (self.called, explain(error)))
        return OK

    @staticmethod
    def status(_now):
        """None: it is done at once."""

    def close(self):
        """It leaves nothing behind."""


def key_command(_options, _signals):
    """`kmcast key`: a new key, as text; a file gets mode 600 before there is anything to be read.  Raises Failure."""
    try:
        if stat.S_ISREG(os.fstat(1).st_mode):
            os.fchmod(1, 0o600)
    except OS_ERRORS as error:
        raise Failure('cannot write the key: %s' % explain(error))
    return Printer(hexadecimal(os.urandom(32)) + '\n', 'the key')


def report_command(options, _signals):
    """`kmcast report`.  Raises Failure."""
    return Printer(report_page([(path, read_report(path)) for path in options.files]))


class DemoClient(threading.Thread):
    """A client process of the demo, and what came out of it."""

    def __init__(self, process):
        threading.Thread.__init__(self)
        self.daemon = True
        self.process = process
        self.bytes, self.hash = 0, hashlib.sha256()
        self.errors = b''
        self.start()

    def run(self):
        """Read the image until its end, then the log."""
        for block in iter(lambda: self.process.stdout.read(1 << 20), b''):
            self.bytes += len(block)
            self.hash.update(block)
        self.errors = self.process.stderr.read()
        self.process.wait()


class Demo(object):
    """`kmcast demo`: a server and some clients as processes of this file."""

    def __init__(self, options, _signals):
        self.options = options
        self._processes = []
        if options.file:
            try:
                io.open(options.file, 'rb').close()
            except OS_ERRORS as error:
                raise Failure('cannot read %s: %s' % (printable(options.file), explain(error)), USAGE)

    def _images(self):
        if self.options.file is None:
            for _ in range(64):
                yield os.urandom(1 << 20)
        else:
            with io.open(self.options.file, 'rb') as image:
                for block in iter(lambda: image.read(1 << 20), b''):
                    yield block

    def _start(self, *arguments, **pipes):
        us = os.getpid()
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0])] + list(arguments),
            env=dict(item for item in os.environ.items() if item[0] not in ('KMCAST_OPTIONS', 'KMCAST_KEY_FILE')),
            preexec_fn=lambda: end_with(us), **pipes)
        self._processes.append(process)
        return process

    @staticmethod
    def _free_port():
        """A TCP port that is free, and not of those that connect(2) gives away: a client may come before the server."""
        for _ in range(100):
            port = 20000 + to_int(os.urandom(2)) % 12000
            with contextlib.closing(socket.socket()) as probe:
                try:
                    probe.bind(('', port))
                    break
                except OS_ERRORS:
                    pass                # in use
        return port

    def run(self):
        """Send and compare; returns an exit code."""
        options = self.options
        port = str(self._free_port())
        server = self._start('server', '127.0.0.1', str(options.clients), port,
                             '-v' if options.verbose else '-q', '--allow-empty', stdin=subprocess.PIPE)
        clients = [self._start('client', '127.0.0.1', '127.0.0.1', port, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE) for _ in range(options.clients)]
        clients = [DemoClient(process) for process in clients]     # threads: after the last fork
        sent, digest = 0, hashlib.sha256()
        try:
            for block in self._images():
                server.stdin.write(block)
                sent += len(block)
                digest.update(block)
            server.stdin.close()
        except OS_ERRORS as error:
            tell('failed', reason='the server ended early: %s' % explain(error))
        if server.wait() == USAGE:      # it has not begun, so the clients wait in vain
            for client in clients:
                self._end(client.process)
        for client in clients:
            client.join()
        print('%-8s %15s %14s %10s  %s' % ('client', 'bytes', 'rate', 'repaired', 'digest'))
        for number, client in enumerate(clients, 1):
            text = client.errors.decode('ascii', 'replace')
            match = re.search(r' s, (.*?); repaired (\d+) packets? by multicast, (\d+) by TCP', text)
            rate, repaired = '-', '-'
            if match:
                rate, repaired = match.group(1), int(match.group(2)) + int(match.group(3))
            equal = client.hash.digest() == digest.digest() and client.process.returncode == 0
            print('%-8d %15d %14s %10s  %s' % (number, client.bytes, rate, repaired,
                                               'equal' if equal else 'DIFFERENT'))
            client.equal = equal
            if options.verbose or not equal:
                sys.stderr.write(text)
        good = server.returncode == 0 and all(client.equal for client in clients)
        print('%s: %s to %s on this host' % ('all equal' if good else 'FAILED', counted(sent, 'byte'),
                                             counted(len(clients), 'client')))
        return OK if good else FAILED

    @staticmethod
    def _end(process):
        """Ask it to end, unless it has."""
        try:
            if process.poll() is None:
                process.terminate()
        except OS_ERRORS:
            pass                        # it just has

    def status(self, _now):
        """None: its server and clients have their own."""

    def close(self):
        """Leave no process behind."""
        for process in self._processes:
            self._end(process)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                try:
                    if pipe and not pipe.closed:
                        pipe.close()
                except OS_ERRORS + (ValueError,):
                    pass                # what was still to be written


COMMANDS = {'server': server_command, 'client': client_command, 'check': check_command, 'demo': Demo,
            'key': key_command, 'report': report_command, 'completion': completion_command}


def settle_numbers(options, rest, parser):
    """Find CLIENTS, which --hosts takes the place of, and PORT; returns what is left of `rest`.

    argparse takes an optional positional only right behind the others.
    """
    slots = [('port', 65535)]
    if options.command != 'client' and options.hosts is None:
        slots.insert(0, ('clients', 100000))
    given = [str(number) for number in (getattr(options, 'clients', None), options.port) if number is not None]
    while rest and rest[0].isdigit() and len(given) < len(slots):
        given.append(rest.pop(0))
    options.clients = options.port = None
    for (name, most), text in zip(slots, given):
        try:
            setattr(options, name, whole_number(1, most)(text))
        except argparse.ArgumentTypeError as error:
            parser.error('argument %s: %s' % (name.upper(), error))
    if options.clients is None and slots[0][0] == 'clients':
        parser.error('how many CLIENTS? %s, or --hosts FILE in the place of CLIENTS' % parser.form)
    if given[len(slots):]:
        parser.error('--hosts takes the place of CLIENTS: kmcast %s --hosts FILE LOCAL_IP [PORT]' % options.command)
    options.port = options.port or DEFAULT_PORT
    return rest


def read_command_line(words):
    """What the words, and KMCAST_OPTIONS, ask for: a Namespace, whose `words` are all of them."""
    parser = command_line()
    options, rest = parser.parse_known_args(words)
    if not options.command:             # Python 3 lets it be missing
        parser.error('which COMMAND? one of %s' % ', '.join(name for name in parser.commands if name))
    own = parser.commands[options.command]
    if options.command in SESSIONS:
        place = words.index(options.command) + 1
        words = words[:place] + from_environment(own, options) + words[place:]
        options, rest = parser.parse_known_args(words)
        own.origin = ''
        rest = settle_numbers(options, rest, own)
    if rest:
        own.error('unrecognized arguments: %s' % printable(' '.join(rest)))
    options.words = words
    return options


def main(arguments=None):
    """The program; returns its exit code."""
    options = read_command_line(sys.argv[1:] if arguments is None else list(arguments))
    open_standard_files()
    return run_job(options, StopInOrder())


def read_by_user(options, job):
    """Have the events read by what the command line asks for.  Raises Failure."""
    screen = Screen()
    level = DEBUG if options.verbose else ERROR if options.quiet else INFO
    clock = '%H:%M:%S ' if options.verbose and not screen.terminal else ''
    log = Log(options.command, level, screen.line, clock)
    tell.readers[:] = [log, Summary(log, options.verbose, lambda _level, line: screen.line(line))]
    if job is None:
        return
    if getattr(options, 'log', None):
        file = LogFile(options.log)
        whole_log = Log(options.command, DEBUG, file.line, '%Y-%m-%d %H:%M:%S ')
        tell.readers += [whole_log, Summary(whole_log, True)]
    if not options.quiet:
        tell.readers.append(Progress(options.command, job, screen))
    if getattr(options, 'report', None):
        tell.readers.append(JsonReport(options.report, options.command, getattr(options, 'words', None), job))


def run_job(options, signals):
    """Do what the command line asks for; returns the exit code.

    A signal can come between any two instructions.  Once there is a verdict it changes
    nothing, and what was begun is closed in any case.
    """
    job = code = reason = None
    read_by_user(options, None)
    try:
        try:
            if hasattr(options, 'key'):
                options.key = key_of(options)       # which may wait for who writes it
            with uninterruptible:
                job = COMMANDS[options.command](options, signals)
            read_by_user(options, job)
            signals.state = lambda of_hosts: state_lines(job, monotonic(), of_hosts)
            code = job.run()
        except Failure as error:
            code, reason = error.code, error.reason
        except Exception as error:      # pylint: disable=broad-except
            code, reason = FAILED, internal_error(error)
        signals.over()
    except Interrupted as error:        # at most one is ever raised
        if code is None:
            code, reason = FAILED, 'stopped by %s' % error
        signals.over()
    if reason:
        tell('failed', reason=reason)
    tell('ended', code=code, reason=reason)
    if job:
        job.close()
    return code


if __name__ == '__main__':
    sys.exit(main())
