"""What the tests share: starting kmcast, feeding it, reading it, ending it.

Imports on Python 2.7 and 3, so that the unit tests can use it on both.

    data = random_bytes(5000000, seed=1)
    result = transfer(data, clients=3, client_args=["-v"])
    result.check(data)                            # every exit code 0, every byte equal

    port = free_port()
    server = start_server(["127.0.0.1", "1", port], stdin=data)
    client = start_client(["127.0.0.1", "127.0.0.1", port])
    client.wait_stderr("connected")
    server.stop()
    code, stderr, stdout = client.finish(timeout=20)

Every process runs in a process group of its own, is registered here, and is killed by `stop_all()`: after each test
(a fixture in conftest.py) and when the interpreter exits.
"""

import atexit
import binascii
import collections
import errno
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import nursery
import wire

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KMCAST = os.path.join(ROOT, "kmcast.py")
BASE_PEER = os.path.join(ROOT, "tests", "base_peer.py")

LOOPBACK = "127.0.0.1"
PIPE = subprocess.PIPE

#: What `stdout=` of the start functions may say besides a function or a file.
KEEP = "keep"
HASH = "hash"

_CHUNK = 1 << 16    # bytes a read, a write, and a step of random_chunks()


# ---------------------------------------------------------------------------------------------------------------------
# Interpreters

_versions = {}


def version_of(python):
    """Return the version of the interpreter at path `python` as a tuple, e.g. (2, 7, 18)."""
    if python not in _versions:
        code = "import sys; sys.stdout.write('%d.%d.%d' % sys.version_info[:3])"
        printed = subprocess.check_output([python, "-c", code]).decode("ascii")
        _versions[python] = tuple(int(number) for number in printed.split("."))
    return _versions[python]


def version_name(python):
    """Return the version of the interpreter at path `python` as text, e.g. "2.7.18": for the ids of tests."""
    return ".".join(str(number) for number in version_of(python))


def interpreters():
    """Return the paths of the interpreters that kmcast is to be tested with, from the oldest to the newest.

    They come from the environment variable KMCAST_PYTHONS (paths joined by ":"), which tests/run.sh sets; without it
    there is only the one that runs this.
    """
    paths = [path for path in os.environ.get("KMCAST_PYTHONS", "").split(":") if path]
    return sorted(paths or [sys.executable], key=version_of)


def oldest():
    """Return the path of the oldest interpreter."""
    return interpreters()[0]


def newest():
    """Return the path of the newest interpreter."""
    return interpreters()[-1]


_programs = {}


def compiled(python):
    """Return the path of a kmcast.pyc, kmcast.py as compiled by and for the interpreter at path `python`, which can run it
    or import it.

    Given the source, Python compiles it at every start, which takes longer than many a test's transfer. The tests of the
    files that an operator has, kmcast.py and kmcast.pyz, give these as `program`. In the directory that the environment
    variable KMCAST_COMPILED names, which tests/run.sh sets, it is there for all who test.
    """
    if python not in _programs:
        directory = os.environ.get("KMCAST_COMPILED")
        if not directory:
            directory = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, directory, True)
        program = os.path.join(directory, version_name(python), "kmcast.pyc")
        if not os.path.exists(program):
            made = tempfile.mkdtemp(dir=directory)
            subprocess.check_call([python, "-c", "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)",
                                   KMCAST, os.path.join(made, "kmcast.pyc"), KMCAST])
            try:
                os.rename(made, os.path.dirname(program))
            except OSError:
                shutil.rmtree(made)             # another one has been faster
        _programs[python] = program             # only now: a test may start processes in several threads
    return _programs[python]


# ---------------------------------------------------------------------------------------------------------------------
# Ports and data

_ports_given = set()


def free_port():
    """Return a port that is free for TCP and for UDP on this host, and that no earlier call in this process returned.

    It lies below the range from which Linux takes the local ports of outgoing connections (32768 and up), so that no
    connection can grab it between this call and its use.
    """
    while True:
        port = random.randint(20000, 32000)
        if port in _ports_given:
            continue
        try:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                probe = socket.socket(socket.AF_INET, kind)
                try:
                    probe.bind(("", port))
                finally:
                    probe.close()
        except socket.error:
            continue
        _ports_given.add(port)
        return port


