"""kmcast report: one page from one or more reports, that holds whatever a report says and fits every window."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

import helpers
from helpers import LOOPBACK
from pythons import BOTH, in_turn, NEWEST

HOSTILE = "<script>alert(1)</script>\"'&amp;--><style>*{display:none}</style>\u202e\u0000" + 150 * "x"
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """A page as a browser takes it: `.elements` (name, attributes), `.text`; fails where tags do not pair."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data


def page_of(*reports, python=NEWEST, tmp_path=None):
    """The page of reports, dicts or paths; it is checked to be self-contained."""
    paths = []
    for number, report in enumerate(reports):
        if isinstance(report, dict):
            path = tmp_path / ("report%d.json" % number)
            path.write_text(json.dumps(report))
            report = path
        paths.append(str(report))
    code, stderr, stdout = helpers.start_kmcast(["report"] + paths, python).finish(60)
    assert (code, stderr) == (0, ""), stderr
    text = stdout.decode("ascii")
    page = Page(text)
    names = set(name for name, _ in page.elements)
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base", "form"}, names
    assert [name for name, _ in page.elements].count("style") == 1
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "xlink:href")], attributes
        assert attributes.get("href", "#").startswith("#"), attributes
        assert "url" not in attributes.get("style", "")
    assert "url(" not in text and "@import" not in text
    page.source = text
    return page


def host(number, result="complete", **parts):
    return dict({"host": "node%d" % number, "address": "10.0.%d.%d" % divmod(number, 250), "result": result, "reason": None,
                 "exit_code": 0, "lost": 10 * number, "repaired": {"multicast": 9 * number, "tcp": number}, "by_chain": 0,
                 "waited_for": {}, "overflows": 0, "seconds": 12.5}, **parts)


def report(hosts=(), **parts):
    steps = [{"seconds": float(second), "bytes": 10 ** 7 * (second if second < 5 else max(5, second - 3)), "rate": 8e7, "loss": 0,
              "waited_for": "node3 (10.0.0.3) (its disk or command)" if 5 < second < 9 else None} for second in range(1, 60)]
    return dict({"kmcast": "1.0.0", "command": "server", "arguments": ["server", "-i", "an image", "auto", "3"],
                 "ended": "2026-11-20 12:00:00", "result": "partly", "exit_code": 3, "reason": None, "bytes": 560000000,
                 "sha256": "ab" * 32, "seconds": 59.0, "goodput": 7.6e7, "steps": steps, "hosts": list(hosts),
                 "carried": {"multicast": 5e8, "coded": 3e6, "tcp": 1e5, "chain": 0}}, **parts)


def of_a_client(**parts):
    made = report(command="client", result="failed", exit_code=1, reason="the disk is full", lost=5, overflows=0,
                  server={"address": "10.0.0.1", "port": 18383}, **parts)
    del made["hosts"]
    return made


def three():
    return [host(1, waited_for={"network": 1.25}), host(2),
            host(3, "failed", reason="it went away", exit_code=None, waited_for={"output": 20.5, "network": 0.75})]


@BOTH
def test_the_page_of_a_transfer_says_what_its_reports_say(python, tmp_path):
    data, port = helpers.random_bytes(3000000), helpers.free_port()
    (tmp_path / "image").write_bytes(data)
    server = helpers.start_server(["--report", tmp_path / "server", "-i", tmp_path / "image", LOOPBACK, 2, port], python)
    clients = [helpers.start_client(["--report", tmp_path / str(number), LOOPBACK, LOOPBACK, port], python,
                                    stdout=helpers.HASH) for number in range(2)]
    for process in clients + [server]:
        assert process.finish(60)[0] == 0
    page = page_of(tmp_path / "server", tmp_path / "0", tmp_path / "1", python=python)
    for said in ("2 of 2 hosts have the image", "Server: complete, exit code 0", "3000000 bytes", helpers.sha256(data),
                 "server --report %s -i %s" % (tmp_path / "server", tmp_path / "image")):
        assert said in page.text, said
    assert page.text.count("Client: complete, exit code 0") == 2


@BOTH
def test_the_page_of_a_rehearsal_says_that_it_is_none_of_an_image(python, tmp_path):
    port = helpers.free_port()
    check = helpers.start_kmcast(["check", "--minutes", "0.01", "--report", tmp_path / "check", LOOPBACK, 1, port], python)
    client = helpers.start_client(["--report", tmp_path / "client", LOOPBACK, LOOPBACK, port], python)
    assert (client.finish(60)[0], check.finish(60)[0]) == (0, 0)
    page = page_of(tmp_path / "check", tmp_path / "client", python=python)
    for said in ("1 of 1 host passed the rehearsal", "Rehearsal: complete, exit code 0", "Client of a rehearsal: complete, exit code 0"):
        assert said in page.text, said
    assert "the image" not in page.text


