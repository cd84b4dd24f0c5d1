"""Errors that the kernel can give the server: what fails is retried, done in another way, or ends in a clear abort.

strace injects them, into the calls on one file or socket only. These tests run on loopback.
"""

import os
import shutil
import signal
import time

import pytest

import helpers
from helpers import LOOPBACK

IMAGE = helpers.random_bytes(1500000, seed=5)
PACKETS = -(-len(IMAGE) // 1460)
LIMIT = 40                  # seconds against a hang

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")

SENDS = "sendto,sendmsg,sendmmsg"


def sockets(process, table):
    """Return the sockets of a process that /proc/net/`table` lists with a peer, as "socket:[inode]"."""
    inodes = set()
    with open("/proc/%d/net/%s" % (process.pid, table)) as lines:
        for line in lines:
            columns = line.split()
            if columns[2] not in ("00000000:0000", "rem_address", "local_address"):
                inodes.add("socket:[%s]" % columns[9])
    fds = "/proc/%d/fd/" % process.pid
    return sorted(inodes & {os.readlink(fds + fd) for fd in os.listdir(fds)})


def inject(process, path, calls, error, when):
    """Let these system calls of a process on that file or socket fail; returns when it has begun.

    when  "5" the fifth call, "5+" all from there on, "5+2" each second from there on; counted for each call by itself
    """
    strace = helpers.start(["strace", "-q", "-f", "-p", process.pid, "-P", path, "-e", "trace=" + calls,
                            "-e", "inject=%s:error=%s:when=%s" % (calls, error, when)])
    deadline = time.monotonic() + 20
    while True:
        with open("/proc/%d/status" % process.pid) as status:
            if "TracerPid:\t0\n" not in status.read():
                return strace
        assert strace.poll() is None and time.monotonic() < deadline, strace.stderr
        time.sleep(0.01)


def start_server(*args, clients=2):
    """Start a server that waits for its clients; return it and its port."""
    port = helpers.free_port()
    server = helpers.start_server(list(args) + [LOOPBACK, clients, port], stdin=IMAGE)
    server.wait_stderr("waiting for")
    return server, port


def start_clients(port, clients=2):
    """Start the clients of start_server()."""
    return [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(clients)]


def finish(server, clients):
    """Wait for all ends; return the server's exit code and stderr, and a list of the same for the clients.

    A client that exits 0 has exactly the server's bytes. No other exit code than 0 and 1, and no crash.
    """
    ends = [process.finish(LIMIT) for process in clients + [server]]
    report = "\n".join(stderr for _, stderr, _ in ends)
    for code, stderr, data in ends[:-1]:
        equal = code != 0 or data == IMAGE
        assert equal, "exit 0 with %d bytes\n%s" % (len(data), report)
    for code, stderr, _ in ends:
        assert code in (0, 1, 3) and "Traceback" not in stderr and "internal error" not in stderr, report
    return ends[-1][:2], [end[:2] for end in ends[:-1]], report


def repaired(clients):
    """How many packets were repaired for one of these clients, the most of them."""
    return max(sum(helpers.repaired(client)) for client in clients)


@pytest.mark.parametrize("error, when", [
    (error, when) for error in ("ENOBUFS", "EAGAIN", "EPERM", "ENETDOWN", "EIO", "EMSGSIZE") for when in ("3+2", "3+")
    if (error, when) != ("EAGAIN", "3+")],      # no kernel says for ever both that there is room and that there is none
    ids=lambda value: {"3+2": "now and then", "3+": "for ever"}.get(value, value))
def test_multicast_send_error(error, when):
    """What could not be sent by multicast comes by TCP, and every client has the image."""
    server, port = start_server("-v")
    udp, = sockets(server, "udp")
    strace = inject(server, udp, SENDS, error, when)
    clients = start_clients(port)
    (code, said), ends, report = finish(server, clients)
    assert "(INJECTED)" in strace.stderr
    assert code == 0 and all(end[0] == 0 for end in ends), report
    if when == "3+":
        assert repaired(clients) > 0.8 * PACKETS, report
        assert "multicast failed at this host" in said, report      # and says with what
    elif error in ("ENOBUFS", "EAGAIN"):
        assert "multicast failed" not in said, report               # a full queue is waited for


@pytest.mark.parametrize("way", ["gso", "mmsg"])
@pytest.mark.parametrize("error", ["EIO", "EMSGSIZE", "EINVAL", "ENOSYS"])
def test_a_way_to_send_that_does_not_work_here(way, error):
    """The next one is taken, and nothing is lost by it."""
    calls = {"gso": "sendto,sendmsg", "mmsg": "sendmmsg"}[way]
    # A refusal of what follows gso, too, would leave nothing to fall back to: plain sending uses the same call.
    server, port = start_server("-v", "--datagrams", way)
    udp, = sockets(server, "udp")
    strace = inject(server, udp, calls, error, "1" if way == "gso" else "1+")
    clients = start_clients(port)
    (code, said), ends, report = finish(server, clients)
    assert "(INJECTED)" in strace.stderr
    assert code == 0 and all(end[0] == 0 for end in ends), report
    assert "sending by %s does not work here" % way in said, report
    assert repaired(clients) < 0.2 * PACKETS, report


@pytest.mark.parametrize("error, all_served", [("ENOBUFS", True), ("EAGAIN", True), ("EINTR", True), ("EIO", False)])
def test_tcp_send_error(error, all_served):
    """An error that passes is waited for; one that does not costs that client its image, and nobody else."""
    server, port = start_server("--unicast", "--rate", "10M")
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port])]
    server.wait_stderr("is here")
    tcp, = sockets(server, "tcp")
    strace = inject(server, tcp, SENDS, error, "5+3")
    clients.append(helpers.start_client([LOOPBACK, LOOPBACK, port]))
    (code, _), ends, report = finish(server, clients)
    assert "(INJECTED)" in strace.stderr
    assert ends[1][0] == 0, report
    assert (code, ends[0][0]) == ((0, 0) if all_served else (3, 1)), report


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_image_that_cannot_be_read(tmp_path, error):
    """A disk that fails in mid-transfer: all are told, and nobody takes what there was for the image."""
    image = tmp_path / "image"
    image.write_bytes(IMAGE)
    port = helpers.free_port()
    server = helpers.start_server(["-i", str(image), LOOPBACK, 2, port])
    server.wait_stderr("waiting for")
    strace = inject(server, str(image), "read", error, "2+")
    clients = start_clients(port)
    (code, said), ends, report = finish(server, clients)
    assert "(INJECTED)" in strace.stderr
    assert code == 1 and "cannot read the image" in said, report
    for code, said in ends:
        assert code == 1 and "the server says: cannot read the image" in said, report


