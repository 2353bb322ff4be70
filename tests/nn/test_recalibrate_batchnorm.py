"""Statistics of BatchNorm after a cut."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.infer import fit
from pyro_vnd.nn import NestedClassifier, narrow, nest, recalibrate_batchnorm


def small_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    )


def test_statistics_are_those_of_all_rows():
    net, batches = small_net(), [torch.randn(n, 3) + n for n in (5, 9, 2, 20)]
    net[0].eval()
    modes, momenta = [m.training for m in net.modules()], [net[1].momentum, net[5].momentum]
    assert recalibrate_batchnorm(net, [(batch, "labels") for batch in batches]) is net
    hidden = [net[0](batch) for batch in batches]
    torch.testing.assert_close(net[1].running_mean, torch.cat(hidden).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.cat(hidden).var(0))
    # The second norm sees what the first one makes of the batch, without dropout.
    normal = [(h - h.mean(0)) / (h.var(0, correction=0) + net[1].eps).sqrt() for h in hidden]
    second = [net[4]((net[1].weight * h + net[1].bias).relu()) for h in normal]
    torch.testing.assert_close(net[5].running_mean, torch.cat(second).mean(0))
    torch.testing.assert_close(net[5].running_var, torch.cat(second).var(0))
    assert [m.training for m in net.modules()] == modes
    assert [net[1].momentum, net[5].momentum] == momenta
    assert net[1].num_batches_tracked == 4


@pytest.mark.parametrize("sizes", [(18,), (17, 1), (1, 17), (8, 1, 9), (8, 1, 8, 1), (1,) * 18])
def test_single_rows_count_as_others_do(sizes):
    x = torch.randn(18, 3)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    recalibrate_batchnorm(net, iter(x.split(sizes)))
    torch.testing.assert_close(net[1].running_mean, net[0](x).mean(0))
    torch.testing.assert_close(net[1].running_var, net[0](x).var(0))
    recalibrate_batchnorm(net, x, batch_size=17)
    torch.testing.assert_close(net[1].running_var, net[0](x).var(0))


def test_pixels_of_one_image_are_enough_but_not_one_row():
    net, images = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)), torch.randn(5, 1, 4, 4)
    for data in (images, images[:1]):
        recalibrate_batchnorm(net, data, batch_size=2)
        torch.testing.assert_close(net[1].running_mean, net[0](data).mean((0, 2, 3)))
        torch.testing.assert_close(net[1].running_var, net[0](data).transpose(0, 1).flatten(1).var(1))
    with pytest.raises(ValueError, match="recalibrate_batchnorm: argument `data` must have at least 2 rows; it has 1"):
        recalibrate_batchnorm(small_net(), torch.randn(1, 3))


def test_an_empty_loader_and_an_error_leave_the_net_as_it_was():
    net = small_net()
    net(torch.randn(20, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="`data` has no batches"):
        recalibrate_batchnorm(net, [])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(net, [torch.zeros(5, 4)])
    assert all(module.training for module in net.modules())
    assert net[1].momentum == 0.1


def test_a_net_without_batchnorm_is_returned():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert recalibrate_batchnorm(net, []) is net


def test_norms_without_statistics_are_passed_over():
    net, x = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)), torch.randn(9, 3) * 5
    recalibrate_batchnorm(net, x)
    assert net[0].running_mean is None
    torch.testing.assert_close(net[1].running_var, net[0](x).var(0))


def test_recalibration_helps_narrowed_nets_on_digits(digits):
    plain = nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()
    )
    plain.append(nn.Linear(32, 10))
    net = nest(plain, digits.train.images[:2], num_blocks=8, mask_per="batch", prior=None)
    fit(NestedClassifier(net), net.guide, digits.train, num_epochs=15, batch_size=128, lr=0.01, progress=False)
    losses, net = {}, net.eval()
    for width in (0.25, 0.5):
        narrowed = narrow(net, width)
        for name in ("before", "after"):
            losses[width, name] = nn.functional.cross_entropy(narrowed(digits.test.images), digits.test.labels).item()
            recalibrate_batchnorm(narrowed, digits.train, batch_size=128)
    assert losses[0.25, "after"] < losses[0.25, "before"]
    assert losses[0.5, "after"] < losses[0.5, "before"]


def test_data_are_a_tensor_a_tuple_or_batches():
    x, y = torch.randn(30, 3), torch.arange(30)
    start = small_net()
    states = []
    for data in (
        x,
        (x, y),
        iter(x.split(12)),
        [*zip(x.split(12), y.split(12), strict=True)],
        DataLoader(TensorDataset(x, y), 12),
    ):
        net = small_net()
        net.load_state_dict(start.state_dict())
        states.append(recalibrate_batchnorm(net, data, batch_size=12).state_dict())
        assert net[1].num_batches_tracked == 3
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_a_tuple_of_batches_is_not_taken_for_rows():
    for rows in (18, 24):
        batches = torch.randn(rows, 3).split(12)
        for given in (batches, [*batches]):
            with pytest.raises(ValueError, match=r"has 2 tensors like the inputs, rows of shape \(3,\): .*iter\("):
                recalibrate_batchnorm(small_net(), given)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_said_and_changes_nothing(bad):
    net, x = small_net(), torch.randn(30, 3)
    recalibrate_batchnorm(net, x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x[17, 1] = bad
    with pytest.raises(ValueError, match="`data` must be finite; a norm has seen NaN or inf"):
        recalibrate_batchnorm(net, x, batch_size=12)
    with pytest.raises(ValueError, match="at least 2 rows"):
        recalibrate_batchnorm(net, x[:1])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
