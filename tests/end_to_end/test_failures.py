"""What goes wrong: whoever fails is dropped and says why, the others go on, and no exit code lies."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import threading
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK, payload_size
from hostile import wrapped
from pythons import BOTH, in_turn, NEWEST, OLDEST

PAYLOAD = payload_size(1500)
SMALL = ["--buffer-packets", 10]
ROUNDS = 5 * 10 * PAYLOAD       # bytes: more rounds of SMALL than a client keeps unwritten


def wait_until(condition, what, timeout=30):
    """Wait until `condition()` holds."""
    deadline = time.time() + timeout
    while not condition():
        assert time.time() < deadline, "waited in vain until " + what
        time.sleep(0.005)


class Consumer(object):
    """Counts what a client writes, for `stdout=`; with `stop_after`, takes no more than about so many bytes."""

    def __init__(self, stop_after=None):
        self.data = b""
        self._stop_after = stop_after
        self.go_on = threading.Event()

    def __call__(self, chunk):
        self.data += chunk
        if self._stop_after is not None and len(self.data) >= self._stop_after:
            self.go_on.wait(60)


class Started(object):
    """A server whose producer is the test, and clients that have received the first rounds of the image.

    `.server`, `.clients`; `.data` is the image, of which `.rest` is yet to be written.
    """

    def __init__(self, clients=3, server_args=(), client_args=(), python=None, stdout=None):
        self.port = helpers.free_port()
        self.data = helpers.random_bytes(2 * ROUNDS, seed=5)
        self.rest = self.data[ROUNDS:]
        consumers = [Consumer() for _ in range(clients)]
        self.server = helpers.start_server(SMALL + list(server_args) + [LOOPBACK, clients, self.port], python=python,
                                           stdin=helpers.PIPE)
        self.clients = [helpers.start_client(
            list(client_args(number) if callable(client_args) else client_args) + [LOOPBACK, LOOPBACK, self.port],
            python=python, stdout=stdout or consumers[number]) for number in range(clients)]
        self.consumers = consumers
        self.write(self.data[:ROUNDS])
        if not stdout and not client_args:
            wait_until(lambda: all(len(consumer.data) >= ROUNDS for consumer in consumers), "all have the first rounds")

    def write(self, data):
        """Write a part of the image."""
        while data:
            data = data[os.write(self.server.popen.stdin.fileno(), data):]

    def write_rest(self):
        """Write the rest of the image, and end it."""
        try:
            self.write(self.rest)
        except BrokenPipeError:
            pass
        self.server.popen.stdin.close()


def none_left(processes):
    """Fail if one of the ended processes left a child behind."""
    assert not [process for process in processes if helpers.leftovers(process)]


# ---------------------------------------------------------------------------------------------------------------------
# Clients that die

@BOTH
def test_a_client_killed_before_the_start_leaves_its_place_to_another(python):
    data, port = helpers.random_bytes(50000), helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=data)
    victim = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    server.wait_stderr("is here")
    victim.stop()
    server.wait_stderr("went away")
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for _ in range(2)]
    for client in clients:
        code, stderr, received = client.finish(30)
        assert code == 0 and received == data, stderr
    assert server.finish(10)[0] == 0


@pytest.mark.parametrize("victim", range(4))
def test_a_killed_client_does_not_stall_the_others(victim):
    """In whichever of the TCP threads it was, and even if it was the only one there."""
    session = Started(4, ["--clients-per-thread", 2] if victim % 2 else ["--clients-per-thread", 1])
    session.clients[victim].stop()
    session.write_rest()
    code, stderr, _ = session.server.finish(30)
    assert code == 3, stderr
    assert helpers.summary(session.server).served == 3
    assert stderr.count("does not have the image") == 1
    for number, client in enumerate(session.clients):
        if number != victim:
            assert client.finish(10)[0] == 0
            assert session.consumers[number].data == session.data


@BOTH
def test_a_client_killed_while_it_receives_does_not_stall_the_others(python):
    data, port = helpers.random_bytes(8000000), helpers.free_port()
    victim_has_some = threading.Event()
    server = helpers.start_server(["--rate", "100M", LOOPBACK, 3, port], python=python, stdin=data)
    victim = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=lambda chunk: victim_has_some.set())
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port], python=python) for _ in range(2)]
    assert victim_has_some.wait(30)
    victim.stop()
    for client in clients:
        code, stderr, received = client.finish(60)
        assert code == 0 and received == data, stderr
    code, stderr, _ = server.finish(30)
    assert code == 3, stderr
    assert helpers.summary(server).served == 2


@BOTH
def test_a_client_whose_output_does_not_take_the_end_is_not_served(python):
    """Everything was received, but a killed client has not said that it wrote it."""
    data, port = helpers.random_bytes(300000), helpers.free_port()      # more than a pipe holds
    slow = Consumer(stop_after=1)
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=data)
    victim = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python, stdout=slow)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, received = client.finish(30)
    assert code == 0 and received == data, stderr
    victim.stop()
    slow.go_on.set()
    code, stderr, _ = server.finish(30)
    assert code == 3, stderr
    assert helpers.summary(server).served == 1


@in_turn("a_thread", [1, 64])
def test_a_server_without_clients_stops_at_once(python, a_thread):
    """Though its producer goes on."""
    session = Started(3, ["--clients-per-thread", a_thread], python=python)
    for client in session.clients:
        client.stop()
    code, stderr, _ = session.server.finish(10)
    assert code == 1, stderr
    assert "no client is left" in stderr and "Traceback" not in stderr
    assert stderr.count("does not have the image") == 3
    assert helpers.summary(session.server).served == 0


def test_a_hung_client_is_given_up_after_the_stall_timeout():
    session = Started(3, ["--stall-timeout", 3], python=OLDEST)
    session.clients[1].signal(signal.SIGSTOP)
    session.write_rest()
    code, stderr, _ = session.server.finish(30)
    assert code == 3, stderr
    assert helpers.summary(session.server).served == 2 and "stalled" in stderr
    assert [session.clients[number].finish(10)[0] for number in (0, 2)] == [0, 0]
    session.clients[1].signal(signal.SIGCONT)
    assert session.clients[1].finish(10)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# A server that dies

@BOTH
def test_clients_of_a_killed_server_fail_and_leave_no_file(python, tmp_path):
    session = Started(3, python=python, client_args=lambda number: ["-o", tmp_path / str(number)])
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == 3 * [ROUNDS], "all have the first rounds")
    session.server.stop()
    for client in session.clients:
        code, stderr, _ = client.finish(10)
        assert code == 1, stderr
        assert "Traceback" not in stderr
        assert len([line for line in stderr.splitlines() if "error" in line]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_client_whose_server_dies_while_it_waits_for_its_consumer_fails():
    port, slow = helpers.free_port(), Consumer(stop_after=1)
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], stdin=helpers.random_chunks(2000000))
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=slow)
    wait_until(lambda: slow.data, "the first bytes have come")
    time.sleep(0.3)                         # until everything between producer and consumer is full
    server.stop()
    assert client.wait(10) == 1, client.stderr


@BOTH
def test_a_server_killed_before_the_image_has_begun_is_one_that_never_started(python, tmp_path):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], python=python)
    client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    server.wait_stderr("is here")
    server.stop()
    code, stderr, _ = client.finish(10)
    assert code == 3, stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The ends

@BOTH
def test_a_consumer_that_ends_fails_its_client_and_the_server_is_told_why(python):
    session = Started(2, python=python, stdout=helpers.PIPE)
    others = threading.Thread(target=session.clients[1].popen.stdout.read)
    others.start()
    session.clients[0].popen.stdout.close()
    session.write_rest()
    code, stderr, _ = session.clients[0].finish(10)
    assert code == 1 and "reads the image has ended" in stderr, stderr
    code, stderr, _ = session.server.finish(30)
    assert code == 3 and "reads the image has ended" in stderr, stderr
    assert session.clients[1].finish(10)[0] == 0
    others.join(10)


@in_turn("size, way", [(100, "-o"), (ROUNDS, ">")])
def test_a_full_disk_fails_its_client_and_the_server_is_told_why(python, size, way):
    data, port = helpers.random_bytes(size), helpers.free_port()
    server = helpers.start_server(SMALL + [LOOPBACK, 2, port], python=python, stdin=data)
    with open("/dev/full", "wb") as full:
        options = (["-o", "/dev/full"], helpers.KEEP) if way == "-o" else ([], full)
        failing = helpers.start_client(options[0] + [LOOPBACK, LOOPBACK, port], python=python, stdout=options[1])
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = failing.finish(10)
    assert code == 1 and "No space left on device" in stderr, stderr
    code, stderr, received = client.finish(10)
    assert code == 0 and received == data, stderr
    code, stderr, _ = server.finish(10)
    assert code == 3 and "No space left on device" in stderr, stderr


@BOTH
def test_a_producers_read_error_fails_everyone_and_the_clients_are_told_why(python, tmp_path):
    """Standard input is a TCP connection that is reset in the middle, as from nc."""
    port = helpers.free_port()
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(1)
        source = socket.create_connection(listener.getsockname())
        producer, _ = listener.accept()
    server = helpers.start_server(SMALL + [LOOPBACK, 2, port], python=python, stdin=source)
    source.close()
    clients = [helpers.start_client(["-o", tmp_path / str(number), LOOPBACK, LOOPBACK, port], python=python)
               for number in range(2)]
    producer.sendall(helpers.random_bytes(ROUNDS))
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == [ROUNDS, ROUNDS], "all have some")
    producer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    producer.close()
    for client in clients:
        code, stderr, _ = client.finish(10)
        assert code == 1 and "cannot read the image" in stderr and "reset" in stderr, stderr
    code, stderr, _ = server.finish(10)
    assert code == 1 and "cannot read the image" in stderr, stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Signals

SIGNALS = pytest.mark.parametrize("name, python", sorted({
    ("SIGINT", OLDEST), ("SIGINT", NEWEST), ("SIGTERM", OLDEST), ("SIGTERM", NEWEST), ("SIGHUP", NEWEST)}),
    ids=lambda value: value if value.startswith("SIG") else helpers.version_name(value))


@SIGNALS
def test_a_server_that_is_stopped_tells_its_clients(python, name, tmp_path):
    session = Started(3, ["--clients-per-thread", 2], python=python,
                      client_args=lambda number: ["-o", tmp_path / str(number)])
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == 3 * [ROUNDS], "all have the first rounds")
    session.server.signal(getattr(signal, name))
    code, stderr, _ = session.server.finish(10)
    assert code == 1 and "stopped by " + name in stderr and "Traceback" not in stderr, stderr
    for client in session.clients:
        code, stderr, _ = client.finish(10)
        assert code == 1 and "stopped by " + name in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    none_left([session.server] + session.clients)


@SIGNALS
def test_a_client_that_is_stopped_tells_the_server(python, name, tmp_path):
    session = Started(2, python=python, client_args=lambda number: ["-o", tmp_path / str(number)])
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == 2 * [ROUNDS], "all have the first rounds")
    session.clients[0].signal(getattr(signal, name))
    code, stderr, _ = session.clients[0].finish(10)
    assert code == 1 and "stopped by " + name in stderr and "Traceback" not in stderr, stderr
    session.write_rest()
    code, stderr, _ = session.server.finish(10)
    assert code == 3 and "stopped by " + name in stderr, stderr
    assert session.clients[1].finish(10)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    none_left([session.server] + session.clients)


@BOTH
def test_a_server_that_is_stopped_while_it_waits_for_clients_tells_those_that_are_here(python, tmp_path):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=helpers.PIPE)
    client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    server.wait_stderr("is here")
    server.signal(signal.SIGTERM)
    assert server.finish(10)[0] == 1
    code, stderr, _ = client.finish(10)
    assert code == 3 and "stopped by SIGTERM" in stderr, stderr
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_server_that_is_stopped_while_a_consumer_stalls_tells_its_client(python):
    port, slow = helpers.free_port(), Consumer(stop_after=1)
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], python=python, stdin=helpers.random_chunks(2000000))
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python, stdout=slow)
    wait_until(lambda: slow.data, "the first bytes have come")
    time.sleep(0.5)                         # until everything between producer and consumer is full
    server.signal(signal.SIGTERM)
    assert server.finish(10)[0] == 1
    assert client.wait(10) == 1
    assert "stopped by SIGTERM" in client.stderr


@in_turn("name", ["SIGINT", "SIGTERM"])
def test_a_client_is_stopped_while_its_consumer_stalls(python, name):
    port, slow = helpers.free_port(), Consumer(stop_after=1)
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], python=python, stdin=helpers.random_chunks(2000000))
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python, stdout=slow)
    wait_until(lambda: slow.data, "the first bytes have come")
    time.sleep(0.3)
    client.signal(getattr(signal, name))
    assert client.wait(10) == 1
    code, stderr, _ = server.finish(10)
    assert code == 1 and "stopped by " + name in stderr, stderr


@in_turn("name", ["SIGINT", "SIGTERM"])
def test_a_client_is_stopped_while_it_looks_for_its_server(python, name, tmp_path):
    client = helpers.start_client(["-v", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, helpers.free_port()], python=python)
    client.wait_stderr("connecting")
    client.signal(getattr(signal, name))
    code, stderr, _ = client.finish(10)
    assert code == 3 and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []


@in_turn("names", ["SIGINT SIGINT", "SIGTERM SIGTERM", "SIGHUP SIGTERM"])
def test_a_signal_that_comes_twice_is_one(python, names, tmp_path):
    """timeout(1) signals its command and its command's group; a terminal that closes, and who closes it, do the same."""
    session = Started(1, python=python, client_args=lambda number: ["-o", tmp_path / str(number)])
    client = session.clients[0]
    wait_until(lambda: [path.stat().st_size for path in tmp_path.iterdir()] == [ROUNDS], "it has the first rounds")
    for name in names.split():
        client.signal(getattr(signal, name))
    code, stderr, _ = client.finish(10)
    assert code == 1 and re.search("stopped by SIG(INT|TERM|HUP)", stderr), stderr
    code, stderr, _ = session.server.finish(10)
    assert code == 1 and "it says: stopped by" in stderr, stderr
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_signal_after_the_end_changes_nothing(python):
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGTERM)"
    code, stderr, _ = wrapped(late, ["client", "--wait", 0, LOOPBACK, LOOPBACK, helpers.free_port()], python).finish(10)
    assert code == 3 and stderr.count("\n") == 1, stderr


