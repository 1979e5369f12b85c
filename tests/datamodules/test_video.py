"""Batches of videos: clips, crops, films and files."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.batches.base import mean_of_samples, validate
from src.datamodules.batches.video import VideoBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.scenes.motion import MovingWorld
from src.datamodules.sources.video_folder import VideoFolderSource
from src.datamodules.views.augment import StrongFrames
from src.datamodules.views.color import Color
from src.datamodules.views.image import CenterCrop, RandomResizedCrop, to_tensor
from src.datamodules.views.resample import resample_box, whole_pixels
from src.datamodules.views.video import CenterVideoCrop, DenseClip, MultiScaleCrop, RandomVideoCrop, SegmentClip
from src.errors import SettingError
from src.evaluation.features import extract
from src.models.backbones.encoder import Features
from tests.datamodules.test_video_reader import write


def test_a_dense_clip_at_hand_worked_times() -> None:
    clip = DenseClip(frames=4, stride=2)
    # 3 s of 10 frames a second: the last frame begins at 2.9, three steps of 0.2 s fit before it from 2.3 on
    np.testing.assert_allclose(clip.times(3.0, 10.0, np.array([0.0])), [0.0, 0.2, 0.4, 0.6])
    np.testing.assert_allclose(clip.times(3.0, 10.0, np.array([0.5])), [1.15, 1.35, 1.55, 1.75])
    np.testing.assert_allclose(DenseClip(frames=3, rate=4.0).times(3.0, 10.0, np.array([0.0])), [0.0, 0.25, 0.5])
    assert DenseClip(frames=16, stride=4).times(1.0, 10.0, np.array([0.9]))[0] == 0.0  # longer than its video


def test_spread_frames_are_those_of_videomaes_fine_tuning() -> None:
    """numpy.linspace(s, s + 64, 16) without its fraction, at most s + 63, where s < length - 64."""
    clip = DenseClip(frames=16, stride=4, spread=True)
    steps = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    for uniform, start in ((0.0, 0), (0.5, 18), (0.999, 35)):  # 100 frames: the first one is 0 to 35
        times = clip.times(4.0, 25.0, np.array([uniform]))
        assert np.rint(times * 25).astype(int).tolist() == [start + step for step in steps]
    assert clip.times(1.0, 25.0, np.array([0.9]))[0] == 0.0  # longer than its video
    with pytest.raises(SettingError, match=r"spread=true counts frames of the video, which rate=4\.0 does not"):
        DenseClip(rate=4.0, spread=True)


def test_segments_cover_the_video_evenly() -> None:
    clip = SegmentClip(frames=4)
    np.testing.assert_allclose(clip.times(2.0, 30.0, np.array([0.0, 0.5, 0.5, 0.9])), [0.0, 0.75, 1.25, 1.95])


class Ramp:
    """Frame n has value n, 10 frames a second, with one marked column."""

    duration, rate = 3.0, 10.0

    def frames_at(self, times: list[float]) -> torch.Tensor:
        numbers = torch.tensor([int(time * 10 + 1e-6) for time in times], dtype=torch.uint8)
        frames = numbers.view(-1, 1, 1, 1).repeat(1, 3, 20, 30)
        frames[..., 0] = 255
        return frames


def test_all_frames_of_a_clip_are_cropped_and_mirrored_alike() -> None:
    view = RandomVideoCrop(DenseClip(frames=3, stride=5), RandomResizedCrop(20, (1.0, 1.0), (1.5, 1.5), flip=0.5))
    numbers = np.full(view.num_uniforms, 0.5, np.float32)
    numbers[0] = 0.0
    for last, column in ((0.4, -1), (0.6, 0)):
        numbers[-1] = last
        video = view.from_video(Ramp(), numbers)["video"]
        assert video.shape == (3, 3, 20, 20)
        assert [int(frame[0, 10, 10]) for frame in video] == [0, 5, 10]
        assert (video[:, :, :, column] > 100).all()


def test_all_frames_of_a_clip_change_their_colors_alike() -> None:
    clip, crop = SegmentClip(frames=3), RandomResizedCrop(20, (1.0, 1.0), (1.5, 1.5), flip=0.0)
    color = Color(brightness=0.5, jitter=1.0, grey=0.5)
    plain, view = RandomVideoCrop(clip, crop), RandomVideoCrop(clip, crop, color=color)
    numbers = np.random.default_rng(3).random(view.num_uniforms).astype(np.float32)
    before = plain.from_video(Ramp(), numbers[: plain.num_uniforms])["video"]
    after = view.from_video(Ramp(), numbers)["video"]
    # each frame as it would be alone, all with the numbers that come last
    for own, changed in zip(before, after, strict=True):
        assert torch.equal(color(own[None], numbers[None, -color.num_uniforms :])[0], changed)
    assert not torch.equal(before, after)


def test_multi_scale_boxes_are_neighboring_sides_at_thirteen_places() -> None:
    crop = MultiScaleCrop(size=8, scales=(1.0, 0.75, 0.5))
    draw = np.random.default_rng(0).random((4000, 3))
    boxes = crop.boxes(40, 60, draw)
    assert set(map(tuple, boxes[:, 2:].astype(int).tolist())) == {
        (a, b) for a, b in ((40, 40), (40, 30), (30, 40), (30, 30), (30, 20), (20, 30), (20, 20))
    }
    small = boxes[(boxes[:, 2] == 20) & (boxes[:, 3] == 20)]
    places = set(map(tuple, small[:, :2].astype(int).tolist()))
    assert len(places) == 13
    assert {(0, 0), (0, 40), (20, 0), (20, 40), (10, 20), (5, 10)} <= places
    np.testing.assert_array_equal(crop.boxes(40, 60, np.array([[0.0, 0.5, 0.0]])), [[0, 20, 40, 40]])
    with pytest.raises(SettingError, match="scales must lie in"):
        MultiScaleCrop(8, scales=(1.2,))


def test_five_places_are_the_corners_and_the_center() -> None:
    crop = MultiScaleCrop(size=8, scales=(0.5,), places=5)
    boxes = crop.boxes(40, 60, np.random.default_rng(0).random((200, 3)))
    assert set(map(tuple, boxes.astype(int).tolist())) == {
        (top, left, 20, 20) for top, left in ((0, 0), (0, 40), (20, 0), (20, 40), (10, 20))
    }
    with pytest.raises(SettingError, match="places must be 5 or 13, got 9"):
        MultiScaleCrop(8, places=9)


def test_a_side_within_two_pixels_of_the_result_is_taken_without_resizing() -> None:
    draw = np.array([[0.0, 0.0, 0.0]])
    for shorter, side in ((222, 222), (226, 224), (227, 227), (224, 224)):  # 224 do not fit into 222
        assert MultiScaleCrop(224, scales=(1.0,)).boxes(shorter, 300, draw)[0, 2:].tolist() == [side, side]


def test_the_center_crop_of_a_video_takes_no_random_numbers() -> None:
    view = CenterVideoCrop(clip=SegmentClip(frames=3), size=8, share=1.0)
    assert view.num_uniforms == 0
    video = view.from_video(Ramp(), np.zeros(0, np.float32))["video"]
    assert [int(frame[0, 4, 4]) for frame in video] == [5, 15, 25]


def films(**options: object) -> partial[FilmsSource]:
    return partial(
        FilmsSource, count={"train": 12, "val": 4, "test": 4}, resolution=24, duration=1.0, rate=8.0, **options
    )


def module(source: object, **options: object) -> DataModule:
    views = {
        "train_view": RandomVideoCrop(DenseClip(frames=4, stride=2), MultiScaleCrop(16)),
        "eval_view": CenterVideoCrop(clip=DenseClip(frames=4, stride=2), size=16),
    }
    return DataModule(**{"source": source, "batch_size": 4, "seed": 0, "num_workers": 0, **views, **options})


def test_films_become_batches_of_clips() -> None:
    data = module(films())
    (batch, *_) = data.train_dataloader()
    batch = data.on_after_batch_transfer(batch, 0)
    validate(batch, VideoBatch)
    assert batch["video"].shape == (4, 4, 3, 16, 16)
    assert data.batch_type is VideoBatch
    for label, index in zip(batch["label"].tolist(), batch["index"].tolist(), strict=True):
        assert label == data.train_source.film(index).action
    again = next(iter(module(films()).train_dataloader()))
    assert torch.equal(data.on_after_batch_transfer(again, 0)["video"], batch["video"])


def test_the_frames_of_a_film_are_its_scene_at_their_times() -> None:
    source = films()("val")
    footage = source[1]["image"]
    still = footage.frames_at([0.0, 0.26, 0.25, 9.0])
    assert torch.equal(still[1], still[2])  # the same frame, an eighth of a second long
    assert not torch.equal(still[0], still[1])
    assert torch.equal(still[3], footage.frames_at([0.99])[0])  # after the end the last one is held


def test_cached_films_equal_rendered_ones(tmp_path: Path) -> None:
    drawn, kept = films()("val"), films(cache_dir=tmp_path)("val")
    [folder] = [each for each in tmp_path.iterdir() if each.is_dir()]
    assert folder.name.startswith("films-24px-4-")
    times = [0.9, 0.0, 0.26, 7.0]
    for index in range(4):
        assert torch.equal(kept[index]["image"].frames_at(times), drawn[index]["image"].frames_at(times))
        assert kept[index]["label"] == drawn[index]["label"]
        assert (kept[index]["image"].duration, kept[index]["image"].rate) == (1.0, 8.0)
    again = copy.deepcopy(kept)  # by the state that goes to a loader's worker
    assert len(pickle.dumps(kept)) < 20_000
    assert torch.equal(again[2]["image"].frames_at(times), kept[2]["image"].frames_at(times))
    other = films(cache_dir=tmp_path, world=MovingWorld(tempo=(0.1, 0.2)))("val")
    assert not torch.equal(other[2]["image"].frames_at(times), kept[2]["image"].frames_at(times))
    with pytest.raises(IndexError, match="film 4 of 4"):
        kept[4]


def test_splits_share_no_film() -> None:
    assert films()("train").film(0) != films()("val").film(0)
    with pytest.raises(SettingError, match="films need count >= 1"):
        FilmsSource("val", count=0)
    with pytest.raises(IndexError, match="film 4 of 4"):
        films()("val").film(4)


def test_a_broken_file_in_a_folder_is_replaced(tmp_path: Path) -> None:
    for kind in ("dive", "run"):
        for split, count in (("train", 3), ("val", 1)):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                write(folder / f"{number}.mp4", [n / 10 for n in range(8)])
    (tmp_path / "train" / "run" / "1.mp4").write_bytes(b"no video at all")
    (tmp_path / "train" / "run" / "notes.txt").write_text("not counted")
    data = module(partial(VideoFolderSource, root=tmp_path), batch_size=6, bad_log=tmp_path / "bad.tsv")
    batch = next(iter(data.train_dataloader()))
    assert data.classes == ["dive", "run"]
    assert batch["video"].shape == (6, 4, 3, 16, 16)
    assert batch["replaced"].sum() == 1
    assert "run/1.mp4\tthe video cannot be read" in (tmp_path / "bad.tsv").read_text()


def test_frames_of_one_box_are_resized_as_pillow_does() -> None:
    frames = torch.randint(0, 256, (3, 3, 40, 60), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for box in ((4, 10, 30, 40), (7, 0, 12, 9), (0, 20, 16, 16)):
        seen = resample_box(frames, np.array(box, float), 16)
        for frame, mine in zip(frames, seen, strict=True):
            top, left, rows, columns = box
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).crop((left, top, left + columns, top + rows))
            expected = to_tensor(picture.resize((16, 16), Image.Resampling.BICUBIC))
            assert (mine.int() - expected.int()).abs().max() <= 1
            bilinear = resample_box(frame[None], np.array(box, float), 16, interpolation="bilinear")[0]
            expected = to_tensor(picture.resize((16, 16), Image.Resampling.BILINEAR))
            assert (bilinear.int() - expected.int()).abs().max() <= 1
        assert torch.equal(resample_box(frames, np.array(box, float), 16, flip=True), seen.flip(-1))
    assert whole_pixels(np.array([1.6, 2.4, 3.0, 0.1])) == (2, 2, 3, 1)


def test_one_decoded_video_gives_several_rows_of_a_batch() -> None:
    asked: list[list[float]] = []

    class Counted(Ramp):
        def frames_at(self, times: list[float]) -> torch.Tensor:
            asked.append(times)
            return super().frames_at(times)

    view = RandomVideoCrop(DenseClip(frames=3, stride=2), RandomResizedCrop(8, (0.1, 0.3)), repeats=2)
    numbers = np.random.default_rng(0).random(view.num_uniforms, np.float32)
    video = view.from_video(Counted(), numbers)["video"]
    assert video.shape == (2, 3, 3, 8, 8)
    assert len(asked) == 1
    once = RandomVideoCrop(view.clip, view.crop)  # the rows are what the same numbers give alone
    parts = numbers[1:].reshape(2, -1)
    for row, part in zip(video, parts, strict=True):
        assert torch.equal(row, once.from_video(Ramp(), np.concatenate([numbers[:1], part]))["video"])
    with pytest.raises(SettingError, match=r"data\.train_view\.repeats must be at least 1"):
        RandomVideoCrop(view.clip, view.crop, repeats=0)


def test_repeated_augmentation_keeps_the_batch_size() -> None:
    view = RandomVideoCrop(DenseClip(frames=4, stride=2), MultiScaleCrop(16), repeats=2)
    data = module(films(), train_view=view)
    loader = data.train_dataloader()
    assert len(loader) == 6  # 12 films, two a step
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    for batch in batches:
        validate(batch, VideoBatch)
        assert batch["video"].shape == (4, 4, 3, 16, 16)
        assert batch["index"][0] == batch["index"][1] != batch["index"][2] == batch["index"][3]
        assert batch["label"].tolist() == [data.train_source.film(index).action for index in batch["index"].tolist()]
    assert sorted(int(index) for batch in batches for index in batch["index"][::2]) == list(range(12))
    with pytest.raises(SettingError, match=r"data\.batch_size=5 clips are no whole number of videos with 2 clips each"):
        module(films(), train_view=view, batch_size=5).train_dataloader()


class Corners:
    """Frame n, 10 a second, 20 x 60: column c has value c + 20 n."""

    duration, rate = 1.0, 10.0

    def frames_at(self, times: list[float]) -> torch.Tensor:
        numbers = torch.tensor([int(time * 10 + 1e-6) for time in times])
        columns = torch.arange(60).expand(len(times), 3, 20, 60)
        return (columns + 20 * numbers.view(-1, 1, 1, 1)).to(torch.uint8)


def test_segments_and_crops_at_hand_worked_places() -> None:
    view = CenterVideoCrop(DenseClip(frames=2, stride=2), size=20, share=1.0, segments=3, crops=3)
    video = view.from_video(Corners(), np.zeros(0, np.float32))["video"]
    assert view.rows == 9
    assert video.shape == (9, 2, 3, 20, 20)
    # clips from 0, 0.35 and 0.7 s on, so frames 0, 3 and 7 and those two later; columns from 0, 20 and 40 on
    first = [[int(frame[0, 10, 0]) for frame in clip] for clip in video]
    assert first == [[20 * n + c, 20 * (n + 2) + c] for n in (0, 3, 7) for c in (0, 20, 40)]
    tall = Corners()
    tall.frames_at = lambda times: Corners.frames_at(tall, times).transpose(-1, -2)  # type: ignore[method-assign]
    upright = view.from_video(tall, np.zeros(0, np.float32))["video"]
    assert torch.equal(upright, video.transpose(-1, -2))
    # segments: all frames together are even steps
    segments = CenterVideoCrop(SegmentClip(frames=2), size=20, share=1.0, segments=2)
    video = segments.from_video(Corners(), np.zeros(0, np.float32))["video"]
    assert [[int(frame[0, 0, 0]) // 20 - 1 for frame in clip] for clip in video] == [[0, 5], [2, 7]]


def test_several_clips_of_a_video_are_consecutive_and_averaged() -> None:
    view = CenterVideoCrop(DenseClip(frames=2, stride=1), size=16, share=1.0, segments=3)
    data = module(films(), eval_view=view, eval_batch_size=7)
    batches = list(data.val_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]

    class Means(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> Features:
            means = video.mean(dim=(1, 3, 4))
            return Features(embedding=means, patches=means[:, None], grid=(1, 1, 1))

    found = extract({"it": Means()}, data.val_dataloader(), data, torch.device("cpu"))["it"]
    assert found.labels.tolist() == [data.val_source[index]["label"] for index in range(4)]
    for index, row in enumerate(found.features):
        clips = view.from_video(data.val_source[index]["image"], np.zeros(0, np.float32))["video"]
        normalized = data.on_after_batch_transfer({"video": clips}, 0)["video"]
        torch.testing.assert_close(row, normalized.mean(dim=(0, 1, 3, 4)))


def test_rows_of_one_sample_are_averaged() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    mean, first = mean_of_samples(rows, torch.tensor([7, 7, 2]))
    assert mean.tolist() == [[2.0, 1.0], [5.0, 5.0]]
    assert first.tolist() == [0, 2]
    mean, first = mean_of_samples(rows, torch.tensor([7, 3, 2]))
    assert torch.equal(mean, rows)
    assert first.tolist() == [0, 1, 2]


def test_all_frames_change_alike_and_one_rectangle_is_erased() -> None:
    frames = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8).expand(4, -1, -1, -1)
    strong = StrongFrames(24, erase=1.0)
    numbers = np.array([0.3, 0.6])
    changed = strong.augment(frames, numbers)
    assert not torch.equal(changed[0], frames[0])
    assert all(torch.equal(frame, changed[0]) for frame in changed)
    assert torch.equal(strong.augment(frames, numbers), changed)
    assert not torch.equal(strong.augment(frames, np.array([0.31, 0.6])), changed)
    erased = strong.erase_rectangle(frames[..., :24], numbers)
    gone = (erased != frames[..., :24]).any(dim=1)  # [T, H, W]
    rows, columns = gone.any(dim=(0, 2)).nonzero().flatten(), gone.any(dim=(0, 1)).nonzero().flatten()
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert 0.9 * 4 * height * width < int(gone.sum()) < 4 * 24 * 24  # all of one rectangle in every frame
    assert not torch.equal(erased[0], erased[1])  # with noise of its own
    still = StrongFrames(24, policy=None, erase=0.0)
    assert torch.equal(still.erase_rectangle(still.augment(frames, numbers), numbers), frames)
    view = RandomVideoCrop(DenseClip(frames=3), RandomResizedCrop(8, (0.5, 1.0)), repeats=2, strong=strong)
    assert view.from_video(Ramp(), np.random.default_rng(0).random(view.num_uniforms))["video"].shape == (2, 3, 3, 8, 8)


def test_a_view_of_images_is_refused_for_videos() -> None:
    with pytest.raises(SettingError, match=r"is a view of videos, but data.eval_view, CenterCrop, is one of images"):
        module(films(), eval_view=CenterCrop(size=16)).batch_type  # noqa: B018
    with pytest.raises(SettingError, match="a clip needs frames"):
        DenseClip(frames=0)
