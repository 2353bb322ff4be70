"""What two processes give each other."""

import pytest
import torch
from processes import ROOT, torchrun

from pyro_vnd.infer._fit.parallel import Ranks


def numbers(seed, count):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    result = torchrun(ROOT / "tests" / "parallel_ranks.py", folder)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_one_process_alone():
    ranks, row = Ranks.join(None), torch.tensor([1.0])
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.share(row) is row
    assert ranks.same(row) is row
    assert ranks.sum(row) is row
    assert [ranks.all(True), ranks.all(False), ranks.any(True), ranks.any(False)] == [True, False, True, False]
    assert ranks.gather("this") == ["this"]
    torch.manual_seed(10)
    ranks.draw_apart()
    with ranks.alike():
        drawn = torch.rand(3)
    torch.testing.assert_close(torch.cat([drawn, torch.rand(3)]), numbers(10, 6), rtol=0, atol=0)


def test_what_is_exchanged(found):
    assert [each["place"] for each in found] == [(0, 2, True), (1, 2, False)]
    assert [each["share"].tolist() for each in found] == [[0, 1, 2], [3, 4]]
    for each in found:
        assert [value.tolist() for value in each["same"]] == [[1.5], [True, False]]
        assert each["same"][1].dtype == torch.bool
        assert each["sum"].tolist() == [2.0, 5.0]
        assert each["all"] == [True, False, False, False]
        assert each["any"] == [True, True, True, False]
        assert each["gather"] == [("rank", 0), ("rank", 1)]


def test_batches_of_each_process(found):
    """Rows; whether sizes were for all processes together; and whether all have equally many batches for certain."""
    halves, whole = ([[0, 1, 2]], [[3, 4]]), [[0, 1, 2, 3, 4]]
    for rank, each in enumerate(found):
        assert each["list"] == (halves[rank], True, True)
        assert each["loader"] == (halves[rank], True, True)
        assert each["distributed"] == ([[rank, rank + 2, rank + 4]], False, True)
        assert each["stream"] == (whole, False, False)


def test_drawing_alike(found):
    """All draw what the first one would draw; the others then go on where they were, but for a generator of a fit."""
    by_first, by_first_of_own = numbers(10, 6), numbers(20, 6)
    for rank, each in enumerate(found):
        afterwards = by_first[3:] if rank == 0 else numbers(11, 3)
        torch.testing.assert_close(torch.cat(each["alike"]), torch.cat([by_first[:3], afterwards]), rtol=0, atol=0)
        torch.testing.assert_close(torch.cat(each["alike_by"]), by_first_of_own, rtol=0, atol=0)


def test_drawing_apart(found):
    first, second = (each["apart"] for each in found)
    torch.testing.assert_close(first, numbers(30, 3), rtol=0, atol=0)
    assert not {*first.tolist()} & {*second.tolist()}
