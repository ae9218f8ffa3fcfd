"""Cameras and splats: geometry that can be said in a line, a renderer against a loop over pixels, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import rendering
from diffusion_jax.errors import InvalidInput
from diffusion_jax.rendering import Camera, Splats

SHAPE = (5, 6)
RNG = np.random.default_rng(0)


def cameras(*positions, focal=2.0):
    looking = jax.jit(rendering.looking_at)(np.asarray(positions, np.float32), np.zeros(3, np.float32), focal)
    return jax.device_get(looking)


def scene(count=7, seed=0):
    rng = np.random.default_rng(seed)
    quaternions = rng.standard_normal((count, 4))
    values = (
        rng.uniform(-0.7, 0.7, (count, 3)),
        rng.uniform(0.1, 0.4, (count, 3)),
        quaternions,
        rng.uniform(0.2, 1.0, count),
        rng.uniform(-1, 1, (count, 3)),
    )
    return Splats(*(value.astype(np.float32) for value in values))


TWO = cameras((3.0, 0.0, 1.0), (0.5, 2.5, -0.4))
draw = jax.jit(lambda splats, camera: rendering.render_splats(splats, camera, SHAPE, (-1.0, -0.5, 0.0)))
"""Of a scene `[N]` by cameras `[2]`."""


def several(splats):
    return jax.tree.map(lambda leaf: leaf[None], splats)


def turned(quaternion):
    """A rotation matrix by the formula of Rodrigues."""
    w, *v = quaternion / np.linalg.norm(quaternion)
    cross = np.cross(np.eye(3), v)
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def by_hand(splats, camera, blur=0.3):
    """Colour, depth and opacity pixel by pixel, with the covariance through a numerical derivative."""
    height, width = SHAPE
    background = np.asarray((-1.0, -0.5, 0.0))

    def at(point):
        x, y, z = camera.rotation.astype(float) @ (point - camera.position)
        unit = camera.focal * height / 2
        return np.asarray([unit * x / z + width / 2, unit * y / z + height / 2]), z

    drawn = []
    for mean, scales, quaternion, opacity, colour in zip(*(leaf.astype(float) for leaf in splats)):
        axes = turned(quaternion) * scales
        middle, z = at(mean)
        slope = np.stack([(at(mean + 1e-5 * e)[0] - at(mean - 1e-5 * e)[0]) / 2e-5 for e in np.eye(3)], axis=1)
        drawn.append((z, middle, slope @ axes @ axes.T @ slope.T + blur**2 * np.eye(2), opacity, colour))
    image, far, covered = np.zeros((*SHAPE, 3)), np.zeros(SHAPE), np.zeros(SHAPE)
    for i in range(height):
        for j in range(width):
            through = 1.0
            for z, middle, covariance, opacity, colour in sorted(drawn, key=lambda one: one[0]):
                d = np.asarray((j + 0.5, i + 0.5)) - middle
                alpha = min(0.99, opacity * np.exp(-d @ np.linalg.solve(covariance, d) / 2))
                image[i, j] += through * alpha * colour
                far[i, j] += through * alpha * z
                through *= 1 - alpha
            image[i, j] += through * background
            far[i, j] /= max(1 - through, 1e-6)
            covered[i, j] = 1 - through
    return image, far, covered


def test_it_is_the_blend_of_all_gaussians_in_order_of_depth():
    splats = scene()
    found = jax.device_get(draw(several(splats), TWO))
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], TWO)
        for ours, theirs in zip(found, by_hand(splats, one)):
            np.testing.assert_allclose(ours[i], theirs, atol=2e-4)


def test_neither_their_order_nor_the_frame_of_the_world_is_seen():
    splats, order = scene(), RNG.permutation(7)
    image = draw(several(splats), TWO).colour
    mixed = draw(several(jax.tree.map(lambda leaf: leaf[order], splats)), TWO).colour
    np.testing.assert_allclose(mixed, image, atol=1e-5)
    # q' = q_turn q: the product of quaternions.
    turn, shift = np.asarray([0.3, -0.5, 0.7, 0.4]), np.asarray([1.0, -2.0, 0.5], np.float32)
    matrix = turned(turn).astype(np.float32)
    a, b = turn[0], turn[1:]
    c, d = splats.rotations[:, :1], splats.rotations[:, 1:]
    product = np.concatenate([a * c - d @ b[:, None], a * d + c * b + np.cross(b, d)], axis=1).astype(np.float32)
    moved = splats._replace(means=splats.means @ matrix.T + shift, rotations=product)
    there = Camera(TWO.rotation @ matrix.T, TWO.position @ matrix.T + shift, TWO.focal)
    np.testing.assert_allclose(draw(several(moved), there).colour, image, atol=1e-5)


def test_gradients_are_those_of_differences_and_finite_where_nothing_is_seen():
    camera = jax.tree.map(lambda leaf: leaf[:1], TWO)

    @jax.jit
    @jax.value_and_grad
    def total(splats):
        seen = rendering.render_splats(several(splats), camera, SHAPE)
        weights = np.random.default_rng(1).standard_normal((*SHAPE, 3)).astype(np.float32)
        return jnp.sum(seen.colour * weights) + jnp.sum(seen.depth * seen.opacity)

    splats = scene(4)
    _, gradient = total(splats)
    rng = np.random.default_rng(2)
    for name in Splats._fields:
        direction = rng.standard_normal(getattr(splats, name).shape).astype(np.float32)

        def moved(by, name=name, direction=direction):
            return float(total(splats._replace(**{name: getattr(splats, name) + by * direction}))[0])

        slope = (moved(3e-3) - moved(-3e-3)) / 6e-3
        np.testing.assert_allclose(np.sum(getattr(gradient, name) * direction), slope, rtol=0.05, atol=0.05)
        assert np.abs(getattr(gradient, name)).max() > 1e-3
    # Behind the camera, on it, of no opacity, of no size.
    means = np.stack([2 * camera.position[0], camera.position[0], splats.means[2], splats.means[3]])
    odd = splats._replace(means=means, opacities=np.float32([1, 1, 0, 1]), scales=np.zeros((4, 3), np.float32))
    value, gradient = total(odd)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in gradient)
    assert not gradient.colours[:3].any() and gradient.colours[3].any()
    # Long and thin ones all around the camera, of whose covariance in the image rounding leaves little.
    for _ in range(40):
        means = camera.position[0] + rng.normal(0.0, 3.0, (4, 3))
        scales = np.exp(rng.normal(0.0, 3.0, (4, 3)))
        around = splats._replace(means=means.astype(np.float32), scales=scales.astype(np.float32))
        for leaf in jax.tree.leaves(total(around)):
            assert np.isfinite(leaf).all()


def test_a_point_is_seen_where_it_is_and_found_again_at_its_depth():
    depth = RNG.uniform(1, 4, (2, *SHAPE)).astype(np.float32)
    pixels = jax.jit(lambda: there_and_back(depth))()
    middle = np.stack(np.meshgrid(np.arange(6) + 0.5, np.arange(5) + 0.5), axis=-1)
    np.testing.assert_allclose(pixels.pixels.reshape(2, *SHAPE, 2), np.broadcast_to(middle, (2, *SHAPE, 2)), atol=1e-4)
    np.testing.assert_allclose(pixels.depth.reshape(2, *SHAPE), depth, rtol=1e-5)
    # What the camera looks at, the origin, is in the middle of its image, at the distance that it has.
    seen = jax.device_get(rendering.project(TWO, np.zeros((2, 1, 3), np.float32), SHAPE))
    np.testing.assert_allclose(seen.pixels, np.broadcast_to((3.0, 2.5), (2, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(seen.depth[:, 0], np.linalg.norm(TWO.position, axis=-1), rtol=1e-5)


def there_and_back(depth):
    return rendering.project(TWO, rendering.unproject(TWO, depth).reshape(2, -1, 3), SHAPE)


def test_a_path_has_both_ends_turns_about_one_axis_and_rests_at_them():
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], TWO) for i in (0, 1))
    path = jax.device_get(jax.jit(lambda a, b: rendering.camera_path(a, b, 9))(first, last))
    for end, camera in ((0, first), (8, last)):
        for ours, theirs in zip(path, camera):
            np.testing.assert_allclose(ours[end], theirs, atol=1e-5)
    eye = np.broadcast_to(np.eye(3), (9, 3, 3))
    np.testing.assert_allclose(path.rotation @ path.rotation.transpose(0, 2, 1), eye, atol=1e-5)

    def angle(a, b):
        return np.arccos(np.clip((np.trace(a @ b.T) - 1) / 2, -1, 1))

    whole = angle(first.rotation, last.rotation)
    shares = (1 - np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose([angle(first.rotation, r) / whole for r in path.rotation], shares, atol=2e-3)
    np.testing.assert_allclose(
        path.position, first.position + shares[:, None] * (last.position - first.position), atol=1e-5
    )
    # A path from a camera to itself stays there, with finite derivatives.
    still = jax.jit(jax.jacobian(lambda p: rendering.camera_path(first._replace(position=p), first, 3).position))
    assert np.isfinite(still(first.position)).all()
    turns = jax.jit(jax.grad(lambda r: rendering.camera_path(first._replace(rotation=r), first, 3).rotation[1].sum()))
    assert np.isfinite(turns(first.rotation)).all()
    with pytest.raises(InvalidInput, match="frames"):
        rendering.camera_path(first, last, 1)


def test_numbers_of_cameras_do_not_change_with_the_world():
    numbers = np.asarray(rendering.camera_numbers(TWO))
    np.testing.assert_allclose(numbers[0], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], atol=1e-5)
    assert np.abs(numbers[1] - numbers[0]).max() > 0.1
    matrix = turned(np.asarray([0.3, -0.5, 0.7, 0.4])).astype(np.float32)
    moved = Camera(TWO.rotation @ matrix.T, TWO.position @ matrix.T + 2.0, TWO.focal)
    np.testing.assert_allclose(rendering.camera_numbers(moved), numbers, atol=1e-5)


def test_up_is_up_in_the_image_and_a_size_is_that_of_a_pixel():
    above = np.float32([[[0.0, 0.0, 0.3]]] * 2)
    seen = jax.device_get(rendering.project(TWO, above, SHAPE))
    assert (seen.pixels[:, 0, 1] < 2.5).all(), "rows count downwards"
    one = jax.tree.map(lambda leaf: leaf[:1], TWO)
    splats = rendering.splats_from_depth(
        one, np.full((1, *SHAPE), 2.0, np.float32), np.zeros((1, *SHAPE, 3)), np.ones((1, *SHAPE)), 1.0
    )
    # Neighbouring pixels are one standard deviation apart.
    np.testing.assert_allclose(splats.scales[0], np.linalg.norm(splats.means[1] - splats.means[0]), rtol=1e-5)


def test_a_turn_goes_the_short_way_whatever_quaternion_it_is():
    """By more than half a turn about each axis, which is the other way round by less; and half a turn itself."""
    start = Camera(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), np.float32(1.0))

    @jax.jit
    def middle(last):
        return rendering.camera_path(start, last, 3, lambda share: share)

    for axis in (*np.eye(3), np.asarray([1.0, 1.0, 0.0]), np.asarray([1.0, -2.0, 3.0])):
        axis = axis / np.linalg.norm(axis)
        for angle, halfway in ((0.8, 0.4), (3.0, 1.5), (3.5, (3.5 - 2 * np.pi) / 2), (5.0, (5.0 - 2 * np.pi) / 2)):
            last = turned(np.asarray([np.cos(angle / 2), *(np.sin(angle / 2) * axis)])).astype(np.float32)
            found = middle(Camera(last, np.float32([0, 0, 2]), np.float32(3.0)))
            expected = turned(np.asarray([np.cos(halfway / 2), *(np.sin(halfway / 2) * axis)]))
            np.testing.assert_allclose(found.rotation[1], expected, atol=2e-3)
            np.testing.assert_allclose(found.focal, [1, 2, 3], rtol=1e-6)


def test_colours_between_pixels_are_linear_both_ways_and_what_is_outside_is_not_seen():
    image = np.float32([[0, 1], [2, 4]])[..., None]
    places = np.float32([[0.5, 0.5], [1.0, 1.0], [0.5, 1.25], [1.5, 0.75], [9.0, 9.0]])
    np.testing.assert_allclose(rendering.sampled_at(image, places)[:, 0], [0, 1.75, 1.5, 1.75, 4])
    one = jax.tree.map(lambda leaf: leaf[0], TWO)
    aside = one._replace(position=one.position + one.rotation[0] * 1.0)
    depth = np.full(SHAPE, 3.0, np.float32)
    _, far = rendering.seen_from(one, depth, aside, np.zeros((*SHAPE, 3), np.float32))
    # A unit to the side is two thirds of the height at this depth and focal length: as many pixels move out of sight.
    moved = 2.0 * 5 / (2 * 3.0)
    np.testing.assert_array_equal(np.isnan(far), np.broadcast_to(np.arange(6) + 0.5 < moved, SHAPE))
    np.testing.assert_allclose(far[~np.isnan(far)], 3.0, rtol=1e-5)


def views(shape=(12, 12)):
    """Three near views of a large textured sheet, with their depth."""
    at = cameras((3.0, -0.3, 0.0), (3.0, 0.0, 0.0), (3.0, 0.3, 0.0))
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(np.linspace(-2, 2, 13), np.linspace(-2, 2, 13)), axis=-1).reshape(-1, 2)
    count = len(grid)
    means = np.concatenate([0.4 * np.sin(grid[:, :1]), grid], axis=1)
    colours = np.sin(0.7 * grid @ rng.standard_normal((2, 3)))
    values = (means, np.full((count, 3), 0.2), np.eye(4)[np.zeros(count, int)], np.full(count, 0.95), colours)
    sheet = Splats(*(value.astype(np.float32) for value in values))
    seen = jax.jit(lambda: rendering.render_splats(several(sheet), at, shape))()
    return at, jax.device_get(seen)


AT, SEEN = views()


def test_a_view_is_given_back_by_the_gaussians_on_its_rays():
    one = jax.tree.map(lambda leaf: leaf[1:2], AT)

    @jax.jit
    def again(size):
        splats = rendering.splats_from_depth(
            one, SEEN.depth[1:2], SEEN.colour[1:2], np.ones((1, 12, 12), np.float32), size
        )
        return rendering.render_splats(several(splats), one, (12, 12), blur=0.05).colour[0]

    np.testing.assert_allclose(again(0.05), SEEN.colour[1], atol=0.03)
    assert np.square(again(0.7) - SEEN.colour[1]).mean() < 0.1 * SEEN.colour[1].var()


def test_true_frames_agree_with_each_other_and_others_do_not():
    error = jax.jit(rendering.reprojection_error)
    true = float(error(SEEN.colour, SEEN.depth, SEEN.opacity, AT))
    shifted = SEEN.colour.copy()
    shifted[1] = np.roll(shifted[1], 2, axis=1)
    assert true < 0.02 * SEEN.colour.var() and float(error(shifted, SEEN.depth, SEEN.opacity, AT)) > 10 * true
    # Where nothing is to be seen there is nothing to contradict.
    assert float(error(shifted, SEEN.depth, np.zeros_like(SEEN.opacity), AT)) == 0.0


def test_two_views_agree_best_at_the_true_depth():
    depths = np.linspace(1.5, 4.5, 13).astype(np.float32)
    two = jax.tree.map(lambda leaf: leaf[[0, 2]], AT)
    costs = jax.jit(rendering.plane_sweep)(SEEN.colour[[0, 2]], two, depths)
    found = depths[np.asarray(costs).argmin(-1)]
    inner = np.s_[:, 2:-2, 3:-3]
    assert np.median(np.abs(found - SEEN.depth[[0, 2]])[inner]) <= 0.15


def test_a_fit_explains_its_views_and_one_that_it_has_not_seen():
    ends, middle = (jax.tree.map(lambda leaf, i=i: leaf[i], AT) for i in (np.asarray([0, 2]), slice(1, 2)))
    depth, one = np.full((1, 12, 12), 3.0, np.float32), jax.tree.map(lambda leaf: leaf[:1], ends)

    @jax.jit
    def fitted():
        start = rendering.splats_from_depth(one, depth, SEEN.colour[:1], 0.9 * np.ones((1, 12, 12), np.float32))
        splats, losses = rendering.fit_splats(start, SEEN.colour[[0, 2]], ends, 40)
        psnr = [rendering.view_psnr(each, SEEN.colour[1:2], middle) for each in (start, splats)]
        return psnr, losses, splats, rendering.render_splats(several(splats), middle, (12, 12)).colour

    (before, after), losses, splats, image = fitted()
    assert losses[-1] < 0.3 * losses[0] and after > before + 1.5
    np.testing.assert_allclose(after, 10 * np.log10(4 / np.square(image - SEEN.colour[1:2]).mean()), rtol=1e-4)
    assert (splats.scales > 0).all() and ((splats.opacities > 0) & (splats.opacities < 1)).all()


def test_wrong_input_is_named():
    with pytest.raises(InvalidInput, match="shapes of splats"):
        rendering.render_splats(scene()._replace(colours=np.zeros((3, 3))), TWO, SHAPE)
    with pytest.raises(InvalidInput, match="steps"):
        rendering.fit_splats(scene(), SEEN.colour, AT, 0)
