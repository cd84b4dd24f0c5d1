"""With a key: nobody else joins, and only what the server vouches for is taken for the image.

All clients and servers are real processes on loopback; who attacks them is in this process.
"""

import hashlib
import os
import re
import socket
import stat
import struct
import sys
import threading

import pytest

import helpers
import wire
from helpers import LOOPBACK
from hostile import orderly, SPOOFED
from pythons import BOTH, in_turn, NEWEST, OLDEST
from wire import BYE, DONE, HELLO, INFO, PACKETS, PROOF, READY, REQUEST, SENT, SESSION, WELCOME, packet

KEY, OTHER = b"0123456789abcdef", b"0123456789abcdeg"
IMAGE = helpers.random_bytes(400000, seed=16)
PAGE_CLIENT = os.path.join(helpers.ROOT, "tests", "page_client.py")


@pytest.fixture
def keys(tmp_path):
    """Options for KEY, and for OTHER."""
    options = []
    for number, secret in enumerate((KEY, OTHER)):
        path = tmp_path / ("key%d" % number)
        path.write_bytes(secret)
        path.chmod(0o600)
        options.append(["--key", path])
    return options


# ---------------------------------------------------------------------------------------------------------------------
# Who holds the key takes part

@BOTH
@pytest.mark.parametrize("options", [[], ["--chain", "always"], ["--unicast", "--chain", "never"]])
def test_who_holds_the_key_gets_the_image(keys, python, options):
    helpers.transfer(IMAGE, 2, keys[0] + options, keys[0], python, [OLDEST, NEWEST]).check(IMAGE)


def test_what_is_lost_is_repaired_as_ever(keys):
    port = helpers.free_port()
    lossy = """import random
put = kmcast.ClientWindow.take
chance = random.Random(%d)
kmcast.ClientWindow.take = lambda self, batches, *rest: put(self, [one for one in batches if chance.random() > 0.3], *rest)
"""
    server = helpers.start_server(keys[0] + [LOOPBACK, 2, port], stdin=IMAGE)
    clients = [helpers.start_client(keys[0] + ["--datagrams", "mmsg", LOOPBACK, LOOPBACK, port], change=lossy % seed)
               for seed in range(2)]
    for client in clients:
        code, stderr, data = client.finish(60)
        assert code == 0 and data == IMAGE, stderr
        assert sum(helpers.repaired(client)) > 0
    assert server.finish(20)[0] == 0


def test_an_image_of_no_bytes_ends_with_a_voucher_too(keys):
    helpers.transfer(b"", 1, keys[0] + ["--allow-empty"], keys[0]).check(b"")


def test_a_client_written_from_the_protocol_page_takes_the_image(keys):
    with open(PAGE_CLIENT) as file:
        assert len(file.readlines()) < 200
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 2, port], stdin=IMAGE)
    ours = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port])
    page = helpers.start([sys.executable, PAGE_CLIENT, keys[0][1], LOOPBACK, port])
    for client in (ours, page):
        code, stderr, data = client.finish(60)
        assert (code, data == IMAGE) == (0, True), stderr
    assert server.finish(20)[0] == 0


def test_that_client_refuses_another_key(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    code, stderr, data = helpers.start([sys.executable, PAGE_CLIENT, keys[1][1], LOOPBACK, port]).finish(20)
    assert (code, data) == (1, b"") and "the keys differ" in stderr
    server.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Who does not, does not

def lines(stderr, part):
    return [line for line in stderr.splitlines() if part in line]


@BOTH
def test_a_wrong_key_is_one_line_on_both_sides_and_takes_no_place(keys, python):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], python, stdin=IMAGE)
    code, stderr, data = helpers.start_client(keys[1] + [LOOPBACK, LOOPBACK, port], python).finish(20)
    assert (code, data) == (3, b"")
    assert stderr == "kmcast client: error: the keys of server and client differ\n"
    right = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port], python)
    assert right.finish(30)[2] == IMAGE
    code, stderr, _ = server.finish(20)
    assert code == 0                            # it had no place, so it is missed by nobody
    assert len(lines(stderr, "differ")) == 1 and len(lines(stderr, "is here")) == 1
    assert KEY.decode() not in stderr and OTHER.decode() not in stderr


