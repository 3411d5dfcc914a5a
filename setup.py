"""What pgdist is called, what it needs, and the `pgdist` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pgdist/__init__.py").read_text(), re.M).group(1)

# The core stays small and needs no compiler; what only some users want is an extra.
REQUIRES = [
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "pyyaml>=6",
    "rich>=13",
    "scipy>=1.14",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
    "tensorstore>=0.1.70",
]

EXTRAS = {
    "cuda12": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "plan": ["jax[tpu]>=0.10"],  # for the libtpu that suits this JAX: its compiler needs no TPU
    "gcs": ["gcsfs>=2025.2"],
    "hub": ["huggingface_hub>=1.0", "kagglehub>=1.0"],
    "notebook": ["ipykernel", "matplotlib"],  # examples/
    # setuptools: the scripts in tools/ install this project without fetching a build environment.
    "test": [
        "fastjsonschema",
        "hypothesis",
        "psutil",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "setuptools>=77",
    ],
    # For the tests of what is optional: buckets, the hubs, the notebook.
    "test_optional": [
        "gcp-storage-emulator",
        "gcsfs>=2025.2",
        "huggingface_hub>=1.0",
        "ipykernel",
        "kagglehub>=1.0",
        "matplotlib",
        "nbclient",
        "nbformat",
    ],
    "parity": ["torch==2.13.0", "transformers==5.23.0"],
}

setup(
    name="pgdist",
    version=VERSION,
    description="Distributed fine-tuning of PaliGemma and PaliGemma 2 with JAX",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["pgdist", "pgdist.*", "launch", "launch.*"]),
    package_data={"pgdist.report": ["*.jinja"], "launch.targets": ["*.jinja"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["pgdist = launch.console:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
