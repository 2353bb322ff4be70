"""Whatever is given in place of the numbers of a law is refused by name."""

import pytest
import torch
from odd import NO_NUMBERS, WITHOUT_VALUES

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough, RelaxedOrderedMask

P = torch.tensor([0.2, 0.3, 0.5])
LAW = OrderedMask(probs=P)
COORDINATES = {"loc": torch.zeros(3), "scale": torch.ones(3), "logits": P}
CALLS = {
    "probs": lambda x: OrderedMask(probs=x),
    "logits": lambda x: OrderedMaskStraightThrough(0.5, logits=x),
    "temperature": lambda x: RelaxedOrderedMask(x, logits=P),
    "p": lambda x: OrderedMask.geometric(x, 3),
    "chain_logits": OrderedMask.from_chain_logits,
    "price": LAW.tilt,
    "cost": lambda x: LAW.tilt(1.0, x),
    "mean_length": LAW.at_mean_length,
    "length": LAW.cut,
    "num_units": OrderedMask.uniform,
    "value": LAW.log_prob,
    **{name: lambda x, name=name: NestedNormal(**COORDINATES | {name: x}) for name in ("loc", "scale")},
}
VALUES = {
    "relaxed": RelaxedOrderedMask(torch.tensor(0.5), logits=P),
    "straight through": OrderedMaskStraightThrough(0.5, logits=P),
    "nested": NestedNormal(**COORDINATES),
}
ODD = {name: lambda value=value: value for name, value in NO_NUMBERS.items()}
ODD |= {name: lambda make=make: make(torch.ones(3)) for name, make in WITHOUT_VALUES.items()}
ODD |= {"complex numbers": lambda: P + 0j, "truth": lambda: True}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that nested tensors may change


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("odd", ODD)
def test_arguments(argument, odd):
    with pytest.raises(ValueError, match=f"argument `{argument}`"):
        CALLS[argument](ODD[odd]())


@pytest.mark.parametrize("law", VALUES)
@pytest.mark.parametrize("odd", ODD)
def test_values(law, odd):
    with pytest.raises(ValueError, match="argument `value`"):
        VALUES[law].log_prob(ODD[odd]())


def test_the_mask_of_what_is_no_vector():
    for odd in (None, [1.0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="mask_of: argument `value`"):
            NestedNormal.mask_of(odd)
