"""What the other tests take for granted: that a child of a nursery is like a process started for itself."""

import json
import os
import resource
import signal
import sys
import time

import pytest

import helpers
from pythons import BOTH, NEWEST, OLDEST

#: Prints what a process is, and has: all that a program can see of how it was started.
PORTRAIT = r"""
import json, os, resource, signal, sys, threading

def read(name):
    with open("/proc/self/" + name) as file:
        return file.read()

portrait = {
    "names": [__name__, sys.modules["__main__"].__dict__ is globals(), sys.executable, sys.version],
    "arguments": [os.fsencode(arg).decode("latin-1") if sys.version_info[0] > 2 else arg.decode("latin-1") for arg in sys.argv],
    "first": sys.path[0],
    "flags": [repr(sys.flags), sys.warnoptions, getattr(sys, "_xoptions", None), sys.getfilesystemencoding()],
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "ids": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid(), os.getuid(), os.nice(0)],
    "limits": [resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")],
    "signals": [repr(signal.getsignal(number)) for number in range(1, signal.NSIG)],
    "kernel": [line for line in read("status").splitlines() if line.split(":")[0] in (
        "Umask", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads", "NoNewPrivs", "CapEff", "Groups")],
    "files": sorted(os.listdir("/proc/self/fd")),
    "kinds": [os.fstat(fd).st_mode for fd in range(3)],
    "threads": [thread.name for thread in threading.enumerate()],
    "faults": __import__("faulthandler").is_enabled() if sys.version_info[0] > 2 else None,
    "namespaces": [os.readlink("/proc/self/ns/" + name) for name in ("net", "uts", "mnt", "pid")],
    "terminal": [getattr(file, "isatty")() for file in (sys.stdin, sys.stdout, sys.stderr)],
    "streams": [[file.encoding, getattr(file, "errors", None)] for file in (sys.stdin, sys.stdout, sys.stderr)],
}
sys.stdout.write(json.dumps(portrait))
"""


def both_ways(python, code, args=(), flags=(), **options):
    """Start Python code from a nursery and for itself; return both Processes."""
    command, arguments = [python] + list(flags), ["-c", code] + list(args)
    return [helpers.start(command + arguments, warm=warm, **options) for warm in ((command, arguments, ()), None)]


@BOTH
@pytest.mark.parametrize("flags", [[], ["-B", "-W", "ignore"]], ids=["no flags", "flags"])
def test_a_child_of_a_nursery_sees_what_any_process_sees(python, flags, tmp_path):
    portraits = []
    for process in both_ways(python, PORTRAIT, [u"\u00e4", os.fsdecode(b"\xff"), "a\nb", ""], flags, stdin=b"data",
                             env={"LC_ALL": "C.UTF-8", "SOME": "thing"}, cwd=str(tmp_path)):
        code, stderr, stdout = process.finish(20)
        assert (code, stderr) == (0, "")
        portraits.append(json.loads(stdout.decode("ascii")))
    assert portraits[0] == portraits[1]
    assert portraits[0]["directory"] == str(tmp_path) and len(portraits[0]["arguments"]) == 5