def random_chunks(size, seed=0):
    """Yield `size` pseudo-random bytes in chunks of at most 64 KiB: to feed an image too big to be held in memory.

    The bytes depend on the integer `seed` alone, on every interpreter, and a shorter image is the start of a longer one.
    """
    generator = random.Random(seed)
    while size > 0:
        bits = generator.getrandbits(8 * _CHUNK)
        if sys.version_info[0] == 2:
            chunk = binascii.unhexlify("%0*x" % (2 * _CHUNK, bits))
        else:
            chunk = bits.to_bytes(_CHUNK, "big")
        yield chunk[:size]
        size -= _CHUNK


def random_bytes(size, seed=0):
    """Return `size` pseudo-random bytes, the ones that random_chunks() yields."""
    return b"".join(random_chunks(size, seed))


def data_of(buffer):
    """What a kmcast.Buffer gives the output, as bytes."""
    return b"".join([piece.tobytes() for piece in buffer.flush()])


def sha256(data):
    """Return the SHA-256 of `data` (bytes, or an iterable of chunks of bytes) in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in [data] if isinstance(data, bytes) else data:
        digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

_processes = []
_networks = []
_nurseries = {}
_nurseries_lock = threading.Lock()

# Python 2 knows only preexec_fn, with which Python 3 has to copy its own page tables for each process that it starts.
_NEW_SESSION = dict(preexec_fn=os.setsid) if sys.version_info[0] == 2 else dict(start_new_session=True)


class Process(object):
    """A process under test.

    argv    list of the program and its arguments; those that are not text (a port, a count) are converted
    stdin   None: /dev/null. bytes, or an iterable of chunks of bytes (a generator that sleeps is a slow producer): written
            through a pipe by a thread, which closes the pipe at the end. An open file: used as it is. PIPE: the test
            itself writes to `.popen.stdin`
    stdout  KEEP: a thread reads it all, finish() returns it. HASH: a thread reads it, finish() returns its SHA-256 in
            hexadecimal. A function: a thread calls it with each chunk (one that sleeps is a slow consumer). An open file:
            used as it is. PIPE: the test itself reads from `.popen.stdout`. With the last three finish() returns None
            for it
    env     changes to the environment, a dict; a value of None removes a variable
    cwd     the directory to run in, a path
    warm    None, or how a nursery can do the same as argv: (command of the interpreter, what follows it, namespaces)

    stderr always goes to a nameless file, so a process that says much is never held up by a full pipe.

    report  None, or the path where it will write what report() reads

    Attributes: `.popen`, `.pid`, and `.peak_kib`: the peak of its resident memory in KiB, as far as it was seen by
    poll(), which wait() and finish() call all the time.
    """

    def __init__(self, argv, stdin=None, stdout=KEEP, env=None, cwd=None, warm=None, report=None):
        self.argv = _texts(argv)
        self._report = report
        self.peak_kib = 0
        self._threads = []
        self._chunks = []
        self._digest = hashlib.sha256() if stdout == HASH else None
        # Opened for appending: the process and we share one file offset, and only appending ignores it.
        self._stderr = tempfile.TemporaryFile("a+b")

        # A process that hangs gets SIGABRT for a traceback (see finish()); it shall not leave a core file as well.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        feed = isinstance(stdin, (bytes, list, tuple)) or (
            not hasattr(stdin, "fileno") and (hasattr(stdin, "__next__") or hasattr(stdin, "next")))
        read = stdout in (KEEP, HASH) or (callable(stdout) and not hasattr(stdout, "fileno"))
        null = open(os.devnull, "rb") if stdin is None else None
        files = dict(stdin=PIPE if feed else null or stdin, stdout=PIPE if read else stdout, stderr=self._stderr)
        try:
            # What an interpreter does with a terminal it decides when it starts.
            if warm and not any(_is_terminal(file) for file in files.values()):
                command, arguments, namespaces = warm
                self.popen = nursery.Popen(_nursery(command, _environment(env)), _texts(arguments), cwd=cwd,
                                           namespaces=namespaces, **files)
            else:
                self.popen = subprocess.Popen(self.argv, env=_environment(env), cwd=cwd, bufsize=0, close_fds=True,
                                              **dict(files, **_NEW_SESSION))
        finally:
            if null:
                null.close()
        self.pid = self.popen.pid
        _processes.append(self)
        if feed:
            self._run(self._write_stdin, stdin)
        if read:
            take = stdout if callable(stdout) else self._digest.update if stdout == HASH else self._chunks.append
            self._keeps = stdout == KEEP
            self._run(self._read_stdout, take)
        else:
            self._keeps = False

    def _run(self, function, argument):
        thread = threading.Thread(target=function, args=(argument,))
        thread.daemon = True
        thread.start()
        self._threads.append(thread)

    def _write_stdin(self, data):
        pieces = [memoryview(data)[start:start + _CHUNK] for start in range(0, len(data), _CHUNK)] \
            if isinstance(data, bytes) else data
        try:
            for piece in pieces:
                while len(piece):
                    piece = piece[os.write(self.popen.stdin.fileno(), piece):]
        except (OSError, IOError) as error:
            if error.errno != errno.EPIPE:      # EPIPE: the process ended without reading everything
                raise
        finally:
            self.popen.stdin.close()

    def _read_stdout(self, take):
        while True:
            chunk = os.read(self.popen.stdout.fileno(), _CHUNK)
            if not chunk:
                self.popen.stdout.close()
                return
            take(chunk)

    def __repr__(self):
        return "<%s: pid %d, %s>" % (" ".join(self.argv), self.pid,
                                     "running" if self.popen.returncode is None else "exit %d" % self.popen.returncode)

    @property
    def stderr(self):
        """What the process has said on stderr until now, as text."""
        # Opened once more: the process and self._stderr share one file offset, which each line of it moves.
        with open("/proc/self/fd/%d" % self._stderr.fileno(), "rb") as again:
            return again.read().decode("utf-8", "replace")

    def report(self):
        """Return what it wrote with --report, a dict; at its end."""
        assert self._report and os.path.exists(self._report), "%r has written no report; its stderr:\n%s" % (self, self.stderr)
        with open(self._report) as file:
            return json.load(file)

    def poll(self):
        """Return the exit code (-N if signal N ended it), or None while the process runs."""
        try:
            with open("/proc/%d/status" % self.pid) as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        self.peak_kib = max(self.peak_kib, int(line.split()[1]))
        except (OSError, IOError):
            pass
        return self.popen.poll()

    def wait(self, timeout):
        """Wait for the end, at most `timeout` seconds; return the exit code, or None if it still runs."""
        deadline = time.time() + _patient(timeout)
        while self.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        return self.popen.returncode

    def wait_stderr(self, text, timeout=30):
        """Wait until stderr contains `text`; fail if the process ends, or `timeout` seconds pass, without it."""
        deadline = time.time() + _patient(timeout)
        while text not in self.stderr:
            ended = self.poll() is not None
            if (ended or time.time() > deadline) and text not in self.stderr:
                raise AssertionError("%r did not say %r. Its stderr:\n%s" % (self, text, self.stderr))
            time.sleep(0.01)

    def wait_begun(self, timeout=30):
        """Wait until it says, asked how far it is, that rounds are under way."""
        deadline = time.time() + timeout
        self.wait_stderr("\n", timeout)         # before, nobody looks after signals
        while "of the image" not in self.stderr:
            assert self.poll() is None and time.time() < deadline, "%r has not begun. Its stderr:\n%s" % (self, self.stderr)
            self.signal(signal.SIGUSR2)
            time.sleep(0.05)

    def signal(self, number):
        """Send signal `number` to the process, and to no child of it."""
        os.kill(self.pid, number)

    def finish(self, timeout=120):
        """Wait for the end of the process; return (exit code, stderr as text, stdout as `stdout=` of the start says).

        One that still runs after `timeout` seconds fails the test, with the tracebacks of its threads (on Python 3)
        in the message.
        """
        if self.wait(timeout) is None:
            self.signal(signal.SIGABRT)         # PYTHONFAULTHANDLER is set: prints where each thread is
            self.wait(2)
            self.stop()
            raise AssertionError("%r still ran after %g s. Its stderr:\n%s" % (self, timeout, self.stderr))
        for thread in self._threads:
            thread.join(10)
            if thread.is_alive():
                self.stop()
                raise AssertionError("%r ended, but something still holds its stdin or stdout open, or the function that "
                                     "takes its stdout did not come back" % self)
        data = b"".join(self._chunks) if self._keeps else self._digest.hexdigest() if self._digest else None
        stderr = self.stderr
        assert not re.search("ResourceWarning|Exception ignored", stderr), stderr
        return self.popen.returncode, stderr, data

    def stop(self):
        """Kill the process and its whole process group; harmless when they have ended."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except OSError:
            pass                                # no process of the group is left
        self.popen.wait()


