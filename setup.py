"""The package: version ranges here, the exact versions that passed the tests in launch/constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

REQUIRES = [
    "torch>=2.6,<3",  # networks, DDP; 2.6: torch.load defaults to weights_only
    "torchvision>=0.21,<1",  # data sets, JPEG decoding without FFCV, reference transforms; goes with its torch
    "numpy>=2.0,<3",  # arrays everywhere; 2.0: opencv-python, which FFCV needs, asks for it
    "numba>=0.60,<1",  # the compiled view kernel and relation sweep; 0.60: the first for numpy 2
    "llvmlite>=0.43,<1",  # the few instructions that the kernels give numba in LLVM's own language; goes with its numba
    "pydantic>=2.10,<3",  # the typed config
    "pyyaml>=6.0,<7",  # reads and writes the config
    "safetensors>=0.5,<1",  # the features file and exported weights: tensors without pickle
    "scikit-learn>=1.5,<2",  # the embedded digits; logistic regression, k-means and t-SNE of the evaluators
    "threadpoolctl>=3.5,<4",  # t-SNE on one thread, whose sums have one order; scikit-learn brings it
    "scipy>=1.11,<2",  # L-BFGS of the logistic regression
    "pillow>=10,<14",  # decodes and encodes images in `convert`
    "jinja2>=3.1,<4",  # the templates of a report, with every text escaped; torch brings it
    "markupsafe>=2.1,<4",  # the type of text that is markup already; jinja2 brings it
    "matplotlib>=3.8,<4",  # pictures of the views, loss curves, plots of a report
    "tensorboard>=2.16,<3",  # log of a run; 2.16: the first for numpy 2
    "tqdm>=4.66,<5",  # progress bars
    "submitit>=1.5.2,<2",  # sends runs to Slurm
]

EXTRAS = {
    # The default reader. An extra, not a requirement: it compiles against the headers of OpenCV and libturbojpeg, and a
    # machine without them must still work with data.reader=arrays. launch/install.sh brings the headers and this extra.
    # Exactly 1.0.2: the last release; the reader relies on its internals (traversal order, decoders, page layout).
    # setuptools: FFCV imports distutils, which left Python's library in 3.12.
    "ffcv": ["ffcv==1.0.2", "setuptools>=77"],
    # Backbones by the name timm/<name>, and weights by the names hf:// and timm:; timm brings huggingface_hub.
    "timm": ["timm>=1.0.9,<2", "huggingface_hub>=0.26,<3"],
    "triton": ["triton>=3.2,<4"],  # the relation head on GPUs; torch's CUDA builds bring it, in the version that fits
    # Images of C channels in TIFF, of which Pillow reads one page of RGB; imagecodecs unpacks LZW and the like there,
    # and reads PNG of 16 bits. An extra: npy, JPEG and PNG of 8 bits need neither.
    "tiff": ["tifffile>=2024.8.30", "imagecodecs>=2024.6.1"],
    "parquet": ["pyarrow>=16,<27"],  # `convert parquet` and `convert huggingface`: reads both kinds of tables
    # `ssl-dist export --format onnx`. torch writes ONNX through onnxscript.
    "onnx": ["onnx>=1.18,<2", "onnxscript>=0.5,<1"],
    "test": [
        "pytest>=8,<9.2",  # with 9.2, pytest-xdist 3.8 spreads the tests of a group over all workers
        "pytest-timeout>=2.3,<3",  # a rank that hangs fails its test instead of stopping the whole run
        "pytest-xdist>=3.6,<4",  # tests on all cores, and more at once than there are: half of them wait
        "pytest-cov>=6,<8",  # the share of lines that tests run, a figure in the output of CI
        "hypothesis>=6.100,<7",  # property tests of the index arithmetic, keys and data plan
        "onnx>=1.18,<2",  # exports to it are tested
        "onnxscript>=0.5,<1",  # the same
        "onnxruntime>=1.22,<2",  # what reads them
        "nbclient>=0.10,<1",  # executes the notebook
        "ipykernel>=6.29,<8",  # what executes it
        "datasets>=3,<6",  # writes tables as the Hugging Face hub has them, to be converted; brings pyarrow
        "webdataset>=0.2.100,<2",  # writes shards, to be converted
        "tifffile>=2024.8.30",  # writes the TIFF files of the tests
        "imagecodecs>=2024.6.1",  # packs them as LZW, and reads PNG of 16 bits
        "wandb>=0.19,<1",  # tools/to_wandb.py; what it writes offline is read back
        "mlflow-skinny>=3,<4",  # tools/to_mlflow.py, with runs in files and without a server
        "ruff>=0.9,<1",  # linter and formatter; part of the test command
        "mypy>=1.15,<3",  # type checker; part of the test command
        "types-PyYAML",  # the types of yaml, for mypy
        "types-tqdm",  # those of tqdm
    ],
    # The manual, tools/build_docs.sh. An extra: no training needs it. A test builds it, so launch/install.sh brings it.
    "docs": [
        "mkdocs-material>=9.6,<10",  # pages from docs/*.md, with search and without anything from the network
        "mkdocstrings[python]>=1.0,<2",  # the reference of the Python names, from their docstrings
        "ruff>=0.9,<1",  # breaks the lines of long signatures there
    ],
}


class BuildWithConfigs(build_py):
    """An installed package has configs/ inside: a checkout has it beside the package (config/shipped.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "configs", Path(self.build_lib, "ssl_dist", "configs"), dirs_exist_ok=True)


setup(
    name="ssl_dist",
    version=re.search(r'__version__ = "(.+)"', (HERE / "ssl_dist" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Self-supervised pre-training of image backbones at any world size, and its evaluation",
    license="MIT",
    packages=find_packages(include=["ssl_dist", "ssl_dist.*"]),
    package_data={
        "ssl_dist": ["py.typed"],
        "ssl_dist.data": ["published_sizes.yaml"],
        "ssl_dist.study": ["templates/*.html"],
        "ssl_dist.train": ["devices.yaml"],
        "ssl_dist.report": ["page.css", "page.js", "published.yaml", "templates/*.html"],
    },
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["ssl-dist = ssl_dist.__main__:program"]},
)
