"""What is seen of a transfer: while it goes on, in the log, and in the report afterwards."""

import json
import os
import pty
import re
import select
import signal
import stat
import time

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, NEWEST
from test_failures import Consumer, wait_until

KEYS = {"kmcast", "command", "arguments", "ended", "result", "exit_code", "reason", "bytes", "sha256", "seconds", "goodput", "carried", "steps"}


def read(path):
    with open(str(path)) as file:
        return json.load(file)


@BOTH
def test_the_reports_of_a_transfer_say_what_was_carried_and_what_became_of_each_host(python, tmp_path):
    data, port = helpers.random_bytes(3000000), helpers.free_port()
    server = helpers.start_server(["--report", tmp_path / "server", LOOPBACK, 2, port], python, stdin=data)
    network = helpers.Network(port)
    clients = [helpers.start_client(["--report", tmp_path / str(number), LOOPBACK, LOOPBACK,
                                     network.path(helpers.loss(2 * number))], python) for number in range(2)]
    for process in clients + [server]:
        assert process.finish(60)[0] == 0, process.stderr
    report = read(tmp_path / "server")
    assert set(report) == KEYS | {"hosts"}
    assert (report["command"], report["result"], report["exit_code"], report["reason"]) == ("server", "complete", 0, None)
    assert report["arguments"] == ["server", "--report", str(tmp_path / "server"), LOOPBACK, "2", str(port)]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", report["ended"])
    assert (report["bytes"], report["sha256"]) == (len(data), helpers.sha256(data))
    assert report["carried"]["multicast"] > 0 and report["goodput"] > 0
    assert [(host["result"], host["exit_code"]) for host in report["hosts"]] == 2 * [("complete", 0)]
    lost = sorted(host["lost"] for host in report["hosts"])
    assert lost[1] > 10
    for host in report["hosts"]:
        assert host["lost"] == sum(host["repaired"].values())
    for number in range(2):
        report = read(tmp_path / str(number))
        assert set(report) == KEYS | {"server", "lost", "overflows", "resumed", "verified", "fallback", "rehearsal"}
        assert (report["result"], report["exit_code"], report["sha256"]) == ("complete", 0, helpers.sha256(data))
        assert report["carried"]["multicast"] > 0


def test_a_report_is_written_however_it_ends(tmp_path):
    """Killed clients, missing ones, refused ones, and a server that is stopped; the others go by the table of the exit codes."""
    port = helpers.free_port()
    server = helpers.start_server(["--report", tmp_path / "server", "--start-wait", 1, "--rate", "20M", LOOPBACK, 3, port],
                                  stdin=helpers.random_chunks(50000000))
    clients = [helpers.start_client(["--report", tmp_path / str(number), LOOPBACK, LOOPBACK, port], stdout=helpers.HASH)
               for number in range(2)]
    server.wait_stderr("starting with 2 of 3")
    late = helpers.start_client(["--report", tmp_path / "late", LOOPBACK, LOOPBACK, port])
    assert late.finish(20)[0] == 3
    clients[0].stop()
    server.wait_stderr("went away")
    server.signal(signal.SIGTERM)
    assert server.finish(20)[0] == 1
    assert clients[1].finish(20)[0] == 1
    report = read(tmp_path / "server")
    assert (report["result"], report["exit_code"]) == ("failed", 1) and "SIGTERM" in report["reason"]
    assert sorted(host["result"] for host in report["hosts"]) == ["failed", "failed", "missing", "refused"]
    assert "went away" in " ".join(str(host["reason"]) for host in report["hosts"])
    report = read(tmp_path / "1")
    assert (report["result"], report["exit_code"]) == ("failed", 1) and "SIGTERM" in report["reason"]
    assert read(tmp_path / "late")["result"] == "refused"
    assert not (tmp_path / "0").exists() and len(os.listdir(str(tmp_path))) == 3


