"""From files to the rows that a model reads.

Read in this order: `jsonl` (what an example is), `text` and `images` (what the model sees of it), `order`
(which example is where in training), `loader` (the rows that one process holds), `bad_records` (when too
many are bad). Import the modules themselves; this file imports none so that reading a JSONL does not load
Grain.
"""
