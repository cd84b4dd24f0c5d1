"""A client whose transfer fails, or never starts, completes the image by HTTP: `--fallback URL`."""

import hashlib
import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import threading
import time

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import BOTH, in_turn, NEWEST, OLDEST

IMAGE = helpers.random_bytes(3000000, seed=15)
OTHER = helpers.random_bytes(3000000, seed=16)


class Web(object):
    """An HTTP server that has an image, and whose ways can be changed.

    image, tag  what it has now, and its ETag
    ranges      whether it knows of Range
    cuts        after so many bytes of an answer it breaks: one number for each of the first requests
    stalls      as `cuts`, but it goes silent
    busy        so many first requests are answered by 503, with retry_after where that is not None
    chunks      whether an answer goes in chunks, and so does not say how long it is
    asked       (path, Range, If-Range) of each request
    """

    def __init__(self, certificate=None):
        self.image, self.tag, self.ranges, self.length, self.busy = IMAGE, '"1"', True, True, 0
        self.retry_after, self.chunks = None, False
        self.cuts, self.stalls, self.asked, self.redirects = [], [], [], {}
        self.after = lambda: None
        self.over = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            @property
            def protocol_version(self):
                return "HTTP/1.1" if web.chunks else "HTTP/1.0"

            def do_GET(self):
                web.answer(self)

            def log_message(self, *_args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_args):
                pass                    # who hangs up early, or does not trust us

        self.server = Server((LOOPBACK, 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server.server_address[1]
        self.url = "%s://%s:%d/image" % ("https" if certificate else "http", LOOPBACK, self.port)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request):
        number, wanted = len(self.asked), request.headers.get("Range")
        self.asked.append((request.path, wanted, request.headers.get("If-Range")))
        image, tag, start, stop = self.image, self.tag, 0, len(self.image)
        if request.path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[request.path])
            request.end_headers()
            return
        if self.busy:
            self.busy -= 1
            request.send_response(503)
            if self.retry_after is not None:
                request.send_header("Retry-After", self.retry_after)
            request.end_headers()
            return
        if request.path != "/image":
            request.send_error(404)
            return
        if wanted and self.ranges and request.headers.get("If-Range") in (None, tag):
            first, last = re.match(r"bytes=(\d+)-(\d*)$", wanted).groups()
            start, stop = int(first), int(last) + 1 if last else stop
            if start >= len(image):
                request.send_response(416)
                request.send_header("Content-Range", "bytes */%d" % len(image))
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", "bytes %d-%d/%d" % (start, stop - 1, len(image)))
        else:
            request.send_response(200)
        if tag:
            request.send_header("ETag", tag)
        if self.chunks:
            request.send_header("Transfer-Encoding", "chunked")
        elif self.length:
            request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        ends = self.cuts[number] if number < len(self.cuts) else None
        quiet = self.stalls[number] if number < len(self.stalls) else None
        cut = min([stop] + [start + size for size in (ends, quiet) if size is not None])
        if self.chunks:
            for place in range(start, cut, 70001):
                piece = image[place:min(cut, place + 70001)]
                request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            request.wfile.write(b"0\r\n\r\n" if cut == stop else b"")
        else:
            request.wfile.write(image[start:cut])
        request.wfile.flush()
        if quiet is not None:
            self.over.wait(60)
        if ends is not None:
            self.after()

    def ranges_asked(self):
        return [wanted for _, wanted, _ in self.asked]

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web():
    made = Web()
    yield made
    made.close()


class Feed(object):
    """An image that comes to a server as far as it is let."""

    def __init__(self, size):
        self.size, self.over = size, threading.Event()

    def __iter__(self):
        for start in range(0, self.size, 1 << 16):
            yield IMAGE[start:min(self.size, start + (1 << 16))]
        self.over.wait(60)              # the producer is at it


def alone(web, python, *args, **options):
    """A client for which there is no server."""
    return helpers.start_client(["--wait", 1, "--fallback", web.url] + list(args) + [LOOPBACK, LOOPBACK, helpers.free_port()],
                                python, **options)


def good(client, data=IMAGE):
    code, stderr, output = client.finish(60)
    assert code == 0, stderr
    assert output == data
    return stderr


