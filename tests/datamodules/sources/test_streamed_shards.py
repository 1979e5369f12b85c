"""Shards behind a local server: the samples of local shards, with no more copies than needed."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import OrderedSource, TrainSampler, ViewedDataset
from src.datamodules.decoding import BadSample, DataError
from src.datamodules.extras.captions import CaptionedSource, Captions
from src.datamodules.sources.streamed_shards import CaptionedStreamedShards, StreamedShards
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.sources.webdataset import CaptionedWebDatasetSource
from src.datamodules.views.image import CenterCrop
from src.errors import SettingError
from tests.datamodules.sources.test_webdataset import encoded, grey_of, write

SIZES = (4, 5, 6, 3)


class Server:
    """Serves a folder on loopback and records the requests."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path.lstrip("/"))
                super().do_GET()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def shards_asked(self) -> list[str]:
        return [name for name in self.asked if name.endswith(".tar")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Four shards of 4, 5, 6 and 3 images with consecutive gray levels."""
    folder, grey = tmp_path / "there", 0
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        members = []
        for _ in range(size):
            members += [(f"{grey:04d}.png", encoded(grey)), (f"{grey:04d}.txt", f"grey number {grey}".encode())]
            grey += 1
        write(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": size + 2, "successes": size}))
    made = Server(folder)
    yield made
    made.close()


def streamed(
    server: Server, tmp_path: Path, kind: type[StreamedShards] = CaptionedStreamedShards, **options: Any
) -> Any:
    shards = options.pop("shards", {"train": f"{server.address}/{{00000..00003}}.tar"})
    source = kind("train", shards=shards, cache_dir=tmp_path / "here", **options)
    source._copies.pause = 0.0
    return source


def test_samples_are_those_of_local_shards(server: Server, tmp_path: Path) -> None:
    source = streamed(server, tmp_path)
    local = CaptionedWebDatasetSource("train", shards={"train": f"{tmp_path}/there/*.tar", "val": "none"})
    assert isinstance(source, OrderedSource)
    assert isinstance(source, CaptionedSource)
    assert (len(source), server.shards_asked()) == (18, [])  # counted without a shard
    for index in range(18):
        ours, theirs = source[index], local[index]
        assert (grey_of(ours["image"]), ours.get("label")) == (grey_of(theirs["image"]), theirs.get("label"))
        assert source.caption(index, 0.5) == local.caption(index, 0.5) == f"grey number {index}"
    assert source.name(9) == f"{server.address}/00002.tar#0"
    assert server.shards_asked() == [f"{shard:05d}.tar" for shard in range(4)]  # each once
    again = streamed(server, tmp_path)
    assert grey_of(again[17]["image"]) == 17
    assert len(server.asked) == 8  # neither counts nor shards once more


def test_shards_without_statistics_are_read_at_the_start(server: Server, tmp_path: Path) -> None:
    (tmp_path / "there/00001_stats.json").unlink()
    assert len(streamed(server, tmp_path)) == 18
    assert server.shards_asked() == ["00001.tar"]


def test_a_shard_with_fewer_samples_than_stated(server: Server, tmp_path: Path) -> None:
    (tmp_path / "there/00000_stats.json").write_text(json.dumps({"successes": 6}))
    source = streamed(server, tmp_path)
    with pytest.raises(BadSample, match=r"00000.tar#5: the shard has only 4 samples"):
        source[5]
    assert grey_of(source[6]["image"]) == 4  # those of the next one are where they belong


class TestOrder:
    def source(self, server: Server, tmp_path: Path, **options: Any) -> Any:
        return streamed(server, tmp_path, **options)

    def test_every_sample_once_from_few_shards_at_a_time(self, server: Server, tmp_path: Path) -> None:
        sizes = np.array([20, 30, 10, 25, 40, 15, 20, 35])
        for shard, size in enumerate(sizes):
            (tmp_path / f"there/1{shard}_stats.json").write_text(json.dumps({"successes": int(size)}))
        shards = {"train": f"{server.address}/1{{0..7}}.tar"}
        source = streamed(server, tmp_path, shards=shards, shuffle_shards=2)
        order = source.order(195, np.random.default_rng(3))
        assert sorted(order) == list(range(195))
        assert list(order) == list(source.order(195, np.random.default_rng(3)))
        assert list(order) != list(source.order(195, np.random.default_rng(4)))
        shard = np.searchsorted(np.cumsum(sizes), order, side="right")
        first = np.array([np.flatnonzero(shard == each)[0] for each in range(8)])
        last = np.array([np.flatnonzero(shard == each)[-1] for each in range(8)])
        open_at = [int(((first <= now) & (last >= now)).sum()) for now in range(195)]
        assert max(open_at) == 2
        # within a shard nothing is left of its order
        mine = order[shard == 4]
        assert np.corrcoef(mine, np.arange(len(mine)))[0, 1] < 0.5
        assert server.shards_asked() == []

    def test_only_the_first_samples(self, server: Server, tmp_path: Path) -> None:
        order = self.source(server, tmp_path).order(7, np.random.default_rng(0))
        assert sorted(order) == list(range(7))

    def test_with_replacement(self, server: Server, tmp_path: Path) -> None:
        """Shards are repeated or missing as a whole, and the epoch keeps its length."""
        source = self.source(server, tmp_path, resampled=True, shuffle_shards=1)
        counts = np.stack([np.bincount(source.order(18, np.random.default_rng(s)), minlength=18) for s in range(400)])
        assert (counts.sum(1) == 18).all()
        assert counts.max() > 1
        assert counts.min() == 0
        assert counts.mean() == 1
        # each shard as often as any other: a sample's mean is near 1 but for the cut at the end
        assert np.abs(counts.mean(0) - 1).max() < 0.25

    def test_processes_share_one_order_and_a_resumed_one_continues(self, server: Server, tmp_path: Path) -> None:
        source = self.source(server, tmp_path, shuffle_shards=1)

        def dealt(start: int = 0, **options: int) -> list[list[int]]:
            sampler = TrainSampler(18, batch_size=4, seed=5, order=source.order, **options)
            sampler.set_epoch(2)
            sampler.start = start
            return [[draw.position for draw in draws] for draws in sampler]

        whole = dealt()
        halves = zip(dealt(rank=0, world_size=2), dealt(rank=1, world_size=2), strict=True)
        assert [first + second for first, second in halves] == whole
        assert dealt(start=8) == whole[2:]
        assert len({index for batch in whole for index in batch}) == 16


def test_the_least_recently_read_copy_is_deleted(server: Server, tmp_path: Path) -> None:
    room = sum((tmp_path / f"there/0000{shard}.tar").stat().st_size for shard in range(3))
    source = streamed(server, tmp_path, keep_gb=room / 1e9)
    copies = tmp_path / "here/shards"
    for index in (0, 4, 9):
        source[index]
    assert sorted(file.name[:5] for file in copies.glob("*.tar")) == ["00000", "00001", "00002"]
    source[1]
    source[15]  # the second one's turn to go
    assert sorted(file.name[:5] for file in copies.glob("*.tar")) == ["00000", "00002", "00003"]
    assert grey_of(source[4]["image"]) == 4  # and is copied again
    assert server.shards_asked().count("00001.tar") == 2


def test_a_shard_that_cannot_be_copied_does_not_end_the_run(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried ``attempts`` times, then skipped; its samples are replaced by neighbors."""
    (tmp_path / "there/00001.tar").unlink()
    source = streamed(server, tmp_path, attempts=2)
    source._copies.pause = 0.01
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(BadSample, match=r"00001\.tar.*FileNotFoundError"):
                source[4]
    assert server.shards_asked().count("00001.tar") == 2
    assert sum("is not tried again" in record.message for record in caplog.records) == 1
    dataset = ViewedDataset(source, CenterCrop(size=4), seed=0)
    batch = dataset[next(iter(TrainSampler(18, batch_size=18, seed=0)))]
    assert batch["replaced"].tolist().count(True) == 5
    near = {int(source.replacement(position, number)) for position in range(4, 9) for number in range(50)}
    assert near == set(range(5, 14))  # of the shard itself or the next one


def test_tokenizers_and_limits_use_the_first_shards(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.datamodules.text.tokenizing._SAMPLES", 6)
    monkeypatch.setattr("src.datamodules.text.tokenizing._SAMPLES_PER_ID", 0)
    view = CenterCrop(size=4)
    data = DataModule(
        extras=Captions(),
        source=lambda split: streamed(server, tmp_path, shuffle_shards=1),
        train_view=view,
        eval_view=view,
        batch_size=3,
        train_samples=6,
        num_workers=0,
        tokenizer_file=tmp_path / "tokenizer.json",
    )
    texts = data.extras.vocabulary_texts(data.train_source, data.tokenizer_settings.samples)
    assert list(texts) == [f"grey number {index}" for index in range(6)]
    batches = list(data.train_dataloader())
    assert sorted(index for batch in batches for index in batch["index"].tolist()) == list(range(6))
    assert server.shards_asked() == ["00000.tar", "00001.tar"]


def test_invalid_settings_are_refused(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/00000.tar"
    with pytest.raises(DataError, match=r"data\.source\.shards\.val: streamed shards cannot be split by keys"):
        StreamedShards("val", shards={"train": address}, cache_dir=tmp_path)
    with pytest.raises(DataError, match="name streamed shards by numbers"):
        streamed(server, tmp_path, shards={"train": f"{server.address}/*.tar"})
    with pytest.raises(DataError, match=r"00009\.tar: FileNotFoundError.*cannot be counted"):
        streamed(server, tmp_path, shards={"train": f"{server.address}/00009.tar"}, attempts=1)
    with pytest.raises(SettingError, match="shuffle_shards must be at least 1, got 0"):
        streamed(server, tmp_path, shuffle_shards=0)
    with pytest.raises(SettingError, match="keep_gb must be above 0"):
        streamed(server, tmp_path, keep_gb=0)
    with pytest.raises(SettingError, match="reads all texts at the start"):
        TextFilter()(streamed(server, tmp_path))
    with pytest.raises(DataError, match="or choose data=img2dataset_streamed"):
        CaptionedWebDatasetSource("train", shards=address)
