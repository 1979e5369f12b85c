"""Views of any height, width and number of channels."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from src.datamodules.batches.base import validate
from src.datamodules.channels import VideoInChannels, to_channels
from src.datamodules.datamodule import DataModule
from src.datamodules.decoding import EncodedImage
from src.datamodules.sources.source import Sample, Source
from src.datamodules.views.augment import RandAugmentCrop, StrongFrames
from src.datamodules.views.color import Color, adjust_contrast, gaussian_blur
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, MultiView
from src.datamodules.views.resample import resample_boxes
from src.datamodules.views.segmentation import SegmentationView
from src.datamodules.views.squeezed import SqueezedCrop
from src.datamodules.views.statistics import crop_flow, partitions
from src.datamodules.views.transforms import PaddedCrop, check_transform, padding_color
from src.datamodules.views.video import CenterVideoCrop, MultiScaleCrop, RandomSquare, RandomVideoCrop, SegmentClip
from src.errors import SettingError
from src.image_size import fitted_box, height_and_width
from src.randomness import uniform


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def encoded(pixels: torch.Tensor, mode: str = "RGB") -> EncodedImage:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy(), mode).save(file, "PNG")
    return EncodedImage(file.getvalue())


class Pixels(Source):
    """Four decoded images."""

    labels = np.arange(4)

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, torch.from_numpy(self.images[index]))

    def name(self, index: int) -> str:
        return str(index)


class Frames:
    duration, rate = 2.0, 2.0

    def __init__(self, frames: torch.Tensor) -> None:
        self.frames = frames

    def frames_at(self, times: Any) -> torch.Tensor:
        return self.frames[[int(time * 2) for time in times]]

    def flow(self, times: Any) -> torch.Tensor:
        return torch.full((len(times) - 1, 2, 4, 4), 7.0)


class TestSizes:
    def test_a_number_is_a_square_and_a_list_is_height_and_width(self) -> None:
        assert height_and_width(224) == (224, 224)
        assert height_and_width([224, 448]) == (224, 448)
        for wrong in (0, [224], [224, 0], 224.0, "224", None, True, [224, "448"]):
            with pytest.raises(SettingError, match=r"a whole number of pixels, or \[height, width\]"):
                height_and_width(wrong)  # type: ignore[arg-type]

    def test_the_largest_box_of_the_size_s_proportions(self) -> None:
        assert fitted_box(100, 300, 7) == (100, 100)
        assert fitted_box(100, 300, (224, 448)) == (100, 200)
        assert fitted_box(300, 100, (224, 448)) == (50, 100)

    def test_resampling_to_height_and_width_equals_pil(self) -> None:
        image, box = noise(3, 40, 60), (5, 9, 31, 44)
        found = resample_boxes(image[None], np.array([box], float), (12, 40))[0]
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 12), Image.Resampling.BICUBIC, (9, 5, 53, 36))
        assert found.shape == (3, 12, 40)
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(pil)).max() <= 2

    def test_a_center_crop_keeps_proportions(self) -> None:
        """Of 60x60 pixels, the middle half of the rows: 15 to 45."""
        image = noise(3, 60, 60)
        view, nothing = CenterCrop((30, 60), share=1.0), np.zeros((1, 0))
        assert torch.equal(view.from_decoded(image[None], nothing)["image"][0], image[:, 15:45])
        assert torch.equal(view.from_encoded(encoded(image), nothing[0])["image"], image[:, 15:45])

    def test_a_random_crop_s_ratio_is_relative_to_the_size_s(self) -> None:
        view = RandomResizedCrop((16, 32), scale=(0.2, 0.5))
        boxes = view.boxes(100, 140, uniform(0, [0] * 2000, range(2000), view.num_uniforms))
        ratio = boxes[:, 3] / boxes[:, 2] / 2
        assert 0.73 < ratio.min() < 0.78
        assert 1.28 < ratio.max() < 1.37
        assert (boxes[:, :2] + boxes[:, 2:] <= [100, 140]).all()
        whole = RandomResizedCrop((16, 32), scale=(1.0, 1.0), ratio=(1.0, 1.0))
        assert whole.boxes(50, 100, uniform(0, [0], [0], whole.num_uniforms)).tolist() == [[0, 0, 50, 100]]

    def test_a_squeezed_image_is_whole_whatever_the_size(self) -> None:
        for size in (16, (8, 32), (32, 8)):
            view = SqueezedCrop(size)
            assert view.boxes(60, 90, uniform(0, [0], [0], view.num_uniforms)).tolist() == [[0, 0, 60, 90]]
        part = SqueezedCrop((10, 20), scale=(0.25, 0.25))  # a quarter, of the squeezed image's proportions: 30 x 45
        boxes = part.boxes(60, 90, uniform(0, [0] * 20, range(20), part.num_uniforms))
        np.testing.assert_allclose(boxes[:, 2:], [[30, 45]] * 20, rtol=0.03)

    def test_the_views_of_a_pair_share_a_size(self) -> None:
        kind = Augmented(RandomResizedCrop([8, 16]), Color(brightness=0.4, blur=1.0), count=2)
        small = Augmented(RandomResizedCrop((4, 8)))
        view = MultiView({"both": kind}, {"small": small})
        row = view.from_encoded(encoded(noise(3, 30, 30)), uniform(0, [0], [0], view.num_uniforms)[0])
        assert (row["views"].shape, row["local_views"].shape) == ((2, 3, 8, 16), (1, 3, 4, 8))
        with pytest.raises(SettingError, match="views must be views of one size, got 8x16, 16x8"):
            MultiView({"a": kind, "b": Augmented(RandomResizedCrop((16, 8)))})

    def test_boxes_of_videos_have_the_size_s_proportions(self) -> None:
        """Of 40x100 pixels the largest box of 1 to 2 is 40x80; half of it 20x40."""
        numbers = np.array([[0.0, 0.5, 0.9], [0.999, 0.999, 0.9]])
        square = RandomSquare((8, 16), share=0.5).boxes(40, 100, numbers)
        np.testing.assert_allclose(square, [[0, 30, 20, 40], [19.98, 59.94, 20, 40]])
        # scales 1 and 1/2: pairs (1, 1), (1, 1/2), (1/2, 1), (1/2, 1/2), at the first and the last place
        multi = MultiScaleCrop((8, 16), scales=(1.0, 0.5)).boxes(40, 100, np.array([[0.3, 0, 0], [0.99, 0, 0]]))
        assert multi[:, 2:].tolist() == [[40, 40], [20, 40]]
        near = MultiScaleCrop((21, 41), scales=(1.0, 0.5)).boxes(42, 82, np.array([[0.99, 0.0, 0.0]]))
        assert near[0, 2:].tolist() == [21, 41]  # 21 and 41 exactly, so no resize

    def test_center_crops_of_videos_lie_along_the_side_with_more_room(self) -> None:
        frames = noise(4, 3, 40, 60)
        wide = CenterVideoCrop(SegmentClip(2), (20, 60), share=1.0, crops=2).from_video(Frames(frames), np.zeros(0))
        assert torch.equal(wide["video"][0], frames[[1, 3]][:, :, :20])  # 20x60 at the top, then at the bottom
        assert torch.equal(wide["video"][1], frames[[1, 3]][:, :, 20:])
        tall = CenterVideoCrop(SegmentClip(2), (40, 20), share=1.0).from_video(Frames(frames), np.zeros(0))
        assert torch.equal(tall["video"], frames[[1, 3]][..., 20:40])

    def test_partitions_of_a_wide_frame_are_those_of_a_square_stretched(self) -> None:
        for square, wide in zip(partitions(8, 8)[:2], partitions(8, 16)[:2], strict=True):
            assert (square.masks.repeat(2, axis=2) == wide.masks).all()
        triangles = partitions(8, 16)[2].masks
        assert (triangles.sum(axis=0) >= 1).all()
        assert triangles.sum(axis=(1, 2)).tolist() == [16] * 8  # half of a quarter of 4x8; no center is on a diagonal
        assert triangles[0, :4, :8].tolist() == [[column < 2 * row + 1 for column in range(8)] for row in range(4)]

    def test_a_flow_is_in_pixels_of_the_resized_crop(self) -> None:
        """A box of 10x20 becomes 5x40: down is halved, across doubled."""
        flow = crop_flow(torch.ones(1, 2, 30, 30), np.array([0.0, 0.0, 10.0, 20.0]), (5, 40), flip=False)
        assert flow.shape == (1, 2, 5, 40)
        torch.testing.assert_close(flow[0, 0], torch.full((5, 40), 2.0))
        torch.testing.assert_close(flow[0, 1], torch.full((5, 40), 0.5))

    def test_a_blur_s_radius_follows_the_shorter_side(self) -> None:
        image = torch.rand(1, 3, 60, 200)
        narrow = gaussian_blur(image, torch.tensor([2.0]))
        torch.testing.assert_close(narrow, v2.functional.gaussian_blur(image, [7, 7], [2.0]), atol=1e-5, rtol=0)


class TestChannels:
    def test_grayscale_and_rgba_from_files(self) -> None:
        color = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
        gray = encoded(color).as_channels(1).decode()
        # (19595 * 10 + 38470 * 20 + 7471 * 30 + 32768) / 65536 = 18.66
        assert (gray.mode, gray.getpixel((0, 0))) == ("L", 18)
        assert encoded(color).as_channels(4).decode().getpixel((0, 0)) == (10, 20, 30, 255)
        assert encoded(color[:1], "L").as_channels(4).decode().getpixel((0, 0)) == (10, 10, 10, 255)
        with pytest.raises(SettingError, match=r"data.channels=2: image files are decoded to 1 channel \(grayscale\)"):
            encoded(color).as_channels(2)

    def test_four_channels_are_resized_by_themselves(self) -> None:
        """Where the fourth is 0, Pillow's own resize would lose the others."""
        bands = noise(4, 8, 8)
        bands[3] = 0
        view = RandomResizedCrop((4, 6), scale=(0.9, 1.0))
        numbers = uniform(0, [0], [0], view.num_uniforms)
        from_file = view.from_encoded(encoded(bands, "RGBA").as_channels(4), numbers[0])["image"]
        without = view.from_encoded(encoded(bands[:3]), numbers[0])["image"]
        assert torch.equal(from_file[:3], without)
        assert (from_file[3] == 0).all()
        decoded = view.from_decoded(bands[None], numbers)["image"][0]
        assert (decoded.int() - from_file.int()).abs().max() <= 2

    def test_decoded_images_are_converted_as_files_are(self) -> None:
        image = noise(3, 5, 6)
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        for channels, mode in ((1, "L"), (4, "RGBA")):
            expected = torch.from_numpy(np.array(pil.convert(mode))).view(5, 6, -1).permute(2, 0, 1)
            assert torch.equal(to_channels(image[None], channels)[0], expected)
        assert torch.equal(to_channels(image[:1], 3), image[:1].repeat(3, 1, 1))
        with pytest.raises(SettingError, match=r"have 4 channels, which cannot be converted: set data.channels=4"):
            to_channels(noise(4, 2, 2), 3)

    def test_videos_are_converted_and_keep_their_flow(self) -> None:
        frames = noise(4, 3, 6, 6)
        video = VideoInChannels(Frames(frames), 1)  # type: ignore[arg-type]
        assert torch.equal(video.frames_at([0.0, 1.5]), to_channels(frames[[0, 3]], 1))
        assert (video.duration, video.rate, float(video.flow([0, 1]).max())) == (2.0, 2.0, 7.0)
        view = RandomVideoCrop(SegmentClip(2), RandomSquare((4, 6)), color=Color(brightness=0.5))
        assert view.from_video(video, np.full(view.num_uniforms, 0.5))["video"].shape == (2, 1, 4, 6)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_a_batch_has_the_datamodule_s_channels_normalized(self, channels: int) -> None:
        images = noise(4, 3, 8, 8)
        mean, std = [0.1, 0.2, 0.3, 0.4][:channels], [0.5, 0.25, 0.5, 0.25][:channels]
        view = CenterCrop((4, 8), share=1.0)
        module = DataModule(
            source=lambda split: Pixels(images),
            train_view=Augmented(RandomResizedCrop((4, 8)), Color(brightness=0.4, contrast=0.4, solarize=1.0)),
            eval_view=view,
            batch_size=2,
            num_workers=0,
            channels=channels,
            mean=mean,
            std=std,
        )
        batch = module.on_after_batch_transfer(next(iter(module.val_dataloader())), 0)
        validate(batch, view.batch_type)
        expected = (to_channels(images, channels)[:, :, 2:6] / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(
            std
        ).view(-1, 1, 1)
        torch.testing.assert_close(batch["image"], expected)
        assert next(iter(module.train_dataloader()))["image"].shape == (2, channels, 4, 8)
        assert module.view_masks(torch.ones(1, 8, 8, dtype=torch.bool)).tolist() == torch.ones(1, 4, 8).tolist()

    def test_operators_that_need_rgb_refuse_other_channels(self) -> None:
        color = Color(saturation=0.4, hue=0.1, grey=0.2, brightness=0.4)
        for view in (Augmented(RandomResizedCrop(8), color), MultiView({"a": Augmented(RandomResizedCrop(8), color)})):
            with pytest.raises(SettingError, match=r"saturation, hue, grey need RGB, and data.channels is 1: set"):
                view.check_channels(1)
        with pytest.raises(SettingError, match=r"policy=rand-m9-mstd0.5-inc1 need RGB, and data.channels is 4: set"):
            RandAugmentCrop(8).check_channels(4)
        with pytest.raises(SettingError, match=r"StrongFrames: mean and std have 3 numbers, and data.channels is 1"):
            StrongFrames(8, policy=None).check_channels(1)
        jitter = v2.RandomApply([v2.ColorJitter(hue=0.1)])
        with pytest.raises(SettingError, match=r"saturation and hue of ColorJitter need RGB, and data.channels is 1"):
            SegmentationView([jitter]).check_channels(1)
        check_transform(v2.RandomApply([v2.ColorJitter(brightness=0.1)]), 1)
        with pytest.raises(SettingError, match=r"ColorJitter needs RGB or grayscale, and data.channels is 4"):
            check_transform(v2.ColorJitter(brightness=0.1), 4)
        with pytest.raises(SettingError, match=r"saturation, hue, grey need RGB"):
            DataModule(
                source=lambda split: Pixels(noise(4, 3, 8, 8)),
                train_view=Augmented(RandomResizedCrop(8), color),
                eval_view=CenterCrop(8),
                batch_size=2,
                channels=1,
                mean=[0.5],
                std=[0.5],
            )

    def test_contrast_without_rgb_is_relative_to_the_mean(self) -> None:
        """Values 0.2 and 0.6 have the mean 0.4; half of the contrast is 0.3 and 0.5."""
        image = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2)
        torch.testing.assert_close(
            adjust_contrast(image, torch.tensor([0.5])), torch.tensor([0.3, 0.5]).view(1, 1, 1, 2)
        )

    def test_erasing_works_on_any_channels(self) -> None:
        view = RandAugmentCrop((8, 12), policy=None, erase=1.0, mean=(0.5, 0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1, 0.1))
        view.check_channels(4)
        image = torch.full((1, 4, 8, 12), 255, dtype=torch.uint8)
        changed = view.from_decoded(image, uniform(0, [0], [0], view.num_uniforms))["image"][0]
        erased = (changed != 255).all(dim=0)
        assert 0 < erased.sum() < 96
        rows, columns = erased.nonzero().T
        assert erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()  # one rectangle

    def test_padding_has_as_many_channels(self) -> None:
        gray = tv_tensors.Image(noise(1, 2, 2))
        assert PaddedCrop((2, 3))(gray)[0, :, 2].tolist() == [117, 117]  # luma of (124, 116, 104) is 117.0
        with pytest.raises(SettingError, match=r"fill, is not set, and data.channels is 4"):
            padding_color(None, 4)
        assert padding_color((1, 2, 3, 4), 4) == [1, 2, 3, 4]
