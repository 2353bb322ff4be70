"""Training on several processes: each has the same nested net and its share of every batch.

    torchrun --standalone --nproc_per_node 2 -m models.data_parallel --out FOLDER

Every process writes the net that it ends with, rank0.pt and so on, and the first one elbo.json. By itself, as in
`python -m models.data_parallel --out FOLDER`, the program trains on one process.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from models.datasets import load
from models.nets import mlp
from pyro_vnd.infer import NestedELBO, module_local_params
from pyro_vnd.nn import NestedNet, nest


class Classifier(PyroModule):
    """A nested net as the model of labels; the plate has the size of the data whatever the share of a process is."""

    def __init__(self, net: NestedNet, num_data: int) -> None:
        super().__init__()
        self.net, self.num_data = net, num_data

    def rows(self, x: Tensor) -> pyro.plate:
        """Return the plate of the data, with a batch in it."""
        return pyro.plate("data", self.num_data, subsample=torch.arange(len(x)))

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Run the model."""
        rows = self.rows(x)
        logits = self.net(x, plate=rows)
        with rows:
            pyro.sample("label", dist.Categorical(logits=logits), obs=y)


class Guide(PyroModule):
    """The guide of its net, in the same plate."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.guide = model, model.net.guide

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Draw masks and weights."""
        self.guide(x, plate=self.model.rows(x))


def train(num_epochs: int, batch_size: int = 128, seed: int = 0) -> tuple[NestedNet, float]:
    """Train on the digits, on as many processes as there are.

    Args:
        num_epochs: Passes over the training part.
        batch_size: Rows of a step, of all processes together.
        seed: Seed of the weights, the order of the rows and the draws.

    Returns:
        The net, and its ELBO afterwards in nats per row: the mean of ten evaluations on all training rows.
    """
    parallel = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if parallel else 0
    num_processes = torch.distributed.get_world_size() if parallel else 1
    data = load("digits", flatten=True).train
    torch.manual_seed(seed)  # the same net in every process
    net = nest(mlp(64, hidden=(64,)), data.images[:1], num_blocks=16, prior=None)  # only masks are random
    model = Classifier(net, len(data.labels))
    with module_local_params(model):
        objective: nn.Module = NestedELBO()(model, Guide(model))
        objective(*(part[:2] for part in data))  # makes what is made in a first call, such as autoguides
        wrapped = DistributedDataParallel(objective) if parallel else objective
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        torch.manual_seed(seed + 1 + rank)  # from here on each draws its own masks and weights
        rows, share = TensorDataset(*data), batch_size // num_processes
        sampler: DistributedSampler[Any] = DistributedSampler(rows, num_processes, rank, seed=seed, drop_last=True)
        loader = DataLoader(rows, share, sampler=sampler, drop_last=True)
        for epoch in range(num_epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                optimizer.zero_grad()
                (wrapped(*batch) / model.num_data).backward()  # gradients are averaged over the processes
                optimizer.step()
        with torch.no_grad():
            loss = sum(objective(*data).item() for _ in range(10)) / 10
    return net, -loss / model.num_data


def main(argv: list[str] | None = None) -> None:
    """Train, and write what came out."""
    parser = argparse.ArgumentParser(prog="models.data_parallel", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that exists")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(argv)
    if "RANK" in os.environ:  # torchrun sets it, and where the processes meet
        torch.distributed.init_process_group("gloo")
    net, elbo = train(args.epochs)
    rank = os.environ.get("RANK", "0")
    torch.save(net.state_dict(), args.out / f"rank{rank}.pt")
    if rank == "0":
        (args.out / "elbo.json").write_text(json.dumps(elbo))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
