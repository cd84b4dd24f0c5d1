"""What happens to the server in mid-transfer: no client hangs, and none takes a part for the whole."""

import signal

import pytest

import helpers
from deployment import (
    IMAGE, IMPATIENT, PACKETS, PATIENT, RATE, SLOW, firewall, no_file, others)


def test_server_killed(laboratory, deploy, tmp_path):
    """Every client exits 1, though it has no --stall-timeout, and no file appears."""
    run = deploy(laboratory(), IMAGE, SLOW, PATIENT, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGKILL)
    run.wait_end(*run.clients)
    run.check_failed(*run.clients)
    no_file(tmp_path)


def test_server_stopped(laboratory, deploy, tmp_path):
    """Every client exits 1 within its --stall-timeout, and no file appears."""
    run = deploy(laboratory(), IMAGE, SLOW, IMPATIENT, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGSTOP)
    run.wait_end(*run.clients)
    run.check_failed(*run.clients)
    assert all("the server has been silent for 3 s" in client.stderr for client in run.clients), str(run)
    no_file(tmp_path)
    run.server.signal(signal.SIGCONT)
    run.finish()
    run.check_server(1, *run.lab.clients)


def test_server_unplugged(laboratory, deploy, tmp_path):
    """The same, and the server gives up, too."""
    lab = laboratory()
    run = deploy(lab, IMAGE, SLOW + IMPATIENT, IMPATIENT, outputs=tmp_path)
    run.wait_packets(lab.server, 1000)
    lab.server.unplug()
    run.wait_end(*run.clients)
    run.check_failed(*run.clients)
    assert all("the server has been silent for 3 s" in client.stderr for client in run.clients), str(run)
    no_file(tmp_path)
    run.finish()
    run.check_server(1, *lab.clients)


def test_server_told_to_stop(laboratory, deploy, tmp_path):
    """The clients are told, and say why."""
    run = deploy(laboratory(clients=2), IMAGE, SLOW, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGINT)
    run.finish()
    run.check_server(1, *run.lab.clients)
    run.check_failed(*run.clients)
    no_file(tmp_path)
    for client in run.clients:
        assert "the server says: stopped by SIGINT" in client.stderr, str(run)


@pytest.mark.parametrize("thread", ["first", "second"])
@pytest.mark.parametrize("chain, step, time", [
    ("auto", "announce", 6), ("auto", "sent", 6), ("auto", "chain", 1), ("auto", "repair", 1),
    ("never", "announce", 6), ("never", "sent", 6), ("never", "repair", 6)])
def test_a_thread_of_the_server_dies(laboratory, deploy, tmp_path, thread, chain, step, time):
    """Of an exception that nobody expects, in mid-transfer: all are told, and nothing hangs.

    There are never six rounds under way, so before the sixth time all clients have got something.
    """
    change = DIES.format(step=step, time=time, mine="not " * (thread == "second") + "self.child")
    lab = laboratory(clients=3)
    lab.clients[0].block_multicast()        # so that there is a chain to make, or something to repair in each round
    run = deploy(lab, IMAGE, RATE + ["--clients-per-thread", "2", "--chain", chain], outputs=tmp_path,
                 server={"change": change})
    run.finish()
    assert run.server.poll() == 1 and "internal error: ZeroDivisionError" in run.server.stderr, str(run)
    for client in run.clients:
        assert client.code == 1 and "the server says: internal error: ZeroDivisionError" in client.stderr, str(run)
    no_file(tmp_path)


DIES = """
right = kmcast.TcpServer._begin
rounds = []

def wrong(self, step):
    if step.kind == "{step}" and {mine}:
        rounds.append(step)
        if len(rounds) == {time}:
            1 // 0
    return right(self, step)

kmcast.TcpServer._begin = wrong
"""


@pytest.mark.parametrize("where", ["Writer._write", "Client._listen"])
def test_a_client_meets_an_error_of_its_own(laboratory, deploy, where):
    """An exception that nobody expects, in one of its threads: it fails, the server lists it, the others go on."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2, places=3)
    victim = run.add_client(lab.clients[2], change="def wrong(*args):\n    1 // 0\nkmcast.%s = wrong" % where)
    run.finish()
    run.check_complete(*others(run, victim))
    assert victim.code == 1 and "internal error" in victim.stderr, str(run)
    assert run.server.poll() == 3 and victim.host.name + " (" in run.server.stderr, str(run)


def test_server_cut_off_from_multicast_by_its_firewall(laboratory, deploy):
    """Sending fails with EPERM from now on: the server says so, and all the rest goes by TCP."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE)
    run.wait_received()
    firewall(lab.server, "output", "meta l4proto udp drop")
    run.finish()
    run.check_complete()
    assert "Operation not permitted" in run.server.stderr, str(run)
    for client in run.clients:
        assert client.repaired()[1] > 0.3 * PACKETS, str(run)


def test_server_cut_off_from_one_client_by_a_firewall(laboratory, deploy):
    """TCP to one host is dropped without a word: that host goes by a time-out, the others do not lose more than that."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT, lambda number: IMPATIENT if number == 0 else PATIENT)
    run.wait_received()
    victim = run.clients[0]
    firewall(lab.server, "output", "ip daddr %s meta l4proto tcp drop" % victim.host.address)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_failed(victim)
    run.check_server(3, victim.host)


def test_client_does_not_take_itself_for_the_server(laboratory):
    """Who connects to a port of its own host on which nobody listens may get that port for its own end, and so itself."""
    host = laboratory(clients=1).clients[0]
    host.run(["sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40001"])
    client = helpers.start(host.command([helpers.newest(), helpers.KMCAST, "client", "--wait", "2",
                                         "127.0.0.1", "127.0.0.1", "40000"]))
    code, stderr, _ = client.finish()
    assert code == 3 and "no kmcast server at 127.0.0.1 port 40000: Connection refused" in stderr, stderr
