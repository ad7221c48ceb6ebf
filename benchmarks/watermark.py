"""Detection rate and cost of the watermark after video coding, on marked and unmarked clips.

python launch/stream.py --nowatermark --duration 6 --out clip.mp4
python benchmarks/watermark.py clip.mp4 ...
"""

import io
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np

from jax_avatar.io.fragments import FragmentWriter
from jax_avatar.io.video import read_video
from jax_avatar.io.watermark import detect, mark
from jax_avatar.pixels import psnr
from launch import cli


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([x.to_ndarray(format="rgb24") for x in container.decode(video=0)])


def served(frames: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Decoded frames, size in bytes, and seconds of encoding per frame."""
    height, width = frames.shape[1:3]
    writer = FragmentWriter(width, height, 16, 16_000)
    began = time.perf_counter()
    data = writer.write(frames, np.zeros(1000 * len(frames), np.float32))
    spent = time.perf_counter() - began
    data += writer.close()
    return decoded(data), len(data), spent / len(frames)


def encoded(frames: np.ndarray, codec: str, kind: str, rate: int = 0, **options: str) -> np.ndarray:
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", 16
        if rate:
            stream.bit_rate = rate
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return decoded(out.getvalue())


def measure(path: str) -> dict:
    plain = read_video(path)[0][:96]
    mark(plain[:1])  # makes the pattern
    chunks, times = np.split(plain, range(2, len(plain), 2)), []
    for chunk in chunks:  # as a live session marks them
        began = time.perf_counter()
        mark(chunk)
        times.append((time.perf_counter() - began) / len(chunk))
    marked, mark_s = mark(plain), float(np.median(times))
    seen, size, encode_s = served(marked)
    unmarked, size_before, _ = served(plain)
    error = ((marked.astype(float) - plain) ** 2).mean()
    scores = {
        "served": seen,
        "one_frame": seen[:1],
        "crf30_again": encoded(seen, "libx264", "mp4", crf="30"),
        "vp8_200k": encoded(marked, "libvpx", "webm", 200_000, deadline="realtime"),
        "unmarked": unmarked,
    }
    return {"clip": Path(path).name, "size": plain.shape[1:3]} | {
        "psnr_db": round(float(psnr(error)), 1),
        "bytes_ratio": round(size / size_before, 2),
        "mark_ms": round(mark_s * 1e3, 3),
        "encode_ms": round(encode_s * 1e3, 3),
        "scores": {name: round(detect(frames).score, 1) for name, frames in scores.items()},
    }


def main(argv=None) -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="*", default=["docs/images/demo.mp4"], help="unmarked")
    for name in parser.parse_args(argv).videos:
        print(json.dumps(measure(name)))


if __name__ == "__main__":
    cli.run(main)