def test_a_client_whose_proof_is_wrong_is_refused_and_takes_no_place(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    for label in (wire.SERVER, wire.LAST_DONE):         # right proofs, for something else
        peer = wire.Client(port, key=KEY)
        peer.hello()
        message = peer.expect(WELCOME)
        peer.met += (message.raw,)
        peer.check_proof(wire.SERVER)
        peer.say(peer.prove(label))
        assert peer.reason() == "refused: the keys of server and client differ"
    right = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port])
    assert right.finish(30)[2] == IMAGE
    assert server.finish(20)[0] == 0


def test_a_client_without_a_key_is_told_that_it_takes_one(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    code, stderr, data = helpers.start_client([LOOPBACK, LOOPBACK, port]).finish(20)
    assert (code, data) == (3, b"") and "takes only clients that have its key" in stderr
    assert lines(server.stderr, "takes only clients that have its key") and not lines(server.stderr, "is here")


def test_a_client_with_a_key_is_told_that_the_server_has_none(keys):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], stdin=IMAGE)
    code, stderr, data = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port]).finish(20)
    assert (code, data) == (3, b"") and "has no key" in stderr
    assert lines(server.stderr, "has no key") and not lines(server.stderr, "is here")


def test_a_client_with_a_key_takes_no_session_without_one(keys):
    server = wire.Server()
    client = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, server.port])
    server.accept().greet()
    assert "has no key" in server.reason()
    code, stderr, data = client.finish(20)
    assert (code, data) == (3, b"") and "has no key" in stderr
    server.close()


@BOTH
def test_a_client_with_a_key_takes_nothing_from_a_server_of_the_base_protocol(keys, python):
    port = helpers.free_port()
    helpers.start_server(["--compat", LOOPBACK, 1, port], stdin=IMAGE)
    code, stderr, data = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port], python).finish(20)
    assert (code, data) == (3, b"") and "base protocol" in stderr


@pytest.mark.parametrize("option", ["--compat", "--no-digest"])
def test_a_key_where_nothing_could_be_proven_is_wrong_usage(keys, option):
    for args, env in ((keys[0], {}), ([], {"KMCAST_KEY_FILE": str(keys[0][1])})):
        code, stderr, _ = helpers.start_server(args + [option, LOOPBACK, 1, helpers.free_port()], stdin=IMAGE, env=env).finish(20)
        assert code == 2 and option in stderr


def test_a_server_with_another_key_that_answers_first_is_no_server(keys):
    """A rogue that answers at the server's address, faster than it."""
    port = helpers.free_port()
    rogue = helpers.start_server(keys[1] + [LOOPBACK, 1, port], stdin=b"rogue" * 1000)
    code, stderr, data = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port]).finish(20)
    assert (code, data) == (3, b""), stderr
    rogue.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Bounds

def test_an_address_has_five_attempts_in_a_second_and_then_hears_nothing(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE, change="kmcast.Attempts.PERIOD = 20.0")
    peers = []
    for _ in range(7):                          # all of them are there before the first one fails
        peer = wire.Client(port, key=KEY, address="127.0.0.7")
        peer.hello().expect(PROOF, WELCOME)
        peer.expect(PROOF)
        peers.append(peer)
    reasons = []
    for peer in peers:
        peer.say(PROOF + b"x" * 32)
        reasons.append(peer.reason())
    assert reasons == 5 * ["refused: the keys of server and client differ"] + 2 * [
        "refused: too many attempts with a wrong key"]
    with pytest.raises((wire.Unexpected, OSError)):     # not even the group info
        wire.Client(port, address="127.0.0.7")
    wire.Client(port, key=KEY, address="127.0.0.8").greet().close()     # others may
    server.wait_stderr("is here")
    server.stop()


def test_a_session_that_begins_with_too_long_a_hello_ends(keys):
    port = helpers.free_port()
    helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    peer = wire.Client(port, key=KEY)
    peer.say(HELLO + struct.pack("<I", 8192))
    assert "a HELLO of 8197 bytes" in peer.reason()


def test_who_does_not_prove_the_key_in_time_is_no_client(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE, change="kmcast.GREETING_TIME = 0.5")
    peer = wire.Client(port, key=KEY)
    peer.hello()
    assert "no proof of the key" in peer.reason(passing=(WELCOME, PROOF))
    right = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port])
    assert right.finish(30)[2] == IMAGE
    assert server.finish(20)[0] == 0


