"""Batches of images with ground truth: transformed alike, deterministic, replaced if they are bad."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from src.datamodules.batches.base import IGNORED, BatchError, validate
from src.datamodules.batches.dense import DepthBatch, DetectionBatch, NormalsBatch, SegmentationBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.decoding import BadSample
from src.datamodules.scenes import render
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.depth import DepthView
from src.datamodules.views.detection import DetectionView
from src.datamodules.views.image import CenterCrop
from src.datamodules.views.joint import JointView
from src.datamodules.views.normals import NormalsView
from src.datamodules.views.segmentation import SegmentationView
from src.datamodules.views.transforms import PaddedCrop, RandomRescale
from src.errors import SettingError, UserError
from src.train import check_batches
from tests.models.downstream.test_segmentation import linear

SHAPES = ((40, 56), (24, 20), (64, 64))


class Encoded(Source):
    """Images whose red channel is ten times their class, their depth in decimeters, and one box a class.

    What a view does to a mask can so be read off the image. Every class is a block of pixels; blocks are 8 wide.
    """

    fields = ("segmentation", "depth", "normals", "boxes", "box_labels", "instance_masks")
    mask_classes = tuple("abcdefghijklmnopqrstuvwx")
    classes = ()

    def __init__(self, split: Split = "train", *, length: int = 24, torn: tuple[int, ...] = ()) -> None:
        self.length, self.torn = length, torn

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        height, width = SHAPES[index % len(SHAPES)]
        generator = np.random.default_rng(index)
        blocks = generator.integers(0, 24, (-(-height // 8), -(-width // 8)))
        classes = torch.from_numpy(np.kron(blocks, np.ones((8, 8), np.int64))[:height, :width])
        kinds = classes.unique()
        masks = classes == kinds[:, None, None]
        mask = classes.to(torch.uint8)
        turn = (1 + classes) / 30
        fields = {
            "normals": torch.stack([turn.sin() * 0.8, turn.sin() * 0.6, -turn.cos()]),
            "segmentation": mask[:-1] if index in self.torn else mask,
            "depth": (classes + 1).float() / 10,
            "boxes": torch.from_numpy(render.boxes_of(masks.numpy())),
            "box_labels": kinds,
            "instance_masks": masks,
        }
        return {"image": (classes * 10).to(torch.uint8).expand(3, -1, -1), "label": -1, "fields": fields}

    def name(self, index: int) -> str:
        return f"encoded/{index}"


COLORED = [(4, 6, 30, 40), (36, 10, 60, 26)]
GEOMETRY = (RandomRescale(32, 64, (0.5, 2.0)), PaddedCrop(32), v2.RandomHorizontalFlip())


def module(view: JointView, source: Any = Encoded, **options: Any) -> DataModule:
    return DataModule(
        **{"source": source, "train_view": view, "eval_view": view, "batch_size": 6, "num_workers": 0, **options}
    )


def sample(image: Tensor, fields: dict[str, Tensor]) -> Sample:
    return {"image": image, "fields": fields}


def rows(view: JointView, indices: Any = range(12), epoch: int = 0, seed: int = 0, **options: Any) -> dict[str, Any]:
    return ViewedDataset(Encoded(**options), view, seed=seed)[[SampleKey(epoch, index) for index in indices]]


def inner(classes: Tensor, reach: int = 4) -> Tensor:
    """Returns where all neighbors [B, H, W] have one class, so that the image is not blended."""
    values = classes.float()[:, None]
    side = 2 * reach + 1
    largest = torch.nn.functional.max_pool2d(values, side, 1, reach)
    same = (largest == -torch.nn.functional.max_pool2d(-values, side, 1, reach))[:, 0]
    rim = torch.ones_like(same)  # blended with what the crop has cut off
    rim[:, reach:-reach, reach:-reach] = False
    return same & ~rim


class TestGeometry:
    def test_masks_are_transformed_as_their_image(self) -> None:
        batch = rows(SegmentationView(GEOMETRY))
        image, mask = batch["image"], batch["mask"].long()
        assert image.shape == (12, 3, 32, 32)
        pure = inner(mask) & (mask != IGNORED)
        assert pure.float().mean() > 0.02  # there is something to compare
        assert torch.equal(image[:, 0].long()[pure], 10 * mask[pure])
        # a sharp image and its mask have the same pixels everywhere, not only inside
        sharp = rows(SegmentationView((PaddedCrop(32), v2.RandomHorizontalFlip(p=1.0))))
        shown = sharp["mask"] != IGNORED
        assert torch.equal(sharp["image"][:, 0][shown], 10 * sharp["mask"][shown])

    def test_small_images_are_padded_and_the_padding_is_ignored(self) -> None:
        batch = rows(SegmentationView((PaddedCrop(32, fill=(1, 2, 3)),)), [1])  # 24 x 20
        filled = torch.ones(32, 32, dtype=torch.bool)
        filled[:24, :20] = False
        assert torch.equal(batch["mask"][0] == IGNORED, filled)
        assert torch.equal(
            batch["image"][0][:, filled], torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None].expand(3, filled.sum())
        )
        depth = rows(DepthView((PaddedCrop(32),)), [1])
        assert torch.equal(depth["valid"][0], ~filled)

    def test_depths_are_not_interpolated(self) -> None:
        batch = rows(DepthView(GEOMETRY))
        known = {round(0.1 * each, 1) for each in range(1, 25)}
        found = batch["depth"][batch["valid"]]
        assert {round(value, 5) for value in found.unique().tolist()} <= known
        pure = inner(batch["depth"]) & batch["valid"]
        torch.testing.assert_close(batch["image"][:, 0][pure].float() / 100 + 0.1, batch["depth"][pure])

    def test_normals_are_mirrored_with_their_image(self) -> None:
        """The class determines the normal: to the right and down, unless the image was mirrored."""
        for flip, senses in (
            (v2.RandomHorizontalFlip(p=0.0), (1, 1)),
            (v2.RandomHorizontalFlip(p=1.0), (-1, 1)),
            (v2.RandomVerticalFlip(p=1.0), (1, -1)),
        ):
            batch = rows(NormalsView((RandomRescale(32, 64, (0.5, 2.0)), PaddedCrop(32), flip)))
            x, y, z = batch["normals"].unbind(dim=1)
            pure = inner(z) & batch["valid"]
            turn = (batch["image"][:, 0][pure].float() / 10 + 1) / 30
            torch.testing.assert_close(z[pure], -turn.cos())
            torch.testing.assert_close(x[pure], senses[0] * 0.8 * turn.sin())
            torch.testing.assert_close(y[pure], senses[1] * 0.6 * turn.sin())
            assert not batch["normals"].movedim(1, -1)[~batch["valid"]].any()
        drawn = rows(NormalsView(GEOMETRY))
        signs = {
            float(each[0][valid].sign().mean()) for each, valid in zip(drawn["normals"], drawn["valid"], strict=True)
        }
        assert signs == {1.0, -1.0}  # some of the twelve, and those alone

    def test_depths_out_of_range_or_not_finite_are_unknown(self) -> None:
        image = torch.zeros(3, 1, 5, dtype=torch.uint8)
        depth = torch.tensor([[0.0, float("nan"), 0.5, 2.0, float("inf")]])
        row = DepthView(nearest=0.1, farthest=2.0).from_sample(sample(image, {"depth": depth}), np.zeros(2, np.float32))
        assert row["valid"].tolist() == [[False, False, True, False, False]]
        assert row["depth"].tolist() == [[0.0, 0.0, 0.5, 0.0, 0.0]]

    def test_boxes_and_masks_of_objects_are_transformed_as_the_image(self) -> None:
        view = DetectionView((PaddedCrop(32), v2.RandomHorizontalFlip(p=1.0)), masks=True)
        batch = rows(view)
        for image, size, boxes, labels, masks in zip(
            *(batch[name] for name in ("image", "size", "boxes", "box_labels", "masks")), strict=True
        ):
            assert size.tolist() == [32, 32]
            assert len(boxes) == len(labels) == len(masks) > 0
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= 32).all()
            for box, label, mask in zip(boxes, labels, masks, strict=True):
                assert torch.equal(image[0] == 10 * label, mask)
                left, top, right, bottom = box.int().tolist()
                outside = mask.clone()
                outside[top:bottom, left:right] = False
                assert not outside.any()

    def test_boxes_scale_with_their_image_and_empty_boxes_are_left_out(self) -> None:
        image = torch.zeros(3, 20, 40, dtype=torch.uint8)
        fields = {
            "boxes": torch.tensor([[4.0, 2.0, 12.0, 10.0], [0.0, 0.0, 0.0, 0.0]]),
            "box_labels": torch.tensor([3, 5]),
        }
        row = DetectionView((RandomRescale(10),)).from_sample(sample(image, fields), np.zeros(2, np.float32))
        assert row["boxes"].tolist() == [[2.0, 1.0, 6.0, 5.0]]  # the empty one is left out
        assert row["box_labels"].tolist() == [3]
        assert row["size"].tolist() == [10, 20]
        assert row["original_size"].tolist() == [20, 40]
        nothing = {"boxes": torch.zeros(0, 4), "box_labels": torch.zeros(0, dtype=torch.int64)}
        nothing["instance_masks"] = torch.zeros(0, 20, 40, dtype=torch.bool)
        empty = DetectionView(GEOMETRY, masks=True).from_sample(sample(image, nothing), np.zeros(2, np.float32))
        assert empty["boxes"].shape == (0, 4)
        assert empty["masks"].shape == (0, 32, 32)

    @pytest.mark.parametrize("tight", [False, True], ids=["cut", "tight"])
    def test_large_scale_jitter_keeps_boxes_around_their_colors(self, tight: bool) -> None:
        image = torch.zeros(3, 48, 64, dtype=torch.uint8)
        masks = torch.zeros(2, 48, 64, dtype=torch.bool)
        for channel, (mask, (x0, y0, x1, y1)) in enumerate(zip(masks, COLORED, strict=True)):
            mask[y0:y1, x0:x1] = True
            image[channel][mask] = 255
        fields = {"boxes": torch.tensor(COLORED).float(), "box_labels": torch.tensor([0, 1]), "instance_masks": masks}
        jitter = (RandomRescale(48, 48, (0.4, 2.0)), PaddedCrop(48, fill=(0, 0, 0)), v2.RandomHorizontalFlip())
        view, kept = DetectionView(jitter, masks=True, tight=tight), 0
        for number in range(30):
            row = view.from_sample(sample(image, fields), np.array([number / 30, 0.5], np.float32))
            for box, label, mask in zip(row["boxes"], row["box_labels"], row["masks"], strict=True):
                shown = row["image"][label] > 127
                columns, lines = shown.any(dim=0).nonzero(), shown.any(dim=1).nonzero()
                around = torch.tensor([columns.min(), lines.min(), columns.max() + 1, lines.max() + 1])
                assert (box - around).abs().max() <= 1.0
                assert (mask != shown).float().mean() < 0.02
                kept += 1
        assert kept > 30

    def test_a_tight_box_surrounds_the_rest_of_its_mask(self) -> None:
        image, masks = torch.zeros(3, 8, 16, dtype=torch.uint8), torch.zeros(2, 8, 16, dtype=torch.bool)
        masks[0, 1:3, 9:11] = masks[0, 5:7, 2:4] = True  # two corners of the box 2, 1, 11, 7
        masks[1, 4:6, 1:3] = True
        fields = {"boxes": torch.tensor([[2.0, 1.0, 11.0, 7.0], [1.0, 4.0, 3.0, 6.0]]), "instance_masks": masks}
        fields |= {"box_labels": torch.tensor([4, 5]), "crowd": torch.tensor([True, False])}

        def half(sample: dict[str, Any]) -> dict[str, Any]:
            moved = ("image", "boxes", "masks")
            return sample | {name: v2.functional.crop(sample[name], 0, 8, 8, 8) for name in moved}

        right = (half,)
        uniform = np.zeros(2, np.float32)
        tight = DetectionView(right, masks=True, tight=True).from_sample(sample(image, fields), uniform)
        assert tight["boxes"].tolist() == [[1.0, 1.0, 3.0, 3.0]]
        assert tight["box_labels"].tolist() == [4]
        assert tight["crowd"].tolist() == [True]  # goes where its box goes
        cut = DetectionView(right, masks=True).from_sample(sample(image, fields), uniform)
        assert cut["boxes"].tolist() == [[0.0, 1.0, 3.0, 7.0]]
        batch = DetectionView(masks=True).collate([tight, tight])
        assert [each.tolist() for each in batch["crowd"]] == [[True], [True]]

    def test_rescaling_respects_the_limits_of_both_sides(self) -> None:
        rescale = RandomRescale(512, 2048)
        for size, expected in (((480, 640), [512, 683]), ((100, 1000), [205, 2048])):
            image = v2.functional.to_image(torch.zeros(3, *size, dtype=torch.uint8))
            assert rescale.make_params([image])["size"] == expected

    def test_a_crop_filled_by_one_class_is_drawn_again(self) -> None:
        mask = torch.zeros(8, 64, dtype=torch.uint8)
        mask[:, 60:] = 1
        image = torch.zeros(3, 8, 64, dtype=torch.uint8)
        both = dict.fromkeys((1.0, 0.75), 0)
        for number in range(40):
            uniform = np.full(2, number / 40, np.float32)
            for share in both:
                view = SegmentationView((PaddedCrop(8, max_share=share),))
                both[share] += (
                    len(view.from_sample(sample(image, {"segmentation": mask}), uniform)["mask"].unique()) == 2
                )
        assert both[0.75] > 2 * both[1.0]

    def test_images_are_padded_to_the_largest_and_to_a_multiple(self) -> None:
        batch = rows(DetectionView(multiple=32, masks=True, fill=(9, 9, 9)), [0, 1])
        assert batch["image"].shape == (2, 3, 64, 64)  # 40 x 56 and 24 x 20
        assert batch["size"].tolist() == [[40, 56], [24, 20]]
        assert (batch["image"][1, :, 24:] == 9).all()
        assert all(masks.shape[1:] == (64, 64) for masks in batch["masks"])
        assert not batch["masks"][1][:, 24:].any()

    def test_without_move_truth_the_mask_is_the_source_s(self) -> None:
        view = SegmentationView((RandomRescale(16),), move_truth=False)
        batch = rows(view, [0])
        assert batch["image"].shape[-2:] == (16, 22)
        assert torch.equal(batch["mask"][0], Encoded()[0]["fields"]["segmentation"])
        with pytest.raises(SettingError, match=r"2 sizes do not make one batch.*set data.eval_batch_size=1"):
            rows(view, [0, 1])
        alike = [{"image": torch.zeros(3, 8, 8), "mask": torch.zeros(side, side)} for side in (4, 5)]
        with pytest.raises(SettingError, match="2 sizes do not make one batch"):
            view.collate(alike)


class TestDraws:
    def test_a_sample_does_not_depend_on_the_rest_of_its_batch(self) -> None:
        view = SegmentationView(GEOMETRY)
        torch.manual_seed(1)
        first = rows(view, [7, 3, 11], epoch=2)
        state = torch.get_rng_state()
        alone = rows(view, [3], epoch=2)
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global generator
        for name in ("image", "mask"):
            assert torch.equal(first[name][1], alone[name][0])
            assert not torch.equal(alone[name], rows(view, [3], epoch=3)[name])
            assert not torch.equal(alone[name], rows(view, [3], epoch=2, seed=1)[name])

    @pytest.mark.parametrize("view", [SegmentationView(GEOMETRY), DetectionView(GEOMETRY, masks=True)], ids=["s", "d"])
    def test_the_number_of_workers_changes_nothing(self, view: JointView) -> None:
        alone, shared = (list(module(view, num_workers=workers).train_dataloader()) for workers in (0, 2))
        assert len(alone) == len(shared) == 4
        for ours, theirs in zip(alone, shared, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                for mine, other in zip(value, theirs[name], strict=True):
                    assert torch.equal(mine, other), name

    def test_a_resumed_loader_continues_with_the_next_batch(self) -> None:
        data = module(DepthView(GEOMETRY))
        whole = list(data.train_dataloader())
        loader = data.train_dataloader()
        loader.load_state_dict(
            {"epoch": 0, "samples": 2 * data.batch_size, "batch_size": data.batch_size, "micro_batches": 1}
        )
        rest = list(loader)
        assert len(rest) == 2
        assert all(torch.equal(a["depth"], b["depth"]) for a, b in zip(rest, whole[2:], strict=True))

    def test_a_sample_whose_ground_truth_does_not_fit_is_replaced(self, tmp_path: Path) -> None:
        data = module(
            SegmentationView(GEOMETRY), partial(Encoded, torn=(4,)), bad_log=tmp_path / "bad.tsv", batch_size=24
        )
        (batch,) = data.train_dataloader()
        assert batch["index"][batch["replaced"]].tolist() == [4]
        assert "encoded/4\tits segmentation has 23x20 pixels, the image 24x20" in (tmp_path / "bad.tsv").read_text()

    def test_objects_with_mismatched_fields_are_bad_samples(self) -> None:
        image, uniform = torch.zeros(3, 8, 8, dtype=torch.uint8), np.zeros(2, np.float32)
        fields = {"boxes": torch.zeros(2, 4), "box_labels": torch.zeros(3, dtype=torch.int64)}
        with pytest.raises(BadSample, match=r"3 objects have boxes of the shape \[2, 4\]"):
            DetectionView().from_sample(sample(image, fields), uniform)
        fields |= {"boxes": torch.zeros(3, 4), "instance_masks": torch.zeros(2, 8, 8)}
        with pytest.raises(BadSample, match="3 objects have 2 masks"):
            DetectionView(masks=True).from_sample(sample(image, fields), uniform)


class TestBatches:
    @pytest.mark.parametrize(
        ("view", "kind"),
        [
            (SegmentationView(GEOMETRY), SegmentationBatch),
            (DepthView(GEOMETRY), DepthBatch),
            (NormalsView(GEOMETRY), NormalsBatch),
            (DetectionView(GEOMETRY), DetectionBatch),
            (DetectionView(GEOMETRY, masks=True), DetectionBatch),
        ],
        ids=["segmentation", "depth", "normals", "boxes", "things"],
    )
    def test_batches_match_their_type(self, view: JointView, kind: type) -> None:
        data = module(view)
        assert data.batch_type is kind
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        validate(batch, kind)
        for name in ("boxes", "masks", "box_labels"):
            if name in batch:
                with pytest.raises(BatchError, match=rf"batch\['{name}'\] must be a list of 6 tensors"):
                    validate({**batch, name: batch[name][:-1]}, kind)
                worse = [*batch[name][:2], batch[name][2][:-1], *batch[name][3:]]
                with pytest.raises(BatchError, match=r"\['(boxes|masks|box_labels)'\]\[2\] has T = "):
                    validate({**batch, name: worse}, kind)

    def test_ground_truth_stays_float32_in_lower_precision(self) -> None:
        data = module(DepthView(GEOMETRY))
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        validate({**batch, "image": batch["image"].bfloat16()}, DepthBatch, torch.bfloat16)
        with pytest.raises(BatchError, match=r"batch\['depth'\] must be torch.float32"):
            validate(
                {**batch, "image": batch["image"].bfloat16(), "depth": batch["depth"].bfloat16()},
                DepthBatch,
                torch.bfloat16,
            )

    def test_missing_ground_truth_is_refused_by_its_key(self) -> None:
        scenes = partial(ScenesSource, count=8, resolution=32, fields=["depth"])
        with pytest.raises(
            SettingError, match=r"data.source.fields: SegmentationView needs the ground truth segm.*depth"
        ):
            module(SegmentationView(), scenes).train_dataloader()
        with pytest.raises(
            SettingError, match=r"SegmentationView needs .*, and data.eval_view, CenterCrop, reads none"
        ):
            module(SegmentationView(), eval_view=CenterCrop(8)).batch_type  # noqa: B018
        assert module(SegmentationView()).mask_classes == Encoded.mask_classes


class TestScenes:
    FIELDS = ("segmentation", "depth", "normals", "boxes", "box_labels", "instance_masks")

    def test_cached_ground_truth_equals_the_rendered_one(self, tmp_path: Path) -> None:
        make = partial(ScenesSource, "val", count=6, resolution=24, fields=self.FIELDS)
        drawn, kept = make(), make(cache_dir=tmp_path)
        assert sorted(each.name.split("-")[0] for each in tmp_path.iterdir() if each.is_dir()) == [
            "depths",
            "objects",
            "scenes",
        ]
        again = copy.deepcopy(kept)  # by the state that goes to a loader's worker
        assert len(pickle.dumps(kept)) < 20_000
        for index in range(6):
            ours, theirs = drawn[index]["fields"], kept[index]["fields"]
            assert ours.keys() == set(self.FIELDS)
            for name, value in ours.items():
                assert value.dtype == theirs[name].dtype
                assert torch.equal(value, theirs[name]), name
                assert torch.equal(value, again[index]["fields"][name])
            scene = drawn.scene(index)
            masks, kinds = render.instance_masks(scene, 24), render.box_labels(scene, drawn.world.kinds)
            expected = (masks * (1 + kinds)[:, None, None]).sum(axis=0)
            assert np.array_equal(ours["segmentation"].numpy(), expected)
            assert torch.equal(kept.segmentation(index), ours["segmentation"])
            shown = np.concatenate([~masks.any(axis=0, keepdims=True), masks])
            facing = np.einsum("thw,tc->chw", shown.astype(np.float32), render.facings(scene))
            np.testing.assert_allclose(ours["normals"], facing, atol=1e-7)
        theirs["depth"].zero_()  # a sample is a copy
        assert kept[5]["fields"]["depth"].min() > 0

    def test_only_requested_fields_are_cached(self, tmp_path: Path) -> None:
        ScenesSource("val", count=2, resolution=16, fields=["depth"], cache_dir=tmp_path)
        assert not list(tmp_path.glob("things-*"))

    def test_mask_classes_are_named(self) -> None:
        source = ScenesSource("val", count=1, resolution=16)
        assert source.mask_classes == ("backdrop", *source.classes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomRescale(0), "RandomRescale: 1 <= shorter"),
        (lambda: RandomRescale(8, ratio=(2.0, 1.0)), "RandomRescale"),
        (lambda: PaddedCrop(8, max_share=0.0), "max_share in"),
        (lambda: DepthView(nearest=2.0, farthest=1.0), "nearest < farthest"),
        (lambda: DetectionView(smallest=0.0), "smallest and multiple"),
        (lambda: DetectionView(tight=True), "masks=true is needed"),
    ],
)
def test_invalid_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_an_image_view_ignores_ground_truth() -> None:
    data = DataModule(
        source=partial(ScenesSource, count=8, resolution=16, fields=["depth"]),
        train_view=CenterCrop(16, 1.0),
        eval_view=CenterCrop(16, 1.0),
        batch_size=4,
        num_workers=0,
    )
    assert "depth" not in next(iter(data.train_dataloader()))


def test_a_view_that_needs_ground_truth_refuses_data_without_it() -> None:
    data = DataModule(
        source=partial(ScenesSource, count=8, resolution=16),
        train_view=SegmentationView(),  # type: ignore[arg-type]
        eval_view=CenterCrop(16, 1.0),
        batch_size=4,
        num_workers=0,
    )
    with pytest.raises(UserError, match=r"data.train_view: SegmentationView needs the ground truth segmentation"):
        check_batches(linear(), data)
    views = {"train_view": SegmentationView(), "eval_view": SegmentationView()}
    check_batches(linear(), DataModule(source=Encoded, **views, batch_size=4))
