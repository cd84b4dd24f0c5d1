"""What happens to one party in mid-transfer, and what must follow: nothing stalls, and nothing false is taken as right.

Each test brings one fault into a transfer between real processes that is slow enough (--rate) to be disturbed.
"""

import os
import re
import signal
import struct
import subprocess
import sys
import time

import pytest

import helpers
from conftest import MIB, Consumer

IMAGE = helpers.random_bytes(8000000, seed=3)
PACKETS = -(-len(IMAGE) // 1460)
RATE = ["--rate", "40M"]                    # some 1.7 s for the image
LONG = ["--rate", "20M"]
PATIENT = ["--stall-timeout", "0"]          # never: what the kernel notices is all that there is
IMPATIENT = ["--stall-timeout", "3"]        # seconds

RELAY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "relay.py")

#: Seconds that processes on a busy machine may be late. All limits of the program are much longer than this.
SLACK = 8

HELP = {command: subprocess.run([sys.executable, helpers.KMCAST, command, "--help"], stdout=subprocess.PIPE,
                                universal_newlines=True).stdout for command in ("server", "client")}


def needs(command, option):
    """A mark: skip while kmcast has no such option."""
    return pytest.mark.skipif(option not in HELP[command], reason="kmcast %s has no %s" % (command, option))


def others(run, *out):
    """The clients of a deployment without those."""
    return [client for client in run.clients if client not in out]


def changed_kmcast(directory, change):
    """Return the path of a program that is kmcast after `change`, some lines of Python."""
    program = directory / "changed_kmcast.py"
    program.write_text("import sys\nsys.path.insert(0, %r)\nimport kmcast\n%s\nsys.exit(kmcast.main())\n"
                       % (helpers.ROOT, change))
    return str(program)


def no_file(directory):
    """Fail if a client has left anything in the directory for its -o, be it under the final name or another one."""
    assert os.listdir(str(directory)) == []


# ---------------------------------------------------------------------------------------------------------------------
# A client

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
    run = deploy(lab, IMAGE, LONG)
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
        """From 700,000 bytes on 64 KiB every 0.4 s, for 9 s."""
        if size < 700000 or began and time.monotonic() > began[0] + 9:
            return 0
        began[:] = began or [time.monotonic()]
        return 0.4

    run = deploy(lab, IMAGE, RATE + ["--stall-timeout", "7"], ["--stall-timeout", "7"],
                 consumers=[Consumer(pace), Consumer()])
    run.finish()
    run.check_complete()
    assert time.monotonic() - began[0] > 9, str(run)


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
    """A client that has no standard output at all says so before it takes anybody's time."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE[:MIB], clients=1, places=1)
    closed = helpers.start(lab.clients[1].command([
        "sh", "-c", 'exec "$0" "$@" >&-', sys.executable, helpers.KMCAST, "client", lab.clients[1].address,
        lab.server.address, run.port]))
    code, stderr, _ = closed.finish(SLACK)
    run.finish()
    run.check_complete()
    assert code == 2 and "standard output" in stderr and "Traceback" not in stderr, stderr


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


# ---------------------------------------------------------------------------------------------------------------------
# The server

def test_server_killed(laboratory, deploy, tmp_path):
    """Every client exits 1 at once, whatever its --stall-timeout, and no file appears."""
    run = deploy(laboratory(), IMAGE, LONG, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGKILL)
    run.wait_end(*run.clients, timeout=SLACK)
    run.check_failed(*run.clients)
    no_file(tmp_path)


def test_server_stopped(laboratory, deploy, tmp_path):
    """Every client exits 1 within its --stall-timeout, and no file appears."""
    run = deploy(laboratory(), IMAGE, LONG, IMPATIENT, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGSTOP)
    run.wait_end(*run.clients, timeout=3 + SLACK)
    run.check_failed(*run.clients)
    no_file(tmp_path)
    run.server.signal(signal.SIGCONT)
    run.finish()
    run.check_server(1, *run.lab.clients)


def test_server_unplugged(laboratory, deploy, tmp_path):
    """The same, and the server gives up, too."""
    lab = laboratory()
    run = deploy(lab, IMAGE, LONG + IMPATIENT, IMPATIENT, outputs=tmp_path)
    run.wait_packets(lab.server, 1000)
    lab.server.unplug()
    run.wait_end(*run.clients, timeout=3 + SLACK)
    run.check_failed(*run.clients)
    no_file(tmp_path)
    run.finish(20)
    run.check_server(1, *lab.clients)


def test_server_told_to_stop(laboratory, deploy, tmp_path):
    """The clients are told, and say why."""
    run = deploy(laboratory(clients=2), IMAGE, LONG, outputs=tmp_path)
    run.wait_packets(run.lab.server, 1000)
    run.server.signal(signal.SIGINT)
    run.finish(SLACK)
    run.check_server(1, *run.lab.clients)
    run.check_failed(*run.clients)
    no_file(tmp_path)
    for client in run.clients:
        assert "the server says: stopped by SIGINT" in client.stderr, str(run)


@pytest.mark.parametrize("thread", ["first", "second"])
@pytest.mark.parametrize("step", ["announce", "sent", "repair"])
def test_a_thread_of_the_server_dies(laboratory, deploy, tmp_path, thread, step):
    """Of an exception that nobody expects, in the third round: all are told, and nothing hangs."""
    program = changed_kmcast(tmp_path, DIES.format(step=step, mine="not " * (thread == "second") + "self.child"))
    lab = laboratory(clients=3)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    run = deploy(lab, IMAGE, RATE + ["--clients-per-thread", "2"], outputs=outputs, server={"program": program})
    run.finish(20)
    assert run.server.poll() == 1 and "internal error: ZeroDivisionError" in run.server.stderr, str(run)
    for client in run.clients:
        assert client.code == 1 and "the server says: internal error: ZeroDivisionError" in client.stderr, str(run)
    no_file(outputs)


DIES = """
right = kmcast.TcpServer._do_{step}
rounds = []

