"""What processes give each other; `torchrun tests/parallel_ranks.py FOLDER` leaves what each of them has."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.shares import shared


def of_this_process():
    """Return what each function gives; the two processes have other seeds, tensors and flags."""
    ranks = Ranks.join(None)
    first = ranks.rank == 0
    torch.manual_seed(10 + ranks.rank)
    own = torch.Generator().manual_seed(20 + ranks.rank)
    with ranks.alike():
        alike = torch.rand(3)
    with ranks.alike(own):
        alike_by = torch.rand(3, generator=own)
    found = {
        "place": (ranks.rank, ranks.size, ranks.is_first),
        "alike": (alike, torch.rand(3)),
        "alike_by": (alike_by, torch.rand(3, generator=own)),
        "share": ranks.share(torch.arange(5)),
        "same": (ranks.same(torch.tensor([1.5 if first else 7.0])), ranks.same(torch.tensor([first, not first]))),
        "sum": ranks.sum(torch.tensor([1.0, 2.0 + ranks.rank])),
        "all": [ranks.all(flag) for flag in (True, first, not first, False)],
        "any": [ranks.any(flag) for flag in (True, first, not first, False)],
        "gather": ranks.gather(("rank", ranks.rank)),
    }
    loaders = {
        "list": [(torch.arange(5),)],
        "loader": DataLoader(torch.arange(5), batch_size=5),
        "distributed": DataLoader(torch.arange(6), batch_size=3, sampler=DistributedSampler(range(6), shuffle=False)),
        "stream": ((torch.arange(5),) for _ in range(1)),
    }
    for name, data in loaders.items():
        batches, *sizes = shared(data, ranks)
        rows = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
        found[name] = [each.tolist() for each in rows], *sizes
    torch.manual_seed(30)
    ranks.draw_apart()
    return found | {"apart": torch.rand(3)}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    found = of_this_process()
    torch.save(found, Path(sys.argv[1]) / f"{found['place'][0]}.pt")
