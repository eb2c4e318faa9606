"""The tokens that the policy learns from, where a rollout has two processes."""

import torch

from sapo_trl import Segments
from sapo_trl.rollouts.types import PolicyForward
from sapo_trl.trainer import stages
from tests.testing_utils import sapo_config


class SecondProcess:
    """The second of two processes; the first has more columns."""

    def __init__(self, first: dict[torch.dtype, torch.Tensor]):
        self.first = first

    def gather_padded(self, tensor):
        first = self.first[tensor.dtype]
        padded = torch.nn.functional.pad(tensor, (0, first.size(1) - tensor.size(1)))
        return torch.cat([first, padded])

    def own_rows(self, gathered, rows):
        return gathered[rows:]


def test_a_share_of_all_processes_tokens(tmp_path):
    args = sapo_config(tmp_path, entropy_token_share=0.4, entropy_token_scope="batch")
    mine = torch.tensor([[0.5, 3.0, 1.0], [2.0, 9.0, 9.0]])
    segments = Segments(torch.tensor([[0, 0, 1], [0, -1, -1]]))
    first = torch.tensor([[4.0, 0.1, 0.2, 2.5], [1.5, 9.0, 0.0, 0.0]])
    there = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.int32)
    forward = PolicyForward(torch.zeros(2, 3), mine)
    found, metrics = stages.learned_tokens(
        forward, None, segments, args, SecondProcess({torch.float32: first, torch.int32: there})
    )
    # 4 of the 9 tokens: 4.0, 3.0, 2.5 and 2.0; two of them are here.
    assert found.tolist() == [[False, True, False], [True, False, False]]
    assert [number.item() for number in metrics["policy_mask/share"]] == [2, 4]