def test_who_comes_too_late_and_has_no_key_is_not_missed(keys):
    """Else whoever connects could have the server say that not all hosts have the image."""
    port = helpers.free_port()
    go = threading.Event()

    def chunks():
        yield IMAGE[:200000]
        go.wait(30)
        yield IMAGE[200000:]
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=chunks())
    client = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port])
    client.wait_stderr("connected to")
    server.wait_stderr("is here")
    for args in ([], keys[1]):
        assert helpers.start_client(args + [LOOPBACK, LOOPBACK, port]).finish(20)[0] == 3
    go.set()
    assert client.finish(30)[2] == IMAGE
    assert server.finish(20)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# --allow

def test_an_address_that_is_not_allowed_is_closed_before_a_byte():
    port = helpers.free_port()
    server = helpers.start_server(["--allow", "127.0.0.0/30,127.9.0.0/16", LOOPBACK, 2, port], stdin=IMAGE)
    for _ in range(30):
        with pytest.raises((wire.Unexpected, OSError)):
            wire.Client(port, address="127.0.0.4")
    peer = wire.Client(port, address="127.9.1.1").greet()
    client = helpers.start_client([LOOPBACK, LOOPBACK, port])
    client.wait_stderr("connected to")
    server.wait_stderr("2 of 2")
    peer.close()
    assert len(lines(server.stderr, "127.0.0.4: closed at once, --allow does not have it")) == 1
    server.stop()


@pytest.mark.parametrize("networks", ["10.0.0.1/24", "10.0.0.0/33", "10.0.0", "", "10.0.0.0/24,", "host", "10.0.0.0/-1"])
def test_what_is_no_network_is_wrong_usage(networks):
    code, stderr, _ = helpers.start_kmcast(["server", "--allow", networks, LOOPBACK, 1, helpers.free_port()]).finish(20)
    assert code == 2 and "--allow" in stderr


# ---------------------------------------------------------------------------------------------------------------------
# Somebody in the middle of the connection

class Recorder(wire.End):
    """An end whose messages are kept as bytes."""

    def __init__(self, *args, **options):
        wire.End.__init__(self, *args, **options)
        self.taken = b""

    def read(self, size):
        data = wire.End.read(self, size)
        self.taken += data
        return data

    def raw(self):
        """The bytes of what was read since the last call."""
        taken, self.taken = self.taken, b""
        return taken


class Cut(Exception):
    """Raised by who changes messages: the connection ends here."""


class Middle(object):
    """Somebody between clients and a server, who takes their connections apart into messages.

    change  function of (who says it: "server" or "client", its Message, its bytes, this connection) that returns what the other
            one hears. With the server's PACKETS go what is behind them. The group info has the kind None
    """

    def __init__(self, port, change, address=LOOPBACK):
        self._server_port, self._change, self._address = port, change, address
        self._listener = socket.socket()
        self._listener.bind((LOOPBACK, 0))
        self._listener.listen(20)
        self.port = self._listener.getsockname()[1]
        self.said = []                  # (who, Message, bytes as they came)
        self._to_client = None
        self._run(self._accept)

    @staticmethod
    def _run(function, *args):
        thread = threading.Thread(target=function, args=args)
        thread.daemon = True
        thread.start()

    def _accept(self):
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.socket()
            server.bind((self._address, 0))
            server.connect((LOOPBACK, self._server_port))
            ends = Recorder(server, hears_a_server=True), Recorder(client)
            self._to_client = ends[1]
            for end in ends:
                end.digest_size = 64
                end.sock.settimeout(120)
            ends[1].rounds, ends[0].asked = ends[0].rounds, {}
            self._run(self._pump, "server", ends[0], ends[1], ends[0])
            self._run(self._pump, "client", ends[1], ends[0], ends[0])

    def _pump(self, who, source, target, of_server):
        try:
            if who == "server":
                source.read(16)
                self._pass(who, wire.Message(None), source.raw(), target)
            while True:
                message = source.hear()
                if message.kind == WELCOME:
                    of_server.payload = message.fields["payload"]
                if who == "client" and message.kind == REQUEST:
                    of_server.asked[message.round.number] = message.places
                if who == "server" and message.kind == PACKETS:
                    what = message.round
                    for place in of_server.asked[what.number]:
                        source.read(min(of_server.payload, what.size - place * of_server.payload))
                self._pass(who, message, source.raw(), target)
        except (wire.Unexpected, Cut, OSError):
            pass
        for end in (source, target):
            try:
                end.sock.shutdown(socket.SHUT_RDWR if end is source else socket.SHUT_WR)
            except OSError:
                pass

    def _pass(self, who, message, data, target):
        self.said.append((who, message, data))
        target.say(self._change(who, message, data, self))

    def end_early(self, data):
        """Say something to the client of which the server knows nothing."""
        self._to_client.say(data)

    def close(self):
        self._listener.close()