@pytest.mark.parametrize("call, error", [("write", "EIO"), ("fsync", "EIO"), ("rename", "EACCES")])
def test_image_that_cannot_be_written(tmp_path, call, error):
    """Nor finished: no file appears, the server knows, the other client has the image."""
    output = tmp_path / "image"
    server, port = start_server("--rate", "40M")
    victim = helpers.start_client(["-o", str(output), LOOPBACK, LOOPBACK, port])
    server.wait_stderr("is here")
    fds = "/proc/%d/fd/" % victim.pid
    part, = [path for path in (os.readlink(fds + fd) for fd in os.listdir(fds)) if str(tmp_path) in path]
    calls = {"rename": "rename,renameat,renameat2"}.get(call, call)
    strace = inject(victim, part, calls, error, "1+")
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]), victim]
    (code, said), ends, report = finish(server, clients)
    assert "(INJECTED)" in strace.stderr
    assert (code, ends[0][0], ends[1][0]) == (3, 0, 1), report
    assert os.listdir(str(tmp_path)) == [], report
    words = {"EIO": "Input/output error", "EACCES": "Permission denied"}[error]
    assert words in said and words in ends[1][1], report


def test_strace_leaves_no_server_behind():
    """A server under strace ends in order on SIGTERM, like any other: what the tests above rest on."""
    server, port = start_server()
    inject(server, sockets(server, "udp")[0], SENDS, "EPERM", "1+")
    server.signal(signal.SIGTERM)
    code, stderr, _ = server.finish(20)
    assert code == 1 and "stopped by SIGTERM" in stderr
