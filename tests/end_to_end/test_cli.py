"""The command line: what is wrong with it gets one line and the right exit code, whatever the interpreter."""

import os
import pty
import re
import shutil
import socket
import subprocess

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, EVERY, in_turn, NEWEST, OLDEST

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
    got, stderr, stdout = process.finish(20)
    assert got == code, stderr
    assert stdout in (b"", None)
    assert stderr.endswith("\n") and stderr.count("\n") == 1, repr(stderr)
    assert stderr.startswith("kmcast") and "Errno" not in stderr, stderr
    return stderr


@in_turn("args", WRONG, ids=[" ".join(args).encode("unicode_escape").decode("ascii") or "nothing" for args in WRONG])
def test_a_wrong_argument_gets_one_line_and_exit_code_2(args, python):
    the_one_line(helpers.start_kmcast(args, python, env={"LC_ALL": "C.UTF-8"}))


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
        (): ["server", "client", "demo", "report", "completion", "--version"],
        ("server",): ["LOCAL_IP", "CLIENTS", "PORT", "--group", "--ttl", "--mtu", "--rate", "--unicast", "--datagrams",
                      "--buffer-packets", "--clients-per-thread", "--compat", "--input", "--name", "--no-digest", "-v", "-q"],
        ("client",): ["LOCAL_IP", "SERVER_IP", "PORT", "--output", "--wait", "--datagrams", "-v", "-q"],
        ("demo",): ["--clients", "FILE"],
        ("completion",): ["bash"],
        ("report",): ["FILE"],
    }
    for command in words if python in (OLDEST, NEWEST) else []:
        code, stderr, stdout = helpers.start_kmcast(command + ("--help",), python).finish(20)
        assert (code, stderr) == (0, "")
        for word in words[command]:
            assert word in stdout.decode("ascii")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@in_turn("args, said", [
    (CLIENT + ["--compat"], "kmcast client: error: --compat is an option of server, not of client"),
    (CLIENT + ["--size", "5"], "--size is an option of server"), (SERVER + ["--wait=5"], "--wait is an option of client"),
    (SERVER + ["-o", "x"], "-o is an option of client"), (["demo", "--rate", "5M"], "--rate is an option of server, not of demo"),
    (["client", "--clients", "3"], "--clients is an option of demo"),
    (["key", "-v"], "-v is an option of check, client, demo and server, not of key"),
    (["-v"], "-v is an option of check, client, demo and server, and stands behind that word"),
    (SERVER + ["--stal-timeout", "3"], "no option --stal-timeout; did you mean --stall-timeout?"),
    (SERVER + ["--wiat", "3"], "no option --wiat; did you mean --wait, of client?"),
    (CLIENT + ["--expect-nmae=x"], "did you mean --expect-name?"), (SERVER + ["--zzzz"], "no option --zzzz ("),
    (SERVER + ["-x"], "no option -x ("), (["sever", LOOPBACK, "1"], "no command sever; did you mean server?"),
    (["--rate", "5M", "server", LOOPBACK, "1"], "--rate is an option of server, and stands behind that word"),
    (["completion", "zsh"], "zsh")])
def test_an_option_of_the_other_command_and_a_misspelt_one_are_named_as_such(python, args, said):
    line = the_one_line(helpers.start_kmcast(args, python))
    assert said in line, line


@BOTH
def test_an_option_may_be_shortened_and_a_value_may_look_like_one(python):
    port = helpers.free_port()
    server = helpers.start_server(["--pip", "echo  --zzzz -x", "--nam=-x --zzzz", LOOPBACK, 1, port], python)
    client = helpers.start_client(["-o-", "--stal=9", LOOPBACK, LOOPBACK, port], python)
    assert client.finish(20)[::2] == (0, b"--zzzz -x\n")
    assert server.finish(20)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# KMCAST_OPTIONS

@BOTH
def test_options_can_come_from_the_environment(python, tmp_path):
    """Both ends can be given the same: each takes what is its own."""
    env = {"KMCAST_OPTIONS": "-q --minutes 7 --name 'an image' --wait=20 -o '%s' --expect-name 'an *' --rate 50M" % (tmp_path / "copy")}
    port = helpers.free_port()
    server = helpers.start_server(["--log", tmp_path / "log", LOOPBACK, 1, port], python, env=env, stdin=b"data")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python, env=env)
    assert client.finish(20) == (0, "", b"") and (tmp_path / "copy").read_bytes() == b"data"
    assert server.finish(20)[:2] == (0, "")


