"""What an autoencoder with an ordered code is worth at one length of its code."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd.diagnostics.metrics.generative import feature_distances, image_features, nearest_distances
from pyro_vnd.diagnostics.metrics.prefix_model import PrefixModel
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw

__all__ = ["NEAREST_ROWS", "LengthPosterior", "LinearProbe", "PrefixScores"]

NEAREST_ROWS = 1000
_PROBE_ROWS = 5000


@dataclass(frozen=True)
class LengthPosterior:
    """The learned law q(L | x) of each image.

    Attributes:
        mean: Expected length, shape (N,).
        entropy: In nats, shape (N,).
        keep_probs: Probability that each latent is kept, shape (N, K).
    """

    mean: Tensor
    entropy: Tensor
    keep_probs: Tensor


@dataclass(frozen=True)
class PrefixScores:
    """Scores of a model at given lengths.

    Random numbers are those after `torch.manual_seed(seed)`, the same for each length. Call it without gradients.

    Attributes:
        model: The model.
        x: Test images, shape (N, ...).
        train: Training images, or None.
        features: Features of images, or None.
        num_samples: Draws for the ELBO.
        num_importance: Draws for the importance-weighted bound, 0 for none.
        num_generated: Images that are drawn at each length.
        seed: Seed of all draws.
        batch_size: Rows of a batch.
    """

    model: PrefixModel
    x: Tensor
    train: Tensor | None
    features: nn.Module | None
    num_samples: int
    num_importance: int
    num_generated: int
    seed: int
    batch_size: int

    def at(self, length: int) -> dict[str, float]:
        """Return the scores at one length."""
        terms = self._bounds(length)
        terms.pop("kl_lengths", None)  # zero where the length is given
        return self._checked(length, self._reconstructions(length) | terms | self._samples(length))

    def learned(self) -> dict[str, float]:
        """Return the scores at lengths from the learned posterior, and of samples at lengths from the prior."""
        found = {f"{name}_learned": value for name, value in self._bounds(None).items()}
        found |= {f"{name}_prior": value for name, value in self._samples(None).items()}
        if self.train is not None:
            found["nearest_test"] = nearest_distances(self.x[:NEAREST_ROWS], self.train).median().item()
        return self._checked(None, found)

    def codes(self, x: Tensor, length: int) -> Tensor:
        """Return the mean codes of images, in float64 on the CPU, shape (N, length, B)."""
        codes = torch.cat([self.model.embed(rows, length) for rows in x.split(self.batch_size)]).double().cpu()
        finite, num_latents = bool(torch.isfinite(codes).all()), self.model.num_latents
        if codes.dim() != 2 or len(codes) != len(x) or not finite or codes.shape[1] % num_latents:
            raise ValueError(
                f"evaluate_prefixes: `model.embed` must return finite codes of shape ({len(x)}, {num_latents}), or a "
                f"multiple of {num_latents}; got shape {tuple(codes.shape)}{'' if finite else ' with NaN or inf'}"
            )
        return codes.unflatten(1, (num_latents, -1))[:, :length]

    def length_law(self) -> LengthPosterior | None:
        """Return the learned law of the lengths, in float64 on the CPU, None if the model has none."""
        if not hasattr(self.model, "encode"):
            return None
        laws = [self.model.encode(rows) for rows in self.x.split(self.batch_size)]
        lengths = [law.mask_law if isinstance(law, NestedLaw) else law for law in laws]
        if not all(isinstance(law, OrderedMask) for law in lengths):
            return None
        return LengthPosterior(
            torch.cat([law.mean_length for law in lengths]).double().cpu(),
            torch.cat([law.entropy() for law in lengths]).double().cpu(),
            torch.cat([law.keep_probs for law in lengths]).double().cpu(),
        )

    @cached_property
    def _real(self) -> Tensor:
        assert self.features is not None
        return image_features(self.features, self.x, self.batch_size)

    def _bounds(self, length: int | None) -> dict[str, float]:
        """Average the bounds over images, with lengths from the learned posterior for None."""
        elbo, weighted = (getattr(self.model, name, None) for name in ("elbo", "log_likelihood"))
        sums: dict[str, float] = defaultdict(float)
        torch.manual_seed(self.seed)
        for rows in self.x.split(self.batch_size):
            if elbo is not None:
                terms = elbo(rows, length, self.num_samples)
                for name in ("log_likelihood", "kl_latents", "kl_lengths", "elbo"):
                    sums[name] += getattr(terms, name).double().sum().item()
            if weighted is not None and self.num_importance:
                sums["iw_bound"] += weighted(rows, self.num_importance, length).double().sum().item()
        means = {name: value / len(self.x) for name, value in sums.items()}
        if elbo is not None:
            means["reconstruction_log_likelihood"] = means.pop("log_likelihood")
            means["distortion"] = -means["reconstruction_log_likelihood"]
            means["rate"] = means["kl_latents"] + means["kl_lengths"]
        if "iw_bound" in means:
            means["bits_per_dim"] = -means["iw_bound"] / (math.log(2) * math.prod(self.x.shape[1:]))
        return means

    def _reconstructions(self, length: int) -> dict[str, float]:
        squares, found = 0.0, []
        for rows in self.x.split(self.batch_size):
            images = self._images("reconstruct", self.model.reconstruct(rows, length), len(rows))
            squares += (images - rows).double().square().sum().item()
            found += [] if self.features is None else [image_features(self.features, images)]
        scores = {"mse": squares / self.x.numel()}
        if found:
            distances = feature_distances(torch.cat(found), self._real, seed=self.seed)
            scores |= {f"{name}_reconstructions": value for name, value in distances.items()}
        return scores

    def _samples(self, length: int | None) -> dict[str, float]:
        """Compare samples with the test images, and with the training images."""
        if self.features is None and self.train is None:
            return {}
        number = self.num_generated if self.features is not None else min(self.num_generated, NEAREST_ROWS)
        torch.manual_seed(self.seed)
        parts = []
        for start in range(0, number, self.batch_size):
            size = min(self.batch_size, number - start)
            parts.append(self._images("sample", self.model.sample(size, length), size))
        images, scores = torch.cat(parts), {}
        if self.features is not None:
            found = image_features(self.features, images, self.batch_size)
            distances = feature_distances(found, self._real, seed=self.seed)
            scores = {f"{name}_samples": value for name, value in distances.items()}
        if self.train is not None:
            scores["nearest_sample"] = nearest_distances(images[:NEAREST_ROWS], self.train).median().item()
        return scores

    def _images(self, method: str, images: Tensor, number: int) -> Tensor:
        expected = (number, *self.x.shape[1:])
        if images.shape != expected:
            raise ValueError(
                f"evaluate_prefixes: `model.{method}` must return images of shape {expected}; got {tuple(images.shape)}"
            )
        return images

    def _checked(self, length: int | None, scores: dict[str, float]) -> dict[str, float]:
        for name, value in scores.items():
            if not math.isfinite(value):
                where = "" if length is None else f" at length {length}"
                raise ValueError(f"evaluate_prefixes: `model` must have finite scores; `{name}`{where} is {value}")
        return scores


class LinearProbe:
    """Scikit-learn's logistic regression of labels on standardised codes of training images, scored on test images.

    Args:
        train: Training images, shape (M, ...), of which at most 5,000 are used, the same for every fit.
        train_labels: Shape (M,).
        test: Test images, shape (N, ...).
        test_labels: Shape (N,).

    Raises:
        ImportError: If scikit-learn is missing.
    """

    def __init__(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
        try:
            from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
            from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
            from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            advice = 'pip install "pyro-vnd[diagnostics]", or leave out the labels of `train`'
            raise ImportError(f"evaluate_prefixes: a probe needs scikit-learn: {advice}", name="sklearn") from error
        self._classifier: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:_PROBE_ROWS]
        self.train, self.train_labels = train[some.to(train.device)], train_labels[some]
        self.test, self.test_labels = test, test_labels

    def accuracy(self, encode: Callable[[Tensor], Tensor]) -> float:
        """Fit to the codes that a function gives images, and return the accuracy."""
        train, test = (encode(images).flatten(1).numpy() for images in (self.train, self.test))
        self._classifier.fit(train, self.train_labels.numpy())
        return float(self._classifier.score(test, self.test_labels.numpy()))
