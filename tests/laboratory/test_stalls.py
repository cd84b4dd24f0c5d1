"""A client gets nothing done, or little: who hangs is dropped in time, who moves is waited for.

Each test brings one fault into a transfer between real processes that is slow enough (--rate) to be disturbed.
"""

import signal

from deployment import IMAGE, IMPATIENT, MIB, RATE, Consumer, others


def test_client_stopped(laboratory, deploy):
    """A hung host is dropped after --stall-timeout, and is told why in case that it wakes up."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT)
    run.wait_received()
    victim = run.clients[2]
    victim.signal(signal.SIGSTOP)
    run.wait_end(run.server)
    victim.signal(signal.SIGCONT)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    assert "stalled: for 3 s " in run.server.stderr, str(run)
    assert "stalled: for 3 s " in victim.stderr, str(run)


def test_consumer_stops_reading(laboratory, deploy):
    """The client itself is well, but its output has not moved for --stall-timeout."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT)
    run.wait_received(400000)
    victim = run.clients[0]
    victim.consumer.stop()
    run.wait_end(run.server, victim)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    assert "the server says: stalled: for 3 s " in victim.stderr, str(run)


def test_consumer_slow_but_moving(laboratory, deploy):
    """It takes longer for a round than --stall-timeout allows for silence; ALIVE tells that it is at work."""
    lab = laboratory(clients=2)
    pauses = 20 * [0.55]                    # seconds

    def pace(size):
        """From the fifth round on, which is of 1.5 MB, 64 KiB every 0.55 s, for 11 s."""
        return pauses.pop() if size > 1400000 and pauses else 0

    limit = ["--stall-timeout", "7"]
    run = deploy(lab, IMAGE, RATE + limit, limit, consumers=[Consumer(pace), Consumer()])
    run.finish()
    run.check_complete()
    assert not pauses, str(run)


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
    client = run.add_client(waiting, report=True, prefix=["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all", "--"])
    run.finish()
    run.check_complete()
    assert not pauses, str(run)
    assert "waiting for " + holding_up.name in run.server.stderr, str(run)
    assert sum(other.repaired()) < 1000, str(run)           # multicast was fine
    assert sum(client.repaired()) < 1000, str(run)
