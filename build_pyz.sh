#!/bin/sh
# Build kmcast.pyz from the kmcast.py next to this script: one file that runs on every host that has some Python.
#
# usage: sh build_pyz.sh [OUTPUT]         OUTPUT: default kmcast.pyz next to this script
#
# Any Python from 2.7 on will do ($PYTHON, if set, is tried first); the same source gives the same bytes with
# each of them, so a kmcast.pyz can be compared by its checksum.
set -eu

case ${1:-} in
    -*) echo "usage: sh build_pyz.sh [OUTPUT]" >&2; exit 2 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
source=$here/kmcast.py
output=${1:-$here/kmcast.pyz}

# Tried by running it: a `python3` on PATH may be a stub that only says how to install one.
works() {
    "$1" -c '' </dev/null >/dev/null 2>&1
}

builder=
for candidate in ${PYTHON:+"$PYTHON"} python3 python /usr/libexec/platform-python python2; do
    if works "$candidate"; then
        builder=$candidate
        break
    fi
done
if [ -z "$builder" ]; then
    echo "build_pyz.sh: no Python here (tried python3, python, /usr/libexec/platform-python, python2)" >&2
    exit 127
fi
if [ ! -r "$source" ]; then
    echo "build_pyz.sh: cannot read $source" >&2
    exit 1
fi

# Written beside the output and renamed, so that there is never half a kmcast.pyz.
temporary=$output.tmp$$
trap 'rm -f "$temporary"' EXIT
trap 'exit 1' HUP INT TERM

"$builder" - "$source" "$temporary" <<'PYTHON_CODE'
"""Write LAUNCHER and after it a zip archive that holds the source as __main__.py, which Python runs.

The archive is put together here, by the record layouts of PKWARE's APPNOTE.TXT (4.3.7, 4.3.12, 4.3.16), because the
zipfile module writes other bytes in one version than in the next. Offsets count from the start of the whole file, as they
do in an archive that was put behind a program by `zip -A`.
"""
import os
import struct
import sys
import zlib

# `</dev/null` keeps the image on stdin for the real run. The probe also passes over what kmcast does not run on.
LAUNCHER = b"""\
#!/bin/sh
# kmcast: these lines find a Python; it runs the zip archive that follows them.
for python in python3 python /usr/libexec/platform-python python2; do
    if "$python" -c 'import sys; v = sys.version_info; sys.exit(v < (2, 7) or (3,) <= v < (3, 6))' \\
            </dev/null >/dev/null 2>&1; then
        exec "$python" "$0" "$@"
    fi
done
echo "kmcast: no Python 2.7 or 3.6+ here (tried python3, python, /usr/libexec/platform-python, python2)" >&2
exit 127
"""
NAME = b"__main__.py"
VERSION_NEEDED = 20                   # 2.0
MADE_BY = 3 << 8 | VERSION_NEEDED     # Unix
STORED = 0
TIME, DATE = 0, 1 << 5 | 1            # 1980-01-01 00:00, the earliest there is
MODE = 0o100644 << 16                 # a plain file, rw-r--r--

with open(sys.argv[1], "rb") as file:
    source = file.read()

# What the record before the data and the one in the directory at the end have in common.
common = struct.pack("<5H3L2H", VERSION_NEEDED, 0, STORED, TIME, DATE,
                     zlib.crc32(source) & 0xFFFFFFFF, len(source), len(source), len(NAME), 0)
local = b"PK\3\4" + common + NAME
directory = (b"PK\1\2" + struct.pack("<H", MADE_BY) + common
             + struct.pack("<3H2L", 0, 0, 0, MODE, len(LAUNCHER)) + NAME)
end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(directory), len(LAUNCHER) + len(local) + len(source), 0)

with open(sys.argv[2], "wb") as file:
    file.write(LAUNCHER + local + source + directory + end)
os.chmod(sys.argv[2], 0o755)
PYTHON_CODE

mv -f "$temporary" "$output"
