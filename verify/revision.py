"""Two revisions of one package, side by side in one process.

The package imports itself relatively and names its operators after its own top-level name, so a
copy of its tree under another name is another package: `load(tree, "before")` is `import before`.
"""

import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType


def load(source_dir: Path | str, name: str) -> ModuleType:
    """The package whose directory is `source_dir`, imported under the top-level name `name`.

    The tree is copied first, so that later edits of the original do not show. The copy lasts until
    the interpreter exits or the module is unloaded and forgotten.

    Raises:
        ValueError: `name` is no identifier or is already imported, or `source_dir` is no package.
    """
    return edited(source_dir, {}, name)


def edited(source_dir: Path | str, sources: Mapping[str, str], name: str) -> ModuleType:
    """`load`, with the files at the given relative paths replaced by new source text.

    Raises:
        ValueError: as `load`; also where a path is not in the tree or its text stays the same.
    """
    source_dir = Path(source_dir)
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    if name in sys.modules:
        raise ValueError(f"a module named {name!r} is already imported; unload it first")
    if not (source_dir / "__init__.py").is_file():
        raise ValueError(f"{source_dir} is not a package: it has no __init__.py")
    parent = Path(tempfile.mkdtemp(prefix="revision-"))
    try:
        package = parent / name
        shutil.copytree(source_dir, package, ignore=shutil.ignore_patterns("__pycache__"))
        for path, text in sources.items():
            _replace(package, path, text)
        module = _imported(package, name)
    except BaseException:
        unload(name)
        shutil.rmtree(parent, ignore_errors=True)
        raise
    weakref.finalize(module, shutil.rmtree, parent, ignore_errors=True)
    return module


def unload(name: str) -> None:
    """Forgets the package `name` and its submodules; its registered operators stay.

    Loading another tree under the same name replaces those.
    """
    for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[module]


def checkout(
    revision: str,
    repository: Path | str,
    destination: Path | str,
    *,
    package: str = "scattermoe_lora",
) -> Path:
    """Writes the package as of a commit, branch or tag to `destination`; returns its directory.

    The working tree of the repository is not touched.

    Raises:
        ValueError: git has no such revision, or the package is not in it.
    """
    command = ["git", "-C", str(repository), "archive", "--format=zip", revision, "--", package]
    ran = subprocess.run(command, capture_output=True, check=False)
    if ran.returncode != 0:
        raise ValueError(
            f"git has no {package} at revision {revision!r} of {repository}: "
            f"{ran.stderr.decode(errors='replace').strip()}"
        )
    with zipfile.ZipFile(io.BytesIO(ran.stdout)) as archive:
        archive.extractall(destination)
    return Path(destination) / package


def _replace(package: Path, path: str, text: str) -> None:
    file = package / path
    if not file.is_file():
        raise ValueError(f"{path} is not a file of the package")
    if file.read_text() == text:
        raise ValueError(f"the new source of {path} is the same as the old")
    file.write_text(text)


def _imported(package: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
