"""A crowd: one process that plays a thousand kmcast clients over real TCP connections. For the benchmark.

    python3 tests/crowd.py [--loss PERCENT] [--window N] [--wait SECONDS] SERVER_IP CLIENTS [PORT]

It says what clients say in session version 2, and says it at once: READY to every BUFFER INFO; to SENT a DONE, or
with --loss a REQUEST for a random so many percent of the round, another set for each client and round. After PACKETS,
or after AGAIN and the next SENT of that round, it says DONE. It never joins the group, so it hears no multicast:
nothing is verified. What it measures is what a thousand clients cost a server; so it must cost little itself, and it
says what: see `Crowd.report`. For that
- a message is parsed once, however many clients get it: the first to receive those bytes parses them for all;
- answers that are the same for all are made once for a round; requests are slices of one long random bitmap;
- packets sent again are not even copied from the kernel (MSG_TRUNC, man 7 tcp).

The last line on standard error is a JSON object, and the exit code 0, if all clients were told that it was all.
"""

import argparse
import collections
import errno
import json
import math
import random
import resource
import select
import socket
import struct
import sys
import time

# ---------------------------------------------------------------------------
# The wire, as PROTOCOL.md has it ("Sessions, version 2")
# ---------------------------------------------------------------------------

VERSION = 2
GROUP_INFO = struct.Struct('!8x6sBB')               # within the sockaddr's padding: magic, version, flags
MAGIC = b'KMCAST'

ALIVE, BUFFER_INFO, PACKETS, SENT, WELCOME, UPSTREAM, STATE, AGAIN, BYE = (
    0x00, 0x01, 0x02, 0x08, 0x20, 0x11, 0x13, 0x40, 0x80)                   # from the server
READY, REQUEST, DONE, HELLO = 0x01, 0x02, 0x04, 0x10                        # to the server

FRAMES = (WELCOME, UPSTREAM, STATE, BYE)            # u32 length and JSON
LENGTH = struct.Struct('<I')
ROUND = struct.Struct('<4IQ')                       # BUFFER_INFO: id, size, base, packets, place in the image
BODIES = {ALIVE: 0, BUFFER_INFO: ROUND.size, AGAIN: 16, SENT: 4, PACKETS: 4}
DIGEST = 32                                         # bytes more of SENT, unless WELCOME's digest is null
PACKET_HEADER = 12                                  # of each of the PACKETS, if WELCOME's digest is null
BUFFER_ID = struct.Struct('<I')                     # what the body of SENT, AGAIN and PACKETS begins with

READY_MESSAGE = struct.Struct('<BI')
# DONE, and what a REQUEST has before its bitmap: signal, id; then packets heard and microseconds of the round's head,
# and the same of its second half.
ANSWER = struct.Struct('<B6I')
# The crowd hears nothing, so it tells nothing, as a client does to which one receive call brought all of it: then the
# server knows no more than what was lost. Times from our own clock, from READY to SENT, are no substitute: the server
# takes each moment in which it did something else for a slow line, goes slower, and so on down to its lowest rate.
FIGURES = (0, 0, 0, 0)
LAST_WORD = ANSWER.pack(DONE, 0xFFFFFFFF, 0, *FIGURES)

PORT = 18383
ALIVE_INTERVAL = 5.0        # seconds, or a third of the server's stall timeout


def hello(number, window):
    frame = json.dumps({'version': 'crowd', 'host': 'crowd%04d' % number, 'window': window, 'seek': False,
                        'relay': False, 'stall': 30}).encode()
    return bytes([HELLO]) + LENGTH.pack(len(frame)) + frame


# ---------------------------------------------------------------------------
# The crowd
# ---------------------------------------------------------------------------

POOL = 1 << 20              # bytes of random bits; those of two clients in a round differ unless they start alike
GREETING_AT_ONCE = 64       # connections that wait for their group info: fewer than fit a server's backlog
CHUNK = 1 << 16             # bytes to receive
SCRATCH = bytearray(1 << 20)


class Failed(Exception):
    """A client failed; the message says how."""


