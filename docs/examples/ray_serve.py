"""Several replicas, each with a mesh of its own, behind one address: Ray Serve.

    pip install ".[serve]" "ray[serve]"
    python docs/examples/ray_serve.py --replicas 2
    python docs/examples/ray_serve.py --replicas 4 --mesh 5 --gpus 5 --checkpoint model

A replica is ready when its model is compiled. A WebSocket stays with the replica that took it, and
a replica is given no more of them than it has sessions.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ray import serve

from jax_avatar.weights.folder import ASSETS, DEFAULT

ROOT = Path(__file__).parents[2]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--replicas", type=int, default=2, help="meshes")
    add("--mesh", default="1", help="slices of each, as for launch/serve.py")
    add("--checkpoint", default=str(DEFAULT), help="model folder")
    add("--sessions", type=int, default=1, help="of each replica")
    add("--cpus", type=float, default=1, help="of each replica")
    add("--gpus", type=float, default=0, help="of each replica")
    add("--port", type=int, default=8000, help="to listen on")
    return parser.parse_args()


def build_app(mesh: str, checkpoint: str, sessions: int):
    """The application of one replica, compiled and warm; runs in the replica's process."""
    os.environ.setdefault("NPROC", "16")  # as in launch/serve.py
    from jax_avatar.io.image import load_image
    from jax_avatar.portraits.view import PortraitView
    from jax_avatar.serving.app import make_app
    from jax_avatar.serving.pool import SessionPool
    from jax_avatar.serving.server_state import ServerState
    from jax_avatar.streaming.plan import stream_layout
    from jax_avatar.streaming.session import AvatarSession, num_slices
    from jax_avatar.weights.folder import load_model, load_settings
    from launch.common import prepare_jax, prepare_portrait

    path = ASSETS / "portraits" / "amara.png"
    image = load_image(path)
    settings = load_settings(checkpoint)
    layout = stream_layout(settings, mesh)
    portrait = prepare_portrait(str(path), image, checkpoint, settings, None).reference
    prepare_jax(num_slices(layout))
    model = load_model(checkpoint)
    pool = SessionPool(
        lambda shared: AvatarSession(shared or model, portrait, layout), most=sessions
    )
    pool.open()
    return make_app(ServerState(pool, image, PortraitView(settings.framing)))


def main() -> None:
    arguments = parse_arguments()

    def build():
        return build_app(arguments.mesh, arguments.checkpoint, arguments.sessions)

    @serve.deployment(
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.sessions + 1,  # one to ask for the page or its health
        ray_actor_options={
            "num_cpus": arguments.cpus,
            "num_gpus": arguments.gpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        },
    )
    @serve.ingress(build)
    class Avatar:
        pass

    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(Avatar.bind(), blocking=True)


if __name__ == "__main__":
    main()
