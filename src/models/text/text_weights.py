"""Pretrained weights for a text tower, from the Hugging Face hub or a folder; nothing is loaded by halves."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from src.errors import SettingError
from src.models.backbones.weights import some
from src.models.text.text_tower import Tower

log = logging.getLogger(__name__)

# of a configuration: what changes no feature, or only while training
_HARMLESS = re.compile(
    r"^_|drop|token_id|initializer|dtype|version|architectures|use_cache|^projection|^output_|return_dict|id2label"
    r"|label2id|problem_type|chunk_size|gradient_checkpointing|is_decoder|is_encoder_decoder|tie_|add_cross_attention"
    r"|^model_type$|^vocab_size$|^max_position_embeddings$"  # sizes are seen by the weights
)


def pretrained(tower: Tower, checkpoint: str | Path | None) -> Tower:
    """``tower`` with the weights of ``checkpoint``, in place. What else that holds (poolers, other towers) is left out.

    Args:
        tower: `TransformersTower`, or one of those of CLIP and SigLIP.
        checkpoint: a name of the hub or a folder that transformers wrote, with safetensors; None leaves the tower
            alone.

    Raises:
        SettingError: nothing can be read there, it has no safetensors, or it is of another architecture.
    """
    if checkpoint is None:
        log.info("text tower: weights as created (text_checkpoint=null)")
        return tower
    transformer: Any = tower.transformer
    what = f"text_checkpoint={checkpoint}"
    try:
        given = type(transformer.config).from_pretrained(checkpoint)
    except (OSError, ValueError) as problem:
        raise SettingError(f"{what} is no model of transformers: {_first_line(problem)}") from problem
    unlike = _differences(transformer.config, given)
    if unlike:
        raise SettingError(f"{what} is of another architecture than model.text: {some(unlike)}")
    with _quietly():
        try:
            loaded, report = type(transformer).from_pretrained(
                # only safetensors: the other format is a pickle
                checkpoint,
                config=transformer.config,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as problem:
            raise SettingError(
                f"{what} cannot be read as safetensors of this tower: {_first_line(problem)}"
            ) from problem
    own = transformer.state_dict()
    missing = sorted(name for name in report["missing_keys"] if name in own)
    if missing:
        raise SettingError(f"{what} lacks {len(missing)} of the text tower's {len(own)} tensors: {some(missing)}")
    found = loaded.state_dict()
    transformer.load_state_dict({name: found[name] for name in own})
    log.info("text tower: %d tensors from %s", len(own), checkpoint)
    return tower


def _differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    """Settings that weights alone do not show, such as the number of heads."""
    mine, others = ours.to_dict(), theirs.to_dict()
    return [
        f"{name}={others[name]} instead of {value}"
        for name, value in sorted(mine.items())
        if name in others
        and isinstance(value, int | float | str | bool)
        and not _HARMLESS.search(name)
        and others[name] != value
    ]


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' report of what it loaded, which is an error here or in order."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
