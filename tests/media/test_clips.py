"""Clips: which frames are read, that they are the right ones, and everything that is refused, by its words."""

from __future__ import annotations

import base64
import builtins
import io
import itertools
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.clips import SIZE, brightness, frame, write_animation, write_video
from vlm_cli.errors import MediaError, PromptError
from vlm_cli.media import MediaLoader
from vlm_cli.media.request import MAX_FRAMES, ClipRequest
from vlm_cli.media.timeline import Timeline


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of clips of 30 frames, 10 a second."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "a.mp4").write_bytes(write_video())
    (folder / "h.mp4").write_bytes(write_video(codec="h264", key_every=12))
    (folder / "v.webm").write_bytes(write_video(format="webm", codec="libvpx-vp9"))
    (folder / "a.avi").write_bytes(write_video(format="avi"))
    (folder / "a.ts").write_bytes(write_video(format="mpegts", codec="h264"))
    for suffix, format in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG")):
        (folder / f"a.{suffix}").write_bytes(write_animation(30, format))
    (folder / "frames").mkdir()
    for i in range(30):
        frame(i).save(folder / "frames" / f"{i}.png")
    (folder / "frames" / "notes.txt").write_text("no picture")
    return folder


def load(folder, source, **options):
    return MediaLoader(folder, **options).load_clip(source)


def refusal(folder, source, error=MediaError, **options):
    with pytest.raises(error) as caught:
        load(folder, source, **options)
    return str(caught.value)


# -- what stands after the `?` -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "a.mp4": ClipRequest("a.mp4"),
        "a.mp4?frames=4": ClipRequest("a.mp4", frames=4),
        "a.mp4?fps=.5&start=1.5&end=3": ClipRequest("a.mp4", fps=0.5, start=1.5, end=3.0),
        "what?.mp4": ClipRequest("what?.mp4"),
        "clip?frames=8?": ClipRequest("clip?frames=8"),
        "https://x.org/c?token=1": ClipRequest("https://x.org/c?token=1"),
        "https://x.org/c?token=1&start=2": ClipRequest("https://x.org/c?token=1&start=2"),
        "https://x.org/c?token=1?start=2": ClipRequest("https://x.org/c?token=1", start=2.0),
        "a?b=c": ClipRequest("a?b=c"),
        "?frames=2": ClipRequest("?frames=2"),
        "-?frames=2": ClipRequest("-", frames=2),
    }.items(),
)
def test_settings_are_read(source, expected):
    assert ClipRequest.parse(source) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    {
        "frames=8&fps=1": "frames and fps both say",
        "frames=0": "frames expects a whole number from 1 to 1,024, got '0'",
        "frames=1025": "got '1025'",
        "frames=2.5": "got '2.5'",
        "frames=-1": "got '-1'",
        "frames=٣": "got '٣'",
        "fps=0": "fps expects frames for each second, more than 0",
        "fps=nan": "got 'nan'",
        "start=abc": "start expects a number of seconds, such as 2.5, got 'abc'",
        "end=1e400": "end expects",
        "start=3&end=3": "ends at 3 s, and begins at 3 s. Give a later end",
        "end=0": "ends at 0 s, and begins at 0 s",
        "frams=8": "unknown setting 'frams'. Did you mean 'frames'? Known: frames, fps, start, end, frame",
        "frame=1&frames=2": "frame names the only frame that is read. Give it alone",
        "frame=1.5": "frame expects a whole number from 0",
        "frames=8&size=3": "unknown setting 'size'. Known",
        "frames=8&frames=9": "frames is given twice",
    }.items(),
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(PromptError) as caught:
        ClipRequest.parse(f"a.mp4?{settings}")
    assert words in str(caught.value) and "<video:clip.mp4?frames=8>" in str(caught.value)


# -- which frames ------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_evenly_spaced_times():
    """For a steady rate, they are NumPy's `linspace` over the frames, as LLaVA takes them."""
    for count, wanted, step in itertools.product((1, 2, 7, 30, 101), (1, 2, 3, 8, 50), (1, 4, 512)):
        timeline = Timeline(range(0, count * step, step), count * step, Fraction(1, 25 * step))
        chosen = timeline.choose(ClipRequest("", frames=wanted), "")
        assert chosen == np.linspace(0, count - 1, min(count, wanted), dtype=int).tolist(), (count, wanted, step)
    # Milliseconds of a clip with 30 frames a second are rounded: 0, 33, 67, 100, …
    rounded = Timeline([round(i * 1000 / 30) for i in range(301)], 10_033, Fraction(1, 1000))
    assert rounded.choose(ClipRequest("", frames=7), "") == np.linspace(0, 300, 7, dtype=int).tolist()


