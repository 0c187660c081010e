"""Examples of several parts, arrays of any layout, chosen outputs, frozen parameters.

Axes: n examples, t positions.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.models_people_bring.case import Case, Computed, Given, numbers, tokens

LABELS = torch.tensor([0, 1, 1, 0])
MASK = (torch.arange(5) < torch.tensor([5, 2, 4, 3])[:, None]).long()


class Sum(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * torch.tanh(self.right(b))


class OfOneArgument(Sum):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["a"], batch["b"])


class Language(nn.Module):
    """Logits at every position, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixing, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.embedding(input_ids)
        h = torch.tanh(self.mixing(h + (h * attention_mask[..., None]).cumsum(1)))
        return {"logits": self.head(h), "hidden": h}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def logits(model: nn.Module, i: int) -> Tensor:
    return model(tokens(5, 7)[i : i + 1], MASK[i : i + 1])["logits"][0]


def language(output: object) -> Given:
    x = {"input_ids": tokens(5, 7), "attention_mask": MASK}
    return Given(Language().double(), x, {"output": output})


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    frozen = x.copy()
    frozen.flags.writeable = False
    return {"negative strides": x[:, ::-1].copy()[:, ::-1], "read-only": frozen, "big-endian": x.astype(">f8")}


def array(layout: str) -> Case:
    return Case(
        f"NumPy, {layout}",
        lambda: Given(small(), layouts(numbers(3).numpy())[layout]),
        Computed(lambda m, i: m(numbers(3)[i : i + 1])),
    )


def frozen_part() -> Given:
    model = small()
    model[0].requires_grad_(False)
    return Given(model, numbers(3))


def pair(model: nn.Module, i: int) -> Tensor:
    return Sum.forward(model, numbers(3)[i], numbers(4)[i])


def both() -> tuple[Tensor, Tensor]:
    return numbers(3), numbers(4)


CASES = (
    Case("a tuple of tensors", lambda: Given(Sum().double(), both()), Computed(pair)),
    Case("a dict for keywords", lambda: Given(Sum().double(), dict(zip("ab", both(), strict=True))), Computed(pair)),
    Case("a dict as one argument", lambda: Given(OfOneArgument().double(), dict(zip("ab", both(), strict=True))),
         Computed(pair)),
    *map(array, ("negative strides", "read-only", "big-endian")),
    Case("logits of the last position", lambda: language({"part": "logits", "position": "last"}),
         Computed(lambda m, i: logits(m, i)[MASK[i].sum() - 1])),
    Case("chosen classes of the mean", lambda: language({"part": "logits", "position": "mean", "classes": [3, 1]}),
         Computed(lambda m, i: logits(m, i)[: MASK[i].sum()].mean(0)[[3, 1]])),
    Case("a function of the result", lambda: language(lambda result: result["logits"][:, 1:3].flatten(1)),
         Computed(lambda m, i: logits(m, i)[1:3])),
    Case("loss with labels", lambda: Given(small(), {"input": numbers(3), "labels": LABELS}, {"output": "loss"}),
         Computed(lambda m, i: cross_entropy(m(numbers(3)[i : i + 1]), LABELS[i : i + 1]))),
    Case("frozen parameters", frozen_part, Computed(parameters=("2.weight", "2.bias"))),
    Case("parameters by a pattern", lambda: Given(small(), numbers(3), {"parameters": ["*.weight"]}),
         Computed(parameters=("0.weight", "2.weight"))),
    Case("a single example", lambda: Given(small(), numbers(3)[:1]), Computed(lambda m, i: m(numbers(3)[:1]))),
)  # fmt: skip