@BOTH
def test_a_second_signal_after_a_while_ends_a_program_that_hangs(python):
    stuck = "import time; kmcast.Multicaster._verdict = lambda *args: time.sleep(100)"
    server = wrapped(stuck, ["server", LOOPBACK, 1, helpers.free_port()], python, stdin=b"data")
    server.wait_stderr("waiting")
    server.signal(signal.SIGTERM)
    time.sleep(1.5)
    server.signal(signal.SIGTERM)
    assert server.wait(10) == -signal.SIGTERM


@BOTH
def test_a_signal_that_is_ignored_stays_ignored(python):
    """As nohup(1) has it."""
    port = helpers.free_port()
    deaf = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    server = helpers.start_server([LOOPBACK, 1, port], python, stdin=b"data", prefix=deaf)
    server.wait_stderr("waiting")
    server.signal(signal.SIGHUP)
    assert helpers.start_client([LOOPBACK, LOOPBACK, port], python).finish(10)[::2] == (0, b"data")
    assert server.finish(10)[0] == 0


@pytest.mark.parametrize("name, python", [("SIGTERM", OLDEST), ("SIGTERM", NEWEST), ("SIGKILL", NEWEST)],
                         ids=lambda value: value if value.startswith("SIG") else helpers.version_name(value))
def test_a_demo_that_is_stopped_leaves_no_process(python, name):
    """Be it that it has started only some of them: a server that waits for more would wait for ever."""
    for seconds in (0.1, 0.3):
        demo = helpers.start_kmcast(["demo", "--clients", 8], python)
        time.sleep(seconds)
        demo.signal(getattr(signal, name))
        demo.wait(10)
        wait_until(lambda: not helpers.leftovers(demo), "no process is left")


