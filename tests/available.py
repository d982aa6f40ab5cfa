"""To be imported before transformers, and before what looks for it, as Lightning does: hides a broken torchvision.

The package index has torchvision for its own build of PyTorch.  Beside another build (for processors only, say) it
cannot be loaded, and transformers, which uses it wherever it is installed, neither.  It is here because a development
tool asks for it, and nothing needs it.
"""

import sys
from typing import Any

try:
    import torchvision
except (ImportError, RuntimeError):  # an operator of its library does not exist
    hidden: dict[str, Any] = {"torchvision": None}
    sys.modules.update(hidden)
else:
    del torchvision
