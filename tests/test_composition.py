"""How files become one configuration: the order of their layers, scales, and where values come from."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from src import composition, configuration, panels, show_config, train
from src.composition import leaves
from src.configuration import CONFIGS
from src.errors import UserError

SCALES = ("paper", "smoke", "tiny")


@pytest.fixture
def folder(tmp_path):
    """A small set of files: a recipe with scales, a backbone and data with their own, and experiments."""
    files = {
        "train": {
            "defaults": ["_self_", {"data": "big"}, {"backbone": None}, {"recipe": None}, {"experiment": None}],
            "scale": None,
            "size": 224,
            "scales": {"tiny": {"size": 64, "data": {"batch": 128}, "callbacks": {"judge": {"every": 6}}}},
            "callbacks": {"judge": {"every": 1}},
            "run": {"scale": None},
        },
        "data/big": {"batch": 256, "count": 1000, "scales": {"tiny": {"count": 10}}},
        "backbone/deep": {"depth": 12, "scales": {"tiny": {"depth": 4, "patch": 8}}},
        "recipe/method": {
            "model": {"width": 512, "head": None},
            "data": {"batch": 4096},
            "optimizer": {"lr": 0.1},
            "epochs": 800,
            "scales": {
                "smoke": {"optimizer": {"lr": 0.3}},
                "tiny": {"model": {"width": 64, "head": {"width": 8}}, "optimizer": {"lr": 1.0}, "epochs": 12},
            },
        },
        "recipe/quiet": {"callbacks": {"judge": None}},
        "experiment/plain": {"defaults": [{"override /recipe": "method"}, {"override /backbone": "deep"}]},
        "experiment/mine": {
            "defaults": ["plain"],
            "epochs": 3,
            "data": {"batch": 7},
            "scales": {"tiny": {"data": {"batch": 5}}, "paper": {"optimizer": {"lr": 0.7}}},
        },
        "experiment/tiny_one": {"defaults": ["plain"], "scale": "tiny"},
        "experiment/silent": {"defaults": [{"override /recipe": "quiet"}]},
    }
    for name, content in files.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        package = "" if name.startswith(("data/", "backbone/")) else "# @package _global_\n"
        path.write_text(package + yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "configs"


def compose(folder: Path, *words: str):
    return configuration.composition("train", words, folder)


def test_a_scale_replaces_what_the_defaults_the_data_the_backbone_and_the_recipe_say(folder):
    composed = compose(folder, "experiment=plain", "scale=tiny")
    config = composed.config
    assert (config.size, config.epochs, config.optimizer.lr, config.model.width) == (64, 12, 1.0, 64)
    assert (config.data.count, config.backbone.depth, config.backbone.patch) == (10, 4, 8)
    assert config.data.batch == 128  # the defaults' section comes after every file's own values
    assert config.run.scale == "tiny"
    assert "scales" not in config
    assert "scales" not in config.data
    assert "scales" not in config.backbone


def test_views_have_scales_of_their_own(folder):
    """A recipe that takes them has the last word."""
    file = folder / "views/pair.yaml"
    file.parent.mkdir()
    file.write_text(
        yaml.safe_dump({"crop": {"scale": 0.08, "flip": 0.5}, "scales": {"tiny": {"crop": {"scale": 0.3}}}})
    )
    recipe = yaml.safe_load((folder / "recipe/method.yaml").read_text())
    recipe = {"defaults": [{"/views@data.train_view": "pair"}, "_self_"], **recipe}
    recipe["scales"]["smoke"] = {"data": {"train_view": {"crop": {"flip": 0.0}}}}
    (folder / "recipe/method.yaml").write_text("# @package _global_\n" + yaml.safe_dump(recipe, sort_keys=False))
    crops = {scale: compose(folder, "experiment=plain", f"scale={scale}").config.data.train_view for scale in SCALES}
    assert crops["paper"] == {"crop": {"scale": 0.08, "flip": 0.5}}
    assert crops["smoke"] == {"crop": {"scale": 0.08, "flip": 0.0}}
    assert crops["tiny"] == {"crop": {"scale": 0.3, "flip": 0.5}}
    origin = compose(folder, "experiment=plain", "scale=tiny").origin("data.train_view.crop.scale")
    assert origin == "configs/views/pair.yaml (tiny)"


def test_the_paper_s_scale_replaces_nothing(folder):
    composed = compose(folder, "experiment=plain", "scale=paper")
    config = composed.config
    assert (config.size, config.epochs, config.data.batch, config.backbone.depth) == (224, 800, 4096, 12)
    assert composed.replaced == {}


def test_what_an_experiment_says_is_not_lost_to_a_scale(folder):
    """Its own values hold at every scale, what it says for one scale at that scale alone."""
    tiny = compose(folder, "experiment=mine", "scale=tiny").config
    assert (tiny.epochs, tiny.data.batch, tiny.optimizer.lr, tiny.model.width) == (3, 5, 1.0, 64)
    smoke = compose(folder, "experiment=mine", "scale=smoke").config
    assert (smoke.epochs, smoke.data.batch, smoke.optimizer.lr) == (3, 7, 0.3)
    paper = compose(folder, "experiment=mine", "scale=paper").config
    assert (paper.epochs, paper.data.batch, paper.optimizer.lr) == (3, 7, 0.7)


def test_the_command_line_has_the_last_word(folder):
    config = compose(folder, "experiment=mine", "scale=tiny", "epochs=1", "data.batch=2").config
    assert (config.epochs, config.data.batch) == (1, 2)


def test_a_scale_does_not_bring_back_what_is_null_or_absent(folder):
    composed = compose(folder, "experiment=silent", "scale=tiny")
    assert composed.config.callbacks.judge is None
    assert compose(folder, "experiment=plain", "scale=tiny").config.model.head is None


def test_the_scale_comes_from_the_command_line_then_the_experiment_then_the_machine(folder, monkeypatch):
    assert compose(folder, "experiment=tiny_one").config.run.scale == "tiny"
    assert compose(folder, "experiment=tiny_one", "scale=smoke").config.run.scale == "smoke"
    for default in ("paper", "smoke"):
        monkeypatch.setattr(configuration, "default_scale", lambda default=default: default)
        assert compose(folder, "experiment=plain").config.run.scale == default
    with pytest.raises(UserError, match="there is no scale 'tinny'; did you mean tiny"):
        compose(folder, "experiment=plain", "scale=tinny")


def test_every_value_names_the_file_it_comes_from(folder):
    composed = compose(folder, "experiment=mine", "scale=tiny", "model.width=9")
    origins = {key: composed.origin(key) for key in ("size", "epochs", "data.batch", "data.count", "backbone.depth")}
    assert origins == {
        "size": "configs/train.yaml (tiny)",
        "epochs": "configs/experiment/mine.yaml",
        "data.batch": "configs/experiment/mine.yaml (tiny)",
        "data.count": "configs/data/big.yaml (tiny)",
        "backbone.depth": "configs/backbone/deep.yaml (tiny)",
    }
    assert composed.origin("model.width") == "command line"
    assert composed.origin("optimizer.lr") == "configs/recipe/method.yaml (tiny)"


def test_what_a_scale_replaced_is_known_unless_something_later_set_it(folder):
    composed = compose(folder, "experiment=mine", "scale=tiny", "model.width=9")
    assert composed.replaced["optimizer.lr"] == (0.1, 1.0)
    assert composed.replaced["size"] == (224, 64)
    assert "epochs" not in composed.replaced  # the experiment's
    assert "model.width" not in composed.replaced  # the command line's


def test_the_first_panel_says_what_the_scale_replaced():
    lines = train.compose(["experiment=mae_vitb", "scale=smoke"]).run.replaced
    assert lines[:2] == ["batch 4096 → 8", "epochs 800 → 1"]
    assert "learning rate 1.5e-4 × batch / 256 → 0.0003" in lines
    assert "replaced by the scale" in panels.recipe_rows(train.compose(["experiment=mae_vitb", "scale=smoke"]))
    assert train.compose(["experiment=mae_vitb", "scale=paper"]).run.replaced == []
    own = train.compose(["experiment=mae_vitb", "scale=smoke", "data.batch_size=16"]).run.replaced
    assert not any(line.startswith("batch") for line in own)


# every experiment at every scale


@pytest.fixture(scope="module")
def composed():
    return {
        (name, scale): configuration.composition("train", [f"experiment={name}", f"scale={scale}", "paths.data=/data"])
        for name in configuration.names("experiment")
        for scale in SCALES
    }


def test_algorithm_and_learning_rate_come_from_one_layer(composed):
    """Where a file, or a scale, chooses another optimizer it also sets the rate, and nothing older does so after it."""
    for (name, scale), each in composed.items():
        layers = [origin for origin in dict.fromkeys(each.origins.values()) if origin]
        algorithm, rate = each.origin("optimizer.algorithm._target_"), each.origin("optimizer.lr")
        file, section = re.fullmatch(r"(.*?\.yaml)(?: \((\w+)\))?", algorithm).groups()
        same_file = rate.startswith(file)
        own_recipe = file.startswith("configs/recipe/") and section is None  # the paper's: a scale may adapt the rate
        assert same_file or own_recipe, f"{name} at {scale}: {algorithm} sets the optimizer, {rate} its rate"
        if section is not None:
            assert rate == algorithm, f"{name} at {scale}: {algorithm} sets the optimizer, {rate} its rate"
        assert layers


BOUNDS = {"adamw": (1e-7, 1e-2), "lamb": (1e-5, 2e-2), "sgd": (1e-6, 1.0), "SGD": (1e-3, 1.0), "lars": (1e-3, 7.0)}
BOUNDS |= {"larc": (1e-3, 7.0), "classic_lars": (1e-3, 7.0)}  # LARS and LARC scale the rate down by layer


def test_every_learning_rate_is_within_its_optimizer_s_bounds(composed):
    for (name, scale), each in composed.items():
        algorithm = each.config.optimizer.algorithm._target_.rsplit(".", 1)[1]
        low, high = BOUNDS[algorithm]
        assert low <= each.config.optimizer.lr <= high, f"{name} at {scale}: {algorithm} at {each.config.optimizer.lr}"


def targets(node, path=""):
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from targets(value, f"{path}.{position}")


def accepts(target, cache={}):  # noqa: B006
    """The keyword arguments of a target, or None where it takes any."""
    if target not in cache:
        parameters = inspect.signature(get_object(target)).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            cache[target] = None
        else:
            cache[target] = set(parameters)
    return cache[target]


def test_every_key_is_an_argument_of_something(composed):
    for (name, scale), each in composed.items():
        config = OmegaConf.to_container(each.config, resolve=False)
        for path, node in targets(config):
            known = accepts(node["_target_"])
            unused = {key for key in node if not key.startswith("_")} - known if known is not None else set()
            assert not unused, f"{name} at {scale}: {path} has {unused}, which {node['_target_']} does not take"


def test_every_top_level_value_is_referred_to_by_an_experiment(composed):
    read_by_code = {"about", "run", "paths", "data", "trainer", "logger", "callbacks", "model", "seed"}
    read_by_code |= {"checkpoint", "checkpoint_encoder", "checkpoint_prefix"}
    text = "\n".join(OmegaConf.to_yaml(each.config) for (_, scale), each in composed.items() if scale == "paper")
    for key in {str(key) for each in composed.values() for key in each.config} - read_by_code:
        assert re.search(rf"\$\{{{key}(\.|\}})", text) or f",${{{key}" in text, key


def test_every_section_of_scales_replaces_something(composed):
    """A key that a scale sets and no experiment has would be ignored."""
    used = {(origin, key) for each in composed.values() for key, origin in each.origins.items()}
    shadowed = {"configs/train.yaml", "configs/recipe/dino.yaml", "configs/recipe/moco_v2.yaml"}  # by recipes on top
    for path in sorted(CONFIGS.glob("recipe/*.yaml")):
        content = yaml.safe_load(path.read_text())
        for scale, section in (content.get("scales") or {}).items():
            origin = f"configs/recipe/{path.name} ({scale})"
            for key, _ in leaves(section):
                found = any(o == origin and (k == key or k.startswith(f"{key}.")) for o, k in used)
                assert found or f"configs/recipe/{path.name}" in shadowed, f"{origin}: {key} changes no experiment"


def test_make_config_prints_values_files_and_references(capsys):
    assert show_config.main(["experiment=mae_vitb", "scale=tiny", "model.mask_ratio=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = {words[0]: words[1:] for words in reversed([*map(str.split, lines)]) if words}
    assert line["model.mask_ratio"] == ["0.5", "command", "line"]
    assert line["optimizer.lr"] == ["0.0015", "configs/recipe/mae.yaml", "(tiny)"]
    assert any("configs/recipe/mae.yaml (tiny)" in text for text in lines)
    assert any(text.startswith("data.batch_size") and "64" in text for text in lines)
    assert any(text.startswith("SCALE=tiny replaced") for text in lines)


def test_make_config_prints_the_differences_of_two_experiments(capsys):
    assert show_config.main(["experiment=dino_vits", "vs=dino_vitb", "scale=paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {words[0]: words[1:] for words in map(str.split, lines) if words}
    assert rows["key"] == ["dino_vits", "dino_vitb"]
    assert rows["backbone.model_name"] == ["vit_small_patch16_224", "vit_base_patch16_224"]
    assert rows["trainer.max_epochs"] == ["300", "400"]
    assert "model.prototypes" not in rows
    with pytest.raises(UserError, match="name an experiment"):
        show_config.main([])
    assert composition.COMMAND_LINE == "command line"
