"""Data sets of the Hugging Face hub, and local files that its library reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.sources.image_folder import is_hidden
from src.datamodules.sources.labels import check_labels, numbered_classes
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import hashed_split
from src.datamodules.sources.texts import TextListSource, as_list

log = logging.getLogger(__name__)

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


_SPLIT_FOLDERS = {name for names in _SPLIT_NAMES.values() for name in names} | {"eval", "evaluation"}


class HuggingFaceSource(Source):
    """Images and labels of a table; the images stay encoded.

    Args:
        split: "train", "val" or "test"; the table's split under one of its usual names ("validation", "dev", …).
            Without one, "val" is ``val_share`` of the training rows by a hash of their position, "train" the rest.
        path: a name on the hub, a folder of parquet files or images, the name of a format ("parquet", with
            ``data_files``), or a folder written by ``save_to_disk``.
        name: configuration of the data set.
        data_dir, data_files, revision, cache_dir: as for `datasets.load_dataset`.
        image_key: column of the images.
        label_key: column of the labels (class labels, integers or strings); None for none. Rows without a label have
            label -1; a table without the column has no labels.
        val_share: as above.

    Raises:
        DataError: the data set, the split or a column does not exist, the images' column has no images, a split is
            empty or has a label that "train" lacks, or the library would leave out files of a folder.
    """

    def __init__(
        self,
        split: Split,
        *,
        path: str | Path,
        name: str | None = None,
        data_dir: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
        val_share: float = 0.1,
    ) -> None:
        self._path = str(path)
        self._image_key = image_key
        splits = _load(
            self._path,
            name=name,
            data_dir=data_dir,
            data_files=_plain(data_files),
            revision=revision,
            cache_dir=str(cache_dir) if cache_dir is not None else None,
        )
        own = next((name for name in _SPLIT_NAMES[split] if name in splits), None)
        train = next((name for name in _SPLIT_NAMES["train"] if name in splits), None)
        if own is None and (split == "test" or train is None):
            raise DataError(f"{path} has no split '{split}', only {', '.join(splits)}")
        title = own or train or ""
        table = splits[title]
        if image_key not in table.column_names:
            raise DataError(
                f"{path} has no column data.source.image_key='{image_key}', only {', '.join(table.column_names)}"
            )
        reference = splits[train] if train is not None else table
        _check_images(table.features[image_key], image_key, self._path)
        self.classes, labels = _labels(table, reference, label_key, self._path)
        has_val = any(name in splits for name in _SPLIT_NAMES["val"])
        rows = np.arange(len(table))
        if not has_val and split != "test":
            rows = np.array([row for row in rows if hashed_split(str(row), val_share=val_share) == split], np.int64)
        if not len(rows):
            raise DataError(
                f"data.source: {path} has no row in the split '{split}'; of {len(table)} rows data.source.val_share="
                f"{val_share} are for val"
            )
        self._rows = rows
        self._split = title
        self.labels = None if labels is None else labels[rows]
        self._table = table
        import datasets

        try:
            self._images = table.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # of Arrow
            raise DataError(
                f"the column data.source.image_key='{image_key}' of {path} has no images: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            cell = self._images[int(self._rows[index])][self._image_key]
        except (OSError, ValueError, NotImplementedError) as error:  # of a damaged file
            raise BadSample(f"{self.name(index)}: the row cannot be read: {error}") from error
        if not cell or (not cell.get("bytes") and not cell.get("path")):
            raise BadSample(f"{self.name(index)}: the row has no image")
        data = cell["bytes"] or Path(cell["path"])
        return self.labeled(index, EncodedImage(data))

    def name(self, index: int) -> str:
        return f"{self._path} {self._split}[{int(self._rows[index])}]"


class CaptionedHuggingFaceSource(TextListSource, HuggingFaceSource):
    """Images and texts of a table.

    Args:
        split, path: as `HuggingFaceSource`.
        text_key: column of the captions, strings or lists of strings; several columns give several captions.
        label_key: column of labels; None for none.
        options: as `HuggingFaceSource`.

    Raises:
        DataError: as `HuggingFaceSource`; or a column of captions does not exist or has other values.
    """

    def __init__(
        self,
        split: Split,
        *,
        path: str | Path,
        text_key: str | Sequence[str] = "caption",
        label_key: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, path=path, label_key=label_key, **options)
        self._text_keys = [text_key] if isinstance(text_key, str) else list(text_key)
        for key in self._text_keys:
            if key not in self._table.column_names:
                names = ", ".join(self._table.column_names)
                raise DataError(f"{path} has no column data.source.text_key='{key}', only {names}")
            feature = self._table.features[key]
            inner = getattr(feature, "feature", feature)
            if getattr(inner, "dtype", "") not in ("string", "large_string"):
                raise DataError(f"the column data.source.text_key='{key}' of {path} has {feature}, not strings")
        self._texts = self._table.select_columns(self._text_keys)

    def raw_texts(self, index: int) -> Sequence[object]:
        try:
            row = self._texts[int(self._rows[index])]
        except UnicodeDecodeError as error:
            raise BadSample(f"{self.name(index)}: its text is not valid UTF-8") from error
        except (OSError, ValueError, NotImplementedError) as error:  # of a damaged file
            raise BadSample(f"{self.name(index)}: the row cannot be read: {error}") from error
        return [text for key in self._text_keys for text in as_list(row[key])]


def _load(path: str, **options: Any) -> dict[str, Any]:
    """Loads tables by split."""
    import datasets  # takes a second to import

    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            if folder.is_dir() and options["data_files"] is None:
                _check_none_left_out(folder, datasets.load_dataset_builder(str(folder), **options))
            loaded = datasets.load_dataset(str(folder) if folder.exists() else path, **options)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.source.path: cannot load the data set '{path}': {message}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _check_none_left_out(folder: Path, builder: Any) -> None:
    """Checks that the library reads all files of a folder. It looks for the names of splits anywhere in a path, so that
    one image of a train (``station_train.jpg``) would make it leave out all others.

    Raises:
        DataError: it leaves out files that are of the same kind as others.
    """
    listed = (builder.config.data_files or {}).values()
    taken = {os.path.realpath(str(file)) for files in listed for file in files}
    endings = {os.path.splitext(file)[1].lower() for file in taken}
    base = os.path.realpath(folder / (builder.config.data_dir or ""))
    left = []
    for above, folders, files in os.walk(base):
        folders[:] = sorted(name for name in folders if not is_hidden(name) and not name.startswith("__"))
        paths = (os.path.join(above, name) for name in sorted(files) if not is_hidden(name))
        left += [path for path in paths if os.path.splitext(path)[1].lower() in endings and path not in taken]
    if not left:
        return
    example = os.path.relpath(left[0], base)
    tops = {os.path.relpath(file, base).split(os.sep)[0] for file in taken}
    if tops <= _SPLIT_FOLDERS:
        log.warning(
            "%d files of %s are in no folder of a split, such as %s: they are left out", len(left), folder, example
        )
        return
    raise DataError(
        f"data.source.path: the words train, val or test in the names of {len(taken)} files below {folder} would leave "
        f"out {len(left)} others, such as {example}: name the files, as in 'data.source.data_files={{train: \"**\"}}'"
    )


def _check_images(feature: Any, key: str, path: str) -> None:
    """Checks that a column has at most one image a row.

    Raises:
        DataError: it has lists, or something else than images.
    """
    import datasets

    stored = str(getattr(feature, "dtype", ""))
    fields = set(feature) if isinstance(feature, dict) else set()
    if isinstance(feature, datasets.Image) or stored in ("string", "large_string", "binary", "large_binary"):
        return
    if fields and fields <= {"bytes", "path"}:
        return
    kind = (
        "lists"
        if isinstance(feature, list | datasets.Sequence | datasets.LargeList) or hasattr(feature, "feature")
        else feature
    )
    raise DataError(f"the column data.source.image_key='{key}' of {path} has {kind}, not one image a row")


def _labels(table: Any, reference: Any, key: str | None, path: str) -> tuple[list[str], np.ndarray | None]:
    """Returns class names, and labels of all rows, int64 [N], or None without the column. Strings are numbered in the
    sorted order of those in ``reference``, the training split."""
    if key is None or key not in table.column_names:
        if key is not None:
            log.info("%s has no column label_key='%s': no labels", path, key)
        return [], None
    import datasets

    feature = table.features[key]
    column = table.with_format(None)[key]
    values = list(column)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), np.array([-1 if value is None else value for value in values], np.int64)
    if str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        numbers = np.array([-1 if value is None else value for value in values], np.int64)
        training = [-1 if value is None else value for value in reference.with_format(None)[key]]
        names = numbered_classes(training, f"data.source.label_key={key}")
        check_labels(numbers, names, path)
        return names, np.maximum(numbers, -1)
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        classes = sorted(value for value in set(reference.with_format(None)[key]) if value is not None)
        number_of = {value: number for number, value in enumerate(classes)}
        unknown = sorted({value for value in values if value is not None and value not in number_of})
        if unknown:
            raise DataError(
                f"data.source.label_key: {path} has classes that its training split lacks, so they have no label: "
                f"{unknown[:5]}"
            )
        return classes, np.array([-1 if value is None else number_of[value] for value in values], np.int64)
    raise DataError(f"the column label_key='{key}' of {path} has {feature}, not class labels, integers or strings")


def _plain(files: Any) -> Any:
    """Converts containers of the configuration library to lists and dicts."""
    if files is None or isinstance(files, str):
        return files
    if isinstance(files, Mapping):
        return {str(key): _plain(value) for key, value in files.items()}
    return [str(file) for file in files]
