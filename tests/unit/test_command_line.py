"""The command line's parts by themselves: types of arguments, addresses, signals."""

import argparse
import os
import signal
import subprocess
import sys

import pytest

import helpers
import kmcast


@pytest.mark.parametrize("text, rate", [
    ("940M", 940e6), ("1.5G", 1.5e9), ("300k", 300e3), ("1000", 1000), ("auto", "auto"), ("max", kmcast.UNLIMITED)])
def test_rates(text, rate):
    assert kmcast.rate_type(text) == rate


@pytest.mark.parametrize("convert, text", [
    (kmcast.rate_type, "999"), (kmcast.rate_type, "1e9"), (kmcast.rate_type, "M"), (kmcast.least_rate_type, "auto"),
    (kmcast.least_rate_type, "max"), (kmcast.seconds_type, "-1"), (kmcast.seconds_type, "nan"), (kmcast.seconds_type, "1."),
    (kmcast.whole_number(1, 9), "0"), (kmcast.whole_number(1, 9), "10"), (kmcast.whole_number(1, 9), "1 "), (kmcast.whole_number(1, 9), u"\u0663"),
    (kmcast.group_type, "223.255.255.255"), (kmcast.group_type, "240.0.0.0"), (kmcast.group_type, "239.1"),
    (kmcast.group_type, u"239.1.1.\u0661")])
def test_arguments_that_are_refused(convert, text):
    with pytest.raises(argparse.ArgumentTypeError):
        convert(text)


def test_the_interfaces_of_this_host_are_known():
    assert ("lo", "127.0.0.1") in kmcast.interfaces()
    assert kmcast.local_address("lo") == kmcast.local_address("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("text", ["203.0.113.1", "eth99", "", "0.0.0.0", "239.1.1.1", "127.0.0"])
def test_what_is_no_address_of_this_host_is_refused_with_a_list_of_those_that_are(text):
    with pytest.raises(kmcast.Failure) as error:
        kmcast.local_address(text)
    assert error.value.code == kmcast.USAGE and "lo (127.0.0.1)" in error.value.reason


SIGNALLED = """
import os, signal, sys, time
sys.path.insert(0, %r)
import kmcast
signal.signal(signal.SIGHUP, signal.SIG_IGN)
kmcast.StopInOrder()
os.kill(os.getpid(), signal.SIGHUP)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
except kmcast.Interrupted as error:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print('stopped by %%s' %% error)
    sys.stdout.flush()
time.sleep(1.1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""


def test_the_first_signal_stops_in_order_and_a_late_one_at_once():
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED % helpers.ROOT], stdout=subprocess.PIPE)
    printed, _ = process.communicate()
    assert printed == b"stopped by SIGTERM\n"
    assert process.returncode == -signal.SIGTERM


def test_a_child_ends_with_its_parent():
    middle = ("import subprocess, sys, os; sys.path.insert(0, %r); import kmcast; us = os.getpid()\n"
              "subprocess.Popen(['sleep', '100'], preexec_fn=lambda: kmcast.end_with(us))" % helpers.ROOT)
    process = subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE)
    os.read(process.stdout.fileno(), 1)         # the child holds it open until it ends
    process.stdout.close()
    assert process.wait() == 0
