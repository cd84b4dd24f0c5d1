"""Signals at any moment, a standard error that nobody reads, and hosts that give no thread: no exit code lies."""

import concurrent.futures
import os
import re
import signal
import subprocess
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import all_receive, orderly, wrapped
from pythons import BOTH, in_turn
from test_failures import Consumer, PAYLOAD, ROUNDS, SMALL, Started, wait_until

USR = (signal.SIGUSR1, signal.SIGUSR2)


def parts(directory):
    """The names of all files there, sorted."""
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# SIGUSR1 and SIGUSR2

def answers(process):
    """Fail unless a process says one line more for SIGUSR1, at least one for SIGUSR2, and goes on."""
    for number in USR:
        lines = process.stderr.count("\n")
        process.signal(number)
        wait_until(lambda: process.poll() is not None or process.stderr.count("\n") > lines, "it says how it stands")
        time.sleep(0.1)
        said = process.stderr.count("\n") - lines
        assert process.poll() is None and (said == 1 or number == signal.SIGUSR2), "%r\n%s" % (process, process.stderr)


@BOTH
def test_who_waits_says_how_it_stands(python):
    """A client for its server, and both for another client."""
    port = helpers.free_port()
    client = helpers.start_client(["-v", LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("looking for a server")     # the last line that it says by itself
    answers(client)
    server = helpers.start_server([LOOPBACK, 2, port], python, stdin=b"data")
    server.wait_stderr("is here")
    client.wait_stderr("connected to")
    answers(server)
    answers(client)
    assert helpers.start_client([LOOPBACK, LOOPBACK, port], python).finish(10)[::2] == (0, b"data")
    assert (client.finish(10)[::2], server.finish(10)[0]) == ((0, b"data"), 0)


@BOTH
def test_who_is_in_the_middle_of_a_transfer_says_how_it_stands(python):
    session = Started(1, python=python)
    answers(session.server)
    answers(session.clients[0])
    session.write_rest()
    assert [process.finish(10)[0] for process in session.clients + [session.server]] == [0, 0]
    assert session.consumers[0].data == session.data


@BOTH
def test_who_waits_for_what_reads_its_output_says_how_it_stands(python):
    port, slow = helpers.free_port(), Consumer(stop_after=1)
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], python, stdin=helpers.random_bytes(2000000))
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python, stdout=slow)
    wait_until(lambda: slow.data, "the first bytes have come")
    time.sleep(0.5)                         # until everything between producer and consumer is full
    answers(client)
    answers(server)
    slow.go_on.set()
    assert (client.finish(20)[0], server.finish(20)[0]) == (0, 0)


@BOTH
def test_a_hundred_questions_in_mid_transfer_do_no_harm(python):
    """On Python 2.7 each ends a system call with EINTR, wherever it comes."""
    data, port = helpers.random_bytes(3000000), helpers.free_port()
    server = helpers.start_server(["--rate", "40M", LOOPBACK, 2, port], python, stdin=data)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python) for _ in range(2)]
    for process in clients:
        process.wait_stderr("connected to")
    asked = 0
    while not [process for process in [server] + clients if process.poll() is not None]:
        for process in [server] + clients:
            process.signal(USR[asked % 2])
        asked += 1
        time.sleep(0.005)
    all_receive(data, clients, server)
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    assert asked > 20
    for process in [server] + clients:
        orderly(process.stderr)


#: Statements for wrapped(): a signal at the interpreter's end, before or after it has given up looking after signals.
AT_EXIT = "import atexit, os; atexit.register(os.kill, os.getpid(), %d)"
AT_THE_VERY_END = """
import os
class Last(object):
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, %d)
last = Last()
"""


@BOTH
@pytest.mark.parametrize("moment", [AT_EXIT, AT_THE_VERY_END], ids=["at exit", "at the very end"])
@pytest.mark.parametrize("number", USR, ids=["SIGUSR1", "SIGUSR2"])
def test_a_question_after_the_end_changes_nothing(python, number, moment):
    client = wrapped(moment % number, ["client", "--wait", 0, LOOPBACK, LOOPBACK, helpers.free_port()], python)
    assert client.finish(10)[0] == 3, client.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A standard error that is full

