"""From files to the rows that a model reads: text, images, JSONL sources, the order of examples, the host's
loader.

Read in this order: `jsonl` (what an example is), `text` and `images` (what the model sees of it), `order`
(which example is where in training), `loader` (the rows that one process holds). Import the modules
themselves; this file imports none so that reading a JSONL does not load Grain.
"""
