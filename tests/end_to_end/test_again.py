"""Real servers and clients that break off in the middle, and go on."""

import glob
import os
import signal
import time

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH

SIZE = 6000000
IMAGE = helpers.random_bytes(SIZE, seed=14)


class Transfer(object):
    """A server with a file, at a rate that leaves time to break something in the middle."""

    RATE = "24M"

    def __init__(self, folder, python):
        self.folder, self.python, self.port = folder, python, helpers.free_port()
        self.source = str(folder / "source")
        with open(self.source, "wb") as file:
            file.write(IMAGE)
        self.clients = []

    def serve(self, places, *args):
        """Start the server."""
        self.server = helpers.start_server(
            ["--rate", self.RATE, "--buffer-packets", 100, "-i", self.source] + list(args) + [LOOPBACK, places, self.port],
            self.python)

    def client(self, name, *args):
        """Start a client that writes a file of that name."""
        return helpers.start_client(list(args) + ["-o", str(self.folder / name), LOOPBACK, LOOPBACK, self.port], self.python)

    def stream(self):
        """Start a client that writes to a pipe."""
        return helpers.start_client([LOOPBACK, LOOPBACK, self.port], self.python)

    def wait_for(self, name, size):
        """Wait until a client has written so many bytes."""
        deadline = time.time() + 30
        while not [path for path in glob.glob(str(self.folder / (".%s.*.part" % name))) if os.path.getsize(path) >= size]:
            assert time.time() < deadline
            time.sleep(0.01)

    def check(self, name, client):
        """The client has ended well, and left the image and nothing else."""
        code, stderr, _ = client.finish(60)
        assert code == 0, stderr
        with open(str(self.folder / name), "rb") as file:
            equal = file.read() == IMAGE
        assert equal and glob.glob(str(self.folder / (".%s.*" % name))) == [], stderr
        return client.report()

    def check_server(self, most):
        """The server has ended well, and has sent so many bytes at the most."""
        code, stderr, _ = self.server.finish(60)
        assert code == 0, stderr
        carried = self.server.report()["carried"]
        assert carried["multicast"] + carried["tcp"] <= most, stderr


@pytest.fixture
def transfer(tmp_path, python):
    return Transfer(tmp_path, python)


@BOTH
def test_a_client_that_was_killed_and_is_started_again_gets_the_rest_alone(transfer, python):
    transfer.serve(2, "--linger", 60)
    other, victim = transfer.client("other"), transfer.client("victim", "--resume")
    transfer.wait_for("victim", SIZE // 3)
    victim.stop()
    again = transfer.client("victim", "--resume")
    report = transfer.check("victim", again)
    # The journal may be a round behind what is written.
    assert report["resumed"] >= SIZE // 4 and report["verified"]["bytes"] >= report["resumed"]
    transfer.check("other", other)


@BOTH
def test_a_server_that_was_killed_and_is_started_again_does_not_begin_again(transfer, python):
    transfer.serve(3)
    one, two, pipe = transfer.client("one"), transfer.client("two", "--resume"), transfer.stream()
    transfer.wait_for("two", SIZE // 2)
    transfer.server.stop()
    transfer.serve(3)
    transfer.check("one", one)
    transfer.check("two", two)
    code, stderr, data = pipe.finish(60)
    equal = data == IMAGE
    assert code == 0 and equal and "going on with" in stderr, stderr
    transfer.check_server(most=SIZE * 8 // 10)        # what was on its way may be a tenth


@BOTH
def test_both_can_be_killed(transfer, python):
    transfer.serve(1)
    first = transfer.client("image", "--resume")
    transfer.wait_for("image", SIZE // 2)
    transfer.server.stop()
    first.stop()
    transfer.serve(1)
    assert transfer.check("image", transfer.client("image", "--resume"))["resumed"] >= SIZE // 3
    transfer.check_server(most=SIZE * 8 // 10)        # what was on its way may be a tenth


@BOTH
def test_a_client_that_hung_and_was_dropped_comes_again(transfer, python):
    transfer.serve(2, "--stall-timeout", 2)
    other, hung = transfer.client("other"), transfer.client("hung")
    transfer.wait_for("hung", SIZE // 4)
    hung.signal(signal.SIGSTOP)
    transfer.server.wait_stderr("stalled")
    hung.signal(signal.SIGCONT)
    transfer.check("hung", hung)
    transfer.check("other", other)


@BOTH
def test_a_file_that_comes_late_gets_the_beginning_afterwards_and_a_pipe_all_of_it(transfer, python):
    transfer.serve(3, "--start-wait", "0.1")
    first = transfer.client("first")
    transfer.wait_for("first", SIZE // 4)
    late, pipe = transfer.client("late"), transfer.stream()
    for name, client in (("first", first), ("late", late)):
        transfer.check(name, client)
    code, stderr, data = pipe.finish(60)
    equal = data == IMAGE
    assert code == 0 and equal, stderr
    assert transfer.server.finish(60)[0] == 0
