"""Loads pretrained weights into a text tower, from the Hugging Face hub or a folder, completely or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import SettingError
from src.models.backbones.weights import shorten
from src.models.text.text_tower import TextTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

# settings of a model that change no feature at inference, and sizes, which the shapes of the weights show
_IGNORED_SETTINGS = re.compile(
    r"^_|drop|token_id|initializer|dtype|version|architectures|use_cache|^projection|^output_|return_dict|id2label"
    r"|label2id|problem_type|chunk_size|gradient_checkpointing|is_decoder|is_encoder_decoder|tie_|add_cross_attention"
    r"|^model_type$|^vocab_size$|^max_position_embeddings$"
)


def load_text_weights(tower: TextTower, checkpoint: str | Path | None) -> TextTower:
    """Loads the weights of ``checkpoint`` into ``tower``, in place, and returns it. Tensors that the tower does not
    have, such as those of poolers and image towers, are ignored.

    Args:
        tower: a `TransformersTextTower`, `CLIPTextTower` or `SigLIPTextTower`.
        checkpoint: a model name on the hub, or a folder written by transformers, with safetensors; None changes
            nothing.

    Raises:
        SettingError: no model can be read there, it has no safetensors, or it has another architecture.
    """
    if checkpoint is None:
        log.info("text tower: random weights (text_checkpoint=null)")
        return tower
    transformer: Any = tower.transformer
    setting = f"text_checkpoint={checkpoint}"
    try:
        config = type(transformer.config).from_pretrained(checkpoint)
    except (OSError, ValueError) as problem:
        raise SettingError(f"{setting} is no model of transformers: {_first_line(problem)}") from problem
    differences = _differences(transformer.config, config)
    if differences:
        raise SettingError(f"{setting} has another architecture than model.text: {shorten(differences)}")
    with _without_loading_report():
        try:
            pretrained, report = type(transformer).from_pretrained(
                checkpoint,
                config=transformer.config,
                use_safetensors=True,  # the other format is a pickle, which can run code
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as problem:
            raise SettingError(
                f"{setting} cannot be read as safetensors of this tower: {_first_line(problem)}"
            ) from problem
    names = list(transformer.state_dict())
    missing = sorted(name for name in report["missing_keys"] if name in names)
    if missing:
        raise SettingError(
            f"{setting} lacks {len(missing)} of the text tower's {len(names)} tensors: {shorten(missing)}"
        )
    weights = pretrained.state_dict()
    transformer.load_state_dict({name: weights[name] for name in names})
    log.info("text tower: %d tensors from %s", len(names), checkpoint)
    return tower


def _differences(config: PreTrainedConfig, checkpoint_config: PreTrainedConfig) -> list[str]:
    """Lists settings that differ and that the shapes of the weights do not show, such as the number of heads."""
    values, checkpoint_values = config.to_dict(), checkpoint_config.to_dict()
    return [
        f"{name}={checkpoint_values[name]} instead of {value}"
        for name, value in sorted(values.items())
        if name in checkpoint_values
        and isinstance(value, int | float | str | bool)
        and not _IGNORED_SETTINGS.search(name)
        and checkpoint_values[name] != value
    ]


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0]


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Silences transformers' report of missing and unexpected weights, which `load_text_weights` checks itself."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
