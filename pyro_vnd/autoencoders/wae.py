"""A Wasserstein autoencoder whose code can be cut at any length, and its objective."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.contrib.gp.kernels import Kernel
from pyro.infer import Trace_MMD
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vnd.autoencoders.base import OrderedAutoencoder
from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.autoencoders.codes import CodeDecoder, CodeEncoder, Tail
from pyro_vnd.autoencoders.lengths import LengthEncoder, LengthSource
from pyro_vnd.autoencoders.likelihoods import Likelihood
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer import module_local_params

__all__ = ["AggregateMMD", "InverseMultiquadratic", "OrderedWAE", "squared_mmd"]


class InverseMultiquadratic(Kernel):
    r"""Kernel with heavy tails at the scales of codes of several lengths.

    $$k(x, y) = \frac{1}{|S|} \sum_{s \in S} \frac{2 s}{2 s + |x - y|^2}.$$

    Two draws of N(0, I) in s dimensions are at squared distance 2 s: s is the kernel of a code of s latents, and the
    mean over powers of two sees short codes and long ones alike. With one s it is `RationalQuadratic` of Pyro with
    lengthscale the root of s. It has no parameters.

    Args:
        num_latents: K, numbers of a code.
        scales: The set S; 1, 2, 4, ... and K by default.

    Raises:
        ValueError: If a number is not positive.

    Source: Tolstikhin et al., arXiv 1711.01558, section 4, who have s = K.

    Example:
        >>> import torch
        >>> InverseMultiquadratic(2, scales=[2])(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """

    def __init__(self, num_latents: int, scales: Sequence[float] | None = None) -> None:
        if not isinstance(num_latents, int) or num_latents < 1:
            raise ValueError(
                f"InverseMultiquadratic: argument `num_latents` must be an integer >= 1; got {num_latents!r}"
            )
        super().__init__(num_latents)
        if scales is None:
            scales = sorted({2**i for i in range(num_latents.bit_length())} | {num_latents})
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"InverseMultiquadratic: argument `scales` must be finite and > 0; got {list(scales)}")
        self.scales = tuple(scales)

    def forward(self, x: Tensor, y: Tensor | None = None, diag: bool = False) -> Tensor:
        """Return the kernel of all rows of one tensor, shape (N, K), with all of another: shape (N, M)."""
        if diag:
            return x.new_ones(len(x))
        y = x if y is None else y
        squares = (x.square().sum(-1, keepdim=True) - 2 * x @ y.T + y.square().sum(-1)).clamp_min(0)
        similarity = torch.zeros_like(squares)
        for scale in self.scales:
            similarity = similarity + 2 * scale / (2 * scale + squares)
        return similarity / len(self.scales)


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    r"""Estimate the squared maximum mean discrepancy of two laws from pairs of draws, without bias.

    $$\frac{1}{n (n - 1)} \sum_{i \ne j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i).$$

    The pairs are independent of one another; what is in one pair need not be. Unbiased for a discrepancy of zero, it
    is negative half of the time there.

    Args:
        x: Draws of one law, shape (n, D).
        y: As many draws of the other.
        kernel: Kernel over D numbers.

    Returns:
        The estimate, a scalar.

    Raises:
        ValueError: If there are fewer than two pairs, or shapes do not fit.

    Source: Gretton et al., "A kernel two-sample test", JMLR 13, 2012, lemma 6.
    """
    if x.shape != y.shape or x.dim() != 2 or len(x) < 2:
        raise ValueError(
            "squared_mmd: arguments `x` and `y` must be two or more pairs of codes; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if kernel.input_dim != x.shape[-1]:
        raise ValueError(f"squared_mmd: argument `kernel` is over {kernel.input_dim} numbers; codes have {x.shape[-1]}")
    n = len(x)
    kernel = _with_constants(kernel)
    # Under the setting a module needs a store of its own, even one that is made without.
    is_local = pyro.settings.get("module_local_params")
    with module_local_params(kernel) if is_local else nullcontext():
        terms = kernel(x) + kernel(y) - 2 * kernel(x, y)
    return (terms.sum() - terms.diagonal().sum()) / (n * (n - 1))


def _with_constants(kernel: Kernel) -> Kernel:
    """Turn parameters of a kernel into numbers: Pyro would find those of another kernel under the same name."""
    if not list(kernel.parameters()):
        return kernel
    kernel = deepcopy(kernel)
    for part in kernel.modules():
        for parameter, _ in list(part.named_parameters(recurse=False)):
            name = parameter.removesuffix("_unconstrained")  # what a PyroParam is as a parameter of torch
            value = getattr(part, name).detach()
            delattr(part, name)
            setattr(part, name, value)
    return kernel


class AggregateMMD(Trace_MMD):
    r"""Pyro's `Trace_MMD` with the codes of a batch in place of particles: the objective of a Wasserstein autoencoder.

    $$\frac1N \sum_n E_q \log p(x_n \mid z) - \lambda \, \mathrm{MMD}^2(\bar q, p)
      - w \, \frac1N \sum_n \mathrm{KL}(q(L \mid x_n) \| p(L)), \qquad \bar q = \frac1N \sum_n q(z \mid x_n),$$

    times the number of rows, so that under `fit` and `pyro.infer.SVI` alike it counts as an ELBO does: $\lambda$ is in
    nats a row whatever the batch. `Trace_MMD` compares one draw of all codes of the data with another, and needs many
    particles; here the rows of the batch are a draw of the aggregate posterior, each with one draw of its prior.

    - Codes that a `MaskSchedule` cuts are compared with draws of the prior cut to the same lengths: a pair of codes
      has one length.
    - Lengths have their exact KL, of a `NestedNormal` or a mask that is a site of its own. The discrepancy sees them
      only through zeros in the codes, and charges nothing for a longer code that fits the prior.
    - Under `fit`, `KLWeights(local=)` weighs the discrepancy, and lengths of a `NestedNormal` with it; `lengths=`
      weighs masks that are sites. It is no bound of the likelihood, and the "kl" of the result is both penalties.

    The gradient is that of reparameterised draws, straight through the masks.

    Args:
        kernel: Kernel of `pyro.contrib.gp`, such as `InverseMultiquadratic(K)`, or one for each latent, by name.
        mmd_scale: $\lambda$, or one for each latent, by name.
        length_weight: w, the weight of the KL of the lengths.
        plate: Name of the plate of the data; all latents are in it.
        **kwargs: As in `pyro.infer.ELBO`: `num_particles` and so on.

    Raises:
        ValueError: If a weight is not finite or negative; in use, if a latent is not in the plate, is not
            reparameterised, or the batch has one row only.

    Source: Zhao et al., arXiv 1706.02262 (MMD-VAE); Tolstikhin et al., arXiv 1711.01558 (WAE-MMD).
    """

    def __init__(
        self,
        kernel: Kernel | dict[str, Kernel],
        mmd_scale: float | dict[str, float] = 1.0,
        length_weight: float = 1.0,
        *,
        plate: str = "data",
        **kwargs: Any,
    ) -> None:
        super().__init__(kernel, mmd_scale, **{"num_particles": 1, "vectorize_particles": False} | kwargs)
        weights = {"length_weight": [length_weight]}
        weights["mmd_scale"] = list(mmd_scale.values()) if isinstance(mmd_scale, dict) else [mmd_scale]
        for name, values in weights.items():
            if not all(0 <= value < math.inf for value in values):
                raise ValueError(f"AggregateMMD: argument `{name}` must be finite and >= 0; got {values}")
        self.length_weight, self.plate = length_weight, plate

    def _differentiable_loss_parts(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        log_likelihood: Any = 0.0
        penalty: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            for name, site in model_trace.nodes.items():
                if site["type"] != "sample":
                    continue
                if site["is_observed"]:
                    log_likelihood = log_likelihood + site["log_prob_sum"] / self.num_particles
                else:
                    penalty = penalty + self._penalty(name, site, guide_trace.nodes[name]) / self.num_particles
        return log_likelihood, penalty

    def _penalty(self, name: str, model_site: Any, guide_site: Any) -> Any:
        p, q, scale = model_site["fn"], guide_site["fn"], guide_site["scale"]
        frames = [frame for frame in guide_site["cond_indep_stack"] if frame.name == self.plate]
        if not frames:
            raise ValueError(
                f"AggregateMMD: site {name!r} is not in the plate {self.plate!r}, over whose rows codes are compared"
            )
        if not (q.has_rsample and (p.has_rsample or isinstance(p, OrderedMask))):
            raise ValueError(f"AggregateMMD: site {name!r} must be reparameterised in model and guide")
        if isinstance(q, OrderedMask):
            return scale * self.length_weight * kl_divergence(q, p).sum()
        penalty: Any = 0.0
        if isinstance(q, NestedLaw):
            penalty = scale * self.length_weight * kl_divergence(q.mask_law, p.mask_law).sum()
        dims = [frames[0].dim - q.event_dim]
        if self.vectorize_particles and self.num_particles > 1:
            dims = [-self.max_plate_nesting - q.event_dim, *dims]
        # The law of the prior in this trace: it knows of lengths that are given, and the decoder need not run again.
        draws = [value.movedim(dims, list(range(len(dims)))) for value in (guide_site["value"], p.rsample())]
        if len(dims) == 1:
            draws = [value.unsqueeze(0) for value in draws]
        kernels: Any = self.kernel  # by name, whatever was given
        scales: Any = self.mmd_scale
        kernel, weight = kernels[name], scale * draws[0].shape[1] * scales[name]
        for codes, others in zip(*(value.flatten(2) for value in draws), strict=True):
            penalty = penalty + weight * squared_mmd(codes, others, kernel)
        return penalty


class OrderedWAE(OrderedAutoencoder):
    r"""Wasserstein autoencoder with ordered latents: codes as a whole follow the prior, the code of an image need not.

    $$\max E_q \log p(x \mid z, L) - \lambda \, \mathrm{MMD}^2(\bar q(z), p(z)) - \mathrm{KL}(q(L \mid x) \| p(L)),
      \qquad \bar q(z) = E_x \, q(z \mid x).$$

    Model and guide are those of `OrderedVAE`; it is the objective that makes the difference. A code may say all of an
    image, as nothing charges for it: deviations of q(z | x) may fall to zero, which is the deterministic encoder. It is
    the codes of all images together that are held to the prior, so that draws of the prior decode to images.

    What drives a learned law of the lengths is the likelihood, and the discrepancy of the cut codes where those of a
    length do not fit the prior cut likewise, both straight through the mask. The discrepancy hardly sees how long codes
    are, so that the KL of the lengths is added, exactly as in the VAE. Where codes of all lengths fit,
    $q(L \mid x) \propto p(L) \exp(E \log p(x \mid z, L))$: a longer code costs nothing, and q(L | x) is near K unless
    p(L) charges for length, as `OrderedMask.geometric` does with log(1 / p) nats a latent. Train short codes by
    `fit(..., schedule=MaskSchedule(...))`.

    A discrepancy that weighs much from the start keeps codes at the prior, where they say nothing of the image: let it
    rise, `fit(..., weights=KLWeights(local=linear(0, 1, warmup=0.5)))`.

    Args:
        image_shape: As in `OrderedAutoencoder`.
        num_latents: K.
        bodies: As in `OrderedVAE`.
        likelihood: As in `OrderedVAE`.
        prior_lengths: As in `OrderedVAE`.
        posterior_lengths: As in `OrderedVAE`.
        tail: As in `OrderedVAE`.
        make_encoder: As in `OrderedAutoencoder`.
        make_decoder: As in `OrderedAutoencoder`.

    Raises:
        ValueError: If an argument is invalid.

    Source: Tolstikhin et al., arXiv 1711.01558; Zhao et al., arXiv 1706.02262.

    Example:
        >>> from pyro_vnd.infer import MaskSchedule, fit
        >>> x = torch.rand(64, 1, 8, 8)
        >>> wae = OrderedWAE((1, 8, 8), num_latents=4)
        >>> arguments = {"num_epochs": 2, "batch_size": 32, "schedule": MaskSchedule(), "progress": False}
        >>> _ = fit(wae, wae.guide, x, elbo=wae.objective(), **arguments)
        >>> wae.embed(x, length=2).shape, wae.mmd(x, length=2).shape
        (torch.Size([64, 4]), torch.Size([]))
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_latents: int = 16,
        *,
        bodies: Bodies | None = None,
        likelihood: Likelihood | None = None,
        prior_lengths: OrderedMask | None = None,
        posterior_lengths: LengthSource = "amortised",
        tail: Tail = "zeros",
        make_encoder: Callable[[Bodies, OrderedMask, LengthSource], LengthEncoder] = CodeEncoder,
        make_decoder: Callable[[Bodies, int, Tail], CodeDecoder] = CodeDecoder,
    ) -> None:
        super().__init__(
            image_shape,
            num_latents,
            bodies=bodies,
            likelihood=likelihood,
            prior_lengths=prior_lengths,
            posterior_lengths=posterior_lengths,
            tail=tail,
            make_encoder=make_encoder,
            make_decoder=make_decoder,
        )

    def _costs(self, law: NestedNormal) -> Tensor:
        """Return zero: codes are compared with their prior all together, so that no image pays for its own."""
        return torch.zeros_like(law.loc)

    def objective(self, mmd_scale: float = 100.0, length_weight: float = 1.0, **kwargs: Any) -> AggregateMMD:
        r"""Return the objective, for `fit(..., elbo=...)` or `pyro.infer.SVI`.

        Args:
            mmd_scale: $\lambda$, in nats a row for a squared discrepancy of one, its largest value being two.
            length_weight: Weight of the KL of the lengths.
            **kwargs: As in `AggregateMMD`.

        Returns:
            The objective, with the kernel `InverseMultiquadratic(K)`.

        Raises:
            ValueError: If a weight is not finite or negative.
        """
        return AggregateMMD(InverseMultiquadratic(self.num_latents), mmd_scale, length_weight, **kwargs)

    @torch.no_grad()
    def mmd(self, x: Tensor, length: int | Tensor | None = None, kernel: Kernel | None = None) -> Tensor:
        """Estimate the squared discrepancy of codes of images and of the prior, without bias.

        Args:
            x: Images, shape (N, *image_shape), two or more.
            length: Code length, 1..K, for all images or one an image; None has it random in both.
            kernel: Kernel over K numbers, `InverseMultiquadratic(K)` by default.

        Returns:
            A scalar.

        Raises:
            ValueError: If an argument is invalid.
        """
        codes = self.encode(x, length).sample()
        prior = self.prior().expand(codes.shape[:1])
        draws = (prior if length is None else prior.cut(self._length(length))).sample()
        return squared_mmd(codes, draws, InverseMultiquadratic(self.num_latents) if kernel is None else kernel)
