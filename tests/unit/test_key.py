"""With a key: proofs, vouchers, and what the windows make of them; and who may connect."""

import argparse
import binascii
import hashlib
import os

import pytest

import helpers
import kmcast
import wire
from test_client import Image, PAYLOAD, REPAIR_SALT, SALT, WIRE

SECRET = b"0123456789abcdef"
KEY = kmcast.Key(SECRET)
SEED = b"s" * 16
VOUCHERS = kmcast.Vouchers(KEY, SEED)
MET = b"group info", b"HELLO", b"WELCOME"
IMAGE = Image(7)


# ---------------------------------------------------------------------------------------------------------------------
# Proofs

def test_a_proof_is_the_hmac_sha256_of_rfc_4231():
    """Its second test case; a key that is padded with zeros has the same HMAC."""
    key = kmcast.Key(b"Jefe" + b"\0" * 28)
    said = b"what do ya want for nothing?"
    pads = [bytes(bytearray(byte ^ pad for byte in bytearray((b"Jefe").ljust(64, b"\0")))) for pad in (0x36, 0x5c)]

    def by_hand(text):
        return hashlib.sha256(pads[1] + hashlib.sha256(pads[0] + text).digest()).digest()
    assert binascii.hexlify(by_hand(said)) == b"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert key.proof(said) == by_hand(wire.U32.pack(len(said)) + said)


def test_words_cannot_run_into_each_other():
    assert len(set([KEY.proof(b"label", b"ab", b"c"), KEY.proof(b"label", b"a", b"bc"), KEY.proof(b"label", b"abc"),
                    KEY.proof(b"labela", b"b", b"c"), KEY.proof(b"label", b"ab", b"c", b"")])) == 5


def test_the_same_is_said_as_by_who_knows_only_the_page():
    greeting = kmcast.Greeting(KEY, *MET)
    for ours, theirs in ((greeting.SERVER, wire.SERVER), (greeting.CLIENT, wire.CLIENT), (greeting.DONE, wire.LAST_DONE)):
        assert greeting.prove(ours) == wire.PROOF + wire.proof(SECRET, theirs, *MET)
    seed, what = binascii.hexlify(SEED).decode("ascii"), wire.Round(2 ** 32 - 2, 3000000000, 5, 6, 2 ** 40)
    assert VOUCHERS.of_round(what.number, what.place, what.size, b"d" * 32) == wire.voucher(SECRET, seed, what, b"d" * 32)
    assert kmcast.hexadecimal(VOUCHERS.of_end(2 ** 40, b"d" * 32)) == wire.voucher_of_end(SECRET, seed, 2 ** 40, b"d" * 32)


def test_a_proof_is_for_one_purpose_one_key_and_one_greeting():
    greeting = kmcast.Greeting(KEY, *MET)
    labels = greeting.SERVER, greeting.CLIENT, greeting.DONE
    for label in labels:
        assert [greeting.proven(other, greeting.prove(label)) for other in labels] == [other == label for other in labels]
    for other in (kmcast.Greeting(kmcast.Key(b"0123456789abcdeg"), *MET), kmcast.Greeting(KEY, b"group info", b"HELLOW", b"ELCOME")):
        assert not other.proven(greeting.SERVER, greeting.prove(greeting.SERVER))


@pytest.mark.parametrize("change", [(1, 0, 0, b""), (0, 1, 0, b""), (0, 0, 1, b""), (0, 0, 0, b"x")])
def test_a_voucher_is_for_one_round_of_one_image(change):
    number, place, size, digest = 3, 1000, 500, b"d" * 32
    other = number + change[0], place + change[1], size + change[2], (change[3] + digest)[:32]
    right = VOUCHERS.of_round(number, place, size, digest)
    assert right != VOUCHERS.of_round(*other)
    assert right != kmcast.Vouchers(KEY, b"t" * 16).of_round(number, place, size, digest)
    assert right != VOUCHERS.of_end(place, digest)


def test_bytes_are_compared_whole():
    assert kmcast.same(b"", b"") and kmcast.same(b"\0\xff", b"\0\xff")
    for other in (b"abd", b"bbc", b"ab", b"abcd", b"", b"ABC"):
        assert not kmcast.same(b"abc", other) and not kmcast.same(other, b"abc")


# ---------------------------------------------------------------------------------------------------------------------
# The client's window

class Talk(object):
    """A client's window that was told of the rounds of IMAGE, with a key."""

    def __init__(self):
        self.window = kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT), True, vouchers=VOUCHERS)
        self.announced = 0

    def announce(self):
        """The next round is announced; returns its Incoming."""
        self.window.heard(IMAGE.info(self.announced), 0)
        self.announced += 1
        return self.window.rounds[-1]

    def sent(self, number, voucher=None):
        """SENT is heard."""
        buffer, digest = IMAGE.buffers[number], IMAGE.digests[number]
        place = number * IMAGE.buffers[0].size
        right = VOUCHERS.of_round(number, place, buffer.size, digest)
        return self.window.heard(WIRE.sent(number, digest + (voucher or right)), 0)

    def multicast(self, number, forged=()):
        """Packets of a round arrive, some of them forged."""
        for place in range(IMAGE.buffers[number].count):
            data = IMAGE.packet(number, place)
            if place in forged:
                data[12:] = b"f" * (len(data) - 12)
            self.window.take([(data, 0, 1, len(data) - 12)], 1, 0, 0)

    def answers(self):
        """What is said when the stragglers' time is over."""
        return [argument for verb, argument in self.window.tick(1) if verb == "send"]


