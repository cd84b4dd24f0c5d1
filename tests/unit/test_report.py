"""What the user sees: lines, how many of them, the progress line, the table."""

import ast
import io
import re

import pytest

import helpers
import kmcast


def test_a_log_that_is_flooded_says_how_much_it_hid():
    few = kmcast.AtMost(3)
    assert [few("line %d" % number, 100.0) for number in range(10)] == ["line 0", "line 1", "line 2"] + [None] * 7
    assert few("another", 100.1 + few.PERIOD) == "(7 more like these) another"


def told():
    """(name, facts) of each event that the program tells, as its source has them."""
    with io.open(helpers.KMCAST, encoding="utf-8") as source:
        for node in ast.walk(ast.parse(source.read().encode("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "tell":
                names = [node.args[0].body, node.args[0].orelse] if isinstance(node.args[0], ast.IfExp) else [node.args[0]]
                assert not {"what", "self"} & set(keyword.arg for keyword in node.keywords), "tell() has these itself"
                for name in names:
                    yield ast.literal_eval(name), set(keyword.arg for keyword in node.keywords)


def test_every_event_has_words_for_its_facts_and_every_words_an_event():
    """A template that wants a fact that nobody gives would fail only when it happens."""
    unspoken = {"server_ended", "client_ended", "ended"}       # read by the summary and the report
    assert set(name for name, _ in told()) == set(kmcast.WORDS) | unspoken
    for name, facts in told():
        if name not in unspoken:
            made_of = {"payload": "causes", "members": "names"}
            given = facts | set(made_of[fact] for fact in facts if fact in made_of)
            assert set(re.findall(r"%\((\w+)\)", kmcast.WORDS[name][1])) <= given, name


def status(**parts):
    default = dict(begun=True, bytes=0, size=10**9, here=4, places=4, waits="", lost=0.001, repaired=0.002, rate=1e9,
                   carrier="multicast", seconds=0.0)
    return kmcast.Status(**dict(default, **parts))


class Job(object):
    def __init__(self):
        self.now = status()

    def status(self, _now):
        return self.now


class Terminal(object):
    terminal = True

    def __init__(self, columns=80):
        self.columns, self.drawn, self.lines = columns, [], []

    def width(self):
        return self.columns

    def draw(self, text):
        self.drawn.append(text)

    def line(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_progress_fits_the_terminal_and_says_the_most_telling_first(columns):
    job, screen = Job(), Terminal(columns)
    progress = kmcast.Progress("server", job, screen)
    for second in range(1, 11):
        job.now = status(bytes=10**7 * second, seconds=float(second))
        progress.look(float(second))
    line = screen.drawn[-1]
    assert len(line) < columns and line.startswith("10 %, 80 Mbit/s"), line
    if columns >= 40:
        assert "1:30 left" in line
    if columns >= 200:
        assert "4 of 4 clients" in line and "by multicast" in line and "on average 80 Mbit/s" in line


def test_progress_is_redrawn_four_times_a_second_at_most():
    screen = Terminal()
    progress = kmcast.Progress("server", Job(), screen)
    for hundredth in range(1000):
        progress.look(hundredth / 100.0)
    assert len(screen.drawn) <= 41


def test_who_is_waited_for_is_named_after_two_seconds_without_progress():
    job, screen = Job(), Terminal(80)
    progress = kmcast.Progress("server", job, screen)
    job.now = status(bytes=10**8, waits="node3 (10.0.0.3) (its disk or command)")
    for tenth in range(31):
        progress.look(tenth / 10.0)
    assert not [line for line in screen.drawn[:6] if "node3" in line]
    assert "waiting for node3" in screen.drawn[-1]


def test_without_a_terminal_there_is_a_line_now_and_then():
    job, screen = Job(), Terminal()
    screen.terminal = False
    progress = kmcast.Progress("server", job, screen)
    for second in range(61):
        job.now = status(bytes=10**7 * second, seconds=float(second))
        progress.look(float(second))
    assert 5 <= len(screen.lines) <= 7 and not screen.drawn


def row(host, **parts):
    default = dict(host=host, address="10.0.0.1", result="complete", reason=None, exit_code=0, lost=0, seconds=1.0,
                   repaired={"multicast": 0, "tcp": 0}, by_chain=0, waited_for={}, overflows=None, late=None, lacks=0)
    return dict(default, **parts)


def test_the_table_has_a_row_a_host_and_says_how_many_it_left_out():
    lines = list(kmcast.host_table([row("node%d" % number) for number in range(25)], 20))
    assert len(lines) == 22 and "and 5 more" in lines[-1]
    assert len(list(kmcast.host_table([row("node%d" % number) for number in range(25)], 100))) == 26
    (_, line) = kmcast.host_table([row("node1", waited_for={"output": 3.0, "network": 1.0})], 20)
    assert "3.0 s, output" in line


def test_a_name_that_sha256sum_would_quote_is_not_said():
    assert kmcast.digest_line("0" * 64, "images/node 1.img") == "0" * 64 + "  images/node 1.img"
    for name in ("a\\b", "a\nb", u"\u00e4", " a", "", None, False):
        assert kmcast.digest_line("0" * 64, name) == "0" * 64 + "  -"
