"""Makes training data: raw clips from people that are rendered or from videos, then encoded ones.

    python launch/prepare_data.py people --out data/people
    python launch/prepare_data.py videos --src footage --out data/videos --size 384*704 --fps 25
    python launch/prepare_data.py encode --data data/people --checkpoint jax_avatar/assets/small \\
        --out data/latents --phases 4

The latents of an anchored VAE are motion, so that data for its transformer need no pictures:

    python launch/prepare_data.py utterances --out data/utterances
    python launch/prepare_data.py motion --utterances data/utterances \\
        --checkpoint jax_avatar/assets/anchored --speech runs/speech25 --out data/motion --hours 4

`python launch/prepare_data.py stats data/people` tells what is in a set, raw or encoded, as a table
and as `statistics.json`. `... portraits --out jax_avatar/assets/portraits` draws the portraits that
come with the package; none of these people is in the training data.

The default set of people (320 people, 714 clips of three seconds at 96x96) is that of the model
that ships and takes ten minutes on one CPU core. A command that was stopped goes on where it was
when it is repeated.
"""

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tqdm import tqdm

from launch import cli

PORTRAITS = {"amara": (5006, 9), "jun": (5008, 5), "lena": (5029, 1)}
"""Seeds of person and scene; the seeds of training people end below 5000."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (define, _, help_text) in COMMANDS.items():
        define(commands.add_parser(name, help=help_text).add_argument)
    return parser.parse_args(argv)


def people_flags(add: Callable) -> None:
    add("--out", required=True, help="folder to write to")
    add("--people", type=int, default=320, help="training people")
    add("--clips_per_person", type=int, default=2, help="clips of each of them")
    add("--held_out_people", type=int, default=24, help="people kept for tests")
    add("--held_out_clips", type=int, default=24, help="clips per held-out split")
    add("--cartoon_clips", type=int, default=2, help="clips in another style")
    add("--size", nargs="+", default="96*96", help=f"{cli.SIZE}, a square")
    add("--num_frames", type=int, default=49, help="frames per clip, 1 + 4n")
    add("--fps", type=int, default=16, help="frames per second")
    add("--movement", type=cli.finite, default=0.3, help="scale of the head's movements")
    add("--seed", type=int, default=0, help="another seed, other people")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes to render with")


def portraits_flags(add: Callable) -> None:
    add("--out", required=True, help="folder to write to")
    add("--size", nargs="+", default="256*256", help=f"{cli.SIZE}, a square")


def videos_flags(add: Callable) -> None:
    add("--src", required=True, help="folder with videos, and folders in it")
    add("--out", required=True, help="folder to write to")
    add("--size", nargs="+", default="96*96", help=cli.SIZE)
    add("--fps", type=int, default=16, help="frames per second, 16 or 25")
    add("--min_s", type=cli.finite, default=2.0, help="shortest clip in seconds")
    add("--max_s", type=cli.finite, default=20.0, help="longest clip in seconds")
    face_share = "least height of a face, of the picture's"
    add("--face_share", type=cli.finite, default=0.15, help=face_share)
    face_zoom = "crop height in face heights; 0: all that fits"
    add("--face_zoom", type=cli.finite, default=0.0, help=face_zoom)
    add("--speech_share", type=cli.finite, default=0.7, help="least share of speech")
    add("--looks_per_s", type=cli.finite, default=4.0, help="looks for faces per second")
    latents_step = "clips have 1 + 4n frames, n a multiple of this"
    add("--latents_step", type=int, default=4, help=latents_step)
    held_out_share = "share of the videos kept for tests"
    add("--held_out_share", type=cli.finite, default=0.05, help=held_out_share)
    add(
        "--filter",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a function of your own, clip -> reason or None; may be given again",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="videos cut at the same time")


def encode_flags(add: Callable) -> None:
    add("--data", required=True, help="folder of raw clips: people or videos")
    checkpoint = f"{cli.CHECKPOINT} whose encoders are used (--model until 0.1)"
    add("--checkpoint", "--model", required=True, help=checkpoint)
    add("--vae", default="", help="folder of another VAE")
    add("--speech", default="", help="folder of another speech encoder")
    add("--out", required=True, help="folder to write to")
    add("--splits", nargs="*", default=[], help="to encode; all if not given")
    add("--phases", type=int, default=1, help="times a training clip is encoded, 1 to 4")
    add("--clips_per_shard", type=int, default=512, help="records of a shard")
    repeats = "frames a portrait is encoded as, 1 or 5"
    add("--reference_repeats", type=int, default=1, help=repeats)
    add("--negative_prompt", default="", help="of guidance, if there is text")
    add(
        "--no_features",
        dest="store_features",
        action="store_false",
        help="leave the speech features to be computed in training",
    )


def utterances_flags(add: Callable) -> None:
    add("--out", required=True, help="folder to write to")
    amounts_flags(add)
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes to speak with")


def amounts_flags(add: Callable) -> None:
    for name, count in (("flite", 700), ("hibari", 800), ("kokoro", 120)):
        add(f"--{name}", type=int, default=count, help=f"training sentences of {name}; 0: none")
    add("--utterances_seed", type=int, default=0, help="another seed, other sentences")


def motion_flags(add: Callable) -> None:
    add("--out", required=True, help="folder to write to")
    add("--utterances", required=True, help="folder of speech that the command utterances made")
    amounts_flags(add)
    checkpoint = f"{cli.CHECKPOINT} whose encoders are used"
    add("--checkpoint", required=True, help=checkpoint)
    add("--vae", default="", help="folder of another VAE")
    add("--speech", default="", help="folder of another speech encoder")
    no_features = "leave the speech features to be computed in training"
    add("--no_features", dest="store_features", action="store_false", help=no_features)
    add("--hours", type=cli.finite, default=4.0, help="of training tracks")
    minutes = "of each held-out split"
    add("--held_out_minutes", type=cli.finite, default=20.0, help=minutes)
    add("--seconds", type=cli.finite, default=20.0, help="length of a track")
    add("--fps", type=int, default=25, help="video frames per second")
    add("--movement", type=cli.finite, default=0.6, help="scale of the head's movements")
    add("--actions", type=cli.finite, default=0.0, help="share of tracks with timed actions")
    add("--quiet", type=cli.finite, default=0.1, help="share of tracks that are mostly silence")
    add("--tracks_per_shard", type=int, default=90, help="records of a shard")
    add("--seed", type=int, default=0, help="another seed, other tracks")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes to draw with")


def stats_flags(add: Callable) -> None:
    add("data", help="folder of raw or encoded clips")
    add("--sample", type=int, default=2000, help="clips to open, evenly spread")
    add("--out", default="", help="JSON file to write; DATA/statistics.json if empty")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses outputs that are inputs, and counts and sizes that make no data; reads sizes."""
    if arguments.command in ("videos", "encode", "motion"):
        inputs = ("src", "data", "checkpoint", "utterances")
        given = {name: getattr(arguments, name, None) for name in inputs}
        cli.refuse_input_as_output("out", arguments.out, **given)
    if getattr(arguments, "workers", 1) < 1:
        raise ValueError(f"--workers {arguments.workers}: expected at least 1.")
    if not hasattr(arguments, "size"):
        return
    height, width = cli.parse_size(arguments.size)
    if arguments.command == "videos":
        arguments.size = (height, width)
        return
    if height != width:
        raise ValueError(f"--size {height}*{width}: expected a square, such as {height}*{height}.")
    if arguments.command == "portraits" and not 16 <= height <= 4096:
        raise ValueError(f"--size {height}*{height}: expected 16 to 4096 pixels a side.")
    arguments.size = height


