"""A short run of tests/fuzz.py against each endpoint; long ones are made by hand."""

import os
import subprocess
import sys

import pytest

import helpers
from pythons import BOTH

FUZZ = os.path.join(helpers.ROOT, "tests", "fuzz.py")
ROUNDS = {"client": 120, "server": 240, "relay": 30, "parsers": 1000, "client --key": 80, "server --key": 120}


@BOTH
@pytest.mark.parametrize("endpoint", sorted(ROUNDS))
def test_fuzz(endpoint, python):
    fuzz = subprocess.run([sys.executable, FUZZ, "--endpoint"] + endpoint.split() +
                          ["--rounds", str(ROUNDS[endpoint]), "--python", python],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    assert fuzz.returncode == 0, fuzz.stdout.decode("utf-8", "replace")
