"""kmcast check where the network, or a firewall, takes multicast away: who is concerned, and what to do."""

import json
import subprocess
import sys
import time

import pytest

import helpers
from deployment import firewall, no_file


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.check_call(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)])
    yield path
    subprocess.check_call(["umount", "-l", str(path)])


def rehearse(lab, minutes, tmp_path, meanwhile=None, options=()):
    """A rehearsal with all hosts; returns (exit code, stderr) of the server and of each client."""
    server = helpers.start_kmcast(["check", "--minutes", minutes] + list(options) + [
        lab.server.address, len(lab.clients), 18383], host=lab.server)
    server.wait_stderr("waiting for")
    clients = [helpers.start_client(["-o", str(tmp_path / host.name), host.address, lab.server.address], host=host)
               for host in lab.clients]
    if meanwhile:
        meanwhile(clients)
    ends = [process.finish(120)[:2] for process in [server] + clients]
    no_file(tmp_path)
    return ends


def test_a_firewall_that_drops_udp(laboratory, tmp_path):
    lab = laboratory(clients=3)
    firewall(lab.clients[0], "input", "meta l4proto udp drop")
    (code, said), deaf, first, second = rehearse(lab, 0.05, tmp_path)
    assert code == 3 and "multicast works for 2 of 3 clients" in said, said
    assert "%s (%s): no multicast reaches it: let UDP" % (lab.clients[0].name, lab.clients[0].address) in said, said
    assert deaf[0] == 1 and "firewall" in deaf[1], deaf
    assert (first[0], second[0]) == (0, 0), (first, second)


def test_a_switch_that_forgets_the_group(laboratory, tmp_path):
    """As one does that has IGMP snooping, but no querier, after some minutes: here as soon as the transfer is under way."""
    lab = laboratory(clients=2)

    def forget(clients):
        for client in clients:
            client.wait_begun()
        time.sleep(8)                   # some seconds of the slow stage
        for host in lab.clients:
            host.block_multicast()
    (code, said), first, second = rehearse(lab, 0.4, tmp_path, forget)
    assert code == 1 and "multicast works for 0 of 2 clients" in said, said
    assert said.count("multicast reached it, and then no more") == 2 and "querier" in said, said
    assert first[0] == second[0] == 1 and "snooping" in first[1], (first, second)


#: Asks all hosts which groups they want, as a querier does: IGMPv2, RFC 2236.
QUERY = r"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x94\x04\0\0")
sock.sendto(b"\x11\x0a\xee\xf5\0\0\0\0", ("224.0.0.1", 0))
"""


def snoop(lab, querier):
    """Have the bridge carry multicast to those who want the group only; who does is forgotten after 8 s, unless he says so
    when a querier asks him, which the bridge is or is not."""
    for words in ("mcast_membership_interval 800", "mcast_query_response_interval 100", "mcast_query_interval 200",
                  "mcast_startup_query_interval 100", "mcast_snooping 1 mcast_querier %d" % querier):       # in 1/100 s
        subprocess.check_call(["ip", "-n", lab.switch, "link", "set", "br0", "type", "bridge"] + words.split())
    if not querier:                 # one of Linux that has never heard any floods, which other switches do not; so it hears one
        lab.server.run([sys.executable, "-c", QUERY])


def test_a_bridge_with_snooping_and_no_querier(laboratory, tmp_path):
    lab = laboratory(clients=2)
    snoop(lab, querier=0)
    (code, said), first, second = rehearse(lab, 0.4, tmp_path)
    assert code == 1 and "multicast works for 0 of 2 clients" in said, said
    assert said.count("multicast reached it, and then no more: a switch on the way has IGMP snooping but no querier") == 2, said
    assert first[0] == second[0] == 1 and "or turn snooping off" in first[1], (first, second)


def test_a_bridge_with_snooping_and_a_querier(laboratory, tmp_path):
    lab = laboratory(clients=2)
    snoop(lab, querier=1)
    ends = rehearse(lab, 0.4, tmp_path)
    assert [code for code, _ in ends] == [0] * 3 and "multicast works for 2 of 2 clients" in ends[0][1], "".join(said for _, said in ends)


def narrow(lab, host, mtu):
    """Let host's port and the host take packets of so many bytes at the most."""
    subprocess.check_call(["ip", "-n", lab.switch, "link", "set", host.port, "mtu", str(mtu)])
    host.run(["ip", "link", "set", host.interface, "mtu", str(mtu)])