def wrong(self, step):
    if {mine}:
        rounds.append(step)
        if len(rounds) == 3:
            1 // 0
    return right(self, step)

kmcast.TcpServer._do_{step} = wrong
"""


@pytest.mark.parametrize("where", ["Writer._write", "Client._listen"])
def test_a_client_meets_an_error_of_its_own(laboratory, deploy, tmp_path, where):
    """An exception that nobody expects, in one of its threads: it fails, the server lists it, the others go on."""
    program = changed_kmcast(tmp_path, "def wrong(*args):\n    1 // 0\nkmcast.%s = wrong" % where)
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2, places=3)
    victim = run.add_client(lab.clients[2], program=program)
    run.finish(20)
    run.check_complete(*others(run, victim))
    assert victim.code == 1 and "internal error" in victim.stderr, str(run)
    assert run.server.poll() == 3 and victim.host.name + " (" in run.server.stderr, str(run)


def test_producer_silent(laboratory, deploy):
    """For longer than either side's --stall-timeout: that is no stall, wherever in the image it happens."""
    def produce():
        yield IMAGE[:1000000]
        time.sleep(8.5)
        yield IMAGE[1000000:]

    run = deploy(laboratory(clients=2), IMAGE, RATE + ["--stall-timeout", "7"], ["--stall-timeout", "7"], stdin=produce())
    run.finish()
    run.check_complete()
    assert run.seconds > 8.5, str(run)


