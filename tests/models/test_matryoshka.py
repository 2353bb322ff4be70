"""Embeddings that can be cut: their objective against plain torch, their laws, and structure that they have to find."""

import pyro
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from models.matryoshka import MatryoshkaEmbedding, octaves
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import KLWeights, MaskSchedule, NestedELBO, distil_lengths, fit, module_local_params

K, N, SHAPE = 8, 20, (1, 2, 3)


def small(lengths=None):
    torch.manual_seed(0)
    net = MatryoshkaEmbedding(
        SHAPE, 5, K, lengths=lengths, body=nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.SiLU()), num_features=7
    )
    nn.init.normal_(net.log_scale, std=0.1)  # so that it matters
    return net


@pytest.fixture
def data():
    return torch.randn(N, *SHAPE), torch.arange(N) % 5


def loss_by_hand(net, x, y, length):
    """What a classifier of the first numbers loses, in plain torch."""
    embedding = net.head(net.body(x))[:, :length]
    logits = net.log_scale[:length].sum().exp() * embedding @ net.proxies.weight[:, :length].T
    return cross_entropy(logits, y, reduction="sum")


def negative_elbo(net, guide, data):
    with module_local_params(net, guide):
        return NestedELBO()(net, guide)(*data)


# Objective.


@pytest.mark.parametrize("sizes", [[K], [2, 4, 8], [1, 3]])
def test_point_masses_are_the_sum_of_the_losses_at_a_list_of_sizes(data, sizes):
    net = small(OrderedMask(probs=torch.eye(K)[[size - 1 for size in sizes]]))
    expected = sum(loss_by_hand(net, *data, size) for size in sizes)
    torch.testing.assert_close(negative_elbo(net, net.guide, data), expected, rtol=1e-12, atol=0)


def test_pinned_to_full_width_it_is_a_plain_embedding(data):
    plain, ours = small(), small(OrderedMask.uniform(K))
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss_by_hand(plain, *data, K).backward()
        optimizer.step()
    fit(ours, ours.guide, data, num_epochs=5, lr=0.01, schedule=MaskSchedule(0, 0, 1), progress=False)
    for expected, found in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_parameter_has_a_gradient(data):
    net = small()
    guide = net.guide
    negative_elbo(net, guide, data).backward()
    named = [*net.named_parameters(), *guide.named_parameters()]
    assert len(named) == 7
    for name, parameter in named:
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


# Laws.


@pytest.mark.parametrize("num_dims", [1, 2, 3, 6, 64])
def test_each_length_is_in_one_octave(num_dims):
    probs = octaves(num_dims).probs
    owner = (probs > 0).nonzero()
    assert owner[:, 1].sort().values.tolist() == list(range(num_dims))
    for k, octave in enumerate(owner[owner[:, 1].argsort(), 0].tolist(), start=1):
        assert octave == max((k - 1).bit_length() - 1, 0)
    for row in probs:
        (lengths,) = (row > 0).nonzero(as_tuple=True)
        assert (row[lengths] * (lengths + 1)).diff().abs().max() < 1e-12 if len(lengths) > 1 else row.sum() == 1


def test_views_are_drawn_from_their_octaves(data):
    net = small()
    guide = net.guide
    x = torch.zeros(20_000, *SHAPE)
    with module_local_params(net, guide):
        masks = guide(x)["mask"].detach()
    assert masks.shape == (3, len(x), K)
    counts = (masks.sum(-1).long().unsqueeze(-1) == torch.arange(1, K + 1)).sum(1)
    assert (counts[net.length_probs[:, 0] == 0] == 0).all()
    for row, probs in zip(counts, net.length_probs[:, 0], strict=True):
        possible = probs > 0
        assert chisquare(row[possible], len(x) * probs[possible]).pvalue > 0.001
        assert chisquare(row[possible]).pvalue < 1e-10  # lengths of equal probability are told apart
    torch.testing.assert_close(net.length_law.probs, octaves(K).probs.mean(0))


