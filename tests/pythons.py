"""The interpreters that a test runs with: marks for a test that has a parameter `python`, the path of one."""

import pytest

import helpers

OLDEST, NEWEST = helpers.oldest(), helpers.newest()
BOTH = pytest.mark.parametrize("python", sorted({OLDEST, NEWEST}), ids=helpers.version_name)
EVERY = pytest.mark.parametrize("python", helpers.interpreters(), ids=helpers.version_name)
