"""Training, caching, statistics and scores see the same files and the same pixels, or the same refusal."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.assertions import refusal as one_refusal
from util.data.datasets import ImageFolder
from util.errors import UserError
from util.evaluation.image_source import image_batches, open_reference
from util.images import list_images, list_numbered_pngs, png_name, read_image, save_png

SIZE = 8


def picture(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    """Two classes of three images each."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            save_png(tmp_path / "data" / name / f"{i}.png", picture(10 * label + i))
    return tmp_path / "data"


def for_training(root):
    data = ImageFolder(root, SIZE)
    return torch.stack([data[(i, False)][0] for i in range(len(data))])


def for_statistics(root):
    return torch.cat([images for _, images in image_batches(open_reference(root, SIZE), 100)])


def seen(root) -> int:
    """Number of images, which are the same for both."""
    images = for_training(root)
    assert torch.equal(images, for_statistics(root))
    return len(images)


def refusal(root) -> str:
    """The sentence with which both refuse."""
    sentences = [one_refusal(lambda see=see: see(root)) for see in (for_training, for_statistics)]
    assert sentences[0] == sentences[1]
    return sentences[0]


# ---- which files -------------------------------------------------------------------------------------


def test_folders_behind_links_count(root, tmp_path):
    (root / "dog").rename(tmp_path / "elsewhere")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "more").mkdir()
    save_png(tmp_path / "more" / "9.png", picture(9))
    (root / "cat" / "more").symlink_to(tmp_path / "more")
    assert seen(root) == 7


def test_two_classes_may_be_the_same_folder(root):
    (root / "hound").symlink_to(root / "dog")
    assert seen(root) == 9


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/again", "cat"),
        ("cat/up", "."),
        ("cat/higher", ".."),
        ("loop", "."),
        ("higher", ".."),
        ("cat/dog", "dog"),
    ],
)
def test_links_in_circles_end(root, link, target):
    (root / "dog" / "back").symlink_to(root / "cat")
    (root / link).symlink_to(root / target)
    assert 6 < seen(root) <= 12
    (root / "dog" / "back").unlink()
    (root / link).unlink()
    assert seen(root) == 6


def test_every_kind_of_image_counts_in_upper_and_lower_case(root):
    for name in ("a.JPEG", "b.jpg", "c.bmp", "d.PPM", "e.pgm", "f.tif", "g.TIFF", "h.webp"):
        Image.fromarray(picture()).convert("L" if name == "e.pgm" else "RGB").save(
            root / "cat" / name
        )
    assert seen(root) == 14


def test_files_that_are_not_used_are_counted_in_a_note(root, capsys):
    (root / "cat" / "readme.txt").write_text("x")
    save_png(root / "stray.png", picture())
    assert seen(root) == 6
    assert capsys.readouterr().err.splitlines() == [
        f"note: 1 file(s) of another kind are not used, such as {root}/cat/readme.txt",
        f"note: 1 file(s) outside the class folders are not used, such as {root}/stray.png",
    ]


def test_a_folder_without_folders_is_read_as_it_is(root):
    assert len(open_reference(root / "cat", SIZE)) == len(list_images(root / "cat")) == 3


def test_a_folder_without_folders_tells_what_is_not_used(root, capsys):
    for name in ("a.gif", "readme.txt"):
        (root / "cat" / name).write_text("x")
    (root / "cat" / ".hidden").touch()
    assert len(open_reference(root / "cat", SIZE)) == 3
    assert capsys.readouterr().err == (
        f"note: 2 file(s) of another kind are not used, such as {root}/cat/a.gif\n"
    )


@pytest.mark.parametrize("place", ["cat/3.png", "bird"])
def test_a_link_to_nothing_is_refused(root, place):
    (root / place).symlink_to(root / "gone")
    assert place in refusal(root)


