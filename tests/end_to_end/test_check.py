"""kmcast check: a rehearsal with real clients, which write nothing, and say whether multicast works."""

import json
import os

import helpers
from helpers import LOOPBACK
from pythons import BOTH
from test_failures import wait_until

SHORT = ["--minutes", 0.02]

#: A client that joins another group.
DEAF = ("join = kmcast.DatagramReceiver._join; kmcast.DatagramReceiver._join = "
        "lambda self, local_ip, group, *more: join(self, local_ip, '239.255.83.99', *more)")

#: One that says that it listens where nobody does.
CLOSED = ("relay = kmcast.SessionDialect.relay; kmcast.SessionDialect.relay = staticmethod("
          "lambda token, **said: relay(token, **dict(said, port=1) if 'port' in said else said))")


def start_check(clients, port, python=None, *options):
    """Start `kmcast check`; waits until it listens."""
    server = helpers.start_kmcast(["check"] + SHORT + list(options) + [LOOPBACK, clients, port], python)
    server.wait_stderr("waiting for")
    return server


@BOTH
def test_clients_of_a_rehearsal_write_nothing_and_start_no_command(python, tmp_path):
    port = helpers.free_port()
    (tmp_path / "old").write_bytes(b"as it was")
    server = start_check(3, port, python)
    clients = [helpers.start_client(list(options) + [LOOPBACK, LOOPBACK, port], python) for options in (
        ("-o", str(tmp_path / "old")), ("--pipe", "touch %s" % (tmp_path / "ran")), ())]
    for client in clients:
        code, stderr, data = client.finish()
        assert code == 0 and not data, stderr
        assert "rehearsal" in stderr
        assert client.report()["rehearsal"] is True
    code, stderr, _ = server.finish()
    assert code == 0, stderr
    assert "multicast works for 3 of 3 clients" in stderr
    assert os.listdir(str(tmp_path)) == ["old"] and (tmp_path / "old").read_bytes() == b"as it was"


@BOTH
def test_what_resume_would_go_on_with_outlives_a_rehearsal(python, tmp_path):
    port, path = helpers.free_port(), str(tmp_path / "image")
    image = helpers.random_bytes(8 << 20)
    (tmp_path / "source").write_bytes(image)
    server = helpers.start_server(["--rate", "20M", "-i", str(tmp_path / "source"), LOOPBACK, 1, port], python)
    client = helpers.start_client(["--resume", "-o", path, LOOPBACK, LOOPBACK, port], python)
    wait_until(lambda: sum(os.path.getsize(str(tmp_path / name)) for name in os.listdir(str(tmp_path))
                             if name.endswith(".journal")) > 500, "some is in the journal")
    client.stop()
    server.stop()
    left = sorted(name for name in os.listdir(str(tmp_path)) if name.startswith("."))
    before = [(tmp_path / name).read_bytes() for name in left]
    server = start_check(1, port, python)
    client = helpers.start_client(["--resume", "-o", path, LOOPBACK, LOOPBACK, port], python)
    assert client.finish()[0] == 0 and server.finish()[0] == 0
    assert left and [(tmp_path / name).read_bytes() for name in left] == before


def test_a_client_that_hears_nothing_makes_both_fail_and_say_what_to_do():
    port = helpers.free_port()
    server = start_check(2, port)
    good = helpers.start_client([LOOPBACK, LOOPBACK, port])
    deaf = helpers.start_client([LOOPBACK, LOOPBACK, port], change=DEAF)
    code, stderr, data = deaf.finish()
    assert code == 1 and not data and "the rehearsal failed: no multicast reaches it" in stderr and "querier" in stderr
    assert good.finish()[0] == 0
    code, stderr, _ = server.finish()
    assert code == 3 and "multicast works for 1 of 2 clients" in stderr and "let UDP to the group pass" in stderr, stderr


def test_nobody_who_hears_anything_is_exit_code_1():
    port = helpers.free_port()
    server = start_check(1, port)
    assert "the rehearsal failed" in helpers.start_client([LOOPBACK, LOOPBACK, port], change=DEAF).finish()[1]
    code, stderr, _ = server.finish()
    assert code == 1 and "multicast works for 0 of 1 client" in stderr


def test_a_client_that_never_comes_is_missing():
    port = helpers.free_port()
    server = start_check(2, port, None, "--start-wait", 1)
    assert helpers.start_client([LOOPBACK, LOOPBACK, port]).finish()[0] == 0
    code, stderr, _ = server.finish()
    assert code == 3 and "1 client never came" in stderr


