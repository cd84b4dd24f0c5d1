"""What the image comes from and goes to: FIFOs without a partner, pipes that do not block, file systems without room.

And at the end of it all nothing is left open.
"""

import os
import signal
import subprocess
import time

import pytest

import helpers
from helpers import LOOPBACK
from hostile import IMAGE, all_receive, orderly, wrapped
from pythons import BOTH, in_turn, NEWEST

#: As long as it takes to be sure that nothing happens, in seconds.
MOMENT = 0.4


@pytest.fixture
def port():
    return helpers.free_port()


@pytest.fixture
def fifo(tmp_path):
    """The path of a FIFO that nobody has opened."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


@pytest.fixture
def mount():
    """A function that mounts something for this one test, see mount(8); who may not do that skips the test."""
    mounted = []

    def do(*arguments):
        if os.geteuid() != 0:
            pytest.skip("mount(8) needs root")
        done = subprocess.run(["mount"] + list(arguments), stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode:
            pytest.skip("cannot mount here: " + done.stderr.strip())
        mounted.append(arguments[-1])

    yield do
    for target in mounted:
        subprocess.check_call(["umount", "--lazy", target])     # lazy: a test that failed may have left a client in it


def image_file(size, tmp_path):
    """The path of a file with an image of so many bytes."""
    path = tmp_path / "source"
    path.write_bytes(IMAGE[:size])
    return str(path)


def write(fd, data):
    """All of it, unless whoever reads it has ended, and then its stderr tells why."""
    os.set_blocking(fd, True)
    try:
        while data:
            data = data[os.write(fd, data):]
    except BrokenPipeError:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# FIFOs

@BOTH
def test_a_fifo_without_a_writer_is_an_image_that_is_still_to_come(fifo, port, python):
    """It holds up nobody, and is not at its end before the first writer has come; when he goes it is complete."""
    server = helpers.start_server(["-i", fifo, LOOPBACK, 1, port], python=python)
    server.wait_stderr("waiting for")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    server.wait_stderr("is here")
    time.sleep(MOMENT)
    assert server.poll() is None and client.poll() is None, server.stderr
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)         # fails if nobody has opened it for reading
    write(writer, IMAGE)
    os.close(writer)
    all_receive(IMAGE, [client], server)
    assert server.finish(20)[0] == 0


@BOTH
def test_a_fifo_without_a_reader_does_not_keep_a_client_from_its_place(fifo, port, python):
    server = helpers.start_server([LOOPBACK, 1, port], python=python, stdin=IMAGE)
    client = helpers.start_client(["-o", fifo, LOOPBACK, LOOPBACK, port], python=python)
    client.wait_stderr("connected to")
    server.wait_stderr("is here")
    time.sleep(MOMENT)
    assert client.poll() is None, client.stderr
    with open(fifo, "rb") as reader:
        equal = reader.read() == IMAGE
    code, stderr, _ = client.finish(20)
    assert code == 0 and equal, stderr
    assert server.finish(20)[0] == 0


@BOTH
def test_a_server_that_waits_for_the_writer_of_a_fifo_can_be_stopped(fifo, port, python):
    server = helpers.start_server(["-i", fifo, LOOPBACK, 1, port], python=python)
    server.wait_stderr("waiting for")
    server.signal(signal.SIGTERM)
    code, stderr, _ = server.finish(10)
    assert code == 1 and "stopped by SIGTERM" in stderr, stderr
    orderly(stderr)


@BOTH
def test_a_client_that_waits_for_the_reader_of_a_fifo_can_be_stopped(fifo, port, python):
    """In mid-transfer: another client is through, and this one too but for its output."""
    small = IMAGE[:100000]
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=small)
    waiting = helpers.start_client(["-o", fifo, LOOPBACK, LOOPBACK, port], python=python)
    waiting.wait_stderr("connected to")
    other = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    all_receive(small, [other], server)
    waiting.signal(signal.SIGTERM)
    code, stderr, _ = waiting.finish(10)
    assert code == 1 and "stopped by SIGTERM" in stderr, stderr
    orderly(stderr)
    assert server.finish(10)[0] == 3
    assert os.listdir(os.path.dirname(fifo)) == ["fifo"]


# ---------------------------------------------------------------------------------------------------------------------
# Pipes that do not block

@BOTH
def test_a_standard_output_that_does_not_block_is_waited_for(port, python):
    """Whoever shares a pipe with us, ssh for one, may have set it so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    server = helpers.start_server([LOOPBACK, 1, port], python=python, stdin=IMAGE)
    with os.fdopen(writer, "wb", 0) as output:
        client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python, stdout=output)
    server.wait_stderr("is here")
    time.sleep(MOMENT)                          # until the pipe is full
    with os.fdopen(reader, "rb") as taken:
        equal = taken.read() == IMAGE
    code, stderr, _ = client.finish(20)
    assert code == 0 and equal, stderr
    assert server.finish(20)[0] == 0


