#!/bin/sh
# Run kmcast's tests; make what they need first.
#
# usage: sh tests/run.sh [unit] [e2e] [lab] [-- arguments for pytest...]
#
#   unit   tests/unit, on the newest Python 3 and on 2.7
#   e2e    tests/end_to_end, which start kmcast with every interpreter found
#   lab    tests/laboratory, on hosts made of network namespaces: needs root
#
# Without any of the three: all. What was run and what was skipped, and why, is said at the end. Exit code 0: nothing failed.
#
# Interpreters: those on PATH and in ~/.pyenv/versions that kmcast supports (2.7, 3.6 and later) and that really run.
# pytest goes into .venv-* at the top of the repository, which git ignores, or into a temporary directory where that
# cannot be written. As root on a Debian, packages that are missing are installed.
#
# Environment: KMCAST_REQUIRE, words of which each must have been tested or the run fails: an interpreter such as 2.7,
# "newest" (the newest Python 3), "lab".
set -u

cd "$(dirname "$0")/.." || exit 1
root=$PWD
export PYTHONDONTWRITEBYTECODE=1            # leaves no __pycache__, perhaps of root, between the sources
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1     # the same run whatever else is installed
unset PYTHONPATH PYTHONHOME

parts=
while [ $# -gt 0 ]; do
    case $1 in
        unit | e2e | lab) parts="$parts $1" ;;
        --) shift; break ;;
        -h | --help) sed -n '2,/^set -u/s/^# \{0,1\}//p' tests/run.sh; exit 0 ;;
        *) echo "usage: sh tests/run.sh [unit] [e2e] [lab] [-- arguments for pytest...]" >&2; exit 2 ;;
    esac
    shift
done
: "${parts:=unit e2e lab}"

temporary=$(mktemp -d) || exit 1
mkdir "$temporary/programs" || exit 1
trap 'rm -rf "$temporary"' EXIT
trap 'trap "" TERM; kill 0; exit 130' INT     # what runs in the background does not hear Ctrl-C itself
trap 'exit 143' HUP TERM

say() { printf '\n== %s\n' "$*"; }
ran() { printf '  %s\n' "$*" >>"$temporary/ran"; }
skipped() { printf '  %s\n' "$*" >>"$temporary/skipped"; }
fail() { printf '  %s\n' "$*" >>"$temporary/failed"; }

# ----------------------------------------------------------------------------------------------------------------------
# Interpreters: one a line in $temporary/interpreters, "VERSION PATH", from the oldest to the newest, each version once.

candidates() {
    (
        IFS=:
        for directory in $PATH; do
            for name in python3 python2 python python2.7 'python3.[0-9]' 'python3.[0-9][0-9]'; do
                # Unquoted: the pattern is for the shell. IFS is ":", so a directory with blanks stays one word.
                ls -d "${directory:-.}"/$name 2>/dev/null
            done
        done
    )
    ls -d /usr/libexec/platform-python 2>/dev/null
    ls -d "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/*/bin/python 2>/dev/null
}

find_interpreters() {
    candidates | while IFS= read -r candidate; do
        # Only running it tells whether it works: a pyenv shim may have no interpreter behind it. That it prints its own
        # path gets behind the shims that do.
        "$candidate" -c 'import sys; sys.stdout.write("%d.%d.%d %s\n" % (sys.version_info[:3] + (sys.executable,)))' \
            </dev/null 2>/dev/null || printf '%s\n' "$candidate" >>"$temporary/broken"
    done | sort -s -t . -k 1,1n -k 2,2n -k 3,3n | awk '!seen[$1]++' >"$temporary/found"
    while read -r version path; do
        case $version in
            2.7.* | 3.[6-9].* | 3.[1-9][0-9].*) echo "$version $path" >>"$temporary/interpreters" ;;
            *) skipped "Python $version ($path): kmcast supports 2.7, 3.6 and later" ;;
        esac
    done <"$temporary/found"
}

# ----------------------------------------------------------------------------------------------------------------------
# pytest: what runs it is an interpreter and a directory to import it from, "" if the interpreter has it itself. (Not
# PYTHONPATH: the interpreters that a test starts would inherit it.)

