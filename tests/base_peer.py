#!/usr/bin/env python3
"""A server and a client of the base protocol, and of nothing else: what kmcast must get on with.

    base_peer.py server [options] LOCAL_IP CLIENTS [PORT]      < image
    base_peer.py client [options] LOCAL_IP SERVER_IP [PORT]    > image

Both are written from the protocol's description alone and share no code with kmcast. They are plain and blocking, to be
checked line by line against that description.

The server does what the C implementation is known to do: garbage in the padding of the group info, the sum as checksum,
the packets of a buffer sent from the last to the first, any of them short, one REQ a client and round.

The client gives up where the C implementation does (20 s without a byte while it waits for multicast), and is stricter
than any client need be: whatever a server sends that the protocol does not promise ends it with exit code 1 and one line
on stderr. By default it even asks for what only `kmcast server --compat` promises: zero padding, and no short packet but
the last of the image; --any-padding and --any-short lift that.

Both judge their peer's messages. Exit codes: 0 all went well, 1 it did not, 2 wrong usage.
"""

import argparse
import os
import random
import select
import socket
import struct
import sys
import time
import zlib

DEFAULT_PORT = 18383
DEFAULT_GROUP = "224.238.0.31"
TTL = 8
MAX_BUFFER_PACKETS = 65536
SILENCE = 20                # seconds without a byte after which the client gives up
IP_AND_UDP = 28             # bytes of the two headers in every datagram

READY = b"\x01"
REQ = b"\x02"
DONE = b"\x04"
SENT = b"\x08"

GROUP_INFO = struct.Struct("<H2s4s8s")      # family, port (big-endian, so kept as bytes), address, padding
BUFFER_INFO = struct.Struct("<4I")          # buffer_id, buffer_size, packet_id_base, pkt_count
PACKET_HEADER = struct.Struct("<3I")        # seq, crc, data_size


class Violation(Exception):
    """The peer did what the protocol does not allow, or went away."""


def require(condition, complaint, *values):
    """Raise Violation(complaint % values) unless `condition` holds."""
    if not condition:
        raise Violation(complaint % values)


def log(text):
    """Print a line on stderr."""
    print("base_peer: " + text, file=sys.stderr, flush=True)


def payload_size(mtu):
    """Return the bytes of a full payload at `mtu`: what the headers leave, rounded down to a multiple of 4."""
    return (mtu - IP_AND_UDP - PACKET_HEADER.size) // 4 * 4


