"""What the library logs is printed beside the result of a command."""

import torch
from torch import nn

from nntk_dist.models.builders import build_model
from tests.pipeline.tools import arguments, nntk


def test_how_a_checkpoint_was_made_to_fit_is_printed(tmp_path):
    model = build_model("mlp", {"widths": [32, 32]}, input_shape=(1, 8, 8), num_outputs=10, seed=1)
    path = tmp_path / "trained.pth.tar"
    torch.save({"epoch": 9, "state_dict": nn.DataParallel(model).state_dict()}, path)
    result = nntk(*arguments("plan", tmp_path / "run", f"model.checkpoint={path}"))
    assert result.code == 0
    assert result.err == f"checkpoint '{path}': the prefix 'module.' was removed from all keys\n"