# Run pytest with interpreter $1 and directory $2; the rest are its arguments. Most of the time that a pytest takes to
# start is spent in compiling, so all of them share what they have compiled, in a place outside of the repository; and so
# they do with what helpers.py compiles.
run_pytest() {
    interpreter=$1 directory=$2
    shift 2
    KMCAST_COMPILED=$temporary/programs "$interpreter" -c 'import sys
directory, compiled = sys.argv.pop(1), sys.argv.pop(1)
if directory:
    sys.path.insert(0, directory)
if sys.version_info >= (3, 8):
    sys.pycache_prefix, sys.dont_write_bytecode = compiled, False
import pytest
sys.argv[0] = "pytest"
sys.exit(pytest.main(sys.argv[1:]))' "$directory" "$temporary/compiled" "$@"
}

has_pytest() { run_pytest "$1" "$2" --version >/dev/null 2>&1 </dev/null; }

# Set $place to a directory named $1 that we can fill: in the repository, else a temporary one.
choose_place() {
    for place in "$root/$1" "$root/$1-$(id -u)"; do
        # One that is there and is of no use is left from an aborted run, or is another user's.
        rm -rf "$place" 2>/dev/null
        if mkdir "$place" 2>/dev/null; then
            return
        fi
    done
    place=$temporary/$1
    mkdir "$place"
}

# Find or make a pytest for interpreter $1 of version $2; set $pytest_python and $pytest_directory to the two.
get_pytest() {
    python=$1 name=.venv-$2
    pytest_directory=
    for place in "$root/$name" "$root/$name-$(id -u)"; do
        if [ -x "$place/bin/python" ] && has_pytest "$place/bin/python" ""; then
            pytest_python=$place/bin/python
            return 0
        fi
        if [ -d "$place/_pytest" ] && has_pytest "$python" "$place"; then
            pytest_python=$python pytest_directory=$place
            return 0
        fi
    done
    say "making a pytest for Python $2"
    choose_place "$name"
    pytest_python=$place/bin/python
    case $2 in
        2.*)
            # 4.6 is the last pytest for 2.7. An interpreter without pip gets one in an environment made by virtualenv.
            if "$python" -m pip install -q --target "$place" 'pytest<5' >"$temporary/log" 2>&1; then
                pytest_python=$python pytest_directory=$place
            elif [ -n "$newest" ] && "$newest" -m venv "$temporary/virtualenv" >>"$temporary/log" 2>&1 &&
                "$temporary/virtualenv/bin/python" -m pip install -q 'virtualenv<20.22' >>"$temporary/log" 2>&1 &&
                rm -rf "$place" &&
                "$temporary/virtualenv/bin/python" -m virtualenv -q --app-data "$temporary/app-data" -p "$python" "$place" \
                    >>"$temporary/log" 2>&1; then
                "$pytest_python" -m pip install -q 'pytest<5' >>"$temporary/log" 2>&1
            fi
            ;;
        *)
            "$python" -m venv "$place" >"$temporary/log" 2>&1 &&
                "$pytest_python" -m pip install -q pytest >>"$temporary/log" 2>&1
            ;;
    esac
    if has_pytest "$pytest_python" "$pytest_directory"; then
        return 0
    fi
    rm -rf "$place"
    if has_pytest "$python" ""; then
        pytest_python=$python pytest_directory=
        return 0
    fi
    tail -n 5 "$temporary/log"
    return 1
}

# ----------------------------------------------------------------------------------------------------------------------
# Running

