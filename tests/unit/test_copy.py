"""Copy, Sink and Journal: an image that comes together in any order, with crashes in between."""

import hashlib
import os
import random

import pytest

import helpers
import kmcast

IMAGE = helpers.random_bytes(4321, seed=3)
CUTS = [0, 500, 1000, 1700, 2100, 3000, 3001, 4000, 4321]
PARTS = list(zip(CUTS, CUTS[1:]))
NAME, OTHER = "0" * 32, "1" * 32


class Given(object):
    """A round as a Copy gets it."""

    def __init__(self, start, stop, image=IMAGE):
        self.place, self.size = start, stop - start
        self.digest = hashlib.sha256(image[:stop]).digest()
        self.pieces = [memoryview(bytearray(image[start:stop]))]


def digest_of(image):
    return hashlib.sha256(image).digest()


def close_all(fds):
    """Close what may be closed already."""
    for fd in set(fds):
        try:
            os.close(fd)
        except OSError:
            pass


class Run(object):
    """A run of a client as far as its output goes; what a server has to bring is in `lacks`."""

    def __init__(self, folder, image=IMAGE, name=NAME, resume=True):
        self.image, self.target = image, str(folder / "image")
        self.sink = kmcast.Sink(self.target, resume=resume).open()
        self.copy = kmcast.Copy(self.sink)
        self.said = kmcast.Held(self.copy.held) if self.copy.image == name else kmcast.Held()
        self.lack(self.copy.begin(name, True))
        self.sink.expect(len(image))

    def lack(self, ranges):
        """The server is told that these are not there."""
        for pair in ranges:
            self.said.remove(*pair)

    def bring(self, start, stop):
        """A round comes; returns whether it was taken."""
        given = Given(start, stop, self.image)
        if not self.copy.verify(given, given.pieces):
            self.lack(self.copy.doubt_all())        # no packet of it is damaged
            assert self.copy.verify(given, given.pieces)
        self.said.add(start, stop)
        self.copy.write(given, given.pieces)

    def check(self):
        """Read back what can be."""
        while self.copy.unchecked is not None:
            self.lack(self.copy.check())

    def finish(self):
        """All is there, as far as the server knows; returns whether it is, and was put in place."""
        self.lack(self.copy.end(len(self.image), digest_of(self.image)))
        self.check()
        if self.copy.verified < len(self.image):
            assert not self.said.covers(0, len(self.image)), "the server must know of it"
            return False
        self.sink.commit(self.copy.verified)
        return True

    def to_the_end(self, rng, cuts):
        """Rounds come in passes, from a place anywhere on."""
        start = rng.randrange(len(cuts))
        parts = list(zip(cuts, cuts[1:]))
        while True:
            for part in parts[start:]:
                if not self.said.covers(*part):
                    self.bring(*part)
                if rng.random() < .5 and self.copy.unchecked is not None:
                    self.lack(self.copy.check())
            start = 0
            if self.said.covers(0, len(self.image)) and self.finish():
                return

    def ends(self, rng, cuts):
        """Go on until it has ended well."""
        self.to_the_end(rng, cuts)
        self.sink.close()
        with open(self.target, "rb") as file:
            equal = file.read() == self.image
        assert equal and os.listdir(os.path.dirname(self.target)) == ["image"]

    def dies(self):
        """As with SIGKILL: what is open is closed."""
        close_all([self.sink._fd, self.copy._journal._fd])      # pylint: disable=protected-access


def test_rounds_in_order_are_never_read_back(tmp_path):
    run = Run(tmp_path)
    for part in PARTS:
        run.bring(*part)
        assert run.copy.verified == part[1] and run.copy.unchecked is None
    assert run.finish() and run.copy.checked == 0


def test_what_came_before_its_turn_is_read_back_once(tmp_path):
    run = Run(tmp_path)
    for part in PARTS[3:] + PARTS[:3]:
        assert run.copy.unchecked is None
        run.bring(*part)
    assert run.copy.verified == 1700 and run.copy.bytes == 4321
    run.check()
    assert run.copy.verified == 4321 and run.copy.checked == 4321 - 1700
    assert run.finish()


def test_what_is_verified_is_not_written_again(tmp_path):
    """Whatever a round claims to be there."""
    run = Run(tmp_path)
    for part in PARTS[:3]:
        run.bring(*part)
    written = run.sink.written
    false = Given(500, 1000, b"x" * 4321)
    assert run.copy.verify(false, false.pieces)
    run.copy.write(false, false.pieces)
    assert run.sink.written == written
    run.ends(random.Random(1), CUTS)


def test_what_is_hashed_half_is_hashed_again_if_it_is_written_again(tmp_path):
    run = Run(tmp_path)
    run.copy.CHUNK = 10
    for part in [(1000, 3000), (0, 1000)]:
        run.bring(*part)
    for _ in range(100):
        assert run.copy.check() == []
    given = Given(1500, 1600)
    given.pieces = [memoryview(bytearray(100))]
    run.copy.write(given, given.pieces)
    doubted = []
    while run.copy.unchecked is not None:
        doubted += run.copy.check()
    assert doubted == [(1000, 1600)] and run.copy.verified == 1000


