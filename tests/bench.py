"""The benchmark: kmcast against the tools that a user would pick today, in the laboratory of lab.py. Needs root.

    python3 tests/bench.py                                  # everything, about an hour on two cores
    python3 tests/bench.py --list
    python3 tests/bench.py --scenario wire-4 wire-4-loss1 --repeat 1 --size 256
    python3 tests/bench.py --tool kmcast --json figures.json

Each run has a fresh laboratory, the same image (random bytes in tmpfs) and receivers that wait already. The clock runs
from the start of the sender to the exit of the sender and all receivers; of UFTP, whose receivers are daemons, to the
sender's exit. Nothing is subtracted: finding each other, the last acknowledgements and the start of an interpreter
are part of it. The tools take turns within each repetition, so that a busy moment of the machine meets all of them.
A run that hangs, or of which one process fails, is a failed run: it gives no figure and is counted in the table.

In the table:
    Mbit/s       goodput: the image's bits over the run's time, in 10^6 bit/s
    / kmcast     that as a multiple of kmcast's
    CPU s/GB     CPU seconds a process itself used per 10^9 bytes of the image; a client's is the mean of all. The
                 kernel's work on the virtual wire lands on whoever runs when it is done, which is mostly the sender
    peak MiB     the largest resident size of the server, and of the largest client
All are medians of the repetitions that succeeded.

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

GRACE = 30.0            # seconds that the others get to stop once one process has failed
SAMPLE_INTERVAL = 0.25  # seconds between two looks at the processes' memory
IDLE_PATIENCE = 30.0    # seconds to wait for other work on the machine to pause, before a timed run


# ---------------------------------------------------------------------------
# Scenarios
# ---------------------------------------------------------------------------

class Scenario:
    """One row of the benchmark.

    name     as on the command line
    title    what it is, in a line
    clients  how many
    mib      size of the image, in MiB
    wire     whether every MTU frame crosses alone; False lets super-packets cross
    figure   what is judged: the name of a function of `FIGURES`
    least    what that must reach, and
    aim      what it should reach
    impair   called with the laboratory when it stands
    rate     Mbit/s of IP packets that the slowest link carries: told to the peers, which cannot find out. kmcast
             is never told. None: no limit but the machine
    lossy    whether datagrams are lost on the way, so that a peer may be given its options for that
    tools    names of those that can take part
    options  more options for both ends of kmcast
    python   'python2.7': which interpreter kmcast needs here, None: any
    loopback all processes on one host, at 127.0.0.1
    """

    def __init__(self, name, title, clients, mib, figure, least, aim, wire=True, impair=None, rate=None, lossy=False,
                 tools=('kmcast', 'udpcast', 'uftp'), options=(), python=None, loopback=False):
        self.name = name
        self.title = title
        self.clients = clients
        self.mib = mib
        self.figure = figure
        self.least = least
        self.aim = aim
        self.wire = wire
        self.impair = impair or (lambda lab: None)
        self.rate = rate
        self.lossy = lossy
        self.tools = tools
        self.options = list(options)
        self.python = python
        self.loopback = loopback

    def timeout(self, size):
        """Seconds after which a run with an image of `size` bytes hangs: many times what the slowest tool takes."""
        return 60 + 4 * size * 8e-6 / (self.rate or 200)


def _lose_at_clients(percent):
    return lambda lab: [client.lose(percent) for client in lab.clients]


def _limit_ports(mbit, count=None):
    return lambda lab: [client.limit(mbit) for client in lab.clients[:count]]


def _block_multicast(lab):
    for client in lab.clients:
        client.block_multicast()


SCENARIOS = [
    Scenario('super-1', 'super-packets cross, 1 client', 1, 1024, 'times_best_peer', 4.5, 7, wire=False),
    Scenario('super-4', 'super-packets cross, 4 clients', 4, 1024, 'times_best_peer', 5.5, 10, wire=False),
    Scenario('wire-1', 'wire mode, 1 client', 1, 1024, 'times_best_peer', 1.4, 1.6),
    Scenario('wire-4', 'wire mode, 4 clients', 4, 1024, 'times_best_peer', 2.3, 3),
    Scenario('wire-4-loss1', 'wire mode, 4 clients, 1 % independent loss at each', 4, 1024, 'times_best_peer', 2, 3,
             impair=_lose_at_clients(1), lossy=True),
    Scenario('repair-32', 'wire mode, 32 clients, 1 % independent loss at each', 32, 64, 'repair_share', 0.03, 0.02,
             impair=_lose_at_clients(1), lossy=True, tools=('kmcast',)),
    Scenario('wire-4-shared2', 'wire mode, 4 clients, 2 % loss shared by all', 4, 1024, 'times_best_peer', 2, 3,
             impair=lambda lab: lab.server.lose_egress(2), lossy=True),
    Scenario('port-100', "wire mode, 4 clients, each one's port 100 Mbit/s", 4, 128, 'share_of_link', 0.90, 0.97,
             impair=_limit_ports(100), rate=100),
    Scenario('one-port-100', 'wire mode, 4 clients, one port 100 Mbit/s', 4, 128, 'share_of_link', 0.90, 0.97,
             impair=_limit_ports(100, 1), rate=100),
    Scenario('egress-200', "wire mode, 8 clients, the server's egress 200 Mbit/s", 8, 1024, 'share_of_link', 0.95, 0.98,
             impair=lambda lab: lab.server.limit_egress(200), rate=200),
    Scenario('blocked-4', 'wire mode, 4 clients, multicast blocked for all', 4, 1024, 'times_tcp', 0.8, 1,
             impair=_block_multicast, tools=('kmcast', 'tcp')),
    Scenario('mmsg-py27', 'wire mode, 4 clients, kmcast on Python 2.7 with sendmmsg and recvmmsg', 4, 1024,
             'times_best_peer', 1, 1.3, options=['--datagrams', 'mmsg'], python='python2.7'),
    Scenario('loopback-70', '70 clients on loopback', 70, 64, 'cpu_per_round', None, None, wire=False,
             tools=('kmcast',), loopback=True),
    # Losses make both ends hold on to a round the longest, so this is where memory would grow.
    Scenario('memory', 'wire mode, 4 clients, 1 % independent loss at each: peak memory', 4, 1024, 'peak_mib', 80, 50,
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

    def __init__(self, python):
        self._python = python

    def python(self, scenario):
        """Return the path of the interpreter for this scenario, None if there is none."""
        return find_python(scenario.python) if scenario.python else self._python

    def missing(self, scenario):
        if not os.path.exists(KMCAST):
            return 'no %s' % KMCAST
        return None if self.python(scenario) else 'no %s here' % scenario.python

    def receivers(self, job):
        argv = [self.python(job.scenario), KMCAST, 'client'] + job.scenario.options
        if job.scenario.loopback:
            return [command(job.lab.server, argv + ['127.0.0.1', '127.0.0.1'])] * job.scenario.clients
        return [command(client, argv + [client.address, job.lab.server.address]) for client in job.lab.clients]

    def senders(self, job):
        address = '127.0.0.1' if job.scenario.loopback else job.lab.server.address
        argv = [self.python(job.scenario), KMCAST, 'server'] + job.scenario.options + [address, job.scenario.clients]
        return [command(job.lab.server, argv, stdin=job.image)]


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


class Tcp(Tool):
    """As many parallel TCP copies by socat as there are clients: what one does without multicast."""

    name = 'tcp'
    programs = ('socat',)
    _PORT = 7000
    _SOCAT = ['socat', '-u', '-b', 256 * 1024]      # its default of 8 KB would cost it half its speed

    def receivers(self, job):
        return [command(client, self._SOCAT + ['TCP-LISTEN:%d' % self._PORT, 'STDOUT']) for client in job.lab.clients]

    def senders(self, job):
        return [command(job.lab.server, self._SOCAT + ['STDIN', 'TCP:%s:%d' % (client.address, self._PORT)],
                        stdin=job.image) for client in job.lab.clients]


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

    code     exit code, negative for a signal, None while it runs
    ended    time.monotonic() at its end
    cpu      CPU seconds, user and system
    peak     largest resident size so far, in bytes
    """

    def __init__(self, where, label, directory, stdout):
        self.label = label
        self._stderr_path = os.path.join(directory, label + '.stderr')
        self.code = self.ended = None
        self.cpu = self.peak = 0
        with open(where.stdin, 'rb') as stdin, open(self._stderr_path, 'wb') as stderr:
            self.popen = where.host.popen(where.argv, stdin=stdin, stdout=stdout, stderr=stderr)
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
    with open_sinks(len(commands)) as sinks:
        receivers = [Process(where, 'client%d' % number, job.directory, sink)
                     for number, (where, sink) in enumerate(zip(commands, sinks))]
    await_quiet(receivers)

    start = time.monotonic()
    senders = [Process(where, 'server%d' % number, job.directory, subprocess.DEVNULL)
               for number, where in enumerate(tool.senders(job))]
    awaited = senders if tool.daemons else senders + receivers
    reap(awaited, senders + receivers, start + job.scenario.timeout(job.size))
    seconds = max(process.ended for process in awaited) - start

    if tool.daemons:
        stop_daemons(receivers)
    gigabytes = job.size / 1e9
    return {
        'seconds': seconds,
        'goodput': job.size * 8e-6 / seconds,                                           # Mbit/s
        'cpu_server': sum(process.cpu for process in senders) / gigabytes,              # seconds per 10^9 bytes
        'cpu_client': sum(process.cpu for process in receivers) / len(receivers) / gigabytes,
        'rss_server': max(process.peak for process in senders) / MIB,                   # MiB
        'rss_client': max(process.peak for process in receivers) / MIB,
        'repair': repair_traffic(senders[0].stderr()) if tool.name == 'kmcast' else None,
        'rounds': round_count(senders[0].stderr()) if tool.name == 'kmcast' else None,
    }


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
    match = re.search(r'(\d+) rounds', summary)
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
        needs none: all its files are hashed after every run.
        """
        if not tool.to_files:
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


def _goodput(results, name):
    return results.get(name, {}).get('median', {}).get('goodput')


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


def peak_mib(scenario, results):
    """the larger peak of kmcast's server and clients, in MiB"""
    runs = results.get('kmcast', {}).get('runs', [])
    return max(max(run['rss_server'], run['rss_client']) for run in runs) if runs else None


