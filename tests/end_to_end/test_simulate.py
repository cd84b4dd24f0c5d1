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
    ("a round is multicast before all are ready",
     "            if not underway.ready or not buffer.count:\n", "            if not buffer.count:\n"),
    ("who is ready does not listen",
     "        member.stands(number, LISTENS, None, now)\n        return []\n", "        return []\n"),
    ("a buffer is free before it is written",
     "        self.rounds.remove(incoming)\n        if incoming.heard and",
     "        self.rounds.remove(incoming)\n        self._free.append(incoming.buffer)\n        if incoming.heard and"),
    ("a thread's parent does not hear what clients below ask for",
     "                answers.add(self._below.pop(step))\n", "                self._below.pop(step)\n"),
    # Up to here they are run with the suite.  The window of the server:
    ("a signal out of turn is accepted",
     "        if how not in self.PAYS[kind]:\n", "        if how is None:\n"),
    ("every answer is taken for one on the oldest round",
     "        if number is None:\n            number = member.oldest\n", "        number = member.oldest\n"),
    ("who left still owes",
     "            awaited.owing.discard(member)\n            awaited.answers", "            awaited.answers"),
    ("rounds are forgotten while they are under way",
     "        if len(self._rounds) > 2 * self.dialect.window:\n", "        if len(self._rounds) > 1:\n"),
    ("the last word comes before the last round is done",
     "        if not member.last or member.rounds or self.dialect.ends:\n", "        if not member.last or self.dialect.ends:\n"),
    ("nobody looks whether a client stalls",
     "        limit = self.stall_timeout\n", "        limit = 0\n"),
    ("who waits for us is taken to stall",
     "        return state[0] if state and state[0] in DEBTS else None\n", "        return state[0] if state else None\n"),
    ("that a kernel takes a sign of life counts as a move",
     "            self.moved, self._sent = moved, sent\n", "            pass\n"),
    ("only the first of two lost packets is repaired",
     "        member.asked[number] = request\n",
     "        member.asked[number] = request._replace(gaps=gaps & -gaps, order=order and order[:1])\n"),
    # The window of a client:
    ("a request of the base protocol is off by one",
     "        seqs = [(base + place) & MASK for place in places(gaps)]\n",
     "        seqs = [(base + place + 1) & MASK for place in places(gaps)]\n"),
    ("a request of a session is off by one",
     "                + to_bitmap(gaps, count))\n", "                + to_bitmap(gaps >> 1 or gaps, count))\n"),
    ("done is said whatever is missing",
     "        return self._complete(incoming) if buffer.complete else self._ask(incoming)\n",
     "        return self._complete(incoming)\n"),
    ("the writer gets rounds out of order",
     "            if each.how != Incoming.COMPLETE:\n                break\n",
     "            if each.how != Incoming.COMPLETE:\n                continue\n"),
    ("a client is ready for any number of rounds",
     "            if used >= self.room:\n", "            if used >= 50:\n"),
    ("what was written makes no room",
     "            return []\n        self._free.append(incoming.buffer)\n        return self._make_room()\n",
     "            return []\n        self._free.append(incoming.buffer)\n        return []\n"),
    ("what came damaged is not given to the writer again",
     "        incoming.given, incoming.how, incoming.suspected = False, Incoming.SUSPECT, True\n",
     "        incoming.how, incoming.suspected = Incoming.SUSPECT, True\n"),
    ("what came damaged is not asked for again",
     "        gaps = incoming.buffer.differing(sums)\n", "        gaps = 0\n"),
    ("sums are those of the next packet",
     "zlib.crc32(part(self.payloads, i * self.payload, self.packet_size(i))) & MASK",
     "zlib.crc32(part(self.payloads, (i or 1) * self.payload, self.packet_size(i))) & MASK"),
    ("a round whose digest differs takes what is multicast",
     "        if self.how not in (self.LISTENS, self.STRAGGLERS):\n", "        if self.how in (self.WAITS, self.COMPLETE):\n"),
    ("the output is to move while its round is asked for again",
     "        return bool(self._lent) and self._lent[0].given\n", "        return bool(self._lent)\n"),
    ("the digest is not compared",
     "            return self._trial.digest() == incoming.digest\n", "            return True\n"),
    ("seqs do not wrap",
     "        self._base = (base + count) & self.dialect.seqs\n", "        self._base = base + count\n"),
    ("recipes are off by one",
     "        payload = U32.pack(number)\n", "        payload = U32.pack(number + 1)\n"),
    ("what came straight to a place is taken for what should be there",
     "                and headers[part_of_round] == self.headers[part_of_round])\n", "                )\n"),
    ("packets are expected where others are already",
     "        return (target, place) if target.lacks(place, place + MOST_SEGMENTS) else None\n",
     "        return target, place\n"),
    # The course:
    ("the base stands still",
     "        self._base = (self._base + buffer.count) & self.dialect.seqs\n", "        pass\n"),
    ("the window is never full",
     "        if self._full and len(self._underway) < self.window and not self.over and not self._has_time():\n",
     "        if self._full and not self.over and not self._has_time():\n"),
    ("a round more than the window has room for is under way",
     "        if self._full and len(self._underway) < self.window and",
     "        if self._full and len(self._underway) <= self.window and"),
    ("a buffer is free before its repair pass is sent",
     "            underway.steps += 1         # until what the pass brought is answered for\n", "            pass\n"),
    ("a round is through when the first of its steps is",
     "        if not underway.steps:\n", "        if True:\n"),
    ("a member may have heard of a later round first",
     "            if since is not None and now - since", "            if now - since"),
    ("a part that nobody lacks is not hashed before its buffer is used again",
     "                self.hands.digest(self._part)       # until then it must stay as it is\n", "                pass\n"),
    ("what was brought to some is taken for brought to all",
     "        cohorts = [cohort for cohort in self._cohorts if not cohort.aside and cohort.wants(start) < stop]\n",
     "        cohorts = [cohort for cohort in self._cohorts if cohort.wants(start) < stop or cohort.held.add(start, stop)]\n"),
    ("who takes rounds in order gets any",
     "        if self.seek:\n            return self.held.gap(place)\n", "        if True:\n            return self.held.gap(place)\n"),
    ("there is no other pass",
     "            self._begin_pass()\n            part =", "            part ="),
    ("who is set aside stays so",
     "        if all(cohort.aside for cohort in self._cohorts):\n", "        if False:\n"),
    ("who lacks something after all gets nothing more",
     "            held.remove(start, stop)\n        if not self._started:", "            pass\n        if not self._started:"),
    ("a round is of those who have just come, too",
     "        return self.members if members is None else [member", "        return self.members if True else [member"),
    ("a part is cut elsewhere when it is read again",
     "        count = -(-(self.cuts[part] - self._place) // self.payload)\n",
     "        count = -(-(self.cuts[part] - self._place) // self.payload) + 1\n"),
    # The drivers:
    ("a digest is that of the round before",
     "        return self.source.digest(part + 1)\n", "        return self.source.digest(part)\n"),
    ("the digest of all but the last part is taken for that of the image",
     "        start = DIGEST_SIZE * (self._given if parts", "        start = DIGEST_SIZE * (self._given - 1 if parts"),
    ("a thread is through before its child is",
     "                   if alone or step in self._below or step not in self._left_below]\n", "                   ]\n"),
    ("a thread waits for a younger one to do what it was not left",
     " or step not in self._left_below]\n", "]\n"),
    ("a step is not passed on",
     "            self.child.inbox.append(step)\n", "            pass\n"),
    ("a twin is not replaced",
     "        twin = self.roster.twin(member)\n", "        twin = None\n"),
    ("that a neighbour has ended goes unheard",
     "            if gone:\n                raise LinkClosed()\n", "            if gone:\n                return\n"),
    ("who is dropped has no outcome",
     "                member.outcome, member.ended = reason, monotonic()\n", "                member.ended = monotonic()\n"),
    ("the kernel is not asked whether what was sent moves",
     "        if acknowledged > self._acknowledged:\n", "        if False:\n"),
    ("a client at work does not say that it is alive",
     "        if moved:\n            self._show_life()\n", ""),
    ("a server that waits does not say that it is alive",
     "            peer.show_life(ALIVE)\n", "            pass\n"),
    ("nobody polls for room to send",
     "select.POLLIN | (select.POLLOUT if waits else 0)", "select.POLLIN"),
    ("a release is seen and not taken",
     "        try:\n            self.link.wait_child()\n        except LinkClosed:\n            self._unwatch",
     "        try:\n            pass\n        except LinkClosed:\n            self._unwatch"),
    ("the server does not wait for its threads",
     "            thread.join(2 * FAREWELL_TIME)\n        return", "            pass\n        return"),
    ("a silent server is waited for",
     "        if self._stall_timeout and monotonic() - self.server.heard > self._stall_timeout:\n", "        if False:\n"),
    ("the image is final before all is written",
     "        while window.unwritten:\n", "        while False:\n"),
    ("a client that did not get in is not named",
     "                self.roster.refuse(member, why)\n", "                pass\n"),
    ("what the kernel did not take is lost",
     "            self.outgoing.put_head(memoryview(data)[count:])\n            return False\n", "            return False\n"),
    # These cost only time, or the reason in words, and that seldom.
    ("who left is repaired for",
     "            requests = dict(item for item in requests.items() if item[0] in here)\n", "            pass\n"),
    ("stragglers are not waited for",
     "        incoming.how, incoming.deadline = Incoming.STRAGGLERS, now + patience\n",
     "        incoming.how, incoming.deadline = Incoming.STRAGGLERS, now\n"),
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


def test_transfers_end_as_they_should():
    code, said = simulate("--seeds", "40", "--jobs", "2")
    assert code == 0, said


def test_a_seed_is_replayed_message_by_message():
    environment = dict(os.environ, PYTHONHASHSEED="1")
    first, second = [subprocess.check_output([sys.executable, SIMULATE, "--seed", "11"], env=env)
                     for env in (environment, dict(environment, PYTHONHASHSEED="2"))]
    assert first == second
    assert b"exits with" in first


@pytest.mark.parametrize("mutant", MUTANTS[:IN_THE_SUITE], ids=[mutant[0] for mutant in MUTANTS[:IN_THE_SUITE]])
def test_what_is_broken_is_found(mutant, tmp_path):
    code, said = simulate("--kmcast", broken(mutant, tmp_path), "--seeds", "300", "--until-found")
    assert code == 1 and "seed" in said, said


def test_what_is_broken_by_hand_is_still_there(tmp_path):
    for mutant in MUTANTS:
        broken(mutant, tmp_path)


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
