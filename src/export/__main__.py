"""`make export`: writes a run's encoder, or both towers of an image-text method, as a folder that timm or transformers
loads. The written folder is loaded back and compared before it replaces an earlier one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from src import configuration, trained
from src.errors import UserError, nearest
from src.export.card import ExportInfo, model_card
from src.export.folder import new_folder
from src.export.timm_format import write_timm
from src.export.trained_model import TrainedModel, load_trained

KEYS = ("run", "format", "to", "encoder", "checkpoint")

Writer = Callable[[TrainedModel, Path], ExportInfo]


def main(argv: Sequence[str]) -> int:
    values, rest = trained.split_arguments(argv, KEYS)
    if rest:
        name = rest[0].partition("=")[0]
        raise UserError(f"make export takes {', '.join(KEYS)}, not '{name}'{nearest(name, KEYS)}")
    run = trained.run_of(values, "make export")
    name = values.get("format") or "timm"
    if name not in FORMATS:
        raise UserError(f"there is no format '{name}'{nearest(name, list(FORMATS))}")
    model = load_trained(run, values.get("encoder"), values.get("checkpoint"))
    folder = Path(values["to"]) if values.get("to") else run.dir / "export" / name
    with new_folder(folder) as partial:
        info = FORMATS[name](model, partial)
        (partial / "README.md").write_text(model_card(model, info))
    lines = [f"{info.parts} of {run.title} ({model.checkpoint.name})", f"folder  {os.path.relpath(folder)}"]
    Console().print(Panel("\n".join(lines), title=f"exported for {name}", expand=False, border_style="green"))
    return 0


def write_hf(model: TrainedModel, folder: Path) -> ExportInfo:
    """A folder for ``from_pretrained`` of transformers: `CLIPModel` or `SiglipModel` for two towers, `VideoMAEModel`
    for a video encoder, `ViTModel` for an image encoder."""
    from src.export import hf_encoder, hf_two_towers, hf_videos  # transformers takes seconds to import

    if model.towers is not None:
        return hf_two_towers.write_towers(model, model.towers, folder)
    if model.tubelet_embed is not None:
        return hf_videos.write_video_encoder(model, folder)
    return hf_encoder.write_encoder(model, folder)


FORMATS: Mapping[str, Writer] = {"timm": write_timm, "hf": write_hf}


if __name__ == "__main__":
    configuration.run_main(main)
