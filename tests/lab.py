"""A laboratory without hardware: hosts as network namespaces around one switch.

    with Laboratory(clients=4, wire=True) as lab:
        server = lab.server.popen([sys.executable, 'kmcast.py', 'server', lab.server.address, '4'])
        lab.clients[0].lose(1)                  # percent of the UDP datagrams that reach this client

        server eth0 ──── port0 ┐
        node1  eth0 ──── port1 ┤ bridge, in a namespace of its own ("the switch")
        node2  eth0 ──── port2 ┘

Every host is a network namespace with one veth pair to the switch, an address in 10.83.0.0/24 and a default route
(which multicast follows too). Nothing is added to the root namespace, so laboratories can stand side by side: their
names carry the process id and a counter. Building and changing one needs root; `why_not()` tells what is missing.

Impairments are where a real network has them, and see what a real network sees, single frames: loss is a random
drop in nftables (some kernels have no netem), a slow port is a token bucket with a short queue, a pulled cable is the
switch's port going down, a long cable is a process that holds frames back (delay.py). In a laboratory that is not in
wire mode a "frame" can be a super-packet of 64 KB.

The system's limits are left as they are: net.core.rmem_max in particular is the host's own, as on a user's machine.

`python3 tests/lab.py` says whether a laboratory can be built here and removes what dead processes left behind.
"""

import atexit
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

PREFIX = 'kmlab'                 # of all namespaces; then the process id, the laboratory's number, the host
NETWORK = '10.83.0'              # /24
NETNS_DIRECTORY = '/run/netns'   # where `ip netns` keeps them, man 8 ip-netns
LINK_TIMEOUT = 20.0              # seconds for all links to come up; it takes milliseconds
LOSS_STEPS = 1000000             # loss is set in steps of 0.0001 %
DELAY = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'delay.py')
COMMANDS = ('ip', 'bridge', 'nft', 'tc', 'ethtool', 'nsenter', 'unshare', 'umount')

# What must be off at both ends of a link for every MTU frame to cross by itself.
OFFLOADS_OFF = 'tx-udp-segmentation off gso off tso off gro off'

# Everything that a laboratory needs, tried once in a namespace that is thrown away.
PROBE = '''
set -e
trap 'ip netns del {name}' EXIT
ip netns add {name}
ip -n {name} link add br0 type bridge mcast_snooping 0
ip -n {name} link add port0 type veth peer name eth0
ip -n {name} link set port0 up
nsenter --net={directory}/{name} tc qdisc add dev port0 root tbf rate 1mbit burst 32kb limit 128kb
nsenter --net={directory}/{name} nft -f - <<END
table ip probe {{
    chain c {{ type filter hook input priority 0; meta l4proto udp numgen random mod 1000 < 1 drop; }}
}}
table netdev probe {{
    chain c {{ type filter hook ingress device port0 priority 0; numgen random mod 1000 < 1 drop; }}
}}
END
unshare --uts true
'''

_numbers = itertools.count(1)
_probed = []                     # the answer of why_not(), once known


def why_not():
    """Return None where a laboratory can be built, otherwise the reason in a few words."""
    if not _probed:
        _probed.append(_find_why_not())
    return _probed[0]


def _find_why_not():
    if os.geteuid() != 0:
        return 'a laboratory needs root'
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return 'no command ' + ', '.join(missing)
    name = '%s-%d-probe' % (PREFIX, os.getpid())
    try:
        _shell(PROBE.format(name=name, directory=NETNS_DIRECTORY))
    except LaboratoryError as error:
        return 'no permission or no kernel support: %s' % error
    return None


class LaboratoryError(Exception):
    """A laboratory could not be built or changed; the message is what the command said."""


