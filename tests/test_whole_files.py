"""A file is replaced when all is written, or stays what it was; nothing is left beside it."""

import pytest

from diffusion_jax.whole_files import written_whole


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with written_whole(path) as draft:
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), written_whole(path) as draft:
        draft.write_text("sec")
        raise RuntimeError("in the middle")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