def _patient(timeout):
    """How many seconds to wait at most: a busy machine takes some for what takes milliseconds.

    Less than a stall timeout's 30, so that who waits for that is found to. A timeout of less than 5 s is meant as it is.
    """
    return max(timeout, 25) if timeout >= 5 else timeout


def _texts(arguments):
    return [argument if hasattr(argument, "encode") else str(argument) for argument in arguments]


def _is_terminal(file):
    return file not in (PIPE, None) and os.isatty(file if isinstance(file, int) else file.fileno())


def _nursery(command, env):
    """Return the nursery for an interpreter and what its children inherit."""
    with open("/proc/thread-self/status") as status:
        inherited = re.findall("^(?:Umask|SigBlk|SigIgn):.*", status.read(), re.MULTILINE)
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    key = repr((command, sorted(env.items()), inherited, limits))
    with _nurseries_lock:
        if key not in _nurseries:
            _nurseries[key] = nursery.Nursery(command, compiled(command[0]), env)
        return _nurseries[key]


def _environment(changes=None):
    """Return the environment for a process: ours without what would change how an interpreter works."""
    env = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUNBUFFERED", "PYTHONWARNINGS", "PYTHONOPTIMIZE",
                 "PYTEST_CURRENT_TEST", "KMCAST_OPTIONS"):
        env.pop(name, None)
    env["PYTHONFAULTHANDLER"] = "1"
    for name, value in (changes or {}).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def stop_all():
    """Kill every process that was started here and still runs, and end every Network."""
    while _processes:
        _processes.pop().stop()
    while _networks:
        _networks.pop().close()