class Host:
    """A host of the laboratory: a network namespace (and a hostname of its own).

    name       short host name, also what gethostname() says inside
    address    IPv4 address as text
    interface  the name of its only interface beside lo
    namespaces paths of its network and UTS namespace
    """

    interface = 'eth0'

    def __init__(self, laboratory, number, name):
        self.name = name
        self.address = '%s.%d' % (NETWORK, number + 1)
        self.namespace = '%s-%s' % (laboratory.name, name)
        self.port = 'port%d' % number
        self._laboratory = laboratory
        self._relay = None
        self.namespaces = [os.path.join(NETNS_DIRECTORY, self.namespace), os.path.join(laboratory.directory, name)]

    def __repr__(self):
        return '<Host %s %s>' % (self.name, self.address)

    # --- programs on the host ---

    def command(self, argv):
        """Return the command line that runs argv on this host.

        nsenter replaces itself by the program, so its process id and the signals sent to it are the program's own.
        """
        return ['nsenter', '--net=' + self.namespaces[0], '--uts=' + self.namespaces[1], '--'] + list(argv)

    def popen(self, argv, **popen_arguments):
        """Start argv on this host and return its subprocess.Popen."""
        process = subprocess.Popen(self.command(argv), **popen_arguments)
        self._laboratory.started.append(process)
        return process

    def run(self, argv, **run_arguments):
        """Run argv on this host to its end and return its subprocess.CompletedProcess.

        Raises subprocess.CalledProcessError on a non-zero exit, unless check=False.
        """
        run_arguments.setdefault('check', True)
        return subprocess.run(self.command(argv), **run_arguments)

    # --- impairments ---

    def lose(self, percent):
        """Drop this share of the UDP datagrams that reach the host, at random; 0 ends it."""
        self._filter('ip', 'lose', 'hook input', percent and 'meta l4proto udp ' + _random_drop(percent))

    def block_multicast(self):
        """Let the switch carry no multicast to the host, so that none takes room on its line, either. After lengthen()."""
        self._flood('off')

    def unblock_multicast(self):
        """End block_multicast()."""
        self._flood('on')

    def _flood(self, how):
        _shell('ip -n %s link set %s type bridge_slave mcast_flood %s' % (self._laboratory.switch, self.port, how))

    def lose_egress(self, percent):
        """Drop this share of the UDP datagrams that leave the host, a loss that all receivers share; 0 ends it.

        They are dropped on arrival at the switch's port. Dropped in the host's own output hook, a send would fail with
        EPERM, and what has to be cut into frames yet (UDP_SEGMENT) would be lost as a whole; no network does either.
        """
        self._laboratory.filter('netdev', 'egress_' + self.port, 'hook ingress device "%s"' % self.port,
                                percent and 'ip protocol udp ' + _random_drop(percent))

    def limit(self, mbit, queue='128kb', both=False):
        """Let the switch's port carry this many Mbit/s to the host, with a queue of that size; None ends it.

        both: the same from the host, at its own interface, as a line is limited that has this speed.
        """
        self._laboratory.shape(self._laboratory.switch, self.port, mbit, queue)
        if both:
            self.limit_egress(mbit, queue)

    def limit_egress(self, mbit, queue='128kb'):
        """Let the host's own interface carry this many Mbit/s, with a queue of that size; None ends it."""
        self._laboratory.shape(self.namespace, self.interface, mbit, queue)

    def lengthen(self, seconds):
        """Let every frame between the host and its port take this long, each way. Before limit(), and once.

        The cable is cut inside of the switch's namespace, and a process forwards the frames between the two ends:

            host eth0 ──── far0   delay.py   near0 ──── port0, bridge

        So the port's queue and its losses stay where they are, at the switch. For wire mode.
        """
        switch, number = self._laboratory.switch, self.port[len('port'):]
        far, near = 'far' + number, 'near' + number
        lines = ['set -e']
        lines += _batch('-n ' + switch, [
            'link set %s down' % self.port,
            'link set %s nomaster name %s' % (self.port, far),
            'link add %s mtu %d type veth peer name %s mtu %d' % (self.port, self._laboratory.mtu, near,
                                                                  self._laboratory.mtu)])
        lines += _inside(switch, [NO_IPV6] + ['ethtool -K %s %s' % (device, OFFLOADS_OFF)
                                              for device in (self.port, near) if self._laboratory.wire])
        lines += _batch('-n ' + switch, ['link set %s master br0' % self.port]
                        + ['link set %s up' % device for device in (far, near, self.port)])
        _shell('\n'.join(lines))
        self._relay = subprocess.Popen(
            ['nsenter', '--net=%s/%s' % (NETNS_DIRECTORY, switch), '--', sys.executable, DELAY, far, near,
             str(seconds)], stdout=subprocess.PIPE, universal_newlines=True)
        self._laboratory.started.append(self._relay)
        if self._relay.stdout.readline() != 'ready\n':
            raise LaboratoryError('delay.py did not start')
        self._laboratory.wait_for_links([self])

    def line_report(self):
        """End what lengthen() started, and with it the line; return what it says it has done, as lines."""
        self._relay.terminate()
        return self._relay.communicate()[0].splitlines()

    def unplug(self):
        """Pull the cable at the switch: both ends lose the carrier, addresses and routes stay."""
        _shell('ip -n %s link set %s down' % (self._laboratory.switch, self.port))

    def plug(self):
        """Put the cable back; returns when the link is up."""
        _shell('ip -n %s link set %s up' % (self._laboratory.switch, self.port))
        self._laboratory.wait_for_links([self])

    def _filter(self, family, table, hook, rule):
        _filter(self.namespace, family, table, hook, rule)


