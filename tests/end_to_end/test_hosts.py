"""server --hosts: those on the list are awaited, who is missing is named, who is not on it is refused."""

import os
import signal

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, in_turn

DATA = helpers.random_bytes(100000, seed=4)


def client(port, name, python=None, *args):
    """A client of a host that calls itself so."""
    return helpers.start_client(list(args) + [LOOPBACK, LOOPBACK, port], python,
                                change="kmcast.socket.gethostname = lambda: %r" % name)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "image").write_bytes(DATA)
    return tmp_path


def start(files, hosts, python=None, args=(), stdin=None, source="-i"):
    """A server for the hosts of a list; returns it and its port."""
    port = helpers.free_port()
    (files / "hosts").write_text(hosts)
    source = [source, files / "image" if source == "-i" else "cat %s" % (files / "image")]
    return helpers.start_server(source + ["--hosts", "-" if stdin else files / "hosts"] + list(args) + [
        LOOPBACK, port], python, stdin=stdin), port


@BOTH
def test_the_transfer_starts_when_all_of_the_list_are_here_and_no_other(python, files):
    server, port = start(files, "node1\nnode2.example.org   # in rack 2\n", python)
    uninvited = client(port, "laptop", python)
    code, stderr, _ = uninvited.finish(20)
    assert code == 3 and "it is not on the list of hosts" in stderr, stderr
    clients = [client(port, name, python) for name in ("node2", "node1.example.org")]
    assert [process.finish(20)[::2] for process in clients] == [(0, DATA), (0, DATA)]
    code, stderr, _ = server.finish(20)
    assert code == 0, stderr                    # all who were to have it do
    assert "laptop (127.0.0.1) was refused: it is not on the list of hosts" in stderr
    assert "2 of 2 clients have the image" in stderr
    assert [host["result"] for host in server.report()["hosts"]] == ["refused", "complete", "complete"]


@BOTH
def test_who_is_missing_is_named_while_it_waits_and_at_the_end(python, files):
    server, port = start(files, "node1\nnode2\n10.9.8.7\nNode1\n", python)
    server.wait_stderr("warning: Node1: twice on the list of hosts")
    first = client(port, "node1", python)
    server.wait_stderr("waiting for 2 more clients (node2, 10.9.8.7), 1 of 3 clients here", 20)
    server.signal(signal.SIGUSR2)
    server.wait_stderr("node2: it has not come")
    server.signal(signal.SIGTERM)
    code, stderr, _ = server.finish(20)
    assert code == 1 and "2 clients never came: node2, 10.9.8.7" in stderr, stderr
    assert first.finish(20)[0] == 3
    missing = [(host["host"], host["address"]) for host in server.report()["hosts"] if host["result"] == "missing"]
    assert missing == [("node2", None), (None, "10.9.8.7")]


@BOTH
def test_it_starts_without_those_who_are_missing_after_start_wait(python, files):
    server, port = start(files, "node1\nnode2\nnode3\n", python, ["--start-wait", 1])
    first = client(port, "node1", python)
    assert first.finish(20)[0] == 0
    code, stderr, _ = server.finish(20)
    assert code == 3 and "2 clients never came: node2, node3" in stderr and "1 of 3 clients have the image" in stderr, stderr


def test_who_came_too_late_for_a_pipe_is_refused_and_not_said_to_have_never_come(files):
    server, port = start(files, "node1\nnode2\n", args=["--start-wait", 0.1, "--rate", "200k"], source="--pipe")
    first = client(port, "node1")
    server.wait_stderr("starting with 1 of 2")
    assert client(port, "node2.example.org").finish(20)[0] == 3
    assert first.finish(30)[0] == 0
    code, stderr, _ = server.finish(20)
    assert code == 3 and "node2.example.org (127.0.0.1) was refused" in stderr and "never came" not in stderr, stderr


@BOTH
def test_more_lets_others_in(python, files):
    server, port = start(files, "node1", python, ["--more"])
    guest = client(port, "guest", python)
    server.wait_stderr("guest (127.0.0.1) is here")
    assert client(port, "node1", python).finish(20)[0] == 0
    assert guest.finish(20)[0] == 0
    code, stderr, _ = server.finish(20)
    assert code == 0 and "2 clients have the image" in stderr, stderr


@BOTH
def test_who_of_the_list_comes_late_gets_the_image_and_ends_the_waiting(python, files):
    server, port = start(files, "node1\nnode2\n", python, ["--start-wait", 0.1, "--linger", 60])
    assert client(port, "node1", python).finish(20)[0] == 0
    assert client(port, "guest", python).finish(20)[0] == 3
    assert client(port, "node1", python).finish(20)[0] == 0, "it has lost it, and is still on the list"
    assert client(port, "node2.example.org", python).finish(20)[::2] == (0, DATA)
    code, stderr, _ = server.finish(20)
    assert code == 0 and "never came" not in stderr, stderr


@BOTH
def test_the_list_can_come_from_a_command(python, files):
    server, port = start(files, "", python, stdin=b"node1\n")
    assert client(port, "node1", python).finish(20)[0] == 0
    assert server.finish(20)[0] == 0


@in_turn("args, said", [
    (["--hosts", "HOSTS", LOOPBACK, "2", "18383"], "takes the place of CLIENTS"),
    (["--hosts", "HOSTS", LOOPBACK, "70000"], "argument PORT: 70000"),
    (["--hosts", "/nonexistent", LOOPBACK], "cannot read /nonexistent"),
    (["--hosts", "-", LOOPBACK], "standard input is the image"),
    (["--hosts", "HOSTS", "--compat", LOOPBACK], "addresses"),
    (["--hosts", os.devnull, LOOPBACK], "names no host"),
    ([LOOPBACK], "CLIENTS")])
def test_what_is_wrong_with_it_is_said(python, args, said, files):
    (files / "hosts").write_text("node1\n")
    args = [str(files / "hosts") if arg == "HOSTS" else arg for arg in args]
    code, stderr, _ = helpers.start_server(args, python, stdin=b"data").finish(20)
    assert code == 2 and stderr.count("\n") == 1 and said in stderr, stderr


@pytest.mark.parametrize("args", [["LOCAL", "1", "PORT"], ["-v", "LOCAL", "1", "--rate", "1G", "PORT"], ["LOCAL", "-v", "1", "PORT"],
                                  ["LOCAL", "1", "PORT", "-v"], ["LOCAL", "--hosts", "HOSTS", "PORT"],
                                  ["LOCAL", "PORT", "--hosts", "HOSTS"]], ids=" ".join)
@BOTH
def test_options_may_stand_between_the_arguments(python, args, files):
    port = helpers.free_port()
    (files / "hosts").write_text("node1\n")
    words = {"LOCAL": LOOPBACK, "PORT": port, "HOSTS": files / "hosts"}
    server = helpers.start_server(["-i", files / "image"] + [words.get(arg, arg) for arg in args], python)
    assert client(port, "node1", python).finish(20)[0] == 0
    assert server.finish(20)[0] == 0