# ---------------------------------------------------------------------------------------------------------------------
# What never starts

@BOTH
def test_a_port_on_which_nobody_speaks_is_not_waited_for(python):
    with contextlib.closing(socket.socket()) as silent:
        silent.bind((LOOPBACK, 0))
        silent.listen(5)
        client = helpers.start_client(["--wait", 0, LOOPBACK, LOOPBACK, silent.getsockname()[1]], python=python)
        code, stderr, _ = client.finish(15)
    assert code == 3 and "no kmcast server" in stderr and "silent" in stderr, stderr


@BOTH
def test_a_command_is_not_started_without_a_server(python, tmp_path):
    """Exit code 3 promises that nothing was written."""
    (tmp_path / "target").write_bytes(b"old")
    client = helpers.start_client(["--wait", 0, "--pipe", "cat > '%s'" % (tmp_path / "target"), LOOPBACK, LOOPBACK,
                                   helpers.free_port()], python=python)
    assert client.finish(10)[0] == 3
    assert (tmp_path / "target").read_bytes() == b"old"


@BOTH
def test_a_client_too_many_is_told_so_and_has_written_nothing(python, tmp_path):
    session = Started(2, ["--clients-per-thread", 1], python=python)
    late = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, session.port], python=python)
    code, stderr, _ = late.finish(10)
    assert code == 3 and "has begun" in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    session.write_rest()
    assert session.server.finish(10)[0] == 3
    for client, consumer in zip(session.clients, session.consumers):
        assert client.finish(10)[0] == 0
        assert consumer.data == session.data