# Run the tests of directory $2, called $1 in the summary, with the interpreter and pytest directory $4 and $5; the rest
# are arguments for pytest. Each file, or share of one, has a pytest of its own, and $3 of them run at once: most of their
# time is spent in waiting, and each test has ports, or hosts, of its own. Returns 1 if there is nothing to run, else 0:
# that a test failed is noted by fail().
run_part() {
    title=$1 tests=$2 lanes=$3 interpreter=$4 directory=$5
    shift 5
    if ! ls "$tests"/test_*.py >/dev/null 2>&1; then
        skipped "$title: $tests has no tests yet"
        return 1
    fi
    say "$title"
    results=$(mktemp -d "$temporary/results.XXXXXX")
    list_jobs >"$results/jobs"
    while [ "$lanes" -gt 0 ]; do
        run_lane "$@" </dev/null 3<"$results/jobs" &
        lanes=$((lanes - 1))
    done
    wait
    passed=$(ls -d "$results"/*/passed 2>/dev/null | wc -l)
    all=$(wc -l <"$results/jobs")
    if [ "$passed" = "$all" ]; then
        ran "$title: passed"
    else
        fail "$title: $passed of $all files or shares of one passed"
    fi
    return 0
}

# Files that take long, by name, and into how many shares each is divided. They are begun first.
LONG="
    end_to_end/test_fuzz:2 end_to_end/test_fallback:3 end_to_end/test_simulate:2 end_to_end/test_clocks_of_both:2
    end_to_end/test_what_is_seen:2 end_to_end/test_hostile_servers:2 end_to_end/test_strangers:2 end_to_end/test_passes:2
    end_to_end/test_transfer:2 end_to_end/test_signals:2 end_to_end/test_key:2 end_to_end/test_chain:2 end_to_end/test_failures:2
    end_to_end/test_report_page:1 end_to_end/test_check:1 end_to_end/test_again:1 end_to_end/test_loss:1
    end_to_end/test_hosts:1 laboratory/test_patience:1 laboratory/test_chain:3 laboratory/test_recipes:3
    laboratory/test_passes:2 laboratory/test_clocks:1 laboratory/test_rehearsal:1 laboratory/test_loss:2
    laboratory/test_faults_of_network:2 laboratory/test_faults_of_server:2 laboratory/test_stalls:1 unit/test_pacing:1
    unit/test_datagrams:1
"

# What is to be run, a line each, the long ones first and then from the largest to the smallest: a file, and which of how
# many shares of it.
list_jobs() {
    (cd "$tests" && ls -S test_*.py) | awk -v directory="${tests##*/}" -v long="$LONG" '
        BEGIN { count = split(long, one, " ") }
        { order[NR] = $0; there[directory "/" $0] = 1 }
        END {
            for (i = 1; i <= count; i++) {
                split(one[i], part, ":")
                if (!there[part[1] ".py"]) continue
                file = substr(part[1] ".py", length(directory) + 2)
                for (share = 1; share <= part[2]; share++) print file, share "/" part[2]
                done[file] = 1
            }
            for (i = 1; i <= NR; i++) if (!done[order[i]]) print order[i], "1/1"
        }'
}

