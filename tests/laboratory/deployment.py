"""What the laboratory tests share: an image brought from the server to the clients of a laboratory.

    def test_a_client_that_is_killed_does_not_stop_the_others(laboratory, deploy):
        run = deploy(laboratory(), IMAGE, server_args=["--rate", "40M"])
        run.wait_received(1 << 20)              # in mid-transfer
        run.clients[1].signal(signal.SIGKILL)
        run.finish()
        run.check_complete(run.clients[0], run.clients[2], run.clients[3])

`laboratory` and `deploy` are fixtures in conftest.py. Whatever a test does, and whether it passes or not, one thing is
checked at its end: **a client that exited 0 has exactly the server's bytes.**
"""

import functools
import os
import re
import threading
import time

import helpers

MIB = 1 << 20


class Consumer(object):
    """What reads a client's output: keeps it all, and can stop reading or take its time.

    size    bytes until now
    pace    None, or a function of the bytes until now that returns how many seconds to wait before the next read
    """

    def __init__(self, pace=None):
        self.size = 0
        self.pace = pace
        self._chunks = []
        self._reading = threading.Event()
        self._reading.set()

    def __call__(self, chunk):
        self._chunks.append(chunk)
        self.size += len(chunk)
        if self.pace:
            time.sleep(self.pace(self.size))
        self._reading.wait()

    def stop(self):
        """Read no more; what is in the pipe stays there."""
        self._reading.clear()

    def go_on(self):
        """Read again."""
        self._reading.set()

    def data(self):
        """All that came, bytes."""
        return b"".join(self._chunks)


class Client(helpers.Process):
    """A client of a deployment: a Process that knows its `.host`, its `.consumer`, and the file of its -o, `.output`.

    consumer and output: at most one of them is not None; with neither its output is not looked at.
    image: what it must have, if that is not the deployment's data.
    """

    image = None

    def __init__(self, host, consumer, output, argv, **options):
        super().__init__(argv, **options)
        self.host = host
        self.consumer = consumer
        self.output = output

    @property
    def code(self):
        """The exit code, None while it runs."""
        return self.poll()

    def received(self):
        """The image as this client handed it over, bytes; None where that is not kept, or there is no file."""
        if self.consumer:
            return self.consumer.data()
        if self.output and os.path.exists(self.output):
            with open(self.output, "rb") as file:
                return file.read()
        return None

    def repaired(self):
        """How many packets it got by repair, as its report says: (by multicast, by TCP)."""
        return helpers.repaired(self)

    def chained(self):
        """How many packets it got from another client, as its report says."""
        return self.report()["carried"]["chain"] // helpers.payload_size()


