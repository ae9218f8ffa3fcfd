"""Files from elsewhere: regular files alone, within stated bounds, and every refusal is one sentence with the name."""

import io
import json
import os
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest

from diffusion_jax import interop, reading
from diffusion_jax.errors import InvalidInput


def refusal(read, path):
    """The sentence, told within a second: nothing is waited for."""
    found = []

    def attempt():
        try:
            found.append(read(path))
        except InvalidInput as error:
            found.append(error)

    asking = threading.Thread(target=attempt, daemon=True)
    asking.start()
    asking.join(10)
    assert found, "it hangs"
    assert isinstance(found[0], InvalidInput), found
    assert "\n" not in str(found[0]) and path.name in str(found[0])
    return str(found[0])


READERS = {
    "json": (reading.read_json, ".json"),
    "text": (reading.read_text, ".txt"),
    "array": (reading.read_array, ".npy"),
    "gzip": (reading.read_gzip, ".gz"),
    "arrays": (reading.read_arrays, ".npz"),
    "image": (reading.read_image, ".png"),
    "tensors": (lambda path: interop.files.TensorFiles(path), ".safetensors"),
}


@pytest.mark.parametrize(("read", "suffix"), READERS.values(), ids=READERS)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(read, suffix, tmp_path):
    fifo, folder, absent = (tmp_path / f"{name}{suffix}" for name in ("fifo", "folder", "absent"))
    os.mkfifo(fifo)
    folder.mkdir()
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    assert "is a fifo" in refusal(read, fifo)
    assert "is a device" in refusal(read, tmp_path / f"zero{suffix}")
    assert "does not exist" in refusal(read, absent)
    assert "folder" in refusal(read, folder) or suffix == ".safetensors"


@pytest.mark.parametrize(("read", "suffix"), READERS.values(), ids=READERS)
def test_a_link_to_a_file_is_the_file(read, suffix, tmp_path):
    target = tmp_path / "blob"
    target.write_bytes(b"\x00not of any format\xff")
    (tmp_path / f"link{suffix}").symlink_to(target)
    assert "regular" not in refusal(read, tmp_path / f"link{suffix}")


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path):
    path = tmp_path / "locked.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(reading.Unreadable, match="Permission denied"):
        reading.read_json(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deep: at most 64 levels"),
        ("[1, 2]", "holds a JSON list, but a dict is needed"),
        ("{", "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["lists", "dicts", "70 levels", "a list", "cut short", "a number of 5,000 digits", "empty"],
)
def test_json_is_bounded(text, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert says in refusal(reading.read_json, path)


def test_json_within_the_bounds_is_read(tmp_path):
    path = tmp_path / "config.json"
    value = {"a": [1, {"b": None}], "c": 0.5}
    path.write_text(json.dumps(value))
    assert reading.read_json(path) == value
    path.write_text(json.dumps([1, 2]))
    assert reading.read_json(path, list) == [1, 2]
    path.write_text(" " * (reading.MAX_JSON_BYTES + 1))
    assert "bytes, but at most" in refusal(reading.read_json, path)


def test_names_that_leave_their_folder_are_refused(tmp_path):
    for name in ("../x", "a/../../x", "/etc/passwd", "~/x", "c:\\x", "..", "", None, 5, "a\0b", "..\\x"):
        with pytest.raises(InvalidInput, match=r"index\.json names the file"):
            reading.file_within(tmp_path, name, tmp_path / "index.json")
    assert reading.file_within(tmp_path, "unet/a.safetensors", "index.json") == tmp_path / "unet" / "a.safetensors"


def test_arrays_come_back(tmp_path):
    a, b = np.arange(6.0).reshape(2, 3), np.asarray("text")
    np.savez_compressed(tmp_path / "a.npz", a=a, b=b)
    np.save(tmp_path / "a.npy", a)
    found = reading.read_arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(found["a"], a)
    assert str(found["b"]) == "text"
    np.testing.assert_array_equal(reading.read_array(tmp_path / "a.npy"), a)
    assert isinstance(reading.read_array(tmp_path / "a.npy", mmap=True), np.memmap)


def header(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
    return file.getvalue()


def test_an_archive_is_not_unpacked_beyond_what_its_size_allows(tmp_path):
    """1.5 MB that unpack to 1.6 GB are refused; nothing of it is unpacked, for that would take a second."""
    path, length = tmp_path / "bomb.npz", 1_600_000_000
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x0.npy", header((length // 4,)))
    # The sizes that the directory declares are what is looked at first.
    content = path.read_bytes()
    declared = struct.pack("<I", len(header((length // 4,))))
    path.write_bytes(content.replace(declared, struct.pack("<I", length)) + block.flush()[:0])
    assert "unpack to 1600000000" in refusal(reading.read_arrays, path)


@pytest.mark.parametrize("shape", [(2**40,), (2**70,), (-1,), (0, 2**62), (3,)], ids=str)
def test_an_array_that_announces_what_it_does_not_hold_is_refused(shape, tmp_path):
    (tmp_path / "a.npy").write_bytes(header(shape) + bytes(8))
    assert "announces" in refusal(reading.read_array, tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x0.npy", header(shape) + bytes(8))
    assert "announces" in refusal(reading.read_arrays, tmp_path / "a.npz")


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    assert "Python objects" in refusal(reading.read_array, tmp_path / "a.npy")
    assert "Python objects" in refusal(reading.read_arrays, tmp_path / "a.npz")


def picture(width, height):
    """A PNG of that size whose rows are not there: its header alone is looked at."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_many_pixels_is_not_decoded(tmp_path):
    for side, says in ((20_000, "pixels"), (12_000, "12000 x 12000 pixels")):
        path = tmp_path / f"{side}.png"
        path.write_bytes(picture(side, side))
        assert says in refusal(reading.read_image, path)
    (tmp_path / "cut.png").write_bytes(picture(4, 4))
    assert "cannot be decoded" in refusal(reading.read_image, tmp_path / "cut.png")


def test_a_picture_is_what_its_content_says_and_no_decoder_runs_a_program(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(run) show\n%%EOF\n")
    said = refusal(reading.read_image, path)
    assert "cannot be decoded" in said and "of no kind of picture that is read" in said and "BufferedReader" not in said


def test_shards_outside_of_their_folder_are_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../secret.safetensors", "/etc/hosts", 3, None):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InvalidInput, match=r"index\.json names the file"):
            interop.files.TensorFiles(tmp_path)
    for wrong in (None, [], {}, "a"):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(InvalidInput, match="a dict from tensors to files is needed"):
            interop.files.TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["{}/sd15", "./sd15", "../sd15", "~/sd15x", "a/b/c", "sd15", "x/unet.safetensors"])
def test_what_looks_like_a_path_is_one(name, tmp_path, monkeypatch):
    """The hub is never asked, which takes minutes where there is no network."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **more: pytest.fail("asked the hub"))
    with pytest.raises(InvalidInput, match=r"does not exist: a folder with config\.json"):
        interop.files.local_folder(name.format("checkpoints"))


def test_a_repo_id_is_asked_for_once_and_not_for_long(monkeypatch):
    monkeypatch.setattr(interop.files, "HUB_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **more: threading.Event().wait(60))
    with pytest.raises(InvalidInput, match=r"the hub did not answer within 0\.2 seconds"):
        interop.files.local_folder("owner/name-that-is-not-cached")