def written(talk, incoming):
    """The writer finds a round right; returns whether the client listens no more then."""
    talk.window.verified(incoming)
    talk.window.written()
    return talk.window.distrusts


def test_a_round_with_a_right_voucher_has_its_digest():
    talk = Talk()
    incoming = talk.announce()
    talk.sent(0)
    assert incoming.digest == IMAGE.digests[0]


def test_a_round_with_a_wrong_voucher_ends_the_transfer():
    talk = Talk()
    talk.announce()
    with pytest.raises(kmcast.Failure) as failure:
        talk.sent(0, b"v" * 32)
    assert "not vouched for" in failure.value.reason


def test_sent_is_longer_with_a_key():
    plain = kmcast.ClientWindow(WIRE, PAYLOAD, (SALT, REPAIR_SALT), True)
    assert [window.size_of(kmcast.SENT + b"\0" * 4) for window in (plain, Talk().window)] == [37, 69]


def suspected(talk, number, differing):
    """A round whose digest differs: SUMS were asked for, and come; returns what the client says then."""
    incoming = talk.window.rounds[0]
    assert talk.window.damaged(incoming) == [("send", WIRE.ask_for_sums(number))]
    sums = [kmcast.zlib.crc32(bytes(IMAGE.by_tcp(number, place))) & 0xffffffff for place in range(incoming.count)]
    if not differing:
        sums = incoming.buffer.sums()
    return talk.window.heard(WIRE.sums(number, sums), 1)


def by_tcp(talk, number, places):
    """Packets come by TCP."""
    talk.window.heard(WIRE.packets(number), 1)
    for start, stop in kmcast.runs(wire.bits(places)):
        data = b"".join(IMAGE.by_tcp(number, place) for place in range(start, stop))
        talk.window.wants[:] = data
        talk.window.filled(len(data))


def forged_round(talk, number, differing=True, forged=(2, 5)):
    """A round with forged packets, up to the writer, which finds it right; returns which places were asked for."""
    incoming = talk.announce()
    talk.multicast(number, forged)
    talk.sent(number)
    assert talk.answers() == []         # all is there, and the writer is to find out
    (_, said), = suspected(talk, number, differing)
    gaps, _ = WIRE.asked(said, incoming.base, incoming.count)
    by_tcp(talk, number, wire.places(gaps))
    assert helpers.data_of(incoming.buffer) == helpers.data_of(IMAGE.buffers[number])
    return wire.places(gaps), written(talk, incoming)


def test_what_was_forged_is_asked_for_and_no_more():
    assert forged_round(Talk(), 0) == ([2, 5], False)


def test_a_round_whose_sums_are_all_right_is_asked_for_whole_once():
    talk = Talk()
    incoming = talk.announce()
    talk.multicast(0, (2,))
    talk.sent(0)
    talk.answers()
    (_, said), = suspected(talk, 0, False)
    assert wire.places(WIRE.asked(said, incoming.base, incoming.count)[0]) == list(range(incoming.count))
    by_tcp(talk, 0, range(incoming.count))
    assert suspected(talk, 0, False) == [("differs", incoming)]