def test_a_law_on_one_size_stays_there(data):
    net = small(OrderedMask(probs=torch.eye(K)[[1, 3]]))
    guide = net.guide
    with pytest.warns(match="collapsed"):
        fit(net, guide, data, num_epochs=20, lr=0.1, progress=False)
    torch.testing.assert_close(guide.laws["mask"].probs[:, 0], torch.eye(K)[[1, 3]], rtol=0, atol=0)


# Cuts.


def test_a_narrowed_net_gives_the_prefix(data):
    net, (x, _) = small(), data
    for length in range(1, K + 1):
        cut = net.narrow(length)
        assert not any(isinstance(part, pyro.nn.PyroModule) for part in cut.modules())
        torch.testing.assert_close(normalize(cut(x), dim=-1), net.embed(x, length))
        torch.testing.assert_close(cut(x), net.head(net.body(x))[:, :length])
        torch.testing.assert_close(net.embed(x, length).norm(dim=-1), torch.ones(N))
    torch.testing.assert_close(net.embed(x), net.embed(x, K))
    before = net.embed(x).detach()
    nn.init.zeros_(cut[1].weight)
    nn.init.zeros_(cut[0][1].weight)
    torch.testing.assert_close(net.embed(x), before)  # weights of its own


def test_values_are_what_prefixes_say_of_labels(data):
    net, (x, y) = small(), data
    curve = net.value_curve(x, y)
    for length in range(1, K + 1):
        torch.testing.assert_close(-curve[:, length - 1].sum(), loss_by_hand(net, x, y, length))
    torch.testing.assert_close(net.value_curve(x, y, lengths=[2, 7]), curve[:, [1, 6]])
    lengths = torch.arange(N) % K + 1
    logits = net.classify(x, lengths).log_softmax(-1).gather(1, y[:, None])
    torch.testing.assert_close(logits, curve.gather(1, lengths[:, None] - 1))


# What is learned.


def planted(num_informative, num_rows=1024):
    """Classes are the signs of the first inputs, of 16; the others are larger, and noise."""
    torch.manual_seed(0)
    x = torch.randn(num_rows, 16)
    signs = torch.randint(2, (num_rows, num_informative))
    x[:, :num_informative] = 2.0 * signs - 1 + 0.2 * x[:, :num_informative]
    return x, signs @ 2 ** torch.arange(num_informative)


def fitted(x, y, num_classes, masks):
    torch.manual_seed(0)
    net = MatryoshkaEmbedding(
        (16,), num_classes, 16, lengths=OrderedMask.geometric(0.1, 16), body=nn.Identity(), num_features=16
    )
    guide = net.guide
    fit(
        net,
        guide,
        [x, y],
        num_epochs=40,
        batch_size=128,
        lr=0.02,
        weights=KLWeights(lengths=0.05),
        schedule=masks,
        progress=False,
    )
    return net, net.length_law


def neighbours_of_the_class(net, x, y, length):
    z = net.embed(x, length).detach()
    similar = (z @ z.T).fill_diagonal_(-2)
    return (y[similar.argmax(-1)] == y).double().mean().item()


@pytest.mark.parametrize("num_informative", [2, 3])
def test_finds_how_many_dimensions_have_the_classes(num_informative):
    """Either is the power test of the other: the law follows the data, where all else is the same."""
    x, y = planted(num_informative)
    net, law = fitted(x, y, 2**num_informative, MaskSchedule())
    assert law.probs.argmax() + 1 == num_informative
    assert law.probs[num_informative - 1] > 0.7
    scores = [neighbours_of_the_class(net, x, y, length) for length in (*range(1, num_informative + 1), 16)]
    assert scores[:-1] == sorted(scores[:-1])
    assert scores[-2] > 0.97
    weights = net.head.weight.detach()[:num_informative]  # the prefix looks at nothing else
    assert weights[:, num_informative:].norm() < 0.2 * weights.norm()


def test_a_plain_embedding_has_no_such_order():
    """The power test: what is asked of a prefix is not to be had without masks."""
    x, y = planted(3)
    plain, _ = fitted(x, y, 8, MaskSchedule(0, 0, 1))
    assert neighbours_of_the_class(plain, x, y, 16) > 0.97
    assert neighbours_of_the_class(plain, x, y, 3) < 0.9