class Deployment(object):
    """A server and clients on the hosts of a laboratory.

    lab       the Laboratory
    server    helpers.Process
    clients   Clients, in the order of lab.clients
    data      the image that the server gets, bytes
    """

    def __init__(self, lab, data, server_args, port, places, on_server, stdin, server_options):
        self.lab = lab
        self.data = data
        self.port = port
        self.clients = []
        self.others = []                        # processes beside the server and the clients, for the report
        start = server_options.pop("start", helpers.start_server)
        self.server = start(list(server_args) + [on_server.address, places, port], host=on_server,
                            stdin=data if stdin is None else stdin, **server_options)

    def add_client(self, host, args=(), consumer="keep", output=None, stdout=None, python=None, server=None, **options):
        """Start a client on a host; further options are those of helpers.start_client().

        consumer  a Consumer; "keep": a new one; None: `stdout` says where its output goes, or `output`
        output    a path for its -o
        server    the Host that the image comes from, if not lab.server
        """
        if output or stdout is not None:
            consumer = None
        elif consumer == "keep":
            consumer = Consumer()
        args = list(args) + (["-o", output] if output else [])
        client = helpers.start_client(
            args + [host.address, (server or self.lab.server).address, self.port], python or helpers.newest(), host=host,
            stdout=consumer or stdout, kind=functools.partial(Client, host, consumer, output), **options)
        self.clients.append(client)
        return client

    # --- while it goes on ---

    def wait_received(self, size=MIB, clients=None, timeout=60):
        """Wait until each of these clients (None: all) has handed over so many bytes: the transfer is under way."""
        deadline = time.monotonic() + timeout
        for client in self.clients if clients is None else clients:
            while client.consumer.size < size:
                assert client.code is None and time.monotonic() < deadline, \
                    "%r has handed over %d bytes, not %d\n%s" % (client, client.consumer.size, size, self)
                time.sleep(0.01)

    def wait_packets(self, host, packets, timeout=60):
        """Wait until the server's interface has sent so many frames since the laboratory was built."""
        deadline = time.monotonic() + timeout
        # /sys would show the interfaces of our own namespace: the mount stays the same.
        columns = re.compile(host.interface + r":(?: +\d+){9} +(\d+)")
        while int(columns.search(host.run(["cat", "/proc/net/dev"], capture_output=True,
                                          universal_newlines=True).stdout).group(1)) < packets:
            assert time.monotonic() < deadline, "%r sent less than %d packets\n%s" % (host, packets, self)
            time.sleep(0.02)

    def produce_until_said(self, words, timeout=120):
        """Produce an image for a server whose stdin is a pipe until it has said these words; a regular expression.

        What decides when it says them is how it fares, and on a busy machine that may take longer.
        """
        deadline, produced = time.monotonic() + timeout, 0
        while not re.search(words, self.server.stderr):
            assert time.monotonic() < deadline, "%r was not said\n%s" % (words, self)
            self.server.popen.stdin.write(IMAGE[:MIB])
            produced += 1
        self.server.popen.stdin.close()
        self.data = IMAGE[:MIB] * produced

    # --- the end ---

    def wait_end(self, *processes, timeout=60):
        """Wait until these processes have ended; return their exit codes. One that goes on for longer fails the test."""
        deadline = time.monotonic() + timeout
        for process in processes:
            if process.wait(max(0.1, deadline - time.monotonic())) is None:
                try:
                    process.finish(0)           # for the tracebacks
                except AssertionError as error:
                    raise AssertionError("%s\n%s" % (error, self))
        return [process.poll() for process in processes]

    def finish(self, timeout=60):
        """Wait until server and clients have ended, at most `timeout` seconds in all, and take all that they wrote."""
        deadline = time.monotonic() + timeout
        for process in [self.server] + self.clients:
            self.wait_end(process, timeout=max(0.1, deadline - time.monotonic()))
        for client in self.clients:
            if client.consumer:
                client.consumer.pace = None
                client.consumer.go_on()
            client.finish(10)
        self.server.finish(10)
        self.check_invariant()
        return self

    def check_invariant(self):
        """A client that exited 0 has exactly the server's bytes."""
        for client in self.clients:
            if client.code == 0 and (client.consumer or client.output):
                received = client.received()
                image = self.data if client.image is None else client.image
                # Compared outside of the assert: pytest would explain at length how two images of megabytes differ.
                equal = received == image
                assert equal, "%s exited 0 with %s bytes of %d, or with others\n%s" % (
                    client.host.name, "no" if received is None else len(received), len(image), self)

    def check_complete(self, *clients):
        """Fail unless these clients (none given: all, and then the server too) have exited 0 with the image."""
        if not clients:
            assert self.server.poll() == 0, str(self)
        for client in clients or self.clients:
            assert client.code == 0, "%s exited %s\n%s" % (client.host.name, client.code, self)
        self.check_invariant()

    def check_failed(self, *clients):
        """Fail unless these clients have exited 1, and without a crash."""
        for client in clients:
            assert client.code == 1, "%s exited %s\n%s" % (client.host.name, client.code, self)
            assert "Traceback" not in client.stderr and "internal error" not in client.stderr, str(self)

    def check_server(self, code, *hosts):
        """Fail unless the server exited with `code`, without a crash, and says that just these hosts lack the image."""
        said = self.server.stderr
        assert self.server.poll() == code, str(self)
        assert "Traceback" not in said and "internal error" not in said, str(self)
        named = [host["host"] for host in self.server.report()["hosts"] if host["result"] == "failed"]
        assert sorted(named) == sorted(host.name for host in hosts), str(self)

    def repair(self):
        """The packets of repair in the server's report: (by multicast, by TCP)."""
        summary = helpers.summary(self.server)
        return summary.coded, summary.by_tcp

    def __str__(self):
        parts = [("server", self.server)] + [(client.host.name, client) for client in self.clients] \
            + [("other", other) for other in self.others]
        return "\n".join("%s: exit %s, stderr:\n%s" % (name, process.poll(), process.stderr) for name, process in parts)


# ---------------------------------------------------------------------------------------------------------------------
# For tests of faults

#: An image, and rates at which it takes long enough to be disturbed: some 1.7 s and 3.5 s.
IMAGE = helpers.random_bytes(8000000, seed=3)
PACKETS = -(-len(IMAGE) // 1460)
RATE = ["--rate", "40M"]
SLOW = ["--rate", "20M"]

PATIENT = ["--stall-timeout", "0"]          # never: what the kernel notices is all that there is
IMPATIENT = ["--stall-timeout", "3"]        # seconds


def others(run, *out):
    """Return the clients of a deployment without those."""
    return [client for client in run.clients if client not in out]


def no_file(directory):
    """Fail if a client has left anything in the directory for its -o, be it under the final name or another one."""
    assert os.listdir(str(directory)) == []


def firewall(host, hook, rule):
    """Add a rule to a host's packet filter."""
    host.run(["nft", "-f", "-"], universal_newlines=True, input="table ip firewall {\n chain c {\n "
             "type filter hook %s priority 0;\n %s\n }\n}" % (hook, rule))
