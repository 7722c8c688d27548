"""Images in tars, read in any order and by any process."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import write_tar

from linvit.data.decode import UnreadableImage
from linvit.data.sources import tar
from linvit.data.sources.base import PackedStrings
from linvit.data.sources.tar import ImageShards, open_shards
from linvit.data.sources.tarindex import ShardIndex


def opened(paths: list[Path], **settings: Any) -> ImageShards:
    settings = {"split": "train", "class_file": paths[0].with_name("classes.txt")} | settings
    return open_shards(paths, **settings)


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Three tars of twenty files each, which contain their own numbers."""
    return [
        write_tar(
            tmp_path / f"train-{shard}.tar",
            {f"n{image % 2}/{image:02d}.jpg": b"%d %d " % (shard, image) * (image + 1) for image in range(20)},
        )
        for shard in range(3)
    ]


def expected(index: int) -> bytes:
    shard, image = divmod(index, 20)
    return b"%d %d " % (shard, image) * (image + 1)


def test_every_image_is_read_from_its_place(tars: list[Path]) -> None:
    images = opened(tars)
    assert len(images) == 60
    for index in np.random.default_rng(0).permutation(60).tolist():
        assert images.read_bytes(index) == expected(index)
        assert images.label(index) == index % 2
    assert images.class_names == ["n0", "n1"]
    assert pickle.loads(pickle.dumps(images)).read_bytes(33) == expected(33)
    assert images.path(21) == tars[1] / "n1" / "01.jpg"


def test_more_tars_than_may_be_open(tars: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_open", tar.lru_cache(maxsize=1)(tar._open.__wrapped__))
    images = opened(tars)
    for index in (0, 20, 40, 1, 21, 41):
        assert images.read_bytes(index) == expected(index)


def read_all(images: ImageShards, order: list[int]) -> bool:
    return all(images.read_bytes(index) == expected(index) for index in order)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_parallel_readers_do_not_disturb_each_other(kind: str, tars: list[Path]) -> None:
    images = opened(tars)
    # The file is open before the processes are forked, so they inherit it.
    assert images.read_bytes(5) == expected(5)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(60).tolist() * 30 for _ in range(4)]
    fork = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(4) if kind == "threads" else ProcessPoolExecutor(4, mp_context=fork) as pool:
        assert all(pool.map(read_all, [images] * 4, orders))


def test_an_unreadable_image_is_named_by_tar_and_member(tars: list[Path], tmp_path: Path) -> None:
    images = opened(tars)
    data = tars[0].read_bytes()
    tars[0].write_bytes(data[:2000])
    assert images.read_bytes(0) == expected(0)
    with pytest.raises(UnreadableImage, match=r"train-0\.tar/n1/19\.jpg: the tar is now shorter"):
        images.read_bytes(19)
    with pytest.raises(UnreadableImage, match=r"train-1\.tar/n0/04\.jpg: is truncated, damaged or"):
        images.read(24)
    tars[2].unlink()
    with pytest.raises(UnreadableImage, match=r"train-2\.tar/n0/00\.jpg: cannot be read"):
        images.read_bytes(40)


def test_one_tar_per_class(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", {"1.jpg": b"x", "./2.jpg": b"y"}) for name in ("n01", "n02")]
    images = opened(paths)
    assert images.class_names == ["n01", "n02"]
    assert images.labels == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("train-007.tar", {"1.jpg": b"x"}),
        ("train.tar", {"1.jpg": b"x"}),
        ("dog.tar", {"2.jpg": b"x", "2.cls": b"1", "1.jpg": b"x"}),
        ("dog.tar", {"a/2.jpg": b"x", "1.jpg": b"x"}),
    ],
)
def test_an_image_without_a_label_is_named(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}/1\.jpg: has no label; add a file of the same name with the extension \.cls"
    ):
        opened([write_tar(tmp_path / name, files)])


def test_numeric_labels(tmp_path: Path) -> None:
    files = {f"{number}.{kind}": b"%d" % number for number in (2, 10, 0) for kind in ("jpg", "cls")}
    path = write_tar(tmp_path / "train.tar", files)
    images = opened([path])
    assert images.class_names == ["0", "2", "10"]
    assert images.labels == [1, 2, 0]
    assert "labels are numbers" in images.note
    (tmp_path / "classes.txt").write_text("".join(f"class {number}\n" for number in range(11)))
    named = opened([path], class_names=["class 10", "class 2", "class 0"])
    assert named.labels == [1, 0, 2]


def test_classes_are_checked_as_in_other_sources(tars: list[Path]) -> None:
    with pytest.raises(ValueError, match="'n0' is not among the 1 known classes"):
        opened(tars, class_names=["n1"])
    with pytest.raises(ValueError, match="no images of 'n2'"):
        opened(tars, class_names=["n2", "n1", "n0"])
    assert opened(tars, class_names=["n2", "n1", "n0"], missing_classes="allow").labels[:2] == [2, 1]


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images in the 1 tars of 'train'"):
        opened([write_tar(tmp_path / "x.tar", {"a/readme.md": b"x"})])


def test_pickled_shards_are_small() -> None:
    count = 20_000
    images = ImageShards(
        Path("/data"),
        split="train",
        shards=["train-000.tar"],
        index=ShardIndex(
            names=PackedStrings.pack(f"n01440764_{index:05d}.jpg" for index in range(count)),
            shards=np.zeros(count, np.int32),
            offsets=np.arange(count),
            sizes=np.ones(count, np.int64),
            labels=["a"],
            codes=np.zeros(count, np.int32),
        ),
        class_names=["a"],
        labels=np.zeros(count, np.int64),
    )
    data = pickle.dumps(images)
    assert len(data) < 64 * count
    assert pickle.loads(data).path(123) == Path("/data/train-000.tar/n01440764_00123.jpg")
