"""Generated images against real ones: distances between their features, and to the nearest training image."""

import hashlib
import math
import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from pyro_vnd._data import Rows, batches
from pyro_vnd._state import module_mode

__all__ = [
    "KID_SUBSETS",
    "KID_SUBSET_SIZE",
    "feature_distances",
    "generative_metrics",
    "image_features",
    "nearest_distances",
    "weights_hash",
]

KID_SUBSETS = 20
KID_SUBSET_SIZE = 1000

_DISTANCES_AT_ONCE = 10_000_000
_ROUNDING = 1e-13  # of features in float64, relative to their size


def generative_metrics(
    images: Rows,
    reference: Rows,
    features: nn.Module,
    *,
    num_subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, float]:
    r"""Compare the features of images with those of real ones by their Fréchet and their kernel distance.

    $$\mathrm{FID} = \|\mu - \mu'\|^2 + \mathrm{tr}(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}), \qquad
      \mathrm{KID} = \mathrm{MMD}^2, \quad k(a, b) = (a^\top b / D + 1)^3.$$

    Both are in float64, KID by torchmetrics. With features of one's own they compare models with each other, not with
    published values, which are of Inception's. FID is biased upwards, the more the fewer images there are: compare
    values from equally many. It is never negative, and zero for sets that differ by what float64 rounds. KID is
    unbiased for sets that are drawn independently, so that it may be negative; for a set and itself it is.

    Args:
        images: What was generated, shape (N, ...), N at least 2; or data that begin with it, in any of the forms of
            `fit`, of which one batch is in memory at a time, and the features of all.
        reference: Real images, M at least 2, likewise.
        features: Maps images, as they are, to features of shape (N, D), D being its attribute `num_features`. It is run
            in evaluation mode and then put back.
        num_subsets: Number of random subsets that KID is the mean over; one suffices, and is taken, where each would
            be all images.
        subset_size: Images in a subset; fewer where there are not as many.
        seed: Seed of the subsets. The caller's random state is left as it was.
        batch_size: Rows of a batch.

    Returns:
        fid and kid.

    Raises:
        ValueError: If there are too few images, or the features have another shape, NaN or inf.

    Example:
        >>> class Pixels(torch.nn.Flatten):
        ...     num_features = 4
        >>> x = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> round(generative_metrics(x + 3, x, Pixels())["fid"], 3)  # 4 * 3**2
        36.0
    """
    found, real = (image_features(features, rows, batch_size) for rows in (images, reference))
    return feature_distances(found, real, num_subsets=num_subsets, subset_size=subset_size, seed=seed)


