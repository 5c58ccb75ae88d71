"""Pictures with several captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.reader import BadRecord, Record, expected, load_json

_KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",)}
"""By split, what it is called in the files; `restval` is trained on."""


def read_karpathy(
    files: DataFiles, names: Sequence[str], split: str, *, splits: Mapping[str, Sequence[str]] | None = None
) -> Iterator[Record | BadRecord]:
    """Karpathy's splits of COCO, Flickr30k and Flickr8k: `filename`, `imgid` and `captions`.

    `filepath`, such as `val2014`, is empty where the pictures are in one folder.

    Args:
        splits: by split, what it is called in the file.
    """
    called = (splits or _KARPATHY_SPLITS).get(split, (split,))
    for name in names:
        try:
            for image in load_json(files, name)["images"]:
                if image["split"] in called:
                    yield {
                        "imgid": image["imgid"],
                        "cocoid": image.get("cocoid", image["imgid"]),
                        "filepath": image.get("filepath", ""),
                        "filename": image["filename"],
                        "captions": [sentence["raw"] for sentence in image["sentences"]],
                    }
        except (KeyError, TypeError):
            raise expected(files, name, "Karpathy's {images: [{split, filename, sentences}]}") from None


def read_nocaps(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """NoCaps: `id`, `file_name`, `domain` and `captions`."""
    for name in names:
        try:
            content = load_json(files, name)
            captions: dict[int, list[str]] = {}
            for annotation in content["annotations"]:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            for image in content["images"]:
                yield {
                    "id": image["id"],
                    "file_name": image["file_name"],
                    "domain": image.get("domain", ""),
                    "captions": captions.get(image["id"], []),
                }
        except (KeyError, TypeError):
            raise expected(files, name, "COCO's {images: [...], annotations: [...]}") from None
