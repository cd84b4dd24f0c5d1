"""man/kmcast-protocol.7 says what the program says: signals, sizes, keys, limits, and its examples byte by byte.

    python3 tests/unit/test_protocol_page.py        # prints the examples as the page has them
"""

import argparse
import binascii
import hashlib
import io
import json
import os
import re
import struct
import sys

import pytest

if __name__ == "__main__":
    sys.path[:0] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), *up) for up in ([".."], ["..", ".."])]

import helpers
import kmcast

WIRE = kmcast.SessionDialect
IMAGE = b"The quick brown fox jumps over the lazy dog"
PAYLOAD, SALT, REPAIR_SALT = 16, 1000, 2000


def page():
    with io.open(os.path.join(helpers.ROOT, "man", "kmcast-protocol.7"), encoding="ascii") as file:
        return str(file.read())


def section(title):
    """The text below a heading, up to the next one."""
    found = re.search(r"^\.S[hs] %s\n(.*?)(?=^\.S[hs] |\Z)" % re.escape(title), page(), re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def rows(title):
    """The rows of the tables below a heading, as lists of their columns."""
    return [[re.sub(r"^Li ", "", cell.strip()) for cell in row.split(" Ta ")]
            for row in re.findall(r"^\.It (.* Ta .*)", section(title), re.MULTILINE)]


# ---------------------------------------------------------------------------------------------------------------------
# The tables

CLIENT, SERVER = "client", "server"
SIGNALS = [
    ("ALIVE", kmcast.ALIVE, "both"), ("BUFFER INFO", kmcast.BUFFER_INFO, SERVER), ("READY", kmcast.READY, CLIENT),
    ("PACKETS", kmcast.PACKETS, SERVER), ("REQUEST", kmcast.REQUEST, CLIENT), ("DONE", kmcast.DONE, CLIENT),
    ("SENT", kmcast.SENT, SERVER), ("PROOF", kmcast.PROOF, "both"), ("HELLO", kmcast.HELLO, CLIENT), ("STATE", kmcast.STATE, "both"),
    ("SUMS", kmcast.SUMS, CLIENT), ("SUMS", kmcast.SUMS, SERVER),
    ("UPSTREAM", kmcast.UPSTREAM, SERVER), ("FOLLOWER", kmcast.FOLLOWER, SERVER), ("RELAY", kmcast.RELAY, CLIENT),
    ("LACK", kmcast.LACK, CLIENT),
    ("WELCOME", kmcast.WELCOME, SERVER), ("AGAIN", kmcast.AGAIN, SERVER), ("BYE", kmcast.BYE, "both"),
]


def size_said(signal, sender):
    """The bytes of a message as kmcast tells them from its first ones; of a frame, or with a list, those before the rest."""
    head = signal + struct.pack("<I", 0)
    if signal == kmcast.SUMS and sender == SERVER:      # there is no list of none
        return WIRE.server_message_size(signal + struct.pack("<I", 1), kmcast.DIGEST_SIZE) - 4
    if sender == SERVER:
        return WIRE.server_message_size(head, kmcast.DIGEST_SIZE)
    return WIRE.client_message_size(head, lambda number: 0)


def test_every_signal_is_in_the_table_with_its_byte_sender_and_size():
    table = rows("Signals")
    assert sorted((name, int(byte, 16), sender) for byte, name, sender, _ in table) == sorted(
        (name, ord(signal), sender) for name, signal, sender in SIGNALS)
    for byte, name, sender, size in table:
        signal = struct.pack("B", int(byte, 16))
        for end in (CLIENT, SERVER) if sender == "both" else (sender,):
            assert int(re.match(r"\d+", size).group()) == size_said(signal, end), name


def test_no_other_signal_is_known():
    heads = [struct.pack("B", byte) + b"\1\0\0\0" for byte in range(256)]
    for size_of, argument, end in ((WIRE.server_message_size, kmcast.DIGEST_SIZE, SERVER),
                                   (WIRE.client_message_size, lambda number: 0, CLIENT)):
        known = set()
        for head in heads:
            try:
                size_of(head, argument)
                known.add(head[:1])
            except kmcast.ProtocolError:
                pass
        assert known == set(signal for _, signal, sender in SIGNALS if sender in (end, "both"))


def test_the_signals_of_the_base_protocol():
    assert [(int(row[0], 16), row[1]) for row in rows("Signals of the base protocol")] == [
        (ord(kmcast.READY), "CLIENT_READY"), (ord(kmcast.REQUEST), "CLIENT_REQ"),
        (ord(kmcast.DONE), "CLIENT_DONE"), (ord(kmcast.SENT), "SERVER_SENT")]


SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


@pytest.mark.parametrize("title, size", [
    ("Group info", kmcast.GROUP_INFO.size),
    ("Packet", kmcast.PACKET.size),
    ("Buffer info", kmcast.ROUND.size),
    ("BUFFER INFO", 1 + kmcast.ROUND.size + kmcast.PLACE.size),
    ("READY", len(WIRE.ready(0))),
    ("SENT", len(WIRE.sent(0, b"\0" * kmcast.DIGEST_SIZE))),
    ("DONE and REQUEST", len(WIRE.done(0, (0, 0, 0, 0, 0)))),
    ("PACKETS", len(WIRE.packets(0))),
    ("SUMS", len(WIRE.ask_for_sums(0)) + len(WIRE.sums(0, []))),
    ("AGAIN", len(WIRE.again(0, 0, 0, 0))),
    ("Frames", 5),
    # a word's length; PROOF; the words of the two vouchers
    ("With a key", 4 + 1 + kmcast.DIGEST_SIZE + kmcast.Vouchers.ROUND.size + kmcast.PLACE.size + 2 * kmcast.DIGEST_SIZE),
    ("Pieces", kmcast.PIECE.size),
])
def test_the_fields_of_a_message_make_its_size(title, size):
    total = 0
    for length, kind, _ in rows(title):
        assert length == "n" or SIZES.get(kind, int(length)) == int(length), title
        total += 0 if length == "n" else int(length)
    assert total == size


def test_request_has_the_bytes_of_done_and_a_bitmap():
    assert len(WIRE.request(0, (0, 0, 0, 0, 0), 1, 0, 17)) == len(WIRE.done(0, (0, 0, 0, 0, 0))) + 3
    assert rows("DONE and REQUEST")[-1][:2] == ["n", "bitmap"]


def keys(title):
    """The keys that a list of tags describes."""
    return set(re.findall(r"^\.It Li (\w+)", section(title), re.MULTILINE))


def test_limits_are_those_of_the_program():
    said = dict((row[1], row[0]) for row in rows("Limits"))
    assert said == {
        "packets in a round": "%d" % kmcast.MAX_PACKETS,
        "bytes of JSON in a frame": "%d" % kmcast.MAX_FRAME,
        "rounds under way, of kmcast's ends": "%d" % WIRE.window,
        "REQUESTs and SUMS of a client for a round": "%d" % kmcast.Member.MOST_REQUESTS,
        "members of a combination": "%d" % kmcast.MOST_MEMBERS,
        "seconds for a HELLO": "%g" % kmcast.GREETING_TIME,
        "bytes of a HELLO, with a key": "%d" % kmcast.TcpServer.LONGEST_HELLO,
        "failed proofs of an address in a second": "%d" % kmcast.Attempts.MOST,
        "seconds between two signs of life, at the most": "%g" % kmcast.ALIVE_EVERY,
        "seconds for a BYE to get through": "%g" % kmcast.FAREWELL_TIME,
        "bytes in a piece": "%d" % kmcast.LARGEST_PIECE,
        "ranges in HELLO and LACK": "%d" % kmcast.Held.MOST,
        "seconds without a byte, after which an upstream is lost": "%g" % kmcast.Relay.SILENCE,
        "connections to an upstream that have not said their token": "%d" % kmcast.Relay.MOST,
        "RELAYs of a client": "%d" % kmcast.Member.MOST_RELAY_WORDS,
        "seconds of stall timeout, unless the user says else": "%g" % kmcast.STALL,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The examples

class Greeter(kmcast.Client):
    """The greetings of a client, without sockets."""

    def __init__(self, answers):                # pylint: disable=super-init-not-called
        self.options = argparse.Namespace(stall_timeout=None, key=None, expect_name=None, expect_size=None, expect_sha256=None)
        self.answers, self.said, self.server, self.sink = list(answers), [], self, self
        self.alive_every = self.window = self.journal = self.vouchers = None
        self.seeks, self.copy = True, kmcast.Copy(self)

    def _next_message(self, size_of):
        message = self.answers.pop(0)
        assert size_of(message[:5]) == len(message)
        return message

    def send(self, data):
        """As a Connection has it."""
        self.said.append(data)

    def expect(self, size):
        """As a Sink has it."""


def session():
    """What a server agrees to for the image of the example."""
    options = kmcast.command_line().parse_args(["server", "auto", "1"])
    options.port, options.strangers = kmcast.DEFAULT_PORT, 0
    known = WIRE.salts, kmcast.__version__
    WIRE.salts, kmcast.__version__ = staticmethod(lambda: (SALT, REPAIR_SALT)), "1.0.0"
    try:
        return kmcast.Session(options, PAYLOAD, "fox.txt", len(IMAGE), "00112233445566778899aabbccddeeff",
                              ("10.0.0.1", 40000), True)
    finally:
        WIRE.salts, kmcast.__version__ = staticmethod(known[0]), known[1]


HELLO = kmcast.pack_frame(kmcast.HELLO, {
    "version": "1.0.0", "host": "node1", "window": 4, "relay": True, "stall": 30, "seek": True, "image": None, "have": [],
    "who": "ffeeddccbbaa99887766554433221100"})


KEY = kmcast.Key(b"0123456789abcdef")
SEED, NONCES = u"%032x" % 1, (u"%032x" % 2, u"%032x" % 3)       # the latter: the client's, the server's


def packets(first, last):
    """The Round of the example's packets from seq `first` up to `last`."""
    buffer = kmcast.Buffer(PAYLOAD, last - first, SALT, ())
    buffer.start(first, 0, 0)
    for number in range(first, last):
        buffer.add(IMAGE[number * PAYLOAD:(number + 1) * PAYLOAD])
    done = kmcast.Round(first and 1, buffer, first * PAYLOAD)
    done.digest = hashlib.sha256(IMAGE[:last * PAYLOAD]).digest()
    return done


def datagram(done, seq):
    return bytes(done.buffer.get(seq).tobytes())


class Talk(object):
    """A ServerWindow and a ClientWindow that talk; `said` is what a reader of the wire would see."""

    def __init__(self):
        self.agreed = session()
        self.server, self.client = kmcast.ServerWindow(WIRE, 0), kmcast.ClientWindow(
            WIRE, PAYLOAD, (SALT, REPAIR_SALT), True)
        self.member = kmcast.Member("10.0.0.2", 0)
        self.server.members.append(self.member)
        self.said, self.written, self.ended = [], [], None

    def greet(self):
        """The greetings, with what kmcast's own client makes of them."""
        greeter = Greeter([self.agreed.group_info, self.agreed.welcome])
        greeter._greet()                        # pylint: disable=protected-access
        ours, known = [kmcast.unpack_frame(hello[5:]) for hello in (greeter.said[0], HELLO)]
        assert set(ours) == set(known)
        self.said += [("server: group info", self.agreed.group_info), ("client: HELLO", HELLO),
                      ("server: WELCOME", self.agreed.welcome)]

    def step(self, what, *rounds):
        """The server does a step with a round; the client answers."""
        names = {"announce": "BUFFER INFO", "sent": "SENT", "repair": "PACKETS", "finish": "BYE"}
        step = kmcast.Step(what, *rounds)
        if what == "finish":
            step.message = WIRE.bye(ok=True, bytes=len(IMAGE), sha256=hashlib.sha256(IMAGE).hexdigest())
        for verb, _, argument in self.server.begin(step, 0):
            if verb == "packets":
                done, request = argument
                argument = WIRE.packets(done.number) + b"".join(
                    done.buffer.view(place, place + 1).tobytes() for place in kmcast.places(request.gaps))
            title = names[what] + (" of round %d" % rounds[0].number if rounds else "")
            self.to_client("server: " + title, argument)

    def to_client(self, title, message):
        """The client hears a message."""
        self.said.append((title, bytes(message)))
        size = self.client.size_of(message[:5])
        self.client_does(self.client.heard(message[:size], 0))
        rest = message[size:]
        while rest:
            piece = rest[:len(self.client.wants)]
            rest = rest[len(piece):]
            self.client.wants[:] = piece
            self.client_does(self.client.filled(len(piece)))
        self.client_does(self.client.tick(1))

    def client_does(self, todo):
        """What a client's window wants; its writer is as fast as can be."""
        for verb, argument in todo:
            if verb == "send":
                number = WIRE.number_of(argument)
                kind = {kmcast.READY: "READY", kmcast.REQUEST: "REQUEST", kmcast.DONE: "DONE",
                        kmcast.SUMS: "SUMS"}[argument[:1]]
                self.to_server("client: %s of round %d" % (kind, number), argument)
            elif verb == "write":
                data = helpers.data_of(argument.buffer)
                if hashlib.sha256(b"".join(self.written + [data])).digest() != argument.digest:
                    self.client_does(self.client.damaged(argument))
                    continue
                self.written.append(data)
                self.client_does(self.client.verified(argument))
                self.client_does(self.client.written())
            elif verb == "end":
                self.ended = argument

    def to_server(self, title, message):
        """The server hears a message."""
        self.said.append((title, message))
        assert self.server.size_of(message[:5]) == len(message)
        for verb, _, argument in self.server.heard(self.member, message, 0):
            if verb == "send":
                kind = {kmcast.BYE: "BYE", kmcast.SUMS: "SUMS of round %d"}[argument[:1]]
                self.to_client("server: " + (kind % WIRE.number_of(message) if "%" in kind else kind), argument)

    def multicast(self, done, seq, arrives, as_it_arrives=None):
        """A packet goes to the group; as_it_arrives: other bytes than those that were sent."""
        self.said.append(("group: packet %d%s" % (seq, "" if arrives else ", which this client loses"),
                          datagram(done, seq)))
        if as_it_arrives:
            self.said[-1] = ("group: packet %d, as this client hears it" % seq, as_it_arrives)
        if arrives:
            data = bytearray(as_it_arrives or datagram(done, seq))
            self.client.take([(data, 0, 1, len(data) - kmcast.PACKET.size)], 1, 0, 0)


def two_rounds():
    """[(title, bytes)]: the example of two rounds, as kmcast's own ends speak it."""
    talk, first, second = Talk(), packets(0, 2), packets(2, 3)
    talk.greet()
    talk.step("announce", first)
    talk.step("announce", second)
    talk.multicast(first, 0, True)
    talk.multicast(first, 1, False)
    talk.step("sent", first)
    talk.multicast(second, 2, True)
    talk.step("sent", second)
    talk.step("repair", first)
    talk.step("finish")
    assert b"".join(talk.written) == IMAGE and talk.ended["ok"]
    last = WIRE.done(kmcast.END, (0, 0, 0, 0, 0))
    talk.to_server("client: the last DONE", last)
    assert talk.member.outcome == "complete"
    return talk.said


def damaged_packet():
    """[(title, bytes)]: how a client finds what is damaged of the first round, from its packets on."""
    talk, done = Talk(), packets(0, 2)
    talk.step("announce", done)
    begun = len(talk.said)
    talk.multicast(done, 0, True)
    talk.multicast(done, 1, True, datagram(done, 1).replace(b"over", b"ov\0r"))
    talk.step("sent", done)
    talk.step("repair", done)
    assert b"".join(talk.written) == IMAGE[:2 * PAYLOAD]
    return talk.said[begun:]


def coded_pass():
    """[(title, bytes)]: a repair pass for two clients, of which each lacks one packet of the first round."""
    done = packets(0, 2)
    coded, recipe_count = list(kmcast.encode_repair(done.buffer, [[0, 1]], 7, REPAIR_SALT))[-1]
    messages = [("server: AGAIN of round 0", WIRE.again(0, 7, recipe_count, 1)),
                ("group: repair 7, a recipe", bytes(coded.get(kmcast.REPAIR_BIT + 7).tobytes())),
                ("group: repair 8, packet 0 XOR packet 1", bytes(coded.get(kmcast.REPAIR_BIT + 8).tobytes())),
                ("server: SENT of round 0", WIRE.sent(0, done.digest))]
    for lost in (0, 1):
        talk = Talk()
        talk.step("announce", done)
        talk.multicast(done, 1 - lost, True)
        talk.step("sent", done)
        assert talk.said[-1][0] == "client: REQUEST of round 0"
        talk.server.begin(kmcast.Step("repair", done, coded=(talk.member,), message=messages[0][1]), 0)
        for title, message in messages:
            if title.startswith("server"):
                talk.to_client(title, message) if "AGAIN" in title else talk.step("sent", done)
            else:
                talk.client.take([(bytearray(message), 0, 1, len(message) - kmcast.PACKET.size)], 1, 0, 0)
        assert talk.said[-1][0] == "client: DONE of round 0"
    return messages


def with_a_key():
    """[(title, bytes)]: what is other in the example of two rounds where there is a key."""
    agreed, rounds = session(), (packets(0, 2), packets(2, 3))
    hello = kmcast.pack_frame(kmcast.HELLO, dict(kmcast.unpack_frame(HELLO[5:]), nonce=NONCES[0]))
    welcome = kmcast.pack_frame(kmcast.WELCOME, dict(kmcast.unpack_frame(agreed.welcome[5:]), nonce=NONCES[1], seed=SEED))
    greeting = kmcast.Greeting(KEY, agreed.group_info, hello, welcome)
    vouchers = kmcast.Vouchers(KEY, binascii.unhexlify(SEED.encode("ascii")))
    window = kmcast.ServerWindow(WIRE, 0, vouchers)
    window.members.append(kmcast.Member("10.0.0.2", 0))
    said = [("client: HELLO", hello), ("server: WELCOME", welcome),
            ("server: PROOF", greeting.prove(greeting.SERVER)), ("client: PROOF", greeting.prove(greeting.CLIENT))]
    for done in rounds:
        window.begin(kmcast.Step("announce", done), 0)
        window.heard(window.members[0], WIRE.ready(done.number), 0)
        (_, _, sent), = window.begin(kmcast.Step("sent", done), 0)
        said.append(("server: SENT of round %d" % done.number, sent))
    digest = hashlib.sha256(IMAGE)
    return said + [("server: BYE", WIRE.bye(ok=True, bytes=len(IMAGE), sha256=digest.hexdigest(), proof=kmcast.hexadecimal(
        vouchers.of_end(len(IMAGE), digest.digest())))), ("client: PROOF, before the last DONE", greeting.prove(greeting.DONE))]


def as_text(messages):
    """Messages as the page has them: hex; the text of frames between bars."""
    lines = []
    for title, message in messages:
        lines.append(title)
        text = b""
        if message[:1] in (kmcast.HELLO, kmcast.WELCOME, kmcast.BYE) and b"{" in message:
            message, text = message[:5], message[5:]
        digits = binascii.hexlify(message).decode("ascii")
        for start in range(0, len(digits), 32):
            lines.append("  " + re.sub("(..)", r"\1 ", digits[start:start + 32]).strip())
        for start in range(0, len(text), 60):
            lines.append("  |%s|" % text[start:start + 60].decode("ascii"))
    return [str(line) for line in lines]


def block(title):
    """The lines of the literal text below a heading."""
    found = re.search(r"^\.Bd -literal[^\n]*\n(.*?)^\.Ed", section(title), re.MULTILINE | re.DOTALL)
    return found.group(1).splitlines()


@pytest.mark.parametrize("title, example", [
    ("Two rounds", two_rounds), ("The same with a key", with_a_key), ("A damaged packet", damaged_packet),
    ("A coded pass", coded_pass)])
def test_the_example_is_what_the_program_says(title, example):
    assert block(title) == as_text(example())


def test_the_key_of_the_vouchers_of_the_example():
    key = KEY.proof(b"kmcast 2 image", binascii.unhexlify(SEED.encode("ascii")))
    assert "The key of the vouchers is\n%s\n%s.\n" % (kmcast.hexadecimal(key[:16]), kmcast.hexadecimal(key[16:])) in section(
        "The same with a key")


def test_the_checksum_that_a_packet_of_the_example_would_have_without_digests():
    buffer = kmcast.Buffer(PAYLOAD, 1, SALT)
    buffer.start(1, 0, 0)
    buffer.add(IMAGE[PAYLOAD:2 * PAYLOAD])
    digits = binascii.hexlify(buffer.packet(0)[4:8]).decode("ascii")
    said = 'crc32("%s", %d)' % (IMAGE[PAYLOAD:2 * PAYLOAD].decode("ascii"), SALT + 1)
    assert said in section("Two rounds") and str(re.sub("(..)", r"\1 ", digits).strip()) in section("Two rounds")


def test_the_keys_of_frames_are_those_of_the_program():
    assert keys("HELLO") == set(json.loads(HELLO[5:].decode("ascii")))
    assert keys("WELCOME") == set(json.loads(session().welcome[5:].decode("ascii")))
    assert keys("With a key") == set(("nonce", "seed", "proof"))
    assert keys("A rehearsal") == set(("rehearsal", "wrong"))
    assert keys("The end") == set(("ok", "bytes", "sha256"))
    assert keys("BYE") == set(("ok", "reason", "empty", "again"))
    token = b"t" * kmcast.TOKEN_SIZE
    assert keys("FOLLOWER") == set(json.loads(WIRE.follower(token)[5:].decode("ascii")))
    assert keys("UPSTREAM") == set(json.loads(WIRE.upstream(0, "10.0.0.1", 1, token)[5:].decode("ascii")))
    assert keys("LACK") == set(json.loads(WIRE.lack([])[5:].decode("ascii")))
    assert keys("RELAY") == set(("token", "port", "reason", "lost", "connected"))
    assert keys("STATE") == set(kmcast.FIGURES + kmcast.FACTS + ("busy", "here", "places", "waiting", "pass", "starts_in"))


if __name__ == "__main__":
    for example in (two_rounds, with_a_key, damaged_packet, coded_pass):
        print("\n".join(as_text(example())) + "\n")
