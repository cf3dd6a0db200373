"""Pictures as files: bytes as MAR makes them, whole files or none, sheets."""

import errno
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from util.errors import UserError
from util.images import (
    PngWriter,
    contact_sheet,
    is_complete_png,
    list_images,
    list_numbered_pngs,
    png_name,
    read_image,
    save_png,
    side_by_side_sheet,
    to_uint8,
)


def picture(seed=0, height=12, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def fill_disk_after(monkeypatch, writes):
    """After `writes` files Pillow writes half a file and then finds the disk full."""
    save, calls = Image.Image.save, itertools.count()

    def failing(self, path, format):
        if next(calls) < writes:
            return save(self, path, format=format)
        with open(path, "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\nhalf")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", failing)


def test_bytes_are_those_of_mars_own_formula():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 5)  # beyond [-1, 1] on both sides
    halves = torch.arange(0, 5).float() / 255 - 1  # x.5 levels: rounding to even shows
    images[0, 0, 0, :5] = halves
    expected = np.round(np.clip((images.numpy().transpose(0, 2, 3, 1) + 1) / 2 * 255, 0, 255))
    result = to_uint8(images)
    assert result.dtype == np.uint8 and result.shape == (3, 8, 5, 3)
    assert np.array_equal(result, expected.astype(np.uint8))


def test_bfloat16_images_are_rounded_from_their_float32_values():
    images = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4).bfloat16()
    assert np.array_equal(to_uint8(images), to_uint8(images.float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused_with_their_number(value):
    images = torch.zeros(4, 3, 2, 2)
    images[1, 0, 0, 0] = images[3, 2, 1, 1] = value
    with pytest.raises(UserError, match="2 of 4 decoded images"):
        to_uint8(images)


def test_a_saved_png_reads_back_the_same_and_leaves_no_other_file(tmp_path):
    save_png(tmp_path / "a.png", picture())
    assert np.array_equal(read_image(tmp_path / "a.png"), picture())
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_new_file_takes_the_name_and_does_not_write_into_the_old_one(tmp_path):
    save_png(tmp_path / "a.png", picture(0))
    os.link(tmp_path / "a.png", tmp_path / "kept.png")
    save_png(tmp_path / "a.png", picture(1))
    assert np.array_equal(read_image(tmp_path / "a.png"), picture(1))
    assert np.array_equal(read_image(tmp_path / "kept.png"), picture(0))


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, picture(0))
    fill_disk_after(monkeypatch, writes=0)
    with pytest.raises(UserError, match=r"cannot write .*a\.png \(No space left on device\)"):
        save_png(path, picture(1))
    assert np.array_equal(read_image(path), picture(0))
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    "image",
    [picture().astype(np.float32), picture()[..., 0], picture()[None]],
    ids=["float", "grey", "batch"],
)
def test_only_rgb_bytes_are_saved(tmp_path, image):
    with pytest.raises(ValueError, match="expected uint8"):
        save_png(tmp_path / "a.png", image)


def test_a_png_cut_anywhere_is_not_complete_and_is_named_when_read(tmp_path):
    save_png(tmp_path / "whole.png", picture())
    data = (tmp_path / "whole.png").read_bytes()
    assert is_complete_png(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    for length in [*range(0, len(data), 7), len(data) - 1]:
        cut.write_bytes(data[:length])
        assert not is_complete_png(cut)
    cut.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))  # zeros after a power cut
    assert not is_complete_png(cut)
    assert not is_complete_png(tmp_path / "absent.png")
    with pytest.raises(UserError, match=r"cut\.png cannot be read as an image"):
        read_image(cut)


def test_a_png_damaged_inside_is_named_when_read(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, picture())
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    assert is_complete_png(path)
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
        read_image(path)


def test_images_are_listed_by_number_and_none_may_be_missing(tmp_path):
    for index in (2, 0, 1):
        save_png(tmp_path / png_name(index), picture(index))
    (tmp_path / "run.json").write_text("{}")
    names = [path.name for path in list_numbered_pngs(tmp_path, 3)]
    assert names == ["00000.png", "00001.png", "00002.png"]
    (tmp_path / "00001.png").rename(tmp_path / "00007.png")
    with pytest.raises(UserError, match=r"holds 00002\.png, but no 00001\.png"):
        list_numbered_pngs(tmp_path, 3)


