#!/usr/bin/env python3
"""A client that takes an image in a session with a key, written from man/kmcast-protocol.7 alone.

    page_client.py KEY_FILE SERVER_IP PORT > image

It shares no code with kmcast and none with the other tests: what it gets wrong, the page tells wrong. It takes one round after
the other, takes coded repair for lost, and is no part of a chain. Exit codes: 0 the image is complete, 1 it is not.
"""

import binascii
import hashlib
import hmac
import json
import os
import select
import socket
import struct
import sys

ALIVE, READY, PACKETS, DONE, SENT, HELLO, PROOF, SUMS, WELCOME, AGAIN, BYE = (
    b"\x00", b"\x01", b"\x02", b"\x04", b"\x08", b"\x10", b"\x12", b"\x16", b"\x20", b"\x40", b"\x80")
STATE, BUFFER_INFO, REQUEST = b"\x13", READY, PACKETS
END = 2**32 - 1


def require(condition, reason):
    if not condition:
        raise ValueError(reason)

def proof(key, label, *words):
    """The page's proof(key, label, word, ...)."""
    said = b"".join(struct.pack("<I", len(word)) + word for word in (label,) + words)
    return hmac.new(key, said, hashlib.sha256).digest()


def frame(signal, fields):
    text = json.dumps(fields).encode("utf-8")
    return signal + struct.pack("<I", len(text)) + text


class Round:
    """A round that was announced."""

    def __init__(self, number, size, base, count, place, payload):
        self.number, self.size, self.base, self.count, self.place = number, size, base, count, place
        self.packets = [None] * count
        self.sizes = [payload] * (count - 1) + [size - (count - 1) * payload]
        require(1 <= count <= 65536 and 1 <= self.sizes[-1] <= payload, "a round that cannot be")
        self.heard = 0

    def missing(self):
        return [i for i, packet in enumerate(self.packets) if packet is None]