def test_the_report_says_what_each_client_heard_and_has_room_for(tmp_path):
    port, report = helpers.free_port(), str(tmp_path / "report")
    server = start_check(1, port, None, "--report", report)
    helpers.start_client(["-o", str(tmp_path / "image"), LOOPBACK, LOOPBACK, port]).finish()
    assert server.finish()[0] == 0
    row = json.loads((tmp_path / "report").read_bytes().decode("ascii"))["hosts"][0]
    assert row["result"] == "complete" and row["wrong"] is None and row["heard"]["10M"] > 0.9
    assert row["packet"] == 9000, "the loopback interface takes them"
    assert row["room"] > 0 and row["write_speed"] > 0 and row["unwritable"] is None and row["socket_buffer"] > 0
    assert row["round_trip"] > 0 and row["datagrams"] in ("gso", "mmsg", "plain")
    assert row["reached"] is None, "there is no other client that could try"
    assert row["python"] == helpers.version_name(helpers.newest()) and row["kernel"] == os.uname()[2]


def test_what_is_no_file_is_not_tried(tmp_path):
    """A FIFO and a device get no byte."""
    port, report, fifo = helpers.free_port(), tmp_path / "report", str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    server = start_check(2, port, None, "--report", str(report))
    clients = [helpers.start_client(["-o", path, LOOPBACK, LOOPBACK, port]) for path in (fifo, "/dev/full")]
    for client in clients:
        code, stderr, _ = client.finish()
        assert code == 0 and "the output is no file" in stderr, stderr
    assert server.finish()[0] == 0
    assert os.read(reader, 1) == b""
    os.close(reader)
    for row in json.loads(report.read_bytes().decode("ascii"))["hosts"]:
        assert row["write_speed"] is None and row["wrong"] is None


def test_a_client_that_has_no_room_for_the_image_it_expects_makes_both_fail(tmp_path):
    port, report = helpers.free_port(), tmp_path / "report"
    server = start_check(2, port, None, "--report", str(report))
    good = helpers.start_client([LOOPBACK, LOOPBACK, port])
    full = helpers.start_client(["--expect-size", 1 << 62, "-o", str(tmp_path / "image"), LOOPBACK, LOOPBACK, port])
    code, stderr, _ = full.finish()
    assert code == 1 and "the image cannot be written where its -o points: there is room for" in stderr, stderr
    assert good.finish()[0] == 0
    code, stderr, _ = server.finish()
    assert code == 3 and "make room there" in stderr and "multicast works for 2 of 2 clients" in stderr, stderr
    row = json.loads(report.read_bytes().decode("ascii"))["hosts"][0]
    assert row["wrong"] == "unwritable" and "there is room for" in row["unwritable"] and row["result"] == "failed"


@BOTH
def test_each_client_is_tried_as_the_upstream_of_another(python, tmp_path):
    port, report = helpers.free_port(), tmp_path / "report"
    server = start_check(3, port, python, "--report", str(report))
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python) for _ in range(3)]
    assert [client.finish()[0] for client in clients] == [0] * 3 and server.finish()[0] == 0
    rows = json.loads(report.read_bytes().decode("ascii"))["hosts"]
    assert [row["reached"] for row in rows] == [True] * 3
    assert [row["by_chain"] for row in rows] == [0] * 3, "what is measured is multicast"


@BOTH
def test_each_way_of_receiving_tells_the_largest_packet(python, tmp_path):
    port, report, ways = helpers.free_port(), tmp_path / "report", ["gso", "mmsg", "plain"]
    server = start_check(3, port, python, "--report", str(report), "--mtu", 1000)
    clients = [helpers.start_client(["--datagrams", way, LOOPBACK, LOOPBACK, port], python) for way in ways]
    assert [client.finish()[0] for client in clients] == [0] * 3 and server.finish()[0] == 0
    rows = json.loads(report.read_bytes().decode("ascii"))["hosts"]
    assert sorted(row["datagrams"] for row in rows) == ways
    assert [row["packet"] for row in rows] == [9000] * 3


def test_who_cannot_be_connected_to_is_named_and_it_is_no_reason_to_fail(tmp_path):
    port, report = helpers.free_port(), tmp_path / "report"
    server = start_check(3, port, None, "--report", str(report))
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], change=change) for change in (None, CLOSED, None)]
    assert [client.finish()[0] for client in clients] == [0] * 3
    code, stderr, _ = server.finish()
    assert code == 0 and "another client cannot connect to it" in stderr and "let TCP" in stderr, stderr
    rows = json.loads(report.read_bytes().decode("ascii"))["hosts"]
    assert sorted(row["reached"] for row in rows) == [False, True, True]
    assert [row["findings"] for row in rows if not row["reached"]] == [["unreachable"]]


def test_a_small_receive_buffer_is_said_and_is_no_reason_to_fail():
    port = helpers.free_port()
    server = start_check(1, port)
    code, stderr, _ = helpers.start_client([LOOPBACK, LOOPBACK, port], change="kmcast.SOCKET_BUFFER = 1 << 20").finish()
    assert code == 0 and "net.core.rmem_max" in stderr, stderr
    code, stderr, _ = server.finish()
    assert code == 0 and "warning: " in stderr and "its receive buffer is small" in stderr, stderr


def test_wrong_minutes_are_wrong_usage():
    for minutes in ("0", "-1", "x"):
        code, stderr, _ = helpers.start_kmcast(["check", "--minutes=" + minutes, LOOPBACK, 1]).finish()
        assert code == 2 and "number of minutes" in stderr
