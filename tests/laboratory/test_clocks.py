"""Time on a slow or broken network: who moves is not dropped, who has a minute gets it, no rate is said too early."""

import re
import signal
import time

import helpers
from deployment import IMAGE, MIB, others

#: Mbit/s of a port
SLOW_PORT = 20


def test_a_client_that_tcp_brings_data_all_the_time_has_not_stalled(laboratory, deploy):
    """The server's kernel takes a whole round at once, and a round takes longer than --stall-timeout to arrive (3 MB at
    2 Mbit/s: 12 s in all): meanwhile the server has nothing to do, and the client is at work."""
    lab = laboratory(clients=1)
    lab.server.run(["sysctl", "-qw", "net.ipv4.tcp_wmem=4096 4194304 4194304"])     # sockets may grow to that anyway
    lab.clients[0].block_multicast()
    lab.clients[0].limit(2, queue="8mb")
    run = deploy(lab, IMAGE[:3000000], ["--stall-timeout", "5"])
    run.finish()
    run.check_complete()
    assert run.repair()[1] >= 3000000 // 1460, str(run)     # else this was no test


def test_a_cable_pulled_for_good_while_there_is_nothing_to_send_is_noticed_by_the_stall_timeout(laboratory, deploy):
    """The client owes nothing, as the producer pauses: the signs of life tell, and the kernel waits for their receipt
    no longer than we would."""
    lab = laboratory(clients=2)
    limit = ["--stall-timeout", "6"]
    run = deploy(lab, IMAGE, ["-v"] + limit, limit, stdin=helpers.PIPE)
    produce = run.server.popen.stdin
    produce.write(IMAGE[:MIB // 2])
    run.wait_received(MIB // 4)
    victim = run.clients[1]
    victim.host.unplug()
    # 2 s until the next sign of life, and 8. By the kernel's own clock it would be a quarter of an hour.
    run.server.wait_stderr("%s (%s): " % (victim.host.name, victim.host.address), timeout=60)
    produce.write(IMAGE[MIB // 2:])
    produce.close()
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)


def test_who_is_stopped_or_unplugged_for_less_than_the_stall_timeout_goes_on(laboratory, deploy):
    """18 s of 40: only the stall timeout is to tell, and no clock of the kernel's. All goes by TCP, and who is stopped
    has a small window, so that it is full, and not just idle."""
    lab = laboratory(clients=3)
    lab.clients[0].run(["sysctl", "-qw", "net.ipv4.tcp_rmem=4096 65536 65536"])
    lab.server.limit_egress(60)                 # with a short queue: a longer one makes TCP try again later
    limit = ["--stall-timeout", "40"]
    run = deploy(lab, IMAGE, ["--unicast"] + limit, limit)
    run.wait_received(MIB // 2)
    stopped, unplugged, _ = run.clients
    stopped.signal(signal.SIGSTOP)
    unplugged.host.unplug()
    time.sleep(18)
    assert run.server.poll() is None and stopped.consumer.size < len(IMAGE), str(run)
    stopped.signal(signal.SIGCONT)
    unplugged.host.plug()
    run.finish()
    run.check_complete()


def test_what_a_client_alone_takes_is_said_once_the_rate_has_settled(laboratory, deploy):
    """Not on the way down to it, when it would be several times too high."""
    lab = laboratory()
    lab.clients[0].limit(SLOW_PORT)
    run = deploy(lab, None, stdin=helpers.PIPE)
    words = r"(\S+) \(\S+\) alone takes no more than ([0-9.]+) (\w+)/s"
    run.produce_until_said(words)
    run.finish()
    run.check_complete()
    said = re.findall(words, run.server.stderr)
    for name, rate, unit in said:
        assert name == lab.clients[0].name and unit == "Mbit" and float(rate) <= 1.25 * SLOW_PORT, str(run)
