"""The objective of `fit` as a module, for training loops of other libraries and your own."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vnd._compat import keep_own_params
from pyro_vnd._data import as_arguments, num_rows
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.guides import module_local_params
from pyro_vnd.infer.schedules import KLWeights

__all__ = ["MiniBatchELBO"]


class MiniBatchELBO(nn.Module):
    r"""The negative ELBO of whole data, estimated from a mini-batch, in nats per row.

    What `fit` minimises, as a torch module whose parameters are those of model and guide: for Lightning, Accelerate,
    `DistributedDataParallel` or a loop of your own.

    $$-\frac{1}{B} \sum_{n \in \mathrm{batch}} E_q \left[\log p(x_n, z_n \mid w) - \log q(z_n)\right]
      + \frac{1}{N} \mathrm{KL}(q(w) \| p(w)).$$

    Model and guide are called once when it is made, since guides make their parameters then; they keep to their own
    parameters afterwards, as after a fit.

    Args:
        model: A Pyro model, with a plate over the rows of the data.
        guide: Its guide.
        first_batch: A batch: a tensor, a tuple of tensors, or a mapping from names of arguments to tensors.
        num_data: N, rows of all data.
        elbo: The objective, `NestedELBO()` by default.
        weights: Weights of KLs, numbers.
        plate: Name of the plate over the rows.

    Raises:
        ValueError: If `num_data` is less than the rows of the batch, or a weight is a function: a loop of your own
            knows how far it is, and sets `weights` anew.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> loss = MiniBatchELBO(model, AutoNormal(model), y[:2], num_data=4)
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        >>> loss(y[2:]).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        first_batch: Any,
        *,
        num_data: int,
        elbo: ELBO | None = None,
        weights: KLWeights | None = None,
        plate: str = "data",
    ) -> None:
        super().__init__()
        rows = num_rows(first_batch)
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < rows:
            raise ValueError(
                f"MiniBatchELBO: argument `num_data` must be the number of rows of all data, an integer not below the "
                f"{rows} of `first_batch`; got {num_data!r}"
            )
        objective: Any = NestedELBO() if elbo is None else elbo
        self.elbo: Any = objective(model, guide)
        self.num_data, self.plate, self._mark = num_data, plate, isinstance(objective, NestedELBO)
        self.weights = KLWeights() if weights is None else weights
        args, kwargs = as_arguments(first_batch)
        with module_local_params(model, guide), torch.no_grad():
            self(*args, **kwargs)
        keep_own_params((model, guide))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the estimate from a batch, with its gradient.

        Args:
            *args: What model and guide are called with.
            **kwargs: The same by name.

        Returns:
            A tensor of no dimension.
        """
        if any(map(callable, self.weights)):
            raise ValueError(
                f"MiniBatchELBO: argument `weights` must be numbers; got {self.weights}: set the attribute `weights` "
                "anew as training goes on"
            )
        scale = ScaleToDataset(self.plate, self.num_data, num_rows(kwargs or args), self.weights, mark=self._mark)
        with scale:
            loss: Tensor = self.elbo(*args, **kwargs)
        scale.check()
        return loss / self.num_data
