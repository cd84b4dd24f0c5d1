"""A nursery: an interpreter that has imported once what kmcast imports, and forks a child for each start of kmcast.

To start an interpreter and to import takes longer than many a test's transfer. A child runs its program from the first
line, as `__main__`, and ends as an interpreter ends; it only finds the modules that it imports already there.

    nursery = Nursery([python, "-X", "dev"], helpers.compiled(python), os.environ)
    child = Popen(nursery, ["kmcast.pyc", "client", "127.0.0.1", "127.0.0.1"], stdin, stdout, stderr)
    child = Popen(nursery, ["-c", "import kmcast; kmcast.TICK = 1; sys.exit(kmcast.main())"], stdin, stdout, stderr)

A child has its own three files and no other, a directory, a session and a process group of its own, and for the rest what
its nursery has, which is what that inherited: environment, limits, ignored signals, umask.

This file is both a module for tests, on Python 3, and the program of the nursery, on any Python. The two send each other
JSON through a socket of whole messages, the nursery's standard input. When that is closed, the nursery ends, and its
children with it.
"""

import array
import ctypes
import gc
import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

PIPE = subprocess.PIPE

_MESSAGE = 1 << 17      # bytes at most
_PATIENCE = 100         # seconds for an answer, which takes milliseconds


# ---------------------------------------------------------------------------------------------------------------------
# For tests