def test_after_some_rounds_with_forged_packets_in_a_row_it_listens_no_more():
    talk = Talk()
    for number in range(3):
        assert not forged_round(talk, number)[1]
    incoming = talk.announce()          # one that is right in between
    talk.multicast(3)
    talk.sent(3)
    talk.answers()
    assert not written(talk, incoming)
    assert not forged_round(talk, 4)[1]
    talk = Talk()
    assert [forged_round(talk, number)[1] for number in range(4)] == [False, False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# The server's window

def at_the_end(greeting):
    """A server's window whose only client has been told the last word, and that client."""
    window, member = kmcast.ServerWindow(WIRE, 0, VOUCHERS), kmcast.Member("10.0.0.2", 0)
    member.greeting = greeting
    window.members.append(member)
    window.begin(kmcast.Step("finish", message=b"BYE"), 0)
    return window, member


DONE = WIRE.done(kmcast.END, (0,) * 5)


def test_the_last_done_counts_behind_a_proof_alone():
    greeting = kmcast.Greeting(KEY, *MET)
    window, member = at_the_end(greeting)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(member, DONE, 0)
    assert member.outcome is None
    window, member = at_the_end(greeting)
    assert window.heard(member, greeting.prove(greeting.DONE), 0) == []
    assert window.heard(member, DONE, 0) == [("served", member, None)]


@pytest.mark.parametrize("label", [kmcast.Greeting.SERVER, kmcast.Greeting.CLIENT])
def test_a_wrong_proof_is_a_protocol_error(label):
    greeting = kmcast.Greeting(KEY, *MET)
    window, member = at_the_end(greeting)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(member, greeting.prove(label), 0)


def test_a_proof_where_there_is_no_key_is_a_protocol_error():
    window, member = at_the_end(None)
    with pytest.raises(kmcast.ProtocolError):
        window.heard(member, kmcast.PROOF + b"p" * 32, 0)
    assert window.heard(member, DONE, 0) == [("served", member, None)]


# ---------------------------------------------------------------------------------------------------------------------
# Who may connect

def test_an_address_has_so_many_attempts_in_a_period():
    attempts = kmcast.Attempts()
    for number in range(attempts.MOST):
        assert not attempts.exhausted("10.0.0.1", number * 0.1)
        attempts.failed("10.0.0.1", number * 0.1)
    assert attempts.exhausted("10.0.0.1", 0.9) and not attempts.exhausted("10.0.0.2", 0.9)
    assert not attempts.exhausted("10.0.0.1", 1.05)     # the first one is forgotten


def test_of_any_number_of_attempts_few_are_remembered():
    attempts = kmcast.Attempts()
    for number in range(10 * attempts.MEMORY):
        attempts.failed("10.0.%d.%d" % (number // 256, number % 256), 0)
    assert len(attempts._failed) == attempts.MEMORY     # pylint: disable=protected-access


def session(*arguments, **options):
    parsed = kmcast.command_line().parse_args(["server"] + list(arguments) + ["auto", "1"])
    parsed.port, parsed.strangers, parsed.key = 1, 0, options.get("key")
    return kmcast.Session(parsed, PAYLOAD, "name", None, "0" * 32, ("10.0.0.1", 1))


@pytest.mark.parametrize("networks, inside, outside", [
    ("10.0.0.0/24", ("10.0.0.0", "10.0.0.255"), ("10.0.1.0", "9.255.255.255", "138.0.0.1")),
    ("10.0.0.7", ("10.0.0.7",), ("10.0.0.6", "10.0.0.8")),
    ("10.0.0.7/32,192.168.0.0/16", ("10.0.0.7", "192.168.255.1"), ("10.0.0.8", "192.169.0.0")),
    ("0.0.0.0/0", ("0.0.0.0", "255.255.255.255"), ()),
    ("128.0.0.0/1", ("128.0.0.0", "255.255.255.255"), ("127.255.255.255",))])
def test_networks_have_their_addresses(networks, inside, outside):
    agreed = session("--allow", networks)
    assert [agreed.allows(address) for address in inside + outside] == [True] * len(inside) + [False] * len(outside)


def test_without_that_option_all_may():
    assert session().allows("10.0.0.1")


@pytest.mark.parametrize("text", ["", ",", "10.0.0.1/24", "10.0.0.0/33", "10.0.0", "10.0.0.0/", "::1", "10.0.0.0/ 8", "a/8"])
def test_what_is_no_network_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        kmcast.networks_type(text)


def test_each_connection_has_a_nonce_and_each_session_a_seed():
    agreed, other = session(key=KEY), session(key=KEY)
    said = [kmcast.unpack_frame(agreed.greeting(b"HELLO")[0][5:]) for _ in range(2)]
    said.append(kmcast.unpack_frame(other.greeting(b"HELLO")[0][5:]))
    assert len(set(fields["nonce"] for fields in said)) == 3
    assert said[0]["seed"] == said[1]["seed"] != said[2]["seed"]


def test_without_a_key_nothing_of_it_is_said():
    assert not set(("nonce", "seed", "proof")) & set(kmcast.unpack_frame(session().welcome[5:]))


# ---------------------------------------------------------------------------------------------------------------------
# Where a key comes from

def test_a_key_is_all_of_its_file(tmpdir):
    path = str(tmpdir.join("key"))
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(SECRET + b"\n\0\xff")
    assert kmcast.read_key(path).proof(b"x") == kmcast.Key(SECRET + b"\n\0\xff").proof(b"x")


def test_a_key_comes_through_a_pipe_in_pieces():
    ours, its = os.pipe()
    os.write(its, SECRET[:7])
    os.write(its, SECRET[7:])
    os.close(its)
    assert kmcast.read_key("fd:%d" % ours).proof(b"x") == KEY.proof(b"x")
    with pytest.raises(OSError):
        os.fstat(ours)                  # it was closed


@pytest.mark.parametrize("name", ["fd:", "fd:x", "fd:-1", "fd:987654321", "fd: 3"])
def test_what_is_no_descriptor_is_no_key(name):
    with pytest.raises(kmcast.Failure) as failure:
        kmcast.read_key(name)
    assert failure.value.code == kmcast.USAGE
