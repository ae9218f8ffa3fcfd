"""Inception's features, the ways of resizing and the distances equal those of clean-fid and torch-fidelity.

Needs the peers extra and the files of those two, without what else they ask for: `make test-peers`.
"""

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

from diffusion_jax import metrics
from diffusion_jax.measuring.feature_extractors import inception_input, published_extractor

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers
torch.set_num_threads(1)


def submodule(package, name):
    """A module of a package whose own `__init__` needs torchvision, without running that."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
    bare = types.ModuleType(package)
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault(package, bare)
    return importlib.import_module(f"{package}.{name}")


inceptionv3 = submodule("torch_fidelity", "feature_extractor_inceptionv3")
resize = submodule("cleanfid", "resize")


def functions(file, *names):
    """Functions of a file of which nothing else is run."""
    nodes = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) in names]
    known = {"np": np, "linalg": scipy.linalg}
    exec(compile(ast.Module(nodes, []), str(file), "exec"), known)
    return [known[name] for name in names]


class Fresh(inceptionv3.FeatureExtractorInceptionV3):
    """Their network with the weights that it begins with."""

    def load_state_dict(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def picture():
    """Blocks of noise, 40 x 57, whose edges tell filters apart."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 15, 3))
    return np.kron(noise, np.ones((4, 4, 1)))[:40, :57].astype(np.uint8)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Their network with weights of its own initialisation, and the file that both read."""
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    torch.save({}, folder / "none.pt")
    made = Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path=folder / "none.pt")
    for name, value in made.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    file = folder / "inception.safetensors"
    save_file({name: value.numpy().copy() for name, value in made.state_dict().items() if value.ndim}, file)
    return made, file


def test_features_and_spatial_features(theirs, picture):
    made, file = theirs
    seen = {}
    made.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: seen.update(spatial=output))
    with torch.no_grad():
        expected = made(torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()))[0].numpy()
    extractor = published_extractor("inception", file, "tensorflow")
    batch = extractor.prepare(picture / np.float32(127.5) - 1)[None]
    found = extractor.apply(extractor.params, batch)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found["features"] / scale, expected / scale, atol=2e-4)
    spatial = seen["spatial"].numpy()[:, :7].transpose(0, 2, 3, 1).reshape(1, -1)
    np.testing.assert_allclose(found["spatial"], spatial, atol=2e-4 * np.abs(spatial).max())


def test_the_ways_of_resizing(picture):
    image = picture / np.float32(127.5) - 1
    clean = resize.make_resizer("PIL", False, "bicubic", (299, 299))(picture)
    np.testing.assert_allclose(inception_input(image, "clean"), (clean - 128) / 128, atol=2e-5)
    plain = torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(255))
    plain = torch.nn.functional.interpolate(plain, size=(299, 299), mode="bilinear", align_corners=False)
    expected = 2 * plain[0].numpy().transpose(1, 2, 0) - 1
    np.testing.assert_allclose(inception_input(image, "pytorch-fid"), expected, atol=2e-5)


def test_the_distances():
    frechet, kernel = functions(Path(resize.__file__).with_name("fid.py"), "frechet_distance", "kernel_distance")
    rng = np.random.default_rng(0)
    ours, real = rng.standard_normal((300, 12)), rng.standard_normal((300, 12)) * 1.3 + 0.2
    found = metrics.compare_features(ours, real).values
    moments = [(one.mean(0), np.cov(one, rowvar=False)) for one in (ours, real)]
    np.testing.assert_allclose(found["frechet_distance"], frechet(*moments[0], *moments[1]), rtol=1e-6)
    # Their subsets are those of all here, since these are no larger than the sets.
    np.testing.assert_allclose(
        found["kernel_distance"], kernel(real, ours, num_subsets=1, max_subset_size=300), rtol=1e-6
    )
