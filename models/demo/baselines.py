"""What the demo's models are measured against: plain nets, nested dropout, principal components."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.datasets import Dataset, Split
from models.demo.settings import WIDTHS, Settings
from pyro_vnd.diagnostics import classification_metrics
from pyro_vnd.distributions import OrderedMask

LEARNING_RATE = 0.01  # the default of `fit`, which trains ours


class Perceptron(nn.Module):
    """Perceptron of the classifier's shape with plain weights.

    Args:
        sizes: Inputs, units of each hidden layer, classes.
        law: Law of the lengths that training keeps of a hidden layer, drawn for each image: nested dropout.
    """

    def __init__(self, sizes: Sequence[int], law: OrderedMask | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.law = law

    def forward(self, x: Tensor, width: float | None = None) -> Tensor:
        """Return logits, with a share of the hidden units or all of them."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
            if width is not None:
                x = x * (torch.arange(x.shape[-1]) < max(1, round(width * x.shape[-1])))
            elif self.training and self.law is not None:
                x = x * self.law.sample(x.shape[:1]).to(x)
        logits: Tensor = self.layers[-1](x)
        return logits


def classifiers(data: Dataset, settings: Settings, law: OrderedMask, seed: int) -> dict[str, list[dict[str, float]]]:
    """Train plain nets by maximum likelihood in as many steps, of the same batches, as ours, and score them by width.

    Args:
        data: The images.
        settings: Those of our classifier.
        law: Prior of our classifier's lengths, which nested dropout draws from.
        seed: Of initial weights and batches; the caller's random numbers stay as they are.

    Returns:
        By method, a row for each of `WIDTHS`.
    """
    num_inputs, num_classes = data.train.images.shape[-1], len(data.class_names)

    def trained(share: float = 1.0, law: OrderedMask | None = None) -> Perceptron:
        torch.manual_seed(seed)
        hidden = [max(1, round(share * size)) for size in settings.hidden]
        net = Perceptron([num_inputs, *hidden, num_classes], law).to(data.train.images)
        return _train(net, data.train, settings.classifier_epochs, settings.batch_size)

    with torch.random.fork_rng():
        nested, plain = trained(law=law), trained()
        narrow = {width: trained(width) for width in WIDTHS[:-1]} | {WIDTHS[-1]: plain}
    return {
        "nested dropout": [_score(nested, data.test, width) for width in WIDTHS],
        "plain net, cut": [_score(plain, data.test, width) for width in WIDTHS],
        "plain nets, one a width": [_score(narrow[width], data.test) | {"width": width} for width in WIDTHS],
    }


def _train(net: Perceptron, data: Split, num_epochs: int, batch_size: int) -> Perceptron:
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(data.labels)).split(batch_size):
            if len(rows) < batch_size:
                break  # as `fit` does, whose batches are all full
            loss = nn.functional.cross_entropy(net(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def _score(net: Perceptron, data: Split, width: float | None = None) -> dict[str, float]:
    probs = net(data.images, width).softmax(-1)
    return {"width": width or 1.0, **classification_metrics(probs, data.labels)}


def principal_component_errors(train: Tensor, test: Tensor, num_components: int) -> dict[int, float]:
    """Return the mean squared error of a pixel by number of principal components, from none, the mean image, on."""
    centre = train.mean(0)
    components = torch.linalg.svd(train - centre, full_matrices=False).Vh
    centred = test - centre
    errors = {}
    for k in range(num_components + 1):
        kept = components[:k]
        errors[k] = (centred - centred @ kept.T @ kept).square().mean().item()
    return errors
