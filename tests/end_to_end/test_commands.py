"""--pipe: the commands at both ends of an image, from their start to their end; and the image that is empty."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest

import helpers
from helpers import LOOPBACK
from hostile import orderly, wrapped
from pythons import BOTH, in_turn
from test_failures import wait_until

IMAGE = helpers.random_bytes(300000, seed=8)        # more than a pipe holds


class Command(object):
    """A command for --pipe, `.text`, that notes its process id in a file."""

    def __init__(self, path, text):
        self.text = "echo $$ > '%s'; %s" % (path, text)
        self._path = path

    def has_begun(self):
        """Whether it was started."""
        return self._path.exists() and self._path.read_text().endswith("\n")

    @property
    def pid(self):
        """Its process id, as soon as it is there."""
        wait_until(self.has_begun, "the command has begun")
        return int(self._path.read_text())

    def state(self):
        """One of the letters of ps(1), "Z" also where it is not there any more."""
        try:
            with open("/proc/%d/stat" % self.pid) as stat:
                return stat.read().rsplit(")", 1)[1].split()[0]
        except OSError:
            return "Z"

    def runs(self):
        """Whether it has not ended."""
        return self.state() != "Z"

    def stop(self):
        """Kill it with all of its process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except OSError:
            pass


@pytest.fixture
def command(tmp_path_factory):
    """A function of a text that returns a Command. None outlives the test."""
    made, directory = [], tmp_path_factory.mktemp("commands")

    def make(text):
        made.append(Command(directory / str(len(made)), text))
        return made[-1]
    yield make
    helpers.stop_all()                      # first whoever may still start one
    for one in made:
        if one.has_begun():
            one.stop()


def one_line(text, stderr):
    """Fail unless exactly one line of a log contains `text`."""
    assert len([line for line in stderr.splitlines() if text in line]) == 1, stderr


# ---------------------------------------------------------------------------------------------------------------------
# What a command inherits, and what kmcast inherits

#: Put before a command: whoever starts it does not want to hear of the ends of children, which outlives exec.
CHILDLESS = [sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
                                   "os.execv(sys.argv[1], sys.argv[1:])"]


@in_turn("end", ["server", "client"])
def test_a_failed_command_is_no_success_where_kmcast_inherits_that_sigchld_is_ignored(python, end, tmp_path):
    """Then the kernel forgets a child's exit code, and what takes "not known" for 0 has a success that is none."""
    port, options = helpers.free_port(), {"python": python, "prefix": CHILDLESS}
    if end == "server":
        server = helpers.start_server(["--pipe", "head -c 30000000 /dev/zero; exit 3", LOOPBACK, 1, port], **options)
        client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python)
    else:
        server = helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE)
        client = helpers.start_client(["--pipe", "cat > /dev/null; exit 3", LOOPBACK, LOOPBACK, port], **options)
    for process in (client, server):
        code, stderr, _ = process.finish(20)
        assert code == 1 and "failed with exit code 3" in stderr, stderr
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_command_inherits_nothing_but_its_three_standard_files(python, tmp_path):
    """A socket of kmcast's in its hands would keep a connection open that ends when kmcast does."""
    port = helpers.free_port()
    listing = "(ls /proc/$$/fd > '%s'); "   # a subshell, whose redirection the shell knows nothing of
    server = helpers.start_server(["--pipe", listing % (tmp_path / "server") + "echo image", LOOPBACK, 1, port], python)
    client = helpers.start_client(
        ["--pipe", listing % (tmp_path / "client") + "cat > /dev/null", LOOPBACK, LOOPBACK, port], python)
    assert (client.finish(20)[0], server.finish(20)[0]) == (0, 0)
    for end in ("server", "client"):
        assert sorted((tmp_path / end).read_text().split()) == ["0", "1", "2"], end


@BOTH
def test_a_killed_client_is_noticed_at_once_although_its_command_lives(python, command):
    port, deaf = helpers.free_port(), command("exec sleep 100")
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE)
    client = helpers.start_client(["--pipe", deaf.text, LOOPBACK, LOOPBACK, port], python)
    wait_until(deaf.has_begun, "the command has begun")
    client.signal(signal.SIGKILL)
    server.wait_stderr("went away", 10)
    assert server.finish(10)[0] == 1


