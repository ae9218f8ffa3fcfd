"""Where things are kept between runs."""

from diffusion_jax.cache import cache_folder


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv("DIFFUSION_JAX_CACHE")
    assert cache_folder().name == "diffusion_jax"