class Laboratory:
    """A server and some clients around a switch, for the length of a `with` block.

    clients  how many hosts beside the server, at most 250
    wire     True: every MTU frame crosses by itself, as on a cable. False: super-packets (GSO, GRO) may cross, as
             between virtual machines of one host
    mtu      of every link, in bytes
             (all three as attributes, too, but that `clients` are the hosts)

    server   a Host
    clients  a list of Hosts
    hosts    all of them, the server first
    switch   the name of the switch's namespace
    started  every subprocess.Popen of Host.popen()
    """

    def __init__(self, clients=4, wire=True, mtu=1500):
        if clients > 250:
            raise ValueError('at most 250 clients fit into %s.0/24' % NETWORK)
        self.name = '%s-%d-%d' % (PREFIX, os.getpid(), next(_numbers))
        self.directory = '/run/' + self.name       # of the hosts' UTS namespaces, bind-mounted
        self.switch = self.name + '-switch'
        self.started = []
        self.server = Host(self, 0, 'server')
        self.clients = [Host(self, number, 'node%d' % number) for number in range(1, clients + 1)]
        self.hosts = [self.server] + self.clients
        self.wire = wire
        self.mtu = mtu

    def __enter__(self):
        self.build()
        return self

    def __exit__(self, *exception):
        self.demolish()

    def build(self):
        """Build it, and return when all links are up. Raises LaboratoryError; nothing is left then."""
        atexit.register(self.demolish)
        try:
            _shell('\n'.join(self._plan()))
            self.wait_for_links(self.hosts)
        except BaseException:
            self.demolish()
            raise

    def demolish(self):
        """Kill what still runs in the laboratory and remove it. Can be called at any time, and twice."""
        atexit.unregister(self.demolish)
        for process in self.started:
            # What was started a moment ago may not have entered its namespace yet, where _demolish looks.
            if process.poll() is None:
                process.kill()
                process.wait()
        _demolish([self.switch] + [host.namespace for host in self.hosts], self.directory)

    def _plan(self):
        """Yield the lines of the shell script that builds the laboratory: few processes, however many hosts."""
        yield 'set -e'
        yield 'mkdir ' + self.directory
        yield from _batch('', ['netns add ' + self.switch] + ['netns add ' + host.namespace for host in self.hosts])

        # The two ends are made where they belong, so the root namespace never sees one.
        links = ['link add br0 mtu %d type bridge stp_state 0 forward_delay 0 mcast_snooping 0' % self.mtu,
                 'link set br0 up']
        for host in self.hosts:
            links += ['link add %s mtu %d type veth peer name %s mtu %d netns %s'
                      % (host.port, self.mtu, host.interface, self.mtu, host.namespace),
                      'link set %s master br0' % host.port]
        ports_up = ['link set %s up' % host.port for host in self.hosts]
        inside_switch = ['ethtool -K %s %s' % (host.port, OFFLOADS_OFF) for host in self.hosts if self.wire]
        yield from _batch('-n ' + self.switch, links)
        yield from _inside(self.switch, [NO_IPV6, NO_BRIDGE_FILTER] + inside_switch)
        yield from _batch('-n ' + self.switch, ports_up)

        for host in self.hosts:
            inside = [NO_IPV6]
            if self.wire:
                inside.append('ethtool -K %s %s' % (host.interface, OFFLOADS_OFF))
            yield from _inside(host.namespace, inside)
            yield from _batch('-n ' + host.namespace, [
                'link set lo up',
                'link set %s up' % host.interface,
                'addr add %s/24 broadcast %s.255 dev %s' % (host.address, NETWORK, host.interface),
                'route add default dev ' + host.interface])
            yield 'touch %s/%s' % (self.directory, host.name)
            yield 'unshare --uts=%s/%s sh -c "echo %s > /proc/sys/kernel/hostname"' % (
                self.directory, host.name, host.name)

    def wait_for_links(self, hosts):
        """Return when the links of these hosts carry frames in both directions. Raises LaboratoryError."""
        deadline = time.monotonic() + LINK_TIMEOUT
        waiting = list(hosts)
        while True:
            ports = _shell('bridge -n %s link show' % self.switch)
            forwarding = set(re.findall(r'^\d+: (\w+)[@:].* state forwarding', ports, re.MULTILINE))
            waiting = [host for host in waiting if host.port not in forwarding or not self._is_up(host)]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise LaboratoryError('links did not come up: %s' % ', '.join(host.name for host in waiting))
            time.sleep(0.01)

    @staticmethod
    def _is_up(host):
        """Before the operational state is up, the interface has no queue yet and drops what is sent."""
        return 'state UP' in _shell('ip -n %s -o link show %s' % (host.namespace, host.interface))

    def filter(self, family, table, hook, rule):
        """Replace one rule of the switch; see _filter."""
        _filter(self.switch, family, table, hook, rule)

    @staticmethod
    def shape(namespace, device, mbit, queue):
        """Give a device a token bucket of this many Mbit/s and a queue of that size; None takes it away."""
        tc = 'nsenter --net=%s/%s tc qdisc' % (NETNS_DIRECTORY, namespace)
        if mbit is None:
            _shell('%s del dev %s root 2>/dev/null || true' % (tc, device))
        else:
            # The bucket holds 32 KB: some 20 frames may pass at line speed, about what a timer's tick lets through.
            _shell('%s replace dev %s root tbf rate %gmbit burst 32kb limit %s' % (tc, device, mbit, queue))


