"""A host on the network that forges packets, with the server's address and the salt that it reads off the wire."""

import sys

import helpers

IMAGE = helpers.random_bytes(6000000, seed=16)

#: Of every few packets that it hears it forges one that is still to come; arguments: group, port, the host's own address.
FORGER = r"""
import socket, struct, sys
group, port, ours = sys.argv[1], int(sys.argv[2]), socket.inet_aton(sys.argv[3])
heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
heard.bind((group, port))
heard.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + ours)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ours)
raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
print("ready", flush=True)
while True:
    data, source = heard.recvfrom(65536)
    seq, crc, size = struct.unpack("<3I", data[:12])
    if seq % 20 or seq >> 31:
        continue
    salt = (crc - seq) % 2 ** 32
    for ahead in (10, 30, 100):
        forged = seq + ahead
        packet = struct.pack("<3I", forged, (salt + forged) % 2 ** 32, size) + (b"forged" * size)[:size]
        udp = struct.pack(">4H", source[1], port, 8 + len(packet), 0) + packet
        raw.sendto(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 8, 17, 0, socket.inet_aton(source[0]),
                               socket.inet_aton(group)) + udp, (group, 0))
"""


def test_packets_forged_with_the_servers_address_are_never_taken_for_the_image(laboratory, deploy, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    key.chmod(0o600)
    lab = laboratory(clients=4)
    said = []
    forger = helpers.start(lab.clients[3].command([sys.executable, "-c", FORGER, helpers.GROUP, "18383", lab.clients[3].address]),
                           stdout=said.append)
    while not said:
        assert forger.wait(0.05) is None, forger.stderr
    run = deploy(lab, IMAGE, ["--key", key, "--rate", "40M"], ["--key", key, "-v"], clients=3,
                 client_python=[helpers.oldest(), helpers.newest()])
    run.finish()
    run.check_complete()
    assert [client for client in run.clients if "came damaged" in client.stderr], str(run)      # else this was no test
    assert forger.poll() is None, forger.stderr
