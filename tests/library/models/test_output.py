"""What of a model's result is f: each choice against torch's own functions, or what is said if it does not fit.

Axes: n examples, t positions, c classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nntk_dist.errors import ArgumentError, ModelError
from nntk_dist.models.output import Output, as_output

N, T, C = 4, 5, 3
LOGITS = torch.randn(N, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([5, 1, 3, 2])
MASK = (torch.arange(T) < LENGTHS[:, None]).long()
LABELS = torch.tensor([0, 2, 1, 1])


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Result:
    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize("result", [{"a": LABELS, "logits": LOGITS}, Pair(LABELS, LOGITS), Result(None, LOGITS)])
def test_parts_by_name_and_by_place(result):
    name = "second" if isinstance(result, Pair) else "logits"
    assert torch.equal(as_output(name).of(result, {}), LOGITS)
    assert torch.equal(as_output(-1).of(result, {}), LOGITS)


def test_positions_with_and_without_a_mask():
    assert torch.equal(as_output("last").of(LOGITS, {}), LOGITS[:, -1])
    assert torch.equal(as_output("all").of(LOGITS, {}), LOGITS.reshape(N, T * C))
    assert torch.equal(as_output({"position": 2}).of(LOGITS, {}), LOGITS[:, 2])
    assert torch.allclose(as_output("mean").of(LOGITS, {}), LOGITS.mean(1))
    parts = {"attention_mask": MASK}
    rows = range(N)
    last, mean = (as_output(word).of(LOGITS, parts) for word in ("last", "mean"))
    assert torch.equal(last, torch.stack([LOGITS[i, LENGTHS[i] - 1] for i in rows]))
    assert torch.allclose(mean, torch.stack([LOGITS[i, : LENGTHS[i]].mean(0) for i in rows]))


def test_classes_after_a_position():
    chosen = as_output({"position": "last", "classes": [2, 0]}).of(LOGITS, {})
    assert torch.equal(chosen, LOGITS[:, -1, [2, 0]])
    assert torch.equal(as_output({"position": 0, "classes": 1}).of(LOGITS, {}), LOGITS[:, 0, [1]])


def test_losses_are_torchs_of_each_example():
    loss = as_output("loss")
    expected = cross_entropy(LOGITS[:, 0], LABELS, reduction="none")
    assert torch.allclose(loss.of(LOGITS[:, 0], {}, LABELS), expected)
    tokens = torch.where(MASK.bool(), LABELS[:, None], -100)
    each = [cross_entropy(LOGITS[i], tokens[i]) for i in range(N)]  # ignores -100
    assert torch.allclose(loss.of(LOGITS, {}, tokens), torch.stack(each))
    targets = torch.zeros(N, C, dtype=torch.float64)
    assert torch.allclose(loss.of(LOGITS[:, 0], {}, targets), 0.5 * LOGITS[:, 0].square().sum(1))


def test_the_loss_of_the_next_token():
    ids = torch.randint(0, C, (N, T), generator=torch.Generator().manual_seed(1))
    output = as_output("next_token_loss")
    expected = torch.stack([cross_entropy(LOGITS[i, :-1], ids[i, 1:]) for i in range(N)])
    assert torch.allclose(output.of(LOGITS, {"input_ids": ids}), expected)
    assert torch.allclose(output.of(LOGITS, {}, ids), expected)
    long = LENGTHS > 1
    masked = output.of(LOGITS, {"input_ids": ids, "attention_mask": MASK})
    each = [cross_entropy(LOGITS[i, : n - 1], ids[i, 1:n]) for i, n in enumerate(LENGTHS.tolist()) if n > 1]
    assert torch.allclose(masked[long], torch.stack(each))
    assert torch.equal(masked[~long], torch.zeros(1, dtype=torch.float64))


def test_the_margin_is_the_log_odds_of_the_label():
    share = LOGITS[:, 0].softmax(1)[torch.arange(N), LABELS]
    assert torch.allclose(as_output("margin").of(LOGITS[:, 0], {}, LABELS), (share / (1 - share)).log())


def test_functions_of_the_result_and_of_the_parts():
    assert torch.equal(as_output(lambda result: result[:, 0]).of(LOGITS, {}), LOGITS[:, 0])
    weighted = as_output(lambda result, parts: result[:, 0] * parts["w"][:, None])
    assert torch.equal(weighted.of(LOGITS, {"w": LABELS.double()}), LOGITS[:, 0] * LABELS[:, None])
    assert as_output("python:torch:flatten").function == "python:torch:flatten"


@pytest.mark.parametrize(
    ("output", "result", "message"),
    [
        ("logit", {"logits": LOGITS}, r"output.part is 'logit', but the model returned a dict with logits \(4, 5, 3\)"),
        (3, (LOGITS, None), r"output.part is 3, but the model returned a tuple with 0 \(4, 5, 3\), 1 \(NoneType\)"),
        ("logits", LOGITS, "output.part is 'logits', but the model returned a Tensor; leave it out"),
        (None, {"logits": LOGITS}, r"returned a dict with logits .*Choose a part with the argument output"),
        ("last", LOGITS[:, 0], r"output.position is 'last', but the result has shape \(4, 3\)"),
        ({"position": 9}, LOGITS, "output.position is 9; allowed: one of 5 positions"),
        ({"classes": 3}, LOGITS[:, 0], "output.classes holds 3; allowed: 0 to 2"),
        ("next_token_loss", LOGITS, "no part of the examples holds a whole number for each of its positions"),
    ],
)
def test_results_that_do_not_fit(output, result, message):
    with pytest.raises(ModelError, match=message):
        as_output(output).of(result, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"token": "last"}, "a key of output is 'token'; allowed: part, position, classes, measure, function"),
        ({"position": "lst"}, "output.position is 'lst'; allowed: last, mean, all or an index"),
        ({"measure": "los"}, r"output.measure is 'los'; allowed: loss, next_token_loss, margin; did you mean 'loss'\?"),
        ({"function": 3}, r"output.function is 3; allowed: a function \(result\)"),
        ({"function": len, "part": "a"}, "output.function replaces all other options of output; leave out output.part"),
        (1.5, "output is 1.5; allowed: a key or an index of the model's result, loss, next_token_loss, margin, last"),
    ],
)
def test_values_that_are_refused(value, message):
    with pytest.raises(ArgumentError, match=message):
        as_output(value)


def test_measures_that_lack_labels_or_get_others():
    with pytest.raises(ArgumentError, match="output is loss, which compares with labels; give the examples"):
        Output(measure="loss").of(LOGITS, {})
    with pytest.raises(ModelError, match=r"output is margin, but the result has shape \(4, 5, 3\) and the labels"):
        Output(measure="margin").of(LOGITS, {}, LABELS)
