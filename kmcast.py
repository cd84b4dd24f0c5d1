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

     1. Python 2 and 3      all that differs between them
     2. Wire format         structs, signals, frames; nothing else knows an offset
     3. TcpQueue            pieces waiting to be sent, or to be understood
     4. SemLink             the chained/zipper sync between neighbouring threads
     5. Buffer              one round of packets: fill, put, get, missing, flush
     6. Coded repair        which lost packets to XOR, and how to solve for them
     7. Datagrams           multicast sockets; many packets a system call
     8. Pacing              how fast, and how that is found out
     9. Ends                where the image comes from, where it goes
    10. Server              TcpServer (poll), Multicaster (select)
    11. Client
    12. Command line        arguments, demo, exit codes

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
import logging
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
import zlib

__version__ = '1.0.0'

log = logging.getLogger('kmcast')

# ---------------------------------------------------------------------------
# 1. Python 2 and 3
# ---------------------------------------------------------------------------

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


def counted(number, noun):
    """`1 packet`, `2 packets`."""
    return '%d %s' % (number, noun if number == 1 else noun + 's')


def uninterrupted(call, *args):
    """`call(*args)`, again when a signal interrupted it (PEP 475)."""
    while True:
        try:
            return call(*args)
        except OS_ERRORS as error:
            if errno_of(error) != errno.EINTR:
                raise


# The packets of a batch are allocated and freed together, thousands of times
# a second; by default glibc gives that memory back to the kernel each time
# and faults it in again, which triples the cost of a packet (mallopt(3)).
if hasattr(LIBC, 'mallopt'):
    LIBC.mallopt(-1, 16 << 20)                      # M_TRIM_THRESHOLD


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


def start_thread(thread):
    """Start a threading.Thread.  Raises Failure where this host has none to give."""
    try:
        thread.start()
    except (RuntimeError, threading.ThreadError):   # the latter: Python 2
        raise Failure('this host gives us no thread more; see "ulimit -u", or the limit of its '
                      'container')


TICK = 0.5                              # seconds between looks at the clocks

# Exit codes; the table is in the man page.
OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3
NOT_STARTED = PARTLY                    # the client's meaning of 3

# ---------------------------------------------------------------------------
# 2. Wire format
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


def payload_for(mtu):
    """The payload of a full packet, in bytes, at an MTU in bytes."""
    return (mtu - UDP_OVERHEAD - PACKET.size) // 4 * 4


def pack_group_info(group, port, session):
    """The server's first message: 16 bytes, a struct sockaddr_in."""
    padding = MAGIC + struct.pack('BB', SESSION_VERSION, 0) if session else b''
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


def client_message_size(head, most):
    """The size in bytes of a client's message that begins with `head`.

    most: packets that a request may ask for.  Returns None where more of the
    message is needed to tell; raises ProtocolError.
    """
    kind = head[:1]
    if kind in (ALIVE, READY, DONE):
        return 1
    if kind not in (REQUEST, HELLO, BYE):
        raise ProtocolError('an unknown signal, 0x%02x' % ord(kind))
    if len(head) < 5:
        return None
    length = U32.unpack(head[1:5])[0]
    if kind == REQUEST:
        if not 0 < length <= most:
            raise ProtocolError('a request for %d packets' % length)
        return 5 + 4 * length
    if length > MAX_FRAME:
        raise ProtocolError('a frame of %d bytes' % length)
    return 5 + length


# ---------------------------------------------------------------------------
# 3. TcpQueue
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


# ---------------------------------------------------------------------------
# 4. SemLink
# ---------------------------------------------------------------------------

class LinkClosed(Exception):
    """The thread at the other end of a SemLink has ended."""


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
# 5. Buffer
# ---------------------------------------------------------------------------

def plain_crc(payload, _number):
    """The checksum of a base-protocol server that uses CRC-32."""
    return zlib.crc32(payload)


