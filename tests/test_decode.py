"""Images of 16 bits stay comparable, and files with something after their end are told from those that are cut off."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from ftlib.data.images import bad_files
from ftlib.errors import ImageError
from ftlib.data.decode import check_file, open_image


def stored(im, kind="png", **kw):
    "The bytes of a file"
    buffer = io.BytesIO()
    (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(buffer, kind, **kw)
    return buffer.getvalue()


def grey(x): return open_image(x).getpixel((0, 0))[0]


def pgm(value, white): return f"P5 4 4 {white}\n".encode() + np.full((4, 4), value, ">u2").tobytes()


# ---- more than 8 bits

@pytest.mark.parametrize("value, expected", [(200, 1), (2570, 10), (40000, 156), (65535, 255)])
@pytest.mark.parametrize("kind", ["png", "tiff", "big endian", "I in a tiff", "I in memory", "pgm", "array",
                                  "big endian array"])
def test_scale_of_16_bits_is_the_same_for_all_images(kind, value, expected):
    a = np.full((4, 4), value, np.uint16)
    whole = a.astype(np.int32)
    x = {"png": lambda: stored(a), "tiff": lambda: stored(a, "tiff"), "array": lambda: a,
         "big endian array": lambda: a.astype(">u2"),
         "big endian": lambda: Image.frombytes("I;16B", (4, 4), a.astype(">u2").tobytes()),
         "pgm": lambda: pgm(value, 65535),
         "I in a tiff": lambda: stored(whole, "tiff"), "I in memory": lambda: Image.fromarray(whole)}[kind]()
    assert grey(x) == expected


def test_a_tiff_of_12_bits():
    data = stored(np.full((4, 4), 7, np.uint16), "tiff")
    at = data.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")) + 8
    data = data[:at] + (12).to_bytes(2, "little") + data[at + 2:]
    im = Image.open(io.BytesIO(data))
    assert im.mode == "I;16" and im.tag_v2[258] == (12,)
    assert grey(data) == round(im.getpixel((0, 0)) * 255 / 4095)


def test_floats_and_what_has_no_scale():
    assert [grey(stored(np.full((4, 4), v, np.float32), "tiff")) for v in (0, .2, 1)] == [0, 51, 255]
    for a, said in ((np.float32(16), "from 16 to 16"), (np.float32(np.nan), "from nan"), (np.float32(-1), "from -1"),
                    (np.int32(65536), "expected 16 bits, 0…65535"),
                    (np.int32(-1), "from -1 to -1")):
        with pytest.raises(ImageError, match=said): open_image(stored(np.full((4, 4), a), "tiff"))


def test_a_refused_image_is_named(tmp_path):
    (tmp_path / "odd.tiff").write_bytes(stored(np.full((4, 4), 70_000, np.int32), "tiff"))
    with pytest.raises(ImageError, match="odd.tiff: mode I from 70000"): open_image(tmp_path / "odd.tiff")


# ---- the end of a file

def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).resize((300, 200))


def with_thumbnail():
    "A JPEG with another, whole JPEG in its Exif, as cameras write it"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + stored(noise().resize((60, 40)), "jpeg")
    data = stored(noise(), "jpeg")
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


FILES = {"jpg": lambda: stored(noise(), "jpeg"), "progressive.jpg": lambda: stored(noise(), "jpeg", progressive=True),
         "restarts.jpg": lambda: stored(noise(), "jpeg", restart_marker_rows=1), "thumbnail.jpg": with_thumbnail,
         "mpo": lambda: stored(noise(), "mpo", save_all=True, append_images=[noise().resize((30, 20))]),
         "png": lambda: stored(noise()), "gif": lambda: stored(noise().quantize(), "gif")}
TAILS = {"nothing": b"", "a line": b"\r\n", "zeros": bytes(9000), "ones": b"\xff" * 9000,
         "a video": np.random.default_rng(1).bytes(100_000), "another image": stored(noise().resize((90, 60)), "jpeg")}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", FILES)
def test_whole_files_are_kept(tmp_path, kind, tail):
    file = tmp_path / f"a.{kind}"
    file.write_bytes(FILES[kind]() + TAILS[tail])
    assert check_file(file) is None and open_image(file).size == (300, 200)


@pytest.mark.parametrize("tail", [t for t in TAILS if t != "another image"])
@pytest.mark.parametrize("kind", FILES)
def test_cut_files_are_found(tmp_path, kind, tail):
    data, file = FILES[kind](), tmp_path / f"a.{kind}"
    file.write_bytes(data[:len(data) // 2 if kind != "mpo" else 2000] + TAILS[tail])
    assert check_file(file)[0] == "truncated"


def test_good_files_are_not_read_whole(tmp_path, monkeypatch):
    for i in range(50): (tmp_path / f"{i}.jpg").write_bytes(FILES["jpg"]())
    monkeypatch.setattr("ftlib.data.decode._jpeg_ends", lambda data: pytest.fail("a good file was read"))
    monkeypatch.setattr(Image.Image, "load", lambda im: pytest.fail("a good file was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not len(bad_files([tmp_path / n for n in os.listdir(tmp_path)]))


def test_too_many_pixels_for_their_format(tmp_path, monkeypatch):
    monkeypatch.setattr("ftlib.data.decode.MAX_PIXELS", 2000)
    monkeypatch.setattr("ftlib.data.decode._LARGE", 100)
    for side, name, fine in ((30, "a.png", True), (40, "b.png", False), (40, "c.jpg", True), (50, "d.jpg", False)):
        Image.new("RGB", (side, side), "red").save(tmp_path / name)
        assert (check_file(tmp_path / name) is None) == fine
        if fine: assert open_image(tmp_path / name, 10).size >= (10, 10)
        else:
            with pytest.raises(ImageError, match="pixels are more than"): open_image(tmp_path / name)