@BOTH
def test_a_report_into_a_pipe_leaves_it_one(python, tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    reader = os.open(str(tmp_path / "pipe"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        client = helpers.start_client(["--report", tmp_path / "pipe", "--wait", 0, LOOPBACK, LOOPBACK, helpers.free_port()], python)
        code = client.finish(20)[0]
        report = json.loads(os.read(reader, 65536).decode("ascii"))
    finally:
        os.close(reader)
    assert report["exit_code"] == code and stat.S_ISFIFO(os.stat(str(tmp_path / "pipe")).st_mode)


def test_a_report_that_cannot_be_written_changes_nothing_but_gets_a_line(tmp_path):
    result = helpers.transfer(b"data", server_args=["--report", "/nonexistent/report"])
    result.check(b"data")
    assert "cannot write the report" in result.server.stderr


@BOTH
def test_a_log_has_everything_with_date_and_time_whatever_the_screen_shows(python, tmp_path):
    result = helpers.transfer(b"data" * 1000, server_args=["-q", "--log", tmp_path / "log"], server_python=python)
    result.check(b"data" * 1000)
    assert result.server.stderr == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d kmcast server: ", line) for line in lines)
    for said in ("multicasting from", "is here", "bytes a packet", "has everything", "1 of 1 client has the image"):
        assert said in "\n".join(lines)


@BOTH
def test_a_client_says_at_once_where_it_looks_for_a_server_and_what_it_hears(python):
    port = helpers.free_port()
    client = helpers.start_client(["--wait", 30, LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("looking for a server at 127.0.0.1 port %d" % port, 10)
    client.wait_stderr("refused")
    client.wait_stderr("waiting for a server at 127.0.0.1 port %d (Connection refused)" % port, 20)


@BOTH
def test_a_client_that_waits_for_others_says_how_many_are_here(python):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 3, port], python, stdin=b"data")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python)
    client.wait_stderr("waiting for the start, 1 of 3 clients here", 20)
    server.wait_stderr("waiting for 2 more clients, 1 of 3 clients here", 20)


def test_a_producer_that_is_silent_is_named_on_both_sides():
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], stdin=helpers.PIPE)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port])
    server.popen.stdin.write(b"x" * 300000)
    server.wait_stderr("waiting for what makes the image", 30)
    client.wait_stderr("waiting for what makes the image", 30)


def test_who_holds_the_others_up_is_named_with_what_it_does():
    """A consumer that takes its time, while each round is over in less than a few seconds."""
    data, port = helpers.random_bytes(4000000), helpers.free_port()
    server = helpers.start_server(["--buffer-packets", 100, LOOPBACK, 3, port], stdin=data)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=helpers.HASH) for _ in range(2)]
    slow = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=lambda chunk: time.sleep(len(chunk) / 1e6))
    server.wait_stderr("holds the others up", 30)
    assert re.search(r"holds the others up, \d+ % of the time: its disk or command", server.stderr), server.stderr
    for process in clients + [slow, server]:
        assert process.finish(30)[0] == 0


@BOTH
def test_sigusr2_asks_for_the_state_of_every_host(python):
    port, slow = helpers.free_port(), Consumer(stop_after=1)
    server = helpers.start_server(["-q", "--buffer-packets", 20, LOOPBACK, 2, port], python, stdin=helpers.random_chunks(2000000))
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python, stdout=out) for out in (slow, helpers.HASH)]
    wait_until(lambda: slow.data, "the first bytes have come")

    def tells():                                # once the client has said what it is doing
        server.signal(signal.SIGUSR2)
        time.sleep(0.3)
        return "its disk or command, lost 0 packets" in server.stderr
    wait_until(tells, "the server knows what keeps the client")
    assert "waits for the others" in server.stderr and "2 of 2 clients here" in server.stderr
    slow.go_on.set()
    assert [process.finish(30)[0] for process in clients + [server]] == [0, 0, 0]


class Terminal(object):
    """A terminal that a process has as its standard error."""

    def __init__(self):
        self.ours, self.theirs = pty.openpty()
        self.text = ""

    def read(self, process):
        """All that is said until the end of a process."""
        ended = False
        while not ended:
            ended = process.poll() is not None
            while select.select([self.ours], [], [], 0 if ended else 0.1)[0]:
                self.text += os.read(self.ours, 65536).decode("ascii")
        return self.text

    def close(self):
        os.close(self.ours)
        os.close(self.theirs)


@pytest.mark.parametrize("environment, drawn", [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False)], ids=["xterm", "dumb"])
def test_on_a_terminal_there_is_a_line_that_is_redrawn_and_torn_by_no_other(environment, drawn):
    port, terminal = helpers.free_port(), Terminal()
    shell = ["sh", "-c", 'exec "$@" 2> "$0"', os.ttyname(terminal.theirs)]
    server = helpers.start_server(["--rate", "20M", "--size", 5000000, LOOPBACK, 1, port], NEWEST, prefix=shell,
                                  env=environment, stdin=helpers.random_bytes(5000000))
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=helpers.HASH)
    said = terminal.read(server)
    terminal.close()
    assert client.finish(30)[0] == 0
    assert "waiting for 1 client" in said and "1 of 1 client has the image" in said
    assert bool(re.search(r"\d+ %, [0-9.]+ Mbit/s", said)) == drawn, said
    for line in said.replace("\r\n", "\n").split("\n"):
        shown = line.split("\r\x1b[K")[-1] if drawn else line
        assert "\x1b" not in shown, repr(line)
        assert re.match("kmcast server: |[0-9a-f]{64}  -$|$", shown), repr(line)