def bad(client, words, code=1):
    ended, stderr, output = client.finish(60)
    assert ended == code, stderr
    assert words in stderr
    return output


# ---------------------------------------------------------------------------------------------------------------------
# It never starts

@BOTH
def test_without_a_server_all_comes_by_http(web, python):
    stderr = good(alone(web, python))
    assert "nothing but HTTP tells whether it is right" in stderr and hashlib.sha256(IMAGE).hexdigest() in stderr


@BOTH
def test_a_file_and_a_command_get_it_too(web, python, tmp_path):
    path = tmp_path / "file"
    assert alone(web, python, "-o", path).finish(60)[0] == 0
    assert path.read_bytes() == IMAGE and os.listdir(str(tmp_path)) == ["file"]
    good(alone(web, python, "--pipe", "cat"))


@BOTH
def test_a_command_is_not_started_where_there_is_nothing_for_it(web, python, tmp_path):
    web.url += "s"
    bad(alone(web, python, "--pipe", "touch %s; cat" % (tmp_path / "begun")), "HTTP status 404", 3)
    assert os.listdir(str(tmp_path)) == []


def with_a_server(web, python, tmp_path, server_args, client_args=()):
    """A client of a real server."""
    port = helpers.free_port()
    server = helpers.start_kmcast(list(server_args) + [port], python, stdin=IMAGE)
    server.wait_stderr("waiting for")
    return helpers.start_client(["--fallback", web.url] + list(client_args) + [LOOPBACK, LOOPBACK, port], python)


@BOTH
def test_who_is_refused_gets_it_by_http(web, python, tmp_path):
    (tmp_path / "hosts").write_text("another")
    stderr = good(with_a_server(web, python, tmp_path, ["server", "--hosts", tmp_path / "hosts", LOOPBACK]))
    assert "refused: it is not on the list of hosts; going on by HTTP" in stderr


@BOTH
def test_an_image_that_is_not_the_expected_one_is_not_fetched_from_elsewhere(web, python, tmp_path):
    bad(with_a_server(web, python, tmp_path, ["server", "--name", "image", LOOPBACK, 1], ["--expect-name", "other"]),
        "(--expect-name)", 3)
    assert not web.asked


@BOTH
def test_nothing_is_fetched_in_a_rehearsal(web, python, tmp_path):
    path = tmp_path / "file"
    client = with_a_server(web, python, tmp_path, ["check", "--minutes", "0.01", LOOPBACK, 1], ["-o", path])
    assert client.finish(60)[0] == 0 and not web.asked and not path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# It fails: real servers, killed

KILLED = {"at 0 %": 0, "in the middle": 1500000, "in the last round": len(IMAGE)}


def killed(web, python, size, clients, output=()):
    """Clients of a server that is killed when they have so much; the sizes of the ranges that they ask for."""
    port, feed = helpers.free_port(), Feed(size)
    places = clients if size else clients + 1
    server = helpers.start_server(["--buffer-packets", 100, LOOPBACK, places, port], python, stdin=iter(feed))
    args = ["-v", "--wait", 1, "--fallback", web.url, LOOPBACK, LOOPBACK, port]
    started = [helpers.start_client(list(output[number] if output else []) + args, python) for number in range(clients)]
    for client in started:
        client.wait_stderr("connected")
        if size:
            client.wait_begun()
    if size:
        time.sleep(1)                   # what there is of the image gets there
    server.stop()
    feed.over.set()
    return started


@in_turn("size", list(KILLED.values()), ids=list(KILLED))
def test_a_stream_goes_on_where_a_killed_server_left_it(web, python, size):
    client, = killed(web, python, size, 1)
    stderr = good(client)
    asked = web.ranges_asked()
    if size:
        assert len(asked) == 1 and int(re.match(r"bytes=(\d+)-$", asked[0]).group(1)) > 0
        assert "verified by the server's SHA-256" in stderr
    else:
        assert asked == [None]


@in_turn("size", list(KILLED.values()), ids=list(KILLED))
def test_a_file_is_completed_after_a_killed_server(web, python, size, tmp_path):
    path = tmp_path / "file"
    client, = killed(web, python, size, 1, [["-o", path]])
    code, stderr, _ = client.finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == IMAGE and os.listdir(str(tmp_path)) == ["file"]


