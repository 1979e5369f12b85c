"""CoCa: the attention of its decoder halves, its training step by hand, and its captions."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from src import configuration
from src.collectives import rank
from src.models.image_text.coca import CoCa
from src.models.layers.attention import Attention
from src.models.layers.attentional_pooler import AttentionalPooler
from src.models.losses.captioning import captioning_loss
from src.models.text.text_decoder import CachedCaptionDecoder, DecoderBlock, UnimodalDecoder
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from tests.distributed import in_two_processes
from tests.toys import MASK, TEXT, image_text_batch, small_vit


def coca(**options) -> CoCa:
    torch.manual_seed(0)
    vit = small_vit(class_token=False, global_pool="")
    text = UnimodalDecoder(vocabulary=20, length=6, width=24, depth=2, heads=2)
    sizes = {"depth": 2, "heads": 2, "queries": 3, "pooler_heads": 2, "embed_dim": 8}
    return CoCa(vit, text, OptimizerRecipe(partial(adamw), lr=0.1, weight_decay=0.2), **{**sizes, **options})


def with_changed_token(position: int) -> torch.Tensor:
    other = TEXT.clone()
    other[:, position] = 11
    return other


def test_attention_equals_torchs_with_keys_of_another_width():
    torch.manual_seed(0)
    ours, theirs = Attention(8, 2, context_dim=6), nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    theirs.q_proj_weight.data = ours.query.weight.data
    theirs.k_proj_weight.data, theirs.v_proj_weight.data = ours.key_value.weight.data.chunk(2)
    theirs.in_proj_bias.data = torch.cat([ours.query.bias.data, ours.key_value.bias.data])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    attends = torch.rand(5, 7) < 0.7
    output = ours(x, ours.keys_values(context), mask=attends)
    torch.testing.assert_close(output, theirs(x, context, context, attn_mask=~attends, need_weights=False)[0])


def test_a_pooler_attends_to_all_tokens_in_any_order():
    torch.manual_seed(0)
    pooler, tokens = AttentionalPooler(8, queries=3, heads=2), torch.randn(2, 5, 8)
    pooled = pooler(tokens)
    assert pooled.shape == (2, 3, 8)
    torch.testing.assert_close(pooler(tokens.flip(1)), pooled)
    for position in range(5):
        other = tokens.clone()
        other[:, position] += torch.randn(8)
        assert (pooler(other) - pooled).abs().amax(dim=(1, 2)).min() > 1e-4


def test_predictions_do_not_depend_on_the_predicted_token_or_later_ones():
    method, image = coca().eval(), torch.randn(4, 3, 16)
    before = method.text_decoder(method.text_encoder(TEXT, MASK).tokens, image)
    for position in range(6):
        after = method.text_decoder(method.text_encoder(with_changed_token(position), MASK).tokens, image)
        difference = (after - before).abs().amax(dim=2)
        assert difference[:, :position].max() == 0 if position else True
        assert difference[:, position:].min() > 1e-6  # later positions depend on it


def test_the_class_token_attends_to_the_whole_text_and_no_token_to_it():
    text = coca().text_encoder.eval()
    features = text(TEXT, MASK)
    for position in range(6):
        difference = (text(with_changed_token(position), MASK).embedding - features.embedding).abs().amax(dim=1)
        assert (difference > 1e-5).tolist() == MASK[:, position].tolist(), position  # padding changes nothing
    with torch.no_grad():
        text.cls_token += torch.randn(24)
    other = text(TEXT, MASK)
    assert torch.equal(other.tokens, features.tokens)
    assert (other.embedding - features.embedding).abs().amax(dim=1).min() > 1e-3


def test_the_captioning_loss_at_a_hand_worked_point():
    """Two tokens are predicted in the first text, one in the second; each of 4 tokens at first as likely as another."""
    text = torch.tensor([[2, 3, 1], [2, 1, 0]])
    logits = torch.zeros(2, 2, 4)
    logits[0, 1, 1] = math.log(3)  # 3 / 6
    logits[1, 1, 2] = 99.0  # padding
    loss = captioning_loss(logits, text, text != 0, 3)
    assert loss.item() == pytest.approx((math.log(4) + math.log(2) + math.log(4)) / 3)


def test_the_training_step_is_the_papers_two_losses():
    method, given = coca().train(), image_text_batch()
    output = method.training_step(given, 0)
    patches = method.image_encoder.backbone.forward_features(given["image"])
    image_tokens = method.captioning_pooler(patches)
    image = method.contrastive_pooler(image_tokens)[:, 0] @ method.image_projection.weight.T
    text = method.text_encoder(TEXT, MASK).embedding @ method.text_projection.weight.T
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    similarity = image @ text.T / 0.07
    similarity[0, 3] = similarity[3, 0] = -math.inf  # equal texts
    labels = torch.arange(4)
    contrastive = sum(nn.functional.cross_entropy(logits, labels) for logits in (similarity, similarity.T)) / 2
    # each prediction is computed from the tokens before it alone
    error, predicted = 0.0, 0
    for row in range(4):
        for end in range(1, int(MASK[row].sum())):
            beginning = method.text_encoder(TEXT[row : row + 1, :end], MASK[row : row + 1, :end]).tokens
            log_p = method.text_decoder(beginning, image_tokens[row : row + 1])[0, -1].log_softmax(dim=0)
            error, predicted = error - log_p[TEXT[row, end]], predicted + 1
    torch.testing.assert_close(output["logs"]["contrastive"], contrastive)
    torch.testing.assert_close(output["logs"]["captioning"], error / predicted)
    torch.testing.assert_close(output["loss"], contrastive + 2 * error / predicted)
    torch.testing.assert_close(method.encode_image(given["image"]), image)
    torch.testing.assert_close(method.encode_text(TEXT, MASK), text)
    output["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name


def modules_with_gradient(method: CoCa) -> set[str]:
    method.training_step(image_text_batch(), 0)["loss"].backward()
    parts = {name: child for name, child in method.named_children() if any(True for _ in child.parameters())}
    return {
        name
        for name, child in parts.items()
        if any(p.grad is not None and p.grad.abs().max() > 0 for p in child.parameters())
    }


def test_each_loss_trains_the_encoders_and_its_own_modules():
    shared = {"image_encoder", "text_encoder"}
    contrastive = {"contrastive_pooler", "image_projection", "text_projection"}
    assert modules_with_gradient(coca(contrastive_weight=0.0)) == shared | {"captioning_pooler", "text_decoder"}
    assert modules_with_gradient(coca(captioning_weight=0.0)) == shared | contrastive | {"captioning_pooler"}
    assert modules_with_gradient(coca(captioning_weight=0.0, cascade=False)) == shared | contrastive


def gradients(rows: slice) -> dict[str, torch.Tensor]:
    method = coca().double()
    given = {name: value[rows] for name, value in image_text_batch().items()}
    given["image"] = given["image"].double()
    output = method.training_step(given, 0)
    output["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return gradients | {name: output["logs"][name] for name in ("contrastive", "captioning")}


def half(process: int) -> dict[str, torch.Tensor]:
    assert rank() == process
    return gradients(slice(2 * process, 2 * process + 2))


def test_two_processes_equal_one_with_texts_of_different_lengths():
    assert MASK[:2].sum() != MASK[2:].sum()
    alone, (first, second) = gradients(slice(None)), in_two_processes(half)
    for name, value in alone.items():  # after the mean that DDP takes
        torch.testing.assert_close((first[name] + second[name]) / 2, value, rtol=0, atol=1e-10, msg=name)


def test_cached_decoding_equals_decoding_of_the_whole_text():
    method, image = coca().eval(), torch.randn(4, 3, 16)
    whole = method.text_decoder(method.text_encoder(TEXT, MASK).tokens, image)
    decoder = CachedCaptionDecoder(method.text_encoder, method.text_decoder, image)
    torch.testing.assert_close(torch.stack([decoder(token) for token in TEXT.unbind(1)], dim=1), whole)
    # rows exchanged within an image
    decoder = CachedCaptionDecoder(method.text_encoder, method.text_decoder, image[:1].expand(4, -1, -1))
    rows = [2, 2, 0, 1]
    decoder(TEXT[:, 0])
    decoder(TEXT[:, 1])
    decoder.reorder(torch.tensor(rows))
    moved = torch.cat([TEXT[rows, :2], TEXT[:, 2:3]], dim=1)
    expected = method.text_decoder(method.text_encoder(moved, torch.ones_like(moved).bool()).tokens, decoder.image)
    torch.testing.assert_close(decoder(TEXT[:, 2]), expected[:, -1])


def test_captions_of_a_few_images_can_be_memorized():
    given = image_text_batch()
    expected = TEXT.clone()
    expected[3, 2] = 9  # no two texts are equal
    given["text"] = expected
    method = coca(depth=1, captioning_weight=1.0)
    optimizer = torch.optim.Adam(method.parameters(), lr=6e-3)
    for _ in range(60):
        optimizer.zero_grad()
        method.training_step(given, 0)["loss"].backward()
        optimizer.step()
    expected[~MASK] = 1
    for beams in (1, 3):
        captions = method.eval().caption(given["image"], start=2, end=1, length=6, beams=beams)
        assert torch.equal(captions, expected), beams
    similarity = method.encode_image(given["image"]) @ method.encode_text(given["text"], MASK).T
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_the_decoder_is_initialized_as_clip_and_the_temperature_is_not_decayed():
    text = UnimodalDecoder(vocabulary=2000, length=32, width=256, depth=3, heads=4)
    block = text.blocks[1]
    assert isinstance(block, DecoderBlock)
    residual = 256**-0.5 * 6**-0.5
    expected = {block.self_attention.query: 256**-0.5, block.self_attention.key_value: 256**-0.5}
    expected |= {block.self_attention.out: residual, block.mlp.fc1: 512**-0.5, block.mlp.fc2: residual}
    for layer, std in expected.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.bias.abs().max() == 0
    assert text.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    groups = coca().configure_optimizers().param_groups
    undecayed = {name for g in groups if g["weight_decay"] == 0 for name in g["names"]}
    assert {"logit_scale", "text_encoder.cls_token"} <= undecayed


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"model.contrastive_weight=0.0, model.captioning_weight=0.0"):
        coca(contrastive_weight=0.0, captioning_weight=0.0)
    with pytest.raises(ValueError, match=r"model.micro_batch=2: CoCa's decoder needs"):
        coca(micro_batch=2)
    with pytest.raises(ValueError, match=r"captioning_weight=-1"):
        coca(captioning_weight=-1)
    with pytest.raises(ValueError, match=r"width 24 cannot have 5 heads"):
        coca(heads=5)
    with pytest.raises(ValueError, match=r"texts of 6 tokens do not fit a tower of 5"):
        UnimodalDecoder(vocabulary=20, length=5, width=8, depth=1, heads=2)(TEXT, MASK)
    for arguments in ({"length": 7}, {"length": 6, "beams": 0}):
        with pytest.raises(ValueError, match=r"model.text.length=6"):
            coca().caption(image_text_batch()["image"], start=2, end=1, **arguments)


@pytest.mark.parametrize("scale", ["paper", "smoke", "tiny"])
def test_the_recipe_composes_with_any_captioned_data(scale):
    for data in ("scenes", "emoji"):
        config = compose(["experiment=coca_vitb32", f"data={data}", f"scale={scale}", "run.dir=/tmp/run"])
        assert config.model.text.vocabulary == config.data.vocabulary
    if scale == "paper":
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.batch_size) == (8e-4, 0.01, 65536)
        assert (config.trainer.max_epochs, config.schedules.optimizer.lr.warmup) == (10, "2%")
    if scale == "tiny":
        method = configuration.instantiate(config.model)
        assert isinstance(method, CoCa)
        assert method.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 128)
