"""Networks within networks, opened in every way."""

import pytest

from tests.models.openings import WRAPPED, check


@pytest.mark.parametrize("name", WRAPPED)
def test_what_stands_around_a_network_is_opened_exactly_or_says_why_not(name):
    check(name)