def sum_checksum(payload):
    """Return the C implementation's checksum: the sum of the little-endian u32s of the zero-padded payload."""
    padded = payload + bytes(-len(payload) % 4)
    return sum(struct.unpack("<%dI" % (len(padded) // 4), padded)) % 2**32


def crc_checksum(payload):
    """Return the payload's CRC-32."""
    return zlib.crc32(payload) & 0xFFFFFFFF


CHECKSUMS = {"sum": sum_checksum, "crc": crc_checksum}


def receive(connection, size, what):
    """Read exactly `size` bytes from a TCP connection; `what` names them in the complaint if it ends before."""
    data = b""
    while len(data) < size:
        try:
            piece = connection.recv(size - len(data))
        except OSError as error:
            raise Violation("connection lost (%s) while waiting for %s" % (error.strerror, what))
        require(piece, "connection closed after %d of %d bytes of %s", len(data), size, what)
        data += piece
    return data


def send(connection, data, what):
    """Send all of `data` on a TCP connection."""
    try:
        connection.sendall(data)
    except OSError as error:
        raise Violation("connection lost (%s) while sending %s" % (error.strerror, what))


def require_silence(connection, moment, seconds=0.0):
    """Require that nothing has come on a TCP connection, and nothing comes for `seconds`; `moment` is for the complaint.

    The end of the connection counts as something.
    """
    if select.select([connection], [], [], seconds)[0]:
        try:
            early = connection.recv(64, socket.MSG_PEEK)
        except OSError as error:
            raise Violation("connection lost (%s) %s" % (error.strerror, moment))
        require(early, "connection closed %s", moment)
        raise Violation("bytes %s where none may come: %s" % (early.hex(), moment))


def require_end(connection):
    """Say that we send no more, and require that the peer closes within SILENCE seconds without another byte."""
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass                # it was faster than we, which is fine
    connection.settimeout(SILENCE)
    try:
        more = connection.recv(64)
    except socket.timeout:
        raise Violation("connection still open %d s after the end" % SILENCE)
    except ConnectionResetError:
        raise Violation("connection reset instead of closed after the end")
    require(not more, "bytes %s after the end", more.hex())


# ---------------------------------------------------------------------------------------------------------------------
# Server

class Server:
    """One run of the server: `options` as parsed from the command line, the image from file descriptor 0."""

    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.checksum = CHECKSUMS[options.checksum]
        self.full = payload_size(options.mtu)
        self.next_seq = 0
        self.buffer_id = options.first_buffer_id
        self.repaired = 0
        self.dropped = 0

    def run(self):
        """Serve the image to all clients, round by round."""
        options = self.options
        self.multicast = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.multicast.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(options.local_ip))
        self.multicast.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, TTL)
        self.multicast.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)

        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", options.port))
        listener.listen(128)
        clients = []
        while len(clients) < options.clients:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(connection, self.group_info(), "the group info")
            clients.append(connection)

        rounds = 0
        while True:
            payloads = self.fill()
            self.round(clients, payloads)
            if not payloads:
                break
            rounds += 1
        for connection in clients:
            require_end(connection)
        log("server: %d rounds, %d packets, %d clients; %d datagrams not sent, %d packets repaired"
            % (rounds, self.next_seq, len(clients), self.dropped, self.repaired))

    def group_info(self):
        """Return a group info whose padding is garbage, as from an uninitialised stack."""
        padding = bytes(self.random.randrange(256) for _ in range(8))
        return GROUP_INFO.pack(socket.AF_INET, struct.pack(">H", self.options.port),
                               socket.inet_aton(self.options.group), padding)

    def fill(self):
        """Read one buffer: a list of payloads, each what one read() gave, empty at the end of the image."""
        payloads = []
        while len(payloads) < self.options.buffer_packets:
            size = self.random.randint(1, self.full) if self.options.short else self.full
            payload = os.read(0, size)
            if not payload:
                break
            payloads.append(payload)
        return payloads

    def round(self, clients, payloads):
        """Bring one buffer, perhaps the empty one at the end, to all clients."""
        base, count = self.next_seq, len(payloads)
        packets = [PACKET_HEADER.pack((base + offset) % 2**32, self.checksum(payload), len(payload)) + payload
                   for offset, payload in enumerate(payloads)]
        info = BUFFER_INFO.pack(self.buffer_id, sum(map(len, payloads)), base, count)
        for connection in clients:
            require_silence(connection, "before a buffer info")
            send(connection, info, "a buffer info")
        for connection in clients:
            signal = receive(connection, 1, "READY")
            require(signal == READY, "signal 0x%s instead of READY", signal.hex())
        for packet in reversed(packets):
            if self.random.random() * 100 < self.options.drop:
                self.dropped += 1
            else:
                self.multicast.sendto(packet, (self.options.group, self.options.port))
        for connection in clients:
            require_silence(connection, "between READY and SERVER_SENT")
            send(connection, SENT, "SERVER_SENT")
        for connection in clients:
            self.serve_requests(connection, base, packets)
        self.next_seq = (base + count) % 2**32
        self.buffer_id += 1

    def serve_requests(self, connection, base, packets):
        """Take a client's DONE, or one REQ, answer it, and take the DONE after it."""
        signal = receive(connection, 1, "DONE or REQ")
        if signal == REQ:
            asked, = struct.unpack("<I", receive(connection, 4, "req_count"))
            require(1 <= asked <= len(packets), "req_count %d in a round of %d packets", asked, len(packets))
            seqs = struct.unpack("<%dI" % asked, receive(connection, 4 * asked, "the seqs of a REQ"))
            require(len(set(seqs)) == asked, "a REQ asks twice for the same packet")
            offsets = [(seq - base) % 2**32 for seq in seqs]
            for seq, offset in zip(seqs, offsets):
                require(offset < len(packets), "seq %d asked for, but the round is %d packets from %d on",
                        seq, len(packets), base)
            send(connection, b"".join(packets[offset] for offset in offsets), "repairs")
            self.repaired += asked
            signal = receive(connection, 1, "DONE")
        require(signal == DONE, "signal 0x%s instead of DONE", signal.hex())


# ---------------------------------------------------------------------------------------------------------------------
# Client

