"""The command line: what is wrong with it gets one line and the right exit code, whatever the interpreter."""

import concurrent.futures
import os
import pty
import re
import socket
import subprocess

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, EVERY, NEWEST, OLDEST

SERVER = ["server", LOOPBACK, "1"]
CLIENT = ["client", "--wait", "0", LOOPBACK, LOOPBACK]

WRONG = [
    [], ["serve"], ["--nonsense"], ["server"], ["client"], ["server", LOOPBACK], ["client", LOOPBACK],
    SERVER + ["18383", "more"], SERVER + ["--nonsense"], CLIENT + ["--compat"],
    # CLIENTS
    ["server", LOOPBACK, "0"], ["server", LOOPBACK, "-1"], ["server", LOOPBACK, "x"], ["server", LOOPBACK, "1.5"],
    ["server", LOOPBACK, ""], ["server", LOOPBACK, u"\u0661"], ["server", LOOPBACK, "1" * 30],
    # PORT
    SERVER + ["0"], SERVER + ["65536"], SERVER + ["x"], SERVER + ["-5"], CLIENT + ["0"], CLIENT + ["65536"], CLIENT + ["http"],
    # LOCAL_IP
    ["server", "203.0.113.7", "1"], ["client", "203.0.113.7", LOOPBACK], ["server", "no-such-interface0", "1"],
    ["client", "no-such-interface0", LOOPBACK], ["server", "0.0.0.0", "1"], ["server", "239.1.2.3", "1"],
    ["server", "255.255.255.255", "1"], ["server", "127.1", "1"], ["server", "127.0.0.1.", "1"], ["server", "::1", "1"],
    ["server", "", "1"], ["client", "", LOOPBACK], ["client", "0.0.0.0", LOOPBACK], ["server", u"\u00e4", "1"],
    ["server", "a\nb", "1"],
    # SERVER_IP
    ["client", LOOPBACK, "1.2.3"], ["client", LOOPBACK, "1.2.3.4.5"], ["client", LOOPBACK, "999.1.1.1"], ["client", LOOPBACK, ""],
    # options of the server
    SERVER + ["--group", "10.0.0.1"], SERVER + ["--group", "240.0.0.1"], SERVER + ["--group", "239.1.1"], SERVER + ["--group", "x"],
    SERVER + ["--ttl", "256"], SERVER + ["--ttl", "-1"], SERVER + ["--mtu", "0"], SERVER + ["--mtu", "100"],
    SERVER + ["--mtu", "9001"], SERVER + ["--mtu", "x"], SERVER + ["--rate", "0"], SERVER + ["--rate", "5"],
    SERVER + ["--rate", "fast"], SERVER + ["--rate", "-1M"], SERVER + ["--rate", "1e9"], SERVER + ["--rate", ""],
    SERVER + ["--rate", "940M\nx"], SERVER + ["--buffer-packets", "0"], SERVER + ["--buffer-packets", "65537"],
    SERVER + ["--clients-per-thread", "0"], SERVER + ["--datagrams", "pigeon"], SERVER + ["--stall-timeout", "-1"],
    SERVER + ["--stall-timeout", "nan"],
    # options of the client
    CLIENT + ["--wait", "x"], CLIENT + ["--wait", "-1"], CLIENT + ["--wait", "inf"], CLIENT + ["--datagrams", "a\nb"],
    CLIENT + ["-o"],
    # files
    SERVER + ["-i", "/nonexistent/image"], SERVER + ["-i", "/"], SERVER + ["-i", ""], SERVER + ["-i", "a\nb"],
    SERVER + ["-i", u"/nonexistent/\u00e4"],
    CLIENT + ["-o", "/nonexistent/image"], CLIENT + ["-o", "/"], CLIENT + ["-o", ""], CLIENT + ["-o", "/dev/null/x"],
    CLIENT + ["-o", "/nonexistent/a\nb"],
    ["demo", "/nonexistent/file"], ["demo", "/"], ["demo", "--clients", "0"], ["demo", "--clients", "x"],
]