@pytest.mark.parametrize("size", list(KILLED.values()), ids=list(KILLED))
def test_twenty_clients_fall_back_at_once(web, size, tmp_path):
    paths = [tmp_path / str(number) for number in range(10)]
    clients = killed(web, NEWEST, size, 20, [["-o", path] for path in paths] + [[]] * 10)
    for client in clients[10:]:
        good(client)
    for path, client in zip(paths, clients):
        code, stderr, _ = client.finish(60)
        assert code == 0, stderr
        assert path.read_bytes() == IMAGE
    assert sorted(os.listdir(str(tmp_path))) == sorted(path.name for path in paths)
    assert len(web.asked) == 20


# ---------------------------------------------------------------------------------------------------------------------
# Ranges out of order

PARTS = [(start, min(start + 500000, len(IMAGE))) for start in range(0, len(IMAGE), 500000)]


def holding(web, python, path, *numbers, **options):
    """A client with -o that got these of PARTS from a server that is gone then."""
    server = wire.Server(image="0123456789abcdef" * 2, again=True, size=options.get("size", len(IMAGE)))
    client = helpers.start_client(["-v", "--wait", 1, "--fallback", web.url, "-o", path, LOOPBACK, LOOPBACK, server.port],
                                  python)
    server.accept().greet()
    for number in numbers:
        server.bring(IMAGE, *PARTS[number])
    server.close()
    return client


@BOTH
def test_a_file_with_ranges_out_of_order_takes_what_is_missing(web, python, tmp_path):
    path = tmp_path / "file"
    code, stderr, _ = holding(web, python, path, 4, 2, 0).finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == IMAGE
    ranges = [[int(number) for number in re.findall(r"\d+", wanted)] for wanted in web.ranges_asked()]
    assert [pair[-1] + 1 for pair in ranges[1:]] == [2000000, 3000000]
    assert [pair[0] for pair in ranges[1:]] == [1500000, 2500000]
    assert "the first 2500000 bytes verified by the server's SHA-256" in stderr


@BOTH
def test_an_image_that_does_not_fit_what_was_told_is_no_success(web, python, tmp_path):
    web.image = OTHER[:1000] + IMAGE[1000:600000] + b"X" + IMAGE[600001:]
    code, stderr, _ = holding(web, python, tmp_path / "file", 2, 0).finish(60)
    assert code == 1 and "do not fit the server's SHA-256" in stderr, stderr
    assert os.listdir(str(tmp_path)) == []


@BOTH
def test_a_length_that_differs_is_no_success(web, python, tmp_path):
    web.image = IMAGE + b"more"
    code, stderr, _ = holding(web, python, tmp_path / "file", 0).finish(60)
    assert code == 1 and "of 3000004 bytes, not 3000000" in stderr, stderr
    assert os.listdir(str(tmp_path)) == []


@BOTH
def test_another_image_of_the_same_length_is_known_by_what_is_here(web, python, tmp_path):
    web.image = OTHER
    code, stderr, _ = holding(web, python, tmp_path / "file", 0).finish(60)
    assert code == 1 and "differ from what is here" in stderr, stderr
    assert os.listdir(str(tmp_path)) == []


@BOTH
def test_another_image_is_not_sewn_to_a_stream(web, python):
    web.image = OTHER
    client, = killed(web, python, 1500000, 1)
    assert IMAGE.startswith(bad(client, "differ from what is here"))


# ---------------------------------------------------------------------------------------------------------------------
# What an earlier run has left, and no server comes

def left(python, path, *numbers):
    """Have a client with --resume get these of PARTS, and kill it."""
    server = wire.Server(image="0123456789abcdef" * 2, again=True, size=len(IMAGE))
    client = helpers.start_client(["--resume", "-o", path, LOOPBACK, LOOPBACK, server.port], python)
    server.accept().greet()
    for number in numbers:
        server.bring(IMAGE, *PARTS[number])
    journal, = [name for name in os.listdir(str(path.parent)) if name.endswith(".journal")]
    deadline = time.time() + 20
    while (path.parent / journal).read_bytes().count(b"wrote") < len(numbers):
        assert time.time() < deadline
        time.sleep(0.01)
    client.stop()
    server.close()


