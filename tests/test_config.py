import operator
import os
import re

import pytest
import yaml

from ssl_dist import config
from ssl_dist.config.section import parse_yaml
from ssl_dist.data.reader import SplitInfo
from ssl_dist.errors import UserError
from ssl_dist.run import blueprint

MINIMAL = "run_dir: runs/a\ndata: {name: cifar10, root: data/cifar10}\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_papers(path):
    settings = config.load(path)
    assert (settings.optim.name, settings.optim.lr, settings.optim.batch_size, settings.optim.epochs) == (
        "adam",
        1e-3,
        64,
        200,
    )
    [group] = settings.views.groups
    assert group.random_resized_crop.scale == (0.08, 1.0)
    assert (group.color_jitter.p, group.color_jitter.hue, group.grayscale, group.horizontal_flip) == (
        0.8,
        0.2,
        0.2,
        0.5,
    )


def test_overrides_are_yaml_scalars(path):
    settings = config.load(path, ["optim.lr=1e-2", "data.limit=12", "views.groups.0.grayscale=1", "data.split=train"])
    assert settings.optim.lr == 0.01 and settings.data.limit == 12 and settings.data.split == "train"
    assert settings.views.groups[0].grayscale == 1 and settings.views.groups[0].horizontal_flip == 0.5


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", "+1e-3", "0.1e-2"])
def test_exponents_are_numbers(path, text):
    assert config.load(path, [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optm.lr=1", ["optm", "did you mean 'optim'"]),
        ("data.limits=3", ["data.limits", "'limit'"]),
        ("optim.lr=-1", ["optim.lr", "-1", "greater than 0"]),
        ("optim.lr=.nan", ["optim.lr", "nan"]),
        ("optim.batch_size=2.5", ["optim.batch_size", "2.5", "integer"]),
        ("optim.batch_size=99999999999999999999", ["optim.batch_size = 99999999999999999999", "1000000000"]),
        ("optim.batch_size=true", ["optim.batch_size = true", "integer"]),
        ("precision=fp8", ["precision", "fp8", "fp64", "fp16"]),
        ("data.view_shards=0", ["data.view_shards", "0", "auto"]),
        ("data.subset={per_class: 3, strt: 4}", ["data.subset.strt", "'start'"]),
        ("views.groups.0.color_jitter.hue=0.7", ["views.groups.0.color_jitter.hue", "0.7", "0.5"]),
        ("views.groups.0.random_resized_crop.scale=[1, 0.5]", ["random_resized_crop.scale", "rise"]),
        ("views.groups.7.num=4", ["views.groups.7", "0..0"]),
        ("views.groups=[]", ["views.groups", "at least 1"]),
        ("views.groups=[{num: 2}, {size: 8}]", ["views.groups[1].num"]),
        ("optim={steps: 10, epochs: 5}", ["optim.epochs", "exactly one"]),
        ("optim.lr", ["optim.lr", "key=value"]),
        ("optim.lr=[", ["optim.lr", "YAML"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=null", ["seed = null"]),
        ("Optim.lr=1", ["unknown key Optim", "'optim'"]),
        ("LR=3", ["unknown key LR"]),
        (".=1", ["unknown key"]),
        ("optim.batch-size=3", ["unknown key optim.batch-size", "'batch_size'"]),
        ("optim={[1]: 2}", ["optim", "line 1"]),
        ("optim.lr=\x01", ["optim.lr", "YAML"]),
        ("run_dir=''", ["run_dir", "''"]),
        ("timeout=1e12", ["timeout", "86400"]),
        ("data.eval_resize=8", ["data.eval_resize", "image_size"]),
        ("data.name=x/y", ["data.name", "x/y"]),
        ("views.normalize={mean: [.nan, 0, 0], std: [1, 1, 1]}", ["views.normalize.mean", "nan"]),
    ],
)
def test_mistakes_get_one_line_with_key_value_and_remedy(path, override, words):
    path.write_text(MINIMAL + "views: {groups: [{num: 2, random_resized_crop: {}, color_jitter: {}}]}\n")
    with pytest.raises(UserError) as raised:
        config.load(path, [override])
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.crop=96", "data.image_size", 96),
        ("lr=0.1", "optim.lr", 0.1),
        ("batch_size=32", "optim.batch_size", 32),
        ("data.batch-size=32", "optim.batch_size", 32),
        ("epochs=3", "optim.epochs", 3),
        ("views.k=4", "views.num", 4),
        ("arch=resnet18", "backbone.name", "resnet18"),
        ("backbone=resnet18", "backbone.name", "resnet18"),
        ("method=simclr", "method.name", "simclr"),
        ("optim.scheduler=cosine", "optim.schedule", "cosine"),
        ("amp=true", "precision", "bf16"),
        ("output_dir=~/x", "run_dir", "~/x"),
    ],
)
def test_words_of_the_field_get_the_key_that_they_mean(path, override, key, value):
    """The remedy, taken as it stands, sets what was meant."""
    with pytest.raises(UserError) as raised:
        config.load(path, [override])
    remedy = re.search(r"write (\S+)$", str(raised.value))[1]
    value = value.replace("~", os.path.expanduser("~")) if isinstance(value, str) else value
    assert operator.attrgetter(key)(config.load(path, [remedy])) == value