class Nursery(object):
    """The process of a nursery.

    command  the interpreter and its flags, a list
    program  the path of a kmcast.pyc for it
    env      its environment, a dict
    """

    def __init__(self, command, program, env):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_PATIENCE)
        self._process = subprocess.Popen(list(command) + [os.path.abspath(__file__), program], stdin=theirs,
                                         stdout=subprocess.DEVNULL, env=env, start_new_session=True)
        theirs.close()
        self._lock = threading.Lock()
        self._asked = 0

    def ask(self, files=(), **request):
        """Return the answer to a request, a dict; the descriptors `files` go with it."""
        with self._lock:
            self._asked += 1
            self._socket.sendmsg([json.dumps(dict(request, number=self._asked)).encode("ascii")],
                                 [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else [])
            while True:
                message = self._socket.recv(_MESSAGE)
                if not message:
                    raise EOFError("the nursery has ended with exit code %s" % self._process.wait())
                answer = json.loads(message.decode("ascii"))
                if answer["number"] == self._asked:     # else who asked was interrupted, and did not wait for this one
                    return answer

    def close(self):
        """End it, and its children."""
        self._socket.close()
        self._process.wait()


class Popen(object):
    """A child of a nursery, with what tests use of subprocess.Popen.

    arguments   what follows the interpreter on a command line: a program's path, or "-c" and code, and their arguments
    stdin etc.  a descriptor or an open file; None: ours; PIPE, for one of the first two
    cwd         the directory to run in; None: ours
    namespaces  paths of namespaces to enter, as nsenter(1) does

    After its end: `.returncode`, and `.peak_kib` of its resident memory.
    """

    def __init__(self, nursery, arguments, stdin, stdout, stderr, cwd=None, namespaces=()):
        self._nursery = nursery
        self.stdin = self.stdout = self.returncode = self.peak_kib = None
        its_ends = []
        try:
            if stdin == PIPE:
                stdin, ours = os.pipe()
                its_ends.append(stdin)
                self.stdin = open(ours, "wb", 0)
            if stdout == PIPE:
                ours, stdout = os.pipe()
                its_ends.append(stdout)
                self.stdout = open(ours, "rb", 0)
            files = [number if file is None else file if isinstance(file, int) else file.fileno()
                     for number, file in enumerate((stdin, stdout, stderr))]
            answer = nursery.ask(files, arguments=[_to_json(argument) for argument in arguments],
                                 cwd=_to_json(os.path.join(os.getcwd(), cwd or "")),
                                 namespaces=list(namespaces))
        finally:
            for end in its_ends:
                os.close(end)
        self.pid = answer["pid"]
        if "error" in answer:
            self.wait()
            raise OSError(answer["error"])

    def poll(self):
        """Return the exit code (-N if signal N ended it), or None while it runs."""
        if self.returncode is None and self._is_dead():
            answer = self._nursery.ask(wait=self.pid)
            self.returncode, self.peak_kib = answer["code"], answer["peak_kib"]
        return self.returncode

    def wait(self):
        """Wait for its end; return the exit code."""
        while self.poll() is None:
            time.sleep(0.001)
        return self.returncode

    def _is_dead(self):
        """Whether it is a zombie, which it stays until we have asked, so that no other process gets its id."""
        try:
            with open("/proc/%d/stat" % self.pid) as stat:
                return stat.read().rpartition(") ")[2][0] in "ZX"
        except OSError:
            return True


def _to_json(path):
    """Text of the bytes that a path or an argument has for the system."""
    return os.fsencode(path).decode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# The nursery

def _from_json(text):
    """What this Python makes of a path or an argument."""
    return text.encode("latin-1") if str is bytes else os.fsdecode(text.encode("latin-1"))


def _answer(control, request, **answer):
    os.write(control, json.dumps(dict(answer, number=request["number"])).encode("ascii"))


class _Piece(ctypes.Structure):             # struct iovec
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Files(ctypes.Structure):             # struct cmsghdr and its data
    _fields_ = [("size", ctypes.c_size_t), ("level", ctypes.c_int), ("kind", ctypes.c_int), ("files", ctypes.c_int * 3)]


class _Message(ctypes.Structure):           # struct msghdr
    _fields_ = [("name", ctypes.c_void_p), ("name_size", ctypes.c_uint32), ("pieces", ctypes.POINTER(_Piece)),
                ("count", ctypes.c_size_t), ("files", ctypes.POINTER(_Files)), ("files_size", ctypes.c_size_t),
                ("flags", ctypes.c_int)]


def _receive(libc):
    """Return the next request, None at the end, and the descriptors that came with it. (Python 2 has no recvmsg().)"""
    text, files = ctypes.create_string_buffer(_MESSAGE), _Files()
    piece = _Piece(ctypes.addressof(text), _MESSAGE)
    message = _Message(None, 0, ctypes.pointer(piece), 1, ctypes.pointer(files), ctypes.sizeof(files), 0)
    size = libc.recvmsg(0, ctypes.byref(message), 0)
    if size <= 0:
        return None, []
    return json.loads(text.raw[:size].decode("ascii")), list(files.files) if message.files_size else []


def _serve():
    """Do what is asked. Returns in a child only: the request for it."""
    ended = {}          # what we have answered, or will: who asked may have been interrupted before he heard it
    alive = set()
    libc = ctypes.CDLL(None, use_errno=True)
    while True:
        request, files = _receive(libc)
        if not request:
            for pid in alive:
                os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        if "wait" in request:
            pid = request["wait"]
            if pid in alive:
                _, status, usage = os.wait4(pid, 0)
                alive.remove(pid)
                ended[pid] = dict(peak_kib=usage.ru_maxrss,
                                  code=-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
            _answer(0, request, **ended[pid])
            continue
        pid = os.fork()
        if not pid:
            _settle(request, files, libc)
            return request
        alive.add(pid)
        for file in files:
            os.close(file)


def _settle(request, files, libc):
    """In a child: leave the nursery."""
    control = os.dup(0)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for number in os.listdir("/proc/self/fd"):
        if int(number) not in (0, 1, 2, control):
            try:
                os.close(int(number))
            except OSError:
                pass            # it was open to list them
    try:
        for path in request["namespaces"]:
            _enter(path, libc)
        os.chdir(_from_json(request["cwd"]))
    except (OSError, IOError) as error:
        _answer(control, request, pid=os.getpid(), error=str(error))
        os._exit(1)
    _answer(control, request, pid=os.getpid())
    os.close(control)


def _enter(path, libc):
    namespace = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(namespace, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(namespace)


def _code_of(path):
    """The code object of a program, be it compiled or not."""
    with open(path, "rb") as program:
        data = program.read()
    if not path.endswith(".pyc"):
        return compile(data, path, "exec")
    return marshal.loads(data[8 if sys.version_info < (3,) else 12 if sys.version_info < (3, 7) else 16:])


def _main():
    program = sys.argv[1]
    sys.path[0] = os.path.dirname(program)
    code = _code_of(program)
    __import__("kmcast")
    if hasattr(gc, "freeze"):
        gc.collect()
        gc.freeze()             # what is here already is no garbage of a child
    arguments = [_from_json(argument) for argument in _serve()["arguments"]]

    sys.modules["nursery"] = sys.modules["__main__"]    # this one: Python 2 empties a module that nobody knows any more
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        code = compile(arguments.pop(1), "<string>", "exec")
        sys.path[0] = ""
    else:
        main.__file__ = arguments[0]
        sys.path[0] = os.path.dirname(arguments[0])
        if arguments[0] != program:
            code = _code_of(arguments[0])
    sys.argv = arguments
    exec(code, main.__dict__)


if __name__ == "__main__":
    _main()