def changed_at(data, place):
    """Bytes with one of them changed."""
    return data[:place] + struct.pack("B", bytearray(data)[place] ^ 1) + data[place + 1:]


def through_middles(keys, changes, image=IMAGE, python=None, options=(), others=1, stall=60):
    """A transfer of an image to clients of whom each has somebody in its middle, and `others` who have not.

    The latter must get the image, and from the server's view nobody else. Returns (code, stderr, data) of the former,
    and the server's stderr.
    """
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + ["--start-wait", 3, "--min-clients", others, "--stall-timeout", stall] + list(options)
                                  + [LOOPBACK, others + len(changes), port], python, stdin=image)
    middles = [Middle(port, change, "127.0.1.%d" % number) for number, change in enumerate(changes, 1)]
    right = [helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port], python) for _ in range(others)]
    deceived = [helpers.start_client(keys[0] + ["--wait", 0, "--stall-timeout", 10, LOOPBACK, LOOPBACK, middle.port], python)
                for middle in middles]
    ends = [client.finish(120) for client in deceived]
    for client in right:
        code, stderr, data = client.finish(60)
        assert code == 0 and data == image, stderr
    code, stderr, _ = server.finish(30)
    for middle in middles:
        middle.close()
    assert "%d of %d clients have the image" % (others, others + len(changes)) in stderr or others == 0, stderr
    orderly(stderr)
    return ends, stderr


def each_fails(ends, says, codes=(1, 3), image=IMAGE):
    """Fail unless no client has ended well, for one of the reasons that `says` has, a regular expression, and none has written
    what is not the image's beginning."""
    for code, stderr, data in ends:
        assert code in codes and image.startswith(data) and len(data) < len(image) + (code == 1), stderr
        assert len(lines(stderr, "error: ")) == 1 and re.search(says, stderr), stderr
        orderly(stderr)