def check_programs(arguments: argparse.Namespace) -> None:
    if arguments.command == "videos":
        try:
            import cv2  # noqa: F401
            import webrtcvad  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"videos need a package that is not installed ({error}); install the extra "
                '`videos`: pip install "jax_avatar[videos]"'
            ) from error
    if arguments.command not in ("people", "portraits", "utterances", "motion"):
        return
    speaks = arguments.command == "people" or getattr(arguments, "flite", 0)
    if speaks and arguments.command != "motion" and shutil.which("flite") is None:
        raise ValueError(
            "speech synthesis needs the program `flite`, which was not found; install the package "
            "`flite` (Debian and Ubuntu: `sudo apt install flite`)"
        )
    if arguments.command == "utterances" and (arguments.hibari or arguments.kokoro):
        from jax_avatar.data.talking_people.voices import check_installed

        check_installed()
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "faces need numba, which is not installed; install the extra `people`: "
            'pip install "jax_avatar[people]"'
        ) from error


def config_of(kind, arguments: argparse.Namespace):
    """The settings among the arguments as their dataclass."""
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(kind)}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return kind(**{name: value for name, value in (given | lists).items() if value is not None})


def worker_pool(workers: int):
    """Processes that leave Ctrl-C to this one, which ends them."""
    # Spawned, not forked: JAX and numba hold threads.
    context = multiprocessing.get_context("spawn")
    return context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def prepare_people(arguments: argparse.Namespace) -> None:
    from jax_avatar.data.talking_people import clips

    config = config_of(clips.PeopleConfig, arguments)
    clips.start_manifest(config, arguments.out)
    jobs = clips.plan_shards(config, arguments.out)
    left = [job for job in jobs if not job.path.exists()]
    total = sum(len(job.clips) for job in jobs) * config.num_frames
    done = total - sum(len(job.clips) for job in left) * config.num_frames
    start = time.monotonic()
    with tqdm(total=total, initial=done, unit="frame", smoothing=0.1) as progress:
        if left:
            with worker_pool(min(arguments.workers, len(left))) as pool:
                for frames in pool.imap_unordered(clips.write_shard, left):
                    progress.update(frames)
    data_hash = clips.finish_manifest(config, arguments.out)
    seconds = time.monotonic() - start
    print(
        f"{arguments.out}: {total // config.num_frames} clips, {total} frames, "
        f"{(total - done) / seconds:.0f} frames/s, sha256 {data_hash[:16]}"
    )


