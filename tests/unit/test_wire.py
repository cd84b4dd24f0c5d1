"""Wire format: every message byte by byte as PROTOCOL.md has it, and what is refused."""

import json
import os
import re
import struct
import zlib

import pytest

import helpers
import kmcast
import wire

SESSION_PADDING = b"KMCAST\x02\x00"


def test_a_payload_fills_the_mtu_and_is_a_multiple_of_four():
    assert [kmcast.payload_for(mtu) for mtu in (1500, 9000, 576, 1499, 1503, 1504)] == [1460, 8960, 536, 1456, 1460, 1464]


def test_group_info_is_a_sockaddr_in():
    assert kmcast.pack_group_info("239.255.83.83", 18383, kmcast.SessionDialect.padding) == \
        b"\x02\x00" + b"\x47\xcf" + b"\xef\xff\x53\x53" + SESSION_PADDING
    assert kmcast.pack_group_info("224.238.0.31", 1, kmcast.BaseDialect.padding) == b"\x02\x00" + b"\x00\x01" + b"\xe0\xee\x00\x1f" + bytes(bytearray(8))


@pytest.mark.parametrize("dialect, version", [(kmcast.SessionDialect, 2), (kmcast.BaseDialect, None)])
def test_group_info_survives_a_round_trip(dialect, version):
    packed = kmcast.pack_group_info("239.1.2.3", 65535, dialect.padding)
    assert kmcast.unpack_group_info(packed) == ("239.1.2.3", 65535, version)


def test_garbage_in_the_padding_is_no_session():
    """The C implementation sends what was on its stack."""
    packed = kmcast.pack_group_info("239.1.2.3", 5)
    for padding in (b"KMCASt\x02\x00", b"\xff" * 8, b"\x00KMCAST\x02"):
        assert kmcast.unpack_group_info(packed[:8] + padding) == ("239.1.2.3", 5, None)
    assert kmcast.unpack_group_info(packed[:8] + b"KMCAST\x07\x77")[2] == 7


@pytest.mark.parametrize("change", [
    pytest.param(lambda info: b"\x0a" + info[1:], id="another family"),
    pytest.param(lambda info: info[:2] + b"\0\0" + info[4:], id="port 0"),
    pytest.param(lambda info: info[:4] + b"\x0a\0\0\x01" + info[8:], id="an address that is no group"),
    pytest.param(lambda info: b"HTTP/1.1 400 Bad", id="a web server"),
])
def test_a_group_info_that_is_none_is_refused(change):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.unpack_group_info(change(kmcast.pack_group_info("239.1.2.3", 5, kmcast.SessionDialect.padding)))


def test_groups_are_224_to_239():
    assert [kmcast.is_multicast(address) for address in (
        "223.255.255.255", "224.0.0.0", "239.255.255.255", "240.0.0.0")] == [False, True, True, False]


def test_a_frame_is_a_signal_a_length_and_json():
    frame = kmcast.pack_frame(kmcast.BYE, {"ok": False, "reason": u"\u20ac"})
    assert frame[:1] == b"\x80"
    assert struct.unpack("<I", frame[1:5])[0] == len(frame) - 5
    assert json.loads(frame[5:].decode("utf-8")) == {"ok": False, "reason": u"\u20ac"}
    assert kmcast.unpack_frame(frame[5:]) == {"ok": False, "reason": u"\u20ac"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"null", b"\xff", b'{"a": 1} x', b"[" * 65000],
                         ids=lambda text: repr(text[:10]))
def test_a_frame_that_is_no_json_object_is_refused(text):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.unpack_frame(text)


def test_a_frame_in_utf_8_is_understood():
    assert kmcast.unpack_frame(u'{"host": "n\u00f6de"}'.encode("utf-8")) == {u"host": u"n\u00f6de"}


def test_fields_have_their_types():
    fields = kmcast.unpack_frame(b'{"n": 5, "big": 4294967295, "t": "x", "null": null, "yes": true, "minus": -1, "half": 0.5}')
    assert kmcast.field(fields, "n", kmcast.NUMBER) == 5
    assert kmcast.field(fields, "big", kmcast.NUMBER) == 2**32 - 1
    assert kmcast.field(fields, "t", kmcast.TEXT) == "x"
    assert kmcast.field(fields, "null", kmcast.TEXT, optional=True) is None
    for key, kind, optional in (("n", kmcast.TEXT, False), ("t", kmcast.NUMBER, False), ("null", kmcast.TEXT, False),
                                ("yes", kmcast.NUMBER, False), ("minus", kmcast.NUMBER, False), ("half", kmcast.NUMBER, False),
                                ("missing", kmcast.TEXT, False), ("missing", kmcast.TEXT, True), ("yes", kmcast.TEXT, True)):
        with pytest.raises(kmcast.ProtocolError):
            kmcast.field(fields, key, kind, optional)


