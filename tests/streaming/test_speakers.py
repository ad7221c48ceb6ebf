import numpy as np

from jax_avatar.streaming.speakers import speaker_masks


def test_background_belongs_to_everybody_and_a_person_to_nobody_else():
    masks = np.zeros((2, 1, 64, 128), np.float32)
    masks[0, :, 16:48, 8:40] = 1
    masks[1, :, 16:48, 88:120] = 1
    routed = speaker_masks(masks, 3, 8, 16)
    assert routed.shape == (2, 3, 8, 16)
    assert routed[:, :, 0, 7].all()  # background between them
    left, right = (slice(3, 5), slice(2, 4)), (slice(3, 5), slice(12, 14))
    assert routed[0][:, *left].all() and not routed[1][:, *left].any()
    assert routed[1][:, *right].all() and not routed[0][:, *right].any()


def test_someone_absent_claims_nothing():
    masks = np.zeros((2, 2, 32, 32), np.float32)
    masks[0, :, 8:24, 8:24] = 1
    routed = speaker_masks(masks, 2, 4, 4)
    assert routed[0].all()
    assert not routed[1, :, 1:3, 1:3].any()
