"""A context in which normalization and attention can be differentiated to any order.

Some kernels of torch save intermediate results for their backward pass and treat them as constants when that pass is
itself differentiated.  Derivatives beyond the first then come out silently wrong (second ones of weight normalization,
third ones of layer, instance and train-mode batch normalization), or they are missing (fused attention has no second
derivative).  Inside ``smooth()``
the same formulas run in elementary operations, whose derivatives are right to every order.

    with smooth():
        loss = loss_fn(model(x), y)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import InvalidValue


def _standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Standardize over `dims`, ``(x - mean) / √(var + eps)``."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *(1,) * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channel_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _affine(
        x, None if weight is None else _per_channel(weight, x), None if bias is None else _per_channel(bias, x)
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = range(input.dim() - len(normalized_shape), input.dim())
    return _affine(_standardize(input, tuple(dims), eps), weight, bias)


def _update_running(
    input: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float, dims: tuple[int, ...]
) -> None:
    """Update running averages as the native kernels do: of moments over `dims` (unbiased variance), per channel."""
    with torch.no_grad():
        for running, now in zip((var, mean), torch.var_mean(input, dims), strict=True):
            if running is not None:
                fresh = (now if now.dim() == 1 else now.mean(0)).to(running.dtype)
                running.mul_(1 - momentum).add_(fresh, alpha=momentum)  # lerp_ cannot be batched


def _normalize_channels(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own_statistics: bool,
    momentum: float,
    eps: float,
    dims: tuple[int, ...],
) -> Tensor:
    if own_statistics:
        if mean is not None or var is not None:
            _update_running(input, mean, var, momentum, dims)
        return _channel_affine(_standardize(input, dims, eps), weight, bias)
    if mean is None or var is None:
        raise InvalidValue("normalization in eval mode needs running statistics; this layer keeps none")
    centred = input - _per_channel(mean, input)
    return _channel_affine(centred * _per_channel(torch.rsqrt(var + eps), input), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = (0, *range(2, input.dim()))
    if training and input.shape[1:2].numel() == input.numel():
        raise InvalidValue(
            f"batch normalization in training mode needs more than one value per channel, and a batch of shape"
            f" {tuple(input.shape)} has one; use larger batches, or eval mode"
        )
    return _normalize_channels(input, running_mean, running_var, weight, bias, training, momentum, eps, dims)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(2, input.dim()))
    return _normalize_channels(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, dims)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Give v the norm g, ``g v / ‖v‖``, over all dimensions but `dim` (-1: over all)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    plain = size_average is None and reduce is None and weight is None
    if not plain or input.shape != target.shape or reduction == "none":
        weighted = {} if weight is None else {"weight": weight}  # an argument that early versions do not have
        return F.mse_loss(input, target, size_average, reduce, reduction, **weighted)
    squares = (input - target).square()
    return squares.mean() if reduction == "mean" else squares.sum()


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look rows up; rows beyond `max_norm` are shortened in a copy, not in place, and gradients are dense."""
    if max_norm is not None:
        weight = _shortened(weight, max_norm, norm_type)
    return F.embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Reduce the rows of each bag; the kernel has no second derivative."""
    if per_sample_weights is not None and mode != "sum":
        return F.embedding_bag(input, weight, offsets, mode=mode, per_sample_weights=per_sample_weights)  # says why not
    if offsets is None:
        starts = torch.arange(0, input.numel(), input.shape[-1], device=input.device)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
    index = input.reshape(-1)
    bag = torch.searchsorted(starts, torch.arange(len(index), device=input.device).to(starts), right=True) - 1
    rows = _embedding(index, weight, None, max_norm, norm_type, scale_grad_by_freq)
    kept = torch.ones_like(index, dtype=torch.bool) if padding_idx is None else index != padding_idx % len(weight)
    empty = weight.new_zeros(len(starts), weight.shape[1])
    if mode == "max":
        return empty.scatter_reduce(
            0, bag[kept, None].expand(-1, weight.shape[1]), rows[kept], "amax", include_self=False
        )
    scale = kept.to(rows) if per_sample_weights is None else kept * per_sample_weights.reshape(-1)
    total = empty.index_add(0, bag, rows * scale[:, None])
    return total if mode == "sum" else total / torch.bincount(bag[kept], minlength=len(starts)).clamp(min=1)[:, None]


def _shortened(weight: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Scale the rows that are longer than `max_norm` to that length, as torch's kernel does (with its 1e-7)."""
    norms = torch.linalg.vector_norm(weight, norm_type, dim=1, keepdim=True)
    return weight * torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0)