FIGURES = {function.__name__: function for function in (
    times_best_peer, times_tcp, share_of_link, repair_share, cpu_per_round, peak_mib)}
SMALLER_IS_BETTER = ('repair_share', 'cpu_per_round', 'peak_mib')


def judge(scenario, results):
    """Return the scenario's judged figure as a dict: what it is, its value, what is wanted, and how it stands."""
    function = FIGURES[scenario.figure]
    value = function(scenario, results)
    if value is None:
        verdict = 'not known (a tool did not run, or did not tell)'
    elif scenario.least is None:
        verdict = 'for information'
    else:
        sign = -1 if scenario.figure in SMALLER_IS_BETTER else 1
        verdict = ('aim reached' if sign * value >= sign * scenario.aim else
                   'enough' if sign * value >= sign * scenario.least else 'NOT ENOUGH')
    return {'what': function.__doc__, 'value': value, 'least': scenario.least, 'aim': scenario.aim, 'verdict': verdict}


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
            'seconds', 'goodput', 'cpu_server', 'cpu_client', 'rss_server', 'rss_client')}
    return results


def table(scenario, size, results, figure):
    """Return the lines of a scenario's table."""
    row = '  %-8s %9s %9s   %8s %8s   %8s %8s   %s'
    lines = ['%s: %s, %d MiB' % (scenario.name, scenario.title, size / MIB),
             row % ('', 'goodput', '', 'CPU s/GB', 'CPU s/GB', 'peak MiB', 'peak MiB', ''),
             row % ('tool', 'Mbit/s', '/ kmcast', 'server', 'client', 'server', 'client', 'runs')]
    own = _goodput(results, 'kmcast')
    for name, result in results.items():
        median = result['median']
        runs = '%d' % len(result['runs']) + (', %d failed' % len(result['failures']) if result['failures'] else '')
        if not result['runs']:
            lines.append(row % (name, 'failed', '', '', '', '', '', runs))
            continue
        lines.append(row % (name, '%.0f' % median['goodput'], '%.2f' % (median['goodput'] / own) if own else '-',
                            '%.2f' % median['cpu_server'], '%.2f' % median['cpu_client'],
                            '%.0f' % median['rss_server'], '%.0f' % median['rss_client'], runs))
    value = '-' if figure['value'] is None else '%.3g' % figure['value']
    wanted = '' if figure['least'] is None else ', at least %g, aim %g' % (figure['least'], figure['aim'])
    if scenario.figure in SMALLER_IS_BETTER:
        wanted = wanted.replace('at least', 'at most')
    lines.append('  %s: %s%s: %s' % (figure['what'], value, wanted, figure['verdict']))
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