def test_what_is_no_key_says_how_it_is_done(path):
    for override, words in (("device=cpu", "CUDA_VISIBLE_DEVICES= before"), ("gpus=2", "torchrun_single.sh 2 CONFIG`")):
        with pytest.raises(UserError, match=f"unknown key .* there is no such key: .*{re.escape(words)}"):
            config.load(path, [override])


def test_a_length_in_steps_replaces_one_in_epochs_and_the_other_way_round(path):
    def lengths(*overrides):
        notes = []
        optim = config.load(path, overrides, notes.append).optim
        return optim.epochs, optim.steps, notes

    assert lengths("optim.steps=10") == (None, 10, [])  # in place of a default
    assert lengths("optim={steps: 10}") == (None, 10, [])
    path.write_text(MINIMAL + "optim: {epochs: 30}\n")
    assert lengths("optim.steps=10") == (None, 10, ["optim.steps=10 takes the place of optim.epochs: 30"])
    assert lengths("optim.steps=10", "optim.epochs=null") == (None, 10, [])
    path.write_text(MINIMAL + "optim: {steps: 30}\n")
    assert lengths() == (None, 30, [])
    assert lengths("optim.epochs=4") == (4, None, ["optim.epochs=4 takes the place of optim.steps: 30"])
    with pytest.raises(UserError, match="exactly one"):
        lengths("optim.steps=4", "optim.epochs=4")


def test_another_image_size_keeps_the_share_that_evaluation_sees(path):
    def sizes(*overrides):
        notes = []
        data = config.load(path, overrides, notes.append).data
        return data.image_size, data.eval_resize, len(notes)

    assert sizes("data.image_size=96") == (96, None, 0)
    for text in ("data: {image_size: 224}", "views: {groups: [{num: 1, size: 224}, {num: 1, size: 96}]}"):
        data = "image_size: 224, eval_resize: 256}" if "image" in text else "eval_resize: 256}"
        path.write_text(MINIMAL.replace("}", f", {data}") + (text if "views" in text else ""))
        assert sizes() == (224, 256, 0)
        assert sizes("data.image_size=96") == (96, 110, 1) and sizes("data.image_size=288") == (288, 329, 1)
        assert sizes("data.image_size=96", "data.eval_resize=256") == (96, 256, 0)
        assert sizes("data.image_size=224") == (224, 256, 0)
        assert sizes("data={name: x, root: y, image_size: 8, eval_resize: 9}") == (8, 9, 0)
    assert sizes("views.groups.0.size=112") == (112, 128, 1)


def test_missing_key_is_named(path):
    path.write_text("run_dir: runs/a\ndata: {name: cifar10}\n")
    with pytest.raises(UserError, match=re.escape("missing key data.root")):
        config.load(path)


