"""What is wrong in kmcast itself, injected, ends a session in order; and seqs may wrap."""

import helpers
import wire
from helpers import LOOPBACK
from hostile import all_receive, IMAGE, wrapped
from pythons import BOTH, in_turn

# ---------------------------------------------------------------------------------------------------------------------
# Our own threads

RAISES = """
def broken(*args):
    if %s:
        raise ValueError('injected')
    return original(*args)
"""
BROKEN = {
    "on a HELLO": ("True", "TcpServer._on_hello"),
    "on READY": ("True", "ServerWindow.HANDLERS[kmcast.READY]"),
    "on a REQUEST": ("True", "ServerWindow.HANDLERS[kmcast.REQUEST]"),
    "on DONE": ("True", "ServerWindow.HANDLERS[kmcast.DONE]"),
    "in a step": ("args[1].kind == 'sent'", "TcpServer._begin"),
    "in the middle of the chain": ("args[0].number == 2 and args[1].kind == 'sent'", "TcpServer._begin"),
    "at the end of the chain": ("args[0].number == 3 and args[1].kind == 'sent'", "TcpServer._begin"),
    "in the last step": ("args[1].kind == 'finish'", "TcpServer._begin"),
    "at the clocks": ("args[0].window.awaited", "TcpServer._look_at_clocks"),
    "in the multicaster": ("args[0].course.rounds > 2", "Multicaster._multicast"),
}


@in_turn("where, a_thread", [(where, a_thread) for a_thread in (1, 64) for where in sorted(BROKEN)
                             if a_thread == 1 or "chain" not in where])
def test_a_thread_of_the_server_that_dies_ends_the_session_in_order(tmp_path, where, a_thread, python):
    condition, target = BROKEN[where]
    port = helpers.free_port()
    code = "original = kmcast.%s\n%skmcast.%s = broken" % (target, RAISES % condition, target)
    server = wrapped(code, ["server", "--rate", "50M", "--buffer-packets", 100, "--clients-per-thread", a_thread,
                            LOOPBACK, 3, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    through = network.path(helpers.loss(10))
    clients = [helpers.start_client(["--wait", 2, "-o", tmp_path / str(number), LOOPBACK, LOOPBACK, through],
                                    python=python) for number in range(3)]
    code, stderr, _ = server.finish(20)
    assert code == 1, stderr
    assert "internal error" in stderr and "injected" in stderr and "Traceback" not in stderr, stderr
    assert "0 of 3 clients have the image" in stderr
    for client in clients:
        code, client_stderr, _ = client.finish(20)
        assert code in (1, 3), client_stderr
        assert "Traceback" not in client_stderr
        if where != "on a HELLO":
            assert "the server" in client_stderr.splitlines()[-1], client_stderr
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_writer_of_a_client_that_dies_ends_it_in_order(tmp_path, python):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 2, port], python=python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    broken = wrapped("original = kmcast.Writer._write\n%skmcast.Writer._write = broken" % (RAISES % "args[0].copy.bytes > 100000"),
                     ["client", "-o", tmp_path / "image", LOOPBACK, LOOPBACK, port], python=python)
    client = helpers.start_client([LOOPBACK, LOOPBACK, port], python=python)
    code, stderr, _ = broken.finish(20)
    assert code == 1 and "injected" in stderr and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []
    code, stderr, received = client.finish(20)
    same = received == IMAGE
    assert code == 0 and same, stderr
    code, stderr, _ = server.finish(10)
    assert code == 3 and "it says: internal error" in stderr, stderr


# ---------------------------------------------------------------------------------------------------------------------
# More packets than can be numbered

NEAR_THE_WRAP = """
kmcast.Course.FIRST_SEQ = %d
original = kmcast.Course.__init__
def start(self, *args):
    original(self, *args)
    self.repair_number = %d
kmcast.Course.__init__ = start
"""


@in_turn("loss, before", [(loss, before) for before in (0, 1, 100, 2000) for loss in (0, 5, 100)])
def test_more_packets_than_a_seq_can_number(before, loss, python):
    """Near the wrap of seq, and of the repair number."""
    data, port = IMAGE[:2500001], helpers.free_port()
    server = wrapped(NEAR_THE_WRAP % ((wire.SEQS - before) % wire.SEQS, wire.REPAIR_BIT - 1 - before % 97), ["server", "-v", "--rate", "30M", LOOPBACK, 3, port],
                     python=python, stdin=data)
    server.wait_stderr("waiting for")
    network = helpers.Network(port)
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, network.path(helpers.loss(loss, seed=number))], python=python)
               for number in range(3)]
    all_receive(data, clients, server)
    code, stderr, _ = server.finish(10)
    assert code == 0, stderr
    if loss == 5:
        assert helpers.summary(server).coded > 0, stderr + "".join(client.stderr for client in clients)


def test_more_packets_than_a_seq_can_number_for_clients_of_the_base_protocol():
    data, port = IMAGE[:500001], helpers.free_port()
    server = wrapped(NEAR_THE_WRAP % (2**32 - 100, 0), ["server", "--compat", LOOPBACK, 2, port], stdin=data)
    server.wait_stderr("waiting for")
    clients = [helpers.start_client([LOOPBACK, LOOPBACK, port]) for _ in range(2)]
    all_receive(data, clients, server)
    assert server.finish(10)[0] == 0
