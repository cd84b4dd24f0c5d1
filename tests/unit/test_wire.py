"""Wire format: every message byte by byte as PROTOCOL.md has it, and what is refused."""

import json
import struct
import zlib

import pytest

import kmcast

SESSION_PADDING = b"KMCAST\x01\x00"


def test_a_payload_fills_the_mtu_and_is_a_multiple_of_four():
    assert [kmcast.payload_for(mtu) for mtu in (1500, 9000, 576, 1499, 1503, 1504)] == [1460, 8960, 536, 1456, 1460, 1464]


def test_group_info_is_a_sockaddr_in():
    assert kmcast.pack_group_info("239.255.83.83", 18383, kmcast.SessionDialect.padding) == \
        b"\x02\x00" + b"\x47\xcf" + b"\xef\xff\x53\x53" + SESSION_PADDING
    assert kmcast.pack_group_info("224.238.0.31", 1, kmcast.BaseDialect.padding) == b"\x02\x00" + b"\x00\x01" + b"\xe0\xee\x00\x1f" + bytes(bytearray(8))


@pytest.mark.parametrize("dialect, version", [(kmcast.SessionDialect, 1), (kmcast.BaseDialect, None)])
def test_group_info_survives_a_round_trip(dialect, version):
    packed = kmcast.pack_group_info("239.1.2.3", 65535, dialect.padding)
    assert kmcast.unpack_group_info(packed) == ("239.1.2.3", 65535, version)


def test_garbage_in_the_padding_is_no_session():
    """The C implementation sends what was on its stack."""
    packed = kmcast.pack_group_info("239.1.2.3", 5)
    for padding in (b"KMCASt\x01\x00", b"\xff" * 8, b"\x00KMCAST\x01"):
        assert kmcast.unpack_group_info(packed[:8] + padding) == ("239.1.2.3", 5, None)
    assert kmcast.unpack_group_info(packed[:8] + b"KMCAST\x02\x77")[2] == 2


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


REQUEST = b"\x02" + struct.pack("<3I", 2, 7, 8)
HELLO = kmcast.pack_frame(kmcast.HELLO, {"version": "1", "host": "h"})


@pytest.mark.parametrize("message", [b"\x00", b"\x01", b"\x04", REQUEST, HELLO, b"\x80" + HELLO[1:]],
                         ids=["ALIVE", "READY", "DONE", "REQUEST", "HELLO", "BYE"])
def test_the_size_of_a_clients_message_is_known_from_its_first_bytes(message):
    known = 1 if len(message) == 1 else 5
    for head in range(1, len(message) + 1):
        expected = len(message) if head >= known else None
        assert kmcast.SessionDialect.client_message_size(message[:head], 10) == expected
    assert kmcast.SessionDialect.client_message_size((message + b"\xff" * 5)[:5], 10) == (len(message))


@pytest.mark.parametrize("head", [
    b"\x08", b"\x20", b"\x40", b"\xff", b"G", b"\x02" + struct.pack("<I", 0), b"\x02" + struct.pack("<I", 11),
    b"\x02\xff\xff\xff\xff", b"\x10" + struct.pack("<I", 65537), b"\x80\xff\xff\xff\xff"], ids=repr)
def test_messages_that_no_client_may_send(head):
    with pytest.raises(kmcast.ProtocolError):
        kmcast.SessionDialect.client_message_size(head, 10)


def test_the_largest_that_is_allowed():
    assert kmcast.SessionDialect.client_message_size(b"\x02" + struct.pack("<I", 10), 10) == 45
    assert kmcast.SessionDialect.client_message_size(b"\x10" + struct.pack("<I", 65536), 10) == 65541


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
    assert bytes(buffer.get(0x20).tobytes()) == struct.pack("<3I", 0x20, crc, 8) + b"12345678"


@pytest.mark.parametrize("number, size", [(0, 1), (1, 4), (0xdeadbeef, 4), (0xdeadbeef, 9), (2**80 - 1, 10)])
def test_integers_survive_as_bytes(number, size):
    data = kmcast.to_bytes(number, size)
    assert len(data) == size and kmcast.to_int(data) == number