class Client:
    """One run of the client: `options` as parsed from the command line, the image to file descriptor 1."""

    #: In the first rounds the client waits a moment before it answers, so that a server that does not wait for the
    #: answer is found out; in all rounds it would cost too much time.
    PATIENT_ROUNDS = 3
    PATIENCE = 0.03         # seconds

    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.checksum = CHECKSUMS[options.checksum]
        self.full = payload_size(options.mtu)
        self.next_seq = 0
        self.last_buffer_id = None
        self.image_ended = False            # a short packet was seen, so no data may follow
        self.rounds = self.packets = self.dropped = self.repaired = self.duplicates = self.late = 0

    def run(self):
        """Take the image, round by round, and write each round before its DONE."""
        self.server = self.connect()
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.join(receive(self.server, GROUP_INFO.size, "the group info"))
        while self.round():
            self.rounds += 1
        require_end(self.server)
        self.take_datagrams(base=self.next_seq, count=0, received={})
        log("client: %d rounds, %d packets; %d datagrams dropped, %d duplicates, %d late, %d packets repaired"
            % (self.rounds, self.packets, self.dropped, self.duplicates, self.late, self.repaired))

    def connect(self):
        """Return a connection to the server. A test starts both at once, so it may take some seconds to be up."""
        deadline = time.time() + 10
        while True:
            try:
                return socket.create_connection((self.options.server_ip, self.options.port))
            except OSError as error:
                if time.time() > deadline:
                    raise Violation("cannot connect: %s" % error)
                time.sleep(0.05)

    def join(self, group_info):
        """Check the group info and join its group."""
        family, port, address, padding = GROUP_INFO.unpack(group_info)
        group, port = socket.inet_ntoa(address), struct.unpack(">H", port)[0]
        require(family == 2, "group info: family %d instead of 2", family)
        require(port == self.options.port, "group info: port %d, but TCP uses %d", port, self.options.port)
        require(224 <= address[0] <= 239, "group info: %s is no multicast group", group)
        require(self.options.group in (None, group), "group info: group %s instead of %s", group, self.options.group)
        require(self.options.any_padding or padding == bytes(8), "group info: padding %s", padding.hex())

        self.multicast = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.multicast.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.multicast.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.multicast.bind((group, port))      # to the group: another group's datagrams are not this server's fault
        self.multicast.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                                  address + socket.inet_aton(self.options.local_ip))
        self.multicast.setblocking(False)

    def round(self):
        """Take one round; return whether it was one with data rather than the last."""
        patience = self.PATIENCE if self.rounds < self.PATIENT_ROUNDS else 0
        size, base, count = self.take_buffer_info()
        received = {}                           # offset from base → payload
        self.hidden = {}                        # the same for datagrams that we pretend not to have received

        require_silence(self.server, "between buffer info and READY", patience)
        self.take_datagrams(base, 0, received)  # count 0: none of this round may come before READY
        send(self.server, READY, "READY")
        self.take_multicast(base, count, received)

        missing = [offset for offset in range(count) if offset not in received]
        require_silence(self.server, "between SERVER_SENT and our answer", patience)
        if missing:
            self.random.shuffle(missing)        # "in the order asked" may be any order
            seqs = [(base + offset) % 2**32 for offset in missing]
            send(self.server, REQ + struct.pack("<%dI" % (1 + len(seqs)), len(seqs), *seqs), "REQ")
            for seq, offset in zip(seqs, missing):
                received[offset] = self.take_repair(seq, self.hidden.get(offset))
            self.repaired += len(missing)
            require_silence(self.server, "between the last repair and DONE", patience)

        payloads = [received[offset] for offset in range(count)]
        total = sum(map(len, payloads))
        require(total == size, "buffer_size is %d, but its packets have %d bytes", size, total)
        for offset, payload in enumerate(payloads):
            require(not self.image_ended, "packet %d follows a short one", base + offset)
            self.image_ended = len(payload) < self.full and not self.options.any_short
        sys.stdout.buffer.write(b"".join(payloads))
        sys.stdout.buffer.flush()
        send(self.server, DONE, "DONE")

        self.packets += count
        self.next_seq = (base + count) % 2**32
        return count > 0

    def take_buffer_info(self):
        """Receive and check a buffer info; return its buffer_size, packet_id_base and pkt_count."""
        buffer_id, size, base, count = BUFFER_INFO.unpack(receive(self.server, BUFFER_INFO.size, "a buffer info"))
        text = "buffer info (id %d, size %d, base %d, count %d): " % (buffer_id, size, base, count)
        if self.last_buffer_id is None:
            require(buffer_id in (0, 1), text + "the first buffer_id is neither 0 nor 1")
        else:
            require(buffer_id == self.last_buffer_id + 1, text + "the buffer_id before was %d", self.last_buffer_id)
        self.last_buffer_id = buffer_id
        require(base == self.next_seq, text + "the next packet is %d", self.next_seq)
        require(count <= self.options.buffer_packets, text + "more than %d packets", self.options.buffer_packets)
        require(count <= size <= count * self.full, text + "not %d packets of 1 to %d bytes", count, self.full)
        return size, base, count

    def take_multicast(self, base, count, received):
        """Take datagrams into `received` until SERVER_SENT, and what is in the socket then."""
        while True:
            readable, _, _ = select.select([self.server, self.multicast], [], [], SILENCE)
            require(readable, "not a byte for %d s while waiting for multicast", SILENCE)
            if self.server in readable:
                signal = receive(self.server, 1, "SERVER_SENT")
                require(signal == SENT, "signal 0x%s instead of SERVER_SENT", signal.hex())
                self.take_datagrams(base, count, received)
                return
            self.take_datagrams(base, count, received)

    def take_datagrams(self, base, count, received):
        """Take all datagrams that wait in the socket into `received`.

        Those of earlier rounds are late, which the network may do to them; none may be of a later round.
        """
        while True:
            try:
                datagram = self.multicast.recv(65536)
            except BlockingIOError:
                return
            if self.random.random() * 100 < self.options.drop:
                dropped, kept = True, self.hidden
                self.dropped += 1
            else:
                dropped, kept = False, received
            seq, payload = self.check_packet(datagram, "datagram")
            offset = (seq - base) % 2**32
            if offset >= count:
                require(1 <= 2**32 - offset <= self.packets,
                        "datagram %d was sent before READY, or is of no round; the round is %d packets from %d on",
                        seq, count, base)
                self.late += 1
            elif offset in received or offset in self.hidden:
                before = received.get(offset, self.hidden.get(offset))
                require(payload == before, "packet %d came twice with different data", seq)
                self.duplicates += not dropped
            else:
                kept[offset] = payload

    def take_repair(self, seq, expected):
        """Receive packet `seq` on TCP and return its payload, which must be `expected` unless that is None."""
        header = receive(self.server, PACKET_HEADER.size, "the header of repair %d" % seq)
        size = PACKET_HEADER.unpack(header)[2]
        require(size <= self.full, "repair %d: data_size %d is above %d", seq, size, self.full)
        came, payload = self.check_packet(header + receive(self.server, size, "repair %d" % seq), "repair")
        require(came == seq, "repair %d came where %d was asked for", came, seq)
        require(expected in (None, payload), "repair %d differs from what was multicast", seq)
        return payload

    def check_packet(self, packet, kind):
        """Check size and checksum of a packet; return its seq and payload. `kind` is for the complaint."""
        require(len(packet) >= PACKET_HEADER.size, "%s of %d bytes, shorter than its header", kind, len(packet))
        seq, checksum, size = PACKET_HEADER.unpack_from(packet)
        payload = packet[PACKET_HEADER.size:]
        require(len(packet) <= self.options.mtu - IP_AND_UDP, "%s %d: %d bytes do not fit MTU %d",
                kind, seq, len(packet), self.options.mtu)
        require(size == len(payload), "%s %d: data_size is %d, but it has %d bytes", kind, seq, size, len(payload))
        require(1 <= size <= self.full, "%s %d: data_size %d is not in 1 to %d", kind, seq, size, self.full)
        right = self.checksum(payload)
        require(checksum == right, "%s %d: checksum 0x%08x instead of 0x%08x", kind, seq, checksum, right)
        return seq, payload


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse(arguments):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description="A server and a client of the base protocol, for tests.")
    roles = parser.add_subparsers(dest="role", metavar="server|client")
    roles.required = True
    server = roles.add_parser("server", help="send stdin to CLIENTS clients")
    client = roles.add_parser("client", help="receive to stdout")
    for role, peer, kind in (server, "clients", int), (client, "server_ip", str):
        role.add_argument("local_ip", metavar="LOCAL_IP", help="picks the multicast interface")
        role.add_argument(peer, metavar=peer.upper(), type=kind)
        role.add_argument("port", metavar="PORT", type=int, nargs="?", default=DEFAULT_PORT, help="default %(default)s")
        role.add_argument("--buffer-packets", metavar="N", type=int, default=MAX_BUFFER_PACKETS,
                          help="packets a buffer at most, default %(default)s")
        role.add_argument("--checksum", choices=sorted(CHECKSUMS), default="sum", help="default %(default)s")
        role.add_argument("--mtu", metavar="BYTES", type=int, default=1500, help="default %(default)s")
        role.add_argument("--drop", metavar="PERCENT", type=float, default=0,
                          help="the share of datagrams to lose: the server does not send them, the client ignores them")
        role.add_argument("--seed", type=int, default=1, help="of what is random, default %(default)s")
    server.add_argument("--group", default=DEFAULT_GROUP, help="default %(default)s")
    server.add_argument("--short", action="store_true", help="make packets short at random, as reads of a pipe are")
    server.add_argument("--first-buffer-id", type=int, choices=(0, 1), default=0, help="default %(default)s")
    client.add_argument("--group", help="the group that the server must name, default any")
    client.add_argument("--any-padding", action="store_true", help="accept garbage in the padding of the group info")
    client.add_argument("--any-short", action="store_true", help="accept short packets before the last of the image")
    return parser.parse_args(arguments)


def main():
    """Run as a command; return the exit code."""
    options = parse(sys.argv[1:])
    try:
        (Server if options.role == "server" else Client)(options).run()
    except Violation as violation:
        log("%s: %s" % (options.role, violation))
        return 1
    except OSError as error:
        log("%s: %s" % (options.role, error))
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
