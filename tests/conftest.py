"""pytest's configuration for all tests: where modules are found, no process left behind, no test without an end.

Loaded by pytest 4.6 on Python 2.7 and by current ones on Python 3.
"""

import os
import signal
import sys

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
for directory in (TESTS, ROOT):
    if directory not in sys.path:
        sys.path.insert(0, directory)

import helpers  # noqa: E402 (it is found through the path set above)

#: Seconds after which a test is taken to hang. A test whose work takes longer marks itself with a longer one:
#: @pytest.mark.time_limit(600)
TIME_LIMIT = 180


def pytest_addoption(parser):
    parser.addoption("--share", default="1/1", help="run only the I-th of N shares of the tests, as I/N")


def pytest_configure(config):
    config.addinivalue_line("markers", "time_limit(seconds): let this test take longer than %d s" % TIME_LIMIT)


def pytest_collection_modifyitems(config, items):
    """Leave out what is not of this share; skip the laboratory tests, with the reason, where there can be no laboratory."""
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = items[share - 1::shares]
    in_laboratory = [item for item in items if str(item.fspath).startswith(os.path.join(TESTS, "laboratory") + os.sep)]
    if in_laboratory:
        import lab
        reason = lab.why_not()
        if reason:
            for item in in_laboratory:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_process_left_behind():
    """Kill what a test started through helpers.py and did not end, be it that it failed."""
    yield
    helpers.stop_all()


@pytest.fixture(autouse=True)
def time_limit(request):
    """Fail a test that hangs, with the traceback of where it hangs, instead of hanging the whole run."""
    marker = request.node.get_closest_marker("time_limit")
    seconds = marker.args[0] if marker else TIME_LIMIT

    def expired(signal_number, frame):
        raise AssertionError("the test still ran after %d s" % seconds)

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
