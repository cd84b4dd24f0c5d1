#!/usr/bin/env python3
"""How near to a line's rate RateControl comes: packet trains over simulated lines, each of which follows from a seed.

    python3 tests/rates.py --seeds 1000 --jobs 2        # seeds 0 to 999
    python3 tests/rates.py --seed 17                    # one again, with every change of the rate

Real are Course, RateControl, Pacer, Multicaster._multicast(), and what a ServerWindow makes of the answers. Simulated are
the clock, the image, the line (bursts of packets through a drop-tail queue) and the clients: whatever they lost they are
taken to have got again. A seed decides a Setting. What is measured is how fast new bytes came through the line from the
third second on, while there was something to send and with the time that it takes to repeat what was lost, as a share of
what the line carries: at least ENOUGH of it, or it is a finding.
"""

import argparse
import concurrent.futures
import heapq
import itertools
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import kmcast                                                           # noqa: E402

PAYLOAD = 1460
SIZE = PAYLOAD + 40                     # bytes of a packet with its headers
FROM, UNTIL = 3.0, 6.0                  # seconds between which it is measured
ENOUGH = 0.97                           # of the line


class Setting:
    """What a seed decides.

    line: bit/s; queue: bytes; rtt: seconds; clients; jitter: seconds by which a client may see a packet late; port: bit/s
    at which a burst comes to the queue; slow: how many clients are behind this line, the others have no limit.
    """

    def __init__(self, seed):
        r = random.Random(seed)
        self.line = self._between(r, 10e6, 40e9)
        self.queue = self._between(r, 30e3, 3e6)
        self.rtt = self._between(r, 0.1e-3, 0.2)
        self.clients = int(self._between(r, 1, 500))
        self.jitter = r.choice([0.0, 0.001])
        self.port = self.line * self._between(r, 1.1, 10)
        self.slow = r.choice([1, self.clients])

    @staticmethod
    def _between(r, least, most):
        return least * (most / least) ** r.random()

    def __str__(self):
        return "%s, queue %.0f KB, round trip %.1f ms, %d clients of which %d are behind it, clocks %g ms, port %s" % (
            kmcast.bits(self.line), self.queue / 1e3, 1e3 * self.rtt, self.clients, self.slow, 1e3 * self.jitter,
            kmcast.bits(self.port))


class Line:
    """A drop-tail queue in front of a line. It notes what arrived of the round that is under way."""

    def __init__(self, setting):
        self.rate, self.queue, self.port = setting.line / 8, setting.queue, setting.port / 8
        self._waiting, self._when = 0.0, 0.0
        self.delivered = self.lost = 0

    def begin(self, count):
        """A round, or a pass, begins."""
        self.count, self.heard, self.missing = count, 0, 0
        self.trains = [kmcast.Train(*kmcast.Round.head_of(count)), kmcast.Train(*kmcast.Round.tail_of(count))]
        self.last = 0.0                 # when the last packet arrives

    def burst(self, place, count, now):
        """Packets of the round come to the queue as fast as the port lets them."""
        self._waiting = max(0.0, self._waiting - (now - self._when) * self.rate)
        self._when = now
        before, room, grows = self._waiting, self.queue - self._waiting, SIZE * (1 - self.rate / self.port)
        most = int(max(0.0, room) / grows) if grows > 0 else count
        through = min(count, most)
        late = count - through          # a place becomes free each time that the line has let a packet out
        if late:
            more = min(late, int(late * self.rate / self.port + (place % 7) / 7.0))
            through += more
        self._waiting = before + through * SIZE         # of which some has left by the time of the next burst
        self.missing |= ((1 << (count - through)) - 1) << (place + through)
        self.lost += count - through
        self.delivered += through
        if through:
            self.last = now + self._waiting / self.rate
            for where, heard, when in ((place, self.heard + 1, now + (before + SIZE) / self.rate),
                                       (place + through - 1, self.heard + through, self.last)):
                for train in self.trains:
                    train.note(where, heard, when)
            self.heard += through


class Image:
    """Buffers as the Course has them filled: without bytes in them."""

    def __init__(self):
        self.free = []

    def buffer(self, base, count):
        buffer = self.free.pop() if self.free else kmcast.Buffer(PAYLOAD, 0)
        buffer.start(base, count, count * PAYLOAD)
        buffer.ended = False
        return buffer