def test_a_wrong_number_of_images_is_an_error_with_both_numbers(tmp_path):
    for index in range(3):
        save_png(tmp_path / png_name(index), picture(index))
    for wanted in (2, 4):
        with pytest.raises(UserError, match=f"holds 3 images, but {wanted} are to be scored"):
            list_numbered_pngs(tmp_path, wanted)


def test_the_images_of_a_folder_are_listed_without_those_of_folders_in_it(tmp_path):
    (tmp_path / "cat").mkdir()
    save_png(tmp_path / "cat" / "a.png", picture())
    save_png(tmp_path / "b.PNG", picture())
    assert [path.name for path in list_images(tmp_path)] == ["b.PNG"]
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "absent")


def test_the_writer_saves_every_image_though_few_may_wait(tmp_path):
    with PngWriter(threads=3, capacity=2) as writer:
        for index in range(40):
            writer.write(tmp_path / png_name(index), picture(index))
    files = list_numbered_pngs(tmp_path, 40)
    assert all(np.array_equal(read_image(f), picture(i)) for i, f in enumerate(files))


def test_a_full_disk_stops_the_caller_and_leaves_only_whole_files(tmp_path, monkeypatch):
    fill_disk_after(monkeypatch, writes=5)
    with pytest.raises(UserError, match="No space left"), PngWriter(2, capacity=2) as writer:
        for index in range(1000):
            writer.write(tmp_path / png_name(index), picture(index))
    assert index < 999
    assert len(os.listdir(tmp_path)) == 5
    assert all(is_complete_png(tmp_path / name) for name in os.listdir(tmp_path))


def test_a_failure_of_the_last_image_is_raised_at_the_end_of_the_block(tmp_path):
    with pytest.raises(UserError, match="absent"), PngWriter() as writer:
        writer.write(tmp_path / "absent" / "a.png", picture())


def test_an_error_of_the_block_itself_is_not_hidden_by_the_writer(tmp_path):
    with pytest.raises(KeyError), PngWriter() as writer:
        writer.write(tmp_path / "absent" / "a.png", picture())
        raise KeyError


def test_images_queued_before_an_interrupt_are_still_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), PngWriter(threads=1) as writer:
        for index in range(5):
            writer.write(tmp_path / png_name(index), picture(index))
        raise KeyboardInterrupt
    assert len(list_numbered_pngs(tmp_path, 5)) == 5


def test_a_contact_sheet_puts_image_i_in_row_i_over_columns():
    images = np.stack([picture(seed, 4, 6) for seed in range(5)])
    sheet = contact_sheet(images, columns=3, padding=1, scale=2)
    assert sheet.shape == (1 + 2 * (8 + 1), 1 + 3 * (12 + 1), 3)
    for index, image in enumerate(images):
        y, x = 1 + index // 3 * 9, 1 + index % 3 * 13
        assert np.array_equal(sheet[y : y + 8 : 2, x : x + 12 : 2], image)
    assert (sheet[10:18, 27:39] == 255).all()  # the sixth place is empty


def test_side_by_side_rows_share_their_columns():
    plain = np.stack([picture(seed, 16, 16) for seed in range(4)])
    lazy = plain[:, ::-1]
    sheet = side_by_side_sheet({"MAR": plain, "LazyMAR": lazy}, padding=3)
    assert sheet.shape[1] == 3 + 4 * (16 + 3)
    height = sheet.shape[0] // 2
    top, bottom = sheet[:height], sheet[height:]
    for index in range(4):
        x = 3 + index * 19
        assert np.array_equal(top[-19:-3, x : x + 16], plain[index])
        assert np.array_equal(bottom[-19:-3, x : x + 16], lazy[index])
    assert (top[:-22] < 100).any() and (bottom[:-22] < 100).any()  # both captions


def test_side_by_side_rows_of_different_length_are_refused():
    with pytest.raises(ValueError, match="'MAR': 2"):
        side_by_side_sheet({"MAR": np.zeros((2, 4, 4, 3)), "LazyMAR": np.zeros((3, 4, 4, 3))})
