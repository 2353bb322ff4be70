"""Lengths of codes at a price or of a mean length: laws by enumeration, value curves by hand, fits and copies."""

import copy
import math
import pickle

import pytest
import torch
from shaken import shaken
from torch.distributions import Normal, kl_divergence

from pyro_vnd.autoencoders import (
    BernoulliLikelihood,
    GaussianLikelihood,
    LinearGaussianVAE,
    OrderedVAE,
    OrderedVQVAE,
    OrderedWAE,
    conv_bodies,
    full_length,
    mlp_bodies,
)
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import Callback, PriceSchedule, distil_lengths, fit

D, K, N, V = 6, 4, 10, 7
PRIOR = OrderedMask(probs=torch.tensor([0.4, 0.3, 0.2, 0.1]))
UNITS = torch.arange(1, K + 1)


def small(**options):
    """Options of a small model whose noise depends on the length."""
    likelihood = GaussianLikelihood(K, "by_length")
    given = {"bodies": mlp_bodies((D,), hidden=(8,)), "prior_lengths": PRIOR, "posterior_lengths": "priced"}
    return given | {"likelihood": likelihood, "tail": "mask"} | options


MAKE = {
    "vae": lambda **options: OrderedVAE((D,), K, **small(**options)),
    "autoregressive": lambda **options: OrderedVAE((D,), K, prior_latents="autoregressive", **small(**options)),
    "bernoulli": lambda **options: OrderedVAE((D,), K, **small(likelihood=BernoulliLikelihood(), **options)),
    "wae": lambda **options: OrderedWAE((D,), K, **small(**options)),
    "tokens": lambda **options: OrderedVQVAE((D,), K, 2, V, **small(**options)),
    "dims": lambda **options: OrderedVQVAE((D,), 3, K, V, ordered="dims", **small(**options)),
    "linear": lambda **options: LinearGaussianVAE(
        (D,), K, noise="by_length", prior_lengths=PRIOR, **{"posterior_lengths": "priced"} | options
    ),
}


def make(name: str, calibrated: bool = True, **options):
    """A model whose parameters and values are not where they start."""
    torch.manual_seed(3)
    model = shaken(MAKE[name](**options), 0.2).double()
    head = model.encoder.value_head
    if head is not None:
        with torch.no_grad():
            head.net[-1].weight += 10 * torch.randn_like(head.net[-1].weight)
        if calibrated:
            x = torch.rand(100, D)
            with torch.no_grad():
                head.calibrate(head(model.value_inputs(x)))
    return model


def mask_law(law) -> OrderedMask:
    return getattr(law, "mask_law", law)


@pytest.mark.parametrize("name", MAKE)
def test_laws_at_a_price_by_enumeration(name: str):
    model, x = make(name), torch.rand(N, D)
    with torch.no_grad():
        values = model.encoder.value_head(model.value_inputs(x))
    prices = torch.linspace(-2.0, 3.0, N)
    for price, temperature in ((0.0, 1.0), (1.5, 1.0), (-1.0, 2.5), (prices, 0.5)):
        by_row = torch.as_tensor(price).expand(N)
        expected = torch.zeros(N, K)
        for n in range(N):
            weights = [
                (p * math.exp(values[n, k - 1] - by_row[n] * k)) ** (1 / temperature)
                for k, p in enumerate(PRIOR.probs.tolist(), 1)
            ]
            expected[n] = torch.tensor([weight / sum(weights) for weight in weights])
        law = model.lengths(x, price=price, temperature=temperature)
        assert law.batch_shape == (N,)
        torch.testing.assert_close(law.probs, expected)
        if temperature == 1:
            torch.testing.assert_close(mask_law(model.encode(x, price=price)).probs, expected)
    torch.testing.assert_close(model.lengths(x).probs, model.lengths(x, price=0.0).probs)
    price = model.encoder.value_head.price_at(2.2)
    torch.testing.assert_close(model.lengths(x, mean_length=2.2).probs, model.lengths(x, price=price).probs)
    law = model.encode(x, mean_length=2.2)
    torch.testing.assert_close(mask_law(law).probs, model.lengths(x, price=price).probs)
    assert not torch.allclose(mask_law(law).probs, model.lengths(x).probs, atol=0.01)


