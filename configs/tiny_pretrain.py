"""Trains assets/tiny.npz from scratch on drawn scenes: captions, counts, boxes.

    python tools/make_demo_data.py --task=pretrain --out=runs/pretrain_data --train=80000 --validation=300
    python -m launch.train --config=configs/tiny_pretrain.py --workdir=runs/tiny_pretrain --fake_devices=1

docs/tiny_model.md has its time and scores.
"""

from ml_collections import ConfigDict

from pgdist.config import default_config


def get_config() -> ConfigDict:
    """The config; any field can be overridden on the command line."""
    c = default_config()
    c.model.preset = "tiny"
    c.model.image_dtype = c.model.text_dtype = "float32"  # a CPU computes bfloat16 slowly
    c.tokenizer = "assets/tiny_tokenizer.model"
    c.data.train = "runs/pretrain_data/train.jsonl"
    c.data.validation = "runs/pretrain_data/validation.jsonl"
    c.data.text_length = 17  # the longest caption with its prefix, and EOS
    c.data.workers = 1
    c.trainable = ((".*", 1.0),)
    c.steps = 24_000
    c.batch_size = 32
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.b2 = 0.99
    c.optimizer.clip_norm = 1.0
    c.schedule.warmup = 0.02
    c.mesh.fsdp = 1
    c.eval.every = 2000
    c.eval.max_new_tokens = 16
    c.checkpoint.every = 1000
    return c
