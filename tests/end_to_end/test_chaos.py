"""A short run of tests/chaos.py, the same 8 seeds each time; long ones are made by hand."""

import os
import subprocess
import sys

import helpers

CHAOS = os.path.join(helpers.ROOT, "tests", "chaos.py")


def test_whatever_goes_wrong_at_once_nobody_has_a_wrong_image_or_hangs():
    """Each run takes a few seconds, in which it mostly waits; so several at once."""
    chaos = subprocess.run([sys.executable, CHAOS, "--runs", "8", "--jobs", "6"],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    assert chaos.returncode == 0, chaos.stdout.decode("utf-8", "replace")
