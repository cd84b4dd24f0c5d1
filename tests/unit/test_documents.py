"""The manual page and README say what the program says: options, defaults, exit codes, version, commands."""

import io
import os
import re
import shlex
import subprocess
import sys

import pytest

import helpers
import kmcast

COMMANDS = ("server", "client", "check", "demo", "key", "report", "completion")

#: Sections of the manual page that describe options -> the commands that have these.
SECTIONS = {
    "Options of every command": COMMANDS + ("",),
    "Options of server, client, check and demo": ("server", "client", "check", "demo"),
    "Options of server, client and check": ("server", "client", "check"),
    "Options of server and check": ("server", "check"),
    "Options of server and client": ("server", "client"),
    "Options of check": ("check",),
    "Options of server": ("server",),
    "Options of client": ("client",),
    "Options of demo": ("demo",),
    "Options without a command": ("",),
}

#: What may be written before the name of a command in README and manual page.
PROGRAMS = ("kmcast", "/usr/local/bin/kmcast", "kmcast.py", "kmcast.pyz", "./kmcast.pyz")


def read(*path):
    with io.open(os.path.join(helpers.ROOT, *path), encoding="utf-8") as file:
        # str: what shlex takes on Python 2.7.
        return str(re.sub(u"[^\\0-~]", u"?", file.read()))


def run(*arguments):
    """Standard output of kmcast."""
    return subprocess.check_output([sys.executable, helpers.compiled(sys.executable)] + list(arguments)).decode("ascii")


def split_option(text):
    """`-o FILE, --output FILE` -> (("--output", "-o"), "FILE")."""
    names = re.findall(r"(?:^|[\s,])(--?[a-z][a-z0-9-]*)", text)
    metavar = re.sub(r"--?[a-z][a-z0-9-]*|,", " ", re.sub(r"\{.*\}", lambda m: m.group(0).replace(",", "|"), text)).split()
    assert len(set(metavar)) <= 1, text
    return tuple(sorted(names)), metavar[0] if metavar else ""


def default_in_help(text):
    found = re.search(r"\(([^()]*)\)$", text)
    return str(found.group(1)) if found and "implementation" not in found.group(1) else None


# ---------------------------------------------------------------------------------------------------------------------
# --help

def options_of_help(command):
    """{(names, metavar): (group, default or None)} of `kmcast COMMAND --help`."""
    text = run(*[word for word in (command, "--help") if word])
    entries = re.findall(r"^([a-z]*)  +(-\S.*?)  +(\S.*)$", text, re.MULTILINE)
    assert entries, text
    result, group = {}, None
    for label, option, explanation in entries:
        group = str(label) or group
        result[split_option(str(option))] = group, default_in_help(explanation)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The manual page: mdoc source

def words(line):
    """A line of macros as the text that it gives: `Fl i Ar FILE` -> `-i FILE`."""
    line = re.sub(r"Brq (Cm .*)", lambda m: "{%s}" % m.group(1).replace("Cm ", "").replace(" , ", ","), line)
    line = re.sub(r"\bFl (-?[a-z0-9-]+)", r"-\1", line)
    return re.sub(r"\b(?:Ar|Cm|Li) ", "", line).replace(" ,", ",")


