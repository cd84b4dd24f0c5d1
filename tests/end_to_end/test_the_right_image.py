"""The right image: one that is not what was expected is refused before anything is written, or fails; and sha256sum can tell."""

import os
import subprocess

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, in_turn

DATA = helpers.random_bytes(300000, seed=15)
DIGEST = helpers.sha256(DATA)


def receive(tmp_path, expect, server_args=("--name", "node-12.img"), python=None, size=True, base=False):
    """Start a server and a client with what it expects; returns (exit code, stderr) of the client."""
    (tmp_path / "image").write_bytes(DATA)
    port = helpers.free_port()
    source = ["-i", tmp_path / "image"] if size else ["--pipe", "cat %s" % (tmp_path / "image")]
    start = helpers.start_base_server if base else helpers.start_server
    args = [LOOPBACK, 1, port] if base else list(server_args) + source + [LOOPBACK, 1, port]
    server = start(args, stdin=DATA) if base else start(args, python)
    client = helpers.start_client(list(expect) + ["-o", tmp_path / "copy", LOOPBACK, LOOPBACK, port], python)
    code, stderr, _ = client.finish(30)
    if code == 3:                               # the server waits for another one
        if not base:
            server.wait_stderr("--expect")
        server.stop()
    else:
        server.finish(30)
    left = sorted(os.listdir(str(tmp_path)))
    assert left == (["copy", "image"] if code == 0 else ["image"]), left
    return code, stderr


@BOTH
def test_the_image_that_is_expected_is_taken(python, tmp_path):
    assert receive(tmp_path, ["--expect-name", "node-1?.img", "--expect-size", len(DATA), "--expect-sha256", DIGEST.upper()],
                   python=python)[0] == 0
    assert (tmp_path / "copy").read_bytes() == DATA


@in_turn("expect, said", [
    (["--expect-name", "node-2*"], "the image is node-12.img, and not node-2* (--expect-name)"),
    (["--expect-name", "NODE-12.img"], "node-12.img"),
    (["--expect-size", len(DATA) + 1], "the image has 300000 bytes, and not 300001 (--expect-size)")], ids=["name", "case", "size"])
def test_another_image_is_refused_before_anything_is_written(python, expect, said, tmp_path):
    code, stderr = receive(tmp_path, expect, python=python)
    assert code == 3 and said in stderr, stderr


def test_an_image_without_a_name_is_not_the_one_that_is_expected(tmp_path):
    code, stderr = receive(tmp_path, ["--expect-name", "*.img"], server_args=(), size=False)
    assert code == 3 and "without a name" in stderr, stderr


@in_turn("expect, said", [
    (["--expect-size", len(DATA) - 1], "300000 bytes, and not 299999"),
    (["--expect-sha256", "0" * 64], DIGEST)], ids=["size", "sha256"])
def test_what_is_known_only_at_the_end_fails_then(python, expect, said, tmp_path):
    code, stderr = receive(tmp_path, expect, (), python, size=False)
    assert code == 1 and said in stderr, stderr


@BOTH
def test_a_digest_that_nobody_can_tell_is_no_reason_to_take_the_image(python, tmp_path):
    code, stderr = receive(tmp_path, ["--expect-sha256", DIGEST], ["--no-digest"], python)
    assert code == 3 and "without digests" in stderr, stderr


@pytest.mark.parametrize("expect, code", [
    (["--expect-sha256", DIGEST], 0), (["--expect-sha256", "1" * 64], 1), (["--expect-size", 1], 1),
    (["--expect-name", "*"], 0), (["--expect-name", "?*"], 3)], ids=["sha256", "wrong-sha256", "wrong-size", "any-name", "name"])
def test_of_a_server_of_the_base_protocol_no_less_is_expected(expect, code, tmp_path):
    """Its own checksum is weak, and it tells neither name nor size."""
    assert receive(tmp_path, expect, base=True)[0] == code


def test_a_command_that_got_another_image_has_not_succeeded(tmp_path):
    port = helpers.free_port()
    server = helpers.start_server([LOOPBACK, 1, port], stdin=DATA)
    client = helpers.start_client(["--expect-sha256", "0" * 64, "--pipe", "cat > all && touch done", LOOPBACK, LOOPBACK, port],
                                  cwd=str(tmp_path))
    assert client.finish(30)[0] == 1 and server.finish(30)[0] == 1
    assert not (tmp_path / "done").exists()


@BOTH
def test_sha256sum_reads_what_both_ends_say(python, tmp_path):
    (tmp_path / "an image").write_bytes(DATA)
    port, directory = helpers.free_port(), str(tmp_path)
    server = helpers.start_server(["-i", "an image", LOOPBACK, 2, port], python, cwd=directory)
    client = helpers.start_client(["-o", "copy", LOOPBACK, LOOPBACK, port], python, cwd=directory)
    stream = helpers.start_client([LOOPBACK, LOOPBACK, port], python)

    def check(said, stdin=None):
        (tmp_path / "said").write_text(said)
        checker = subprocess.Popen(["sha256sum", "-c"] + ([str(tmp_path / "said")] if stdin else []), cwd=directory,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return checker.communicate(stdin or said.encode("ascii"))[0].decode("ascii")
    assert server.finish(30)[0] == 0
    assert "an image: OK" in check(server.stderr)
    assert "copy: OK" in check(client.finish(30)[1])
    _, said, data = stream.finish(30)
    assert "-: OK" in check(said, data)
    (tmp_path / "copy").write_bytes(DATA[:-1] + b"?")
    assert "copy: FAILED" in check(client.stderr)


def test_a_quiet_end_and_one_that_fails_say_no_digest(tmp_path):
    result = helpers.transfer(DATA, server_args=["-q"], client_args=["-q"])
    assert result.server.stderr == result.clients[0].stderr == ""
    result = helpers.transfer(DATA, client_args=["--pipe", "cat > /dev/null; exit 1"])
    assert DIGEST not in result.server.stderr + result.clients[0].stderr
