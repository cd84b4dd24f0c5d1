"""The interpreters that a test runs with: marks for a test that has a parameter `python`, the path of one."""

import pytest

import helpers

OLDEST, NEWEST = helpers.oldest(), helpers.newest()
#: One of each minor version, from the oldest to the newest.
ALL = sorted({helpers.version_of(python)[:2]: python for python in helpers.interpreters()}.values(), key=helpers.version_of)
BOTH = pytest.mark.parametrize("python", sorted({OLDEST, NEWEST}), ids=helpers.version_name)
EVERY = pytest.mark.parametrize("python", ALL, ids=helpers.version_name)


def in_turn(names, cases, ids=None):
    """A mark for a test with parameters `names`, and `python`: one of the two interpreters takes a case, the other the next one.

    For cases of one kind, of which each tests the same code: that an interpreter can do it, half of them tell.

    names  as parametrize() has them: text, separated by commas
    cases  a list of values, or of tuples of them where there are several names
    ids    a list of texts, or a function of a case that returns one; None: as pytest makes them
    """
    several, pythons = "," in names, sorted({OLDEST, NEWEST})
    rows = [(tuple(case) if several else (case,)) + (pythons[number % len(pythons)],) for number, case in enumerate(cases)]
    if ids:
        texts = [ids(case) for case in cases] if callable(ids) else ids
        ids = ["%s-%s" % (text, helpers.version_name(row[-1])) for text, row in zip(texts, rows)]
    return pytest.mark.parametrize(names + ", python", rows, ids=ids or _version_of_python)


def _version_of_python(value):
    """The id of a value that is an interpreter; None of others, which pytest names as ever."""
    return helpers.version_name(value) if value in (OLDEST, NEWEST) else None