#: poll(2) and select(2) may say of a descriptor that it can be read where a read then would block: select(2), BUGS.
#: The server sees that once a tenth of a second.
SPURIOUS = """
import time
original, last = kmcast.select.select, [0]
def spurious(reads, writes, errors, timeout):
    ready = original(reads, writes, errors, timeout if timeout is None else min(timeout, 0.1))
    if not ready[0] and not ready[1] and time.time() > last[0] + 0.1:
        last[0] = time.time()
        return [end for end in reads if end is not None and not isinstance(end, int)], [], []
    return ready
kmcast.select.select = spurious
"""


@BOTH
def test_a_standard_input_that_does_not_block_is_not_at_its_end_while_its_writer_pauses(port, python):
    """EAGAIN is no end of the image."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb", 0) as source:
        server = wrapped(SPURIOUS, ["server", LOOPBACK, 1, port], python=python, stdin=source)
    server.wait_stderr("waiting for")
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    for start in range(0, len(IMAGE), 1000000):
        time.sleep(MOMENT)
        write(writer, IMAGE[start:start + 1000000])
    os.close(writer)
    all_receive(IMAGE, [client], server)
    assert server.finish(20)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Targets that cannot take the image

@in_turn("name", [u"target", u"a target", u"ziel \u00e4"], ids=["plain", "blank", "beyond ASCII"])
def test_a_target_that_is_a_mount_point_is_found_at_the_start(tmp_path, mount, port, name, python):
    """As /etc/hosts in a container: it cannot be replaced, which else would be known after the last byte."""
    target, other = tmp_path / name, tmp_path / "other"
    target.write_bytes(b"")
    other.write_bytes(b"as it was")
    mount("--bind", str(other), str(target))
    client = helpers.start_client(["--wait", 1, "-o", target, LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = client.finish(20)
    assert code == 2 and "mount" in stderr and len(stderr.splitlines()) == 1, stderr
    assert other.read_bytes() == b"as it was"
    assert sorted(os.listdir(str(tmp_path))) == sorted(["other", name])


@in_turn("size_known", [True, False], ids=["size known", "size unknown"])
def test_a_target_without_room_is_found_as_early_as_can_be(tmp_path, mount, port, size_known, python):
    """At the start if the server knows the image's size, else when it is full; nothing stays there in either case."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    if size_known:
        server = helpers.start_server(["-i", image_file(3000000, tmp_path), LOOPBACK, 1, port], python=python)
    else:
        server = helpers.start_server([LOOPBACK, 1, port], python=python, stdin=IMAGE)
    client = helpers.start_client(["-o", folder / "image", LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = client.finish(20)
    assert code == (3 if size_known else 1), stderr
    assert ("room" if size_known else "No space") in stderr, stderr
    orderly(stderr)
    assert os.listdir(str(folder)) == []
    assert server.finish(10)[0] == 1


@in_turn("options", [["-t", "ramfs"], ["-t", "tmpfs", "-o", "size=0"]], ids=["ramfs", "tmpfs"])
def test_a_target_that_does_not_say_how_much_room_it_has_is_tried(tmp_path, mount, port, options, python):
    """One of no blocks at all has no limit, and a host that was started from the network may live in such a one."""
    folder = tmp_path / "unlimited"
    folder.mkdir()
    mount(*(options + ["none", str(folder)]))
    server = helpers.start_server(["-i", image_file(300000, tmp_path), LOOPBACK, 1, port], python=python)
    client = helpers.start_client(["-o", folder / "image", LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = client.finish(20)
    assert code == 0, stderr
    equal = (folder / "image").read_bytes() == IMAGE[:300000]
    assert equal, stderr
    assert server.finish(10)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left open

#: What -X dev and -W error are to a process, and to those that it starts.
STRICT = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}


def closes_all(process, code, timeout=30):
    """Fail unless it ends with this exit code, and without a word of what it has not closed."""
    ended, stderr, _ = process.finish(timeout)
    assert ended == code, stderr
    assert "ResourceWarning" not in stderr and "Exception ignored" not in stderr, stderr


def test_a_demo_closes_all(tmp_path):
    """-v: it says what its server and clients say."""
    path = image_file(1000000, tmp_path)
    closes_all(helpers.start_kmcast(["demo", "-v", "--clients", 2, path], NEWEST, env=STRICT), 0)


ENDS = {
    "files": (lambda path: ["-i", path], lambda path: ["-o", path + ".copy"]),
    "commands": (lambda path: ["--pipe", "cat '%s'" % path], lambda path: ["--pipe", "cat > '%s'.copy" % path]),
    "standard files": (lambda path: [], lambda path: []),
}


@pytest.mark.parametrize("ends", sorted(ENDS))
def test_server_and_client_close_all(tmp_path, port, ends):
    path = image_file(1000000, tmp_path)
    of_server, of_client = ENDS[ends]
    with open(path, "rb") as source:
        server = helpers.start_server(of_server(path) + [LOOPBACK, 1, port], NEWEST, stdin=source, env=STRICT)
    client = helpers.start_client(of_client(path) + [LOOPBACK, LOOPBACK, port], NEWEST, env=STRICT)
    closes_all(client, 0)
    closes_all(server, 0)


@pytest.mark.parametrize("ends", sorted(ENDS))
@pytest.mark.parametrize("stopped", ["server", "client"])
def test_server_and_client_close_all_when_one_of_them_is_stopped(tmp_path, port, ends, stopped):
    path = image_file(3000000, tmp_path)
    of_server, of_client = ENDS[ends]
    with open(path, "rb") as source:
        server = helpers.start_server(["--rate", "4M"] + of_server(path) + [LOOPBACK, 1, port], NEWEST, stdin=source,
                                      env=STRICT)
    client = helpers.start_client(of_client(path) + [LOOPBACK, LOOPBACK, port], NEWEST, env=STRICT)
    client.wait_begun()                         # 6 s are the whole
    (server if stopped == "server" else client).signal(signal.SIGTERM)
    closes_all(client, 1)
    closes_all(server, 1)


def test_a_client_that_is_refused_closes_all(port, tmp_path):
    path = image_file(3000000, tmp_path)
    server = helpers.start_server(["--rate", "4M", "-i", path, LOOPBACK, 1, port], NEWEST, env=STRICT)
    client = helpers.start_client(["-o", path + ".copy", LOOPBACK, LOOPBACK, port], NEWEST, env=STRICT)
    client.wait_begun()
    closes_all(helpers.start_client(["-o", path + ".refused", LOOPBACK, LOOPBACK, port], NEWEST, env=STRICT), 3)
    client.signal(signal.SIGTERM)
    closes_all(client, 1)
    closes_all(server, 1)