@BOTH
def test_no_server(python, tmp_path):
    client = helpers.start_client(["--wait", 0, "-o", tmp_path / "image", LOOPBACK, LOOPBACK, helpers.free_port()],
                                  python=python)
    code, stderr, _ = client.finish(10)
    assert code == 3 and "no kmcast server" in stderr and "refused" in stderr, stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_host_name_that_does_not_exist():
    code, stderr, _ = helpers.start_client(["--wait", 0, LOOPBACK, "no-such-host.invalid", 20000]).finish(30)
    assert code == 3 and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# Bytes that change on the way, which no TCP checksum found

class Spot(object):
    """For Network.path(): does something to one byte from the server.

    known   bytes that are looked for: what the server says and when it says it differs, so no place can be counted
    offset  of the byte, from the beginning of those
    """

    def __init__(self, known, offset=0):
        self._known, self._offset = known, offset
        self._came = b""
        self._place = None

    def __call__(self, data, offset):
        if self._place is None:
            self._came += data
            found = self._came.find(self._known)
            if found < 0:
                return data
            self._place = found + self._offset
            assert self._place >= offset, "the byte has passed"
        at = self._place - offset
        return self.change(data, at) if 0 <= at < len(data) else data


class Flip(Spot):
    """Flips a bit."""

    @staticmethod
    def change(data, at):
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


