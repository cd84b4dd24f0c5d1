"""Who takes long: who is waited for, and for whom the others wait no longer."""

import time

import helpers
from deployment import IMAGE, MIB, RATE, others


def test_producer_silent(laboratory, deploy):
    """For longer than either side's --stall-timeout: that is no stall, wherever in the image it happens."""
    def produce():
        yield IMAGE[:1000000]
        time.sleep(8.5)
        yield IMAGE[1000000:]

    limit = ["--stall-timeout", "7"]
    run = deploy(laboratory(clients=2), IMAGE, RATE + limit, limit, stdin=produce())
    run.finish()
    run.check_complete()


def test_command_as_consumer_that_takes_its_time_at_the_end(laboratory, deploy, tmp_path):
    """Longer than --stall-timeout: `docker load` may be at work for minutes after the last byte."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE[:MIB], ["--stall-timeout", "6"], ["--stall-timeout", "6"], clients=1, places=2)
    copy = tmp_path / "copy"
    slow = run.add_client(lab.clients[1], ["--pipe", "cat > '%s'; sleep 8" % copy, "--stall-timeout", "6"],
                          stdout=helpers.KEEP)
    slow.output = str(copy)
    run.finish()
    run.check_complete()
    assert "waiting for the command to end: cat > " in slow.stderr, str(run)


def test_client_that_is_slow_is_waited_for(laboratory, deploy):
    """Without --min-rate the session goes as fast as its slowest, and says for whom: once the rate has settled."""
    lab = laboratory(clients=3)
    lab.clients[0].limit(10, queue="32kb")
    run = deploy(lab, None, stdin=helpers.PIPE)
    run.produce_until_said("{0} .* alone|waiting for {0}".format(lab.clients[0].name))
    run.finish()
    run.check_complete()


def test_client_that_is_too_slow(laboratory, deploy):
    """One client alone holds the session below --min-rate for 10 s: it is dropped."""
    lab = laboratory(clients=3)
    lab.clients[0].limit(2, queue="32kb")
    run = deploy(lab, None, ["--min-rate", "20M", "-v"], stdin=helpers.PIPE)
    run.produce_until_said("alone it kept the transfer below 20 Mbit/s")
    run.finish()
    victim = run.clients[0]
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
