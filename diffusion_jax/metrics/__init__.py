"""Metrics: distances between sets of samples, image against image, class accuracy, and the cost of sampling.

Sets of images are compared in a feature space: of a judge (a classifier that is trained here on any labelled data, and
cached) or of `inception` from a local file. Low-dimensional data is compared directly. The program that checks samples
of a generated data set is in `data`, beside the generator.
"""

from diffusion_jax.metrics.accuracy import ClassAccuracy, class_accuracy
from diffusion_jax.metrics.agreement import epsilon_gap
from diffusion_jax.metrics.comparison import FeatureComparison, clip_scores, compare_features
from diffusion_jax.metrics.dense import affine_depth_error, mask_overlap
from diffusion_jax.metrics.difficulty import (
    gaussian_relative_entropies,
    normalised_drop,
    relative_entropies,
    steps_to_drop,
)
from diffusion_jax.metrics.distances import energy_distance, sliced_wasserstein, wasserstein, wasserstein_1d
from diffusion_jax.metrics.exposure import ExposureErrors, exposure_errors, exposure_figures
from diffusion_jax.metrics.frechet import Moments, frechet_distance, gaussian_frechet_distance, merge, moments
from diffusion_jax.metrics.frontier import cheapest_within, error_at_cost, pareto_front
from diffusion_jax.metrics.image import psnr, psnr_by_region, ssim
from diffusion_jax.metrics.inception import Inception, InceptionV3, inception
from diffusion_jax.metrics.judges import Judge, Judged, feature_network, judge_space, judged, trained_judge
from diffusion_jax.metrics.kernel import KernelDistance, kernel_distance, mmd2
from diffusion_jax.metrics.leakage import leakage
from diffusion_jax.metrics.linear_runs import run_covariance
from diffusion_jax.metrics.manifold import Manifold, manifold
from diffusion_jax.metrics.sets import SetMetric, clip_distances, image_set, point_set, scene_set, token_set
from diffusion_jax.metrics.statistics import Gaussian, Statistics, read_statistics, write_statistics
from diffusion_jax.metrics.timing import SamplingCost, interleaved, sampling_cost, timed
from diffusion_jax.metrics.trajectories import (
    effective_modes,
    endpoint_error,
    errors_by_sample,
    pairwise_distance,
    trajectory_similarity,
    undecided,
)

__all__ = [
    "ClassAccuracy",
    "ExposureErrors",
    "FeatureComparison",
    "Gaussian",
    "Inception",
    "InceptionV3",
    "Judge",
    "Judged",
    "KernelDistance",
    "Manifold",
    "Moments",
    "SamplingCost",
    "SetMetric",
    "Statistics",
    "affine_depth_error",
    "cheapest_within",
    "class_accuracy",
    "clip_distances",
    "clip_scores",
    "compare_features",
    "effective_modes",
    "endpoint_error",
    "energy_distance",
    "epsilon_gap",
    "error_at_cost",
    "errors_by_sample",
    "exposure_errors",
    "exposure_figures",
    "feature_network",
    "frechet_distance",
    "gaussian_frechet_distance",
    "gaussian_relative_entropies",
    "image_set",
    "inception",
    "interleaved",
    "judge_space",
    "judged",
    "kernel_distance",
    "leakage",
    "manifold",
    "mask_overlap",
    "merge",
    "mmd2",
    "moments",
    "normalised_drop",
    "pairwise_distance",
    "pareto_front",
    "point_set",
    "psnr",
    "psnr_by_region",
    "read_statistics",
    "relative_entropies",
    "run_covariance",
    "sampling_cost",
    "scene_set",
    "sliced_wasserstein",
    "ssim",
    "steps_to_drop",
    "timed",
    "token_set",
    "trained_judge",
    "trajectory_similarity",
    "undecided",
    "wasserstein",
    "wasserstein_1d",
    "write_statistics",
]