def needed(num_rows, seed):
    """The first bit tells one class from four others, for which the two next ones are needed."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (num_rows, 3), generator=generator)
    x = torch.randn(num_rows, 16, generator=generator) * 0.2
    x[:, :3] += 2.0 * bits - 1
    return x, bits[:, 0] * (1 + bits[:, 1] + 2 * bits[:, 2])


def share_known(net, x, y, lengths):
    return (net.classify(x, lengths).argmax(-1) == y).double().mean().item()


@pytest.mark.parametrize("shuffled", [False, True])
def test_numbers_go_to_the_images_that_need_them(shuffled):
    """The power test: from other images' labels nothing is learned about an image."""
    (x, y), (others, labels) = needed(1000, 0), needed(501, 1)
    net, _ = fitted(x, y, 5, MaskSchedule())
    distil_lengths(net, (x, y.roll(1)) if shuffled else (x, y), num_steps=600, progress=False)
    law = net.lengths(others, mean_length=1.5)
    lengths = law.mode.sum(-1)
    z = net.embed(others, mean_length=1.5)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(501))
    chosen = net.choose_lengths(others, mean_length=1.5)
    assert torch.equal((z != 0).sum(-1), chosen)
    one, two = (share_known(net, others, labels, torch.full((501,), k)) for k in (1, 2))
    assert one < 0.7
    assert two > 0.95
    if shuffled:
        assert share_known(net, others, labels, lengths) < 0.9
    else:
        assert lengths.double().mean() < 1.6
        assert share_known(net, others, labels, lengths) > 0.95


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_dims": 0}, "`num_dims` must be positive; got 0"),
        ({"num_classes": -1}, "`num_classes` must be positive; got -1"),
        ({"lengths": OrderedMask.uniform(7)}, r"argument `lengths` must be an OrderedMask of 8 units .* got Ord"),
        ({"lengths": OrderedMask(probs=torch.ones(2, 3, 8))}, r"of shape \(\) or \(V,\)"),
        ({"lengths": 3}, "got 3"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaEmbedding(**({"image_shape": SHAPE, "num_classes": 5, "num_dims": K} | change))


@pytest.mark.parametrize("length", [0, K + 1, -1, 2.0, True, "3"])
def test_bad_lengths(data, length):
    net = small()
    for call in (lambda: net.embed(data[0], length), lambda: net.narrow(length)):
        with pytest.raises(ValueError, match=f"argument `length` must be an integer from 1 to {K}; got {length!r}"):
            call()


@pytest.mark.parametrize("x", [torch.zeros(6), torch.zeros(N, 6), torch.zeros(N, 1, 3, 2), None])
def test_bad_images(x):
    net = small()
    for call in (net.embed, net):
        with pytest.raises(ValueError, match=r"argument `x` must be images of shape \(N, 1, 2, 3\); got"):
            call(x)
    with pytest.raises(ValueError, match="NaN or inf"):
        net.embed(torch.full((N, *SHAPE), torch.nan))


def test_bad_prices(data):
    net, (x, y) = small(), data
    for call in (net.lengths, net.embed):
        with pytest.raises(ValueError, match=r"call `distil_lengths\(net, \(images, labels\)\)` after the fit"):
            call(x, price=1.0)
    head = net.add_value_head()
    head.calibrate(torch.randn(10, head.num_units))
    with pytest.raises(ValueError, match="give one of `length`, `price` and `mean_length`"):
        net.embed(x, 3, price=1.0)
    with pytest.raises(ValueError, match="give one of `price` and `mean_length`"):
        net.embed(x, price=1.0, mean_length=2.0)
    with pytest.raises(ValueError, match="argument `length` must be an integer from 1 to 8; got 9"):
        net.value_curve(x, y, lengths=[9])


def test_labels_of_another_number(data):
    with pytest.raises(ValueError, match="must be tensors with the same number of rows"):
        fit(small(), small().guide, [data[0], data[1][1:]], progress=False)
