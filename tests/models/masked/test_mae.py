from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from src.models.losses.reconstruction import patchify
from src.models.masked.mae import MAE
from src.models.masked.masking import gather_tokens, random_masking
from src.optim import OptimizerRecipe
from tests.toys import small_vit


@pytest.fixture
def mae() -> MAE:
    torch.manual_seed(0)
    backbone = small_vit(img_size=32, embed_dim=32, depth=2)
    optimizer = OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.95)), lr=1e-3, weight_decay=0.05)
    return MAE(backbone, optimizer, decoder_dim=16, decoder_depth=1, decoder_heads=2).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(3, 3, 32, 32), "label": torch.zeros(3, dtype=torch.int64)}


def test_masking_keeps_the_paper_s_share_and_restore_undoes_the_shuffle():
    torch.manual_seed(0)
    masking = random_masking(5, 196, 0.75, torch.device("cpu"))
    assert masking.keep.shape == (5, 49)
    assert masking.mask.sum(dim=1).tolist() == [147.0] * 5
    tokens = torch.arange(196.0).expand(5, 196).unsqueeze(-1)
    visible = gather_tokens(tokens, masking.keep)
    restored = gather_tokens(torch.cat([visible, torch.full((5, 147, 1), -1.0)], dim=1), masking.restore).squeeze(-1)
    expected = torch.where(masking.mask.bool(), -1.0, tokens.squeeze(-1))
    assert torch.equal(restored, expected)
    assert len({tuple(row) for row in masking.mask.tolist()}) == 5  # each sample has a mask of its own


@pytest.mark.parametrize("ratio", [0.0, 0.999, 1.0])
def test_a_mask_that_leaves_all_or_none_is_refused(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio={ratio}"):
        random_masking(1, 16, ratio, torch.device("cpu"))


def test_features_of_visible_patches_do_not_depend_on_masked_pixels(mae, batch):
    masking = random_masking(3, 16, 0.75, torch.device("cpu"))
    hidden = masking.mask.reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    other = torch.where(hidden, torch.randn_like(batch["image"]), batch["image"])
    assert torch.equal(mae.encode(batch["image"], masking), mae.encode(other, masking))
    shown = torch.where(hidden, batch["image"], batch["image"] + 1)
    assert not torch.allclose(mae.encode(batch["image"], masking), mae.encode(shown, masking))


def test_with_every_patch_in_order_the_visible_encoder_is_the_plain_backbone(mae, batch):
    """Positions are added before tokens are dropped, and the class token gets its own."""
    everything = random_masking(3, 16, 0.5, torch.device("cpu"))._replace(keep=torch.arange(16).expand(3, 16))
    assert torch.allclose(
        mae.encode(batch["image"], everything), mae.backbone.forward_features(batch["image"]), atol=1e-6
    )


def test_the_decoder_places_each_visible_token_where_it_came_from(mae):
    """A linear decoder without blocks shows in the prediction which token stands where."""
    masking = random_masking(2, 16, 0.75, torch.device("cpu"))
    decoder = mae.decoder
    decoder.blocks, decoder.norm = torch.nn.Identity(), torch.nn.Identity()
    visible = torch.randn(2, 5, 32)
    prediction = decoder(visible, masking.restore)
    positions = decoder.pos_embed[0, 1:]
    for b in range(2):
        expected = decoder.pred(decoder.mask_token[0] + positions)
        for slot, position in enumerate(masking.keep[b].tolist()):
            expected[position] = decoder.pred(decoder.embed(visible[b, 1 + slot]) + positions[position])
        assert torch.allclose(prediction[b], expected, atol=1e-6)


def test_the_loss_of_a_step_against_float64_loops(mae, batch):
    torch.manual_seed(3)
    masking = random_masking(3, 16, 0.75, torch.device("cpu"))
    prediction = mae.decoder(mae.encode(batch["image"], masking), masking.restore).detach().double().numpy()
    torch.manual_seed(3)
    loss = mae.training_step(batch, 0)["loss"].item()
    image, errors = batch["image"].double().numpy(), []
    for b in range(3):
        for n in range(16):
            if masking.mask[b, n]:
                row, column = divmod(n, 4)
                patch = image[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].transpose(1, 2, 0).ravel()
                target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
                errors.append(((prediction[b, n] - target) ** 2).mean())
    assert len(errors) == 36
    assert loss == pytest.approx(np.mean(errors), rel=1e-5)


def test_without_norm_pix_the_target_is_the_pixels(mae, batch):
    mae.norm_pix = False
    assert torch.equal(mae.target(batch["image"]), patchify(batch["image"], 8))


def test_gradients_reach_everything_but_the_position_tables(mae, batch):
    mae.training_step(batch, 0)["loss"].backward()
    without = {name for name, parameter in mae.named_parameters() if parameter.grad is None}
    assert without == {"backbone.pos_embed", "decoder.pos_embed"}
    assert all(p.grad.abs().sum() > 0 for n, p in mae.named_parameters() if n not in without)
    table = mae.backbone.pos_embed.clone()
    optimizer = mae.configure_optimizers()
    optimizer.step()
    assert torch.equal(mae.backbone.pos_embed, table)
    decayed = {n for group in optimizer.param_groups if group["weight_decay"] > 0 for n in group["names"]}
    # the released code decays tokens, not biases and norms
    assert {"backbone.cls_token", "decoder.mask_token", "backbone.patch_embed.proj.weight"} <= decayed
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_initialization_is_the_paper_s():
    torch.manual_seed(0)
    backbone: VisionTransformer = small_vit(img_size=64, embed_dim=192, num_heads=3)
    model = MAE(backbone, OptimizerRecipe(torch.optim.AdamW, lr=1.0), decoder_dim=128, decoder_depth=1, decoder_heads=4)
    block = model.backbone.blocks[0]
    for weight in (block.attn.qkv.weight, block.mlp.fc1.weight, model.decoder.pred.weight):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    projection = model.backbone.patch_embed.proj.weight  # as a linear layer from 3 * 8 * 8 to 192
    assert projection.abs().max() <= (6 / (192 + 192)) ** 0.5
    assert projection.std().item() == pytest.approx((2 / (192 + 192)) ** 0.5, rel=0.02)
    assert block.attn.qkv.bias.abs().max() == 0
    assert model.backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.25)


