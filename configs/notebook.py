"""The tutorial "Fine-tune PaliGemma with JAX" at full size: PaliGemma 3B at 224 px on longcap100, attention
only, one T4.

    python -m launch.train --config=configs/notebook.py --workdir=runs/notebook

fetches the weights from Kaggle (accept the licence at kaggle.com/models/google/paligemma and set KAGGLE_API_TOKEN), and
the tokenizer and longcap100 (90 + 10 images with long captions) from public buckets. examples/finetune_paligemma.ipynb
is the same as a notebook.
"""

from ml_collections import ConfigDict

from pgdist.config import default_config


def get_config() -> ConfigDict:
    """The config; any field can be overridden on the command line."""
    c = default_config()
    c.model.preset = "paligemma-3b-224"
    # A T4 has no bfloat16: the image tower computes in float16, the decoder, whose activations leave
    # float16's range, in float32.
    c.model.image_dtype = "float16"
    c.model.text_dtype = "float32"
    c.init = "kaggle://google/paligemma/jax/paligemma-3b-pt-224/paligemma-3b-pt-224.f16.npz"
    c.tokenizer = "gs://big_vision/paligemma_tokenizer.model"
    c.frozen_dtype = "float16"
    c.trainable = (("llm/layers/attn/.*", 1.0), (".*", 0.0))

    c.data.train = "gs://longcap100/data_train90.jsonl"
    c.data.validation = "gs://longcap100/data_val10.jsonl"
    c.data.prefix = "caption en"
    c.data.lowercase = True
    c.data.text_length = 128

    c.steps = 64
    c.batch_size = 8
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.03
    c.schedule.name = "cosine"
    c.schedule.warmup = 0.1
    c.eval.every = 16
    c.eval.examples = 4
    c.eval.max_new_tokens = 128
    return c