def load_filter(name: str):
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"--filter {name}: {error}; expected MODULE:NAME of a function that can be imported."
        ) from error
    if not callable(found):
        raise ValueError(f"--filter {name} is not a function; expected clip -> reason or None.")
    return found


def cut_videos(arguments: argparse.Namespace) -> None:
    from jax_avatar.data import records
    from jax_avatar.data.videos import clips

    config = config_of(clips.VideoConfig, arguments)
    filters = [load_filter(name) for name in arguments.filter]
    jobs = clips.plan(config, arguments.src, arguments.out, filters)
    clips.start(config, arguments.out, arguments.filter)
    left = [job for job in jobs if not job.note.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="video") as progress:
        if len(left) > 1 and arguments.workers > 1:
            with worker_pool(min(arguments.workers, len(left))) as pool:
                for _ in pool.imap_unordered(clips.cut_video, left):
                    progress.update()
        else:
            for job in left:
                clips.cut_video(job)
                progress.update()
    data_hash = clips.finish(config, arguments.out, arguments.filter)
    made = records.read_manifest(arguments.out)
    print(
        f"{arguments.out}: {made['clips']} clips, {made['seconds']:.0f} s of {made['videos']} "
        f"videos; {made['rejected']} parts rejected, reasons in {clips.REJECTED}; "
        f"sha256 {data_hash[:16]}"
    )


def encode_clips(arguments: argparse.Namespace) -> None:
    # Late, so that --help answers at once.
    from jax_avatar.data.encode import EncodeConfig, encode_data, first_clip
    from jax_avatar.streaming.prompts import prompt_encoder
    from jax_avatar.weights.encoders import Encoders
    from jax_avatar.weights.folder import has_text_encoder

    config, model = config_of(EncodeConfig, arguments), arguments.checkpoint
    folders = {"vae": arguments.vae or model, "speech": arguments.speech or model, "text": model}
    states = prompt_encoder(model) if has_text_encoder(model) else None
    text = (lambda prompt: states(prompt)[0]) if states else None
    fps = first_clip(arguments.data).fps  # the data's: a speech encoder of any rate follows
    encoders = Encoders.load(folders, text=text, fps=fps)
    index = encode_data(arguments.data, arguments.out, encoders, config, splits=arguments.splits)
    for split, shards in index["splits"].items():
        clips, size = sum(len(s["latents"]) for s in shards), sum(s["bytes"] for s in shards)
        print(
            f"{arguments.out}: {split}, {clips} clips in {len(shards)} shards, {size / 1e6:.0f} MB"
        )
    print(f"hash {index['hash'][:16]}")


