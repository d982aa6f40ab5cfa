"""Traced programs, cut in two: the part without the last argument runs once, the rest each time.

A function ``(inputs, v) -> (values, product)`` is recorded as a graph of torch's elementary operations.  ``once`` takes
the inputs to the values and to every intermediate result that the rest needs, ``each`` takes those and v to the
product.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, vmap

from ..errors import CannotTrace

Each = Callable[[Sequence[Tensor], Tensor], Tensor]

FACTORED = ("gelu", "tanh", "silu", "sigmoid", "threshold", "softplus", "elu", "hardtanh", "leaky_relu")
"""Functions whose backward kernels compute a slope and multiply by it: taken apart, the slope is computed once."""


@dataclass(frozen=True)
class Program:
    """A program in two parts: ``once(*inputs) -> (*values, *residuals)`` and ``each(*residuals, v) -> product``."""

    once: fx.GraphModule
    each: fx.GraphModule
    values: int

    def start(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the first part; return values and residuals."""
        with torch.no_grad():
            results = list(self.once(*inputs))
        return results[: self.values], results[self.values :]


def trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], v: Tensor) -> Program:
    """Trace the program of ``function(*inputs, v) -> (*values, product)``.

    Raises:
        CannotTrace: the function branches on values, or asks for numbers.
    """
    return _cut(_recorded(function, (*inputs, v)))


def record(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], factored: Sequence[str] = FACTORED
) -> fx.GraphModule:
    """Record a function as a fixed program for inputs of these shapes: without autograd, modes and modules.

    With nothing `factored` it calls the same kernels as `function` and gives, as a rule, the same bits.

    Raises:
        CannotTrace: the function branches on values, or its program gives other numbers.
    """
    program = _recorded(function, inputs, factored)
    _fold_constants(program)
    with torch.no_grad():
        pairs = zip(function(*inputs), program(*inputs), strict=True)
        for first, again in pairs:
            if not torch.allclose(first, again, rtol=1e3 * torch.finfo(first.dtype).eps, equal_nan=True):
                raise CannotTrace("the fixed program gives other numbers: something in it changes from call to call")
    return program


def interpreted(program: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Run a program by torch's own interpreter: the same kernels in the same order, without Python between them.

    On small tensors this takes half the time of running it as a module.

    Raises:
        CannotTrace: the interpreter does not know some operation.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch would rather have it compiled, which changes the arithmetic
        try:
            script: Callable[..., tuple[Tensor, ...]] = torch.jit.trace(program, tuple(inputs), check_trace=False)
        except Exception as error:
            raise CannotTrace(f"no interpreted program: {first_line(error)}") from error
    return script


def _recorded(
    function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Tensor], factored: Sequence[str] = FACTORED
) -> fx.GraphModule:
    """Record all operations of ``function(*arguments)``, repeated ones once, none of which writes."""
    # Torch's tracer is a second of imports, which nobody should pay who does not trace.
    from torch._decomp import get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table: Any = get_decompositions([getattr(torch.ops.aten, f"{name}_backward") for name in factored])
    try:
        graph = make_fx(function, decomposition_table=table)(*arguments)
        graph.graph.eliminate_dead_code()
        if _writes(graph.graph):
            graph = make_fx(functionalize(graph))(*arguments)
    except Exception as error:  # whatever the model does that a program cannot
        raise CannotTrace(f"no fixed program: {first_line(error)}") from error
    _merge_repeated(graph.graph)
    graph.graph.eliminate_dead_code()
    if _writes(graph.graph):
        raise CannotTrace("no fixed program: something is written in place that is neither a buffer nor a parameter")
    return graph


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _writes(graph: fx.Graph) -> list[fx.Node]:
    """Find the calls that change one of their arguments."""
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]


def _merge_repeated(graph: fx.Graph) -> None:
    """Compute common subexpressions once; the graph has no writes."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute now what does not depend on the inputs."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if node.op == "call_function" and isinstance(value, Tensor):
            module.register_buffer(f"folded_{node.name}", value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"folded_{node.name}"))
    module.graph.eliminate_dead_code()
    module.recompile()


def _cut(module: fx.GraphModule) -> Program:
    nodes = list(module.graph.nodes)
    v = [n for n in nodes if n.op == "placeholder"][-1]
    (*values, product) = nodes[-1].args[0]
    depends = {v}
    for node in nodes[:-1]:
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    late = [n for n in nodes[:-1] if n in depends and n is not v]
    border = list(dict.fromkeys(n for node in late for n in node.all_input_nodes if n not in depends))
    if product not in depends:
        border.append(product)
    once, each = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    for node in nodes[:-1]:
        if node not in depends:
            early[node] = once.node_copy(node, early.__getitem__)
    once.output(tuple(early[n] for n in (*values, *border)))
    copies = {n: each.placeholder(n.name) for n in border}
    copies[v] = each.placeholder("v")
    for node in late:
        copies[node] = each.node_copy(node, copies.__getitem__)
    if product is v or product not in depends:  # a product is never a view of what is kept, nor of its argument
        copies[product] = each.call_function(torch.ops.aten.clone.default, (copies[product],))
    each.output(copies[product])
    each.eliminate_dead_code()
    first = fx.GraphModule(module, once)
    return Program(first, fx.GraphModule(module, each), len(values))


def batched(each: fx.GraphModule, residuals: Sequence[Tensor], rows: Tensor) -> fx.GraphModule:
    """Return the program of ``each`` over rows of directions ``(k, P)``.

    Raises:
        CannotTrace: an operation has no batched form.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    flexible = _copied(each)
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for node in flexible.graph.nodes:
        if node.target in views:  # strides differ under vmap
            node.target = torch.ops.aten.reshape.default
    flexible.recompile()
    axes = (*(None for _ in residuals), 0)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule")
            return make_fx(vmap(flexible, in_dims=axes))(*residuals, rows)
    except Exception as error:
        raise CannotTrace(f"no program for columns: {first_line(error)}") from error


def _copied(program: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph of a program, not what it reads."""
    twin = fx.GraphModule(program, fx.Graph())
    twin.graph.output(twin.graph.graph_copy(program.graph, {}))
    twin.recompile()
    return twin


def compiler() -> str | None:
    """Name the C++ compiler that torch would use; None where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own modules
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return None


def compiled(each: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Compile `each` to machine code.

    Raises:
        CannotTrace: there is no C++ compiler.
    """
    if arguments[-1].device.type == "cpu" and compiler() is None:
        raise CannotTrace("no C++ compiler")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._inductor.compile_fx import compile_fx

        fast: Any = compile_fx(_copied(each), list(arguments))  # which changes what it is given
        fast(*arguments)

    def run(*arguments: Tensor) -> Tensor:
        out = fast(*arguments)
        return out[0] if isinstance(out, list | tuple) else out

    return run
