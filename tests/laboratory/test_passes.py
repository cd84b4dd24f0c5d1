"""Hosts come when they come: late, again, one after the other; each gets what it lacks, and nobody waits for it.

The server has a file, which it can read again, and cuts it into small rounds, so that few bytes are under way at once.
"""

import os
import re
import signal

import pytest

import helpers
from deployment import MIB, others

IMAGE = helpers.random_bytes(16000000, seed=41)
#: Some 3.5 s for all of it; a window is 0.6 MB.
SLOW = ["--rate", "40M", "--buffer-packets", "100"]
WINDOW = 4 * 100 * 1460


@pytest.fixture
def begin(laboratory, deploy, tmp_path):
    """A function that starts a server of IMAGE with so many `places`, and the clients that are there `at_first`."""
    (tmp_path / "image").write_bytes(IMAGE)

    def start(places, at_first, args=(), lab=None, start_wait=True, **options):
        wait = ["--start-wait", "0.1", "--min-clients", at_first] if start_wait else []
        run = deploy(lab or laboratory(clients=places), IMAGE, SLOW + ["-i", str(tmp_path / "image")] + wait + list(args),
                     clients=at_first, places=places, stdin=b"", **options)
        return run
    return start


def passes(run):
    """The bytes that each pass behind the first was to bring, as the server says."""
    scale = {"B": 1, "kB": 1e3, "MB": 1e6}
    return [float(size) * scale[unit] for size, unit in re.findall(r"pass \d+ brings ([\d.]+) (\w+) ", run.server.stderr)]


def brought(run):
    """Bytes that the server has multicast, or sent by TCP."""
    carried = run.server.report()["carried"]
    return carried["multicast"] + carried["coded"] + carried["tcp"]


def row(run, host):
    """What the server's report says of a host."""
    return [one for one in run.server.report()["hosts"] if one["host"] == host.name][-1]


def test_who_comes_late_gets_the_rest_with_the_others_and_then_the_beginning(begin, tmp_path):
    run = begin(6, 3)
    for number, share in ((3, 0.1), (4, 0.3), (5, 0.5)):
        run.wait_received(int(share * len(IMAGE)), run.clients[:3])
        run.add_client(run.lab.clients[number], output=str(tmp_path / ("late%d" % number)))
    run.finish()
    run.check_complete()
    rows = [row(run, host) for host in run.lab.clients]
    assert [bool(one["late"]) for one in rows] == 3 * [False] + 3 * [True], str(run)
    missed = passes(run)[0]
    assert len(passes(run)) == 1 and missed < len(IMAGE), "one pass for them all\n%s" % run
    assert brought(run) <= 1.1 * (len(IMAGE) + missed), str(run)


def test_a_pipe_that_comes_late_gets_all_of_it_in_a_pass_that_nobody_else_waits_for(begin):
    run = begin(3, 2)
    run.wait_received(clients=run.clients[:2])
    late = run.add_client(run.lab.clients[2])
    run.wait_end(*run.clients[:2])
    assert late.consumer.size < len(IMAGE) and late.code is None, str(run)
    run.finish()
    run.check_complete()
    assert round(passes(run)[0]) == len(IMAGE), str(run)


