"""A short run of tests/fuzz.py against each endpoint; long ones are made by hand."""

import os
import subprocess
import sys

import pytest

import helpers
from pythons import BOTH

FUZZ = os.path.join(helpers.ROOT, "tests", "fuzz.py")
ROUNDS = {"client": 80, "server": 160, "relay": 30, "parsers": 700, "client --key": 50, "server --key": 80}


@BOTH
@pytest.mark.parametrize("endpoint", sorted(ROUNDS))
def test_fuzz(endpoint, python):
    fuzz = subprocess.run([sys.executable, FUZZ, "--endpoint"] + endpoint.split() +
                          ["--rounds", str(ROUNDS[endpoint]), "--python", python],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    assert fuzz.returncode == 0, fuzz.stdout.decode("utf-8", "replace")