def test_frames_of_a_variable_rate_are_even_in_time():
    slow = Timeline([0, 100, 200, 300, 900, 1500], 2100, Fraction(1, 1000))
    assert slow.choose(ClipRequest("", frames=4), "") == [0, 3, 4, 5]  # at 0, 500, 1000 and 1500 ms
    assert slow.choose(ClipRequest("", frames=5), "") == [0, 2, 3, 4, 5]
    assert slow.choose(ClipRequest("", frames=6), "") == [0, 1, 2, 3, 4, 5]
    assert slow.duration == 2.1


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (ClipRequest("", fps=1), [0, 9, 19, 29]),
        (ClipRequest("", fps=0.1), [0]),
        (ClipRequest("", fps=100), list(range(30))),
        (ClipRequest("", frames=3, start=1), [10, 19, 29]),
        (ClipRequest("", frames=3, start=1, end=2), [10, 15, 20]),
        (ClipRequest("", frames=3, start=0.42, end=0.48), [4]),  # no frame begins there: the one that is shown
        (ClipRequest("", frames=3, start=2.95, end=3), [29]),
    ],
)
def test_parts_and_rates(request_, chosen):
    timeline = Timeline(range(0, 300, 10), 300, Fraction(1, 100))
    assert timeline.choose(request_, "") == chosen


def test_too_many_frames_are_refused():
    long = Timeline(range(100_000), 100_000, Fraction(1, 25))
    with pytest.raises(MediaError, match=r"fps=10 of x gives 40,001 frames; vlm reads at most 1,024 of one clip"):
        long.choose(ClipRequest("", fps=10), "x")
    assert len(long.choose(ClipRequest("", frames=MAX_FRAMES), "x")) == MAX_FRAMES


# -- the frames themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "h.mp4", "v.webm", "a.avi", "a.ts", "a.gif", "a.webp", "a.png", "frames"])
def test_the_chosen_frames_are_read(clips, name):
    found = load(clips, f"{name}?frames=7")
    assert found.chosen.indices == tuple(np.linspace(0, 29, 7, dtype=int))
    assert [brightness(x) for x in found.frames] == list(found.chosen.indices)
    assert all(x.mode == "RGB" and x.size == SIZE for x in found.frames)
    assert (found.width, found.height) == SIZE
    assert MediaLoader(clips).count_frames(f"{name}?frames=7") == 7
    if name == "frames":
        assert found.chosen.seconds is None and found.chosen.describe() == "7 frames"
    else:
        np.testing.assert_allclose(found.chosen.seconds, np.array(found.chosen.indices) / 10, atol=1e-3)
        np.testing.assert_allclose(found.chosen.duration, 3, atol=0.02)
        assert found.chosen.describe() == "7 frames from 0.00 to 2.90 s"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["a.mp4", "h.mp4", "v.webm"])
def test_frames_after_a_seek_are_those_of_a_whole_decode(clips, name):
    with av.open(str(clips / name)) as container:
        whole = [x.to_image() for x in container.decode(video=0)]
    for settings in ("frames=30", "frames=3&start=1.7", "frames=1&start=2.2", "fps=3"):
        found = load(clips, f"{name}?{settings}")
        for image, index in zip(found.frames, found.chosen.indices, strict=True):
            assert image.tobytes() == whole[index].tobytes(), (settings, index)
    assert whole[1].tobytes() != whole[2].tobytes()  # the twin


def test_few_frames_of_a_long_clip_are_decoded(clips, monkeypatch):
    import vlm_cli.media.video as video

    decoded = []
    finish = video.VideoFile._finish
    monkeypatch.setattr(video.VideoFile, "_finish", lambda self, x: decoded.append(x.pts) or finish(self, x))
    seeks = []
    read = video.VideoFile._decode_from_key
    monkeypatch.setattr(video.VideoFile, "_decode_from_key", lambda self, t: seeks.append(t[0]) or read(self, t))
    load(clips, "a.mp4?frames=2")
    assert len(decoded) == len(seeks) == 2  # the last frame is decoded from the key frame before it
    load(clips, "a.mp4?frames=30")
    assert len(seeks) == 3


def test_a_clip_with_fewer_frames_gives_all(tmp_path):
    (tmp_path / "a.mp4").write_bytes(write_video(3))
    found = load(tmp_path, "a.mp4")
    assert [brightness(x) for x in found.frames] == [0, 1, 2]
    assert MediaLoader(tmp_path).count_frames("a.mp4") == 3


def test_the_default_is_eight_frames(clips):
    assert len(load(clips, "a.mp4").frames) == MediaLoader(clips).count_frames("a.mp4") == 8


