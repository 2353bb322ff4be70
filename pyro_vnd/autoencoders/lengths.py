"""Where the lengths of codes come from: their law a priori, and what an encoder says of them."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor, nn

from pyro_vnd._sizes import check_count, is_one_of
from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn.values import MOMENTUM, ValueHead

__all__ = ["LengthEncoder", "LengthParameters", "LengthSource", "check_lengths", "full_length"]

LengthSource: TypeAlias = Literal["prior", "global", "amortised", "priced"]
HEAD_SHARE = 0.05  # of the weights of the encoder's body: what a value head may cost
HEAD_HIDDEN = (32, 64)  # its hidden units, from and to


class LengthParameters(TypedDict, total=False):
    """The one argument that tells a law of lengths.

    Attributes:
        probs: Probabilities of the lengths, or
        logits: their logits.
    """

    probs: Tensor
    logits: Tensor


def full_length(num_latents: int) -> OrderedMask:
    """Return the law that keeps every latent: with it an ordered model is an ordinary one.

    Args:
        num_latents: K.

    Returns:
        The law, all of whose mass is on L = K.

    Raises:
        ValueError: If the number is no integer >= 1.

    Example:
        >>> full_length(3).keep_probs
        tensor([1., 1., 1.])
    """
    check_count("full_length", num_latents=num_latents)
    return OrderedMask(probs=(torch.arange(num_latents) == num_latents - 1).to(torch.get_default_dtype()))


class LengthEncoder(nn.Module):
    """Numbers for each image and a law of lengths, from one linear map: what encoders of ordered codes share.

    Args:
        bodies: Whose encoder maps images to features.
        num_values: Numbers for each image.
        prior: Law of the lengths a priori.
        source: Where q(L | x) comes from: "prior" leaves it at the prior, which makes the prior's rate a prescribed
            one, as in nested dropout; "global" learns one law for all images; "amortised" one for each, by gradients of
            the bound; "priced" what each length is worth to each image, and from it the law at any price.

    Attributes:
        value_head: Predicts values of lengths from features of the body and code means, or None; see
            `add_value_head`.
    """

    length_probs: Tensor
    value_head: ValueHead | None

    def __init__(self, bodies: Bodies, num_values: int, prior: OrderedMask, source: LengthSource) -> None:
        super().__init__()
        self.body, self.source, self.num_latents, self.num_values = bodies.encoder, source, prior.num_units, num_values
        self.heads = nn.Linear(bodies.num_features, num_values + (self.num_latents if source == "amortised" else 0))
        self.value_head = None
        self._prior = prior
        self.register_load_state_dict_pre_hook(_make_value_head)
        if source == "prior":
            self.register_buffer("length_probs", prior.probs.detach().clone())
        elif source == "global":
            self.length_logits = nn.Parameter(prior.logits.detach().clone())
        elif source == "amortised":
            with torch.no_grad():  # starts at the prior
                self.heads.weight[num_values:] = 0
                self.heads.bias[num_values:] = prior.logits.detach()
        else:
            self.add_value_head()

    @property
    def _num_means(self) -> int:
        """How many of the numbers, the first ones, are the mean code."""
        return self.num_values

    def add_value_head(self) -> ValueHead:
        """Return the value head, a new one if there is none: a perceptron that costs a twentieth of the body."""
        if self.value_head is None:
            num_inputs = self.heads.in_features + self._num_means
            budget = HEAD_SHARE * sum(p.numel() for p in self.body.parameters())
            linear = num_inputs + self.num_latents  # h^2 + linear h = budget
            hidden = int(((linear**2 + 4 * budget) ** 0.5 - linear) / 2)
            hidden = min(max(hidden, HEAD_HIDDEN[0]), HEAD_HIDDEN[1])
            self.value_head = ValueHead(num_inputs, self.num_latents, (hidden, hidden), self._prior)
            self.value_head.to(self.heads.weight).train(self.training)
        return self.value_head

    def values_and_lengths(self, x: Tensor, *, priced: bool = False) -> tuple[Tensor, LengthParameters]:
        """Return the numbers, shape (N, num_values), and what tells the law of the lengths.

        Args:
            x: Images.
            priced: Whether to take the law at price zero from the value head, whatever the source.
        """
        features = self.body(x)
        heads = self.heads(features)
        if self.value_head is not None and (priced or self.source == "priced"):
            # It looks on: what is good for it is not what is good for the code.
            inputs = torch.cat([features, heads[..., : self._num_means]], -1).detach()
            if self.value_head.training:
                self.value_head.standardise(inputs, momentum=MOMENTUM)
            return heads[..., : self.num_values], {"logits": self.value_head(inputs) + self.value_head.log_probs}
        if self.source == "prior":
            return heads, {"probs": self.length_probs}
        if self.source == "global":
            return heads, {"logits": self.length_logits}
        values, lengths = heads.split([self.num_values, self.num_latents], -1)
        return values, {"logits": lengths}

    def value_inputs(self, x: Tensor) -> Tensor:
        """Return what the value head looks at, shape (N, num_inputs)."""
        features = self.body(x)
        return torch.cat([features, self.heads(features)[..., : self._num_means]], -1)

    def narrow(self, num_values: int) -> nn.Sequential:
        """Return a plain net from images to the first numbers."""
        head = nn.Linear(self.heads.in_features, num_values).to(self.heads.weight)
        with torch.no_grad():
            head.weight.copy_(self.heads.weight[:num_values])
            head.bias.copy_(self.heads.bias[:num_values])
        return nn.Sequential(self.body, head)


def _make_value_head(encoder: LengthEncoder, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Make a value head for the weights of one, those of a model that was given it by `distil_lengths`."""
    if any(name.startswith(f"{prefix}value_head.") for name in state_dict):
        encoder.add_value_head()


def check_lengths(model: str, prior: OrderedMask, num_latents: int, source: str) -> None:
    """Raise a ValueError if the law of the lengths is not a single one over K, or nobody knows the source."""
    if not isinstance(prior, OrderedMask) or prior.batch_shape or prior.num_units != num_latents:
        raise ValueError(
            f"{model}: argument `prior_lengths` must be an OrderedMask over {num_latents} units without batch shape; "
            f"got {prior!r}"
        )
    if not is_one_of(source, get_args(LengthSource)):
        raise ValueError(
            f"{model}: argument `posterior_lengths` must be one of {get_args(LengthSource)}; got {source!r}"
        )
    if source != "prior" and not (prior.probs > 0).all():
        raise ValueError(
            f"{model}: argument `prior_lengths` gives some lengths no probability, so that a learned posterior would "
            "have an infinite KL; give it positive probabilities, or posterior_lengths='prior'"
        )
