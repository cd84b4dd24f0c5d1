"""The benchmark: kmcast against the tools that a user would pick today, in the laboratory of lab.py. Needs root.

    python3 tests/bench.py                                  # everything, some three hours on two cores
    python3 tests/bench.py --list
    python3 tests/bench.py --scenario wire-4 wire-4-loss1 --repeat 1 --size 256
    python3 tests/bench.py --scenario line-8-64 --tool kmcast chain
    python3 tests/bench.py --tool kmcast --json figures.json

There are four kinds of scenarios. Where the CPU is the limit (super, wire, core, blocked), kmcast is compared with the
other tools. Where a line is (port, egress, line, gbit, rtt, rival; chain: without UDP), the line's payload is the
measure, and a chain of socat and tee, which nearly fills it, is a peer. `loopback` and `thousand` are about many
clients: of the thousand one process (crowd.py) plays all, so that the server is what is measured; `single`, `brief` and
`least` are kmcast with one client, with a tiny image, and with both, to tell apart what a client costs for each round.
`memory` is about memory.

Each run has a fresh laboratory, the same image (random bytes in tmpfs) and receivers that wait already. The clock runs
from the start of the sender to the exit of the sender and all receivers; of UFTP, whose receivers are daemons, to the
sender's exit. Nothing is subtracted: finding each other, the last acknowledgements and the start of an interpreter
are part of it. The tools take turns within each repetition, so that a busy moment of the machine meets all of them.
A run that hangs, or of which one process fails, is a failed run: it gives no figure and is counted in the table.

In the table:
    Mbit/s       goodput: the image's bits over the run's time, in 10^6 bit/s
    / kmcast     that as a multiple of kmcast's
    CPU s/GB     CPU seconds a process itself used per 10^9 bytes of the image; a client's is the mean of all (of a
                 crowd, all of it). The kernel's work on the virtual wire lands on whoever runs when it is done, which
                 is mostly the sender
    us/round     CPU microseconds of kmcast's server for a client and a round: all of its CPU time, so reading, hashing
                 and sending the image as well, divided by the number of clients and of rounds
    peak MiB     the largest resident size of the server, and of the largest client
    rival        where a TCP transfer runs beside it: what that got, in Mbit/s
All are medians of the repetitions that succeeded. The lines below a table are what is judged.

Every byte is verified, outside of the timed part: see `verify`.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import lab as laboratory

MIB = 1 << 20
KMCAST = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'kmcast.py')
RAMDISK = '/dev/shm'

# What of a port's Mbit/s can be payload at MTU 1500: a frame of 1514 bytes (the token bucket counts no preamble)
# carries 1460, after 14 of Ethernet, 20 of IP, 8 of UDP and 12 of kmcast itself.
PAYLOAD_SHARE = 1460 / 1514

# The same of TCP: its header is 20 bytes, and the time stamps that it usually carries are 12.
TCP_PAYLOAD_SHARE = 1448 / 1514

LINE_QUEUE = '256kb'    # of a line's port, both ways
CORES = ('0', '1')      # of the senders and of the receivers, where they are pinned
CROWD = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'crowd.py')

GRACE = 30.0            # seconds that the others get to stop once one process has failed
SAMPLE_INTERVAL = 0.25  # seconds between two looks at the processes' memory
IDLE_PATIENCE = 30.0    # seconds to wait for other work on the machine to pause, before a timed run


# ---------------------------------------------------------------------------
# Scenarios
# ---------------------------------------------------------------------------

# What is judged. figure: the name of a function of `FIGURES`; least: what it must reach; aim: what it should reach;
# both None: it is for information.
Wanted = collections.namedtuple('Wanted', 'figure least aim')


def wanted(figure, least=None, aim=None):
    return Wanted(figure, least, aim)


class Scenario:
    """One row of the benchmark.

    name     as on the command line
    title    what it is, in a line
    clients  how many
    mib      size of the image, in MiB
    wanted   what is judged: a list of Wanted
    wire     whether every MTU frame crosses alone; False lets super-packets cross
    impair   called with the laboratory when it stands
    rate     Mbit/s of IP packets that the slowest link carries: told to the peers, which cannot find out. kmcast
             is never told. None: no limit but the machine
    lossy    whether datagrams are lost on the way, so that a peer may be given its options for that
    tools    names of those that can take part
    options  more options for both ends of kmcast
    python   'python2.7': which interpreter kmcast needs here, None: any
    loopback all processes on one host, at 127.0.0.1
    crowd    options of crowd.py, which then plays the clients; None: they are real
    rival    a TCP transfer from the server's host to the first client's runs beside it
    pinned   the senders have one core, and the receivers another one
    patience how many times as long as elsewhere a run may take before it counts as hung
    """

    def __init__(self, name, title, clients, mib, wanted, wire=True, impair=None, rate=None, lossy=False,
                 tools=('kmcast', 'udpcast', 'uftp'), options=(), python=None, loopback=False, crowd=None, rival=False,
                 pinned=False, patience=1):
        self.name = name
        self.title = title
        self.clients = clients
        self.mib = mib
        self.wanted = wanted
        self.wire = wire
        self.impair = impair or (lambda lab: None)
        self.rate = rate
        self.lossy = lossy
        self.tools = tools
        self.options = list(options)
        self.python = python
        self.loopback = loopback
        self.crowd = crowd
        self.rival = rival
        self.pinned = pinned
        self.patience = patience

    def timeout(self, size):
        """Seconds after which a run with an image of `size` bytes hangs: many times what the slowest tool takes."""
        return (60 + 4 * size * 8e-6 / (self.rate or 200)) * self.patience


def _lose_at_clients(percent):
    return lambda lab: [client.lose(percent) for client in lab.clients]


def _limit_ports(mbit, count=None):
    return lambda lab: [client.limit(mbit) for client in lab.clients[:count]]


def _line(mbit, hosts):
    """The ports of these hosts have this speed, both ways: hosts(lab) is a list of them."""
    return lambda lab: [host.limit(mbit, LINE_QUEUE, both=True) for host in hosts(lab)]


def _lines(mbit):
    """Every host's port has, the server's too."""
    return _line(mbit, lambda lab: lab.hosts)


def _all(*impairments):
    return lambda lab: [impair(lab) for impair in impairments]


def _block_multicast(lab):
    for client in lab.clients:
        client.block_multicast()


PEERS = ('udpcast', 'uftp')
REFERENCES = ('single', 'brief', 'least')
# What the line can do is known, so that the chain's share of it is for information only, but where nothing else is.
BESIDE_CHAIN = wanted('times_chain')

SCENARIOS = [
    # Where the CPU is the limit.
    Scenario('super-1', 'super-packets cross, 1 client', 1, 1024, [wanted('times_best_peer', 4.5, 6)], wire=False),
    Scenario('super-4', 'super-packets cross, 4 clients', 4, 1024,
             [wanted('times_best_peer', 5.5, 6.5), wanted('times_chain', 1.1, 1.4)],
             wire=False, tools=('kmcast', 'chain') + PEERS),
    Scenario('core-1', 'super-packets cross, 1 client, the server and the client on one core each', 1, 1024,
             [wanted('goodput_gbit', 5, 5.7), wanted('times_best_peer')],
             wire=False, pinned=True),
    Scenario('wire-1', 'wire mode, 1 client', 1, 1024, [wanted('times_best_peer', 1.4, 1.6)]),
    Scenario('wire-4', 'wire mode, 4 clients', 4, 1024, [wanted('times_best_peer', 2.6, 3.5), BESIDE_CHAIN],
             tools=('kmcast', 'chain') + PEERS),
    Scenario('wire-4-loss1', 'wire mode, 4 clients, 1 % independent loss at each', 4, 1024,
             [wanted('times_best_peer', 2.5, 3.5)],
             impair=_lose_at_clients(1), lossy=True),
    Scenario('repair-32', 'wire mode, 32 clients, 1 % independent loss at each', 32, 64,
             [wanted('repair_share', 0.03, 0.02)],
             impair=_lose_at_clients(1), lossy=True, tools=('kmcast',)),
    Scenario('wire-4-shared2', 'wire mode, 4 clients, 2 % loss shared by all', 4, 1024,
             [wanted('times_best_peer', 2.5, 3.5)],
             impair=lambda lab: lab.server.lose_egress(2), lossy=True),
    Scenario('blocked-4', 'wire mode, 4 clients, multicast blocked for all', 4, 1024,
             [wanted('times_tcp', 0.8, 1), BESIDE_CHAIN],
             impair=_block_multicast, tools=('kmcast', 'chain', 'tcp')),
    Scenario('mmsg-py27', 'wire mode, 4 clients, kmcast on Python 2.7 with sendmmsg and recvmmsg', 4, 1024,
             [wanted('times_best_peer', 1, 1.3)],
             options=['--datagrams', 'mmsg'], python='python2.7'),

    # Where a line is the limit. The first two limit one direction only, with a shorter queue.
    Scenario('port-100', "wire mode, 4 clients, each one's port 100 Mbit/s", 4, 128,
             [wanted('share_of_link', 0.90, 0.97), BESIDE_CHAIN],
             impair=_limit_ports(100), rate=100, tools=('kmcast', 'chain') + PEERS),
    Scenario('egress-200', "wire mode, 8 clients, the server's egress 200 Mbit/s", 8, 1024,
             [wanted('share_of_link', 0.95, 0.98), BESIDE_CHAIN],
             impair=lambda lab: lab.server.limit_egress(200), rate=200, tools=('kmcast', 'chain') + PEERS),
    Scenario('one-port-100', 'one port of four 100 Mbit/s', 4, 128,
             [wanted('share_of_link', 0.97, 0.98), BESIDE_CHAIN],
             impair=_line(100, lambda lab: lab.clients[:1]), rate=100, tools=('kmcast', 'chain') + PEERS),
    Scenario('line-8-64', 'every port 100 Mbit/s, 8 clients', 8, 64,
             [wanted('times_chain', 0.98, 1.01), wanted('share_of_link')],
             impair=_lines(100), rate=100, tools=('kmcast', 'chain') + PEERS),
    Scenario('line-8-256', 'every port 100 Mbit/s, 8 clients', 8, 256,
             [wanted('times_chain', 1.0, 1.02), wanted('share_of_link')],
             impair=_lines(100), rate=100, tools=('kmcast', 'chain') + PEERS),
    Scenario('gbit-2', "the server's port 1 Gbit/s, 2 clients", 2, 1024,
             [wanted('share_of_link', 0.96, 0.98), BESIDE_CHAIN],
             impair=_line(1000, lambda lab: [lab.server]), rate=1000, tools=('kmcast', 'chain') + PEERS),
    Scenario('rtt20-2', 'every port 100 Mbit/s, 2 clients, 20 ms of round trip to the server', 2, 128,
             [wanted('share_of_link', 0.96, 0.98), BESIDE_CHAIN],
             impair=_all(lambda lab: lab.server.lengthen(0.010), _lines(100)), rate=100,
             tools=('kmcast', 'chain') + PEERS),
    Scenario('line-8-loss5', 'every port 100 Mbit/s, 8 clients, 5 % loss at one', 8, 256,
             [wanted('share_of_link', 0.90, 0.94), BESIDE_CHAIN],
             impair=_all(_lines(100), lambda lab: lab.clients[0].lose(5)), rate=100, lossy=True,
             tools=('kmcast', 'chain') + PEERS),
    # Each must have a third. Nobody can have more than half without taking it from the other.
    Scenario('rival', 'every port 100 Mbit/s, 2 clients, a TCP transfer beside it', 2, 128,
             [wanted('share_of_link', 0.333, 0.45), wanted('rival_share', 0.333, 0.45), BESIDE_CHAIN],
             impair=_lines(100), rate=100, rival=True, patience=4, tools=('kmcast', 'chain')),

    # The same where UDP reaches nobody. From one server to each of so many, it takes that many times as long.
    Scenario('chain-8-64', 'every port 100 Mbit/s, 8 clients, no UDP into any', 8, 64,
             [wanted('times_chain', 0.9, 1), wanted('share_of_link')],
             impair=_all(_lines(100), _lose_at_clients(100)), rate=100, patience=4, tools=('kmcast', 'chain')),
    Scenario('chain-16-128', 'every port 100 Mbit/s, 16 clients, no UDP into any', 16, 128,
             [wanted('times_chain', 0.9, 1), wanted('share_of_link')],
             impair=_all(_lines(100), _lose_at_clients(100)), rate=100, patience=4, tools=('kmcast', 'chain')),
    Scenario('chain-32-64', 'every port 100 Mbit/s, 32 clients, no UDP into any', 32, 64,
             [wanted('times_chain', 0.85, 0.95), wanted('share_of_link')],
             impair=_all(_lines(100), _lose_at_clients(100)), rate=100, patience=4, tools=('kmcast', 'chain')),

    # Many clients.
    Scenario('loopback-70', '70 clients on loopback', 70, 64, [wanted('cpu_per_round')],
             wire=False, tools=('kmcast',), loopback=True),
    Scenario('thousand', '1,000 clients played by one process on loopback', 1000, 256,
             [wanted('goodput_gbit', 1.5, 4), wanted('cpu_for_client', 30, 10), wanted('server_mib', 120, 100)],
             wire=False, tools=('kmcast',) + REFERENCES, loopback=True, crowd=[]),
    Scenario('thousand-loss1', 'the same, each asks again for a random 1 % of every round', 1000, 256,
             [wanted('goodput_gbit', 0.8, 2), wanted('cpu_for_client'), wanted('server_mib', 120, 100)],
             wire=False, tools=('kmcast',) + REFERENCES, loopback=True, crowd=['--loss', 1]),
    # Every byte goes to every client by TCP, so the image is small: two full rounds and what leads up to them.
    Scenario('thousand-dead', 'the same, each asks again for everything: multicast is dead', 1000, 24,
             [wanted('server_mib', 150, 120), wanted('goodput_gbit')],
             wire=False, tools=('kmcast',), loopback=True, crowd=['--loss', 100], patience=5),

    # Losses make both ends hold on to a round the longest, so this is where memory would grow.
    Scenario('memory', 'wire mode, 4 clients, 1 % independent loss at each: peak memory', 4, 1024,
             [wanted('peak_mib', 80, 60)],
             impair=_lose_at_clients(1), lossy=True, tools=('kmcast',)),
]


# ---------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------

# One run's surroundings. lab: the Laboratory; scenario: a Scenario; image: path of the file to be sent; size: its
# bytes; directory: a new one in tmpfs for what this run writes.
Job = collections.namedtuple('Job', 'lab scenario image size directory')

# One process to start. host: where; argv: what; stdin: path of its standard input.
Command = collections.namedtuple('Command', 'host argv stdin')


def command(host, argv, stdin=os.devnull):
    return Command(host, [str(word) for word in argv], stdin)


class Tool:
    """A tool in the benchmark.

    daemons   receivers go on after the image: the run ends with the sender, then they are told to stop
    to_files  receivers write `received(job)` and not their standard output
    """

    name = ''
    programs = ()
    daemons = False
    to_files = False

    def missing(self, scenario):
        """Return why the tool cannot run, or None."""
        absent = [program for program in self.programs if shutil.which(program) is None]
        return 'no program %s here (Debian packages udpcast, uftp, socat)' % ', '.join(absent) if absent else None

    def size(self, job):
        """Return how many bytes it sends."""
        return job.size

    def receivers(self, job):
        """Return the Commands of the receivers, which wait for the sender."""
        raise NotImplementedError

    def senders(self, job):
        """Return the Commands that send the image."""
        raise NotImplementedError

    def received(self, job):
        """Return the paths of the files that the receivers wrote."""
        return []


class Kmcast(Tool):
    """The program itself. Its digest is on, its rate is its own affair."""

    name = 'kmcast'

    def __init__(self, python, program):
        self._python = python
        self._program = program

    def python(self, scenario):
        """Return the path of the interpreter for this scenario, None if there is none."""
        return find_python(scenario.python) if scenario.python else self._python

    def missing(self, scenario):
        if not os.path.exists(self._program):
            return 'no %s' % self._program
        return None if self.python(scenario) else 'no %s here' % scenario.python

    def clients(self, scenario):
        """Return how many clients there are."""
        return scenario.clients

    def receivers(self, job):
        if job.scenario.crowd is not None:
            return [command(job.lab.server, [sys.executable, CROWD] + job.scenario.crowd
                            + ['127.0.0.1', self.clients(job.scenario)])]
        argv = [self.python(job.scenario), self._program, 'client'] + job.scenario.options
        if job.scenario.loopback:
            return [command(job.lab.server, argv + ['127.0.0.1', '127.0.0.1'])] * job.scenario.clients
        return [command(client, argv + [client.address, job.lab.server.address]) for client in job.lab.clients]

    def senders(self, job):
        address = '127.0.0.1' if job.scenario.loopback else job.lab.server.address
        argv = [self.python(job.scenario), self._program, 'server'] + job.scenario.options + [
            address, self.clients(job.scenario)]
        return [command(job.lab.server, argv, stdin=job.image)]


class Reference(Kmcast):
    """kmcast with less to do, to know what of its CPU time is for what: see `cpu_for_client`.

    name    'single': what the image costs with one client; 'brief': what it costs that clients come and go, with the
            start of an image and no more; 'least': what it costs in any case
    """

    IMAGE = 64 << 10        # bytes of a brief one

    def __init__(self, name, python, program):
        super().__init__(python, program)
        self.name = name

    def clients(self, scenario):
        return scenario.clients if self.name == 'brief' else 1

    def size(self, job):
        return job.size if self.name == 'single' else min(self.IMAGE, job.size)

    def senders(self, job):
        if self.size(job) == job.size:
            return super().senders(job)
        path = os.path.join(job.directory, 'brief')
        with open(job.image, 'rb') as image, open(path, 'wb') as start:
            start.write(image.read(self.size(job)))
        return super().senders(job._replace(image=path))


class Udpcast(Tool):
    """udpcast, as man udp-sender advises for a switched LAN: --full-duplex.

    Its sender sleeps for 2 s before it finds that all receivers have answered, and a receiver stays for 0.5 s after the
    last byte. That is part of what a user waits for, but weighs less the larger the image is: with --tuned-peers, options
    that the manual's advice for a LAN does not name make these waits short.
    Where datagrams get lost it is given forward error correction, in half duplex: without, a receiver that has fallen
    two slices behind is dropped ("Dropped by server"), which happened in every other run of 256 MiB and in every run of
    1 GiB, or the session hung. Tried and no better here: --broadcast, other slice sizes, --fec 8x8/128.
    """

    name = 'udpcast'
    programs = ('udp-sender', 'udp-receiver')
    tuned = False

    def receivers(self, job):
        argv = ['udp-receiver', '--nokbd', '--interface', 'eth0']
        if self.tuned and not job.scenario.lossy:
            argv += ['--exit-wait', 100]        # ms; it is for the case that the last acknowledgement is lost
        return [command(client, argv) for client in job.lab.clients]

    def senders(self, job):
        argv = ['udp-sender', '--file', job.image, '--interface', 'eth0', '--nokbd', '--no-progress', '--min-receivers',
                job.scenario.clients]
        if self.tuned:
            argv += ['--rexmit-hello-interval', 50]     # ms
        if job.scenario.lossy:
            # By default it takes a receiver for dead, and goes on without it, when a few questions got lost.
            argv += ['--fec', '8x4/128', '--retries-until-drop', 1000]
        else:
            argv += ['--full-duplex']
        if job.scenario.rate:
            argv += ['--max-bitrate', '%dk' % (990 * job.scenario.rate)]
        return [command(job.lab.server, argv)]


class Uftp(Tool):
    """UFTP, as man uftp advises for a fast LAN: -R -1 (no rate limit), or the known rate where a link is slow.

    -B 4 MB: socket buffers for that speed (the manual's own example has 2 MB; net.core.rmem_max is the bound), -b 1400:
    100 bytes below the MTU. -H names the receivers, so that the sender starts as soon as all are there, -q fails the
    run if one drops out. Tried and no better here: -c 20 MB, -r 0.02, fixed rates near the goodput, and -C tfmcc (its
    congestion control), which makes 40 % of the unlimited rate without loss and 20 % with 1 %.

    Its receivers write a file and nothing else: it goes to tmpfs, which costs them a copy that a /dev/null would not.
    """

    name = 'uftp'
    programs = ('uftp', 'uftpd')
    daemons = True
    to_files = True

    def missing(self, scenario):
        free = os.statvfs(RAMDISK)
        needed = (scenario.clients + 1) * scenario.mib * MIB
        if needed > min(free.f_bavail * free.f_frsize, available_memory()):
            return 'its receivers would need %d MiB in %s' % (needed / MIB, RAMDISK)
        return super().missing(scenario)

    @staticmethod
    def _directory(job, client):
        return os.path.join(job.directory, client.name)

    def receivers(self, job):
        commands = []
        for client in job.lab.clients:
            os.mkdir(self._directory(job, client))
            commands.append(command(client, ['uftpd', '-d', '-q', '-I', 'eth0', '-B', 4 * MIB,
                                             '-D', self._directory(job, client)]))
        return commands

    def senders(self, job):
        # A receiver is named by its address as a hexadecimal number.
        names = ['0x' + ''.join('%02X' % int(part) for part in client.address.split('.')) for client in job.lab.clients]
        rate = 980 * job.scenario.rate if job.scenario.rate else -1      # in kbit/s
        return [command(job.lab.server, ['uftp', '-q', '-I', 'eth0', '-R', rate, '-B', 4 * MIB, '-b', 1400,
                                         '-H', ','.join(names), job.image])]

    def received(self, job):
        return [os.path.join(self._directory(job, client), os.path.basename(job.image)) for client in job.lab.clients]


SOCAT = ['socat', '-u', '-b', 256 * 1024]      # its default of 8 KB would cost it half its speed


class Tcp(Tool):
    """As many parallel TCP copies by socat as there are clients: what one does without multicast."""

    name = 'tcp'
    programs = ('socat',)
    _PORT = 7000

    def receivers(self, job):
        return [command(client, SOCAT + ['TCP-LISTEN:%d' % self._PORT, 'STDOUT']) for client in job.lab.clients]

    def senders(self, job):
        return [command(job.lab.server, SOCAT + ['STDIN', 'TCP:%s:%d' % (client.address, self._PORT)],
                        stdin=job.image) for client in job.lab.clients]


class Chain(Tool):
    """A chain of socat and tee: each host passes the image on to the next while it writes it.

    It checks nothing, a host that dies takes those behind it along, and somebody must have named its successor to each
    host. But the kernel does nearly all of its work, and every port carries the image once: so it shows what a line and
    a machine can do.
    """

    name = 'chain'
    programs = ('socat', 'tee', 'bash')
    _PORT = 7001
    # Whoever is the next may not listen yet.
    _TO = 'TCP:%s:%d,retry=100,interval=0.1'
    # tee writes one copy to the sink, which is descriptor 3 here, and one to its output, for the next host.
    _LINK = 'set -o pipefail; exec 3>&1; %s TCP-LISTEN:%d,reuseaddr STDOUT | tee /dev/fd/3 | %s STDIN %s'

    def receivers(self, job):
        clients = job.lab.clients
        socat = ' '.join(map(str, SOCAT))
        links = [command(client, ['bash', '-c', self._LINK % (
            socat, self._PORT, socat, self._TO % (successor.address, self._PORT))])
            for client, successor in zip(clients, clients[1:])]
        return links + [command(clients[-1], SOCAT + ['TCP-LISTEN:%d,reuseaddr' % self._PORT, 'STDOUT'])]

    def senders(self, job):
        return [command(job.lab.server, SOCAT + ['STDIN', self._TO % (job.lab.clients[0].address, self._PORT)],
                        stdin=job.image)]


class Rival:
    """A TCP transfer without end, from the server's host to the first client's, while a `with` block runs."""

    _PORT = 7002

    def __init__(self, job):
        self._job = job
        self._processes = []

    def __enter__(self):
        source, sink = self._job.lab.server, self._job.lab.clients[0]
        to = 'TCP:%s:%d,retry=100,interval=0.1' % (sink.address, self._PORT)
        for name, where in (('sink', command(sink, SOCAT + ['TCP-LISTEN:%d' % self._PORT, 'STDOUT'])),
                            ('source', command(source, SOCAT + ['STDIN', to], stdin='/dev/zero'))):
            self._processes.append(Process(where, 'rival-' + name, self._job.directory, subprocess.DEVNULL))
        time.sleep(1)               # it has the whole line by then
        return self

    def received(self):
        """Return how many bytes have arrived: what the sink has written."""
        with open('/proc/%d/io' % self._processes[0].pid) as io:        # man 5 proc
            return int(re.search(r'wchar: (\d+)', io.read()).group(1))

    def __exit__(self, *exception):
        for process in self._processes:
            process.popen.kill()
            process.popen.wait()


def find_python(name):
    """Return the path of an interpreter ('python2.7') in ~/.pyenv/versions, or of the one on PATH, or None."""
    versions = os.path.expanduser('~/.pyenv/versions')
    wanted = name[len('python'):] + '.'
    for version in sorted(os.listdir(versions), reverse=True) if os.path.isdir(versions) else ():
        path = os.path.join(versions, version, 'bin', 'python')
        if version.startswith(wanted) and os.access(path, os.X_OK):
            return path
    return shutil.which(name)


def available_memory():
    """Return how many bytes of memory could be used without swapping."""
    with open('/proc/meminfo') as meminfo:
        return 1024 * int(re.search(r'MemAvailable:\s+(\d+)', meminfo.read()).group(1))


# ---------------------------------------------------------------------------
# Measuring one run
# ---------------------------------------------------------------------------

class RunFailed(Exception):
    """A run gave no figure; the message says which process, and how."""


class Process:
    """A process of a run, what it used, and its standard error in a file.

    cores    where it may run, as taskset takes it; None: anywhere

    code     exit code, negative for a signal, None while it runs
    ended    time.monotonic() at its end
    cpu      CPU seconds, user and system
    peak     largest resident size so far, in bytes
    """

    def __init__(self, where, label, directory, stdout, cores=None):
        self.label = label
        self._stderr_path = os.path.join(directory, label + '.stderr')
        self.code = self.ended = None
        self.cpu = self.peak = 0
        with open(where.stdin, 'rb') as stdin, open(self._stderr_path, 'wb') as stderr:
            argv = (['taskset', '-c', cores] if cores else []) + where.argv
            self.popen = where.host.popen(argv, stdin=stdin, stdout=stdout, stderr=stderr)
        self.pid = self.popen.pid

    def stderr(self):
        with open(self._stderr_path, errors='replace') as stderr:
            return stderr.read()

    def sample(self):
        """Note the high-water mark of the resident size."""
        try:
            with open('/proc/%d/status' % self.pid) as status:
                match = re.search(r'VmHWM:\s+(\d+) kB', status.read())
        except FileNotFoundError:
            return
        if match:
            self.peak = max(self.peak, 1024 * int(match.group(1)))

    def reaped(self, status, usage):
        """Take what os.wait4 told."""
        self.ended = time.monotonic()
        self.code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.popen.returncode = self.code
        self.cpu = usage.ru_utime + usage.ru_stime
        # ru_maxrss survives exec: a small program's is that of the Python that forked it, ours. Above that it is the
        # program's own, and exact; below, the last sample must do.
        if usage.ru_maxrss > own_peak():
            self.peak = 1024 * usage.ru_maxrss

    def complaint(self):
        """Return how it failed, in a line."""
        how = 'exit code %d' % self.code if self.code is not None else 'did not end'
        said = [line.strip() for line in re.split(r'[\r\n]+', self.stderr()) if line.strip()]
        return '%s: %s%s' % (self.label, how, ' (%s)' % said[-1][:150] if said else '')


def own_peak():
    """Return this process's own peak resident size, in KiB, which its children's ru_maxrss starts from."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reap(awaited, everyone, deadline):
    """Return when all `awaited` processes have ended; note of `everyone` what they use.

    When one has failed, the others get GRACE seconds. Raises RunFailed at a failure or at the deadline.
    """
    by_pid = {process.pid: process for process in everyone}
    with child_signals() as wakeup:
        while any(process.code is None for process in awaited):
            for process in everyone:
                process.sample()
            select.select([wakeup], [], [], SAMPLE_INTERVAL)
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
            for pid in [process.pid for process in everyone if process.code is None]:
                ended, status, usage = os.wait4(pid, os.WNOHANG)
                if ended:
                    by_pid[pid].reaped(status, usage)
                    if by_pid[pid].code != 0:
                        deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                break
    # The failures first: those who did not end may only have waited for them.
    failed = ([process for process in everyone if process.code not in (None, 0)]
              + [process for process in awaited if process.code is None])
    if failed:
        raise RunFailed('; '.join(process.complaint() for process in failed[:2]))


@contextlib.contextmanager
def child_signals():
    """Give a descriptor that becomes readable when a child has ended, so that nobody needs to poll."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writer)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, before)
        os.close(reader)
        os.close(writer)


def await_quiet(processes):
    """Return when the receivers have started up and only wait: when they take less than 5 % of one CPU."""
    def used():
        ticks = 0
        for process in processes:
            with contextlib.suppress(FileNotFoundError):
                with open('/proc/%d/stat' % process.pid) as stat:
                    ticks += sum(map(int, stat.read().rsplit(')', 1)[1].split()[11:13]))     # man 5 proc
        return ticks

    interval = 0.4      # seconds: with the usual 100 ticks a second, 5 % of a CPU are 2 ticks
    allowed = 0.05 * interval * os.sysconf('SC_CLK_TCK')
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        before = used()
        time.sleep(interval)
        if used() - before <= allowed:
            return


def await_idle_machine():
    """Wait for the other work on this machine to pause; return the share of the CPUs that it takes if it does not."""
    def ticks():
        with open('/proc/stat') as stat:
            values = [int(value) for value in stat.readline().split()[1:]]      # man 5 proc: idle and iowait are 3, 4
        return sum(values), sum(values) - values[3] - values[4]

    give_up = time.monotonic() + IDLE_PATIENCE
    while True:
        total, busy = ticks()
        time.sleep(0.5)
        total, busy = [now - before for now, before in zip(ticks(), (total, busy))]
        share = busy / max(1, total)
        if share < 0.1:
            return 0.0
        if time.monotonic() > give_up:
            return share


def measure(tool, job, open_sinks):
    """Run a tool once and return its figures as a dict. Raises RunFailed.

    open_sinks(n) is called for the standard outputs of the n receivers: a context manager of a list of files.
    """
    commands = tool.receivers(job)
    sender_cores, receiver_cores = CORES if job.scenario.pinned else (None, None)
    with open_sinks(len(commands)) as sinks:
        receivers = [Process(where, 'client%d' % number, job.directory, sink, receiver_cores)
                     for number, (where, sink) in enumerate(zip(commands, sinks))]
    await_quiet(receivers)

    rival_rate = None
    with contextlib.ExitStack() as stack:
        rival = stack.enter_context(Rival(job)) if job.scenario.rival else None
        start = time.monotonic()
        before = rival.received() if rival else 0
        senders = [Process(where, 'server%d' % number, job.directory, subprocess.DEVNULL, sender_cores)
                   for number, where in enumerate(tool.senders(job))]
        awaited = senders if tool.daemons else senders + receivers
        reap(awaited, senders + receivers, start + job.scenario.timeout(job.size))
        if rival:
            rival_rate = (rival.received() - before) * 8e-6 / (time.monotonic() - start)
    seconds = max(process.ended for process in awaited) - start

    if tool.daemons:
        stop_daemons(receivers)
    gigabytes = tool.size(job) / 1e9
    cpu_server = sum(process.cpu for process in senders)
    own = isinstance(tool, Kmcast)
    rounds = round_count(senders[0].stderr()) if own else None
    return {
        'seconds': seconds,
        'goodput': gigabytes * 8e3 / seconds,                                           # Mbit/s
        'cpu_server_all': cpu_server,                                                   # seconds
        'cpu_server': cpu_server / gigabytes,                                           # seconds per 10^9 bytes
        'cpu_client': sum(process.cpu for process in receivers) / len(receivers) / gigabytes,
        'rss_server': max(process.peak for process in senders) / MIB,                   # MiB
        'rss_client': max(process.peak for process in receivers) / MIB,
        'repair': repair_traffic(senders[0].stderr()) if own else None,
        'rounds': rounds,
        'us_round': 1e6 * cpu_server / rounds / tool.clients(job.scenario) if rounds else None,
        'rival': rival_rate,                                                            # Mbit/s
        'crowd': crowd_report(receivers[0].stderr()) if own and job.scenario.crowd is not None else None,
    }


def crowd_report(said):
    """Return what crowd.py said at its end, as a dict."""
    return json.loads(said.strip().splitlines()[-1])


def stop_daemons(receivers):
    """End the receivers that do not end by themselves, to learn what they used; their exit code says nothing."""
    for process in receivers:
        process.sample()
        process.popen.terminate()
    for process in receivers:
        _, status, usage = os.wait4(process.pid, 0)
        process.reaped(status, usage)


def repair_traffic(summary):
    """Return a kmcast server's (data, repairs by multicast, repairs by TCP), in packets; None if it did not tell."""
    data = re.search(r'data: (\d+) packets', summary)
    repair = re.search(r'repair: (\d+) packets by multicast, (\d+) packets by TCP', summary)
    return [int(data.group(1))] + [int(count) for count in repair.groups()] if data and repair else None


def round_count(summary):
    """Return how many rounds a kmcast server's summary names; None if it does not."""
    match = re.search(r'(\d+) rounds?\b', summary)
    return int(match.group(1)) if match else None


# ---------------------------------------------------------------------------
# Sinks, and verifying every byte
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def null_sinks(count):
    """The timed part: /dev/null."""
    with open(os.devnull, 'wb') as sink:
        yield [sink] * count


class HashingSinks:
    """The verifying part: a sha256sum behind each receiver."""

    def __init__(self):
        self._hashers = []

    @contextlib.contextmanager
    def open(self, count):
        for _ in range(count):
            self._hashers.append(subprocess.Popen(['sha256sum'], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        try:
            yield [hasher.stdin for hasher in self._hashers]
        finally:
            for hasher in self._hashers:        # the receivers have their own copies: only they keep the pipes open
                hasher.stdin.close()

    def digests(self):
        """Return the digests, once the receivers have ended."""
        digests = [hasher.stdout.read().split()[0].decode() for hasher in self._hashers]
        for hasher in self._hashers:
            hasher.stdout.close()
            hasher.wait()
        return digests


def file_digest(path):
    """Return a file's SHA-256 in hexadecimal, or why there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(MIB), b''):
                digest.update(block)
    except OSError as error:
        return str(error)
    return digest.hexdigest()


def compare(digests, expected):
    """Raise RunFailed unless every receiver has the image."""
    wrong = sum(digest != expected for digest in digests)
    if wrong:
        raise RunFailed('%d of %d receivers do not have the image' % (wrong, len(digests)))


class Bench:
    """Runs tools in scenarios on one image.

    image     path of a file in tmpfs; as many bytes of it as a scenario needs are there at a time
    size      what of it is there, in bytes
    """

    def __init__(self, directory):
        self._directory = directory
        self.image = os.path.join(directory, 'image')
        self.size = 0
        self._digest = None

    def make_image(self, size):
        """Make the image that size, of random bytes: no tool can gain by compressing or by sparse blocks."""
        if size == self.size:
            return
        digest = hashlib.sha256()
        with open(self.image, 'wb') as image:
            for offset in range(0, size, MIB):
                block = os.urandom(min(MIB, size - offset))
                image.write(block)
                digest.update(block)
        self.size, self._digest = size, digest.hexdigest()

    def run(self, tool, scenario, open_sinks=null_sinks):
        """Run a tool once in a new laboratory and return its figures. Raises RunFailed.

        A tool that writes files is verified here, after the clock has stopped.
        """
        directory = tempfile.mkdtemp(dir=self._directory)
        try:
            clients = 0 if scenario.loopback else scenario.clients
            with laboratory.Laboratory(clients, wire=scenario.wire) as lab:
                scenario.impair(lab)
                job = Job(lab, scenario, self.image, self.size, directory)
                figures = measure(tool, job, open_sinks)
            if tool.to_files:
                compare([file_digest(path) for path in tool.received(job)], self._digest)
            return figures
        finally:
            shutil.rmtree(directory)

    def verify(self, tool, scenario):
        """Check that the tool brings every byte to every receiver. Raises RunFailed.

        Hashing what comes out would take CPU from the tools in the timed runs, where the receivers write to /dev/null:
        so each tool has one more run in each scenario, not timed, with sha256sum as the sink. A tool that writes files
        needs none: all its files are hashed after every run. A crowd keeps nothing that could be hashed.
        """
        if not tool.to_files and scenario.crowd is None:
            sinks = HashingSinks()
            try:
                self.run(tool, scenario, sinks.open)
            finally:
                digests = sinks.digests()
            compare(digests, self._digest)


# ---------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------

def _median(runs, key):
    values = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(values) if values else None


def _middle(results, name, key):
    return results.get(name, {}).get('median', {}).get(key)


def _goodput(results, name):
    return _middle(results, name, 'goodput')


def _ratio(results, peers):
    mine = _goodput(results, 'kmcast')
    others = [_goodput(results, name) for name in peers if _goodput(results, name)]
    return mine / max(others) if mine and others else None


# What is judged in a scenario, each from its results: {tool's name: {'runs': [figures], 'median': figures, …}}.
# All return None where there is nothing to judge.

def times_best_peer(scenario, results):
    """kmcast's goodput as a multiple of the best peer's"""
    return _ratio(results, ('udpcast', 'uftp'))


def times_tcp(scenario, results):
    """kmcast's goodput as a multiple of that of parallel TCP copies"""
    return _ratio(results, ('tcp',))


def times_chain(scenario, results):
    """kmcast's goodput as a multiple of that of a chain of socat and tee"""
    return _ratio(results, ('chain',))


def goodput_gbit(scenario, results):
    """kmcast's goodput in Gbit/s"""
    mine = _goodput(results, 'kmcast')
    return mine / 1000 if mine else None


def rival_share(scenario, results):
    """goodput of the TCP transfer beside kmcast as a share of what the link can carry as payload"""
    rival = _middle(results, 'kmcast', 'rival')
    return rival / (scenario.rate * TCP_PAYLOAD_SHARE) if rival is not None else None


def cpu_for_client(scenario, results):
    """CPU microseconds of kmcast's server for one more client and a round"""
    # Not in it are the image itself, with which the figure would tell how large the rounds are, and the greetings and
    # farewells, with which it would tell how many rounds there are.
    names = ('kmcast', 'brief', 'single', 'least')
    cpu = [_middle(results, name, 'cpu_server_all') for name in names]
    rounds = [_middle(results, name, 'rounds') for name in names]
    if None in cpu + rounds or rounds[0] <= rounds[1]:
        return None
    of_rounds = (cpu[0] - cpu[1]) - (cpu[2] - cpu[3])
    return 1e6 * of_rounds / (rounds[0] - rounds[1]) / (scenario.clients - 1)


def share_of_link(scenario, results):
    """kmcast's goodput as a share of what the link can carry as payload"""
    mine = _goodput(results, 'kmcast')
    return mine / (scenario.rate * PAYLOAD_SHARE) if mine else None


def repair_share(scenario, results):
    """kmcast's repair packets, by multicast and by TCP, as a share of the data's"""
    told = [run['repair'] for run in results.get('kmcast', {}).get('runs', []) if run['repair']]
    return statistics.median((by_multicast + by_tcp) / data for data, by_multicast, by_tcp in told) if told else None


def cpu_per_round(scenario, results):
    """CPU seconds of kmcast's server per round"""
    gigabytes = results.get('kmcast', {}).get('size', 0) / 1e9
    told = [run for run in results.get('kmcast', {}).get('runs', []) if run['rounds']]
    return statistics.median(run['cpu_server'] * gigabytes / run['rounds'] for run in told) if told else None


def server_mib(scenario, results):
    """the largest peak of kmcast's server, in MiB"""
    runs = results.get('kmcast', {}).get('runs', [])
    return max(run['rss_server'] for run in runs) if runs else None


def peak_mib(scenario, results):
    """the larger peak of kmcast's server and clients, in MiB"""
    runs = results.get('kmcast', {}).get('runs', [])
    return max(max(run['rss_server'], run['rss_client']) for run in runs) if runs else None


FIGURES = {function.__name__: function for function in (
    times_best_peer, times_tcp, times_chain, goodput_gbit, share_of_link, rival_share, repair_share, cpu_per_round,
    cpu_for_client, server_mib, peak_mib)}
SMALLER_IS_BETTER = ('repair_share', 'cpu_per_round', 'cpu_for_client', 'server_mib', 'peak_mib')


def judge(scenario, results):
    """Return the scenario's judged figures, a dict each: what it is, its value, what is wanted, and how it stands."""
    judged = []
    for figure, least, aim in scenario.wanted:
        function = FIGURES[figure]
        value = function(scenario, results)
        if value is None:
            verdict = 'not known (a tool did not run, or did not tell)'
        elif least is None:
            verdict = 'for information'
        else:
            sign = -1 if figure in SMALLER_IS_BETTER else 1
            verdict = ('aim reached' if sign * value >= sign * aim else
                       'enough' if sign * value >= sign * least else 'NOT ENOUGH')
        judged.append({'figure': figure, 'what': function.__doc__, 'value': value, 'least': least, 'aim': aim,
                       'verdict': verdict})
    return judged


# ---------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------

def run_scenario(bench, scenario, tools, repeat, verify):
    """Run all tools in one scenario and return its results: {tool's name: {'runs', 'median', 'failures', 'size'}}."""
    results = collections.OrderedDict()
    taking_part = []
    for tool in tools:
        if tool.name not in scenario.tools:
            continue
        reason = tool.missing(scenario)
        if reason:
            say('%s: %s skipped: %s' % (scenario.name, tool.name, reason))
            continue
        taking_part.append(tool)
        results[tool.name] = {'runs': [], 'failures': [], 'size': bench.size}

    def attempt(tool, what, action):
        try:
            return action()
        except RunFailed as failure:
            say('%s: %s failed, %s: %s' % (scenario.name, tool.name, what, failure))
            results[tool.name]['failures'].append('%s: %s' % (what, failure))

    for repetition in range(1, repeat + 1):
        for tool in taking_part:
            foreign = await_idle_machine()
            if foreign:
                say('%s: something else takes %.0f %% of the CPUs: do not trust %s run %d' % (
                    scenario.name, 100 * foreign, tool.name, repetition))
            figures = attempt(tool, 'run %d' % repetition, lambda: bench.run(tool, scenario))
            if figures:
                figures['foreign_load'] = foreign
                results[tool.name]['runs'].append(figures)
                say('%s: %s run %d: %.2f s, %.0f Mbit/s' % (
                    scenario.name, tool.name, repetition, figures['seconds'], figures['goodput']))
    for tool in taking_part if verify else ():
        attempt(tool, 'verification', lambda: bench.verify(tool, scenario))
    for result in results.values():
        result['median'] = {key: _median(result['runs'], key) for key in (
            'seconds', 'goodput', 'cpu_server', 'cpu_server_all', 'cpu_client', 'rss_server', 'rss_client', 'rounds',
            'us_round', 'rival')}
    return results


def table(scenario, size, results, judged):
    """Return the lines of a scenario's table."""
    row = '  %-8s %9s %9s   %8s %8s %8s   %8s %8s   '
    row += '%6s   %s' if scenario.rival else '%s%s'
    rival = ('rival', 'Mbit/s') if scenario.rival else ('', '')
    lines = ['%s: %s, %d MiB' % (scenario.name, scenario.title, size / MIB),
             row % ('', 'goodput', '', 'CPU s/GB', 'CPU s/GB', 'us/round', 'peak MiB', 'peak MiB', rival[0], ''),
             row % ('tool', 'Mbit/s', '/ kmcast', 'server', 'client', 'server', 'server', 'client', rival[1], 'runs')]
    own = _goodput(results, 'kmcast')
    for name, result in results.items():
        median = result['median']
        runs = '%d' % len(result['runs']) + (', %d failed' % len(result['failures']) if result['failures'] else '')
        if not result['runs']:
            lines.append(row % (name, 'failed', '', '', '', '', '', '', '', runs))
            continue
        # A line's last percent matters, and at 100 Mbit/s that takes a decimal.
        lines.append(row % (name, '%.*f' % (0 if median['goodput'] >= 1000 else 1, median['goodput']),
                            '%.2f' % (median['goodput'] / own) if own else '-',
                            '%.2f' % median['cpu_server'], '%.2f' % median['cpu_client'],
                            '%.0f' % median['us_round'] if median['us_round'] else '',
                            '%.0f' % median['rss_server'], '%.0f' % median['rss_client'],
                            '%.1f' % median['rival'] if scenario.rival else '', runs))
    for figure in judged:
        value = '-' if figure['value'] is None else '%.3g' % figure['value']
        bounds = '' if figure['least'] is None else ', at %s %g, aim %g' % (
            'most' if figure['figure'] in SMALLER_IS_BETTER else 'least', figure['least'], figure['aim'])
        lines.append('  %s: %s%s: %s' % (figure['what'], value, bounds, figure['verdict']))
    return lines


def environment(python):
    """Return what the figures depend on, as a dict."""
    return {'kernel': platform.release(), 'machine': platform.machine(), 'cpus': os.cpu_count(),
            'python': subprocess.check_output([python, '-c', 'import sys; print(sys.version.split()[0])'],
                                              universal_newlines=True).strip(),
            'date': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}


def say(text):
    """Report progress: on stderr, so that stdout is the tables alone."""
    print(text, file=sys.stderr, flush=True)


TOOLS = ('kmcast',) + REFERENCES + ('chain', 'udpcast', 'uftp', 'tcp')


def arguments():
    parser = argparse.ArgumentParser(
        description='Measure kmcast against udpcast, UFTP, a chain of socat and parallel TCP copies in a laboratory of '
                    'network namespaces.')
    parser.add_argument('--scenario', nargs='+', metavar='NAME', choices=[scenario.name for scenario in SCENARIOS],
                        help='only these (default: all; see --list)')
    parser.add_argument('--tool', nargs='+', metavar='NAME', choices=TOOLS,
                        help='only these of %s (default: all)' % ', '.join(TOOLS))
    parser.add_argument('--repeat', type=int, default=3, metavar='N', help='repetitions (default: 3)')
    parser.add_argument('--size', type=int, metavar='MIB', help='size of the image instead of the scenarios\' own')
    parser.add_argument('--tuned-peers', action='store_true', help='spare udpcast its waits at start and end')
    parser.add_argument('--python', default=sys.executable, metavar='PATH', help='interpreter for kmcast')
    parser.add_argument('--kmcast', default=KMCAST, metavar='PATH', help='another kmcast.py than this repository\'s')
    parser.add_argument('--json', metavar='FILE', help='write all figures there')
    parser.add_argument('--no-verify', action='store_true', help='leave out the run that verifies every byte')
    parser.add_argument('--list', action='store_true', help='list the scenarios and end')
    return parser.parse_args()


def main():
    options = arguments()
    if options.list:
        for scenario in SCENARIOS:
            print('%-15s %s, %d MiB' % (scenario.name, scenario.title, scenario.mib))
        return 0
    reason = laboratory.why_not()
    if reason:
        say('no benchmark here: ' + reason)
        return 1

    Udpcast.tuned = options.tuned_peers
    own = options.python, options.kmcast
    tools = [Kmcast(*own)] + [Reference(name, *own) for name in REFERENCES] + [Chain(), Udpcast(), Uftp(), Tcp()]
    tools = [tool for tool in tools if not options.tool or tool.name in options.tool]
    report = {'environment': environment(options.python), 'repeat': options.repeat,
              'scenarios': collections.OrderedDict()}
    directory = tempfile.mkdtemp(prefix='kmbench-', dir=RAMDISK)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))        # so that it too takes the laboratory down
    try:
        bench = Bench(directory)
        for scenario in SCENARIOS:
            if options.scenario and scenario.name not in options.scenario:
                continue
            bench.make_image((options.size or scenario.mib) * MIB)
            results = run_scenario(bench, scenario, tools, options.repeat, not options.no_verify)
            judged = judge(scenario, results)
            report['scenarios'][scenario.name] = {'title': scenario.title, 'size': bench.size, 'figures': judged,
                                                  'tools': results}
            print('\n'.join(table(scenario, bench.size, results, judged)) + '\n', flush=True)
            if options.json:        # after each scenario, so that an interrupted benchmark leaves what it has
                with open(options.json, 'w') as file:
                    json.dump(report, file, indent=1)
    finally:
        shutil.rmtree(directory)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
