"""A client ends in mid-transfer: the others have the image in time, and the server knows.

Each test brings one fault into a transfer between real processes that is slow enough (--rate) to be disturbed.
"""

import signal
import subprocess

import pytest

import helpers
from deployment import IMAGE, MIB, PATIENT, RATE, no_file, others


def test_client_killed(laboratory, deploy):
    """The others do not notice: nobody waits for it, though nobody has a time-out."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + PATIENT, PATIENT)
    run.wait_received()
    victim = run.clients[1]
    victim.signal(signal.SIGKILL)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)


def test_all_clients_killed(laboratory, deploy):
    """A server whom nobody is left to listen to stops, though its producer is not at its end and it has no time-out."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, PATIENT, stdin=helpers.PIPE)
    run.server.popen.stdin.write(IMAGE[:MIB])
    run.wait_received(MIB // 4)
    for client in run.clients:
        client.signal(signal.SIGKILL)
    run.wait_end(run.server)
    run.server.popen.stdin.close()
    run.check_server(1, *lab.clients)
    assert "no client is left" in run.server.stderr, str(run)


def test_disk_full(laboratory, deploy, tmp_path):
    """That client fails with the reason, the server lists it, the others go on; nothing is left on the disk."""
    lab = laboratory()
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "kmlab", str(full)], check=True)
    try:
        run = deploy(lab, IMAGE, RATE, clients=3, places=4)
        victim = run.add_client(lab.clients[3], output=str(full / "image"))
        run.finish()
        no_file(full)
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    for said in (victim.stderr, run.server.stderr):
        assert "No space left on device" in said, str(run)


def test_consumer_exits(laboratory, deploy):
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE, clients=3, places=4)
    head = helpers.start(["head", "-c", "1000000"], stdin=helpers.PIPE, stdout=helpers.HASH)
    victim = run.add_client(lab.clients[3], stdout=head.popen.stdin)
    head.popen.stdin.close()
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    assert head.finish()[2] == helpers.sha256(IMAGE[:1000000])
    for said in (victim.stderr, run.server.stderr):
        assert "what reads the image has ended" in said, str(run)


def test_output_closed(laboratory, deploy):
    """A client that has no standard output fails with the reason, the server lists it, the others go on."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, RATE, clients=1, places=2)
    victim = run.add_client(lab.clients[1], prefix=["sh", "-c", 'exec "$0" "$@" >&-'], consumer=None,
                            stdout=subprocess.DEVNULL)
    run.finish()
    run.check_complete(run.clients[0])
    run.check_failed(victim)
    run.check_server(3, victim.host)
    for said in (victim.stderr, run.server.stderr):
        assert "cannot write" in said, str(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_client_told_to_stop(laboratory, deploy, tmp_path, number):
    """It leaves no file, and tells the server why it goes."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, RATE, clients=1, places=2)
    victim = run.add_client(lab.clients[1], output=str(tmp_path / "image"))
    run.wait_received(clients=run.clients[:1])
    victim.signal(number)
    run.finish()
    run.check_complete(run.clients[0])
    run.check_failed(victim)
    run.check_server(3, victim.host)
    no_file(tmp_path)
    assert "it says: stopped by " in run.server.stderr, str(run)