# Duplicate address detection and router solicitations would be traffic that nobody asked for.
NO_IPV6 = 'for f in /proc/sys/net/ipv6/conf/all/disable_ipv6; do test ! -e $f || echo 1 > $f; done'

# A switch does not pass its frames through the IP filter; where the module is loaded, a bridge does by default.
NO_BRIDGE_FILTER = 'for f in /proc/sys/net/bridge/bridge-nf-call-*tables; do test ! -e $f || echo 0 > $f; done'


def _batch(options, lines):
    """Yield the lines of a script in which one `ip` process carries out all these commands."""
    yield 'ip %s -batch - <<END' % options
    yield from lines
    yield 'END'


def _inside(namespace, lines):
    """Yield the lines of a script that runs shell commands in one namespace (/proc/sys/net is the reader's own)."""
    yield 'nsenter --net=%s/%s sh -e <<"END"' % (NETNS_DIRECTORY, namespace)
    yield from lines
    yield 'END'


def _random_drop(percent):
    """Return the nftables statement that drops this share."""
    steps = round(percent * LOSS_STEPS / 100)
    return 'drop' if steps >= LOSS_STEPS else 'numgen random mod %d < %d drop' % (LOSS_STEPS, steps)


def _filter(namespace, family, table, hook, rule):
    """Replace the rule in a table of its own by another, or remove the table (no rule).

    The table is declared before it is deleted because deleting one that is not there is an error.
    """
    lines = ['nsenter --net=%s/%s nft -f - <<END' % (NETNS_DIRECTORY, namespace),
             'table %s %s' % (family, table),
             'delete table %s %s' % (family, table)]
    if rule:
        lines += ['table %s %s {' % (family, table),
                  'chain c { type filter %s priority 0; %s; }' % (hook, rule),
                  '}']
    _shell('\n'.join(lines + ['END']))


