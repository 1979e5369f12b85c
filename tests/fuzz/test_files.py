"""Files of every kind that a source reads, damaged: the sample is replaced and named, or a sentence ends the command.

`make fuzz` tries more of them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.decoding import BadSample
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources.annotated_files import DepthFiles, NormalFiles, SegmentationFiles
from src.datamodules.sources.captioned_files import CaptionListSource, CocoCaptionsSource, KarpathySource
from src.datamodules.sources.coco_detection import CocoDetectionSource
from src.datamodules.sources.huggingface import HuggingFaceSource
from src.datamodules.sources.image_folder import ImageFolderSource
from src.datamodules.sources.source import Source, Split
from src.datamodules.sources.video_folder import VideoFolderSource
from src.datamodules.sources.video_list import KineticsSource, SomethingSomethingSource, VideoListSource
from src.datamodules.sources.voc import VOCSource
from src.datamodules.sources.webdataset import CaptionedWebDatasetSource, WebDatasetSource
from src.datamodules.views.depth import DepthView
from src.datamodules.views.detection import DetectionView
from src.datamodules.views.image import RandomResizedCrop
from src.datamodules.views.normals import NormalsView
from src.datamodules.views.segmentation import SegmentationView
from src.datamodules.views.video import DenseClip, RandomSquare, RandomVideoCrop
from src.datamodules.views.view import View
from src.errors import UserError
from tests.fuzz.cases import count, seed

HEIGHT, WIDTH, COUNT = 12, 16, 4
LONGEST = 60  # seconds of one source


def pixels(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def image(path: Path, number: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path, **options)
    return path


def images(root: Path) -> list[Path]:
    kinds = ("jpg", "png", "webp", "gif", "tif", "bmp", "ppm", "jp2")
    return [image(root / "train" / f"{number % 2}" / f"{number}.{kind}", number) for number, kind in enumerate(kinds)]


def truths(root: Path, ending: str, content: Callable[[int], np.ndarray]) -> list[Path]:
    files = []
    for number in range(COUNT):
        image(root / f"images/{number}.png", number)
        file = root / f"truth/{number}.{ending}"
        file.parent.mkdir(exist_ok=True)
        if ending == "npy":
            np.save(file, content(number))
        else:
            Image.fromarray(content(number)).save(file)
        files.append(file)
    return files


def shards(root: Path) -> list[Path]:
    with tarfile.open(root / "0.tar", "w") as tar:
        for number in range(COUNT):
            encoded = io.BytesIO()
            Image.fromarray(pixels(number)).save(encoded, "PNG")
            for ending, data in (("png", encoded.getvalue()), ("cls", b"1"), ("txt", b"a text"), ("json", b'{"a": 1}')):
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [root / "0.tar"]


def captions(root: Path, ending: str) -> list[Path]:
    names = [image(root / f"{number}.png", number).name for number in range(COUNT)]
    file = root / f"list.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps({"image": name, "caption": ["a", "b"]}) + "\n" for name in names))
    else:
        with file.open("w", newline="") as text:
            rows = csv.writer(text, delimiter="\t" if ending == "tsv" else ",")
            rows.writerows([["image", "caption"], *([name, 'a "text", and more'] for name in names)])
    return [file]


def coco(root: Path) -> list[Path]:
    entries = [
        {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in range(COUNT)
    ]
    outlines: list[Any] = [[[3, 2, 9, 2, 9, 8]], {"counts": [20, 5, HEIGHT * WIDTH - 25], "size": [HEIGHT, WIDTH]}]
    things = [
        {
            "image_id": number,
            "category_id": 7,
            "bbox": [1, 1, 9, 8],
            "segmentation": outlines[number % 2],
            "caption": "a text",
            "iscrowd": 0,
        }
        for number in range(COUNT)
    ]
    for number in range(COUNT):
        image(root / f"{number}.png", number)
    content = {"images": entries, "annotations": things, "categories": [{"id": 7, "name": "a"}]}
    (root / "list.json").write_text(json.dumps(content))
    return [root / "list.json"]


def karpathy(root: Path) -> list[Path]:
    listed = [
        {"filename": image(root / f"{number}.png", number).name, "split": "train", "sentences": [{"raw": "a text"}]}
        for number in range(COUNT)
    ]
    (root / "list.json").write_text(json.dumps({"images": listed}))
    return [root / "list.json"]


def voc(root: Path) -> list[Path]:
    year = root / "VOC"
    (year / "Annotations").mkdir(parents=True)
    (year / "ImageSets/Main").mkdir(parents=True)
    (year / "ImageSets/Main/train.txt").write_text("\n".join(map(str, range(COUNT))))
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    files = []
    for number in range(COUNT):
        image(year / f"JPEGImages/{number}.jpg", number)
        files.append(year / f"Annotations/{number}.xml")
        files[-1].write_text(f"<annotation><object><name>dog</name>{box}</object></annotation>")
    return [*files, year / "ImageSets/Main/train.txt"]


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".avi": "mpeg4", ".webm": "libvpx"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            frame = np.full((32, 32, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def videos(root: Path) -> list[Path]:
    return [video(root / f"train/{kind}/a.{kind}") for kind in ("mp4", "mkv", "avi", "ts")]


def video_lists(root: Path) -> list[Path]:
    video(root / "a_000001_000002.mp4")
    shutil.copy(root / "a_000001_000002.mp4", root / "1.webm")
    (root / "list.txt").write_text("a_000001_000002.mp4 0\n" * 3)
    (root / "list.csv").write_text("label,youtube_id,time_start,time_end\n" + "x,a,1,2\n" * 3)
    (root / "list.json").write_text(json.dumps([{"id": "1", "template": "x [y]"}]))
    (root / "labels.json").write_text(json.dumps({"x y": "0"}))
    return [root / name for name in ("list.txt", "list.csv", "list.json", "labels.json")]


def parquet(root: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(COUNT):
        encoded = io.BytesIO()
        Image.fromarray(pixels(number)).save(encoded, "PNG")
        rows.append({"image": {"bytes": encoded.getvalue(), "path": None}, "label": number % 2})
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    return [root / "a.parquet"]


class Kind(NamedTuple):
    """Files of a kind, and the sources that read them."""

    make: Callable[[Path], list[Path]]  # writes them into a folder, and returns those that are damaged
    sources: Sequence[Callable[[Split, Path], Source]]
    view: View


IMAGES = RandomResizedCrop(8)
CLIPS = RandomVideoCrop(DenseClip(4, 2), RandomSquare(8))
SPLIT_FILES: Any = {"train": "list.json"}


def annotated(source: Any, **options: Any) -> Callable[[Split, Path], Source]:
    return lambda split, root: source(split, root=root, images={split: "images"}, **options)


KINDS = {
    "images": Kind(images, [lambda split, root: ImageFolderSource(split, root=root)], IMAGES),
    "masks": Kind(
        partial(truths, ending="png", content=lambda number: pixels(number)[..., 0] % 3),
        [annotated(SegmentationFiles, masks={"train": "truth", "val": "truth"}, classes=3)],
        SegmentationView(),
    ),
    "depths": Kind(
        partial(truths, ending="png", content=lambda number: pixels(number)[..., 0].astype(np.uint16) * 20 + 1),
        [annotated(DepthFiles, depths={"train": "truth", "val": "truth"})],
        DepthView(),
    ),
    "arrays": Kind(
        partial(truths, ending="npy", content=lambda number: pixels(number)[..., 0] / np.float32(50) + np.float32(1)),
        [annotated(DepthFiles, depths={"train": "truth", "val": "truth"})],
        DepthView(),
    ),
    "normals": Kind(
        partial(truths, ending="npy", content=lambda number: np.tile(np.float32([0, 0.6, -0.8]), (HEIGHT, WIDTH, 1))),
        [annotated(NormalFiles, normals={"train": "truth", "val": "truth"})],
        NormalsView(),
    ),
    "shards": Kind(
        shards,
        [
            lambda split, root: WebDatasetSource(split, shards=f"{root}/*.tar", cache_dir=root / "cache"),
            lambda split, root: CaptionedWebDatasetSource(split, shards=f"{root}/*.tar", text="txt"),
            lambda split, root: CaptionedWebDatasetSource(split, shards=f"{root}/*.tar", text="json", text_key="a"),
        ],
        IMAGES,
    ),
    **{
        ending: Kind(
            partial(captions, ending=ending),
            [lambda split, root, ending=ending: CaptionListSource(split, root=root, files=f"list.{ending}")],  # type: ignore[misc]
            IMAGES,
        )
        for ending in ("csv", "tsv", "jsonl")
    },
    "coco captions": Kind(
        coco,
        [lambda split, root: CocoCaptionsSource(split, root=root, annotations="list.json", images="")],
        IMAGES,
    ),
    "coco objects": Kind(
        coco,
        [lambda split, root: CocoDetectionSource(split, root=root, annotations="list.json", images="", empty=True)],
        DetectionView(masks=True),
    ),
    "karpathy": Kind(karpathy, [lambda split, root: KarpathySource(split, root=root, annotations="list.json")], IMAGES),
    "voc": Kind(
        voc,
        [lambda split, root: VOCSource(split, root=root, sets={"train": "VOC/ImageSets/Main/train.txt"})],
        DetectionView(),
    ),
    "videos": Kind(videos, [lambda split, root: VideoFolderSource(split, root=root)], CLIPS),
    "video lists": Kind(
        video_lists,
        [
            lambda split, root: VideoListSource(split, root=root, files={"train": "list.txt", "val": "list.txt"}),
            lambda split, root: KineticsSource(
                split,
                root=root,
                files={"train": "list.csv", "val": "list.csv"},
                paths=["{youtube_id}_{time_start:06d}_{time_end:06d}.mp4"],
            ),
            lambda split, root: SomethingSomethingSource(
                split, root=root, files={"train": "list.json", "val": "list.json"}, labels="labels.json", videos="."
            ),
        ],
        CLIPS,
    ),
    "parquet": Kind(
        parquet,
        [lambda split, root: HuggingFaceSource(split, path=root, cache_dir=root.parent / "hf", val_share=0.5)],
        IMAGES,
    ),
}
SLOW = ("parquet",)  # the library copies a table before it is read


def damage(file: Path, how: str, draw: random.Random) -> None:
    """Damages a file."""
    data = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(data[: draw.randrange(len(data))])
    elif how == "flips":
        for _ in range(draw.choice((1, 2, 8, 32))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
    elif how == "zeros":
        start = draw.randrange(len(data))
        file.write_bytes(data[:start] + bytes(len(data) - start))
    elif how == "twice":
        start = draw.randrange(len(data))
        file.write_bytes(data[:start] + data)
    elif how == "other":
        file.write_bytes(draw.randbytes(draw.randrange(1, 4096)))
    else:
        file.unlink()
        {"pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path.name), "folder": Path.mkdir}[how](file)


CONTENT = ("cut", "flips", "flips", "zeros", "twice", "other")
PLACES = ("pipe", "loop", "folder")


def read(kind: Kind, root: Path) -> str:
    """Reads all samples of all splits, as training does. Returns "" if each ends well, as a replaced sample or with one
    sentence; else what went wrong: a trace, or a hang."""
    for make in kind.sources:
        for split in ("train", "val"):
            try:
                with at_most(LONGEST):
                    read_split(make(split, root), kind.view, root.parent / "bad_samples.tsv")  # type: ignore[arg-type]
            except (UserError, BadSample) as problem:
                if not str(problem).strip() or "\n" in str(problem):
                    return f"no sentence: {problem!r}"
            except Hang:
                return f"no end within {LONGEST} s"
            except Exception as problem:
                return f"{type(problem).__name__}: {problem}"
    return ""


class Hang(BaseException):
    """No decoder takes it for an error of its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Hang if the block takes longer."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_split(source: Source, view: View, bad_log: Path) -> int:
    """Reads all samples, and returns the number of those that were replaced."""
    dataset = ViewedDataset(source, view, seed=0, bad_log=bad_log)
    replaced = 0
    for position in range(len(source)):
        replaced += int(dataset[[SampleKey(0, position)]]["replaced"].sum())
        if isinstance(source, CaptionedSource):
            source.caption(position, 0.5)
    return replaced


