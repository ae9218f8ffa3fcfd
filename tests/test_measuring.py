"""Images of any kind against any others: `evaluate --images`, its feature networks, and what it reads and keeps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffusion_jax import evaluate, interop, measuring, models, reading, shards, training
from diffusion_jax.command import run_command
from diffusion_jax.config import build, call, load
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import prepare
from diffusion_jax.measuring import feature_extractors, image_sets, measures
from diffusion_jax.measuring.trained_extractors import trained_extractor
from tests.interop.folders import drawn
from tests.interop.vocabularies import clip_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    # Weights that happen to be on this machine must not decide a test.
    monkeypatch.setattr(feature_extractors, "HUB", {})


def bytes_of(count, side=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def written(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def measured(tmp_path, *argv):
    evaluate.main([*map(str, argv), f"--output={tmp_path / 'report.json'}"])
    return json.loads((tmp_path / "report.json").read_text())


NUMBERS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


def run_of(folder, samples, params=None, **fields):
    """The folder of a run on digits, of which nothing was trained. fields: of its network."""
    config = load("configs/digits_dit.py")
    config.metrics = {}
    config.sampling.ema = None
    config.model.update(fields)
    experiment = prepare(config)
    params = params and jax.jit(experiment.init_params)(jax.random.key(0))
    training.save_params(folder, params or {"nothing": jnp.zeros(1)}, experiment.config)
    arrays = {"x": samples, "index": np.arange(len(samples), dtype=np.int32)}
    path = folder / "samples" / "samples-00000-of-00001.npz"
    shards.write_shard(path, shards.identified(arrays, {"seed": 0}, 0))
    return experiment


def test_the_same_images_give_the_same_numbers_as_files_arrays_and_floats(tmp_path, capsys):
    images, others = bytes_of(30), written(tmp_path / "others", bytes_of(40, 16, 1))
    folder = written(tmp_path / "files", images)
    np.savez(tmp_path / "bytes.npz", arr_0=images)
    np.savez(tmp_path / "floats.npz", x=images.astype(np.float32) / 127.5 - 1)
    found = [
        measured(tmp_path, f"--images={one}", f"--against={others}")
        for one in (folder, tmp_path / "bytes.npz", tmp_path / "floats.npz")
    ]
    assert [[one[name] for name in NUMBERS] for one in found] == [[found[0][name] for name in NUMBERS]] * 3
    assert found[0]["num_samples"] == 30 and found[0]["num_reference"] == 40
    assert found[0]["images"]["sizes"] == {"12 x 12": 30} and "8 x 8" in found[0]["features"]["resizing"]
    text = " ".join(capsys.readouterr().out.split())
    assert "too few for 192 features" in text and "--size=12" in text and "dinov2" in text


def test_a_set_against_itself_is_at_distance_zero(tmp_path):
    folder = written(tmp_path / "files", bytes_of(30))
    found = measured(tmp_path, f"--images={folder}", f"--against={folder}")
    assert found["frechet_distance"] < 1e-9 and found["precision"] == found["coverage"] == 1
    assert any("same images" in text for text in found["warnings"])


def test_statistics_stand_for_their_images_and_only_for_them(tmp_path, capsys):
    folder, others = written(tmp_path / "a", bytes_of(30)), written(tmp_path / "b", bytes_of(30, seed=1))
    file = tmp_path / "b.npz"
    evaluate.main([f"--images={others}", f"--write-statistics={file}"])
    assert not (tmp_path / "b.metrics.json").exists(), "nothing was compared"
    of_images = measured(tmp_path, f"--images={folder}", f"--against={others}")
    of_file = measured(tmp_path, f"--images={folder}", f"--against={file}")
    assert of_file["frechet_distance"] == pytest.approx(of_images["frechet_distance"], rel=1e-9)
    assert of_file["num_reference"] == 30 and "precision" in of_file["not_measured"]
    assert run_command(evaluate.main, [f"--images={folder}", f"--against={file}", "--size=4"]) == 2
    assert "they do not compare" in capsys.readouterr().err
    assert run_command(evaluate.main, [f"--images={others}", f"--write-statistics={file}"]) == 2


def test_the_statistics_of_others_say_which_resizing_is_meant(tmp_path):
    zero = np.zeros(3), np.eye(3)
    assert evaluate.resizing_of(metrics_file(tmp_path, mu=zero[0], sigma=zero[1])) == "pytorch-fid"
    spatial = {"mu": zero[0], "sigma": zero[1], "mu_s": zero[0], "sigma_s": zero[1]}
    assert evaluate.resizing_of(metrics_file(tmp_path, **spatial)) == "tensorflow"
    told = json.dumps({"resizing": feature_extractors.RESIZINGS["clean"]})
    assert evaluate.resizing_of(metrics_file(tmp_path, **spatial, made_by=np.asarray(told))) == "clean"


def metrics_file(tmp_path, **arrays):
    np.savez(tmp_path / "of_others.npz", **arrays)
    return evaluate.metrics.read_statistics(tmp_path / "of_others.npz")


def test_features_do_not_depend_on_batches_and_are_read_from_the_cache(tmp_path, monkeypatch):
    extractor = feature_extractors.published_extractor("pixels")
    images = image_sets.open_images(written(tmp_path / "files", bytes_of(13)))
    found = measuring.image_features(extractor, images, batch_size=8)
    again = measuring.image_features(extractor, images._replace(read=None), batch_size=64)
    np.testing.assert_array_equal(found.arrays["features"], again.arrays["features"])
    anew = measuring.image_features(extractor, images._replace(identity=None), batch_size=64)
    np.testing.assert_array_equal(found.arrays["features"], anew.arrays["features"])
    some = measuring.image_features(extractor, images, measures.chosen_indices(13, 5, seed=1))
    np.testing.assert_array_equal(some.arrays["features"], found.arrays["features"][some.indices])
    (tmp_path / "files" / "003.png").write_bytes((tmp_path / "files" / "004.png").read_bytes())
    changed = measuring.image_features(extractor, image_sets.open_images(tmp_path / "files"))
    np.testing.assert_array_equal(changed.arrays["features"][3], found.arrays["features"][4])


def test_a_damaged_picture_is_refused_or_skipped_and_told(tmp_path, capsys):
    folder = written(tmp_path / "files", bytes_of(12))
    (folder / "005.png").write_bytes(b"no picture")
    argv = [f"--images={folder}", f"--against={folder}"]
    assert run_command(evaluate.main, argv) == 2
    told = capsys.readouterr().err
    assert "005.png" in told and "--on-error=skip" in told
    found = measured(tmp_path, *argv, "--on-error=skip")
    assert found["num_samples"] == 11 and found["images"]["skipped"] == ["005.png"]
    assert "1 of 12 images are skipped: 005.png" in capsys.readouterr().err


def test_a_transparent_picture_needs_a_background(tmp_path, capsys):
    folder = written(tmp_path / "files", bytes_of(8))
    Image.fromarray(np.zeros((12, 12, 4), np.uint8)).save(folder / "007.png")
    argv = [f"--images={folder}", f"--against={folder}"]
    assert run_command(evaluate.main, argv) == 2
    assert "007.png is transparent in places: --background=white" in capsys.readouterr().err
    assert measured(tmp_path, *argv, "--background=white")["num_samples"] == 8


def test_archives_are_read_row_by_row(tmp_path):
    images = bytes_of(9)
    np.savez_compressed(tmp_path / "x.npz", arr_0=images, mu=np.zeros(3))
    opened = image_sets.open_images(tmp_path / "x.npz")
    np.testing.assert_array_equal(list(opened.read([2, 3, 7])), images[[2, 3, 7]])
    assert reading.array_shapes(tmp_path / "x.npz")["arr_0"] == ((9, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images[..., :2])
    with pytest.raises(InvalidInput, match="1 or 3 channels"):
        image_sets.open_images(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", label=np.zeros(3))
    with pytest.raises(InvalidInput, match="holds label"):
        image_sets.open_images(tmp_path / "x.npz")
    for wrong in (np.full((4, 4, 3), np.nan, np.float32), np.zeros((4, 4, 4), np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(InvalidInput):
            image_sets.as_bytes(wrong, "x")


def test_a_run_without_metrics_is_measured_against_what_it_held_out(tmp_path):
    run = tmp_path / "run"
    experiment = run_of(run, np.zeros((1, 8, 8, 1), np.float32))
    real = np.stack([experiment.held_out[i]["x0"] for i in range(120)])
    (run / "samples" / "samples-00000-of-00001.npz").unlink()
    run_of(run / "again", real)
    evaluate.main([f"--workdir={run / 'again'}", "--features=pixels"])
    found = json.loads((run / "again" / "metrics.json").read_text())
    assert found["against"]["from"] == "the held-out data of the run" and found["num_samples"] == 120
    assert found["precision"] == 1 and found["samples"] == {"seed": 0}
    assert "Measured on samples" in (run / "again" / "report.html").read_text()
    same = measured(tmp_path, f"--images={run / 'again'}", "--features=pixels")
    assert same["frechet_distance"] == found["frechet_distance"]
    name, (note,) = evaluate.best_features(experiment.config)
    assert name == "judge" and "hf download" in note
    assert evaluate.best_features(None)[0] == "pixels"
    assert run_command(evaluate.main, [f"--workdir={run / 'again'}", "--features=dinov2"]) == 2


def test_the_network_of_a_run_gives_features(tmp_path):
    run_of(tmp_path / "run", np.zeros((1, 8, 8, 1)), params=True, width=16, depth=2, heads=2)
    extractor = trained_extractor("run", str(tmp_path / "run"))
    image = np.random.default_rng(0).uniform(-1, 1, (20, 30, 3)).astype(np.float32)
    rows = np.stack([extractor.prepare(one) for one in (image, -image, image)])
    features = extractor.apply(extractor.params, rows)["features"]
    assert features.shape == (3, 16) and "block 1 of 2" in extractor.resizing
    np.testing.assert_allclose(features[0], features[2], atol=1e-6)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    with pytest.raises(InvalidInput, match=r"config\.json does not exist"):
        trained_extractor("run", str(tmp_path))


TINY = {"width": 12, "depth": 1, "heads": 2, "mlp_width": 24}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Both halves of a CLIP in one folder, as transformers stores them."""
    folder = clip_folder(tmp_path_factory.mktemp("clip"))
    size = len(json.loads((folder / "vocab.json").read_text()))
    halves = {
        "CLIPTextModelWithProjection": models.clip_text("small", **TINY, vocab_size=size, eos=size - 1, projection=6),
        "CLIPVisionModelWithProjection": models.clip_vision("small", **TINY, image_size=8, patch=4, projection=6),
    }
    tensors, config = {}, {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 6}
    for name, network in halves.items():
        interop.save_pretrained(folder / name, drawn(name, network))
        tensors |= load_file(folder / name / "model.safetensors")
        half = "text_config" if "Text" in name else "vision_config"
        config[half] = json.loads((folder / name / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_prompts_are_scored_image_by_image(tmp_path, clip):
    folder = written(tmp_path / "files", bytes_of(3))
    for number, text in enumerate(("a red cube", "a dog", "a red cube")):
        (folder / f"{number:03d}.txt").write_text(text)
    found = measured(tmp_path, f"--images={folder}", "--prompts", f"--clip-from={clip}")
    each = [one["clip_score"] for one in found["per_image"]]
    assert found["clip_score"] == pytest.approx(np.mean(each)) and found["per_image"][1]["prompt"] == "a dog"

    pretrained = {half: interop.load_pretrained(clip, family=f"CLIP{half}ModelWithProjection") for half in HALVES}
    tokens = interop.load_tokenizer(clip)(["a red cube", "a dog", "a red cube"])
    images = jnp.asarray(bytes_of(3), jnp.float32) / 127.5 - 1
    mean, std = feature_extractors.OPENAI
    given = interop.Preprocessor(8, None, (8, 8), mean, std)(images)
    vectors = [
        pretrained[half].network.apply(pretrained[half].params, one).pooled
        for half, one in zip(HALVES, (tokens.tokens, given))
    ]
    text, image = (vector / np.linalg.norm(vector, axis=1, keepdims=True) for vector in vectors)
    np.testing.assert_allclose(each, 100 * np.maximum((text * image).sum(1), 0), atol=0.05)
    assert feature_extractors.kind_of_weights(clip) == "clip"


HALVES = ("Text", "Vision")


def test_prompts_are_found_beside_the_images(tmp_path):
    folder = written(tmp_path / "files", bytes_of(4))
    images = image_sets.open_images(folder)
    with pytest.raises(InvalidInput, match="have no prompt"):
        image_sets.prompts_of(images)
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": f"picture {i}"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert image_sets.prompts_of(image_sets.open_images(folder)) == [f"picture {i}" for i in range(4)]
    (tmp_path / "list.txt").write_text("a\nb\n\nc\nd\n")
    assert image_sets.prompts_of(images, tmp_path / "list.txt") == list("abcd")
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(InvalidInput, match="there are 4 images"):
        image_sets.prompts_of(images, tmp_path / "list.txt")

    generated = written(tmp_path / "generated", bytes_of(0))
    pictures = written(generated / "images", bytes_of(0))
    for number in range(4):
        Image.fromarray(bytes_of(1)[0]).save(pictures / f"{number:05d}.png")
    Image.fromarray(bytes_of(1, 24)[0]).save(generated / "samples.png")
    (generated / "generated.json").write_text(json.dumps({"prompt": ["a", "b"], "images_per_prompt": 2}))
    opened = image_sets.open_images(generated)
    assert opened.count == 4, "the grid of all images is none of them"
    assert image_sets.prompts_of(opened) == ["a", "a", "b", "b"]
    own = [{"file": f"images/{i:05d}.png", **({"prompt": "mine"} if i == 1 else {})} for i in range(4)]
    (generated / "generated.json").write_text(json.dumps({"prompt": "shared", "images": own}))
    for root in (generated, pictures):
        found = image_sets.prompts_of(image_sets.open_images(root))
        assert found == ["shared", "mine", "shared", "shared"]


def test_samples_of_a_run_on_captions_know_their_prompts(tmp_path):
    folder = written(tmp_path / "files", bytes_of(2))
    for number in range(2):
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    config = load("configs/digits_dit.py")
    config.data = call("data.captioned_folder", folder=str(folder), size=8, tokenizer=call("data.byte_tokenizer"))
    cond = [build(config.data)[i]["cond"] for i in range(2)]
    samples = {f"cond.{name}": np.stack([one[name] for one in cond]) for name in ("tokens", "tokens_mask")}
    assert evaluate.captions_asked(samples, config) == ["picture 0", "picture 1"]
    assert evaluate.captions_asked({}, config) is None


def test_features_of_another_background_are_others(tmp_path):
    """What is read of a file belongs to the identity under which features are kept."""
    folder = written(tmp_path / "files", bytes_of(2))
    ways = [(None, "refuse"), ("white", "refuse"), ("black", "refuse"), (None, "skip")]
    assert len({image_sets.open_images(folder, *way).identity for way in ways}) == len(ways)


def test_a_report_counts_all_sizes_and_lists_few():
    images = image_sets.of_array(bytes_of(9), "nine")
    sizes = {f"{side} x {side}": 1 for side in range(1, 10)}
    told = measures.images_told(images, measuring.ImageFeatures({}, np.arange(9), sizes, []))["sizes"]
    assert len(told) == measures.MOST_SIZES + 1 and sum(told.values()) == 9 and told["others"] == 4


def test_what_other_samples_have_cost_is_not_told(tmp_path):
    folder = tmp_path / "samples"
    arrays = {"x": bytes_of(2), "index": np.arange(2, dtype=np.int32)}
    shards.write_shard(folder / "samples-00000-of-00001.npz", shards.identified(arrays, {"seed": 0}, 0))
    for seed, told in ((1, {}), (0, {"nfe": 5.0})):
        (folder / shards.COST).write_text(json.dumps({"nfe": 5.0, "identity": {"seed": seed}}))
        assert evaluate._cost(folder, tmp_path) == told


def test_beside_images_statistics_are_of_inception_alone(tmp_path):
    images = image_sets.open_images(written(tmp_path / "files", bytes_of(12)))
    statistics = metrics_file(tmp_path, mu=np.zeros(2048), sigma=np.eye(2048))
    extractor = feature_extractors.published_extractor("pixels")
    report = measuring.measure(extractor, images, measuring.ReferenceSet("batch", images, statistics))
    assert report["frechet_distance"] < 1e-9 and report["num_reference"] == 12


@pytest.mark.parametrize("half_pixel", [True, False])
def test_bilinear_resizing_keeps_constants_and_its_own_size(half_pixel):
    np.testing.assert_allclose(feature_extractors.bilinear_matrix(7, 299, half_pixel).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(feature_extractors.bilinear_matrix(9, 9, half_pixel), np.eye(9))


def test_an_extractor_says_what_it_needs(tmp_path):
    for kind in ("inception", "dinov2", "clip"):
        with pytest.raises(InvalidInput, match="none are at hand"):
            feature_extractors.published_extractor(kind)
    with pytest.raises(InvalidInput, match="did you mean 'dinov2'"):
        feature_extractors.published_extractor("dinov3")
    with pytest.raises(InvalidInput, match="it is for Inception"):
        feature_extractors.published_extractor("pixels", None, "clean")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InvalidInput, match="of the type 'vit'"):
        feature_extractors.kind_of_weights(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(InvalidInput, match="pickle"):
        feature_extractors.kind_of_weights(tmp_path / "weights.pth")
    network = models.dinov2("base", **TINY, image_size=8, patch=4)
    interop.save_pretrained(tmp_path / "dinov2", drawn("Dinov2Model", network))
    extractor = feature_extractors.published_extractor("dinov2", tmp_path / "dinov2")
    assert feature_extractors.kind_of_weights(tmp_path / "dinov2") == "dinov2" and extractor.digest.startswith(
        "sha256:"
    )
    assert extractor.prepare(np.zeros((20, 30, 1), np.float32)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "Say what is measured"),
        (["--images=nowhere", "--against=nowhere"], "nowhere does not exist"),
        (["--images=nowhere", "--workdir=nowhere"], "give one of them"),
        (["--images=nowhere", "--num-images=1"], "--num-images is 1"),
        (["--images=nowhere", "--batch-size=0"], "--batch-size is 0"),
        (["--images=nowhere", "--clip-from=x"], "--prompts"),
        (["--images=nowhere", "--write-statistics=x.txt"], "end in .npz"),
    ],
)
def test_the_command_line_says_what_is_wrong(argv, says, capsys):
    assert run_command(evaluate.main, argv) == 2
    assert says in capsys.readouterr().err


def test_a_report_is_printed_with_what_is_missing_and_notes():
    report = {"num_samples": 2, "frechet_distance": 1.5, "not_measured": {"recall": "few", "precision": "few"}}
    assert measures.lines_of(report, ["look"]) == [
        "num_samples       2",
        "frechet_distance  1.5",
        "not measured: recall, precision: few.",
        "note: look",
    ]