def sections(text, macro):
    """{title: body} of the .Sh or .Ss sections."""
    parts = re.split(r"^\.%s (.*)\n" % macro, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def items(text):
    """[(text of the .It, body)] of the lists in a section."""
    parts = re.split(r"^\.It (.*)\n", text, flags=re.MULTILINE)
    return [(words(tag), re.split(r"^\.El", body, flags=re.MULTILINE)[0]) for tag, body in zip(parts[1::2], parts[2::2])]


def options_of_man(command):
    """{(names, metavar): (group, default or None)} of what the manual page says of a command."""
    result = {}
    in_description = sections(sections(read("man", "kmcast.1"), "Sh")["DESCRIPTION"], "Ss")
    assert set(SECTIONS) == set(title for title in in_description if title.startswith("Options "))
    for title, commands in SECTIONS.items():
        for group, text in sections(in_description[title], "Em").items() if command in commands else ():
            for tag, body in items(text):
                found = re.search(r"^Default: (.*)\.$", body, re.MULTILINE)
                result[split_option(tag)] = group.lower(), found.group(1) if found else None
    return result


@pytest.mark.parametrize("command", COMMANDS + ("",))
def test_manual_page_has_the_options_and_defaults_of_help(command):
    assert options_of_man(command) == options_of_help(command)


@pytest.mark.parametrize("command", COMMANDS + ("",))
def test_manual_page_has_the_arguments_of_help(command):
    arguments = re.findall(r"^ +([A-Z][A-Z_]+)  ", run(*[word for word in (command, "--help") if word]), re.MULTILINE)
    description = sections(read("man", "kmcast.1"), "Sh")["DESCRIPTION"]
    described = [tag for tag, _ in items(description)]
    for argument in arguments:
        assert argument in described or argument in ("FILE", "COMMAND"), argument


def test_options_named_in_the_manual_page_exist():
    known = set(name for command in COMMANDS + ("",) for names, _ in options_of_help(command) for name in names)
    named = set("-" + name for name in re.findall(r"\bFl (-?[a-z0-9-]+)", read("man", "kmcast.1")))
    assert named <= known


@pytest.mark.parametrize("command", COMMANDS + ("",))
def test_help_is_a_page_that_starts_with_an_example(command):
    text = run(*[word for word in (command, "--help") if word])
    assert text.startswith("Example:  kmcast %s" % (command or "server"))
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100, text
    groups = re.findall(r"^([a-z]+) ", text, re.MULTILINE)
    assert groups == sorted(groups, key=["what", "where", "when", "speed", "safety", "output"].index)


def test_defaults_of_help_are_those_of_the_program():
    server = vars(kmcast.command_line().parse_args(["server", "auto", "1"]))
    client = vars(kmcast.command_line().parse_args(["client", "auto", "10.0.0.1"]))
    demo = vars(kmcast.command_line().parse_args(["demo"]))
    for command, values in (("server", server), ("client", client), ("demo", demo)):
        for (names, metavar), (_, default) in options_of_help(command).items():
            value = values.get(names[0][2:].replace("-", "_"))
            if default is None:
                assert not value, names             # none, off, or help
            elif names[0] == "--stall-timeout":             # the protocol decides, unless it is given
                assert value is None and float(default) == kmcast.STALL
            elif default == "-":                # standard input or output
                assert value is None and names[0] in ("--input", "--output", "-i", "-o"), names
            elif value is None:
                assert names[0] in ("--name", "--mtu", "--buffer-packets", "--clients-per-thread", "--key", "--cafile")  # words say what it depends on
            else:
                assert default == ("%g" % value if isinstance(value, float) else str(value)), names
    assert "learns the other from it.\nDefault: %d.\n" % kmcast.DEFAULT_PORT in read("man", "kmcast.1")


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes

def plain(text):
    return " ".join(text.replace("`", "").split())


def test_exit_codes_agree():
    text = sections(read("man", "kmcast.1"), "Sh")["EXIT STATUS"]
    of_client, of_server = text.split("The server's:")
    in_man = [[code, plain(client), plain(server)] for (code, client), (other, server)
              in zip(items(of_client), items(of_server)) if code == other]
    table = re.search(r"^\| code \| client \| server \|\n\|[ -|]*\n((?:\|.*\n)+)", read("README.md"), re.MULTILINE)
    in_readme = [[plain(cell) for cell in row.strip("|").split("|")] for row in table.group(1).splitlines()]
    assert [row[0] for row in in_man] == ["0", "1", "2", "3"]
    assert in_readme == in_man


def test_exit_codes_are_those_of_the_program():
    assert (kmcast.OK, kmcast.FAILED, kmcast.USAGE, kmcast.PARTLY, kmcast.NOT_STARTED) == (0, 1, 2, 3, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Commands to paste

def pasted():
    """The command lines of README's and the manual page's examples, in order."""
    text = read("README.md")
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    python3? .*", text, re.MULTILINE)
    blocks += re.findall(r"^\.Bd -literal[^\n]*\n(.*?)^\.Ed", read("man", "kmcast.1"), re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield line


def kmcast_calls(line):
    """The arguments of each call of kmcast in a line of shell, as lists of words."""
    tokens = shlex.split(re.sub(r"\$\(cut .*?\)", "0" * 64, line), comments=True)     # a digest
    for place, word in enumerate(tokens):
        if word in PROGRAMS and tokens[place + 1:place + 2] and tokens[place + 1] in COMMANDS:
            arguments = []
            for argument in tokens[place + 1:]:
                if re.match(r"[|<>&;]|[12]>", argument):
                    break
                arguments.append(argument.rstrip(";"))
            yield arguments
        elif any(word.startswith(program + " ") for program in PROGRAMS):
            for inner in kmcast_calls(word):        # in --pipe 'kmcast ...'
                yield inner


def test_commands_in_the_documents_are_accepted():
    calls = [arguments for line in pasted() for arguments in kmcast_calls(line)]
    assert len(calls) > 20
    assert set(arguments[0] for arguments in calls) == set(COMMANDS)
    for arguments in calls:
        try:
            options = kmcast.read_command_line(arguments)
        except SystemExit:
            pytest.fail("not accepted: kmcast %s" % " ".join(arguments))
        if options.command in ("server", "client") and options.pipe:
            assert options.local_ip, arguments


def test_options_named_in_readme_exist():
    known = set(name for command in COMMANDS + ("",) for names, _ in options_of_help(command) for name in names)
    text = re.sub(r"^ *```.*?^ *```", "", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(-[a-z0-9-]+)[^`]*`", text)
    assert len(named) > 10
    assert set(named) <= known


# ---------------------------------------------------------------------------------------------------------------------
# The rest

def test_version_agrees():
    version = "kmcast " + kmcast.__version__
    for page in (("README.md",), ("man", "kmcast.1")):
        assert "This is version %s." % kmcast.__version__ in read(*page)
    # Python 2.7's argparse prints it on standard error.
    process = subprocess.Popen([sys.executable, helpers.KMCAST, "--version"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.communicate()[0].decode("ascii").strip() == version


@pytest.mark.parametrize("name", ["kmcast.1", "kmcast-protocol.7"])
def test_manual_pages_are_clean(name):
    try:
        # On stderr it says which pages that are referred to are not installed here.
        process = subprocess.Popen(["mandoc", "-Tlint", os.path.join(helpers.ROOT, "man", name)],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except EnvironmentError:
        pytest.skip("no mandoc here")
    output = process.communicate()[0].decode("utf-8", "replace")
    # Each refers to the other, and neither need be installed.
    complaints = [line for line in output.splitlines() if "referenced manual not found: Xr kmcast" not in line]
    assert complaints == []
    assert process.returncode == 0 or output


def test_the_pages_refer_to_each_other():
    assert ".Xr kmcast-protocol 7" in sections(read("man", "kmcast.1"), "Sh")["SEE ALSO"]
    assert ".Xr kmcast 1" in sections(read("man", "kmcast-protocol.7"), "Sh")["SEE ALSO"]
    assert "man/kmcast-protocol.7" in read("README.md")


def test_the_protocol_page_has_the_group_and_port_of_the_program():
    transport = " ".join(sections(read("man", "kmcast-protocol.7"), "Sh")["TRANSPORT"].split())
    assert "the port is %d unless the user says else" % kmcast.DEFAULT_PORT in transport
    assert "is %s, the UDP port is the TCP port" % kmcast.GROUP in transport
    assert "a u8 version, which is %d," % kmcast.SESSION_VERSION in transport


def test_readme_says_how_the_figures_were_made():
    performance = sections(read("README.md").replace("## ", ".Sh "), "Sh")["Performance"]
    assert "python3 tests/bench.py" in performance