def cases(number: int) -> list[tuple[str, str]]:
    """A choice of (kind, damage): each kind of damage to a place once at least."""
    draw = random.Random(seed())
    kinds = [kind for kind in KINDS if kind not in SLOW]
    chosen = [(draw.choice(kinds), how) for how in PLACES]
    chosen += [(kind, draw.choice(CONTENT)) for kind in kinds]
    while len(chosen) < number - number // 20:
        chosen.append((draw.choice(kinds), draw.choice((*CONTENT, *CONTENT, *PLACES))))
    return chosen + [(draw.choice(SLOW), draw.choice((*CONTENT, *PLACES))) for _ in range(number // 20)]


def test_damaged_files_are_replaced_or_named(tmp_path: Path) -> None:
    made: dict[str, list[Path]] = {}
    wrong = []
    for number, (name, how) in enumerate(cases(count(40))):
        kind, origin = KINDS[name], tmp_path / name
        if name not in made:
            origin.mkdir()
            made[name] = kind.make(origin)
            for source in kind.sources:  # undamaged
                assert read_split(source("train", origin), kind.view, tmp_path / "bad_samples.tsv") == 0, name
        draw = random.Random(f"{seed()} {number}")
        root = tmp_path / "case" / "data"
        shutil.copytree(origin, root)
        file = root / draw.choice(made[name]).relative_to(origin)
        damage(file, how, draw)
        if answer := read(kind, root):
            wrong.append(f"case {number}: {name}, {file.name}, {how}: {answer}")
        shutil.rmtree(root.parent)
    assert not wrong, "\n".join(wrong)
