"""Embeddings of images whose every prefix is an embedding: Matryoshka representations with learned lengths."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from models.sizes import check_sizes
from pyro_vnd.autoencoders import mlp_bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested
from pyro_vnd.nn import ValueHead

__all__ = ["MatryoshkaEmbedding", "octaves"]

SHARP = 0.003  # temperature of laws of lengths at a price


def octaves(num_dims: int) -> OrderedMask:
    r"""Return a law of lengths $p(k) \propto 1/k$ for each octave: 1 and 2, 3 and 4, 5 to 8, and so on up to K.

    Example:
        >>> octaves(4).probs
        tensor([[0.6667, 0.3333, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5714, 0.4286]])
    """
    check_sizes("octaves", num_dims=num_dims)
    ends = [0, *(2**j for j in range(1, num_dims.bit_length()) if 2**j < num_dims), num_dims]
    lengths = torch.arange(1, num_dims + 1)
    return OrderedMask(probs=torch.stack([((lengths > a) & (lengths <= b)) / lengths for a, b in pairwise(ends)]))


class MatryoshkaEmbedding(PyroModule):
    r"""Embedding of images, learned from their labels, that can be cut to any length.

    Each image is seen in V views, through a prefix whose length has a law $p_v$ of its own,

    $$m_{vn} \sim \mathrm{OrderedMask}(p_v), \qquad
      y_n \sim \mathrm{Categorical}(\mathrm{logits} = e^{a^\top m_{vn}} \, W (m_{vn} \odot f(x_n))),$$

    with a proxy of each class in W and a temperature of each length. Laws that are learned tend to
    $q_v(k) \propto p_v(k) e^{-\ell_k / w}$, with the loss $\ell_k$ at length k and the weight w of lengths in
    `fit`. With a view for each octave they cannot collapse: what is learned is which lengths of an octave to train.

    After the fit `distil_lengths(net, (images, labels))` teaches it what each length is worth to an image whose label
    nobody knows, $v_L(x) = E[\log p(y \mid x, L) \mid x]$, and so how long its embedding should be, at any price:

    $$q(L \mid x, \lambda) \propto \exp((v_L(x) - \lambda L) / T),$$

    at a temperature T of .003, as one length is to be chosen and values are fractions of a nat.

    A view for each of some sizes, `OrderedMask(probs=torch.eye(K)[[1, 3, 7]])`, leaves nothing to learn: the sum of
    their losses is Matryoshka representation learning with a tied classifier. A single view is nested dropout.

    Args:
        image_shape: Shape of an image.
        num_classes: C.
        num_dims: K, numbers of the whole embedding.
        lengths: Law of each view's lengths, batch shape (V,), or () for one view; `octaves(num_dims)` by default.
        body: Maps images to features, shape (N, num_features); by default a perceptron with 512 more units before.
        num_features: Features of an image.

    Raises:
        ValueError: If a size is not positive, or `lengths` are not such laws.

    Source: Kusupati et al., "Matryoshka representation learning", arXiv 2205.13147.

    Example:
        >>> net, images = MatryoshkaEmbedding((1, 8, 8), num_classes=10, num_dims=16), torch.rand(5, 1, 8, 8)
        >>> net.embed(images, length=3).shape, net.narrow(3)(images).shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    length_probs: Tensor
    value_head: ValueHead | None

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_classes: int,
        num_dims: int = 64,
        *,
        lengths: OrderedMask | None = None,
        body: nn.Module | None = None,
        num_features: int = 256,
    ) -> None:
        super().__init__()
        check_sizes("MatryoshkaEmbedding", image_shape=image_shape, num_classes=num_classes)
        check_sizes("MatryoshkaEmbedding", num_dims=num_dims, num_features=num_features)
        lengths = octaves(num_dims) if lengths is None else lengths
        if not isinstance(lengths, OrderedMask) or len(lengths.batch_shape) > 1 or lengths.num_units != num_dims:
            raise ValueError(
                f"MatryoshkaEmbedding: argument `lengths` must be an OrderedMask of {num_dims} units of shape () or "
                f"(V,); got {lengths!r}"
            )
        self.num_dims, self.image_shape = num_dims, tuple(image_shape)
        self.body = mlp_bodies(image_shape, (512, num_features)).encoder if body is None else body
        self.head = nn.Linear(num_features, num_dims)
        self.proxies = nn.Linear(num_dims, num_classes, bias=False)  # a bias has norms tell what cosines cannot see
        self.log_scale = nn.Parameter(torch.zeros(num_dims))
        self.value_head = None
        self.register_buffer("length_probs", lengths.probs.detach().reshape(-1, 1, num_dims).clone())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model on images, shape (N, *image_shape), and labels, shape (N,); return labels, shape (V, N)."""
        self._check_images(x)
        embedding, (views, data) = self.head(self.body(x)), self._plates(x)
        with views, data:
            mask = pyro.sample("mask", OrderedMask(probs=self.length_probs))
            logits = self._logits(mask, mask * embedding)
            observed = None if y is None else y.expand(views.size, -1)
            return pyro.sample("label", dist.Categorical(logits=logits), obs=observed)

    def _logits(self, mask: Tensor, embedding: Tensor) -> Tensor:
        """Return logits of the classes, given masked embeddings."""
        return self.proxies(embedding) * linear(mask, self.log_scale).exp().unsqueeze(-1)

    def _plates(self, x: Tensor, y: Tensor | None = None) -> tuple[pyro.plate, pyro.plate]:
        return pyro.plate("views", len(self.length_probs), dim=-2), pyro.plate("data", len(x), dim=-1)

    @cached_property
    def guide(self) -> AutoNested:
        """A guide that learns the law of each view's lengths, the same for all images, by gradients.

        Its masks are independent, mean field, as `create_plates` makes it, which lets batches be of any size. There are
        no other latents that could know the lengths.
        """
        model = poutine.block(self, hide=["label"])  # so that the guide does without labels
        return AutoNested(model, shared_plates=["data"], create_plates=self._plates)

    @property
    def length_law(self) -> OrderedMask:
        """The learned law of lengths, the mean over views; before the first call of the guide, the law a priori."""
        laws = self.guide.laws
        return OrderedMask(probs=(laws["mask"].probs if laws else self.length_probs).mean((0, 1)))

    def add_value_head(self) -> ValueHead:
        """Return the part that predicts what lengths are worth, a new one, which knows nothing, if there is none.

        `distil_lengths` calls it; call it to load weights of a net that has one.
        """
        if self.value_head is None:
            num_features = self.head.in_features + self.num_dims
            # Lengths are chosen, by values that are fractions of a nat.
            self.value_head = ValueHead(num_features, self.num_dims, temperature=SHARP).to(self.head.weight)
        return self.value_head

    def value_inputs(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what the value head looks at, features and embeddings of images; labels are not looked at."""
        self._check_images(x)
        features = self.body(x)
        return torch.cat([features, self.head(features)], -1)

    @torch.no_grad()
    def value_curve(self, x: Tensor, y: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        r"""Return what lengths are worth to images of known labels, $\log p(y \mid x, L)$.

        Args:
            x: Images, shape (N, *image_shape).
            y: Labels, shape (N,).
            lengths: In 1..K; all K by default.

        Returns:
            Nats, shape (N, number of lengths).
        """
        self._check_images(x)
        lengths = [self._length(k) for k in (range(1, self.num_dims + 1) if lengths is None else lengths)]
        masks = self._masks(torch.tensor(lengths, device=x.device)).to(x)
        embedding = masks.unsqueeze(1) * self.head(self.body(x))
        return dist.Categorical(logits=self._logits(masks.unsqueeze(1), embedding)).log_prob(y).T

    @torch.no_grad()
    def lengths(
        self,
        x: Tensor,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        temperature: float = 1.0,
    ) -> OrderedMask:
        """Return the law of the length of each image's embedding at a price.

        Args:
            x: Images, shape (N, *image_shape).
            price: Nats for one more number, for all images or one an image, shape (N,).
            mean_length: In place of a price that at which the images of `distil_lengths` have this mean length.
            temperature: Flattens the law, > 0.

        Returns:
            A law with batch shape (N,).

        Raises:
            ValueError: If an argument is invalid, or the net does not know what lengths are worth.
        """
        return self._knowing_head().law(self.value_inputs(x), price, mean_length, temperature)

    @torch.no_grad()
    def choose_lengths(
        self, x: Tensor, *, price: float | Tensor | None = None, mean_length: float | None = None
    ) -> Tensor:
        """Return the best length of each image's embedding at a price, or at that at which these have a mean.

        Args:
            x: Images, shape (N, *image_shape).
            price: As in `lengths`.
            mean_length: Mean over the images of `distil_lengths`, of these lengths and not of random ones.

        Returns:
            Integers from 1 to K, shape (N,).

        Raises:
            ValueError: As in `lengths`.
        """
        return self._knowing_head().choose(self.value_inputs(x), price, mean_length)

    def _masks(self, lengths: Tensor) -> Tensor:
        """Return which numbers lengths keep, shape (..., K)."""
        return torch.arange(self.num_dims, device=lengths.device) < lengths.unsqueeze(-1)

    def _knowing_head(self) -> ValueHead:
        if self.value_head is None or not self.value_head.is_calibrated:
            raise ValueError(
                "MatryoshkaEmbedding: the net does not know what lengths are worth yet, or not since it was fitted "
                "again: call `distil_lengths(net, (images, labels))` after the fit"
            )
        return self.value_head

    def embed(
        self,
        x: Tensor,
        length: int | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
    ) -> Tensor:
        """Return the first numbers of the embeddings of images, each row of norm one.

        Args:
            x: Images, shape (N, *image_shape).
            length: How many numbers, 1..K; None is all.
            price: In place of a length, for the most probable one of each image at a price, as in `lengths`.
            mean_length: The same for a mean length, as in `lengths`.

        Returns:
            Shape (N, length); where lengths differ (N, K), with zeros past the length of each image.

        Raises:
            ValueError: If an argument is invalid, or the net does not know what lengths are worth.
        """
        self._check_images(x)
        if price is None and mean_length is None:
            length = self._length(self.num_dims if length is None else length)
            return normalize(self.head(self.body(x))[:, :length], dim=-1)
        if length is not None:
            raise ValueError("MatryoshkaEmbedding.embed: give one of `length`, `price` and `mean_length`")
        mask = self._masks(self.choose_lengths(x, price=price, mean_length=mean_length)).to(x)
        return normalize(mask * self.head(self.body(x)), dim=-1)

    @torch.no_grad()
    def classify(self, x: Tensor, length: Tensor) -> Tensor:
        """Return logits of classes, shape (N, C), of images by numbers up to a length of their own, shape (N,)."""
        mask = self._masks(length).to(x)
        return self._logits(mask, mask * self.head(self.body(x)))

    @torch.no_grad()
    def narrow(self, length: int) -> nn.Sequential:
        """Return a plain torch net, with weights of its own, from images to the first numbers, not normalised.

        Args:
            length: How many numbers, 1..K.

        Raises:
            ValueError: If the length is not in 1..K.
        """
        head = nn.Linear(self.head.in_features, self._length(length)).to(self.head.weight)
        for part, whole in zip(head.parameters(), self.head.parameters(), strict=True):
            part.copy_(whole[:length])
        return nn.Sequential(deepcopy(self.body), head)

    def _length(self, length: int) -> int:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= self.num_dims:
            raise ValueError(
                f"MatryoshkaEmbedding: argument `length` must be an integer from 1 to {self.num_dims}; got {length!r}"
            )
        return length

    def _check_images(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[1:] != self.image_shape:
            shape, got = (
                ", ".join(map(str, self.image_shape)),
                tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__,
            )
            raise ValueError(f"MatryoshkaEmbedding: argument `x` must be images of shape (N, {shape}); got {got}")
        if not x.isfinite().all():
            raise ValueError("MatryoshkaEmbedding: argument `x` must be finite images; got NaN or inf")
