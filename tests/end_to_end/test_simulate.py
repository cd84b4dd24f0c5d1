"""tests/simulate.py: fixed seeds hold, each follows from its number alone, and what is broken in kmcast.py is found.

    python3 tests/end_to_end/test_simulate.py [WORD...]     # within how many seeds each mutant (of these words) is found

Long runs are made by hand: python3 tests/simulate.py --seeds 20000 --jobs 2.
"""

import io
import os
import re
import subprocess
import sys

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
SIMULATE = os.path.join(TESTS, "simulate.py")
KMCAST = os.path.join(ROOT, "kmcast.py")

pytestmark = pytest.mark.skipif(sys.version_info < (3, 8), reason="tests/simulate.py takes Python 3.8")

MOST = 1000                             # seeds that a mutant is looked for in

#: What is broken: its name, a text that kmcast.py has once, and what is there instead. The first are run with the suite.
MUTANTS = [
    ("a client that left is still counted on",
     "            self._here.remove(member)\n", "            pass\n"),
    ("a request is off by one",
     "seqs = [(buffer.base + place) & MASK for place in self._places]",
     "seqs = [(buffer.base + place + 1) & MASK for place in self._places]"),
    ("who is ready does not listen",
     "        member.owe(None, now)\n        member.listening = True\n", "        member.owe(None, now)\n"),
    ("a buffer is free before it is written",
     "        self._lent.append(self._buffer)\n", "        self._free.append(self._buffer)\n"),
    ("a thread's parent does not hear what clients below ask for",
     "self.answers.update(self.child.answers)", "self.answers.update({})"),
    # Up to here they are run with the suite.
    ("the base stands still",
     "        self._base = (self._base + buffer.count) & MASK\n        if buffer.count:", "        if buffer.count:"),
    ("what was written makes no room",
     "return self._make_room() if self.state == self.ROOM else []", "return []"),
    ("a signal out of turn is accepted",
     "        if kind not in PAYS.get(member.owes, ()):\n", "        if kind not in self.HANDLERS:\n"),
    ("nobody looks whether a client stalls",
     "        limit = self.stall_timeout\n", "        limit = 0\n"),
    ("done is said whatever is missing",
     "        if buffer.complete:\n            return self._done(now)\n        self._places",
     "        if True:\n            return self._done(now)\n        self._places"),
    ("a twin is not replaced",
     "twin = None if self.roster.begun else self.roster.twin(member)", "twin = None"),
    ("recipes are off by one",
     "        payload = U32.pack(number & MASK)\n", "        payload = U32.pack((number + 1) & MASK)\n"),
    ("the digest is not compared",
     "            if self.hash.digest() != digest:\n", "            if not digest:\n"),
    ("that a neighbour has ended goes unheard",
     "            if gone:\n                raise LinkClosed()\n", "            if gone:\n                return\n"),
    ("who is dropped has no outcome",
     "                member.outcome, member.ended = reason, monotonic()\n", "                member.ended = monotonic()\n"),
    ("a client has everything after its first round",
     "        if self.step.kind != 'finish':\n            return []\n", ""),
    ("checksums are not looked at",
     "            if tuple(sums) == headers[1::3]:\n", "            if sums:\n"),
    ("the kernel is not asked whether what was sent moves",
     "        if acknowledged > self._acknowledged:\n", "        if False:\n"),
    ("a client at work does not say that it is alive",
     "        if moved:\n            self._show_life()\n", ""),
    ("a server that waits does not say that it is alive",
     "            peer.show_life(ALIVE)\n", "            pass\n"),
    ("a client holds any number of buffers",
     "        if len(self._lent) >= self.AT_WORK:\n", "        if len(self._lent) >= 50:\n"),
    ("seqs do not wrap",
     "places = [(seq - buffer.base) & MASK for seq in seqs]", "places = [seq - buffer.base for seq in seqs]"),
    ("nobody polls for room to send",
     "select.POLLIN | (select.POLLOUT if waits else 0)", "select.POLLIN"),
    ("a release is seen and not taken",
     "        try:\n            self.link.wait_child()\n        except LinkClosed:\n            self._unwatch",
     "        try:\n            pass\n        except LinkClosed:\n            self._unwatch"),
    ("the server does not wait for its threads",
     "            thread.join(2 * FAREWELL_TIME)\n", "            pass\n"),
    ("a silent server is waited for",
     "        if self._stall_timeout and monotonic() - self.server.heard > self._stall_timeout:\n", "        if False:\n"),
    ("the image is final before all is written",
     "        while window.unwritten:\n", "        while False:\n"),
    ("only the first of two lost packets is repaired",
     "                member.by_tcp += len(member.request)\n",
     "                member.by_tcp += len(member.request)\n                member.request = member.request[:1]\n"),
    ("a client that did not get in is not named",
     "                self.roster.refuse(member, LATE)\n", "                pass\n"),
    ("the next buffer is filled over this one",
     "        self._buffers.reverse()\n", "        pass\n"),
    ("a thread is through before its child is",
     "            if not self._child_released or self.window.awaited():\n", "            if self.window.awaited():\n"),
    ("what the kernel did not take is lost",
     "                self.outgoing.put_head(memoryview(data)[count:])\n                return\n", "                return\n"),
    # These two are not found: the one costs only time, the other only the reason, and that seldom.
    ("stragglers are not waited for",
     "        self.state, self.deadline = self.STRAGGLERS, now + self.SETTLE\n",
     "        self.state, self.deadline = self.STRAGGLERS, now\n"),
    ("the last words of who went are not heard",
     "            gone = error\n", "            raise\n"),
]
IN_THE_SUITE = 5


