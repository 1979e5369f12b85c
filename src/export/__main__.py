"""`make export`: a run's encoder, or its two towers, as plain timm or transformers loads them, checked before they are
handed over."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.panel import Panel
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src import configuration, runs, trained
from src.datamodules.image_text import ImageTextDataModule
from src.datamodules.text.tokenizer import Tokenizer
from src.errors import UserError, nearest
from src.export.two_towers import VIT_BLOCK, VIT_QKV, as_transformers, renamed
from src.export.videos import as_videomae
from src.models.backbones.image_encoder import ImageEncoder
from src.models.backbones.video_vit import TubeletEmbed
from src.models.image_text.base import ImageTextModule
from src.models.video.xclip import CrossFrameEncoder

WORDS = ("run", "format", "to", "encoder", "checkpoint")
TOLERANCE = 1e-5
WEIGHTS = "model.safetensors"
BACKBONES = ("timm.create_model", "src.models.backbones.video_vit.video_vit")


@dataclass(frozen=True)
class Towers:
    """What reads images and texts."""

    module: ImageTextModule  # in evaluation mode
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Export:
    """What goes out."""

    run: runs.Run
    config: DictConfig
    backbone: nn.Module  # trained, in evaluation mode
    encoder: str
    checkpoint: Path
    size: int  # side of the pictures it was evaluated on
    crop_share: float  # of the picture's shorter side
    mean: list[float]
    std: list[float]
    classes: list[str]  # of the backbone's classifier, empty where it has none
    towers: Towers | None = None  # of a method with two, where no single encoder was asked for

    @property
    def borrowed(self) -> str:
        """Whose weights training started from, "" where from none."""
        checkpoint = self.config.get("checkpoint")
        if checkpoint is not None:
            return Path(checkpoint).name
        return f"timm's {self.architecture}" if self.config.backbone.get("pretrained") else ""

    @property
    def architecture(self) -> str:
        return str(self.config.backbone.model_name)

    @property
    def arguments(self) -> dict[str, Any]:
        """What timm needs besides the name to build this backbone."""
        training_only = ("_target_", "model_name", "pretrained", "checkpoint_path", "drop_path_rate")
        values = OmegaConf.to_container(self.config.backbone, resolve=True)
        assert isinstance(values, dict)
        arguments = {str(key): value for key, value in values.items() if key not in training_only}
        return arguments | {"num_classes": int(getattr(self.backbone, "num_classes", 0))}

    @property
    def cubes(self) -> TubeletEmbed | None:
        """How the backbone reads clips; None where it reads pictures."""
        embed = getattr(self.backbone, "patch_embed", None)
        return embed if isinstance(embed, TubeletEmbed) else None

    def pictures(self) -> Tensor:
        """Random input of the right size, always the same: [2, 3, H, W], or clips [2, T, 3, H, W]."""
        frames = () if self.cubes is None else (self.cubes.frames,)
        return torch.randn(2, *frames, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def as_encoder(self, library: str, load: str) -> ExportInfo:
        """What is said of the encoder where that was written."""
        parts = f"encoder '{self.encoder}'"
        if self.cubes is not None:
            return ExportInfo(parts, "A video encoder", library, "video-classification", load)
        task = "image-classification" if self.classes else "image-feature-extraction"
        return ExportInfo(parts, "An image encoder", library, task, load)


class ExportInfo(NamedTuple):
    """What is said of an export."""

    parts: str  # which of the run's there are
    kind: str  # begins the model card
    library: str  # that loads it
    task: str  # as the Hugging Face hub calls it
    load: str  # code


Writer = Callable[[Export, Path], ExportInfo]


def main(argv: Sequence[str]) -> int:
    words, rest = trained.words_of(argv, WORDS)
    if rest:
        name = rest[0].partition("=")[0]
        raise UserError(f"make export takes {', '.join(WORDS)}, not '{name}'{nearest(name, WORDS)}")
    run = trained.run_of(words, "make export")
    kind = words.get("format") or "timm"
    if kind not in WRITERS:
        raise UserError(f"there is no format '{kind}'{nearest(kind, list(WRITERS))}")
    export = gather(run, words.get("encoder"), words.get("checkpoint"))
    to = Path(words["to"]) if words.get("to") else run.dir / "export" / kind
    written = write(export, to, WRITERS[kind])
    lines = [f"{written.parts} of {run.title} ({export.checkpoint.name})", f"folder  {os.path.relpath(to)}"]
    Console().print(Panel("\n".join(lines), title=f"exported for {kind}", expand=False, border_style="green"))
    return 0


def gather(run: runs.Run, encoder: str | None, checkpoint: str | None) -> Export:
    """The encoder and all that must be said of it.

    Raises:
        UserError: no such encoder or checkpoint, or no timm backbone behind the run.
    """
    config = run.config()
    backbone = config.get("backbone")
    if backbone is None or backbone.get("_target_") not in BACKBONES:
        raise UserError(f"{run.title} has no timm backbone (`backbone._target_: timm.create_model`) to export")
    path = trained.checkpoint_of(run, checkpoint)
    module = trained.load(config, path)
    encoders: Mapping[str, ImageEncoder] = module.encoders()
    name = encoder or next(iter(encoders))
    if name not in encoders:
        raise UserError(f"{run.title} has no encoder '{name}'{nearest(name, list(encoders))}")
    if isinstance(encoders[name], CrossFrameEncoder):
        raise UserError(f"{run.title} has a ViT whose frames leave each other messages, which no library here loads")
    datamodule = configuration.instantiate(config.data)
    view = datamodule.eval_view
    body = encoders[name].backbone.eval()
    towers = None
    if encoder is None and isinstance(module, ImageTextModule) and isinstance(datamodule, ImageTextDataModule):
        towers = Towers(module, datamodule.tokenizer)
    return Export(
        run=run,
        config=config,
        backbone=body,
        encoder=name,
        checkpoint=path,
        size=int(getattr(view, "size", config.image_size)),
        crop_share=float(getattr(view, "share", 1.0)),
        mean=[round(value, 6) for value in datamodule.mean.flatten().tolist()],
        std=[round(value, 6) for value in datamodule.std.flatten().tolist()],
        classes=list(getattr(module, "classes", [])) if getattr(body, "num_classes", 0) else [],
        towers=towers,
    )


def write(export: Export, to: Path, writer: Writer) -> ExportInfo:
    """Everything into ``to``, whole or not at all; an earlier export there is replaced.

    Raises:
        UserError: ``to`` holds something else, or what was written does not give the encoder's features.
    """
    if to.exists() and not (to.is_dir() and (not any(to.iterdir()) or (to / WEIGHTS).exists())):
        raise UserError(f"{to} exists and is not an earlier export: choose another TO=")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = writer(export, partial)
        (partial / "README.md").write_text(card(export, written))
        if to.exists():
            shutil.rmtree(to)
        partial.replace(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def write_timm(export: Export, folder: Path) -> ExportInfo:
    """``model.safetensors`` for ``checkpoint_path=``, and ``config.json`` for ``local-dir:``.

    Raises:
        UserError: the encoder reads clips.
    """
    if export.cubes is not None:
        raise UserError(f"{export.run.title} reads clips, and timm has no ViT that does: use format=hf")
    arguments = export.arguments
    plain = timm.create_model(export.architecture, **arguments).eval()
    _fill(plain, export.backbone.state_dict(), f"timm's {export.architecture}")
    plain.pretrained_cfg |= {  # type: ignore[operator]
        "mean": tuple(export.mean),
        "std": tuple(export.std),
        "input_size": (3, export.size, export.size),
        "crop_pct": export.crop_share,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    if not export.borrowed:  # of the weights timm knows under this name, which these are not
        for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"):
            plain.pretrained_cfg.pop(key, None)  # type: ignore[union-attr,operator]
    labels = {"label_names": export.classes} if export.classes else {}
    save_for_hf(plain, str(folder), model_config=labels, model_args=arguments, safe_serialization=True)
    with _quiet("timm"):
        written = {
            "checkpoint_path": timm.create_model(export.architecture, checkpoint_path=folder / WEIGHTS, **arguments),
            "local-dir": timm.create_model(f"local-dir:{folder}", pretrained=True),
        }
    x = export.pictures()
    with torch.no_grad():
        for way, model in written.items():
            model.eval()
            for layer in ("forward_features", "forward"):
                _require_equal(getattr(model, layer)(x), getattr(export.backbone, layer)(x), f"{way}, {layer}")
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return export.as_encoder(
        "timm",
        "import timm\n\n"
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)\n'
        "# the same, from the weights alone:\n"
        f'model = timm.create_model("{export.architecture}", checkpoint_path="{WEIGHTS}", {keywords})\n'
        "features = model.forward_features(images)  # normalized as config.json says\n",
    )


def write_hf(export: Export, folder: Path) -> ExportInfo:
    """A folder for ``AutoModel.from_pretrained`` with its image processor: `CLIPModel` or `SiglipModel` of two towers,
    `VideoMAEModel` of an encoder of clips, `ViTModel` of an encoder of pictures.

    Raises:
        UserError: none of them can express it.
    """
    if export.towers is not None:
        return write_towers(export, export.towers, folder)
    if export.cubes is not None:
        return write_clips(export, folder)
    from transformers import ViTConfig

    vit = _expressible(export.backbone, export.architecture)
    width = vit.embed_dim
    block: Any = vit.blocks[0]
    ViTConfig(
        architectures=["ViTModel"],
        hidden_size=width,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        layer_norm_eps=block.norm1.eps,
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        qkv_bias=block.attn.qkv.bias is not None,
        pooler_output_size=width,
        pooler_act="linear",
    ).save_pretrained(folder)
    save_file(hf_weights(vit), folder / WEIGHTS, metadata={"format": "pt"})
    _image_processor(export).save_pretrained(folder)
    model = _loaded(folder)
    x = export.pictures()
    with torch.no_grad():
        output = model(x)
        tokens = vit.forward_features(x)
    _require_equal(output.last_hidden_state, tokens, "last_hidden_state")
    _require_equal(output.pooler_output, tokens[:, 0], "pooler_output")
    return export.as_encoder(
        "transformers",
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'model = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'output = model(**processor(image, return_tensors="pt"))\n'
        "output.last_hidden_state[:, 1:]  # one vector a patch; their mean is what was evaluated\n"
        "output.pooler_output  # the class token: the pooler is the identity\n",
    )


@torch.no_grad()
def write_clips(export: Export, folder: Path) -> ExportInfo:
    """`VideoMAEModel` and its processor of clips.

    Raises:
        UserError: it cannot express the encoder.
    """
    from transformers import VideoMAEImageProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with _quiet("transformers"):
        as_videomae(export.backbone, export.architecture).save_pretrained(folder)
        VideoMAEImageProcessor(
            size={"shortest_edge": round(export.size / export.crop_share)},
            crop_size={"height": export.size, "width": export.size},
            resample=3,  # bicubic
            image_mean=export.mean,
            image_std=export.std,
        ).save_pretrained(folder)
    x = export.pictures()
    tokens = export.backbone.forward_features(x)  # type: ignore[operator]
    _require_equal(_loaded(folder)(x).last_hidden_state, tokens, "last_hidden_state")
    return export.as_encoder(
        "transformers",
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'model = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        f'output = model(**processor(frames, return_tensors="pt"))  # {x.shape[1]} pictures\n'
        "output.last_hidden_state  # one vector a cube; their mean is what was evaluated\n",
    )


@torch.no_grad()
def write_towers(export: Export, towers: Towers, folder: Path) -> ExportInfo:
    """Both towers, the tokenizer and the image processor.

    Raises:
        UserError: transformers has no model for these towers, or what was written says something else than they do.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    module, tokenizer = towers.module, towers.tokenizer
    transformers_logging.disable_progress_bar()
    with _quiet("transformers"):
        as_transformers(module, tokenizer).save_pretrained(folder)
        tokenizer.inner.model_max_length = tokenizer.length
        tokenizer.inner.save_pretrained(folder)
        _image_processor(export).save_pretrained(folder)
        reader = AutoTokenizer.from_pretrained(folder)
    model = _loaded(folder)
    texts = ["a", "a photo of a red square.", "IMG_0042 " + "many words " * tokenizer.length]
    ids, mask = tokenizer(texts)
    theirs = reader(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    if not torch.equal(theirs, ids):
        raise UserError("not exported: the tokenizer that was written gives other ids than the run's own")
    pictures = export.pictures()
    found = model(input_ids=ids, pixel_values=pictures)
    image, text = module.encode_image(pictures), module.encode_text(ids, mask)
    _require_equal(found.image_embeds, image, "image_embeds")
    _require_equal(found.text_embeds, text, "text_embeds")
    scale: Any = module.logit_scale
    bias: Any = getattr(module, "logit_bias", 0.0)
    # the scale multiplies what the vectors differ in
    _require_equal(found.logits_per_image, scale.exp() * image @ text.T + bias, "logits_per_image", float(scale.exp()))
    return ExportInfo(
        "both towers",
        "Image and text towers",
        "transformers",
        "zero-shot-image-classification",
        f"from transformers import AutoImageProcessor, AutoTokenizer, {type(model).__name__}\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        f'model = {type(model).__name__}.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]\n'
        'output = model(input_ids=ids, **processor(images, return_tensors="pt"))\n'
        "output.image_embeds, output.text_embeds  # unit vectors\n"
        "output.logits_per_image  # [images, texts]\n",
    )


def hf_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """A timm ViT's weights under the names `ViTModel` has in its files, with a pooler that hands on the class token."""
    weights = renamed(
        vit.state_dict(),
        names={
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "norm": "layernorm",
        },
        layers="encoder.layer",
        block=VIT_BLOCK,
        qkv=VIT_QKV,
        what="ViTModel",
    )
    weights["pooler.dense.weight"] = torch.eye(vit.embed_dim)
    weights["pooler.dense.bias"] = torch.zeros(vit.embed_dim)
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def card(export: Export, written: ExportInfo) -> str:
    """The model card."""
    config = export.config
    recipe = {
        "experiment": f"`{config.run.experiment}` at scale `{config.run.scale}`",
        "paper": config.about.paper,
        "deviations": config.about.deviations,
        "data": data_of(config),
        "backbone": f"timm `{export.architecture}`, {sum(p.numel() for p in export.backbone.parameters()) / 1e6:.2f} M",
        "input": (f"{export.cubes.frames} frames of " if export.cubes else "")
        + f"{export.size} x {export.size} pixels, mean {_short(export.mean)}, std {_short(export.std)}",
        "epochs": config.trainer.max_epochs,
        "batch": config.data.batch_size,
        "learning rate": f"{config.optimizer.lr:.4g}",
        "weight decay": config.optimizer.weight_decay,
        "seed": config.seed,
        "weights": f"{written.parts} of `{export.checkpoint.name}`",
    }
    metrics = [f"| {stage} | {name} | {value:.4g} |" for stage, name, value in _measured(export.run.metrics())] or [
        "| | none logged | |"
    ]
    lines = [
        "---",
        f"license: {'other' if export.borrowed else 'mit'}",
        f"library_name: {written.library}",
        f"pipeline_tag: {written.task}",
        "---",
        f"# {config.run.experiment}: {config.run.name}",
        "",
        f"{written.kind} trained with Pretext. Features were compared with those of the training code on random input "
        f"when this folder was written: equal to {TOLERANCE:g}.",
        "",
        "## Load",
        "```python",
        written.load.rstrip(),
        "```",
        "",
        "## Recipe",
        *(f"- {key}: {value}" for key, value in recipe.items()),
        "",
        "The whole configuration:",
        "```yaml",
        OmegaConf.to_yaml(_public(config)).rstrip(),
        "```",
        "",
        "## Metrics",
        "| stage | metric | value |",
        "|---|---|---|",
        *metrics,
        "",
        "## Intended use",
        "Features for research: nearest neighbors, linear probes, fine-tuning. What they have learned reflects the "
        "data above; they have not been examined for bias, safety or fitness for decisions about people.",
        "",
        "## Licence",
        "The template's code is under the MIT licence, and so are these weights unless their author says otherwise. "
        + (f"Training started from {export.borrowed}, whose licence holds for them too. " if export.borrowed else "")
        + "Rights in the training data may bear on them.",
        "",
    ]
    return "\n".join(lines)


def data_of(config: DictConfig) -> str:
    """The training data in a few words, without folders of the machine it lay on."""
    source = str(config.data.source._target_).rsplit(".", 1)[-1].removesuffix("Source")
    samples = config.data.train_samples
    return source if samples is None else f"{source}, {samples} samples"


WRITERS: dict[str, Writer] = {"timm": write_timm, "hf": write_hf}


def _expressible(backbone: nn.Module, name: str) -> VisionTransformer:
    supported = (
        "a timm VisionTransformer with class token, learned or fixed positions and a final norm before the pooling"
    )
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"format=hf writes {supported}; {name} is a {type(backbone).__name__}: use format=timm")
    if not isinstance(backbone.fc_norm, nn.Identity) or isinstance(backbone.norm, nn.Identity):
        raise UserError(f"format=hf writes {supported}; this one's norm comes after the pooling: use format=timm")
    if backbone.cls_token is None or backbone.num_prefix_tokens != 1 or backbone.no_embed_class:
        raise UserError(f"format=hf writes {supported}; this one has other prefix tokens: use format=timm")
    return backbone