def resumed(web, python, path):
    """What a client says that goes on with that, by HTTP, and has the image then."""
    client = alone(web, python, "-v", "--resume", "-o", path)
    code, stderr, _ = client.finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == web.image and os.listdir(str(path.parent)) == ["file"]
    return stderr, client.report()


@BOTH
@pytest.mark.parametrize("numbers, asks", [
    ([0, 1], [(1000000, 3000000)]), ([4, 2, 0], [(500000, 1000000), (1500000, 2000000), (2500000, 3000000)]),
    ([5, 3], [(0, 1500000), (2000000, 2500000)]), ([0, 1, 2, 3, 4, 5], [])],
    ids=["the beginning", "with gaps", "without the beginning", "all"])
def test_what_an_earlier_run_left_is_completed(web, python, tmp_path, numbers, asks):
    left(python, tmp_path / "file", *numbers)
    stderr, report = resumed(web, python, tmp_path / "file")
    assert report["resumed"] == 500000 * len(numbers)
    assert report["fallback"]["bytes"] == sum(stop - start for start, stop in asks)
    assert report["fallback"]["verified"] == 500000 * (1 + max(numbers))
    assert "%d bytes had been left by an earlier run" % report["resumed"] in stderr


@BOTH
def test_what_was_damaged_meanwhile_comes_again(web, python, tmp_path):
    left(python, tmp_path / "file", 0, 1, 2, 4)
    part, = [name for name in os.listdir(str(tmp_path)) if name.endswith(".part")]
    with open(str(tmp_path / part), "r+b") as file:
        for place in (700000, 2200000):
            file.seek(place)
            file.write(b"damaged")
    _, report = resumed(web, python, tmp_path / "file")
    assert 1500000 < report["fallback"]["bytes"] < len(IMAGE)


@BOTH
@pytest.mark.parametrize("numbers, size, words, code", [
    ([0, 1], len(IMAGE), "differ from what is here", 3), ([4, 2], len(IMAGE), "do not fit the server's SHA-256", 1),
    ([5], 2600000, "of 2600000 bytes, not at least 3000000", 3)], ids=["the beginning", "later parts", "the end"])
def test_what_was_left_of_another_image_is_not_sewn_to_this_one(web, python, tmp_path, numbers, size, words, code):
    left(python, tmp_path / "file", *numbers)
    web.image = OTHER[:size]
    ended, stderr, _ = alone(web, python, "--resume", "-o", tmp_path / "file").finish(60)
    assert ended == code and words in stderr and "left by an earlier run" in stderr, stderr
    assert "file" not in os.listdir(str(tmp_path))
    assert alone(web, python, "-o", tmp_path / "file").finish(60)[0] == 0
    assert (tmp_path / "file").read_bytes() == web.image and os.listdir(str(tmp_path)) == ["file"]


@BOTH
def test_it_starts_over_where_the_web_server_knows_of_no_ranges(web, python, tmp_path):
    left(python, tmp_path / "file", 0, 1, 4)
    web.ranges = False
    stderr, _ = resumed(web, python, tmp_path / "file")
    assert stderr.count("gives no part of the image") == 1 and "starting over" in stderr


@BOTH
def test_who_fails_then_too_leaves_it_for_the_next(web, python, tmp_path):
    left(python, tmp_path / "file", 0, 1)
    web.busy = 1000
    assert alone(web, python, "--resume", "-o", tmp_path / "file").finish(60)[0] == 3
    assert len(os.listdir(str(tmp_path))) == 2
    web.busy, web.cuts = 0, [0] * len(web.asked) + [100000]
    web.after = lambda: setattr(web, "busy", 1000)
    assert alone(web, python, "--resume", "-o", tmp_path / "file").finish(60)[0] == 1
    assert len(os.listdir(str(tmp_path))) == 2
    web.busy = 0
    _, report = resumed(web, python, tmp_path / "file")
    assert report["fallback"]["bytes"] == 2000000 and report["resumed"] == 1000000      # of the rest nobody told the digest


# ---------------------------------------------------------------------------------------------------------------------
# Web servers as they are

