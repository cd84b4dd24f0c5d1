"""A long cable for the laboratory: forwards frames between two interfaces, each a given time after it came.

    python3 tests/delay.py INTERFACE INTERFACE SECONDS      # as lab.py starts it, in the switch's namespace
    python3 tests/delay.py                                  # measure here what it can carry (root)

Some kernels have no netem, which would do this inside of the kernel. Here a packet socket on either side lets the
kernel put what comes into a ring that this process shares (packet_mmap), with a time stamp; there a frame stays until
it is due and is sent from there. What matters for the tests that use it:
- nothing is reordered: a ring is first in, first out;
- nothing is dropped: a ring holds more than half a second of 100 Mbit/s, and what it drops nevertheless is counted and
  reported at the end, so that a run with drops can be told from a sound one;
- frames keep their distances: each is due its own arrival time plus the delay, however late this process sees it. It
  runs with real-time priority where that is granted, as else every busy program would stretch the line;
- it takes little of the CPU that the programs under test need: no system call to receive, one to send.

Frames are forwarded as they are, with the kernel's note on checksums and segments before them (PACKET_VNET_HDR):
between virtual interfaces the checksums are never computed, and without the note the far end would throw such frames
away.
"""

import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

# From <linux/if_packet.h> and <linux/if_ether.h>; Python's socket module lacks them.
ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_RX_RING = 5
PACKET_STATISTICS = 6
PACKET_VERSION = 10
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
TPACKET_V2 = 1
TP_STATUS_USER = 1
HEADER = struct.Struct('@IIIHHII')      # struct tpacket2_hdr: status, len, snaplen, mac, net, sec, nsec
STATUS = struct.Struct('@I')
STATISTICS = struct.Struct('@II')       # struct tpacket_stats: packets, drops
VNET_HDR = 10                           # bytes of the note, which stand before the frame

SLOT = 2048                             # bytes a frame in the ring, its headers included: enough for MTU 1500
SLOTS = 8192
BLOCK = 1 << 16                         # bytes that the kernel allocates in one piece

TOGETHER = 50e-6                        # seconds: frames due so soon go now; waking up for each costs more than that


class Side:
    """One of the two interfaces, with the frames that came in there and wait."""

    def __init__(self, interface):
        # Protocol 0 receives nothing until bind() names the interface: else frames of others would be in the ring.
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_RX_RING,
                               struct.pack('@IIII', BLOCK, SLOTS * SLOT // BLOCK, SLOT, SLOTS))
        self._ring = mmap.mmap(self.socket.fileno(), SLOTS * SLOT)
        self._view = memoryview(self._ring)
        self._oldest = 0                # where the oldest frame is, or the next will be
        self.socket.bind((interface, ETH_P_ALL))

    def oldest(self):
        """Return the time at which the oldest frame came and the frame; None if there is none.

        By the real-time clock, as the kernel's stamps are.
        """
        status, length, held, start, _, seconds, nanoseconds = HEADER.unpack_from(self._ring, self._oldest)
        if not status & TP_STATUS_USER:
            return None
        if held < length:
            raise ValueError('a frame of %d bytes: too large for this relay' % length)
        start += self._oldest
        return seconds + nanoseconds * 1e-9, self._view[start - VNET_HDR:start + length]

    def drop_oldest(self):
        """Give its place in the ring back to the kernel."""
        STATUS.pack_into(self._ring, self._oldest, 0)
        self._oldest = (self._oldest + SLOT) % (SLOTS * SLOT)

    def lost(self):
        """Return how many frames found the ring full."""
        return STATISTICS.unpack(self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))[1]


class Over(Exception):
    """SIGTERM came."""


def relay(interfaces, delay):
    """Forward between the two until SIGTERM; then return the frames forwarded, those lost, and the longest lateness."""
    def end(number, frame):
        raise Over

    here, there = [Side(interface) for interface in interfaces]
    frames = latest = 0
    signal.signal(signal.SIGTERM, end)
    print('ready', flush=True)
    try:
        while True:
            due = None
            for side, other in ((here, there), (there, here)):
                while True:
                    frame = side.oldest()
                    if frame is None:
                        break
                    wait = frame[0] + delay - time.time()
                    if wait > TOGETHER:
                        due = wait if due is None else min(due, wait)
                        break
                    try:
                        other.socket.send(frame[1])
                    except OSError:
                        pass            # the far interface is down: a cable does not know
                    side.drop_oldest()
                    frames += 1
                    latest = max(latest, -wait)
            if due is not None:
                time.sleep(due)         # what comes meanwhile is due later than this
            else:
                select.select((here.socket, there.socket), (), ())
    except Over:
        return frames, here.lost() + there.lost(), latest


