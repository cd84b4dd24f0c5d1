"""What README tells an operator to type does what README says, as it stands there."""

import gzip
import io
import os
import re
import shutil
import subprocess

import pytest

import helpers
import wire
from helpers import LOOPBACK
from pythons import NEWEST
from test_failures import wait_until

DISK = 4 << 20                              # bytes


@pytest.fixture(scope="module")
def kmcast(tmp_path_factory):
    """What an operator has installed as `kmcast`: a kmcast.pyz, with a Python that it finds."""
    directory = tmp_path_factory.mktemp("bin")
    subprocess.check_call(["sh", os.path.join(helpers.ROOT, "build_pyz.sh"), str(directory / "kmcast")])
    (directory / "python3").write_text('#!/bin/sh\nexec %s "$@"\n' % NEWEST)
    (directory / "python3").chmod(0o755)
    return directory


def loop(*args):
    """Run losetup; returns what it prints."""
    return subprocess.check_output(("losetup",) + args, stderr=subprocess.STDOUT).decode("ascii").strip()


@pytest.fixture
def disk(tmp_path):
    """The path of a disk that holds nothing, as a disk does."""
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("a loop device takes root and losetup")
    (tmp_path / "disk").write_bytes(bytes(DISK))
    try:
        device = loop("-f", "--show", str(tmp_path / "disk"))
    except subprocess.CalledProcessError as error:
        pytest.skip("no loop device to be had: %s" % error.output.decode("ascii", "replace").strip())
    yield device
    helpers.stop_all()
    subprocess.call(["umount", device], stderr=subprocess.DEVNULL)
    loop("-d", device)


def test_a_disk_takes_rounds_in_any_order_and_goes_on_after_a_break(disk):
    image = helpers.random_bytes(DISK - 1000, seed=5)
    server = wire.Server(image="0" * 32, again=True, size=len(image))
    client = helpers.start_client(["-o", disk, LOOPBACK, LOOPBACK, server.port], NEWEST)
    server.accept().greet()
    assert server.hello["seek"] is True
    server.bring(image, 3000, 5500)
    server.bring(image, 0, 1000)
    server.sock.close()
    server.accept().greet()
    assert server.hello["have"] == [[0, 1000], [3000, 5500]]
    for start, stop in ((1000, 3000), (1 << 20, 1 << 20 | 5000), (5500, 1 << 20)):
        server.bring(image, start, stop)
    for start in range(1 << 20 | 5000, len(image), 50000):
        server.bring(image, start, min(start + 50000, len(image)))
    server.has_all(image)
    server.done(wire.IMAGE)
    code, stderr, _ = client.finish(30)
    server.close()
    with open(disk, "rb") as file:
        equal = file.read(len(image)) == image
    assert code == 0 and equal, stderr


def recipe(device, port):
    """The line in README for a client that unpacks an image onto a disk, for a disk and a server of ours."""
    with io.open(os.path.join(helpers.ROOT, "README.md"), encoding="utf-8") as readme:
        line, = re.findall(r"^kmcast client --pipe '.*gzip -d.*/dev/sdX.*' auto 10\.0\.0\.1$", readme.read(), re.M)
    return line.replace("/dev/sdX", device).replace("10.0.0.1", LOOPBACK) + " %d" % port


def follow(kmcast, device, tmp_path, image):
    """Follow the recipe; returns the exit code and stderr of the client, and the server's exit code."""
    port = helpers.free_port()
    (tmp_path / "disk.img.gz").write_bytes(gzip.compress(image))
    server = helpers.start_server(["-i", tmp_path / "disk.img.gz", LOOPBACK, 1, port])
    client = helpers.start(["sh", "-c", recipe(device, port)],
                           env={"PATH": "%s:%s" % (kmcast, os.environ["PATH"])})
    code, stderr, _ = client.finish(30)
    return code, stderr, server.finish(30)[0]


def content(device):
    """All that is on a disk."""
    with open(device, "rb") as file:
        return file.read()


def test_an_image_that_is_unpacked_onto_a_disk_is_there(kmcast, disk, tmp_path):
    image = helpers.random_bytes(DISK - 1000, seed=6)
    code, stderr, of_server = follow(kmcast, disk, tmp_path, image)
    assert (code, of_server) == (0, 0), stderr
    same = content(disk) == image + bytes(1000)
    assert same


def test_a_disk_that_does_not_exist_is_not_made(kmcast, tmp_path):
    """/dev is in memory: a mistyped name would take all of it, and the exit code would be 0."""
    device = "/dev/kmcast-no-such-disk"
    try:
        code, stderr, of_server = follow(kmcast, device, tmp_path, b"image")
        assert (code, of_server) == (1, 1), stderr
        assert not os.path.exists(device)
    finally:
        if os.path.exists(device):
            os.unlink(device)


def test_a_disk_that_is_mounted_is_not_written_to(kmcast, disk, tmp_path):
    """It would be written to by two, and what is on it is in use."""
    if not shutil.which("mkfs.ext2"):
        pytest.skip("no mkfs.ext2 here")
    subprocess.check_call(["mkfs.ext2", "-q", disk])
    before = content(disk)
    (tmp_path / "mounted").mkdir()
    if subprocess.call(["mount", "-o", "ro", disk, str(tmp_path / "mounted")]):
        pytest.skip("nothing can be mounted here")
    try:
        code, stderr, of_server = follow(kmcast, disk, tmp_path, helpers.random_bytes(100000))
        assert (code, of_server) == (1, 1), stderr
        same = content(disk) == before
        assert same
    finally:
        wait_until(lambda: subprocess.call(["umount", str(tmp_path / "mounted")]) == 0, "nobody uses it")
