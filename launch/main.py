"""The command `jax-avatar`: runs one of the others by its name.

jax-avatar stream --mesh 5      as python launch/stream.py --mesh 5
jax-avatar --help               all of them
"""

import runpy
import sys

from launch import cli

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "stream": ("launch.stream", "a portrait and a voice -> a video, block by block"),
    "serve": ("launch.serve", "live avatar in the browser"),
    "livekit-worker": ("launch.livekit_worker", "avatar of a LiveKit agent"),
    "train": ("launch.train", "one stage of training"),
    "evaluate": ("launch.evaluate", "scores of a model on people and voices it has never met"),
    "plan": ("launch.plan", "device requirements of a stream or of training, without weights"),
    "prepare-data": ("launch.prepare_data", "training data from rendered people or from videos"),
    "check-video": ("launch.check_video", "watermark, metadata and manifest of a video"),
    "convert": ("conversion.convert", "downloaded weights -> a model folder"),
    "export": ("conversion.export", "a converted network -> its official names"),
    "inspect": ("conversion.inspect", "kind, size, types and licence of a checkpoint"),
    "verify": ("conversion.verify", "golden files of the official code, compared"),
}
"""Name -> module, description."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        ["usage: jax-avatar COMMAND [FLAGS]; jax-avatar COMMAND --help lists the flags", "", *lines]
    )


def main() -> None:
    """Runs the command that the first argument names, with the others."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help", "help"):
        print(_usage())
        return
    if name not in COMMANDS:
        cli.say(f"error: {name or 'no command'}: expected one of {', '.join(COMMANDS)}.")
        sys.exit(cli.BAD_INPUT)
    sys.argv = [f"jax-avatar {name}", *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
