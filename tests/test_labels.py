"""Labels from a CSV file: what is read, what is refused, and where a training uses them."""

import numpy as np
import pytest

from ssl_dist import config, methods
from ssl_dist.data import labels
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from tests.messages import naming

CONFIG = "configs/digits/relational-conv4.yaml"


def written(path, text):
    path.write_text(text)
    return path


def test_a_column_is_read_and_the_rest_is_unknown(tmp_path):
    path = written(tmp_path / "labels.csv", "\ufeffimage_id,label_0,label_1\n3,7,0\n0,2,5\n")  # as spreadsheets write
    assert labels.read(path, 0, 5).tolist() == [2, -1, -1, 7, -1]
    assert labels.read(path, 1, 5).tolist() == [5, -1, -1, 0, -1]
    written(path, "image_id,label_0\r\n\r\n3,7\r\n   \r\n\r\n")
    assert labels.read(path, 0, 4).tolist() == [-1, -1, -1, 7], "blank lines are passed over"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "line 1: must name its columns"),
        ("0,1\n", "line 1: must name its columns"),
        ("image_id\n", "line 1: must name its columns"),
        ("image_id,label\n0,1\n1\n", "line 3: must be 2 whole numbers"),
        ("image_id,label\n0,-1\n", "line 2: must be 2 whole numbers"),
        ("image_id,label\n0,cat\n", "line 2: must be 2 whole numbers"),
        ("image_id,label\n0,1000000\n", "line 2: a label has 6 digits at most"),
        ("image_id,label\n" + "9" * 30 + ",0\n", "line 2: a label has 6 digits at most, an id 18"),
        ("image_id,label\n" + "9" * 5000 + ",0\n", "line 2: a label has 6 digits at most, an id 18"),
        ("image_id,label\n²,0\n", "line 2: must be 2 whole numbers"),
        ("image_id,label\n0,①\n", "line 2: must be 2 whole numbers"),
        ("image_id,label\n0,1\n,\n", "line 3: must be 2 whole numbers"),
        ("image_id,label\n9,0\n", "line 2: image 9 is not in the split's 0..4"),
        ("image_id,label\n1,0\n1,0\n", "line 3: image 1 stands twice"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(text, fault, tmp_path):
    path = written(tmp_path / "labels.csv", text)
    with pytest.raises(UserError) as error:
        labels.read(path, 0, 5)
    assert fault in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_or_column_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv.*cannot be read: No such file"):
        labels.read(tmp_path / "nowhere.csv", 0, 5)
    path = written(tmp_path / "labels.csv", "image_id,label\n0,1\n")
    with pytest.raises(UserError, match=r"data.labels.column = 1: .* has 1 label column"):
        labels.read(path, 1, 5)


def derived(data, tmp_path, text, *more):
    path = written(tmp_path / "labels.csv", text)
    own = [f"data.root={data}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", f"data.labels.file={path}"]
    return derive(config.load(CONFIG, [*own, "optim.batch_size=2", *more]), RankInfo())


def test_a_training_takes_the_labels_of_the_file(digits, tmp_path):
    text = "image_id,label\n" + "".join(f"{i},{i % 3}\n" for i in range(40))
    b = derived(digits, tmp_path, text, "data.subset={per_class: 5}")
    assert b.info.num_classes == 3 and b.split.labelled
    with b.open_reader() as reader:
        assert reader.labels(np.array([4, 5, 41])).tolist() == [1, 2, -1]
    assert "labels" in b.data_identity


def test_a_method_that_needs_labels_needs_all_of_them(digits, tmp_path, monkeypatch):
    text = "image_id,label\n0,1\n1,0\n2,2\n"
    ids = written(tmp_path / "ids.txt", "0\n1\n2\n7\n")
    assert derived(digits, tmp_path, text).info.num_classes == 3, "relational reasoning does not"
    monkeypatch.setattr(methods.find("relational"), "needs_labels", True)
    with pytest.raises(UserError, match=naming("no label", 1, "image 7")):
        derived(digits, tmp_path, text, f"data.subset={ids}")
    written(ids, "0\n1\n2\n")
    assert derived(digits, tmp_path, text, f"data.subset={ids}").info.num_images == 3
