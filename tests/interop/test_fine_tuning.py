"""Fine-tuning: it begins at the checkpoint, and encoding once, dropping captions and saving change nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffusion_jax import adapters, data, denoisers, interop, objectives, timesteps
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.pipeline_folders import base_digest
from diffusion_jax.interop.prompts import double_clip_prompts
from diffusion_jax.interop.training_pictures import upright_size
from diffusion_jax.models import by_path
from tests.interop.folders import SIZE, dit_folder, sd_folder

KEY = jax.random.key(0)
SIDES = (SIZE, SIZE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return dit_folder(root / "dit"), sd_folder(root / "sd")


@pytest.fixture(scope="module")
def dit(folders):
    return interop.load_pipeline(folders[0])


@pytest.fixture(scope="module")
def sd(folders):
    return interop.load_pipeline(folders[1])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four pictures of two classes, one of them twice as wide as high, with captions."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        file = root / ("ant", "bee")[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 40 if i == 3 else 24, 3), np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"picture {i % 2}")
    return root


@pytest.fixture(scope="module")
def examples(dit, photos):
    return interop.prompted(data.image_folder(str(photos), size=SIZE), dit, SIDES)


def tuned_by(pipeline, pictures=False, rank=2, alpha=None, **options):
    select = interop.adapted_layers(pipeline.network)
    adapter = rank and partial(adapters.lora, rank=rank, alpha=alpha, select=select)
    objective = partial(objectives.denoising, **options)
    return interop.fine_tuning(pipeline, objective, SIDES, pictures=pictures, adapter=adapter)


def batch_of(source):
    return {**data.stacked_examples(source, range(4)), "index": np.arange(4)}


def loss_of(tuned, learned, batch, key=KEY):
    state = tuned.objective.init(key, learned, batch)
    return np.asarray(jax.jit(tuned.objective.loss)(learned, state, batch, key)[0])


def test_encoding_once_is_encoding_at_each_step(dit, examples):
    latents = interop.latent_examples(examples, dit, batch=3)
    once, each = tuned_by(dit), tuned_by(dit, pictures=True)
    learned = once.init(KEY)
    expected = loss_of(once, learned, batch_of(latents))
    assert expected.shape == (4,) and expected.std() > 0
    prepared = each.objective.prepare(each.objective.init(KEY, learned, batch_of(examples)), batch_of(examples), KEY)
    np.testing.assert_array_equal(prepared["x0"], batch_of(examples)["x0"])
    np.testing.assert_allclose(loss_of(each, learned, prepared), expected, rtol=1e-5)
    with pytest.raises(InvalidInput, match="weighs its entries"):
        each.objective.init(KEY, learned, {**batch_of(examples), "weight": np.ones((4, SIZE, SIZE))})


def test_it_begins_at_the_checkpoint_whose_loss_it_is(dit, examples):
    latents = batch_of(interop.latent_examples(examples, dit))
    lora = tuned_by(dit)
    direct = objectives.denoising(dit.network.network, dit.scheduler.process, interop.training_times(lora.process))
    expected, _ = jax.jit(direct.loss)(dit.params, (), latents, KEY)
    np.testing.assert_allclose(loss_of(lora, lora.init(KEY), latents), expected, rtol=1e-6)
    whole = tuned_by(dit, rank=None)
    assert whole.init(KEY) is dit.params and whole.network is dit.network.network


def test_dropped_prompts_are_what_a_sampler_asks_for_nothing(dit, examples):
    batch = batch_of(interop.latent_examples(examples, dit))
    nothing = dit.prompter.null([None] * 4, SIDES)
    assert nothing["label"].tolist() == [5] * 4 != batch["cond"]["label"].tolist()
    tuned = tuned_by(dit, cond_dropout=1.0)
    learned = jax.tree.map(lambda leaf: leaf + 0.1, tuned.init(KEY))
    loss, state = jax.jit(tuned.objective.loss), tuned.objective.init(KEY, learned, batch)
    dropped, empty = (loss(learned, state, {**batch, "cond": cond}, KEY)[0] for cond in (batch["cond"], nothing))
    np.testing.assert_array_equal(dropped, empty)


def test_texts_are_encoded_as_for_sampling(sd, photos):
    source = interop.prompted(data.captioned_folder(str(photos), size=SIZE), sd, SIDES)
    said = sd.prompter.main(["picture 0", "picture 0", "picture 1", "picture 1"], SIDES)["context"]
    np.testing.assert_allclose(source.cond["context"][np.arange(4)], said, atol=1e-6)


def test_times_are_those_of_the_table(dit):
    t, weight = interop.training_times(dit.scheduler.process).draw((), KEY, (4000,))
    index = np.asarray(dit.scheduler.process.network_time(t))
    np.testing.assert_array_equal(index, np.round(index))
    assert index.min() < 10 and index.max() > 990 and (np.asarray(weight) == 1).all()


def test_what_learns_is_saved_with_its_scale_and_read_again(folders, dit, sd, tmp_path):
    tuned = tuned_by(sd, alpha=6)
    learned = jax.tree.map(lambda leaf: leaf + 0.1, tuned.init(KEY))
    file = tuned.save(tmp_path / "lora.safetensors", learned)
    modules = {name.partition(".lora_")[0] for name in load_file(file)}
    assert {name.rpartition("attn")[2][2:] for name in modules} == {"to_q", "to_k", "to_v", "to_out.0"}
    again = interop.load_lora(file, sd.network)
    folded = adapters.at_scale({}, learned, 3.0)["lora"]
    for path, leaf in by_path(folded).items():
        np.testing.assert_allclose(by_path(again)[path], leaf, rtol=1e-6, err_msg=path)

    whole = tuned_by(dit, rank=None)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, whole.init(KEY))
    folder = interop.save_pipeline(tmp_path / "dit", whole.pipeline_of(moved), folders[0], id2label={"0": "cat"})
    read = interop.load_pipeline(folder)
    jax.tree.map(np.testing.assert_array_equal, read.params, moved)
    jax.tree.map(np.testing.assert_array_equal, read.autoencoder.params, dit.autoencoder.params)
    assert read.scheduler.config == dit.scheduler.config and interop.class_numbers(read, ["cat"]) == {"cat": 0}
    assert base_digest(folder) != base_digest(folders[0])
    # Written again in its own place, and into nothing that is no pipeline.
    interop.save_pipeline(folder, whole.pipeline_of(whole.init(KEY)), folders[0])
    assert base_digest(folder) == base_digest(folders[0])
    with pytest.raises(InvalidInput, match="holds something else than a pipeline"):
        interop.save_pipeline(tmp_path, whole.pipeline_of(moved), folders[0])


def test_layers_by_their_names_here_and_in_diffusers(dit, sd):
    here = interop.adapted_layers(sd.network, ("attention/q", "attention/k", "attention/v", "attention/out"))
    assert set(interop.adapted_layers(sd.network)) == set(here)
    assert {path.rpartition("/")[2] for path in interop.adapted_layers(dit.network)} == {"q", "k", "v", "out"}
    with pytest.raises(InvalidInput, match="did you mean 'to_q'"):
        interop.adapted_layers(sd.network, ("to_qq",))


def test_classes_have_the_numbers_of_the_network_or_are_new(dit, examples, photos):
    assert interop.class_numbers(dit, ["emmet", "bee", "4"]) == {"emmet": 0, "bee": 1, "4": 4}
    assert interop.class_numbers(dit, ["cat", "dog"]) == {"cat": 0, "dog": 1}
    with pytest.raises(InvalidInput, match="'dog'"):
        interop.class_numbers(dit, ["bee", "dog"])
    assert np.asarray(examples.cond["label"][np.arange(4)]).tolist() == [0, 0, 1, 1]


def test_a_network_is_told_how_pictures_lie_in_their_frame(tmp_path):
    turned = Image.new("RGB", (30, 10)).getexif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=turned)
    assert upright_size(tmp_path / "a.jpg") == (30, 10) and Image.open(tmp_path / "a.jpg").size == (30, 10)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match=r"b\.png cannot be decoded"):
        upright_size(tmp_path / "b.png")
    original, corner = np.asarray([[40.0, 80.0]]), np.asarray([[0.0, 8.0]])
    rows = double_clip_prompts([], True).framed(original, corner, (16, 16))["time_ids"]
    np.testing.assert_array_equal(rows, [[40, 80, 0, 8, 16, 16]])


def test_what_cannot_learn_is_refused(dit, sd, photos):
    with pytest.raises(InvalidInput, match="need captions"):
        interop.prompted(data.image_folder(str(photos), size=SIZE), sd, SIDES)
    with pytest.raises(InvalidInput, match="must have a subfolder"):
        interop.prompted(data.captioned_folder(str(photos), size=SIZE), dit, SIDES)
    with pytest.raises(InvalidInput, match="multiples of 4"):
        interop.fine_tuning(dit, objectives.denoising, (15, 15))
    with pytest.raises(InvalidInput, match="bfloat16, which cannot hold"):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dit.params)
        interop.fine_tuning(dit._replace(params=half), objectives.denoising, SIDES)
    with pytest.raises(InvalidInput, match="trained to inpaint"):
        interop.fine_tuning(sd._replace(inpaints=True), objectives.denoising, SIDES)
    with pytest.raises(InvalidInput, match="has adapters already"):
        interop.fine_tuning(sd._replace(params={"params": {}, "lora": {}}), objectives.denoising, SIDES)


def distilled(pipeline, guidance, rank=2):
    grid = timesteps.trailing(10, 1000)
    objective = partial(
        objectives.consistency, earlier=objectives.neighbour(grid), draw=timesteps.on_grid(grid), decay=0.0
    )
    adapter = rank and partial(adapters.lora, rank=rank, select=interop.adapted_layers(pipeline.network))
    return interop.fine_tuning(pipeline, objective, SIDES, adapter=adapter, guidance=guidance)


def test_a_student_is_taught_by_the_checkpoint_guided_by_what_a_sampler_asks(sd, photos):
    source = interop.prompted(data.captioned_folder(str(photos), size=SIZE), sd, SIDES)
    batch = batch_of(interop.latent_examples(source, sd))
    tuned = distilled(sd, 7.5)
    learned = tuned.init(KEY)
    # The same loss, written out: factors that are still zero leave the network as it is.
    network, process = sd.network.network, sd.scheduler.process
    teacher = denoisers.guided(
        denoisers.denoiser(network, process), 7.5, null=lambda cond: {**cond, **sd.prompter.null([None] * 4, SIDES)}
    )
    grid = timesteps.trailing(10, 1000)
    direct = objectives.consistency(
        network, process, objectives.neighbour(grid), timesteps.on_grid(grid), teacher=teacher, teacher_params=sd.params
    )
    state = direct.init(KEY, sd.params, batch)
    expected = jax.jit(direct.loss)(sd.params, state, batch, KEY)[0]
    np.testing.assert_allclose(loss_of(tuned, learned, batch), expected, rtol=1e-5)
    assert np.abs(expected - loss_of(distilled(sd, 1.0), learned, batch)).max() > 1e-4

    # Of all trees in sight the factors alone learn.
    learned = jax.tree.map(lambda leaf: leaf + 0.01, learned)
    state = tuned.objective.init(KEY, learned, batch)

    @partial(jax.jit, static_argnums=0)
    def slopes(of, learned, state, batch):
        return jax.grad(lambda *trees: tuned.objective.loss(*trees, batch, KEY)[0].mean(), of, allow_int=True)(
            learned, state
        )

    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes(0, learned, state, batch)))
    floats = [leaf for leaf in jax.tree.leaves(slopes(1, learned, state, batch)) if leaf.dtype == np.float32]
    assert floats and not any(np.any(leaf) for leaf in floats)


def test_another_scheduler_keeps_the_noise_levels_of_the_checkpoint(sd):
    student = interop.with_scheduler(sd, "LCMScheduler")
    t = np.linspace(0.1, 1.0, 5, dtype=np.float32)
    np.testing.assert_allclose(student.scheduler.process.alpha(t), sd.scheduler.process.alpha(t), rtol=1e-6)
    assert len(student.scheduler.grid(4)) == 5 and student.scheduler.config["_class_name"] == "LCMScheduler"
    images = interop.generate(student, KEY, ["a"], size=SIDES, num_steps=2, scale=1.0)
    assert np.isfinite(images).all()
    with pytest.raises(InvalidInput, match="did you mean 'LCMScheduler'"):
        interop.with_scheduler(sd, "LCMSchedule")