def test_the_page_tells_of_a_fallback(tmp_path):
    page = page_of(of_a_client(fallback={"reason": "lost the server", "url": "http://host/image", "bytes": 3000000, "size": 5000000,
                                         "verified": 2000000, "size_told": True}), tmp_path=tmp_path)
    assert "3 MB from http://host/image; 2 MB verified by the server's SHA-256; why: lost the server" in page.text


def test_hosts_are_rows_worst_first_with_what_each_was_waited_for(tmp_path):
    rows = three() + [host(4, "missing", host=None, address=None, exit_code=None, reason="it never came", seconds=None),
                      host(5, "refused", exit_code=3, reason="it is not on the list of hosts")]
    page = page_of(report(rows), tmp_path=tmp_path)
    assert "2 of 4 hosts have the image" in page.text and "1 failed, 1 missing, 1 refused, 2 complete" in page.text
    table = page.text[page.text.index("Hosts:"):]
    assert [table.index(name) for name in ("node3", "it never came", "node5", "node1", "node2")] == sorted(
        table.index(name) for name in ("node3", "it never came", "node5", "node1", "node2"))
    assert "its disk or command 20.5 s" in table and "its network 0.8 s" in table and "its network 1.2 s" in table
    assert "kmcast server -i 'an image' auto 3" in page.text and "exit code 3" in page.text


def test_the_chart_has_the_goodput_and_marks_who_was_waited_for(tmp_path):
    page = page_of(report(three()), tmp_path=tmp_path)
    svg, = [attributes for name, attributes in page.elements if name == "svg" and attributes.get("role") == "img"]
    assert svg["viewbox"] == "0 0 1000 200"
    assert "node3 (10.0.0.3) (its disk or command): 3.0 s" in page.text
    assert "waiting for node3 (10.0.0.3) (its disk or command), 3.0 s" in page.text     # what the mouse shows
    mark, = [attributes for name, attributes in page.elements if name == "rect" and "--wait" in attributes["style"]]
    assert (float(mark["x"]), float(mark["width"])) == (pytest.approx(1000 * 5 / 59, abs=0.1), pytest.approx(1000 * 3 / 59, abs=0.1))


@BOTH
def test_whatever_a_report_holds_is_a_text(python, tmp_path):
    """A host's name is the host's to choose."""
    bad = report([host(1, host=HOSTILE, address=HOSTILE, reason=HOSTILE, result=HOSTILE, waited_for={HOSTILE: 5.0})],
                 reason=HOSTILE, arguments=[HOSTILE, "a b"], ended=HOSTILE, sha256=HOSTILE, result=HOSTILE, kmcast=HOSTILE)
    bad["steps"][6]["waited_for"] = HOSTILE
    page = page_of(bad, of_a_client(), python=python, tmp_path=tmp_path)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "\u202e" not in page.source and "\0" not in page.source and "<script" not in page.source


@in_turn("parts", [
    {}, {"hosts": None, "steps": None, "carried": None}, {"hosts": [1, None, {}], "steps": [{}, 3, {"seconds": "x"}]},
    {"bytes": "many", "seconds": None, "goodput": True, "carried": [1]}, {"bytes": 10 ** 40, "seconds": -1, "goodput": float("nan")},
    {"steps": [{"seconds": 1e-9, "bytes": 0, "waited_for": 3}], "exit_code": "3", "arguments": "x", "server": 5},
    {"fallback": {"url": 5, "bytes": []}, "hosts": [{"heard": {"10M": {}}}, {"heard": 3}], "rehearsal": True},
    {"steps": [{"seconds": 1e9, "bytes": 10 ** 17}]}, {"steps": [{"seconds": 5, "bytes": 9}, {"seconds": 4, "bytes": 5}]}],
    ids=range(9))
def test_a_report_with_other_or_fewer_keys_has_a_page_too(python, parts, tmp_path):
    """Those of earlier and later versions."""
    page_of(dict({"command": "server"}, **parts), python=python, tmp_path=tmp_path)
    page_of(dict({"command": "client"}, **parts), python=python, tmp_path=tmp_path)
    page_of(dict({"command": "check"}, **parts), python=python, tmp_path=tmp_path)


FITTINGS = {"round_trip": 0.00025, "packet": 1500, "reached": False, "room": 5 * 10 ** 9, "write_speed": 10 ** 8,
            "socket_buffer": 425984, "datagrams": "mmsg", "python": "3.9.2", "kernel": "5.10.0"}


