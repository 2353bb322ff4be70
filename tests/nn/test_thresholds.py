"""Thresholds are those of the least loss at a mean cost."""

from itertools import product

import pytest
import torch

from pyro_vnd.nn.thresholds import best_thresholds, last_stage


def problem(seed: int, stages: int, num_rows: int):
    """Rows that are hard at each width to their own degree; doubt is loss with noise, as it is of a net."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(num_rows, generator=generator)
    width = torch.arange(1.0, stages + 1)[:, None]
    losses = hard ** (width * (0.5 + torch.rand(num_rows, generator=generator)))
    doubts = losses[:-1] * (0.1 * torch.randn(stages - 1, num_rows, generator=generator)).exp()
    costs = 1 + 3 * torch.rand(stages, generator=generator)
    return doubts, losses, costs


def outcome(doubts, losses, costs, thresholds) -> tuple[float, float]:
    """Mean loss and mean cost."""
    stop = last_stage(doubts, thresholds)
    return losses.gather(0, stop[None]).mean().item(), costs.cumsum(0)[stop].mean().item()


def best_of_all(doubts, losses, costs, mean_cost) -> float:
    """Least loss over all thresholds between rows, two at a time."""
    tried = [torch.cat([each.sort().values + 1e-9, torch.zeros(1)]) for each in doubts]
    found = (outcome(doubts, losses, costs, torch.stack(pair)) for pair in product(*tried))
    return min(loss for loss, cost in found if cost <= mean_cost)


@pytest.mark.parametrize("seed", range(5))
def test_no_thresholds_are_much_better(seed):
    doubts, losses, costs = problem(seed, 3, 30)
    for share in (0.2, 0.5, 0.8):
        mean_cost = (costs[0] + share * costs[1:].sum()).item()
        loss, cost = outcome(doubts, losses, costs, best_thresholds(doubts, losses, costs, mean_cost))
        best = best_of_all(doubts, losses, costs, mean_cost)
        alone = outcome(doubts, losses, costs, torch.full((2,), torch.inf))[0]
        assert cost <= mean_cost
        assert alone - loss > 0.9 * (alone - best)  # of what there is to gain


def test_one_threshold_for_all_stages_would_be_much_worse():
    lost = []
    for seed in range(5):
        doubts, losses, costs = problem(seed, 3, 30)
        mean_cost = (costs[0] + 0.5 * costs[1:].sum()).item()
        common = [torch.full((2,), value) for value in doubts.flatten().sort().values.tolist()]
        tried = [outcome(doubts, losses, costs, thresholds) for thresholds in common]
        loss = min(loss for loss, cost in tried if cost <= mean_cost)
        best = best_of_all(doubts, losses, costs, mean_cost)
        alone = outcome(doubts, losses, costs, torch.full((2,), torch.inf))[0]
        lost.append((loss - best) / (alone - best))
    assert max(lost) > 0.1  # so that the bound above is one that can be missed


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_the_mean_cost_is_met_within_a_row(stages):
    for seed in range(5):
        doubts, losses, costs = problem(seed, stages, 200)
        for share in (0.0, 0.01, 0.3, 0.7, 0.99, 1.0):
            mean_cost = (costs[0] + share * costs[1:].sum()).item() + 1e-9
            _, cost = outcome(doubts, losses, costs, best_thresholds(doubts, losses, costs, mean_cost))
            assert mean_cost - costs.sum() / 200 <= cost <= mean_cost


def test_of_two_stages_the_rows_in_most_doubt_go_on():
    doubts, losses, costs = problem(0, 2, 50)
    for count in (0, 1, 17, 50):
        thresholds = best_thresholds(doubts, losses, costs, (costs[0] + costs[1] * count / 50).item() + 1e-9)
        gone = last_stage(doubts, thresholds).bool()
        assert gone.sum() == count
        assert torch.equal(gone, doubts[0].argsort(descending=True).argsort() < count)


def test_rows_with_the_same_doubt_go_on_together():
    doubts = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.9]])
    losses, costs = torch.cat([doubts, torch.zeros(1, 5)]), torch.tensor([1.0, 5.0])
    stops = [last_stage(doubts, best_thresholds(doubts, losses, costs, cost)).tolist() for cost in (1.9, 2.0, 4.9, 5.0)]
    assert stops == [[0] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]


def test_what_is_not_worse_narrow_is_paid_for_all_the_same():
    doubts = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    losses = torch.cat([doubts, doubts + 1])  # going on never pays, but the mean cost was asked for
    _, cost = outcome(doubts, losses, torch.tensor([1.0, 1.0]), best_thresholds(doubts, losses, torch.ones(2), 1.5))
    assert cost == pytest.approx(1.5, abs=0.01 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_thresholds_send_on_no_row_more(dtype):
    """In the type in which doubts come, with neighbours that differ by one bit, and rows that are the same."""
    one = torch.tensor(0.7, dtype=dtype)
    doubts = torch.rand(400, dtype=dtype)
    doubts[::7] = 0.3
    doubts[3::11] = torch.nextafter(one, one + 1)
    doubts[4::11] = one
    losses, costs = torch.stack([doubts, 0.5 * doubts]), torch.tensor([1.0, 2.0])
    for mean_cost in torch.linspace(1.01, 2.99, 40).tolist():
        thresholds = best_thresholds(doubts[None], losses, costs, mean_cost)
        assert thresholds.dtype == dtype
        going = doubts >= thresholds
        spent = 1 + 2 * going.double().mean().item()
        assert spent <= mean_cost + 1e-12
        if not going.all():
            next_one = doubts == doubts[~going].max()
            assert spent + 2 * next_one.double().mean().item() > mean_cost  # one more doubt would be too dear


def test_all_rows_go_on_where_there_is_enough_for_all():
    """Also those without any doubt, and those that go on to a greater loss."""
    doubts, losses, costs = (
        torch.tensor([[0.0, 0.3, 0.7]]),
        torch.tensor([[0.1, 0.5, 0.9], [0.8, 0.4, 0.2]]),
        torch.ones(2),
    )
    for enough in (2.0, 2.5):
        assert best_thresholds(doubts, losses, costs, enough).tolist() == [0.0]
    assert best_thresholds(doubts, losses, costs, 1.999).item() > 0
