"""The same images in a folder, in tar shards, in parquet and as datasets saves them: each by the library that people
write it with."""

import io
import tarfile

import datasets
import webdataset

datasets.disable_progress_bars()


def folder(root, splits):
    """splits: split -> [(file's bytes, suffix, class)] in the order of classes, as in all that follows."""
    for split, rows in splits.items():
        for i, (data, suffix, label) in enumerate(rows):
            path = root / split / f"class{label}" / f"{i:04d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def shards(root, splits, per_shard=7):
    """By webdataset: a shard has per_shard samples with .cls and .json."""
    root.mkdir()
    for split, rows in splits.items():
        with webdataset.ShardWriter(f"{root}/mine-{split}-%04d.tar", maxcount=per_shard, verbose=0) as writer:
            for i, (data, suffix, label) in enumerate(rows):
                writer.write({"__key__": f"{i:04d}", suffix: data, "cls": label, "json": {"name": f"class{label}"}})
    (root / "classnames.txt").write_text("".join(f"class{i}\n" for i in range(1 + last(splits))))
    return root


def last(splits):
    return max(label for rows in splits.values() for _, _, label in rows)


def table(splits):
    """As load_dataset("imagefolder") makes it."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"class{i}" for i in range(1 + last(splits))])
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [
                    {"image": {"bytes": data, "path": f"{i:04d}.{suffix}"}, "label": label}
                    for i, (data, suffix, label) in enumerate(rows)
                ],
                features=features,
            )
            for split, rows in splits.items()
        }
    )


def parquet(root, splits, parts=2, rows_per_group=5):
    """As push_to_hub does."""
    (root / "data").mkdir(parents=True)
    for split, rows in table(splits).items():
        for part in range(parts):
            path = root / "data" / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            rows.shard(parts, part, contiguous=True).to_parquet(path, batch_size=rows_per_group)
    return root


def saved(root, splits):
    table(splits).save_to_disk(root, num_shards=dict.fromkeys(splits, 2))
    return root


def tar(path, members):
    """By tarfile: members in order, (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