def other_value(value):
    """Another value of the same kind, of the same length as text."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [value[0], value[1] ^ 1] if value else [[0, 1]]
    return "x" if value is None else ("1" if value[:1] == "0" else "0") + value[1:]


def fields_changed(kind, key):
    """A change of one field in HELLO or WELCOME."""
    def change(_who, message, data, _middle):
        if message.kind != kind or message.fields.get("ok") is False:
            return data
        return wire.frame(kind, dict(message.fields, **{key: other_value(message.fields[key])}))
    return change


def sent_changed(place):
    """A change of one byte in the first SERVER_SENT."""
    done = []

    def change(_who, message, data, _middle):
        if message.kind == SENT and not done:
            done.append(1)
            return changed_at(data, place)
        return data
    return change


@BOTH
def test_no_field_of_hello_and_welcome_can_be_changed_on_the_way(keys, python):
    hello = sorted(wire.hello_fields(nonce=0))
    welcome = sorted(wire.welcome_fields(nonce=0, seed=0))
    changes = [fields_changed(HELLO, key) for key in hello] + [fields_changed(WELCOME, key) for key in welcome]

    def without_a_nonce(_who, message, data, _middle):
        return wire.frame(WELCOME, wire.changed(message.fields, {"nonce": wire.ABSENT})) if message.kind == WELCOME else data

    def server_proof(who, message, data, _middle):
        return changed_at(data, 1) if message.kind == PROOF and who == "server" else data

    def client_proof(who, message, data, _middle):
        return changed_at(data, 32) if message.kind == PROOF and who == "client" else data

    def group_info(_who, message, data, _middle):
        return changed_at(data, 7) if message.kind is None else data

    def rewritten(_who, message, data, _middle):        # the same fields in other bytes
        return wire.frame(message.kind, dict(message.fields, more=1)) if message.kind in (HELLO, WELCOME) else data
    changes += [without_a_nonce, group_info, rewritten, server_proof, client_proof]
    ends, stderr = through_middles(keys, changes, python=python)
    each_fails(ends, "the keys of server and client differ|has no key|cannot join|no kmcast server", codes=(3,))
    assert len(lines(stderr, "is here")) == 1


@BOTH
def test_no_byte_of_sent_can_be_changed_on_the_way(keys, python):
    places = [0, 1, 2, 3, 4, 5, 6, 20, 36, 37, 38, 52, 67, 68]       # signal, number, digest, proof
    image = IMAGE[:30000]               # a round
    ends, _ = through_middles(keys, [sent_changed(place) for place in places], image, python)
    each_fails(ends[:1], "unknown signal|protocol error", image=image)
    each_fails(ends[1:5], "out of turn", image=image)
    each_fails(ends[5:], "not vouched for", image=image)
    assert all(data == b"" for _, _, data in ends)


def test_what_is_not_vouched_for_cannot_end_the_transfer_well(keys):
    def no_proof(_who, message, data, _middle):
        return wire.frame(BYE, wire.changed(message.fields, {"proof": wire.ABSENT})) if message.kind == BYE else data

    def change_of(key):
        return fields_changed(BYE, key)

    def cut_the_end(who, message, data, _middle):
        if message.kind == BYE:
            raise Cut
        return data

    def cut_sent(who, message, data, _middle):
        if message.kind == SENT and message.round.number == 2:
            raise Cut
        return data

    def early_end(who, message, data, middle):
        """All rounds from the third on are kept back, and the end is said instead, with the proof of the true one."""
        if message.kind in (INFO, SENT) and who == "server" and message.round.number > 1:
            return b""
        if message.kind == DONE and message.round.number == 1:
            digest = hashlib.sha256(IMAGE[:2 * 64 * 1460])
            # To the client, behind what the server has said.
            middle.end_early(wire.bye(True, bytes=2 * 64 * 1460, sha256=digest.hexdigest(), proof="0" * 64))
        return data
    ends, _ = through_middles(keys, [no_proof, change_of("bytes"), change_of("sha256"), change_of("proof"), cut_the_end, cut_sent,
                                     early_end], options=["--buffer-packets", 64])
    each_fails(ends[:4], "the end is not vouched for|the image has|digest|a proper .(sha256|bytes|proof)")
    each_fails(ends[4:6], "lost the server")
    each_fails(ends[6:], "the end is not vouched for")


def test_rounds_cannot_be_swapped_or_moved(keys):
    image = IMAGE[:64 * 1460 * 3]

    def swapped(_who, message, data, middle):
        """What is sent of the second round for the first, and the reverse; all else is as it was, so that the rounds fit."""
        if message.kind != SENT or message.round.number > 1:
            return data
        if len([1 for _, other, _ in middle.said if other.kind == SENT]) == 1:
            return b""
        first, second = [said for _, other, said in middle.said if other.kind == SENT][:2]
        return first[:5] + second[5:] + second[:5] + first[5:]

    def moved(who, message, data, _middle):
        if who == "server" and message.kind == INFO and message.round.number == 1:
            return SESSION.info(message.round._replace(place=message.round.place + 1460))
        return data

    def smaller(who, message, data, _middle):
        if who == "server" and message.kind == INFO and message.round.number == 2:      # which is the last one
            return SESSION.info(message.round._replace(size=message.round.size - 4))
        return data

    def an_old_sent(who, message, data, middle):
        if who == "server" and message.kind == SENT and message.round.number == 1:
            old, = [said for whose, other, said in middle.said if other.kind == SENT and other.round.number == 0][:1]
            return old[:1] + data[1:5] + old[5:]
        return data
    ends, _ = through_middles(keys, [swapped, moved, smaller, an_old_sent], image, options=["--buffer-packets", 64, "--rate", "100M"], stall=10)
    each_fails(ends[:1] + ends[2:], "not vouched for", image=image)
    each_fails(ends[1:2], "out of turn", image=image)


def test_a_server_believes_the_last_done_of_nobody_who_cannot_prove_it(keys):
    def ends_it_for_the_client(who, message, data, middle):
        if who == "client" and message.kind == REQUEST:
            return b""
        if who == "client" and message.kind == PROOF and len([1 for whose, other, _ in middle.said
                                                              if whose == "client" and other.kind == PROOF]) > 1:
            return b""                  # it would prove it, and does not get through
        return data
    ends, stderr = through_middles(keys, [ends_it_for_the_client])
    assert ends[0][2] == IMAGE          # it had it all the same
    assert "without a proof" in stderr


def test_a_message_of_an_old_session_opens_no_new_one(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 2, port], stdin=IMAGE)
    middle = Middle(port, lambda who, message, data, middle: data)
    client = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, middle.port])
    server.wait_stderr("1 of 2")
    hello, its_proof = [data for who, message, data in middle.said if who == "client"]
    assert (hello[:1], its_proof[:1]) == (HELLO, PROOF)
    peer = wire.Client(port)            # to the same server, while it waits
    peer.say(hello)
    for kind in (WELCOME, PROOF):
        peer.expect(kind)
    peer.say(its_proof)
    assert peer.reason() == "refused: the keys of server and client differ"
    assert "2 of 2" not in server.stderr
    last = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port])
    for each in (client, last):
        assert each.finish(30)[2] == IMAGE
    assert server.finish(20)[0] == 0

    # What the server said, to a new client; the packets come by TCP, as a recording has them.
    recorded = [data for who, message, data in middle.said if who == "server"]
    middle.close()
    replaying = socket.socket()
    replaying.bind((LOOPBACK, 0))
    replaying.listen(1)
    client = helpers.start_client(keys[0] + ["--wait", 0, LOOPBACK, LOOPBACK, replaying.getsockname()[1]])
    sock = replaying.accept()[0]
    sock.sendall(b"".join(recorded))
    code, stderr, data = client.finish(20)
    assert (code, data) == (3, b"") and "the keys of server and client differ" in stderr
    for each in (sock, replaying):
        each.close()


# ---------------------------------------------------------------------------------------------------------------------
# Forged datagrams

def forge(sock, what, welcome, every):
    """Multicast packets of a Round, one of so many, that are right but for their bytes: a forger reads the salt off the wire."""
    for place in range(0, what.count, every):
        size = min(welcome["payload"], what.size - place * welcome["payload"])
        sock.send(packet(what.base + place, (b"forged" * size)[:size], welcome["salt"]))


#: Of a client: one round follows the other, so that what is forged for one comes before all that the server sends of it.
ONE_BY_ONE = "kmcast.SessionDialect.window = 1\n"


def forged_transfer(keys, change, every=1, options=(), clients=1, python=None, image=IMAGE):
    """A transfer to a client whose packets are forged, all or every so many of each round, as soon as it is ready for it.

    Returns the client's (code, stderr, data), its Process and the server's stderr.
    """
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + ["--buffer-packets", 64] + list(options) + [LOOPBACK, clients, port], python,
                                  stdin=image)
    sock = wire.group_sender(helpers.GROUP, port)
    heard = []

    def before_the_server(who, message, data, _middle):
        if message.kind == WELCOME:
            heard.append(message.fields)
        if who == "client" and message.kind == READY:       # without that the server does not multicast it
            forge(sock, message.round, heard[0], every)
        return data
    middle = Middle(port, before_the_server)
    client = helpers.start_client(keys[0] + ["-v", LOOPBACK, LOOPBACK, middle.port], python, change=ONE_BY_ONE + change)
    others = [helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port], python) for _ in range(clients - 1)]
    result = client.finish(100)
    for other in others:
        code, stderr, data = other.finish(60)
        assert code == 0 and data == image, stderr
    assert server.finish(30)[0] == 0
    middle.close()
    sock.close()
    return result, client, server.stderr


@BOTH
def test_packets_forged_from_another_address_are_ignored(keys, python):
    (code, stderr, data), _, _ = forged_transfer(keys, "", python=python)
    assert (code, data == IMAGE) == (0, True), stderr
    assert "came damaged" not in stderr


@BOTH
def test_packets_forged_from_the_servers_address_are_asked_for_again(keys, python):
    image = IMAGE[:64 * 1460 * 3]       # fewer rounds than make it listen no more
    (code, stderr, data), client, _ = forged_transfer(keys, SPOOFED, every=7, python=python, image=image)
    assert (code, data == image) == (0, True), stderr
    assert "came damaged" in stderr and sum(helpers.repaired(client)) >= 3 * 64 // 7


@BOTH
def test_who_gets_forged_packets_round_after_round_goes_on_by_tcp_and_says_so(keys, python):
    image = helpers.random_bytes(64 * 1460 * 30, seed=3)
    (code, stderr, data), client, _ = forged_transfer(keys, SPOOFED, every=3, python=python, clients=2, image=image)
    assert (code, data == image) == (0, True), stderr
    assert len(lines(stderr, "forged in 4 rounds one after the other")) == 1
    carried = client.report()["carried"]
    assert carried["multicast"] <= 4 * 64 * 1460
    assert carried["chain"] > 0                 # from the other client, which hears multicast, and not at its expense


#: Of a client: who forges has met the CRC-32 of each packet as well.
BLIND = "kmcast.Buffer.differing = lambda self, sums: 0\n"


@BOTH
def test_a_round_whose_checksums_are_all_right_is_asked_for_whole(keys, python):
    image = IMAGE[:64 * 1460 * 2]
    (code, stderr, data), client, _ = forged_transfer(keys, SPOOFED + BLIND, every=7, python=python, image=image)
    assert (code, data == image) == (0, True), stderr
    assert helpers.repaired(client) == (0, 128)


def test_and_if_that_is_not_the_image_either_the_client_fails(keys):
    server = wire.Server(key=KEY, payload=100)
    client = helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, server.port])
    server.accept().greet()
    what = server.start_round(b"x" * 300)
    server.cast(*[packet(place, b"y" * 100) for place in range(3)])
    server.say(server.sent())
    for asked in (range(3), None):
        server.expect(wire.SUMS)
        server.say(SESSION.sums(what, wire.sums_of(3 * [b"y" * 100])))
        if asked:
            assert server.asked() == list(asked)
            server.say(SESSION.packets(what, 3 * [b"y" * 100]))
    assert "the digest differs" in server.reason()
    code, stderr, data = client.finish(20)
    assert (code, data) == (1, b"")
    server.close()


#: Of a client: it lies to its follower.
LIAR = """next = kmcast.Forwarding.next
def lie(self):
    found = next(self)
    if found and found[1] is not None:
        found[0].buffer.lie = found[1], found[2]
    return found
