"""What measuring the sharpness of a large transformer costs, on paper: python tools/on_paper.py

One sequence on each GPU is measured, in single precision, of a model that is trained with FSDP2 in half precision.
Counts of messages, of vectors and of the numbers that a graph keeps are those of the code, held by a test; speeds of
the machine are assumptions, which stand in `Machine`.
"""

from dataclasses import dataclass

FLOAT = 4
"""Bytes of a number in single precision."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one node: what each computes in a second, and what it sends and receives."""

    gpus: int = 8
    training_flops: float = 400e12  # in half precision, as trainings reach them
    measuring_flops: float = 40e12  # in single precision, without TF32
    bytes_per_second: float = 300e9  # of an all-reduce in a ring
    latency: float = 50e-6  # of a message
    bytes_of_memory: float = 80e9


@dataclass(frozen=True)
class Model:
    """A transformer, the sequences that are measured, and the tokens of a training step."""

    width: int = 2048
    layers: int = 20
    heads: int = 16
    length: int = 1024
    tokens_per_step: int = 2**19

    @property
    def parameters(self) -> int:
        """The weights of all layers: of attention 4 d², of the layers after it 8 d²."""
        return 12 * self.layers * self.width**2


@dataclass(frozen=True)
class Cost:
    """What one measurement of λ1 by so many products costs each GPU."""

    bytes_of_training: float  # weights, gradient and two averages of Adam, a part on each
    bytes_of_vectors: float  # at the peak
    bytes_of_graph: float
    messages: int
    bytes_sent: float
    seconds: float
    step_seconds: float

    @property
    def steps(self) -> float:
        """Training steps that take as long."""
        return self.seconds / self.step_seconds


VECTORS = 10
"""Vectors of all weights at the peak of a solve without a basis, weights and gradient included, as measured."""


def graph_numbers(model: Model) -> float:
    """Numbers that the graph of a gradient keeps for a sequence: of a layer 40 d, and 3 for each entry of attention."""
    return model.layers * model.length * (40 * model.width + 3 * model.heads * model.length)


def messages(products: int) -> int:
    """All-reduces of a solve for λ1, all of them of a vector: one for each product."""
    return products


def cost(model: Model, machine: Machine, products: int = 30) -> Cost:
    """Add up one measurement: an expansion, then the products."""
    vector = FLOAT * model.parameters
    ring = (machine.gpus - 1) / machine.gpus
    reduces = messages(products) + 1  # with the expansion
    sent = ring * vector * (2 * reduces + 1)  # with the weights that are gathered
    gradient = 6 * model.parameters * model.length / machine.measuring_flops
    return Cost(
        bytes_of_training=4 * vector / machine.gpus,
        bytes_of_vectors=vector * VECTORS,
        bytes_of_graph=FLOAT * graph_numbers(model),
        messages=reduces + 1,
        bytes_sent=sent,
        seconds=(1.2 + 2 * products) * gradient + sent / machine.bytes_per_second + (reduces + 1) * machine.latency,
        step_seconds=6 * model.parameters * model.tokens_per_step / (machine.gpus * machine.training_flops),
    )


def table(machine: Machine, *models: Model) -> str:
    """Write the costs side by side, as lines of Markdown."""
    costs = [cost(model, machine) for model in models]

    def row(name: str, *cells: str) -> str:
        return f"| {' | '.join([name, *cells])} |"

    return "\n".join(
        [
            row("weights", *(f"{m.parameters:.2g}" for m in models)),
            row("---", *("---" for _ in models)),
            row("width, layers, length of a sequence", *(f"{m.width}, {m.layers}, {m.length}" for m in models)),
            row("training: weights, gradient, Adam", *(f"{c.bytes_of_training / 1e9:.2g} GB" for c in costs)),
            row("measuring: vectors", *(f"{c.bytes_of_vectors / 1e9:.3g} GB" for c in costs)),
            row("measuring: graph", *(f"{c.bytes_of_graph / 1e9:.3g} GB" for c in costs)),
            row("messages", *(f"{c.messages}" for c in costs)),
            row("sent by each GPU", *(f"{c.bytes_sent / 1e9:.3g} GB" for c in costs)),
            row("a measurement", *(f"{c.seconds:.2g} s" for c in costs)),
            row("a training step", *(f"{c.step_seconds:.2g} s" for c in costs)),
            row("every 1,000 steps: of the training time", *(f"{c.steps / 1000:.1%}" for c in costs)),
        ]
    )


MODELS = (
    Model(width=128, layers=5, heads=4, length=256, tokens_per_step=2**16),
    Model(width=768, layers=14, heads=12, length=1024, tokens_per_step=2**18),
    Model(),
)

if __name__ == "__main__":
    print(table(Machine(), *MODELS))