@BOTH
def test_what_a_test_changes_of_itself_is_inherited(python):
    before = os.umask(0o27), signal.signal(signal.SIGHUP, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[2][1]))
    try:
        processes = both_ways(python, PORTRAIT)
    finally:
        os.umask(before[0])
        signal.signal(signal.SIGHUP, before[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, before[2])
    ended = [process.finish(20) for process in processes]
    assert ended[0] == ended[1] and b"0027" in ended[0][2]


#: How a process ends: code, and what the exit code must be.
ENDS = {
    "in order": ("", 0),
    "with a code": ("sys.exit(7)", 7),
    "with a text": ("sys.exit('words')", 1),
    "with what is said at exit": ("import atexit; atexit.register(sys.stderr.write, 'words')", 0),
    "with what is said at the very end": ("class Last(object):\n    def __del__(self, write=os.write): write(2, b'words')\n"
                                          "last = Last()", 0),
    "after its threads": ("import threading, time; threading.Timer(0.2, sys.stderr.write, ['words']).start()", 0),
    "at once": ("import atexit; atexit.register(sys.stderr.write, 'words'); os._exit(5)", 5),
    "by a signal": ("os.kill(os.getpid(), 9)", -9),
    "by Ctrl-C": ("import signal; signal.signal(2, 0); os.kill(os.getpid(), 2)", -2),
    "with a pipe that nobody reads": ("r, w = os.pipe(); os.close(r)\ntry: os.write(w, b'.')\nexcept OSError: sys.exit(4)", 4),
}


@BOTH
@pytest.mark.parametrize("end", sorted(ENDS))
def test_a_child_of_a_nursery_ends_as_any_process_ends(python, end):
    code, expected = ENDS[end]
    ended = [process.finish(20) for process in both_ways(python, "import os, sys\n" + code)]
    assert ended[0] == ended[1] and ended[0][0] == expected


@BOTH
def test_an_exception_that_nobody_catches(python):
    """Its traceback has the nursery's lines on top, and for the rest it is what it would be."""
    for process in both_ways(python, "1 // 0"):
        code, stderr, _ = process.finish(20)
        assert code == 1 and stderr.startswith("Traceback") and "ZeroDivisionError" in stderr.splitlines()[-1], stderr


@pytest.mark.parametrize("code", ["keep = open('/dev/null')", "import socket; keep = socket.socket()",
                                  "loop = [open('/dev/null')]; loop.append(loop); del loop"])
def test_what_a_child_of_a_nursery_does_not_close_is_found(code):
    for process in both_ways(NEWEST, code, flags=["-X", "dev", "-W", "error"]):
        with pytest.raises(AssertionError) as error:
            process.finish(20)
        assert "ResourceWarning" in str(error.value)


@BOTH
def test_a_child_of_a_nursery_that_hangs_is_ended_with_all_its_group(python):
    for process in both_ways(python, "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); sys.stderr.write('up');"
                                     "sys.stderr.flush(); time.sleep(60)"):
        process.wait_stderr("up")
        with pytest.raises(AssertionError) as error:
            process.finish(0.1)
        assert "up" in str(error.value) and (python == OLDEST or "most recent call first" in str(error.value))
        assert process.poll() == -signal.SIGABRT
        assert process.finish(5)[0] == -signal.SIGABRT      # the other one held stdout open as well


@BOTH
def test_a_child_of_a_nursery_that_has_ended_is_there_until_somebody_asks(python):
    """So that a signal that comes too late hits no other process, and is no error either."""
    for process in both_ways(python, ""):
        wait_for_end(process.pid)
        process.signal(signal.SIGTERM)
        assert process.popen.wait() == 0
        with pytest.raises(OSError):
            process.signal(signal.SIGTERM)


@BOTH
def test_a_directory_that_is_not_there(python):
    warm = [python], ["-c", ""], ()
    for way in (warm, None):
        with pytest.raises(OSError) as error:
            helpers.start(warm[0] + warm[1], cwd="/nonexistent", warm=way)
        assert "No such file" in str(error.value)


def wait_for_end(pid):
    """Wait until a process is a zombie, or gone."""
    deadline = time.time() + 20
    while time.time() < deadline:
        try:
            with open("/proc/%d/stat" % pid) as stat:
                if stat.read().rpartition(") ")[2][0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError("process %d still runs" % pid)


#: A test process that starts a child of a nursery, and is killed before it ends that.
KILLED = """
import os, sys
sys.path.insert(0, %r)
import helpers
process = helpers.start_client(["--wait", 60, "127.0.0.1", "127.0.0.1", helpers.free_port()], sys.argv[1])
print(process.pid)
with open("/proc/%%d/stat" %% process.pid) as stat:
    print(stat.read().rpartition(") ")[2].split()[1])
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


@BOTH
def test_a_nursery_and_its_children_end_when_the_test_process_is_killed(python):
    code, _, stdout = helpers.start([sys.executable, "-c", KILLED % os.path.dirname(helpers.BASE_PEER), python]).finish(60)
    pids = [int(pid) for pid in stdout.split()]
    assert code == -9 and len(set(pids)) == 2
    for pid in pids:
        wait_for_end(pid)