def speak_utterances(arguments: argparse.Namespace) -> None:
    from jax_avatar.data.talking_people import utterances

    config = utterances_config(arguments)
    left = utterances.left_to_do(config, arguments.out)
    with tqdm(total=sum(job.count for job in left), unit="sentence", smoothing=0.1) as progress:
        if left:
            with worker_pool(min(arguments.workers, len(left))) as pool:
                for count in pool.imap_unordered(utterances.make_utterances, left):
                    progress.update(count)
    for split in utterances.SPLITS:
        spoken = utterances.load_utterances(config, arguments.out, split)
        print(
            f"{arguments.out}: {split}, {spoken.seconds / 60:.0f} min, {len(spoken.voices)} voices"
        )


def utterances_config(arguments: argparse.Namespace):
    from jax_avatar.data.talking_people.utterances import UtterancesConfig

    config = config_of(UtterancesConfig, arguments)
    return dataclasses.replace(config, seed=arguments.utterances_seed)


def make_motion(arguments: argparse.Namespace) -> None:
    from jax_avatar.data.motion_set import MotionCode, MotionSetConfig, write_motion_set
    from jax_avatar.data.talking_people.tracks import TrackConfig
    from jax_avatar.weights.encoders import Encoders

    amounts, tracks = config_of(MotionSetConfig, arguments), config_of(TrackConfig, arguments)
    model = arguments.checkpoint
    folders = {"vae": arguments.vae or model, "speech": arguments.speech or model}
    code = MotionCode(folders["vae"])
    encoders = Encoders.load(folders, fps=tracks.fps) if arguments.store_features else None
    spoken = utterances_config(arguments)
    total = amounts.total(tracks.seconds)
    with tqdm(total=total, unit="track", smoothing=0.1) as progress:
        with worker_pool(arguments.workers) as pool:
            index = write_motion_set(
                arguments.out, code, encoders, amounts, tracks, spoken, arguments.utterances,
                map_jobs=pool.imap, advance=progress.update,
            )  # fmt: skip
    for split, shards in index["splits"].items():
        clips, size = sum(len(s["latents"]) for s in shards), sum(s["bytes"] for s in shards)
        print(
            f"{arguments.out}: {split}, {clips} tracks in {len(shards)} shards, {size / 1e6:.0f} MB"
        )
    print(f"hash {index['hash'][:16]}")


def print_statistics(arguments: argparse.Namespace) -> None:
    from jax_avatar.data.statistics import FILE, data_statistics, statistics_table
    from jax_avatar.weights.files import save_json

    found = data_statistics(arguments.data, sample=arguments.sample)
    print(statistics_table(found))
    path = pathlib.Path(arguments.out or pathlib.Path(arguments.data) / FILE)
    try:
        save_json(path, found)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); give --out.") from error
    print(f"written to {path}")


def draw_portraits(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from jax_avatar.data.talking_people.person import change_scene, make_person
    from jax_avatar.data.talking_people.render import render_portrait

    folder = pathlib.Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (person, scene) in PORTRAITS.items():
        shown = change_scene(make_person(person, texture_size=1024), scene)
        path = folder / f"{name}.png"
        Image.fromarray(render_portrait(shown, arguments.size)).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


COMMANDS = {
    "people": (
        people_flags,
        prepare_people,
        "synthetic talking people, rendered and voiced on this machine",
    ),
    "portraits": (portraits_flags, draw_portraits, "the portraits that come with the package"),
    "videos": (
        videos_flags,
        cut_videos,
        "clips of one talking person, cut from a folder of videos with sound",
    ),
    "encode": (
        encode_flags,
        encode_clips,
        "raw clips -> latents, text rows and speech features, as the transformer trains on",
    ),
    "utterances": (
        utterances_flags,
        speak_utterances,
        "sentences of many voices, synthesised once for `motion` and the speech encoder",
    ),
    "motion": (
        motion_flags,
        make_motion,
        "speech and the motion that goes with it, as latents of an anchored VAE, not rendered",
    ),
    "stats": (
        stats_flags,
        print_statistics,
        "durations, sizes, speech, loudness, faces and rejections of a data set",
    ),
}
"""Name -> definition of its flags, command, description."""


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        check_programs(arguments)
        check_arguments(arguments)
        COMMANDS[arguments.command][1](arguments)

    return cli.exit_code(run, hint="repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