def rows_of(path):
    """host -> its row in a report."""
    return dict((row["host"], row) for row in json.loads(path.read_text())["hosts"])


def test_the_largest_packet_that_passes(laboratory, tmp_path):
    lab = laboratory(clients=3, mtu=9000)
    narrow(lab, lab.clients[1], 1500)
    narrow(lab, lab.clients[2], 1400)
    report = tmp_path / "report"
    output = tmp_path / "output"
    output.mkdir()
    ends = rehearse(lab, 0.05, output, options=["--report", str(report)])
    assert [code for code, _ in ends] == [3, 0, 0, 1], ends
    rows = rows_of(report)
    assert [rows[host.name]["packet"] for host in lab.clients] == [9000, 1500, 1400]
    assert [rows[host.name]["wrong"] for host in lab.clients] == [None, None, "narrow"]
    for _, said in (ends[0], ends[3]):
        assert "packets of 1500 bytes do not reach it by multicast, though those of 1400 do" in said, said
        assert "--mtu 1400" in said, said


def test_jumbo_frames_that_not_all_take(laboratory, tmp_path):
    lab = laboratory(clients=2, mtu=9000)
    narrow(lab, lab.clients[0], 1500)
    (code, said), short, good = rehearse(lab, 0.05, tmp_path, options=["--mtu", 9000])
    assert code == 3 and "packets of 9000 bytes do not reach it by multicast, though those of 1500 do" in said, said
    assert (short[0], good[0]) == (1, 0) and "--mtu 1500" in short[1], (short, good)


def test_a_host_that_loses_much(laboratory, tmp_path):
    lab = laboratory(clients=2)
    lab.clients[0].lose(30)
    (code, said), lossy, good = rehearse(lab, 0.05, tmp_path)
    assert code == 3 and "loses more than a tenth" in said, said
    assert (lossy[0], good[0]) == (1, 0)


@pytest.mark.parametrize("left", [0, 100000])
def test_a_client_whose_output_is_on_a_full_disk(left, laboratory, small_disk, tmp_path):
    lab = laboratory(clients=2)
    (small_disk / "other").write_bytes(bytes((2 << 20) - left))
    server = helpers.start_kmcast(["check", "--minutes", 0.05, "--report", str(tmp_path / "report"), lab.server.address, 2,
                                   18383], host=lab.server)
    server.wait_stderr("waiting for")
    full, good = [helpers.start_client(["-o", str(folder / "image"), host.address, lab.server.address], host=host)
                  for host, folder in zip(lab.clients, (small_disk, tmp_path))]
    code, said, _ = full.finish(60)
    assert code == 1 and "the image cannot be written where its -o points: there is room for" in said, said
    assert good.finish(60)[0] == 0
    code, said, _ = server.finish(60)
    assert code == 3 and "multicast works for 2 of 2 clients" in said, said
    assert "%s (%s): the image cannot be written where its -o points" % (lab.clients[0].name, lab.clients[0].address) in said, said
    rows = json.loads((tmp_path / "report").read_text())["hosts"]
    assert [row["wrong"] for row in rows] == ["unwritable", None] and rows[0]["room"] < 1 << 20
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    assert not [path for path in tmp_path.iterdir() if "image" in path.name]


@pytest.mark.parametrize("what", ["drop", "reject"])
def test_a_firewall_that_keeps_clients_from_each_other(what, laboratory, tmp_path):
    lab = laboratory(clients=3)
    closed = lab.clients[1]
    firewall(closed, "input", "tcp dport 18383 %s" % what)
    ends = rehearse(lab, 0.15, tmp_path)
    assert [code for code, _ in ends] == [0] * 4, ends
    said = ends[0][1]
    assert "open TCP port 18383 there" in said and "%s: another client cannot connect to it" % closed.name in said, said
