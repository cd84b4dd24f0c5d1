"""A host whose client is started twice before the transfer: one place is enough for it, and the later client has it."""

import signal

import pytest

import helpers
from deployment import IMAGE
from pythons import BOTH


@pytest.fixture
def run(laboratory, deploy, python, a_thread):
    """A deployment to three hosts, all with one place, of which the first one's client is here."""
    lab = laboratory(clients=3)
    made = deploy(lab, IMAGE, ["--clients-per-thread", a_thread], clients=0, places=3, server_python=python)
    made.add_client(lab.clients[0], python=python)
    made.server.wait_stderr("is here, 1 of 3")
    return made


def all_hosts_get_in(run, python):
    """Start a client on each of the three hosts, and fail unless all of these get the image, and the server says so."""
    clients = []
    for host in run.lab.clients:
        run.add_client(host, python=python)
        clients.append(run.clients[-1])
        clients[-1].wait_stderr("connected to")
    run.wait_end(run.server, *clients)
    run.check_complete(*clients)
    run.check_server(0)


def was_replaced(run, client):
    """Fail unless a client has ended as one that was not needed any more."""
    assert run.wait_end(client) == [3], str(run)
    assert len([line for line in client.stderr.splitlines() if "replaced" in line]) == 1, client.stderr
    assert client.received() == b""


@BOTH
@pytest.mark.parametrize("a_thread", [1, 64])
def test_the_later_client_of_a_host_replaces_the_earlier(run, python):
    """Else a host that was installed twice would keep another one out."""
    all_hosts_get_in(run, python)
    was_replaced(run, run.clients[0])


@BOTH
@pytest.mark.parametrize("a_thread", [1, 64])
def test_a_client_that_hangs_is_replaced_as_well(run, python):
    """As one of a host that was switched off and on again: its connection is there, and nobody at its other end."""
    run.clients[0].signal(signal.SIGSTOP)
    all_hosts_get_in(run, python)
    run.clients[0].signal(signal.SIGCONT)
    was_replaced(run, run.clients[0])


@BOTH
def test_on_loopback_every_client_has_a_place(laboratory, python):
    """Where a host tries out how it works, with as many clients as it likes."""
    prefix = laboratory(clients=1).server.command([])
    server = helpers.start_server(["127.0.0.1", 3], python, stdin=b"data", prefix=prefix)
    clients = [helpers.start_client(["127.0.0.1", "127.0.0.1"], python, prefix=prefix) for _ in range(3)]
    for client in clients:
        assert client.finish(20)[::2] == (0, b"data"), client.stderr
    assert server.finish(20)[0] == 0
