"""`make evaluate`: runs evaluations of configs/evaluation on a finished run, and fine-tunes its encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from torch import nn

from src import configuration, runs, train, trained
from src.checkpoint_io import load_checkpoint
from src.errors import UserError, nearest
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import EncoderEvaluation, Evaluation, joined_needs, value_of
from src.evaluation.pixels import PixelEncoder
from src.evaluation.subject import Subject
from src.evaluation_config import data_name, evaluation_config, evaluation_of
from src.evaluation_results import score_table, store
from src.finetuning import FineTuning
from src.value_types import check_value

ARGUMENTS = ("run", "eval", "checkpoint", "data")
BASELINES = ("random", "pixels")  # encoders that EVAL= adds: the untrained one, and raw pixels
FINETUNE = "finetune"

Scores = dict[str, dict[str, float]]  # encoder -> metric -> value


def main(argv: Sequence[str]) -> int:
    inherited = runs.inherited()
    if inherited is not None:
        # this process was started by the launcher of the fine-tuning, after the evaluations
        return train.fit(inherited.config(), inherited)
    arguments, others = trained.split_arguments(argv, ARGUMENTS)
    prefix = f"{FINETUNE}."
    recipe_overrides = [argument.removeprefix(prefix) for argument in others if argument.startswith(prefix)]
    overrides = [argument for argument in others if not argument.startswith(prefix)]
    run = trained.run_of(arguments, "make evaluate")
    config = evaluation_config(run, arguments.get("data"), overrides, as_online=True)
    check_value("evaluate.default", config.evaluate.default, list[str])
    names = requested(arguments.get("eval"), list(config.evaluate.default), list(map(str, config.evaluation)))
    checkpoint = trained.checkpoint_of(run, arguments.get("checkpoint"))
    data = arguments.get("data") or data_name(config)
    if config.evaluate.split != "val":
        data = f"{data}_{config.evaluate.split}"
    subject = trained.RunSubject.configured(config, checkpoint)
    scores = evaluate(subject, [name for name in names if name != FINETUNE])
    if scores:
        store(run, data, scores)  # before a fine-tuning that may fail
    if FINETUNE in names:
        folder = runs.unused(run.dir / "evaluate", f"{FINETUNE}_{data}")
        finetuning = FineTuning(config.evaluate.finetune, recipe_overrides, folder=folder)
        first = next(iter(load_checkpoint(checkpoint).get("encoders", {})), "encoder")
        top1 = value_of(finetuning(trained.RunSubject.configured(config, checkpoint)), "eval/top1")
        scores.setdefault(first, {})["finetune_top1"] = top1
        store(run, data, scores)
    Console().print(score_table(f"{run.title} ({checkpoint.name}) on {data}{image_counts(subject)}", scores))
    return 0


def image_counts(subject: Subject) -> str:
    """Returns how many images the numbers are of, for the table's title: ": 50,000 images, learning from 1,281,167"."""
    if subject.images_read is None:
        return ""
    bank, query = subject.images_read
    return f": {query:,} images, learning from {bank:,}"


def requested(eval_argument: str | None, default: Sequence[str], evaluations: Sequence[str]) -> list[str]:
    """Returns the names that EVAL= lists. Without it, or if it lists baselines only, ``default`` is added.

    Args:
        eval_argument: names with commas or spaces between them.
        default: names of evaluations.
        evaluations: the names of all evaluations.

    Raises:
        UserError: there is no evaluation of a name.
    """
    options = [*evaluations, FINETUNE, *BASELINES]
    names = [name for name in re.split(r"[,\s]+", (eval_argument or "").strip("[] ")) if name]
    for name in names:
        if name not in options:
            raise UserError(f"there is no evaluation '{name}'{nearest(name, options)}")
    if set(names) <= set(BASELINES):
        names += default
    return list(dict.fromkeys(names))


def evaluate(subject: trained.RunSubject, names: Sequence[str]) -> Scores:
    """Runs the named evaluations on every encoder of the run and on the named baselines. Numbers of the method as a
    whole are those of the encoder "pairs".

    Args:
        subject: the run, with a configuration of `evaluation_config`.
        names: of evaluations and of `BASELINES`.

    Raises:
        UserError: an evaluation is not applicable, or features are NaN or infinite.
    """
    evaluations: dict[str, Evaluation] = {
        name: evaluation_of(subject.config, name) for name in names if name not in BASELINES
    }
    subject.needs = joined_needs(list(evaluations.values()))
    baselines: dict[str, nn.Module] = {}
    if "random" in names:
        baselines["random"] = next(iter(trained.fresh(subject.config).encoders().values())).to(subject.device)
    if "pixels" in names:
        baselines["pixels"] = PixelEncoder()
    if baselines:
        subject.add_encoders(baselines)
    scores: Scores = {}
    for name, evaluation in evaluations.items():
        try:
            if isinstance(evaluation, EncoderEvaluation):
                values = evaluation.by_encoder(subject)
            else:
                values = {"pairs": evaluation(subject)}
        except NotApplicable as problem:
            raise UserError(f"EVAL={name} is not applicable: {problem}") from problem
        for encoder, numbers in values.items():
            scores[encoder] = scores.get(encoder, {}) | numbers
    return scores


if __name__ == "__main__":
    configuration.run_main(main)
