"""Modules that get one row for all examples, such as position embeddings; padding tokens; the language model of GPT-2.

The oracle is a loop of automatic differentiation, one example at a time.

Axes: n examples, t positions.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from tests.oracles.autograd_loop import kernel_by_loop

LENGTH = 4


class Positions(nn.Module):
    """Tokens and positions, a Linear over positions' rows, a readout of the flattened sum."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], *, padding: int | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 3, padding_idx=padding), nn.Embedding(LENGTH, 3)
        self.mixed, self.readout, self.call = nn.Linear(3, 3), nn.Linear(3 * LENGTH, 2), call
        with torch.no_grad():
            self.tokens.weight.normal_()  # the padding token's row too

    def forward(self, ids: Tensor) -> Tensor:
        places = self.call(nn.Sequential(self.places, self.mixed), torch.arange(ids.shape[1]))
        return self.readout(torch.tanh(self.tokens(ids) * places).flatten(1))


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "without an axis of examples": lambda module, places: module(places),
    "with an axis of length 1": lambda module, places: module(places[None]),
    "squeezed": lambda module, places: module(places[None]).squeeze(0),
}
# A repeated row would be used otherwise, or not fit.
OTHER_CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "first row": lambda module, places: module(places[None])[0],
    "another axis before it": lambda module, places: module(places)[None],
}


def sites_of(model: nn.Module, x: Tensor) -> SitePlan:
    prepared = prepare_model(model, dtype=torch.float64, device="cpu")
    return plan_sites(prepared, select_parameters(prepared), x)


def tokens(num_examples: int) -> Tensor:
    return torch.randint(0, 7, (num_examples, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_examples", [1, 3, LENGTH, 6])
@pytest.mark.parametrize("name", [*CALLS, *OTHER_CALLS])
def test_one_row_for_all_examples(name: str, num_examples: int):
    torch.manual_seed(0)
    model, x = Positions({**CALLS, **OTHER_CALLS}[name]).double(), tokens(num_examples)
    plan = sites_of(model, x)
    common = ("places.weight", "mixed.weight", "mixed.bias")
    assert set(plan.whole) == (set(common) if name in OTHER_CALLS else set())
    expected = kernel_by_loop(model, lambda m, i: m(x[i : i + 1]), num_examples)
    torch.testing.assert_close(local_kernel(model, x), expected, rtol=1e-10, atol=1e-12)


def test_the_padding_token_has_no_gradient():
    torch.manual_seed(0)
    model, x = Positions(CALLS["squeezed"], padding=2).double(), tokens(5)
    assert (x == 2).any()
    assert sites_of(model, x).whole == ()
    expected = kernel_by_loop(model, lambda m, i: m(x[i : i + 1]), 5)
    torch.testing.assert_close(local_kernel(model, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("output", [{"measure": "next_token_loss"}, {"position": "last", "classes": [3, 5]}])
def test_every_parameter_of_gpt2_has_a_rule(output):
    from torch.nn.functional import cross_entropy
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 4, "n_head": 2, "vocab_size": 7, "n_positions": 6}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval()
    x = tokens(3)
    kernel = local_kernel(model, {"input_ids": x}, output={"part": "logits", **output})

    def function(model: nn.Module, i: int) -> Tensor:
        logits = model(input_ids=x[i : i + 1]).logits[0]
        return logits[-1, [3, 5]] if "classes" in output else cross_entropy(logits[:-1], x[i, 1:])

    torch.testing.assert_close(kernel, kernel_by_loop(model, function, 3), rtol=1e-10, atol=1e-14)