@pytest.mark.parametrize("name", MAKE)
def test_codes_and_images_are_those_of_the_most_probable_lengths(name: str):
    model, x = make(name), torch.rand(N, D)
    for chosen in ({"price": 0.7}, {"mean_length": 2.2}, {"mean_length": 2.5, "exact": 3}, {"exact": K}):
        lengths = model.choose_lengths(x, **chosen)
        if "mean_length" not in chosen:
            assert torch.equal(lengths, model.lengths(x, **chosen).probs.argmax(-1) + 1)
        assert torch.equal(model.embed(x, **chosen), model.embed(x, lengths))
        assert torch.equal(model.reconstruct(x, **chosen), model.reconstruct(x, lengths))
    found = [model.lengths(x, mean_length=m).probs.argmax(-1) for m in (1.5, 2.0, 2.5, 3.0, 3.5)]
    assert max(len(lengths.unique()) for lengths in found) > 1
    assert not torch.equal(model.embed(x, mean_length=2.2), model.embed(x))  # power


@pytest.mark.parametrize("name", MAKE)
def test_value_curves_by_hand(name: str):
    model, x = make(name), torch.rand(N, D)
    curve = model.value_curve(x)
    everything = torch.ones(1, K)
    expected, own_noise = torch.zeros(N, K), torch.zeros(N, K)
    with torch.no_grad():
        for n in range(N):
            image = x[n : n + 1]
            for k in range(1, K + 1):
                mask = (torch.arange(K) < k).to(x)[None]
                code = model.embed(image, k)
                law = model.likelihood.law(model.decoder(code, mask), everything, 1)
                cost = 0.0
                if isinstance(model, OrderedVQVAE):
                    cost = math.log(V) * (k if model.blocks.by_token else 3)
                elif not isinstance(model, OrderedWAE):
                    q = model.encoder(image)
                    prior = model.prior().given(q.loc)
                    for i in range(k):
                        p = Normal(prior.loc.expand(1, K)[:, i], prior.scale.expand(1, K)[:, i])
                        cost = cost + kl_divergence(Normal(q.loc[:, i], q.scale[:, i]), p).item()
                        mixture = prior.densities(q.loc).expand(1, K)[:, i]  # p is the nearest Normal to it
                        cost = cost + (p.log_prob(q.loc[:, i]) - mixture).item()
                expected[n, k - 1] = law.log_prob(image).item() - cost
                own_noise[n, k - 1] = model.likelihood_given(code, mask).log_prob(image).item() - cost
    torch.testing.assert_close(curve, expected)
    assert not curve.requires_grad
    if name != "bernoulli":  # power: under a noise by length it is another curve
        assert (own_noise - curve).abs().max() > 0.01
    torch.testing.assert_close(model.value_curve(x, [1, 3]), expected[:, [0, 2]])


@pytest.mark.parametrize("name", ["vae", "autoregressive", "wae", "tokens", "dims", "linear"])
def test_as_many_decoded_lengths_as_there_are_make_the_exact_law(name: str):
    model, x = make(name), torch.rand(N, D)
    exact = OrderedMask(logits=model.value_curve(x) + PRIOR.logits)
    for number in (K, K + 5):
        torch.testing.assert_close(model.lengths(x, exact=number).probs, exact.probs)
        torch.testing.assert_close(model.lengths(x, exact=number, price=1.3).probs, exact.tilt(1.3).probs)
        law = model.lengths(x, exact=number, mean_length=2.3)
        assert law.mean_length.mean().item() == pytest.approx(2.3)
        torch.testing.assert_close(law.probs, exact.at_mean_length(2.3, shared=True).probs)
    fewer = model.lengths(x, exact=2)  # the ends, and lines over the logarithm between them
    ends = model.value_curve(x, [1, K])
    share = UNITS.log() / math.log(K)
    lines = OrderedMask(logits=ends[:, :1] * (1 - share) + ends[:, 1:] * share + PRIOR.logits)
    torch.testing.assert_close(fewer.probs, lines.probs)
    assert not torch.allclose(fewer.probs, exact.probs, atol=1e-3)


