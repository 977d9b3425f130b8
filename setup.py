"""Where the packages lie; pyproject.toml says everything else."""

from pathlib import Path

from setuptools import find_packages, setup

# kernels/ has no __init__.py (it would shadow the library of that name), so its folders are listed by hand
FOLDERS = [
    Path("kernels"),
    *(path for path in Path("kernels").rglob("*") if path.is_dir() and path.name != "__pycache__"),
]
KERNELS = {".".join(("causalattn", *folder.parts)): folder.as_posix() for folder in FOLDERS}

setup(
    packages=sorted({*find_packages(include=["causalattn", "causalattn.*"]), *KERNELS}),
    package_dir=KERNELS,
)