def test_server_cut_off_from_multicast_by_its_firewall(laboratory, deploy):
    """Sending fails with EPERM from now on: the server says so, and all the rest goes by TCP."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE)
    run.wait_received()
    firewall(lab.server, "output", "meta l4proto udp drop")
    run.finish()
    run.check_complete()
    assert "Operation not permitted" in run.server.stderr, str(run)
    for client in run.clients:
        assert client.repaired()[1] > 0.3 * PACKETS, str(run)


def test_server_cut_off_from_one_client_by_a_firewall(laboratory, deploy):
    """TCP to one host is dropped without a word: that host goes by a time-out, the others do not lose more than that."""
    lab = laboratory()
    run = deploy(lab, IMAGE, RATE + IMPATIENT, lambda number: IMPATIENT if number == 0 else PATIENT)
    run.wait_received()
    victim = run.clients[0]
    firewall(lab.server, "output", "ip daddr %s meta l4proto tcp drop" % victim.host.address)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_failed(victim)
    run.check_server(3, victim.host)


def firewall(host, hook, rule):
    """Add a rule to a host's packet filter."""
    host.run(["nft", "-f", "-"], universal_newlines=True, input="table ip firewall {\n chain c {\n "
             "type filter hook %s priority 0;\n %s\n }\n}" % (hook, rule))


# ---------------------------------------------------------------------------------------------------------------------
# Datagrams that are not as they were sent

def start_relay(run, host, way, port=18383):
    """Start relay.py on a host; a Process."""
    relay = helpers.start(host.command([sys.executable, RELAY, host.address, run.lab.server.address, helpers.GROUP,
                                        str(port), way]))
    run.others.append(relay)
    relay.wait_stderr("ready")
    return relay


def relayed(relay):
    """End the relay; how many datagrams it has sent."""
    relay.signal(signal.SIGTERM)
    code, stderr, _ = relay.finish(SLACK)
    assert code == 0, stderr
    return int(re.search(r"sent (\d+) datagrams", stderr).group(1))


