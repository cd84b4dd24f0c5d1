"""Wire format: every message byte by byte as kmcast-protocol(7) has it, and what is refused."""

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
    for padding in (b"KMCASt\x01\x00", b"\xff" * 8, b"\x00KMCAST\x01"):
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


FIGURES = (10, 11, 12, 13, 14)
REQUEST = b"\x02" + struct.pack("<6I", 5, *FIGURES) + b"\x01\x02"
DONE = b"\x04" + struct.pack("<6I", 5, *FIGURES)
HELLO = kmcast.pack_frame(kmcast.HELLO, {"version": "1", "host": "h", "window": 4})
WIRE, BASE = kmcast.SessionDialect, kmcast.BaseDialect


def ten(number):
    """What a ServerWindow says of a round that is under way, whatever its number."""
    assert number in (5, None)
    return 10


@pytest.mark.parametrize("message, known", [
    (b"\x00", 1), (b"\x01\5\0\0\0", 1), (DONE, 1), (REQUEST, 5), (HELLO, 5), (b"\x80" + HELLO[1:], 5), (b"\x13" + HELLO[1:], 5),
    (b"\x16\5\0\0\0", 1)], ids=["ALIVE", "READY", "DONE", "REQUEST", "HELLO", "BYE", "STATE", "SUMS"])
def test_the_size_of_a_clients_message_is_known_from_its_first_bytes(message, known):
    for head in range(1, len(message) + 1):
        expected = len(message) if head >= known else None
        assert WIRE.client_message_size(message[:head], ten) == expected
    assert WIRE.client_message_size((message + b"\xff" * 5)[:5], ten) == len(message)


@pytest.mark.parametrize("message, known", [
    (b"\x00", 1), (WIRE.info(1, 100, 5, 2, 1 << 40), 1), (WIRE.sent(3, b"d" * 32), 1), (WIRE.packets(3), 1),
    (WIRE.again(3, 1, 2, 3), 1), (b"\x20" + HELLO[1:], 5), (WIRE.bye(ok=True), 5), (WIRE.state(waiting=None), 5),
    (WIRE.sums(3, [7, 8, 9]), 5)],
    ids=["ALIVE", "BUFFER INFO", "SENT", "PACKETS", "AGAIN", "WELCOME", "BYE", "STATE", "SUMS"])
def test_the_size_of_a_servers_message_is_known_from_its_first_bytes(message, known):
    for head in range(1, len(message) + 1):
        assert WIRE.server_message_size(message[:head], 32) == (len(message) if head >= known else None)