def test_the_same_bytes_in_doubt_twice_are_the_end(tmp_path):
    run = Run(tmp_path)
    wrong = Given(500, 1000)
    wrong.pieces = [memoryview(bytearray(500))]
    run.copy.write(wrong, wrong.pieces)
    run.bring(0, 500)
    assert run.copy.check() == [(500, 1000)]
    run.copy.verified = 499             # as if it was not yet known, and the round comes before its turn
    run.copy.write(wrong, wrong.pieces)
    run.copy.verified = 500
    with pytest.raises(kmcast.Failure):
        run.copy.check()
    run.sink.close()
    assert os.listdir(str(tmp_path)) == [], "and nobody goes on with it"


def test_a_journal_without_digests_is_believed_nothing(tmp_path):
    run = Run(tmp_path)
    run.bring(*PARTS[0])
    run.dies()
    again = kmcast.Copy(kmcast.Sink(str(tmp_path / "image"), resume=True).open())
    assert list(again.held) == [(0, 500)]
    assert again.begin(NAME, False) == [(0, 500)] and again.bytes == 0
    again.sink.close()


@pytest.mark.parametrize("seed", range(40))
def test_any_order_and_any_damage_end_with_the_image(tmp_path, seed):
    rng = random.Random(seed)
    run, cuts = Run(tmp_path), CUTS
    for _ in range(rng.randrange(4)):
        for part in rng.sample(PARTS, rng.randrange(len(PARTS))):
            if not run.said.covers(*part):
                run.bring(*part)
        run.dies()
        damage(tmp_path, rng)
        run = Run(tmp_path)
        if rng.random() < .5:           # the server was started again, too
            cuts = sorted(set([0, 4321] + [rng.randrange(1, 4321) for _ in range(8)]))
    run.ends(rng, cuts)


def damage(folder, rng):
    """What a crash of the host, or somebody, may do to a part and its journal."""
    for name in os.listdir(str(folder)):
        path = str(folder / name)
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            for _ in range(rng.choice([0, 0, 1, 3]) if size else 0):
                file.seek(rng.randrange(size))
                file.write(b"\0" * rng.randrange(1, 200))
            if rng.random() < .3:
                file.truncate(rng.randrange(size + 1))
            if name.endswith("part"):
                file.truncate(min(os.path.getsize(path), 4321 + 100))


class Crash(BaseException):
    """The program dies here."""


class Dying(object):
    """What kmcast knows as `os`, in which the program dies before, or in the middle of, its n-th change of a file."""

    CHANGES = ("write", "ftruncate", "rename", "unlink")

    def __init__(self, left, rng):
        self.left, self.rng, self.fds = left, rng, []

    def open(self, *args):
        """As os.open()."""
        self.fds.append(os.open(*args))
        return self.fds[-1]

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in self.CHANGES:
            return call

        def change(*args):
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    call(args[0], bytes(bytearray(args[1])[:self.rng.randrange(len(args[1]))]))
                raise Crash()
            return call(*args)
        return change


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("host", [False, True])
def test_wherever_the_program_dies_the_next_run_has_the_image(tmp_path, monkeypatch, seed, host):
    """host: the host goes down with it, and loses some of what was written last."""
    died = 0
    for point in range(1, 60):
        rng = random.Random(1000 * seed + point)
        folder = tmp_path / str(point)
        folder.mkdir()
        dying = Dying(point, rng)
        monkeypatch.setattr(kmcast, "os", dying)
        try:
            Run(folder).to_the_end(rng, CUTS)
        except Crash:
            died += 1
            close_all(dying.fds)
        monkeypatch.setattr(kmcast, "os", os)
        if (folder / "image").exists():
            assert (folder / "image").read_bytes() == IMAGE
        if host:
            damage_of_host(folder, rng)
        Run(folder, helpers.random_bytes(5000, seed=9) if point % 7 == 0 else IMAGE, OTHER if point % 7 == 0 else NAME).ends(rng, [
            0, 1, 900, 2500, 4000, 5000 if point % 7 == 0 else 4321])
    assert died > 15


def damage_of_host(folder, rng):
    """Pages that were not on the disk yet: zeros."""
    for path in folder.glob(".*.part"):
        with open(str(path), "r+b") as file:
            start = rng.randrange(1 + os.path.getsize(str(path)))
            file.seek(start)
            file.write(b"\0" * min(700, os.path.getsize(str(path)) - start))


def test_without_resume_nothing_is_kept(tmp_path):
    run = Run(tmp_path, resume=False)
    run.bring(*PARTS[0])
    assert len(os.listdir(str(tmp_path))) == 1
    run.sink.close()
    assert os.listdir(str(tmp_path)) == []


def test_room_is_reserved_before_the_first_byte(tmp_path):
    sink = kmcast.Sink(str(tmp_path / "image")).open()
    sink.expect(1 << 20)
    path = str(tmp_path / os.listdir(str(tmp_path))[0])
    if kmcast.fallocate and os.stat(path).st_blocks:        # else this file system has no such thing
        assert os.stat(path).st_blocks * 512 >= 1 << 20
    assert os.path.getsize(path) == 0, "its size tells what was written"
    sink.write(memoryview(bytearray(b"abc")), 0)
    sink.commit(3)
    assert os.stat(str(tmp_path / "image")).st_blocks * 512 < 1 << 20
    sink.close()


def test_more_than_there_is_room_for_is_refused_at_the_start(tmp_path):
    sink = kmcast.Sink(str(tmp_path / "image")).open()
    with pytest.raises(kmcast.Failure) as failure:
        sink.expect(1 << 60)
    assert failure.value.code == 3 and "no room" in failure.value.reason
    sink.close()
    assert os.listdir(str(tmp_path)) == []
