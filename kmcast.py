#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""kmcast: send one image to many hosts at once, reliably.

    kmcast.py server [options] LOCAL_IP CLIENTS [PORT]      < image
    kmcast.py client [options] LOCAL_IP SERVER_IP [PORT]    > image

The server multicasts the image once, in rounds of one buffer each; every
client says over TCP what it missed and gets just that again.  Standard
library only; Python 2.7.5 and 3.6 or later run this same file.

Map of this file, in the order in which a byte walks it; each section uses
only those above it:

    Python 2 and 3      all that differs between them
    Outcomes and times  how things end, exit codes, timeouts; and what happens is told
    Wire                structs, signals, frames; two dialects: session and base protocol
    Queues and links    TcpQueue; SemLink, the zipper between neighbouring threads
    Rounds              one round of packets: fill, put, get, missing, flush
    Coded repair        which lost packets to XOR, and how to solve for them
    Datagrams           multicast sockets; many packets a system call
    Pacing              how fast, and how that is found out
    Ends                where the image comes from, where it goes
    This host           interfaces, addresses, limits, signals
    Connection          one end of a TCP connection, for server and client alike
    Window              the round in flight, as the server and as the client see it
    Roster and policy   who takes part, who keeps the others waiting; what to do next
    Report              what the user sees: the log, the progress, the table, the report
    TCP servers         the spec's chain of threads, one poll() each
    Multicaster         the spec's UDP server: the image into the air
    Client              receives one image
    Command line        arguments, demo, exit codes

The protocol in a page (a session; the base protocol lacks the greetings):

    server                                    client
      | <------------------------ connects ----- |
      | -- group info -------------------------> |  joins the group
      | <-------------------------- HELLO ------ |
      | -- WELCOME ----------------------------> |
      |                                          |     for each buffer:
      | -- buffer info ------------------------> |
      | <-------------------------- READY ------ |
      | == the packets, by UDP multicast ======> |
      | -- SERVER_SENT, digest so far ---------> |
      | <-------- CLIENT_REQ, what it lost ----- |     if it lost any:
      | -- the packets, or AGAIN and coded ----> |       TCP, or multicast
      | <-------------------------- DONE ------- |  verified, to the output
      |                                          |     a buffer of 0 packets
      | -- BYE, size and digest of it all -----> |     ends the image
      | <-------------------------- DONE ------- |

On the server the Multicaster is the parent of TCP server 1, which is the
parent of TCP server 2, and so on, each with up to 64 clients.  The parent
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
import binascii
import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import resource
import select
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
import zlib

__version__ = '1.0.0'

# ---------------------------------------------------------------------------
# Python 2 and 3
# ---------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC = ctypes.CDLL(None, use_errno=True)
if sys.version_info[0] == 2:
    CRC_TYPE = 'i'                      # zlib.crc32 is signed there

    def to_int(data):
        """Bytes to the integer that they are, big-endian."""
        return int(binascii.hexlify(data), 16)

    def to_bytes(number, size):
        """The `size` bytes of an integer, big-endian."""
        return binascii.unhexlify('%0*x' % (2 * size, number))

    def part(data, start, size):
        """Bytes of a bytearray, not copied, for zlib.crc32."""
        return buffer(data, start, size)            # noqa: F821

    def join(parts):
        """One bytes of many parts."""
        return b''.join([bytes(piece) for piece in parts])

    def monotonic():
        """Seconds on a clock that nobody sets (clock_gettime(2))."""
        timespec = (ctypes.c_long * 2)()
        LIBC.clock_gettime(1, timespec)             # CLOCK_MONOTONIC
        return timespec[0] + timespec[1] * 1e-9
else:
    CRC_TYPE = 'I'
    from time import monotonic
    join = b''.join

    def part(data, start, size):
        """Bytes of a bytearray, not copied, for zlib.crc32."""
        return memoryview(data)[start:start + size]

    def to_int(data):
        """Bytes to the integer that they are, big-endian."""
        return int.from_bytes(data, 'big')

    def to_bytes(number, size):
        """The `size` bytes of an integer, big-endian."""
        return number.to_bytes(size, 'big')

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


class Refused(Failure):
    """The peer said BYE; its reason is ours."""


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
SESSION_VERSION = 1

# Signals: the first byte of a message on TCP.
ALIVE = b'\x00'
BUFFER_INFO = READY = b'\x01'
PACKETS = REQUEST = b'\x02'
DONE = b'\x04'
SENT = b'\x08'
HELLO = b'\x10'
WELCOME = b'\x20'
AGAIN = b'\x40'
BYE = b'\x80'
STATE = b'\x13'
U32 = struct.Struct('<I')
PORT = struct.Struct('>H')
GROUP_INFO = struct.Struct('<H2s4s8s')              # a sockaddr_in of x86 Linux
ROUND = struct.Struct('<4I')                        # the spec's buffer_ctl
PACKET = struct.Struct('<I' + CRC_TYPE + 'I')       # the spec's packet_ctl
REPAIR = struct.Struct('<3I')                       # what follows AGAIN
UDP_OVERHEAD = 28                       # IP and UDP headers, bytes
MAX_PACKETS = 65536                     # in a round
MAX_FRAME = 65536                       # bytes
DIGEST_SIZE = 32                        # SHA-256, bytes

# What a client tells of itself in STATE, besides what it is `busy` with.
FIGURES = ('by_multicast', 'written', 'overflows')


def payload_for(mtu):
    """The payload of a full packet, in bytes, at an MTU in bytes."""
    return (mtu - UDP_OVERHEAD - PACKET.size) // 4 * 4


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


def stall_of(fields):
    """The stall timeout in seconds that a HELLO or WELCOME tells; 0: none.  Raises ProtocolError."""
    value = fields.get('stall', 0)
    if not isinstance(value, NUMBER + (float,)) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ProtocolError('a frame without a proper "stall"')
    return value


def printable(text, limit=200):
    """A peer's text as it may appear on a terminal: plain ASCII."""
    return str(re.sub(u'[^ -~]', u'?', text[:limit]))


def plain_crc(payload, _number):
    """The checksum of a base-protocol server that uses CRC-32."""
    return zlib.crc32(payload)


