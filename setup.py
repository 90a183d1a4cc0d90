"""Packaging: ``pip install -e .`` gives the console command ``fourdfy`` (= ``launch.py``)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fourdfy",
    version="0.1.0",
    description="Text to 4D scenes by hybrid score distillation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fourdfy", "fourdfy.*"]), "fourdfy.configs"],
    package_dir={"fourdfy.configs": "configs"},
    package_data={
        "fourdfy": [
            "shapes/assets/**/*",
            "prompts/*.json",
            "priors/key_maps/*.json",
            "pages/*.css",
            "pages/*.js",
        ],
        "fourdfy.configs": ["**/*.yaml"],
    },
    entry_points={"console_scripts": ["fourdfy = fourdfy.launching.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "pytorch-lightning>=2.6",
        "omegaconf>=2.4",
        "pyyaml>=6.0",
        "filelock>=3.12",
        "diffusers>=0.38",
        "transformers>=5.0",
        "peft>=0.18",
        "huggingface_hub>=1.0",
        "safetensors>=0.5",
        "numpy>=2.0",
        "numba>=0.61",
        "imageio-ffmpeg>=0.6",
        "pillow>=11",
        "scipy>=1.13",
        "scikit-image>=0.25",
        "trimesh>=4.6",
        "fast-simplification>=0.1.13",
        "jaxtyping>=0.3",
        "beartype>=0.20",
        "rich>=13",
        "tensorboard>=2.18",
    ],
    extras_require={
        "textures": ["xatlas>=0.0.10"],
        "ray": ["ray>=2.50"],
        "slurm": ["submitit>=1.5"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ray>=2.50",
            "submitit>=1.5",
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=2.4",
            "pygltflib>=1.16",
            "triton>=3.2; platform_system == 'Linux'",
        ],
    },
)
