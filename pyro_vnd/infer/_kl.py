"""The exact divergences of latents, in the terms that have weights of their own."""

from typing import Any

from torch.distributions import kl_divergence

from pyro_vnd._compat import recall
from pyro_vnd.distributions import NestedNormal
from pyro_vnd.distributions.kl import kl_parts
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer._model_sites import is_mask

__all__ = ["kl_terms", "weight_of"]


def kl_terms(q: Any, p: Any, value: Any) -> dict[str, Any]:
    """Return the terms of the exact KL of two laws, given a draw, by the name of their weight in `infer`.

    Raises:
        NotImplementedError: If there is none.
    """
    if isinstance(q, NestedLaw) and isinstance(p, NestedLaw):
        if not (isinstance(q, NestedNormal) and isinstance(p, NestedNormal)):
            if recall(value) is None:  # what was dropped is not known
                raise NotImplementedError
            # By the chain rule: each coordinate's divergence given the draws of those before it.
            q, p = q.given(value), p.given(value)
        return dict(zip(("length_weight", "kl_weight"), kl_parts(q, p, value), strict=True))
    return {weight_of(q): kl_divergence(q, p)}


def weight_of(law: Any) -> str:
    """Return the name of the weight of the divergence of a law in `infer`."""
    return "length_weight" if is_mask(law) else "kl_weight"