def c_sum(payload, _number):
    """The checksum of the C implementation: the sum of little-endian words."""
    words = bytes(payload) + b'\0' * (-len(payload) % 4)
    total = sum(struct.unpack('<%dI' % (len(words) // 4), words)) & MASK
    return struct.unpack('<' + CRC_TYPE, U32.pack(total))[0]


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
# 6. Coded repair
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
# 7. Datagrams
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
TCP_USER_TIMEOUT = 18
MSG_DONTWAIT = 0x40
MSG_MORE = 0x8000

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
        (log.warning if self.strict else log.debug)(
            'sending by %s does not work here (%s), so by %s',
            self.way, explain(error), worse)
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
                log.debug('receiving by %s does not work here (%s), so by plain',
                          self.way, explain(error))
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
# 8. Pacing
# ---------------------------------------------------------------------------

UNLIMITED = float('inf')


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


def bits(rate):
    """A rate in bit/s in words."""
    if rate == UNLIMITED:
        return 'no limit'
    for unit, scale in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if rate >= scale:
            return '%.4g %sbit/s' % (rate / scale, unit)
    return '%.0f bit/s' % rate


# ---------------------------------------------------------------------------
# 9. Ends
# ---------------------------------------------------------------------------

class Command(object):
    """A shell command at one end of the image, in a process group of its own."""

    PATIENCE = 5.0                      # seconds, until it says what it waits for
    TURN = 0.01                         # seconds between looks whether it has ended
    LAST_MOMENT = 1.0                   # seconds from SIGTERM to SIGKILL

    # What stops a process group that wants the terminal and may not have it, or that a user stops
    # there: tty(4).  Each gets it, and goes on.
    OF_TERMINAL = frozenset((signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP))

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
                        log.warning('the command is stopped, by signal %d: %s', self._stopped,
                                    printable(self.text))
                else:
                    self._ended(-os.WTERMSIG(status) if os.WIFSIGNALED(status)
                                else os.WEXITSTATUS(status))
        return True

    def _ended(self, code):
        self.code = self._process.returncode = code
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
                log.info('all the data is through; waiting for the command to end: %s',
                         printable(self.text))
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

    def close(self):
        """See to its end."""
        self.end()
        try:
            deadline = monotonic() + self.LAST_MOMENT
            while not self.look() and monotonic() < deadline:
                time.sleep(self.TURN)
            if self.code is None:
                self._kill(signal.SIGKILL)
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
                if self._target in mount_points():
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
            uninterrupted(poller.poll, TICK * 1000)

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
            log.warning('the image is in place, but closing it failed: %s', explain(error))
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
            log.warning('the image is in place, but its folder could not be synchronised: %s',
                        explain(error))

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
        # Not under a writer that hangs in it: another file would get its number.


def mount_points():
    """Where file systems are mounted, files included: proc(5), mountinfo."""
    try:
        with io.open('/proc/self/mountinfo', encoding='utf-8', errors='replace') as table:
            return set(re.sub(r'\\([0-7]{3})', lambda found: chr(int(found.group(1), 8)),
                              line.split(' ')[4]) for line in table)
    except OS_ERRORS + (IndexError,):
        return set()


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
            log.debug('removed %s, which a run that was killed had left', printable(path))
        except OS_ERRORS:
            pass                        # somebody writes it, or it is not ours to remove
        finally:
            os.close(fd)


# ---------------------------------------------------------------------------
# 10. Server
# ---------------------------------------------------------------------------

ALIVE_EVERY = 5.0                       # seconds, or three times in the other's stall timeout
STALL = 30.0                            # seconds: the default of --stall-timeout
# The same for a server with --compat: the C clients wait 20 s for each other.
BASE_STALL = 15.0
GREETING_TIME = 5.0                     # seconds for a client to say HELLO
FAREWELL_TIME = 2.0                     # seconds for a BYE to get through
MOST_PENDING = 256                      # connections of one address that are no clients (yet)

# What a client can owe its server, in words for the log, and the signals that pay it.
GREETING, READINESS = 'HELLO', 'word that it is ready for the next round'
ANSWER, COMPLETION = 'word of what it received', 'word that it has everything'
PAYS = {GREETING: (HELLO,), READINESS: (READY,),
        ANSWER: (DONE, REQUEST), COMPLETION: (DONE,)}


def alive_every(stall_timeout):
    """How often to be heard from, seconds, by a peer that waits for so many (0: for ever)."""
    return min(ALIVE_EVERY, stall_timeout / 3) if stall_timeout else ALIVE_EVERY


def unacknowledged(sock):
    """Bytes that a TCP connection's other end has not acknowledged: tcp(7), SIOCOUTQ."""
    return struct.unpack('@i', fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b'\0\0\0\0'))[0]


def causes(payload):
    """Why multicast of packets with so many bytes of payload may not arrive, in words."""
    jumbo = ', jumbo frames that something on the way does not take (--mtu)'
    return ('usual causes: a switch with IGMP snooping but no querier, a firewall on '
            'the host, the wrong LOCAL_IP' + (jumbo if payload > payload_for(1500) else ''))


def keep_alive(sock, stall_timeout):
    """Make the kernel give up a dead peer when we would, seconds: tcp(7).

    With 0, never, it does so only if there is nothing to send, after 17 s.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    if stall_timeout:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(1000 * stall_timeout))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class AtMost(logging.Filter):
    """Lets few enough lines into the log; the next one says how many it hid."""

    PERIOD = 10.0                       # seconds

    def __init__(self, most):
        """most: lines in a period."""
        logging.Filter.__init__(self)
        self._most = most
        self._since, self._shown, self._hidden = 0.0, 0, 0

    def filter(self, record):
        """Whether to show a record: logging.Filter.filter."""
        if monotonic() - self._since > self.PERIOD:
            self._since, self._shown = monotonic(), 0
        self._shown += 1
        if self._shown > self._most:
            self._hidden += 1
            return False
        if self._hidden:
            record.msg = '(%d more like these) %s' % (self._hidden, record.msg)
            self._hidden = 0
        return True


strangers = logging.getLogger('kmcast.strangers')   # who connects, but is no client
strangers.addFilter(AtMost(10))
arrivals = logging.getLogger('kmcast.arrivals')     # who comes, and goes before the start
arrivals.addFilter(AtMost(200))


class Session(object):
    """What is agreed for a transfer; nobody changes it once clients come."""

    def __init__(self, options, payload, name, size):
        self.group, self.port = options.group, options.port
        self.per_thread = options.clients_per_thread
        self.compat = options.compat
        self.stall_timeout = options.stall_timeout
        if self.stall_timeout is None:
            self.stall_timeout = BASE_STALL if self.compat else STALL
        self.strangers = options.strangers
        self.payload = payload
        salts = struct.unpack('<II', os.urandom(8))
        self.salt, self.repair_salt = (0, 0) if self.compat else salts
        self.digest = not (self.compat or options.no_digest)
        self.welcome = pack_frame(WELCOME, {
            'version': __version__, 'salt': self.salt,
            'repair_salt': self.repair_salt, 'payload': payload,
            'name': name and printable(name), 'size': size,
            'digest': 'sha256' if self.digest else None,
            'stall': self.stall_timeout,
            'unicast': options.unicast})

    @property
    def checks(self):
        """The checksum of packets, as Buffer takes it."""
        return (c_sum,) if self.compat else (zlib.crc32,)


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
        self.everyone = []              # who was here at the start, whatever became of them
        self._here = []
        self._refused = {}              # (host, address) -> why

    @property
    def here(self):
        """The clients that are here now."""
        return list(self._here)

    @property
    def refused(self):
        """(host, address) and why, of those that were refused and did not get in later."""
        return sorted(self._refused.items())

    def refusal(self):
        """Why there is no place for another client; None if there is one."""
        if self.begun:
            return 'the transfer has begun'
        if len(self._here) >= self.places:
            return 'all %d places are taken' % self.places
        return None

    def refuse(self, peer, why):
        """Remember who was refused."""
        if len(self._refused) < self.MOST_REFUSED:
            self._refused[peer.identity] = why

    def twin(self, peer):
        """The client that is here from the same host; None without one.

        Not of the loopback interface: there several clients are for trying it out.
        """
        if peer.host is None or peer.address.startswith('127.'):
            return None
        twins = [other for other in self.here if other.identity == peer.identity]
        return twins[0] if twins else None

    def admit(self, peer):
        """A client has a place; returns how many are here now."""
        self._refused.pop(peer.identity, None)
        self._here.append(peer)
        return len(self._here)

    def leave(self, peer):
        """A client is not here any more; returns whether it was."""
        try:
            self._here.remove(peer)
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


class Step(object):
    """What a parent wants its TCP servers to do next; read-only once published.

    kind: accept (the clients; only TCP server 1), announce (the `buffer`),
    sent (the buffer, with its `digest`), again (repair: by multicast for the
    peers in `coded`, AGAIN being `message`; by TCP for the others), repair (by
    TCP, and see to the end of it), finish (sent, and `message` is the last
    BYE), abort (`message` is the reason).
    """

    # For what a TCP server waits, before it releases its parent.
    AWAITED = {'accept': (), 'announce': (READINESS,), 'sent': (ANSWER,),
               'again': (), 'repair': (READINESS, ANSWER, COMPLETION),
               'finish': (COMPLETION,), 'abort': ()}

    def __init__(self, kind, buffer=None, digest=b'', coded=(), message=None, info=None):
        self.kind = kind
        self.buffer = buffer
        self.digest = digest
        self.coded = coded
        self.message = message
        self.info = info
        self.awaited = self.AWAITED[kind]


class Gone(Exception):
    """The peer's connection has ended."""


class Peer(object):
    """One client as the server sees it: its connection, and where it stands."""

    def __init__(self, sock, address):
        self.sock, self.address = sock, address
        self.host = None
        self.incoming, self.outgoing = TcpQueue(), TcpQueue()
        self.need = 1                   # bytes before it is worth to parse again
        self.owes = None                # a key of PAYS
        self.moved = monotonic()        # when it, or its kernel, last got something done
        self.sent = 0                   # bytes, into the socket
        self.acknowledged = 0           # bytes of these
        self.alive_every = ALIVE_EVERY  # seconds; how often it wants to hear from us
        self.sentence = None            # why its thread is to drop it at its next look
        self.paid = 0.0                 # when it last owed nothing more
        self.signs = 0                  # ALIVE messages
        self.since = monotonic()        # when it connected
        self.told = monotonic()         # when it was last sent something
        self.request = None             # places in the round, asked for
        self.listening = False          # to multicast, until SENT
        self.leaving = None             # when to close at the latest
        self.outcome = None             # 'complete', or why not
        self.lost = 0                   # packets it asked for, all in all

    def __str__(self):
        return '%s (%s)' % (self.host, self.address) if self.host else self.address

    identity = property(lambda self: (self.host, self.address))

    def fileno(self):
        """For poll()."""
        return self.sock.fileno()

    def look_at_kernel(self):
        """Take what the other end has acknowledged for a move."""
        try:
            acknowledged = self.sent - unacknowledged(self.sock)
        except OS_ERRORS:
            return
        if acknowledged > self.acknowledged:
            self.acknowledged = acknowledged
            self.moved = monotonic()

    def owe(self, what):
        """From now on the peer owes us something (or, None, nothing)."""
        self.owes = what
        self.moved = monotonic()
        if what is None:
            self.paid = self.moved

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
            self.sent += count
            self.moved = self.told = monotonic()
            if count < len(data):
                self.outgoing.put_head(memoryview(data)[count:])
                return

    def _read(self):
        """What has arrived, b'' if nothing has.  Raises Gone."""
        try:
            data = self.sock.recv(65536)
        except OS_ERRORS as error:
            if errno_of(error) in TRY_AGAIN:
                return b''
            raise Gone(explain(error))
        if not data:
            raise Gone('the connection was closed')
        return data

    def hear_no_more(self):
        """Take what it still says, for the farewell.  Raises Gone at its end."""
        self._read()

    def receive(self, most):
        """The complete messages that have arrived, one by one, as bytes.

        most: packets that a request may ask for.  Raises Gone, ProtocolError.
        """
        data = self._read()
        self.incoming.put_tail(data)
        if self.incoming.size < self.need:
            return
        data, start, self.need = self.incoming.flat(), 0, 1
        while start < len(data):
            if self.owes == GREETING and data[start:start + 1] != HELLO:
                raise ProtocolError('it says something else than HELLO')
            size = client_message_size(data[start:start + 5], most)
            if size is None or start + size > len(data):
                self.need = size or 5
                break
            start += size
            yield data[start - size:start]
        self.incoming.put_head(data[start:])


class TcpServer(threading.Thread):
    """Looks after up to 64 clients; its child looks after the next ones.

    The spec's TCP server: one poll() over its clients and its links.  Of its
    states, INIT is to have no `step` yet, ACCEPT the step of that name, PREP to
    have released the parent, SYNC the announce step, and SEND all others.

    TCP server 1 has the listener and hears the greetings of all; a client that
    it has no room for it passes on to its child, which does the same.  So a
    release means "look": at `passed_on`, at the clients' sentences, at `step`.
    """

    PATIENCE = 5.0                      # seconds, until it says whom it waits for
    AT_ONCE = 64                        # connections to accept in a turn

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
        self.step = None
        self.passed_on = collections.deque()    # clients for the child
        self.answers = {}               # peer -> places asked for, with the child's
        self.members = []               # clients of this thread that are still here
        self.failure = None             # why this thread ended, if not in order
        self._pending = []
        self._leaving = []
        self._released = True
        self._child_released = True
        self._over = False
        self._tick = TICK
        self._next_look = 0.0
        self._next_words = 0.0          # when to say whom we wait for
        self._poller = select.poll()
        self._handlers = {}

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
            log.debug('in a TCP server', exc_info=True)
            self.failure = 'internal error: %s: %s' % (type(error).__name__, error)
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

    def _watch_peer(self, peer):
        self._watch(peer.fileno(), self._on_peer, peer)
        self._update(peer)

    def _unwatch(self, fd):
        if self._handlers.pop(fd, None):
            self._poller.unregister(fd)

    def _poll(self, timeout):
        try:
            events = self._poller.poll(timeout * 1000)
        except OS_ERRORS as error:
            if errno_of(error) != errno.EINTR:
                raise
            return
        for fd, event in events:
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
            if not self._child_released or [p for p in self.members
                                            if p.owes in self.step.awaited]:
                return
            self.answers = {p: p.request for p in self.members if p.request}
            if self.child and self.link.child_fd is not None:
                self.answers.update(self.child.answers)
            self._released = True
            self.link.release_parent()
        if not accepting and not self.members and self.link.child_fd is None:
            self._over = True           # nobody is left to serve

    def _look_at_clocks(self):
        now = monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._tick
        if not self._released and now > self._next_words:
            self._next_words = now + 2 * self.PATIENCE
            late = [str(peer) for peer in self.members if peer.owes in self.step.awaited]
            if late:
                log.info('waiting for %s', ', '.join(late[:8]) + (
                    ' and %d more' % (len(late) - 8) if len(late) > 8 else ''))
        for peer in self._pending[:]:
            if now - peer.moved > GREETING_TIME:
                self._drop(peer, 'no %s within %d s' % (peer.owes, GREETING_TIME))
        limit = self.session.stall_timeout
        for peer in self.members[:]:
            if peer.owes or peer.outgoing.count:
                peer.look_at_kernel()
                if limit and now - peer.moved > limit:
                    self._drop(peer, 'stalled: for %g s no %s' % (
                        limit, peer.owes or 'sign that it takes what is sent to it'))
            elif not self.session.compat and now - peer.told >= peer.alive_every:
                self._send(peer, ALIVE)
        for peer in self._leaving[:]:
            if now > peer.leaving:
                self._close(peer)

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
            self.step = step
            self.link.release_child()
            self._dismiss_all(step.message)
        else:
            self._released = False
            getattr(self, '_do_' + step.kind)(step)

    def _begin(self, step):
        """Publish a step to the child, too."""
        self.step = step
        self._child_released = self.link.child_fd is None
        self.link.release_child()
        self._next_words = monotonic() + self.PATIENCE
        self._carry_out_sentences()

    def _carry_out_sentences(self):
        for peer in self.members[:]:
            if peer.sentence:
                self._drop(peer, peer.sentence)

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

    # ---- the steps

    def _do_accept(self, step):
        self.step = step
        self._watch(self.listener.fileno(), self._on_connection)

    def _do_announce(self, step):
        self._begin(step)
        info = step.info if self.session.compat else BUFFER_INFO + step.info
        for peer in self.members[:]:
            peer.owe(READINESS)
            self._send(peer, info)

    def _do_sent(self, step):
        self._begin(step)
        for peer in self.members[:]:
            if peer.listening:
                peer.listening = False
                peer.owe(step.awaited[0])
                self._send(peer, SENT + step.digest + (step.message or b''))

    _do_finish = _do_sent

    def _do_again(self, step):
        self._begin(step)
        for peer in self.members[:]:
            if not peer.request:
                continue
            if peer in step.coded:
                peer.request = None
                peer.listening = True
                self._send(peer, AGAIN + step.message)
                continue
            places, peer.request = peer.request, None
            peer.owe(COMPLETION)
            if not self.session.compat:
                peer.outgoing.put_tail(PACKETS)
            for start, stop in runs(places):
                for data in step.buffer.packets(places[start], places[stop - 1] + 1):
                    peer.outgoing.put_tail(data)
            self._update(peer)

    _do_repair = _do_again

    # ---- connections

    def _on_connection(self, _event):
        for _ in range(self.AT_ONCE):   # then hear what they say
            try:
                sock, address = self.listener.accept()
            except OS_ERRORS:
                return
            self._make_room(address[0])
            sock.setblocking(False)
            keep_alive(sock, self.session.stall_timeout)
            peer = Peer(sock, address[0])
            peer.outgoing.put_tail(pack_group_info(
                self.session.group, self.session.port, not self.session.compat))
            if self.session.compat:
                refusal = self.roster.refusal()
                if refusal:
                    self._refuse(peer, refusal)
                    continue
                self._watch_peer(peer)
                if peer.sock:
                    self._admit(peer)
                continue
            peer.owe(GREETING)
            self._pending.append(peer)
            self._watch_peer(peer)

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
            self._drop(victim, 'too many connections that say nothing', tell=False)

    def _refuse(self, peer, why):
        self.roster.refuse(peer, why)
        strangers.info('%s: refused, %s', peer, why)
        self._drop(peer, 'refused: ' + why)

    def _admit(self, peer):
        peer.owe(None)
        arrivals.info('%s is here, %d of %d', peer, self.roster.admit(peer), self.roster.places)
        self._take(peer)
        self._advance()

    def _take(self, peer):
        """Serve a client, or have the child do so.  Raises Failure."""
        if len(self.members) < self.session.per_thread:
            self._tick = min(self._tick, peer.alive_every / 2)
            self.members.append(peer)
            self._watch_peer(peer)
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
        try:
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                if peer.leaving:
                    peer.hear_no_more()
                    return
                most = self.step.buffer.count if self.step and self.step.buffer else 0
                for message in peer.receive(most):
                    self._on_message(peer, message)
                    if peer.leaving or peer.sock is None:
                        return
            self._update(peer)
        except Gone as error:
            self._drop(peer, 'it went away: %s' % error, tell=False)
        except ProtocolError as error:
            self._drop(peer, 'protocol error: %s' % error)

    def _send(self, peer, data):
        peer.outgoing.put_tail(data)
        self._update(peer)

    def _update(self, peer):
        """Send what can be sent, and poll for what cannot."""
        try:
            peer.flush()
        except Gone as error:
            self._drop(peer, 'it went away: %s' % error, tell=False)
            return
        if peer.leaving and not peer.outgoing.count:
            try:
                peer.sock.shutdown(socket.SHUT_WR)
            except OS_ERRORS:
                pass
        if peer.sock and peer.fileno() in self._handlers:
            self._poller.modify(peer.fileno(), select.POLLIN | (
                select.POLLOUT if peer.outgoing.count else 0))

    # ---- messages

    def _on_message(self, peer, message):
        kind = message[:1]
        if kind == BYE and peer.owes != GREETING and not self.session.compat:
            fields = unpack_frame(message[5:])
            self._drop(peer, 'it says: %s' % field(fields, 'reason', TEXT), tell=False)
        elif kind == ALIVE and peer.owes != GREETING and not self.session.compat:
            peer.moved = monotonic()
            peer.signs += 1
            if peer.signs > 20 + 2 * (peer.moved - peer.since) / alive_every(
                    self.session.stall_timeout):
                raise ProtocolError('far too many signs of life')
        elif kind in PAYS.get(peer.owes, ()):
            self.HANDLERS[kind](self, peer, message)
        else:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))

    def _on_hello(self, peer, message):
        fields = unpack_frame(message[5:])
        field(fields, 'version', TEXT)
        peer.host = field(fields, 'host', TEXT)
        peer.alive_every = alive_every(stall_of(fields))
        twin = None if self.roster.begun else self.roster.twin(peer)
        if twin:                        # its thread may be another one
            twin.sentence = 'replaced by a later client of the same host'
            self.roster.leave(twin)
            self._carry_out_sentences()
            self.link.release_child()
        refusal = self.roster.refusal()
        if refusal:
            self._refuse(peer, refusal)
            return
        self._pending.remove(peer)
        self._send(peer, self.session.welcome)
        if not peer.leaving and peer.sock:
            self._admit(peer)

    def _on_ready(self, peer, _message):
        peer.owe(None)
        peer.listening = True

    def _on_request(self, peer, message):
        buffer = self.step.buffer
        seqs = struct.unpack('<%dI' % (len(message) // 4 - 1), message[5:])
        places = [(seq - buffer.base) & MASK for seq in seqs]
        if max(places) >= buffer.count:
            raise ProtocolError('a request for a packet outside the round')
        peer.owe(None)
        peer.request = places
        peer.lost += len(places)

    def _on_done(self, peer, _message):
        peer.owe(None)
        if self.step.kind == 'finish':
            peer.outcome = 'complete'
            log.info('%s has everything', peer)
            self._close(peer)

    HANDLERS = {HELLO: _on_hello, READY: _on_ready, REQUEST: _on_request, DONE: _on_done}

    # ---- farewells

    def _drop(self, peer, reason, tell=True):
        """End with one client; the others do not notice."""
        if peer in self.members:
            self.members.remove(peer)
            self.roster.leave(peer)
            if not self._over:          # else the reason is everybody's, and said at the end
                peer.outcome = reason
                (log if self.roster.begun else arrivals).warning('%s: %s', peer, reason)
        elif peer in self._pending:
            self._pending.remove(peer)
            if not peer.host:           # else it was refused
                strangers.info('%s: %s', peer, reason)
        if peer.outgoing.count and not self._over:
            tell = False                # packets of a buffer that will be used again
        if tell and not peer.leaving and not self.session.compat:
            peer.leaving = monotonic() + FAREWELL_TIME
            self._leaving.append(peer)
            self._send(peer, pack_frame(BYE, {'ok': False, 'reason': reason}))
        else:
            self._close(peer)

    def _close(self, peer):
        for peers in (self.members, self._pending, self._leaving):
            if peer in peers:
                peers.remove(peer)
        self.roster.leave(peer)
        if peer.sock:
            self._unwatch(peer.fileno())
            peer.outgoing.clear()
            peer.sock.close()
            peer.sock = None

    def _dismiss_all(self, reason):
        self._over = True
        self.roster.end()
        while self.child is None and self.passed_on:
            self.members.append(self.passed_on.popleft())
            self._watch_peer(self.members[-1])
        for peer in self.members + self._pending:
            self._drop(peer, reason)

    def _farewell(self):
        """Give the last messages a moment to get through, then close."""
        deadline = monotonic() + FAREWELL_TIME
        while self._leaving and monotonic() < deadline:
            try:
                self._poll(0.1)
            except Exception:           # pylint: disable=broad-except
                log.debug('in a farewell', exc_info=True)
                break
        for peer in self._leaving + self._pending + self.members:
            self._close(peer)


class Multicaster(object):
    """Reads the image and multicasts it; the parent of all TCP servers.

    The spec's UDP server.  It runs in the main thread and selects on the
    image, its socket and its child.  Whenever it would just wait, it fills
    the next buffer.
    """

    ROUND = 8 << 20                     # bytes in a round at the most
    FIRST_ROUND = 64                    # packets: the first are likeliest to be lost
    LONGEST_ROUND = 1.0                 # seconds
    PASSES = 3                          # of coded repair in a round
    WORTH_CODING = 16                   # packets by TCP are no trouble
    PROBE = 16                          # packets, where no multicast gets through
    PATIENCE = 1.0                      # seconds without, until it is said
    DRAIN = 48 << 10                    # bytes that a queue gets rid of before TCP's turn
    STUCK = 5.0                         # seconds without room to send a packet
    ENDURANCE = 10.0                    # seconds below --min-rate
    SETTLED = 3                         # rounds without a slower rate, until it is worth a line
    FIRST_SEQ = 0

    def __init__(self, options, source, signals):
        """options: of the command line; source: a Source; signals: a StopInOrder."""
        self.options, self.source, self.signals = options, source, signals
        self.sender = self.listener = self.session = self.tcp = None
        start_by = None if options.start_wait is None else monotonic() + options.start_wait
        self.roster = Roster(options.clients, options.min_clients, start_by)
        self.link = SemLink()
        self.step = None
        self.started = monotonic()      # when the first round began
        self.pacer = Pacer()
        self.control = None
        if options.rate == 'auto':
            self.control = RateControl()
        else:
            self.pacer.rate = options.rate
        self.multicasting = not options.unicast
        self.unicast = options.unicast
        self.buffers = []
        self.upcoming = None            # the buffer that is being filled
        self.limit = self.FIRST_ROUND   # packets in the next buffer
        self.rounds = 0
        self.repair_number = 0
        self.coded = self.by_tcp = self.data = 0        # packets, for the summary
        self.last_heard = None          # when a client last got any multicast
        self.warned = False             # that none gets any
        self.trouble = None             # the last that was told
        self.ignored = set()            # clients that lose too much at any rate
        self.min_rate = options.min_rate
        self.brake = None               # the client that alone keeps the rate down
        self.settled = 0                # rounds since the rate last fell
        self.held_by = None             # (client, since when) below --min-rate
        self.alone = {}                 # client -> seconds waited for it alone

    def _open(self):
        """Check that all that it takes can be had here.  Raises Failure."""
        options = self.options
        try:
            self.sender = DatagramSender(options.local_ip, options.group, options.port,
                                         options.ttl, options.datagrams)
        except OS_ERRORS as error:
            raise Failure('cannot multicast to %s from %s: %s' % (
                options.group, options.local_ip, explain(error)), USAGE)
        mtu = self._mtu(options.mtu)
        self.session = Session(options, payload_for(mtu), options.name or self.source.name,
                               self.source.size)
        self.listener = self._listen(options.port)
        self.tcp = TcpServer(self.session, self.roster, self, self.link.spawn(), self.listener)
        capacity = options.buffer_packets or self.ROUND // self.session.payload
        self.buffers = [Buffer(self.session.payload, capacity, self.session.salt,
                               self.session.checks) for _ in (0, 1)]

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
        self._open()
        failure = None
        try:
            failure = self._serve()
            self.signals.over()         # from here on the verdict stands
        except Interrupted as error:
            failure = 'stopped by %s' % error
        self.source.end()
        self.roster.end()
        if failure:
            self.step = Step('abort', message=failure)
            self.link.release_child()
        self.link.close()
        for thread in self._threads():
            thread.join(2 * FAREWELL_TIME)
        return self._summary(failure, monotonic() - self.started)

    def _serve(self):
        """Serve the image; returns None, or why not."""
        try:
            start_thread(self.tcp)
            self.source.start()
            log.info('multicasting from %s to %s port %d, waiting for %s', self.options.interface,
                     self.session.group, self.session.port, counted(self.roster.places, 'client'))
            if self.options.local_ip.startswith('127.'):
                log.warning('only this host hears what is multicast from %s', self.options.local_ip)
            self._fill_next(self.FIRST_SEQ)
            self._do('accept')
            self.started = monotonic()
            here = len(self.roster.everyone)
            if here < self.roster.places:
                log.info('starting with %d of %s', here, counted(self.roster.places, 'client'))
            log.debug('sending from the interface with MTU %d, %d bytes a packet, by %s',
                      self.sender.mtu, self.session.payload, self.sender.way)
            while self._round():
                pass
        except LinkClosed:
            return self.tcp.failure or 'no client is left'
        except Failure as error:
            return error.reason
        except Exception as error:      # pylint: disable=broad-except
            log.debug('in the multicaster', exc_info=True)
            return 'internal error: %s: %s' % (type(error).__name__, error)
        return None

    def close(self):
        """Leave nothing behind; can be called at any time."""
        self.source.end()
        self.link.close()
        if self.tcp and not self.tcp.ident:
            self.tcp.link.close()
        for end in (self.listener, self.sender, self.source):
            if end:
                end.close()

    def state(self):
        """How it stands, in a line."""
        here = len(self.roster.here)
        if not self.roster.begun:
            return '%d of %s here' % (here, counted(self.roster.places, 'client'))
        return '%d bytes in %s, %s here' % (self.source.bytes, counted(self.rounds, 'round'),
                                            counted(here, 'client'))

    def _threads(self):
        thread = self.tcp if self.tcp.ident else None
        while thread:
            yield thread
            thread = thread.child

    def _do(self, kind, **parts):
        """Have the TCP servers do a step; returns what clients asked for."""
        started = monotonic()
        self.step = Step(kind, **parts)
        self.link.release_child()
        self._wait(link=True)
        if self.min_rate and kind != 'accept':
            self._time_alone(started)
        return self.tcp.answers

    def _wait(self, until=None, link=False, sender=False):
        """Fill the next buffer until a time (seconds on the monotonic clock),
        until the child's release, or until there is room in the socket.

        Raises LinkClosed at once when the TCP servers have ended.
        """
        while True:
            timeout = TICK              # lest a signal that another thread took goes unheard
            if until is not None:
                timeout = until - monotonic()
                if timeout <= 0:
                    return
            reads = [self.link.child_fd]
            filling = bool(self.upcoming) and not self.upcoming.full
            if filling and self.source.drained:     # its command is to end; nothing tells but a look
                timeout = min(timeout, Command.TURN)
            elif filling:
                reads.append(self.source)
            readable, writable, _ = uninterrupted(
                select.select, reads, [self.sender] if sender else [], [], timeout)
            if self.link.child_fd in readable:
                self.link.wait_child()
                if link:
                    return
            elif writable:
                return
            elif filling and (readable or self.source.drained):
                self.upcoming.fill(self.source)
                if not (link or sender or until) and self.upcoming.full:
                    return
            else:
                self.source.look()

    def _fill_next(self, base):
        """Begin to fill the buffer that is not in use."""
        self.buffers.reverse()
        self.upcoming = self.buffers[0]
        self.upcoming.start(base, 0, 0)
        self.upcoming.limit = min(self.limit, self.upcoming.capacity)
        rate = self.control.rate if self.control else self.pacer.rate
        longest = rate * self.LONGEST_ROUND / 8 / self.upcoming.slot
        self.limit = int(max(self.FIRST_ROUND, min(2 * self.upcoming.limit, longest,
                                                   self.upcoming.capacity)))

    # ---- a round

    def _round(self):
        """Bring one buffer to all clients; returns whether more are to come."""
        if not self.upcoming.full:
            self._wait()
        buffer, digest = self.upcoming, self.source.digest()
        self.upcoming = None
        info = buffer.info(self.rounds)
        self.rounds += 1
        self.data += buffer.count
        if buffer.count:
            self._fill_next(buffer.base + buffer.count)
        started = monotonic()
        self._do('announce', buffer=buffer, info=info)
        if not buffer.count:
            if not self.source.bytes and not self.options.allow_empty:
                raise Failure('the image is empty; if that is meant, give --allow-empty')
            self._do('finish', buffer=buffer, digest=digest, message=self._farewell(digest))
            return False
        probing = not self.multicasting
        count = min(buffer.count, self.PROBE) if probing else buffer.count
        seconds = self._multicast(buffer, 0 if self.unicast else count)
        answers = self._do('sent', buffer=buffer, digest=digest)
        if not self.unicast:
            self._learn(buffer, count, answers, seconds)
        self._repair(buffer, digest, answers)
        if self.min_rate:
            seconds = monotonic() - started
            self._judge(buffer.size * 8 / seconds, seconds)
        return True

    def _farewell(self, digest):
        """The BYE that ends a good session; b'' in the base protocol."""
        if self.session.compat:
            return b''
        digest = binascii.hexlify(digest).decode('ascii')
        return pack_frame(BYE, {'ok': True, 'bytes': self.source.bytes,
                                'sha256': digest if self.session.digest else None})

    def _multicast(self, buffer, last):
        """Multicast the packets up to index `last`; returns the seconds it took."""
        started, place, size = monotonic(), 0, buffer.slot + UDP_OVERHEAD
        stuck = None
        if self.control:
            self.pacer.rate = self.control.rate
        self.pacer.start()
        while place < last:
            done = self.sender.send(buffer, place,
                                    min(last, place + self.pacer.burst(size)))
            if done == place:
                stuck = stuck or monotonic() + (self.STUCK if self.multicasting else 0)
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
        if self.multicasting:
            self._wait(monotonic() + min(self.DRAIN * 8 / self.pacer.rate, 0.01))
        return seconds

    def _learn(self, buffer, count, answers, seconds):
        """Set the rate, and whether to multicast at all, from what was lost."""
        lost = dict((peer, sorted(place for place in set(places) if place < count))
                    for peer, places in answers.items())
        heard = sorted((peer for peer in lost if len(lost[peer]) < count),
                       key=lambda peer: len(lost[peer]))
        silent, everybody = len(lost) - len(heard), len(self.roster.here)
        now = monotonic()
        if self.last_heard is None or silent < everybody:
            self.last_heard = now
        if self.sender.trouble:
            if self.sender.trouble != self.trouble:
                self.trouble = self.sender.trouble
                log.warning('multicast failed at this host: %s', self.trouble)
            self.sender.trouble = None
        if everybody and silent == everybody:
            self.multicasting = False
            if now - self.last_heard > self.PATIENCE:
                self._warn_of_silence()
        elif not self.multicasting:
            self.multicasting = True
            if self.warned:
                self.warned = False
                log.warning('multicast gets through now')
        elif self.control:
            before = self.control.rate
            achieved = count * (buffer.slot + UDP_OVERHEAD) * 8 / seconds
            heard = [peer for peer in heard if peer not in self.ignored]
            why = self.control.round_over(count, lost[heard[-1]] if heard else [],
                                          achieved, seconds)
            self.settled += 1
            if self.control.rate < before:
                self._look_for_brake([(len(lost[peer]), peer) for peer in heard], everybody)
            if self.brake and self.settled == self.SETTLED:
                log.info('%s alone takes no more than %s', self.brake, bits(self.control.rate))
            if self.control.hopeless:
                self.ignored.add(heard[-1])
                log.warning('%s loses %d %% at any rate, so the rate is set without it; %s',
                            heard[-1], 100 * len(lost[heard[-1]]) / count, causes(self.session.payload))
            if why:
                log.debug('round %d: sent at %s, rate now %s (%s)', self.rounds,
                          bits(achieved), bits(self.control.rate), why)

    def _warn_of_silence(self):
        if not self.warned:
            self.warned = True
            log.warning('no client receives multicast, all is sent by TCP; %s', causes(self.session.payload))

    # ---- the slowest

    def _look_for_brake(self, heard, everybody):
        """Whether the rate went down for one client alone."""
        brake = None
        if everybody > 1 and (len(heard) < 2 or heard[-2][0] < heard[-1][0] / 4):
            brake = heard[-1][1]
        if not brake or brake is not self.brake or self.settled < self.SETTLED:
            self.settled = 0
        self.brake = brake

    def _time_alone(self, started):
        """Note for how long a step waited for one client alone."""
        paid = sorted(self.roster.here, key=lambda peer: peer.paid)
        if len(paid) > 1:
            last = paid[-1]
            seconds = last.paid - max(paid[-2].paid, started)
            self.alone[last] = self.alone.get(last, 0) + max(0, seconds)

    def _judge(self, goodput, seconds):
        """Drop the client that alone has held the session below --min-rate."""
        alone, self.alone = self.alone, {}
        culprit = self.brake
        for peer in alone:
            if alone[peer] > seconds / 2:
                culprit = peer
        everybody = self.roster.here
        if goodput >= self.min_rate or culprit not in everybody or len(everybody) < 2:
            self.held_by = None
        elif not self.held_by or self.held_by[0] is not culprit:
            self.held_by = culprit, monotonic() - seconds
        elif monotonic() - self.held_by[1] >= self.ENDURANCE:
            culprit.sentence = ('alone it kept the transfer below %s, now at %s'
                                % (bits(self.min_rate), bits(goodput)))
            self.held_by = self.brake = None
            if self.control:
                self.control = RateControl()

    # ---- repair

    def _repair(self, buffer, digest, answers):
        """Bring to the clients what they asked for."""
        if not answers:
            return
        for _ in range(self.PASSES):
            groups, asked = self._plan(buffer, answers)
            if not groups:
                break
            coded, recipe_count = encode_repair(buffer, groups, self.repair_number,
                                                self.session.repair_salt)
            message = REPAIR.pack(self.repair_number, recipe_count, len(groups))
            self.repair_number = (self.repair_number + coded.count) & MASK
            self.coded += coded.count
            self.by_tcp += sum(len(places) for peer, places in answers.items()
                               if peer not in asked)
            self._do('again', buffer=buffer, coded=asked, message=message)
            self._multicast(coded, coded.count)
            answers = self._do('sent', buffer=buffer, digest=digest)
        self.by_tcp += sum(len(places) for places in answers.values())
        self._do('repair', buffer=buffer)

    def _plan(self, buffer, answers):
        """What to repair by multicast, if that is cheaper than TCP.

        Returns groups of places, and the peers that they are for.
        """
        if self.session.compat or not self.multicasting:
            return [], ()
        asked = dict((peer, places) for peer, places in answers.items()
                     if len(places) <= buffer.count // 2)
        by_tcp = sum(len(places) for places in asked.values())
        worst = max([len(places) for places in asked.values()] or [0])
        if by_tcp <= max(self.WORTH_CODING, worst + 1):
            return [], ()
        groups = combine(list(asked.values()), most_members(buffer.payload))
        size = 2 * len(groups) + 2 * sum(len(members) for members in groups)
        by_multicast = len(groups) + 1 + size // buffer.payload
        return (groups, asked) if by_multicast < by_tcp else ([], ())

    # ---- the end

    def _summary(self, failure, seconds):
        """Say how it went; returns the exit code."""
        roster = self.roster
        served = [peer for peer in roster.everyone if peer.outcome == 'complete']
        complete = len(served) == roster.places and not roster.refused
        failure = None if complete else failure     # it came too late to matter
        everywhere = 'the server was ' + failure if (failure or '').startswith('stopped') else failure
        for peer in roster.everyone:
            if peer.outcome != 'complete':
                log.error('%s does not have the image: %s', peer,
                          peer.outcome or everywhere or 'unknown')
        for (host, address), why in roster.refused:
            log.error('%s was refused: %s', '%s (%s)' % (host, address) if host else address, why)
        if failure:
            log.error('%s', failure)
        if self.data and not self.multicasting and not self.unicast:
            self._warn_of_silence()
        if self.rounds:
            log.info('data: %s in %s, %s in %.1f s, %s', counted(self.data, 'packet'),
                     counted(self.rounds, 'round'), counted(self.source.bytes, 'byte'), seconds,
                     bits(self.source.bytes * 8 / max(1e-6, seconds)))
            log.info('repair: %s by multicast, %s by TCP',
                     counted(self.coded, 'packet'), counted(self.by_tcp, 'packet'))
        absent = roster.places - len(roster.everyone)
        if absent and not failure:
            log.error('%s never came', counted(absent, 'client'))
        log.info('%d of %s %s the image', len(served), counted(roster.places, 'client'),
                 'has' if roster.places == 1 else 'have')
        return OK if complete else PARTLY if served else FAILED


# ---------------------------------------------------------------------------
# 11. Client
# ---------------------------------------------------------------------------

class Connection(object):
    """The client's TCP connection: read what is expected, or fail clearly."""

    def __init__(self, stall_timeout):
        """stall_timeout: seconds without a byte until the server is given up."""
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.stall_timeout = stall_timeout
        self.alive_every = ALIVE_EVERY  # seconds; how often the server wants to hear from us
        self.told_alive = monotonic()
        self.owing = False              # the server waits for us: tell it that we receive
        self.session = False
        self.heard = monotonic()        # when the server last showed life
        self.companion = None           # a SemLink whose end ends us, too

    def connect(self, address, port, seconds):
        """Connect to a server, in at most so many seconds.  Raises OS_ERRORS."""
        self.sock.settimeout(seconds)
        self.sock.connect((address, port))
        if self.sock.getsockname() == self.sock.getpeername():
            # Nobody listens there, but the kernel chose the same port for our
            # end, and has connected us to ourselves.
            raise socket.error(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self.sock.setblocking(False)
        self.heard = monotonic()

    def fileno(self):
        """For poll()."""
        return self.sock.fileno()

    def show_life(self):
        """Tell the server that we got something done, unless it heard so a moment ago."""
        if self.session and monotonic() - self.told_alive >= self.alive_every:
            self.told_alive = monotonic()
            try:
                self.sock.send(ALIVE)
            except OS_ERRORS:
                pass                    # its queue is full, or reading will tell why

    def readable(self, seconds):
        """Whether there is something to read, or will be so soon."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(uninterrupted(poller.poll, seconds * 1000))

    def check_stall(self):
        """Raises Failure when the server has been silent for too long."""
        if self.stall_timeout and monotonic() - self.heard > self.stall_timeout:
            raise Lost('the server has been silent for %g s' % self.stall_timeout)

    def _wait(self, event):
        poller = select.poll()
        poller.register(self.sock, event)
        if self.companion:
            poller.register(self.companion.child_fd, 0)     # reports its end only
        fds = []
        while not fds:
            fds = [fd for fd, _ in uninterrupted(poller.poll, TICK * 1000)]
            if not fds:
                self.check_stall()
        if self.companion and self.companion.child_fd in fds:
            raise LinkClosed()

    def read_into(self, view):
        """Fill a memoryview.  Raises Failure."""
        done = 0
        while done < len(view):
            try:
                got = self.sock.recv_into(view[done:])
            except OS_ERRORS as error:
                if errno_of(error) not in TRY_AGAIN:
                    raise Lost('lost the server: %s' % explain(error))
                self._wait(select.POLLIN)
                continue
            if not got:
                raise Lost('the server closed the connection')
            self.heard = monotonic()
            done += got
            if self.owing:
                self.show_life()

    def read(self, size):
        """Exactly `size` bytes.  Raises Failure."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def frame(self):
        """The dict of a frame whose signal has been read."""
        size = U32.unpack(self.read(4))[0]
        if size > MAX_FRAME:
            raise ProtocolError('a frame of %d bytes' % size)
        return unpack_frame(self.read(size))

    def farewell(self):
        """The fields of a BYE that is ok.  Raises Refused on one that is not."""
        fields = self.frame()
        if fields.get('ok') is not True:
            raise Refused('the server says: %s' % field(fields, 'reason', TEXT))
        return fields

    def signal_or_alive(self, *expected):
        """The next signal if it is one of those expected, None if it is ALIVE.

        Raises Refused, Lost, ProtocolError.
        """
        kind = self.read(1)
        if kind in expected:
            return kind
        if kind == BYE and self.session:
            self.farewell()
        if kind != ALIVE or not self.session:
            raise ProtocolError('signal 0x%02x out of turn' % ord(kind))
        return None

    def signal(self, *expected):
        """The next signal but ALIVE.  Raises Refused, Lost, ProtocolError."""
        kind = None
        while kind is None:
            kind = self.signal_or_alive(*expected)
        return kind

    def send(self, data):
        """Send all of it.  Raises Failure."""
        data = memoryview(data)
        while len(data):
            try:
                data = data[self.sock.send(data):]
            except OS_ERRORS as error:
                if errno_of(error) in TRY_AGAIN:
                    self._wait(select.POLLOUT)
                    continue
                if self.session:
                    self.signal()       # it may have said why before it hung up
                raise Lost('lost the server: %s' % explain(error))


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
            log.debug('in the writer', exc_info=True)
            self.failure = Failure('internal error: %s: %s'
                                   % (type(error).__name__, error))
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


class Client(object):
    """Receives one image."""

    SETTLE = 0.005                      # seconds for stragglers after SENT
    NAP = 0.001                         # seconds, to let datagrams gather
    AMPLE = 4 << 20                     # bytes of socket buffer that allow a nap
    PROMPT = 0.01                       # seconds in which a prompt server goes on
    CHUNK = 64                          # packets read from TCP at once
    AT_WORK = 2                         # buffers that are received or written
    QUIET = 2.0                         # seconds without multicast until we warn
    RETRY = 0.1                         # seconds until we try to reach the server again
    ATTEMPT = 2.0                       # seconds that we try at the least, whatever --wait

    def __init__(self, options, signals):
        """options: of the command line; signals: a StopInOrder."""
        self.options, self.signals = options, signals
        self.server = None              # Connection
        self.receiver = None            # DatagramReceiver
        self.writer = None
        self.sink = Sink(options.output, options.pipe)
        self.flowing = False            # data has come, so the sink has been started
        self.session = False
        self.payload = payload_for(1500)
        self.salt = self.repair_salt = 0
        self.checks = [plain_crc, c_sum]
        self.digest = False
        self.unicast = False            # the server said not to expect multicast
        self.free = []                  # buffers
        self.lent = collections.deque() # buffers that the writer has, or will have
        self.finished = None            # the last of them, while it does not have it
        self.begun = None               # when the first round began
        self.by_multicast = 0           # packets, as in by_tcp and coded
        self.by_tcp = self.coded = 0
        self.overflows = None           # datagrams lost in this host
        self.heard_all = False          # the server's last word: it can go, the image is ours

    def run(self):
        """Receive the image; returns an exit code.  Raises Failure."""
        try:
            try:
                self.sink.open()
                self._connect()
                self._transfer()
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
            self.sink.end()
            self._say_bye(error)
            if not self.begun and error.code == FAILED:
                error.code = NOT_STARTED
            raise
        self.signals.over()
        self._say(DONE)
        self._summary()
        return OK

    def close(self):
        """Leave nothing behind; can be called at any time."""
        self.sink.close()
        if self.writer:
            self.writer.close()
        if self.server:
            self.server.sock.close()
        if self.receiver:
            self.receiver.close()

    def state(self):
        """How it stands, in a line."""
        if not self.receiver:
            return 'looking for a server at %s port %d' % (self.options.server_ip, self.options.port)
        if not self.begun:
            return 'waiting for the transfer to start'
        return '%s written, of which the last round came %.1f s ago' % (
            counted(self.sink.written, 'byte'), monotonic() - self.server.heard)

    def _say_bye(self, failure):
        if self.session and not isinstance(failure, (Lost, Refused)):
            self.server.companion = None
            self.server.stall_timeout = FAREWELL_TIME
            self.server.heard = monotonic()
            try:
                self.server.send(pack_frame(BYE, {'ok': False, 'reason': failure.reason}))
                self.server.sock.shutdown(socket.SHUT_WR)
            except (Failure, ProtocolError) + OS_ERRORS:
                pass                    # then it learns it from the connection's end

    # ---- the greetings

    def _connect(self):
        """Reach the server and agree on a session.  Raises Failure."""
        options = self.options
        deadline = monotonic() + options.wait
        log.debug('connecting to %s port %d', options.server_ip, options.port)
        while True:
            attempt = min(GREETING_TIME, max(self.ATTEMPT, round(deadline - monotonic(), 1)))
            self.server = Connection(min(attempt, options.stall_timeout or attempt))
            self.session = False
            try:
                self.server.connect(options.server_ip, options.port, attempt)
                group, port = self._greet()
                break
            except OS_ERRORS as error:
                reason = explain(error)
                if errno_of(error) == errno.ENETUNREACH:
                    reason += '; this host has %s' % described(interfaces())
            except Lost as error:
                reason = error.reason
            self.server.sock.close()
            if monotonic() > deadline:
                raise Failure('no kmcast server at %s port %d: %s' % (
                    options.server_ip, options.port, reason), NOT_STARTED)
            time.sleep(self.RETRY)
        self.server.stall_timeout = options.stall_timeout
        if options.stall_timeout is None:
            # A server of the base protocol has no way to say that it is alive.
            self.server.stall_timeout = STALL if self.session else 0
        keep_alive(self.server.sock, self.server.stall_timeout)
        local_ip = options.local_ip or self.server.sock.getsockname()[0]
        try:
            self.receiver = DatagramReceiver(local_ip, group, port, self.payload,
                                             options.datagrams)
        except OS_ERRORS as error:
            raise Failure('cannot join %s on %s: %s' % (group, local_ip, explain(error)))
        log.info('connected to %s, multicast of group %s to %s', options.server_ip, group, local_ip)
        log.debug('receiving by %s, socket buffer of %d bytes', self.receiver.way,
                  self.receiver.socket_buffer)
        self.writer = Writer(self.sink, self.digest)
        start_thread(self.writer)
        self.server.companion = self.writer.link

    def _greet(self):
        """Returns group and port."""
        server = self.server
        group, port, version = unpack_group_info(server.read(GROUP_INFO.size))
        if version is None:
            return group, port
        if version != SESSION_VERSION:
            raise ProtocolError('it speaks version %d' % version)
        server.send(pack_frame(HELLO, {'version': __version__,
                                       'host': printable(socket.gethostname()),
                                       'stall': STALL if self.options.stall_timeout is None
                                       else self.options.stall_timeout}))
        server.session = self.session = True
        server.signal(WELCOME)
        fields = server.frame()
        field(fields, 'version', TEXT)
        self.salt = field(fields, 'salt', NUMBER)
        self.repair_salt = field(fields, 'repair_salt', NUMBER)
        self.payload = field(fields, 'payload', NUMBER)
        name = field(fields, 'name', TEXT, optional=True)
        size = field(fields, 'size', NUMBER, optional=True)
        digest = field(fields, 'digest', TEXT, optional=True)
        if not 16 <= self.payload <= payload_for(9000) or self.payload % 4:
            raise ProtocolError('a payload of %d bytes' % self.payload)
        if digest not in (None, 'sha256'):
            raise ProtocolError('an unknown digest, %s' % digest)
        if max(self.salt, self.repair_salt) > MASK:
            raise ProtocolError('a salt that is no 32-bit number')
        self.digest = digest is not None
        self.unicast = fields.get('unicast') is True
        self.checks = [zlib.crc32]
        server.alive_every = alive_every(stall_of(fields))
        if size is not None:
            self.sink.expect(size)
        log.debug('image %s, %s bytes', name or 'without a name',
                  'unknown' if size is None else size)
        return group, port

    # ---- the rounds

    def _transfer(self):
        base = 0
        while True:
            # All clients wait for the last READY, and hashing would delay ours;
            # but a producer that takes its time does not delay the consumer.
            if self.finished and not self.server.readable(self.PROMPT):
                self._hand_over()
            if self.session:
                self.server.signal(BUFFER_INFO)
            _, size, first, count = ROUND.unpack(self.server.read(ROUND.size))
            if not self.begun:
                self.begun = monotonic()
                base = first
            if first != base:
                raise ProtocolError('a round that begins at %d, not %d' % (first, base))
            base = (base + count) & MASK
            if not count:
                break
            if not self.flowing:
                self.flowing = True
                self.sink.start()
            buffer = self._buffer(first, count, size)
            self.server.send(READY)
            self._hand_over()
            digest = self._round(buffer)
            self.lent.append(buffer)
            self.finished = buffer, size, digest
            self.server.send(DONE)
        self.server.send(READY)
        self._hand_over()
        self._finish()

    def _hand_over(self):
        """Give the writer what it is to write, if there is anything."""
        if self.finished:
            self.writer.give(*self.finished)
            self.finished = None

    def _buffer(self, first, count, size):
        """A free buffer, begun for a round."""
        payload = self.payload
        if self.session:
            good = count <= MAX_PACKETS and (count - 1) * payload < size <= count * payload
        else:
            if size > count * payload:  # nothing else tells of jumbo frames there
                payload = payload_for(9000)
            good = count <= MAX_PACKETS and count <= size <= count * payload
        if not good:
            raise ProtocolError('a buffer of %d packets and %d bytes' % (count, size))
        while len(self.lent) >= self.AT_WORK:
            self._await_writer()
        buffer = self.free.pop() if self.free else None
        if buffer is None or buffer.capacity < count or buffer.payload != payload:
            buffer = Buffer(payload, count, self.salt, self.checks)
        buffer.start(first, count, size if self.session else None)
        return buffer

    def _round(self, buffer):
        """Receive one buffer completely; returns the digest that it must have."""
        digest = self._listen(buffer)
        self.by_multicast += buffer.received
        self._look_for_silence()
        while not buffer.complete:
            missing = buffer.missing()
            count = len(missing)
            seqs = [(buffer.base + place) & MASK for place in missing]
            self.server.send(REQUEST + struct.pack('<%dI' % (1 + count), count, *seqs))
            kind = PACKETS
            if self.session:
                kind = self.server.signal(PACKETS, AGAIN)
            if kind == AGAIN:
                number, recipe_count, combinations = REPAIR.unpack(
                    self.server.read(REPAIR.size))
                if not 0 < recipe_count + combinations <= MAX_PACKETS:
                    raise ProtocolError('a repair pass of %d packets'
                                        % (recipe_count + combinations))
                coded = Buffer(self.payload, recipe_count + combinations,
                               self.repair_salt)
                coded.start(number, coded.capacity, None)
                digest = self._listen(coded)
                self.coded += solve(buffer, coded, recipe_count)
            else:
                self.server.owing = True
                self._read_packets(buffer, missing)
                self.server.owing = False
                if not buffer.complete:
                    raise ProtocolError('packets that were not asked for, or damaged')
                self.by_tcp += count
        return digest

    def _read_packets(self, buffer, places):
        """Read by TCP what was asked for."""
        if not self.session:            # where any packet may be short
            for _ in places:
                header = self.server.read(PACKET.size)
                size = PACKET.unpack(header)[2]
                if not 0 < size <= buffer.payload:
                    raise ProtocolError('a packet of %d bytes' % size)
                buffer.put(bytearray(header + self.server.read(size)), 0, 1, size)
            return
        staging = bytearray(self.CHUNK * buffer.slot)
        short = buffer.packet_size(places[-1]) != self.payload
        full = len(places) - short
        for start in range(0, full, self.CHUNK):
            count = min(self.CHUNK, full - start)
            self.server.read_into(memoryview(staging)[:count * buffer.slot])
            buffer.put(staging, 0, count, self.payload)
        if short:
            size = buffer.packet_size(places[-1])
            self.server.read_into(memoryview(staging)[:PACKET.size + size])
            buffer.put(staging, 0, 1, size)

    def _listen(self, buffer):
        """Receive multicast until SENT; returns the digest that came with it."""
        tcp, udp = self.server.fileno(), self.receiver.fileno()
        link = self.writer.link.child_fd
        control, everything = select.poll(), select.poll()
        for fd in (tcp, link):
            control.register(fd, select.POLLIN)
            everything.register(fd, select.POLLIN)
        everything.register(udp, select.POLLIN)
        ample = self.receiver.socket_buffer >= self.AMPLE
        digest = settled = None         # settled: when to wait no more, after SENT
        calls, before = 0, buffer.received
        while True:
            batches = self.receiver.receive()
            if batches is not None:
                for batch in batches:
                    buffer.put(*batch)
                calls += 1
                if calls % 64:          # a flood must not keep us from TCP
                    continue
            now = monotonic()
            if buffer.received > before:
                before = buffer.received
                self.server.heard = now
                settled = now + self.SETTLE
            if digest is not None and (now > settled or not self._may_come(buffer)):
                return digest
            self.server.check_stall()
            events = uninterrupted(everything.poll, 1000 * (
                TICK if digest is None else self.SETTLE))
            fds = [fd for fd, _ in events]
            if fds == [udp] and ample and digest is None:
                fds = [fd for fd, _ in uninterrupted(control.poll, self.NAP * 1000)]
            if link in fds:
                self._writer_released()
            if tcp in fds and self.server.signal_or_alive(SENT):
                digest = self.server.read(DIGEST_SIZE if self.digest else 0)
                settled = monotonic() + self.SETTLE
                everything.unregister(tcp)

    @staticmethod
    def _may_come(buffer):
        """Whether stragglers may be on their way: the end of what was sent is
        missing, though not all of it."""
        ends = buffer.has(0) and buffer.has(buffer.count - 1)
        return buffer.received and not buffer.complete and not ends

    def _look_for_silence(self):
        if (not self.by_multicast and not self.unicast and self.begun
                and monotonic() - self.begun > self.QUIET):
            self.unicast = True         # said once
            log.warning('multicast does not reach this host, everything comes by TCP; %s',
                        causes(self.payload))

    # ---- the writer, and the end

    def _writer_released(self):
        self.writer.link.wait_child()
        if self.lent:
            self.free.append(self.lent.popleft())

    def _await_writer(self):
        """Wait until the writer is through with a buffer.

        Meanwhile tell the server that we are alive, if the output moves.
        Raises Failure, LinkClosed.
        """
        limit = self.server.stall_timeout
        written, moved = self.sink.written, monotonic()
        poller = select.poll()
        if not self.heard_all:
            poller.register(self.server, select.POLLIN)
        poller.register(self.writer.link.child_fd, select.POLLIN)
        while True:
            timeout = min(TICK, self.server.alive_every / 2)
            fds = [fd for fd, _ in uninterrupted(poller.poll, timeout * 1000)]
            if self.writer.link.child_fd in fds:
                self._writer_released()
                self.server.heard = monotonic()
                return
            if fds:
                self.server.signal_or_alive()
            self.sink.look()
            if self.sink.written != written:
                written, moved = self.sink.written, monotonic()
                self.server.show_life()
            elif limit and monotonic() - moved > limit:
                raise Failure('the output has taken nothing for %g s' % limit)

    def _await_end(self):
        """Wait until the image is final, however long it takes.  Raises Failure."""
        while self.writer.is_alive():
            self.server.show_life()
            self.sink.look()
            self.writer.join(min(TICK, self.server.alive_every / 2))
        self.server.companion = None
        if self.writer.failure:
            raise self.writer.failure

    def _say(self, signal):
        """Send a signal after the last word of the server, if that is still there."""
        try:
            self.server.send(signal)
        except (Refused, Lost, ProtocolError) as error:
            log.warning('the image is complete, but the server could not be told: %s',
                        getattr(error, 'reason', error))

    def _finish(self):
        """The end of the image: verify, commit, and say so."""
        self.server.signal(SENT)
        fields = None
        if self.session:
            self.server.read(DIGEST_SIZE if self.digest else 0)
            self.server.signal(BYE)
            fields = self.server.farewell()
        self.heard_all = True
        while self.lent:
            self._await_writer()
        if fields is not None:
            expected = field(fields, 'bytes', NUMBER)
            if expected != self.writer.bytes:
                raise Failure('the image has %d bytes, not %d' % (self.writer.bytes, expected))
            digest = field(fields, 'sha256', TEXT, optional=True)
            if self.digest and digest != self.writer.hash.hexdigest():
                raise Failure('the digest of the image differs')
        elif not self.writer.bytes and not self.options.allow_empty:
            raise Failure('the image is empty; if that is meant, give --allow-empty')
        if not self.flowing:
            self.sink.start()
        self.overflows = self.receiver.overflows()
        self.writer.commit()
        self._await_end()

    def _summary(self):
        seconds = monotonic() - self.begun
        size = self.writer.bytes
        if size and not self.by_multicast and not self.unicast:
            log.warning('multicast does not reach this host, everything came by TCP; %s',
                        causes(self.payload))
        if self.overflows:
            log.info('%s found no room in this host\'s socket buffer of %d bytes; '
                     'a larger net.core.rmem_max helps (sysctl), or root',
                     counted(self.overflows, 'datagram'), self.receiver.socket_buffer)
        log.info('%s in %.1f s, %s; repaired %s by multicast, %d by TCP; %s',
                 counted(size, 'byte'), seconds, bits(size * 8 / max(1e-6, seconds)),
                 counted(self.coded, 'packet'),
                 self.by_tcp, 'SHA-256 %s' % self.writer.hash.hexdigest()
                 if self.digest else 'without a digest')


# ---------------------------------------------------------------------------
# 12. Command line
# ---------------------------------------------------------------------------

GROUP, DEFAULT_PORT = '239.255.83.83', 18383        # the group: RFC 2365

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


MOST_CLIENTS = 10000                    # of one server


def whole(least, most):
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
    common.add_argument('-v', '--verbose', action='store_true', help='say more')
    common.add_argument('-q', '--quiet', action='store_true', help='say only what went wrong')
    port = {'nargs': '?', 'type': whole(1, 65535), 'metavar': 'PORT',
            'help': 'TCP port of the server, and its UDP port (%d)' % DEFAULT_PORT}

    server = commands.add_parser('server', parents=[common], help='send an image',
                                 description='Send standard input, or a file, to CLIENTS clients.')
    server.add_argument('local_ip', metavar='LOCAL_IP', help='the interface to multicast from: '
                        'an address of this host, an interface\'s name, or auto')
    server.add_argument('clients', metavar='CLIENTS', type=whole(1, 100000),
                        help='how many clients to wait for')
    server.add_argument('port', **port)
    server.add_argument('-i', '--input', type=file_type, metavar='FILE', default='-',
                        help='the image; -: standard input (-)')
    server.add_argument('--pipe', metavar='COMMAND', help='the image is what COMMAND writes, and '
                        'is complete only if COMMAND exits with 0')
    server.add_argument('--name', help='what to call the image (the name of FILE)')
    server.add_argument('--group', type=group_type, default=GROUP,
                        help='multicast group (%s)' % GROUP)
    server.add_argument('--ttl', type=whole(0, 255), default=8,
                        help='routers that multicast may pass (8)')
    server.add_argument('--mtu', type=whole(256, 9000), metavar='BYTES',
                        help='largest IP packet (1500, or the interface\'s if that is less)')
    server.add_argument('--rate', type=rate_type, default='auto',
                        help='bit/s as in 940M, auto: as fast as the slowest link, max (auto)')
    server.add_argument('--unicast', action='store_true',
                        help='no multicast, TCP only: for a few hosts')
    server.add_argument('--start-wait', type=seconds_type, metavar='SECONDS',
                        help='start after so long, even if not all clients came')
    server.add_argument('--min-clients', type=whole(1, 100000), default=1, metavar='M',
                        help='how many must be there for --start-wait to start (1)')
    server.add_argument('--min-rate', type=least_rate_type, default=0, metavar='RATE',
                        help='drop a client that alone keeps the transfer slower for 10 s')
    server.add_argument('--buffer-packets', type=whole(1, MAX_PACKETS), metavar='N',
                        help='packets in a round at the most; memory is that of two rounds '
                        '(as many as make 8 MB)')
    server.add_argument('--clients-per-thread', type=whole(1, 1000), default=64, metavar='N',
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
    demo.add_argument('--clients', type=whole(1, 100), default=3, metavar='N',
                      help='how many clients (3)')
    demo.add_argument('file', nargs='?', metavar='FILE', help='what to send')
    demo.add_argument('-v', '--verbose', action='store_true', help='say more')
    demo.add_argument('-q', '--quiet', action='store_true', help='say only what went wrong')
    return parser


class Lines(logging.Handler):
    """Writes `kmcast client: warning: …` to standard error, without ever being held up by it.

    A terminal that was stopped, or a pipe that nobody reads, costs lines and not the transfer;
    the next line that gets through says how many.
    """

    PATIENCE = 1.0                      # seconds for a line, as long as the last one got through

    def __init__(self, command):
        logging.Handler.__init__(self)
        self._prefix = 'kmcast %s: ' % command
        self._missed = 0

    def emit(self, record):
        """Write a record: logging.Handler.emit."""
        level = record.levelname.lower() + ': ' if record.levelno >= logging.WARNING else ''
        missed = ' (%s could not be written)' % counted(self._missed, 'line') if self._missed else ''
        text = self._prefix + level + self.format(record) + missed + '\n'
        data = text.encode('ascii', 'backslashreplace') if isinstance(text, type(u'')) else text
        try:
            poller = select.poll()
            poller.register(2, select.POLLOUT)
            # A pipe that has room at all has room for a page (pipe(7)), so this does not wait.
            if not uninterrupted(poller.poll, 0 if self._missed else 1000 * self.PATIENCE):
                self._missed += 1
                return
            os.write(2, data[:4096])
            self._missed = 0
        except OS_ERRORS:
            pass                        # it may be closed


def start_logging(command, verbose, quiet):
    """Log to standard error."""
    log.addHandler(Lines(command))
    log.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)
    logging.raiseExceptions = False


def open_standard_files():
    """Let no socket become one of 0, 1, 2, where one of them is closed."""
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OS_ERRORS:               # the wrong way round, so that its use fails
            os.open(os.devnull, mode)


class StopInOrder(object):
    """A handler of the signals that stop a program: in order on the first, at
    once on one that comes a second later.

    In between, another means the same: timeout(1) sends two at once, and a
    terminal that is closed as well.  A signal that our parent had us ignore
    stays ignored, for nohup(1).  SIGUSR1 and SIGUSR2 ask for a line of state.
    """

    SIGNALS = {signal.SIGINT: 'SIGINT', signal.SIGTERM: 'SIGTERM', signal.SIGHUP: 'SIGHUP'}

    def __init__(self):
        self.state = None               # a function that returns how it stands, in a line
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
            raise Interrupted(self.SIGNALS[number])
        if monotonic() - self._first > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say_state(self, _number, _frame):
        if self.state:
            log.info('%s', self.state())

    def over(self):
        """The verdict stands: no signal changes the exit code any more.

        Not even at the interpreter's end, which sets handlers, but not SIG_IGN, to the default.
        """
        for number in tuple(self.SIGNALS) + (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


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


def end_with(parent):
    """In a process just forked: let it end when its parent does, however (prctl(2))."""
    LIBC.prctl(1, signal.SIGTERM)       # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(FAILED)


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
            log.error('the server ended early: %s', explain(error))
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

    def state(self):
        """How it stands, in a line."""
        return '%s running' % counted(len([process for process in self._processes
                                           if process.returncode is None]), 'process')

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
                options.port = whole(1, 65535)(rest.pop())
            except argparse.ArgumentTypeError as error:
                parser.error('argument PORT: %s' % error)
        else:
            options.port = DEFAULT_PORT
    if rest:
        parser.error('unrecognized arguments: %s' % printable(' '.join(rest)))
    if not options.command:             # Python 3 lets it be missing
        parser.error('which COMMAND? one of server, client, demo')
    open_standard_files()
    start_logging(options.command, options.verbose, options.quiet)
    return run_job(options, StopInOrder())


def run_job(options, signals):
    """Do what the command line asks for; returns the exit code.

    A signal can come between any two instructions.  Once there is a verdict it changes
    nothing, and what was begun is closed in any case.
    """
    job = code = reason = None
    try:
        try:
            job = COMMANDS[options.command](options, signals)
            signals.state = job.state
            code = job.run()
        except Failure as error:
            code, reason = error.code, error.reason
        except Exception as error:      # pylint: disable=broad-except
            log.debug('please report this', exc_info=True)
            code, reason = FAILED, 'internal error: %s: %s' % (type(error).__name__, error)
        signals.over()
    except Interrupted as error:        # at most one is ever raised
        if code is None:
            code, reason = FAILED, 'stopped by %s' % error
        signals.over()
    if reason:
        log.error('%s', reason)
    if job:
        job.close()
    return code


if __name__ == '__main__':
    sys.exit(main())
