"""Prompt templates for the names of classes of natural images."""

from __future__ import annotations

from src.datamodules.sources.source import Prompts

# CLIP's authors found these seven to do nearly as well as their eighty
PHOTOS = Prompts(
    templates=(
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    single="a photo of a {}.",
)

_KINDS_OF_PHOTO = (
    "a photo of",
    "a bad photo of",
    "a black and white photo of",
    "a blurry photo of",
    "a bright photo of",
    "a close-up photo of",
    "a cropped photo of",
    "a dark photo of",
    "a good photo of",
    "a jpeg corrupted photo of",
    "a low resolution photo of",
    "a pixelated photo of",
    "itap of",  # "I took a picture", a forum for photos
)
_OTHER_KINDS = (
    "a doodle of",
    "a drawing of",
    "a painting of",
    "a rendering of",
    "a rendition of",
    "a sculpture of",
    "a sketch of",
    "a tattoo of",
    "art of",
    "graffiti of",
)
_ADJECTIVES = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MATERIALS = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")


def eighty_templates() -> tuple[str, ...]:
    """Returns the 80 templates with which CLIP's zero-shot accuracy on ImageNet is reported (Radford et al., 2021,
    section 3.1.4); as in the authors' notebook the indefinite article is always "a"."""
    with_article = [f"{kind} {{article}} {{}}." for kind in (*_KINDS_OF_PHOTO, *_OTHER_KINDS)]
    with_article += [f"a photo of {{article}} {adjective} {{}}." for adjective in _ADJECTIVES]
    with_article += [f"{{article}} {material} {{}}." for material in _MATERIALS]
    with_article += ["{article} {} in a video game."]
    templates = [frame.replace("{article}", article) for frame in with_article for article in ("a", "the")]
    return (*templates, "a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.")
