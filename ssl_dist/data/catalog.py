"""What is known of the data sets by name: their splits, their sizes, how they are stored, and the papers' constants."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Entry:
    """One data set.

    source: how `convert` finds the images (see `sources`). image_size: side of the papers' views in pixels.
    paper_mean, paper_std: what the papers normalise with; dataset.json holds what was measured. raw_side: images whose
    sides are both at most this are stored as pixels. max_side: larger images are shrunk to it. orientation: what is
    done about that in their EXIF; published numbers are of readers that ignore it.
    """

    about: str
    source: Literal[
        "folder",
        "webdataset",
        "parquet",
        "huggingface",
        "tiny-imagenet",
        "cifar",
        "stl10",
        "svhn",
        "digits",
        "transfer",
    ]
    pretraining: str
    training: str
    evaluation: str
    image_size: int | None
    paper_mean: tuple[float, float, float] | None = None
    paper_std: tuple[float, float, float] | None = None
    raw_side: int = 64
    max_side: int = 512
    orientation: Literal["applied", "ignored"] = "ignored"


# Mean and standard deviation: the official code of self-supervised relational reasoning (Patacchiola & Storkey,
# NeurIPS 2020), which keeps three digits and uses round numbers for STL-10, tiny-ImageNet and SlimageNet64; for
# ImageNet what torchvision and the other papers use.
_CIFAR10 = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
_CIFAR100 = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_QUARTER = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# fmt: off
CATALOG: dict[str, Entry] = {
    "cifar10": Entry(
        "60,000 photos of 32x32 in 10 classes (Krizhevsky 2009); torchvision, downloaded where missing",
        "cifar", "train", "train", "test", 32, *_CIFAR10,
    ),
    "cifar100": Entry(
        "60,000 photos of 32x32 in 100 classes (Krizhevsky 2009); torchvision, downloaded where missing",
        "cifar", "train", "train", "test", 32, *_CIFAR100,
    ),
    "supercifar100": Entry(
        "CIFAR-100 with its 20 coarse labels; torchvision, downloaded where missing",
        "cifar", "train", "train", "test", 32, *_CIFAR100,
    ),
    "stl10": Entry(
        "100,000 unlabeled and 13,000 labelled photos of 96x96 in 10 classes (Coates et al. 2011); torchvision, "
        "downloaded where missing",
        "stl10", "unlabeled", "train", "test", 96, *_HALF, raw_side=96,
    ),
    "tiny-imagenet": Entry(
        "110,000 photos of 64x64 in 200 classes (Stanford CS231n); tiny-imagenet-200.zip, its folder, or a folder",
        "tiny-imagenet", "train", "train", "val", 64, *_QUARTER,
    ),
    "slimagenet64": Entry(
        "SlimageNet64: 200 photos of 64x64 from each class of ImageNet (Antoniou et al. 2020); an image folder",
        "folder", "train", "train", "test", 64, *_QUARTER,
    ),
    "imagenet": Entry(
        "ILSVRC 2012: 1,281,167 and 50,000 photos in 1,000 classes; an image folder with train/ and val/",
        "folder", "train", "train", "val", 224, *_IMAGENET,
    ),
    "svhn": Entry(
        "99,289 house numbers of 32x32 in 10 classes, and 531,131 more as split extra where extra_32x32.mat is there "
        "(Netzer et al. 2011); torchvision, downloaded where missing",
        "svhn", "train", "train", "test", 32,
    ),
    "food101": Entry(
        "101,000 photos of 101 dishes (Bossard et al. 2014); torchvision's food-101/",
        "transfer", "train", "train", "test", 224, *_IMAGENET,
    ),
    "flowers102": Entry(
        "8,189 photos of 102 flowers (Nilsback & Zisserman 2008); torchvision's flowers-102/; trained on train and val",
        "transfer", "trainval", "trainval", "test", 224, *_IMAGENET,
    ),
    "pets": Entry(
        "7,349 photos of 37 breeds of cats and dogs (Parkhi et al. 2012); torchvision's oxford-iiit-pet/",
        "transfer", "trainval", "trainval", "test", 224, *_IMAGENET,
    ),
    "aircraft": Entry(
        "10,000 photos of 100 variants of aircraft (Maji et al. 2013); torchvision's fgvc-aircraft-2013b/; trained on "
        "train and val",
        "transfer", "trainval", "trainval", "test", 224, *_IMAGENET,
    ),
    "cars": Entry(
        "16,185 photos of 196 models of cars (Krause et al. 2013); torchvision's stanford_cars/",
        "transfer", "train", "train", "test", 224, *_IMAGENET,
    ),
    "dtd": Entry(
        "5,640 photos of 47 textures (Cimpoi et al. 2014), the first of its ten divisions; torchvision's dtd/; trained "
        "on train and val",
        "transfer", "trainval", "trainval", "test", 224, *_IMAGENET,
    ),
    "eurosat": Entry(
        "27,000 satellite images of 64x64 in 10 classes (Helber et al. 2019); torchvision's eurosat/; every fifth of a "
        "class is a test image, for it has no splits of its own",
        "transfer", "train", "train", "test", 224, *_IMAGENET,
    ),
    "digits": Entry(
        "scikit-learn's 1,797 handwritten digits of 8x8, enlarged to 32x32 RGB; needs no download",
        "digits", "train", "train", "test", 32,
    ),
}
# fmt: on
OWN_FOLDER = Entry("images of a folder", "folder", "train", "train", "test", None, orientation="applied")
# Images of one's own, by what holds them: names that `convert` takes beside those of the catalog.
OWN_SOURCES: dict[str, Entry] = {
    "folder": OWN_FOLDER,
    "webdataset": replace(OWN_FOLDER, about="images of tar shards (WebDataset)", source="webdataset"),
    "parquet": replace(OWN_FOLDER, about="images of parquet files", source="parquet"),
    "huggingface": replace(OWN_FOLDER, about="images that datasets saved (save_to_disk)", source="huggingface"),
}


class SplitRoles(NamedTuple):
    """Which split serves for what. A name may be absent from the folder: opening it then lists those present."""

    pretraining: str
    training: str
    evaluation: str


def split_roles(name: str, have_labels: Mapping[str, bool]) -> SplitRoles:
    """The splits of data set `name`; have_labels: whether each that was converted has a label of any image. What the
    catalog says where that split is present, else the rule for a folder of one's own: pre-training on unlabeled, else
    train; training on train; evaluation on test, else val. A test split without labels, as those of competitions,
    evaluates nothing."""
    splits_present = [split for split, has_labels in have_labels.items() if has_labels or split != "test"]
    default = SplitRoles(
        pretraining="unlabeled" if "unlabeled" in splits_present else "train",
        training="train",
        evaluation="test" if "test" in splits_present else "val",
    )
    entry = CATALOG.get(name)
    if entry is None:
        return default
    own = (entry.pretraining, entry.training, entry.evaluation)
    return SplitRoles(*(split if split in splits_present else other for split, other in zip(own, default, strict=True)))
