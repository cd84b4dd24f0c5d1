"""The base protocol on a network that loses packets: peers that know nothing of sessions, on both sides of kmcast."""

import time

import pytest

import helpers

# At 1460 bytes a packet: several buffers, the last of them and its last packet short.
IMAGE = helpers.random_bytes(3000000, seed=2)
PACKETS = -(-len(IMAGE) // 1460)


def base_clients(run, hosts, *options):
    """Start base_peer's client on each of these hosts; they exit 1 where --compat breaks a promise."""
    for seed, host in enumerate(hosts):
        run.add_client(host, list(options) + ["--seed", seed], program=helpers.BASE_PEER)


def serve_base(deploy, lab, server_args=(), **options):
    """Deploy with base_peer's server, and kmcast's clients, which get no option at all."""
    return deploy(lab, IMAGE, server_args, server={"start": helpers.start_base_server}, **options)


# --- base-protocol clients ---

@pytest.mark.parametrize("loss", [0, 5])
def test_base_clients_of_a_compat_server(laboratory, deploy, loss):
    lab = laboratory()
    for host in lab.clients:
        host.lose(loss)
    run = deploy(lab, IMAGE, ["--compat"], clients=0, places=4)
    base_clients(run, lab.clients)
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert not loss or ", 0 packets repaired" not in client.stderr, str(run)


def test_one_base_client_of_a_compat_server(laboratory, deploy):
    lab = laboratory(clients=1)
    lab.clients[0].lose(10)
    run = deploy(lab, IMAGE, ["--compat", "--buffer-packets", 100], clients=0, places=1)
    base_clients(run, lab.clients)
    run.finish()
    run.check_complete()


def test_base_clients_without_multicast(laboratory, deploy):
    """One client, then all of them, get no multicast: all that they miss comes by TCP."""
    lab = laboratory(clients=3)
    for without in (lab.clients[:1], lab.clients):
        for host in without:
            host.block_multicast()
        run = deploy(lab, IMAGE, ["--compat"], clients=0, places=3)
        base_clients(run, lab.clients)
        run.finish()
        run.check_complete()
        for client in run.clients:
            assert (" %d packets repaired" % PACKETS in client.stderr) == (client.host in without), str(run)


def test_base_clients_and_kmcast_clients_of_one_compat_server(laboratory, deploy):
    """To a kmcast client a compat server is a base-protocol server like others, so the two can be mixed."""
    lab = laboratory()
    for host in lab.clients:
        host.lose(3)
    run = deploy(lab, IMAGE, ["--compat"], clients=2, places=4)
    base_clients(run, lab.clients[2:])
    run.finish()
    run.check_complete()


def test_base_clients_of_two_tcp_threads(laboratory, deploy):
    lab = laboratory(clients=5)
    for host in lab.clients:
        host.lose(2)
    run = deploy(lab, IMAGE, ["--compat", "--clients-per-thread", 2], clients=0, places=5)
    base_clients(run, lab.clients)
    run.finish()
    run.check_complete()


def test_base_client_that_is_killed_does_not_stop_the_others(laboratory, deploy):
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE * 2, ["--compat", "--rate", "40M"], clients=0, places=3)
    base_clients(run, lab.clients)
    run.wait_received(400000)
    run.clients[1].signal(9)
    run.finish()
    run.check_complete(run.clients[0], run.clients[2])
    assert run.server.poll() == 3, str(run)
    assert lab.clients[1].address + " does not have the image" in run.server.stderr, str(run)


# --- base-protocol servers ---

@pytest.mark.parametrize("server_args", [
    [],
    ["--short"],
    ["--first-buffer-id", 1, "--checksum", "crc"],
    ["--buffer-packets", 500, "--drop", 5],
], ids=lambda args: " ".join(map(str, args)) or "as the C implementation")
def test_kmcast_clients_of_a_base_server(laboratory, deploy, server_args):
    """They find out by themselves: which protocol, which checksum, and that any packet may be short."""
    lab = laboratory()
    for host in lab.clients:
        host.lose(5)
    run = serve_base(deploy, lab, server_args)
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert client.repaired()[1] > 0, str(run)


def test_one_kmcast_client_of_a_base_server(laboratory, deploy):
    lab = laboratory(clients=1)
    lab.clients[0].lose(10)
    run = serve_base(deploy, lab)
    run.finish()
    run.check_complete()


def test_kmcast_client_of_a_base_server_without_multicast(laboratory, deploy):
    """The checksum can be found out from packets that come by TCP, too."""
    lab = laboratory(clients=2)
    for host in lab.clients:
        host.block_multicast()
    for checksum in ("sum", "crc"):
        run = serve_base(deploy, lab, ["--checksum", checksum])
        run.finish()
        run.check_complete()
        for client in run.clients:
            assert "multicast does not reach this host" in client.stderr, str(run)


def test_kmcast_clients_and_base_clients_of_one_base_server(laboratory, deploy):
    lab = laboratory()
    for host in lab.clients:
        host.lose(3)
    run = serve_base(deploy, lab, clients=2, places=4)
    base_clients(run, lab.clients[2:], "--any-padding", "--any-short")
    run.finish()
    run.check_complete()


def test_kmcast_clients_fail_when_a_base_server_is_killed(laboratory, deploy):
    """The base protocol has no digest and no BYE, so only its last round ends an image."""
    def slowly():
        for at in range(0, len(IMAGE), 50000):
            time.sleep(0.03)
            yield IMAGE[at:at + 50000]

    run = serve_base(deploy, laboratory(clients=2), ["--buffer-packets", 100], stdin=slowly())
    run.wait_received(300000)
    run.server.signal(9)
    run.finish(20)
    run.check_failed(*run.clients)