def the_one_line(process, code=2):
    """The line on stderr with which a process that was started wrong ends, and nothing else."""
    return check_one_line(*process.finish(20), code=code)


def check_one_line(got, stderr, stdout, code=2):
    assert got == code, stderr
    assert stdout in (b"", None)
    assert stderr.endswith("\n") and stderr.count("\n") == 1, repr(stderr)
    assert stderr.startswith("kmcast") and "Errno" not in stderr, stderr
    return stderr


@pytest.fixture(scope="module")
def outcomes():
    """{(arguments, interpreter): (exit code, stderr, stdout)} of all that is WRONG, run some at a time to save time."""
    def run(case):
        args, python = case
        process = helpers.start_kmcast(args, python, env={"LC_ALL": "C.UTF-8"})
        process.wait(10)
        if process.poll() is None:
            process.stop()
        return case, process.finish(10)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return dict(pool.map(run, [(tuple(args), python) for args in WRONG for python in (OLDEST, NEWEST)]))


@BOTH
@pytest.mark.parametrize("args", WRONG, ids=[" ".join(args).encode("unicode_escape").decode("ascii") or "nothing" for args in WRONG])
def test_a_wrong_argument_gets_one_line_and_exit_code_2(args, python, outcomes):
    check_one_line(*outcomes[tuple(args), python])


@BOTH
def test_an_error_about_what_the_locale_cannot_say_is_said_all_the_same(python):
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}
    name = os.fsdecode(u"\u00e4".encode("utf-8") + b"\xff")
    for args in (SERVER + ["-i", "/nonexistent/" + name], CLIENT + ["-o", "/nonexistent/" + name], ["server", name, "1"],
                 ["client", LOOPBACK, "--rate", name], SERVER + ["--rate", name], ["demo", "/nonexistent/" + name]):
        the_one_line(helpers.start_kmcast(args, python, env=env))


@BOTH
def test_a_local_ip_that_is_wrong_gets_a_list_of_those_that_are_right(python):
    assert "lo (127.0.0.1)" in the_one_line(helpers.start_server(["eth99", 1], python))
    assert "lo (127.0.0.1)" in the_one_line(helpers.start_client(["203.0.113.255", LOOPBACK], python))


def test_an_mtu_larger_than_the_interfaces():
    listing = subprocess.check_output(["ip", "-4", "-o", "addr"]).decode("ascii")
    for name, address in re.findall(r"^\d+: (\S+)\s+inet ([0-9.]+)", listing, re.M):
        with open("/sys/class/net/%s/mtu" % name.split("@")[0]) as file:
            mtu = int(file.read())
        if mtu < 9000:
            assert str(mtu) in the_one_line(helpers.start_server(["--mtu", mtu + 1, address, 1]))
            return
    pytest.skip("all interfaces here have an MTU of 9000 or more")


@BOTH
def test_a_port_in_use(python):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        assert "in use" in the_one_line(helpers.start_server([LOOPBACK, 1, other.getsockname()[1]], python))


def test_the_port_of_a_server_that_has_just_ended_is_free():
    """With connections in TIME_WAIT."""
    port = helpers.free_port()
    for _ in range(3):
        helpers.transfer(b"data", port=port).check(b"data")


@BOTH
def test_more_clients_than_file_descriptors(python):
    limited = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh"]
    assert "ulimit" in the_one_line(helpers.start_server([LOOPBACK, 1000, helpers.free_port()], python, prefix=limited))


@pytest.fixture
def terminal():
    """The descriptor of a terminal."""
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


@BOTH
def test_an_image_is_not_read_from_a_terminal(python, terminal):
    server = helpers.start_server([LOOPBACK, 1, helpers.free_port()], python, stdin=terminal)
    assert "terminal" in the_one_line(server)


