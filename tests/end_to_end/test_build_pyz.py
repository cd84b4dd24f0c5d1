"""build_pyz.sh: the same bytes with every interpreter, and a file that runs wherever there is one.

Built from a stand-in for kmcast.py, so that this is about the packing alone.
"""

import os
import shutil
import subprocess

import pytest

import helpers
from pythons import EVERY

#: Prints its version, its arguments and the size of what comes on stdin, and has an exit code of its own.
STAND_IN = u"""# -*- coding: utf-8 -*-
# \u00e9
import sys
data = getattr(sys.stdin, "buffer", sys.stdin).read()
sys.stdout.write("%d.%d.%d %s %d" % (sys.version_info[:3] + ("|".join(sys.argv[1:]), len(data))))
sys.exit(7)
"""
ARGUMENTS = ["one", "two words", "*"]
DATA = b"\0image" * 1000


@pytest.fixture
def directory(tmp_path):
    """A directory with build_pyz.sh and the stand-in."""
    shutil.copy(os.path.join(helpers.ROOT, "build_pyz.sh"), str(tmp_path))
    (tmp_path / "kmcast.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path


def build(directory, python=None, *arguments):
    subprocess.check_call(["sh", str(directory / "build_pyz.sh")] + [str(argument) for argument in arguments],
                          env=dict(os.environ, PYTHON=python or ""), cwd="/")


def path_with(directory, **programs):
    """Make a directory that holds nothing but links of these names to these programs; return it, to be a PATH."""
    path = directory / "path"
    path.mkdir()
    for name, program in programs.items():
        # A script, because a link to an interpreter would look for its library beside itself.
        (path / name).write_text('#!/bin/sh\nexec %s "$@"\n' % program)
        (path / name).chmod(0o755)
    return str(path)


def test_same_bytes_with_every_interpreter(directory):
    build(directory)
    first = (directory / "kmcast.pyz").read_bytes()
    os.utime(str(directory / "kmcast.py"), (1, 1))
    for number, python in enumerate(helpers.interpreters()):
        output = directory / ("built %d" % number)
        build(directory, python, output)
        assert output.read_bytes() == first, python
        assert os.access(str(output), os.X_OK)
    assert not list(directory.glob("*.tmp*"))


@EVERY
def test_runs_with_interpreter(directory, python):
    build(directory)
    path = path_with(directory, python=python)
    empty = directory / "empty"
    empty.mkdir()
    shutil.move(str(directory / "kmcast.pyz"), str(empty))
    expected = "%s one|two words|* %d" % (helpers.version_name(python), len(DATA))
    for command in ([python, "kmcast.pyz"], ["./kmcast.pyz"], ["/bin/sh", "kmcast.pyz"]):
        code, stderr, stdout = helpers.start(command + ARGUMENTS, stdin=DATA, cwd=str(empty), env={"PATH": path}).finish(30)
        assert (code, stderr, stdout.decode()) == (7, "", expected), command


def test_passes_over_what_does_not_work(directory):
    """A stub, or a version that kmcast does not run on, is no reason to stop while there is another."""
    build(directory)
    path = path_with(directory, python3="/bin/false", python="/nonexistent", python2=helpers.newest())
    process = helpers.start(["/bin/sh", "kmcast.pyz"], stdin=DATA, cwd=str(directory), env={"PATH": path})
    code, stderr, stdout = process.finish(30)
    assert (code, stderr) == (7, "")
    assert stdout.decode().startswith(helpers.version_name(helpers.newest()))


@pytest.mark.skipif(os.path.exists("/usr/libexec/platform-python"), reason="there is a Python outside of PATH here")
def test_says_that_there_is_no_python(directory):
    build(directory)
    path = path_with(directory, python3="/bin/false")
    code, stderr, _ = helpers.start(["/bin/sh", "kmcast.pyz"], cwd=str(directory), env={"PATH": path}).finish(30)
    assert code == 127
    assert stderr.startswith("kmcast: no Python") and stderr.count("\n") == 1


def test_source_missing(directory):
    (directory / "kmcast.py").unlink()
    code, stderr, _ = helpers.start(["sh", "build_pyz.sh"], cwd=str(directory)).finish(30)
    assert code == 1
    assert stderr.count("\n") == 1 and "kmcast.py" in stderr
    assert sorted(path.name for path in directory.iterdir()) == ["build_pyz.sh"]


def test_an_option_is_not_taken_for_a_file(directory):
    before = sorted(os.listdir(str(directory)))
    code, stderr, _ = helpers.start(["/bin/sh", str(directory / "build_pyz.sh"), "--help"], cwd=str(directory)).finish(30)
    assert code == 2 and stderr == "usage: sh build_pyz.sh [OUTPUT]\n"
    assert sorted(os.listdir(str(directory))) == before