class End(Spot):
    """Ends the connection before the byte."""

    @staticmethod
    def change(data, at):
        raise helpers.Cut(data[:at])


BUFFER = 10 * PAYLOAD
HEADER, INFO, NUMBER, DIGEST = wire.HEADER.size, len(wire.SESSION.info(wire.Round(0, 0, 0, 0, 0))), 5, 32


def sent(data, number=0):
    """SENT for the round of that number, as the server says it."""
    return wire.SESSION.sent(wire.Round(number, 0, 0, 0, 0), hashlib.sha256(data[:(number + 1) * BUFFER]).digest())


@in_turn("packets, server_args, known, offsets, written", [
    # the first byte and the last
    (20, [], sent, [NUMBER, NUMBER + DIGEST - 1], 0),
    (20, [], lambda data: sent(data, 1), [NUMBER, NUMBER + DIGEST - 1], BUFFER),
    # payload, seq, checksum, size
    (10, ["--unicast", "--chain", "never", "--no-digest"], lambda data: data[:100], [700, -HEADER, 4 - HEADER, 8 - HEADER], 0),
], ids=["digest of the first round", "digest of the second round", "repaired packets without digests"])
def test_what_was_damaged_is_not_written(python, packets, server_args, known, offsets, written, tmp_path):
    data, port = helpers.random_bytes(packets * PAYLOAD), helpers.free_port()
    server = helpers.start_server(SMALL + server_args + [LOOPBACK, len(offsets) + 1, port], python=python, stdin=data)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    failing = [helpers.start_client([LOOPBACK, LOOPBACK, network.path(tcp=Flip(known(data), offset))], python=python)
               for offset in offsets]
    good = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    for offset, client in zip(offsets, failing):
        code, stderr, received = client.finish(20)
        assert code == 1, (offset, stderr)
        assert received == data[:written], offset
    code, stderr, _ = good.finish(20)
    assert code == 0, stderr
    assert (tmp_path / "image").read_bytes() == data
    code, stderr, _ = server.finish(20)
    assert code == 3 and helpers.summary(server).served == 1, stderr
    assert stderr.count("warning: ") >= len(offsets) and "it says" in stderr, stderr


