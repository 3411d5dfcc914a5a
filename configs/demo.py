"""The tutorial's scenario on the model that the repository carries: attention only, SGD, a task the model
does not know.

    python tools/make_demo_data.py --task=relations --out=runs/demo_data --train=2048 --validation=96
    python -m launch.train --config=configs/demo.py --workdir=runs/demo

tools/run_demo.sh does this and more.
"""

from ml_collections import ConfigDict

from pgdist.config import default_config


def get_config() -> ConfigDict:
    """The config; any field can be overridden on the command line."""
    c = default_config()
    c.model.preset = "tiny"
    c.model.image_dtype = c.model.text_dtype = "float32"  # a CPU computes bfloat16 slowly
    c.init = "assets/tiny.npz"
    c.tokenizer = "assets/tiny_tokenizer.model"
    c.frozen_dtype = "bfloat16"
    c.trainable = (("llm/layers/attn/.*", 1.0), (".*", 0.0))

    c.data.train = "runs/demo_data/train.jsonl"
    c.data.validation = "runs/demo_data/validation.jsonl"
    c.data.text_length = 24  # the longest description with its prompt

    c.steps = 128
    c.batch_size = 64
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.5
    c.schedule.name = "cosine"
    c.schedule.warmup = 0.1
    c.eval.every = 16
    c.eval.examples = 4
    c.eval.max_new_tokens = 24
    c.checkpoint.every = 32
    return c
