"""Models have one guide, which learns with them and stays theirs in copies."""

import copy
import pickle

import pytest
import torch

from models.masked_perceptron import MaskedPerceptron
from models.matryoshka import MatryoshkaEmbedding
from pyro_vnd.infer import fit, module_local_params

N = 20
MODELS = {
    "masked_perceptron": lambda: MaskedPerceptron(6, 3, hidden=(8, 4)),
    "matryoshka": lambda: MatryoshkaEmbedding((6,), 3, num_dims=8),
}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(N, 6), torch.arange(N) % 3


@pytest.mark.parametrize("name", MODELS)
def test_the_guide_is_one_module_and_learns(name: str, data: tuple[torch.Tensor, torch.Tensor]):
    model = MODELS[name]()
    guide = model.guide
    with module_local_params(model, guide):
        guide(*data)
    assert model.guide is guide
    before = {parameter: value.detach().clone() for parameter, value in guide.named_parameters()}
    fit(model, guide, data, num_epochs=2, progress=False)
    assert model.guide is guide
    assert before
    assert all(not torch.equal(value, before[parameter]) for parameter, value in guide.named_parameters())
    if isinstance(model, torch.nn.Module):
        assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies_have_a_guide_of_their_own(name: str, make_copy, data: tuple[torch.Tensor, torch.Tensor]):
    """Fitted or not called yet, and the original's guide goes on working, with batches of another size, too."""
    fitted, new = MODELS[name](), MODELS[name]()
    fit(fitted, fitted.guide, data, num_epochs=1, progress=False)
    assert new.guide is not fitted.guide
    for model in (fitted, new):
        copied = make_copy(model)
        assert copied.guide is not model.guide
        draws = []
        for each in (copied, model):
            torch.manual_seed(0)
            with module_local_params(each, each.guide):
                draws.append(each.guide(*(part[:7] for part in data)))
        for site, value in draws[0].items():
            assert value.shape == draws[1][site].shape
            assert model is new or torch.equal(value, draws[1][site])
        laws = [copy.deepcopy(each.guide.laws) for each in (copied, model)]
        fit(copied, copied.guide, data, num_epochs=1, lr=0.1, progress=False)
        for mask, law in model.guide.laws.items():
            assert torch.equal(law.probs, laws[1][mask].probs)
            assert not torch.equal(copied.guide.laws[mask].probs, laws[0][mask].probs)
