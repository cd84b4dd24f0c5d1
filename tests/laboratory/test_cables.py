"""A client's cable is pulled in mid-transfer: the stall timeout tells for how long that may be.

Each test brings one fault into a transfer between real processes that is slow enough (--rate) to be disturbed.
"""

import time

from deployment import IMAGE, IMPATIENT, PATIENT, RATE, others


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


def test_cable_pulled_for_good(laboratory, deploy):
    """Dropped after the server's --stall-timeout; the client gives up by its own."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + ["--stall-timeout", "5"], lambda number: IMPATIENT if number == 3 else PATIENT)
    run.wait_received()
    victim = run.clients[3]
    victim.host.unplug()
    run.wait_end(victim)
    assert "the server has been silent for 3 s" in victim.stderr, str(run)
    run.server.wait_stderr("%s (%s): " % (victim.host.name, victim.host.address), timeout=60)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