@pytest.mark.parametrize("source", ["prior", "global", "amortised"])
def test_other_models_have_prices_once_they_are_distilled(source: str):
    model, x = make("vae", posterior_lengths=source), torch.rand(40, D)
    before = model.lengths(x).probs
    assert model.lengths(x, exact=K, mean_length=2.0).mean_length.mean().item() == pytest.approx(2.0)
    distil_lengths(model, x, num_steps=20, progress=False)
    assert torch.equal(model.lengths(x).probs, before)  # with no price it is the law that was learned
    assert model.lengths(x, mean_length=2.0).mean_length.mean().item() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(model.guide.encoder(x).length_probs, before)


def test_asking_changes_nothing_in_training_mode_either():
    for name in ("vae", "tokens"):
        model, x = make(name), 5 * torch.rand(N, D) + 3
        model.train()
        before = copy.deepcopy(model.state_dict())
        first = model.lengths(x, price=1.0).probs
        model.reconstruct(x, mean_length=2.0)
        model.embed(x, 2)
        model.encode(x)
        model.value_curve(x)
        assert torch.equal(model.lengths(x, price=1.0).probs, first)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert model.encoder.value_head.training
        model.guide(x)  # in a fit this is what the head learns from
        assert not torch.equal(model.encoder.value_head.loc, before["encoder.value_head.loc"])