@BOTH
def test_what_was_damaged_by_tcp_is_asked_for_again_where_a_digest_tells(python):
    """The first byte of a round's packets, one among them, the last."""
    offsets = [0, 700, BUFFER - 1]
    data, port = helpers.random_bytes(BUFFER), helpers.free_port()
    server = helpers.start_server(SMALL + ["--unicast", "--chain", "never", LOOPBACK, len(offsets), port],
                                  python=python, stdin=data)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, network.path(tcp=Flip(data[:100], offset))], python=python)
               for offset in offsets]
    for offset, client in zip(offsets, clients):
        code, stderr, received = client.finish(20)
        assert (code, received) == (0, data), (offset, stderr)
        assert helpers.repaired(client)[1] == 11, stderr
    code, stderr, _ = server.finish(20)
    assert code == 0 and helpers.summary(server).served == len(offsets), stderr


def test_a_digest_of_the_image_that_differs_fails_and_leaves_no_file(tmp_path):
    """The last BYE is damaged, after every round was verified: in the digits of `bytes` or of `sha256`."""
    data, port = helpers.random_bytes(100), helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], stdin=data)
    network = helpers.Network(port)

    def change(old, new):
        return lambda received, offset: received.replace(old, new)
    digest = helpers.sha256(data).encode("ascii")
    clients = [helpers.start_client(["-o", tmp_path / name, LOOPBACK, LOOPBACK, network.path(tcp=change(old, new))])
               for name, old, new in (("digest", digest, digest[::-1]), ("size", b'"bytes": 100', b'"bytes": 101'))]
    for client in clients:
        code, stderr, _ = client.finish(20)
        assert code == 1, stderr
    assert list(tmp_path.iterdir()) == []
    code, stderr, _ = server.finish(20)
    assert code == 1 and helpers.summary(server).served == 0 and "it says" in stderr, stderr


HUNDRED = helpers.random_bytes(100)


@pytest.mark.parametrize("known, offset, code", [
    (b'"version"', 0, 3),                                               # in WELCOME
    (wire.SESSION.info(wire.Round.of(HUNDRED, PAYLOAD)), 0, 3),
    (wire.SESSION.info(wire.Round.of(HUNDRED, PAYLOAD)), INFO - 3, 3),
    (wire.SESSION.info(wire.Round.of(HUNDRED, PAYLOAD)), INFO, 1),
    (sent(HUNDRED), NUMBER, 1),
    (sent(HUNDRED), NUMBER + DIGEST, 1),
    (helpers.sha256(HUNDRED).encode("ascii"), 0, 1),                    # in BYE
    (helpers.sha256(HUNDRED).encode("ascii"), 63, 1),
], ids=["WELCOME", "before INFO", "INFO", "behind INFO", "SENT", "behind SENT", "BYE", "end of BYE"])
def test_a_connection_that_ends_early_is_no_image(known, offset, code, tmp_path):
    """Wherever it ends; and it ends in order, so that a client could take it for the image's end."""
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], stdin=HUNDRED)
    server.wait_stderr("waiting")
    client = helpers.start_client(["--wait", 0, "-o", tmp_path / "image", LOOPBACK, LOOPBACK,
                                   helpers.Network(port).path(tcp=End(known, offset))])
    got, stderr, _ = client.finish(20)
    assert got == code and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    if code == 1:
        assert server.finish(20)[0] == 1


@pytest.mark.parametrize("size", [0, 10, 16])
def test_a_server_that_says_too_little_is_none(size, tmp_path):
    """It accepts, sends a part of the group info and closes, as one that is just being stopped."""
    info = wire.group_info(helpers.GROUP, 18383)
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(8)
        client = helpers.start_client(["--wait", 0, "-o", tmp_path / "image", LOOPBACK, LOOPBACK,
                                       listener.getsockname()[1]])
        connection, _ = listener.accept()
        connection.sendall(info[:size])
        connection.shutdown(socket.SHUT_WR)
        code, stderr, _ = client.finish(20)
        connection.close()
    assert code == 3 and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []
