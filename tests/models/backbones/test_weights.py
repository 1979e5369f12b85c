import argparse
import collections
import copy
import fractions
import io
import logging
import pathlib

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from src.models.backbones.weights import WeightsError, load_backbone
from tests.toys import small_video_vit, small_vit


def vit(size: int = 32, **kwargs):
    return small_vit(**{"img_size": size, "embed_dim": 24, "depth": 2, **kwargs})


@pytest.fixture
def source():
    torch.manual_seed(7)
    model = vit()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_loaded(backbone, source) -> None:
    for name, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name


def lightning(source, path, encoders: dict[str, str]) -> str:
    """A checkpoint as runs write it, with other weights around the encoder's."""
    state = {
        f"{prefix}{k}": v + step
        for step, prefix in enumerate(encoders.values())
        for k, v in source.state_dict().items()
    }
    state["decoder.embed.weight"] = torch.zeros(3, 3)
    torch.save({"state_dict": state, "encoders": encoders, "global_step": 3}, path)
    return str(path)


def test_nothing_to_load_leaves_the_backbone_as_it_is(source):
    before = copy.deepcopy(source.state_dict())
    assert load_backbone(source, None) is source
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())


def test_a_checkpoint_says_itself_where_its_encoder_lies(source, tmp_path):
    path = lightning(source, tmp_path / "last.ckpt", {"student": "net.student.trunk.", "teacher": "net.teacher.trunk."})
    assert_loaded(load_backbone(vit(), path), source)
    teacher = load_backbone(vit(), path, encoder="teacher")
    assert torch.equal(teacher.cls_token, source.cls_token + 1)
    with pytest.raises(WeightsError, match="no encoder 'techer'; did you mean teacher"):
        load_backbone(vit(), path, encoder="techer")


