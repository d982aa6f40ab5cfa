"""Kind of layer that each tensor of a network belongs to, from the types and names of its modules."""

import re

from torch import Tensor, nn

from ..autodiff.objective import Objective

KINDS = ("embedding", "attention", "convolution", "recurrent", "linear", "gain", "bias", "other")
"""Kinds in the order in which they are listed: a gain multiplies channels, as in a normalization."""

EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|emb|tok|pos)([._]|$)")
ATTENTION = re.compile(r"attn|attention")
GAIN = re.compile(r"norm|(^|[._])(ln|bn|gn)_?\w?\d*([._]|$)|gain|gamma|scale|original0$|weight_g$")


def layer_kinds(objective: Objective) -> dict[str, str]:
    """The kind of every trainable tensor, one of `KINDS`, in the order of the weights.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    >>> f = Objective(net, nn.functional.mse_loss, [(torch.zeros(4, 2), torch.zeros(4, 3))])
    >>> layer_kinds(f)
    {'0.weight': 'linear', '0.bias': 'bias', '1.weight': 'gain', '1.bias': 'bias'}
    """
    modules = dict(objective.named_modules())
    return {name: _kind(name, tensor, modules) for name, tensor in objective.parameters().items()}


def _kind(name: str, tensor: Tensor, modules: dict[str, nn.Module]) -> str:
    path = name.lower()
    place, _, own = name.partition(".parametrizations.")[0].rpartition(".")
    around = [modules.get(name[: dot.start()]) for dot in re.finditer(r"\.", name)]
    layer = type(modules.get(place, modules.get(""))).__name__
    if "bias" in (own.lower() or path):
        return "bias"
    if isinstance(modules.get(place), nn.Embedding | nn.EmbeddingBag) or EMBEDDING.search(path):
        return "embedding"
    vector = tensor.numel() == max(tensor.shape, default=1)
    if "norm" in layer.lower() or (vector and GAIN.search(path)):
        return "gain"
    if tensor.dim() <= 1:
        return "other"
    if isinstance(modules.get(place), nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if any(ATTENTION.search(type(module).__name__.lower()) for module in around) or ATTENTION.search(path):
        return "attention"
    return "convolution" if "conv" in layer.lower() and tensor.dim() > 2 else "linear"