def test_visualizations_show_the_image_its_visible_patches_and_the_reconstruction(mae, batch):
    torch.manual_seed(4)
    rows = mae.visualize(batch)["reconstruction"]
    torch.manual_seed(4)
    masking = random_masking(3, 16, 0.75, torch.device("cpu"))
    hidden = (
        masking.mask.reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool().expand(-1, 3, -1, -1)
    )
    original, masked, filled = rows.unbind(dim=1)
    assert torch.equal(original, batch["image"])
    assert masked[hidden].abs().max() == 0
    assert torch.equal(masked[~hidden], batch["image"][~hidden])
    assert torch.allclose(filled[~hidden], batch["image"][~hidden])
    prediction = mae.decoder(mae.encode(batch["image"], masking), masking.restore)
    # a filled-in patch has the predicted values times the true patch's deviation plus its mean
    b, n = masking.mask.nonzero()[0].tolist()
    row, column = divmod(n, 4)
    patch = batch["image"][b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    shown = filled[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    expected = prediction[b, n].reshape(8, 8, 3).permute(2, 0, 1) * (patch.var() + 1e-6).sqrt() + patch.mean()
    assert torch.allclose(shown, expected, atol=1e-5)


def test_a_width_the_position_table_cannot_have_is_refused():
    backbone = small_vit(img_size=32, embed_dim=32)
    with pytest.raises(ValueError, match="multiple of 4"):
        MAE(backbone, OptimizerRecipe(torch.optim.AdamW, lr=1.0), decoder_dim=18, decoder_depth=1, decoder_heads=2)
