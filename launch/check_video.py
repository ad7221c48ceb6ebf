"""Detection of generated videos: watermark, metadata, C2PA manifest.

python launch/check_video.py avatar.mp4
python launch/check_video.py --json avatar.mp4
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags

from jax_avatar.io.provenance import Marks, read_marks
from jax_avatar.io.watermark import THRESHOLD
from launch import cli

flags.DEFINE_bool("json", False, "print one JSON line, with the whole manifest")
FLAGS = flags.FLAGS


def describe(marks: Marks) -> str:
    found, rate = marks.watermark, marks.watermark.false_positive_rate
    lines = [
        f"watermark: {'found' if found.is_marked else 'not found'} (score {found.score:.1f}, "
        f"found from {THRESHOLD:g} on; by chance in at most {rate:.1g} of unmarked videos)",
        f"metadata:  {marks.comment or 'none'}",
    ]
    if marks.manifest is None:
        lines.append("C2PA:      no manifest (or c2pa-python is not installed)")
    else:
        codes = [status["code"] for status in marks.manifest.get("validation_status", [])]
        lines.append(f"C2PA:      {marks.manifest['validation_state']} {', '.join(codes)}".rstrip())
    return "\n".join(lines)


def main(video: str) -> None:
    marks = read_marks(video)
    if FLAGS.json:
        found = marks.watermark._asdict() | {"is_marked": marks.watermark.is_marked}
        report = {"watermark": found, "comment": marks.comment, "manifest": marks.manifest}
        print(json.dumps(report | {"says_generated": marks.says_generated}))
    else:
        print(describe(marks))


if __name__ == "__main__":
    cli.run_with_flags(main, names=["VIDEO"])