def _lengths(d: Tensor, p: float) -> Tensor:
    """Norms over the last dimension, with derivatives of zero where d is zero."""
    if math.isinf(p):
        return d.abs().amax(-1)
    powers = (d.square() if p == 2 else d.abs().pow(p)).sum(-1)
    return torch.where(powers > 0, torch.where(powers > 0, powers, 1).pow(1 / p), 0)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _lengths(x1.unsqueeze(-2) - x2.unsqueeze(-3), p) if p > 0 else torch.cdist(x1, x2, p)


def _pdist(input: Tensor, p: float = 2) -> Tensor:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _lengths(input[i] - input[j], p) if p > 0 else torch.pdist(input, p)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    out = F.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows of experts one by one; the kernel knows no double precision."""
    if bias is not None or mat_b.dim() != 3 or (mat_a.dim() == 2) != (offs is not None):
        return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    if offs is None:
        return mat_a @ mat_b
    ends = offs.tolist()
    rows = [mat_a[i:j] @ b for i, j, b in zip([0, *ends], ends, mat_b, strict=False)]
    rest = mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[-1])
    return torch.cat([*rows, rest])


def _with_math_attention(func: Callable[..., Any]) -> Callable[..., Any]:
    """Run `func` on the one attention kernel that is made of elementary operations."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)

    return call


ELEMENTARY: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    torch._weight_norm: _weight_norm,
    **({torch._grouped_mm: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}),  # unknown to early versions
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.hardsigmoid: _hardsigmoid,
    F.mse_loss: _mse_loss,  # whose backward kernel fails in forward mode
    F.scaled_dot_product_attention: _with_math_attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _with_math_attention(F.multi_head_attention_forward),
}
"""One row per kernel that autograd gets wrong or cannot differentiate twice."""


def _same(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _dropping_nothing(func: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Run `func` with its argument ``dropout_p``, the one at `place`, set to zero."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            return func(*args[:place], 0.0, *args[place + 1 :], **kwargs)
        return func(*args, **kwargs | {"dropout_p": 0.0})

    return call


UNDROPPED: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), _same),
    **dict.fromkeys((F.feature_alpha_dropout, torch.dropout, torch.alpha_dropout, torch.feature_dropout), _same),
    F.scaled_dot_product_attention: _dropping_nothing(ELEMENTARY[F.scaled_dot_product_attention], 4),
    F.multi_head_attention_forward: _dropping_nothing(ELEMENTARY[F.multi_head_attention_forward], 10),
}
"""One row per operation that drops at random, without doing so."""


CONVERSIONS: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch.Tensor, name) for name in ("to", "type", "type_as", "float", "half", "bfloat16")
)
"""Operations that convert to a precision."""


NESTS = frozenset((list, tuple))
"""Containers of arguments that are looked into."""


def is_lower(t: Tensor, level: torch.dtype) -> bool:
    """Tell whether a floating point tensor is of lower precision than `level`."""
    size = t.element_size() // 2 if t.is_complex() else t.element_size()
    return (t.is_floating_point() or t.is_complex()) and size < level.itemsize


def _lowers(dtype: Any, level: torch.dtype) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize < level.itemsize


class smooth(TorchFunctionMode):
    """A context in which the operations of `ELEMENTARY` run in differentiable form; everything else is untouched.

    With ``dropout=False`` the operations of `UNDROPPED` drop nothing, whatever mode the modules are in; with
    `lowest` nothing is converted to a precision below it.  `instead` holds tensors by the ids of those in whose place
    they are used, wherever these come from: a closure, a list, an optimizer.
    """

    def __init__(
        self, *, dropout: bool = True, lowest: torch.dtype | None = None, instead: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._table = ELEMENTARY if dropout else ELEMENTARY | UNDROPPED
        self._lowest = lowest
        self._get = instead.get if instead else None  # the one method that every operation calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if get := self._get:
            args = tuple([self._replaced(a) if type(a) in NESTS else get(id(a), a) for a in args])
            kwargs = {name: self._replaced(a) for name, a in kwargs.items()} if kwargs else kwargs
        level = self._lowest
        if level is None:
            return self._table.get(func, func)(*args, **(kwargs or {}))
        if kwargs and _lowers(kwargs.get("dtype"), level):
            kwargs = {**kwargs, "dtype": level}
        out = self._table.get(func, func)(*args, **(kwargs or {}))
        if func not in CONVERSIONS or not isinstance(out, Tensor) or not is_lower(out, level):
            return out
        return args[0].to(out.device, level.to_complex() if out.is_complex() else level)

    def _replaced(self, argument: Any) -> Any:
        assert self._get is not None
        if type(argument) in NESTS:
            return type(argument)(map(self._replaced, argument))
        return self._get(id(argument), argument)
