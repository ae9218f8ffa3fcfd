"""Transformers, opened in every way."""

import pytest

from tests.models.openings import TRANSFORMERS, check


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_opened_exactly_or_says_why_not(name):
    check(name)
