"""The embedded data set: rendered scenes behind the interface every source has."""

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
    templates=(  # as the short texts begin
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
_ATTEMPTS = 64  # every other one succeeds
FIELDS = ("labels", "boxes", "box_labels", "instance_masks", "segmentation", "normals", "depth")
_OBJECT_FIELDS = ("boxes", "box_labels", "instance_masks", "segmentation", "normals")


@dataclass(frozen=True)
class SceneTexts:
    """How scenes are described.

    Args:
        style: "short", "long", or "alt": short as the web has it.
        wordings: ways of a short text that training may use, positions in `captions.SHORT`; None for all.
        mismatched, dropped, junk: of "alt", see `captions.alt_text`.
        judged: texts of each image that retrieval is judged with.
        variants: different texts of an image that training may see, as an image of the web has one; None for as many
            as the style has words for.
        judged_wordings: ways of saying them, positions in `captions.SHORT`; None for all. What is not among
            ``wordings`` is judged unseen.
        places: whether they also say in which part of the image the main object is.
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
            raise SettingError(f"scenes are described in the style short, long or alt, not '{self.style}'")
        for wordings in (self.wordings, self.judged_wordings):
            known = range(len(captions.SHORT))
            if wordings is not None and (len(wordings) == 0 or any(each not in known for each in wordings)):
                raise SettingError(f"scenes have the wordings 0 to {len(known) - 1}, not {wordings}")
        for name in ("mismatched", "dropped", "junk"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"the share {name}={getattr(self, name)} of scenes' texts must be in [0, 1]")
        if self.judged < 1:
            raise SettingError(f"retrieval needs at least one text a picture, got judged={self.judged}")
        if self.variants is not None and self.variants < 1:
            raise SettingError(f"training needs at least one text a picture, got variants={self.variants}")


class ScenesSource(Source):
    """``count`` scenes of one split (one number, or one a split), with the ground truth that is asked for.

    The split is folded into the seed, so no two splits share a scene, whatever their sizes; a larger ``count`` adds
    scenes to the same ones. Fields, T being the scene's number of objects (the main object is always the first):

    - ``labels`` bool [K]: kinds of which at least 0.2 % of the image is seen
    - ``boxes`` float32 [T, 4]: x0 y0 x1 y1 in pixels around the visible part, zeros where nothing is seen
    - ``box_labels`` int64 [T]: kind of each object
    - ``instance_masks`` bool [T, H, W]: visible part, disjoint
    - ``segmentation`` uint8 [H, W]: 0 for the backdrop, 1 + kind for an object, as ``mask_classes`` names them
    - ``depth`` float32 [H, W]: metres along the camera's axis

    With ``cache_dir`` the images and labels are rendered once into memory-mapped arrays, then also found whole in
    ``images`` (uint8 [N, 3, H, W]) and ``labels`` (int64 [N]), and so are the ``fields``, but for ``labels``.

    ``combinations`` (one, or one a split) are the world's: ``{train: seen, val: unseen, test: unseen}`` asks whether
    what was learned of kinds and of colors holds where they meet for the first time.
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
            ValueError: an unknown split or field, or a count, resolution or seed that is out of range.
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
        """Such as "scenes/train/123"."""
        self._check(index)
        return f"scenes/{self.split}/{index}"

    def scene(self, index: int) -> Scene:
        """What sample ``index`` shows, as data."""
        self._check(index)
        return self.world.scene(self._scene_seed, index)

    def segmentation(self, index: int) -> torch.Tensor:
        """What each pixel shows: uint8 [H, W], 0 for the backdrop, 1 + kind for an object. Rendered when asked for,
        whatever ``fields`` says."""
        self._check(index)
        objects, kinds = self._objects(index)
        return torch.from_numpy(_classes(objects, kinds))

    def tags(self, index: int) -> torch.Tensor:
        """Kinds that can be seen: bool [K], the field ``labels``, whatever ``fields`` says."""
        return torch.from_numpy(render.labels(self.scene(index), self.world.kinds))

    def caption(self, index: int, choice: float) -> str:
        """One of the ways of describing scene ``index``, in the style that was asked for."""
        return self._described(index, int(choice * (self.texts.variants or 2**31)))

    def all_texts(self, index: int) -> Sequence[str]:
        """All that `caption` may say.

        Raises:
            SettingError: that is endless.
        """
        if self.texts.variants is None:
            raise SettingError("scenes are described anew every time; data.source.texts.variants gives them a list")
        return tuple(self._described(index, wording) for wording in range(self.texts.variants))

    def regions(self, index: int, choice: float) -> Sequence[str]:
        """A text of each object alone, in the order of the fields ``boxes`` and ``instance_masks``; ``choice`` in [0, 1)
        chooses the words."""
        what, wording = self._facts(self.scene(index)), fold(index, int(choice * 2**31))
        return tuple(captions.region(what, each, fold(wording, each)).text for each in range(len(what.objects)))

    def captions(self, index: int) -> Sequence[str]:
        """True short texts, whatever training is told, in the ways that judging may use: the first that differ."""
        what, found = self._facts(self.scene(index)), dict[str, None]()
        for wording in range(20 * self.texts.judged):
            text = captions.short(what, fold(index, wording), wordings=self.texts.judged_wordings).text
            found.setdefault(text)
            if len(found) == self.texts.judged:
                break
        return tuple(found)

    def mistakes(self, index: int) -> Sequence[HardNegative]:
        """One of each kind that the scene allows, in wordings that say what is wrong, and the same for right and wrong:

        - "attribute": the main object has another color, where there is no second one of another color
        - "swapped": otherwise the two have each other's colors; every word of the right text is in the wrong one
        - "relation": the second object is on the other side
        - "count": there are more or fewer objects, as many as there may be
        """
        what, found = self._facts(self.scene(index)), []
        for number, (mistake, wordings) in enumerate(captions.SHOWN_BY.items()):
            choice = fold(index, number)
            if mistake == "count":
                # a number that no scene has is wrong whatever the image shows
                fewer, more = (len(what.objects) - 1 - limit for limit in self.world.others)
                choice = choice if fewer > 0 > more else int(fewer > 0)
            wrong = captions.mistaken(what, mistake, choice)
            if wrong is None:
                continue
            swapped = mistake == "attribute" and len({obj.color for obj in what.objects[:2]}) == 2
            for attempt in range(_ATTEMPTS):
                wording = fold(index, number, attempt)
                right, other = (captions.short(each, wording, wordings=wordings).text for each in (what, wrong))
                if not swapped or _words(right) == _words(other):  # synonyms may have to be drawn anew
                    found.append(HardNegative("swapped" if swapped else mistake, right, other))
                    break
        return found

    def grounding(self, index: int) -> Grounding:
        """The first of `captions`, whose words for an object are its adjectives and its noun, without the article."""
        scene = self.scene(index)
        said = captions.short(self._facts(scene), fold(index, 0))
        spans = ((said.text.index(" ", begin) + 1, end, obj) for begin, end, obj in said.spans)
        return Grounding(said.text, tuple(spans), torch.from_numpy(render.instance_masks(scene, self.resolution)))

    def _facts(self, scene: Scene) -> Facts:
        return captions.facts(scene, places=self.texts.places)

    def _described(self, index: int, wording: int) -> str:
        what, wording = self._facts(self.scene(index)), fold(index, wording)
        if self.texts.style == "long":
            return captions.long(what, wording).text
        if self.texts.style == "short":
            return captions.short(what, wording, wordings=self.texts.wordings).text
        other = self._facts(self.scene(wording % self.count))
        shares = {"mismatched": self.texts.mismatched, "dropped": self.texts.dropped, "junk": self.texts.junk}
        return captions.alt_text(what, wording, other=other, **shares).text

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped arrays: a pickled one would be a copy of all images."""
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
                found["segmentation"] = _classes(objects, kinds)
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
        """Which object each pixel shows, uint8 [H, W], 0 for the backdrop, and the kinds of the objects, int64 [T]."""
        if "objects" in self._truths:
            objects, kinds = self._truths["objects"][index], self._truths["kinds"][index]
        else:
            objects, kinds = ObjectMaps(self.world, self._scene_seed, self.count, self.resolution).render(index)
        return np.array(objects), kinds[kinds >= 0].astype(np.int64)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")


def _classes(objects: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """What each pixel shows, of which object it shows: uint8 [H, W]."""
    return np.concatenate([[0], 1 + kinds]).astype(np.uint8)[objects]


def _words(text: str) -> list[str]:
    """What is said, in no order; of the articles one is as good as the other."""
    return sorted("a" if word == "an" else word for word in text.split())