@pytest.mark.parametrize("way", ["shuffle", "twice", "later", "damage", "forge"])
@pytest.mark.parametrize("instead", [True, False], ids=["instead", "besides"])
def test_datagrams_tampered_with(laboratory, deploy, way, instead):
    """The clients get what a relay made of the datagrams, instead of or besides the right ones."""
    lab = laboratory(clients=4)
    receivers, spare = lab.clients[:3], lab.clients[3]
    for host in receivers:
        if instead:
            firewall(host, "input", "ip saddr %s ip daddr 224.0.0.0/4 drop" % lab.server.address)
        else:
            host.lose(3)                    # so that there are coded repairs, which are tampered with as well
    run = deploy(lab, IMAGE[:4000000], ["--rate", "20M", "--buffer-packets", "128"], clients=0, places=3)
    relay = start_relay(run, spare, way)
    for host in receivers:
        run.add_client(host)
    run.finish()
    run.check_complete()
    packets = -(-4000000 // 1460)
    # With nothing but forgeries or what comes too late the server gives multicast up, so there is less to tamper with.
    assert relayed(relay) > (0.1 if instead and way in ("later", "forge") else 0.5) * packets, str(run)
    for client in run.clients:
        by_tcp = client.repaired()[1]
        if instead and way in ("later", "forge"):
            assert by_tcp > 0.9 * packets, str(run)
        elif instead:
            assert by_tcp < 0.8 * packets, str(run)         # it did take what the relay sent
        else:
            assert by_tcp < 0.3 * packets, str(run)         # and it was not kept from the right ones


@pytest.mark.parametrize("compat", [False, True], ids=["session", "base protocol"])
def test_flood_of_noise(laboratory, deploy, compat):
    """Random datagrams on the group do not keep a client from the right ones, nor from the end of a round, be it that the
    last packet of the round is lost."""
    lab = laboratory(clients=4)
    for host in lab.clients[:3]:
        host.lose(30)
    args = RATE + (["--compat"] if compat else [])
    run = deploy(lab, IMAGE, args, clients=0, places=3)
    relay = start_relay(run, lab.clients[3], "noise")
    for host in lab.clients[:3]:
        run.add_client(host)
    run.finish(30)
    run.check_complete()
    assert relayed(relay) > 1000, str(run)
    for client in run.clients:
        assert sum(client.repaired()) < 0.7 * PACKETS, str(run)


def test_two_servers_on_one_group_and_port(laboratory, deploy):
    """Two images at once; on every host there is a client of each server."""
    lab = laboratory()
    second = lab.clients[3]
    other_image = helpers.random_bytes(len(IMAGE), seed=4)
    hosts = lab.clients[:3]
    for host in hosts:
        host.lose(2)
    runs = [deploy(lab, IMAGE, RATE, clients=3), deploy(lab, other_image, RATE, clients=3, on_server=second)]
    for run in runs:
        run.finish()
        run.check_complete()
        for client in run.clients:
            assert sum(client.repaired()) < 0.4 * PACKETS, str(run)


@pytest.mark.parametrize("first", [2**32 - 64, 2**32 - 1000, 2**32 - 1, 2**31 - 100])
def test_sequence_numbers_that_wrap(laboratory, deploy, tmp_path, first):
    """More than 2^32 packets: here the first one has a seq just before the wrap, in the middle of a round or at its end."""
    lab = laboratory()
    for host in lab.clients:
        host.lose(3)
    program = changed_kmcast(tmp_path, "kmcast.Multicaster.FIRST_SEQ = %d" % first)
    run = deploy(lab, IMAGE[:3000000], server={"program": program})
    run.finish()
    run.check_complete()
    for client in run.clients:
        assert 0 < sum(client.repaired()) < 0.3 * 3000000 / 1460, str(run)
    assert run.repair()[0] > 0, str(run)


def test_packet_seqs_start_where_the_hook_says(laboratory, deploy, tmp_path):
    """What the test above rests on."""
    lab = laboratory(clients=2)
    program = changed_kmcast(tmp_path, "kmcast.Multicaster.FIRST_SEQ = 2**32 - 6")
    run = deploy(lab, IMAGE[:20 * 1460], ["--rate", "5M"], clients=0, places=1, server={"program": program})
    spy = helpers.start(lab.clients[1].command([sys.executable, "-c", SPY, lab.clients[1].address, helpers.GROUP]))
    spy.wait_stderr("ready")
    run.add_client(lab.clients[0])
    run.finish()
    run.check_complete()
    code, _, seqs = spy.finish(SLACK)
    assert struct.unpack("<20I", seqs) == tuple((2**32 - 6 + i) % 2**32 for i in range(20))


SPY = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[2], 18383))
sock.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(sys.argv[2]) + socket.inet_aton(sys.argv[1]))
sock.settimeout(20)
sys.stderr.write('ready')
sys.stderr.flush()
for _ in range(20):
    sys.stdout.buffer.write(sock.recv(2000)[:4])
"""


# ---------------------------------------------------------------------------------------------------------------------
# Ends that count

@needs("server", "--pipe")
def test_command_as_producer(laboratory, deploy, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(IMAGE)
    run = deploy(laboratory(clients=2), IMAGE, ["--pipe", "cat '%s'" % image])
    run.finish()
    run.check_complete()


@needs("server", "--pipe")
@pytest.mark.parametrize("command", ["cat '%s'; exit 7", "cat '%s'; kill -9 $$"])
def test_command_as_producer_fails(laboratory, deploy, tmp_path, command):
    """All bytes were there, but the command says that they are not the image: nobody reports success."""
    image = tmp_path / "image"
    image.write_bytes(IMAGE)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--pipe", command % image], outputs=outputs)
    run.finish()
    run.check_server(1, *lab.clients)
    run.check_failed(*run.clients)
    no_file(outputs)
    for said in [run.server.stderr] + [client.stderr for client in run.clients]:
        assert "exit code 7" in said or "signal 9" in said, str(run)


@needs("client", "--pipe")
def test_command_as_consumer(laboratory, deploy, tmp_path):
    """The server's exit code says that the commands have succeeded, not that the network has."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, clients=0, places=2)
    for number, host in enumerate(lab.clients):
        copy = tmp_path / str(number)
        run.add_client(host, ["--pipe", "cat > '%s'; sleep 1" % copy], stdout=helpers.KEEP).output = str(copy)
    run.finish()
    run.check_complete()
    assert run.seconds > 1, str(run)