@BOTH
def test_an_image_is_not_written_to_a_terminal(python, terminal):
    client = helpers.start_client([LOOPBACK, LOOPBACK, helpers.free_port()], python, stdout=terminal)
    assert "terminal" in the_one_line(client)


@BOTH
def test_a_terminal_is_none_under_its_name_either(python, terminal):
    name = os.ttyname(terminal)
    assert "terminal" in the_one_line(helpers.start_server(["-i", name, LOOPBACK, 1, helpers.free_port()], python))
    assert "terminal" in the_one_line(
        helpers.start_client(["-o", name, LOOPBACK, LOOPBACK, helpers.free_port()], python))


@BOTH
def test_a_dash_is_standard_input_or_output(python, tmp_path):
    port = helpers.free_port()
    server = helpers.start_server(["-i", "-", LOOPBACK, 1, port], python, stdin=b"data", cwd=str(tmp_path))
    client = helpers.start_client(["-o", "-", LOOPBACK, LOOPBACK, port], python, cwd=str(tmp_path))
    assert client.finish(20)[::2] == (0, b"data")
    assert server.finish(20)[0] == 0
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_terminal_as_standard_input_or_output_does_not_matter_where_files_are_given(python, terminal, tmp_path):
    (tmp_path / "image").write_bytes(b"data")
    port = helpers.free_port()
    server = helpers.start_server(["-i", tmp_path / "image", LOOPBACK, 1, port], python, stdin=terminal, stdout=terminal)
    client = helpers.start_client(["-o", tmp_path / "copy", LOOPBACK, LOOPBACK, port], python, stdin=terminal, stdout=terminal)
    assert client.finish(20)[0] == 0
    assert server.finish(20)[0] == 0
    assert (tmp_path / "copy").read_bytes() == b"data"


#: Put before a command: what an init script or a cron job may do.
def closing(what):
    return ["sh", "-c", 'exec "$@" ' + what, "sh"]


@BOTH
def test_a_closed_standard_input_or_output_is_an_error(python):
    """Not an empty image; and no socket takes its place."""
    server = helpers.start_server([LOOPBACK, 1, helpers.free_port()], python, prefix=closing("<&-"))
    code, stderr, _ = server.finish(20)
    assert code in (1, 2) and "cannot read" in stderr, stderr
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data")
    code, stderr, _ = helpers.start_client([LOOPBACK, LOOPBACK, port], python, prefix=closing(">&-")).finish(20)
    assert code in (1, 2) and "cannot write" in stderr, stderr


@BOTH
def test_a_closed_standard_error_is_none(python):
    """What is to be logged must not go where it does not belong."""
    data, port = b"data" * 1000, helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], python, prefix=closing("2>&-"), stdin=data)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python, prefix=closing("2>&-"))
    assert client.finish(20) == (0, "", data)
    assert server.finish(20)[0] == 0


@EVERY
def test_version_and_help_of_each_command(python):
    code, stderr, stdout = helpers.start_kmcast(["--version"], python, program=helpers.KMCAST).finish(20)
    assert (code, stderr) == (0, "")
    assert re.match(br"kmcast \d+\.\d+\.\d+\n$", stdout)
    words = {
        (): ["server", "client", "demo", "--version"],
        ("server",): ["LOCAL_IP", "CLIENTS", "PORT", "--group", "--ttl", "--mtu", "--rate", "--unicast", "--datagrams",
                      "--buffer-packets", "--clients-per-thread", "--compat", "--input", "--name", "--no-digest", "-v", "-q"],
        ("client",): ["LOCAL_IP", "SERVER_IP", "PORT", "--output", "--wait", "--datagrams", "-v", "-q"],
        ("demo",): ["--clients", "FILE"],
    }
    for command in words if python in (OLDEST, NEWEST) else []:
        code, stderr, stdout = helpers.start_kmcast(command + ("--help",), python, program=helpers.KMCAST).finish(20)
        assert (code, stderr) == (0, "")
        for word in words[command]:
            assert word in stdout.decode("ascii")