@BOTH
def test_the_command_line_wins_over_the_environment(python, tmp_path):
    env = {"KMCAST_OPTIONS": "-q -o %s --expect-size 5 -i /nonexistent --name another" % (tmp_path / "never")}
    port = helpers.free_port()
    server = helpers.start_server(["-v", "--pipe", "echo data", LOOPBACK, 1, port], python, env=env)
    client = helpers.start_client(["--expect-size", 5, "--pipe", "cat > %s" % (tmp_path / "copy"), LOOPBACK, LOOPBACK, port],
                                  python, env=env)
    assert client.finish(20)[0] == 0 and os.listdir(str(tmp_path)) == ["copy"]
    code, stderr, _ = server.finish(20)
    assert code == 0 and "bytes a packet" in stderr, stderr


@in_turn("text, said", [
    ("--rate x", "x is not a rate"), ("--zzzz", "no option --zzzz"), ("auto 40", "auto is no option"), ("-v auto", "auto is no option"),
    ("--rate 5M 40", "40 is no option"), ("-v '", "quotation"), ("--size", "--size")])
def test_what_is_wrong_with_the_environment_is_said_to_be_there(python, text, said):
    line = the_one_line(helpers.start_kmcast(SERVER, python, env={"KMCAST_OPTIONS": text}))
    assert line.startswith("kmcast server: error: KMCAST_OPTIONS: ") and said in line, line


@BOTH
def test_the_demo_takes_nothing_from_the_environment(python, tmp_path):
    (tmp_path / "image").write_bytes(b"data")
    env = {"KMCAST_OPTIONS": "--zzzz -o %s" % (tmp_path / "copy"), "KMCAST_KEY_FILE": ""}
    code, stderr, _ = helpers.start_kmcast(["demo", "--clients", "1", tmp_path / "image"], python, env=env,
                                           program=helpers.KMCAST).finish(30)
    assert code == 0 and os.listdir(str(tmp_path)) == ["image"], stderr


# ---------------------------------------------------------------------------------------------------------------------
# Completion

@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A function: the words of a command line, the last one to be completed -> what bash offers."""
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    directory = tmp_path_factory.mktemp("completion")
    (directory / "a file").write_text("")
    script = subprocess.check_output([NEWEST, helpers.KMCAST, "completion", "bash"])
    assert subprocess.check_output([OLDEST, helpers.KMCAST, "completion", "bash"]) == script
    (directory / "script").write_bytes(script)

    def offered(*words):
        ask = ('set -u; . ./script; complete -p kmcast > /dev/null; COMP_WORDS=("$@"); '
               'COMP_CWORD=$(($# - 1)); _kmcast; for word in "${COMPREPLY[@]:-}"; do printf "%s\\n" "$word"; done')
        return subprocess.check_output(["bash", "-c", ask, "bash", "kmcast"] + list(words),
                                       cwd=str(directory)).decode("ascii").split("\n")[:-1]
    return offered


def test_bash_completes_commands_options_and_their_values(complete):
    assert complete("s") == ["server"] and "client" in complete("")
    assert complete("server", "--st") == ["--stall-timeout", "--start-wait"]
    assert complete("client", "--st") == ["--stall-timeout"]
    assert complete("server", "--chain", "a") == ["auto", "always"]
    assert complete("server", "--chain", "auto", "--datagrams", "m") == ["mmsg"]
    assert complete("server", "--rate", "") == [""]
    assert complete("server", "--rate", "5M", "l") == ["lo"]
    assert all(set(complete(command, "")) >= {"auto", "lo"} for command in ("server", "client", "check"))
    assert complete("client", "auto", "") == [""]
    assert complete("completion", "") == ["bash"]


def test_bash_completes_files_where_there_is_to_be_one(complete):
    for words in (["server", "-i"], ["server", "--hosts"], ["client", "-o"], ["client", "-q", "--report"], ["demo"],
                  ["report"], ["report", "script"]):
        assert "script" in complete(*(words + [""])), words
    assert "script" not in complete("server", "")