def c_sum(payload, _number):
    """The checksum of the C implementation: the sum of little-endian words."""
    words = bytes(payload) + b'\0' * (-len(payload) % 4)
    total = sum(struct.unpack('<%dI' % (len(words) // 4), words)) & MASK
    return struct.unpack('<' + CRC_TYPE, U32.pack(total))[0]


class SessionDialect(object):
    """What two kmcast ends speak: with greetings, digests, signs of life and reasons."""

    padding = MAGIC + struct.pack('BB', SESSION_VERSION, 0)     # of the group info
    greets = True                       # a client says HELLO, and counts only then
    talks = True                        # both may say ALIVE, BYE and STATE at any time
    codes = True                        # repairs by XOR of several packets are understood
    sizes = True                        # all packets but the image's last are full ones
    packets = PACKETS                   # what comes before packets on TCP
    checks = (zlib.crc32,)              # of a packet, as Buffer takes them
    server_stall = client_stall = STALL     # seconds

    @staticmethod
    def salts():
        """Two random numbers: for packets, and for those of repair passes."""
        return struct.unpack('<II', os.urandom(8))

    @staticmethod
    def buffer_info(info):
        """The message that announces a round."""
        return BUFFER_INFO + info

    @staticmethod
    def bye(**fields):
        """The last message of a connection."""
        return pack_frame(BYE, fields)

    @staticmethod
    def state(**fields):
        """How it stands at this end, for the user at the other: a sign of life with words."""
        return pack_frame(STATE, fields)

    @staticmethod
    def client_message_size(head, most):
        """The size in bytes of a client's message that begins with `head`.

        most: packets that a request may ask for.  Returns None where more of the
        message is needed to tell; raises ProtocolError.
        """
        kind = head[:1]
        if kind in (ALIVE, READY, DONE):
            return 1
        if kind not in (REQUEST, HELLO, BYE, STATE):
            raise ProtocolError('an unknown signal, 0x%02x' % ord(kind))
        return request_size(head, most) if kind == REQUEST else frame_size(head)

    @staticmethod
    def server_message_size(head, digest_size):
        """The same of a server's message, once the session is agreed."""
        kind = head[:1]
        if kind in (ALIVE, PACKETS):
            return 1
        if kind in (BYE, WELCOME, STATE):
            return frame_size(head)
        sizes = {BUFFER_INFO: ROUND.size, SENT: digest_size, AGAIN: REPAIR.size}
        if kind not in sizes:
            raise ProtocolError('an unknown signal, 0x%02x' % ord(kind))
        return 1 + sizes[kind]


class BaseDialect(SessionDialect):
    """What the C implementation speaks: `spec/`.  Nobody can say there that he is alive, or why he ends."""

    padding = b''
    greets = talks = codes = sizes = False
    packets = b''
    checks = (c_sum,)
    server_stall, client_stall = BASE_STALL, 0

    @staticmethod
    def salts():
        """None: a packet's checksum is of its payload alone."""
        return 0, 0

    @staticmethod
    def buffer_info(info):
        """Without a signal before it."""
        return info

    @staticmethod
    def bye(**_fields):
        """There is no such message."""
        return b''

    state = bye

    @staticmethod
    def client_message_size(head, most):
        """As of a session, which has more messages."""
        if head[:1] not in (READY, DONE, REQUEST):
            raise ProtocolError('an unknown signal, 0x%02x' % ord(head[:1]))
        return request_size(head, most) if head[:1] == REQUEST else 1


def frame_size(head):
    """The size in bytes of a signal and its frame; None if too little is there to tell."""
    if len(head) < 5:
        return None
    length = U32.unpack(head[1:5])[0]
    if length > MAX_FRAME:
        raise ProtocolError('a frame of %d bytes' % length)
    return 5 + length


def request_size(head, most):
    """The same of a REQUEST for at most so many packets."""
    if len(head) < 5:
        return None
    count = U32.unpack(head[1:5])[0]
    if not 0 < count <= most:
        raise ProtocolError('a request for %s' % counted(count, 'packet'))
    return 5 + 4 * count


# ---------------------------------------------------------------------------
# Queues and links
# ---------------------------------------------------------------------------

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
                uninterrupted(end.send, b'V')
            except OS_ERRORS:
                pass                    # it ended; the next wait will say so


# ---------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------

def consecutive(seq, count):
    """`count` seqs from `seq` on, modulo 2^32."""
    if seq + count <= MASK:
        return tuple(range(seq, seq + count))
    return tuple([(seq + i) & MASK for i in range(count)])


def runs(numbers):
    """Where consecutive numbers stand in a sequence: (start, stop) of each run."""
    start = 0
    for i in range(1, len(numbers)):
        if numbers[i] != numbers[i - 1] + 1:
            yield start, i
            start = i
    if len(numbers):
        yield start, len(numbers)


class Batch(object):
    """Structs for many adjacent packets of one size at once, by their number.

    One call takes 44 packets apart into 44 x (seq, crc, size, payload), or
    puts them together; that is what makes the per-packet loops short.
    """

    # Packets in one call.  Of 1460 bytes, so many are less than what malloc
    # takes from the kernel, and gives back, each time (M_MMAP_THRESHOLD).
    MOST = 88
    _known = {}

    def __init__(self, payload):
        """payload: bytes in each packet."""
        self._formats = {'packets': 'I%sI%ds' % (CRC_TYPE, payload),
                         'payloads': '%ds' % payload,
                         'headers': 'I%sI%dx' % (CRC_TYPE, payload)}
        self._structs = {}

    @classmethod
    def of(cls, payload):
        """The Batch for a payload in bytes, made once."""
        if payload not in cls._known:
            cls._known[payload] = cls(payload)
        return cls._known[payload]

    def _struct(self, kind, count):
        if (kind, count) not in self._structs:
            self._structs[kind, count] = struct.Struct('<' + self._formats[kind] * count)
        return self._structs[kind, count]

    def packets(self, count):
        """A Struct of count x (seq, crc, size, payload)."""
        return self._struct('packets', count)

    def payloads(self, count):
        """A Struct of count x payload, back to back."""
        return self._struct('payloads', count)

    def headers(self, count):
        """A Struct of count x (seq, crc, size) of adjacent packets."""
        return self._struct('headers', count)


class Buffer(object):
    """One round of packets, each in its slot as it goes on the wire.

    The spec's buffer_ctl, its packets and their operations.  A server fills
    it from the image and sends slices of it; a client puts what it receives
    and flushes it when nothing is missing.  A repair pass is one as well.

    base        seq of the first packet (packet_id_base)
    count       packets in the round (pkt_count)
    size        bytes of payload in the round (buffer_size)
    received    packets of this round that have arrived
    damaged     datagrams with a wrong size or checksum, over all rounds
    """

    def __init__(self, payload, capacity, salt=0, checks=(zlib.crc32,)):
        """buffer_init.

        payload: bytes in a full packet; capacity: packets at the most.
        salt, checks: a packet's checksum is check(payload, salt + seq).  Two
        checks are candidates, and the first good packet decides between them
        (pass the same list to all buffers of a transfer).
        """
        self.payload = payload
        self.capacity = capacity
        self.slot = PACKET.size + payload
        self.salt = salt
        self.checks = checks
        self.damaged = 0
        self._bytes = bytearray(capacity * self.slot)
        self._view = memoryview(self._bytes)
        self._batch = Batch.of(payload)
        self._payloads = []             # of each slot, made when first needed
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
        self._rest = 0                  # bytes read that are no packet yet
        self._short = {}                # size of the packets that are short
        self._any_size = size is None
        self._full_sized = count        # so many packets may be, or must be
        if size is not None and size != count * self.payload:
            self._full_sized = count - 1
            self._short[count - 1] = size - (count - 1) * self.payload
        self._have = bytearray(count)
        self._missing = count
        self.received = 0

    def info(self, number):
        """The round's buffer info, 16 bytes."""
        return ROUND.pack(number & MASK, self.size, self.base, self.count)

    def index(self, seq):
        """The place of a seq in the round, from 0; it may lie outside."""
        return (seq - self.base) & MASK

    def packet_size(self, index):
        """The payload in bytes of a packet of this round."""
        return self._short.get(index, self.payload)

    # ---- the server's side

    def fill(self, source):
        """Read once from the image and make packets of it: buffer_fill.

        source.read_into(view) -> bytes read, 0 at the image's end, None if there
        is nothing yet.  Only the last packet of the image is short.  Sets
        `ended` at the image's end.
        """
        payload, first = self.payload, self.count
        staging = source.staging(Batch.MOST * payload)
        room = min(len(staging), (self.limit - first) * payload)
        got = source.read_into(staging[self._rest:room])
        if got is None:
            return
        self._rest += got
        count = self._rest // payload
        if count:
            pieces = self._batch.payloads(count).unpack_from(staging)
            seq = (self.base + first) & MASK
            fields = [payload] * (4 * count)
            fields[0::4] = consecutive(seq, count)
            fields[1::4] = map(self.checks[0], pieces,
                               range(self.salt + seq, self.salt + seq + count))
            fields[3::4] = pieces
            self._batch.packets(count).pack_into(
                self._bytes, first * self.slot, *fields)
            self.count += count
            self.size += count * payload
            self._rest -= count * payload
            staging[:self._rest] = staging[count * payload:][:self._rest]
        if not got:
            if self._rest:
                self.add(staging[:self._rest].tobytes())
            self.ended = True

    full = property(lambda self: self.ended or self.count >= self.limit)

    def add(self, data):
        """Add one packet with a payload of up to a full one's size."""
        index, seq = self.count, (self.base + self.count) & MASK
        start = index * self.slot
        PACKET.pack_into(self._bytes, start, seq,
                         self.checks[0](data, self.salt + seq), len(data))
        self._view[start + PACKET.size:start + PACKET.size + len(data)] = data
        if len(data) != self.payload:
            self._short[index] = len(data)
        self.count += 1
        self.size += len(data)

    def get(self, seq):
        """A packet as it goes on the wire, a memoryview: packet_get."""
        return self.packets(self.index(seq), self.index(seq) + 1)[0]

    def packets(self, first, last):
        """The packets from index first up to last as few adjacent slices.

        Returns memoryviews; only the last packet of each may be short.
        """
        slices = []
        ends = sorted(i + 1 for i in self._short if first <= i < last - 1)
        for end in ends + [last]:
            stop = end * self.slot - self.payload + self.packet_size(end - 1)
            slices.append(self._view[first * self.slot:stop])
            first = end
        return slices

    # ---- the client's side

    def put(self, data, offset, count, payload):
        """Take received packets that lie back to back: packet_put.

        data, offset: where they are; count: how many; payload: bytes of each
        behind its header.  Those outside the round, duplicates, and those
        whose size or checksum is wrong are ignored.
        """
        if not 0 < payload <= self.payload:
            self.damaged += count
            return
        slot = PACKET.size + payload
        headers = Batch.of(payload).headers(count).unpack_from(data, offset)
        first = (headers[0] - self.base) & MASK
        last = first + count
        if (payload == self.payload and last <= self._full_sized and len(self.checks) == 1
                and headers[0::3] == consecutive(headers[0], count)
                and headers[2::3].count(payload) == count
                and self._have.find(b'\1', first, last) < 0):
            # Most likely all are as they should be: so to their place with them.
            self._view[first * slot:last * slot] = memoryview(data)[
                offset:offset + count * slot]
            number = self.salt + self.base + first
            sums = map(self.checks[0], self._parts(first, last), range(number, number + count))
            if tuple(sums) == headers[1::3]:
                self._have[first:last] = b'\1' * count
                self._missing -= count
                self.received += count
                return
        self._put_mixed(data, offset, count, payload)

    def _put_mixed(self, data, offset, count, payload):
        """Take packets of which some may be elsewhere, twice, or damaged."""
        fields = Batch.of(payload).packets(count).unpack_from(data, offset)
        seqs, crcs, sizes, pieces = [fields[i::4] for i in range(4)]
        if len(self.checks) > 1:
            matching = [check for check in self.checks if check(pieces[0], 0) == crcs[0]]
            self.checks[:] = matching[:1] or self.checks
        slot = PACKET.size + payload
        # A check takes its number modulo 2^32.
        sums = tuple(map(self.checks[0], pieces, [self.salt + seq for seq in seqs]))
        for start, stop in runs(seqs):
            first = (seqs[start] - self.base) & MASK
            last = first + stop - start
            if (payload == self.payload and last <= self._full_sized
                    and sums[start:stop] == crcs[start:stop]
                    and sizes[start:stop] == (payload,) * (stop - start)
                    and self._have.find(b'\1', first, last) < 0):
                self._view[first * slot:last * slot] = memoryview(data)[
                    offset + start * slot:offset + stop * slot]
                self._have[first:last] = b'\1' * (stop - start)
                self._missing -= stop - start
                self.received += stop - start
                continue
            for i in range(start, stop):
                index = (seqs[i] - self.base) & MASK
                if sums[i] != crcs[i] or sizes[i] != payload:
                    self.damaged += 1
                elif (index < self.count and not self._have[index]
                      and (self._any_size or payload == self.packet_size(index))):
                    self._store(index, payload, data, offset + i * slot)

    def _parts(self, first, last):
        """The payloads in the slots from index first up to last, not copied."""
        if not self._payloads:
            self._payloads = [part(self._bytes, start + PACKET.size, self.payload)
                              for start in range(0, len(self._bytes), self.slot)]
        return self._payloads[first:last]

    def _store(self, index, payload, data, offset):
        start, size = index * self.slot, PACKET.size + payload
        self._view[start:start + size] = memoryview(data)[offset:offset + size]
        if payload != self.payload:
            self._short[index] = payload
        self._have[index] = 1
        self._missing -= 1
        self.received += 1

    complete = property(lambda self: not self._missing)

    def has(self, index):
        """Whether a packet has arrived, by its place in the round."""
        return bool(self._have[index])

    def missing(self):
        """The places in the round of what has not arrived, ascending."""
        return [i for i in range(self.count) if not self._have[i]] if self._missing else []

    def payload_of(self, index):
        """The payload of a packet by its place, padded with zeros to a full one."""
        start = index * self.slot + PACKET.size
        data = self._view[start:start + self.packet_size(index)].tobytes()
        return data + b'\0' * (self.payload - len(data))

    def restore(self, index, padded):
        """Put a packet's payload that was solved for (see Coded repair)."""
        size = self.packet_size(index)
        seq = (self.base + index) & MASK
        header = PACKET.pack(seq, self.checks[0](padded[:size], self.salt + seq), size)
        self._store(index, size, bytearray(header + padded[:size]), 0)

    def flush(self):
        """The round's bytes in one piece, for the output: buffer_flush.

        Returns a memoryview that is valid until the next start().  The
        payloads move to the front, so the packets are gone afterwards.
        """
        end = 0
        for first in range(0, self.count, Batch.MOST):
            pieces = self._parts(first, min(first + Batch.MOST, self.count))
            if self._short:
                pieces = [piece[:self.packet_size(first + i)]
                          for i, piece in enumerate(pieces)]
            data = join(pieces)
            self._view[end:end + len(data)] = data
            end += len(data)
        return self._view[:end]


# ---------------------------------------------------------------------------
# Coded repair
# ---------------------------------------------------------------------------

# One multicast XOR of several packets repairs a different loss at each client
# (Nguyen et al., "Wireless Broadcast Using Network Coding", 2009), as long as
# no client lacks more than one of them.

MOST_MEMBERS = 600                      # a recipe must fit in a datagram


def combine(requests, most=MOST_MEMBERS):
    """Group lost packets so that no client lacks two of one group.

    requests: a list of the indexes that each client asked for.  Greedy, most
    wanted packet first, each into the first group in which it collides with
    no client.  Returns lists of indexes.
    """
    wanted = collections.defaultdict(int)           # index -> clients, as bits
    for number, indexes in enumerate(requests):
        for index in set(indexes):
            wanted[index] |= 1 << number
    everybody = (1 << len(requests)) - 1
    groups, growing = [], []                        # growing: [clients, members]
    for index in sorted(wanted, key=lambda i: (-bin(wanted[i]).count('1'), i)):
        mask = wanted[index]
        for group in growing:
            if not group[0] & mask:
                group[0] |= mask
                group[1].append(index)
                if group[0] == everybody or len(group[1]) >= most:
                    growing.remove(group)
                break
        else:
            members = [index]
            groups.append(members)
            if mask != everybody:
                growing.append([mask, members])
    return groups


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
        payload = U32.pack(number & MASK)
        for members in part:
            payload += struct.pack('<%dH' % (1 + len(members)), len(members), *members)
        payloads.append(payload)
        number += len(part)
    return payloads


def most_members(payload):
    """How many members a combination may have at a payload of so many bytes."""
    return min(MOST_MEMBERS, (payload - 6) // 2)


def encode_repair(buffer, groups, number, salt):
    """The datagrams of a repair pass, as a Buffer, and how many are recipes."""
    first = recipes(groups, number, buffer.payload)
    coded = Buffer(buffer.payload, len(first) + len(groups), salt)
    coded.start(number, 0, 0)
    for payload in first:
        coded.add(payload)
    for members in groups:
        total = 0
        for index in members:
            total ^= to_int(buffer.payload_of(index))
        coded.add(to_bytes(total, buffer.payload))
    return coded, len(first)


def read_recipe(payload):
    """(repair number, members) of each combination in a recipe."""
    if len(payload) < U32.size:
        return
    number, offset = U32.unpack_from(payload)[0], U32.size
    while offset + 2 <= len(payload):
        count = struct.unpack_from('<H', payload, offset)[0]
        if offset + 2 + 2 * count > len(payload):
            return
        yield number, struct.unpack_from('<%dH' % count, payload, offset + 2)
        number = (number + 1) & MASK
        offset += 2 + 2 * count


def solve(buffer, coded, recipe_count):
    """Recover lost packets of a buffer from what arrived of a repair pass.

    coded: the pass as a Buffer.  Returns the number of packets recovered.
    """
    recovered = 0
    for place in range(min(recipe_count, coded.count)):
        if not coded.has(place):
            continue
        recipe = coded.payload_of(place)[:coded.packet_size(place)]
        for number, members in read_recipe(recipe):
            at = coded.index(number)
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
MSG_DONTWAIT = 0x40
MOST_SEGMENTS = 64                      # UDP_MAX_SEGMENTS of the first kernels
LARGEST_SEND = 65507                    # bytes of UDP payload in an IP packet
SOCKET_BUFFER = 16 << 20                # what a receiver asks for, bytes

# These mean that a way of sending does not work here, not that a packet
# could not be sent (udp(7); EIO: no checksum offload on this device).
NO_SUCH_WAY = frozenset((errno.EIO, errno.EINVAL, errno.EMSGSIZE,
                         errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOPROTOOPT))
QUEUE_FULL = frozenset((errno.ENOBUFS, errno.ENOMEM))

# struct iovec, and struct mmsghdr: name, its length, iovec, how many,
# control, its length, flags; bytes received (0P: aligned as a pointer is).
IOVEC = struct.Struct('@PL')
MMSGHDR = 'PIPLPLi0PI0P'
CMSG = struct.Struct('@Liii')           # struct cmsghdr with an int as its data
CONTROL_SIZE = 64                       # bytes, room for CMSG


def address_of(data):
    """Where a bytearray lies in memory; it must not change its size."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))


class MessageVector(object):
    """Many struct mmsghdr at once, for sendmmsg(2) and recvmmsg(2)."""

    def __init__(self, messages):
        """messages: a list of (iovecs, control address, control size);
        iovecs: a list of (address, size).  Addresses must stay valid."""
        iovecs = [iovec for entry in messages for iovec in entry[0]]
        self._iovecs = bytearray(IOVEC.size * len(iovecs))
        for i, iovec in enumerate(iovecs):
            IOVEC.pack_into(self._iovecs, i * IOVEC.size, *iovec)
        where = address_of(self._iovecs)
        self._one = struct.Struct('@' + MMSGHDR)
        self._all = {}
        self._template = bytearray(self._one.size * len(messages))
        for i, (vector, control, size) in enumerate(messages):
            self._one.pack_into(self._template, i * self._one.size, 0, 0,
                                where, len(vector), control, size, 0, 0)
            where += IOVEC.size * len(vector)
        self._headers = bytearray(self._template)
        self._address = address_of(self._headers)

    def send(self, fd, count):
        """sendmmsg(2) of the first `count`: how many were sent; raises OSError."""
        return self._call('sendmmsg', fd, count)

    def receive(self, fd, count):
        """recvmmsg(2) without waiting: (sizes, control sizes) in bytes."""
        self._headers[:] = self._template
        got = self._call('recvmmsg', fd, count, None)
        if got not in self._all:
            self._all[got] = struct.Struct('@' + MMSGHDR * got)
        fields = self._all[got].unpack_from(self._headers)
        return fields[7::8], fields[5::8]

    def _call(self, name, fd, count, *more):
        function = getattr(LIBC, name, None)
        if function is None:
            raise OSError(errno.ENOSYS, 'no %s' % name)
        headers = ctypes.c_void_p(self._address)
        result = function(fd, headers, count, MSG_DONTWAIT, *more)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


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
        self._slot = None               # what the kernel or _vector is set up for

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
        try:
            return getattr(self, '_send_' + self.way)(buffer, first, last)
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
        data = buffer.packets(first, last)[0]
        self.sock.send(data)
        return first + -(-len(data) // buffer.slot)

    def _send_mmsg(self, buffer, first, last):
        data = buffer.packets(first, last)[0]
        whole = len(data) // buffer.slot
        if not whole:
            self.sock.send(data)        # a short packet
            return first + 1
        if buffer.slot != self._slot:
            self._slot = buffer.slot
            self._staging = bytearray(MOST_SEGMENTS * self._slot)
            where = address_of(self._staging)
            self._vector = MessageVector(
                [([(where + i * self._slot, self._slot)], 0, 0)
                 for i in range(MOST_SEGMENTS)])
        self._staging[:whole * self._slot] = data[:whole * self._slot]
        return first + self._vector.send(self.sock.fileno(), whole)

    def _send_plain(self, buffer, first, last):
        self.sock.send(buffer.packets(first, first + 1)[0])
        return first + 1

    def close(self):
        """Close the socket."""
        self.sock.close()


class DatagramReceiver(object):
    """Receives a group's datagrams, many a call.

    Each message of a call has a slot of one packet's size, and the slots are
    adjacent, so full packets that arrive one by one lie back to back, as those
    do that the kernel joined.  What is longer than its slot goes on in a spill
    area.  While the kernel joins datagrams, slots are as large as they can be.
    """

    MESSAGES = 32                       # in a call
    JOINED = 16                         # in a call, where each is many datagrams
    SPILL = 65536                       # bytes

    def __init__(self, local_ip, group, port, payload, way='auto'):
        """local_ip: address of the ingress interface; payload: bytes in a
        full packet; way: one of WAYS.  Raises OS_ERRORS.
        """
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._join(local_ip, group, port)
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
        slots, spill, control = [
            address_of(data) for data in (self._slots, self._spill, self._control)]
        self._single = MessageVector([
            ([(slots + i * self.slot, self.slot), (spill + i * self.SPILL, self.SPILL)],
             control + i * CONTROL_SIZE, CONTROL_SIZE) for i in range(self.MESSAGES)])
        self._joined = MessageVector([
            ([(spill + i * self.SPILL, self.SPILL)],
             control + i * CONTROL_SIZE, CONTROL_SIZE) for i in range(self.JOINED)])
        self._joins = False             # whether the last call got joined datagrams

    def _join(self, local_ip, group, port):
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
        self.sock.bind((group, port))
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                             socket.inet_aton(group) + socket.inet_aton(local_ip))
        self.sock.setblocking(False)

    def fileno(self):
        """For poll(): readable when there are datagrams."""
        return self.sock.fileno()

    def receive(self):
        """What has arrived, without waiting, as a list of batches.

        A batch is what Buffer.put takes: (data, offset, count, payload), valid
        until the next call.  None when nothing has arrived.
        """
        joins = self._joins
        try:
            if self.way == 'plain':
                sizes, controls = self._receive_one_by_one(), ()
            elif joins:
                sizes, controls = self._joined.receive(self.fileno(), self.JOINED)
            else:
                sizes, controls = self._single.receive(self.fileno(), self.MESSAGES)
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
        self._joins = any(controls)
        if not joins and sizes.count(slot) == len(sizes) and not self._joins:
            return [(self._slots, 0, len(sizes), slot - PACKET.size)]
        batches = []
        for i, size in enumerate(sizes):
            segment = self._segment_size(i) if controls and controls[i] else size
            data, offset = self._spill, i * self.SPILL
            if not joins:
                data, offset = self._slots, i * slot
                if size > slot:
                    data = data[offset:offset + slot] + self._spill[i * self.SPILL:i * self.SPILL + size]
                    offset = 0
            while size > PACKET.size and segment > PACKET.size:
                count = min(max(1, size // segment), Batch.MOST)
                segment = min(segment, size)        # the last may be shorter
                batches.append((data, offset, count, segment - PACKET.size))
                offset += count * segment
                size -= count * segment
        return batches

    def _segment_size(self, i):
        """The size in bytes of the datagrams that are joined in message i."""
        _, level, kind, segment = CMSG.unpack_from(self._control, i * CONTROL_SIZE)
        return segment if (level, kind) == (SOL_UDP, UDP_GRO) else 0

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
    CATCH_UP = 0.004                    # seconds of delay that are made good

    def __init__(self):
        self.rate = UNLIMITED           # bit/s of IP packets
        self._next = 0.0

    def start(self):
        """Begin afresh: time that has passed is not made good."""
        self._next = monotonic()

    def burst(self, packet_size):
        """How many packets of so many bytes to send in one go."""
        if self.rate == UNLIMITED:
            return MOST_SEGMENTS
        return int(max(1, min(MOST_SEGMENTS, self.rate * self.BURST / 8 / packet_size)))

    def sent(self, size):
        """Count `size` bytes just sent; returns when to send again, seconds
        on the monotonic clock."""
        self._next = max(self._next, monotonic() - self.CATCH_UP) + size * 8 / self.rate
        return self._next


class RateControl(object):
    """Finds the fastest rate that the slowest link carries: `--rate auto`.

    The only evidence are the losses of each round.  Doubles the rate from
    round to round until that costs packets, then goes straight down to what
    got through, and from there up in small steps that grow; a step that costs
    packets is taken back, and the next one comes later each time.  A loss that
    does not fall with the rate, or does not rise with it, is the medium's own:
    it is remembered as such, and only what is lost beyond it counts.
    """

    START = 200e6                       # bit/s
    LOWEST = 1e6                        # bit/s
    TOLERATED = 0.02                    # share of loss cheaper to repair than to avoid
    CLEAN = 0.0005                      # share of loss that allows to go faster
    STEP = 0.01                         # how much faster after a loss, as a share
    TELLING = 1024                      # packets: of a shorter round, queues hide too much,
    TELLING_TIME = 0.25                 # seconds: unless it took so long
    MOST_MEDIUM = 0.3                   # share of loss up to which a client counts
    HOLD = 4                            # rounds to stay at a rate, until a trial
    LONGEST_HOLD = 16                   # rounds
    TRIAL = 0.03                        # how much faster a trial is, as a share

    def __init__(self):
        self.rate = self.START
        self.medium = 0.0               # share of packets lost at any rate
        self._starting = True           # no loss yet that made us slower
        self._step = 1.0                # how much faster next, as a share
        self._cut = None                # (rate, share got through) before a telling cut
        self._top = None                # rate before the first of the cuts in a row
        self.hopeless = False           # the worst client loses too much at any rate
        self._held = 0                  # rounds at this rate, with some loss
        self._clean = None              # the rate, if it cost no packets, before a step
        self._hold = self.HOLD          # rounds to stay there after the next step back
        self._stay = 0                  # of these, those left
        self._trial = None              # (rate, share lost) before a trial

    def round_over(self, count, lost, achieved, seconds):
        """Learn from a round, and set the next one's `rate`.

        count: packets sent; lost: the places that the worst client lost,
        ascending; achieved: bit/s at which they were sent, at most `rate`, in
        so many seconds.  Returns why the rate changed, or None.  Sets
        `hopeless` when the worst client should be left out from now on.
        """
        telling = count >= self.TELLING or seconds >= self.TELLING_TIME
        self.hopeless = False
        share = len(lost) / count
        if self._unusual(len(lost), count, self.TOLERATED):
            return self._too_much(count, lost, achieved, telling)
        self._cut = self._top = None
        if self._starting or share < self.medium:
            self.medium += 0.25 * (share - self.medium)
        trial, self._trial = self._trial, None
        if trial and telling:
            if share > trial[1] + self.TRIAL / 2:
                self.rate, self._held = trial[0], 0
                return 'faster costs packets'
            self.medium = min(share, self.medium + self.TOLERATED)
        if achieved < 0.7 * self.rate:
            return None                 # we are the slowest
        if self._starting or not self._unusual(len(lost), count, self.CLEAN):
            self._held = 0
            if self._stay:
                self._stay -= 1
                return None
            self._clean = self.rate if telling else None
            self.rate *= 1 + self._step
            self._step = min(1.0, 2 * self._step)
            return 'no loss to speak of'
        if self._clean:
            self.rate, self._clean, self._step = self._clean, None, self.STEP
            self._stay, self._hold = self._hold, min(self.LONGEST_HOLD, 2 * self._hold)
            return 'the last step costs packets'
        self._held += 1                 # about as fast as it can be, or the medium
        if self._held < self.HOLD:
            return None
        self._trial, self._held = (self.rate, share), 0
        self.rate *= 1 + self.TRIAL
        return 'to see whether %.1f %% are lost at any rate' % (100 * share)

    def _unusual(self, lost, count, tolerated):
        """Whether so many lost packets of `count` are more than the medium's
        own, a tolerated share, and chance."""
        usual = (self.medium + tolerated) * count
        return lost > usual + 3 * math.sqrt(usual) + 1

    def _too_much(self, count, lost, achieved, telling):
        """Slow down, unless that did not help the last time."""
        share, rate = len(lost) / count, min(self.rate, achieved)
        # Once the queue before the slow link is full, the share that still
        # gets through tells how slow that link is.
        behind = count - lost[0]
        through = 1 - (len(lost) / behind if behind >= count / 4 else share)
        self._top = self._top or self.rate
        if telling and self._cut:
            rate_then, through_then = self._cut
            if_full = min(1, through_then * rate_then / rate)
            if through < through_then + 0.4 * (if_full - through_then):
                self.rate, self._top, self._cut = self._top, None, None
                self._step, self._stay = 1.0, 0
                self.hopeless = share > self.MOST_MEDIUM
                if not self.hopeless:
                    self.medium = share
                return 'a loss of %.1f %% at any rate' % (100 * share)
        self._starting, self._trial, self._held = False, None, 0
        self._clean, self._hold = None, self.HOLD
        self._cut = (rate, through) if telling else None
        self._step, self._stay = (self.STEP, self.HOLD) if telling else (8 * self.STEP, 0)
        self.rate = max(self.LOWEST, rate / (1 - self.medium)
                        * max(through, (1 - share) / 2))
        return '%.1f %% lost' % (100 * share)


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------

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
                    raise Failure('how the command ended cannot be known (%s): %s'
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
            raise Failure('the command %s: %s' % (
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


class Source(object):
    """Where the server's image comes from: standard input, a file, a command.

    name, size (bytes) are None where they are not known.
    """

    def __init__(self, path=None, command=None, digest=True):
        """path: of a file; command: for the shell, which start() starts.  Raises Failure."""
        self._text = command
        self._command = None
        self._file = None
        self.name = path and os.path.basename(path)
        self.size = None
        self.bytes = 0
        self.drained = False            # nothing more to read, but the command still runs
        self._hash = hashlib.sha256() if digest else None
        self._staging = bytearray()
        if command is not None:
            return
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
            self.size = max(0, status.st_size - os.lseek(fd, 0, os.SEEK_CUR))

    def start(self):
        """All is well here: start the command, if there is one.  Raises Failure."""
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
        return self._file.fileno()

    def staging(self, size):
        """A memoryview of `size` bytes to read into, the same each time."""
        if len(self._staging) != size:
            self._staging = bytearray(size)
        return memoryview(self._staging)

    def read_into(self, view):
        """Read once; returns bytes read, 0 at the image's end, None if there is nothing yet.

        Raises Failure, also at the end when the command failed, or when a
        file has another size than it had at the beginning.
        """
        try:
            got = uninterrupted(self._file.readinto, view)
        except OS_ERRORS as error:
            raise Failure('cannot read the image: %s' % explain(error))
        if got is None:                 # whoever gave us the pipe wants it not to block
            return None
        if not got:
            self.drained = bool(self._command) and not self._command.succeeded()
            if self.drained:
                return None
            if self.size and self.bytes != self.size:       # the files of /proc say 0
                raise Failure('the image had %d bytes, and now has %d: is it still being '
                              'written?' % (self.size, self.bytes))
        self.bytes += got
        if self._hash:
            self._hash.update(view[:got])
        return got

    def look(self):
        """A look at the command while nothing else is to do.  Raises Failure."""
        if self._command:
            self._command.look()

    def digest(self):
        """SHA-256 of all that was read so far; b'' without digests."""
        return self._hash.digest() if self._hash else b''

    def end(self):
        """Ask the command to end: nobody reads on."""
        if self._command:
            self._command.end()

    def close(self):
        """Stop reading."""
        if self._command:
            self._command.close()
        if self._file:
            self._file.close()

        # Not under a writer that hangs in it: another file would get its number.


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


def remove_dead(folder, prefix):
    """Remove the temporary files of runs that are dead: their locks are free."""
    try:
        names = os.listdir(folder)
    except OS_ERRORS:
        return
    for name in names:
        if not re.match(re.escape(prefix) + r'[0-9a-f]{12}\.part$', name):
            continue
        path = os.path.join(folder, name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OS_ERRORS:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            tell('removed', path=printable(path))
        except OS_ERRORS:
            pass                        # somebody writes it, or it is not ours to remove
        finally:
            os.close(fd)


class Sink(object):
    """Where the client's image goes: standard output, a file, a command.

    A file is written under a temporary name beside its target and takes its
    place at commit(); what is not a regular file is written in place.  Who has
    the temporary file open holds its lock, flock(2), so that of a dead run can
    be told from that of a living one.
    """

    LAST_WORDS = 1.0                    # seconds for a command that reads no more to end

    def __init__(self, path=None, command=None):
        """path: of the target; command: for the shell."""
        self._path, self._text = path, command
        self._target = self._temporary = self._command = self._fifo = None
        self._fd = None
        self._fate = {}                 # 'is': 'commit' or 'discard', whichever came first
        self.written = 0                # bytes
        self._chunk = 1 << 20           # bytes in a write

    def open(self):
        """Find out whether it can be written to; returns the Sink.  Raises Failure."""
        path = self._path
        try:
            if self._text is not None:
                return self
            if path is None:
                if os.isatty(1):
                    raise Failure('standard output is a terminal; give "> FILE", a pipe, '
                                  '-o FILE or --pipe COMMAND', USAGE)
                self._fd = 1
                os.fstat(1)
            elif os.path.exists(path) and not os.path.isfile(path):
                kind = os.stat(path).st_mode
                if stat.S_ISFIFO(kind):
                    self._fifo = path
                    self._open_fifo()
                else:
                    flags = os.O_EXCL if stat.S_ISBLK(kind) else 0  # not a disk that is mounted
                    self._fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | flags)
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
                self._open_temporary(folder, '.%s.' % name[:60])
        except OS_ERRORS as error:
            reason = explain(error)
            if errno_of(error) == errno.EBUSY and not self._target:
                reason += ' (it may be mounted)'
            raise Failure('cannot write %s: %s' % (
                'standard output' if path is None else printable(path), reason), USAGE)
        return self

    def _open_temporary(self, folder, prefix):
        """Open a new file, and remove those that dead runs have left."""
        remove_dead(folder, prefix)
        ours = False
        while not ours:
            # Its name is kept before there is such a file: a signal may come at any moment.
            self._temporary = os.path.join(folder, prefix + '%012x.part' % to_int(os.urandom(6)))
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.fstat(self._fd).st_nlink > 0
            except OS_ERRORS as error:  # another run just removes it; or there are no locks here
                ours = errno_of(error) not in TRY_AGAIN
            if not ours:
                os.close(self._fd)

    def _open_fifo(self):
        """Open it if somebody reads from it; returns whether it is open."""
        try:
            self._fd = os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OS_ERRORS as error:
            if errno_of(error) != errno.ENXIO:      # fifo(7): nobody does
                raise
        return self._fd is not None

    def expect(self, size):
        """The image will have so many bytes: find out whether there is room.  Raises Failure."""
        room = None
        if self._target:
            space = os.fstatvfs(self._fd)
            if space.f_blocks:          # else one without a limit, such as ramfs, says 0 of all
                room = (space.f_bavail if os.geteuid() else space.f_bfree) * space.f_frsize
        elif self._path is not None and self._fd is not None:
            if stat.S_ISBLK(os.fstat(self._fd).st_mode):
                room = os.lseek(self._fd, 0, os.SEEK_END)
                os.lseek(self._fd, 0, os.SEEK_SET)
        if room is not None and size > room:
            raise Failure('no room for the image at %s: it has %d bytes, and there is room for %d'
                          % (printable(self._path), size, room), NOT_STARTED)

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
            raise Failure('cannot start the command: %s' % explain(error))

    def write(self, data):
        """Write all of a memoryview.  Raises Failure."""
        try:
            while self._fd is None and not self._open_fifo():
                self._wait_a_moment()
            while len(data):
                try:
                    count = uninterrupted(os.write, self._fd, data[:self._chunk])
                except OS_ERRORS as error:
                    if errno_of(error) not in TRY_AGAIN:
                        raise
                    self._wait_a_moment()           # a pipe that we were given so
                    continue
                self.written += count
                data = data[count:]
        except OS_ERRORS as error:
            if errno_of(error) == errno.EPIPE and self._command:
                self._command.finish(self.LAST_WORDS)
                raise Failure('the command read no more: %s' % printable(self._text))
            if errno_of(error) == errno.EPIPE:
                raise Failure('what reads the image has ended')
            raise Failure('cannot write the image: %s' % explain(error))

    def _wait_a_moment(self):
        """Wait until the output takes more, or for a while."""
        if self._fate.get('is') == 'discard':
            raise Failure('stopped')
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
            raise Failure('stopped')

    def commit(self):
        """The image is complete and verified: make it so.  Raises Failure."""
        try:
            if self._command:
                self._command.pipe.close()
                self._command.finish()
                self._decide()
                return
            while self._fd is None and not self._open_fifo():
                self._wait_a_moment()
            if self._fd != 1 and not stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                self._sync(self._fd)
            if self._target:
                os.fchmod(self._fd, self._mode())
            self._decide()
            if self._target:
                os.rename(self._temporary, self._target)
                self._temporary = None
            os.close(self._fd)          # not before: it has the lock
        except OS_ERRORS as error:
            if not self._target or self._temporary:
                raise Failure('cannot finish the image: %s' % explain(error))
            tell('unfinished', step='closing it', reason=explain(error))
        if self._target:
            self._sync_folder()

    def _sync_folder(self):
        """Bring the new name to the disk.  It is too late to fail: the file is there."""
        try:
            folder = os.open(os.path.dirname(self._target), os.O_RDONLY)
            try:
                self._sync(folder)
            finally:
                os.close(folder)
        except OS_ERRORS as error:
            tell('unfinished', step='synchronising its folder', reason=explain(error))

    @staticmethod
    def _sync(fd):
        try:
            os.fsync(fd)
        except OS_ERRORS as error:
            if errno_of(error) not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise                   # these: a device that has no such thing

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
        """Unless it was committed, leave nothing behind."""
        self.end()
        if self._command:
            self._command.close()
        if self._temporary:
            try:
                os.unlink(self._temporary)
            except OS_ERRORS:
                pass
            self._temporary = None


class Writer(threading.Thread):
    """Verifies finished buffers and writes them, while the next is received.

    The main thread is its parent: a release means "here is a buffer", the
    other way "it is written".  When it fails it ends, which its parent sees.
    """

    def __init__(self, sink, digest):
        """sink: a Sink; digest: whether rounds come with a digest."""
        threading.Thread.__init__(self, name='writer')
        self.daemon = True
        self.sink = sink
        self.failure = None
        self.bytes = 0
        self.hash = hashlib.sha256() if digest else None
        self._jobs = collections.deque()
        self.link = SemLink()
        self._own_link = self.link.spawn()

    def give(self, buffer, size, digest):
        """Hand over a complete buffer, with what the server says of it: its
        size in bytes, and the image's digest through it."""
        self._jobs.append((buffer, size, digest))
        self.link.release_child()

    def commit(self):
        """After all buffers: make the image final, and end."""
        self._jobs.append((None, 0, None))
        self.link.release_child()

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
            os.nice(10)                 # everybody waits for the other thread's answers
            while True:
                self._own_link.wait_parent()
                buffer, size, digest = self._jobs.popleft()
                if buffer is None:
                    self.sink.commit()
                    return
                self._write(buffer.flush(), size, digest)
                self._own_link.release_parent()
        except LinkClosed:
            pass
        except Failure as error:
            self.failure = error
        except Exception as error:      # pylint: disable=broad-except
            self.failure = Failure(internal_error(error))
        finally:
            self._own_link.close()

    def _write(self, data, size, digest):
        if len(data) != size:           # without digests, all that tells
            raise Failure('a round of %d bytes instead of %d' % (len(data), size))
        if self.hash:
            self.hash.update(data)
            if self.hash.digest() != digest:
                raise Failure('the digest differs: what was received is not the '
                              'image; nothing of this round was written')
        self.sink.write(data)
        self.bytes += len(data)


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


MOST_PENDING = 256                      # connections of one address that are no clients (yet)


def allow_descriptors(options):
    """Make sure of enough file descriptors; sets `options.strangers`, how many
    connections of others there may be.  Raises Failure."""
    # Each client, both ends of each thread's link, a few strangers, our own.
    needed = options.clients + 2 * (1 + options.clients // options.clients_per_thread) + 48
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(1 << 20 if hard == resource.RLIM_INFINITY else hard, needed + MOST_PENDING)
    if limit < needed:
        raise Failure('%d clients need %d file descriptors, and the limit is %d; raise it '
                      'with "ulimit -n"' % (options.clients, needed, hard), USAGE)
    if soft != resource.RLIM_INFINITY and soft < limit:     # commands inherit it, so never lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    options.strangers = 16 + limit - needed


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
    """

    SIGNALS = {signal.SIGINT: 'SIGINT', signal.SIGTERM: 'SIGTERM', signal.SIGHUP: 'SIGHUP'}

    def __init__(self):
        self.state = None               # a function: whether of all hosts -> lines on how it stands
        self._first = None              # when the first came
        # An ignored SIGCHLD survives exec, and takes the exit codes of commands away: wait(2).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)   # we take the terminal back from commands
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._say_state)

    def __call__(self, number, _frame):
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

    # ---- out

    def send(self, *pieces):
        """Queue pieces of data, and send what can be sent without waiting.  Raises Gone."""
        for data in pieces:
            self.outgoing.put_tail(data)
        self.flush()

    def flush(self):
        """Send what can be sent without waiting.  Raises Gone."""
        while self.outgoing.count:
            data = self.outgoing.get_head()
            more = MSG_MORE if self.outgoing.count else 0
            try:
                count = self.sock.send(data, more)
            except OS_ERRORS as error:
                self.outgoing.put_head(data)
                if errno_of(error) in TRY_AGAIN or errno_of(error) in QUEUE_FULL:
                    return
                raise Gone(explain(error))
            self._sent += count
            self.moved = self.told = monotonic()
            if count < len(data):
                self.outgoing.put_head(memoryview(data)[count:])
                return

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

    def show_life(self, message):
        """Say `message` if the other end has heard nothing for as long as it likes.  Raises Gone."""
        if not self.outgoing.count and monotonic() - self.told >= self.alive_every:
            self.send(message)

    # ---- in

    def receive(self, most=65536):
        """Queue what has arrived; returns whether anything has.  Raises Gone."""
        try:
            data = self.sock.recv(most)
        except OS_ERRORS as error:
            if errno_of(error) in TRY_AGAIN:
                return False
            raise Gone(explain(error))
        if not data:
            raise Gone('the connection was closed')
        self.heard = monotonic()
        self.incoming.put_tail(data)
        return True

    def messages(self, size_of):
        """Receive once, and take apart what is complete; yields bytes.

        size_of(the first bytes) -> bytes of the whole message, None if it takes
        more to tell, 0 if what follows is for read_into().  Raises Gone, and what
        size_of raises.
        """
        gone = paused = None
        try:
            self.receive()
        except Gone as error:           # but what it said before it went is to be heard
            gone = error
        if gone or self.incoming.size >= self._need:
            data, start, self._need = self.incoming.flat(), 0, 1
            try:
                while start < len(data):
                    size = size_of(data[start:start + 5])
                    paused = size == 0
                    if not size or start + size > len(data):
                        self._need = 5 if size is None else size or 1
                        break
                    start += size
                    gone = None
                    yield data[start - size:start]
            finally:                    # be it that nobody wants more
                self.incoming.put_head(data[start:])
        if gone and not paused:
            raise gone

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
        if self.leaving and not self.outgoing.count:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OS_ERRORS:
                pass

    def close(self):
        """Close it; may be done twice."""
        if self.sock:
            self.outgoing.clear()
            self.sock.close()
            self.sock = None


# ---------------------------------------------------------------------------
# Window
# ---------------------------------------------------------------------------

# What happens in a round, without sockets, threads or clocks: messages and times
# in, what to do out.  A window of one round, today: the base protocol's lockstep.

# What a client can owe its server, in words for the log, and the signals that pay it.
READINESS, ANSWER = 'word that it is ready for the next round', 'word of what it received'
COMPLETION = 'word that it has everything'
PAYS = {READINESS: (READY,), ANSWER: (DONE, REQUEST), COMPLETION: (DONE,)}


class Step(object):
    """What a parent wants its TCP servers to do next; read-only once published.

    kind: accept (the clients; only TCP server 1), announce (the `buffer`),
    sent (the buffer, with its `digest`), again (repair: by multicast for the
    members in `coded`, AGAIN being `message`; by TCP for the others), repair
    (by TCP, and see to the end of it), finish (sent, and `message` is the last
    BYE), abort (`message` is the reason).
    """

    # For what a TCP server waits, before it releases its parent.
    AWAITED = {'accept': (), 'announce': (READINESS,), 'sent': (ANSWER,),
               'again': (), 'repair': (READINESS, ANSWER, COMPLETION),
               'finish': (COMPLETION,), 'abort': ()}

    def __init__(self, kind, buffer=None, digest=b'', coded=(), message=b'', info=None):
        self.kind = kind
        self.buffer = buffer
        self.digest = digest
        self.coded = coded
        self.message = message
        self.info = info
        self.awaited = self.AWAITED[kind]


class Member(object):
    """A client as the server's window and its roster know it.  Times are seconds."""

    MOST_SIGNS = 20                     # of life at once, and four times as many as we ask for

    def __init__(self, address, now):
        self.address, self.host = address, None
        self.since = now                # when it came
        self.owes = None                # a key of PAYS
        self.moved = now                # when it last paid, or showed life
        self.paid = 0.0                 # when it last owed nothing more
        self.signs = 0                  # of life
        self.listening = False          # to multicast, until SENT
        self.request = None             # places in the round, asked for
        self.lost = 0                   # packets it asked for, all in all
        self.by_tcp = 0                 # packets of these that went by TCP
        self.busy = None                # what it says that it is doing
        self.figures = {}               # what else it says of itself
        self.waited = {}                # seconds that all waited for it alone, by cause
        self.deaf_since = None          # when it last heard multicast, while it does not
        self.deaf_told = False
        self.outcome = None             # 'complete', or why not
        self.ended = None               # when
        self.sentence = None            # why its thread is to drop it at its next look

    def __str__(self):
        return '%s (%s)' % (self.host, self.address) if self.host else self.address

    identity = property(lambda self: (self.host, self.address))
    loopback = property(lambda self: self.address.startswith('127.'))

    def owe(self, what, now):
        """From now on it owes us something (or, None, nothing)."""
        self.owes = what
        self.moved = now
        if what is None:
            self.paid, self.busy = now, None


class ServerWindow(object):
    """What the clients of one TCP server owe, and what to do when they pay.

    What to do is a list of (verb, member, argument): `send` bytes, send the `packets`
    at some places of the round, or the member is `served`.
    """

    def __init__(self, dialect, stall_timeout):
        """stall_timeout: seconds for a member to move while it owes something; 0: for ever."""
        self.dialect, self.stall_timeout = dialect, stall_timeout
        self.members = []
        self.step = None

    def size_of(self, head):
        """As Connection.messages wants it."""
        buffer = self.step.buffer if self.step else None
        return self.dialect.client_message_size(head, buffer.count if buffer else 0)

    def begin(self, step, now):
        """The parent wants a step; returns what to do."""
        self.step = step
        return getattr(self, '_begin_' + step.kind)(step, now)

    def _begin_announce(self, step, now):
        for member in self.members:
            member.owe(READINESS, now)
        return [('send', member, self.dialect.buffer_info(step.info)) for member in self.members]

    def _begin_sent(self, step, now):
        listeners = [member for member in self.members if member.listening]
        for member in listeners:
            member.listening = False
            member.owe(step.awaited[0], now)
        return [('send', member, SENT + step.digest + step.message) for member in listeners]

    _begin_finish = _begin_sent

    def _begin_again(self, step, now):
        todo = []
        for member in self.members:
            if member.request and member in step.coded:
                member.listening = True
                todo.append(('send', member, AGAIN + step.message))
            elif member.request:
                member.owe(COMPLETION, now)
                member.by_tcp += len(member.request)
                todo.append(('packets', member, member.request))
            member.request = None
        return todo

    _begin_repair = _begin_again

    def awaited(self):
        """The members for whom the step waits."""
        return [member for member in self.members if member.owes in self.step.awaited]

    def requests(self):
        """What members ask for: places in the round."""
        return dict((member, member.request) for member in self.members if member.request)

    def stalled(self, member, moved, now):
        """Why to drop a member; None if it should stay.

        moved: when its connection last got anything through.
        """
        limit = self.stall_timeout
        if limit and now - max(moved, member.moved) > limit:
            return 'stalled: for %g s no %s' % (
                limit, member.owes or 'sign that it takes what is sent to it')
        return None

    def heard(self, member, message, now):
        """A message of a member; returns what to do.  Raises ProtocolError, Refused."""
        kind = message[:1]
        if kind == BYE:
            raise Refused('it says: %s' % field(unpack_frame(message[5:]), 'reason', TEXT))
        if kind in (ALIVE, STATE):
            member.signs += 1
            most = 4 * (now - member.since) / alive_every(self.stall_timeout)
            if member.signs > member.MOST_SIGNS + most:
                raise ProtocolError('far too many signs of life')
            if kind == ALIVE:
                member.moved = now
            else:                       # words alone move nothing
                self._state(member, unpack_frame(message[5:]))
            return []
        if kind not in PAYS.get(member.owes, ()):
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        return self.HANDLERS[kind](self, member, message, now)

    @staticmethod
    def _state(member, fields):
        """What a client says of itself: what it is doing, and figures for the report."""
        member.busy = field(fields, 'busy', TEXT, optional=True)
        member.figures = dict((key, field(fields, key, NUMBER)) for key in FIGURES if key in fields)

    def _ready(self, member, _message, now):
        member.owe(None, now)
        member.listening = True
        return []

    def _request(self, member, message, now):
        buffer = self.step.buffer
        seqs = struct.unpack('<%dI' % (len(message) // 4 - 1), message[5:])
        places = [(seq - buffer.base) & MASK for seq in seqs]
        if max(places) >= buffer.count:
            raise ProtocolError('a request for a packet outside the round')
        member.owe(None, now)
        member.request = places
        member.lost += len(places)
        return []

    def _done(self, member, _message, now):
        member.owe(None, now)
        if self.step.kind != 'finish':
            return []
        member.outcome, member.ended = 'complete', now
        return [('served', member, None)]

    HANDLERS = {READY: _ready, REQUEST: _request, DONE: _done}


class ClientWindow(object):
    """The round in flight as a client sees it.

    What to do is a list of (verb, argument): `send` bytes, hand (buffer, size, digest)
    over to be `write`n, `begin` to write, keep the server's words on its `state`, or
    `end`, with the fields of the last BYE.
    """

    SETTLE = 0.005                      # seconds for stragglers after SENT
    PROMPT = 0.01                       # seconds in which a prompt server goes on
    AT_WORK = 2                         # buffers that are received or written
    CHUNK = 64                          # packets read from TCP at once

    # What is waited for, and which signals may come then.
    NEXT, ROOM, MULTICAST, STRAGGLERS, REPAIR, BYTES, LAST_SENT, LAST_WORD, OVER = range(9)
    EXPECTED = {NEXT: (BUFFER_INFO,), MULTICAST: (SENT,), REPAIR: (PACKETS, AGAIN),
                LAST_SENT: (SENT,), LAST_WORD: (BYE,)}

    def __init__(self, dialect, payload, salts=(0, 0), digest=False, checks=None):
        """payload: bytes in a full packet; salts: for packets, and for repairs;
        digest: whether rounds come with one; checks: as Buffer takes them."""
        self.dialect, self.payload, self.digest = dialect, payload, digest
        self._salt, self._repair_salt = salts
        self._checks = checks or list(dialect.checks)
        self.state = self.NEXT
        self.listening = None           # the Buffer that multicast is for
        self.wants = None               # a memoryview to be filled from TCP
        self.deadline = None            # when to call tick(), seconds
        self.begun = False              # a round was announced
        self.rounds = 0
        self.by_multicast = self.by_tcp = self.coded = 0        # packets
        self._base = None               # of the next round
        self._announced = None          # a round for which there is no room yet
        self._buffer = self._size = None            # the round
        self._received = 0              # packets of it by the last look
        self._round_digest = b''
        self._repair = None             # (coded Buffer, how many are recipes)
        self._places = []               # asked for by TCP
        self._staging = self._filled = None
        self._finished = None           # a round that the writer should have
        self._free = []                 # buffers
        self._lent = collections.deque()            # buffers that the writer has, or will have

    @property
    def owing(self):
        """Whether the server waits for us: to be told that something moves."""
        return self.state in (self.ROOM, self.BYTES)

    @property
    def unwritten(self):
        """Rounds that the writer has, or will have."""
        return len(self._lent)

    def size_of(self, head):
        """As Connection.messages wants it: 0 while what follows must wait, or is no message."""
        if self.wants is not None or self.state in (self.STRAGGLERS, self.OVER):
            return 0
        if self.dialect.talks:
            self._check_turn(head[:1])
            return self.dialect.server_message_size(head, DIGEST_SIZE if self.digest else 0)
        return ROUND.size if self.state == self.NEXT else 1

    def _check_turn(self, kind):
        """Raises ProtocolError if such a signal cannot come now."""
        anytime = (ALIVE, STATE, BYE) if self.dialect.talks else ()
        if kind not in anytime + self.EXPECTED.get(self.state, ()):
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))

    # ---- what the server says

    def heard(self, message, now):
        """A message of the server; returns what to do.  Raises ProtocolError, Refused."""
        if self.dialect.talks or self.state != self.NEXT:
            kind, message = message[:1], message[1:]
        else:
            kind = BUFFER_INFO
        if kind == ALIVE and self.dialect.talks:
            return []
        if kind == STATE and self.dialect.talks:
            return [('state', unpack_frame(message[4:]))]
        self._check_turn(kind)
        if kind == BYE:
            fields = unpack_frame(message[4:])
            if fields.get('ok') is not True:
                raise Refused('the server says: %s' % field(fields, 'reason', TEXT))
            if self.state != self.LAST_WORD:
                raise ProtocolError('the end before the end')
        if kind == BUFFER_INFO:
            return self._on_info(*ROUND.unpack(message))
        if kind == SENT:
            return self._on_sent(message, now)
        if kind == AGAIN:
            return self._on_again(*REPAIR.unpack(message))
        if kind == PACKETS:
            return self._expect_packets()
        self.state = self.OVER
        return [('end', fields)]

    def _on_info(self, _number, size, base, count):
        if base != (base if self._base is None else self._base):
            raise ProtocolError('a round that begins at %d, not %d' % (base, self._base))
        self._base = (base + count) & MASK
        first, self.begun = not self.begun, True
        if not count:
            self.state, self.deadline = self.LAST_SENT, None
            return [('send', READY)] + self._hand_over()
        payload = self.payload
        if not self.dialect.sizes and size > count * payload:
            payload = payload_for(9000)     # nothing else tells of jumbo frames there
        least = (count - 1) * payload + 1 if self.dialect.sizes else count
        if count > MAX_PACKETS or not least <= size <= count * payload:
            raise ProtocolError('a buffer of %d packets and %d bytes' % (count, size))
        self.rounds += 1
        self._announced = base, count, size, payload
        self.state, self.deadline = self.ROOM, None
        return ([('begin', None)] if first else []) + self._make_room()

    def _make_room(self):
        """Begin the round that was announced, if a buffer is free for it."""
        if len(self._lent) >= self.AT_WORK:
            return self._hand_over()
        base, count, size, payload = self._announced
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.capacity < count or buffer.payload != payload:
            buffer = Buffer(payload, count, self._salt, self._checks)
        buffer.start(base, count, size if self.dialect.sizes else None)
        self._buffer, self._size = buffer, size
        self._listen(buffer)
        # All clients wait for the last READY, and hashing would delay ours.
        return [('send', READY)] + self._hand_over()

    def _hand_over(self):
        """Give the writer what it is to write, if there is anything."""
        finished, self._finished = self._finished, None
        return [('write', finished)] if finished else []

    def _listen(self, buffer):
        self.listening, self._received = buffer, buffer.received
        self.state, self.deadline = self.MULTICAST, None

    def _on_sent(self, digest, now):
        if self.state == self.LAST_SENT:
            if self.dialect.talks:
                self.state = self.LAST_WORD
                return []
            self.state = self.OVER
            return [('end', None)]
        self._round_digest = digest
        self.state, self.deadline = self.STRAGGLERS, now + self.SETTLE
        return []

    def _on_again(self, number, recipe_count, combinations):
        count = recipe_count + combinations
        if not 0 < count <= MAX_PACKETS:
            raise ProtocolError('a repair pass of %d packets' % count)
        coded = Buffer(self.payload, count, self._repair_salt)
        coded.start(number, count, None)
        self._repair = coded, recipe_count
        self._listen(coded)
        return []

    # ---- time, and datagrams

    def listened(self, now):
        """Datagrams were put into `listening`; returns whether any was of use."""
        received = self.listening.received if self.listening else 0
        if received == self._received:
            return False
        self._received = received
        if self.state == self.STRAGGLERS:
            self.deadline = now + self.SETTLE
        return True

    def tick(self, now):
        """Time passes; returns what to do."""
        if self.state == self.STRAGGLERS and (now >= self.deadline or not self._may_come()):
            return self._answer(now)
        if self.state == self.NEXT and self._finished and now >= self.deadline:
            self.deadline = None        # a producer takes its time: the consumer need not wait
            return self._hand_over()
        return []

    def _may_come(self):
        """Whether stragglers may be on their way: the end of what was sent is
        missing, though not all of it."""
        buffer = self.listening
        return (buffer.received and not buffer.complete
                and not (buffer.has(0) and buffer.has(buffer.count - 1)))

    def _answer(self, now):
        """Say what is missing, or that nothing is."""
        buffer = self._buffer
        if self.listening is buffer:
            self.by_multicast += buffer.received
        else:
            coded, recipe_count = self._repair
            self.coded += solve(buffer, coded, recipe_count)
        self.listening, self._repair = None, None
        if buffer.complete:
            return self._done(now)
        self._places = buffer.missing()
        count = len(self._places)
        seqs = [(buffer.base + place) & MASK for place in self._places]
        self.state, self.deadline = self.REPAIR, None
        request = REQUEST + struct.pack('<%dI' % (1 + count), count, *seqs)
        if not self.dialect.packets:
            self._expect_packets()
        return [('send', request)]

    def _done(self, now):
        self._finished = self._buffer, self._size, self._round_digest
        self._lent.append(self._buffer)
        self._buffer = None
        self.state, self.deadline = self.NEXT, now + self.PROMPT
        return [('send', DONE)]

    # ---- packets by TCP

    def _expect_packets(self):
        self.state = self.BYTES
        self.by_tcp += len(self._places)
        self._staging = bytearray(self.CHUNK * self._buffer.slot)
        self._want_more()
        return []

    def _want_more(self):
        """Set `wants` to the next bytes: packets of known sizes, else a header."""
        buffer, self._filled = self._buffer, 0
        if not self.dialect.sizes:
            self.wants = memoryview(self._staging)[:PACKET.size]
            return
        chunk = self._places[:self.CHUNK]
        if len(chunk) > 1 and buffer.packet_size(chunk[-1]) != buffer.payload:
            chunk.pop()                 # a short one, which is the last, goes alone
        size = len(chunk) * PACKET.size + sum(buffer.packet_size(place) for place in chunk)
        self.wants = memoryview(self._staging)[:size]

    def filled(self, size, now):
        """So many bytes were put into `wants`; returns what to do.  Raises ProtocolError."""
        self._filled += size
        self.wants = self.wants[size:]
        if len(self.wants):
            return []
        buffer = self._buffer
        payload = self._filled - PACKET.size
        count = 1
        if not self.dialect.sizes:
            payload = PACKET.unpack_from(self._staging)[2]
            if not 0 < payload <= buffer.payload:
                raise ProtocolError('a packet of %d bytes' % payload)
            if self._filled == PACKET.size:
                self.wants = memoryview(self._staging)[PACKET.size:PACKET.size + payload]
                return []
        elif self._filled > buffer.slot:
            count, payload = self._filled // buffer.slot, buffer.payload
        buffer.put(self._staging, 0, count, payload)
        del self._places[:count]
        if self._places:
            self._want_more()
            return []
        self.wants = self._staging = None
        if not buffer.complete:
            raise ProtocolError('packets that were not asked for, or damaged')
        return self._done(now)

    # ---- the writer

    def written(self):
        """The writer is through with a round; returns what to do."""
        if self._lent:
            self._free.append(self._lent.popleft())
        return self._make_room() if self.state == self.ROOM else []


# ---------------------------------------------------------------------------
# Roster and policy
# ---------------------------------------------------------------------------

LATE = 'the transfer has begun'         # why a client is refused


class Roster(object):
    """Who takes part: who is here before the start, who was here at it, who was refused.

    All threads look at it.  Each change is one operation on a list or a dict, and a client
    leaves it only through the thread that has it; so it needs no lock.
    """

    MOST_REFUSED = 1000                 # hosts that are remembered

    def __init__(self, places, enough=1, start_by=None):
        """places: clients that can take part; enough: how many must be here at
        `start_by`, seconds on the monotonic clock (None: wait for all)."""
        self.places, self.enough, self.start_by = places, enough, start_by
        self.begun = False
        self.waiting = None             # for whom else than a client all wait, in words
        self.everyone = []              # who was here at the start, whatever became of them
        self._here = []
        self._refused = {}              # (host, address) -> why

    @property
    def here(self):
        """The clients that are here now."""
        return list(self._here)

    @property
    def refused(self):
        """(host, address) and why, of those that were refused and have nothing from another client."""
        served = set(member.identity for member in self.everyone
                     if member.outcome == 'complete' and not member.loopback)
        return sorted(item for item in self._refused.items() if item[0] not in served)

    def refuse(self, member, why):
        """Remember who was refused."""
        if len(self._refused) < self.MOST_REFUSED:
            self._refused[member.identity] = why

    def twin(self, member):
        """The client that is here from the same host; None without one.

        Not of the loopback interface: there several clients are for trying it out.
        """
        if member.host is None or member.loopback:
            return None
        twins = [other for other in self.here if other.identity == member.identity]
        return twins[0] if twins else None

    def admit(self, member):
        """A client has a place; returns how many are here now."""
        self._here.append(member)
        return len(self._here)

    def leave(self, member):
        """A client is not here any more; returns whether it was."""
        try:
            self._here.remove(member)
        except ValueError:
            return False
        return True

    def begin(self, now):
        """Start if it is time to, with those who are here; returns whether it has begun."""
        here = self.here
        late = self.start_by is not None and now > self.start_by and len(here) >= self.enough
        if not self.begun and (late or len(here) >= self.places):
            self.everyone = here
            self.begun = True
        return self.begun

    def end(self):
        """Nobody can come any more, be it that it has not begun."""
        if not self.begun:
            self.everyone = self.here
            self.begun = True


class Course(object):
    """The way of an image through its rounds: what the server does next, and why.

    It has no socket, no thread and no clock; its `hands` do what it decides:

        now()                           seconds on the monotonic clock
        fill(base, limit)               begin to fill the next buffer
        take() -> Buffer, digest        wait until that is full
        do(Step) -> requests            have the TCP servers do it: {member: places asked for}
        multicast(Buffer, count)        the first packets of it; returns seconds
        trouble() -> text or None       why packets could not be sent since the last call
    """

    FIRST_ROUND = 64                    # packets: the first are likeliest to be lost
    LONGEST_ROUND = 1.0                 # seconds
    PASSES = 3                          # of coded repair in a round
    WORTH_CODING = 16                   # packets by TCP are no trouble
    PROBE = 16                          # packets, where no multicast gets through
    PATIENCE = 1.0                      # seconds without multicast, until it is said
    ENDURANCE = 10.0                    # seconds below --min-rate
    SETTLED = 3                         # rounds without a slower rate, until it is worth a line
    HOLDUP = 2.0                        # seconds, of which who takes more than half is named
    HOLDUP_WORDS = 10.0                 # seconds between two such lines
    FIRST_SEQ = 0

    # For what the others wait while a member alone keeps them waiting in a step.
    CAUSES = {'announce': 'output', 'sent': 'network', 'again': 'network', 'repair': 'network',
              'finish': 'output', 'accept': None}

    def __init__(self, hands, roster, dialect, payload, capacity, rate='auto', min_rate=0,
                 unicast=False, repair_salt=0):
        """payload: bytes in a packet; capacity: packets in a round; rate: bit/s
        or `auto`; min_rate: bit/s; unicast: do not multicast."""
        self.hands, self.roster, self.dialect = hands, roster, dialect
        self.payload, self.capacity = payload, capacity
        self.control = RateControl() if rate == 'auto' else None
        self._rate = rate
        self.min_rate = min_rate
        self.unicast = unicast
        self.multicasting = not unicast
        self.limit = self.FIRST_ROUND   # packets in the next buffer
        self.rounds = 0
        self.repair_number = 0
        self.delivered = 0              # bytes of rounds that are through
        self.data = self.sent = self.coded = self.by_tcp = 0        # packets
        self.lost = 0                   # packets, of each round's worst client
        self._base = self.FIRST_SEQ
        self._repair_salt = repair_salt
        self._last_heard = None         # when a client last got any multicast
        self._warned = False            # that none gets any
        self._ignored = set()           # clients that lose too much at any rate
        self._brake = None              # the client that alone keeps the rate down
        self._settled = 0               # rounds since the rate last fell
        self._held_by = None            # (client, since when) below --min-rate
        self._alone = {}                # client -> seconds waited for it alone in this round
        self._lately = {}               # the same of the last rounds
        self._lately_since = None
        self._next_holdup = 0.0         # when one may be named again

    rate = property(lambda self: self.control.rate if self.control else self._rate)

    def begin(self):
        """Clients are yet to come: begin to fill the first buffer."""
        self._base &= MASK
        self._fill()

    def _fill(self):
        limit = min(self.limit, self.capacity)
        self.hands.fill(self._base, limit)
        longest = self.rate * self.LONGEST_ROUND / 8 / (self.payload + PACKET.size)
        self.limit = int(max(self.FIRST_ROUND, min(2 * limit, longest, self.capacity)))

    # ---- a round

    def round(self, farewell, allow_empty=False):
        """Bring one buffer to all clients; returns whether more are to come.

        farewell(digest) -> the last BYE.  Raises Failure, and what the hands raise.
        """
        buffer, digest = self.hands.take()
        info = buffer.info(self.rounds)
        self.rounds += 1
        self.data += buffer.count
        self._base = (self._base + buffer.count) & MASK
        if buffer.count:
            self._fill()
        began = self.hands.now()
        self._do('announce', buffer=buffer, info=info)
        if not buffer.count:
            if not self.delivered and not allow_empty:
                raise Failure('the image is empty; if that is meant, give --allow-empty')
            self._do('finish', buffer=buffer, digest=digest, message=farewell(digest))
            return False
        count = 0 if self.unicast else min(buffer.count, buffer.count if self.multicasting else self.PROBE)
        seconds = self.hands.multicast(buffer, count)
        self.sent += count
        requests = self._do('sent', buffer=buffer, digest=digest)
        if count:
            self._learn(buffer, count, requests, seconds)
        self._repair(buffer, digest, requests)
        self.delivered += buffer.size
        now = self.hands.now()
        self._look_for_holdup(now)
        if self.min_rate:
            self._judge(buffer.size * 8 / (now - began), now - began, now)
        self._alone = {}
        return True

    def _do(self, kind, **parts):
        """Have a step done; returns what clients ask for.  Notes who alone was waited for."""
        started = self.hands.now()
        requests = self.hands.do(Step(kind, **parts))
        paid = sorted(self.roster.here, key=lambda member: member.paid)
        if len(paid) > 1:
            last, seconds = paid[-1], paid[-1].paid - max(paid[-2].paid, started)
            if seconds > 0:
                self._alone[last] = self._alone.get(last, 0) + seconds
                cause = self.CAUSES[kind]
                last.waited[cause] = last.waited.get(cause, 0) + seconds
        return requests

    # ---- what losses tell

    def _learn(self, buffer, count, requests, seconds):
        """Set the rate, and whether to multicast at all, from what was lost of the first packets."""
        lost = dict((member, sorted(place for place in set(places) if place < count))
                    for member, places in requests.items())
        heard = sorted((member for member in lost if len(lost[member]) < count),
                       key=lambda member: len(lost[member]))
        here = self.roster.here
        silent, everybody, now = len(lost) - len(heard), len(here), self.hands.now()
        self._look_for_the_deaf(here, lost, count, now)
        self.lost += len(lost[heard[-1]]) if heard else 0
        if self._last_heard is None or silent < everybody:
            self._last_heard = now
        trouble = self.hands.trouble()
        if trouble:
            tell('multicast_refused', reason=trouble)
        if everybody and silent == everybody:
            self.multicasting = False
            if now - self._last_heard > self.PATIENCE:
                self.warn_of_silence()
        elif not self.multicasting:
            self.multicasting = True
            if self._warned:
                self._warned = False
                tell('multicast_back')
        elif self.control:
            achieved = count * (buffer.slot + UDP_OVERHEAD) * 8 / seconds
            self._set_rate(count, [m for m in heard if m not in self._ignored], lost, everybody,
                           achieved, seconds)

    def _set_rate(self, count, heard, lost, everybody, achieved, seconds):
        before = self.control.rate
        why = self.control.round_over(count, lost[heard[-1]] if heard else [], achieved, seconds)
        self._settled += 1
        if self.control.rate < before:
            self._look_for_brake([(len(lost[member]), member) for member in heard], everybody)
        if self._brake and self._settled == self.SETTLED:
            tell('brake', member=self._brake, rate=min(before, achieved))
        if self.control.hopeless:
            self._ignored.add(heard[-1])
            tell('hopeless', member=heard[-1], share=len(lost[heard[-1]]) / count, payload=self.payload)
        if why:
            tell('rate', round=self.rounds, achieved=achieved, rate=self.control.rate, why=why)

    def warn_of_silence(self):
        """Say that no client hears multicast, once."""
        if not self._warned:
            self._warned = True
            tell('multicast_silent', payload=self.payload)

    def _look_for_the_deaf(self, here, lost, count, now):
        """Name the clients that hear no multicast while others do, and those that do again."""
        all_deaf = all(len(lost.get(member, ())) == count for member in here)
        for member in here:
            if len(lost.get(member, ())) < count:
                if member.deaf_since is not None and member.deaf_told:
                    tell('member_hears', member=member, seconds=now - member.deaf_since)
                member.deaf_since, member.deaf_told = None, False
            elif member.deaf_since is None:
                member.deaf_since = now
            elif (now - member.deaf_since > self.PATIENCE and not member.deaf_told
                  and not all_deaf):
                member.deaf_told = True
                tell('member_deaf', member=member, seconds=now - member.deaf_since,
                     payload=self.payload)

    # ---- the slowest

    def _look_for_brake(self, heard, everybody):
        """Whether the rate went down for one client alone."""
        brake = None
        if everybody > 1 and (len(heard) < 2 or heard[-2][0] < heard[-1][0] / 4):
            brake = heard[-1][1]
        if not brake or brake is not self._brake or self._settled < self.SETTLED:
            self._settled = 0
        self._brake = brake

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
        """Drop the client that alone has held the session below --min-rate."""
        culprit = self._brake
        for member in self._alone:
            if self._alone[member] > seconds / 2:
                culprit = member
        here = self.roster.here
        if goodput >= self.min_rate or culprit not in here or len(here) < 2:
            self._held_by = None
        elif not self._held_by or self._held_by[0] is not culprit:
            self._held_by = culprit, now - seconds
        elif now - self._held_by[1] >= self.ENDURANCE:
            culprit.sentence = ('alone it kept the transfer below %s, now at %s'
                                % (bits(self.min_rate), bits(goodput)))
            self._held_by = self._brake = None
            if self.control:
                self.control = RateControl()

    # ---- repair

    def _repair(self, buffer, digest, requests):
        """Bring to the clients what they asked for."""
        if not requests:
            return
        for _ in range(self.PASSES):
            groups, asked = self.plan(buffer, requests)
            if not groups:
                break
            coded, recipe_count = encode_repair(buffer, groups, self.repair_number, self._repair_salt)
            message = REPAIR.pack(self.repair_number, recipe_count, len(groups))
            self.repair_number = (self.repair_number + coded.count) & MASK
            self.coded += coded.count
            self.by_tcp += sum(len(places) for member, places in requests.items()
                               if member not in asked)
            self._do('again', buffer=buffer, coded=asked, message=message)
            self.hands.multicast(coded, coded.count)
            requests = self._do('sent', buffer=buffer, digest=digest)
        self.by_tcp += sum(len(places) for places in requests.values())
        self._do('repair', buffer=buffer)

    def plan(self, buffer, requests):
        """What to repair by multicast, if that is cheaper than TCP.

        Returns groups of places, and the members that they are for.
        """
        if not self.dialect.codes or not self.multicasting:
            return [], ()
        asked = dict((member, places) for member, places in requests.items()
                     if len(places) <= buffer.count // 2)
        by_tcp = sum(len(places) for places in asked.values())
        worst = max([len(places) for places in asked.values()] or [0])
        if by_tcp <= max(self.WORTH_CODING, worst + 1):
            return [], ()
        groups = combine(list(asked.values()), most_members(buffer.payload))
        size = 2 * len(groups) + 2 * sum(len(members) for members in groups)
        by_multicast = len(groups) + 1 + size // buffer.payload
        return (groups, asked) if by_multicast < by_tcp else ([], ())


# ---------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------

DEBUG, INFO, WARNING, ERROR, ASKED = 'debug', 'info', 'warning', 'error', 'asked for'
LEVELS = (DEBUG, INFO, WARNING, ERROR, ASKED)

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
    'only_here': (WARNING, 'only this host hears what is multicast from %(address)s'),
    'transfer_started': (DEBUG, 'sending from the interface with MTU %(mtu)d, %(payload)d bytes a packet, '
                         'by %(way)s'),
    'started_without': (INFO, 'starting with %(here)d of %(places)s'),
    'stranger': (INFO, '%(member)s: %(reason)s'),
    'refused': (INFO, '%(member)s: refused, %(reason)s'),
    'member_here': (INFO, '%(member)s is here, %(here)d of %(places)d'),
    'member_left': (WARNING, '%(member)s: %(reason)s'),
    'member_lost': (WARNING, '%(member)s: %(reason)s'),
    'member_served': (INFO, '%(member)s has everything'),
    'member_deaf': (WARNING, '%(member)s hears no multicast for %(seconds).0f s, it gets everything by '
                    'TCP; %(causes)s'),
    'member_hears': (WARNING, '%(member)s hears multicast again, after %(seconds).0f s'),
    'waiting_for': (INFO, 'waiting for %(names)s'),
    'producer_silent': (INFO, 'waiting for what makes the image, which was silent for %(seconds).0f s'),
    'multicast_refused': (WARNING, 'multicast failed at this host: %(reason)s'),
    'multicast_silent': (WARNING, 'no client receives multicast, all is sent by TCP; %(causes)s'),
    'multicast_back': (WARNING, 'multicast gets through now'),
    'brake': (INFO, '%(member)s alone takes no more than %(rate)s'),
    'holdup': (INFO, '%(member)s holds the others up, %(share)d %% of the time: %(cause)s'),
    'hopeless': (WARNING, '%(member)s loses %(share)d %% at any rate, so the rate is set without it; '
                 '%(causes)s'),
    'rate': (DEBUG, 'round %(round)d: sent at %(achieved)s, rate now %(rate)s (%(why)s)'),
    # the client
    'connecting': (DEBUG, 'connecting to %(address)s port %(port)d'),
    'no_server_yet': (INFO, 'looking for a server at %(address)s port %(port)d for %(seconds).0f s: '
                      '%(reason)s'),
    'connected': (INFO, 'connected to %(address)s, multicast of group %(group)s to %(local_ip)s'),
    'receiving': (DEBUG, 'receiving by %(way)s, socket buffer of %(socket_buffer)d bytes; image '
                  '%(name)s, %(size)s bytes'),
    'unreported': (WARNING, 'cannot write the report %(path)s: %(reason)s'),
    'deaf': (WARNING, 'multicast does not reach this host, everything comes by TCP; %(causes)s'),
    'hears': (WARNING, 'multicast reaches this host again'),
    'server_not_told': (WARNING, 'the image is complete, but the server could not be told: %(reason)s'),
}


def causes(payload):
    """Why multicast of packets with so many bytes of payload may not arrive, in words."""
    jumbo = ', jumbo frames that something on the way does not take (--mtu)'
    return ('usual causes: a switch with IGMP snooping but no querier, a firewall on '
            'the host, the wrong LOCAL_IP' + (jumbo if payload > payload_for(1500) else ''))


# Why somebody keeps the others waiting, and what a client says that it does, in words.
CAUSES = {'output': 'its disk or command', 'network': 'its network', 'writing': 'its disk or command',
          'receiving': 'its network'}


def in_words(what, facts):
    """The facts as the template of WORDS wants them."""
    words = dict(facts)
    if 'payload' in words:
        words['causes'] = causes(words['payload'])
    for key in ('rate', 'achieved'):
        if key in words:
            words[key] = bits(words[key])
    if 'share' in words:
        words['share'] = 100 * words['share']
    if 'cause' in words:
        words['cause'] = CAUSES.get(words['cause'], words['cause'])
    if 'members' in words:
        late = [str(member) for member in words['members']]
        words['names'] = ', '.join(late[:8]) + (
            ' and %d more' % (len(late) - 8) if len(late) > 8 else '')
    if what in ('server_started', 'started_without'):
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
    FLOODS = {'stranger': 'strangers', 'refused': 'strangers',
              'member_here': 'arrivals', 'member_left': 'arrivals'}
    MOST = {'strangers': 10, 'arrivals': 200}   # lines of them all in a period

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
    lines = [text + (', waiting for ' + status.waits if status.waits else '')]
    if all_hosts:
        lines += job.hosts()
    return lines


# ---- what there is to know of a transfer at a moment, from its counters

class Status(object):
    """How a transfer stands, at either end.

    begun       whether rounds are under way
    bytes, size of the image, as far as it got and in all (None: not known)
    here, places    clients
    waits       who or what it waits for, in words; at the server's start, until when
    seconds     since the first round
    lost, repaired  shares of the packets
    carrier     what brings the packets
    """

    def __init__(self, **parts):
        self.__dict__.update(parts)


def member_in_words(member, step):
    """What a member is doing, as far as the server can tell."""
    if member.outcome:
        return 'has everything' if member.outcome == 'complete' else member.outcome
    if not member.owes or not step or member.owes not in step.awaited:
        return 'waits for the others'
    if member.busy:
        return CAUSES.get(member.busy, member.busy)
    return 'no ' + member.owes


def server_status(server, now):
    """The Status of a Multicaster."""
    roster, course = server.roster, server.course
    here, waits = roster.here, ''
    if not roster.begun:
        waits = counted(max(0, roster.places - len(here)), 'more client')
        if roster.start_by is not None:
            left = max(0, roster.start_by - now)
            waits += ', at most for %s' % duration(left) if left else ', at least %d of them' % (
                roster.enough - len(here)) if roster.enough > len(here) else ''
    elif roster.waiting:
        waits = 'what makes the image'
    elif server.step:
        late = [member for member in here if member.owes in server.step.awaited]
        waits = ', '.join('%s (%s)' % (member, member_in_words(member, server.step))
                          for member in late[:3]) + (' and %d more' % (len(late) - 3)
                                                     if len(late) > 3 else '')
    sent = max(1, course.data)
    return Status(
        seconds=now - (server.started or now),
        begun=roster.begun, bytes=course.delivered, size=server.source.size or server.options.size,
        here=len(here), places=roster.places, waits=waits, lost=course.lost / sent,
        repaired=(course.coded + course.by_tcp) / sent, rate=course.rate,
        carrier='multicast' if course.multicasting else 'TCP')


def client_status(client, now):
    """The Status of a Client."""
    window, says = client.window, client.says
    here, places = says.get('here'), says.get('places')
    waits = ''
    if not client.receiver:
        waits = 'a server at %s port %d (%s)' % (
            client.options.server_ip, client.options.port, client.reason or 'no answer yet')
        return Status(begun=False, seconds=0, bytes=0, size=None, here=None, places=None, waits=waits,
                      lost=0, repaired=0, carrier='')
    if not window.begun:
        waits = 'the start'
    elif window.state == window.ROOM:
        waits = 'the output'
    elif says.get('waiting'):
        waits = printable(TEXT[0](says['waiting']))
    else:
        waits = 'the server, or its other clients'
    packets = max(1, window.by_multicast + window.by_tcp + window.coded)
    return Status(
        seconds=now - (client.started or now),
        begun=window.begun, bytes=client.writer.bytes if client.writer else 0,
        size=client.image.get('size'), waits=waits,
        here=None if window.begun else here, places=None if window.begun else places,
        lost=(window.by_tcp + window.coded) / packets, repaired=(window.by_tcp + window.coded) / packets,
        carrier='TCP' if client.deaf or client.unicast else 'multicast')


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
        average = 8 * status.bytes / max(1e-3, status.seconds)
        recent = 8 * (last[1] - first[1]) / max(1e-6, now - first[0])
        parts = [amount(status.bytes)]
        if status.size:
            parts = ['%d %%' % (100 * status.bytes / status.size)]
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
        complete = member.outcome == 'complete'
        reason = None if complete else member.outcome or whose(server.failure) or 'unknown'
        rows.append({
            'host': member.host, 'address': member.address,
            'result': 'complete' if complete else 'failed', 'reason': reason,
            'exit_code': 0 if complete else None, 'lost': member.lost,
            'repaired': {'multicast': max(0, member.lost - member.by_tcp), 'tcp': member.by_tcp},
            'waited_for': dict((cause, round(seconds, 3)) for cause, seconds in member.waited.items()),
            'overflows': member.figures.get('overflows'),
            'seconds': member.ended and server.started and round(max(0, member.ended - server.started), 3)})
    for (host, address), why in server.roster.refused:
        rows.append({'host': host, 'address': address, 'result': 'refused', 'reason': why,
                     'exit_code': NOT_STARTED})
    for _ in range(server.roster.places - len(server.roster.everyone)):
        rows.append({'host': None, 'address': None, 'result': 'missing', 'reason': 'it never came',
                     'exit_code': None})
    worst = ['failed', 'missing', 'refused', 'complete']
    rows.sort(key=lambda row: (worst.index(row['result']), -sum(row.get('waited_for', {}).values()),
                               -row.get('lost', 0)))
    for row in rows:
        for key in ('lost', 'seconds', 'overflows'):
            row.setdefault(key, None)
        row.setdefault('repaired', {'multicast': 0, 'tcp': 0})
        row.setdefault('waited_for', {})
    return rows


def whose(failure):
    """A server's failure as the reason that its clients have nothing."""
    stopped = failure and failure.startswith('stopped')
    return 'the server was ' + failure if stopped else failure


def named(row):
    """A host of the report for the user."""
    return '%s (%s)' % (row['host'], row['address']) if row['host'] else row['address']


def host_table(rows, most):
    """Lines of a table of hosts, `most` at the most."""
    head = ('host', 'address', 'result', 'lost', 'coded', 'TCP', 'held up', 'seconds')
    lines = [head]
    for row in rows[:most]:
        waited = sorted(row['waited_for'].items(), key=lambda item: -item[1])
        held = '%.1f s, %s' % waited[0][::-1] if waited and waited[0][1] >= 0.1 else '-'
        lines.append((row['host'] or '?', row['address'] or '?', row['result'],
                      '-' if row['lost'] is None else str(row['lost']), str(row['repaired']['multicast']),
                      str(row['repaired']['tcp']), held,
                      '-' if not row['seconds'] else '%.1f' % row['seconds']))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        yield '  '.join(part.ljust(width) for part, width in zip(line, widths)).rstrip()
    if len(rows) > most:
        yield 'and %d more (-v shows all)' % (len(rows) - most)


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
    if course.rounds:
        seconds = server.ended - (server.started or server.ended)
        yield INFO, 'data: %s in %s, %s in %.1f s, %s' % (
            counted(course.data, 'packet'), counted(course.rounds, 'round'),
            counted(server.source.bytes, 'byte'), seconds,
            bits(server.source.bytes * 8 / max(1e-6, seconds)))
        yield INFO, 'repair: %s by multicast, %s by TCP' % (
            counted(course.coded, 'packet'), counted(course.by_tcp, 'packet'))
        if len(rows) > 1:
            for line in host_table(rows, most):
                yield INFO, line
    absent = roster.places - len(roster.everyone)
    if absent and not server.failure:
        yield ERROR, '%s never came' % counted(absent, 'client')
    served = len([row for row in rows if row['result'] == 'complete'])
    yield INFO, '%d of %s %s the image' % (served, counted(roster.places, 'client'),
                                           'has' if roster.places == 1 else 'have')


def client_summary(client):
    """(level, line) of how a client's transfer went well."""
    window, seconds = client.window, client.ended - client.started
    size = client.writer.bytes
    if size and not window.by_multicast and not client.unicast and not client.deaf:
        yield WARNING, ('multicast does not reach this host, everything came by TCP; '
                        + causes(window.payload))
    if client.overflows:
        yield INFO, ('%s found no room in this host\'s socket buffer of %d bytes; a larger '
                     'net.core.rmem_max helps (sysctl), or root' % (
                         counted(client.overflows, 'datagram'), client.receiver.socket_buffer))
    yield INFO, '%s in %.1f s, %s; repaired %s by multicast, %d by TCP; %s' % (
        counted(size, 'byte'), seconds, bits(size * 8 / max(1e-6, seconds)),
        counted(window.coded, 'packet'), window.by_tcp,
        'SHA-256 %s' % client.writer.hash.hexdigest() if window.digest else 'without a digest')


class Summary(object):
    """A reader that says at the end how it went, through a Log."""

    ROWS = 20                           # of the table, unless all are wanted

    def __init__(self, log, all_rows=False):
        self._log, self._most = log, 1 << 30 if all_rows else self.ROWS

    def happened(self, what, facts):
        """An event."""
        lines = ()
        if what == 'server_ended':
            lines = server_summary(facts['server'], server_rows(facts['server']), self._most)
        elif what == 'client_ended' and facts['code'] == OK:
            lines = client_summary(facts['client'])
        for level, line in lines:
            if LEVELS.index(level) >= LEVELS.index(self._log.level):
                self._log.say(level, line)

    def look(self, now):
        """Time passes."""


class JsonReport(object):
    """A reader that writes --report FILE at the end, however it comes."""

    MOST_STEPS = 1000

    def __init__(self, path, command, job):
        self._path, self._command, self._job = path, command, job
        self._steps, self._every, self._next = [], 1.0, 0.0
        self._began = monotonic()

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
        before = self._steps[-1] if self._steps else {'seconds': 0, 'bytes': 0}
        seconds = round(now - (self._job.started or now), 3)
        moved = status.bytes - before['bytes']
        self._steps.append({
            'seconds': seconds, 'bytes': status.bytes,
            'rate': round(8 * moved / max(1e-3, seconds - before['seconds'])),
            'loss': round(status.lost, 6), 'waited_for': None if moved else status.waits or None})
        if len(self._steps) > self.MOST_STEPS:
            del self._steps[::2]
            self._every *= 2

    def _write(self, code, reason):
        job = self._job
        result = {'kmcast': __version__, 'command': self._command, 'exit_code': code, 'reason': reason,
                  'result': {OK: 'complete', PARTLY: 'partly'}.get(code, 'failed')}
        started, ended = getattr(job, 'started', None), getattr(job, 'ended', None) or monotonic()
        seconds = round(ended - started, 3) if started else 0
        result.update(job.report() if job else {'bytes': 0, 'sha256': None, 'carried': None})
        result.update(seconds=seconds, steps=self._steps,
                      goodput=round(8 * result['bytes'] / seconds) if seconds else 0)
        if self._command == 'client' and code == NOT_STARTED:
            result['result'] = 'refused' if job and job.refused else 'not started'
        folder, name = os.path.split(os.path.abspath(self._path))
        temporary = os.path.join(folder, '.%s.%d.tmp' % (name[:100], os.getpid()))
        try:
            with io.open(temporary, 'wb') as file:
                file.write(json.dumps(result, sort_keys=True, indent=1).encode('ascii') + b'\n')
            os.rename(temporary, self._path)
        except OS_ERRORS as error:
            tell('unreported', path=printable(self._path), reason=explain(error))


def server_report(server):
    """The keys of a server's report."""
    course = server.course
    payload = course.payload if course else 0
    return {
        'bytes': course.delivered if course else 0,
        'sha256': binascii.hexlify(server.source.digest()).decode('ascii') or None,
        'carried': {'multicast': course.sent * payload, 'coded': course.coded * payload,
                    'tcp': course.by_tcp * payload} if course else None,
        'hosts': server_rows(server)}


def client_report(client):
    """The keys of a client's report."""
    window, writer = client.window, client.writer
    payload = window.payload if window else 0
    digest = writer.hash.hexdigest() if writer and writer.hash else None
    return {
        'bytes': writer.bytes if writer else 0, 'sha256': digest,
        'server': {'address': client.options.server_ip, 'port': client.options.port},
        'carried': {'multicast': window.by_multicast * payload, 'coded': window.coded * payload,
                    'tcp': window.by_tcp * payload} if window else None,
        'lost': window.by_tcp + window.coded if window else None,
        'overflows': client.overflows}


# ---------------------------------------------------------------------------
# TCP servers
# ---------------------------------------------------------------------------

class Session(object):
    """What is agreed for a transfer; nobody changes it once clients come."""

    def __init__(self, options, payload, name, size):
        self.dialect = BaseDialect if options.compat else SessionDialect
        self.group, self.port = options.group, options.port
        self.per_thread = options.clients_per_thread
        self.stall_timeout = options.stall_timeout
        if self.stall_timeout is None:
            self.stall_timeout = self.dialect.server_stall
        self.strangers = options.strangers
        self.payload = payload
        self.salt, self.repair_salt = self.dialect.salts()
        self.digest = self.dialect.talks and not options.no_digest
        self.group_info = pack_group_info(self.group, self.port, self.dialect.padding)
        self.welcome = pack_frame(WELCOME, {
            'version': __version__, 'salt': self.salt,
            'repair_salt': self.repair_salt, 'payload': payload,
            'name': name and printable(name), 'size': size,
            'digest': 'sha256' if self.digest else None,
            'stall': self.stall_timeout,
            'unicast': options.unicast})


class Peer(Connection):
    """A connection to this server: a client, or who may become one."""

    def __init__(self, sock, address):
        Connection.__init__(self, sock, address)
        self.member = Member(address, self.since)
        self.waiting = dict(waiting=None)           # what it was told that it waits for

    def __str__(self):
        return str(self.member)


class TcpServer(threading.Thread):
    """Looks after up to 64 clients; its child looks after the next ones.

    The spec's TCP server: one poll() over its clients and its links.  Of its
    states, INIT is to have no step yet, ACCEPT the step of that name, PREP to
    have released the parent, SYNC the announce step, and SEND all others.

    TCP server 1 has the listener and hears the greetings of all; a client that
    it has no room for it passes on to its child, which does the same.  So a
    release means "look": at `passed_on`, at the clients' sentences, at `step`.
    """

    PATIENCE = 5.0                      # seconds, until it says whom it waits for
    AT_ONCE = 64                        # connections to accept in a turn
    NEWS = 1.0                          # seconds between two words to a client that waits

    def __init__(self, session, roster, parent, link, listener=None, number=1):
        """parent: who publishes `step`; link: ours; listener: a socket that
        listens, for the first; number: in the chain, from 1."""
        threading.Thread.__init__(self, name='tcp-server-%d' % number)
        self.daemon = True
        self.session, self.roster = session, roster
        self.parent, self.link = parent, link
        self.listener = listener
        self.number = number
        self.child = None
        self.window = ServerWindow(session.dialect, session.stall_timeout)
        self.passed_on = collections.deque()    # clients for the child
        self.answers = {}               # member -> places asked for, with the child's
        self.failure = None             # why this thread ended, if not in order
        self._peers = {}                # member -> its connection
        self._pending = []              # connections that are still to say HELLO
        self._leaving = []              # those that were told BYE
        self._released = True
        self._child_released = True
        self._over = False
        self._tick = TICK
        self._next_look = 0.0
        self._next_words = 0.0          # when to say whom we wait for
        self._poller = select.poll()
        self._handlers = {}
        self._writing = set()           # descriptors that are polled for room, too

    step = property(lambda self: self.window.step)

    # ---- the loop

    def run(self):
        """The thread.  Whatever happens, the neighbours see it end."""
        try:
            self._watch(self.link.parent_fd, self._on_parent)
            while not self._over:
                self._poll(self._tick)
                self._look_at_clocks()
                self._advance()
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
        """Release the parent when the step is done here and below."""
        if self.step is None or self._over:
            return
        accepting = self.step.kind == 'accept'
        if not self._released:
            if accepting and not self.roster.begin(monotonic()):
                return
            if not self._child_released or self.window.awaited():
                return
            self.answers = self.window.requests()
            if self.child and self.link.child_fd is not None:
                self.answers.update(self.child.answers)
            self._released = True
            self.link.release_parent()
        if not accepting and not self._peers and self.link.child_fd is None:
            self._over = True           # nobody is left to serve

    def _look_at_clocks(self):
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._tick
        if not self._released and now > self._next_words:
            self._next_words = now + 2 * self.PATIENCE
            late = self.window.awaited()
            if late:
                tell('waiting_for', members=late)
        for peer in self._pending[:]:
            if now - peer.since > GREETING_TIME:
                self._drop(peer, 'no HELLO within %d s' % GREETING_TIME)
        for member, peer in list(self._peers.items()):
            if member.owes or peer.outgoing.count:
                peer.look_at_kernel()
                reason = self.window.stalled(member, peer.moved, now)
                if reason:
                    self._drop(peer, reason)
            else:
                self._safely(peer, self._show_life, peer, now)
        for peer in self._leaving[:]:
            if now > peer.leaving:
                self._close(peer)

    def _show_life(self, peer, now):
        """Tell a client that waits for whom or what, if that is news, else that we are alive."""
        if not self.session.dialect.talks:
            return
        roster = self.roster
        waiting = dict(waiting=roster.waiting) if roster.begun else dict(
            here=len(roster.here), places=roster.places)
        if waiting != peer.waiting and now - peer.told > self.NEWS:
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
            self._dismiss_all(self.failure or 'the server has stopped')
            return
        while self.number > 1 and self.parent.passed_on:
            self._take(self.parent.passed_on.popleft())
        step = self.parent.step
        if step is None or step is self.step or self.number > 1 and step.kind == 'accept':
            self._carry_out_sentences()
            self.link.release_child()
        elif step.kind == 'abort':
            self.window.step = step
            self.link.release_child()
            self._dismiss_all(step.message)
        elif step.kind == 'accept':
            self.window.step = step
            self._released = False
            self._watch(self.listener.fileno(), self._on_connection)
        else:
            self._begin(step)

    def _begin(self, step):
        """Do a step here, and have the child do it."""
        self._released = False
        self._carry_out_sentences()
        todo = self.window.begin(step, monotonic())
        self._child_released = self.link.child_fd is None
        self.link.release_child()
        self._next_words = monotonic() + self.PATIENCE
        self._carry_out(todo)

    def _carry_out_sentences(self):
        for member, peer in list(self._peers.items()):
            if member.sentence:
                self._drop(peer, member.sentence)

    def _carry_out(self, todo):
        """Do what the window wants."""
        for verb, member, argument in todo:
            peer = self._peers[member]
            if verb == 'send':
                self._send(peer, argument)
            elif verb == 'packets':
                self._send(peer, self.session.dialect.packets, *[
                    data for start, stop in runs(argument) for data in self.step.buffer.packets(
                        argument[start], argument[stop - 1] + 1)])
            else:
                tell('member_served', member=member)
                self._close(peer)

    def _on_child(self, _event):
        try:
            self.link.wait_child()
        except LinkClosed:
            self._unwatch(self.link.child_fd)
            self.link.close_child()
            if self.child.failure:
                self.failure = self.child.failure
                self._over = True
                return
        self._child_released = True

    # ---- connections

    def _on_connection(self, _event):
        for _ in range(self.AT_ONCE):   # then hear what they say
            try:
                sock, address = self.listener.accept()
            except OS_ERRORS:
                return
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
        twin = None if self.roster.begun else self.roster.twin(member)
        if twin:                        # its thread may be another one
            twin.sentence = 'replaced by a later client of the same host'
            self.roster.leave(twin)
            self._carry_out_sentences()
            self.link.release_child()
        if self.roster.begun:
            if self.session.dialect.greets:         # else it may be anybody
                self.roster.refuse(member, LATE)
            tell('refused', member=member, reason=LATE)
            self._drop(peer, 'refused: ' + LATE)
            return
        if self.session.dialect.greets:
            self._send(peer, self.session.welcome)
            if peer.leaving or not peer.open:
                return
        self._pending.remove(peer)
        tell('member_here', member=member, here=self.roster.admit(member), places=self.roster.places)
        self._take(peer)
        self._advance()

    def _take(self, peer):
        """Serve a client, or have the child do so.  Raises Failure."""
        if len(self._peers) < self.session.per_thread:
            self._tick = min(self._tick, peer.alive_every / 2)
            self._peers[peer.member] = peer
            self.window.members.append(peer.member)
            self._watch(peer.fileno(), self._on_peer, peer)
            self._send(peer)
            return
        self._unwatch(peer.fileno())
        self.passed_on.append(peer)
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
        self.link.release_child()

    def _on_peer(self, event, peer):
        fd = peer.fileno()
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._safely(peer, self._hear, peer)
        if self._handlers.get(fd, (None, ()))[1] == (peer,):    # it is still ours
            self._send(peer)

    def _safely(self, peer, call, *args):
        """`call(*args)`; what goes wrong ends this peer, and nobody else notices."""
        try:
            call(*args)
        except Gone as error:
            self._drop(peer, 'it went away: %s' % error, told=False)
        except Refused as error:
            self._drop(peer, error.reason, told=False)
        except ProtocolError as error:
            self._drop(peer, 'protocol error: %s' % error)

    def _hear(self, peer):
        if peer.leaving:                # until it hangs up
            peer.receive()
            peer.incoming.clear()
            return
        if peer.member not in self._peers:
            hello = peer.first(self._hello_size)
            if hello:                   # what follows is for whoever takes it
                self._on_hello(peer, hello)
            return
        for message in peer.messages(self.window.size_of):
            self._carry_out(self.window.heard(peer.member, message, monotonic()))
            if peer.leaving or not peer.open:
                return

    @staticmethod
    def _hello_size(head):
        if head[:1] != HELLO:
            raise ProtocolError('it says something else than HELLO')
        return frame_size(head)

    def _on_hello(self, peer, message):
        fields = unpack_frame(message[5:])
        field(fields, 'version', TEXT)
        peer.member.host = field(fields, 'host', TEXT)
        peer.alive_every = alive_every(stall_of(fields))
        self._welcome(peer)

    def _send(self, peer, *pieces):
        """Send what can be sent, and poll for what cannot."""
        self._safely(peer, peer.send, *pieces)
        if not peer.open:
            return
        peer.hang_up()
        fd, waits = peer.fileno(), bool(peer.outgoing.count)
        if fd in self._handlers and waits != (fd in self._writing):
            self._poller.modify(fd, select.POLLIN | (select.POLLOUT if waits else 0))
            (self._writing.add if waits else self._writing.discard)(fd)

    # ---- farewells

    def _drop(self, peer, reason, told=True):
        """End with one client; the others do not notice.

        told: whether it can be told why.
        """
        member = peer.member
        if self._forget(member):
            if not self._over:          # else the reason is everybody's, and said at the end
                member.outcome, member.ended = reason, monotonic()
                tell('member_lost' if self.roster.begun else 'member_left', member=member, reason=reason)
        elif peer in self._pending:
            self._pending.remove(peer)
            if not reason.startswith('refused'):
                tell('stranger', member=member, reason=reason)
        if peer.outgoing.count and not self._over:
            told = False                # packets of a buffer that will be used again
        if told and not peer.leaving and self.session.dialect.talks:
            self._leaving.append(peer)
            try:
                peer.leave(self.session.dialect.bye(ok=False, reason=reason))
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
        self.window.members.remove(member)
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

    ROUND = 8 << 20                     # bytes in a round at the most
    DRAIN = 48 << 10                    # bytes that a queue gets rid of before TCP's turn
    STUCK = 5.0                         # seconds without room to send a packet
    SILENT = 10.0                       # seconds of a producer, until it is said

    def __init__(self, options, source, signals):
        """options: of the command line; source: a Source; signals: a StopInOrder."""
        self.options, self.source, self.signals = options, source, signals
        self.sender = self.listener = self.session = self.tcp = self.course = None
        start_by = None if options.start_wait is None else monotonic() + options.start_wait
        self.roster = Roster(options.clients, options.min_clients, start_by)
        self.link = SemLink()
        self.step = None
        self.pacer = Pacer()
        self.failure = None
        self.started = None             # when the first round began
        self.ended = None               # when the last one did
        self._buffers = []
        self._upcoming = None           # the buffer that is being filled
        self._fed = 0.0                 # when the producer last gave anything, while it is waited for
        self._trouble = None            # the last that was told

    def _open(self):
        """Check that all that it takes can be had here.  Raises Failure."""
        options = self.options
        try:
            self.sender = DatagramSender(options.local_ip, options.group, options.port,
                                         options.ttl, options.datagrams)
        except OS_ERRORS as error:
            raise Failure('cannot multicast to %s from %s: %s' % (
                options.group, options.local_ip, explain(error)), USAGE)
        payload = payload_for(self._mtu(options.mtu))
        self.session = Session(options, payload, options.name or self.source.name,
                               self.source.size or options.size)
        self.listener = self._listen(options.port)
        self.tcp = TcpServer(self.session, self.roster, self, self.link.spawn(), self.listener)
        capacity = options.buffer_packets or self.ROUND // payload
        self._buffers = [Buffer(payload, capacity, self.session.salt, self.session.dialect.checks)
                         for _ in (0, 1)]
        self.course = Course(self, self.roster, self.session.dialect, payload, capacity, options.rate,
                             options.min_rate, options.unicast, self.session.repair_salt)

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
        try:
            self.failure = self._serve()
            self.signals.over()         # from here on the verdict stands
        except Interrupted as error:
            self.failure = 'stopped by %s' % error
        self.ended = monotonic()
        self.source.end()
        self.roster.end()
        if self.failure:
            self.step = Step('abort', message=self.failure)
            self.link.release_child()
        self.link.close()
        for thread in self._threads():
            thread.join(2 * FAREWELL_TIME)
        return self._verdict()

    def _serve(self):
        """Serve the image; returns None, or why not."""
        try:
            with uninterruptible:
                start_thread(self.tcp)
            self.source.start()
            tell('server_started', interface=self.options.interface, address=self.options.local_ip,
                 group=self.session.group, port=self.session.port, places=self.roster.places)
            if self.options.local_ip.startswith('127.'):
                tell('only_here', address=self.options.local_ip)
            self.course.begin()
            self.do(Step('accept'))
            self.started = monotonic()
            if len(self.roster.everyone) < self.roster.places:
                tell('started_without', here=len(self.roster.everyone), places=self.roster.places)
            tell('transfer_started', mtu=self.sender.mtu, payload=self.session.payload,
                 way=self.sender.way)
            while self.course.round(self._last_word, self.options.allow_empty):
                pass
        except LinkClosed:
            return self.tcp.failure or 'no client is left'
        except Failure as error:
            return error.reason
        except Exception as error:      # pylint: disable=broad-except
            return internal_error(error)
        return None

    def _last_word(self, digest):
        """The BYE that ends a good session."""
        return self.session.dialect.bye(
            ok=True, bytes=self.source.bytes, sha256=binascii.hexlify(digest).decode('ascii')
            if self.session.digest else None)

    def _threads(self):
        thread = self.tcp if self.tcp.ident else None
        while thread:
            yield thread
            thread = thread.child

    def _verdict(self):
        """Say how it went; returns the exit code."""
        roster, course = self.roster, self.course
        served = [member for member in roster.everyone if member.outcome == 'complete']
        complete = len(served) == roster.places and not roster.refused
        if complete:
            self.failure = None         # it came too late to matter
        if course.data and not course.multicasting and not course.unicast:
            course.warn_of_silence()
        code = OK if complete else PARTLY if served else FAILED
        tell('server_ended', server=self, code=code, served=len(served))
        return code

    def close(self):
        """Leave nothing behind; can be called at any time."""
        self.source.end()
        self.link.close()
        if self.tcp and not self.tcp.ident:
            self.tcp.link.close()
        for end in (self.listener, self.sender, self.source):
            if end:
                end.close()

    # ---- the hands of the course

    now = staticmethod(monotonic)

    def do(self, step):
        """Have the TCP servers do a step; returns what clients ask for.  Raises LinkClosed."""
        self.step = step
        self.link.release_child()
        self._wait(link=True)
        return self.tcp.answers

    def fill(self, base, limit):
        """Begin to fill the buffer that is not in use."""
        self._buffers.reverse()
        self._upcoming = self._buffers[0]
        self._upcoming.start(base, 0, 0)
        self._upcoming.limit = limit

    def take(self):
        """The buffer that was filled, and the digest of the image through it."""
        if not self._upcoming.full:
            self._fed = monotonic()
            self._wait()
            self.roster.waiting = None
        buffer, self._upcoming = self._upcoming, None
        return buffer, self.source.digest() if self.session.digest else b''

    def multicast(self, buffer, last):
        """Multicast the packets up to index `last`; returns the seconds it took."""
        started, place, size = monotonic(), 0, buffer.slot + UDP_OVERHEAD
        stuck = None
        self.pacer.rate = self.course.rate
        self.pacer.start()
        while place < last:
            done = self.sender.send(buffer, place,
                                    min(last, place + self.pacer.burst(size)))
            if done == place:
                stuck = stuck or monotonic() + (self.STUCK if self.course.multicasting else 0)
                if monotonic() > stuck:
                    self.sender.trouble = 'the kernel takes no packets'
                    break
                self._wait(until=stuck + TICK, sender=True)
                continue
            stuck = None
            until = self.pacer.sent((done - place) * size)
            place = done
            if until > monotonic():
                self._wait(until)
        seconds = max(1e-6, monotonic() - started)
        # What follows by TCP must find room in the queue before a slow link:
        # there it would be dropped, and sent again only 200 ms later.
        if self.course.multicasting:
            self._wait(monotonic() + min(self.DRAIN * 8 / self.pacer.rate, 0.01))
        return seconds

    def trouble(self):
        """Why packets could not be sent lately, if that is news."""
        trouble, self.sender.trouble = self.sender.trouble, None
        news = trouble if trouble != self._trouble else None
        self._trouble = trouble or self._trouble
        return news

    def _wait(self, until=None, link=False, sender=False):
        """Fill the next buffer until a time (seconds on the monotonic clock),
        until the child's release, or until there is room in the socket.

        Raises LinkClosed at once when the TCP servers have ended.
        """
        while True:
            now = monotonic()
            tell.look(now)
            timeout = TICK              # lest a signal that another thread took goes unheard
            if until is not None:
                timeout = until - now
                if timeout <= 0:
                    return
            reads = [self.link.child_fd]
            filling = bool(self._upcoming) and not self._upcoming.full
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
                self.link.wait_child()
                if link:
                    return
            elif writable:
                return
            elif filling and (readable or self.source.drained):
                self._upcoming.fill(self.source)
                self._fed, self.roster.waiting = now, None
                if not (link or sender or until) and self._upcoming.full:
                    return
            else:
                self.source.look()
                if filling and not (link or sender or until):
                    self._look_at_producer(now)

    def _look_at_producer(self, now):
        """Say, here and at the clients, that only what makes the image is waited for."""
        if now - self._fed > self.SILENT and not self.roster.waiting:
            self.roster.waiting = 'what makes the image'
            tell('producer_silent', seconds=now - self._fed)

    # ---- what the readers of the events want to know

    def status(self, now):
        """A Status of the transfer; None before there can be one."""
        return server_status(self, now) if self.course else None

    def hosts(self):
        """A line on each client."""
        return ['%s: %s, lost %s' % (member, member_in_words(member, self.step),
                                     counted(member.lost, 'packet')) for member in self.roster.here]

    def report(self):
        """The keys of --report that are a server's."""
        return server_report(self)


# ---------------------------------------------------------------------------
# Client
# ---------------------------------------------------------------------------

class Client(object):
    """Receives one image: the hands of a ClientWindow."""

    NAP = 0.001                         # seconds, to let datagrams gather
    AMPLE = 4 << 20                     # bytes of socket buffer that allow a nap
    QUIET = 2.0                         # seconds without multicast until we warn
    RETRY = 0.1                         # seconds until we try to reach the server again
    ATTEMPT = 2.0                       # seconds that we try at the least, whatever --wait
    STATE_EVERY = 1.0                   # seconds between two words on what we do

    def __init__(self, options, signals):
        """options: of the command line; signals: a StopInOrder."""
        self.options, self.signals = options, signals
        self.sink = Sink(options.output, options.pipe)
        self.server = None              # Connection
        self.dialect = None             # until the server's is known
        self.receiver = None            # DatagramReceiver
        self.window = None              # ClientWindow
        self.writer = None
        self.image = {}                 # of WELCOME: name, size
        self.failure = None
        self.started = None             # when the first round was announced
        self.ended = None
        self.reason = None              # why the server could not be reached so far
        self.overflows = None           # datagrams lost in this host
        self.unicast = False            # the server said not to expect multicast
        self.deaf = False               # all comes by TCP, and the user was told
        self.refused = False            # the server said BYE
        self.says = {}                  # what the server said of its state
        self._group = None
        self._stall_timeout = 0
        self._flowing = False           # data has come, so the sink has been started
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
                self.sink.open()
                self._connect()
                self._transfer()
                self._finish()
                self.signals.over()     # from here on the verdict stands
            except ProtocolError as error:
                raise Failure('protocol error of the server: %s' % error)
            except LinkClosed:
                raise self.writer.failure or Failure('the writer ended')
            except Interrupted as error:
                if self.sink.abandon():
                    raise Failure('stopped by %s' % error)
                self._await_end()       # too late to stop: the image is taking its place
        except Failure as error:
            self.ended = monotonic()
            self.sink.end()
            self._say_bye(error)
            if not (self.window and self.window.begun) and error.code == FAILED:
                error.code = NOT_STARTED
            self.failure, self.refused = error.reason, isinstance(error, Refused)
            tell('client_ended', client=self, code=error.code)
            raise
        self.signals.over()
        self.ended = monotonic()
        self._say_done()
        tell('client_ended', client=self, code=OK)
        return OK

    def close(self):
        """Leave nothing behind; can be called at any time."""
        self.sink.close()
        if self.writer:
            self.writer.close()
        if self.server:
            self.server.close()
        if self.receiver:
            self.receiver.close()

    def _say_bye(self, failure):
        """Tell the server why; if it does not listen, it learns it from the connection's end."""
        if (not self.dialect or not self.dialect.talks or not self.server.open
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
            self.server.send(DONE)
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

    def _connect(self):
        """Reach the server and agree on a session.  Raises Failure."""
        options = self.options
        deadline = monotonic() + options.wait
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
                raise Failure('no kmcast server at %s port %d: %s' % (
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
        self._join()
        with uninterruptible:
            self.writer = Writer(self.sink, self.window.digest)
            start_thread(self.writer)

    def _reach(self, seconds):
        """Connect, in at most so many seconds.  Raises OS_ERRORS."""
        deadline, sock = monotonic() + seconds, self.server.sock
        sock.setblocking(False)
        number = sock.connect_ex((self.options.server_ip, self.options.port))
        while number in (errno.EINPROGRESS, errno.EALREADY) and monotonic() < deadline:
            tell.look(monotonic())
            if self._poll([(sock, select.POLLOUT)], min(TICK, deadline - monotonic())):
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number in (errno.EINPROGRESS, errno.EALREADY):
            number = errno.ETIMEDOUT
        if not number and sock.getsockname() == sock.getpeername():
            # Nobody listens there, but the kernel chose the same port for our
            # end, and has connected us to ourselves.
            number = errno.ECONNREFUSED
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
        group, port, version = unpack_group_info(self._next_message(lambda head: GROUP_INFO.size))
        self._group = group, port
        if version is None:
            self.dialect = BaseDialect
            self.window = ClientWindow(BaseDialect, payload_for(1500), checks=[plain_crc, c_sum])
            return
        if version != SESSION_VERSION:
            raise ProtocolError('it speaks version %d' % version)
        stall = self.options.stall_timeout
        try:
            self.server.send(pack_frame(HELLO, {
                'version': __version__, 'host': printable(socket.gethostname()),
                'stall': STALL if stall is None else stall}))
        except Gone as error:
            raise Lost('lost the server: %s' % error)
        self.dialect = SessionDialect
        kind = ALIVE
        while kind == ALIVE:
            message = self._next_message(lambda head: self.dialect.server_message_size(head, 0))
            kind = message[:1]
        if kind == BYE:
            raise Refused('the server says: %s' % field(unpack_frame(message[5:]), 'reason', TEXT))
        if kind != WELCOME:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        self._on_welcome(unpack_frame(message[5:]))

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
        self.unicast = fields.get('unicast') is True
        self.server.alive_every = alive_every(stall_of(fields))
        self.window = ClientWindow(SessionDialect, payload, salts, digest is not None)
        if self.image['size'] is not None:
            self.sink.expect(self.image['size'])

    def _join(self):
        """Join the group.  Raises Failure."""
        group, port = self._group
        local_ip = self.options.local_ip or self.server.sock.getsockname()[0]
        try:
            with uninterruptible:
                self.receiver = DatagramReceiver(local_ip, group, port, self.window.payload,
                                                 self.options.datagrams)
        except OS_ERRORS as error:
            raise Failure('cannot join %s on %s: %s' % (group, local_ip, explain(error)))
        tell('connected', address=self.options.server_ip, group=group, local_ip=local_ip)
        tell('receiving', way=self.receiver.way, socket_buffer=self.receiver.socket_buffer,
             name=self.image.get('name') or 'without a name', size=self.image.get('size') or 'unknown')

    # ---- the rounds

    def _transfer(self):
        """Receive until the server's last word.  Raises Failure, ProtocolError, LinkClosed."""
        window, link = self.window, self.writer.link.child_fd
        tcp, udp = self.server.fileno(), self.receiver.fileno()
        ample = self.receiver.socket_buffer >= self.AMPLE
        control = select.poll()
        for fd in (tcp, link):
            control.register(fd, select.POLLIN)
        everything = select.poll()
        for fd in (tcp, link, udp):
            everything.register(fd, select.POLLIN)
        self._output = self.sink.written, monotonic()
        self._hear()                    # what came with the greetings
        while window.state != window.OVER:
            self._listen()
            now = monotonic()
            todo = window.tick(now)
            if todo:
                self._carry_out(todo)
                self._hear()            # what had to wait
            self._look_at_clocks(now)
            wait = min(TICK, self.server.alive_every / 2)
            if window.deadline is not None:
                wait = max(0, min(wait, window.deadline - now))
            fds = [fd for fd, _ in ready(everything, wait)]
            if fds == [udp] and ample and window.deadline is None:
                # Let some more gather, unless somebody else has something to say.
                fds = [fd for fd, _ in ready(control, self.NAP)]
            if link in fds:
                self.writer.link.wait_child()
                self.server.heard = monotonic()
                self._carry_out(window.written())
            if tcp in fds:
                self._hear()
            if self.server.outgoing.count:
                self._flush()

    def _listen(self):
        """Take the datagrams that have arrived; of nobody's if none are expected."""
        buffer = self.window.listening
        for _ in range(64):             # a flood must not keep us from TCP
            batches = self.receiver.receive()
            if batches is None:
                break
            if buffer:
                for batch in batches:
                    buffer.put(*batch)
        now = monotonic()
        if buffer and self.window.listened(now):
            self.server.heard = now

    def _hear(self):
        """Take what has arrived by TCP."""
        window, server = self.window, self.server
        try:
            more = True
            while more:
                if window.wants is not None:
                    more = server.read_into(window.wants)
                    self._carry_out(window.filled(more, monotonic()))
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
                self.writer.give(*argument)
            elif verb == 'begin':
                self._flowing = True
                self.sink.start()
            elif verb == 'state':
                self.says = argument
            else:
                self._fields = argument

    def _look_at_clocks(self, now):
        """Say that we are alive, and give up who is not.  Raises Failure."""
        window = self.window
        if window.begun and not self.started:
            self.started = self._heard_at = now
        tell.look(now)
        self.sink.look()
        if self.sink.written != self._output[0] or not window.unwritten:
            self._output = self.sink.written, now
        if not window.owing:
            self._check_stall()
            self._owing_since = self._next_state = None
            return self._look_for_silence(now)
        if self._owing_since is None:
            self._owing_since, self._next_state = now, now + self.STATE_EVERY
        if window.state == window.BYTES:
            self._check_stall()
            moved = self.server.heard > self.server.told
        else:
            moved = self.sink.written != self._shown
            if self._stall_timeout and now - self._output[1] > self._stall_timeout:
                raise Failure('the output has taken nothing for %g s' % self._stall_timeout)
        if moved:
            self._show_life()
        if now > self._next_state:
            self._next_state = now + 5 * self.STATE_EVERY
            self._say_state('writing' if window.state == window.ROOM else 'receiving')

    def _show_life(self):
        """Tell the server that something moved here since it last heard from us."""
        told = self.server.told
        if self.dialect.talks:
            try:
                self.server.show_life(ALIVE)
            except Gone:
                pass                    # reading will tell why
        if self.server.told != told:
            self._shown = self.sink.written

    def _say_state(self, busy):
        """Tell the server what we do while it waits for us, and figures for its report."""
        if self.dialect.talks:
            self.server.outgoing.put_tail(self.dialect.state(busy=busy, **self.figures()))
            self._flush()

    def figures(self):
        """What is worth to be told of this end, by the names of FIGURES."""
        figures = {'by_multicast': self.window.by_multicast, 'written': self.sink.written}
        if self.overflows is not None:
            figures['overflows'] = self.overflows
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
            tell('deaf', payload=self.window.payload)
        self._carried = heard, repaired

    # ---- the end

    def _finish(self):
        """All has come: verify it, and make it final.  Raises Failure, LinkClosed."""
        window, began = self.window, monotonic()
        while window.unwritten:
            tell.look(monotonic())
            self.sink.look()
            if self._poll([(self.writer.link.child_fd, select.POLLIN)],
                          min(TICK, self.server.alive_every / 2)):
                self.writer.link.wait_child()
                window.written()
            if self.sink.written != self._output[0]:
                self._output = self.sink.written, monotonic()
            if self.sink.written != self._shown:
                self._show_life()
            if self._stall_timeout and monotonic() - max(began, self._output[1]) > self._stall_timeout:
                raise Failure('the output has taken nothing for %g s' % self._stall_timeout)
        if self._fields is not None:
            expected = field(self._fields, 'bytes', NUMBER)
            if expected != self.writer.bytes:
                raise Failure('the image has %d bytes, not %d' % (self.writer.bytes, expected))
            digest = field(self._fields, 'sha256', TEXT, optional=True)
            if window.digest and digest != self.writer.hash.hexdigest():
                raise Failure('the digest of the image differs')
        elif not self.writer.bytes and not self.options.allow_empty:
            raise Failure('the image is empty; if that is meant, give --allow-empty')
        if not self._flowing:
            self.sink.start()
        self.overflows = self.receiver.overflows()
        self.writer.commit()
        self._await_end()

    def _await_end(self):
        """Wait until the image is final, however long it takes.  Raises Failure."""
        while self.writer.is_alive():
            tell.look(monotonic())
            self._show_life()
            self.sink.look()
            self.writer.join(min(TICK, self.server.alive_every / 2))
        if self.writer.failure:
            raise self.writer.failure

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
# Command line
# ---------------------------------------------------------------------------

GROUP, DEFAULT_PORT = '239.255.83.83', 18383        # the group: RFC 2365
MOST_CLIENTS = 10000                    # of one server


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


def file_type(text):
    """An argument type: a path; None for `-`, which is standard input or output."""
    return None if text == '-' else text


def group_type(text):
    """An argument type: a multicast group."""
    try:
        socket.inet_pton(socket.AF_INET, text)
        if is_multicast(text):
            return text
    except OS_ERRORS + (UnicodeError,):
        pass
    raise argparse.ArgumentTypeError(
        '%s is not a multicast group (224.0.0.0 to 239.255.255.255)' % printable(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        """Exit with the line and the code for wrong usage."""
        self.exit(USAGE, '%s: error: %s (see %s --help)\n' % (self.prog, message, self.prog))


class PrintVersion(argparse.Action):
    """--version, on standard output also with Python 2."""

    def __call__(self, parser, *_others):
        print('kmcast ' + __version__)
        parser.exit()


def command_line():
    """The parser of the command line."""
    parser = Parser(prog='kmcast', description='Send one image to many hosts at once, '
                    'reliably: multicast carries it once, TCP what was lost.')
    parser.add_argument('--version', action=PrintVersion, nargs=0, help='say the version')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--datagrams', choices=('auto',) + WAYS, default='auto',
                        help='how to send or receive many packets at once (auto)')
    common.add_argument('--stall-timeout', type=seconds_type, metavar='SECONDS',
                        help='give up a peer that has got nothing done for so long; 0: never; in '
                        'the base protocol 15 for a server and 0 for a client (30)')
    common.add_argument('--allow-empty', action='store_true',
                        help='an image of 0 bytes is no error; a client heeds it in the base '
                        'protocol only, else the server has the say')
    common.add_argument('--report', metavar='FILE', help='write how it went there, as JSON')
    common.add_argument('--log', metavar='FILE', help='add what -v says there, with date and time')
    common.add_argument('-v', '--verbose', action='store_true', help='say more')
    common.add_argument('-q', '--quiet', action='store_true', help='say only what went wrong')
    port = {'nargs': '?', 'type': whole_number(1, 65535), 'metavar': 'PORT',
            'help': 'TCP port of the server, and its UDP port (%d)' % DEFAULT_PORT}

    server = commands.add_parser('server', parents=[common], help='send an image',
                                 description='Send standard input, or a file, to CLIENTS clients.')
    server.add_argument('local_ip', metavar='LOCAL_IP', help='the interface to multicast from: '
                        'an address of this host, an interface\'s name, or auto')
    server.add_argument('clients', metavar='CLIENTS', type=whole_number(1, 100000),
                        help='how many clients to wait for')
    server.add_argument('port', **port)
    server.add_argument('-i', '--input', type=file_type, metavar='FILE', default='-',
                        help='the image; -: standard input (-)')
    server.add_argument('--pipe', metavar='COMMAND', help='the image is what COMMAND writes, and '
                        'is complete only if COMMAND exits with 0')
    server.add_argument('--size', type=whole_number(0, 1 << 63), metavar='BYTES',
                        help='of an image that comes by a pipe: for progress and room')
    server.add_argument('--name', help='what to call the image (the name of FILE)')
    server.add_argument('--group', type=group_type, default=GROUP,
                        help='multicast group (%s)' % GROUP)
    server.add_argument('--ttl', type=whole_number(0, 255), default=8,
                        help='routers that multicast may pass (8)')
    server.add_argument('--mtu', type=whole_number(256, 9000), metavar='BYTES',
                        help='largest IP packet (1500, or the interface\'s if that is less)')
    server.add_argument('--rate', type=rate_type, default='auto',
                        help='bit/s as in 940M, auto: as fast as the slowest link, max (auto)')
    server.add_argument('--unicast', action='store_true',
                        help='no multicast, TCP only: for a few hosts')
    server.add_argument('--start-wait', type=seconds_type, metavar='SECONDS',
                        help='start after so long, even if not all clients came')
    server.add_argument('--min-clients', type=whole_number(1, 100000), default=1, metavar='M',
                        help='how many must be there for --start-wait to start (1)')
    server.add_argument('--min-rate', type=least_rate_type, default=0, metavar='RATE',
                        help='drop a client that alone keeps the transfer slower for 10 s')
    server.add_argument('--buffer-packets', type=whole_number(1, MAX_PACKETS), metavar='N',
                        help='packets in a round at the most; memory is that of two rounds '
                        '(as many as make 8 MB)')
    server.add_argument('--clients-per-thread', type=whole_number(1, 1000), default=64, metavar='N',
                        help='clients that one TCP thread serves (64)')
    server.add_argument('--no-digest', action='store_true', help='do without SHA-256')
    server.add_argument('--compat', action='store_true',
                        help='serve clients of the base protocol (the C implementation)')

    client = commands.add_parser('client', parents=[common], help='receive an image',
                                 description='Receive an image to standard output, or to a file.')
    client.add_argument('local_ip', metavar='LOCAL_IP', help='the interface to receive multicast '
                        'on: an address of this host, an interface\'s name, or auto')
    client.add_argument('server_ip', metavar='SERVER_IP', help='the server\'s address')
    client.add_argument('port', **port)
    client.add_argument('-o', '--output', type=file_type, metavar='FILE', default='-',
                        help='write here, and the file appears when it is complete and verified; '
                        '-: to standard output (-)')
    client.add_argument('--pipe', metavar='COMMAND', help='write to the standard input of COMMAND; '
                        'success only if COMMAND exits with 0')
    client.add_argument('--wait', type=seconds_type, default=60.0, metavar='SECONDS',
                        help='how long to try to reach the server (60)')

    demo = commands.add_parser('demo', help='a server and some clients on this host, to see it work',
                               description='Send FILE, or 64 MiB of random data, to some clients '
                               'on this host by loopback.')
    demo.add_argument('--clients', type=whole_number(1, 100), default=3, metavar='N',
                      help='how many clients (3)')
    demo.add_argument('file', nargs='?', metavar='FILE', help='what to send')
    demo.add_argument('-v', '--verbose', action='store_true', help='say more')
    demo.add_argument('-q', '--quiet', action='store_true', help='say only what went wrong')
    return parser


def server_command(options, signals):
    """`kmcast server`: what will do it.  Raises Failure."""
    if options.input and options.pipe is not None:
        raise Failure('give one of --input and --pipe', USAGE)
    port_like = options.clients >= 1024 and options.port < 1024
    if options.clients > MOST_CLIENTS or port_like:
        raise Failure('%d clients and PORT %d: are they swapped? It is server LOCAL_IP CLIENTS [PORT]'
                      % (options.clients, options.port), USAGE)
    if options.min_clients > options.clients:
        raise Failure('--min-clients %d is more than CLIENTS, %d'
                      % (options.min_clients, options.clients), USAGE)
    if options.min_clients > 1 and options.start_wait is None:
        raise Failure('--min-clients needs --start-wait SECONDS', USAGE)
    allow_descriptors(options)
    options.local_ip = local_address(options.local_ip)
    names = [entry for entry in interfaces() if entry[1] == options.local_ip]
    options.interface = '%s (%s)' % names[0] if names else options.local_ip
    source = Source(options.input, options.pipe, not (options.no_digest or options.compat))
    return Multicaster(options, source, signals)


def client_command(options, signals):
    """`kmcast client`: what will do it.  Raises Failure."""
    if options.output and options.pipe is not None:
        raise Failure('give one of --output and --pipe', USAGE)
    if re.match(r'[0-9.]*$', options.server_ip):
        try:
            socket.inet_pton(socket.AF_INET, options.server_ip)
        except OS_ERRORS:
            raise Failure('"%s" is not an IPv4 address' % options.server_ip, USAGE)
    # `auto` is the address of the connection to the server, once there is one.
    options.local_ip = None if options.local_ip == 'auto' else local_address(options.local_ip)
    return Client(options, signals)


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
            preexec_fn=lambda: end_with(us), **pipes)
        self._processes.append(process)
        return process

    def run(self):
        """Send and compare; returns an exit code."""
        options = self.options
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        server = self._start('server', '127.0.0.1', str(options.clients), port,
                             '-v' if options.verbose else '-q', stdin=subprocess.PIPE)
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
                client.process.terminate()
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

    def status(self, _now):
        """None: its server and clients have their own."""

    def close(self):
        """Leave no process behind."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                try:
                    if pipe and not pipe.closed:
                        pipe.close()
                except OS_ERRORS + (ValueError,):
                    pass                # what was still to be written


COMMANDS = {'server': server_command, 'client': client_command, 'demo': Demo}


def main(arguments=None):
    """The program; returns its exit code."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    if options.command in ('server', 'client') and options.port is None:
        # argparse wants an optional positional right behind the others.
        if len(rest) == 1 and rest[0].isdigit():
            try:
                options.port = whole_number(1, 65535)(rest.pop())
            except argparse.ArgumentTypeError as error:
                parser.error('argument PORT: %s' % error)
        else:
            options.port = DEFAULT_PORT
    if rest:
        parser.error('unrecognized arguments: %s' % printable(' '.join(rest)))
    if not options.command:             # Python 3 lets it be missing
        parser.error('which COMMAND? one of server, client, demo')
    open_standard_files()
    return run_job(options, StopInOrder())


def read_by_user(options, job):
    """Have the events read by what the command line asks for.  Raises Failure."""
    screen = Screen()
    level = DEBUG if options.verbose else ERROR if options.quiet else INFO
    clock = '%H:%M:%S ' if options.verbose and not screen.terminal else ''
    log = Log(options.command, level, screen.line, clock)
    tell.readers[:] = [log, Summary(log, options.verbose)]
    if job is None:
        return
    if getattr(options, 'log', None):
        file = LogFile(options.log)
        whole_log = Log(options.command, DEBUG, file.line, '%Y-%m-%d %H:%M:%S ')
        tell.readers += [whole_log, Summary(whole_log, True)]
    if not options.quiet:
        tell.readers.append(Progress(options.command, job, screen))
    if getattr(options, 'report', None):
        tell.readers.append(JsonReport(options.report, options.command, job))


def run_job(options, signals):
    """Do what the command line asks for; returns the exit code.

    A signal can come between any two instructions.  Once there is a verdict it changes
    nothing, and what was begun is closed in any case.
    """
    job = code = reason = None
    read_by_user(options, None)
    try:
        try:
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
