"""A host that tampers with a group's datagrams: what a bad network, or somebody hostile, does to them.

    relay.py LOCAL_IP SOURCE_IP GROUP PORT WAY AS    until SIGTERM

It takes the datagrams that SOURCE_IP multicasts and multicasts them again itself, AS `server` from the address and port
from which they came (ip(7), IP_TRANSPARENT), with a TTL that tells them apart, or AS `stranger` from its own:

    shuffle     every 32 of them in random order
    twice       each twice, one after the other
    later       each a tenth of a second later, which is in another round
    damage      each third with a bit flipped, one cut short, or one with a byte too many; the others as they are
    forge       for each one several with its right header, or a neighbour's seq, and random data; and not the right one
    noise       random bytes of random sizes, several a millisecond, whatever SOURCE_IP sends, for as long as it runs

Says how many it sent on stderr, at the end.
"""

import os
import random
import select
import signal
import socket
import struct
import sys
import time

IP_TRANSPARENT = 19     # Linux's number
TTL = 7                 # kmcast's is 8
WINDOW = 32             # datagrams that are shuffled
DELAY = 0.1             # seconds
LONGEST_WAIT = 0.005    # seconds for which a window may stay incomplete


def damaged(datagram):
    """Return a datagram as a bad cable might deliver it (one whose UDP checksum happens to be right)."""
    way = random.randrange(3)
    if way == 0:
        at = random.randrange(len(datagram))
        return datagram[:at] + bytes([datagram[at] ^ 1 << random.randrange(8)]) + datagram[at + 1:]
    if way == 1:
        return datagram[:random.randrange(len(datagram))]
    return datagram + b"\0"


def forged(datagram):
    """Return datagrams that look like this one, but are not."""
    seq, = struct.unpack_from("<I", datagram)
    size = len(datagram) - 12
    return [datagram[:12] + os.urandom(size),
            struct.pack("<I", (seq + 1) % 2**32) + datagram[4:],
            struct.pack("<3I", (seq + random.randrange(-50, 50)) % 2**32, random.getrandbits(32), size) + datagram[12:],
            datagram[:8] + struct.pack("<I", random.getrandbits(32)) + datagram[12:]]


def noise():
    """Return random datagrams of random sizes."""
    return [os.urandom(random.choice([0, 1, 11, 12, 13, 700, 1471, 1472])) for _ in range(6)]


def main(local_ip, source_ip, group, port, way, as_whom):
    address = (group, int(port))
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)           # SO_RCVBUFFORCE
    taken.bind(address)
    taken.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton(local_ip))
    taken.setblocking(False)
    out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(local_ip))
    out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
    out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, TTL)
    if as_whom == "server":
        out.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    bound = as_whom != "server"                                 # to the source that we take on

    sent = 0
    ended = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    if way == "noise":
        os.nice(-15)                                            # a gap would be a chance for a client
    print("relay: ready", file=sys.stderr, flush=True)
    queue = []                                                  # of (when, datagram)
    while not ended:
        ready = select.select([taken], [], [], 0.001)[0]
        while ready:
            try:
                datagram, (source, source_port) = taken.recvfrom(65536)
            except BlockingIOError:
                break
            if source != source_ip:
                continue
            if not bound:
                out.bind((source, source_port))
                bound = True
            now = time.monotonic()
            if way == "damage" and random.randrange(3) == 0:
                datagram = damaged(datagram)
            if way == "later":
                queue.append((now + DELAY, datagram))
            elif way == "shuffle":
                queue.append((now + LONGEST_WAIT, datagram))
            elif way == "twice":
                queue += [(now, datagram)] * 2
            elif way == "forge":
                queue += [(now, fake) for fake in forged(datagram)]
            elif way == "damage":
                queue.append((now, datagram))
        now = time.monotonic()
        if way == "shuffle":
            due = []
            while len(queue) >= WINDOW or queue and queue[0][0] <= now:
                window, queue = queue[:WINDOW], queue[WINDOW:]
                random.shuffle(window)
                due += [datagram for _, datagram in window]
        else:
            due = [datagram for when, datagram in queue if when <= now]
            queue = queue[len(due):]
        if way == "noise":
            due = noise()
        for datagram in due:
            out.sendto(datagram, address)
        sent += len(due)
    print("relay: sent %d datagrams" % sent, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