@BOTH
def test_a_command_that_closes_its_standard_input_fails_at_once(python, command):
    """However long it goes on without."""
    port, deaf = helpers.free_port(), command("exec 0<&-; exec sleep 40")
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE)
    client = helpers.start_client(["--pipe", deaf.text, LOOPBACK, LOOPBACK, port], python)
    for process in (client, server):
        code, stderr, _ = process.finish(15)
        assert code == 1 and "read no more" in stderr, stderr
    wait_until(lambda: not deaf.runs(), "the command was ended", 5)


def hard_limit():
    """The hard limit of descriptors that what we start inherits, as ulimit(1) says it."""
    return subprocess.check_output(["sh", "-c", "ulimit -H -n"]).decode("ascii").strip()


@in_turn("soft, hard, places", [(20000, 20000, 1), (4000, 4000, 1), (256, 4000, 300)])
def test_the_limit_of_descriptors_is_raised_where_need_be_but_never_lowered(python, soft, hard, places, tmp_path):
    """A command may need more of them than kmcast; and 300 clients need more than 256."""
    if hard_limit() != "unlimited" and int(hard_limit()) < hard:
        pytest.skip("the hard limit of descriptors is %s here" % hard_limit())
    port = helpers.free_port()
    producer = "ulimit -n > '%s'; echo image" % (tmp_path / "limit")
    server = helpers.start_server(
        ["--start-wait", 0, "--pipe", producer, LOOPBACK, places, port], python,
        prefix=["sh", "-c", 'ulimit -n %d; ulimit -S -n %d; exec "$@"' % (hard, soft), "sh"])
    assert helpers.start_client([LOOPBACK, LOOPBACK, port], python).finish(20)[::2] == (0, b"image\n"), server.stderr
    assert server.finish(20)[0] == (0 if places == 1 else 3), server.stderr
    assert int((tmp_path / "limit").read_text()) >= soft


# ---------------------------------------------------------------------------------------------------------------------
# When a command starts, and when it ends

def too_large_an_mtu():
    """The arguments of a server that wants a larger MTU than its interface has: a list of one, or of none."""
    listing = subprocess.check_output(["ip", "-4", "-o", "addr"]).decode("ascii")
    for name, address in re.findall(r"^\d+: (\S+)\s+inet ([0-9.]+)", listing, re.M):
        with open("/sys/class/net/%s/mtu" % name.split("@")[0]) as file:
            mtu = int(file.read())
        if mtu < 9000:
            return [["--mtu", mtu + 1, address, 1, helpers.free_port()]]
    return []


