"""tests/rates.py: nearly all lines of fixed seeds are filled, and each seed can be replayed.

Long runs are made by hand: python3 tests/rates.py --seeds 1000 --jobs 2.
"""

import os
import subprocess
import sys

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

pytestmark = pytest.mark.skipif(sys.version_info < (3, 8), reason="tests/rates.py takes Python 3.8")


def rates(*arguments):
    """What tests/rates.py says, in lines."""
    process = subprocess.run([sys.executable, os.path.join(TESTS, "rates.py"), *arguments], stdout=subprocess.PIPE,
                             universal_newlines=True, timeout=500)
    assert process.returncode in (0, 1)
    return process.stdout.splitlines()


def test_nine_of_ten_lines_are_filled_from_the_third_second_on():
    *findings, summary = rates("--seeds", "20", "--jobs", "2")
    assert summary.startswith("20 seeds") and len(findings) <= 2, "\n".join(findings)


def test_a_seed_is_replayed_with_every_change_of_the_rate():
    first, second = rates("--seed", "3"), rates("--seed", "3")
    assert first == second and any("arrives at" in line for line in first)