@pytest.fixture
def full(tmp_path_factory):
    """A prefix that has a process say all to a pipe that is full, and that nobody reads."""
    path = str(tmp_path_factory.mktemp("full") / "stderr")
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        while True:
            os.write(pipe, b"." * 4096)
    except BlockingIOError:
        pass
    yield ["sh", "-c", 'exec "$@" 2> "$0"', path]
    helpers.stop_all()                      # they may hang in it
    os.close(pipe)


@BOTH
def test_a_full_standard_error_never_holds_up_a_transfer(python, full):
    """Of a service, say, whose log daemon hangs; and the server's exit code is right."""
    data, port = helpers.random_bytes(500000), helpers.free_port()
    server = helpers.start_server(["-v"] + SMALL + [LOOPBACK, 2, port], python, stdin=data, prefix=full)
    clients = [helpers.start_client(["-v", LOOPBACK, LOOPBACK, port], python, prefix=full) for _ in range(2)]
    all_receive(data, clients, server, 20)
    assert server.finish(20)[0] == 0


@in_turn("where", ["server", "client"])
def test_who_is_stopped_while_its_standard_error_is_full_ends_in_order(python, where, full, tmp_path):
    port = helpers.free_port()
    of_server, of_client = [full if where == end else () for end in ("server", "client")]
    server = helpers.start_server(["-v"] + SMALL + [LOOPBACK, 1, port], python, stdin=helpers.PIPE, prefix=of_server)
    client = helpers.start_client(["-v", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python, prefix=of_client)
    data = helpers.random_bytes(20 * PAYLOAD)
    os.write(server.popen.stdin.fileno(), data)
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == [len(data)], "it has two rounds", 20)
    stopped, other = (server, client) if where == "server" else (client, server)
    stopped.signal(signal.SIGTERM)
    assert stopped.finish(15)[0] == 1
    code, stderr, _ = other.finish(15)
    assert code == 1 and "stopped by SIGTERM" in stderr, stderr
    assert parts(tmp_path) == []


@BOTH
def test_a_server_whose_standard_error_fills_up_while_clients_come_and_go_is_stopped_in_order(python, full):
    """One of its threads is the first that finds no room, and the main thread has to hear of the signal."""
    port = helpers.free_port()
    pipe = os.open(full[-1], os.O_RDWR | os.O_NONBLOCK)
    os.read(pipe, 8192)                     # so much room there is
    server = helpers.start_server([LOOPBACK, 3, port], python, prefix=full)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("connected to")
    for _ in range(90):                     # each time two lines of some 60 characters
        guest = wire.Client(port).hello()
        guest.half_close()
        while guest.sock.recv(65536):
            pass
        guest.close()
    server.signal(signal.SIGTERM)
    assert server.finish(15)[0] == 1
    code, stderr, _ = client.finish(15)
    assert code == 3 and "stopped by SIGTERM" in stderr, stderr
    with pytest.raises(BlockingIOError):
        os.write(pipe, b"." * 4096)         # it was full
    os.close(pipe)


# ---------------------------------------------------------------------------------------------------------------------
# When all have the image

#: Statements for wrapped(): a SIGTERM when kmcast is about to say these words.
SIGNAL_AT = """
import os, signal
say = kmcast.Log.say
def late(self, level, line):
    if %r in line:
        os.kill(os.getpid(), signal.SIGTERM)
    say(self, level, line)
kmcast.Log.say = late
"""


@in_turn("words", ["has everything", "data: ", "repair: ", "1 of 1 client"])
def test_a_signal_when_all_clients_have_the_image_changes_nothing(python, words):
    """From the last one's last word on, through the farewell, and in the middle of the summary."""
    port = helpers.free_port()
    server = wrapped(SIGNAL_AT % words, ["server", LOOPBACK, 1, port], python, stdin=b"data")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    assert client.finish(20)[::2] == (0, b"data"), client.stderr
    code, stderr, _ = server.finish(20)
    assert code == 0 and helpers.summary(server).served == 1, stderr
    orderly(stderr)


