"""What the other tests take for granted of helpers.py, on each interpreter that imports it."""

import sys

import pytest

import helpers


def test_random_bytes_are_the_same_everywhere():
    assert helpers.sha256(helpers.random_bytes(200000, seed=7)) == \
        "ad6c1be9bd96abbf8d158e8a358fe0e16d444b07b7d782ff4cb7e857c5447406"


def test_random_bytes_shorter_is_the_start_of_longer():
    assert helpers.random_bytes(100, seed=3) == helpers.random_bytes(70000, seed=3)[:100]
    assert helpers.random_bytes(70000, seed=3) != helpers.random_bytes(70000, seed=4)
    assert len(helpers.random_bytes(70000)) == 70000
    assert helpers.random_bytes(0) == b""


def python(code, **options):
    return helpers.start([sys.executable, "-c", code], **options)


COPY = "import os\nwhile True:\n    data = os.read(0, 65536)\n    if not data: break\n    os.write(1, data)"


def test_data_goes_in_and_comes_out():
    data = helpers.random_bytes(1000000)
    assert python(COPY, stdin=data).finish(30) == (0, "", data)
    assert python(COPY, stdin=helpers.random_chunks(1000000), stdout=helpers.HASH).finish(30) == \
        (0, "", helpers.sha256(data))
    assert python(COPY).finish(30) == (0, "", b"")
    chunks = []
    assert python(COPY, stdin=[b"a", b"", b"b"], stdout=chunks.append).finish(30) == (0, "", None)
    assert b"".join(chunks) == b"ab"


def test_stdin_that_is_not_read_and_stderr_that_is_long():
    code, stderr, data = python("import sys; sys.stderr.write('x' * 1000000); sys.exit(3)", stdin=b"y" * 1000000).finish(30)
    assert (code, len(stderr), data) == (3, 1000000, b"")


def test_process_that_does_not_end_fails_and_is_killed():
    process = python("import sys, time; sys.stderr.write('here'); sys.stderr.flush(); time.sleep(60)")
    process.wait_stderr("here", 20)
    with pytest.raises(AssertionError) as error:
        process.finish(0.1)
    assert "here" in str(error.value)
    assert process.poll() is not None


def test_wait_stderr_notices_the_end():
    with pytest.raises(AssertionError):
        python("import sys; sys.stderr.write('other')").wait_stderr("text", 20)


def test_stop_kills_children_too():
    process = python("import subprocess, sys, time; subprocess.Popen(['sleep', '60']); sys.stderr.write('up');"
                     "sys.stderr.flush(); time.sleep(60)")
    process.wait_stderr("up", 20)
    process.stop()
    # The child held stdout open as well; its end of file tells that it is gone.
    assert process.finish(5)[0] == -9
