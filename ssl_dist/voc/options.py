"""The options of the tasks on PASCAL VOC. Apart from the tasks, which need packages that take a second."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ssl_dist.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section

COSTS = sorted([2.0**power for power in range(-19, -3)] + [10.0**power for power in range(-7, 3)])
OUTPUT = "output"


class TrainingOptions(Section):
    """The options that the trained tasks share; defaults are each task's own."""

    RATE_DECAY: ClassVar = 0.1  # factor of the rate at a milestone
    MAX_GRADIENT_NORM: ClassVar[float | None] = None
    seed: NonNegativeInt = Field(0, description="of new layers, the order of images, augmentation and sampling")
    steps: PositiveInt = Field(description="length of the training in optimizer steps")
    batch_size: PositiveInt = Field(16, description="images in a step")
    lr: PositiveFloat = Field(description="learning rate at its highest")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    weight_decay: NonNegativeFloat = Field(1e-4, description="of all but BatchNorm")
    warmup_steps: NonNegativeInt = Field(0, description="linear rise of the rate from 0")
    milestones: list[Probability] = Field(description="shares of the training after which the rate falls to a tenth")
    log_every: PositiveInt = Field(20, description="steps between two lines of metrics.jsonl and TensorBoard")
    workers: PositiveInt | None = Field(None, description="threads that read images; null: the cores there are")


class TransferOptions(TrainingOptions):
    norm: Literal["batch", "frozen"] = Field(
        "batch", description="BatchNorm of the backbone: trained on the batch's statistics, or left as pre-trained"
    )
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = Field(
        0, description="0 trains all; 1 keeps the stem (AlexNet: conv1), 2 layer1 (conv2) too, ..."
    )


class ClassificationOptions(Section):
    """Classification: a linear SVM for every class on frozen features, mean average precision (Goyal et al. 2019)."""

    IMAGE_SET: ClassVar = "Main"
    train_split: str = Field("trainval", description="list of images to train on, a file of ImageSets")
    test_split: str = Field("test", description="list of images to test on")
    layer: str = Field(OUTPUT, description="output, or a stage of the backbone")
    size: Annotated[int, Field(ge=8, le=4096)] = Field(224, description="side of the network's input in pixels")
    resize: Annotated[int, Field(ge=8, le=4096)] = Field(256, description="short side before that")
    crop: Literal["whole", "centre"] = Field("whole", description="all of the image, squeezed, or its centre")
    costs: Annotated[list[PositiveFloat], Field(min_length=1)] = Field(COSTS, description="to choose from")
    folds: Annotated[int, Field(ge=2, le=100)] = Field(3, description="of the cross-validation that chooses a cost")
    max_iter: PositiveInt = Field(2000, description="of LIBLINEAR")
    workers: PositiveInt | None = Field(None, description="threads that read images and fit; null: the cores there are")

    @model_validator(mode="after")
    def _crop(self) -> "ClassificationOptions":
        if self.resize < self.size:
            raise ValueError(f"resize: {self.resize} is below the size of the crop, {self.size}")
        return self


class FinetuneOptions(TrainingOptions):
    """Classification by fine-tuning with BatchNorm's statistics left as pre-trained, as DeepCluster's PyTorch code and
    SeLa do it (Caron et al. 2018, eval_voc_classif.py).
    """

    IMAGE_SET: ClassVar = "Main"
    RATE_DECAY: ClassVar = 0.5
    MAX_GRADIENT_NORM: ClassVar = 10.0
    train_split: str = Field("trainval", description="list of images to train on, a file of ImageSets")
    test_split: str = Field("test", description="list of images to test on")
    steps: PositiveInt = 80000
    lr: PositiveFloat = 0.003
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    milestones: list[Probability] = Field(
        [number / 16 for number in range(1, 16)],
        description="shares of the training after which the rate falls to a half",
    )
    trained: Literal["all", "classifier"] = Field(
        "all", description="classifier: AlexNet's fc6 to fc8, of other backbones the new linear layer alone"
    )
    train_batchnorm: bool = Field(
        False,
        description="with trained=classifier: BatchNorm's scale and shift too (DeepCluster: 72.0, not 70.4)",
    )
    size: Annotated[int, Field(ge=8, le=4096)] = Field(224, description="side of the network's input in pixels")
    scale: tuple[Probability, Probability] = Field((0.1, 0.5), description="of a random crop, shares of the area")
    test_crops: Literal["random", "fixed"] = Field(
        "random", description="ten as in training, or centre, corners and their mirror images"
    )


class DetectionOptions(TransferOptions):
    """Detection: torchvision's Faster R-CNN (Ren et al. 2015) on a pre-trained backbone, fine-tuned, counted as VOC
    counts.
    """

    IMAGE_SET: ClassVar = "Main"
    train_split: str = Field("trainval", description="list of images to train on, a file of ImageSets")
    test_split: str = Field("test", description="list of images to test on")
    steps: PositiveInt = 24000
    lr: PositiveFloat = 0.02
    warmup_steps: NonNegativeInt = 100
    milestones: list[Probability] = Field([0.75, 11 / 12])
    min_sizes: Annotated[list[Annotated[int, Field(ge=32, le=4096)]], Field(min_length=1)] = Field(
        list(range(480, 801, 32)), description="short sides in pixels, of which one is drawn for an image of training"
    )
    test_size: Annotated[int, Field(ge=32, le=4096)] = Field(800, description="short side of test images")
    max_size: PositiveInt = Field(1333, description="longest side: no image is enlarged or left beyond it")
    statistics_steps: NonNegativeInt = Field(
        200, description="batches from which BatchNorm's statistics are taken after the training; 0: the running ones"
    )
    boxes_per_image: PositiveInt = Field(512, description="proposals of an image that the head learns from; memory")


class SegmentationOptions(TransferOptions):
    """Segmentation: torchvision's fully convolutional network (Long et al. 2015) on a pre-trained backbone,
    fine-tuned.
    """

    IMAGE_SET: ClassVar = "Segmentation"
    train_split: str = Field("train", description="list of images to train on, a file of ImageSets")
    test_split: str = Field("val", description="list of images to test on")
    steps: PositiveInt = 30000
    lr: PositiveFloat = 0.003
    milestones: list[Probability] = Field([0.7, 0.9])
    crop: Annotated[int, Field(ge=32, le=4096)] = Field(513, description="side of a training crop in pixels")


OF_TASK: dict[str, type[Section]] = {
    "classification": ClassificationOptions,
    "finetune": FinetuneOptions,
    "detection": DetectionOptions,
    "segmentation": SegmentationOptions,
}