def feature_distances(
    found: Tensor,
    real: Tensor,
    *,
    num_subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """Do what `generative_metrics` does for features that are at hand already.

    Args:
        found: Features of what was generated, shape (N, D), N at least 2.
        real: Features of real images, shape (M, D), M at least 2.
        num_subsets: As in `generative_metrics`.
        subset_size: As in `generative_metrics`.
        seed: As in `generative_metrics`.

    Returns:
        fid and kid.

    Raises:
        ValueError: If there are too few rows, or the shapes differ, or an argument is not positive.
    """
    if found.dim() != 2 or real.dim() != 2 or found.shape[1] != real.shape[1] or min(len(found), len(real)) < 2:
        raise ValueError(
            f"feature_distances: `found` and `real` must be features of at least 2 images each, of shapes (N, D) and "
            f"(M, D); got {tuple(found.shape)} and {tuple(real.shape)}"
        )
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"feature_distances: `num_subsets` must be at least 1 and `subset_size` at least 2; got {num_subsets} and "
            f"{subset_size}"
        )
    size = min(subset_size, len(found), len(real))
    identity = _Identity(found.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")  # which is wanted
        kid = KernelInceptionDistance(
            identity, subsets=1 if size == len(found) == len(real) else num_subsets, subset_size=size
        )
    found, real = found.double().cpu(), real.double().cpu()
    kid.update(real, real=True)
    kid.update(found, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {"fid": _frechet(found, real), "kid": kid.compute()[0].item()}


def _frechet(found: Tensor, real: Tensor) -> float:
    r"""Return the Fréchet distance of two Normals with the moments of features.

    With square roots of the covariances, $\Sigma = R^\top R$, it is $\|\mu - \mu'\|^2 + \min_U \|R - U R'\|^2$ over
    orthogonal U: a sum of squares, which no rounding makes negative, where traces cancel.
    """
    means = [rows.mean(0) for rows in (found, real)]
    num_rows = min(max(len(found), len(real)), found.shape[1])
    roots = []
    for rows, mean in zip((found, real), means, strict=True):
        root = torch.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r").R
        roots.append(nn.functional.pad(root, (0, 0, 0, num_rows - len(root))))
    left, _, right = torch.linalg.svd(roots[0] @ roots[1].T)
    gap = torch.cat([(means[0] - means[1])[None], roots[0] - left @ (right @ roots[1])])
    rounded = _ROUNDING * torch.cat([*(mean[None] for mean in means), *roots]).norm()
    return 0.0 if gap.norm() <= rounded else gap.square().sum().item()


@torch.no_grad()
def image_features(features: nn.Module, images: Rows, batch_size: int = 256) -> Tensor:
    """Return the features of images.

    Args:
        features: As in `generative_metrics`.
        images: Shape (N, ...), or data that begin with them.
        batch_size: Rows of a batch.

    Returns:
        Features in float64 on the CPU, shape (N, D).

    Raises:
        ValueError: If `features` has no `num_features`, or what it returns has another shape, NaN or inf.
    """
    width = getattr(features, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"image_features: `features` must be a module with an integer attribute `num_features`; got "
            f"{type(features).__name__} with {width!r}"
        )
    device = next((parameter.device for parameter in features.parameters()), None)
    parts = []
    with module_mode([features], training=False):
        for rows, *_ in batches(images, batch_size):
            found = features(rows if device is None else rows.to(device))
            if found.shape != (len(rows), width) or not torch.isfinite(found).all():
                raise ValueError(
                    f"image_features: `features` must return finite numbers of shape ({len(rows)}, {width}); got "
                    f"shape {tuple(found.shape)}{'' if torch.isfinite(found).all() else ' with NaN or inf'}"
                )
            parts.append(found.double().cpu())
    return torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.float64)


@torch.no_grad()
def nearest_distances(images: Tensor, train: Rows, batch_size: int = 10_000) -> Tensor:
    r"""Return how far each image is from its nearest training image, $\min_t \|x - x_t\|_2$.

    A model that repeats training images has samples much nearer to them than other real images are.

    Args:
        images: Images, shape (N, ...).
        train: Training images, shape (M, ...), on the same device; or data that begin with them, in any of the forms of
            `fit`, of which one batch is in memory at a time.
        batch_size: Training images that are compared at once.

    Returns:
        Euclidean distances over all pixels, shape (N,).

    Raises:
        ValueError: If there are no training images, or the shapes of an image differ.

    Example:
        >>> nearest_distances(torch.tensor([[3.0, 4.0], [9.0, 0.0]]), torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([5., 0.])
    """
    flat = images.flatten(1)
    nearest: Tensor | None = None
    for rows, *_ in batches(train, batch_size):
        if not len(rows) or images.shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"nearest_distances: `train` must have images of the shape {tuple(images.shape[1:])} of those in "
                f"`images`; got shape {tuple(rows.shape)}"
            )
        found = _nearest_of(flat, rows.flatten(1).to(images))
        nearest = found if nearest is None else torch.minimum(nearest, found)
    if nearest is None:
        raise ValueError(f"nearest_distances: `train` must have images; got shape {tuple(getattr(train, 'shape', ()))}")
    return nearest


def _nearest_of(flat: Tensor, others: Tensor) -> Tensor:
    parts = []
    centre = others.mean(0)  # cdist subtracts products, which are small near zero
    centred = others - centre
    for rows in flat.split(max(_DISTANCES_AT_ONCE // len(others), 1)):
        nearest = others[torch.cdist(rows - centre, centred).argmin(1)]
        parts.append((rows - nearest).norm(dim=1))  # cdist's own is inexact where it is small
    return torch.cat(parts)


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers, their names, shapes and types included.

    Args:
        module: Any module.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> len(weights_hash(torch.nn.Linear(2, 3)))
        64
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(math.prod(value.shape))
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Identity(nn.Identity):
    """Stands for the net inside torchmetrics' classes, which then take features for images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