def test_what_a_peer_says_is_made_printable():
    said = kmcast.printable(u"\x1b[31m\n\u20ac ok" + u"x" * 1000)
    assert isinstance(said, str)
    assert said.startswith("?[31m?? ok") and len(said) <= 200


# ---------------------------------------------------------------------------------------------------------------------
# Messages about a round

WHAT = wire.Round(258, 18 * 1460 - 7, 0x01020304, 18, 0x0102030405060708)
NUMBER = b"\x02\x01\0\0"
FIGURES, FIGURES_SENT = (1, 2, 3, 0x04050607), b"\1\0\0\0" + b"\2\0\0\0" + b"\3\0\0\0" + b"\7\6\5\4"
DIGEST = bytes(bytearray(range(32)))

#: Name -> (bytes, what wire.py makes, what kmcast makes).
MESSAGES = {
    "buffer info": (b"\x01" + NUMBER + b"\xa1\x66\0\0" + b"\4\3\2\1" + b"\x12\0\0\0" + b"\x08\7\6\5\4\3\2\1",
                    lambda: wire.SESSION.info(WHAT), lambda: kmcast.SessionDialect.info(*WHAT)),
    "READY": (b"\x01" + NUMBER, lambda: wire.SESSION.ready(WHAT), lambda: kmcast.SessionDialect.ready(258)),
    "SENT": (b"\x08" + NUMBER + DIGEST, lambda: wire.SESSION.sent(WHAT, DIGEST),
             lambda: kmcast.SessionDialect.sent(258, DIGEST)),
    "SENT without digests": (b"\x08" + NUMBER, lambda: wire.SESSION.sent(WHAT), lambda: kmcast.SessionDialect.sent(258, b"")),
    "DONE": (b"\x04" + NUMBER + FIGURES_SENT, lambda: wire.SESSION.done(WHAT, FIGURES),
             lambda: kmcast.SessionDialect.done(258, FIGURES)),
    "the last DONE": (b"\x04" + b"\xff" * 4 + b"\0" * 16, lambda: wire.SESSION.done(wire.IMAGE),
                      lambda: kmcast.SessionDialect.done(kmcast.END, (0, 0, 0, 0))),
    "REQUEST": (b"\x02" + NUMBER + FIGURES_SENT + b"\x81\0\2", lambda: wire.SESSION.request(WHAT, [17, 0, 7], FIGURES),
                lambda: kmcast.SessionDialect.request(258, FIGURES, 1 << 17 | 1 << 7 | 1, WHAT.base, 18)),
    "PACKETS": (b"\x02" + NUMBER, lambda: wire.SESSION.packets(WHAT), lambda: kmcast.SessionDialect.packets(258)),
    "AGAIN": (b"\x40" + NUMBER + b"\5\0\0\0" + b"\1\0\0\0" + b"\2\0\0\0", lambda: wire.SESSION.again(WHAT, 5, 1, 2),
              lambda: kmcast.SessionDialect.again(258, 5, 1, 2)),
    "buffer info of the base protocol": (NUMBER + b"\xa1\x66\0\0" + b"\4\3\2\1" + b"\x12\0\0\0", lambda: wire.BASE.info(WHAT),
                                         lambda: kmcast.BaseDialect.info(*WHAT)),
    "READY of the base protocol": (b"\x01", lambda: wire.BASE.ready(WHAT), lambda: kmcast.BaseDialect.ready(258)),
    "SENT of the base protocol": (b"\x08", lambda: wire.BASE.sent(WHAT), lambda: kmcast.BaseDialect.sent(258, b"")),
    "DONE of the base protocol": (b"\x04", lambda: wire.BASE.done(WHAT), lambda: kmcast.BaseDialect.done(258, FIGURES)),
    "REQUEST of the base protocol": (
        b"\x02" + b"\2\0\0\0" + b"\4\3\2\1" + b"\x15\3\2\1", lambda: wire.BASE.request(WHAT, [0, 17]),
        lambda: kmcast.BaseDialect.request(258, FIGURES, 1 << 17 | 1, WHAT.base, 18)),
    "packets of the base protocol": (b"", lambda: wire.BASE.packets(WHAT), lambda: kmcast.BaseDialect.packets(258)),
}


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_message_byte_by_byte(name):
    """As kmcast makes it, and as the tests' own peers do."""
    expected, theirs, ours = MESSAGES[name]
    assert ours() == expected
    assert theirs() == expected