def test_who_is_killed_and_started_again_unplugged_or_stopped_gets_what_it_lacks(begin, tmp_path):
    run = begin(4, 0, ["--stall-timeout", "3"], start_wait=False)
    outputs = [str(tmp_path / ("out%d" % number)) for number in range(4)]
    client = ["--resume", "--stall-timeout", "3"]
    for host, output in zip(run.lab.clients[:3], outputs):
        run.add_client(host, client, output=output)
    last = run.add_client(run.lab.clients[3])
    killed, unplugged, stopped = run.clients[:3]
    run.wait_received(len(IMAGE) // 4, [last])
    killed.signal(signal.SIGKILL)
    unplugged.host.unplug()
    stopped.signal(signal.SIGSTOP)
    run.add_client(killed.host, client, output=outputs[0])
    run.server.wait_stderr("%s (%s): " % (unplugged.host.name, unplugged.host.address), 30)
    run.server.wait_stderr("%s (%s): " % (stopped.host.name, stopped.host.address), 30)
    unplugged.host.plug()
    stopped.signal(signal.SIGCONT)
    run.finish()
    run.check_complete(*others(run, killed))
    assert run.server.poll() == 0, str(run)
    assert max(passes(run)) < len(IMAGE), "what they held is not brought again\n%s" % run


def test_a_host_that_comes_back_as_another_one_takes_the_place_of_its_earlier_connection(begin, tmp_path):
    """At once: that nothing is heard of that one any more nobody has noticed yet."""
    run = begin(3, 3, ["--stall-timeout", "0"])
    stopped = run.clients[0]
    run.wait_received(len(IMAGE) // 4)
    stopped.signal(signal.SIGSTOP)
    run.add_client(stopped.host, output=str(tmp_path / "again"))
    run.wait_end(run.server, *others(run, stopped))
    stopped.signal(signal.SIGCONT)
    run.finish()
    run.check_complete(*others(run, stopped))
    assert run.server.poll() == 0 and len(run.server.report()["hosts"]) == 3, str(run)


def test_a_server_that_is_killed_and_started_again_goes_on_with_those_who_were_there(begin, tmp_path):
    run = begin(4, 0, start_wait=False)
    outputs = [str(tmp_path / ("out%d" % number)) for number in range(3)]
    for host, output in zip(run.lab.clients[:3], outputs):
        run.add_client(host, ["--resume"], output=output)
    pipe = run.add_client(run.lab.clients[3])
    run.wait_received(len(IMAGE) // 2, [pipe])
    run.server.signal(signal.SIGKILL)
    run.wait_end(run.server)
    again = begin(4, 0, lab=run.lab, start_wait=False)
    for client in run.clients:
        again.wait_end(client)
    again.finish()
    run.check_complete(*run.clients)
    assert again.server.poll() == 0, str(again)
    assert brought(again) < 0.8 * len(IMAGE), str(again)


@pytest.mark.parametrize("rate", [["--rate", "40M"], ["--rate", "auto", "--buffer-packets", "1000"]], ids=["fixed", "auto"])
def test_nobody_waits_for_who_alone_is_far_slower_and_it_gets_the_rest_after_the_others(begin, tmp_path, rate):
    """Not even for what was under way to it, as it shows when it hangs from then on, and nobody is dropped for silence."""
    run = begin(4, 0, rate + ["--min-rate", "20M", "--stall-timeout", "0"], start_wait=False)
    slow = run.add_client(run.lab.clients[0], output=str(tmp_path / "slow"))
    slow.host.limit(8, both=True)
    for host in run.lab.clients[1:]:
        host.limit(100, both=True)
        run.add_client(host)
    run.server.wait_stderr("%s (%s) alone kept the transfer below 20 Mbit/s" % (slow.host.name, slow.host.address))
    slow.signal(signal.SIGSTOP)
    run.wait_end(*others(run, slow))
    assert slow.code is None, str(run)
    slow.signal(signal.SIGCONT)
    run.finish()
    run.check_complete()
    assert 0 < passes(run)[-1] < len(IMAGE), "it kept what it had\n%s" % run


def test_for_ever_each_batch_gets_the_image_that_was_there_when_it_came(begin, tmp_path):
    run = begin(6, 2, ["--forever"])
    run.wait_received()
    late = run.add_client(run.lab.clients[2], output=str(tmp_path / "late"))
    run.server.wait_stderr("%s (%s) is here, late" % (late.host.name, late.host.address))
    other = helpers.random_bytes(3 * MIB, seed=42)
    (tmp_path / "new").write_bytes(other)
    os.rename(str(tmp_path / "new"), str(tmp_path / "image"))
    for number, output in ((3, None), (4, str(tmp_path / "new4"))):
        run.add_client(run.lab.clients[number], output=output).image = other
    run.wait_end(*run.clients)
    run.add_client(run.lab.clients[5]).image = other
    run.wait_end(*run.clients)
    run.server.signal(signal.SIGTERM)
    run.finish()
    run.check_complete()


def test_the_chain_is_of_those_who_lack_what_is_brought(begin, laboratory, tmp_path):
    """Who comes late hears no multicast, either, and follows the others until they have everything."""
    lab = laboratory(clients=6)
    for host in lab.clients:
        host.block_multicast()
        host.limit(100, both=True)
    run = begin(6, 3, lab=lab)
    run.wait_received(len(IMAGE) // 4, run.clients[:3])
    for number in (3, 4):
        run.add_client(lab.clients[number], output=str(tmp_path / ("late%d" % number)))
    pipe = run.add_client(lab.clients[5])
    run.finish()
    run.check_complete()
    assert all(client.chained() for client in run.clients[3:]), str(run)
    assert sum(client.chained() for client in run.clients) > 3 * len(IMAGE) // 1460, str(run)
    assert pipe.consumer.size == len(IMAGE)
