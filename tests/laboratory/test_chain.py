"""Where multicast does not reach: a chain from client to client, and what can happen to it in mid-transfer.

The hosts' ports limit the rate, so that there is a mid-transfer.
"""

import re
import signal

import pytest

import helpers
from deployment import IMAGE, IMPATIENT, PACKETS, PATIENT, firewall, others

UNICAST = ["--unicast", "-v", "--buffer-packets", 500]     # more rounds than are under way at once
LINE = 40                               # Mbit/s of every port
SHORT = IMAGE[:5000000]                 # for many hosts


def slow_laboratory(laboratory, clients):
    lab = laboratory(clients=clients)
    for host in lab.hosts:
        host.limit(LINE, both=True)
    return lab


def deaf(hosts):
    for host in hosts:
        host.block_multicast()


def carried(run):
    """How many images went by multicast, by TCP from the server, and from client to client."""
    report = run.server.report()["carried"]
    return [report[how] / float(len(run.data)) for how in ("multicast", "tcp", "chain")]


def test_the_server_sends_the_image_once(laboratory, deploy):
    lab = slow_laboratory(laboratory, 4)
    run = deploy(lab, IMAGE, UNICAST).finish()
    run.check_complete()
    multicast, tcp, chain = carried(run)
    assert multicast == 0 and tcp < 1.5 and chain > 2.5, str(run)


def test_where_multicast_reaches_nobody_a_chain_is_made(laboratory, deploy):
    lab = slow_laboratory(laboratory, 8)
    deaf(lab.clients)
    run = deploy(lab, IMAGE, ["-v"]).finish()
    run.check_complete()
    assert carried(run)[2] > 5, str(run)


def test_two_of_eight_hear(laboratory, deploy):
    """One of them passes it on, the same from first to last; the server's line carries it once."""
    lab = slow_laboratory(laboratory, 8)
    hearing = lab.clients[2], lab.clients[6]
    deaf([host for host in lab.clients if host not in hearing])
    run = deploy(lab, IMAGE, ["-v"]).finish()
    run.check_complete()
    heads = set(re.findall(r"the chain is now: (\w+)", run.server.stderr))
    assert len(heads) == 1 and heads <= set(host.name for host in hearing), str(run)
    multicast, tcp, chain = carried(run)
    assert multicast > 0.9 and tcp < 1.5 and chain > 4, str(run)
    for client in run.clients:
        if client.host in hearing:      # the rate that is found out costs it some
            assert client.chained() == 0 and sum(client.repaired()) < 0.5 * PACKETS, str(run)
        else:
            assert client.repaired()[1] < 0.3 * PACKETS and client.chained() > 0.7 * PACKETS, str(run)


@pytest.mark.parametrize("victim", [0, 4, 15])
def test_number_of_sixteen_is_killed(victim, laboratory, deploy):
    """The others do not notice: nobody waits for it, though nobody has a time-out."""
    lab = slow_laboratory(laboratory, 16)
    run = deploy(lab, SHORT, UNICAST + PATIENT, PATIENT)
    run.wait_received(400000)
    victim = run.clients[victim]
    victim.signal(signal.SIGKILL)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)


def test_number_five_of_sixteen_is_stopped(laboratory, deploy):
    lab = slow_laboratory(laboratory, 16)
    run = deploy(lab, SHORT, UNICAST + IMPATIENT)
    run.wait_received(400000)
    victim = run.clients[4]
    victim.signal(signal.SIGSTOP)
    run.wait_end(run.server, *others(run, victim))
    victim.signal(signal.SIGCONT)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)


def test_number_five_of_sixteen_is_unplugged(laboratory, deploy):
    lab = slow_laboratory(laboratory, 16)
    run = deploy(lab, SHORT, UNICAST + IMPATIENT, IMPATIENT)
    run.wait_received(400000)
    victim = run.clients[4]
    victim.host.unplug()
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)


def test_number_five_of_sixteen_is_stopped_for_a_while(laboratory, deploy):
    lab = slow_laboratory(laboratory, 16)
    run = deploy(lab, SHORT, UNICAST)
    run.wait_received(400000)
    victim = run.clients[4]
    victim.signal(signal.SIGSTOP)
    run.server.wait_stderr("gets nothing from")
    victim.signal(signal.SIGCONT)
    run.finish()
    run.check_complete()


@pytest.mark.parametrize("what", ["drop", "reject"])
def test_a_firewall_keeps_others_from_a_client(what, laboratory, deploy):
    """It is named, with the cure, and the others take the image past it."""
    lab = slow_laboratory(laboratory, 6)
    victim = lab.clients[2]
    firewall(victim, "input", "tcp dport 18383 %s" % what)
    run = deploy(lab, IMAGE, UNICAST).finish()
    run.check_complete()
    said = run.server.stderr
    assert "cannot connect to %s" % victim.name in said and "open TCP port 18383" in said, str(run)
    assert carried(run)[2] > 2, str(run)


def test_firewalls_keep_all_from_each_other(laboratory, deploy):
    """Then it is TCP from the server for all."""
    lab = slow_laboratory(laboratory, 4)
    for host in lab.clients:
        firewall(host, "input", "tcp dport 18383 reject")
    run = deploy(lab, IMAGE, UNICAST).finish()
    run.check_complete()
    assert carried(run)[2] == 0, str(run)


def test_multicast_is_taken_away_from_all_and_given_back(laboratory, deploy):
    lab = slow_laboratory(laboratory, 4)
    data = helpers.random_bytes(30000000, seed=8)
    run = deploy(lab, data, ["-v"])
    run.wait_received(3000000)
    deaf(lab.clients)
    run.server.wait_stderr("the chain is now")
    run.wait_received(run.clients[0].consumer.size + 3000000, run.clients)
    for host in lab.clients:
        host.unblock_multicast()
    run.finish(120)
    run.check_complete()
    multicast, _, chain = carried(run)
    assert chain > 0.3 and multicast > 0.3, str(run)


def test_a_slow_port_in_the_middle_goes_to_the_end(laboratory, deploy):
    """What it cannot send it need not: all have the image, and nobody is dropped."""
    lab = slow_laboratory(laboratory, 4)
    lab.clients[1].limit_egress(8)
    run = deploy(lab, helpers.random_bytes(16000000, seed=9), UNICAST)
    run.finish(120)
    run.check_complete()
    assert "goes to the end of the chain" in run.server.stderr, str(run)
