"""Networks of other kinds and of users' own, opened in every way."""

import pytest

from tests.models.openings import OTHERS, check


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_is_opened_exactly_or_says_why_not(name):
    check(name)
