"""The model card of an exported run: README.md as the Hugging Face hub shows it. It says what the run knows, and no
more: a licence, say, is the owner's to add.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from ssl_dist import methods, results
from ssl_dist.config import to_tree
from ssl_dist.export.folders import WEIGHTS, is_of_timm
from ssl_dist.export.libraries import OF_TORCHVISION, timm, torchvision
from ssl_dist.export.preprocessing import preprocessing
from ssl_dist.export.trained import Trained
from ssl_dist.storage import hub

HERE = "FOLDER"  # in the lines that load it: wherever the folder lies


def card(trained: Trained) -> bytes:
    """The card, in Markdown with YAML before it."""
    config = trained.config
    title = f"{trained.backbone}, {config.method.name} on {config.data.name}"
    front = {
        "library_name": "timm" if is_of_timm(trained.backbone) else "ssl_dist",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", *(["self-supervised-learning"] if _is_unlabelled(trained) else [])],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {title}",
        f"A network that makes {trained.feature_dim} features of an image, without a classifier. {_origin(trained)}",
        "## Training",
        _table(("", ""), _training(trained)),
        "## Results",
        _results(trained),
        "## Images",
        _images(trained),
        "## Load it",
        _loading(trained),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _is_unlabelled(trained: Trained) -> bool:
    """Whether it is known that no label was ever used."""
    method = methods.find(trained.config.method.name)
    return method.trainable and not method.needs_labels and trained.config.backbone.weights is None


def _origin(trained: Trained) -> str:
    """A sentence on what made the weights."""
    method = methods.find(trained.config.method.name)
    if not method.trainable:
        return f"Its weights are {_start(trained).replace('weights of', 'those of')}; nothing was trained after that."
    return f"It was trained {'with' if method.needs_labels else 'without'} labels, from {_start(trained)}."


def _start(trained: Trained) -> str:
    """What the training began from; of a file its name, not where it lay."""
    given = trained.config.backbone.weights
    if given is None:
        return "random weights"
    name = given if hub.is_name(given) else Path(given).name
    return f"weights of {name} (SHA-256 {trained.state['data'].get('weights', 'not recorded')})"


def _training(trained: Trained) -> list[tuple[str, str]]:
    """Names and values of what the checkpoint records of the training."""
    config, state, info = trained.config, trained.state, trained.state["info"]
    optim, data = config.optim, state["data"]
    options = to_tree(methods.build_options(methods.find(config.method.name), config.method.options))
    views = ", ".join(f"{number} of {size} px" for number, size in info["view_groups"])
    split = "" if config.data.split is None else f", split {config.data.split}"
    epochs = state["step"] / info["steps_per_epoch"]
    rows = [
        ("data set", f"{config.data.name}{split}: {info['num_images']} images"),
        ("its split", f"SHA-256 {data['split']}"),
        ("backbone", f"{trained.backbone}, {sum(p.numel() for p in trained.encoder.module.parameters()):,} parameters"),
        ("method", config.method.name),
        ("its options", ", ".join(f"{key}: {_word(value)}" for key, value in options.items())),
        ("views of an image (K)", views),
        ("batch", f"{info['batch_size']} images"),
        ("length", f"step {state['step']} (epoch {epochs:.4g} of {info['total_epochs']:.4g})"),
        ("optimizer", f"{optim.name}, learning rate {optim.peak_lr:g}, schedule {optim.schedule}, "
                      f"weight decay {optim.weight_decay:g}"),
        ("precision", config.precision),
        ("seed", str(config.seed)),
        ("began from", _start(trained)),
        ("processes", str(state["world_size"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in state["versions"].items())),
        ("checkpoint", f"SHA-256 {trained.encoder.sha256}"),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def _word(value: object) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _results(trained: Trained) -> str:
    """The numbers that results.json has of this checkpoint, measured on whole splits, each with its protocol."""
    file = trained.encoder.file
    run = file.parents[1] if file.parent.name == "checkpoints" else file.parent
    records = [
        record
        for record in results.read(run / "results.json")
        if record["checkpoint"] == trained.encoder.sha256 and results.is_of_a_whole_split(record)
    ]
    if not records:
        return "None was measured of this checkpoint (`ssl-dist evaluate`)."
    shown = [each for each in records if not (each["name"].endswith("_converged") and each["value"] == 1)]
    protocols = [*dict.fromkeys(record["protocol"] for record in shown)]
    rows = [
        (
            results.label(record),
            _value(record),
            f"{record['dataset']}, {record['split']}",
            f"[{protocols.index(record['protocol']) + 1}]",
        )
        for record in shown
    ]
    notes = "\n".join(f"{number}. {_cell(protocol)}" for number, protocol in enumerate(protocols, 1))
    return f"{_table(('result', 'value', 'data set, split', 'protocol'), rows)}\n\n{notes}"


def _value(record: dict) -> str:
    return "NOT CONVERGED" if record["name"].endswith("_converged") else results.number(record["value"])


def _images(trained: Trained) -> str:
    steps, channels = preprocessing(trained.encoder), trained.encoder.channels
    text = (
        f"{'RGB' if channels == 3 else f'{channels} channels'}, upright by their EXIF orientation; the short side "
        f"resized to {steps['resize']} px ({steps['interpolation']}, antialiased), the centre of {steps['crop']} px, "
        f"then (pixel / 255 - mean) / std (of 16 bits pixel / 65535) with mean {steps['mean']} and std {steps['std']}. "
        "`preprocessing.json` has the same."
    )
    if channels != 3:
        return text
    code = ["from torchvision import transforms", "", f"transform = {steps['torchvision']}"]
    return f"{text} With torchvision, of PIL images in RGB:\n\n{_python(code)}"


def _loading(trained: Trained) -> str:
    """Code for ssl_dist, for timm where it has the network, and for plain torch."""
    name, channels, file = trained.backbone, trained.encoder.channels, f"{HERE}/{WEIGHTS}"
    ours = ["import ssl_dist", "", f'model = ssl_dist.load("{HERE}")', "features = model.embed(images)"]
    ours[-1] += f"  # {'PIL images, ' * (channels == 3)}a folder or arrays, which are prepared as above"
    parts = [f"With ssl_dist:\n\n{_python(ours)}"]
    if is_of_timm(name):
        lines = [
            "import timm", "",
            f'model = timm.create_model("local-dir:{HERE}", pretrained=True, num_classes=0).eval()',
        ]  # fmt: skip
        lines += [
            "settings = timm.data.resolve_model_data_config(model)",
            "transform = timm.data.create_transform(**settings, is_training=False)",
            "features = model(transform(image)[None])",
        ] if channels == 3 else [f"features = model(images)  # normalised, [N, {channels}, S, S]"]  # fmt: skip
        parts.append(f"With timm:\n\n{_python(lines)}")
    if name in OF_TORCHVISION and channels == 3:
        plain = ["import safetensors.torch", "import torch", "import torchvision", ""]
        plain += torchvision(trained, file)[1].split("; ")
    elif is_of_timm(name):
        plain = ["import safetensors.torch", "import timm", "", *timm(trained, file)[1].split("; ")]
    else:
        plain = ["import safetensors.torch", "", "from ssl_dist import backbones", ""]
        other = "" if trained.encoder.channels == 3 else f", in_channels={trained.encoder.channels}"
        plain += [f"model = backbones.build({name!r}{other})  # its code; the tensors are by its names"]
        plain += [f"model.load_state_dict(safetensors.torch.load_file({file!r}))"]
    plain += [f"features = model.eval()(images)  # normalised, [N, {channels}, S, S]"]
    parts.append(f"With torch:\n\n{_python(plain)}")
    return "\n\n".join(parts)


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