def _end():
    stop_all()
    while _nurseries:
        _nurseries.popitem()[1].close()


atexit.register(_end)

# Of a shell's background job SIGINT is ignored, and what is ignored stays so in what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start(argv, **options):
    """Start any program; see Process for the options. Returns the Process."""
    return Process(argv, **options)


def start_kmcast(args, python=None, prefix=(), program=None, change=None, host=None, kind=Process,
                 report=None, **options):
    """Start kmcast with `args`.

    python   path of the interpreter; None: the one that runs this
    prefix   what goes before it, e.g. ["ip", "netns", "exec", "host1"] or ["strace", "-f"]
    program  path of another program, such as KMCAST or a kmcast.pyz; None: kmcast.py, see compiled()
    change   Python statements that change the module `kmcast` first
    host     the Host of a laboratory to start it on; None: here
    kind     the class of what is returned
    report   whether a server or a client is told to write a report, for Process.report(); None: unless there is a prefix

    Without prefix and program a nursery forks it, which takes a third of the time (and so it does with BASE_PEER).
    The newest Python 3 tells what nobody closed, and finish() then fails the test.

    The other options are those of Process. Returns the Process.
    """
    python, args = python or sys.executable, list(args)
    report = not prefix if report is None else report
    if report and program != BASE_PEER and args[:1] in (["server"], ["client"]) and "--report" not in args:
        options["report"] = _report_path()
        args[1:1] = ["--report", options["report"]]
    command, arguments = [python], [program or compiled(python)] + args
    if change is not None:
        arguments[:1] = ["-c", _CHANGED % (os.path.dirname(compiled(python)), change)]
    elif program != BASE_PEER and version_of(python) == version_of(newest()) >= (3, 7):
        command += ["-W", "error"]          # not -X dev, whose memory allocator takes its time
    warm = None
    if not prefix and program in (None, BASE_PEER) and sys.version_info[0] > 2:
        warm = command, arguments, host.namespaces if host else ()
    argv = list(prefix) + command + arguments
    return kind(host.command(argv) if host else argv, warm=warm, **options)


