import math
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import SettingError
from src.models.masked.mixedae import (
    MixedAE,
    homologous_attention,
    homologous_contrast,
    masking_of,
    nearest_keys,
)
from src.optim import OptimizerRecipe
from tests.toys import small_vit


def build(**options: Any) -> MixedAE:
    torch.manual_seed(0)
    vit = small_vit(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3} | options.pop("vit", {}))
    sizes = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    return MixedAE(vit, OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{**sizes, **options}).double().eval()


def images(count: int = 8) -> Any:
    return {"image": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def test_every_image_is_shown_at_equally_many_positions_and_patches_keep_theirs():
    method, image = build(), images()["image"]
    mixing = method.draw_mixing(image)
    assert mixing.shape == (2, 16)
    assert all(row.bincount().tolist() == [4] * 4 for row in mixing)
    mixed = method.mix(image, mixing)
    for group in range(2):
        for position in range(16):
            row, column = divmod(position, 4)
            place = (slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            assert torch.equal(mixed[group][place], image[4 * group + mixing[group, position]][place])


def test_each_image_gets_its_own_tokens_of_the_mixture_back():
    mixing = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]])
    masking = masking_of(mixing, 2)
    assert masking.keep.tolist() == [[1, 2], [0, 3], [0, 2], [1, 3]]
    assert masking.mask.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    shuffled = torch.cat([masking.keep, torch.full((4, 2), -1)], dim=1).gather(1, masking.restore)
    assert shuffled.tolist() == [[-1, 1, 2, -1], [0, -1, -1, 3], [0, -1, 2, -1], [-1, 1, -1, 3]]


def test_homologous_attention_is_a_softmax_over_the_nearest_keys():
    method = build()
    attention: Any = method.backbone.blocks[1].attn
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    mask = nearest_keys(attention, x, 1, 4)
    q, k, v = attention.qkv(x).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = torch.zeros(2, 17, 2, 8, dtype=torch.float64)
    for b in range(2):
        for head in range(2):
            for query in range(17):
                logits = [(q[b, head, query] @ k[b, head, key]).item() / math.sqrt(8) for key in range(17)]
                best = sorted(range(1, 17), key=lambda key: -logits[key])[:4] if query else range(1, 17)
                weights = {key: math.exp(logits[key]) for key in (0, *best)}
                total = sum(weights.values())
                expected[b, query, head] = sum(w / total * v[b, head, key] for key, w in weights.items())
    torch.testing.assert_close(attention(x, attn_mask=mask), attention.proj(expected.flatten(2)))


def test_homologous_attention_spares_the_first_block_and_ends_with_the_encoder_s_pass():
    method, image = build(), images(2)["image"]
    seen: list[tuple[int, Tensor | None]] = []
    blocks: Any = method.backbone.blocks
    for number, block in enumerate(blocks):
        block.attn.register_forward_hook(
            lambda layer, inputs, options, output, number=number: seen.append((number, options.get("attn_mask"))),
            with_kwargs=True,
        )
    with homologous_attention(blocks, 1, 4, active=True) as keys:
        method.backbone.forward_features(image)
    method.backbone.forward_features(image)
    assert [mask is not None for _, mask in seen] == [False, True, True, False, False, False]
    assert torch.equal(keys[0], seen[2][1])
    with homologous_attention(blocks, 1, 4, active=False) as keys:
        plain = method.backbone.forward_features(image)
    assert len(keys) == 1
    assert torch.equal(plain, method.backbone.forward_features(image))