class Round:
    """A round under way, for all clients.

    ready, answer   what all answer: READY, DONE
    finished        how many have said DONE
    """

    def __init__(self, number, size, packets):
        self.number = number
        self.size = size
        self.packets = packets
        self.ready = READY_MESSAGE.pack(READY, number)
        self.answer = ANSWER.pack(DONE, number, packets, *FIGURES)
        self.finished = 0


class Client:
    """One connection. `act` is what takes its next bytes."""

    __slots__ = ('number', 'socket', 'greeted', 'held', 'unsent', 'skip', 'skipping', 'asked', 'again', 'served')

    def __init__(self, number, connection):
        self.number = number
        self.socket = connection
        self.greeted = False        # the group info has come
        self.held = b''             # the start of a message whose rest is yet to come
        self.unsent = b''           # what the connection did not take
        self.skip = 0               # bytes of PACKETS yet to come,
        self.skipping = None        # and their Round
        self.asked = {}             # Round's number: the bitmap that was asked for
        self.again = set()          # numbers of rounds whose repair comes by multicast
        self.served = False         # the last word is said


class Crowd:
    """All clients, and what they have in common."""

    def __init__(self, address, count, loss, window, wait):
        self._address = address
        self._count = count
        self._loss = loss / 100
        self._window = window
        self._give_up = time.monotonic() + wait
        self._pool = random_bits(self._loss, POOL)
        self._poller = select.epoll()
        self._clients = {}          # by descriptor
        self._connected = self._greeted = 0
        self._rounds = collections.OrderedDict()
        self._parsed = {}           # bytes received: the messages in them
        self._payload = self._digest = None
        self._interval = ALIVE_INTERVAL
        self._served = 0
        self._goodbye = None        # the frame that says that it was all
        self._figures = {'rounds': 0, 'requests': 0, 'again': 0, 'packets_bytes': 0, 'messages': 0, 'states': 0}
        self._began = self._cpu_began = None

    def run(self):
        """Play to the end. Raises Failed."""
        next_alive = time.monotonic() + self._interval
        while self._served < self._count:
            self._connect_some()
            for descriptor, events in self._poller.poll(max(0, next_alive - time.monotonic())):
                client = self._clients[descriptor]
                try:
                    if events & select.EPOLLOUT:
                        self._send(client, b'')
                    if events & ~select.EPOLLOUT:
                        self._receive(client)
                except (OSError, ValueError, KeyError, struct.error) as error:
                    raise Failed('client %d: %s: %s' % (client.number, type(error).__name__, error))
            if time.monotonic() >= next_alive:
                for client in self._clients.values():
                    if client.greeted and not client.unsent:
                        self._send(client, bytes([ALIVE]))
                next_alive = time.monotonic() + self._interval

    def report(self):
        """Return what is worth knowing, as a dict.

        rounds         how many there were
        requests, again, packets_bytes   what was asked for, how often it was to come by multicast, what came by TCP
        messages       receive calls
        cpu, seconds   CPU seconds of this process and time passed, both since the first connection
        us_client_round  that CPU time for a client and a round, in microseconds
        bytes, sha256  what the server said of the image
        """
        cpu = time.process_time() - self._cpu_began
        rounds = max(1, self._figures['rounds'])
        return dict(self._figures, clients=self._count, cpu=round(cpu, 3),
                    seconds=round(time.monotonic() - self._began, 3),
                    us_client_round=round(1e6 * cpu / rounds / self._count, 1),
                    bytes=self._goodbye.get('bytes'), sha256=self._goodbye.get('sha256'))

    # --- connections ---

    def _connect_some(self):
        """Connect as many clients as may wait for their greeting; wait for the server before the first."""
        while self._connected < self._count and self._connected - self._greeted < GREETING_AT_ONCE:
            connection = socket.socket()
            failure = connection.connect_ex(self._address)
            if failure == errno.ECONNREFUSED and not self._connected and time.monotonic() < self._give_up:
                connection.close()
                time.sleep(0.02)
                continue
            if failure:
                raise Failed('cannot connect client %d: %s' % (self._connected + 1, errno.errorcode[failure]))
            if not self._connected:
                self._began, self._cpu_began = time.monotonic(), time.process_time()
            self._connected += 1
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients[connection.fileno()] = Client(self._connected, connection)
            self._poller.register(connection, select.EPOLLIN)

    def _send(self, client, message):
        before = client.unsent
        message = before + message
        try:
            sent = client.socket.send(message)
        except BlockingIOError:
            sent = 0
        client.unsent = message[sent:]
        if bool(before) != bool(client.unsent):
            self._poller.modify(client.socket, select.EPOLLIN | (select.EPOLLOUT if client.unsent else 0))

    def _receive(self, client):
        if client.skip:
            count = client.socket.recv_into(SCRATCH, min(client.skip, len(SCRATCH)), socket.MSG_TRUNC)
            if not count:
                raise Failed('client %d: the connection ended within packets' % client.number)
            client.skip -= count
            if not client.skip:
                self._send(client, self._done(client.skipping))
            return
        data = client.socket.recv(CHUNK)
        if not data:
            raise Failed('client %d: the connection ended without a word' % client.number)
        self._figures['messages'] += 1
        if client.held:
            data, client.held = client.held + data, b''
        if not client.greeted:
            data = self._greet(client, data)
        # Mostly these very bytes have come to another client before.
        messages = self._parsed.get(data)
        while messages is None:
            messages, end = self._parse(data)
            if end == len(data):
                if all(kind != PACKETS for kind, _ in messages):
                    self._remember(data, messages)
            elif messages and messages[-1][0] == PACKETS:
                # Only the client knows how long they are; what follows them is looked at when they are over.
                self._act(client, messages)
                data = data[end:]
                count = min(client.skip, len(data))
                client.skip -= count
                data = data[count:]
                if client.skip:
                    return
                self._send(client, self._done(client.skipping))
                messages = self._parsed.get(data)
                continue
            else:
                client.held = data[end:]
        self._act(client, messages)

    def _remember(self, data, messages):
        if len(self._parsed) > 1000:
            self._parsed.clear()
        self._parsed[data] = messages

    # --- messages ---

    def _greet(self, client, data):
        """Take the group info and say HELLO; return what follows it."""
        if len(data) < GROUP_INFO.size:
            client.held = data
            return b''
        magic, version, _ = GROUP_INFO.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise Failed('the server speaks %s, and the crowd session version %d' % (
                'session version %d' % version if magic == MAGIC else 'the base protocol', VERSION))
        client.greeted = True
        self._greeted += 1
        self._send(client, hello(client.number, self._window))
        return data[GROUP_INFO.size:]

    def _parse(self, data):
        """Return the messages in these bytes as (signal, body or JSON object), and where the rest begins.

        PACKETS are the last one that is returned, if there are any, with their buffer_id alone.
        """
        messages, start = [], 0
        while start < len(data):
            kind = data[start]
            begin = start + 1
            if kind in FRAMES:
                if begin + LENGTH.size > len(data):
                    break
                end = begin + LENGTH.size + LENGTH.unpack_from(data, begin)[0]
                if end > len(data):
                    break
                body = json.loads(data[begin + LENGTH.size:end].decode())
            elif kind in BODIES:
                end = begin + BODIES[kind] + (DIGEST if kind == SENT and self._digest else 0)
                if end > len(data):
                    break
                body = data[begin:end]
            else:
                raise ValueError('signal 0x%02x from the server' % kind)
            messages.append((kind, body))
            start = end
            if kind == WELCOME:
                self._welcome(body)         # how long SENT is depends on it
            if kind == PACKETS:
                break
        return messages, start

    def _welcome(self, frame):
        self._payload = frame['payload']
        self._digest = frame['digest'] is not None
        if frame.get('stall'):
            self._interval = min(ALIVE_INTERVAL, frame['stall'] / 3)

    def _act(self, client, messages):
        """Answer these messages, in one send."""
        answers = []
        for kind, body in messages:
            if kind == BUFFER_INFO:
                answers.append(self._ready(body))
            elif kind == SENT:
                answers.append(self._answer(client, self._round(body)))
            elif kind == AGAIN:
                number, = BUFFER_ID.unpack_from(body)
                del client.asked[number]
                client.again.add(number)
                self._figures['again'] += 1
            elif kind == PACKETS:
                self._expect(client, self._round(body))
            elif kind == BYE:
                if not body['ok']:
                    raise Failed('client %d was told: %s' % (client.number, body.get('reason')))
                self._goodbye = body
                answers.append(LAST_WORD)
                client.served = True
            elif kind == STATE:
                self._figures['states'] += 1
        if answers:
            self._send(client, b''.join(answers))
        if client.served:
            # These are a few hundred bytes on loopback, and the server has nothing more to say.
            if client.unsent:
                raise Failed('client %d cannot say its last word' % client.number)
            self._served += 1
            del self._clients[client.socket.fileno()]
            client.socket.close()

    def _round(self, body):
        return self._rounds[BUFFER_ID.unpack_from(body)[0]]

    def _ready(self, body):
        """A round is announced to one client: return its READY."""
        number, size, _, packets, _ = ROUND.unpack(body)
        this = self._rounds.get(number)
        if this is None:
            this = self._rounds[number] = Round(number, size, packets)
            self._figures['rounds'] += 1
        return this.ready

    def _answer(self, client, this):
        """A client is told that a round is sent: return what it answers."""
        if this.number in client.again:
            client.again.remove(this.number)
            return self._done(this)
        bitmap = self._missing(this.packets)
        if bitmap is None:
            return self._done(this)
        client.asked[this.number] = bitmap
        self._figures['requests'] += 1
        heard = this.packets - bin(int.from_bytes(bitmap, 'little')).count('1')
        return ANSWER.pack(REQUEST, this.number, heard, *FIGURES) + bitmap

    def _missing(self, packets):
        """Return what a client has lost of so many packets, as a bitmap of bytes; None: nothing."""
        if not self._loss or not packets:
            return None
        size = (packets + 7) // 8
        start = random.randrange(POOL - size)
        bitmap = self._pool[start:start + size]
        if packets % 8:
            bitmap = bitmap[:-1] + bytes([bitmap[-1] & (1 << packets % 8) - 1])
        return bitmap if any(bitmap) else None

    def _expect(self, client, this):
        """What a client asked for comes by TCP: note how many bytes to skip."""
        bits = int.from_bytes(client.asked.pop(this.number), 'little')
        count = bin(bits).count('1')
        client.skip = count * (self._payload + (0 if self._digest else PACKET_HEADER))
        if bits >> this.packets - 1:
            client.skip -= this.packets * self._payload - this.size     # the image's last packet may be short
        client.skipping = this
        self._figures['packets_bytes'] += client.skip

    def _done(self, this):
        """Return DONE for one client; forget the round after the last one."""
        this.finished += 1
        if this.finished == self._count:
            del self._rounds[this.number]
        return this.answer