class Client:
    def __init__(self, key, server, port, write):
        self.key, self.write = key, write
        self.tcp = socket.create_connection((server, port))
        self.received, self.rounds, self.hash, self.size, self.announced = b"", [], hashlib.sha256(), 0, (0, 0)

    def read(self, count):
        """So many bytes from the server, taking datagrams meanwhile."""
        while len(self.received) < count:
            for ready in select.select([self.tcp] + ([self.udp] if self.rounds else []), [], [])[0]:
                data = ready.recv(65536)
                if ready is not self.tcp:
                    self.take(data)
                    continue
                require(data, "the server has gone")
                self.received += data
        data, self.received = self.received[:count], self.received[count:]
        return data

    def signal(self):
        signal = self.read(1)
        return self.signal() if signal == ALIVE else signal

    def read_frame(self, signal):
        """(the message as it was sent, its object)."""
        length = self.read(4)
        require(struct.unpack("<I", length)[0] <= 65536, "a frame that is too long")
        text = self.read(*struct.unpack("<I", length))
        return signal + length + text, json.loads(text.decode("utf-8"))

    def greet(self):
        group_info = self.read(16)
        require(group_info[:2] == b"\2\0" and group_info[8:15] == b"KMCAST\2", "not a session of version 2")
        hello = frame(HELLO, {"version": "page", "host": socket.gethostname(), "window": 1, "stall": 30,
                              "nonce": binascii.hexlify(os.urandom(16)).decode("ascii")})
        self.tcp.sendall(hello)
        require(self.signal() == WELCOME, "refused")
        welcome, fields = self.read_frame(WELCOME)
        require("nonce" in fields and self.read(1) == PROOF, "no key there")
        self.said = group_info, hello, welcome
        require(hmac.compare_digest(self.read(32), self.prove(b"server")[1:]), "the keys differ")
        self.tcp.sendall(self.prove(b"client"))
        self.vouchers = proof(self.key, b"kmcast 2 image", binascii.unhexlify(fields["seed"]))
        self.salt, self.payload = fields["salt"], fields["payload"]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.udp.bind((socket.inet_ntoa(group_info[4:8]), struct.unpack(">H", group_info[2:4])[0]))
        self.udp.connect(tuple(fields["source"]))
        self.udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                            group_info[4:8] + socket.inet_aton(self.tcp.getsockname()[0]))

    def prove(self, purpose):
        return PROOF + proof(self.key, b"kmcast 2 " + purpose, *self.said)

    def take(self, datagram):
        """A packet by multicast, if it is one of the round's."""
        if len(datagram) < 13:
            return
        seq, checksum, size = struct.unpack("<3I", datagram[:12])
        for each in self.rounds:
            i = seq - each.base
            if (0 <= i < each.count and checksum == (self.salt + seq) % 2**32 and size == len(datagram) - 12 == each.sizes[i]
                    and each.packets[i] is None):
                each.packets[i] = datagram[12:]
                each.heard += 1

    def run(self):
        self.greet()
        while True:
            signal = self.signal()
            if signal == STATE:
                self.read_frame(signal)
            elif signal == BYE:
                return self.end(self.read_frame(signal)[1])
            elif signal == BUFFER_INFO:
                number, size, base, count, place = struct.unpack("<4IQ", self.read(24))
                require((number, place) == self.announced, "a round out of turn")
                self.rounds.append(Round(number, size, base, count, place, self.payload))
                self.announced = number + 1, place + size
                self.tcp.sendall(READY + struct.pack("<I", number))
            elif signal == SUMS:
                count, number = struct.unpack("<2I", self.read(8))
                sums, asked = struct.unpack("<%dI" % count, self.read(4 * count)), self.round(number)
                wrong = [i for i, packet in enumerate(asked.packets) if binascii.crc32(packet) & 0xffffffff != sums[i]]
                for i in wrong or range(count):
                    asked.packets[i] = None
                self.answer(asked)
            else:
                require(signal in (SENT, PACKETS, AGAIN), "an unknown signal")
                self.about(signal, self.round(*struct.unpack("<I", self.read(4))))

    def round(self, number):
        return {each.number: each for each in self.rounds}[number]

    def about(self, signal, this):
        if signal == AGAIN:
            return self.read(12)        # what it brings is asked for once more
        if signal == SENT:
            this.digest, voucher = self.read(32), self.read(32)
            word = struct.pack("<IQI", this.number, this.place, this.size) + this.digest
            require(hmac.compare_digest(voucher, proof(self.vouchers, b"kmcast 2 round", word)), "a round without a voucher")
            while select.select([self.udp], [], [], 0.005)[0]:
                self.take(self.udp.recv(65536))
        for i in this.missing() if signal == PACKETS else ():
            this.packets[i] = self.read(this.sizes[i])
        self.answer(this)

    def answer(self, this):
        """DONE, REQUEST or SUMS. The window is 1, so the round is the next in the image."""
        about, bitmap = struct.pack("<I5I", this.number, this.heard, 0, 0, 0, 0), bytearray((this.count + 7) // 8)
        for i in this.missing():
            bitmap[i // 8] |= 1 << i % 8
        if any(bitmap):
            return self.tcp.sendall(REQUEST + about + bitmap)
        data, digest = b"".join(this.packets), self.hash.copy()
        digest.update(data)
        if digest.digest() != this.digest:
            return self.tcp.sendall(SUMS + about[:4])
        self.hash, self.size = digest, self.size + len(data)
        self.write(data)
        self.rounds.remove(this)
        self.tcp.sendall(DONE + about)

    def end(self, fields):
        require(fields["ok"] is True, "the server says: %r" % fields.get("reason"))
        digest = self.hash.digest()
        right = proof(self.vouchers, b"kmcast 2 end", struct.pack("<Q", self.size) + digest)
        require(fields["bytes"] == self.size and binascii.unhexlify(fields["sha256"]) == digest
                and hmac.compare_digest(binascii.unhexlify(fields["proof"]), right), "an end without a voucher")
        self.tcp.sendall(self.prove(b"done") + DONE + struct.pack("<I5I", END, 0, 0, 0, 0, 0))


def main():
    try:
        with open(sys.argv[1], "rb") as file:
            Client(file.read(), sys.argv[2], int(sys.argv[3]), sys.stdout.buffer.write).run()
        sys.stdout.flush()
    except (OSError, ValueError, KeyError) as error:
        print("page_client: %s" % error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
