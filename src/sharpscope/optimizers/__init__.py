"""Update rules of optimizers as values, with their thresholds of stability."""

# rule_of finds them as the subclasses of UpdateRule
from . import adaptive as adaptive
from . import gd as gd
from . import scalar as scalar