X = torch.rand(N, D, dtype=torch.float64)
BAD = {
    "price and mean": (lambda m: m.lengths(X, price=1.0, mean_length=2.0), "OrderedVAE.lengths: give one of price, m"),
    "exact, both": (
        lambda m: m.lengths(X, price=1.0, mean_length=2.0, exact=3),
        "OrderedVAE.lengths: give one of price",
    ),
    "encode": (lambda m: m.encode(X, 2, price=1.0), "OrderedVAE.encode: give one of length, price, mean_length; got l"),
    "embed": (lambda m: m.embed(X, 2, mean_length=2.0), "OrderedVAE.embed: give one of length, price, mean_length"),
    "reconstruct": (lambda m: m.reconstruct(X, 2, exact=3), "OrderedVAE.reconstruct: give one of length, exact; got"),
    "decodes": (lambda m: m.lengths(X, exact=0), "OrderedVAE.lengths: argument `exact` must be an integer >= 1; got 0"),
    "temperature": (lambda m: m.lengths(X, temperature=0.0), "`temperature` must be finite and > 0; got 0.0"),
    "infinite": (lambda m: m.lengths(X, price=math.inf), "argument `price`"),
    "prices": (
        lambda m: m.lengths(X, price=torch.zeros(3)),
        "argument `price` must be one number, or one for each of 10 images; got shape .3,.",
    ),
    "mean": (lambda m: m.lengths(X, mean_length=K), f"`mean_length` must be strictly between 1 and {K}; got {K}"),
    "exact mean": (lambda m: m.lengths(X, mean_length=0.5, exact=3), "argument `mean_length`"),
    "no lengths": (
        lambda m: m.value_curve(X, []),
        "OrderedVAE.value_curve: argument `lengths` must be integers from 1",
    ),
    "too long": (lambda m: m.value_curve(X, [1, K + 1]), rf"from 1 to {K}; got \[1, {K + 1}\]"),
    "half": (lambda m: m.value_curve(X, [1.5]), rf"from 1 to {K}; got \[1.5\]"),
    "images": (lambda m: m.value_curve(X[:, :3]), "argument `x`"),
    "inputs": (lambda m: m.value_inputs(X[:, :3]), "argument `x`"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case: str):
    call, message = BAD[case]
    model = make("vae")
    with pytest.raises(ValueError, match=message):
        call(model)


def test_models_that_do_not_know_their_values_say_what_to_do():
    for call in (
        lambda m: m.encode(X, price=1.0),
        lambda m: m.lengths(X, mean_length=2.0),
        lambda m: m.reconstruct(X, mean_length=2.0),
        lambda m: m.embed(X, price=2.0),
    ):
        for name in ("vae", "tokens"):
            with pytest.raises(ValueError, match=r"need a model that knows what lengths are worth: .*`distil_lengths"):
                call(make(name, posterior_lengths="amortised"))
    with pytest.raises(ValueError, match="needs a price, which is not known yet"):
        make("vae", calibrated=False).encode(X, mean_length=2.0)
    zeros = OrderedMask(probs=torch.tensor([0.0, 0.3, 0.3, 0.4]))
    model = make("vae", prior_lengths=zeros, posterior_lengths="prior")
    with pytest.raises(ValueError, match="`prior_lengths` gives some lengths no probability: there is no choosing"):
        model.lengths(X, exact=3)
    with pytest.raises(ValueError, match="would have an infinite KL"):
        OrderedVAE((D,), K, prior_lengths=zeros, posterior_lengths="priced")
    with pytest.raises(ValueError, match="`enumerate_lengths` needs another posterior_lengths than 'priced'"):
        OrderedVAE((D,), K, enumerate_lengths=True, posterior_lengths="priced")


@pytest.mark.parametrize("name", ["vae", "tokens"])
def test_a_budget_holds_for_the_codes_that_one_gets(name: str):
    model = make(name)
    x = torch.rand(100, D)
    with torch.no_grad():
        model.encoder.value_head.calibrate(model.encoder.value_head(model.value_inputs(x)))
    off = []
    for mean in (1.5, 2.2, 3.0, 3.5):
        for exact in (None, K):
            chosen = model.choose_lengths(x, mean_length=mean, exact=exact).double()
            assert chosen.mean().item() == pytest.approx(mean, abs=0.1), (mean, exact)
            by_law = model.lengths(x, mean_length=mean, exact=exact)
            assert by_law.mean_length.mean().item() == pytest.approx(mean, rel=0.01)
            off.append(abs((by_law.logits.argmax(-1) + 1).double().mean().item() - mean))
    assert max(off) > 0.1  # the most probable lengths of these laws are others
    with pytest.raises(ValueError, match="`mean_length` must be a number from 1 to 4; got 9"):
        model.choose_lengths(x, mean_length=9, exact=K)


def test_a_fit_that_does_not_train_the_head_makes_it_forget(images):
    torch.manual_seed(0)
    x = images[:200]
    vae = OrderedVAE((1, 8, 8), K, bodies=mlp_bodies((1, 8, 8), hidden=(16,)))
    how = {"num_epochs": 2, "batch_size": 50, "progress": False}
    fit(vae, vae.guide, x, **how)
    distil_lengths(vae, x, num_steps=50, progress=False)
    assert vae.lengths(x, mean_length=2.0).mean_length.mean().item() == pytest.approx(2, abs=0.2)
    fit(vae, vae.guide, x, **how)
    for asked in ({"mean_length": 2.0}, {"price": 1.0}):
        with pytest.raises(ValueError, match=r"call `distil_lengths\(model, data\)` after a fit, and again after"):
            vae.reconstruct(x, **asked)
    distil_lengths(vae, x, num_steps=50, progress=False)
    assert vae.lengths(x, mean_length=2.0).mean_length.mean().item() == pytest.approx(2, abs=0.2)


def test_where_only_whole_codes_are_possible_there_is_no_length_to_choose():
    vae = OrderedVAE((D,), K, prior_lengths=full_length(K), posterior_lengths="prior")
    with pytest.raises(ValueError, match="OrderedVAE: argument `prior_lengths` gives some lengths no probability"):
        distil_lengths(vae, torch.rand(30, D), progress=False)
    assert vae.encoder.value_head is None


@pytest.mark.parametrize("name", ["vae", "tokens"])
def test_copies_and_pickles_are_the_same_model(name: str):
    model, x = make(name), torch.rand(N, D)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.lengths(x, mean_length=2.2).probs, model.lengths(x, mean_length=2.2).probs)
        assert torch.equal(again.reconstruct(x, mean_length=2.2), model.reconstruct(x, mean_length=2.2))
        with torch.no_grad():
            again.encoder.value_head.net[-1].bias += torch.arange(K)
        assert not torch.equal(again.lengths(x, price=1.0).probs, model.lengths(x, price=1.0).probs)


