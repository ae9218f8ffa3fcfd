"""The errors of the page of questions are those that the library raises."""

import re
from pathlib import Path

import pytest

import diffusion_jax
from tests.guides.running import DOCS

ROOT = Path(diffusion_jax.__file__).parent
MESSAGES = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def sources():
    """The text of the package, with strings over several lines in one piece."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_is_one_that_the_library_has(sources):
    # Values stand between the words, and `errors.invalid` and `unknown` put some of the words.
    words = {part.strip() for message in MESSAGES for part in re.split("…|, but |; | is (?=…)", message)}
    words = {part for part in words if len(part) > 8}
    assert len(words) > len(MESSAGES)
    assert not [part for part in words if part not in sources]
