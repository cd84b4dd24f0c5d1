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

VERSION = 1                             # of the session
MAGIC = b"KMCAST"
PADDING = MAGIC + struct.pack("BB", VERSION, 0)
NO_PADDING = b"\0" * 8
MOST_PACKETS = 65536                    # in a round
LONGEST_FRAME = 65536                   # bytes
SEQS = 1 << 32                          # that the packets of the image are counted modulo
REPAIR_NUMBERS = 1 << 32                # the same of the datagrams of repair passes

ALIVE, READY, INFO, REQUEST, PACKETS, DONE, SENT = b"\x00", b"\x01", b"\x01", b"\x02", b"\x02", b"\x04", b"\x08"
HELLO, STATE, WELCOME, AGAIN, BYE = b"\x10", b"\x13", b"\x20", b"\x40", b"\x80"
FRAMES = (HELLO, STATE, WELCOME, BYE)   # what is a signal and a JSON object
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
    """The checksum in a session; `number` is salt + seq."""
    return zlib.crc32(payload, number & MASK) & MASK


def plain_crc(payload, _number=0):
    """The checksum of a base-protocol server that takes CRC-32."""
    return zlib.crc32(payload) & MASK


def c_sum(payload, _number=0):
    """The checksum of the C implementation."""
    padded = payload + b"\0" * (-len(payload) % 4)
    return sum(struct.unpack("<%dI" % (len(padded) // 4), padded)) & MASK


def packet(seq, payload, salt=7, check=salted):
    """A packet of the image; `check` is the function of its checksum."""
    return HEADER.pack(seq & MASK, check(payload, salt + seq), len(payload)) + payload


def cut(data, size):
    """Data in payloads of `size` bytes; the last one may be short."""
    return [data[start:start + size] for start in range(0, len(data), size)]


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
    """What HELLO says."""
    return changed({"version": "1.0.0", "host": "peer"}, changes)


def welcome_fields(**changes):
    """What WELCOME says."""
    return changed({"version": "1.0.0", "salt": 7, "repair_salt": 9, "payload": 100, "name": "image", "size": None,
                    "digest": "sha256"}, changes)


def hello(**changes):
    """HELLO; see hello_fields()."""
    return frame(HELLO, hello_fields(**changes))


def welcome(**changes):
    """WELCOME; see welcome_fields()."""
    return frame(WELCOME, welcome_fields(**changes))


def state(**fields):
    """STATE."""
    return frame(STATE, fields)


def bye(ok, **fields):
    """BYE."""
    return frame(BYE, dict(fields, ok=ok))


def repair(number, payload, repair_salt=9):
    """A datagram of a repair pass."""
    number %= REPAIR_NUMBERS
    return HEADER.pack(number, salted(payload, repair_salt + number), len(payload)) + payload


def recipe(first, groups):
    """The payload of a recipe: `groups` are lists of places in the round, `first` the repair number of the first of them."""
    return U32.pack(first & MASK) + b"".join(
        struct.pack("<%dH" % (1 + len(group)), len(group), *group) for group in groups)


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
        recipes.append(recipe(first % REPAIR_NUMBERS, part))
        first += len(part)
    return recipes, [combination([payloads[place] for place in group], size) for group in groups]


class SESSION(object):
    """The dialect of two ends of kmcast: the messages about a round, and how they are read."""

    session = True
    padding = PADDING
    seqs = SEQS
    check = staticmethod(salted)

    @staticmethod
    def info(what):
        """A buffer info; `what` is a Round."""
        return INFO + struct.pack("<4I", what.number & MASK, what.size & MASK, what.base % SEQS, what.count)

    @staticmethod
    def ready(_what):
        """CLIENT_READY."""
        return READY

    @staticmethod
    def sent(_what, digest=b""):
        """SERVER_SENT; the digest is that of the image up to this round."""
        return SENT + digest

    @staticmethod
    def done(_what):
        """CLIENT_DONE; of IMAGE: the last one."""
        return DONE

    @staticmethod
    def request(what, places):
        """CLIENT_REQ for packets by their place in the round."""
        return REQUEST + struct.pack("<%dI" % (1 + len(places)), len(places),
                                     *[(what.base + place) % SEQS for place in places])

    @staticmethod
    def packets(_what, packets=()):
        """The packets that were asked for, by TCP."""
        return PACKETS + b"".join(packets)

    @staticmethod
    def again(_what, number, recipes, combinations):
        """AGAIN: what was asked for comes by multicast, in a pass that begins with the repair number `number`."""
        return AGAIN + struct.pack("<3I", number & MASK, recipes, combinations)

    @staticmethod
    def signal(end, _expected):
        """The signal of the next message."""
        return end.read(1)

    @staticmethod
    def from_server(end, kind):
        """What a server says behind the signal `kind`: a Message."""
        if kind == INFO:
            number, size, base, count = struct.unpack("<4I", end.read(16))
            return Message(kind, round=Round(number, size, base, count, end.place))
        if kind == SENT:
            return Message(kind, round=end.round, digest=end.read(end.digest_size))
        if kind == AGAIN:
            return Message(kind, round=end.round, numbers=struct.unpack("<3I", end.read(12)))
        if kind == PACKETS:
            return Message(kind, round=end.round)
        raise Unexpected("an unknown signal, %r" % kind)

    @staticmethod
    def from_client(end, kind):
        """The same of a client's."""
        if kind in (READY, DONE):
            return Message(kind, round=end.round)
        if kind == REQUEST:
            count, = U32.unpack(end.read(4))
            if count > MOST_PACKETS:
                raise Unexpected("a request for %d packets" % count)
            seqs = struct.unpack("<%dI" % count, end.read(4 * count))
            return Message(kind, round=end.round, places=[(seq - end.round.base) % SEQS for seq in seqs])
        raise Unexpected("an unknown signal, %r" % kind)


class BASE(SESSION):
    """The base protocol: one round at a time, no frame, and no signal where only one message can come."""

    session = False
    padding = NO_PADDING
    seqs = 1 << 32
    check = staticmethod(c_sum)

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
    def done(_what):
        return DONE

    @staticmethod
    def request(what, places):
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
            return Message(kind, round=Round(number, size, base, count, end.place))
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

    Attributes: `round`, the Round that was announced last; `digest_size`, bytes of a digest in SERVER_SENT; and `place`,
    bytes of the image before the next round.
    """

    TIMEOUT = 20                        # seconds for one message

    def __init__(self, sock, dialect=SESSION, hears_a_server=False):
        self.dialect, self.hears_a_server = dialect, hears_a_server
        self.round, self.place, self.digest_size = None, 0, 32
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
            self.round = message.round
            self.place += message.round.size
        return message

    def packet(self):
        """A packet by TCP, of those behind PACKETS: (seq, checksum, payload)."""
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
    """

    def __init__(self, port, host="peer", address=LOOPBACK, dialect=SESSION):
        sock = socket.socket()
        sock.settimeout(self.TIMEOUT)
        sock.bind((address, 0))
        sock.connect((LOOPBACK, port))
        End.__init__(self, sock, dialect, hears_a_server=True)
        self.host, self.welcome = host, None
        self.group_info = self.read(16)

    def hello(self, **fields):
        """Say HELLO; see hello_fields()."""
        self.say(hello(**dict({"host": self.host}, **fields)))
        return self

    def take_welcome(self):
        """Take WELCOME; `welcome` is what it says."""
        self.welcome = self.expect(WELCOME).fields
        self.digest_size = 32 if self.welcome["digest"] else 0
        return self

    def greet(self, **fields):
        """HELLO and WELCOME."""
        return self.hello(**fields).take_welcome()

    def announced(self):
        """Take a buffer info: a Round."""
        return self.expect(INFO).round

    def ready(self):
        """Take a buffer info and say READY; returns the Round."""
        what = self.announced()
        self.say(self.dialect.ready(what))
        return what

    def sent(self):
        """Take SERVER_SENT; returns its digest."""
        return self.expect(SENT).digest

    def take_round(self):
        """READY to a buffer info, and wait for SERVER_SENT; returns the Round."""
        what = self.ready()
        self.sent()
        return what

    def ask(self, places):
        """REQUEST packets of the round by their place."""
        self.say(self.dialect.request(self.round, places))

    def done(self):
        """DONE for the round."""
        self.say(self.dialect.done(self.round))

    def end(self):
        """Take the last BYE and say the last DONE; returns what BYE says."""
        fields = self.expect(BYE).fields
        self.say(self.dialect.done(IMAGE))
        return fields


class Server(End):
    """A server for one client at a time, with a multicast group of its own.

    Bytes are said with say() and cast(); the methods of whole steps keep count of the rounds, of the digest and of the seqs.

    check        the checksum of packets; None: the dialect's
    welcome      what WELCOME says

    Attributes: `port`, `group`, `payload`, `salt`, `repair_salt`; `round` and `data`, the round that was announced last;
    `hash`, of the image so far; and `hello`, what HELLO says.
    """

    def __init__(self, dialect=SESSION, check=None, port=0, **welcome):
        self.fields_of_welcome = welcome_fields(**welcome)
        self.payload, self.salt, self.repair_salt = [
            self.fields_of_welcome[key] for key in ("payload", "salt", "repair_salt")]
        self.group = "239.255.92.%d" % random.randrange(1, 255)
        self.check = check or dialect.check
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((LOOPBACK, port))
        self.listener.listen(20)
        self.listener.settimeout(self.TIMEOUT)
        self.port = self.listener.getsockname()[1]
        self.udp = group_sender(self.group, self.port)
        End.__init__(self, None, dialect)
        self.begin()

    def begin(self):
        """Count from the start."""
        self.hash, self.hello, self.round, self.data = hashlib.sha256(), None, Round(-1, 0, 0, 0, 0), b""
        self.size = 0                   # of the image so far
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
        """Say a buffer info for the next round, which has `data`; `changes` are of the Round."""
        self.data, before = data, self.round
        self.round = Round.of(data, self.payload, before.number + 1, (before.base + before.count) % self.dialect.seqs, self.size)
        self.hash.update(data)
        self.size += len(data)
        self.say(self.dialect.info(self.round._replace(**changes)))

    def take_ready(self):
        """Take READY for the round."""
        self.expect(READY)

    def start_round(self, data):
        """A round up to READY."""
        self.announce(data)
        self.take_ready()

    def packets(self):
        """The packets of the round."""
        return [packet((self.round.base + place) % self.dialect.seqs, payload, self.salt, self.check)
                for place, payload in enumerate(cut(self.data, self.payload))]

    def digest(self):
        """What SERVER_SENT says."""
        return self.hash.digest() if self.dialect.session and self.fields_of_welcome["digest"] else b""

    def sent(self):
        """SERVER_SENT for the round, as bytes."""
        return self.dialect.sent(self.round, self.digest())

    def send_round(self, data, lost=()):
        """A round up to SERVER_SENT; `lost` are places."""
        self.start_round(data)
        self.cast(*[one for place, one in enumerate(self.packets()) if place not in lost])
        self.say(self.sent())

    def asked(self):
        """Take a REQUEST; returns the places."""
        return self.expect(REQUEST).places

    def repairs(self, places):
        """Packets of the round by TCP, as bytes."""
        packets = self.packets()
        return self.dialect.packets(self.round, [packets[place] for place in places])

    def give(self, places):
        """Say packets of the round by TCP."""
        self.say(self.repairs(places))

    def again(self, number, recipes, combinations):
        """AGAIN for the round, as bytes."""
        return self.dialect.again(self.round, number, recipes, combinations)

    def repair(self, number, payload):
        """A datagram of a repair pass."""
        return repair(number, payload, self.repair_salt)

    def done(self):
        """Take DONE for the round."""
        self.expect(DONE)

    def whole_round(self, data):
        """A round of which nothing is lost."""
        self.send_round(data)
        self.done()

    # --- the end

    def last_round(self):
        """The round of no packets, up to READY."""
        self.start_round(b"")

    def last_bye(self, **changes):
        """The last BYE, as bytes."""
        digest = self.hash.hexdigest() if self.fields_of_welcome["digest"] else None
        return frame(BYE, changed({"ok": True, "bytes": self.size, "sha256": digest}, changes))

    def last_words(self, **changes):
        """The last SERVER_SENT and BYE; `changes` are of the latter."""
        self.say(self.sent() + self.last_bye(**changes))

    def end(self, **changes):
        """The last words, and the client's."""
        self.last_words(**changes)
        self.done()

    def image(self, *rounds):
        """A whole good session, after accept()."""
        self.greet()
        for data in rounds:
            self.whole_round(data)
        self.last_round()
        self.end()


def group_sender(group, port):
    """A UDP socket that multicasts to a group over loopback with send()."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
    sock.connect((group, port))
    return sock
