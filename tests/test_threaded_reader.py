"""ThreadedReader keeps the order of the pictures and reports unreadable ones."""

from pathlib import Path

import pytest
import torch

import data_loader
from dataset.images import ThreadedReader
from errors import DataError
from parameter import resolve


def decoded(folder):
    config = resolve({"dataset": "folder", "image_path": str(folder), "imsize": 32, "check_data": "off",
                      "cache": "off"})
    dataset = data_loader.open_dataset(config)
    return ThreadedReader(dataset), dataset


def test_a_slice_of_pictures_is_decoded_in_order(pictures):
    found, dataset = decoded(pictures)
    assert len(found) == 12
    whole = torch.stack([dataset[index] for index in range(12)])
    assert len(torch.unique(whole, dim=0)) == 12
    for part in (slice(0, 12), slice(3, 7), slice(10, 20), slice(4, 5)):
        assert found[part].dtype == torch.uint8 and torch.equal(found[part], whole[part])


def test_unreadable_pictures_are_counted_and_the_first_is_named(pictures):
    for name in ("11", "3", "9"):                       # the last one too, in numeric and in text order
        (pictures / f"{name}.png").write_bytes(b"<html>")
    found, dataset = decoded(pictures)
    damaged = [Path(path).stem in ("11", "3", "9") for path in dataset.sources]
    first = damaged.index(True)
    last = len(damaged) - damaged[::-1].index(True)
    with pytest.raises(DataError) as caught:
        found[last - 1:last]                            # any of them triggers the report
    with pytest.raises(DataError) as direct:
        dataset[first]
    assert str(caught.value) == f"3 of 12 pictures cannot be used; the first:\n{direct.value}"
    assert Path(dataset.sources[first]).name in str(caught.value)
    assert caught.value.__suppress_context__, "the original error is not shown as well"
    assert len(found[first + 1:first + 2]) == 1, "others can still be read"


def test_a_single_unreadable_picture_speaks_for_itself(pictures):
    (pictures / "7.png").write_bytes(b"<html>")
    found, dataset = decoded(pictures)
    number = [Path(path).name for path in dataset.sources].index("7.png")
    with pytest.raises(DataError) as direct:
        dataset[number]
    with pytest.raises(DataError) as caught:
        found[0:12]
    assert str(caught.value) == str(direct.value) and "7.png" in str(caught.value)


def test_a_picture_that_can_be_read_the_second_time_is_named_all_the_same():
    class Shaky:
        """Reading picture 1 fails once."""
        failed = False

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1 and not self.failed:
                self.failed = True
                raise DataError("cannot read 1.png")
            return torch.zeros(3, 4, 4, dtype=torch.uint8)

    with pytest.raises(DataError, match="^cannot read 1.png$"):
        ThreadedReader(Shaky())[0:3]
