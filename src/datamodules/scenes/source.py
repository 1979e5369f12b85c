"""The embedded data set: rendered scenes as a source of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from src.datamodules.scenes import captions, render
from src.datamodules.scenes.cache import DepthMaps, ObjectMaps, SceneImages, mapped, open_or_build
from src.datamodules.scenes.captions import Facts
from src.datamodules.scenes.scene import Scene
from src.datamodules.scenes.world import Combinations, ObjectsWorld
from src.datamodules.sources.source import Grounding, HardNegative, Prompts, Sample, Source, Split
from src.errors import SettingError
from src.randomness import fold

SPLITS: tuple[Split, ...] = get_args(Split)
PROMPTS = Prompts(
    templates=(  # as the short captions begin
        "a photo of a {}",
        "a picture of a {}",
        "an image of a {}",
        "this is a {}",
        "there is a {}",
        "one can see a {}",
        "a {}",
    ),
    single="a photo of a {}",
)
_ATTEMPTS = 64  # about half of them succeed
FIELDS = ("labels", "boxes", "box_labels", "instance_masks", "segmentation", "normals", "depth")
_OBJECT_FIELDS = ("boxes", "box_labels", "instance_masks", "segmentation", "normals")


@dataclass(frozen=True)
class SceneTexts:
    """The captions of scenes.

    Args:
        style: "short", "long", or "alt": short with the noise of alt texts.
        wordings: sentence patterns of short training captions, indices of `captions.SHORT`; None for all.
        mismatched, dropped, junk: noise of "alt", see `captions.alt_text`.
        judged: captions of each image in evaluation.
        variants: number of different training captions of an image; None for no limit.
        judged_wordings: sentence patterns in evaluation, indices of `captions.SHORT`; None for all. Those that are not
            among ``wordings`` are unseen in training.
        places: whether captions also mention the main object's place in the image.
    """

    style: Literal["short", "long", "alt"] = "short"
    wordings: tuple[int, ...] | None = None
    mismatched: float = 0.0
    dropped: float = 0.0
    junk: float = 0.0
    judged: int = 5
    variants: int | None = None
    judged_wordings: tuple[int, ...] | None = None
    places: bool = False

    def __post_init__(self) -> None:
        if self.style not in ("short", "long", "alt"):
            raise SettingError(f"data.source.texts.style must be short, long or alt, not '{self.style}'")
        for wordings in (self.wordings, self.judged_wordings):
            patterns = range(len(captions.SHORT))
            if wordings is not None and (len(wordings) == 0 or any(wording not in patterns for wording in wordings)):
                raise SettingError(
                    "data.source.texts: wordings and judged_wordings are some of "
                    f"0 to {len(patterns) - 1}, not {wordings}"
                )
        for name in ("mismatched", "dropped", "junk"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"data.source.texts.{name} must be a share in [0, 1], not {getattr(self, name)}")
        if self.judged < 1:
            raise SettingError(f"data.source.texts.judged must be at least 1, not {self.judged}")
        if self.variants is not None and self.variants < 1:
            raise SettingError(f"data.source.texts.variants must be at least 1, not {self.variants}")


class ScenesSource(Source):
    """``count`` scenes of one split (one number, or one a split), with the requested ground truth.

    The split is folded into the seed, so splits of any size share no scene; a larger ``count`` adds scenes to the same
    ones. Fields, T being the scene's number of objects (the main object is always the first):

    - ``labels`` bool [K]: kinds that cover at least 0.2 % of the image
    - ``boxes`` float32 [T, 4]: x0 y0 x1 y1 in pixels around the visible part, zeros for an invisible object
    - ``box_labels`` int64 [T]: kind of each object
    - ``instance_masks`` bool [T, H, W]: visible part, disjoint
    - ``segmentation`` uint8 [H, W]: 0 for the backdrop, 1 + kind for an object, as ``mask_classes`` names them
    - ``depth`` float32 [H, W]: metres along the camera's axis

    With ``cache_dir`` the images, labels and fields (except ``labels``) are rendered once into memory-mapped arrays;
    ``images`` (uint8 [N, 3, H, W]) and ``labels`` (int64 [N]) then hold the whole split.

    ``combinations`` (one, or one per split), see `ObjectsWorld`: ``{train: seen, val: unseen, test: unseen}`` measures
    generalization to unseen combinations of kind and color.
    """

    prompts = PROMPTS

    def __init__(
        self,
        split: Split,
        *,
        count: int | Mapping[Split, int],
        resolution: int = 256,
        seed: int = 0,
        fields: Sequence[str] = (),
        cache_dir: str | Path | None = None,
        world: ObjectsWorld | None = None,
        texts: SceneTexts | None = None,
        combinations: Combinations | Mapping[Split, Combinations] | None = None,
    ) -> None:
        """
        Raises:
            SettingError: an unknown split or field, or a count, resolution or seed that is out of range.
        """
        if split not in SPLITS:
            raise SettingError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        count = count if isinstance(count, int) else count[split]
        unknown = [field for field in fields if field not in FIELDS]
        if unknown:
            raise SettingError(f"scenes have no field {', '.join(map(repr, unknown))}; there are {', '.join(FIELDS)}")
        if count < 1 or resolution < 8 or seed < 0:
            raise SettingError(
                f"scenes need count >= 1, resolution >= 8 and seed >= 0; got {count}, {resolution} and {seed}"
            )
        self.split, self.count, self.resolution, self.seed = split, count, resolution, seed
        self.fields = tuple(fields)
        self.world = world or ObjectsWorld()
        if combinations is not None:
            shown = combinations if isinstance(combinations, str) else combinations.get(split)
            if shown is None:
                raise SettingError(f"data.source.combinations has nothing for the split '{split}'")
            self.world = replace(self.world, combinations=shown)
        self.texts = texts or SceneTexts()
        self.classes: tuple[str, ...] = tuple(kind.name for kind in self.world.kinds)
        self.mask_classes: tuple[str, ...] = ("backdrop", *self.classes)
        self._scene_seed = fold(seed, SPLITS.index(split))
        self.cache_dir = cache_dir
        self._open()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        self._check(index)
        if self.images is not None and self.labels is not None:
            image, label = np.array(self.images[index]), int(self.labels[index])
        else:
            scene = self.scene(index)
            image, label = render.image(scene, self.resolution), render.label(scene, self.world.kinds)
        sample: Sample = {"image": torch.from_numpy(image), "label": label}
        if self.fields:
            sample["fields"] = self._fields(index)
        return sample

    def name(self, index: int) -> str:
        """Returns a name such as "scenes/train/123"."""
        self._check(index)
        return f"scenes/{self.split}/{index}"

    def scene(self, index: int) -> Scene:
        """Returns the scene of sample ``index``."""
        self._check(index)
        return self.world.scene(self._scene_seed, index)

    def segmentation(self, index: int) -> torch.Tensor:
        """Returns the class of each pixel: uint8 [H, W], 0 for the backdrop, 1 + kind for an object. It is available
        without being listed in ``fields``."""
        self._check(index)
        objects, kinds = self._objects(index)
        return torch.from_numpy(_class_map(objects, kinds))

    def tags(self, index: int) -> torch.Tensor:
        """Returns the visible kinds: bool [K], the field ``labels``, available without being listed in ``fields``."""
        return torch.from_numpy(render.labels(self.scene(index), self.world.kinds))

    def caption(self, index: int, choice: float) -> str:
        """Returns a training caption of scene ``index``; ``choice`` in [0, 1) chooses among the variants."""
        return self._described(index, int(choice * (self.texts.variants or 2**31)))

    def all_texts(self, index: int) -> Sequence[str]:
        """Returns every caption that `caption` can return.

        Raises:
            SettingError: their number is not limited by ``variants``.
        """
        if self.texts.variants is None:
            raise SettingError("data.source.texts.variants: without it scenes have no fixed list of captions")
        return tuple(self._described(index, wording) for wording in range(self.texts.variants))

    def descriptions(self, index: int, choice: float) -> Sequence[str]:
        """Returns one long caption, with a sentence for each object; ``choice`` in [0, 1) chooses the wording."""
        wording = fold(index, int(choice * 2**31))
        return (captions.long(self._facts(self.scene(index)), wording).text,)

    def regions(self, index: int, choice: float) -> Sequence[str]:
        """Returns a caption of each object, in the order of the fields ``boxes`` and ``instance_masks``; ``choice`` in
        [0, 1) chooses the wording."""
        scene_facts, wording = self._facts(self.scene(index)), fold(index, int(choice * 2**31))
        return tuple(
            captions.region(scene_facts, each, fold(wording, each)).text for each in range(len(scene_facts.objects))
        )

    def captions(self, index: int) -> Sequence[str]:
        """Returns the different short captions for evaluation, independent of the training captions' style."""
        scene_facts, found = self._facts(self.scene(index)), dict[str, None]()
        for wording in range(20 * self.texts.judged):
            text = captions.short(scene_facts, fold(index, wording), wordings=self.texts.judged_wordings).text
            found.setdefault(text)
            if len(found) == self.texts.judged:
                break
        return tuple(found)

    def mistakes(self, index: int) -> Sequence[HardNegative]:
        """Returns one hard negative of each kind that the scene allows. Right and wrong text have the same sentence
        pattern, which mentions the changed fact:

        - "attribute": another color of the main object, if no second object has another color
        - "swapped": otherwise the two objects' colors are swapped; both texts have the same words
        - "relation": the second object is on the other side
        - "count": another number of objects
        """
        scene_facts, found = self._facts(self.scene(index)), []
        for number, (mistake, wordings) in enumerate(captions.SHOWN_BY.items()):
            choice = fold(index, number)
            if mistake == "count":
                # the wrong number must occur in scenes, else it could be recognized without the image
                fewer, more = (len(scene_facts.objects) - 1 - limit for limit in self.world.others)
                choice = choice if fewer > 0 > more else int(fewer > 0)
            wrong = captions.hard_negative(scene_facts, mistake, choice)
            if wrong is None:
                continue
            swapped = mistake == "attribute" and len({obj.color for obj in scene_facts.objects[:2]}) == 2
            for attempt in range(_ATTEMPTS):
                wording = fold(index, number, attempt)
                right, other = (captions.short(each, wording, wordings=wordings).text for each in (scene_facts, wrong))
                if not swapped or _words(right) == _words(other):  # with other synonyms the words differ
                    found.append(HardNegative("swapped" if swapped else mistake, right, other))
                    break
        return found

    def grounding(self, index: int) -> Grounding:
        """Returns the first of `captions`, with the spans of each object's adjectives and noun, without the article."""
        scene = self.scene(index)
        caption = captions.short(self._facts(scene), fold(index, 0))
        spans = ((caption.text.index(" ", begin) + 1, end, obj) for begin, end, obj in caption.spans)
        return Grounding(caption.text, tuple(spans), torch.from_numpy(render.instance_masks(scene, self.resolution)))

    def _facts(self, scene: Scene) -> Facts:
        return captions.facts(scene, places=self.texts.places)

    def _described(self, index: int, wording: int) -> str:
        scene_facts, wording = self._facts(self.scene(index)), fold(index, wording)
        if self.texts.style == "long":
            return captions.long(scene_facts, wording).text
        if self.texts.style == "short":
            return captions.short(scene_facts, wording, wordings=self.texts.wordings).text
        other = self._facts(self.scene(wording % self.count))
        shares = {"mismatched": self.texts.mismatched, "dropped": self.texts.dropped, "junk": self.texts.junk}
        return captions.alt_text(scene_facts, wording, other=other, **shares).text

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the mapped arrays, because pickling would copy all images."""
        return self.__dict__ | {"images": None, "labels": None, "_truths": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self.images = self.labels = None
        self._truths: dict[str, np.ndarray] = {}
        if self.cache_dir is not None:
            of_these = (self.world, self._scene_seed, self.count, self.resolution)
            self.images, self.labels = open_or_build(SceneImages(*of_these), self.cache_dir)
            if any(field in _OBJECT_FIELDS for field in self.fields):
                self._truths |= mapped(ObjectMaps(*of_these), self.cache_dir)
            if "depth" in self.fields:
                self._truths |= mapped(DepthMaps(*of_these), self.cache_dir)

    def _fields(self, index: int) -> dict[str, torch.Tensor]:
        found: dict[str, np.ndarray] = {}
        if any(field in _OBJECT_FIELDS for field in self.fields):
            objects, kinds = self._objects(index)
            masks = objects == np.arange(1, 1 + len(kinds))[:, None, None]
            found["instance_masks"], found["box_labels"] = masks, kinds
            if "boxes" in self.fields:
                found["boxes"] = render.boxes_of(masks)
            if "segmentation" in self.fields:
                found["segmentation"] = _class_map(objects, kinds)
            if "normals" in self.fields:
                found["normals"] = np.moveaxis(render.facings(self.scene(index))[objects], -1, 0).copy()
        if "depth" in self.fields:
            kept = self._truths.get("depth")
            depth = render.depth(self.scene(index), self.resolution) if kept is None else np.array(kept[index])
            found["depth"] = depth
        if "labels" in self.fields:
            found["labels"] = render.labels(self.scene(index), self.world.kinds)
        return {field: torch.from_numpy(found[field]) for field in self.fields}

    def _objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns 1 + index of the object at each pixel, 0 for the backdrop, uint8 [H, W], and the kinds, int64 [T]."""
        if "objects" in self._truths:
            objects, kinds = self._truths["objects"][index], self._truths["kinds"][index]
        else:
            objects, kinds = ObjectMaps(self.world, self._scene_seed, self.count, self.resolution).render(index)
        return np.array(objects), kinds[kinds >= 0].astype(np.int64)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")


def _class_map(objects: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Returns the class of each pixel, uint8 [H, W], from its object and the objects' kinds."""
    return np.concatenate([[0], 1 + kinds]).astype(np.uint8)[objects]


def _words(text: str) -> list[str]:
    """Returns the sorted words of a text, with "an" as "a"."""
    return sorted("a" if word == "an" else word for word in text.split())