def test_an_empty_file_and_an_empty_class_are_refused(root):
    (root / "cat" / "3.png").touch()
    assert "cat/3.png is empty: remove or replace it" in refusal(root)
    (root / "cat" / "3.png").unlink()
    (root / "bird").mkdir()
    assert "bird holds no files" in refusal(root)


# ---- which pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp"])
def test_every_mode_is_converted_the_same_way(root, mode, kind):
    try:
        Image.fromarray(picture(7)).convert(mode).save(root / "cat" / "0.png", format=kind)
    except OSError:
        pytest.skip(f"{kind} has no {mode}")
    assert seen(root) == 6
    expected = np.array(Image.open(root / "cat" / "0.png").convert("RGB"))
    assert np.array_equal(read_image(root / "cat" / "0.png"), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_more_than_8_bits_per_channel_are_refused(root, dtype, kind):
    if kind == "png" and dtype == np.float32:
        pytest.skip("PNG has no float32")
    image = Image.fromarray(np.full((SIZE, SIZE), 40000, dtype=dtype))
    image.save(root / "dog" / "1.png", format=kind)
    assert "dog/1.png has more than 8 bits per channel (mode " in refusal(root)


def test_an_image_of_too_many_pixels_is_refused(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_png(root / "cat" / "2.png", picture(0, 20))
    assert "cat/2.png cannot be read as an image (Image size (400 pixels)" in refusal(root)


FORMATS = ("BMP", "DDS", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MSP", "PCX", "PNG", "PPM")
FORMATS += ("SGI", "TGA", "TIFF", "WEBP", "XBM")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_of_any_format_is_read_or_refused_but_never_a_crash(root, kind):
    buffer = io.BytesIO()
    mode = "1" if kind in ("MSP", "XBM") else "RGB"
    size = 16 if kind in ("ICNS", "ICO") else SIZE
    try:
        Image.fromarray(picture(3, size)).convert(mode).save(buffer, format=kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {kind}")
    data, random = buffer.getvalue(), np.random.default_rng(1)
    path = root / "cat" / "0.jpg"
    for length in (*range(1, min(len(data), 40)), *random.integers(1, len(data), 10)):
        wrong = bytearray(data[:length] if length % 2 else data)
        wrong[length % len(wrong)] ^= 0xFF
        path.write_bytes(wrong)
        try:
            read_image(path)
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_png_that_was_cut_off_is_refused_whatever_its_name(root, name, part):
    data = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "0.png").unlink()
    (root / "cat" / name).write_bytes(data[: int(part * len(data))])
    assert f"cat/{name} cannot be read as an image" in refusal(root)


# ---- numbers -----------------------------------------------------------------------------------------


def numbered(folder, *names):
    folder.mkdir()
    for name in names:
        save_png(folder / name, picture())
    return folder


@pytest.mark.parametrize(
    ("first", "second"), [("00000", "000000"), ("00007", "0000007"), ("000003", "0000003")]
)
def test_two_images_of_one_number_are_both_named(tmp_path, first, second):
    others = [png_name(i) for i in range(9) if i != int(first)]
    folder = numbered(tmp_path / "images", *others, f"{first}.png", f"{second}.png")
    with pytest.raises(UserError, match="same number") as error:
        list_numbered_pngs(folder, 10)
    assert f"{first}.png" in str(error.value) and f"{second}.png" in str(error.value)


def test_more_digits_than_needed_are_no_error(tmp_path):
    folder = numbered(tmp_path / "images", "0000001.png", "0000000.png")
    assert [path.name for path in list_numbered_pngs(folder, 2)] == ["0000000.png", "0000001.png"]


@pytest.mark.parametrize("name", ["٠٠٠٠١.png", "0001.png", "1e003.png", "00001.jpg", "00001.webp"])
def test_what_is_not_a_number_is_refused(tmp_path, name):
    folder = numbered(tmp_path / "images", "00000.png")
    Image.fromarray(picture()).save(folder / name)
    with pytest.raises(UserError, match="not numbered"):
        list_numbered_pngs(folder, 2)
