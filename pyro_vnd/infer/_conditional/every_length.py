"""A function of one combination of lengths, evaluated for many of them."""

import warnings
from collections.abc import Callable

import pyro
import torch
from torch import Tensor

__all__ = ["Way", "evaluate_all", "find_way"]

Values = dict[str, Tensor]
Function = Callable[[Values], Values]
Way = str  # "at once" or "one by one"


def evaluate_all(function: Function, inputs: Values, way: Way) -> Values:
    """Evaluate a function for each entry of the first dimension of its inputs.

    Random numbers that it draws itself are the same for all of them.
    """
    if way == "at once":
        # Checks of values ask for numbers, which there are none of inside.
        with pyro.validation_enabled(False):
            return torch.func.vmap(function, randomness="same")(inputs)
    number = len(next(iter(inputs.values())))
    state = torch.get_rng_state()
    outputs = []
    for i in range(number):
        torch.set_rng_state(state)
        outputs.append(function({name: value[i] for name, value in inputs.items()}))
    return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


@torch.no_grad()
def find_way(function: Function, inputs: Values, max_checked: int = 16) -> Way:
    """Say how a function can be evaluated: at once if it then returns what it returns one by one.

    Args:
        function: The function.
        inputs: Entries to try.
        max_checked: How many of them, evenly spaced.
    """
    number = len(next(iter(inputs.values())))
    rows = torch.linspace(0, number - 1, min(number, max_checked)).round().long()
    some = {name: value[rows.to(value.device)] for name, value in inputs.items()}
    with torch.random.fork_rng([]):
        state = torch.get_rng_state()
        expected = evaluate_all(function, some, "one by one")
        torch.set_rng_state(state)
        try:
            got = evaluate_all(function, some, "at once")
            different = [
                name
                for name in expected
                if not torch.allclose(expected[name], got[name], rtol=1e-3, atol=1e-3, equal_nan=True)
            ]
            reason = "its log-probabilities are then others" if different else ""
        except Exception as error:  # whatever the model does that has no batched form
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if not reason:
        return "at once"
    warnings.warn(
        f"the model is evaluated for one length after another, which takes long, as it cannot be for all of them at "
        f"once by torch.func.vmap: {reason}",
        stacklevel=2,
    )
    return "one by one"