@BOTH
def test_a_connection_that_breaks_is_gone_on_with(web, python):
    web.cuts = [1000000, 0, 500000]
    good(alone(web, python))
    assert len(web.asked) >= 4 and web.asked[-1][2] == '"1"'
    assert int(re.findall(r"\d+", web.asked[-1][1])[0]) > 0


@BOTH
def test_a_server_that_stalls_is_asked_again(web, python):
    web.stalls = [1000000]
    good(alone(web, python, "--stall-timeout", 1))
    assert len(web.asked) == 2


@BOTH
def test_a_server_that_is_busy_is_asked_again(web, python):
    web.busy = 2
    good(alone(web, python))
    assert len(web.asked) == 3


@BOTH
def test_a_server_that_says_when_to_come_again_is_not_asked_before(web, python):
    web.busy, web.retry_after = 1, "2"
    stderr = good(alone(web, python, "--wait", 4))
    waits, = re.findall(r"HTTP status 503; trying again in (\S+) s", stderr)
    assert 2 <= float(waits) < 3 and len(web.asked) == 2


@BOTH
@pytest.mark.parametrize("retry_after", ["86400", "9" * 5000, "Fri, 31 Dec 1999 23:59:59 GMT"],
                         ids=["a day", "for ever", "a date"])
def test_it_is_waited_for_no_longer_than_wait_says(web, python, retry_after):
    web.busy, web.retry_after = 1000, retry_after
    bad(alone(web, python), "HTTP status 503", 3)
    assert len(web.asked) >= 2          # and once more when the time is over


@BOTH
def test_even_with_no_time_to_wait_it_tries_once_more(web, python):
    web.cuts = [1000000]
    good(alone(web, python, "--wait", 0))
    web.busy = 1000
    bad(alone(web, python, "--wait", 0), "HTTP status 503", 3)


@BOTH
def test_redirects_are_followed_and_not_for_ever(web, python):
    web.redirects = {"/here": "there", "/there": web.url}
    address = web.url
    web.url = address.replace("/image", "/here")
    good(alone(web, python))
    web.redirects["/there"] = "/here"
    bad(alone(web, python), "redirects too often", 3)


@BOTH
def test_without_range_a_stream_that_has_some_fails(web, python):
    web.ranges = False
    client, = killed(web, python, 1500000, 1)
    assert IMAGE.startswith(bad(client, "gives no part of the image"))


@BOTH
def test_without_range_a_file_starts_over_and_is_still_verified(web, python, tmp_path):
    web.ranges = False
    path = tmp_path / "file"
    code, stderr, _ = holding(web, python, path, 4, 0).finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == IMAGE and "starting over" in stderr
    assert "the first 2500000 bytes verified" in stderr


@BOTH
def test_an_image_that_is_replaced_is_not_mixed(web, python, tmp_path):
    def replace():
        web.image, web.tag = OTHER[:900000], '"2"'
    web.cuts, web.after = [1000000], replace
    bad(alone(web, python), "was replaced")
    web.image, web.tag = IMAGE, '"1"'
    del web.asked[:]
    path = tmp_path / "file"
    code, stderr, _ = alone(web, python, "-o", path).finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == OTHER[:900000]


@BOTH
def test_a_server_that_does_not_say_how_long_it_is_is_no_source(web, python):
    web.length = False
    bad(alone(web, python), "does not say how long", 3)


@BOTH
def test_an_answer_in_chunks_is_as_long_as_the_server_told(web, python, tmp_path):
    web.chunks = True
    path = tmp_path / "file"
    code, stderr, _ = holding(web, python, path, 4, 2, 0).finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == IMAGE
    web.ranges = False
    code, stderr, _ = holding(web, python, path, 4, 2, 0).finish(60)
    assert code == 0 and "starting over" in stderr, stderr
    assert path.read_bytes() == IMAGE


@BOTH
def test_one_that_ends_early_is_gone_on_with(web, python, tmp_path):
    web.chunks, web.cuts = True, [700000, 300000]
    path = tmp_path / "file"
    code, stderr, _ = holding(web, python, path, 0).finish(60)
    assert code == 0, stderr
    assert path.read_bytes() == IMAGE and len(web.asked) == 3


