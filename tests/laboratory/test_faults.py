"""What happens to one client in mid-transfer, and what must follow: the others have the image in time, the server knows.

Each test brings one fault into a transfer between real processes that is slow enough (--rate) to be disturbed.
"""

import signal
import subprocess
import time

import pytest

import helpers
from deployment import IMAGE, IMPATIENT, MIB, PATIENT, RATE, SLACK, SLOW, Consumer, no_file, others


def test_client_killed(laboratory, deploy):
    """The others do not notice: far less than any time-out is lost."""
    lab = laboratory()
    undisturbed = deploy(lab, IMAGE, RATE).finish().seconds
    run = deploy(lab, IMAGE, RATE)
    run.wait_received()
    victim = run.clients[1]
    victim.signal(signal.SIGKILL)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    assert run.seconds < undisturbed + 1 + SLACK, str(run)


def test_all_clients_killed(laboratory, deploy):
    """A server whom nobody is left to listen to stops at once, though its producer goes on."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, SLOW)
    run.wait_received(500000)
    for client in run.clients:
        client.signal(signal.SIGKILL)
    run.wait_end(run.server, timeout=SLACK)
    run.check_server(1, *lab.clients)
    assert "no client is left" in run.server.stderr, str(run)


def test_client_stopped(laboratory, deploy):
    """A hung host is dropped after --stall-timeout, and is told why in case that it wakes up."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT)
    run.wait_received()
    victim = run.clients[2]
    victim.signal(signal.SIGSTOP)
    run.wait_end(run.server, timeout=20 + SLACK)
    victim.signal(signal.SIGCONT)
    run.finish(SLACK)
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    assert "stalled" in run.server.stderr, str(run)
    assert "stalled" in victim.stderr, str(run)


def test_consumer_stops_reading(laboratory, deploy):
    """The client itself is well, but its output has not moved for --stall-timeout."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT)
    run.wait_received(400000)
    victim = run.clients[0]
    victim.consumer.stop()
    run.wait_end(run.server, victim, timeout=20 + SLACK)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    assert "the server says: stalled" in victim.stderr, str(run)


def test_consumer_slow_but_moving(laboratory, deploy):
    """It takes longer for a round than --stall-timeout allows for silence; ALIVE tells that it is at work."""
    lab = laboratory(clients=2)
    began = []

    def pace(size):
        """From the fifth round on, which is of 1.5 MB, 64 KiB every 0.55 s, for 11 s."""
        if size < 1400000 or began and time.monotonic() > began[0] + 11:
            return 0
        began[:] = began or [time.monotonic()]
        return 0.55

    limit = ["--stall-timeout", "7"]
    run = deploy(lab, IMAGE, RATE + limit, limit, consumers=[Consumer(pace), Consumer()])
    run.finish()
    run.check_complete()
    assert time.monotonic() - began[0] > 11, str(run)


def test_cable_pulled_and_plugged_in_again(laboratory, deploy):
    """Within 5 s nothing happens at all: no time-out is that short."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE)
    run.wait_received()
    lab.clients[1].unplug()
    time.sleep(4.5)
    lab.clients[1].plug()
    run.finish()
    run.check_complete()
    assert run.clients[1].repaired()[1] > 0, str(run)       # it did miss something
    assert run.seconds > 4.5, str(run)


def test_cable_pulled_for_good(laboratory, deploy):
    """Dropped within 20 s by the kernel's clocks alone; the client gives up by its own --stall-timeout."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + PATIENT, lambda number: IMPATIENT if number == 3 else PATIENT)
    run.wait_received()
    victim = run.clients[3]
    victim.host.unplug()
    pulled = time.monotonic()
    run.wait_end(victim, timeout=3 + SLACK)
    run.server.wait_stderr(victim.host.name + " (%s): it went away" % victim.host.address, timeout=20)
    assert time.monotonic() - pulled < 20
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)


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
    assert head.finish(SLACK)[2] == helpers.sha256(IMAGE[:1000000])
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


def test_client_that_has_waited_for_another_still_takes_multicast(laboratory, deploy):
    """A client that is kept waiting is told ALIVE. It must go on to take datagrams then: not everyone is root and has a
    socket buffer for a whole round, and what is not taken must be repaired by TCP."""
    lab = laboratory(clients=2)
    waiting, holding_up = lab.clients
    image = IMAGE * 3

    pauses = [7]                            # seconds

    def pause(size):
        """Once, in the sixth round, so that the eighth, the longest, has to wait: two may be in the client."""
        return pauses.pop() if size > 4 * MIB and pauses else 0

    run = deploy(lab, image, ["--rate", "100M"], clients=0, places=2)
    other = run.add_client(holding_up, consumer=Consumer(pause))
    # Without this capability, which SO_RCVBUFFORCE takes, the socket buffer is what net.core.rmem_max grants.
    client = run.add_client(waiting, prefix=["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all", "--"])
    run.finish()
    run.check_complete()
    assert run.seconds > 7, str(run)
    assert "waiting for " + holding_up.name in run.server.stderr, str(run)
    assert sum(other.repaired()) < 1000, str(run)           # multicast was fine
    assert sum(client.repaired()) < 1000, str(run)