_reports = []       # the directory that they are in, and their paths


def _report_path():
    """Return the path of a report that is yet to be written."""
    if not _reports:
        _reports.append(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, _reports[0], True)
    _reports.append(os.path.join(_reports[0], str(len(_reports))))
    return _reports[-1]


_CHANGED = "import sys; sys.path.insert(0, %r); import kmcast\n%s\nsys.exit(kmcast.main())"


def start_server(args, python=None, **options):
    """Start `kmcast server` with `args` (a list: options, LOCAL_IP, CLIENTS, PORT); options as for start_kmcast().

    Waits until it listens, or has ended, where PORT is one of free_port(): a client that comes too early takes a nap.
    """
    return _listening(start_kmcast(["server"] + list(args), python, **options), args)


def start_client(args, python=None, **options):
    """Start `kmcast client` with `args` (a list: options, LOCAL_IP, SERVER_IP, PORT); options as for start_kmcast()."""
    return start_kmcast(["client"] + list(args), python, **options)


def start_base_server(args, **options):
    """Start the server of base_peer.py with `args` (a list: options, LOCAL_IP, CLIENTS, PORT); waits as start_server()."""
    return _listening(start_kmcast(["server"] + list(args), program=BASE_PEER, **options), args)


def _listening(server, args):
    """Wait until `server` listens on the port among `args`, or has ended; return it."""
    ports = [arg for arg in args if arg in _ports_given]
    if ports:
        line = re.compile(r"\d+: [0-9A-F]+:%04X [0-9A-F:]+ 0A " % ports[0])     # 0A: TCP_LISTEN
        deadline = time.time() + 30
        while server.poll() is None and time.time() < deadline:
            with open("/proc/net/tcp") as table:
                if line.search(table.read()):
                    break
            time.sleep(0.02)                    # the kernel looks through all its tables for it
    return server


def start_base_client(args, **options):
    """Start the client of base_peer.py with `args` (a list: LOCAL_IP, SERVER_IP, PORT, options)."""
    return start_kmcast(["client"] + list(args), program=BASE_PEER, **options)


# ---------------------------------------------------------------------------------------------------------------------
# A whole transfer

ServerResult = collections.namedtuple("ServerResult", "code stderr report")
ClientResult = collections.namedtuple("ClientResult", "code stderr data report")


class Transfer(object):
    """How a transfer ended: `.server` (code, stderr, report), `.clients` (a list of code, stderr, data, report), `.port`.
    A report is a function, Process.report()."""

    def __init__(self, server, clients, port):
        self.server = server
        self.clients = clients
        self.port = port

    def __str__(self):
        ends = [("server", self.server)] + [("client %d" % number, end) for number, end in enumerate(self.clients)]
        return "\n".join("%s: exit %d, stderr:\n%s" % (name, end.code, end.stderr) for name, end in ends)

    def check(self, data):
        """Fail unless every process exited 0 and every client has `data` (bytes; or SHA-256 in hex with stdout=HASH)."""
        assert self.server.code == 0 and all(client.code == 0 for client in self.clients), str(self)
        for number, client in enumerate(self.clients):
            # Compared outside of the assert: pytest would explain at length how two images of megabytes differ.
            equal = client.data == data
            assert equal, "client %d got %d bytes instead of %d, or others; %s" % (
                number, len(client.data), len(data), self)


