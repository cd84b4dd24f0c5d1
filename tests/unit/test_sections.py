"""The plan of the house: the sections of kmcast.py, in the order of the map, each using only those above it."""

import ast
import io
import re
import sys

import pytest

import helpers

BANNER = re.compile(r"^# -{70,}\n# (.+)\n# -{70,}$", re.MULTILINE)


def source():
    with io.open(helpers.KMCAST, encoding="utf-8") as file:
        return file.read()


def sections():
    """[(title, first line)] as the banners have them."""
    text = source()
    return [(str(found.group(1)), text.count("\n", 0, found.start()) + 1) for found in BANNER.finditer(text)]




def names_of(node):
    """The names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.If, ast.Try)) if sys.version_info[0] > 2 else isinstance(node, ast.If):
        return [name for inner in node.body + node.orelse for name in names_of(inner)]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_the_map_lists_the_sections_in_their_order():
    docstring = ast.get_docstring(ast.parse(source().encode("utf-8")))
    lines = docstring[docstring.index("Map of this file"):docstring.index("The protocol in a page")]
    listed = re.findall(r"^    (\S.*?)  +\S.*$", lines, re.MULTILINE)
    assert [str(title) for title in listed] == [title for title, _ in sections()]


@pytest.mark.skipif(sys.version_info[0] == 2, reason="the file is the same for all interpreters")
def test_each_section_uses_only_those_above_it():
    tree = ast.parse(source())
    starts = sections()

    def section(line):
        return max([-1] + [number for number, (_, first) in enumerate(starts) if first <= line])
    defined = {}
    for node in tree.body:
        for name in names_of(node):
            defined.setdefault(name, section(node.lineno))
    wrong = [
        "line %d, in %s: %s is of %s" % (node.lineno, starts[section(node.lineno)][0], node.id, starts[defined[node.id]][0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and section(node.lineno) >= 0
        and defined.get(node.id, -1) > section(node.lineno)]
    assert wrong == []