def test_the_contrast_by_hand():
    """Four patches, two of each image; cosines of equal ones 1, of others 0."""
    patches = torch.tensor([[[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])
    right = -math.log(math.exp(2) / (math.exp(2) + 2))
    wrong = -math.log(1 / (math.exp(2) + 2))
    assert homologous_contrast(patches, torch.tensor([[0, 0, 1, 1]]), 0.5).item() == pytest.approx(right)
    assert homologous_contrast(patches, torch.tensor([[0, 1, 0, 1]]), 0.5).item() == pytest.approx(wrong)


def test_the_loss_of_a_step_counts_the_patches_that_the_mixture_does_not_show():
    method, batch = build(contrast_weight=0.3), images()
    torch.manual_seed(3)
    mixing = method.draw_mixing(batch["image"])
    mixture = method.encode(method.mix(batch["image"], mixing), mixing)
    target, errors = method.target(batch["image"]), []
    for i in range(8):
        group, own = divmod(i, 4)
        keep = (mixing[group] == own).nonzero().flatten()
        restore = torch.cat([keep, (mixing[group] != own).nonzero().flatten()]).argsort()
        visible = torch.cat([mixture.prefix[group], mixture.patches[group, keep]])
        prediction = method.decoder(visible[None], restore[None])[0]
        errors += [(prediction[n] - target[i, n]).pow(2).mean().item() for n in range(16) if mixing[group, n] != own]
    assert len(errors) == 8 * 12
    contrast = homologous_contrast(mixture.patches, mixing, 0.25).item()
    torch.manual_seed(3)
    output: Any = method.training_step(batch, 0)
    assert output["logs"]["reconstruction"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-10)
    assert output["loss"].item() == pytest.approx(sum(errors) / len(errors) + 0.3 * contrast, rel=1e-10)
    own = (mixing[1] == 2).nonzero().flatten()
    torch.testing.assert_close(output["embedding"][6], mixture.patches[1, own].float().mean(dim=0))


def test_segments_tell_the_encoder_which_image_a_patch_is_of():
    method, image = build(homologous_attention=False), images(4)["image"]
    mixing = method.draw_mixing(image)
    mixed = method.mix(image, mixing)
    plain = method.encode(mixed, mixing).patches
    assert not torch.allclose(method.encode(mixed, (mixing + 1) % 4).patches, plain)
    with_none = build(homologous_attention=False, segments=False)
    features = with_none.backbone.forward_features(mixed)
    torch.testing.assert_close(with_none.encode(mixed, mixing).patches, features[:, 1:])


def test_precision_is_one_if_patches_only_find_their_own_image():
    """Patches of one image are equal, those of others orthogonal to them."""
    method = build(vit={"depth": 1, "embed_dim": 16, "num_heads": 1}, segments=False)
    mixing = method.draw_mixing(images(4)["image"])
    attention: Any = method.backbone.blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.eye(16).repeat(3, 1))
        attention.qkv.bias.zero_()
    x = torch.cat([torch.zeros(1, 1, 16), torch.eye(16)[mixing]], dim=1).double()
    found = nearest_keys(attention, x, 1, 4)[0, 0, 1:, 1:]
    assert torch.equal(found, mixing[0][:, None] == mixing[0])


def test_gradients_reach_everything_but_the_position_tables():
    method = build()
    method.training_step(images(), 0)["loss"].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"backbone.pos_embed", "decoder.pos_embed"}


def test_visualizations_show_the_mixture_and_keep_visible_patches():
    method, batch = build(), images(5)  # one image is in no group
    torch.manual_seed(4)
    original, mixed, visible, filled = method.visualize(batch)["reconstruction"].unbind(dim=1)
    assert torch.equal(original, batch["image"][:4])
    shown = visible != 0
    assert shown.double().mean().item() == pytest.approx(0.25)
    torch.testing.assert_close(mixed[shown], original[shown])
    torch.testing.assert_close(filled[shown], original[shown])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": 3}, r"model\.sources=3 must be at least 2 and divide the 16 patches"),
        ({"sources": 1}, r"model\.sources=1"),
        ({"sources": 16}, r"model\.sources=16"),
        ({"contrast_temperature": 0.0}, r"model\.contrast_temperature=0\.0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused():
    with pytest.raises(SettingError, match=r"data\.batch_size: .* model\.sources=4 images, got 6"):
        build().training_step(images(6), 0)
