"""Wrong versions of every operation, made by hand: spec -> mutants that its checks must reject."""

from collections.abc import Mapping

from ..spec import Mutant
from .gradients import GRADIENTS
from .layers import LAYERS
from .products import PRODUCTS
from .rows import ROWS

BY_HAND: Mapping[str, tuple[Mutant, ...]] = {**PRODUCTS, **GRADIENTS, **ROWS, **LAYERS}
