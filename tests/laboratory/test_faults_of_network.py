"""Datagrams that are not as they were sent, and datagrams of others: the image is right."""

import os
import re
import signal
import struct
import sys

import pytest

import helpers
from deployment import IMAGE, PACKETS, RATE, firewall

RELAY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "relay.py")


def start_relay(run, host, way, as_whom, port=18383):
    """Start relay.py on a host; a Process."""
    relay = helpers.start(host.command([sys.executable, RELAY, host.address, run.lab.server.address, helpers.GROUP,
                                        str(port), way, as_whom]))
    run.others.append(relay)
    relay.wait_stderr("ready")
    return relay


def relayed(relay):
    """End the relay; how many datagrams it has sent."""
    relay.signal(signal.SIGTERM)
    code, stderr, _ = relay.finish()
    assert code == 0, stderr
    return int(re.search(r"sent (\d+) datagrams", stderr).group(1))


#: What the relay does, and the percentage of all datagrams that a client loses where the right ones come as well: so many that
#: there are coded repairs, which are tampered with too.
WAYS = {"shuffle": 30, "twice": 40, "later": 10, "damage": 20, "forge": 10}


SIZE = 2500000
#: Of these nothing can be used where the right ones do not come as well.
USELESS = ("later", "forge")


@pytest.mark.parametrize("way, instead, chain", [
    (way, instead, "auto") for instead in (True, False) for way in sorted(WAYS)] + [
    (way, True, "never") for way in USELESS])
def test_datagrams_tampered_with(laboratory, deploy, way, instead, chain):
    """The clients get what a relay made of the datagrams, instead of or besides the right ones."""
    lab = laboratory(clients=4)
    receivers, spare = lab.clients[:3], lab.clients[3]
    for host in receivers:
        if instead:
            firewall(host, "input", "ip ttl 8 ip daddr 224.0.0.0/4 drop")
        else:
            host.lose(WAYS[way])
    run = deploy(lab, IMAGE[:SIZE], ["--rate", "20M", "--buffer-packets", "64" if instead else "128", "--chain", chain],
                 clients=0, places=3)
    # What others forge from their own address is nothing to a client.
    relay = start_relay(run, spare, way, "stranger" if way == "forge" and not instead else "server")
    for host in receivers:
        run.add_client(host)
    run.finish()
    run.check_complete()
    packets = -(-SIZE // 1460)
    # With nothing but forgeries or what comes too late the server gives multicast up, but for its probes.
    assert relayed(relay) > (0.1 if instead and way in USELESS else 0.5) * packets, str(run)
    for client in run.clients:
        otherwise = client.repaired()[1] + client.chained() # than by multicast
        if instead and way in USELESS:
            assert otherwise > 0.9 * packets, str(run)
        elif instead:
            assert otherwise < 0.8 * packets, str(run)      # it did take what the relay sent
        else:
            assert otherwise < 0.3 * packets, str(run)      # and it was not kept from the right ones
            assert client.repaired()[0] > 20, str(run)
    chained = sum(client.chained() for client in run.clients)
    if chain == "never":
        assert chained == 0, str(run)
    elif instead and way == "later":
        assert chained > packets, str(run)                  # by two of three clients


@pytest.mark.parametrize("compat", [False, True], ids=["session", "base protocol"])
def test_flood_of_noise(laboratory, deploy, compat):
    """Random datagrams on the group do not keep a client from the right ones, nor from the end of a round, be
    it that the last packet of the round is lost."""
    lab = laboratory(clients=4)
    for host in lab.clients[:3]:
        host.lose(30)
    args = RATE + (["--compat"] if compat else [])
    run = deploy(lab, IMAGE, args, clients=0, places=3)
    relay = start_relay(run, lab.clients[3], "noise", "stranger")
    for host in lab.clients[:3]:
        run.add_client(host)
    run.finish(30)
    run.check_complete()
    assert relayed(relay) > 1000, str(run)
    for client in run.clients:
        assert sum(client.repaired()) < 0.7 * PACKETS, str(run)


def test_two_servers_on_one_group_and_port(laboratory, deploy):
    """Two images at once; on every host there is a client of each server."""
    lab = laboratory()
    second = lab.clients[3]
    other_image = helpers.random_bytes(len(IMAGE), seed=4)
    hosts = lab.clients[:3]
    for host in hosts:
        host.lose(2)
    runs = [deploy(lab, IMAGE, RATE, clients=3), deploy(lab, other_image, RATE, clients=3, on_server=second)]
    for run in runs:
        run.finish()
        run.check_complete()
        for client in run.clients:
            assert sum(client.repaired()) < 0.4 * PACKETS, str(run)


@pytest.mark.parametrize("first", [2**31 - 64, 2**31 - 1000, 2**31 - 1, 2**31 - 100])
def test_sequence_numbers_that_wrap(laboratory, deploy, first):
    """More than 2^31 packets: here the wrap comes after the first round, which is cut short, or later."""
    lab = laboratory()
    for host in lab.clients:
        host.lose(3)
    run = deploy(lab, IMAGE[:3000000], ["--rate", "20M"], server={"change": "kmcast.Course.FIRST_SEQ = %d" % first})
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert 0 < sum(client.repaired()) < 0.3 * 3000000 / 1460, str(run)
    assert run.repair()[0] > 0, str(run)


def test_packet_seqs_start_where_the_hook_says(laboratory, deploy):
    """What the test above rests on."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE[:20 * 1460], ["--rate", "5M"], clients=0, places=1,
                 server={"change": "kmcast.Course.FIRST_SEQ = 2**31 - 6"})
    spy = helpers.start(lab.clients[1].command([sys.executable, "-c", SPY, lab.clients[1].address, helpers.GROUP]))
    spy.wait_stderr("ready")
    run.add_client(lab.clients[0])
    run.finish()
    run.check_complete()
    code, _, seqs = spy.finish()
    assert struct.unpack("<20I", seqs) == tuple((2**31 - 6 + i) % 2**31 for i in range(20))


SPY = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[2], 18383))
sock.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(sys.argv[2]) + socket.inet_aton(sys.argv[1]))
sock.settimeout(20)
sys.stderr.write('ready')
sys.stderr.flush()
for _ in range(20):
    sys.stdout.buffer.write(sock.recv(2000)[:4])
"""
