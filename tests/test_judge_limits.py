"""What the judge allows where roundings repeat, and what it holds while it finds out."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verify.cases import Case
from verify.compare import compare
from verify.models import Arithmetic
from verify.numerics import BLOCK, freedom
from verify.routings import RoutingKind
from verify.specs.glu import activation_of
from verify.specs.layer import EXPERTS_MLP

pytestmark = pytest.mark.correctness


def clipped(seed: int) -> Case:
    """One expert with so many rows that all but common errors average away, under a clip at 2.5."""
    return Case(
        name="clipped", tokens=4000, experts=1, top_k=1, k_in=16, n_out=24, rank=2, seed=seed,
        routing=RoutingKind("uniform"), source="TOKEN", target="SLOT", gradient="TOKEN",
        gated=True, values="offset", tags=frozenset(),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [3, 8, 18])
def test_what_is_clipped_to_one_number_may_be_rounded_alike_in_every_row(seed):
    """Seen on an H200: a right result refused, since the clipped activation always errs alike."""
    case, dtype = clipped(seed), torch.float16
    activation = activation_of(case)
    assert activation.limit == 2.5
    inputs = EXPERTS_MLP.inputs(case, dtype, "balanced", torch.device("cpu"), seed=0)
    exact = {name: value.double() for name, value in inputs.tensors.items()}

    def projected(x: torch.Tensor, name: str) -> torch.Tensor:
        low = (inputs.scaling * x @ exact[f"lora_a_{name}"][0].mT).to(dtype).double()
        sums = x @ exact[f"weight_{name}"][0] + low @ exact[f"lora_b_{name}"][0].mT
        return sums.to(dtype).double()

    h = projected(exact["x"], "up")
    act = activation(*activation.halves(h)).to(dtype).double()
    out = exact["gates"] * projected(act, "down")
    expected = EXPERTS_MLP.reference(inputs, Arithmetic())["out"]
    assert compare("out", out.to(dtype), expected).ok
    found = compare("out", (1.002 * out).to(dtype), expected)
    assert not found.ok
    assert found.measure == "slope"


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_degrees_of_freedom_take_no_square_of_the_rows():
    """Seen on an H200: 38 GiB for 71,406 rows of one expert."""
    rows, width = 5000, 3
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    with Largest() as largest:
        found = freedom(variance, right)
    assert largest.elements <= BLOCK < rows**2
    # || sum_k v[k] r[k] r[k]^T ||^2 is the sum of v[i] v[j] (r[i] r[j])^2.
    spread = torch.einsum("mk,ki,kj->mij", variance, right, right)
    energy = torch.einsum("mii->m", spread)
    torch.testing.assert_close(found, energy.square() / spread.square().sum((1, 2)))
    parallel = torch.ones(rows, width, dtype=torch.float64)
    torch.testing.assert_close(freedom(variance, parallel), torch.ones(2, dtype=torch.float64))
    whole = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        freedom(torch.ones(1, 4).double(), whole), torch.tensor([4.0]).double()
    )