def test_the_tests_peers_have_nothing_of_kmcast():
    with open(os.path.join(helpers.ROOT, "tests", "wire.py")) as source:
        assert not re.search(r"^\s*(import|from) kmcast", source.read(), re.MULTILINE)


def test_what_a_buffer_info_says():
    assert kmcast.SessionDialect.read_info(wire.SESSION.info(WHAT)) == tuple(WHAT)
    assert kmcast.BaseDialect.read_info(wire.BASE.info(WHAT)) == tuple(WHAT[:4]) + (None,)


def count_of(number):
    """Packets of a round: of WHAT in a session, or of the only one."""
    if number not in (None, WHAT.number):
        raise kmcast.ProtocolError("no such round")
    return WHAT.count


OF_SESSION = [b"\x00", wire.SESSION.ready(WHAT), wire.SESSION.done(WHAT), wire.SESSION.request(WHAT, [3]), wire.hello(),
              wire.state(), wire.bye(False, reason="x")]
OF_BASE = [wire.BASE.ready(WHAT), wire.BASE.done(WHAT), wire.BASE.request(WHAT, [3]), wire.BASE.request(WHAT, range(18))]


@pytest.mark.parametrize("dialect, message", [(kmcast.SessionDialect, message) for message in OF_SESSION]
                         + [(kmcast.BaseDialect, message) for message in OF_BASE], ids=lambda value: repr(value)[:30])
def test_the_size_of_a_clients_message_is_known_from_its_first_bytes(dialect, message):
    known = [size for size in range(1, len(message) + 1) if dialect.client_message_size(message[:size], count_of) is not None]
    assert known[0] <= 5 and known == list(range(known[0], len(message) + 1))
    assert set(dialect.client_message_size((message + b"\xff" * 5)[:size], count_of) for size in known) == {len(message)}


