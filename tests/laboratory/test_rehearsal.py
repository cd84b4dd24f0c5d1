"""kmcast check where the network, or a firewall, takes multicast away: who is concerned, and what to do."""

import json
import subprocess
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


def rehearse(lab, minutes, tmp_path, meanwhile=None):
    """A rehearsal with all hosts; returns (exit code, stderr) of the server and of each client."""
    server = helpers.start_kmcast(["check", "--minutes", minutes, lab.server.address, len(lab.clients), 18383], host=lab.server)
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