def test_a_runs_folder_gives_its_best_checkpoint_else_its_last(source, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    OmegaConf.save({"run": {}}, tmp_path / "config.yaml")
    lightning(source, tmp_path / "checkpoints/last.ckpt", {"encoder": "backbone."})
    assert_loaded(load_backbone(vit(), tmp_path), source)
    shifted = copy.deepcopy(source)
    shifted.load_state_dict({name: value + 5 for name, value in source.state_dict().items()})
    lightning(shifted, tmp_path / "checkpoints/best.ckpt", {"encoder": "backbone."})
    assert_loaded(load_backbone(vit(), tmp_path), shifted)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.backbone."])
def test_plain_state_dicts_of_other_programs(source, tmp_path, wrapper, prefix):
    state = {prefix + name: value for name, value in source.state_dict().items()}
    state["head.mlp.weight"] = torch.zeros(2)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    assert_loaded(load_backbone(vit(), tmp_path / "weights.pth"), source)


def test_the_teacher_is_taken_where_a_file_holds_a_student_too(source, tmp_path):
    student = {name: value + 1 for name, value in source.state_dict().items()}
    torch.save({"student": student, "teacher": source.state_dict()}, tmp_path / "both.pth")
    assert_loaded(load_backbone(vit(), tmp_path / "both.pth"), source)


def test_safetensors_and_an_exports_folder(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert_loaded(load_backbone(vit(), tmp_path / "model.safetensors"), source)
    assert_loaded(load_backbone(vit(), tmp_path), source)


def test_positions_are_interpolated_to_another_grid_and_the_rest_is_untouched(source, tmp_path, caplog):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    caplog.set_level(logging.INFO)
    larger = load_backbone(vit(size=48), tmp_path / "w.pth")
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], [4, 4], num_prefix_tokens=1, antialias=False)
    assert torch.equal(larger.pos_embed, expected)
    assert torch.equal(larger.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(larger.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert "positional embedding of 17 tokens interpolated to 37" in caplog.text


def test_a_constant_position_table_stays_constant(source, tmp_path):
    source.pos_embed.data.fill_(0.25)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    larger = load_backbone(vit(size=64), tmp_path / "w.pth")
    torch.testing.assert_close(larger.pos_embed, torch.full((1, 65, 24), 0.25))


def test_a_fresh_norm_and_classifier_keep_their_own_weights(source, tmp_path, caplog):
    weights = source.state_dict() | {"fc_norm.weight": torch.zeros(24), "head.weight": torch.zeros(5, 24)}
    torch.save(weights, tmp_path / "w.pth")
    caplog.set_level(logging.INFO)
    pooled = vit(global_pool="avg", num_classes=3)
    before = copy.deepcopy(pooled.head.weight)
    load_backbone(pooled, tmp_path / "w.pth", fresh=["fc_norm."])
    assert torch.equal(pooled.head.weight, before)  # 5 classes in the file, 3 here
    assert torch.equal(pooled.fc_norm.weight, torch.ones(24))
    assert torch.equal(pooled.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert "not from the file: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in caplog.text


def test_without_that_permission_the_missing_norm_is_an_error(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"lacks 2 of the backbone's \d+ tensors: fc_norm.weight, fc_norm.bias"):
        load_backbone(vit(global_pool="avg"), tmp_path / "w.pth")


def test_a_missing_tensor_is_named_and_nothing_is_loaded(source, tmp_path):
    state = source.state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save({f"backbone.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    target = vit()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(WeightsError, match=r"lacks 1 of .*: blocks.1.mlp.fc2.bias; it holds backbone.cls_token"):
        load_backbone(target, tmp_path / "w.pth")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_another_width_or_patch_size_is_an_error_with_both_shapes(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight \[24, 3, 8, 8\] instead of \[24, 3, 4, 4\]"):
        load_backbone(vit(patch_size=4), tmp_path / "w.pth")


def test_positions_that_are_no_square_grid_are_refused(source, tmp_path):
    state = source.state_dict() | {"pos_embed": torch.zeros(1, 1 + 15, 24)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="16 tokens, not a square grid after 1 others"):
        load_backbone(vit(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a checkpoint: it is empty"),
        (b"not weights at all", "cannot be read as a checkpoint: it was not written by torch.save"),
        (argparse.Namespace(lr=1), "holds Namespace, not named weights"),
        (
            {"lr": fractions.Fraction(1, 3), "log": logging.Formatter()},
            r"objects other than tensors and plain values \(fractions.Fraction, logging.Formatter",
        ),
        ([1, 2], "holds list, not named weights"),
    ],
)
def test_files_that_hold_no_plain_weights_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(WeightsError, match=rf"bad.pth (.*: it holds )?{message}"):
        load_backbone(vit(), path)


def test_a_broken_safetensors_file_and_a_missing_one(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
    with pytest.raises(WeightsError, match=r"w.safetensors cannot be read as weights"):
        load_backbone(vit(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"no weights at .*absent.ckpt"):
        load_backbone(vit(), tmp_path / "absent.ckpt")


def saved_by_others(source, path, prefixes, **more) -> str:
    """A file of another program, with the backbone under each of the prefixes, plus its position."""
    state = {f"{p}{k}": v + n for n, p in enumerate(prefixes) for k, v in source.state_dict().items()}
    torch.save({"state_dict": state | {"queue": torch.zeros(3)}, **more}, path)
    return str(path)


def test_settings_and_numbers_of_numpy_beside_the_weights_do_no_harm(source, tmp_path):
    more = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/runs"), betas=[0.9]),
        "best": np.float64(71.5),
        "history": np.arange(3, dtype=np.int32),
        "seen": collections.defaultdict(list, a=[1]),
    }
    path = saved_by_others(source, tmp_path / "w.pth", ["module.encoder."], **more)
    assert_loaded(load_backbone(vit(), path), source)
    # written by NumPy 1, in torch's older format
    pickled = io.BytesIO()
    torch.save({"model": source.state_dict(), "best": np.float64(1.5)}, pickled, _use_new_zipfile_serialization=False)
    old = pickled.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old.pth").write_bytes(old)
    assert_loaded(load_backbone(vit(), tmp_path / "old.pth"), source)


@pytest.mark.parametrize(
    ("prefixes", "meant"),
    [
        (["module.momentum_encoder.", "module.base_encoder."], 1),  # MoCo v3
        (["module.encoder_q.", "module.encoder_k."], 0),  # MoCo
        (["student.backbone.", "teacher.backbone."], 1),  # DINO
        (["online_network.encoder.", "target_network.encoder."], 0),  # BYOL
        (["a.", "b."], None),
    ],
)
def test_the_prefix_is_found_or_asked_for(source, tmp_path, prefixes, meant):
    path = saved_by_others(source, tmp_path / "w.pth", prefixes)
    if meant is None:
        with pytest.raises(WeightsError, match=r"2 times, .* 'state_dict.a.', 'state_dict.b.': .*checkpoint_prefix="):
            load_backbone(vit(), path)
    else:
        assert torch.equal(load_backbone(vit(), path).cls_token, source.cls_token + meant)
    for number, prefix in enumerate(prefixes):
        for spelled in (prefix, prefix.rstrip("."), f"state_dict.{prefix}"):
            loaded = load_backbone(vit(), path, prefix=spelled)
            assert torch.equal(loaded.cls_token, source.cls_token + number)


def test_a_miss_names_the_prefixes_that_the_file_has(source, tmp_path):
    path = saved_by_others(source, tmp_path / "w.pth", ["net.trunk."])
    with pytest.raises(WeightsError, match=r"lacks 12 of .*begin with 'state_dict.net.trunk.' \(30 of 42\)"):
        load_backbone(vit(depth=3), path)
    with pytest.raises(WeightsError, match=r"checkpoint_prefix=trunc.: no tensor in .* has it"):
        load_backbone(vit(), path, prefix="trunc")
    with pytest.raises(WeightsError, match=r"its names begin with 'state_dict.' \(31\)"):
        load_backbone(timm.create_model("resnet10t", num_classes=0), path)
    with pytest.raises(WeightsError, match=r"checkpoint_encoder=student: .* is no checkpoint of a run"):
        load_backbone(vit(), path, encoder="student")


def test_biases_of_queries_and_values_alone_and_projections_of_tubelets(tmp_path):
    """The authors' files of VideoMAE: no bias of keys, no positional embedding, a convolution called proj."""
    source = small_video_vit()
    state = {}
    for name, value in source.state_dict().items():
        if name.endswith("qkv.bias"):
            q, k, v = torch.nn.init.normal_(value).chunk(3)
            k.zero_()
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        elif name != "pos_embed":
            state[name.replace("projection", "proj")] = value
    torch.save({"model": {f"encoder.{name}": value for name, value in state.items()}}, tmp_path / "w.pth")
    assert_loaded(load_backbone(small_video_vit(), tmp_path / "w.pth"), source)


def test_counters_of_batch_norms_may_be_missing(tmp_path):
    source = timm.create_model("resnet10t", num_classes=0)
    torch.nn.init.normal_(source.bn1.running_mean)
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    assert_loaded(load_backbone(timm.create_model("resnet10t", num_classes=0), tmp_path / "w.pth"), source)


def test_a_table_of_equal_length_for_another_grid_is_interpolated(tmp_path):
    """4 x 9, 6 x 6 and 9 x 4 patches are as many."""
    ramp = vit(size=(32, 72))
    ramp.pos_embed.data[:, 1:] = torch.arange(4.0).repeat_interleave(9)[None, :, None]  # each row has its number
    lightning(ramp, tmp_path / "run.ckpt", {"encoder": "backbone."})
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    torch.save(content | {"grids": {"encoder": [4, 9]}}, tmp_path / "noted.ckpt")

    def rows_of(model):
        return model.pos_embed[0, 1:, 0].unflatten(0, model.patch_embed.grid_size)

    assert torch.equal(load_backbone(vit(size=(32, 72)), tmp_path / "noted.ckpt").pos_embed, ramp.pos_embed)
    tall = rows_of(load_backbone(vit(size=(72, 32)), tmp_path / "noted.ckpt"))
    torch.testing.assert_close(tall, tall[:, :1].expand(-1, 4))  # still constant along a row
    assert (tall[1:, 0] > tall[:-1, 0]).all()  # and rising with the row
    # nothing is noted, as in other programs' files: a square is assumed where the number is one
    square = vit(size=48)
    square.pos_embed.data[:, 1:] = torch.arange(6.0).repeat_interleave(6)[None, :, None]
    torch.save(square.state_dict(), tmp_path / "square.pth")
    tall = rows_of(load_backbone(vit(size=(72, 32)), tmp_path / "square.pth"))
    torch.testing.assert_close(tall, tall[:, :1].expand(-1, 4))
    expected = resample_abs_pos_embed(square.pos_embed, [9, 4], [6, 6], num_prefix_tokens=1, antialias=False)[0, 1:, 0]
    assert torch.equal(tall.flatten(), expected)


def test_clips_of_another_number_of_times_are_refused(tmp_path):
    """16 times of 2 x 2 tubelets are as many as 4 of 4 x 4."""
    source = small_video_vit(frames=8)
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    content = {"state_dict": state, "encoders": {"encoder": "backbone."}, "grids": {"encoder": [4, 2, 2]}}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match="4x2x2 tubelets, where the backbone's clips have 1x4x4: times cannot be"):
        load_backbone(small_video_vit(frames=2, img_size=32), tmp_path / "w.ckpt")