class Server(kmcast.Multicaster):
    """A Multicaster whose surroundings are simulated."""

    def __init__(self, setting, seed, trace=False):         # pylint: disable=super-init-not-called
        self.setting, self.trace = setting, trace
        self.random = random.Random(seed)
        self.clock, self.line, self.image, self.pacer = 0.0, Line(setting), Image(), kmcast.Pacer()
        self.sender, self.events, self.order = self, [], itertools.count()
        self.idle = 0.0
        self.members = [kmcast.Member("192.0.2.%d" % number, 0.0) for number in range(setting.clients)]
        self.window = kmcast.ServerWindow(kmcast.SessionDialect, 0)
        self.roster = kmcast.Roster(setting.clients)
        for member in self.members:
            self.roster.admit(member)
        self.roster.begin(0.0)
        bytes_ = self.LARGE_ROUND if setting.clients >= kmcast.MANY else self.ROUND
        self.course = kmcast.Course(self, self.roster, kmcast.SessionDialect, PAYLOAD, bytes_ // PAYLOAD, allow_empty=True)
        self.course.window = kmcast.SessionDialect.window

    # ---- the hands of the course

    def now(self):
        return self.clock

    def fill(self, base, limit, _place):
        self._later(0.0, lambda: self.course.filled(self.image.buffer(base, limit)))

    def digest(self, _number):
        return b""

    def release(self, buffer):
        self.image.free.append(buffer)

    def trouble(self):
        return None

    def do(self, step):
        if step.kind == "announce":
            self._later(self.setting.rtt, lambda: self.course.complete(step, kmcast.Answers()))
        elif step.kind == "sent":
            done, line = step.round, self.line
            heard = (line.missing, line.trains, self._departures)
            self._later(max(0.0, line.last - self.clock) + self.setting.rtt, lambda: self._answer(step, done, *heard))

    def _later(self, delay, call):
        heapq.heappush(self.events, (self.clock + delay, next(self.order), call))

    # ---- the clients

    def _answer(self, step, done, missing, behind, before):
        """What all clients say of a round."""
        answers = kmcast.Answers()
        awaited = kmcast.Awaited(step)
        awaited.answers = answers
        self.window._rounds[done.number] = done
        for number, member in enumerate(self.members):
            slow = number < self.setting.slow
            lost = missing if slow else 0
            figures = [done.multicast - kmcast.how_many(lost)]
            for train in behind if slow else before:
                heard, microseconds = train.figures()
                if self.setting.jitter and heard:
                    microseconds += int(1e6 * self.setting.jitter * (self.random.random() - self.random.random()))
                    if microseconds <= 0:
                        heard = microseconds = 0
                figures += [heard, microseconds]
            message = kmcast.SessionDialect.done(done.number, figures)
            self.window._reception(member, done.number, message, awaited, lost, self.clock)
        del self.window._rounds[done.number]
        rate, line = self.course.rate, self.course.control.line
        self.course.complete(step, answers)
        if self.trace and (rate, line) != (self.course.rate, self.course.control.line):
            print("%8.4f  round %5d of %5d at %s  lost %d (%.2f %%)  -> %s, line %s" % (
                self.clock, done.number, done.multicast, kmcast.bits(done.tail), kmcast.how_many(missing),
                100.0 * kmcast.how_many(missing) / done.multicast, kmcast.bits(self.course.rate),
                kmcast.bits(self.course.control.line or 0)))

    # ---- sending

    def send(self, _buffer, first, last):
        """DatagramSender.send(): so many packets go to the port, which takes its time."""
        self.line.burst(first, last - first, self.clock)
        for train in self._departures:
            train.note(first, first + 1, self.clock)
            train.note(last - 1, last, self.clock + (last - first) * SIZE / self.line.port)
        self.clock += (last - first) * SIZE / self.line.port
        return last

    def _wait(self, until=None, sender=False):
        """Let time pass until then; without a time: until something happens."""
        if until is None:
            until = self.events[0][0]
            self.idle += max(0.0, until - self.clock)
        while self.events and self.events[0][0] <= until:
            when, _, call = heapq.heappop(self.events)
            self.clock = max(self.clock, when)
            call()
        self.clock = max(self.clock, until)

    def run(self):
        """Returns the share of the line that was of use."""
        before, kmcast.monotonic = kmcast.monotonic, lambda: self.clock
        try:
            self.course.begin()
            self._wait(self.clock)
            self.course.start()
            start = None
            while self.clock < UNTIL:
                if start is None and self.clock >= FROM:
                    start = self._counted()
                sending = self.course.next()
                if sending:
                    self.line.begin(sending.last)
                    self._departures = [kmcast.Train(*kmcast.Round.head_of(sending.last)),
                                        kmcast.Train(*kmcast.Round.tail_of(sending.last))]
                    self._multicast(sending)
                    self._wait(self.clock)
                else:
                    self._wait()
            start = start or (0, 0, 0, 0)
            seconds, idle, delivered, lost = [now - then for now, then in zip(self._counted(), start)]
        finally:
            kmcast.monotonic = before
        if not delivered:
            return 0.0
        busy = seconds - idle
        return delivered * SIZE * 8 / self.setting.line / (busy * (1 + lost / delivered))

    def _counted(self):
        return self.clock, self.idle, self.line.delivered, self.line.lost


class Trace:
    """Prints why the rate changes."""

    @staticmethod
    def happened(what, facts):
        if what in ("rate", "brake", "hopeless"):
            print("          %s: %s" % (what, ", ".join("%s %s" % item for item in sorted(facts.items()))))

    @staticmethod
    def look(_now):
        pass


def one(seed, trace=False):
    """The share of a seed's line that was of use."""
    return Server(Setting(seed), seed, trace).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=300, help="how many (%(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, help="replay this one, with every change of the rate")
    options = parser.parse_args()
    if options.seed is not None:
        kmcast.tell.readers.append(Trace)
        print(Setting(options.seed))
        share = one(options.seed, trace=True)
        print("%.1f %% of the line" % (100 * share))
        return 0 if share >= ENOUGH else 1
    seeds, findings = range(options.first, options.first + options.seeds), 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for seed, share in zip(seeds, pool.map(one, seeds, chunksize=4)):
            if share < ENOUGH:
                findings += 1
                print("seed %d: %.1f %% of %s" % (seed, 100 * share, Setting(seed)), flush=True)
    print("%d seeds from %d on, %d findings" % (options.seeds, options.first, findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
