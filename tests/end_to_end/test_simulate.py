"""A short run of tests/simulate.py, the same seeds each time; long ones are made by hand."""

import os
import subprocess
import sys

import helpers

SIMULATE = os.path.join(helpers.ROOT, "tests", "simulate.py")


def test_in_simulated_transfers_nobody_has_a_wrong_image_or_waits_for_ever():
    """What decides is the real thing; network, clock and output are simulated, so that a seed takes milliseconds."""
    simulation = subprocess.run([sys.executable, SIMULATE, "--seeds", "200"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    assert simulation.returncode == 0, simulation.stdout.decode("utf-8", "replace")
