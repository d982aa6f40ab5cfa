"""Traced programs: functions as lists of torch's elementary operations, without autograd, modules and modes.

`record` makes a program of a whole function, in its fastest form.  `trace` cuts one of ``(inputs, v) -> (values,
product)`` in two: ``once`` takes the inputs to the values and to every intermediate result that the rest needs,
``each`` takes those and v to the product.  A program runs as the module that torch records, in torch's own
`interpreted` form, or `compiled`.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from ..errors import CannotTrace

FACTORED = ("gelu", "tanh", "silu", "sigmoid", "threshold", "softplus", "elu", "hardtanh", "leaky_relu")
"""Functions whose backward kernels compute a slope and multiply by it: taken apart, the slope is computed once."""


@dataclass(frozen=True)
class Program:
    """A program in two parts: ``once(*inputs) -> (*values, *residuals)`` and ``each(*residuals, v) -> product``."""

    once: Callable[..., Sequence[Tensor]]
    each: Callable[..., Tensor]
    values: int

    def start(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the first part; return values and residuals."""
        with torch.no_grad():
            results = list(self.once(*inputs))
        return results[: self.values], results[self.values :]

    def product(self, residuals: Sequence[Tensor], v: Tensor) -> Tensor:
        """Run the second part for one vector ``(P,)``."""
        with torch.no_grad():
            return self.each(*residuals, v)


def trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], v: Tensor) -> Program:
    """Trace the program of ``function(*inputs, v) -> (*values, product)``; its parts are modules of torch.fx.

    Raises:
        CannotTrace: the function branches on values, or asks for numbers.
    """
    return _cut(_recorded(function, (*inputs, v)))


def record(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], factored: Sequence[str] = FACTORED
) -> Callable[..., tuple[Tensor, ...]]:
    """Record a function as a fixed program for inputs of these shapes: without autograd, modes and modules.

    With nothing `factored` it calls the same kernels as `function` and gives, as a rule, the same bits.

    Raises:
        CannotTrace: the function branches on values, or its program gives other numbers.
    """
    module = _recorded(function, inputs, factored)
    _fold_constants(module)
    expected = function(*inputs)
    try:
        program = interpreted(module)
        _require_equal(program(*inputs), expected)
    except RuntimeError:  # the interpreter does not know every operation
        program = torch.no_grad()(module.forward)
        _require_equal(program(*inputs), expected)
    return program


def _require_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise CannotTrace unless the tensors are equal to rounding."""
    for a, b in zip(found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e3 * torch.finfo(b.dtype).eps, equal_nan=True):
            raise CannotTrace("the fixed program gives other numbers: something in it changes from call to call")


def interpreted(program: Any) -> Callable[..., Any]:
    """Run a program by torch's own interpreter: the same kernels in the same order, without Python between them.

    On small tensors this takes half the time of running it as a module.

    Raises:
        CannotTrace: the interpreter does not know some operation.
    """
    plain: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]
    try:
        function: Callable[..., Any] = _Script(program).function()
    except Exception as error:  # whatever the interpreter raises of operations that it does not know
        raise CannotTrace(f"no interpreted program: {first_line(error)}") from error

    def run(*arguments: Tensor) -> Any:
        with torch.no_grad(), plain(False):  # optimized, it would fuse operations
            return function(*arguments)

    return run


class _Script:
    """A program in the form of torch's interpreter, which is built operation by operation from their signatures."""

    def __init__(self, program: fx.GraphModule) -> None:
        self.program = program
        self.graph: Any = torch._C.Graph()
        self.values: dict[fx.Node, Any] = {}  # of each node: one value, or a list of several

    def function(self) -> Callable[..., Any]:
        """Build the program, and make it a function of its tensors."""
        tensor = torch._C.TensorType.get()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.addInput(node.name)
            elif node.op == "get_attr":
                self.values[node] = self.graph.insertConstant(getattr(self.program, node.target).detach())
            elif node.op == "output":
                result = node.args[0]
                if isinstance(result, fx.Node):
                    self.graph.registerOutput(self.values[result])
                else:
                    kind = torch._C.TupleType([tensor] * len(result))
                    self.graph.registerOutput(
                        self._add("prim::TupleConstruct", [self.values[n] for n in result], kind)[0]
                    )
            elif node.target is operator.getitem:
                whole, i = self.values[node.args[0]], node.args[1]
                items = [whole, self._constant(i)] if not isinstance(whole, list) else []
                self.values[node] = self._add("aten::__getitem__", items, tensor)[0] if items else whole[i]
            else:
                self.values[node] = self._call(node.target._schema, node)
        made: Callable[..., Any] = torch._C._create_function_from_graph("program", self.graph)
        return made

    def _call(self, schema: Any, node: fx.Node) -> Any:
        given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
        inputs = [self._argument(given.get(a.name, a.default_value), a.type) for a in schema.arguments]
        results = self._add(schema.name, inputs, *(r.type for r in schema.returns))
        return results[0] if len(results) == 1 else results

    def _add(self, kind: str, inputs: list[Any], *types: Any) -> list[Any]:
        node = self.graph.create(kind, inputs, len(types))
        self.graph.appendNode(node)
        results = list(node.outputs())
        for result, own in zip(results, types, strict=True):
            result.setType(own)
        return results

    def _argument(self, x: Any, kind: Any) -> Any:
        """Return the value of an argument whose type in the signature is `kind`."""
        if isinstance(kind, torch._C.OptionalType) and x is not None:
            return self._argument(x, kind.getElementType())
        if isinstance(x, fx.Node):
            return self.values[x]
        if isinstance(x, list | tuple):
            item = kind.getElementType()
            return self._add("prim::ListConstruct", [self._argument(i, item) for i in x], kind)[0]
        return self._constant(float(x) if isinstance(kind, torch._C.FloatType) else x)

    def _constant(self, x: Any) -> Any:
        return self.graph.insertConstant(MEMORY_FORMATS.index(x) if isinstance(x, torch.memory_format) else x)


MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
"""The formats of memory by the numbers that torch's interpreter knows them by."""


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


def compiled(each: Any, arguments: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Compile a program with one result to machine code.

    Raises:
        CannotTrace: there is no C++ compiler.
    """
    if arguments[-1].device.type == "cpu" and compiler() is None:
        raise CannotTrace("no C++ compiler")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._inductor.compile_fx import compile_fx

        twin = fx.GraphModule(each, fx.Graph())  # the compiler changes what it is given
        twin.graph.output(twin.graph.graph_copy(each.graph, {}))
        twin.recompile()
        fast: Any = compile_fx(twin, list(arguments))
        fast(*arguments)

    def run(*arguments: Tensor) -> Tensor:
        out = fast(*arguments)
        return out[0] if isinstance(out, list | tuple) else out

    return run