@pytest.mark.parametrize("head", [
    b"\x08", b"\x20", b"\x40", b"\xff", b"G", b"\x02" + wire.U32.pack(0), b"\x02" + wire.U32.pack(259), b"\x02\xff\xff\xff\xff",
    b"\x10" + wire.U32.pack(65537), b"\x80\xff\xff\xff\xff", b"\x13\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_client_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.SessionDialect.client_message_size(head, count_of)


@pytest.mark.parametrize("head", [
    b"\x00", b"\x08", b"\x10", b"\x80", b"\x02" + wire.U32.pack(0), b"\x02" + wire.U32.pack(19), b"\x02\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_client_of_the_base_protocol_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.BaseDialect.client_message_size(head, count_of)


def test_the_largest_that_is_allowed():
    assert kmcast.BaseDialect.client_message_size(b"\x02" + wire.U32.pack(18), count_of) == 5 + 4 * 18
    assert kmcast.SessionDialect.client_message_size(b"\x02" + NUMBER, lambda _number: 65536) == 21 + 8192
    assert kmcast.SessionDialect.client_message_size(b"\x10" + wire.U32.pack(65536), count_of) == 65541


@pytest.mark.parametrize("message, size, of_base", [
    (b"\x00", 1, None), (wire.SESSION.info(WHAT), 25, 16), (wire.SESSION.sent(WHAT, DIGEST), 37, 1),
    (wire.SESSION.again(WHAT, 1, 2, 3), 17, None), (wire.SESSION.packets(WHAT), 5, None), (wire.welcome(), len(wire.welcome()), None),
    (wire.bye(True), len(wire.bye(True)), None)], ids=lambda value: repr(value)[:20])
def test_the_size_of_a_servers_message_is_known_from_its_first_bytes(message, size, of_base):
    assert kmcast.SessionDialect.server_message_size(message[:5], 32) == len(message) == size
    if of_base:
        assert kmcast.BaseDialect.server_message_size(message, 0, of_base == 16) == of_base


@pytest.mark.parametrize("head", [b"\x10", b"\x04", b"\x03", b"\xff", b"\x20" + wire.U32.pack(65537)], ids=repr)
def test_messages_that_no_server_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.SessionDialect.server_message_size(head, 32)


# ---------------------------------------------------------------------------------------------------------------------
# What is missing of a round

PLACES = [[0], [7], [8], [0, 1, 2], [3, 5, 6, 17], list(range(18))]


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_what_is_missing_is_bits_from_the_wire_to_the_plan(places):
    gaps, message = wire.bits(places), wire.SESSION.request(WHAT, places)
    assert kmcast.SessionDialect.asked(message, WHAT.base, 18) == (gaps, None)
    assert kmcast.SessionDialect.number_of(message) == 258
    assert kmcast.to_bitmap(gaps, 18) == message[21:] and kmcast.from_bitmap(message[21:], 18) == gaps
    assert kmcast.places(gaps) == places and kmcast.how_many(gaps) == len(places)
    assert [place for start, stop in kmcast.runs(gaps) for place in range(start, stop)] == places
    flags = bytearray(b"\1" * 18)
    for place in places:
        flags[place] = 0
    assert kmcast.gaps_of(flags) == gaps


def test_nothing_is_missing_of_nothing():
    assert kmcast.gaps_of(bytearray()) == kmcast.gaps_of(bytearray(b"\1\1")) == 0
    assert kmcast.places(0) == list(kmcast.runs(0)) == [] and kmcast.how_many(0) == 0


def test_runs_are_as_long_as_they_can_be():
    assert list(kmcast.runs(wire.bits([0, 1, 2, 5, 17]))) == [(0, 3), (5, 6), (17, 18)]


@pytest.mark.parametrize("bitmap", [b"\0\0\0", b"\0\0\4", b"\1\0\x80", b"\xff\xff\xff"], ids=repr)
def test_a_bit_beyond_the_round_is_an_error_and_so_is_none(bitmap):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.from_bitmap(bitmap, 18)


@pytest.mark.parametrize("place", [-1, 18, 1000, 2**31])
def test_a_seq_outside_the_round_is_an_error_in_the_base_protocol(place):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.BaseDialect.asked(wire.BASE.request(WHAT, [0, place]), WHAT.base, 18)


@pytest.mark.parametrize("base", [0, 5, 2**32 - 3])
def test_seqs_that_are_asked_for_are_bits_and_keep_their_order(base):
    """Each as often as it was asked for."""
    what = wire.Round(0, 1800, base, 18, 0)
    assert kmcast.BaseDialect.asked(wire.BASE.request(what, [17, 0, 4, 0]), base, 18) == (wire.bits([0, 4, 17]), [17, 0, 4, 0])


def test_what_a_client_says_of_its_reception():
    for message in (wire.SESSION.done(WHAT, FIGURES), wire.SESSION.request(WHAT, [3], FIGURES)):
        assert kmcast.SessionDialect.figures_of(message) == FIGURES
    assert kmcast.BaseDialect.figures_of(wire.BASE.done(WHAT)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Checksums

def test_checksums_of_the_base_protocol():
    """The sum is of little-endian words, modulo 2^32, of the payload padded with zeros."""
    def unsigned(number):
        return number & 0xffffffff
    assert unsigned(kmcast.plain_crc(b"123456789", 77)) == 0xcbf43926
    assert unsigned(kmcast.c_sum(b"\x01\x00\x00\x00\x02\x00\x00\x00", 77)) == 3
    assert unsigned(kmcast.c_sum(b"\x01\x00\x00\x00\x02", 0)) == 3
    assert unsigned(kmcast.c_sum(b"\x01\x00\x00\x00\x02\x01\x01", 0)) == 0x10103
    assert unsigned(kmcast.c_sum(b"\xff\xff\xff\xff" * 2, 0)) == 0xfffffffe
    assert unsigned(kmcast.c_sum(b"\x00\x00\x00\x80" * 3, 0)) == 0x80000000


def test_a_packets_checksum_is_a_crc_that_starts_from_salt_and_seq():
    buffer = kmcast.Buffer(8, 2, salt=0xfffffff0)
    buffer.start(0x20, 0, 0)
    buffer.add(b"12345678")
    crc = zlib.crc32(b"12345678", 0x10) & 0xffffffff
    expected = struct.pack("<3I", 0x20, crc, 8) + b"12345678"
    assert bytes(buffer.get(0x20).tobytes()) == expected == wire.packet(0x20, b"12345678", 0xfffffff0)


@pytest.mark.parametrize("number, size", [(0, 1), (1, 4), (0xdeadbeef, 4), (0xdeadbeef, 9), (2**80 - 1, 10)])
def test_integers_survive_as_bytes(number, size):
    data = kmcast.to_bytes(number, size)
    assert len(data) == size and kmcast.to_int(data) == number
