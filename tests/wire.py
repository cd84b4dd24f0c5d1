"""The wire of kmcast as tests speak it: each message as PROTOCOL.md has it, and two small ends that say and expect them.

No code of kmcast is in here, so that what both get wrong is not right. Whatever changes on the wire changes in this file:

    SESSION, BASE           the two dialects: the messages about a round, built and read
    hello(), welcome(), ... the frames of a session, with fields that are right unless a test wants others
    packet(), repair(), ... what is multicast
    Client(port)            a client against a real server
    Server()                a server for a real client, of one client at a time

    server = wire.Server()
    server.accept().greet()
    server.send_round(b"x" * 300, lost=[1])
    assert server.asked() == [1]
    server.give([1])
    server.done()

A message that is wrong is the right one with other bytes in it, or is made by hand with the functions that this file has for
its parts. Runs on Python 2.7 as well.
"""

import binascii
import collections
import hashlib
import json
import random
import socket
import struct
import time
import zlib

LOOPBACK = "127.0.0.1"
MASK = 0xffffffff
U32 = struct.Struct("<I")
HEADER = struct.Struct("<3I")           # of a packet: seq, crc, data_size
GROUP_INFO = struct.Struct("<H2s4s8s")  # family, port (big-endian), address, padding

VERSION = 2                             # of the session
MAGIC = b"KMCAST"
PADDING = MAGIC + struct.pack("BB", VERSION, 0)
NO_PADDING = b"\0" * 8
MOST_PACKETS = 65536                    # in a round
LONGEST_FRAME = 65536                   # bytes
SEQS = 1 << 31                          # that the packets of the image are counted modulo, in a session
REPAIR_BIT = 1 << 31                    # of the seq of a datagram of a repair pass, which has a number besides
FIGURES = struct.Struct("<5I")          # packets heard; (packets, microseconds) of a round's head, and of its second half
NO_FIGURES = (0, 0, 0, 0, 0)

ALIVE, READY, INFO, REQUEST, PACKETS, DONE, SENT = b"\x00", b"\x01", b"\x01", b"\x02", b"\x02", b"\x04", b"\x08"
HELLO, STATE, SUMS, WELCOME, AGAIN, BYE = b"\x10", b"\x13", b"\x16", b"\x20", b"\x40", b"\x80"
UPSTREAM, FOLLOWER, RELAY, LACK = b"\x11", b"\x14", b"\x15", b"\x17"
FRAMES = (HELLO, STATE, WELCOME, BYE, UPSTREAM, FOLLOWER, RELAY, LACK)   # what is a signal and a JSON object
ABSENT = object()                       # as the value of a field: leave it out


class Unexpected(AssertionError):
    """The peer did not say what it should have said."""


# ---------------------------------------------------------------------------------------------------------------------
# What both dialects have

def payload_size(mtu=1500):
    """The bytes of a full packet's payload."""
    return (mtu - 28 - HEADER.size) // 4 * 4


def group_info(group, port, padding=PADDING, family=2):
    """The first message of a server."""
    return GROUP_INFO.pack(family, struct.pack(">H", port), socket.inet_aton(group), padding)


def salted(payload, number):
    """The checksum in a session without digests; `number` is salt + seq."""
    return zlib.crc32(payload, number & MASK) & MASK


def unsummed(_payload, number):
    """What stands in its place where a digest covers each round; `number` is salt + seq."""
    return number & MASK


def plain_crc(payload, _number=0):
    """The checksum of a base-protocol server that takes CRC-32."""
    return zlib.crc32(payload) & MASK


