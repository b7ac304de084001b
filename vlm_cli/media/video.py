"""The frames of a video file, read by PyAV (FFmpeg's libraries), of which only the chosen ones are kept.

The times of all frames come from the file's packets, without decoding. To read a frame, the decoder starts at the key
frame before it:

    packets   K . . . . . . . K . . . . . . . K . . .       K key frame
    chosen    #                   #             #
    decoded   #               # # #           # #

FFmpeg reads some formats that name other files or addresses. So only containers of `_CONTAINERS` are opened, none of
which does; FFmpeg may open nothing on its own; and the file comes as bytes, never as a name that FFmpeg would read.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from vlm_cli.errors import MediaError, first_line
from vlm_cli.media.decode import MAX_PIXELS, check_size
from vlm_cli.media.display import find_shape, show_frame
from vlm_cli.media.timeline import Timeline

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VideoFile"]

#: Names of FFmpeg's demuxers. Playlists and lists of files are not among them.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
MAX_FRAMES = 2**22  # of a file: 19 hours at 60 a second
_OF_FILES = (OSError, ValueError, MemoryError, OverflowError)
_NEAR = 4  # frames that are decoded rather than skipped
_RATE = 25  # frames a second, of a file that states neither times nor a rate


class VideoFile:
    """A video file as a clip.

    Args:
        file: the open file.
        name: what messages call it.
        max_pixels: the most pixels of one frame; None takes `MAX_PIXELS`.

    Attributes:
        stated: how many frames the header says that the file has; None if it does not.

    Raises:
        MediaError: if PyAV is not installed, or the file is no video that it reads.
    """

    def __init__(self, file: BinaryIO, name: str, max_pixels: int | None) -> None:
        self.file, self.name = file, name
        self.max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
        self._timeline: Timeline | None = None
        self._keys: list[int] = []  # times of key frames, in ticks; empty if the packets have no times
        self._open()
        context = self.stream.codec_context
        check_size((context.width, context.height), name, max_pixels)
        self.stated: int | None = self.stream.frames or None

    def _open(self) -> None:
        av = _import_av(self.name)
        self.file.seek(0)
        try:
            self.container = av.open(self.file, options=_OPTIONS, metadata_errors="replace")
        except Exception as error:  # FFmpeg's errors, and those of reading the file
            raise self._damaged(error) from None
        streams = [x for x in self.container.streams.video if "ATTACHED_PIC" not in _flags(x.disposition)]
        if not streams:
            kind = "sound and no picture" if self.container.streams.audio else "no video stream"
            raise MediaError(f"{self.name} holds {kind}. Give a file with a video stream.")
        self.stream = streams[0]
        if self.stream.codec_context is None or not self.stream.codec_context.is_decoder:
            raise MediaError(
                f"{self.name} has a codec that this PyAV cannot decode. Convert it, for instance to H.264."
            )
        # A codec counts whole blocks and their edges, so the limit of vlm follows with each frame.
        self.stream.codec_context.options = {"max_pixels": str(2 * self.max_pixels + 2**16)}
        self.stream.thread_type = "AUTO"

    def timeline(self) -> Timeline:
        """Return when each frame is shown.

        Raises:
            MediaError: if the file is damaged, cut short, or without frames.
        """
        if self._timeline is None:
            try:
                self._timeline = self._scan()
            except Exception as error:  # as in `_open`
                raise self._damaged(error) from None
        return self._timeline

    def _scan(self) -> Timeline:
        """Read the times of all packets."""
        assert self.stream.time_base is not None
        ticks: list[int] = []
        packets = end = 0
        heard = Fraction(0)  # seconds at which the last packet of another stream ends
        for packet in self.container.demux():
            if not packet.size:  # the end of a stream
                continue
            if packet.stream_index != self.stream.index:
                heard = max(heard, ((packet.pts or 0) + (packet.duration or 0)) * (packet.time_base or Fraction(0)))
                continue
            packets += 1
            if packet.is_corrupt:
                raise self._cut_short()
            if packet.pts is None:
                return self._scan_decoded()
            if packet.is_discard:  # an edit list hides it
                continue
            if len(ticks) >= MAX_FRAMES:
                raise MediaError(f"{self.name} has more than {MAX_FRAMES:,} frames. Cut it into shorter clips.")
            ticks.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                self._keys.append(packet.pts)
        if not ticks:
            raise self._without_frames()
        ticks = sorted(set(ticks))
        self._keys.sort()
        if end <= ticks[-1]:  # the packets have no durations
            end = ticks[-1] + max(1, (ticks[-1] - ticks[0]) // max(1, len(ticks) - 1))
        self._check_end(packets, float(max(heard, end * self.stream.time_base)))
        return Timeline(ticks, end, self.stream.time_base)

    def _check_end(self, packets: int, end: float) -> None:
        """Refuse a file that has less than its header says: fewer packets, or an earlier end in seconds.

        Other containers than these two guess their length, or do not state it.
        """
        kinds = self.container.format.name.split(",")
        stated = (self.container.duration or 0) / 1e6
        if "mp4" in kinds and packets < len(self.stream.index_entries):
            raise self._cut_short()
        if "matroska" in kinds and stated - end > 0.5 + 0.02 * stated:
            raise self._cut_short()

    def _scan_decoded(self) -> Timeline:
        """Count frames whose packets have no times, by decoding them; the stated rate gives their times."""
        count = sum(1 for _ in islice(self._decode_all(), MAX_FRAMES))
        if not count:
            raise self._without_frames()
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(_RATE)
        return Timeline(range(count), count, 1 / Fraction(rate))

    def _decode_all(self) -> Iterator[Any]:
        """Decode from the start."""
        self.container.close()
        self._open()
        yield from self.container.decode(self.stream)

    def read(self, chosen: Sequence[int]) -> Iterator[Image]:
        """Yield the frames with these indices, which ascend, as a player shows them, as RGB.

        Raises:
            MediaError: if one of them cannot be decoded.
        """
        ticks = self.timeline().ticks
        try:
            if not self._keys:
                wanted = set(chosen)
                frames: Iterator[Any] = (
                    x for i, x in enumerate(islice(self._decode_all(), max(chosen) + 1)) if i in wanted
                )
            else:
                frames = self._read_at([ticks[i] for i in chosen])
            count = 0
            for frame in frames:
                yield self._finish(frame)
                count += 1
        except Exception as error:  # FFmpeg's errors, and those of reading the file
            raise self._damaged(error) from None
        if count < len(chosen):
            raise self._cut_short()

    def _read_at(self, times: Sequence[int]) -> Iterator[Any]:
        """Yield the frames that are shown at these times, from key frame to key frame."""
        done = 0
        while done < len(times):
            found = 0
            for frame in self._decode_from_key(times[done:]):
                yield frame
                found += 1
            if not found:  # the file's index leads behind the frame
                yield from self._decode_to(times[done:])
                return
            done += found

    def _decode_from_key(self, times: Sequence[int]) -> Iterator[Any]:
        """Seek to the key frame before the first of these times, and yield frames until another seek is shorter."""
        self.container.seek(self._key_before(times[0]), stream=self.stream, backward=True)
        found, is_first = 0, True
        for frame in self._decode_sparsely(set(times)):
            if frame.pts is None or (is_first and frame.pts > times[0]):
                return
            is_first = False
            while frame.pts >= times[found]:
                yield frame
                found += 1
                if found == len(times) or self._is_far(frame.pts, self._key_before(times[found])):
                    return

    def _decode_sparsely(self, times: set[int]) -> Iterator[Any]:
        """Decode from here on, and leave out frames that are neither wanted nor needed for another frame."""
        for packet in self.container.demux(self.stream):
            is_wanted = packet.pts is None or packet.pts in times
            self.stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield from packet.decode()

    def _decode_to(self, times: Sequence[int]) -> Iterator[Any]:
        """Decode from the start, and yield the frames of these times."""
        found = 0
        for frame in self._decode_all():
            while frame.pts is not None and frame.pts >= times[found]:
                yield frame
                found += 1
                if found == len(times):
                    return

    def _is_far(self, time: int, key: int) -> bool:
        """Tell whether so many frames lie before a key frame that seeking it is quicker than decoding them."""
        ticks = self.timeline().ticks
        return bisect_right(ticks, key) - bisect_right(ticks, time) > _NEAR

    def _key_before(self, time: int) -> int:
        return self._keys[max(0, bisect_right(self._keys, time) - 1)]

    def _finish(self, frame: Any) -> Image:
        """Turn a frame into what a player shows, as RGB."""
        from av.sidedata.sidedata import Type

        check_size((frame.width, frame.height), self.name, self.max_pixels)
        if frame.is_corrupt:
            raise MediaError(f"{self.name} is damaged: a frame of it cannot be decoded whole. Fetch or save it again.")
        aspect = self.stream.sample_aspect_ratio
        check_size(find_shape(frame.width, frame.height, aspect), self.name, self.max_pixels, "a frame as it is shown")
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        return show_frame(frame.to_image(), aspect, None if matrix is None else bytes(matrix))

    def _cut_short(self) -> MediaError:
        return MediaError(f"{self.name} is cut short: its end is missing. Fetch or save it again.")

    def _without_frames(self) -> MediaError:
        return MediaError(f"{self.name} is a video without frames. Give another file.")

    def _damaged(self, error: Exception) -> MediaError:
        if isinstance(error, MediaError):
            return error
        if not isinstance(error, _OF_FILES) and not type(error).__module__.startswith("av."):
            raise error  # a mistake of ours
        self.file.seek(0)
        start = self.file.read(12)
        if isinstance(error, MemoryError):
            return MediaError(f"there is not enough memory to decode {self.name}. Scale it down first.")
        words = f"{self.name} is damaged or cut short, or no video that vlm reads"
        advice = "Give a whole MP4, WebM, MKV, MOV or AVI file, a GIF, or a folder of frames."
        reason = re.sub(r"^\[Errno -?\d+\] |: '[^']*'.*", "", first_line(error))
        return MediaError(f"{words} ({reason}): it begins with {start!r}. {advice}", public=f"{words}. {advice}")


def _flags(disposition: Any) -> str:
    return str(getattr(disposition, "name", "") or "").upper()


def _import_av(name: str) -> Any:
    """Import PyAV.

    Raises:
        MediaError: saying what to install.
    """
    try:
        import av
    except ImportError:
        raise MediaError(
            f"{name} is read by PyAV, which is not installed: pip install 'vlm-cli[video]'. Animated GIF, WebP and "
            "PNG files and folders of frames need no PyAV."
        ) from None
    return av