def test_merged_keys():
    """`<<: *alias`, whose keys stand behind those that are written out."""
    text = "a: &x {s: 1, t: 2}\nb: {<<: *x, s: 3}\nc: {t: 9, <<: [{u: '='}, *x]}\nd: &d {<<: *x, s: 4}\ne: {<<: *d}"
    assert parse_yaml(text, "text") == {
        "a": {"s": 1, "t": 2}, "b": {"s": 3, "t": 2}, "c": {"u": "=", "s": 1, "t": 9}, "d": {"s": 4, "t": 2},
        "e": {"s": 4, "t": 2},
    }  # fmt: skip
    for wrong, message in (("a: {<<: 3}", "merging"), ("x: &x {a: 1, a: 2}\ny: {<<: *x}", "line 1: key 'a' stands tw")):
        with pytest.raises(UserError, match=message):
            parse_yaml(wrong, "text")


def test_a_home_is_meant_by_a_tilde(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path.write_text("run_dir: ~/runs/a\ndata: {name: cifar10, root: ~/data, subset: ~/ids.txt}\n")
    settings = config.load(path, ["backbone.weights=~/w.pth", "data.labels={file: ~/labels.csv}"])
    found = settings.run_dir, settings.data.root, settings.data.subset, settings.backbone.weights
    assert (*found, settings.data.labels.file) == tuple(
        f"/home/me/{name}" for name in ("runs/a", "data", "ids.txt", "w.pth", "labels.csv")
    )


def test_numbers_beyond_float32_are_refused(path):
    path.write_text(MINIMAL)
    with pytest.raises(UserError, match=r"optim\.lr = 1e.300: .*less than or equal to"):
        config.load(path, ["optim.lr=1e300"])
    with pytest.raises(UserError, match=r"optim\.lr: 1e.39 for a batch of 10 is above 1e.38; lower it"):
        config.load(path, ["optim.lr=1e38", "optim.lr_batch=1", "optim.batch_size=10"])


def test_a_key_that_stands_twice_is_refused(path):
    path.write_text(MINIMAL + "seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"line 4.*'seed' stands twice"):
        config.load(path)


@pytest.mark.parametrize("text", ["- 1\n", "just text\n", "a: [\n", "!!python/object/apply:os.getcwd []\n"])
def test_files_that_are_no_config(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        config.load(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(UserError, match=re.escape("binary.yaml")):
        config.load(tmp_path / "binary.yaml")


def test_dump_is_complete_and_loads_to_the_same(path, tmp_path):
    settings = config.load(path, ["views.normalize={mean: [0, 0, 0], std: [1, 1, 1]}", "data.subset={per_class: 2}"])
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(settings))
    assert config.load(again) == settings
    assert set(yaml.safe_load(config.dump(settings))) == set(config.Config.model_fields)


def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_the_remedy(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("seed: 1  # größer".encode("latin-1"))
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "latin.yaml", "not a text file")):
        with pytest.raises(UserError) as caught:
            config.load(path)
        assert str(caught.value) == f"config {path}: cannot be read: {reason}; configs/ holds examples"


def test_a_normalisation_of_pixels_in_0_to_255_is_refused_and_the_remedy_helps(path):
    """Such constants would leave images all but constant."""
    split = SplitInfo("x", "train", 1, (), 1, 1, False, (0.5,) * 3, (0.2,) * 3, "")

    def constants(words):
        return blueprint.normalization(config.load(path, [f"views.normalize={words}"]), split)

    for words in (
        "{mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375]}",
        "{mean: [0, 0, 0], std: [255, 255, 255]}",
    ):
        with pytest.raises(UserError, match=r"views\.normalize = .* pixels in 0\.\.255") as caught:
            constants(words)
        assert constants(str(caught.value).rpartition("it is ")[2]).std[0] in (0.229, 1)
    assert constants("{mean: [0, 0, 0], std: [1, 1, 1]}") == constants("none")