kmcast.Forwarding.next = lie
view = kmcast.Buffer.view
def forged(self, first, last):
    if getattr(self, 'lie', None) == (first, last):
        self.lie = None
        return memoryview(b'lie' * (len(view(self, first, last)) // 3 + 1))[:len(view(self, first, last))]
    return view(self, first, last)
kmcast.Buffer.view = forged
"""


def test_what_another_client_brings_is_believed_no_more_than_a_datagram(keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + ["--unicast", LOOPBACK, 3, port], stdin=IMAGE)
    clients = [helpers.start_client(keys[0] + [LOOPBACK, LOOPBACK, port], change=LIAR) for _ in range(3)]
    for client in clients:
        code, stderr, data = client.finish(60)
        assert code == 0 and data == IMAGE, stderr
    assert sum(client.report()["carried"]["chain"] for client in clients) > 0
    assert sum(client.report()["carried"]["tcp"] for client in clients) > len(IMAGE)
    assert server.finish(20)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Where a key comes from

def kmcast(*args, **options):
    """Run it; returns (code, stderr, stdout)."""
    return helpers.start_kmcast(list(args), **options).finish(30)


@BOTH
def test_a_new_key_is_for_its_owner_alone(tmp_path, python):
    made = set()
    for name in ("one", "two"):
        with open(str(tmp_path / name), "wb") as file:
            assert kmcast("key", python=python, stdout=file)[:2] == (0, "")
        assert stat.S_IMODE(os.stat(str(tmp_path / name)).st_mode) == 0o600
        made.add((tmp_path / name).read_bytes())
    assert len(made) == 2 and all(len(key) == 65 for key in made)
    helpers.transfer(IMAGE, 1, ["--key", tmp_path / "one"], ["--key", tmp_path / "one"], python, python).check(IMAGE)


def test_a_key_that_cannot_be_written_is_a_failure():
    with open("/dev/full", "wb") as full:
        code, stderr, _ = kmcast("key", stdout=full)
    assert code == 1 and "cannot write the key" in stderr


@in_turn("mode, secret, says", [
    (0o640, KEY, "can be read by others"), (0o604, KEY, "can be read by others"), (0o666, KEY, "can be read by others"),
    (0o600, KEY[:15], "has 15 bytes; it takes 16"), (0o600, b"", "has 0 bytes"), (0o600, b"x" * 65537, "has more"),
    (None, None, "No such file")])
def test_what_is_no_key_is_wrong_usage(tmp_path, python, mode, secret, says):
    path = tmp_path / "key"
    if secret is not None:
        path.write_bytes(secret)
        path.chmod(mode)
    for command in (["server", "--key", path, LOOPBACK, 1], ["client", "--key", path, LOOPBACK, LOOPBACK]):
        code, stderr, _ = kmcast(*command + [helpers.free_port()], python=python)
        assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, stderr


def test_a_directory_is_no_key(tmp_path):
    (tmp_path / "key").mkdir(mode=0o700)
    code, stderr, _ = kmcast("client", "--key", tmp_path / "key", LOOPBACK, LOOPBACK)
    assert code == 2 and "Is a directory" in stderr


def test_a_trailing_newline_is_part_of_the_key(tmp_path, keys):
    (tmp_path / "key").write_bytes(KEY + b"\n")
    (tmp_path / "key").chmod(0o600)
    port = helpers.free_port()
    helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    code, stderr, _ = kmcast("client", "--key", tmp_path / "key", LOOPBACK, LOOPBACK, port)
    assert code == 3 and "keys of server and client differ" in stderr


@BOTH
def test_a_key_comes_by_descriptor_by_standard_input_and_by_environment(tmp_path, keys, python):
    def script(words, **env):
        return helpers.start(["sh", "-c", words, "sh", python, helpers.KMCAST, LOOPBACK, str(port)],
                             env=dict({"SECRET": KEY.decode()}, **env))
    port = helpers.free_port()
    (tmp_path / "image").write_bytes(IMAGE)
    server = script('printf %s "$SECRET" | "$1" "$2" server --key - -i ' + str(tmp_path / "image") + ' "$3" 2 "$4"')
    clients = [script('printf %s "$SECRET" | "$1" "$2" client --key fd:3 "$3" "$3" "$4" 3<&0 </dev/null'),
               script('"$1" "$2" client "$3" "$3" "$4"', KMCAST_KEY_FILE=str(keys[0][1]))]
    for client in clients:
        code, stderr, data = client.finish(60)
        assert code == 0 and data == IMAGE, stderr + server.stderr
    assert server.finish(20)[0] == 0


@pytest.mark.parametrize("name, says", [("", "KMCAST_KEY_FILE is empty"), ("/nonexistent", "No such file"), ("-", "No such file")])
def test_an_environment_that_names_no_key_is_wrong_usage(tmp_path, name, says):
    code, stderr, _ = kmcast("client", LOOPBACK, LOOPBACK, env={"KMCAST_KEY_FILE": name}, cwd=str(tmp_path))
    assert code == 2 and says in stderr


@pytest.mark.parametrize("name", ["-", "fd:0"])
def test_a_server_whose_image_is_standard_input_takes_no_key_from_there(name):
    code, stderr, _ = kmcast("server", "--key", name, LOOPBACK, 1, stdin=IMAGE)
    assert code == 2 and "standard input is the image" in stderr


def test_a_command_does_not_inherit_the_descriptor_of_the_key(tmp_path, keys):
    port = helpers.free_port()
    server = helpers.start_server(keys[0] + [LOOPBACK, 1, port], stdin=IMAGE)
    client = helpers.start(["sh", "-c", '"$1" "$2" client --key fd:9 --pipe "cat >/dev/null; ls /proc/self/fd >&2" "$3" "$3" "$4" 9<"$5"',
                            "sh", OLDEST, helpers.KMCAST, LOOPBACK, str(port), str(keys[0][1])])
    code, stderr, _ = client.finish(30)
    assert code == 0 and "\n0\n" in stderr and "\n9\n" not in stderr, stderr
    server.finish(20)


@BOTH
def test_the_key_is_in_no_log_and_no_report(tmp_path, keys, python):
    said = helpers.transfer(IMAGE, 1, keys[0] + ["-v", "--log", tmp_path / "s.log", "--report", tmp_path / "s.json"],
                            keys[0] + ["-v", "--log", tmp_path / "c.log", "--report", tmp_path / "c.json"], python, python)
    texts = [said.server.stderr, said.clients[0].stderr] + [
        (tmp_path / name).read_text() for name in ("s.log", "s.json", "c.log", "c.json")]
    assert said.server.code == 0 and all(texts)
    assert not [text for text in texts if KEY.decode() in text or KEY.hex() in text]