def c_sum(payload, _number=0):
    """The checksum of the C implementation."""
    padded = payload + b"\0" * (-len(payload) % 4)
    return sum(struct.unpack("<%dI" % (len(padded) // 4), padded)) & MASK


def sums_of(payloads):
    """What SUMS says of payloads."""
    return [plain_crc(payload) for payload in payloads]


def packet(seq, payload, salt=7, check=unsummed):
    """A packet of the image; `check` is the function of its checksum."""
    return HEADER.pack(seq & MASK, check(payload, salt + seq), len(payload)) + payload


def cut(data, size):
    """Data in payloads of `size` bytes; the last one may be short."""
    return [data[start:start + size] for start in range(0, len(data), size)]


def bits(places):
    """An int with the bits at these places: what is missing of a round, as it is counted."""
    return sum(1 << place for place in set(places))


def places(gaps):
    """The places of the bits that are set in an int, ascending."""
    return [place for place in range(gaps.bit_length()) if gaps >> place & 1]


class Round(collections.namedtuple("Round", "number size base count place")):
    """What a buffer info says: buffer_id, bytes, seq of the first packet, packets, bytes of the image before it."""

    @classmethod
    def of(cls, data, payload, number=0, base=0, place=0):
        """The round of `data`, in payloads of so many bytes."""
        return cls(number, len(data), base, -(-len(data) // payload), place)


#: What the DONE for the whole image is about, which answers the last BYE.
IMAGE = Round(MASK, 0, 0, 0, 0)


class Message(object):
    """A message that was read: its `kind`, a signal, and what it says, as attributes."""

    def __init__(self, kind, **says):
        self.kind = kind
        self.__dict__.update(says)

    def __repr__(self):
        return "signal 0x%s, %r" % (binascii.hexlify(self.kind).decode("ascii"),
                                    dict((key, self.__dict__[key]) for key in self.__dict__ if key != "kind"))


# ---------------------------------------------------------------------------------------------------------------------
# A session

def frame(kind, fields):
    """A signal and a JSON object; `fields` may be text, or bytes, to be sent as they are."""
    text = fields if isinstance(fields, bytes) else \
        (fields if hasattr(fields, "encode") else json.dumps(fields)).encode("utf-8")
    return kind + U32.pack(len(text)) + text


def changed(fields, changes):
    """A dict of fields with changes; ABSENT ones are left out."""
    return dict((key, value) for key, value in dict(fields, **changes).items() if value is not ABSENT)


def hello_fields(**changes):
    """What HELLO says; `window` 1 means that one round follows the other."""
    return changed({"version": "1.0.0", "host": "peer", "window": 1, "seek": False, "relay": False, "stall": 30,
                    "image": None, "have": []}, changes)


def welcome_fields(**changes):
    """What WELCOME says."""
    return changed({"version": "1.0.0", "salt": 7, "repair_salt": 9, "payload": 100, "name": "image", "size": None,
                    "digest": "sha256", "unicast": False, "image": "0" * 32, "again": False, "window": 1,
                    "source": [LOOPBACK, 9], "stall": 30}, changes)


def hello(**changes):
    """HELLO; see hello_fields()."""
    return frame(HELLO, hello_fields(**changes))


def welcome(**changes):
    """WELCOME; see welcome_fields()."""
    return frame(WELCOME, welcome_fields(**changes))


def state(**fields):
    """STATE."""
    return frame(STATE, fields)


def follower(token):
    """FOLLOWER: whom to serve; token: 16 bytes, or None."""
    return frame(FOLLOWER, {"token": token and binascii.hexlify(token).decode("ascii")})


def upstream(number, port=None, token=None, address=LOOPBACK):
    """UPSTREAM: whom to take the rounds from; port None: from nobody."""
    fields = {"round": number, "address": port and address}
    return frame(UPSTREAM, dict(fields, port=port, token=binascii.hexlify(token).decode("ascii")) if port else fields)


def relay(token, **fields):
    """RELAY: how a client stands with a neighbour."""
    return frame(RELAY, dict(fields, token=binascii.hexlify(token).decode("ascii")))


def piece(number, first, data, digest=True):
    """A piece of a round, from packet `first` on; data b"": the mark."""
    head = struct.pack("<3I", number, first, len(data))
    return head + data + (U32.pack(zlib.crc32(head + data) & MASK) if data and not digest else b"")


STILL_HERE = piece(MASK, 0, b"")


def lack(*ranges):
    """LACK: these are not here after all, (start, stop) of each."""
    return frame(LACK, {"lacks": [list(pair) for pair in ranges]})


def bye(ok, **fields):
    """BYE."""
    return frame(BYE, dict(fields, ok=ok))


def repair(number, payload, repair_salt=9, check=unsummed):
    """A datagram of a repair pass."""
    number %= REPAIR_BIT
    return HEADER.pack(REPAIR_BIT + number, check(payload, repair_salt + number), len(payload)) + payload


def recipe(first, groups, size):
    """The payload of a recipe, of `size` bytes; `first` is the repair number of the first of `groups`, lists of places in the round.

    Zeros fill it up. One that is longer is cut.
    """
    return (U32.pack(first & MASK) + b"".join(
        struct.pack("<%dH" % (1 + len(group)), len(group), *group) for group in groups)).ljust(size, b"\0")[:size]


def combination(payloads, size):
    """The payload of a coded datagram: the XOR of `payloads`, each padded with zeros to `size` bytes."""
    total = 0
    for payload in payloads:
        total ^= int(binascii.hexlify(payload.ljust(size, b"\0")), 16)
    return binascii.unhexlify(("%0*x" % (2 * size, total)).encode("ascii"))


def repair_pass(payloads, groups, number, size):
    """(recipes, combinations) of a pass that begins with repair number `number`, lists of payloads.

    payloads  those of the round, of `size` bytes where they are full ones
    groups    which of them go into each combination
    """
    described = [[]]
    for group in groups:
        if 4 + sum(2 + 2 * len(other) for other in described[-1] + [group]) > size:
            described.append([])
        described[-1].append(group)
    first, recipes = number + len(described), []
    for part in described:
        recipes.append(recipe(first % REPAIR_BIT, part, size))
        first += len(part)
    return recipes, [combination([payloads[place] for place in group], size) for group in groups]


class SESSION(object):
    """The dialect of two ends of kmcast: the messages about a round, and how they are read.

    Each says which round it is about, so that several can be under way.
    """

    session = True
    padding = PADDING
    seqs = SEQS

    @staticmethod
    def check(digest):
        """The function of a packet's checksum, which knows whether a digest covers each round."""
        return unsummed if digest else salted

    @staticmethod
    def info(what):
        """A buffer info; `what` is a Round."""
        return INFO + struct.pack("<4IQ", what.number & MASK, what.size & MASK, what.base & MASK, what.count, what.place)

    @staticmethod
    def ready(what):
        """CLIENT_READY."""
        return READY + U32.pack(what.number)

    @staticmethod
    def sent(what, digest=b""):
        """SERVER_SENT; the digest is that of the image up to this round."""
        return SENT + U32.pack(what.number) + digest

    @staticmethod
    def done(what, figures=None):
        """CLIENT_DONE; of IMAGE: the last one. figures: how the round was received; None: it was heard, nobody knows how fast."""
        return DONE + U32.pack(what.number) + FIGURES.pack(*figures or (what.count, 0, 0, 0, 0))

    @staticmethod
    def request(what, places, figures=None):
        """CLIENT_REQ for packets by their place in the round, as bits. One outside makes it a wrong one, or too long a one."""
        bitmap = bytearray(max([-(-what.count // 8)] + [1 + place // 8 for place in places]))
        for place in places:
            bitmap[place // 8] |= 1 << place % 8
        figures = figures or (max(0, what.count - len(set(places))), 0, 0, 0, 0)
        return REQUEST + U32.pack(what.number) + FIGURES.pack(*figures) + bytes(bitmap)

    @staticmethod
    def packets(what, packets=()):
        """The packets that were asked for, by TCP, ascending: where a digest covers the round their payloads alone."""
        return PACKETS + U32.pack(what.number) + b"".join(packets)

    @staticmethod
    def ask_for_sums(what):
        """A client's SUMS: it has all of the round, whose digest differs."""
        return SUMS + U32.pack(what.number)

    @staticmethod
    def sums(what, sums):
        """A server's SUMS: the CRC-32 of each payload of the round."""
        return SUMS + struct.pack("<%dI" % (2 + len(sums)), len(sums), what.number, *sums)

    @staticmethod
    def again(what, number, recipes, combinations):
        """AGAIN: what was asked for comes by multicast, in a pass that begins with the repair number `number`."""
        return AGAIN + struct.pack("<4I", what.number, number & MASK, recipes, combinations)

    @staticmethod
    def signal(end, _expected):
        """The signal of the next message."""
        return end.read(1)

    @staticmethod
    def from_server(end, kind):
        """What a server says behind the signal `kind`: a Message."""
        if kind == INFO:
            number, size, base, count, place = struct.unpack("<4IQ", end.read(24))
            return Message(kind, round=Round(number, size, base, count, place))
        if kind not in (SENT, AGAIN, PACKETS, SUMS):
            raise Unexpected("an unknown signal, %r" % kind)
        if kind == SUMS:
            count, number = struct.unpack("<2I", end.read(8))
            what = end.round_of(number)
            if count != what.count:
                raise Unexpected("%d sums of %r" % (count, what))
            return Message(kind, round=what, sums=list(struct.unpack("<%dI" % count, end.read(4 * count))))
        what = end.round_of(*U32.unpack(end.read(4)))
        if kind == SENT:
            return Message(kind, round=what, digest=end.read(end.digest_size))
        if kind == AGAIN:
            return Message(kind, round=what, numbers=struct.unpack("<3I", end.read(12)))
        return Message(kind, round=what)

    @staticmethod
    def from_client(end, kind):
        """The same of a client's."""
        if kind not in (READY, DONE, REQUEST, SUMS):
            raise Unexpected("an unknown signal, %r" % kind)
        what = end.round_of(*U32.unpack(end.read(4)))
        if kind in (READY, SUMS):
            return Message(kind, round=what)
        figures = FIGURES.unpack(end.read(FIGURES.size))
        if kind == DONE:
            return Message(kind, round=what, figures=figures)
        bitmap = bytearray(end.read(-(-what.count // 8)))
        asked = [place for place in range(8 * len(bitmap)) if bitmap[place // 8] >> place % 8 & 1]
        if not asked or asked[-1] >= what.count:
            raise Unexpected("a request for %r of %r" % (asked, what))
        return Message(kind, round=what, figures=figures, places=asked)


class BASE(SESSION):
    """The base protocol: one round at a time, no frame, and no signal where only one message can come."""

    session = False
    padding = NO_PADDING
    seqs = 1 << 32

    @staticmethod
    def check(_digest):
        return c_sum

    @staticmethod
    def info(what):
        return struct.pack("<4I", what.number & MASK, what.size & MASK, what.base & MASK, what.count)

    @staticmethod
    def ready(_what):
        return READY

    @staticmethod
    def sent(_what, _digest=b""):
        return SENT

    @staticmethod
    def done(_what, _figures=None):
        return DONE

    @staticmethod
    def request(what, places, _figures=None):
        return REQUEST + struct.pack("<%dI" % (1 + len(places)), len(places), *[(what.base + place) & MASK for place in places])

    @staticmethod
    def packets(_what, packets=()):
        return b"".join(packets)

    @staticmethod
    def signal(end, expected):
        if end.hears_a_server:
            for kind in (INFO, PACKETS):
                if kind in expected:
                    return kind
        return end.read(1)

    @staticmethod
    def from_server(end, kind):
        if kind == INFO:
            number, size, base, count = struct.unpack("<4I", end.read(16))
            return Message(kind, round=Round(number, size, base, count, None))
        if kind in (SENT, PACKETS):
            return Message(kind, round=end.round, digest=b"")
        raise Unexpected("an unknown signal, %r" % kind)

    @staticmethod
    def from_client(end, kind):
        if kind in (READY, DONE):
            return Message(kind, round=end.round)
        if kind == REQUEST:
            count, = U32.unpack(end.read(4))
            if count > MOST_PACKETS:
                raise Unexpected("a request for %d packets" % count)
            seqs = struct.unpack("<%dI" % count, end.read(4 * count))
            return Message(kind, round=end.round, places=[(seq - end.round.base) & MASK for seq in seqs])
        raise Unexpected("an unknown signal, %r" % kind)


# ---------------------------------------------------------------------------------------------------------------------
# Ends of a connection

class End(object):
    """One end of a TCP connection: says bytes, and reads messages.

    sock            the socket
    dialect         SESSION or BASE
    hears_a_server  whether that is what is at the other end

    Attributes: `rounds`, the Rounds that were announced, by their numbers; `round`, the last of them; `digest_size`, bytes
    of a digest in SERVER_SENT.
    """

    TIMEOUT = 20                        # seconds for one message

    def __init__(self, sock, dialect=SESSION, hears_a_server=False):
        self.dialect, self.hears_a_server = dialect, hears_a_server
        self.round, self.rounds, self.digest_size = None, {}, 32
        self.take_over(sock)

    def take_over(self, sock):
        """Go on with another connection, of which nothing was said yet."""
        self.sock = sock
        if sock is not None:
            sock.settimeout(self.TIMEOUT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # --- bytes

    def say(self, *messages):
        """Send messages."""
        self.sock.sendall(b"".join(messages))

    def read(self, size):
        """Exactly `size` bytes."""
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise Unexpected("the connection ended after %r" % data[:100])
            data += piece
        return data

    def close(self):
        """End the connection in order."""
        self.sock.close()

    def half_close(self):
        """Say nothing more."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        """End the connection with RST."""
        reset(self.sock)

    # --- messages

    def fields(self):
        """The dict in a frame whose signal has been read."""
        size, = U32.unpack(self.read(4))
        if size > LONGEST_FRAME:
            raise Unexpected("a frame of %d bytes" % size)
        return json.loads(self.read(size).decode("utf-8"))

    def hear(self, *expected):
        """The next message; `expected` matters in the base protocol alone, where some have no signal."""
        kind = self.dialect.signal(self, expected)
        if self.dialect.session:
            if kind == ALIVE:
                return Message(kind)
            if kind in FRAMES:
                return Message(kind, fields=self.fields())
        message = (self.dialect.from_server if self.hears_a_server else self.dialect.from_client)(self, kind)
        if self.hears_a_server and kind == INFO:
            self.note(message.round)
        return message

    def note(self, what):
        """A round was announced."""
        self.round = self.rounds[what.number] = what

    def round_of(self, number):
        """The Round of that number."""
        if number == IMAGE.number:
            return IMAGE
        if number not in self.rounds:
            raise Unexpected("a message about round %d, which was not announced" % number)
        return self.rounds[number]

    def packet(self, size=None):
        """A packet by TCP, of those behind PACKETS: (seq, checksum, payload); with its `size` in bytes, known where it comes
        without a header, just its payload."""
        if size is not None:
            return self.read(size)
        seq, checksum, size = HEADER.unpack(self.read(HEADER.size))
        return seq, checksum, self.read(size)

    def expect(self, *kinds):
        """The next message, which must be of one of these kinds; ALIVE and STATE come at any time, and are passed over."""
        deadline = time.time() + self.TIMEOUT
        while True:
            message = self.hear(*kinds)
            if message.kind in kinds:
                return message
            if message.kind not in (ALIVE, STATE) or time.time() > deadline:
                raise Unexpected("%r instead of %r" % (message, kinds))

    def reason(self, passing=()):
        """The reason of the BYE that must come now, or behind messages of the kinds `passing`, and then the end."""
        message = self.expect(BYE, *passing)
        while message.kind != BYE:
            message = self.expect(BYE, *passing)
        if message.fields["ok"] is not False:
            raise Unexpected("a farewell that is none: %r" % message)
        self.ended()
        return message.fields["reason"]

    def ended(self):
        """Nothing more may come but the end."""
        more = self.sock.recv(1000)
        if more:
            raise Unexpected("%r instead of the end" % more)


def reset(sock):
    """Close a connection with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Client(End):
    """A client, which has connected and read the `group_info`.

    host     what HELLO calls it
    address  that it comes from

    `round` is the one that was taken last. With a window of more than one round buffer infos come at any time; they are
    kept until they are asked for.
    """

    def __init__(self, port, host="peer", address=LOOPBACK, dialect=SESSION):
        sock = socket.socket()
        sock.settimeout(self.TIMEOUT)
        sock.bind((address, 0))
        sock.connect((LOOPBACK, port))
        End.__init__(self, sock, dialect, hears_a_server=True)
        self.host, self.welcome, self.window = host, None, 1
        self._kept = []                 # buffer infos
        self.group_info = self.read(16)

    def hello(self, **fields):
        """Say HELLO; see hello_fields()."""
        self.window = fields.get("window", 1)
        self.say(hello(**dict({"host": self.host}, **fields)))
        return self

    def expect(self, *kinds):
        if self.window == 1:
            return End.expect(self, *kinds)
        while True:
            if INFO in kinds and self._kept:
                return self._kept.pop(0)
            message = End.expect(self, INFO, *kinds)
            if message.kind != INFO:
                return message
            self._kept.append(message)

    def take_welcome(self):
        """Take WELCOME; `welcome` is what it says."""
        self.welcome = self.expect(WELCOME).fields
        self.digest_size = 32 if self.welcome["digest"] else 0
        return self

    def greet(self, **fields):
        """HELLO and WELCOME."""
        return self.hello(**fields).take_welcome()

    def note(self, what):
        before = self.round
        End.note(self, what)
        if self.window > 1:
            self.round = before

    def announced(self):
        """Take a buffer info; returns the Round."""
        self.round = self.expect(INFO).round
        return self.round

    def ready(self):
        """Take a buffer info and say READY; returns the Round."""
        what = self.announced()
        self.say(self.dialect.ready(what))
        return what

    def sent(self):
        """Take SERVER_SENT for the round; returns its digest."""
        message = self.expect(SENT)
        if message.round != self.round:
            raise Unexpected("%r instead of SENT for %r" % (message, self.round))
        return message.digest

    def take_round(self):
        """READY to a buffer info, and wait for SERVER_SENT; returns the Round."""
        what = self.ready()
        self.sent()
        return what

    def ask(self, places):
        """REQUEST packets of the round by their place."""
        self.say(self.dialect.request(self.round, places))

    def packets(self, places, what=None):
        """The packets of a round that come behind PACKETS: their payloads, whose headers, if there are any, are right."""
        what, payload = what or self.round, self.welcome["payload"]
        payloads = []
        for place in places:
            size = min(payload, what.size - place * payload)
            if self.welcome["digest"]:
                payloads.append(self.packet(size))
                continue
            seq, checksum, data = self.packet()
            right = (what.base + place) % self.dialect.seqs
            if (seq, checksum, len(data)) != (right, salted(data, self.welcome["salt"] + right), size):
                raise Unexpected("packet %d of %d bytes instead of packet %d of %r" % (seq, len(data), right, what))
            payloads.append(data)
        return payloads

    def done(self):
        """DONE for the round."""
        self.say(self.dialect.done(self.round))

    def end(self):
        """Take the last BYE and say the last DONE; returns what BYE says."""
        fields = self.expect(BYE).fields
        self.say(self.dialect.done(IMAGE))
        return fields


def welcome_in(stream):
    """Where the text of WELCOME is in the first bytes of a server: (start, stop). None: it may still come; False: it does not."""
    rest = stream[16:].lstrip(ALIVE)
    if len(stream) >= 16 and stream[8:14] != MAGIC or rest[:1] not in (b"", WELCOME):
        return False
    if len(rest) < 5:
        return None
    start = len(stream) - len(rest) + 5
    stop = start + U32.unpack(rest[1:5])[0]
    return (start, stop) if len(stream) >= stop else None


class Server(End):
    """A server for one client at a time, with a multicast group of its own.

    Bytes are said with say() and cast(); the methods of whole steps keep count of the rounds, of the digest and of the seqs.
    Where they are about a round, it is the last that was announced unless they are given another one.

    check        the checksum of packets; None: the dialect's
    welcome      what WELCOME says

    Attributes: `port`, `group`, `payload`, `salt`, `repair_salt`; `hash`, of the image so far; and `hello`, what HELLO says.
    """

    def __init__(self, dialect=SESSION, check=None, port=0, **welcome):
        self.fields_of_welcome = welcome_fields(**welcome)
        self.payload, self.salt, self.repair_salt = [
            self.fields_of_welcome[key] for key in ("payload", "salt", "repair_salt")]
        self.group = "239.255.92.%d" % random.randrange(1, 255)
        self.check = check or dialect.check(self.fields_of_welcome["digest"])
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((LOOPBACK, port))
        self.listener.listen(20)
        self.listener.settimeout(self.TIMEOUT)
        self.port = self.listener.getsockname()[1]
        self.udp = group_sender(self.group, self.port)
        if "source" not in welcome:
            self.fields_of_welcome["source"] = list(self.udp.getsockname())
        End.__init__(self, None, dialect)
        self.begin()

    def begin(self):
        """Count from the start."""
        self.hash, self.hello, self.round, self.rounds = hashlib.sha256(), None, Round(-1, 0, 0, 0, 0), {}
        self.size = 0                   # of the image so far
        self._data = {}                 # of each round, and the digest through it
        return self

    def accept(self):
        """Take the next client, and begin."""
        self.take_over(self.listener.accept()[0])
        return self.begin()

    def close(self):
        """End it all."""
        for sock in (self.listener, self.udp, self.sock):
            if sock is not None:
                sock.close()

    def cast(self, *datagrams):
        """Multicast."""
        for data in datagrams:
            self.udp.send(data)
        time.sleep(0.02)                # so that they arrive before what goes by TCP

    # --- the greeting

    def group_info(self, **changes):
        """The group info, as bytes."""
        return group_info(**dict({"group": self.group, "port": self.port, "padding": self.dialect.padding}, **changes))

    def take_hello(self):
        """Take HELLO; `hello` is what it says."""
        self.hello = self.expect(HELLO).fields
        return self

    def welcome(self, **changes):
        """WELCOME, as bytes."""
        return frame(WELCOME, changed(self.fields_of_welcome, changes))

    def greet(self, **welcome):
        """All up to WELCOME; in the base protocol just the group info."""
        self.say(self.group_info())
        if self.dialect.session:
            self.take_hello()
            self.say(self.welcome(**welcome))
        return self

    # --- a round

    def announce(self, data, **changes):
        """Say a buffer info for the next round, which has `data`; `changes` are of the Round. Returns the Round."""
        before = self.round
        what = Round.of(data, self.payload, before.number + 1, (before.base + before.count) % self.dialect.seqs, self.size)
        self.note(what)
        self.hash.update(data)
        self.size += len(data)
        self._data[what.number] = data, self.hash.digest()
        self.say(self.dialect.info(what._replace(**changes)))
        return what

    def announce_part(self, image, start, stop):
        """Say a buffer info for a part of an image, wherever that is. Returns the Round."""
        before, data = self.round, image[start:stop]
        what = Round.of(data, self.payload, before.number + 1, (before.base + before.count) % self.dialect.seqs, start)
        self.note(what)
        self._data[what.number] = data, hashlib.sha256(image[:stop]).digest()
        self.say(self.dialect.info(what))
        return what

    def bring(self, image, start, stop):
        """A round of a part of an image, of which nothing is lost. Returns the Round."""
        what = self.announce_part(image, start, stop)
        self.take_ready(what)
        self.multicast(what)
        self.say(self.sent(what))
        self.done(what)
        return what

    def has_all(self, image):
        """The last words about an image."""
        self.last_words(bytes=len(image), sha256=hashlib.sha256(image).hexdigest())

    def _expect_for(self, kind, what):
        message, what = self.expect(kind), what or self.round
        if message.round != what:
            raise Unexpected("%r instead of that for %r" % (message, what))
        return message

    def take_ready(self, what=None):
        """Take READY for a round."""
        self._expect_for(READY, what)

    def start_rounds(self, parts):
        """Announce a round for each part, then take READY for all; returns the Rounds."""
        rounds = [self.announce(data) for data in parts]
        for what in rounds:
            self.take_ready(what)
        return rounds

    def start_round(self, data):
        """A round up to READY; returns the Round."""
        what = self.announce(data)
        self.take_ready()
        return what

    def packets(self, what=None):
        """The packets of a round."""
        what = what or self.round
        return [packet((what.base + place) % self.dialect.seqs, payload, self.salt, self.check)
                for place, payload in enumerate(self.payloads(what))]

    def payloads(self, what=None):
        """The payloads of a round."""
        return cut(self._data[(what or self.round).number][0], self.payload)

    def multicast(self, what=None, lost=()):
        """Multicast a round; `lost` are places."""
        self.cast(*[one for place, one in enumerate(self.packets(what)) if place not in lost])

    def sent(self, what=None):
        """SERVER_SENT for a round, as bytes."""
        what = what or self.round
        return self.dialect.sent(what, self._data[what.number][1] if self.fields_of_welcome["digest"] else b"")

    def send_round(self, data, lost=()):
        """A round up to SERVER_SENT; `lost` are places. Returns the Round."""
        what = self.start_round(data)
        self.multicast(what, lost)
        self.say(self.sent())
        return what

    def asked(self, what=None):
        """Take a REQUEST for packets of a round; returns the places."""
        return self._expect_for(REQUEST, what).places

    def repairs(self, places, what=None):
        """Packets of a round by TCP, as bytes."""
        bare = self.dialect.session and self.fields_of_welcome["digest"]
        packets = self.payloads(what) if bare else self.packets(what)
        return self.dialect.packets(what or self.round, [packets[place] for place in places])

    def give(self, places, what=None):
        """Say packets of a round by TCP."""
        self.say(self.repairs(places, what))

    def suspected(self, what=None):
        """Take SUMS for a round, and say them."""
        self._expect_for(SUMS, what)
        self.say(self.dialect.sums(what or self.round, sums_of(self.payloads(what))))

    def again(self, number, recipes, combinations, what=None):
        """AGAIN for a round, as bytes."""
        return self.dialect.again(what or self.round, number, recipes, combinations)

    def repair(self, number, payload):
        """A datagram of a repair pass."""
        return repair(number, payload, self.repair_salt, self.check)

    def done(self, what=None):
        """Take DONE for a round."""
        return self._expect_for(DONE, what)

    def whole_round(self, data):
        """A round of which nothing is lost."""
        self.send_round(data)
        return self.done()

    # --- the end

    def last_bye(self, **changes):
        """The last BYE, as bytes."""
        digest = self.hash.hexdigest() if self.fields_of_welcome["digest"] else None
        return frame(BYE, changed({"ok": True, "bytes": self.size, "sha256": digest}, changes))

    def last_words(self, **changes):
        """What a server says when a client has everything; `changes` are of the last BYE."""
        if self.dialect.session:
            self.say(self.last_bye(**changes))
        else:
            self.start_round(b"")
            self.say(self.sent())

    def end(self, **changes):
        """The last words, and the client's."""
        self.last_words(**changes)
        self.done(IMAGE if self.dialect.session else None)


def group_sender(group, port):
    """A UDP socket that multicasts to a group over loopback with send()."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
    sock.connect((group, port))
    return sock