def test_a_variable_rate_is_read_by_its_times(tmp_path):
    times = [0, 40, 80, 120, 160, 1000, 1500, 2000]
    (tmp_path / "a.mkv").write_bytes(write_video(8, format="matroska", milliseconds=times))
    found = load(tmp_path, "a.mkv?frames=5")
    assert found.chosen.indices == (0, 4, 5, 6, 7)
    assert found.chosen.seconds == (0.0, 0.16, 1.0, 1.5, 2.0)
    assert [brightness(x) for x in found.frames] == [0, 4, 5, 6, 7]


def moved(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Write a display matrix into the track header of an MP4 file.

    Source: ISO/IEC 14496-12, 8.3.2: the matrix a b u c d v x y w, of 16.16 and 2.30 numbers.
    """
    at = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


#: Display matrix -> where its corner at the top left goes: of a phone that was turned, or of a mirror.
MOVES = {
    (1, 0, 0, 1): (4, 4),
    (0, 1, -1, 0): (-4, 4),
    (-1, 0, 0, -1): (-4, -4),
    (0, -1, 1, 0): (4, -4),
    (-1, 0, 0, 1): (-4, 4),
    (1, 0, 0, -1): (4, -4),
    (0, 1, 1, 0): (4, 4),
    (0, -1, -1, 0): (-4, -4),
}


@pytest.mark.parametrize("matrix", MOVES)
def test_a_turned_or_mirrored_clip_is_shown_as_a_player_shows_it(tmp_path, matrix):
    (tmp_path / "a.mp4").write_bytes(moved(write_video(3), *matrix))
    found = load(tmp_path, "a.mp4?frames=1")
    assert (found.width, found.height) == (SIZE if matrix[0] else SIZE[::-1]) == found.frames[0].size
    pixels, (x, y) = np.asarray(found.frames[0]), MOVES[matrix]
    assert pixels[y, x][0] > 200 and pixels[y, x][1] < 60
    (tmp_path / "a.mp4").write_bytes(write_video(3))
    stored = np.asarray(load(tmp_path, "a.mp4?frames=1").frames[0])
    expected, (a, b, c, d) = np.zeros_like(pixels), matrix
    for y, x in np.ndindex(stored.shape[:2]):  # a negative index counts from the other side, as these moves need it
        expected[b * x + d * y - (b + d < 0), a * x + c * y - (a + c < 0)] = stored[y, x]
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("aspect", "size"), [("2/1", (96, 32)), ("1/2", (48, 64)), ("4/3", (64, 32)), ("1/1", (48, 32))]
)
def test_pixels_that_are_not_square_are_shown_square(tmp_path, aspect, size):
    (tmp_path / "a.mkv").write_bytes(write_video(3, format="matroska", aspect=Fraction(aspect)))
    found = load(tmp_path, "a.mkv?frames=2")
    assert (found.width, found.height) == size == found.frames[0].size
    assert [brightness(x) for x in found.frames] == [0, 2]
    if aspect != "1/1":
        assert "too many pixels" in refusal(tmp_path, "a.mkv?frames=2", max_pixels=48 * 32)


def test_a_pipe_that_is_named_says_how_a_clip_is_piped(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "A pipe is read by `--video - < PIPE`" in refusal(tmp_path, "pipe?frames=2")


def test_durations_of_an_animation_count(tmp_path):
    (tmp_path / "a.gif").write_bytes(write_animation(4, "GIF", [1000, 100, 100, 1000]))
    found = load(tmp_path, "a.gif?frames=3&end=1.2")  # shown at 0, 1, 1.1 and 1.2 seconds
    assert found.chosen.indices == (0, 1, 3) and found.chosen.seconds == (0.0, 1.0, 1.2)
    assert found.chosen.duration == 2.2


def test_a_transparent_animation_stands_on_white(tmp_path):
    frames = [Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (4, 4), (9, 9, 9, 255))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = load(tmp_path, "a.webp")
    assert [x.getpixel((1, 1)) for x in found.frames] == [(255, 255, 255), (9, 9, 9)]


def test_frames_of_a_folder_have_the_order_of_their_numbers(tmp_path):
    for i, name in enumerate(["f1.png", "f2.jpg", "f10.png", "f11.png"]):
        frame(10 * i).save(tmp_path / name)
    assert [brightness(x) for x in load(tmp_path, ".").frames] == [0, 10, 20, 30]
    assert [brightness(x) for x in load(None, f"{tmp_path.as_uri()}?frames=2").frames] == [0, 30]


def test_a_clip_may_come_from_stdin_or_a_data_uri(clips):
    data = (clips / "a.mp4").read_bytes()
    loader = MediaLoader(stdin=io.BytesIO(data))
    assert len(loader.load_clip("-?frames=2").frames) == loader.count_frames("-?frames=2") == 2
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    assert len(load(None, f"{uri}?frames=3").frames) == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


def write_sound() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate, samples.pts = 8000, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    return stream.getvalue()


def write_without_frames() -> bytes:
    """An AVI file whose list of frames is empty."""
    data = write_video(2, format="avi")
    at = data.index(b"movi")
    return data[: at - 4] + struct.pack("<I", 4) + b"movi"


BAD = {
    "sound.mp4": (write_sound, "holds sound and no picture"),
    "empty.mp4": (bytes, "is empty (0 bytes)"),
    "empty.avi": (write_without_frames, "is a video without frames"),
    "text.mp4": (lambda: b"hello, this is a text", "no video that vlm reads"),
    "cut.mp4": (lambda: write_video()[:-200], "damaged or cut short"),
    "cut.webm": (lambda: (x := write_video(format="webm", codec="libvpx-vp9"))[: len(x) // 2], "cut short"),
    "codec.webm": (
        lambda: write_video(3, format="webm", codec="libvpx-vp9").replace(b"V_VP9", b"V_XY9"),
        "has a codec that this PyAV cannot decode",
    ),
    **{
        f"still.{x.lower()}": ((lambda x=x: _still(x)), f"is a still image ({x}), and no clip. Write <image:FILE>")
        for x in ("JPEG", "PNG", "GIF", "WEBP")
    },
    "list.m3u8": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no video that vlm reads"),
    "list.ffconcat": (lambda: b"ffconcat version 1.0\nfile a.mp4\n", "no video that vlm reads"),
    "cut.gif": (lambda: write_animation(9, "GIF")[:-300], "damaged or cut short"),
    "cut.png": (lambda: write_animation(9, "PNG")[:-300], "damaged or cut short"),
}


def _still(format: str) -> bytes:
    stream = io.BytesIO()
    frame(3).save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name, capfd):
    make, words = BAD[name]
    (tmp_path / name).write_bytes(make())
    assert words in refusal(tmp_path, f"{name}?frames=9")
    assert capfd.readouterr() == ("", "")  # FFmpeg says nothing on its own


def test_a_clip_whose_header_comes_first_may_be_cut_short(tmp_path):
    path = tmp_path / "whole.mp4"
    with (
        av.open(io.BytesIO(write_video(codec="h264"))) as old,
        av.open(str(path), "w", options={"movflags": "faststart"}) as new,
    ):
        video = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = video
                new.mux(packet)
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"mdat") + 300])
    assert len(load(tmp_path, "whole.mp4").frames) == 8
    assert "cut short" in refusal(tmp_path, "cut.mp4")


def test_places_outside_of_the_clip_are_refused(clips):
    words = "start=90 lies beyond the end of 'a.mp4', which lasts 3.00 s. Give an earlier start"
    assert words in refusal(clips, "a.mp4?start=90")
    with pytest.raises(MediaError, match="beyond the end"):
        MediaLoader(clips).count_frames("a.mp4?start=90")
    assert "is a folder of frames, which have no times" in refusal(clips, "frames?fps=1")
    (clips / "none").mkdir(exist_ok=True)
    assert "is a folder without pictures" in refusal(clips, "none")
    assert "cannot find 'b.mp4'" in refusal(clips, "b.mp4")


def test_limits_of_pixels_hold_for_clips(clips):
    limit = SIZE[0] * SIZE[1]
    for name in ("a.mp4", "a.gif", "frames"):
        assert "too many pixels" in refusal(clips, name, max_pixels=limit - 1)
        assert len(load(clips, f"{name}?frames=4", max_pixels=limit).frames) == 4
        assert "5 frames of" in refusal(clips, f"{name}?frames=5", max_pixels=limit)


def test_urls_and_the_media_root_hold_for_clips(clips, tmp_path):
    assert "--allow-urls" in refusal(clips, "https://example.org/a.mp4?frames=2")
    assert "leads out of the media root" in refusal(clips, "a.mp4?frames=2", media_root=tmp_path)
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").symlink_to(clips / "a.png")
    assert "leads out of the media root" in refusal(tmp_path, "frames", media_root=tmp_path)


def test_without_pyav_the_error_says_what_to_install(clips, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError("no av")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'vlm-cli[video]'" in refusal(clips, "a.mp4")
    for name in ("a.gif", "a.webp", "a.png", "frames"):
        assert len(load(clips, f"{name}?frames=2").frames) == 2


def test_an_image_placeholder_points_to_clips(clips):
    with pytest.raises(MediaError, match=r"\(a video; show it with <video:FILE>\)"):
        MediaLoader(clips).load("a.mp4")