def test_weights_of_a_model_with_a_head_load_into_one_without():
    x = torch.rand(40, D)
    model = make("vae", posterior_lengths="prior")
    distil_lengths(model, x, num_steps=20, progress=False)
    again = shaken(make("vae", posterior_lengths="prior"), 1.0)
    plain = again.state_dict()
    again.load_state_dict(model.state_dict())
    head = again.encoder.value_head
    assert head is not None
    assert again.add_value_head() is head
    with pytest.raises(RuntimeError, match=r"Missing key.*value_head"):
        again.load_state_dict(plain)
    assert torch.equal(again.lengths(x, mean_length=2.2).probs, model.lengths(x, mean_length=2.2).probs)
    assert again.lengths(x, mean_length=2.2).probs.dtype == torch.float64


@pytest.mark.parametrize("name", ["vae", "tokens"])
def test_a_fit_that_was_interrupted_ends_at_the_very_same_model(name: str, tmp_path):
    x = torch.rand(60, D)
    options = {"batch_size": 20, "schedule": PriceSchedule(1.0, 50.0), "progress": False, "lr": 0.01}

    def fitted(**more):
        model = make(name, calibrated=False)
        result = fit(model, model.guide, x, **options | more)
        return model, result

    whole, expected = fitted(num_epochs=6)
    path = tmp_path / "fit.pt"

    class Interrupted(Exception):
        pass

    class Interrupt(Callback):
        def on_epoch(self, run):
            if run.epoch == 4:
                raise Interrupted

    with pytest.raises(Interrupted):
        fitted(num_epochs=6, checkpoint=path, callbacks=[Interrupt()])
    assert path.exists()
    resumed, result = fitted(num_epochs=6, checkpoint=path, resume=True)
    assert result.elbo == expected.elbo
    state = resumed.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(state[key], value), key
    assert torch.equal(resumed.lengths(x, mean_length=2.0).probs, whole.lengths(x, mean_length=2.0).probs)
    again, _ = fitted(num_epochs=6, checkpoint=path, resume=True)  # a finished one, whose prices are in the file
    assert torch.equal(again.lengths(x, mean_length=2.0).probs, whole.lengths(x, mean_length=2.0).probs)
    with pytest.raises(ValueError, match="schedule"):
        fitted(num_epochs=6, checkpoint=path, resume=True, schedule=PriceSchedule(1.0, 60.0))


def test_tokens_of_a_priced_length_are_so_many():
    model, x = make("tokens"), torch.rand(N, D)
    lengths = model.choose_lengths(x, mean_length=2.2)
    codes = model.embed(x, mean_length=2.2).unflatten(-1, (K, 2))
    for n, length in enumerate(lengths.tolist()):
        tokens = model.tokens(x[n : n + 1], length)
        assert tokens.shape == (1, length)
        torch.testing.assert_close(codes[n, :length], model.quantiser.codebook[tokens[0]].detach())
        assert not codes[n, length:].any()
        assert model.bits(length) == pytest.approx(length * math.log2(V))
    dims = make("dims")
    assert {dims.bits(k) for k in range(1, K + 1)} == {3 * math.log2(V)}


def test_a_price_beyond_all_values_leaves_one_unit_or_all():
    for name in ("vae", "tokens"):
        model, x = make(name), torch.rand(N, D)
        assert torch.equal(model.lengths(x, price=1e6).mean_length, torch.ones(N))
        assert torch.equal(model.lengths(x, price=-1e6).mean_length, torch.full((N,), float(K)))


@pytest.mark.parametrize("bodies", [mlp_bodies, conv_bodies])
@pytest.mark.parametrize("num_latents", [8, 32, 128])
def test_a_head_costs_a_twentieth_of_the_encoder(bodies, num_latents: int):
    shape = (1, 28, 28)
    vae = OrderedVAE(shape, num_latents, bodies=bodies(shape), posterior_lengths="priced")
    head = sum(p.numel() for p in vae.encoder.value_head.parameters())
    encoder = sum(p.numel() for p in vae.encoder.parameters()) - head
    assert 0.01 < head / encoder <= 0.05


def test_in_single_precision():
    torch.set_default_dtype(torch.float32)  # the fixture puts it back
    model, x = OrderedVAE((D,), 32, posterior_lengths="priced"), torch.rand(200, D)
    fit(model, model.guide, x, num_epochs=3, batch_size=50, schedule=PriceSchedule(), progress=False)
    law = model.eval().lengths(x, mean_length=5.0)
    assert law.probs.dtype == torch.float32
    assert law.mean_length.mean().item() == pytest.approx(5.0, rel=0.01)