def transfer(data, clients=1, server_args=(), client_args=(), server_python=None, client_python=None, port=None,
             timeout=120, stdout=KEEP, program=None):
    """Send `data` from one kmcast server to `clients` kmcast clients over loopback, as processes connected by pipes.

    data           the image: whatever `stdin=` of Process takes
    server_args    options of the server, a list
    client_args    options of every client, a list; or a function of the client's number, from 0, that returns one
    client_python  interpreter of every client, or a list of them, used in turn
    port           None: a free one
    timeout        seconds for the whole of it; a process that then still runs fails the test
    stdout         KEEP or HASH: whether `.data` of a client is its bytes or their SHA-256
    program        as for start_kmcast()

    Exit codes are not checked here (see Transfer.check). Returns a Transfer.
    """
    port = port or free_port()
    began = time.time()
    pythons = client_python if isinstance(client_python, (list, tuple)) else [client_python]
    server = start_server(list(server_args) + [LOOPBACK, clients, port], server_python, program=program, stdin=data)
    started = []
    for number in range(clients):
        args = client_args(number) if callable(client_args) else client_args
        started.append(start_client(list(args) + [LOOPBACK, LOOPBACK, port], pythons[number % len(pythons)],
                                    program=program, stdout=stdout))
    ends = []
    try:
        for process in [server] + started:
            ends.append(process.finish(max(1, began + timeout - time.time())))
    except AssertionError as error:
        # Who hangs is seldom who is to blame: show what all of them said.
        others = "\n".join("%r:\n%s" % (other, other.stderr) for other in [server] + started)
        raise AssertionError("%s\nAll processes:\n%s" % (error, others))
    return Transfer(ServerResult(*ends[0][:2], report=server.report),
                    [ClientResult(*end, report=client.report) for end, client in zip(ends[1:], started)], port)


Summary = collections.namedtuple("Summary", "packets bytes coded by_tcp served clients")