def _fill(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:400]
        raise UserError(
            f"not exported: the method has changed the architecture, {what} does not fit: {reason}"
        ) from problem


def _loaded(folder: Path) -> Any:
    """What transformers makes of the folder, in evaluation mode.

    Raises:
        UserError: it would not load the whole of it.
    """
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with _quiet("transformers"):
        model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    if wrong:
        raise UserError(f"not exported: transformers would not load it whole: {wrong}")
    return model.eval()


def _image_processor(export: Export) -> Any:
    from transformers.models.bit import BitImageProcessor

    return BitImageProcessor(
        size={"shortest_edge": round(export.size / export.crop_share)},
        crop_size={"height": export.size, "width": export.size},
        resample=3,  # bicubic
        image_mean=export.mean,
        image_std=export.std,
    )


def _require_equal(exported: Tensor, own: Tensor, where: str, scale: float = 1.0) -> None:
    difference, most = (exported - own).abs().max().item(), TOLERANCE * max(1.0, scale)
    if not difference <= most:
        raise UserError(f"not exported: features differ by {difference:.3g} ({where}), more than {most:g}")


def _measured(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Evaluation's numbers and the last losses, flat."""
    rows: list[tuple[str, str, float]] = []

    def walk(stage: str, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(stage, f"{path} {key}".strip(), item)
        elif isinstance(value, int | float) and (stage != "train" or path.startswith(("eval/", "loss/"))):
            rows.append((stage, path, float(value)))

    for stage, values in metrics.items():
        walk(stage, "", values)
    return rows


def _public(config: DictConfig) -> DictConfig:
    """The recipe without the folders of the machine it ran on."""
    kept = {key: config._get_node(key) for key in ("model", "backbone", "optimizer", "schedules", "image_size", "seed")}
    return OmegaConf.create({key: value for key, value in kept.items() if value is not None})


def _short(values: Sequence[float]) -> str:
    return json.dumps([round(value, 4) for value in values])


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps libraries' loggers to errors for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


if __name__ == "__main__":
    configuration.run_main(main)