@pytest.mark.parametrize("head", [
    b"\x08", b"\x20", b"\x40", b"\xff", b"G", b"\x10" + struct.pack("<I", 65537), b"\x80\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_client_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        WIRE.client_message_size(head, ten)


@pytest.mark.parametrize("head", [
    b"\x04", b"\x10", b"\xff", b"H", b"\x20" + struct.pack("<I", 65537), b"\x16" + struct.pack("<I", 0),
    b"\x16" + struct.pack("<I", 65537), b"\x16\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_server_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        WIRE.server_message_size(head, 32)


@pytest.mark.parametrize("head", [
    b"\x00", b"\x08", b"\x10", b"\x16", b"\xff", b"\x02" + struct.pack("<I", 0), b"\x02" + struct.pack("<I", 11),
    b"\x02\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_client_of_the_base_protocol_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        BASE.client_message_size(head, ten)


def test_the_largest_that_is_allowed():
    assert WIRE.client_message_size(b"\x02" + struct.pack("<I", 0), lambda number: 65536) == 25 + 8192
    assert WIRE.client_message_size(b"\x10" + struct.pack("<I", 65536), ten) == 65541
    assert WIRE.server_message_size(b"\x16" + struct.pack("<I", 65536), 32) == 9 + 4 * 65536
    assert BASE.client_message_size(b"\x02" + struct.pack("<I", 10), ten) == 45


def test_a_request_has_the_size_of_its_rounds_bitmap():
    sizes = []
    for count in (1, 7, 8, 9, 65535, 65536):
        assert len(WIRE.request(0, (0, 0, 0, 0, 0), 1, 0, count)) == WIRE.client_message_size(
            b"\x02" + struct.pack("<I", 0), lambda number: count)
        sizes.append(len(WIRE.request(0, (0, 0, 0, 0, 0), 1, 0, count)) - 25)
    assert sizes == [1, 1, 1, 2, 8192, 8192]


# ---------------------------------------------------------------------------------------------------------------------
# Messages about rounds

def test_messages_about_a_round_are_as_the_protocol_has_them():
    assert WIRE.info(2, 3000, 7, 3, 1 << 33) == b"\x01" + struct.pack("<4IQ", 2, 3000, 7, 3, 1 << 33)
    assert WIRE.sent(2, b"d" * 32) == b"\x08\2\0\0\0" + b"d" * 32
    assert WIRE.packets(2) == b"\x02\2\0\0\0"
    assert WIRE.again(2, 70, 1, 40) == b"\x40" + struct.pack("<4I", 2, 70, 1, 40)
    assert WIRE.ready(2) == b"\x01\2\0\0\0"
    assert WIRE.done(5, FIGURES) == DONE
    assert WIRE.request(5, FIGURES, 1 | 1 << 9, 1000, 10) == REQUEST
    assert WIRE.ask_for_sums(2) == b"\x16\2\0\0\0"
    assert WIRE.sums(2, [1, 0xffffffff]) == b"\x16" + struct.pack("<4I", 2, 2, 1, 0xffffffff)


def test_what_a_message_says_of_a_round_is_understood():
    assert WIRE.read_info(WIRE.info(2, 3000, 7, 3, 1 << 33)) == (2, 3000, 7, 3, 1 << 33)
    assert [WIRE.number_of(message) for message in (WIRE.ready(2**32 - 2), DONE, REQUEST, WIRE.ask_for_sums(6))] == [
        2**32 - 2, 5, 5, 6]
    assert WIRE.figures_of(DONE) == WIRE.figures_of(REQUEST) == FIGURES
    assert WIRE.asked(REQUEST, 1000, 10) == (1 | 1 << 9, None)


def test_the_base_protocol_has_neither_numbers_of_rounds_nor_figures():
    assert BASE.info(2, 3000, 7, 3, 99) == struct.pack("<4I", 2, 3000, 7, 3)
    assert BASE.read_info(struct.pack("<4I", 2, 3000, 7, 3)) == (2, 3000, 7, 3, None)
    assert (BASE.sent(2, b"d" * 32), BASE.packets(2), BASE.ready(2), BASE.done(2, FIGURES)) == (b"\x08", b"", b"\x01", b"\x04")
    assert BASE.bye(ok=True) == BASE.state(busy=None) == b""
    assert BASE.number_of(b"\x01") is None


@pytest.mark.parametrize("base", [0, 1000, 2**32 - 4])
def test_a_request_of_the_base_protocol_has_seqs(base):
    request = BASE.request(3, FIGURES, 1 | 1 << 9, base, 10)
    assert request == b"\x02" + struct.pack("<3I", 2, base, (base + 9) % 2**32)
    assert BASE.asked(request, base, 10) == (1 | 1 << 9, [0, 9])
    for outside in (base - 1, base + 10):
        with pytest.raises(kmcast.ProtocolError):
            BASE.asked(b"\x02" + struct.pack("<3I", 2, base, outside % 2**32), base, 10)


def test_packets_of_the_base_protocol_are_wanted_in_their_order_and_as_often_as_they_are_asked_for():
    request = b"\x02" + struct.pack("<4I", 3, 105, 104, 105)
    assert BASE.asked(request, 100, 10) == (1 << 4 | 1 << 5, [5, 4, 5])


# ---------------------------------------------------------------------------------------------------------------------
# The tests' own peers, which share nothing with kmcast

WHAT = wire.Round(258, 18 * 1460 - 7, 0x01020304, 18, 0x0102030405060708)
DIGEST = bytes(bytearray(range(32)))
BOTH_SAY = [
    (WIRE.info(*WHAT), wire.SESSION.info(WHAT)), (WIRE.ready(258), wire.SESSION.ready(WHAT)),
    (WIRE.sent(258, DIGEST), wire.SESSION.sent(WHAT, DIGEST)), (WIRE.sent(258, b""), wire.SESSION.sent(WHAT)),
    (WIRE.done(258, FIGURES), wire.SESSION.done(WHAT, FIGURES)),
    (WIRE.done(kmcast.END, (0, 0, 0, 0, 0)), wire.SESSION.done(wire.IMAGE)),
    (WIRE.request(258, FIGURES, wire.bits([0, 7, 17]), WHAT.base, 18), wire.SESSION.request(WHAT, [17, 0, 7], FIGURES)),
    (WIRE.packets(258), wire.SESSION.packets(WHAT)), (WIRE.again(258, 5, 1, 2), wire.SESSION.again(WHAT, 5, 1, 2)),
    (WIRE.ask_for_sums(258), wire.SESSION.ask_for_sums(WHAT)),
    (WIRE.sums(258, [5, 1 << 31]), wire.SESSION.sums(WHAT, [5, 1 << 31])),
    (BASE.info(*WHAT), wire.BASE.info(WHAT)), (BASE.ready(258), wire.BASE.ready(WHAT)),
    (BASE.sent(258, b""), wire.BASE.sent(WHAT)), (BASE.done(258, FIGURES), wire.BASE.done(WHAT)),
    (BASE.request(258, FIGURES, wire.bits([0, 17]), WHAT.base, 18), wire.BASE.request(WHAT, [0, 17])),
    (BASE.packets(258), wire.BASE.packets(WHAT)),
    (kmcast.pack_group_info("239.1.2.3", 4, WIRE.padding), wire.group_info("239.1.2.3", 4)),
    (kmcast.pack_group_info("239.1.2.3", 4, BASE.padding), wire.group_info("239.1.2.3", 4, wire.NO_PADDING)),
]


@pytest.mark.parametrize("ours, theirs", BOTH_SAY, ids=lambda value: repr(value)[:20])
def test_the_tests_peers_say_what_kmcast_says(ours, theirs):
    assert ours == theirs


def test_the_tests_peers_have_nothing_of_kmcast():
    with open(os.path.join(helpers.ROOT, "tests", "wire.py")) as source:
        assert not re.search(r"^\s*(import|from) kmcast", source.read(), re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Bits

@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1000, 65536])
def test_bits_survive_as_a_bitmap(count):
    for places in ([0], [count - 1], range(count), range(0, count, 3)):
        flags = bytearray(b"\1" * count)
        for place in places:
            flags[place] = 0
        gaps = kmcast.gaps_of(flags)
        bitmap = kmcast.to_bitmap(gaps, count)
        assert len(bitmap) == -(-count // 8)
        assert kmcast.from_bitmap(bitmap, count) == gaps
        assert kmcast.places(gaps) == list(places) and kmcast.how_many(gaps) == len(places)


def test_packet_i_is_bit_i_mod_8_of_byte_i_div_8():
    assert kmcast.to_bitmap(1 << 0 | 1 << 7 | 1 << 8 | 1 << 18, 19) == b"\x81\x01\x04"


@pytest.mark.parametrize("bitmap, count", [(b"\x00", 8), (b"\x00\x00", 9), (b"\x80", 7), (b"\x02", 1), (b"\x01\x02", 9),
                                           (b"\x00\x80", 15)], ids=repr)
def test_a_bitmap_for_nothing_or_with_bits_beyond_the_round_is_refused(bitmap, count):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.from_bitmap(bitmap, count)


def test_gaps_are_where_nothing_has_come():
    assert kmcast.gaps_of(bytearray(b"\1\0\1\1\0\0")) == 0b110010
    assert kmcast.gaps_of(bytearray()) == 0 and kmcast.gaps_of(bytearray(b"\1" * 20)) == 0


def test_gaps_that_stand_next_to_each_other_are_a_run():
    assert kmcast.runs(0) == [] and kmcast.places(0) == [] and kmcast.how_many(0) == 0
    assert kmcast.runs(0b1) == [(0, 1)]
    assert kmcast.runs(0b1110110 | 1 << 100) == [(1, 3), (4, 7), (100, 101)]


@pytest.mark.parametrize("stall, valid", [(0, True), (30, True), (0.5, True), (2**32 - 1, True), (2**32, False), (-1, False),
                                          ("30", False), (True, False), (None, False), (float("inf"), False),
                                          (float("nan"), False)], ids=repr)
def test_a_stall_timeout_is_a_number_of_seconds(stall, valid):
    fields = kmcast.unpack_frame(kmcast.pack_frame(kmcast.HELLO, {"stall": stall})[5:])
    if valid:
        assert kmcast.stall_of(fields) == stall
    else:
        with pytest.raises(kmcast.ProtocolError):
            kmcast.stall_of(fields)


def test_who_says_nothing_of_a_stall_timeout_has_none():
    assert kmcast.stall_of({}) == 0


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


def test_where_a_digest_covers_the_round_a_packet_has_salt_and_seq_in_place_of_a_checksum():
    buffer = kmcast.Buffer(8, 2, 0xfffffff0, checks=())
    buffer.start(0x20, 0, 0)
    buffer.add(b"12345678")
    assert bytes(buffer.get(0x20).tobytes()) == buffer.packet(0) == struct.pack("<3I", 0x20, 0x10, 8) + b"12345678"


def test_elsewhere_its_checksum_is_a_crc_that_starts_from_salt_and_seq():
    buffer = kmcast.Buffer(8, 2, salt=0xfffffff0)
    buffer.start(0x20, 0, 0)
    buffer.add(b"12345678")
    crc = zlib.crc32(b"12345678", 0x10) & 0xffffffff
    assert bytes(buffer.get(0x20).tobytes()) == struct.pack("<3I", 0x20, crc, 8) + b"12345678"


@pytest.mark.parametrize("number, size", [(0, 1), (1, 4), (0xdeadbeef, 4), (0xdeadbeef, 9), (2**80 - 1, 10)])
def test_integers_survive_as_bytes(number, size):
    data = kmcast.to_bytes(number, size)
    assert len(data) == size and kmcast.to_int(data) == number
