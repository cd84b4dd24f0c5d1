"""The real kmcast.pyz, alone in an empty directory: a transfer with it."""

import os
import shutil
import subprocess

import pytest

import helpers
from pythons import ALL, BOTH, NEWEST, OLDEST


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    """The path of a kmcast.pyz that nothing lies beside."""
    built = tmp_path_factory.mktemp("built")
    for name in ("build_pyz.sh", "kmcast.py"):
        shutil.copy(os.path.join(helpers.ROOT, name), str(built))
    subprocess.check_call(["sh", str(built / "build_pyz.sh")])
    alone = tmp_path_factory.mktemp("alone")
    shutil.move(str(built / "kmcast.pyz"), str(alone))
    shutil.rmtree(str(built))
    return str(alone / "kmcast.pyz")


@pytest.mark.parametrize("server, clients", [(NEWEST, ALL), (OLDEST, [OLDEST, NEWEST])], ids=["to every interpreter", "from the oldest"])
def test_a_transfer_with_the_pyz(pyz, server, clients):
    data = helpers.random_bytes(500000)
    helpers.transfer(data, len(clients), server_python=server, client_python=clients, program=pyz).check(data)


@BOTH
def test_the_demo_from_the_pyz(pyz, python, tmp_path):
    """Its processes are of the same file."""
    (tmp_path / "file").write_bytes(b"x" * 100000)
    code, stderr, stdout = helpers.start_kmcast(["demo", tmp_path / "file"], python, program=pyz).finish(60)
    assert code == 0, stderr
    assert stdout.decode("ascii").count(" equal\n") == 3


def test_the_pyz_as_a_program(pyz):
    code, stderr, stdout = helpers.start([pyz, "--version"]).finish(30)
    assert code == 0
    assert (stdout.decode("ascii") + stderr).startswith("kmcast 1.")