def test_the_page_of_a_rehearsal_says_what_each_host_heard_and_what_it_has(tmp_path):
    rows = [host(1, heard={"10M": 1.0, "100M": 0.5, "hold": 0.999}, **FITTINGS),
            host(2, "failed", reason="no multicast reaches it", heard={"10M": 0.0})]
    page = page_of(report(rows, command="check", arguments=["check", "auto", "2"]), tmp_path=tmp_path)
    for said in ("1 of 2 hosts passed the rehearsal", "Rehearsal: partly, exit code 3", "100 %", "50 %", "99.9 %", "0 %",
                 "no multicast reaches it", "TCP 0.25 ms, packet 1500, chain no, room 5 GB, written 100 MB/s, buffer 426 kB, "
                 "datagrams mmsg, Python 3.9.2, kernel 5.10.0"):
        assert said in page.text, said
    assert page.text.index("node2") < page.text.index("node1") and "SHA-256" not in page.text


@BOTH
@pytest.mark.parametrize("wrong", [None, True, "x", 10 ** 400, -1, 1e300, float("nan"), [], {}, HOSTILE], ids=range(10))
def test_whatever_a_rehearsal_says_of_a_host_there_is_a_page(wrong, python, tmp_path):
    page_of(report([host(1, heard={"10M": wrong, HOSTILE: 1}, **dict.fromkeys(FITTINGS, wrong)), host(2, heard=wrong)],
                   command="check"), python=python, tmp_path=tmp_path)


@BOTH
def test_what_is_no_report_is_said_to_be_none(python, tmp_path):
    for content in ("", "{}", "[]", "{\"command\": \"demo\"}", "\xff", "[" * 100000):
        (tmp_path / "it").write_text(content, encoding="latin-1")
        code, stderr, stdout = helpers.start_kmcast(["report", tmp_path / "it"], python).finish(20)
        assert (code, stdout) == (2, b"") and stderr.count("\n") == 1 and "is no report that kmcast has written" in stderr, stderr
    code, stderr, _ = helpers.start_kmcast(["report", tmp_path / "nothing"], python).finish(20)
    assert code == 2 and "cannot read" in stderr
    with open("/dev/full", "wb") as full:
        (tmp_path / "it").write_text(json.dumps(report()))
        code, stderr, _ = helpers.start_kmcast(["report", tmp_path / "it"], python, stdout=full).finish(20)
        assert code == 1 and "No space left" in stderr


@BOTH
def test_a_thousand_hosts_are_a_thousand_rows(python, tmp_path):
    page = page_of(report([host(number) for number in range(1000)]), python=python, tmp_path=tmp_path)
    assert len([name for name, _ in page.elements if name == "tr"]) == 1001
    assert len(page.source) < 2000000


def test_a_thousand_reports_of_clients_make_a_page_that_can_be_sent(tmp_path):
    page = page_of(*[of_a_client() for _ in range(1000)], tmp_path=tmp_path)
    assert page.text.count("Client: failed") == 1000 and len(page.source) < 10000000


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page in frames of these widths; what is wider than its frame is written into the title.
FRAMES = """<!DOCTYPE html><title></title><body style="margin: 0">%s<script>
onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, wide = [...page.querySelectorAll("body *")].filter(
    one => one.getBoundingClientRect().right > frame.clientWidth + 0.5).map(one => one.outerHTML.slice(0, 200));
  return {width: frame.clientWidth, scrolls: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, wide};
})); };</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("command, hosts", [("server", 3), ("server", 1000), ("check", 3)])
def test_the_page_fits_a_wide_and_a_narrow_window(command, hosts, tmp_path):
    rows = three() + [host(number, waited_for={"silence": 0.5}) for number in range(4, hosts + 1)] + [
        host(0, "failed", host=HOSTILE, reason=HOSTILE)]
    if command == "check":
        rows = [dict(row, heard=dict.fromkeys(["10M", "100M", "1G", "max", "hold"], 0.99987), **FITTINGS) for row in rows]
    page = page_of(report(rows, command=command, arguments=[command, HOSTILE]), of_a_client(ended=HOSTILE), tmp_path=tmp_path)
    (tmp_path / "page.html").write_text(page.source)
    widths = (1280, 1060, 400)
    (tmp_path / "frames.html").write_text(FRAMES % "".join(
        '<iframe src="page.html" style="border: 0; width: %dpx; height: 900px"></iframe>' % width for width in widths))
    try:
        process = subprocess.Popen([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                                    "--user-data-dir=%s" % (tmp_path / "profile"), "--window-size=1400,1000", "--dump-dom",
                                    (tmp_path / "frames.html").as_uri()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        dom = process.communicate(timeout=120)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        pytest.skip("the browser does not come to an end here")
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    if not title or not title.group(1):
        pytest.skip("the browser does not work here")
    frames = json.loads(html.unescape(title.group(1)))
    assert [frame["width"] for frame in frames] == list(widths)
    for frame in frames:
        assert frame["height"] > 1000 and frame["wide"] == [] and frame["scrolls"] <= frame["width"], frame
