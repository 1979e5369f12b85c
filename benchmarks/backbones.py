"""The table of timm's models and the kinds of methods that they work with. One small model of each family takes a
training step of methods that read it whole, of methods that take it apart, and of one that reads its feature maps. The
command ``python -m benchmarks.backbones`` prints the table; with names of models it tries these."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import _registry
from torch import Tensor, nn

from src.errors import UserError
from src.measure.report import Check, Section, table
from src.models.backbones.layout import own_size, shapes
from src.models.downstream.finetune import FineTune
from src.models.downstream.segmentation import LinearHead, Segmenter
from src.models.joint_embedding.dino import DINO
from src.models.joint_embedding.moco_v3 import MoCoV3
from src.models.joint_embedding.simclr import SimCLR
from src.models.masked.mae import MAE
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe, adamw

# the smallest model of each class of each family (module) of timm 1.0.31, up to 100 million parameters
_MODELS = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb
fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_256d levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035
mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small
test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
xception41p xcit_nano_12_p8_224
"""
# further ViTs, with what plain ones do not have: a norm before the blocks, registers, rotary positions, no class token
_VARIANTS = """
vit_tiny_patch16_dinov3_qkvb vit_base_patch16_clip_224 vit_base_patch16_siglip_224 vit_small_patch14_reg4_dinov2
vit_wee_patch16_reg1_gap_256 eva02_tiny_patch14_224 flexivit_small deit3_small_patch16_224
vit_relpos_small_patch16_224 test_vit2 test_vit3
"""
MODELS, VARIANTS = _MODELS.split(), _VARIANTS.split()
_SIZE = 128  # pixels, where a model can be built for them
_DEEP = ("vit_", "deit", "beit", "eva", "flexivit", "naflexvit", "samvit", "qwen3")  # built with two blocks
_RECIPE = OptimizerRecipe(partial(adamw), lr=1e-3)

Step = Callable[[PretrainModule, tuple[int, int]], Tensor]


def measure(quick: bool = False) -> dict[str, Any]:
    """Tries every model with every use.

    Returns:
        ``models``: name -> ``family``, ``kind`` (class), ``size`` and ``uses``, which says of each use "works",
        "refused: …", "at the first step: …" for an error in words that comes late, or "error: …"; ``missing``: families
        of timm without a model in the list.
    """
    names = list(dict.fromkeys(MODELS + VARIANTS))[:: 12 if quick else 1]
    families = {name: _registry._model_to_module[name] for name in names}
    missing = sorted(set(_registry._module_to_models) - {_registry._model_to_module[name] for name in MODELS})
    models = {}
    for number, name in enumerate(names):
        begin = time.monotonic()
        models[name] = {"family": families[name], **tried(name)}
        gc.collect()
        outcomes = ", ".join(outcome for outcome in models[name]["uses"].values() if outcome != "works")
        seconds = f"{time.monotonic() - begin:.1f} s"
        print(f"  {number + 1}/{len(names)} {name} {seconds} {outcomes}", file=sys.stderr, flush=True)
    return {"models": models, "missing": missing, "timm": timm.__version__}


def tried(name: str, **options: Any) -> dict[str, Any]:
    """Tries a model with every use.

    Args:
        name, options: of ``timm.create_model``.
    """
    network, size = built(name, **options)
    kind = type(network).__name__
    return {"kind": kind, "size": size, "uses": {use: attempt(use, name, **options) for use in USES}}


