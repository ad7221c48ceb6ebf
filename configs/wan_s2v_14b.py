"""The official size: Wan2.2-S2V-14B with the Live Avatar LoRA merged into it.

    python launch/plan.py --model wan_s2v_14b --mesh 5 --hardware h200

Plain values, no weights. Five devices of 80 GB or more stream it at 25 frames per second in the
release (four denoise, one decodes); `docs/weights.md` says what fits where. The release's sizes,
720*400 and 704*384, both give 384x704 pixels (or 704x384), since sides snap to multiples of 64.
48 frames per clip of the release are 4 blocks of 3 latents, the length of the window.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes of the networks and how they are streamed."""
    return ConfigDict(
        {
            "name": "wan_s2v_14b",
            "kinds": {"dit": "wan_s2v", "vae": "wan", "speech": "wav2vec2", "text": "umt5"},
            "dit": _dit(),
            "vae": _vae(),
            "speech": _speech(),
            "text": _text(),
            "stream": _stream(),
        }
    )


def _dit() -> dict:
    return {
        "width": 5120,
        "ffn_width": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "freq_width": 256,
        "text_width": 4096,
        "text_len": 512,
        "latent_channels": 16,
        "pose_channels": 16,
        "audio_width": 1024,
        "audio_layers": 25,
        "num_audio_tokens": 4,
        "audio_inject_layers": (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        "audio_history": 73,
        "frames_per_block": 3,
        "ring_blocks": 4,
        "reference_frame": 30,
        "rope_theta": 10000.0,
        "half_rotary": True,
        "framepack": True,
        "zero_init": True,
        "eps": 1e-6,
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
    }


def _vae() -> dict:
    return {
        "dim": 96,
        "z_dim": 16,
        "dim_mult": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "temporal_downsample": (False, True, True),
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
    }


def _speech() -> dict:
    """wav2vec2-large-xlsr-53."""
    return {
        "width": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "ffn_width": 4096,
        "conv_widths": (512, 512, 512, 512, 512, 512, 512),
        "conv_kernels": (10, 3, 3, 3, 3, 2, 2),
        "conv_strides": (5, 2, 2, 2, 2, 2, 2),
        "position_kernel": 128,
        "position_groups": 16,
        "fps": 25,
    }


def _text() -> dict:
    """UMT5-xxl's encoder."""
    return {
        "vocab_size": 256384,
        "width": 4096,
        "ffn_width": 10240,
        "num_heads": 64,
        "head_dim": 64,
        "num_layers": 24,
        "num_buckets": 32,
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
    }


def _stream() -> dict:
    return {
        "fps": 25,
        "size": None,
        "max_area": 720 * 400,
        "multiple": 64,
        # Four steps, shifted by 3 and then shifted again, as the released sampler does.
        "sigmas": (1.0, 0.857692301273346, 0.6021505594253540, 0.008928571827709675, 0.0),
        "aas_after_blocks": 4,
        "sink_distance": (4, 30),
        "pose": "zeros",
        "motion": "still",
        "warmup_latents": 7,
        "speech_device": "vae",
    }
