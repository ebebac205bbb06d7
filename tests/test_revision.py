"""Two revisions of a package live side by side: each has its results and its operators."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verify import revision

pytestmark = pytest.mark.correctness

PACKAGE = Path(__file__).parent.parent / "scattermoe_lora"

KERNEL = """
import torch
import triton
import triton.language as tl

from ..constants import FACTOR

NAMESPACE = __name__.partition(".")[0]
GAIN = tl.constexpr(FACTOR)


@triton.jit
def scale_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y + index, tl.load(x + index) * GAIN)


@torch.library.custom_op(f"{NAMESPACE}::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    scale_kernel[(1,)](x, y, SIZE=x.numel())
    return y
"""


@pytest.fixture
def tree(tmp_path):
    """A package of the project's shape: a kernel in a subpackage, an operator, a constant."""
    package = tmp_path / "planted"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("from .ops.scale import scale\n")
    (package / "constants.py").write_text("FACTOR = 2\n")
    (package / "ops" / "__init__.py").write_text("")
    (package / "ops" / "scale.py").write_text(KERNEL)
    return package


@pytest.fixture
def unloading():
    yield
    revision.unload("before")
    revision.unload("after")


def operators(name: str) -> set[str]:
    """The names of the operators registered in a namespace."""
    schemas = torch._C._dispatch_get_all_op_names()
    return {schema.partition("::")[2] for schema in schemas if schema.startswith(f"{name}::")}


@pytest.mark.usefixtures("unloading")
def test_one_constant_changed_gives_two_results_and_two_namespaces(tree, device):
    before = revision.load(tree, "before")
    after = revision.edited(tree, {"constants.py": "FACTOR = 3\n"}, "after")
    x = torch.ones(4, device=device)
    assert before.scale(x).tolist() == [2] * 4
    assert after.scale(x).tolist() == [3] * 4
    assert torch.ops.before.scale(x).tolist() == [2] * 4
    assert torch.ops.after.scale(x).tolist() == [3] * 4


@pytest.mark.usefixtures("unloading")
def test_operators_of_a_fixed_namespace_replace_each_other(tree, device):
    fixed = KERNEL.replace('__name__.partition(".")[0]', '"shared_namespace"')
    (tree / "ops" / "scale.py").write_text(fixed)
    revision.load(tree, "before")
    revision.edited(tree, {"constants.py": "FACTOR = 3\n"}, "after")
    x = torch.ones(4, device=device)
    assert torch.ops.shared_namespace.scale(x).tolist() == [3] * 4


def product(lib, device: torch.device) -> torch.Tensor:
    """Rows of 16 ones through weights of 1/16."""
    index = torch.tensor([[0], [1], [1]], device=device)
    routing = lib.Routing.from_top_k(index, 2)
    x = torch.ones(3, 16, device=device)
    weight = torch.full((2, 16, 16), 1 / 16, device=device)
    order = lib.RowOrder
    ops = importlib.import_module(f"{lib.__name__}.ops")
    return ops.scatter2scatter(x, weight, routing, source=order.TOKEN, target=order.SLOT)


@pytest.mark.usefixtures("unloading")
def test_the_package_itself_loads_twice_with_one_constant_changed(device):
    path = "ops/scatter2scatter.py"
    text = (PACKAGE / path).read_text()
    before = revision.load(PACKAGE, "before")
    doubled = text.replace("acc *= scale", "acc *= scale * 2")
    after = revision.edited(PACKAGE, {path: doubled}, "after")
    assert product(before, device).unique().tolist() == [1]
    assert product(after, device).unique().tolist() == [2]
    assert operators("before") == operators("after")


@pytest.mark.usefixtures("unloading")
def test_later_edits_of_the_original_do_not_show(tree, device):
    before = revision.load(tree, "before")
    (tree / "constants.py").write_text("FACTOR = 9\n")
    (tree / "ops" / "scale.py").unlink()
    assert before.scale(torch.ones(4, device=device)).tolist() == [2] * 4


@pytest.mark.usefixtures("unloading")
def test_unloading_forgets_every_module(tree):
    revision.load(tree, "before")
    revision.unload("before")
    assert not [name for name in sys.modules if name.partition(".")[0] == "before"]
    revision.edited(tree, {"constants.py": "FACTOR = 5\n"}, "before")
    assert sys.modules["before.constants"].FACTOR == 5


def test_what_would_change_nothing_or_hide_something_is_refused(tree):
    with pytest.raises(ValueError, match="identifier"):
        revision.load(tree, "be-fore")
    with pytest.raises(ValueError, match="already imported"):
        revision.load(tree, "torch")
    with pytest.raises(ValueError, match=r"no __init__\.py"):
        revision.load(tree.parent, "before")
    with pytest.raises(ValueError, match="not a file"):
        revision.edited(tree, {"missing.py": ""}, "before")
    with pytest.raises(ValueError, match="same as the old"):
        revision.edited(tree, {"constants.py": "FACTOR = 2\n"}, "before")
    assert "before" not in sys.modules


@pytest.mark.usefixtures("unloading")
def test_a_tree_that_fails_to_import_leaves_nothing(tree):
    with pytest.raises(ZeroDivisionError):
        revision.edited(tree, {"constants.py": "FACTOR = 1 / 0\n"}, "before")
    assert not [name for name in sys.modules if name.partition(".")[0] == "before"]


def git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", "-C", repository, *identity, *arguments], check=True)


def test_a_checkout_has_the_source_of_its_revision(tree, tmp_path):
    repository = tree.parent
    git(repository, "init", "-q")
    git(repository, "add", "planted")
    git(repository, "commit", "-q", "-m", "first")
    git(repository, "tag", "first")
    (tree / "constants.py").write_text("FACTOR = 3\n")
    git(repository, "commit", "-q", "-a", "-m", "second")
    old = revision.checkout("first", repository, tmp_path / "old", package="planted")
    new = revision.checkout("HEAD", repository, tmp_path / "new", package="planted")
    assert (old / "constants.py").read_text() == "FACTOR = 2\n"
    assert (new / "constants.py").read_text() == "FACTOR = 3\n"
    with pytest.raises(ValueError, match="no planted at revision 'absent'"):
        revision.checkout("absent", repository, tmp_path / "none", package="planted")
