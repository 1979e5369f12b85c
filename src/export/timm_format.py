"""``format=timm``: the image encoder for ``timm.create_model``."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from src.errors import UserError
from src.export.card import ExportInfo, encoder_info
from src.export.folder import WEIGHTS, check_equal, quiet
from src.export.trained_model import TrainedModel


def write_timm(model: TrainedModel, folder: Path) -> ExportInfo:
    """Writes ``model.safetensors`` for ``checkpoint_path=`` and ``config.json`` for ``local-dir:``.

    Raises:
        UserError: the encoder reads clips, or timm cannot express it.
    """
    if model.tubelet_embed is not None:
        raise UserError(f"{model.run.title} has a video encoder, which timm does not have: use format=hf")
    arguments = model.arguments
    plain = timm.create_model(model.architecture, **arguments).eval()
    try:
        plain.load_state_dict(model.backbone.state_dict())
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:400]
        raise UserError(
            f"not exported: the method changed the architecture, its weights do not fit timm's {model.architecture}: "
            f"{reason}"
        ) from problem
    plain.pretrained_cfg |= {  # type: ignore[operator]
        "mean": tuple(model.mean),
        "std": tuple(model.std),
        "input_size": (model.channels, *model.size),
        "crop_pct": model.crop_share,
        "crop_mode": "squash" if model.squeezed else "center",
        "interpolation": "bicubic",
    }
    if not model.pretrained_from:  # these keys describe timm's own weights of this architecture
        for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"):
            plain.pretrained_cfg.pop(key, None)  # type: ignore[union-attr,operator]
    labels = {"label_names": model.classes} if model.classes else {}
    save_for_hf(plain, str(folder), model_config=labels, model_args=arguments, safe_serialization=True)
    _check(model, folder)
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return encoder_info(
        model,
        "timm",
        "import timm\n\n"
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)\n'
        "# the same from the weights alone:\n"
        f'model = timm.create_model("{model.architecture}", checkpoint_path="{WEIGHTS}", {keywords})\n'
        "features = model.forward_features(images)  # normalized with mean and std of config.json\n",
    )


@torch.no_grad()
def _check(model: TrainedModel, folder: Path) -> None:
    with quiet("timm"):
        loaded = {
            "checkpoint_path": timm.create_model(
                model.architecture, checkpoint_path=folder / WEIGHTS, **model.arguments
            ),
            "local-dir": timm.create_model(f"local-dir:{folder}", pretrained=True),
        }
    x = model.example_input()
    for name, exported in loaded.items():
        exported.eval()
        for method in ("forward_features", "forward"):
            check_equal(getattr(exported, method)(x), getattr(model.backbone, method)(x), f"{name}, {method}")
