"""An autoencoder with an ordered code scored at many lengths of the code."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vnd._data import Rows, batches
from pyro_vnd._inputs import check_labels
from pyro_vnd._sizes import check_count, check_num_latents, check_seed, is_integer
from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.generative import KID_SUBSET_SIZE, KID_SUBSETS, weights_hash
from pyro_vnd.diagnostics.metrics.prefix_model import PrefixModel
from pyro_vnd.diagnostics.metrics.prefix_scores import NEAREST_ROWS, LinearProbe, PrefixScores
from pyro_vnd.diagnostics.metrics.variables import variable

__all__ = ["evaluate_prefixes"]

_LABELS = {
    "mse": ("squared error of a pixel", "1"),
    "reconstruction_log_likelihood": ("log-likelihood given the code", "nats"),
    "distortion": ("distortion", "nats"),
    "kl_latents": ("KL of the latents", "nats"),
    "kl_lengths": ("KL of the lengths", "nats"),
    "rate": ("rate", "nats"),
    "elbo": ("ELBO", "nats"),
    "iw_bound": ("importance-weighted bound", "nats"),
    "bits_per_dim": ("bits per pixel", "bits"),
    "mean_length": ("mean length", "latents"),
    "entropy_length": ("entropy of the length", "nats"),
    "keep_probs": ("keep probability", "1"),
    "mean_code_variance": ("variance of the mean code", "1"),
    "active_units": ("active latents", "1"),
    "probe_accuracy": ("accuracy of a linear probe", "1"),
    "nearest_test": ("distance of test images to the nearest training image", "1"),
    "nearest_sample": ("distance of samples to the nearest training image", "1"),
    "fid_samples": ("FID of samples", "1"),
    "kid_samples": ("KID of samples", "1"),
    "fid_reconstructions": ("FID of reconstructions", "1"),
    "kid_reconstructions": ("KID of reconstructions", "1"),
}
_ENDINGS = {"_learned": "lengths from the posterior", "_prior": "lengths from the prior"}
_variable = partial(variable, _LABELS, _ENDINGS)


def evaluate_prefixes(
    model: PrefixModel,
    data: Rows,
    prefixes: Sequence[int],
    *,
    num_samples: int = 10,
    num_importance: int = 100,
    train: Rows | None = None,
    features: nn.Module | None = None,
    num_generated: int = 10_000,
    active_threshold: float = 0.01,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    r"""Score an autoencoder at each of several lengths of its code, and at lengths from its learned law.

    $$\log p(x \mid L) \ge \underbrace{E_q \log p(x \mid z, L)}_{-\text{distortion}}
      - \underbrace{\mathrm{KL}(q(z, L \mid x) \| p(z, L))}_{\text{rate}}.$$

    The data are held in memory whole. Before each length torch's random state is set to `seed`, so that lengths differ
    by as little noise as can be; the caller's random state is left as it was.

    Args:
        model: A model of `pyro_vnd.autoencoders`, or of one's own with what
            `pyro_vnd.diagnostics.metrics.prefix_model.PrefixModel` describes: `num_latents`, `embed`, `reconstruct` and
            `sample`, and `elbo`, `log_likelihood` and `encode` as far as it has them. It is run in evaluation mode and
            then put back.
        data: Test images x, and labels y if there are any: a tensor x, a pair (x, y), a mapping of the two, called
            "x" and "y" or in this order, a `Dataset`, or an iterable of batches.
        prefixes: Lengths of the code, distinct and in 1..K.
        num_samples: Draws of the code for the ELBO of an image.
        num_importance: Draws of the code for its importance-weighted bound; 0 leaves the bound out.
        train: Training images, as `data`: how far test images and samples are from them, and the probe.
        features: Features of images for FID and KID, as in `generative_metrics`.
        num_generated: Images that are drawn at each length for `features`.
        active_threshold: Variance over the images above which the mean of a latent counts as active.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch.
        progress: Whether to show a progress bar.

    Returns:
        A Dataset in which all variables have the dimension `seed`, so that `xr.concat(datasets, "seed")` joins fits;
        `plot_widths(dataset.rename(prefix="width"), ...)` draws those of (seed, prefix):

        - `mse` (seed, prefix), over images and pixels; `active_units` (seed, prefix), and `mean_code_variance`
          (seed, unit), on which they rest, the largest one of a latent with several numbers;
        - with `elbo`: `reconstruction_log_likelihood`, `distortion`, `kl_latents`, `rate` and `elbo`, and with
          `log_likelihood` also `iw_bound` and, from it, `bits_per_dim` (seed, prefix), means over images; the same with
          the ending `_learned` (seed) for lengths from the learned posterior, and `kl_lengths_learned`;
        - with `encode`: `mean_length` and `entropy_length` (seed), means over images of those of q(L | x), and where
          there are labels `keep_probs` (seed, class, unit), means over the images of a class;
        - with `train`: `nearest_test` (seed), `nearest_sample` (seed, prefix) and `nearest_sample_prior` (seed), median
          distances of 1,000 test images and samples to their nearest training image; where there are labels
          `probe_accuracy` (seed, prefix) on the test images of scikit-learn's logistic regression, which must be
          installed, on the standardised mean codes of 5,000 training images, the same for every fit;
        - with `features`, in comparison with the test images: `fid_samples`, `kid_samples`, `fid_reconstructions` and
          `kid_reconstructions` (seed, prefix), and `fid_samples_prior` and `kid_samples_prior` (seed) for lengths from
          the prior. Reconstructions are not independent of the test images: their KID can be below zero.

        Attributes say how many of each there were, the shape of an image, and by `features_hash` which features.

    Raises:
        ValueError: If lengths or numbers are invalid, there are no rows, images have NaN, or what the model returns has
            another shape or is not finite.
        ImportError: If there is a probe, and no scikit-learn.

    Sources: Burda, Grosse and Salakhutdinov, arXiv 1509.00519 (bound, active units); Alemi et al., arXiv 1711.00464
    (rate and distortion).

    Example:
        >>> class Cut:  # keeps the first pixels
        ...     num_latents = 3
        ...     def embed(self, x, length):
        ...         return x * (torch.arange(3) < length)
        ...     reconstruct = embed
        ...     def sample(self, num_samples, length):
        ...         return self.embed(torch.randn(num_samples, 3), 3 if length is None else length)
        >>> result = evaluate_prefixes(Cut(), torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]]), [1, 3], progress=False)
        >>> result["mse"].values.tolist(), result["active_units"].values.tolist()
        ([[0.3333333333333333, 0.0]], [[1, 1]])
    """
    _check(model, prefixes, num_samples=num_samples, num_importance=num_importance, num_generated=num_generated)
    check_seed("evaluate_prefixes", seed)
    with torch.random.fork_rng(), module_mode([model], training=False), torch.no_grad():
        torch.manual_seed(seed)  # a loader that shuffles draws from it
        x, labels = _gather("data", data, model, batch_size)
        train_x, train_labels = (None, None) if train is None else _gather("train", train, model, batch_size)
        scores = PrefixScores(model, x, train_x, features, num_samples, num_importance, num_generated, seed, batch_size)
        probe = None
        if labels is not None and train_x is not None and train_labels is not None:
            probe = LinearProbe(train_x, train_labels, x, labels)
        law, whole = scores.length_law(), scores.learned()
        variance = scores.codes(x, model.num_latents).var(0, correction=0).amax(-1)
        by_length: dict[str, list[float]] = defaultdict(list)
        for length in tqdm(prefixes, desc="prefixes", disable=not progress):
            found = scores.at(length) | {"active_units": int((variance[:length] > active_threshold).sum())}
            if probe is not None:
                found["probe_accuracy"] = probe.accuracy(partial(scores.codes, length=length))
            for name, value in found.items():
                by_length[name].append(value)

    units = np.arange(1, model.num_latents + 1)
    prefix = ("prefix", list(prefixes), {"long_name": "code length", "units": "latents"})
    coords: dict[str, Any] = {"seed": [seed], "prefix": prefix, "unit": units}
    if law is not None:
        whole |= {"mean_length": law.mean.mean().item(), "entropy_length": law.entropy.mean().item()}
    variables = {name: _variable(name, (), value) for name, value in whole.items()}
    variables |= {name: _variable(name, ("prefix",), values) for name, values in by_length.items()}
    variables["mean_code_variance"] = _variable("mean_code_variance", ("unit",), variance)
    if law is not None and labels is not None:
        coords["class"] = labels.unique().numpy()
        means = torch.stack([law.keep_probs[labels == label].mean(0) for label in labels.unique()])
        variables["keep_probs"] = _variable("keep_probs", ("class", "unit"), means)

    attrs = {"num_rows": len(x), "image_shape": list(x.shape[1:]), "num_latents": model.num_latents}
    attrs |= {"num_samples": num_samples, "num_importance": num_importance, "active_threshold": active_threshold}
    if train_x is not None:
        attrs |= {"num_train": len(train_x), "nearest_rows": NEAREST_ROWS}
    if probe is not None:
        attrs |= {"probe_rows": len(probe.train)}
    if features is not None:
        attrs |= {"num_generated": num_generated, "features_hash": weights_hash(features)}
        attrs |= {"kid_subsets": KID_SUBSETS, "kid_subset_size": KID_SUBSET_SIZE}
    return xr.Dataset(variables, coords, attrs)


def _check(model: PrefixModel, prefixes: Sequence[int], **numbers: int) -> None:
    check_num_latents("evaluate_prefixes", model)
    known = range(1, model.num_latents + 1)
    lengths = list(prefixes) if isinstance(prefixes, Iterable) else []
    wanted = {length for length in lengths if is_integer(length) and length in known}
    if not wanted or len(wanted) < len(lengths):
        raise ValueError(
            f"evaluate_prefixes: argument `prefixes` must be distinct integers from 1 to {model.num_latents}; got "
            f"{prefixes!r}"
        )
    for name, number in numbers.items():
        check_count("evaluate_prefixes", least=0 if name == "num_importance" else 1, **{name: number})


def _gather(argument: str, data: Rows, model: PrefixModel, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Return all images, on the model's device, and their labels, on the CPU, if there are any."""
    parts = [tuple(batch[:2]) for batch in batches(data, batch_size) if len(batch[0])]
    if not parts:
        raise ValueError(f"evaluate_prefixes: argument `{argument}` has no rows")
    x = torch.cat([part[0] for part in parts])
    if not torch.isfinite(x).all():
        raise ValueError(f"evaluate_prefixes: argument `{argument}` has images with NaN or inf")
    if isinstance(model, nn.Module):
        state = chain(model.parameters(), model.buffers())
        x = x.to(next((value.device for value in state), x.device))
    labels = [check_labels("evaluate_prefixes", part[1], len(part[0])) for part in parts if len(part) > 1]
    return x, torch.cat(labels).cpu() if labels else None