def arguments():
    parser = argparse.ArgumentParser(
        description='Measure kmcast against udpcast, UFTP and plain TCP in a laboratory of network namespaces.')
    parser.add_argument('--scenario', nargs='+', metavar='NAME', choices=[scenario.name for scenario in SCENARIOS],
                        help='only these (default: all; see --list)')
    parser.add_argument('--tool', nargs='+', metavar='NAME', choices=['kmcast', 'udpcast', 'uftp', 'tcp'],
                        help='only these of kmcast, udpcast, uftp, tcp (default: all)')
    parser.add_argument('--repeat', type=int, default=3, metavar='N', help='repetitions (default: 3)')
    parser.add_argument('--size', type=int, metavar='MIB', help='size of the image instead of the scenarios\' own')
    parser.add_argument('--tuned-peers', action='store_true', help='spare udpcast its waits at start and end')
    parser.add_argument('--python', default=sys.executable, metavar='PATH', help='interpreter for kmcast')
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
    tools = [tool for tool in (Kmcast(options.python), Udpcast(), Uftp(), Tcp())
             if not options.tool or tool.name in options.tool]
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
            figure = judge(scenario, results)
            report['scenarios'][scenario.name] = {'title': scenario.title, 'size': bench.size, 'figure': figure,
                                                  'tools': results}
            print('\n'.join(table(scenario, bench.size, results, figure)) + '\n', flush=True)
            if options.json:        # after each scenario, so that an interrupted benchmark leaves what it has
                with open(options.json, 'w') as file:
                    json.dump(report, file, indent=1)
    finally:
        shutil.rmtree(directory)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
