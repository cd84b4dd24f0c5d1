"""Source and Sink: where an image comes from and where it goes."""

import hashlib
import os
import resource
import select
import stat
import threading

import pytest

import helpers
import kmcast

DATA = helpers.random_bytes(300000)


def read_all(source, size=10000):
    """All that a Source gives."""
    data, view = b"", memoryview(bytearray(size))
    while True:
        got = source.read_into(view)
        if got == 0:
            return data
        data += view[:got or 0].tobytes()


def write_all(sink, data=DATA, size=70000):
    for start in range(0, len(data), size):
        sink.write(memoryview(bytearray(data[start:start + size])), start)


def content(path):
    with open(str(path), "rb") as file:
        return file.read()


def names(folder):
    return sorted(os.listdir(str(folder)))


def mode(path):
    return stat.S_IMODE(os.stat(str(path)).st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


# ---------------------------------------------------------------------------------------------------------------------
# Source

def test_a_file_has_a_name_a_size_and_a_digest(tmp_path):
    (tmp_path / "image.raw").write_bytes(DATA)
    source = kmcast.Source(str(tmp_path / "image.raw"))
    source.start()
    assert (source.name, source.size, source.bytes) == ("image.raw", len(DATA), 0)
    assert source.digest() == hashlib.sha256(b"").digest()
    view = memoryview(bytearray(1000))
    assert source.read_into(view) == 1000 and view.tobytes() == DATA[:1000]
    source.hash(view)
    assert source.digest() == hashlib.sha256(DATA[:1000]).digest()
    view = memoryview(bytearray(len(DATA) - 1000))
    assert source.read_into(view) == len(DATA) - 1000 and view.tobytes() == DATA[1000:]
    source.hash(view)
    assert source.read_into(view) == 0 and source.bytes == len(DATA)
    assert source.digest() == source.digest(2) == hashlib.sha256(DATA).digest()
    assert source.digest(1) == hashlib.sha256(DATA[:1000]).digest(), "through any part of it"
    source.close()


def test_a_file_is_called_the_same_as_long_as_nobody_changes_it(tmp_path):
    (tmp_path / "image").write_bytes(DATA)
    names = []
    for data in (DATA, None, DATA + b"x"):
        if data is not None:
            (tmp_path / "image").write_bytes(data)
        source = kmcast.Source(str(tmp_path / "image"), digest=False)
        names.append(source.image())
        source.close()
    assert names[0] != names[2] and names[1] != names[2]
    source = kmcast.Source(str(tmp_path / "image"), digest=False)
    assert source.image() == names[2] and len(names[2]) == 32 and int(names[2], 16) >= 0
    source.close()


def test_what_has_no_size_has_another_name_each_time(tmp_path):
    os.mkfifo(str(tmp_path / "fifo"))
    source = kmcast.Source(str(tmp_path / "fifo"), digest=False)
    assert source.image() != source.image()
    source.close()


@pytest.mark.parametrize("size", [0, 1000, len(DATA) - 1, len(DATA) + 1])
def test_a_file_that_changes_its_size_is_no_image(tmp_path, size):
    (tmp_path / "image").write_bytes(DATA)
    source = kmcast.Source(str(tmp_path / "image"))
    view = memoryview(bytearray(1000))
    assert source.read_into(view) == 1000
    with open(str(tmp_path / "image"), "r+b") as file:
        file.truncate(size)
    with pytest.raises(kmcast.Failure) as raised:
        read_all(source)
    assert str(len(DATA)) in raised.value.reason and str(max(size, 1000)) in raised.value.reason


def test_a_file_whose_size_the_kernel_does_not_know_is_read_to_its_end():
    assert b"MemTotal" in read_all(kmcast.Source("/proc/meminfo"))


def test_without_digests_there_is_none(tmp_path):
    (tmp_path / "image").write_bytes(DATA)
    source = kmcast.Source(str(tmp_path / "image"), digest=False)
    assert read_all(source) == DATA and source.digest() == b""
    source.close()


def test_a_fifo_has_no_size_and_is_read_as_it_comes(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)

    def produce():
        with open(fifo, "wb", 0) as file:
            for start in range(0, len(DATA), 1234):
                file.write(DATA[start:start + 1234])
    thread = threading.Thread(target=produce)
    thread.start()
    source = kmcast.Source(fifo)
    assert source.size is None
    select.select([source], [], [])         # until somebody writes, it is at its end
    assert read_all(source) == DATA
    thread.join()
    source.close()


@pytest.mark.parametrize("path", ["/nonexistent/image", "/", ""])
def test_what_cannot_be_read_is_wrong_usage(path):
    with pytest.raises(kmcast.Failure) as failure:
        kmcast.Source(path)
    assert failure.value.code == 2 and "\n" not in failure.value.reason


def test_a_read_error_is_a_failure():
    source = kmcast.Source("/proc/self/mem")        # there is nothing at address 0
    with pytest.raises(kmcast.Failure) as failure:
        source.read_into(memoryview(bytearray(10)))
    assert failure.value.code == 1
    source.close()


# ---------------------------------------------------------------------------------------------------------------------
# Hasher

@pytest.fixture
def hasher():
    thread = kmcast.Hasher()
    thread.start()
    yield thread
    thread.close()
    assert not thread.is_alive()


def test_parts_are_hashed_in_their_order_and_each_has_a_digest(hasher):
    whole = hashlib.sha256()
    expected = [whole.digest()]
    for number in range(20):
        part = helpers.random_bytes(1000 * number, seed=number)
        hasher.give(memoryview(bytearray(part)))
        whole.update(part)
        expected.append(whole.digest())
    assert hasher.digest() == expected[-1]
    assert [hasher.digest(parts) for parts in range(21)] == expected


def test_nothing_has_a_digest_too(hasher):
    assert hasher.digest() == hasher.digest(0) == hashlib.sha256(b"").digest()


def test_a_part_may_change_when_its_digest_is_known(hasher):
    """So those are enough areas that there are rounds under way, and one to fill."""
    areas, expected, whole = [bytearray(100000) for _ in range(5)], [hashlib.sha256().digest()], hashlib.sha256()
    for number in range(50):
        if number >= 5:
            assert hasher.digest(number - 4) == expected[number - 4]
        area = areas[number % 5]
        area[:] = helpers.random_bytes(100000, seed=number)
        whole.update(bytes(area))
        expected.append(whole.digest())
        hasher.give(memoryview(area))
    assert hasher.digest() == whole.digest()


def test_a_hasher_that_was_not_started_can_be_closed():
    kmcast.Hasher().close()


# ---------------------------------------------------------------------------------------------------------------------
# Sink

def test_a_file_appears_when_it_is_committed(tmp_path, umask):
    target = tmp_path / "image"
    sink = kmcast.Sink(str(target)).open()
    assert not target.exists()
    write_all(sink)
    assert not target.exists() and len(names(tmp_path)) == 1
    assert sink.written == len(DATA)
    sink.commit(len(DATA))
    assert names(tmp_path) == ["image"] and content(target) == DATA
    assert mode(target) == 0o666 & ~umask
    sink.close()
    assert content(target) == DATA, "what was committed is not discarded"


def test_an_older_file_stays_until_then_and_leaves_its_permissions(tmp_path, umask):
    target = tmp_path / "image"
    target.write_bytes(b"older")
    os.chmod(str(target), 0o604)
    sink = kmcast.Sink(str(target)).open()
    write_all(sink)
    assert content(target) == b"older"
    sink.commit(len(DATA))
    assert content(target) == DATA and mode(target) == 0o604 and names(tmp_path) == ["image"]


def test_what_is_not_finished_is_for_nobody_else_to_read(tmp_path, umask):
    sink = kmcast.Sink(str(tmp_path / "image")).open()
    assert mode(tmp_path / names(tmp_path)[0]) == 0o600
    sink.close()


def test_discard_leaves_nothing_behind(tmp_path):
    (tmp_path / "image").write_bytes(b"older")
    sink = kmcast.Sink(str(tmp_path / "image")).open()
    write_all(sink)
    sink.close()
    sink.close()
    assert names(tmp_path) == ["image"] and content(tmp_path / "image") == b"older"


def test_two_at_once_do_not_share_a_temporary_file(tmp_path):
    sinks = [kmcast.Sink(str(tmp_path / "image")).open() for _ in range(2)]
    assert len(names(tmp_path)) == 2
    for sink in sinks:
        write_all(sink)
        sink.commit(len(DATA))
    assert names(tmp_path) == ["image"] and content(tmp_path / "image") == DATA


def test_a_trial_of_the_disk_leaves_everything_as_it_was(tmp_path):
    target = tmp_path / "image"
    target.write_bytes(b"older")
    sink = kmcast.Sink(str(target)).open()
    before = names(tmp_path)
    assert sink.trial(sink.room()) > 0 and sink.trial(None) > 0
    assert names(tmp_path) == before and content(target) == b"older"
    write_all(sink)
    sink.commit(len(DATA))
    assert content(target) == DATA


def test_a_trial_takes_no_more_than_half_of_the_room(tmp_path, monkeypatch):
    sizes, write = [], os.write
    monkeypatch.setattr(kmcast.os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    kmcast.Sink(str(tmp_path / "image")).open().trial(3 << 20)
    assert sum(sizes) <= 3 << 19


def test_a_trial_of_a_disk_that_takes_nothing_fails(tmp_path):
    sink, limits = kmcast.Sink(str(tmp_path / "image")).open(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((IOError, OSError)):
            sink.trial(None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sink.close()
    assert names(tmp_path) == []


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "target").write_bytes(b"older")
    os.symlink("elsewhere/target", str(tmp_path / "link"))
    os.symlink("elsewhere/new", str(tmp_path / "dangling"))
    for link in ("link", "dangling"):
        sink = kmcast.Sink(str(tmp_path / link)).open()
        write_all(sink)
        sink.commit(len(DATA))
        assert os.path.islink(str(tmp_path / link)) and content(tmp_path / link) == DATA
    assert names(tmp_path / "elsewhere") == ["new", "target"]
    assert names(tmp_path) == ["dangling", "elsewhere", "link"]


def test_a_relative_path(tmp_path):
    before = os.getcwd()
    os.chdir(str(tmp_path))
    try:
        sink = kmcast.Sink("image").open()
        write_all(sink)
        sink.commit(len(DATA))
    finally:
        os.chdir(before)
    assert names(tmp_path) == ["image"]


def test_a_fifo_is_written_in_place(tmp_path):
    fifo, received = str(tmp_path / "fifo"), []
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: received.append(content(fifo)))
    thread.start()
    sink = kmcast.Sink(fifo).open()
    write_all(sink)
    sink.commit(len(DATA))
    thread.join(20)
    assert received == [DATA] and names(tmp_path) == ["fifo"]


def test_a_device_is_written_in_place():
    before = os.stat("/dev/null")
    sink = kmcast.Sink("/dev/null").open()
    write_all(sink)
    sink.commit(len(DATA))
    assert os.stat("/dev/null").st_rdev == before.st_rdev and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device_is_a_failure():
    sink = kmcast.Sink("/dev/full").open()
    with pytest.raises(kmcast.Failure) as failure:
        write_all(sink)
    assert failure.value.code == 1 and "No space left" in failure.value.reason
    sink.close()


def test_a_reader_that_ends_is_a_failure(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: open(fifo, "rb").close())
    thread.daemon = True
    thread.start()
    sink = kmcast.Sink(fifo).open()
    with pytest.raises(kmcast.Failure) as failure:
        while True:                         # until the reader has ended, the FIFO takes what it has room for
            write_all(sink, DATA[:1000])
    assert failure.value.code == 1
    thread.join(20)
    sink.close()


@pytest.mark.parametrize("path", ["/nonexistent/image", "/", "", "/dev/null/image"])
def test_what_cannot_be_written_is_wrong_usage(path):
    with pytest.raises(kmcast.Failure) as failure:
        kmcast.Sink(path).open()
    assert failure.value.code == 2 and "\n" not in failure.value.reason


def test_a_directory_that_goes_away_is_a_failure(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    sink = kmcast.Sink(str(folder / "image")).open()
    write_all(sink)
    os.unlink(str(folder / names(folder)[0]))
    folder.rmdir()
    with pytest.raises(kmcast.Failure) as failure:
        sink.commit(len(DATA))
    assert failure.value.code == 1
    sink.close()


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    name = "x" * 250                        # NAME_MAX is 255
    sink = kmcast.Sink(str(tmp_path / name)).open()
    write_all(sink)
    sink.commit(len(DATA))
    assert names(tmp_path) == [name]