def summary(server, mtu=1500):
    """Return what a server's report says, in packets: those of the image that were multicast, bytes of the image, repairs by
    multicast (`coded`) and by TCP; clients that have the image, and clients that took part or were awaited."""
    report = server.report()
    carried = [report["carried"][how] // payload_size(mtu) for how in ("multicast", "coded", "tcp")]
    hosts = [host["result"] for host in report["hosts"]]
    return Summary(carried[0], report["bytes"], carried[1], carried[2], hosts.count("complete"),
                   len(hosts) - hosts.count("refused"))


def repaired(client, mtu=1500):
    """Return what a client's report says: (packets repaired by multicast, by TCP)."""
    carried = client.report()["carried"]
    return carried["coded"] // payload_size(mtu), carried["tcp"] // payload_size(mtu)


def leftovers(process):
    """Return whether a process of the ended `process`'s process group still runs: a child that it left behind."""
    try:
        os.killpg(process.pid, 0)
    except OSError:
        return False
    return True


def payload_size(mtu=1500):
    """Return the bytes of a full packet's payload at `mtu`, by PROTOCOL.md."""
    return (mtu - 28 - 12) // 4 * 4


# ---------------------------------------------------------------------------------------------------------------------
# What stands between a server and its clients

GROUP = "239.255.83.83"     # kmcast's default group


def group_socket(group, port, receive_buffer=16 << 20):
    """Return a UDP socket that receives what is multicast to `group` and `port` over loopback; it does not block."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, 33, receive_buffer)      # SO_RCVBUFFORCE: root only
    except socket.error:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.bind((group, port))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton(LOOPBACK))
    sock.setblocking(False)
    return sock


def datagrams_in(sock):
    """Return the datagrams that wait in a socket that does not block, as a list of bytes."""
    datagrams = []
    while True:
        try:
            datagrams.append(sock.recv(65536))
        except socket.error as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                return datagrams
            raise


def loss(percent, seed=0):
    """Return a function for Network.path() that loses a share of the datagrams, the same ones for the same seed."""
    generator = random.Random(seed)
    return lambda datagram: [] if generator.random() * 100 < percent else [datagram]


class Cut(Exception):
    """Raised by `tcp` of Network.path(): the connection is to end in order, after the bytes that are its argument."""


class Network(object):
    """A bad network between a server and its clients on this host: no root, no laboratory, all in this process.

    A client gets a path of its own: it connects to the path's port, which passes TCP on to the server. On the way the
    group info is changed to name a group of the path's own, to which the server's datagrams are passed on, and WELCOME to
    name our socket as their source.

    server_port  the port of the server, for TCP and for its group
    """

    def __init__(self, server_port, group=GROUP):
        self.server_port = server_port
        self._paths = []                    # (group, function of a datagram)
        self._sockets = []
        self._closed = False
        self._from_server = self._keep(group_socket(group, server_port))
        self._to_clients = self._keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._to_clients.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
        self._to_clients.bind((LOOPBACK, 0))
        self._run(self._pass_datagrams)
        _networks.append(self)

    def path(self, datagrams=None, tcp=None):
        """Return the port that a client is to connect to.

        datagrams  function of a datagram that returns a list of those that the client receives instead; None: all pass
        tcp        function of (bytes from the server, their offset in the connection) that returns what the client
                   receives instead, or raises Cut; None: all pass
        """
        path_group = "239.255.84.%d" % (1 + len(self._paths))
        listener = self._keep(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((LOOPBACK, 0))
        listener.listen(8)
        self._paths.append((path_group, datagrams or (lambda datagram: [datagram])))
        self._run(self._accept, listener, path_group, tcp or (lambda data, offset: data))
        return listener.getsockname()[1]

    def close(self):
        """End it: the connections that pass through it are reset."""
        self._closed = True
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except socket.error:
                pass
            sock.close()

    def _keep(self, sock):
        self._sockets.append(sock)
        return sock

    @staticmethod
    def _run(function, *arguments):
        thread = threading.Thread(target=function, args=arguments)
        thread.daemon = True
        thread.start()

    def _pass_datagrams(self):
        while not self._closed:
            try:
                if not select.select([self._from_server], [], [], 0.2)[0]:
                    continue
                for datagram in datagrams_in(self._from_server):
                    for group, change in list(self._paths):
                        for changed in change(datagram):
                            self._to_clients.sendto(changed, (group, self.server_port))
            except (OSError, ValueError, socket.error, select.error):
                if not self._closed:
                    raise

    def _accept(self, listener, group, change):
        while True:
            try:
                client, _ = listener.accept()
            except (OSError, socket.error):
                return
            server = self._keep(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                server.connect((LOOPBACK, self.server_port))
            except socket.error:
                client.close()              # there is no server yet; the client tries again
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._keep(client)
            self._run(self._pump, server, client, _Renamed(change, group, self._to_clients.getsockname()[1]))
            self._run(self._pump, client, server, lambda data, offset: data)

    @staticmethod
    def _pump(source, target, change):
        offset = 0
        try:
            while True:
                data = source.recv(_CHUNK)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(change(data, offset))
                offset += len(data)
        except Cut as cut:
            target.sendall(cut.args[0])
            for sock in (source, target):
                sock.shutdown(socket.SHUT_WR)
        except (OSError, socket.error):
            for sock in (source, target):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except (OSError, socket.error):
                    pass


class _Renamed(object):
    """What a path makes of a server's bytes: `change` first, then the names of its group and of its source.

    The bytes stay as many as they are. WELCOME waits until all of it is here.
    """

    def __init__(self, change, group, source_port):
        self._change = change
        self._address = socket.inet_aton(group)
        self._port = source_port
        self._head = b""                # what came until the end of WELCOME
        self._passed = 0                # bytes of it

    def __call__(self, data, offset):
        try:
            return self._rename(self._change(data, offset))
        except Cut as cut:
            raise Cut(self._rename(cut.args[0], True))

    def _rename(self, data, end=False):
        if self._head is None:
            return data
        head = self._head = self._head + data
        ready = head[:4] + self._address[:max(0, len(head) - 4)] + head[8:16]
        found = wire.welcome_in(head)
        if found:
            start, stop = found
            named = re.search(br'"source": \["[0-9.]+", ([0-9]+)\]', head[start:stop])
            at, port = start + named.start(1), str(self._port).encode("ascii").ljust(len(named.group(1)))
            ready += head[16:at] + port + head[at + len(port):]
        elif found is False or end:
            ready += head[16:]
        ready, self._passed = ready[self._passed:], len(ready)
        if self._passed > 16:
            self._head = None
        return ready
