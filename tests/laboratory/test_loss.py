"""A network that loses packets, or carries no multicast at all: the image is right, and repair is sparing."""

import time

import pytest

import helpers

IMAGE = helpers.random_bytes(6000000, seed=1)
PACKETS = -(-len(IMAGE) // 1460)

MULTICAST_MISSING = ["multicast does not reach this host", "IGMP snooping", "firewall", "LOCAL_IP"]


def lost(run):
    """The packets that the clients asked for again, in all, and of the worst."""
    each = [host["lost"] for host in run.server.report()["hosts"]]
    return sum(each), max(each)


@pytest.mark.parametrize("way", ["gso", "mmsg", "plain"])
def test_loss_at_every_client(laboratory, deploy, way):
    lab = laboratory()
    for host in lab.clients:
        host.lose(5)
    run = deploy(lab, IMAGE, ["--datagrams", way], ["--datagrams", way])
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert sum(client.repaired()) > 0.02 * PACKETS, str(run)    # else this was no test


def test_loss_at_every_client_with_the_oldest_and_the_newest_interpreter(laboratory, deploy):
    """Run by tests/run.sh: 2.7 and the newest 3; each is the server once, and the clients are both."""
    for server in (helpers.oldest(), helpers.newest()):
        lab = laboratory()
        for host in lab.clients:
            host.lose(2)
        run = deploy(lab, IMAGE, server_python=server, client_python=[helpers.oldest(), helpers.newest()])
        run.finish()
        run.check_complete()


def test_little_loss_at_every_client(laboratory, deploy):
    lab = laboratory()
    for host in lab.clients:
        host.lose(1)
    run = deploy(lab, IMAGE)
    run.finish()
    run.check_complete()
    assert lost(run)[0] > 0.01 * PACKETS, str(run)


def test_heavy_loss(laboratory, deploy):
    """More than half: too much for coding, so what is left comes by TCP."""
    lab = laboratory(clients=2)
    lab.clients[0].lose(70)
    lab.clients[1].lose(30)
    run = deploy(lab, IMAGE, ["--rate", "200M"])
    run.finish()
    run.check_complete()
    assert sum(run.clients[0].repaired()) > 0.5 * PACKETS, str(run)
    assert run.clients[0].repaired()[1] > 0.4 * PACKETS, str(run)


def test_loss_shared_by_all_is_repaired_by_multicast(laboratory, deploy):
    """What all have lost is sent once more to all, not once to each."""
    lab = laboratory()
    lab.server.lose_egress(2)
    run = deploy(lab, IMAGE)
    run.finish()
    run.check_complete()
    in_all, worst = lost(run)
    by_multicast, by_tcp = run.repair()
    assert worst > 0.01 * PACKETS, str(run)
    assert by_multicast > 0, str(run)
    assert by_multicast + by_tcp < 0.6 * in_all, str(run)


def test_independent_losses_are_repaired_by_multicast(laboratory, deploy):
    """Each client has lost other packets, and yet one combination repairs a loss of several of them."""
    lab = laboratory(clients=8)
    for host in lab.clients:
        host.lose(2)
    run = deploy(lab, IMAGE)
    run.finish()
    run.check_complete()
    in_all, _ = lost(run)
    by_multicast, by_tcp = run.repair()
    assert in_all > 8 * 0.01 * PACKETS, str(run)
    assert by_multicast > 0, str(run)
    assert by_multicast + by_tcp < 0.6 * in_all, str(run)
    for client in run.clients:
        assert client.repaired()[0] > 0, str(run)


def test_loss_at_clients_of_two_tcp_threads(laboratory, deploy):
    """What clients of one thread ask for is coded together with what those of the other do."""
    lab = laboratory(clients=8)
    for host in lab.clients:
        host.lose(2)
    run = deploy(lab, IMAGE, ["--clients-per-thread", 4])
    run.finish()
    run.check_complete()
    in_all, _ = lost(run)
    by_multicast, by_tcp = run.repair()
    assert by_multicast > 0, str(run)
    assert by_multicast + by_tcp < 0.6 * in_all, str(run)


def test_image_that_is_no_multiple_of_a_payload_with_loss(laboratory, deploy):
    """The short last packet is lost like others, and is a member of combinations like others."""
    lab = laboratory()
    for host in lab.clients:
        host.lose(60)
    for size in (1, 1461, 64 * 1460 + 1):
        run = deploy(lab, IMAGE[:size])
        run.finish()
        run.check_complete()


#: With a chain, and the old way: from the server by TCP.
CHAINS = pytest.mark.parametrize("chain", ["auto", "never"])


@CHAINS
def test_multicast_missing_at_one_client(laboratory, deploy, chain):
    """It gets everything from another client, or by TCP, and says what the cause may be; the others lose nothing by it."""
    lab = laboratory()
    lab.clients[1].block_multicast()
    run = deploy(lab, IMAGE, ["--rate", "40M", "--chain", chain])
    run.finish()
    run.check_complete()
    for client in run.clients:
        warned = [text in client.stderr for text in MULTICAST_MISSING]
        if client.host is lab.clients[1]:
            assert all(warned), str(run)
            check_deaf(run, client, chain == "auto")
        else:
            assert not any(warned), str(run)
            assert sum(client.repaired()) < 0.2 * PACKETS and client.chained() == 0, str(run)
    assert "no client receives multicast" not in run.server.stderr, str(run)


@CHAINS
def test_multicast_missing_at_all_clients(laboratory, deploy, chain):
    """The server notices, says what the cause may be, and serves one of them by TCP, which serves the next; or all."""
    lab = laboratory()
    for host in lab.clients:
        host.block_multicast()
    run = deploy(lab, IMAGE, ["--rate", "20M", "--chain", chain])
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert all(text in client.stderr for text in MULTICAST_MISSING), str(run)
        check_deaf(run, client, chain == "auto" and client.host is not lab.clients[0])
    assert "no client receives multicast, all is sent " + {
        "auto": "in a chain from client to client", "never": "by TCP"}[chain] in run.server.stderr, str(run)
    assert all(text in run.server.stderr for text in MULTICAST_MISSING[1:]), str(run)


def check_deaf(run, client, follows):
    """Fail unless no packet came to a client by multicast: most from another client if it `follows` one, else all by TCP."""
    coded, by_tcp = client.repaired()
    assert coded == 0 and by_tcp + client.chained() == PACKETS, str(run)
    assert by_tcp < 0.5 * PACKETS if follows else by_tcp == PACKETS, str(run)
    assert "everything came " + ("from another client" if follows else "by TCP") in client.stderr, str(run)


@CHAINS
def test_multicast_that_comes_back_is_used_again(laboratory, deploy, chain):
    lab = laboratory(clients=2)
    for host in lab.clients:
        host.block_multicast()
    slowly = (IMAGE[at:at + 100000] for at in range(0, len(IMAGE), 100000))

    def produce():
        for number, piece in enumerate(slowly):
            if number == 30:
                run.server.wait_stderr("no client receives multicast")
                for host in lab.clients:
                    host.unblock_multicast()
            if number < 30 or "multicast gets through" not in run.server.stderr:        # then the rest at once
                time.sleep(0.04)
            yield piece

    run = deploy(lab, IMAGE, ["--buffer-packets", "256", "--chain", chain], stdin=produce())
    run.finish()
    run.check_complete()
    assert "multicast gets through" in run.server.stderr, str(run)
    for client in run.clients:
        assert 0.3 * PACKETS < sum(client.repaired()) + client.chained() < 0.9 * PACKETS, str(run)
        follows = chain == "auto" and client.host is not lab.clients[0]
        assert client.chained() > 0.2 * PACKETS if follows else client.chained() == 0, str(run)


@CHAINS
def test_unicast(laboratory, deploy, chain):
    """--unicast: nothing is multicast, and nobody is warned that nothing came."""
    run = deploy(laboratory(clients=2), IMAGE, ["--unicast", "--chain", chain])
    run.finish()
    run.check_complete()
    first, second = run.clients
    for client in run.clients:
        assert client.repaired()[0] == 0 and client.repaired()[1] + client.chained() == PACKETS, str(run)
        assert "warning" not in client.stderr, str(run)
    assert first.chained() == 0, str(run)
    assert second.chained() > 0.5 * PACKETS if chain == "auto" else second.chained() == 0, str(run)
    assert "warning" not in run.server.stderr, str(run)


@pytest.mark.parametrize("slow", ["one port of 100 Mbit/s", "all ports of 100 Mbit/s"])
def test_slow_port_loses_little(laboratory, deploy, slow):
    """`--rate auto` finds the rate of the slowest link instead of losing what does not fit, which would be most of it."""
    lab = laboratory()
    image = IMAGE * 8                           # on a busy machine it takes some rounds to find out
    for host in lab.clients[:1] if slow.startswith("one") else lab.clients:
        host.limit(100)
    run = deploy(lab, image, ["-v"])
    run.finish()
    run.check_complete()
    packets = -(-len(image) // 1460)
    assert lost(run)[1] < 0.4 * packets, str(run)
    assert "rate now" in run.server.stderr, str(run)