@BOTH
def test_a_server_starts_its_command_only_when_nothing_else_is_wrong(python, tmp_path):
    """`docker save` takes minutes, and what it writes would be for nobody."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        busy, nowhere = [LOOPBACK, 1, other.getsockname()[1]], ["203.0.113.7", 1, helpers.free_port()]
        for wrong in [busy, nowhere] + too_large_an_mtu():
            server = helpers.start_server(["--pipe", "touch '%s'" % (tmp_path / "started")] + wrong, python)
            assert server.finish(10)[0] == 2, server.stderr
    time.sleep(0.5)                         # as long as the start of a shell may take
    assert not (tmp_path / "started").exists()


@in_turn("signals", [1, 2])
def test_a_server_that_is_stopped_ends_its_command_before_it_takes_leave_of_its_clients(python, signals, command):
    """That takes seconds if one of them hangs, in which who has no patience sends another signal."""
    port, producer = helpers.free_port(), command("exec sleep 100")
    server = wrapped("kmcast.FAREWELL_TIME = 30.0", ["server", "--pipe", producer.text, LOOPBACK, 2, port], python)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    server.wait_stderr("is here")
    wait_until(producer.has_begun, "the command has begun")
    client.signal(signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    if signals == 1:
        wait_until(lambda: not producer.runs(), "the command was ended", 5)
        assert server.poll() is None, server.stderr
    else:
        time.sleep(1.2)
        server.signal(signal.SIGTERM)
        assert server.wait(10) == -signal.SIGTERM
        wait_until(lambda: not producer.runs(), "the command was ended", 2)


@BOTH
def test_a_command_that_does_not_hear_sigterm_does_not_outlive_a_second_signal(python, command):
    port, deaf = helpers.free_port(), command("trap '' TERM; while :; do sleep 1; done")
    server = wrapped("kmcast.FAREWELL_TIME = 30.0", ["server", "--pipe", deaf.text, LOOPBACK, 2, port], python)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    server.wait_stderr("is here")
    wait_until(deaf.has_begun, "the command has begun")
    client.signal(signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    time.sleep(1.2)
    server.signal(signal.SIGTERM)
    assert server.wait(10) == -signal.SIGTERM
    wait_until(lambda: not deaf.runs(), "the command was ended", 2)


@BOTH
def test_clients_that_die_while_the_end_of_the_command_is_waited_for_are_noticed(python, command):
    """It has written all that it will write, in the middle of a round, but still runs, and may yet fail."""
    port, producer = helpers.free_port(), command("head -c 100000 /dev/urandom; exec 1>&-; exec sleep 100")
    server = helpers.start_server(["--pipe", producer.text, LOOPBACK, 2, port], python)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python, stdout=helpers.HASH) for _ in range(2)]
    with open("/proc/%d/comm" % producer.pid) as name:
        wait_until(lambda: name.seek(0) == 0 and name.read() == "sleep\n", "the command has written all")
    time.sleep(0.5)                         # until the server has read that
    clients[0].signal(signal.SIGKILL)
    server.wait_stderr("went away", 10)
    clients[1].signal(signal.SIGKILL)
    code, stderr, _ = server.finish(10)
    assert code == 1 and "no client is left" in stderr, stderr
    wait_until(lambda: not producer.runs(), "the command was ended", 5)


# ---------------------------------------------------------------------------------------------------------------------
# Terminals

class Terminal(object):
    """A terminal. What is started after `.prefix` has it as its own, in the foreground."""

    def __init__(self):
        self._ours, self._theirs = pty.openpty()
        self.prefix = [sys.executable, "-c", "import fcntl, os, sys, termios; "
                       "fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY), termios.TIOCSCTTY, 0); "
                       "os.execvp(sys.argv[2], sys.argv[2:])", os.ttyname(self._theirs)]

    def type(self, text):
        """Type at it."""
        os.write(self._ours, text)

    def foreground(self):
        """The process group that may read from it."""
        return os.tcgetpgrp(self._ours)

    def close(self):
        """Close it."""
        os.close(self._theirs)
        os.close(self._ours)


@pytest.fixture
def terminal():
    """A Terminal."""
    made = Terminal()
    yield made
    made.close()


@BOTH
def test_a_servers_command_reads_what_is_typed_at_the_terminal(python, terminal):
    """As `ssh` does for a password."""
    port = helpers.free_port()
    server = helpers.start_server(["--pipe", 'read x < /dev/tty; echo "$x"', LOOPBACK, 1, port], python,
                                  prefix=terminal.prefix)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    terminal.type(b"a password\n")
    assert client.finish(10)[::2] == (0, b"a password\n")
    code, stderr, _ = server.finish(10)
    assert code == 0 and "is stopped" not in stderr, stderr


@in_turn("size", [1000, len(IMAGE)])
def test_a_clients_command_reads_what_is_typed_at_the_terminal(python, size, terminal, tmp_path):
    """Whether or not the whole image has found room in its pipe by then."""
    port, consumer = helpers.free_port(), "read x < /dev/tty; cat > '%s'" % (tmp_path / "image")
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE[:size])
    client = helpers.start_client(["--pipe", consumer, LOOPBACK, LOOPBACK, port], python, prefix=terminal.prefix)
    client.wait_stderr("connected to")
    terminal.type(b"a password\n")
    code, stderr, _ = client.finish(10)
    assert code == 0 and "is stopped" not in stderr, stderr
    assert server.finish(10)[0] == 0
    same = (tmp_path / "image").read_bytes() == IMAGE[:size]
    assert same


@BOTH
def test_a_script_has_its_terminal_back_when_kmcast_has_ended(python, terminal, tmp_path):
    """Else it could not ask its user anything, and no Ctrl-C would reach it."""
    port = helpers.free_port()
    script = ["sh", "-c", '"$@"; code=$?; read y < /dev/tty; echo "$code $y" > %s' % (tmp_path / "end"), "sh"]
    server = helpers.start_server(["--pipe", 'read x < /dev/tty; echo "$x"', LOOPBACK, 1, port], python,
                                  prefix=terminal.prefix + script)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    terminal.type(b"for kmcast\nfor the script\n")
    assert client.finish(10)[::2] == (0, b"for kmcast\n")
    server.finish(10)
    assert (tmp_path / "end").read_text() == "0 for the script\n"


@BOTH
def test_ctrl_c_while_a_command_has_the_terminal_ends_everything_in_order(python, terminal, command):
    port, asking = helpers.free_port(), command("read x < /dev/tty; echo image")
    server = helpers.start_server(["--pipe", asking.text, LOOPBACK, 1, port], python, prefix=terminal.prefix)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    server.wait_stderr("is here")
    wait_until(lambda: terminal.foreground() == os.getpgid(asking.pid), "the command has the terminal", 10)
    terminal.type(termios.tcgetattr(terminal._ours)[6][termios.VINTR])
    code, stderr, _ = server.finish(10)
    assert code == 1, stderr
    orderly(stderr)
    assert client.finish(10)[0] in (1, 3)
    assert "the server says" in client.stderr
    assert not asking.runs()


# ---------------------------------------------------------------------------------------------------------------------
# Commands that are stopped

@BOTH
def test_a_servers_command_that_is_stopped_is_named_once_and_can_go_on(python, command):
    """Else the user would wait for an image of which nothing comes."""
    port, producer = helpers.free_port(), command("kill -STOP $$; echo image")
    server = helpers.start_server(["--pipe", producer.text, LOOPBACK, 1, port], python)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    server.wait_stderr("is stopped", 10)
    os.kill(producer.pid, signal.SIGCONT)
    assert client.finish(10)[::2] == (0, b"image\n")
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    one_line("is stopped", stderr)


@in_turn("size", [1000, len(IMAGE)])
def test_a_clients_command_that_is_stopped_is_named_once_and_can_go_on(python, size, command, tmp_path):
    """Whether or not the whole image has found room in its pipe by then."""
    port, consumer = helpers.free_port(), command("kill -STOP $$; cat > '%s'" % (tmp_path / "image"))
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE[:size])
    client = helpers.start_client(["--pipe", consumer.text, LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("is stopped", 10)
    os.kill(consumer.pid, signal.SIGCONT)
    code, stderr, _ = client.finish(10)
    assert code == 0, stderr
    one_line("is stopped", stderr)
    assert server.finish(10)[0] == 0
    same = (tmp_path / "image").read_bytes() == IMAGE[:size]
    assert same


# ---------------------------------------------------------------------------------------------------------------------
# The empty image

@pytest.fixture(params=["stdin", "-i", "--pipe"])
def empty(request, tmp_path_factory):
    """The options of a server whose image is empty; without them its standard input is."""
    path = tmp_path_factory.mktemp("empty") / "image"
    path.write_bytes(b"")
    return {"stdin": [], "-i": ["-i", path], "--pipe": ["--pipe", "true"]}[request.param]


@BOTH
def test_an_empty_image_fails_everyone_and_nothing_is_written(python, empty, command, tmp_path):
    """It is what a command that was mistyped has written; who has an old file is better off with that."""
    (tmp_path / "image").write_bytes(b"old")
    port, consumer = helpers.free_port(), command("cat > /dev/null")
    server = helpers.start_server(empty + [LOOPBACK, 2, port], python, stdin=b"")
    clients = [helpers.start_client(output + [LOOPBACK, LOOPBACK, port], python)
               for output in (["-o", tmp_path / "image"], ["--pipe", consumer.text])]
    for process in clients + [server]:
        code, stderr, _ = process.finish(20)
        assert code == 1 and "empty" in stderr, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_bytes() == b"old"
    assert not consumer.has_begun()


@BOTH
def test_an_empty_image_that_is_allowed_arrives(python, empty, tmp_path):
    (tmp_path / "image").write_bytes(b"old")
    port = helpers.free_port()
    server = helpers.start_server(["--allow-empty"] + empty + [LOOPBACK, 2, port], python, stdin=b"")
    clients = [helpers.start_client(output + [LOOPBACK, LOOPBACK, port], python)
               for output in (["-o", tmp_path / "image"], ["--pipe", "cat > '%s'" % (tmp_path / "piped")])]
    for process in [server] + clients:
        code, stderr, _ = process.finish(20)
        assert code == 0, stderr
    assert dict((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == {"image": b"", "piped": b""}


@in_turn("options, code", [([], 1), (["--allow-empty"], 0)], ids=["refused", "allowed"])
def test_an_empty_image_for_clients_of_the_base_protocol(python, options, code):
    """There nothing can be said but by the end of the connection, before the first round."""
    port = helpers.free_port()
    server = helpers.start_server(["--compat"] + options + [LOOPBACK, 2, port], python, stdin=b"")
    clients = [helpers.start_base_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    for process in [server] + clients:
        assert process.finish(20)[::2] == (code, b""), process.stderr
    assert code == 0 or "empty" in server.stderr