def built(name: str, **options: Any) -> tuple[nn.Module, tuple[int, int]]:
    """Builds a model without a head, where that is possible with two blocks and for images of 128 pixels, or of its own
    size. Returns it with the images' size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = _SIZE * 7 // 8 if "patch14" in name else _SIZE
        shallow = {"depth": 2} if name.startswith(_DEEP) else {}
        for tried_options in ({"img_size": size, **shallow}, {"img_size": size}, {}):
            try:
                network = timm.create_model(name, num_classes=0, **{**tried_options, **options})
            except (TypeError, AssertionError, RuntimeError, ValueError):
                continue
            asked = to_2tuple({**tried_options, **options}.get("img_size", size))
            if not isinstance(shapes(network, asked), Exception):
                return network, asked
    own: Any = own_size(network)
    return network, own


def attempt(use: str, name: str, **options: Any) -> str:
    """Builds a method with a model, takes the gradient of a training step, and encodes images; see `measure`."""
    make, step = USES[use]
    torch.manual_seed(0)
    network, size = built(name, **options)
    try:
        method = make(network, size)
    except UserError as problem:
        return f"refused: {problem}"
    except Exception as problem:  # what the table is about
        return f"error: {type(problem).__name__}: {problem}"
    try:
        method.train()
        loss = step(method, size)
        loss.backward()
        trained = [p.grad for p in network.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        if not loss.isfinite() or not trained:
            return f"error: loss {loss.item()}, {len(trained)} parameters of the backbone with a gradient"
        encoder = next(iter(method.encoders().values())).eval()
        with torch.no_grad():
            features = encoder(torch.randn(2, 3, *size))
        if (
            features.embedding.shape != (2, encoder.dim)
            or features.patches.shape[1] != features.grid[0] * features.grid[1]
        ):
            return f"error: embedding {tuple(features.embedding.shape)}, grid {features.grid}"
    except UserError as problem:
        return f"at the first step: {problem}"
    except Exception as problem:
        return f"error: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return "works"


def _simclr(network: nn.Module, size: tuple[int, int]) -> PretrainModule:
    return SimCLR(network, _RECIPE, hidden_dim=16, projection_dim=8)


def _dino(network: nn.Module, size: tuple[int, int]) -> PretrainModule:
    return DINO(network, _RECIPE, prototypes=16, hidden_dim=16, bottleneck_dim=8)


def _moco_v3(network: nn.Module, size: tuple[int, int]) -> PretrainModule:
    return MoCoV3(network, _RECIPE, hidden_dim=16, projection_dim=8)


def _mae(network: Any, size: tuple[int, int]) -> PretrainModule:
    return MAE(network, _RECIPE, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def _segmenter(network: nn.Module, size: tuple[int, int]) -> PretrainModule:
    method = Segmenter(network, _RECIPE, head=LinearHead, maps=1, crop=size[0])
    method.build(3)
    return method


def _finetune(network: nn.Module, size: tuple[int, int]) -> PretrainModule:
    method = FineTune(network, _RECIPE, layer_decay=0.75, mixup=0.0, cutmix=0.0)
    method.build(3)
    return method


def _views(method: PretrainModule, size: tuple[int, int], *, local: bool = False) -> Tensor:
    batch: dict[str, Any] = {"views": torch.randn(2, 2, 3, *size), "index": torch.arange(2)}
    if local:
        network: Any = next(iter(method.encoders().values())).backbone
        info: Any = getattr(network, "feature_info", None) or []
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        stride = 14 if patch == (14, 14) else max([32, *(int(stage["reduction"]) for stage in info)])
        smaller = [max(stride, side * 3 // 4 // stride * stride) for side in size]
        batch["local_views"] = torch.randn(2, 1, 3, *smaller)
    return method.training_step(batch, 0)["loss"]


def _images(method: PretrainModule, size: tuple[int, int]) -> Tensor:
    batch = {
        "image": torch.randn(2, 3, *size),
        "label": torch.tensor([0, 2]),
        "mask": torch.randint(3, (2, *size)),
        "index": torch.arange(2),
    }
    return method.training_step(batch, 0)["loss"]


USES: dict[str, tuple[Callable[[Any, tuple[int, int]], PretrainModule], Step]] = {
    "SimCLR": (_simclr, _views),
    "DINO": (_dino, partial(_views, local=True)),
    "MoCo v3": (_moco_v3, _views),
    "MAE": (_mae, _images),
    "segmentation": (_segmenter, _images),
    "fine-tuning": (_finetune, _images),
}


def report(result: dict[str, Any]) -> Section:
    """The table, and the refusals in words."""
    models = result["models"]
    marks = {"works": "yes", "refused": "–", "at the first step": "late", "error": "**error**"}
    rows = [
        [f"{name} ({entry['family']})", *(marks[outcome.split(":")[0]] for outcome in entry["uses"].values())]
        for name, entry in models.items()
    ]
    refusals: dict[str, list[str]] = defaultdict(list)  # sentence with … for the model's class -> classes
    for entry in models.values():
        for outcome in entry["uses"].values():
            if outcome.startswith("refused"):
                kinds = refusals[outcome.removeprefix("refused: ").replace(entry["kind"], "…")]
                kinds += [entry["kind"]] if entry["kind"] not in kinds else []
    outcomes = [outcome for entry in models.values() for outcome in entry["uses"].values()]
    bad = [
        f"{name} with {use}: {outcome}"
        for name, entry in models.items()
        for use, outcome in entry["uses"].items()
        if not outcome.startswith(("works", "refused"))
    ]
    parts = [
        "The smallest model of each class of each family of timm, and ViTs with what plain ones do not have: a "
        "training step of two images, and their features. DINO's local crops are smaller. –: refused when the "
        "method is built, in a sentence that names what the model has.",
        table(["", *USES], rows),
    ]
    if bad:
        parts.append("Neither works nor is refused when it is built:\n\n" + "\n".join(f"- {line}" for line in bad))
    reasons = (f"- {reason}: {', '.join(kinds)}" for reason, kinds in sorted(refusals.items()))
    parts.append("Refusals:\n\n" + "\n".join(reasons))
    if result["missing"]:
        parts.append(f"Families of timm {result['timm']} that are not tried: {', '.join(result['missing'])}.")
    works = sum(outcome == "works" for outcome in outcomes)
    check = Check(
        "every timm model works in a method or is refused when it is built",
        f"{len(models)} models, {len(USES)} uses",
        f"{works} work, {len(outcomes) - works - len(bad)} are refused, {len(bad)} neither",
        not bad,
    )
    return Section("Backbones", [check], "\n\n".join(parts))


if __name__ == "__main__":
    if sys.argv[1:]:
        tried_models = {name: {"family": _registry._model_to_module[name], **tried(name)} for name in sys.argv[1:]}
        print(report({"models": tried_models, "missing": [], "timm": timm.__version__}).body)
    else:
        print(report(measure()).body)
