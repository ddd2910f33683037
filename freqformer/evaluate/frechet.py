"""Distances between two sets of features: Fréchet's, and the kernel distance.

Both are of features `[n, f]`, a row per clip, and symmetric. The Fréchet distance is biased upwards
by few samples, so that it is compared at equal counts only; the kernel distance is unbiased and has
a meaning from a few dozen samples on.
"""

import numpy as np

from freqformer.config import ConfigError


def least_samples(features: int) -> int:
  """Returns the number of samples below which a covariance of so many features is singular."""
  return features + 1


def frechet(a: np.ndarray, b: np.ndarray) -> float:
  """Returns `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)`, in float64.

  That of Gaussians of the same means and covariances (Dowson and Landau, 1982). The trace of the
  root is the sum of the singular values of `S_a^1/2 S_b^1/2`, and the roots are from symmetric
  eigendecompositions: nothing complex can come out, whatever the sets' rank, as it can of a
  Schur-based root of `S_a S_b`.

  Raises:
    ConfigError: a set has no more rows than features.
  """
  a = np.asarray(a, np.float64)
  b = np.asarray(b, np.float64)
  least = least_samples(a.shape[1])
  if min(len(a), len(b)) < least:
    raise ConfigError(
      f"a Fréchet distance of {a.shape[1]} features needs at least {least} clips on either side, "
      f"got {len(a)} and {len(b)}: give --n more, or take kvd, which needs few."
    )
  mean = np.square(a.mean(0) - b.mean(0)).sum()
  roots = [_root(np.cov(x, rowvar=False)) for x in (a, b)]
  cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
  return float(mean + sum(np.square(root).sum() for root in roots) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
  """Returns the symmetric root; eigenvalues that rounding made negative count as 0."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def kernel(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the squared maximum mean discrepancy under `(x . y / f + 1)^3`, unbiased, in float64.

  As KID (Binkowski et al., arXiv 1801.01401, eq. 4) has it for images. It may be negative.

  Raises:
    ConfigError: a set has less than two rows.
  """
  a = np.asarray(a, np.float64)
  b = np.asarray(b, np.float64)
  if min(len(a), len(b)) < 2:
    raise ConfigError(f"a kernel distance needs two clips on either side, got {len(a)}, {len(b)}.")

  def mean_kernel(x, y, same):
    values = (x @ y.T / x.shape[1] + 1) ** 3
    if same:
      return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))
    return values.mean()

  return float(mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False))
