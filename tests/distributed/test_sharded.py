"""Two processes that hold a part of the weights each measure what one process with all of them measures.

A transformer is wrapped by FSDP2 (each block, and the rest) or has tensor parallel layers; its batches are uneven.  The
numbers of one process are those of a plain copy, with ``group=None`` and all batches.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sharpscope as ss
from sharpscope.autodiff import own_entries, sharded, whole_vectors
from sharpscope.linalg import (
    Eigenpairs,
    SymmetricOperator,
    density,
    diagonal,
    lanczos,
    largest_eigenpair,
    restricted,
    shifted,
    trace,
)
from sharpscope.measures import Iterate
from sharpscope.measures.row import applied_gradient
from sharpscope.monitoring import AlongStep, BatchSharpness, LossWatch, TensorTable

ROOT = Path(__file__).parents[2]

Batches = list[tuple[Tensor, Tensor]]

sys.path.insert(0, str(ROOT / "tools"))
on_paper = importlib.import_module("on_paper")

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}  # sums in another order, of a few thousand numbers

cross_entropy = nn.functional.cross_entropy


class Block(nn.Module):
    """Attention with two heads, then two layers, each after a LayerNorm."""

    def __init__(self, d: int, wider: int = 2) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, wider * d), nn.Linear(wider * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, 2, -1).transpose(1, 2) for z in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        )
        return x + self.down(nn.functional.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    """Two blocks between an embedding of nine tokens and a head, 2,000 weights."""

    def __init__(self, d: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2).contiguous()


def transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    return Transformer().to(dtype)


def fully(model: Transformer) -> Transformer:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_layer(model: Transformer) -> Transformer:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def batches(rank: int) -> tuple[Batches, Batches]:
    """The batches of all, and those of one process."""
    g = torch.Generator().manual_seed(1)
    found = [tuple(torch.randint(9, (n, 6), generator=g) for _ in "xy") for n in (3, 2, 4)]
    everything = [(x, y) for x, y in found]
    return everything, everything[:2] if rank == 0 else everything[2:]


def off(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return ((a - b).norm() / b.norm()).item()


def wrapped(rank: int) -> dict[str, dict[str, float]]:
    """Errors of measures of wrapped models, relative to those of one process."""
    everything, own = batches(rank)
    found: dict[str, dict[str, float]] = {}
    for name, wrap, data, dtype in (
        ("FSDP", fully, own, torch.float64),
        ("FSDP in float32", fully, own, torch.float32),
        ("tensors", by_layer, everything, torch.float64),  # of which all processes see the same batches
    ):
        f = ss.Objective(wrap(transformer(dtype)), cross_entropy, data, group=dist.group.WORLD)
        one = ss.Objective(transformer(dtype), cross_entropy, everything, group=None)
        w, v = f.weights(), torch.randn(f.size, generator=torch.Generator().manual_seed(2)).to(dtype)
        at, alone = f.at(w), one.at(w)
        found[name] = {
            "weights": off(w, one.weights()),
            "gradient": off(at.grad, alone.grad),
            "product": off(at.hvp(v), alone.hvp(v)),
            "third": off(at.third(v, v), alone.third(v, v)),
        }
        if dtype == torch.float32:
            continue
        left, right = Iterate(f, w), Iterate(one, w)
        groups, truth = left.scale_groups, right.scale_groups
        found[name] |= {
            "sharpness": off(ss.sharpness(f), ss.sharpness(one)),
            "spherical sharpness": off(ss.spherical_sharpness(left), ss.spherical_sharpness(right)),
            "trace": off(trace(ss.hessian(f), rtol=0.2).value, trace(ss.hessian(one), rtol=0.2).value),
            "groups": float(
                not truth.groups
                or {n: i.tolist() for n, i in groups.groups.items()} != {n: i.tolist() for n, i in truth.groups.items()}
            ),
        }
        f.load(1.5 * w)
        found[name]["loaded"] = off(f.weights(), 1.5 * w)
    return found


def toward(g: Tensor, a: SymmetricOperator) -> Eigenpairs:
    """Find the largest eigenvalue alone, from a start that points along a vector."""
    return largest_eigenpair(a, own_entries(a, g), vectors=False, error=1e-5)


def counts(rank: int) -> tuple[int, list[int], int]:
    """Products of a solve, the lengths of what is reduced in it, and the number of weights."""
    f = ss.Objective(fully(transformer()), cross_entropy, batches(rank)[1], group=dist.group.WORLD)
    a, seen = ss.hessian(f), []
    reduce = dist.all_reduce

    def counting(t: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(t.numel())
        return reduce(t, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        found = largest_eigenpair(a, vectors=False)
    return found.num_matvecs, seen, f.size


def solvers(rank: int) -> dict[str, tuple[float, int, int]]:
    """Errors of solvers whose vectors are spread, and their products; then those of one process."""
    everything, own = batches(rank)
    found = {}
    for dtype in BOUNDS:
        f = ss.Objective(transformer(dtype), cross_entropy, own, group=dist.group.WORLD)
        one = ss.Objective(transformer(dtype), cross_entropy, everything, group=None)
        a, b = ss.hessian(f), ss.hessian(one)
        parts = sharded(a, f)
        assert len(parts.like) <= -(-f.size // 2) and parts.size == f.size
        g = f.grad(f.weights())
        assert torch.equal(whole_vectors(parts, own_entries(parts, g)[:, None])[:, 0], g)
        solves: dict[str, Callable[[SymmetricOperator], Eigenpairs]] = {
            "one": lambda a: lanczos(a, 1, seed=3),
            "three": lambda a: lanczos(shifted(a, 0.1), 3),
            "restarted": lambda a: lanczos(a, 2, basis=12),
            "largest": lambda a: largest_eigenpair(a),
            "toward": partial(toward, g),
        }
        for name, solve in solves.items():
            left, right = solve(parts), solve(b)
            found[f"{name} {dtype}"] = off(left.values, right.values), left.num_matvecs, right.num_matvecs
            if left.vectors.shape[1]:
                v = whole_vectors(parts, left.vectors)
                found[f"{name} {dtype}, vector"] = off((v[:, 0] @ right.vectors[:, 0]).abs(), 1.0), 0, 0
        traces = trace(parts, rtol=0.2), trace(b, rtol=0.2)
        found[f"trace {dtype}"] = off(traces[0].value, traces[1].value), traces[0].num_matvecs, traces[1].num_matvecs
    return found


def refused(rank: int) -> dict[str, str]:
    """What is said where a sharded model, or spread vectors, cannot be measured."""
    own = batches(rank)[1]
    f = ss.Objective(fully(transformer()), cross_entropy, own, group=dist.group.WORLD)
    parts = sharded(ss.hessian(f), f)
    few = SymmetricOperator(lambda v: v, torch.ones(1))
    found = {}
    older = type("FullyShardedDataParallel", (Transformer,), {})()  # the real one needs an accelerator
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))
    for name, call in {
        "FSDP1": lambda: ss.Objective(older, cross_entropy, own, group=None),
        "synced": lambda: ss.Objective(synced, nn.functional.mse_loss, own, group=dist.group.WORLD),
        "alone": lambda: ss.Objective(fully(transformer()), cross_entropy, own, group=None),
        "density": lambda: density(parts),
        "diagonal": lambda: diagonal(parts),
        "restricted": lambda: restricted(parts, torch.arange(3)),
        "few": lambda: sharded(few, f),
        "empty": lambda: ss.Objective(fully(transformer()), cross_entropy, [own, []][rank], group=dist.group.WORLD),
    }.items():
        try:
            call()
        except ss.SharpscopeError as error:
            found[name] = str(error)
    return found


def train(
    rank: int, wrap: Callable[[Transformer], Transformer], own: Batches, directory: Path | None = None, **options: Any
) -> tuple[list[Tensor], Any]:
    """Train for eight steps, watched or not: the parts of the weights that are left, and the monitor."""
    model = wrap(transformer())
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    f = ss.Objective(model, cross_entropy, own, group=dist.group.WORLD) if options else None
    monitor = ss.Monitor(f, adam, directory=directory, **options) if f else None
    for i in range(8):
        adam.zero_grad()
        loss = cross_entropy(model(own[0][0]), own[0][1])
        loss.backward()
        adam.step()
        if i == 3:
            with torch.no_grad():
                model(own[0][0])  # leaves FSDP2 with whole weights in the root
        if monitor is not None:
            monitor.step(loss, own[0])
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return [p.detach().clone() for p in [*parts, torch.get_rng_state()]], monitor


def monitors(rank: int) -> dict[str, Any]:
    """Whether training is the same to the bit, the rows, and whether a run without shards has the same."""
    own = batches(rank)[1]
    meters = [AlongStep(2), BatchSharpness(4), LossWatch(2), TensorTable(2)]
    plain, _ = train(rank, fully, own)
    with TemporaryDirectory() as name, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left, monitor = train(rank, fully, own, Path(name), every=2, meters=meters)
        if rank == 0:
            monitor.report(Path(name, "report.html"))
        text = [str(w.message) for w in caught if "FSDP2-wrapped" not in str(w.message)]
    gradient = applied_gradient(monitor.objective.parameters().values())
    squares = sum(p.grad.full_tensor().square().sum() for p in monitor.objective.parameters().values())
    return {
        "same": all(torch.equal(a, b) for a, b in zip(plain, left, strict=True)),
        "rows": monitor.history.rows,
        "warnings": text,
        "gradient": off(gradient, squares.sqrt()),
    }


CHECKS = (wrapped, counts, solvers, refused, monitors)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(2, tmp_path_factory.mktemp("two"), *CHECKS)


def test_wrapped_models_are_measured_as_plain_ones(found: dict[str, list[Any]]) -> None:
    for own in found["wrapped"]:
        assert own.keys() == {"FSDP", "FSDP in float32", "tensors"}
        for name, errors in own.items():
            bound = BOUNDS[torch.float32 if "float32" in name else torch.float64]
            for what, error in errors.items():
                assert error <= bound, (name, what, error)


def test_solvers_with_spread_vectors_find_the_same_with_the_same_number_of_products(
    found: dict[str, list[Any]],
) -> None:
    assert found["solvers"][0].keys() == found["solvers"][1].keys()
    for own in found["solvers"]:
        for name, (error, several, one) in own.items():
            single = "float32" in name
            assert error <= (1e-5 if single else 1e-9), (name, error)  # residuals of 1e-4 are where they were
            assert abs(several - one) <= (one // 10 if single else 0), name  # rounding may decide the last product


def test_messages_of_a_solve_are_those_on_paper(found: dict[str, list[Any]]) -> None:
    for products, lengths, size in found["counts"]:
        assert len(lengths) == on_paper.messages(products)
        assert set(lengths) == {size + 3}


def test_the_graph_on_paper_is_that_of_a_transformer() -> None:
    """But for embeddings, the head and the loss: 70 numbers for each token, as many as a fiftieth of a layer here."""
    model = on_paper.Model(width=64, layers=2, heads=2, length=32)
    blocks = nn.Sequential(*(Block(model.width, 4) for _ in range(model.layers)))
    x = torch.randn(1, model.length, model.width)
    f = ss.Objective(blocks, lambda out, _: out.square().mean(), [(x, x)])
    assert f.size == pytest.approx(model.parameters, rel=0.03)  # and biases
    assert f.graph_bytes_per_example == pytest.approx(on_paper.FLOAT * on_paper.graph_numbers(model), rel=0.02)


def test_the_page_has_the_table_on_paper() -> None:
    page = (ROOT / "docs/from-a-laptop-to-a-cluster.md").read_text(encoding="utf-8")
    assert on_paper.table(on_paper.Machine(), *on_paper.MODELS) in page
    large = on_paper.cost(on_paper.MODELS[-1], on_paper.Machine())
    assert large.bytes_of_training + large.bytes_of_vectors + large.bytes_of_graph < on_paper.Machine().bytes_of_memory


def test_what_cannot_be_measured_is_one_sentence(found: dict[str, list[Any]]) -> None:
    for rank, own in enumerate(found["refused"]):
        assert own["FSDP1"].startswith("the model is sharded over processes (FullyShardedDataParallel): only those of")
        assert "get_model_state_dict" in own["FSDP1"]
        assert own["synced"].startswith("the model averages over processes (SyncBatchNorm)")
        assert "sharded over processes, which have to measure together" in own["alone"]
        for name in ("density", "diagonal", "restricted"):
            assert own[name].startswith("the vectors of this operator are spread over processes"), name
        assert "too few for 2 processes" in own["few"]
        assert ("process 1 failed: " * (rank == 0)) in own["empty"] and "hold no batch" in own["empty"]


def test_a_watched_training_with_FSDP_is_the_same_to_the_bit(found: dict[str, list[Any]]) -> None:
    first, second = found["monitors"]
    assert first["same"] and second["same"]
    assert first["warnings"] == second["warnings"] == []
    assert first["rows"] == second["rows"]
    assert first["gradient"] <= 1e-12
    rows = [row for row in first["rows"] if row.get("stability_ratio")]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"edge_along_step", "batch_loss", "norm/embed.weight"} <= {key for row in first["rows"] for key in row}
