"""A good network: whatever the image, the options and the interpreters, every client gets every byte."""

import os
import re
import socket
import stat
import struct
import threading
import time

import pytest

import helpers
from helpers import LOOPBACK, payload_size
from pythons import ALL, BOTH, EVERY, NEWEST, OLDEST

PAYLOAD = payload_size(1500)
SMALL = ["--buffer-packets", 10]


def gso_works():
    """Whether this kernel cuts a large send into datagrams (UDP_SEGMENT) and joins them again (UDP_GRO)."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.setsockopt(17, 103, 1400)
        probe.setsockopt(17, 104, 1)
        return True
    except OSError:
        return False
    finally:
        probe.close()


# ---------------------------------------------------------------------------------------------------------------------
# Images

@pytest.mark.parametrize("size", [
    1, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, 2 * PAYLOAD - 1, 10 * PAYLOAD - 1, 10 * PAYLOAD, 10 * PAYLOAD + 1,
    20 * PAYLOAD, 75 * PAYLOAD + 123])
def test_an_image_of_any_size_arrives(size):
    data = helpers.random_bytes(size, seed=size)
    result = helpers.transfer(data, clients=2, server_args=SMALL)
    result.check(data)
    summary = helpers.summary(result.server)
    assert (summary.packets, summary.bytes, summary.served, summary.clients) == (-(-size // PAYLOAD), size, 2, 2)


@pytest.mark.parametrize("packets", [1, 2, 64, 65536])
def test_buffers_of_any_capacity(packets):
    size = 5 * PAYLOAD + 1 if packets == 1 else 1000000
    data = helpers.random_bytes(size, seed=packets)
    helpers.transfer(data, server_args=["--buffer-packets", packets]).check(data)


@pytest.mark.parametrize("mtu", [256, 576, 1499, 9000])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_packets_fill_the_mtu_and_never_exceed_it(mtu, over):
    payload, port = payload_size(mtu), helpers.free_port()
    data = helpers.random_bytes(30 * payload + over, seed=mtu)
    with helpers.group_socket(helpers.GROUP, port) as listener:
        result = helpers.transfer(data, server_args=["--mtu", mtu], port=port)
        result.check(data)
        sizes = [len(datagram) for datagram in helpers.datagrams_in(listener)]
    assert max(sizes) == 12 + payload <= mtu - 28
    assert len(sizes) == 30 + (over > 0)


def test_an_image_of_several_full_buffers_arrives():
    data = helpers.random_bytes(16000000)
    helpers.transfer(data, clients=2, stdout=helpers.HASH).check(helpers.sha256(data))


def test_a_slow_producer_is_waited_for():
    data = helpers.random_bytes(40 * 1000)

    def produce():
        for start in range(0, len(data), 1000):
            time.sleep(0.01)
            yield data[start:start + 1000]
    helpers.transfer(produce(), clients=2, server_args=SMALL).check(data)


def test_a_round_is_handed_over_before_the_image_ends():
    """An image may be a stream without an end in sight: what is verified is passed on."""
    data, port = helpers.random_bytes(30 * PAYLOAD), helpers.free_port()
    arrived = threading.Event()
    received = []

    def consume(chunk):
        received.append(chunk)
        if sum(map(len, received)) >= 20 * PAYLOAD:
            arrived.set()

    def produce():
        yield data[:20 * PAYLOAD]
        assert arrived.wait(30), "two full rounds did not arrive before the producer went on"
        yield data[20 * PAYLOAD:]
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], stdin=produce())
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=consume)
    assert client.finish(60)[0] == 0
    assert server.finish(10)[0] == 0
    assert b"".join(received) == data


def test_a_slow_consumer_slows_the_session_and_loses_nothing():
    data, port = helpers.random_bytes(300 * PAYLOAD), helpers.free_port()
    received = []

    def consume(chunk):
        received.append(chunk)
        time.sleep(0.05)
    server = helpers.start_server(["--buffer-packets", 30, LOOPBACK, 2, port], stdin=data)
    slow = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=consume)
    fast = helpers.start_client([LOOPBACK, LOOPBACK, port])
    assert fast.finish(60) == (0, fast.stderr, data)
    assert slow.finish(60)[0] == 0
    assert server.finish(10)[0] == 0
    assert b"".join(received) == data


def test_a_consumer_that_stands_still_stops_the_producer():
    """What lies between them is a few rounds and pipes, not the image."""
    port, go_on, produced = helpers.free_port(), threading.Event(), []

    def produce():
        for chunk in helpers.random_chunks(10000000):
            produced.append(chunk)
            yield chunk
    server = helpers.start_server(["--buffer-packets", 100, LOOPBACK, 1, port], stdin=produce())
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], stdout=lambda chunk: go_on.wait(60))
    before = None
    while before != len(produced) or not produced:
        before = len(produced)
        time.sleep(0.5)
    assert sum(map(len, produced)) < 5000000
    go_on.set()
    assert client.finish(60)[0] == 0
    assert server.finish(10)[0] == 0


@BOTH
def test_memory_does_not_depend_on_the_size_of_the_image(python):
    def peaks(size):
        port = helpers.free_port()
        server = helpers.start_server(["--buffer-packets", 500, LOOPBACK, 1, port], python, stdin=helpers.random_chunks(size))
        client = helpers.start_client([LOOPBACK, LOOPBACK, port], python, stdout=helpers.HASH)
        while client.poll() is None or server.poll() is None:       # which looks at the memory
            time.sleep(0.01)
        assert (client.finish(1)[0], server.finish(1)[0]) == (0, 0)
        return server.peak_kib, client.peak_kib
    for small, large in zip(peaks(5000000), peaks(25000000)):
        assert large - small < 10000, "from %d KiB to %d KiB" % (small, large)


# ---------------------------------------------------------------------------------------------------------------------
# Clients and threads

def test_a_tcp_thread_serves_no_more_clients_than_it_is_told():
    port = helpers.free_port()
    server = helpers.start_server(["--clients-per-thread", 2, LOOPBACK, 5, port], stdin=b"data")
    threads = []
    for number in range(1, 6):
        helpers.start_client([LOOPBACK, LOOPBACK, port])
        if number < 5:
            server.wait_stderr("%d of 5" % number)
            threads.append(len(os.listdir("/proc/%d/task" % server.pid)))
    assert server.finish(20)[0] == 0
    more = [count - threads[0] for count in threads]        # than with the first
    assert more[2] == 1 and 1 <= more[3] <= 2, threads


@pytest.mark.parametrize("clients, a_thread", [(1, 1), (3, 1), (3, 2), (4, 2), (5, 64)])
def test_the_chain_of_tcp_threads_serves_everyone(clients, a_thread):
    data = helpers.random_bytes(200000)
    result = helpers.transfer(data, clients=clients, server_args=SMALL + ["--clients-per-thread", a_thread])
    result.check(data)
    assert helpers.summary(result.server).served == clients


@pytest.mark.parametrize("clients, server_args", [(66, []), (16, ["--clients-per-thread", 2])],
                         ids=["in two threads", "in eight threads"])
def test_many_clients(clients, server_args):
    data = helpers.random_bytes(300000)
    result = helpers.transfer(data, clients=clients, server_args=server_args, client_python=[NEWEST, OLDEST])
    result.check(data)
    assert helpers.summary(result.server).served == clients


def test_many_clients_of_a_server_of_the_oldest_interpreter_by_unicast():
    data = helpers.random_bytes(300000)
    helpers.transfer(data, clients=12, server_args=["--clients-per-thread", 5, "--unicast"], server_python=OLDEST,
                     client_python=[OLDEST]).check(data)


# ---------------------------------------------------------------------------------------------------------------------
# Interpreters, and ways to send and receive

@EVERY
def test_every_interpreter_serves_the_oldest_and_the_newest_which_serve_every_interpreter(python):
    data, pythons = helpers.random_bytes(400000), ALL if python in (OLDEST, NEWEST) else [OLDEST, NEWEST, python]
    result = helpers.transfer(data, clients=len(pythons), server_python=python, client_python=pythons)
    result.check(data)
    for end in [result.server] + result.clients:
        assert "Warning" not in end.stderr and "Traceback" not in end.stderr, str(result)


@BOTH
@pytest.mark.parametrize("receive", ["gso", "mmsg", "plain"])
@pytest.mark.parametrize("send", ["gso", "mmsg", "plain"])
def test_every_way_to_send_and_to_receive(send, receive, python):
    if "gso" in (send, receive) and not gso_works():
        pytest.skip("this kernel has no UDP_SEGMENT or no UDP_GRO")
    data = helpers.random_bytes(300 * PAYLOAD + 77)
    result = helpers.transfer(data, server_args=["-v", "--datagrams", send], client_args=["-v", "--datagrams", receive],
                              server_python=python, client_python=OLDEST if python == NEWEST else NEWEST)
    result.check(data)
    assert "by %s" % send in result.server.stderr
    assert "receiving by %s" % receive in result.clients[0].stderr


def test_a_developers_python_finds_nothing_to_warn_of():
    """-X dev: unclosed files, threads that are left, deprecated calls."""
    data, port = helpers.random_bytes(300000), helpers.free_port()
    options = {"prefix": [], "env": {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error::DeprecationWarning"}}
    server = helpers.start_server([LOOPBACK, 1, port], python=NEWEST, stdin=data, **options)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=NEWEST, **options)
    for code, stderr, _ in (client.finish(60), server.finish(60)):
        assert code == 0, stderr
        assert all(re.match("kmcast |[0-9a-f]{64}  -$", line) for line in stderr.splitlines()), stderr


# ---------------------------------------------------------------------------------------------------------------------
# Options

@pytest.mark.parametrize("rate", ["50M", "0.9G", "max", "auto"])
def test_rates(rate):
    data = helpers.random_bytes(1000000)
    helpers.transfer(data, clients=2, server_args=["--rate", rate]).check(data)


@BOTH
def test_unicast_sends_no_datagram_and_tells_the_client_to_expect_none(python):
    data, port = helpers.random_bytes(1000 * PAYLOAD + 5), helpers.free_port()
    with helpers.group_socket(helpers.GROUP, port) as listener:
        result = helpers.transfer(data, clients=2, server_args=["--unicast"], port=port, server_python=python,
                                  client_python=python)
        assert helpers.datagrams_in(listener) == []
    result.check(data)
    summary = helpers.summary(result.server)
    assert summary.coded == 0
    assert summary.by_tcp + result.server.report()["carried"]["chain"] // PAYLOAD == 2002, "each has it once"
    for client in result.clients:
        assert "warning" not in client.stderr


@BOTH
def test_without_digests(python):
    data = helpers.random_bytes(200000)
    result = helpers.transfer(data, clients=2, server_args=["--no-digest"] + SMALL, server_python=python)
    result.check(data)
    for client in result.clients:
        assert "without a digest" in client.stderr


def test_a_client_says_the_digest_of_what_it_received():
    data = helpers.random_bytes(200000)
    assert helpers.sha256(data) in helpers.transfer(data).clients[0].stderr


def test_the_group_is_the_one_that_was_asked_for():
    data, port = helpers.random_bytes(50 * PAYLOAD), helpers.free_port()
    with helpers.group_socket("239.1.2.3", port) as listener:
        result = helpers.transfer(data, server_args=["--group", "239.1.2.3"], port=port)
        assert len(helpers.datagrams_in(listener)) == 50
    result.check(data)


@pytest.mark.parametrize("args, ttl", [([], 8), (["--ttl", 0], 0), (["--ttl", 33], 33)])
def test_the_ttl_is_the_one_that_was_asked_for(args, ttl):
    data, port = helpers.random_bytes(20 * PAYLOAD), helpers.free_port()
    with helpers.group_socket(helpers.GROUP, port) as listener:
        listener.setsockopt(socket.IPPROTO_IP, 12, 1)              # IP_RECVTTL
        helpers.transfer(data, server_args=args, port=port).check(data)
        controls = [listener.recvmsg(2000, 100)[1] for _ in range(20)]
    assert controls == [[(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("i", ttl))]] * 20


def test_two_sessions_at_once_on_one_group_do_not_mix():
    """Each has a port, but a host may run both; and what belongs to another session fails its checksum."""
    first, second = helpers.random_bytes(500000, seed=1), helpers.random_bytes(500000, seed=2)
    ports = helpers.free_port(), helpers.free_port()
    servers = [helpers.start_server([LOOPBACK, 1, port], stdin=data) for port, data in zip(ports, (first, second))]
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for port in ports]
    for client, data in zip(clients, (first, second)):
        code, stderr, received = client.finish(60)
        assert code == 0 and received == data, stderr
    assert [server.finish(10)[0] for server in servers] == [0, 0]


def test_datagrams_of_strangers_on_the_group_do_no_harm():
    """Garbage, tiny and huge ones, and good packets of another session with the same numbers."""
    data, port = helpers.random_bytes(700 * PAYLOAD + 9), helpers.free_port()
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stranger.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
    over = threading.Event()

    def disturb():
        number = 0
        while not over.is_set():
            header = number.to_bytes(4, "little") + os.urandom(4) + PAYLOAD.to_bytes(4, "little")
            for datagram in (b"", b"x", os.urandom(12), os.urandom(13), os.urandom(12 + PAYLOAD), os.urandom(60000),
                             header + os.urandom(PAYLOAD), os.urandom(3000)):
                stranger.sendto(datagram, (helpers.GROUP, port))
            number = (number + 1) % 700
            time.sleep(0.0005)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for way in ("auto", "mmsg", "plain"):
            helpers.transfer(data, clients=2, server_args=["--rate", "40M"], client_args=["--datagrams", way],
                             client_python=[NEWEST, OLDEST], port=port).check(data)
    finally:
        over.set()
        thread.join()
        stranger.close()


@pytest.mark.parametrize("local_ip", ["auto", "lo", LOOPBACK, "127.0.0.2"])
def test_a_client_takes_its_local_ip_as_address_interface_or_auto(local_ip):
    data, port = helpers.random_bytes(30 * PAYLOAD), helpers.free_port()
    server = helpers.start_server(["lo" if local_ip == "lo" else LOOPBACK, 1, port], stdin=data)
    client = helpers.start_client([local_ip, "localhost" if local_ip == "auto" else LOOPBACK, port])
    code, stderr, received = client.finish(60)
    assert code == 0 and received == data, stderr
    assert helpers.repaired(client) == (0, 0)       # so multicast has reached it
    assert server.finish(10)[0] == 0


@BOTH
def test_a_client_may_be_started_before_its_server(python):
    data, port = helpers.random_bytes(1000), helpers.free_port()
    client = helpers.start_client(["-v", LOOPBACK, LOOPBACK, port], python=python)
    client.wait_stderr("connecting")
    time.sleep(0.2)
    server = helpers.start_server([LOOPBACK, 1, port], stdin=data)
    code, stderr, received = client.finish(60)
    assert code == 0 and received == data, stderr
    assert server.finish(10)[0] == 0


def test_quiet_says_nothing_when_all_is_well():
    data = helpers.random_bytes(100000)
    result = helpers.transfer(data, server_args=["-q"], client_args=["-q"])
    result.check(data)
    assert [result.server.stderr, result.clients[0].stderr] == ["", ""]


# ---------------------------------------------------------------------------------------------------------------------
# Ends

@BOTH
def test_from_file_to_file(tmp_path, python):
    data = helpers.random_bytes(300000)
    (tmp_path / "image.raw").write_bytes(data)
    (tmp_path / "1").write_bytes(b"older content")
    (tmp_path / "1").chmod(0o640)
    port = helpers.free_port()
    server = helpers.start_server(["-i", tmp_path / "image.raw", LOOPBACK, 2, port], python=python)
    clients = [helpers.start_client(["-v", "-o", tmp_path / str(number), LOOPBACK, LOOPBACK, port], python=python)
               for number in (1, 2)]
    for client in clients:
        code, stderr, stdout = client.finish(60)
        assert (code, stdout) == (0, b""), stderr
        assert "image image.raw, 300000 bytes" in stderr
    assert server.finish(10)[0] == 0
    assert (tmp_path / "1").read_bytes() == data and (tmp_path / "2").read_bytes() == data
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "1").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "2").stat().st_mode) == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "image.raw"]


def test_the_file_appears_only_at_the_end(tmp_path):
    data, port = helpers.random_bytes(30 * PAYLOAD), helpers.free_port()
    server = helpers.start_server(SMALL + [LOOPBACK, 1, port], stdin=helpers.PIPE)
    client = helpers.start_client(["-o", tmp_path / "image", LOOPBACK, LOOPBACK, port])
    server.popen.stdin.write(data[:-1])
    deadline = time.time() + 30
    while not [path for path in tmp_path.iterdir() if path.stat().st_size] and time.time() < deadline:
        time.sleep(0.01)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 1 and names != ["image"]
    server.popen.stdin.write(data[-1:])
    server.popen.stdin.close()
    assert client.finish(30)[0] == 0
    assert server.finish(10)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_bytes() == data


def test_name_is_what_the_server_calls_the_image(tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    result = helpers.transfer(b"", server_args=["--name", "node.img", "-i", tmp_path / "file"], client_args=["-v"])
    result.check(b"data")
    assert "image node.img, 4 bytes" in result.clients[0].stderr


@EVERY
def test_file_names_beyond_ascii(tmp_path, python):
    source, target, port = tmp_path / u"quelle \u00e4.img", tmp_path / u"ziel \u00e4.img", helpers.free_port()
    source.write_bytes(b"data" * 1000)
    for locale in ("C", "C.UTF-8") if python in (OLDEST, NEWEST) else ("C",):
        env = {"LC_ALL": locale, "PYTHONUTF8": None, "PYTHONIOENCODING": None}
        server = helpers.start_server(["-v", "-i", source, LOOPBACK, 1, port], python=python, env=env)
        client = helpers.start_client(["-v", "-o", target, LOOPBACK, LOOPBACK, port], python=python, env=env)
        code, stderr, _ = client.finish(60)
        assert code == 0, stderr
        assert server.finish(10)[0] == 0
        assert target.read_bytes() == b"data" * 1000
        target.unlink()


def test_standard_input_may_be_a_file_that_was_partly_read(tmp_path):
    data, port = helpers.random_bytes(20000), helpers.free_port()
    (tmp_path / "image").write_bytes(b"header" + data)
    with (tmp_path / "image").open("rb", buffering=0) as image:
        image.seek(6)
        server = helpers.start_server([LOOPBACK, 1, port], stdin=image)
    client = helpers.start_client(["-v", LOOPBACK, LOOPBACK, port])
    code, stderr, received = client.finish(60)
    assert code == 0 and received == data
    assert "20000 bytes" in stderr
    assert server.finish(10)[0] == 0


def test_output_to_a_fifo_a_device_and_a_symbolic_link(tmp_path):
    data, port = helpers.random_bytes(200000), helpers.free_port()
    fifo, target, link = tmp_path / "fifo", tmp_path / "target", tmp_path / "link"
    os.mkfifo(str(fifo))
    target.write_bytes(b"older")
    link.symlink_to("target")
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    server = helpers.start_server([LOOPBACK, 3, port], stdin=data)
    clients = [helpers.start_client(["-o", output, LOOPBACK, LOOPBACK, port]) for output in (fifo, "/dev/null", link)]
    for client in clients:
        code, stderr, _ = client.finish(60)
        assert code == 0, stderr
    assert server.finish(10)[0] == 0
    reader.join(10)
    assert received == [data]
    assert stat.S_ISFIFO(fifo.stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert link.is_symlink() and target.read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "target"]


def test_a_relay_is_a_client_piped_into_a_server():
    data, first, second = helpers.random_bytes(500000), helpers.free_port(), helpers.free_port()
    reading, writing = os.pipe()
    origin = helpers.start_server([LOOPBACK, 1, first], stdin=data)
    with os.fdopen(reading, "rb", 0) as source, os.fdopen(writing, "wb", 0) as sink:
        relay_in = helpers.start_client([LOOPBACK, LOOPBACK, first], stdout=sink)
        relay_out = helpers.start_server([LOOPBACK, 2, second], stdin=source)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, second]) for _ in range(2)]
    for client in clients:
        code, stderr, received = client.finish(60)
        assert code == 0 and received == data, stderr
    assert [process.finish(10)[0] for process in (origin, relay_in, relay_out)] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The demo

@BOTH
def test_demo_with_a_file(tmp_path, python):
    (tmp_path / "file").write_bytes(helpers.random_bytes(3000000))
    demo = helpers.start_kmcast(["demo", "--clients", 2, tmp_path / "file"], python, program=helpers.KMCAST)
    code, stderr, stdout = demo.finish(60)
    assert code == 0, stderr
    table = stdout.decode("ascii")
    assert len([line for line in table.splitlines() if "3000000" in line and line.endswith("equal")]) == 2, table
    assert "DIFFERENT" not in table
    assert not helpers.leftovers(demo)


def test_demo_of_an_empty_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    code, stderr, stdout = helpers.start_kmcast(["demo", tmp_path / "file"], program=helpers.KMCAST).finish(60)
    assert code == 0 and b"all equal: 0 bytes to 3 clients" in stdout, stderr


@BOTH
def test_demo_on_a_host_without_loopback_says_so(tmp_path, python):
    (tmp_path / "file").write_bytes(b"data")
    prefix = ["unshare", "--net"]
    if helpers.start(prefix + ["true"]).finish(20)[0]:
        pytest.skip("no other host can be made here")
    demo = helpers.start_kmcast(["demo", tmp_path / "file"], python, program=helpers.KMCAST, prefix=prefix)
    code, stderr, _ = demo.finish(60)
    assert code == 1 and "127.0.0.1 is no address or interface of this host" in stderr, stderr
    assert "internal error" not in stderr


def test_demo_without_anything():
    demo = helpers.start_kmcast(["demo"], program=helpers.KMCAST)
    code, stderr, stdout = demo.finish(60)
    assert code == 0, stderr
    table = stdout.decode("ascii")
    assert len([line for line in table.splitlines() if str(64 << 20) in line and line.endswith("equal")]) == 3, table
    assert not helpers.leftovers(demo)
