"""The base-protocol peer itself: its client against its server, and what its client must not let pass."""

import sys

import pytest

import helpers

SIZES = [0, 1, 1459, 1460, 1461, 10 * 1460, 10 * 1460 + 1, 300000]

# Every client has --any-short: even without --short the server sends what a read() of the pipe gives.
WAYS = {
    "plain": ([], []),
    "loss": (["--drop", 10], ["--drop", 20]),
    "short packets": (["--short", "--drop", 5], ["--drop", 5]),
    "no multicast, CRC": (["--drop", 100, "--checksum", "crc", "--first-buffer-id", 1], ["--checksum", "crc"]),
    "jumbo frames": (["--mtu", 9000], ["--mtu", 9000, "--drop", 30]),
}


@pytest.mark.parametrize("size, way", [(size, "loss") for size in SIZES] + [(300000, way) for way in sorted(WAYS)])
def test_client_against_server(size, way):
    data = helpers.random_bytes(size, seed=size)
    server_options, client_options = WAYS[way]
    port = helpers.free_port()
    server = helpers.start_base_server([helpers.LOOPBACK, 2, port, "--buffer-packets", 10] + server_options, stdin=data)
    clients = [helpers.start_base_client([helpers.LOOPBACK, helpers.LOOPBACK, port, "--any-padding", "--any-short",
                                          "--seed", seed] + client_options) for seed in (1, 2)]
    for client in clients:
        code, stderr, received = client.finish(30)
        assert code == 0, stderr + server.stderr + "".join(other.stderr for other in clients)
        assert received == data
    code, stderr, _ = server.finish(30)
    assert code == 0, stderr


# What a server could do wrong: Python that changes base_peer's server, and a word of the client's complaint.
FAULTS = [
    ("garbage in the padding", "", "padding"),
    ("another port in the group info",
     "info = Server.group_info\n"
     "Server.group_info = lambda self: info(self)[:2] + bytes(2) + info(self)[4:8] + bytes(8)", "port 0"),
    ("a wrong checksum", "base_peer.CHECKSUMS['sum'] = lambda payload: 1", "checksum"),
    ("a short packet in the middle", "options += ['--short']", "short one"),
    ("too large for the MTU", "options += ['--mtu', '1504']", "instead of|not 10 packets|MTU"),
    ("a buffer_id out of order",
     "def round_(self, *args):\n"
     "    self.buffer_id *= 2\n"
     "    self_round(self, *args)", "buffer_id"),
    ("a seq out of order",
     "def round_(self, *args):\n"
     "    self.next_seq += self.next_seq > 0\n"
     "    self_round(self, *args)", "the next packet is"),
    ("a wrong buffer_size",
     "pack = base_peer.BUFFER_INFO.pack\n"
     "class Wrong:\n"
     "    size = 16\n"
     "    pack = staticmethod(lambda id, size, base, count: pack(id, size - 1 if count else 0, base, count))\n"
     "base_peer.BUFFER_INFO = Wrong", "buffer_size is"),
    ("datagrams before READY",
     "def round_(self, clients, payloads):\n"
     "    for offset, payload in enumerate(payloads):\n"
     "        header = base_peer.PACKET_HEADER.pack(self.next_seq + offset, self.checksum(payload), len(payload))\n"
     "        self.multicast.sendto(header + payload, (self.options.group, self.options.port))\n"
     "    self_round(self, clients, payloads)", "before READY"),
    ("SERVER_SENT before READY",
     "def receive_(connection, size, what):\n"
     "    if what == 'READY':\n"
     "        connection.sendall(base_peer.SENT)\n"
     "    return receive(connection, size, what)", "where none may come"),
    ("repairs in another order",
     "options += ['--drop', '100']\n"
     "serve = Server.serve_requests\n"
     "Server.serve_requests = lambda self, connection, base, packets: serve(self, connection, base, packets[::-1])",
     "asked for"),
    ("repairs that stop short",
     "options += ['--drop', '100']\n"
     "Server.serve_requests = lambda self, connection, base, packets: connection.close()", "closed|lost"),
    ("a byte after the end", "base_peer.require_end = lambda connection: connection.sendall(b'x')", "after the end"),
    ("no last round", "def round_(self, clients, payloads):\n"
                      "    if payloads:\n"
                      "        self_round(self, clients, payloads)", "buffer info"),
]

FAULTY_SERVER = """
import sys
import base_peer
from base_peer import Server, receive
options, self_round, round_, receive_ = [], Server.round, Server.round, receive
# The padding is clean in all cases but the one that is about it.
if {clean}:
    garbage = Server.group_info
    Server.group_info = lambda self: garbage(self)[:8] + bytes(8)
{fault}
Server.round, base_peer.receive = round_, receive_
sys.argv[1:] += options
sys.exit(base_peer.main())
"""


@pytest.mark.parametrize("name, fault, complaint", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_client_finds_fault(name, fault, complaint):
    port = helpers.free_port()
    code = FAULTY_SERVER.format(clean=bool(fault), fault=fault)
    server = helpers.start([sys.executable, "-c", code, "server", helpers.LOOPBACK, 1, port, "--buffer-packets", 10],
                           stdin=helpers.random_bytes(30 * 1460 + 7), cwd=helpers.ROOT + "/tests")
    client = helpers.start_base_client([helpers.LOOPBACK, helpers.LOOPBACK, port])
    code, stderr, _ = client.finish(30)
    assert code == 1, server.stderr
    assert "Traceback" not in stderr
    assert any(word in stderr for word in complaint.split("|")), stderr


def test_client_gives_up_where_nothing_comes():
    """20 s without a byte in the real one; here its constant is lowered."""
    port = helpers.free_port()
    stuck = "import sys, time, base_peer\n" \
            "base_peer.Server.serve_requests = None\n" \
            "ready = base_peer.receive\n" \
            "base_peer.receive = lambda *args: ready(*args) and time.sleep(60)\n" \
            "sys.exit(base_peer.main())"
    impatient = "import sys, base_peer; base_peer.SILENCE = 0.5; sys.exit(base_peer.main())"
    tests = helpers.ROOT + "/tests"
    helpers.start([sys.executable, "-c", stuck, "server", helpers.LOOPBACK, 1, port], stdin=b"data", cwd=tests)
    client = helpers.start([sys.executable, "-c", impatient, "client", "--any-padding",
                            helpers.LOOPBACK, helpers.LOOPBACK, port], cwd=tests)
    code, stderr, _ = client.finish(20)
    assert code == 1
    assert "not a byte" in stderr