@needs("client", "--pipe")
@pytest.mark.parametrize("command", ["cat > /dev/null; exit 7", "head -c 1000000 > /dev/null; exit 7", "exit 7"],
                         ids=["at the end", "in the middle", "at once"])
def test_command_as_consumer_fails(laboratory, deploy, command):
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2, places=3)
    victim = run.add_client(lab.clients[2], ["--pipe", command], stdout=helpers.KEEP)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    for said in (victim.stderr, run.server.stderr):
        assert "exit code 7" in said or "has ended" in said, str(run)


@needs("client", "--pipe")
def test_command_as_consumer_that_takes_its_time_at_the_end(laboratory, deploy, tmp_path):
    """Longer than --stall-timeout: `docker load` may be at work for minutes after the last byte."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE[:MIB], ["--stall-timeout", "6"], ["--stall-timeout", "6"], clients=1, places=2)
    copy = tmp_path / "copy"
    run.add_client(lab.clients[1], ["--pipe", "cat > '%s'; sleep 8" % copy, "--stall-timeout", "6"],
                   stdout=helpers.KEEP).output = str(copy)
    run.finish()
    run.check_complete()


# ---------------------------------------------------------------------------------------------------------------------
# Who takes part

@needs("server", "--start-wait")
def test_start_without_those_that_never_come(laboratory, deploy):
    """Three places, two clients: when --start-wait is over it starts, and says in the end that one never came."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--start-wait", "2", "--min-clients", "2"], places=3)
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)
    assert "never came" in run.server.stderr, str(run)


@needs("server", "--start-wait")
def test_start_waits_for_the_least_number(laboratory, deploy):
    """--start-wait is over, but fewer than --min-clients are there; the one that comes then starts it."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE[:MIB], ["--start-wait", "1", "--min-clients", "2"], clients=1, places=3)
    run.server.wait_stderr("is here")
    time.sleep(2)
    assert run.clients[0].consumer.size == 0, str(run)
    run.add_client(lab.clients[1])
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)


@needs("server", "--start-wait")
def test_start_at_once_when_all_are_there(laboratory, deploy):
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--start-wait", "60", "--min-clients", "1"])
    run.finish(30)
    run.check_complete()


@needs("server", "--start-wait")
def test_start_with_places_of_two_tcp_threads_empty(laboratory, deploy):
    """The chain of threads is cut short where nobody came."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE[:MIB], ["--start-wait", "2", "--clients-per-thread", "2"], places=9)
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)


@needs("server", "--min-rate")
def test_client_that_is_too_slow(laboratory, deploy):
    """One client alone holds the session below --min-rate for 10 s: it is dropped with that reason, the others finish."""
    lab = laboratory(clients=3)
    lab.clients[0].limit(2, queue="32kb")
    run = deploy(lab, IMAGE * 2, ["--min-rate", "20M", "-v"])
    run.finish(90)
    victim = run.clients[0]
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    for said in (victim.stderr, run.server.stderr):
        assert "20 Mbit/s" in said, str(run)


def test_client_that_is_slow_is_waited_for(laboratory, deploy):
    """Without --min-rate the session goes as fast as its slowest, and says whom it waits for."""
    lab = laboratory(clients=3)
    lab.clients[0].limit(10, queue="32kb")
    run = deploy(lab, IMAGE[:4000000])
    run.finish()
    run.check_complete()
    assert re.search(lab.clients[0].name + r" \(.*(alone|waiting)|wait.* for " + lab.clients[0].name, run.server.stderr), \
        str(run)


def test_one_client_too_many(laboratory, deploy):
    """It is told why it is refused, and exits 3: nothing was written, it can fall back."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2)
    run.wait_received(100000)
    late = run.add_client(lab.clients[2], ["--wait", "0"])
    run.finish()
    run.check_complete(*others(run, late))
    run.check_server(0)
    assert late.code == 3 and late.consumer.size == 0 and "refused" in late.stderr, str(run)