@BOTH
def test_a_signal_during_the_servers_farewell_changes_nothing(python):
    """Which a stranger draws out, who was told that it made no sense, and does not hang up."""
    session = Started(1, python=python)
    stranger = wire.Client(session.port)
    stranger.say(b"GET / HTTP/1.0\r\n\r\n")
    stranger.expect(wire.BYE)
    session.write_rest()
    assert session.clients[0].finish(10)[0] == 0
    session.server.wait_stderr("has everything")
    assert "the image\n" not in session.server.stderr, "it has taken its leave already"
    session.server.signal(signal.SIGTERM)
    code, stderr, _ = session.server.finish(20)
    stranger.close()
    assert code == 0 and helpers.summary(session.server).served == 1, stderr
    orderly(stderr)


#: Statements for wrapped(): another SIGTERM, when it has been decided that from now on none matters.
SIGNAL_AT_THE_VERDICT = """
import os, signal
over = kmcast.StopInOrder.over
def late(self):
    os.kill(os.getpid(), signal.SIGTERM)
    over(self)
kmcast.StopInOrder.over = late
"""


@BOTH
def test_a_signal_at_the_very_moment_of_the_verdict_changes_nothing(python, tmp_path):
    """A client's file is in its place by then, and a server's clients are all gone."""
    port = helpers.free_port()
    server = wrapped(SIGNAL_AT_THE_VERDICT, ["server", LOOPBACK, 1, port], python, stdin=b"data")
    client = wrapped(SIGNAL_AT_THE_VERDICT, ["client", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python)
    for process in (client, server):
        code, stderr, _ = process.finish(20)
        assert code == 0, stderr
        orderly(stderr)
    assert parts(tmp_path) == ["image"]


@in_turn("code", [SIGNAL_AT % "no kmcast server", SIGNAL_AT_THE_VERDICT], ids=["says so", "verdict"])
def test_a_signal_at_the_very_moment_of_a_failure_changes_nothing(python, code):
    client = wrapped(code, ["client", "--wait", 0, LOOPBACK, LOOPBACK, helpers.free_port()], python)
    code, stderr, _ = client.finish(20)
    assert code == 3, stderr
    orderly(stderr)


# ---------------------------------------------------------------------------------------------------------------------
# A client's file takes its place

#: Statements for wrapped(): `signal_here()` has the process hear a SIGTERM, and the main thread has time to do what it
#: does then; `instead(os, "name", function)` replaces a function by one that gets it as the first argument.
TOOLS = """
import errno, functools, os, signal, stat, time
def signal_here():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
def instead(module, name, function):
    setattr(module, name, functools.partial(function, getattr(module, name)))
"""

AFTER_THE_RENAME = """
def renamed(rename, *names):
    rename(*names)
    signal_here()
instead(os, 'rename', renamed)
"""

NO_FOLDER = """
def fail(open_, path, flags, *mode):
    if os.path.isdir(path) and not flags & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.EACCES, 'injected')
    return open_(path, flags, *mode)
instead(os, 'open', fail)
"""

NO_SYNC_OF_THE_FOLDER = """
def fail(fsync, fd):
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.EIO, 'injected')
    fsync(fd)
instead(os, 'fsync', fail)
"""


def receives_a_file(code, python, path):
    """A client with -o `path` that is changed by `code`, and its server; both have ended."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data")
    client = wrapped(TOOLS + code, ["client", "-o", path, LOOPBACK, LOOPBACK, port], python)
    for process in (client, server):
        process.finish(20)
        orderly(process.stderr)
    return client, server


@in_turn("code", [AFTER_THE_RENAME, NO_FOLDER, NO_SYNC_OF_THE_FOLDER],
         ids=["a signal", "a folder that cannot be opened", "a folder that cannot be synchronised"])
def test_once_the_file_is_in_its_place_nothing_makes_the_client_fail(python, code, tmp_path):
    """Who takes 1 for "not to be used" would throw it away, and the server would list that host."""
    client, server = receives_a_file(code, python, tmp_path / "image")
    assert client.poll() == 0, client.stderr
    assert server.poll() == 0, server.stderr
    assert "error" not in client.stderr.lower().replace("input/output error", ""), client.stderr
    assert parts(tmp_path) == ["image"] and (tmp_path / "image").read_bytes() == b"data"


@BOTH
def test_a_signal_before_the_file_is_in_its_place_leaves_the_old_one(python, tmp_path):
    """When all of the image is there, and on its way to the disk."""
    (tmp_path / "image").write_bytes(b"old")
    early = "instead(os, 'fsync', lambda fsync, fd: (signal_here(), fsync(fd)))"
    client, server = receives_a_file(early, python, tmp_path / "image")
    assert (client.poll(), server.poll()) == (1, 1), client.stderr + server.stderr
    assert "stopped by SIGTERM" in client.stderr and "stopped by SIGTERM" in server.stderr
    assert parts(tmp_path) == ["image"] and (tmp_path / "image").read_bytes() == b"old"


@BOTH
def test_a_signal_right_before_the_rename_is_before_or_after_it(python, tmp_path):
    """The exit code and the file agree, and so do the client and the server."""
    late = "instead(os, 'rename', lambda rename, *names: (signal_here(), rename(*names)))"
    client, server = receives_a_file(late, python, tmp_path / "image")
    end = client.poll(), server.poll(), parts(tmp_path)
    assert end in ((0, 0, ["image"]), (1, 1, [])), client.stderr + server.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Its temporary file

@BOTH
def test_a_signal_right_after_the_temporary_file_was_made_leaves_none(python, tmp_path):
    code = """
def opened(open_, path, flags, *mode):
    fd = open_(path, flags, *mode)
    if flags & os.O_CREAT and os.path.dirname(path) == %r:
        os.kill(os.getpid(), signal.SIGTERM)
    return fd
instead(os, 'open', opened)
""" % str(tmp_path)
    port = helpers.free_port()
    client = wrapped(TOOLS + code, ["client", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python)
    code, stderr, _ = client.finish(20)
    assert code in (1, 3) and "stopped by SIGTERM" in stderr, stderr
    orderly(stderr)
    assert parts(tmp_path) == []


def open_file(process, directory):
    """The name of the file in a directory that a process has open."""
    links = [os.readlink("/proc/%d/fd/%s" % (process.pid, fd)) for fd in os.listdir("/proc/%d/fd" % process.pid)]
    name, = [os.path.basename(link) for link in links if os.path.dirname(link) == str(directory)]
    return name


@BOTH
def test_a_client_removes_the_temporary_files_of_dead_clients_with_the_same_target(python, tmp_path):
    """Those with a kill -9 behind them; but not those of clients that live, and not those of another name."""
    names = ["image", "image", "image.tar", "mage", "other"]
    session = Started(5, python=python, client_args=lambda number: ["-o", tmp_path / names[number]])
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == 5 * [ROUNDS], "all have some rounds")
    dead, alive, others = session.clients[0], session.clients[1], session.clients[2:]
    files = [open_file(client, tmp_path) for client in session.clients]
    for client in [dead] + others:
        client.signal(signal.SIGKILL)
        client.wait(10)
    assert parts(tmp_path) == sorted(files)

    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data")
    client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python)
    assert (client.finish(10)[0], server.finish(10)[0]) == (0, 0), client.stderr
    assert parts(tmp_path) == sorted(files[1:] + ["image"])
    assert (tmp_path / "image").read_bytes() == b"data"

    session.write_rest()
    assert alive.finish(10)[0] == 0, alive.stderr
    assert parts(tmp_path) == sorted(files[2:] + ["image"])
    same = (tmp_path / "image").read_bytes() == session.data
    assert same


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C at the start

@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    """The path of a kmcast.pyz."""
    path = tmp_path_factory.mktemp("built") / "kmcast.pyz"
    subprocess.check_call(["sh", os.path.join(helpers.ROOT, "build_pyz.sh"), str(path)])
    return str(path)


@pytest.fixture
def program(request, kind):
    """What an operator starts."""
    return helpers.KMCAST if kind == "py" else request.getfixturevalue("pyz")


#: The lines of kmcast.py before the first of its own statements, which imports __future__ and cannot be the second.
with open(helpers.KMCAST) as source:
    BEFORE_OURS = 1 + [line.startswith("from __future__") for line in source].index(True)


def interrupted_in_order(process):
    """Fail unless a process that got a SIGINT ended by that, or as one that is stopped, without a traceback of ours.

    What Python itself does before our first statement, to start up and to compile us, cannot be helped: a traceback
    that has no line of ours is its own.
    """
    code, stderr = process.wait(20), process.stderr    # not finish(): what Python's own start left open is not ours
    ours = [int(line) for line in re.findall(r'File "[^"]*kmcast\.pyz?[^"]*", line (\d+)', stderr)]
    assert not [line for line in ours if line > BEFORE_OURS], stderr
    assert code in (-signal.SIGINT, 130, 1, 3), stderr


@BOTH
@pytest.mark.parametrize("kind", ["py", "pyz"])
def test_ctrl_c_in_the_first_moments_shows_no_traceback(python, program):
    """Who has mistyped something is quick with that."""
    def interrupt(seconds):
        client = helpers.start_client(["--wait", 1, LOOPBACK, LOOPBACK, helpers.free_port()], python, program=program)
        time.sleep(seconds)
        if client.poll() is None:
            client.signal(signal.SIGINT)
        interrupted_in_order(client)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(interrupt, [0.04 * step for step in range(8)]))


#: A sitecustomize.py: a SIGINT when a module is imported.
INTERRUPT = """
import os, signal, sys
class Interrupt(object):
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
    find_module = find_spec
sys.meta_path.insert(0, Interrupt())
"""


@in_turn("kind, module", [(kind, module) for kind in ("py", "pyz") for module in ("argparse", "json", "subprocess", "zlib")])
def test_ctrl_c_while_it_imports_what_it_needs_shows_no_traceback(python, program, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    client = helpers.start_client(["--wait", 1, LOOPBACK, LOOPBACK, helpers.free_port()], python, program=program,
                                  env={"PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module})
    interrupted_in_order(client)


# ---------------------------------------------------------------------------------------------------------------------
# A host that gives no thread

#: Statements for wrapped(): no thread can be had but the first so many.
NO_THREAD = """
import threading
try:
    from thread import error
except ImportError:
    error = RuntimeError
threads = [%d]
def start(self, original=threading.Thread.start):
    threads[0] -= 1
    if threads[0] < 0:
        raise error("can't start new thread")
    original(self)
threading.Thread.start = start
"""


def lacks_a_thread(stderr):
    """Fail unless a log says clearly that there is no thread to be had."""
    orderly(stderr)
    assert [line for line in stderr.splitlines() if "error: " in line and "thread" in line], stderr


@BOTH
def test_a_server_that_gets_no_thread_says_so(python):
    server = wrapped(NO_THREAD % 0, ["server", LOOPBACK, 1, helpers.free_port()], python, stdin=b"data")
    assert server.finish(10)[0] == 1, server.stderr
    lacks_a_thread(server.stderr)


@BOTH
def test_a_server_that_gets_too_few_threads_says_so_to_everybody(python, tmp_path):
    """Whom it has taken, and whom it would have taken with the next one."""
    port = helpers.free_port()
    hasher_and_first = 2
    server = wrapped(NO_THREAD % hasher_and_first, ["server", "--clients-per-thread", 1, LOOPBACK, 2, port], python, stdin=b"data")
    server.wait_stderr("waiting for")
    clients = [helpers.start_client(["-o", tmp_path / name, LOOPBACK, LOOPBACK, port], python) for name in ("0", "1")]
    assert server.finish(10)[0] == 1, server.stderr
    lacks_a_thread(server.stderr)
    for client in clients:
        assert client.finish(10)[0] == 3, client.stderr
        lacks_a_thread(client.stderr)
    assert parts(tmp_path) == []


@BOTH
def test_a_client_that_gets_no_thread_says_so_to_its_server(python, tmp_path):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data")
    client = wrapped(NO_THREAD % 0, ["client", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python)
    assert client.finish(10)[0] in (1, 3), client.stderr
    lacks_a_thread(client.stderr)
    assert parts(tmp_path) == []
    server.wait_stderr("it says: ")
    assert "thread" in server.stderr and "internal error" not in server.stderr, server.stderr