def random_bits(share, size):
    """Return so many bytes of which this share of the bits is set."""
    if share >= 1:
        return b'\xff' * size
    bits = bytearray(size)
    if share > 0:
        position, scale = -1, math.log(1 - share)
        while True:
            # The distance from one set bit to the next is distributed geometrically.
            position += 1 + int(math.log(1 - random.random()) / scale)
            if position >= 8 * size:
                break
            bits[position >> 3] |= 1 << (position & 7)
    return bytes(bits)


def main():
    parser = argparse.ArgumentParser(description='Play many kmcast clients, to measure a server.')
    parser.add_argument('--loss', type=float, default=0, metavar='PERCENT', help='of each round, at random (0)')
    parser.add_argument('--window', type=int, default=4, metavar='N', help='rounds that each can hold (4)')
    parser.add_argument('--wait', type=float, default=60, metavar='SECONDS', help='for the server to be there (60)')
    parser.add_argument('--seed', type=int, default=1, metavar='N', help='of what is lost (1)')
    parser.add_argument('server', metavar='SERVER_IP')
    parser.add_argument('clients', type=int, metavar='CLIENTS')
    parser.add_argument('port', type=int, nargs='?', default=PORT, metavar='PORT')
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    random.seed(options.seed)
    crowd = Crowd((options.server, options.port), options.clients, options.loss, options.window, options.wait)
    try:
        crowd.run()
    except Failed as failure:
        print('crowd: %s' % failure, file=sys.stderr)
        return 1
    print(json.dumps(crowd.report()), file=sys.stderr)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