# Run one job after the other, of those that no other lane has taken.
run_lane() {
    while read -r file share <&3; do
        result=$results/${file%.py}-${share%/*}
        mkdir "$result" 2>/dev/null || continue
        run_pytest "$interpreter" "$directory" -q -p no:cacheprovider --rootdir "$root" -r fEsx --share "$share" "$tests/$file" \
            "$@" >"$result/log" 2>&1 3<&-
        code=$?
        name=$file
        [ "$share" = 1/1 ] || name="$file, share $share"
        { echo "$tests/$name, $title"; cat "$result/log"; } >"$result/text"
        cat "$result/text"
        case $code in
            0) touch "$result/passed" ;;
            5) if [ $# -gt 0 ]; then
                   touch "$result/passed"               # none matches these arguments
               else
                   fail "$title, $name: no test was collected"
               fi ;;
            *) fail "$title, $name: pytest ended with exit code $code" ;;
        esac
    done
}

wants() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac }

# Packages for what a test uses: the laboratory's hosts and their losses, the man page, what a process asks of the kernel.
install_packages() {
    packages=
    for pair in nft:nftables ethtool:ethtool ip:iproute2 mandoc:mandoc strace:strace; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
    done
    if [ -z "$packages" ]; then
        return
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        skipped "tests that need${packages}: not installed, and that takes root and apt-get"
        return
    fi
    say "installing$packages"
    # Unquoted: one word a package.
    if ! { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $packages
         } >"$temporary/log" 2>&1; then
        tail -n 5 "$temporary/log"
        skipped "tests that need${packages}: could not be installed"
    fi
}

PATH=$PATH:/usr/sbin:/sbin      # nft, ip and ethtool; an ordinary user's PATH may lack these directories
export PATH
: >"$temporary/interpreters"
find_interpreters
KMCAST_PYTHONS=$(cut -d ' ' -f 2- "$temporary/interpreters" | paste -s -d : -)
export KMCAST_PYTHONS
newest_version=$(awk '/^3/ { print $1 }' "$temporary/interpreters" | tail -n 1)
newest=$(sed -n "s/^$newest_version //p" "$temporary/interpreters")
install_packages

# The newest Python 3 for which there can be a pytest: a Debian's own may lack its venv package.
python_3= directory_3= version_3=
sort -s -t . -k 1,1nr -k 2,2nr -k 3,3nr "$temporary/interpreters" >"$temporary/descending"
while read -r version path <&3; do
    case $version in
        3.*)
            if get_pytest "$path" "$version"; then
                python_3=$pytest_python directory_3=$pytest_directory version_3=$version
                break
            fi
            skipped "pytest on Python $version: could not be made"
            ;;
    esac
done 3<"$temporary/descending"

unit_versions=
if wants unit; then
    if [ -n "$python_3" ]; then
        # In the background: meanwhile the pytest for 2.7 is made, and run.
        run_part "unit tests on Python $version_3" tests/unit 2 "$python_3" "$directory_3" "$@" &
        unit_versions=$version_3
    fi
    version_2= path_2=
    read -r version_2 path_2 <<END
$(grep '^2' "$temporary/interpreters" | tail -n 1)
END
    if [ -z "$version_2" ]; then
        skipped "unit tests on Python 2.7: none found"
    elif get_pytest "$path_2" "$version_2"; then
        run_part "unit tests on Python $version_2" tests/unit 2 "$pytest_python" "$pytest_directory" "$@"
        unit_versions="$unit_versions $version_2"
    else
        skipped "unit tests on Python $version_2: no pytest could be made for it"
    fi
    wait
fi
if [ -z "$python_3" ]; then
    fail "no Python 3 that can run pytest: nothing could be run on it"
elif wants e2e; then
    # In the background: most of what the laboratory does is to wait.
    run_part "end-to-end tests" tests/end_to_end 6 "$python_3" "$directory_3" "$@" &
fi
lab=skipped
if [ -n "$python_3" ] && wants lab; then
    # lab.py knows what a laboratory takes; to be root is the least of it.
    if [ -e tests/lab.py ]; then
        reason=$(cd tests && "$python_3" -c 'import lab; print(lab.why_not() or "")' 2>&1)
    else
        reason=$([ "$(id -u)" = 0 ] || echo "needs root")
    fi
    if [ -n "$reason" ]; then
        skipped "laboratory tests: $reason"
    else
        run_part "laboratory tests" tests/laboratory 5 "$python_3" "$directory_3" "$@" && lab=ran
    fi
fi
wait

# ----------------------------------------------------------------------------------------------------------------------
# What was required, and the summary

for word in ${KMCAST_REQUIRE:-}; do
    case $word in
        lab)
            if wants lab && [ $lab != ran ]; then
                fail "the laboratory tests are required here"
            fi
            ;;
        newest)
            if [ "$version_3" != "$newest_version" ] || [ -z "$newest_version" ]; then
                fail "the newest Python 3 (${newest_version:-none found}) is required here"
            fi
            ;;
        *)
            if ! grep -q "^$(echo "$word" | sed 's/\./\\./g')[. ]" "$temporary/interpreters"; then
                fail "Python $word is required here, and was not found"
            elif [ "$word" = 2.7 ] && wants unit && ! echo " $unit_versions" | grep -q ' 2\.7'; then
                fail "the unit tests on Python 2.7 are required here"
            fi
            ;;
    esac
done

say "summary"
echo "interpreters:"
sed 's/^\([^ ]*\) /  \1  /' "$temporary/interpreters"
if [ -s "$temporary/broken" ]; then
    echo "  left out, because they do not run: $(paste -s -d ' ' "$temporary/broken")"
fi
for list in ran skipped failed; do
    if [ -s "$temporary/$list" ]; then
        echo "$list:"
        cat "$temporary/$list"
    fi
done
if [ -s "$temporary/failed" ]; then
    echo "result: FAILED"
    exit 1
fi
echo "result: nothing failed"
