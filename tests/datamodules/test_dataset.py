from functools import partial

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from src.datamodules.batches.base import BatchError, labels_of, optional_labels, validate
from src.datamodules.batches.image import ImageBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import EvalSampler, ResumableLoader, SampleKey, TrainSampler, ViewedDataset
from src.datamodules.decoding import BadSample, DataError
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.sources.source import Source
from src.datamodules.sources.splits import of_each_class
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.video import CenterVideoCrop, DenseClip, RandomVideoCrop
from src.errors import SettingError


class Arrays(Source):
    """Images in memory as one array."""

    classes = ("a", "b")

    def __init__(self, split: str = "train", count: int = 24) -> None:
        generator = np.random.default_rng(0 if split == "train" else 1)
        self.images = generator.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
        self.labels = np.arange(count) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return {"image": torch.from_numpy(self.images[index]), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"arrays/{index}"


class OneByOne(Arrays):
    """The same images without the array shortcut; some of them bad, two of another size."""

    def __init__(
        self, split: str = "train", count: int = 24, bad: tuple[int, ...] = (), wide: tuple[int, ...] = ()
    ) -> None:
        super().__init__(split, count)
        self.pictures, self.bad, self.wide = self.images, bad, wide
        self.images = None

    def __getitem__(self, index: int):
        if index in self.bad:
            raise BadSample("cut off")
        image = torch.from_numpy(self.pictures[index])
        return {"image": image.repeat(1, 1, 2) if index in self.wide else image, "label": int(self.labels[index])}


VIEW = RandomResizedCrop(size=8)


def draws(epoch: int, indices) -> list[SampleKey]:
    return [SampleKey(epoch, index) for index in indices]


class Unlabeled(OneByOne):
    """The same images without labels."""

    classes = ()

    def __init__(self, split: str = "train", **options) -> None:
        super().__init__(split, **options)
        self.labels = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        if index in self.bad:
            raise BadSample("cut off")
        return {"image": torch.from_numpy(self.pictures[index])}


def order_of(sampler: TrainSampler) -> list[list[int]]:
    return [[draw.position for draw in batch] for batch in sampler]


def test_a_sample_does_not_depend_on_its_batch_and_changes_every_epoch():
    dataset = ViewedDataset(Arrays(), VIEW, seed=5)
    first = dataset[draws(2, [7, 3, 11])]["image"]
    assert torch.equal(first[1], dataset[draws(2, [3])]["image"][0])
    assert not torch.equal(first[1], dataset[draws(3, [3])]["image"][0])
    assert not torch.equal(first[1], ViewedDataset(Arrays(), VIEW, seed=6)[draws(2, [3])]["image"][0])


def test_arrays_single_images_and_several_sizes_give_the_same_batch():
    wanted = draws(1, [4, 9, 2])
    arrays = ViewedDataset(Arrays(), VIEW, seed=0)[wanted]
    single = ViewedDataset(OneByOne(), VIEW, seed=0)[wanted]
    assert all(torch.equal(arrays[name], single[name]) for name in arrays)
    mixed = ViewedDataset(OneByOne(wide=(9,)), VIEW, seed=0)[wanted]
    assert torch.equal(mixed["image"][[0, 2]], arrays["image"][[0, 2]])
    assert mixed["image"].shape == (3, 3, 8, 8)


def test_a_bad_sample_is_replaced_logged_and_marked(tmp_path, caplog):
    log = tmp_path / "bad.tsv"
    dataset = ViewedDataset(OneByOne(bad=(3,)), VIEW, seed=0, bad_log=log)
    batch = dataset[draws(0, [2, 3, 4])]
    again = ViewedDataset(OneByOne(bad=(3,)), VIEW, seed=0)[draws(0, [3])]
    assert batch["replaced"].tolist() == [False, True, False]
    assert torch.equal(batch["image"][1], again["image"][0])
    assert "replaced arrays/3: cut off" in caplog.text
    dataset[draws(1, [3])]
    assert log.read_text() == "arrays/3\tcut off\n"  # once, however often it is met


def test_a_bad_sample_is_listed_once_whoever_meets_it(tmp_path, caplog):
    """Loader workers, processes, evaluations and resumed runs have a dataset of their own each."""
    log = tmp_path / "bad.tsv"
    datasets = [ViewedDataset(OneByOne(bad=(3, 5)), VIEW, seed=0, bad_log=log) for _ in range(3)]
    datasets[0][draws(0, [3])]
    datasets[1][draws(0, [5, 3])]
    datasets[0][draws(0, [5])]
    assert log.read_text() == "arrays/3\tcut off\narrays/5\tcut off\n"
    log.write_text("arrays/3\tcut off\narra")  # killed while it wrote
    datasets[2][draws(0, [3, 5])]
    assert log.read_text() == "arrays/3\tcut off\narra\narrays/5\tcut off\n"
    log.unlink()
    log.mkdir()  # cannot be written: the sample is replaced all the same
    assert ViewedDataset(OneByOne(bad=(3,)), VIEW, seed=0, bad_log=log)[draws(0, [3])]["replaced"].tolist() == [True]
    assert f"could not note this in {log}" in caplog.text


def test_a_bad_sample_may_have_an_undecodable_name(tmp_path, caplog):
    class Foreign(OneByOne):
        def name(self, index: int) -> str:
            return b"gr\xfc\xdfe".decode("utf-8", "surrogateescape")

        def __getitem__(self, index: int):
            try:
                return super().__getitem__(index)
            except BadSample as problem:
                raise BadSample(f"{self.name(index)} is {problem}") from problem

    log = tmp_path / "bad.tsv"
    ViewedDataset(Foreign(bad=(3,)), VIEW, seed=0, bad_log=log)[draws(0, [3])]
    assert log.read_text(encoding="utf-8") == "gr\\udcfc\\udcdfe\tgr\\udcfc\\udcdfe is cut off\n"
    assert "gr\\udcfc\\udcdfe is cut off" in caplog.text.encode("utf-8").decode()


def test_if_nothing_can_be_read_the_error_names_the_last_file():
    dataset = ViewedDataset(OneByOne(bad=tuple(range(24))), VIEW, seed=0)
    with pytest.raises(BadSample, match=r"16 samples in a row.*arrays/"):
        dataset[draws(0, [0])]


@pytest.mark.parametrize("kind", [BadSample, SettingError, DataError])
def test_an_error_in_a_worker_is_its_message_without_the_trace(kind):
    try:
        raise kind("data.source.root: no images (a: b)")
    except kind:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(kind) as raised:
        wrapped.reraise()
    assert str(raised.value) == "data.source.root: no images (a: b)"


def test_an_empty_split_and_no_samples_are_refused():
    with pytest.raises(SettingError, match=r"data.source: Arrays has no sample in a split"):
        datamodule(source=lambda split: Arrays(split, count=0 if split == "val" else 24)).val_dataloader()
    for key in ("train_samples", "eval_samples"):
        with pytest.raises(SettingError, match=rf"data.{key} must be at least 1, or null for all samples; got 0"):
            datamodule(**{key: 0})


def test_processes_and_micro_batches_split_the_same_global_batches():
    whole = order_of(TrainSampler(26, batch_size=8, seed=3))
    assert len(whole) == 3
    assert len({index for batch in whole for index in batch}) == 24
    two_by_two = [
        order_of(TrainSampler(26, batch_size=8, seed=3, rank=rank, world_size=2, micro_batches=2)) for rank in range(2)
    ]
    for step in range(3):
        parts = [two_by_two[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [index for part in parts for index in part] == whole[step]


def test_another_epoch_has_another_order():
    sampler = TrainSampler(24, batch_size=8, seed=3)
    first = order_of(sampler)
    sampler.set_epoch(1)
    assert order_of(sampler) != first
    sampler.set_epoch(0)
    assert order_of(sampler) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "world_size": 4}, r"data.batch_size=6 .* multiple of 4 processes x 1 micro-batches = 4"),
        ({"batch_size": 32}, r"data.batch_size=32 is more than the 24 training samples"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainSampler(24, seed=0, **arguments)


def test_evaluation_reads_every_sample_once_over_all_processes():
    shares = [list(EvalSampler(11, batch_size=2, rank=rank, world_size=3)) for rank in range(3)]
    seen = sorted(draw.position for share in shares for batch in share for draw in batch)
    assert seen == list(range(11))
    assert [len(share) for share in shares] == [
        len(EvalSampler(11, batch_size=2, rank=r, world_size=3)) for r in range(3)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumed_within_an_epoch_continues_with_the_next_batch(workers):
    def loader() -> ResumableLoader:
        dataset = ViewedDataset(Arrays(), VIEW, seed=0)
        made = ResumableLoader(dataset, TrainSampler(24, batch_size=4, seed=0), num_workers=workers)
        made.sampler.set_epoch(1)
        return made

    whole = [batch["image"] for batch in loader()]
    stopped = loader()
    iterator = iter(stopped)
    for _ in range(2):
        next(iterator)
    state = stopped.state_dict()
    assert state == {"epoch": 1, "samples": 8, "batch_size": 4, "micro_batches": 1}
    resumed = loader()
    resumed.load_state_dict(state)
    rest = [batch["image"] for batch in resumed]
    assert len(resumed) == 6  # the epoch's length stays what it is
    assert len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == 6  # only the epoch it was taken up in is short


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 8, "micro_batches": 4}, [range(8, 10), range(10, 12), range(12, 14), range(14, 16)]),
        ({"batch_size": 4}, [range(8, 12), range(12, 16), range(16, 20), range(20, 24)]),
        ({"batch_size": 6}, [range(8, 14), range(14, 20)]),  # four samples of this epoch are left over
        ({"batch_size": 16}, [range(8, 24)]),
        ({"batch_size": 8, "micro_batches": 2, "rank": 1, "world_size": 2}, [range(10, 12), range(14, 16)]),
        ({"batch_size": 24}, []),
    ],
)
def test_an_epoch_goes_on_after_the_samples_served_whatever_the_new_batches_are(options, expected):
    """8 of 24 samples were served."""
    (order,) = order_of(TrainSampler(24, batch_size=24, seed=3))
    sampler = TrainSampler(24, seed=3, **options)
    sampler.start = 8
    assert order_of(sampler)[: len(expected)] == [[order[position] for position in part] for part in expected]
    assert len(order_of(sampler)) == (16 // sampler.batch_size) * sampler.micro_batches


def test_the_state_of_a_finished_epoch_starts_the_next_one_from_its_beginning():
    loader = ResumableLoader(ViewedDataset(Arrays(), VIEW, seed=0), TrainSampler(24, batch_size=4, seed=0))
    loader.load_state_dict({"epoch": 0, "samples": 24, "batch_size": 4, "micro_batches": 1})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 6


def datamodule(**changes) -> DataModule:
    settings = {"source": Arrays, "train_view": VIEW, "eval_view": CenterCrop(size=8, share=1.0), "batch_size": 4}
    return DataModule(**{**settings, "num_workers": 0, **changes})


def test_batches_match_their_type_on_the_device():
    module = datamodule()
    raw = next(iter(module.train_dataloader()))
    assert raw["image"].dtype == torch.uint8
    batch = module.on_after_batch_transfer(raw, 0)
    validate(batch, ImageBatch)
    expected = (raw["image"].double() / 255 - module.mean.double()) / module.std.double()
    assert torch.allclose(batch["image"].double(), expected, atol=1e-6)
    assert torch.allclose(module.denormalize(batch["image"]) * 255, raw["image"].float(), atol=1e-3)


def test_larger_choices_of_each_class_contain_smaller_ones() -> None:
    labels = np.array([0, 2, -1, 0, 2, 2, 0, 5, 0, -1, 2, 5])
    few, more = (of_each_class(labels, lambda _, n=count: n, seed=3) for count in (1, 2))
    assert sorted(labels[few]) == [0, 2, 5]
    assert sorted(labels[more]) == [0, 0, 2, 2, 5, 5]
    assert set(few.tolist()) < set(more.tolist())
    assert more.tolist() == sorted(more.tolist())
    again = [of_each_class(labels, lambda _: 2, seed=seed).tolist() for seed in range(8)]
    assert again[3] == more.tolist()
    assert len({tuple(each) for each in again}) > 1


def test_few_shots_of_each_class_depend_on_the_seed() -> None:
    """24 images of two classes; the bank has the same few, validation all."""

    def seen(seed: int, **options: object) -> list[int]:
        module = datamodule(train_shots=3, batch_size=2, seed=seed, **options)
        module.setup("fit")
        trained = sorted(index for batch in module.train_dataloader() for index in batch["index"].tolist())
        assert trained == sorted(index for batch in module.bank_dataloader() for index in batch["index"].tolist())
        assert sum(len(batch["index"]) for batch in module.val_dataloader()) == 24
        return trained

    few = seen(0)
    assert [index % 2 for index in few].count(1) == 3
    assert len(set(few)) == 6
    assert few == seen(0)
    assert few != seen(1)
    assert set(seen(0, train_samples=4)) < set(few)
    with pytest.raises(SettingError, match=r"data.train_shots=13 must be at least 1 and at most 12"):
        datamodule(train_shots=13).train_dataloader()
    unlabelled = datamodule(train_shots=1)
    unlabelled.train_source.labels = None
    with pytest.raises(SettingError, match="the labels of Arrays are unknown before it is read"):
        unlabelled.train_dataloader()


def test_a_smaller_bank_is_part_of_a_larger_one():
    def indices(loader) -> list[int]:
        return [int(index) for batch in loader for index in batch["index"]]

    module = datamodule(train_samples=16, seed=3)
    trained = {index for batch in module.train_dataloader() for index in batch["index"].tolist()}
    assert set(indices(module.bank_dataloader())) == trained
    small = indices(module.bank_dataloader(8))
    assert len(small) == 8
    assert set(small) < trained
    assert small == indices(datamodule(train_samples=16, seed=4).bank_dataloader(8))  # the same for every seed
    assert indices(module.val_dataloader()) == list(range(24))


def test_validation_reads_the_eval_split():
    def source(split: str) -> Arrays:
        asked.append(split)
        return make(split)

    make, asked = datamodule().make_source, list[str]()
    datamodule(source=source, eval_split="test").prepare_data()
    assert asked == ["train", "test"]
    asked.clear()
    module = datamodule(source=source, eval_split="test")
    next(iter(module.val_dataloader()))
    next(iter(module.test_dataloader()))
    assert asked == ["test"]  # and made once
    with pytest.raises(SettingError, match=r"data.eval_split is val or test, not 'train'"):
        datamodule(eval_split="train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "needs the field 'image'"),
        ({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"batch\['image'\] must be torch.float32"),
        ({"image": torch.zeros(3, 1, 8, 8)}, r"batch\['image'\] has B = 3 where 2 is expected"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"batch\['label'\] has B = 3 where 2 is expected"),
        ({"label": [0, 1]}, r"batch\['label'\] must be a tensor, not list"),
        ({"image": torch.full((2, 3, 8, 8), torch.nan)}, r"batch\['image'\] holds NaN"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, r"batch\['index'\] must have the axes \[B\], got \[2, 1\]"),
    ],
)
def test_a_batch_that_does_not_match_its_type_is_refused_by_field(change, message):
    batch = {
        "image": torch.zeros(2, 3, 8, 8),
        "label": torch.zeros(2, dtype=torch.int64),
        "index": torch.zeros(2, dtype=torch.int64),
        "replaced": torch.zeros(2, dtype=torch.bool),
    }
    validate(batch, ImageBatch)
    batch = {name: value for name, value in {**batch, **change}.items() if value is not None}
    with pytest.raises(BatchError, match=message):
        validate(batch, ImageBatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number, at least 1; got 0"),
        ({"batch_size": 8.0}, "data.batch_size must be a whole number"),
        ({"num_workers": -1}, "data.num_workers must be at least 0"),
        ({"mean": (0.5, 0.5)}, "data.channels=3: data.mean and data.std need as many numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_key(change, message):
    with pytest.raises(SettingError, match=message):
        datamodule(**change)


def test_zero_micro_batches_are_refused_by_their_key():
    with pytest.raises(SettingError, match=r"trainer\.accumulate_grad_batches must be at least 1, got 0"):
        TrainSampler(8, batch_size=4, seed=0, micro_batches=0)


def test_a_source_without_labels_makes_batches_without_the_field():
    labeled = ViewedDataset(OneByOne(), VIEW, seed=0)[draws(1, [4, 9, 2])]
    batch = ViewedDataset(Unlabeled(bad=(9,)), VIEW, seed=0)[draws(1, [4, 9, 2])]
    assert batch.keys() == labeled.keys() - {"label"}
    assert torch.equal(batch["image"][[0, 2]], labeled["image"][[0, 2]])
    assert batch["replaced"].tolist() == [False, True, False]
    in_memory = Arrays()
    in_memory.labels = None
    assert "label" not in ViewedDataset(in_memory, VIEW, seed=0)[draws(1, [4])]
    module = datamodule(source=Unlabeled)
    assert len(module.classes) == 0
    validate(module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0), ImageBatch)
    assert optional_labels(batch).tolist() == [-1, -1, -1]
    assert optional_labels(labeled).tolist() == [0, 1, 0]


def test_a_method_that_learns_from_labels_refuses_a_batch_without_them():
    batch = ViewedDataset(Unlabeled(), VIEW, seed=0)[draws(1, [4, 9])]
    with pytest.raises(BatchError, match="Supervised learns from labels, and the batch has no field 'label'"):
        labels_of(batch, "Supervised")
    with pytest.raises(BatchError, match="Supervised learns from labels; 1 of 2 samples of a batch have none"):
        labels_of({**batch, "label": torch.tensor([0, -1])}, "Supervised")
    assert labels_of({**batch, "label": torch.tensor([0, 1])}, "Supervised").tolist() == [0, 1]


def test_views_and_source_must_be_of_one_kind():
    clip = DenseClip(frames=2)
    films = partial(FilmsSource, count=4, resolution=8, duration=0.5, rate=4.0)
    video = {"train_view": RandomVideoCrop(clip, VIEW), "eval_view": CenterVideoCrop(clip, 8)}
    assert datamodule().input_key == "image"
    assert datamodule(source=films, **video).input_key == "video"
    with pytest.raises(SettingError, match=r"FilmsSource holds videos, and RandomResizedCrop is a view of images"):
        datamodule(source=films).train_dataloader()
    with pytest.raises(SettingError, match=r"Arrays holds images, and RandomVideoCrop is a view of videos"):
        datamodule(**video).train_dataloader()