def simulate(*arguments):
    """Run simulate.py; returns (exit code, what it says)."""
    process = subprocess.Popen([sys.executable, SIMULATE] + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate()[0].decode("utf-8", "replace")
    return process.returncode, said


def broken(mutant, directory):
    """A kmcast.py with one thing broken; returns its path."""
    name, old, new = mutant
    with io.open(KMCAST, encoding="utf-8") as file:
        text = file.read()
    assert text.count(old) == 1, "%s: kmcast.py has changed; say anew how to break it" % name
    path = os.path.join(str(directory), "kmcast.py")
    with io.open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new))
    return path


def test_150_transfers_end_as_they_should():
    code, said = simulate("--seeds", "150", "--jobs", "2")
    assert code == 0, said


def test_a_seed_is_replayed_message_by_message():
    environment = dict(os.environ, PYTHONHASHSEED="1")
    first, second = [subprocess.check_output([sys.executable, SIMULATE, "--seed", "11"], env=env)
                     for env in (environment, dict(environment, PYTHONHASHSEED="2"))]
    assert first == second
    assert b"exits with" in first


@pytest.mark.parametrize("mutant", MUTANTS[:IN_THE_SUITE], ids=[mutant[0] for mutant in MUTANTS[:IN_THE_SUITE]])
def test_what_is_broken_is_found(mutant, tmp_path):
    code, said = simulate("--kmcast", broken(mutant, tmp_path), "--seeds", "300", "--jobs", "2", "--until-found")
    assert code == 1 and "seed" in said, said


def measure(words, directory):
    """Say within how many seeds each mutant is found."""
    for mutant in MUTANTS:
        if words and not any(word in mutant[0] for word in words):
            continue
        try:
            path = broken(mutant, directory)
        except AssertionError as error:
            print(error)
            continue
        said = simulate("--kmcast", path, "--seeds", str(MOST), "--jobs", "2", "--until-found")[1]
        found = re.search(r"seed (\d+): (.*)", said)
        print("%-62s %s" % (mutant[0], "%4d  %s" % (int(found.group(1)) + 1, found.group(2)[:110]) if found else "not found"),
              flush=True)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as temporary:
        measure(sys.argv[1:], temporary)
