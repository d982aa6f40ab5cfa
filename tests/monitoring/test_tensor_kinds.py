"""Kinds of layers, from the types and names of modules."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring.tensor_kinds import KINDS, layer_kinds


class Net(nn.Module):
    """One of every kind of layer, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.zeros(3, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.temperature = nn.Parameter(torch.ones(()))
        self.head = weight_norm(nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.wte(x) + self.pos_embed)
        y, _ = self.rnn(self.conv(y.transpose(1, 2)).transpose(1, 2))
        out: Tensor = self.head(y[:, -1]) * self.temperature
        return out


def test_every_kind_of_layer_is_recognized() -> None:
    torch.manual_seed(0)
    f = Objective(Net(), cross_entropy, [(torch.randint(5, (4, 3)), torch.randint(5, (4,)))])
    kinds = layer_kinds(f)
    assert list(kinds) == list(f.slices) and set(kinds.values()) == set(KINDS)
    expected = {
        "wte.weight": "embedding",
        "pos_embed": "embedding",
        "block.self_attn.in_proj_weight": "attention",
        "block.self_attn.in_proj_bias": "bias",
        "block.self_attn.out_proj.weight": "attention",
        "block.linear1.weight": "linear",
        "block.norm1.weight": "gain",
        "block.norm1.bias": "bias",
        "conv.weight": "convolution",
        "rnn.weight_hh_l0": "recurrent",
        "rnn.bias_hh_l0": "bias",
        "temperature": "other",
        "head.bias": "bias",
        "head.parametrizations.weight.original0": "gain",
        "head.parametrizations.weight.original1": "linear",
    }
    assert {name: kinds[name] for name in expected} == expected


def test_names_alone_are_enough_in_a_plain_module() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_q = nn.Parameter(torch.eye(2))
            self.ln_scale = nn.Parameter(torch.ones(2))
            self.w = nn.Parameter(torch.eye(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.attn_q * self.ln_scale) @ self.w

    f = Objective(Plain(), nn.functional.mse_loss, [(torch.randn(4, 2), torch.randn(4, 2))])
    assert layer_kinds(f) == {"attn_q": "attention", "ln_scale": "gain", "w": "linear"}