def _shell(script):
    """Run a shell script and return its output. Raises LaboratoryError with what it said.

    The shell reads it from its standard input: as an argument, the script for many hosts would be too long.
    """
    shell = subprocess.Popen(['sh', '-s'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True)
    output, complaint = shell.communicate(script + '\n')
    if shell.returncode != 0:
        raise LaboratoryError(complaint.strip() or 'exit code %d of: %s' % (shell.returncode, script))
    return output


def _processes(namespaces):
    """Yield the ids of all processes in these network namespaces: `ip netns pids`, in one walk over /proc."""
    inodes = set()
    for namespace in namespaces:
        try:
            inodes.add('net:[%d]' % os.stat('%s/%s' % (NETNS_DIRECTORY, namespace)).st_ino)
        except FileNotFoundError:
            pass
    for pid in filter(str.isdigit, os.listdir('/proc') if inodes else ()):
        try:
            if os.readlink('/proc/%s/ns/net' % pid) in inodes:
                yield int(pid)
        except OSError:
            pass                               # it ended meanwhile, or is a kernel thread


def _demolish(namespaces, directory):
    """Kill all processes in these namespaces, then remove them and the directory of the UTS namespaces."""
    for pid in list(_processes(namespaces)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    lines = []
    if os.path.isdir(directory):
        names = sorted(os.listdir(directory))
        if names:
            lines.append('cd %s && umount %s 2>/dev/null; cd /' % (directory, ' '.join(map(shlex.quote, names))))
        lines.append('rm -rf ' + directory)
    present = [name for name in namespaces if os.path.exists('%s/%s' % (NETNS_DIRECTORY, name))]
    lines += _batch('-force', ['netns del ' + name for name in present])
    _shell('\n'.join(lines))


def sweep():
    """Remove the laboratories of processes that no longer exist (killed with SIGKILL, say); return their names."""
    found = {}
    for entry in os.listdir(NETNS_DIRECTORY) if os.path.isdir(NETNS_DIRECTORY) else ():
        match = re.match(r'(%s-(\d+)-\d+)-' % PREFIX, entry)
        if match and not os.path.exists('/proc/' + match.group(2)):
            found.setdefault(match.group(1), []).append(entry)
    for name, namespaces in found.items():
        _demolish(namespaces, '/run/' + name)
    return sorted(found)


def main():
    reason = why_not()
    if reason:
        print('no laboratory here: ' + reason)
        return 1
    for name in sweep():
        print('removed %s, left by a dead process' % name)
    start = time.monotonic()
    with Laboratory(clients=4):
        print('a laboratory of 4 clients was built in %.2f s' % (time.monotonic() - start))
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