@BOTH
@pytest.mark.parametrize("size", [-1, 1], ids=["short", "long"])
def test_one_that_is_another_length_is_no_success(web, python, tmp_path, size):
    web.chunks, web.ranges = True, False
    web.image = IMAGE[:size] if size < 0 else IMAGE + b"X"
    code, stderr, _ = holding(web, python, tmp_path / "file", 0).finish(60)
    assert code == 1 and ("of more than 3000000 bytes" if size > 0 else "ended early") in stderr, stderr
    assert os.listdir(str(tmp_path)) == []


@BOTH
def test_if_nobody_tells_the_length_chunks_are_no_source(web, python):
    web.chunks = True
    bad(alone(web, python), "does not say how long", 3)


# ---------------------------------------------------------------------------------------------------------------------
# TLS

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, chain = str(folder / "key.pem"), str(folder / "cert.pem")
    subprocess.check_call(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", chain, "-days",
                           "2", "-subj", "/CN=image", "-addext", "subjectAltName=IP:127.0.0.1"], stderr=subprocess.DEVNULL)
    return chain, key


@BOTH
def test_tls_with_a_certificate_that_is_given(python, certificate):
    web = Web(certificate)
    try:
        good(alone(web, python, "--cafile", certificate[0]))
        bad(alone(web, python), "certificate", 3)
        web.url = web.url.replace(LOOPBACK, "localhost")
        bad(alone(web, python, "--cafile", certificate[0]), "localhost", 3)
    finally:
        web.close()


@pytest.mark.skipif(helpers.version_of(OLDEST)[0] > 2, reason="this is about Python 2.7.5")
def test_tls_on_a_python_that_has_no_contexts(certificate, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import ssl\ndel ssl.create_default_context\n")
    web = Web(certificate)
    try:
        env = {"PYTHONPATH": str(tmp_path)}
        good(alone(web, OLDEST, "--cafile", certificate[0], env=env))
        bad(alone(web, OLDEST, env=env), "ertificate", 3)
        web.url = web.url.replace(LOOPBACK, "localhost")
        bad(alone(web, OLDEST, "--cafile", certificate[0], env=env), "the certificate is not one of localhost", 3)
    finally:
        web.close()


# ---------------------------------------------------------------------------------------------------------------------
# What does not fall back

@BOTH
def test_a_signal_ends_it_and_nothing_is_left(web, python, tmp_path):
    web.stalls = [1000000]
    client = alone(web, python, "-o", tmp_path / "file")
    client.wait_stderr("3000000 bytes there")
    client.signal(signal.SIGTERM)
    code, stderr, _ = client.finish(60)
    assert code in (1, 3) and "stopped by SIGTERM" in stderr, stderr       # 3: before it wrote the first byte
    assert os.listdir(str(tmp_path)) == []


@BOTH
def test_an_output_that_fails_is_not_mended_by_http(web, python):
    port = helpers.free_port()
    helpers.start_server([LOOPBACK, 1, port], python, stdin=IMAGE)
    client = helpers.start_client(["--pipe", "head -c 1000 >/dev/null; exit 4", "--fallback", web.url, LOOPBACK, LOOPBACK, port],
                                  python)
    code, stderr, _ = client.finish(60)
    assert code == 1 and not web.asked, stderr


@BOTH
def test_an_expected_sha256_is_of_what_came_by_http(web, python):
    assert "all verified by --expect-sha256" in good(alone(web, python, "--expect-sha256", helpers.sha256(IMAGE)))
    bad(alone(web, python, "--expect-sha256", helpers.sha256(OTHER)), "and not %s (--expect-sha256)" % helpers.sha256(OTHER))


@BOTH
def test_a_url_that_is_none_is_wrong_usage(web, python):
    web.url = "ftp://host/image"
    bad(alone(web, python), "is not a URL", 2)


@BOTH
def test_the_report_tells_of_it(web, python, tmp_path):
    client = alone(web, python, "--report", tmp_path / "report")
    good(client)
    report = json.loads((tmp_path / "report").read_text())
    assert report["result"] == "complete" and report["reason"] is None and report["bytes"] == len(IMAGE)
    assert report["fallback"]["bytes"] == len(IMAGE) and report["fallback"]["verified"] == 0
    assert report["fallback"]["url"] == web.url and "no kmcast server" in report["fallback"]["reason"]