def main():
    if len(sys.argv) == 1:
        return measure()
    # Not bound to one CPU: the scheduler would not move a program under test out of its way, and that stops for 100 ms.
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        try:
            os.nice(-20)                # the second best, where a container may not ask for real time
        except OSError:
            pass
    frames, lost, latest = relay(sys.argv[1:3], float(sys.argv[3]))
    print('%d frames, %d lost, the latest %.1f ms after its time, %.2f s of CPU' % (
        frames, lost, 1000 * latest, sum(os.times()[:2])), flush=True)
    return 1 if lost else 0


# ---------------------------------------------------------------------------
# What it can carry here
# ---------------------------------------------------------------------------

# Sends numbered datagrams as fast as the line takes them, for so many seconds.
SENDER = '''
import socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 << 10)    # less than the queue: send() waits, nothing is lost
s.sendto(b"", (sys.argv[1], 1))
time.sleep(0.2)             # until the address is resolved; without, the queue would drop what comes meanwhile
end = time.monotonic() + float(sys.argv[2])
number = 0
while time.monotonic() < end:
    s.sendto(struct.pack("<I", number) + bytes(1468), (sys.argv[1], 9999))
    number += 1
print(number)
'''

# Counts them, those out of order, and the median and the largest distance between two, in microseconds.
RECEIVER = '''
import socket, struct, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)
s.setsockopt(socket.SOL_SOCKET, 35, 1)
s.bind(("", 9999))
print("ready", flush=True)
s.settimeout(2)
stamps = []
last, disorder = -1, 0
try:
    while True:
        data, ancillary, _, _ = s.recvmsg(2048, 64)
        s.settimeout(1)
        number, = struct.unpack_from("<I", data)
        disorder += number < last
        last = number
        seconds, nanoseconds = struct.unpack("@qq", ancillary[0][2])
        stamps.append(seconds * 1000000 + nanoseconds / 1000)
except socket.timeout:
    pass
gaps = sorted(b - a for a, b in zip(stamps, stamps[1:]))
print(len(stamps), disorder, gaps[len(gaps) // 2], gaps[-1], 1472 * 8 * (len(stamps) - 1) / (stamps[-1] - stamps[0]))
'''


def measure(seconds=5.0):
    """Send datagrams over a line of 100 Mbit/s and of several times that, and tell what came."""
    import lab as laboratory

    reason = laboratory.why_not()
    if reason:
        print('not here: ' + reason)
        return 1
    for mbit in (100, 200, 400):
        with laboratory.Laboratory(clients=1) as lab:
            lab.server.lengthen(0.010)
            for host in lab.hosts:
                host.limit(mbit, queue='256kb', both=True)
            client = lab.clients[0]
            ping = lab.server.run(['ping', '-q', '-c', '50', '-i', '0.02', client.address], check=False,
                                  stdout=subprocess.PIPE, universal_newlines=True) if _has('ping') else None
            receiver = client.popen([sys.executable, '-c', RECEIVER], stdout=subprocess.PIPE, universal_newlines=True)
            receiver.stdout.readline()
            sender = lab.server.popen([sys.executable, '-c', SENDER, client.address, str(seconds)],
                                      stdout=subprocess.PIPE, universal_newlines=True)
            sent = int(sender.communicate()[0])
            came, disorder, median, largest, rate = receiver.communicate()[0].split()
            print('%d Mbit/s: %d datagrams sent, %s came, %s out of order; %.1f Mbit/s of UDP payload (%.1f fit); '
                  'distance: median %.0f us (%.0f by the line), largest %.0f us'
                  % (mbit, sent, came, disorder, float(rate), mbit * 1472 / 1514, float(median), 1514 * 8 / mbit,
                     float(largest)))
            print('  relay: ' + '; '.join(lab.server.line_report()))
            if ping:
                print('  ' + ping.stdout.strip().splitlines()[-1])
    return 0


def _has(program):
    return any(os.access(os.path.join(path, program), os.X_OK) for path in os.get_exec_path())


if __name__ == '__main__':
    raise SystemExit(main())
