"""The wheel, the sdist, an editable install and a bare checkout all hold and import every module."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALIAS = "causalattn/kernels/__init__.py"
LIBRARIES = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
TOPS = ("causalattn", "kernels")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*.py"))
KERNELS = [path.removesuffix(".py").replace("/", ".") for path in SOURCES if path.startswith("kernels/")]
LAYOUTS = ["wheel", "sdist", "editable", "checkout"]

ATTENTION = """
import torch
import causalattn

q = torch.randn(1, 2, 7, 4, dtype=torch.float64)
out = causalattn.attention(q, q, q, causal=True).out
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
"""


def python(*args, cwd, places=()):
    """Runs a fresh interpreter that sees only `places` and the libraries, whatever causalattn is installed here."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*places, *LIBRARIES])), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-S", *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree, *kinds):
    python("-m", "build", "--no-isolation", *kinds, tree, cwd=tree.parent)
    return tree / "dist"


def pip_install(*args, cwd):
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", *args, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build needs, so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    for top in TOPS:
        shutil.copytree(ROOT / top, copy / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(tree):
    build(tree, "--wheel", "--sdist")
    (wheel,), (sdist,) = (list((tree / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(tree, built, tmp_path_factory):
    """What to put on the path for each layout."""
    root = tmp_path_factory.mktemp("installed")
    wheel, sdist = built
    pip_install("--target", root / "wheel", wheel, cwd=root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root, filter="data")
    (again,) = build(root / sdist.name.removesuffix(".tar.gz"), "--wheel").glob("*.whl")
    pip_install("--target", root / "sdist", again, cwd=root)
    pip_install("--no-build-isolation", "--prefix", root / "prefix", "--editable", tree, cwd=root)
    (record,) = (root / "prefix").rglob("causalattn-*.dist-info")
    return {"wheel": root / "wheel", "sdist": root / "sdist", "editable": record.parent, "checkout": ROOT}


def test_wheel_holds_every_module(built):
    names = zipfile.ZipFile(built[0]).namelist()
    expected = {re.sub("^kernels/", "causalattn/kernels/", path) for path in SOURCES if path != ALIAS}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == {"causalattn", "causalattn-0.1.0.dist-info"}
    assert "causalattn/py.typed" in names
    assert "causalattn-0.1.0.dist-info/licenses/LICENSE" in names


def test_sdist_holds_every_module(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*SOURCES, "setup.py", "pyproject.toml", "README.md", "LICENSE"} - {ALIAS}


def test_requirements_leave_torch_its_own_triton(built):
    with zipfile.ZipFile(built[0]) as wheel:
        metadata = wheel.read("causalattn-0.1.0.dist-info/METADATA").decode()
    required = re.findall("^Requires-Dist: (.*)$", metadata, re.M)
    assert 'triton>=3.6; sys_platform == "linux"' in required
    assert not [line for line in required if "==" in line.partition(";")[0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_imports_and_runs(layout, tree, installed, tmp_path):
    place = installed[layout]
    modules = ["kernels", *KERNELS] if find_spec("triton") else ["kernels"]
    imports = "".join(f"import causalattn.{module}\n" for module in modules)
    where = "print(causalattn.__file__)\nprint(*causalattn.kernels.__path__, sep='\\n')\n"
    code = f"import site\nsite.addsitedir({str(place)!r})\n{imports}{ATTENTION}{where}"
    package, *kernels = (Path(line).resolve() for line in python("-c", code, cwd=tmp_path, places=[place]).splitlines())

    source = {"editable": tree, "checkout": ROOT}.get(layout)
    assert package == (source or place) / "causalattn" / "__init__.py"
    assert kernels[0] == (source / "kernels" if source else place / "causalattn" / "kernels")


def test_hugging_face_kernels_stays_importable(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'someone else'\n")
    code = "import causalattn, causalattn.kernels, kernels\nassert kernels.OWNER == 'someone else'"
    python("-c", code, cwd=ROOT, places=[ROOT, tmp_path])


def test_runs_without_triton_transformers_and_matplotlib(tmp_path):
    ban = "import sys\nfor name in ('triton', 'transformers', 'matplotlib'):\n    sys.modules[name] = None\n"
    python("-c", ban + ATTENTION, cwd=tmp_path, places=[ROOT])


def test_import_is_light(tmp_path):
    code = "import sys, causalattn\nassert not {'transformers', 'matplotlib', 'kernels'} & {*sys.modules}"
    python("-c", code, cwd=tmp_path, places=[ROOT])


def test_all_is_exactly_the_public_names(tmp_path):
    code = """
from types import ModuleType
import causalattn

listed = set(causalattn.__all__)
values = {name: value for name, value in vars(causalattn).items() if not name.startswith("_")}
modules = {name: value.__name__ for name, value in values.items() if isinstance(value, ModuleType)}
foreign = {name for name, origin in modules.items() if not origin.startswith("causalattn.")}
defined = values.keys() - modules.keys()
assert len(listed) == len(causalattn.__all__)
assert not defined - listed, f"not in __all__: {defined - listed}"
assert not foreign, f"other packages' names: {foreign}"
assert all(hasattr(causalattn, name) for name in listed)
"""
    python("-c", code, cwd=tmp_path, places=[ROOT])


def test_constraints_pin_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    required = {re.match("[a-z0-9-]+", line)[0] for line in lines}
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    # a CUDA build of torch brings a Triton of its own
    assert required - {"causalattn", "triton"} <= pinned
